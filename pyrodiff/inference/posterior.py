r"""Conditioning: samples of the data given an observation, :math:`p(x_0 | y)`, with weights, and the evidence p(y).

Particles move down the chain, from :math:`x_T` to :math:`x_0`. At each t a twist :math:`\psi_t(x_t)` approximates
:math:`p(y | x_t)`; it guides where particles are drawn, and weights correct the error of the approximation:

.. math::
    w_{t-1} = w_t \,
        \frac{p_\theta(x_{t-1} | x_t) \, \psi_{t-1}(x_{t-1})}{q(x_{t-1} | x_t, y) \, \psi_t(x_t)}, \qquad
    \psi_0(x_0) = p(y | x_0)

With any positive twist the mean weight is an unbiased estimate of p(y) under the chain, and weighted samples converge
to the chain's own posterior as their number grows. How many are needed depends on the twist. Particles are resampled,
systematically, when the effective sample size falls below half of their number.

References:
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3,
    https://arxiv.org/abs/2306.17775

    Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023): the covariance by the Jacobian,
    https://arxiv.org/abs/2310.06721
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..likelihood.psis import FEWEST, LIMIT, effective_size, pareto_k
from ..pair.diffusion import Diffusion
from ..running.evaluation import seeded
from .observations import Conditioned, conditioning
from .particles import log_mean, needs_resampling, resampled, systematic
from .twists import GaussianTwist, KnownTwist, Twist

__all__ = ["Posterior", "posterior"]


@dataclass(frozen=True, repr=False, eq=False)
class Posterior:
    """Weighted samples of p(x_0 | y), and the evidence p(y). Printed, it is a table.

    Arguments:
        samples: The x_0, with shape (n, *event_shape), island after island.
        log_weights: Their log weights in nats, with shape (n,); the mean weight is the estimate of p(y).
        effective_sample_size: At x_T, ..., x_0, before resampling, summed over the islands; with shape (T + 1,), in
            1..n.
        num_islands: The number of independent groups of particles.
        pareto_k: The largest :func:`pareto_k` of the weights that the evidence is made of (those before each
            resampling, and the last), with shape (); NaN for fewer than 21 particles, and for bits. Above 0.7 their
            variance may be infinite, and neither the evidence nor its standard error can be trusted.
    """

    samples: Tensor
    log_weights: Tensor
    effective_sample_size: Tensor
    num_islands: int
    pareto_k: Tensor

    @property
    def islands(self) -> Tensor:
        """The log evidence of each island, with shape (num_islands,)."""
        return log_mean(self.log_weights.view(self.num_islands, -1))

    @property
    def log_evidence(self) -> Tensor:
        """log p(y) in nats, with shape (), of the mean over the islands of unbiased estimates of p(y)."""
        return log_mean(self.islands)

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the log evidence, from the islands' differences, with shape (); NaN for one island."""
        ratios = (self.islands - self.log_evidence).exp()
        return ratios.std() / self.num_islands**0.5 if self.num_islands > 1 else ratios.new_tensor(math.nan)

    @property
    def mean(self) -> Tensor:
        """The posterior's mean, with the event_shape."""
        return torch.tensordot(self.log_weights.softmax(0), self.samples.to(self.log_weights), 1)

    @property
    def standard_deviation(self) -> Tensor:
        """The posterior's standard deviation, number by number, with the event_shape."""
        return torch.tensordot(self.log_weights.softmax(0), (self.samples - self.mean) ** 2, 1).sqrt()

    def draw(self, num_samples: int, generator: torch.Generator | int | None = None) -> Tensor:
        """Equally weighted samples, by systematic resampling of the particles.

        Arguments:
            num_samples: How many.
            generator: A generator or a seed; a seed from torch's global generator if not given.

        Returns:
            A tensor with shape ``(num_samples, *event_shape)``, on the device of the particles.

        Raises:
            ValueError: If an argument is of another kind.
        """
        num_samples = arguments.positive_int("num_samples", num_samples)
        with seeded(generator, self.samples.device):
            index = systematic(self.log_weights[None], num_samples)[0]
            return self.samples[index[torch.randperm(num_samples, device=index.device)]]

    def __str__(self) -> str:
        n, ess = len(self.samples), self.effective_sample_size
        lines = [
            f"posterior given an observation, {n} particles in {self.num_islands} islands, T = {len(ess) - 1}",
            f"{'log evidence':34}{float(self.log_evidence):10.4f} ± {float(self.standard_error):.4f} nats",
            f"{'effective sample size at t = 0':34}{float(ess[-1]):10.1f} of {n}",
            f"{f'the least, at t = {len(ess) - 1 - int(ess.argmin())}':34}{float(ess.min()):10.1f}",
        ]
        if n >= FEWEST and not bool(self.pareto_k.isnan()):
            lines.append(f"{'Pareto k, the largest':34}{float(self.pareto_k):10.2f}")
        if len(self.mean.flatten()) <= 8:
            for i, moments in enumerate(torch.stack([self.mean, self.standard_deviation]).flatten(1).T.tolist()):
                lines.append("{:34}{:10.4f}, {:.4f}".format(f"x_0[{i}], mean and deviation", *moments))
        return "\n".join(lines)

    def __repr__(self) -> str:
        evidence = f"{float(self.log_evidence):.6g} ± {float(self.standard_error):.2g} nats"
        return f"<{type(self).__name__}: {len(self.samples)} particles, log evidence {evidence}>"


def posterior(
    diffusion: Diffusion,
    observation: Callable,
    *context: Tensor,
    obs: Tensor | None = None,
    num_particles: int = 64,
    num_islands: int = 4,
    twist: Twist | None = None,
    generator: torch.Generator | int | None = None,
) -> Posterior:
    r"""Draw from :math:`p(x_0 | y)` of a chain by twisted sequential Monte Carlo, and estimate :math:`\log p(y)`.

    Arguments:
        diffusion: The model; a chain of fewer steps, ``diffusion.subchain(times)``, is another model.
        observation: A function of data with shape (n, *event_shape) that returns the distribution of y, with
            batch_shape (n,); or :class:`Inpainting` or :class:`Linear`; or a Pyro program called with these data, whose
            sites are all observed, in a plate of n at dim=-1.
        *context: What is known of the datum besides, for the network: tensors of one row.
        obs: y, with the event_shape of its distribution, if the observation does not hold it.
        num_particles: The total number n of particles, a multiple of the islands.
        num_islands: The number of independent groups, whose differences give the standard error.
        twist: How particles are guided. If not given: :class:`KnownTwist` for exactly known bits and levels; for a
            linear Gaussian observation of a Gaussian chain, :class:`GaussianTwist` and :class:`IsotropicTwist`, each
            with n particles, of which those are returned whose islands agree better.
        generator: A generator or a seed; a seed from torch's global generator if not given.

    Returns:
        Samples, weights and evidence.

    Raises:
        ValueError: If an argument is of another kind or out of range, ``obs`` has another shape than the observation's
            distribution, the twist does not fit the observation or the chain, or there is no default twist.

    Warns:
        UserWarning: If the effective sample size collapsed, Pareto's k of at least 100 particles is above 0.7, or the
            twist's control finds more evidence: then neither samples nor evidence can be trusted.

    References:
        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), Algorithm 1,
        https://arxiv.org/abs/2306.17775

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> first = pyrodiff.Inpainting(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), noise=0.3)
        >>> found = pyrodiff.posterior(diffusion, first, generator=0)
        >>> found.samples.shape, found.log_weights.shape, found.log_evidence.shape
        (torch.Size([64, 2]), torch.Size([64]), torch.Size([]))
    """
    n = arguments.positive_int("num_particles", num_particles)
    islands = arguments.positive_int("num_islands", num_islands)
    if n % islands:
        raise ArgumentError("num_particles", f"must be a multiple of the {islands} islands, but it is {n}")
    with conditioning(diffusion, observation, context, obs, n, generator) as (given, rows):
        given.refuse_exact_densities()
        is_open, twist = twist is None, _default(given) if twist is None else twist
        checks.instance("twist", twist, Twist)
        twist.check(given)
        found, other = _run(given, twist, n, islands, rows), twist.control
        control = None if other is None else _run(given, other, n, islands, rows)
    if control is not None and other is not None:
        if is_open and bool(control.standard_error < found.standard_error):
            found, control, twist, other = control, found, other, twist
        _warn_of_control(found, control, twist, other)
    if not _warn_of_collapse(found, twist):
        _warn_of_tails(found, twist)
    return found


def _default(given: Conditioned) -> Twist:
    """The default twist for an observation, if there is one."""
    if given.known is not None:
        return KnownTwist()
    if given.is_gaussian and given.is_normal:
        return GaussianTwist()
    raise ArgumentError(
        "twist",
        "must be given where the observation is neither linear and Gaussian, of a Gaussian chain, nor exact, "
        "Inpainting(mask, values, noise=0), but it is None: give DenoiserTwist(), or a Twist of your own",
    )


def _run(given: Conditioned, twist: Twist, n: int, islands: int, context: tuple[Tensor, ...]) -> Posterior:
    device = given.diffusion.model.device
    floats = given.dtype if given.dtype.is_floating_point else torch.get_default_dtype()
    psi = log_w = torch.zeros((islands, n // islands), dtype=floats, device=device)
    before: Tensor | None = None  # the states at s + 1
    sizes, tails = [], []
    for s in range(given.diffusion.num_steps, -1, -1):
        if before is not None:
            if bool(needs_resampling(log_w).any()):
                tails.append(_tail(log_w))
            before, psi, log_w = resampled(before, psi, log_w)
        law = given.law(s, before, n, *context)
        q = twist.proposal(given, law, s, before, *context)
        before = x = q.sample()
        times = torch.full((n,), s, device=device)
        now = given.log_likelihood(x) if s == 0 else twist.log_prob(given, x, times, *context)
        _check_twist(now, n, s)
        ratio = 0.0 if q is law else (law.log_prob(x) - q.log_prob(x)).view_as(log_w)
        now = now.view_as(log_w)
        log_w = torch.where(log_w.isneginf(), log_w, log_w + ratio + now - psi)
        psi = now
        sizes.append(effective_size(log_w, -1).sum())
    k = torch.stack([*tails, _tail(log_w)]).amax()
    return Posterior(x, log_w.flatten(), torch.stack(sizes), islands, k)


def _tail(log_w: Tensor) -> Tensor:
    """Pareto's k of the weights of all islands, each divided by its island's mean.

    Weights that are equal up to rounding count as equal.
    """
    mean = log_mean(log_w)[:, None]
    relative = torch.where(mean.isneginf(), log_w, log_w - mean)
    relative = torch.where(relative.amax() < 1e-3, torch.zeros_like(relative), relative)
    return pareto_k(relative.flatten()[:, None])[0]


def _check_twist(value: object, n: int, s: int) -> None:
    name = "observation" if s == 0 else "twist"
    if not isinstance(value, Tensor) or value.shape != (n,):
        raise ArgumentError(
            name, f"must return {n} log probabilities at t = {s}, but it is {arguments.described(value)}"
        )
    if bool((value.isnan() | value.isposinf()).any()):
        raise ArgumentError(name, f"must have finite log probabilities, but at t = {s} some are {float(value.amax())}")


def _warn_of_control(found: Posterior, control: Posterior, twist: Twist, other: Twist) -> None:
    """Warn if another twist finds more evidence: all particles may go wrong and still agree with each other.

    Both estimates of p(y) are unbiased; one that fails is too low with high probability, and much too high very rarely.
    """
    more = float(control.log_evidence - found.log_evidence)
    error = math.hypot(float(found.standard_error.nan_to_num()), float(control.standard_error.nan_to_num()))
    if more > 0.1 + 4 * error:
        name = type(other).__name__
        warnings.warn(
            f"the log evidence is {more:.1f} nats less with {type(twist).__name__} than with {name}, so that neither "
            f"samples nor evidence can be trusted: give twist=pyrodiff.{name}()",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_tails(found: Posterior, twist: Twist) -> None:
    """Warn if the weights that the evidence is a mean of may have an infinite variance."""
    if len(found.samples) >= FEWEST and bool(found.pareto_k > LIMIT):
        warnings.warn(
            f"Pareto k of the weights is {float(found.pareto_k):.2f}, above {LIMIT}, with {type(twist).__name__}: they "
            f"may have no variance, so that neither the evidence nor its standard error can be trusted, and more "
            f"particles help little: give another twist",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_collapse(found: Posterior, twist: Twist) -> bool:
    """Warn if an island's particles were worth little more than one, or if the islands contradict each other."""
    ess, m = found.effective_sample_size, len(found.samples) // found.num_islands
    worst, spread = int(ess.argmin()), float(found.islands.std()) if found.num_islands > 1 else 0.0
    each = float(ess[worst]) / found.num_islands
    collapsed = each < min(2.0, m / 4) or not (spread <= 1 or float(found.standard_error) <= 0.25)
    if collapsed:
        warnings.warn(
            f"the effective sample size collapsed, with {type(twist).__name__}: at t = {len(ess) - 1 - worst} it was "
            f"{each:.1f} of the {m} particles of an island, and the islands' log evidence differs by {spread:.1f} "
            f"nats, so that neither samples nor evidence can be trusted: give more particles or another twist",
            UserWarning,
            stacklevel=3,
        )
    return collapsed
