"""Digits in few steps: what a learned schedule, the best variance and the best times gain, at T = 10, 30 and 100.

    python examples/few_steps.py

About an hour on one core: one network trained with T = 1000, and two for each of the others, all alike. Bits per
dimension of the test split, each ± 0.02 or less (the first number of two rows ± 0.06):

                                            T = 10     T = 30    T = 100
    of T = 1000, even times                  5.467      2.367      1.879
    of T = 1000, even, best variance         3.197      2.104      1.824
    of T = 1000, best times and variance     2.006      1.833      1.790
    trained so, fixed schedule               5.469      2.361      1.878
    the same, best variance                  3.198      2.099      1.822
    trained so, learned schedule             2.141      1.940      1.900
    the same, best variance                  2.124      1.869      1.811

Training in few steps gains nothing over cutting a chain of many, unless the schedule is learned; the best times and
variance of the long chain, for which nothing is trained, gain most.
"""

import math
from pathlib import Path

import digits
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from training import options

import pyrodiff
from pyrodiff import datasets

T, STEPS = 1000, (10, 30, 100)


def fitted(schedule: pyrodiff.Schedule, k: Tensor, num_steps: int) -> pyrodiff.Diffusion:
    """The diffusion of `digits.py` with this schedule, trained."""
    pyro.set_rng_seed(0)
    diffusion = digits.build("level", k, schedule)
    digits.fit(diffusion, k, num_steps)
    return diffusion


def with_best_variance(diffusion: pyrodiff.Diffusion, x_0: Tensor) -> pyrodiff.Diffusion:
    """The same networks, with the optimal variance given their own error on these data."""
    forward, denoiser = diffusion.forward_process, diffusion.reverse.denoiser
    variance = pyrodiff.analytic_variance(diffusion, x_0, generator=0)
    reverse = pyrodiff.GaussianReverse(forward, denoiser, variance)
    return pyrodiff.Diffusion(forward, reverse, (8, 8), diffusion.model.decoder)


def evenly(num_steps: int) -> list[int]:
    """That many times, evenly spaced."""
    return torch.linspace(1, T, num_steps).round().int().tolist()


def main(out: Path, num_steps: int = 2200) -> dict[tuple[str, int], Tensor]:
    """Train, print the table and draw it; returns bits per dimension of each datum, by row and number of steps."""
    k = datasets.digits("train")
    chosen_on, x_0 = (pyrodiff.from_levels(datasets.digits(split), digits.LEVELS) for split in ("validation", "test"))
    found: dict[tuple[str, int], Tensor] = {}

    def note(name: str, diffusion: pyrodiff.Diffusion) -> None:
        nats = pyrodiff.bound(diffusion, x_0, generator=1).nats
        found[name, diffusion.num_steps] = bits = nats / math.log(2) / 64
        error = pyrodiff.Bound.standard_error(bits)
        print(f"{name:42}T = {diffusion.num_steps:4} {bits.mean():8.3f} ± {error:.3f} bits/dim", flush=True)

    whole = fitted(pyrodiff.LogSNRSchedule(T), k, num_steps)
    best = with_best_variance(whole, chosen_on)
    for K in STEPS:
        note("of T = 1000, even times", whole.subchain(evenly(K)))
        note("of T = 1000, even, best variance", best.subchain(evenly(K)))
        short = pyrodiff.best_subchain(best, chosen_on, num_steps=K, candidates=120, generator=0)
        note("of T = 1000, best times and variance", short)
    for K in STEPS:
        learned = pyrodiff.LearnedLogSNRSchedule(K, 9.0, -9.0, hidden=256)
        for name, schedule in {"fixed schedule": pyrodiff.LogSNRSchedule(K), "learned schedule": learned}.items():
            diffusion = fitted(schedule, k, num_steps)
            note(f"trained so, {name}", diffusion)
            note(f"trained so, {name}, best variance", with_best_variance(diffusion, chosen_on))
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for i, name in enumerate(dict.fromkeys(name for name, _ in found)):
        means = [float(found[name, K].mean()) for K in STEPS]
        errors = [float(pyrodiff.Bound.standard_error(found[name, K])) for K in STEPS]
        axes.errorbar(STEPS, means, errors, marker="o", markersize=3, label=name, ls="-" if i < 3 else "--")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="bits per dimension")
    axes.set_xticks(STEPS, [str(K) for K in STEPS])
    axes.set_yticks([2, 3, 4, 5], ["2", "3", "4", "5"])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(out / "few_steps.png", dpi=130)
    print(f"picture: {out / 'few_steps.png'}")
    return found


if __name__ == "__main__":
    arguments = options(__doc__, 2200).parse_args()
    main(arguments.out, arguments.steps)
