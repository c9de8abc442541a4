"""What a run of training is told: every option with its type, its meaning and what it may be, in one place.

The command line, a TOML file and the record in a run's folder are three spellings of one :class:`Settings`. An option
that is None has the value that suits the data, which :mod:`~pyrodiff.command.recipes` knows.
"""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..base import arguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Settings", "kind", "option"]


def _any(name: str, value: object) -> None:
    """Whatever it is."""


def _natural(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, but it is {value!r}")


def _seed(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{name} must be an int in 0..{2**32 - 1}, but it is {value!r}")


def _positive(name: str, value: object) -> None:
    arguments.number(name, value, 0, math.inf)


def _from_zero(name: str, value: object) -> None:
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number of at least 0, but it is {value!r}")


def _finite(name: str, value: object) -> None:
    arguments.number(name, value, -math.inf, math.inf)


def _fraction(name: str, value: object) -> None:
    arguments.number(name, value, 0, 0.5)


def _levels(name: str, value: object) -> None:
    arguments.levels(value, name)


def _positives(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not value:
        raise ValueError(f"{name} must be ints, at least one, but it is {value!r}")
    for one in value:
        arguments.positive_int(name, one)


def _naturals(name: str, value: object) -> None:
    if value != (0,):
        _positives(name, value)


def _among(*values: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        arguments.one_of(name, value, values)

    check.choices = values
    return check


def _option(
    group: str, help: str, check: Callable[[str, object], None] = _any, default: Any = None, changeable: bool = False
) -> Any:
    """A field of :class:`Settings`: where it stands in the help, what it means, what it may be, and whether a run that
    goes on may have another.
    """
    return field(default=default, metadata={"group": group, "help": help, "check": check, "changeable": changeable})


def _data(help: str, check: Callable = _any, default: Any = None) -> Any:
    return _option("data", help, check, default)


def _model(help: str, check: Callable = _any, default: Any = None) -> Any:
    return _option("model", help, check, default)


def _training(help: str, check: Callable = _any, default: Any = None, changeable: bool = False) -> Any:
    return _option("training", help, check, default, changeable)


def _watching(help: str, check: Callable = _any, default: Any = None, changeable: bool = True) -> Any:
    return _option("watching", help, check, default, changeable)


@dataclass(frozen=True)
class Settings:
    """All options of a run.

    Arguments: see :command:`pyrodiff train --help`. None is to be the value that suits the data.

    Raises:
        ValueError: If one cannot be; the message names it as the command line does.

    Example:
        >>> from pyrodiff.command.settings import Settings
        >>> settings = Settings(data="digits", steps=100)
        >>> settings.batch_size is None, settings.but(steps=5).steps
        (True, 5)
        >>> Settings(data="digits", batch_size=0)
        Traceback (most recent call last):
        pyrodiff.ArgumentError: --batch-size must be an int of at least 1, but it is 0
    """

    data: str | None = _data(
        "swiss-roll, checkerboard, heartbeat or digits; or the path of a folder of IDX files, of an "
        ".npy or .npz file, or of a folder of pictures"
    )
    array: str | None = _data("which array of an .npz file, where it holds several")
    labels: bool = _data(
        "learn p(x | label): the folders of pictures, IDX files of labels, or y of an .npz beside x", default=False
    )
    read_as: str | None = _data(
        "how numbers are read: numbers (a density), levels (a probability of whole numbers) or bits",
        _among("numbers", "levels", "bits"),
    )
    levels: int | None = _data("how many levels whole numbers have, from 0 on (256 for 8-bit pictures)", _levels)
    binarize: str | None = _data(
        "bits from levels: threshold (1 from half on), static (drawn once) or dynamic (drawn anew each time)",
        _among("none", "threshold", "static", "dynamic"),
    )
    augment: str | None = _data(
        "other pictures like them: strokes (digits only) or flip (left to right)", _among("none", "strokes", "flip")
    )
    holdout: float = _data(
        "the part held out for validation, and again for testing, where data have no splits", _fraction, 0.1
    )

    num_steps: int | None = _model("T, the number of diffusion steps", arguments.positive_int)
    schedule: str | None = _model("the noise schedule", _among("log-snr", "linear", "cosine", "reciprocal"))
    log_snr_first: float | None = _model("the log SNR at t = 1, of the schedule log-snr", _finite)
    log_snr_last: float | None = _model("the log SNR at t = T, of the schedule log-snr", _finite)
    prediction: str | None = _model(
        "what the network predicts (levels and logit: of levels and of bits)",
        _among("noise", "data", "velocity", "score", "level", "logit"),
    )
    variance: str | None = _model("the variance of the reverse kernels", _among("posterior", "forward"))
    network: str | None = _model("mlp, or unet for pictures", _among("mlp", "unet"))
    channels: tuple[int, ...] | None = _model("the U-Net's channels at each size, as 32,64", _positives)
    attention: tuple[int, ...] | None = _model("the heights at which the U-Net attends, as 16,8; 0 for none", _naturals)
    hidden: int | None = _model("hidden units: of the MLP, or at the U-Net's smallest size (0 for none)", _natural)
    blocks: int | None = _model("residual blocks, of the U-Net at each size", arguments.positive_int)
    dropout: float | None = _model("the probability that a hidden unit is dropped in training", arguments.probability)

    steps: int | None = _training("how many gradient steps to train", arguments.positive_int, changeable=True)
    batch_size: int | None = _training("data a gradient step", arguments.positive_int)
    accumulate: int = _training("batches a step of the optimizer", arguments.positive_int, 1)
    lr: float | None = _training("AdamW's learning rate, which falls to 0 as a cosine", _positive)
    warmup: int = _training("steps over which the learning rate rises first", _natural, 0)
    weight_decay: float | None = _training("AdamW's weight decay", _from_zero)
    clip_norm: float = _training("the norm that the gradient a datum is clipped to", _positive, 10.0)
    average: float | None = _training(
        "the decay of the moving average of the weights; 0 for none", arguments.probability
    )
    drawing: str | None = _training("how t is drawn", _among("low-discrepancy", "uniform", "loss-second-moment"))
    weighting: str = _training("what a step weighs: bound, or simple as in DDPM", _among("bound", "simple"), "bound")
    autocast: str = _training("the precision that networks compute in", _among("none", "bfloat16", "float16"), "none")
    compile: bool = _training("compile the step into one graph", default=False, changeable=True)
    seed: int = _training("the seed of all random numbers", _seed, 0)
    device: str = _training("auto, cpu, cuda, cuda:1, ...", default="auto", changeable=True)
    threads: int | None = _training(
        "how many threads to compute with (all cores)", arguments.positive_int, changeable=True
    )

    evaluate_every: int | None = _watching("steps between evaluations on held-out data", arguments.positive_int)
    evaluate_on: int = _watching("how many held-out data to evaluate on", arguments.positive_int, 512, changeable=False)
    evaluate_times: int = _watching(
        "how many of the T terms to evaluate a datum, at random", arguments.positive_int, 50, changeable=False
    )
    checkpoint_every: int | None = _watching("steps between checkpoints", arguments.positive_int)
    keep: int = _watching("how many of the last checkpoints to keep, beside the best", arguments.positive_int, 2)
    log_every: int = _watching("steps between lines of metrics", arguments.positive_int, 50)
    samples: int | None = _watching("how many samples to draw at each evaluation", arguments.positive_int)
    final_times: int | None = _watching("how many of the T terms the last bound has (all)", arguments.positive_int)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, list):
                object.__setattr__(self, one.name, value := tuple(value))
            if value is None:
                if one.default is not None:
                    raise ValueError(f"{option(one.name)} must have a value, but it is None")
                continue
            if kind(one.name) is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, one.name, value := _float(option(one.name), value))
            wanted = tuple if kind(one.name) not in (int, float, str, bool) else kind(one.name)
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                raise ValueError(f"{option(one.name)} must be {_KINDS[wanted]}, but it is {value!r}")
            if isinstance(value, str) and not _is_text(value):
                raise ValueError(f"{option(one.name)} must be text in UTF-8, but it is {value!a}")
            one.metadata["check"](option(one.name), value)

    def but(self, **values: Any) -> "Settings":
        """The settings with other values for some."""
        return dataclasses.replace(self, **values)

    def given(self) -> dict[str, Any]:
        """What is not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def toml(self) -> str:
        """As a TOML file, that :meth:`read` reads."""
        return "".join(f"{name} = {_toml(value)}\n" for name, value in self.given().items())

    @staticmethod
    def read(path: str | Path, name: str = "--config") -> dict[str, Any]:
        """The options that a TOML file gives, checked.

        Arguments:
            path: The file.
            name: What asks for it, for errors.

        Raises:
            ValueError: If there is none, it is no TOML, or has an option that there is not, or cannot be.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} must be a TOML file, but {path} is not: {error}") from error
        except OSError as error:
            raise ValueError(f"{name} must be a file that can be read, but {path}: {error.strerror}") from error
        spelled, values = values, {key.replace("-", "_"): value for key, value in values.items()}
        if len(values) < len(spelled):
            twice = next(key for key in spelled if key.replace("-", "_") != key and key.replace("-", "_") in spelled)
            raise ValueError(f"{name} must name each option once, but {path} has {twice!r} in two spellings")
        names = [one.name for one in dataclasses.fields(Settings)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                hint = f": is {near[0]} meant?" if near else f": there are {', '.join(names)}"
                raise ValueError(f"{name} must have known options only, but {path} has {key!r}{hint}")
        checked = Settings(**values)
        return {key: getattr(checked, key) for key in values}


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _float(name: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can be, but it has {len(str(value))} digits") from None


_KINDS = {int: "an int", float: "a number", str: "a string", bool: "true or false", tuple: "ints"}


def option(name: str) -> str:
    """How the command line calls an option.

    Arguments:
        name: The attribute of :class:`Settings`.
    """
    return name if name == "data" else f"--{name.replace('_', '-')}"


def kind(name: str) -> Any:
    """The type of an option, but for None: int, float, str, bool, or a tuple of ints.

    Arguments:
        name: The attribute of :class:`Settings`.
    """
    hint = get_type_hints(Settings)[name]
    return next((one for one in get_args(hint) if one is not type(None) and one is not Ellipsis), hint)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
