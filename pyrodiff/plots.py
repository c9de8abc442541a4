r"""Pictures of a diffusion: what goes in, what comes out, and where the bound is spent.

Each function draws on matplotlib axes or makes a figure, and returns it; none shows or saves anything.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from . import checks
from .accounting import VarianceAccount
from .bounds import Bound
from .diffusion import Diffusion

__all__ = ["bits", "diffusion_process", "terms", "variances"]

_DATA, _MODEL = "#1f4e79", "#b5452c"


@torch.no_grad()
def diffusion_process(
    diffusion: Diffusion, x_0: Tensor, times: Sequence[int] | None = None, extent: float | None = None
) -> Figure:
    r"""Sohl-Dickstein's Fig. 1: data diffuse, noise undiffuses, and the drift that was learned.

    The top row shows :math:`q(x_t)` of the data, the middle row the model's :math:`p_\theta(x_t)`, drawn by running
    it from :math:`x_T` down, and the bottom row the drift, the mean of :math:`p_\theta(x_{t-1} | x_t)` less
    :math:`x_t`, as arrows, in each picture to a scale of its own.

    Arguments:
        diffusion: A model of points in the plane, with event_shape (2,).
        x_0: Data, with shape (B, 2).
        times: The times of the columns, from the data to the noise, in 0..T; 0, T / 2 and T if not given.
        extent: The pictures show [-extent, extent]^2; what holds nearly all data and noise if not given.

    Returns:
        The figure.

    Raises:
        ValueError: If the model is not one of points in the plane, ``x_0`` cannot be its data, or a time lies outside
            0..T.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Fig. 1,
        https://arxiv.org/abs/1503.03585
    """
    T = diffusion.num_steps
    times = (0, T // 2, T) if times is None else tuple(times)
    if diffusion.event_shape != (2,):
        raise ValueError(f"diffusion must have event_shape (2,), but it is {tuple(diffusion.event_shape)}")
    if not all(isinstance(t, int) and 0 <= t <= T for t in times):
        raise ValueError(f"times must be ints in 0..{T}, but they are {times}")
    diffusion.model.dtype(x_0)  # refuse what cannot be data
    trace = poutine.trace(diffusion.model).get_trace(num_samples=len(x_0))
    undiffused = {t: trace.nodes[f"x_{t}"]["value"] for t in times}
    diffused = {t: diffusion.forward_process.marginal(x_0, t).sample() if t > 0 else x_0 for t in times}
    if extent is None:
        extent = 1.15 * max(float(x.abs().quantile(0.995)) for x in diffused.values())
    figure = Figure(figsize=(2.6 * len(times) + 0.5, 8.2), layout="constrained")
    rows = figure.subplots(3, len(times), squeeze=False)
    for column, t in enumerate(times):
        _scatter(rows[0, column], diffused[t], _DATA, extent)
        _scatter(rows[1, column], undiffused[t], _MODEL, extent)
        rows[0, column].set_title(f"t = {t}" if t != T else f"t = T = {T}")
        _drift(rows[2, column], diffusion, max(t, 1), extent)
        rows[2, column].set_xlabel(f"step {max(t, 1)} → {max(t, 1) - 1}")
    for row, label in zip(rows[:, 0], ("data, diffusing →", "← model, undiffusing", "drift of the model"), strict=True):
        row.set_ylabel(label)
    return figure


def _scatter(axes: Axes, x: Tensor, color: str, extent: float) -> None:
    x = x.cpu().numpy()
    axes.scatter(x[:, 0], x[:, 1], s=max(0.5, min(6, 6000 / len(x))), color=color, linewidths=0, alpha=0.6)
    _frame(axes, extent)


def _drift(axes: Axes, diffusion: Diffusion, t: int, extent: float) -> None:
    line = torch.linspace(-0.93 * extent, 0.93 * extent, 17)
    grid = torch.cartesian_prod(line, line).to(diffusion.model.dtype())
    grid = grid.to(diffusion.forward_process.schedule.noise(0).device)
    drift = diffusion.model.kernel(grid, t).mean - grid
    longest = drift.norm(dim=-1).quantile(0.98).clamp(min=1e-9)
    arrows = (drift / longest * float(line[1] - line[0])).cpu().numpy()
    grid = grid.cpu().numpy()
    axes.quiver(*grid.T, *arrows.T, angles="xy", scale_units="xy", scale=0.8, color="#444444", width=0.004)
    _frame(axes, extent)


def _frame(axes: Axes, extent: float) -> None:
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")


def terms(bound: Bound, axes: Axes | None = None) -> Axes:
    r"""Where the bound is spent: the mean of :math:`L_{t-1}` over t, with :math:`L_0` and :math:`L_T` in the legend.

    Arguments:
        bound: The bound.
        axes: Where to draw; axes of a new figure if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If ``bound`` is something else.
    """
    checks.instance("bound", bound, Bound)
    axes = Figure(figsize=(5, 3.2), layout="constrained").subplots() if axes is None else axes
    means = bound.denoising.mean(1).cpu().numpy()
    label = f"$L_0$ = {float(bound.reconstruction.mean()):.3f}, $L_T$ = {float(bound.prior.mean()):.3f}"
    axes.plot(np.arange(2, len(means) + 2), means, color=_MODEL, label=label)
    axes.set(xlabel="t", ylabel="$L_{t-1}$ in nats")
    if len(means) and (means > 0).all():
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return axes


def variances(account: VarianceAccount) -> Figure:
    r"""The mean and the spread of each term over t, and the variance that each way of drawing t leaves.

    On the left the root of :math:`\mathbb{E}[L_{t-1}^2]`, to which the best probabilities of t are proportional, and
    the mean; on the right the variances of the one-step estimate and of its gradient, relative to the first drawing,
    with two standard errors.

    Arguments:
        account: The account, of :func:`pyrodiff.variance_account`.

    Returns:
        The figure.

    Raises:
        ValueError: If ``account`` is something else.
    """
    checks.instance("account", account, VarianceAccount)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    over_time, bars = figure.subplots(1, 2)
    t = np.arange(1, len(account.mean) + 1)
    over_time.plot(t, account.second_moment.sqrt().cpu().numpy(), color=_MODEL, label="root mean square")
    over_time.plot(t, account.mean.abs().cpu().numpy(), color=_DATA, label="|mean|")
    over_time.set(xlabel="t", ylabel="$L_{t-1}$ in nats", yscale="log")
    over_time.legend(frameon=False)
    names = list(account.drawings)
    for shift, label, color in ((0.2, "value", _DATA), (-0.2, "gradient", _MODEL)):
        found = [getattr(account, label)[name] for name in names]
        widths, errors = ([one / found[0][0] for one in column] for column in zip(*found, strict=True))
        places = np.arange(len(names))[::-1] + shift
        bars.barh(places, widths, 0.36, xerr=[2 * error for error in errors], color=color, label=label)
    bars.set_yticks(np.arange(len(names))[::-1], names)
    bars.set(xlabel=f"variance, relative to {names[0]}")
    bars.legend(frameon=False, loc="lower right")
    return figure


def bits(x: Tensor, axes: Axes | None = None, columns: int | None = None) -> Axes:
    """A batch of bits: sequences one below the other, or pictures side by side.

    Arguments:
        x: Zeros and ones, with shape (B, length), or (B, height, width).
        axes: Where to draw; axes of a new figure if not given.
        columns: How many pictures stand side by side; about the root of B if not given. Sequences have one column.

    Returns:
        The axes.

    Raises:
        ValueError: If ``x`` has another number of dimensions.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape (B, length) or (B, height, width), but its shape is {tuple(x.shape)}")
    axes = Figure(figsize=(4, 4), layout="constrained").subplots() if axes is None else axes
    pictures = x.detach().cpu().numpy()
    if x.dim() == 3:
        columns = columns or int(np.ceil(np.sqrt(len(pictures))))
        pictures = np.pad(pictures, ((0, -len(pictures) % columns), (0, 1), (0, 1)), constant_values=0.5)
        rows = [np.concatenate(list(row), axis=1) for row in pictures.reshape(-1, columns, *pictures.shape[1:])]
        pictures = np.concatenate(rows, axis=0)[:-1, :-1]
    axes.imshow(pictures, cmap="binary", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[])
    return axes
