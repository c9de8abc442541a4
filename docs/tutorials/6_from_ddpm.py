r"""
Coming from DDPM code
=====================

If you know ``diffusers``, or any code after Ho et al. (2020): what corresponds to what, checked in plain torch, the
bound of a network that was trained elsewhere, and what clipping does to it.

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
#    * - ``betas``
#      - ``BetaSchedule(betas)``; those of a name are below
#    * - ``alphas_cumprod[t]``
#      - ``schedule.alpha_bar(t + 1)``
#    * - ``scheduler.add_noise(x_0, noise, t)``
#      - a draw of ``forward.marginal(x_0, t + 1)``
#    * - ``scheduler.step(output, t, x_t).prev_sample``
#      - a draw of ``reverse(x_t, t + 1)``
#    * - ``clip_sample=True``, the default there
#      - ``Clipped(denoiser, -1.0, 1.0)``; nothing is clipped unless you say so
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
# All options of a scheduler stand in a table of their own, :ref:`below <scheduler_options>`.
#
# The formulas
# ------------
#
# First the tables of a DDPM, in plain torch and in float64.

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch.nn.functional import mse_loss

import pyrodiff
from pyrodiff import datasets, networks, plots

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
# At the very last step, timestep 0, a sampler returns the mean and adds no noise. A likelihood cannot: a distribution
# without variance gives data a density of infinity or 0. So :math:`p_\theta(x_0 \mid x_1)` keeps a variance here,
# :math:`\beta_1` or, with ``PosteriorVariance``, :math:`\tilde\beta_2`, as in Ho's own code.
#
# The three prediction types are equivalent estimates of :math:`x_0`.

epsilon = forward.noise(x_t, x_0, i + 1)
velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
print("v", largest_difference(forward.velocity(x_t, x_0, i + 1), velocity))

# %%
# A network of theirs
# -------------------
#
# Theirs counts timesteps from 0 and returns an object with the output in ``.sample``. A wrapper of two lines adapts it.
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
        self.network = networks.MLP(event_shape=(2,), hidden=64, num_blocks=1)

    def forward(self, sample, timestep):
        return type("Output", (), {"sample": self.network(sample, timestep + 1)})


# %%
# The training loop
# -----------------
#
# The loop that everybody has written, on the Swiss roll:

data, test_set = datasets.swiss_roll(20000, seed=1), datasets.swiss_roll(200, seed=2)
steps = 300
network = FromTheirs(StandIn())
optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, fused=True)
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
# The bound of that network, which the loop does not compute. Wrap the network; nothing is trained again.


def diffusion_of(network):
    reverse = pyrodiff.GaussianReverse(
        forward, pyrodiff.NoisePrediction(network, forward)
    )
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


by_hand = diffusion_of(network)
print(pyrodiff.bound(by_hand, test_set, generator=0))

# %%
# The same training by SVI. :math:`L_\mathrm{simple}` is not another loss but another *weighting* of the bound's terms:
# each step's term is scaled so that it is the squared error of the noise. Without the weighting, the loss is the bound
# itself.


def fit(diffusion, weighting=None):
    pair = diffusion.one_step(weighting=weighting)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, fused=True),
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
# are one loss, with other random numbers. The third trains the very bound that is evaluated, and yet it is behind after
# so few steps: in the bound, the squared error of the noise has a far larger weight at small t, and with one random t
# per datum the gradient is noisy (Nichol and Dhariwal, 2021, section 3.3; for this reason ``LossSecondMoment`` draws t
# by its costs). The picture shows the weight of a squared error in either loss.

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
batch = data.repeat(4, 1)
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
# The loop over ``scheduler.step`` is a run of the model. ``AncestralSampler`` draws from the same distribution, without
# Pyro's messages. For fewer steps, cut the chain: its steps are those of DDIM's paper (with ``PosteriorVariance`` its
# :math:`\eta = 1`), and it is a model that has a bound, too.

short = whole.subchain(torch.linspace(1, T, 100).round().int().tolist())
samples = pyrodiff.AncestralSampler(short)(num_samples=16, generator=0)
print("samples", tuple(samples.shape))
bound = pyrodiff.bound(short, test_set, generator=0)
error = float(bound.standard_error(bound.nats))
print(f"T = 100: {float(bound.nats.mean()):.3f} ± {error:.3f} nats")

# %%
# Pictures: clip what the network says of the data
# -------------------------------------------------
#
# Now a script as most people have it: pictures of 8 bits on [-1, 1], the cosine schedule, the noise predicted,
# :math:`L_\mathrm{simple}`. Here they are 8 x 8 digits, and the training takes seconds.

k = datasets.digits("train").long() * 255 // 16  # 0..255
pictures = pyrodiff.from_levels(k, levels=256)
test_pictures = pyrodiff.from_levels(
    datasets.digits("test")[:10].long() * 255 // 16, levels=256
)


class DigitsUNet(torch.nn.Module):
    """Called as ``UNet2DModel``, as the stand-in above."""

    def __init__(self):
        super().__init__()
        self.network = networks.UNet((8, 8), channels=(16, 32), hidden=64)

    def forward(self, sample, timestep):
        return type("Output", (), {"sample": self.network(sample, timestep + 1)})


cosine_forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=1000))
noise_of_pictures = pyrodiff.NoisePrediction(FromTheirs(DigitsUNet()), cosine_forward)


def diffusion_of_pictures(denoiser):
    reverse = pyrodiff.GaussianReverse(
        cosine_forward, denoiser, pyrodiff.PosteriorVariance()
    )
    decoder = pyrodiff.DiscretizedDecoder(levels=256)
    return pyrodiff.Diffusion(
        cosine_forward, reverse, event_shape=(8, 8), decoder=decoder
    )


plain = diffusion_of_pictures(noise_of_pictures)
pair = plain.one_step(weighting=pyrodiff.SimpleWeighting(plain.reverse))
svi = pyrodiff.SVI(
    pair.model,
    pair.guide,
    lambda parameters: torch.optim.Adam(parameters, lr=4e-3, fused=True),
    pyrodiff.DiffusionELBO(),
    average=pyrodiff.exponential_average(0.99),
)
for _ in range(150):
    svi.step(pictures[torch.randint(len(pictures), (64,))])
svi.adopt_average()

# %%
# At t = T a cosine schedule leaves a signal of :math:`a_T = 5 \cdot 10^{-5}`, by which the error of the noise is
# divided in :math:`\hat x_0 = (x_t - b_t \hat\epsilon) / a_t`. :math:`L_\mathrm{simple}` is not affected. The bound is,
# and so are samples, whose first step goes far astray. DDPM code clips :math:`\hat x_0`, in the sampler and in the
# bound, often without saying so. Here that is a denoiser around the denoiser, with the same weights. Train without it:
# where it clips, the gradient is 0.

clipped = diffusion_of_pictures(pyrodiff.Clipped(noise_of_pictures, low=-1.0, high=1.0))
for name, diffusion in (("plain", plain), ("clipped", clipped)):
    bound = pyrodiff.bound(diffusion, test_pictures, generator=0)
    bits = bound.bits_per_dim
    first = bound.denoising[-1].mean() / bound.nats.mean()
    print(
        f"{name:8}{float(bits.mean()):6.2f} ± {float(bound.standard_error(bits)):.2f} bits/dim,"
        f" the step from x_T is {float(first):.1%} of them"
    )

# %%
# The samples show the same: without clipping nearly every pixel is pure black or white. Fifty steps are enough, at the
# times of ``timestep_spacing="trailing"``.

spaced = list(range(20, 1001, 20))
figure = Figure(figsize=(6, 2.4), layout="constrained")
print(f"{'data':8} standard deviation of a pixel {float(pictures.std()):.2f}")
for axes, (name, diffusion) in zip(
    figure.subplots(1, 2), (("plain", plain), ("clipped", clipped)), strict=True
):
    samples = pyrodiff.AncestralSampler(diffusion.subchain(spaced))(24, generator=0)
    extreme = float((samples.abs() == 1).float().mean())
    print(
        f"{name:8} standard deviation of a pixel {float(samples.std()):.2f},"
        f" black or white {extreme:.0%}"
    )
    plots.pictures((samples + 1) / 2, axes, columns=8).set_title(name)

# %%
# .. _scheduler_options:
#
# The options of a scheduler
# --------------------------
#
# ``T`` is the number of steps, ``n`` that of a shorter chain, ``a`` and ``b`` are ``beta_start`` and ``beta_end``. What
# is no name of the package is written below. Tables of betas are best made in float64.
#
# .. list-table::
#    :header-rows: 1
#    :widths: 40 60
#
#    * - diffusers
#      - here
#    * - ``beta_schedule="linear"``
#      - ``LinearSchedule(T, a, b)``
#    * - ``beta_schedule="scaled_linear"``
#      - ``BetaSchedule(torch.linspace(a**0.5, b**0.5, T, dtype=torch.float64) ** 2)``
#    * - ``beta_schedule="squaredcos_cap_v2"``
#      - ``CosineSchedule(T)``
#    * - ``trained_betas=betas``
#      - ``BetaSchedule(betas)``
#    * - ``rescale_betas_zero_snr=True``
#      - ``BetaSchedule(rescaled(betas))``. Nothing is left of the data at t = T, so :math:`L_T = 0`.
#        ``VelocityPrediction``, ``DataPrediction`` and ``LevelPrediction`` go with it; ``NoisePrediction`` and
#        ``ScorePrediction``, which divide by the signal, are refused, as are ``SimpleWeighting`` and ``ode_log_prob``
#    * - ``prediction_type="epsilon"``
#      - ``NoisePrediction(network, forward)``
#    * - ``prediction_type="sample"``
#      - ``DataPrediction(network, forward)``
#    * - ``prediction_type="v_prediction"``
#      - ``VelocityPrediction(network, forward)``
#    * - ``clip_sample=True, clip_sample_range=r``
#      - ``Clipped(denoiser, -r, r)``
#    * - ``thresholding=True, dynamic_thresholding_ratio=p, sample_max_value=m``
#      - ``Thresholded(denoiser, p, m)``. Their default m = 1 makes it the same as ``clip_sample``
#    * - ``variance_type="fixed_small"``, ``"fixed_small_log"``
#      - ``PosteriorVariance()``, for both
#    * - ``variance_type="fixed_large"``
#      - ``ForwardVariance()``, the default; ``FIXED_LARGE`` of OpenAI's code is ``FixedLargeVariance()``
#    * - ``variance_type="learned"``
#      - a reverse process of your own: ``LearnedRange`` with ``v`` as the variance (OpenAI's code: its logarithm)
#    * - ``variance_type="learned_range"``
#      - ``LearnedRange(forward, network)``
#    * - ``set_timesteps(n)``, ``timestep_spacing="linspace"``
#      - ``diffusion.subchain(linspace(T, n))``
#    * - ``timestep_spacing="leading"``, ``steps_offset``
#      - ``diffusion.subchain(leading(T, n, steps_offset))``. It ends before T, where the prior is further off: compare
#        :math:`L_T`
#    * - ``timestep_spacing="trailing"``
#      - ``diffusion.subchain(trailing(T, n))``
#    * - time from 0: ``unet(x, t)`` in 0..T-1
#      - ``network(x_t, t)`` in 1..T: ``unet(x_t, t - 1)``
#
# The times, and the betas without signal at the end (Lin et al., 2024, Algorithm 1):


def linspace(T, n):
    return (np.linspace(0, T - 1, n).round().astype(int) + 1).tolist()


def leading(T, n, steps_offset=0):
    return [1 + k * (T // n) + steps_offset for k in range(n)]


def trailing(T, n):
    return np.arange(T, 0, -T / n).round().astype(int)[n - 1 :: -1].tolist()


def rescaled(betas):
    root = (1 - betas).cumprod(0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


for spacing in (linspace, leading, trailing):
    times = spacing(T, 50)
    print(f"{spacing.__name__:10}{str(times[:3])[:-1]}, ..., {str(times[-2:])[1:]}")
print("alpha_bar(T)", float(pyrodiff.BetaSchedule(rescaled(betas)).alpha_bar(T)))

# %%
# ``learned_range`` is a network of twice as many channels: the noise, and a number v for each pixel, which says where
# between the two fixed variances the variance lies (Nichol and Dhariwal, 2021, Eq. 15). Any module that returns a
# distribution is a reverse process, so this one is a page of code, and with a method ``subchain`` it can be cut.


class LearnedRange(torch.nn.Module):
    def __init__(self, forward, network):
        super().__init__()
        self.forward_process, self.network = forward, network
        self.small, self.large = (
            pyrodiff.PosteriorVariance(),
            pyrodiff.ForwardVariance(),
        )

    def forward(self, x_t, t, *context):
        process = self.forward_process

        def like_x(values):
            values = values.to(x_t.dtype).to(x_t.device)
            return values.reshape(values.shape + (1,) * (x_t.dim() - values.dim()))

        epsilon, v = self.network(x_t, t, *context).chunk(2, dim=1)
        signal, noise = process.scales(x_t, t)
        x_0 = ((x_t - noise * epsilon) / signal).clamp(-1, 1)
        weight_t, weight_0, _ = map(like_x, process.schedule.posterior(t))
        low, high = (
            like_x(kind(process, t).log()) for kind in (self.small, self.large)
        )
        log_variance = low + (v + 1) / 2 * (high - low)
        kernel = dist.Normal(weight_t * x_t + weight_0 * x_0, (log_variance / 2).exp())
        return kernel.to_event(x_t.dim() - 1)

    def subchain(self, forward):
        return LearnedRange(forward, AtTimes(self.network, forward.schedule))


class AtTimes(torch.nn.Module):
    """A network in a chain of fewer steps, which is asked at the times of the whole."""

    def __init__(self, network, schedule):
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, x_t, t, *context):
        return self.network(x_t, self.schedule.time(t), *context)


class TwoThings(torch.nn.Module):
    def forward(self, x_t, t):
        return torch.cat([torch.sin(3 * x_t), torch.cos(x_t)], 1)


learned = LearnedRange(forward, TwoThings())
log_beta, log_small = betas[later].log(), posterior_variance.log()
part = (torch.cos(x_t[1:]) + 1) / 2
log_variance = (
    part * log_beta[:, None, None, None] + (1 - part) * log_small[:, None, None, None]
)
found = learned(x_t[1:], later + 1).variance
print("learned_range", largest_difference(found, log_variance.exp()))
diffusion = pyrodiff.Diffusion(forward, learned, event_shape=(3, 4, 4))
short = diffusion.subchain(trailing(T, 10))
print("ten steps, untrained", float(pyrodiff.bound(short, x_0).nats.mean()))

# %%
# ``one_step()`` trains all of it by the bound. ``.clamp(-1, 1)`` is their ``clip_sample``; leave it out in training.
#
# What else differs
# -----------------
#
# - Tables are in float64, and differences that cancel (:math:`1 - \bar\alpha_t` near t = 0) are computed without
#   cancelling. Float32 tables are off there by 1e-4 of their value.
# - For a bound choose the variance with care: ``ForwardVariance`` for data with a density, ``PosteriorVariance`` for
#   grey levels (:doc:`/guide`).
# - Pictures with levels need a decoder for a likelihood that is a probability: :doc:`3_discrete_data`. Printed
#   numbers of other codes, and how to convert them: :doc:`/numbers`.
