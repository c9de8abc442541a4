"""A diffusion as the law of a site: log p without bias where it is a term of a sum, and refused where it is not."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import ShiftedGaussian, bit_diffusion, far, gaussian_diffusion, repeat, side_by_side
from pyro import poutine
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    SMCFilter,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    WeighedPredictive,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from torch import nn
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff import DiffusionDistribution, DiffusionELBO, FlowEstimate, OneStepEstimate

M, V = torch.tensor([0.6, -0.4], dtype=torch.float64), torch.tensor([0.7, 0.5], dtype=torch.float64)
CENTERS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]], dtype=torch.float64)
Z = torch.tensor([[0.9, -1.2], [-0.3, 0.4], [1.5, 0.2]], dtype=torch.float64)
X = torch.tensor([[1.2, -0.5], [0.1, 0.3], [0.7, -1.4]], dtype=torch.float64)
NOISE = 0.5  # of x given z
ELBOS = [Trace_ELBO, TraceMeanField_ELBO, DiffusionELBO]


def exact(T=30, **options):
    """The diffusion of N(M, V)."""
    return gaussian_diffusion(pyrodiff.CosineSchedule(T), M, V, **options)


def by_class(T=30):
    schedule = pyrodiff.CosineSchedule(T)
    return pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), ShiftedGaussian(schedule, M, V), (2,))


class Denoiser(nn.Module):
    """E[x_0 | x_t] of N(M, V)."""

    def __init__(self, schedule, size):
        super().__init__()
        self.schedule, self.m, self.v = schedule, nn.Parameter(M[:size].clone()), nn.Parameter(V[:size].clone())

    def forward(self, x_t, t):
        a, b = (c.reshape(-1, 1) for c in self.schedule.scales(t))
        return (self.m + a * self.v / (a**2 * self.v + b**2) * (x_t - a * self.m)).to(x_t.dtype)


def bound_by_class(diffusion, z, y, m=M):
    """The bound in closed form: log p, less what p(x_T), which knows of no class, costs."""
    q = diffusion.forward_process.marginal(z, diffusion.num_steps)
    a, b = diffusion.forward_process.schedule.scales(diffusion.num_steps)
    right = dist.Normal((a * (m + y)).expand_as(z), (a**2 * V + b**2).sqrt()).to_event(1)
    cost = kl_divergence(q, diffusion.model.top(torch.float64)) - kl_divergence(q, right)
    return dist.Normal(m + y, V.sqrt()).to_event(1).log_prob(z) - cost


def log_p(z, m=M, v=V):
    return dist.Normal(m, v.sqrt()).to_event(1).log_prob(z)


def many(z, number=240):
    """The data again and again: what is averaged over them counts as one draw of the mean."""
    return z.expand(number, *z.shape)


def gradients(value, *tensors):
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, tensors)])


# The estimate


ESTIMATES = {
    "default": lambda: OneStepEstimate(),
    "none": lambda: OneStepEstimate(reference=False),
    "another": lambda: OneStepEstimate(reference=(torch.tensor(0.5), torch.tensor([1.3, 0.4]))),
    "draws": lambda: OneStepEstimate(num_draws=3),
}


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_the_estimate_and_its_gradients_have_the_mean_of_log_p(estimate, T):
    diffusion, z = exact(T), Z.clone().requires_grad_()
    law, parts = DiffusionDistribution(diffusion, estimate=ESTIMATES[estimate]()), diffusion.reverse.data
    m, v = M.clone().requires_grad_(), V.clone().requires_grad_()

    def once():
        value = law.log_prob(many(z)).mean(0)
        return torch.cat([value, gradients(value.sum(), z, parts.m, parts.v)])

    expected = log_p(z, m, v)
    draws = repeat(25, once)
    assert not far(draws, torch.cat([expected, gradients(expected.sum(), z, m, v)]).detach())


@pytest.mark.parametrize("estimate", ["default", "none"])
def test_the_gradient_to_the_context_has_the_mean_of_the_bounds(estimate):
    diffusion, y = by_class(), CENTERS.clone().requires_grad_()
    z, m = Z.clone().requires_grad_(), M.clone().requires_grad_()

    def once():
        value = DiffusionDistribution(diffusion, y, estimate=ESTIMATES[estimate]()).log_prob(many(z)).mean(0)
        return torch.cat([value, gradients(value.sum(), z, y, diffusion.reverse.m)])

    expected = bound_by_class(diffusion, z, y, m)
    draws = repeat(25, once)
    assert not far(draws, torch.cat([expected, gradients(expected.sum(), z, y, m)]).detach())


def test_the_mean_is_the_bounds_where_the_kernels_are_wrong():
    diffusion = exact(5, shift=0.2, widen=1.3)
    bounds = repeat(25, lambda: -pyrodiff.bound(diffusion, many(Z).flatten(0, 1)).nats.reshape(-1, 3).mean(0))
    for estimate in ESTIMATES.values():
        law = DiffusionDistribution(diffusion, estimate=estimate())
        draws = repeat(25, lambda law=law: law.log_prob(many(Z)).mean(0))
        assert not far(draws - bounds, 0.0)
    assert (bounds.mean(0) < log_p(Z) - 0.1).all()


def test_a_reference_that_is_right_leaves_no_noise():
    for T in (1, 7, 100):
        law = DiffusionDistribution(exact(T), estimate=OneStepEstimate(reference=(M, V)))
        torch.testing.assert_close(law.log_prob(Z), log_p(Z), atol=1e-8, rtol=0)


def test_the_reference_takes_the_noise_that_grows_with_the_number_of_steps():
    """The deviation for a datum of N(M, V): 19, 51 and 246 nats without, and 1.7, 1.8 and 1.9 with N(0, 1)."""
    z = M + V.sqrt() * torch.randn(4000, 2, dtype=torch.float64)
    for T, plain in ((30, 19), (100, 51), (1000, 246)):
        diffusion, deviations = exact(T), []
        for estimate in (OneStepEstimate(reference=False), OneStepEstimate()):
            with torch.no_grad():
                found = DiffusionDistribution(diffusion, estimate=estimate).log_prob(z) - log_p(z)
            deviations.append(float(found.std()))
        assert deviations[0] == pytest.approx(plain, rel=0.25)
        assert deviations[1] < 2.2


def test_draws_of_a_datum_are_spread_over_the_times():
    diffusion, seen = exact(8), []
    diffusion.reverse.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone()))
    DiffusionDistribution(diffusion, estimate=OneStepEstimate(num_draws=8)).log_prob(Z)
    DiffusionDistribution(diffusion, estimate=OneStepEstimate(num_draws=4)).log_prob(Z[:2])
    assert all(sorted(of_datum.tolist()) == list(range(1, 9)) for of_datum in seen[0].reshape(8, 3).T)
    assert sorted(seen[1].tolist()) == list(range(1, 9))  # the draws of all data too


def test_one_network_call_whatever_the_number_of_steps_and_draws():
    diffusion, calls = exact(100), []
    diffusion.reverse.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    DiffusionDistribution(diffusion, estimate=OneStepEstimate(num_draws=4)).log_prob(Z)
    assert calls == [12]


def test_bits_have_no_reference_and_the_mean_of_their_bound():
    torch.set_default_dtype(torch.float64)
    diffusion = bit_diffusion([0.2, 0.3, 0.6], 0.2, 2)
    law, x = DiffusionDistribution(diffusion), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    bounds = repeat(25, lambda: -pyrodiff.bound(diffusion, many(x).flatten(0, 1)).nats.reshape(-1, 2).mean(0))
    assert not far(repeat(25, lambda: law.log_prob(many(x)).mean(0)) - bounds, 0.0)
    assert law.support.check(x).all()
    assert not law.support.check(x + 0.5).any()
    assert set(law.sample((50,)).unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="reference must be None or False where the forward process is no Gaussian"):
        DiffusionDistribution(diffusion, estimate=OneStepEstimate(reference=(torch.zeros(2), torch.ones(2))))


def test_a_kernel_of_ones_own_has_no_reference_by_default():
    class Wider(pyrodiff.GaussianForward):
        def marginal(self, x_0, t):
            law = super().marginal(x_0, t)
            return dist.Normal(law.mean, law.stddev * 1.1).to_event(1)

    schedule = pyrodiff.CosineSchedule(5)
    diffusion = pyrodiff.Diffusion(Wider(schedule), exact(5).reverse, (2,))
    torch.manual_seed(1)
    plain = DiffusionDistribution(diffusion, estimate=OneStepEstimate(reference=False)).log_prob(Z)
    torch.manual_seed(1)
    assert torch.equal(DiffusionDistribution(diffusion).log_prob(Z), plain)


def test_a_learned_schedule_has_the_gradient_of_its_bound():
    schedule = pyrodiff.LearnedLogSNRSchedule(3, first=3.0, last=-2.0)
    forward = pyrodiff.GaussianForward(schedule)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Denoiser(schedule, 2)), (2,)).double()
    data = many(Z, 60).flatten(0, 1)
    learned, found = [p for p in schedule.parameters() if p.requires_grad], []
    for estimate in (OneStepEstimate(num_draws=6, reference=False), OneStepEstimate(num_draws=6)):
        law = DiffusionDistribution(diffusion, estimate=estimate)
        found.append(repeat(25, lambda law=law: gradients(-law.log_prob(data).mean(), *learned)))

    def of_pair():
        loss = DiffusionELBO().differentiable_loss(diffusion.model, diffusion.guide, data) / len(data)
        return gradients(loss, *learned)

    expected = repeat(25, of_pair)
    assert expected.mean(0).abs().max() > 0.05
    assert not any(far(draws - expected, 0.0) for draws in found)


def test_float32_is_as_good_as_float64():
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(1000))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Denoiser(forward.schedule, 2)), (2,))
    law = DiffusionDistribution(diffusion, estimate=OneStepEstimate(num_draws=100, reference=(M, V)))
    wide = law.log_prob(many(Z)).mean(0)
    diffusion.float()
    narrow = law.log_prob(many(Z.float())).mean(0)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, atol=2e-3, rtol=0)


# In programs: z ~ N(M, V) by a diffusion, x ~ N(z, NOISE^2)


def linear(law):
    def model():
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", law() if callable(law) and not isinstance(law, DiffusionDistribution) else law)
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=X)

    return model


def normal_guide(loc, scale):
    def guide():
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


def elbo_of(loc, scale, m=M, v=V):
    """The ELBO of the linear model in closed form."""
    prior = kl_divergence(dist.Normal(loc, scale), dist.Normal(m, v.sqrt()).expand(loc.shape))
    fit = dist.Normal(X, NOISE).log_prob(loc) - scale**2 / (2 * NOISE**2)
    return (fit - prior).sum()


def posterior():
    precision = 1 / V + 1 / NOISE**2
    return (M / V + X / NOISE**2) / precision, (1 / precision).sqrt().expand(3, 2)


def evidence():
    return dist.Normal(M, (V + NOISE**2).sqrt()).log_prob(X).sum()


OPTIONS = [{}, {"num_particles": 50, "vectorize_particles": True, "max_plate_nesting": 1}]


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, options) for kind in ELBOS for options in OPTIONS), (TraceGraph_ELBO, {})]
)
def test_the_elbo_and_its_gradients_are_those_of_the_closed_form(kind, options):
    diffusion = exact()
    loc = (posterior()[0] + 0.2).requires_grad_()
    scale = (posterior()[1] * 1.2).requires_grad_()
    model, guide = linear(DiffusionDistribution(diffusion)), normal_guide(loc, scale)
    learned, runs = [loc, scale, diffusion.reverse.data.m, diffusion.reverse.data.v], 1 if options else 20
    pair = (model, guide) if options else side_by_side(runs, model, guide)

    def once():
        if kind is TraceGraph_ELBO:  # which has no loss that can be differentiated
            return -torch.as_tensor(kind().loss(*pair) / runs)[None]
        loss = kind(**options).differentiable_loss(*pair) / runs
        return torch.cat([-loss[None], gradients(-loss, *learned)])

    m, v = M.clone().requires_grad_(), V.clone().requires_grad_()
    expected = elbo_of(loc, scale, m, v)
    expected = torch.cat([expected[None], gradients(expected, loc, scale, m, v)]).detach()
    draws = repeat(25, once)
    assert not far(draws, expected[: draws.shape[1]])


def test_at_the_posterior_the_elbo_is_the_evidence():
    model, guide = linear(DiffusionDistribution(exact())), normal_guide(*posterior())
    assert float(elbo_of(*posterior())) == pytest.approx(float(evidence()))
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    assert not far(repeat(25, lambda: -elbo.loss(model, guide)), evidence())


@pytest.mark.parametrize(("ours", "made"), [(False, "in the model"), (True, "once")])
def test_svi_finds_the_posterior(ours, made):
    diffusion = exact()
    law = DiffusionDistribution(diffusion, estimate=OneStepEstimate(num_draws=8))
    diffusion.requires_grad_(False).eval()

    def guide():
        loc = pyro.param("loc", lambda: torch.zeros(3, 2, dtype=torch.float64))
        scale = pyro.param("scale", lambda: torch.ones(3, 2, dtype=torch.float64), constraint=dist.constraints.positive)
        normal_guide(loc, scale)()

    model = linear(law if made == "once" else lambda: DiffusionDistribution(diffusion, estimate=law.estimate))
    total = []
    if ours:
        svi = pyrodiff.SVI(model, guide, lambda parameters: torch.optim.Adam(parameters, lr=0.05), DiffusionELBO())
    else:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for step in range(270):
        svi.step()
        if step >= 100:
            total.append(torch.stack([pyro.param("loc").detach().clone(), pyro.param("scale").detach().clone()]))
    loc, scale = torch.stack(total).mean(0)
    assert (loc - posterior()[0]).abs().max() < 0.06
    assert (scale - posterior()[1]).abs().max() < 0.06


def network_diffusion(T=10, context=()):
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T))
    network = pyrodiff.networks.MLP((2,), hidden=8)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(network, forward))
    return pyrodiff.Diffusion(forward, reverse, (2,))


def step_of(kind, model, guide):
    if kind == "pyrodiff":
        return pyrodiff.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=1e-2), DiffusionELBO()).step
    if kind == "compiled":
        return pyrodiff.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=1e-2), DiffusionELBO(), compile=True).step
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), kind()).step


@pytest.mark.parametrize("made", ["once", "in the model", "once, for one datum"])
@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO, DiffusionELBO, "pyrodiff"])
@pytest.mark.parametrize("observed", [False, True])
def test_both_svis_move_every_parameter(observed, kind, made):
    diffusion = network_diffusion()
    law = DiffusionDistribution(diffusion)
    plate = nullcontext() if made.endswith("datum") else pyro.plate("data", 3)
    z_0, x = (Z[0].float(), X[0].float()) if made.endswith("datum") else (Z.float(), X.float())

    def model():
        shift = pyro.param("shift", lambda: torch.zeros(2))
        with plate:
            here = DiffusionDistribution(diffusion) if made == "in the model" else law
            z = pyro.sample("z", here, obs=z_0 if observed else None)
            pyro.sample("x", dist.Normal(z + shift, 0.5).to_event(1), obs=x)

    def guide():
        if not observed:
            with plate:
                pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.zeros_like(z_0)), 1.0).to_event(1))

    before = [parameter.detach().clone() for parameter in diffusion.parameters()]
    step = step_of(kind, model, guide)
    for _ in range(5):  # a last layer that starts at 0 hides the first ones once
        step()
    assert len(before) > 3
    assert all(not torch.equal(old, new) for old, new in zip(before, diffusion.parameters(), strict=True))
    assert any("reverse" in name for name in pyro.get_param_store().keys()) == (kind != "pyrodiff")


def test_a_schedule_that_no_called_module_holds_is_learned_too():
    """Of an own kernel, whose forward process is no part of it: only Pyro's messages tell of its parameters."""

    class Own(nn.Module):
        def forward(self, x_t, t):
            return dist.Normal(0.9 * x_t, 0.3).to_event(1)

    forward = pyrodiff.GaussianForward(pyrodiff.LearnedLogSNRSchedule(3, first=3.0, last=-2.0))
    law = DiffusionDistribution(pyrodiff.Diffusion(forward, Own(), (2,)))
    step = step_of("pyrodiff", lambda: pyro.sample("z", law, obs=Z[0]), lambda: None)
    before = torch.cat([parameter.detach().flatten() for parameter in forward.parameters()])
    for _ in range(3):
        step()
    assert not torch.equal(before, torch.cat([parameter.detach().flatten() for parameter in forward.parameters()]))


def test_a_step_that_would_learn_nothing_is_refused():
    """Pyro's SVI takes no gradient where no trace holds a parameter, and says nothing."""
    law = DiffusionDistribution(network_diffusion())
    svi = SVI(lambda: pyro.sample("z", law, obs=Z[0].float()), lambda: None, pyro.optim.Adam({}), Trace_ELBO())
    with pytest.raises(ValueError, match="make the DiffusionDistribution in the model"):
        svi.step()
    svi.evaluate_loss()

    def model():
        pyro.sample("z", DiffusionDistribution(law.diffusion), obs=Z[0].float())

    before = [parameter.detach().clone() for parameter in law.diffusion.parameters()]
    for _ in range(3):
        SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step()
    assert all(not torch.equal(old, new) for old, new in zip(before, law.diffusion.parameters(), strict=True))
    law.diffusion.requires_grad_(False).eval()
    svi.step()


def test_a_compiled_step_is_the_plain_one(interpreted):
    losses = []
    for kind in ("pyrodiff", "compiled"):
        pyro.set_rng_seed(3)
        diffusion = network_diffusion()

        def guide(x):
            normal_guide(pyro.param("loc", lambda: torch.zeros(3, 2)), torch.ones(3, 2))()

        def model(x, diffusion=diffusion):
            with pyro.plate("data", 3):
                z = pyro.sample("z", DiffusionDistribution(diffusion))
                pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

        pyro.clear_param_store()
        step = step_of(kind, model, guide)
        losses.append(torch.stack([step(X.float()) for _ in range(4)]))
    assert interpreted
    torch.testing.assert_close(losses[1], losses[0])


# A class upstream


PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def mixture(diffusion, enumerated="parallel", estimate=None):
    """c ~ PI, z ~ N(M + CENTERS[c], V), x ~ N(z, NOISE^2)."""

    def model():
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Categorical(PI), infer={"enumerate": "parallel"} if enumerated == "model" else {})
            law = DiffusionDistribution(diffusion, CENTERS[c], batch_dim=c.dim(), estimate=estimate)
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=X)

    return model


def mixture_guide(logits, loc, scale):
    def guide():
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


def scores(diffusion, loc, scale):
    """E_q[log p(z | c)] for each datum and class, by the exact second moment."""
    return torch.stack(
        [
            bound_by_class(diffusion, loc, center) - (scale**2 / (2 * V)).sum(-1) + _top(diffusion, scale)
            for center in CENTERS
        ],
        -1,
    )


def _top(diffusion, scale):
    """What the variance of z adds to the difference of the two KLs at T."""
    a, b = diffusion.forward_process.schedule.scales(diffusion.num_steps)
    right, prior = a**2 * V + b**2, diffusion.model.top(torch.float64).variance
    return (a**2 * scale**2 / 2 * (1 / right - 1 / prior)).sum(-1)


def test_a_class_enumerated_in_the_guide_gives_the_responsibilities():
    diffusion, logits = by_class(), torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    loc, scale = X - 0.1, torch.full((3, 2), 0.4, dtype=torch.float64)
    model, guide = mixture(diffusion), mixture_guide(logits, loc, scale)
    many, elbo = side_by_side(20, model, guide), TraceEnum_ELBO(max_plate_nesting=4)
    each = PI.log() + scores(diffusion, loc, scale)
    rest = (
        dist.Normal(loc, scale).entropy().sum()
        + (dist.Normal(X, NOISE).log_prob(loc) - scale**2 / (2 * NOISE**2)).sum()
    )
    q = logits.softmax(-1)
    expected = (q * (each - q.log())).sum() + rest

    def once():
        loss = elbo.differentiable_loss(*many) / 20
        return torch.cat([-loss[None], gradients(-loss, logits)])

    draws = repeat(20, once)
    assert not far(draws, torch.cat([expected[None], gradients(expected, logits)]).detach())

    model = mixture(diffusion, estimate=OneStepEstimate(num_draws=30))
    optimizer, found = torch.optim.Adam([logits], lr=0.05), []
    for step in range(200):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide).backward()
        optimizer.step()
        if step >= 100:
            found.append(logits.detach().softmax(-1))
    assert (torch.stack(found).mean(0) - each.detach().softmax(-1)).abs().max() < 0.04


def test_classes_share_the_draws_of_a_datum():
    diffusion = by_class()
    same = CENTERS[0].expand(4, 1, 2)
    found = DiffusionDistribution(diffusion, same, batch_dim=2).log_prob(Z)
    assert found.shape == (4, 3)
    assert torch.equal(found, found[:1].expand(4, 3))
    assert found[0].unique().numel() == 3


def test_a_class_may_be_enumerated_one_by_one():
    diffusion, calls = by_class(), []
    diffusion.reverse.register_forward_pre_hook(lambda module, args: calls.append(args[2]))

    def model():
        c = pyro.sample("c", dist.Categorical(PI))
        pyro.sample("z", DiffusionDistribution(diffusion, CENTERS[c], batch_dim=c.dim()))

    def guide():
        pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "sequential"})
        pyro.sample("z", dist.Normal(Z[0], 0.5).to_event(1))

    TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    assert {tuple(y[0].tolist()) for y in calls} == {tuple(center.tolist()) for center in CENTERS}
    assert len(calls) == 3


# Draws and shapes


def test_draws_have_the_law_of_the_chain_and_leak_no_site():
    diffusion = exact()
    law = DiffusionDistribution(diffusion)
    trace = poutine.trace(lambda: pyro.sample("z", law.expand([4000]).to_event(0))).get_trace()
    assert [name for name, site in trace.nodes.items() if site["type"] in ("sample", "param")] == ["z"]
    z = trace.nodes["z"]["value"]
    assert z.shape == (4000, 2)
    assert not z.requires_grad
    assert not far(z, M)
    assert not far((z - M) ** 2, V)


def test_draws_of_a_pyro_module_leak_no_parameter():
    class Kernel(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = pyro.nn.PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

        def forward(self, x_t, t):
            return dist.Normal(0.9 * x_t, self.scale).to_event(1)

    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(3))
    law = DiffusionDistribution(pyrodiff.Diffusion(forward, Kernel(), (2,)))
    trace = poutine.trace(lambda: pyro.sample("z", law)).get_trace()
    assert [name for name, site in trace.nodes.items() if site["type"] in ("sample", "param")] == ["z"]
    svi = SVI(
        lambda: pyro.sample("z", DiffusionDistribution(law.diffusion), obs=Z[0].float()),
        lambda: None,
        pyro.optim.Adam({"lr": 0.1}),
        Trace_ELBO(),
    )
    svi.step()
    assert float(law.diffusion.reverse.scale.detach()) != 0.5


def test_two_in_one_program_stand_in_plates_of_any_name():
    first, second = exact(3), by_class(3)

    def model():
        with pyro.plate("data", 3):
            y = pyro.sample("y", DiffusionDistribution(first))
            return pyro.sample("z", DiffusionDistribution(second, y, batch_dim=y.dim() - 1))

    assert Predictive(model, num_samples=5, parallel=True)()["z"].shape == (5, 3, 2)
    assert Predictive(model, num_samples=2)()["z"].shape == (2, 3, 2)


def test_draws_follow_their_context():
    y = torch.tensor([[5.0, 0.0], [-5.0, 0.0]], dtype=torch.float64)
    z = DiffusionDistribution(by_class(), y).expand([2, 2]).sample((7, 50))
    assert z.shape == (7, 50, 2, 2, 2)
    torch.testing.assert_close(z.mean((0, 1, 2)), M + y, atol=0.3, rtol=0)


def test_a_sampler_of_ones_choice_draws():
    diffusion = network_diffusion()
    sampler = pyrodiff.DDIMSampler(diffusion, num_steps=4)
    torch.manual_seed(1)
    z = DiffusionDistribution(diffusion, sampler=sampler).sample((3,))
    torch.manual_seed(1)
    assert torch.equal(z, sampler(3))


def test_shapes():
    diffusion, law = by_class(), DiffusionDistribution(by_class(), CENTERS)
    assert (law.batch_shape, law.event_shape, law.event_dim) == ((3,), (2,), 1)
    assert DiffusionDistribution(exact()).batch_shape == ()
    assert DiffusionDistribution(diffusion, CENTERS[:1]).batch_shape == (1,)
    assert DiffusionDistribution(diffusion, CENTERS[0], batch_dim=0).batch_shape == ()
    for shape in [(3,), (5, 3), (2, 5, 3)]:
        assert law.log_prob(Z.expand(*shape, 2)).shape == shape
        assert law.expand(shape).log_prob(Z).shape == shape
        assert law.expand(shape).expand((4, *shape)).sample().shape == (4, *shape, 2)
    assert law.log_prob(Z[0]).shape == (3,)
    assert law.to_event(1).log_prob(Z).shape == ()


def test_expanded_dimensions_see_their_own_context():
    diffusion = by_class()
    estimate = OneStepEstimate(num_draws=200)
    found = DiffusionDistribution(diffusion, CENTERS, estimate=estimate).expand([5, 3]).log_prob(Z.expand(5, 3, 2))
    draws = (found - bound_by_class(diffusion, Z, CENTERS)).detach()
    assert draws.abs().max() < 1.0
    apart = torch.cdist(CENTERS, CENTERS) + 9 * torch.eye(3)
    assert apart.min() > 1.0  # so that another row would be seen


def test_masks_and_scales_count_as_of_any_law():
    law, mask = DiffusionDistribution(exact()), torch.tensor([True, False, True])
    torch.manual_seed(1)
    plain = law.log_prob(Z)
    torch.manual_seed(1)
    masked = law.expand([3]).mask(mask)
    torch.testing.assert_close(masked.log_prob(Z), plain * mask)

    def model():
        with pyro.plate("data", 30, subsample=torch.arange(3)), poutine.mask(mask=mask):
            pyro.sample("z", law, obs=Z)

    torch.manual_seed(1)
    assert float(poutine.trace(model).get_trace().log_prob_sum().detach()) == pytest.approx(
        10 * float((plain * mask).detach().sum())
    )


def test_data_that_are_none_are_refused():
    law = DiffusionDistribution(exact())
    for bad in (torch.zeros(3, 3, dtype=torch.float64), torch.full((3, 2), math.nan, dtype=torch.float64)):
        with pytest.raises(ValueError, match="x_0 must"):
            law.log_prob(bad)


# Refusals


def fixed_guide():
    normal_guide(*posterior())()


def as_guide(law):
    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", law)

    return guide


def plain_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(M, V.sqrt()).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=X)


class StateModel:
    def __init__(self, law):
        self.law = law

    def init(self, state):
        self.step(state)

    def step(self, state):
        with pyro.plate("data", 3):
            state["z"] = pyro.sample("z", self.law)


class StateGuide(StateModel):
    def step(self, state):
        fixed_guide()


def run_smc(law):
    smc = SMCFilter(StateModel(law), StateGuide(law), num_particles=4, max_plate_nesting=1)
    smc.init()


def run_kernel(kernel, law):
    MCMC(kernel(linear(law)), num_samples=1, warmup_steps=1, disable_progbar=True).run()


def laplace(law):
    guide = AutoLaplaceApproximation(linear(law))
    guide()
    guide.laplace_approximation()


def paired(law):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    return model, guide


REFUSED = {
    "RenyiELBO": lambda law: RenyiELBO(num_particles=2).loss(linear(law), fixed_guide),
    "Importance": lambda law: Importance(linear(law), fixed_guide, num_samples=2).run(),
    "SMCFilter": run_smc,
    "NUTS": lambda law: run_kernel(NUTS, law),
    "HMC": lambda law: run_kernel(HMC, law),
    "ReweightedWakeSleep": lambda law: ReweightedWakeSleep(num_particles=2).loss(linear(law), fixed_guide),
    "TraceTailAdaptive_ELBO": lambda law: TraceTailAdaptive_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ).loss_and_grads(linear(law), fixed_guide),
    "WeighedPredictive": lambda law: WeighedPredictive(linear(law), guide=fixed_guide, num_samples=2, parallel=True)(),
    "AutoLaplaceApproximation": laplace,
    "pair_importance_bound": lambda law: pyrodiff.pair_importance_bound(*paired(law), X, num_particles=2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_where_an_unbiased_estimate_is_not_right_it_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"(?s)OneStepEstimate in [^:]*{name}.*estimate=FlowEstimate\(\)"):
        REFUSED[name](DiffusionDistribution(exact(3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("NUTS", "HMC", "AutoLaplaceApproximation")])
def test_the_flow_is_not_refused_there(name):
    diffusion = exact(3)
    diffusion.requires_grad_(False).eval()
    REFUSED[name](DiffusionDistribution(diffusion, estimate=FlowEstimate(tolerance=1e-2)))


def test_a_class_enumerated_in_the_model_is_refused_and_one_beside_is_not():
    def beside():
        with pyro.plate("data", 3):
            z = pyro.sample("z", DiffusionDistribution(diffusion, CENTERS[None], batch_dim=2))
            c = pyro.sample("c", dist.Categorical(PI), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + CENTERS[c], NOISE).to_event(1), obs=X)

    diffusion, elbo = by_class(3), TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"(?s)a class that is enumerated in the model, inside a logarithm.*FlowEstim"):
        elbo.loss(mixture(diffusion, "model"), fixed_guide)
    elbo.loss(beside, fixed_guide)


@pytest.mark.parametrize("around", ["mask", "scale", "law"])
def test_a_class_that_only_what_stands_around_depends_on_is_refused_too(around):
    """A mask, a scale or a transformed law by the class puts the estimate into the logarithm as well."""
    diffusion, elbo = exact(3), TraceEnum_ELBO(max_plate_nesting=1)
    law = DiffusionDistribution(diffusion)

    def model(enumerated):
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Categorical(PI), infer={"enumerate": "parallel"} if enumerated else {})
            if around == "law":
                moved = dist.transforms.AffineTransform(CENTERS[c], torch.ones(2).double(), event_dim=1)
                pyro.sample("z", dist.TransformedDistribution(law, [moved]), obs=Z)
            else:
                with poutine.mask(mask=c == 0) if around == "mask" else poutine.scale(scale=1.0 + c):
                    pyro.sample("z", law, obs=Z)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Categorical(PI), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match=r"(?s)a class that is enumerated in the model, inside a logarithm.*FlowEstim"):
        elbo.loss(lambda: model(True), lambda: None)
    elbo.loss(lambda: model(False), guide)


def test_inferring_a_class_that_was_summed_is_refused():
    @config_enumerate
    def model():
        c = pyro.sample("c", dist.Categorical(PI))
        pyro.sample("z", DiffusionDistribution(by_class(3), CENTERS[c], batch_dim=c.dim()), obs=Z[0])

    with pytest.raises(ValueError, match="OneStepEstimate in infer_discrete"):
        infer_discrete(model, first_available_dim=-1)()


@pytest.mark.parametrize("wrap", [lambda law: law, lambda law: law.expand([3]).mask(torch.tensor(True))])
@pytest.mark.parametrize("kind", [*ELBOS, TraceGraph_ELBO, TraceEnum_ELBO])
def test_as_the_law_of_a_guides_site_it_is_refused(kind, wrap):
    law = wrap(DiffusionDistribution(exact(3)))
    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match=r"(?s)law of a guide's site.*FlowEstimate\(\)"),
        ):
            kind(max_plate_nesting=1).loss(plain_model, as_guide(law))


def test_who_takes_a_sum_is_never_refused():
    law = DiffusionDistribution(exact(3))
    model = linear(law)
    delta = AutoDelta(model)
    for elbo in (*(kind() for kind in ELBOS), TraceGraph_ELBO(), TraceEnum_ELBO(strict_enumeration_warning=False)):
        elbo.loss(model, fixed_guide)
    Trace_ELBO().loss(model, delta)
    pyrodiff.pair_bound(*paired(law), X, num_particles=2)

    def with_factor():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(M, 1.0).to_event(1))
            pyro.factor("prior", law.log_prob(z))

    Predictive(with_factor, num_samples=2)()
    with pytest.raises(ValueError, match="OneStepEstimate in RenyiELBO"):
        RenyiELBO().loss(with_factor, fixed_guide)

    def hook(kernel, params, stage, i):
        losses.append(Trace_ELBO().loss(model, fixed_guide))

    losses = []
    MCMC(HMC(plain_model, num_steps=1), 2, warmup_steps=1, hook_fn=hook, disable_progbar=True).run()
    assert losses


def test_a_decoder_has_no_flow():
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(3))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((2,)))
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,), pyrodiff.DiscretizedDecoder(levels=5))
    with pytest.raises(ValueError, match="DiscretizedDecoder: give estimate=OneStepEstimate"):
        DiffusionDistribution(diffusion, estimate=FlowEstimate())
    law = DiffusionDistribution(diffusion)
    assert law.support.check(law.sample((4,))).all()
    levels = law.sample((6,))  # a probability, of which a density is no reference
    found = []
    for reference in (None, False):
        torch.manual_seed(1)
        found.append(DiffusionDistribution(diffusion, estimate=OneStepEstimate(reference=reference)).log_prob(levels))
    assert torch.equal(*found)
    assert not law.support.check(torch.full((2,), 0.3))


# The flow


def flow_law(T=30, size=2, **options):
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T))
    reverse = pyrodiff.GaussianReverse(forward, Denoiser(forward.schedule, size))
    diffusion = pyrodiff.Diffusion(forward, reverse, (size,))
    return DiffusionDistribution(diffusion, estimate=FlowEstimate(**options))


@pytest.mark.parametrize("options", [{}, {"num_steps": 20}])
def test_the_flow_has_the_density_and_its_gradients(options):
    law, z = flow_law(**options), Z.clone().requires_grad_()
    parts = law.diffusion.reverse.denoiser
    m, v = M.clone().requires_grad_(), V.clone().requires_grad_()
    value, expected = law.log_prob(z), log_p(z, m, v)
    assert (value - expected).abs().max() < 0.03
    found = gradients(value.sum(), z, parts.m, parts.v)
    assert (found - gradients(expected.sum(), z, m, v)).abs().max() < 0.06
    with torch.no_grad():
        assert not law.log_prob(z).requires_grad


def test_fewer_steps_are_the_flow_of_their_chain():
    law = flow_law(num_steps=5)
    chain = law.diffusion.subchain([1, 8, 16, 23, 30])
    expected = pyrodiff.ode_log_prob(chain, Z, tolerance=1e-7).log_prob
    torch.testing.assert_close(law.log_prob(Z).detach(), expected, atol=1e-3, rtol=0)
    assert (expected - log_p(Z)).abs().max() > 1e-2
    sampler = pyrodiff.FlowSampler(law.diffusion, num_steps=5)
    torch.manual_seed(2)
    z = law.sample((4,))
    torch.manual_seed(2)
    assert torch.equal(z, sampler(4))


def test_the_flow_follows_its_context():
    diffusion = by_class(8)
    law = DiffusionDistribution(diffusion, CENTERS, estimate=FlowEstimate())
    alone = torch.cat(
        [
            DiffusionDistribution(diffusion, y[None], estimate=FlowEstimate()).log_prob(z[None])
            for y, z in zip(CENTERS, Z, strict=True)
        ]
    )
    torch.testing.assert_close(law.log_prob(Z), alone)
    torch.testing.assert_close(law.expand([2, 3]).log_prob(Z), alone.expand(2, 3))


def test_the_flow_is_one_number_with_dropout():
    diffusion = network_diffusion()
    diffusion.reverse.denoiser.network.register_forward_hook(
        lambda module, args, output: nn.functional.dropout(output, 0.5, module.training)
    )
    law = DiffusionDistribution(diffusion, estimate=FlowEstimate(tolerance=1e-3))
    assert torch.equal(law.log_prob(Z.float()), law.log_prob(Z.float()))
    assert diffusion.reverse.denoiser.network.training


def test_nuts_finds_the_posterior_by_the_flow():
    """As many latents of one posterior stand beside each other, since a gradient costs no more for all of them."""
    law = flow_law(num_steps=8, tolerance=1e-2, size=1)
    law.diffusion.requires_grad_(False).eval()
    x = X[:1, :1].expand(60, 1)

    def model():
        with pyro.plate("data", 60):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    mean, scale = posterior()[0][0, 0], posterior()[1][0, 0]
    kernel = NUTS(model, step_size=0.8 * float(scale), adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=2)
    start = {"z": M[0] + V[0].sqrt() * torch.randn(60, 1, dtype=torch.float64)}
    mcmc = MCMC(kernel, 12, warmup_steps=5, initial_params=start, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    assert z.shape == (12, 60, 1)
    assert abs(float((z.mean() - mean) / scale)) < 5 / (12 * 60 / 2) ** 0.5
    assert abs(math.log(float(z.std() / scale))) < 5 / (12 * 60) ** 0.5
    assert all(float(step.unique().numel()) > 4 for step in z[:, :, 0].T)  # it does not freeze


@pytest.mark.parametrize("kind", [Trace_ELBO, DiffusionELBO])
def test_the_flow_may_be_the_law_of_a_guides_site(kind):
    law = flow_law(T=10, tolerance=1e-2)
    law.diffusion.requires_grad_(False).eval()
    elbo = kind(num_particles=60, vectorize_particles=True, max_plate_nesting=1)
    draws = repeat(6, lambda: -elbo.loss(plain_model, as_guide(law)))
    expected = elbo_of(M.expand(3, 2), V.sqrt().expand(3, 2))
    assert abs(float(draws.mean() - expected)) < 5 * float(draws.std()) / 6**0.5 + 0.09  # three flows, .03 off at most


def test_the_law_of_a_guides_site_can_be_learned_by_its_score():
    law, m = flow_law(T=10, tolerance=1e-2), M.clone().requires_grad_()
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    (expected,) = torch.autograd.grad(elbo_of(m.expand(3, 2), V.sqrt().expand(3, 2)), m)
    learned = law.diffusion.reverse.denoiser.m
    draws = repeat(8, lambda: gradients(-elbo.differentiable_loss(plain_model, as_guide(law)), learned))
    assert not far(draws, expected)
    with pytest.raises(ValueError, match="a site that is not reparameterised"):
        DiffusionELBO().differentiable_loss(plain_model, as_guide(law))
