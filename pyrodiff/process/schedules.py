r"""The noise schedule: how much signal and how much noise there is after each step.

A schedule of :math:`T` steps is two sequences, the signal :math:`a_t` and the noise :math:`b_t`,

.. math:: x_t = a_t x_0 + b_t \epsilon, \qquad \epsilon \sim N(0, I), \qquad t = 0, \dots, T,

with :math:`a_0 = 1` and :math:`b_0 = 0`. *Variance preserving* (VP) schedules are given by
:math:`\beta_1, \dots, \beta_T`: with :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)` they have
:math:`a_t = \sqrt{\bar\alpha_t}` and :math:`b_t = \sqrt{1 - \bar\alpha_t}`. *Variance exploding* (VE) schedules
have :math:`a_t = 1` and a growing :math:`b_t`. The log signal-to-noise ratio
:math:`\lambda_t = \log a_t^2 / b_t^2` falls from :math:`\infty` at :math:`t = 0`.

Every quantity is computed, kept and returned in float64, whatever dtype the module is cast to: in float32
:math:`1 - \bar\alpha_1` of a 1000-step schedule is already off in its fourth digit. The kernels cast their
coefficients at the last moment. A schedule is a function of t. A fixed one reads a table, which is a buffer: what is
written there, or loaded from a ``state_dict``, is what every kernel sees.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015),
    https://arxiv.org/abs/1503.03585

    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import Float64Module, default_home, home

__all__ = [
    "BetaSchedule",
    "CosineSchedule",
    "GeometricSchedule",
    "LinearSchedule",
    "LogSNRSchedule",
    "ReciprocalSchedule",
    "Schedule",
    "SubSchedule",
]


_NOISE_ALONE = 10.2  # -log SNR above which x_t is taken for pure noise


class Schedule(Float64Module, ABC):
    r"""A noise schedule of :math:`T` steps: the signal :math:`a_t` and the noise :math:`b_t` for t = 0..T.

    A schedule of your own defines these two, and all else follows; it may override what it can compute more exactly.
    All methods take ``t`` as an int or as an integer tensor of any shape, and return float64 of that shape.

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1.

    Raises:
        ValueError: If ``num_steps`` is not an int of at least 1.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = arguments.positive_int("num_steps", num_steps)

    @property
    def device(self) -> torch.device:
        """The device of its float64 numbers: the model's, or the CPU if that has no float64."""
        return self.noise(0).device

    def beta(self, t: int | Tensor) -> Tensor:
        r"""The variance :math:`\beta_t` of :math:`q(x_t | x_{t-1})`; 0 at t = 0."""
        if checks.validating() or not isinstance(t, Tensor):
            checks.time("t", t, self.num_steps)
        earlier = (t - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0)
        noise = self.step(t, earlier)[1]
        return torch.where(torch.as_tensor(t, device=noise.device) == 0, 0, noise**2)

    @abstractmethod
    def signal(self, t: int | Tensor) -> Tensor:
        r"""The signal :math:`a_t`, :math:`\sqrt{\bar\alpha_t}` if VP and 1 if VE."""

    @abstractmethod
    def noise(self, t: int | Tensor) -> Tensor:
        r"""The noise :math:`b_t`, :math:`\sqrt{1 - \bar\alpha_t}` if VP."""

    def log_snr(self, t: int | Tensor) -> Tensor:
        r"""The log signal-to-noise ratio :math:`\lambda_t = \log a_t^2 / b_t^2`; infinite at t = 0."""
        return 2 * (self.signal(t).log() - self.noise(t).log())

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        r""":math:`\bar\alpha_t = a_t^2`, the product of the :math:`1 - \beta_s` up to t if VP, and 1 if VE."""
        return self.signal(t) ** 2

    def scales(self, t: int | Tensor) -> Tensor:
        """Signal and noise, with shape (2, *t.shape)."""
        return torch.stack([self.signal(t), self.noise(t)])

    def even_times(self, num_steps: int) -> tuple[int, ...]:
        r"""``num_steps`` times, 1 and T among them, spaced as evenly as possible in the log signal-to-noise ratio.

        Solvers of the probability flow use these. Where the log ratio is below -10.2 and the noise thus 160 times the
        signal, data of variance 1 cannot be seen: a tenth of the steps, at least one, lie there.

        Arguments:
            num_steps: How many, in 1..T; if 1, T alone.

        Raises:
            ValueError: If ``num_steps`` is out of range.

        References:
            DPM-Solver++ (Lu et al., 2022): even steps, https://arxiv.org/abs/2211.01095; the limit is diffusers'
            ``lambda_min_clipped``, -5.1 for half the log signal-to-noise ratio.

        Example:
            >>> pyrodiff.CosineSchedule(num_steps=1000).even_times(6)
            (1, 45, 504, 951, 996, 1000)
        """
        T = self.num_steps
        num_steps = arguments.positive_int("num_steps", num_steps)
        if num_steps > T:
            raise ArgumentError("num_steps", f"must be at most T = {T}, but it is {num_steps}")
        falling = -self.log_snr(torch.arange(1, T + 1, device=self.device)).detach()
        first, last = float(falling[0]), min(float(falling[-1]), 1e6)  # infinite where no signal is left
        if last > _NOISE_ALONE > first and num_steps > 1:  # few steps where there is nothing to see
            tail = max(1, num_steps // 10)
            last = min(last, 2 * _NOISE_ALONE)  # the last time is T in any case
            ends = [(first, _NOISE_ALONE, num_steps - tail), (_NOISE_ALONE, last, tail + 1)]
            seen, unseen = (torch.linspace(*end, dtype=falling.dtype, device=falling.device) for end in ends)
            wanted = torch.cat([seen, unseen[1:]])
        else:
            wanted = torch.linspace(first, last, num_steps, dtype=falling.dtype, device=falling.device)
        after = torch.searchsorted(falling, wanted).clamp(min(1, T - 1), T - 1)
        before = (after - 1).clamp(min=0)
        times = (torch.where(wanted - falling[before] < falling[after] - wanted, before, after) + 1).tolist()
        for k in range(1, num_steps):  # strictly increasing, where several are nearest to one time
            times[k] = max(times[k], times[k - 1] + 1)
        times[-1] = T
        for k in reversed(range(num_steps - 1)):
            times[k] = min(times[k], times[k + 1] - 1)
        return tuple(times)

    def step(self, t: int | Tensor, s: int | Tensor) -> tuple[Tensor, Tensor]:
        r"""Signal and noise of the step from s to t > s, :math:`x_t = a_{t|s} x_s + b_{t|s} \epsilon`.

        .. math:: a_{t|s} = a_t / a_s, \qquad b_{t|s}^2 = b_t^2 - a_{t|s}^2 b_s^2
            = b_t^2 \left(1 - e^{\lambda_t - \lambda_s}\right)

        The second form does not cancel where the noise is small. With s = t - 1 it is :math:`b_{t|s}^2 = \beta_t`.
        """
        checks.time("s", s, self.num_steps)
        remaining = -torch.expm1(self.log_snr(t) - self.log_snr(s))
        return self.signal(t) / self.signal(s), self.noise(t) * remaining.sqrt()

    def posterior(self, t: int | Tensor, s: int | Tensor | None = None) -> Tensor:
        r"""The weights of x_t and of x_0 in the mean of :math:`q(x_s | x_t, x_0)`, and its standard deviation.

        .. math:: \frac{a_{t|s} b_s^2}{b_t^2}, \qquad \frac{a_s b_{t|s}^2}{b_t^2}, \qquad \frac{b_s b_{t|s}}{b_t}

        s is t - 1 if not given; at s = 0 they are 0, 1 and 0. The shape is (3, *t.shape).

        References:
            Variational Diffusion Models (Kingma et al., 2021), Eqs. 25-26, https://arxiv.org/abs/2107.00630
        """
        s = self._before(t) if s is None else s
        (signal, noise), noise_s, noise_t = self.step(t, s), self.noise(s), self.noise(t)
        return torch.stack(
            [signal * (noise_s / noise_t) ** 2, self.signal(s) * (noise / noise_t) ** 2, noise_s * noise / noise_t]
        )

    def _before(self, t: int | Tensor) -> int | Tensor:
        """The time t - 1."""
        checks.time("t", t, self.num_steps, low=1)
        return t - 1


def _at(table: Tensor, t: int | Tensor) -> Tensor:
    """The columns at times t of a table with a column for each of t = 0..T, with shape (*rows, *t.shape)."""
    if checks.validating() or not isinstance(t, Tensor):
        checks.time("t", t, table.shape[-1] - 1)
    if not isinstance(t, Tensor):
        return table.select(-1, int(t))
    if t.device != table.device:
        if checks.validating() and home(t.device) != table.device:
            raise ArgumentError("t", f"must be on the schedule's device {table.device}, but it is on {t.device}")
        t = t.to(table.device)
    if t.dim() == 1:  # unlike table[..., t], this refuses a negative t whether Pyro validates or not
        return table.index_select(-1, t)
    return table.index_select(-1, t.reshape(-1)).reshape(table.shape[:-1] + t.shape)


class SubSchedule(Schedule):
    r"""The schedule of a chain of fewer steps: the given times of another schedule, and t = 0.

    Step :math:`k = 1, \dots, K` of it is the time :math:`\tau_k`, so :math:`a_k = a_{\tau_k}`,
    :math:`b_k = b_{\tau_k}`, and :math:`\beta_k = b_{\tau_k | \tau_{k-1}}^2` is the variance of the whole step
    between. It reads the other schedule whenever it is asked, and keeps no table of its own.

    Arguments:
        schedule: The schedule of T steps.
        times: The times :math:`\tau_1 < \dots < \tau_K`, ints in 1..T.

    Raises:
        ValueError: If ``schedule`` is not one, or ``times`` are not increasing ints in 1..T, at least one.

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), section 4.2, https://arxiv.org/abs/2010.02502

    Example:
        >>> schedule = pyrodiff.LinearSchedule(num_steps=1000)
        >>> pyrodiff.SubSchedule(schedule, times=[10, 100, 1000]).alpha_bar(3) == schedule.alpha_bar(1000)
        tensor(True)
    """

    _times: Tensor

    def __init__(self, schedule: Schedule, times: Sequence[int]) -> None:
        checks.instance("schedule", schedule, Schedule)
        times = checks.increasing("times", times, schedule.num_steps)
        super().__init__(len(times))
        self.schedule = schedule
        self.register_buffer("_times", torch.tensor([0, *times], device=schedule.device))

    @property
    def times(self) -> tuple[int, ...]:
        r"""The times :math:`\tau_1, \dots, \tau_K`."""
        return tuple(self._times[1:].tolist())

    def signal(self, t: int | Tensor) -> Tensor:
        return self.schedule.signal(self.times_at(t))

    def noise(self, t: int | Tensor) -> Tensor:
        return self.schedule.noise(self.times_at(t))

    def log_snr(self, t: int | Tensor) -> Tensor:
        return self.schedule.log_snr(self.times_at(t))

    def time(self, t: int | Tensor) -> int | Tensor:
        r"""The time :math:`\tau_t` of the other schedule, an int or a tensor as t is; 0 at t = 0."""
        found = self.times_at(t)
        return found if isinstance(t, Tensor) else int(found)

    def times_at(self, t: int | Tensor) -> Tensor:
        r"""The times :math:`\tau_t` as an integer tensor of the shape of t, without reading a value of t."""
        return _at(self._times, t)

    def extra_repr(self) -> str:
        shown = "..." if self.num_steps >= 10 or self._times.is_meta else self.times
        return f"num_steps={self.num_steps}, times={shown}"


class _FixedSchedule(Schedule):
    """A schedule without parameters: its only state is a table with a column for each of t = 0..T."""

    _table: Tensor

    def __init__(self, beta: Tensor, signal: Tensor, noise: Tensor, log_snr: Tensor) -> None:
        super().__init__(len(beta) - 1)
        if not checks.holds(signal[:-1] != 0):
            first = int((signal == 0).nonzero()[0])
            raise ArgumentError(
                "betas", f"must leave some signal before the last step, but alpha_bar({first}) is 0 in float64"
            )
        weights = beta.new_tensor([[0.0], [1.0], [0.0]]).repeat(1, len(beta))  # at t = 0, where the state is x_0
        self.register_buffer("_table", torch.cat([torch.stack([beta, signal, noise, log_snr]), weights]))
        t = torch.arange(1, len(beta), device=beta.device)
        self._table[4:, 1:] = super().posterior(t, t - 1)

    def beta(self, t: int | Tensor) -> Tensor:
        return _at(self._table[0], t)

    def signal(self, t: int | Tensor) -> Tensor:
        return _at(self._table[1], t)

    def noise(self, t: int | Tensor) -> Tensor:
        return _at(self._table[2], t)

    def log_snr(self, t: int | Tensor) -> Tensor:
        return _at(self._table[3], t)

    def scales(self, t: int | Tensor) -> Tensor:
        return _at(self._table.narrow(0, 1, 2), t)

    def posterior(self, t: int | Tensor, s: int | Tensor | None = None) -> Tensor:
        return _at(self._table.narrow(0, 4, 3), t) if s is None else super().posterior(t, s)

    def extra_repr(self) -> str:
        if self._table.is_meta:
            return f"num_steps={self.num_steps}"
        (beta_1, _, noise_1, *_), (beta_T, _, noise_T, *_) = self._table[:, 1].tolist(), self._table[:, -1].tolist()
        return f"num_steps={self.num_steps}, beta={beta_1:.4g}..{beta_T:.4g}, noise={noise_1:.4g}..{noise_T:.4g}"


def _variance_preserving(beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The tables of the VP schedule with the given :math:`\beta_1, \dots, \beta_T`, from t = 0 on."""
    beta = torch.cat([beta.new_zeros(1), beta])
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    noise_squared = -torch.expm1(log_alpha_bar)
    return beta, (log_alpha_bar / 2).exp(), noise_squared.sqrt(), log_alpha_bar - noise_squared.log()


class BetaSchedule(_FixedSchedule):
    r"""The VP schedule with given :math:`\beta_1, \dots, \beta_T`.

    Arguments:
        betas: The :math:`\beta_t`, T numbers in (0, 1]; only the last may be 1 (it leaves no signal).

    Raises:
        ValueError: If ``betas`` is empty, not one-dimensional, has a value outside (0, 1], or requires a gradient.

    Example:
        >>> schedule = pyrodiff.BetaSchedule([0.1, 0.2, 0.5])
        >>> schedule.alpha_bar(3)
        tensor(0.3600, dtype=torch.float64)
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        betas = checks.numbers("betas", betas)
        if betas.dim() != 1 or len(betas) == 0:
            raise ArgumentError(
                "betas", f"must be a sequence of at least one number, but its shape is {tuple(betas.shape)}"
            )
        allowed = (betas > 0) & (betas <= 1)
        allowed[:-1] &= betas[:-1] < 1
        if not checks.holds(allowed):
            index = int((~allowed).nonzero()[0])
            raise ArgumentError(
                "betas",
                f"must lie in (0, 1], and below 1 before the last, but betas[{index}] of {len(betas)} is "
                f"{float(betas[index])}",
            )
        super().__init__(*_variance_preserving(betas))


class LinearSchedule(_FixedSchedule):
    r"""The VP schedule with :math:`\beta_t` linear from ``beta_start`` to ``beta_end``.

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1.
        beta_start: :math:`\beta_1`, in (0, 1).
        beta_end: :math:`\beta_T`, in (0, 1). With T = 1 only ``beta_start`` is used.

    Raises:
        ValueError: If ``num_steps`` is below 1 or a beta lies outside (0, 1).

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 4: T = 1000, from 1e-4 to 0.02.

    Example:
        >>> pyrodiff.LinearSchedule(num_steps=1000).log_snr(1000)
        tensor(-10.1177, dtype=torch.float64)
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        num_steps = arguments.positive_int("num_steps", num_steps)
        beta_start, beta_end = (
            arguments.number("beta_start", beta_start, 0, 1),
            arguments.number("beta_end", beta_end, 0, 1),
        )
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64, device=default_home())
        super().__init__(*_variance_preserving(betas))


class CosineSchedule(_FixedSchedule):
    r"""The VP schedule in which :math:`\bar\alpha_t` falls as a squared cosine.

    .. math:: \bar\alpha_t = \frac{f(t)}{f(0)}, \qquad f(t) = \cos^2\left(\frac{t / T + s}{1 + s} \frac{\pi}{2}\right),
        \qquad \beta_t = \min(1 - \bar\alpha_t / \bar\alpha_{t-1}, \beta_\max)

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1.
        offset: The offset :math:`s`, positive: it keeps the first steps from being too small.
        beta_max: The largest :math:`\beta_t`, in (0, 1): without it :math:`\beta_T` would be 1.

    Raises:
        ValueError: If ``num_steps`` is below 1, ``offset`` is not positive or ``beta_max`` lies outside (0, 1).

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), Eq. 17,
        https://arxiv.org/abs/2102.09672

    Example:
        >>> pyrodiff.CosineSchedule(num_steps=1000).beta(1000)
        tensor(0.9990, dtype=torch.float64)
    """

    def __init__(self, num_steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> None:
        num_steps = arguments.positive_int("num_steps", num_steps)
        offset = arguments.number("offset", offset, 0, math.inf)
        beta_max = arguments.number("beta_max", beta_max, 0, 1)
        t = torch.arange(num_steps + 1, dtype=torch.float64, device=default_home())
        log_f = 2 * torch.cos((t / num_steps + offset) / (1 + offset) * math.pi / 2).log()
        super().__init__(*_variance_preserving((-torch.expm1(log_f.diff())).clamp(max=beta_max)))


class ReciprocalSchedule(_FixedSchedule):
    r"""The VP schedule with :math:`\beta_t = 1 / (T - t + 1)`, which erases the same amount, 1 / T of the data, per
    step.

    Here :math:`\bar\alpha_t = 1 - t / T`, so nothing of the data is left at t = T: :math:`a_T = 0` and
    :math:`L_T = 0` exactly. Predictions that divide by the signal (of the noise, of the score) cannot be used with it.

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1.

    Raises:
        ValueError: If ``num_steps`` is below 1.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.4.1:
        the schedule of the binomial diffusion.

    Example:
        >>> pyrodiff.ReciprocalSchedule(num_steps=4).alpha_bar(torch.arange(5))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """

    def __init__(self, num_steps: int) -> None:
        num_steps = arguments.positive_int("num_steps", num_steps)
        t = torch.arange(num_steps + 1, dtype=torch.float64, device=default_home())
        beta = torch.cat([t[:1], 1 / (num_steps - t[1:] + 1)])
        erased = t / num_steps
        super().__init__(beta, (1 - erased).sqrt(), erased.sqrt(), torch.logit(1 - erased))


class GeometricSchedule(_FixedSchedule):
    r"""The VE schedule with noise growing geometrically from ``sigma_min`` at t = 1 to ``sigma_max`` at t = T.

    .. math:: a_t = 1, \qquad b_t = \sigma_\min \left(\frac{\sigma_\max}{\sigma_\min}\right)^{(t - 1) / (T - 1)}

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1.
        sigma_min: :math:`b_1`, positive.
        sigma_max: :math:`b_T`, above ``sigma_min``. With T = 1 it is :math:`b_1`, and ``sigma_min`` is not used.

    Raises:
        ValueError: If ``num_steps`` is below 1, ``sigma_min`` is not positive or ``sigma_max`` is not above it.

    References:
        Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon, 2019), section 4,
        https://arxiv.org/abs/1907.05600

    Example:
        >>> pyrodiff.GeometricSchedule(num_steps=3, sigma_min=0.01, sigma_max=1.0).noise(torch.arange(4))
        tensor([0.0000, 0.0100, 0.1000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, num_steps: int, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        num_steps = arguments.positive_int("num_steps", num_steps)
        sigma_min = arguments.number("sigma_min", sigma_min, 0, math.inf)
        sigma_max = arguments.number("sigma_max", sigma_max, sigma_min, math.inf)
        fraction = torch.linspace(1, 0, num_steps, dtype=torch.float64, device=default_home())
        log_sigma = math.log(sigma_max) + fraction * math.log(sigma_min / sigma_max) * (num_steps > 1)
        log_sigma = torch.cat([log_sigma.new_full((1,), -math.inf), log_sigma])
        beta = (2 * log_sigma).exp().diff(prepend=log_sigma.new_zeros(1))
        super().__init__(beta, torch.ones_like(log_sigma), log_sigma.exp(), -2 * log_sigma)


class LogSNRSchedule(_FixedSchedule):
    r"""The VP schedule with a log signal-to-noise ratio that falls linearly, from ``first`` at t = 1 to ``last`` at T.

    .. math:: a_t^2 = \mathrm{sigmoid}(\lambda_t), \qquad b_t^2 = \mathrm{sigmoid}(-\lambda_t), \qquad
        \lambda_t = \lambda_1 + \frac{t - 1}{T - 1} (\lambda_T - \lambda_1)

    Every step loses the same fraction of the signal-to-noise ratio, so no step is much larger than the others: for the
    bound of a long chain, of quantised data say, it loses least. ``first`` has to be so high that the noise
    :math:`e^{-\lambda_1 / 2}` is small against what tells the data apart: for L levels on [-1, 1] it is a quarter of
    half a bin at :math:`\lambda_1 = 2 \log(4 (L - 1))`, which is 8.3 for 17 levels and 13.9 for 256.

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1. With T = 1 only ``first`` is used.
        first: :math:`\lambda_1`.
        last: :math:`\lambda_T`, below ``first``.

    Raises:
        ValueError: If ``num_steps`` is below 1, a number lies outside (-700, 700), where float64 ends, or ``last`` is
            not below ``first``.

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 3.2: the schedule as :math:`\gamma = -\lambda`,
        there learned, https://arxiv.org/abs/2107.00630

    Example:
        >>> pyrodiff.LogSNRSchedule(num_steps=4, first=9.0, last=-9.0).log_snr(torch.arange(5))
        tensor([inf, 9., 3., -3., -9.], dtype=torch.float64)
    """

    def __init__(self, num_steps: int, first: float = 9.0, last: float = -9.0) -> None:
        num_steps = arguments.positive_int("num_steps", num_steps)
        first = arguments.number("first", first, -700, 700)
        last = arguments.number("last", last, -700, first)
        log_snr = torch.linspace(first, last, num_steps, dtype=torch.float64, device=default_home())
        log_alpha_bar = torch.nn.functional.logsigmoid(log_snr)
        beta = torch.cat([torch.sigmoid(-log_snr[:1]), -torch.expm1(log_alpha_bar.diff())])
        tables = beta, (log_alpha_bar / 2).exp(), torch.sigmoid(-log_snr).sqrt(), log_snr
        start = beta.new_tensor([[0.0], [1.0], [0.0], [math.inf]])
        super().__init__(*torch.cat([start, torch.stack(tables)], 1))
