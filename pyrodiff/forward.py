r"""The forward process q: how data turn into noise.

A forward process is a fixed Markov chain :math:`q(x_{1:T} | x_0) = \prod_t q(x_t | x_{t-1})` with three kernels in
closed form, for any :math:`0 \le s < t \le T`, and the law that it forgets the data towards:

.. math::
    \text{transition} \quad & q(x_t | x_s) \\
    \text{marginal} \quad & q(x_t | x_0) \\
    \text{posterior} \quad & q(x_s | x_t, x_0) = q(x_t | x_s) \, q(x_s | x_0) / q(x_t | x_0) \\
    \text{prior} \quad & p(x_T)

Each kernel returns a Pyro distribution. The time ``t`` is an int, and then the first dimension of the data is the
batch, or an integer tensor whose shape is the batch shape, one time a datum. Either way the distribution has that
``batch_shape`` and the remaining dimensions in its event. Values of tensors are checked where they lie on the CPU;
on an accelerator reading them would stall every step.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Table App. 1,
    https://arxiv.org/abs/1503.03585

    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 70 and 84,
    https://arxiv.org/abs/2208.11970
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import softplus

from . import checks
from .schedules import Float64Module, Schedule, SubSchedule, like, tabulated

__all__ = ["BinomialForward", "Forward", "GaussianForward"]


class Forward(Float64Module, ABC):
    """A forward process: the kernels q of a fixed Markov chain from data to noise.

    Arguments:
        schedule: The noise schedule.

    Raises:
        ValueError: If ``schedule`` is not a schedule.
    """

    support: constraints.Constraint
    """What one number of the data may be."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        checks.instance("schedule", schedule, Schedule)
        self.schedule = schedule

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return self.schedule.num_steps

    @abstractmethod
    def transition(self, x_s: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.Distribution:
        """q(x_t | x_s).

        Arguments:
            x_s: The state at time s, with shape (B, *event_shape).
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).
            s: The earlier time, in 0..t-1; t - 1 if not given.

        Returns:
            A distribution with batch_shape (B,) and the event_shape of ``x_s``.

        Raises:
            ValueError: If t or s is not an integer, lies outside its range or has another shape, or if ``x_s`` has a
                dtype that is not floating.
        """

    def marginal(self, x_0: Tensor, t: int | Tensor) -> dist.Distribution:
        """q(x_t | x_0), the transition from s = 0; arguments, result and errors as there."""
        return self.transition(x_0, t, s=0)

    @abstractmethod
    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.Distribution:
        """q(x_s | x_t, x_0).

        Arguments:
            x_t: The state at time t, with shape (B, *event_shape).
            x_0: The data, with the same shape.
            t: The time, in 2..T: an int, or an integer tensor with shape (B,).
            s: The earlier time, in 1..t-1; t - 1 if not given.

        Returns:
            A distribution with batch_shape (B,) and the event_shape of ``x_t``.

        Raises:
            ValueError: As for :meth:`transition`, and if s is 0, where the posterior is a point mass at ``x_0``.
        """

    @abstractmethod
    def prior(self, event_shape: Sequence[int], dtype: torch.dtype | None = None) -> dist.Distribution:
        """p(x_T), the law that the process forgets the data towards.

        Arguments:
            event_shape: The shape of one datum.
            dtype: The dtype of its draws; torch's default if not given.

        Returns:
            A distribution with batch_shape () and the given event_shape, on the schedule's device.
        """

    def trajectory(self, x_0: Tensor) -> Tensor:
        """A draw of all states, x_1, ..., x_T of q(x_1:T | x_0).

        Arguments:
            x_0: The data, with shape (B, *event_shape).

        Returns:
            A tensor with the shape of ``x_0`` after a first dimension of T.

        Raises:
            ValueError: As for :meth:`transition`.
        """
        states = [x_0]
        for t in range(1, self.num_steps + 1):
            states.append(self.transition(states[-1], t)())
        return torch.stack(states[1:])

    def subchain(self, times: Sequence[int]) -> "Forward":
        r"""The forward process of fewer steps, :math:`q(x_{\tau_1}, \dots, x_{\tau_K} | x_0)`, the same law of these.

        Arguments:
            times: The times :math:`\tau_1 < \dots < \tau_K`, ints in 1..T.

        Returns:
            A forward process of K steps, on :class:`SubSchedule` of the same schedule.

        Raises:
            ValueError: If ``times`` are not increasing ints in 1..T, or this kind of process cannot say it.
        """
        raise ValueError(
            f"{type(self).__name__} must have a method subchain(times) of its own to be cut to fewer steps"
        )

    def check(self, x_0: Tensor, event_shape: torch.Size, wait: bool = False) -> None:
        """Refuse what cannot be data: another shape than (B, *event_shape), dtype, device or values.

        Values on an accelerator are read only if told to ``wait`` for them.

        Raises:
            ValueError: If so, or if there is no datum.
        """
        if checks.trusted() and not wait:
            return
        if not isinstance(x_0, Tensor):
            raise ValueError(f"x_0 must be a tensor, but it is a {type(x_0).__name__}")
        if x_0.dim() != 1 + len(event_shape) or x_0.shape[1:] != event_shape or len(x_0) == 0:
            expected = ", ".join(("B", *tuple(str(size) for size in event_shape)))
            raise ValueError(f"x_0 must have shape ({expected}) with B >= 1, but its shape is {tuple(x_0.shape)}")
        if not x_0.is_floating_point():
            raise ValueError(f"x_0 must have a floating dtype, but its dtype is {x_0.dtype}")
        device = self.schedule.noise(0).device
        if x_0.device != device:
            raise ValueError(f"x_0 must be on the model's device {device}, but it is on {x_0.device}")
        valid = self.support.check(x_0) & x_0.isfinite()
        if not (bool(valid.all()) if wait else checks.holds(valid)):
            raise ValueError(
                f"x_0 must be {'0 or 1' if self.support is constraints.boolean else 'finite'} everywhere, "
                f"but {int((~valid).sum())} of its {x_0.numel()} values are not, the first {x_0[~valid][0]}"
            )

    def earlier(self, x: Tensor, t: int | Tensor, s: int | Tensor | None = None, first: int = 0) -> int | Tensor:
        """The earlier time s, t - 1 if not given, after checks of the state ``x`` and of first <= s < t <= T.

        Raises:
            ValueError: As for :meth:`transition`.
        """
        if checks.trusted():
            return t - 1 if s is None else s
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
            raise ValueError(f"the state must be a tensor with a floating dtype, but it {got}")
        checks.integer("t", t, self.num_steps, low=first + 1)
        s = t - 1 if s is None else s
        checks.integer("s", s, self.num_steps - 1, low=first)
        for name, time in (("t", t), ("s", s)):
            if isinstance(time, Tensor) and time.shape not in (torch.Size(), x.shape[: time.dim()]):
                batch_shape = tuple(x.shape[: max(time.dim(), 1)])
                raise ValueError(
                    f"{name} must be an int or have the batch shape {batch_shape} of the state of shape "
                    f"{tuple(x.shape)}, but its shape is {tuple(time.shape)}"
                )
        if not checks.holds((s >= first) & (s < t) & (t <= self.num_steps)):
            raise ValueError(f"s and t must satisfy {first} <= s < t <= {self.num_steps}, but t is {t} and s is {s}")
        return s

    def _earlier_of_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None) -> int | Tensor:
        s = self.earlier(x_t, t, s, first=1)
        if checks.trusted():
            return s
        if not isinstance(x_0, Tensor) or x_0.shape != x_t.shape[x_t.dim() - x_0.dim() :]:
            shape = tuple(x_0.shape) if isinstance(x_0, Tensor) else x_0
            raise ValueError(f"x_0 must have the shape {tuple(x_t.shape)} of the state x_t, but its shape is {shape}")
        return s


def event_dim(x: Tensor, t: int | Tensor) -> int:
    """The number of event dimensions of x: all but the batch dimensions, which are those of t, or one."""
    return x.dim() - max(t.dim() if isinstance(t, Tensor) else 0, 1)


class Isotropic(dist.Independent):
    """A Gaussian with one standard deviation for all numbers of a datum, which makes it cheap.

    It is ``Normal(mean, deviation).to_event(...)``, but that is built only if somebody asks for it.

    Arguments:
        mean: The mean, with shape (*batch_shape, *event_shape).
        deviation: The standard deviation in float64, with shape batch_shape or ().
        event_dim: The number of dimensions of the event, at least 1.
    """

    has_rsample = True
    _validate_args = False  # the normal law below does that

    def __init__(self, mean: Tensor, deviation: Tensor, event_dim: int) -> None:
        split = mean.dim() - event_dim
        self.loc, self.deviation, self.reinterpreted_batch_ndims = mean, deviation, event_dim
        dist.TorchDistribution.__init__(self, mean.shape[:split], mean.shape[split:])
        if torch.distributions.Distribution._validate_args:
            self._base()

    @property
    def base_dist(self) -> dist.Distribution:
        return self._base()

    def _base(self) -> dist.Distribution:
        return dist.Normal(self.loc, like(self.deviation, self.loc))

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "Isotropic":
        batch_shape = torch.Size(batch_shape)
        mean, deviation = self.loc.expand(batch_shape + self.event_shape), self.deviation
        return type(self)(mean, deviation.expand(batch_shape) if deviation.dim() else deviation, len(self.event_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape = self._extended_shape(sample_shape)
        epsilon = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, like(self.deviation, self.loc), epsilon)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        with torch.no_grad():
            return self.rsample(sample_shape)


def isotropic(mean: Tensor, deviation: Tensor, event_dim: int) -> dist.Distribution:
    """:class:`Isotropic`, or just a normal where a datum is one number."""
    return Isotropic(mean, deviation, event_dim) if event_dim else dist.Normal(mean, like(deviation, mean))


@register_kl(Isotropic, Isotropic)
def _kl_isotropic(q: Isotropic, p: Isotropic) -> Tensor:
    """What all numbers of a datum share is computed once, in float64: near 0 it cancels."""
    shift = (q.loc - p.loc).flatten(len(q.batch_shape))
    ratio, weight = (q.deviation / p.deviation) ** 2, 0.5 / p.deviation**2
    shared = (ratio - ratio.log() - 1) * (shift.shape[-1] / 2)
    return torch.addcmul(shared.to(shift.dtype), shift.square().sum(-1), weight.to(shift.dtype))


class Bits(dist.Bernoulli):
    """A Bernoulli whose KL is finite wherever the log odds are; torch's is infinite where a probability rounds to 1."""


@register_kl(Bits, Bits)
@register_kl(Bits, torch.distributions.Bernoulli)
def _kl_bits(q: Bits, p: torch.distributions.Bernoulli) -> Tensor:
    one, zero = (softplus(-p.logits) - softplus(-q.logits)), (softplus(p.logits) - softplus(q.logits))
    ones, zeros = q.logits.sigmoid(), (-q.logits).sigmoid()
    return torch.where(ones == 0, 0, ones * one) + torch.where(zeros == 0, 0, zeros * zero)


class GaussianForward(Forward):
    r"""Gaussian diffusion: variance preserving or variance exploding, by the schedule alone.

    With :math:`a, b` the signal and noise of the schedule, :math:`a_{t|s}, b_{t|s}` those of the step from s to t,
    and :math:`c = 1 - e^{\lambda_t - \lambda_s}`, the part of the signal-to-noise ratio lost in the step,

    .. math::
        q(x_t | x_s) &= N(a_{t|s} x_s, \; b_{t|s}^2) \\
        q(x_t | x_0) &= N(a_t x_0, \; b_t^2) \\
        q(x_s | x_t, x_0) &= N\left(\tfrac{a_{t|s} b_s^2}{b_t^2} x_t + a_s c \, x_0, \; b_s^2 c\right) \\
        p(x_T) &= N(0, \; a_T^2 + b_T^2)

    The prior is :math:`q(x_T)` of data of mean 0 and variance 1: the standard normal if VP, variance
    :math:`1 + \sigma_\max^2` if VE.

    Arguments:
        schedule: The noise schedule.

    References:
        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 31, 70 and 84,
        https://arxiv.org/abs/2208.11970

        Variational Diffusion Models (Kingma et al., 2021), Eqs. 22 and 25, https://arxiv.org/abs/2107.00630

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=10))
        >>> q = forward.posterior(torch.zeros(5, 2), torch.ones(5, 2), t=3)
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    support = constraints.real

    def trajectory(self, x_0: Tensor) -> Tensor:
        r"""As of :meth:`Forward.trajectory`, all at once: :math:`x_t / a_t` is a Brownian motion at time b_t^2 / a_t^2.

        It is followed in float64; where no signal is left (t = T alone) the state is noise by itself.
        """
        t = torch.arange(1, self.num_steps + 1, device=x_0.device)
        if type(self) is not GaussianForward or not self._is_followed():
            return super().trajectory(x_0)
        self.earlier(x_0, self.num_steps)
        signal, noise = self.schedule.signal(t), self.schedule.noise(t)
        clock = torch.where(signal > 0, -self.schedule.log_snr(t), -torch.inf).exp()
        pace = torch.cat([clock[:1], clock.diff()]).clamp(min=0).sqrt()
        signal, noise, pace = (value.reshape((-1,) + (1,) * x_0.dim()) for value in (signal, noise, pace))
        epsilon = torch.randn((self.num_steps, *x_0.shape), dtype=torch.float64, device=x_0.device)
        walk = x_0 + (pace * epsilon).cumsum(0)
        return torch.where(signal > 0, signal * walk, noise * epsilon).to(x_0.dtype)

    def subchain(self, times: Sequence[int]) -> "GaussianForward":
        return type(self)(SubSchedule(self.schedule, times))

    def transition(self, x_s: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.Distribution:
        s = self.earlier(x_s, t, s, first=0)
        signal, noise = self.schedule.step(t, s)
        return self._normal(like(signal, x_s) * x_s, noise, t)

    def marginal(self, x_0: Tensor, t: int | Tensor) -> dist.Distribution:
        self.earlier(x_0, t, 0)
        signal, noise = self.schedule.scales(t).unbind()
        return self._normal(like(signal, x_0) * x_0, noise, t)

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.Distribution:
        self._earlier_of_posterior(x_t, x_0, t, s)
        weight_t, weight_0, noise = self.schedule.posterior(t, s)
        return self._normal(like(weight_t, x_t) * x_t + like(weight_0, x_t) * x_0, noise, t)

    def noise(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        r"""The noise :math:`\epsilon = (x_t - a_t x_0) / b_t` that leads from ``x_0`` to ``x_t``, of their shape."""
        signal, noise = self.scales(x_t, t)
        return (x_t - signal * x_0) / noise

    def score(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        r"""The score :math:`\nabla_{x_t} \log q(x_t | x_0) = (a_t x_0 - x_t) / b_t^2`, with the shape of ``x_t``."""
        signal, noise = self.scales(x_t, t)
        return (signal * x_0 - x_t) / noise**2

    def velocity(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        r"""The velocity :math:`v = a_t \epsilon - b_t x_0`, with the shape of ``x_t``."""
        signal, noise = self.scales(x_t, t)
        return (signal * x_t - (signal**2 + noise**2) * x_0) / noise

    def prior(self, event_shape: Sequence[int], dtype: torch.dtype | None = None) -> dist.Distribution:
        T, dtype = self.num_steps, dtype or torch.get_default_dtype()
        scale = (self.schedule.signal(T) ** 2 + self.schedule.noise(T) ** 2).sqrt()
        mean = torch.zeros(tuple(event_shape), dtype=dtype, device=scale.device)
        return isotropic(mean, scale, len(event_shape))

    def _is_followed(self) -> bool:
        """Whether the time of the Brownian motion stays within float64: signals fall to no less than e^-350."""
        last = self.num_steps - (self.num_steps > 1)  # at T there may be none
        ends = (self.schedule.signal(t) for t in (last, self.num_steps))
        return checks.blind() or all(not 0 < float(signal) < 1e-150 for signal in ends)

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        r"""KL(q(x_T | x_0) || p(x_T)), L_T under :meth:`prior`.

        .. math:: \frac{a_T^2}{2 \sigma^2} \| x_0 \|^2
            + \frac{D}{2} \left(\frac{b_T^2}{\sigma^2} - 1 - \log \frac{b_T^2}{\sigma^2}\right),
            \qquad \sigma^2 = a_T^2 + b_T^2

        Arguments:
            x_0: The data, with shape (B, *event_shape).

        Returns:
            A tensor with shape (B,), in nats.
        """
        table = tabulated(self, "_ending", [self.schedule], self._last)
        weight, shared = (self._last() if table is None else table).to(x_0.dtype)
        x = x_0.flatten(1)
        return x.square().sum(-1) * weight + shared * x.shape[-1]

    def _last(self) -> Tensor:
        """The weight of the square of the data in L_T, and what L_T is for a number that is 0."""
        T = self.num_steps
        signal, noise = self.schedule.signal(T) ** 2, self.schedule.noise(T) ** 2
        ratio = noise / (signal + noise)
        return torch.stack([signal / (signal + noise), ratio - 1 - ratio.log()]) / 2

    def scales(self, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """The signal and the noise at t, in the dtype of ``x_t`` and broadcastable against it."""
        scales = self.schedule.scales(t).to(x_t.dtype)
        missing = x_t.dim() - scales.dim() + 1 if scales.dim() > 1 else 0
        return (scales[(..., *(None,) * missing)] if missing else scales).unbind()

    def _normal(self, mean: Tensor, noise: Tensor, t: int | Tensor) -> dist.Distribution:
        return isotropic(mean, noise, event_dim(mean, t))


class BinomialForward(Forward):
    r"""Binomial diffusion of bits: each step forgets a bit with probability beta_t and then draws it anew.

    With :math:`\bar\alpha_{t|s} = \bar\alpha_t / \bar\alpha_s`, for every bit by itself,

    .. math::
        q(x_t = 1 | x_s) &= \bar\alpha_{t|s} x_s + (1 - \bar\alpha_{t|s}) r \\
        q(x_t = 1 | x_0) &= \bar\alpha_t x_0 + (1 - \bar\alpha_t) r \\
        q(x_s | x_t, x_0) &\propto q(x_t | x_s) \, q(x_s | x_0) \\
        p(x_T = 1) &= r

    Arguments:
        schedule: A variance preserving noise schedule.
        rate: The stationary rate r, the probability of a 1 in pure noise: in (0, 1), a number or a tensor that
            broadcasts against one datum (a rate a dimension).

    Raises:
        ValueError: If the schedule is variance exploding (it never forgets a bit) or a rate lies outside (0, 1).

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Table App. 1,
        there with r = 0.5; section D.1.2 uses the rate of the data, 0.2.

    Example:
        >>> forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=10), rate=0.2)
        >>> forward.marginal(torch.tensor([[0.0, 1.0]]), t=5).base_dist.probs
        tensor([[0.1000, 0.6000]])
    """

    support = constraints.boolean

    def __init__(self, schedule: Schedule, rate: float | Tensor = 0.5) -> None:
        super().__init__(schedule)
        rate = torch.as_tensor(rate, dtype=torch.float64)
        if not ((rate > 0) & (rate < 1)).all():
            raise ValueError(f"rate must lie in (0, 1), but it is {rate.tolist()}")
        if schedule.alpha_bar(schedule.num_steps) >= 1:
            raise ValueError(f"schedule must be variance preserving, but it is {schedule!r}")
        self.register_buffer("rate", rate)

    def trajectory(self, x_0: Tensor) -> Tensor:
        """As of :meth:`Forward.trajectory`, all at once: a bit is what it was at its last redrawing, or at t = 0."""
        if type(self) is not BinomialForward:
            return super().trajectory(x_0)
        self.earlier(x_0, self.num_steps)
        t = torch.arange(1, self.num_steps + 1, device=x_0.device)
        beta = self.schedule.beta(t).reshape((-1,) + (1,) * x_0.dim())
        redrawn = torch.rand((self.num_steps, *x_0.shape), dtype=torch.float64, device=x_0.device) < beta
        bits = torch.bernoulli(self.rate.expand((self.num_steps, *x_0.shape))).to(x_0.dtype)
        last = torch.where(redrawn, t.reshape(beta.shape), 0).cummax(0).values
        return torch.cat([x_0[None], bits]).gather(0, last)

    def subchain(self, times: Sequence[int]) -> "BinomialForward":
        return type(self)(SubSchedule(self.schedule, times), self.rate)

    def check(self, x_0: Tensor, event_shape: torch.Size, wait: bool = False) -> None:
        super().check(x_0, event_shape, wait)
        if self.rate.dim() > len(event_shape) or any(
            rates not in (1, size)
            for rates, size in zip(reversed(self.rate.shape), reversed(event_shape), strict=False)
        ):
            raise ValueError(
                f"rate must broadcast against one datum of shape {tuple(event_shape)}, but its shape is "
                f"{tuple(self.rate.shape)}"
            )

    def transition(self, x_s: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.Distribution:
        s = self.earlier(x_s, t, s, first=0)
        kept, redrawn = (like(coefficient**2, x_s) for coefficient in self.schedule.step(t, s))
        one = kept * x_s + redrawn * self.rate.to(x_s.dtype)
        zero = kept * (1 - x_s) + redrawn * (1 - self.rate).to(x_s.dtype)
        return Bits(logits=one.log() - zero.log()).to_event(event_dim(x_s, t))

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.Distribution:
        s = self._earlier_of_posterior(x_t, x_0, t, s)
        return Bits(logits=self.posterior_logits(x_t, x_0, t, s)).to_event(event_dim(x_t, t))

    def posterior_logits(self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
        """The log odds of x_s = 1 in q(x_s | x_t, x_0).

        Arguments:
            x_t: The bits at time t, with shape (B, *event_shape).
            x_0: The data, a tensor that broadcasts against ``x_t``.
            t: The time, in 1..T, an int or an integer tensor with shape (B,).
            s: The earlier time, in 0..t-1. At s = 0 they are infinite.

        Returns:
            Log odds with the shape of ``x_t``.
        """
        rate, rest = self.rate.to(x_t.dtype), (1 - self.rate).to(x_t.dtype)
        left, noise = (like(coefficient(s) ** 2, x_t) for coefficient in (self.schedule.signal, self.schedule.noise))
        kept, redrawn = (like(coefficient**2, x_t) for coefficient in self.schedule.step(t, s))
        redrawn = redrawn * torch.where(x_t == 1, rate, rest)
        one = (left * x_0 + noise * rate) * (kept * x_t + redrawn)
        zero = (left * (1 - x_0) + noise * rest) * (kept * (1 - x_t) + redrawn)
        return one.log() - zero.log()

    def prior(self, event_shape: Sequence[int], dtype: torch.dtype | None = None) -> dist.Distribution:
        rate = self.rate.to(dtype or torch.get_default_dtype())
        return Bits(rate.expand(tuple(event_shape))).to_event(len(event_shape))
