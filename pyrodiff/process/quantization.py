r"""Quantised data: whole levels 0..L-1, the points that stand for them in a diffusion, distributions over these.

.. math:: v_k = -1 + k \, \Delta, \qquad \Delta = \frac{2}{L - 1}, \qquad k = 0, \dots, L - 1

The levels are evenly spaced on [-1, 1], both ends included, and :math:`\Delta` is the width of a bin around each. A
distribution over the levels gives each a probability; :math:`-\log_2` of it is a code length in bits.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.3, there with 256 levels,
    https://arxiv.org/abs/2006.11239
"""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.special import erfcx, log_ndtr

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import default_home, float64, home
from ..base.randomness import generator_of

__all__ = ["DiscretizedNormal", "LevelCategorical", "Levels", "bin_width", "from_levels", "to_levels"]

Shape = tuple[int, ...] | list[int]  # as torch's laws take it; a torch.Size is a tuple


def bin_width(levels: int) -> float:
    r"""The width :math:`\Delta = 2 / (L - 1)` of a bin.

    Arguments:
        levels: The number of levels L, at least 2.

    Raises:
        ValueError: If ``levels`` is not an int of at least 2.

    Example:
        >>> pyrodiff.bin_width(17)
        0.125
    """
    return 2 / (arguments.levels(levels) - 1)


def from_levels(
    k: Tensor,
    levels: int,
    uniform: bool = False,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""The points :math:`v_k` of whole levels, or, for a model with a density, uniform draws from the bins around them.

    :func:`to_levels` gives back the levels of either, exactly.

    Arguments:
        k: Whole numbers in 0..levels-1, of any dtype and shape.
        levels: The number of levels L, at least 2.
        uniform: Whether to add noise, uniform on :math:`[-\Delta / 2, \Delta / 2)`. A bound on the density of such
            data, less :math:`\log \Delta` a dimension, is one on the probability of the levels
            (:meth:`Likelihood.bits_per_dim_in_bins`).
        dtype: The dtype of the result, floating; torch's default if not given.
        generator: A generator or a seed of the noise; torch's global generator if not given.

    Returns:
        A tensor with the shape of ``k``.

    Raises:
        ValueError: If ``k`` has a value that is not a whole number in 0..levels-1; if ``levels`` is below 2, or more
            than the dtype tells apart (with noise: about a thousandth of that).

    References:
        A note on the evaluation of generative models (Theis et al., 2016), section 3.1: uniform dequantisation,
        https://arxiv.org/abs/1511.01844

    Example:
        >>> pyrodiff.from_levels(torch.tensor([0, 8, 16]), levels=17)
        tensor([-1.,  0.,  1.])
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    width = bin_width(levels)
    arguments.one_of("uniform", uniform, (False, True))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError("dtype", f"must be a floating dtype, but it is {dtype!r}")
    if torch.finfo(dtype).eps > width / 4:
        raise ArgumentError("levels", f"must be few enough for {dtype} to tell them apart, but there are {levels}")
    if uniform and torch.finfo(dtype).eps > 1e-3 * width:
        raise ArgumentError(
            "dtype", f"must resolve the noise in a bin of width {width:.3g} for uniform=True, but it is {dtype}"
        )
    whole = whole_levels("k", k, levels)
    x, source = _points(whole, levels), generator_of(generator, home(k.device))
    if uniform:
        noise = torch.rand(k.shape, generator=source, dtype=torch.float64, device=home(k.device))
        rounding = torch.finfo(dtype).eps + torch.finfo(torch.float64).eps  # of this function and of to_levels
        inside = 1 - 2 * rounding / width  # so that it does not leave the bin
        x = x + width * (noise - 0.5) * inside
    return x.to(dtype).to(k.device)


def to_levels(x: Tensor, levels: int) -> Tensor:
    r"""The level of the bin that each number lies in; the first and the last bin extend to infinity.

    Arguments:
        x: Numbers, with a floating dtype and any shape.
        levels: The number of levels L, at least 2.

    Returns:
        Integers in 0..levels-1, with the shape of ``x``.

    Raises:
        ValueError: If ``x`` is not a floating tensor or not finite somewhere, or ``levels`` is below 2.

    Example:
        >>> pyrodiff.to_levels(torch.tensor([-3.0, 0.01, 0.07, 1.0]), levels=17)
        tensor([ 0,  8,  9, 16])
    """
    arguments.levels(levels)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ArgumentError("x", f"must be a tensor with a floating dtype, but it is {arguments.described(x)}")
    if not checks.holds(x.isfinite()):
        wrong = x[~x.isfinite()]
        raise ArgumentError("x", f"must be finite, but {len(wrong)} of its values are not, the first {wrong[0].item()}")
    return _nearest(x, levels)


def _nearest(x: Tensor, levels: int) -> Tensor:
    return ((float64(x) + 1) / bin_width(levels)).round().clamp(0, levels - 1).long().to(x.device)


def _points(k: Tensor, levels: int) -> Tensor:
    """The points of levels k, in float64, by one rounding."""
    return (2 * float64(k) - (levels - 1)) / (levels - 1)


def whole_levels(name: str, k: Tensor, levels: int) -> Tensor:
    """Levels, in float64; an error where a value is none."""
    if not isinstance(k, Tensor) or k.is_complex():
        raise ArgumentError(
            name, f"must be a tensor of whole numbers in 0..{levels - 1}, but it is {arguments.described(k)}"
        )
    whole = float64(k)
    valid = (whole == whole.round()) & (whole >= 0) & (whole <= levels - 1)
    if not checks.holds(valid):
        raise ArgumentError(
            name,
            f"must be whole numbers in 0..{levels - 1}, for {levels} levels, but {int((~valid).sum())} of its "
            f"{k.numel()} values are not, the first {k[~valid.to(k.device)][0].item()}; they lie in "
            f"{k.min().item()}..{k.max().item()}",
        )
    return whole


def number_of_values(support: constraints.Constraint) -> int | float | None:
    """How many values a number may take (infinity for all integers); None if continuous, so that p is a density.

    Arguments:
        support: What the number may be.
    """
    if not support.is_discrete:
        return None
    if isinstance(support, type(constraints.boolean) | type(constraints.one_hot)):
        return 2
    if isinstance(support, constraints.integer_interval | constraints.multinomial):
        width = torch.as_tensor(support.upper_bound) - getattr(support, "lower_bound", 0)
        return int(width.max()) + 1
    return getattr(support, "levels", math.inf)  # of a constraint of your own; Levels has it too


class Levels(constraints.Constraint):
    r"""The points :math:`v_0, \dots, v_{L-1}`, to a thousandth of a bin or the precision of the dtype.

    Arguments:
        levels: The number of levels L, at least 2.

    Raises:
        ValueError: If ``levels`` is not an int of at least 2.
    """

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = arguments.levels(levels)

    def check(self, value: Tensor) -> Tensor:
        """Whether each number is a level, with the shape of ``value``."""
        width = bin_width(self.levels)
        exact = float64(value)
        k = ((exact + 1) / width).round()
        tolerance = max(1e-3 * width, torch.finfo(value.dtype).eps)
        return ((k >= 0) & (k < self.levels) & ((_points(k, self.levels) - exact).abs() <= tolerance)).to(value.device)

    def points(self, like: Tensor | None = None) -> Tensor:
        """The levels, ascending, with shape (L,): in float64, or in the dtype and on the device of a tensor."""
        device = default_home() if like is None else home(like.device)
        points = _points(torch.arange(self.levels, device=device), self.levels)
        return points if like is None else points.to(like.dtype).to(like.device)

    def __repr__(self) -> str:
        return f"Levels({self.levels})"


class _OnLevels(TorchDistribution):
    """A distribution of a single number over the levels."""

    arg_constraints: ClassVar[dict] = {}
    has_enumerate_support = True

    def __init__(self, levels: int, batch_shape: torch.Size, validate_args: bool | None = None) -> None:
        self.levels = levels
        super().__init__(batch_shape, validate_args=validate_args)

    @property
    def support(self) -> Levels:
        return Levels(self.levels)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All levels, with shape (L, *batch_shape), or (L, 1, ..., 1) if not expanded."""
        points = self._points().reshape((-1,) + (1,) * len(self.batch_shape))
        return points.expand((-1, *self.batch_shape)) if expand else points

    @property
    def mean(self) -> Tensor:
        """The mean over the levels."""
        points = self.enumerate_support()
        return (points * self.log_prob(points).exp()).sum(0)

    def _points(self) -> Tensor:
        return Levels(self.levels).points(self._like())

    def _like(self) -> Tensor:
        raise NotImplementedError


class DiscretizedNormal(_OnLevels):
    r"""The normal N(loc, scale²) over levels: each has the probability of its bin; the outer bins extend to infinity.

    .. math:: P(v_k) = \Phi\left(\frac{v_k + \Delta / 2 - \mu}{\sigma}\right)
        - \Phi\left(\frac{v_k - \Delta / 2 - \mu}{\sigma}\right),

    computed as a logarithm in float64, in whichever tail is the smaller: it and its gradient are finite however far
    off.

    Arguments:
        loc: The mean :math:`\mu`.
        scale: The standard deviation :math:`\sigma`, positive.
        levels: The number of levels L, at least 2.
        validate_args: Whether arguments and values are checked; Pyro's setting if not given.

    Raises:
        ValueError: If ``levels`` is below 2, or, under validation, if a scale is not positive or a value no level.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eq. 13, there with 256 levels.

    Example:
        >>> law = pyrodiff.DiscretizedNormal(torch.tensor(0.3), torch.tensor(0.01), levels=3)
        >>> law.log_prob(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-3205.3013,    -0.0000,  -203.9171])
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        for name, value in (("loc", loc), ("scale", scale)):
            checks.state(name, value)
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(arguments.levels(levels), self.loc.shape, validate_args)

    def expand(self, batch_shape: Shape, _instance: None = None) -> "DiscretizedNormal":
        return type(self)(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, self._validate_args
        )

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            x = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return self._points()[_nearest(x, self.levels)]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, scale, k = float64(self.loc), float64(self.scale), float64(_nearest(value, self.levels))
        edge = 2 * k - self.levels  # times 1 / (L - 1): an integer, so that two bins share their edge exactly
        lower, upper = ((e / (self.levels - 1) - loc) / scale for e in (edge, edge + 2))
        right = lower + upper > 0  # there 1 - CDF is the small one
        near, far = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
        log_near = _LogCDF.apply(near)
        inner = log_near + _log1mexp(log_near - _LogCDF.apply(far))
        outer = _LogCDF.apply(torch.where(k == 0, upper, -lower))
        return torch.where((k == 0) | (k == self.levels - 1), outer, inner).to(value.dtype).to(value.device)

    def _like(self) -> Tensor:
        return self.loc


class _LogCDF(torch.autograd.Function):
    """log of the normal CDF. Torch's gradient, exp(-z^2 / 2 - log CDF), is rounding noise a million scales away."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return log_ndtr(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * math.sqrt(2 / math.pi) / erfcx(-z / math.sqrt(2))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    small = x < math.log(2)
    # the branch not taken gets a harmless argument, so that its gradient is finite
    return torch.where(
        small,
        torch.log(-torch.expm1(-torch.where(small, x, 1.0))),
        torch.log1p(-torch.exp(-torch.where(small, 1.0, x))),
    )


class LevelCategorical(_OnLevels):
    """Any distribution over the levels, given by unnormalised log probabilities.

    Arguments:
        logits: Log probabilities up to a constant, with shape (*batch_shape, L).
        validate_args: Whether values are checked; Pyro's setting if not given.

    Raises:
        ValueError: If ``logits`` are no floats, or of fewer than 2 levels; under validation, if they give no
            probabilities (NaN, infinity, minus infinity for all levels), or if a value is no level.

    Example:
        >>> law = pyrodiff.LevelCategorical(torch.tensor([0.2, 0.3, 0.5]).log())
        >>> law.log_prob(torch.tensor([-1.0, 0.0, 1.0])).exp()
        tensor([0.2000, 0.3000, 0.5000])
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ArgumentError("logits", f"must be a tensor of floats, but it is {arguments.described(logits)}")
        arguments.levels(logits.shape[-1] if logits.dim() else 0)
        self.logits = logits.log_softmax(-1)
        super().__init__(logits.shape[-1], logits.shape[:-1], validate_args)
        if self._validate_args and not checks.holds(~self.logits.isnan()):
            raise ArgumentError(
                "logits", "must be log probabilities, below infinity and not all minus infinity, but some are not"
            )

    def expand(self, batch_shape: Shape, _instance: None = None) -> "LevelCategorical":
        return type(self)(self.logits.expand((*batch_shape, self.levels)), self._validate_args)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            probs = self.logits.exp().expand((*shape, self.levels)).reshape(-1, self.levels)
            return self._points()[torch.multinomial(probs, 1).reshape(shape)]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        k, logits = torch.broadcast_tensors(_nearest(value, self.levels)[..., None], self.logits)
        return logits.gather(-1, k[..., :1])[..., 0].to(value.dtype)

    def _like(self) -> Tensor:
        return self.logits
