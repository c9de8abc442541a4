"""The Swiss roll in few steps: the bound with schedules and variances that are fixed or learned, trained alike.

    python examples/learned_schedule.py

Three minutes on one core. Expect, in nats ± 0.02 or less, beside what is above the exact cost of the same points, 0.958
(the entropy is 0.964), with T = 10 and with -T 40:

                                             T = 10  above    T = 40  above
    fixed                                     1.818  0.859     1.253  0.295
    learned betas                             1.712  0.754     1.245  0.287
    learned log SNR                           1.460  0.501     1.193  0.234
    fixed, RangeVariance                      1.408  0.450     1.084  0.126
    fixed, DiagonalVariance                   1.408  0.449     1.083  0.125
    fixed, DiagonalVariance, hybrid loss      1.542  0.584     1.143  0.184
    learned log SNR, DiagonalVariance         1.181  0.222     1.068  0.109

If the ends of the log signal-to-noise ratio are learned too, the prior term, L_T, costs more, and the others less.
"""

from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from training import options, train

import pyrodiff
from pyrodiff import datasets, networks

FIRST, LAST, ENTROPY = 7.5, -6.0, 0.9638


def build(schedule: pyrodiff.Schedule, variance: pyrodiff.Variance | None = None) -> pyrodiff.Diffusion:
    """A diffusion with this schedule and this variance, beta_t if none is given, untrained."""
    pyro.set_rng_seed(0)
    forward = pyrodiff.GaussianForward(schedule)
    outputs = 2 if isinstance(variance, pyrodiff.LearnedVariance) else None
    network = networks.MLP(event_shape=(2,), hidden=128, outputs=outputs)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(network, forward), variance)
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


def models(T: int) -> dict[str, pyrodiff.Diffusion]:
    """All models that are trained; learned schedules and variances start at, or near, the fixed ones."""
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
        "fixed, DiagonalVariance, hybrid loss": build(fixed, pyrodiff.DiagonalVariance()),
        "learned log SNR, DiagonalVariance": build(log_snr[1], pyrodiff.DiagonalVariance()),
    }


def frozen(schedule: pyrodiff.LearnedBetaSchedule, diffusion: pyrodiff.Diffusion, num_steps: int) -> list[float]:
    """Frozen noise (Sohl-Dickstein et al., 2015): the bound of one batch while its schedule is learned with one seed.

    The trajectory pair has all t at once: the bound of the batch is then a fixed function of the schedule.
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
    axes = (figure := Figure(figsize=(5, 4), layout="constrained")).subplots()
    for name, diffusion in models(T).items():
        pyro.set_rng_seed(0)
        weighting = pyrodiff.HybridWeighting() if "hybrid" in name else None
        train(diffusion, data, num_steps, batch_size=256, lr=2e-3, name=name, weighting=weighting)
        schedule = diffusion.forward_process.schedule
        label = "fixed, and all before training" if name == "fixed" else f"{name}, after"
        if "fixed, " not in name:
            axes.plot(t, schedule.log_snr(t).detach(), "o-", markersize=3, label=label)
        bounds[name] = bound = pyrodiff.bound(diffusion, x_0, num_particles=4, generator=1)
        found = (f"{nats.mean():.3f} ± {bound.standard_error(nats):.3f}" for nats in (bound.nats, bound.nats - exact))
        print(f"{name}, T = {T}: {' nats, '.join(found)} above the exact", flush=True)
        if name == "learned betas":
            losses = frozen(schedule, diffusion, min(num_steps, 20))
            print(f"  one batch with frozen noise: {losses[0]:.3f} nats, {losses[-1]:.3f} after {len(losses)} steps")
    axes.set(xlabel="t", ylabel="log signal-to-noise ratio")
    axes.legend()
    figure.savefig(out / "learned_schedule.png", dpi=130)
    print(f"  picture: {out / 'learned_schedule.png'}")
    return bounds


if __name__ == "__main__":
    parser = options(__doc__, 2000)
    parser.add_argument("-T", type=int, default=10, help="steps of the chain (default: 10)")
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps, arguments.T)
