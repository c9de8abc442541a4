"""What is missing, given what is known: one number of eight Gaussians, and the lower half of a digit.

    python examples/inpainting.py

About a minute on one core. Of eight Gaussians, the first number known up to N(0, 0.1²), expect the second's deviation
around its mean, 0 (in closed form, by particles, and by replacement, which is biased), and the log evidence:

    first    truth  particles  replaced     data    chain
     1.00    0.957      0.947     0.940   -0.775   -0.807 ± 0.019
     0.00    1.418      1.412     1.285   -0.898   -0.962 ± 0.007
    -1.40    0.611      0.625     0.822   -1.191   -1.216 ± 0.010
     2.50    0.224      0.244     0.453  -11.675  -10.914 ± 0.031

Of six digits of which the upper half is known, the lower half's mean has a squared error of 0.090 per pixel, where the
particles' spread says 0.099; the mean digit has 0.128. A score of outliers: the log evidence of their upper halves is
-12 to -7 nats, and of the same pixels mixed -56 to -27.
"""

import math
import warnings
from pathlib import Path

import binary_digits
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from training import options

import pyrodiff
from pyrodiff import Inpainting, Posterior, datasets, plots, posterior, replacement

VARIANCE, NOISE = 0.05, 0.1
CENTERS = 1.4 * torch.stack([angle(math.pi / 4 * torch.arange(8)) for angle in (torch.cos, torch.sin)], -1)


class EightGaussians(nn.Module):
    """E[x_0 | x_t] of eight Gaussians around a circle, in closed form."""

    def __init__(self, forward: pyrodiff.GaussianForward) -> None:
        super().__init__()
        self.forward_process = forward

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, b = (scale[..., None] for scale in self.forward_process.scales(x_t, t))
        off, total = x_t[:, None] - a * CENTERS, a**2 * VARIANCE + b**2
        weights = (-(off**2).sum(-1, keepdim=True) / 2 / total).softmax(1)
        return (weights * (CENTERS + a * VARIANCE / total * off)).sum(1)


def one_number() -> dict[float, Posterior]:
    """The first number of x_0 is known, and the second is not: the truth is known, too."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=60))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, EightGaussians(forward)), (2,))
    found = {}
    print("eight Gaussians: deviations of the second number given the first, and log evidence of data and chain")
    print(f"{'first':>7}{'truth':>9}{'particles':>11}{'replaced':>10}{'data':>9}{'chain':>9}")
    for y in (1.0, 0.0, -1.4, 2.5):
        observation = Inpainting(torch.tensor([True, False]), torch.tensor([y, 0.0]), NOISE)
        one = found[y] = posterior(diffusion, observation, num_particles=2048, generator=0)
        off = torch.distributions.Normal(CENTERS[:, 0], (VARIANCE + NOISE**2) ** 0.5).log_prob(torch.tensor(y))
        evidence = float(off.logsumexp(0)) - math.log(8)
        truth = float((off.softmax(0) * (CENTERS[:, 1] ** 2 + VARIANCE)).sum().sqrt())
        found_here = float((one.log_weights.softmax(0) * one.samples[:, 1] ** 2).sum().sqrt())
        replaced = replacement(diffusion, observation, num_samples=4000, generator=0)[:, 1].square().mean().sqrt()
        numbers = f"{y:7.2f}{truth:9.3f}{found_here:11.3f}{float(replaced):10.3f}"
        print(f"{numbers}{evidence:9.3f}{float(one.log_evidence):9.3f} ± {float(one.standard_error):.3f}")
    return found


def half_a_digit(diffusion: pyrodiff.Diffusion, number: int = 6) -> tuple[list[Tensor], list[Posterior]]:
    """The upper half of pictures is known, or of as many pixels set at random."""
    short, mask = diffusion.subchain(range(3, 301, 3)), torch.arange(8)[:, None].expand(8, 8) < 4
    digits, orders = datasets.digits("test", binary=True)[:number], torch.Generator().manual_seed(1)
    mixed = [x.flatten()[torch.randperm(64, generator=orders)].view(8, 8) for x in digits]
    found = []
    for name, pictures in (("digits", digits), ("their pixels, mixed", mixed)):
        with warnings.catch_warnings(record=True) as collapsed:
            warnings.simplefilter("always", UserWarning)
            some = [posterior(short, Inpainting(mask, x), num_particles=256, generator=0) for x in pictures]
        scores = " ".join(f"{float(one.log_evidence):6.1f}" for one in some)
        print(f"upper halves of {name:20} log evidence {scores}; {len(collapsed)} collapsed")
        found += some
    missing = torch.stack([one.mean[4:] for one in found[:number]])
    error = float((missing - digits[:, 4:]).square().mean())
    spread = float(torch.stack([one.standard_deviation[4:] for one in found[:number]]).square().mean())
    rate = float((datasets.digits("train", binary=True).mean(0)[4:] - digits[:, 4:]).square().mean())
    print(f"lower halves: squared error of the mean {error:.3f}, expected {spread:.3f}; of the mean digit {rate:.3f}")
    return [digits, torch.stack(mixed)], found


def draw(eight: dict[float, Posterior], pictures: Tensor, found: list[Posterior], path: Path) -> None:
    """The posteriors of the eight Gaussians; digits, what is known, the mean and two draws."""
    left, right = (figure := Figure(figsize=(9, 4), layout="constrained")).subplots(1, 2)
    left.plot(*CENTERS.T, "+", color="0.6", markersize=12)
    for y, one in eight.items():
        left.plot(*one.draw(100, generator=0).T, ".", label=f"first number {y:g}")
    left.set(aspect="equal", xlabel="first number", ylabel="second number")
    left.legend(fontsize=7)
    known = torch.cat([pictures[:, :4], torch.full_like(pictures[:, 4:], 0.5)], 1)
    draws = torch.stack([one.draw(2, generator=0) for one in found])
    rows = [pictures, known, torch.stack([one.mean for one in found]).clamp(0, 1), *draws.unbind(1)]
    plots.pictures(torch.cat(rows)[:, None], right, columns=len(pictures))
    right.set_title("digit, known, mean, two draws", fontsize=9)
    figure.savefig(path, dpi=130)


def main(out: Path, num_steps: int = 1500) -> tuple[dict[float, Posterior], list[Posterior]]:
    """Print evidence and errors, draw the picture; returns the posteriors."""
    eight = one_number()
    pictures, found = half_a_digit(binary_digits.fit(num_steps))
    draw(eight, pictures[0], found[: len(pictures[0])], out / "inpainting.png")
    print(f"  picture: {out / 'inpainting.png'}")
    return eight, found


if __name__ == "__main__":
    arguments = options(__doc__, 1500).parse_args()
    main(arguments.out, arguments.steps)
