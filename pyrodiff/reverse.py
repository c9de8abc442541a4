r"""The reverse process p_θ: how noise turns into data.

A reverse process is a module called as ``reverse(x_t, t)`` that returns the distribution
:math:`p_\theta(x_{t-1} | x_t)`; at t = 1 that is :math:`p_\theta(x_0 | x_1)`, which a decoder may change. Any
``torch.nn.Module`` so called will do. Those here read the forward posterior
:math:`q(x_{t-1} | x_t, x_0)` at a denoiser's :math:`\hat x_0`.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, https://arxiv.org/abs/2006.11239

    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 3.1,
    https://arxiv.org/abs/2102.09672
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss

from . import checks
from .denoisers import LogitPrediction, Retimed
from .forward import BinomialForward, Bits, GaussianForward, event_dim, isotropic
from .schedules import Float64Module, like, own, tabulated

__all__ = [
    "BinomialReverse",
    "FixedVariance",
    "ForwardVariance",
    "GaussianReverse",
    "PosteriorVariance",
    "Variance",
]


class Variance(Float64Module, ABC):
    r"""The variance :math:`\sigma_t^2` of a Gaussian reverse process."""

    @abstractmethod
    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        r"""The variance of :math:`p_\theta(x_{t-1} | x_t)`.

        Arguments:
            process: The forward process; in a chain of fewer steps, that of these (:meth:`Diffusion.subchain`), so that
                a variance has to be a function of it, and not of the number t alone.
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).

        Returns:
            A float64 tensor with the shape of ``t``.

        Raises:
            ValueError: If t is not an integer or lies outside 1..T.
        """


@own
class ForwardVariance(Variance):
    r""":math:`\sigma_t^2 = \beta_t`, the variance of :math:`q(x_t | x_{t-1})`.

    The best variance where the data are N(0, I), and, in the limit of small steps, wherever they have a density: the
    right choice for a bound, and the default.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, the first choice.
    """

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.step(t, process.num_steps)
        return process.schedule.beta(t)


@own
class PosteriorVariance(Variance):
    r""":math:`\sigma_t^2 = \tilde\beta_t`, the variance of :math:`q(x_{t-1} | x_t, x_0)`.

    The best variance where the data are a point; where they fill space the bound loses
    :math:`\tfrac12 (r_t - 1 - \log r_t)` nats a dimension and step against :class:`ForwardVariance`, with
    :math:`r_t = e^{\lambda_{t-1} - \lambda_t}` (exactly so if VE, for small :math:`\beta_t` if VP).

    At t = 1, where it is 0, :math:`\tilde\beta_2` takes its place, and :math:`\beta_1` if T = 1.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, the second choice.

        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 85.
    """

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.step(t, process.num_steps)
        if process.num_steps == 1:
            return process.schedule.beta(t)
        t = t.clamp(min=2) if isinstance(t, Tensor) else max(t, 2)
        return process.schedule.posterior(t)[2] ** 2


@own
class FixedVariance(Variance):
    r"""Given variances :math:`\sigma_1^2, \dots, \sigma_T^2`.

    Arguments:
        variances: T positive numbers.

    Raises:
        ValueError: If ``variances`` is empty, not one-dimensional, or has a value that is not positive and finite; on
            a call, if there are not T of them.
    """

    def __init__(self, variances: Sequence[float] | Tensor) -> None:
        super().__init__()
        variances = torch.as_tensor(variances, dtype=torch.float64).detach()
        if variances.dim() != 1 or len(variances) == 0 or not ((variances > 0) & variances.isfinite()).all():
            raise ValueError(f"variances must be a sequence of positive numbers, but they are {variances.tolist()}")
        self.register_buffer("variances", variances)

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        if len(self.variances) != process.num_steps:
            raise ValueError(f"variances must be T = {process.num_steps} numbers, but there are {len(self.variances)}")
        checks.step(t, process.num_steps)
        return self.variances[t - 1]


class GaussianReverse(PyroModule):
    r"""A Gaussian with the forward posterior's mean at :math:`\hat x_0`.

    .. math:: p_\theta(x_{t-1} | x_t) = N\left(\tilde\mu_t(x_t, \hat x_0(x_t, t)), \; \sigma_t^2\right)

    Arguments:
        forward: The forward process.
        denoiser: A module called as ``denoiser(x_t, t)`` that returns :math:`\hat x_0`, with the shape of ``x_t``.
        variance: The variance :math:`\sigma_t^2`: :class:`ForwardVariance` if not given.

    Raises:
        ValueError: If an argument is of another kind, or made for another forward process.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eqs. 1 and 7.

        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 94.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> denoiser = pyrodiff.NoisePrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> pyrodiff.GaussianReverse(forward, denoiser)(torch.zeros(5, 2), t=3).event_shape
        torch.Size([2])
    """

    def __init__(self, forward: GaussianForward, denoiser: nn.Module, variance: nn.Module | None = None) -> None:
        super().__init__()
        variance = ForwardVariance() if variance is None else variance
        checks.instance("forward", forward, GaussianForward)
        checks.instance("denoiser", denoiser, nn.Module)
        checks.instance("variance", variance, nn.Module)
        checks.same_process("denoiser", denoiser, forward)
        self.forward_process, self.denoiser, self.variance = forward, denoiser, variance
        self.variance(forward, 1)  # refuse a sequence of another length now rather than at the first step

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        """p_θ(x_{t-1} | x_t).

        Arguments:
            x_t: The state at time t, with shape (B, *event_shape).
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).

        Returns:
            A distribution with batch_shape (B,) and the event_shape of ``x_t``.

        Raises:
            ValueError: If t is not an integer or lies outside 1..T.
        """
        self.forward_process.earlier(x_t, t)
        return self.at(x_t, self.denoiser(x_t, t), t)

    def at(self, x_t: Tensor, estimate: Tensor, t: int | Tensor) -> dist.Distribution:
        r"""The law at an estimate :math:`\hat x_0` that is given, with the shape of ``x_t``; as of a call otherwise."""
        weight_t, weight_0, _ = self.forward_process.schedule.posterior(t)
        mean = like(weight_t, x_t) * x_t + like(weight_0, x_t) * estimate
        return isotropic(mean, self.variance(self.forward_process, t).sqrt(), event_dim(x_t, t))

    def divergence(self, x_0: Tensor, estimate: Tensor, t: Tensor) -> Tensor:
        r"""KL of the forward posterior and this at an estimate :math:`\hat x_0`, which does not depend on :math:`x_t`.

        .. math:: KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t))
            = \frac{w_0(t)^2}{2 \sigma_t^2} \| x_0 - \hat x_0 \|^2
            + \frac{D}{2} \left(\frac{\tilde\beta_t}{\sigma_t^2} - 1 - \log \frac{\tilde\beta_t}{\sigma_t^2}\right)

        with the weight :math:`w_0(t)` of :math:`x_0` in the posterior's mean.

        Arguments:
            x_0: The data, with shape (B, *event_shape).
            estimate: The estimate of it, with the same shape.
            t: The times, in 2..T, with shape (B,).

        Returns:
            A tensor with shape (B,), in nats.

        References:
            Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 92 and 99.
        """
        parts = [self.forward_process.schedule, self.variance]
        table = tabulated(self, "_divergences", parts, self._divergence_of_all)
        weights = self._weights(t) if table is None else table.index_select(1, t)
        weight, shared = weights.to(x_0.dtype)
        squares = mse_loss(estimate, x_0, reduction="none").flatten(1)
        return torch.addcmul(shared * squares.shape[-1], squares.sum(-1), weight)

    def _weights(self, t: Tensor) -> Tensor:
        """The weight of the squared error in the divergence, and what a number adds to it without any, at times t."""
        _, weight_0, noise = self.forward_process.schedule.posterior(t)
        variance = self.variance(self.forward_process, t)
        ratio = noise**2 / variance
        return torch.stack([weight_0**2 / variance, ratio - 1 - ratio.log()]) / 2

    def _divergence_of_all(self) -> Tensor:
        t = torch.arange(self.forward_process.num_steps + 1, device=self.forward_process.schedule.noise(0).device)
        return self._weights(t.clamp(min=min(2, self.forward_process.num_steps)))

    def subchain(self, forward: GaussianForward) -> "GaussianReverse":
        r"""The reverse process of fewer steps, :math:`p_\theta(x_{\tau_{k-1}} | x_{\tau_k})`, of the same denoiser.

        Arguments:
            forward: The forward process of fewer steps, ``forward.subchain(times)`` of this one's.

        Returns:
            A reverse process that shares the denoiser and its parameters.

        Raises:
            ValueError: If the variance is a sequence (:class:`FixedVariance`) of another length.
        """
        return type(self)(forward, Retimed(self.denoiser, forward.schedule), self.variance)


class BinomialReverse(PyroModule):
    r"""Independent bits, each mixed over what the denoiser believes it to have been.

    .. math:: p_\theta(x_{t-1} | x_t) = \sum_{x_0 \in \{0, 1\}} q(x_{t-1} | x_t, x_0) \, \hat p_\theta(x_0 | x_t)

    for every bit by itself; at t = 1 it is :math:`\hat p_\theta(x_0 | x_1)`.

    Arguments:
        forward: The forward process.
        denoiser: The log odds of :math:`\hat p_\theta`.

    Raises:
        ValueError: If an argument is of another kind, or made for another forward process.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Table App. 1:
        the kernel. Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), Eq. 4: the
        mixture over :math:`x_0`, https://arxiv.org/abs/2107.03006

    Example:
        >>> forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=10), rate=0.2)
        >>> denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP(event_shape=(20,)), forward)
        >>> pyrodiff.BinomialReverse(forward, denoiser)(torch.ones(5, 20), t=3).event_shape
        torch.Size([20])
    """

    def __init__(self, forward: BinomialForward, denoiser: LogitPrediction) -> None:
        super().__init__()
        checks.instance("forward", forward, BinomialForward)
        checks.instance("denoiser", denoiser, LogitPrediction)
        checks.same_process("denoiser", denoiser, forward)
        self.forward_process, self.denoiser = forward, denoiser

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        """p_θ(x_{t-1} | x_t); arguments, result and errors as of :class:`GaussianReverse`."""
        s = self.forward_process.earlier(x_t, t)
        logits = self.denoiser.output(x_t, t)
        odds = [self.forward_process.posterior_logits(x_t, x_t.new_tensor(x_0), t, s) for x_0 in (1, 0)]

        def log_prob(sign: int) -> Tensor:  # log p_θ(x_{t-1} = 1), with sign = -1 log p_θ(x_{t-1} = 0)
            return torch.logaddexp(
                logsigmoid(logits) + logsigmoid(sign * odds[0]), logsigmoid(-logits) + logsigmoid(sign * odds[1])
            )

        return Bits(logits=log_prob(1) - log_prob(-1)).to_event(event_dim(x_t, t))

    def subchain(self, forward: BinomialForward) -> "BinomialReverse":
        """The reverse process of fewer steps, as of :class:`GaussianReverse`."""
        network = Retimed(self.denoiser.network, forward.schedule)
        return type(self)(forward, type(self.denoiser)(network, forward))
