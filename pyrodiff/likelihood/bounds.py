r"""Bounds on the likelihood of a diffusion, datum by datum: its T terms, and the importance-weighted one.

.. math::
    -\log p_\theta(x_0) \;\le\; -\mathbb{E}_q \log \frac1K \sum_{k=1}^K
        \frac{p_\theta(x_{0:T}^{(k)})}{q(x_{1:T}^{(k)} | x_0)}
    \;\le\; L_T + \sum_{t=2}^{T} L_{t-1} + L_0

In :func:`bound` every :math:`x_t` is drawn from :math:`q(x_t | x_0)` independently, which leaves the expectation of
each term as it is and lets all t run in one batch (Luo 2022, Eqs. 57-58). :func:`importance_bound` needs whole
trajectories.

Draws are made in fixed blocks of rows, each with its own seed. So the :math:`x_t` of a datum depends only on the seed,
its position among the data, t and the particle: not on the network, the memory, how the data are batched or how many
processes share the work. Two models with the same forward process and seed see the same :math:`x_t`, so the difference
of their bounds has less variance than either. (With ``num_times``, and in importance-weighted bounds, the draws also
depend on the number of times, or of particles. A GPU draws other numbers than a CPU.)

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), https://arxiv.org/abs/2208.11970

    Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from ..base import arguments, checks, ranks
from ..base.arguments import ArgumentError
from ..base.precision import costs_dtype, float64, home, precisely
from ..base.randomness import seed_draws, seed_of
from ..model.reverse import GaussianReverse
from ..model.variances import LearnedVariance
from ..pair.diffusion import Diffusion
from ..pair.programs import Generative
from ..pair.terms import prior_cost, runs, step_costs
from ..running.evaluation import Batch, DryRun, batches, dry_run, evaluating, expect, guided, progress_bar
from .estimate import Likelihood
from .psis import effective_size, pareto_k, pareto_words, warn_of_tails

__all__ = ["Bound", "ImportanceBound", "bound", "importance_bound"]


class _Denoising:
    """The field ``denoising`` of a :class:`Bound`: it stores the terms that were drawn, and reads as those of all t."""

    def __get__(self, bound: "Bound | None", owner: type) -> Any:
        if bound is None:
            return self
        drawn = bound.held("denoising")
        if bound.times is None:
            return drawn
        terms = drawn.new_zeros((bound.num_steps - 1, drawn.shape[1]))
        return terms.scatter_add_(0, bound.times.long() - 2, drawn)

    def __set__(self, bound: "Bound", drawn: Tensor) -> None:
        vars(bound)["denoising"] = drawn


@dataclass(frozen=True, repr=False, eq=False)
class Bound(Likelihood):
    """The terms of the bound on -log p(x_0), in nats, positive as a cost. Printed, it is a table.

    If few of the times were drawn, only their terms are stored. ``denoising`` expands them to (T - 1) B numbers at each
    access; ``denoising_sum``, ``denoising_mean`` and printing do without that.

    Arguments:
        prior: L_T, with shape (B,).
        denoising: L_{t-1} for t = 2..T, with shape (T - 1, B). If only some t were drawn, a term is divided by the
            probability of its t, and 0 if that was not drawn: means over the data are still unbiased. If ``times`` are
            given, the terms of these alone, with shape (K, B).
        reconstruction: L_0, with shape (B,).
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
        prior_entropy: The entropy of p(x_T) in nats; None where it is not known.
        global_kl: The KL of random weights, with shape (); all data share it, so it is not part of ``nats``. None if
            there are no random weights.
        times: The t of each term that was drawn, integers in 2..T with shape (K, B); None where all terms are kept.
        steps: The number of steps T, if ``times`` are given.

    Raises:
        ValueError: If ``times`` are not in 2..T.
    """

    prior: Tensor
    denoising: Tensor
    reconstruction: Tensor
    event_shape: torch.Size
    levels: int | float | None = None
    prior_entropy: float | None = None
    global_kl: Tensor | None = None
    times: Tensor | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.times is not None and (
            not self.steps or not checks.holds((self.times >= 2) & (self.times <= self.steps))
        ):
            raise ArgumentError("times", f"must lie in 2..steps, where steps is {self.steps}, but they do not")
        if self.times is not None and self.held("denoising").shape != self.times.shape:
            object.__setattr__(self, "times", None)  # the terms of all t are given, as by dataclasses.replace
            object.__setattr__(self, "steps", None)

    @property
    def nats(self) -> Tensor:
        return self.prior + self.denoising_sum + self.reconstruction

    @property
    def denoising_sum(self) -> Tensor:
        """The sum of L_{t-1} over t, for each datum, with shape (B,)."""
        return self.held("denoising").sum(0)

    @property
    def denoising_mean(self) -> Tensor:
        """The mean of each L_{t-1} over the data, for t = 2..T, with shape (T - 1,)."""
        drawn = self.held("denoising")
        if self.times is None:
            return drawn.mean(1)
        sums = torch.zeros(self.num_steps - 1, dtype=torch.float64, device=home(drawn.device))
        sums.index_add_(0, self.times.to(sums.device).flatten().long() - 2, float64(drawn).flatten())
        return (sums / drawn.shape[1]).to(drawn.dtype).to(drawn.device)

    @property
    def total(self) -> float:
        """The cost of all data together, in nats: the sum over the data, plus the KL of random weights once.

        In expectation over draws of the weights it is a bound on -log p(x_1, ..., x_B), with the weights integrated
        out.
        """
        return _total(self.nats, self.global_kl)

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return self.steps or len(self.held("denoising")) + 1

    @property
    def K(self) -> Tensor:
        """The lower bound K on log2 p(x_0) of Sohl-Dickstein et al., in bits per datum, with shape (B,): greater is
        better.

        References:
            Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Eq. 14 and
            Table 1, https://arxiv.org/abs/1503.03585
        """
        return -self.bits

    @property
    def L_null(self) -> float:
        """Sohl-Dickstein's log2 p of data under p(x_T) alone, in bits: minus its entropy. Their Table 1 shows K -
        L_null.

        Raises:
            ValueError: If the entropy of the prior is not known.
        """
        if self.prior_entropy is None:
            raise ArgumentError("prior", "must have an entropy in closed form for L_null, but it has none")
        return -self.prior_entropy / math.log(2)

    @property
    def title(self) -> str:
        return f"bound on -log p(x_0), T = {self.num_steps}"

    def _raised(self, nats: float) -> dict[str, Tensor]:
        return {"reconstruction": self.reconstruction + nats}

    def rows(self) -> dict[str, Tensor]:
        return {
            "L_T      prior": self.prior,
            "ΣL_t-1   denoising": self.denoising_sum,
            "L_0      reconstruction": self.reconstruction,
            "bound": self.nats,
            **_global_row(self.global_kl),
        }

    @classmethod
    def joined(cls, parts: list["Bound"]) -> "Bound":
        """The bound of all the data of several bounds by one model.

        Arguments:
            parts: The bounds, at least one.

        Raises:
            ValueError: If they differ in the number of steps or levels, or in shapes, and so cannot be of one model.
        """
        if len({None if part.times is None else (part.steps, len(part.times)) for part in parts}) > 1:
            parts = [part.changed(denoising=part.denoising, times=None, steps=None) for part in parts]
        return super().joined(parts)


Bound.denoising = _Denoising()  # type: ignore[assignment]  # set later, so as not to be a default


def _total(nats: Tensor, global_kl: Tensor | None) -> float:
    return float(float64(nats).sum()) + (0.0 if global_kl is None else float(global_kl))


def _global_row(global_kl: Tensor | None) -> dict[str, Tensor]:
    return {} if global_kl is None else {"KL of random weights": global_kl}


@torch.no_grad()
def bound(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    *context: Tensor,
    num_particles: int = 1,
    memory_budget: int | None = None,
    num_times: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    sharded: bool = False,
    guide: Callable | None = None,
) -> Bound:
    """The bound on -log p(x_0), each of its T terms estimated with fresh draws.

    Modules are in evaluation mode meanwhile. Random weights (each ``PyroSample``) are drawn from their guide once: the
    bound is given these weights, and their KL is a row of its own. For the bound of fewer steps, see
    :meth:`Diffusion.subchain`.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_particles: The number of draws of each x_t, over which a term is averaged.
        memory_budget: The memory for the states and activations of one batch of network calls, in bytes; if not
            given, 2^28, or on a GPU about an eighth of its memory. It changes the bound by rounding only.
        num_times: How many of the T - 1 denoising terms are computed for each datum and particle, one at random from
            each of as many equal parts of 2..T: unbiased at a fraction of the cost. All terms if not given. The draws
            depend on this number.
        generator: A generator or a seed, for the same number each time; torch's global generator if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        sharded: Whether the processes of ``torch.distributed`` share the work. All call it with the same model and
            data, and get the same bound as one process alone with the same seed.
        guide: The guide of random weights, which are drawn from it once: a program, called with the data (None for a
            loader) and their context. Required if there are random weights, else not allowed.

    Returns:
        The terms, in nats per datum.

    Raises:
        ValueError: If ``x_0`` cannot be data of the model or is an empty loader, ``diffusion`` is not one, a number is
            not a positive int, ``num_times`` is above T - 1, or the memory budget does not hold one datum.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=100))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> bound = pyrodiff.bound(pyrodiff.Diffusion(forward, reverse, event_shape=(2,)), torch.randn(50, 2))
        >>> bound.denoising.shape, bound.nats.shape
        (torch.Size([99, 50]), torch.Size([50]))
    """
    checks.instance("diffusion", diffusion, Diffusion)
    num_particles = arguments.positive_int("num_particles", num_particles)
    T = diffusion.num_steps
    if num_times is not None:
        num_times = arguments.positive_int("num_times", num_times)
        if num_times >= T:
            raise ArgumentError("num_times", f"must be at most T - 1 = {T - 1}, but it is {num_times}")
    arguments.one_of("sharded", sharded, (False, True))
    num_times = T - 1 if num_times is None else num_times
    turns = [number == ranks.number() for number in range(ranks.count())] if sharded else [True]
    is_mine: dict[bool, Iterator[bool]] = {True: cycle(turns), False: cycle(turns)}
    evaluated = evaluating(diffusion, generator, sharded, guide, guided(x_0, context))
    with evaluated as (seed, global_kl), progress_bar(progress, "bound") as bar:
        bounds, first, start = [], None, 0
        squares: Tensor | float = 0.0
        for batch in batches(diffusion, x_0, context, "num_particles"):
            first = first or dry_run(memory_budget, diffusion, batch)
            squares = squares + batch.x_0.detach().float().square().sum()
            expect(bar, x_0, (1 + num_times) * num_particles * len(batch))
            draws = _Draws(diffusion.model, batch, start, seed, num_particles, first)
            bounds.append(_bound(diffusion, draws, num_times, is_mine, len(turns), bar))
            start += len(batch)
    found = Bound.joined(bounds).changed(global_kl=global_kl)
    if start * num_particles * num_times >= T - 1:  # with fewer, most t were never drawn
        _warn_of_one_step(diffusion, found, squares / start)
    return found


def _warn_of_one_step(diffusion: Diffusion, found: Bound, square: Tensor | float) -> None:
    r"""Warn where one step holds much of the bound, because its estimate of x_0 is far beyond the data.

    For a Gaussian step :math:`L_{t-1} = c_t + w_0^2 E\|x_0 - \hat x_0\|^2 / 2 \sigma_t^2`, with the weight w_0 of x_0
    in the posterior's mean and the cost c_t of a wrong variance: the term implies the error of the estimate.
    """
    reverse, mean = diffusion.reverse, found.denoising_mean
    if not runs(reverse, GaussianReverse) or len(mean) == 0 or mean.is_meta:
        return
    if isinstance(reverse.variance, LearnedVariance):  # a learned variance grows with the error, so no step costs much
        return
    t = int(mean.argmax()) + 2
    cost, total = float(mean[t - 2]), found.prior.abs().mean() + mean.abs().sum() + found.reconstruction.abs().mean()
    variance = float(reverse.variance(reverse.forward_process, t))
    _, weight, deviation = reverse.forward_process.schedule.posterior(t).tolist()
    ratio = deviation**2 / variance
    of_variance = diffusion.event_shape.numel() / 2 * (ratio - 1 - math.log(ratio))
    error = (cost - of_variance) * 2 * variance / weight**2  # E |x_0 - its estimate|^2
    signal = float(reverse.forward_process.schedule.signal(t))
    if cost > 0.1 * float(total) and error > 100 * float(square) and signal < 0.1:
        warnings.warn(
            f"the step from t = {t} is {100 * cost / float(total):.0f} % of the bound: there the denoiser's estimate "
            f"of x_0 has a squared error of {error:.2g}, while the data's mean square is {float(square):.2g}. Noise "
            f"and score predictions divide by the signal, which is {signal:.2g} there: keep the estimate in the data's "
            f"range, pyrodiff.Clipped(denoiser, low, high), or use VelocityPrediction, or a schedule that leaves more "
            f"signal",
            UserWarning,
            stacklevel=3,
        )


def _bound(
    diffusion: Diffusion, draws: "_Draws", num_times: int, is_mine: dict[bool, Iterator[bool]], count: int, bar: tqdm
) -> Bound:
    """The bound of a batch. Blocks are dealt out to the ``count`` ranks in turn, one batch's after another's, as a
    batch may have fewer than there are ranks: ``is_mine`` says whether the next is this rank's, of the blocks with
    t = 1, which are small, and of all others."""
    batch, T = draws.batch, diffusion.num_steps
    terms = _Terms(draws, num_times, T)
    for first in (True, False):  # the rows of t = 1, which the decoder scores, and all others
        blocks = draws.blocks(torch.tensor([1, 2], device="cpu") if first else _ends(T, num_times))
        drawn = (block() for block in blocks if next(is_mine[first]))
        whole = draws.dry_run.rows // draws.rows * draws.rows  # as many blocks as fit, so that none is cut
        for i, t, size, draw, x_t, *rest in _joined(drawn, whole or draws.dry_run.rows):
            data, x_s = batch.rows(i), rest[0] if rest else None
            costs = step_costs(diffusion.model, data.x_0, t, x_t, data.context, x_s, first=first, later=not first)
            terms.add(i, t, draw, costs * size, first)
            bar.update(len(i) * count)
    return Bound(
        prior=draws.prior_costs(),
        event_shape=diffusion.event_shape,
        levels=diffusion.levels,
        prior_entropy=_prior_entropy(diffusion),
        **terms.found(count),
    )


class _Terms:
    """The terms of the data of a batch: of all t, or, if less than half of these are drawn, of each draw.

    Arguments:
        draws: The draws of the batch.
        num_times: How many t are drawn for each datum and particle.
        T: The number of steps.
    """

    def __init__(self, draws: "_Draws", num_times: int, T: int) -> None:
        x_0, count = draws.x_0, num_times * draws.num_particles
        self.num_particles, self.size, self.T, dtype = draws.num_particles, len(x_0), T, costs_dtype(x_0)
        self.by_draw = 2 * count < T - 1
        self.last = x_0.new_zeros(len(x_0), dtype=dtype)  # L_0
        self.later = x_0.new_zeros((count if self.by_draw else T - 1) * len(x_0), dtype=dtype)
        self.times = torch.zeros_like(self.later, dtype=torch.int32) if self.by_draw else None

    def add(self, i: Tensor, t: Tensor, draw: Tensor, costs: Tensor, first: bool) -> None:
        """Add the costs of data i at times t, all 1 if ``first``, else above; ``draw`` numbers the draws of a datum."""
        costs = costs.to(self.last.dtype)
        if first:
            self.last.index_add_(0, i, costs)
            return
        place = (draw if self.by_draw else t - 2) * self.size + i
        self.later.index_add_(0, place, costs)
        if self.times is not None:
            self.times.index_add_(0, place, t.int())

    def found(self, count: int) -> dict[str, Any]:
        """The arguments of a :class:`Bound`, summed over ``count`` ranks."""
        parts = [self.last, self.later, *([] if self.times is None else [self.times])]
        last, later, *times = ranks.together(parts) if count > 1 else parts
        found = {
            "reconstruction": last.div_(self.num_particles),
            "denoising": later.div_(self.num_particles).reshape(-1, self.size),
        }
        return {**found, "times": times[0].reshape(-1, self.size), "steps": self.T} if times else found


def _ends(T: int, num_times: int) -> Tensor:
    """Equal parts of 2..T: the first t of each, and T + 1."""
    return 2 + torch.arange(num_times + 1, device="cpu") * (T - 1) // max(num_times, 1)


_NUMBERS, _ROWS = 2**18, 2**12  # in a block, at most: what a CPU's cache holds
_NUMBERS_ELSEWHERE, _ROWS_ELSEWHERE = 2**20, 2**19  # on a GPU, where a small block takes as long as one of these


class _Group(NamedTuple):
    """Neighbouring data, of which some may lie outside of the batch.

    Arguments:
        number: The number of the group.
        indices: The indices of its data in the batch, clamped to it for data outside.
        inside: Which data of the group are in the batch.
        data: Which data of the batch these are.
    """

    number: int
    indices: Tensor
    inside: slice
    data: slice


class _Draws:
    """Draws for the data of a batch in blocks of rows, each with a seed derived from what the rows are.

    A block has the rows of some neighbouring data and some parts of 1..T, for one particle. Which ones depends on D, on
    the parts, and on whether they are drawn on a CPU; rows for data outside of the batch are drawn too, and dropped.

    Arguments:
        model: The model.
        batch: The batch.
        start: The position of the first datum of the batch among all data.
        seed: The seed of the evaluation.
        num_particles: The number of particles P.
        dry_run: How network calls are batched, and whether x_s is needed.
    """

    def __init__(
        self, model: Generative, batch: Batch, start: int, seed: int, num_particles: int, dry_run: DryRun
    ) -> None:
        self.model, self.batch, self.x_0, self.start, self.seed = model, batch, batch.x_0, start, seed
        self.num_particles, self.dry_run = num_particles, dry_run
        is_here = batch.x_0.device.type == "cpu"
        rows, numbers = (_ROWS, _NUMBERS) if is_here else (_ROWS_ELSEWHERE, _NUMBERS_ELSEWHERE)
        self.rows = max(1, min(rows, numbers // max(1, model.event_shape.numel())))

    def groups(self, size: int) -> Iterator[_Group]:
        """The groups of ``size`` neighbouring data that overlap with the batch."""
        B = len(self.x_0)
        for number in range(self.start // size, (self.start + B - 1) // size + 1):
            before = number * size - self.start
            index = (torch.arange(size, device=self.x_0.device) + before).clamp(0, B - 1)
            begin, end = max(0, -before), min(size, B - before)
            yield _Group(number, index, slice(begin, end), slice(before + begin, before + end))

    def blocks(self, ends: Tensor) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        """The draws of each block. Part k of the times is ends[k]..ends[k + 1] - 1."""
        firsts, sizes = ends[:-1], ends.diff()
        width = max(1, min(len(firsts), self.rows))
        parts = torch.arange(len(firsts), device=self.x_0.device).split(width)
        if len(firsts) == 0:  # T = 1
            return
        for part, first, size in zip(parts, firsts.split(width), sizes.split(width), strict=True):
            is_random, of_block = bool(size.max() > 1), int(first[0])
            first, size = first.to(self.x_0.device), size.to(self.x_0.device)
            for group in self.groups(max(1, self.rows // len(first))):
                for particle in range(self.num_particles):
                    seed = seed_of(self.seed, particle, of_block, group.number)
                    draw = particle * len(firsts) + part
                    yield partial(self._drawn, first, size, draw, is_random, group, seed)

    def _drawn(
        self, first: Tensor, size: Tensor, draw: Tensor, is_random: bool, group: _Group, seed: int
    ) -> tuple[Tensor, ...]:
        """For each row of a block: the index of the datum, t, the size of the part that t is drawn from, the number of
        the draw of the datum, x_t and maybe x_s. The rows of a datum, one for each part, are neighbours."""
        device, q, parts, data = self.x_0.device, self.model.forward_process, len(first), len(group.indices)
        i = group.indices.repeat_interleave(parts)
        t, size, draw = first.repeat(data), size.repeat(data), draw.repeat(data)
        seed_draws(seed, device)
        with precisely():
            if is_random:
                u = torch.rand(len(i), dtype=torch.float64, device=home(device))
                t = t + (u * size.to(u.device)).long().to(device).clamp(max=size - 1)
            x_0 = self.x_0.index_select(0, i)
            states = [q.marginal(x_0, t).sample()]
            if not self.dry_run.is_analytic:
                states.append(q.posterior(states[0], x_0, t.clamp(min=2)).sample())
        inside = slice(group.inside.start * parts, group.inside.stop * parts)
        return tuple(value[inside] for value in (i, t, size, draw, *states))

    def prior_costs(self) -> Tensor:
        """L_T, the mean over particles, with shape (B,)."""
        found = []
        for group in self.groups(self.rows):
            x_0, costs = self.x_0[group.indices], []
            for particle in range(self.num_particles):
                seed_draws(seed_of(self.seed, particle, 0, group.number), x_0.device)
                x_T = self.model.forward_process.marginal(x_0, self.model.num_steps).sample()[group.inside]
                costs.append(prior_cost(self.model, x_0[group.inside], x_T).expand(len(x_T)))
            found.append(torch.stack(costs).mean(0))
        return torch.cat(found)


def _joined(blocks: Iterable[tuple[Tensor, ...]], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """The rows of blocks, joined and split into pieces of at most ``rows``."""
    waiting: list[tuple[Tensor, ...]] = []
    for block in chain(blocks, [None]):
        if waiting and (block is None or sum(len(one[0]) for one in waiting) + len(block[0]) > rows):
            whole = [torch.cat(values) if len(values) > 1 else values[0] for values in zip(*waiting, strict=True)]
            yield from zip(*(value.split(rows) for value in whole), strict=True)
            waiting = []
        if block is not None:
            waiting.append(block)


def _prior_entropy(diffusion: Diffusion) -> float | None:
    model = diffusion.model
    try:
        dtype = model.dtype() if model.forward_process.is_integer else torch.float64
        entropy = model.top(dtype, model.forward_process.schedule.device).entropy()
    except NotImplementedError:
        return None
    return None if entropy.is_meta else float(entropy)


@dataclass(frozen=True, repr=False, eq=False)
class ImportanceBound(Likelihood):
    r"""The importance-weighted bound on -log p(x_0), in nats, positive as a cost. Printed, it is a table.

    .. math:: -\log \frac1K \sum_{k=1}^K w_k, \qquad w_k = \frac{p_\theta(x_{0:T}^{(k)})}{q(x_{1:T}^{(k)} | x_0)}

    Arguments:
        log_weights: The :math:`\log w_k`, in nats, with shape (K, B).
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
        num_steps: The number of steps T; None for a pair that is not a diffusion's.
        global_kl: The KL of random weights, with shape (); see :class:`Bound`.
    """

    log_weights: Tensor
    event_shape: torch.Size
    levels: int | float | None = None
    num_steps: int | None = None
    global_kl: Tensor | None = None

    @property
    def nats(self) -> Tensor:
        return self.at(self.num_particles)

    @property
    def total(self) -> float:
        """The cost of all data together, in nats: the sum over the data, plus the KL of random weights once.

        In expectation over draws of the weights it is a bound on -log p(x_1, ..., x_B), with the weights integrated
        out.
        """
        return _total(self.nats, self.global_kl)

    def _raised(self, nats: float) -> dict[str, Tensor]:
        return {"log_weights": self.log_weights - nats}

    @property
    def num_particles(self) -> int:
        """The number of particles K."""
        return len(self.log_weights)

    @property
    def effective_sample_size(self) -> Tensor:
        r""":math:`(\sum_k w_k)^2 / \sum_k w_k^2`, in 1..K, with shape (B,): near 1, the bound is loose still."""
        return effective_size(self.log_weights, 0)

    @property
    def pareto_k(self) -> Tensor:
        """Pareto's k of the tail of the weights, with shape (B,): above 0.7 neither their mean nor the effective sample
        size can be trusted; NaN where K is below 21 (:func:`pareto_k`)."""
        return pareto_k(self.log_weights)

    def at(self, num_particles: int) -> Tensor:
        """The bound with k particles, averaged over the K // k groups of k: less noisy than fresh draws.

        Arguments:
            num_particles: k, in 1..K; at 1 it is the bound of the pair under ``Trace_ELBO``.

        Returns:
            The cost in nats, with shape (B,).

        Raises:
            ValueError: If k is not an int in 1..K.
        """
        num_particles = arguments.positive_int("num_particles", num_particles)
        if num_particles > self.num_particles:
            raise ArgumentError("num_particles", f"must be at most K = {self.num_particles}, but it is {num_particles}")
        groups = self.num_particles // num_particles
        weights = self.log_weights[: groups * num_particles].unflatten(0, (groups, num_particles))
        return (math.log(num_particles) - weights.logsumexp(1)).mean(0)

    @property
    def title(self) -> str:
        size = f"effective sample size {float(self.effective_sample_size.mean()):.3g} of K = {self.num_particles}"
        steps = "" if self.num_steps is None else f", T = {self.num_steps}"
        return (
            f"importance-weighted bound on -log p(x_0), {size}{pareto_words(self.pareto_k, self.num_particles)}{steps}"
        )

    def rows(self) -> dict[str, Tensor]:
        smaller = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if k < self.num_particles]
        rows = {f"K = {k}": self.at(k) for k in (*smaller[:1], *smaller[-1:], self.num_particles)}
        return {**rows, **_global_row(self.global_kl)}


@torch.no_grad()
def importance_bound(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    *context: Tensor,
    num_particles: int | None = None,
    memory_budget: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> ImportanceBound:
    r"""The importance-weighted bound: tighter than :func:`bound` the more particles, and -log p(x_0) in the limit.

    The same number as Pyro's ``RenyiELBO(alpha=0)`` of the trajectory pair on one datum; here per datum, in batches of
    trajectories, without Pyro's messages.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_particles: The number K of trajectories per datum: T network evaluations each.
        memory_budget: The memory for the states and activations of one batch of network calls, in bytes; if not
            given, 2^28, or on a GPU about an eighth of its memory.
        generator: A generator or a seed, for the same number each time; torch's global generator if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, which are drawn from it once: a program, called with the data (None for a
            loader) and their context. Required if there are random weights, else not allowed.

    Returns:
        The log weights and the bound made of them.

    Raises:
        ValueError: As :func:`bound`.
        UserWarning: If K is at least 100 and Pareto's k (:func:`pareto_k`) of the weights of some data above 0.7.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), Eq. 8, https://arxiv.org/abs/1509.00519

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=20))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> tighter = pyrodiff.importance_bound(diffusion, torch.randn(50, 2), num_particles=8)
        >>> tighter.log_weights.shape, tighter.nats.shape, bool(tighter.nats.mean() < tighter.at(1).mean())
        (torch.Size([8, 50]), torch.Size([50]), True)
    """
    checks.instance("diffusion", diffusion, Diffusion)
    if num_particles is None and context and not isinstance(context[-1], Tensor):  # a number in the place of a context
        checks.context(context[-1:], 1, diffusion.model.device, "num_particles")
    K, T = arguments.positive_int("num_particles", num_particles), diffusion.num_steps
    evaluated = evaluating(diffusion, generator, guide=guide, given=guided(x_0, context))
    with evaluated as (seed, global_kl), progress_bar(progress, "importance bound") as bar:
        weights, first, start = [], None, 0
        for batch in batches(diffusion, x_0, context, "num_particles"):
            first = first or dry_run(memory_budget, diffusion, batch)
            expect(bar, x_0, K * len(batch) * T)
            weights.append(_log_weights(_Draws(diffusion.model, batch, start, seed, K, first), bar))
            start += len(batch)
    found = ImportanceBound(torch.cat(weights, 1), diffusion.event_shape, diffusion.levels, T, global_kl)
    warn_of_tails(found.pareto_k, K)
    return found


def _log_weights(draws: _Draws, bar: tqdm) -> Tensor:
    """log p(x_0:T) - log q(x_1:T | x_0) of K trajectories per datum, with shape (K, B)."""
    K, model, rows = draws.num_particles, draws.model, draws.dry_run.rows
    width = min(K, draws.rows)
    blocks = [
        (slice(particle, min(particle + width, K)), group)
        for group in draws.groups(max(1, draws.rows // width))
        for particle in range(0, K, width)
    ]
    weights = draws.x_0.new_zeros((K, len(draws.x_0)), dtype=costs_dtype(draws.x_0))
    together = max(1, rows // draws.rows)  # blocks whose networks run as one batch
    for k in range(0, len(blocks), together):
        trajectories = [_Trajectory(draws, *block) for block in blocks[k : k + together]]
        for t in range(model.num_steps, 0, -1):
            steps = [trajectory.step(t) for trajectory in trajectories]
            states = (torch.cat(values).split(rows) for values in zip(*steps, strict=True))
            costs = torch.cat([_step_ratio(draws, t, *part) for part in zip(*states, strict=True)])
            for trajectory, cost in zip(trajectories, costs.split([len(step[0]) for step in steps]), strict=True):
                trajectory.log_weight = trajectory.log_weight - cost
            bar.update(len(costs))
        for trajectory in trajectories:
            weights[trajectory.particles, trajectory.group.data] = trajectory.log_weight.unflatten(
                0, (trajectory.shape[0], -1)
            )
    return weights


def _step_ratio(draws: _Draws, t: int, i: Tensor, x_t: Tensor, x_s: Tensor) -> Tensor:
    """log q(x_s | x_t, x_0) - log p(x_s | x_t) of the step from t of data i, and -log p(x_0 | x_1) at t = 1."""
    data, times = draws.batch.rows(i), torch.full_like(i, t)
    return step_costs(draws.model, data.x_0, times, x_t, data.context, x_s, first=t == 1, later=t > 1)


class _Trajectory:
    """Trajectories for a block of neighbouring data and some particles, drawn state by state.

    Arguments:
        draws: The draws of the batch.
        particles: Which particles.
        group: The data.
    """

    def __init__(self, draws: _Draws, particles: slice, group: _Group) -> None:
        self.draws, self.particles, self.group = draws, particles, group
        self.shape = particles.stop - particles.start, len(group.indices)
        self.index = group.indices.repeat(self.shape[0])
        self.x_0 = draws.x_0[self.index]
        model = draws.model
        self.x_t = self._drawn(model.forward_process.marginal(self.x_0, model.num_steps), model.num_steps + 1)
        x_0, x_T = self._of_batch(self.x_0), self._of_batch(self.x_t)
        law, top = model.forward_process.marginal(x_0, model.num_steps), model.top(x_0.dtype, x_0.device)
        self.log_weight = top.log_prob(x_T) - law.log_prob(x_T)

    def step(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Move on by a step: the indices of the rows' data in the batch, x_t and x_{t-1} (at t = 1, x_1 again)."""
        x_t = self.x_t
        if t > 1:
            self.x_t = self._drawn(self.draws.model.forward_process.posterior(x_t, self.x_0, t), t)
        return self._of_batch(self.index), self._of_batch(x_t), self._of_batch(self.x_t)

    def _drawn(self, law: Distribution, t: int) -> Tensor:
        seed = seed_of(self.draws.seed, self.particles.start, self.particles.stop, t, self.group.number)
        seed_draws(seed, self.x_0.device)
        return law.sample()

    def _of_batch(self, values: Tensor) -> Tensor:
        return values.unflatten(0, self.shape)[:, self.group.inside].flatten(0, 1)
