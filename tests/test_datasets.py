"""The data: what each docstring says of its data set, from the numbers themselves."""

import math

import numpy as np
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


# Data made of data


class Draws:
    """Stands for torch.rand, and gives what it is told."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, *shape):
        return torch.as_tensor(self.values.pop(0)).expand(shape)


def test_strokes_that_are_not_changed_are_the_digits(monkeypatch):
    k = datasets.digits("test")
    strokes = datasets.Strokes(k)
    monkeypatch.setattr(torch, "rand", Draws([0.5] * 5))  # half way: no turn, no shear, no move
    assert torch.equal(strokes(torch.arange(447)), k)


def test_strokes_are_moved_by_the_axis_that_they_are_moved_along(monkeypatch):
    """1.5 and 1 points of the scan at most, as levels counted over scans that are shifted by whole points."""
    strokes = datasets.Strokes(datasets.digits("test")[:40])
    up = torch.tensor([0.5, 1.0])  # to look a whole point lower
    monkeypatch.setattr(torch, "rand", Draws([0.5] * 4 + [up]))
    scans = torch.cat([strokes.scans[:, 0, 1:], torch.zeros(40, 1, 32)], 1)
    expected = scans.reshape(40, 8, 4, 8, 4).sum((2, 4))
    assert torch.equal(strokes(torch.arange(40)), expected)


def test_strokes_are_scans_seen_through_an_affine_map():
    """Bilinear interpolation in NumPy, point by point, with the draws in the order that the seed gives them."""
    i = torch.tensor([3, 8, 3, 21, 0])
    strokes = datasets.Strokes(datasets.digits("test")[:30])
    torch.manual_seed(7)
    found = strokes(i).numpy()
    torch.manual_seed(7)
    turn, shear, wide, high = (2 * torch.rand(5).double().numpy() - 1 for _ in range(4))
    turn, shear, wide, high = 0.14 * turn, 0.12 * shear, 1 + 0.08 * wide, 1 + 0.08 * high
    move = (2 * torch.rand(5, 2).double().numpy() - 1) * [1.5, 1.0]
    place = np.arange(32) - 15.5  # in points of the scan, from its middle
    x, y = np.meshgrid(place, place)
    for n in range(5):
        scan = np.pad(strokes.scans[i[n], 0].numpy(), 4)
        u = wide[n] * np.cos(turn[n]) * x + (shear[n] - high[n] * np.sin(turn[n])) * y + move[n, 0] + 15.5 + 4
        v = wide[n] * np.sin(turn[n]) * x + high[n] * np.cos(turn[n]) * y + move[n, 1] + 15.5 + 4
        u, v = np.clip(u, 0, 38.999), np.clip(v, 0, 38.999)
        a, b = np.floor(u).astype(int), np.floor(v).astype(int)
        s, t = u - a, v - b
        seen = (1 - t) * ((1 - s) * scan[b, a] + s * scan[b, a + 1])
        seen += t * ((1 - s) * scan[b + 1, a] + s * scan[b + 1, a + 1])
        doubtful = (np.abs(seen - 0.5) < 1e-4).reshape(8, 4, 8, 4).sum((1, 3))
        levels = (seen > 0.5).reshape(8, 4, 8, 4).sum((1, 3))
        assert (np.abs(found[n] - levels) <= doubtful).all()
        assert doubtful.sum() < 10


def test_strokes_are_levels_and_differ_from_draw_to_draw():
    k = datasets.digits("train")
    strokes = datasets.Strokes(k)
    x = strokes(torch.zeros(100, dtype=torch.long))
    assert set(x.unique().tolist()) <= set(range(17))
    assert len(x.unique(dim=0)) > 90
    changed = strokes(torch.arange(1000))
    assert abs(float((changed - k).mean())) < 0.3  # about as much ink as before
    assert strokes.scans.sum() == k.sum()


@pytest.mark.parametrize(("levels", "dtype"), [(256, torch.uint8), (17, torch.float32), (2, torch.bool)])
def test_bits_are_ones_as_often_as_the_level_says(levels, dtype):
    k = torch.arange(levels).to(dtype)
    n = 20_000
    bits = datasets.binarize(k.expand(n, levels), levels)
    assert bits.dtype == torch.float32
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    p = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    error = (p * (1 - p) / n).sqrt()
    assert ((bits.double().mean(0) - p).abs() <= 5 * error).all()  # 0 and 1 have no error
    common = (p - 0.5).abs() < 0.45
    if common.any():  # independent from pixel to pixel
        assert bits[:, common].T.double().corrcoef().triu(1).abs().max() < 5 / math.sqrt(n)


def test_bits_are_drawn_anew_unless_a_seed_or_a_generator_says_how():
    k = torch.full((50, 8, 8), 100)
    assert not torch.equal(datasets.binarize(k), datasets.binarize(k))
    torch.manual_seed(4)
    x = datasets.binarize(k)
    torch.manual_seed(4)
    assert torch.equal(x, datasets.binarize(k))
    state = torch.get_rng_state()
    assert torch.equal(datasets.binarize(k, generator=4), datasets.binarize(k, generator=4))
    assert not torch.equal(datasets.binarize(k, generator=4), datasets.binarize(k, generator=5))
    source = torch.Generator().manual_seed(4)
    assert torch.equal(datasets.binarize(k, generator=4), datasets.binarize(k, generator=source))
    assert not torch.equal(datasets.binarize(k, generator=4), datasets.binarize(k, generator=source))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_threshold_draws_nothing():
    state = torch.get_rng_state()
    found = datasets.binarize(datasets.digits("test"), levels=17, threshold=8)
    assert torch.equal(found, datasets.digits("test", binary=True))
    assert torch.equal(torch.get_rng_state(), state)
