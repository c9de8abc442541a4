r"""Samplers that use the denoiser of a Gaussian diffusion: solvers of the probability flow, and stochastic variants.

With :math:`y = x_t / a_t` and :math:`\sigma = b_t / a_t` the flow with the marginals of the diffusion, whatever its
schedule, is

.. math:: \frac{dy}{d\sigma} = \frac{y - \hat x_0}{\sigma} = \hat\epsilon, \qquad
    \hat\epsilon = \frac{x_t - a_t \hat x_0}{b_t} .

If :math:`\hat x_0` is held constant from t to an earlier s, the solution is

.. math:: x_s = a_s \hat x_0 + b_s \hat\epsilon
    = \frac{b_s}{b_t} x_t - a_s \left(e^{-h} - 1\right) \hat x_0, \qquad h = \frac{\lambda_s - \lambda_t}{2},

which is DDIM's step; the others improve on the :math:`\hat x_0` in it. Here s is t - 1 in the chain of the steps that
are taken. All coefficients are computed in float64, and cast to the dtype of the state.

The last step of a solver, from t = 1, is :math:`\hat x_0`. For quantised data that is a mean and no level:
``pyrodiff.to_levels`` rounds it, and :class:`AncestralSampler` draws a level by the decoder.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients
from ..pair.diffusion import Diffusion
from ..process.forward import GaussianForward
from ..process.schedules import Schedule, SubSchedule
from .sampler import Sampler, drawn

__all__ = ["DDIMSampler", "DPMSolverSampler", "HeunSampler", "PredictorCorrectorSampler"]


class _GaussianSampler(Sampler):
    """A sampler of a Gaussian diffusion that uses its denoiser."""

    def __init__(self, diffusion: Diffusion, **options: Any) -> None:
        checks.instance("diffusion", diffusion, Diffusion)
        name, process, reverse = type(self).__name__, diffusion.forward_process, diffusion.reverse
        if not isinstance(process, GaussianForward):
            raise ArgumentError(
                "diffusion",
                f"must have a GaussianForward for {name}, but its forward process is a "
                f"{type(process).__name__}: use AncestralSampler, which samples any",
            )
        if not isinstance(getattr(reverse, "denoiser", None), nn.Module):
            raise ArgumentError(
                "diffusion",
                f"must have a reverse process with a denoiser, called as denoiser(x_t, t, *context), for "
                f"{name}, but its {type(reverse).__name__} has none: build it of GaussianReverse, or use "
                f"AncestralSampler, which samples any",
            )
        super().__init__(diffusion, **options)
        self._check_chain()

    def _choose(self, num_steps: int | None) -> None:
        super()._choose(num_steps)
        self._check_chain()

    def _check_chain(self) -> None:
        """Refuse steps that this sampler cannot take."""


class _FlowSampler(_GaussianSampler):
    """A solver, whose sample is the denoiser's estimate at x_1."""

    def last(self, x_1: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return _estimate(self.chain, x_1, t, *context)


class _LogSNRSampler(_FlowSampler):
    """A solver in the log signal-to-noise ratio, which works best with steps that are even in it."""

    def spaced(self, num_steps: int) -> tuple[int, ...]:
        """Times that are evenly spaced in the log signal-to-noise ratio, :meth:`Schedule.even_times`."""
        return self.diffusion.forward_process.schedule.even_times(num_steps)


def _estimate(diffusion: Diffusion, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
    """The denoiser's estimate of x_0, checked."""
    denoiser = cast(nn.Module, diffusion.reverse.denoiser)
    checks.takes_context("denoiser", denoiser, context)
    x_0 = denoiser(x_t, t, *context)
    checks.returned("denoiser", x_0, x_t.shape, x_t)
    return x_0.to(x_t.dtype)


def _half_fall(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """h, the fall of log(a / b), half the log SNR, from s to t > s; infinite where t has no signal."""
    return (schedule.log_snr(s) - schedule.log_snr(t)) / 2


def _solved(schedule: Schedule, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The state at s on the flow from x_t, with the estimate of x_0 held constant."""
    weights = torch.stack(
        [schedule.noise(s) / schedule.noise(t), -schedule.signal(s) * torch.expm1(-_half_fall(schedule, t, s))]
    )
    weight_t, weight_0 = coefficients(weights, x_t)
    return weight_t * x_t + weight_0 * x_0


class DDIMSampler(_FlowSampler):
    r"""DDIM: Euler's method for the probability flow; with eta > 0, some of the noise is replaced by fresh noise.

    .. math:: x_s = a_s \hat x_0 + \sqrt{b_s^2 - \eta^2 \tilde\beta} \; \hat\epsilon + \eta \sqrt{\tilde\beta} \, z,
        \qquad \tilde\beta = \mathrm{Var}(x_s | x_t, x_0) = \frac{b_s^2 b_{t|s}^2}{b_t^2}, \qquad z \sim N(0, I)

    With :math:`\eta = 0` only :math:`x_T` is drawn, and x_0 is a function of it. With :math:`\eta = 1` each step is a
    draw of the posterior at :math:`\hat x_0`: ancestral sampling with :class:`PosteriorVariance`, except for the last
    step. Schedules that end without signal work too.

    Arguments:
        diffusion: A Gaussian diffusion whose reverse process has a denoiser.
        eta: The fraction of the posterior's standard deviation that is drawn, in [0, 1].
        **options: Those of :class:`Sampler`: ``compile``, ``num_steps``, ``times``, ``guide``.

    Attributes:
        order: 1 with eta = 0, else None.

    Raises:
        ValueError: As :class:`Sampler`, if the diffusion is of another kind, or ``eta`` lies outside [0, 1].

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), Eqs. 12 and 16, https://arxiv.org/abs/2010.02502

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=100))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.DDIMSampler(diffusion, num_steps=10)(num_samples=5).shape
        torch.Size([5, 2])
    """

    def __init__(self, diffusion: Diffusion, eta: float = 0.0, **options: Any) -> None:
        if not (arguments.is_number(eta) and 0 <= eta <= 1):
            raise ArgumentError(
                "eta",
                f"must be a number in [0, 1], of which 0 draws nothing and 1 as much as the posterior, but it is "
                f"{arguments.described(eta)}",
            )
        self.eta = float(eta)
        self.order = None if eta else 1
        super().__init__(diffusion, **options)

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        schedule, s, x_0 = self.chain.forward_process.schedule, t - 1, _estimate(self.chain, x_t, t, *context)
        if self.eta == 0:
            return _solved(schedule, x_t, x_0, t, s)
        kept = torch.exp(-2 * _half_fall(schedule, t, s))  # 1 - kept is the posterior's variance divided by b_s^2
        old = schedule.noise(s) * ((1 - self.eta**2) + self.eta**2 * kept).sqrt()
        new = self.eta * schedule.posterior(t, s)[2]
        weights = torch.stack(
            [old / schedule.noise(t), schedule.signal(s) - old * schedule.signal(t) / schedule.noise(t), new]
        )
        weight_t, weight_0, new = coefficients(weights, x_t)
        return weight_t * x_t + weight_0 * x_0 + new * torch.randn_like(x_t)


class DPMSolverSampler(_LogSNRSampler):
    r"""DPM-Solver++(2M): DDIM's step with an :math:`\hat x_0` extrapolated from two steps, for one network call per
    step.

    .. math:: D = \hat x_0(x_t, t) + \frac{h}{2 h'} \left(\hat x_0(x_t, t) - \hat x_0(x_{t+1}, t + 1)\right), \qquad
        x_s = \frac{b_s}{b_t} x_t - a_s \left(e^{-h} - 1\right) D

    with h the rise of half the log signal-to-noise ratio in this step, and h' in the step before. The first step is
    DDIM's, as there is none before. If it begins without signal, h' is infinite, and the second step is DDIM's too.

    It does best with steps of about equal size in the log signal-to-noise ratio, so ``num_steps`` uses
    :meth:`Schedule.even_times`. Where a step is much larger than the one before, D is far off, and DDIM does better.

    Arguments:
        diffusion: A Gaussian diffusion whose reverse process has a denoiser.
        order: 2, or 1 for DDIM.
        **options: Those of :class:`Sampler`: ``compile``, ``num_steps``, ``times``, ``guide``.

    Raises:
        ValueError: As :class:`Sampler`, if the diffusion is of another kind, or ``order`` is neither 1 nor 2; also on a
            call, if there are fewer steps than the order.

    References:
        DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022), Algorithm 2,
        https://arxiv.org/abs/2211.01095

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=100))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.DPMSolverSampler(diffusion, num_steps=10)(num_samples=5).shape
        torch.Size([5, 2])
    """

    order: int

    def __init__(self, diffusion: Diffusion, order: int = 2, **options: Any) -> None:
        if not (arguments.is_int(order) and order in (1, 2)):
            raise ArgumentError(
                "order", f"must be 1 or 2, the orders that there are, but it is {arguments.described(order)}"
            )
        self.order = int(order)
        super().__init__(diffusion, **options)

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return self.advance(x_t, t, (), *context)[0]

    def advance(
        self, x_t: Tensor, t: Tensor, memory: tuple[Tensor, ...], *context: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A step, and the estimate of x_0 that it was made with; arguments and result as of :meth:`Sampler.advance`."""
        schedule, x_0 = self.chain.forward_process.schedule, _estimate(self.chain, x_t, t, *context)
        together = x_0
        if memory:
            now, before = _half_fall(schedule, t, t - 1), _half_fall(schedule, t + 1, t)
            (part,) = coefficients((now / before / 2)[None], x_t)
            together = x_0 + part * (x_0 - memory[0])
        x_s = _solved(schedule, x_t, together, t, t - 1)
        return x_s, (x_0,) if self.order == 2 else ()

    def _check_chain(self) -> None:
        if self.chain.num_steps < self.order:
            raise ArgumentError(
                "num_steps",
                f"must be at least 2 for order=2, but it is {self.chain.num_steps}: take more steps, or order=1",
            )


class HeunSampler(_LogSNRSampler):
    r"""Heun's method for the probability flow, two network calls per step; churn puts some noise back before each step.

    The slope is the mean of the slopes at t and at the end of DDIM's step, :math:`x'_s`, which gives

    .. math:: x_s = x'_s + \frac{a_s}{2} \left(e^h - 1\right) \left(\hat x_0(x'_s, s) - \hat x_0(x_t, t)\right) .

    The factor by which a step divides :math:`\sigma` is :math:`e^h`, and the error grows with it. So ``num_steps`` uses
    steps that are even in the log signal-to-noise ratio (:meth:`Schedule.even_times`), each with the same factor; where
    :math:`\sigma_T` is far above 80, the paper's largest, as with :class:`CosineSchedule`, take ten steps or more.

    With churn a step begins at a noisier time u of the whole chain, the nearest to
    :math:`\sigma_u = (1 + \gamma) \sigma_t`, since a network is trained at no time between, and
    :math:`\gamma = \min(\mathrm{churn} / K, \sqrt 2 - 1)` in K steps:
    :math:`x_u = a_{u|t} x_t + \nu b_{u|t} z`, with :math:`\nu` the ``churn_noise``. This keeps the marginals, and
    corrects earlier errors. The whole chain has to be finer than these steps: if all of its T steps are taken, u may be
    t, and nothing is drawn.

    Arguments:
        diffusion: A Gaussian diffusion whose reverse process has a denoiser.
        churn: How much noise is put back, :math:`S_\mathrm{churn}`, at least 0: in all steps together, relative to
            :math:`\sigma`.
        churn_from: The smallest :math:`\sigma_t = b_t / a_t` with churn, :math:`S_\mathrm{tmin}`.
        churn_to: The largest, :math:`S_\mathrm{tmax}`.
        churn_noise: The factor of the standard deviation of that noise, :math:`S_\mathrm{noise}`: a little above 1
            makes up for a denoiser that removes too much.
        **options: Those of :class:`Sampler`: ``compile``, ``num_steps``, ``times``, ``guide``.

    Attributes:
        order: 2 without churn, else None.

    Raises:
        ValueError: As :class:`Sampler`, if the diffusion is of another kind, or a number lies outside its range; also
            on a call, if the first step begins without signal, where :math:`\sigma` is infinite.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Algorithms 1 and 2; the
        nearest time is that of their code, ``round_sigma``, https://arxiv.org/abs/2206.00364

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(num_steps=1000, sigma_max=80.0))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.HeunSampler(diffusion, churn=4.0, churn_to=50.0, num_steps=10)(num_samples=5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        diffusion: Diffusion,
        churn: float = 0.0,
        *,
        churn_from: float = 0.0,
        churn_to: float = math.inf,
        churn_noise: float = 1.0,
        **options: Any,
    ) -> None:
        for name, value in {"churn": churn, "churn_from": churn_from, "churn_noise": churn_noise}.items():
            if not (arguments.is_number(value) and 0 <= value < math.inf):
                raise ArgumentError(name, f"must be a number of at least 0, but it is {arguments.described(value)}")
        if not (arguments.is_number(churn_to) and churn_to >= churn_from):
            raise ArgumentError(
                "churn_to",
                f"must be a number of at least churn_from = {churn_from}, but it is {arguments.described(churn_to)}",
            )
        self.churn, self.churn_noise = float(churn), float(churn_noise)
        self.churn_from, self.churn_to = float(churn_from), float(churn_to)
        self.order = None if churn else 2
        super().__init__(diffusion, **options)

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        schedule = self.diffusion.forward_process.schedule
        t, s = self._whole_time(t), self._whole_time(t - 1)
        if self.churn:
            x_t, t = self._churned(schedule, x_t, t)
        x_0 = _estimate(self.diffusion, x_t, t, *context)
        x_s = _solved(schedule, x_t, x_0, t, s)
        (weight,) = coefficients((schedule.signal(s) * torch.expm1(_half_fall(schedule, t, s)) / 2)[None], x_t)
        return x_s + weight * (_estimate(self.diffusion, x_s, s, *context) - x_0)

    def _whole_time(self, t: Tensor) -> Tensor:
        """The time in the whole chain, whose denoiser is called, as churn leads to times between those of the steps."""
        schedule, is_whole = self.chain.forward_process.schedule, self.chain is self.diffusion
        return schedule.times_at(t).to(t.device) if isinstance(schedule, SubSchedule) and not is_whole else t

    def _churned(self, schedule: Schedule, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state with more noise, and its time."""
        rise = 1 + min(self.churn / self.chain.num_steps, math.sqrt(2) - 1)
        first = t[:1].to(schedule.device)  # all data have the same t
        sigma = _sigma(schedule, first)
        u = torch.where((sigma >= self.churn_from) & (sigma <= self.churn_to), _nearest(schedule, rise * sigma), first)
        u = u.to(t.device).expand_as(t)
        signal, noise = schedule.step(u, t)
        noise = torch.where((u > t).to(noise.device), self.churn_noise * noise, 0.0)
        signal, noise = coefficients(torch.stack([signal, noise]), x_t)
        return signal * x_t + noise * torch.randn_like(x_t), u

    def _check_chain(self) -> None:
        schedule = self.chain.forward_process.schedule
        if not checks.holds(schedule.signal(self.chain.num_steps) != 0):
            raise ArgumentError(
                "diffusion",
                f"must leave some signal at t = T for HeunSampler, whose steps are in b / a, but its "
                f"schedule {schedule!r} leaves none: use DDIMSampler or DPMSolverSampler, or times that end before T",
            )


def _sigma(schedule: Schedule, t: Tensor) -> Tensor:
    return torch.exp(-schedule.log_snr(t) / 2)


def _nearest(schedule: Schedule, sigma: Tensor) -> Tensor:
    """The times in 1..T whose b / a is nearest to sigma, by bisection: a long learned schedule has no table."""
    T = schedule.num_steps
    low, high = (torch.full(sigma.shape, end, device=sigma.device) for end in (1, T))
    for _ in range(T.bit_length()):
        middle = (low + high + 1) // 2
        reached = _sigma(schedule, middle) <= sigma
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle - 1)
    above = (low + 1).clamp(max=T)
    return torch.where(_sigma(schedule, above) - sigma < sigma - _sigma(schedule, low), above, low)


class PredictorCorrectorSampler(_GaussianSampler):
    r"""A draw of the model's own kernel, the predictor, and then Langevin updates at the new time, the corrector.

    .. math:: x \leftarrow x + \delta \hat s + \sqrt{2 \delta} \, z, \qquad
        \hat s = \frac{a_s \hat x_0(x, s) - x}{b_s^2}, \qquad
        \delta = 2 \alpha_s \, \frac{r^2 D}{\|\hat s\|^2}, \qquad \alpha_s = \frac{a_s^2}{a_{s-1}^2}

    for each s = T - 1, ..., 1 of the chain, D being the dimension of a datum and so about :math:`\|z\|^2`. In a VE
    chain :math:`\alpha_s` is 1. The norm of the score is its mean over the samples, as in the paper: a single sample
    whose score happens to be small would be thrown far off. So a sample depends, slightly, on those drawn with it.
    Where the scores are 0 up to rounding nothing is corrected.

    The last step is a draw of the decoder, as in :class:`AncestralSampler`, which this is without corrections.

    Arguments:
        diffusion: A Gaussian diffusion whose reverse process has a denoiser.
        snr: The size r of the corrections: about the ratio of the norms of drift and noise in each.
        num_corrections: How many there are at each time, each a network call.
        **options: Those of :class:`Sampler`: ``compile``, ``num_steps``, ``times``, ``guide``.

    Raises:
        ValueError: As :class:`Sampler`, if the diffusion is of another kind, ``snr`` is not positive and finite, or
            ``num_corrections`` is not an int of at least 1.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), Algorithms 2 to
        5 and appendix G, there with the reverse diffusion for a predictor, https://arxiv.org/abs/2011.13456

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(num_steps=100))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.PredictorCorrectorSampler(diffusion, num_steps=10)(num_samples=5).shape
        torch.Size([5, 2])
    """

    def __init__(self, diffusion: Diffusion, snr: float = 0.16, num_corrections: int = 1, **options: Any) -> None:
        self.snr = arguments.number("snr", snr, 0, math.inf)
        self.num_corrections = arguments.positive_int("num_corrections", num_corrections)
        super().__init__(diffusion, **options)

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        x = drawn(self.chain.model.kernel(x_t, t, *context), len(x_t))
        for _ in range(self.num_corrections):
            x = self._corrected(x, t - 1, *context)
        return x

    def _corrected(self, x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        process = cast(GaussianForward, self.chain.forward_process)
        score = process.score(x, _estimate(self.chain, x, t, *context), t)
        norm, length = (y.reshape(len(x), -1).norm(dim=1).mean() for y in (score, x))
        ratio = process.schedule.signal(t) / process.schedule.signal(t - 1)
        alpha, noise = coefficients(torch.stack([ratio**2, process.schedule.noise(t)]), x)
        says = norm * noise**2 > 8 * torch.finfo(x.dtype).eps * length  # else the score is only rounding error
        size = 2 * alpha * self.snr**2 * self.diffusion.event_shape.numel() * torch.where(says, norm**-2, 0.0)
        return x + size * score + (2 * size).sqrt() * torch.randn_like(x)
