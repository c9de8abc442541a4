"""A diffusion times a factor: exact where the backward message is, and what r at every t makes of it."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import bit_diffusion, far, gaussian_diffusion
from torch import nn

import pyrodiff
from pyrodiff import Inpainting, Linear, RepeatedTwist, perturbed, posterior, product

M, V = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64), torch.tensor([0.5, 2.0, 0.2], dtype=torch.float64)
A = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([2.5, -1.0], dtype=torch.float64)
NOISE = torch.tensor([0.3, 0.05], dtype=torch.float64)
SCHEDULES = {
    "vp": pyrodiff.LogSNRSchedule(12),
    "ve": pyrodiff.GeometricSchedule(12, 0.05, 20.0),
    "one step": pyrodiff.BetaSchedule([0.7]),
}


def close(actual, expected, atol=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def path(diffusion, n):
    """Data of a chain, and log p of all of their path, with the law of each state asked one by one."""
    law = diffusion.model.top(torch.float64).expand((n,))
    states = [law.sample()]
    for t in range(diffusion.num_steps, 0, -1):
        states.append(diffusion.model.kernel(states[-1], torch.full((n,), t)).sample())
    return states


def log_p(diffusion, states):
    total = diffusion.model.top(torch.float64).log_prob(states[0])
    for t, x_t, x_s in zip(range(diffusion.num_steps, 0, -1), states[:-1], states[1:], strict=True):
        total = total + diffusion.model.kernel(x_t, torch.full((len(x_t),), t)).log_prob(x_s)
    return total


# Gaussians


def truth():
    """The law of N(M, V) given Y = A x_0 + N(0, NOISE²), and the log evidence."""
    precision = torch.diag(1 / V) + A.T @ torch.diag(1 / NOISE**2) @ A
    covariance = precision.inverse()
    mean = covariance @ (M / V + A.T @ (Y / NOISE**2))
    evidence = dist.MultivariateNormal(A @ M, A @ torch.diag(V) @ A.T + torch.diag(NOISE**2)).log_prob(Y)
    return dist.MultivariateNormal(mean, covariance), evidence


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_of_every_path_the_product_is_the_chain_times_the_factor(schedule, shift):
    """Also of kernels that are no data's: the messages are the chain's own."""
    diffusion, observation = gaussian_diffusion(schedule, M, V, shift=shift, widen=1 + shift), Linear(A, Y, NOISE)
    found = product(diffusion, observation)
    with torch.no_grad():
        states = path(diffusion, 50)
        ratio = log_p(found.diffusion, states) - log_p(diffusion, states)
        close(ratio, observation(states[-1]).log_prob(Y) - found.log_evidence)
    if not shift:
        close(found.log_evidence, truth()[1])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_of_exact_kernels_each_trajectory_has_the_posteriors_density_and_the_bound_its_mean(schedule):
    """Since then p(x_0:T) is p(x_0) q(x_1:T | x_0). The bound's terms come of rows of all t in one call."""
    found, law = product(gaussian_diffusion(schedule, M, V), Linear(A, Y, NOISE)), truth()[0]
    torch.manual_seed(0)
    x_0 = law.sample((3,))
    weights = pyrodiff.importance_bound(found.diffusion, x_0, num_particles=4, generator=0).log_weights
    close(weights, law.log_prob(x_0).expand(4, 3), atol=1e-7)
    costs = pyrodiff.bound(found.diffusion, x_0.repeat(2000, 1), generator=0).nats.view(2000, 3)
    assert not far(costs, -law.log_prob(x_0))


def test_the_product_is_sampled_as_any_diffusion():
    found, law = product(gaussian_diffusion(SCHEDULES["vp"], M, V), Linear(A, Y, NOISE)), truth()[0]
    for draw in (found.diffusion.model, pyrodiff.AncestralSampler(found.diffusion)):
        torch.manual_seed(1)
        x_0 = draw(num_samples=4000)
        assert not far(x_0, law.mean)
        off = x_0 - law.mean
        assert not far(off[:, :, None] * off[:, None], law.covariance_matrix)


class Labelled(nn.Module):
    """E[x_0 | x_t] of N(c, V), for a context c."""

    def __init__(self, forward):
        super().__init__()
        self.forward_process, self.scale = forward, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t, t, c):
        a, b = self.forward_process.scales(x_t, t)
        return self.scale * (c + a * V / (a**2 * V + b**2) * (x_t - a * c))


def labelled():
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(20))
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Labelled(forward)), (3,))


def test_evidence_and_mean_given_a_context_are_those_of_weighted_particles():
    diffusion, c, observation = labelled(), torch.tensor([[0.5, 0.2, -0.3]], dtype=torch.float64), Linear(A, Y, 0.7)
    found = product(diffusion, observation, c)
    weighed = posterior(diffusion, observation, c, num_particles=4000, num_islands=100, generator=0)
    assert not far((weighed.islands - found.log_evidence).exp(), 1.0)
    torch.manual_seed(0)
    x_0 = found.diffusion.model(num_samples=4000)
    error = (x_0.var(0) / 4000 * 2).sqrt()
    assert bool(((x_0.mean(0) - weighed.mean).abs() < 5 * error).all())


def test_the_product_is_of_the_diffusion_as_it_was():
    diffusion, c = labelled(), torch.zeros(1, 3, dtype=torch.float64)
    found, x = product(diffusion, Linear(A, Y, NOISE), c), torch.ones(2, 3, dtype=torch.float64)
    before = found.diffusion.model.kernel(x, 5).mean
    diffusion.reverse.denoiser.scale.data.fill_(0.1)
    close(found.diffusion.model.kernel(x, 5).mean, before)
    assert not any(parameter.requires_grad for parameter in found.diffusion.parameters())
    other = product(diffusion, Linear(A, Y, NOISE), c)
    assert not torch.allclose(other.diffusion.model.kernel(x, 5).mean, before)


def test_a_picture():
    torch.manual_seed(3)
    m, v = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64) + 0.5
    mask = torch.tensor([[True, False], [False, True]])
    found = product(gaussian_diffusion(SCHEDULES["vp"], m, v), Inpainting(mask, torch.ones_like(m), noise=0.4))
    x_0 = found.diffusion.model(num_samples=3)
    mean = torch.where(mask, (m / v + 1 / 0.16) / (1 / v + 1 / 0.16), m)
    law = dist.Normal(mean, torch.where(mask, 1 / (1 / v + 1 / 0.16), v).sqrt()).to_event(2)
    weights = pyrodiff.importance_bound(found.diffusion, x_0, num_particles=2, generator=0).log_weights
    close(weights, law.log_prob(x_0).expand(2, 3), atol=1e-7)


# Bits


BITS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)


def bits():
    torch.manual_seed(7)
    return bit_diffusion([0.2, 0.3, 0.4], 0.3, 3)


def marginal(diffusion):
    """p(x_0) of each state, by sums over all paths."""
    with torch.no_grad():
        p = diffusion.model.top(torch.float64).log_prob(BITS).exp()
        for t in range(diffusion.num_steps, 0, -1):
            law = diffusion.model.kernel(BITS, torch.full((8,), t))
            p = p @ torch.stack([law.log_prob(to.expand(8, 3)) for to in BITS], 1).exp()
    return p


def noisy(x_0):
    return dist.Bernoulli(0.1 + 0.8 * x_0).to_event(1)


def ends(x_0):
    with pyro.plate("data", len(x_0)):
        pyro.factor("ends", -2.0 * (x_0[:, 0] - x_0[:, 2]).abs() + x_0[:, 1])


@pytest.mark.parametrize("kind", ["known", "noisy", "factor"])
def test_bits_times_a_factor_are_as_enumerated(kind):
    diffusion, y = bits(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    observation, obs, r = {
        "known": (Inpainting(mask, y), None, (BITS[:, mask] == y[mask]).all(1).double()),
        "noisy": (noisy, y, (0.1 + 0.8 * (BITS == y).double()).prod(1)),
        "factor": (ends, None, (-2 * (BITS[:, 0] - BITS[:, 2]).abs() + BITS[:, 1]).exp()),
    }[kind]
    found, p = product(diffusion, observation, obs=obs), marginal(diffusion)
    close(found.log_evidence.exp(), p @ r, atol=1e-14)
    close(marginal(found.diffusion), p * r / (p @ r), atol=1e-14)
    torch.manual_seed(0)
    x_0 = found.diffusion.model(num_samples=4000)
    shares = (x_0[:, None] == BITS).all(-1).double()
    assert not far(shares, p * r / (p @ r))
    bounds = pyrodiff.bound(found.diffusion, BITS[r > 0], num_particles=4, generator=0).nats
    assert bool((bounds.isfinite()).all())


# What 2015 did


def recipe(T, m=0.7, v=0.5, y=-0.6, noise=0.3):
    """Mean and deviation of the chain of N(m, v) with each kernel multiplied by N(y; x, noise²), by hand."""
    schedule = pyrodiff.LogSNRSchedule(T)
    mean, variance = None, None
    for s in range(T, -1, -1):
        a_s, b_s = schedule.scales(s).tolist() if s else (1.0, 0.0)
        spread = a_s**2 * v + b_s**2  # of x_s
        if mean is None:
            slope, start, own = 0.0, a_s * m, spread
            mean, variance = 0.0, 0.0
        else:
            a_t, b_t = schedule.scales(s + 1).tolist()
            slope = a_t / a_s * spread / (a_t**2 * v + b_t**2)
            start = a_s * m - slope * a_t * m
            own = spread - slope * a_t / a_s * spread
        gain = own / (own + noise**2)
        mean = (1 - gain) * (slope * mean + start) + gain * y
        variance = (1 - gain) ** 2 * slope**2 * variance + (1 - gain) * own
    return mean, math.sqrt(variance)


def one_number(T):
    diffusion = gaussian_diffusion(pyrodiff.LogSNRSchedule(T), M[:1], V[:1])
    return diffusion, Linear(torch.eye(1, dtype=torch.float64), torch.tensor([-0.6], dtype=torch.float64), 0.3)


def test_the_factor_at_every_step_is_not_the_product_however_many_steps():
    """The product has mean -.4017 and deviation .2762: precision 2 + 1 / .09, and (2 * .7 - .6 / .09) / that."""
    mean, deviation = (1.4 - 0.6 / 0.09) / (2 + 1 / 0.09), (2 + 1 / 0.09) ** -0.5
    close([mean, deviation], [-0.4017, 0.2762], atol=5e-5)
    close(recipe(10000), [-0.433, 0.200], atol=2e-3)
    for T in (10, 100, 1000, 10000):
        assert recipe(T)[1] < deviation - 0.04
        assert recipe(T)[0] < mean - 0.02
    diffusion, observation = one_number(30)
    x_0 = perturbed(diffusion, observation, num_samples=20000, generator=0)
    assert not far(x_0, recipe(30)[0])
    assert not far((x_0 - recipe(30)[0]) ** 2, recipe(30)[1] ** 2)
    assert far((x_0 - recipe(30)[0]) ** 2, deviation**2)
    found = product(diffusion, observation).diffusion
    torch.manual_seed(0)
    x_0 = found.model(num_samples=20000)
    assert not far(x_0, mean)
    assert not far((x_0 - mean) ** 2, deviation**2)


def test_weights_make_the_factor_at_every_step_good():
    """Where its noise is more than that of x_T, so that the weights have a variance."""
    diffusion = one_number(10)[0]
    observation = Linear(torch.eye(1, dtype=torch.float64), torch.tensor([-0.6], dtype=torch.float64), 1.5)
    twist = RepeatedTwist()
    found = posterior(diffusion, observation, num_particles=20000, num_islands=400, twist=twist, generator=0)
    evidence = dist.Normal(0.7, (0.5 + 2.25) ** 0.5).log_prob(torch.tensor(-0.6, dtype=torch.float64))
    assert not far((found.islands - evidence).exp(), 1.0)
    assert abs(float(found.mean) - (1.4 - 0.6 / 2.25) / (2 + 1 / 2.25)) < 0.02


def test_weights_without_a_variance_are_told_by_their_tail():
    """Those of x_T under r(x_T) p(x_T) have the tail 1 - q for q, the part of its variance that the factor leaves."""
    diffusion, observation = one_number(2)
    q = 0.09 / 1.09
    with pytest.warns(UserWarning, match="Pareto k of the weights is .*, above 0.7, with RepeatedTwist"):
        found = posterior(
            diffusion, observation, num_particles=20000, num_islands=1, twist=RepeatedTwist(), generator=0
        )
    assert abs(float(found.pareto_k) - (1 - q)) < 0.15
    assert "Pareto k, the largest" in str(found)
    few = posterior(diffusion, observation, num_particles=20, num_islands=1, generator=0)
    assert math.isnan(float(few.pareto_k))
    assert "Pareto" not in str(few)


def test_guidance_by_tweedies_moments_is_exact_for_gaussian_data():
    diffusion, law = gaussian_diffusion(SCHEDULES["vp"], M, V), truth()[0]
    x_0 = perturbed(diffusion, Linear(A, Y, NOISE), num_samples=4000, twist=pyrodiff.GaussianTwist(), generator=0)
    assert not far(x_0, law.mean)


# Bad input


def refused(match, *args, call=product, **options):
    with pytest.raises(ValueError, match=match):
        call(*args, **options)


def test_what_has_no_product_in_closed_form_is_refused():
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(5))
    network = pyrodiff.networks.MLP(event_shape=(3,)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    curved = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, network), (3,))
    linear = Linear(A, Y, NOISE)
    refused("mean is affine in x_t, of one variance at each t, .* give posterior", curved, linear)

    def never(x_0):
        return dist.Delta(x_0[:, 0] * 0.0)

    refused("observation must be possible somewhere", bits(), never, obs=torch.ones((), dtype=torch.float64))


def test_a_perturbed_chain_must_know_of_the_observation():
    class Idle(pyrodiff.Twist):
        def log_prob(self, given, x_t, t, *context):
            return torch.zeros(len(x_t))

    exact, linear = gaussian_diffusion(SCHEDULES["vp"], M, V), Linear(A, Y, NOISE)
    refused("twist must have a proposal of its own .* Idle", exact, linear, call=perturbed, twist=Idle())
