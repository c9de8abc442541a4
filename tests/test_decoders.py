"""Decoders: what each number is given, and that the chain generates and bounds the sums over levels that it should."""

import math

import cases
import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from cases import TIMES, close, every_decoder
from exact import far, gradient, repeat
from oracles import masses, points, softmax
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrodiff

LEVELS = 5
BETAS = {1: [0.6], 2: [0.3, 0.55], 3: [0.1, 0.3, 0.5]}
SLOPE, OFFSET, VARIANCE = 0.7, 0.25, 0.11  # of each reverse kernel, p(x_{t-1} | x_t) = N(0.7 x_t + 0.25 t, 0.11 t)
every_length = pytest.mark.parametrize("T", sorted(BETAS))


def states(decoder, *shape):
    return (
        cases.coins(*shape) if isinstance(decoder.process, cases.Binomial) else 0.5 * cases.normal(*shape, m=0.8, v=1)
    )


def deviation(law):
    return law.variance.double().sqrt().numpy()


# What every decoder is


@every_decoder
@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_each_number_has_its_probability_or_density(decoder, event_shape):
    """Of a batch, and of particles, whatever the dtype; a draw is of the data, and of the dtype of the state."""
    made, event = decoder.make(decoder.process.make()), len(event_shape)
    for dtype, rtol, batch in (
        (torch.float64, 1e-10, (4,)),
        (torch.float64, 1e-10, (2, 4)),
        (torch.float32, 2e-5, (4,)),
    ):
        x_1 = states(decoder, *batch, *event_shape).to(dtype)
        kernel = decoder.kernel(x_1, event)
        law = made(kernel, x_1)
        assert (law.batch_shape, law.event_shape, made.levels) == (batch, event_shape, decoder.levels)
        x_0 = law.sample()
        assert x_0.dtype == dtype
        made.check(x_0)
        given = x_0.double(), kernel.mean.double().numpy(), deviation(kernel), x_1.double().numpy()
        expected = decoder.log_prob(decoder.process, *given).reshape(*batch, -1).sum(-1)
        close(law.log_prob(x_0).double(), expected, rtol, rtol)


@every_decoder
def test_the_decoder_of_a_shorter_chain_follows_its_first_step(decoder):
    q = decoder.process.make()
    made, x_1 = decoder.make(q), states(decoder, 4, 3)
    kernel = decoder.kernel(x_1)
    for times in TIMES.values():
        sub = q.subchain(times)
        cut = made.subchain(sub)
        assert (type(cut), cut.levels) == (type(made), decoder.levels)
        assert cut is made or cut.forward_process is sub
        law = cut(kernel, x_1)
        x_0 = law.sample()
        expected = decoder.log_prob(decoder.process, x_0, kernel.mean.numpy(), deviation(kernel), x_1.numpy(), times[0])
        close(law.log_prob(x_0), expected.sum(-1), 1e-10, 1e-10)


@every_decoder
def test_copies_states_and_casts_say_the_same(decoder):
    made, x_1 = decoder.make(decoder.process.make()), states(decoder, 4, 3)
    kernel = decoder.kernel(x_1)
    x_0 = made(kernel, x_1).sample()
    casted = [cast(decoder.make(decoder.process.make())) for cast in cases.casts()]
    for one in (*cases.copies(made, decoder.make(decoder.process.make())), *casted):
        assert torch.equal(one(kernel, x_1).log_prob(x_0), made(kernel, x_1).log_prob(x_0))
    assert not [key for key in made.state_dict() if "points" in key]
    assert repr(made).startswith(f"{type(made).__name__}(")
    assert decoder.levels is None or f"levels={decoder.levels}" in repr(made)


@every_decoder
def test_of_levels_the_probabilities_add_up_to_one_and_of_a_density_any_data_are_taken(decoder):
    made, x_1 = decoder.make(decoder.process.make()), states(decoder, 4, 3)
    if decoder.levels is None:
        made.check(torch.full((2, 3), 0.013))
        made.check_kind(torch.zeros(2, dtype=torch.long))
        return
    law = made(decoder.kernel(x_1), x_1)
    each = torch.from_numpy(points(decoder.levels))[:, None, None].expand(-1, 4, 3)
    close(law.base_dist.log_prob(each).exp().sum(0), np.ones((4, 3)), rtol=1e-11)
    cases.refused(lambda: made.check(torch.full((2, 3), 0.013)), "x_0", f"{decoder.levels} levels", "0.013")
    cases.refused(lambda: made.check_kind(torch.zeros(2, dtype=torch.long)), "x_0", "torch.int64")


# Chains over levels


class Kernel(nn.Module):
    """The reverse process of constant slope, for one number a datum."""

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype)
        return dist.Normal(SLOPE * x_t + OFFSET * t, (VARIANCE * t).sqrt().expand(x_t.shape))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x_t, t):
        return self.weight * x_t


def data(levels=LEVELS, copies=1):
    """All levels, so many times."""
    return torch.from_numpy(points(levels)).repeat(copies)


def last_step(name, T):
    """p(v_k | x_1) as a function of x_1."""
    if name == "discretized":
        return lambda x_1: masses(SLOPE * x_1 + OFFSET, math.sqrt(VARIANCE), LEVELS)
    (gain, variance), *_ = oracles.preserving_steps(BETAS[T])
    return lambda x_1: softmax(x_1, gain, variance, LEVELS)


def diffusion(name, T, reverse=None):
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS[T]))
    decoder = {
        "discretized": lambda: pyrodiff.DiscretizedDecoder(LEVELS),
        "softmax": lambda: pyrodiff.SoftmaxDecoder(forward, LEVELS),
    }[name]()
    return pyrodiff.Diffusion(forward, Kernel() if reverse is None else reverse, (), decoder=decoder)


def normal_mean(function, mean, variance):
    """E f(x) for x ~ N(mean, variance), by quadrature; f returns an array along a new last dimension."""
    nodes = np.linspace(-9, 9, 801)
    weights = np.exp(-(nodes**2) / 2)
    return (weights / weights.sum()) @ function(mean + math.sqrt(variance) * nodes)


def generated(name, T):
    """p(v_k) of each level: x_1 is normal, since every kernel is linear, and then quadrature."""
    mean, variance = 0.0, 1.0
    for t in range(T, 1, -1):
        mean, variance = SLOPE * mean + OFFSET * t, SLOPE**2 * variance + VARIANCE * t
    return normal_mean(last_step(name, T), mean, variance)


def terms(name, T):
    """L_T, the sum of L_{t-1} and L_0 of each level, exactly: KLs of normal laws, and quadrature."""
    moments, v = oracles.moments(oracles.preserving_steps(BETAS[T])), points(LEVELS)
    gain, variance = moments[T]
    prior, denoising = oracles.normal_kl(gain * v, variance, 0.0, 1.0), 0.0
    for t in range(2, T + 1):
        (gain_s, variance_s), (gain_t, variance_t) = moments[t - 1], moments[t]
        step_gain, step_variance = oracles.preserving_steps(BETAS[T])[t - 1]
        for noise in (-1.0, 1.0):  # a KL of normal laws is quadratic in the noise, so these two give its mean
            x_t = gain_t * v + math.sqrt(variance_t) * noise
            mean, posterior = oracles.condition(gain_s * v, variance_s, step_gain, step_variance, x_t)
            denoising = denoising + oracles.normal_kl(mean, posterior, SLOPE * x_t + OFFSET * t, VARIANCE * t) / 2
    gain, variance = moments[1]
    costs = lambda x_1: -np.log(last_step(name, T)(x_1))  # noqa: E731
    reconstruction = [normal_mean(costs, gain * v[k], variance)[k] for k in range(LEVELS)]
    return prior, denoising + 0 * v, np.array(reconstruction)


every_name = pytest.mark.parametrize("name", ["discretized", "softmax"])


@every_name
@every_length
def test_the_exact_probabilities_of_all_levels_add_up_to_one(name, T):
    p = generated(name, T)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p.min() > 1e-3
    if name == "discretized" and T == 1:  # a normal law of a normal mean is normal: quadrature against closed form
        np.testing.assert_allclose(p, masses(OFFSET, math.sqrt(SLOPE**2 + VARIANCE), LEVELS), rtol=1e-9)
    assert (sum(terms(name, T)) + np.log(p) > 0).all()  # the bound is above


@every_name
@every_length
def test_generated_data_are_levels_with_their_probabilities(name, T):
    x_0 = diffusion(name, T).model(num_samples=40_000).double()
    drawn = (x_0[:, None] - data()).abs() < 1e-6
    assert (drawn.sum(-1) == 1).all()
    assert not far(drawn.double(), torch.from_numpy(generated(name, T)))


@every_name
@every_length
def test_terms_of_the_bound_are_those_of_quadrature(name, T):
    pair, x_0 = diffusion(name, T), data(copies=8000)
    bound = pyrodiff.bound(pair, x_0)
    prior, denoising, reconstruction = (torch.from_numpy(term) for term in terms(name, T))
    torch.testing.assert_close(bound.prior.reshape(-1, LEVELS), prior.expand(8000, LEVELS))
    assert not far(bound.denoising.sum(0).reshape(-1, LEVELS), denoising)
    assert not far(bound.reconstruction.reshape(-1, LEVELS), reconstruction)
    nats = bound.nats.reshape(-1, LEVELS)
    assert not far(nats, prior + denoising + reconstruction)
    above = nats.mean(0) + 5 * nats.std(0) / 8000**0.5
    assert (above > -torch.from_numpy(generated(name, T)).log()).all()


@every_name
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, pyrodiff.DiffusionELBO])
def test_both_pairs_have_the_bound_of_quadrature(name, elbo):
    chain, x_0 = diffusion(name, 2), data(copies=200)
    expected = 200 * sum(term.sum() for term in terms(name, 2))
    for pair in (chain, chain.one_step(), chain.one_step(pyrodiff.UniformDrawing())):
        assert not far(repeat(30, lambda pair=pair: elbo().loss(pair.model, pair.guide, x_0)), expected)


def test_vectorised_particles_are_decoded_too():
    chain, x_0 = diffusion("discretized", 2), data(copies=4)
    elbo = TraceMeanField_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    expected = 4 * sum(term.sum() for term in terms("discretized", 2))
    assert not far(repeat(40, lambda: elbo.loss(chain.model, chain.guide, x_0)), expected)


def test_a_network_far_off_still_gets_a_finite_gradient():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(3))
    for output in (-1e3, 1e3):
        network = Network()
        network.weight.data.fill_(output)
        reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(network, forward))
        chain = pyrodiff.Diffusion(forward, reverse, (2,), decoder=pyrodiff.DiscretizedDecoder(17))
        pair, x_0 = chain.one_step(), pyrodiff.from_levels(torch.tensor([[0, 16], [3, 12], [8, 9]]), 17)
        for programs in (chain, pair):
            loss = pyrodiff.DiffusionELBO().differentiable_loss(programs.model, programs.guide, x_0)
            slope = gradient(loss, network)
            assert loss.isfinite()
            assert slope.isfinite().all()
            assert slope.sign() == math.copysign(1, output)  # downhill is back towards the data


# One of them


def test_the_softmax_costs_nothing_where_the_noise_is_below_half_a_bin_and_something_where_it_is_not():
    for share, low, high in ((0.1, 0.0, 1e-4), (0.5, 0.1, 0.6), (4.0, 1.5, 3.0)):  # b_1 / a_1 over half a bin
        forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(2, share / 16, 40.0))
        chain = pyrodiff.Diffusion(forward, Kernel(), (), decoder=pyrodiff.SoftmaxDecoder(forward, 17))
        cost = pyrodiff.bound(chain, data(17, 400)).reconstruction.mean()
        inner = points(17) / (share / 16)
        draws = inner[8] + np.linspace(-8, 8, 4001)
        density = np.exp(-0.5 * (draws - inner[8]) ** 2)
        logits = -0.5 * (draws[:, None] - inner) ** 2
        log_p = logits[:, 8] - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
        assert low <= cost <= high
        if share < 1:  # of a level in the middle, by quadrature; 15 of 17 are like it
            assert cost == pytest.approx(-(density @ log_p) / density.sum(), rel=0.12, abs=1e-6)


def test_more_levels_than_the_data_have_take_the_mass():
    mean, deviation = np.array([0.3, -0.5, 0.0]), np.array([0.2, 0.04, 1.0])
    own, every = data(17), np.arange(0, 257, 16)
    fine = masses(mean, deviation, 257)
    kernel = dist.Normal(torch.from_numpy(mean), torch.from_numpy(deviation))
    for levels, expected in ((257, fine[:, every].sum(-1)), (17, np.ones(3))):
        law = pyrodiff.DiscretizedDecoder(levels)(kernel, torch.zeros(3, dtype=torch.float64))
        mass = law.log_prob(own[:, None]).exp().sum(0)
        np.testing.assert_allclose(mass.numpy(), expected, rtol=1e-11)
    inside = fine[:2, every].sum(-1)
    assert (inside < 0.1).all()  # about one in sixteen: the rest goes to levels that never occur


def test_the_gaussian_decoder_is_the_kernel():
    x_1 = cases.normal(6, 3)
    kernel = dist.Normal(x_1, 1.0).to_event(1)
    assert pyrodiff.GaussianDecoder()(kernel, x_1) is kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_decoder_follows_its_diffusion_to_another_dtype(dtype):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(Network(), forward))
    chain = pyrodiff.Diffusion(forward, reverse, (2,), decoder=pyrodiff.SoftmaxDecoder(forward, 256)).to(dtype)
    x_0 = chain.model(num_samples=50)
    assert x_0.dtype == dtype
    assert pyrodiff.Levels(256).check(x_0).all()
    assert pyrodiff.bound(chain, x_0).nats.dtype == dtype


# bad input

Q = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4))
REVERSE = pyrodiff.GaussianReverse(Q, pyrodiff.NoisePrediction(Network(), Q))
GOOD = pyrodiff.from_levels(torch.tensor([[0, 3], [16, 8], [5, 1]]), 17)


def programs(decoder):
    chain = pyrodiff.Diffusion(Q, REVERSE, (2,), decoder=decoder)
    pair = chain.one_step()
    return {
        "model": chain.model,
        "one-step model": pair.model,
        "bound": lambda x_0: pyrodiff.bound(chain, x_0),
    }


def test_seventeen_levels_are_no_256_levels():
    for call in programs(pyrodiff.DiscretizedDecoder(256)).values():
        with pytest.raises(ValueError, match="x_0 must be one of 256 levels"):
            call(GOOD)
    for call in programs(pyrodiff.DiscretizedDecoder(257)).values():  # but they are, by chance, 257
        call(GOOD)
