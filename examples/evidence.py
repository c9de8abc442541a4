"""Evidence against the truth: log p(y) of a noisy observation of a diffusion, over the noise.

    python examples/evidence.py

Ten seconds on one core. Of eight Gaussians on a circle the first number is observed as y = 1, with noise. The evidence
of the data is in closed form; that of a chain of 200 steps, whose denoiser is exact, is estimated by 512 particles.
Expect them to agree up to the difference of 200 steps from a diffusion in continuous time:

   noise    truth  particles
    0.03   -0.718     -0.730 ± 0.012
    0.06   -0.736     -0.744 ± 0.011
    0.12   -0.799     -0.802 ± 0.009
    0.25   -0.984     -0.985 ± 0.003
    0.50   -1.250     -1.239 ± 0.004
    1.00   -1.511     -1.514 ± 0.005
    2.00   -1.831     -1.830 ± 0.001
"""

import math
from pathlib import Path

import torch
from inpainting import CENTERS, VARIANCE, EightGaussians
from matplotlib.figure import Figure
from training import options

import pyrodiff
from pyrodiff import Inpainting, posterior

KNOWN = torch.tensor([True, False])


def truth(y: float, noise: float) -> float:
    """log p(y) of the data."""
    law = torch.distributions.Normal(CENTERS[:, 0].double(), (VARIANCE + noise**2) ** 0.5)
    return float(law.log_prob(torch.tensor(y).double()).logsumexp(0)) - math.log(8)


def main(out: Path, num_steps: int = 200, num_particles: int = 512) -> dict[float, tuple[float, float, float]]:
    """Print and draw the evidence; returns the truth, the estimate and its standard error for each noise."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=num_steps))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, EightGaussians(forward)), (2,))
    found = {}
    print(f"{'noise':>8}{'truth':>9}{'particles':>11}")
    for noise in (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0):
        one = posterior(
            diffusion, Inpainting(KNOWN, torch.tensor([1.0, 0.0]), noise), num_particles=num_particles, generator=0
        )
        found[noise] = truth(1.0, noise), float(one.log_evidence), float(one.standard_error)
        print("{:8.2f}{:9.3f}{:11.3f} ± {:.3f}".format(noise, *found[noise]))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    line = torch.logspace(-1.6, 0.4, 100).tolist()
    axes.plot(line, [truth(1.0, noise) for noise in line], color="0.4", label="truth")
    values, errors = [one for _, one, _ in found.values()], [2 * error for *_, error in found.values()]
    axes.errorbar(list(found), values, errors, fmt="o", color="#b5452c", capsize=3, label="particles ± 2 s.e.")
    axes.set(xscale="log", xlabel="deviation of the noise", ylabel="log p(y) in nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out / "evidence.png", dpi=130)
    print(f"  picture: {out / 'evidence.png'}")
    return found


if __name__ == "__main__":
    main(options(__doc__).parse_args().out)
