"""Handwritten digits in their 17 grey levels: bits per dimension, against simple density models.

    python examples/digits.py

Trained on 1,000 pictures of 8 x 8, scored on the 447 of the test split. The network predicts the level of each pixel from
the others (:class:`pyrodiff.LevelPrediction`), times are drawn by how much they cost (:class:`pyrodiff.LossSecondMoment`),
weights are averaged. Beside the bound stand what simple models score on the same pictures, and how the bound moves with
the number of steps, the decoder and the variance of one and the same network. ``--prediction`` trains another reading of
the network instead: noise, velocity or data.
"""

import argparse
import math
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, one_hot
from training import train

import pyrodiff
from pyrodiff import datasets, networks, plots

LEVELS = 17


class Strokes:
    """Other pictures of the same digits: turned, sheared, scaled and moved a little.

    A level counts the dark ones among 4 x 4 points of a scan of 32 x 32. A likely scan of each picture is restored, and
    its points are counted anew after the change.
    """

    def __init__(self, k: Tensor) -> None:
        fine = interpolate(k[:, None], size=(32, 32), mode="bicubic", align_corners=False)
        cells = fine.reshape(-1, 8, 4, 8, 4).transpose(2, 3).reshape(-1, 8, 8, 16)
        rank = cells.argsort(-1, descending=True).argsort(-1)  # in each cell the k largest are dark
        dark = (rank < k[..., None]).float()
        self.scans = dark.reshape(-1, 8, 8, 4, 4).transpose(2, 3).reshape(-1, 1, 32, 32)

    def __call__(self, i: Tensor) -> Tensor:
        """The levels of changed pictures of the given numbers."""
        turn, shear, wide, high = (size * (2 * torch.rand(len(i)) - 1) for size in (0.14, 0.12, 0.08, 0.08))
        move = torch.tensor([1.5, 1.0]) / 16 * (2 * torch.rand(len(i), 2) - 1)
        rows = [(1 + wide) * turn.cos(), shear - (1 + high) * turn.sin(), move[:, 0]]
        rows += [(1 + wide) * turn.sin(), (1 + high) * turn.cos(), move[:, 1]]
        grid = affine_grid(torch.stack(rows, -1).reshape(-1, 2, 3), (len(i), 1, 32, 32), align_corners=False)
        moved = grid_sample(self.scans[i], grid, align_corners=False) > 0.5
        return (16 * avg_pool2d(moved.float(), 4)).round()[:, 0]


def build(prediction: str, histogram: Tensor) -> pyrodiff.Diffusion:
    """The diffusion: the network says the level of each pixel, or, of other readings, a number."""
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=1000))
    if prediction == "level":
        network = networks.UNet((8, 8), channels=(24, 64), dropout=0.2, outputs=LEVELS)
        denoiser = pyrodiff.LevelPrediction(Histogram(network, histogram), forward, LEVELS)
    else:
        network = networks.UNet((8, 8), channels=(24, 64), dropout=0.2)
        kinds = {"noise": pyrodiff.NoisePrediction, "velocity": pyrodiff.VelocityPrediction}
        denoiser = kinds.get(prediction, pyrodiff.DataPrediction)(network, forward)
    reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.PosteriorVariance())
    return pyrodiff.Diffusion(forward, reverse, (8, 8), pyrodiff.DiscretizedDecoder(LEVELS))


class Histogram(torch.nn.Module):
    """A network of levels that starts at how often each pixel has each."""

    def __init__(self, network: torch.nn.Module, histogram: Tensor) -> None:
        super().__init__()
        self.network, self.offset = network, torch.nn.Parameter(histogram.log())

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        return self.network(x_t, t) + self.offset
