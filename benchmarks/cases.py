"""What is measured: the networks with their data, and each way to take a step, to bound and to sample with them."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyrodiff
from pyrodiff.running.evaluation import Batch, dry_run

__all__ = [
    "Case",
    "Plain",
    "bare_calls",
    "bare_step",
    "bound_calls",
    "cases",
    "diffusers_loop",
    "hand_written",
    "one_step",
    "samplers",
    "trajectory",
    "vanilla_one_step",
    "vanilla_trajectory",
]

Call = Callable[[], object]


class Plain(nn.Module):
    """A plain MLP, of the state and of t / T: as little as a network can be."""

    def __init__(self, size: int, num_steps: int, hidden: int = 128) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.layers = nn.Sequential(
            *(nn.Linear(size + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size))
        )

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The output, with the shape of ``x_t``, (B, D)."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        return self.layers(torch.cat([x_t, t[:, None] / self.num_steps], -1))


@dataclass(frozen=True)
class Case:
    """A network and the data that it is measured with.

    Arguments:
        title: How it is called.
        shape: The shape of one datum.
        batch: The number of data of a training step.
        device: Where it computes.
        channels: The channels of a U-Net; of an MLP, none.
        hidden: The hidden units that see the whole picture.
        levels: How many levels the U-Net says the log probabilities of; it predicts the noise if None.
        num_steps: The number of steps T.
        num_data: How many data are bounded.
        num_bounded: The number of steps of the chain whose bound is taken.
        num_sampled: The number of steps of the chain that is sampled.
        memory_budget: What a batch of network calls of the bound may take, in bytes.
    """

    title: str
    shape: tuple[int, ...]
    batch: int
    device: torch.device
    channels: tuple[int, ...] = ()
    hidden: int = 0
    levels: int | None = None
    num_steps: int = 1000
    num_data: int = 1
    num_bounded: int = 1000
    num_sampled: int = 1000
    memory_budget: int = 2**28

    def network(self) -> nn.Module:
        """A fresh network."""
        if self.channels:
            network = pyrodiff.networks.UNet(self.shape, self.channels, hidden=self.hidden, outputs=self.levels)
        else:
            network = Plain(math.prod(self.shape), self.num_steps)
        return network.to(self.device)

    def diffusion(self, length: int | None = None) -> pyrodiff.Diffusion:
        """A fresh diffusion; or its chain of so many steps, evenly spaced."""
        forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(self.num_steps))
        if self.levels is None:
            denoiser, decoder = pyrodiff.NoisePrediction(self.network(), forward), None
        else:
            denoiser = pyrodiff.LevelPrediction(self.network(), forward, self.levels)
            decoder = pyrodiff.DiscretizedDecoder(self.levels)
        reverse = pyrodiff.GaussianReverse(forward, denoiser)
        diffusion = pyrodiff.Diffusion(forward, reverse, self.shape, decoder).to(self.device)
        if length in (None, self.num_steps):
            return diffusion
        apart = self.num_steps // length
        return diffusion.subchain(range(apart, self.num_steps + 1, apart))

    def data(self, number: int | None = None) -> Tensor:
        """So many data, a batch of training if not given."""
        size = (self.batch if number is None else number, *self.shape)
        if self.levels is not None:
            return pyrodiff.from_levels(torch.randint(self.levels, size), self.levels).to(self.device)
        return torch.randn(size, device=self.device)

    def times(self, number: int) -> Tensor:
        """So many times in 1..T."""
        return torch.randint(1, self.num_steps + 1, (number,), device=self.device)

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.network().parameters())
        shape = " x ".join(map(str, self.shape))
        return (
            f"{self.title}: {count:,} parameters; training and sampling {self.batch} data of {shape}, "
            f"sampling in {self.num_sampled} steps; bound of {self.num_data} data, {self.num_bounded} terms each"
        )


def cases(device: torch.device, quick: bool) -> dict[str, Case]:
    """The networks by name, for a device; with the fewest data for a quick run."""
    if device.type == "cuda":
        found = {
            "mlp": Case("MLP 3-128-128-2", (2,), 128, device, num_data=4096),
            "digits": Case("U-Net 8 x 8", (8, 8), 64, device, (32, 64), 256, num_data=128, num_sampled=200),
            "unet": Case("U-Net 32 x 32", (1, 32, 32), 256, device, (128, 256, 384), num_data=8, num_sampled=20),
        }
        found = {name: replace(case, memory_budget=2**32) for name, case in found.items()}
    else:
        found = {
            "mlp": Case("MLP 3-128-128-2", (2,), 128, device, num_data=256),
            "digits": Case("U-Net 8 x 8", (8, 8), 64, device, (32, 64), 256, num_data=4, num_sampled=50),
            "unet": Case("U-Net 32 x 32", (1, 32, 32), 16, device, (32, 64, 112), num_bounded=1000, num_sampled=20),
        }
    return {
        name: replace(case, num_data=1, num_bounded=100, num_sampled=10) if quick else case
        for name, case in found.items()
    }


def fused_adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of every variant but Pyro's own and diffusers'; on a GPU one that a CUDA graph can hold."""
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr=1e-4, fused=True, capturable=parameters[0].is_cuda)


# A training step ------------------------------------------------------------------------------------------------------


def bare_step(case: Case, calls: int = 1) -> Call:
    """The network forward and backward on states and times at hand, so many calls, and a step of the optimizer."""
    network, x_t, target = case.network(), case.data(), case.data()
    optimizer, t = fused_adam(list(network.parameters())), case.times(case.batch)

    def step() -> None:
        loss = sum(nn.functional.mse_loss(network(x_t, t), target) for _ in range(calls))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def hand_written(case: Case, compile: bool = False) -> Call:
    """The loop that one writes by hand: t and noise drawn, the state, the squared error of the noise; no Pyro."""
    network, x_0 = case.network(), case.data()
    optimizer = fused_adam(list(network.parameters()))
    predict = torch.compile(network, dynamic=False) if compile else network
    beta = torch.linspace(1e-4, 0.02, case.num_steps, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0).reshape(-1, *(1,) * len(case.shape))
    signal, noise = (value.sqrt().float().to(case.device) for value in (alpha_bar, 1 - alpha_bar))

    def step() -> None:
        t = torch.randint(case.num_steps, (len(x_0),), device=case.device)
        epsilon = torch.randn_like(x_0)
        loss = nn.functional.mse_loss(predict(signal[t] * x_0 + noise[t] * epsilon, t + 1), epsilon)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def diffusers_loop(case: Case) -> Call:
    """The training loop of diffusers' tutorial, on the same network.

    References:
        https://huggingface.co/docs/diffusers/tutorials/basic_training
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup

    network, x_0 = case.network(), case.data()
    scheduler = DDPMScheduler(num_train_timesteps=case.num_steps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    rate = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=500, num_training_steps=10**6)

    def step() -> None:
        noise = torch.randn(x_0.shape, device=x_0.device)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(x_0),), device=x_0.device)
        loss = nn.functional.mse_loss(network(scheduler.add_noise(x_0, noise, timesteps), timesteps), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()

    return step


def one_step(case: Case, compile: bool = False) -> Call:
    """A step of pyrodiff's SVI on the one-step pair."""
    pair, x_0 = case.diffusion().one_step(), case.data()
    svi = pyrodiff.SVI(pair.model, pair.guide, fused_adam, pyrodiff.DiffusionELBO(), compile=compile)
    return lambda: svi.step(x_0)


def vanilla_one_step(case: Case) -> Call:
    """A step of Pyro's own SVI on the one-step pair."""
    pair, x_0 = case.diffusion().one_step(), case.data()
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-4}), TraceMeanField_ELBO())
    return lambda: svi.step(x_0)


def trajectory(case: Case, compile: bool = False) -> Call:
    """A step of pyrodiff's SVI on the trajectory pair: T calls of the network."""
    diffusion, x_0 = case.diffusion(), case.data()
    svi = pyrodiff.SVI(diffusion.model, diffusion.guide, fused_adam, pyrodiff.DiffusionELBO(), compile=compile)
    return lambda: svi.step(x_0)


def vanilla_trajectory(case: Case) -> Call:
    """A step of Pyro's own SVI on the trajectory pair."""
    diffusion, x_0 = case.diffusion(), case.data()
    svi = pyro.infer.SVI(diffusion.model, diffusion.guide, pyro.optim.Adam({"lr": 1e-4}), TraceMeanField_ELBO())
    return lambda: svi.step(x_0)


# The bound and samples ------------------------------------------------------------------------------------------------


def bare_calls(case: Case, sizes: Sequence[int]) -> Call:
    """The network alone, without gradients, on batches of these sizes, with states and times at hand."""
    network, x_t, t = case.network().eval(), case.data(max(sizes)), case.times(max(sizes))

    @torch.inference_mode()
    def calls() -> None:
        for size in sizes:
            network(x_t[:size], t[:size])

    return calls


def bound_calls(case: Case, compile: bool) -> dict[str, Call]:
    """All terms of the bound, and the bare network called as often, on batches as large."""
    x_0, diffusion = case.data(case.num_data), case.diffusion(case.num_bounded)
    number, rows = case.num_bounded * case.num_data, dry_run(case.memory_budget, diffusion, Batch(x_0, ())).rows
    sizes = [rows] * (number // rows) + [number % rows] * (number % rows > 0)
    options = {"memory_budget": case.memory_budget}
    found = {
        "bare network": bare_calls(case, sizes),
        "pyrodiff.bound": lambda: pyrodiff.bound(diffusion, x_0, **options),
    }
    if compile and "compile" in inspect.signature(pyrodiff.bound).parameters:
        other = case.diffusion(case.num_bounded)
        found["pyrodiff.bound, compiled"] = lambda: pyrodiff.bound(other, x_0, compile=True, **options)
    return found


def samplers(case: Case, compile: bool) -> dict[str, Call]:
    """A batch of samples each way, and the bare network called as often."""
    program = case.diffusion(case.num_sampled).eval()
    found = {
        "bare network": bare_calls(case, [case.batch] * case.num_sampled),
        "the Pyro model": torch.no_grad()(lambda: program.model(num_samples=case.batch)),
    }
    if hasattr(pyrodiff, "AncestralSampler"):
        eager = pyrodiff.AncestralSampler(case.diffusion(case.num_sampled))
        found["AncestralSampler"] = lambda: eager(case.batch)
        if compile:
            compiled = pyrodiff.AncestralSampler(case.diffusion(case.num_sampled), compile=True)
            found["AncestralSampler, compiled"] = lambda: compiled(case.batch)
    return found
