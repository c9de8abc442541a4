r"""Denoisers: whatever a network predicts, turned into an estimate of the data, :math:`\hat x_0(x_t, t)`.

Given :math:`x_t = a_t x_0 + b_t \epsilon`, each of data, noise, score and velocity determines the others, so a network
may predict any of them; some are learned more easily than others.

.. math::
    \hat x_0
    = \frac{x_t - b_t \hat\epsilon}{a_t}
    = \frac{x_t + b_t^2 \hat s}{a_t}
    = \frac{a_t x_t - b_t \hat v}{a_t^2 + b_t^2}

with the noise :math:`\epsilon`, the score :math:`s = \nabla \log q(x_t | x_0) = -\epsilon / b_t` and the velocity
:math:`v = a_t \epsilon - b_t x_0`. For bits :math:`\hat x_0` is the probability of a 1, given by its log odds.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 115, 133 and 151,
    https://arxiv.org/abs/2208.11970

    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), section 4: the velocity,
    https://arxiv.org/abs/2202.00512
"""

from abc import ABC, abstractmethod
from typing import Literal, overload

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import precisely
from ..process.forward import Forward, GaussianForward
from ..process.quantization import Levels
from ..process.schedules import Schedule, SubSchedule

__all__ = [
    "DataPrediction",
    "Denoiser",
    "LevelPrediction",
    "LogitPrediction",
    "NoisePrediction",
    "ScorePrediction",
    "VelocityPrediction",
]


class Denoiser(nn.Module, ABC):
    r"""A network's prediction as an estimate of the data, :math:`\hat x_0(x_t, t)`.

    Arguments:
        network: A module called as ``network(x_t, t, *context)`` that returns a tensor of the shape of ``x_t``. For a
            reverse process with a :class:`LearnedVariance` it returns two numbers for each of x_t's, with shape
            (*x_t.shape, 2): the prediction, and the variance's v.
        forward: The forward process.

    Raises:
        ValueError: If ``network`` is not a module, or ``forward`` is not a process that the prediction is made for.
    """

    def __init__(self, network: nn.Module, forward: Forward) -> None:
        super().__init__()
        checks.instance("network", network, nn.Module)
        self._check_forward(forward)
        self.network = network
        self.forward_process = forward

    @abstractmethod
    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> Tensor:
        r"""The data :math:`\hat x_0` that the network sees in ``x_t``.

        Arguments:
            x_t: The state, with shape (B, *event_shape).
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).
            *context: What is known of each datum, for the network: tensors of B rows.

        Returns:
            A tensor with the shape of ``x_t``.

        Raises:
            ValueError: If the network returns another shape, or takes another context.
        """

    def output(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> Tensor:
        """The network's output, after a check of its shape; arguments, result and errors as of a call."""
        checks.takes_context("network", self.network, context)
        output = self.network(x_t, t, *context)
        self._check_output(output, x_t)
        return output.to(x_t.dtype)  # under autocast the network's output has a lower precision

    def _check_output(self, output: Tensor, x_t: Tensor) -> None:
        checks.returned("network", output, x_t.shape, x_t)

    def _check_forward(self, forward: Forward) -> None:
        if not isinstance(forward, GaussianForward):
            raise ArgumentError(
                "forward", f"must be a GaussianForward for {type(self).__name__}, but it is {forward!r}"
            )


class Retimed(nn.Module):
    r"""A module for a chain of fewer steps, called as ``module(x_t, t, *context)``: step k calls it at :math:`\tau_k`.

    Arguments:
        module: A network or a denoiser, made for the whole chain.
        schedule: The schedule of the chain of fewer steps.

    Returns:
        On a call, what the module returns.

    Raises:
        ValueError: If ``schedule`` is not that of a chain of fewer steps.
    """

    def __init__(self, module: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.module, self.schedule = module, checks.instance("schedule", schedule, SubSchedule)

    @property
    def network(self) -> nn.Module:
        """The network of the module, if that is a denoiser; else the module."""
        return getattr(self.module, "network", self.module)

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor, **options: bool) -> Tensor:
        checks.takes_context("network", self.module, context, **options)
        t = self.schedule.times_at(t).to(x_t.device)
        return self.module(x_t, t if t.dim() else t.expand(x_t.shape[:1]), *context, **options)


class _Prediction(Denoiser):
    """A network that predicts one number per number of a Gaussian state, and perhaps another for its variance."""

    forward_process: GaussianForward

    @overload
    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor, variance: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, x_t: Tensor, t: int | Tensor, *context: Tensor, variance: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self, x_t: Tensor, t: int | Tensor, *context: Tensor, variance: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""The data :math:`\hat x_0` that the network sees in ``x_t``.

        Arguments:
            x_t: The state, with shape (B, *event_shape).
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).
            *context: What is known of each datum, for the network: tensors of B rows.
            variance: Whether to return the v of a :class:`LearnedVariance`, too.

        Returns:
            A tensor with the shape of ``x_t``; with ``variance`` a pair of them.

        Raises:
            ValueError: If the network returns another shape, or takes another context.
        """
        output, v = self.output(x_t, t, *context), None
        if output.dim() > x_t.dim():
            output, v = output.unbind(-1)
        x_0 = self._read(output, x_t, t)
        if not variance:
            return x_0
        if v is None:
            raise ArgumentError(
                "network",
                f"must return two numbers for each of x_t's where the variance is learned, with shape "
                f"{(*x_t.shape, 2)}, but its output has shape {tuple(x_t.shape)}: give networks.UNet or networks.MLP "
                f"outputs=2, or take a variance that is not learned",
            )
        return x_0, v

    @abstractmethod
    def _read(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The estimate of x_0, given the prediction."""

    def _check_output(self, output: Tensor, x_t: Tensor) -> None:
        shape = (*x_t.shape, 2)
        if not isinstance(output, Tensor) or output.shape != shape:
            checks.returned("network", output, x_t.shape, x_t, f", or of shape {shape} for a learned variance")


class DataPrediction(_Prediction):
    r"""The network predicts the data themselves.

    Arguments, errors: see :class:`Denoiser`.

    References:
        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 99.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> denoiser = pyrodiff.DataPrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> denoiser(torch.zeros(5, 2), t=3).shape
        torch.Size([5, 2])
    """

    def _read(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        return output


class _DividesBySignal(_Prediction):
    def _check_forward(self, forward: Forward) -> None:
        super()._check_forward(forward)
        if not checks.holds(forward.schedule.signal(forward.num_steps) != 0):
            raise ArgumentError(
                "forward",
                f"must leave some signal at t = T for {type(self).__name__}, which divides by it, but its "
                f"schedule {forward.schedule!r} leaves none; use DataPrediction or VelocityPrediction",
            )


class NoisePrediction(_DividesBySignal):
    r"""The network predicts the noise: :math:`\hat x_0 = (x_t - b_t \hat\epsilon) / a_t`.

    Arguments: see :class:`Denoiser`.

    Raises:
        ValueError: As :class:`Denoiser`, and if the schedule ends without signal (:math:`\beta_T = 1`).

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eq. 11.

        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 115.
    """

    def _read(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        signal, noise = self.forward_process.scales(x_t, t)
        return torch.addcmul(x_t / signal, noise / signal, output, value=-1)


class ScorePrediction(_DividesBySignal):
    r"""The network predicts the score of :math:`q(x_t)`: :math:`\hat x_0 = (x_t + b_t^2 \hat s) / a_t`.

    Arguments: see :class:`Denoiser`.

    Raises:
        ValueError: As :class:`Denoiser`, and if the schedule ends without signal (:math:`\beta_T = 1`).

    References:
        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 133: Tweedie's formula.
    """

    def _read(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        signal, noise = self.forward_process.scales(x_t, t)
        return torch.addcmul(x_t / signal, noise**2 / signal, output)


class VelocityPrediction(_Prediction):
    r"""The network predicts the velocity :math:`a_t \epsilon - b_t x_0`, which works both with and without signal.

    .. math:: \hat x_0 = (a_t x_t - b_t \hat v) / (a_t^2 + b_t^2)

    Arguments, errors: see :class:`Denoiser`.

    References:
        Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), section 4.
    """

    def _read(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        signal, noise = self.forward_process.scales(x_t, t)
        total = signal**2 + noise**2
        return torch.addcmul(signal / total * x_t, noise / total, output, value=-1)


class LogitPrediction(Denoiser):
    r"""The network predicts the log odds of a 1 in the data: :math:`\hat x_0 = \mathrm{sigmoid}(f(x_t, t))`.

    Arguments, errors: see :class:`Denoiser`; the forward process is one of bits.

    Example:
        >>> forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=10))
        >>> denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP(event_shape=(20,)), forward)
        >>> denoiser(torch.ones(5, 20), t=3).shape
        torch.Size([5, 20])
    """

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> Tensor:
        return self.output(x_t, t, *context).sigmoid()

    def _check_forward(self, forward: Forward) -> None:
        if not isinstance(forward, Forward) or forward.support is not constraints.boolean:
            raise ArgumentError("forward", f"must be a process of bits for LogitPrediction, but it is {forward!r}")


class LevelPrediction(Denoiser):
    r"""The network predicts log probabilities of levels (for quantised data), to which Bayes' rule adds each number's
    own noise.

    .. math::
        \hat p(x_0 = v_k | x_t) \propto e^{f_k(x_t, t)} \, N(x_t; \, a_t v_k, \, b_t^2), \qquad
        \hat x_0 = \sum_k v_k \, \hat p(x_0 = v_k | x_t)

    The likelihood of a number's own noisy value is multiplied in, in closed form; the network only has to learn what
    the other numbers say. Where there is little noise, :math:`\hat x_0` snaps to a level without the network; with f
    the same for all k, it is exact for independent, uniformly distributed levels.

    Arguments:
        network: A module called as ``network(x_t, t, *context)`` that returns a tensor of shape (*x_t.shape, levels).
        forward: The forward process.
        levels: The number of levels L of the data on [-1, 1], at least 2.

    Raises:
        ValueError: As :class:`Denoiser`, and if ``levels`` is not an int of at least 2.

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), section 3.3: a network of
        log probabilities of :math:`x_0` in a discrete chain, https://arxiv.org/abs/2107.03006

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> class Even(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return torch.zeros(*x_t.shape, 3)
        >>> pyrodiff.LevelPrediction(Even(), forward, levels=3)(torch.tensor([[0.1, -0.7, 0.9]]), t=1).round(decimals=2)
        tensor([[ 0., -1.,  1.]])
    """

    forward_process: GaussianForward

    def __init__(self, network: nn.Module, forward: GaussianForward, levels: int) -> None:
        super().__init__(network, forward)
        self.levels = arguments.levels(levels)

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> Tensor:
        probs = self.log_probs(x_t, t, *context).exp()
        with precisely():
            return probs @ Levels(self.levels).points(x_t)

    def log_probs(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> Tensor:
        r"""The :math:`\log \hat p(x_0 = v_k | x_t)`, with shape (*x_t.shape, levels); arguments as of a call."""
        signal, noise = (scale[..., None] for scale in self.forward_process.scales(x_t, t))
        off = (x_t[..., None] - signal * Levels(self.levels).points(x_t)) / noise
        return (self.output(x_t, t, *context) - off**2 / 2).log_softmax(-1)

    def _check_output(self, output: Tensor, x_t: Tensor) -> None:
        checks.returned("network", output, (*x_t.shape, self.levels), x_t)
