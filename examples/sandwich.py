"""The sandwich around log p: bounds and the probability flow, on four models whose likelihood is known.

    python examples/sandwich.py

Half a minute on two cores. Each number is a mean over the same data, in nats, and
ELBO <= IW_2 <= IW_64 <= log p: with perturbed kernels -2.165, -2.126, -2.084 and -2.080. The last column is the largest
difference of the flow from the truth over the data: the flow is another model than the chain, the same only if the
denoiser is exact and the steps are small. The truth is

- exact kernels: the distribution of the data, N(m, v), which the chain then has;
- perturbed kernels: each mean of a kernel moved by 0.2 of its scale; the chain is linear and Gaussian, so its moments
  are propagated from step to step;
- eight Gaussians, T = 1000, the exact denoiser: the density of the data; the chain's own is lower in expectation;
- bits: a chain of 4 steps on 3 bits, all 2^12 trajectories summed.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from known_models import bits, eight_gaussians, gaussian
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from training import options

import pyrodiff

PARTICLES = (1, 2, 4, 8, 16, 32, 64)


def row(name: str, diffusion: pyrodiff.Diffusion, x_0: Tensor, log_p: Tensor) -> dict:
    """All estimates for one model, printed as a line."""
    weighted = pyrodiff.importance_bound(diffusion, x_0, num_particles=PARTICLES[-1], generator=0, progress=True)
    draws = 16 if diffusion.num_steps > 100 else 400
    estimates = {"ELBO": -pyrodiff.bound(diffusion, x_0, num_particles=draws, generator=0).nats}
    estimates |= {f"IW_{k}": -weighted.at(k) for k in PARTICLES} | {"log p": log_p}
    flow = None
    if isinstance(diffusion.forward_process, pyrodiff.GaussianForward):
        flow = estimates["flow"] = pyrodiff.ode_log_prob(diffusion, x_0, tolerance=1e-6).log_prob
    line = f"{name:28}"
    for column in ("ELBO", "IW_2", "IW_64", "log p", "flow"):
        line += f"{float(estimates[column].mean()):11.4f}" if column in estimates else f"{'-':>11}"
    gap = estimates["log p"] - estimates["ELBO"]
    line += f"{float(gap.mean()):11.4f} ± {float(pyrodiff.Bound.standard_error(gap)):.4f}"
    print(line + (f"{float((flow - log_p).abs().max()):13.1e}" if flow is not None else f"{'-':>13}"), flush=True)
    return estimates


def draw(axes: Axes, name: str, estimates: dict[str, Tensor]) -> None:
    """The gap to the truth against K, with five standard errors of it."""
    gaps = [estimates[f"IW_{k}"] - estimates["log p"] for k in PARTICLES]
    errors = [5 * float(pyrodiff.Bound.standard_error(gap)) for gap in gaps]
    axes.errorbar(
        PARTICLES, [float(gap.mean()) for gap in gaps], errors, color="#b5452c", marker="o", ms=3, label="bounds"
    )
    axes.axhline(0, color="#1f4e79", label="log p")
    if "flow" in estimates:
        flow = float((estimates["flow"] - estimates["log p"]).mean())
        axes.axhline(flow, color="#444444", linestyle=":", label="probability flow")
    axes.set_xscale("log", base=2)
    axes.set(title=name, xlabel="K (1: the ELBO)")
    axes.legend(frameon=False, fontsize=8)


def main(out: Path) -> dict[str, dict[str, Tensor]]:
    """Print the table, draw the picture; returns the estimates, one per datum."""
    torch.manual_seed(0)
    cases: dict[str, Callable] = {
        "exact kernels, T = 12": lambda: gaussian(0.0),
        "perturbed kernels, T = 12": lambda: gaussian(0.2),
        "eight Gaussians, T = 1000": eight_gaussians,
        "bits, T = 4": bits,
    }
    header = "".join(f"{column:>11}" for column in ("ELBO", "IW_2", "IW_64", "log p", "flow"))
    print(f"{'mean log p(x_0), nats':28}{header}{'log p - ELBO':>20}{'flow is off':>13}")
    tables = {name: row(name, *build()) for name, build in cases.items()}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (name, estimates) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
        draw(axes, name, estimates)
    figure.axes[0].set_ylabel("nats from log p (bars: 5 s.e.)")
    figure.savefig(out / "sandwich.png", dpi=130)
    print(f"picture: {out / 'sandwich.png'}")
    return tables


if __name__ == "__main__":
    main(options(__doc__).parse_args().out)
