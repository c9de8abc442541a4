r"""The noise schedule: how much of the data is left, and how much noise is in, after each step.

A schedule of :math:`T` steps is two sequences, the signal :math:`a_t` and the noise :math:`b_t`,

.. math:: x_t = a_t x_0 + b_t \epsilon, \qquad \epsilon \sim N(0, I), \qquad t = 0, \dots, T,

with :math:`a_0 = 1` and :math:`b_0 = 0`. *Variance preserving* (VP) schedules are given by
:math:`\beta_1, \dots, \beta_T`: with :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)` they have
:math:`a_t = \sqrt{\bar\alpha_t}` and :math:`b_t = \sqrt{1 - \bar\alpha_t}`. *Variance exploding* (VE) schedules
have :math:`a_t = 1` and a growing :math:`b_t`. The log signal-to-noise ratio
:math:`\lambda_t = \log a_t^2 / b_t^2` falls from :math:`\infty` at :math:`t = 0`.

Every quantity is computed, kept and returned in float64, whatever dtype the module is cast to: in float32
:math:`1 - \bar\alpha_1` of a 1000-step schedule is already off in its fourth digit. The kernels cast their
coefficients at the last moment.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015),
    https://arxiv.org/abs/1503.03585

    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import checks

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


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient, of shape () or the batch shape of x, in x's dtype and broadcastable against x."""
    coefficient, missing = coefficient.to(x.dtype), x.dim() - coefficient.dim()
    return coefficient if missing == 0 or not coefficient.dim() else coefficient[(..., *(None,) * missing)]


class Float64Module(nn.Module):
    """A module whose buffers are float64 and stay so: they follow it to another device, but not to another dtype."""

    def _apply(self, fn, recurse: bool = True) -> "Float64Module":  # noqa: ANN001 - torch's own signature
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def own(kind: type) -> type:
    """Decorates a class whose instances, but not those of a subclass, are wholly given by their buffers and own parts.

    Arguments:
        kind: The class.
    """
    kind._own = kind
    return kind


def _state(part: nn.Module) -> list[tuple[object, int]] | None:
    """The part and its buffers, with their versions; None where something else may matter."""
    if getattr(type(part), "_own", None) is not type(part) or part._parameters:
        return None
    found: list[tuple[object, int]] = [(part, 0)]
    found += [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in part._buffers.values()]
    for below in part._modules.values():
        more = _state(below)
        if more is None:
            return None
        found += more
    return found


def tabulated(owner: nn.Module, name: str, parts: Sequence[nn.Module], table: Callable[[], Tensor]) -> Tensor | None:
    """A table that depends on parts without parameters: made when they have changed, and kept.

    Arguments:
        owner: The module that keeps it.
        name: Its name there.
        parts: What it depends on.
        table: Makes it.

    Returns:
        The table; None where there is nothing to keep: a part may learn or is not the package's own, or what comes of
        it is being traced.
    """
    if checks.blind():
        return None
    states = [_state(part) for part in parts]
    if None in states:
        return None
    state = [entry for each in states for entry in each]
    kept = owner.__dict__.get(name)
    if kept is None or not _same_state(kept[0], state):
        with torch.no_grad():
            kept = owner.__dict__[name] = state, table()
    return kept[1]


def _same_state(ours: list[tuple[object, int]], theirs: list[tuple[object, int]]) -> bool:
    return len(ours) == len(theirs) and all(a is b and m == n for (a, m), (b, n) in zip(ours, theirs, strict=True))


class Schedule(Float64Module, ABC):
    r"""A noise schedule of :math:`T` steps: the signal :math:`a_t` and the noise :math:`b_t` for t = 0..T.

    All methods take ``t`` as an int or as an integer tensor of any shape, and return float64 of that shape.

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1.

    Raises:
        ValueError: If ``num_steps`` is not an int of at least 1.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        checks.positive_int("num_steps", num_steps)
        self.num_steps = num_steps

    @abstractmethod
    def beta(self, t: int | Tensor) -> Tensor:
        r"""The variance :math:`\beta_t` of :math:`q(x_t | x_{t-1})`; 0 at t = 0."""

    @abstractmethod
    def signal(self, t: int | Tensor) -> Tensor:
        r"""The signal :math:`a_t`, :math:`\sqrt{\bar\alpha_t}` if VP and 1 if VE."""

    @abstractmethod
    def noise(self, t: int | Tensor) -> Tensor:
        r"""The noise :math:`b_t`, :math:`\sqrt{1 - \bar\alpha_t}` if VP."""

    @abstractmethod
    def log_snr(self, t: int | Tensor) -> Tensor:
        r"""The log signal-to-noise ratio :math:`\lambda_t = \log a_t^2 / b_t^2`; infinite at t = 0."""

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        r""":math:`\bar\alpha_t = a_t^2`, the product of the :math:`1 - \beta_s` up to t if VP, and 1 if VE."""
        return self.signal(t) ** 2

    def scales(self, t: int | Tensor) -> Tensor:
        """Signal and noise, with shape (2, *t.shape)."""
        return torch.stack([self.signal(t), self.noise(t)])

    def step(self, t: int | Tensor, s: int | Tensor) -> tuple[Tensor, Tensor]:
        r"""Signal and noise of the step from s to t > s, :math:`x_t = a_{t|s} x_s + b_{t|s} \epsilon`.

        .. math:: a_{t|s} = a_t / a_s, \qquad b_{t|s}^2 = b_t^2 - a_{t|s}^2 b_s^2
            = b_t^2 \left(1 - e^{\lambda_t - \lambda_s}\right)

        The second form does not cancel where the noise is small. With s = t - 1 it is :math:`b_{t|s}^2 = \beta_t`.
        """
        remaining = -torch.expm1(self.log_snr(t) - self.log_snr(s))
        return self.signal(t) / self.signal(s), self.noise(t) * remaining.sqrt()

    def posterior(self, t: int | Tensor, s: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Of :math:`q(x_s | x_t, x_0)` the weights of x_t and of x_0 in the mean, and the standard deviation.

        .. math:: \frac{a_{t|s} b_s^2}{b_t^2}, \qquad \frac{a_s b_{t|s}^2}{b_t^2}, \qquad \frac{b_s b_{t|s}}{b_t}

        s is t - 1 if not given; at s = 0 they are 0, 1 and 0.

        References:
            Variational Diffusion Models (Kingma et al., 2021), Eqs. 25-26, https://arxiv.org/abs/2107.00630
        """
        s = t - 1 if s is None else s
        (signal, noise), noise_s, noise_t = self.step(t, s), self.noise(s), self.noise(t)
        return signal * (noise_s / noise_t) ** 2, self.signal(s) * (noise / noise_t) ** 2, noise_s * noise / noise_t


def _lookup(table: Tensor, t: int | Tensor) -> Tensor:
    """The value at t of a table of T + 1 values."""
    if checks.trusted() and isinstance(t, Tensor):
        return table[t.long()] if t.dim() != 1 else table.index_select(0, t)
    num_steps = len(table) - 1
    checks.integer("t", t, num_steps)
    expected = f"t must lie in 0..{num_steps}"
    if isinstance(t, Tensor):
        if t.device != table.device:
            raise ValueError(f"t must be on the schedule's device {table.device}, but it is on {t.device}")
        try:  # unlike table[t], index_select also refuses a negative index
            return table.index_select(0, t.reshape(-1).long()).reshape(t.shape)
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"{expected}, but it has values in {t.min()}..{t.max()}") from error
    if not 0 <= t <= num_steps:
        raise ValueError(f"{expected}, but it is {t}")
    return table[int(t)]


@own
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

    def __init__(self, schedule: Schedule, times: Sequence[int]) -> None:
        checks.instance("schedule", schedule, Schedule)
        times = checks.increasing("times", times, schedule.num_steps)
        super().__init__(len(times))
        self.schedule, self.times = schedule, times
        self.register_buffer("_times", torch.tensor([0, *times], device=schedule.noise(0).device), persistent=False)

    def beta(self, t: int | Tensor) -> Tensor:
        now, before = self.time(t), self.time((t.long() - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0))
        noise = self.schedule.step(now, before)[1]
        return torch.where(torch.as_tensor(t == 0, device=noise.device), 0, noise**2)

    def signal(self, t: int | Tensor) -> Tensor:
        return self.schedule.signal(self.time(t))

    def noise(self, t: int | Tensor) -> Tensor:
        return self.schedule.noise(self.time(t))

    def log_snr(self, t: int | Tensor) -> Tensor:
        return self.schedule.log_snr(self.time(t))

    def time(self, t: int | Tensor) -> int | Tensor:
        r"""The time :math:`\tau_t` of the other schedule, an int or a tensor as t is; 0 at t = 0."""
        if isinstance(t, Tensor):
            return _lookup(self._times, t)
        checks.integer("t", t, self.num_steps)
        if not 0 <= t <= self.num_steps:
            raise ValueError(f"t must lie in 0..{self.num_steps}, but it is {t}")
        return (0, *self.times)[int(t)]

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, times={self.times if self.num_steps < 10 else '...'}"


class _FixedSchedule(Schedule):
    """A schedule without parameters: tables of its T + 1 values."""

    def __init__(self, beta: Tensor, signal: Tensor, noise: Tensor, log_snr: Tensor) -> None:
        super().__init__(len(beta) - 1)
        if (signal[:-1] == 0).any():
            t = int((signal == 0).nonzero()[0])
            raise ValueError(f"betas must leave some signal before the last step, but alpha_bar({t}) is 0 in float64")
        for name, table in (("beta", beta), ("signal", signal), ("noise", noise), ("log_snr", log_snr)):
            self.register_buffer(f"_{name}", table.double())

    def scales(self, t: int | Tensor) -> Tensor:
        found = self._tabulated("_scales", super().scales, t)
        return super().scales(t) if found is None else found

    def posterior(self, t: int | Tensor, s: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        found = self._tabulated("_weights", self._posteriors, t) if s is None else None
        return super().posterior(t, s) if found is None else found.unbind()

    def _posteriors(self, t: Tensor) -> Tensor:
        """The posterior's weights, with those of t = 1 also at t = 0."""
        t = t.clamp(min=1)
        return torch.stack(super().posterior(t, t - 1))

    def _tabulated(self, name: str, function: Callable[[Tensor], Tensor], t: int | Tensor) -> Tensor | None:
        """The columns at t of a function of all times, which every step of training asks for."""
        if not (isinstance(t, Tensor) and t.dim() == 1 and checks.trusted()):
            return None
        size, device = len(self._noise), self._noise.device
        table = tabulated(self, name, [self], lambda: function(torch.arange(size, device=device)))
        return None if table is None else table.index_select(1, t)

    def beta(self, t: int | Tensor) -> Tensor:
        return _lookup(self._beta, t)

    def signal(self, t: int | Tensor) -> Tensor:
        return _lookup(self._signal, t)

    def noise(self, t: int | Tensor) -> Tensor:
        return _lookup(self._noise, t)

    def log_snr(self, t: int | Tensor) -> Tensor:
        return _lookup(self._log_snr, t)


def _variance_preserving(beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The tables of the VP schedule with the given :math:`\beta_1, \dots, \beta_T`, from t = 0 on."""
    beta = torch.cat([beta.new_zeros(1), beta])
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    noise_squared = -torch.expm1(log_alpha_bar)
    return beta, (log_alpha_bar / 2).exp(), noise_squared.sqrt(), log_alpha_bar - noise_squared.log()


@own
class BetaSchedule(_FixedSchedule):
    r"""The VP schedule with given :math:`\beta_1, \dots, \beta_T`.

    Arguments:
        betas: The :math:`\beta_t`, T numbers in (0, 1]; only the last may be 1 (it leaves no signal).

    Raises:
        ValueError: If ``betas`` is empty, not one-dimensional, or has a value outside (0, 1].

    Example:
        >>> schedule = pyrodiff.BetaSchedule([0.1, 0.2, 0.5])
        >>> schedule.alpha_bar(3)
        tensor(0.3600, dtype=torch.float64)
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64).detach()
        if betas.dim() != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a sequence of at least one number, but its shape is {tuple(betas.shape)}")
        allowed = (betas > 0) & (betas <= 1)
        allowed[:-1] &= betas[:-1] < 1
        if not allowed.all():
            index = int((~allowed).nonzero()[0])
            raise ValueError(
                f"betas must lie in (0, 1], and below 1 before the last, but betas[{index}] of {len(betas)} is "
                f"{float(betas[index])}"
            )
        super().__init__(*_variance_preserving(betas))

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, beta_1={self._beta[1]:.4g}, beta_T={self._beta[-1]:.4g}"


@own
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
        checks.positive_int("num_steps", num_steps)
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            checks.number(name, beta, 0, 1)
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
        super().__init__(*_variance_preserving(betas))
        self.beta_start, self.beta_end = beta_start, beta_end

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, beta_start={self.beta_start}, beta_end={self.beta_end}"


@own
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
        checks.positive_int("num_steps", num_steps)
        checks.number("offset", offset, 0, math.inf)
        checks.number("beta_max", beta_max, 0, 1)
        t = torch.arange(num_steps + 1, dtype=torch.float64)
        log_f = 2 * torch.cos((t / num_steps + offset) / (1 + offset) * math.pi / 2).log()
        super().__init__(*_variance_preserving((-torch.expm1(log_f.diff())).clamp(max=beta_max)))
        self.offset, self.beta_max = offset, beta_max

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, offset={self.offset}, beta_max={self.beta_max}"


@own
class ReciprocalSchedule(_FixedSchedule):
    r"""The VP schedule with :math:`\beta_t = 1 / (T - t + 1)`, which erases a constant fraction of the data a step.

    Here :math:`\bar\alpha_t = 1 - t / T`, so nothing of the data is left at t = T: :math:`a_T = 0` and
    :math:`L_T = 0` exactly. What divides by the signal (noise and score prediction) cannot be used with it.

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
        checks.positive_int("num_steps", num_steps)
        t = torch.arange(num_steps + 1, dtype=torch.float64)
        beta = torch.cat([t[:1], 1 / (num_steps - t[1:] + 1)])
        erased = t / num_steps
        super().__init__(beta, (1 - erased).sqrt(), erased.sqrt(), torch.logit(1 - erased))

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}"


@own
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
        checks.positive_int("num_steps", num_steps)
        checks.number("sigma_min", sigma_min, 0, math.inf)
        checks.number("sigma_max", sigma_max, sigma_min, math.inf)
        fraction = torch.linspace(1, 0, num_steps, dtype=torch.float64)
        log_sigma = math.log(sigma_max) + fraction * math.log(sigma_min / sigma_max) * (num_steps > 1)
        log_sigma = torch.cat([log_sigma.new_full((1,), -math.inf), log_sigma])
        beta = (2 * log_sigma).exp().diff(prepend=log_sigma.new_zeros(1))
        super().__init__(beta, torch.ones_like(log_sigma), log_sigma.exp(), -2 * log_sigma)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"


@own
class LogSNRSchedule(_FixedSchedule):
    r"""The VP schedule with a log signal-to-noise ratio that falls linearly, from ``first`` at t = 1 to ``last`` at T.

    .. math:: a_t^2 = \mathrm{sigmoid}(\lambda_t), \qquad b_t^2 = \mathrm{sigmoid}(-\lambda_t), \qquad
        \lambda_t = \lambda_1 + \frac{t - 1}{T - 1} (\lambda_T - \lambda_1)

    Every step takes the same part of the signal-to-noise ratio, so no step is much larger than the others: where the
    bound of a long chain is wanted, of quantised data say, it loses least. ``first`` has to be so high that the noise
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
        checks.positive_int("num_steps", num_steps)
        checks.number("first", first, -700, 700)
        checks.number("last", last, -700, first)
        log_snr = torch.linspace(first, last, num_steps, dtype=torch.float64)
        log_alpha_bar = torch.nn.functional.logsigmoid(log_snr)
        beta = torch.cat([torch.sigmoid(-log_snr[:1]), -torch.expm1(log_alpha_bar.diff())])
        tables = beta, (log_alpha_bar / 2).exp(), torch.sigmoid(-log_snr).sqrt(), log_snr
        start = beta.new_tensor([[0.0], [1.0], [0.0], [math.inf]])
        super().__init__(*torch.cat([start, torch.stack(tables)], 1))
        self.first, self.last = first, last

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, first={self.first}, last={self.last}"
