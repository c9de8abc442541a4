"""What a training step costs as it is, compiled, and as one CUDA graph: the network and the data of MNIST as bits.

Run with ``python benchmarks/captured.py --data FOLDER``, the folder of ``examples/binarized_mnist.py``; two minutes
on a GPU, most of it compiling. With ``--small`` it runs on a CPU too, where there is no CUDA graph.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import pyro
import torch

import pyrodiff
from pyrodiff import datasets

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import binarized_mnist
import scores


def seconds(svi: pyrodiff.SVI, grey: torch.Tensor, batch: int, number: int) -> float:
    """The time of a step, in seconds, in the mean of so many."""
    begun, losses = time.perf_counter(), []
    for _ in range(number):
        losses.append(svi.step(torch.bernoulli(grey[torch.randint(len(grey), (batch,), device=grey.device)])))
    float(losses[-1])  # waits for the device
    return (time.perf_counter() - begun) / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files, gzipped or not")
    parser.add_argument("--batch", type=int, default=128, help="pictures per step (default: 128)")
    parser.add_argument("--number", type=int, default=60, help="steps that are timed (default: 60)")
    parser.add_argument("--small", action="store_true", help="the small network")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    grey = (datasets.idx_folder(arguments.data).float() / 255).to(device)
    for name, is_compiled, is_captured in (
        ("as it is", False, False),
        ("compiled", True, False),
        ("as one CUDA graph", True, True),
    )[: 3 if cuda else 2]:
        pyro.set_rng_seed(0)
        diffusion = binarized_mnist.build(grey, scores.SMALL if arguments.small else scores.FULL, device)
        pair = diffusion.one_step(drawing=pyrodiff.LossSecondMoment(diffusion.num_steps))
        rate = torch.tensor(5e-4, device=device) if is_captured else 5e-4
        svi = pyrodiff.SVI(
            pair.model,
            pair.guide,
            partial(torch.optim.AdamW, lr=rate, fused=True, **({"capturable": True} if is_captured else {})),
            pyrodiff.DiffusionELBO(),
            clip_norm=1000.0 * arguments.batch,
            autocast=torch.bfloat16 if cuda else None,
            average=pyrodiff.exponential_average(0.999),
            compile=is_compiled,
        )
        first = 8 * seconds(svi, grey, arguments.batch, 8)  # the graphs are made meanwhile
        each = seconds(svi, grey, arguments.batch, arguments.number)
        print(f"{name:20}{1000 * each:8.2f} ms a step; the first eight took {first:.1f} s", flush=True)
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
