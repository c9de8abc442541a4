"""What all samplers share, over one of each kind; and the ancestral sampler, which draws what the Pyro model draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from computing import COMPILED, SAMPLERS, concrete, small
from exact import far
from loops import same, values
from models import prior_of_weights
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrodiff
from pyrodiff import AncestralSampler, networks

every_sampler = pytest.mark.parametrize("kind", SAMPLERS.values(), ids=SAMPLERS)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# What all share


def test_every_public_sampler_is_among_those_that_are_tested():
    assert concrete(pyrodiff.Sampler) == {type(kind(small())).__name__ for kind in SAMPLERS.values()}


class Told(nn.Module):
    """x_0 is estimated as halfway from x_t to the context."""

    def __init__(self):
        super().__init__()
        self.part, self.calls = nn.Parameter(torch.tensor(0.5).double()), set()

    def forward(self, x_t, t, *context):
        self.calls.add(len(context))
        return self.part * x_t + self.part * sum(context)


@every_sampler
def test_each_sample_has_its_context(kind):
    """One for each sample, or one for all; it reaches the network in each call, and none is refused."""
    diffusion = small(Told(), T=17)
    c = torch.linspace(-3, 3, 6)[:, None].double()
    sampler, network = kind(diffusion, num_steps=5), diffusion.reverse.denoiser
    x = sampler(6, c, generator=1)
    assert network.calls == {1}
    assert bool((x.diff(dim=0) != sampler(6, generator=1).diff(dim=0)).all())
    if kind is not SAMPLERS["predictor-corrector"]:  # where a sample depends on the others, by the norm of the score
        close(x[2], sampler(6, c[2:3], generator=1)[2])
    close(sampler(6, c[2:3], generator=1), sampler(6, c[2:3].expand(6, 1), generator=1))
    with pytest.raises(ValueError, match="context must be left out"):
        kind(small())(3, torch.zeros(3, 1).double())


@every_sampler
def test_steps_may_be_chosen_when_it_is_made_or_called(kind):
    diffusion = small(T=30)
    early, late = kind(diffusion, num_steps=7), kind(diffusion)
    expected = early.trajectory(4, generator=1)
    assert expected.shape == (8, 4, 2)
    assert torch.equal(expected, late.trajectory(4, num_steps=7, generator=1))
    if kind is not SAMPLERS["flow"]:  # whose own steps are others where nothing on the way is asked for
        assert torch.equal(expected[-1], late(4, num_steps=7, generator=1))
        assert torch.equal(expected[-1], early(4, generator=1))
    if kind is not SAMPLERS["Heun, churn"]:  # which asks the whole chain
        few = [kind(diffusion, times=(3, 11, 30)), kind(diffusion.subchain((3, 11, 30)))]
        assert torch.equal(*(sampler(4, generator=1) for sampler in few))
    whole = kind(diffusion)(4, generator=1)
    assert torch.equal(late(4, generator=1), whole)
    assert not torch.equal(whole, expected[-1])


@every_sampler
def test_a_trajectory_is_of_the_states_at_its_times(kind):
    sampler = kind(small(T=6))
    states = sampler.trajectory(7, times=range(6, -1, -1), generator=3)
    assert states.shape == (7, 7, 2)
    assert not states.is_inference()
    assert torch.unique(states, dim=0).shape == states.shape
    tolerance = 1e-3 if kind is SAMPLERS["flow"] else 0  # which has other steps
    close(states[-1], sampler(7, generator=3), tolerance)
    close(sampler.trajectory(7, times=(6, 0), generator=3), states[[0, -1]], tolerance)
    close(sampler.trajectory(7, times=torch.tensor([1]), generator=3), states[-2:-1], tolerance)


@every_sampler
def test_ten_or_so_times_are_spread_over_a_long_chain(kind):
    sampler = kind(small(T=25))
    found = sampler.trajectory(2, generator=0)
    close(found, sampler.trajectory(2, times=(25, 22, 20, 18, 15, 12, 10, 8, 5, 2, 0), generator=0), 0)


@every_sampler
def test_samples_follow_the_seed_and_all_else_is_left_alone(kind):
    diffusion = small()
    sampler, before = kind(diffusion, num_steps=5), values(diffusion)
    pyro.set_rng_seed(7)
    x = sampler(4, generator=1)
    drawn = sampler(4, generator=torch.Generator().manual_seed(1))
    after = torch.rand(2)
    pyro.set_rng_seed(7)
    assert torch.equal(after, torch.rand(2))
    assert drawn.shape == x.shape == (4, 2)
    assert torch.equal(x, sampler(4, generator=1))
    assert not torch.equal(x, sampler(4, generator=2))
    assert not torch.equal(sampler(4), sampler(4))
    assert all(module.training for module in diffusion.modules())
    assert same(values(diffusion), before)
    assert not x.is_inference()  # samples may be trained on
    pair = diffusion.one_step()
    pyrodiff.DiffusionELBO().differentiable_loss(pair.model, pair.guide, x).backward()
    assert diffusion.reverse.denoiser.network.outlet.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", COMPILED.values(), ids=COMPILED)
def test_compiled_steps_are_the_steps_as_they_are(kind, interpreted):
    diffusion = small(T=30)
    compiled, eager = kind(diffusion, compile=True, num_steps=6), kind(diffusion, num_steps=6)
    for seed in range(2):
        close(compiled.trajectory(5, generator=seed), eager.trajectory(5, generator=seed))
    with torch.no_grad():
        diffusion.reverse.denoiser.network.outlet.weight.mul_(2)  # learned on: the graph reads it
    close(compiled(5, generator=1), eager(5, generator=1))
    assert interpreted


def test_what_inductor_makes_of_a_step_draws_the_same():
    """Of one that draws; in few steps, as many times as are wanted."""
    diffusion = small()
    eager, compiled = AncestralSampler(diffusion), AncestralSampler(diffusion, compile=True)
    for seed in range(2):
        states = compiled.trajectory(5, generator=seed)
        close(states, eager.trajectory(5, generator=seed))
        assert torch.equal(states[-1], compiled(5, generator=seed)) or seed == 0  # the first call traces
    assert not torch.equal(compiled(5), compiled(5))


@every_sampler
def test_samples_are_of_the_dtype_of_the_weights(kind):
    x = kind(small(dtype=torch.float32), num_steps=5)(3)
    assert x.dtype == torch.float32
    assert bool(x.isfinite().all())


class Random(PyroModule):
    """A denoiser, or a kernel, with a random weight."""

    def __init__(self, is_kernel=False):
        super().__init__()
        self.w, self.seen, self.is_kernel = PyroSample(dist.Normal(0.0, 1.0)), [], is_kernel

    def forward(self, x_t, t):
        self.seen.append(float(self.w))
        return dist.Normal(x_t * self.w, 0.1).to_event(1) if self.is_kernel else x_t * self.w


@pytest.mark.parametrize("name", SAMPLERS)
def test_random_weights_are_drawn_once_a_call(name):
    """All steps have one value, the next call another; and a graph of them is refused."""
    diffusion, kind = small(Random(), dtype=torch.float32), SAMPLERS[name]
    sampler = kind(diffusion, num_steps=4, guide=prior_of_weights(diffusion))
    denoiser, found = diffusion.reverse.denoiser, []
    for seed in (1, 2):
        denoiser.seen.clear()
        sampler(3, generator=seed)
        assert len(denoiser.seen) >= 4
        (value,) = set(denoiser.seen)
        found.append(value)
    assert found[0] != found[1]
    if name in COMPILED:
        with pytest.raises(ValueError, match="no random weights"):
            kind(diffusion, compile=True)


@pytest.mark.parametrize("kind", COMPILED.values(), ids=COMPILED)
def test_what_is_no_way_to_run_is_refused(kind):
    with pytest.raises(ValueError, match="compile must be one of False, True"):
        kind(small(), compile=1)


# The ancestral sampler


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


DIFFUSIONS = {
    "gaussian": gaussian,
    "one step": lambda: gaussian(T=1),
    "levels": lambda: gaussian(decoder=pyrodiff.DiscretizedDecoder(9)),
    "subchain": lambda: gaussian(T=9).subchain([1, 4, 9]),
    "bits": bits,
}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_states_are_the_sites_of_the_pyro_model(name):
    """In evaluation mode: dropout is off meanwhile."""
    diffusion = DIFFUSIONS[name]()
    T = diffusion.num_steps
    pyro.set_rng_seed(3)
    with torch.no_grad():
        trace = poutine.trace(diffusion.eval().model).get_trace(num_samples=7)
    diffusion.train()
    sampler = AncestralSampler(diffusion)
    states = sampler.trajectory(7, times=range(T, -1, -1), generator=3)
    assert states.shape == (T + 1, 7, *diffusion.event_shape)
    for x, t in zip(states, range(T, -1, -1), strict=True):
        close(x, trace.nodes[f"x_{t}"]["value"], 1e-12)
    assert torch.equal(states[-1], sampler(7, generator=3))
    assert diffusion.training


def test_samples_of_a_random_weight_have_the_spread_of_its_value():
    """x_0 = w^4 x_4 + noise, with the same w for all samples."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    diffusion = pyrodiff.Diffusion(forward, Random(is_kernel=True), (2,))
    sampler = AncestralSampler(diffusion, guide=prior_of_weights(diffusion))
    for seed in range(4):
        x = sampler(2000, generator=seed)
        w = diffusion.reverse.seen[-1]
        assert not far(x.double() ** 2, w**8 + 0.01 * (1 + w**2 + w**4 + w**6))


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
