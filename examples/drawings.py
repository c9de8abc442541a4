"""How t is drawn: what it does to the variance of training, on the three models of the demo.

    python examples/drawings.py

About six minutes on two cores: it trains them, and measures, at their weights, the variance of the one-step estimate
and of its gradient under uniform draws of t, low-discrepancy draws, the loss second moment, and the probabilities that
are best for the value (each with a tenth that is uniform).
"""

from pathlib import Path

import binary_digits
import heartbeat
import swiss_roll
from training import output_folder

import pyrodiff
from pyrodiff import datasets, plots


def main(out: Path, num_steps: int = 3000, num_pairs: int = 100) -> dict[str, pyrodiff.VarianceAccount]:
    """Train each model, print its account, draw it; returns the accounts."""
    cases = {
        "swiss_roll": (swiss_roll, datasets.swiss_roll(5000, seed=1)),
        "binary_digits": (binary_digits, datasets.digits("train", binary=True)),
        "heartbeat": (heartbeat, datasets.heartbeat(5000, seed=1)),
    }
    accounts = {}
    for name, (example, x_0) in cases.items():
        diffusion = example.fit(num_steps)
        accounts[name] = pyrodiff.variance_account(diffusion, x_0, num_pairs=num_pairs, generator=0, progress=True)
        print(f"\n{name}: {accounts[name]}")
        plots.variances(accounts[name]).savefig(out / f"variance_{name}.png", dpi=130)
        print(f"picture: {out / f'variance_{name}.png'}", flush=True)
    return accounts


if __name__ == "__main__":
    main(output_folder(__doc__))
