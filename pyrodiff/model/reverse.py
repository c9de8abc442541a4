r"""The reverse process p_θ: how noise turns into data.

A reverse process is a module called as ``reverse(x_t, t, *context)`` that returns the distribution
:math:`p_\theta(x_{t-1} | x_t)`; at t = 1 that is :math:`p_\theta(x_0 | x_1)`, which a decoder may change. Any
``torch.nn.Module`` called like this will do. Those here are the forward posterior :math:`q(x_{t-1} | x_t, x_0)` with a
denoiser's :math:`\hat x_0` in the place of :math:`x_0`.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, https://arxiv.org/abs/2006.11239
"""

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients
from ..process.forward import BinomialForward, Bits, GaussianForward, event_dim, with_parts
from .denoisers import LogitPrediction, Retimed
from .variances import ForwardVariance, LearnedVariance

__all__ = [
    "BinomialReverse",
    "D3PMReverse",
    "GaussianReverse",
]


class GaussianReverse(nn.Module):
    r"""A Gaussian with the forward posterior's mean at :math:`\hat x_0`.

    .. math:: p_\theta(x_{t-1} | x_t) = N\left(\tilde\mu_t(x_t, \hat x_0(x_t, t)), \; \sigma_t^2\right)

    Arguments:
        forward: The forward process.
        denoiser: A module called as ``denoiser(x_t, t, *context)`` that returns :math:`\hat x_0`, with the shape of
            ``x_t``.
        variance: The variance :math:`\sigma_t^2`, a module called as ``variance(forward, t)``: :class:`ForwardVariance`
            if not given. With a :class:`LearnedVariance`, called as ``variance(forward, t, v)``, the denoiser is called
            as ``denoiser(x_t, t, *context, variance=True)`` and returns :math:`\hat x_0` and v.

    Raises:
        ValueError: If an argument is of another kind, or made for another forward process; on a call, if the denoiser
            returns no v for a learned variance.

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
        self._refuse_variance(forward)  # now rather than at the first step

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> dist.TorchDistribution:
        """p_θ(x_{t-1} | x_t).

        Arguments:
            x_t: The state at time t, with shape (B, *event_shape).
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).
            *context: What is known of each datum, for the denoiser: tensors of B rows.

        Returns:
            A distribution with batch_shape (B,) and the event_shape of ``x_t``.

        Raises:
            ValueError: If t is not an integer or lies outside 1..T, or the denoiser takes another context.
        """
        process, denoiser = self.forward_process, self.denoiser
        checks.step("x_t", x_t, t, None, process.num_steps)
        weight_t, weight_0, _ = coefficients(process.schedule.posterior(t), x_t)
        learned = {"variance": True} if isinstance(self.variance, LearnedVariance) else {}
        checks.takes_context("denoiser", denoiser, context, **learned)
        estimate = denoiser(x_t, t, *context, **learned)
        if learned and not (isinstance(estimate, tuple) and len(estimate) == 2):
            raise ArgumentError(
                "denoiser",
                f"must return a pair when it is called with variance=True, the data and what the variance is "
                f"made of, but it is {arguments.described(estimate)}",
            )
        estimate, *v = estimate if learned else (estimate,)
        checks.returned("denoiser", estimate, x_t.shape, x_t)
        variance = self.variance(process, t, *v)
        if learned:
            checks.returned("variance", variance, x_t.shape, x_t)
            deviation = variance.sqrt()
        else:
            _check_variance(variance, t)
            (deviation,) = coefficients(variance.sqrt()[None], x_t)
        mean = torch.addcmul(weight_t * x_t, weight_0, estimate)
        return dist.Normal(mean, deviation).to_event(event_dim(x_t, t))

    def subchain(self, forward: GaussianForward) -> "GaussianReverse":
        r"""The reverse process of fewer steps, :math:`p_\theta(x_{\tau_{k-1}} | x_{\tau_k})`, of the same denoiser.

        Arguments:
            forward: The forward process of fewer steps, ``forward.subchain(times)`` of this one's.

        Returns:
            A reverse process that shares the denoiser, the variance and their parameters.
        """
        self._refuse_variance(forward)
        return with_parts(self, forward_process=forward, denoiser=Retimed(self.denoiser, forward.schedule))

    def _refuse_variance(self, forward: GaussianForward) -> None:
        """Refuse variances whose number is not T, or that cannot be shortened."""
        if not isinstance(self.variance, LearnedVariance):
            self.variance(forward, 1)


def _check_variance(variance: Tensor, t: int | Tensor) -> None:
    """Check, while Pyro validates, for one variance per time: one per dimension would be taken for one per datum."""
    shape = t.shape if isinstance(t, Tensor) else torch.Size()
    if checks.validating() and not (
        isinstance(variance, Tensor) and (variance.shape == shape or variance.numel() == 1)
    ):
        raise ArgumentError(
            "variance",
            f"must return a tensor of the shape {tuple(shape)} of t, but it is {arguments.described(variance)}; "
            f"derive from LearnedVariance for one for each number of a state",
        )


class BinomialReverse(nn.Module):
    r"""Independent bits: the forward posterior averaged over the denoiser's distribution of the bit of the data.

    .. math:: p_\theta(x_{t-1} | x_t) = \sum_{x_0 \in \{0, 1\}} q(x_{t-1} | x_t, x_0) \, \hat p_\theta(x_0 | x_t)

    independently for every bit: the law of total probability, exact where :math:`\hat p_\theta` is. At t = 1 it is
    :math:`\hat p_\theta(x_0 | x_1)`. :class:`D3PMReverse` is the other way to use the same network.

    Arguments:
        forward: The forward process.
        denoiser: It gives :math:`\hat p_\theta` by the log odds of its method ``output``; the probability that a call
            returns would be less precise near 0 and 1. A denoiser of your own overrides ``output``.

    Raises:
        ValueError: If an argument is of another kind, or made for another forward process.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Table App. 1:
        independent bits. Vector Quantized Diffusion Model for Text-to-Image Synthesis (Gu et al., 2022), Eq. 11: the
        mixture over :math:`x_0`, https://arxiv.org/abs/2111.14822

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

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> dist.TorchDistribution:
        """p_θ(x_{t-1} | x_t); arguments, result and errors as of :class:`GaussianReverse`."""
        checks.step("x_t", x_t, t, None, self.forward_process.num_steps)
        return Bits(logits=self._log_odds(self.denoiser.output(x_t, t, *context), x_t, t)).to_event(event_dim(x_t, t))

    def _log_odds(self, logits: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The log odds of x_{t-1} = 1, given those of the bit of the data."""
        odds = [self.forward_process.posterior_logits(x_t, x_t.new_full((), x_0), t, t - 1) for x_0 in (1, 0)]

        def log_prob(sign: int) -> Tensor:  # log p_θ(x_{t-1} = 1), with sign = -1 log p_θ(x_{t-1} = 0)
            return torch.logaddexp(
                logsigmoid(logits) + logsigmoid(sign * odds[0]), logsigmoid(-logits) + logsigmoid(sign * odds[1])
            )

        return log_prob(1) - log_prob(-1)

    def subchain(self, forward: BinomialForward) -> "BinomialReverse":
        """The reverse process of fewer steps, as of :class:`GaussianReverse`."""
        network = Retimed(self.denoiser.network, forward.schedule)
        denoiser = with_parts(self.denoiser, forward_process=forward, network=network)
        return with_parts(self, forward_process=forward, denoiser=denoiser)


class D3PMReverse(BinomialReverse):
    r"""Independent bits by D3PM's parametrisation: the joint of x_{t-1} and x_t, averaged over the predicted bit of the
    data.

    .. math:: p_\theta(x_{t-1} | x_t) \propto
        \sum_{x_0 \in \{0, 1\}} q(x_{t-1}, x_t | x_0) \, \hat p_\theta(x_0 | x_t)
        = q(x_t | x_{t-1}) \sum_{x_0} q(x_{t-1} | x_0) \, \hat p_\theta(x_0 | x_t)

    independently for every bit, which is the forward posterior with the probability :math:`\hat x_0` in the place of
    the bit. At t = 1 it is :math:`\hat p_\theta(x_0 | x_1)`, as in their code. It is another kernel than
    :class:`BinomialReverse`: :math:`x_t`, on which :math:`\hat p_\theta` depends already, counts once more.

    Arguments, errors: see :class:`BinomialReverse`.

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), Eq. 4,
        https://arxiv.org/abs/2107.03006
    """

    def _log_odds(self, logits: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        if self.forward_process.num_steps == 1:
            return logits
        later = t.clamp(min=2) if isinstance(t, Tensor) else max(t, 2)  # also at t = 1, for finite gradients
        joined = self.forward_process.posterior_logits(x_t, logits.sigmoid(), later, later - 1)
        is_last = torch.as_tensor(t, device=x_t.device) == 1
        return torch.where(is_last.reshape(is_last.shape + (1,) * (x_t.dim() - is_last.dim())), logits, joined)
