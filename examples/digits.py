"""Handwritten digits as bits: binomial diffusion of 8 x 8 pictures, against simple density models.

    python examples/digits.py

Trained on 1,000 pictures, scored on the 447 of the test split, in nats a picture. Beside the bound stand what a
Bernoulli a pixel and a mixture of Bernoullis score on the same pictures; the mixture is fitted by EM, its number of
components, its smoothing and its iterations chosen on the validation split.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from training import output_folder, train

import pyrodiff
from pyrodiff import datasets, networks, plots


def log_mixture(x: Tensor, weights: Tensor, probs: Tensor) -> Tensor:
    """log p(x) of a mixture of Bernoullis: x (N, D), weights (K,), probs (K, D); with shape (N, K) before the sum."""
    return weights.log() + x @ probs.log().T + (1 - x) @ (1 - probs).log().T


def fit_mixture(x: Tensor, num_components: int, smoothing: float, num_iterations: int = 60) -> Iterator[tuple]:
    """EM for a mixture of Bernoullis, each component shrunk to the mean as by ``smoothing`` pictures of it.

    Yields the weights and the probabilities after each iteration, so that it can be stopped early.
    """
    mean = x.mean(0).clamp(1e-3, 1 - 1e-3)
    probs = ((x[torch.randperm(len(x))[:num_components]] + mean) / 2).clamp(0.02, 0.98)
    weights = x.new_full((num_components,), 1 / num_components)
    for _ in range(num_iterations):
        resp = log_mixture(x, weights, probs).softmax(-1)
        counts = resp.sum(0)
        weights = (counts + 0.1) / (counts + 0.1).sum()
        probs = (resp.T @ x + smoothing * mean) / (counts[:, None] + smoothing)
        yield weights, probs


def baselines(train_set: Tensor, validation_set: Tensor, test_set: Tensor) -> dict[str, Tensor]:
    """-log p of each test picture, with shape (N,), under the simple models."""
    x, validation, test = (data.flatten(1).double() for data in (train_set, validation_set, test_set))
    bernoulli = x.new_ones(1), ((x.sum(0) + 0.5) / (len(x) + 1))[None]
    fits = itertools.chain.from_iterable(
        fit_mixture(x, size, smoothing)
        for size, smoothing, _ in itertools.product((40, 80, 120, 200), (0.5, 1.0, 2.0), range(2))
    )
    mixture = max(fits, key=lambda fit: float(log_mixture(validation, *fit).logsumexp(-1).mean()))
    return {
        "Bernoulli a pixel": -log_mixture(test, *bernoulli).logsumexp(-1),
        f"mixture of {len(mixture[0])} Bernoullis": -log_mixture(test, *mixture).logsumexp(-1),
    }


def main(out: Path, num_steps: int = 4000) -> pyrodiff.Bound:
    """Train, print the bound beside the simple models, draw the picture; returns the bound."""
    pyro.set_rng_seed(0)
    train_set, validation_set, test_set = (
        datasets.digits(split, binary=True) for split in ("train", "validation", "test")
    )
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=1000), rate=train_set.mean())
    denoiser = pyrodiff.LogitPrediction(
        networks.MLP(event_shape=(8, 8), hidden=192, dropout=0.3, frequency=0.0), forward
    )
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), event_shape=(8, 8))
    train(diffusion, train_set, num_steps, batch_size=128, lr=2e-3, weight_decay=0.1, name="digits")

    bound = pyrodiff.bound(diffusion, test_set)
    print(bound)
    rows = {"bound of the diffusion": bound.nats, **baselines(train_set, validation_set, test_set)}
    for name, nats in rows.items():
        print(f"  test split, {name:28}{float(nats.mean()):8.3f} ± {float(bound.standard_error(nats)):.3f} nats")

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    pictures = {"data (test split)": test_set[:48], "samples": diffusion.model(num_samples=48)}
    for axes, (title, x) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        plots.bits(x, axes, columns=8).set_title(title)
    figure.savefig(out / "digits.png", dpi=130)
    print(f"  picture: {out / 'digits.png'}")
    return bound


if __name__ == "__main__":
    main(output_folder(__doc__))
