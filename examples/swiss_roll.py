"""Sohl-Dickstein's Swiss roll: Gaussian diffusion of the plane in T = 40 steps.

    python examples/swiss_roll.py

Two cores do it, and the digits and the heartbeat of ``demo.py``, in under four minutes. Expect 1.26 ± 0.02 nats:
K = -1.81 ± 0.03 bits, 2.28 over the unit Gaussian.

The 2015 paper gives K = 2.35 bits, 6.45 bits over the unit Gaussian. K is a lower bound on the mean of log2 p(x_0) of
data of unit variance, and the unit Gaussian's is -log2(2 pi e) = -4.094 bits. The paper does not say how much noise
its roll has, so that only the kind of number can be compared, not the digits.
"""

from pathlib import Path

import pyro
from training import options, train

import pyrodiff
from pyrodiff import datasets, networks, plots


def fit(num_steps: int = 3000) -> pyrodiff.Diffusion:
    """The diffusion, trained."""
    pyro.set_rng_seed(0)
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=128), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
    train(diffusion, datasets.swiss_roll(20000, seed=1), num_steps, batch_size=256, lr=2e-3, name="swiss roll")
    return diffusion


def main(out: Path, num_steps: int = 3000) -> pyrodiff.Bound:
    """Train, print the bound, draw the picture; returns the bound."""
    diffusion, x_0 = fit(num_steps), datasets.swiss_roll(5000, seed=2)
    bound = pyrodiff.bound(diffusion, x_0)
    print(bound)
    K, error, null = float(bound.K.mean()), float(bound.standard_error(bound.K)), bound.L_null
    print(f"  K = {K:.2f} ± {error:.2f} bits, {K - null:.2f} over the unit Gaussian's {null:.2f}; 2015: 2.35, 6.45")

    figure = plots.diffusion_process(diffusion, x_0[:3000], times=(0, 5, 10, 20, 40))
    figure.savefig(out / "swiss_roll.png", dpi=130)
    print(f"  picture: {out / 'swiss_roll.png'}")
    return bound


if __name__ == "__main__":
    arguments = options(__doc__, 3000).parse_args()
    main(arguments.out, arguments.steps)
