"""The one-step pair has the trajectory pair's bound in the mean, in value and gradient, for one network call."""

import math

import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from computing import SCHEDULES, gaussian_network_diffusion, make
from exact import far, gaussian_diffusion, gradient, repeat
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyrodiff
from pyrodiff import BoundWeighting, DiffusionELBO, LowDiscrepancyDrawing, SimpleWeighting, UniformDrawing, networks

DRAWINGS = {"uniform": UniformDrawing, "low discrepancy": LowDiscrepancyDrawing}


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_the_noise_site_is_exact(kind):
    diffusion, x_0 = make(kind)
    pair = diffusion.one_step()
    T = SCHEDULES[kind].num_steps
    a, b = float(SCHEDULES[kind].signal(T)), float(SCHEDULES[kind].noise(T))
    variance = a**2 + b**2
    expected = 0.5 * (b**2 / variance - 1 - math.log(b**2 / variance) + (a * x_0) ** 2 / variance)
    terms = DiffusionELBO().terms(pair.model, pair.guide, x_0)
    torch.testing.assert_close(terms["x_T"], expected.sum(-1))
    torch.testing.assert_close(DiffusionELBO().terms(diffusion.model, diffusion.guide, x_0)["x_5"], expected.sum(-1))


@pytest.mark.parametrize("drawing", DRAWINGS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_exact_kernels_give_the_exact_density_in_mean(kind, drawing):
    m, v = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
    x_0 = torch.tensor([[1.0, 2.0], [0.0, -1.5], [3.0, -4.0]], dtype=torch.float64)
    diffusion = gaussian_diffusion(SCHEDULES[kind], m, v)
    pair = diffusion.one_step(DRAWINGS[drawing]())
    elbo = DiffusionELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.stack([sum(elbo.terms(pair.model, pair.guide, x_0).values()) for _ in range(50)]).detach()
    assert not far(draws, -dist.Normal(m, v.sqrt()).to_event(1).log_prob(x_0))


@pytest.mark.parametrize("T", [1, 2, 50, 2000])
def test_there_is_one_network_call_of_the_batch_whatever_T(T):
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T))
    network = networks.MLP((2,), hidden=8)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
    pair = pyrodiff.Diffusion(forward, reverse, (2,)).one_step()
    calls = []
    network.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    elbo = DiffusionELBO()
    elbo.differentiable_loss(pair.model, pair.guide, torch.ones(7, 2)).backward()
    assert calls == [7]


def test_the_uniform_drawing_draws_each_datum_by_itself():
    drawing = UniformDrawing()
    t = torch.stack([drawing(drawing.uniforms(torch.zeros(2)).sample(), 4)[0] for _ in range(4000)]).double() - 2.5
    assert not far(t[:, 0] * t[:, 1], 0.0)
    assert not far(t**2, 1.25)


class WideKernel(torch.nn.Module):
    """N(0, (10 t)^2), whose costs depend on t and on little else."""

    def forward(self, x_t, t):
        scale = 10 * torch.as_tensor(t, dtype=x_t.dtype).expand(x_t.shape[:-1])
        return dist.Normal(torch.zeros_like(x_t), scale[..., None]).to_event(1)


def test_the_low_discrepancy_drawing_lowers_the_variance():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(10, 0.05, 0.5))
    diffusion, x_0 = pyrodiff.Diffusion(forward, WideKernel(), (2,)), torch.tensor([1.2, -0.8]).expand(40, 2)
    elbo, variance = DiffusionELBO(), {}
    for name, drawing in DRAWINGS.items():
        pair = diffusion.one_step(drawing())
        variance[name] = repeat(60, lambda pair=pair: elbo.loss(pair.model, pair.guide, x_0)).var()
    assert variance["low discrepancy"] < 0.1 * variance["uniform"]


def step_of(pair, x_0, seed):
    """The times and states that the guide draws after the seed."""
    torch.manual_seed(seed)
    trace = poutine.trace(pair.guide).get_trace(x_0)
    u, x_t = trace.nodes["u"]["value"], trace.nodes["x_t"]["value"]
    return pair.guide.step.drawing(u, pair.guide.step.forward_process.num_steps)[0], x_t


@pytest.mark.parametrize("drawing", DRAWINGS)
@pytest.mark.parametrize(
    "variance",
    [pyrodiff.ForwardVariance(), pyrodiff.PosteriorVariance(), pyrodiff.FixedVariance([0.3, 0.1, 0.2, 0.5, 0.4])],
    ids=["forward", "posterior", "fixed"],
)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_simple_loss_has_the_gradient_of_the_squared_noise_error(kind, variance, drawing):
    torch.set_default_dtype(torch.float64)
    schedule = SCHEDULES[kind]
    diffusion = gaussian_network_diffusion(schedule, variance=variance)
    network = diffusion.reverse.denoiser.network
    x_0 = torch.randn(30, 2) * 0.5 + 1.0
    pair = diffusion.one_step(DRAWINGS[drawing](), SimpleWeighting(diffusion.reverse))
    t, x_t = step_of(pair, x_0, seed=7)
    assert t.unique().tolist() == [1, 2, 3, 4, 5]
    noise = (x_t - schedule.signal(t)[:, None] * x_0) / schedule.noise(t)[:, None]

    losses, errors = [], []
    for _ in range(2):
        squared = ((noise - network(x_t, t)) ** 2).sum(-1)
        torch.manual_seed(7)
        loss = DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0)
        torch.testing.assert_close(gradient(loss, network), gradient(squared.sum(), network), rtol=1e-8, atol=1e-8)
        losses.append(float(loss.detach()))
        errors.append(float(squared.sum().detach()))
        for parameter in network.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    assert abs(errors[0] - errors[1]) > 1
    assert losses[0] - losses[1] == pytest.approx(errors[0] - errors[1], rel=1e-9)


def test_a_weighting_multiplies_the_step_and_nothing_else():
    torch.set_default_dtype(torch.float64)
    diffusion, x_0 = make("vp")
    weighting = lambda t: 1 / (t + 1.0)  # noqa: E731
    terms = {}
    for name, pair in (("bound", diffusion.one_step()), ("weighted", diffusion.one_step(weighting=weighting))):
        t, _ = step_of(pair, x_0, seed=3)
        torch.manual_seed(3)
        terms[name] = DiffusionELBO().terms(pair.model, pair.guide, x_0)
    torch.testing.assert_close(terms["weighted"]["x_T"], terms["bound"]["x_T"])
    for site in ("x_s", "x_0"):
        torch.testing.assert_close(terms["weighted"][site], terms["bound"][site] / (t + 1.0))
    assert (terms["bound"]["x_s"][t == 1] == 0).all()
    assert (terms["bound"]["x_0"][t > 1] == 0).all()
    assert (terms["bound"]["x_s"][t > 1] > 0).all()
    assert (terms["bound"]["x_0"][t == 1] != 0).all()


def test_the_step_is_the_term_of_its_time_over_its_probability():
    torch.set_default_dtype(torch.float64)
    diffusion, x_0 = make("vp")
    pair = diffusion.one_step(weighting=BoundWeighting())
    t, x_t = step_of(pair, x_0, seed=3)
    torch.manual_seed(3)
    terms = DiffusionELBO().terms(pair.model, pair.guide, x_0)
    schedule, x_hat = SCHEDULES["vp"], diffusion.reverse.denoiser(x_t, t)
    for i, time in enumerate(t.tolist()):
        beta, now, before = (
            float(f) for f in (schedule.beta(time), *schedule.alpha_bar(torch.tensor([time, time - 1])))
        )
        if time == 1:
            kernel = torch.distributions.Normal(x_hat[i], math.sqrt(beta))
            expected = -5 * kernel.log_prob(x_0[i]).sum()
        else:
            weight = math.sqrt(before) * beta / (1 - now)
            ratio = (1 - before) / (1 - now)
            distance = weight**2 / beta * (x_0[i] - x_hat[i]) ** 2
            expected = 5 * 0.5 * (ratio - 1 - math.log(ratio) + distance).sum()
        torch.testing.assert_close(terms["x_0" if time == 1 else "x_s"][i], expected)


@pytest.mark.parametrize("elbo", [DiffusionELBO, TraceMeanField_ELBO])
def test_auxiliary_sites_cost_nothing(elbo):
    diffusion, x_0 = make("vp")
    pair = diffusion.one_step()
    torch.manual_seed(0)
    terms = DiffusionELBO().terms(pair.model, pair.guide, x_0)
    torch.manual_seed(0)
    loss = elbo().loss(pair.model, pair.guide, x_0)
    assert list(terms) == ["x_T", "x_s", "x_0"]
    assert loss == pytest.approx(float(sum(term.sum() for term in terms.values()).detach()), rel=1e-9)
    guide_trace = poutine.trace(pair.guide).get_trace(x_0)
    model_trace = poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(x_0)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
        for site in ("u", "x_t"):
            assert float(trace.nodes[site]["log_prob_sum"]) == 0


def test_plain_trace_elbo_agrees_in_mean():
    diffusion, x_0 = make("vp")
    pair = diffusion.one_step()
    bound = pyrodiff.bound(diffusion, x_0, num_particles=400).nats.sum()
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        draws = repeat(30, lambda elbo=elbo: elbo().loss(pair.model, pair.guide, x_0.repeat(10, 1)) / 10)
        error = math.hypot(float(draws.std()) / 30**0.5, 0.01 * float(bound.abs()) / 5)
        assert abs(float(draws.mean() - bound)) < 5 * error


@pytest.mark.parametrize("kind", SCHEDULES)
def test_plain_pyro_trains_either_pair(kind):
    for one_step in (False, True):
        diffusion, x_0 = make(kind)
        pair = diffusion.one_step() if one_step else diffusion
        svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 2e-2}), TraceMeanField_ELBO())
        before = float(pyrodiff.bound(diffusion, x_0, num_particles=10).nats.mean())
        for _ in range(50):
            svi.step(x_0)
        after = float(pyrodiff.bound(diffusion, x_0, num_particles=10).nats.mean())
        assert after < before - 0.5
        pyro.clear_param_store()


def test_a_one_step_pair_can_be_made_after_the_diffusion_has_run():
    diffusion, x_0 = make("vp")
    pyrodiff.bound(diffusion, x_0)
    DiffusionELBO().loss(diffusion.model, diffusion.guide, x_0)
    pair = diffusion.one_step()
    assert math.isfinite(DiffusionELBO().loss(pair.model, pair.guide, x_0))
    again = diffusion.one_step(LowDiscrepancyDrawing())
    assert math.isfinite(DiffusionELBO().loss(again.model, again.guide, x_0))
    assert math.isfinite(DiffusionELBO().loss(diffusion.model, diffusion.guide, x_0))
