"""Samples for few network calls: how far the draws of each sampler are from the data, at 5 to 1000 calls per sample.

    python examples/fast_sampling.py

Five minutes on an idle core, ten on a shared one. Expect 1000 times the energy distance to fresh draws of the data
(eight Gaussians with their exact denoiser, and a Swiss roll and digits that are trained on), of T = 1000, at

    network calls            5    10    20    50      5    10    20    50      5    10    20    50
    ancestral              122   7.6   0.4  -0.6    3.6   0.3   0.0  -0.4    239    27    11   9.2
    DDIM                    83    15   2.3  -0.3     47   8.1   1.4  -0.1    194    46    17   7.7
    DPM-Solver++(2M)        61   3.9  -0.4  -0.6    3.9   0.2  -0.1  -0.2     77   8.3   5.1   5.0
    Heun                 16178   675   7.6  -0.5   3159    54   1.1  -0.1    762   106    10   4.6
    predictor-corrector   2897   116   3.7  -0.8    9.4   2.3   0.6  -0.4    305   233    28    12
    annealed Langevin      219    11   2.0   1.9

Each is about ± 1 or, above 10, a tenth or less; of digits ± 3 at least. Exact draws are ± 0.9, 0.5 and 1.1 from 0. More
calls make no visible difference.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import known_models
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from training import options, train

import pyrodiff
from pyrodiff import DiscretizedDecoder, GaussianForward, GaussianReverse, datasets, networks

CALLS, NUM_DATA, SIGMA_MIN = (5, 10, 20, 50, 100, 300, 1000), 8000, 0.02
distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


def problems(num_steps: int) -> Iterator[tuple[str, pyrodiff.Diffusion, Callable[[int, int], Tensor], int, int]]:
    """Name, diffusion, draws of the data by number and seed, the number of samples, and the most calls for each."""
    train_for, T = partial(train, num_steps=num_steps, lr=3e-3, average=0.995), 1000
    forward = GaussianForward(pyrodiff.GeometricSchedule(T, SIGMA_MIN, sigma_max=50.0))
    denoiser = pyrodiff.DataPrediction(known_models.EightGaussians(forward), forward)
    diffusion = pyrodiff.Diffusion(forward, GaussianReverse(forward, denoiser), (2,))
    yield "eight Gaussians", diffusion, datasets.eight_gaussians, 4000, 1000
    forward = GaussianForward(pyrodiff.LogSNRSchedule(T, first=7.5, last=-6.0))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP((2,), hidden=64), forward)
    diffusion = pyrodiff.Diffusion(forward, GaussianReverse(forward, denoiser), (2,))
    train_for(diffusion, datasets.swiss_roll(20000, seed=1), batch_size=256, name="Swiss roll")
    yield "Swiss roll", diffusion, datasets.swiss_roll, 2000, 1000
    forward, strokes = GaussianForward(pyrodiff.LogSNRSchedule(T)), datasets.Strokes(k := datasets.digits())
    denoiser = pyrodiff.LevelPrediction(networks.UNet((8, 8), channels=(16, 32), outputs=17), forward, 17)
    diffusion = pyrodiff.Diffusion(forward, GaussianReverse(forward, denoiser), (8, 8), DiscretizedDecoder(17))
    draw = lambda n, seed=0: pyrodiff.from_levels(strokes(torch.randint(len(k), (n,))), 17)  # noqa: E731 - always new
    train_for(diffusion, draw, batch_size=64, name="digits")
    yield "digits", diffusion, draw, 800, 100


def samplers(diffusion: pyrodiff.Diffusion) -> Iterator[tuple[str, pyrodiff.Sampler, int]]:
    """The samplers, and how many calls each makes per step."""
    yield "ancestral", pyrodiff.AncestralSampler(diffusion), 1
    yield "DDIM", pyrodiff.DDIMSampler(diffusion), 1
    yield "DDIM, eta = 1", pyrodiff.DDIMSampler(diffusion, eta=1.0), 1
    yield "DPM-Solver++(2M)", pyrodiff.DPMSolverSampler(diffusion), 1
    yield "Heun", pyrodiff.HeunSampler(diffusion), 2
    yield "Heun, churn = 10", pyrodiff.HeunSampler(diffusion, churn=10.0), 2
    yield "predictor-corrector", pyrodiff.PredictorCorrectorSampler(diffusion), 2
    if isinstance(diffusion.forward_process.schedule, pyrodiff.GeometricSchedule):
        yield "annealed Langevin", pyrodiff.AnnealedLangevinSampler(diffusion, 2 * SIGMA_MIN**2, num_updates=1), 1


def energy(x: Tensor, y: Tensor, of_y: Tensor) -> tuple[float, float]:
    """2 E|x - y| - E|x - x'| - E|y - y'|, which is 0 only for equal distributions: unbiased, and its error."""
    x = x.flatten(1)
    across, of_x = distances(x, y), distances(x, x).sum(1) / (len(x) - 1)
    rows, columns = 2 * (across.mean(1) - of_x), 2 * (across.mean(0) - of_y)
    error = (rows.var() / len(rows) + columns.var() / len(columns)).sqrt()
    return float(2 * across.mean() - of_x.mean() - of_y.mean()), float(error)


def main(out: Path, num_steps: int = 3000) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Train, sample, print and draw; returns calls, energy distance and its error, by the data and the sampler."""
    pyro.set_rng_seed(0)
    found, floors = {}, {}
    for name, diffusion, data, n, most in problems(num_steps):
        y, calls, rows = data(NUM_DATA, 2).flatten(1), [number for number in CALLS if number <= most], []
        of_y = distances(y, y).sum(1) / (len(y) - 1)
        diffusion.reverse.denoiser.register_forward_hook(lambda _, given, x, rows=rows: rows.append(len(x)))
        floors[name] = torch.tensor([energy(data(n, 3 + i), y, of_y)[0] for i in range(10)]).square().mean().sqrt()
        print(f"{name}: 1000 × energy distance; of exact draws ± {1000 * floors[name]:.1f}")
        print(f"{'network calls':22}" + "".join(f"{number:>9}      " for number in calls))
        draws = {kind: [partial(one, num_steps=-(-k // of)) for k in calls] for kind, one, of in samplers(diffusion)}
        for kind, ways in {**draws, "flow": [pyrodiff.FlowSampler(diffusion, tolerance=1e-2)]}.items():
            for way in ways:
                rows.clear()
                x = way(n, generator=1)
                found.setdefault((name, kind), []).append((sum(rows) / n, *energy(x, y, of_y)))
            print(f"{kind:22}" + "".join(f"{1000 * e:>9.1f} ± {1000 * s:<4.1f}" for _, e, s in found[name, kind]))
        print(f"  (the flow at {found[name, 'flow'][0][0]:.0f} calls)", flush=True)
    draw(found, floors, out / "fast_sampling.png")
    print(f"picture: {out / 'fast_sampling.png'}")
    return found


def draw(found: dict, floors: dict, path: Path) -> None:
    """Plot the errors against the calls, none below that of exact draws; up to twice that is shaded."""
    figure, kinds = Figure(figsize=(12, 4), layout="constrained"), dict.fromkeys(kind for _, kind in found)
    for axes, (name, floor) in zip(figure.subplots(1, len(floors)), floors.items(), strict=True):
        axes.axhspan(0, 2 * floor, color="0.9")
        for kind in kinds:
            calls, errors, _ = zip(*found.get((name, kind), [(1, float("nan"), 0)]), strict=True)
            axes.plot(calls, [max(e, floor) for e in errors], "o-", markersize=3, label=kind)
        axes.set(xscale="log", yscale="log", title=name, xlabel="network calls", ylabel="energy distance")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    arguments = options(__doc__, 3000).parse_args()
    main(arguments.out, arguments.steps)
