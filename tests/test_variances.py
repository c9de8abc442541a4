"""Variances of Gaussian kernels, in whole chains and in chains of fewer steps, and the bounds that they make."""

import itertools
import math

import cases
import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from cases import PROCESSES, SCHEDULES, TIMES, VARIANCES, Returns, T, Timed, close, every_schedule, every_variance
from exact import far

import pyrodiff
from pyrodiff import FixedLargeVariance, FixedVariance, ForwardVariance, PosteriorVariance

ALL = TIMES["all"]
every_times = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)


def called(variance, q, *v):
    """The variances of all steps, which have to be the same however the time is given."""
    t = torch.arange(1, q.num_steps + 1)
    found = variance(q, t, *v)
    assert found.dtype == torch.float64
    assert found.shape == (v[0].shape if v else t.shape)
    if v:
        single = variance(q, t, v[0].float())
        assert single.dtype == torch.float32
        close(single, found, rtol=1e-5)
        assert torch.equal(variance(q, t[:, None].expand(-1, 3), v[0][:, None].expand(-1, 3, 2))[:, 1], found)
    else:
        assert torch.equal(variance(q, t.reshape(-1, 1)), found[:, None])
    assert torch.equal(variance(q, t.flip(0).int(), *(one.flip(0) for one in v)), found.flip(0))
    for k in range(1, q.num_steps + 1):
        for time in (k, torch.tensor(k)):
            one = variance(q, time, *(one[k - 1] for one in v))
            assert one.shape == found[k - 1].shape
            close(one, found[k - 1], rtol=1e-14 if v or found.requires_grad else 0)
    assert bool(((found > 0) & found.isfinite()).all())
    return found


# What every variance is


@every_variance
@pytest.mark.parametrize("name", ["BetaSchedule", "ReciprocalSchedule", "LogSNRSchedule", "GeometricSchedule"])
def test_a_variance_of_every_chain_is_that_of_its_steps(variance, name):
    """Of the whole one, of shorter ones, and of those that are cut twice."""
    steps, q = SCHEDULES[name].steps(T), PROCESSES[f"GaussianForward, {name}"].make()
    made = variance.make(steps)
    unsaid = [
        one for name, one in VARIANCES.items() if "posterior" in name or "0.001" in name
    ]  # next to nothing of x_0
    for times in TIMES.values():
        v, expected = variance.says(len(times)), variance.expected(steps, times, *variance.says(len(times)))
        close(called(made, q.subchain(times), *v), expected, rtol=1e-8)
        chains, middle = [q.subchain(ALL).subchain(times), *[q] * (len(times) == T)], sorted({*times, 1, 6})
        if variance not in unsaid:
            chains.append(q.subchain(middle).subchain([middle.index(t) + 1 for t in times]))
        for chain in chains:
            close(made(chain, torch.arange(1, len(times) + 1), *v), expected, rtol=1e-8)


@every_schedule
def test_every_schedule_has_every_variance(schedule):
    steps, times = schedule.steps(T), (1, 4, 5, 7)
    q, t = pyrodiff.GaussianForward(schedule.make(T)).subchain(times), torch.arange(1, 5)
    for variance in VARIANCES.values():
        v = variance.says(4)
        close(variance.make(steps)(q, t, *v), variance.expected(steps, times, *v), rtol=1e-8)


@every_variance
@pytest.mark.parametrize("name", ["LinearSchedule", "CosineSchedule", "GeometricSchedule"])
def test_long_chains_cut_to_few_steps_lose_no_digits(variance, name):
    """But where a variance differs from the posterior's in its last digits alone."""
    if variance is not VARIANCES["FixedVariance, the best of N(m, 0.001)"]:
        steps, times = SCHEDULES[name].steps(1000), tuple(range(50, 1001, 50))
        v, q = variance.says(20), pyrodiff.GaussianForward(SCHEDULES[name].make(1000))
        close(called(variance.make(steps), q.subchain(times), *v), variance.expected(steps, times, *v), rtol=1e-8)


@every_variance
def test_of_one_step_it_is_what_it_is(variance):
    for schedule in SCHEDULES.values():
        steps, v, q = schedule.steps(1), variance.says(1), pyrodiff.GaussianForward(schedule.make(1))
        close(called(variance.make(steps), q, *v), variance.expected(steps, (1,), *v), rtol=1e-8)


@every_variance
def test_a_kernel_has_the_variance_of_its_time(variance):
    """In a whole chain and a shorter one; the mean is the one that it has with any variance."""
    process = PROCESSES["GaussianForward, BetaSchedule"]
    q, steps, times, v = process.make(), process.schedule.steps(T), (2, 3, 7), variance.says(T)
    x_t = cases.normal(T, 2)
    said = {t: one for one in v for t, one in zip(ALL, one, strict=True)}

    def network(x_t, t):
        return torch.stack([x_t.sin(), torch.stack([said[int(one)] for one in t])], -1) if said else x_t.sin()

    reverse = pyrodiff.GaussianReverse(q, pyrodiff.DataPrediction(Returns(network), q), variance.make(steps))
    plain = pyrodiff.GaussianReverse(q, pyrodiff.DataPrediction(Returns(lambda x_t, t: x_t.sin()), q))
    for kept in (ALL, times):
        ours, theirs = (one if kept is ALL else one.subchain(q.subchain(kept)) for one in (reverse, plain))
        t, x = torch.arange(1, len(kept) + 1), x_t[: len(kept)]
        of_kept = [one[np.array(kept) - 1] for one in v]
        expected = variance.expected(steps, kept, *of_kept)
        close(ours(x, t).variance, expected if v else expected[:, None].repeat(2, 1), rtol=1e-8)
        close(ours(x, t).mean, theirs(x, t).mean, rtol=1e-14)
        assert ours(x.float(), t).mean.dtype == torch.float32 or v


@every_variance
def test_copies_states_and_casts_say_the_same(variance):
    steps, q = SCHEDULES["LinearSchedule"].steps(T), PROCESSES["GaussianForward, LinearSchedule"].make()
    other = variance.make(SCHEDULES["BetaSchedule"].steps(T))
    made, v, t = variance.make(steps), variance.says(T), torch.arange(1, T + 1)
    for one in cases.copies(made, other):
        assert torch.equal(one(q, t, *v), made(q, t, *v))
    cases.stays_float64(lambda: variance.make(steps), lambda one: one(q, t, *v))
    assert repr(made).startswith(f"{type(made).__name__}(")


@every_variance
def test_times_that_cannot_be_are_refused(variance):
    q, long = PROCESSES["GaussianForward, BetaSchedule"].make(), SCHEDULES["BetaSchedule"]
    made = variance.make(long.steps(T))
    for chain in (q, q.subchain(ALL)):
        for t in (0, torch.tensor([8]), torch.tensor([1.0]), "1", *cases.BAD_TIMES):
            cases.refused(lambda chain=chain, t=t: made(chain, t, *variance.says(1)), "t must")


# Given numbers


def test_fixed_large_is_openais_in_numbers():
    """Their arithmetic, line by line, of their linear schedule of a thousand steps."""
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    alphas_cumprod = np.cumprod(1.0 - betas, axis=0)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    theirs = np.append(posterior_variance[1], betas[1:])
    q = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1000))
    close(FixedLargeVariance()(q, torch.arange(1, 1001)), theirs, rtol=1e-10)
    assert float(FixedLargeVariance()(q, 1)) != float(ForwardVariance()(q, 1))


def test_variances_are_beta_and_beta_tilde():
    """Of the betas alone (Ho's Eq. 7): at t = 1, where beta-tilde would be 0, that of t = 2 stands in."""
    for name in cases.PRESERVING:
        beta = np.array([0.0] + [beta for _, beta in SCHEDULES[name].steps(T)])
        alpha_bar, q, t = (1 - beta).cumprod(), PROCESSES[f"GaussianForward, {name}"].make(), torch.arange(1, T + 1)
        tilde = beta[2:] * (1 - alpha_bar[1:-1]) / (1 - alpha_bar[2:])
        close(ForwardVariance()(q, t), beta[1:])
        close(PosteriorVariance()(q, t), [tilde[0], *tilde])
        close(FixedLargeVariance()(q, t), [tilde[0], *beta[2:]])


GIVEN = {
    "between": lambda steps: oracles.best_variances(steps, ALL, 0.3),
    "below": lambda steps: [0.3 * v for v in oracles.posterior_variances(steps, ALL)],
    "far below": lambda steps: [1e-6 * v for v in oracles.posterior_variances(steps, ALL)],
    "all the same": lambda steps: [0.05] * T,
    "large": lambda steps: [100.0] * T,
    "mixed": lambda steps: [0.001 if k % 2 else 3.0 for k in range(T)],
}
every_given = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
every_kind = pytest.mark.parametrize("name", ["BetaSchedule", "ReciprocalSchedule", "GeometricSchedule"])


@every_kind
@every_given
def test_variances_of_every_sub_chain_are_positive_and_a_step_that_stays_keeps_its_own(name, given):
    """Also where they say nothing of the data: all 127 chains; the step from t = 1 to the data is one that stays."""
    numbers, q = given(SCHEDULES[name].steps(T)), PROCESSES[f"GaussianForward, {name}"].make()
    variance = FixedVariance(numbers)
    for chain in (q, q.subchain(ALL), q.subchain(ALL).subchain(ALL)):
        assert called(variance, chain).tolist() == numbers
    for size in range(1, T + 1):
        for times in itertools.combinations(ALL, size):
            found = variance(q.subchain(times), torch.arange(1, size + 1))
            assert bool(((found > 0) & found.isfinite()).all()), times
            for k, (s, t) in enumerate(itertools.pairwise((0, *times))):
                if s == t - 1:
                    close(found[k], numbers[t - 1])


@every_kind
@every_given
def test_numbers_of_any_kind_follow_from_what_they_say_of_the_data(name, given):
    """By the law of total variance; those below the posterior's keep their ratio to it, the first to the second's."""
    steps, times = SCHEDULES[name].steps(T), (2, 4, 7)
    numbers, (whole, cut) = given(steps), (oracles.posterior_variances(steps, one) for one in (ALL, times))
    q = PROCESSES[f"GaussianForward, {name}"].make()
    found = called(FixedVariance(numbers), q.subchain(times))
    for k, (s, t) in enumerate(itertools.pairwise((0, *times))):
        if numbers[t - 1] < 0.999 * whole[t - 1]:
            close(found[k], numbers[t - 1] / whole[t - 1] * cut[k])
        elif numbers[t - 1] > 1.001 * whole[t - 1]:
            of_data = (numbers[t - 1] - whole[t - 1]) / oracles.weight_of_data(steps, t - 1, t) ** 2
            narrow = oracles.posterior_variances(steps, (s, t))[1] if s else 0.0
            close(found[k], narrow + oracles.weight_of_data(steps, s, t) ** 2 * of_data, rtol=1e-8)
    if all(ours >= 1.001 * theirs for ours, theirs in zip(numbers, whole, strict=True)):
        nested = q.subchain((1, 2, 4, 6, 7)).subchain((2, 3, 5))
        close(called(FixedVariance(numbers), nested), found, rtol=1e-8)


def test_a_step_costs_least_with_the_variance_of_the_longer_step():
    """KLs of N(m, v) given x_t against kernels: with the very variances 0, and above it where they are others."""
    times = (2, 3, 7)
    for schedule, v in itertools.product(SCHEDULES.values(), (0.3, 4.0)):
        steps, sub = schedule.steps(T), pyrodiff.GaussianForward(schedule.make(T)).subchain(times)
        given = called(FixedVariance(oracles.best_variances(steps, ALL, v)), sub)
        for best, ours in zip(oracles.best_variances(steps, times, v), given.tolist(), strict=True):
            assert oracles.normal_kl(0.0, best, 0.0, ours) < 1e-15
            assert oracles.normal_kl(0.0, best, 0.0, 1.1 * ours) > 1e-3


# Bounds of sub-chains

X_0 = torch.tensor([[0.2, -2.0], [1.1, 0.4], [-4.0, 5.0]], dtype=torch.float64)


def gaussian(name, variance):
    q = PROCESSES[f"GaussianForward, {name}"].make()
    return pyrodiff.Diffusion(q, pyrodiff.GaussianReverse(q, pyrodiff.DataPrediction(Timed(), q), variance), (2,))


class Told(pyrodiff.Variance):
    """Given numbers, whatever the chain."""

    def __init__(self, numbers):
        super().__init__()
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.float64))

    def forward(self, process, t):
        return self.numbers[t - 1]


@every_times
@pytest.mark.parametrize("name", ["BetaSchedule", "GeometricSchedule"])
def test_the_bound_of_a_sub_chain_has_the_variances_of_its_steps(name, times):
    """It is, draw by draw, that of a chain which is given the variances of the longer steps."""
    steps = SCHEDULES[name].steps(T)
    sub = gaussian(name, FixedVariance(oracles.best_variances(steps, ALL, 0.7))).subchain(times)
    told = Told(oracles.best_variances(steps, times, 0.7))
    reverse = pyrodiff.GaussianReverse(sub.forward_process, sub.reverse.denoiser, told)
    other = pyrodiff.Diffusion(sub.forward_process, reverse, (2,))
    ours, theirs = (pyrodiff.bound(one, X_0, num_particles=3, generator=1) for one in (sub, other))
    assert bool(ours.nats.isfinite().all())
    torch.testing.assert_close(ours.denoising, theirs.denoising, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-7, atol=1e-8)
    draws = pyrodiff.AncestralSampler(sub)(5, generator=1)
    assert draws.shape == (5, 2)
    assert bool(draws.isfinite().all())


def test_a_sub_chain_made_before_follows_what_is_written():
    for given in GIVEN.values():
        numbers = given(SCHEDULES["LinearSchedule"].steps(T))
        whole, fresh = (gaussian("LinearSchedule", FixedVariance(one)) for one in ([0.5] * T, numbers))
        sub, start = whole.subchain((2, 3, 7)), {name: one.clone() for name, one in whole.state_dict().items()}
        before = pyrodiff.bound(sub, X_0, generator=2).nats
        whole.reverse.variance.variances.copy_(torch.tensor(numbers, dtype=torch.float64))
        found, expected = (pyrodiff.bound(one, X_0, generator=2).nats for one in (sub, fresh.subchain((2, 3, 7))))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert (found - before).abs().min() > 0
        whole.load_state_dict(start)
        torch.testing.assert_close(pyrodiff.bound(sub, X_0, generator=2).nats, before, rtol=1e-12, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("v", [0.4, 2.5])
def test_a_cut_chain_with_the_best_variances_and_means_is_exact(schedule, v):
    """Of N(m, v), with E[x_0 | x_t] as the denoiser and q(x_T) as the prior: every weight is p(x_0)."""
    steps, m, q = schedule.steps(T), 0.7, pyrodiff.GaussianForward(schedule.make(T).requires_grad_(False))
    moments = torch.tensor(oracles.moments(steps), dtype=torch.float64)
    best = Returns(lambda x_t, t: oracles.condition(m, v, *moments[t].T[..., None], x_t)[0])
    given = FixedVariance(oracles.best_variances(steps, ALL, v))
    reverse = pyrodiff.GaussianReverse(q, pyrodiff.DataPrediction(best, q), given)
    gain, variance = oracles.span(steps, 0, T)
    mean, scale = torch.tensor([gain * m, math.sqrt(gain**2 * v + variance)], dtype=torch.float64)
    prior = dist.Normal(mean.expand(2), scale.expand(2)).to_event(1)
    sub = pyrodiff.Diffusion(q, reverse, (2,), prior=prior).subchain((2, 3, 7))
    expected = -torch.from_numpy(oracles.log_normal(X_0.numpy(), m, v).sum(-1))
    log_weights = pyrodiff.importance_bound(sub, X_0, num_particles=20, generator=3).log_weights
    torch.testing.assert_close(-log_weights, expected.expand(20, 3), rtol=0, atol=1e-7)


# Bounds of chains of bits

KINDS = {"D3PM": (pyrodiff.D3PMReverse, cases.joint), "binomial": (pyrodiff.BinomialReverse, cases.mixture)}
every_kernel = pytest.mark.parametrize(("kind", "kernel"), KINDS.values(), ids=KINDS)
CHAIN = [0.3, 0.15, 0.6, 0.4]
RATE = 0.3


def bit_diffusion(kind, bits):
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(CHAIN), RATE)
    return pyrodiff.Diffusion(q, kind(q, pyrodiff.LogitPrediction(cases.Table(len(CHAIN), bits), q)), (bits,))


def all_paths(network, kernel, x_0, times):
    """The bound: q of each path (x_tau_1, ..., x_tau_K) given x_0, times log q - log p of it with x_0, summed."""
    process = cases.Binomial(cases.of_betas(None, lambda T: CHAIN), (RATE,))
    bits, states = len(x_0), cases.all_states(len(x_0))
    paths = np.array(list(itertools.product(states, repeat=len(times)))).reshape(-1, len(times), bits)
    whole = np.concatenate([np.broadcast_to(x_0, (len(paths), 1, bits)), paths], 1)
    beliefs = 1 / (1 + np.exp(-network.logits.detach().numpy()))

    def log(ones, x):
        return np.log(np.where(x == 1, ones, 1 - ones)).sum(-1)

    log_q, log_p = 0.0, log(RATE, whole[:, -1])
    for k, (s, t) in enumerate(itertools.pairwise((0, *times))):
        before, after = whole[:, k], whole[:, k + 1]
        log_q = log_q + log(process.transition(before, s, t)[0], after)
        belief = beliefs[t, after @ 2 ** np.arange(bits)]
        log_p = log_p + log(kernel(process, after, belief, s, t)[0], before)
    assert np.exp(log_q).sum() == pytest.approx(1)
    return float(np.exp(log_q) @ (log_q - log_p))


@every_kernel
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("times", [(1, 2, 3, 4), (2, 3), (4,), (1, 4)])
def test_bounds_of_bits_are_the_sums_over_all_paths(kind, kernel, bits, times):
    """Of the whole chain and of shorter ones, whose steps are longer; also as the loss of either pair."""
    whole = bit_diffusion(kind, bits)
    diffusion = whole if len(times) == len(CHAIN) else whole.subchain(times)
    assert type(diffusion.reverse) is kind
    for x_0 in ((1, 0), (0, 1)):
        truth = all_paths(whole.reverse.denoiser.network, kernel, x_0[:bits], times)
        data = torch.tensor(x_0[:bits], dtype=torch.float64).expand(6000, bits)
        assert not far(pyrodiff.bound(diffusion, data, generator=5).nats, truth)
        assert not far(-pyrodiff.importance_bound(diffusion, data, num_particles=1, generator=6).log_weights[0], truth)
        for pair in (diffusion, diffusion.one_step(pyrodiff.UniformDrawing())):
            terms = pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, data)
            assert not far(sum(terms.values()).detach(), truth)


@pytest.mark.parametrize("times", [range(1, 5), (1, 3, 4)])
def test_a_sub_chain_of_a_d3pm_chain_learns_its_parameters(times):
    whole = bit_diffusion(pyrodiff.D3PMReverse, 2)
    sub = whole.subchain(times)
    assert {id(p) for p in sub.parameters()} == {id(p) for p in whole.parameters()}
    x_0 = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double().repeat(50, 1)
    pair = sub.one_step()
    svi = pyrodiff.SVI(pair.model, pair.guide, lambda p: torch.optim.Adam(p, lr=0.1), pyrodiff.DiffusionELBO())
    before = pyrodiff.bound(sub, x_0, num_particles=4, generator=8).mean
    torch.manual_seed(9)
    for _ in range(60):
        svi.step(x_0)
    assert pyrodiff.bound(sub, x_0, num_particles=4, generator=8).mean < before - 0.1
