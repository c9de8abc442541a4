"""Floats that stand on an even grid, k/255 or quarters or prices: the density of such data has no bound.

They are whole numbers in disguise: refused as numbers, with a hint what to give instead, or read as levels or bits if
asked for.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..base.arguments import ArgumentError

__all__ = ["refuse_grid", "stands_evenly"]


def refuse_grid(some: Tensor, blocks: Callable[[], Iterator[Tensor]], is_whole: bool) -> None:
    """Refuse floats on an even grid: all of them, one column of a table, or one channel of pictures.

    Arguments:
        some: The first data, as given.
        blocks: Called for all data, block by block, in float64.
        is_whole: Whether all numbers are whole.

    Raises:
        ArgumentError: If so, with a hint what to give instead.
    """
    low, high = (torch.full(some.shape[1:], end).double() for end in (math.inf, -math.inf))
    for x in blocks():
        low, high = low.minimum(x.amin(0)), high.maximum(x.amax(0))
    rounding = float(_spacing(torch.maximum(high, -low).max(), torch.finfo(some.dtype).eps))
    is_whole = is_whole and rounding < 0.5 and float(high.max() - low.min()) <= 2**20
    apart = low.dim() in (1, 3) and 1 < len(low) <= 256
    for place in (..., *range(len(low) * apart)):
        least, most = float(low[place].min()), float(high[place].max())
        steps = _even_steps(some[:, place].double().flatten(), least, most)
        if is_whole and steps != 1:
            steps = round(most - least)
        if steps and all(stands_evenly(x[:, place], least, (most - least) / steps, steps, 0.25) for x in blocks()):
            what, way = "these do", _way(least, most, steps)
            if place is not ...:
                what, way = f"number {place} of each datum does, counted from 0,", "data without it"
            raise ArgumentError(
                "read_as",
                f"must be given for floats that stand evenly, as {what} from {least:g} to {most:g} in steps of "
                f"{(most - least) / steps:g}, as the density of such data has no bound: give {way}, or --read-as "
                "numbers if they are rounded numbers",
            )


def stands_evenly(x: Tensor, start: float, step: float, top: int, off: float) -> bool:
    """Whether numbers are start + k step for k in 0..top, up to a fraction of a step.

    Arguments:
        x: The numbers, float64.
        start, step, top: The grid.
        off: The fraction.
    """
    k = (x - start) / step
    return bool(((k - k.round().clamp(0, top)).abs() <= off).all())


def _way(least: float, most: float, steps: int) -> str:
    """The option to give for floats that encode something else."""
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
    """The number of steps of an even grid from the least to the greatest number that contains all of x.

    None if there is no such grid of up to about a million steps, or if rounded real numbers might lie on it by chance,
    in more than one of about 10 ** 5 data sets. The probability that one float lies on the grid is the ratio of the
    grid's points to the floats in the range; distinct numbers are taken as independent.

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
        is_new = inside & (place.diff(prepend=place[:1] - 1) > 0)  # numbers at the same grid point are not independent
        if -chances[is_new].log().sum() > 12 + 2 * math.log(steps):
            return steps
        if len(x) >= 20 and counts.min() > 1 and chances.max() < 0.5:
            return steps
    return None


def _spacing(x: Tensor, precision: float) -> Tensor:
    """The distance to the next float, for a dtype with this precision."""
    return precision * x.abs().log2().floor().exp2()


def _steps(x: Tensor, error: float, span: float) -> int | None:
    """The fewest even steps from 0 to 1 that contain all numbers up to an error; decimal steps are tried further."""
    most = min(2**20, int(1 / (4 * error)))
    decimals = [round(span * 10**n) for n in range(7)]
    beyond = torch.tensor([n for n in decimals if 2**16 < n <= most], dtype=torch.float64)
    candidates = torch.cat((torch.arange(1, min(most, 2**16) + 1, dtype=torch.float64), beyond))
    for number in x[:: len(x) // 8 + 1]:  # a few numbers leave few candidates
        candidates = candidates[_off(number * candidates) <= error * candidates]
    return next((int(n) for n in candidates if bool((_off(x * n) <= error * n).all())), None)


def _off(x: Tensor) -> Tensor:
    """The distance to the nearest whole number."""
    return (x - x.round()).abs()
