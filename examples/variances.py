"""What the choice of the reverse variance costs, with a denoiser that cannot be better: the checkerboard's exact one.

    python examples/variances.py

The exact mean of x_0 given x_t has a closed form, a sum over squares of truncated normals. What the bound then stands
above the entropy, log 32 = 3.4657 nats, is the price of T and of the variance alone. About a minute.
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


def main() -> None:
    pyro.set_rng_seed(0)
    x_0 = datasets.checkerboard(10000, seed=2).double()
    print(f"entropy {math.log(32):.4f} nats; bound with the exact denoiser, ± its standard error:")
    for schedule in (pyrodiff.CosineSchedule(num_steps=200), pyrodiff.LinearSchedule(num_steps=1000)):
        forward = pyrodiff.GaussianForward(schedule)
        for variance in (pyrodiff.PosteriorVariance(), pyrodiff.ForwardVariance()):
            reverse = pyrodiff.GaussianReverse(forward, ExactDenoiser(forward), variance)
            bound = pyrodiff.bound(pyrodiff.Diffusion(forward, reverse, event_shape=(2,)), x_0)
            error = float(bound.standard_error(bound.nats))
            name = f"{type(schedule).__name__}({schedule.num_steps}), {type(variance).__name__}"
            print(f"  {name:42}{float(bound.nats.mean()):7.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
