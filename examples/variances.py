"""What the choice of the reverse variance costs, with the exact denoiser of the checkerboard.

    python examples/variances.py

The exact mean of x_0 given x_t has a closed form, a sum over squares of truncated normals. The excess of the bound over
the entropy, log 32 = 3.4657 nats, is then due to T and the variance alone. About a minute on two cores: with the cosine
schedule and T = 200 the posterior's variance gives 4.89 ± 0.03 nats, the forward process's 3.50 ± 0.02; with the linear
one and T = 1000, 4.62 ± 0.03 and 3.50 ± 0.01.
"""

import math

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import pyrodiff
from pyrodiff import datasets


class ExactDenoiser(nn.Module):
    """E[x_0 | x_t] for data uniform on the dark squares: x_t (B, 2), t (B,)."""

    def __init__(self, forward: pyrodiff.GaussianForward) -> None:
        super().__init__()
        self.process = forward

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        signal, noise = (scale(t)[:, None] for scale in (self.process.schedule.signal, self.process.schedule.noise))
        centre, width = (x_t / signal)[..., None], (noise / signal)[..., None]
        low = torch.tensor([-4.0, -2.0, 0.0, 2.0], dtype=x_t.dtype)  # x_0 | x_t is N(centre, width^2), truncated
        a, b, unit = (low - centre) / width, (low + 2 - centre) / width, Normal(0.0, 1.0)
        flip = torch.where(a + b > 0, -1, 1)  # the tail that does not cancel
        mass = ((unit.cdf(torch.maximum(flip * a, flip * b))) - unit.cdf(torch.minimum(flip * a, flip * b))).clamp(
            1e-300
        )
        moment = centre * mass + width * (unit.log_prob(a).exp() - unit.log_prob(b).exp())
        dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
        first, second = mass[:, 0, :, None] * dark, mass[:, 1, None, :] * dark
        total = (first * second).sum((-1, -2))
        x = (moment[:, 0, :, None] * second).sum((-1, -2)) / total
        y = (first * moment[:, 1, None, :]).sum((-1, -2)) / total
        return torch.stack([x, y], -1)


def main() -> dict[str, pyrodiff.Bound]:
    """Print the bound with each schedule and variance; returns them."""
    pyro.set_rng_seed(0)
    x_0 = datasets.checkerboard(10000, seed=2).double()
    bounds = {}
    print(f"entropy {math.log(32):.4f} nats; bound with the exact denoiser, ± its standard error:")
    for schedule in (pyrodiff.CosineSchedule(num_steps=200), pyrodiff.LinearSchedule(num_steps=1000)):
        forward = pyrodiff.GaussianForward(schedule)
        for variance in (pyrodiff.PosteriorVariance(), pyrodiff.ForwardVariance()):
            reverse = pyrodiff.GaussianReverse(forward, ExactDenoiser(forward), variance)
            name = f"{type(schedule).__name__}({schedule.num_steps}), {type(variance).__name__}"
            bounds[name] = pyrodiff.bound(pyrodiff.Diffusion(forward, reverse, event_shape=(2,)), x_0)
            nats = bounds[name].nats
            print(f"  {name:42}{float(nats.mean()):7.3f} ± {float(pyrodiff.Bound.standard_error(nats)):.3f}")
    return bounds


if __name__ == "__main__":
    main()
