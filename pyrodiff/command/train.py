"""``pyrodiff train``, from the options to the report.

:func:`train` is the whole story; :meth:`Trainer.train` is its loop. A run can be killed at any instant and resumed as
if nothing had happened: everything due at a step is written before the next step, and repeated after a resume if it was
not.
"""

import copy
import dataclasses
import math
import os
import shlex
import signal
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from .. import plots
from ..base import ranks
from ..base.arguments import ArgumentError
from ..base.files import plainly, printable, write
from ..likelihood.bounds import Bound, bound
from ..likelihood.yardsticks import yardsticks
from ..pair.elbo import DiffusionELBO
from ..running.threads import fastest_threads
from . import models, options
from .data import Data
from .options import BUILT_IN, Plan
from .plans import prepare
from .reports import report
from .runs import (
    Kept,
    Metrics,
    Run,
    device_of,
    finite,
    kept,
    last_checkpoint,
    numbered,
    picture,
    resumed_from,
    save_figure,
    say,
    show,
)
from .stopping import Interrupted, Stop
from .use import write_samples

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Trainer", "train"]

Resume = Literal["last", "whole"] | None


def train(given: Mapping[str, Any], out: Path | None, config: Path | None, resume: Resume, line: str) -> int:
    """Train or resume a run; at the end come its bound on the test data, samples and a report.

    Arguments:
        given: The options on the line, by name.
        out: The run's folder.
        config: A TOML file of options.
        resume: Whether to resume an existing run: from its last checkpoint, or from the last whole one.
        line: The command line, to be recorded.

    Returns:
        The exit code.

    Raises:
        ArgumentError: If an option is invalid.
        FloatingPointError: If the loss, the weights or outputs of the model are not finite.
        OSError: If a file cannot be written; earlier files are unchanged.
    """
    folder, values = _given(given, out, config, resume)
    threads = torch.get_num_threads()  # restored at the end, for callers from Python
    try:
        _join(values.get("device", "auto"))
        with ExitStack() as locked, Stop(alone=ranks.count() == 1) as stop:
            run, data = _begin(folder, values, resume, line, locked, stop)
            trainer = Trainer(run, data, stop)
            try:
                trainer.train()
                _finish(run, data, stop)
            except Interrupted as interrupted:
                return _interrupted(run, interrupted)
            except OSError as error:
                raise OSError(f"{error}; the run can be resumed from what was saved before") from error
            finally:
                trainer.close()
        return 0
    finally:
        torch.set_num_threads(threads)
        if ranks.count() > 1:
            torch.distributed.destroy_process_group()


def _interrupted(run: Run, interrupted: Interrupted) -> int:
    again = shlex.join(["pyrodiff", "train", "--out", str(run.folder), "--resume"])
    saved = f"at step {run.svi.num_steps}, which is saved" if run.svi.num_steps else "before the first step"
    say(f"stopped by {signal.Signals(interrupted.signal).name} {saved}; resume with: {again}")
    return 128 + interrupted.signal


# Before the first step


def _given(
    line: Mapping[str, Any], out: Path | None, config: Path | None, resume: Resume
) -> tuple[Path, dict[str, Any]]:
    """The folder, and the given options: from the record of an existing run, from a file, and from the line."""
    values = {**(options.read(config, "--config") if config is not None else {}), **line}
    data = values.get("data")
    if data and data not in BUILT_IN and Path(data).exists():
        values["data"] = data = str(Path(data).resolve())
    if not data and out is None:
        raise ArgumentError("data", f"must be given: one of {', '.join(BUILT_IN)}, or a path")
    folder = out if out is not None else Path("runs") / (Path(str(data)).stem or "run")
    above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ArgumentError("--out", f"must be a folder that can be written to, but {above} cannot")
    record = folder / "settings.toml"
    if not record.is_file():
        if not data:
            known = ", ".join(BUILT_IN)
            raise ArgumentError(
                "--out",
                f"must be a run's folder where no data are given, but {folder} holds none: give data, one of {known}, "
                "or a path",
            )
        if folder.exists() and not (folder.is_dir() and all(map(_is_left_by_a_kill, folder.iterdir()))):
            raise ArgumentError(
                "--out", f"must be a new folder, an empty one or a run's, but {folder} is something else"
            )
        return folder, values
    if resume is None:
        raise ArgumentError("--out", f"must be a new folder, but {folder} holds a run: give --resume to go on with it")
    _refuse_links(folder)
    recorded = options.read(record, str(record))
    for name, value in values.items():
        if value != recorded.get(name) and not options.may_change(name):
            raise ArgumentError(
                name,
                f"must stay {recorded.get(name)!r} where a run is resumed, but it is {value!r}: give another --out for "
                "another run",
            )
    return folder, {**recorded, **values}


def _is_left_by_a_kill(path: Path) -> bool:
    """Whether a file may be what is left of a start that was killed before the run was recorded."""
    return path.name[0] == "." or (path.name == "commands.txt" and path.is_file() and path.stat().st_size == 0)


def _refuse_links(folder: Path) -> None:
    """Refuse a run whose sub-folders are links: old checkpoints and temporary files would be deleted elsewhere."""
    for path in (folder / name for name in ("checkpoints", "pictures", "tensorboard")):
        if path.is_symlink():
            raise ArgumentError("--out", f"must have folders of its own, but {path} is a link")


def _join(device: str) -> None:
    """Join the process group, if torchrun started several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        found = device_of(device)
        if found.type == "cuda":
            torch.cuda.set_device(found)
        torch.distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")


def _begin(
    folder: Path, given: Mapping[str, Any], resume: Resume, line: str, locked: ExitStack, stop: Stop
) -> tuple[Run, Data]:
    """The run, new or restored, in a locked folder; nothing is written before everything is checked."""
    first, is_run = ranks.number() == 0, (folder / "settings.toml").is_file()
    stop.is_safe = True
    if first and is_run:
        locked.enter_context(_lock(folder))
    device = device_of(given.get("device", "auto"))
    plan, data = prepare(given, device)
    checkpoint, best = resumed_from(folder, plan, data.form, resume == "whole") if resume else (None, None)
    run = Run(folder, plan, data.form, device, data.often() if plan.model.prediction == "level" else None)
    run.plan = plan = _with_threads(run, data)
    if checkpoint is not None:
        checkpoint, best = _restored(run, checkpoint, best, resume == "whole")
        if run.svi.num_steps > plan.training.train_steps:
            taken, wanted = run.svi.num_steps, plan.training.train_steps
            raise ArgumentError("train_steps", f"must be at least the {taken} taken, but it is {wanted}")
        if best is None:
            run.state.update(best=math.inf, best_step=0, evaluated=0)  # so that a new best one is saved
    stop.is_safe = False
    stop.check()
    if first:
        _record(folder, plan, line, None if is_run else locked)
    say(f"data: {data.form.contents}")
    if checkpoint is not None:
        say(f"resuming {folder} from step {run.svi.num_steps} of {plan.training.train_steps}")
    return run, data


def _restored(run: Run, last: Kept, best: Kept | None, whole: bool) -> tuple[Kept, Kept | None]:
    """The checkpoint that a run is resumed from, and its best one, which has to fit it too.

    Arguments:
        run: The run.
        last, best: Both of them, as :func:`~pyrodiff.command.runs.resumed_from` has them.
        whole: Whether one that does not fit the run is passed over, as one that is damaged is.
    """

    def fits(one: Kept) -> bool:
        try:
            run.restore(one)
        except ValueError:
            if not whole:
                raise
            return False
        return True

    best = best if best is not None and fits(best) else None
    unfit: list[Path] = []
    while not fits(last):
        unfit.append(last.path)
        before = last_checkpoint(run.folder, whole, unfit)
        if before is None:
            raise ArgumentError("--out", f"must be a run with a whole checkpoint, but {run.folder} has none")
        last = kept(before)
    return last, best


def _with_threads(run: Run, data: Data) -> Plan:
    """Set the number of threads: the given one, or the fastest on a CPU; returns the plan with it.

    It is recorded, as only the same number gives the same bits when a run is resumed.
    """
    threads = run.plan.training.threads
    most = max(256, os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise ArgumentError("threads", f"must be at most {most}, but it is {threads}")
    if threads is None and run.device.type == "cpu" and ranks.count() == 1:
        trial = copy.deepcopy(run.diffusion)  # so that the run itself does not change
        pair, elbo = models.pair(run.plan, trial), DiffusionELBO()

        def work() -> None:
            batch = data.draw(run.plan.training.batch_size)
            elbo.differentiable_loss(pair.model, pair.guide, *batch).backward()

        threads = fastest_threads(work)
        if torch.get_num_threads() > 1:
            say(f"threads: {threads} of {torch.get_num_threads()}, the fastest for this network; see --threads")
    if threads is not None:
        torch.set_num_threads(threads)
    return run.plan.but(threads=threads)


def _lock(folder: Path) -> IO[str]:
    """A lock file, held by one process at a time, until it is closed or the process ends.

    Raises:
        ArgumentError: If another process holds it.
    """
    file = open(folder / ".lock", "a", opener=plainly)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ArgumentError("--out", f"must be a run that nobody else trains meanwhile, but {folder} is") from None
    held = weakref.ref(file)
    if hasattr(os, "register_at_fork"):  # processes that read batches would have it a while longer than a killed one
        os.register_at_fork(after_in_child=lambda: _close(held()))
    return file


def _close(file: IO[str] | None) -> None:
    if file is not None:
        file.close()


def _record(folder: Path, plan: Plan, line: str, lock: ExitStack | None) -> None:
    """Record the plan and the line in the folder, after locking it with ``lock`` if given; clean up on failure."""
    made, ours = [one for one in (folder, *folder.parents) if not one.exists()], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.enter_context(_lock(folder))
            if (folder / "settings.toml").exists():
                raise ArgumentError(
                    "--out", f"must be a new folder, but somebody else began a run in {folder} meanwhile"
                )
            ours = [folder / name for name in ("settings.toml", "commands.txt", ".lock")]
        Metrics.read(folder)  # raises if they are a link, as they will be written
        with open(folder / "commands.txt", "a", encoding="utf-8", opener=plainly) as file:
            write(folder / "settings.toml", plan.toml().encode())
            file.write(line + "\n")
    except OSError as error:
        for one in (*ours, *made):
            with suppress(OSError):
                one.unlink() if one in ours else one.rmdir()
        place = error.filename or folder
        raise ArgumentError(
            "--out", f"must be a folder that can be written to, but {place}: {error.strerror}"
        ) from error


# The loop


class Trainer:
    """The training of a run: steps, logs, evaluations and checkpoints.

    Arguments:
        run: The run.
        data: The data.
        stop: It knows whether a signal asked to stop.
    """

    def __init__(self, run: Run, data: Data, stop: Stop) -> None:
        self.run, self.data, self.stop = run, data, stop
        self.is_first = ranks.number() == 0
        for name in (".", "checkpoints", "pictures") if self.is_first else ():
            (run.folder / name).mkdir(parents=True, exist_ok=True)
            for part in (run.folder / name).glob(".*.part"):  # left by a kill
                part.unlink()
        self.metrics = Metrics(run.folder, run.svi.num_steps) if self.is_first else None
        self._loss = self._bound = ""

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: If a signal asked to stop; the run is saved.
            FloatingPointError: If the loss is not finite; the last checkpoint is from before.
        """
        run, training, watching = self.run, self.run.plan.training, self.run.plan.watching
        run.diffusion.train()
        start, before = time.monotonic(), run.state["seconds"]
        taken = run.svi.num_steps * training.accumulate
        batches = self.data.drawn(training.batch_size, taken, training.seed, training.workers)
        with self._bar() as bar, closing(batches):
            while True:
                step, is_last = run.svi.num_steps, run.svi.num_steps >= training.train_steps
                run.state["seconds"] = before + time.monotonic() - start
                with suppress(Interrupted):  # in an evaluation, which is repeated when the run is resumed
                    if self._is_due("logged", watching.log_every):
                        self._log()
                    is_first = run.state["evaluated"] < step == watching.log_every  # for people to see something early
                    if is_first or self._is_due("evaluated", watching.evaluate_every):
                        self._evaluate()
                        if step == run.state["saved"]:  # saved already, by a signal that put this evaluation off
                            self._save()
                    if self._is_due("saved", watching.checkpoint_every):
                        self._save()
                bar.set_postfix_str(self._loss + self._bound, refresh=False)
                if self._is_asked_to_stop():
                    self._save()
                    raise Interrupted(self.stop.signal or signal.SIGTERM)
                if is_last:
                    return
                for _ in range(training.accumulate):
                    run.state["loss"] += run.svi.step(*next(batches))
                    run.state["drawn"] += training.batch_size * ranks.count()
                bar.update(run.svi.num_steps - bar.n)

    def close(self) -> None:
        """Close the metrics."""
        if self.metrics is not None:
            self.metrics.close()

    def _is_due(self, what: str, every: int) -> bool:
        """Whether something is due at this step, and not yet done."""
        step, last = self.run.svi.num_steps, self.run.plan.training.train_steps
        return step > self.run.state[what] and (step % every == 0 or step >= last)

    def _bar(self) -> tqdm:
        """The progress bar; none without a terminal."""
        run = self.run
        return tqdm(
            total=run.plan.training.train_steps,
            initial=run.svi.num_steps,
            desc=printable(run.folder.name),
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=None if self.is_first else True,
        )

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal asked any rank to stop; all ranks learn of it at the same step."""
        asked = self.stop.signal is not None
        if ranks.count() == 1:
            return asked
        return self.run.svi.num_steps % 10 == 0 and any(ranks.each(asked))

    def _log(self) -> None:
        run = self.run
        step, is_bound = run.svi.num_steps, run.plan.training.weighting == "bound"
        loss = float(run.state["loss"]) / run.state["drawn"] + run.form.log_scale * is_bound
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} between steps {run.state['logged']} and {step}")
        run.state.update(logged=step, loss=torch.zeros((), device=run.device), drawn=0)
        if self.metrics is not None:
            rate = float(run.svi.optimizer.param_groups[0]["lr"]) if run.svi.optimizer is not None else 0.0
            name = "loss" if is_bound else "simple_loss"  # the simple loss is no likelihood
            self.metrics.note(step, **{name: loss}, lr=rate, seconds=round(run.state["seconds"], 3))
        self._loss = f"loss {run.form.per_unit(loss):.3f} {run.form.unit}" if is_bound else f"simple loss {loss:.3f}"

    def _evaluate(self) -> None:
        """The bound on held-out data, samples and pictures, with the averaged weights."""
        run, watching, step = self.run, self.run.plan.watching, self.run.svi.num_steps
        seed, T = run.plan.training.seed, run.plan.model.T
        self._refuse_what_is_not_finite()
        batches = self.stop.between(self.data.batches("validation", watching.evaluate_on))
        times = watching.evaluate_times if watching.evaluate_times < T else None
        with finite(step), run.svi.averaged() if run.svi.average is not None else nullcontext():
            found = bound(run.diffusion, batches, num_times=times, generator=seed, sharded=ranks.count() > 1)
            found = run.form.in_units(found)
            samples = None
            if self.is_first:
                draw, few = run.sampler("ancestral"), min(50, T)
                samples = draw(watching.samples, *run.context(watching.samples), num_steps=few, generator=seed)
            drawn = found.prior if samples is None else run.form.decoded(samples)
            if not ranks.all_say(bool(drawn.isfinite().all()) and not bool(found.nats.isnan().any())):
                raise ValueError("samples or the bound")
        self._bound = f", bound {found.summary}"
        if samples is not None:
            self._note(found, samples)
        run.state["evaluated"] = step
        mean = float(found.nats.mean())
        if mean < run.state["best"]:
            run.state.update(best=mean, best_step=step)
            run.save(run.folder / "checkpoints" / "best.pt")

    def _note(self, found: Bound, samples: Tensor) -> None:
        run, step = self.run, self.run.svi.num_steps
        pictures = run.folder / "pictures"
        if run.form.is_drawable:
            data = self.data.split("validation", len(samples))
            save_figure(pictures / f"samples-{step:08d}.png", picture(run.form, samples, data))
        if run.plan.model.T > 1:
            save_figure(pictures / f"terms-{step:08d}.png", plots.terms(found).figure)
        if self.metrics is not None:
            self.metrics.note(
                step,
                bound=float(found.nats.mean()),
                bound_se=float(found.standard_error(found.nats)),
                bits_per_dim=float(found.bits_per_dim.mean()),
                prior=float(found.prior.mean()),
                denoising=float(found.denoising_sum.mean()),
                reconstruction=float(found.reconstruction.mean()),
                seconds=round(run.state["seconds"], 3),
            )
        say(f"step {step}: held-out bound {found.summary}")

    def _refuse_what_is_not_finite(self) -> None:
        """Refuse to evaluate or save values that are not finite."""
        run = self.run
        averages = () if run.svi.average is None else run.svi.average.named_parameters()
        moments = (
            []
            if run.svi.optimizer is None
            else [
                (f"{name} of the optimizer", one)
                for state in run.svi.optimizer.state.values()
                for name, one in state.items()
            ]
        )
        for name, value in (("loss", run.state["loss"]), *run.diffusion.named_parameters(), *averages, *moments):
            if not bool(value.isfinite().all()):
                raise FloatingPointError(f"{name} is not finite any more at step {run.svi.num_steps}")

    def _save(self) -> None:
        run, step = self.run, self.run.svi.num_steps
        if step == 0:
            return
        self._refuse_what_is_not_finite()
        run.state["saved"] = step
        run.save(run.folder / "checkpoints" / f"step-{step:08d}.pt")
        before = [path for number, path in numbered(run.folder) if number <= step]  # later ones were damaged
        for old in before[: -run.plan.watching.keep] if self.is_first else ():
            old.unlink()


# After the last step


def _finish(run: Run, data: Data, stop: Stop) -> None:
    """Evaluate the best weights: write the bound on the test data, samples and the report."""
    plan, folder, first = run.plan, run.folder, ranks.number() == 0
    run = Run.opened(folder, "best", plan.training.device)
    run.plan = dataclasses.replace(run.plan, training=plan.training, watching=plan.watching)
    calls = (plan.watching.final_times or plan.model.T - 1) + 1
    say(f"test bound: {len(data.parts['test'])} data, {calls} network calls each; fewer with --final-times")
    with finite(run.svi.num_steps):
        found = bound(
            run.diffusion,
            stop.between(data.batches("test")),
            num_times=plan.watching.final_times,
            generator=plan.training.seed,
            progress=first,
            sharded=ranks.count() > 1,
        )
    found = run.form.in_units(found)
    if not first:
        return
    found.save(folder / "bound.npz")
    beside = yardsticks(data.raw("train").blocks(), data.raw("test").blocks(), data.form.outcomes)
    show(found)
    show(f"test data: {found.summary}")
    show("for comparison, " + ", ".join(f"{law} {one.summary}" for law, one in beside.items()))
    number, x_0 = plan.watching.samples, data.split("test", plan.watching.samples)
    draw = run.sampler("ancestral")
    samples = write_samples(run, folder / "samples.npz", draw, number, 256, plan.training.seed, x_0)
    stop.check()
    with open(folder / "commands.txt", encoding="utf-8", errors="replace", opener=plainly) as file:
        commands = file.read().splitlines()
    show(f"report: {report(run, found, beside, samples, x_0, commands)}")
