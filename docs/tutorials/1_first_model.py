r"""
A first model
=============

From data to samples in a minute: a Swiss roll, a diffusion of 40 steps, its bound, and what it draws.

A diffusion model is two programs. The *guide* turns data into noise, a little at each step, and nothing in it is
learned. The *model* turns noise into data, and is learned to undo what the guide did. Both are programs of Pyro, and
training is Pyro's stochastic variational inference (SVI).
"""

# %%
# The data
# --------
#
# Points in the plane, along a spiral, with mean 0 and variance 1 in each dimension. A Gaussian diffusion expects that:
# the noise that it ends in has this mean and this variance too.

import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine

import pyrodiff
from pyrodiff import datasets, networks, plots

pyro.set_rng_seed(0)
x_0 = datasets.swiss_roll(20000, seed=1)
test_set = datasets.swiss_roll(1000, seed=2)
print("mean", x_0.mean(0), "variance", x_0.var(0))

# %%
# Data into noise
# ---------------
#
# A *schedule* says how much signal and how much noise there is at each time t = 1..T. A *forward process* turns it into
# distributions. Here ``forward.marginal(x_0, t)`` is :math:`q(x_t \mid x_0)`, a Gaussian around the scaled data: an
# ordinary Pyro distribution. At t = 40 the roll is gone.

forward = pyrodiff.GaussianForward(
    pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0)
)

figure = Figure(figsize=(9, 2), layout="constrained")
for axes, t in zip(figure.subplots(1, 5), (1, 10, 20, 30, 40), strict=True):
    x_t = forward.marginal(test_set, t).sample()
    axes.scatter(*x_t.T, s=1, color="#1f4e79")
    axes.set(
        title=f"t = {t}",
        xlim=(-3.5, 3.5),
        ylim=(-3.5, 3.5),
        xticks=[],
        yticks=[],
        aspect="equal",
    )

# %%
# Noise into data
# ---------------
#
# The way back needs a network, any module that is called as ``network(x_t, t)`` and returns the shape of ``x_t``.
# A *denoiser* says what its output *means*: here the velocity, a combination of data and noise. The denoiser turns it
# into an estimate of the data, and the *reverse process* turns the estimate into a distribution of the state one step
# earlier.

network = networks.MLP(event_shape=(2,), hidden=64, num_blocks=1)
denoiser = pyrodiff.VelocityPrediction(network, forward)
reverse = pyrodiff.GaussianReverse(forward, denoiser)
diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))

print(reverse(torch.randn(5, 2), t=10))

# %%
# The pair
# --------
#
# ``diffusion.model`` and ``diffusion.guide`` are the two programs. Both draw :math:`x_{40}` first and :math:`x_1` last,
# which the guide can do as it is given the data: :math:`q(x_{t-1} \mid x_t, x_0)` has a closed form. The model ends
# with the data.

model_trace = poutine.trace(diffusion.model).get_trace(test_set)
guide_trace = poutine.trace(diffusion.guide).get_trace(test_set)
for name, trace in (("model", model_trace), ("guide", guide_trace)):
    sites = [site for site in trace.nodes if site.startswith("x_")]
    print(name, len(sites), "sites:", *sites[:3], "...", *sites[-3:])

# %%
# Training
# --------
#
# One could train on these 40 sites. But a bound that is a sum over t has an unbiased estimate from one random t for
# each datum, at one call of the network. ``diffusion.one_step()`` is the pair of programs that does so. ``svi.step``
# returns the loss: the bound, estimated on this batch, in nats and summed over it.

pair = diffusion.one_step()
svi = pyrodiff.SVI(
    pair.model,
    pair.guide,
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    pyrodiff.DiffusionELBO(),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=400
    ),
)
losses = []
for _ in range(400):
    batch = x_0[torch.randint(len(x_0), (512,))]
    losses.append(svi.step(batch) / len(batch))
losses = torch.stack(losses)

figure = Figure(figsize=(6, 2.6), layout="constrained")
axes = figure.subplots()
axes.plot(losses, color="#1f4e79", alpha=0.3, linewidth=0.8, label="a step")
axes.plot(
    range(50, 450, 50),
    losses.view(-1, 50).mean(1),
    color="#b5452c",
    label="mean of 50",
)
axes.set(xlabel="step", ylabel="nats per datum", ylim=(0.5, 5))
axes.legend(frameon=False)

# %%
# The bound
# ---------
#
# How good is it? :math:`-\log p_\theta(x_0)` of new data, in nats, is at most the sum of three terms. The next tutorial
# reads this table line by line. A standard normal in the plane, which has not learned the spiral, costs
# :math:`\log(2 \pi e) = 2.84` nats; the model has learned the difference to that.

bound = pyrodiff.bound(diffusion, test_set, generator=0)
print(bound)

# %%
# Samples
# -------
#
# To draw samples, run the model without data. In the first row, from left to right, data become noise. In the second,
# from right to left, noise becomes data: these are the model's own draws. The arrows are the drift that was learned.

samples = diffusion.model(num_samples=1000)
print(samples.shape)

# sphinx_gallery_thumbnail_number = 3
figure = plots.diffusion_process(diffusion, test_set, times=(0, 8, 16, 24, 40))

# %%
# Where to go from here
# ---------------------
#
# - The same in thirty lines, trained longer: ``python examples/swiss_roll.py`` reaches a bound of 1.25 nats.
# - :doc:`2_reading_a_bound`: what the numbers in the table mean, and how tight the bound is.
# - :doc:`3_discrete_data`: bits and grey levels, where a bound is a code length.
# - :doc:`4_a_variant`: another kernel, another prior, another program.
