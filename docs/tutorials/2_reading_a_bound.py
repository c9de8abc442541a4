r"""
Reading a bound
===============

What each line of the table means, in which unit, with which standard error, and how far from the truth it can be.

The data are eight Gaussians on a circle. Their density is known, so every number on this page can be compared with the
truth: the mean of :math:`-\log p(x_0)` under the true law is its entropy, 2.830 nats, and no model can be below that in
the mean, but for the luck of the draw.
"""

# %%
# A trained model
# ---------------
#
# As in :doc:`1_first_model`, with T = 100 steps.

import math

import pyro
import torch
from matplotlib.figure import Figure
from pyro.distributions import Categorical, MixtureSameFamily, Normal

import pyrodiff
from pyrodiff import datasets, networks, plots

pyro.set_rng_seed(0)
data, x_0 = (
    datasets.eight_gaussians(20000, seed=1),
    datasets.eight_gaussians(1000, seed=2),
)

forward = pyrodiff.GaussianForward(
    pyrodiff.LogSNRSchedule(num_steps=100, first=8.0, last=-8.0)
)
denoiser = pyrodiff.VelocityPrediction(
    networks.MLP(event_shape=(2,), hidden=64, num_blocks=1), forward
)
diffusion = pyrodiff.Diffusion(
    forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,)
)
pair = diffusion.one_step()
svi = pyrodiff.SVI(
    pair.model,
    pair.guide,
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    pyrodiff.DiffusionELBO(),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=300
    ),
)
for _ in range(300):
    svi.step(data[torch.randint(len(data), (512,))])

bound = pyrodiff.bound(diffusion, x_0, generator=0)
print(bound)

# %%
# The three terms
# ---------------
#
# Each is a cost, one number per datum, and their sum is the bound on :math:`-\log p_\theta(x_0)`.
#
# - :math:`L_T`, the *prior's* term: how far :math:`q(x_T \mid x_0)` is from the noise that the model starts from. With
#   almost no signal left at T it is close to 0; training does not change it.
# - :math:`\sum L_{t-1}`, the *denoising* terms: for t = 2..T, how far the model's step
#   :math:`p_\theta(x_{t-1} \mid x_t)` is from the posterior that knows the data.
# - :math:`L_0`, the *reconstruction*: minus the log density of the data given :math:`x_1`. It is negative here, since
#   :math:`x_1` nearly determines the datum, and a density can be arbitrarily large. The denoising terms are larger in
#   return. Neither means anything alone.

terms = bound.prior, bound.denoising, bound.reconstruction
print("a datum each:", *(tuple(term.shape) for term in terms))
total = bound.prior + bound.denoising.sum(0) + bound.reconstruction
print("their sum is the bound:", torch.equal(total, bound.nats))

# %%
# Where it is spent
# -----------------
#
# The denoising terms by themselves, over t. Where a step costs much, either the network can still improve, or the step
# is too large: then more steps there, by another schedule, would help.

axes = plots.terms(bound)

# %%
# Units
# -----
#
# Nats are logarithms to base e, bits to base 2. "Per dimension" is divided by the number of numbers in a datum, here 2,
# in a picture of 32 × 32 pixels and three colours 3072. Nothing else is done to the numbers.

nats = float(bound.nats.mean())
per_dim = nats / math.log(2) / 2
print(f"{nats:.4f} nats = {2 * per_dim:.4f} bits = {per_dim:.4f} bits per dimension")
bits, bits_per_dim = float(bound.bits.mean()), float(bound.bits_per_dim.mean())
print(f"the same:     {bits:.4f} bits = {bits_per_dim:.4f} bits per dimension")

# %%
# How sure it is
# --------------
#
# The standard error is that of the mean over the data: the scatter of ``bound.nats`` over the root of the number of
# data. The draws of :math:`x_t` are part of that scatter. Other draws on the same data give other numbers;
# ``num_particles`` averages over more draws, and only more data reduce the rest. Here are ten seeds, on 100 data.

error = float(bound.nats.std() / math.sqrt(len(bound.nats)))
print(f"{error:.4f} is {float(bound.standard_error(bound.nats)):.4f}")

for draws in (1, 4):
    found = [
        pyrodiff.bound(diffusion, x_0[:100], num_particles=draws, generator=i)
        for i in range(10)
    ]
    spread = torch.stack([one.nats.mean() for one in found]).std()
    print(f"{draws} draws of each term: ten seeds spread by {float(spread):.3f} nats")

# %%
# Density or probability
# ----------------------
#
# The last line of the table says that p is a *density*, per unit of the data as given. In other units the number is
# another one: measured in hundredths, each of the two dimensions adds log 100 nats, though the model is the same. A
# density can be compared only with a density of the same data in the same unit.

metres, centimetres = Normal(0.0, 1.0), Normal(0.0, 100.0)
cost = -metres.log_prob(x_0).sum(-1).mean()
rescaled = -centimetres.log_prob(100 * x_0).sum(-1).mean()
print(f"{float(cost):.3f} nats + 2 log 100 = {float(cost) + 2 * math.log(100):.3f}")
print(f"in hundredths: {float(rescaled):.3f}")

# %%
# Where data have levels (bits, grey levels), p is a *probability*, a cost cannot be negative, and bits are the length
# of a code. That is :doc:`3_discrete_data`.
#
# The truth, and the gap
# ----------------------
#
# How much of the bound is due to the model, and how much is slack of the bound? In expectation over data,
#
# .. math:: \text{bound} = \text{entropy of the data} + \mathrm{KL}(\text{data} \,\Vert\, p_\theta) + \text{slack} .
#
# For these data the first is known. Beside it is the cost of the same 1000 points under the true density:

angle = math.pi / 4 * torch.arange(8)
centres = 4 * torch.stack([angle.cos(), angle.sin()], -1) / math.sqrt(2)
truth = MixtureSameFamily(
    Categorical(torch.ones(8)), Normal(centres, 0.5 / math.sqrt(2)).to_event(1)
)
cost = -truth.log_prob(x_0)


def line(name, nats):
    excess = nats - cost
    error = float(excess.std() / math.sqrt(len(excess)))
    more = f"{float(excess.mean()):6.3f} ± {error:.3f} above the truth"
    print(f"{name:24}{float(nats.mean()):7.3f} nats, {more}")


line("truth, on these data", cost)
line("bound", bound.nats)

# %%
# A tighter bound
# ---------------
#
# :func:`pyrodiff.importance_bound` runs K trajectories of the guide for each datum and averages their weights inside
# the logarithm. K = 1 is the bound again, up to its noise, and with K it falls towards :math:`-\log p_\theta(x_0)`.
# The gain was slack. What remains for any K is the model's own KL, which more training could reduce.

few = x_0[:100]
weighted = pyrodiff.importance_bound(diffusion, few, num_particles=32, generator=0)
print(weighted)

# %%
# The *effective sample size* in the title tells how even the weights are. If it is near 1, one trajectory dominates the
# sum, and more of them would still lower the bound.

# sphinx_gallery_thumbnail_number = 2
sizes = [1, 2, 4, 8, 16, 32]
figure = Figure(figsize=(6, 3), layout="constrained")
axes = figure.subplots()
excess = torch.stack([weighted.at(K) - cost[:100] for K in sizes])
axes.errorbar(
    sizes,
    excess.mean(1),
    2 * excess.std(1) / math.sqrt(len(few)),
    color="#b5452c",
    marker="o",
    capsize=3,
)
axes.axhline(0, color="#1f4e79", linewidth=1, label="truth")
axes.set(
    xscale="log",
    xticks=sizes,
    xticklabels=sizes,
    xlabel="K",
    ylabel="nats above the truth, ± 2 s.e.",
)
axes.minorticks_off()
axes.legend(frameon=False)

# %%
# The flow
# --------
#
# The same network defines a deterministic flow from noise to data, and a flow has an exact density, up to the solver's
# tolerance. :func:`pyrodiff.ode_log_prob` integrates it. It is the density of
# *another model* with the same network, not of the chain: it is no bound on the chain's likelihood, and may lie on
# either side of it. It has no Monte Carlo noise.

flow = pyrodiff.ode_log_prob(diffusion, few, tolerance=1e-4, generator=0)
print(flow)

figure = Figure(figsize=(6.4, 3.2), layout="constrained")
left, right = figure.subplots(1, 2, sharey=True)
for axes, name, nats in ((left, "bound", bound.nats[:100]), (right, "flow", flow.nats)):
    axes.scatter(cost[:100], nats, s=5, color="#b5452c")
    axes.axline((3, 3), slope=1, color="#1f4e79", linewidth=1)
    axes.set(title=name, xlabel="truth, nats", xlim=(1.5, 7), ylim=(0, 11))
left.set_ylabel("nats")

# %%
# A single datum's bound is mostly noise; only the mean is meaningful. The flow's density is exact for each datum.
#
# Fewer steps
# -----------
#
# ``diffusion.subchain(times)`` is the diffusion of some of the times, with the same network: a model of its own. Fewer
# steps are cheaper to draw from, and their bound is looser, since a larger step back is less like a Gaussian. A bound
# belongs to a number of steps: state T with it.

for steps in (50, 20, 10, 5):
    short = diffusion.subchain(torch.linspace(1, 100, steps).round().int().tolist())
    line(f"bound, T = {steps}", pyrodiff.bound(short, x_0, generator=0).nats)

# %%
# What to write down
# ------------------
#
# To be useful to others, a bound needs: the data and the split, nats or bits and per what, density or probability (and
# of how many levels), T, the decoder, the weights (raw or averaged), the number of data, and a standard error.
# ``bound.save(path)`` keeps the terms. :doc:`/numbers` relates all this to what other codes print.
