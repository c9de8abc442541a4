"""What is too fine for float32: noise that it cannot tell is refused there, and tables stay in float64."""

import math

import models
import pyro
import pytest
import torch
from cases import refused
from loops import ONES, X, bits, gaussian, levels, svi_of
from models import Network

import pyrodiff
from pyrodiff import bound, importance_bound
from pyrodiff.base.precision import precisely

T, D = models.T, models.SIZE


# Noise that float32 cannot tell

SMALL = {
    "linear": lambda low: pyrodiff.LinearSchedule(T, low**2, 0.5),
    "beta": lambda low: pyrodiff.BetaSchedule([low**2, 0.1, 0.2, 0.5]),
    "log SNR": lambda low: pyrodiff.LogSNRSchedule(T, -2 * math.log(low), -4.0),
    "geometric": lambda low: pyrodiff.GeometricSchedule(T, low, 20.0),
}


@pytest.mark.parametrize("schedule", SMALL.values(), ids=SMALL)
def test_noise_that_float32_cannot_tell_is_refused_there_and_not_in_float64(schedule):
    diffusion = gaussian(schedule(0.9e-7))
    pair = diffusion.one_step()
    with pyro.validation_enabled(True):
        for program in (diffusion.model, diffusion.guide, pair.model, pair.guide):
            refused(lambda program=program: program(X), "forward", "float32", "float64", "9e-08")
    for use in (
        lambda: bound(diffusion, X),
        lambda: importance_bound(diffusion, X, num_particles=2),
        lambda: svi_of(diffusion).step(X),
        lambda: svi_of(pair).step(X),
    ):
        refused(use, "forward", "float32", "float64", "9e-08")
    diffusion.double()
    x_0 = X.double()
    assert bool(bound(diffusion, x_0).nats.isfinite().all())
    assert math.isfinite(float(svi_of(diffusion).step(x_0)))
    assert math.isfinite(float(svi_of(pair).step(x_0)))
    with pyro.validation_enabled(True):
        for program in (diffusion.model, diffusion.guide, pair.model, pair.guide):
            program(x_0)


@pytest.mark.parametrize("schedule", SMALL.values(), ids=SMALL)
def test_noise_just_above_what_float32_tells_is_taken(schedule):
    diffusion = gaussian(schedule(1e-6))
    assert bool(bound(diffusion, X).nats.isfinite().all())
    svi_of(diffusion).step(X)


def test_a_sub_chain_that_starts_with_more_noise_is_taken():
    diffusion = gaussian(SMALL["beta"](1e-8))
    refused(lambda: bound(diffusion, X), "forward", "float64")
    assert bool(bound(diffusion.subchain((2, 4)), X).nats.isfinite().all())
    refused(lambda: bound(diffusion.subchain((1, 4)), X), "forward", "float64")


def test_bits_have_no_noise_that_is_too_small():
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([1e-16, 0.2, 0.5]), 0.3)
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(Network(), forward))
    assert bool(bound(pyrodiff.Diffusion(forward, reverse, (D,)), ONES).nats.isfinite().all())


# Tables, which stay in float64


def with_tables():
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T))
    denoiser = pyrodiff.NoisePrediction(Network(), forward)
    reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.FixedVariance([0.1, 0.2, 1 / 3]))
    return pyrodiff.Diffusion(forward, reverse, (D,))


CASTS = {
    "float": lambda module: module.float(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "half and back": lambda module: module.half().float(),
    "double": lambda module: module.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("make", [with_tables, bits, lambda: with_tables().subchain((1, 3)), levels])
def test_the_tables_of_a_state_stay_what_they_are(cast, make):
    diffusion = make()
    names = [name for name, tensor in diffusion.state_dict().items() if tensor.dtype == torch.float64]
    before = {name: diffusion.state_dict()[name].clone() for name in names}
    assert any("_table" in name for name in names)
    after = cast(diffusion).state_dict()
    for name in names:
        assert after[name].dtype == torch.float64
        assert torch.equal(after[name], before[name])
    weights = [tensor.dtype for name, tensor in after.items() if name not in names and tensor.is_floating_point()]
    assert weights
    assert all(dtype == next(diffusion.parameters()).dtype for dtype in weights)


@pytest.mark.parametrize("cast", ["float", "half", "half and back"])
def test_tables_of_drawings_stay_what_they_are(cast):
    for drawing in (pyrodiff.ImportanceDrawing([0.2, 0.3, 0.5]), pyrodiff.LossSecondMoment(T)):
        pair = gaussian(pyrodiff.LinearSchedule(T, 0.1, 0.5)).one_step(drawing)
        before = {key: value.clone() for key, value in drawing.state_dict().items()}
        CASTS[cast](pair)
        for key, value in drawing.state_dict().items():
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key])


def test_autocast_is_off_for_the_terms_of_a_bound_wherever_it_was_on():
    kinds = ("cpu", "cuda")
    for kind in kinds:
        torch.set_autocast_enabled(kind, True)
    try:
        with precisely():
            assert not any(map(torch.is_autocast_enabled, kinds))
        assert all(map(torch.is_autocast_enabled, kinds))
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
