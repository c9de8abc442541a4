"""Every option of a training run, in groups: its type, its meaning and its allowed values.

A :class:`Plan` has a value for each of them. A run's ``settings.toml`` and checkpoints record it. A command line or a
TOML file gives some of them, as a dict by name, which :mod:`~pyrodiff.command.plans` completes to a plan.

Nothing here imports torch, which takes seconds, so that a mistyped option is refused at once.
"""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..base import arguments
from ..base.arguments import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Model", "Plan", "Reading", "Training", "Watching"]

BUILT_IN = ("swiss-roll", "checkerboard", "heartbeat", "digits")
OLD = {"steps": "train_steps", "num_steps": "T"}  # earlier spellings, which stay accepted

Check = Callable[[str, Any], object]


def _count(least: int, most: int = 2**31 - 1) -> Check:
    """A check that an int is in a range; above it, memory would run out or indices overflow."""

    def check(name: str, value: int) -> None:
        if value < least:
            raise ArgumentError(name, f"must be an int of at least {least}, but it is {value!r}")
        if value > most:
            raise ArgumentError(name, f"must be at most {most}, but it is {value!r}")

    return check


def _seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise ArgumentError(name, f"must be an int in 0..{2**32 - 1}, but it is {value!r}")


def _between(low: float, high: float) -> Check:
    return lambda name, value: arguments.number(name, value, low, high)


def _from_zero(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ArgumentError(name, f"must be a number of at least 0, but it is {value!r}")


def _positives(name: str, value: tuple[int, ...]) -> None:
    if not value:
        raise ArgumentError(name, "must be ints, at least one, but it is empty")
    for one in value:
        _count(1)(name, arguments.positive_int(name, one))


def _heights(name: str, value: tuple[int, ...]) -> None:
    if value != (0,):
        _positives(name, value)


def _option(help: str, default: Any, check: Check | None = None, *, changes: bool = False, varies: bool = False) -> Any:
    """A field of a group.

    Arguments:
        help: What it means.
        default: Its value if no other is given.
        check: Called with its name and a value of its type; raises if the value is not allowed.
        changes: Whether a resumed run may change it.
        varies: Whether its default depends on the data or on other options.
    """
    return field(default=default, metadata={"help": help, "check": check, "changes": changes, "varies": varies})


@dataclass(frozen=True)
class Reading:
    """Which data, and how they are read.

    Arguments: see :command:`pyrodiff train --help`.
    """

    data: str = _option(
        "swiss-roll, checkerboard, heartbeat or digits; or the path of a folder of IDX files, of an "
        ".npy or .npz file, or of a folder of pictures",
        "",
    )
    array: str | None = _option("which array of an .npz file, where it holds several", None)
    labels: bool = _option(
        "learn p(x | label): the folders of pictures, IDX files of labels, or y of an .npz beside x", False
    )
    read_as: Literal["numbers", "levels", "bits"] = _option(
        "how numbers are read: numbers (a density), levels (a probability of whole numbers) or bits",
        "numbers",
        varies=True,
    )
    levels: int | None = _option(
        "how many levels whole numbers have, from 0 on (256 for 8-bit pictures)", None, _count(2)
    )
    binarize: Literal["none", "threshold", "static", "dynamic"] = _option(
        "bits from levels: threshold (1 from half on), static (drawn once) or dynamic (drawn anew each time)", "none"
    )
    augment: Literal["none", "strokes", "flip"] = _option(
        "other pictures like them: strokes (digits only) or flip (left to right)", "none", varies=True
    )
    stream: bool = _option(
        "read each batch as it is needed, of an .npy file or a folder of pictures that memory does not hold", False
    )
    holdout: float = _option(
        "the part held out for validation, and again for testing, where data have no splits", 0.1, _between(0, 0.5)
    )


@dataclass(frozen=True)
class Model:
    """The diffusion and its network.

    Arguments: see :command:`pyrodiff train --help`.
    """

    T: int = _option("T, the number of diffusion steps", 1000, _count(1, 2**24), varies=True)
    schedule: Literal["log-snr", "linear", "cosine", "reciprocal"] = _option(
        "the noise schedule", "cosine", varies=True
    )
    log_snr_first: float | None = _option(
        "the log SNR at t = 1, of the schedule log-snr", None, _between(-math.inf, math.inf)
    )
    log_snr_last: float | None = _option(
        "the log SNR at t = T, of the schedule log-snr", None, _between(-math.inf, math.inf)
    )
    prediction: Literal["noise", "data", "velocity", "score", "level", "logit"] = _option(
        "what the network predicts (levels and logit: of levels and of bits)", "velocity", varies=True
    )
    variance: Literal["posterior", "forward"] | None = _option("the variance of the reverse kernels", None)
    network: Literal["mlp", "unet"] = _option("mlp, or unet for pictures", "mlp", varies=True)
    channels: tuple[int, ...] | None = _option("the U-Net's channels at each size, as 32,64", None, _positives)
    attention: tuple[int, ...] | None = _option(
        "the heights at which the U-Net attends, as 16,8; 0 for none", None, _heights
    )
    hidden: int = _option(
        "hidden units: of the MLP, or at the U-Net's smallest size (0 for none)", 256, _count(0), varies=True
    )
    blocks: int = _option("residual blocks, of the U-Net at each size", 3, _count(1, 1000), varies=True)
    dropout: float = _option(
        "the probability that a hidden unit is dropped in training", 0.0, arguments.probability, varies=True
    )


@dataclass(frozen=True)
class Training:
    """How it is trained.

    Arguments: see :command:`pyrodiff train --help`.
    """

    train_steps: int = _option("how many gradient steps to train", 5000, _count(1), changes=True, varies=True)
    batch_size: int = _option("data per gradient step", 256, _count(1), varies=True)
    accumulate: int = _option("batches per step of the optimizer", 1, _count(1))
    lr: float = _option("AdamW's learning rate, which falls to 0 as a cosine", 1e-3, _between(0, math.inf), varies=True)
    warmup: int = _option("steps over which the learning rate rises first", 0, _count(0))
    weight_decay: float = _option("AdamW's weight decay", 0.0, _from_zero, varies=True)
    clip_norm: float = _option("the norm that the gradient per datum is clipped to", 10.0, _between(0, math.inf))
    average: float = _option(
        "the decay of the moving average of the weights; 0 for none", 0.998, arguments.probability, varies=True
    )
    drawing: Literal["low-discrepancy", "uniform", "loss-second-moment"] = _option(
        "how t is drawn", "low-discrepancy", varies=True
    )
    weighting: Literal["bound", "simple"] = _option("what a step weighs: bound, or simple as in DDPM", "bound")
    autocast: Literal["none", "bfloat16", "float16"] = _option("the precision that networks compute in", "none")
    workers: int = _option("processes that read batches ahead, with --stream", 0, _count(0, 256), changes=True)
    compile: bool = _option("compile the step into one graph", False, changes=True)
    seed: int = _option("the seed of all random numbers", 0, _seed)
    device: str = _option("auto, cpu, cuda, cuda:1, ...", "auto", changes=True)
    threads: int | None = _option(
        "how many threads to compute with (measured at the start)", None, _count(1), changes=True
    )


@dataclass(frozen=True)
class Watching:
    """What is written and shown during training.

    Arguments: see :command:`pyrodiff train --help`.
    """

    evaluate_every: int = _option(
        "steps between evaluations on held-out data; the first is after --log-every steps",
        500,
        _count(1),
        changes=True,
        varies=True,
    )
    evaluate_on: int = _option("how many held-out data to evaluate on", 512, _count(1))
    evaluate_times: int = _option("how many of the T terms to evaluate per datum, at random", 50, _count(1))
    checkpoint_every: int = _option("steps between checkpoints", 500, _count(1), changes=True, varies=True)
    keep: int = _option("how many of the last checkpoints to keep, beside the best", 2, _count(1), changes=True)
    log_every: int = _option(
        "steps between lines of metrics (a fortieth of all, 50 at most)", 50, _count(1), changes=True, varies=True
    )
    samples: int = _option("how many samples to draw at each evaluation", 64, _count(1), changes=True, varies=True)
    final_times: int | None = _option("how many of the T terms the last bound has (all)", None, _count(1), changes=True)


@dataclass(frozen=True)
class Plan:
    """All options of a run.

    Arguments:
        reading, model, training, watching: The options in their groups; see :command:`pyrodiff train --help`.

    Example:
        >>> from pyrodiff.command.options import Plan
        >>> plan = Plan.of({"data": "digits", "train_steps": 100})
        >>> plan.training.train_steps, plan.but(T=5).model.T
        (100, 5)
        >>> Plan.of({"data": "digits", "batch_size": 0})
        Traceback (most recent call last):
        pyrodiff.ArgumentError: batch_size must be an int of at least 1, but it is 0
    """

    reading: Reading = Reading()
    model: Model = Model()
    training: Training = Training()
    watching: Watching = Watching()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan with these values, by the names of the options; the others have their defaults.

        Arguments:
            values: The values, also under their earlier names.

        Raises:
            ArgumentError: If there is no such option, or the value is not allowed.
        """
        return cls().but(**{OLD.get(name, name): value for name, value in values.items()})

    def but(self, **values: Any) -> "Plan":
        """The plan with other values for some options.

        Arguments:
            **values: The values by name.

        Raises:
            ArgumentError: If there is no such option, or the value is not allowed.
        """
        values = {name: checked(name, value) for name, value in values.items()}
        changed: dict[str, Any] = {}
        for group, names in groups().items():
            own = {name: values[name] for name in values.keys() & names.keys()}
            changed[group] = dataclasses.replace(getattr(self, group), **own)
        return Plan(**changed)

    def values(self) -> dict[str, Any]:
        """The values of all options that have one, by name."""
        every = {name: value for group in groups() for name, value in vars(getattr(self, group)).items()}
        return {name: value for name, value in every.items() if value is not None}

    def toml(self) -> str:
        """The plan as a TOML file, which :func:`read` reads."""
        return "".join(f"{name} = {_toml(value)}\n" for name, value in self.values().items())


@cache
def groups() -> dict[str, dict[str, dataclasses.Field]]:
    """The options, by group and name."""
    return {
        group.name: {one.name: one for one in dataclasses.fields(group.default)}
        for group in dataclasses.fields(Plan)
        if dataclasses.is_dataclass(group.default)
    }


@cache
def _fields() -> dict[str, tuple[dataclasses.Field, Any]]:
    found = {}
    for group in (Reading, Model, Training, Watching):
        hints = get_type_hints(group)
        for one in dataclasses.fields(group):
            of = [kind for kind in get_args(hints[one.name]) if kind is not type(None)]
            is_union = type(None) in get_args(hints[one.name])
            found[one.name] = one, of[0] if is_union else hints[one.name]
    return found


@cache
def names() -> tuple[str, ...]:
    """The names of all options."""
    return tuple(_fields())


def described(name: str) -> tuple[dataclasses.Field, Any]:
    """An option's field, and its type, None aside: int, float, str, bool, a tuple of ints, or a Literal.

    Arguments:
        name: Its name.
    """
    return _fields()[name]


def may_change(name: str) -> bool:
    """Whether a resumed run may change an option; the path of the data may change.

    Arguments:
        name: Its name.
    """
    return name == "data" or _fields()[name][0].metadata["changes"]


def flag(name: str) -> str:
    """An option as it is written on a command line.

    Arguments:
        name: Its name.
    """
    return name if name == "data" else f"--{name.replace('_', '-')}"


_KINDS = {int: "an int", float: "a number", str: "a string", bool: "true or false", tuple: "ints"}


def checked(name: str, value: Any) -> Any:
    """The value of an option, of its exact type.

    Arguments:
        name: The option.
        value: Its value, from Python or TOML; None if it is not set.

    Raises:
        ArgumentError: If there is no such option, or the value is not allowed.
    """
    if name not in _fields():
        raise ArgumentError("options", f"must be known ones, but {name!r} is none{_nearest(name, [*_fields(), *OLD])}")
    one, kind = _fields()[name]
    if value is None:
        if one.default is not None:
            raise ArgumentError(name, "must have a value, but it is None")
        return None
    if get_origin(kind) is Literal:
        arguments.one_of(name, value, get_args(kind))
        return value
    if kind is float and arguments.is_int(value):
        value = _float(name, value)
    wanted = kind if kind in (int, float, str, bool) else tuple
    value = tuple(value) if wanted is tuple and isinstance(value, list) else value
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ArgumentError(name, f"must be {_KINDS[wanted]}, but it is {value!r}")
    if isinstance(value, str) and not _is_text(value):
        raise ArgumentError(name, f"must be text in UTF-8, but it is {value!a}")
    if one.metadata["check"] is not None:
        one.metadata["check"](name, value)
    return value


def _is_text(value: str) -> bool:
    return value == value.encode(errors="replace").decode() and "\0" not in value


def _float(name: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(
            name, f"must be a number that a float can be, but it has {len(str(value))} digits"
        ) from None


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f": is {near[0]} meant?" if near else f": there are {', '.join(names)}"


def read(path: Path, argument: str) -> dict[str, Any]:
    """The options that a TOML file gives, by their names.

    Arguments:
        path: The file.
        argument: The argument that names the file, for error messages.

    Raises:
        ArgumentError: If it is no file of at most 64 KiB, no TOML, or gives an unknown option or a value that is not
            allowed.
    """
    is_pipe_or_large = path.exists() and not path.is_dir() and not (path.is_file() and path.stat().st_size <= 2**16)
    if is_pipe_or_large:
        raise ArgumentError(argument, f"must be a TOML file of options, of at most 64 KiB, but {path} is none")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of an int of more digits than Python reads
        raise ArgumentError(argument, f"must be a TOML file, but {path} is not: {error}") from error
    except RecursionError:
        raise ArgumentError(argument, f"must be a TOML file of options, but {path} is none") from None
    except OSError as error:
        raise ArgumentError(argument, f"must be a file that can be read, but {path}: {error.strerror}") from error
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        name = OLD.get(name, name)
        if name in values:
            raise ArgumentError(argument, f"must name each option once, but {path} has {key!r} in two spellings")
        if name not in _fields():
            near = _nearest(name, [*_fields(), *OLD])
            raise ArgumentError(argument, f"must have known options only, but {path} has {key!r}{near}")
        try:
            values[name] = checked(name, value)
        except ArgumentError:
            raise
        except ValueError:  # an int in hexadecimal of more digits than Python says
            raise ArgumentError(name, f"must be less, but it has thousands of digits in {path}") from None
    return values


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
