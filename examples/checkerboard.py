"""The checkerboard: a bound compared with an entropy that is known exactly, log 32 = 3.4657 nats.

    python examples/checkerboard.py

About a quarter of an hour on two cores; expect 3.516 ± 0.014 nats.
No bound can have a lower mean on new data; the excess is the loss of the model.
"""

import math
from pathlib import Path

import pyro
from matplotlib.figure import Figure
from training import options, train

import pyrodiff
from pyrodiff import datasets, networks, plots


def main(out: Path, num_steps: int = 20000) -> pyrodiff.Bound:
    """Train, print the bound beside the entropy, draw the pictures; returns the bound."""
    pyro.set_rng_seed(0)
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=1000))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=256), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
    train(diffusion, datasets.checkerboard(1_000_000, seed=1), num_steps, batch_size=512, lr=1e-3, name="checkerboard")

    bound = pyrodiff.bound(diffusion, datasets.checkerboard(10000, seed=2))
    print(bound)
    gap, error = float(bound.nats.mean()) - math.log(32), float(bound.standard_error(bound.nats))
    print(f"  entropy {math.log(32):.4f} nats; the bound is {gap:.4f} ± {error:.4f} above it")

    plots.diffusion_process(diffusion, datasets.checkerboard(3000, seed=3), (0, 100, 300, 600, 1000)).savefig(
        out / "checkerboard.png", dpi=130
    )
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    plots.terms(bound, figure.subplots())
    figure.savefig(out / "checkerboard_terms.png", dpi=130)
    print(f"  pictures: {out / 'checkerboard.png'}, {out / 'checkerboard_terms.png'}")
    return bound


if __name__ == "__main__":
    arguments = options(__doc__, 20000).parse_args()
    main(arguments.out, arguments.steps)
