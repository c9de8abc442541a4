r"""The forward process q: how data turn into noise.

A forward process is a fixed Markov chain :math:`q(x_{1:T} | x_0) = \prod_t q(x_t | x_{t-1})` with three kernels in
closed form, for any :math:`0 \le s < t \le T`, and the distribution that it ends in:

.. math::
    \text{transition} \quad & q(x_t | x_s) \\
    \text{marginal} \quad & q(x_t | x_0) \\
    \text{posterior} \quad & q(x_s | x_t, x_0) = q(x_t | x_s) \, q(x_s | x_0) / q(x_t | x_0) \\
    \text{prior} \quad & p(x_T)

Each kernel returns a Pyro distribution. The time ``t`` is an int, and then the first dimension of the data is the
batch, or an integer tensor whose shape is the batch shape, one time per datum. Either way the distribution has that
``batch_shape`` and the remaining dimensions in its event. Arguments are checked while Pyro validates.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Table App. 1,
    https://arxiv.org/abs/1503.03585

    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 70 and 84,
    https://arxiv.org/abs/2208.11970
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import register_kl
from torch.nn.functional import softplus

from ..base import checks
from ..base.arguments import ArgumentError
from ..base.precision import Float64Module, coefficients, home
from .quantization import number_of_values
from .schedules import Schedule, SubSchedule

__all__ = ["BinomialForward", "Forward", "GaussianForward"]


class Forward(Float64Module, ABC):
    """A forward process: the kernels q of a fixed Markov chain from data to noise.

    Arguments:
        schedule: The noise schedule.

    Raises:
        ValueError: If ``schedule`` is not a schedule.
    """

    support: constraints.Constraint
    """What one number of a state may be."""

    is_integer: bool = False
    """Whether states are integers (``torch.long``), as categories are; else they are floats, as bits here are too."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        checks.instance("schedule", schedule, Schedule)
        self.schedule = schedule

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return self.schedule.num_steps

    @property
    def levels(self) -> int | float | None:
        """How many values a number of a state may take (infinity for all integers); None where p is a density."""
        return number_of_values(self.support)

    @abstractmethod
    def transition(self, x_s: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.TorchDistribution:
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

    def marginal(self, x_0: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        """q(x_t | x_0), the transition from s = 0; arguments, result and errors as there."""
        return self.transition(x_0, t, s=0)

    @abstractmethod
    def posterior(
        self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None = None
    ) -> dist.TorchDistribution:
        """q(x_s | x_t, x_0).

        Arguments:
            x_t: The state at time t, with shape (B, *event_shape).
            x_0: The data, with a shape that broadcasts to that: particles and enumeration add dimensions to ``x_t``.
            t: The time, in 2..T: an int, or an integer tensor with shape (B,).
            s: The earlier time, in 1..t-1; t - 1 if not given.

        Returns:
            A distribution with batch_shape (B,) and the event_shape of ``x_t``.

        Raises:
            ValueError: As for :meth:`transition`, and if s is 0, where the posterior is a point mass at ``x_0``.
        """

    @abstractmethod
    def prior(
        self, event_shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> dist.TorchDistribution:
        """p(x_T), the distribution that the process ends in.

        Arguments:
            event_shape: The shape of one datum.
            dtype: The dtype of its draws; torch's default if not given.
            device: Their device; the schedule's if not given.

        Returns:
            A distribution with batch_shape () and the given event_shape.
        """

    def trajectory(self, x_0: Tensor) -> Tensor:
        """A draw of all states, x_1, ..., x_T of q(x_1:T | x_0), step by step.

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
        r"""The forward process at some of the times, :math:`q(x_{\tau_1}, \dots, x_{\tau_K} | x_0)`, the same as
        before.

        Arguments:
            times: The times :math:`\tau_1 < \dots < \tau_K`, ints in 1..T.

        Returns:
            A forward process of K steps, on :class:`SubSchedule` of the same schedule.

        Raises:
            ValueError: If ``times`` are not increasing ints in 1..T, or this kind of process cannot be shortened.
        """
        raise ArgumentError(
            "forward",
            f"must have a method subchain(times) of its own to be cut, but a {type(self).__name__} has none",
        )

    def check(self, x_0: Tensor, event_shape: torch.Size) -> None:
        """Refuse what cannot be data: another shape than (B, *event_shape), dtype, device or values.

        Raises:
            ValueError: If so, or if there is no datum.
        """
        if not isinstance(x_0, Tensor):
            hint = ": give torch.from_numpy(x_0)" if isinstance(x_0, np.ndarray) else ""
            raise ArgumentError("x_0", f"must be a tensor, but it is a {type(x_0).__name__}{hint}")
        if x_0.dim() != 1 + len(event_shape) or x_0.shape[1:] != event_shape or len(x_0) == 0:
            expected = ", ".join(("B", *tuple(str(size) for size in event_shape)))
            raise ArgumentError("x_0", f"must have shape ({expected}) with B >= 1, but its shape is {tuple(x_0.shape)}")
        if self.is_integer and x_0.dtype != torch.long:  # an index of uint8 would be a mask
            raise ArgumentError("x_0", f"must have dtype torch.long, but its dtype is {x_0.dtype}: give x_0.long()")
        if not self.is_integer:
            if not x_0.is_floating_point():
                raise ArgumentError("x_0", f"must have a floating dtype, but its dtype is {x_0.dtype}")
            checks.full_precision("x_0", x_0.dtype)
        if home(x_0.device) != self.schedule.device:
            raise ArgumentError(
                "x_0", f"must be on the model's device {self.schedule.device}, but it is on {x_0.device}"
            )
        valid = self.support.check(x_0) & x_0.isfinite()
        if not checks.holds(valid):
            raise ArgumentError(
                "x_0",
                f"must be {self._described_support()} everywhere, "
                f"but {int((~valid).sum())} of its {x_0.numel()} values are not, the first {x_0[~valid][0]}",
            )

    def _described_support(self) -> str:
        if self.support is constraints.boolean:
            return "0 or 1"
        return "finite" if self.support is constraints.real else f"in {self.support}"


Chain = TypeVar("Chain", bound=Forward)
Part = TypeVar("Part", bound=nn.Module)


def shortened(process: Forward, chain: Chain) -> Chain:
    """The process of fewer steps; an error if the whole one has hooks, attributes or methods that it lacks."""
    missing = sorted(vars(process).keys() - vars(chain).keys())
    if process._forward_hooks or process._forward_pre_hooks or missing:
        raise ArgumentError(
            "forward",
            f"must have a method subchain(times) of its own where it has more than its class gives it, but this "
            f"{type(process).__name__} has {', '.join(missing) or 'hooks'}",
        )
    return chain


def with_parts(module: Part, **parts: nn.Module) -> Part:
    """A shallow copy of a module with some submodules replaced; all else is shared, hooks and attributes included."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def event_dim(x: Tensor, t: int | Tensor) -> int:
    """The number of event dimensions of x: all but the batch dimensions, which are those of t, or one."""
    return x.dim() - max(t.dim() if isinstance(t, Tensor) else 0, 1)


def check_states(
    x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None, num_steps: int, first: int = 0
) -> None:
    """Check, while Pyro validates, a state, the data that it came from, and times first <= s < t."""
    checks.step("x_t", x_t, t, s, num_steps, first)
    if not checks.validating():
        return
    checks.state("x_0", x_0)
    if not _broadcasts(x_0, x_t, event_dim(x_t, t)):
        raise ArgumentError(
            "x_0", f"must have the shape {tuple(x_t.shape)} of the state x_t, but its shape is {tuple(x_0.shape)}"
        )


def _broadcasts(x_0: Tensor, x_t: Tensor, event: int) -> bool:
    """Whether data have the event shape of a state, and a batch shape that broadcasts to its, as under enumeration."""
    if x_0.shape[x_0.dim() - event :] != x_t.shape[x_t.dim() - event :]:
        return False
    try:
        torch.broadcast_shapes(x_0.shape, x_t.shape)
    except RuntimeError:
        return False
    return True


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

    def subchain(self, times: Sequence[int]) -> "GaussianForward":
        return shortened(self, type(self)(SubSchedule(self.schedule, times)))

    def transition(self, x_s: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.TorchDistribution:
        checks.step("x_s", x_s, t, s, self.num_steps)
        s = t - 1 if s is None else s
        signal, noise = coefficients(torch.stack(self.schedule.step(t, s)), x_s)
        return dist.Normal(signal * x_s, noise).to_event(event_dim(x_s, t))

    def marginal(self, x_0: Tensor, t: int | Tensor) -> dist.TorchDistribution:
        checks.step("x_0", x_0, t, 0, self.num_steps)
        signal, noise = self.scales(x_0, t)
        return dist.Normal(signal * x_0, noise).to_event(event_dim(x_0, t))

    def posterior(
        self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None = None
    ) -> dist.TorchDistribution:
        check_states(x_t, x_0, t, s, self.num_steps, first=1)
        weight_t, weight_0, noise = coefficients(self.schedule.posterior(t, s), x_t)
        return dist.Normal(torch.addcmul(weight_t * x_t, weight_0, x_0), noise).to_event(event_dim(x_t, t))

    def check(self, x_0: Tensor, event_shape: torch.Size) -> None:
        """As :meth:`Forward.check`; also refuse data whose dtype cannot tell x_1 from x_0.

        Raises:
            ValueError: As there, and if b_1 / a_1 is below 1e-7 in float32, or twice the spacing of the largest x_0.
        """
        super().check(x_0, event_shape)
        signal, noise = self.schedule.scales(1)
        least = 2 * torch.finfo(x_0.dtype).eps * x_0.detach().abs().amax().to(noise.device)
        if not checks.holds(noise >= signal * least.clamp(min=1e-7 if x_0.dtype == torch.float32 else 0)):
            raise ArgumentError(
                "forward",
                f"must have more noise at t = 1 for data up to {float(x_0.abs().amax()):.3g} in {x_0.dtype}, "
                f"which would not tell x_1 from x_0, but b_1 / a_1 is {float(noise / signal):.2g}: use float64 "
                f"(diffusion.double(), x_0.double()), standardise the data, or let the schedule start with more noise",
            )

    def noise(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        r"""The noise :math:`\epsilon = (x_t - a_t x_0) / b_t` that leads from ``x_0`` to ``x_t``, of their shape."""
        check_states(x_t, x_0, t, 0, self.num_steps)
        signal, noise = self.scales(x_t, t)
        return (x_t - signal * x_0) / noise

    def score(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        r"""The score :math:`\nabla_{x_t} \log q(x_t | x_0) = (a_t x_0 - x_t) / b_t^2`, with the shape of ``x_t``."""
        check_states(x_t, x_0, t, 0, self.num_steps)
        signal, noise = self.scales(x_t, t)
        return (signal * x_0 - x_t) / noise**2

    def velocity(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        r"""The velocity :math:`v = a_t \epsilon - b_t x_0`, with the shape of ``x_t``."""
        check_states(x_t, x_0, t, 0, self.num_steps)
        signal, noise = self.scales(x_t, t)
        return (signal * x_t - (signal**2 + noise**2) * x_0) / noise

    def prior(
        self, event_shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> dist.TorchDistribution:
        event_shape = checks.event_shape(event_shape)
        deviation = torch.hypot(*self.schedule.scales(self.num_steps))
        scale = deviation.to(dtype or torch.get_default_dtype()).to(device or deviation.device)
        return dist.Normal(scale.new_zeros(event_shape), scale).to_event(len(event_shape))

    def scales(self, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """The signal and the noise at t, in the dtype of ``x_t`` and broadcastable against it."""
        signal, noise = coefficients(self.schedule.scales(t), x_t)
        return signal, noise


class BinomialForward(Forward):
    r"""Binomial diffusion of bits: each step forgets a bit with probability beta_t and then draws it anew.

    With :math:`\bar\alpha_{t|s} = \bar\alpha_t / \bar\alpha_s`, independently for every bit,

    .. math::
        q(x_t = 1 | x_s) &= \bar\alpha_{t|s} x_s + (1 - \bar\alpha_{t|s}) r \\
        q(x_t = 1 | x_0) &= \bar\alpha_t x_0 + (1 - \bar\alpha_t) r \\
        q(x_s | x_t, x_0) &\propto q(x_t | x_s) \, q(x_s | x_0) \\
        p(x_T = 1) &= r

    Arguments:
        schedule: A variance preserving noise schedule.
        rate: The stationary rate r, the probability of a 1 in pure noise: in (0, 1), a number or a tensor that
            broadcasts against one datum (one rate per dimension).

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
    rate: Tensor

    def __init__(self, schedule: Schedule, rate: float | Tensor = 0.5) -> None:
        super().__init__(schedule)
        rate = checks.numbers("rate", rate)
        if not checks.holds((rate > 0) & (rate < 1)):
            raise ArgumentError("rate", f"must lie in (0, 1), but it is {rate.tolist()}")
        if not checks.holds(schedule.alpha_bar(schedule.num_steps) < 1):
            raise ArgumentError("schedule", f"must be variance preserving, but it is {schedule!r}")
        self.register_buffer("rate", rate)

    def subchain(self, times: Sequence[int]) -> "BinomialForward":
        chain = shortened(self, type(self)(SubSchedule(self.schedule, times), self.rate))
        chain._buffers = self._buffers  # the same dict: what is written to, loaded into or moved in one, is so in both
        return chain

    def check(self, x_0: Tensor, event_shape: torch.Size) -> None:
        super().check(x_0, event_shape)
        if self.rate.dim() > len(event_shape) or any(
            rates not in (1, size)
            for rates, size in zip(reversed(self.rate.shape), reversed(event_shape), strict=False)
        ):
            raise ArgumentError(
                "rate",
                f"must broadcast against one datum of shape {tuple(event_shape)}, but its shape is "
                f"{tuple(self.rate.shape)}",
            )

    def transition(self, x_s: Tensor, t: int | Tensor, s: int | Tensor | None = None) -> dist.TorchDistribution:
        checks.step("x_s", x_s, t, s, self.num_steps)
        s = t - 1 if s is None else s
        kept, redrawn = coefficients(torch.stack(self.schedule.step(t, s)).square(), x_s)
        rate, rest = self._rates(x_s)
        one, zero = kept * x_s + redrawn * rate, kept * (1 - x_s) + redrawn * rest
        return Bits(logits=one.log() - zero.log()).to_event(event_dim(x_s, t))

    def posterior(
        self, x_t: Tensor, x_0: Tensor, t: int | Tensor, s: int | Tensor | None = None
    ) -> dist.TorchDistribution:
        check_states(x_t, x_0, t, s, self.num_steps, first=1)
        s = t - 1 if s is None else s
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
        rate, rest = self._rates(x_t)
        left, noise = coefficients(self.schedule.scales(s).square(), x_t)
        kept, redrawn = coefficients(torch.stack(self.schedule.step(t, s)).square(), x_t)
        redrawn = redrawn * torch.where(x_t == 1, rate, rest)
        one = (left * x_0 + noise * rate) * (kept * x_t + redrawn)
        zero = (left * (1 - x_0) + noise * rest) * (kept * (1 - x_t) + redrawn)
        return one.log() - zero.log()

    def prior(
        self, event_shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> dist.TorchDistribution:
        event_shape = checks.event_shape(event_shape)
        rate = self.rate.to(dtype or torch.get_default_dtype()).to(device or self.rate.device)
        return Bits(rate.expand(event_shape)).to_event(len(event_shape))

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities of a 1 and of a 0 in pure noise, in the dtype and on the device of x."""
        return self.rate.to(x.dtype).to(x.device), (1 - self.rate).to(x.dtype).to(x.device)
