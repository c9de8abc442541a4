"""What Pyro's TraceMeanField_ELBO is used for: DiffusionELBO has the bound in mean there, or says why it has none.

The bound is E_q log q(z) / p(z, x): in closed form, or the mean of Pyro's Trace_ELBO, which takes no KL anywhere.
"""

import contextlib
import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import differ, far, gaussian_diffusion, gradient, of_each, quiet, repeat, side_by_side
from loops import still
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, autoguide, config_enumerate
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import nn
from torch.distributions import constraints

import pyrodiff
from pyrodiff import SVI, DiffusionELBO

X = torch.tensor([0.3, -1.2, 2.0, 0.8, -0.5])
ODD = torch.tensor([True, False, True, False, True])
LOG_2PI = math.log(2 * math.pi)
RUNS = 25  # side by side
differ = functools.partial(differ, rounding=1e-5)


def means(model, guide, *args, calls=20, elbos=(DiffusionELBO, Trace_ELBO), **options):
    """Losses by each ELBO: of 25 runs side by side the mean; with options, of the particles that these ask for."""
    runs, pair = (1, (model, guide)) if options else (RUNS, side_by_side(RUNS, model, guide))
    with quiet():
        return [repeat(calls, lambda e=elbo: e(**options).loss(*pair, *args) / runs) for elbo in elbos]


def kl(m, s, loc=0.0, scale=1.0):
    """KL(N(m, s^2) || N(loc, scale^2))."""
    s = torch.as_tensor(s)
    return 0.5 * ((s / scale) ** 2 - 1 + ((m - loc) / scale) ** 2) - torch.log(s / scale)


def square(d, variance=0.0, scale=1.0):
    """-E log N(d; 0, scale^2) of a difference with the mean d and a variance."""
    return 0.5 * (LOG_2PI + (d**2 + variance) / scale**2) + math.log(scale)


# Two sites


def two(x=1.0):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(x))


def factorised():
    loc = pyro.param("loc", torch.tensor(0.4))
    pyro.sample("a", dist.Normal(loc, 0.5))
    pyro.sample("b", dist.Normal(0.7, 0.3))


def dependent():
    a = pyro.sample("a", dist.Normal(0.4, 0.5))
    pyro.sample("b", dist.Normal(0.6 * a + 0.46, 0.3))


def the_other_way():
    b = pyro.sample("b", dist.Normal(0.7, 0.8))
    pyro.sample("a", dist.Normal(0.9 * b - 0.23, 0.5))


def entropy(scale):
    return 0.5 * (LOG_2PI + 1) + math.log(scale)


TWO = {  # the moments of a, of b - a and of x - b
    "factorised": (factorised, square(0.4, 0.25) + square(0.3, 0.34) + square(0.3, 0.09) - entropy(0.3)),
    "dependent": (dependent, square(0.4, 0.25) + square(0.3, 0.13) + square(0.3, 0.18) - entropy(0.3)),
    "the other way": (
        the_other_way,
        square(0.4, 0.25 + 0.81 * 0.64) + square(0.3, 0.25 + 0.01 * 0.64) + square(0.3, 0.64) - entropy(0.8),
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_two_sites_have_the_closed_form(name):
    guide, expected = TWO[name]
    expected = expected - entropy(0.5)
    ours, pyros = means(two, guide, calls=24, elbos=(DiffusionELBO, TraceMeanField_ELBO))
    assert not far(ours, expected)
    assert far(pyros, expected) == (name == "the other way")  # where Pyro warns, and is wrong
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        DiffusionELBO().loss(two, guide)
    assert len(record) == (name == "the other way")


def test_a_parameter_of_the_guide_has_the_gradient_of_the_closed_form():
    """Of 0.5 loc^2 + 0.5 (0.7 - loc)^2, at 0.4; by SVI too, and with a scale around it all."""
    with quiet():
        factorised()
    loc = pyro.get_param_store()._params["loc"]
    model, guide = side_by_side(RUNS, two, factorised)
    for wrap, weight in ((contextlib.nullcontext, 1.0), (lambda: poutine.scale(scale=3.0), 3.0)):

        def scaled(program, wrap=wrap):
            with wrap():
                program()

        def draw(scaled=scaled):
            loss = DiffusionELBO().differentiable_loss(lambda: scaled(model), lambda: scaled(guide))
            return torch.autograd.grad(loss, loc)[0] / RUNS

        assert not far(repeat(20, draw), weight * (0.4 - 0.3))
    svi = SVI(model, guide, still, DiffusionELBO())

    def step():
        svi.step()
        return loc.grad / RUNS

    assert not far(repeat(20, step), 0.1)


def test_a_model_without_latents_costs_what_it_observes():
    def model():
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(0.0, scale), obs=X)

    expected = float((0.5 * LOG_2PI + math.log(2.0) + X**2 / 8).sum())
    for elbo in (DiffusionELBO(), DiffusionELBO(num_particles=3)):
        assert elbo.loss(model, lambda: None) == pytest.approx(expected)
    assert DiffusionELBO().loss(lambda: None, lambda: None) == 0.0


def test_latents_without_data_cost_their_kl():
    (draws,) = means(poutine.block(two, hide=["x"]), factorised, elbos=[DiffusionELBO])
    assert not far(draws, TWO["factorised"][1] - square(0.3, 0.09) - entropy(0.5))


def test_deterministic_sites_and_parameters_cost_nothing():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * a)
        pyro.param("p", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.param("q", torch.tensor(1.0))
        a = pyro.sample("a", dist.Normal(0.4, 0.5))
        pyro.deterministic("triple", 3 * a)
        pyro.deterministic("double", 2 * a)

    terms = DiffusionELBO().terms(model, guide)
    assert set(terms) == {"a", "x"}
    assert float(terms["a"]) == pytest.approx(float(kl(0.4, 0.5)))


# Masks


def plated(law, around=contextlib.nullcontext, observe=True):
    """A site z in a plate of 5, and a datum each."""

    def program(x):
        with pyro.plate("data", 5, dim=-1):
            with around():
                z = pyro.sample("z", law())
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return program


def prior(mask=None):
    law = dist.Normal(0.0, torch.ones(5))
    return law if mask is None else law.mask(mask)


def approximate(mask=None):
    law = dist.Normal(0.5 * X, 0.7)
    return law if mask is None else law.mask(mask)


MASKS = {"all": True, "none": False, "odd": ODD, "all, as a tensor": torch.tensor(True), "one": torch.tensor([False])}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["law", "handler"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 25, "vectorize_particles": True, "max_plate_nesting": 1}],
    ids=["one", "particles"],
)
def test_a_mask_in_both_programs_masks_the_kl(name, kind, options):
    mask = MASKS[name]
    if kind == "law":
        model, guide = plated(lambda: prior(mask)), plated(lambda: approximate(mask), observe=False)
    else:
        model = plated(prior, lambda: poutine.mask(mask=mask))
        guide = plated(approximate, lambda: poutine.mask(mask=mask), observe=False)
    costs = kl(0.5 * X, 0.7) * torch.as_tensor(mask).float()
    if mask is not False or kind == "law":
        terms = DiffusionELBO(**options).terms(model, guide, X)
        torch.testing.assert_close(terms["z"], costs)
    expected = float((costs + square(0.5 * X, 0.49)).sum())
    ours, theirs = means(model, guide, X, **options)
    assert not far(ours, expected)
    assert not far(theirs, expected)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_law_that_is_masked_altogether_costs_nothing(shape):
    """-log N(1; 0, 1) is all there is."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0).mask(False).to_event(len(shape)))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(torch.full(shape, 0.3), 0.5).mask(False).to_event(len(shape)))

    for elbo in (DiffusionELBO(), DiffusionELBO(num_particles=2)):
        assert elbo.loss(model, guide) == pytest.approx(0.5 * LOG_2PI + 0.5, abs=1e-6)
    assert float(DiffusionELBO().terms(model, guide)["z"]) == 0.0
    assert not DiffusionELBO().loss_and_grads(model, guide).requires_grad


@pytest.mark.parametrize("in_guide", MASKS)
@pytest.mark.parametrize("in_model", MASKS)
def test_masks_of_laws_that_differ_are_refused(in_model, in_guide):
    """E[m log q - m' log p] is no KL where m is not m'; Trace_ELBO is then no bound either."""
    ours, theirs = (torch.as_tensor(MASKS[name]).expand(5) for name in (in_model, in_guide))
    model = plated(lambda: prior(MASKS[in_model]))
    guide = plated(lambda: approximate(MASKS[in_guide]), observe=False)
    if torch.equal(ours, theirs):
        expected = kl(0.5 * X, 0.7) * ours.float()
        torch.testing.assert_close(DiffusionELBO().terms(model, guide, X)["z"], expected)
    else:
        with pytest.raises(ValueError, match=r"mask must stand in both.*'z'"):
            DiffusionELBO().terms(model, guide, X)


def test_a_law_masked_by_true_is_a_law():
    for masks in ((True, None), (None, True)):
        model, guide = plated(lambda m=masks: prior(m[0])), plated(lambda m=masks: approximate(m[1]), observe=False)
        torch.testing.assert_close(DiffusionELBO().terms(model, guide, X)["z"], kl(0.5 * X, 0.7))


def test_data_that_are_missing_in_part():
    """``obs_mask`` makes a latent site of what is missing, which the guide draws under the mask of what is not."""

    def model():
        with pyro.plate("data", 5, dim=-1):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=X, obs_mask=ODD)

    def guide(mask=True):
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("loc", dist.Normal(0.1, 0.5))
            with poutine.mask(mask=~ODD) if mask else contextlib.nullcontext():
                pyro.sample("y_unobserved", dist.Normal(0.3, 0.8))

    latent = square(0.2, 0.25 + 0.64) - entropy(0.8)
    expected = (kl(0.1, 0.5) + torch.where(ODD, square(X - 0.1, 0.25), torch.tensor(latent))).sum()
    ours, theirs = means(model, guide)
    assert not far(ours, expected)
    assert not far(theirs, expected)
    with pytest.raises(ValueError, match=r"mask must stand in both.*'y_unobserved'"):
        DiffusionELBO().loss(model, lambda: guide(mask=False))


# Plates and subsamples


def test_nested_and_crossed_plates_have_the_closed_form():
    def program(m, scale, observe):
        def run():
            rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
            with rows:
                a = pyro.sample("a", dist.Normal(m, scale))
            with columns:
                b = pyro.sample("b", dist.Normal(m * torch.arange(3.0), scale).to_event(0))
            with rows, columns:
                c = pyro.sample("c", dist.Normal(torch.full((4,), m), scale).to_event(1))
                if observe:
                    pyro.sample("x", dist.Normal(a + b + c.sum(-1), 1.0), obs=torch.ones(2, 3))

        return run

    model, guide = program(0.2, 1.0, True), program(0.3, 0.5, False)
    one = float(kl(0.3, 0.5, 0.2))
    terms = DiffusionELBO().terms(model, guide)
    torch.testing.assert_close(terms["a"], torch.full((2, 1), one))
    torch.testing.assert_close(terms["b"], kl(0.3 * torch.arange(3.0), 0.5, 0.2 * torch.arange(3.0)))
    torch.testing.assert_close(terms["c"], torch.full((2, 3), 4 * one))
    mean = 0.3 + 0.3 * torch.arange(3.0) + 1.2
    expected = 2 * one + kl(0.3 * torch.arange(3.0), 0.5, 0.2 * torch.arange(3.0)).sum() + 24 * one
    assert not far(means(model, guide)[0], expected + 2 * square(1 - mean, 6 * 0.25).sum())
    options = {"num_particles": RUNS, "vectorize_particles": True, "max_plate_nesting": 2}
    assert not far(means(model, guide, **options)[0], expected + 2 * square(1 - mean, 6 * 0.25).sum())


@pytest.mark.parametrize("sequential", [False, True])
def test_subsamples_in_both_programs_count_for_all(sequential):
    """Of ten data, four at a time: scaled by 10 / 4 in both, the mean over subsamples is the bound of all ten."""
    data = torch.linspace(-1.0, 2.0, 10)
    plate = (lambda: pyro.plate("data", 10, 4)) if sequential else (lambda: pyro.plate("data", 10, 4, dim=-1))

    def model():
        for i in plate() if sequential else [None]:
            if sequential:
                z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=data[i])
            else:
                with plate() as index:
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        for i in plate() if sequential else [None]:
            if sequential:
                pyro.sample(f"z_{i}", dist.Normal(0.4 * data[i], 0.7))
            else:
                with plate() as index:
                    pyro.sample("z", dist.Normal(0.4 * data[index], 0.7))

    expected = (kl(0.4 * data, 0.7) + square(0.6 * data, 0.49)).sum()
    assert not far(means(model, guide, calls=100, elbos=[DiffusionELBO])[0], expected)


# Deltas, and laws without a KL


@pytest.mark.parametrize("event", [(), (3,)])
def test_a_delta_of_the_guide_keeps_its_log_density(event):
    """Pyro's TraceMeanField_ELBO leaves it out."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(event), 1.0).to_event(len(event)))

    def guide():
        law = dist.Delta(torch.full(event, 0.7), log_density=torch.full((), 0.25), event_dim=len(event))
        pyro.sample("z", law)

    expected = 0.25 + math.prod(event) * square(0.7)
    for elbo in (DiffusionELBO(), Trace_ELBO()):
        assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-6)
    assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected - 0.25, rel=1e-6)


def relaxed(temperature):
    return dist.RelaxedOneHotCategorical(torch.tensor(temperature), logits=torch.tensor([0.3, -0.5, 1.0]))


def spline():
    transform = dist.transforms.Spline(1, count_bins=4)
    with torch.no_grad():
        for i, p in enumerate(transform.parameters()):
            p.copy_(torch.sin(torch.arange(float(p.numel())) + i).reshape(p.shape))
    return dist.TransformedDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), [transform])


WITHOUT_A_KL = {
    "relaxed one-hot": (lambda: relaxed(0.8), lambda: relaxed(1.3)),
    "relaxed bit": (
        lambda: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=torch.tensor(0.4)),
        lambda: dist.RelaxedBernoulli(torch.tensor(1.1), logits=torch.tensor(-0.2)),
    ),
    "flow and normal": (lambda: dist.Normal(torch.zeros(1), 1.0).to_event(1), spline),
    "two transforms": (
        lambda: dist.LogNormal(0.2, 0.6),
        lambda: dist.TransformedDistribution(
            dist.Normal(0.1, 0.4), [dist.transforms.AffineTransform(0.2, 0.9), dist.transforms.ExpTransform()]
        ),
    ),
    "Student and Laplace": (lambda: dist.StudentT(4.0, 0.2, 1.0), lambda: dist.Laplace(0.1, 0.6)),
    "other nestings": (
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        lambda: dist.Normal(torch.full((2,), 0.3), 0.6).to_event(1),
    ),
}


@pytest.mark.parametrize("name", WITHOUT_A_KL)
def test_a_law_without_a_kl_is_right_in_mean_and_in_silence(name):
    p, q = WITHOUT_A_KL[name]

    def model():
        pyro.sample("z", p())

    def guide():
        pyro.sample("z", q())

    ours = of_each(DiffusionELBO().terms(*side_by_side(4000, model, guide)), 4000)
    law_q, law_p = q(), p()
    with torch.no_grad():
        z = law_q.sample((4000,))
        ratio = (law_q.log_prob(z) - law_p.log_prob(z)).double()
    assert not differ(ours, ratio)


def test_one_transform_of_two_normals_has_the_kl_of_the_normals():
    def program(*args):
        return lambda: pyro.sample("z", dist.LogNormal(*args))

    assert DiffusionELBO().loss(program(0.2, 0.6), program(0.5, 0.3)) == pytest.approx(float(kl(0.5, 0.3, 0.2, 0.6)))


# Automatic guides


def hierarchical(x):
    scale = pyro.sample("scale", dist.LogNormal(0.3, 0.9))
    loc = pyro.sample("loc", dist.Normal(0.2, 2.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide_list(model):
    guide = autoguide.AutoGuideList(model)
    for name, kind in (
        ("z", autoguide.AutoNormal),
        ("scale", autoguide.AutoDelta),
        ("loc", autoguide.AutoDiagonalNormal),
    ):
        guide.append(kind(poutine.block(model, expose=[name]), init_loc_fn=init_to_median))
    return guide


def structured(model):
    conditionals = {"scale": "normal", "loc": "normal", "z": "normal"}
    dependencies = {"loc": {"scale": "linear"}, "z": {"loc": "linear"}}
    guide = autoguide.AutoStructured(
        model, conditionals=conditionals, dependencies=dependencies, init_loc_fn=init_to_median
    )
    guide(X)
    with torch.no_grad():
        for i, p in enumerate(guide.parameters()):
            p.add_(0.1 * torch.cos(torch.arange(float(p.numel())) + i).reshape(p.shape))
    return guide


def automatic(name):
    return lambda model: getattr(autoguide, name)(model, init_loc_fn=init_to_median)


def messenger(name):
    return lambda model: getattr(autoguide, name)(model)


GUIDES = {
    **{
        name: automatic(name)
        for name in (
            "AutoNormal",
            "AutoDiagonalNormal",
            "AutoMultivariateNormal",
            "AutoLowRankMultivariateNormal",
            "AutoDelta",
            "AutoLaplaceApproximation",
            "AutoGaussian",
        )
    },
    "AutoGuideList": guide_list,
    "AutoStructured": structured,
    "AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[8]),
}
MESSENGERS = ("AutoNormalMessenger", "AutoHierarchicalNormalMessenger")


@pytest.mark.parametrize("name", GUIDES)
def test_an_automatic_guide_has_the_mean_of_trace_elbo(name):
    guide = GUIDES[name](hierarchical)
    guide(X)
    assert not differ(*means(hierarchical, guide, X))


@pytest.mark.parametrize("name", MESSENGERS)
@pytest.mark.parametrize("validated", [True, False])
def test_a_guide_that_is_the_model_with_other_laws_has_the_mean_of_trace_elbo(name, validated):
    """Its trace has the model's observed sites too, which are no part of q."""
    guide = messenger(name)(hierarchical)
    guide(X)
    particles = {"num_particles": RUNS, "vectorize_particles": True, "max_plate_nesting": 1}
    with pyro.validation_enabled(validated):
        assert not differ(*means(hierarchical, guide, X, **particles))


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_the_jacobian_of_a_constrained_site_counts(name):
    """log |dz/du| of exp and of a sigmoid, whose mean is closed or by many draws: Pyro's TraceMeanField has none."""

    def model():
        pyro.sample("s", dist.LogNormal(-1.5, 0.5))
        pyro.sample("u", dist.Beta(2.0, 3.0))

    guide = getattr(autoguide, name)(model, init_loc_fn=init_to_median, init_scale=0.2)
    guide()
    ours, theirs, pyros = means(model, guide, elbos=(DiffusionELBO, Trace_ELBO, TraceMeanField_ELBO))
    assert not differ(ours, theirs)
    assert abs(float(pyros.mean() - ours.mean())) > 1
    medians = guide.median()
    with torch.no_grad():
        noise = 0.2 * torch.randn(200000)
        s = medians["s"] * noise.exp()
        u = torch.sigmoid(torch.logit(medians["u"]) + noise)
        log_q = -square(noise, scale=0.2)
        costs = log_q - s.log() - dist.LogNormal(-1.5, 0.5).log_prob(s)
        costs = costs + log_q - u.log() - (1 - u).log() - dist.Beta(2.0, 3.0).log_prob(u)
    assert not differ(ours, costs.double())


def test_an_automatic_delta_is_the_point_s_density():
    """A maximum a posteriori has no Jacobian, in any ELBO."""
    guide = autoguide.AutoDelta(hierarchical, init_loc_fn=init_to_median)
    guide(X)
    point = guide.median(X)
    expected = -sum(
        float(law.log_prob(value).sum())
        for law, value in (
            (dist.LogNormal(0.3, 0.9), point["scale"]),
            (dist.Normal(0.2, 2.0), point["loc"]),
            (dist.Normal(point["loc"], point["scale"]), point["z"]),
            (dist.Normal(point["z"], 0.5), X),
        )
    )
    assert DiffusionELBO().loss(hierarchical, guide, X) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDiagonalNormal", "AutoGuideList"])
def test_an_automatic_guide_learns_by_the_gradient_of_trace_elbo(name):
    guide = GUIDES[name](hierarchical)
    guide(X)

    pair = side_by_side(RUNS, hierarchical, guide)

    def draw(elbo):
        return gradient(elbo.differentiable_loss(*pair, X), guide) / RUNS

    with quiet():
        ours, theirs = (repeat(20, lambda e=elbo: draw(e())) for elbo in (DiffusionELBO, Trace_ELBO))
    assert float(ours.mean(0).abs().max()) > 1
    assert not differ(ours, theirs)


@pytest.mark.parametrize(
    "config", [{"z": LocScaleReparam(0.0)}, {"z": LocScaleReparam(0.3), "scale": TransformReparam()}]
)
def test_a_reparameterised_model_has_the_mean_of_trace_elbo(config):
    model = poutine.reparam(hierarchical, config=config)
    guide = autoguide.AutoNormal(model, init_loc_fn=init_to_median)
    guide(X)
    assert not differ(*means(model, guide, X))


def test_a_factor_of_the_model_counts_and_one_of_the_guide_is_refused():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Normal(0.4, 0.5))

    def with_a_factor(**options):
        guide()
        pyro.factor("g", torch.tensor(0.3), **options)

    assert DiffusionELBO().loss(model, guide) == pytest.approx(float(kl(0.4, 0.5)) - 0.7)
    for options in ({"has_rsample": True}, {"has_rsample": False}):
        with pytest.raises(ValueError, match="'g'"):
            DiffusionELBO().loss(model, lambda o=options: with_a_factor(**o))


# Under Pyro's ELBO that enumerates


def small_diffusion(dtype, shift=0.0, widen=1.0):
    m, v = torch.tensor([0.7, -1.3], dtype=dtype), torch.tensor([0.3, 1.7], dtype=dtype)
    return gaussian_diffusion(pyrodiff.LinearSchedule(4, 0.05, 0.5), m, v, shift, widen)


DATA = torch.tensor([[0.2, -2.0], [1.1, 0.4], [0.5, 0.5]])
ENUMERATING = {
    "one": {"max_plate_nesting": 1},
    "particles": {"max_plate_nesting": 1, "num_particles": 4, "vectorize_particles": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", ENUMERATING)
def test_the_one_step_pair_has_the_bound_where_nothing_is_enumerated(dtype, options):
    """The density of the data, since the kernels are exact; Pyro says that there is nothing to enumerate."""
    diffusion, x_0 = small_diffusion(dtype), DATA.to(dtype)
    pair, elbo = diffusion.one_step(), TraceEnum_ELBO(**ENUMERATING[options])
    log_p = diffusion.model.prior.law(0).log_prob(x_0).sum()
    expected = torch.cat([-log_p[None], gradient(-log_p, diffusion)]).detach().double()

    def draw():
        loss = elbo.differentiable_loss(pair.model, pair.guide, x_0.repeat(RUNS, 1)) / RUNS
        assert loss.dtype == dtype
        return torch.cat([loss[None], gradient(loss, diffusion)])

    with quiet():
        draws = repeat(20, draw)
    assert not far(draws, expected)
    with pytest.warns(UserWarning, match="no sample sites configured for enumeration"):
        elbo.loss(pair.model, pair.guide, x_0)


LOGITS, CENTERS, LABELS = torch.tensor([0.4, -0.3, 0.1]), torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.3, -0.8, 1.7])


def labelled(pair, inside):
    """The pair, and for each datum a label that is one of three and a number that depends on it."""

    def model(x_0):
        if not inside:
            pair.model(x_0)
        with pyro.plate("labels", 3, dim=-1):
            c = pyro.sample("c", dist.Categorical(LOGITS.double().softmax(-1).to(x_0.dtype)))
            pyro.sample("y", dist.Normal(CENTERS.to(x_0.dtype)[c], 0.7), obs=LABELS.to(x_0.dtype))
        if inside:
            pair.model(x_0)

    def guide(x_0):
        if not inside:
            pair.guide(x_0)
        with pyro.plate("labels", 3, dim=-1):
            pyro.sample("c", dist.Categorical(Q.to(x_0.dtype)), infer={"enumerate": "parallel"})
        if inside:
            pair.guide(x_0)

    return model, guide


Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def label_bound():
    """The bound of the labels, by their three values."""
    p, q = LOGITS.double().softmax(-1), Q
    log_y = -square(LABELS.double()[:, None] - CENTERS.double(), scale=0.7)
    return float((q * (q.log() - p.log() - log_y)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("one_step", [False, True])
def test_a_pair_beside_an_enumerated_label_has_the_sum_of_their_bounds(dtype, first, one_step):
    diffusion, x_0 = small_diffusion(dtype), DATA.to(dtype)
    model, guide = side_by_side(RUNS, *labelled(diffusion.one_step() if one_step else diffusion, inside=first))
    elbo = TraceEnum_ELBO(max_plate_nesting=4)
    log_p = diffusion.model.prior.law(0).log_prob(x_0).sum()

    def draw():
        loss = elbo.differentiable_loss(model, guide, x_0) / RUNS
        return torch.cat([loss[None], gradient(loss, diffusion)])

    draws = repeat(20, draw)
    expected = torch.cat([label_bound() - log_p[None], gradient(-log_p, diffusion)]).detach().double()
    rounding = 1e-4 if dtype is torch.float32 else 1e-9
    off = (draws.mean(0) - expected).abs()
    assert bool((off <= 5 * draws.std(0) / 20**0.5 + rounding).all())  # the label itself is summed over:
    assert one_step or float(draws[:, 0].std()) < rounding  # of the trajectory pair, whose kernels are exact, no draw


class ByTheLabel(nn.Module):
    """A Gaussian kernel whose mean depends on a label that Pyro may sum over: the state then broadcasts."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))
        self.label = None

    def forward(self, x_t, t):
        loc = 0.6 * x_t if self.label is None else 0.6 * x_t + self.loc[self.label]
        return dist.Normal(loc, 0.8 * torch.ones_like(loc))


class Bit(nn.Module):
    """p(x_{t-1} | x_t) of one bit, a table of log odds."""

    def __init__(self, num_steps):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_steps + 1, 2, dtype=torch.float64))

    def forward(self, x_t, t):
        return dist.Bernoulli(logits=self.logits[t, x_t.long()])


BETAS, RATE = [0.2, 0.3, 0.6], 0.3


def bit_step(x, y, keep):
    """q(x_t = y | x_s = x) where a bit is kept with the probability ``keep``, and drawn anew otherwise."""
    return keep * (x == y) + (1 - keep) * (RATE if y else 1 - RATE)


def bit_bound(table, x_0):
    """-E_q log p(x_0:3) / q(x_1:3 | x_0), all paths summed."""
    total = 0.0
    for path in ((x_0, a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)):
        q = math.prod(bit_step(path[t - 1], path[t], 1 - BETAS[t - 1]) for t in (1, 2, 3))
        log_p = math.log(RATE if path[3] else 1 - RATE)
        for t in (1, 2, 3):
            odds = table.logits[t, path[t]]
            log_p = log_p + torch.nn.functional.logsigmoid(odds if path[t - 1] else -odds)
        total = total - q * (log_p - math.log(q))
    return total


def test_a_chain_of_bits_is_enumerated_to_rounding():
    """Every state is broadcast over the values of those before it; value and gradient are exact, draw or none."""
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS), rate=RATE)
    diffusion = pyrodiff.Diffusion(forward, Bit(3), event_shape=())
    x_0 = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    guide, elbo = config_enumerate(diffusion.guide, "parallel"), TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(diffusion.model, guide, x_0)
    expected = sum(bit_bound(diffusion.reverse, int(x)) for x in x_0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(loss, diffusion), gradient(expected, diffusion), rtol=1e-9, atol=1e-10)
    draws = of_each(DiffusionELBO().terms(diffusion.model, diffusion.guide, x_0.repeat_interleave(3000)), 9000)
    assert not far(draws.reshape(3, 3000).sum(0), float(expected.detach()))


@pytest.mark.parametrize("validated", [True, False])
def test_a_label_of_all_data_is_summed_over_before_the_chain(validated):
    """A kernel that depends on a label of all data: the bound is the mean over the label of the bound of each value."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1, 0.3, 0.4))
    reverse = ByTheLabel()
    diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=())
    x_0, q = torch.tensor([0.2, -1.4, 0.9], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def model(x_0):
        reverse.label = pyro.sample("c", dist.Categorical(torch.ones(3, dtype=torch.float64) / 3))
        diffusion.model(x_0)

    def guide(x_0):
        pyro.sample("c", dist.Categorical(q), infer={"enumerate": "parallel"})
        diffusion.guide(x_0)

    prior = 0.5 * (0.3 - 1 - math.log(0.3) + 0.7 * x_0**2)
    mean = x_0[:, None] * (1 - 0.6 * math.sqrt(0.7)) - reverse.loc
    of_label = (prior[:, None] + square(mean, 0.36 * 0.3, 0.8)).sum(0)
    expected = (q * (of_label + q.log() + math.log(3))).sum()
    elbo, pair = TraceEnum_ELBO(max_plate_nesting=4), side_by_side(RUNS, model, guide)

    def draw():
        loss = elbo.differentiable_loss(*pair, x_0) / RUNS
        return torch.cat([loss[None], gradient(loss, diffusion)])

    (ours,) = means(model, guide, x_0, calls=32, elbos=[DiffusionELBO])
    assert not far(ours, float(expected.detach()))
    with pyro.validation_enabled(validated):
        draws = repeat(20, draw)
    assert not far(draws, torch.cat([expected[None], gradient(expected, diffusion)]).detach())


# Errors


def wrong(diffusion):
    """What each call is refused for."""
    pair = diffusion.one_step()
    x_0 = DATA[:, :1]
    for programs in (diffusion, pair):
        yield lambda p=programs: DiffusionELBO().loss(p.model, p.guide, x_0)
        yield lambda p=programs: DiffusionELBO().terms(p.model, p.guide, x_0)
        yield lambda p=programs: DiffusionELBO(num_particles=2).loss_and_grads(p.model, p.guide, x_0)
        yield lambda p=programs: SVI(p.model, p.guide, still, DiffusionELBO()).step(x_0)
        yield lambda p=programs: SVI(p.model, p.guide, still, DiffusionELBO()).evaluate_loss(x_0)
    yield lambda: pyrodiff.bound(diffusion, x_0)
    yield lambda: pyrodiff.importance_bound(diffusion, x_0, num_particles=2)


@pytest.mark.parametrize("call", range(12))
def test_an_error_of_this_package_is_said_without_the_shapes_of_a_trace(call):
    with pytest.raises(ValueError, match="x_0") as caught:
        list(wrong(small_diffusion(torch.float32)))[call]()
    assert "Trace Shapes" not in str(caught.value)
    assert "Sample Sites" not in str(caught.value)
    assert "shape" in str(caught.value)


class Broken(nn.Module):
    """A kernel of a wrong shape, or one that fails by itself, after the site x_T."""

    def __init__(self, own):
        super().__init__()
        self.w, self.own = nn.Parameter(torch.tensor(0.3)), own

    def forward(self, x_t, t):
        if self.own:
            raise ValueError("the user's kernel is broken")
        return dist.Normal(self.w * x_t[..., :1], 1.0).to_event(1)


def broken(own):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(3, 0.05, 0.5))
    return pyrodiff.Diffusion(forward, Broken(own), event_shape=(2,))


@pytest.mark.parametrize("way", ["loss", "step"])
def test_a_kernel_of_another_event_is_refused_without_the_shapes_of_a_trace(way):
    diffusion = broken(own=False)
    elbo, svi = DiffusionELBO(), SVI(diffusion.model, diffusion.guide, still, DiffusionELBO())
    with pytest.raises(ValueError, match="reverse must have the event_shape") as caught:
        elbo.loss(diffusion.model, diffusion.guide, DATA) if way == "loss" else svi.step(DATA)
    assert "Trace Shapes" not in str(caught.value)


@pytest.mark.parametrize("way", ["loss", "step"])
def test_a_users_own_error_keeps_the_shapes_of_the_trace(way):
    """In a module of the user's below the package's programs, and in a program of the user's."""
    diffusion = broken(own=True)
    elbo, svi = DiffusionELBO(), SVI(diffusion.model, diffusion.guide, still, DiffusionELBO())
    with pytest.raises(ValueError, match="the user's kernel is broken") as caught:
        elbo.loss(diffusion.model, diffusion.guide, DATA) if way == "loss" else svi.step(DATA)
    assert "Trace Shapes" in str(caught.value)
    assert "x_3" in str(caught.value)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        raise ValueError(f"broken after a site of shape {tuple(z.shape)}")

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    svi = SVI(model, guide, still, DiffusionELBO())
    with pytest.raises(ValueError, match="broken after a site") as caught:
        elbo.loss(model, guide, DATA) if way == "loss" else svi.step(DATA)
    assert "Trace Shapes" in str(caught.value)
    assert "z dist" in str(caught.value)


def test_a_shape_that_does_not_fit_a_plate_keeps_the_shapes_of_the_trace():
    """Pyro's own error, in a program of the user's."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(torch.zeros(4), 1.0), obs=torch.zeros(4))

    with pytest.raises(ValueError, match="Shape mismatch inside plate") as caught:
        DiffusionELBO().loss(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    assert "Trace Shapes" in str(caught.value)
