"""Data of a run: found wherever they are, divided in three parts, looked at, and encoded batch by batch.

They are kept once, as given, and examined and encoded in blocks. They are read as *numbers*, whose likelihood is a
density, as *levels*, whole numbers whose likelihood is a probability, or as *bits*; :mod:`~pyrodiff.command.plans`
decides which.
"""

import dataclasses
import hashlib
import math
import mmap
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import datasets, readers
from ..base.arguments import ArgumentError
from ..likelihood.estimate import Likelihood
from ..process.quantization import from_levels, to_levels
from ..streaming import ArrayFile, PictureFolder, Stream
from .grids import stands_evenly
from .options import BUILT_IN, Reading

__all__ = ["Data", "Form", "Found", "Part", "Range", "Scale", "find"]

Estimate = TypeVar("Estimate", bound=Likelihood)


@dataclass(frozen=True)
class Form:
    """What a model needs to know of its data.

    Arguments:
        read_as: "numbers", "levels" or "bits".
        event_shape: The shape of one datum.
        levels: The number of levels, if the data are levels.
        shift, scale: The mean and the standard deviation that numbers are standardised by, with the shape of a datum.
        rate: The fraction of bits that are 1.
        dtype: The dtype of numbers as given.
        fingerprint: A hash of the data.
        contents: The sizes of the three parts, and which files of a folder were ignored, in words.
        classes: The number of labels, 0..classes - 1, if the data are read with labels.
    """

    read_as: str
    event_shape: torch.Size
    levels: int | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    rate: float | None = None
    dtype: str = "float32"
    fingerprint: str = ""
    contents: str = ""
    classes: int | None = None

    def plain(self) -> dict[str, Any]:
        """As tensors, numbers and strings; ``Form.of`` is the way back."""
        return {**vars(self), "event_shape": list(self.event_shape)}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Form":
        """The form from what :meth:`plain` returned."""
        return cls(**{**plain, "event_shape": torch.Size(plain["event_shape"])})

    def encoded(self, raw: Tensor) -> Tensor:
        """Encode data for the model."""
        if self.shift is not None and self.scale is not None:
            return ((raw.double() - self.shift.to(raw.device)) / self.scale.to(raw.device)).float()
        return raw.float() if self.levels is None else from_levels(raw, self.levels)

    def decoded(self, x_0: Tensor) -> Tensor:
        """Decode draws of the model to the form of the data: numbers in their units, levels and bits as whole
        numbers."""
        if self.shift is not None and self.scale is not None:
            x = x_0.double() * self.scale.to(x_0.device) + self.shift.to(x_0.device)
            return x if self.dtype == "float64" else x.float()
        if self.levels is not None:
            return to_levels(x_0, self.levels).to(torch.uint8 if self.levels <= 256 else torch.int64)
        return x_0.to(torch.uint8)

    @property
    def is_picture(self) -> bool:
        """Whether a datum has the shape of a picture, (H, W) or (C, H, W)."""
        return len(self.event_shape) in (2, 3)

    @property
    def is_drawable(self) -> bool:
        """Whether such data can be drawn as a picture."""
        return len(self.event_shape) < 3 or (len(self.event_shape) == 3 and self.event_shape[0] in (1, 3))

    @property
    def log_scale(self) -> float:
        """Log Jacobian of the standardisation, in nats per datum; add it to a cost to have that in the data's units."""
        return 0.0 if self.scale is None else float(self.scale.log().sum())

    def in_units(self, estimate: Estimate) -> Estimate:
        """An estimate for numbers, converted to the data's units; estimates for levels and bits are unchanged."""
        return estimate.rescaled(self.log_scale) if self.read_as == "numbers" else estimate

    def per_unit(self, nats: float) -> float:
        """Nats per datum in the displayed unit: bits per dimension for levels, else nats per datum."""
        return nats if self.unit == "nats" else nats / (math.log(2) * self.event_shape.numel())

    @property
    def outcomes(self) -> int | None:
        """How many values a number can have, if p is a probability; None if it is a density."""
        return 2 if self.read_as == "bits" else self.levels

    @property
    def unit(self) -> str:
        """The displayed unit: "bits/dim" for levels, "nats" per datum otherwise."""
        return "bits/dim" if self.read_as == "levels" else "nats"

    def drawable(self, x_0: Tensor) -> Tensor:
        """Draws of the model, prepared for plots: points in their units, grey and colour in [0, 1].

        Sequences of numbers stay standardised, so that all dimensions show; at most 64 sequences.
        """
        if len(self.event_shape) == 1 and self.event_shape != (2,):
            x_0 = x_0[:64]
        elif self.read_as == "numbers":
            return self.decoded(x_0)
        return (x_0 + 1) / 2 if self.read_as == "levels" else x_0


class Rows:
    """A data set whose rows are read on demand, with the interface of a tensor that is indexed by rows.

    Arguments:
        dataset: A data set of tensors of one shape.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset: Any = dataset
        first = self.dataset[0]
        self.dtype, self.device, self.shape = first.dtype, torch.device("cpu"), torch.Size((len(self), *first.shape))
        self.shape = self.shape if first.dim() else torch.Size((len(self), 1))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Tensor) -> Tensor:
        indices = rows.tolist()
        together = getattr(self.dataset, "__getitems__", lambda indices: [self.dataset[i] for i in indices])
        try:
            return torch.stack(list(together(indices))).reshape(len(indices), *self.shape[1:])
        except ArgumentError as error:  # about a file, while the user gave the option data
            raise ArgumentError("data", error.said) from error


class Mapped:
    """An .npy file that is mapped, and has to stay as long as it is: to look behind its end would end the process.

    Arguments:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self.map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def refuse_if_shorter(self) -> None:
        """Raise :class:`~pyrodiff.ArgumentError` if it has become shorter."""
        if self.map.size() < len(self.map):  # that of the file now, and as it was
            raise ArgumentError("data", f"must be whole while they are read, but {self.path} has become shorter")


class Part(Dataset):
    """A part of the data: rows of a tensor that all parts share, in memory or in its file.

    For torch's loader it is a data set of tuples of a datum and, if there are labels, its label.

    Arguments:
        whole: The tensor, or a :class:`Rows`.
        rows: The indices of the part's rows; all if not given.
        labels: The label of each row of the tensor, if the data are read with labels.
        change: A function applied to rows when they are read; none if not given.
        file: The file that the tensor is mapped from; None if it is in memory.
    """

    def __init__(
        self,
        whole: Tensor | Rows,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        file: Mapped | None = None,
    ) -> None:
        self.whole, self.labels, self.change, self.file = whole, labels, change, file
        self.rows = torch.arange(len(whole), device=whole.device) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Tensor | slice) -> Tensor:
        if self.file is not None:
            self.file.refuse_if_shorter()
        raw = self.whole[self.rows[i]]
        return raw if self.change is None else self.change(raw)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        i = torch.tensor(indices, device="cpu")
        return list(zip(self[i], *self.context(i), strict=True))

    def blocks(self) -> Iterator[Tensor]:
        """The part in blocks of about 2 ** 19 numbers."""
        size = max(1, 2**19 // self.whole.shape[1:].numel())
        for start in range(0, len(self), size):
            yield self[slice(start, start + size)]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """A part with a function applied to its rows: now, or when they are read if the data are on demand."""
        if isinstance(self.whole, Rows):
            both = change if self.change is None else partial(_after, self.change, change)  # workers pickle it
            return Part(self.whole, self.rows, self.labels, both)
        changed = map(change, self.blocks())
        first = next(changed)
        whole, start = first.new_empty((len(self), *first.shape[1:])), 0
        for block in (first, *changed):
            whole[start : start + len(block)] = block
            start += len(block)
        return Part(whole, None, next(iter(self.context()), None))

    def context(self, i: Tensor | slice = slice(None)) -> tuple[Tensor, ...]:
        """The context of these rows: their labels, or nothing."""
        return () if self.labels is None else (self.labels[self.rows[i].cpu()],)


class Range(NamedTuple):
    """The smallest and the largest of numbers, and whether all are whole."""

    least: float
    most: float
    is_whole: bool


class Scale(NamedTuple):
    """A grid of numbers that encode whole ones: start + k * step encodes k."""

    start: float
    step: float


class Found:
    """Data as given, before it is decided how to read them.

    Arguments:
        name: The name of a built-in data set, or their path.
        parts: The data in three parts: "train", "validation" and "test".
        passed_over: The names of files of a folder that were ignored.

    Attributes:
        dtype, event_shape: Those of the data.
        ranges: The range of each part.

    Raises:
        ArgumentError: If the parts have different shapes, or there are numbers that are not finite.
    """

    def __init__(self, name: str, parts: dict[str, Part], passed_over: Sequence[str] = ()) -> None:
        self.name, self.parts, self.passed_over = name, parts, list(passed_over)
        self.dtype, self.event_shape = parts["train"].whole.dtype, parts["train"].whole.shape[1:]
        _refuse_shapes(parts)
        self.ranges = {part: _range(part, parts[part]) for part in parts}

    @property
    def is_built_in(self) -> bool:
        """Whether the data come with the package."""
        return self.name in BUILT_IN

    @property
    def range(self) -> Range:
        """The range of all parts together."""
        least, most, whole = zip(*self.ranges.values(), strict=True)
        return Range(min(least), max(most), all(whole))

    @property
    def contents(self) -> str:
        """The sizes of the three parts, and the ignored files, in words."""
        sizes, others = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items()), self.passed_over
        names = ", ".join(others[:5]).encode("utf-8", "backslashreplace").decode() + ", ..." * (len(others) > 5)
        return f"{sizes}; {len(others)} passed over: {names}" if others else sizes

    def blocks(self) -> Iterator[Tensor]:
        """All data, block by block, in float64."""
        return (x.double() for part in self.parts.values() for x in part.blocks())

    def scale(self, levels: int | None) -> Scale | None:
        """The grid by which the data encode levels, or bits; None if they do not.

        Floats encode levels as k / (L - 1) in [0, 1], or 2 k / (L - 1) - 1 in [-1, 1]; any two values encode bits.

        Arguments:
            levels: The number L of levels; None for bits.
        """
        least, most, is_whole = self.range
        top = 1 if levels is None else levels - 1
        if is_whole and least >= 0 and most <= top:
            return Scale(0, 1)
        ways = []
        if levels is None:
            ways = [Scale(least, most - least)]
        elif self.dtype.is_floating_point and -1 <= least and most <= 1:
            ways = [Scale(0, 1 / top), Scale(-1, 2 / top)]
        rounding = 2**-11 if top < 512 else 2**-23  # float16's, up to the levels that it can tell apart
        for way in ways:
            off = 0 if levels is None else rounding / way.step
            if all(stands_evenly(x, *way, top, off) for x in self.blocks()):
                return way
        return None


class Data:
    """Data for training, in three parts, read as decided.

    Arguments:
        reading: How they are read, as :func:`~pyrodiff.command.plans.resolve` decided.
        found: The data.
        device: The device to compute on.
    """

    def __init__(self, reading: Reading, found: Found, device: torch.device) -> None:
        parts = found.parts
        if reading.read_as != "numbers" and (scale := found.scale(reading.levels)) not in (None, Scale(0, 1)):
            as_levels = partial(_on_grid, scale, torch.uint8 if (reading.levels or 2) <= 256 else torch.int32)
            parts = {name: part.each(as_levels) for name, part in parts.items()}
        classes = max((1 + int(y.max()) for part in parts.values() for y in part.context()), default=None)
        self.form = dataclasses.replace(
            _form(reading, parts["train"]), contents=found.contents, fingerprint=_fingerprint(parts), classes=classes
        )
        self.device, self.binarize, self.levels = device, reading.binarize, reading.levels or 2
        self.augment = reading.augment
        self._strokes = datasets.Strokes(parts["train"][:]) if reading.augment == "strokes" else None
        kept = {"dynamic": ("train",), "none": tuple(parts)}.get(self.binarize, ())
        self.parts = {
            name: part if name in kept else self._bits(part, seed) for seed, (name, part) in enumerate(parts.items())
        }
        self.is_streamed = reading.stream
        if device.type != "cpu" and not self.is_streamed:
            self.parts["train"] = self.parts["train"].each(lambda raw: raw.to(device))

    def _bits(self, part: Part, seed: int) -> Part:
        """A part as it is evaluated: with bits that are drawn once."""
        if self.binarize == "threshold":
            return part.each(partial(_at_threshold, self.levels))
        drawn = torch.Generator(part.whole.device).manual_seed(seed)
        return part.each(lambda raw: datasets.binarize(raw, self.levels, generator=drawn).to(torch.uint8))

    def draw(self, size: int) -> tuple[Tensor, ...]:
        """A batch, drawn with replacement: encoded data with shape (size, *event_shape) and, if there are labels,
        these, with shape (size,)."""
        i = torch.randint(len(self.parts["train"]), (size,), device=self.device)
        raw = self.parts["train"][i]
        if self._strokes is not None:
            raw = torch.cat([raw[: size // 3], self._strokes(i[size // 3 :].cpu()).to(self.device)])
        if self.binarize == "dynamic":
            raw = datasets.binarize(raw, self.levels)
        x_0 = self._flipped(self.form.encoded(raw.to(self.device)))
        return (x_0, *(y.to(self.device) for y in self.parts["train"].context(i)))

    def _flipped(self, x_0: Tensor) -> Tensor:
        """Mirror a random half of the pictures left to right, if ``augment`` is "flip"."""
        if self.augment != "flip":
            return x_0
        flipped = torch.rand(len(x_0), device=self.device) < 0.5
        return torch.where(flipped.reshape(-1, *(1,) * (x_0.dim() - 1)), x_0.flip(-1), x_0)

    def drawn(self, size: int, start: int, seed: int, workers: int) -> Generator[tuple[Tensor, ...], None, None]:
        """An infinite iterator of batches: by :meth:`draw` or, if streamed, by their numbers.

        Arguments:
            size: The number of data in a batch.
            start: How many batches were drawn before.
            seed, workers: Of :class:`~pyrodiff.streaming.Stream`.
        """
        if not self.is_streamed:
            while True:
                yield self.draw(size)
        stream = Stream(self.parts["train"], size, seed=seed, num_workers=workers)
        batches = stream.batches(start=start)
        while True:
            try:
                raw, *labels = next(batches)
                x_0 = self._flipped(self.form.encoded(raw.to(self.device)))
            except ArgumentError as error:  # they have changed meanwhile
                raise ArgumentError("data", error.said) from error
            yield (x_0, *(y.to(self.device) for y in labels))

    def split(self, name: str, size: int | None = None) -> Tensor:
        """The first ``size`` data of a part, encoded.

        Arguments:
            name: "train", "validation" or "test".
            size: How many at most; all if not given.
        """
        return torch.cat([x_0 for x_0, *_ in self.batches(name, size)])

    def batches(self, name: str, size: int | None = None) -> "Batches":
        """The first ``size`` data of a part in batches of 64, encoded, with their labels if there are any.

        Arguments:
            name, size: As of :meth:`split`.
        """
        return Batches(self.raw(name, size), self.form, self.device)

    def raw(self, name: str, size: int | None = None) -> Part:
        """The first ``size`` data of a part, as given; dynamic bits are drawn once.

        Arguments:
            name, size: As of :meth:`split`.
        """
        part = self.parts[name]
        part = Part(part.whole, part.rows[:size], part.labels, part.change, part.file)
        return self._bits(part, 0) if name == "train" and self.binarize == "dynamic" else part

    def often(self) -> Tensor:
        """The smoothed frequency of each level at each number, with shape (*event_shape, levels)."""
        number, levels = self.form.event_shape.numel(), self.levels
        counts, places = torch.zeros(number * levels, device=self.device), torch.arange(number, device=self.device)
        for raw in self.parts["train"].blocks():
            counts += torch.bincount((raw.flatten(1).long() + levels * places).flatten(), minlength=len(counts))
        counts = counts.reshape(*self.form.event_shape, levels)
        everywhere = counts.reshape(-1, levels).mean(0)
        return (counts + 8 * (everywhere + 1) / (everywhere + 1).sum()) / (len(self.parts["train"]) + 8)


class Batches:
    """A part of the data in batches, each encoded when it is needed."""

    def __init__(self, part: Part, form: Form, device: torch.device, size: int = 64) -> None:
        self.part, self.form, self.device, self.size = part, form, device, size

    def __len__(self) -> int:
        return -(-len(self.part) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, len(self.part), self.size):
            rows = slice(start, start + self.size)
            try:
                x_0 = self.form.encoded(self.part[rows].to(self.device))
            except ArgumentError as error:  # they have changed meanwhile
                raise ArgumentError("data", error.said) from error
            yield (x_0, *(y.to(self.device) for y in self.part.context(rows)))


def find(reading: Reading) -> Found:
    """The data as given, with their labels if asked for.

    Labels are the folders that pictures lie in, IDX files of labels, or ``y`` of an .npz file, beside ``x`` or what
    ``array`` names.

    Arguments:
        reading: Which data; how to read them is decided later.

    Raises:
        ArgumentError: If there are no such data or labels.
    """
    if not reading.data:
        raise ArgumentError("data", f"must be given: one of {', '.join(BUILT_IN)}, or a path")
    if reading.data in BUILT_IN and reading.labels:
        raise ArgumentError("labels", f"must not be given for {reading.data}, which has none")
    if reading.data in BUILT_IN:
        return Found(reading.data, {name: Part(x) for name, x in _BUILDERS[reading.data]().items()})
    return _from_path(reading)


def _fingerprint(parts: dict[str, Part]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in parts.items():
        digest.update(f"{name} {part[:1].dtype} {(len(part), *part.whole.shape[1:])}".encode())
        for block in part.blocks():
            digest.update(block.contiguous().numpy().data)
        for labels in part.context():
            digest.update(labels.numpy().data)
    return digest.hexdigest()


def _swiss_roll() -> dict[str, Tensor]:
    sizes = {"train": (20000, 1), "validation": (2000, 3), "test": (5000, 2)}
    return {name: datasets.swiss_roll(size, seed) for name, (size, seed) in sizes.items()}


def _checkerboard() -> dict[str, Tensor]:
    sizes = {"train": (1_000_000, 1), "validation": (2000, 3), "test": (10000, 2)}
    return {name: datasets.checkerboard(size, seed) for name, (size, seed) in sizes.items()}


def _heartbeat() -> dict[str, Tensor]:
    sizes = {"train": (5000, 1), "validation": (500, 3), "test": (500, 2)}
    return {name: datasets.heartbeat(size, seed) for name, (size, seed) in sizes.items()}


def _digits() -> dict[str, Tensor]:
    return {name: datasets.digits(name) for name in ("train", "validation", "test")}


_BUILDERS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "swiss-roll": _swiss_roll,
    "checkerboard": _checkerboard,
    "heartbeat": _heartbeat,
    "digits": _digits,
}


def _from_path(reading: Reading) -> Found:
    path, name, labels = Path(reading.data), reading.data, reading.labels
    if not path.exists():
        raise ArgumentError("data", f"must be one of {', '.join(BUILT_IN)}, or a path, but there is no {path}")
    try:
        if reading.stream:
            return _streamed(reading, path)
        if path.is_file():
            y = _labels(datasets.array(path, "y")) if labels else None
            x = datasets.array(path, reading.array or ("x" if labels else None), mapped=True)
            return Found(name, _divided(x, reading.holdout, y, Mapped(path) if readers.is_npy(path) else None))
        place, others = readers.idx_place(path)
        if place is not None:
            return Found(name, _idx_parts(place, reading.holdout, labels), others)
        y = datasets.image_folder(path, "labels") if labels else None
        return Found(name, _divided(datasets.image_folder(path), reading.holdout, y), readers.picture_files(path)[1])
    except ArgumentError as error:
        called = {"name": "array", "path": "data", "folder": "data"}
        raise ArgumentError(called.get(error.argument, error.argument), error.said) from error


def _streamed(reading: Reading, path: Path) -> Found:
    """Data that are read on demand."""
    if path.is_file() and path.suffix == ".npy" and not reading.labels:
        return Found(reading.data, _divided(Rows(ArrayFile(path)), reading.holdout))
    if path.is_file() or readers.idx_place(path)[0] is not None:
        labelled = " without --labels" * reading.labels
        raise ArgumentError("stream", f"must be left out but for an .npy file or a folder of pictures{labelled}")
    pictures = PictureFolder(path)
    y = datasets.image_folder(path, "labels") if reading.labels else None
    return Found(reading.data, _divided(Rows(pictures), reading.holdout, y), pictures.passed_over)


def _labels(y: Tensor) -> Tensor:
    if y.is_floating_point() or y.dtype == torch.bool or y.dim() != 1 or bool((y < 0).any()):
        raise ArgumentError(
            "labels",
            f"must be whole numbers from 0 on with shape (N,), but y has dtype {y.dtype} and shape "
            f"{tuple(y.shape)}, and the least is {y.min().item()}",
        )
    if int(y.max()) >= 2**16:  # as network and memory have something for each
        raise ArgumentError("labels", f"must be numbered from 0 on, below {2**16}, but the greatest is {int(y.max())}")
    return y.long()


def _idx_parts(folder: Path, holdout: float, labels: bool) -> dict[str, Part]:
    train, test = (datasets.idx_folder(folder, split) for split in ("train", "test"))
    y, y_test = (datasets.idx_folder(folder, split, "labels").long() if labels else None for split in ("train", "test"))
    if len(train) < 10:
        raise ArgumentError("data", f"must be at least 10 pictures to learn from, but there are {len(train)}")
    rows = torch.arange(len(train)).split(len(train) - max(1, min(5000, int(holdout * len(train)))))
    return {"train": Part(train, rows[0], y), "validation": Part(train, rows[1], y), "test": Part(test, None, y_test)}


def _divided(
    raw: Tensor | Rows, holdout: float, labels: Tensor | None = None, file: Mapped | None = None
) -> dict[str, Part]:
    """A fixed split of data into three parts."""
    if labels is not None and len(labels) != len(raw):
        raise ArgumentError("labels", f"must be as many as the data, {len(raw)}, but there are {len(labels)}")
    if len(raw) < 10:
        raise ArgumentError(
            "data", f"must be at least 10, to learn from some and test on others, but there are {len(raw)}"
        )
    size = max(1, int(holdout * len(raw)))
    if len(raw) - 2 * size < 5:
        raise ArgumentError("holdout", f"must leave at least 5 of {len(raw)} data to learn from, but it is {holdout}")
    rows = torch.randperm(len(raw), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    raw = raw[:, None] if isinstance(raw, Tensor) and raw.dim() == 1 else raw
    sizes = {"train": rows[2 * size :], "validation": rows[:size], "test": rows[size : 2 * size]}
    return {name: Part(raw, rows, labels, file=file) for name, rows in sizes.items()}


def _refuse_shapes(parts: dict[str, Part]) -> None:
    shape = parts["train"].whole.shape[1:]
    for name, part in parts.items():
        if part.whole.shape[1:] != shape:
            raise ArgumentError(
                "data",
                f"must have one shape, but the {name} data have {tuple(part.whole.shape[1:])}, not {tuple(shape)}",
            )
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] > 4:
        raise ArgumentError(
            "data",
            f"must be pictures with their channels first, (C, H, W), but they have shape {tuple(shape)}: "
            "numpy.moveaxis(x, -1, 1) puts them there",
        )


def _range(name: str, part: Part) -> Range:
    found = []
    for x in part.blocks():
        if x.is_floating_point() and not bool((x.abs() < 1e30).all()):
            raise ArgumentError(
                "data",
                f"must be finite and below 1e30, but the {name} data have NaN, infinite or greater numbers",
            )
        found.append((x.min().item(), x.max().item(), not x.is_floating_point() or bool((x == x.round()).all())))
    least, most, whole = zip(*found, strict=True)
    return Range(min(least), max(most), all(whole))


def _after(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
    return second(first(raw))


def _at_threshold(levels: int, raw: Tensor) -> Tensor:
    return datasets.binarize(raw, levels, levels // 2).to(torch.uint8)


def _on_grid(scale: Scale, dtype: torch.dtype, x: Tensor) -> Tensor:
    return ((x.double() - scale.start) / scale.step).round().to(dtype)


def _form(reading: Reading, train: Part) -> Form:
    shape = train.whole.shape[1:]
    if reading.read_as == "levels":
        return Form("levels", shape, reading.levels)
    if reading.read_as == "bits":
        total = sum(float(x.double().sum()) for x in train.blocks()) / (len(train) * shape.numel())
        rate = total / (1 if reading.levels is None else reading.levels - 1)
        return Form("bits", shape, rate=min(max(rate, 0.01), 0.99))
    if reading.data in BUILT_IN:  # of known scale
        return Form("numbers", shape, shift=torch.zeros(shape).double(), scale=torch.ones(shape).double())
    first = train[:1].double()[0]  # deviations from one datum do not lose digits, and are 0 where all are equal
    shift = first + sum((x.double() - first).sum(0) for x in train.blocks()) / len(train)
    squares = torch.stack([(x.double() - shift).square().sum(0) for x in train.blocks()]).sum(0)
    scale = (squares / (len(train) - 1)).sqrt()
    constant = scale <= 1e-12 * shift.abs()  # up to rounding, as in yardsticks
    if bool(constant.any()):
        place = tuple(constant.nonzero()[0].tolist())
        raise ArgumentError("data", f"must vary in each dimension, but number {place} is the same in all: leave it out")
    dtype = "float64" if train.whole.dtype == torch.float64 else "float32"
    return Form("numbers", shape, shift=shift, scale=scale, dtype=dtype)
