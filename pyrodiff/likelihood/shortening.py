r"""Chains of fewer steps at their best: the variance of each step, and the times, from one pass over data.

Nothing is trained. A chain of the times :math:`\tau_1 < \dots < \tau_K` (:meth:`Diffusion.subchain`) has the bound

.. math:: L_0(\tau_1, \tau_2) + \sum_{k=2}^K L(\tau_{k-1}, \tau_k) + L_T(\tau_K),

in which a step from t to s costs the same in every chain, so that both the best variance of each step
(:func:`analytic_variance`) and the best times (:func:`best_subchain`) come from what single steps cost. What is chosen
by a bound is chosen for the data that it is of: give the data of the training here, and others to :func:`bound`.

References:
    Analytic-DPM (Bao et al., 2022), Theorem 1 and section 4, https://arxiv.org/abs/2201.06503

    Learning to Efficiently Sample from Diffusion Probabilistic Models (Watson et al., 2021),
    https://arxiv.org/abs/2106.03802
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64, home, precisely
from ..base.randomness import seed_draws, seed_of
from ..model.reverse import BinomialReverse, GaussianReverse
from ..model.variances import AnalyticVariance
from ..pair.diffusion import Diffusion, evenly_spaced
from ..pair.terms import prior_cost, runs, step_costs
from ..process.forward import GaussianForward, with_parts
from ..process.quantization import bin_width
from ..running.evaluation import Batch, batches, dry_run, evaluating, expect, guided, progress_bar

__all__ = ["analytic_variance", "best_subchain"]

_ROWS, _NUMBERS = 2**10, 2**18  # in a block of draws, at most


@torch.no_grad()
def analytic_variance(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    *context: Tensor,
    num_particles: int = 1,
    memory_budget: int = 2**28,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> AnalyticVariance:
    r"""The variance of least bound for a trained denoiser, of every step of every chain, by T network calls per datum.

    .. math:: \sigma_{s|t}^2 = \tilde\beta_{s|t}
        + w_0(s, t)^2 \, \frac1D \mathbb{E} \lVert x_0 - \hat x_0(x_t, t) \rVert^2

    It goes into a reverse process of the same parts, ``GaussianReverse(forward, reverse.denoiser, variance)``, which is
    to be cut after that, if at all: it gives longer steps their own variance. The fewer the steps, the more it gains.

    The step to the data, s = 0, has the denoiser's mean squared error itself, which is the best of a density
    (:class:`GaussianDecoder`). For a :class:`DiscretizedDecoder`, which scores the bin around a level, there is no
    closed form; it is then the larger of that and of :math:`(\Delta / 8)^2`, with the width :math:`\Delta` of a bin:
    where the estimate is right this costs 6e-5 nats a number, and where it is one level off 10 nats, which with the
    error of an estimate that is next to never wrong would have no limit. :class:`SoftmaxDecoder` and
    :class:`TransitionDecoder` do not read it.

    Arguments:
        diffusion: The model: a Gaussian one, whose reverse process has a ``denoiser``. Its own variance plays no part.
        x_0: The data, with shape (B, *event_shape), at least 2 of them; or a loader of such batches, or of tuples of
            one and its context. Those of the training, not those that the bound is to be of.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_particles: The number of draws of each :math:`x_t` per datum.
        memory_budget: What the states and activations of one batch of network calls may take, in bytes.
        generator: A generator or a seed, for the same numbers each time; torch's global source if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, as of :func:`bound`.

    Returns:
        The variance. A relative error :math:`\delta` of it costs a step :math:`\delta^2 / 4` nats per dimension; where
        the standard error of the mean over so few data makes it a tenth, a warning says so.

    Raises:
        ValueError: As :func:`bound`; if the forward process is not Gaussian, the reverse process has no denoiser, or
            there is a single datum.

    References:
        Analytic-DPM (Bao et al., 2022), Theorem 1, as a mean over data,
        https://arxiv.org/abs/2201.06503

        Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models (Bao et al., 2022),
        https://arxiv.org/abs/2206.07309: for any mean, by its error.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=20))
        >>> denoiser = pyrodiff.NoisePrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> def bounded(variance, x_0=0.3 * torch.randn(200, 2)):
        ...     reverse = pyrodiff.GaussianReverse(forward, denoiser, variance)
        ...     return pyrodiff.bound(pyrodiff.Diffusion(forward, reverse, (2,)).subchain([1, 5, 20]), x_0).mean
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> variance = pyrodiff.analytic_variance(diffusion, 0.3 * torch.randn(500, 2))
        >>> bool(bounded(variance) < bounded(pyrodiff.PosteriorVariance()))
        True
    """
    denoiser, num_particles = _denoiser(diffusion), arguments.positive_int("num_particles", num_particles)
    T, device = diffusion.num_steps, diffusion.forward_process.schedule.device
    sums, start, first = torch.zeros(2, T, dtype=torch.float64, device=device), 0, None
    evaluated = evaluating(diffusion, generator, guide=guide, given=guided(x_0, context))
    with evaluated as (seed, _), progress_bar(progress, "analytic variance") as bar:
        for batch in batches(diffusion, x_0, context, "num_particles"):
            if isinstance(x_0, Tensor):
                _refuse_one(len(batch))
            first = first or dry_run(memory_budget, diffusion, batch)
            expect(bar, x_0, T * num_particles * len(batch))
            for state in _states(diffusion, batch, start, range(1, T + 1), seed, num_particles, first.rows):
                data, x_t = state.data, state.x_t
                estimate = denoiser(x_t, state.times(state.t), *data.context)
                error = (float64(data.x_0) - float64(estimate)).square().flatten(1).mean(1)
                sums[:, state.t - 1] += torch.stack([error.sum(), error.square().sum()])
                bar.update(len(data))
            start += len(batch)
    _refuse_one(start)
    mean, square = sums / (num_particles * start)
    _warn_of_few_data(diffusion, mean, (square - mean**2).clamp(min=0).sqrt() / start**0.5, start)
    levels = diffusion.levels
    return AnalyticVariance(mean, (bin_width(levels) / 8) ** 2 if arguments.is_int(levels) else 0.0)


def _denoiser(diffusion: Diffusion) -> nn.Module:
    checks.instance("diffusion", diffusion, Diffusion)
    process, reverse = diffusion.forward_process, diffusion.reverse
    if not isinstance(process, GaussianForward):
        raise ArgumentError(
            "diffusion",
            f"must be of a GaussianForward, since the variance is a Gaussian kernel's, but its forward "
            f"process is a {type(process).__name__}",
        )
    denoiser = getattr(reverse, "denoiser", None)
    if not isinstance(denoiser, nn.Module):
        raise ArgumentError(
            "diffusion",
            f"must have a reverse process with a denoiser, whose error is to be measured, but its "
            f"{type(reverse).__name__} has none: give it as an attribute denoiser, a module called as denoiser(x_t, t, "
            f"*context) that returns the data, or use GaussianReverse",
        )
    return denoiser


def _refuse_one(number: int) -> None:
    if number < 2:
        raise ArgumentError("x_0", f"must be at least 2 data, whose mean error the variance is, but there is {number}")


def _warn_of_few_data(diffusion: Diffusion, mean: Tensor, error: Tensor, number: int) -> None:
    r"""Warn where a mean that is a real part of a variance is uncertain.

    A step that takes half of the signal-to-noise ratio has the variance :math:`e_t + b_t^2 / a_t^2`, but for a factor.
    """
    if mean.is_meta:
        return
    snr = diffusion.forward_process.schedule.log_snr(torch.arange(1, len(mean) + 1, device=mean.device)).exp()
    relative = error * snr / (mean * snr + 1)
    worst = int(relative.argmax())
    if relative[worst] > 0.1:
        warnings.warn(
            f"the variance of a step from t = {worst + 1} is {100 * float(relative[worst]):.0f} % uncertain, as the "
            f"mean squared error over {number} data is: give more data",
            UserWarning,
            stacklevel=4,
        )


@torch.no_grad()
def best_subchain(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    *context: Tensor,
    num_steps: int | None = None,
    candidates: int | Sequence[int] = 100,
    num_particles: int = 1,
    memory_budget: int = 2**28,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> Diffusion:
    r"""The chain of K steps with the least bound, of the same networks: :meth:`Diffusion.subchain` of its times.

    The costs of all steps between two of n candidates, each the mean over data and draws, make a graph, in which the
    chain is the shortest path of K nodes: one from the cost :math:`L_0` of the step to the data, which may depend on
    the second time too (:class:`PosteriorVariance`), to that of the prior, :math:`L_T`. It ends at T where the prior
    was given, and elsewhere where that is best. With many candidates it costs :math:`n` network calls and
    :math:`n^2 / 2` evaluations of the kernels and of the decoder per datum, besides n^2 numbers of memory: where a
    reverse process is of one's own, which may use its network in any way, that is :math:`n^2` network calls.

    The costs are means, and what is noise in them is chosen too. With few data the chain may be no better than an even
    one: give so many, or so many particles, that the standard error of a bound is small against what is to be gained.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context.
            Those of the training, not those that the bound is to be of.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_steps: The number K of steps, at most as many as there are candidates.
        candidates: The times among which to choose, increasing ints in 1..T; or so many, evenly spaced from 1 to T,
            and all if T is not above it.
        num_particles: The number of draws of each :math:`x_t` per datum.
        memory_budget: What the states and activations of one batch of network calls may take, in bytes.
        generator: A generator or a seed, for the same times each time; torch's global source if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, as of :func:`bound`.

    Returns:
        The diffusion of K steps, which shares its parameters; ``.forward_process.schedule.times`` are the times.

    Raises:
        ValueError: As :func:`bound` and :meth:`Diffusion.subchain`; if ``num_steps`` or ``candidates`` are out of
            range, or no chain has a finite bound.

    References:
        Learning to Efficiently Sample from Diffusion Probabilistic Models (Watson et al., 2021): a shortest
        path, https://arxiv.org/abs/2106.03802

        Analytic-DPM (Bao et al., 2022): the same with the best variances, https://arxiv.org/abs/2201.06503

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=20))
        >>> denoiser = pyrodiff.NoisePrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> short = pyrodiff.best_subchain(diffusion, torch.randn(100, 2) / 2, num_steps=4)
        >>> short.num_steps, len(short.forward_process.schedule.times)
        (4, 4)
    """
    checks.instance("diffusion", diffusion, Diffusion)
    if num_steps is None and not all(isinstance(value, Tensor) for value in context):  # a number in its place
        checks.context(context, 1, diffusion.model.device, "num_steps")
    times, num_particles = _candidates(diffusion, candidates), arguments.positive_int("num_particles", num_particles)
    num_steps = arguments.positive_int("num_steps", num_steps)
    if num_steps > len(times):
        raise ArgumentError(
            "num_steps", f"must be at most {len(times)}, the number of candidates, but it is {num_steps}"
        )
    costs, start, first = _Costs(diffusion, times, num_steps == 1), 0, None
    evaluated = evaluating(diffusion, generator, guide=guide, given=guided(x_0, context))
    with evaluated as (seed, _), progress_bar(progress, "best subchain") as bar:
        for batch in batches(diffusion, x_0, context, "num_steps"):
            first = first or dry_run(memory_budget, diffusion, batch)
            expect(bar, x_0, len(times) * num_particles * len(batch))
            for state in _states(diffusion, batch, start, times, seed, num_particles, first.rows):
                costs.add(state)
                bar.update(len(state.data))
            start += len(batch)
    return diffusion.subchain([times[i] for i in costs.shortest(num_steps)])


def _candidates(diffusion: Diffusion, candidates: int | Sequence[int]) -> tuple[int, ...]:
    """The times, refused where no chain of them can be."""
    T = diffusion.num_steps
    if arguments.is_int(candidates):
        times = evenly_spaced(min(arguments.positive_int("candidates", candidates), T), T)
    else:
        times = checks.increasing("candidates", candidates, T)
    if diffusion.model.prior is not None and times[-1] != T:
        raise ArgumentError(
            "candidates", f"must end at T = {T}, the time of the given prior, but they are {candidates!r}"
        )
    diffusion.subchain(times)  # which refuses what cannot be cut
    return times


class _State(NamedTuple):
    """Draws of the states of some data at one time.

    Arguments:
        data: The data.
        t: The time.
        x_t: Draws of q(x_t | x_0).
    """

    data: Batch
    t: int
    x_t: Tensor

    def times(self, t: int) -> Tensor:
        """A time for each of the data."""
        return torch.full((len(self.data),), t, device=self.x_t.device)


def _states(
    diffusion: Diffusion, batch: Batch, start: int, times: Iterable[int], seed: int, num_particles: int, rows: int
) -> Iterator[_State]:
    """Draws of a batch at each time, in pieces of at most so many rows, whatever pieces and batches there are.

    They are drawn in blocks of neighbouring data, each from a seed of its own; for data of a block that the batch does
    not have, which begins at ``start`` among all data, draws are made too and left out.
    """
    x_0, B = batch.x_0, len(batch)
    size = max(1, min(_ROWS, _NUMBERS // max(1, diffusion.event_shape.numel())))
    for t in times:
        for number in range(start // size, (start + B - 1) // size + 1):
            before = number * size - start
            index = (torch.arange(size, device=x_0.device) + before).clamp(0, B - 1)
            inside = slice(max(0, -before), min(size, B - before))
            for particle in range(num_particles):
                seed_draws(seed_of(seed, particle, t, number), x_0.device)
                with precisely():
                    x_t = diffusion.forward_process.marginal(x_0[index], t).sample()[inside]
                for i, part in zip(index[inside].split(rows), x_t.split(rows), strict=True):
                    yield _State(batch.rows(i), t, part)


class _Asked(nn.Module):
    """A network that is asked once for one state, time and context: what it said is kept until it is to be forgotten.

    Arguments:
        network: The network, or a denoiser, in evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.kept: list[tuple[tuple[Tensor, ...], Tensor | tuple[Tensor, Tensor]]] = []

    def forward(self, *given: Tensor, **options: bool) -> Tensor | tuple[Tensor, Tensor]:
        for known, said in self.kept:  # with the same options, which a reverse process does not change
            if len(known) == len(given) and all(map(torch.equal, known, given)):
                return said
        said = self.network(*given, **options)
        self.kept.append((given, said))
        return said


def _asked_once(reverse: nn.Module) -> tuple[nn.Module, _Asked]:
    """The reverse process with a network that is asked once; itself, where it is not known what it asks."""
    if runs(reverse, GaussianReverse):
        asked = _Asked(reverse.denoiser)
        return with_parts(reverse, denoiser=asked), asked
    if isinstance(reverse, BinomialReverse):
        asked = _Asked(reverse.denoiser.network)
        return with_parts(reverse, denoiser=with_parts(reverse.denoiser, network=asked)), asked
    return reverse, _Asked(nn.Identity())


class _Costs:
    """What the steps between two of n times cost, in nats, summed over the states that it is given.

    Arguments:
        diffusion: The diffusion.
        times: The times.
        alone: Whether the chain is to be of one step, and else of more.
    """

    def __init__(self, diffusion: Diffusion, times: Sequence[int], alone: bool) -> None:
        self.whole, self.times, self.alone = diffusion, times, alone
        model, n = diffusion.model, len(times)
        reverse, self.asked = _asked_once(model.reverse)
        self.chain = Diffusion(model.forward_process, reverse, model.event_shape, model.decoder)
        new = torch.full((2, n, n), torch.inf, dtype=torch.float64, device=home(model.device))
        self.steps, self.first = new.masked_fill(new.new_ones(n, n).triu(1).bool(), 0)  # from t_j to t_i; L_0(t_i, t_j)
        self.last = new.new_zeros(n)
        if model.prior is not None:
            self.last[:-1] = torch.inf
        self.only = new.new_zeros(n)  # L_0 of a chain of one step

    def add(self, state: _State) -> None:
        """Add what these states cost: all steps from their time, and all steps to the data."""
        i, t = self.times.index(state.t), state.t
        self.asked.kept.clear()
        if self.last[i].isfinite():
            ending = self.whole if self.whole.model.prior is not None else self.chain.subchain([t])
            with precisely():
                self.last[i] += self._sum(prior_cost(ending.model, state.data.x_0, state.x_t).expand(len(state.data)))
        if self.alone:
            self.only[i] += self._cost(state, [t], 1)
            return
        for j, s in enumerate(self.times[:i]):
            self.steps[j, i] += self._cost(state, [s, t], 2)
        for j, u in enumerate(self.times[i + 1 :], i + 1):
            self.first[i, j] += self._cost(state, [t, u], 1)

    def _cost(self, state: _State, times: list[int], k: int) -> Tensor:
        """The cost of step k of the chain of these times."""
        data, model = state.data, self.chain.subchain(times).model
        return self._sum(
            step_costs(model, data.x_0, state.times(k), state.x_t, data.context, first=k == 1, later=k > 1)
        )

    def _sum(self, costs: Tensor) -> Tensor:
        return float64(costs).sum().to(self.steps.device)

    def shortest(self, num_steps: int) -> list[int]:
        """The indices of so many times, whose chain costs least."""
        cost, before = self.only, []  # of the best chain that ends at each time; the time before, in each step of it
        for k in range(1, num_steps):
            cost, earlier = ((self.first if k == 1 else cost[:, None]) + self.steps).min(0)
            before.append(earlier)
        cost, i = (cost + self.last).min(0)
        if not checks.holds(cost.isfinite()):
            raise ArgumentError(
                "diffusion",
                f"must have a chain of {num_steps} steps with a finite bound, but among these candidates the "
                f"least is {float(cost)}",
            )
        path = [int(i)]
        for earlier in reversed(before):
            path.append(int(earlier[path[-1]]))
        return path[::-1]
