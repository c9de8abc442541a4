r"""Estimates of a likelihood: the cost :math:`-\log p(x_0)` in nats per datum, and in the units that others print.

One convention holds for every estimate here: it is a cost in nats per datum, over all of its D dimensions; lower is
better. From it follow

.. math::
    \text{bits} = \frac{\text{nats}}{\log 2}, \qquad \text{bits/dim} = \frac{\text{bits}}{D}, \qquad
    K = -\text{bits},

and nothing else is added. :attr:`Likelihood.levels` tells whether :math:`p(x_0)` is a probability over levels, or a
density, whose value depends on the unit of the data; only estimates with the same levels can be compared.
"""

import dataclasses
import io
import json
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints, overload

import numpy as np
import torch
from torch import Tensor

from ..base import arguments
from ..base.arguments import ArgumentError
from ..base.files import write

__all__ = ["Likelihood", "rounded"]

Self = TypeVar("Self", bound="Likelihood")


def _standard_error(values: Tensor) -> Tensor:
    return values.std() / math.sqrt(len(values)) if len(values) > 1 else values.new_tensor(math.nan)


def _digits(error: float) -> int:
    """How many decimals to print, given a standard error: to its second digit; four if it is 0 or unknown."""
    return max(1 - math.floor(math.log10(error)), 0) if 1e-9 < error < math.inf else 4


def rounded(value: float, error: float) -> str:
    """A number beside its standard error, both to the error's second digit: "1.719 ± 0.011".

    Arguments:
        value, error: The two, in one unit.
    """
    digits = _digits(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


class _Summary:
    """An attribute that is a number, computed from the costs in nats, and can also be called with other values."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function

    @overload
    def __get__(self, likelihood: None, owner: type) -> Callable[[Tensor], Any]: ...

    @overload
    def __get__(self, likelihood: "Likelihood", owner: type) -> "_Number": ...

    def __get__(self, likelihood: "Likelihood | None", owner: type) -> "Callable[[Tensor], Any] | _Number":
        return self.function if likelihood is None else _Number(self.function, likelihood.nats)


class _Number(float):
    """A number computed from some values, which can also be called with others."""

    function: Callable[[Tensor], Any]

    def __new__(cls, function: Callable[[Tensor], Any], values: Tensor) -> "_Number":
        number = super().__new__(cls, float(function(values)))
        number.function = function
        return number

    def __call__(self, values: Tensor) -> Any:
        return self.function(values)

    def __reduce__(self) -> tuple:
        return float, (float(self),)


class Likelihood(ABC):
    """An estimate of -log p(x_0), or a bound on it, for each of B data. Printed, it is a table.

    Estimates of different data add up: ``a + b`` is that of the data of both, and ``sum`` adds many.

    Attributes:
        event_shape: The shape of one datum.
        levels: How many values each dimension of a datum may take (infinity for all integers), if p is a probability;
            None if it is a density.
    """

    event_shape: torch.Size
    levels: int | float | None
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # subclasses are dataclasses

    @property
    @abstractmethod
    def nats(self) -> Tensor:
        """The cost in nats per datum, with shape (B,)."""

    @abstractmethod
    def rows(self) -> dict[str, Tensor]:
        """The rows of the printed table, in nats, each with shape (B,), or () if it belongs to no datum."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the printed table is of."""

    @property
    def log_prob(self) -> Tensor:
        """log p(x_0) in nats, or a lower bound on it, with shape (B,)."""
        return -self.nats

    @property
    def bits(self) -> Tensor:
        """The cost in bits per datum, with shape (B,)."""
        return self.nats / math.log(2)

    @property
    def bits_per_dim(self) -> Tensor:
        """The cost in bits per dimension, with shape (B,). Each number of a datum is one: a colour pixel has three."""
        return self.bits / self.event_shape.numel()

    @property
    def bits_per_pixel(self) -> Tensor:
        """The cost in bits per pixel with all its channels, with shape (B,): pixels are the last two dimensions."""
        return self.bits / self.event_shape[-2:].numel()

    def bits_per_dim_in_bins(self, *, width: float) -> Tensor:
        r"""The cost in bits per dimension of data rounded to bins, from a density of the data with uniform noise added.

        .. math:: -\frac1D \log_2 P \le -\frac1D \log_2 p - \log_2 \Delta

        Arguments:
            width: The width :math:`\Delta` of a bin in the units of the data, :func:`bin_width` of the number of levels
                for data by :func:`from_levels`; 2/256 for 8-bit data as (k + u) / 128 - 1, the "+ 7" of other code.

        Returns:
            A tensor with shape (B,).

        Raises:
            ValueError: If ``width`` is not positive, or p is a probability, of levels, already.

        References:
            A note on the evaluation of generative models (Theis et al., 2016), section 3.1,
            https://arxiv.org/abs/1511.01844
        """
        width = arguments.number("width", width, 0, math.inf)
        if self.levels is not None:
            raise ArgumentError(
                "levels", f"must be None, as of a density, but p is already a probability of {self.levels}"
            )
        return self.bits_per_dim - math.log2(width)

    def rescaled(self: Self, log_scale: float) -> Self:
        r"""The same estimate, for the density of the data in other units.

        For :math:`y = s x + m`, number by number, the density is :math:`p(y) = p(x) / \prod_d s_d`.

        Arguments:
            log_scale: :math:`\sum_d \log s_d`, in nats.

        Raises:
            ValueError: If it is no finite number, or p is a probability, of levels, which has no unit.
        """
        log_scale = arguments.number("log_scale", log_scale, -math.inf, math.inf)
        if self.levels is not None:
            raise ArgumentError("levels", f"must be None, as of a density, but p is a probability of {self.levels}")
        return self.changed(**self._raised(log_scale))

    @abstractmethod
    def _raised(self, nats: float) -> dict[str, Tensor]:
        """The fields that change if the cost of each datum grows by this."""

    def held(self, name: str) -> Any:
        """The stored value of a field, which a class may present in another form.

        Arguments:
            name: The name of the field.
        """
        return vars(self)[name]

    def changed(self: Self, **fields: Any) -> Self:
        """The same estimate with other values of some fields.

        Arguments:
            **fields: The values, by the names of the arguments of the class.
        """
        return type(self)(**{**{field.name: self.held(field.name) for field in dataclasses.fields(self)}, **fields})

    mean = _Summary(lambda values: float(values.mean()))
    """The mean cost in nats, a number. Called with values of shape (B,), their mean."""

    standard_error = _Summary(_standard_error)
    """The standard error of :attr:`mean` over the data, a number; NaN where B = 1. Called with values of shape (B,),
    that of their mean, as a tensor with shape ()."""

    @property
    def convention(self) -> str:
        """What p is, in words."""
        if self.levels is None:
            return "p is a density, per unit of the data as given"
        count = f"{self.levels} levels" if math.isfinite(self.levels) else "countably many values"
        return f"p is a probability, of {count} a dimension"

    @property
    def summary(self) -> str:
        """The mean cost, rounded to its standard error, in the unit that people compare: "1.719 ± 0.011 bits/dim" of
        levels, "1.163 ± 0.031 nats" of a density or of bits."""
        in_bits = self.levels is not None and self.levels > 2
        values, unit = (self.bits_per_dim, "bits/dim") if in_bits else (self.nats, "nats")
        return f"{rounded(float(values.mean()), float(_standard_error(values)))} {unit}"

    def __str__(self) -> str:
        B, D = len(self.nats), self.event_shape.numel()
        rows = {**self.rows(), "per dimension": self.nats / D}
        lines = [
            f"{self.title}, mean of {B} data of {D} dimension{'s' * (D > 1)}",
            f"{'':24}{'nats':>11}{'± s.e.':>10}{'bits':>11}{'± s.e.':>10}",
        ]
        for name, values in rows.items():
            mean, error = float(values.mean()), float(_standard_error(values)) if values.dim() else math.nan
            lines.append(f"{name:24}{_cells(mean, error)}{_cells(mean / _BIT, error / _BIT)}".rstrip())
        return "\n".join([*lines, self.convention])

    def __repr__(self) -> str:
        costs = f"{self.mean:.6g} ± {self.standard_error:.2g} nats"
        return f"<{type(self).__name__}: {self.title}, mean of {len(self.nats)} data: {costs}>"

    def __add__(self: Self, other: Self) -> Self:
        return self.joined([self, other]) if type(other) is type(self) else NotImplemented

    def __radd__(self: Self, other: int) -> Self:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # where sum starts

    @classmethod
    def joined(cls: type[Self], parts: list[Self]) -> Self:
        """The estimate of all the data of several estimates by one model.

        Arguments:
            parts: The estimates, of this class, at least one.

        Raises:
            ValueError: If they differ in the number of steps, draws or levels, or in shapes, and so cannot be of one
                model.
        """
        if len(parts) == 1:
            return parts[0]
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name, found = field.name, [part.held(field.name) for part in parts]
            if isinstance(found[0], Tensor) and found[0].dim() > 0:
                shapes = [tuple(value.shape[:-1]) for value in found]  # the data are the last dimension
                values[name], found = torch.cat(found, -1) if len(set(shapes)) == 1 else None, shapes
            else:
                values[name] = found[0]
            for value in found:
                if value != found[0]:
                    raise ArgumentError(
                        "estimates", f"must be of one model to add up, but {name} is {found[0]} and {value}"
                    )
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, a compressed .npz of its numbers, whole or not at all.

        Arguments:
            path: The file; one that is there is replaced.

        Raises:
            OSError: If it cannot be written; an earlier file is then unchanged.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path must lie in a folder that is there, but {path.parent} is not one")
        arrays: dict[str, Any] = {}
        rest: dict[str, Any] = {"class": type(self).__name__}
        for field in dataclasses.fields(self):
            value = self.held(field.name)
            if isinstance(value, Tensor):
                arrays[field.name] = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
            else:
                rest[field.name] = list(value) if isinstance(value, torch.Size) else value
        data = io.BytesIO()
        np.savez_compressed(data, **arrays, rest=np.array(json.dumps(rest)))
        write(path, data.getbuffer())

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike) -> Self:
        """What :meth:`save` wrote, on the CPU; nothing in the file is executed.

        Arguments:
            path: The file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not one that :meth:`save` of this class wrote, or is cut short.
        """
        stream = io.BytesIO(Path(path).read_bytes())
        try:
            content = _unpacked(stream)
            rest = json.loads(str(content.pop("rest")))
            kind = rest.pop("class")
            if kind == cls.__name__:
                tensors = {name: torch.from_numpy(array) for name, array in content.items()}
                return cls._of_file({**tensors, **rest, "event_shape": torch.Size(rest["event_shape"])})
        except Exception as error:  # a damaged file may raise anything
            reason = f": {error}" if isinstance(error, _Unfit) else ""
            raise ArgumentError(
                "path", f"must be a whole file that {cls.__name__}.save wrote, but {path} is not{reason}"
            ) from error
        raise ArgumentError("path", f"must be a file that {cls.__name__}.save wrote, but {path} holds a {kind}")

    @classmethod
    def _of_file(cls: type[Self], fields: dict[str, Any]) -> Self:
        """The estimate with these fields; their values are not trusted, and checked."""
        hints = get_type_hints(cls)
        for name, value in fields.items():
            if name in hints and not _is_a(value, hints[name]):
                raise _Unfit(f"{name} is of another type, {type(value).__name__}")
        it = cls(**fields)
        if it.nats.dim() != 1 or len(it.nats) == 0 or min(it.event_shape, default=1) < 1:
            raise _Unfit("its shapes do not fit together")
        str(it)  # its numbers fit together
        return it


_BIT = math.log(2)  # in nats


def _cells(mean: float, error: float) -> str:
    """A mean and its error in their columns, to the second digit of the error, five decimals at most."""
    digits, text = min(_digits(error), 5), ""
    for value, width in ((mean, 5), (error, 4)):
        whole, point, decimals = f"{value:.{digits}f}".partition(".")
        text += f"{whole:>{width}}{point or ' '}{decimals:5}"
    return text


class _Unfit(ValueError):
    """What is wrong with a file, in words."""


_FREE, _RATIO = 2**26, 512  # bytes a file may always unpack to, and beyond that its largest compression ratio


def _unpacked(stream: io.BytesIO) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, whose sizes are compared with the file's before anything is unpacked."""
    size = stream.getbuffer().nbytes
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        claimed = sum(entry.file_size for entry in entries)  # zipfile unpacks no more than these
        if claimed > max(_FREE, _RATIO * size):
            raise _Unfit(f"it says that it holds {claimed} bytes, in {size}")
        for entry in entries:
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise _Unfit(f"{entry.filename} is of another version of NumPy's format, {version}")
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            needed = math.prod(shape) * dtype.itemsize
            if dtype.kind not in ("U" if entry.filename == "rest.npy" else "fiu") or needed > entry.file_size:
                raise _Unfit(f"{entry.filename} says that it has shape {shape} and dtype {dtype}")
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value has the type of a field."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_a(part, parts[0]) for part in value)
    if parts:
        return any(_is_a(value, part) for part in parts)
    if hint is float:
        return type(value) in (int, float)  # as JSON has them: no bool, and no tensor
    return type(value) is int if hint is int else isinstance(value, hint)
