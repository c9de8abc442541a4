r"""Plots of a diffusion: data, samples, states on the way, and the terms of the bound.

Each function draws on matplotlib axes or makes a figure, and returns it; none shows or saves anything.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from pyro import poutine
from torch import Tensor

from .base import arguments, checks
from .base.arguments import ArgumentError
from .likelihood.accounting import VarianceAccount
from .likelihood.bounds import Bound
from .pair.diffusion import Diffusion

__all__ = [
    "animation",
    "beside",
    "bits",
    "curves",
    "diffusion_process",
    "histograms",
    "pictures",
    "samples",
    "terms",
    "trajectory",
    "variances",
]

_DATA, _MODEL = "#1f4e79", "#b5452c"
_SQUARE = (4.0, 4.3)  # of the figure of points, whose titles stand above
_GAP = 0.8  # the grey between pictures, which differs from black and white edges


@torch.no_grad()
def diffusion_process(
    diffusion: Diffusion, x_0: Tensor, times: Sequence[int] | None = None, extent: float | None = None
) -> Figure:
    r"""Sohl-Dickstein's Fig. 1: data diffuse, noise undiffuses, and the drift that was learned.

    The top row shows :math:`q(x_t)` of the data, the middle row the model's :math:`p_\theta(x_t)`, drawn by running
    it from :math:`x_T` down, and the bottom row the drift, the mean of :math:`p_\theta(x_{t-1} | x_t)` less
    :math:`x_t`, as arrows, scaled separately in each picture.

    Arguments:
        diffusion: A model of points in the plane, with event_shape (2,).
        x_0: Data, with shape (B, 2).
        times: The times of the columns, from the data to the noise, in 0..T; 0, T / 2 and T if not given.
        extent: The pictures show [-extent, extent]^2; if not given, large enough for nearly all data and noise.

    Returns:
        The figure.

    Raises:
        ValueError: If the model is not one of points in the plane, ``x_0`` cannot be its data, or a time lies outside
            0..T.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Fig. 1,
        https://arxiv.org/abs/1503.03585
    """
    T = checks.instance("diffusion", diffusion, Diffusion).num_steps
    times = (0, T // 2, T) if times is None else times
    if diffusion.event_shape != (2,):
        raise ArgumentError("diffusion", f"must have event_shape (2,), but it is {tuple(diffusion.event_shape)}")
    if not isinstance(times, Sequence) or not times or not all(arguments.is_int(t) and 0 <= t <= T for t in times):
        raise ArgumentError("times", f"must be ints in 0..{T}, but they are {arguments.described(times)}")
    if extent is not None:
        arguments.number("extent", extent, 0, math.inf)
    diffusion.model.check(x_0)  # refuse what cannot be data
    nodes: dict[str, Any] = poutine.trace(diffusion.model).get_trace(num_samples=len(x_0)).nodes
    undiffused = {t: nodes[f"x_{t}"]["value"] for t in times}
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
    points = x.cpu().numpy()
    axes.scatter(points[:, 0], points[:, 1], s=max(0.5, min(6, 6000 / len(x))), color=color, linewidths=0, alpha=0.6)
    _frame(axes, extent)


def _drift(axes: Axes, diffusion: Diffusion, t: int, extent: float) -> None:
    line = torch.linspace(-0.93 * extent, 0.93 * extent, 17)
    grid = torch.cartesian_prod(line, line).to(diffusion.model.dtype()).to(diffusion.model.device)
    drift = diffusion.model.kernel(grid, t).mean - grid
    longest = drift.norm(dim=-1).quantile(0.98).clamp(min=1e-9)
    arrows = (drift / longest * float(line[1] - line[0])).cpu().numpy()
    axes.quiver(
        *grid.cpu().numpy().T, *arrows.T, angles="xy", scale_units="xy", scale=0.8, color="#444444", width=0.004
    )
    _frame(axes, extent)


def _frame(axes: Axes, extent: float) -> None:
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")


def terms(bound: Bound, axes: Axes | None = None) -> Axes:
    r"""Where the bound is spent: the mean of :math:`L_{t-1}` over t, with :math:`L_0` and :math:`L_T` in the legend.

    Arguments:
        bound: The bound.
        axes: The axes to draw on; those of a new figure if not given.

    Returns:
        The axes.

    Raises:
        ValueError: If ``bound`` is something else.
    """
    checks.instance("bound", bound, Bound)
    axes = _axes(axes, (5, 3.2))
    means = bound.denoising_mean.cpu().numpy()
    label = f"$L_0$ = {float(bound.reconstruction.mean()):.3f}, $L_T$ = {float(bound.prior.mean()):.3f}"
    axes.plot(np.arange(2, len(means) + 2), means, color=_MODEL, label=label)
    axes.set(xlabel="t", ylabel="$L_{t-1}$ in nats")
    if len(means) and (means > 0).all():
        axes.set_yscale("log")
        if means.min() < 1e-6 * means.max():  # smaller values are rounding errors
            axes.set_ylim(1e-6 * means.max(), 2 * means.max())
    axes.legend(frameon=False)
    return axes


def variances(account: VarianceAccount) -> Figure:
    r"""The mean and the spread of each term over t, and the variance under each way of drawing t.

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
        axes: The axes to draw on; those of a new figure if not given.
        columns: How many pictures stand side by side; about the root of B if not given. Sequences have one column.

    Returns:
        The axes.

    Raises:
        ValueError: If ``x`` has another number of dimensions.
    """
    if not isinstance(x, Tensor) or x.is_complex() or x.dim() not in (2, 3):
        raise ArgumentError(
            "x", f"must have shape (B, length) or (B, height, width), but it is {arguments.described(x)}"
        )
    columns = None if columns is None else arguments.positive_int("columns", columns)
    axes = _axes(axes, (4, 4))
    numbers = x.detach().cpu().numpy()
    if x.dim() == 3:
        numbers = _tiled(numbers, columns, gap=0.5)
    axes.imshow(numbers, cmap="binary", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[])
    return axes


def pictures(x: Tensor, axes: Axes | None = None, columns: int | None = None) -> Axes:
    """A batch of pictures side by side: 0 is black and 1 white, unlike in :func:`bits`; or in colour.

    Arguments:
        x: Numbers in [0, 1], with shape (B, height, width), (B, 1, height, width) or, for red, green and blue,
            (B, 3, height, width). Data on levels or in [-1, 1] are ``(x + 1) / 2``, and draws from a density that go
            beyond must be clamped.
        axes: The axes to draw on; those of a new figure if not given.
        columns: How many pictures stand side by side; about the root of B if not given.

    Returns:
        The axes, with one image of all. Pixels of pictures of at most 16 x 16 are enlarged in it.

    Raises:
        ValueError: If ``x`` has another shape, or a number outside [0, 1], or ``columns`` is not a positive int.

    Example:
        >>> axes = pyrodiff.plots.pictures(torch.rand(12, 3, 40, 30), columns=4)
        >>> axes.images[0].get_array().shape
        (122, 123, 3)
    """
    wanted = "must have shape (B, height, width) or (B, 1 or 3, height, width), with B at least 1"
    if not isinstance(x, Tensor) or x.dim() not in (3, 4) or _form(x.shape[1:]) != "pictures" or not x.numel():
        raise ArgumentError("x", f"{wanted}, but it is {arguments.described(x)}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        low, high = float(x.min()), float(x.max())
        raise ArgumentError(
            "x",
            f"must be numbers in [0, 1], but they lie in [{low:.3g}, {high:.3g}]; for data in [-1, 1] give "
            "((x + 1) / 2).clamp(0, 1)",
        )
    columns = None if columns is None else arguments.positive_int("columns", columns)
    tiles = _tiled(_enlarged(x), columns, gap=_GAP)
    axes = _axes(axes, _size_for(tiles))
    _light(axes, tiles)
    return axes


def samples(x: Tensor, axes: Axes | None = None, limits: tuple[float, float] | None = None) -> Axes:
    """Samples or data of any kind: points as a scatter, sequences one below the other, pictures side by side.

    Arguments:
        x: Points in the plane, with shape (B, 2); sequences, (B, length); or pictures, (B, height, width) or
            (B, 1 or 3, height, width).
        axes: The axes to draw on; those of a new figure if not given.
        limits: The two numbers that are drawn as black and white in pictures, and as white and black in sequences;
            numbers beyond are clipped. If not given, (0, 1) if no number is below 0, else (-1, 1), as for
            :class:`pyrodiff.Levels`.

    Returns:
        The axes.

    Raises:
        ValueError: If ``x`` has another shape or is not finite somewhere, or ``limits`` is something else.

    Example:
        >>> axes = pyrodiff.plots.samples(pyrodiff.datasets.swiss_roll(500))
        >>> len(axes.collections[0].get_offsets())
        500
    """
    form = _checked_form("x", x, "B", 1)
    limits = _limits(x, limits)
    if form == "points":
        axes = _axes(axes, _SQUARE)
        _scatter(axes, x.detach(), _MODEL, _extent(x))
        return axes
    tiles = _drawn(x, form, limits)
    axes = _axes(axes, _size_for(tiles))
    _show(axes, tiles, form)
    return axes


def beside(samples: Tensor, data: Tensor | None = None, limits: tuple[float, float] | None = None) -> Figure:
    """Samples, with data beside them on the same scale; the titles give the number of each.

    Arguments:
        samples: Samples as in :func:`samples`: points, sequences or pictures.
        data: Data of the same shape; samples alone are drawn if not given.
        limits: As of :func:`samples`; if not given, by both.

    Returns:
        The figure.

    Raises:
        ValueError: If one of them has another shape or is not finite somewhere, or ``limits`` is something else.

    Example:
        >>> figure = pyrodiff.plots.beside(torch.randn(300, 2), pyrodiff.datasets.swiss_roll(500))
        >>> [axes.get_title() for axes in figure.axes]
        ['300 samples', '500 data']
    """
    shown = _named(samples, data)
    form = _checked_form("samples", samples, "B", 1)
    both = torch.cat([x.flatten() for x in shown.values()])
    limits, extent = _limits(both, limits), max(map(_extent, shown.values()))
    tiles = {} if form == "points" else {title: _drawn(x, form, limits) for title, x in shown.items()}
    sizes = [_size_for(one) for one in tiles.values()] or [(4.0, 4.3)] * len(shown)
    size = (sum(width for width, _ in sizes), max(height for _, height in sizes))
    figure = Figure(figsize=size, layout="constrained")
    for column, (title, x) in enumerate(shown.items()):
        axes = figure.add_subplot(1, len(shown), 1 + column)
        if form == "points":
            _scatter(axes, x, _DATA if column else _MODEL, extent)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set(xlabel="$x_1$", ylabel="$x_2$")
        else:
            _show(axes, tiles[title], form)
            if form == "sequences":
                axes.set(xlabel="dimension", ylabel="one below the other")
        axes.set_title(title, fontsize=11)
    return figure


def histograms(samples: Tensor, data: Tensor, most: int = 12) -> Figure:
    """Histograms of samples and data, of vectors, in one frame per dimension.

    Arguments:
        samples: Samples with shape (B, length).
        data: Data of the same length.
        most: The largest number of dimensions to draw, spread evenly.

    Returns:
        The figure.

    Raises:
        ValueError: If one of them has another shape or is not finite somewhere, or ``most`` is not a positive int.

    Example:
        >>> figure = pyrodiff.plots.histograms(torch.randn(300, 3), torch.randn(500, 3))
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['$x_1$', '$x_2$', '$x_3$']
    """
    shown, most = _named(samples, data), arguments.positive_int("most", most)
    checks.instance("data", data, Tensor)
    if samples.dim() != 2 or not samples.numel():
        raise ArgumentError("samples", f"must have shape (B, length), but it is {arguments.described(samples)}")
    dimensions = torch.linspace(0, samples.shape[1] - 1, min(most, samples.shape[1])).round().int().tolist()
    rows = -(-len(dimensions) // 4)
    columns = -(-len(dimensions) // rows)
    figure = Figure(figsize=(2.4 * columns, 2.1 * rows + 0.4), layout="constrained")
    for place, i in enumerate(dimensions):
        axes = figure.add_subplot(rows, columns, 1 + place)
        ends = [float(end) for end in torch.cat([x[:, i] for x in shown.values()]).aminmax()]
        for (title, x), color in zip(shown.items(), (_MODEL, _DATA), strict=True):
            values = x[:, i].numpy()
            axes.hist(values, 30, range=(ends[0], ends[1]), density=True, histtype="step", color=color, label=title)
        axes.set(xlabel=f"$x_{{{i + 1}}}$" if i > 8 else f"$x_{i + 1}$", yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _named(samples: Tensor, data: Tensor | None) -> dict[str, Tensor]:
    """Samples and data by their titles, checked, and on the CPU."""
    for name, x in (("samples", samples), ("data", data)):
        if x is None and name == "data":
            continue
        if not isinstance(x, Tensor) or not x.numel() or not bool(x.isfinite().all()):
            raise ArgumentError(name, f"must be a tensor of finite numbers, but it is {arguments.described(x)}")
        if x.shape[1:] != samples.shape[1:]:
            raise ArgumentError(
                name, f"must have the shape of samples, {tuple(samples.shape[1:])}, but it is {tuple(x.shape[1:])}"
            )
    found = {f"{len(samples)} samples": samples, **({} if data is None else {f"{len(data)} data": data})}
    return {title: x.detach().cpu().double() for title, x in found.items()}


def trajectory(
    states: Tensor, times: Sequence[int], rows: int | None = None, limits: tuple[float, float] | None = None
) -> Figure:
    """States on the way from noise to data, as a strip: a column per time, with the same samples in each.

    Arguments:
        states: States x_t with shape ``(len(times), B, *event_shape)``, as of
            :meth:`pyrodiff.AncestralSampler.trajectory`, of data as in :func:`samples`.
        times: Their times t.
        rows: How many samples to draw, one below the other; if not given, the first 6 pictures or 24 sequences. Points
            are all drawn, on one scale.
        limits: See :func:`samples`; if not given, by the last states.

    Returns:
        The figure.

    Raises:
        ValueError: If ``states`` has another shape or is not finite somewhere, if there is not a time for each, or if
            ``rows`` or ``limits`` is something else.

    Example:
        >>> states = torch.stack([torch.randn(5, 8, 8), torch.ones(5, 8, 8)])
        >>> [axes.get_title() for axes in pyrodiff.plots.trajectory(states, times=(10, 0)).axes]
        ['t = 10', 't = 0']
    """
    form, times = _checked_states(states, times)
    limits = _limits(states[-1], limits)
    if rows is not None:
        arguments.positive_int("rows", rows)
    if form == "points":
        columns, extent, width, height = list[Any](states.detach()), _extent(states), 1.3, 1.3
    else:
        shown = states[:, : rows or {"pictures": 6, "sequences": 24}[form]]
        columns = [_drawn(x, form, limits, columns=1) for x in shown]
        high, wide = columns[0].shape[:2]
        width = 1.0 if form == "pictures" else min(max(wide / 30, 1), 4)  # in inches
        height = max(width * high / wide, 0.25)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(figsize=(width * len(times) + 0.1, height + 0.28), layout=layout)
    for axes, column, t in zip(figure.subplots(1, len(times), squeeze=False)[0], columns, times, strict=True):
        if form == "points":
            _scatter(axes, column, _MODEL, extent)
        else:
            _show(axes, column, form)
        axes.set_title(f"t = {t}", fontsize=9)
    return figure


def animation(
    states: Tensor, times: Sequence[int], limits: tuple[float, float] | None = None, interval: int = 100
) -> FuncAnimation:
    """States on the way from noise to data, a frame per time; the last is shown for a second more.

    Arguments:
        states: See :func:`trajectory`. All samples are drawn, as by :func:`samples`.
        times: Their times t.
        limits: See :func:`trajectory`.
        interval: How long a frame is shown, in milliseconds.

    Returns:
        matplotlib's animation, which opens no window: write it to a file by its ``save``. matplotlib warns if it is
        deleted before it was saved.

    Raises:
        ValueError: See :func:`trajectory`; if ``interval`` is not a positive int.

    Example:
        >>> import pathlib, tempfile
        >>> from matplotlib.animation import PillowWriter
        >>> film = pyrodiff.plots.animation(torch.randn(3, 50, 2), times=(2, 1, 0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     film.save(pathlib.Path(folder, "film.gif"), PillowWriter(fps=10))
        ...     [path.name for path in pathlib.Path(folder).iterdir()]
        ['film.gif']
    """
    form, times = _checked_states(states, times)
    arguments.positive_int("interval", interval)
    limits = _limits(states[-1], limits)
    if form == "points":
        axes = _axes(None, _SQUARE)
        _scatter(axes, states[0].detach(), _MODEL, _extent(states))
    else:
        frames = [_drawn(x, form, limits) for x in states]
        axes = _axes(None, _size_for(frames[0]))
        _show(axes, frames[0], form)
    title = axes.set_title(f"t = {times[0]}")

    def draw(number: int) -> list:
        title.set_text(f"t = {times[number]}")
        if form == "points":
            axes.collections[0].set_offsets(states[number].detach().cpu().numpy())
        else:
            axes.images[0].set_data(frames[number])
        return [title, *axes.collections, *axes.images]

    order = [*range(len(times)), *[len(times) - 1] * round(1000 / interval)]
    return FuncAnimation(cast(Figure, axes.figure), draw, frames=order, interval=interval)


def curves(
    records: Sequence[Mapping[str, float]], axes: Axes | None = None, scale: float = 1.0, unit: str = "nats per datum"
) -> Axes:
    """The curves of a training: the loss of each record (thin), its running mean, and a held-out bound.

    The vertical axis is logarithmic if all values are positive and the largest is over 30 times the smallest.

    Arguments:
        records: Mappings, such as lines of JSON, with a number "step" and, if present, a "loss" and a "bound", in nats
            per datum, with its standard error "bound_se". Values that are missing, None or not finite are not drawn;
            other keys are ignored.
        axes: The axes to draw on; those of a new figure if not given.
        scale: A factor for the values: 1 / (D log 2) for bits per dimension of D numbers.
        unit: The label of the vertical axis.

    Returns:
        The axes. The bars of the bound are two standard errors up and down.

    Raises:
        ValueError: If a record is no mapping, a value no number, or there is neither a loss nor a bound in any.

    Example:
        >>> records = [{"step": n, "loss": 2 + 10 / n} for n in range(1, 101)] + [{"step": 100, "bound": 2.3}]
        >>> [text.get_text() for text in pyrodiff.plots.curves(records).get_legend().get_texts()]
        ['loss', 'loss, mean of 5', 'bound, held out']
    """
    scale = arguments.number("scale", scale, 0, math.inf)
    losses, bounds = _column(records, "loss"), _column(records, "bound", "bound_se")
    losses[:, 1:] *= scale
    bounds[:, 1:] *= scale
    if not (len(losses) or len(bounds)):
        raise ArgumentError("records", f"must hold a step with a loss or a bound, but none of the {len(records)} does")
    axes = _axes(axes, (6, 3.4))
    if len(losses):
        half = len(losses) // 40
        axes.plot(*losses.T[:2], color=_DATA, linewidth=0.6, alpha=0.45 if half else 1, label="loss")
        if half:
            label = f"loss, mean of {2 * half + 1}"
            axes.plot(losses[:, 0], _smooth(losses[:, 1], half), color=_DATA, linewidth=1.6, label=label)
    if len(bounds):
        error = 2 * np.nan_to_num(bounds[:, 2])
        label = "bound, held out" + " ± 2 s.e." * bool(error.any())
        steps, means = bounds[:, 0], bounds[:, 1]
        axes.errorbar(
            steps, means, error, fmt="o-", color=_MODEL, markersize=3.5, linewidth=1.2, capsize=2, label=label
        )
    values = np.concatenate([losses[:, 1], bounds[:, 1]])
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


def _column(records: Sequence[Mapping[str, float]], *keys: str) -> np.ndarray:
    """Rows of the step and the values of some keys, for records with a step and the first key; others may be NaN."""
    rows = []
    if not isinstance(records, Sequence) or isinstance(records, str):
        raise ArgumentError("records", f"must be a list of mappings, but it is {arguments.described(records)}")
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ArgumentError("records", f"must be mappings, but number {number} is {arguments.described(record)}")
        row = [record.get(key) for key in ("step", *keys)]
        for key, value in zip(("step", *keys), row, strict=True):
            if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                raise ArgumentError("records", f"must have numbers, but number {number} has {key} = {value!r}")
        numbers = [math.nan if value is None else float(value) for value in row]
        if math.isfinite(numbers[0]) and math.isfinite(numbers[1]):
            rows.append(numbers)
    return np.array(rows, dtype=float).reshape(-1, 1 + len(keys))


def _smooth(values: np.ndarray, half: int) -> np.ndarray:
    """A running mean over ``half`` values to either side, or as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _form(event_shape: Sequence[int]) -> str | None:
    """The form in which data of a shape are drawn."""
    if tuple(event_shape) == (2,):
        return "points"
    if len(event_shape) == 3:
        return "pictures" if event_shape[0] in (1, 3) else None
    return {1: "sequences", 2: "pictures"}.get(len(event_shape))


def _checked_form(name: str, x: Tensor, before: str, dims: int) -> str:
    """The form in which ``x`` is drawn, checked; its first ``dims`` dimensions are called ``before`` in the error."""
    is_drawable = isinstance(x, Tensor) and x.numel() > 0 and x.dim() > dims
    form = _form(x.shape[dims:]) if is_drawable and not (x.is_complex() or x.dtype == torch.bool) else None
    if form is None:
        raise ArgumentError(
            name,
            f"must be points in the plane, with shape ({before}, 2), sequences, ({before}, length), or "
            f"pictures, ({before}, height, width) or ({before}, 1 or 3, height, width), but it is "
            f"{arguments.described(x)}",
        )
    if not bool(x.isfinite().all()):
        raise ArgumentError(name, f"must be finite, but {int((~x.isfinite()).sum())} of its numbers are not")
    return form


def _checked_states(states: Tensor, times: Sequence[int]) -> tuple[str, tuple]:
    """The form in which states are drawn, and their times, checked."""
    form = _checked_form("states", states, "len(times), B", 2)
    found = times.tolist() if isinstance(times, Tensor) else times
    found = tuple(found) if isinstance(found, Sequence) else ()
    if len(found) != len(states):
        raise ArgumentError("times", f"must be one for each of the {len(states)} states, but they are {times}")
    return form, found


def _limits(x: Tensor, limits: tuple[float, float] | None) -> tuple[float, float]:
    if limits is None:
        return (0.0, 1.0) if bool((x >= 0).all()) else (-1.0, 1.0)
    pair = isinstance(limits, tuple | list) and len(limits) == 2
    if not (pair and all(arguments.is_number(end) for end in limits) and -math.inf < limits[0] < limits[1] < math.inf):
        raise ArgumentError("limits", f"must be two numbers, the lower first, or None, but it is {limits!r}")
    return float(limits[0]), float(limits[1])


def _drawn(x: Tensor, form: str, limits: tuple[float, float], columns: int | None = None) -> np.ndarray:
    """Sequences or pictures as one array of numbers in [0, 1]."""
    shares = ((x.detach().cpu().double() - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)
    return shares.numpy() if form == "sequences" else _tiled(_enlarged(shares), columns, gap=_GAP)


def _enlarged(x: Tensor) -> np.ndarray:
    """Grey pictures with shape (B, height, width), coloured ones with (B, height, width, 3).

    Pixels of small ones are enlarged, so that the gap between two pictures is thin.
    """
    x = x.detach().cpu().double()
    if x.dim() == 4:
        x = x[:, 0] if x.shape[1] == 1 else x.permute(0, 2, 3, 1)
    times = max(1, 32 // max(x.shape[1:3]))
    return x.repeat_interleave(times, 1).repeat_interleave(times, 2).numpy()


def _tiled(tiles: np.ndarray, columns: int | None, gap: float) -> np.ndarray:
    """Pictures side by side, row by row, separated by one pixel of grey ``gap``."""
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    margins = ((0, -len(tiles) % columns), (0, 1), (0, 1), (0, 0))[: tiles.ndim]
    tiles = np.pad(tiles, margins, constant_values=gap)
    rows = [np.concatenate(list(row), axis=1) for row in tiles.reshape(-1, columns, *tiles.shape[1:])]
    return np.concatenate(rows, axis=0)[:-1, :-1]


def _axes(axes: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that are given, or those of a new figure of this size."""
    if axes is None:
        return Figure(figsize=size, layout="constrained").subplots()
    return checks.instance("axes", axes, Axes)


def _size_for(tiles: np.ndarray) -> tuple[float, float]:
    """How wide and high an array is to be drawn, in inches."""
    height, width = tiles.shape[:2]
    scale = min(max(4.5, max(height, width) / 100), 10) / max(height, width)
    return max(scale * width, 1), max(scale * height, 1) + 0.3


def _extent(x: Tensor) -> float:
    """The half-width of a square with all points except the outermost."""
    return 1.1 * float(np.quantile(x.detach().abs().cpu().numpy(), 0.998)) or 1.0


def _show(axes: Axes, tiles: np.ndarray, form: str) -> None:
    if form == "pictures":
        _light(axes, tiles)
    else:
        axes.imshow(tiles, cmap="binary", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axes.set(xticks=[], yticks=[])


def _light(axes: Axes, tiles: np.ndarray) -> None:
    """An array of pictures: 0 black, 1 white."""
    interpolation = "nearest" if max(tiles.shape) <= 400 else "antialiased"  # about the resolution of the axes
    axes.imshow(tiles, cmap="gray", vmin=0, vmax=1, interpolation=interpolation, aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(str(_GAP))
