"""The Swiss roll by several processes, a GPU each or on CPUs, each with batches of its own; or by one.

    torchrun --nproc-per-node 2 examples/multi_gpu.py
    python examples/multi_gpu.py

Half a minute on two cores, by two processes or one, and 1.283 ± 0.023 nats. It was run on CPUs alone, by gloo.

All learn the same parameters, from all batches together: SVI sums their gradients, and a step takes 256 data whatever
the number of processes. A checkpoint is left every 500 steps; started again, the script resumes where it stopped. The
bound of the test set is split among them, and equals that of a single process. Only the first and the last lines of
``main`` are for several processes.
"""

import os
from functools import partial
from pathlib import Path

import pyro
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import options

import pyrodiff
from pyrodiff import checkpoints, datasets, networks


def join() -> tuple[int, int, torch.device]:
    """The rank of this process, the number of processes, and its device."""
    count, device = int(os.environ.get("WORLD_SIZE", "1")), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if count == 1:
        return 0, 1, device
    torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return torch.distributed.get_rank(), count, device


def fit(x_0: torch.Tensor, num_steps: int, batch_size: int, path: Path) -> pyrodiff.Diffusion:
    """The diffusion with its averaged weights, trained on batches that each process draws for itself."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=128), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
    pair = diffusion.to(x_0.device).one_step()
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        partial(torch.optim.AdamW, lr=2e-3),
        pyrodiff.DiffusionELBO(),
        scheduler=partial(CosineAnnealingLR, T_max=num_steps),
        average=pyrodiff.exponential_average(0.99),
    )
    if path.exists():
        print(f"resumes at step {checkpoints.restore(path, svi)['step']}")
    while svi.num_steps < num_steps:
        svi.step(x_0[torch.randint(len(x_0), (batch_size,), device=x_0.device)])
        if svi.num_steps % 500 == 0 or svi.num_steps == num_steps:
            checkpoints.save(path, svi, step=svi.num_steps)  # called by all, written by the first
    svi.adopt_average()
    return diffusion


def main(out: Path, num_steps: int = 1500) -> pyrodiff.Bound:
    """Train, and let the first process print the bound, which all return."""
    number, count, device = join()
    pyro.set_rng_seed(number)  # where all have the same, SVI gives each its own
    diffusion = fit(datasets.swiss_roll(20000, seed=1).to(device), num_steps, 256 // count, out / "multi_gpu.pt")
    test_set = datasets.swiss_roll(5000, seed=2).to(device)
    bound = pyrodiff.bound(diffusion, test_set, generator=0, sharded=True)
    if number == 0:
        print(f"{count} process{'es' if count > 1 else ''} on {device.type}\n{bound}")
    if count > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return bound


if __name__ == "__main__":
    arguments = options(__doc__, 1500).parse_args()
    main(arguments.out, arguments.steps)
