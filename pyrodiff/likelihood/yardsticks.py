r"""Yardsticks: the costs on test data of simple distributions fitted to training data. A model should cost less.

For numbers with a density: a Gaussian with a variance per dimension, and one with a full covariance matrix,

.. math:: -\log N(x; \hat\mu, \operatorname{diag} \hat\sigma^2), \qquad -\log N(x; \hat\mu, \hat\Sigma);

For levels, with probabilities: the uniform distribution, :math:`D \log L`, and for each dimension a discretised normal
and a histogram. For two levels, bits, the histogram is a Bernoulli rate, and there is only that and the uniform
distribution.

Fits are in closed form, from sums over the data, so each set is read once, in blocks of any size. The covariance is
shrunk towards its diagonal, by an amount that depends on the number of data; histograms and discretised normals are
smoothed by pseudo-data spread evenly over the levels, so that nothing has probability 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64
from ..process.quantization import DiscretizedNormal, from_levels, whole_levels
from .estimate import Likelihood

__all__ = ["Yardstick", "Yardsticks", "yardsticks"]

_COVARIANCES, _COUNTS = 2**20, 2**26  # the most entries of a covariance matrix, and of histograms


@dataclass(frozen=True, repr=False, eq=False)
class Yardstick(Likelihood):
    """The cost of one simple distribution on test data. Printed, it is a table.

    Arguments:
        name: The name of the distribution.
        costs: -log p of each datum in nats, with shape (B,).
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
    """

    name: str
    costs: Tensor
    event_shape: torch.Size
    levels: int | None = None

    @property
    def nats(self) -> Tensor:
        return self.costs

    @property
    def title(self) -> str:
        return f"-log p(x_0), {self.name}"

    def rows(self) -> dict[str, Tensor]:
        return {self.name: self.costs}

    def _raised(self, nats: float) -> dict[str, Tensor]:
        return {"costs": self.costs + nats}


class Yardsticks(dict[str, Yardstick]):
    """The costs of simple distributions, by name. Printed, a line each: name, mean cost, standard error, unit."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:24}{law.summary}" for name, law in self.items())


@torch.no_grad()
def yardsticks(
    train: Tensor | Iterable, test: Tensor | Iterable, levels: int | None = None, smoothing: float = 1.0
) -> Yardsticks:
    r"""The costs on test data of simple distributions fitted to training data, with standard errors.

    For a density: "diagonal Gaussian" and "full Gaussian", the latter up to 1,024 dimensions. Its correlations are
    :math:`(1 - \rho) R + \rho I`, with R those of the n data and :math:`\rho` the oracle approximating shrinkage of
    Chen et al. (2010), Eq. 23: near 0 for many data, and usable with fewer data than dimensions. For levels: "uniform",
    and per dimension "discretized Gaussian" and "histogram"; for two levels "uniform" and "Bernoulli".

    Arguments:
        train: Data to fit to, with shape (n, *event_shape); or a loader of such batches, or of tuples that begin with
            one, such as :class:`pyrodiff.streaming.Blocks`, that is read once. Floats, or whole numbers in
            0..levels-1 of any dtype.
        test: Data to evaluate on, in the same units. All may be on any device; costs are where the first of ``train``
            is.
        levels: The number of levels L, for their probabilities; None for a density.
        smoothing: The number of pseudo-data, spread evenly over the levels, that are added to ``train``; above 0.

    Returns:
        The cost of each datum under each distribution, by name.

    Raises:
        ValueError: If there are no data, or they are not finite floats or whole numbers in 0..levels-1, or of several
            shapes; for a density, if a dimension is constant in ``train``, so that its density would be unbounded.

    References:
        Shrinkage Algorithms for MMSE Covariance Estimation (Chen, Wiesel, Eldar & Hero, 2010), Eq. 23,
        https://arxiv.org/abs/0907.4698

    Example:
        >>> train, test = (pyrodiff.datasets.swiss_roll(5000, seed=seed) for seed in (0, 1))
        >>> pyrodiff.yardsticks(train, test)
        diagonal Gaussian            2.8... ± 0.0... nats
        full Gaussian                2.8... ± 0.0... nats
        >>> digits = [pyrodiff.datasets.digits(split) for split in ("train", "test")]
        >>> found = pyrodiff.yardsticks(*digits, levels=17)
        >>> list(found), bool(found["histogram"].mean < found["uniform"].mean)
        (['uniform', 'discretized Gaussian', 'histogram'], True)
    """
    if levels is not None:
        levels = arguments.levels(levels)
    smoothing = arguments.number("smoothing", smoothing, 0, math.inf)
    laws: list[_Law] = []
    shape = torch.Size()
    for x, event_shape in _blocks("train", train, levels):
        if not laws:
            shape, device, laws = event_shape, x.device, _laws(x.shape[1], levels, smoothing)
        x = x.to(device)
        for law in laws:
            law.add(x)
    costs: dict[str, list[Tensor]] = {law.name: [] for law in laws}
    for law in laws:
        law.fit()
    for x, _ in _blocks("test", test, levels, shape):
        x = x.to(device)
        for law in laws:
            costs[law.name].append(law.cost(x))
    return Yardsticks({name: Yardstick(name, torch.cat(some), shape, levels) for name, some in costs.items()})


def _blocks(
    name: str, data: Any, levels: int | None, shape: torch.Size | None = None
) -> Iterator[tuple[Tensor, torch.Size]]:
    """The data in blocks with shape (b, D), in float64, and the shape of a datum; checked."""
    some = False
    for block in data if isinstance(data, Iterable) and not isinstance(data, Tensor | np.ndarray) else [data]:
        x: Any = block[0] if isinstance(block, tuple | list) and block else block
        _check(name, x, levels)
        if shape is not None and x.shape[1:] != shape:
            raise ArgumentError(
                name, f"must have data of shape {tuple(shape)}, as those before, but it is {tuple(x.shape[1:])}"
            )
        shape = x.shape[1:]
        for part in x.split(max(1, 2**22 // x[0].numel())):
            if levels is None and not checks.holds(part.isfinite()):
                raise ArgumentError(name, f"must be finite, but {int((~part.isfinite()).sum())} of its values are not")
            some = True
            yield (float64(part) if levels is None else whole_levels(name, part, levels)).flatten(1), shape
    if not some:
        raise ArgumentError(name, f"must have a batch at least, but this {type(data).__name__} is empty")


def _check(name: str, x: Any, levels: int | None) -> None:
    if not isinstance(x, Tensor) or (levels is None and not x.is_floating_point()):
        kind = "floats" if levels is None else f"whole numbers in 0..{levels - 1}"
        hint = ": give levels for their probabilities" if isinstance(x, Tensor) else ""
        raise ArgumentError(
            name, f"must be a tensor of {kind}, or a loader of such, but it is {arguments.described(x)}{hint}"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ArgumentError(name, f"must have shape (n, *event_shape), not empty, but its shape is {tuple(x.shape)}")


def _laws(size: int, levels: int | None, smoothing: float) -> list["_Law"]:
    if levels is None:
        return [_Gaussian(), *([_FullGaussian()] if 1 < size**2 <= _COVARIANCES else [])]
    counted = [_Histogram(levels, smoothing)] if levels * size <= _COUNTS else []
    return [_Uniform(levels), *([] if levels == 2 else [_NormalInBins(levels, smoothing)]), *counted]


class _Law(ABC):
    """A distribution fitted to sums over data, which come in float64 blocks of shape (b, D)."""

    name: str

    @abstractmethod
    def add(self, x: Tensor) -> None:
        """Add a block to the sums."""

    @abstractmethod
    def fit(self) -> None:
        """Fit the distribution to the sums."""

    @abstractmethod
    def cost(self, x: Tensor) -> Tensor:
        """-log p of each datum of a block, with shape (b,)."""


class _Uniform(_Law):
    """The same probability for each level."""

    name = "uniform"

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def add(self, x: Tensor) -> None:
        """Nothing to add."""

    def fit(self) -> None:
        """Nothing to fit."""

    def cost(self, x: Tensor) -> Tensor:
        return x.new_full((len(x),), x.shape[1] * math.log(self.levels))


class _Gaussian(_Law):
    """A normal distribution per dimension, with the data's mean and variance."""

    name = "diagonal Gaussian"

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        if not self.count:
            self.origin = x.mean(0)  # sums of squares about 0 would lose precision where the mean is large
            self.sum, self.squares = torch.zeros_like(self.origin), self._squares(x[:0])
        x = x - self.origin
        self.count += len(x)
        self.sum += x.sum(0)
        self.squares += self._squares(x)

    def _squares(self, x: Tensor) -> Tensor:
        return (x**2).sum(0)

    def fit(self) -> None:
        mean = self.sum / self.count
        self.mean, self.variance = self.origin + mean, self.squares / self.count - mean**2
        _varies(self.variance, self.mean)

    def cost(self, x: Tensor) -> Tensor:
        nats = (x - self.mean) ** 2 / self.variance + (2 * math.pi * self.variance).log()
        return nats.sum(1) / 2


class _FullGaussian(_Gaussian):
    """A normal distribution with the data's mean and covariance, its correlations shrunk."""

    name = "full Gaussian"

    def _squares(self, x: Tensor) -> Tensor:
        return x.T @ x

    def fit(self) -> None:
        mean = self.sum / self.count
        covariance = self.squares / self.count - mean.outer(mean)
        self.mean, scale = self.origin + mean, covariance.diagonal().clamp(min=0).sqrt()
        _varies(scale**2, self.mean)
        correlation = _shrunk(covariance / scale.outer(scale), self.count)
        self.factor = torch.linalg.cholesky(correlation) * scale[:, None]

    def cost(self, x: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(self.factor, (x - self.mean).T, upper=False)
        log_det = self.factor.diagonal().log().sum()
        return (z**2).sum(0) / 2 + log_det + x.shape[1] / 2 * math.log(2 * math.pi)


def _shrunk(R: Tensor, n: int) -> Tensor:
    """Correlations of n data, shrunk towards 0: Chen et al. (2010), Eq. 23, with tr R = D."""
    D, square = len(R), float((R**2).sum())
    off = square - D  # the squared correlations off the diagonal
    excess = (n + 1 - 2 / D) * off
    rho = min(1.0, ((1 - 2 / D) * square + D**2) / excess) if excess > 0 else 1.0
    return (1 - rho) * R + rho * torch.eye(D, dtype=R.dtype, device=R.device)


class _NormalInBins(_Gaussian):
    """A discretised normal per dimension, with the moments of the data and the pseudo-data together."""

    name = "discretized Gaussian"

    def __init__(self, levels: int, smoothing: float) -> None:
        super().__init__()
        self.levels, self.smoothing = levels, smoothing

    def add(self, x: Tensor) -> None:
        super().add(from_levels(x, self.levels, dtype=torch.float64))

    def fit(self) -> None:
        L, n = self.levels, self.count + self.smoothing
        sum_, squares = self.sum - self.smoothing * self.origin, self.squares + self.smoothing * self.origin**2
        spread = (L + 1) / (3 * (L - 1))  # the mean square of all levels, on [-1, 1]
        mean = sum_ / n
        self.mean = self.origin + mean
        self.variance = (squares + self.smoothing * spread) / n - mean**2

    def cost(self, x: Tensor) -> Tensor:
        law = DiscretizedNormal(self.mean, self.variance.sqrt(), self.levels)
        return -law.log_prob(from_levels(x, self.levels, dtype=torch.float64)).sum(1)


class _Histogram(_Law):
    """A probability for each level of each dimension; for two levels, a Bernoulli rate."""

    def __init__(self, levels: int, smoothing: float) -> None:
        self.name = "Bernoulli" if levels == 2 else "histogram"
        self.levels, self.smoothing, self.counts = levels, smoothing, torch.zeros(())

    def add(self, x: Tensor) -> None:
        if self.counts.dim() == 0:
            self.counts = x.new_zeros((self.levels, x.shape[1]))
        self.counts.scatter_add_(0, x.long(), torch.ones_like(x))

    def fit(self) -> None:
        smooth = self.counts + self.smoothing / self.levels
        self.log_probs = (smooth / smooth.sum(0)).log()

    def cost(self, x: Tensor) -> Tensor:
        return -self.log_probs.gather(0, x.long()).sum(1)


def _varies(variance: Tensor, mean: Tensor) -> None:
    """Refuse dimensions that are constant up to rounding."""
    constant = variance <= 1e-24 * mean**2
    if not checks.holds(~constant):
        raise ArgumentError(
            "train",
            f"must vary in every dimension for a density, which has no limit where all are one number, but "
            f"{int(constant.sum())} of {len(constant)} dimensions are constant: give levels, or leave these out",
        )
