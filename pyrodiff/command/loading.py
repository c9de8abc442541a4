"""Data of a command: read from wherever they are, divided, and told what they are.

Data are read as *numbers*, whose likelihood is a density, as *levels*, whole numbers whose likelihood is a probability,
or as *bits*.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .. import datasets
from ..likelihood.estimate import Likelihood
from ..process.quantization import dequantize, quantize
from .settings import Settings

__all__ = ["Data", "Form", "read"]


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
    """

    read_as: str
    event_shape: torch.Size
    levels: int | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    rate: float | None = None
    dtype: str = "float32"
    fingerprint: str = ""

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


class Data:
    """Data to learn from, in three parts.

    Arguments:
        form: What the data are.
        splits: The data as they are given: "train", "validation" and "test".
        settings: How they are made bits, and augmented.
        device: Where they are to be.
    """

    def __init__(self, form: Form, splits: dict[str, Tensor], settings: Settings, device: torch.device) -> None:
        self.form, self.device, self.binarize, self.levels = form, device, settings.binarize, settings.levels
        self.raw = splits["train"].to(device)
        self.held_out = {name: self._bits(splits[name], seed) for seed, name in enumerate(("validation", "test"), 1)}
        self.augment = settings.augment
        self._strokes = datasets.Strokes(splits["train"]) if settings.augment == "strokes" else None
        if self.binarize in ("threshold", "static"):
            self.raw = self._bits(splits["train"], 0).to(device)

    def _bits(self, raw: Tensor, seed: int) -> Tensor:
        """Data as they are evaluated: bits that are drawn are drawn once."""
        if self.binarize == "threshold":
            return datasets.binarize(raw, self.levels, threshold=self.levels // 2)
        if self.binarize in ("static", "dynamic"):
            return datasets.binarize(raw, self.levels, generator=seed)
        return raw

    def draw(self, size: int) -> Tensor:
        """So many data for a step, drawn with replacement, as the model has them, with shape (size, *event_shape)."""
        i = torch.randint(len(self.raw), (size,), device=self.device)
        raw = self.raw[i]
        if self._strokes is not None:
            raw = torch.cat([raw[: size // 3], self._strokes(i[size // 3 :].cpu()).to(self.device)])
        if self.binarize == "dynamic":
            raw = datasets.binarize(raw, self.levels)
        x_0 = self.form.encoded(raw)
        if self.augment == "flip":
            flipped = torch.rand(size, device=self.device) < 0.5
            x_0 = torch.where(flipped.reshape(-1, *(1,) * (x_0.dim() - 1)), x_0.flip(-1), x_0)
        return x_0

    def split(self, name: str, size: int | None = None) -> Tensor:
        """The first so many data of a split, as the model has them.

        Arguments:
            name: "train", "validation" or "test".
            size: How many at most; all if not given.
        """
        raw = self.raw if name == "train" else self.held_out[name]
        x_0 = raw[:size].to(self.device)
        return self.form.encoded(self._bits(x_0, 0) if name == "train" and self.binarize == "dynamic" else x_0)

    def often(self) -> Tensor:
        """How often each number has each level, a little evened out, with shape (*event_shape, levels)."""
        counts = torch.zeros(*self.form.event_shape, self.form.levels, device=self.device)
        for part in self.raw.split(1000):
            counts += one_hot(part.long(), self.form.levels).sum(0)
        everywhere = counts.reshape(-1, self.form.levels).mean(0)
        return (counts + 8 * (everywhere + 1) / (everywhere + 1).sum()) / (len(self.raw) + 8)


def read(settings: Settings) -> tuple[Settings, Form, dict[str, Tensor]]:
    """The data as they are given, what they are, and the settings with nothing left open that says so.

    Arguments:
        settings: The settings.

    Raises:
        ValueError: If there are no such data, or they cannot be what they are said to be.
    """
    if not settings.data:
        raise ValueError(f"data must be given: one of {', '.join(BUILT_IN)}, or a path")
    splits = BUILT_IN[settings.data]() if settings.data in BUILT_IN else _from_path(settings)
    _refuse_numbers(splits)
    settings = _completed_reading(settings, splits)
    form = _form(settings, splits)
    return settings, dataclasses.replace(form, fingerprint=_fingerprint(splits)), splits


def _fingerprint(splits: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in splits.items():
        digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.contiguous().numpy().data)
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


def _from_path(settings: Settings) -> dict[str, Tensor]:
    path = Path(settings.data)
    if not path.exists():
        raise ValueError(f"data must be one of {', '.join(BUILT_IN)}, or a path, but there is no {path}")
    try:
        if path.is_file():
            return _divided(datasets.array(path, settings.array), settings.holdout)
        if _holds_idx(path):
            train = datasets.idx_folder(path)
            datasets.idx_folder(path, "test")
            if len(train) < 10:
                raise ValueError(f"there must be at least 10 pictures to learn from, but there are {len(train)}")
            size = max(1, min(5000, int(settings.holdout * len(train))))
            return {"train": train[:-size], "validation": train[-size:], "test": datasets.idx_folder(path, "test")}
        return _divided(datasets.image_folder(path), settings.holdout)
    except ValueError as error:
        name, must, rest = str(error).partition(" must ")
        name = {"name": "--array", "path": "data", "folder": "data"}.get(name, f"data: {name}")
        raise ValueError(f"{name}{must}{rest}") from error


def _holds_idx(folder: Path) -> bool:
    return any("ubyte" in entry.name for entry in folder.iterdir())


def _divided(raw: Tensor, holdout: float) -> dict[str, Tensor]:
    """Three parts of data that have none, always the same ones."""
    if len(raw) < 10:
        raise ValueError(
            f"there must be at least 10 data to learn from some and test on others, but there are {len(raw)}"
        )
    size = max(1, int(holdout * len(raw)))
    if len(raw) - 2 * size < 5:
        raise ValueError(f"--holdout must leave at least 5 of {len(raw)} data to learn from, but it is {holdout}")
    raw = raw[torch.randperm(len(raw), generator=torch.Generator("cpu").manual_seed(0), device="cpu")]
    return {"train": raw[2 * size :], "validation": raw[:size], "test": raw[size : 2 * size]}


def _refuse_numbers(splits: dict[str, Tensor]) -> None:
    for name, part in splits.items():
        if part.is_floating_point() and not bool((part.abs() < 1e30).all()):
            raise ValueError(
                f"data must be finite and below 1e30, but the {name} data have NaN, infinite or greater numbers"
            )


def _completed_reading(settings: Settings, splits: dict[str, Tensor]) -> Settings:
    """What the data are, where that is left open."""
    raw = splits["train"]
    whole = not raw.is_floating_point() or settings.data == "digits"
    binary = all(bool(((part == 0) | (part == 1)).all()) for part in splits.values())
    values: dict[str, Any] = {"binarize": settings.binarize or "none"}
    if values["binarize"] != "none":
        if not whole or binary or settings.read_as not in (None, "bits"):
            raise ValueError(f"--binarize must be none where data are no levels, but it is {settings.binarize!r}")
        values["read_as"] = "bits"
    if (
        not whole
        and not binary
        and settings.read_as is settings.levels is None
        and all(map(_is_whole, splits.values()))
    ):
        raise ValueError(
            "--read-as must be given for floats that are whole numbers: levels, with --levels, as their density has no "
            "bound; or numbers, if they only happen to be"
        )
    known_levels = whole or settings.levels is not None
    values.setdefault("read_as", settings.read_as or ("bits" if binary else "levels" if known_levels else "numbers"))
    if values["read_as"] == "levels" or values["binarize"] != "none":
        known = 17 if settings.data == "digits" else 256 if raw.dtype == torch.uint8 else None
        if (settings.levels or known) is None:
            raise ValueError(f"--levels must be given for whole numbers of dtype {raw.dtype}, up to {raw.max().item()}")
        values["levels"] = settings.levels or known
    _refuse_reading(settings, values, splits, whole, binary)
    strokes = settings.data == "digits" and values["read_as"] == "levels"
    values["augment"] = settings.augment or ("strokes" if strokes else "none")
    return settings.but(**values)


def _is_whole(raw: Tensor) -> bool:
    return bool((raw == raw.round()).all())


def _refuse_reading(
    settings: Settings, values: dict[str, Any], splits: dict[str, Tensor], whole: bool, binary: bool
) -> None:
    raw, read_as = splits["train"], values["read_as"]
    if read_as == "numbers" and whole:
        raise ValueError(
            f"--read-as must be levels or bits for whole numbers, here of dtype {raw.dtype}, but it is 'numbers': a "
            "density of theirs has no bound"
        )
    if read_as == "bits" and values["binarize"] == "none" and not binary:
        raise ValueError(
            "--read-as must be another than bits where data have other values than 0 and 1: see --binarize"
        )
    if settings.levels is not None and "levels" not in values:
        raise ValueError(f"--levels must not be given for {read_as}, but it is {settings.levels}")
    levels = values.get("levels")
    if levels is not None:
        most = 2 if raw.dtype == torch.bool else None if raw.is_floating_point() else torch.iinfo(raw.dtype).max + 1
        if most is not None and levels > most:
            raise ValueError(f"--levels must be at most {most}, all that {raw.dtype} holds, but it is {levels}")
        dequantize(torch.zeros(1), levels)  # refuses more than float32 tells apart
        for name, part in splits.items():
            part = part.double()
            if bool((part < 0).any()) or bool((part > levels - 1).any()) or bool((part != part.round()).any()):
                raise ValueError(
                    f"--levels must cover the data, whole numbers in 0..{levels - 1}, but the {name} data reach from "
                    f"{part.min().item()} to {part.max().item()}"
                )


def _form(settings: Settings, splits: dict[str, Tensor]) -> Form:
    raw = splits["train"]
    for name, part in splits.items():
        if part.dim() == 1:
            splits[name] = part[:, None]
        if part.shape[1:] != raw.shape[1:]:
            shapes = f"{tuple(part.shape[1:])}, not {tuple(raw.shape[1:])}"
            raise ValueError(f"data must have one shape, but the {name} data have {shapes}")
    raw = splits["train"]
    shape = raw.shape[1:]
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] > 4:
        raise ValueError(
            f"data must be pictures with their channels first, (C, H, W), but they have shape {tuple(shape)}: "
            "numpy.moveaxis(x, -1, 1) puts them there"
        )
    if settings.read_as == "levels":
        return Form("levels", shape, settings.levels)
    if settings.read_as == "bits":
        rate = float(raw.double().mean() / (1 if settings.binarize == "none" else settings.levels - 1))
        return Form("bits", shape, rate=min(max(rate, 0.01), 0.99))
    if settings.data in BUILT_IN:  # of known scale
        return Form("numbers", shape, shift=torch.zeros(shape).double(), scale=torch.ones(shape).double())
    scale = raw.double().std(0)
    if not bool((scale > 0).all()):
        place = tuple((scale <= 0).nonzero()[0].tolist())
        raise ValueError(f"data must vary in each dimension, but number {place} is the same in all: leave it out")
    dtype = "float64" if raw.dtype == torch.float64 else "float32"
    return Form("numbers", shape, shift=raw.double().mean(0), scale=scale, dtype=dtype)
