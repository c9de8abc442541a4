r"""
Discrete data
=============

Bits by binomial diffusion, grey levels by a decoder: where p is a probability, and a bound is the length of a code.
"""

# %%
# Bits: the heartbeat
# -------------------
#
# Sequences of 20 bits with a one in every fifth place, from a random start (Sohl-Dickstein et al., 2015). There are
# five of them, equally likely: a perfect model needs :math:`\log_2 5 = 2.322` bits for each, and no model needs fewer.

import math

import pyro
import torch
from matplotlib.figure import Figure
from torch.nn.functional import one_hot

import pyrodiff
from pyrodiff import datasets, networks, plots

pyro.set_rng_seed(0)
heartbeats = datasets.heartbeat(5000, seed=1)

# %%
# Noise for bits is not Gaussian. At each step of a *binomial* diffusion every bit is forgotten with probability
# :math:`\beta_t`, and then drawn anew: a one with the stationary rate, here 0.2, as many as the data have. The schedule
# forgets the same amount of the data at each step.

T = 200
forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=T), rate=0.2)

figure = Figure(figsize=(8, 2.2), layout="constrained")
for axes, t in zip(figure.subplots(1, 5), (0, 50, 100, 150, 200), strict=True):
    x_t = heartbeats[:24] if t == 0 else forward.marginal(heartbeats[:24], t).sample()
    plots.bits(x_t, axes).set_title(f"t = {t}")

# %%
# The network's output is the log odds of a one in the data, and the reverse process averages the two posteriors, given
# a 0 and given a 1, with these probabilities. All else is as in a Gaussian diffusion: the same pair, the same SVI.
# (Pyro's own ``TraceMeanField_ELBO`` refuses a guide that draws bits. ``DiffusionELBO`` accepts one without parameters
# to learn, for which no gradient through the bits is needed.)


def train(diffusion, data, num_steps, lr=3e-3, drawing=None):
    pair = diffusion.one_step(drawing=drawing)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=True),
        pyrodiff.DiffusionELBO(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=num_steps
        ),
    )
    diffusion.train()
    for _ in range(num_steps):
        svi.step(data[torch.randint(len(data), (128,))])
    diffusion.eval()


denoiser = pyrodiff.LogitPrediction(
    networks.MLP(event_shape=(20,), hidden=64, num_blocks=1), forward
)
diffusion = pyrodiff.Diffusion(
    forward, pyrodiff.BinomialReverse(forward, denoiser), event_shape=(20,)
)
train(diffusion, heartbeats, num_steps=400, lr=1e-2)

bound = pyrodiff.bound(diffusion, datasets.heartbeat(200, seed=2), generator=0)
print(bound)

# %%
# p is a probability of bits. The whole sequence costs little more than the optimal 2.322 bits; the excess comes from
# the network and from the number of steps, as within a step the bits are drawn independently of each other
# (``examples/heartbeat.py``, with T = 2000 and longer training, comes to 2.340).

samples = diffusion.model(num_samples=500)
beats = samples.view(-1, 4, 5)
is_heartbeat = (beats == beats[:, :1]).all(-1).all(-1) & (beats[:, 0].sum(-1) == 1)
print(f"{float(bound.bits.mean()):.3f} bits, the truth is {math.log2(5):.3f}")
print(f"{int(is_heartbeat.sum())} of {len(samples)} samples are heartbeats")

figure = Figure(figsize=(5, 2.8), layout="constrained")
for axes, x, title in zip(
    figure.subplots(1, 2),
    (heartbeats[:24], samples[:24]),
    ("data", "samples"),
    strict=True,
):
    plots.bits(x, axes).set_title(title)

# %%
# Grey levels: a decoder
# ----------------------
#
# The pixels of these handwritten digits are whole numbers 0..16. ``from_levels`` puts them on [-1, 1], where a Gaussian
# diffusion runs. The chain's last step then has to give each of the 17 levels a probability instead of a density: that
# is the *decoder's* part. ``DiscretizedDecoder`` gives each level the probability of its bin under the Gaussian kernel.

LEVELS = 17
k = datasets.digits("train")
x_0, test_set = (
    pyrodiff.from_levels(datasets.digits(split), LEVELS) for split in ("train", "test")
)
print("levels", int(k.max()) + 1, "on", float(x_0.min()), "to", float(x_0.max()))

# %%
# With ``LevelPrediction`` the network returns a log probability for each level of each pixel, a last dimension of 17;
# the likelihood of the pixel's own noisy value is added to it. The network here starts from the frequency of each level
# at each pixel, so that it only has to learn how the pixels depend on each other. Any module will do for a network,
# also a wrapper around one.

counts = one_hot(k.long(), LEVELS).float().sum(0)
histogram = (counts + 8 * counts.mean((0, 1)) / len(k)) / (len(k) + 8)


class FromHistogram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = networks.UNet((8, 8), channels=(16, 32), outputs=LEVELS)
        self.offset = torch.nn.Parameter(histogram.log())

    def forward(self, x_t, t):
        return self.network(x_t, t) + self.offset


forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=1000))
denoiser = pyrodiff.LevelPrediction(FromHistogram(), forward, LEVELS)
reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.PosteriorVariance())
digits = pyrodiff.Diffusion(
    forward, reverse, event_shape=(8, 8), decoder=pyrodiff.DiscretizedDecoder(LEVELS)
)
train(digits, x_0, num_steps=80, lr=6e-3, drawing=pyrodiff.LossSecondMoment(1000))

# %%
# With T = 1000 and a hundred pictures the bound has 100 000 terms. ``num_times=30`` computes 30 random ones of the 999
# denoising terms of each picture: unbiased, and the standard error shows the loss of precision.

few = test_set[:100]
bound = pyrodiff.bound(digits, few, num_times=30, generator=0)
print(bound)

# %%
# A probability of levels can be compared with any other, such as the uniform one, or the histogram per pixel that the
# network started from. This is a short training; ``examples/digits.py`` trains much longer, with more pictures
# made of these, and comes to 1.716 bits per dimension.

alone = -pyrodiff.LevelCategorical(histogram.log()).log_prob(few).sum((-1, -2))
costs = {
    "even guess": torch.full((len(few),), 64 * math.log(LEVELS)),
    "histogram per pixel": alone,
    "bound of the diffusion": bound.nats,
}
for name, nats in costs.items():
    bits = nats / math.log(2) / 64
    error = float(bound.standard_error(bits))
    print(f"{name:24}{float(bits.mean()):6.3f} ± {error:.3f} bits per dimension")

# %%
# Samples of the model have levels too, since the decoder draws them. A shorter chain of 100 of the 1000 times, with the
# same network, draws ten times as fast.

# sphinx_gallery_thumbnail_number = 3
short = digits.subchain(torch.linspace(1, 1000, 100).round().int().tolist())
samples = short.model(num_samples=24)
print("all on the grid:", bool(pyrodiff.Levels(LEVELS).check(samples).all()))

figure = Figure(figsize=(6.4, 2.8), layout="constrained")
for axes, x, title in zip(
    figure.subplots(1, 2), (test_set[:24], samples), ("data", "samples"), strict=True
):
    plots.bits((x + 1) / 2, axes, columns=6).set_title(title)

# %%
# Other decoders
# --------------
#
# ``SoftmaxDecoder(forward, levels)`` is the posterior of the level given :math:`x_1` alone, with nothing learned:
# enough if there is little noise at t = 1. A decoder of your own is a module called as ``decoder(kernel, x_1)`` that
# returns a distribution of the data. Schedules and variances for quantised data are on :doc:`/guide`, and their effect
# on the bound on :doc:`/numbers`.
