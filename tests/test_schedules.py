"""Schedules, fixed, learned and of fewer steps, against their definitions, multiplied out one step after another."""

import math
from functools import partial
from itertools import combinations, pairwise

import cases
import numpy as np
import oracles
import pytest
import torch
from cases import BETAS, LEARNED, SCHEDULES, TIMES, T, every_schedule
from exact import gradient

import pyrodiff

METHODS = ("beta", "alpha_bar", "signal", "noise", "log_snr", "scales")
LENGTHS = (1, 2, 7, 1000)
close = partial(cases.close, rtol=1e-11, atol=1e-14)


def tables(schedule):
    """All that it says of t = 0..T, a row each."""
    t = torch.arange(schedule.num_steps + 1)
    return torch.cat([getattr(schedule, name)(t).reshape(-1, len(t)) for name in METHODS]).detach()


def rounding(schedule):
    """How far a time by itself may be from it among others: tables are read, what learns is computed."""
    return {"rtol": 1e-13 if list(schedule.parameters()) else 0.0, "atol": 0.0}


# What every schedule is


@every_schedule
def test_tables_are_those_of_the_definition(schedule):
    for length in LENGTHS:
        made, steps, t = schedule.make(length), schedule.steps(length), torch.arange(length + 1)
        gain, variance = np.array(oracles.moments(steps)).T
        assert made.num_steps == length
        close(made.beta(t), [0.0, *(variance for _, variance in steps)])
        close(made.signal(t), gain)
        close(made.alpha_bar(t), gain**2)
        close(made.noise(t) ** 2, variance)
        close(made.scales(t), [gain, variance**0.5])
        with np.errstate(divide="ignore"):
            close(made.log_snr(t), np.log(gain**2) - np.log(variance), atol=1e-10)


@every_schedule
def test_the_chain_starts_at_the_data(schedule):
    for length in LENGTHS:
        made = schedule.make(length)
        start = [method(0).item() for method in (made.beta, made.signal, made.noise, made.log_snr)]
        assert start == [0, 1, 0, math.inf]


@every_schedule
def test_variance_is_preserved_or_the_signal_is_kept(schedule):
    for length in LENGTHS:
        signal, noise = schedule.make(length).scales(torch.arange(length + 1))
        close(signal**2 + noise**2 if schedule.preserving else signal, np.ones(length + 1))


@every_schedule
def test_log_snr_falls_strictly(schedule):
    for length in LENGTHS:
        assert (schedule.make(length).log_snr(torch.arange(length + 1)).diff() < 0).all()


@every_schedule
def test_an_int_and_a_tensor_of_any_shape_give_the_same(schedule):
    schedule = schedule.make(T)
    whole, exactly = tables(schedule), rounding(schedule)
    for name in METHODS:
        method = getattr(schedule, name)
        one_by_one = torch.stack([method(t) for t in range(T + 1)], -1)
        assert one_by_one.dtype == torch.float64
        for dtype in (torch.int32, torch.int64):
            t = torch.tensor([[0, 7, 3], [1, 1, 5]], dtype=dtype)
            for times in (t, t[0], t[1, 2], t[:0]):
                close(method(times), one_by_one.detach()[..., times.long()], **exactly)
        assert torch.equal(method(np.int64(3)), one_by_one[..., 3])
    assert torch.equal(whole, tables(schedule))


@every_schedule
def test_values_stay_float64_whatever_the_module_is_cast_to(schedule):
    cases.stays_float64(lambda: schedule.make(T), tables)
    for cast in cases.casts():
        kept, found = schedule.make(T).state_dict(), cast(schedule.make(T)).state_dict()
        assert len(kept) == len(found) > 0
        assert all(map(torch.equal, kept.values(), found.values()))
        assert {value.dtype for value in found.values()} <= {torch.float64, torch.int64}


@every_schedule
def test_steps_lead_from_each_time_to_each_later_one(schedule):
    steps, schedule = schedule.steps(T), schedule.make(T)
    for s in range(T):
        gain, variance = np.array(oracles.moments(steps, s)[1:]).T
        t = torch.arange(s + 1, T + 1)
        signal, noise = schedule.step(t, torch.full_like(t, s))
        close(signal, gain)
        close(noise**2, variance)
        assert torch.equal(schedule.step(T, s)[1], noise[-1])


@every_schedule
def test_steps_compose(schedule):
    for length in (7, 1000):
        made = schedule.make(length)
        r, s, t = torch.cartesian_prod(*[torch.unique(torch.linspace(0, length, 12).long())] * 3).T
        ordered = (r < s) & (s < t)
        r, s, t = r[ordered], s[ordered], t[ordered]
        (a_tr, b_tr), (a_ts, b_ts), (a_sr, b_sr) = made.step(t, r), made.step(t, s), made.step(s, r)
        close(a_tr, a_ts * a_sr)
        close(b_tr**2, a_ts**2 * b_sr**2 + b_ts**2)


@every_schedule
def test_the_step_by_one_has_variance_beta(schedule):
    for length in LENGTHS:
        made, t = schedule.make(length), torch.arange(1, length + 1)
        close(made.step(t, t - 1)[1] ** 2, made.beta(t), rtol=1e-9)


@every_schedule
def test_posterior_weights_are_those_of_conditioning(schedule):
    """And those of a fixed schedule of the same betas, for a learned one: both are held to the same arithmetic."""
    process, schedule = cases.Gaussian(schedule), schedule.make(T)
    for s, t in cases.PAIRS:
        (of_x_0, variance), (of_x_t, _) = process.posterior(0, 1, s, t), process.posterior(1, 0, s, t)
        exactly = {} if s else {"rtol": 0.0, "atol": 0.0}
        close(schedule.posterior(t, s), [of_x_t, of_x_0, variance**0.5], **({"rtol": 1e-10, "atol": 1e-10} | exactly))
        if s == t - 1:
            assert torch.equal(schedule.posterior(t, s), schedule.posterior(t))
    t, s = torch.tensor([[7, 3, 2], [5, 1, 6]]), torch.tensor([[4, 1, 1], [4, 0, 3]])
    together = schedule.posterior(t, s)
    assert together.shape == (3, 2, 3)
    for i in np.ndindex(2, 3):
        close(together[(slice(None), *i)], schedule.posterior(int(t[i]), int(s[i])), **rounding(schedule))


@every_schedule
def test_copies_and_states_say_the_same(schedule):
    made, t = schedule.make(T), torch.arange(1, T + 1)
    expected = tables(made), made.posterior(t).detach()
    for one in (*cases.copies(made, schedule.make(T)), _anew(schedule, made)):
        assert torch.equal(tables(one), expected[0])
        assert torch.equal(one.posterior(t), expected[1])
    assert "num_steps=7" in repr(schedule.make(T).to("meta"))
    assert repr(made).startswith(f"{type(made).__name__}(")
    assert "num_steps=7" in repr(made)


def _anew(schedule, made):
    """One that was made without memory, and then loaded."""
    other = schedule.make(T).to("meta").to_empty(device="cpu")
    other.load_state_dict(made.state_dict())
    return other


@every_schedule
def test_a_sub_schedule_is_the_schedule_at_its_times_and_its_steps_are_the_whole_steps_between(schedule):
    steps, schedule = schedule.steps(T), schedule.make(T)
    for times in TIMES.values():
        sub, tau = pyrodiff.SubSchedule(schedule, times), torch.tensor([0, *times])
        k = torch.arange(len(tau))
        assert (sub.num_steps, sub.times) == (len(times), times)
        assert torch.equal(sub.time(k), tau)
        assert torch.equal(sub.time(k.reshape(-1, 1)), tau.reshape(-1, 1))
        assert [sub.time(int(i)) for i in k] == tau.tolist()
        assert type(sub.time(1)) is int
        for method in ("signal", "noise", "log_snr", "alpha_bar"):
            assert torch.equal(getattr(sub, method)(k), getattr(schedule, method)(tau))
        for j, i in combinations(range(len(tau)), 2):
            gain, variance = oracles.span(steps, int(tau[j]), int(tau[i]))
            close(sub.step(i, j)[0], gain)
            close(sub.step(i, j)[1] ** 2, variance)
            if j == i - 1:
                close(sub.beta(i), variance)
        assert sub.beta(0) == 0
        close(sub.beta(k), torch.stack([sub.beta(int(i)) for i in k]), **rounding(schedule))


@every_schedule
def test_times_outside_of_the_chain_are_refused(schedule):
    schedule = schedule.make(T)
    for name, t in ((name, t) for name in METHODS for t in cases.BAD_TIMES):
        cases.refused(lambda name=name, t=t: getattr(schedule, name)(t), "t must")


@every_schedule
def test_even_times_are_so_many_each_once_from_1_to_T(schedule):
    for length in (1, 2, 3, 40, 1000):
        made = schedule.make(length)
        for number in {1, 2, 3, min(7, length), length} & set(range(1, length + 1)):
            times = made.even_times(number)
            assert len(times) == number
            assert times[-1] == length
            assert number == 1 or times[0] == 1
            assert all(s < t for s, t in pairwise(times))
        for number in (0, length + 1):
            cases.refused(lambda made=made, number=number: made.even_times(number), "num_steps must be")


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_gradients_are_finite_at_both_ends(name):
    schedule, t = SCHEDULES[name].make(T), torch.arange(T + 1)
    with torch.autograd.detect_anomaly(check_nan=True):
        found = [schedule.beta(t), schedule.scales(t), schedule.posterior(t[1:]), *schedule.step(t[1:], 0 * t[1:])]
        slope = gradient(sum(values.sum() for values in found), schedule)
    assert bool(slope.isfinite().all())
    assert bool(slope.ne(0).any())


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_schedule_is_the_fixed_one_of_its_betas(name):
    learned, t = SCHEDULES[name].make(T), torch.arange(1, T + 1)
    fixed = pyrodiff.BetaSchedule(learned.beta(t).detach())
    close(tables(learned), tables(fixed), rtol=1e-12)
    for s in (t - 1, 0 * t, (t - 2).clamp(min=0)):
        close(learned.posterior(t, s), fixed.posterior(t, s), rtol=1e-12)


# What one is


def test_even_times_are_the_nearest_to_even_falls_of_the_log_snr():
    schedule = pyrodiff.LinearSchedule(1000)
    log_snr = schedule.log_snr(torch.arange(1, 1001))
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), 9, dtype=torch.float64)
    assert schedule.even_times(9) == tuple(((log_snr - one).abs().argmin() + 1).item() for one in wanted)


def test_the_first_noise_of_a_long_schedule_is_exact_to_ten_digits():
    linear, cosine = pyrodiff.LinearSchedule(1000), pyrodiff.CosineSchedule(1000)
    for t in (1, 2, 10, 100):
        close(linear.noise(t) ** 2, float(oracles.exact_linear_noise_squared(1000, t)), rtol=1e-12, atol=0)
        close(cosine.noise(t) ** 2, float(oracles.exact_cosine_noise_squared(1000, t)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("beta", [1e-4, 1e-9, 1e-15])
def test_a_tiny_beta_is_not_lost_in_one_minus_alpha_bar(beta):
    schedule = pyrodiff.BetaSchedule([beta] * 3)
    for t in (1, 2, 3):
        expected = t * beta - t * (t - 1) / 2 * beta**2 + t * (t - 1) * (t - 2) / 6 * beta**3  # 1 - (1 - beta)^t
        close(schedule.noise(t) ** 2, expected, rtol=1e-13, atol=0)


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


def test_the_last_beta_may_be_one_and_leaves_no_signal():
    schedule = pyrodiff.BetaSchedule([0.3, 1.0])
    assert [schedule.signal(2).item(), schedule.noise(2).item(), schedule.log_snr(2).item()] == [0, 1, -math.inf]


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [(9.0, 9.0, "last must be a number in"), (9.0, -2000.0, "last must be"), (math.inf, -9.0, "first must be")],
)
def test_a_line_of_log_snr_has_to_fall_within_float64(first, last, words):
    cases.refused(lambda: pyrodiff.LogSNRSchedule(5, first, last), words)


def test_a_sub_schedule_reads_the_other_whenever_it_is_asked():
    schedule = pyrodiff.BetaSchedule(BETAS)
    sub = pyrodiff.SubSchedule(schedule, (2, 5))
    schedule._table[1, 5] = 0.123
    assert sub.signal(2) == 0.123
    assert "times=(2, 5)" in repr(sub)
    assert "..." in repr(pyrodiff.SubSchedule(pyrodiff.LinearSchedule(50), range(1, 51)))


@pytest.mark.parametrize(
    "times", [range(2, 7, 2), [2, 4, 6], torch.tensor([2, 4, 6]), np.array([2, 4, 6]), tuple(np.int32([2, 4, 6]))]
)
def test_times_are_any_sequence_of_ints(times):
    schedule = pyrodiff.BetaSchedule(BETAS)
    assert pyrodiff.SubSchedule(schedule, times).times == (2, 4, 6)
    assert pyrodiff.GaussianForward(schedule).subchain(times).schedule.times == (2, 4, 6)
