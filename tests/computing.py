"""What computes with a diffusion, one of each kind: ways to draw t, samplers, likelihoods; and small diffusions."""

import functools
import inspect
import math

import pyro.distributions as dist
import torch
from exact import bit_diffusion
from torch import nn

import pyrodiff
from pyrodiff import ImportanceDrawing, LossSecondMoment, LowDiscrepancyDrawing, UniformDrawing


def concrete(kind: type) -> set[str]:
    """The names of the public classes of a kind that can be made."""
    classes = {name: value for name in pyrodiff.__all__ if inspect.isclass(value := getattr(pyrodiff, name))}
    return {name for name, value in classes.items() if issubclass(value, kind) and not inspect.isabstract(value)}


# Drawings of t


def learned(costs, **kwargs):
    """A drawing that has been told the history of costs: costs[t - 1] is a row of them."""
    costs = torch.as_tensor(costs, dtype=torch.float64)
    drawing = LossSecondMoment(len(costs), history=costs.shape[1], **kwargs)
    t = torch.arange(1, len(costs) + 1)
    for column in costs.T:
        drawing.tell(t, column, torch.ones_like(t, dtype=torch.bool))
    return drawing


def uneven(T):
    """Probabilities of t = 1..T, the largest the last."""
    weights = torch.arange(1.0, T + 1).double()
    return weights / weights.sum()


class Apart(ImportanceDrawing):
    """The same probabilities, each datum by itself."""

    def uniforms(self, like):
        return UniformDrawing().uniforms(like)


DRAWINGS = {  # name: the drawing of so many times, and its probabilities
    "uniform": (lambda T: UniformDrawing(), lambda T: torch.full((T,), 1 / T).double()),
    "low discrepancy": (lambda T: LowDiscrepancyDrawing(), lambda T: torch.full((T,), 1 / T).double()),
    "importance": (lambda T: ImportanceDrawing(uneven(T)), uneven),
    "importance, apart": (lambda T: Apart(uneven(T).flip(0)), lambda T: uneven(T).flip(0)),
    "second moment": (
        lambda T: learned(uneven(T)[:, None], uniform=0.2),
        lambda T: 0.8 * uneven(T) + 0.2 / T,
    ),
    "second moment, from nothing": (
        lambda T: LossSecondMoment(T, history=2),
        lambda T: torch.full((T,), 1 / T).double(),
    ),
}


def drawn(drawing, like, T):
    """Times of so many data, and their probabilities."""
    return drawing(drawing.uniforms(like).sample(), T)


# Samplers


SAMPLERS = {  # name: the sampler of a diffusion, whose noise explodes where it is to be any of these
    "ancestral": pyrodiff.AncestralSampler,
    "DDIM": pyrodiff.DDIMSampler,
    "DDIM, eta": functools.partial(pyrodiff.DDIMSampler, eta=0.5),
    "DPM-Solver++": pyrodiff.DPMSolverSampler,
    "Heun": pyrodiff.HeunSampler,
    "Heun, churn": functools.partial(pyrodiff.HeunSampler, churn=3.0),
    "predictor-corrector": pyrodiff.PredictorCorrectorSampler,
    "flow": pyrodiff.FlowSampler,
    "annealed Langevin": functools.partial(pyrodiff.AnnealedLangevinSampler, step_size=0.05, num_updates=2),
}
COMPILED = {name: kind for name, kind in SAMPLERS.items() if name != "flow"}  # each has steps of its own length


def small(denoiser=None, T=12, dtype=torch.float64):
    """A diffusion that every sampler samples from, of a small network, not trained but not zero."""
    forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(T, 0.3, 4.0))
    if denoiser is None:
        network = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1)
        nn.init.normal_(network.outlet.weight, std=0.3)
        denoiser = pyrodiff.VelocityPrediction(network, forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,)).to(dtype)


# Estimates of the likelihood


def of_pair(estimate, **given):
    """That of a pair of programs, for the pair of a diffusion."""
    return lambda diffusion, *data, **options: estimate(diffusion.model, diffusion.guide, *data, **given, **options)


LIKELIHOODS = {  # name: what is called with a diffusion, data and their context
    "bound": pyrodiff.bound,
    "bound of some times": functools.partial(pyrodiff.bound, num_times=2, num_particles=2),
    "importance bound": functools.partial(pyrodiff.importance_bound, num_particles=2),
    "flow": functools.partial(pyrodiff.ode_log_prob, tolerance=1e-2),
    "pair bound": of_pair(pyrodiff.pair_bound, batch_size=3),
    "importance bound of a pair": of_pair(pyrodiff.pair_importance_bound, num_particles=2, batch_size=3),
}
IN_MEMORY = [name for name in LIKELIHOODS if "pair" not in name]  # those that fill a memory with network calls


# Small diffusions


SCHEDULES = {"vp": pyrodiff.LinearSchedule(5, 0.05, 0.5), "ve": pyrodiff.GeometricSchedule(5, 0.3, 4.0)}


def gaussian_network_diffusion(schedule, prediction=pyrodiff.NoisePrediction, variance=None, network=None):
    forward = pyrodiff.GaussianForward(schedule)
    network = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1) if network is None else network
    for parameter in network.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    reverse = pyrodiff.GaussianReverse(forward, prediction(network.double(), forward), variance)
    return pyrodiff.Diffusion(forward, reverse, (2,))


def make(kind):
    """A diffusion of 5 steps, and 48 data unlike its noise."""
    if kind == "bits":
        return bit_diffusion([0.1, 0.2, 0.3, 0.4, 0.6], 0.2, 2), (torch.rand(48, 2) < 0.7).double()
    x_0 = torch.randn(48, 2, dtype=torch.float64) * torch.tensor([0.4, 1.6]) + torch.tensor([1.0, -2.0])
    return gaussian_network_diffusion(SCHEDULES[kind]), x_0.double()


class Known(nn.Module):
    """Kernels of known costs: L_{t-1} = costs[t - 1] at every x_t, for data that are all of one value c."""

    def __init__(self, forward, costs, c=0.75):
        super().__init__()
        self.forward_process, self.c = forward, c
        self.register_buffer("costs", torch.as_tensor(costs, dtype=torch.float64))

    def forward(self, x_t, t):
        t = torch.as_tensor(t).expand(x_t.shape[:-1])
        c, cost = torch.full_like(x_t, self.c), self.costs[t - 1][..., None]
        true = self.forward_process.posterior(x_t, c, t.clamp(min=2)).base_dist
        mean = torch.where(t[..., None] == 1, c, true.mean + (2 * cost).sqrt() * true.stddev)
        scale = torch.where(t[..., None] == 1, cost.exp() / math.sqrt(2 * math.pi), true.stddev)
        return dist.Normal(mean, scale).to_event(1)


def known_diffusion(costs, c=0.75):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(len(costs), 0.05, 0.4))
    return pyrodiff.Diffusion(forward, Known(forward, costs, c), (1,))


KNOWN = [3.0, 0.5, 1.25, 0.0625, 7.0, 2.0, 11.0]
