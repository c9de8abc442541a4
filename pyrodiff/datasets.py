r"""Data: generated from a seed, or carried inside the package; nothing is downloaded.

Every function returns float32 on the CPU, with shape (n, *event_shape), the same for the same seed.
"""

import math
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from . import checks

__all__ = ["checkerboard", "digits", "eight_gaussians", "heartbeat", "swiss_roll"]


def _generator(num_samples: int, seed: int) -> torch.Generator:
    checks.positive_int("num_samples", num_samples)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, but it is {seed!r}")
    return torch.Generator().manual_seed(seed)


def swiss_roll(num_samples: int, seed: int = 0, noise: float = 0.05) -> Tensor:
    r"""A spiral in the plane, of unit variance a dimension as in the paper.

    .. math:: x \propto (r \cos r, r \sin r) / 4 + \text{noise}, \qquad r \sim U[1.5 \pi, 4.5 \pi]

    shifted and scaled, by its exact moments, to mean 0 and variance 1 in each dimension. Its entropy has no closed
    form. The 2015 paper does not say how much noise its roll has.

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
    if not (isinstance(noise, int | float) and 0 <= noise < math.inf):
        raise ValueError(f"noise must be a number of at least 0, but it is {noise!r}")
    r = math.pi * (1.5 + 3 * torch.rand(num_samples, generator=generator, dtype=torch.float64))
    x = torch.stack([r * r.cos(), r * r.sin()], -1)
    mean, std = _swiss_roll_moments()
    x = (x - mean) / std
    x = x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x / math.sqrt(1 + noise**2)).float()


def _swiss_roll_moments() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (r cos r, r sin r) with r uniform on [1.5 pi, 4.5 pi], from antiderivatives."""
    r = math.pi * torch.tensor([1.5, 4.5], dtype=torch.float64)
    mean = torch.stack([(r * r.sin() + r.cos()).diff(), (r.sin() - r * r.cos()).diff()]).flatten()
    swing = r**2 / 4 * (2 * r).sin() + r / 4 * (2 * r).cos() - (2 * r).sin() / 8
    square = torch.stack([(r**3 / 6 + swing).diff(), (r**3 / 6 - swing).diff()]).flatten()
    mean, square = mean / r.diff(), square / r.diff()
    return mean, (square - mean**2).sqrt()


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
    checks.positive_int("period", period)
    checks.positive_int("length", length)
    if length % period:
        raise ValueError(f"length must be a positive multiple of period = {period}, but it is {length!r}")
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
    if split not in bounds:
        raise ValueError(f"split must be one of {', '.join(bounds)}, but it is {split!r}")
    with resources.files(__package__).joinpath("data/digits.npz").open("rb") as file:
        images = np.load(file)["images"]
    levels = torch.from_numpy(images[slice(*bounds[split])]).float()
    return (levels >= 8).float() if binary else levels
