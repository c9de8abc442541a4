"""Data of which numbers are missing: the bound on what is observed, its gap, and EM's likelihood met."""

import math

import pyro.distributions as dist
import pytest
import torch
from exact import far, gaussian_diffusion, repeat
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrodiff
from pyrodiff import DiffusionELBO, GaussianImputer, MissingData, NetworkImputer, OneStepEstimate, pair_bound

NAN = math.nan
M, V = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64), torch.tensor([0.5, 2.0, 0.2], dtype=torch.float64)
C = torch.tensor([[1.0, 0.7, -0.4], [0.7, 0.8, 0.1], [-0.4, 0.1, 0.9]], dtype=torch.float64)
X = torch.tensor([[1.2, -0.9, NAN], [NAN, 0.4, 1.5], [NAN, NAN, 0.8], [0.3, 0.1, 0.9]], dtype=torch.float64)


class Fixed(nn.Module):
    """The same law whatever is known: that of independent numbers, shifted and widened."""

    def __init__(self, shift=0.0, widen=1.0):
        super().__init__()
        self.shift, self.widen = shift, widen

    def forward(self, x, known):
        return dist.Normal((M + self.shift).expand_as(x), V.sqrt() * self.widen).to_event(1)


def log_p(x, m=M, v=V):
    """log p of what is observed of independent numbers."""
    known = ~x.isnan()
    return torch.where(known, dist.Normal(m, v.sqrt()).log_prob(x.nan_to_num()), 0.0).sum(1)


def pair_of(T=20, **options):
    estimate = OneStepEstimate(reference=(M, V))
    return MissingData(gaussian_diffusion(pyrodiff.CosineSchedule(T), M, V), Fixed(**options), estimate)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, DiffusionELBO])
@pytest.mark.parametrize("T", [1, 20])
def test_value_and_gradient_are_those_of_the_observed_likelihood(elbo, T):
    """Where the guide is exact."""
    pair, many, data = pair_of(T), X.repeat(200, 1), None
    data = pair.model.diffusion.reverse.data
    loss = elbo().differentiable_loss if elbo is not DiffusionELBO else DiffusionELBO().differentiable_loss

    def once():
        value = -loss(pair.model, pair.guide, many) / 200
        return torch.cat([value[None], *torch.autograd.grad(value, [data.m, data.v])])

    m, v = M.clone().requires_grad_(), V.clone().requires_grad_()
    expected = log_p(X, m, v).sum()
    expected = torch.cat([expected[None], *torch.autograd.grad(expected, [m, v])]).detach()
    assert not far(repeat(40, once), expected)


def test_the_gap_is_the_guides_kl():
    pair, missing = pair_of(shift=0.4, widen=1.3), X.isnan()
    law = torch.distributions.kl_divergence(dist.Normal(M + 0.4, 1.3 * V.sqrt()), dist.Normal(M, V.sqrt()))
    gap = torch.where(missing, law, 0.0).sum(1)
    costs = pair_bound(pair.model, pair.guide, X.repeat(4000, 1), generator=0).nats.view(4000, 4)
    assert not far(costs, -log_p(X) + gap)
    assert not far(pair_bound(*pair_of().children(), X.repeat(4000, 1), generator=0).nats.view(4000, 4), -log_p(X))


def conditional(row, m=M, covariance=C):
    """What is missing given what is known, and log p of that, of one datum, by indices."""
    k = (~row.isnan()).nonzero().flatten()
    u = row.isnan().nonzero().flatten()
    inverse = covariance[k][:, k].inverse()
    evidence = dist.MultivariateNormal(m[k], covariance[k][:, k]).log_prob(row[k])
    mean = m[u] + covariance[u][:, k] @ inverse @ (row[k] - m[k])
    return u, mean, covariance[u][:, u] - covariance[u][:, k] @ inverse @ covariance[k][:, u], evidence


def imputer_of(m=M, covariance=C):
    imputer, L = GaussianImputer((3,)).double(), torch.linalg.cholesky(covariance)
    imputer.mean.data.copy_(m)
    imputer.factor.data.copy_(L.tril(-1) + L.diagonal().log().diag())
    return imputer


def test_the_gaussian_imputer_conditions_and_only_what_is_missing_is_scored():
    guide = MissingData(gaussian_diffusion(pyrodiff.CosineSchedule(5), M, V), imputer_of()).guide
    with torch.no_grad():
        law, torch_value = guide.law(X, ()), torch.full((4, 3), 0.3, dtype=torch.float64)
        found = law.log_prob(torch_value)
        draws = law.rsample((20000,))
    for i, row in enumerate(X):
        u, mean, covariance, _ = conditional(row)
        expected = dist.MultivariateNormal(mean, covariance).log_prob(torch_value[i, u]) if len(u) else 0.0
        torch.testing.assert_close(found[i], torch.as_tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)
        if len(u):
            off = draws[:, i, u] - mean
            assert not far(off, 0.0)
            assert not far(off[:, :, None] * off[:, None], covariance)
        assert bool((draws[:, i, ~row.isnan()] == 0).all())


class Joint(nn.Module):
    """N(m, C), diffused: the kernels, exactly, and q(x_T) when called with nothing."""

    def __init__(self, schedule, m, covariance):
        super().__init__()
        L = torch.linalg.cholesky(covariance)
        self.schedule, self.m = schedule, nn.Parameter(m.clone())
        self.factor = nn.Parameter(L.tril(-1) + L.diagonal().log().diag())

    @property
    def covariance(self):
        L = self.factor.tril(-1) + self.factor.diagonal().exp().diag()
        return L @ L.T

    def moments(self, t):
        a, b = (c.reshape(-1, 1, 1) for c in self.schedule.scales(t))
        return a, b, a[..., 0] * self.m, a**2 * self.covariance + b**2 * torch.eye(3, dtype=torch.float64)

    def forward(self, x_t=None, t=None):
        if x_t is None:
            _, _, mean, covariance = self.moments(torch.tensor([self.schedule.num_steps]))
            return dist.MultivariateNormal(mean[0], covariance[0])
        (a_s, _, mean_s, cov_s), (a_t, _, mean_t, cov_t) = self.moments(t - 1), self.moments(t)
        cross = a_t / a_s * cov_s
        gain = torch.linalg.solve(cov_t, cross).mT
        mean = mean_s + (gain @ (x_t - mean_t)[..., None])[..., 0]
        covariance = cov_s - gain @ cross
        return dist.MultivariateNormal(mean, (covariance + covariance.mT) / 2)


def joint_diffusion(T, m, covariance):
    schedule = pyrodiff.LogSNRSchedule(T)
    joint = Joint(schedule, m, covariance)
    return pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), joint, (3,), prior=joint)


def test_numbers_that_hang_together_are_bounded_tightly_by_the_conditional():
    pair = MissingData(joint_diffusion(10, M, C), imputer_of(), OneStepEstimate(reference=(M, C.diagonal())))
    costs = pair_bound(pair.model, pair.guide, X.repeat(4000, 1), generator=0).nats.view(4000, 4)
    assert not far(costs, -torch.stack([conditional(row)[3] for row in X]))


# EM


def incomplete():
    torch.manual_seed(3)
    x = dist.MultivariateNormal(M, C).sample((200,))
    missing = torch.rand(200, 3) < 0.3
    missing[:, 0] &= ~missing.all(1)
    return torch.where(missing, NAN, x)


def patterns(x):
    """The rows of each pattern of what is known, with the indices of what is known and of what is not."""
    for pattern in (~x.isnan()).unique(dim=0):
        yield x[((~x.isnan()) == pattern).all(1)], pattern.nonzero().flatten(), (~pattern).nonzero().flatten()


def em(x, rounds=300):
    """The maximum of the likelihood of what is observed, by Dempster, Laird and Rubin; per datum."""
    D = x.shape[1]
    m, covariance = torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    for _ in range(rounds):
        filled, spread = [], torch.zeros(D, D, dtype=torch.float64)
        for rows, k, u in patterns(x):
            slope = covariance[u][:, k] @ covariance[k][:, k].inverse()
            full = rows.clone()
            full[:, u] = m[u] + (rows[:, k] - m[k]) @ slope.T
            filled.append(full)
            spread[u[:, None], u] += len(rows) * (covariance[u][:, u] - slope @ covariance[k][:, u])
        full = torch.cat(filled)
        m = full.mean(0)
        covariance = ((full - m).T @ (full - m) + spread) / len(x)
    return observed(x, m, covariance)


def observed(x, m, covariance):
    """log p of what is observed, per datum."""
    laws = ((dist.MultivariateNormal(m[k], covariance[k][:, k]), rows[:, k]) for rows, k, _ in patterns(x))
    return float(sum(law.log_prob(rows).sum() for law, rows in laws)) / len(x)


def trained(pair, x, steps, lr):
    torch.manual_seed(0)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99)),
        DiffusionELBO(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )
    for _ in range(steps):
        svi.step(x)


def moments(x):
    """Of what is observed, number by number."""
    mean = x.nanmean(0)
    return mean, (x - mean).square().nanmean(0)


def test_with_exact_kernels_training_meets_the_likelihood_of_em():
    x = incomplete()
    best, start = em(x), torch.eye(3, dtype=torch.float64)
    diffusion = joint_diffusion(6, torch.zeros(3, dtype=torch.float64), start)
    pair = MissingData(diffusion, estimate=OneStepEstimate(num_draws=2, reference=moments(x)))
    before = observed(x, diffusion.reverse.m.detach(), diffusion.reverse.covariance.detach())
    trained(pair, x, 300, 0.05)
    found = observed(x, diffusion.reverse.m.detach(), diffusion.reverse.covariance.detach())
    assert before < best - 0.3
    assert best - 1e-3 < found <= best + 1e-9
    costs = pair_bound(pair.model, pair.guide, x, num_particles=100, generator=0).nats
    assert abs(float(costs.mean()) + best) < 0.02


class LinearDenoiser(nn.Module):
    """A free affine map of x_t at each t."""

    def __init__(self, T):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(T + 1, 2, 2, dtype=torch.float64))
        self.c = nn.Parameter(torch.zeros(T + 1, 2, dtype=torch.float64))

    def forward(self, x_t, t):
        t = torch.as_tensor(t).expand(len(x_t))
        return (self.W[t] @ x_t[..., None])[..., 0] + self.c[t]


def composed(diffusion):
    """Mean and covariance of x_0 of a chain whose kernels are affine."""
    mean, covariance = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    points = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    with torch.no_grad():
        for t in range(diffusion.num_steps, 0, -1):
            law = diffusion.model.kernel(points, torch.full((3,), t)).base_dist
            F = (law.mean[1:] - law.mean[0]).T
            mean, covariance = F @ mean + law.mean[0], F @ covariance @ F.T + law.variance[0].diag()
    return mean, covariance


def test_with_a_free_linear_denoiser_training_comes_near():
    x, T = incomplete()[:, :2], 60
    x = x[~x.isnan().all(1)]
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T))
    denoiser = pyrodiff.VelocityPrediction(LinearDenoiser(T), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))
    pair = MissingData(diffusion, estimate=OneStepEstimate(num_draws=4, reference=moments(x)))
    trained(pair, x, 200, 0.15)
    assert -0.01 < observed(x, *composed(diffusion)) - em(x) <= 1e-9


def test_a_network_imputes_numbers_by_themselves():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x, known, y):
            return y[:, None, None] + self.linear(torch.cat([x, known], 1)).view(-1, 3, 2)

    imputer = NetworkImputer(Network())
    y = torch.ones(4, dtype=torch.float64)
    law = imputer(X.nan_to_num(), ~X.isnan(), y)
    assert law.batch_shape == (4,)
    expected = imputer.network(X.nan_to_num(), (~X.isnan()).double(), y)
    torch.testing.assert_close(law.base_dist.loc, expected[..., 0])
    torch.testing.assert_close(law.base_dist.scale.log(), expected[..., 1])


def test_data_are_completed_where_they_are_missing():
    pair = pair_of()
    done = pair.complete(X)
    assert bool(done.isfinite().all())
    assert torch.equal(done[~X.isnan()], X[~X.isnan()])
    torch.manual_seed(0)
    draws = torch.stack([pair.complete(X) for _ in range(4000)])
    assert not far(draws[:, 0, 2], M[2])
    assert not far((draws[:, 0, 2] - M[2]) ** 2, V[2])


def test_pictures_and_context():
    class ByLabel(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x_t, t, y):
            return self.rate * x_t + y[:, None, None]

    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(5))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, ByLabel()), (2, 2))
    x = torch.tensor([[[1.0, NAN], [0.5, 2.0]], [[NAN, NAN], [NAN, 1.0]]], dtype=torch.float64)
    for imputer in (None, NetworkImputer(OfPictures())):
        pair = MissingData(diffusion, imputer)
        svi = pyrodiff.SVI(pair.model, pair.guide, lambda p: torch.optim.SGD(p, lr=1e-6), DiffusionELBO())
        assert bool(svi.step(x, torch.ones(2, dtype=torch.float64)).isfinite())
        assert bool(svi.step(x, torch.ones(1, dtype=torch.float64)).isfinite())


class OfPictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))

    def forward(self, x, known, y):
        return torch.stack([x + y[:, None, None], self.log.expand_as(x)], -1)
