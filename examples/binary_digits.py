"""Handwritten digits as bits: binomial diffusion of 8 x 8 pictures, against simple density models.

    python examples/binary_digits.py

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
from torch import Tensor, nn
from torch.nn.functional import silu
from training import output_folder, train

import pyrodiff
from pyrodiff import datasets, networks, plots


class PictureNetwork(nn.Module):
    """Log odds of an 8 x 8 picture's bits: convolutions at 8 x 8 and 4 x 4, and one hidden layer that sees it all.

    A network is any module called as ``network(x_t, t)`` that returns a tensor of the shape of ``x_t``, here (B, 8, 8).
    """

    def __init__(self, channels: int = 16, hidden: int = 192, dropout: float = 0.3) -> None:
        super().__init__()
        self.time = nn.Sequential(networks.TimeEmbedding(64), nn.SiLU())
        self.times = nn.ModuleList(nn.Linear(64, n) for n in (channels, 2 * channels, channels, 1))
        self.inlet, self.first, self.last = (nn.Conv2d(n, channels, 3, padding=1) for n in (3, channels, channels))
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.whole = nn.Sequential(
            *(nn.SiLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * channels, hidden)),
            *(nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, 32 * channels), nn.Unflatten(1, (2 * channels, 4, 4))),
        )
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.dropout, self.outlet = nn.Dropout(dropout), nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        line = torch.linspace(-1, 1, 8)
        self.register_buffer("place", torch.stack(torch.meshgrid(line, line, indexing="ij")), persistent=False)

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        x = 2 * x_t[:, None] - 1
        embedding = self.time(torch.as_tensor(t, device=x.device).expand(len(x)))
        shifts = [layer(embedding)[:, :, None, None] for layer in self.times]
        h = self.inlet(torch.cat([x, self.place.expand(len(x), 2, 8, 8)], 1)) + shifts[0]
        h = h + self.first(silu(h))
        low = self.down(h) + shifts[1]
        h = h + self.up(silu(low + self.whole(low)))
        h = h + self.dropout(self.last(silu(h + shifts[2])))
        return (self.outlet(silu(h)) + shifts[3] * x)[:, 0]


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


def fit(num_steps: int = 3000) -> pyrodiff.Diffusion:
    """The diffusion, trained."""
    pyro.set_rng_seed(0)
    x_0 = datasets.digits("train", binary=True)
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=300), rate=x_0.mean())
    denoiser = pyrodiff.LogitPrediction(PictureNetwork(), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), event_shape=(8, 8))
    train(diffusion, x_0, num_steps, batch_size=128, lr=2e-3, weight_decay=0.1, name="binary digits")
    return diffusion


def main(out: Path, num_steps: int = 3000) -> pyrodiff.Bound:
    """Train, print the bound beside the simple models, draw the picture; returns the bound."""
    diffusion = fit(num_steps)
    splits = [datasets.digits(split, binary=True) for split in ("train", "validation", "test")]
    test_set = splits[-1]
    bound = pyrodiff.bound(diffusion, test_set)
    print(bound)
    rows = {"bound of the diffusion": bound.nats, **baselines(*splits)}
    for name, nats in rows.items():
        print(f"  test split, {name:28}{float(nats.mean()):8.3f} ± {float(bound.standard_error(nats)):.3f} nats")
    gain = list(rows.values())[-1] - bound.nats
    print(f"  the mixture takes {float(gain.mean()):.3f} ± {float(bound.standard_error(gain)):.3f} nats a picture more")

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    pictures = {"data (test split)": test_set[:48], "samples": diffusion.model(num_samples=48)}
    for axes, (title, x) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        plots.bits(x, axes, columns=8).set_title(title)
    figure.savefig(out / "binary_digits.png", dpi=130)
    print(f"  picture: {out / 'binary_digits.png'}")
    return bound


if __name__ == "__main__":
    main(output_folder(__doc__))
