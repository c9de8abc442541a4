"""What a step refuses and says before it is taken, and what is validated whatever Pyro was told."""

import math
import warnings

import models
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import refused
from loops import ONES, X, bits, gaussian, levels, svi_of, values
from pyro.infer import Trace_ELBO
from torch import nn

import pyrodiff
from pyrodiff import AncestralSampler, DiffusionELBO, bound, importance_bound

T, D = models.T, models.SIZE


POINTS = pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1], [2, 4]]), levels=5)
PAIRS = {"trajectory": lambda diffusion: diffusion, "one step": lambda diffusion: diffusion.one_step()}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


# Steps


@every_pair
def test_an_optimizer_that_evaluates_the_loss_several_times_is_refused(pair):
    diffusion = gaussian()
    before = values(diffusion)
    svi = svi_of(pair(diffusion), lambda parameters: torch.optim.LBFGS(parameters))
    refused(lambda: svi.step(X), "optim", "LBFGS", "one gradient per step", "differentiable_loss")
    assert all(torch.equal(*both) for both in zip(before, values(diffusion), strict=True))


def test_what_is_said_of_lbfgs_works():
    diffusion, loss = gaussian(), DiffusionELBO()
    optimizer = torch.optim.LBFGS(diffusion.parameters(), lr=0.1, max_iter=5)
    before = bound(diffusion, X, num_particles=20, generator=1).mean

    def closure():
        optimizer.zero_grad()
        torch.manual_seed(2)
        found = loss.differentiable_loss(diffusion.model, diffusion.guide, X)
        found.backward()
        return found

    for _ in range(5):
        optimizer.step(closure)
    assert bound(diffusion, X, num_particles=20, generator=1).mean < before


@every_pair
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_without_gradients_is_refused_and_one_with_them_is_not(pair, without, compile):
    diffusion = gaussian()
    before, svi = values(diffusion), svi_of(pair(diffusion), compile=compile)
    with without():
        refused(lambda: svi.step(X), "gradients must be enabled", "no_grad")
    assert all(torch.equal(*both) for both in zip(before, values(diffusion), strict=True))
    assert svi.num_steps == 0
    svi.step(X)
    with without():
        refused(lambda: svi.step(X), "gradients must be enabled")
        assert math.isfinite(float(svi.evaluate_loss(X)))
    assert svi.num_steps == 1
    assert not all(torch.equal(*both) for both in zip(before, values(diffusion), strict=True))
    with torch.no_grad(), torch.enable_grad():
        svi.step(X[:3])
    assert svi.num_steps == 2


# Data that are far from the prior


def said_of(call):
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


FAR = {"mean": (100.0, 1.0), "large": (0.0, 50.0), "small": (0.0, 0.01), "both": (-3.0, 7.0)}


def data(mean, scale, B=64):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    return mean + scale * (x - x.mean()) / x.std()


@every_pair
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("mean", "scale"), FAR.values(), ids=FAR)
def test_the_first_step_says_once_how_far_the_data_are_from_the_prior(pair, compile, mean, scale, interpreted):
    svi, x_0 = svi_of(pair(gaussian()), compile=compile), data(mean, scale)
    (warning,) = said_of(lambda: svi.step(x_0))
    assert warning.category is UserWarning
    assert warning.filename == __file__
    said = str(warning.message)
    assert f"mean {float(x_0.mean()):.3g} " in said
    assert f"standard deviation {float(x_0.std()):.3g}" in said
    assert "standardise" in said
    later = (x_0, x_0, x_0[:5], data(200.0, 3.0), x_0[:1])
    for x in later:
        assert not said_of(lambda x=x: svi.step(x))


@every_pair
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (1.0, 0.5), (-1.5, 3.0), (0.3, 0.25)])
def test_nothing_is_said_of_data_near_it(pair, mean, scale):
    assert not said_of(lambda: svi_of(pair(gaussian())).step(data(mean, scale)))


class Regression:
    """A pair that is no diffusion."""

    def __init__(self):
        self.linear = nn.Linear(D, 1)

    def model(self, x):
        pyro.module("linear", self.linear)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.linear(x)[:, 0], 1.0), obs=x.sum(-1))

    def guide(self, x):
        pass


@every_pair
def test_nothing_is_said_of_bits_levels_and_single_numbers(pair):
    assert not said_of(lambda: svi_of(pair(bits())).step(ONES))
    assert not said_of(lambda: svi_of(pair(bits())).step(torch.zeros(5, D)))  # of which the deviation is 0
    assert not said_of(lambda: svi_of(pair(levels())).step(POINTS))
    assert not said_of(lambda: svi_of(Regression()).step(data(100.0, 1.0)))


def test_nothing_is_said_where_the_first_step_is_refused():
    svi = svi_of(gaussian())
    assert not said_of(lambda: refused(lambda: svi.step(data(100.0, 1.0)[:, :1]), "x_0"))
    assert len(said_of(lambda: svi.step(data(100.0, 1.0)))) == 1


# What is validated


class Wrong(nn.Module):
    """A reverse process whose distribution has another event_shape: all of its dimensions are the batch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x_t, t):
        return dist.Normal(self.weight * x_t, 1.0)


def wrong():
    return pyrodiff.Diffusion(pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.1, 0.5)), Wrong(), (D,))


BAD = {
    "a half bit": (bits, torch.tensor([[0.0, 0.5]])),
    "a bit below 0": (bits, torch.tensor([[-1.0, 0.0]])),
    "not a number": (gaussian, torch.tensor([[0.0, math.nan]])),
    "infinite": (gaussian, torch.tensor([[math.inf, 0.0]])),
    "no level": (levels, torch.tensor([[0.3, 0.5]])),
}
EVALUATIONS = {"bound": bound, "importance": lambda *args: importance_bound(*args, num_particles=2)}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_bounds_validate_whatever_pyro_was_told(enabled, evaluate):
    with pyro.validation_enabled(enabled):
        for make, x_0 in BAD.values():
            refused(lambda make=make, x=x_0: evaluate(make(), x), "x_0")
            refused(lambda make=make, x=x_0: evaluate(make(), [x]), "x_0", "in batch 0")
        refused(lambda: evaluate(wrong(), X), "reverse", "event_shape (2,)")
        assert pyro.poutine.util.is_validation_enabled() == enabled
        evaluate(gaussian(), X)
        assert pyro.poutine.util.is_validation_enabled() == enabled


@pytest.mark.parametrize("enabled", [False, True])
def test_the_sampler_validates_whatever_pyro_was_told(enabled):
    with pyro.validation_enabled(enabled):
        refused(lambda: AncestralSampler(wrong())(3), "reverse", "event_shape (2,)")
        assert pyro.poutine.util.is_validation_enabled() == enabled
        AncestralSampler(gaussian())(3)
        assert pyro.poutine.util.is_validation_enabled() == enabled


@every_pair
@pytest.mark.parametrize("enabled", [False, True])
def test_the_first_step_of_each_shape_validates_whatever_pyro_was_told(pair, enabled):
    with pyro.validation_enabled(enabled):
        for make, x_0 in BAD.values():
            refused(lambda make=make, x=x_0: svi_of(pair(make())).step(x), "x_0")
        refused(lambda: svi_of(pair(wrong())).step(X), "reverse", "event_shape (2,)")
        svi = svi_of(pair(bits()))
        svi.step(ONES)
        svi.step(0.5 * ONES)  # of a shape that was there, which is taken on trust
        refused(lambda: svi.step(0.5 * ONES[:2]), "x_0")
        svi.step(ONES[:2])
        svi.step(0.5 * ONES[:2])
        assert pyro.poutine.util.is_validation_enabled() == enabled


@every_pair
@pytest.mark.parametrize("enabled", [False, True])
def test_every_step_validates_where_it_is_asked_to(pair, enabled):
    with pyro.validation_enabled(enabled):
        svi = svi_of(pair(bits()), validate=True)
        svi.step(ONES)
        refused(lambda: svi.step(0.5 * ONES), "x_0")


@every_pair
@pytest.mark.parametrize("enabled", [False, True])
def test_no_step_validates_where_it_is_asked_not_to(pair, enabled):
    with pyro.validation_enabled(enabled):
        svi = svi_of(pair(bits()), validate=False)
        for x_0 in (0.5 * ONES, 0.5 * ONES[:2]):
            svi.step(x_0)
        assert svi.num_steps == 2
        assert pyro.poutine.util.is_validation_enabled() == enabled


@pytest.mark.parametrize("enabled", [False, True])
def test_pyros_own_losses_are_validated_as_well(enabled):
    with pyro.validation_enabled(enabled):
        svi = svi_of(bits(), loss=Trace_ELBO())
        with pytest.raises(ValueError, match="x_0 must be 0 or 1 everywhere"):
            svi.step(0.5 * ONES)
        svi.step(ONES)
        svi = svi_of(bits(), loss=Trace_ELBO(), validate=False)
        svi.step(ONES)
