"""Denoisers: what they make of an output, and that a network which returns the exact target gives back the data."""

from functools import partial

import cases
import numpy as np
import pytest
import torch
from cases import DENOISERS, PROCESSES, Returns, T, Timed, every_denoiser

import pyrodiff

close = partial(cases.close, rtol=1e-10, atol=1e-10)
SHAPES = ((), (3,), (2, 3))
TIMES = (1, 4, 7, torch.tensor([7, 1, 4]), torch.tensor([[7, 1, 4], [2, 2, 6]]))


def settings(denoiser):
    """Its processes with a time and a shape of states, and the signal and the noise there."""
    for name in denoiser.processes:
        process = PROCESSES[name]
        for t, event_shape in ((t, event_shape) for t in TIMES for event_shape in SHAPES):
            if event_shape or len(getattr(process, "rates", "1")) == 1:
                batch = tuple(t.shape) if isinstance(t, torch.Tensor) else (6,)
                a, b = (np.asarray(one) for one in cases.scales(process, cases.array(t)))
                a, b = (one.reshape(one.shape + (1,) * (one.ndim and len(event_shape))) for one in (a, b))
                yield process, t, (*batch, *event_shape), a, b, len(event_shape)


def output_of(denoiser, shape):
    return torch.randn(*shape, *[denoiser.outputs] * (denoiser.outputs is not None), dtype=torch.float64)


@every_denoiser
def test_the_exact_target_gives_back_the_data(denoiser):
    """At a time for all, for each, and for each particle."""
    for process, t, shape, a, b, _ in settings(denoiser):
        x_0, eps, a, b = denoiser.data(*shape), torch.randn(shape).double(), torch.tensor(a), torch.tensor(b)
        network, y = Returns(denoiser.target(x_0, eps, a, b)), torch.arange(shape[0])
        x_t = a * x_0 + b * eps if isinstance(process, cases.Gaussian) else process.draw(*shape)
        close(denoiser.make(network, process.make())(x_t, t, y), x_0)
        assert network.asked == (x_t, t, (y,))


@every_denoiser
def test_any_output_is_read_as_its_definition_has_it(denoiser):
    """Not only where the network is right: Luo Eqs. 115, 133 and 151, and Bayes' rule for levels."""
    for process, t, shape, a, b, dims in settings(denoiser):
        output, x_t = output_of(denoiser, shape), process.draw(*shape)
        found = denoiser.make(Returns(output), process.make())(x_t, t)
        close(found, denoiser.read(x_t.numpy(), output.numpy(), a, b, dims))


@every_denoiser
def test_without_signal_it_is_at_ease_or_refused(denoiser):
    forward = pyrodiff.GaussianForward(pyrodiff.ReciprocalSchedule(T))
    x_0, eps = denoiser.data(6, 3), torch.randn(6, 3, dtype=torch.float64)
    if denoiser in (DENOISERS["LogitPrediction"], DENOISERS["LevelPrediction"]):
        return  # bits may always have such a schedule; and of levels nothing is known then but their prior
    if denoiser in (DENOISERS["DataPrediction"], DENOISERS["VelocityPrediction"]):
        network = Returns(denoiser.target(x_0, eps, 0.0, 1.0))
        close(denoiser.make(network, forward)(eps, T), x_0, rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises(ValueError, match=r"forward .* signal .*ReciprocalSchedule"):
            denoiser.make(Returns(eps), forward)


@every_denoiser
def test_an_output_of_another_shape_is_refused(denoiser):
    forward = PROCESSES[denoiser.processes[0]].make()
    for output in (torch.zeros(6), torch.zeros(6, 4), torch.zeros(1, 3), torch.zeros(2, 6, 3), 0.0):
        said = str(tuple(output.shape) if isinstance(output, torch.Tensor) else output)
        call = partial(denoiser.make(Returns(output), forward), torch.zeros(6, 3), 2)
        cases.refused(call, "network", "(6, 3" + ")" * (denoiser.outputs is None), said)


@every_denoiser
def test_the_dtype_is_that_of_the_state(denoiser):
    forward = PROCESSES[denoiser.processes[0]].make()
    for dtype in (torch.float32, torch.float64):
        for output in (output_of(denoiser, (6, 3)).to(dtype), output_of(denoiser, (6, 3)).bfloat16()):
            for t in (3, torch.tensor([1, 2, 3, 4, 5, 6])):
                assert denoiser.make(Returns(output), forward)(torch.ones(6, 3, dtype=dtype), t).dtype == dtype


@every_denoiser
def test_the_parameters_are_those_of_the_network_and_learn(denoiser):
    network = Timed(denoiser.outputs)
    made = denoiser.make(network, PROCESSES[denoiser.processes[0]].make())
    assert {id(p) for p in made.parameters()} == {id(p) for p in network.parameters()}
    assert made.network is network
    x_t = cases.coins(5, 3) if denoiser.processes == cases.BITS else 0.1 * cases.within(5, 3)
    made(x_t, 3).sum().backward()
    assert all(p.grad.abs() > 0 for p in network.parameters())


@every_denoiser
def test_copies_states_and_casts_say_the_same(denoiser):
    process = PROCESSES[denoiser.processes[-1]]
    made, x_t, t = denoiser.make(Timed(denoiser.outputs), process.make()), process.draw(5, 3), torch.arange(1, 6)
    other = denoiser.make(Timed(denoiser.outputs), process.make())
    torch.nn.init.constant_(other.network.weight, 0.9)
    expected = made(x_t, t)
    assert not torch.equal(other(x_t, t), expected)
    for one in cases.copies(made, other):
        assert torch.equal(one(x_t, t), expected)
        assert not {id(p) for p in one.parameters()} & {id(p) for p in made.parameters()}
    assert repr(made).startswith(f"{type(made).__name__}(")
    close(made.half().double()(x_t, t), expected, rtol=5e-3, atol=5e-3)  # the tables are whole, the weights rounded


@every_denoiser
def test_it_belongs_to_its_process(denoiser):
    forward, other = (PROCESSES[denoiser.processes[0]].make() for _ in range(2))
    made = denoiser.make(Timed(denoiser.outputs), forward)
    assert made.forward_process is forward
    reverse = pyrodiff.BinomialReverse if denoiser.processes == cases.BITS else pyrodiff.GaussianReverse
    reverse(forward, made)
    cases.refused(lambda: reverse(other, made), "denoiser must be made for the same forward process")


# What one is


def test_logits_are_read_as_the_probability_of_a_one():
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.2)
    logits = torch.tensor([[-60.0, -1.5, 0.0, 2.3, 60.0]], dtype=torch.float64)
    denoiser = pyrodiff.LogitPrediction(Returns(logits), forward)
    close(denoiser(torch.zeros_like(logits), 3), 1 / (1 + np.exp(-logits.numpy())), rtol=1e-14, atol=0)
    assert torch.equal(denoiser.output(torch.zeros_like(logits), 3), logits)


def test_a_score_is_minus_the_noise_over_its_scale():
    process = PROCESSES["GaussianForward, GeometricSchedule"]
    x_t, output = process.draw(6, 3), process.draw(6, 3)
    as_score = pyrodiff.ScorePrediction(Returns(-output / cases.scales(process, 4)[1]), process.make())(x_t, 4)
    close(as_score, pyrodiff.NoisePrediction(Returns(output), process.make())(x_t, 4))


def test_log_probs_of_levels_are_bayes_rule_level_by_level():
    """With the weights of the network as the prior; their mean is what is said of the data."""
    for name in DENOISERS["LevelPrediction"].processes:
        process = PROCESSES[name]
        x_t, logits, (a, b) = process.draw(6, 3), torch.randn(6, 3, cases.LEVELS).double(), cases.scales(process, 4)
        values = np.linspace(-1, 1, cases.LEVELS)
        weights = np.exp(logits.numpy() - (x_t.numpy()[..., None] - a * values) ** 2 / (2 * b**2))
        found = pyrodiff.LevelPrediction(Returns(logits), process.make(), cases.LEVELS).log_probs(x_t, 4)
        close(found.exp(), weights / weights.sum(-1, keepdims=True))


def test_level_prediction_is_exact_for_independent_levels():
    """With the log prior as the network, x_0 is the conditional mean, and no other output has a lower squared error."""
    levels, n, forward = 3, 50_000, PROCESSES["GaussianForward, BetaSchedule"].make()
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    k = torch.multinomial(prior, n, replacement=True)
    x_0 = pyrodiff.from_levels(k, levels, dtype=torch.float64)[:, None]
    x_t = forward.marginal(x_0, 3).sample()
    off = x_0 - pyrodiff.LevelPrediction(Returns(prior.log().expand(n, 1, levels)), forward, levels)(x_t, 3)
    for feature in (torch.ones_like(x_t), x_t, x_t**2, x_t.sin()):  # the error of a conditional mean averages out
        product = off * feature
        assert abs(float(product.mean())) < 5 * float(product.std()) / n**0.5


def test_levels_have_to_be_at_least_two():
    forward = PROCESSES["GaussianForward, BetaSchedule"].make()
    make = partial(pyrodiff.LevelPrediction, Returns(torch.zeros(5, 2)), forward, levels=1)
    cases.refused(make, "levels must be an int of at least 2, but it is 1")
