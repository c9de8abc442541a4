"""The trajectory pair is p(x_0:T) and q(x_1:T | x_0): where both are known, they agree draw by draw."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from exact import Gaussian, GaussianPosterior, far, gaussian_diffusion, gradient, repeat
from pyro import poutine
from pyro.infer import Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrodiff

M = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64)
V = torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)
X_0 = torch.tensor([[0.2, -2.0, 1.5], [1.1, 0.4, 3.0], [-4.0, 5.0, 0.0]], dtype=torch.float64)

SCHEDULES = {
    "linear": lambda T: pyrodiff.LinearSchedule(T, 0.01, 0.4),
    "cosine": pyrodiff.CosineSchedule,
    "reciprocal": pyrodiff.ReciprocalSchedule,
    "beta": lambda T: pyrodiff.BetaSchedule([0.05 + 0.3 * math.sin(t) ** 2 for t in range(1, T + 1)]),
    "geometric": lambda T: pyrodiff.GeometricSchedule(T, 0.02, 20.0),
}


def log_normal(x, m, v):
    """log N(x; m, v), summed over all dimensions but the first."""
    x, m, v = x.numpy(), m.numpy(), v.numpy()
    density = -0.5 * np.log(2 * np.pi * v) - 0.5 * (x - m) ** 2 / v
    return torch.from_numpy(density.reshape(len(x), -1).sum(-1))


def traces(model, guide, x_0):
    guide_trace = poutine.trace(guide).get_trace(x_0)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x_0)
    return model_trace, guide_trace


def log_prob(trace):
    """The log density of a trace, with shape (B,)."""
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample" and "log_prob" in site)


def sites(trace):
    return [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "data"]


@pytest.mark.parametrize("T", [1, 2, 7, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_single_draw_of_the_log_ratio_is_the_log_density_of_the_data(name, T):
    diffusion = gaussian_diffusion(SCHEDULES[name](T), M, V)
    for _ in range(3):
        p, q = (log_prob(trace) for trace in traces(diffusion.model, diffusion.guide, X_0))
        torch.testing.assert_close(p - q, log_normal(X_0, M, V), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_single_draw_of_the_gradient_is_that_of_the_log_density(name):
    diffusion = gaussian_diffusion(SCHEDULES[name](7), M, V)
    p, q = (log_prob(trace) for trace in traces(diffusion.model, diffusion.guide, X_0))
    data = diffusion.model.prior
    expected = dist.Normal(data.m, data.v.sqrt()).to_event(1).log_prob(X_0)
    torch.testing.assert_close(
        gradient((p - q).sum(), diffusion), gradient(expected.sum(), diffusion), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("as_module", [True, False])
def test_every_event_shape_and_kind_of_prior(event_shape, as_module):
    m, v = torch.randn(event_shape, dtype=torch.float64), torch.rand(event_shape, dtype=torch.float64) + 0.5
    schedule = SCHEDULES["linear"](5)
    data = Gaussian(m, v, schedule)
    mean, variance = (moment.detach() for moment in data.moments(5))
    prior = data if as_module else dist.Normal(mean, variance.sqrt()).to_event(len(event_shape))
    forward = pyrodiff.GaussianForward(schedule)
    diffusion = pyrodiff.Diffusion(forward, GaussianPosterior(data), event_shape, prior=prior)
    x_0 = torch.randn((4, *event_shape), dtype=torch.float64)
    p, q = traces(diffusion.model, diffusion.guide, x_0)
    torch.testing.assert_close(log_prob(p) - log_prob(q), log_normal(x_0, m, v), rtol=0, atol=1e-10)
    assert diffusion.model(num_samples=6).shape == (6, *event_shape)
    for one_step in (diffusion.one_step(), diffusion.one_step(pyrodiff.LowDiscrepancyDrawing())):
        terms = pyrodiff.DiffusionELBO().terms(one_step.model, one_step.guide, x_0)
        assert {name: term.shape for name, term in terms.items()} == dict.fromkeys(("x_T", "x_s", "x_0"), (4,))


def test_sites_run_from_x_T_to_x_0_in_both_programs():
    diffusion = gaussian_diffusion(SCHEDULES["cosine"](4), M, V)
    model_trace, guide_trace = traces(diffusion.model, diffusion.guide, X_0)
    assert sites(guide_trace) == ["x_4", "x_3", "x_2", "x_1"]
    assert sites(model_trace) == ["x_4", "x_3", "x_2", "x_1", "x_0"]
    assert [name for name in sites(model_trace) if model_trace.nodes[name]["is_observed"]] == ["x_0"]
    for trace in (model_trace, guide_trace):
        for name in sites(trace):
            (frame,) = trace.nodes[name]["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("data", -1, 3)


@pytest.mark.parametrize("name", ["linear", "geometric", "reciprocal"])
def test_the_model_generates_the_data_law(name):
    diffusion = gaussian_diffusion(SCHEDULES[name](7), M, V)
    x_0 = diffusion.model(num_samples=20000).detach()
    assert x_0.dtype == torch.float64
    assert not far(x_0, M)
    assert not far((x_0 - M) ** 2, V)
    assert not far((x_0[:, 0] - M[0]) * (x_0[:, 1] - M[1]), 0.0)


def test_the_guide_draws_the_law_of_the_forward_chain():
    schedule = SCHEDULES["linear"](3)
    diffusion = gaussian_diffusion(schedule, M, V)
    trace = poutine.trace(diffusion.guide).get_trace(X_0[:1].expand(20000, 3))
    x = {t: trace.nodes[f"x_{t}"]["value"][:, 0] for t in (1, 2, 3)}
    beta = [0.0, 0.01, 0.205, 0.4]
    alpha_bar = np.cumprod(1 - np.array(beta))
    for s in (1, 2, 3):
        assert not far(x[s], math.sqrt(alpha_bar[s]) * 0.2)
        for t in (1, 2, 3):
            low, high = min(s, t), max(s, t)
            covariance = math.sqrt(alpha_bar[high] / alpha_bar[low]) * (1 - alpha_bar[low])
            deviations = [x[k] - math.sqrt(alpha_bar[k]) * 0.2 for k in (s, t)]
            assert not far(deviations[0] * deviations[1], covariance)


def test_data_observed_through_condition_score_as_data_given():
    diffusion = gaussian_diffusion(SCHEDULES["linear"](4), M, V)
    given, guide_trace = traces(diffusion.model, diffusion.guide, X_0)
    conditioned = poutine.replay(poutine.condition(diffusion.model, data={"x_0": X_0}), trace=guide_trace)
    trace = poutine.trace(conditioned).get_trace(num_samples=3)
    assert trace.nodes["x_0"]["is_observed"]
    torch.testing.assert_close(log_prob(trace), log_prob(given))
    assert torch.equal(trace.nodes["_RETURN"]["value"], X_0)


def test_the_start_of_the_chain_can_be_conditioned_on():
    diffusion = gaussian_diffusion(SCHEDULES["linear"](2), M, V)
    x_2 = torch.full((20000, 3), 1.5, dtype=torch.float64)
    x_0 = poutine.condition(diffusion.model, data={"x_2": x_2})(num_samples=20000).detach()
    a, b = 0.99 * 0.6, 1 - 0.99 * 0.6  # x_2 = sqrt(a) x_0 + sqrt(b) noise
    mean = M + V * math.sqrt(a) / (a * V + b) * (1.5 - math.sqrt(a) * M)
    assert not far(x_0, mean)
    assert not far((x_0 - mean) ** 2, V * b / (a * V + b))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_chains(parallel):
    diffusion = gaussian_diffusion(SCHEDULES["linear"](3), M, V)
    draws = Predictive(diffusion.model, num_samples=5, parallel=parallel)(num_samples=2000)
    assert {name: draw.shape for name, draw in draws.items()} == dict.fromkeys(
        ("x_3", "x_2", "x_1", "x_0"), (5, 2000, 3)
    )
    assert not far(draws["x_0"].flatten(0, 1).detach(), M)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("vectorize_particles", [True, False])
def test_the_importance_weighted_bound_is_exact_where_the_kernels_are(alpha, vectorize_particles):
    diffusion = gaussian_diffusion(SCHEDULES["linear"](6), M, V)
    renyi = RenyiELBO(alpha, 8, max_plate_nesting=1, vectorize_particles=vectorize_particles)
    loss = renyi.loss(diffusion.model, diffusion.guide, X_0)
    assert loss == pytest.approx(-float(log_normal(X_0, M, V).sum()), abs=1e-9)


def test_the_importance_weighted_bound_is_tighter_on_both_pairs():
    diffusion = gaussian_diffusion(SCHEDULES["linear"](6), M, V, shift=0.2, widen=1.2)
    for pair in (diffusion, diffusion.one_step(), diffusion.one_step(pyrodiff.LowDiscrepancyDrawing())):
        losses = []
        for elbo in (RenyiELBO(0, 500, 1, vectorize_particles=True), Trace_ELBO(500, 1, vectorize_particles=True)):
            torch.manual_seed(5)  # the same draws: Jensen's inequality then holds without an error
            losses.append(elbo.loss(pair.model, pair.guide, X_0))
        assert losses[0] < losses[1]


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, pyrodiff.DiffusionELBO])
def test_vectorised_particles_give_the_same_mean_on_both_pairs(elbo):
    diffusion = gaussian_diffusion(SCHEDULES["geometric"](4), M, V)
    for pair in (diffusion, diffusion.one_step(), diffusion.one_step(pyrodiff.LowDiscrepancyDrawing())):
        loss = elbo(num_particles=125, vectorize_particles=True, max_plate_nesting=1).loss
        draws = repeat(24, lambda pair=pair, loss=loss: loss(pair.model, pair.guide, X_0))
        assert not far(draws, -float(log_normal(X_0, M, V).sum()))


def unit_second_moment(n, event_shape):
    """Data whose empirical second moment is 1 in each dimension, and whose mean is not 0."""
    x = torch.randn((n, *event_shape), dtype=torch.float64) + 0.8
    return x / (x**2).mean(0).sqrt()


class LinearKernel(nn.Module):
    """N(0.9 x_t + 0.1 t, 0.3 t), which is nobody's posterior."""

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype)
        t = t.reshape(t.shape + (1,) * (x_t.dim() - t.dim()))
        return dist.Normal(0.9 * x_t + 0.1 * t, (0.3 * t).sqrt().expand(x_t.shape)).to_event(1)


def test_the_bound_with_sohl_dicksteins_first_step_is_K():
    beta, n = np.array([0.15, 0.2, 0.3, 0.5]), 40
    x_0 = unit_second_moment(n, (2,))
    assert float(x_0.mean()) > 0.3
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(beta.tolist()))
    diffusion = pyrodiff.Diffusion(forward, LinearKernel(), (2,), decoder=pyrodiff.TransitionDecoder(forward))

    alpha_bar = np.cumprod(1 - beta)
    x, divergence = x_0.numpy(), 0.0
    for t in (2, 3, 4):  # E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)): quadratic in the noise, so +-1 give its mean
        now, before, b = alpha_bar[t - 1], alpha_bar[t - 2], beta[t - 1]
        variance = b * (1 - before) / (1 - now)
        for noise in (-1.0, 1.0):
            x_t = np.sqrt(now) * x + np.sqrt(1 - now) * noise
            mean = (np.sqrt(before) * b * x + np.sqrt(1 - b) * (1 - before) * x_t) / (1 - now)
            ratio = variance / (0.3 * t)
            distance = (mean - 0.9 * x_t - 0.1 * t) ** 2 / (0.3 * t)
            divergence += 0.5 * (0.5 * (ratio - 1 - np.log(ratio) + distance)).sum(-1).mean()
    h_q_last, h_q_first, h_p = (2 * 0.5 * np.log(2 * np.pi * np.e * v) for v in (1 - alpha_bar[-1], beta[0], 1.0))
    K = -divergence + h_q_last - h_q_first - h_p

    bounds = [pyrodiff.bound(diffusion, x_0, num_particles=50) for _ in range(16)]
    assert float(bounds[0].prior.mean()) == pytest.approx(h_p - h_q_last, abs=1e-12)
    assert not far(torch.stack([b.reconstruction.mean() for b in bounds]), h_q_first)
    assert not far(torch.stack([b.denoising.sum(0).mean() for b in bounds]), divergence)
    assert not far(torch.stack([b.nats.mean() for b in bounds]), -K)
    one_step, many = diffusion.one_step(), x_0.repeat(4, 1)
    for pair in (diffusion, one_step):
        losses = repeat(50, lambda pair=pair: TraceMeanField_ELBO().loss(pair.model, pair.guide, many) / len(many))
        assert not far(losses, -K)

    x_1 = [np.sqrt(1 - beta[0]) * x_0 + np.sqrt(beta[0]) * noise for noise in (-1.0, 1.0)]
    scores = [-diffusion.model.decoded(diffusion.model.kernel(x, 1), x).log_prob(x_0).mean() for x in x_1]
    assert float(sum(scores)) / 2 == pytest.approx(h_q_first, abs=1e-12)


class CurvedKernel(nn.Module):
    """N(sin(2 x_1), 0.4), for one number."""

    def forward(self, x_t, t):
        return dist.Normal((2 * x_t).sin(), 0.4**0.5)


def test_one_step_in_all_is_the_elbo_of_a_variational_autoencoder():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1, 0.3, 0.4))
    diffusion = pyrodiff.Diffusion(forward, CurvedKernel(), event_shape=())
    x_0 = torch.tensor([0.4, -1.2, 2.0], dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    expected = []
    for x in x_0.tolist():
        divergence = 0.5 * (0.3 + 0.7 * x**2 - 1 - np.log(0.3))  # KL(N(sqrt(0.7) x, 0.3) || N(0, 1))
        mean = np.sin(2 * (np.sqrt(0.7) * x + np.sqrt(0.3) * nodes))
        expected.append(divergence + weights @ (0.5 * np.log(2 * np.pi * 0.4) + (x - mean) ** 2 / 0.8))
    elbo = pyrodiff.DiffusionELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    for pair in (diffusion, diffusion.one_step()):
        losses = torch.stack([sum(elbo.terms(pair.model, pair.guide, x_0).values()) for _ in range(30)])
        assert not far(losses, torch.tensor(expected))
    assert set(elbo.terms(diffusion.model, diffusion.guide, x_0)) == {"x_1", "x_0"}
    assert set(elbo.terms(diffusion.one_step().model, diffusion.one_step().guide, x_0)) == {"x_T", "x_0"}


def test_programs_and_parts_are_shared():
    diffusion = gaussian_diffusion(SCHEDULES["linear"](5), M, V)
    assert diffusion.num_steps == 5
    assert diffusion.event_shape == (3,)
    one_step = diffusion.one_step()
    assert one_step.model.reverse is diffusion.reverse
    assert one_step.guide.step.forward_process is diffusion.forward_process
    assert {id(p) for p in one_step.parameters()} == {id(p) for p in diffusion.parameters()}
    assert list(diffusion.guide.parameters()) == []
