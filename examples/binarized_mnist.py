"""MNIST as bits, dynamic binarisation: binomial diffusion of 28 x 28 bits, in nats per picture.

    python examples/binarized_mnist.py --data FOLDER --minutes 9    # again and again: each resumes the last
    python examples/binarized_mnist.py --data FOLDER --small --steps 300    # a small one, on a CPU

FOLDER holds the four IDX files of MNIST. Dynamic binarisation: each batch has fresh bits, the brightness of a pixel
being its probability of a 1; the bits of the held-out pictures (the last 5,000 of the train set) and of the test set
are drawn so too, once, from a fixed seed. Published numbers of dynamic binarisation: a VAE of one layer 86.8, IWAE with
50 particles 84.8, NVAE 78.01, Bayesian Flow Networks 77.87 nats (theirs are of more training, and some of tighter
bounds). Nats of fixed binarisation do not compare: the data differ.

On one H200 ``--steps 20000`` took 4.8 minutes, and one more to measure all 10,000 test pictures by 40 of the terms
each: 78.62 ± 0.22 nats (T = 1000, 10.8 million parameters). On one CPU core the second command with ``--batch 64
--steps 10000 --compile`` took 51 minutes, and six more to measure: 82.47 ± 0.22 nats (T = 200, 0.35 million
parameters).
"""

import argparse

import long_run
import pyro
import scores
import torch
from torch import Tensor, nn

import pyrodiff
from pyrodiff import datasets, networks


class Evidence(nn.Module):
    """A network's log odds plus the evidence of each noisy bit for itself; the network learns from the other bits."""

    def __init__(self, network: nn.Module, forward: pyrodiff.BinomialForward) -> None:
        super().__init__()
        self.network, self.forward_process = network, forward

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        zero, one = (self.forward_process.marginal(x_0, t).base_dist.log_prob(x_t) for x_0 in (0 * x_t, 0 * x_t + 1))
        return self.network(2 * x_t - 1, t).to(x_t.dtype) + one - zero


def build(grey: Tensor, size: scores.Size, device: torch.device) -> pyrodiff.Diffusion:
    """The diffusion; grey are the probabilities of a 1 in the train set, with shape (n, 28, 28)."""
    rate = (grey.sum(0) + 1) / (len(grey) + 2)
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(size.num_steps), rate)
    network = networks.UNet(
        grey.shape[1:],
        size.channels,
        hidden=0,
        num_blocks=size.num_blocks,
        dropout=0.1,
        attention=(14, 7),
        heads=4,
        groups=8,
        time=networks.TimeEmbedding(128),
    )
    network = Evidence(networks.Offset(network, rate.logit()), forward)
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(network, forward))
    return pyrodiff.Diffusion(forward, reverse, grey.shape[1:]).to(device)


def main(arguments: argparse.Namespace, size: scores.Size) -> pyrodiff.Bound | None:
    """Train for the given time; at the end print and save the bounds on the test set. Returns the first, when done."""
    pyro.set_rng_seed(0)
    device, k = arguments.device, datasets.idx_folder(arguments.data)
    held_out = datasets.binarize(k[-size.num_held_out :], generator=1).to(device)
    grey = k[: -size.num_held_out].float() / 255
    diffusion, grey = build(grey, size, device), grey.to(device)
    svi = long_run.make_svi(diffusion, arguments, lr=5e-4, average=0.999)
    measure = scores.held_out(svi, diffusion, held_out, size, "nats")

    def draw(number: int) -> Tensor:
        """As ``datasets.binarize``, which checks its levels, and would wait for a GPU."""
        return torch.bernoulli(grey[torch.randint(len(grey), (number,), device=device)])

    if not long_run.train(svi, draw, measure, arguments, "nats"):
        return None
    svi.adopt_average()
    test = datasets.binarize(datasets.idx_folder(arguments.data, "test")[: size.num_test], generator=2)
    return scores.evaluate(diffusion, test.to(device), size, arguments, "nats, dynamic binarisation")


if __name__ == "__main__":
    arguments = long_run.options(__doc__, "out/binarized_mnist", num_steps=60000, batch_size=128).parse_args()
    main(arguments, scores.SMALL if arguments.small else scores.FULL)
