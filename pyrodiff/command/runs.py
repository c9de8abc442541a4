"""Runs: training that is watched, can be killed at any instant, and goes on as if nothing had happened.

A run has a folder:

``settings.toml``
    what it was told, nothing left open; ``pyrodiff train --config`` reads it.
``checkpoints/``
    ``step-00001000.pt``, the last few, and ``best.pt``, by the bound on held-out data.
``metrics.jsonl``
    a line of JSON for each so many steps: the loss, or the held-out bound term by term.
``pictures/``
    samples and the terms over t, at each evaluation.
``bound.npz``, ``samples.npz``, ``report.html``
    what came out.
"""

import dataclasses
import io
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .. import checkpoints, plots
from ..base import ranks
from ..base.files import plainly, printable, write
from ..likelihood.bounds import Bound, bound
from ..pair.diffusion import Diffusion, evenly_spaced
from ..pair.elbo import DiffusionELBO
from ..sampling.ancestral import AncestralSampler
from ..sampling.flow import FlowSampler
from ..sampling.sampler import Sampler
from ..sampling.solvers import DDIMSampler, DPMSolverSampler, HeunSampler, PredictorCorrectorSampler
from ..training.svi import SVI, exponential_average
from . import recipes
from .loading import Data, Form
from .settings import Settings, option

__all__ = [
    "Interrupted",
    "Metrics",
    "Run",
    "Stop",
    "Trainer",
    "device_of",
    "finite",
    "last_checkpoint",
    "options_in",
    "resumed_from",
    "save_arrays",
    "save_figure",
    "shortened",
    "spelled",
]


SAMPLERS = {  # by their names on the command line
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm": DPMSolverSampler,
    "heun": HeunSampler,
    "pc": PredictorCorrectorSampler,
    "flow": FlowSampler,
}


class Interrupted(Exception):
    """Something was asked to stop, and stopped where nothing is lost.

    Arguments:
        signal: The number of the signal that asked.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Stop:
    """Within, SIGINT and SIGTERM are a wish to stop, that is fulfilled where nothing is lost; a second one, at once.

    Attributes:
        signal: The signal that asked, if one did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(number)
        self.signal = number

    def check(self) -> None:
        """Raise :class:`Interrupted` if it was asked to stop."""
        if self.signal is not None and ranks.count() == 1:
            raise Interrupted(self.signal)

    def between(self, x_0: Tensor, *context: Tensor, size: int = 64) -> "_Batches":
        """The data in batches, between two of which the wish is fulfilled, by :class:`Interrupted`.

        Arguments:
            x_0: The data.
            *context: Their labels, if they have any.
            size: How many are a batch.
        """
        return _Batches(self, (x_0, *context), size)


class _Batches:
    def __init__(self, stop: Stop, data: tuple[Tensor, ...], size: int) -> None:
        self.stop, self.parts = stop, list(zip(*(one.split(size) for one in data), strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for part in self.parts:
            self.stop.check()
            yield part


def device_of(settings: Settings) -> torch.device:
    """The device that is asked for.

    Arguments:
        settings: The settings.

    Raises:
        ValueError: If it is not there.
    """
    name, local = settings.device, int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:1, say, but it is {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device must be one that is there, but torch sees no GPU for {name!r}: try --device cpu"
            )
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device must be one of {torch.cuda.device_count()} GPUs, but it is {name!r}")
    elif device.type != "cpu":
        raise ValueError(f"--device must be cpu or cuda, but it is {name!r}")
    return device


class Run:
    """A run and its folder.

    Arguments:
        folder: The folder.
        settings: The settings, none left open.
        form: What the data are.
        device: Where it computes.
        often: How often each number has each level, to start from.

    Attributes:
        diffusion: The model.
        svi: What trains it.
        state: What else a checkpoint keeps: how far it is logged and evaluated, the best bound, the time it took.
    """

    def __init__(
        self, folder: Path, settings: Settings, form: Form, device: torch.device, often: Tensor | None = None
    ) -> None:
        self.folder, self.settings, self.form, self.device = folder, settings, form, device
        pyro.set_rng_seed(settings.seed)
        self.diffusion: Diffusion = recipes.build(settings, form, often).to(device)
        self.svi = self._svi()
        self.state: dict[str, Any] = {
            **{"logged": 0, "evaluated": 0, "saved": 0, "best": math.inf, "best_step": 0, "seconds": 0.0},
            **{"loss": torch.zeros((), device=device), "drawn": 0},
        }

    def _svi(self) -> SVI:
        settings = self.settings
        programs = recipes.pair(settings, self.diffusion).to(self.device)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": self.device.type == "cuda"}
        return SVI(
            programs.model,
            programs.guide,
            partial(torch.optim.AdamW, **options),
            DiffusionELBO(),
            settings.clip_norm * settings.batch_size * settings.accumulate * ranks.count(),
            scheduler=partial(LambdaLR, lr_lambda=partial(_rate, steps=settings.steps, warmup=settings.warmup)),
            accumulate=settings.accumulate,
            autocast={"bfloat16": torch.bfloat16, "float16": torch.float16}.get(settings.autocast),
            average=exponential_average(settings.average) if settings.average > 0 else None,
            compile=settings.compile,
        )

    @classmethod
    def opened(cls, folder: str | os.PathLike[str], which: str = "best", device: str = "auto") -> "Run":
        """A run that was trained, with the weights of a checkpoint, the averaged ones if they are averaged.

        Arguments:
            folder: The folder.
            which: "best", "last", or the path of a checkpoint.
            device: Where it is to be.

        Raises:
            ValueError: If there is none.
        """
        folder = Path(folder)
        path = _checkpoint(folder, which)
        settings, form = _kept(path)
        record = folder / "settings.toml"
        if record.is_file():
            recorded = Settings(**options_in(record, str(record)))
            if which not in ("best", "last"):
                _refuse_other_settings(recorded, settings, path)
            settings = settings.but(data=recorded.data)  # which may have moved
        try:
            run = cls(folder, settings, form, device_of(settings.but(device=device)))
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise _no_run(path) from error
        run.restore(path)
        if run.svi.average is not None:
            run.svi.adopt_average()
        run.diffusion.eval()
        return run

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of this run.

        Arguments:
            path: The file.

        Raises:
            ValueError: If it is of a run with other settings, other than those that may change.
        """
        settings, form = _kept(path)
        self.refuse_other_data(form, path)
        _refuse_other_settings(self.settings, settings, path)
        try:
            state = checkpoints.restore(path, self.svi)["state"]
            scheduler, group = self.svi.scheduler, self.svi.optimizer.param_groups[0]
            group["lr"] = self.settings.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)  # of the steps there are now
            scheduler._last_lr = [group["lr"]]
            for parameter, moments in self.svi.optimizer.state.items():
                if any(one.shape not in ((), parameter.shape) for one in moments.values()):
                    raise _no_run(path)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise _no_run(path) from error
        self.state = {**self.state, **state, "loss": state["loss"].to(self.device)}

    def refuse_other_data(self, form: Form, where: object) -> None:
        """Refuse data that are not those of the run: they may have been trained on, or have other units.

        Arguments:
            form: What the other data are.
            where: Where they are known from.

        Raises:
            ValueError: If they are others.
        """
        if form.fingerprint != self.form.fingerprint:
            raise ValueError(f"data must be those that the run began with, but {self.settings.data} and {where} differ")

    def save(self, path: Path) -> None:
        """Save all of it.

        Arguments:
            path: The file.
        """
        settings = {name: list(one) if isinstance(one, tuple) else one for name, one in self.settings.given().items()}
        checkpoints.save(path, self.svi, settings=settings, form=self.form.plain(), state=self.state)

    def context(self, number: int, first: int = 0) -> tuple[Tensor, ...]:
        """The labels of so many samples, one after the other; nothing where a run has none.

        Arguments:
            number: How many.
            first: The number of the first.
        """
        classes = self.form.classes
        return () if classes is None else (torch.arange(first, first + number, device=self.device) % classes,)

    def sampler(self, name: str) -> Sampler:
        """A sampler of the model.

        Arguments:
            name: Which, of :data:`SAMPLERS`.

        Raises:
            ValueError: If it is not for such a model.
        """
        return SAMPLERS[name](self.diffusion)


def _rate(step: int, steps: int, warmup: int) -> float:
    """The learning rate, as a part of its largest: it rises in a line, and falls as a cosine."""
    return min(1.0, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def shortened(diffusion: Diffusion, steps: int | None) -> Diffusion:
    """The diffusion in so many steps at most.

    Arguments:
        diffusion: The diffusion.
        steps: The number of steps; as it is if not given.
    """
    T = diffusion.num_steps
    if steps is None or steps >= T:
        return diffusion
    return diffusion.subchain(evenly_spaced(steps, T))


def last_checkpoint(folder: Path, whole: bool = False) -> Path | None:
    """The last checkpoint of a run, by the number of its step; the best one if it is alone, and None if there is none.

    Arguments:
        folder: The folder of the run.
        whole: Whether those that are damaged do not count.
    """
    paths = [folder / "checkpoints" / "best.pt", *(path for _, path in _numbered(folder))]
    return next((path for path in reversed(paths) if path.is_file() and (not whole or _is_whole(path))), None)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints by their steps, the last one last; what has another name is not the run's."""
    found = [(_NUMBERED.fullmatch(path.name), path) for path in (folder / "checkpoints").glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_file())


_NUMBERED = re.compile(r"step-([0-9]{1,18})\.pt")


def _checkpoint(folder: Path, which: str) -> Path:
    if which not in ("best", "last"):
        return Path(which)
    best = folder / "checkpoints" / "best.pt"
    found = best if which == "best" and best.is_file() else last_checkpoint(folder)
    if found is None:
        raise ValueError(f"RUN must be the folder of a run with a checkpoint, but {folder} has none")
    return found


def options_in(path: Path, name: str) -> dict[str, Any]:
    """The options in a file of them, which is no pipe, and not larger than any of them has to be.

    Arguments:
        path: The file.
        name: What asks for it, for errors.

    Raises:
        ValueError: If it is none.
    """
    try:
        if path.is_dir() or (path.is_file() and path.stat().st_size <= 2**16):
            return Settings.read(path, name)
    except RecursionError:
        pass
    raise ValueError(f"{name} must be a TOML file of options, of at most 64 KiB, but {path} is none")


def _refuse_other_settings(ours: Settings, theirs: Settings, path: Path) -> None:
    """Refuse the checkpoint of a run that was told something else; where the data lie is another matter."""
    for one in dataclasses.fields(Settings):
        here, there = getattr(ours, one.name), getattr(theirs, one.name)
        if here != there and not one.metadata["changeable"] and one.name != "data":
            raise ValueError(f"{option(one.name)} must be {there!r} as in {path}, but it is {here!r}")


_STATE = dict.fromkeys(("logged", "evaluated", "saved", "best_step", "drawn"), int) | {"best": float, "seconds": float}


def resumed_from(folder: Path, settings: Settings, whole: bool) -> tuple[Path | None, Path | None]:
    """The checkpoint that a run goes on from, and its best one, looked at before anything is built.

    Arguments:
        folder: The folder of the run.
        settings: The options that it is given.
        whole: Whether those that are damaged do not count; one of which nothing else is left does.

    Raises:
        ValueError: If one of them is damaged, or of another run.
    """
    last, best = last_checkpoint(folder, whole) or last_checkpoint(folder), folder / "checkpoints" / "best.pt"
    best = best if best.is_file() and (not whole or _is_whole(best)) else None
    for path in {last, best} - {None}:
        _refuse_other_settings(settings, _kept(path)[0], path)
    return last, best


def _kept(path: Path) -> tuple[Settings, Form]:
    """The settings and the data's form that a checkpoint holds; or else which other one is whole."""
    try:
        return _content(path)
    except ValueError as error:
        whole = last_checkpoint(path.parent.parent, whole=True)
        beside = f"; {whole} is whole: train --resume=whole goes on from it, --checkpoint takes it" if whole else ""
        raise ValueError(f"{error}{beside}") from error


def _is_whole(path: Path) -> bool:
    try:
        return bool(_content(path))
    except ValueError:
        return False


def _content(path: Path) -> tuple[Settings, Form]:
    state, number = checkpoints.load(path), _NUMBERED.fullmatch(path.name)
    try:
        more, step = state["more"], state["svi"]["counts"]["num_steps"]
        kinds = [(more["state"].get(name, 0), one) for name, one in {**_STATE, "loss": Tensor}.items()]
        if not all(isinstance(*one) for one in kinds) or not all(map(_is_plain, more["settings"].values())):
            raise _no_run(path)
        settings, form = Settings(**more["settings"]), Form.of(more["form"])
        if {"numbers": form.scale, "levels": form.levels, "bits": form.rate}[form.read_as] is None:
            raise _no_run(path)
        _refuse_sizes(settings, form, path)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise _no_run(path) from None
    if number is not None and int(number[1]) != step:
        raise ValueError(f"the name of a checkpoint must be that of its step, but {path} is of step {step}")
    return settings, form


def _is_plain(value: object) -> bool:
    """Whether this may be the value of an option, which to say in an error takes no memory."""
    return isinstance(value, int | float | str) or (isinstance(value, list) and {type(one) for one in value} <= {int})


def _no_run(path: Path) -> ValueError:
    return ValueError(f"RUN must be the folder of a run that pyrodiff train made, but {path} is of something else")


def _refuse_sizes(settings: Settings, form: Form, path: Path) -> None:
    """Refuse a model that a checkpoint is too small to hold, before any of it is built."""
    shape, widths = form.event_shape, settings.channels or (settings.hidden,)
    size, area = math.prod(shape), math.prod(shape[-2:]) >> 2 * len(widths[1:])
    inner = settings.hidden * widths[-1] * area if settings.channels else widths[0] * size
    least = settings.num_steps + size * (form.levels if settings.prediction == "level" else 1) + inner
    least += settings.blocks * sum(250 + width**2 for width in widths)
    least += (form.classes or 0) * (64 if settings.channels else widths[0])
    units = [one.shape for one in (form.shift, form.scale) if one is not None]
    if min(shape, default=1) < 1 or 4 * least > path.stat().st_size or any(unit != shape for unit in units):
        raise ValueError


class Metrics:
    """What is noted of a run: lines of JSON in a file, and TensorBoard's files where that is installed.

    Arguments:
        folder: The folder of the run.
        step: The step that the run goes on from; what was noted after it is forgotten.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        records = {
            (record["step"], "bound" in record): record for record in self.read(folder) if record["step"] <= step
        }
        write(self.path, "".join(f"{json.dumps(record)}\n" for record in records.values()).encode())
        self._board = _board(folder / "tensorboard", step)

    def note(self, step: int, **values: Any) -> None:
        """Note values of a step."""
        with open(self.path, "a", encoding="utf-8", opener=plainly) as file:
            file.write(json.dumps({"step": step, **{name: _sayable(value) for name, value in values.items()}}) + "\n")
        for name, value in values.items() if self._board is not None else ():
            if isinstance(value, float | int):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Bring all of it to the disk."""
        if self._board is not None:
            self._board.close()

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """The records in a run's folder, but for lines that are cut short, or are somebody else's."""
        records, path = [], folder / "metrics.jsonl"
        with open(path, "rb", opener=plainly) if path.is_file() else nullcontext(io.BytesIO()) as file:
            for line in iter(partial(file.readline, 2**16), b""):
                with suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    is_record = isinstance(record, dict) and type(record.get("step")) is int
                    if is_record and all(map(_is_sayable, record.values())):
                        records.append(record)
        return records


def _is_sayable(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and -1e30 < value < 1e30)


def _sayable(value: Any) -> Any:
    """A value as JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it is not installed
        return None
    return SummaryWriter(folder, purge_step=step + 1)


class Trainer:
    """Trains a run, and watches it.

    Arguments:
        run: The run.
        data: The data.
        stop: Whether it is to stop.
        say: Called with lines for people.
    """

    def __init__(self, run: Run, data: Data, stop: Stop, say: Callable[[str], None]) -> None:
        self.run, self.data, self.stop, self.say = run, data, stop, say
        self.is_first = ranks.number() == 0
        for name in (".", "checkpoints", "pictures") if self.is_first else ():
            (run.folder / name).mkdir(parents=True, exist_ok=True)
            for part in (run.folder / name).glob(".*.part"):  # a kill left it
                part.unlink()
        self.metrics = Metrics(run.folder, run.svi.num_steps) if self.is_first else None
        self._loss = self._bound = ""

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: If it was asked to stop; it is saved.
            FloatingPointError: If the loss is not finite; the last checkpoint is from before.
        """
        run, settings = self.run, self.run.settings
        run.diffusion.train()
        with self._bar() as bar:
            start, before = time.monotonic(), run.state["seconds"]
            while True:
                run.state["seconds"] = before + time.monotonic() - start
                with suppress(Interrupted):
                    self._watch(bar)
                if self._is_asked_to_stop():
                    self._save()
                    raise Interrupted(self.stop.signal or signal.SIGTERM)
                if run.svi.num_steps >= settings.steps:
                    break
                for _ in range(settings.accumulate):
                    run.state["loss"] += run.svi.step(*self.data.draw(settings.batch_size))
                    run.state["drawn"] += settings.batch_size * ranks.count()
                bar.update(run.svi.num_steps - bar.n)

    def _bar(self) -> tqdm:
        """A bar; quiet where there is no terminal."""
        run = self.run
        return tqdm(
            total=run.settings.steps,
            initial=run.svi.num_steps,
            desc=printable(run.folder.name),
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=None if self.is_first else True,
        )

    def _is_asked_to_stop(self) -> bool:
        """Whether anybody is asked; of several processes all hear of it at the same step."""
        asked = self.stop.signal is not None
        if ranks.count() == 1:
            return asked
        return self.run.svi.num_steps % 10 == 0 and any(ranks.each(asked))

    def _watch(self, bar: tqdm) -> None:
        """Log, evaluate and save, as far as that is due."""
        run, settings, step = self.run, self.run.settings, self.run.svi.num_steps
        last = step >= settings.steps
        if step > run.state["logged"] and (step % settings.log_every == 0 or last):
            self._log()
        if step > run.state["evaluated"] and (step % settings.evaluate_every == 0 or last):
            self._evaluate()
            if step == run.state["saved"]:  # by a signal, before this could be said
                self._save()
        bar.set_postfix_str(self._loss + self._bound, refresh=False)
        if step > run.state["saved"] and (step % settings.checkpoint_every == 0 or last):
            self._save()

    def _log(self) -> None:
        run = self.run
        step, is_bound = run.svi.num_steps, run.settings.weighting == "bound"
        loss = float(run.state["loss"]) / run.state["drawn"] + run.form.log_scale * is_bound
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} between steps {run.state['logged']} and {step}")
        run.state.update(logged=step, loss=torch.zeros((), device=run.device), drawn=0)
        if self.metrics is not None:
            rate = run.svi.scheduler.get_last_lr()[0]
            name = "loss" if is_bound else "simple_loss"  # which is no likelihood
            self.metrics.note(step, **{name: loss}, lr=rate, seconds=round(run.state["seconds"], 3))
        self._loss = f"loss {loss:.3f}{' nats' * is_bound}"

    def _evaluate(self) -> None:
        """The bound on held-out data, samples and pictures, with the averaged weights."""
        run, settings, step = self.run, self.run.settings, self.run.svi.num_steps
        self._refuse_what_is_not_finite()
        x_0 = self.stop.between(*self.data.labelled("validation", settings.evaluate_on))
        times = settings.evaluate_times if settings.evaluate_times < settings.num_steps else None
        with finite(step), run.svi.averaged() if run.svi.average is not None else nullcontext():
            found = bound(run.diffusion, x_0, num_times=times, generator=settings.seed, sharded=ranks.count() > 1)
            found = run.form.in_units(found)
            few, draw = min(50, settings.num_steps), run.sampler("ancestral")
            samples = (
                draw(settings.samples, *run.context(settings.samples), num_steps=few, generator=settings.seed)
                if self.is_first
                else None
            )
            drawn = found.prior if samples is None else run.form.decoded(samples)
            if not ranks.all_say(bool(drawn.isfinite().all()) and not bool(found.nats.isnan().any())):
                raise ValueError("samples or the bound")
        mean = float(found.nats.mean())
        self._bound = f", bound {spelled(found)}"
        if self.is_first:
            self._note(found, samples)
        run.state["evaluated"] = step
        if mean < run.state["best"]:
            run.state.update(best=mean, best_step=step)
            run.save(run.folder / "checkpoints" / "best.pt")

    def _note(self, found: Bound, samples: Tensor) -> None:
        run, step = self.run, self.run.svi.num_steps
        pictures = run.folder / "pictures"
        if run.form.is_drawable:
            save_figure(pictures / f"samples-{step:08d}.png", plots.samples(run.form.drawable(samples)).figure)
        if run.settings.num_steps > 1:
            save_figure(pictures / f"terms-{step:08d}.png", plots.terms(found).figure)
        self.metrics.note(
            step,
            bound=float(found.nats.mean()),
            bound_se=float(found.standard_error(found.nats)),
            bits_per_dim=float(found.bits_per_dim.mean()),
            prior=float(found.prior.mean()),
            denoising=float(found.denoising.sum(0).mean()),
            reconstruction=float(found.reconstruction.mean()),
            seconds=round(run.state["seconds"], 3),
        )
        self.say(f"step {step}: held-out bound {spelled(found)}")

    def _refuse_what_is_not_finite(self) -> None:
        """Neither to be evaluated, nor to take the place of a checkpoint from before."""
        run = self.run
        averages = () if run.svi.average is None else run.svi.average.named_parameters()
        moments = run.svi.optimizer.state.values() if run.svi.optimizer is not None else ()
        moments = ((f"{name} of the optimizer", one) for state in moments for name, one in state.items())
        for name, value in (("loss", run.state["loss"]), *run.diffusion.named_parameters(), *averages, *moments):
            if not bool(value.isfinite().all()):
                raise FloatingPointError(f"{name} is not finite any more at step {run.svi.num_steps}")

    def _save(self) -> None:
        run, step = self.run, self.run.svi.num_steps
        if step == 0:
            return
        self._refuse_what_is_not_finite()
        run.state["saved"] = step
        folder = run.folder / "checkpoints"
        run.save(folder / f"step-{step:08d}.pt")
        before = [path for number, path in _numbered(run.folder) if number <= step]  # damaged ones may have been later
        for old in before[: -run.settings.keep] if self.is_first else ():
            old.unlink()


@contextmanager
def finite(step: int) -> Iterator[None]:
    """A context in which what the model returns has to be finite: laws and pictures take nothing else.

    Arguments:
        step: The step that the weights are of.

    Raises:
        FloatingPointError: If it is not.
    """
    try:
        yield
    except ValueError as error:
        raise FloatingPointError(f"what the weights give is not finite at step {step}: {str(error)[:200]}") from error


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure as PNG, whole or not at all.

    Arguments:
        path: The file.
        figure: The figure.
    """
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    write(path, data.getbuffer())


def save_arrays(path: Path, **arrays: Tensor) -> None:
    """Write tensors as a compressed .npz, whole or not at all.

    Arguments:
        path: The file.
        arrays: The tensors.
    """
    data = io.BytesIO()
    np.savez_compressed(data, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write(path, data.getbuffer())


def spelled(found: Bound) -> str:
    """A bound in a few words: nats a datum, or bits per dimension where p is a probability of levels.

    Arguments:
        found: The bound.
    """
    values, unit = (
        (found.nats, "nats") if found.levels is None or found.levels == 2 else (found.bits_per_dim, "bits/dim")
    )
    return f"{float(values.mean()):.3f} ± {float(found.standard_error(values)):.3f} {unit}"
