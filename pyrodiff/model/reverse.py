r"""The reverse process p_θ: how noise turns into data.

A reverse process is a module called as ``reverse(x_t, t, *context)`` that returns the distribution
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
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..base import checks
from ..base.precision import Float64Module, coefficients
from ..process.forward import BinomialForward, Bits, GaussianForward, event_dim, with_parts
from ..process.schedules import Schedule, SubSchedule
from .denoisers import LogitPrediction, Retimed

__all__ = [
    "BinomialReverse",
    "D3PMReverse",
    "FixedLargeVariance",
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


class ForwardVariance(Variance):
    r""":math:`\sigma_t^2 = \beta_t`, the variance of :math:`q(x_t | x_{t-1})`.

    The best variance where the data are N(0, I), and, in the limit of small steps, wherever they have a density: the
    right choice for a bound, and the default.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, the first choice.
    """

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.time("t", t, process.num_steps, low=1)
        return process.schedule.beta(t)


class FixedLargeVariance(Variance):
    r""":math:`\sigma_t^2 = \beta_t`, but :math:`\tilde\beta_2` at t = 1: Ho's and OpenAI's "fixed large".

    In their code, and in no paper, the step to the data, which a discretised decoder scores, has the smaller variance
    of :class:`PosteriorVariance`. With T = 1 it is :math:`\beta_1`.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), their code: ``FIXED_LARGE`` in
        ``gaussian_diffusion.py``, https://github.com/openai/improved-diffusion
    """

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.time("t", t, process.num_steps, low=1)
        variance = process.schedule.beta(t)
        if process.num_steps == 1:
            return variance
        first = torch.as_tensor(t == 1, device=variance.device)
        return torch.where(first, _posterior_variance(process.schedule, t), variance)


class PosteriorVariance(Variance):
    r""":math:`\sigma_t^2 = \tilde\beta_t`, the variance of :math:`q(x_{t-1} | x_t, x_0)`.

    The best variance where the data are a point; where they fill space the bound loses
    :math:`\tfrac12 (r_t - 1 - \log r_t)` nats per dimension and step against :class:`ForwardVariance`, with
    :math:`r_t = e^{\lambda_{t-1} - \lambda_t}` (exactly so if VE, for small :math:`\beta_t` if VP).

    At t = 1, where it is 0, :math:`\tilde\beta_2` takes its place, and :math:`\beta_1` if T = 1.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, the second choice.

        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 85.
    """

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.time("t", t, process.num_steps, low=1)
        return _posterior_variance(process.schedule, t)


class FixedVariance(Variance):
    r"""Given variances :math:`\sigma_1^2, \dots, \sigma_T^2`.

    In a chain of fewer steps (:meth:`Diffusion.subchain`) a step has the variance that follows from what
    :math:`\sigma_t^2` says of the data given :math:`x_t`. A step from t to any s has

    .. math:: \mathrm{Var}(x_s | x_t) = \tilde\beta_{s|t} + w_0(s, t)^2 \, \mathrm{Var}(x_0 | x_t),

    with the weight :math:`w_0` of :math:`x_0` in the posterior's mean; s = t - 1 gives
    :math:`\mathrm{Var}(x_0 | x_t)`, and any other s the variance of the longer step. So the :math:`\beta_t` of a VP
    schedule become those of the shorter chain, and the :math:`\tilde\beta_t` as well. Variances below
    :math:`\tilde\beta_t`, which say nothing of that, keep their ratio to it (at t = 1, to :math:`\tilde\beta_2`).

    Arguments:
        variances: T positive numbers.

    Raises:
        ValueError: If ``variances`` is empty, not one-dimensional, requires a gradient, or has a value that is not
            positive and finite; on a call, if there are not T of them, of the process or of the one that it is a
            shorter chain of.

    References:
        Analytic-DPM (Bao et al., 2022), Theorem 1: the optimal variance of a step, from the variance of the data given
        :math:`x_t`, https://arxiv.org/abs/2201.06503
    """

    def __init__(self, variances: Sequence[float] | Tensor) -> None:
        super().__init__()
        variances = checks.numbers("variances", variances)
        if variances.dim() != 1 or len(variances) == 0 or not checks.holds((variances > 0) & variances.isfinite()):
            raise ValueError(f"variances must be a sequence of positive numbers, but they are {variances.tolist()}")
        self.register_buffer("variances", variances)

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.time("t", t, process.num_steps, low=1)
        return self._of_step(process.schedule, t)

    def _of_step(self, schedule: Schedule, t: int | Tensor) -> Tensor:
        if schedule.num_steps == len(self.variances):
            if not isinstance(t, Tensor):
                return self.variances[int(t) - 1]
            return self.variances.index_select(0, t.to(self.variances.device).reshape(-1) - 1).reshape(t.shape)
        if not isinstance(schedule, SubSchedule):
            raise ValueError(f"variances must be T = {schedule.num_steps} numbers, but there are {len(self.variances)}")
        whole, time = schedule.schedule, schedule.times_at(t)
        variance = self._of_step(whole, time)
        (_, weight, deviation), (_, weight_short, deviation_short) = whole.posterior(time), schedule.posterior(t)
        of_data = (variance - deviation**2) / weight**2  # Var(x_0 | x_t)
        ratio = variance / _posterior_variance(whole, time)
        found = deviation_short**2 + weight_short**2 * of_data
        known = variance > (1 + 1e-9) * deviation**2  # else, but for rounding, nothing is said of the data
        return torch.where(known, found, ratio.clamp(max=1) * _posterior_variance(schedule, t))


def _posterior_variance(schedule: Schedule, t: int | Tensor) -> Tensor:
    """The variance of the posterior, at t = 1 that of t = 2, and beta_1 where there is no such step."""
    if schedule.num_steps == 1:
        return schedule.beta(t)
    return schedule.posterior(t.clamp(min=2) if isinstance(t, Tensor) else max(t, 2))[2] ** 2


def _check_variance(variance: Tensor, t: int | Tensor) -> None:
    """One number for each time, while Pyro validates: one for each dimension would be taken for one for each datum."""
    shape = t.shape if isinstance(t, Tensor) else torch.Size()
    if checks.validating() and not (
        isinstance(variance, Tensor) and (variance.shape == shape or variance.numel() == 1)
    ):
        raise ValueError(
            f"variance must return a tensor of the shape {tuple(shape)} of t, but it is {checks.described(variance)}"
        )


class GaussianReverse(nn.Module):
    r"""A Gaussian with the forward posterior's mean at :math:`\hat x_0`.

    .. math:: p_\theta(x_{t-1} | x_t) = N\left(\tilde\mu_t(x_t, \hat x_0(x_t, t)), \; \sigma_t^2\right)

    Arguments:
        forward: The forward process.
        denoiser: A module called as ``denoiser(x_t, t, *context)`` that returns :math:`\hat x_0`, with the shape of
            ``x_t``.
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

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> dist.Distribution:
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
        checks.step(x_t, t, None, process.num_steps)
        weight_t, weight_0, _ = coefficients(process.schedule.posterior(t), x_t)
        variance = self.variance(process, t)
        _check_variance(variance, t)
        (deviation,) = coefficients(variance.sqrt()[None], x_t)
        checks.takes_context("denoiser", denoiser, context)
        estimate = denoiser(x_t, t, *context)
        checks.returned("denoiser", estimate, x_t.shape, x_t)
        mean = torch.addcmul(weight_t * x_t, weight_0, estimate)
        return dist.Normal(mean, deviation).to_event(event_dim(x_t, t))

    def subchain(self, forward: GaussianForward) -> "GaussianReverse":
        r"""The reverse process of fewer steps, :math:`p_\theta(x_{\tau_{k-1}} | x_{\tau_k})`, of the same denoiser.

        Arguments:
            forward: The forward process of fewer steps, ``forward.subchain(times)`` of this one's.

        Returns:
            A reverse process that shares the denoiser, the variance and their parameters.
        """
        self.variance(forward, 1)  # refuse now what cannot be shortened
        return with_parts(self, forward_process=forward, denoiser=Retimed(self.denoiser, forward.schedule))


class BinomialReverse(nn.Module):
    r"""Independent bits, each the forward posterior averaged over what the denoiser believes the datum's bit to be.

    .. math:: p_\theta(x_{t-1} | x_t) = \sum_{x_0 \in \{0, 1\}} q(x_{t-1} | x_t, x_0) \, \hat p_\theta(x_0 | x_t)

    for every bit by itself: the law of total probability, exact where :math:`\hat p_\theta` is. At t = 1 it is
    :math:`\hat p_\theta(x_0 | x_1)`. :class:`D3PMReverse` is the other way to use the same network.

    Arguments:
        forward: The forward process.
        denoiser: The log odds of :math:`\hat p_\theta`: its ``output`` is read, not the probability that a call
            returns, which near 0 and 1 would be less precise. A denoiser of one's own changes that method.

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

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> dist.Distribution:
        """p_θ(x_{t-1} | x_t); arguments, result and errors as of :class:`GaussianReverse`."""
        checks.step(x_t, t, None, self.forward_process.num_steps)
        return Bits(logits=self._log_odds(self.denoiser.output(x_t, t, *context), x_t, t)).to_event(event_dim(x_t, t))

    def _log_odds(self, logits: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The log odds of x_{t-1} = 1, given those of the datum's bit."""
        odds = [self.forward_process.posterior_logits(x_t, x_t.new_tensor(x_0), t, t - 1) for x_0 in (1, 0)]

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
    r"""Independent bits by D3PM's parametrisation: what the network believes of the datum, joined with the whole step.

    .. math:: p_\theta(x_{t-1} | x_t) \propto
        \sum_{x_0 \in \{0, 1\}} q(x_{t-1}, x_t | x_0) \, \hat p_\theta(x_0 | x_t)
        = q(x_t | x_{t-1}) \sum_{x_0} q(x_{t-1} | x_0) \, \hat p_\theta(x_0 | x_t)

    for every bit by itself, which is the forward posterior with the probability :math:`\hat x_0` in the place of the
    bit. At t = 1 it is :math:`\hat p_\theta(x_0 | x_1)`, as in their code. It is another kernel than
    :class:`BinomialReverse`: :math:`x_t`, on which :math:`\hat p_\theta` depends already, counts once more.

    Arguments, errors: see :class:`BinomialReverse`.

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), Eq. 4,
        https://arxiv.org/abs/2107.03006
    """

    def _log_odds(self, logits: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        if self.forward_process.num_steps == 1:
            return logits
        later = t.clamp(min=2) if isinstance(t, Tensor) else max(t, 2)  # also where t = 1, for finite gradients
        joined = self.forward_process.posterior_logits(x_t, logits.sigmoid(), later, later - 1)
        is_last = torch.as_tensor(t == 1, device=x_t.device)
        return torch.where(is_last.reshape(is_last.shape + (1,) * (x_t.dim() - is_last.dim())), logits, joined)
