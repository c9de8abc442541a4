"""Sohl-Dickstein's binary heartbeat: binomial diffusion of 20 bits, a 1 in every fifth place.

    python examples/heartbeat.py

Two cores do it, and the digits and the roll of ``demo.py``, in under four minutes. Expect log2 p of at least -2.340 ±
0.006 bits.

The truth is log2(1/5) = -2.322 bits per sequence, the 2015 paper reached -2.414 at T = 2000, and no reverse process
with independent bits can pass -2.325 at that T.
"""

import math
from pathlib import Path

import pyro
from matplotlib.figure import Figure
from training import options, train

import pyrodiff
from pyrodiff import datasets, networks, plots


def fit(num_steps: int = 3000) -> pyrodiff.Diffusion:
    """The diffusion, trained."""
    pyro.set_rng_seed(0)
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=2000), rate=0.2)
    denoiser = pyrodiff.LogitPrediction(networks.MLP(event_shape=(20,), hidden=128), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), event_shape=(20,))
    train(diffusion, datasets.heartbeat(5000, seed=1), num_steps, batch_size=256, lr=2e-3, name="heartbeat")
    return diffusion


def main(out: Path, num_steps: int = 3000) -> pyrodiff.Bound:
    """Train, print the bound, draw the picture; returns the bound."""
    diffusion = fit(num_steps)
    bound = pyrodiff.bound(diffusion, datasets.heartbeat(500, seed=2))
    print(bound)
    error = float(bound.standard_error(bound.bits))
    print(f"  log p in bits per sequence: at least {-float(bound.bits.mean()):.3f} ± {error:.3f}")
    print(f"  truth {-math.log2(5):.3f}; 2015, T = 2000: -2.414; best with independent bits: -2.325")

    samples = diffusion.model(num_samples=40)
    figure = Figure(figsize=(5, 5), layout="constrained")
    for axes, x, title in zip(
        figure.subplots(1, 2), (datasets.heartbeat(40, seed=3), samples), ("data", "samples"), strict=True
    ):
        plots.bits(x, axes).set_title(title)
    figure.savefig(out / "heartbeat.png", dpi=150)
    right = (samples.view(-1, 4, 5).sum(1).sort(-1).values.eq(samples.new_tensor([0, 0, 0, 0, 4]))).all(-1)
    print(f"  of 40 samples {int(right.sum())} are heartbeats; picture: {out / 'heartbeat.png'}")
    return bound


if __name__ == "__main__":
    arguments = options(__doc__, 3000).parse_args()
    main(arguments.out, arguments.steps)
