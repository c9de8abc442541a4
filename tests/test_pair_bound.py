"""The bound of pairs by hand, datum by datum, against closed forms, enumeration and the bound of a Diffusion.

The pair of most tests is z ~ N(0, 1), x ~ N(z, s^2): p(x) = N(0, 1 + s^2), and the posterior is N(x / (1 + s^2),
s^2 / (1 + s^2)).
"""

import contextlib
import itertools
import json
import math
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import bit_diffusion, differ, far, gaussian_diffusion, of_each, quiet, side_by_side
from pyro import poutine
from pyro.infer import autoguide
from torch import nn

import pyrodiff
from pyrodiff import DiffusionELBO
from pyrodiff.likelihood.bounds import ImportanceBound
from pyrodiff.likelihood.estimate import rounded
from pyrodiff.likelihood.pairs import PairBound, pair_bound, pair_importance_bound

S = 0.7
V = 1 + S**2
LOG_2PI = math.log(2 * math.pi)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


X = number([0.9, -1.7, 2.4, 0.2, 3.1, -0.6, 1.3])
Y = X[:, None] + number([0.4, -1.1, 0.8])  # data of three dimensions


def model(x, plate="data"):
    with pyro.plate(plate, len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def exact(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / V, S / V**0.5))


def wrong(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x + 0.3, 0.8))


def kl(m, s, loc=0.0, scale=1.0):
    """KL(N(m, s^2) || N(loc, scale^2))."""
    return 0.5 * ((s / scale) ** 2 - 1 + ((m - loc) / scale) ** 2) - math.log(s / scale)


def cost(d, variance=0.0, scale=1.0):
    """-E log N(d; 0, scale^2) of a difference with the mean d and a variance."""
    return 0.5 * (LOG_2PI + (d**2 + variance) / scale**2) + math.log(scale)


def evidence(x):
    return cost(x, scale=V**0.5)


def each(number, model, guide, x, of=lambda bound: bound.nats, **options):
    """Of copies of all data in one bound what ``of`` returns of it, with shape (number, ..., B)."""
    copies = x.repeat(number, *(1,) * (x.dim() - 1))
    found = of(pair_bound(model, guide, copies, **{"generator": 0, "batch_size": len(copies), **options}))
    return found.unflatten(-1, (number, len(x))).movedim(-2, 0)


# Closed forms


def test_under_the_exact_posterior_every_weight_is_the_evidence():
    weights = pair_importance_bound(model, exact, X, num_particles=5).log_weights
    torch.testing.assert_close(weights, -evidence(X).expand(5, -1))


def test_under_the_exact_posterior_the_bound_is_the_evidence():
    """In mean, with the KL taken; and to rounding where the guide's law has none, so that each draw says it."""
    assert not far(each(400, model, exact, X), evidence(X))

    def without_kl(x):
        with pyro.plate("data", len(x)):
            law = dist.Normal(x / V, S / V**0.5)
            pyro.sample("z", dist.TransformedDistribution(law, []))

    torch.testing.assert_close(pair_bound(model, without_kl, X).nats, evidence(X))


def test_under_another_guide_the_gap_is_the_kl_to_the_posterior():
    gap = kl(0.5 * X + 0.3, 0.8, X / V, S / V**0.5)
    assert not far(each(400, model, wrong, X), evidence(X) + gap)
    assert not far(each(100, model, wrong, X, num_particles=4, batch_size=50), evidence(X) + gap)


def test_each_site_costs_what_its_closed_form_says():
    bound = pair_bound(model, wrong, X)
    assert bound.names == ("z", "x")
    assert bound.kinds == ("latent", "observed")
    torch.testing.assert_close(bound.terms["z"], kl(0.5 * X + 0.3, 0.8))
    assert not far(each(2000, model, wrong, X, lambda bound: bound.terms["x"]), cost(0.5 * X - 0.3, 0.64, S))


def test_particles_are_averaged():
    one, eight = (each(1000, model, wrong, X, lambda bound: bound.terms["x"], num_particles=k) for k in (1, 8))
    assert 7 < float(one.var(0).mean() / eight.var(0).mean()) < 9
    assert not far(eight, cost(0.5 * X - 0.3, 0.64, S))


def shared_model(x):
    w = pyro.sample("w", dist.Normal(number(0.4), 1.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w + torch.zeros_like(x), 0.9))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def shared_guide(x):
    w = pyro.sample("w", dist.Normal(number(0.7), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x + 0.2 * w, 0.6))


@pytest.mark.parametrize("batch_size", [3, 256])
def test_what_all_data_share_is_in_a_row_of_its_own(batch_size):
    """Counted once, however many runs there are; the terms of the data are means over it."""
    bounds = [
        pair_bound(shared_model, shared_guide, X, batch_size=batch_size, num_particles=2, generator=seed)
        for seed in range(100)
    ]
    (name,), (shared,) = zip(*bounds[0].global_terms.items(), strict=True)
    assert name == "w"
    torch.testing.assert_close(shared, number(kl(0.7, 0.5, 0.4, 1.3)))
    mean, variance = 0.5 * X - 0.8 * 0.7, 0.64 * 0.25  # of z - w, given w, and of its mean
    of_z = cost(mean, variance + 0.36, 0.9) - cost(number(0.0), 0.36, 0.6)
    of_x = cost(0.5 * X - 0.2 * 0.7, 0.04 * 0.25 + 0.36, S)
    for name, expected in (("z", of_z), ("x", of_x)):
        assert not far(torch.stack([bound.terms[name] for bound in bounds]), expected)
    assert "global    w" in bounds[0].rows()
    torch.testing.assert_close(bounds[0].nats, bounds[0].terms["z"] + bounds[0].terms["x"])


def test_the_whole_is_the_loss_of_the_pair():
    """Sites of the data and shared ones together are what DiffusionELBO.loss says, with the same draws."""
    found = pair_bound(shared_model, shared_guide, X, generator=3)
    total = float(found.nats.sum() + sum(found.global_terms.values()))
    assert found.total == pytest.approx(total)
    losses = of_each(DiffusionELBO().terms(*side_by_side(2000, shared_model, shared_guide), X), 2000)
    totals = number([pair_bound(shared_model, shared_guide, X, generator=seed).total for seed in range(100)])
    assert total in totals.tolist()
    assert not differ(losses, totals)


def test_another_order_has_the_same_closed_form_and_says_so():
    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.8))
            pyro.sample("x", dist.Normal(b, S), obs=x)

    def turned(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(0.6 * x, 0.5))
            pyro.sample("a", dist.Normal(0.4 * b + 0.1, 0.7))

    mean = 0.6 * X
    expected = (
        cost(0.4 * mean + 0.1, 0.16 * 0.25 + 0.49)
        + cost(0.6 * mean - 0.1, 0.36 * 0.25 + 0.49, 0.8)
        + cost(0.4 * X, 0.25, S)
        - cost(number(0.0), 0.49, 0.7)
        - cost(number(0.0), 0.25, 0.5)
    )
    with pytest.warns(UserWarning, match="another order"):
        pair_bound(two, turned, X)
    with quiet():
        draws = each(1000, two, turned, X)
    assert not far(draws, expected)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        weights = weights_of(two, turned, X, 10)
    assert heard == []  # where log q - log p is all there is, any order will do
    assert not far(-weights, expected)


def weights_of(model, guide, x, num_particles, copies=100, **options):
    """Log weights, of each datum in as many rows as there are particles of all copies of it."""
    x = x.repeat(copies, *(1,) * (x.dim() - 1))
    found = pair_importance_bound(model, guide, x, num_particles=num_particles, batch_size=len(x), **options)
    return found.log_weights.unflatten(1, (copies, -1)).flatten(0, 1)


def test_weights_average_to_the_likelihood_and_the_bound_falls_to_it():
    weights = weights_of(model, wrong, X, 100, copies=40, generator=1)
    assert not far((weights + evidence(X)).exp(), 1.0)
    assert not far(-weights, evidence(X) + kl(0.5 * X + 0.3, 0.8, X / V, S / V**0.5))
    found = pair_importance_bound(model, wrong, X.repeat(40), num_particles=200, batch_size=280, generator=1)
    assert isinstance(found, ImportanceBound)
    gaps = [float((found.at(k) - evidence(X.repeat(40))).mean()) for k in (1, 10, 200)]
    assert gaps[0] > gaps[1] > gaps[2] > -0.01


def without_kl(x):
    """The wrong guide, by a law that no KL is registered for."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.5 * x + 0.3, 0.8), []))


def test_weights_and_bounds_of_one_seed_are_of_the_same_draws():
    options = {"generator": 5, "batch_size": 3, "num_particles": 6}
    found = pair_importance_bound(model, without_kl, X, **options)
    torch.testing.assert_close(found.at(1), pair_bound(model, without_kl, X, **options).nats)
    assert bool((found.log_weights.std(0) > 0.05).all())


# Bits, plates and masks


BITS = number([[0, 1], [1, 1], [1, 0], [0, 0], [1, 1]])


def bits_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(number([0.3, 0.8])).to_event(1))
        rate = 0.1 + 0.5 * z + 0.2 * z.flip(-1)
        pyro.sample("x", dist.Bernoulli(rate).to_event(1), obs=x)


def bits_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(0.25 + 0.4 * x).to_event(1))


def test_a_pair_of_bits_is_enumerated():
    """The bound, the evidence, and what the weights average to, over the four values of z."""

    def bernoulli(p, x):
        return (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)

    bound, evidences = torch.zeros(5, dtype=torch.float64), []
    for bits in itertools.product((0.0, 1.0), repeat=2):
        z = number(bits)
        joint = bernoulli(number([0.3, 0.8]), z) + bernoulli((0.1 + 0.5 * z + 0.2 * z.flip(-1)).expand(5, 2), BITS)
        log_q = bernoulli(0.25 + 0.4 * BITS, z.expand(5, 2))
        bound += log_q.exp() * (log_q - joint)
        evidences.append(joint)
    evidence = -torch.stack(evidences).logsumexp(0)
    found = pair_bound(bits_model, bits_guide, BITS)
    assert found.levels == 2
    assert found.convention == "p is a probability, of 2 levels a dimension"
    assert found.event_shape == (2,)
    assert not far(each(2000, bits_model, bits_guide, BITS), bound)
    assert pair_importance_bound(bits_model, bits_guide, BITS, num_particles=2).levels == 2
    assert not far((weights_of(bits_model, bits_guide, BITS, 30) + evidence).exp(), 1.0)


@pytest.mark.parametrize("dim", [-1, -2])
def test_further_plates_are_summed_over(dim):
    """The plate of the data stands inside or outside of another, of as many numbers as there are data."""
    x = Y[:3]
    own, other = (-1, -2) if dim == -1 else (-2, -1)

    def of_three(x, latent, observed):
        data = pyro.plate("data", len(x), dim=own)
        with data, pyro.plate("numbers", 3, dim=other):
            z = pyro.sample("z", latent(x))
            if observed is not None:
                pyro.sample("x", observed(z), obs=x)

    def turned(x):
        return x.T if own == -1 else x

    def with_three(x):
        of_three(turned(x), lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda z: dist.Normal(z, S))

    def its_guide(x):
        of_three(turned(x), lambda x: dist.Normal(x / V, S / V**0.5), None)

    def with_four(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, S).to_event(1), obs=x)

    def guide_of_four(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / V, S / V**0.5).to_event(1))

    for pair in ((with_three, its_guide), (with_four, guide_of_four)):
        weights = pair_importance_bound(*pair, x, num_particles=2).log_weights
        torch.testing.assert_close(weights, -evidence(x).sum(1).expand(2, -1))
        found = pair_bound(*pair, x, num_particles=100)
        torch.testing.assert_close(found.terms["z"], kl(x / V, S / V**0.5).sum(1))
        assert float((found.nats - evidence(x).sum(1)).abs().max()) < 1.0
        assert found.event_shape == (3,)


def test_a_masked_datum_costs_nothing_and_a_scale_is_as_the_programs_have_it():
    mask = number([1, 0, 1, 1, 0, 1, 1]).bool()

    def wrapped(program, handler):
        def run(x, mask):
            with handler(mask):
                program(x)

        return run

    masked = [wrapped(program, lambda mask: poutine.mask(mask=mask)) for program in (model, exact)]
    scaled = [wrapped(program, lambda mask: poutine.scale(scale=1.0 + mask)) for program in (model, exact)]
    weights = pair_importance_bound(*masked, X, mask, num_particles=2).log_weights
    torch.testing.assert_close(weights, (-evidence(X) * mask).expand(2, -1))
    plain, hidden, twice = (
        pair_bound(*pair, *data, batch_size=4, generator=1)
        for pair, data in (((model, exact), (X,)), (masked, (X, mask)), (scaled, (X, mask)))
    )
    torch.testing.assert_close(hidden.costs, plain.costs * mask)
    torch.testing.assert_close(twice.costs, plain.costs * (1 + mask))
    with pytest.raises(ValueError, match=r"scale must be 1 .* but at 'z'"):
        pair_importance_bound(*scaled, X, mask, num_particles=2)


def test_auxiliary_sites_of_an_autoguide_are_counted():
    """AutoNormal draws z as an auxiliary site and maps it by a Delta: both together are N(loc, scale^2)."""

    def positive(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z.log(), S), obs=x)

    guide = autoguide.AutoNormal(positive, init_scale=0.8, init_loc_fn=autoguide.init_to_value(values={"z": X.exp()}))
    guide(X)
    loc, scale = guide.locs.z.detach(), 0.8  # wider than the posterior, so that the weights have a variance
    bounds = [pair_bound(positive, guide, X, num_particles=5, generator=seed) for seed in range(20)]
    assert bounds[0].names == ("z", "x", "z_unconstrained")
    assert bounds[0].kinds == ("latent", "observed", "auxiliary")
    expected = kl(loc, scale) + cost(X - loc, scale**2, S)
    assert not far(torch.stack([bound.nats for bound in bounds]), expected)
    weights = pair_importance_bound(positive, guide, X, num_particles=500).log_weights
    assert not far(-weights, expected)
    assert not far((weights + evidence(X)).exp(), 1.0)


def test_an_auxiliary_choice_that_both_make_costs_nothing():
    def shifted(program):
        def run(x):
            with poutine.mask(mask=False):
                pyro.sample("shift", dist.Normal(number(0.0), 1.0))
            program(x)

        return run

    found = pair_bound(shifted(model), shifted(wrong), X, generator=2)
    assert found.names == ("z", "x")
    assert found.global_terms == {}
    weights = pair_importance_bound(shifted(model), shifted(exact), X, num_particles=2).log_weights
    torch.testing.assert_close(weights, -evidence(X).expand(2, -1))


def test_what_both_programs_observe_is_the_model_s():
    def guide(x):
        exact(x)
        with pyro.plate("other", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 3.0), obs=x)

    weights = pair_importance_bound(model, guide, X, num_particles=2).log_weights
    torch.testing.assert_close(weights, -evidence(X).expand(2, -1))
    torch.testing.assert_close(
        pair_bound(model, guide, X, generator=1).costs, pair_bound(model, exact, X, generator=1).costs
    )


# Beside a Diffusion


def diffusion_of(shift=0.4, widen=1.2):
    m, v = number([0.5, -0.8]), number([1.3, 0.6])
    return gaussian_diffusion(pyrodiff.LinearSchedule(4, beta_start=0.1, beta_end=0.6), m, v, shift, widen)


def by_hand(diffusion):
    """The same pair as two functions."""
    forward, reverse, T = diffusion.forward_process, diffusion.model.reverse, diffusion.num_steps

    def model(x_0):
        with pyro.plate("data", len(x_0)):
            x = pyro.sample(f"x_{T}", diffusion.model.top(x_0.dtype, x_0.device))
            for t in range(T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", reverse(x, t))
            pyro.sample("x_0", reverse(x, 1), obs=x_0)

    def guide(x_0):
        with pyro.plate("data", len(x_0)):
            x = pyro.sample(f"x_{T}", forward.marginal(x_0, T))
            for t in range(T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", forward.posterior(x, x_0, t))

    return model, guide


X_0 = number([[0.3, -1.1], [2.0, 0.4], [-0.9, -0.2], [1.4, -2.3]])


@pytest.mark.parametrize("kind", ["programs", "by hand", "one-step"])
def test_the_pairs_of_a_diffusion_have_its_bound(kind):
    """Datum by datum, in mean, and the prior's term, in closed form, to rounding; the scale 1 / p(t) stays."""
    diffusion = diffusion_of()
    pair = diffusion.one_step() if kind == "one-step" else diffusion
    programs = by_hand(diffusion) if kind == "by hand" else (pair.model, pair.guide)
    x_0 = X_0.repeat(2000, 1)
    bound, found = pyrodiff.bound(diffusion, x_0, generator=0), pair_bound(*programs, x_0, batch_size=4000, generator=0)
    torch.testing.assert_close(found.costs[0], bound.prior)
    ours = torch.stack([found.costs[0], found.costs[1:-1].sum(0), found.costs[-1]])
    theirs = torch.stack([bound.prior, bound.denoising.sum(0), bound.reconstruction])
    assert not differ(*(each.unflatten(1, (2000, 4)).movedim(1, 0) for each in (ours, theirs)), rounding=1e-9)
    assert (found.levels, found.event_shape) == (bound.levels, bound.event_shape)
    assert found.names == (("x_T", "x_s", "x_0") if kind == "one-step" else ("x_4", "x_3", "x_2", "x_1", "x_0"))


def test_each_term_of_a_pair_is_the_term_of_the_bound():
    """Of bits too, whose posterior has no rsample."""
    diffusion, x_0 = bit_diffusion([0.2, 0.4, 0.7], 0.3, 2), BITS.repeat(2000, 1)
    found = pair_bound(diffusion.model, diffusion.guide, x_0, batch_size=5000, generator=0)
    bound = pyrodiff.bound(diffusion, x_0, generator=0)
    theirs = torch.cat([bound.reconstruction[None], bound.denoising, bound.prior[None]])
    draws = (each.unflatten(1, (2000, 5)).movedim(1, 0) for each in (found.costs.flip(0), theirs))
    assert not differ(*draws, rounding=1e-9)
    assert found.levels == diffusion.levels == 2


def test_importance_weights_of_a_diffusion_by_hand():
    diffusion = diffusion_of(shift=0.0, widen=1.0)
    expected = dist.Normal(number([0.5, -0.8]), number([1.3, 0.6]).sqrt()).to_event(1).log_prob(X_0)
    weights = pair_importance_bound(*by_hand(diffusion), X_0, num_particles=3).log_weights
    torch.testing.assert_close(weights, expected.expand(3, -1).detach())
    one_step = diffusion.one_step()
    with pytest.raises(ValueError, match="scale must be 1"):
        pair_importance_bound(one_step.model, one_step.guide, X_0, num_particles=2)


# Levels


def observed(law, latent=True):
    def model(x):
        with pyro.plate("data", len(x)):
            if latent:
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", law(x), obs=x)

    return model


def latent_only(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


ZEROS = torch.zeros(4)
LEVELS = {
    "normal": (lambda x: dist.Normal(x, 1.0), ZEROS, None),
    "masked normal": (lambda x: dist.Normal(x, 1.0).mask(torch.ones(len(x)).bool()), ZEROS, None),
    "bits": (lambda x: dist.Bernoulli(0.3 * torch.ones_like(x)), ZEROS, 2),
    "bits of an event": (lambda x: dist.Bernoulli(0.3 * torch.ones_like(x)).to_event(1), torch.zeros(4, 3), 2),
    "classes": (lambda x: dist.Categorical(torch.ones(5).expand(len(x), 5)), ZEROS, 5),
    "one of k": (lambda x: dist.OneHotCategorical(torch.ones(len(x), 5)), torch.eye(5)[:4], 2),
    "counts of a few": (lambda x: dist.Binomial(torch.tensor([3, 9, 4, 1]), 0.5 * torch.ones(4)), ZEROS, 10),
    "multinomial": (lambda x: dist.Multinomial(6, torch.ones(3).expand(len(x), 3)), torch.eye(3)[[0, 1, 2, 0]] * 6, 7),
    "counts": (lambda x: dist.Poisson(torch.ones_like(x)), ZEROS, math.inf),
    "levels": (lambda x: pyrodiff.LevelCategorical(torch.zeros(len(x), 17)), ZEROS, 17),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_read_off_the_laws_of_what_is_observed(name, tmp_path):
    law, x, levels = LEVELS[name]
    found = pair_bound(observed(law), latent_only, x)
    assert found.levels == levels
    assert pair_importance_bound(observed(law), latent_only, x, num_particles=2).levels == levels
    found.save(tmp_path / "bound.npz")
    assert PairBound.load(tmp_path / "bound.npz").levels == levels


def test_the_most_levels_of_several_sites_are_said():
    def two(x):
        with pyro.plate("data", len(x)):
            pyro.factor("no law", torch.zeros(len(x)))
            pyro.sample("y", dist.Categorical(torch.ones(len(x), 5)), obs=torch.zeros(len(x)))
            pyro.sample("x", dist.Bernoulli(0.5 * torch.ones_like(x)), obs=x)

    found = pair_bound(two, lambda x: None, ZEROS)
    assert found.levels == 5
    torch.testing.assert_close(found.nats, torch.full((4,), math.log(10.0)))


# How the data come, and what is left behind


def test_a_loader_of_any_batches_is_the_tensor():
    y = torch.arange(7)
    seen = []

    def with_context(program):
        def run(x, i, one):
            seen.append((tuple(i.tolist()), tuple(one.tolist())))
            program(x * one)

        return run

    pair, one = (with_context(model), with_context(wrong)), torch.ones(1, dtype=torch.float64)
    for function in (pair_bound, pair_importance_bound):
        options = {"num_particles": 2, "generator": 4, "batch_size": 3}
        whole = function(*pair, X, y, one, **options)
        for sizes in ([1] * 7, [2, 5], [6, 1], [3, 3, 1]):
            loader = [(x, i, one) for x, i in zip(X.split(sizes), y.split(sizes), strict=True)]
            torch.testing.assert_close(function(*pair, iter(loader), **options).nats, whole.nats, rtol=0, atol=0)
    assert {rows for rows, _ in seen} == {(0, 1, 2), (3, 4, 5), (6,)}
    assert {ones for _, ones in seen} == {(1.0, 1.0, 1.0), (1.0,)}
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=2)
    torch.testing.assert_close(
        pair_bound(model, wrong, data, generator=1).nats, pair_bound(model, wrong, X, generator=1).nats
    )


def test_draws_depend_on_the_position_and_not_on_what_comes_after():
    whole, part = (pair_bound(model, wrong, x, generator=8, batch_size=3).nats for x in (X, X[:6]))
    torch.testing.assert_close(whole[:6], part, rtol=0, atol=0)
    same = pair_bound(model, wrong, X[:1].expand(6), generator=8, batch_size=3).nats
    assert len(set(same.tolist())) == 6
    assert not torch.equal(pair_bound(model, wrong, X, generator=9, batch_size=3).nats, whole)
    particles = pair_importance_bound(model, wrong, X, num_particles=3, generator=8).log_weights
    assert len(set(particles[:, 0].tolist())) == 3


def test_a_guide_with_parameters_a_datum_takes_their_indices():
    locs = X / V

    def guide(x, i):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(locs[i], S / V**0.5))

    found = pair_importance_bound(lambda x, i: model(x), guide, X, torch.arange(7), num_particles=2, batch_size=2)
    torch.testing.assert_close(found.log_weights, -evidence(X).expand(2, -1))


class Noisy(nn.Module):
    """A network with dropout, and a record of its modes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
        self.still = nn.Dropout(0.5).eval()
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.inner[1].training))
        return self.still(self.inner(x[:, None])[:, 0])


@pytest.mark.parametrize("function", [pair_bound, pair_importance_bound])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(function, fails):
    """Modes of modules that functions close over, the store, torch's random state, the switches; after errors too."""
    network = Noisy()

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(3.0)).expand(len(x)), 1.0))
            pyro.sample("x", dist.Normal(network(z), 1.0), obs=x)
        if fails and not network.modes[-1][0]:
            raise RuntimeError("on purpose")

    class Guide(nn.Module):
        def forward(self, x):
            assert not self.training
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.rand(())).expand(len(x)), 1.0))

    guide, x = Guide(), X.float()
    pyro.param("mean", torch.tensor(0.25))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        with pytest.raises(RuntimeError, match="on purpose") if fails else contextlib.nullcontext():
            found.append(function(model, guide, x, generator=2, num_particles=2).nats)
        after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert list(pyro.get_param_store().keys()) == ["mean"]
    assert pyro.param("mean").item() == 0.25
    assert set(network.modes) == {(False, False)}
    assert network.training
    assert network.inner[1].training
    assert not network.still.training
    assert guide.training
    assert not nn.modules.module._global_forward_pre_hooks
    assert pyro.poutine.util.is_validation_enabled()
    assert torch.is_grad_enabled()
    assert fails or (torch.equal(*found) and not found[0].requires_grad)


def test_the_first_run_of_all_data_is_validated_and_no_other():
    seen = []

    def watched(x):
        seen.append(pyro.poutine.util.is_validation_enabled())
        model(x)

    pair_bound(watched, wrong, X, batch_size=4, num_particles=3)
    assert seen == [True, False, False] * 2
    with pytest.raises(ValueError, match=r"support|within"):
        pair_bound(bits_model, bits_guide, torch.cat([BITS, BITS[:1] + 0.5]), batch_size=5)


# What is printed, saved and added up


def test_the_table_has_a_row_a_site():
    found = pair_bound(shared_model, shared_guide, X, num_particles=3)
    lines = str(found).splitlines()
    assert lines[0] == "bound on -log p of a pair, 2 sites, mean of 7 data of 1 dimension"
    starts = ["latent    z", "observed  x", "bound", "global    w", "per dimension", "p is a density"]
    assert [line[: len(start)] for line, start in zip(lines[2:], starts, strict=True)] == starts
    x = found.terms["x"]
    mean, error = float(x.mean()), float(x.std()) / 7**0.5
    expected = f"{rounded(mean, error)} {rounded(mean / math.log(2), error / math.log(2))}"
    assert lines[3].split()[2:] == expected.replace("±", "").split()
    assert float(found.bits.mean()) == pytest.approx(found.mean / math.log(2))
    assert "2 sites" in repr(found)


def test_a_long_chain_is_printed_in_short():
    diffusion = gaussian_diffusion(pyrodiff.LinearSchedule(30), number([0.5, -0.8]), number([1.3, 0.6]))
    found = pair_bound(diffusion.model, diffusion.guide, X_0)
    rows = found.rows()
    assert list(rows)[3:6] == ["latent    x_27", "sum of    x_26 .. x_4", "latent    x_3"]
    torch.testing.assert_close(rows["sum of    x_26 .. x_4"], sum(found.terms[f"x_{t}"] for t in range(4, 27)))
    torch.testing.assert_close(sum(row for name, row in rows.items() if name != "bound"), found.nats)
    assert len(str(found).splitlines()) == 14


def test_what_is_saved_is_what_was_there(tmp_path):
    found = pair_bound(shared_model, shared_guide, X)
    found.save(tmp_path / "pair.npz")
    loaded = PairBound.load(tmp_path / "pair.npz")
    assert str(loaded) == str(found)
    assert (loaded.names, loaded.kinds, loaded.global_costs) == (found.names, found.kinds, found.global_costs)
    assert loaded.event_shape == torch.Size([])
    assert torch.equal(loaded.costs, found.costs)
    assert "names" in json.loads(str(np.load(tmp_path / "pair.npz")["rest"]))
    with pytest.raises(ValueError, match="PairBound"):
        pyrodiff.Bound.load(tmp_path / "pair.npz")
    assert type(loaded + found) is PairBound


def test_bounds_of_different_data_add_up():
    parts = [pair_bound(shared_model, shared_guide, x, generator=1) for x in (X[:2], X[2:])]
    whole = sum(parts)
    assert torch.equal(whole.nats, torch.cat([part.nats for part in parts]))
    assert whole.names == ("z", "x")
    assert float(whole.global_terms["w"]) == pytest.approx(kl(0.7, 0.5, 0.4, 1.3))
    other = pair_bound(model, exact, X)
    with pytest.raises(ValueError, match=r"of one model to add up, but (global_)?names"):
        parts[0] + other
    draws = [
        PairBound(("x",), ("observed",), torch.zeros(1, B), torch.Size(), None, ("w",), (c,))
        for B, c in [(1, 2.0), (3, 6.0)]
    ]
    assert sum(draws).global_costs == (5.0,)


def test_units_of_the_data_are_changed_at_an_observed_site():
    found = pair_bound(model, exact, X)
    rescaled = found.rescaled(0.7)
    torch.testing.assert_close(rescaled.nats, found.nats + 0.7)
    torch.testing.assert_close(rescaled.terms["z"], found.terms["z"])
    assert found.bits_per_dim_in_bins(width=0.5).shape == (7,)
    with pytest.raises(ValueError, match="levels"):
        pair_bound(bits_model, bits_guide, BITS).rescaled(0.7)


# What is refused


def subsampled(x):
    with pyro.plate("data", 70, subsample_size=7):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def of_a_loop(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0), obs=x[i])


def of_another_size(x):
    with pyro.plate("data", 7):
        pyro.sample("x", dist.Normal(torch.zeros(7), 1.0), obs=torch.zeros(7))


def mixed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)
        pyro.sample("y", dist.Bernoulli(0.5 * torch.ones_like(x)), obs=torch.ones_like(x))


class Silent(dist.TorchDistribution):
    """A law that does not say its support."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, shape):
        super().__init__(torch.Size(shape), validate_args=False)

    def log_prob(self, value):
        return torch.zeros_like(value)

    def expand(self, batch_shape, _instance=None):
        return Silent(batch_shape)


def nothing(*args):
    pass


def outside(x):
    pyro.sample("w", dist.Normal(number(0.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)


def outside_guide(x):
    pyro.sample("w", dist.Normal(number(0.0), 1.0))


def extra(x):
    exact(x)
    pyro.sample("more", dist.Normal(number(0.0), 1.0))


DIFFUSION = diffusion_of()
REFUSED = {
    "another plate": ((model, exact, X), {"plate": "rows"}, "plate .* is 'rows', and their plates are 'data'"),
    "no plate": ((lambda x: pyro.sample("x", dist.Normal(0.0, 1.0).expand([7]), obs=x), nothing, X), {}, "there is no"),
    "a plate that is no name": ((model, exact, X), {"plate": 3}, "plate must be a string"),
    "a subsample": ((subsampled, nothing, X), {}, "'data' .* draws 7 of 70, and counts each 10 times"),
    "a loop": ((of_a_loop, nothing, X), {}, "'data' must be a context"),
    "a plate of another size": ((of_another_size, nothing, X[:4]), {}, "'data' .* 4 in this run, but its size is 7"),
    "a chunk of all": ((of_another_size, nothing, X), {"batch_size": 3}, "3 in this run, .* batch_size=len"),
    "nothing observed": ((latent_only, latent_only, X), {}, "model must observe the data in plate 'data'"),
    "nothing scored": ((poutine.mask(model, mask=False), poutine.mask(exact, mask=False), X), {}, "must observe"),
    "mixed": ((mixed, nothing, X), {}, "a density at 'x' and none at 'y'"),
    "no support": ((observed(lambda x: Silent(x.shape), False), nothing, X), {}, "'x' must say its support.*Silent"),
    "a missing site": ((model, nothing, X), {}, "'z' is missing"),
    "a site more": ((model, extra, X), {}, "'more' is not one"),
    "a scale in one": ((model, poutine.scale(exact, scale=2.0), X), {}, "scale must stand in both"),
    "a mask in one": ((poutine.mask(model, mask=False), exact, X), {}, "mask must stand in both"),
    "a diffusion": ((DIFFUSION, exact, X), {}, "model must be a program, .*give .model of it"),
    "no program": ((model, 3, X), {}, "guide must be a program, but it is 3"),
    "an option by position": ((model, exact, X, 4), {}, r"context\[0\] is 4: .* num_particles=4 say"),
    "an option beside a loader": ((model, exact, [X], 4), {}, r"context\[0\] is 4: .* num_particles=4 say"),
    "context beside a loader": ((model, exact, [X], X), {}, "context must come from the loader"),
    "a context of other rows": ((model, exact, X, X[:3]), {}, "context must have a first dimension of 7"),
    "an array": ((model, exact, X.numpy()), {}, "x_0 must be a tensor.*from_numpy"),
    "numbers": ((model, exact, [1.0, 2.0]), {}, "x_0 must be a tensor.*in batch 0"),
    "a number": ((model, exact, 1.0), {}, "x_0 must be a tensor"),
    "no data": ((model, exact, X[:0]), {}, "x_0 must have shape"),
    "a scalar": ((model, exact, X[0]), {}, "x_0 must have shape"),
    "an empty loader": ((model, exact, []), {}, "at least one batch"),
    "batches of other shapes": ((model, exact, [X, Y]), {}, "batches of a loader must be alike"),
    "batches with a context more": ((model, exact, [X, (X, X)]), {}, "batches of a loader must be alike"),
    "no particles": ((model, exact, X), {"num_particles": 0}, "num_particles must be an int"),
    "a batch of none": ((model, exact, X), {"batch_size": 0}, "batch_size must be an int"),
    "a seed that is none": ((model, exact, X), {"generator": 1.5}, "generator must be"),
}
IMPORTANCE = {
    "a shared latent": ((outside, outside_guide, X), {}, "'data' must hold every site .* but 'w' stands outside"),
    "a scale": ((poutine.scale(model, scale=2.0), poutine.scale(exact, scale=2.0), X), {}, "scale must be 1 .* at 'z'"),
    "no number of particles": ((model, exact, X), {"num_particles": None}, "num_particles must be an int"),
    "a number by position": ((model, exact, X, 4), {"num_particles": None}, r"context\[0\] is 4: .*num_particles=4"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [pair_bound, pair_importance_bound])
def test_bad_input_is_refused(function, name):
    args, options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        function(*args, **{"num_particles": 1, **options})


@pytest.mark.parametrize("name", IMPORTANCE)
def test_what_gives_no_datum_a_weight_is_refused(name):
    args, options, words = IMPORTANCE[name]
    with pytest.raises(ValueError, match=words):
        pair_importance_bound(*args, **{"num_particles": 2, **options})


def test_a_program_with_sites_at_times_has_none_elsewhere():
    """A run without them costs 0 there."""

    def of(x, mean, loc, scale, observes):
        with pyro.plate("data", len(x)):
            if len(x) == 3:
                pyro.sample("more", dist.Normal(torch.full_like(x, mean), 1.0))
            z = pyro.sample("z", dist.Normal(loc, scale))
            if observes:
                pyro.sample("x", dist.Normal(z, S), obs=x)

    found = pair_bound(
        lambda x: of(x, 0.5, torch.zeros_like(x), 1.0, True), lambda x: of(x, 0.0, x / V, 0.5, False), X, batch_size=4
    )
    torch.testing.assert_close(found.terms["more"], number([0, 0, 0, 0, 0.125, 0.125, 0.125]))
    assert len(found.nats) == 7


def test_a_method_and_a_module_are_programs():
    class Both(nn.Module):
        def model(self, x):
            assert not self.training
            model(x)

        def forward(self, x):
            exact(x)

    both = Both()
    weights = pair_importance_bound(both.model, both, X, num_particles=1).log_weights
    torch.testing.assert_close(weights[0], -evidence(X))
    assert both.training
