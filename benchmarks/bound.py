"""What the bound costs beside its network calls: all T = 1000 terms of N pictures, against the bare network.

Run with ``python benchmarks/bound.py``; about three minutes on two cores. The bare network is called on states and
times at hand, in batches of the same size, without gradients. The two are interleaved in one process, and each figure
is the median of its rounds, so that what else the machine does falls on both alike.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import pyro
import torch

import pyrodiff
from pyrodiff import networks
from pyrodiff.evaluation import rows_within

T = 1000


def bound_of(diffusion: pyrodiff.Diffusion, x_0: torch.Tensor) -> Callable[[], object]:
    """All terms of the bound."""
    return lambda: pyrodiff.bound(diffusion, x_0)


def bare_calls(network: torch.nn.Module, x_0: torch.Tensor, rows: int) -> Callable[[], object]:
    """The network alone, as often, on batches as large."""
    x_t, t = torch.randn(rows, *x_0.shape[1:]), torch.randint(1, T + 1, (rows,))
    sizes = [rows] * (T * len(x_0) // rows) + [T * len(x_0) % rows]

    @torch.no_grad()
    def calls() -> None:
        for size in sizes:
            if size:
                network(x_t[:size], t[:size])

    return calls


def cases() -> dict[str, tuple[pyrodiff.Diffusion, torch.Tensor]]:
    """Models by name, and data."""
    found = {}
    for name, shape, channels, number, levels in (
        ("U-Net 8 x 8, noise", (8, 8), (32, 64), 16, None),
        ("U-Net 8 x 8, 17 levels", (8, 8), (32, 64), 16, 17),
        ("U-Net 32 x 32, noise", (1, 32, 32), (32, 64, 128), 2, None),
    ):
        forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T))
        network = networks.UNet(shape, channels, outputs=levels).eval()
        denoiser = (
            pyrodiff.LevelPrediction(network, forward, levels) if levels else pyrodiff.NoisePrediction(network, forward)
        )
        reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.PosteriorVariance())
        diffusion = pyrodiff.Diffusion(forward, reverse, shape, pyrodiff.DiscretizedDecoder(17))
        found[name] = diffusion, pyrodiff.dequantize(torch.randint(17, (number, *shape)), 17)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each (default: 7)")
    arguments = parser.parse_args()
    pyro.set_rng_seed(0)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, (diffusion, x_0) in cases().items():
        rows = rows_within(2**28, diffusion, x_0)
        pair = bound_of(diffusion, x_0), bare_calls(diffusion.reverse.denoiser.network, x_0, rows)
        times = [[], []]
        for round_ in range(arguments.rounds + 1):
            for kept, call in zip(times, pair, strict=True):
                start = time.perf_counter()
                call()
                if round_ > 0:  # the first is a warm-up
                    kept.append(time.perf_counter() - start)
        ours, bare = (statistics.median(kept) for kept in times)
        per_call = 1e6 * bare / (T * len(x_0))
        print(
            f"{name:24} N T = {T * len(x_0)} calls, {rows} a batch: bound {ours:7.2f} s, bare {bare:7.2f} s "
            f"({per_call:.0f} µs a call), ratio {ours / bare:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
