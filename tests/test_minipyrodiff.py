"""The page ``examples/minipyrodiff.py`` is the library, number for number, in float64."""

import importlib
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import kl_divergence

import pyrodiff

SCHEDULES = {
    "linear": (lambda page, T: page.linear_beta(T, 0.02, 0.5), lambda T: pyrodiff.LinearSchedule(T, 0.02, 0.5)),
    "Ho's": (lambda page, T: page.linear_beta(T), lambda T: pyrodiff.LinearSchedule(T)),
    "cosine": (lambda page, T: page.cosine_beta(T), lambda T: pyrodiff.CosineSchedule(T)),
}
X_0 = torch.tensor([[0.2, -2.0], [1.1, 0.4], [-0.7, 1.5], [0.6, 0.9], [2.0, -0.3]], dtype=torch.float64)
B = len(X_0)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # two ways to write one formula, in float64


@pytest.fixture
def page(monkeypatch):
    """The page as a module, with float64 as the default."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    page = importlib.import_module("minipyrodiff")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield page
    torch.set_default_dtype(default)
    pyro.clear_param_store()


def both(page, schedule="linear", T=7, seed=0):
    """The page's diffusion and the library's, with the same network, which is far from 0."""
    torch.manual_seed(seed)
    network = page.MLP(T, hidden=16)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    of_page, of_library = SCHEDULES[schedule]
    forward = pyrodiff.GaussianForward(of_library(T))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
    return page.Diffusion(of_page(page, T), network), pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


def assert_same_law(ours, theirs):
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    torch.testing.assert_close(ours.mean, theirs.mean, **EXACT)
    torch.testing.assert_close(ours.variance, theirs.variance.expand_as(ours.variance), **EXACT)


def trace_of(program, seed):
    pyro.set_rng_seed(seed)
    return poutine.trace(program).get_trace(X_0)


@pytest.mark.parametrize("T", [1, 2, 40, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_the_librarys(page, name, T):
    of_page, of_library = SCHEDULES[name]
    ours, theirs, t = page.Diffusion(of_page(page, T), nn.Identity()), of_library(T), torch.arange(T + 1)
    for table in ("beta", "alpha_bar", "signal", "noise"):
        assert getattr(ours, table).dtype == torch.float64
        torch.testing.assert_close(getattr(ours, table), getattr(theirs, table)(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_kernels_have_the_librarys_moments(page, name):
    ours, theirs = both(page, name)
    forward, x_t = theirs.forward_process, X_0.flip(0) * 1.3 + 0.2
    assert_same_law(ours.prior, forward.prior((2,)))
    for t in (*range(1, 8), torch.tensor([1, 7, 2, 4, 3]), torch.tensor([7, 2, 2, 5, 6])):
        assert_same_law(ours.marginal(X_0, t), forward.marginal(X_0, t))
        assert_same_law(ours.reverse(x_t, t), theirs.reverse(x_t, t))
        if torch.as_tensor(t).min() > 1:
            assert_same_law(ours.posterior(x_t, X_0, t), forward.posterior(x_t, X_0, t))


@pytest.mark.parametrize("T", [1, 2, 7])
def test_each_term_of_the_bound_is_the_librarys_at_the_same_states(page, T):
    ours, theirs = both(page, T=T)
    forward = theirs.forward_process
    guide = trace_of(ours.guide, seed=3)
    pyro.set_rng_seed(3)
    prior, denoising, reconstruction = ours.bound(X_0)
    assert prior.shape == reconstruction.shape == (B,)
    assert denoising.shape == (T - 1, B)
    x = {t: guide.nodes[f"x_{t}"]["value"] for t in range(1, T + 1)}
    torch.testing.assert_close(prior, kl_divergence(forward.marginal(X_0, T), forward.prior((2,))), **EXACT)
    for t in range(2, T + 1):
        expected = kl_divergence(forward.posterior(x[t], X_0, t), theirs.reverse(x[t], t))
        torch.testing.assert_close(denoising[t - 2], expected, **EXACT)
    torch.testing.assert_close(reconstruction, -theirs.reverse(x[1], 1).log_prob(X_0), **EXACT)


def test_the_bound_is_the_librarys_in_the_mean(page):
    ours, theirs = both(page)
    x_0 = X_0[:2].repeat_interleave(20000, 0)
    with torch.no_grad():
        prior, denoising, reconstruction = ours.bound(x_0)
    bound = pyrodiff.bound(theirs, x_0, generator=1)
    torch.testing.assert_close(prior, bound.prior, **EXACT)
    for mine, other in zip((*denoising, reconstruction), (*bound.denoising, bound.reconstruction), strict=True):
        for part, another in zip(mine.split(20000), other.split(20000), strict=True):
            error = ((part.var() + another.var()) / 20000).sqrt()
            assert (part.mean() - another.mean()).abs() < 5 * error


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_the_trajectory_pairs_have_one_loss_from_one_seed(page, T, elbo):
    ours, theirs = both(page, T=T)
    losses = []
    for diffusion in (ours, theirs):
        pyro.set_rng_seed(5)
        losses.append(elbo().loss(diffusion.model, diffusion.guide, X_0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    if elbo is TraceMeanField_ELBO:
        pyro.set_rng_seed(5)
        with torch.no_grad():
            assert losses[0] == pytest.approx(float(sum(part.sum() for part in ours.bound(X_0))), rel=1e-9)


class Given(Messenger):
    """The sites of these names have these values, drawn or not."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def spread(u, size=B):
    """The library's u of each datum, from the page's one."""
    return (u + torch.arange(size) / size) % 1


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("T", [2, 7, 40])
@pytest.mark.parametrize("u", [0.0, 0.15, 0.55, 0.999])
def test_the_one_step_pairs_have_one_loss_and_gradient_at_the_same_draws(page, T, u, elbo):
    ours, theirs = both(page, T=T)
    pair, x_t, u = theirs.one_step(), X_0 * 0.8 - 0.1, torch.tensor(u)
    given = {"x_t": x_t, "x_T": X_0 * 0.3, "x_s": X_0 * 0.9 + 0.05}
    found = []
    for model, guide, value in (ours.one_step_model, ours.one_step_guide, u), (pair.model, pair.guide, spread(u)):
        ours.zero_grad()
        with Given(u=value, **given):
            loss = elbo().differentiable_loss(model, guide, X_0)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in ours.network.parameters())])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def test_times_are_drawn_as_the_library_draws_them(page):
    for T in (1, 3, 40):
        for size in (1, 5, 64):
            pyro.set_rng_seed(size)
            ours = page.draw_times(size, T)
            pyro.set_rng_seed(size)
            drawing = pyrodiff.LowDiscrepancyDrawing()
            theirs, probability = drawing(drawing.uniforms(torch.zeros(size)).sample(), T)
            assert torch.equal(ours, theirs)
            assert 1 <= int(ours.min()) <= int(ours.max()) <= T
            torch.testing.assert_close(1 / probability, torch.full((size,), float(T)))


def test_the_one_step_pair_draws_x_t_by_the_librarys_law(page):
    ours, theirs = both(page)
    guide = trace_of(ours.one_step_guide, seed=2)
    pyro.set_rng_seed(2)
    t = page.draw_times(B, 7)
    assert_same_law(guide.nodes["x_t"]["fn"], theirs.forward_process.marginal(X_0, t))
    model = poutine.trace(poutine.replay(ours.one_step_model, trace=guide)).get_trace(X_0)
    assert_same_law(model.nodes["x_t"]["fn"], guide.nodes["x_t"]["fn"])
    assert_same_law(model.nodes["x_s"]["fn"], theirs.reverse(guide.nodes["x_t"]["value"], t))


def test_the_one_step_pair_has_the_mean_of_the_bound(page):
    """By the mean over t: B = T data that are alike see every t once."""
    ours, _ = both(page)
    x_0 = X_0[:1].expand(7 * 20000, 2)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        one_step = TraceMeanField_ELBO().loss(ours.one_step_model, ours.one_step_guide, x_0) / len(x_0)
        costs = torch.cat([part.reshape(-1, 20000) for part in ours.bound(x_0[:20000])])
    error = (costs.var(1).sum() / 20000).sqrt()  # of each of the two: every t has 20000 draws
    assert abs(one_step - float(costs.mean(1).sum())) < 5 * 2**0.5 * float(error)


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_are_the_librarys_from_one_seed(page, name):
    ours, theirs = both(page, name)
    samples = []
    for model in (ours.model, theirs.model):
        pyro.set_rng_seed(11)
        samples.append(model(num_samples=6).detach())
    samples.append(pyrodiff.AncestralSampler(theirs)(num_samples=6, generator=11))
    for others in samples[1:]:
        torch.testing.assert_close(samples[0], others, **EXACT)


def test_the_page_stands_alone():
    source = (Path(__file__).parents[1] / "examples" / "minipyrodiff.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} <= {"math", "pyro", "torch"}


def test_the_page_runs(page, capsys):
    torch.set_default_dtype(torch.float32)
    terms = page.main(num_steps=20)
    printed = capsys.readouterr().out
    bound = float((terms[0] + terms[1].sum(0) + terms[2]).mean())
    row = next(row for row in printed.splitlines() if row.startswith("bound  "))
    assert float(row.split()[1]) == pytest.approx(bound, abs=1e-4)
    assert float(terms[0].mean()) > 0
