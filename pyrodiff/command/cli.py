"""The command line: ``pyrodiff train``, ``bound``, ``sample``, ``plot`` and ``info``.

Exit codes are those that a shell expects: 0 where all went well, 2 for what cannot be (said in one line, with nothing
half-written), 1 where the training itself failed, 128 and the signal's number where a signal stopped it.
"""

import argparse
import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch
from matplotlib.animation import PillowWriter
from torch import Tensor
from tqdm import tqdm

from .. import plots
from ..base import ranks
from ..base.files import plainly, printable, write
from ..likelihood.bounds import Bound, bound, importance_bound
from ..sampling.sampler import Sampler
from . import recipes
from .loading import BUILT_IN, Data
from .reports import report, versions
from .runs import (
    SAMPLERS,
    Interrupted,
    Metrics,
    Run,
    Stop,
    Trainer,
    device_of,
    finite,
    options_in,
    resumed_from,
    save_arrays,
    save_figure,
    shortened,
    spelled,
)
from .settings import Settings, kind, option

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Arguments:
        arguments: What stands on the line after the command's name; that of the process if not given.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr) if arguments is None else ():
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # a terminal may know no ±
    code = _done(sys.argv[1:] if arguments is None else list(arguments))
    try:
        print(end="", flush=True)
    except OSError as error:  # a disk that is full, or a pipe that is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _of_output(error)
    return code


def _done(line: list[str]) -> int:
    try:
        options = _parser().told(line)
        return options.command(options)
    except SystemExit as left:  # of the parser, which has said why
        return left.code
    except Interrupted as interrupted:
        _say(f"stopped by {signal.Signals(interrupted.signal).name}: nothing was written")
        return 128 + interrupted.signal
    except KeyboardInterrupt as interrupt:
        _say("left at once; what was saved before is as it was")
        return 128 + next(iter(interrupt.args), signal.SIGINT)
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        _say(
            "out of memory: a smaller --batch-size, network or --num-steps may help; what was saved before is as it was"
        )
        return 1
    except FloatingPointError as error:
        _say(f"training failed: {error}; checkpoints are from before. A smaller --lr or --clip-norm may help")
        return 1
    except Mistake as mistake:
        return _complain(mistake)
    except OSError as error:
        return _of_output(error)
    finally:
        if ranks.count() > 1:
            torch.distributed.destroy_process_group()


def _of_output(error: OSError) -> int:
    """The exit code where nothing can be written any more."""
    return 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else _complain(error)


def _complain(error: object) -> int:
    print(f"pyrodiff: error: {printable(error)}", file=sys.stderr, flush=True)  # of several processes, any may alone
    return 2


class Mistake(Exception):
    """What a user can mend, in one line."""


def _mistakes(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call what may fail by a user's mistake, or a full disk: that needs one line, and no traceback."""
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError, ImportError) as error:
        said = " ".join(str(error).split())
        name = said.partition(" must ")[0]
        raise Mistake(said.replace(name, _AS_OPTIONS.get(name, name), 1)) from error


_AS_OPTIONS = {one.name: option(one.name) for one in dataclasses.fields(Settings)} | {
    "num_blocks": "--blocks",
    "num_times": "--times",
    "num_particles": "--particles",
    "generator": "--seed",
    "path": "checkpoint",
    "first": "--log-snr-first",
    "last": "--log-snr-last",
}


def _is_memory(error: Exception) -> bool:
    """Whether an error says that memory is full, which torch has no one class for."""
    return isinstance(error, MemoryError | OverflowError) or "memory" in str(error) or "overflow" in str(error)


def _say(line: str) -> None:
    if ranks.number() == 0:
        tqdm.write(f"pyrodiff: {printable(line)}", file=sys.stderr)  # above a bar, if there is one
        sys.stderr.flush()


def _print(text: object) -> None:
    print(printable(text, "\n"), flush=True)


# What can be said on the line


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.set_defaults(parser=self)

    def told(self, line: list[str]) -> argparse.Namespace:
        """What a line says; what is wrong with it is said by the parser of its command."""
        for word in line:
            if word != word.encode(errors="replace").decode() or "\0" in word:
                self.error(f"each word must be text in UTF-8, but one is {word!a}")
        options, rest = self.parse_known_args(line)
        if rest:
            options.parser.error(f"unrecognized arguments: {shlex.join(rest)}")
        options.line = shlex.join(["pyrodiff", *line])
        return options

    def error(self, message: str) -> NoReturn:
        wrong, _, known = message.partition(" (choose from ")
        among = re.findall(r"[\w-]+", known) or [*self._option_string_actions, "--version"]
        word = re.search(r"choice: '(.*)'" if known else r"(--?\w[^\s=']*)", wrong)
        near = word and difflib.get_close_matches(word[1], among, 1)
        hint = f"; is {near[0]} meant?" if near else ""
        self.exit(2, printable(f"{self.prog}: error: {message}{hint} (see {self.prog} --help)") + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyrodiff", description="Diffusion models with a likelihood: train, bound, sample, plot.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('pyrodiff')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _train_parser(commands)
    bounds = _command(commands, "bound", _bound, "the bound on -log p of data, term by term")
    bounds.add_argument("--split", choices=("train", "validation", "test"), default="test", help="of which data")
    bounds.add_argument("--number", type=_count, help="of how many data, the first ones (default: all)")
    bounds.add_argument("--times", type=_count, help="how many of the T terms a datum, at random (default: all)")
    bounds.add_argument(
        *("--chain-steps", "--num-steps"),
        dest="num_steps",
        type=_count,
        help="the bound of a chain of so many of the T steps (default: all)",
    )
    bounds.add_argument("--particles", type=_count, help="beside it, the importance-weighted bound of K trajectories")
    bounds.add_argument("--save", type=Path, help="an .npz file for the terms of each datum")
    bounds.add_argument("--data", help="where the run's data are, if they have moved")
    _sample_parser(commands)
    plot = _command(commands, "plot", _plot, "draw the curves, the terms over t, samples beside data")
    plot.add_argument("--data", help="where the run's data are, if they have moved")
    about = "versions and devices; of a run, what it is and how far it came"
    info = commands.add_parser("info", help=about, description=f"{about.capitalize()}.")
    info.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="the folder of a run; versions and devices if left out"
    )
    info.set_defaults(command=_info)
    return parser


def _sample_parser(commands: Any) -> None:
    parser = _command(commands, "sample", _sample, "draw samples: an .npz file and a picture")
    parser.add_argument("--number", type=_count, default=64, help="how many (default: 64)")
    parser.add_argument("--batch-size", type=_count, default=256, help="how many at a time (default: 256)")
    parser.add_argument(
        "--sampler", choices=tuple(SAMPLERS), default="ancestral", help="by which sampler (default: ancestral)"
    )
    parser.add_argument(
        *("--sample-steps", "--num-steps"),
        dest="num_steps",
        type=_count,
        help="in how many of the T steps (default: all)",
    )
    parser.add_argument(
        "--save",
        type=Path,
        help="the .npz file; the picture stands beside it (RUN/samples-1.npz, or the next free one)",
    )
    parser.add_argument(
        "--trajectory", choices=("strip", "gif"), help="the way from noise to data too, as a strip or an animation"
    )


def _command(commands: Any, name: str, command: Callable, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that pyrodiff train made")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the path of a checkpoint (default: best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--seed", type=_seed, default=0, help="the seed of all draws (default: 0)")
    parser.set_defaults(command=command)
    return parser


def _train_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train on data; the bound, samples and a report come out",
        usage="pyrodiff train DATA [options]",
        description="Train by SVI. Options without a default have values that suit the data; all of them are recorded "
        "in the run's folder. Under torchrun each process takes batches of its own.",
    )
    parser.set_defaults(command=_train)
    groups = {}
    for one in dataclasses.fields(Settings):
        title = one.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title)) if title not in groups else groups[title]
        _add(group, one)
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="the run's folder (default: runs/ and the name of the data)")
    group.add_argument("--config", type=Path, help="a TOML file of options; those on the line go before it")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, bit for bit on a CPU; start it if nothing is there",
    )
    group.add_argument(
        "--resume=whole",
        dest="resume",
        action="store_const",
        const="whole",
        help="likewise, from the last checkpoint that is not damaged",
    )


def _add(group: Any, one: dataclasses.Field) -> None:
    what, check = kind(one.name), one.metadata["check"]
    default = "" if one.default is None else f" (default: {str(one.default).lower()})"
    help = f"{one.metadata['help']}{default}".replace("%", "%%")
    if one.name == "data":
        group.add_argument("data", nargs="?", default=argparse.SUPPRESS, help=one.metadata["help"], metavar="DATA")
    elif what is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(option(one.name), action=action, default=argparse.SUPPRESS, help=help)
    else:
        parse, name = (what, what.__name__.upper()) if what in (int, float, str) else (_ints, "INT,INT")
        choices = getattr(check, "choices", None)
        shown = {"choices": choices} if choices else {"metavar": name}
        group.add_argument(option(one.name), type=parse, default=argparse.SUPPRESS, help=help, **shown)


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ints with commas between, as 32,64, but it is {text!r}") from None


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an int in 0..{2**32 - 1}, but it is {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, but it is {text!r}")
    return int(text)


# train


def _train(options: argparse.Namespace) -> int:
    given = {one.name: vars(options)[one.name] for one in dataclasses.fields(Settings) if one.name in vars(options)}
    folder, settings = _mistakes(_told, options, given)
    _mistakes(_join, settings)
    if settings.threads is not None:
        most = max(256, os.cpu_count() or 1)
        if settings.threads > most:
            raise Mistake(f"--threads must be at most {most}, but it is {settings.threads}")
        torch.set_num_threads(settings.threads)
    run, data, lock = _mistakes(_begun, folder, settings, options)
    with lock, Stop() as stop:
        trainer = _mistakes(Trainer, run, data, stop, _say)
        try:
            trainer.train()
            _finish(run, data, stop, options)
        except Interrupted as interrupted:
            name = signal.Signals(interrupted.signal).name
            again = shlex.join(["pyrodiff", "train", "--out", str(folder), "--resume"])
            saved = f" at step {run.svi.num_steps}, which is saved" if run.svi.num_steps else " before the first step"
            _say(f"stopped by {name}{saved}; go on with: {again}")
            return 128 + interrupted.signal
        except OSError as error:
            raise Mistake(f"{error}; the run can go on with --resume from what was saved before") from error
        finally:
            if trainer.metrics is not None:
                trainer.metrics.close()
    return 0


def _told(options: argparse.Namespace, given: dict[str, Any]) -> tuple[Path, Settings]:
    """The folder, and what is asked for: by the record of a run that goes on, by a file, and by the line."""
    values = {**(options_in(options.config, "--config") if options.config is not None else {}), **given}
    if "data" in values and Path(values["data"]).exists() and values["data"] not in BUILT_IN:
        values["data"] = str(Path(values["data"]).resolve())
    if not values.get("data") and options.out is not None and not (options.out / "settings.toml").is_file():
        known = ", ".join(BUILT_IN)
        raise ValueError(
            f"--out must be a run's folder where no data are given, but {options.out} holds none: give data, one of "
            f"{known}, or a path"
        )
    if options.out is None and not values.get("data"):
        raise ValueError(f"data must be given: one of {', '.join(BUILT_IN)}, or a path")
    folder = options.out or Path("runs") / (Path(values["data"]).stem or "run")
    above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"--out must be a folder that can be written to, but {above} cannot")
    record = folder / "settings.toml"
    if not record.is_file():
        if folder.exists() and (not folder.is_dir() or any(f.name[0] != "." for f in folder.iterdir())):
            raise ValueError(f"--out must be a new folder, an empty one or a run's, but {folder} is something else")
        return folder, Settings(**values)
    if not options.resume:
        raise ValueError(f"--out must be a new folder, but {folder} holds a run: give --resume to go on with it")
    recorded = options_in(record, str(record))
    for one in dataclasses.fields(Settings):
        before = recorded.get(one.name)
        may_change = one.metadata["changeable"] or one.name == "data"  # which may have moved, and are compared
        if one.name in values and values[one.name] != before and not may_change:
            raise ValueError(
                f"{option(one.name)} must stay {before!r} where a run goes on, but it is {values[one.name]!r}: give "
                "another --out for another run"
            )
    return folder, Settings(**{**recorded, **values})


def _join(settings: Settings) -> None:
    """Be one of several processes, where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        device = device_of(settings)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _locked(folder: Path) -> Any:
    """A file that only one process at a time may have, until it is closed, or the process is killed.

    Raises:
        ValueError: If another has it.
    """
    file = open(folder / ".lock", "a", opener=plainly)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(f"--out must be a run that nobody else trains meanwhile, but {folder} is") from None
    return file


def _record(folder: Path, settings: Settings, line: str, lock: ExitStack | None) -> None:
    """Let a folder know the settings and the command, and be locked, unless it is; or else let nothing be made."""
    made, ours = [one for one in (folder, *folder.parents) if not one.exists()], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.enter_context(_locked(folder))
            if (folder / "settings.toml").exists():
                raise ValueError(f"--out must be a new folder, but somebody else began a run in {folder} meanwhile")
            ours = [folder / name for name in ("settings.toml", "commands.txt", ".lock")]
        Metrics.read(folder)  # they are written on, and may be a link
        with open(folder / "commands.txt", "a", encoding="utf-8", opener=plainly) as file:
            write(folder / "settings.toml", settings.toml().encode())
            file.write(line + "\n")
    except OSError as error:
        for one in (*ours, *made):
            with suppress(OSError):
                one.unlink() if one in ours else one.rmdir()
        place = error.filename or folder
        raise ValueError(f"--out must be a folder that can be written to, but {place}: {error.strerror}") from error


def _begun(folder: Path, settings: Settings, options: argparse.Namespace) -> tuple[Run, Data, Any]:
    """The run, as far as it has come, locked; only when nothing can be wrong any more is anything written."""
    first, is_run = ranks.number() == 0, (folder / "settings.toml").is_file()
    with ExitStack() as lock:
        if first and is_run:
            lock.enter_context(_locked(folder))
        device = device_of(settings)
        settings, data = recipes.prepare(settings, device)
        checkpoint, best = resumed_from(folder, settings, options.resume == "whole") if options.resume else (None, None)
        often = data.often() if settings.prediction == "level" else None
        run = Run(folder, settings, data.form, device, often)
        if checkpoint is not None:
            run.restore(checkpoint)
            if run.svi.num_steps > settings.steps:
                raise ValueError(f"--steps must be at least the {run.svi.num_steps} taken, but it is {settings.steps}")
            if best is None:
                run.state.update(best=math.inf, best_step=0, evaluated=0)  # so that there is a best one again
        if first:
            _record(folder, settings, options.line, None if is_run else lock)
        _say(f"data: {data.form.contents}")
        if checkpoint is not None:
            _say(f"going on with {folder} from step {run.svi.num_steps} of {settings.steps}")
        return run, data, lock.pop_all()


def _finish(run: Run, data: Data, stop: Stop, options: argparse.Namespace) -> None:
    """The bound on the test data, samples and the report, with the best weights."""
    settings, folder, first = run.settings, run.folder, ranks.number() == 0
    run = Run.opened(folder, "best", settings.device)
    with finite(run.svi.num_steps):
        found = bound(
            run.diffusion,
            stop.between(*data.labelled("test")),
            num_times=settings.final_times,
            generator=settings.seed,
            progress=first,
            sharded=ranks.count() > 1,
        )
    found = run.form.in_units(found)
    if not first:
        return
    found.save(folder / "bound.npz")
    _print(found)
    _print(f"test data: {spelled(found)}")
    samples = _write_samples(
        run, folder / "samples.npz", run.sampler("ancestral"), settings.samples, 256, settings.seed
    )
    stop.check()
    with open(folder / "commands.txt", encoding="utf-8", errors="replace", opener=plainly) as file:
        commands = file.read().splitlines()
    _print(f"report: {report(run, found, samples, data.split('test', len(samples)), commands)}")


# bound, sample, plot, info


def _opened(options: argparse.Namespace) -> Run:
    return _mistakes(Run.opened, options.run, options.checkpoint, options.device)


def _bound_in(path: Path) -> Bound:
    """The bound in a run's folder, unless it says to hold much more than numbers can be compressed to."""
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        if sum(info.file_size for info in file.infolist()) > 100 * path.stat().st_size:
            raise ValueError(f"RUN must be the folder of a run, but {path} says to hold more than it does")
    return Bound.load(path)


def _refuse_more_steps(run: Run, options: argparse.Namespace, name: str) -> None:
    T = run.settings.num_steps
    if options.num_steps is not None and options.num_steps > T:
        raise Mistake(f"{name} must be at most {T}, those of the run, but it is {options.num_steps}")


def _data_of(run: Run, options: argparse.Namespace) -> Data:
    """The data that a run began with, wherever they are by now."""
    settings = run.settings if options.data is None else run.settings.but(data=str(Path(options.data).resolve()))
    _, data = recipes.prepare(settings, run.device)
    run.refuse_other_data(data.form, "what is there now")
    return data


def _refuse_place(path: Path, folder: Path) -> None:
    """Refuse where nothing can be saved, before there is anything to save, and what a run has written itself."""
    if path.suffix != ".npz" or len(os.fsencode(path.name)) > 200:
        raise ValueError(f"--save must end in .npz, in 200 bytes, but it is {path}")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--save must be a file in a folder that is there, but it is {path}")
    place, run = path.parent.resolve(), folder.resolve()
    if place in (run / "pictures", run / "checkpoints") or (place == run and path.stem in ("samples", "bound")):
        raise ValueError(f"--save must leave the files of the run as they are, but it is {path}")


def _bound(options: argparse.Namespace) -> int:
    if options.save is not None:
        _mistakes(_refuse_place, options.save, options.run)
    run = _opened(options)
    x_0 = _mistakes(_data_of, run, options).labelled(options.split, options.number)
    _refuse_more_steps(run, options, "--chain-steps")
    diffusion = shortened(run.diffusion, options.num_steps)
    with Stop() as stop:
        found = _mistakes(
            bound, diffusion, stop.between(*x_0), num_times=options.times, generator=options.seed, progress=True
        )
        _print(found := run.form.in_units(found))
        _print(f"{options.split} data: {spelled(found)}")
        if options.particles is not None:
            tighter = importance_bound(
                diffusion, stop.between(*x_0), num_particles=options.particles, generator=options.seed, progress=True
            )
            _print(run.form.in_units(tighter))
    if options.save is not None:
        _mistakes(found.save, options.save)
    return 0


def _sample(options: argparse.Namespace) -> int:
    run = _opened(options)
    _refuse_more_steps(run, options, "--sample-steps")
    try:
        sampler = run.sampler(options.sampler)
    except ValueError as error:
        raise Mistake(f"--sampler {options.sampler} does not suit this run: {error}") from None
    free = (number for number in itertools.count(1) if not any(run.folder.glob(f"samples-{number}[.-]*")))
    path = options.save or run.folder / f"samples-{next(free)}.npz"
    _mistakes(_refuse_place, path, run.folder)
    if options.trajectory is not None and not run.form.is_drawable:
        raise Mistake(f"--trajectory must be left out for data of shape {tuple(run.form.event_shape)}")
    draw = functools.partial(sampler, num_steps=options.num_steps)
    _mistakes(_write_samples, run, path, draw, options.number, options.batch_size, options.seed)
    if options.trajectory is not None:
        _mistakes(_write_trajectory, run, path, sampler, options)
    return 0


def _write_samples(run: Run, path: Path, draw: Callable[..., Tensor], number: int, size: int, seed: int) -> Tensor:
    """Samples batch by batch, all from one seed, and a picture of the first ones."""
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = [size] * (number // size) + [number % size] * (number % size > 0)
    several = len(sizes) > 1
    with tqdm(sizes, desc="samples", unit="batch", disable=None if several else True) as bar:
        x_0 = torch.cat(
            [draw(n, *run.context(n, i * size), generator=generator, progress=not several) for i, n in enumerate(bar)]
        )
    samples = run.form.decoded(x_0)
    if not bool(samples.isfinite().all()):
        raise FloatingPointError(f"samples of the weights of step {run.svi.num_steps} are not finite")
    save_arrays(path, samples=samples)
    picture = path.with_suffix(".png")
    if run.form.is_drawable:
        shown = x_0 if run.form.event_shape == (2,) else x_0[:256]
        save_figure(picture, plots.samples(run.form.drawable(shown)).figure)
    _print(f"{number} samples: {path}" + f", {picture}" * run.form.is_drawable)
    return x_0


def _write_trajectory(run: Run, path: Path, sampler: Sampler, options: argparse.Namespace) -> None:
    T, gif = run.diffusion.num_steps, options.trajectory == "gif"
    steps = (0, *(range(1, T + 1) if options.num_steps is None else sampler.spaced(options.num_steps)))
    shown = torch.linspace(0, len(steps) - 1, min(len(steps), 61 if gif else 9)).round().int().tolist()
    times = sorted({steps[i] for i in shown}, reverse=True)
    number = min(options.number, (64 if gif else 6) if run.form.event_shape != (2,) else 2000)
    states = sampler.trajectory(
        number, *run.context(number), num_steps=options.num_steps, times=times, generator=options.seed, progress=True
    )
    states = torch.stack([run.form.drawable(state) for state in states])
    out = path.with_name(f"{path.stem}-trajectory.{'gif' if gif else 'png'}")
    if gif:
        with tempfile.TemporaryDirectory() as folder:
            plots.animation(states, times).save(Path(folder, out.name), PillowWriter(fps=12))
            write(out, Path(folder, out.name).read_bytes())
    else:
        save_figure(out, plots.trajectory(states, times))
    _print(f"from noise to data: {out}")


def _plot(options: argparse.Namespace) -> int:
    run = _opened(options)
    folder = run.folder / "pictures"
    _mistakes(folder.mkdir, exist_ok=True)
    x_0, records = _mistakes(_data_of, run, options).split("test", 2000), _mistakes(Metrics.read, run.folder)
    pictures: dict[str, Any] = {}
    if any(record.get("loss", record.get("bound")) is not None for record in records):
        pictures["curves"] = plots.curves(records).figure
    path = run.folder / "bound.npz"
    if path.is_file() and run.settings.num_steps > 1:
        pictures["terms"] = plots.terms(_mistakes(_bound_in, path)).figure
    if run.form.is_drawable:
        number = 64 if run.form.event_shape != (2,) else 2000
        with finite(run.svi.num_steps):
            samples = run.sampler("ancestral")(number, *run.context(number), generator=options.seed, progress=True)
            pictures["samples"] = plots.samples(run.form.drawable(samples)).figure
        pictures["data"] = plots.samples(run.form.drawable(x_0[: len(samples)])).figure
    if run.form.event_shape == (2,) and run.form.classes is None:
        T = run.settings.num_steps
        pictures["process"] = plots.diffusion_process(run.diffusion, x_0, sorted({0, T // 8, T // 4, T // 2, T}))
    for name, figure in pictures.items():
        _mistakes(save_figure, folder / f"{name}.png", figure)
        _print(folder / f"{name}.png")
    return 0


def _info(options: argparse.Namespace) -> int:
    if options.run is None:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device = torch.device("cuda" if gpus else "cpu")
        facts = {**versions(device), "GPUs": ", ".join(gpus) or "none", "data": ", ".join(BUILT_IN)}
    else:
        run = _mistakes(Run.opened, options.run, "last", "cpu")
        records = [record for record in _mistakes(Metrics.read, run.folder) if record.get("bound") is not None]
        path = run.folder / "bound.npz"
        checkpoint_files = sorted(path.name for path in (run.folder / "checkpoints").glob("*.pt"))
        schedule = run.diffusion.forward_process.schedule
        facts = {
            "data": run.settings.data,
            "read as": f"{run.form.read_as}, each of shape {tuple(run.form.event_shape)}",
            "parts": run.form.contents,
            "process": f"{type(run.diffusion.forward_process).__name__}, {schedule!r}",
            "denoiser": f"{run.settings.prediction}, {run.settings.network}",
            "parameters": f"{sum(parameter.numel() for parameter in run.diffusion.parameters()):,}",
            "steps": f"{run.svi.num_steps} of {run.settings.steps}, {run.state['seconds'] / 60:.1f} minutes",
            "held-out bound": f"{records[-1]['bound']:.4f} nats at step {records[-1]['step']}"
            if records
            else "none yet",
            "best": f"{run.state['best']:.4f} nats at step {run.state['best_step']}" if records else "none yet",
            **({"test bound": spelled(_mistakes(_bound_in, path))} if path.is_file() else {}),
            "checkpoints": ", ".join(checkpoint_files),
        }
    width = max(map(len, facts))
    for name, value in facts.items():
        _print(f"{name:{width}}  {printable(value)}")
    return 0
