"""Distributions multiplied by a factor: a Gaussian by a linear Gaussian one, bits by a table; and a mix by a mask."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..base.arguments import ArgumentError
from ..pair.entropy import innermost

__all__ = ["Partly", "Tabulated", "Updated", "cholesky", "log_normal"]


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
        law: N(μ, σ²), with a batch_shape.
        off: y - o, with shape (*batch_shape, M).
        H: With shape (*batch_shape, M, D), or one that broadcasts to it.
        S: With shape (*batch_shape, M, M), or one that broadcasts to it.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, law: dist.TorchDistribution, off: Tensor, H: Tensor, S: Tensor) -> None:
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        base: Any = innermost(law)
        self.law, self.off, self.H, self.S = law, off, H, S
        self.mu, self.gain = self._flat(base.mean), H.mT * self._flat(base.variance)[..., None]  # σ² Hᵀ
        self.of_S, self.of_G = cholesky(S), cholesky(H @ self.gain + S)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Updated":
        return Updated(self.law.expand(torch.Size(batch_shape)), self.off, self.H, self.S)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.event_shape)], -1)

    def _moved(self, off: Tensor) -> Tensor:
        return (self.gain @ torch.cholesky_solve(off[..., None], self.of_G))[..., 0]

    @property
    def mean(self) -> Tensor:
        return (self.mu + self._moved(self.off)).view(self.batch_shape + self.event_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        x = self.law.sample(torch.Size(sample_shape))
        away = self._flat(x) - self.mu
        white = torch.randn(away.shape[:-1] + self.off.shape[-1:], dtype=x.dtype, device=x.device)
        predicted = (self.H @ away[..., None] + self.of_S @ white[..., None])[..., 0]
        return x + self._moved(self.off - predicted).view(x.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        rest = self.off - (self.H @ (self._flat(x) - self.mu)[..., None])[..., 0]
        return self.law.log_prob(x) + log_normal(rest, self.of_S) - log_normal(self.off, self.of_G)


class Tabulated(dist.TorchDistribution):
    """A distribution over a few states times a factor, normalised by a sum over all states.

    Arguments:
        log_probs: The log of both multiplied, with shape (*batch_shape, S); it need not be normalised.
        states: The S states, the binary digits of 0..S-1, lowest bit first, with shape (S, *event_shape).
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, log_probs: Tensor, states: Tensor) -> None:
        super().__init__(log_probs.shape[:-1], states.shape[1:], validate_args=False)
        self.log_probs, self.states = log_probs.log_softmax(-1), states

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.boolean, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Tabulated":
        return Tabulated(self.log_probs.expand(*batch_shape, len(self.states)), self.states)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.states[dist.Categorical(logits=self.log_probs).sample(torch.Size(sample_shape))]

    def log_prob(self, x: Tensor) -> Tensor:
        bits = x.reshape(*x.shape[: x.dim() - len(self.event_shape)], -1).long()
        index = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        table = self.log_probs.expand(*shape, len(self.states))
        return table.gather(-1, index.expand(shape)[..., None])[..., 0]


class Partly(dist.TorchDistribution):
    """Independent numbers, with one distribution where a mask is True and another elsewhere.

    Arguments:
        mask: With the event_shape.
        inside: The distribution where the mask is True, with batch_shape (n, *event_shape).
        outside: The one elsewhere.
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
