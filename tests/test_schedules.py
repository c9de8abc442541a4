"""Schedules against their definitions, multiplied out one step after another."""

import inspect
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch

import pyrodiff
from pyrodiff.process import schedules


def some_betas(num_steps):
    return [0.05 + 0.4 * ((7 * i) % 11) / 11 if num_steps < 20 else 1e-3 + 1e-5 * i for i in range(num_steps)]


def some_times(num_steps):
    """So many of twice as many times: 1, 4, 5, 8, 9, ..."""
    return [2 * k - k % 2 for k in range(1, num_steps + 1)]


def whole_steps(steps, times):
    """(gain, variance) of the steps from each of the times to the next, composed."""
    return [oracles.moments(steps[s:t])[-1] for s, t in pairwise([0, *times])]


# name: (schedule of T steps, its (gain, variance) step by step, whether it preserves variance)
CASES = {
    "BetaSchedule": (
        lambda T: pyrodiff.BetaSchedule(some_betas(T)),
        lambda T: oracles.preserving_steps(some_betas(T)),
        True,
    ),
    "LinearSchedule": (
        lambda T: pyrodiff.LinearSchedule(T, 1e-3, 0.03),
        lambda T: oracles.preserving_steps(oracles.linear_betas(T, 1e-3, 0.03)),
        True,
    ),
    "CosineSchedule": (
        lambda T: pyrodiff.CosineSchedule(T, offset=0.01, beta_max=0.98),
        lambda T: oracles.preserving_steps(oracles.cosine_betas(T, 0.01, 0.98)),
        True,
    ),
    "ReciprocalSchedule": (
        lambda T: pyrodiff.ReciprocalSchedule(T),
        lambda T: oracles.preserving_steps(oracles.reciprocal_betas(T)),
        True,
    ),
    "LogSNRSchedule": (
        lambda T: pyrodiff.LogSNRSchedule(T, 6.5, -5.0),
        lambda T: oracles.preserving_steps(oracles.log_snr_betas(T, 6.5, -5.0)),
        True,
    ),
    "GeometricSchedule": (
        lambda T: pyrodiff.GeometricSchedule(T, 0.02, 30.0),
        lambda T: oracles.exploding_steps(oracles.geometric_sigmas(T, 0.02, 30.0)),
        False,
    ),
    "SubSchedule": (
        lambda T: pyrodiff.SubSchedule(pyrodiff.LinearSchedule(2 * T, 1e-3, 0.02), some_times(T)),
        lambda T: whole_steps(oracles.preserving_steps(oracles.linear_betas(2 * T, 1e-3, 0.02)), some_times(T)),
        True,
    ),
}
STEPS = (1, 2, 7, 1000)
every_schedule = pytest.mark.parametrize("name", sorted(CASES))
every_length = pytest.mark.parametrize("T", STEPS)


def tables(name, T):
    """beta, gain and variance of x_t given x_0 for t = 0..T, from the definition."""
    steps = CASES[name][1](T)
    gain, variance = np.array(oracles.moments(steps)).T
    return np.array([0.0] + [variance for _, variance in steps]), gain, variance


def close(actual, expected, rtol=1e-11, atol=1e-14):
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=atol)


def test_every_concrete_schedule_is_tested_here():
    concrete = {name for name in schedules.__all__ if not inspect.isabstract(getattr(schedules, name))}
    assert concrete == set(CASES)


@every_schedule
@every_length
def test_tables_are_those_of_the_definition(name, T):
    schedule = CASES[name][0](T)
    beta, gain, variance = tables(name, T)
    t = torch.arange(T + 1)
    assert schedule.num_steps == T
    close(schedule.beta(t), beta)
    close(schedule.signal(t), gain)
    close(schedule.alpha_bar(t), gain**2)
    close(schedule.noise(t) ** 2, variance)
    with np.errstate(divide="ignore"):
        close(schedule.log_snr(t), np.log(gain**2) - np.log(variance), atol=1e-10)


@every_schedule
@every_length
def test_the_chain_starts_at_the_data(name, T):
    schedule = CASES[name][0](T)
    start = [method(0).item() for method in (schedule.beta, schedule.signal, schedule.noise, schedule.log_snr)]
    assert start == [0, 1, 0, float("inf")]


@every_schedule
@every_length
def test_variance_is_preserved_or_the_signal_is_kept(name, T):
    schedule = CASES[name][0](T)
    t = torch.arange(T + 1)
    signal, noise = schedule.signal(t), schedule.noise(t)
    close(signal**2 + noise**2 if CASES[name][2] else signal, np.ones(T + 1))


@every_schedule
@every_length
def test_log_snr_falls_strictly(name, T):
    assert (CASES[name][0](T).log_snr(torch.arange(T + 1)).diff() < 0).all()


@every_schedule
def test_an_int_and_a_tensor_of_any_shape_give_the_same(name):
    schedule = CASES[name][0](7)
    for method in (schedule.beta, schedule.alpha_bar, schedule.signal, schedule.noise, schedule.log_snr):
        one_by_one = torch.stack([method(t) for t in range(8)])
        assert one_by_one.shape == (8,)
        for dtype in (torch.int32, torch.int64):
            t = torch.tensor([[0, 7, 3], [1, 1, 5]], dtype=dtype)
            assert torch.equal(method(t), one_by_one[t.long()])
            assert torch.equal(method(t[0]), one_by_one[t[0].long()])
            assert torch.equal(method(t[1, 2]), one_by_one[5])
            assert method(t[:0]).shape == (0, 3)
        assert torch.equal(method(np.int64(3)), one_by_one[3])


@every_schedule
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.float(),
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.float32),
        lambda module: torch.nn.Sequential(module).float()[0],
    ],
    ids=["float", "half", "bfloat16", "to", "inside another module"],
)
def test_values_stay_float64_whatever_the_module_is_cast_to(name, cast):
    t = torch.arange(8)
    kept, schedule = CASES[name][0](7), cast(CASES[name][0](7))
    for method in ("beta", "alpha_bar", "signal", "noise", "log_snr"):
        value = getattr(schedule, method)(t)
        assert value.dtype == torch.float64
        assert torch.equal(value, getattr(kept, method)(t))


@every_schedule
def test_steps_lead_from_each_time_to_each_later_one(name):
    schedule, steps = CASES[name][0](7), CASES[name][1](7)
    for s in range(7):
        gain, variance = np.array(oracles.moments(steps, s)[1:]).T
        t = torch.arange(s + 1, 8)
        signal, noise = schedule.step(t, torch.full_like(t, s))
        close(signal, gain)
        close(noise**2, variance)
        assert torch.equal(schedule.step(7, s)[1], noise[-1])


@every_schedule
@pytest.mark.parametrize("T", [7, 1000])
def test_steps_compose(name, T):
    schedule = CASES[name][0](T)
    r, s, t = torch.cartesian_prod(*[torch.unique(torch.linspace(0, T, 12).long())] * 3).T
    ordered = (r < s) & (s < t)
    r, s, t = r[ordered], s[ordered], t[ordered]
    (a_tr, b_tr), (a_ts, b_ts), (a_sr, b_sr) = schedule.step(t, r), schedule.step(t, s), schedule.step(s, r)
    close(a_tr, (a_ts * a_sr).numpy())
    close(b_tr**2, (a_ts**2 * b_sr**2 + b_ts**2).numpy())


@every_schedule
@every_length
def test_the_step_by_one_has_variance_beta(name, T):
    schedule = CASES[name][0](T)
    t = torch.arange(1, T + 1)
    close(schedule.step(t, t - 1)[1] ** 2, schedule.beta(t).numpy(), rtol=1e-9)


@pytest.mark.parametrize("t", [1, 2, 10, 100])
def test_the_first_noise_of_a_long_linear_schedule_is_exact_to_twelve_digits(t):
    expected = float(oracles.exact_linear_noise_squared(1000, t))
    assert (pyrodiff.LinearSchedule(1000).noise(t) ** 2).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("t", [1, 2, 10, 100])
def test_the_first_noise_of_a_long_cosine_schedule_is_exact_to_ten_digits(t):
    expected = float(oracles.exact_cosine_noise_squared(1000, t))
    assert (pyrodiff.CosineSchedule(1000).noise(t) ** 2).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("beta", [1e-4, 1e-9, 1e-15])
def test_a_tiny_beta_is_not_lost_in_one_minus_alpha_bar(beta):
    schedule = pyrodiff.BetaSchedule([beta] * 3)
    for t in (1, 2, 3):
        expected = t * beta - t * (t - 1) / 2 * beta**2 + t * (t - 1) * (t - 2) / 6 * beta**3  # 1 - (1 - beta)^t
        assert (schedule.noise(t) ** 2).item() == pytest.approx(expected, rel=1e-13)


def test_defaults_are_those_of_the_papers():
    linear, cosine = pyrodiff.LinearSchedule(), pyrodiff.CosineSchedule()
    assert (linear.num_steps, linear.beta(1).item(), linear.beta(1000).item()) == (1000, 1e-4, 0.02)
    close(cosine.alpha_bar(torch.arange(1000)), oracles.cosine_alpha_bars(1000)[:-1], rtol=1e-9)
    assert cosine.beta(1000).item() == 0.999


def test_betas_given_as_a_float32_tensor_are_taken_as_they_are():
    betas = torch.tensor([0.1, 0.7])
    schedule = pyrodiff.BetaSchedule(betas)
    assert schedule.beta(1).item() == betas[0].item()
    betas.zero_()  # a copy was made
    assert schedule.beta(1).item() > 0


@pytest.mark.parametrize(
    "make",
    [
        pyrodiff.BetaSchedule,
        lambda values: pyrodiff.FixedVariance(values),
        lambda values: pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(3), values),
        lambda values: pyrodiff.ImportanceDrawing(values),
    ],
    ids=["betas", "variances", "rate", "probabilities"],
)
def test_numbers_that_would_not_be_learned_are_refused(make, request):
    """A parameter would be copied, and would never move."""
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=f"{name} must be fixed numbers, .* give {name}.detach()"):
        make(torch.nn.Parameter(torch.tensor([0.4, 0.6])))


def test_the_last_beta_may_be_one_and_leaves_no_signal():
    schedule = pyrodiff.BetaSchedule([0.3, 1.0])
    assert [schedule.signal(2).item(), schedule.noise(2).item(), schedule.log_snr(2).item()] == [0, 1, -float("inf")]


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [(9.0, 9.0, "last must be a number in"), (9.0, -2000.0, "last must be"), (float("inf"), -9.0, "first must be")],
)
def test_a_line_of_log_snr_has_to_fall_within_float64(first, last, words):
    with pytest.raises(ValueError, match=words):
        pyrodiff.LogSNRSchedule(5, first, last)


@pytest.mark.parametrize("make", [pyrodiff.LinearSchedule, pyrodiff.CosineSchedule, pyrodiff.ReciprocalSchedule])
@pytest.mark.parametrize("T", [1, 2, 3, 40, 1000])
def test_even_times_are_the_nearest_to_even_falls_of_the_log_snr(make, T):
    """Both ends, so many, each once; where none would be taken twice, the nearest by trying all."""
    schedule = make(T)
    for number in {1, 2, 3, min(7, T), T} & set(range(1, T + 1)):
        times = schedule.even_times(number)
        assert len(times) == number
        assert times[-1] == T
        assert number == 1 or times[0] == 1
        assert all(s < t for s, t in pairwise(times))
    if T == 1000 and make is pyrodiff.LinearSchedule:
        log_snr = schedule.log_snr(torch.arange(1, T + 1))
        wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), 9, dtype=torch.float64)
        assert schedule.even_times(9) == tuple(((log_snr - one).abs().argmin() + 1).item() for one in wanted)
    for number in (0, T + 1):
        with pytest.raises(ValueError, match="num_steps must be"):
            schedule.even_times(number)
