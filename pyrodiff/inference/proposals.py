"""Laws that particles are drawn from: a Gaussian times a Gaussian that is linear in it, and two laws side by side."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..base.arguments import ArgumentError
from ..pair.entropy import innermost

__all__ = ["Partly", "Updated", "cholesky", "log_normal"]


def cholesky(covariance: Tensor) -> Tensor:
    """The lower Cholesky factor of covariances.

    Arguments:
        covariance: With shape (..., M, M).

    Raises:
        ValueError: If one is not positive definite in its dtype.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool(info.any()):
        raise ArgumentError(
            "noise",
            f"must be large enough for covariances to be positive in {covariance.dtype}, but some are not: give "
            f"more noise, fewer numbers that say the same, or float64 (diffusion.double() and obs.double())",
        )
    return factor


def log_normal(off: Tensor, cholesky: Tensor) -> Tensor:
    """log N(off; 0, L L^T), with shape (n,).

    Arguments:
        off: With shape (n, M).
        cholesky: L, with shape (n, M, M).
    """
    white = torch.linalg.solve_triangular(cholesky, off[..., None], upper=False)[..., 0]
    log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(white**2).sum(-1) / 2 - log_det - off.shape[-1] / 2 * math.log(2 * math.pi)


class Updated(dist.TorchDistribution):
    r"""N(μ, σ²) times N(off; H (x - μ), S), normalised: N(μ + K off, σ² (I - K H)), by Matheron's rule.

    Arguments:
        law: N(μ, σ²), with batch_shape (n,).
        off: y - o, with shape (n, M).
        H: With shape (n, M, D).
        S: With shape (n, M, M).
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, law: dist.TorchDistribution, off: Tensor, H: Tensor, S: Tensor) -> None:
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        base: Any = innermost(law)
        self.law, self.off, self.H = law, off, H
        self.mu, self.gain = base.mean.flatten(1), H.mT * base.variance.flatten(1)[..., None]  # σ² Hᵀ
        self.of_S, self.of_G = cholesky(S), cholesky(H @ self.gain + S)

    def _moved(self, off: Tensor) -> Tensor:
        return (self.gain @ torch.cholesky_solve(off[..., None], self.of_G))[..., 0]

    @property
    def mean(self) -> Tensor:
        return (self.mu + self._moved(self.off)).view(self.law.batch_shape + self.law.event_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        x = self.law.sample(torch.Size(sample_shape))
        noise = (self.of_S @ torch.randn_like(self.off)[..., None])[..., 0]
        predicted = (self.H @ (x.flatten(1) - self.mu)[..., None])[..., 0] + noise
        return x + self._moved(self.off - predicted).view(x.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        rest = self.off - (self.H @ (x.flatten(1) - self.mu)[..., None])[..., 0]
        return self.law.log_prob(x) + log_normal(rest, self.of_S) - log_normal(self.off, self.of_G)


class Partly(dist.TorchDistribution):
    """Independent numbers, of one law where a mask is and of another elsewhere.

    Arguments:
        mask: With the event_shape.
        inside: A law of the numbers one by one, with shape (n, *event_shape).
        outside: Another.
        event_dim: How many dimensions an event has.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, mask: Tensor, inside: Distribution, outside: Distribution, event_dim: int) -> None:
        shape = outside.batch_shape
        super().__init__(shape[: len(shape) - event_dim], shape[len(shape) - event_dim :], validate_args=False)
        self.where, self.inside, self.outside = mask, inside, outside

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return torch.where(self.where, self.inside.sample(shape), self.outside.sample(shape))

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where(self.where, self.inside.log_prob(x), self.outside.log_prob(x)).flatten(1).sum(1)
