r"""The steps of the one-step pair: how t is drawn, and what the step weighs.

The bound is a sum over t. Drawing one t a datum with probability p(t) and scaling its term by 1 / p(t) leaves the
mean as it is. A *drawing* says what p is and how the draws of a batch hang together: it turns auxiliary uniform
variables u into times. A *weighting* is a function w(t) > 0 that multiplies the term: 1 for the bound.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1: the low-discrepancy drawing,
    https://arxiv.org/abs/2107.00630

    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eq. 14: the simple loss,
    https://arxiv.org/abs/2006.11239
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from . import checks
from .reverse import GaussianReverse
from .schedules import Float64Module

__all__ = ["BoundWeighting", "Drawing", "LowDiscrepancyDrawing", "SimpleWeighting", "UniformDrawing"]


class Drawing(nn.Module, ABC):
    """How one t a datum is drawn: a law of u in [0, 1), and a map from u to t and its probability."""

    @abstractmethod
    def uniforms(self, like: Tensor) -> dist.Distribution:
        """The law of the auxiliary u, each uniform on [0, 1) by itself, with the batch_shape (B,) of ``like``."""

    @abstractmethod
    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """The times and their probabilities p(t).

        Arguments:
            u: The auxiliary variables, of any shape (*).
            num_steps: The number of steps T.

        Returns:
            Integers in 1..T and probabilities, both with shape (*).
        """


def _equal_parts(u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    t = (u * num_steps).long().clamp(max=num_steps - 1) + 1
    return t, torch.full_like(u, 1 / num_steps)


class UniformDrawing(Drawing):
    """Every t with probability 1 / T, each datum by itself.

    Example:
        >>> pyrodiff.UniformDrawing()(torch.tensor([0.0, 0.3, 0.99]), num_steps=10)
        (tensor([ 1,  4, 10]), tensor([0.1000, 0.1000, 0.1000]))
    """

    def uniforms(self, like: Tensor) -> dist.Distribution:
        return dist.Uniform(like.new_zeros(()), like.new_ones(())).expand(like.shape)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return _equal_parts(u, num_steps)


class LowDiscrepancyDrawing(Drawing):
    """Every t with probability 1 / T, spread evenly over the batch: one draw for all data, shifted by 1 / B.

    A batch of at least T data then sees every t, and the estimate of the bound varies less.

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendix I.1.

    Example:
        >>> drawing = pyrodiff.LowDiscrepancyDrawing()
        >>> u = drawing.uniforms(torch.zeros(10)).sample()
        >>> drawing(u, num_steps=10)[0].sort().values
        tensor([ 1,  2,  3,  4,  5,  6,  7,  8,  9, 10])
    """

    def uniforms(self, like: Tensor) -> dist.Distribution:
        return _SpreadUniform(like)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return _equal_parts(u, num_steps)


class _SpreadUniform(TorchDistribution):
    """u_i = (u + i / B) mod 1 with one uniform u: each u_i is uniform, and together they cover [0, 1) evenly."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, like: Tensor) -> None:
        self.like = like
        super().__init__(like.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "_SpreadUniform":
        return type(self)(self.like.expand(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape = self._extended_shape(sample_shape)
        ranks = torch.arange(shape.numel(), device=self.like.device, dtype=self.like.dtype).reshape(shape)
        return (torch.rand((), device=self.like.device, dtype=self.like.dtype) + ranks / shape.numel()) % 1

    def log_prob(self, value: Tensor) -> Tensor:
        """0, the log density of each u_i by itself; the draws of a batch hang together and have no joint density."""
        return torch.zeros_like(value)


class BoundWeighting(nn.Module):
    """w(t) = 1: the one-step pair is unbiased for the bound."""

    def forward(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.get_default_dtype())


class SimpleWeighting(Float64Module):
    r"""The weighting that makes the step's cost the squared error of the noise: :math:`L_\mathrm{simple}`.

    .. math:: w(t) = \frac{1}{T} \frac{2 \sigma_t^2}{w_0(t)^2} \frac{a_t^2}{b_t^2}, \qquad
        \mathbb{E}_t \left[ \frac{w(t)}{p(t)} L_{t-1} \right]
        = \mathbb{E}_{t \sim U\{1..T\}} \left\| \epsilon - \hat\epsilon \right\|^2 + \text{const}

    where :math:`w_0(t)` is the weight of :math:`x_0` in the posterior's mean; the constant does not depend on the
    denoiser. For VP schedules the inverse of the second factor is
    :math:`\beta_t^2 / (2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t))`, the weight of Ho's Eq. 12. The step at t = 1 is
    scored by the decoder, which for this has to be the Gaussian kernel.

    Arguments:
        reverse: The reverse process, whose variance :math:`\sigma_t^2` the weighting undoes.

    Raises:
        ValueError: If ``reverse`` is not a :class:`GaussianReverse`, or its schedule ends without signal.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eqs. 12 and 14.
    """

    def __init__(self, reverse: GaussianReverse) -> None:
        super().__init__()
        checks.instance("reverse", reverse, GaussianReverse)
        process = reverse.forward_process
        if process.schedule.signal(process.num_steps) == 0:
            raise ValueError(f"reverse must leave some signal at t = T, but its schedule is {process.schedule!r}")
        t = torch.arange(1, process.num_steps + 1, device=process.schedule.noise(0).device)
        _, weight_0, _ = process.posterior_weights(t, t - 1)
        variance = reverse.variance(process, t).detach()
        weight = 2 * variance / weight_0**2 * process.schedule.log_snr(t).exp() / process.num_steps
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.weight[t - 1]
