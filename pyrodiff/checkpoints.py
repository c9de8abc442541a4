"""Checkpoints: a run on disk, written atomically, and loaded without running code.

A checkpoint holds the state of an :class:`~pyrodiff.SVI` (weights, average, optimizer, scheduler, scaler, counts, the
history of a drawing of t) and of every random number generator. A run that is resumed from it continues, on a CPU and
unless compiled, bit for bit as the original would have.

It is written to a temporary file, flushed to the disk and then renamed: after a kill, or on a full disk, the previous
one is still there. Only tensors, numbers and strings are read; anything else in a file is refused before it could run.

Example:
    >>> import pathlib, tempfile
    >>> pair = pyrodiff.Diffusion(
    ...     forward := pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10)),
    ...     pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,))),
    ...     event_shape=(2,),
    ... ).one_step()
    >>> make = lambda: pyrodiff.SVI(pair.model, pair.guide, torch.optim.Adam, pyrodiff.DiffusionELBO())
    >>> svi, x_0 = make(), pyrodiff.datasets.swiss_roll(100)
    >>> loss = svi.step(x_0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "run.pt")
    ...     pyrodiff.checkpoints.save(path, svi, epoch=3)
    ...     left_alone = svi.step(x_0)
    ...     again = make()
    ...     pyrodiff.checkpoints.restore(path, again)
    {'epoch': 3}
    >>> again.step(x_0) == left_alone
    tensor(True)
"""

import io
import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import arguments, checks, ranks
from .base.arguments import ArgumentError
from .base.files import path_of, write
from .base.randomness import put_sources, sources
from .training.svi import SVI

__all__ = ["load", "restore", "save"]

_FORMAT, _NAMES = 1, {"format", "svi", "sources", "more"}
_PLAIN = (type(None), bool, int, float, str, Tensor, nn.Parameter)
_NESTED = (dict, OrderedDict, Counter, list, tuple, torch.Size)
_CALLED = re.compile(  # the calls that rebuild tensors, none of which allocates more than the file holds
    r"collections (OrderedDict|Counter)|torch (Size|\w+Storage|[a-z]+\d+)|"
    r"torch\._utils _rebuild_(tensor_v\d|parameter\w*)"
)


def save(path: str | os.PathLike[str], svi: SVI, **more: Any) -> None:
    """Save a run. With several ranks all must call it, and rank 0 writes.

    Arguments:
        path: The file; an existing one is replaced once the new one is complete.
        svi: The run, after a step of the optimizer.
        more: Anything else to save: tensors, numbers and strings, in dicts, lists and tuples.

    Raises:
        ValueError: If ``svi`` has no state yet, or ``more`` has values of another kind; nothing is written.
        OSError: If the file cannot be written; an existing one is unchanged.
    """
    checks.instance("svi", svi, SVI)
    path = path_of(path)
    state = {"format": _FORMAT, "svi": svi.state_dict(), "sources": ranks.each(sources()), "more": more}
    problem = None
    try:
        state = {name: _plain(name, part) for name, part in state.items()}
        if ranks.number() == 0:
            data = io.BytesIO()
            torch.save(state, data)
            write(path, data.getbuffer())
    except Exception as error:  # reported below, so that other ranks do not wait for this one
        problem = error
    if not ranks.all_say(problem is None):
        raise problem or OSError(f"{path} could not be written by another rank")


def restore(path: str | os.PathLike[str], svi: SVI, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Resume a run that was saved.

    With several ranks all must call it. Each rank gets back its own random state; a rank beyond those that were saved
    keeps the one it has.

    Arguments:
        path: The file.
        svi: Constructed like the saved one, from programs of the same kind.
        content: What :func:`load` returned of the file, if that was called before; it is not read again.

    Returns:
        The ``more`` that was saved.

    Raises:
        ValueError: If there is no such file, it is cut short, corrupt, of a newer version, or holds anything but
            tensors, numbers and strings, or is the checkpoint of another architecture, schedule or optimizer; nothing
            is loaded. If the parameters of the programs are known only once they run, a checkpoint of other programs is
            refused on the next step.
    """
    checks.instance("svi", svi, SVI)
    state = load(path) if content is None else content
    try:
        svi.load_state_dict(state["svi"])
        if ranks.number() < len(state["sources"]):
            put_sources(state["sources"][ranks.number()])
    except ValueError as error:
        raise ArgumentError("path", f"must be a checkpoint of this run, but {path} is not: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        RuntimeError,
    ) as error:  # numbers, not tensors, say
        raise ArgumentError(
            "path", f"must be a checkpoint as it was saved, but {path} holds other things: {error}"
        ) from error
    return state["more"]


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: "svi", "sources" (the random state of each rank) and "more".

    Arguments:
        path: The file.

    Raises:
        ValueError: As of :func:`restore`, as far as the file is concerned.
    """
    file = path_of(path)
    if not file.is_file():
        raise ArgumentError("path", f"must be the path of a checkpoint, but there is no file {file}")
    try:
        _refuse_records(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArgumentError(
            "path",
            f"must be a checkpoint, of tensors, numbers and strings, but {file} holds something else, which may "
            "run code when it is loaded, and was not loaded",
        ) from error
    except Exception as error:  # a damaged file makes readers raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(
            "path", f"must be a whole checkpoint, but {file} is cut short or corrupt: {reason}"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ArgumentError("path", f"must be a checkpoint of this package, but {file} is some other file of torch's")
    if state["format"] > _FORMAT:
        raise ArgumentError(
            "path",
            f"must be a checkpoint of format {_FORMAT} at most, but {file} has {state['format']}, by "
            "a newer version of pyrodiff, which this one has to be updated to",
        )
    if not _NAMES <= state.keys():
        raise ArgumentError(
            "path", f"must be a checkpoint of this package, but {file} has no {min(_NAMES - state.keys())!r}"
        )
    return state


def _refuse_records(file: Path) -> None:
    """Checks that torch does not make: of sizes against the file's, of checksums, and of what is called."""
    with zipfile.ZipFile(file) as records:
        infos = records.infolist()
        if sum(info.file_size for info in infos) > file.stat().st_size or any(info.compress_type for info in infos):
            raise zipfile.BadZipFile("it says to hold more than it does")
        damaged = records.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        content = records.read(next(info for info in infos if info.filename.endswith("/data.pkl")))
    for operation, called, _ in pickletools.genops(content):
        is_call = operation.name in ("GLOBAL", "STACK_GLOBAL", "INST")  # of the others each calls one of these
        if is_call and not _CALLED.fullmatch(str(called)):
            raise pickle.UnpicklingError(f"it calls {called}")


def _plain(name: str, value: Any) -> Any:
    """A value that a file can hold without code: itself, or with NumPy's numbers, say, turned into Python's."""
    if type(value) in _PLAIN:
        return value
    parts: dict | list | tuple
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise ArgumentError(name, f"must have strings or ints as keys, but one is {key!r}")
        parts = {key: _plain(f"{name}[{key!r}]", part) for key, part in value.items()}
        is_plain = all(parts[key] is part for key, part in value.items())
    elif isinstance(value, list | tuple):
        parts = [_plain(f"{name}[{i}]", part) for i, part in enumerate(value)]
        is_plain = all(part is before for part, before in zip(parts, value, strict=True))
        parts = parts if isinstance(value, list) else tuple(parts)
    else:
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)
        raise ArgumentError(
            name,
            f"must be a tensor, a number or a string, which a file can hold without code, but it is "
            f"{arguments.described(value)}",
        )
    return value if is_plain and type(value) in _NESTED else parts
