"""Samples and evidence given an observation, against closed forms, enumeration and the chain's own draws."""

import itertools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import BitTable, EightGaussians, bit_diffusion, far, gaussian_diffusion
from torch import nn

import pyrodiff
from pyrodiff import (
    DenoiserTwist,
    GaussianTwist,
    Inpainting,
    IsotropicTwist,
    Linear,
    Twist,
    posterior,
)
from pyrodiff.inference import particles, proposals

M, V = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64), torch.tensor([0.5, 2.0, 0.2], dtype=torch.float64)
A = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([2.5, -1.0], dtype=torch.float64)
NOISE = torch.tensor([0.3, 0.05], dtype=torch.float64)
SCHEDULES = {"vp": pyrodiff.LogSNRSchedule(12), "ve": pyrodiff.GeometricSchedule(12, 0.05, 20.0)}
SCHEDULES["one step"] = pyrodiff.BetaSchedule([0.7])
ROOT = pyrodiff.LogSNRSchedule(60)


def close(actual, expected, atol=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# Gaussian data, exact kernels: everything is known


def truth():
    """Mean, covariance and log evidence of N(M, V) given Y = A x_0 + N(0, NOISE²), by the precisions."""
    precision = torch.diag(1 / V) + A.T @ torch.diag(1 / NOISE**2) @ A
    covariance = precision.inverse()
    mean = covariance @ (M / V + A.T @ (Y / NOISE**2))
    evidence = dist.MultivariateNormal(A @ M, A @ torch.diag(V) @ A.T + torch.diag(NOISE**2)).log_prob(Y)
    return mean, covariance, evidence


def observations():
    def law(x_0):
        return dist.Normal(x_0 @ A.T + 0.25, NOISE).to_event(1)

    def full(x_0):
        return dist.MultivariateNormal(x_0 @ A.T, torch.diag(NOISE**2))

    return {
        "matrix": (Linear(A, Y, NOISE), None),
        "function": (Linear(lambda x: x @ A.T, Y, NOISE), None),
        "law": (law, Y + 0.25),  # with a constant
        "full": (full, Y),
    }


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", observations())
def test_all_weights_are_equal_and_the_evidence_is_exact_for_gaussian_data(schedule, name):
    observation, obs = observations()[name]
    found = posterior(gaussian_diffusion(schedule, M, V), observation, obs=obs, num_particles=400, generator=0)
    mean, covariance, evidence = truth()
    close(found.log_evidence, evidence)
    close(found.standard_error, 0.0)
    close(found.effective_sample_size, torch.full((schedule.num_steps + 1,), 400.0, dtype=torch.float64), atol=1e-6)
    close(found.pareto_k, 0.0)
    assert not far(found.samples, mean)
    off = found.samples - mean
    assert not far(off[:, :, None] * off[:, None], covariance)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_proposals_composed_have_the_posterior_s_mean_and_covariance(schedule):
    """Each is an affine map of the state before and noise: read off at 0 and at the basis, and put together."""
    diffusion, twist = gaussian_diffusion(schedule, M, V), GaussianTwist()
    given, points = pyrodiff.Conditioned(diffusion, Linear(A, Y, NOISE)), torch.zeros(4, 3, dtype=torch.float64)
    points[1:] = torch.eye(3)
    mean, covariance = None, None
    for s in range(schedule.num_steps, -1, -1):
        with torch.no_grad():
            if mean is None:
                law = diffusion.model.top(torch.float64).expand((4,))
            else:
                law = diffusion.model.kernel(points, torch.full((4,), s + 1))
            q = twist.proposal(given, law, s, points)
        kernel = law.base_dist.variance[0].diag()
        own = kernel - q.gain[0] @ torch.cholesky_solve(q.gain[0].T, q.of_G[0])
        if mean is None:
            mean, covariance = q.mean[0], own
            continue
        slope = (q.mean[1:] - q.mean[0]).T
        mean, covariance = q.mean[0] + slope @ mean, slope @ covariance @ slope.T + own
    close(mean, truth()[0])
    close(covariance, truth()[1])


def test_a_picture_at_half_the_resolution():
    torch.manual_seed(2)
    m, v = torch.randn(4, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64) + 0.5
    y = torch.randn(2, 2, dtype=torch.float64)

    def smaller(x_0):
        return nn.functional.avg_pool2d(x_0[:, None], 2)[:, 0]

    diffusion = gaussian_diffusion(SCHEDULES["vp"], m, v)
    found = posterior(diffusion, Linear(smaller, y, 0.2), num_particles=800, generator=0)
    spread = smaller(v[None])[0] / 4 + 0.04  # the mean of four
    off = y - smaller(m[None])[0]
    close(found.log_evidence, dist.Normal(0.0, spread.sqrt()).log_prob(off).sum())
    moved = (off / spread).repeat_interleave(2, 0).repeat_interleave(2, 1) / 4 * v
    assert not far(found.samples, m + moved)


def test_a_proposal_is_the_kernel_times_the_twist():
    torch.manual_seed(0)
    mu, sigma = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64) + 0.5
    H, L = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 2, dtype=torch.float64)
    S, off = L @ L.mT + 0.1 * torch.eye(2), torch.randn(5, 2, dtype=torch.float64)
    q = proposals.Updated(dist.Normal(mu, sigma).to_event(1), off, H, S)
    covariance = (torch.diag_embed(sigma**-2) + H.mT @ S.inverse() @ H).inverse()
    mean = mu + (covariance @ H.mT @ S.inverse() @ off[..., None])[..., 0]
    expected = torch.distributions.MultivariateNormal(mean, covariance)
    x = torch.randn(5, 3, dtype=torch.float64)
    close(q.log_prob(x), expected.log_prob(x))
    close(q.mean, mean)
    many = dist.Normal(mu.repeat(20000, 1), sigma.repeat(20000, 1)).to_event(1)
    rows = off.repeat(20000, 1), *(each.repeat(20000, 1, 1) for each in (H, S))
    draws = proposals.Updated(many, *rows).sample().view(20000, 5, 3)
    assert not far(draws, mean)
    centred = draws - mean
    assert not far(centred[..., :, None] * centred[..., None, :], covariance)


def test_the_naive_proposal_is_moved_up_the_twist():
    """Of affine estimates the gradient is J' A' R^-1 (y - A x_0)."""
    diffusion = gaussian_diffusion(pyrodiff.LogSNRSchedule(12), M, V)
    given, x = pyrodiff.Conditioned(diffusion, Linear(A, Y, NOISE)), torch.randn(4, 3, dtype=torch.float64)
    for s in (7, 0):
        with torch.no_grad():
            law = diffusion.model.kernel(x, torch.full((4,), s + 1))
            q = DenoiserTwist().proposal(given, law, s, x)
            times = torch.full((4,), s)
            estimate = given.estimate(law.mean, times) if s else law.mean
            a, b = given.scales(s)
            J = a * V / (a**2 * V + b**2) if s else torch.ones(3)
        close(q.mean, law.mean + law.variance * J * (((Y - estimate @ A.T) / NOISE**2) @ A))
        close(q.variance, law.variance)


def test_a_covariance_that_is_negative_counts_as_none():
    class Falling(nn.Module):
        def forward(self, x_t, t):
            return x_t * torch.tensor([-1.0, 2.0], dtype=torch.float64)

    forward = pyrodiff.GaussianForward(ROOT)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Falling()), (2,))
    observation = Linear(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.5)
    given, x = pyrodiff.Conditioned(diffusion, observation), torch.ones(1, 2, dtype=torch.float64)
    o, H, S = GaussianTwist().moments(given, given.linear, x, torch.tensor([30]))
    a, b = given.scales(30)
    close(o, torch.tensor([[-1.0, 2.0]]))
    close(H[0], torch.tensor([[-1.0, 0.0], [0.0, 2.0]]))
    close(S[0], torch.tensor([[0.25, 0.0], [0.0, 0.25 + 2 * b**2 / a]], dtype=torch.float64))


def test_an_island_is_resampled_below_half_its_particles_and_each_as_often_as_it_weighs():
    weights = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.01, 0.01, 0.97, 0.01], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    log_w, psi = (3 * weights).log(), torch.arange(12.0, dtype=torch.float64).view(3, 4)
    torch.manual_seed(0)
    x, psi, after = particles.resampled(torch.arange(12)[:, None], psi, log_w)  # sizes 2.94, 1.06, 1.92
    assert x[:4, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(after[0], log_w[0])
    assert (x[4:8] == 6).sum() >= 3
    assert torch.equal(psi.flatten(), x[:, 0].double())
    close(after[1:], torch.full((2, 4), math.log(0.75), dtype=torch.float64))
    log_w = torch.rand(5000, 3, dtype=torch.float64).log()[:1].expand(5000, 3)
    counts = torch.stack([(particles.systematic(log_w, 10) == k).sum(1) for k in range(3)], 1).double()
    expected = 10 * log_w[0].softmax(0)
    assert bool(((counts - expected).abs() < 1).all())  # which is what systematic means
    assert not far(counts, expected)


def test_other_twists_are_unbiased_on_gaussian_data():
    evidence = truth()[2]
    observation = Linear(A, Y, torch.tensor([0.3, 0.4], dtype=torch.float64))
    evidence = dist.MultivariateNormal(A @ M, A @ torch.diag(V) @ A.T + torch.diag(observation.noise**2)).log_prob(Y)
    diffusion = gaussian_diffusion(pyrodiff.LogSNRSchedule(12), M, V)
    for twist in (IsotropicTwist(), Prior(), Wide()):
        found = posterior(diffusion, observation, num_particles=12000, num_islands=600, twist=twist, generator=1)
        assert not far((found.islands - evidence).exp(), 1.0), type(twist).__name__


class Prior(Twist):
    """Knows nothing."""

    def log_prob(self, given, x_t, t, *context):
        return torch.zeros(len(x_t), dtype=x_t.dtype)


class Wide(GaussianTwist):
    """Weighs as it should, and draws from a wider law than the kernel."""

    def proposal(self, given, law, s, x_t, *context):
        base = super().proposal(given, law, s, x_t, *context)
        return dist.Normal(base.mean, 1.3 * law.base_dist.stddev).to_event(1)


# Mixtures


class Mixture(EightGaussians):
    """Gaussians of one variance around given centres, all as likely."""

    def __init__(self, schedule, centers, variance):
        super().__init__(schedule)
        self.centers, self.variance = centers, variance


def mixture(centers, variance):
    forward = pyrodiff.GaussianForward(ROOT)
    denoiser = Mixture(ROOT, centers, variance)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), centers.shape[1:])


def eight():
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    return mixture(1.4 * torch.stack([angle.cos(), angle.sin()], -1), 0.05)


FIRST = Inpainting(torch.tensor([True, False]), torch.tensor([1.0, 0.0], dtype=torch.float64), noise=0.1)


def drawn(diffusion, number):
    """Data of the chain."""
    with torch.no_grad():
        x = diffusion.model.top(torch.float64).expand((number,)).sample()
        for t in range(diffusion.num_steps, 0, -1):
            kernel = diffusion.model.kernel(x, torch.full((number,), t))
            x = (diffusion.model.decoded(kernel, x) if t == 1 else kernel).sample()
    return x


def own_evidence(diffusion, observation, number):
    """p(y) of the chain, as many draws of p(y | x_0)."""
    x = drawn(diffusion, number)
    return observation(x).log_prob(observation.obs).exp()


def test_eight_gaussians_by_sixteen_particles():
    found = posterior(eight(), FIRST, num_particles=480, num_islands=30, generator=0)
    each = found.islands
    torch.manual_seed(0)
    draws = own_evidence(eight(), FIRST, 40000)
    assert abs(float(each.mean() - draws.mean().log())) < 0.05
    assert abs(float(each.mean()) + 0.795) < 0.05
    assert float(each.std()) < 0.15
    assert float(found.effective_sample_size.min()) > 0.8 * 480
    assert not far(draws - found.log_evidence.exp(), 0.0)
    right = found.log_weights.softmax(0)[found.samples[:, 1].abs() < 0.4].sum()  # the modes (1.4, 0), (.99, ±.99)
    assert 0.01 < float(right) < 0.2


def test_the_naive_twist_collapses_and_says_so():
    with pytest.warns(UserWarning, match="effective sample size collapsed, with DenoiserTwist"):
        found = posterior(eight(), FIRST, num_particles=64, twist=DenoiserTwist(), generator=0)
    assert float(found.log_evidence) < -3


def test_a_twist_that_knows_nothing_collapses_and_says_so():
    sharp = Inpainting(FIRST.mask, FIRST.values, noise=0.003)
    with pytest.warns(UserWarning, match="collapsed, with Prior: at t = 0 it was 1.. of the 16 particles of an island"):
        posterior(eight(), sharp, num_particles=64, twist=Prior(), generator=0)


def test_one_island_alone_collapses_and_says_so():
    sharp = Inpainting(FIRST.mask, FIRST.values, noise=0.003)
    with pytest.warns(UserWarning, match="collapsed, with Prior: at t = 0 it was 1.. of the 16 particles"):
        posterior(eight(), sharp, num_particles=16, num_islands=1, twist=Prior(), generator=0)


def test_isotropic_twist_on_the_mixture():
    found = posterior(eight(), FIRST, num_particles=64 * 20, num_islands=20, twist=IsotropicTwist(), generator=0)
    assert abs(float(found.log_evidence) + 0.81) < 0.1


class FlatAtFirst(torch.nn.Module):
    """A denoiser with right values, of which the derivative at large noise is far too small."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t, t):
        x_0 = self.denoiser(x_t, t)
        fixed, share = x_0.detach(), torch.where(t > 25, 0.1, 1.0).to(x_0)[:, None]
        return fixed + share * (x_0 - fixed)


def test_particles_that_are_led_astray_together_are_found_out():
    """They agree on an evidence that is nats too low, with an effective sample size that says nothing."""
    right = eight()
    forward = right.forward_process
    wrong = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, FlatAtFirst(right.reverse.denoiser)), (2,))
    with pytest.warns(UserWarning, match="nats less with GaussianTwist than with IsotropicTwist.*twist=pyrodiff.Iso"):
        found = posterior(wrong, FIRST, num_particles=256, twist=GaussianTwist(), generator=0)
    assert float(found.log_evidence) < -1.5  # for -0.81
    assert float(found.effective_sample_size.min()) > 50
    for twist in (IsotropicTwist(), None):
        found = posterior(wrong, FIRST, num_particles=64 * 20, num_islands=20, twist=twist, generator=0)
        assert abs(float(found.log_evidence) + 0.81) < 0.1


def test_25_gaussians_in_8_dimensions():
    torch.manual_seed(5)
    diffusion = mixture(1.2 * torch.randn(25, 8, dtype=torch.float64), 0.05)
    row = torch.randn(1, 8, dtype=torch.float64) / 8**0.5
    observation = Linear(row, torch.tensor([0.6], dtype=torch.float64), noise=0.1)
    found = posterior(diffusion, observation, num_particles=1024, num_islands=4, generator=0)
    centers = diffusion.reverse.denoiser.centers @ row[0]
    spread = (0.05 * float(row.square().sum()) + 0.01) ** 0.5
    evidence = dist.Normal(centers, spread).log_prob(observation.obs).logsumexp(0) - math.log(25)
    assert abs(float(found.log_evidence - evidence)) < 0.1  # of the data: the chain's own differs by less than .05


# Bits


class Phases(nn.Module):
    """The log odds of each bit of the heartbeat given x_t, by its five phases."""

    def __init__(self, forward):
        super().__init__()
        self.forward_process = forward
        self.beats = torch.stack([(torch.arange(20) % 5 == k).double() for k in range(5)])

    def forward(self, x_t, t):
        law = self.forward_process.marginal(self.beats, int(t[0])).base_dist
        weights = law.log_prob(x_t[:, None]).sum(-1).softmax(1)
        return (weights @ self.beats).log() - (weights @ (1 - self.beats)).log()


def heartbeat():
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(100), rate=0.2)
    denoiser = pyrodiff.LogitPrediction(Phases(forward), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), (20,))


def test_the_heartbeat_of_which_two_bits_of_five_are_known():
    diffusion, mask = heartbeat(), torch.arange(20) % 5 < 2
    observation = Inpainting(mask, torch.zeros(20, dtype=torch.float64))
    found = posterior(diffusion, observation, num_particles=640, num_islands=10, generator=0)
    each = found.islands
    assert abs(float(each.mean()) - math.log(3 / 5)) < 0.1
    assert float(each.std()) < 0.15
    assert torch.equal(found.samples[:, mask], torch.zeros(640, 8, dtype=torch.float64))
    weights = found.log_weights.softmax(0)
    shares = torch.stack(
        [weights[(found.samples == beat).all(1)].sum() for beat in diffusion.reverse.denoiser.network.beats]
    )
    close(shares, torch.tensor([0, 0, 1, 1, 1], dtype=torch.float64) / 3, atol=0.07)


class Table(nn.Module):
    """Log odds of the datum's bits for every state and time."""

    def __init__(self, num_steps, bits):
        super().__init__()
        self.table = BitTable(num_steps, bits)

    def forward(self, x_t, t):
        return self.table(x_t, t).base_dist.logits


def bits(kernel):
    """Three bits, three steps; the reverse process is a table of its own, or made of a table of the denoiser."""
    torch.manual_seed(3)
    if kernel is None:
        return bit_diffusion([0.2, 0.5, 0.7], 0.3, 3)
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([0.2, 0.5, 0.7]), rate=0.3)
    return pyrodiff.Diffusion(forward, kernel(forward, pyrodiff.LogitPrediction(Table(3, 3), forward)), (3,))


def marginal(diffusion, bits=3):
    """All data, and p(x_0) of the chain, by enumeration of the states."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)), dtype=torch.float64)
    with torch.no_grad():
        p = diffusion.model.top(torch.float64).log_prob(states).exp()
        for t in range(diffusion.num_steps, 0, -1):
            rows = []
            for state in states:
                law = diffusion.model.kernel(state[None], torch.tensor([t]))
                rows.append(torch.cat([law.log_prob(to[None]) for to in states]).exp())
            p = p @ torch.stack(rows)
    return states, p


def noisy(x_0):
    """Each bit told wrongly one time in ten."""
    return dist.Bernoulli(0.1 + 0.8 * x_0).to_event(1)


@pytest.mark.parametrize("kernel", [pyrodiff.BinomialReverse, pyrodiff.D3PMReverse])
@pytest.mark.parametrize("kind", ["known", "noisy", "program"])
def test_small_chains_of_bits_are_as_enumerated(kernel, kind):
    diffusion, y = bits(kernel), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    states, p = marginal(diffusion)
    if kind == "known":
        mask = torch.tensor([True, False, True])
        observation, likelihood = Inpainting(mask, y), (states[:, mask] == y[mask]).all(1).double()
        options = {}
    else:
        likelihood = torch.where(states == y, 0.9, 0.1).double().prod(1)
        options = {"twist": DenoiserTwist(), "obs": y if kind == "noisy" else None}
        observation = noisy if kind == "noisy" else program(y)
    found = posterior(diffusion, observation, num_particles=12000, num_islands=3000, generator=0, **options)
    evidence = (p * likelihood).sum()
    assert not far(found.islands.exp() - evidence, 0.0)
    for state, share in zip(states, p * likelihood / evidence, strict=True):  # a ratio: its estimate minus the share
        is_there = (found.samples == state).all(1)
        off = (found.log_weights.exp() * (is_there.double() - share)).view(3000, 4).mean(1)
        assert not far(off, 0.0)


def program(y):
    def observed(x_0):
        with pyro.plate("data", len(x_0)):
            pyro.sample("first", dist.Bernoulli(0.1 + 0.8 * x_0[:, 0]), obs=y[0].expand(len(x_0)))
            pyro.sample("rest", noisy(x_0[:, 1:]), obs=y[1:].expand(len(x_0), 2))

    return observed


def test_a_twist_of_ones_own_on_bits_without_a_denoiser():
    diffusion, y = bits(None), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    states, p = marginal(diffusion)
    likelihood = torch.where(states == y, 0.9, 0.1).double().prod(1)

    class Counting(Twist):
        def log_prob(self, given, x_t, t, *context):
            return (x_t == given.y).sum(1) * 0.5 / t

    found = posterior(diffusion, noisy, obs=y, num_particles=8000, num_islands=2000, twist=Counting(), generator=0)
    assert not far(found.islands.exp() - (p * likelihood).sum(), 0.0)
    with pytest.raises(ValueError, match="reverse must have a denoiser for this twist"):
        posterior(diffusion, noisy, obs=y, twist=DenoiserTwist())


# Levels


class Levelled(nn.Module):
    """E[x_0 | x_t] of two numbers on five levels of a joint table, and their log probabilities less their own noise."""

    def __init__(self, forward, joint, marginals=False):
        super().__init__()
        self.forward_process, self.joint, self.marginals = forward, joint, marginals
        self.points = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def forward(self, x_t, t):
        signal, noise = self.forward_process.scales(x_t, t)
        alone = -((x_t[..., None] - signal[..., None] * self.points) ** 2) / 2 / noise[..., None] ** 2
        both = (self.joint.log() + alone[:, 0, :, None] + alone[:, 1, None, :]).flatten(1).softmax(1).view(-1, 5, 5)
        each = torch.stack([both.sum(2), both.sum(1)], 1)
        return each.clamp(min=1e-300).log() - alone if self.marginals else each @ self.points


def levels(marginals):
    torch.manual_seed(1)
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(40))
    network = Levelled(forward, torch.rand(25, dtype=torch.float64).square().softmax(0).view(5, 5), marginals)
    denoiser = pyrodiff.LevelPrediction(network, forward, levels=5) if marginals else network
    reverse = pyrodiff.GaussianReverse(forward, denoiser)
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=pyrodiff.SoftmaxDecoder(forward, levels=5)), network


@pytest.mark.parametrize("marginals", [True, False], ids=["level prediction", "data prediction"])
def test_levels_that_are_known_exactly(marginals):
    diffusion, network = levels(marginals)
    observation = Inpainting(torch.tensor([True, False]), torch.tensor([0.5, 7.0], dtype=torch.float64))
    # A Gaussian around the estimate is a poor guess of a level, and that is said.
    with nullcontext() if marginals else pytest.warns(UserWarning, match="Pareto k of the weights is 0..., above 0.7"):
        found = posterior(diffusion, observation, num_particles=4000, num_islands=40, generator=0)
    assert torch.equal(found.samples[:, 0], torch.full((4000,), 0.5, dtype=torch.float64))
    torch.manual_seed(0)
    x = drawn(diffusion, 20000)
    x = x[x[:, 0] == 0.5]
    assert (
        abs(float(found.log_evidence) - math.log(len(x) / 20000))
        < 5 * (0.02**2 + float(found.standard_error) ** 2) ** 0.5
    )
    weights = found.log_weights.softmax(0)
    for point in network.points:
        assert abs(float(weights[found.samples[:, 1] == point].sum() - (x[:, 1] == point).double().mean())) < 0.05


def test_levels_that_are_known_with_noise():
    diffusion, network = levels(False)
    observation = Inpainting(torch.tensor([True, False]), torch.tensor([0.4, 0.0], dtype=torch.float64), noise=0.4)
    found = posterior(diffusion, observation, num_particles=4000, num_islands=40, generator=0)
    evidence = network.joint.sum(1) @ dist.Normal(network.points, 0.4).log_prob(observation.obs).exp()
    assert abs(float(found.log_evidence - evidence.log())) < 0.05


# What it returns


def test_the_same_seed_gives_the_same_and_torch_goes_on_as_before():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    pair = gaussian_diffusion(SCHEDULES["vp"], M, V), Linear(A, Y, NOISE)
    one, two, other = (posterior(*pair, generator=seed) for seed in (5, torch.Generator().manual_seed(5), 6))
    again = posterior(*pair, generator=5)
    assert torch.equal(one.samples, again.samples)
    assert torch.equal(one.log_weights, again.log_weights)
    assert not torch.equal(one.samples, other.samples)
    assert not torch.equal(one.samples, two.samples)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_table_and_the_moments_are_those_of_the_weighted_samples():
    found = posterior(eight(), FIRST, num_particles=128, num_islands=8, generator=0)
    w = found.log_weights.exp() / found.log_weights.exp().sum()
    mean = (w[:, None] * found.samples).sum(0)
    close(found.mean, mean)
    close(found.standard_deviation, (w[:, None] * (found.samples - mean) ** 2).sum(0).sqrt())
    Z = found.log_weights.exp().view(8, 16).mean(1)
    close(found.islands, Z.log())
    close(found.log_evidence, Z.mean().log())
    close(found.standard_error, Z.std() / 8**0.5 / Z.mean())
    close(found.effective_sample_size[-1], (Z * 16) ** 2 @ (1 / found.log_weights.exp().view(8, 16).square().sum(1)))
    table, ess = str(found), found.effective_sample_size
    assert f"{float(found.log_evidence):10.4f} ± {float(found.standard_error):.4f} nats" in table
    assert f"at t = {60 - int(ess.argmin())} " in table
    assert f"{float(ess[-1]):10.1f} of 128" in table
    assert f"{float(mean[1]):10.4f}" in table
    assert "128 particles" in repr(found)
    assert math.isnan(float(posterior(eight(), FIRST, num_particles=16, num_islands=1, generator=0).standard_error))


class Shifted(nn.Module):
    """Data N(c, 1) for a context c: E[x_0 | x_t], in float32."""

    def __init__(self, forward, detached=False):
        super().__init__()
        self.forward_process, self.detached, self.one = forward, detached, nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, c):
        a, b = self.forward_process.scales(x_t.detach() if self.detached else x_t, t)
        x_t = x_t.detach() if self.detached else x_t
        return self.one * (c + a * (x_t - a * c) / (a**2 + b**2))


def shifted(**options):
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(40))
    variance = pyrodiff.ForwardVariance()
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Shifted(forward, **options), variance), (2,))


@pytest.mark.parametrize("twist", [None, IsotropicTwist()])
def test_a_context_of_one_row_in_float32_and_in_inference_mode(twist):
    observation = Linear(torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]), noise=0.5)
    c = torch.tensor([[2.0, -1.0]])
    diffusion = shifted()
    with torch.inference_mode():
        found = posterior(
            diffusion, observation, c.clone(), twist=twist, num_particles=4000, num_islands=40, generator=0
        )
    evidence = dist.Normal(1.0, 2.25**0.5).log_prob(torch.tensor(2.0))
    assert found.samples.dtype == torch.float32
    assert abs(float(found.log_evidence - evidence)) < 0.02
    gain = (2.0 - 1.0) / 2.25
    close(found.mean, c[0] + gain, atol=0.06)


def test_a_chain_of_fewer_steps():
    found = posterior(eight().subchain(range(2, 61, 2)), FIRST, num_particles=480, num_islands=30, generator=0)
    assert len(found.effective_sample_size) == 31
    assert abs(float(found.log_evidence) + 0.82) < 0.1


def test_an_impossible_observation_has_no_evidence():
    def never(x_0):
        return dist.Delta(x_0[:, 0])

    with pytest.warns(UserWarning, match="collapsed"):
        found = posterior(eight(), never, obs=torch.tensor(1.0, dtype=torch.float64), twist=Prior(), generator=0)
    assert float(found.log_evidence) == -math.inf


# Bad input

D64 = {"dtype": torch.float64}


def refused(match, *args, diffusion=None, **options):
    with pytest.raises(ValueError, match=match):
        posterior(eight() if diffusion is None else diffusion, *args, **options)


def test_a_twist_that_does_not_fit_is_refused():
    def square(x):
        return (x**2).sum(1, keepdim=True)

    def varying(x):
        return dist.Normal(x, 0.1 + x.abs()).to_event(1)

    class Odd(Twist):
        def log_prob(self, given, x_t, t, *context):
            return x_t if t[0] == 60 else x_t[:, 0] * math.nan

    class Nan(Twist):
        def log_prob(self, given, x_t, t, *context):
            return x_t[:, 0] * math.nan

    y, bit = torch.ones(1, **D64), torch.ones(3, **D64)
    refused("operator must be linear", Linear(square, y, 0.1))
    refused("noise that is the same for all data", varying, obs=torch.zeros(2, **D64))
    refused("twist must be given where", lambda x: dist.Poisson(x.exp()).to_event(1), obs=torch.ones(2, **D64))
    refused("must return Normal", lambda x: dist.Poisson(x.exp()).to_event(1), obs=torch.ones(2), twist=GaussianTwist())
    refused(r"twist must return 64 log probabilities at t = 60", FIRST, twist=Odd())
    refused(r"twist must have finite log probabilities", FIRST, twist=Nan())
    flips = bits(pyrodiff.BinomialReverse)
    refused("twist must be given where", noisy, obs=bit, diffusion=flips)
    refused("twist must be one for bits", noisy, obs=bit, diffusion=flips, twist=GaussianTwist())
    known = Inpainting(torch.tensor([True, False, False]), 0.5 * bit)
    refused("values must be data where the mask is True: x_0 must be 0 or 1", known, diffusion=flips)
    twice = Linear(torch.ones(2, 2), torch.ones(2), 1e-5)
    refused("noise must be large enough .* in torch.float32", twice, torch.zeros(1, 2), diffusion=shifted())
    observation = Linear(torch.ones(1, 2), torch.ones(1), 0.5)
    for twist in (GaussianTwist(), DenoiserTwist()):
        refused(
            "must have a gradient in x_t", observation, torch.zeros(1, 2), diffusion=shifted(detached=True), twist=twist
        )
    found = posterior(shifted(detached=True), observation, torch.zeros(1, 2), twist=IsotropicTwist(), generator=0)
    assert abs(float(found.log_evidence) - float(dist.Normal(0.0, 1.5).log_prob(torch.tensor(1.0)))) < 0.1
