"""The evaluation of the two scripts of MNIST: bounds on the held-out and on the test pictures; nothing to run here."""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from training import draw_pictures

import pyrodiff


class Size(NamedTuple):
    """The sizes of the model and of the evaluation."""

    channels: tuple[int, ...]
    num_blocks: int
    num_steps: int  # T
    num_held_out: int
    num_test: int
    num_times: int  # of the T - 1 terms, how many the bound of a test picture is estimated from
    num_weighted: int  # test pictures with an importance-weighted bound
    num_samples: int  # that are drawn


FULL = Size((96, 192, 256), 2, 1000, 5000, 10000, 40, 50, 48)
SMALL = Size((16, 32, 64), 1, 200, 1000, 10000, 20, 50, 48)


def mean(estimate: pyrodiff.Likelihood, unit: str) -> tuple[float, float]:
    """The mean over the data and its standard error, in bits/dim or nats."""
    values = estimate.bits_per_dim if unit == "bits/dim" else estimate.nats
    return float(values.mean()), float(estimate.standard_error(values))


def held_out(
    svi: pyrodiff.SVI, diffusion: pyrodiff.Diffusion, x_0: Tensor, size: Size, unit: str
) -> Callable[[], tuple[float, float]]:
    """A function that estimates the bound of the averaged weights on the held-out pictures, from few terms of each."""
    settings = {"num_times": max(4, size.num_times // 20), "generator": 0}

    def measure() -> tuple[float, float]:
        with svi.averaged():
            return mean(pyrodiff.bound(diffusion, x_0, **settings), unit)

    return measure


def evaluate(
    diffusion: pyrodiff.Diffusion, x_0: Tensor, size: Size, arguments: argparse.Namespace, unit: str
) -> pyrodiff.Bound:
    """Print and save the bounds on the test pictures, draw them and samples."""
    begun = time.monotonic()
    settings = {"generator": 0, "progress": True}
    bound = pyrodiff.bound(diffusion, x_0, num_times=size.num_times, **settings)
    weighted = pyrodiff.importance_bound(diffusion, x_0[: size.num_weighted], num_particles=4, **settings)
    bound.save(arguments.out / "test.npz")
    print(bound)
    for name, estimate in (("bound", bound), ("importance-weighted bound, K = 4", weighted)):
        value, error = mean(estimate, unit)
        print(f"test set, {name}: {value:.4f} ± {error:.4f} {unit} ({len(estimate.nats)} pictures)")
    samples = pyrodiff.AncestralSampler(diffusion)(size.num_samples, generator=0)
    low = 0.0 if diffusion.levels == 2 else -1.0
    pictures = {"data (test set)": x_0[: size.num_samples], "samples": samples}
    draw_pictures({title: (x - low) / (1 - low) for title, x in pictures.items()}, arguments.out / "samples.png")
    print(f"in {time.monotonic() - begun:.0f} s; pictures: {arguments.out}/samples.png, curve.png", flush=True)
    return bound
