"""Variances of Gaussian kernels and kernels of bits, in whole chains and in chains of fewer steps, by arithmetic."""

import itertools
import math
from functools import partial

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from exact import far, repeat
from torch import nn

import pyrodiff
from pyrodiff import FixedLargeVariance, FixedVariance, ForwardVariance, PosteriorVariance

T = 7
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25, 0.5, 0.8]
SCHEDULES = {  # name: the schedule of T steps, and its (gain, variance) step by step
    "beta": (
        lambda T: pyrodiff.BetaSchedule((BETAS * 3)[:T]),
        lambda T: oracles.preserving_steps((BETAS * 3)[:T]),
    ),
    "linear": (
        lambda T: pyrodiff.LinearSchedule(T, 0.02, 0.4),
        lambda T: oracles.preserving_steps(oracles.linear_betas(T, 0.02, 0.4)),
    ),
    "cosine": (pyrodiff.CosineSchedule, lambda T: oracles.preserving_steps(oracles.cosine_betas(T))),
    "reciprocal": (pyrodiff.ReciprocalSchedule, lambda T: oracles.preserving_steps(oracles.reciprocal_betas(T))),
    "log SNR": (
        lambda T: pyrodiff.LogSNRSchedule(T, 5.0, -5.0),
        lambda T: oracles.preserving_steps(oracles.log_snr_betas(T, 5.0, -5.0)),
    ),
    "geometric": (
        lambda T: pyrodiff.GeometricSchedule(T, 0.3, 20.0),
        lambda T: oracles.exploding_steps(oracles.geometric_sigmas(T, 0.3, 20.0)),
    ),
}
TIMES = {
    "all": tuple(range(1, T + 1)),
    "some": (2, 3, 7),
    "early": (1, 4, 5),
    "the first two": (1, 2),
    "late": (5, 6, 7),
    "the last": (7,),
    "one": (4,),
    "the first": (1,),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_times = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)


def close(actual, expected, rtol=1e-9, atol=0.0):
    arrays = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (actual, expected))
    np.testing.assert_allclose(*arrays, rtol=rtol, atol=atol)


def process(name, T=T):
    return pyrodiff.GaussianForward(SCHEDULES[name][0](T))


def steps_of(name, T=T):
    return SCHEDULES[name][1](T)


def span(steps, s, t):
    """(gain, variance) of x_t given x_s."""
    return oracles.moments(steps, s)[t - s]


def forwards(steps, times):
    """The variance of x_t given the kept state before, for each of the times."""
    return [span(steps, s, t)[1] for s, t in itertools.pairwise((0, *times))]


def posteriors(steps, times):
    """The variance of each kept state given x_0 and the kept state after; at the first time that of the second."""
    found = []
    for s, t in itertools.pairwise(times):
        gain, variance = span(steps, s, t)
        found.append(oracles.condition(0.0, span(steps, 0, s)[1], gain, variance, 0.0)[1])
    return [*found[:1], *found] if found else forwards(steps, times)


def optimal(steps, times, v):
    """Var(x_s | x_t) of data with variance v, of each kept state (and the data) given the kept state after."""
    found = []
    for s, t in itertools.pairwise((0, *times)):
        gain_s, variance_s = span(steps, 0, s)
        gain, variance = span(steps, s, t)
        found.append(oracles.condition(0.0, gain_s**2 * v + variance_s, gain, variance, 0.0)[1])
    return found


def called(variance, q):
    """The variances of all steps, which have to be the same however the time is given."""
    t = torch.arange(1, q.num_steps + 1)
    found = variance(q, t)
    assert found.dtype == torch.float64
    assert found.shape == t.shape
    assert torch.equal(variance(q, t.reshape(-1, 1)), found[:, None])
    assert torch.equal(variance(q, t.flip(0).int()), found.flip(0))
    for k in range(1, q.num_steps + 1):
        assert variance(q, k).shape == ()
        assert float(variance(q, k)) == float(variance(q, torch.tensor(k))) == float(found[k - 1])
    assert bool(((found > 0) & found.isfinite()).all())
    return found


# fixed large


@every_schedule
@pytest.mark.parametrize("num_steps", [2, 3, 7, 20])
def test_fixed_large_is_beta_and_at_the_first_step_the_posteriors_at_the_second(name, num_steps):
    steps = steps_of(name, num_steps)
    betas = [variance for _, variance in steps]
    gain, noise = 1.0, 0.0
    tilde = [0.0]
    for k, (step_gain, step_variance) in enumerate(steps):  # Ho's Eq. 7, from the betas alone
        before = noise
        gain, noise = gain * step_gain, step_gain**2 * noise + step_variance
        if k > 0:
            tilde.append(before / noise * step_variance)
    assert gain >= 0
    theirs = np.append(tilde[1], betas[1:])  # OpenAI's: posterior_variance[1], betas[1:]
    close(called(FixedLargeVariance(), process(name, num_steps)), theirs, rtol=1e-8)
    assert FixedLargeVariance()(process(name, num_steps), 1) < ForwardVariance()(process(name, num_steps), 2)


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


@every_schedule
def test_of_one_step_fixed_large_is_beta(name):
    ((_, beta),) = steps_of(name, 1)
    close(called(FixedLargeVariance(), process(name, 1)), [beta])


@every_schedule
@every_times
def test_fixed_large_of_a_chain_of_fewer_steps_is_that_of_its_own_steps(name, times):
    steps = steps_of(name)
    large, tilde = forwards(steps, times), posteriors(steps, times)
    close(called(FixedLargeVariance(), process(name).subchain(times)), [tilde[0], *large[1:]])


@pytest.mark.parametrize("t", [0, 8, -1, 1.0, torch.tensor([0, 1]), torch.tensor([8]), torch.tensor([1.0]), "1"])
@pytest.mark.parametrize("variance", [FixedLargeVariance, lambda: FixedVariance([0.1] * 7)])
def test_times_that_cannot_be_are_refused(variance, t):
    for q in (process("beta"), process("beta", 10).subchain(range(2, 9))):
        with pytest.raises(ValueError, match="t must"):
            variance()(q, t)


def test_a_kernel_has_the_variance_of_its_time():
    q = process("linear")
    x_t = torch.ones(T, 2, dtype=torch.float64)
    denoiser = pyrodiff.DataPrediction(Timed(2), q)
    law = pyrodiff.GaussianReverse(q, denoiser, FixedLargeVariance())(x_t, torch.arange(1, T + 1))
    close(law.variance[:, 0], FixedLargeVariance()(q, torch.arange(1, T + 1)))


# given variances, in chains of fewer steps


@every_schedule
@every_times
def test_given_betas_become_those_of_the_longer_steps(name, times):
    """Of data N(0, 1) if VP, and of flat ones if VE: the variances of ForwardVariance, at every step."""
    steps = steps_of(name)
    given = FixedVariance([variance for _, variance in steps])
    sub = process(name).subchain(times)
    expected = forwards(steps, times)
    found = called(given, sub)
    close(found, expected)
    close(found, ForwardVariance()(sub, torch.arange(1, len(times) + 1)))


@every_schedule
@every_times
def test_given_posterior_variances_become_those_of_the_longer_steps(name, times):
    """But for the step from t = 1 to the data, which is in both chains, and keeps its variance."""
    steps = steps_of(name)
    whole = posteriors(steps, range(1, T + 1))
    sub = process(name).subchain(times)
    found, expected = called(FixedVariance(whole), sub), posteriors(steps, times)
    if times[0] == 1:
        assert float(found[0]) == whole[0]
    else:
        close(found[:1], expected[:1])
        close(found, PosteriorVariance()(sub, torch.arange(1, len(times) + 1)))
    close(found[1:], expected[1:])


@pytest.mark.parametrize("name", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("kind", [ForwardVariance, PosteriorVariance])
def test_long_chains_cut_to_few_steps_lose_no_digits(name, kind):
    num_steps, times = 1000, tuple(range(50, 1001, 50))
    make = {
        "linear": (pyrodiff.LinearSchedule, oracles.preserving_steps(oracles.linear_betas(num_steps))),
        "cosine": (pyrodiff.CosineSchedule, oracles.preserving_steps(oracles.cosine_betas(num_steps))),
        "geometric": (
            pyrodiff.GeometricSchedule,
            oracles.exploding_steps(oracles.geometric_sigmas(num_steps, 0.01, 50.0)),
        ),
    }
    schedule, steps = make[name]
    q = pyrodiff.GaussianForward(schedule(num_steps))
    expected = forwards(steps, times) if kind is ForwardVariance else posteriors(steps, times)
    given = forwards(steps, range(1, 1001)) if kind is ForwardVariance else posteriors(steps, range(1, 1001))
    close(called(kind(), q.subchain(times)), expected, rtol=1e-8)
    close(called(FixedVariance(given), q.subchain(times)), expected, rtol=1e-8)


@every_schedule
@every_times
@pytest.mark.parametrize("v", [1e-3, 0.3, 1.0, 4.0, 300.0])
def test_the_best_variances_of_gaussian_data_become_the_best_of_the_longer_steps(name, times, v):
    """Of data N(m, v), by conditioning one Gaussian on another: nothing is lost by cutting the chain."""
    steps = steps_of(name)
    given = FixedVariance(optimal(steps, range(1, T + 1), v))
    close(called(given, process(name).subchain(times)), optimal(steps, times, v), rtol=1e-8)


@pytest.mark.parametrize("v", [0.3, 4.0])
@every_schedule
def test_a_step_costs_least_with_the_variance_of_the_longer_step(name, v):
    """KLs of N(m, v) given x_t against kernels: with the very variances 0, and above it where they are others."""
    steps, times = steps_of(name), (2, 3, 7)
    sub = process(name).subchain(times)
    given = called(FixedVariance(optimal(steps, range(1, T + 1), v)), sub)
    for best, ours in zip(optimal(steps, times, v), given.tolist(), strict=True):
        assert oracles.normal_kl(0.0, best, 0.0, ours) < 1e-15
        assert oracles.normal_kl(0.0, best, 0.0, 1.1 * ours) > 1e-3


GIVEN = {
    "the betas": lambda steps: [variance for _, variance in steps],
    "of the posterior": lambda steps: posteriors(steps, range(1, len(steps) + 1)),
    "between": lambda steps: optimal(steps, range(1, len(steps) + 1), 0.3),
    "below": lambda steps: [0.3 * v for v in posteriors(steps, range(1, len(steps) + 1))],
    "far below": lambda steps: [1e-6 * v for v in posteriors(steps, range(1, len(steps) + 1))],
    "all the same": lambda steps: [0.05] * len(steps),
    "large": lambda steps: [100.0] * len(steps),
    "mixed": lambda steps: [0.001 if k % 2 else 3.0 for k in range(len(steps))],
}
every_given = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)


@every_schedule
@every_given
def test_the_chain_of_all_its_steps_keeps_them(name, given):
    """Also where they say nothing of the data, and also if it is cut once more."""
    numbers = given(steps_of(name))
    q = process(name)
    for chain in (q, q.subchain(range(1, T + 1)), q.subchain(range(1, T + 1)).subchain(range(1, T + 1))):
        assert called(FixedVariance(numbers), chain).tolist() == numbers


@every_schedule
@every_given
def test_variances_of_every_sub_chain_are_positive_and_a_step_that_stays_keeps_its_own(name, given):
    numbers = given(steps_of(name))
    for size in range(1, T + 1):
        for times in itertools.combinations(range(1, T + 1), size):
            found = FixedVariance(numbers)(process(name).subchain(times), torch.arange(1, size + 1))
            assert bool(((found > 0) & found.isfinite()).all()), times
            for k, (s, t) in enumerate(itertools.pairwise((0, *times))):
                if s == t - 1 > 0:
                    close(found[k], numbers[t - 1])


@every_schedule
@every_given
def test_a_step_that_stays_from_the_first_time_to_the_data_keeps_its_variance(name, given):
    numbers = given(steps_of(name))
    for times in ((1,), (1, 2), (1, 4, 5), (1, 7)):
        close(FixedVariance(numbers)(process(name).subchain(times), 1), numbers[0])


@every_schedule
@every_given
def test_variances_below_the_posteriors_keep_their_ratio_to_it(name, given):
    """By the docstring: at t = 1, and at a first kept time, to that of the second."""
    steps, times = steps_of(name), (2, 4, 7)
    numbers, whole, cut = given(steps), posteriors(steps, range(1, T + 1)), posteriors(steps, times)
    found = called(FixedVariance(numbers), process(name).subchain(times))
    for k, t in enumerate(times):
        if numbers[t - 1] < 0.999 * whole[t - 1]:
            close(found[k], numbers[t - 1] / whole[t - 1] * cut[k])
        elif numbers[t - 1] > 1.001 * whole[t - 1]:
            s = times[k - 1] if k else 0
            v = data_variance(steps, t, numbers[t - 1])
            close(found[k], longer(steps, s, t, v), rtol=1e-8)


def data_variance(steps, t, variance):
    """Var(x_0 | x_t) from the variance of x_{t-1} given x_t, by the law of total variance."""
    narrow, weight = of_posterior(steps, t - 1, t)
    return (variance - narrow) / weight**2


def longer(steps, s, t, v):
    """The variance of x_s given x_t, from Var(x_0 | x_t)."""
    narrow, weight = of_posterior(steps, s, t)
    return narrow + weight**2 * v


def of_posterior(steps, s, t):
    """The variance of x_s given x_t and x_0, and the weight of x_0 in its mean."""
    if s == 0:
        return 0.0, 1.0
    gain, variance = span(steps, s, t)
    gain_s, variance_s = span(steps, 0, s)
    weight, narrow = oracles.condition(gain_s, variance_s, gain, variance, 0.0)
    return narrow, weight


@every_schedule
@every_given
def test_a_sub_chain_of_a_sub_chain_has_the_variances_of_the_direct_one(name, given):
    numbers = given(steps_of(name))
    q, variance = process(name), FixedVariance(numbers)
    nested, direct = q.subchain((1, 3, 4, 6, 7)).subchain((2, 3, 5)), q.subchain((3, 4, 7))
    whole = posteriors(steps_of(name), range(1, T + 1))
    found = called(variance, nested)
    if all(ours >= 1.001 * theirs for ours, theirs in zip(numbers, whole, strict=True)):
        close(found, called(variance, direct), rtol=1e-8)


def test_another_number_of_variances_is_refused():
    q = process("beta")
    for number in (1, 2, 4, 6, 8):
        for chain in (q, q.subchain((2, 3, 7))):
            with pytest.raises(ValueError, match=f"variances must be T = 7 numbers, but there are {number}"):
                FixedVariance([0.1] * number)(chain, 1)


# bounds of sub-chains


class Timed(nn.Module):
    """A network that tells the times apart."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.2, 0.6, size, dtype=torch.float64))

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype)
        return self.weight * (x_t + t.reshape(t.shape + (1,) * (x_t.dim() - t.dim()))).sin()


X_0 = torch.tensor([[0.2, -2.0], [1.1, 0.4], [-4.0, 5.0]], dtype=torch.float64)


def gaussian(name, numbers):
    q = process(name)
    reverse = pyrodiff.GaussianReverse(q, pyrodiff.DataPrediction(Timed(2), q), FixedVariance(numbers))
    return pyrodiff.Diffusion(q, reverse, (2,))


@every_schedule
@every_times
def test_the_bound_of_a_sub_chain_has_the_variances_of_its_steps(name, times):
    """It is, draw by draw, that of a chain which is given the variances of the longer steps."""
    steps = steps_of(name)
    sub = gaussian(name, optimal(steps, range(1, T + 1), 0.7)).subchain(times)
    ours = pyrodiff.bound(sub, X_0, num_particles=3, generator=1)
    assert bool(ours.nats.isfinite().all())
    variance = FixedVariance(optimal(steps, times, 0.7))
    denoiser = sub.reverse.denoiser
    reverse = pyrodiff.GaussianReverse(sub.forward_process, denoiser, _Called(variance))
    theirs = pyrodiff.bound(pyrodiff.Diffusion(sub.forward_process, reverse, (2,)), X_0, num_particles=3, generator=1)
    torch.testing.assert_close(ours.denoising, theirs.denoising, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-7, atol=1e-8)
    draws = pyrodiff.AncestralSampler(sub)(5, generator=1)
    assert draws.shape == (5, 2)
    assert bool(draws.isfinite().all())


class _Called(pyrodiff.Variance):
    """Given numbers, whatever the chain."""

    def __init__(self, variance):
        super().__init__()
        self.register_buffer("numbers", variance.variances)

    def forward(self, process, t):
        return self.numbers[t - 1]


@every_given
def test_a_sub_chain_made_before_follows_what_is_written(given):
    steps, times = steps_of("linear"), (2, 3, 7)
    numbers = given(steps)
    whole = gaussian("linear", [0.5] * T)
    sub = whole.subchain(times)
    before = pyrodiff.bound(sub, X_0, generator=2).nats
    whole.reverse.variance.variances.copy_(torch.tensor(numbers, dtype=torch.float64))
    fresh = gaussian("linear", numbers).subchain(times)
    found = pyrodiff.bound(sub, X_0, generator=2).nats
    torch.testing.assert_close(found, pyrodiff.bound(fresh, X_0, generator=2).nats, rtol=1e-12, atol=1e-12)
    assert (found - before).abs().min() > 0
    whole.load_state_dict(gaussian("linear", [0.5] * T).state_dict())
    torch.testing.assert_close(pyrodiff.bound(sub, X_0, generator=2).nats, before, rtol=1e-12, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("v", [0.4, 2.5])
def test_a_cut_chain_with_the_best_variances_and_means_is_exact(name, v):
    """Of N(m, v), with E[x_0 | x_t] as the denoiser and q(x_T) as the prior: the bound is -log p(x_0) in the mean."""
    steps, m, times = steps_of(name), 0.7, (2, 3, 7)

    class Best(nn.Module):
        def forward(self, x_t, t):
            found = [
                oracles.condition(m, v, *span(steps, 0, int(one)), x) for one, x in zip(t.tolist(), x_t, strict=True)
            ]
            return torch.stack([mean for mean, _ in found])

    q = process(name)
    given = FixedVariance(optimal(steps, range(1, T + 1), v))
    reverse = pyrodiff.GaussianReverse(q, pyrodiff.DataPrediction(Best(), q), given)
    gain, variance = span(steps, 0, T)
    mean, scale = torch.tensor([gain * m, math.sqrt(gain**2 * v + variance)], dtype=torch.float64)
    prior = dist.Normal(mean.expand(2), scale.expand(2)).to_event(1)
    sub = pyrodiff.Diffusion(q, reverse, (2,), prior=prior).subchain(times)
    expected = -torch.from_numpy(oracles.log_normal(X_0.numpy(), m, v).sum(-1))
    if name == "reciprocal":  # no signal is left, so that nothing is known of the data at t = T
        assert gain == 0
    log_weights = pyrodiff.importance_bound(sub, X_0, num_particles=20, generator=3).log_weights
    torch.testing.assert_close(-log_weights, expected.expand(20, 3), rtol=0, atol=1e-7)  # every weight is p(x_0)


# D3PM

RATES = [0.2, 0.5, 0.83]
CHAIN = [0.3, 0.15, 0.6, 0.4]
BELIEFS = [0.001, 0.2, 0.5, 0.77, 0.999]


class Says(nn.Module):
    """Log odds that it is told."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x_t, t):
        return self.logits.expand(x_t.shape)


def bit_processes():
    for betas in (CHAIN, oracles.reciprocal_betas(4), oracles.linear_betas(5, 0.02, 0.5), [0.4]):
        for rate in RATES:
            yield betas, rate, pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate)


def joint(betas, rate, x_t, belief, t, s):
    """[sum over x_0 of q(x_s, x_t | x_0) p-hat(x_0)] for x_s = 0, 1: Austin et al., Eq. 4, before it is normalised."""
    first, second = oracles.bit_matrix(betas, rate, 0, s), oracles.bit_matrix(betas, rate, s, t)
    believed = [1 - belief, belief]
    return [sum(first[x_0][x_s] * second[x_s][x_t] * believed[x_0] for x_0 in (0, 1)) for x_s in (0, 1)]


def of_d3pm(betas, rate, x_t, belief, t, s):
    """The probability of x_s = 1; of the data, s = 0, what is believed."""
    if s == 0:
        return belief
    weights = joint(betas, rate, x_t, belief, t, s)
    return weights[1] / sum(weights)


def of_mixture(betas, rate, x_t, belief, t, s):
    """Sum over x_0 of q(x_s = 1 | x_t, x_0) p-hat(x_0)."""
    if s == 0:
        return belief
    one, zero = (oracles.bit_posterior(betas, rate, x_t, x_0, t, s)[1] for x_0 in (1, 0))
    return belief * one + (1 - belief) * zero


KERNELS = {"D3PM": (pyrodiff.D3PMReverse, of_d3pm), "binomial": (pyrodiff.BinomialReverse, of_mixture)}
every_kernel = pytest.mark.parametrize(("kind", "expected"), KERNELS.values(), ids=KERNELS)


def kernel_of(kind, q, beliefs):
    """The probabilities that a kernel has of a 1, at states 0 and 1 for each belief, with shape (2, len(beliefs))."""
    logits = torch.logit(torch.tensor(beliefs, dtype=torch.float64))
    reverse = kind(q, pyrodiff.LogitPrediction(Says(logits), q))
    x_t = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(2, len(beliefs))
    return lambda t: reverse(x_t, t)


@every_kernel
def test_kernels_of_bits_are_their_sums_over_x_0(kind, expected):
    for betas, rate, q in bit_processes():
        law = kernel_of(kind, q, BELIEFS)
        for t in range(1, len(betas) + 1):
            truth = [[expected(betas, rate, x, belief, t, t - 1) for belief in BELIEFS] for x in (0, 1)]
            found = law(t)
            assert (found.batch_shape, found.event_shape) == ((2,), (len(BELIEFS),))
            close(found.mean, truth, rtol=1e-11)
            close(law(torch.full((2,), t)).mean, truth, rtol=1e-11)
            if t == 1:
                close(found.mean, [BELIEFS] * 2, rtol=1e-12)


@every_kernel
def test_kernels_of_bits_at_a_time_for_each_datum(kind, expected):
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(CHAIN), torch.tensor(RATES, dtype=torch.float64))
    logits = torch.logit(torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64))
    reverse = kind(q, pyrodiff.LogitPrediction(Says(logits), q))
    t = torch.tensor([[3, 1, 4], [2, 2, 1]])
    x_t = torch.tensor([[[0, 1, 1], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1], [1, 1, 1]]]).double()
    found = reverse(x_t, t)
    assert (found.batch_shape, found.event_shape) == ((2, 3), (3,))
    for p, i, d in np.ndindex(2, 3, 3):
        time = int(t[p, i])
        truth = expected(CHAIN, RATES[d], int(x_t[p, i, d]), [0.3, 0.9, 0.6][d], time, time - 1)
        close(found.mean[p, i, d], truth, rtol=1e-11)


def test_the_two_kernels_are_the_same_where_the_belief_is_sure_and_others_where_it_is_not():
    """A sure belief leaves the forward posterior; elsewhere x_t counts once more in D3PM's."""
    for _, rate, q in bit_processes():
        if q.num_steps == 1:
            continue
        laws = {kind: kernel_of(kind, q, [1e-14, 1 - 1e-14, 0.35, 0.8]) for kind, _ in KERNELS.values()}
        for t in range(2, q.num_steps + 1):
            ours, theirs = (law(t).mean for law in laws.values())
            close(ours[:, :2], theirs[:, :2], rtol=1e-9, atol=1e-12)
            q_t = float(q.schedule.alpha_bar(t))
            if q_t > 1e-9:  # where the data are forgotten, x_t says nothing of them
                assert (ours[:, 2:] - theirs[:, 2:]).abs().min() > 1e-4 * q_t * min(rate, 1 - rate)
        close(laws[pyrodiff.D3PMReverse](1).mean, laws[pyrodiff.BinomialReverse](1).mean, rtol=1e-12)


@pytest.mark.parametrize("ones", [0.1, 0.5, 0.7])
def test_with_the_exact_belief_the_mixture_is_the_reverse_of_the_chain_and_d3pms_is_not(ones):
    """Of independent data with so many ones: q(x_s | x_t) by Bayes' rule, from the matrices alone."""
    for betas, rate, q in bit_processes():
        law = [1 - ones, ones]
        for t in range(1, len(betas) + 1):
            whole = oracles.bit_matrix(betas, rate, 0, t)
            first, second = oracles.bit_matrix(betas, rate, 0, t - 1), oracles.bit_matrix(betas, rate, t - 1, t)
            for x_t in (0, 1):
                belief = law[1] * whole[1][x_t] / sum(law[x] * whole[x][x_t] for x in (0, 1))
                before = [sum(law[x] * first[x][x_s] for x in (0, 1)) for x_s in (0, 1)]
                truth = before[1] * second[1][x_t] / sum(before[x_s] * second[x_s][x_t] for x_s in (0, 1))
                found = {kind: float(kernel_of(kind, q, [belief])(t).mean[x_t, 0]) for kind, _ in KERNELS.values()}
                assert found[pyrodiff.BinomialReverse] == pytest.approx(truth, rel=1e-11)
                if t == 1:
                    assert found[pyrodiff.D3PMReverse] == pytest.approx(truth, rel=1e-11)
                elif float(q.schedule.alpha_bar(t)) > 1e-9:
                    assert abs(found[pyrodiff.D3PMReverse] - truth) > 1e-4


@pytest.mark.parametrize("kind", [pyrodiff.BinomialReverse, pyrodiff.D3PMReverse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [1, 7, 2000])
def test_sure_beliefs_have_finite_log_probabilities_and_gradients(kind, dtype, num_steps):
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps), 0.2)
    for odds in (-150.0, -60.0, 0.5, 60.0, 150.0):
        logits = torch.full((1,), odds, dtype=dtype, requires_grad=True)
        reverse = kind(q, pyrodiff.LogitPrediction(Says(logits), q))
        for x, y in itertools.product((0.0, 1.0), repeat=2):
            x_t, value = (torch.full((1, 1), number, dtype=dtype) for number in (x, y))
            for t in sorted({1, min(2, num_steps), (num_steps + 1) // 2, num_steps}):
                for time in (t, torch.full((1,), t)):
                    log_prob = reverse(x_t, time).log_prob(value)
                    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
                    assert bool(log_prob.isfinite().all()), (odds, x, y, t)
                    assert bool(gradient.isfinite().all()), (odds, x, y, t)


class Table(nn.Module):
    """Log odds of each bit of the data, a number for every state and time."""

    def __init__(self, num_steps, bits):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        logits = 1.5 * torch.randn(num_steps + 1, 2**bits, bits, dtype=torch.float64, generator=generator)
        self.logits = nn.Parameter(logits)

    def forward(self, x_t, t):
        row = (x_t * 2 ** torch.arange(x_t.shape[-1], dtype=x_t.dtype)).sum(-1).long()
        return self.logits[t, row]


def bit_diffusion(kind, bits, rate):
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(CHAIN), rate)
    return pyrodiff.Diffusion(q, kind(q, pyrodiff.LogitPrediction(Table(len(CHAIN), bits), q)), (bits,))


def all_paths(diffusion, expected, rate, x_0, times):
    """Each path (x_tau_1, ..., x_tau_K): q of it given x_0, and log q - log p of it with x_0, summed by hand."""
    bits = len(x_0)
    table = diffusion.reverse.denoiser.network
    table = getattr(table, "module", table).logits.detach()
    states = list(itertools.product((0, 1), repeat=bits))
    spans = list(itertools.pairwise((0, *times)))
    matrices = [oracles.bit_matrix(CHAIN, rate, s, t) for s, t in spans]
    found = []
    for path in itertools.product(states, repeat=len(times)):
        whole = (x_0, *path)
        log_q = sum(
            math.log(matrix[a][b])
            for matrix, before, after in zip(matrices, whole[:-1], whole[1:], strict=True)
            for a, b in zip(before, after, strict=True)
        )
        log_p = sum(math.log(rate if bit else 1 - rate) for bit in path[-1])
        for (s, t), before, after in zip(spans, whole[:-1], whole[1:], strict=True):
            row = sum(bit << k for k, bit in enumerate(after))
            for d in range(bits):
                belief = 1 / (1 + math.exp(-float(table[t, row, d])))
                one = expected(CHAIN, rate, after[d], belief, t, s)
                log_p += math.log(one if before[d] else 1 - one)
        found.append((math.exp(log_q), log_q - log_p))
    assert sum(q for q, _ in found) == pytest.approx(1)
    return sum(q * cost for q, cost in found)


@every_kernel
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("times", [(1, 2, 3, 4), (2, 3), (4,), (1, 4)])
def test_bounds_of_bits_are_the_sums_over_all_paths(kind, expected, bits, times):
    """Of the whole chain and of shorter ones, whose steps are longer; also as the loss of either pair."""
    rate = 0.3
    whole = bit_diffusion(kind, bits, rate)
    diffusion = whole if len(times) == len(CHAIN) else whole.subchain(times)
    assert type(diffusion.reverse) is kind
    for x_0 in ((1, 0), (0, 1)):
        x_0 = x_0[:bits]
        truth = all_paths(diffusion, expected, rate, x_0, times)
        data = torch.tensor(x_0, dtype=torch.float64).expand(4000, bits)
        assert not far(pyrodiff.bound(diffusion, data, generator=5).nats, truth)
        assert not far(-pyrodiff.importance_bound(diffusion, data, num_particles=1, generator=6).log_weights[0], truth)
        torch.manual_seed(7)
        elbo = pyrodiff.DiffusionELBO()
        for pair in (diffusion, diffusion.one_step()):
            loss = partial(elbo.loss, pair.model, pair.guide, data[:100])
            assert not far(repeat(60, loss) / 100, truth)


@every_kernel
@every_times
def test_kernels_of_bits_of_a_sub_chain_are_those_of_the_longer_steps(kind, expected, times):
    betas, rate = oracles.linear_betas(T, 0.05, 0.5), 0.2
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate)
    logits = torch.logit(torch.tensor(BELIEFS, dtype=torch.float64))
    sub = kind(q, pyrodiff.LogitPrediction(Says(logits), q)).subchain(q.subchain(times))
    assert type(sub) is kind
    x_t = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(2, len(BELIEFS))
    for k, (s, t) in enumerate(itertools.pairwise((0, *times)), 1):
        truth = [[expected(betas, rate, x, belief, t, s) for belief in BELIEFS] for x in (0, 1)]
        close(sub(x_t, k).mean, truth, rtol=1e-11)
        close(sub(x_t, torch.full((2,), k)).mean, truth, rtol=1e-11)


@pytest.mark.parametrize("times", [range(1, 5), (1, 3, 4)])
def test_a_sub_chain_of_a_d3pm_chain_learns_its_parameters(times):
    whole = bit_diffusion(pyrodiff.D3PMReverse, 2, 0.3)
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
