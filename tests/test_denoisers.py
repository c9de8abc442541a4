"""Denoisers: a network that returns the exact target gives back the data."""

import numpy as np
import oracles
import pytest
import torch

import pyrodiff
from pyrodiff.model import denoisers

T = 7
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25, 0.5, 0.8]
SCHEDULES = {
    "vp": (pyrodiff.BetaSchedule(BETAS), oracles.preserving_steps(BETAS)),
    "ve": (pyrodiff.GeometricSchedule(T, 0.3, 20.0), oracles.exploding_steps(oracles.geometric_sigmas(T, 0.3, 20.0))),
}
# what the network has to return, given x_0, eps, a_t and b_t
TARGETS = {
    "DataPrediction": lambda x_0, eps, a, b: x_0,
    "NoisePrediction": lambda x_0, eps, a, b: eps,
    "ScorePrediction": lambda x_0, eps, a, b: -eps / b,  # Luo Eq. 151
    "VelocityPrediction": lambda x_0, eps, a, b: a * eps - b * x_0,
}
every_target = pytest.mark.parametrize("name", TARGETS)
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)


class Returns(torch.nn.Module):
    """A network that returns what it was given, and remembers what it was asked."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t):
        self.asked = x_t, t
        return self.output


def case(kind, t, shape):
    """x_0, eps, signal and noise at the times t, broadcast against data of the shape."""
    gain, variance = np.array(oracles.moments(SCHEDULES[kind][1])).T
    a, b = (torch.as_tensor(table)[t] for table in (gain, variance**0.5))
    a, b = (scale.reshape(scale.shape + (1,) * (len(shape) - scale.dim())) for scale in (a, b))
    x_0 = 0.7 + 2.3**0.5 * torch.randn(shape, dtype=torch.float64)
    return x_0, torch.randn(shape, dtype=torch.float64), a, b


def test_every_concrete_denoiser_is_tested_here():
    assert set(denoisers.__all__) == {*TARGETS, "LogitPrediction", "LevelPrediction", "Denoiser"}


@every_target
@every_schedule
@pytest.mark.parametrize("t", range(1, T + 1))
def test_the_exact_target_gives_back_the_data(name, kind, t):
    x_0, eps, a, b = case(kind, torch.tensor(t), (6, 3))
    network = Returns(TARGETS[name](x_0, eps, a, b))
    denoiser = getattr(pyrodiff, name)(network, pyrodiff.GaussianForward(SCHEDULES[kind][0]))
    torch.testing.assert_close(denoiser(a * x_0 + b * eps, t), x_0, rtol=1e-10, atol=1e-10)
    assert network.asked[1] == t


@every_target
@every_schedule
@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("t", [torch.tensor([7, 1, 4]), torch.tensor([[7, 1, 4], [2, 2, 6]])], ids=["B", "P, B"])
def test_the_exact_target_gives_back_the_data_at_a_time_for_each(name, kind, event_shape, t):
    x_0, eps, a, b = case(kind, t, (*t.shape, *event_shape))
    denoiser = getattr(pyrodiff, name)(
        Returns(TARGETS[name](x_0, eps, a, b)), pyrodiff.GaussianForward(SCHEDULES[kind][0])
    )
    torch.testing.assert_close(denoiser(a * x_0 + b * eps, t), x_0, rtol=1e-10, atol=1e-10)


@every_schedule
@pytest.mark.parametrize("t", [1, 4, 7])
def test_luo_115_133_and_151_on_any_output(kind, t):
    """Not only where the network is right: x_0 = (x_t - b eps) / a = (x_t + b^2 s) / a, with s = -eps / b."""
    x_t, output, a, b = case(kind, torch.tensor(t), (6, 3))
    forward = pyrodiff.GaussianForward(SCHEDULES[kind][0])
    predicted = {name: getattr(pyrodiff, name)(Returns(output), forward)(x_t, t) for name in TARGETS}
    expected = {
        "DataPrediction": output,
        "NoisePrediction": (x_t - b * output) / a,
        "ScorePrediction": (x_t + b**2 * output) / a,
        "VelocityPrediction": (a * x_t - b * output) / (a**2 + b**2),
    }
    for name in TARGETS:
        torch.testing.assert_close(predicted[name], expected[name], rtol=1e-10, atol=1e-10)
    as_score = pyrodiff.ScorePrediction(Returns(-output / b), forward)(x_t, t)
    torch.testing.assert_close(as_score, predicted["NoisePrediction"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["DataPrediction", "VelocityPrediction"])
def test_data_and_velocity_are_at_ease_without_signal(name):
    schedule = pyrodiff.ReciprocalSchedule(T)
    x_0, eps = 0.7 + torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    target = {"DataPrediction": x_0, "VelocityPrediction": -x_0}[name]  # a_T = 0 and b_T = 1
    denoiser = getattr(pyrodiff, name)(Returns(target), pyrodiff.GaussianForward(schedule))
    torch.testing.assert_close(denoiser(eps, T), x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["NoisePrediction", "ScorePrediction"])
def test_noise_and_score_refuse_a_schedule_that_leaves_no_signal(name):
    forward = pyrodiff.GaussianForward(pyrodiff.ReciprocalSchedule(T))
    with pytest.raises(ValueError, match=r"forward .* signal .*ReciprocalSchedule"):
        getattr(pyrodiff, name)(Returns(None), forward)


@pytest.mark.parametrize("name", [*TARGETS, "LogitPrediction"])
@pytest.mark.parametrize("output", [torch.zeros(6), torch.zeros(6, 4), torch.zeros(1, 3), torch.zeros(2, 6, 3), 0.0])
def test_an_output_of_another_shape_is_refused(name, output):
    forward = pyrodiff.BinomialForward if name == "LogitPrediction" else pyrodiff.GaussianForward
    denoiser = getattr(pyrodiff, name)(Returns(output), forward(pyrodiff.BetaSchedule(BETAS)))
    with pytest.raises(ValueError, match="network") as error:
        denoiser(torch.zeros(6, 3), 2)
    assert "(6, 3)" in str(error.value)
    assert str(tuple(output.shape) if isinstance(output, torch.Tensor) else output) in str(error.value)


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_state(name, dtype):
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS))
    denoiser = getattr(pyrodiff, name)(Returns(torch.ones(6, 3, dtype=dtype)), forward)
    for t in (3, torch.tensor([1, 2, 3, 4, 5, 6])):
        assert denoiser(torch.ones(6, 3, dtype=dtype), t).dtype == dtype


def test_logits_are_read_as_the_probability_of_a_one():
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.2)
    logits = torch.tensor([[-60.0, -1.5, 0.0, 2.3, 60.0]], dtype=torch.float64)
    denoiser = pyrodiff.LogitPrediction(Returns(logits), forward)
    expected = 1 / (1 + np.exp(-logits.numpy()))
    np.testing.assert_allclose(denoiser(torch.zeros_like(logits), 3).numpy(), expected, rtol=1e-14)
    assert torch.equal(denoiser.output(torch.zeros_like(logits), 3), logits)


@pytest.mark.parametrize("name", [*TARGETS, "LogitPrediction"])
def test_the_parameters_are_those_of_the_network(name):
    forward = pyrodiff.BinomialForward if name == "LogitPrediction" else pyrodiff.GaussianForward
    network = pyrodiff.networks.MLP(event_shape=(3,), hidden=4, num_blocks=1)
    denoiser = getattr(pyrodiff, name)(network, forward(pyrodiff.BetaSchedule(BETAS)))
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in network.parameters()}
    denoiser(torch.ones(5, 3), 3).sum().backward()
    assert network.gate.weight.grad.abs().sum() > 0


@every_schedule
@pytest.mark.parametrize("t", [1, 4, torch.tensor([7, 1, 4, 2, 5, 3])], ids=str)
@pytest.mark.parametrize("event_shape", [(3,), (2, 2)])
def test_levels_are_weighed_by_the_network_and_by_their_own_noisy_value(kind, t, event_shape):
    """Bayes' rule a number by itself, level by level, with the weights of the network as the prior."""
    levels, shape = 4, (6, *event_shape)
    _, _, a, b = case(kind, torch.as_tensor(t), shape)
    logits = torch.randn(*shape, levels, dtype=torch.float64)
    x_t = 0.4 + 1.7 * torch.randn(shape, dtype=torch.float64)
    denoiser = pyrodiff.LevelPrediction(Returns(logits), pyrodiff.GaussianForward(SCHEDULES[kind][0]), levels)
    values = [-1, -1 / 3, 1 / 3, 1]
    weights = [logits[..., k].exp() * torch.exp(-0.5 * ((x_t - a * v) / b) ** 2) for k, v in enumerate(values)]
    total = sum(weights)
    for k, weight in enumerate(weights):
        torch.testing.assert_close(denoiser.log_probs(x_t, t)[..., k].exp(), weight / total)
    mean = sum(v * weight for v, weight in zip(values, weights, strict=True)) / total
    torch.testing.assert_close(denoiser(x_t, t), mean)


def test_level_prediction_is_exact_for_independent_levels():
    """With the log prior as the network, x_0 is the conditional mean, and no other output has a lower squared error."""
    schedule, levels = SCHEDULES["vp"][0], 3
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    k = torch.multinomial(prior, 200_000, replacement=True)
    x_0 = pyrodiff.from_levels(k, levels, dtype=torch.float64)[:, None]
    forward = pyrodiff.GaussianForward(schedule)
    x_t = forward.marginal(x_0, 3).sample()
    denoiser = pyrodiff.LevelPrediction(Returns(prior.log().expand(len(k), 1, levels)), forward, levels)
    off = x_0 - denoiser(x_t, 3)
    for feature in (torch.ones_like(x_t), x_t, x_t**2, x_t.sin()):  # the error of a conditional mean averages out
        product = off * feature
        assert abs(float(product.mean())) < 5 * float(product.std()) / len(k) ** 0.5


def test_a_network_of_levels_has_to_return_one_number_a_level():
    forward = pyrodiff.GaussianForward(SCHEDULES["vp"][0])
    denoiser = pyrodiff.LevelPrediction(Returns(torch.zeros(5, 2)), forward, levels=4)
    with pytest.raises(ValueError, match=r"network must return a tensor of shape \(5, 2, 4\) .* but it is \(5, 2\)"):
        denoiser(torch.zeros(5, 2), 1)
    with pytest.raises(ValueError, match="levels must be an int of at least 2, but it is 1"):
        pyrodiff.LevelPrediction(Returns(torch.zeros(5, 2)), forward, levels=1)
