r"""Data: generated from a seed, carried inside the package, or read from disk; nothing is downloaded.

Generated and packaged data are float32 with shape (n, *event_shape), the same for the same seed. Data from disk keep
the shape and dtype of their file (:mod:`pyrodiff.readers`). :func:`binarize` and :class:`Strokes` transform data. All
are on the CPU.
"""

import functools
import math
from collections.abc import Callable
from importlib import resources
from typing import ParamSpec

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

from .base import arguments, checks
from .base.arguments import ArgumentError
from .base.precision import home
from .base.randomness import generator_of
from .process.quantization import whole_levels
from .readers import array, idx, idx_folder, image_folder

__all__ = [
    "Strokes",
    "array",
    "binarize",
    "checkerboard",
    "digits",
    "eight_gaussians",
    "heartbeat",
    "idx",
    "idx_folder",
    "image_folder",
    "swiss_roll",
    "swiss_roll_log_prob",
]


P = ParamSpec("P")


def _on_cpu(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a function to make its data on the CPU, whatever torch's default device."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return made


def _generator(num_samples: int, seed: int) -> torch.Generator:
    arguments.positive_int("num_samples", num_samples)
    if not arguments.is_int(seed) or not -(2**63) <= int(seed) < 2**64:
        raise ArgumentError("seed", f"must be an int in -2^63..2^64-1, but it is {seed!r}")
    return torch.Generator("cpu").manual_seed(int(seed))


@_on_cpu
def swiss_roll(num_samples: int, seed: int = 0, noise: float = 0.05) -> Tensor:
    r"""A spiral in the plane, with unit variance per dimension as in the paper.

    .. math:: x \propto (r \cos r, r \sin r) / 4 + \text{noise}, \qquad r \sim U[1.5 \pi, 4.5 \pi]

    shifted and scaled, by its exact moments, to mean 0 and variance 1 in each dimension. Its entropy is 0.9638 nats at
    the default noise, by quadrature (:func:`swiss_roll_log_prob`). The 2015 paper does not say how much noise its roll
    has.

    Arguments:
        num_samples: The number of points.
        seed: The seed.
        noise: The standard deviation of the Gaussian noise, in units of the standard deviation of the roll; at
            least 0.

    Returns:
        Points with shape (num_samples, 2).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 3.1.1,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> pyrodiff.datasets.swiss_roll(1000).shape
        torch.Size([1000, 2])
    """
    generator = _generator(num_samples, seed)
    if not (arguments.is_number(noise) and 0 <= noise < math.inf):
        raise ArgumentError("noise", f"must be a number of at least 0, but it is {noise!r}")
    r = math.pi * (1.5 + 3 * torch.rand(num_samples, generator=generator, dtype=torch.float64))
    x = torch.stack([r * r.cos(), r * r.sin()], -1)
    mean, std = _swiss_roll_moments()
    x = (x - mean) / std
    x = x + float(noise) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x / math.sqrt(1 + float(noise) ** 2)).float()


@_on_cpu
@torch.no_grad()
def swiss_roll_log_prob(x: Tensor, noise: float = 0.05) -> Tensor:
    r"""The log density of :func:`swiss_roll`, by quadrature over the spiral.

    .. math:: p(x) = \int N(x; c(r), s^2 I) \, \frac{dr}{3 \pi}, \qquad s = \text{noise} / \sqrt{1 + \text{noise}^2}

    with the spiral c(r) shifted and scaled, by Gauss and Legendre's rule on pieces with nodes a fourth of s apart. No
    bound on -log p has a lower mean over draws of the roll than minus the mean of this.

    Arguments:
        x: Points with shape (B, 2), floats.
        noise: The noise of the roll; at least 1e-4.

    Returns:
        Nats in float64, with shape (B,).

    Raises:
        ValueError: If ``x`` has another shape or dtype, or ``noise`` is below 1e-4.

    Example:
        >>> x = pyrodiff.datasets.swiss_roll(2000, seed=1)
        >>> print(f"{float(-pyrodiff.datasets.swiss_roll_log_prob(x).mean()):.1f}")
        1.0
    """
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2 and x.shape[1] == 2):
        raise ArgumentError("x", f"must be floats with shape (B, 2), but it is {arguments.described(x)}")
    if not checks.holds(x.isfinite()):
        raise ArgumentError("x", f"must be finite, but {int((~x.isfinite()).sum())} of its values are not")
    if not (arguments.is_number(noise) and 1e-4 <= noise < math.inf):
        raise ArgumentError("noise", f"must be a number of at least 1e-4 for a density, but it is {noise!r}")
    scale = math.sqrt(1 + noise**2)
    pieces = math.ceil(3 * math.pi * 2.2 * max(1.0, 1 / noise) / 4)  # the spiral moves at most 2.2 per unit of r
    node, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))
    node = (torch.arange(pieces)[:, None] + (1 + node) / 2).flatten() / pieces * 2 - 1
    weight, number = weight.repeat(pieces) / pieces, 16 * pieces
    r, s = math.pi * (3 + 1.5 * node), noise / scale
    mean, std = _swiss_roll_moments()
    centre = (torch.stack([r * r.cos(), r * r.sin()], -1) - mean) / std / scale
    found = []
    for part in x.cpu().double().split(max(1, 2**24 // number)):
        square = ((part[:, None] - centre) ** 2).sum(-1)
        found.append(torch.logsumexp((weight / 2).log() - square / (2 * s**2), 1) - math.log(2 * math.pi * s**2))
    return torch.cat([torch.zeros(0, dtype=torch.float64), *found]).to(home(x.device))


def _swiss_roll_moments() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (r cos r, r sin r) with r uniform on [1.5 pi, 4.5 pi], from antiderivatives."""
    r = math.pi * torch.tensor([1.5, 4.5], dtype=torch.float64)
    mean = torch.stack([(r * r.sin() + r.cos()).diff(), (r.sin() - r * r.cos()).diff()]).flatten()
    swing = r**2 / 4 * (2 * r).sin() + r / 4 * (2 * r).cos() - (2 * r).sin() / 8
    square = torch.stack([(r**3 / 6 + swing).diff(), (r**3 / 6 - swing).diff()]).flatten()
    mean, square = mean / r.diff(), square / r.diff()
    return mean, (square - mean**2).sqrt()


@_on_cpu
def checkerboard(num_samples: int, seed: int = 0) -> Tensor:
    r"""Uniform on the dark squares of a 4 x 4 board on [-4, 4]^2.

    Its entropy is :math:`\log 32 = 3.4657` nats exactly: no bound on -log p may have a lower mean.

    Arguments, errors: see :func:`swiss_roll`.

    Returns:
        Points with shape (num_samples, 2).

    Example:
        >>> x = pyrodiff.datasets.checkerboard(1000)
        >>> bool((((x // 2).sum(-1) % 2) == 0).all())
        True
    """
    generator = _generator(num_samples, seed)
    column = torch.randint(4, (num_samples,), generator=generator)
    row = 2 * torch.randint(2, (num_samples,), generator=generator) + column % 2
    inside = torch.rand((num_samples, 2), generator=generator, dtype=torch.float32)
    return 2 * (torch.stack([column, row], -1) + inside) - 4


@_on_cpu
def eight_gaussians(num_samples: int, seed: int = 0) -> Tensor:
    r"""Eight Gaussians on a circle, equally likely, with FFJORD's scaling.

    Centres at distance :math:`4 / \sqrt 2` from 0, standard deviation :math:`0.5 / \sqrt 2`. Neighbours hardly overlap:
    the entropy is 2.830 nats, :math:`\log 8 + \log(2 \pi e \, 0.125) = 2.838` less what they overlap.

    Arguments, errors: see :func:`swiss_roll`.

    Returns:
        Points with shape (num_samples, 2).

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019),
        https://arxiv.org/abs/1810.01367

    Example:
        >>> pyrodiff.datasets.eight_gaussians(1000).shape
        torch.Size([1000, 2])
    """
    generator = _generator(num_samples, seed)
    angle = math.pi / 4 * torch.randint(8, (num_samples,), generator=generator).float()
    centre = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    return (centre + 0.5 * torch.randn((num_samples, 2), generator=generator, dtype=torch.float32)) / math.sqrt(2)


@_on_cpu
def heartbeat(num_samples: int, seed: int = 0, length: int = 20, period: int = 5) -> Tensor:
    r"""Binary sequences with a 1 in every ``period``-th place, from a random start.

    Its entropy is log(period) exactly, :math:`\log_2 5 = 2.322` bits a sequence for the paper's 20 bits and period 5.

    Arguments:
        num_samples: The number of sequences.
        seed: The seed.
        length: The number of bits, a multiple of ``period``.
        period: The distance between ones, at least 1.

    Returns:
        Zeros and ones with shape (num_samples, length).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 3.1.2,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> pyrodiff.datasets.heartbeat(1, length=10)
        tensor([[0., 0., 0., 0., 1., 0., 0., 0., 0., 1.]])
    """
    generator = _generator(num_samples, seed)
    period, length = arguments.positive_int("period", period), arguments.positive_int("length", length)
    if length % period:
        raise ArgumentError("length", f"must be a positive multiple of period = {period}, but it is {length!r}")
    start = torch.randint(period, (num_samples, 1), generator=generator)
    return (torch.arange(length) % period == start).float()


def digits(split: str = "train", binary: bool = False) -> Tensor:
    """Handwritten digits, 8 x 8 pixels of 17 grey levels: 1,797 images in a fixed shuffled order.

    The test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), UCI Machine Learning
    Repository, https://doi.org/10.24432/C50P49, under CC BY 4.0; here shuffled and split. Their entropy is not known.

    Arguments:
        split: "train" (1,000 images), "validation" (350) or "test" (447).
        binary: Whether to return bits, 1 where the level is 8 or more, or the levels 0..16.

    Returns:
        Numbers with shape (n, 8, 8).

    Raises:
        ValueError: If there is no such split.

    Example:
        >>> pyrodiff.datasets.digits("test").shape, pyrodiff.datasets.digits("test", binary=True).unique()
        (torch.Size([447, 8, 8]), tensor([0., 1.]))
    """
    bounds = {"train": (0, 1000), "validation": (1000, 1350), "test": (1350, 1797)}
    arguments.one_of("binary", binary, (False, True))
    arguments.one_of("split", split, tuple(bounds))
    with resources.files(__package__).joinpath("data/digits.npz").open("rb") as file:
        images = np.load(file)["images"]
    levels = torch.from_numpy(images[slice(*bounds[split])]).float()
    return (levels >= 8).float() if binary else levels


class Strokes:
    r"""Data augmentation for the digits: pictures slightly rotated, sheared, scaled and shifted.

    A level of :func:`digits` is the number of dark points among 4 x 4 of a 32 x 32 scan. A likely scan of each picture
    is reconstructed, and its points are counted again after a transformation: a rotation by up to 0.14 radians, a shear
    by up to 0.12, a scaling of width and height by up to 8 % each, and a shift by up to 1.5 points of the scan
    horizontally and 1 vertically, each uniform on its interval and independent. Without a transformation the picture is
    unchanged. For training only: a bound refers to the distribution of the data it is evaluated on.

    Arguments:
        k: The levels 0..16 of the pictures, with shape (n, 8, 8), as :func:`digits` has them.

    Raises:
        ValueError: If ``k`` is something else.

    Example:
        >>> strokes = pyrodiff.datasets.Strokes(pyrodiff.datasets.digits("train"))
        >>> strokes(torch.tensor([0, 0, 7])).shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, k: Tensor) -> None:
        k = whole_levels("k", k, 17).float().cpu()
        if k.dim() != 3 or k.shape[1:] != (8, 8) or not len(k):
            raise ArgumentError("k", f"must have shape (n, 8, 8), but its shape is {tuple(k.shape)}")
        fine = interpolate(k[:, None], size=(32, 32), mode="bicubic", align_corners=False)
        cells = fine.reshape(-1, 8, 4, 8, 4).transpose(2, 3).reshape(-1, 8, 8, 16)
        rank = cells.argsort(-1, descending=True).argsort(-1)  # in each cell the k largest are dark
        dark = (rank < k[..., None]).float()
        self.scans = dark.reshape(-1, 8, 8, 4, 4).transpose(2, 3).reshape(-1, 1, 32, 32)

    @_on_cpu
    def __call__(self, i: Tensor) -> Tensor:
        """Transform pictures, each at random, by draws from torch's global generator.

        Arguments:
            i: The indices of the pictures, integers in 0..n-1 with shape (B,); an index may occur more than once.

        Returns:
            The levels of the transformed pictures, 0..16, with shape (B, 8, 8), on the CPU.

        Raises:
            ValueError: If ``i`` is something else.
        """
        last = len(self.scans) - 1
        integers = isinstance(i, Tensor) and not (i.is_floating_point() or i.is_complex() or i.dtype == torch.bool)
        if not integers or i.dim() != 1 or not checks.holds((i >= 0) & (i <= last)):
            raise ArgumentError("i", f"must be integers in 0..{last} with shape (B,), but it is {i}")
        turn, shear, wide, high = (size * (2 * torch.rand(len(i)) - 1) for size in (0.14, 0.12, 0.08, 0.08))
        move = torch.tensor([1.5, 1.0]) / 16 * (2 * torch.rand(len(i), 2) - 1)
        rows = [(1 + wide) * turn.cos(), shear - (1 + high) * turn.sin(), move[:, 0]]
        rows += [(1 + wide) * turn.sin(), (1 + high) * turn.cos(), move[:, 1]]
        grid = affine_grid(torch.stack(rows, -1).reshape(-1, 2, 3), [len(i), 1, 32, 32], align_corners=False)
        moved = grid_sample(self.scans[i.cpu().long()], grid, align_corners=False) > 0.5
        return (16 * avg_pool2d(moved.float(), 4)).round()[:, 0]


def binarize(
    k: Tensor, levels: int = 256, threshold: int | None = None, generator: torch.Generator | int | None = None
) -> Tensor:
    r"""Bits from grey levels: drawn, a 1 with probability :math:`k / (L - 1)`, or by a threshold.

    What papers call *dynamic* binarisation is a call for each batch, with fresh draws, in training and for the data of
    a bound. *Static* or *fixed* binarisation is one call with a seed for each split, whose bits are kept, like the file
    of MNIST that Larochelle drew once; a threshold is static too, and draws nothing. These are different distributions,
    with different entropies, and their nats cannot be compared: always say which.

    Arguments:
        k: Levels, whole numbers in 0..levels-1, of any dtype and shape.
        levels: The number of levels L, at least 2.
        threshold: The least level that becomes a 1, in 1..levels-1; bits are drawn if not given.
        generator: A generator or a seed of the draws; torch's global generator if not given.

    Returns:
        Zeros and ones with the shape of ``k``, float32.

    Raises:
        ValueError: If ``k`` has a value that is not a whole number in 0..levels-1, or another argument is out of range
            or of another kind, or both a threshold and a generator are given.

    References:
        On the Quantitative Analysis of Deep Belief Networks (Salakhutdinov & Murray, 2008): pixels drawn with their
        grey values as probabilities; The Neural Autoregressive Distribution Estimator (Larochelle & Murray, 2011): the
        bits drawn once; Importance Weighted Autoencoders (Burda et al., 2016), section 5 and appendix D: both, and by
        how much they differ, https://arxiv.org/abs/1509.00519

    Example:
        >>> k = torch.tensor([0, 128, 255], dtype=torch.uint8)
        >>> pyrodiff.datasets.binarize(k.expand(1000, 3), generator=0).mean(0)
        tensor([0.0000, 0.5..., 1.0000])
        >>> pyrodiff.datasets.binarize(k, threshold=128)
        tensor([0., 1., 1.])
    """
    arguments.levels(levels)
    whole = whole_levels("k", k, levels).float().to(k.device)
    if threshold is None:
        return torch.bernoulli(whole / (levels - 1), generator=generator_of(generator, k.device))
    if generator is not None:
        raise ArgumentError("generator", f"must be None with a threshold, which draws nothing, but it is {generator!r}")
    if not arguments.is_int(threshold) or not 1 <= threshold < levels:
        raise ArgumentError("threshold", f"must be an int in 1..{levels - 1} or None, but it is {threshold!r}")
    return (whole >= int(threshold)).float()
