"""DiffusionELBO is Pyro's TraceMeanField_ELBO, term by term, and refuses the pairs for which that is no bound."""

import contextlib
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import differ, far, gaussian_diffusion, gradient, of_each, repeat, side_by_side
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrodiff
from pyrodiff import DiffusionELBO, networks

X_0 = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]])


def make_diffusion(T=4):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    network = networks.MLP((2,), hidden=8)
    return pyrodiff.Diffusion(
        forward, pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward)), (2,)
    )


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}]
)
def test_value_and_gradient_are_those_of_pyros_elbo(options, one_step):
    diffusion = make_diffusion()
    pair = diffusion.one_step() if one_step else diffusion
    losses, gradients = [], []
    for elbo in (TraceMeanField_ELBO(**options), DiffusionELBO(**options)):
        pyro.set_rng_seed(1)
        loss = elbo.differentiable_loss(pair.model, pair.guide, X_0)
        losses.append(loss.detach())
        gradients.append(gradient(loss, diffusion))
    torch.testing.assert_close(losses[0].float(), losses[1])  # Pyro's adds the zeros of the masked u, in float64
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0.1


def test_all_of_pyros_entry_points_give_the_same_number():
    diffusion, elbo = make_diffusion(), DiffusionELBO()

    def call(method):
        pyro.set_rng_seed(1)
        return method(diffusion.model, diffusion.guide, X_0)

    loss = call(elbo.loss)
    assert isinstance(loss, float)
    for method in (elbo.differentiable_loss, lambda *args: elbo(*args[:2])(args[2])):
        assert float(call(method).detach()) == pytest.approx(loss)
    diffusion.zero_grad()
    returned = call(elbo.loss_and_grads)
    assert float(returned) == pytest.approx(loss)
    assert not returned.requires_grad
    added = torch.cat([p.grad.flatten() for p in diffusion.parameters()])
    torch.testing.assert_close(added, gradient(call(elbo.differentiable_loss), diffusion))


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 4}, {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}]
)
def test_terms_are_one_a_datum_and_sum_to_the_loss(options, one_step):
    diffusion = make_diffusion()
    pair = diffusion.one_step() if one_step else diffusion
    elbo = DiffusionELBO(**options)
    pyro.set_rng_seed(1)
    terms = elbo.terms(pair.model, pair.guide, X_0)
    pyro.set_rng_seed(1)
    loss = elbo.loss(pair.model, pair.guide, X_0)
    names = ["x_T", "x_s", "x_0"] if one_step else ["x_4", "x_3", "x_2", "x_1", "x_0"]
    assert list(terms) == names
    assert all(term.shape == (3,) for term in terms.values())
    assert float(sum(term.sum() for term in terms.values()).detach()) == pytest.approx(loss)


def test_particles_are_averaged():
    diffusion = gaussian_diffusion(pyrodiff.LinearSchedule(3, 0.1, 0.5), torch.ones(2), torch.full((2,), 0.5))
    expected = -float(dist.Normal(1.0, 0.5**0.5).log_prob(X_0).sum())
    variances = []
    for options in ({}, {"num_particles": 10}, {"num_particles": 10, "vectorize_particles": True}):
        elbo = DiffusionELBO(max_plate_nesting=1, **options)
        draws = repeat(50, lambda elbo=elbo: elbo.loss(diffusion.model, diffusion.guide, X_0))
        assert not far(draws, expected)
        variances.append(float(draws.var()))
    assert variances[1] < variances[0] / 3
    assert variances[2] < variances[0] / 3


@pytest.mark.parametrize("options", [{}, {"max_plate_nesting": 1}])
@pytest.mark.parametrize("vectorize_particles", [False, True])
def test_a_term_outside_the_plate_is_one_number_however_particles_run(vectorize_particles, options):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.StudentT(3.0))
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=X)

    def guide():
        pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    elbo = DiffusionELBO(num_particles=7, vectorize_particles=vectorize_particles, **options)
    terms = elbo.terms(model, guide)
    assert {name: term.shape for name, term in terms.items()} == {"z": (), "w": (), "x": (5,)}
    assert float(terms["z"]) == pytest.approx(0.125)
    assert not far(torch.stack([elbo.terms(model, guide)["x"] for _ in range(60)]), (X - 0.5) ** 2 / 2 + 1.9189385)


def test_terms_of_the_exact_diffusion_are_its_expected_kls():
    m, v, T = 0.6, 0.4, 3
    schedule = pyrodiff.LinearSchedule(T, 0.1, 0.5)
    diffusion = gaussian_diffusion(schedule, torch.tensor(m).double(), torch.tensor(v).double())
    x_0 = torch.full((20000,), 1.7, dtype=torch.float64)
    terms = DiffusionELBO().terms(diffusion.model, diffusion.guide, x_0)
    beta = np.array([0.1, 0.3, 0.5])
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])

    def kl(mean, variance, other_mean, other_variance):
        return 0.5 * (variance / other_variance - 1 - np.log(variance / other_variance)
                      + (mean - other_mean) ** 2 / other_variance)  # fmt: skip

    S = alpha_bar * v + 1 - alpha_bar
    prior = kl(np.sqrt(alpha_bar[T]) * 1.7, 1 - alpha_bar[T], np.sqrt(alpha_bar[T]) * m, S[T])
    torch.testing.assert_close(terms["x_3"].detach(), torch.tensor(prior).expand(20000))
    for t in (2, 3):
        noise = np.array([-1.0, 1.0])  # quadratic in the noise: two points give the mean
        x_t = np.sqrt(alpha_bar[t]) * 1.7 + np.sqrt(1 - alpha_bar[t]) * noise
        b, now, before = beta[t - 1], alpha_bar[t], alpha_bar[t - 1]
        mean = (np.sqrt(before) * b * 1.7 + np.sqrt(1 - b) * (1 - before) * x_t) / (1 - now)
        reverse = np.sqrt(before) * m + np.sqrt(1 - b) * S[t - 1] / S[t] * (x_t - np.sqrt(now) * m)
        expected = kl(mean, b * (1 - before) / (1 - now), reverse, S[t - 1] * b / S[t]).mean()
        assert not far(terms[f"x_{t - 1}"].detach(), float(expected))


def forward_guide(diffusion):
    def guide(x_0):
        with pyro.plate("data", len(x_0), dim=-1):
            x = x_0
            for t in range(1, diffusion.num_steps + 1):
                x = pyro.sample(f"x_{t}", diffusion.forward_process.transition(x, t))

    return guide


def latent(name="z", law=None, wrap=None, infer=None):
    """A program of one latent site and a datum of 5 in a plate."""

    def program(x):
        with pyro.plate(f"data_{name}", 5, dim=-1):
            handler = contextlib.nullcontext() if wrap is None else wrap
            with handler:
                return pyro.sample(name, law or dist.Normal(0.0, 1.0), infer=infer)

    return program


def model_of(program):
    def model(x):
        z = program(x)
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


X = torch.linspace(-1, 2, 5)
ODD = torch.tensor([True, False, True, False, True])


def bernoulli(learned):
    return dist.Bernoulli(torch.full((5,), 0.3, requires_grad=learned))


WRONG = {
    "missing": (latent(), lambda x: None, "'z' is missing"),
    "extra": (latent(), lambda x: (latent()(x), latent("w")(x)), "'w' is not one"),
    "scale in the model": (latent(wrap=poutine.scale(scale=2.0)), latent(), "scale must stand in both.*'z'"),
    "scale in the guide": (latent(), latent(wrap=poutine.scale(scale=2.0)), "scale must stand in both.*'z'"),
    "other scale": (latent(wrap=poutine.scale(scale=2.0)), latent(wrap=poutine.scale(scale=3.0)), "scale.*2.0.*3.0"),
    "other scales": (
        latent(wrap=poutine.scale(scale=torch.ones(5))),
        latent(wrap=poutine.scale(scale=torch.arange(1.0, 6.0))),
        "scale must stand in both",
    ),
    "mask in the model": (latent(wrap=poutine.mask(mask=ODD)), latent(), "mask must stand in both.*'z'"),
    "mask in the guide": (latent(), latent(wrap=poutine.mask(mask=ODD)), "mask must stand in both.*'z'"),
    "other mask": (latent(wrap=poutine.mask(mask=ODD)), latent(wrap=poutine.mask(mask=~ODD)), "mask must stand"),
    "unscored in the guide": (latent(), latent(wrap=poutine.mask(mask=False)), "mask must stand in both.*'z'"),
    "mask in the guide's law": (
        latent(),
        latent(law=dist.Normal(0.0, torch.ones(5)).mask(ODD)),
        "mask must stand in both",
    ),
    "mask in the model's law": (
        latent(law=dist.Normal(0.0, torch.ones(5)).mask(ODD)),
        latent(),
        "mask must stand in both",
    ),
    "learned bits": (latent(law=bernoulli(False)), latent(law=bernoulli(True)), "reparameterised.*'z'.*Bernoulli"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_is_refused_with_the_reason(name):
    program, guide, words = WRONG[name]
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        DiffusionELBO().differentiable_loss(model_of(program), guide, X)


def test_the_same_handlers_in_both_programs_are_right():
    for wrap, weight in ((poutine.scale(scale=2.0), 2.0), (poutine.mask(mask=ODD), ODD.float())):
        guide = latent(law=dist.Normal(0.5, 0.7), wrap=wrap)
        terms = DiffusionELBO().terms(model_of(latent(wrap=wrap)), guide, X)
        kl = 0.5 * (0.7**2 + 0.5**2 - 1) - math.log(0.7)
        torch.testing.assert_close(terms["z"], torch.full((5,), kl) * weight)


def test_a_subsample_in_the_model_only_is_refused():
    def model(x):
        with pyro.plate("data", 10, subsample_size=5, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def subsampled(x):
        with pyro.plate("data", 10, subsample_size=5, dim=-1):
            pyro.sample("z", dist.Normal(0.5, 1.0))

    with pytest.raises(ValueError, match="scale must stand in both"):
        DiffusionELBO().loss(model, guide, X)
    torch.testing.assert_close(DiffusionELBO().terms(model, subsampled, X)["z"], torch.full((5,), 2 * 0.125))


def test_a_disagreement_on_the_event_is_refused():
    def program(event):
        def run():
            with pyro.plate("data", 5, dim=-1) if event else pyro.plate_stack("data", [5, 2]):
                law = dist.Normal(torch.zeros(5, 2), 1.0)
                pyro.sample("z", law.to_event(1) if event else law)

        return run

    with pytest.raises(ValueError, match=r"event_shape of site 'z'.*\(2,\) in the model and \(\) in the guide"):
        DiffusionELBO().loss(program(True), program(False))


def test_a_fixed_discrete_guide_is_right_in_value_and_gradient():
    """-log p(x) + gap of a Bernoulli latent, summed over its two values."""
    logit, q, x = nn.Parameter(torch.tensor(0.4)), torch.tensor(0.3), torch.tensor(1.2)
    loc = nn.Parameter(torch.tensor([-1.0, 0.8]))

    def model(n):
        with pyro.plate("data", n, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=logit))
            pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x.expand(n))

    def guide(n):
        with pyro.plate("data", n, dim=-1):
            pyro.sample("z", dist.Bernoulli(q))

    p = logit.sigmoid()
    density = -dist.Normal(loc, 1.0).log_prob(x)
    exact = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log() + q * density[1] + (1 - q) * density[0]
    expected = torch.cat([exact[None], torch.cat([g.reshape(-1) for g in torch.autograd.grad(exact, (logit, loc))])])

    def draw():
        loss = DiffusionELBO().differentiable_loss(model, guide, 200) / 200
        gradients = torch.autograd.grad(loss, (logit, loc))
        return torch.cat([loss[None], torch.cat([g.reshape(-1) for g in gradients])])

    assert not far(repeat(200, draw)[:, [0, 2, 3]], expected[[0, 2, 3]].detach())
    torch.testing.assert_close(draw()[1], expected[1])  # the KL is analytic


def test_without_an_analytic_kl_a_term_is_right_in_mean():
    def model(n):
        with pyro.plate("data", n, dim=-1):
            pyro.sample("z", dist.StudentT(3.0, 0.5, 1.5))

    def guide(n):
        with pyro.plate("data", n, dim=-1):
            pyro.sample("z", dist.Normal(-0.3, 0.8))

    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    z = torch.tensor(-0.3 + 0.8 * nodes)
    integrand = dist.Normal(-0.3, 0.8).log_prob(z) - dist.StudentT(3.0, 0.5, 1.5).log_prob(z)
    expected = float((integrand.double() * torch.tensor(weights / weights.sum())).sum())
    terms = DiffusionELBO().terms(model, guide, 50000)
    assert not far(terms["z"], expected)
    assert terms["z"].std() > 0


def test_a_delta_in_the_guide_costs_its_log_density():
    def guide():
        pyro.sample("z", dist.Delta(torch.tensor(0.7), log_density=torch.tensor(0.25)))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    expected = 0.25 + 0.5 * math.log(2 * math.pi) + 0.5 * 0.7**2
    assert DiffusionELBO().loss(model, guide) == pytest.approx(expected)
    assert Trace_ELBO().loss(model, guide) == pytest.approx(expected)


def test_auxiliary_sites_of_an_autoguide_count_with_their_jacobian():
    """AutoNormal draws each latent unconstrained, as an auxiliary site, and then maps it by a Delta."""

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.3, 0.9))
        loc = pyro.sample("loc", dist.Normal(0.2, 2.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    guide = AutoNormal(model, init_scale=0.3)
    guide(X)
    pair = side_by_side(50, model, guide)
    assert not differ(*(repeat(20, lambda e=elbo: e().loss(*pair, X) / 50) for elbo in (DiffusionELBO, Trace_ELBO)))

    means = {name: float(value) for name, value in guide.median(X).items()}
    kl = 0.0  # both laws are normal in the unconstrained space
    for mean, (m, s) in ((math.log(means["scale"]), (0.3, 0.9)), (means["loc"], (0.2, 2.0))):
        kl += 0.5 * ((0.3 / s) ** 2 - 1 + (mean - m) ** 2 / s**2) - math.log(0.3 / s)
    terms = DiffusionELBO().terms(*side_by_side(2000, model, guide), X)
    assert not far(of_each({name: term for name, term in terms.items() if name != "x"}, 2000), kl)
    assert DiffusionELBO().terms(model, guide, X)["x"].shape == (5,)


def test_the_elbo_of_a_pair_is_a_module_with_all_its_parameters():
    diffusion = make_diffusion()
    one_step = diffusion.one_step()
    for pair in (diffusion, one_step):
        module = DiffusionELBO()(pair.model, pair.guide)
        assert {id(p) for p in module.parameters()} == {id(p) for p in diffusion.parameters()}
        diffusion.zero_grad()
        module(X_0).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["gaussian", "bits"])
@pytest.mark.parametrize("one_step", [False, True])
def test_no_number_is_read_on_the_way_to_the_gradient(monkeypatch, one_step, kind):
    diffusion, x_0 = make_diffusion(), X_0
    if kind == "bits":
        forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(4), rate=0.2)
        denoiser = pyrodiff.LogitPrediction(networks.MLP((2,), hidden=8), forward)
        diffusion = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), (2,))
        x_0 = (X_0 > 1).float()
    pair = diffusion.one_step() if one_step else diffusion
    pyro.enable_validation(False)

    def item(tensor):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch.Tensor, "item", item)
    monkeypatch.setattr(torch.Tensor, "tolist", item)
    monkeypatch.setattr(torch.Tensor, "__float__", item)
    DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0).backward()


def test_a_pair_with_nothing_to_learn_has_a_loss():
    diffusion = gaussian_diffusion(pyrodiff.LinearSchedule(2), torch.zeros(2), torch.ones(2))
    diffusion.requires_grad_(False).eval()
    assert not DiffusionELBO().loss_and_grads(diffusion.model, diffusion.guide, X_0).requires_grad


def test_an_auxiliary_site_is_refused_where_no_delta_needs_it():
    """Its entropy would otherwise count: -4.6 nats were reported where the truth is 1.5."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("a", dist.Normal(0.0, 100.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.raises(ValueError, match=r"'a' is auxiliary: its entropy would count"):
        DiffusionELBO().loss(model, guide, torch.tensor(0.7))


def test_a_site_in_other_plates_is_refused():
    def model():
        with pyro.plate("data", 10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(0.3, 1.0))

    with pytest.raises(ValueError, match=r"'z' must stand in the same plates .* \(10,\) in the model and \(\)"):
        DiffusionELBO().loss(model, guide)


def test_a_mask_that_masks_nothing_may_stand_in_one_program():
    def model():
        with poutine.mask(mask=True):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(0.3, 1.0))

    assert DiffusionELBO().loss(model, guide) == pytest.approx(0.3**2 / 2)
