"""Forward kernels against conditioning and 2 x 2 matrices, for every pair s < t of a chain of seven steps."""

from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from torch.distributions import kl_divergence

import pyrodiff

T = 7
PAIRS = [(s, t) for t in range(1, T + 1) for s in range(t)]
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25, 0.5, 0.8]

# name: (schedule, its (gain, variance) step by step)
GAUSSIAN = {
    "beta": (pyrodiff.BetaSchedule(BETAS), oracles.preserving_steps(BETAS)),
    "linear": (pyrodiff.LinearSchedule(T), oracles.preserving_steps(oracles.linear_betas(T))),
    "cosine": (pyrodiff.CosineSchedule(T), oracles.preserving_steps(oracles.cosine_betas(T))),
    "reciprocal": (pyrodiff.ReciprocalSchedule(T), oracles.preserving_steps(oracles.reciprocal_betas(T))),
    "geometric": (
        pyrodiff.GeometricSchedule(T, 0.3, 20.0),
        oracles.exploding_steps(oracles.geometric_sigmas(T, 0.3, 20.0)),
    ),
}
BITS = {
    "reciprocal": (pyrodiff.ReciprocalSchedule(T), oracles.reciprocal_betas(T)),
    "linear": (pyrodiff.LinearSchedule(T, 0.01, 0.4), oracles.linear_betas(T, 0.01, 0.4)),
}
RATES = {"0.2": 0.2, "0.5": 0.5, "by dimension": torch.tensor([0.1, 0.5, 0.73], dtype=torch.float64)}

every_gaussian = pytest.mark.parametrize("name", sorted(GAUSSIAN))
every_preserving = pytest.mark.parametrize("name", sorted(set(GAUSSIAN) - {"geometric"}))
every_bits = pytest.mark.parametrize("name", sorted(BITS))
every_rate = pytest.mark.parametrize("rate", RATES.values(), ids=RATES)


def gaussian(name):
    schedule, steps = GAUSSIAN[name]
    return pyrodiff.GaussianForward(schedule), steps


def data(*shape):
    return 0.7 + np.sqrt(2.3) * torch.randn(shape, dtype=torch.float64)


def chain(x_0, steps):
    """x_0, x_1, ..., x_T, drawn step by step."""
    states = [x_0]
    for gain, variance in steps:
        states.append(gain * states[-1] + variance**0.5 * torch.randn_like(x_0))
    return states


def all_bits(dims=3):
    """All 2 x 2 combinations of (x_t, x_0), the same in every dimension, with shape (4, dims) each."""
    bits = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)).double()
    return bits[:, :1].expand(4, dims), bits[:, 1:].expand(4, dims)


def rate_list(rate, dims=3):
    return torch.as_tensor(rate, dtype=torch.float64).expand(dims).tolist()


def close(actual, expected, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


# Gaussian


@every_gaussian
def test_gaussian_bayes_rule_holds_between_the_kernels(name):
    q, steps = gaussian(name)
    states = chain(data(6, 3), steps)
    for s, t in PAIRS:
        if s > 0:
            x_0, x_s, x_t = states[0], states[s], states[t]
            forwards = q.transition(x_s, t, s).log_prob(x_t) + q.marginal(x_0, s).log_prob(x_s)
            backwards = q.posterior(x_t, x_0, t, s).log_prob(x_s) + q.marginal(x_0, t).log_prob(x_t)
            close(forwards, backwards)


@every_gaussian
def test_gaussian_transitions_composed_are_the_transition(name):
    q, steps = gaussian(name)
    x_s = data(6, 3)
    for s, t in PAIRS:
        gain, variance = oracles.moments(steps, s)[t - s]
        law = q.transition(x_s, t, s)
        close(law.mean, gain * x_s)
        close(law.variance, np.full((6, 3), variance), rtol=1e-10, atol=0)


@every_gaussian
def test_gaussian_marginal_is_t_transitions(name):
    q, steps = gaussian(name)
    x_0 = data(6, 3)
    for t in range(1, T + 1):
        gain, variance = oracles.moments(steps)[t]
        close(q.marginal(x_0, t).mean, gain * x_0)
        close(q.marginal(x_0, t).variance, np.full((6, 3), variance), rtol=1e-10, atol=0)
        close(q.marginal(x_0, t).mean, q.transition(x_0, t, s=0).mean, rtol=0, atol=0)


@every_gaussian
def test_gaussian_posterior_is_the_marginal_conditioned_on_x_t(name):
    q, steps = gaussian(name)
    states = chain(data(6, 3), steps)
    for s, t in PAIRS:
        if s > 0:
            gain_s, variance_s = oracles.moments(steps)[s]
            gain_ts, variance_ts = oracles.moments(steps, s)[t - s]
            mean, variance = oracles.condition(gain_s * states[0], variance_s, gain_ts, variance_ts, states[t])
            law = q.posterior(states[t], states[0], t, s)
            close(law.mean, mean)
            close(law.variance, np.full((6, 3), variance), rtol=1e-10, atol=0)


@every_gaussian
def test_posterior_weights_are_those_of_conditioning(name):
    q, steps = gaussian(name)
    for s, t in PAIRS:
        weights = q.schedule.posterior(t, s)
        if s == 0:
            close(weights, [0, 1, 0], rtol=0, atol=0)
            continue
        (gain_s, variance_s), (gain_ts, variance_ts) = oracles.moments(steps)[s], oracles.moments(steps, s)[t - s]
        of_x_0, variance = oracles.condition(gain_s, variance_s, gain_ts, variance_ts, 0)
        of_x_t, _ = oracles.condition(0, variance_s, gain_ts, variance_ts, 1)
        close(weights, [of_x_t, of_x_0, variance**0.5])
    t, s = torch.tensor([7, 3, 2]), torch.tensor([4, 1, 1])
    together = q.schedule.posterior(t, s)
    for i in range(3):
        assert [w[i].item() for w in together] == [w.item() for w in q.schedule.posterior(int(t[i]), int(s[i]))]


@every_preserving
def test_luo_70_84_and_85(name):
    q, steps = gaussian(name)
    alpha = np.array([1.0] + [1 - beta for _, beta in steps])
    alpha_bar = alpha.cumprod()
    states = chain(data(6, 3), steps)
    for t in range(1, T + 1):
        x_0, x_t = states[0], states[t]
        close(q.marginal(x_0, t).mean, np.sqrt(alpha_bar[t]) * x_0)  # Eq. 70
        close(q.marginal(x_0, t).variance, np.full((6, 3), 1 - alpha_bar[t]))
        if t > 1:
            law = q.posterior(x_t, x_0, t)
            of_x_t = np.sqrt(alpha[t]) * (1 - alpha_bar[t - 1])
            of_x_0 = np.sqrt(alpha_bar[t - 1]) * (1 - alpha[t])
            close(law.mean, (of_x_t * x_t + of_x_0 * x_0) / (1 - alpha_bar[t]))  # Eq. 84
            variance = (1 - alpha[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])  # Eq. 85
            close(law.variance, np.full((6, 3), variance), rtol=1e-10, atol=0)


@every_gaussian
def test_noise_score_and_velocity_lead_back_and_forth(name):
    q, steps = gaussian(name)
    x_0, eps = data(6, 3), torch.randn(6, 3, dtype=torch.float64)
    for t in range(1, T + 1):
        gain, variance = oracles.moments(steps)[t]
        x_t = gain * x_0 + variance**0.5 * eps
        close(q.noise(x_t, x_0, t), eps, rtol=1e-9)
        close(q.velocity(x_t, x_0, t), gain * eps - variance**0.5 * x_0, rtol=1e-9)
        close(q.score(x_t, x_0, t), -eps / variance**0.5, rtol=1e-9)


@every_gaussian
def test_the_score_is_the_gradient_of_the_log_density(name):
    q, steps = gaussian(name)
    states = chain(data(6, 3), steps)
    t = torch.tensor([1, 2, 3, 5, 6, 7])
    x_t = torch.stack([states[k][i] for i, k in enumerate(t.tolist())]).requires_grad_()
    (gradient,) = torch.autograd.grad(q.marginal(states[0], t).log_prob(x_t).sum(), x_t)
    close(q.score(x_t.detach(), states[0], t), gradient)


@every_gaussian
def test_the_gaussian_prior_is_q_of_x_T_for_data_of_mean_0_and_variance_1(name):
    q, steps = gaussian(name)
    gain, variance = oracles.moments(steps)[T]
    law = q.prior((2, 4), torch.float64)
    assert (law.batch_shape, law.event_shape, law.sample().dtype) == ((), (2, 4), torch.float64)
    assert q.prior((3,)).sample().dtype == torch.float32
    close(law.mean, np.zeros((2, 4)), atol=0)
    close(law.variance, np.full((2, 4), gain**2 + variance))
    expected = 1 + 20.0**2 if name == "geometric" else 1.0
    close(law.variance, np.full((2, 4), expected))


# bits


@every_bits
@every_rate
def test_bit_transitions_are_products_of_2_by_2_matrices(name, rate):
    schedule, betas = BITS[name]
    q = pyrodiff.BinomialForward(schedule, rate)
    x_t, x_s = all_bits()
    for s, t in PAIRS:
        matrices = [oracles.bit_matrix(betas, r, s, t) for r in rate_list(rate)]
        expected = [sum(np.log(m[int(i)][int(j)]) for m in matrices) for j, i in zip(x_t[:, 0], x_s[:, 0], strict=True)]
        close(q.transition(x_s, t, s).log_prob(x_t), expected)
        if s == 0:
            close(q.marginal(x_s, t).log_prob(x_t), expected)


@every_bits
@every_rate
def test_bit_bayes_rule_holds_between_the_kernels(name, rate):
    q = pyrodiff.BinomialForward(BITS[name][0], rate)
    x_t, x_0 = all_bits()
    for s, t in PAIRS:
        for x_s in (torch.zeros(4, 3).double(), torch.ones(4, 3).double()):
            if s > 0:
                forwards = q.transition(x_s, t, s).log_prob(x_t) + q.marginal(x_0, s).log_prob(x_s)
                backwards = q.posterior(x_t, x_0, t, s).log_prob(x_s) + q.marginal(x_0, t).log_prob(x_t)
                close(forwards, backwards)


@every_bits
@every_rate
def test_the_bit_posterior_is_both_states_weighed(name, rate):
    schedule, betas = BITS[name]
    q = pyrodiff.BinomialForward(schedule, rate)
    x_t, x_0 = all_bits()
    for s, t in PAIRS:
        if s > 0:
            expected = [
                [oracles.bit_posterior(betas, r, int(i), int(j), t, s)[1] for r in rate_list(rate)]
                for i, j in zip(x_t[:, 0], x_0[:, 0], strict=True)
            ]
            close(q.posterior(x_t, x_0, t, s).base_dist.probs, expected)
            times = torch.full((4,), t), torch.full((4,), s)
            close(q.posterior(x_t, x_0, *times).base_dist.probs, expected)


def test_bit_posterior_logits_are_infinite_at_the_data():
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.2)
    x_t, x_0 = all_bits()
    for t in range(1, T):  # at t = T nothing is left of the data, but x_0 is still what it was
        logits = q.posterior_logits(x_t, x_0, t, 0)
        assert torch.equal(logits, torch.where(x_0 == 1, torch.inf, -torch.inf))


@pytest.mark.parametrize("beta", [1e-3, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bits_are_safe_for_tiny_betas(beta, dtype):
    """Exact fractions; a KL to a reverse kernel is finite, and 0 where the denoiser is sure and right."""
    exact, rate = [Fraction(beta)] * 3, Fraction(0.2)
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([beta] * 3), 0.2)
    x_t, x_0 = (bits.to(dtype) for bits in all_bits())
    for s, t in ((1, 2), (2, 3), (1, 3)):
        posteriors = [
            oracles.bit_posterior(exact, rate, int(i[0]), int(j[0]), t, s) for i, j in zip(x_t, x_0, strict=True)
        ]
        expected = [[np.log(float(one / zero))] * 3 for zero, one in posteriors]
        law = q.posterior(x_t, x_0, t, s)
        close(law.base_dist.logits, expected, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=1e-6)
        assert law.log_prob(x_0).isfinite().all()
        if s == t - 1:
            for logits in (-30.0, 0.0, 30.0):
                cost = kl_divergence(law, _reverse(q, torch.full_like(x_t, logits))(x_t, t))
                assert cost.isfinite().all()
                assert (cost > -1e-5).all()
            sure = _reverse(q, 60 * (2 * x_0 - 1))
            close(kl_divergence(law, sure(x_t, t)), np.zeros(4), atol=1e-5)


def _reverse(q, logits):
    return pyrodiff.BinomialReverse(q, pyrodiff.LogitPrediction(_Constant(logits), q))


class _Constant(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t):
        return self.output


@every_rate
def test_the_prior_of_bits_is_their_stationary_rate(rate):
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), rate)
    law = q.prior((2, 3), torch.float64)
    assert (law.batch_shape, law.event_shape) == ((), (2, 3))
    close(law.mean, np.broadcast_to(rate_list(rate), (2, 3)), rtol=0, atol=1e-15)
    assert q.prior((3,)).sample().dtype == torch.float32
    x_0 = all_bits()[1]
    close(q.marginal(x_0, T).mean, law.mean[0].expand(4, 3), atol=1e-15)  # nothing is left of the data


def test_a_rate_stays_float64_when_the_process_is_cast():
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.2).half()
    assert (q.rate.dtype, q.rate.item(), q.schedule.beta(3).dtype) == (torch.float64, 0.2, torch.float64)


# shapes, dtypes and draws


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("kind", ["gaussian", "bits"])
def test_times_by_datum_and_by_particle_give_the_kernels_one_by_one(kind, event_shape):
    if kind == "gaussian":
        q, draw = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS)), data
    else:
        q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS), 0.2)
        draw = lambda *shape: torch.randint(2, shape).double()  # noqa: E731
    t, s = torch.tensor([[2, 7, 3], [5, 4, 2]]), torch.tensor([[1, 2, 2], [4, 1, 1]])
    x, x_0 = draw(2, 3, *event_shape), draw(2, 3, *event_shape)
    value = draw(2, 3, *event_shape)
    kernels = {
        "transition": lambda x, x_0, t, s: q.transition(x, t, s),
        "last transition": lambda x, x_0, t, s: q.transition(x, t),
        "marginal": lambda x, x_0, t, s: q.marginal(x_0, t),
        "posterior": lambda x, x_0, t, s: q.posterior(x, x_0, t, s),
        "last posterior": lambda x, x_0, t, s: q.posterior(x, x_0, t),
    }
    for name, kernel in kernels.items():
        by_particle = kernel(x, x_0, t, s)
        assert (by_particle.batch_shape, by_particle.event_shape) == ((2, 3), event_shape), name
        assert by_particle.sample().shape == (2, 3, *event_shape)
        for p in range(2):
            by_datum = kernel(x[p], x_0[p], t[p], s[p])
            assert (by_datum.batch_shape, by_datum.event_shape) == ((3,), event_shape), name
            close(by_datum.log_prob(value[p]), by_particle.log_prob(value)[p], rtol=1e-14)
            for i in range(3):
                one = kernel(x[p, i : i + 1], x_0[p, i : i + 1], int(t[p, i]), int(s[p, i]))
                assert (one.batch_shape, one.event_shape) == ((1,), event_shape), name
                close(one.log_prob(value[p, i : i + 1]), by_datum.log_prob(value[p])[i : i + 1], rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_kernels_have_the_dtype_of_the_state(dtype):
    x = torch.tensor([[0.0, 1.0]], dtype=dtype)
    for q in (
        pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS)),
        pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS)),
    ):
        for law in (q.transition(x, 3), q.marginal(x, 3), q.posterior(x, x, 3), q.prior((2,), dtype)):
            assert law.sample().dtype == dtype


@every_gaussian
def test_gaussian_draws_have_the_moments_of_the_kernel(name):
    q, steps = gaussian(name)
    n, x_0, x_t = 40_000, 0.7, 2.3
    (gain_s, variance_s), (gain_ts, variance_ts) = oracles.moments(steps)[2], oracles.moments(steps, 2)[3]
    gain, variance = oracles.moments(steps)[5]
    full = lambda value: torch.full((n,), value, dtype=torch.float64)  # noqa: E731
    for law, (mean, var) in (
        (q.marginal(full(x_0), 5), (gain * x_0, variance)),
        (q.transition(full(x_0), 5, 2), (gain_ts * x_0, variance_ts)),
        (
            q.posterior(full(x_t), full(x_0), 5, 2),
            oracles.condition(gain_s * x_0, variance_s, gain_ts, variance_ts, x_t),
        ),
    ):
        x = law.sample()
        assert abs(x.mean().item() - mean) < 5 * np.sqrt(var / n)
        assert abs(x.var().item() - var) < 5 * var * np.sqrt(2 / (n - 1))


@every_bits
def test_bit_draws_have_the_rate_of_the_kernel(name):
    schedule, betas = BITS[name]
    q, n = pyrodiff.BinomialForward(schedule, 0.2), 40_000
    zero, one = torch.zeros(n), torch.ones(n)
    for law, p in (
        (q.marginal(one, 3), oracles.bit_matrix(betas, 0.2, 0, 3)[1][1]),
        (q.transition(zero, 6, 4), oracles.bit_matrix(betas, 0.2, 4, 6)[0][1]),
        (q.posterior(zero, one, 5, 2), oracles.bit_posterior(betas, 0.2, 0, 1, 5, 2)[1]),
    ):
        x = law.sample()
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert abs(x.mean().item() - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_gaussian_draws_carry_the_gradient_of_the_data():
    q = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS))
    x_0 = data(4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(q.marginal(x_0, 3).rsample().sum(), x_0)
    close(gradient, np.full((4, 2), np.sqrt(np.prod([1 - beta for beta in BETAS[:3]]))))
