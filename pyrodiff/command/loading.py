"""Data of a command: read from wherever they are, divided, and told what they are.

Data are read as *numbers*, whose likelihood is a density, as *levels*, whole numbers whose likelihood is a probability,
or as *bits*. They are held once, as they are given, and looked at and encoded a block at a time.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import datasets, readers
from ..likelihood.estimate import Likelihood
from ..process.quantization import dequantize, quantize
from .settings import Settings

__all__ = ["Data", "Form", "Part", "read"]


@dataclass(frozen=True)
class Form:
    """What a model needs to know of its data.

    Arguments:
        read_as: "numbers", "levels" or "bits".
        event_shape: The shape of one datum.
        levels: The number of levels, of levels.
        shift, scale: The mean and the standard deviation that numbers are rid of, with the shape of a datum.
        rate: How many of all bits are 1.
        dtype: That of numbers as they are given.
        fingerprint: What tells these data from others.
        contents: The sizes of the three parts, and what of a folder was passed over, in words.
        classes: The number of labels, 0..classes - 1, where the data are read with theirs.
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
        """What :meth:`plain` returned."""
        return cls(**{**plain, "event_shape": torch.Size(plain["event_shape"])})

    def encoded(self, raw: Tensor) -> Tensor:
        """Data as the model has them."""
        if self.read_as == "numbers":
            return ((raw.double() - self.shift.to(raw.device)) / self.scale.to(raw.device)).float()
        return dequantize(raw, self.levels) if self.read_as == "levels" else raw.float()

    def decoded(self, x_0: Tensor) -> Tensor:
        """What the model draws, as data are given: numbers in their units, levels and bits as whole numbers."""
        if self.read_as == "numbers":
            x = x_0.double() * self.scale.to(x_0.device) + self.shift.to(x_0.device)
            return x if self.dtype == "float64" else x.float()
        if self.read_as == "levels":
            return quantize(x_0, self.levels).to(torch.uint8 if self.levels <= 256 else torch.int64)
        return x_0.to(torch.uint8)

    @property
    def is_picture(self) -> bool:
        """Whether a datum has the shape of a picture, (H, W) or (C, H, W)."""
        return len(self.event_shape) in (2, 3)

    @property
    def is_drawable(self) -> bool:
        """Whether there is a picture of such data."""
        return len(self.event_shape) < 3 or (len(self.event_shape) == 3 and self.event_shape[0] in (1, 3))

    @property
    def log_scale(self) -> float:
        """What -log p of a datum is greater by in the units that numbers are given in, in nats."""
        return 0.0 if self.scale is None else float(self.scale.log().sum())

    def in_units(self, estimate: Likelihood) -> Likelihood:
        """An estimate of the density of numbers in the units that they are given in; others as they are."""
        return estimate.rescaled(self.log_scale) if self.read_as == "numbers" else estimate

    def drawable(self, x_0: Tensor) -> Tensor:
        """What the model draws, as a picture shows it: points in their units, grey and colour in [0, 1].

        Sequences of numbers are left without their mean and scale, so that all of them show; the first 64 of any.
        """
        if len(self.event_shape) == 1 and self.event_shape != (2,):
            x_0 = x_0[:64]
        elif self.read_as == "numbers":
            return self.decoded(x_0)
        return (x_0 + 1) / 2 if self.read_as == "levels" else x_0


class Part:
    """A part of the data: rows of a tensor that is held once, or left in its file, whatever its parts.

    Arguments:
        whole: The tensor.
        rows: The numbers of its rows that are the part; all if not given.
        labels: The label of each row of the tensor, where the data are read with theirs.
    """

    def __init__(self, whole: Tensor, rows: Tensor | None = None, labels: Tensor | None = None) -> None:
        self.whole, self.labels = whole, labels
        self.rows = torch.arange(len(whole), device=whole.device) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Tensor | slice) -> Tensor:
        return self.whole[self.rows[i]]

    def blocks(self) -> Iterator[Tensor]:
        """All of it, in blocks of about 2 ** 19 numbers."""
        for rows in self.rows.split(max(1, 2**19 // self.whole[0].numel())):
            yield self.whole[rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Part":
        """A part with something else in the place of each block."""
        whole, start = None, 0
        for block in map(change, self.blocks()):
            whole = block.new_empty((len(self), *block.shape[1:])) if whole is None else whole
            whole[start : start + len(block)] = block
            start += len(block)
        return Part(whole, None, *self.context())

    def context(self, i: Tensor | slice = slice(None)) -> tuple[Tensor, ...]:
        """What the network is given beside these rows: their labels, or nothing."""
        return () if self.labels is None else (self.labels[self.rows[i].cpu()],)


class Data:
    """Data to learn from, in three parts.

    Arguments:
        form: What the data are.
        parts: The data as they are given: "train", "validation" and "test".
        settings: How they are made bits, and augmented.
        device: Where they are to be.
    """

    def __init__(self, form: Form, parts: dict[str, Part], settings: Settings, device: torch.device) -> None:
        self.form, self.device, self.binarize, self.levels = form, device, settings.binarize, settings.levels
        self.augment = settings.augment
        self._strokes = datasets.Strokes(parts["train"][:]) if settings.augment == "strokes" else None
        kept = {"dynamic": ("train",), "none": tuple(parts)}.get(self.binarize, ())
        self.parts = {
            name: part if name in kept else self._bits(part, seed) for seed, (name, part) in enumerate(parts.items())
        }
        if device.type != "cpu":
            self.parts["train"] = self.parts["train"].each(lambda raw: raw.to(device))

    def _bits(self, part: Part, seed: int) -> Part:
        """Data as they are evaluated: bits that are drawn are drawn once."""
        drawn = {"generator": torch.Generator(part.whole.device).manual_seed(seed)}
        how = {"threshold": self.levels // 2} if self.binarize == "threshold" else drawn
        return part.each(lambda raw: datasets.binarize(raw, self.levels, **how).to(torch.uint8))

    def draw(self, size: int) -> tuple[Tensor, ...]:
        """A batch, drawn with replacement: data as the model has them, with shape (size, *event_shape), and, where they
        are read with their labels, these, with shape (size,)."""
        i = torch.randint(len(self.parts["train"]), (size,), device=self.device)
        raw = self.parts["train"][i]
        if self._strokes is not None:
            raw = torch.cat([raw[: size // 3], self._strokes(i[size // 3 :].cpu()).to(self.device)])
        if self.binarize == "dynamic":
            raw = datasets.binarize(raw, self.levels)
        x_0 = self.form.encoded(raw)
        if self.augment == "flip":
            flipped = torch.rand(size, device=self.device) < 0.5
            x_0 = torch.where(flipped.reshape(-1, *(1,) * (x_0.dim() - 1)), x_0.flip(-1), x_0)
        return (x_0, *(y.to(self.device) for y in self.parts["train"].context(i)))

    def split(self, name: str, size: int | None = None) -> Tensor:
        """The first so many data of a split, as the model has them.

        Arguments:
            name: "train", "validation" or "test".
            size: How many at most; all if not given.
        """
        part = Part(self.parts[name].whole, self.parts[name].rows[:size])
        if name == "train" and self.binarize == "dynamic":
            part = self._bits(part, 0)
        return part.each(lambda raw: self.form.encoded(raw.to(self.device))).whole

    def labelled(self, name: str, size: int | None = None) -> tuple[Tensor, ...]:
        """What :meth:`split` gives, and the labels, where the data are read with theirs.

        Arguments:
            name, size: As of :meth:`split`.
        """
        return (self.split(name, size), *(y.to(self.device) for y in self.parts[name].context(slice(size))))

    def often(self) -> Tensor:
        """How often each number has each level, a little evened out, with shape (*event_shape, levels)."""
        number, levels = self.form.event_shape.numel(), self.form.levels
        counts, places = torch.zeros(number * levels, device=self.device), torch.arange(number, device=self.device)
        for raw in self.parts["train"].blocks():
            counts += torch.bincount((raw.flatten(1).long() + levels * places).flatten(), minlength=len(counts))
        counts = counts.reshape(*self.form.event_shape, levels)
        everywhere = counts.reshape(-1, levels).mean(0)
        return (counts + 8 * (everywhere + 1) / (everywhere + 1).sum()) / (len(self.parts["train"]) + 8)


def read(settings: Settings, labels: bool = False) -> tuple[Settings, Form, dict[str, Part]]:
    """The data as they are given, what they are, and the settings with nothing left open that says so.

    Floats that stand for levels or bits are given as these, as uint8 where there are up to 256.

    Arguments:
        settings: The settings.
        labels: Whether with their labels: the folders that pictures lie in, IDX files of labels, or ``y`` of an .npz
            file, beside ``x`` or what ``--array`` names.

    Raises:
        ValueError: If there are no such data or labels, or they cannot be what they are said to be.
    """
    if not settings.data:
        raise ValueError(f"data must be given: one of {', '.join(BUILT_IN)}, or a path")
    if settings.data in BUILT_IN and labels:
        raise ValueError(f"--labels must not be given for {settings.data}, which has none")
    if settings.data in BUILT_IN:
        parts, others = {name: Part(x) for name, x in BUILT_IN[settings.data]().items()}, []
    else:
        parts, others = _from_path(settings, labels)
    _refuse_shapes(parts)
    ranges = {name: _range(name, part) for name, part in parts.items()}
    settings = _completed_reading(settings, parts, ranges)
    parts = _whole(settings, parts, ranges)
    form = dataclasses.replace(_form(settings, parts["train"]), contents=_said(parts, others))
    if labels:
        form = dataclasses.replace(form, classes=1 + max(int(part.labels.max()) for part in parts.values()))
    return settings, dataclasses.replace(form, fingerprint=_fingerprint(parts)), parts


def _said(parts: dict[str, Part], others: list[str]) -> str:
    sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    names = ", ".join(others[:5]).encode("utf-8", "backslashreplace").decode() + ", ..." * (len(others) > 5)
    return f"{sizes}; {len(others)} passed over: {names}" if others else sizes


def _fingerprint(parts: dict[str, Part]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in parts.items():
        digest.update(f"{name} {part.whole.dtype} {(len(part), *part.whole.shape[1:])}".encode())
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


BUILT_IN: dict[str, Callable[[], dict[str, Tensor]]] = {
    "swiss-roll": _swiss_roll,
    "checkerboard": _checkerboard,
    "heartbeat": _heartbeat,
    "digits": _digits,
}


def _from_path(settings: Settings, labels: bool) -> tuple[dict[str, Part], list[str]]:
    """The three parts, and the names of what was passed over."""
    path, holdout = Path(settings.data), settings.holdout
    if not path.exists():
        raise ValueError(f"data must be one of {', '.join(BUILT_IN)}, or a path, but there is no {path}")
    try:
        if path.is_file():
            name = settings.array or ("x" if labels else None)
            y = _labels(datasets.array(path, "y")) if labels else None
            return _divided(datasets.array(path, name, mapped=True), holdout, y), []
        place, others = readers.idx_place(path)
        if place is not None:
            return _idx_parts(place, holdout, labels), others
        y = datasets.image_folder(path, "labels") if labels else None
        return _divided(datasets.image_folder(path), holdout, y), readers.picture_files(path)[1]
    except ValueError as error:
        name, must, rest = str(error).partition(" must ")
        name = {"name": "--array", "path": "data", "folder": "data"}.get(name, f"data: {name}")
        raise ValueError(f"{name}{must}{rest}") from error


def _labels(y: Tensor) -> Tensor:
    if y.is_floating_point() or y.dtype == torch.bool or y.dim() != 1 or bool((y < 0).any()):
        raise ValueError(
            f"labels must be whole numbers from 0 on with shape (N,), but y has dtype {y.dtype} and shape "
            f"{tuple(y.shape)}, and the least is {y.min().item()}"
        )
    return y.long()


def _idx_parts(folder: Path, holdout: float, labels: bool) -> dict[str, Part]:
    train, test = (datasets.idx_folder(folder, split) for split in ("train", "test"))
    y, y_test = (datasets.idx_folder(folder, split, "labels").long() if labels else None for split in ("train", "test"))
    if len(train) < 10:
        raise ValueError(f"there must be at least 10 pictures to learn from, but there are {len(train)}")
    rows = torch.arange(len(train)).split(len(train) - max(1, min(5000, int(holdout * len(train)))))
    return {"train": Part(train, rows[0], y), "validation": Part(train, rows[1], y), "test": Part(test, None, y_test)}


def _divided(raw: Tensor, holdout: float, labels: Tensor | None = None) -> dict[str, Part]:
    """Three parts of data that have none, always the same ones."""
    if labels is not None and len(labels) != len(raw):
        raise ValueError(f"labels must be as many as the data, {len(raw)}, but there are {len(labels)}")
    if len(raw) < 10:
        raise ValueError(
            f"there must be at least 10 data to learn from some and test on others, but there are {len(raw)}"
        )
    size = max(1, int(holdout * len(raw)))
    if len(raw) - 2 * size < 5:
        raise ValueError(f"--holdout must leave at least 5 of {len(raw)} data to learn from, but it is {holdout}")
    rows = torch.randperm(len(raw), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    raw = raw[:, None] if raw.dim() == 1 else raw
    sizes = {"train": rows[2 * size :], "validation": rows[:size], "test": rows[size : 2 * size]}
    return {name: Part(raw, rows, labels) for name, rows in sizes.items()}


def _refuse_shapes(parts: dict[str, Part]) -> None:
    shape = parts["train"].whole.shape[1:]
    for name, part in parts.items():
        if part.whole.shape[1:] != shape:
            raise ValueError(
                f"data must have one shape, but the {name} data have {tuple(part.whole.shape[1:])}, not {tuple(shape)}"
            )
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] > 4:
        raise ValueError(
            f"data must be pictures with their channels first, (C, H, W), but they have shape {tuple(shape)}: "
            "numpy.moveaxis(x, -1, 1) puts them there"
        )


class _Range(NamedTuple):
    """The least and the greatest of numbers, and whether all are whole."""

    least: float
    most: float
    is_whole: bool

    @classmethod
    def over(cls, ranges: Iterable["_Range"]) -> "_Range":
        """That of all."""
        least, most, whole = zip(*ranges, strict=True)
        return cls(min(least), max(most), all(whole))


def _range(name: str, part: Part) -> _Range:
    found = []
    for x in part.blocks():
        if x.is_floating_point() and not bool((x.abs() < 1e30).all()):
            raise ValueError(
                f"data must be finite and below 1e30, but the {name} data have NaN, infinite or greater numbers"
            )
        found.append((x.min().item(), x.max().item(), not x.is_floating_point() or bool((x == x.round()).all())))
    return _Range.over(found)


# What the data are


def _completed_reading(settings: Settings, parts: dict[str, Part], ranges: dict[str, _Range]) -> Settings:
    """What the data are, where that is left open."""
    dtype, digits = parts["train"].whole.dtype, settings.data == "digits"
    least, most, is_whole = _Range.over(ranges.values())
    known = not dtype.is_floating_point or digits or settings.levels is not None
    binary = is_whole and least >= 0 and most <= 1
    values: dict[str, Any] = {"binarize": settings.binarize or "none"}
    if values["binarize"] != "none":
        if not known or binary or settings.read_as not in (None, "bits"):
            raise ValueError(f"--binarize must be none where data are no levels, but it is {settings.binarize!r}")
        values["read_as"] = "bits"
    values.setdefault("read_as", settings.read_as or ("bits" if binary else "levels" if known else "numbers"))
    if values["read_as"] == "numbers" and settings.read_as is None and settings.data not in BUILT_IN:
        _refuse_grid(parts, is_whole)
    if values["read_as"] == "levels" or values["binarize"] != "none":
        levels = settings.levels or (17 if digits else 256 if dtype == torch.uint8 else None)
        if levels is None and least < 0 and not dtype.is_floating_point:
            raise ValueError(
                f"data must be whole numbers from 0 on to be levels, but the smallest is {least}: subtract it, and "
                f"give --levels {most - least + 1}; or, of two values, --read-as bits"
            )
        if levels is None:
            raise ValueError(f"--levels must be given for levels of dtype {dtype}, up to {most}")
        values["levels"] = levels
    _refuse_reading(settings, values, dtype)
    values["augment"] = settings.augment or ("strokes" if digits and values["read_as"] == "levels" else "none")
    return settings.but(**values)


def _refuse_reading(settings: Settings, values: dict[str, Any], dtype: torch.dtype) -> None:
    read_as, levels = values["read_as"], values.get("levels")
    if read_as == "numbers" and not dtype.is_floating_point:
        raise ValueError(
            f"--read-as must be levels or bits for whole numbers, here of dtype {dtype}, but it is 'numbers': a "
            "density of theirs has no bound"
        )
    if settings.levels is not None and levels is None:
        raise ValueError(f"--levels must not be given for {read_as}, but it is {settings.levels}")
    if levels is not None:
        most = 2 if dtype == torch.bool else None if dtype.is_floating_point else torch.iinfo(dtype).max + 1
        if most is not None and levels > most:
            raise ValueError(f"--levels must be at most {most}, all that {dtype} holds, but it is {levels}")
        dequantize(torch.zeros(1), levels)  # refuses more than float32 tells apart


def _whole(settings: Settings, parts: dict[str, Part], ranges: dict[str, _Range]) -> dict[str, Part]:
    """The data as whole numbers from 0 on where they are levels or bits: themselves, or made of what stands for these.

    Floats that stand for levels are k / (L - 1) in [0, 1], or 2 k / (L - 1) - 1 in [-1, 1]; bits are any two values.
    """
    least, most, is_whole = _Range.over(ranges.values())
    top = 1 if settings.levels is None else settings.levels - 1
    if settings.read_as == "numbers" or (is_whole and least >= 0 and most <= top):
        return parts
    if settings.levels is None:
        ways = [(least, most - least)]
    elif parts["train"].whole.is_floating_point() and -1 <= least and most <= 1:
        ways = [(0, 1 / top), (-1, 2 / top)]
    else:
        ways = []
    rounding = 2**-11 if top < 512 else 2**-23  # of float16, as far as that tells levels apart
    for start, step in ways:
        off = 0 if settings.levels is None else rounding / step
        if all(_stands_evenly(x, start, step, top, off) for x in _all(parts)):
            change = partial(_levels, start, step, torch.uint8 if top < 256 else torch.int32)
            return {name: part.each(change) for name, part in parts.items()}
    if settings.levels is None:
        raise ValueError("--read-as must be another than bits where data have more than two values: see --binarize")
    name = next((n for n, one in ranges.items() if one.least < 0 or one.most > top or not one.is_whole), "train")
    raise ValueError(
        f"--levels must cover the data, whole numbers in 0..{top}, or floats k / {top} or 2 k / {top} - 1, but the "
        f"{name} data reach from {ranges[name].least} to {ranges[name].most}" + ": subtract the least" * (least < 0)
    )


def _levels(start: float, step: float, dtype: torch.dtype, x: Tensor) -> Tensor:
    return ((x.double() - start) / step).round().to(dtype)


def _stands_evenly(x: Tensor, start: float, step: float, top: int, off: float) -> bool:
    """Whether numbers are start + k step, k = 0..top, give or take so many steps."""
    k = (x - start) / step
    return bool(((k - k.round().clamp(0, top)).abs() <= off).all())


def _all(parts: dict[str, Part]) -> Iterator[Tensor]:
    return (x.double() for part in parts.values() for x in part.blocks())


# Floats that stand evenly, whose density has no bound


def _refuse_grid(parts: dict[str, Part], is_whole: bool) -> None:
    """Refuse floats that stand evenly: all of them, one column of a table, or one channel of pictures."""
    raw = parts["train"].whole
    low, high = (torch.full(raw.shape[1:], end).double() for end in (math.inf, -math.inf))
    for x in _all(parts):
        low, high = low.minimum(x.amin(0)), high.maximum(x.amax(0))
    some = parts["train"][: max(1, 2**17 // low.numel())].double()
    rounding = float(_spacing(torch.maximum(high, -low).max(), torch.finfo(raw.dtype).eps))
    is_whole = is_whole and rounding < 0.5 and float(high.max() - low.min()) <= 2**20
    apart = low.dim() in (1, 3) and 1 < len(low) <= 256
    for place in (..., *range(len(low) * apart)):
        least, most = float(low[place].min()), float(high[place].max())
        steps = _even_steps(some[:, place].flatten(), least, most)
        if is_whole and steps != 1:
            steps = round(most - least)
        if steps and all(_stands_evenly(x[:, place], least, (most - least) / steps, steps, 0.25) for x in _all(parts)):
            what, way = "these do", _way(least, most, steps)
            if place is not ...:
                what, way = f"number {place} of each datum does, counted from 0,", "data without it"
            raise ValueError(
                f"--read-as must be given for floats that stand evenly, as {what} from {least:g} to {most:g} in steps "
                f"of {(most - least) / steps:g}, as the density of such data has no bound: give {way}, or --read-as "
                "numbers if they are rounded numbers"
            )


def _way(least: float, most: float, steps: int) -> str:
    """What to write for floats that stand for something else."""
    step = (most - least) / steps
    if steps == 1:
        return "--read-as bits for two values"
    if abs(step - 1) + abs(least - round(least)) < 1e-6 and least >= 0:
        return f"--levels {round(most) + 1}"
    for start, end in ((0, 1), (-1, 1)):
        top, first = (end - start) / step, (least - start) / step
        if start <= least and most <= end and abs(top - round(top)) + abs(first - round(first)) < 1e-2:
            return f"--levels {round(top) + 1}"
    return "whole numbers from 0 on in their place"


def _even_steps(x: Tensor, least: float, most: float) -> int | None:
    """How many even steps lead from the least of all numbers to the greatest, over each of some, x.

    None if there are none, or if real numbers, which floats round, might stand so by chance: once in about 10 ** 5
    data sets. A real number is one of many multiples of what its float resolves; that it is one of few that are even
    steps apart has the ratio for a probability, and each distinct one is as unlikely again. More than a million steps
    are as good as none.

    Arguments:
        x: Some of the numbers, float64, of one dimension.
        least, most: The least and the greatest of all.
    """
    if least == most:
        return None
    values, counts = x.unique(return_counts=True)
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    resolved = next(torch.finfo(kind).eps for kind in kinds if bool((values.to(kind).double() == values).all()))
    span, inside = most - least, (values > least) & (values < most)
    largest = torch.tensor([least, most]).double().abs().max()
    for precision in sorted({torch.finfo(torch.float32).eps, resolved}):
        error = float(_spacing(largest, precision)) / span + 2**-50
        steps = _steps((values[inside] - least) / span, error, span)
        if steps is None:
            continue
        chances = (steps * (_spacing(values, resolved) / span).clamp(2 * error)).clamp(max=1)
        place = ((values - least) / span * steps).round()
        is_new = inside & (place.diff(prepend=place[:1] - 1) > 0)  # near the one before, it would be no surprise
        if -chances[is_new].log().sum() > 12 + 2 * math.log(steps):
            return steps
        if len(x) >= 20 and counts.min() > 1 and chances.max() < 0.5:
            return steps
    return None


def _spacing(x: Tensor, precision: float) -> Tensor:
    """How far the next float is, of a kind that has this precision."""
    return precision * x.abs().log2().floor().exp2()


def _steps(x: Tensor, error: float, span: float) -> int | None:
    """The fewest even steps from 0 to 1 over numbers, to some error; hundredths and their like are tried further."""
    most = min(2**20, int(1 / (4 * error)))
    decimals = [round(span * 10**n) for n in range(7)]
    candidates = [*range(1, min(most, 2**16) + 1), *(n for n in decimals if 2**16 < n <= most)]
    few = x[:: len(x) // 8 + 1]
    for steps in torch.tensor(candidates, dtype=torch.float64).split(4096):
        off = (few * steps[:, None] - (few * steps[:, None]).round()).abs()
        for n in steps[(off <= error * steps[:, None]).all(1)]:
            if bool(((x * n - (x * n).round()).abs() <= error * n).all()):
                return int(n)
    return None


# Form


def _form(settings: Settings, train: Part) -> Form:
    shape = train.whole.shape[1:]
    if settings.read_as == "levels":
        return Form("levels", shape, settings.levels)
    if settings.read_as == "bits":
        total = sum(float(x.double().sum()) for x in train.blocks()) / (len(train) * shape.numel())
        rate = total / (1 if settings.binarize == "none" else settings.levels - 1)
        return Form("bits", shape, rate=min(max(rate, 0.01), 0.99))
    if settings.data in BUILT_IN:  # of known scale
        return Form("numbers", shape, shift=torch.zeros(shape).double(), scale=torch.ones(shape).double())
    first = train[:1].double()[0]  # deviations from a datum keep their digits, and are 0 where all are the same
    shift = first + sum((x.double() - first).sum(0) for x in train.blocks()) / len(train)
    scale = (sum((x.double() - shift).square().sum(0) for x in train.blocks()) / (len(train) - 1)).sqrt()
    if not bool((scale > 0).all()):
        place = tuple((scale <= 0).nonzero()[0].tolist())
        raise ValueError(f"data must vary in each dimension, but number {place} is the same in all: leave it out")
    dtype = "float64" if train.whole.dtype == torch.float64 else "float32"
    return Form("numbers", shape, shift=shift, scale=scale, dtype=dtype)
