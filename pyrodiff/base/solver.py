r"""A solver of ordinary differential equations that controls the error of each row by itself.

The pair of Dormand and Prince: six evaluations per step give a value of order 5 and its difference to one of order 4,
the error estimate. It sets the size of the next step; a step whose error is too large is taken again. Each row has its
own time and step, so what it gives does not depend on the rows beside it. Gradients are those of the steps that were
taken, with their sizes held fixed.

References:
    A family of embedded Runge-Kutta formulae (Dormand and Prince, 1980)

    Solving Ordinary Differential Equations I (Hairer, Norsett and Wanner, 1993), sections II.4 and II.5: the first step
    and those after it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Solution", "solve"]

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # of order 5, less that of 4

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]


class Solution(NamedTuple):
    """The solution of each row.

    Arguments:
        y: The values at the end, with shape (R, n).
        num_evaluations: How often the drift was evaluated, with shape (R,).
        failed: Which rows did not reach the end, with shape (R,).
    """

    y: Tensor
    num_evaluations: Tensor
    failed: Tensor


def solve(
    drift: Drift,
    y: Tensor,
    start: Tensor,
    end: Tensor,
    tolerance: float,
    max_steps: int,
    stops: Tensor | None = None,
) -> Solution:
    """Solve dy/dt = drift for each row.

    Arguments:
        drift: Called as ``drift(t, y, rows)``, with times of shape (r,), values of shape (r, n), and the numbers of
            these rows among all, with shape (r,); returns the derivative, with the shape of the values.
        y: The values at the start, in float64 with shape (R, n).
        start, end: The times, in float64 with shape (), the end before or after the start.
        tolerance: The error allowed per step, absolute and relative, in any component of a row.
        max_steps: The number of steps, rejected ones included, after which a row is given up.
        stops: Times, ascending, that no step crosses: across a kink of the drift the error estimate means nothing.

    Returns:
        The values at the end. A row that needs more steps, or whose values are not finite, has failed.
    """
    start, end = start.expand(len(y)), end.expand(len(y))
    direction, at, failed = torch.sign((end - start).detach()), start, torch.zeros_like(start, dtype=torch.bool)
    steps, rows = torch.zeros_like(start, dtype=torch.long), torch.arange(len(y), device=y.device)
    k, h = drift(at, y, rows), torch.zeros_like(start)
    with torch.no_grad():
        h = _first_step(drift, at, y, k, direction, tolerance, rows)
    while len(rows := (((end - at) * direction > 0) & ~failed).nonzero()[:, 0]):
        target = end[rows] if stops is None else _next(stops, at[rows], end[rows])
        left = target - at[rows]
        h_now = h[rows]
        is_last = h_now >= left.detach().abs()  # this step reaches the target, a stop or the end
        signed = torch.where(is_last, left, direction[rows] * h_now)
        y_now, k_last, error = _step(drift, at[rows], y[rows], k[rows], signed, rows)
        size = error / (tolerance * (1 + torch.maximum(y[rows].detach().abs(), y_now.detach().abs())))
        size = size.abs().amax(1).nan_to_num(nan=torch.inf)
        good = size <= 1
        factor = (0.9 * size**-0.2).clamp(0.2, 10.0)
        h = h.index_copy(0, rows, signed.detach().abs() * torch.where(good, factor, factor.clamp(max=1.0)))
        taken, now = rows[good], torch.where(is_last, target, at[rows] + signed)
        y, k = y.index_copy(0, taken, y_now[good]), k.index_copy(0, taken, k_last[good])
        stuck = ~good & (at[rows] + signed == at[rows])
        at = at.index_copy(0, taken, now[good])
        steps = steps.index_add(0, rows, torch.ones_like(rows))
        failed = failed | ((steps >= max_steps) & ((end - at) * direction > 0))
        failed = failed.index_fill(0, rows[stuck], True)
    return Solution(y, 2 + 6 * steps, failed | ~y.isfinite().all(1))  # two evaluations to choose the first step


def _next(stops: Tensor, at: Tensor, end: Tensor) -> Tensor:
    """The next stop of each row on its way to the end, or the end."""
    known, here, last = stops.detach(), at.detach(), end.detach()
    after = stops[torch.searchsorted(known, here, right=True).clamp(max=len(stops) - 1)]
    before = stops[(torch.searchsorted(known, here) - 1).clamp(min=0)]
    inside = torch.where(last > here, (after > here) & (after < last), (before < here) & (before > last))
    return torch.where(inside, torch.where(last > here, after, before), end)


def _step(drift: Drift, t: Tensor, y: Tensor, k: Tensor, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values after a step h, the drift there, and the error."""
    h, slopes = h[:, None], [k]
    for node, stage in zip(_NODES, _STAGES, strict=True):
        slopes.append(drift(t + node * h[:, 0], y + h * _weighted(stage, slopes), rows))
    after = y + h * _weighted(_FIFTH, slopes)
    slopes.append(drift(t + h[:, 0], after, rows))
    return after, slopes[-1], (h * _weighted(_ERROR, slopes)).detach()


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=False) if weight]
    return sum(terms[1:], terms[0])


def _first_step(
    drift: Drift, t: Tensor, y: Tensor, k: Tensor, direction: Tensor, tolerance: float, rows: Tensor
) -> Tensor:
    """The size of the first step: from the drift and its change, for an error of about the tolerance."""
    scale = tolerance * (1 + y.abs())
    of_y, of_k = (y / scale).abs().amax(1), (k / scale).abs().amax(1)
    guess = torch.where((of_y < 1e-5) | (of_k < 1e-5), 1e-6, 0.01 * of_y / of_k)
    probe = drift(t + direction * guess, y + (direction * guess)[:, None] * k, rows)
    change = ((probe - k) / scale).abs().amax(1) / guess
    largest = torch.maximum(of_k, change)
    step = torch.where(largest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** 0.2)
    return torch.minimum(100 * guess, step).nan_to_num(nan=1e-6)
