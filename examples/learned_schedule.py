"""The Swiss roll in few steps: the bound with schedules and variances that are fixed or learned, trained alike.

    python examples/learned_schedule.py
"""

from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from training import options, train

import pyrodiff
from pyrodiff import datasets, networks

FIRST, LAST, ENTROPY = 7.5, -6.0, 0.9638


class Hybrid(pyrodiff.Diffusion):
    """One whose mean is trained by the simple loss, and whose variance alone by the bound."""

    def one_step(self, **parts: Any) -> pyrodiff.OneStep:
        return super().one_step(weighting=pyrodiff.HybridWeighting(), **parts)


def build(
    schedule: pyrodiff.Schedule, variance: pyrodiff.Variance | None = None, kind: type = pyrodiff.Diffusion
) -> pyrodiff.Diffusion:
    """A diffusion with this schedule and this variance, beta_t if none is given, untrained."""
    pyro.set_rng_seed(0)
    forward = pyrodiff.GaussianForward(schedule)
    outputs = 2 if isinstance(variance, pyrodiff.LearnedVariance) else None
    network = networks.MLP(event_shape=(2,), hidden=128, outputs=outputs)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(network, forward), variance)
    return kind(forward, reverse, event_shape=(2,))


def models(T: int) -> dict[str, pyrodiff.Diffusion]:
    """All that is trained; learned schedules start as the fixed one is, or nearly, and so do learned variances."""
    pyro.set_rng_seed(0)
    fixed = pyrodiff.LogSNRSchedule(T, FIRST, LAST)
    betas = pyrodiff.LearnedBetaSchedule(fixed.beta(torch.arange(1, T + 1)))
    log_snr = [pyrodiff.LearnedLogSNRSchedule(T, FIRST, LAST, hidden=128) for _ in range(2)]
    return {
        "fixed": build(fixed),
        "learned betas": build(betas),
        "learned log SNR": build(log_snr[0]),
        "fixed, RangeVariance": build(fixed, pyrodiff.RangeVariance()),
        "fixed, DiagonalVariance": build(fixed, pyrodiff.DiagonalVariance()),
        "fixed, DiagonalVariance, hybrid loss": build(fixed, pyrodiff.DiagonalVariance(), Hybrid),
        "learned log SNR, DiagonalVariance": build(log_snr[1], pyrodiff.DiagonalVariance()),
    }


def frozen(schedule: pyrodiff.LearnedBetaSchedule, diffusion: pyrodiff.Diffusion, num_steps: int) -> list[float]:
    """2015's frozen noise: the bound of one batch, as a copy of its schedule learns with the same noise at each step.

    The trajectory pair has all t at once; one seed before each step makes its noise a constant, and the bound of the
    batch a fixed function of the schedule.
    """
    x_0 = datasets.swiss_roll(256, seed=1)
    svi = pyrodiff.SVI(
        diffusion.model,
        diffusion.guide,
        lambda parameters: torch.optim.Adam(schedule.parameters(), lr=1e-2),
        pyrodiff.DiffusionELBO(),
    )
    bounds = []
    for _ in range(num_steps):
        pyro.set_rng_seed(0)
        bounds.append(float(svi.step(x_0)) / len(x_0))
    return bounds


def main(out: Path, num_steps: int = 2000, T: int = 10) -> dict[str, pyrodiff.Bound]:
    """Train all, print the bounds beside the exact cost, draw the schedules before and after; returns the bounds."""
    t, bounds, x_0 = torch.arange(1, T + 1), {}, datasets.swiss_roll(5000, seed=2)
    data, exact = datasets.swiss_roll(20000, seed=1), -datasets.swiss_roll_log_prob(x_0)
    print(f"exact, of these data: {exact.mean():.3f} nats; of all, the entropy: {ENTROPY}")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, diffusion in models(T).items():
        pyro.set_rng_seed(0)
        train(diffusion, data, num_steps, batch_size=256, lr=2e-3, name=name)
        schedule = diffusion.forward_process.schedule
        if "Variance" not in name:
            label = "fixed, and all before training" if name == "fixed" else f"{name}, after"
            axes.plot(t, schedule.log_snr(t).detach(), "o-", markersize=3, label=label)
        bounds[name] = bound = pyrodiff.bound(diffusion, x_0, num_particles=4, generator=1)
        over = bound.nats - exact
        above = f"{over.mean():.3f} ± {bound.standard_error(over):.3f} above the exact"
        print(f"{name}, T = {T}: {bound.mean:.3f} ± {bound.standard_error(bound.nats):.3f} nats, {above}", flush=True)
        if name == "learned betas":
            losses = frozen(schedule, diffusion, min(num_steps, 20))
            print(f"  one batch with frozen noise: {losses[0]:.3f} nats, {losses[-1]:.3f} after {len(losses)} steps")
    axes.set_xlabel("t")
    axes.set_ylabel("log signal-to-noise ratio")
    axes.legend()
    figure.savefig(out / "learned_schedule.png", dpi=130)
    print(f"  picture: {out / 'learned_schedule.png'}")
    return bounds


if __name__ == "__main__":
    parser = options(__doc__, 2000)
    parser.add_argument("-T", type=int, default=10, help="steps of the chain (default: 10)")
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps, arguments.T)
