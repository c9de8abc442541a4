"""What a step of SVI costs: T = 1000 against T = 10, and the one-step pair against the bare network.

Run with ``python benchmarks/one_step.py``; about a minute. The variants are interleaved in one process and each figure
is the median of its rounds, so that what else the machine does falls on all of them alike. Measured are
milliseconds a step at batch 128, a residual network of 128 units and two-dimensional data.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import pyro
import torch

import pyrodiff


def build(num_steps: int) -> pyrodiff.Diffusion:
    """A Gaussian diffusion of the plane."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps, 1e-4, 0.02))
    denoiser = pyrodiff.NoisePrediction(pyrodiff.networks.MLP((2,), hidden=128), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))


def optimizer(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The same for every variant."""
    return torch.optim.Adam(parameters, lr=1e-3)


def svi_step(num_steps: int, x_0: torch.Tensor) -> Callable[[], object]:
    """A step of pyrodiff's SVI on the one-step pair."""
    pair = build(num_steps).one_step()
    svi = pyrodiff.SVI(pair.model, pair.guide, optimizer, pyrodiff.DiffusionELBO())
    return lambda: svi.step(x_0)


def trajectory_step(num_steps: int, x_0: torch.Tensor) -> Callable[[], object]:
    """A step of pyrodiff's SVI on the trajectory pair, T network calls."""
    diffusion = build(num_steps)
    svi = pyrodiff.SVI(diffusion.model, diffusion.guide, optimizer, pyrodiff.DiffusionELBO())
    return lambda: svi.step(x_0)


def bare_step(num_steps: int, x_0: torch.Tensor) -> Callable[[], object]:
    """A loop by hand: L_simple of the same network, nothing of Pyro."""
    network = build(num_steps).reverse.denoiser.network
    adam = optimizer(list(network.parameters()))
    beta = torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    signal, noise = alpha_bar.sqrt().float()[:, None], (1 - alpha_bar).sqrt().float()[:, None]

    def step() -> None:
        t = torch.randint(num_steps, (len(x_0),))
        epsilon = torch.randn_like(x_0)
        loss = ((network(signal[t] * x_0 + noise[t] * epsilon, t + 1) - epsilon) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each variant (default: 15)")
    parser.add_argument("--steps", type=int, default=20, help="steps a round (default: 20)")
    arguments = parser.parse_args()
    pyro.set_rng_seed(0)
    x_0 = pyrodiff.datasets.swiss_roll(128)
    variants = {
        "one-step pair, T = 10": (svi_step(10, x_0), arguments.steps),
        "one-step pair, T = 1000": (svi_step(1000, x_0), arguments.steps),
        "bare network, by hand": (bare_step(1000, x_0), arguments.steps),
        "trajectory pair, T = 10": (trajectory_step(10, x_0), max(1, arguments.steps // 5)),
    }
    times = {name: [] for name in variants}
    for round_ in range(arguments.rounds + 1):
        for name, (step, steps) in variants.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if round_ > 0:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) / steps)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    reference = medians["one-step pair, T = 10"]
    for name, seconds in medians.items():
        print(f"{name:26}{1e3 * seconds:8.2f} ms a step   {seconds / reference:6.2f} of T = 10")


if __name__ == "__main__":
    main()
