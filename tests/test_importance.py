"""The importance-weighted bound, against all tuples of paths summed by hand, closed forms, and Pyro's own."""

import itertools
import math

import models
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from exact import Drift, bit_diffusion, far, gaussian_diffusion, repeat
from oracles import bit_matrix
from pyro.infer import RenyiELBO
from torch import nn

import pyrodiff
from pyrodiff import ImportanceBound, importance_bound
from pyrodiff.running.evaluation import bytes_per_row

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
X_0 = torch.tensor([[1.0, 2.0], [0.0, -1.5], [3.0, -4.0]], dtype=torch.float64)
SCHEDULE = pyrodiff.BetaSchedule([0.1, 0.2, 0.35, 0.5])
BETAS = {2: [0.3, 0.6], 3: [0.2, 0.3, 0.6]}
CASES = [(2, 1, 0.2), (2, 2, 0.5), (3, 1, 0.5), (3, 2, 0.2)]  # T, bits, rate
cases = pytest.mark.parametrize(("T", "bits", "rate"), CASES)


def states(bits):
    return list(itertools.product((0, 1), repeat=bits))


def kernels(table):
    """p(x_{t-1} | x_t) from the log odds: [t][x_t][x_{t-1}]."""
    bits = table.logits.shape[-1]
    odds = {t: table.logits.detach()[t].tolist() for t in range(len(table.logits))}
    row = {x: sum(bit << k for k, bit in enumerate(x)) for x in states(bits)}

    def one(t, x, y):
        return math.prod(1 / (1 + math.exp(-odd if bit else odd)) for odd, bit in zip(odds[t][row[x]], y, strict=True))

    return {t: {x: {y: one(t, x, y) for y in states(bits)} for x in states(bits)} for t in odds}


def enumerated(table, T, rate, x_0):
    """Of every path (x_1, ..., x_T): q(path | x_0), taken forwards, and its weight p(path, x_0) / q(path | x_0)."""
    p, probabilities, weights = kernels(table), [], []
    steps = [bit_matrix(BETAS[T], rate, t, t + 1) for t in range(T)]
    for path in itertools.product(states(len(x_0)), repeat=T):
        path = (x_0, *path)
        q = math.prod(steps[t][a][b] for t in range(T) for a, b in zip(path[t], path[t + 1], strict=True))
        top = math.prod(rate if bit else 1 - rate for bit in path[T])
        probabilities.append(q)
        weights.append(top * math.prod(p[t][path[t]][path[t - 1]] for t in range(1, T + 1)) / q)
    return torch.tensor(probabilities, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def likelihood(table, T, rate, x_0):
    """p(x_0), the prior pushed through the kernels one after another."""
    p = kernels(table)
    law = {x: math.prod(rate if bit else 1 - rate for bit in x) for x in states(len(x_0))}
    for t in range(T, 0, -1):
        law = {y: sum(law[x] * p[t][x][y] for x in law) for y in law}
    return law[x_0]


def expected_bound(probabilities, weights, K):
    """-E log of the mean of K weights: the sum over all K-tuples of paths."""
    q, total = torch.ones(()).double(), torch.zeros(()).double()
    for _ in range(K):
        q, total = q[..., None] * probabilities, total[..., None] + weights
    return -float((q * (total / K).log()).sum())


def tensor(x_0, copies):
    return torch.tensor(x_0, dtype=torch.float64).expand(copies, len(x_0))


@cases
def test_the_enumerated_bounds_fall_towards_the_likelihood(T, bits, rate):
    table = bit_diffusion(BETAS[T], rate, bits).reverse
    total = 0.0
    for x_0 in states(bits):
        q, w = enumerated(table, T, rate, x_0)
        p = likelihood(table, T, rate, x_0)
        total += p
        assert float(q.sum()) == pytest.approx(1)
        assert float(q @ w) == pytest.approx(p)  # the weight is unbiased
        bounds = [expected_bound(q, w, K) for K in (1, 2, 3)]
        assert bounds[0] > bounds[1] > bounds[2] > -math.log(p)
    assert total == pytest.approx(1)


@cases
def test_the_bound_of_K_particles_is_the_sum_over_all_tuples_of_paths(T, bits, rate):
    diffusion = bit_diffusion(BETAS[T], rate, bits)
    for x_0 in states(bits)[: 2 * bits - 1 : 2] if bits == 2 else states(bits):
        q, w = enumerated(diffusion.reverse, T, rate, x_0)
        for K in (1, 2, 3):
            result = importance_bound(diffusion, tensor(x_0, 20000), num_particles=K)
            assert result.log_weights.shape == (K, 20000)
            assert (result.num_particles, result.num_steps, result.levels) == (K, T, 2)
            for k in range(1, K + 1):
                assert not far(result.at(k), expected_bound(q, w, k)), (K, k)
            assert not far(result.nats, expected_bound(q, w, K))


@cases
def test_every_weight_is_one_of_a_path_as_often_as_the_path(T, bits, rate):
    diffusion = bit_diffusion(BETAS[T], rate, bits)
    x_0 = (1, 0)[:bits]
    q, w = enumerated(diffusion.reverse, T, rate, x_0)
    result = importance_bound(diffusion, tensor(x_0, 5000), num_particles=4).log_weights.flatten().exp()
    is_of = ((result[:, None] - w) / w).abs() < 1e-9
    assert (is_of.sum(1) == 1).all()
    errors = (q * (1 - q) / 20000).sqrt()  # known, unlike those of paths that are rarely seen
    assert ((is_of.double().mean(0) - q).abs() <= 5 * errors).all()


@cases
def test_the_weights_are_unbiased_for_the_likelihood_and_one_another_apart(T, bits, rate):
    """The mean of a weight is p; of the product of two, of one datum or of two, it is p^2: no draw is shared."""
    diffusion = bit_diffusion(BETAS[T], rate, bits)
    x_0 = (0, 1)[:bits]
    p = likelihood(diffusion.reverse, T, rate, x_0)
    result = importance_bound(diffusion, tensor(x_0, 20000), num_particles=3).log_weights.exp()
    assert not far(result.T, p)
    q, w = enumerated(diffusion.reverse, T, rate, x_0)
    second = float((q * w**2).sum())  # known, as large weights are rarely seen; neighbours' products share a weight
    error = ((second**2 - p**4 + 2 * (p**2 * second - p**4)) / 20000) ** 0.5
    for one, other in ((result[0], result[1]), (result[1], result[2]), (result[0, 1:], result[0, :-1])):
        assert abs(float((one * other).mean()) - p**2) < 5 * error
    assert abs(float((result[0, 1:] * result[2, :-1]).mean()) - p**2) < 5 * error


SCHEDULES = {
    "one step": pyrodiff.BetaSchedule([0.4]),
    "VP": SCHEDULE,
    "VP, 50 steps": pyrodiff.CosineSchedule(50),
    "VE": pyrodiff.GeometricSchedule(6, 0.05, 8.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_weight_of_exact_kernels_is_the_density(schedule):
    diffusion = gaussian_diffusion(schedule, M, V)
    result = importance_bound(diffusion, X_0, num_particles=5)
    m, v, x_0 = M.numpy(), V.numpy(), X_0.numpy()
    exact = torch.from_numpy(-0.5 * (np.log(2 * np.pi * v) + (x_0 - m) ** 2 / v).sum(-1))
    torch.testing.assert_close(result.log_weights, exact.expand(5, 3), rtol=0, atol=1e-10)
    for k in range(1, 6):
        torch.testing.assert_close(result.at(k), -exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.effective_sample_size, torch.full((3,), 5.0).double())
    assert (result.levels, result.num_steps, result.event_shape) == (None, schedule.num_steps, (2,))


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 10**6])
@pytest.mark.parametrize("K", [1, 4])
def test_the_memory_budget_does_not_mix_the_data(rows, K):
    """Each datum's weights are its own density, which all differ."""
    diffusion = gaussian_diffusion(SCHEDULE, M, V)
    x_0 = torch.arange(7).double()[:, None] * torch.tensor([0.5, -0.3]).double()
    sizes = []
    hook = diffusion.reverse.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    result = importance_bound(diffusion, x_0, num_particles=K, memory_budget=rows * bytes_per_row(diffusion, x_0[:1]))
    hook.remove()
    exact = dist.Normal(M, V.sqrt()).log_prob(x_0).sum(-1)
    torch.testing.assert_close(result.log_weights, exact.expand(K, 7), rtol=0, atol=1e-10)
    assert max(sizes[2:]) == min(rows, 7 * K)  # the first two measure the memory
    assert sum(sizes[2:]) == 4 * 7 * K


def perturbed_likelihood(x_0, shift, widen):
    """log p(x_0) of the chain with kernels moved by so many scales and widened: linear and Gaussian, step by step."""
    m, v, beta = M.numpy(), V.numpy(), np.array([0.1, 0.2, 0.35, 0.5])
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    true = [(np.sqrt(a) * m, a * v + 1 - a) for a in alpha_bar]
    mean, variance = true[-1]
    for t in range(4, 0, -1):
        slope = np.sqrt(1 - beta[t - 1]) * true[t - 1][1] / true[t][1]
        scale = widen * np.sqrt(true[t - 1][1] * beta[t - 1] / true[t][1])
        mean = true[t - 1][0] + slope * (mean - true[t][0]) + shift * scale
        variance = slope**2 * variance + scale**2
    x = x_0.numpy()
    return torch.from_numpy(-0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance).sum(-1))


@pytest.mark.parametrize(("shift", "widen"), [(0.3, 1.4), (-0.2, 1.1)])
def test_perturbed_kernels_are_bounded_between_the_evidence_bound_and_the_likelihood(shift, widen):
    """The gap of K = 1 is 2T KLs of N(0, 1) from N(d c, c^2), and what K particles leave of it shrinks with K."""
    kl = math.log(widen) + (1 / widen**2 + shift**2) / 2 - 0.5
    diffusion = gaussian_diffusion(SCHEDULE, M, V, shift, widen)
    x_0 = dist.Normal(M, V.sqrt()).sample((1000,))
    true, model = dist.Normal(M, V.sqrt()).log_prob(x_0).sum(-1), perturbed_likelihood(x_0, shift, widen)
    assert torch.allclose(perturbed_likelihood(x_0, 0.0, 1.0), true)
    result = importance_bound(diffusion, x_0, num_particles=64)
    assert not far(result.at(1) + true, 2 * 4 * kl)
    gaps = torch.stack([result.at(k) + model for k in (1, 2, 8, 64)])
    errors = gaps.std(1) / 1000**0.5
    means = gaps.mean(1)
    assert (means[:-1] - means[1:] > 5 * (gaps[:-1] - gaps[1:]).std(1) / 1000**0.5).all()
    assert means[-1] > -5 * errors[-1]
    assert float(means[-1]) < 0.15 * float(means[0])


def test_the_weights_of_perturbed_kernels_are_unbiased_for_their_likelihood():
    """Widened by c, with c^2 < 4/3: the weights' square then has a variance."""
    weights = importance_bound(gaussian_diffusion(SCHEDULE, M, V, 0.3, 1.1), X_0, num_particles=20000).log_weights.exp()
    assert not far(weights, perturbed_likelihood(X_0, 0.3, 1.1).exp())
    assert (5 * weights.std(0) / 20000**0.5 < 0.1 * weights.mean(0)).all()


@pytest.mark.parametrize(("kind", "K"), [("gaussian", 2), ("network", 1), ("network", 5)])
def test_the_bound_is_pyros_own_on_one_datum(kind, K):
    """RenyiELBO sums the data before its log of a mean: with one datum there is nothing to sum."""
    if kind == "gaussian":
        diffusion = gaussian_diffusion(SCHEDULE, M, V, 0.3, 1.4)
    else:
        forward = pyrodiff.GaussianForward(SCHEDULE)
        network = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1).double()
        for parameter in network.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, network), (2,))
    renyi = RenyiELBO(alpha=0, num_particles=K, max_plate_nesting=1, vectorize_particles=K > 1)
    theirs = repeat(150, lambda: renyi.loss(diffusion.model, diffusion.guide, X_0[:1]))
    ours = importance_bound(diffusion, X_0[:1].expand(20000, 2), num_particles=K).nats
    error = math.sqrt(float(theirs.var()) / 150 + float(ours.var()) / 20000)
    assert abs(float(theirs.mean() - ours.mean())) <= 5 * error
    assert 5 * error < 0.5 * float(ours.std()) + 1e-10


class Mixture(nn.Module):
    """A kernel without an analytic KL, whose weights have a variance: two Gaussians, as narrow as the posterior."""

    def forward(self, x_t, t):
        means = torch.stack([0.4 * x_t - 0.7, 0.2 * x_t + 0.9], -1)
        even = dist.Categorical(torch.tensor([0.3, 0.7]).double().expand(means.shape))
        return dist.MixtureSameFamily(even, dist.Normal(means, 0.65))


@pytest.mark.filterwarnings("ignore:Pareto k")
def test_the_density_of_any_kernel_integrates_to_one():
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.6, 0.6]))
    diffusion = pyrodiff.Diffusion(forward, Mixture(), ())
    x_0 = torch.linspace(-6, 6, 241).double()
    integrals = repeat(
        40, lambda: importance_bound(diffusion, x_0, num_particles=100).log_weights.exp().mean(0).sum() * 0.05
    )
    assert not far(integrals, 1.0)
    assert 5 * float(integrals.std()) / 40**0.5 < 0.03


def test_the_probabilities_of_all_levels_add_up_to_one():
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.6, 0.6]))
    network = pyrodiff.networks.MLP((1,), hidden=8, num_blocks=1).double()
    reverse = pyrodiff.GaussianReverse(forward, network, pyrodiff.PosteriorVariance())
    diffusion = pyrodiff.Diffusion(forward, reverse, (1,), decoder=pyrodiff.DiscretizedDecoder(5))
    x_0 = pyrodiff.from_levels(torch.arange(5)[:, None], 5, dtype=torch.float64)
    result = importance_bound(diffusion, x_0, num_particles=20000)
    total = result.log_weights.exp().sum(1)
    assert result.levels == 5
    assert not far(total, 1.0)
    assert 5 * float(total.std()) / 20000**0.5 < 0.05


def test_bounds_of_fewer_particles_are_means_over_groups():
    """Seven particles are three groups of two, and one is left over."""
    w = [[0.5, 2.0], [1.5, 1.0], [0.25, 8.0], [0.75, 0.125], [3.0, 1.0], [1.0, 1.0], [100.0, 1e-3]]
    result = ImportanceBound(torch.tensor(w, dtype=torch.float64).log(), torch.Size((2,)), None, 3)
    expected = {
        1: [-sum(math.log(row[i]) for row in w) / 7 for i in (0, 1)],
        2: [-(math.log(1.0) + math.log(0.5) + math.log(2.0)) / 3, -(math.log(1.5) + math.log(4.0625) + 0.0) / 3],
        3: [-(math.log(0.75) + math.log(4.75 / 3)) / 2, -(math.log(11 / 3) + math.log(2.125 / 3)) / 2],
        4: [-math.log(3.0 / 4), -math.log(11.125 / 4)],
        7: [-math.log(107 / 7), -math.log(13.126 / 7)],
    }
    for k, costs in expected.items():
        assert result.at(k).tolist() == pytest.approx(costs, rel=1e-12), k
    assert result.nats.tolist() == result.at(7).tolist()
    assert result.log_prob.tolist() == pytest.approx([math.log(107 / 7), math.log(13.126 / 7)])


def test_a_bound_of_more_particles_is_lower_whatever_the_weights():
    """By Jensen's inequality, where the groups of the fewer make up those of the more."""
    result = ImportanceBound(torch.randn(64, 20).double() * 5, torch.Size((2,)))
    for k in (1, 2, 4, 8, 16, 32):
        assert (result.at(k) > result.at(2 * k)).all()


def test_the_effective_sample_size_counts_the_weights_that_matter():
    w = [[1.0, 1.0, 3.0, 0.5], [1.0, 1e-30, 1.0, 0.25], [1.0, 1e-30, 0.0, 0.125], [1.0, 1e-30, 0.0, 0.0625]]
    weights = torch.tensor(w, dtype=torch.float64)
    expected = [sum(column) ** 2 / sum(number**2 for number in column) for column in weights.T.tolist()]
    assert expected[:3] == pytest.approx([4, 1, 1.6])
    for offset in (0.0, -1000.0, 1000.0):  # far beyond what exp can hold
        result = ImportanceBound(weights.log() + offset, torch.Size((2,)))
        assert result.effective_sample_size.tolist() == pytest.approx(expected)
        mean_log = [math.log(sum(column) / 4) + offset for column in weights.T.tolist()]
        assert result.nats.tolist() == pytest.approx([-number for number in mean_log], rel=1e-12)


def test_a_random_weight_is_drawn_once_for_all_particles_batches_and_steps():
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Drift(), (2,))
    x_0 = [torch.full((4, 2), 0.7), torch.full((1, 2), -2.0)]
    budget = bytes_per_row(diffusion, x_0[1])
    seen = []
    for _ in range(3):
        diffusion.reverse.seen.clear()
        importance_bound(
            diffusion, x_0, num_particles=2, memory_budget=budget, guide=models.prior_of_weights(diffusion)
        )
        assert len(diffusion.reverse.seen) >= 4 * 2 * 5
        assert len(set(diffusion.reverse.seen)) == 1
        seen += set(diffusion.reverse.seen)
    assert len(set(seen)) == 3
