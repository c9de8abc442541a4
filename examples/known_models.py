"""Diffusions whose likelihood is known, with data and log p of each datum, for ``sandwich.py``; nothing to run here."""

import itertools
import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyrodiff

M, V = 0.7, 0.3  # the mean and the variance of a number of the Gaussian data


class GaussianData(nn.Module):
    """E[x_0 | x_t] of independent N(M, V)."""

    def __init__(self, forward: pyrodiff.GaussianForward) -> None:
        super().__init__()
        self.forward_process = forward

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        a, b = self.forward_process.scales(x_t, t)
        return M + a * V / (a**2 * V + b**2) * (x_t - a * M)


class Shifted(nn.Module):
    """The exact kernels of a Gaussian diffusion, their means moved by a part of their scales."""

    def __init__(self, reverse: pyrodiff.GaussianReverse, shift: float) -> None:
        super().__init__()
        self.exact, self.shift = reverse, shift

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        law = self.exact(x_t, t).base_dist
        return dist.Normal(law.loc + self.shift * law.scale, law.scale).to_event(1)


def exact_variances(forward: pyrodiff.GaussianForward) -> Tensor:
    """The variance of x_{t-1} given x_t alone, of N(M, V): the posterior's, and what is not known of x_0."""
    t = torch.arange(1, forward.num_steps + 1)
    _, weight_0, scale = forward.schedule.posterior(t)
    left = 1 / (1 / V + forward.schedule.log_snr(t).exp())
    return scale**2 + weight_0**2 * left


def gaussian(shift: float) -> tuple[pyrodiff.Diffusion, Tensor, Tensor]:
    """A diffusion of N(M, V) in the plane, data, and log p of each under the chain, by its moments."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(12, 0.02, 0.5))
    T, variances = forward.num_steps, exact_variances(forward)
    reverse = pyrodiff.GaussianReverse(forward, GaussianData(forward), pyrodiff.FixedVariance(variances))
    top = forward.marginal(torch.tensor([[M]]).double(), T).mean[0, 0], forward.schedule.noise(T) ** 2
    mean, variance = top[0], top[1] + forward.schedule.alpha_bar(T) * V
    prior = dist.Normal(mean.expand(2), variance.sqrt()).to_event(1)
    for t in range(T, 0, -1):  # E[x_{t-1} | x_t] is linear in x_t: two points determine the line
        at = [float(reverse(torch.full((1, 2), x).double(), t).mean[0, 0]) for x in (0.0, 1.0)]
        slope, scale = at[1] - at[0], variances[t - 1].sqrt()
        mean, variance = slope * mean + at[0] + shift * scale, slope**2 * variance + scale**2
    diffusion = pyrodiff.Diffusion(forward, Shifted(reverse, shift), event_shape=(2,), prior=prior)
    x_0 = M + math.sqrt(V) * torch.randn(1000, 2, dtype=torch.float64)
    return diffusion, x_0, dist.Normal(mean, variance.sqrt()).log_prob(x_0).sum(-1)


class EightGaussians(nn.Module):
    """E[x_0 | x_t] of the eight Gaussians, and their log density."""

    def __init__(self, forward: pyrodiff.GaussianForward) -> None:
        super().__init__()
        angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
        self.forward_process, self.variance = forward, 0.125
        self.centres = 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        a, b = (scale[..., None] for scale in self.forward_process.scales(x_t, t))
        total = a**2 * self.variance + b**2
        off = x_t[:, None] - a * self.centres
        belief = torch.softmax(-(off**2 / (2 * total)).sum(-1), -1)[..., None]
        return (belief * (self.centres + a * self.variance / total * off)).sum(1)

    def log_density(self, x: Tensor) -> Tensor:
        law = dist.Normal(self.centres, math.sqrt(self.variance)).to_event(1)
        return law.log_prob(x[:, None]).logsumexp(-1) - math.log(8)


def eight_gaussians() -> tuple[pyrodiff.Diffusion, Tensor, Tensor]:
    """The diffusion with the exact denoiser, data, and their log density."""
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(1000))
    denoiser = EightGaussians(forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
    x_0 = pyrodiff.datasets.eight_gaussians(100).double()
    return diffusion, x_0, denoiser.log_density(x_0)


class BitTable(nn.Module):
    """p(x_{t-1} | x_t) of three bits, from a table of random log odds."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_steps + 1, 8, 3, dtype=torch.float64) / 4)

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        row = (x_t * torch.tensor([1.0, 2.0, 4.0])).sum(-1).long()
        return dist.Bernoulli(logits=self.logits[t, row]).to_event(1)


def bits() -> tuple[pyrodiff.Diffusion, Tensor, Tensor]:
    """A chain of three bits, data, and log p of each by summing over all trajectories."""
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([0.1, 0.2, 0.4, 0.6]), rate=0.3)
    reverse, T = BitTable(4), 4
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    log_p = forward.prior((3,), torch.float64).log_prob(states)
    for t in range(T, 0, -1):
        steps = torch.stack([reverse(states, t).log_prob(x.expand(8, 3)) for x in states], 1)  # from row to column
        log_p = (log_p[:, None] + steps).logsumexp(0)
    x_0 = states.repeat(40, 1)
    return pyrodiff.Diffusion(forward, reverse, event_shape=(3,)), x_0, log_p.detach().repeat(40)
