"""Chains of few steps at their best: the times and the variance, found for a trained Swiss roll without more training.

    python examples/short_chains.py

About two minutes on an idle core, three on a shared one. Of T = 100 steps expect, in nats, each ± 0.05 or less but for
the first row (0.64 to 0.07; 0.16 at K = 100):

    variance, times         K = 5    K = 10    K = 20    K = 40   K = 100
    posterior, even         29.36      7.23      3.36      2.61      5.42
    posterior, best          1.97      1.86      1.78      1.79
    forward, even            2.21      1.88      1.46      1.22      1.06
    forward, best            1.73      1.47      1.26      1.17
    analytic, even           2.07      1.75      1.34      1.14      1.03
    analytic, best           1.55      1.37      1.19      1.11

Times and variance are chosen on training data, and the bounds are of new data.
"""

from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from training import options, train

import pyrodiff
from pyrodiff import datasets, networks

T, STEPS = 100, (5, 10, 20, 40)


def fit(num_steps: int = 3000) -> pyrodiff.Diffusion:
    """The diffusion of T steps, trained."""
    pyro.set_rng_seed(0)
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=T, first=7.5, last=-6.0))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=128), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
    train(diffusion, datasets.swiss_roll(20000, seed=1), num_steps, batch_size=256, lr=2e-3, name="swiss roll")
    return diffusion


def with_variance(diffusion: pyrodiff.Diffusion, variance: pyrodiff.Variance) -> pyrodiff.Diffusion:
    """The same networks, with another variance."""
    forward = diffusion.forward_process
    reverse = pyrodiff.GaussianReverse(forward, diffusion.reverse.denoiser, variance)
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


def evenly(num_steps: int) -> list[int]:
    """That many times, evenly spaced."""
    return torch.linspace(1, T, num_steps).round().int().tolist()


def main(out: Path, num_steps: int = 3000) -> dict[tuple[str, str, int], pyrodiff.Bound]:
    """Train, print the bounds and draw them; returns them by variance, times and number of steps."""
    whole = fit(num_steps)
    chosen_on, x_0 = datasets.swiss_roll(1500, seed=1), datasets.swiss_roll(2000, seed=2)
    variances = {
        "posterior": pyrodiff.PosteriorVariance(),
        "forward": pyrodiff.ForwardVariance(),
        "analytic": pyrodiff.analytic_variance(whole, datasets.swiss_roll(5000, seed=1), generator=0, progress=True),
    }
    bounds, times = {}, {}
    for name, variance in variances.items():
        diffusion = with_variance(whole, variance)
        bounds[name, "all", T] = pyrodiff.bound(diffusion, x_0, generator=1)
        for K in STEPS:
            best = pyrodiff.best_subchain(diffusion, chosen_on, num_steps=K, candidates=50, generator=0, progress=True)
            times[name, K] = best.forward_process.schedule.times
            bounds[name, "best", K] = pyrodiff.bound(best, x_0, generator=1)
            bounds[name, "even", K] = pyrodiff.bound(diffusion.subchain(evenly(K)), x_0, generator=1)
    print(f"bound on -log p in nats, ± its standard error; all {T} steps, or K of them")
    print(f"{'variance':12}{'times':8}" + "".join(f"{f'K = {K}':>18}" for K in (*STEPS, T)))
    for name in variances:
        for kind in ("even", "best"):
            found = [bounds[name, kind, K] for K in STEPS] + [bounds[name, "all", T]] * (kind == "even")
            cells = (f"{float(one.mean):9.3f} ± {float(one.standard_error(one.nats)):.3f}" for one in found)
            print(f"{name:12}{kind:8}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"  the best {STEPS[1]} times: {', '.join(map(str, times['analytic', STEPS[1]]))}")
    draw(bounds, times, out / "short_chains.png")
    print(f"  picture: {out / 'short_chains.png'}")
    return bounds


def draw(bounds: dict, times: dict, path: Path) -> None:
    """The bounds by the number of steps, and the times that were chosen."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, name in enumerate(dict.fromkeys(name for name, _ in times)):
        for kind, line in (("even", ":"), ("best", "-")):
            nats = [float(bounds[name, kind, K].mean) for K in STEPS]
            left.plot(STEPS, nats, line, color=f"C{color}", marker=".", label=f"{name}, {kind}")
        for K in STEPS:
            height = [STEPS.index(K) + 0.2 * (1 - color)] * K
            right.plot(times[name, K], height, ".", color=f"C{color}", markersize=4)
    left.set(xscale="log", yscale="symlog", xlabel="number of steps K", ylabel="bound in nats")
    left.set_xticks(STEPS, map(str, STEPS))
    left.minorticks_off()
    left.legend(fontsize=7)
    right.set(xlabel="t", yticks=range(len(STEPS)), yticklabels=[f"K = {K}" for K in STEPS], title="the best times")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    arguments = options(__doc__, 3000).parse_args()
    main(arguments.out, arguments.steps)
