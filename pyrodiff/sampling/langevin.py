r"""Langevin dynamics: draws from a distribution of which only the score is known; annealed by a diffusion's noise.

Every update follows the score :math:`s(x) = \nabla \log p(x)` and adds noise,

.. math:: x \leftarrow x + \frac{\epsilon}{2} s(x) + \sqrt{\epsilon} \, z, \qquad z \sim N(0, I),

without a Metropolis test, so that its stationary distribution is p only as the step size :math:`\epsilon` goes to 0.
For a linear score of curvature L (p is Gaussian, of variance 1 / L), an update multiplies the distance to the mean by
:math:`1 - \epsilon L / 2`, and the stationary variance is

.. math:: \frac{1}{L} \, \frac{1}{1 - \epsilon L / 4} \qquad \text{if } \epsilon < 4 / L, \text{ and else diverges.}

It does not mix between modes with little mass between them: how many points end in a mode depends on where they start.
With much noise there is only one mode, which is why annealed dynamics begin there.

References:
    Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon, 2019), Eq. 4 and Algorithm 1,
    https://arxiv.org/abs/1907.05600
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients
from ..pair.diffusion import Diffusion
from ..process.forward import GaussianForward
from ..process.schedules import Schedule
from ..running.evaluation import evaluation_mode, seeded
from .sampler import Sampler

__all__ = ["AnnealedLangevinSampler", "LangevinSampler"]


class LangevinSampler:
    r"""Unadjusted Langevin dynamics of a score, from given points.

    .. math:: x \leftarrow x + \frac{\epsilon}{2} s(x) + \sqrt{\epsilon} \, z, \qquad z \sim N(0, I)

    It runs without gradients, and a score that is a module is in evaluation mode meanwhile. A score that differentiates
    a density must do so by ``torch.func.grad``, or within ``torch.enable_grad()``.

    Arguments:
        score: Called with points, a tensor with shape (B, *event_shape), it returns the score at each, a tensor of that
            shape: a network or any function. For a diffusion at the noise of time t, it is ``lambda x: forward.score(x,
            denoiser(x, t), t)``.
        step_size: The step size :math:`\epsilon`, a positive number, in squared units of x: below 4 / L, with L the
            largest curvature of -log p, and well below for draws close to p.

    Raises:
        ValueError: If ``score`` cannot be called, or ``step_size`` is no positive number.

    References:
        Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon, 2019), Eq. 4, there with
        :math:`\epsilon` as here; section 3.2.2 and Figure 3: that it does not mix.

    Example:
        >>> sampler = pyrodiff.LangevinSampler(lambda x: (1 - x) / 4, step_size=0.8)  # of N(1, 4)
        >>> x = sampler(torch.zeros(100000, 1), num_updates=50, generator=0)
        >>> x.mean().round(decimals=1), x.var().round(decimals=1)  # 4 / (1 - 0.8 / 16) = 4.2
        (tensor(1.), tensor(4.2000))
    """

    def __init__(self, score: Callable[[Tensor], Tensor], step_size: float) -> None:
        if not callable(score):
            raise ArgumentError("score", f"must be called with points, but it is {arguments.described(score)}")
        self.score, self.step_size = score, arguments.number("step_size", step_size, 0, math.inf)

    def __call__(self, x: Tensor, num_updates: int, generator: torch.Generator | int | None = None) -> Tensor:
        r"""The points after so many updates.

        Divergence is detected while it runs: if a point is not finite, or 1e8 times farther from 0 than the start, the
        first step and the noise of all updates together. A slow divergence over few updates is not detected.

        Arguments:
            x: The points to start from, float32 or float64 with shape (B, *event_shape).
            num_updates: The number of updates, at least 1.
            generator: A generator or a seed, for the same draws each time; a seed from torch's global generator if not
                given.

        Returns:
            A tensor like ``x``.

        Raises:
            ValueError: If an argument is of another kind, or ``x`` is not finite; if the score is of another shape, or
                not finite at the start; if the dynamics diverges; the error then names the ``step_size`` below which it
                would not, if the curvature at the diverging points shows that.
        """
        x, num_updates = _checked_points(x), arguments.positive_int("num_updates", num_updates)
        start, scale = x, 0.0
        mode = evaluation_mode(self.score) if isinstance(self.score, nn.Module) else nullcontext()
        with seeded(generator, x.device), mode, torch.no_grad():
            for number in range(1, num_updates + 1):
                s = self._score(x)
                if number == 1:
                    scale = _largest(start) + self.step_size / 2 * _largest(s) + math.sqrt(num_updates * self.step_size)
                    if not math.isfinite(scale):
                        raise ArgumentError(
                            "score", "must be finite at the points x, but it is infinite or NaN at some"
                        )
                x = _updated(x, s, self.step_size)
                if _has_diverged(x, scale):
                    size = _stable_size(self._score, start[_farthest(x)])
                    raise _divergence(self.step_size, size, f"after {number} updates", "the points that start it")
        return x

    def _score(self, x: Tensor) -> Tensor:
        s = self.score(x)
        checks.returned("score", s, x.shape, x)
        return s.to(x.dtype)


class AnnealedLangevinSampler(Sampler):
    r"""Annealed Langevin dynamics (NCSN): at every noise level, from the largest on, some Langevin updates.

    .. math:: x \leftarrow x + \frac{\alpha_t}{2} s(x, \sigma_t) + \sqrt{\alpha_t} \, z, \qquad
        \alpha_t = \epsilon \, \sigma_t^2 / \sigma_1^2, \qquad t = T, \dots, 1

    ``num_updates`` times at each t, with :math:`\sigma_t = b_t` and
    :math:`s(x, \sigma_t) = (\hat x_0(x, t) - x) / \sigma_t^2`, whatever the network predicts. (Their i = 1..L runs from
    the largest noise, as t = T..1 does: their
    :math:`\sigma_L` is :math:`\sigma_1` here.) The remaining noise is then removed by Tweedie's formula,
    :math:`x + \sigma_1^2 s(x, \sigma_1) = \hat x_0(x, 1)`. The decoder is not used: for data in levels, apply
    ``to_levels``.

    It is called as any sampler, for a diffusion whose signal is 1 throughout (:class:`GeometricSchedule`). The state
    x_t of a trajectory is the one before the updates of t. With fewer steps, :math:`\sigma_1` is their smallest noise.
    The start is the prior of the diffusion, :math:`N(0, \sigma_T^2 + 1)` by default, not uniform noise as in the paper;
    it is forgotten if :math:`\sigma_T` is as large as the distances between data. A compiled step contains all its
    updates, so it takes ``num_updates`` times as long to compile as that of another sampler.

    Arguments:
        diffusion: The model.
        step_size: The step size :math:`\epsilon` at the smallest noise, a positive number below
            :math:`4 \sigma_1^2`. Around isolated data points the noise has the variance :math:`\sigma_t^2`, which the
            updates of t widen to :math:`\sigma_t^2 / (1 - \epsilon / (4 \sigma_1^2))`.
        num_updates: The number of updates at each t, at least 1; 100 in the paper.
        denoise: Whether to remove the remaining noise at the end; their first paper does not.
        compile: See :class:`Sampler`; ``num_steps``, ``times``, ``guide`` likewise.
        num_steps, times, guide: See :class:`Sampler`.

    Raises:
        ValueError: As :class:`Sampler`, and if an argument is out of range; if the signal of the diffusion is not 1,
            its noise does not rise with t, or its reverse process has no denoiser. On a call too, as the diffusion may
            have changed by then; and if the states diverge, as those of a learned score may.

    References:
        Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon, 2019), Algorithm 1, with
        :math:`\sigma` from 1 to 0.01, T = 10, 100 updates and :math:`\epsilon = 2 \cdot 10^{-5}` for images.

        Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020), Algorithm 1: the
        denoising; Technique 4: how to choose the step size, https://arxiv.org/abs/2006.09011

        Adversarial Score Matching and Improved Sampling for Image Generation (Jolicoeur-Martineau et al., 2021): the
        expected denoised sample, https://arxiv.org/abs/2009.05475

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(num_steps=10, sigma_min=0.1, sigma_max=5.0))
        >>> denoiser = pyrodiff.ScorePrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> sampler = pyrodiff.AnnealedLangevinSampler(diffusion, step_size=0.002, num_updates=10)
        >>> sampler(num_samples=3, num_steps=5).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        diffusion: Diffusion,
        step_size: float,
        num_updates: int,
        denoise: bool = True,
        compile: bool = False,
        *,
        num_steps: int | None = None,
        times: Sequence[int] | None = None,
        guide: Callable | None = None,
    ) -> None:
        self.step_size = arguments.number("step_size", step_size, 0, math.inf)
        self.num_updates = arguments.positive_int("num_updates", num_updates)
        arguments.one_of("denoise", denoise, (False, True))
        self.denoise = denoise
        super().__init__(diffusion, compile, num_steps=num_steps, times=times, guide=guide)
        self._check_chain()

    @property
    def _schedule(self) -> Schedule:
        return self.chain.forward_process.schedule

    @property
    def _denoiser(self) -> nn.Module:
        return cast(nn.Module, self.chain.reverse.denoiser)

    def step_sizes(self, t: int | Tensor) -> Tensor:
        r"""The step size :math:`\alpha_t = \epsilon \sigma_t^2 / \sigma_1^2` at times of the chain.

        Arguments:
            t: The times, in 1..T: an int, or an integer tensor of any shape.

        Returns:
            A float64 tensor of the shape of t.
        """
        return self.step_size * (self._schedule.noise(t) / self._schedule.noise(1)) ** 2

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """The states after the updates of t, for t = 1..T of the chain; arguments and result as of any sampler."""
        (alpha,) = coefficients(self.step_sizes(t)[None], x_t)
        for _ in range(self.num_updates):
            x_t = _updated(x_t, self._score(x_t, t, *context), alpha)
        return x_t

    def last(self, x_1: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        r"""The states after the updates of t = 1, or, with ``denoise``, the :math:`\hat x_0` of these."""
        x = self.step(x_1, t, *context)
        return self._denoiser(x, t, *context) if self.denoise else x

    def _score(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        x_0 = self._denoiser(x_t, t, *context)
        checks.returned("denoiser", x_0, x_t.shape, x_t)
        return cast(GaussianForward, self.chain.forward_process).score(x_t, x_0, t)

    def _choose(self, num_steps: int | None) -> None:
        super()._choose(num_steps)
        self._check_chain()  # the smallest noise may be another, by the times or by what was learned or loaded since

    def _check_chain(self) -> None:
        """Refuse a chain without a signal of 1, rising noise and a denoiser, or too large a step for it."""
        process, way_out = self.chain.forward_process, "give AncestralSampler, which draws from any diffusion"
        if not isinstance(process, GaussianForward):
            raise ArgumentError(
                "diffusion",
                f"must be Gaussian for annealed Langevin dynamics, but its forward process is a "
                f"{type(process).__name__}: {way_out}",
            )
        signal, noise = self._schedule.scales(torch.arange(1, self.chain.num_steps + 1, device=self._schedule.device))
        if not checks.holds(signal == 1):
            raise ArgumentError(
                "diffusion",
                f"must have a signal of 1 for annealed Langevin dynamics, as with a GeometricSchedule, but "
                f"that of {self._schedule!r} is {float(signal[-1]):.3g} at t = T: {way_out}",
            )
        if not checks.holds(noise.diff(prepend=noise.new_zeros(1)) > 0):
            raise ArgumentError(
                "diffusion",
                f"must have noise that rises with t for annealed Langevin dynamics, but that of "
                f"{self._schedule!r} does not",
            )
        if not hasattr(self.chain.reverse, "denoiser"):
            raise ArgumentError(
                "diffusion",
                f"must have a reverse process with a denoiser, whose score is followed, but it is a "
                f"{type(self.chain.reverse).__name__}, which has none: {way_out}",
            )
        smallest = float(noise[0])
        if not self.step_size < 4 * smallest**2:
            raise ArgumentError(
                "step_size",
                f"must be below 4 times the smallest variance of the noise, 4 * {smallest:g}^2 = "
                f"{4 * smallest**2:g}, from which on Langevin dynamics around a point diverges, but it is "
                f"{self.step_size:g}; a tenth of that variance is {smallest**2 / 10:g}",
            )

    def _run(self, num_samples: int, context: tuple[Tensor, ...], *rest: Any) -> Iterator[tuple[int, Tensor]]:
        before, scale = None, math.inf
        for t, x in super()._run(num_samples, context, *rest):
            if before is None:
                alphas = self.step_sizes(torch.arange(1, t + 1, device=self._schedule.device))
                scale = _largest(x) + math.sqrt(self.num_updates * float(alphas.sum()))
            elif _has_diverged(x, scale):
                raise self._divergence(t + 1, before, x, context)
            before = x
            yield t, x

    def _divergence(self, t: int, before: Tensor, after: Tensor, context: tuple[Tensor, ...]) -> ValueError:
        """The error for updates at t that diverge, given the states before and after."""
        with torch.inference_mode(False):
            rows = _farthest(after)
            given = [values.expand(len(after), *values.shape[1:])[rows].clone() for values in context]
            time = torch.full((len(rows),), t, device=before.device)
            try:
                size = _stable_size(lambda x: self._score(x, time, *given), before[rows].clone())
            except ValueError:
                return ArgumentError("denoiser", f"must return finite numbers, but at t = {t} of the chain it does not")
        size *= self.step_size / float(self.step_sizes(t))
        return _divergence(self.step_size, size, f"in the updates of t = {t}", "the states before these")


def _updated(x: Tensor, s: Tensor, step_size: Tensor | float) -> Tensor:
    """A Langevin update of points x with the score s."""
    return x + step_size / 2 * s + step_size**0.5 * torch.randn_like(x)


def _checked_points(x: object) -> Tensor:
    """Finite points, at least one, in float32 or float64."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise ArgumentError("x", f"must be a float32 or float64 tensor, but it is {arguments.described(x)}")
    if x.dim() == 0 or x.numel() == 0:
        raise ArgumentError(
            "x", f"must have shape (B, *event_shape), with a point at least, but its shape is {(*x.shape,)}"
        )
    if not bool(x.isfinite().all()):
        raise ArgumentError("x", "must be finite, but it has infinite or NaN values")
    return x.detach().clone()


def _largest(x: Tensor) -> float:
    return float(x.abs().amax())


def _has_diverged(x: Tensor, scale: float) -> bool:
    """Whether some are not finite or 1e8 times the scale: in float32 the added noise would then vanish by rounding."""
    return not _largest(x) <= 1e8 * scale


def _farthest(x: Tensor, number: int = 8) -> Tensor:
    """The indices of the few points farthest from 0; points that are not finite come first."""
    distance = x.detach().abs().reshape(len(x), -1).amax(1).nan_to_num(math.inf)
    return distance.topk(min(number, len(x))).indices


def _stable_size(score: Callable[[Tensor], Tensor], x: Tensor, num_rounds: int = 50) -> float:
    """4 / L, with L the largest curvature of -log p at some points; NaN if the score has no derivative, or L <= 0.

    Power iteration with products of vectors and the score's Jacobian J, which is symmetric: first for the largest
    magnitude r of its eigenvalues, then on J - r, whose eigenvalue of largest magnitude belongs to the lowest of J,
    which is -L.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        s = score(x)
        if not bool(s.isfinite().all()):
            raise ArgumentError("score", "must be finite")
        if not s.requires_grad:
            return math.nan
        source, shift, product = torch.Generator().manual_seed(0), torch.zeros(()), x
        v = torch.randn(x.shape, generator=source, dtype=x.dtype).to(x.device)
        for _ in range(2):
            for _ in range(num_rounds):
                v = v / _norms(v)
                (product,) = torch.autograd.grad(s, x, v, retain_graph=True)
                v = product - shift.to(x) * v
            shift = _norms(product).detach()
        v = v / _norms(v)
        (product,) = torch.autograd.grad(s, x, v)
    curvature = -float((v * product).reshape(len(x), -1).sum(1).amin())
    return 4 / curvature if curvature > 0 else math.nan


def _norms(v: Tensor) -> Tensor:
    """The norm of each row, broadcastable against it."""
    norms = v.reshape(len(v), -1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
    return norms.reshape(-1, *(1,) * (v.dim() - 1))


def _divergence(step_size: float, size: float, when: str, where: str) -> ValueError:
    """The error for dynamics that diverge, with a step size at which they would not, if the curvature explains it."""
    told = f"by the largest curvature of -log p at {where} give less than {size:.4g}"
    return ArgumentError(
        "step_size",
        f"must be so small that Langevin dynamics does not diverge, but with {step_size:g} it does, {when}: "
        f"{told if 0 < size <= step_size else 'give a smaller one'}",
    )
