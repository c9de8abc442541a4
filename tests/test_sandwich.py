"""The sandwich, on models whose likelihood is known: ELBO <= IW_2 <= IW_64 <= log p, and the gap is a sum of KLs."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from exact import EightGaussians, bit_diffusion, gaussian_diffusion
from torch.distributions import kl_divergence

import pyrodiff

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
SCHEDULE = pyrodiff.BetaSchedule([0.1, 0.2, 0.35, 0.5])


def carried(diffusion):
    """log p(x_0) of a linear-Gaussian chain: its moments, step by step from the prior's."""
    prior = diffusion.model.top(torch.float64)
    mean, variance = prior.mean, prior.variance
    for t in range(diffusion.num_steps, 0, -1):
        at_0, at_1 = (diffusion.reverse(x[None], t) for x in (torch.zeros(2).double(), torch.ones(2).double()))
        slope = (at_1.mean - at_0.mean)[0]
        mean, variance = at_0.mean[0] + slope * mean, slope**2 * variance + at_0.variance[0]
    return lambda x_0: dist.Normal(mean, variance.sqrt()).log_prob(x_0).sum(-1).detach()


def gaussian(shift, widen):
    diffusion = gaussian_diffusion(SCHEDULE, M, V, shift, widen)
    return diffusion, M + V.sqrt() * torch.randn(400, 2).double(), carried(diffusion)


def eight_gaussians():
    schedule = pyrodiff.CosineSchedule(100)
    denoiser = EightGaussians(schedule)
    forward = pyrodiff.GaussianForward(schedule)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
    return diffusion, pyrodiff.datasets.eight_gaussians(40, seed=2).double(), denoiser.log_density


def bits():
    diffusion = bit_diffusion([0.1, 0.3, 0.5], 0.3, 2)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).double()
    with torch.no_grad():
        log_p = diffusion.model.top(torch.float64).log_prob(states)
        for t in range(3, 0, -1):
            steps = torch.stack([diffusion.reverse(states, t).log_prob(x.expand(4, 2)) for x in states], 1)
            log_p = (log_p[:, None] + steps).logsumexp(0)
    return diffusion, states.repeat(100, 1), lambda x_0: log_p.repeat(100)


CASES = {
    "exact kernels": lambda: gaussian(0.0, 1.0),
    "moved and widened kernels": lambda: gaussian(0.3, 1.2),
    "eight Gaussians": eight_gaussians,  # whose density no model passes in the mean
    "bits": bits,
}


@pytest.mark.parametrize("case", CASES)
def test_bounds_rise_with_their_particles_towards_the_likelihood(case):
    diffusion, x_0, log_p = CASES[case]()
    weighted = pyrodiff.importance_bound(diffusion, x_0, num_particles=64)
    elbo = pyrodiff.bound(diffusion, x_0, num_particles=10 if case == "eight Gaussians" else 200)
    estimates = [-elbo.nats, -weighted.at(2), -weighted.at(64), log_p(x_0)]
    gaps = [float((upper - lower).mean()) for lower, upper in itertools.pairwise(estimates)]
    errors = [
        float((upper - lower).std()) / math.sqrt(len(x_0)) + 1e-9 for lower, upper in itertools.pairwise(estimates)
    ]
    assert all(gap > -5 * error for gap, error in zip(gaps, errors, strict=True)), (gaps, errors)
    if case in ("moved and widened kernels", "bits"):
        assert all(gap > 5 * error for gap, error in zip(gaps[:2], errors[:2], strict=True)), (gaps, errors)


def test_the_gap_to_the_likelihood_is_the_divergence_of_the_trajectories():
    """log p(x_0) - ELBO = KL(q(x_1:T | x_0) || p(x_1:T | x_0)): Gaussians both, written out and compared whole."""
    diffusion, x_0, log_p = gaussian(0.3, 1.2)
    x = x_0[0]
    q, p = joint_of_guide(diffusion, x), joint_of_model(diffusion)
    hidden, seen = p.mean[:-2], p.mean[-2:]
    S = p.covariance_matrix
    gain = S[:-2, -2:] @ torch.linalg.inv(S[-2:, -2:])
    given = dist.MultivariateNormal(hidden + gain @ (x - seen), S[:-2, :-2] - gain @ S[-2:, :-2])
    divergence = float(kl_divergence(q, given))
    bound = pyrodiff.bound(diffusion, x.expand(4000, 2), num_particles=20)
    gap = bound.nats + log_p(x)
    assert abs(float(gap.mean()) - divergence) < 5 * float(gap.std()) / 4000**0.5
    assert divergence > 0.1


def joint_of_guide(diffusion, x_0):
    """q(x_T, ..., x_1 | x_0) of two numbers, as one Gaussian."""
    T, q = diffusion.num_steps, diffusion.forward_process
    times = list(range(T, 0, -1))
    a, b = q.schedule.signal(torch.tensor(times)), q.schedule.noise(torch.tensor(times))
    covariance = torch.zeros(T, T).double()
    for i, j in itertools.product(range(T), repeat=2):  # the later of two is the earlier, scaled, and fresh noise
        early = max(i, j)
        covariance[i, j] = a[min(i, j)] / a[early] * b[early] ** 2
    mean = a[:, None] * x_0
    return dist.MultivariateNormal(mean.flatten(), torch.kron(covariance, torch.eye(2).double()))


def joint_of_model(diffusion):
    """p(x_T, ..., x_0) of two numbers, as one Gaussian: a precision of each kernel added up."""
    T = diffusion.num_steps
    prior = diffusion.model.top(torch.float64)
    mean, covariance = prior.mean, torch.diag(prior.variance)
    for t in range(T, 0, -1):
        at_0, at_1 = (diffusion.reverse(x[None], t) for x in (torch.zeros(2).double(), torch.ones(2).double()))
        slope, scale = torch.diag((at_1.mean - at_0.mean)[0]), torch.diag(at_0.variance[0])
        cross = covariance[:, -2:] @ slope
        corner = slope @ covariance[-2:, -2:] @ slope + scale
        mean = torch.cat([mean, at_0.mean[0] + slope @ mean[-2:]])
        covariance = torch.cat([torch.cat([covariance, cross], 1), torch.cat([cross.T, corner], 1)], 0)
    return dist.MultivariateNormal(mean.detach(), covariance.detach())
