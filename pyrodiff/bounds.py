r"""Bounds on the likelihood of a diffusion, datum by datum: its T terms, and the importance-weighted one.

.. math::
    -\log p_\theta(x_0) \;\le\; -\mathbb{E}_q \log \frac1K \sum_{k=1}^K
        \frac{p_\theta(x_{0:T}^{(k)})}{q(x_{1:T}^{(k)} | x_0)}
    \;\le\; L_T + \sum_{t=2}^{T} L_{t-1} + L_0

In :func:`bound` every :math:`x_t` is drawn from :math:`q(x_t | x_0)` by itself, which leaves the mean of each term as
it is and lets all t run in one batch (Luo 2022, Eqs. 57-58). :func:`importance_bound` needs whole trajectories.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), https://arxiv.org/abs/2208.11970

    Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks, processes
from .diffusion import Diffusion
from .evaluation import batches, evaluating, expect, progress_bar, rows_within
from .likelihoods import Likelihood
from .randomness import seed_draws
from .terms import prior_cost, step_costs

__all__ = ["Bound", "ImportanceBound", "bound", "importance_bound"]


@dataclass(frozen=True, repr=False, eq=False)
class Bound(Likelihood):
    """The terms of the bound on -log p(x_0), in nats, positive as a cost. Printed, it is a table.

    Arguments:
        prior: L_T, with shape (B,).
        denoising: L_{t-1} for t = 2..T, with shape (T - 1, B). Where only some t were drawn, a term is scaled by the
            inverse probability of its t, and 0 if that was not drawn: means over the data are unbiased all the same.
        reconstruction: L_0, with shape (B,).
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
        prior_entropy: The entropy of p(x_T) in nats; None where it is not known.
    """

    prior: Tensor
    denoising: Tensor
    reconstruction: Tensor
    event_shape: torch.Size
    levels: int | None = None
    prior_entropy: float | None = None

    @property
    def nats(self) -> Tensor:
        return self.prior + self.denoising.sum(0) + self.reconstruction

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return len(self.denoising) + 1

    @property
    def K(self) -> Tensor:
        """The lower bound on log2 p(x_0) of 2015, in bits a datum, with shape (B,): greater is better.

        References:
            Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Eq. 14 and
            Table 1, https://arxiv.org/abs/1503.03585
        """
        return -self.bits

    @property
    def L_null(self) -> float:
        """log2 p of the data of 2015 under p(x_T) alone, in bits: minus its entropy. Table 1 there shows K - L_null.

        Raises:
            ValueError: If the entropy of the prior is not known.
        """
        if self.prior_entropy is None:
            raise ValueError("prior must have an entropy in closed form for L_null, but it has none")
        return -self.prior_entropy / math.log(2)

    @property
    def title(self) -> str:
        return f"bound on -log p(x_0), T = {self.num_steps}"

    def _raised(self, nats: float) -> dict[str, Tensor]:
        return {"reconstruction": self.reconstruction + nats}

    def rows(self) -> dict[str, Tensor]:
        return {
            "L_T      prior": self.prior,
            "ΣL_t-1   denoising": self.denoising.sum(0),
            "L_0      reconstruction": self.reconstruction,
            "bound": self.nats,
        }


@torch.no_grad()
def bound(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    num_particles: int = 1,
    memory_budget: int = 2**28,
    num_times: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    sharded: bool = False,
) -> Bound:
    """The bound on -log p(x_0), each of its T terms estimated with fresh draws.

    Modules are in evaluation mode meanwhile. Random weights (each ``PyroSample``) are drawn once, for all of it: the
    bound is the one given those weights. The bound of fewer steps is that of :meth:`Diffusion.subchain`.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples that begin with one.
        num_particles: The number of draws of each x_t that a term is the mean of.
        memory_budget: What the states and activations of one batch of network calls may take, in bytes. The bound
            does not depend on it but for the draws.
        num_times: How many of the T - 1 denoising terms are drawn for each datum and particle, one at random from each
            of so many equal parts of 2..T: unbiased at a fraction of the cost. All terms if not given.
        generator: A generator or a seed, for the same number each time; torch's global source if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        sharded: Whether the processes of ``torch.distributed`` share the work. All call it with the same model and
            data, and get the same bound, that of one process alone with the same seed.

    Returns:
        The terms, in nats, a datum each.

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
    checks.positive_int("num_particles", num_particles)
    T = diffusion.num_steps
    if num_times is not None:
        checks.positive_int("num_times", num_times)
        if num_times >= T:
            raise ValueError(f"num_times must be at most T - 1 = {T - 1}, but it is {num_times}")
    checks.one_of("sharded", sharded, (False, True))
    parts = _parts(T, T - 1 if num_times is None else num_times)
    with evaluating(diffusion, generator, agreed=sharded), progress_bar(progress, "bound") as bar:
        bounds, share, rows = [], _Part(sharded), 0
        for batch in batches(diffusion, x_0):
            rows = rows or rows_within(memory_budget, diffusion, batch)
            expect(bar, x_0, batch, (len(parts) - 1) * num_particles * len(batch))
            bounds.append(_bound(diffusion, batch, num_particles, parts.to(batch.device), rows, share, bar))
    return Bound.joined(bounds)


def _parts(T: int, num_times: int) -> Tensor:
    """The bounds of {1}, and of equal parts of 2..T: the first of each, and T + 1."""
    return torch.cat([torch.ones(1, dtype=torch.long), 2 + torch.arange(num_times + 1) * (T - 1) // max(num_times, 1)])


def _bound(
    diffusion: Diffusion, x_0: Tensor, num_particles: int, parts: Tensor, rows: int, share: "_Part", bar: tqdm
) -> Bound:
    B, P, T = len(x_0), num_particles, diffusion.num_steps
    steps = x_0.new_zeros(T * B)
    ends = (0, P * B, (len(parts) - 1) * P * B)  # rows of t = 1, which the decoder scores, and all others
    chunks = [(start, min(start + rows, end)) for first, end in pairwise(ends) for start in range(first, end, rows)]
    for start, stop in share.of(chunks, x_0.device):
        row = torch.arange(start, stop, device=x_0.device)
        part, i = row // (P * B), row % B
        first, size = parts[part], parts[part + 1] - parts[part]
        t = first + (torch.rand(len(row), device=x_0.device, dtype=torch.float64) * size).long()
        with checks.trusting():  # the laws were checked as their bytes were counted
            costs = step_costs(diffusion.model, x_0.index_select(0, i), t, first=start < P * B, later=start >= P * B)
        steps.index_add_(0, (t - 1) * B + i, costs * size.to(x_0.dtype))
        bar.update((stop - start) * share.count)
    (steps,) = share.joined([steps.reshape(T, B) / P])
    return Bound(
        prior=torch.stack([prior_cost(diffusion.model, x_0) for _ in range(P)]).mean(0),
        denoising=steps[1:],
        reconstruction=steps[0],
        event_shape=diffusion.event_shape,
        levels=diffusion.levels,
        prior_entropy=_prior_entropy(diffusion),
    )


class _Part:
    """Of several processes, the part of the work that this one does; all of it, if it is not shared.

    Each piece of work draws from a source of its own, so that it does not matter who does it.
    """

    def __init__(self, sharded: bool) -> None:
        self.number, self.count = (processes.number(), processes.count()) if sharded else (0, 1)
        self.source = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def of(self, work: list, device: torch.device) -> Iterator:
        """The pieces of this process, the random source seeded for each."""
        for k, piece in enumerate(work):
            seed = int(torch.randint(2**62, (), generator=self.source))
            if k % self.count == self.number:
                seed_draws(seed, device)
                yield piece
        seed_draws(int(torch.randint(2**62, (), generator=self.source)), device)

    def joined(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums of the pieces of all processes."""
        return processes.together(tensors) if self.count > 1 else tensors


def _prior_entropy(diffusion: Diffusion) -> float | None:
    try:
        return float(diffusion.model.top(torch.float64).entropy())
    except NotImplementedError:
        return None


@dataclass(frozen=True, repr=False, eq=False)
class ImportanceBound(Likelihood):
    r"""The importance-weighted bound on -log p(x_0), in nats, positive as a cost. Printed, it is a table.

    .. math:: -\log \frac1K \sum_{k=1}^K w_k, \qquad w_k = \frac{p_\theta(x_{0:T}^{(k)})}{q(x_{1:T}^{(k)} | x_0)}

    Arguments:
        log_weights: The :math:`\log w_k`, in nats, with shape (K, B).
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
        num_steps: The number of steps T.
    """

    log_weights: Tensor
    event_shape: torch.Size
    levels: int | None = None
    num_steps: int | None = None

    @property
    def nats(self) -> Tensor:
        return self.at(self.num_particles)

    def _raised(self, nats: float) -> dict[str, Tensor]:
        return {"log_weights": self.log_weights - nats}

    @property
    def num_particles(self) -> int:
        """The number of particles K."""
        return len(self.log_weights)

    @property
    def effective_sample_size(self) -> Tensor:
        r""":math:`(\sum_k w_k)^2 / \sum_k w_k^2`, in 1..K, with shape (B,): near 1, the bound is loose still."""
        return (2 * self.log_weights.logsumexp(0) - (2 * self.log_weights).logsumexp(0)).exp()

    def at(self, num_particles: int) -> Tensor:
        """The bound with fewer particles, the mean over as many groups of so many as there are: less noisy than fresh.

        Arguments:
            num_particles: k, in 1..K; at 1 it is the bound of the pair under ``Trace_ELBO``.

        Returns:
            The cost in nats, with shape (B,).

        Raises:
            ValueError: If k is not an int in 1..K.
        """
        checks.positive_int("num_particles", num_particles)
        if num_particles > self.num_particles:
            raise ValueError(f"num_particles must be at most K = {self.num_particles}, but it is {num_particles}")
        groups = self.num_particles // num_particles
        weights = self.log_weights[: groups * num_particles].unflatten(0, (groups, num_particles))
        return (math.log(num_particles) - weights.logsumexp(1)).mean(0)

    @property
    def title(self) -> str:
        size = f"effective sample size {float(self.effective_sample_size.mean()):.3g} of K = {self.num_particles}"
        return f"importance-weighted bound on -log p(x_0), {size}, T = {self.num_steps}"

    def rows(self) -> dict[str, Tensor]:
        smaller = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if k < self.num_particles]
        return {f"K = {k}": self.at(k) for k in (*smaller[:1], *smaller[-1:], self.num_particles)}


@torch.no_grad()
def importance_bound(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    num_particles: int,
    memory_budget: int = 2**28,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
) -> ImportanceBound:
    r"""The importance-weighted bound: tighter than :func:`bound` the more particles, and -log p(x_0) in the limit.

    The same number as Pyro's ``RenyiELBO(alpha=0)`` of the trajectory pair on one datum; a datum, a batch of
    trajectories at a time, without a message of Pyro's.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples that begin with one.
        num_particles: The number K of trajectories a datum: T network evaluations each.
        memory_budget: What the states and activations of one batch of network calls may take, in bytes.
        generator: A generator or a seed, for the same number each time; torch's global source if not given.
        progress: Whether to show a progress bar, where there is a terminal.

    Returns:
        The log weights and the bound made of them.

    Raises:
        ValueError: As :func:`bound`.

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
    checks.positive_int("num_particles", num_particles)
    K, T = num_particles, diffusion.num_steps
    with evaluating(diffusion, generator), progress_bar(progress, "importance bound") as bar:
        weights = []
        for batch in batches(diffusion, x_0):
            B, rows = len(batch), rows_within(memory_budget, diffusion, batch)
            expect(bar, x_0, batch, K * B * T)
            chunks = torch.arange(K * B, device=batch.device).split(rows)
            weights.append(torch.cat([_log_weights(diffusion, batch[row % B], bar) for row in chunks]).reshape(K, B))
    return ImportanceBound(torch.cat(weights, 1), diffusion.event_shape, diffusion.levels, T)


def _log_weights(diffusion: Diffusion, x_0: Tensor, bar: tqdm) -> Tensor:
    """log p(x_0:T) - log q(x_1:T | x_0) of one trajectory a datum, with shape (B,)."""
    model, q, T = diffusion.model, diffusion.forward_process, diffusion.num_steps
    law = q.marginal(x_0, T)
    x = law.sample()
    log_weight = model.top(x_0.dtype).log_prob(x) - law.log_prob(x)
    for t in range(T, 1, -1):
        kernel, law = model.kernel(x, t), q.posterior(x, x_0, t)
        x = law.sample()
        log_weight += kernel.log_prob(x) - law.log_prob(x)
        bar.update(len(x))
    bar.update(len(x))
    return log_weight + model.decoded(model.kernel(x, 1), x).log_prob(x_0)
