"""How the distribution of t affects the variance of training, on the three models of the demo.

    python examples/drawings.py

About six minutes on two cores: it trains them, and measures, at their weights, the variance of the one-step estimate
and of its gradient under uniform draws of t, low-discrepancy draws, the loss second moment, and the probabilities that
are best for the value (each with a tenth that is uniform). Relative to uniform draws, low discrepancy leaves 0.13 of
the variance of the roll's value, 1.2 of the binary digits' and 1.3 of the heartbeat's, the loss second moment 0.05,
0.20 and 2.9, with standard errors of 15 to 40 %.
"""

from pathlib import Path

import binary_digits
import heartbeat
import swiss_roll
from training import options

import pyrodiff
from pyrodiff import datasets, plots


def main(out: Path, num_steps: int = 3000, **settings: int) -> dict[str, pyrodiff.VarianceAccount]:
    """Train each model, print its account, draw it; returns the accounts, made with ``settings``."""
    settings = {"num_pairs": 100} | settings
    cases = {
        "swiss_roll": (swiss_roll, datasets.swiss_roll(5000, seed=1)),
        "binary_digits": (binary_digits, datasets.digits("train", binary=True)),
        "heartbeat": (heartbeat, datasets.heartbeat(5000, seed=1)),
    }
    accounts = {}
    for name, (example, x_0) in cases.items():
        diffusion = example.fit(num_steps)
        accounts[name] = pyrodiff.variance_account(diffusion, x_0, generator=0, progress=True, **settings)
        print(f"\n{name}: {accounts[name]}")
        plots.variances(accounts[name]).savefig(out / f"variance_{name}.png", dpi=130)
        print(f"picture: {out / f'variance_{name}.png'}", flush=True)
    return accounts


if __name__ == "__main__":
    arguments = options(__doc__, 3000).parse_args()
    main(arguments.out, arguments.steps)
