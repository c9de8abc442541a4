"""Reverse kernels and decoders against Luo's equations, explicit sums and closed-form divergences."""

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff.process import forward as forward_processes

T = 7
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25, 0.5, 0.8]
SIGMAS = oracles.geometric_sigmas(T, 0.3, 20.0)
PRESERVING = {
    "beta": (pyrodiff.BetaSchedule(BETAS), BETAS),
    "linear": (pyrodiff.LinearSchedule(T), oracles.linear_betas(T)),
    "cosine": (pyrodiff.CosineSchedule(T), oracles.cosine_betas(T)),
}
RATES = {"0.2": 0.2, "0.5": 0.5, "by dimension": torch.tensor([0.1, 0.5, 0.73], dtype=torch.float64)}
every_preserving = pytest.mark.parametrize("name", PRESERVING)
every_prediction = pytest.mark.parametrize("prediction", ["data", "noise", "score"])
every_rate = pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
DENOISERS = {
    "data": pyrodiff.DataPrediction,
    "noise": pyrodiff.NoisePrediction,
    "score": pyrodiff.ScorePrediction,
    "velocity": pyrodiff.VelocityPrediction,
}


class Returns(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t):
        return self.output


def kernel(schedule, prediction, output, x_t, t, variance=None):
    q = pyrodiff.GaussianForward(schedule)
    return pyrodiff.GaussianReverse(q, DENOISERS[prediction](Returns(output), q), variance)(x_t, t)


def tables(betas):
    """beta, alpha and alpha-bar for t = 0..T."""
    beta = np.array([0.0, *betas])
    return beta, 1 - beta, (1 - beta).cumprod()


def states(*shape):
    """x_t and a network's output: unrelated numbers of mean 0.7 and variance 2.3."""
    return (0.7 + 2.3**0.5 * torch.randn(shape, dtype=torch.float64) for _ in range(2))


def close(actual, expected, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


# the mean


@every_preserving
@pytest.mark.parametrize("t", range(1, T + 1))
def test_the_mean_is_that_of_luo_94_125_and_143(name, t):
    schedule, betas = PRESERVING[name]
    _, alpha, alpha_bar = tables(betas)
    x_t, output = states(6, 3)
    luo = {
        "data": (  # Eq. 94
            np.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) * x_t + np.sqrt(alpha_bar[t - 1]) * (1 - alpha[t]) * output
        )
        / (1 - alpha_bar[t]),
        "noise": (x_t - (1 - alpha[t]) / np.sqrt(1 - alpha_bar[t]) * output) / np.sqrt(alpha[t]),  # Eq. 125
        "score": (x_t + (1 - alpha[t]) * output) / np.sqrt(alpha[t]),  # Eq. 143
    }
    for prediction, mean in luo.items():
        close(kernel(schedule, prediction, output, x_t, t).mean, mean)


@pytest.mark.parametrize("t", range(1, T + 1))
def test_where_variance_explodes_the_mean_is_a_step_along_the_score(t):
    """x_t + (sigma_t^2 - sigma_{t-1}^2) s: Song and others (2021), Eq. 47."""
    before, after = ([0.0, *SIGMAS][u] ** 2 for u in (t - 1, t))
    x_t, output = states(6, 3)
    schedule = pyrodiff.GeometricSchedule(T, 0.3, 20.0)
    close(kernel(schedule, "score", output, x_t, t).mean, x_t + (after - before) * output)
    close(kernel(schedule, "noise", output, x_t, t).mean, x_t - (after - before) / after**0.5 * output)
    close(kernel(schedule, "data", output, x_t, t).mean, (before * x_t + (after - before) * output) / after)


@pytest.mark.parametrize("prediction", DENOISERS)
def test_at_t_1_the_mean_is_the_denoisers(prediction):
    for schedule in (pyrodiff.BetaSchedule(BETAS), pyrodiff.GeometricSchedule(T, 0.3, 20.0)):
        x_t, output = states(6, 3)
        x_hat = DENOISERS[prediction](Returns(output), pyrodiff.GaussianForward(schedule))(x_t, 1)
        close(kernel(schedule, prediction, output, x_t, 1).mean, x_hat, rtol=1e-13)


@every_prediction
@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
def test_a_time_for_each_gives_the_kernels_one_by_one(prediction, event_shape):
    schedule = pyrodiff.BetaSchedule(BETAS)
    t = torch.tensor([[2, 7, 1], [5, 1, 3]])
    x_t, output = states(2, 3, *event_shape)
    for variance in (pyrodiff.ForwardVariance(), pyrodiff.PosteriorVariance(), pyrodiff.FixedVariance(BETAS)):
        by_particle = kernel(schedule, prediction, output, x_t, t, variance)
        assert (by_particle.batch_shape, by_particle.event_shape) == ((2, 3), event_shape)
        for p in range(2):
            by_datum = kernel(schedule, prediction, output[p], x_t[p], t[p], variance)
            assert (by_datum.batch_shape, by_datum.event_shape) == ((3,), event_shape)
            close(by_datum.mean, by_particle.mean[p], rtol=1e-14)
            close(by_datum.variance, by_particle.variance[p], rtol=1e-14, atol=0)
            for i in range(3):
                one = slice(i, i + 1)
                law = kernel(schedule, prediction, output[p, one], x_t[p, one], int(t[p, i]), variance)
                close(law.mean, by_datum.mean[one], rtol=1e-14)
                close(law.variance, by_datum.variance[one], rtol=1e-14, atol=0)


# the variance


@every_preserving
def test_variances_are_beta_and_beta_tilde(name):
    schedule, betas = PRESERVING[name]
    beta, _, alpha_bar = tables(betas)
    q = pyrodiff.GaussianForward(schedule)
    t = torch.arange(1, T + 1)
    tilde = beta[2:] * (1 - alpha_bar[1:-1]) / (1 - alpha_bar[2:])
    tilde = np.concatenate([tilde[:1], tilde])  # at t = 1 it would be 0, and that of t = 2 stands in
    given = np.linspace(0.3, 0.9, T)
    for variance, expected in (
        (pyrodiff.ForwardVariance(), beta[1:]),
        (pyrodiff.PosteriorVariance(), tilde),
        (pyrodiff.FixedVariance(given.tolist()), given),
    ):
        together = variance(q, t)
        assert together.dtype == torch.float64
        close(together, expected, rtol=1e-10, atol=0)
        close(variance(q, t.reshape(1, T)), expected[None], rtol=1e-10, atol=0)
        x_t, output = states(6, 3)
        for u in range(1, T + 1):
            assert variance(q, u).item() == together[u - 1].item()
            law = kernel(schedule, "noise", output, x_t, u, variance)
            close(law.variance, np.full((6, 3), expected[u - 1]), rtol=1e-10, atol=0)


def test_variances_of_a_variance_exploding_chain():
    q = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(T, 0.3, 20.0))
    square = np.array([0.0, *SIGMAS]) ** 2
    t = torch.arange(1, T + 1)
    close(pyrodiff.ForwardVariance()(q, t), np.diff(square), atol=0)
    tilde = (np.diff(square) * square[:-1] / square[1:])[1:]
    close(pyrodiff.PosteriorVariance()(q, t), [tilde[0], *tilde], atol=0)


def test_of_a_chain_of_one_step_every_variance_is_beta_1():
    x_t, output = states(6, 3)
    for variance in (pyrodiff.ForwardVariance(), pyrodiff.PosteriorVariance(), pyrodiff.FixedVariance([0.3])):
        for t in (1, torch.ones(6, dtype=torch.long)):
            law = kernel(pyrodiff.BetaSchedule([0.3]), "noise", output, x_t, t, variance)
            close(law.variance, np.full((6, 3), 0.3), atol=0)


def test_the_variance_is_beta_unless_given():
    x_t, output = states(6, 3)
    for t in range(1, T + 1):
        close(kernel(pyrodiff.BetaSchedule(BETAS), "data", output, x_t, t).variance, np.full((6, 3), BETAS[t - 1]))


def test_variances_stay_float64_when_cast():
    variance = pyrodiff.FixedVariance([0.1] * T).float()
    assert variance(pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS)), 3).item() == 0.1


@pytest.mark.parametrize("t", range(2, T + 1))
def test_on_flat_data_the_posterior_variance_loses_what_its_docstring_says(t):
    """Flat data, variance exploding: x_{t-1} | x_t is N(x_t, sigma_t^2 - sigma_{t-1}^2) exactly, and x_0-hat = x_t."""
    schedule = pyrodiff.GeometricSchedule(T, 0.3, 20.0)
    step = SIGMAS[t - 1] ** 2 - SIGMAS[t - 2] ** 2
    x_t, _ = states(6, 3)
    costs = []
    for variance in (pyrodiff.PosteriorVariance(), pyrodiff.ForwardVariance()):
        law = kernel(schedule, "data", x_t, x_t, t, variance)
        close(law.mean, x_t)
        costs.append(0.5 * (law.variance.log() + step / law.variance))  # -E log p, less log(2 pi) / 2
    r = (SIGMAS[t - 1] / SIGMAS[t - 2]) ** 2
    close(costs[0] - costs[1], np.full((6, 3), 0.5 * (r - 1 - np.log(r))))
    log_snr = schedule.log_snr(torch.arange(T + 1))
    close((log_snr[t - 1] - log_snr[t]).exp(), r)
    best = oracles.normal_kl(0, step, 0, law.variance.numpy())
    close(best, np.zeros((6, 3)))


# L_{t-1}


@every_preserving
@pytest.mark.parametrize("t", range(2, T + 1))
def test_the_four_forms_of_the_denoising_term_are_the_divergence(name, t):
    """Luo Eqs. 99, 130, 148 and 110, with sigma_t^2 = beta-tilde_t."""
    schedule, betas = PRESERVING[name]
    beta, alpha, alpha_bar = tables(betas)
    x_0, output = states(6, 3)
    eps = torch.randn(6, 3, dtype=torch.float64)
    x_t = np.sqrt(alpha_bar[t]) * x_0 + np.sqrt(1 - alpha_bar[t]) * eps
    posterior = pyrodiff.GaussianForward(schedule).posterior(x_t, x_0, t)
    sigma_squared = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    snr = alpha_bar / np.maximum(1 - alpha_bar, 1e-300)
    score = -eps / np.sqrt(1 - alpha_bar[t])
    forms = {
        "data": [
            alpha_bar[t - 1] * beta[t] ** 2 / (1 - alpha_bar[t]) ** 2 / (2 * sigma_squared) * (output - x_0) ** 2,
            0.5 * (snr[t - 1] - snr[t]) * (output - x_0) ** 2,
        ],
        "noise": [beta[t] ** 2 / (2 * sigma_squared * alpha[t] * (1 - alpha_bar[t])) * (output - eps) ** 2],
        "score": [beta[t] ** 2 / (2 * sigma_squared * alpha[t]) * (output - score) ** 2],
    }
    for prediction, terms in forms.items():
        law = kernel(schedule, prediction, output, x_t, t, pyrodiff.PosteriorVariance())
        for term in terms:
            close(kl_divergence(posterior, law), term.sum(-1), rtol=1e-10)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_half_the_fall_of_the_snr_also_where_variance_explodes(t):
    schedule = pyrodiff.GeometricSchedule(T, 0.3, 20.0)
    x_0, output = states(6, 3)
    x_t = x_0 + SIGMAS[t - 1] * torch.randn(6, 3, dtype=torch.float64)
    law = kernel(schedule, "data", output, x_t, t, pyrodiff.PosteriorVariance())
    fall = SIGMAS[t - 2] ** -2 - SIGMAS[t - 1] ** -2
    divergence = kl_divergence(pyrodiff.GaussianForward(schedule).posterior(x_t, x_0, t), law)
    close(divergence, (0.5 * fall * (output - x_0) ** 2).sum(-1), rtol=1e-10)


@every_preserving
@pytest.mark.parametrize("t", range(2, T + 1))
def test_with_other_variances_the_divergence_gains_what_two_normals_differ_by(name, t):
    schedule, betas = PRESERVING[name]
    beta, _, alpha_bar = tables(betas)
    x_0, output = states(6, 3)
    x_t = np.sqrt(alpha_bar[t]) * x_0 + np.sqrt(1 - alpha_bar[t]) * torch.randn(6, 3, dtype=torch.float64)
    tilde = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    weight = np.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t])
    posterior = pyrodiff.GaussianForward(schedule).posterior(x_t, x_0, t)
    for variance, sigma_squared in ((pyrodiff.ForwardVariance(), beta[t]), (pyrodiff.FixedVariance([0.4] * T), 0.4)):
        law = kernel(schedule, "data", output, x_t, t, variance)
        expected = oracles.normal_kl(weight * x_0.numpy(), tilde, weight * output.numpy(), sigma_squared).sum(-1)
        close(kl_divergence(posterior, law), expected, rtol=1e-9)


# bits


def bit_kernel(q, logits, x_t, t):
    return pyrodiff.BinomialReverse(q, pyrodiff.LogitPrediction(Returns(logits), q))(x_t, t)


@every_rate
@pytest.mark.parametrize("name", ["reciprocal", "linear"])
def test_the_bit_kernel_is_the_posterior_summed_over_both_x_0(rate, name):
    schedule, betas = {
        "reciprocal": (pyrodiff.ReciprocalSchedule(T), oracles.reciprocal_betas(T)),
        "linear": (pyrodiff.LinearSchedule(T, 0.01, 0.4), oracles.linear_betas(T, 0.01, 0.4)),
    }[name]
    q = pyrodiff.BinomialForward(schedule, rate)
    logits = 1.5 * torch.randn(6, 3, dtype=torch.float64) + 0.7
    believed = 1 / (1 + np.exp(-logits.numpy()))
    x_t = torch.randint(2, (6, 3)).double()
    rates = torch.as_tensor(rate, dtype=torch.float64).expand(3).tolist()
    for t in range(1, T + 1):
        expected = believed.copy()  # at t = 1 it is what the denoiser believes
        if t > 1:
            for i, d in np.ndindex(6, 3):
                of_one, of_zero = (
                    oracles.bit_posterior(betas, rates[d], int(x_t[i, d]), x_0, t, t - 1)[1] for x_0 in (1, 0)
                )
                expected[i, d] = believed[i, d] * of_one + (1 - believed[i, d]) * of_zero
        law = bit_kernel(q, logits, x_t, t)
        assert (law.batch_shape, law.event_shape) == ((6,), (3,))
        close(law.base_dist.probs, expected, rtol=1e-12)
        close(bit_kernel(q, logits, x_t, torch.full((6,), t)).base_dist.probs, expected, rtol=1e-12)
        value = torch.randint(2, (6, 3)).double()
        close(law.log_prob(value), np.log(np.where(value == 1, expected, 1 - expected)).sum(-1))


def test_bit_kernels_at_a_time_for_each_are_those_one_by_one():
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.2)
    t = torch.tensor([[2, 7, 1], [5, 1, 3]])
    x_t, logits = torch.randint(2, (2, 3, 4)).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    law = bit_kernel(q, logits, x_t, t)
    assert (law.batch_shape, law.event_shape) == ((2, 3), (4,))
    for p, i in np.ndindex(2, 3):
        one = bit_kernel(q, logits[p, i : i + 1], x_t[p, i : i + 1], int(t[p, i]))
        close(one.base_dist.probs[0], law.base_dist.probs[p, i], rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [1, 7, 2000])
def test_a_sure_denoiser_has_finite_log_probabilities_and_gradients(dtype, num_steps):
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps), 0.2)
    x_t, value, logits = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0), torch.tensor([-60.0, 60.0])).T
    x_t, value = x_t[:, None].to(dtype), value[:, None].to(dtype)
    logits = logits[:, None].to(dtype).requires_grad_()
    for t in {1, min(2, num_steps), (num_steps + 1) // 2, num_steps}:
        law = bit_kernel(q, logits, x_t, t)
        log_prob = law.log_prob(value)
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        assert log_prob.isfinite().all()
        assert gradient.isfinite().all()
        if t > 1:
            for x_0 in (torch.zeros_like(x_t), torch.ones_like(x_t)):
                divergence = kl_divergence(q.posterior(x_t, x_0, t), bit_kernel(q, logits, x_t, t))
                (gradient,) = torch.autograd.grad(divergence.sum(), logits)
                assert divergence.isfinite().all()
                assert gradient.isfinite().all()
        elif num_steps == 1:
            close(log_prob.detach(), np.where(value[:, 0] * 120 - 60 == logits[:, 0].detach(), 0, -60), rtol=1e-6)


# decoders


def test_the_gaussian_decoder_is_the_kernel():
    x_t, output = states(6, 3)
    law = kernel(pyrodiff.BetaSchedule(BETAS), "data", output, x_t, 1)
    assert pyrodiff.GaussianDecoder()(law, x_t) is law


def test_the_transition_decoder_is_the_forward_kernel_run_from_x_1():
    x_1, output = states(6, 3)
    learned = kernel(pyrodiff.BetaSchedule(BETAS), "data", output, x_1, 1)
    law = pyrodiff.TransitionDecoder(pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS)))(learned, x_1)
    assert (law.batch_shape, law.event_shape) == ((6,), (3,))
    close(law.mean, np.sqrt(1 - BETAS[0]) * x_1)
    close(law.variance, np.full((6, 3), BETAS[0]))


def test_the_transition_decoder_of_bits_flips_as_the_first_step_does():
    x_1 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    q = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS), 0.2)
    law = pyrodiff.TransitionDecoder(q)(bit_kernel(q, torch.zeros_like(x_1), x_1, 1), x_1)
    expected = oracles.bit_matrix(BETAS, 0.2, 0, 1)
    close(law.mean[:, 0], [expected[0][1], expected[1][1]])


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
def test_decoders_keep_the_shapes_of_a_kernel_of_particles(event_shape):
    q = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS))
    x_1, output = states(2, 6, *event_shape)
    law = kernel(q.schedule, "data", output, x_1, torch.ones(2, 6, dtype=torch.long))
    for decoder in (pyrodiff.GaussianDecoder(), pyrodiff.TransitionDecoder(q)):
        decoded = decoder(law, x_1)
        assert (decoded.batch_shape, decoded.event_shape) == ((2, 6), event_shape)


# one kernel in several programs


def test_a_kernel_that_has_been_called_can_stand_in_a_diffusion():
    q = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS))
    reverse = pyrodiff.GaussianReverse(q, pyrodiff.NoisePrediction(Returns(torch.zeros(6, 3)), q))
    reverse(torch.ones(6, 3), 2)
    for _ in range(2):
        diffusion = pyrodiff.Diffusion(q, reverse, event_shape=(3,))
        for _ in range(2):
            assert diffusion.model(num_samples=6).shape == (6, 3)
            diffusion.one_step().model(torch.ones(6, 3))


@pytest.mark.parametrize("other", [forward_processes.Bits, dist.Bernoulli])
def test_the_kl_of_bits_is_finite_wherever_the_log_odds_are(other):
    """In float32 torch's is infinite where a probability rounds to 1; the truth is computed in float64."""
    q, p = torch.tensor([10.0, -10.0, 3.0, 40.0, -300.0]), torch.tensor([18.0, -110.0, -2.0, -40.0, 0.5])
    kl = kl_divergence(forward_processes.Bits(logits=q), other(logits=p))
    softplus, q, p = torch.nn.functional.softplus, q.double(), p.double()
    truth = q.sigmoid() * (softplus(-p) - softplus(-q)) + (-q).sigmoid() * (softplus(p) - softplus(q))
    torch.testing.assert_close(kl.double(), truth, rtol=1e-4, atol=1e-6)
    assert kl_divergence(
        forward_processes.Bits(logits=torch.tensor(torch.inf)), forward_processes.Bits(logits=torch.tensor(1.0))
    ).isfinite()
