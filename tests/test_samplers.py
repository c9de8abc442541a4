"""The sampler draws what the Pyro model draws."""

import models
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrodiff
from pyrodiff import AncestralSampler, networks


def gaussian(T=6, decoder=None):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    network = networks.MLP((2,), hidden=8, dropout=0.5)
    nn.init.normal_(network.outlet.weight)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=decoder).double()


def bits(T=5):
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), rate=0.3)
    logits = pyrodiff.LogitPrediction(networks.MLP((4,), hidden=8), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, logits), (4,))


class Weighted(PyroModule):
    """A reverse process with a random weight."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def forward(self, x_t, t):
        return dist.Normal(x_t * self.weight, 0.1).to_event(1)


def weighted():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    return pyrodiff.Diffusion(forward, Weighted(), (2,))


DIFFUSIONS = {
    "gaussian": gaussian,
    "one step": lambda: gaussian(T=1),
    "levels": lambda: gaussian(decoder=pyrodiff.DiscretizedDecoder(9)),
    "subchain": lambda: gaussian(T=9).subchain([1, 4, 9]),
    "bits": bits,
}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_draws_are_those_of_the_pyro_model(name):
    diffusion = DIFFUSIONS[name]()
    pyro.set_rng_seed(3)
    with torch.no_grad():
        expected = diffusion.eval().model(num_samples=7)
    diffusion.train()
    found = AncestralSampler(diffusion)(7, generator=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert diffusion.training


def test_the_draws_of_a_random_weight_are_one_per_call():
    """x_0 = w^4 x_4 + noise, with the same w for all samples: their spread differs from call to call."""
    diffusion = weighted()
    sampler = AncestralSampler(diffusion, guide=models.prior_of_weights(diffusion))
    spreads = torch.stack([sampler(2000, generator=seed).std(0) for seed in range(4)])
    weights = []
    for seed in range(4):
        pyro.set_rng_seed(seed)
        weights.append(dist.Normal(0.0, 1.0).expand([2]).to_event(1).sample())
    w = torch.stack(weights).abs()
    variance = w**8 + 0.01 * (1 + w**2 + w**4 + w**6)
    torch.testing.assert_close(spreads, variance.sqrt(), rtol=5 / (2 * 2000) ** 0.5, atol=0)
    with pytest.raises(ValueError, match="no random weights"):
        AncestralSampler(weighted(), compile=True)


def test_compiled_steps_draw_the_same():
    diffusion = gaussian()
    eager, compiled = AncestralSampler(diffusion), AncestralSampler(diffusion, compile=True)
    for seed in range(3):
        torch.testing.assert_close(compiled(5, generator=seed), eager(5, generator=seed), rtol=1e-9, atol=1e-9)
    assert not torch.equal(compiled(5), compiled(5))
    with torch.no_grad():
        diffusion.reverse.denoiser.network.outlet.weight.mul_(2)  # learned on: the graph reads it
    torch.testing.assert_close(compiled(5, generator=1), eager(5, generator=1), rtol=1e-9, atol=1e-9)


def test_samples_may_be_trained_on_and_the_source_is_left_alone():
    diffusion = gaussian()
    pyro.set_rng_seed(5)
    x = AncestralSampler(diffusion)(4, generator=torch.Generator().manual_seed(1))
    assert not x.is_inference()
    after = torch.rand(2)
    pyro.set_rng_seed(5)
    assert torch.equal(after, torch.rand(2))
    pair = diffusion.one_step()
    pyrodiff.DiffusionELBO().differentiable_loss(pair.model, pair.guide, x).backward()
    assert diffusion.reverse.denoiser.network.outlet.weight.grad.abs().sum() > 0


def test_a_kernel_of_another_shape_is_refused_at_the_first_step():
    class Wrong(nn.Module):
        def forward(self, x_t, t):
            return dist.Normal(x_t, 1.0)

    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    with pytest.raises(ValueError, match="reverse must have the event_shape"):
        AncestralSampler(pyrodiff.Diffusion(forward, Wrong(), (2,)))(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: AncestralSampler(None), "diffusion must be a"),
        (lambda: AncestralSampler(gaussian(), compile=1), "compile must be one of False, True"),
        (lambda: AncestralSampler(gaussian())(0), "num_samples must be an int of at least 1"),
        (lambda: AncestralSampler(gaussian())(2, generator="a"), "generator must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        arguments()


class Alike(nn.Module):
    """One law for all states."""

    def forward(self, x_t, t):
        return dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)


@pytest.mark.parametrize("T", [1, 3])
def test_a_law_that_is_the_same_for_all_is_drawn_for_each(T):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    x = AncestralSampler(pyrodiff.Diffusion(forward, Alike(), (2,)))(5, generator=0)
    assert x.shape == (5, 2)
    assert len(x.unique()) == 10


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_states_on_the_way_are_the_sites_of_the_pyro_model(name):
    diffusion = DIFFUSIONS[name]()
    T = diffusion.num_steps
    pyro.set_rng_seed(3)
    with torch.no_grad():
        trace = poutine.trace(diffusion.eval().model).get_trace(num_samples=7)
    sampler = AncestralSampler(diffusion)
    states = sampler.trajectory(7, generator=3)
    times = range(T, -1, -1)
    assert states.shape == (T + 1, 7, *diffusion.event_shape)
    for x, t in zip(states, times, strict=True):
        torch.testing.assert_close(x, trace.nodes[f"x_{t}"]["value"], rtol=1e-12, atol=1e-12)
    assert torch.equal(states[-1], sampler(7, generator=3))
    few = sampler.trajectory(7, times=(T, 0), generator=3)
    assert torch.equal(few, states[[0, -1]])
    assert torch.equal(sampler.trajectory(7, times=torch.tensor([1]), generator=3), states[-2:-1])
    assert not few.is_inference()


def test_ten_or_so_times_are_spread_over_a_long_chain():
    sampler = AncestralSampler(gaussian(T=25))
    every = sampler.trajectory(2, times=range(25, -1, -1), generator=0)
    found = sampler.trajectory(2, generator=0)
    assert torch.equal(found, every[[0, 3, 5, 7, 10, 13, 15, 17, 20, 23, 25]])


def test_a_compiled_trajectory_is_that_of_the_steps_as_they_are():
    diffusion = gaussian()
    eager, compiled = AncestralSampler(diffusion), AncestralSampler(diffusion, compile=True)
    for seed in range(2):
        states = compiled.trajectory(5, generator=seed)
        torch.testing.assert_close(states, eager.trajectory(5, generator=seed), rtol=1e-9, atol=1e-9)
        assert torch.equal(states[-1], compiled(5, generator=seed)) or seed == 0  # the first call traces


@pytest.mark.parametrize(
    "times", [(), (7, 0), (0, -1), (0, 6), (3, 3), (2.0, 1.0), (True, 0), 5, "60", torch.tensor([[6, 0]])]
)
def test_times_that_do_not_go_down_from_the_noise_are_refused(times):
    with pytest.raises(ValueError, match=r"times must be decreasing ints in 0\.\.6, at least one, but they are"):
        AncestralSampler(gaussian(T=6)).trajectory(2, times=times)
