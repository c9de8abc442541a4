r"""The variance of a Gaussian reverse process: fixed, set by a denoiser's error, or learned with the mean.

The mean of a step from t to s is the forward posterior's at :math:`\hat x_0`. With a variance :math:`\sigma^2`, one
number of the state then costs, in expectation over data and :math:`x_t`,

.. math:: L = \frac12 \left(\frac{v}{\sigma^2} - 1 - \log \frac{\tilde\beta_{s|t}}{\sigma^2}\right), \qquad
    v = \tilde\beta_{s|t} + w_0(s, t)^2 \, \mathbb{E} (x_0 - \hat x_0(x_t, t))^2,

which is least at :math:`\sigma^2 = v`: the variance :math:`\tilde\beta_{s|t}` of :math:`q(x_s | x_t, x_0)`, plus the
denoiser's squared error, with a weight that depends on s. A fixed variance is a function of t;
:class:`AnalyticVariance` has one number for each t, the mean squared error over all data and all numbers of a state; a
:class:`LearnedVariance` has a network's output for each number of each state.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, https://arxiv.org/abs/2006.11239

    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 3.1,
    https://arxiv.org/abs/2102.09672

    Analytic-DPM (Bao et al., 2022), Theorem 1, https://arxiv.org/abs/2201.06503
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import checks
from ..base.arguments import ArgumentError
from ..base.precision import Float64Module, coefficients
from ..process.forward import GaussianForward
from ..process.schedules import Schedule, SubSchedule

__all__ = [
    "AnalyticVariance",
    "DiagonalVariance",
    "FixedLargeVariance",
    "FixedVariance",
    "ForwardVariance",
    "LearnedVariance",
    "PosteriorVariance",
    "RangeVariance",
    "Variance",
]


class Variance(Float64Module, ABC):
    r"""The variance :math:`\sigma_t^2` of a Gaussian reverse process."""

    @abstractmethod
    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        r"""The variance of :math:`p_\theta(x_{t-1} | x_t)`.

        Arguments:
            process: The forward process. In a chain of fewer steps (:meth:`Diffusion.subchain`) it is that chain's, so
                a variance must be a function of the process, and not of the number t alone.
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).

        Returns:
            A float64 tensor with the shape of ``t``.

        Raises:
            ValueError: If t is not an integer or lies outside 1..T.
        """


class ForwardVariance(Variance):
    r""":math:`\sigma_t^2 = \beta_t`, the variance of :math:`q(x_t | x_{t-1})`.

    The best variance if the data are N(0, I) and, in the limit of small steps, for any data with a density: the right
    choice for a bound, and the default.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2, the first choice.
    """

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        _check(process, t)
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
        _check(process, t)
        variance = process.schedule.beta(t)
        if process.num_steps == 1:
            return variance
        first = torch.as_tensor(t, device=variance.device) == 1
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
        _check(process, t)
        return _posterior_variance(process.schedule, t)


class FixedVariance(Variance):
    r"""Given variances :math:`\sigma_1^2, \dots, \sigma_T^2`.

    In a chain of fewer steps (:meth:`Diffusion.subchain`) the variance of a step follows from the
    :math:`\mathrm{Var}(x_0 | x_t)` that :math:`\sigma_t^2` implies. A step from t to any s has

    .. math:: \mathrm{Var}(x_s | x_t) = \tilde\beta_{s|t} + w_0(s, t)^2 \, \mathrm{Var}(x_0 | x_t),

    with the weight :math:`w_0` of :math:`x_0` in the posterior's mean; s = t - 1 gives
    :math:`\mathrm{Var}(x_0 | x_t)`, and any other s the variance of the longer step. So the :math:`\beta_t` of a VP
    schedule become those of the shorter chain, and the :math:`\tilde\beta_t` as well. Variances below
    :math:`\tilde\beta_t`, which imply no :math:`\mathrm{Var}(x_0 | x_t)`, keep their ratio to it (at t = 1, to
    :math:`\tilde\beta_2`).

    Arguments:
        variances: T positive numbers.

    Raises:
        ValueError: If ``variances`` is empty, not one-dimensional, requires a gradient, or has a value that is not
            positive and finite; on a call, if their number is neither the T of the process nor that of the longer chain
            that it is a part of.

    References:
        Analytic-DPM (Bao et al., 2022), Theorem 1: the optimal variance of a step, from the variance of the data given
        :math:`x_t`, https://arxiv.org/abs/2201.06503
    """

    variances: Tensor

    def __init__(self, variances: Sequence[float] | Tensor) -> None:
        super().__init__()
        variances = checks.numbers("variances", variances)
        if variances.dim() != 1 or len(variances) == 0 or not checks.holds((variances > 0) & variances.isfinite()):
            raise ArgumentError(
                "variances", f"must be a sequence of positive numbers, but they are {variances.tolist()}"
            )
        self.register_buffer("variances", variances)

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        _check(process, t)
        return self._of_step(process.schedule, t)

    def _of_step(self, schedule: Schedule, t: int | Tensor) -> Tensor:
        if schedule.num_steps == len(self.variances):
            if not isinstance(t, Tensor):
                return self.variances[int(t) - 1]
            return self.variances.index_select(0, t.to(self.variances.device).reshape(-1) - 1).reshape(t.shape)
        if not isinstance(schedule, SubSchedule):
            raise ArgumentError(
                "variances", f"must be T = {schedule.num_steps} numbers, but there are {len(self.variances)}"
            )
        whole, time = schedule.schedule, schedule.times_at(t)
        variance = self._of_step(whole, time)
        (_, weight, deviation), (_, weight_short, deviation_short) = whole.posterior(time), schedule.posterior(t)
        of_data = (variance - deviation**2) / weight**2  # Var(x_0 | x_t)
        ratio = variance / _posterior_variance(whole, time)
        found = deviation_short**2 + weight_short**2 * of_data
        known = variance > (1 + 1e-9) * deviation**2  # else (up to rounding) they imply no Var(x_0 | x_t)
        return torch.where(known, found, ratio.clamp(max=1) * _posterior_variance(schedule, t))


class AnalyticVariance(Variance):
    r"""The variance that makes the bound least, given the mean squared error :math:`e_t` of the denoiser at each time.

    .. math:: \sigma_{s|t}^2 = \tilde\beta_{s|t} + w_0(s, t)^2 \, e_t, \qquad
        e_t = \frac1D \mathbb{E} \lVert x_0 - \hat x_0(x_t, t) \rVert^2

    with the variance :math:`\tilde\beta_{s|t}` of :math:`q(x_s | x_t, x_0)` and the weight :math:`w_0` of
    :math:`x_0` in its mean; s is the time before t in the chain at hand, the whole one or one of fewer steps
    (:meth:`Diffusion.subchain`). In the step to the data, s = 0, it is :math:`e_t` itself.
    :func:`analytic_variance` measures the :math:`e_t`.

    Arguments:
        errors: The :math:`e_1, \dots, e_T`, T numbers of at least 0, in the square of the data's unit.
        least: The least variance of the step to the data.

    Raises:
        ValueError: If ``errors`` are empty, not one-dimensional, negative, not finite or require a gradient; if
            ``least`` is negative, or 0 where an error is 0; on a call, if the number of errors is neither the T of the
            process nor that of the longer chain that it is a part of.

    References:
        Analytic-DPM (Bao et al., 2022), Theorem 1, https://arxiv.org/abs/2201.06503: there for
        :math:`\hat x_0 = E[x_0 | x_t]`, by the norm of the score.

        Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models (Bao et al., 2022),
        https://arxiv.org/abs/2206.07309: for any mean, by its error.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=10))
        >>> variance = pyrodiff.AnalyticVariance([0.5] * 10)  # of a denoiser that is off by that, whatever t is
        >>> variance(forward.subchain([3, 10]), 1)
        tensor(0.5000, dtype=torch.float64)
    """

    errors: Tensor
    least: Tensor

    def __init__(self, errors: Sequence[float] | Tensor, least: float = 0.0) -> None:
        super().__init__()
        errors, floor = checks.numbers("errors", errors), checks.numbers("least", least)
        if floor.dim() or not checks.holds((floor >= 0) & floor.isfinite()):
            raise ArgumentError("least", f"must be a number of at least 0, but it is {floor.tolist()}")
        if errors.dim() != 1 or len(errors) == 0 or not checks.holds((errors >= 0) & errors.isfinite()):
            raise ArgumentError(
                "errors", f"must be a sequence of numbers of at least 0, but they are {errors.tolist()}"
            )
        if not checks.holds(errors + floor.to(errors.device) > 0):
            t = int((errors == 0).nonzero()[0]) + 1
            raise ArgumentError(
                "errors",
                f"must be positive where no least variance is given, but that at t = {t} is 0: a step to the "
                f"data would have no density; give least, or data that the denoiser does not know by heart",
            )
        self.register_buffer("errors", errors)
        self.register_buffer("least", floor)

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        _check(process, t)
        schedule, time, T = process.schedule, t, len(self.errors)
        while schedule.num_steps != T and isinstance(schedule, SubSchedule):
            time, schedule = schedule.times_at(time), schedule.schedule
        if schedule.num_steps != T:
            raise ArgumentError("errors", f"must be T = {schedule.num_steps} numbers, but there are {T}")
        whole = torch.as_tensor(time, device=self.errors.device)
        error = self.errors.index_select(0, whole.reshape(-1) - 1).reshape(whole.shape)
        _, weight, deviation = process.schedule.posterior(t)
        variance = deviation**2 + weight**2 * error
        is_last = torch.as_tensor(t, device=variance.device) == 1
        return torch.where(is_last, torch.maximum(variance, self.least), variance)

    def extra_repr(self) -> str:
        return f"num_steps={len(self.errors)}"


class LearnedVariance(Variance):
    r"""A variance :math:`\sigma^2(x_t, t)` of each number of each state, learned with the mean in one network call.

    The network returns two numbers for each of :math:`x_t`'s (``networks.UNet`` and ``networks.MLP`` do with
    ``outputs=2``): the prediction, which its denoiser turns into :math:`\hat x_0`, and the v, which a class of this
    kind turns into the variance. The plain bound trains both; under :class:`HybridWeighting` the simple loss trains the
    mean. Another reverse process around the same denoiser may have any other variance: it then uses the first number
    only.
    """

    # not a subtype of Variance for a type checker, rightly: other variances are called without v, this one never is
    @abstractmethod
    def forward(self, process: GaussianForward, t: int | Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        r"""The variances of :math:`p_\theta(x_{t-1} | x_t)`.

        Arguments:
            process: The forward process; in a chain of fewer steps (:meth:`Diffusion.subchain`), that chain's.
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).
            v: The network's output, with shape (B, *event_shape); 0 gives the initial variance.

        Returns:
            A tensor with shape and dtype of ``v``.

        Raises:
            ValueError: If t is not an integer or lies outside 1..T.
        """


class RangeVariance(LearnedVariance):
    r"""Interpolated between the variances of posterior and forward process, in the logarithm: iDDPM's
    :math:`\Sigma_\theta`.

    .. math:: \log \sigma^2 = \tfrac{1 + v}{2} \log \beta_t + \tfrac{1 - v}{2} \log \tilde\beta_t

    with :math:`\tilde\beta_2` in the place of :math:`\tilde\beta_1 = 0`, and :math:`\beta_1` if T = 1. v is not
    restricted to [-1, 1]. A chain of fewer steps has its own :math:`\beta_t` and :math:`\tilde\beta_t`, and the same v.
    Where the variance of the data is at most 1 the best variance of all steps but the last, to the data, lies in this
    range; data that vary more, or a poor mean, need :class:`DiagonalVariance`.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), Eq. 15, whose v is
        :math:`(1 + v) / 2` here, as ``LEARNED_RANGE`` in their code, https://github.com/openai/improved-diffusion

    Example:
        >>> process = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=10))
        >>> wide = pyrodiff.RangeVariance()(process, 5, torch.ones(1, 2, dtype=torch.float64))
        >>> torch.allclose(wide, process.schedule.beta(5))
        True
    """

    def forward(self, process: GaussianForward, t: int | Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        _check(process, t, v)
        ends = torch.stack([_posterior_variance(process.schedule, t), process.schedule.beta(t)])
        low, high = coefficients(ends.log(), v)
        return torch.lerp(low, high, (1 + v) / 2).exp()


class DiagonalVariance(LearnedVariance):
    r"""Any variance that can be optimal: the posterior's, plus a term for Var(x_0 | x_t), which the network gives.

    .. math:: \sigma_{s|t}^2 = \tilde\beta_{s|t} + w_0(s, t)^2 \, \frac{b_t^2}{a_t^2 + b_t^2} \, e^v, \qquad
        \frac{b_t^2}{a_t^2 + b_t^2} \, e^v = \mathrm{Var}(x_0 | x_t) \text{ at best}

    It is Sohl-Dickstein's free :math:`f_\Sigma`, without variances below :math:`\tilde\beta_{s|t}`, which are optimal
    for no mean. At v = 0 it is right for data of variance 1; in a variance-preserving process it is then
    :math:`\beta_t`, where :math:`f_\Sigma` starts too. A longer step has the variance that follows from the same v: if
    the variances of the whole chain are right, so are those of every shorter one. In the step to the data any variance
    is possible.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Table App. 1:
        :math:`f_\Sigma(x_t, t)`, https://arxiv.org/abs/1503.03585

        Analytic-DPM (Bao et al., 2022), Theorem 1: what a step of any length has to be.

    Example:
        >>> process = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=10))
        >>> start = pyrodiff.DiagonalVariance()(process, 5, torch.zeros(1, 2, dtype=torch.float64))
        >>> torch.allclose(start, process.schedule.beta(5))
        True
    """

    def forward(self, process: GaussianForward, t: int | Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        _check(process, t, v)
        (signal, noise), (_, weight, deviation) = process.schedule.scales(t), process.schedule.posterior(t)
        of_unit = noise**2 / (signal**2 + noise**2)  # Var(x_0 | x_t) of data N(0, 1)
        least, scale = coefficients(torch.stack([deviation**2, weight**2 * of_unit]), v)
        return torch.addcmul(least, scale, v.exp())


def _check(process: object, t: int | Tensor, v: object | None = None) -> None:
    """A Gaussian process, a time of it, and, of a learned variance, what the network says."""
    checks.time("t", t, checks.instance("process", process, GaussianForward).num_steps, low=1)
    if v is not None:
        checks.state("v", v)


def _posterior_variance(schedule: Schedule, t: int | Tensor) -> Tensor:
    """The variance of the posterior, at t = 1 that of t = 2, and beta_1 where there is no such step."""
    if schedule.num_steps == 1:
        return schedule.beta(t)
    return schedule.posterior(t.clamp(min=2) if isinstance(t, Tensor) else max(t, 2))[2] ** 2
