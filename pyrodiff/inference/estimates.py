r"""Estimates of the log density of a diffusion, which has no closed form: the bound at one t, and the flow.

The *one-step estimate* draws one t, or a few,

.. math::
    \log p(z) \ge -L_T(z) - T \, \mathbb{E}_{t, \, q(x_t | z)} \left[ L_{t-1}(z, x_t) \right],

an unbiased estimate of the bound on the right, by one network call. Its variance is large, since :math:`T L_0` is large
and drawn once in T times. The terms :math:`L^r` of the exact chain of a Gaussian :math:`r` (the *reference*) are
correlated with it, and their sum has the expectation :math:`-\log r(z)`, so that

.. math::
    \log r(z) - \left[ L_T - L_T^r \right](z)
    - \frac{T}{n} \sum_{j=1}^n \left[ L_{t_j - 1} - L_{t_j - 1}^r \right](z, x_{t_j})

has the same expectation and a small variance, for the same network calls: the reference is a control variate.

It may be used in a sum of log densities, an ELBO, and nowhere else: inside a logarithm (of a mean of weights, of a sum
over classes) it is biased, and at a guide's site it would bound the ELBO from the wrong side. There it is refused, with
the name of the caller, and the density of the *probability flow* can be used.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eq. 5, https://arxiv.org/abs/2006.11239

    Score-based Generative Modeling in Latent Space (Vahdat et al., 2021), section 3: a diffusion as the prior of a
    latent, https://arxiv.org/abs/2106.05931

    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3,
    https://arxiv.org/abs/2011.13456
"""

from abc import ABC, abstractmethod
from typing import TypeGuard

import pyro.distributions as dist
import torch
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients, home, precisely
from ..model.decoders import GaussianDecoder
from ..pair.diffusion import Diffusion, evenly_spaced
from ..pair.entropy import relative_entropy
from ..pair.flow import Flow, check_flow
from ..pair.terms import prior_cost, runs, step_costs
from ..pair.times import LowDiscrepancyDrawing
from ..process.forward import Forward, GaussianForward, event_dim
from ..running.evaluation import evaluation_mode
from ..sampling.ancestral import AncestralSampler
from ..sampling.flow import FlowSampler
from ..sampling.sampler import Sampler

__all__ = ["Estimate", "FlowEstimate", "OneStepEstimate", "broadcasts"]


class Estimate(ABC):
    """An estimate of log p.

    Attributes:
        is_bound: Whether its mean is a bound, so that it may only be summed.
    """

    is_bound: bool

    @abstractmethod
    def check(self, diffusion: Diffusion) -> None:
        """Refuse a diffusion that has no such estimate."""

    @abstractmethod
    def sampler(self, diffusion: Diffusion) -> Sampler:
        """A sampler of the distribution whose density it is."""

    @abstractmethod
    def log_prob(self, diffusion: Diffusion, x: Tensor, shape: torch.Size, context: list[Tensor]) -> Tensor:
        """The estimate, with this shape, of data whose batch_shape has as many dimensions and broadcasts to it."""


class OneStepEstimate(Estimate):
    """The bound at a few draws of t: unbiased, with gradients to the data, their context and all parameters.

    Times are spread evenly over the draws for each datum and over the data. If a class that the data do not depend on
    is enumerated, all classes share the draws.

    Arguments:
        num_draws: The number n of draws of t per datum; a network call has n rows per datum.
        reference: Mean and variance of a Gaussian, tensors that broadcast to a datum; the closer to the data's moments,
            the less variance. None: mean 0 and variance 1 for a :class:`GaussianForward` whose data have a density,
            else no reference. False: no reference.

    Raises:
        ValueError: If ``num_draws`` is no positive int, or ``reference`` something else.

    Example:
        >>> pyrodiff.OneStepEstimate(num_draws=4, reference=(torch.tensor([1.0, -2.0]), torch.tensor(0.5))).num_draws
        4
    """

    is_bound = True

    def __init__(self, num_draws: int = 1, reference: tuple[Tensor, Tensor] | bool | None = None) -> None:
        self.num_draws = arguments.positive_int("num_draws", num_draws)
        if reference is not None and reference is not False:
            if not isinstance(reference, tuple | list) or len(reference) != 2:
                raise ArgumentError(
                    "reference",
                    f"must be a pair (mean, variance), None or False, but it is {arguments.described(reference)}",
                )
            mean, variance = map(checks.numbers, ("mean of reference", "variance of reference"), reference)
            if not checks.holds((variance > 0) & variance.isfinite()):
                raise ValueError(f"variance of reference must be positive, but it is {variance.tolist()}")
            reference = mean, variance
        self.reference = reference

    def check(self, diffusion: Diffusion) -> None:
        if not isinstance(self.reference, tuple):
            return
        if not _is_gaussian(diffusion.forward_process):
            raise ArgumentError(
                "reference",
                f"must be None or False where the forward process is no GaussianForward, whose exact chain "
                f"it would be, but the process is {diffusion.forward_process!r}",
            )
        for name, value in zip(("mean", "variance"), self.reference, strict=True):
            if not broadcasts(value.shape, diffusion.event_shape):
                raise ValueError(
                    f"{name} of reference must broadcast to the event_shape {tuple(diffusion.event_shape)}, but its "
                    f"shape is {tuple(value.shape)}"
                )

    def sampler(self, diffusion: Diffusion) -> Sampler:
        return AncestralSampler(diffusion)

    def log_prob(self, diffusion: Diffusion, x: Tensor, shape: torch.Size, context: list[Tensor]) -> Tensor:
        model, n, event = diffusion.model, self.num_draws, diffusion.event_shape
        lead, x = x.shape[: x.dim() - len(event)], x.reshape(-1, *event)

        def wide(values: Tensor) -> Tensor:  # a row per draw and datum, broadcast from the data to ``shape``
            rest = values.shape[1:]
            return values.reshape(n, *lead, *rest).expand(n, *shape, *rest).flatten(0, len(shape))

        with precisely():
            repeated = x.expand(n, *x.shape).flatten(0, 1)
            t = self._times(n * len(x), diffusion)
            x_t = diffusion.forward_process.marginal(repeated, t)()
            once, at_t = -prior_cost(model, x), torch.zeros((), dtype=x_t.dtype, device=x.device)
            process, moments = diffusion.forward_process, self._moments(diffusion, x)
            if moments is not None and _is_gaussian(process):
                once = once + _of_data(process, *moments, x)
                at_t = wide(_of_steps(process, *moments, repeated, t, x_t))
        context = [values.expand(n, *values.shape).flatten(0, len(shape)) for values in context]
        costs = step_costs(model, wide(repeated), wide(t), wide(x_t), context, later=diffusion.num_steps > 1)
        with precisely():
            return once.reshape(lead) - diffusion.num_steps * (costs - at_t).reshape(n, *shape).mean(0)

    def _times(self, size: int, diffusion: Diffusion) -> Tensor:
        """Evenly spread times: u_k = (u + k / size) mod 1, so that the n draws of a datum are 1 / n apart."""
        device, drawing = diffusion.model.device, LowDiscrepancyDrawing()
        u = drawing.uniforms(torch.empty(size, dtype=torch.float64, device=home(device)))()
        return drawing(u, diffusion.num_steps)[0].to(device)

    def _moments(self, diffusion: Diffusion, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the reference, in the dtype of the data; None where there is none."""
        if isinstance(self.reference, tuple):
            mean, variance = (value.to(x.dtype).to(x.device) for value in self.reference)
            return mean, variance
        if self.reference is False or diffusion.levels is not None or not _is_gaussian(diffusion.forward_process):
            return None
        return x.new_zeros(()), x.new_ones(())


class FlowEstimate(Estimate):
    """The log density of the probability flow, exact and not a bound: valid also inside a logarithm and for NUTS.

    It is another model than the chain, close to it if the denoiser is exact and the steps are small. It can be
    differentiated as :func:`ode_log_prob`, with an exact divergence: one gradient per dimension and evaluation. Modules
    are in evaluation mode meanwhile. By default the site is also drawn from the flow (:class:`FlowSampler`), so that it
    may be a guide's site.

    Arguments:
        num_steps: The number of evenly spaced steps of the chain that defines the flow; all T if not given.
        tolerance, max_steps: As of :func:`ode_log_prob`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> law = pyrodiff.DiffusionDistribution(diffusion, estimate=pyrodiff.FlowEstimate())
        >>> z = torch.randn(5, 2)
        >>> torch.allclose(law.log_prob(z), pyrodiff.ode_log_prob(diffusion, z).log_prob.float(), atol=1e-3)
        True
    """

    is_bound = False

    def __init__(self, num_steps: int | None = None, tolerance: float = 1e-5, max_steps: int = 1000) -> None:
        self.num_steps = None if num_steps is None else arguments.positive_int("num_steps", num_steps)
        self.tolerance = arguments.number("tolerance", tolerance, 0, 1)
        self.max_steps = arguments.positive_int("max_steps", max_steps)

    def check(self, diffusion: Diffusion) -> None:
        check_flow(diffusion, self.tolerance, self.max_steps)
        if not runs(diffusion.model.decoder, GaussianDecoder):
            raise ArgumentError(
                "diffusion",
                f"must end without a decoder to have the density of a flow, but it has a "
                f"{type(diffusion.model.decoder).__name__}: give estimate=OneStepEstimate()",
            )
        self._chain(diffusion)

    def sampler(self, diffusion: Diffusion) -> Sampler:
        return FlowSampler(diffusion, self.tolerance, self.max_steps, num_steps=self.num_steps)

    def log_prob(self, diffusion: Diffusion, x: Tensor, shape: torch.Size, context: list[Tensor]) -> Tensor:
        rows = x.expand(shape + diffusion.event_shape).reshape(-1, *diffusion.event_shape)
        flat = tuple(values.reshape(len(rows), *values.shape[len(shape) :]) for values in context)
        chain = self._chain(diffusion)
        flow = Flow(chain, self.tolerance, self.max_steps, num_probes=0, differentiable=torch.is_grad_enabled())
        with evaluation_mode(diffusion):
            x_T, change, _ = flow.carry(rows, 0, chain.num_steps, flat)
            return (flow.log_prob_of_prior(x_T) + change[0]).reshape(shape).to(x.device, x.dtype)

    def _chain(self, diffusion: Diffusion) -> Diffusion:
        if self.num_steps is None:
            return diffusion
        return diffusion.subchain(evenly_spaced(self.num_steps, diffusion.num_steps))


def broadcasts(shape: torch.Size, larger: torch.Size) -> bool:
    """Whether a shape broadcasts to a larger one.

    Arguments:
        shape: The shape.
        larger: The other one.
    """
    try:
        return torch.broadcast_shapes(shape, larger) == larger
    except RuntimeError:
        return False


# The exact chain of a Gaussian


def _is_gaussian(process: Forward) -> TypeGuard[GaussianForward]:
    """Whether the forward process has the unchanged kernels of :class:`GaussianForward`, as the reference assumes."""
    kernels = "transition", "marginal", "posterior"
    return isinstance(process, GaussianForward) and all(
        getattr(type(process), kernel) is getattr(GaussianForward, kernel) for kernel in kernels
    )


def _of_data(process: GaussianForward, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """log r(x) + L_T^r of the reference r = N(mean, variance), with shape (R,)."""
    T, event = process.num_steps, x.dim() - 1
    a, b = process.scales(x, T)
    top = dist.Normal((a * mean).expand_as(x), (a**2 * variance + b**2).sqrt()).to_event(event)
    law = dist.Normal(mean, variance.sqrt()).expand(x.shape).to_event(event)
    return law.log_prob(x) + relative_entropy(process.marginal(x, T), top)


def _of_steps(process: GaussianForward, mean: Tensor, variance: Tensor, x: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
    """L_{t-1}^r, and L_0^r where t = 1, with the shape of t."""
    a, b = process.scales(x_t, t)
    weight_t, weight_0, noise = coefficients(process.schedule.posterior(t), x_t)
    total = a**2 * variance + b**2  # the variance of x_t; given x_t, x_0 is Gaussian, and so x_{t-1}
    loc = weight_t * x_t + weight_0 * (b**2 * mean + a * variance * x_t) / total
    scale = (noise**2 + weight_0**2 * variance * b**2 / total).sqrt()
    kernel = dist.Normal(loc, scale).to_event(event_dim(x_t, t))
    if process.num_steps == 1:
        return -kernel.log_prob(x)
    later = relative_entropy(process.posterior(x_t, x, t.clamp(min=2)), kernel)
    return torch.where(t == 1, -kernel.log_prob(x), later)
