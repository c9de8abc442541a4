"""What simple laws cost, against their formulas in NumPy, one number at a time."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import pyrodiff
from pyrodiff.streaming import Blocks


def correlated(n, seed):
    """Data of three dimensions with other means, scales and correlations, in float64."""
    z = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.stack([5 + 2 * z[:, 0], 0.1 * (z[:, 0] + z[:, 1]), z[:, 2] - 1e3], 1)


def whole(n, seed, L=5):
    """Levels of a 2 x 3 picture, of another law at each place, and one at which the last level never comes."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.binomial(L - 1 - (i == 0), (i + 1) / 8, n) for i in range(6)], 1)).reshape(
        n, 2, 3
    )


def shrunk(R, n):
    """Chen et al. (2010), Eq. 23, as it stands there, with S = R and p dimensions."""
    p = len(R)
    top = (1 - 2 / p) * np.trace(R @ R) + np.trace(R) ** 2
    rho = min(top / ((n + 1 - 2 / p) * (np.trace(R @ R) - np.trace(R) ** 2 / p)), 1)
    return (1 - rho) * R + rho * np.trace(R) / p * np.eye(p)


def test_a_gaussian_for_each_dimension():
    train, test = correlated(50, 0), correlated(30, 1)
    law = pyrodiff.yardsticks(train, test)["diagonal Gaussian"]
    mean, std = train.numpy().mean(0), train.numpy().std(0)
    expected = ((test.numpy() - mean) ** 2 / std**2 + np.log(2 * np.pi * std**2)).sum(1) / 2
    assert np.allclose(law.nats.numpy(), expected, rtol=1e-9)
    assert law.levels is None
    assert law.event_shape == (3,)
    assert law.mean == pytest.approx(expected.mean())
    assert law.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(30))


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_gaussian_with_all_covariances_shrunk_as_the_paper_says(n):
    train, test = correlated(n, 0), correlated(30, 1)
    law = pyrodiff.yardsticks(train, test)["full Gaussian"]
    x = train.numpy() - [5, 0, -1e3]
    std = x.std(0)
    covariance = shrunk(np.cov(x.T, bias=True) / np.outer(std, std), n) * np.outer(std, std)
    off = test.numpy() - [5, 0, -1e3] - x.mean(0)
    expected = (off @ np.linalg.inv(covariance) * off).sum(1) / 2 + np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
    assert np.allclose(law.nats.numpy(), expected, rtol=1e-7)


def test_gaussians_of_many_data_cost_what_the_true_law_costs():
    train, test = correlated(200_000, 0), correlated(2000, 1)
    found = pyrodiff.yardsticks(train, test)
    covariance = torch.tensor([[4, 0.2, 0], [0.2, 0.02, 0], [0, 0, 1]], dtype=torch.float64)
    mean = torch.tensor([5, 0, -1e3], dtype=torch.float64)
    true = -MultivariateNormal(mean, covariance).log_prob(test)
    gap = found["full Gaussian"].nats - true
    assert abs(float(gap.mean())) < 5 * float(gap.std()) / 2000**0.5 + 9 / 2 / 200_000
    alone = -Normal(mean, covariance.diagonal().sqrt()).log_prob(test).sum(1)
    assert torch.allclose(found["diagonal Gaussian"].nats, alone, atol=0.2)


@pytest.mark.parametrize("smoothing", [1.0, 3.0])
def test_a_histogram_of_each_dimension(smoothing):
    train, test, L = whole(40, 0), whole(30, 1), 5
    found = pyrodiff.yardsticks(train, test, levels=L, smoothing=smoothing)
    k = train.reshape(40, 6).tolist()
    expected = [
        -sum(math.log((sum(row[d] == datum[d] for row in k) + smoothing / L) / (40 + smoothing)) for d in range(6))
        for datum in test.reshape(30, 6).tolist()
    ]
    assert np.allclose(found["histogram"].nats.numpy(), expected, rtol=1e-12)
    assert torch.equal(found["uniform"].nats, torch.full((30,), 6 * math.log(L), dtype=torch.float64))
    assert float(found["uniform"].bits_per_dim[0]) == pytest.approx(math.log2(L))
    assert list(found) == ["uniform", "discretized Gaussian", "histogram"]
    assert found["histogram"].levels == L
    assert found["histogram"].event_shape == (2, 3)


@pytest.mark.parametrize("smoothing", [0.5, 2.0])
def test_a_normal_law_in_bins(smoothing):
    """Its moments are those of the data and of more that lie evenly on the levels, each weighted, written out."""
    train, test, L = whole(40, 0), whole(30, 1), 5
    law = pyrodiff.yardsticks(train, test, levels=L, smoothing=smoothing)["discretized Gaussian"]
    expected = np.zeros(30)
    for d in range(6):
        points = np.concatenate([train.reshape(40, 6)[:, d].numpy(), np.arange(L)]) * 2 / (L - 1) - 1
        weights = np.concatenate([np.ones(40), np.full(L, smoothing / L)])
        mean = np.average(points, weights=weights)
        std = math.sqrt(np.average((points - mean) ** 2, weights=weights))
        edges = np.concatenate([[-np.inf], (np.arange(1, L) - 0.5) * 2 / (L - 1) - 1, [np.inf]])
        cdf = np.array([0.5 * (1 + math.erf((edge - mean) / std / math.sqrt(2))) for edge in edges])
        expected -= np.log(np.diff(cdf))[test.reshape(30, 6)[:, d].numpy()]
    assert np.allclose(law.nats.numpy(), expected, rtol=1e-9)


def test_rates_of_bits():
    x = (whole(40, 0) > 1).float()
    test = (whole(30, 1) > 1).float()
    found = pyrodiff.yardsticks(x, test, levels=2)
    assert list(found) == ["uniform", "Bernoulli"]
    rate = (x.double().sum(0) + 0.5) / 41
    expected = -torch.where(test == 1, rate, 1 - rate).log().flatten(1).sum(1)
    assert torch.allclose(found["Bernoulli"].nats, expected, rtol=1e-12)
    assert repr(found).splitlines()[0] == "uniform                 4.1589 ± 0.0000 nats"


@pytest.mark.parametrize("levels", [None, 5, 2])
def test_blocks_give_what_all_data_at_once_give(levels):
    make = correlated if levels is None else (whole if levels == 5 else lambda n, seed: (whole(n, seed) > 1).int())
    train, test = make(100, 0), make(50, 1)
    found = pyrodiff.yardsticks(train, test, levels)
    in_blocks = pyrodiff.yardsticks(Blocks(train, 7), ((x, None) for x in Blocks(test, 9)), levels)
    for name, law in found.items():
        assert torch.allclose(in_blocks[name].nats, law.nats, rtol=1e-9), name


def test_a_table_names_value_error_and_unit():
    found = pyrodiff.yardsticks(whole(40, 0), whole(30, 1), levels=5)
    for line, (name, law) in zip(repr(found).splitlines(), found.items(), strict=True):
        assert line.split(maxsplit=len(name.split())) == [*name.split(), law.summary]
        assert law.summary.endswith(" bits/dim")
    assert repr(pyrodiff.yardsticks(correlated(40, 0), correlated(30, 1))).count(" nats") == 2


def test_a_yardstick_is_a_likelihood(tmp_path):
    law = pyrodiff.yardsticks(correlated(40, 0), correlated(30, 1))["full Gaussian"]
    law.save(tmp_path / "law.npz")
    again = pyrodiff.Yardstick.load(tmp_path / "law.npz")
    assert torch.equal(again.nats, law.nats)
    assert again.name == "full Gaussian"
    assert torch.allclose(law.rescaled(2.0).nats, law.nats + 2)
    assert len((law + law).nats) == 60
    assert "full Gaussian" in str(law)


def test_laws_that_memory_does_not_hold_are_left_out(monkeypatch):
    assert list(pyrodiff.yardsticks(torch.randn(5, 1025), torch.randn(2, 1025))) == ["diagonal Gaussian"]
    assert list(pyrodiff.yardsticks(torch.randn(5, 1), torch.randn(2, 1))) == ["diagonal Gaussian"]
    monkeypatch.setattr("pyrodiff.likelihood.yardsticks._COUNTS", 29)
    assert list(pyrodiff.yardsticks(whole(40, 0), whole(3, 1), levels=5)) == ["uniform", "discretized Gaussian"]
