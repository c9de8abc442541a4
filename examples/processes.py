"""The Swiss roll by several processes, each with batches of its own; or by one.

    python examples/processes.py
    torchrun --nproc-per-node 2 examples/processes.py

All learn the same parameters, from all batches together: SVI sums what they find. Nothing here but the first and the
last lines of ``main`` says that there are several. Whatever their number, a step takes 256 data.
"""

import os
from functools import partial

import pyro
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyrodiff
from pyrodiff import datasets, networks


def join() -> tuple[int, int, torch.device]:
    """Which process this is, of how many, and the device that it has for itself."""
    count, device = int(os.environ.get("WORLD_SIZE", "1")), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if count == 1:
        return 0, 1, device
    torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return torch.distributed.get_rank(), count, device


def fit(x_0: torch.Tensor, num_steps: int, batch_size: int, lr: float = 2e-3) -> pyrodiff.Diffusion:
    """The diffusion with its averaged weights, trained on batches that are drawn by each process for itself."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=128), forward)
    reverse = pyrodiff.GaussianReverse(forward, denoiser)
    pair = pyrodiff.Diffusion(forward, reverse, event_shape=(2,)).to(x_0.device).one_step()
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        partial(torch.optim.AdamW, lr=lr),
        pyrodiff.DiffusionELBO(),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=num_steps),
        average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
    )
    for _ in range(num_steps):
        svi.step(x_0[torch.randint(len(x_0), (batch_size,), device=x_0.device)])
    svi.adopt_average()
    return pyrodiff.Diffusion(forward, reverse.eval(), event_shape=(2,))


def main(num_steps: int = 1500) -> None:
    """Train, and let the first process print the bound."""
    number, count, device = join()
    pyro.set_rng_seed(number)  # where all have the same, SVI gives each its own
    diffusion = fit(datasets.swiss_roll(20000, seed=1).to(device), num_steps, batch_size=256 // count)
    if number == 0:
        print(f"{count} process{'es' if count > 1 else ''} on {device.type}")
        print(pyrodiff.bound(diffusion, datasets.swiss_roll(5000, seed=2).to(device)))
    if count > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
