"""The data: what each docstring says of its data set, from the numbers themselves."""

import math

import pytest
import torch

from pyrodiff import datasets

GENERATED = [datasets.swiss_roll, datasets.checkerboard, datasets.eight_gaussians, datasets.heartbeat]


@pytest.mark.parametrize("dataset", GENERATED)
def test_the_seed_decides_and_nothing_global_is_drawn_from(dataset):
    state = torch.get_rng_state()
    x, y, z = dataset(50, seed=3), dataset(50, seed=3), dataset(50, seed=4)
    assert torch.equal(x, y)
    assert not torch.equal(x, z)
    assert x.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_the_swiss_roll_has_mean_0_and_variance_1_in_each_dimension(noise):
    x = datasets.swiss_roll(200_000, noise=noise).double()
    for values, expected in ((x, 0.0), (x**2, 1.0)):
        error = values.std(0) / math.sqrt(len(x))
        assert ((values.mean(0) - expected).abs() < 5 * error).all()


def test_the_swiss_roll_without_noise_is_the_spiral():
    r = math.pi * torch.linspace(1.5, 4.5, 200_001, dtype=torch.float64)
    spiral = torch.stack([r * r.cos(), r * r.sin()], -1)
    spiral = (spiral - spiral.mean(0)) / spiral.std(0)
    distance = torch.cdist(datasets.swiss_roll(500, noise=0.0).double(), spiral).min(1).values
    assert distance.max() < 1e-3


def test_the_checkerboard_is_uniform_on_its_eight_squares():
    x = datasets.checkerboard(80_000)
    square = (x + 4).div(2).floor().long()
    assert square.min() >= 0
    assert square.max() <= 3
    assert (square.sum(-1) % 2 == 0).all()
    counts = torch.bincount(4 * square[:, 0] + square[:, 1], minlength=16)
    assert (counts > 0).sum() == 8
    expected = 80_000 / 8
    assert ((counts[counts > 0] - expected).abs() < 5 * math.sqrt(expected * 7 / 8)).all()
    inside = (x + 4) % 2
    assert ((inside.mean(0) - 1).abs() < 5 * math.sqrt(1 / 3 / 80_000)).all()
    assert math.isclose(math.log(8 * 2 * 2), 3.4657, abs_tol=1e-4)


def test_the_entropy_of_the_eight_gaussians_is_2_830_nats():
    x = datasets.eight_gaussians(100_000).double()
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    centres = 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    log_p = torch.distributions.Normal(centres, 0.5 / math.sqrt(2)).log_prob(x[:, None]).sum(-1).logsumexp(-1)
    nats = math.log(8) - log_p
    assert abs(nats.mean() - 2.830) < 5 * nats.std() / math.sqrt(len(x)) + 5e-4


def test_the_heartbeat_has_one_in_every_period_from_every_start():
    x = datasets.heartbeat(10_000)
    assert x.shape == (10_000, 20)
    assert (x.reshape(-1, 4, 5).sum(-1) == 1).all()
    assert (x[:, :5] == x[:, 15:]).all()
    starts = x[:, :5].sum(0)
    assert ((starts - 2000).abs() < 5 * math.sqrt(10_000 * 0.2 * 0.8)).all()


def test_the_digits_are_the_1797_in_three_splits():
    splits = [datasets.digits(split) for split in ("train", "validation", "test")]
    assert [tuple(x.shape) for x in splits] == [(1000, 8, 8), (350, 8, 8), (447, 8, 8)]
    levels = torch.cat(splits)
    assert set(levels.unique().tolist()) == set(range(17))
    assert len(levels.unique(dim=0)) == 1797
    assert float(levels.sum()) == 561_718  # as summed over scikit-learn's load_digits().data
    for split, x in zip(("train", "validation", "test"), splits, strict=True):
        assert torch.equal(datasets.digits(split, binary=True), (x >= 8).float())
