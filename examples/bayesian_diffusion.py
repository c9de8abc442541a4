"""A small network with random weights: the bound under the posterior of the weights, and the evidence of a prior.

    python examples/bayesian_diffusion.py

Forty seconds of one core. From 20 numbers of two Gaussians, with weights of a deviation of 0.1, 0.3, 1 and 3 a priori,
expect, in nats, the bound of all data and the weights together, which bounds minus the log evidence:

    mean field     30.9 ± 0.4    33.5 ± 0.7    49.0 ± 1.3    80.8 ± 1.7
    Laplace        30.6 ± 0.3    31.6 ± 0.3    38.2 ± 0.3    55.6 ± 0.3

The bound is quadratic in these weights, so Laplace's is the posterior, and the best independent Gaussians cost 0.06,
1.3, 9.2 and 22.8 nats more. Per datum of a test set (exact: 0.88 nats) random weights raise the mean bound, from 1.10
with the most probable ones to 1.42 with Laplace's (deviation 1): averaging does not improve a bound. The density with
the weights integrated out, by importance weights of all draws, is 1.06 against 1.03. So random weights do not predict
better here; but they give the evidence of a prior, which the most probable weights cannot.
"""

import math
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from random_weights import build, posteriors
from torch import Tensor, nn
from training import options

import pyrodiff

NUM_DATA, DRAWS = 20, 20  # data to learn from; draws of the weights
SCALES = (0.1, 0.3, 1.0, 3.0)  # of the weights a priori


def costs(diffusion: pyrodiff.Diffusion, guide: nn.Module, x_0: Tensor, test: Tensor) -> dict[str, Tensor]:
    """Costs in nats, each with shape (DRAWS,), one per draw of the weights, except that of the predictive density."""
    seeds, given = range(DRAWS), partial(pyrodiff.bound, diffusion, guide=guide)
    found = [given(x_0, num_particles=10, generator=seed) for seed in seeds]
    tests = [given(test, generator=seed).nats.mean() for seed in seeds]
    weighed = partial(pyrodiff.importance_bound, diffusion, test, num_particles=10, guide=guide)
    weights = torch.cat([weighed(generator=seed).log_weights for seed in seeds])  # their mean is p(x), weights and all
    return {
        "train": torch.stack([bound.nats.mean() for bound in found]),
        "test": torch.stack(tests),
        "predictive": (math.log(len(weights)) - weights.logsumexp(0)).mean(),
        "all data": torch.tensor([bound.total for bound in found]),
    }


def said(values: Tensor) -> str:
    error = f" ± {float(values.std()) / len(values) ** 0.5:.2f}" if values.dim() else ""
    return f"{float(values.mean()):8.2f}{error}"


def main(out: Path, num_steps: int = 400) -> dict[tuple[float, str], dict[str, Tensor]]:
    """Print all costs, plot the evidence against the deviation of the weights; returns the costs."""
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.35, 0.65])),
        dist.Normal(torch.tensor([-1.2, 0.8]), torch.tensor([0.2, 0.4])),
    )
    pyro.set_rng_seed(1)
    x_0, test, found = law.sample((NUM_DATA, 1)), law.sample((500, 1)), {}
    print(f"exact, test: {-float(law.log_prob(test).mean()):.2f} nats per datum")
    for scale in SCALES:
        pyro.set_rng_seed(0)
        diffusion = build(scale)
        guides = posteriors(diffusion, x_0, num_steps)
        precision = guides["Laplace"].get_posterior().precision_matrix
        gap = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
        print(f"weights of deviation {scale}: the best independent Gaussians cost {gap:.2f} nats")
        for name, guide in guides.items():
            found[scale, name] = costs(diffusion, guide, x_0, test)
            row = ", ".join(f"{key} {said(nats)}" for key, nats in found[scale, name].items())
            print(f"  {name:10}: {row}", flush=True)
    axes = (figure := Figure(figsize=(5, 3.5), layout="constrained")).subplots()
    for name in ("mean field", "Laplace"):
        axes.semilogx(SCALES, [float(found[scale, name]["all data"].mean()) for scale in SCALES], "o-", label=name)
    axes.set(xlabel="deviation of the weights a priori", ylabel="bound on the evidence, nats")
    axes.legend()
    figure.savefig(out / "bayesian_diffusion.png", dpi=130)
    print(f"  picture: {out / 'bayesian_diffusion.png'}")
    return found


if __name__ == "__main__":
    arguments = options(__doc__, 400).parse_args()
    main(arguments.out, arguments.steps)
