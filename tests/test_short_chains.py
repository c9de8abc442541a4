"""The best variances and the best times of short chains, against closed forms and the enumeration of all chains."""

import itertools
import math
import warnings
import weakref

import cases
import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from cases import close
from exact import Drift, far
from oracles import span
from torch import nn

import pyrodiff
from pyrodiff import AnalyticVariance, analytic_variance, best_subchain

T = 8
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25, 0.5, 0.3, 0.8]
SCHEDULES = {  # name: the schedule of T steps, and its (gain, variance) step by step
    "beta": (pyrodiff.BetaSchedule(BETAS), oracles.preserving_steps(BETAS)),
    "reciprocal": (pyrodiff.ReciprocalSchedule(T), oracles.preserving_steps(oracles.reciprocal_betas(T))),
    "geometric": (
        pyrodiff.GeometricSchedule(T, 0.3, 20.0),
        oracles.exploding_steps(oracles.geometric_sigmas(T, 0.3, 20.0)),
    ),
}
ALL, SOME = tuple(range(1, T + 1)), (2, 3, 7, 8)
M, V = 0.7, 0.4
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def given_x_t(steps, t, x_t=0.0):
    """Mean and variance of x_0 ~ N(M, V) given x_t."""
    return oracles.condition(M, V, *span(steps, 0, t), x_t)


def data(number, dims=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return M + math.sqrt(V) * torch.randn(number, dims, dtype=torch.float64, generator=generator)


class Exact(nn.Module):
    """E[x_0 | x_t] of data N(M, V), of a datum a time."""

    def __init__(self, steps):
        super().__init__()
        weights = [[0.0, 0.0]]
        for t in range(1, len(steps) + 1):
            at_0, at_1 = (given_x_t(steps, t, x)[0] for x in (0.0, 1.0))
            weights.append([at_0, at_1 - at_0])
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))

    def forward(self, x_t, t):
        constant, slope = self.weights[t].unbind(-1)
        return constant[:, None] + slope[:, None] * x_t


class Off(nn.Module):
    """What it is told of the data, and off by a number for each time: what a step costs does not depend on x_t."""

    def __init__(self, offsets):
        super().__init__()
        self.register_buffer("offsets", torch.tensor([math.nan, *offsets], dtype=torch.float64))
        self.calls = 0

    def forward(self, x_t, t, y):
        self.calls += 1
        return y + self.offsets[t][:, None]


class Own(nn.Module):
    """A reverse process of one's own, around another."""

    def __init__(self, reverse):
        super().__init__()
        self.inner = reverse

    def forward(self, x_t, t, *context):
        return self.inner(x_t, t, *context)

    def subchain(self, forward):
        return Own(self.inner.subchain(forward))


OFFSETS = [0.3, 0.5, 0.2, 1.1, 0.6, 1.6, 0.9, 1.4]


def off(schedule, variance=None, offsets=OFFSETS, prior=None, decoder=None, own=False):
    forward = pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, Off(offsets), variance)
    reverse = Own(reverse) if own else reverse
    return pyrodiff.Diffusion(forward, reverse, (2,), prior=prior, decoder=decoder)


def exact(name, variance=None):
    """The diffusion of N(M, V) with the mean and the prior that are right."""
    schedule, steps = SCHEDULES[name]
    forward = pyrodiff.GaussianForward(schedule)
    gain, variance_T = span(steps, 0, T)
    mean, scale = torch.tensor([gain * M, math.sqrt(gain**2 * V + variance_T)], dtype=torch.float64)
    prior = dist.Normal(mean.expand(2), scale.expand(2)).to_event(1)
    reverse = pyrodiff.GaussianReverse(forward, Exact(steps), variance)
    return pyrodiff.Diffusion(forward, reverse, (2,), prior=prior)


def right(name):
    """The variance that is right for N(M, V)."""
    return AnalyticVariance([given_x_t(SCHEDULES[name][1], t)[1] for t in range(1, T + 1)])


# the variance: what every variance is, is in test_variances.py


@every_schedule
@pytest.mark.parametrize("times", [ALL, SOME])
def test_with_the_right_mean_and_variance_every_weight_is_the_likelihood(name, times):
    x_0 = data(4)
    expected = torch.from_numpy(oracles.log_normal(x_0.numpy(), M, V).sum(-1))
    chain = exact(name, right(name)).subchain(times)
    weights = pyrodiff.importance_bound(chain, x_0, num_particles=20, generator=1).log_weights
    torch.testing.assert_close(weights, expected.expand(20, 4), rtol=0, atol=1e-9)
    many = x_0[:1].expand(4000, 2)
    assert not far(pyrodiff.bound(chain, many, generator=2).nats, -expected[0])


@every_schedule
def test_the_measured_errors_are_the_right_ones(name):
    """(x_0 - E[x_0 | x_t])^2 / Var(x_0 | x_t) is chi squared, of variance 2, a number by itself."""
    x_0, expected = data(5000), right(name).errors
    diffusion = exact(name, pyrodiff.PosteriorVariance())
    found = analytic_variance(diffusion, x_0, generator=3)
    error = expected * math.sqrt(2 / x_0.numel())
    assert ((found.errors - expected).abs() < 5 * error).all()
    assert (found.errors != expected).all()
    assert float(found.least) == 0
    more = analytic_variance(diffusion, x_0[:50], num_particles=100, generator=3)  # data that are off make it less sure
    assert ((more.errors - expected).abs() < 5 * expected * math.sqrt(2 / 100)).all()
    chain = exact(name, found).subchain(SOME)
    truth = -torch.from_numpy(oracles.log_normal(x_0.numpy(), M, V).sum(-1))
    assert not far(pyrodiff.bound(chain, x_0, generator=4).nats - truth, 0.0)


@every_schedule
def test_of_any_mean_it_is_the_error_and_the_least_bound(name):
    """The error of this denoiser is known, and so is what each step costs at best: D / 2 log(v / beta-tilde)."""
    schedule, steps = SCHEDULES[name]
    x_0 = data(3)
    variance = analytic_variance(off(schedule), x_0, x_0)
    close(variance.errors, np.square(OFFSETS))
    best = pyrodiff.bound(off(schedule, variance).subchain(SOME), x_0, x_0)
    for k, (s, t) in enumerate(itertools.pairwise(SOME)):
        weight, beta = posterior_of(steps, s, t)
        v = beta + weight**2 * OFFSETS[t - 1] ** 2
        close(best.denoising[k], [math.log(v / beta)] * 3, rtol=1e-8)
    close(best.reconstruction, [math.log(2 * math.pi * OFFSETS[1] ** 2) + 1] * 3)
    for factor in (0.97, 1.03):
        for t in SOME:
            errors = variance.errors.clone()
            errors[t - 1] *= factor
            other = pyrodiff.bound(off(schedule, AnalyticVariance(errors)).subchain(SOME), x_0, x_0)
            assert other.nats.mean() > best.nats.mean()


def test_its_own_variance_plays_no_part_and_a_short_chain_has_errors_of_its_own():
    x_0, (schedule, _) = data(30), SCHEDULES["beta"]
    found = [
        analytic_variance(off(schedule, variance), x_0, x_0).errors
        for variance in (None, pyrodiff.PosteriorVariance(), pyrodiff.FixedVariance([7.0] * T))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    short = analytic_variance(off(schedule).subchain([2, 5, 8]), x_0, x_0)
    close(short.errors, np.square([OFFSETS[i] for i in (1, 4, 7)]))
    again = pyrodiff.GaussianForward(schedule).subchain([2, 5, 8]).subchain([1, 3])
    whole = AnalyticVariance(np.square(OFFSETS).tolist())
    close(short(again, torch.tensor([1, 2])), whole(again, torch.tensor([1, 2])))


def test_a_discretised_decoder_has_a_least_variance_of_the_step_to_the_data():
    """An estimate that is right costs 6e-5 nats a number, one that is off by a level 10.4."""
    levels, schedule = 17, SCHEDULES["beta"][0]
    x_0 = pyrodiff.from_levels(torch.randint(2, 15, (50, 2)), levels).double()
    decoder = pyrodiff.DiscretizedDecoder(levels)
    variance = analytic_variance(off(schedule, decoder=decoder, offsets=[0.0] * 4 + OFFSETS[4:]), x_0, x_0)
    assert torch.equal(variance.errors[:4], torch.zeros(4, dtype=torch.float64))
    assert float(variance.least) == (0.125 / 8) ** 2
    whole = pyrodiff.GaussianForward(schedule)
    close(variance(whole, 1), 1 / 4096)
    close(variance(whole.subchain([5, 8]), 1), OFFSETS[4] ** 2)
    close(variance(whole, 2), whole.schedule.posterior(2)[2] ** 2)
    sure = off(schedule, variance, offsets=[0.0] * T, decoder=decoder)
    close(pyrodiff.bound(sure, x_0, x_0).reconstruction, [-2 * math.log(math.erf(4 / math.sqrt(2)))] * 50, rtol=1e-6)
    wrong = pyrodiff.bound(sure, x_0, x_0 + 0.125).reconstruction
    close(wrong, [-2 * math.log(math.erfc(4 / math.sqrt(2)) / 2)] * 50, rtol=1e-4)


class Counts(nn.Module):
    """A decoder of counts, of which there is no greatest."""

    levels = math.inf

    def forward(self, kernel, x_1):
        return dist.Poisson(kernel.mean.exp()).to_event(1)


def test_counts_without_end_have_no_bins_to_take_a_least_variance_from():
    x_0 = torch.randint(5, (50, 2)).double()
    variance = analytic_variance(off(SCHEDULES["beta"][0], decoder=Counts()), x_0, x_0)
    close(variance.errors, np.square(OFFSETS))
    assert float(variance.least) == 0


def test_the_least_variance_is_that_of_the_step_to_the_data_alone():
    q, t = pyrodiff.GaussianForward(SCHEDULES["beta"][0]), torch.arange(1, T + 1)
    free, held = (AnalyticVariance([0.2] * T, least)(q, t) for least in (0.0, 50.0))
    close(held[0], 50.0)
    assert torch.equal(held[1:], free[1:])


# the times


def chains(num_steps, candidates=range(1, T + 1)):
    return list(itertools.combinations(candidates, num_steps))


def posterior_of(steps, s, t):
    """Weight of x_0 in the mean of q(x_s | x_t, x_0), and its variance."""
    return oracles.weight_of_data(steps, s, t), oracles.posterior_variances(steps, (s, t))[1]


def all_bounds(kind, steps, x_0):
    """The bound of every chain of the denoiser that is off, in closed form."""
    found = {}
    for times in itertools.chain.from_iterable(chains(num_steps) for num_steps in range(1, T + 1)):
        betas, tilde = (one(steps, times) for one in (oracles.forward_variances, oracles.posterior_variances))
        kept = [posterior_of(steps, s, t) for s, t in itertools.pairwise(times)]
        errors = [0.8 * OFFSETS[t - 1] ** 2 for t in times]
        best = [errors[0], *(beta + weight**2 * e for (weight, beta), e in zip(kept, errors[1:], strict=True))]
        large = [tilde[0], *betas[1:]]
        variances = {"forward": betas, "posterior": tilde, "large": large, "analytic": best}[kind]
        cost = math.log(2 * math.pi * variances[0]) + OFFSETS[times[0] - 1] ** 2 / variances[0]
        for (weight, beta), variance, t in zip(kept, variances[1:], times[1:], strict=True):
            cost += 2 * oracles.normal_kl(weight * OFFSETS[t - 1], beta, 0.0, variance)
        gain, noise = span(steps, 0, times[-1])
        found[times] = cost + oracles.normal_kl(gain * x_0, noise, 0.0, gain**2 + noise).sum(-1).mean()
    return found


KINDS = {
    "forward": pyrodiff.ForwardVariance,
    "posterior": pyrodiff.PosteriorVariance,
    "large": pyrodiff.FixedLargeVariance,
    "analytic": lambda: AnalyticVariance([0.8 * one**2 for one in OFFSETS]),
}


@pytest.mark.parametrize(
    ("kind", "name"), [("forward", "geometric"), ("posterior", "beta"), ("large", "beta"), ("analytic", "geometric")]
)
def test_it_is_the_best_of_all_chains(kind, name):
    """By enumeration: here the bound of a datum is a number, without a draw."""
    x_0, (schedule, steps) = data(2), SCHEDULES[name]
    diffusion, bounds = off(schedule, KINDS[kind]()), all_bounds(kind, steps, x_0.numpy())
    for num_steps in range(1, T + 1):
        found = best_subchain(diffusion, x_0, x_0, num_steps=num_steps)
        times = found.forward_process.schedule.times
        assert times == min(chains(num_steps), key=bounds.get)
        close(pyrodiff.bound(found, x_0, x_0).mean, bounds[times], rtol=1e-8, atol=1e-9)


def test_the_second_time_may_decide_what_the_first_costs():
    """With PosteriorVariance L_0 has the variance of the second step: were it not for that, another chain was best."""
    x_0, (schedule, _) = data(2), SCHEDULES["beta"]
    diffusion, forward = off(schedule, pyrodiff.PosteriorVariance()), off(schedule)
    first = {t: {} for t in range(1, T)}
    for t, u in chains(2):
        bound = pyrodiff.bound(diffusion.subchain([t, u]), x_0, x_0)
        first[t][u] = float(bound.reconstruction.mean())
    assert all(len(set(costs.values())) == len(costs) for costs in first.values())
    assert best_subchain(diffusion, x_0, x_0, num_steps=3).num_steps == 3
    found = [best_subchain(one, x_0, x_0, num_steps=3).forward_process.schedule.times for one in (diffusion, forward)]
    assert found[0] != found[1]


def test_it_ends_at_T_where_the_prior_was_given_and_else_where_that_is_best():
    x_0, (schedule, _) = data(2), SCHEDULES["beta"]
    loc = torch.full((2,), 3.0, dtype=torch.float64)
    given = off(schedule, prior=dist.Normal(loc, 0.5).to_event(1))
    bounds = {
        times: float(pyrodiff.bound(given.subchain(times), x_0, x_0).mean) for times in chains(3) if times[-1] == T
    }
    found = best_subchain(given, x_0, x_0, num_steps=3)
    assert found.forward_process.schedule.times == min(bounds, key=bounds.get)
    assert found.model.prior is given.model.prior
    ends = {best_subchain(off(schedule), x_0, x_0, num_steps=K).forward_process.schedule.times[-1] for K in (1, 2, 3)}
    assert ends != {T}


def test_only_candidates_are_chosen_from():
    x_0, diffusion = data(2), off(SCHEDULES["beta"][0])
    for candidates in ([2, 3, 5, 8], torch.tensor([1, 4, 6, 7])):
        few = [int(t) for t in candidates]
        bounds = {t: float(pyrodiff.bound(diffusion.subchain(t), x_0, x_0).mean) for t in chains(2, few)}
        found = best_subchain(diffusion, x_0, x_0, num_steps=2, candidates=candidates)
        assert found.forward_process.schedule.times == min(bounds, key=bounds.get)
    assert best_subchain(diffusion, x_0, x_0, num_steps=3, candidates=3).forward_process.schedule.times == (1, 4, 8)
    assert best_subchain(diffusion, x_0, x_0, num_steps=T, candidates=1000).num_steps == T


def bits(kind, rate):
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS), rate)
    return pyrodiff.Diffusion(forward, kind(forward, pyrodiff.LogitPrediction(cases.Table(T, 2), forward)), (2,))


@pytest.mark.parametrize(
    ("kind", "kernel"), [(pyrodiff.BinomialReverse, cases.mixture), (pyrodiff.D3PMReverse, cases.joint)]
)
def test_of_bits_it_is_the_best_of_all_chains_by_enumeration_of_all_states(kind, kernel):
    rate, x_0 = 0.3, (1, 0)
    diffusion = bits(kind, rate)
    network = diffusion.reverse.denoiser.network
    truth = cases.Enumerated(BETAS, rate, kernel, network.believes)
    steps = {(s, t): truth.cost(x_0, s, t) for s, t in itertools.combinations(range(T + 1), 2)}
    data = torch.tensor(x_0, dtype=torch.float64).expand(3000, 2)
    for num_steps in (1, 2, 4):
        bounds = {
            times: sum(steps[step] for step in itertools.pairwise((0, *times))) + truth.last(x_0, times[-1])
            for times in chains(num_steps)
        }
        network.calls = 0
        found = best_subchain(diffusion, data, num_steps=num_steps, generator=5)
        assert network.calls <= T * math.ceil(3000 / 1024) + 1
        times, best = found.forward_process.schedule.times, min(bounds.values())
        nats = pyrodiff.bound(found, data, generator=6).nats
        assert not far(nats, bounds[times])
        assert bounds[times] - best <= 10 * float(nats.std()) / math.sqrt(3000)
        worse = sum(bound > bounds[times] for bound in bounds.values())
        assert worse >= 0.9 * (len(bounds) - 1)


def test_a_network_is_asked_once_for_each_time_and_ones_own_reverse_process_for_each_step():
    x_0, (schedule, _) = data(2), SCHEDULES["beta"]
    known, own = off(schedule, pyrodiff.PosteriorVariance()), off(schedule, pyrodiff.PosteriorVariance(), own=True)
    times = [best_subchain(one, x_0, x_0, num_steps=4).forward_process.schedule.times for one in (known, own)]
    assert times[0] == times[1]
    assert known.reverse.denoiser.calls == T + 1  # and one to look at it
    assert own.reverse.inner.denoiser.calls == T * (T - 1) + 1
    assert type(known.reverse.denoiser) is Off


class Guided(pyrodiff.GaussianReverse):
    """Asks twice, and reads more of its denoiser than a call."""

    def forward(self, x_t, t, y):
        law = super().forward(x_t, t, y).base_dist
        other = super().forward(x_t, t, -y).base_dist
        assert len(getattr(self.denoiser, "module", self.denoiser).offsets) == T + 1
        return dist.Normal(1.2 * law.loc - 0.2 * other.loc, law.scale).to_event(1)


class GuidedBits(pyrodiff.BinomialReverse):
    """Asks twice."""

    def forward(self, x_t, t):
        other = super().forward(1 - x_t, t).base_dist
        return dist.Bernoulli(logits=2 * super().forward(x_t, t).base_dist.logits - other.logits).to_event(1)


def test_a_reverse_process_that_asks_twice_is_not_misread():
    x_0, forward = data(2), pyrodiff.GaussianForward(SCHEDULES["beta"][0])
    diffusion = pyrodiff.Diffusion(forward, Guided(forward, Off(OFFSETS)), (2,))
    bounds = {times: float(pyrodiff.bound(diffusion.subchain(times), x_0, x_0).mean) for times in chains(3)}
    found = best_subchain(diffusion, x_0, x_0, num_steps=3)
    assert found.forward_process.schedule.times == min(bounds, key=bounds.get)
    inner = bits(GuidedBits, 0.3)
    own = pyrodiff.Diffusion(inner.forward_process, Own(inner.reverse), (2,))
    x_0 = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).repeat(200, 1)
    times = [best_subchain(one, x_0, num_steps=3, generator=3).forward_process.schedule.times for one in (inner, own)]
    assert times[0] == times[1]


def test_what_a_network_said_is_kept_no_longer_than_for_its_time():
    alive, most = [], []

    class Kept(Off):
        def forward(self, x_t, t, y):
            said = super().forward(x_t, t, y)
            alive.append(weakref.ref(said))
            most.append(sum(one() is not None for one in alive))
            return said

    forward = pyrodiff.GaussianForward(SCHEDULES["beta"][0])
    x_0 = data(2)
    best_subchain(
        pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Kept(OFFSETS)), (2,)), x_0, x_0, num_steps=3
    )
    assert max(most) <= 2


# draws


@pytest.mark.parametrize("find", ["variance", "chain"])
def test_draws_depend_on_the_seed_and_the_place_alone(find):
    x_0 = data(1100)
    diffusion = exact("beta", pyrodiff.ForwardVariance())

    def found(x, seed=7, **options):
        if find == "variance":
            return analytic_variance(diffusion, x, generator=seed, **options).errors
        return torch.tensor(
            best_subchain(diffusion, x, num_steps=3, generator=seed, **options).forward_process.schedule.times
        )

    whole = found(x_0)
    for other in (
        found([part for part in x_0.split(650)]),
        found([(part,) for part in x_0.split(1024)]),
        found(x_0, memory_budget=2**15),
    ):
        torch.testing.assert_close(other, whole, rtol=1e-12, atol=0)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    found(x_0)
    assert torch.equal(torch.get_rng_state(), state)
    if find == "variance":
        assert not torch.equal(found(x_0, seed=8), whole)
        assert not torch.equal(found(x_0, num_particles=2), whole)


def test_random_weights_are_drawn_once_from_their_guide():
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS[:4]))

    class Random(Drift):
        def forward(self, x_t, t):
            self.seen.append(float(self.weight))
            return x_t * self.weight.to(x_t.dtype)

    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Random()), (2,))

    def guide(x_0):
        import pyro

        pyro.sample("reverse.denoiser.weight", dist.Normal(0.3, 0.1))

    seen = diffusion.reverse.denoiser.seen
    for call in (analytic_variance, lambda *args, **options: best_subchain(*args, num_steps=2, **options)):
        seen.clear()
        call(diffusion, data(50), guide=guide, generator=1)
        assert len(seen) == 5
        assert len(set(seen)) == 1


def test_modules_are_in_evaluation_mode_meanwhile():
    x_0 = data(40)
    forward = pyrodiff.GaussianForward(SCHEDULES["beta"][0])
    denoiser = pyrodiff.DataPrediction(nn.Dropout(0.5), forward)
    denoiser.network.forward = lambda x_t, t: nn.functional.dropout(x_t, 0.5, denoiser.network.training)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))
    assert diffusion.training
    first = analytic_variance(diffusion, x_0, generator=1).errors
    best_subchain(diffusion, x_0, num_steps=2, generator=1)
    assert diffusion.training
    assert denoiser.network.training
    assert torch.equal(analytic_variance(diffusion.eval(), x_0, generator=1).errors, first)


# what cannot be


def test_a_denoiser_that_knows_the_data_by_heart_has_no_variance():
    x_0, (schedule, _) = data(20), SCHEDULES["beta"]
    with pytest.raises(ValueError, match=r"errors must be positive.* t = 2 is 0"):
        analytic_variance(off(schedule, offsets=[0.1, 0.0, *OFFSETS[2:]]), x_0, x_0)


def test_a_mean_over_few_data_is_warned_of():
    diffusion = exact("beta")
    with pytest.warns(
        UserWarning, match=r"from t = \d is \d+ % uncertain, as the mean squared error over 4 data is"
    ) as caught:
        analytic_variance(diffusion, data(4), generator=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analytic_variance(diffusion, data(400), generator=1)
        x_0, diffusion = data(400), off(SCHEDULES["beta"][0], offsets=[1e-9] * T)
        analytic_variance(diffusion, x_0, 10 * data(400, seed=1))  # far off, and surely so
        analytic_variance(diffusion, x_0, x_0 + 1e-3 * (torch.arange(400) == 7)[:, None])  # off at one, but not far


def test_a_chain_without_a_finite_bound_is_refused():
    x_0, (schedule, _) = data(2), SCHEDULES["beta"]
    with pytest.raises(ValueError, match="a chain of 2 steps with a finite bound"):
        best_subchain(off(schedule, offsets=[math.inf] * T), x_0, x_0, num_steps=2)
