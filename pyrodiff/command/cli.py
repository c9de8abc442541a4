"""The command line: ``pyrodiff train``, ``bound``, ``sample``, ``plot`` and ``info``.

This module parses the line and calls the command. Torch is imported only once the line is valid, so that mistakes are
reported at once. Exit codes are: 0 for success, 2 for an invalid request (one line on stderr, nothing half-written), 1
for a training that failed, and 128 plus the signal's number if a signal stopped it.
"""

import argparse
import difflib
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from .. import __version__
from ..base.arguments import ArgumentError
from ..base.files import printable
from . import options
from .stopping import Interrupted, leave

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Arguments:
        arguments: The words after the command's name; those of the process if not given.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr) if arguments is None else ():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack ±
    try:
        code = _run(_parsed(sys.argv[1:] if arguments is None else list(arguments)))
    except SystemExit as left:  # from the parser, which has printed why
        code = left.code if isinstance(left.code, int) else 2
    except BaseException as error:
        known = _code_of(error)
        if known is None:
            raise
        code = known
    try:
        print(end="", flush=True)
    except OSError as error:  # a full disk, or a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _code_of(error) or 2
    return code


def _run(line: argparse.Namespace) -> int:
    """Call the command of a line. Its imports are here, as torch alone takes seconds."""
    if line.command == "train":
        given = {name: options.checked(name, vars(line)[name]) for name in options.names() if name in vars(line)}
        from .train import train

        _listen()
        return train(given, line.out, line.config, line.resume, line.text)
    if line.command == "info":
        from .info import info

        _listen()
        return info(line.run)
    from .use import bound, plot, sample

    _listen()
    more = {name: value for name, value in vars(line).items() if name not in ("command", "parser", "text")}
    if line.command == "bound":
        return bound(**more)
    if line.command == "sample":
        return sample(**more)
    return plot(**more)


def _listen() -> None:
    """Let SIGINT raise KeyboardInterrupt again, after all imports."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What went wrong


def _code_of(error: BaseException) -> int | None:
    """The exit code for an error, after printing it in one line; None for a bug of the command itself."""
    if isinstance(error, Interrupted):
        return _said(f"stopped by {signal.Signals(error.signal).name}: nothing was written", 128 + error.signal)
    if isinstance(error, KeyboardInterrupt):
        number = next(iter(error.args), signal.SIGINT)
        return _said("left at once; what was saved before is as it was", 128 + number)
    if isinstance(error, FloatingPointError):
        hint = "checkpoints are from before. A smaller --lr or --clip-norm may help"
        return _said(f"training failed: {error}; {hint}", 1)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if isinstance(error, ArgumentError):
        return _said(f"error: {_AS_OPTIONS.get(error.argument, error.argument)} {' '.join(error.said.split())}", 2)
    if isinstance(error, OSError | ImportError):
        return _said(f"error: {' '.join(str(error).split())}", 2)
    if isinstance(error, MemoryError | OverflowError) or (isinstance(error, RuntimeError) and _is_memory(error)):
        ways = "a smaller --batch-size, network or --T may help"
        return _said(f"out of memory: {ways}; what was saved before is as it was", 1)
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        why = "a process that reads batches was ended, as a full memory ends it"
        return _said(f"{why}: fewer --workers may help; what was saved before is as it was", 1)
    return None


_AS_OPTIONS = {name: options.flag(name) for name in options.names()} | {
    "num_steps": "--T",
    "num_blocks": "--blocks",
    "num_times": "--times",
    "num_particles": "--particles",
    "generator": "--seed",
    "path": "checkpoint",
    "first": "--log-snr-first",
    "last": "--log-snr-last",
}


def _is_memory(error: RuntimeError) -> bool:
    """Whether an error of torch is about full memory; there is no single class for that."""
    return "memory" in str(error) or "overflow" in str(error)


def _said(line: str, code: int) -> int:
    """Print a line on stderr, on any rank, as one may fail alone; returns the exit code."""
    with suppress(OSError):  # a full disk, say; the exit code still tells
        print(f"pyrodiff: {printable(line)}", file=sys.stderr, flush=True)
    return code


# What may stand on the line


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest option or command, with errors in one line."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more, allow_abbrev=False)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        wrong, _, known = message.partition(" (choose from ")
        among = re.findall(r"[\w-]+", known) or [*self._option_string_actions, "--version"]
        word = re.search(r"choice: '(.*)'" if known else r"(--?\w[^\s=':]*)", wrong)
        near = difflib.get_close_matches(word[1], among, 1) if word and word[1] not in among else []
        hint = f"; is {_TODAY.get(near[0], near[0])} meant?" if near else ""
        self.exit(2, printable(f"{self.prog}: error: {message}{hint} (see {self.prog} --help)") + "\n")


class _Renamed(argparse.Action):
    """An option under its earlier name: accepted for one release, with a notice of the new name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, spelling: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        now = options.flag(self.dest)
        print(f"{parser.prog}: {spelling} is now {now}, and goes with version 0.3", file=sys.stderr, flush=True)


_TODAY = {options.flag(old): options.flag(new) for old, new in options.OLD.items()}


def _parsed(line: list[str]) -> argparse.Namespace:
    parser = _parser()
    for word in line:
        if word != word.encode(errors="replace").decode() or "\0" in word:
            parser.error(f"each word must be text in UTF-8, but one is {word!a}")
    found, rest = parser.parse_known_args(line)
    if rest:
        found.parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    found.text = shlex.join(["pyrodiff", *line])
    return found


def _parser() -> _Parser:
    parser = _Parser(prog="pyrodiff", description="Diffusion models with a likelihood: train, bound, sample, plot.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    _add_train(commands)
    _add_bound(commands)
    _add_sample(commands)
    plot = _add(commands, "plot", "draw the curves, the terms over t, samples beside data")
    plot.add_argument("--data", help="where the run's data are, if they have moved")
    about = "versions and devices; of a run, what it is and how far it came"
    info = commands.add_parser("info", help=about, description=f"{about.capitalize()}.")
    info.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="the folder of a run; versions and devices if left out"
    )
    return parser


def _add(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    """The parser of a command for an existing run."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that pyrodiff train made")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the path of a checkpoint (default: best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--seed", type=_seed, default=0, help="the seed of all draws (default: 0)")
    return parser


def _add_bound(commands: Any) -> None:
    parser = _add(commands, "bound", "the bound on -log p of data, term by term")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="of which data")
    parser.add_argument("--number", type=_count, help="of how many data, the first ones (default: all)")
    parser.add_argument("--times", type=_count, help="how many of the T terms per datum, at random (default: all)")
    chain = "the bound of a chain of so many of the T steps (default: all)"
    parser.add_argument("--chain-steps", type=_count, help=chain)
    parser.add_argument("--num-steps", dest="chain_steps", type=_count, action=_Renamed, help=argparse.SUPPRESS)
    parser.add_argument("--particles", type=_count, help="beside it, the importance-weighted bound of K trajectories")
    parser.add_argument("--save", type=Path, help="an .npz file for the terms of each datum")
    parser.add_argument("--data", help="where the run's data are, if they have moved")


def _add_sample(commands: Any) -> None:
    parser = _add(commands, "sample", "draw samples: an .npz file and a picture")
    parser.add_argument("--number", type=_count, default=64, help="how many (default: 64)")
    parser.add_argument("--batch-size", type=_count, default=256, help="how many at a time (default: 256)")
    names = ("ancestral", "ddim", "dpm", "heun", "pc", "flow")
    parser.add_argument("--sampler", choices=names, default="ancestral", help="by which sampler (default: ancestral)")
    parser.add_argument("--sample-steps", type=_count, help="in how many of the T steps (default: all)")
    parser.add_argument("--num-steps", dest="sample_steps", type=_count, action=_Renamed, help=argparse.SUPPRESS)
    place = "the .npz file; the picture stands beside it (RUN/samples-1.npz, or the next free one)"
    parser.add_argument("--save", type=Path, help=place)
    way = "the way from noise to data too, as a strip or an animation"
    parser.add_argument("--trajectory", choices=("strip", "gif"), help=way)
    parser.add_argument("--label", type=_natural, help="draw samples of this label only (default: all labels in turn)")
    given = parser.add_argument_group("given a part of a datum")
    datum = "a datum of which a part is known: an .npy file of the shape of one, or a picture"
    given.add_argument("--given", type=Path, metavar="FILE", help=datum)
    which = "which of its numbers are known: an .npy file of bools, zeros and ones, or a picture, white where known"
    given.add_argument("--mask", type=Path, metavar="FILE", help=which)
    noise = (
        "standard deviation of the noise on the known numbers, as a fraction of the data's; above 0 unless data are "
    )
    noise += "bits or levels (default: 0)"
    given.add_argument("--noise", type=_positive, default=0.0, help=noise)
    given.add_argument("--particles", type=_count, default=64, help="particles of sequential Monte Carlo (default: 64)")
    fast = "by replacement, which is fast and biased, in the place of sequential Monte Carlo"
    given.add_argument("--replacement", action="store_true", help=fast)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train on data; the bound, samples and a report come out",
        usage="pyrodiff train DATA [options]",
        description="Train by SVI. Options without a default have values that suit the data; all of them are recorded "
        "in the run's folder. Under torchrun each process takes batches of its own.",
    )
    for title, fields in options.groups().items():
        group = parser.add_argument_group(title)
        for one in fields.values():
            _add_option(group, one.name)
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="the run's folder (default: runs/ and the name of the data)")
    group.add_argument("--config", type=Path, help="a TOML file of options; those on the line go before it")
    resume = "resume the run in --out, bit for bit on a CPU; start it if nothing is there"
    group.add_argument("--resume", action="store_const", const="last", help=resume)
    whole = "likewise, from the last checkpoint that is not damaged"
    group.add_argument("--resume=whole", dest="resume", action="store_const", const="whole", help=whole)


def _add_option(group: Any, name: str) -> None:
    one, kind = options.described(name)
    is_open = one.default is None or one.metadata["varies"]
    default = "" if is_open or name == "data" else f" (default: {str(one.default).lower()})"
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{one.metadata['help']}{default}".replace("%", "%%")}
    if name == "data":
        group.add_argument("data", nargs="?", metavar="DATA", **more)
        return
    if kind is bool:
        more["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        more["choices"] = get_args(kind)
    elif kind in (int, float, str):
        more |= {"type": kind, "metavar": kind.__name__.upper()}
    else:
        more |= {"type": _ints, "metavar": "INT,INT"}
    group.add_argument(options.flag(name), dest=name, **more)
    for old in [old for old, new in options.OLD.items() if new == name]:
        group.add_argument(options.flag(old), dest=name, **{**more, "action": _Renamed, "help": argparse.SUPPRESS})


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ints with commas between, as 32,64, but it is {text!r}") from None


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an int in 0..{2**32 - 1}, but it is {text!r}")
    return int(text)


def _natural(text: str) -> int:
    return _from(0, text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but it is {text!r}")
    return value


def _count(text: str) -> int:
    return _from(1, text)


def _from(least: int, text: str) -> int:
    if not text.isdecimal() or int(text[:4000]) < least:
        raise argparse.ArgumentTypeError(f"must be an int of at least {least}, but it is {text!r}")
    if len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be at most {2**31 - 1}, but it is {text:.20}")
    return int(text)
