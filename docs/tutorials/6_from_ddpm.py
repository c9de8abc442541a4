r"""
Coming from DDPM code
=====================

If you know ``diffusers``, or any code after Ho et al. (2020): what corresponds to what, checked in plain torch, and the
bound of a network that was trained elsewhere.

``diffusers`` is not needed for this page. What it would compute is written out.
"""

# %%
# What is called what
# -------------------
#
# .. list-table::
#    :header-rows: 1
#    :widths: 50 50
#
#    * - DDPM code
#      - here
#    * - timesteps 0..T-1, 0 the least noisy
#      - t = 1..T; t = 0 is the data. Theirs is ours less one
#    * - ``betas``, ``beta_schedule="linear"``
#      - ``LinearSchedule(1000, 1e-4, 0.02)``; any betas: ``BetaSchedule(betas)``
#    * - ``beta_schedule="squaredcos_cap_v2"``
#      - ``CosineSchedule(1000)``
#    * - ``alphas_cumprod[t]``
#      - ``schedule.alpha_bar(t + 1)``
#    * - ``scheduler.add_noise(x_0, noise, t)``
#      - a draw of ``forward.marginal(x_0, t + 1)``
#    * - ``prediction_type="epsilon"``, ``"sample"``, ``"v_prediction"``
#      - ``NoisePrediction``, ``DataPrediction``, ``VelocityPrediction``
#    * - ``variance_type="fixed_small"``, ``"fixed_large"``
#      - ``PosteriorVariance()``, ``ForwardVariance()`` (the default); in OpenAI's code ``FixedLargeVariance()``
#    * - ``scheduler.step(output, t, x_t).prev_sample``
#      - a draw of ``reverse(x_t, t + 1)``
#    * - ``clip_sample=True``
#      - nothing is clipped: a clipped chain is another model than the one that was trained
#    * - ``UNet2DModel(...)``
#      - any network called as ``network(x_t, t)``; a wrapper of two lines, below
#    * - ``F.mse_loss(output, noise)``
#      - ``one_step(weighting=SimpleWeighting(reverse))``; without it, the bound itself
#    * - ``DDPMPipeline``
#      - ``AncestralSampler(diffusion)``
#    * - ``scheduler.set_timesteps(50)``
#      - ``diffusion.subchain(times)``, which is a model, with a bound of its own
#    * - no likelihood
#      - ``bound(diffusion, x_0)``
#
# The formulas
# ------------
#
# First the tables of a DDPM, in plain torch and in float64.

import pyro
import torch
from matplotlib.figure import Figure
from torch.nn.functional import mse_loss

import pyrodiff
from pyrodiff import datasets, networks

pyro.set_rng_seed(0)
T = 1000
betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
alphas = 1 - betas
alphas_cumprod = alphas.cumprod(0)

forward = pyrodiff.GaussianForward(
    pyrodiff.LinearSchedule(num_steps=T, beta_start=1e-4, beta_end=0.02)
)


def largest_difference(ours, theirs):
    return f"{float((ours - theirs).abs().max()):.1e}"


t = torch.arange(1, T + 1)
alpha_bar = forward.schedule.alpha_bar(t)
print("alphas_cumprod", largest_difference(alpha_bar, alphas_cumprod))

# %%
# ``add_noise`` is a draw of :math:`q(x_t \mid x_0) = N(\sqrt{\bar\alpha_t}\, x_0, \; 1 - \bar\alpha_t)`. Here it is a
# distribution, with a mean and a variance.

x_0 = torch.randn(8, 3, 4, 4, dtype=torch.float64)
i = torch.tensor([0, 1, 2, 10, 100, 500, 998, 999])  # timesteps of DDPM code
alpha_bar = alphas_cumprod[i][:, None, None, None]
q = forward.marginal(x_0, i + 1)
print("mean    ", largest_difference(q.mean, alpha_bar.sqrt() * x_0))
print("variance", largest_difference(q.variance, (1 - alpha_bar).expand_as(x_0)))

# %%
# ``step`` draws from :math:`p_\theta(x_{t-1} \mid x_t)`, whose mean is
# :math:`\frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \hat\epsilon \right)`. The same,
# with a network that predicts something, whatever it is:


class Something(torch.nn.Module):
    def forward(self, x_t, t):
        return torch.sin(3 * x_t)


x_t = torch.randn(8, 3, 4, 4, dtype=torch.float64)
noise = torch.sin(3 * x_t)
beta, alpha = betas[i][:, None, None, None], alphas[i][:, None, None, None]
ddpm_mean = (x_t - beta / (1 - alpha_bar).sqrt() * noise) / alpha.sqrt()

large = pyrodiff.GaussianReverse(
    forward, pyrodiff.NoisePrediction(Something(), forward)
)
small = pyrodiff.GaussianReverse(
    forward,
    pyrodiff.NoisePrediction(Something(), forward),
    pyrodiff.PosteriorVariance(),
)
print("mean       ", largest_difference(large(x_t, i + 1).mean, ddpm_mean))
large_variance = large(x_t, i + 1).variance
print("fixed_large", largest_difference(large_variance, beta.expand_as(x_t)))

later = i[1:]
posterior_variance = (
    betas[later] * (1 - alphas_cumprod[later - 1]) / (1 - alphas_cumprod[later])
)
small_variance = small(x_t, i + 1).variance[:, 0, 0, 0]
print("fixed_small", largest_difference(small_variance[1:], posterior_variance))

# %%
# At the very last step, timestep 0, a sampler returns the mean and adds no noise. A likelihood cannot: a law without
# variance gives data a density of infinity or 0. So :math:`p_\theta(x_0 \mid x_1)` keeps a variance here,
# :math:`\beta_1` or, with ``PosteriorVariance``, :math:`\tilde\beta_2`, as in Ho's own code.
#
# The three prediction types say the same of :math:`x_0`, in other numbers.

epsilon = forward.noise(x_t, x_0, i + 1)
velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
print("v", largest_difference(forward.velocity(x_t, x_0, i + 1), velocity))

# %%
# A network of theirs
# -------------------
#
# Theirs counts timesteps from 0 and returns an object with the output in ``.sample``. Two lines mend that.
# ``FromTheirs`` takes a ``UNet2DModel`` as it takes this stand-in, which is called the same way:


class FromTheirs(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x_t, t):
        return self.unet(x_t, t - 1).sample


class StandIn(torch.nn.Module):
    """Called as ``UNet2DModel``: ``unet(sample, timestep).sample``."""

    def __init__(self):
        super().__init__()
        self.network = networks.MLP(event_shape=(2,), hidden=64)

    def forward(self, sample, timestep):
        return type("Output", (), {"sample": self.network(sample, timestep + 1)})


# %%
# The training loop
# -----------------
#
# The loop that everybody has written, on the Swiss roll:

data, test_set = datasets.swiss_roll(20000, seed=1), datasets.swiss_roll(200, seed=2)
steps = 600
network = FromTheirs(StandIn())
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
table = alphas_cumprod.float()
for _ in range(steps):
    x = data[torch.randint(len(data), (128,))]
    noise = torch.randn_like(x)
    timesteps = torch.randint(T, (len(x),))
    a = table[timesteps][:, None]
    loss = mse_loss(
        network(a.sqrt() * x + (1 - a).sqrt() * noise, timesteps + 1), noise
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# And its bound, which the loop does not know of. Wrap the network; nothing is trained again.


def diffusion_of(network):
    reverse = pyrodiff.GaussianReverse(
        forward, pyrodiff.NoisePrediction(network, forward)
    )
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


by_hand = diffusion_of(network)
print(pyrodiff.bound(by_hand, test_set, generator=0))

# %%
# The same training by SVI. :math:`L_\mathrm{simple}` is not another loss but another *weighting* of the bound's terms:
# each step counts by what makes it the squared error of the noise. Without the weighting, the bound is trained itself.


def fit(diffusion, weighting=None):
    pair = diffusion.one_step(weighting=weighting)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
        pyrodiff.DiffusionELBO(),
    )
    for _ in range(steps):
        svi.step(data[torch.randint(len(data), (128,))])


simple, whole = diffusion_of(FromTheirs(StandIn())), diffusion_of(FromTheirs(StandIn()))
fit(simple, pyrodiff.SimpleWeighting(simple.reverse))
fit(whole)
for name, diffusion in (
    ("loop by hand", by_hand),
    ("SVI, L_simple", simple),
    ("SVI, the bound", whole),
):
    bound = pyrodiff.bound(diffusion, test_set, generator=0)
    error = float(bound.standard_error(bound.nats))
    print(f"{name:16}{float(bound.nats.mean()):7.3f} ± {error:.3f} nats")

# %%
# The standard errors are those of the 200 test data. Two trainings differ by more, and these are short. The first two
# are one loss, with other random numbers. The third trains the very thing that is scored, and yet it is behind after so
# few steps: in the bound, the squared error of the noise weighs far more at small t, and one random t a datum makes a
# noisy gradient of that (Nichol and Dhariwal, 2021, section 3.3; ``LossSecondMoment`` draws t by what it costs, for
# this reason). The picture shows what a squared error weighs in either.

simple_weighting = pyrodiff.SimpleWeighting(simple.reverse)
figure = Figure(figsize=(6, 2.8), layout="constrained")
axes = figure.subplots()
axes.plot(t, 1 / (T * simple_weighting(t)), color="#b5452c", label="the bound")
axes.axhline(1, color="#1f4e79", label="L_simple")
axes.set(xlabel="t", ylabel="weight of a squared error", yscale="log", xscale="log")
axes.legend(frameon=False)

# %%
# To see that the first two are one and the same, compare the gradients, here on one and the same network and averaged
# over a large batch: up to the noise of the draws, SVI's is that of the sum of squares.

parameters = list(by_hand.reverse.parameters())
batch = data.repeat(2, 1)
noise, timesteps = torch.randn_like(batch), torch.randint(T, (len(batch),))
a = table[timesteps][:, None]
squares = mse_loss(
    network(a.sqrt() * batch + (1 - a).sqrt() * noise, timesteps + 1),
    noise,
    reduction="sum",
)
theirs = torch.cat(
    [one.flatten() for one in torch.autograd.grad(squares / len(batch), parameters)]
)

pair = by_hand.one_step(weighting=pyrodiff.SimpleWeighting(by_hand.reverse))
loss = pyrodiff.DiffusionELBO().differentiable_loss(pair.model, pair.guide, batch)
ours = torch.cat(
    [one.flatten() for one in torch.autograd.grad(loss / len(batch), parameters)]
)
cosine = torch.cosine_similarity(ours, theirs, dim=0)
print("cosine of the two gradients", f"{float(cosine):.3f}")
print("ratio of their norms       ", f"{float(ours.norm() / theirs.norm()):.3f}")

# %%
# Drawing samples
# ---------------
#
# The loop over ``scheduler.step`` is a run of the model. ``AncestralSampler`` draws from the same law, without the
# messages of Pyro. For fewer steps, cut the chain: its steps are those of DDIM's paper (with ``PosteriorVariance`` its
# :math:`\eta = 1`), and it is a model that has a bound, too.

short = whole.subchain(torch.linspace(1, T, 100).round().int().tolist())
samples = pyrodiff.AncestralSampler(short)(num_samples=16, generator=0)
print("samples", tuple(samples.shape))
bound = pyrodiff.bound(short, test_set, generator=0)
error = float(bound.standard_error(bound.nats))
print(f"T = 100: {float(bound.nats.mean()):.3f} ± {error:.3f} nats")

# %%
# What else differs
# -----------------
#
# - Tables are in float64, and differences that cancel (:math:`1 - \bar\alpha_t` near t = 0) are computed without
#   cancelling. Float32 tables are off there by 1e-4 of their value.
# - For a bound choose the variance with care: ``ForwardVariance`` for data with a density, ``PosteriorVariance`` for
#   grey levels (:doc:`/guide`).
# - Pictures with levels want a decoder for a likelihood that is a probability: :doc:`3_discrete_data`. Printed
#   numbers of other codes, and how to convert them: :doc:`/numbers`.
