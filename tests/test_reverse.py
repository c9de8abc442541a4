"""Reverse kernels against Luo's equations, explicit sums over the data and closed-form divergences."""

from functools import partial

import cases
import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from cases import DENOISERS, PRESERVING, PROCESSES, TIMES, Returns, T, Timed, every_reverse, same_law
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff.process import forward as forward_processes

close = partial(cases.close, rtol=1e-10, atol=1e-10)
D = 3
EXPLODING = PROCESSES["GaussianForward, GeometricSchedule"]
SIGMAS = oracles.geometric_sigmas(T, 0.3, 20.0)
every_preserving = pytest.mark.parametrize("name", PRESERVING)


def states(*shape):
    """x_t and a network's output: unrelated numbers of mean 0.7 and variance 2.3."""
    return (cases.normal(*shape) for _ in range(2))


def output_of(reverse, shape):
    outputs = reverse.denoiser.outputs
    return 1.5 * torch.randn(*shape, *[outputs] * (outputs is not None), dtype=torch.float64) + 0.7


def kernel(forward, prediction, output, x_t, t, variance=None):
    denoiser = DENOISERS[f"{prediction}Prediction"].make(Returns(output), forward)
    return pyrodiff.GaussianReverse(forward, denoiser, variance)(x_t, t)


# What every reverse process is


@every_reverse
def test_the_kernel_is_the_posterior_at_what_the_denoiser_says(reverse):
    """Of bits, the posterior summed over both x_0, or D3PM's joint one; at t = 1, what the denoiser says."""
    x_t, output = reverse.process.draw(6, D), output_of(reverse, (6, D))
    made = reverse.of(Returns(output))
    for t in range(1, T + 1):
        x_0 = reverse.says(x_t, output, t)
        expected = reverse.kernel(reverse.process, x_t, x_0, t - 1, t)
        for law in (made(x_t, t), made(x_t, torch.full((6,), t))):
            assert (law.batch_shape, law.event_shape) == ((6,), (D,))
            same_law(law, expected)
        if t == 1:
            close(made(x_t, t).mean, x_0, rtol=1e-13)


@every_reverse
def test_the_kernel_of_a_shorter_chain_is_that_of_the_longer_steps(reverse):
    """And its network is asked at the times of the whole chain."""
    network, x_t = Timed(reverse.denoiser.outputs), reverse.process.draw(4, D)
    made = reverse.of(network)
    for times in TIMES.values():
        sub = made.subchain(made.forward_process.subchain(times))
        assert type(sub) is type(made)
        assert {id(p) for p in sub.parameters()} == {id(p) for p in made.parameters()}
        for k, (s, t) in enumerate(zip((0, *times), times, strict=False), 1):
            x_0 = reverse.says(x_t, network(x_t, torch.full((4,), t)), t)
            expected = reverse.kernel(reverse.process, x_t, x_0, s, t)
            for step in (k, torch.full((4,), k)):
                same_law(sub(x_t, step), expected)


@every_reverse
@pytest.mark.parametrize("event_shape", [(), (D,), (2, D)])
def test_a_time_for_each_gives_the_kernels_one_by_one(reverse, event_shape):
    if event_shape == () and len(getattr(reverse.process, "rates", "1")) > 1:
        event_shape = (1, D)
    t = torch.tensor([[2, 7, 1], [5, 1, 3]])
    x_t, output = reverse.process.draw(2, 3, *event_shape), output_of(reverse, (2, 3, *event_shape))
    cases.one_by_one(lambda t, x_t, output: reverse.of(Returns(output))(x_t, t), t, x_t, output)


@every_reverse
def test_the_dtype_is_that_of_the_state_and_the_draws_are_the_kernels(reverse):
    x_t, output = reverse.process.draw(2, D), output_of(reverse, (2, D))
    for dtype in (torch.float32, torch.float64):
        for t in (1, 3, torch.tensor([1, 3])):
            assert reverse.of(Returns(output.to(dtype)))(x_t.to(dtype), t).sample().dtype == dtype
    expected = reverse.kernel(reverse.process, x_t, reverse.says(x_t, output, 5), 4, 5)
    cases.drawn(reverse.of(Returns(output))(x_t, 5), expected, 10_000)


@every_reverse
def test_copies_and_states_say_the_same_and_the_network_learns(reverse):
    x_t, t = reverse.process.draw(5, D), torch.arange(1, 6)
    made, other = (reverse.of(Timed(reverse.denoiser.outputs)) for _ in range(2))
    torch.nn.init.constant_(other.denoiser.network.weight, 0.9)
    expected = made(x_t, t).mean
    assert not torch.equal(other(x_t, t).mean, expected)
    for one in cases.copies(made, other):
        assert torch.equal(one(x_t, t).mean, expected)
    made(x_t, t).log_prob(reverse.process.draw(5, D)).sum().backward()
    assert all(p.grad.isfinite() and p.grad != 0 for p in made.parameters())
    assert repr(made).startswith(f"{type(made).__name__}(")


@every_reverse
def test_times_that_cannot_be_are_refused(reverse):
    x_t, output = reverse.process.draw(2, D), output_of(reverse, (2, D))
    made = reverse.of(Returns(output))
    for one in (made, made.subchain(made.forward_process.subchain(range(1, T + 1)))):
        for t in (0, *cases.BAD_TIMES):
            cases.refused(lambda one=one, t=t: one(x_t, t), "t")


@every_reverse
def test_a_kernel_that_has_been_called_can_stand_in_a_diffusion(reverse):
    made = reverse.of(Returns(output_of(reverse, (6, D)).float()))
    x_0 = reverse.process.draw(6, D).float()
    made(x_0, 2)
    for _ in range(2):
        diffusion = pyrodiff.Diffusion(made.forward_process, made, event_shape=(D,))
        for _ in range(2):
            assert diffusion.model(num_samples=6).shape == (6, D)
            diffusion.one_step().model(x_0)


# Gaussians: the mean, in the words of the papers


@every_preserving
def test_the_mean_is_that_of_luo_94_125_and_143(name):
    process = PROCESSES[f"GaussianForward, {name}"]
    alpha = np.array([1.0] + [1 - beta for _, beta in process.schedule.steps(T)])
    alpha_bar, forward = alpha.cumprod(), process.make()
    for t in range(1, T + 1):
        x_t, output = states(6, D)
        luo = {
            "Data": (  # Eq. 94
                np.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) * x_t + np.sqrt(alpha_bar[t - 1]) * (1 - alpha[t]) * output
            )
            / (1 - alpha_bar[t])
        }
        if alpha_bar[T] > 0:
            luo["Noise"] = (x_t - (1 - alpha[t]) / np.sqrt(1 - alpha_bar[t]) * output) / np.sqrt(alpha[t])  # Eq. 125
            luo["Score"] = (x_t + (1 - alpha[t]) * output) / np.sqrt(alpha[t])  # Eq. 143
        for prediction, mean in luo.items():
            close(kernel(forward, prediction, output, x_t, t).mean, mean)


def test_where_variance_explodes_the_mean_is_a_step_along_the_score():
    """x_t + (sigma_t^2 - sigma_{t-1}^2) s: Song and others (2021), Eq. 47."""
    forward = EXPLODING.make()
    for t in range(1, T + 1):
        before, after = ([0.0, *SIGMAS][u] ** 2 for u in (t - 1, t))
        x_t, output = states(6, D)
        close(kernel(forward, "Score", output, x_t, t).mean, x_t + (after - before) * output)
        close(kernel(forward, "Noise", output, x_t, t).mean, x_t - (after - before) / after**0.5 * output)
        close(kernel(forward, "Data", output, x_t, t).mean, (before * x_t + (after - before) * output) / after)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_on_flat_data_the_posterior_variance_loses_what_its_docstring_says(t):
    """Flat data, variance exploding: x_{t-1} | x_t is N(x_t, sigma_t^2 - sigma_{t-1}^2) exactly, and x_0-hat = x_t."""
    step, (x_t, _), forward = SIGMAS[t - 1] ** 2 - SIGMAS[t - 2] ** 2, states(6, D), EXPLODING.make()
    costs = []
    for variance in (pyrodiff.PosteriorVariance(), pyrodiff.ForwardVariance()):
        law = kernel(forward, "Data", x_t, x_t, t, variance)
        close(law.mean, x_t)
        costs.append(0.5 * (law.variance.log() + step / law.variance))  # -E log p, less log(2 pi) / 2
    r = (SIGMAS[t - 1] / SIGMAS[t - 2]) ** 2
    close(costs[0] - costs[1], np.full((6, D), 0.5 * (r - 1 - np.log(r))))
    log_snr = forward.schedule.log_snr(torch.arange(T + 1))
    close((log_snr[t - 1] - log_snr[t]).exp(), r)
    close(oracles.normal_kl(0, step, 0, law.variance.numpy()), np.zeros((6, D)))


# L_{t-1}


@every_preserving
def test_the_four_forms_of_the_denoising_term_are_the_divergence(name):
    """Luo Eqs. 99, 130, 148 and 110, with sigma_t^2 = beta-tilde_t."""
    process = PROCESSES[f"GaussianForward, {name}"]
    beta = np.array([0.0] + [beta for _, beta in process.schedule.steps(T)])
    alpha, alpha_bar, forward = 1 - beta, (1 - beta).cumprod(), process.make()
    for t in range(2, T + 1):
        (x_0, output), eps = states(6, D), torch.randn(6, D, dtype=torch.float64)
        x_t = np.sqrt(alpha_bar[t]) * x_0 + np.sqrt(1 - alpha_bar[t]) * eps
        sigma_squared = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        snr = alpha_bar / np.maximum(1 - alpha_bar, 1e-300)
        score = -eps / np.sqrt(1 - alpha_bar[t])
        forms = {
            "Data": [
                alpha_bar[t - 1] * beta[t] ** 2 / (1 - alpha_bar[t]) ** 2 / (2 * sigma_squared) * (output - x_0) ** 2,
                0.5 * (snr[t - 1] - snr[t]) * (output - x_0) ** 2,
            ]
        }
        if alpha_bar[T] > 0:
            scale = beta[t] ** 2 / (2 * sigma_squared * alpha[t])
            forms["Noise"] = [scale / (1 - alpha_bar[t]) * (output - eps) ** 2]
            forms["Score"] = [scale * (output - score) ** 2]
        for prediction, terms in forms.items():
            law = kernel(forward, prediction, output, x_t, t, pyrodiff.PosteriorVariance())
            for term in terms:
                close(kl_divergence(forward.posterior(x_t, x_0, t), law), term.sum(-1))


@pytest.mark.parametrize("t", range(2, T + 1))
def test_half_the_fall_of_the_snr_also_where_variance_explodes(t):
    (x_0, output), forward = states(6, D), EXPLODING.make()
    x_t = x_0 + SIGMAS[t - 1] * torch.randn(6, D, dtype=torch.float64)
    law = kernel(forward, "Data", output, x_t, t, pyrodiff.PosteriorVariance())
    fall = SIGMAS[t - 2] ** -2 - SIGMAS[t - 1] ** -2
    divergence = kl_divergence(forward.posterior(x_t, x_0, t), law)
    close(divergence, (0.5 * fall * (output - x_0) ** 2).sum(-1))


@every_preserving
def test_with_other_variances_the_divergence_gains_what_two_normals_differ_by(name):
    process = PROCESSES[f"GaussianForward, {name}"]
    forward = process.make()
    for t in range(2, T + 1):
        (x_0, output), (a, b) = states(6, D), cases.scales(process, t)
        x_t, beta = a * x_0 + b * torch.randn(6, D, dtype=torch.float64), process.transition(0, t - 1, t)[1]
        mean, tilde = process.posterior(x_t, x_0, t - 1, t)
        for variance, sigma_squared in ((None, beta), (pyrodiff.FixedVariance([0.4] * T), 0.4)):
            law = kernel(forward, "Data", output, x_t, t, variance)
            expected = oracles.normal_kl(mean, tilde, process.posterior(x_t, output, t - 1, t)[0], sigma_squared)
            close(kl_divergence(forward.posterior(x_t, x_0, t), law), expected.sum(-1), rtol=1e-9)


# Bits


KINDS = {"binomial": pyrodiff.BinomialReverse, "D3PM": pyrodiff.D3PMReverse}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
CHAIN, RATES = [0.3, 0.15, 0.6, 0.4], [0.2, 0.5, 0.83]


def bit_processes():
    for betas in (CHAIN, oracles.reciprocal_betas(4), oracles.linear_betas(5, 0.02, 0.5), [0.4]):
        for rate in RATES:
            yield betas, rate, pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate)


def ones(kind, q, beliefs):
    """The probabilities that a kernel has of a 1, at states 0 and 1 for each belief, with shape (2, len(beliefs))."""
    logits = torch.logit(torch.tensor(beliefs, dtype=torch.float64))
    x_t = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(2, len(beliefs))
    reverse = kind(q, pyrodiff.LogitPrediction(Returns(logits.expand(2, -1)), q))
    return lambda t: reverse(x_t, t).mean


def test_the_two_kernels_are_the_same_where_the_belief_is_sure_and_others_where_it_is_not():
    """A sure belief leaves the forward posterior; elsewhere x_t counts once more in D3PM's."""
    for _, rate, q in bit_processes():
        laws = [ones(kind, q, [1e-14, 1 - 1e-14, 0.35, 0.8]) for kind in KINDS.values()]
        for t in range(2, q.num_steps + 1):
            ours, theirs = (law(t) for law in laws)
            close(ours[:, :2], theirs[:, :2], rtol=1e-9, atol=1e-12)
            q_t = float(q.schedule.alpha_bar(t))
            if q_t > 1e-9:  # where the data are forgotten, x_t says nothing of them
                assert (ours[:, 2:] - theirs[:, 2:]).abs().min() > 1e-4 * q_t * min(rate, 1 - rate)
        close(laws[0](1), laws[1](1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.7])
def test_with_the_exact_belief_the_mixture_is_the_reverse_of_the_chain_and_d3pms_is_not(part):
    """Of independent data with such a part of ones: q(x_s | x_t) by Bayes' rule, from the matrices alone."""
    for betas, rate, q in bit_processes():
        law = np.array([1 - part, part])
        for t in range(1, len(betas) + 1):
            whole, first, second = (
                np.array(oracles.bit_matrix(betas, rate, *span), dtype=float)
                for span in ((0, t), (0, t - 1), (t - 1, t))
            )
            before = law @ first
            truth = before[1] * second[1] / (before @ second)
            belief = law[1] * whole[1] / (law @ whole)
            mixed, d3pm = (ones(kind, q, belief.tolist())(t).diagonal() for kind in KINDS.values())
            close(mixed, truth, rtol=1e-11, atol=0)
            if t == 1:
                close(d3pm, truth, rtol=1e-11, atol=0)
            elif float(q.schedule.alpha_bar(t)) > 1e-9:
                assert (d3pm - torch.from_numpy(truth)).abs().min() > 1e-4


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [1, 7, 2000])
def test_sure_beliefs_have_finite_log_probabilities_and_gradients(kind, dtype, num_steps):
    """So has their KL from the posterior, of either x_0."""
    q = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps), 0.2)
    odds = torch.tensor([-150.0, -60.0, 0.5, 60.0, 150.0])
    x_t, value, logits = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0), odds).T.to(dtype)[..., None]
    logits = logits.clone().requires_grad_()
    reverse = kind(q, pyrodiff.LogitPrediction(Returns(logits), q))
    for t in sorted({1, min(2, num_steps), (num_steps + 1) // 2, num_steps}):
        for time in (t, torch.full((len(x_t),), t)):
            law = reverse(x_t, time)
            found = [law.log_prob(value)]
            found += [kl_divergence(q.posterior(x_t, torch.full_like(x_t, x_0), t), law) for x_0 in (0, 1) if t > 1]
            for one in found:
                (gradient,) = torch.autograd.grad(one.sum(), logits, retain_graph=True)
                assert bool(one.isfinite().all()), t
                assert bool(gradient.isfinite().all()), t
        if num_steps == 1:
            right = (2 * value - 1) * logits.detach()
            close(found[0].detach(), torch.nn.functional.logsigmoid(right)[:, 0], rtol=1e-6)


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
