"""From settings to a model: what the command trains, and the values that suit each kind of data.

Numbers and levels diffuse by Gaussian noise, bits by flips.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import networks
from ..model.decoders import DiscretizedDecoder
from ..model.denoisers import (
    DataPrediction,
    Denoiser,
    LevelPrediction,
    LogitPrediction,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
)
from ..model.reverse import BinomialReverse, GaussianReverse
from ..model.variances import ForwardVariance, PosteriorVariance
from ..pair.diffusion import Diffusion, OneStep
from ..pair.times import LossSecondMoment, LowDiscrepancyDrawing, SimpleWeighting, UniformDrawing
from ..process.forward import BinomialForward, GaussianForward
from ..process.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule, ReciprocalSchedule, Schedule
from .loading import BUILT_IN, Data, Form, read
from .settings import Settings, option

__all__ = ["build", "pair", "prepare"]


def prepare(settings: Settings, device: torch.device) -> tuple[Settings, Data]:
    """The data, and the settings with nothing left open.

    Arguments:
        settings: The settings.
        device: Where the data are to be.

    Raises:
        ValueError: If there are no such data, or an option does not go with them.
    """
    settings, form, parts = read(settings, settings.labels)
    settings = _completed(settings, form)
    for name, is_wrong, wanted in _wrong(settings, form):
        if is_wrong:
            raise ValueError(f"{option(name)} must be {wanted}, but it is {getattr(settings, name)!r}")
    return settings, Data(form, parts, settings, device)


# What suits the data

_SUITS_NUMBERS = {
    **{"num_steps": 1000, "schedule": "cosine", "prediction": "velocity", "variance": "forward"},
    **{"lr": 1e-3, "weight_decay": 0.0},
}
_SUITS_LEVELS = {
    **{"num_steps": 1000, "schedule": "log-snr", "variance": "posterior", "lr": 1e-3, "weight_decay": 0.05},
}
_SUITS_BITS = {"num_steps": 1000, "schedule": "reciprocal", "prediction": "logit", "lr": 1e-3, "weight_decay": 0.05}
_SUITS = {
    ("swiss-roll", "numbers"): {
        **{"num_steps": 40, "schedule": "log-snr", "log_snr_first": 7.5, "log_snr_last": -6.0},
        **{"hidden": 128, "lr": 2e-3, "steps": 3000, "average": 0.99},
    },
    ("checkerboard", "numbers"): {"hidden": 256, "steps": 10000, "batch_size": 512},
    ("heartbeat", "bits"): {"num_steps": 2000, "hidden": 128, "lr": 2e-3, "steps": 3000, "average": 0.99},
    ("digits", "levels"): {
        **{"log_snr_first": 9.0, "dropout": 0.3, "lr": 3e-3, "weight_decay": 0.2, "batch_size": 128, "steps": 2200},
        **{"drawing": "loss-second-moment"},
    },
    ("digits", "bits"): {
        **{"num_steps": 300, "dropout": 0.3, "lr": 2e-3, "weight_decay": 0.1, "batch_size": 128, "steps": 3000},
    },
}


def _completed(settings: Settings, form: Form) -> Settings:
    """The settings, each that is left open with the value that suits the data."""
    suits = {"numbers": _SUITS_NUMBERS, "levels": _SUITS_LEVELS, "bits": _SUITS_BITS}[form.read_as]
    suits = {**_common(form, settings.network), **suits, **_SUITS.get((settings.data, form.read_as), {})}
    chosen = {**suits, **settings.given()}
    if chosen["schedule"] == "log-snr":
        finest = 2 * math.log(4 * (form.levels - 1)) if form.read_as == "levels" else 9.0
        suits = {"log_snr_first": round(finest, 1), "log_snr_last": -9.0, **suits}
    else:
        suits = {name: value for name, value in suits.items() if not name.startswith("log_snr")}
    if chosen["network"] == "mlp":
        suits = {**suits, "hidden": suits["hidden"] or 128, "blocks": 3}
        suits = {name: value for name, value in suits.items() if name not in ("channels", "attention")}
    elif form.is_picture:
        suits = {**suits, "attention": _attention(form, chosen["channels"])}
    steps = chosen["steps"]
    suits = {"evaluate_every": max(1, steps // 10), "checkpoint_every": max(1, min(500, steps // 10)), **suits}
    return settings.but(**{name: value for name, value in suits.items() if getattr(settings, name) is None})


def _common(form: Form, network: str | None) -> dict[str, Any]:
    """What suits the shape of data, and a network that is asked for; for small pictures of few channels, a U-Net."""
    common = {"steps": 5000, "batch_size": 256, "average": 0.998, "drawing": "low-discrepancy", "hidden": 256}
    common["samples"] = 2000 if form.event_shape == (2,) else 64
    halvings = next(n for n in (2, 1, 0) if not any(size % 2**n for size in form.event_shape[-2:]))
    if network is None:
        is_usual = form.is_picture and halvings > 0 and form.event_shape[:-2].numel() <= 4
        network = "unet" if is_usual else "mlp"
    if network == "mlp":
        return {**common, "prediction": "velocity", "network": "mlp", "dropout": 0.0}
    depth = min(halvings, 1 if max(form.event_shape[-2:]) < 16 else 2)
    unet = {"network": "unet", "channels": (32, 64, 128)[: depth + 1], "blocks": 1, "dropout": 0.1, "batch_size": 128}
    return {**common, **unet, "prediction": "level" if (form.levels or 256) <= 32 else "velocity"}


def _attention(form: Form, channels: tuple[int, ...]) -> tuple[int, ...]:
    """The heights of at most 8 that large pictures are halved to; 0 where there is none."""
    high = form.event_shape[-2]
    return tuple(high >> n for n in range(1, len(channels)) if high >= 16 and high >> n <= 8) or (0,)


def _wrong(settings: Settings, form: Form) -> Iterator[tuple[str, bool, str]]:
    """Each option that may not go with the others: whether it does not, and what it would have to be."""
    numbers, bits = form.read_as == "numbers", form.read_as == "bits"
    unet, log_snr = settings.network == "unet", settings.schedule == "log-snr"
    predictions = ("logit",) if bits else ("noise", "data", "velocity", "score")
    if form.read_as == "levels" and unet:
        predictions = ("level", *predictions)
    yield "prediction", settings.prediction not in predictions, f"one of {', '.join(predictions)} for {form.read_as}"
    yield "network", unet and not form.is_picture, f"mlp for data of shape {tuple(form.event_shape)}"
    for name in ("channels", "attention"):
        yield name, not unet and getattr(settings, name) is not None, f"left out with --network {settings.network}"
    if unet:
        high, wide = form.event_shape[-2:]
        most = next(n for n in range(20, -1, -1) if high % 2**n == wide % 2**n == 0) + 1
        yield "channels", len(settings.channels) > most, f"at most {most}, as {high} x {wide} is halved between them"
    yield "schedule", not bits and settings.schedule == "reciprocal", "another but for bits, as it leaves no signal"
    first, last = settings.log_snr_first, settings.log_snr_last
    for name, value in (("log_snr_first", first), ("log_snr_last", last)):
        yield name, not log_snr and value is not None, f"left out with --schedule {settings.schedule}"
    yield "log_snr_last", log_snr and last >= first, f"below --log-snr-first {first}"
    yield "variance", bits and settings.variance is not None, "left out for bits"
    yield "weighting", not numbers and settings.weighting == "simple", "bound but for numbers"
    strokes = settings.data == "digits" and form.read_as == "levels"
    yield "augment", settings.augment == "strokes" and not strokes, "none or flip but for the levels of digits"
    yield "augment", settings.augment == "flip" and not form.is_picture, "none but for pictures"
    yield "final_times", (settings.final_times or 0) >= settings.num_steps, f"below --num-steps {settings.num_steps}"
    built_in = settings.data in BUILT_IN
    yield "array", settings.array is not None and built_in, "left out for a built-in data set"


# The model


_PREDICTIONS: dict[str, type[Denoiser]] = {
    "noise": NoisePrediction,
    "data": DataPrediction,
    "velocity": VelocityPrediction,
    "score": ScorePrediction,
}


def build(settings: Settings, form: Form, often: Tensor | None = None) -> Diffusion:
    """The model.

    Arguments:
        settings: The settings, none left open.
        form: What the data are.
        often: How often each number has each level, where the network says that; evenly if not given.
    """
    process: GaussianForward | BinomialForward
    if form.read_as == "bits":
        process = BinomialForward(_schedule(settings), form.rate)
        denoiser = LogitPrediction(_network(settings, form, None), process)
        return Diffusion(process, BinomialReverse(process, denoiser), form.event_shape)
    process = GaussianForward(_schedule(settings))
    if settings.prediction == "level":
        often = torch.full((*form.event_shape, form.levels), 1 / form.levels) if often is None else often
        network = networks.Offset(_network(settings, form, form.levels), often.log().cpu())
        denoiser = LevelPrediction(network, process, form.levels)
    else:
        denoiser = _PREDICTIONS[settings.prediction](_network(settings, form, None), process)
    variance = {"posterior": PosteriorVariance, "forward": ForwardVariance}[settings.variance]()
    reverse = GaussianReverse(process, denoiser, variance)
    if form.read_as == "levels":
        return Diffusion(process, reverse, form.event_shape, DiscretizedDecoder(form.levels))
    return Diffusion(process, reverse, form.event_shape)


def _schedule(settings: Settings) -> Schedule:
    if settings.schedule == "log-snr":
        return LogSNRSchedule(settings.num_steps, settings.log_snr_first, settings.log_snr_last)
    kinds = {"linear": LinearSchedule, "cosine": CosineSchedule, "reciprocal": ReciprocalSchedule}
    return kinds[settings.schedule](settings.num_steps)


def _network(settings: Settings, form: Form, outputs: int | None) -> nn.Module:
    if settings.network == "unet":
        attention = () if settings.attention == (0,) else settings.attention
        sizes = (settings.channels, settings.hidden, settings.blocks, settings.dropout)
        return networks.UNet(form.event_shape, *sizes, outputs, attention=attention, classes=form.classes)
    frequency = 3.0 if form.event_shape.numel() <= 20 else 0.0  # sines overfit where there are many dimensions
    sizes = (settings.hidden, settings.blocks, settings.dropout, frequency)
    return networks.MLP(form.event_shape, *sizes, classes=form.classes)


def pair(settings: Settings, diffusion: Diffusion) -> OneStep:
    """The pair of programs that is trained.

    Arguments:
        settings: The settings, none left open.
        diffusion: The model.
    """
    drawings = {"uniform": UniformDrawing, "low-discrepancy": LowDiscrepancyDrawing}
    if settings.drawing == "loss-second-moment":
        drawing = LossSecondMoment(diffusion.num_steps)
    else:
        drawing = drawings[settings.drawing]()
    weighting = SimpleWeighting(diffusion.reverse) if settings.weighting == "simple" else None
    return diffusion.one_step(drawing, weighting)
