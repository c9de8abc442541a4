"""The shape of the tail of importance weights: where it is known exactly, and against the papers' formulas."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrodiff
from pyrodiff import pareto_k


def of_the_papers(weights):
    """One datum's k, number by number: Zhang and Stephens (2009), Eqs. 6-8, and Vehtari et al. (2024)."""
    weights = sorted(weights)
    K = len(weights)
    M = math.ceil(min(0.2 * K, 3 * math.sqrt(K)))
    x = [w - weights[K - M - 1] for w in weights[K - M :]]
    m = 30 + int(math.sqrt(M))
    first_quartile = x[int(M / 4 + 0.5) - 1]
    grid = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * first_quartile) for j in range(1, m + 1)]

    def shape(theta):
        return sum(math.log(1 - theta * value) for value in x) / M

    def profile(theta):
        return M * (math.log(-theta / shape(theta)) - shape(theta) - 1)

    likelihoods = [profile(theta) for theta in grid]
    total = [1 / sum(math.exp(other - one) for other in likelihoods) for one in likelihoods]
    mean = sum(theta * part for theta, part in zip(grid, total, strict=True))
    return (M * shape(mean) + 10 * 0.5) / (M + 10)


@pytest.mark.parametrize("K", [21, 64, 100, 1000])
def test_each_datum_has_the_k_of_the_papers(K):
    log_weights = torch.randn(K, 4, dtype=torch.float64) * torch.tensor([0.1, 0.5, 2.0, 5.0], dtype=torch.float64)
    expected = [of_the_papers(weights) for weights in (log_weights - log_weights.amax(0)).exp().T.tolist()]
    np.testing.assert_allclose(pareto_k(log_weights).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(pareto_k(log_weights + 700).numpy(), expected, rtol=1e-8)
    np.testing.assert_allclose(pareto_k(log_weights.float()).numpy(), expected, rtol=1e-2)


@pytest.mark.parametrize("k", [-0.5, 0.1, 0.5, 0.7, 1.2])
def test_draws_of_a_generalised_pareto_law_have_its_k(k):
    """In the mean over 400 data of 10,000 weights: 10 / 310 of the way to 1/2, and with a bias of a few in M = 300."""
    u = torch.rand(10_000, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = pareto_k(((u**-k - 1) / k + 1).log())
    expected = k + (0.5 - k) * 10 / 310
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / 20 + 4 / 300
    assert float(found.std()) == pytest.approx((1 + k) / math.sqrt(310), rel=0.25) or k < 0


@pytest.mark.parametrize("variance", [0.2, 0.4, 0.7])
def test_weights_of_two_gaussians_have_the_k_that_follows_from_their_variances(variance):
    """In two dimensions N(0, 1) / N(0, v) at draws of the latter is a Pareto variable of shape 1 - v, exactly."""
    proposal, target = dist.Normal(0.0, math.sqrt(variance)), dist.Normal(0.0, 1.0)
    torch.manual_seed(0)
    x = proposal.sample((10_000, 200, 2))
    found = pareto_k((target.log_prob(x) - proposal.log_prob(x)).sum(-1).double())
    k = 1 - variance
    assert abs(float(found.mean()) - (k + (0.5 - k) * 10 / 310)) < 5 * float(found.std()) / 200**0.5 + 4 / 300


def test_weights_without_a_tail_or_without_a_number():
    assert pareto_k(torch.zeros(100, 2)).tolist() == [0, 0]
    nearly = torch.zeros(100, 1, dtype=torch.float64)
    assert float(pareto_k(nearly + 1e-15 * torch.randn(100, 1))) == 0
    assert pareto_k(torch.randn(20, 3)).isnan().all()
    assert float(pareto_k(torch.full((50, 1), -math.inf)).isnan())
    broken = torch.randn(50, 2)
    broken[3, 0] = math.nan
    assert pareto_k(broken).isnan().tolist() == [True, False]
    few = torch.full((50, 1), -math.inf)
    few[:3] = 0.0
    assert float(pareto_k(few)) > 1
    assert float(pareto_k(1e4 * torch.randn(200, 1))) > 1


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).expand([len(x), 2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) * 0, 1.0), obs=x)


def guide_of(variance):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), variance**0.5).expand([len(x), 2]).to_event(1))

    return guide


def test_a_pair_with_heavy_weights_is_warned_of_and_one_with_light_ones_not():
    """The model's prior over the guide's law is the Pareto variable of above."""
    x = torch.zeros(5)
    with pytest.warns(UserWarning, match=r"Pareto k of the importance weights is above 0.7 for 5 of 5 data"):
        heavy = pyrodiff.pair_importance_bound(model, guide_of(0.05), x, num_particles=2000, generator=0)
    assert torch.equal(heavy.pareto_k, pareto_k(heavy.log_weights))
    assert "(above 0.7 for 5)" in heavy.title
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        light = pyrodiff.pair_importance_bound(model, guide_of(0.8), x, num_particles=1000, generator=0)
        few = pyrodiff.pair_importance_bound(model, guide_of(0.05), x, num_particles=99, generator=0)
    assert f"Pareto k {float(light.pareto_k.median()):.2f}" in light.title
    assert "above" not in light.title
    assert "Pareto" not in few.title
    assert float(few.pareto_k.mean()) > 0.5


def test_outer_levels_have_weights_of_infinite_variance_and_inner_ones_have_not():
    """Of one step with noise b^2 = 0.1: k = 0.9 in two dimensions, for levels whose bins are open to infinity."""
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.1]))

    class Rescaled(torch.nn.Module):
        def forward(self, x_1, t):
            return x_1 / math.sqrt(0.9)

    kernel = pyrodiff.GaussianReverse(
        forward, pyrodiff.DataPrediction(Rescaled(), forward), pyrodiff.FixedVariance([0.1])
    )
    diffusion = pyrodiff.Diffusion(forward, kernel, (2,), pyrodiff.DiscretizedDecoder(5))
    x_0 = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])[:, None].repeat(20, 2)
    with pytest.warns(UserWarning, match="of 100 data") as caught:
        found = pyrodiff.importance_bound(diffusion, x_0, num_particles=4000, generator=0)
    assert caught[0].filename == __file__
    k = found.pareto_k.reshape(20, 5)
    assert ((k[:, [0, 4]].mean() - 0.9).abs() < 0.15).all()
    assert (k[:, 1:4] < 0.3).all()


def test_weights_that_take_few_values_have_no_tail():
    """Those of discrete paths, say: a Pareto law fitted to ties has a shape of hundreds."""
    torch.manual_seed(0)
    few = torch.tensor([0.1, 1.0, 3.0, 7.0]).log()[torch.randint(4, (4000, 3))]
    smooth = torch.randn(4000, 1)
    k = pyrodiff.pareto_k(torch.cat([few, smooth, torch.zeros(4000, 1)], 1))
    assert k[:3].isnan().all() or bool((k[:3] == 0).all())  # the tail may be the largest value alone
    ties = torch.cat([torch.arange(8.0).repeat_interleave(40), torch.full((3680,), -9.0)])
    assert pareto_k(ties[:, None]).isnan().all()
    assert 0 < k[3] < 1
    assert k[4] == 0
