"""Fashion-MNIST, or MNIST, in its 256 grey levels: bits per dimension on the test set, 28 x 28 pixels.

    python examples/fashion_mnist.py --data FOLDER --minutes 9      # again and again: each resumes the last
    python examples/fashion_mnist.py --data FOLDER --small --steps 300      # a small one, on a CPU

FOLDER holds the four IDX files, from https://github.com/zalandoresearch/fashion-mnist (or MNIST's, whose format is the
same). The last 5,000 pictures of the train set are held out for the curve; the test set is looked at once, at the end.

Made for a GPU, where it has not been run yet. On a CPU the second command with
``--batch 16 --steps 160`` took eight minutes of a busy core, and came to 4.35 ± 0.14 bits/dim on 100 test pictures.

The network predicts the level of each pixel from the others (:class:`pyrodiff.LevelPrediction`), and starts at the
frequency of each level at each pixel. The first log SNR is 14: the noise at t = 1 is then a quarter of half a bin, 1 /
255, and no level is taken for its neighbour. L_0 was 2.1 bits/dim where it was 12, 0.05 at 13.5, and is 0.00 at 14.
"""

import argparse

import long_run
import pyro
import scores
import torch
from torch import Tensor

import pyrodiff
from pyrodiff import datasets, networks

LEVELS = 256


def build(k: Tensor, size: scores.Size, device: torch.device) -> pyrodiff.Diffusion:
    """The diffusion; k are pictures of the train set, with shape (n, 28, 28)."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(size.num_steps, first=14.0, last=-8.0))
    network = networks.UNet(
        k.shape[1:],
        size.channels,
        hidden=0,
        num_blocks=size.num_blocks,
        dropout=0.1,
        outputs=LEVELS,
        attention=(14, 7),
        heads=4,
        groups=8,
        time=networks.LogSNREmbedding(forward.schedule, 128),
    )
    pixels = k.flatten(1).long().T.contiguous()
    counts = torch.zeros(len(pixels), LEVELS).scatter_add_(1, pixels, torch.ones(1, 1).expand(pixels.shape))
    often = (counts + 20 * counts.mean(0) / len(k) + 0.01).log().log_softmax(-1)
    network = networks.Offset(network, often.reshape(*k.shape[1:], LEVELS))
    denoiser = pyrodiff.LevelPrediction(network, forward, LEVELS)
    reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.PosteriorVariance())
    return pyrodiff.Diffusion(forward, reverse, k.shape[1:], pyrodiff.DiscretizedDecoder(LEVELS)).to(device)


def main(arguments: argparse.Namespace, size: scores.Size) -> pyrodiff.Bound | None:
    """Train for the given time; at the end print and save the bounds on the test set. Returns the first, when done."""
    pyro.set_rng_seed(0)
    device, k = arguments.device, datasets.idx_folder(arguments.data)
    k, held_out = k[: -size.num_held_out], k[-size.num_held_out :]
    diffusion = build(k, size, device)
    x_0 = pyrodiff.from_levels(k, LEVELS).to(device)
    svi = long_run.make_svi(diffusion, arguments, lr=5e-4, average=0.999)
    measure = scores.held_out(svi, diffusion, pyrodiff.from_levels(held_out, LEVELS).to(device), size, "bits/dim")

    def draw(number: int) -> Tensor:
        return x_0[torch.randint(len(x_0), (number,), device=device)]

    if not long_run.train(svi, draw, measure, arguments, "bits/dim"):
        return None
    svi.adopt_average()
    test = pyrodiff.from_levels(datasets.idx_folder(arguments.data, "test")[: size.num_test], LEVELS)
    return scores.evaluate(diffusion, test.to(device), size, arguments, "bits/dim")


if __name__ == "__main__":
    arguments = long_run.options(__doc__, "out/fashion_mnist", num_steps=40000, batch_size=128).parse_args()
    main(arguments, scores.SMALL if arguments.small else scores.FULL)
