"""A small network whose weights are all random, with guides of them, for ``bayesian_diffusion.py``; nothing to run.

The posterior of the weights has a program of its own, whose only latent sites are the weights, so that any of Pyro's
automatic guides works. The model with all but the weights blocked would not do: there the data are blocked too, and
Laplace's approximation would be that of the prior.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyrodiff

T = 20
CENTERS, TIMES = torch.linspace(-2.5, 2.5, 11), torch.linspace(0, 1, 4)


class Network(PyroModule):
    """Radial features of the state times tents of t, and a Gaussian prior on all weights."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, scale).expand([(len(CENTERS) + 1) * len(TIMES)]).to_event(1))

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        radial = torch.cat([(-2 * (x_t - CENTERS) ** 2).exp(), x_t], 1)
        tents = (1 - 3 * (torch.as_tensor(t).expand(len(x_t))[:, None] / T - TIMES).abs()).clamp(min=0)
        return (radial[:, :, None] * tents[:, None]).flatten(1) @ self.weight[:, None]


def build(scale: float = 1.0) -> pyrodiff.Diffusion:
    """A diffusion of numbers, with this deviation of its weights a priori."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T, 4.0, -6.0))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(Network(scale), forward))
    return pyrodiff.Diffusion(forward, reverse, event_shape=(1,))


def weights_alone(diffusion: pyrodiff.Diffusion, num_draws: int, seed: int | None = None) -> Callable[[Tensor], None]:
    """A program whose only latent sites are the weights; their log likelihood, the one-step bound, is a factor.

    That many t and x_t are drawn for each datum; with a fixed seed, the factor is a fixed function of the weights.
    """
    pair, chain = diffusion.one_step(), poutine.trace(diffusion.model).get_trace(num_samples=1)
    priors = {name: site["fn"] for name, site in chain.nodes.items() if name.startswith("reverse.")}

    def program(x_0: Tensor) -> None:
        values = {name: pyro.sample(name, prior) for name, prior in priors.items()}
        given = poutine.condition(pair.model, data=values)
        with poutine.block(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            terms = pyrodiff.DiffusionELBO().terms(given, pair.guide, x_0.repeat(num_draws, 1))
        costs = [term.sum() for name, term in terms.items() if name not in values]
        pyro.factor("data", -torch.stack(costs).sum() / num_draws)

    return program


def fit(program: Callable, guide: nn.Module, x_0: Tensor, num_steps: int) -> Any:
    """SVI, the learning rate falling to 0."""
    svi = pyrodiff.SVI(
        program,
        guide,
        lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        pyrodiff.DiffusionELBO(),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, num_steps),
    )
    for _ in range(num_steps):
        svi.step(x_0)
    return guide


def posteriors(diffusion: pyrodiff.Diffusion, x_0: Tensor, num_steps: int) -> dict[str, Any]:
    """Guides of the weights: their most probable values, independent Gaussians, and a Gaussian by the Hessian there.

    The bound is quadratic in these weights, so the last is the posterior, up to the noise of its draws of x_t.
    """
    fresh = weights_alone(diffusion, math.ceil(1000 / len(x_0)))
    fixed = weights_alone(diffusion, math.ceil(10000 / len(x_0)), seed=0)
    point = fit(fresh, autoguide.AutoDelta(fresh), x_0, num_steps)
    start = autoguide.initialization.init_to_value(values=point.median(x_0))
    normal = fit(fresh, autoguide.AutoNormal(fresh, init_loc_fn=start, init_scale=0.1), x_0, num_steps)
    laplace = fit(fixed, autoguide.AutoLaplaceApproximation(fixed, init_loc_fn=start), x_0, num_steps // 4)
    return {"point": point, "mean field": normal, "Laplace": laplace.laplace_approximation(x_0)}
