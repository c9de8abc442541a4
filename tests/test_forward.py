"""Forward kernels against conditioning and 2 x 2 matrices, for every pair s < t of a chain of seven steps."""

import itertools
from fractions import Fraction
from functools import partial

import cases
import numpy as np
import oracles
import pytest
import torch
from cases import PAIRS, PRESERVING, PROCESSES, TIMES, Returns, T, every_process, same_law
from torch.distributions import kl_divergence

import pyrodiff

D = 3
close = partial(cases.close, rtol=1e-10, atol=1e-10)
GAUSSIAN = {name: process for name, process in PROCESSES.items() if isinstance(process, cases.Gaussian)}
every_gaussian = pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN)


def states(process):
    """Data, and a state of each time: of bits all combinations of x_t and x_0, of numbers a chain step by step."""
    if isinstance(process, cases.Binomial):
        x_t, x_0 = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)).double().T[..., None].expand(2, 4, D)
        return [x_0] + [x_t] * T
    found = [process.draw(6, D)]
    for t in range(1, T + 1):
        mean, variance = process.transition(found[-1], t - 1, t)
        found.append(torch.from_numpy(mean) + variance**0.5 * torch.randn(6, D, dtype=torch.float64))
    return found


# What every process is


@every_process
def test_a_transition_is_its_steps_composed(process):
    q, x = process.make(), states(process)
    for s, t in PAIRS:
        same_law(q.transition(x[s], t, s), process.transition(x[s], s, t))
        if s == t - 1:
            same_law(q.transition(x[s], t), process.transition(x[s], s, t))


@every_process
def test_the_marginal_is_t_transitions(process):
    q, x = process.make(), states(process)
    for t in range(1, T + 1):
        same_law(q.marginal(x[0], t), process.transition(x[0], 0, t))
        close(q.marginal(x[0], t).mean, q.transition(x[0], t, s=0).mean, rtol=0, atol=0)


@every_process
def test_the_posterior_is_the_marginal_conditioned_on_x_t(process):
    q, x = process.make(), states(process)
    for s, t in PAIRS:
        if s > 0:
            expected = process.posterior(x[t], x[0], s, t)
            times = torch.full((len(x[0]),), t), torch.full((len(x[0]),), s)
            for law in (q.posterior(x[t], x[0], t, s), q.posterior(x[t], x[0], *times)):
                same_law(law, expected)
            if s == t - 1:
                same_law(q.posterior(x[t], x[0], t), expected)


@every_process
def test_bayes_rule_holds_between_the_kernels(process):
    q, x = process.make(), states(process)
    for s, t in PAIRS:
        for x_s in (x[s], 1 - x[s]):
            if s > 0:
                forwards = q.transition(x_s, t, s).log_prob(x[t]) + q.marginal(x[0], s).log_prob(x_s)
                backwards = q.posterior(x[t], x[0], t, s).log_prob(x_s) + q.marginal(x[0], t).log_prob(x[t])
                close(forwards, backwards)


@every_process
def test_the_prior_is_q_of_x_T_for_data_of_mean_0_and_variance_1_or_of_the_stationary_rate(process):
    q = process.make()
    for shape in ((D,), (2, D)):
        law = q.prior(shape, torch.float64)
        assert (law.batch_shape, law.event_shape, law.sample().dtype) == ((), shape, torch.float64)
        same_law(law, process.prior(shape))
        assert q.prior(shape).sample().dtype == torch.float32
    if isinstance(process, cases.Binomial):  # its data forget where they started
        rate = torch.tensor(process.rates, dtype=torch.float64)
        zero, one = (q.marginal(torch.full((1, D), x).double(), T).mean for x in (0, 1))
        close((1 - rate) * zero + rate * one, law.mean[:1])


@every_process
@pytest.mark.parametrize("event_shape", [(), (D,), (2, D)])
def test_times_by_datum_and_by_particle_give_the_kernels_one_by_one(process, event_shape):
    if event_shape == () and len(getattr(process, "rates", "1")) > 1:
        event_shape = (1, D)
    q, t = process.make(), torch.tensor([[2, 7, 3], [5, 4, 2]])
    x, x_0 = process.draw(2, 3, *event_shape), process.draw(2, 3, *event_shape)
    cases.one_by_one(lambda t, x: q.transition(x, t, t // 2), t, x)
    cases.one_by_one(lambda t, x: q.transition(x, t), t, x)
    cases.one_by_one(lambda t, x: q.marginal(x, t), t, x_0)
    cases.one_by_one(lambda t, x, x_0: q.posterior(x, x_0, t, t // 2), t, x, x_0)
    cases.one_by_one(lambda t, x, x_0: q.posterior(x, x_0, t), t, x, x_0)


@every_process
def test_kernels_have_the_dtype_of_the_state_and_values_of_their_own_kind(process):
    q = process.make()
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = process.draw(2, D).to(dtype)
        for law in (q.transition(x, 3), q.marginal(x, 3), q.posterior(x, x, 3), q.prior((D,), dtype)):
            assert law.sample().dtype == dtype
            assert q.support.check(law.sample()).all()


@every_process
def test_draws_have_the_moments_of_the_kernel(process):
    q, n = process.make(), 10_000
    x_0, x_t = process.draw(1, D), process.draw(1, D)
    cases.drawn(q.marginal(x_0, 5), process.transition(x_0, 0, 5), n)
    cases.drawn(q.transition(x_0, 5, 2), process.transition(x_0, 2, 5), n)
    cases.drawn(q.posterior(x_t, x_0, 5, 2), process.posterior(x_t, x_0, 2, 5), n)


@every_process
def test_kernels_of_a_shorter_chain_are_those_between_its_times(process):
    q, x, x_0 = process.make(), process.draw(5, D), process.draw(5, D)
    for times in TIMES.values():
        sub, full = q.subchain(times), (0, *times)
        assert (type(sub), sub.num_steps, sub.schedule.times) == (type(q), len(times), times)
        for j, k in itertools.combinations(range(len(full)), 2):
            t, s = full[k], full[j]
            laws = [(sub.transition(x, k, j), process.transition(x, s, t))]
            laws += [(sub.transition(x, k), laws[0][1])] * (j == k - 1)
            if j == 0:
                laws += [(sub.marginal(x_0, k), process.transition(x_0, 0, t))]
            else:
                laws += [(sub.posterior(x, x_0, k, j), process.posterior(x, x_0, s, t))]
                laws += [(sub.posterior(x, x_0, k), laws[-1][1])] * (j == k - 1)
                close(laws[-1][0].mean, q.posterior(x, x_0, t, s).mean, rtol=1e-13)
            for law, expected in laws:
                same_law(law, expected)
        same_law(sub.prior((D,), torch.float64), process.prior((D,), times[-1]))
    sub, k = q.subchain((2, 3, 5, 7)), torch.tensor([2, 4, 3, 2, 4])
    t, s = torch.tensor([3, 7, 5, 3, 7]), torch.tensor([2, 5, 3, 2, 5])
    close(sub.posterior(x, x_0, k).mean, q.posterior(x, x_0, t, s).mean)
    close(sub.transition(x, k).variance, q.transition(x, t, s).variance)


@every_process
def test_copies_states_and_casts_say_the_same(process):
    q, x, x_0 = process.make(), process.draw(5, D), process.draw(5, D)
    expected = q.posterior(x, x_0, 5, 2).mean
    casted = [cast(process.make()) for cast in cases.casts()]  # rates and tables stay float64
    for one in (*cases.copies(q, process.make()), *casted):
        assert torch.equal(one.posterior(x, x_0, 5, 2).mean, expected)
        assert torch.equal(one.prior((D,), torch.float64).mean, q.prior((D,), torch.float64).mean)
    assert repr(q).startswith(f"{type(q).__name__}(")


@every_process
def test_times_that_cannot_be_are_refused(process):
    q, x = process.make(), process.draw(2, D)
    for t in (0, *cases.BAD_TIMES):
        for kernel in (q.transition, q.marginal, lambda x, t: q.posterior(x, x, t)):
            cases.refused(lambda kernel=kernel, t=t: kernel(x, t), "t")
    for call in (lambda: q.posterior(x, x, 3, 0), lambda: q.posterior(x, x, 3, 3), lambda: q.transition(x, 2, 5)):
        cases.refused(call, "s")


# Gaussians


@pytest.mark.parametrize("name", PRESERVING)
def test_luo_70_84_and_85(name):
    process = PROCESSES[f"GaussianForward, {name}"]
    q, x = process.make(), states(process)
    alpha = np.array([1.0] + [1 - beta for _, beta in process.schedule.steps(T)])
    alpha_bar = alpha.cumprod()
    for t in range(1, T + 1):
        x_0, x_t = x[0].numpy(), x[t].numpy()
        same_law(q.marginal(x[0], t), (np.sqrt(alpha_bar[t]) * x_0, 1 - alpha_bar[t]))  # Eq. 70
        if t > 1:
            of_x_t = np.sqrt(alpha[t]) * (1 - alpha_bar[t - 1])
            of_x_0 = np.sqrt(alpha_bar[t - 1]) * (1 - alpha[t])
            mean = (of_x_t * x_t + of_x_0 * x_0) / (1 - alpha_bar[t])  # Eq. 84
            variance = (1 - alpha[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])  # Eq. 85
            same_law(q.posterior(x[t], x[0], t), (mean, variance))


@every_gaussian
def test_noise_score_and_velocity_lead_back_and_forth(process):
    q, x_0, eps = process.make(), process.draw(6, D), torch.randn(6, D, dtype=torch.float64)
    for t in range(1, T + 1):
        a, b = cases.scales(process, t)
        x_t = a * x_0 + b * eps
        close(q.noise(x_t, x_0, t), eps, rtol=1e-9)
        close(q.velocity(x_t, x_0, t), a * eps - b * x_0, rtol=1e-9)
        close(q.score(x_t, x_0, t), -eps / b, rtol=1e-9)


@every_gaussian
def test_the_score_is_the_gradient_of_the_log_density(process):
    q, x, t = process.make(), states(process), torch.tensor([1, 2, 3, 5, 6, 7])
    x_t = torch.stack([x[k][i] for i, k in enumerate(t.tolist())]).requires_grad_()
    (gradient,) = torch.autograd.grad(q.marginal(x[0], t).log_prob(x_t).sum(), x_t)
    close(q.score(x_t.detach(), x[0], t), gradient)


@every_gaussian
def test_draws_carry_the_gradient_of_the_data(process):
    x_0 = process.draw(4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(process.make().marginal(x_0, 3).rsample().sum(), x_0)
    close(gradient, np.full((4, 2), cases.scales(process, 3)[0]))


# Bits


def test_bit_posterior_logits_are_infinite_at_the_data():
    q, x = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.2), states(PROCESSES["BinomialForward, betas"])
    for t in range(1, T):  # at t = T nothing is left of the data, but x_0 is still what it was
        logits = q.posterior_logits(x[1], x[0], t, 0)
        assert torch.equal(logits, torch.where(x[0] == 1, torch.inf, -torch.inf))


@pytest.mark.parametrize("beta", [1e-3, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bits_are_safe_for_tiny_betas(beta, dtype):
    """Exact fractions; a KL to a reverse kernel is finite, and 0 where the denoiser is sure and right."""
    exact, rate = [Fraction(beta)] * 3, Fraction(0.2)
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([beta] * 3), 0.2)
    x_0, x_t = (x.to(dtype) for x in states(PROCESSES["BinomialForward, betas"])[:2])

    def reverse(logits):
        return pyrodiff.BinomialReverse(q, pyrodiff.LogitPrediction(Returns(logits), q))

    for s, t in ((1, 2), (2, 3), (1, 3)):
        posteriors = [
            oracles.bit_posterior(exact, rate, int(i[0]), int(j[0]), t, s) for i, j in zip(x_t, x_0, strict=True)
        ]
        expected = [[np.log(float(one / zero))] * D for zero, one in posteriors]
        law = q.posterior(x_t, x_0, t, s)
        close(law.base_dist.logits, expected, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=1e-6)
        assert law.log_prob(x_0).isfinite().all()
        if s == t - 1:
            for logits in (-30.0, 0.0, 30.0):
                cost = kl_divergence(law, reverse(torch.full_like(x_t, logits))(x_t, t))
                assert cost.isfinite().all()
                assert (cost > -1e-5).all()
            close(kl_divergence(law, reverse(60 * (2 * x_0 - 1))(x_t, t)), np.zeros(4), atol=1e-5)
