"""The account of variances, against enumeration and against sums over t; and the drawings that follow the costs."""

import math

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from exact import Gaussian, GaussianPosterior, bit_diffusion, far, gaussian_diffusion
from torch import nn

import pyrodiff
from pyrodiff import ImportanceDrawing, LossSecondMoment, variance_account

BETAS = [0.1, 0.25, 0.5]
RATE = 0.3
STEPS = oracles.preserving_steps(BETAS)
SCHEDULE = pyrodiff.BetaSchedule(BETAS)
BITS = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]]).double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bit_costs(logits):
    """All that may happen to one bit: (x_0, t, x_t, its probability, the cost, the cost's slope in the log odds)."""
    found = []
    for x_0 in (0, 1):
        for t in range(1, len(BETAS) + 1):
            for x_t in (0, 1):
                probability = oracles.bit_matrix(BETAS, RATE, 0, t)[x_0][x_t]
                p = sigmoid(logits[t][x_t])
                one = float(x_0) if t == 1 else oracles.bit_posterior(BETAS, RATE, x_t, x_0, t, t - 1)[1]
                cost = -one * math.log(p) - (1 - one) * math.log(1 - p)
                if t > 1:
                    cost += one * math.log(one) + (1 - one) * math.log(1 - one)
                found.append((x_0, t, x_t, probability, cost, p - one))
    return found


def bit_model():
    diffusion = bit_diffusion(BETAS, RATE, 1)
    return diffusion, diffusion.reverse.logits.detach()[:, :, 0].tolist()


def bit_prior_cost(x_0):
    law = oracles.bit_matrix(BETAS, RATE, 0, len(BETAS))[x_0]
    return sum(p * math.log(p / r) for p, r in zip(law, (1 - RATE, RATE), strict=True))


def test_the_mean_and_spread_of_each_term_of_bits_are_those_of_the_enumeration():
    diffusion, logits = bit_model()
    uniform = {"it": pyrodiff.UniformDrawing()}
    accounts = [
        variance_account(diffusion, BITS, drawings=uniform, num_particles=100, num_pairs=2, batch_size=1)
        for _ in range(40)
    ]
    weight = {0: 2 / 5, 1: 3 / 5}
    for t in range(1, len(BETAS) + 1):
        costs = [(weight[x_0] * p, cost) for x_0, now, _, p, cost, _ in bit_costs(logits) if now == t]
        mean, square = (sum(p * cost**power for p, cost in costs) for power in (1, 2))
        assert not far(torch.stack([account.mean[t - 1] for account in accounts]), mean)
        assert not far(torch.stack([account.std[t - 1] ** 2 for account in accounts]), square - mean**2)
    account = accounts[0]
    assert account.mean.shape == account.std.shape == account.second_moment.shape == (len(BETAS),)
    torch.testing.assert_close(account.second_moment, account.mean**2 + account.std**2)


@pytest.mark.parametrize("uneven", [False, True])
def test_independent_draws_vary_as_the_enumeration_says_in_value_and_gradient(uneven):
    """The batch of one is L_T + L_{t-1} / p(t), with data, t and x_t random; the gradient is one log odds' slope."""

    class Uneven(pyrodiff.UniformDrawing):
        def forward(self, u, num_steps):
            t = 1 + (u > 0.6).long() + (u > 0.9).long()
            return t, torch.tensor([0.6, 0.3, 0.1]).to(u)[t - 1]

    drawing, p = (Uneven(), [0.6, 0.3, 0.1]) if uneven else (pyrodiff.UniformDrawing(), [1 / 3] * 3)
    diffusion, logits = bit_model()
    weight, values, slopes = {0: 2 / 5, 1: 3 / 5}, [], {}
    for x_0, t, x_t, probability, cost, slope in bit_costs(logits):
        chance = weight[x_0] * probability * p[t - 1]
        values.append((chance, bit_prior_cost(x_0) + cost / p[t - 1]))
        slopes.setdefault((t, x_t), []).append((chance, slope / p[t - 1]))
    value = sum(c * v**2 for c, v in values) - sum(c * v for c, v in values) ** 2
    gradient = sum(sum(c * g**2 for c, g in one) - sum(c * g for c, g in one) ** 2 for one in slopes.values())
    account = variance_account(diffusion, BITS, drawings={"it": drawing}, num_particles=2, num_pairs=150, batch_size=12)
    for (found, error), expected in ((account.value["it"], value), (account.gradient["it"], gradient)):
        assert abs(found - expected) <= 5 * error
        assert error < 0.25 * expected
    assert account.batch_size == 12
    assert account.drawings == {"it": drawing}


class Known(nn.Module):
    """For data that all are C: kernels off the posterior by k_t w standard deviations, which costs (k_t w)^2 / 2."""

    OFF = (0.5, 1.5, 1.0, 3.0)
    BETAS = (0.1, 0.2, 0.3, 0.4)
    C = 0.7
    WEIGHT = 1.3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(self.WEIGHT).double())
        self.forward_process = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(self.BETAS))

    def forward(self, x_t, t):
        t = torch.as_tensor(t).expand(x_t.shape)
        posterior = self.forward_process.posterior(x_t, torch.full_like(x_t, self.C), t.clamp(min=2))
        off = torch.tensor(self.OFF).double()[t - 1] * self.weight
        scale = torch.where(t == 1, 1.0, posterior.stddev)
        return dist.Normal(torch.where(t == 1, self.C, posterior.mean) + off * scale, scale)

    @classmethod
    def costs(cls):
        """L_{t-1} of each t, and its slope in the weight."""
        off = np.array(cls.OFF)
        costs = (off * cls.WEIGHT) ** 2 / 2
        costs[0] += math.log(2 * math.pi) / 2
        return costs, off**2 * cls.WEIGHT


def known():
    kernel = Known()
    return pyrodiff.Diffusion(kernel.forward_process, kernel, ()), torch.full((3,), Known.C).double()


def test_where_only_t_is_random_each_way_of_drawing_it_has_its_sum():
    diffusion, x_0 = known()
    costs, slopes = Known.costs()
    T = len(costs)
    account = variance_account(diffusion, x_0, num_particles=12, num_pairs=10, batch_size=2 * T)
    torch.testing.assert_close(account.mean, torch.from_numpy(costs))
    assert float(account.std.max()) < 1e-7
    assert list(account.drawings) == ["uniform", "low discrepancy", "loss second moment", "optimal"]
    uniform = variance_account(
        diffusion, x_0, drawings={"it": pyrodiff.UniformDrawing()}, num_particles=2, num_pairs=250, batch_size=2 * T
    )
    for found, least, terms in (
        (uniform.value["it"], account.value, costs),
        (uniform.gradient["it"], account.gradient, slopes),
    ):
        assert abs(found[0] - (T * (terms**2).sum() - terms.sum() ** 2)) <= 5 * found[1]
        assert least["low discrepancy"][0] < 1e-20 * found[0]  # a batch of a multiple of T has every t as often
    p = 0.9 * costs / costs.sum() + 0.1 / T
    for name in ("loss second moment", "optimal"):
        torch.testing.assert_close(account.drawings[name].probabilities, torch.from_numpy(p))
        assert account.value[name][0] <= (costs**2 / p).sum() - costs.sum() ** 2  # that of independent draws
        assert account.value[name][0] < 1e-2 * account.value["uniform"][0]


class Blind(nn.Module):
    """A kernel that does not look at x_t: with T = 1 nothing but the data is random in what it costs."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, x_t, t):
        return dist.Normal(self.loc.expand(x_t.shape), torch.ones_like(x_t))


def test_the_data_are_part_of_what_varies():
    """L_1 + L_0 = (a^2 x^2 + (x - w)^2) / 2 + const, and its slope in w is w - x; over data drawn with replacement."""
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.4])), Blind(), ())
    x = np.array([0.3, 2.0, -1.0, 4.0])
    account = variance_account(
        diffusion,
        torch.from_numpy(x),
        drawings={"it": pyrodiff.UniformDrawing()},
        num_particles=2,
        num_pairs=250,
        batch_size=5,
    )
    for found, values in ((account.value, (0.6 * x**2 + (x - 0.5) ** 2) / 2), (account.gradient, 0.5 - x)):
        variance, error = found["it"]
        assert abs(variance - values.var()) <= 5 * error
        assert error < 0.25 * variance


def test_the_variance_of_spread_draws_is_that_of_the_counts_they_leave():
    """Of B data u falls into each part of 1/B; so the number that see t is one of two, and all follows from one u."""
    diffusion, x_0 = known()
    costs, slopes = Known.costs()
    B, p = 6, np.array([0.13, 0.31, 0.22, 0.34])
    drawings = {"low discrepancy": pyrodiff.LowDiscrepancyDrawing(), "given": ImportanceDrawing(p.tolist())}
    account = variance_account(diffusion, x_0, drawings=drawings, num_particles=2, num_pairs=80, batch_size=B)
    u = (np.arange(20000) + 0.5)[:, None] / 20000 / B + np.arange(B) / B
    for name, chance in (("low discrepancy", np.full(4, 0.25)), ("given", p)):
        t = np.searchsorted(chance.cumsum(), u, side="right").clip(max=3)
        for found, terms in ((account.value, costs), (account.gradient, slopes)):
            variance, error = found[name]
            assert abs(variance - B * (terms / chance)[t].mean(1).var()) <= 5 * error


def test_the_optimal_drawing_is_in_proportion_to_root_second_moments_and_lowers_the_variance():
    m, v = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
    schedule = pyrodiff.LinearSchedule(20, 0.01, 0.3)
    x_0 = dist.Normal(m, v.sqrt()).sample((100,))
    diffusion = gaussian_diffusion(schedule, m, v, shift=0.3, widen=1.4)
    account = variance_account(diffusion, x_0, num_particles=400, num_pairs=30, batch_size=20)
    root = account.second_moment.sqrt()
    expected = 0.9 * root / root.sum() + 0.1 / 20
    torch.testing.assert_close(account.drawings["optimal"].probabilities, expected, atol=0, rtol=5e-3)
    learned = account.drawings["loss second moment"].probabilities
    assert float((learned / expected - 1).abs().max()) < 1.0
    assert float(learned.sum()) == pytest.approx(1)
    assert account.value["optimal"][0] < account.value["uniform"][0]
    assert account.value["low discrepancy"][0] < account.value["uniform"][0]
    # moments again, each a quadratic in two noises, by quadrature
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = weights / weights.sum()
    kernel = GaussianPosterior(Gaussian(m, v, schedule), 0.3, 1.4)
    for t in (2, 20):
        noise = torch.tensor([[a, b] for a in nodes for b in nodes])
        chance = torch.tensor([a * b for a in weights for b in weights])
        x_t = schedule.signal(t) * x_0[:, None] + schedule.noise(t) * noise
        steps = oracles.preserving_steps(schedule.beta(torch.arange(1, 21)).tolist())
        gain, variance = oracles.moments(steps)[t - 1]
        mean, variance = oracles.condition(gain * x_0[:, None].numpy(), variance, *steps[t - 1], x_t.numpy())
        law = kernel(x_t.reshape(-1, 2), t).base_dist
        kl = oracles.normal_kl(
            mean.reshape(-1, 2), variance, law.loc.detach().numpy(), law.scale.detach().numpy() ** 2
        ).sum(-1)
        kl = torch.from_numpy(kl).reshape(100, -1)
        first, second = ((kl**power @ chance).mean() for power in (1, 2))
        spread = (second - first**2).sqrt()
        assert abs(float(account.mean[t - 1] - first)) <= 5 * float(spread) / 20
        assert float(account.std[t - 1]) == pytest.approx(float(spread), rel=0.5)


def test_it_prints_its_table():
    diffusion, x_0 = known()
    drawings = {"uniform": pyrodiff.UniformDrawing(), "mine": ImportanceDrawing([0.4, 0.3, 0.2, 0.1])}
    account = variance_account(diffusion, x_0, drawings=drawings, num_particles=2, num_pairs=20, batch_size=3)
    lines = str(account).splitlines()
    assert lines[0].startswith("variance of one-step estimates, T = 4, batches of 3 (the terms vary most at t = ")
    assert lines[1].split() == ["drawing", "of", "t", *("value", "±", "s.e.", "relative"), *("gradient", "±", "s.e.", "relative")]  # fmt: skip # noqa: E501
    assert len(lines) == 4
    for line, name in zip(lines[2:], drawings, strict=True):
        numbers = [float(word) for word in line.removeprefix(name).split()]
        expected = []
        for found in (account.value, account.gradient):
            expected += [*found[name], found[name][0] / found["uniform"][0]]
        assert numbers == pytest.approx(expected, rel=0.06, abs=1e-3)
    assert [line.split()[3] for line in lines[2:3]] == ["1.000"]


def test_the_term_that_varies_most_is_named():
    account = pyrodiff.VarianceAccount(
        torch.tensor([1.0, 7.0, 2.0]), torch.tensor([0.1, 0.2, 3.0]), {}, {"it": (1.0, 0.1)}, {"it": (2.0, 0.2)}, 5
    )
    account = pyrodiff.VarianceAccount(
        account.mean, account.std, {"it": pyrodiff.UniformDrawing()}, account.value, account.gradient, 5
    )
    assert "(the terms vary most at t = 3: 2 ± 3 nats)" in str(account).splitlines()[0]
    torch.testing.assert_close(account.second_moment, torch.tensor([1.01, 49.04, 13.0]))


def test_nothing_of_the_model_is_changed():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
            self.weight = nn.Parameter(torch.tensor(0.5).double())

        def forward(self, x_t, t):
            assert not any(module.training for module in self.modules())
            return dist.Normal(self.frozen(self.inner(x_t)) * self.weight, torch.ones_like(x_t)).to_event(1)

    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Dropped(), (2,))
    weight = diffusion.reverse.weight
    weight.grad = torch.tensor(3.0).double()
    modes = {name: module.training for name, module in diffusion.named_modules()}
    x_0, state = torch.randn(4, 2).double() * 0.5 + 0.7, torch.get_rng_state()
    first, again, other = (
        variance_account(
            diffusion,
            x_0,
            drawings=None,
            num_particles=5,
            num_pairs=3,
            batch_size=4,
            generator=seed,
            memory_budget=budget,
        )
        for seed, budget in ((3, 2**28), (3, 2**28), (4, 2**12))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.mean, again.mean)
    assert (first.value, first.gradient) == (again.value, again.gradient)
    assert first.value != other.value
    assert float(weight.grad) == 3.0
    assert float(weight.detach()) == 0.5
    assert {name: module.training for name, module in diffusion.named_modules()} == modes
    assert not first.mean.requires_grad


def test_each_cost_stays_at_its_time_whatever_the_memory():
    diffusion, x_0 = known()
    row = pyrodiff.running.evaluation.bytes_per_row(diffusion, x_0[:1])
    for rows in (1, 7, 10**5):
        account = variance_account(
            diffusion, x_0, drawings=None, num_particles=11, num_pairs=2, batch_size=2, memory_budget=rows * row
        )
        torch.testing.assert_close(account.mean, torch.from_numpy(Known.costs()[0]))


def test_two_particles_are_enough_for_the_drawings():
    diffusion, x_0 = known()
    account = variance_account(diffusion, x_0, num_particles=2, num_pairs=2, batch_size=4)
    torch.testing.assert_close(account.mean, torch.from_numpy(Known.costs()[0]))
    assert account.value["optimal"][0] < 1.0


# the drawings themselves


def test_given_probabilities_are_those_of_the_draws_and_are_spread_over_the_batch():
    p = [0.05, 0.5, 0.25, 0.2]
    drawing = ImportanceDrawing(p)
    law = drawing.uniforms(torch.zeros(8).double())
    draws = torch.stack([drawing(law.sample(), 4)[0] for _ in range(2000)])
    t, found = drawing(law.sample(), 4)
    torch.testing.assert_close(found, torch.tensor(p).double()[t - 1])
    counts = torch.stack([(draws == now).double().mean(1) for now in (1, 2, 3, 4)], -1)
    assert not far(counts, torch.tensor(p).double())
    sizes = 8 * counts
    assert ((sizes - 8 * torch.tensor(p).double()).abs() < 1 + 1e-9).all()
    edges = torch.tensor([0.0, 0.05, 0.5499999, 0.55, 0.8, 1 - 1e-12], dtype=torch.float64)
    assert drawing(edges, 4)[0].tolist() == [1, 2, 2, 3, 4, 4]
    with pytest.raises(ValueError, match="drawing must be one of T = 5 times, but it is one of 4"):
        drawing(edges, 5)


def test_the_drawing_of_least_variance_is_in_proportion_to_the_root():
    p = ImportanceDrawing.of(torch.tensor([4.0, 0.0, 9.0]), uniform=0.1).probabilities
    torch.testing.assert_close(p, torch.tensor([0.9 * 0.4 + 0.1 / 3, 0.1 / 3, 0.9 * 0.6 + 0.1 / 3]).double())


def test_what_is_learned_is_the_last_costs_of_each_time():
    """Against lists: batches of any order, with more of one t than are kept, and what does not count left out."""
    T, history = 5, 3
    drawing, lists = LossSecondMoment(T, history, uniform=0.01), [[] for _ in range(T)]
    torch.testing.assert_close(drawing.probabilities, torch.full((T,), 1 / T).double())
    for _ in range(12):
        t = torch.randint(1, T + 1, (9,))
        cost, scored = torch.randn(9).exp(), torch.rand(9) < 0.7
        cost[torch.rand(9) < 0.1] = math.nan
        drawing.tell(t, cost, scored)
        for now, value, counts in zip(t.tolist(), cost.tolist(), scored.tolist(), strict=True):
            if counts and not math.isnan(value):
                lists[now - 1] = [*lists[now - 1], value][-history:]
        if all(len(one) == history for one in lists):
            root = torch.tensor([math.sqrt(sum(c**2 for c in one) / history) for one in lists]).double()
            expected = 0.99 * root / root.sum() + 0.01 / T
        else:
            expected = torch.full((T,), 1 / T).double()
        torch.testing.assert_close(drawing.probabilities, expected)
    assert all(len(one) == history for one in lists)
    u = drawing.uniforms(torch.zeros(6).double()).sample()
    t, p = drawing(u, T)
    torch.testing.assert_close(p, drawing.probabilities[t - 1])
    again = LossSecondMoment(T, history, uniform=0.01)
    again.load_state_dict(drawing.state_dict())
    assert torch.equal(again.probabilities, drawing.probabilities)


def test_training_tells_the_drawing_the_unweighted_costs():
    diffusion, x_0 = known()
    drawing = LossSecondMoment(4, history=1)
    pair = diffusion.one_step(drawing)
    for _ in range(6):
        pyrodiff.DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0.repeat(4))
    costs, _ = Known.costs()
    torch.testing.assert_close(drawing.costs[:, 0], torch.from_numpy(costs))
    p = 0.9 * costs / costs.sum() + 0.1 / 4
    torch.testing.assert_close(drawing.probabilities, torch.from_numpy(p))
    before = drawing.costs.clone()
    diffusion.reverse.weight.data.mul_(2)
    with torch.no_grad():
        pyrodiff.DiffusionELBO().loss(pair.model, pair.guide, x_0)
    assert torch.equal(drawing.costs, before)
