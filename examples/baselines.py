"""Simple density models of pictures, baselines of the examples: each gives -log p of a test picture.

The package's own baselines, a factor per pixel and a full Gaussian; and mixtures of such factors, fitted by EM, their
size and smoothing chosen on the validation split. ``binary_digits.py`` and ``digits.py`` print them; there is nothing
to run here.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import pyrodiff


def of_bits(train_set: Tensor, validation_set: Tensor, test_set: Tensor) -> dict[str, Tensor]:
    """-log p of each test picture in nats, with shape (N,), under models of bits; the sets have shape (n, H, W)."""
    x, validation, test = (data.flatten(1).double() for data in (train_set, validation_set, test_set))
    fits = itertools.chain.from_iterable(
        _bernoullis(x, size, smoothing)
        for size, smoothing, _ in itertools.product((40, 80, 120, 200), (0.5, 1.0, 2.0), range(2))
    )
    mixture = max(fits, key=lambda fit: float(_log_bernoullis(validation, *fit).logsumexp(-1).mean()))
    return {
        "Bernoulli per pixel": pyrodiff.yardsticks(train_set, test_set, levels=2)["Bernoulli"].nats,
        f"mixture of {len(mixture[0])} Bernoullis": -_log_bernoullis(test, *mixture).logsumexp(-1),
    }


def of_levels(train_set: Tensor, validation_set: Tensor, test_set: Tensor, levels: int) -> dict[str, Tensor]:
    """-log p of each test picture in nats, with shape (N,), under models of levels 0..levels-1; shapes as above."""
    settings = itertools.product((1, 10, 20, 40, 80), (1.0, 3.0, 10.0))
    fits = [_categoricals(train_set, levels, size, smoothing) for size, smoothing in settings]

    def best(some: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return min(some, key=lambda fit: float(_categorical_nats(fit, validation_set, levels).mean()))

    ten, mixture = best(fits[3:6]), best(fits)
    simple = pyrodiff.yardsticks(train_set, test_set, levels)
    noisy = [pyrodiff.from_levels(k, levels, uniform=True, generator=0) for k in (train_set, test_set)]
    in_bins = test_set[0].numel() * math.log(pyrodiff.bin_width(levels))  # a density there, less this, is a probability
    return {
        "uniform": simple["uniform"].nats,
        "full Gaussian": pyrodiff.yardsticks(*noisy)["full Gaussian"].nats - in_bins,
        "normal law per pixel": simple["discretized Gaussian"].nats,
        "histogram per pixel": simple["histogram"].nats,
        "mixture of 10 categoricals": _categorical_nats(ten, test_set, levels),
        f"mixture of {len(mixture[0])} categoricals": _categorical_nats(mixture, test_set, levels),
    }


def _log_bernoullis(x: Tensor, weights: Tensor, probs: Tensor) -> Tensor:
    """log p(x) of a mixture of Bernoullis: x (N, D), weights (K,), probs (K, D); with shape (N, K) before the sum."""
    return weights.log() + x @ probs.log().T + (1 - x) @ (1 - probs).log().T


def _bernoullis(x: Tensor, num_components: int, smoothing: float, num_iterations: int = 60) -> Iterator[tuple]:
    """EM for a mixture of Bernoullis, each component shrunk to the mean picture as if it were seen ``smoothing`` more
    times.

    Yields the weights and the probabilities after each iteration, so that it can be stopped early.
    """
    mean = x.mean(0).clamp(1e-3, 1 - 1e-3)
    probs = ((x[torch.randperm(len(x))[:num_components]] + mean) / 2).clamp(0.02, 0.98)
    weights = x.new_full((num_components,), 1 / num_components)
    for _ in range(num_iterations):
        belief = _log_bernoullis(x, weights, probs).softmax(-1)
        counts = belief.sum(0)
        weights = (counts + 0.1) / (counts + 0.1).sum()
        probs = (belief.T @ x + smoothing * mean) / (counts[:, None] + smoothing)
        yield weights, probs


def _categoricals(k: Tensor, levels: int, size: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """EM for a mixture of categoricals, shrunk likewise; yields log weights and log probs."""
    x = one_hot(k.long().flatten(1), levels).double().flatten(1)
    mean = (x.mean(0).reshape(-1, levels) + 1e-3).div(1 + 1e-3 * levels).flatten()
    probs = (x[torch.randperm(len(x))[:size]] + 3 * mean) / 4
    weights = torch.full((size,), 1 / size, dtype=torch.float64)
    for _ in range(60):
        belief = (weights.log() + x @ probs.log().T).softmax(-1)
        counts = belief.sum(0)
        weights = (counts + 0.1) / (counts + 0.1).sum()
        probs = (belief.T @ x + smoothing * mean) / (counts[:, None] + smoothing)
    return weights.log(), probs.log()


def _categorical_nats(fit: tuple[Tensor, Tensor], k: Tensor, levels: int) -> Tensor:
    """-log p of each picture, with shape (N,)."""
    x = one_hot(k.long().flatten(1), levels).double().flatten(1)
    return -(fit[0] + x @ fit[1].T).logsumexp(-1)
