"""From the given options to a plan: the presets, every default, and every check that options go together.

A preset is a whole plan for one kind of data. :func:`resolve` takes the one for the data, and overrides it with the
given options. It depends on its arguments only: no file is read, nothing is drawn.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..base.arguments import ArgumentError
from ..process.quantization import from_levels
from .data import Data, Found, find
from .grids import refuse_grid
from .options import Plan

__all__ = ["prepare", "resolve"]

# Presets

NUMBERS = Plan.of({"T": 1000, "schedule": "cosine", "prediction": "velocity", "variance": "forward"})
LEVELS = NUMBERS.but(schedule="log-snr", variance="posterior", weight_decay=0.05)
BITS = NUMBERS.but(schedule="reciprocal", prediction="logit", variance=None, weight_decay=0.05)

U_NET: dict[str, Any] = {"network": "unet", "blocks": 1, "dropout": 0.1, "batch_size": 128}  # of any of the three

PRESETS = {  # by the data set, and how it is read
    ("swiss-roll", "numbers"): NUMBERS.but(
        **{"T": 40, "schedule": "log-snr", "log_snr_first": 7.5, "log_snr_last": -6.0, "hidden": 128},
        **{"train_steps": 3000, "lr": 2e-3, "average": 0.99},
    ),
    ("checkerboard", "numbers"): NUMBERS.but(train_steps=10000, batch_size=512),
    ("heartbeat", "bits"): BITS.but(T=2000, hidden=128, train_steps=3000, lr=2e-3, average=0.99),
    ("digits", "levels"): LEVELS.but(
        **{**U_NET, "log_snr_first": 9.0, "dropout": 0.3, "train_steps": 2200, "lr": 3e-3},
        **{"weight_decay": 0.2, "drawing": "loss-second-moment"},
    ),
    ("digits", "bits"): BITS.but(
        **{**U_NET, "T": 300, "dropout": 0.3, "train_steps": 3000, "lr": 2e-3, "weight_decay": 0.1}
    ),
}


def prepare(given: Mapping[str, Any], device: torch.device) -> tuple[Plan, Data]:
    """The plan and the data of a run.

    Arguments:
        given: Options by name, with allowed values.
        device: The device that the data are moved to for computing.

    Raises:
        ArgumentError: If there are no such data, or an option does not go with them.
    """
    found = find(Plan.of(given).reading)
    plan = resolve(given, found)
    return plan, Data(plan.reading, found, device)


def resolve(given: Mapping[str, Any], found: Found) -> Plan:
    """The plan for data: the given options, and for each other one a default that suits the data.

    Arguments:
        given: Options by name, with allowed values.
        found: The data.

    Raises:
        ArgumentError: If an option does not go with the data, or with another option.
    """
    reading = _reading(given, found)
    plan = PRESETS.get((found.name, reading["read_as"]))
    if plan is None:
        plan = {"numbers": NUMBERS, "levels": LEVELS, "bits": BITS}[reading["read_as"]]
    plan = _with_network(plan.but(**reading), given.get("network"), found.event_shape)
    plan = _with_ends(plan, given)
    steps = given.get("train_steps", plan.training.train_steps)
    plan = plan.but(
        samples=2000 if found.event_shape == (2,) else 64,
        evaluate_every=max(1, steps // 10),
        checkpoint_every=max(1, min(500, steps // 10)),
        log_every=max(1, min(50, steps // 40)),
    )
    plan = plan.but(**{name: value for name, value in given.items() if value is not None})
    if plan.model.network == "unet" and plan.model.channels and "attention" not in given and _is_picture(found):
        plan = plan.but(attention=_attention(found.event_shape[-2], len(plan.model.channels)))
    for name, is_wrong, wanted in _wrong(plan, found):
        if is_wrong:
            raise ArgumentError(name, f"must be {wanted}, but it is {plan.values().get(name)!r}")
    return plan


# The model


def _is_picture(found: Found) -> bool:
    return len(found.event_shape) in (2, 3)


def _halvings(shape: torch.Size, most: int) -> int:
    """How often the height and the width can be halved, at most ``most`` times."""
    return next(n for n in range(most, -1, -1) if not any(size % 2**n for size in shape[-2:]))


def _with_network(plan: Plan, network: str | None, shape: torch.Size) -> Plan:
    """The plan with the given network, or else the one that suits the shape: a U-Net for pictures of few channels."""
    halvings = _halvings(shape, 2)
    if network is None:
        is_usual = len(shape) in (2, 3) and halvings > 0 and shape[:-2].numel() <= 4
        network = "unet" if is_usual else "mlp"
    if network == "unet":
        if plan.model.network != "unet":
            plan = plan.but(**U_NET)
        if plan.reading.read_as == "levels":
            plan = plan.but(prediction="level" if (plan.reading.levels or 0) <= 32 else "velocity")
        depth = min(halvings, 1 if max(shape[-2:]) < 16 else 2)
        return plan.but(channels=(32, 64, 128)[: depth + 1])
    return plan.but(network="mlp", blocks=3)


def _with_ends(plan: Plan, given: Mapping[str, Any]) -> Plan:
    """The plan with the log SNR's ends if its schedule has them: at t = 1, noise far below the grid of levels."""
    if given.get("schedule", plan.model.schedule) != "log-snr":
        return plan.but(log_snr_first=None, log_snr_last=None)
    levels, first, last = plan.reading.levels, plan.model.log_snr_first, plan.model.log_snr_last
    finest = 9.0 if plan.reading.read_as != "levels" or levels is None else round(2 * math.log(4 * (levels - 1)), 1)
    return plan.but(log_snr_first=finest if first is None else first, log_snr_last=-9.0 if last is None else last)


def _attention(height: int, sizes: int) -> tuple[int, ...]:
    """The heights up to 8 among the U-Net's, for pictures of height 16 or more; (0,) if there are none."""
    return tuple(height >> n for n in range(1, sizes) if height >= 16 and height >> n <= 8) or (0,)


def _wrong(plan: Plan, found: Found) -> Iterator[tuple[str, bool, str]]:
    """The checks of options against each other and the data: the option, whether it is wrong, and what it must be."""
    read_as, model, training = plan.reading.read_as, plan.model, plan.training
    numbers, bits, unet = read_as == "numbers", read_as == "bits", model.network == "unet"
    predictions: tuple[str, ...] = ("logit",) if bits else ("noise", "data", "velocity", "score")
    if read_as == "levels" and unet:
        predictions = ("level", *predictions)
    yield "prediction", model.prediction not in predictions, f"one of {', '.join(predictions)} for {read_as}"
    yield "network", unet and not _is_picture(found), f"mlp for data of shape {tuple(found.event_shape)}"
    for name, value in (("channels", model.channels), ("attention", model.attention)):
        yield name, not unet and value is not None, f"left out with --network {model.network}"
    if unet:
        high, wide = found.event_shape[-2:]
        most = _halvings(found.event_shape, 20) + 1
        wanted = f"at most {most}, as {high} x {wide} is halved between them"
        yield "channels", len(model.channels or ()) > most, wanted
    yield "schedule", not bits and model.schedule == "reciprocal", "another but for bits, as it leaves no signal"
    first, last = model.log_snr_first, model.log_snr_last
    for name, end in (("log_snr_first", first), ("log_snr_last", last)):
        yield name, model.schedule != "log-snr" and end is not None, f"left out with --schedule {model.schedule}"
    yield "log_snr_last", first is not None and last is not None and last >= first, f"below --log-snr-first {first}"
    yield "variance", bits and model.variance is not None, "left out for bits"
    yield "weighting", not numbers and training.weighting == "simple", "bound but for numbers"
    strokes = found.name == "digits" and read_as == "levels"
    yield "augment", plan.reading.augment == "strokes" and not strokes, "none or flip but for the levels of digits"
    yield "augment", plan.reading.augment == "flip" and not _is_picture(found), "none but for pictures"
    yield "final_times", (plan.watching.final_times or 0) >= model.T, f"below --T {model.T}"
    drawn = plan.reading.binarize in ("static", "dynamic")
    yield "stream", plan.reading.stream and found.is_built_in, "left out for a built-in data set"
    yield (
        "binarize",
        plan.reading.stream and drawn,
        "none or threshold with --stream: bits that are drawn have to be held",
    )
    yield "workers", training.workers > 0 and not plan.reading.stream, "0 without --stream"
    yield "array", plan.reading.array is not None and found.is_built_in, "left out for a built-in data set"


# How the data are read


def _reading(given: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """The options of reading, with defaults for how numbers are read and for the number of levels."""
    dtype, range, digits = found.dtype, found.range, found.name == "digits"
    levels, binarize, asked = given.get("levels"), given.get("binarize", "none"), given.get("read_as")
    known = not dtype.is_floating_point or digits or levels is not None
    binary = range.is_whole and range.least >= 0 and range.most <= 1
    if binarize != "none" and (not known or binary or asked not in (None, "bits")):
        raise ArgumentError("binarize", f"must be none where data are no levels, but it is {binarize!r}")
    read_as = "bits" if binarize != "none" else asked or ("bits" if binary else "levels" if known else "numbers")
    if read_as == "numbers" and asked is None and not found.is_built_in:
        refuse_grid(found.parts["train"][: max(1, 2**17 // found.event_shape.numel())], found.blocks, range.is_whole)
    if read_as == "levels" or binarize != "none":
        levels = levels or (17 if digits else 256 if dtype == torch.uint8 else None)
        if levels is None and range.least < 0 and not dtype.is_floating_point:
            raise ArgumentError(
                "data",
                f"must be whole numbers from 0 on to be levels, but the smallest is {range.least}: subtract it, and "
                f"give --levels {range.most - range.least + 1}; or, of two values, --read-as bits",
            )
        if levels is None:
            raise ArgumentError("levels", f"must be given for levels of dtype {dtype}, up to {range.most}")
    elif levels is not None:
        raise ArgumentError("levels", f"must not be given for {read_as}, but it is {levels}")
    _refuse_reading(read_as, levels, found)
    augment = given.get("augment", "strokes" if digits and read_as == "levels" else "none")
    return {"read_as": read_as, "levels": levels, "binarize": binarize, "augment": augment}


def _refuse_reading(read_as: str, levels: int | None, found: Found) -> None:
    """Refuse a reading that the data do not allow."""
    dtype = found.dtype
    if read_as == "numbers":
        if not dtype.is_floating_point:
            raise ArgumentError(
                "read_as",
                f"must be levels or bits for whole numbers, here of dtype {dtype}, but it is 'numbers': a density of "
                "theirs has no bound",
            )
        return
    if levels is not None:
        most = 2 if dtype == torch.bool else None if dtype.is_floating_point else torch.iinfo(dtype).max + 1
        if most is not None and levels > most:
            raise ArgumentError("levels", f"must be at most {most}, all that {dtype} holds, but it is {levels}")
        from_levels(torch.zeros(1), levels)  # refuses more than float32 tells apart
    if found.scale(levels) is not None:
        return
    if levels is None:
        raise ArgumentError("read_as", "must be another than bits where data have more than two values: see --binarize")
    top = levels - 1
    wrong = (name for name, one in found.ranges.items() if one.least < 0 or one.most > top or not one.is_whole)
    name = next(wrong, "train")
    raise ArgumentError(
        "levels",
        f"must cover the data, whole numbers in 0..{top}, or floats k / {top} or 2 k / {top} - 1, but the {name} data "
        f"reach from {found.ranges[name].least} to {found.ranges[name].most}"
        + ": subtract the least"
        * (found.range.least < 0),
    )
