r"""The best chains of fewer steps: the best variance of each step, and the best times, from one pass over data.

Nothing is trained. A chain of the times :math:`\tau_1 < \dots < \tau_K` (:meth:`Diffusion.subchain`) has the bound

.. math:: L_0(\tau_1, \tau_2) + \sum_{k=2}^K L(\tau_{k-1}, \tau_k) + L_T(\tau_K),

in which a step from t to s costs the same in every chain. So both the best variance of each step
(:func:`analytic_variance`) and the best times (:func:`best_subchain`) follow from the costs of single steps. The choice
is fitted to the data: give the training data here, and others to :func:`bound`.

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
    memory_budget: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> AnalyticVariance:
    r"""The variance that makes the bound least for a trained denoiser, for every step of every chain; T network calls
    per datum.

    .. math:: \sigma_{s|t}^2 = \tilde\beta_{s|t}
        + w_0(s, t)^2 \, \frac1D \mathbb{E} \lVert x_0 - \hat x_0(x_t, t) \rVert^2

    Use it in a new reverse process of the same parts, ``GaussianReverse(forward, reverse.denoiser, variance)``, and
    take a subchain only after that: longer steps then get their own variance. The fewer the steps, the larger the gain.

    For the step to the data, s = 0, the variance is the denoiser's mean squared error, which is best for a density
    (:class:`GaussianDecoder`). For a :class:`DiscretizedDecoder`, which scores the bin around a level, there is no
    closed form; the variance is then at least :math:`(\Delta / 8)^2`, with the width :math:`\Delta` of a bin. With
    that, a right estimate costs 6e-5 nats per number, and one that is a level off 10 nats; with the mean squared error
    of an estimate that is almost never wrong, this would have no limit. :class:`SoftmaxDecoder` and
    :class:`TransitionDecoder` do not use it.

    Arguments:
        diffusion: The model: a Gaussian one, whose reverse process has a ``denoiser``. Its own variance is not used.
        x_0: The data, with shape (B, *event_shape), at least 2 of them; or a loader of such batches, or of tuples of
            one and its context. Give the training data, not those that the bound is evaluated on.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_particles: The number of draws of each :math:`x_t` per datum.
        memory_budget: The memory for the states and activations of one batch of network calls, in bytes; if not
            given, 2^28, or on a GPU about an eighth of its memory.
        generator: A generator or a seed, for the same numbers each time; torch's global generator if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, as of :func:`bound`.

    Returns:
        The variance. A relative error :math:`\delta` of it costs :math:`\delta^2 / 4` nats per dimension and step; if
        the standard error of the mean over the data is a tenth or more, there is a warning.

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
    r"""Warn where an uncertain mean squared error is a sizeable part of a variance.

    A step that halves the signal-to-noise ratio has, up to a factor, the variance :math:`e_t + b_t^2 / a_t^2`.
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
    memory_budget: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> Diffusion:
    r"""The chain of K steps with the least bound, with the same networks: :meth:`Diffusion.subchain` at the best times.

    The costs of all steps between two of n candidate times, averaged over data and draws, are the edges of a graph, and
    the best chain is the shortest path of K nodes in it. It begins with the cost :math:`L_0` of the step to the data,
    which may depend on the second time too (:class:`PosteriorVariance`), and ends with that of the prior, :math:`L_T`:
    at T if the prior was given, else wherever that is best. It takes :math:`n` network calls and :math:`n^2 / 2`
    evaluations of the kernels and of the decoder per datum, and memory for n^2 numbers. A reverse process of your own,
    which may use its network in any way, takes :math:`n^2` network calls.

    The choice also fits the noise in the estimated costs. With few data the chain may be no better than an even one:
    give so many data, or particles, that the standard error of a bound is small against the expected gain.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context.
            Give the training data, not those that the bound is evaluated on.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_steps: The number K of steps, at most as many as there are candidates.
        candidates: The times to choose from, increasing ints in 1..T; or their number, for evenly spaced ones (all, if
            T is not larger).
        num_particles: The number of draws of each :math:`x_t` per datum.
        memory_budget: The memory for the states and activations of one batch of network calls, in bytes; if not
            given, 2^28, or on a GPU about an eighth of its memory.
        generator: A generator or a seed, for the same times each time; torch's global generator if not given.
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
    if num_steps is None and not all(isinstance(value, Tensor) for value in context):  # num_steps given by position
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
    """The candidate times, checked."""
    T = diffusion.num_steps
    if arguments.is_int(candidates):
        times = evenly_spaced(min(arguments.positive_int("candidates", candidates), T), T)
    else:
        times = checks.increasing("candidates", candidates, T)
    if diffusion.model.prior is not None and times[-1] != T:
        raise ArgumentError(
            "candidates", f"must end at T = {T}, the time of the given prior, but they are {candidates!r}"
        )
    diffusion.subchain(times)  # raises if it cannot be cut
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
    """Draws of a batch at each time, in pieces of at most ``rows`` rows; they do not depend on pieces and batches.

    They are drawn in blocks of neighbouring data, each with its own seed. The batch begins at ``start`` among all data;
    rows of a block for data outside of it are drawn too, and dropped.
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
    """A network whose outputs are cached by state, time and context, until ``kept`` is cleared.

    Arguments:
        network: The network, or a denoiser, in evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.kept: list[tuple[tuple[Tensor, ...], Tensor | tuple[Tensor, Tensor]]] = []

    def forward(self, *given: Tensor, **options: bool) -> Tensor | tuple[Tensor, Tensor]:
        for known, said in self.kept:  # options are not compared: a reverse process always gives the same
            if len(known) == len(given) and all(map(torch.equal, known, given)):
                return said
        said = self.network(*given, **options)
        self.kept.append((given, said))
        return said


def _asked_once(reverse: nn.Module) -> tuple[nn.Module, _Asked]:
    """The reverse process with a cached network, and the cache; a process of unknown kind is returned as it is."""
    if runs(reverse, GaussianReverse):
        asked = _Asked(reverse.denoiser)
        return with_parts(reverse, denoiser=asked), asked
    if isinstance(reverse, BinomialReverse):
        asked = _Asked(reverse.denoiser.network)
        return with_parts(reverse, denoiser=with_parts(reverse.denoiser, network=asked)), asked
    return reverse, _Asked(nn.Identity())


class _Costs:
    """The costs of the steps between any two of n times, in nats, summed over the given states.

    Arguments:
        diffusion: The diffusion.
        times: The times.
        alone: Whether the chain is to have one step only.
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
        """Add the costs of these states: of all steps from their time, including the step to the data."""
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
        """The indices of the ``num_steps`` times whose chain costs least, by dynamic programming."""
        # cost[i]: of the best chain so far that ends at time i; before[k][i]: the index of the time before i in it
        cost, before = self.only, []
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
