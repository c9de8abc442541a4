"""Two programs whose sites stand in any order: a KL where it is a term of the bound, elsewhere a log ratio at the draw.

With z_1, z_2, ... the latent sites, E_q log q(z) / p(z, x) is the bound whatever order either program draws them in.
The KL at a site is the mean of its log ratio where all that the model's law depends on was drawn before by the guide.
"""

import contextlib
import itertools
import math
import re
import warnings

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import differ, far, gaussian_diffusion, gradient, of_each, quiet, repeat, side_by_side
from loops import sgd, still
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn

import pyrodiff
from pyrodiff import SVI, DiffusionELBO

RUNS = 25  # side by side


def warned(call):
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


def named(message, names):
    """Those of the names that a message mentions, as words."""
    return {name for name in names if re.search(rf"\b{name}\b", message)}


# All orders of three bits, all outcomes summed


NAMES = ("a", "b", "c")
ORDERS = list(itertools.permutations(NAMES))


class Chosen(Messenger):
    """Puts given values in the place of draws."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Bits(nn.Module):
    """Three bits in some order, each with a law that depends on all before it; an observed number, which depends on
    the first two, stands between them and the third.
    """

    def __init__(self, order, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.order = order
        self.logits = nn.ParameterList(
            nn.Parameter(1.5 * torch.randn((2,) * i, generator=random, dtype=torch.float64)) for i in range(3)
        )
        self.loc = nn.Parameter(torch.randn((2, 2), generator=random, dtype=torch.float64))

    def forward(self, x=None):
        drawn = []
        for i, name in enumerate(self.order):
            if i == 2 and x is not None:
                pyro.sample("x", dist.Normal(self.loc[tuple(drawn)], 0.7), obs=x)
            drawn.append(pyro.sample(name, dist.Bernoulli(logits=self.logits[i][tuple(drawn)])).long())

    def log_odds(self, i, values):
        """Those of the i-th site in the order."""
        return self.logits[i][tuple(values[name] for name in self.order[:i])]

    def log_prob(self, values, x=None):
        """log p of an outcome, by hand."""
        total = torch.zeros((), dtype=torch.float64)
        for i, name in enumerate(self.order):
            one = torch.sigmoid(self.log_odds(i, values))
            total = total + torch.log(one if values[name] else 1 - one)
        if x is None:
            return total
        mean = self.loc[tuple(values[name] for name in self.order[:2])]
        return total - 0.5 * math.log(2 * math.pi * 0.49) - (x - mean) ** 2 / 0.98


def outcomes(guide):
    """Each outcome, and q of it."""
    for bits in itertools.product((0, 1), repeat=3):
        values = dict(zip(NAMES, bits, strict=True))
        yield values, guide.log_prob(values).exp().detach()


def bits_kl(model, guide, name, values):
    """KL(q || p) of one bit given those that either program drew before it."""
    q, p = (torch.sigmoid(program.log_odds(program.order.index(name), values)).detach() for program in (guide, model))
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


@pytest.mark.parametrize("model_order", ORDERS, ids="".join)
@pytest.mark.parametrize("guide_order", ORDERS, ids="".join)
def test_in_every_order_the_terms_are_the_bound_in_mean(model_order, guide_order):
    """Value and gradient; by KLs at all sites it is the bound in the model's own order only."""
    model, guide, x = Bits(model_order, 1), Bits(guide_order, 2).requires_grad_(False), torch.tensor(0.4).double()
    before = {
        name: set(model_order[: model_order.index(name)]) <= set(guide_order[: guide_order.index(name)])
        for name in NAMES
    }
    elbo, found, exact, analytic, messages = DiffusionELBO(), 0.0, 0.0, 0.0, []
    for values, q in outcomes(guide):

        def fixed(x, values=values):
            with Chosen({name: torch.tensor(value).double() for name, value in values.items()}):
                guide()

        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            terms = elbo.terms(model, fixed, x)
        messages += [str(warning.message) for warning in record]
        found = found + q * sum(terms.values())
        exact = exact + q * (q.log() - model.log_prob(values, x))
        kls = {name: bits_kl(model, guide, name, values) for name in NAMES}
        analytic += q * (sum(kls.values()) + terms["x"].detach())
        for name in NAMES:
            if before[name]:
                torch.testing.assert_close(terms[name].detach(), kls[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(found, model), gradient(exact, model), rtol=0, atol=1e-12)
    assert (abs(float(analytic - exact.detach())) < 1e-12) == (model_order == guide_order)
    assert abs(float(analytic - exact.detach())) < 1e-12 or abs(float(analytic - exact.detach())) > 1e-4
    assert len(messages) == (model_order != guide_order)
    if messages:
        assert named(messages[0].partition(" at ")[2].partition(":")[0], NAMES) == {n for n in NAMES if not before[n]}


# The natural guide of a diffusion, q(x_t | x_{t-1}) from x_1 up


M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
X_0 = torch.tensor([[0.2, -2.0], [1.1, 0.4], [-4.0, 5.0]], dtype=torch.float64)
BETAS = oracles.linear_betas(8, 0.05, 0.5)
SHIFTED = [(0.0, 1.0), (0.25, 1.3)]


def diffusion_of(shift=0.0, widen=1.0):
    return gaussian_diffusion(pyrodiff.LinearSchedule(8, 0.05, 0.5), M, V, shift, widen)


def times(x, t, event_dim=1):
    """The time t of all states of a batch, which particles may have more dimensions of."""
    return torch.full(x.shape[: x.dim() - event_dim], t)


def natural(diffusion):
    def guide(x_0):
        with pyro.plate("data", len(x_0), dim=-1):
            x = x_0
            for t in range(1, diffusion.num_steps + 1):
                x = pyro.sample(f"x_{t}", diffusion.forward_process.transition(x, times(x, t)))

    return guide


def closed_bound(shift, widen):
    """L_T + the sum of the L_{t-1} + L_0 of all data; each is quadratic in x_t, so that two points give its mean."""
    steps, total = oracles.preserving_steps(BETAS), 0.0
    moments = oracles.moments(steps)
    for k in range(2):
        x_0, m, v = X_0[:, k].numpy(), float(M[k]), float(V[k])
        gain, noise = moments[8]
        total += oracles.normal_kl(gain * x_0, noise, gain * m, gain**2 * v + noise).sum()
        for t, sign in itertools.product(range(1, 9), (-1.0, 1.0)):
            (gain, noise), (gain_s, noise_s), (step, beta) = moments[t], moments[t - 1], steps[t - 1]
            x_t = gain * x_0 + np.sqrt(noise) * sign
            mean, variance = oracles.condition(gain_s * m, gain_s**2 * v + noise_s, step, beta, x_t)
            variance = widen**2 * variance
            mean = mean + shift * np.sqrt(variance)
            if t == 1:
                total -= 0.5 * oracles.log_normal(x_0, mean, variance).sum()
            else:
                mean_q, variance_q = oracles.condition(gain_s * x_0, noise_s, step, beta, x_t)
                total += 0.5 * oracles.normal_kl(mean_q, variance_q, mean, variance).sum()
    return total


def test_the_closed_bound_of_exact_kernels_is_the_likelihood():
    exact = oracles.log_normal(X_0.numpy(), M.numpy(), V.numpy()).sum()
    assert closed_bound(0.0, 1.0) == pytest.approx(-exact, abs=1e-10)
    assert abs(closed_bound(*SHIFTED[1]) + exact) > 1  # another model, for what is compared below


@pytest.mark.parametrize(("shift", "widen"), SHIFTED)
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}], ids=["one", "particles"]
)
def test_a_guide_from_x_1_up_has_the_bound_in_mean(shift, widen, options):
    """Pyro's TraceMeanField_ELBO is more than a nat off."""
    diffusion = diffusion_of(shift, widen)
    guide, expected = natural(diffusion), closed_bound(shift, widen)
    with quiet():
        ours, pyros = (
            repeat(20, lambda elbo=elbo: elbo(**options).loss(diffusion.model, guide, X_0.repeat(RUNS, 1)) / RUNS)
            for elbo in (DiffusionELBO, TraceMeanField_ELBO)
        )
    assert not far(ours, expected)
    assert far(pyros, expected)
    assert abs(float(pyros.mean()) - expected) > 1


@pytest.mark.parametrize(("shift", "widen"), SHIFTED)
def test_a_guide_from_x_1_up_has_the_gradient_of_the_pair(shift, widen):
    diffusion, elbo = diffusion_of(shift, widen), DiffusionELBO()

    def draws(guide):
        x_0 = X_0.repeat(2 * RUNS, 1)
        return repeat(20, lambda: gradient(elbo.differentiable_loss(diffusion.model, guide, x_0) / 2 / RUNS, diffusion))

    with quiet():
        natural_draws = draws(natural(diffusion))
    pair = draws(diffusion.guide)
    assert float(pair.mean(0).abs().max()) > 1
    assert not differ(natural_draws, pair)


def test_of_a_guide_from_x_1_up_the_first_site_of_the_model_alone_is_analytic():
    """Where the guide's x_7 is the same the KL at x_8 is the same; every other cost is a log ratio at the draw."""
    diffusion = diffusion_of()
    guide = natural(diffusion)
    trace = poutine.trace(guide).get_trace(X_0)
    value = {t: trace.nodes[f"x_{t}"]["value"] for t in range(1, 9)}
    (message,) = warned(lambda: DiffusionELBO().terms(diffusion.model, lambda x_0: replayed(guide, trace, x_0), X_0))
    assert named(message, trace.nodes) >= {"x_7"}
    assert "x_8" not in message
    with quiet():
        terms = DiffusionELBO().terms(diffusion.model, lambda x_0: replayed(guide, trace, x_0), X_0)
    moments, steps = oracles.moments(oracles.preserving_steps(BETAS)), oracles.preserving_steps(BETAS)
    gain, beta = steps[7]
    (gain_T, noise_T), m, v = moments[8], M.numpy(), V.numpy()
    prior = oracles.normal_kl(gain * value[7].numpy(), beta, gain_T * m, gain_T**2 * v + noise_T).sum(-1)
    torch.testing.assert_close(terms["x_8"].detach(), torch.from_numpy(prior), rtol=1e-9, atol=1e-9)
    for t in range(2, 9):  # the site x_{t-1}
        (gain_s, noise_s), (step, beta_t) = moments[t - 1], steps[t - 1]
        x_s, x_t, before = value[t - 1].numpy(), value[t].numpy(), (value[t - 2] if t > 2 else X_0).numpy()
        mean, variance = oracles.condition(gain_s * m, gain_s**2 * v + noise_s, step, beta_t, x_t)
        q = oracles.log_normal(x_s, steps[t - 2][0] * before, steps[t - 2][1])
        ratio = (q - oracles.log_normal(x_s, mean, variance)).sum(-1)
        torch.testing.assert_close(terms[f"x_{t - 1}"].detach(), torch.from_numpy(ratio), rtol=1e-9, atol=1e-9)


def replayed(guide, trace, x_0):
    """The guide with the values of a trace."""
    values = {name: site["value"] for name, site in trace.nodes.items() if name.startswith("x_")}
    with Chosen(values):
        guide(x_0)


class ForwardGuide(pyrodiff.pair.diffusion.TrajectoryGuide):
    """A guide of the package's kind that runs the other way."""

    def forward(self, x_0):
        with pyro.plate("data", len(x_0), dim=-1):
            x = x_0
            for t in range(1, self.forward_process.num_steps + 1):
                x = pyro.sample(f"x_{t}", self.forward_process.transition(x, t))


def test_a_subclass_of_the_guide_that_draws_in_another_order_is_not_taken_for_the_guide():
    diffusion = diffusion_of(*SHIFTED[1])
    guide = ForwardGuide(diffusion.forward_process, diffusion.event_shape)
    elbo = DiffusionELBO()
    with quiet(), pyro.validation_enabled(False):
        assert elbo.loss(diffusion.model, diffusion.guide, X_0) > 0
        draws = repeat(20, lambda: elbo.loss(diffusion.model, guide, X_0.repeat(RUNS, 1)) / RUNS)
    assert not far(draws, closed_bound(*SHIFTED[1]))


# A diffusion as the prior of something that is observed with noise


Y, NOISE = torch.tensor([0.9, -0.4, 2.5]).double(), 0.6
PRIOR_M, PRIOR_V = 0.7, 0.8


def prior_diffusion():
    schedule = pyrodiff.LinearSchedule(6, 0.05, 0.5)
    return gaussian_diffusion(schedule, torch.tensor(PRIOR_M).double(), torch.tensor(PRIOR_V).double())


def chain_by_hand(diffusion):
    """z_6, ..., z_1, z_0 of the chain, and y = z_0 + noise."""

    def model(y):
        parts, T = diffusion.model, diffusion.num_steps
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample(f"x_{T}", parts.top(y.dtype))
            for t in range(T, 0, -1):
                z = pyro.sample(f"x_{t - 1}", parts.reverse(z, times(z, t, 0)))
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    return model


def chain_of_the_diffusion(diffusion):
    """The same, by the diffusion's own program."""

    def model(y):
        x_0 = diffusion.model(num_samples=len(y))
        with pyro.plate("observed", len(y), dim=-1):
            pyro.sample("y", dist.Normal(x_0, NOISE), obs=y)

    return model


class FromTheDatum(nn.Module):
    """q(z_0) with a learned mean and scale of each datum of Y, and q(z_1:6 | z_0) of the forward process."""

    def __init__(self, diffusion):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor([0.4, 0.7, 0.5], dtype=torch.float64))
        self.diffusion = [diffusion]

    def law(self, y):
        return dist.Normal(*(part.repeat(len(y) // len(Y)) for part in (self.loc, self.scale)))

    def forward(self, y):
        q, T = self.diffusion[0].forward_process, self.diffusion[0].num_steps
        with pyro.plate("data", len(y), dim=-1):
            x_0 = pyro.sample("x_0", self.law(y))
            x = pyro.sample(f"x_{T}", q.marginal(x_0, times(x_0, T, 0)))
            for t in range(T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", q.posterior(x, x_0, times(x, t, 0)))


class WithTheDiffusionsGuide(FromTheDatum):
    """The same, by the diffusion's own guide."""

    def forward(self, y):
        with pyro.plate("latent", len(y), dim=-1):
            x_0 = pyro.sample("x_0", self.law(y))
        self.diffusion[0].guide(x_0)


CHAINS = {"by hand": (chain_by_hand, FromTheDatum), "own": (chain_of_the_diffusion, WithTheDiffusionsGuide)}
chains = pytest.mark.parametrize("chain", CHAINS)


def posterior(y):
    return oracles.condition(PRIOR_M, PRIOR_V, 1.0, NOISE**2, y)


def loss_given(guide):
    """-log p(y) + KL(q(z_0) || p(z_0 | y)), and its gradient to the means and scales."""
    y, loc, scale = Y.numpy(), guide.loc.detach().numpy(), guide.scale.detach().numpy()
    mean, variance = posterior(y)
    loss = oracles.normal_kl(loc, scale**2, mean, variance) - oracles.log_normal(y, PRIOR_M, PRIOR_V + NOISE**2)
    slopes = np.concatenate([(loc - mean) / variance, scale / variance - 1 / scale])
    return loss.sum(), torch.from_numpy(slopes)


@chains
def test_a_diffusion_as_a_prior_has_the_evidence_and_the_gap(chain):
    """Pyro's TraceMeanField_ELBO takes KL(q(z_0) || p(z_0 | z_1)), as if z_1 had been drawn before, and is far off."""
    diffusion = prior_diffusion()
    model, guide = CHAINS[chain][0](diffusion), CHAINS[chain][1](diffusion)
    expected, _ = loss_given(guide)
    with quiet():
        ours, pyros, plain = (
            repeat(20, lambda elbo=elbo: elbo.loss(model, guide, Y.repeat(RUNS)) / RUNS)
            for elbo in (DiffusionELBO(), TraceMeanField_ELBO(), Trace_ELBO())
        )
    assert not far(ours, expected)
    assert not far(plain, expected)
    assert far(pyros, expected)
    assert abs(float(pyros.mean()) - expected) > 1


@chains
def test_a_diffusion_as_a_prior_has_the_gradient_of_the_gap(chain):
    diffusion = prior_diffusion()
    model, guide = CHAINS[chain][0](diffusion), CHAINS[chain][1](diffusion)
    _, expected = loss_given(guide)
    with quiet():
        draws, pyros = (
            repeat(20, lambda e=elbo: gradient(e.differentiable_loss(model, guide, Y.repeat(RUNS)) / RUNS, guide))
            for elbo in (DiffusionELBO(), TraceMeanField_ELBO())
        )
    assert float(expected.abs().max()) > 0.5
    assert not far(draws, expected)
    assert far(pyros, expected)


@chains
def test_of_a_diffusion_as_a_prior_the_datum_alone_is_not_analytic(chain):
    diffusion = prior_diffusion()
    model, guide = CHAINS[chain][0](diffusion), CHAINS[chain][1](diffusion)
    (message,) = warned(lambda: DiffusionELBO().loss(model, guide, Y))
    assert named(message, [f"x_{t}" for t in range(7)]) == {"x_0"}


def test_the_posterior_given_a_datum_is_learned():
    """A few hundred steps of SVI from the closed form's neighbourhood, and the mean of the last ones."""
    diffusion = prior_diffusion().requires_grad_(False)
    model, guide = chain_by_hand(diffusion), FromTheDatum(diffusion)
    mean, variance = posterior(Y.numpy())
    elbo = DiffusionELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.02), elbo)
    with quiet():
        for _ in range(100):
            svi.step(Y)
        found = []
        for _ in range(200):
            svi.step(Y)
            found.append(torch.cat([guide.loc, guide.scale]).detach().clone())
    found = torch.stack(found)
    expected = torch.from_numpy(np.concatenate([mean, np.full(3, math.sqrt(variance))]))
    blocks = found.reshape(10, 20, 6).mean(1)  # of 20 steps each, nearly independent: 1 / (0.02 / variance) is 11
    assert not far(blocks, expected)
    assert float((found.mean(0) - expected).abs().max()) < 0.1


# Plates, scales, masks


X = torch.tensor([0.3, -1.2, 2.0, 0.8, -0.5], dtype=torch.float64)
ODD = torch.tensor([True, False, True, False, True])
PARTICLES = {
    "one": {},
    "many": {"num_particles": 3},
    "vectorised": {"num_particles": RUNS, "vectorize_particles": True, "max_plate_nesting": 1},
    "vectorised, guessed": {"num_particles": RUNS, "vectorize_particles": True},
}
particles = pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


class Local(nn.Module):
    """p(g) = N(0.3, 1.2^2), p(z_n | g) = N(g, 0.7^2), p(x_n | z_n) = N(z_n, 0.9^2), with handlers around either."""

    def __init__(self, around_all=contextlib.nullcontext, around_local=contextlib.nullcontext):
        super().__init__()
        self.around_all, self.around_local = around_all, around_local
        self.mean = nn.Parameter(number(0.3))

    def forward(self, x):
        with self.around_all():
            g = pyro.sample("g", dist.Normal(self.mean, 1.2))
            with pyro.plate("data", len(x), dim=-1):
                with self.around_local():
                    z = pyro.sample("z", dist.Normal(g, number(0.7)))
                pyro.sample("x", dist.Normal(z, 0.9), obs=x)


class GlobalLast(Local):
    """q(z_n) = N(slope x_n, scale^2), and then q(g | z) = N(weight mean(z) + 0.1, 0.5^2)."""

    def __init__(self, *around, weight=0.4):
        super().__init__(*around)
        del self.mean
        self.slope, self.scale, self.weight = (nn.Parameter(number(value)) for value in (0.5, 0.6, weight))

    def forward(self, x):
        with self.around_all():
            with pyro.plate("data", len(x), dim=-1), self.around_local():
                z = pyro.sample("z", dist.Normal(self.slope * x, self.scale))
            mean = z.mean(-1, keepdim=z.dim() > 1)
            pyro.sample("g", dist.Normal(self.weight * mean + 0.1, 0.5))


def square(mean, variance, scale):
    """-E log N(d; 0, scale^2) of a difference d with a mean and a variance."""
    return 0.5 * math.log(2 * math.pi * scale**2) + (mean**2 + variance) / (2 * scale**2)


def entropy(scale):
    return 0.5 * torch.log(2 * math.pi * math.e * torch.as_tensor(scale) ** 2)


def local_bound(model, guide, total=1.0, local=1.0):
    """The bound of the pair, whose draws are jointly normal: a moment at a time."""
    N, w, v = len(X), guide.weight, guide.scale**2
    mean_z = guide.slope * X
    mean_g, variance_g = w * mean_z.mean() + 0.1, w**2 * v / N + 0.25
    difference = v - 2 * w * v / N + variance_g  # Var(z_n - g)
    of_z = square(mean_z - mean_g, difference, 0.7) - entropy(guide.scale)
    of_g = square(mean_g - model.mean, variance_g, 1.2) - entropy(0.5)
    return total * ((local * of_z).sum() + of_g + square(X - mean_z, v, 0.9).sum())


HANDLERS = {
    "bare": ((), {}),
    "scale": ((lambda: poutine.scale(scale=2.5),), {"total": 2.5}),
    "local scales": (
        (contextlib.nullcontext, lambda: poutine.scale(scale=torch.arange(1.0, 6.0).double())),
        {"local": torch.arange(1.0, 6.0).double()},
    ),
    "local mask": ((contextlib.nullcontext, lambda: poutine.mask(mask=ODD)), {"local": ODD.double()}),
    "local, not scored": ((contextlib.nullcontext, lambda: poutine.mask(mask=False)), {"local": 0.0}),
    "both": (
        (lambda: poutine.scale(scale=0.5), lambda: poutine.mask(mask=ODD)),
        {"total": 0.5, "local": ODD.double()},
    ),
}


@pytest.mark.parametrize(
    ("handlers", "options"),
    [*((name, PARTICLES["one"]) for name in HANDLERS), *(("both", PARTICLES[name]) for name in list(PARTICLES)[1:])],
)
def test_a_global_drawn_last_with_handlers_in_both_has_the_closed_form(handlers, options):
    """Value and gradient, to what the model learns and to what the guide does."""
    around, weights = HANDLERS[handlers]
    pair = nn.ModuleList([Local(*around), GlobalLast(*around)])
    bound = local_bound(*pair, **weights)
    expected = torch.cat([bound[None], gradient(bound, pair)]).detach()
    elbo, runs = DiffusionELBO(**options), 1 if "vectorize_particles" in options else RUNS
    programs = pair if runs == 1 else side_by_side(runs, *pair)

    def draw():
        loss = elbo.differentiable_loss(*programs, X) / runs
        return torch.cat([loss[None], gradient(loss, pair)])

    with quiet():
        draws = repeat(20, draw)
    assert not far(draws, expected)


@particles
def test_the_terms_of_a_global_drawn_last_have_their_shapes(options):
    with quiet():
        terms = DiffusionELBO(**options).terms(Local(), GlobalLast(), X)
    assert {name: tuple(term.shape) for name, term in terms.items()} == {"g": (), "z": (5,), "x": (5,)}


def test_the_global_drawn_first_has_the_closed_form_too():
    """With a weight of 0 the guide is the same law in either order, and so is the bound."""
    model, last = Local(), GlobalLast(weight=0.0)

    def first(x):
        pyro.sample("g", dist.Normal(number(0.1), 0.5))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(last.slope * x, last.scale))

    expected = local_bound(model, last).detach()
    of_z = (square(0.5 * X - 0.1, 0.36 + 0.25, 0.7) - entropy(0.6)).sum()

    def draw(guide):
        terms = DiffusionELBO().terms(*side_by_side(1000, model, guide), X)
        return torch.stack([of_each(terms, 1000), of_each({"z": terms["z"]}, 1000)], -1)

    draws = [draw(first)]  # in silence
    with quiet():
        draws.append(draw(last))
    assert not any(far(each, torch.stack([expected, of_z])) for each in draws)
    assert draws[0][:, 1].var() < draws[1][:, 1].var()  # a KL is the mean of a log ratio, given what was drawn before


def nested(first):
    """A model of three groups of two latents each, and a guide that draws the groups first or last."""

    def model():
        groups, members = pyro.plate("groups", 3, dim=-1), pyro.plate("members", 2, dim=-2)
        with groups:
            u = pyro.sample("u", dist.Normal(torch.tensor([0.5, -0.2, 1.0]), 0.8))
            with members:
                z = pyro.sample("z", dist.Normal(u, 0.6))
                pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor([[0.3, 0.1, 2.0], [-0.4, -1.0, 1.5]]))

    def guide():
        groups, members = pyro.plate("groups", 3, dim=-1), pyro.plate("members", 2, dim=-2)
        with groups:
            mean = torch.tensor([0.1, -0.4, 1.2])
            if first:
                mean = 0.3 * pyro.sample("u", dist.Normal(mean, 0.4))
            with members:
                z = pyro.sample("z", dist.Normal(mean, 0.5))
            if not first:
                z = z if z.dim() > 2 else z[None]
                mean = 0.4 * z.mean(-2, keepdim=True)
                pyro.sample("u", dist.Normal(mean if len(mean) > 1 else mean[0, 0], 0.4))

    return model, guide


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": RUNS, "vectorize_particles": True, "max_plate_nesting": 2}],
    ids=["one", "particles"],
)
def test_nested_plates_in_either_order(first, options):
    model, guide = nested(first)
    runs, pair = (1, (model, guide)) if options else (RUNS, side_by_side(RUNS, model, guide))
    with quiet():
        ours, theirs = (
            repeat(24, lambda elbo=elbo: elbo(**options).loss(*pair) / runs) for elbo in (DiffusionELBO, Trace_ELBO)
        )
        terms = DiffusionELBO(**options).terms(model, guide)
    assert not differ(ours, theirs)
    assert {name: tuple(term.shape) for name, term in terms.items()} == {"u": (3,), "z": (2, 3), "x": (2, 3)}


def test_a_subsampled_plate_in_either_order():
    """Of ten data in two batches of five: the mean over batches and draws is the bound of all, without handlers."""
    x = torch.cat([X, X + 1.0])

    def model():
        g = pyro.sample("g", dist.Normal(number(0.3), 1.2))
        with pyro.plate("data", 10, subsample_size=5, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(g, number(0.7)))
            pyro.sample("x", dist.Normal(z, 0.9), obs=x[index])

    def guide():
        with pyro.plate("data", 10, subsample_size=5, dim=-1) as index:
            pyro.sample("z", dist.Normal(0.5 * x[index], 0.6))
        pyro.sample("g", dist.Normal(number(0.2), 0.5))

    pair = side_by_side(RUNS, model, guide)
    with quiet():
        draws = repeat(200, lambda: DiffusionELBO().loss(*pair) / RUNS)
    of_z = square(0.5 * x - 0.2, 0.36 + 0.25, 0.7) - entropy(0.6) + square(0.5 * x, 0.36, 0.9)
    assert not far(draws, float(of_z.sum()) + square(-0.1, 0.25, 1.2) - float(entropy(0.5)))


@pytest.mark.parametrize("order", ["model", "other"])
def test_a_delta_in_either_order_costs_its_log_density(order):
    """Value and gradient; p(a) = N(0, 1), p(b | a) = N(a, 0.8^2), p(x | b) = N(b, 1), q a point at b."""
    point = nn.Parameter(number(0.7))

    def model():
        a = pyro.sample("a", dist.Normal(number(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(a, 0.8))
        pyro.sample("x", dist.Normal(b, 1.0), obs=number(1.5))

    def guide():
        if order == "model":
            pyro.sample("a", dist.Normal(number(0.4), 0.3))
        b = pyro.sample("b", dist.Delta(point, log_density=number(0.25)))
        if order == "other":
            pyro.sample("a", dist.Normal(0.5 * b + 0.05, 0.3))

    mean = number(0.4) if order == "model" else 0.5 * point + 0.05
    bound = square(mean, 0.09, 1.0) - entropy(0.3) + 0.25 + square(point - mean, 0.09, 0.8) + square(1.5 - point, 0, 1)
    expected = torch.stack([bound, *torch.autograd.grad(bound, point)]).detach()

    pair = side_by_side(3 * RUNS, model, guide)

    def draw():
        loss = DiffusionELBO().differentiable_loss(*pair) / 3 / RUNS
        return torch.stack([loss, *torch.autograd.grad(loss, point)])

    with quiet():
        draws = repeat(20, draw)
    assert not far(draws, expected)


def test_where_a_law_has_no_kl_another_order_is_right_all_the_same():
    """A Student's t above a normal, drawn after it by the guide; by quadrature."""

    def model():
        a = pyro.sample("a", dist.StudentT(number(3.0), 0.2, 1.1))
        pyro.sample("b", dist.Normal(a, number(0.8)))

    def guide():
        b = pyro.sample("b", dist.Normal(number(0.4), 0.5))
        pyro.sample("a", dist.Normal(0.5 * b, 0.6))

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = torch.from_numpy(np.outer(weights, weights) / weights.sum() ** 2)
    b = torch.from_numpy(0.4 + 0.5 * nodes)[:, None]
    a = 0.5 * b + 0.6 * torch.from_numpy(nodes)
    log_p = torch.distributions.StudentT(3.0, 0.2, 1.1).log_prob(a) + torch.distributions.Normal(a, 0.8).log_prob(b)
    log_q = torch.distributions.Normal(0.4, 0.5).log_prob(b) + torch.distributions.Normal(0.5 * b, 0.6).log_prob(a)
    with quiet():
        draws = of_each(DiffusionELBO().terms(*side_by_side(2000, model, guide)), 2000)
    assert not far(draws, float((weights * (log_q - log_p)).sum()))


# What is said, and what is refused


def program(*names, law=None, plate=None, wrap=None, at="b"):
    """Sites of these names; the one named ``at`` may have another law, a plate, or a handler around it."""

    def run():
        for name in names:
            contexts = [context() for context in (plate, wrap) if context is not None and name == at]
            with contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                pyro.sample(name, law() if law is not None and name == at else dist.Normal(0.2, 1.5))

    return run


def test_the_warning_comes_once_of_each_object_and_names_the_sites():
    model, guide = program("a", "b", "c", "d"), program("a", "c", "b", "d")
    elbo = DiffusionELBO()
    (message,) = warned(lambda: [elbo.loss(model, guide) for _ in range(3)])
    assert named(message.partition(" at ")[2].partition(":")[0], "abcd") == {"c"}
    assert "order" in message
    assert "unbiased" in message
    assert warned(lambda: elbo.terms(model, program("d", "c", "b", "a"))) == []
    assert len(warned(lambda: DiffusionELBO().loss(model, guide))) == 1
    with pytest.warns(UserWarning, match="order"):
        DiffusionELBO().loss_and_grads(model, guide)


def test_the_warning_names_the_sites_in_the_model_s_order():
    names = [f"z_{i}" for i in range(6)]
    (message,) = warned(lambda: DiffusionELBO().loss(program(*names), program(*names[::-1])))
    assert "z_1, z_2, z_3, z_4, z_5" in message


def test_an_object_that_was_silent_warns_when_the_order_first_differs():
    model, elbo = program("a", "b"), DiffusionELBO()
    assert warned(lambda: [elbo.loss(model, program("a", "b")) for _ in range(2)]) == []
    assert len(warned(lambda: elbo.loss(model, program("b", "a")))) == 1


def test_in_the_model_s_order_nothing_is_said_where_no_kl_is_registered():
    model = program("a", "b", law=lambda: dist.StudentT(4.0))
    guide = program("a", "b", law=lambda: dist.Laplace(0.0, 1.0))
    delta = program("a", "b", law=lambda: dist.Delta(torch.tensor(0.3)))
    for one in (guide, delta):
        assert warned(lambda one=one: DiffusionELBO().loss(model, one)) == []
    diffusion = diffusion_of()
    pair = diffusion.one_step()
    for programs in (diffusion, pair):
        assert warned(lambda p=programs: DiffusionELBO().loss(p.model, p.guide, X_0)) == []


def test_sites_that_the_model_observes_have_no_part_in_the_order():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.4))
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.4))
        pyro.deterministic("d", torch.tensor(1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def guide():
        pyro.deterministic("e", torch.tensor(1.0))
        pyro.sample("a", dist.Normal(0.5, 1.0))
        pyro.sample("b", dist.Normal(0.5, 1.0))

    expected = 2 * 0.125 + 2 * (0.5 * math.log(2 * math.pi) + 0.08)
    assert DiffusionELBO().loss(model, guide) == pytest.approx(expected)  # without a draw, so nor with a warning


def scaled():
    return poutine.scale(scale=2.0)


def masked():
    return poutine.mask(mask=torch.tensor(False))


def plated():
    return pyro.plate("data", 4)


def learned_bit():
    return dist.Bernoulli(torch.tensor(0.3, requires_grad=True))


REFUSED = {
    "scale in the model": ({"wrap": scaled}, {}, "scale must stand in both"),
    "scale in the guide": ({}, {"wrap": scaled}, "scale must stand in both"),
    "mask in the model": ({"wrap": masked}, {}, "mask must stand in both"),
    "mask in the guide": ({}, {"wrap": masked}, "mask must stand in both"),
    "plate in the model": ({"plate": plated}, {}, "same plates"),
    "plate in the guide": ({}, {"plate": plated}, "same plates"),
    "learned bits": ({"law": lambda: dist.Bernoulli(0.5)}, {"law": learned_bit}, "reparameterised"),
    "another event": ({"law": lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1)}, {}, "event_shape"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_what_is_no_bound_in_any_order_is_refused_in_every_order(case, order):
    of_model, of_guide, words = REFUSED[case]
    with quiet(), pytest.raises(ValueError, match=rf"{words}.*'b'|'b'.*{words}"):
        DiffusionELBO().differentiable_loss(program("a", "b", "c", **of_model), program(*order, **of_guide))


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_missing_and_extra_sites_are_refused_in_every_order(order):
    with quiet():
        with pytest.raises(ValueError, match="'d' is missing"):
            DiffusionELBO().loss(program(*"abdc"), program(*order))
        with pytest.raises(ValueError, match="'d' is not one"):
            DiffusionELBO().loss(program(*"abc"), program(*order, "d"))


# Where nothing is validated, and in training


def reversible(x, order="gz", weight=None):
    """A guide that draws in the order it is told."""
    weight = number(0.4) if weight is None else weight
    z = number(0.5)
    for name in order:
        if name == "g":
            mean = z.mean(-1, keepdim=z.dim() > 1) if z.dim() else z
            pyro.sample("g", dist.Normal(weight * mean + 0.1, 0.5))
        else:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.5 * x, 0.6))


@pytest.mark.parametrize("validated", [True, False])
def test_the_order_is_judged_at_every_call_validated_or_not(validated):
    """First in the model's order, then in another; and then by turns."""
    model, last, elbo = Local(), GlobalLast(), DiffusionELBO()
    with torch.no_grad():
        last.weight.zero_()
        last_first = (
            local_bound(model, last) - square(0.1 - model.mean, 0.25, 1.2) + square(0.3 - model.mean, 0.25, 1.2)
        )
        mean_z = 0.5 * X
        last_first += (square(mean_z - 0.3, 0.61, 0.7) - square(mean_z - 0.1, 0.61, 0.7)).sum()
        last.weight.fill_(0.4)
        other = local_bound(model, last)

    def draw(order):
        return elbo.loss(*side_by_side(RUNS, model, lambda x: reversible(x, order)), X) / RUNS

    with quiet(), pyro.validation_enabled(validated):
        both = torch.stack([repeat(24, lambda order=order: draw(order)) for order in ("gz", "zg")], -1)
        turns = repeat(24, lambda: torch.tensor([draw(order) for order in ("gz", "zg")]))
    expected = torch.stack([last_first, other])
    assert not far(both, expected)
    assert not far(turns, expected)


def test_where_nothing_is_validated_the_order_is_said_all_the_same():
    with pyro.validation_enabled(False):
        assert len(warned(lambda: DiffusionELBO().loss(Local(), GlobalLast(), X))) == 1
        assert warned(lambda: DiffusionELBO().loss(Local(), lambda x: reversible(x, "gz"), X)) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_a_pair_in_another_order_has_the_bound_in_mean(compiled, interpreted):
    """Value and gradient of steps that change nothing."""
    pair = nn.ModuleList([Local(), GlobalLast()])
    bound = local_bound(*pair)
    expected = torch.cat([bound[None], gradient(bound, pair)]).detach()
    svi = SVI(*side_by_side(RUNS, *pair), still, DiffusionELBO(), compile=compiled)
    messages = []

    def draw():
        messages.extend(warned(lambda: losses.append(svi.step(X))))
        return torch.cat([losses[-1][None], *(p.grad[None] for p in pair.parameters())]) / RUNS

    losses = []
    draws = repeat(20, draw)
    assert not far(draws, expected)
    assert len(interpreted) == compiled
    assert len(messages) == 1
    assert "order" in messages[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_one_object_in_two_trainings_judges_each(compiled, interpreted):
    elbo, model, last = DiffusionELBO(), Local(), GlobalLast()
    ordered = SVI(model, lambda x: reversible(x, "gz", 0.0 * last.weight), still, elbo, compile=compiled)
    other = SVI(*side_by_side(RUNS, model, last), still, elbo, compile=compiled)
    expected = float(local_bound(model, last).detach())
    with quiet():
        for _ in range(5):
            ordered.step(X)
        draws = []
        for _ in range(20):
            draws.append(other.step(X) / RUNS)
            ordered.step(X) if len(draws) % 5 == 0 else None
    assert not far(torch.stack(draws), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_diffusion_trained_by_a_guide_from_x_1_up_is_trained_by_the_bound(compiled, interpreted):
    """The mean loss of steps that change nothing is the closed form."""
    diffusion = diffusion_of(*SHIFTED[1])
    guide = ForwardGuide(diffusion.forward_process, diffusion.event_shape)
    svi = SVI(diffusion.model, guide, still, DiffusionELBO(), compile=compiled)
    with quiet():
        draws = repeat(20, lambda: svi.step(X_0.repeat(RUNS, 1)) / RUNS)
    assert not far(draws, closed_bound(*SHIFTED[1]))
    assert len(interpreted) == compiled


def test_steps_in_another_order_are_those_of_pyro_s_trace_elbo_in_mean():
    """One step of plain gradient descent from the same start, many times: the mean of where it leads."""
    found = []
    for elbo in (DiffusionELBO(), Trace_ELBO()):
        ends = []
        for _ in range(20):
            pair = nn.ModuleList([Local(), GlobalLast()])
            svi = SVI(*side_by_side(RUNS, *pair), lambda p: sgd(p, lr=0.05 / RUNS), elbo, validate=False)
            with quiet():
                svi.step(X)
            ends.append(torch.stack([p.detach() for p in pair.parameters()]))
        found.append(torch.stack(ends))
    assert not differ(*found)
    start = torch.stack([p.detach() for part in (Local(), GlobalLast()) for p in part.parameters()])
    assert float((found[0].mean(0) - start).abs().max()) > 0.01
