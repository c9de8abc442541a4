"""Replacement: what it draws is what its recursion says, and that is not the posterior; weighted particles are."""

import pyro.distributions as dist
import pytest
import torch
from exact import bit_diffusion, far
from torch import nn

import pyrodiff
from pyrodiff import Inpainting, posterior, replacement

M = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
C = torch.tensor([[1.0, 0.7, -0.4], [0.7, 0.8, 0.1], [-0.4, 0.1, 0.9]], dtype=torch.float64)  # not apart
MASK, Y = torch.tensor([True, False, False]), torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)


class Correlated(nn.Module):
    """E[x_0 | x_t] of N(M, C)."""

    def __init__(self, forward):
        super().__init__()
        self.forward_process = forward

    def forward(self, x_t, t):
        a, b = (c[..., None] for c in self.forward_process.scales(x_t, t))
        total = a**2 * C + b**2 * torch.eye(3, dtype=torch.float64)
        off = (x_t - a[..., 0] * M)[..., None]
        return M + (a * C @ torch.linalg.solve(total, off))[..., 0]


def correlated(T):
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T))
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Correlated(forward)), (3,))


def affine(diffusion, t):
    """Slope, mean at 0 and variances of a kernel."""
    points = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    law = diffusion.model.kernel(points, torch.full((4,), t)).base_dist
    return (law.mean[1:] - law.mean[0]).T, law.mean[0], law.variance[0].diag()


def composed(diffusion, known=None, repeats=1):
    """Mean and covariance of x_0 of the chain; with what is known put in place, if it is, by the affine kernels."""
    T, q, eye = diffusion.num_steps, diffusion.forward_process.schedule, torch.eye(3, dtype=torch.float64)
    mean, covariance = torch.zeros(3, dtype=torch.float64), eye
    for s in range(T, -1, -1):
        for again in range(repeats if 0 < s < T else 1):
            a, b = q.scales(s).tolist() if s else (1.0, 0.0)
            if again:  # back to s + 1
                step = q.signal(s + 1) / a
                mean, covariance = step * mean, step**2 * covariance + (q.noise(s + 1) ** 2 - step**2 * b**2) * eye
            if s < T:
                F, c, own = affine(diffusion, s + 1)
                mean, covariance = F @ mean + c, F @ covariance @ F.T + own
            if known is not None:
                mean = torch.where(MASK, a * known, mean)
                covariance = torch.where(MASK[:, None] | MASK, 0.0, covariance) + b**2 * MASK.double().diag()
    return mean, covariance


def conditioned(mean, covariance, noise):
    """The law of the two unknown numbers given the first, known up to noise, by conditioning; and its log evidence."""
    spread = covariance[0, 0] + noise**2
    gain = covariance[1:, 0] / spread
    law = gain * (Y[0] - mean[0]) + mean[1:], covariance[1:, 1:] - gain[:, None] * covariance[0, 1:]
    return *law, dist.Normal(mean[0], spread.sqrt()).log_prob(Y[0])


@pytest.mark.parametrize("T", [10, 60])
def test_replacement_is_biased_and_weighted_particles_are_not(T):
    diffusion = correlated(T)
    with torch.no_grad():
        chain, replaced = composed(diffusion), composed(diffusion, Y)
    mean, covariance, _ = conditioned(*chain, noise=0.0)
    x_0 = replacement(diffusion, Inpainting(MASK, Y), num_samples=20000, generator=0)
    assert torch.equal(x_0[:, 0], torch.full((20000,), 2.0, dtype=torch.float64))
    off = x_0 - replaced[0]
    assert not far(off[:, 1:], 0.0)
    assert not far(off[:, :, None] * off[:, None], replaced[1])
    assert far(x_0[:, 1:], mean, errors=20)
    assert abs(float(replaced[0][1] - mean[0])) > 0.1  # of a deviation of .6: no matter of the number of samples
    mean, covariance, evidence = conditioned(*chain, noise=0.2)
    found = posterior(diffusion, Inpainting(MASK, Y, noise=0.2), num_particles=8000, num_islands=200, generator=0)
    w = (found.log_weights - found.log_evidence).exp()[:, None]
    assert not far((w * (found.samples[:, 1:] - mean)).view(200, 40, 2).mean(1), 0.0)
    off = found.samples[:, 1:] - mean
    assert not far((w[..., None] * (off[:, :, None] * off[:, None] - covariance)).view(200, 40, 2, 2).mean(1), 0.0)
    assert not far((found.islands - evidence).exp(), 1.0)


def test_the_bias_does_not_go_away_with_more_steps_and_does_with_more_repeats():
    with torch.no_grad():
        off = []
        for T in (20, 200):
            diffusion = correlated(T)
            off.append(float(composed(diffusion, Y)[0][1] - conditioned(*composed(diffusion), 0.0)[0][0]))
    assert min(map(abs, off)) > 0.1
    assert abs(off[0] - off[1]) < 0.1
    diffusion = correlated(20)
    truth = conditioned(*composed(diffusion), 0.0)[0][0].detach()
    once, often = (
        replacement(diffusion, Inpainting(MASK, Y), num_samples=4000, num_repeats=u, generator=0)[:, 1].mean() - truth
        for u in (1, 10)
    )
    assert abs(float(often)) < abs(float(once)) / 2


def test_steps_that_are_taken_again_go_back_by_the_forward_process():
    diffusion = correlated(6)
    with torch.no_grad():
        mean, covariance = composed(diffusion, Y, repeats=3)
    x_0 = replacement(diffusion, Inpainting(MASK, Y), num_samples=40000, num_repeats=3, generator=0)
    assert not far(x_0, mean)
    off = x_0 - mean
    assert not far(off[:, :, None] * off[:, None], covariance)


def test_values_with_noise_are_drawn_with_it():
    x_0 = replacement(correlated(10), Inpainting(MASK, Y, noise=0.3), num_samples=20000, generator=0)
    assert not far(x_0[:, 0], 2.0)
    assert not far((x_0[:, 0] - 2.0) ** 2, 0.09)


def test_of_bits_that_hang_together_it_has_other_shares():
    """Two bits that are alike at each step; the first is known. As enumerated, by the chain with it put in place."""
    torch.manual_seed(2)
    diffusion, T = bit_diffusion([0.3, 0.3, 0.4], 0.4, 2), 3
    states = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    q, p = diffusion.forward_process, None
    for s in range(T, -1, -1):
        if p is None:
            other = diffusion.model.top(torch.float64).base_dist.probs[1].expand(2)
            other = torch.stack([1 - other[0], other[0]])
        else:
            one = diffusion.model.kernel(states, torch.full((4,), s + 1)).base_dist.probs[:, 1].detach()
            other = torch.stack([p @ (1 - one), p @ one])
        rate = float(q.marginal(torch.ones(1, 2).double(), s).base_dist.probs[0, 0]) if s else 1.0
        p = torch.stack([(1 - rate) * other[0], (1 - rate) * other[1], rate * other[0], rate * other[1]])
    x_0 = replacement(
        diffusion, Inpainting(torch.tensor([True, False]), torch.ones(2).double()), num_samples=20000, generator=0
    )
    assert not far(x_0[:, 1], p[3])
    assert bool((x_0[:, 0] == 1).all())


def test_draws_are_as_often_as_particles_weigh():
    diffusion = correlated(10)
    observation = Inpainting(MASK, Y, noise=0.2)
    found = posterior(diffusion, observation, num_particles=64, twist=pyrodiff.IsotropicTwist(), generator=0)
    draws = found.draw(6400, generator=1)
    counts = (draws[:, None] == found.samples).all(-1).sum(0)
    expected = (found.log_weights.softmax(0)[:, None] * (found.samples[:, None] == found.samples).all(-1)).sum(0) * 6400
    assert bool(((counts - expected).abs() < 1).all())
    assert torch.equal(draws, found.draw(6400, generator=1))
    assert not torch.equal(draws.sort(0).values, draws)


def test_the_same_seed_gives_the_same():
    diffusion, observation = correlated(5), Inpainting(MASK, Y)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(*(replacement(diffusion, observation, num_samples=3, generator=4) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), before)
