r"""
Coming from Pyro
================

If you know Pyro's VAE and its deep Markov model (DMM): a diffusion is both, with a guide that has nothing to learn.
"""

# %%
# The variational autoencoder, in the words of Pyro's tutorial: a model with a latent site and an observed one, in a
# plate; a guide with the latent site alone, amortised over the data; SVI on their ELBO.

import textwrap

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import Predictive, TraceMeanField_ELBO

import pyrodiff
from pyrodiff import datasets, networks

pyro.set_rng_seed(0)
data, x_0 = (
    datasets.eight_gaussians(5000, seed=1),
    datasets.eight_gaussians(500, seed=2),
)

# %%
# T = 1 is a VAE
# --------------
#
# Take a latent of the shape of the data, and instead of a learned encoder a fixed one, which shrinks the data
# and adds noise. That is a diffusion of one step. Here it is by hand, beside the package's own, with the same
# network:

forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.6]))
network = networks.MLP(event_shape=(2,), hidden=32)
reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(network, forward))


def vae_model(x):
    pyro.module("reverse", reverse)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", reverse(z, 1), obs=x)


def vae_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.4**0.5 * x, 0.6**0.5).to_event(1))


vae_like = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
for name, model, guide in (
    ("VAE", vae_model, vae_guide),
    ("diffusion", vae_like.model, vae_like.guide),
):
    pyro.set_rng_seed(1)
    loss = TraceMeanField_ELBO().loss(model, guide, x_0) / len(x_0)
    print(f"{name:10}{loss:.4f} nats")

# %%
# The same number, draw for draw. (Luo 2022, Eq. 19, is this ELBO; Eq. 58 is that of more steps.)
#
# More steps are a DMM
# --------------------
#
# A deep Markov model has a chain of latent states, :math:`p(z_t \mid z_{t-1})` by a network, and emissions. A diffusion
# has the chain alone, and only its last state is observed:
#
# .. list-table::
#    :header-rows: 1
#    :widths: 24 38 38
#
#    * -
#      - DMM
#      - diffusion
#    * - first state
#      - :math:`p(z_1)`, learned
#      - :math:`p(x_T)`, fixed noise
#    * - transition
#      - :math:`p(z_t \mid z_{t-1})`, a network
#      - :math:`p_\theta(x_{t-1} \mid x_t)`, a network that is given t
#    * - observed
#      - something at each t
#      - the last state, :math:`x_0`
#    * - guide
#      - :math:`q(z_t \mid z_{t-1}, x_{t:T})`, an RNN that is learned
#      - :math:`q(x_{t-1} \mid x_t, x_0)`, in closed form; nothing is learned
#    * - order of the sites
#      - the guide draws as the model does
#      - the same, for the same reason
#    * - cost
#      - T calls of the network
#      - T calls, or one: the one-step pair
#
# The order is the only trap. A diffusion is often described as noise being *added*, from :math:`x_0` to :math:`x_T`.
# But ``TraceMeanField_ELBO`` takes a KL at each site, and that is a term of the bound only if the guide's site has the
# same parents as the model's: so the guide draws :math:`x_T` first.

T = 8
forward = pyrodiff.GaussianForward(
    pyrodiff.LogSNRSchedule(num_steps=T, first=5.0, last=-6.0)
)
reverse = pyrodiff.GaussianReverse(
    forward,
    pyrodiff.VelocityPrediction(
        networks.MLP(event_shape=(2,), hidden=64, num_blocks=1), forward
    ),
)
diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
for name, program in (("model", diffusion.model), ("guide", diffusion.guide)):
    trace = poutine.trace(program).get_trace(x_0)
    trace.compute_log_prob()
    latent = [site for site in trace.stochastic_nodes if site != "data"]
    shapes = [f"{site} {tuple(trace.nodes[site]['log_prob'].shape)}" for site in latent]
    print(name, "draws", *shapes)
    print("     observes", *trace.observation_nodes or ["nothing"])

# %%
# Plain Pyro trains it
# --------------------
#
# Nothing of this package's is needed to train the pair: ``pyro.infer.SVI``, an optimizer of ``pyro.optim``, Pyro's
# ELBO.

pyro.clear_param_store()  # of the VAE above
svi = pyro.infer.SVI(
    diffusion.model,
    diffusion.guide,
    pyro.optim.Adam({"lr": 1e-2}),
    TraceMeanField_ELBO(),
)
losses = [svi.step(data[torch.randint(len(data), (128,))]) / 128 for _ in range(60)]
first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
print(f"first 10 steps {first:.3f}, last 10 steps {last:.3f} nats per datum")

# %%
# The parameters are in the store, as always:

stored, owned = list(pyro.get_param_store()), list(reverse.parameters())
print(len(stored), "tensors in the store,", len(owned), "in the module")

# %%
# What this package adds
# ----------------------
#
# *The one-step pair.* A sum over T sites is estimated without bias by one of them, drawn at random for each datum, at
# one call of the network. It is two more programs, with the time as an auxiliary site, and plain Pyro trains those as
# well.
#
# *DiffusionELBO.* Pyro's ELBO is one number. This one has ``terms``, a cost per site and datum. And it refuses pairs
# for which Pyro would return a wrong number, with a warning or without: a scale in one program only, say.

terms = pyrodiff.DiffusionELBO().terms(diffusion.model, diffusion.guide, x_0)
for name, cost in terms.items():
    print(f"{name}  {tuple(cost.shape)}  {float(cost.detach().mean()):7.3f} nats")


def runs_forward(x_0):
    with pyro.plate("data", len(x_0)):
        x = x_0
        for t in range(1, T + 1):
            x = pyro.sample(f"x_{t}", forward.transition(x, t))


try:
    pyrodiff.DiffusionELBO().loss(diffusion.model, runs_forward, x_0)
except ValueError as error:
    print("refused:", textwrap.fill(str(error), 80))

# %%
# *SVI.* The interface is Pyro's. Under it is one torch optimizer for all parameters, so that the gradient can be
# clipped by its global norm, and what a longer training wants: schedules, an average of the weights, accumulation,
# autocast, compilation, several processes (:doc:`/training`). The loss is a tensor, still on its device.

pair = diffusion.one_step()
svi = pyrodiff.SVI(
    pair.model,
    pair.guide,
    lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    pyrodiff.DiffusionELBO(),
)
for _ in range(200):
    loss = svi.step(data[torch.randint(len(data), (128,))])
print(repr(loss.detach()))
print(pyrodiff.bound(diffusion, x_0, generator=0))

# %%
# The rest of Pyro
# ----------------
#
# The model is a program like any other: ``Predictive`` draws from it, ``poutine.condition`` fixes a site, a trace has
# the log probability of a path. Here :math:`x_T` is fixed at three places, 150 times each. The same :math:`x_T` gives
# different data, as the other steps are random too.

with torch.no_grad():
    draws = Predictive(diffusion.model, num_samples=2, return_sites=("x_0",))(
        num_samples=100
    )["x_0"]
print("Predictive:", tuple(draws.shape))

start = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.5, -1.5]]).repeat_interleave(150, 0)
with torch.no_grad():
    ends = poutine.condition(diffusion.model, {f"x_{T}": start})(num_samples=len(start))

figure = Figure(figsize=(4.4, 4.2), layout="constrained")
axes = figure.subplots()
axes.scatter(*data[:2000].T, s=1, color="#cccccc")
for x_T, x, color in zip(
    start[::150], ends.split(150), ("#1f4e79", "#b5452c", "#4d7c2a"), strict=True
):
    axes.scatter(*x.T, s=5, color=color, alpha=0.6, linewidths=0)
    axes.scatter(*x_T, s=60, color=color, marker="x")
axes.set(
    xlim=(-4.5, 4.5),
    ylim=(-4.5, 4.5),
    aspect="equal",
    title="x_T (crosses) and the x_0 drawn from it",
)

# %%
# Random weights (``PyroSample``), groups of data, a class for each datum: whatever a Pyro program can express, a
# diffusion's model can too. :doc:`4_a_variant` ends with one by hand, and :doc:`/guide` has the traps.
