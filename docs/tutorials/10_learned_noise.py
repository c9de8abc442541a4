r"""
Learning the noise
==================

How much noise at which t, and how much a step back leaves open: both can be learned by the bound, with the network or
without it.

The first half follows the section "Learning Diffusion Noise Parameters" of Luo's *Understanding Diffusion Models*
(2022), from its Eq. 100 to its Eq. 114, and prints a number for each of its claims. Then come the schedule of
Sohl-Dickstein et al. (2015), who learn :math:`\beta_1, \dots, \beta_T` themselves, and variances that are learned.
"""

# %%
# Data that are known
# -------------------
#
# The data are eight Gaussians on a circle, so the best guess of a network, :math:`E[x_0 \mid x_t]`, has a closed form.
# With it instead of a network, only the noise is left to be learned, and all numbers of the first half are those of a
# fully trained model.

import math
from itertools import pairwise

import pyro
import torch
from matplotlib.figure import Figure
from torch.distributions import kl_divergence

import pyrodiff
from pyrodiff import datasets, networks

pyro.set_rng_seed(0)
data, x_0 = (
    datasets.eight_gaussians(20000, seed=1),
    datasets.eight_gaussians(2000, seed=2),
)
angle = math.pi / 4 * torch.arange(8)
CENTRES, SPREAD = 4 * torch.stack([angle.cos(), angle.sin()], -1) / 2**0.5, 0.125


class BestGuess(torch.nn.Module):
    """E[x_0 | x_t] of the eight."""

    def __init__(self, forward):
        super().__init__()
        self.process = forward

    def forward(self, x_t, t):
        a, b = self.process.scales(x_t, t)
        total = a**2 * SPREAD + b**2
        off = x_t[..., None, :] - a[..., None] * CENTRES
        part = (-off.square().sum(-1) / (2 * total)).softmax(-1)
        guess = CENTRES + (a * SPREAD / total)[..., None] * off
        return (part[..., None] * guess).sum(-2)


def known(schedule, variance=None):
    forward = pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, BestGuess(forward), variance)
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


# %%
# One term at a time: Eq. 100
# ---------------------------
#
# Eq. 100 trains on one t per datum, drawn uniformly from 2..T, instead of the sum over all of them. Here that is
# ``diffusion.one_step()``. It scales its term by :math:`1 / p(t)`, so that its expectation is the sum itself:
#
# .. math:: \sum_{t=2}^T L_{t-1} = (T - 1) \, \mathbb{E}_{t \sim U\{2..T\}} \left[ L_{t-1} \right], \qquad
#     L_{t-1} = \mathbb{E} \, D_\mathrm{KL}(q(x_{t-1} \mid x_t, x_0) \,\Vert\, p_\theta(x_{t-1} \mid x_t))

T = 10
fixed = pyrodiff.LogSNRSchedule(num_steps=T, first=5.0, last=-6.0)
plain = known(fixed, pyrodiff.PosteriorVariance())  # Luo's, Eq. 85
elbo = pyrodiff.DiffusionELBO()


def at_random_times(diffusion, x_0, draws=1):
    """Estimates of the sum of all L_{t-1}, of one t per datum."""
    pair, x_0 = diffusion.one_step(), x_0.repeat(draws, 1)
    with torch.no_grad():
        return elbo.terms(pair.model, pair.guide, x_0)["x_s"]


def numbers(x, places=3):
    return " ".join(f"{value:.{places}f}" for value in x.tolist())


def mean(x):
    return f"{float(x.mean()):8.4f} ± {float(x.std()) / len(x) ** 0.5:.4f}"


bound = pyrodiff.bound(plain, x_0, num_particles=8, generator=0)
print("all t for each datum:", mean(bound.denoising.sum(0)))
print("one t for each datum:", mean(at_random_times(plain, x_0, 20)))

# %%
# The weight of the squared error: Eqs. 101 to 110
# ------------------------------------------------
#
# Where both steps have the variance :math:`\sigma_q^2(t)` of Eq. 85, their divergence is a squared error of
# :math:`\hat x_0` with a weight, Eq. 99. Eqs. 101 to 108 simplify that weight. Here it is before, half way and after,
# at each t, and in the form of Eq. 110, half the fall of the signal-to-noise ratio (Eq. 109):
#
# .. math::
#     \frac{1}{2 \sigma_q^2(t)} \frac{\bar\alpha_{t-1} (1 - \alpha_t)^2}{(1 - \bar\alpha_t)^2}
#     = \frac12 \left( \mathrm{SNR}(t - 1) - \mathrm{SNR}(t) \right), \qquad
#     \mathrm{SNR}(t) = \frac{\bar\alpha_t}{1 - \bar\alpha_t}

t = torch.arange(2, T + 1)
alpha, now, before = 1 - fixed.beta(t), fixed.alpha_bar(t), fixed.alpha_bar(t - 1)
sigma2 = (1 - alpha) * (1 - before) / (1 - now)
weights = {
    "Eq. 99": before * (1 - alpha) ** 2 / (1 - now) ** 2 / (2 * sigma2),
    "Eq. 103": before * (1 - alpha) / ((1 - before) * (1 - now)) / 2,
    "Eq. 108": (before / (1 - before) - now / (1 - now)) / 2,
    "Eq. 110": (fixed.log_snr(t - 1).exp() - fixed.log_snr(t).exp()) / 2,
}
for name, weight in weights.items():
    print(f"{name:8}", numbers(weight))

# %%
# And against the divergence of the two kernels, for one draw of :math:`x_5` for each of five data:

x_5 = plain.forward_process.marginal(x_0[:5], 5).sample()
step_back = plain.forward_process.posterior(x_5, x_0[:5], 5)
divergence = kl_divergence(step_back.base_dist, plain.reverse(x_5, 5).base_dist).sum(-1)
error = (plain.reverse.denoiser(x_5, 5) - x_0[:5]).square().sum(-1)
print("KL of the kernels ", numbers(divergence, 4))
print("weight times error", numbers(weight[3] * error.detach(), 4))

# %%
# So the bound depends on a schedule through its signal-to-noise ratios alone, and these are learned.
#
# A network that can only rise: Eq. 111
# -------------------------------------
#
# The ratio must fall with t. Luo writes it :math:`\mathrm{SNR}(t) = \exp(-\omega_\eta(t))` with a network
# :math:`\omega_\eta` that rises whatever its parameters are. ``LearnedLogSNRSchedule`` is that, by
# :math:`\lambda_t = -\omega_\eta(t)`, the logarithm of the ratio: positive weights on sigmoids that rise, as in the
# appendix of *Variational Diffusion Models* (Kingma et al., 2021), between two ends that may be learned too. With
# random parameters:


def thrown_about(seed, num_steps=T, first=5.0, last=-6.0):
    torch.manual_seed(seed)
    schedule = pyrodiff.LearnedLogSNRSchedule(num_steps, first, last, 16)
    with torch.no_grad():
        schedule.slopes += 8 * torch.rand(16)
        schedule.offsets += 4 * torch.randn(16)
        schedule.weights += 5 * torch.randn(16)
    return schedule


shapes = [thrown_about(seed) for seed in range(3)]
all_t = torch.arange(1, T + 1)
for schedule in shapes:
    print("ω:", " ".join(f"{-x:5.2f}" for x in schedule.log_snr(all_t).tolist()))

# %%
# Signal and noise from it: Eqs. 112 to 114
# -----------------------------------------
#
# :math:`\bar\alpha_t = \mathrm{sigmoid}(-\omega_\eta(t))` and :math:`1 - \bar\alpha_t =
# \mathrm{sigmoid}(\omega_\eta(t))`. Luo's other way, a network for :math:`\alpha_t`, needs it at all times up to t for
# the product :math:`\bar\alpha_t`. Here a kernel from any s to any t evaluates the network at two times only, and
# agrees with the product:

omega = -shapes[0].log_snr(all_t)
product = (1 - shapes[0].beta(all_t)).cumprod(0)
for name, found in {
    "sigmoid(-ω), Eq. 113": (-omega).sigmoid(),
    "signal squared": shapes[0].signal(all_t) ** 2,
    "product of 1 - β": product,
    "sigmoid(ω), Eq. 114": omega.sigmoid(),
    "noise squared": shapes[0].noise(all_t) ** 2,
}.items():
    print(f"{name:21}", numbers(found, 4))

# %%
# Learned by the bound
# --------------------
#
# "The objective in Equation 100 must now optimize over η as well." But Eq. 100 alone is not enough: it leaves out
# :math:`L_T` and :math:`L_0`, and without these the best schedule is one that does not fall at all. Two schedules learn
# from the same start, one by the sum of the :math:`L_{t-1}` only, the other by the whole bound:


def learn(diffusion, terms=("x_T", "x_s", "x_0"), num_steps=100, lr=0.09):
    pair, schedule = diffusion.one_step(), diffusion.forward_process.schedule
    optimizer = torch.optim.Adam(schedule.parameters(), lr=lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        batch = data[torch.randint(len(data), (512,))]
        found = elbo.terms(pair.model, pair.guide, batch)
        optimizer.zero_grad()
        sum(found[name].mean() for name in terms).backward()
        optimizer.step()
        decay.step()
    return diffusion


HEAD = f"{'':24}{'L_T':>7} {'ΣL_t-1':>7} {'L_0':>7} {'bound':>8}          {'λ_1':>6} {'λ_T':>6}"


def row(name, diffusion):
    found = pyrodiff.bound(diffusion, x_0, num_particles=2, generator=0)
    parts = found.prior, found.denoising.sum(0), found.reconstruction
    three = " ".join(f"{float(part.mean()):7.3f}" for part in parts)
    ends = diffusion.forward_process.schedule.log_snr(torch.tensor([1, T]))
    print(
        f"{name:24}{three} {float(found.mean):8.3f} ± "
        f"{float(found.standard_error(found.nats)):.3f}  {ends[0]:6.2f} {ends[1]:6.2f}"
    )
    return found


torch.manual_seed(0)
start = known(pyrodiff.LearnedLogSNRSchedule(T, 5.0, -6.0, 64))
astray = learn(known(pyrodiff.LearnedLogSNRSchedule(T, 5.0, -6.0, 64)), terms=["x_s"])
learned = learn(known(pyrodiff.LearnedLogSNRSchedule(T, 5.0, -6.0, 64)))
inside = learn(known(pyrodiff.LearnedLogSNRSchedule(T, 5.0, -6.0, 64, False)))
print(HEAD)
first = row("as it starts", start)
row("by Eq. 100 alone", astray)
between = row("by the bound, ends kept", inside)
after = row("by the bound", learned)
print("entropy of the data: 2.830")

# %%
# By Eq. 100 alone the ends run into each other: hardly anything is denoised, and everything is left to the two terms
# that are not counted. By the whole bound the ends move too, but at a cost: there may be more noise at t = 1, and a
# little signal left at T, which costs :math:`L_T`. With few steps that is worth it.
#
# In between, the times gather where the eight places are distinguished, and from t = 4 on the :math:`L_{t-1}`
# level out at a third of a nat. The first two cost more, and may: there it is known in which of the eight a datum lies,
# and among the data of one Gaussian a step back is nearly a Gaussian too, however long it is.

# sphinx_gallery_thumbnail_number = 1
drawn = {
    "as it starts": (start, first, "#777777"),
    "learned, ends kept": (inside, between, "#1f4e79"),
    "learned": (learned, after, "#b5452c"),
}
figure = Figure(figsize=(8, 3.2), layout="constrained")
left, right = figure.subplots(1, 2)
for name, (diffusion, found, color) in drawn.items():
    log_snr = diffusion.forward_process.schedule.log_snr(all_t).detach()
    left.plot(all_t, log_snr, "o-", markersize=4, color=color, label=name)
    cost = found.denoising.mean(1)
    right.plot(all_t[1:], cost, "o-", markersize=4, color=color, label=name)
left.set(xlabel="t", ylabel="$\\lambda_t$, log signal-to-noise ratio")
right.set(xlabel="t", ylabel="$L_{t-1}$, nats", ylim=(0, None))
left.legend(frameon=False)

# %%
# The ends pay for themselves
# ---------------------------
#
# At the optimum, what a little more signal at T would save in the steps equals what it would cost in :math:`L_T`, and
# likewise at the other end with :math:`L_0`: the derivatives add up to 0.

pair, schedule = learned.one_step(), learned.forward_process.schedule
found = elbo.terms(pair.model, pair.guide, x_0.repeat(20, 1))
ends = schedule.first, schedule.log_fall  # λ_T = λ_1 - exp(log_fall)
print("derivative by   λ_1 alone  λ_T alone")
for name, term in {"L_T": "x_T", "ΣL_t-1": "x_s", "L_0": "x_0"}.items():
    slopes = torch.autograd.grad(
        found[term].mean(), ends, retain_graph=True, allow_unused=True
    )
    both, fall = (0.0 if slope is None else float(slope) for slope in slopes)
    by_last = -fall / float((schedule.first - schedule.last).detach())
    print(f"{name:14} {both - by_last:10.3f} {by_last:10.3f}")

# %%
# The best schedule of a Gaussian
# -------------------------------
#
# For data N(m, v) the error of the best guess is :math:`v / (1 + v \, \mathrm{SNR})`, and with fixed ends the minimum
# of Eq. 110's sum has a closed form: :math:`1 + v \, \mathrm{SNR}(t)` falls by the same factor r in each step, and
# every :math:`L_{t-1}` is :math:`(r - 1) / 2` a dimension, the same. The monotone network finds it.

v = 0.3
gauss = pyrodiff.LearnedLogSNRSchedule(T, 4.0, -3.0, 64, learn_ends=False)
optimizer = torch.optim.LBFGS(
    gauss.parameters(), max_iter=100, line_search_fn="strong_wolfe"
)


def costs():
    snr = gauss.log_snr(all_t).exp()
    return (snr[:-1] - snr[1:]) / 2 * v / (1 + v * snr[1:])  # Eq. 110


def closure():
    optimizer.zero_grad()
    total = costs().sum()
    total.backward()
    return total


print(f"at the start, a line:   {float(costs().sum().detach()):.4f} nats")
optimizer.step(closure)
top, low = 1 + v * gauss.log_snr(torch.tensor([1, T])).exp().detach()
r = (top / low) ** (1 / (T - 1))
ratios = 1 + v * gauss.log_snr(all_t).exp().detach()
print(f"learned:                {float(costs().sum().detach()):.4f} nats")
print(
    f"(T - 1) (r - 1) / 2:    {float((T - 1) * (r - 1) / 2):.4f} nats, r = {float(r):.4f}"
)
print("ratios of 1 + v SNR:", numbers(ratios[:-1] / ratios[1:]))
print("L_t-1:              ", numbers(costs()))

# %%
# That is so with Luo's variance. With the best variance of a step, of which more below, all steps of a Gaussian are
# exact, and one long step costs what two short ones do: half the logarithm of the ratio of its :math:`1 + v \,
# \mathrm{SNR}`. The linear and the learned schedule are then equally good:

for name, schedule in (
    ("line", pyrodiff.LogSNRSchedule(T, 4.0, -3.0)),
    ("learned", gauss),
):
    error = v / (1 + v * schedule.log_snr(all_t).exp().detach())
    best = pyrodiff.AnalyticVariance(error)(pyrodiff.GaussianForward(schedule), t)
    cost = (best / schedule.posterior(t)[2] ** 2).log() / 2
    print(f"{name:8} {float(cost.sum().detach()):.4f} nats:", numbers(cost))
print(f"(T - 1) log(r) / 2 = {float((T - 1) * r.log() / 2):.4f}")

# %%
# A million steps: the ends alone
# -------------------------------
#
# With T to infinity the sum of Eq. 110 becomes :math:`\frac12 \int \mathrm{mmse} \, d\mathrm{SNR}`: an integral over
# the ratio, independent of the path of t. Three random networks, and one with another end:

MILLION = 10**6
print("                          T = 10             T = 1000000, and its spread")
for name, (seed, last) in {
    "one shape": (0, -6.0),
    "another": (1, -6.0),
    "a third": (2, -6.0),
    "the first, to -2": (0, -2.0),
}.items():
    row_of = []
    for steps in (T, MILLION):
        schedule = thrown_about(seed, steps, last=last)
        estimates = at_random_times(
            known(schedule, pyrodiff.PosteriorVariance()), x_0, 10
        )
        row_of.append(mean(estimates))
    print(f"{name:18} {row_of[0]}  {row_of[1]}   {float(estimates.std()):.2f}")

# %%
# In T = 10 steps the shape decides; in a million the three agree within their errors. The shape then only affects the
# variance of the estimates. ``steadied`` trains it for just that, by the gradient of the squares (Kingma et al., 2021,
# appendix I.2):


class Steady(pyrodiff.DiffusionELBO):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        terms = self.terms(model, guide, *args, **kwargs)
        schedule = model.forward_process.schedule
        return terms["x_T"].sum() + terms["x_0"].sum() + schedule.steadied(terms["x_s"])


torch.manual_seed(0)
wide = pyrodiff.LearnedLogSNRSchedule(MILLION, 5.0, -6.0, 64, learn_ends=False)
steady = known(wide, pyrodiff.PosteriorVariance())
pair = steady.one_step()
svi = pyrodiff.SVI(
    pair.model, pair.guide, lambda p: torch.optim.Adam(p, lr=0.1), Steady()
)
for when in ("before", "after"):
    estimates = at_random_times(steady, x_0, 20)
    print(f"{when:7} {mean(estimates)}, spread {float(estimates.std()):.2f}")
    if when == "before":
        for _ in range(80):
            svi.step(data[torch.randint(len(data), (128,))])

# %%
# 2015: the betas, and frozen noise
# ---------------------------------
#
# Sohl-Dickstein et al. learn :math:`\beta_2, \dots, \beta_T` of a Gaussian diffusion by gradient ascent on their bound
# K, and keep :math:`\beta_1` a small constant, against overfitting. The noise :math:`\epsilon` of :math:`x_t = a_t x_0
# + b_t \epsilon` is an auxiliary variable, held constant while the derivative by the betas is taken: they *freeze* it.
# A seed set before each step does that, in the trajectory pair, which has all t at once. The bound of a batch is then a
# deterministic function of the betas, and falls monotonically:

losses, of_betas = {}, {}
for name in ("fresh noise", "frozen noise"):
    diffusion = known(pyrodiff.LearnedBetaSchedule(fixed.beta(all_t)))
    svi = pyrodiff.SVI(
        diffusion.model, diffusion.guide, lambda p: torch.optim.Adam(p, lr=0.03), elbo
    )
    losses[name], of_betas[name] = [], diffusion
    for number in range(60):
        pyro.set_rng_seed(0 if name == "frozen noise" else number)
        losses[name].append(float(svi.step(data[:256])) / 256)
    rises = sum(b > a for a, b in pairwise(losses[name]))
    print(f"{name:12} {rises:2} of 59 steps raise the bound of the batch")

print()
print(HEAD)
for name, diffusion in of_betas.items():
    row(f"betas, {name}", diffusion)
betas = diffusion.forward_process.schedule.betas.detach()
print()
print("β before:", numbers(fixed.beta(all_t), 4))
print("β after: ", numbers(betas, 4))

# %%
# :math:`\beta_1` has stayed, and with it :math:`\lambda_1`; the other end has moved as above.
#
# The variance of a step back
# ---------------------------
#
# The other number of a step is the model's own. A step from t to s is best with
#
# .. math:: \sigma^2 = \tilde\beta_{s|t} + w_0^2 \, \mathrm{Var}(x_0 \mid x_t),
#
# the variance of the posterior given :math:`x_0`, plus the uncertainty about :math:`x_0`, with its weight :math:`w_0`
# in the mean. In small steps the second part is negligible; in large ones it is most of it. ``PosteriorVariance``
# (Luo's) leaves it out; ``ForwardVariance``, :math:`\beta_t`, is what it would be for data of variance 1;
# :func:`pyrodiff.analytic_variance` measures one number for each t. 2015's :math:`f_\Sigma(x_t, t)` is a network of the
# state: ``RangeVariance`` (Nichol and Dhariwal, 2021) has :math:`\sigma^2` between :math:`\tilde\beta_t` and
# :math:`\beta_t` in the logarithm, ``DiagonalVariance`` has any. The network returns a second number, v, for each of a
# state. Here the first is the exact denoiser, so that only v is learned:


class GuessAndV(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.guess, self.v = (
            BestGuess(forward),
            networks.MLP((2,), hidden=64, num_blocks=1),
        )

    def forward(self, x_t, t):
        return torch.stack([self.guess(x_t, t), self.v(x_t, t)], -1)


def with_v(variance, schedule=fixed):
    forward = pyrodiff.GaussianForward(schedule)
    denoiser = pyrodiff.DataPrediction(GuessAndV(forward), forward)
    return pyrodiff.Diffusion(
        forward, pyrodiff.GaussianReverse(forward, denoiser, variance), (2,)
    )


def train(diffusion, num_steps=200, weighting=None):
    pair = diffusion.one_step(weighting=weighting)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        elbo,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, num_steps),
    )
    for _ in range(num_steps):
        svi.step(data[torch.randint(len(data), (512,))])
    return diffusion


pyro.set_rng_seed(0)
measured = pyrodiff.analytic_variance(known(fixed), data[:4000], generator=0)
models = {
    "posterior": known(fixed, pyrodiff.PosteriorVariance()),
    "forward, β": known(fixed),
    "analytic": known(fixed, measured),
    "range, learned": train(with_v(pyrodiff.RangeVariance())),
    "diagonal, learned": train(with_v(pyrodiff.DiagonalVariance())),
}
CHAINS = {10: None, 5: [1, 3, 5, 7, 10], 3: [1, 5, 10]}


def chains(name, diffusion):
    """The bounds of all ten steps, of five and of three."""
    found = {}
    for K, times in CHAINS.items():
        short = diffusion if times is None else diffusion.subchain(times)
        found[K] = pyrodiff.bound(short, x_0, num_particles=2, generator=0)
    nats = [
        f"{float(b.mean):8.3f} ± {float(b.standard_error(b.nats)):.3f}"
        for b in found.values()
    ]
    print(f"{name:28}", "".join(nats))
    return found


print(f"{'':28}   T = 10          5 of them       3 of them")
bounds = {name: chains(name, diffusion) for name, diffusion in models.items()}

# %%
# Luo's variance is the worst by far, and the worse the longer the steps; :math:`\beta_t` is a fair choice; one measured
# number per t, without training, gives most of the gain at five and three steps. A variance that depends on the state
# is better still. In three steps ``RangeVariance`` falls behind the measured number: a shorter chain has other
# :math:`\tilde\beta_t` and :math:`\beta_t`, so that its v, learned in all ten steps, means another variance there.
# ``DiagonalVariance`` learns the uncertainty about the data, which is the same in any chain.
#
# This is what it has learned, beside the truth, in the step from t = 5: wide where several of the eight are likely,
# though not quite wide enough in the middle, where there are few states.


def left_open(x_t, t):
    """Var(x_0 | x_t) of the eight, of each dimension."""
    forward = known(fixed).forward_process
    a, b = forward.scales(x_t, t)
    total = a**2 * SPREAD + b**2
    off = x_t[..., None, :] - a[..., None] * CENTRES
    part = (-off.square().sum(-1) / (2 * total)).softmax(-1)[..., None]
    guess = CENTRES + (a * SPREAD / total)[..., None] * off
    centre = (part * guess).sum(-2, keepdim=True)
    return (part * (guess - centre) ** 2).sum(-2) + SPREAD * b**2 / total


line = torch.linspace(-2.5, 2.5, 81)
grid = torch.cartesian_prod(line, line)
_, weight_0, deviation = fixed.posterior(5)
truth = (deviation**2 + weight_0**2 * left_open(grid, 5)).sqrt()
with torch.no_grad():
    by_v = models["diagonal, learned"].reverse(grid, 5).base_dist.scale
figure = Figure(figsize=(8.8, 2.7), layout="constrained")
left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
states = models["forward, β"].forward_process.marginal(x_0[:300], 5).sample()
for axes, title, scale in ((left, "the best", truth), (middle, "learned", by_v)):
    image = axes.imshow(
        scale[:, 0].reshape(81, 81).T.numpy(),
        extent=(-2.5, 2.5, -2.5, 2.5),
        origin="lower",
        vmin=0.4,
        vmax=float(truth.max()),
    )
    axes.scatter(*states.T, s=2, color="white", linewidths=0)
    axes.set(title=title, xticks=[], yticks=[], xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
figure.colorbar(
    image,
    ax=[left, middle],
    label="s.d. of $x_4$ given $x_5$, sideways",
)
COLORS = ("#777777", "#1f4e79", "#d99a2b", "#b5452c")
for name, color in zip(list(bounds)[1:], COLORS, strict=True):
    nats = [float(b.mean) for b in bounds[name].values()]
    right.plot([*CHAINS], nats, "o-", markersize=4, color=color, label=name)
right.axhline(2.83, color="black", linewidth=0.8)
right.text(10, 2.85, "entropy", ha="right", fontsize=8)
right.set(xlabel="steps", ylabel="bound, nats", xticks=[*CHAINS])
right.legend(frameon=False, fontsize=8)

# %%
# Mean and variance of one network
# --------------------------------
#
# With no closed form a network returns both: ``networks.MLP(..., outputs=2)``. A plain bound trains both. Nichol and
# Dhariwal train the mean by the simple loss, the error of the noise at all t alike, and the variance alone by the
# bound, whose gradient does not reach the mean: ``HybridWeighting``. It is for pictures of a thousand steps, whose
# bound is noisy and spends most of its weight on the least visible detail. Its bound is mostly worse, as it is here:


def network_of(schedule):
    forward = pyrodiff.GaussianForward(schedule)
    denoiser = pyrodiff.VelocityPrediction(
        networks.MLP((2,), hidden=64, num_blocks=1, outputs=2), forward
    )
    reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.DiagonalVariance())
    return pyrodiff.Diffusion(forward, reverse, (2,))


chains("network, by the bound", train(network_of(fixed), 200))
hybrid = pyrodiff.HybridWeighting()
_ = chains("network, by the hybrid loss", train(network_of(fixed), 200, hybrid))

# %%
# Both
# ----
#
# Schedule and variance each close a part of the same gap, and together more than either: here the schedule learned
# above is trained further, with a learned variance. It is not made for shorter chains.

both = train(with_v(pyrodiff.DiagonalVariance(), learned.forward_process.schedule))
_ = chains("schedule and variance", both)
print(HEAD)
terms = row("schedule and variance", both).denoising.mean(1)
print("entropy of the data: 2.830")
print("L_t-1:", numbers(terms))

# %%
# :doc:`/learned` has what these gain on a Swiss roll and on digits, with networks throughout, and what choosing the
# times of a long chain gains without any training.
