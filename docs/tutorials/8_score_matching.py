r"""
Score matching and Langevin dynamics
====================================

How a network learns the gradient of a log density, how one draws by following it, what goes wrong, and what noise has
to do with it: the way to a diffusion by its other end.

This page follows section 2 of document 002 (H. Kim, *Lecture 02: Score Based and Diffusion Models*, 2025), part by
part, and draws its figures 1 to 12 anew. :doc:`/equations` lists which object is which equation, and :doc:`/errata`
what does not hold as it stands there.
"""

# %%
# A score
# -------
#
# The score of a density is the gradient of its logarithm, :math:`\nabla \log p(x)`: at every place, the way to where
# data are denser. It does not depend on a constant factor of p, so it can be computed, and learned, for densities
# without a known normalisation.
#
# Most of this page uses the data of Song and Ermon (2019): two Gaussians in the plane, far from each other, with the
# weights 1/5 and 4/5. Lengths are a quarter of theirs, so that the data have a variance of about 1, as a diffusion
# expects. Their score is known, with noise of standard deviation :math:`\sigma` as well.

import math

import pyro
import torch
from matplotlib.figure import Figure
from torch import nn

import pyrodiff
from pyrodiff import datasets, networks, scores

pyro.set_rng_seed(0)
BLUE, RED, GREY = "#1f4e79", "#b5452c", "#9a9a9a"
WEIGHTS = torch.tensor([0.2, 0.8])
CENTRES, WIDTH = torch.tensor([[-1.25, -1.25], [1.25, 1.25]]), 0.25


def draw(number):
    parts = torch.multinomial(WEIGHTS, number, replacement=True)
    return CENTRES[parts] + WIDTH * torch.randn(number, 2)


def variance_of(sigma, x):
    return WIDTH**2 + torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2


def log_shares(x, sigma=0.0):
    """The log density of either part, with its weight; sigma is a number or one a point."""
    variance = variance_of(sigma, x)
    squares = ((x[:, None] - CENTRES) ** 2).sum(-1)
    return WEIGHTS.log() - squares / 2 / variance - (2 * math.pi * variance).log()


def true_score(x, sigma=0.0):
    shares = log_shares(x, sigma).softmax(1)
    return (shares @ CENTRES - x) / variance_of(sigma, x)


def mean(values, digits=3):
    error = float(values.std() / math.sqrt(len(values)))
    return f"{float(values.mean()):.{digits}f} ± {error:.{digits}f}"


# %%
# Explicit and implicit
# ---------------------
#
# Section 2.1. The *explicit* loss of a score s is its squared distance to the true one. Nobody who has only data can
# compute it. Hyvärinen (2005) integrated the mixed term by parts, and the true score is gone:
#
# .. math::
#     \tfrac12 \mathbb{E} \lVert s(x) - \nabla \log p(x) \rVert^2
#     = \mathbb{E} \left[ \mathrm{tr} \nabla s(x) + \tfrac12 \lVert s(x) \rVert^2 \right]
#     + \tfrac12 \mathbb{E} \lVert \nabla \log p(x) \rVert^2 .
#
# The last term does not depend on s, so the two losses differ by the same constant for every s. Here are five of them:
# the true score, none at all, that of a single wide Gaussian, a network, and minus the gradient of a network that
# returns an energy. The last column compares with the constant, computed on a grid.

x = draw(20000)
energy = nn.Sequential(nn.Linear(2, 32), nn.Softplus(), nn.Linear(32, 1))
candidates = {
    "true": true_score,
    "zero": torch.zeros_like,
    "wide Gaussian": lambda x: -x / 1.6,
    "network": nn.Sequential(nn.Linear(2, 32), nn.Softplus(), nn.Linear(32, 2)),
    "energy": scores.minus_gradient(lambda x: energy(x)[:, 0]),
}


def half_square(sigma=0.0):
    """Half the mean squared length of the true score, by a grid."""
    line = torch.linspace(-3, 3, 301)
    grid = torch.cartesian_prod(line, line)
    weights = log_shares(grid, sigma).logsumexp(1).exp() * (line[1] - line[0]) ** 2
    return float((weights * true_score(grid, sigma).square().sum(1)).sum() / 2)


print(f"{'':15}{'explicit':>9}{'implicit':>10}   difference")
for name, score in candidates.items():
    with torch.no_grad():
        explicit = scores.explicit(score, x, true_score)
        implicit = scores.implicit(score, x)
    both = f"{float(explicit.mean()):9.3f}{float(implicit.mean()):10.3f}"
    print(f"{name:15}{both}   {mean(explicit - implicit)}")
print(f"{'the constant':37}{half_square():.3f}")

# %%
# The losses are one number per datum, to be averaged and given to any optimiser. (The line of 002 with a trace inside
# the square has slipped, see :doc:`/errata`.)
#
# Two limits are named there. The trace takes D gradients for data of D numbers, so pictures cost too much. And the
# data are finite: nothing keeps the score from being infinitely steep at each of them.
#
# Denoising
# ---------
#
# Section 2.2. Add noise to the data, and they fill a region and not only a curve. Here are figures 1 and 2: a curve,
# and the same with noise.

roll = datasets.swiss_roll(1500, noise=0.0)
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
for axes, title, points in zip(
    figure.subplots(1, 2),
    ("Figure 1: original manifold", "Figure 2: with Gaussian noise, σ = 0.15"),
    (roll, roll + 0.15 * torch.randn_like(roll)),
    strict=True,
):
    axes.scatter(*points.T, s=2, color=BLUE)
    axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)

# %%
# For noisy data, :math:`\tilde x = x + \sigma \epsilon`, the explicit loss has a second equivalent form (Vincent,
# 2011). The score of the noise alone is known, :math:`\nabla \log q_\sigma(\tilde x \mid x) = -\epsilon / \sigma`, and
#
# .. math::
#     \tfrac12 \mathbb{E} \lVert s(\tilde x) - \nabla \log p_\sigma(\tilde x) \rVert^2
#     = \tfrac12 \mathbb{E} \lVert s(\tilde x) + \epsilon / \sigma \rVert^2
#     + \tfrac12 \mathbb{E} \lVert \nabla \log p_\sigma \rVert^2 - \frac{D}{2 \sigma^2} .
#
# No gradient in x is needed. Again the difference is a constant, this time with noise of 0.2:

sigma, noise = 0.2, torch.randn_like(x)
noisy = x + sigma * noise
print(f"{'':15}{'explicit':>9}{'denoising':>10}   difference")
for name, score in candidates.items():
    with torch.no_grad():
        explicit = scores.explicit(score, noisy, lambda x: true_score(x, sigma))
        denoising = scores.denoising(score, x, sigma, noise=noise)
    both = f"{float(explicit.mean()):9.3f}{float(denoising.mean()):10.3f}"
    print(f"{name:15}{both}   {mean(explicit - denoising)}")
print(f"{'the constant':37}{half_square(sigma) - 1 / sigma**2:.3f}")

# %%
# It learns the score of the *noisy* data, close to that of the data if the noise is small. But then the loss has a
# large variance. Expanded, it contains :math:`s(x) \cdot \epsilon / \sigma` and
# :math:`\lVert \epsilon \rVert^2 / 2 \sigma^2`, whose means do not depend on s and whose size grows without bound.
# ``control_variate=True`` replaces them by their means. The expectation of the loss stays the same, and so does that of
# its gradient.
#
# Standard deviations of the loss, and of its gradient in one factor that multiplies the network:

x_64 = x.double()
network = candidates["network"].double().requires_grad_(False)
print("         loss                     gradient")
print("σ           plain  controlled       plain  controlled")
for sigma in (1.0, 0.1, 0.01, 0.001):
    noise, row, slopes = torch.randn_like(x_64), "", []
    for controlled in (False, True):
        factor = torch.ones(len(x), 1, dtype=torch.float64, requires_grad=True)
        loss = scores.denoising(
            lambda x, factor=factor: factor * network(x),
            x_64,
            sigma,
            noise=noise,
            control_variate=controlled,
        )
        slopes.append(torch.autograd.grad(loss.sum(), factor)[0])
        row += f"{float(loss.detach().std()):12.3g}"
    row += "".join(f"{float(slope.std()):12.3g}" for slope in slopes)
    print(f"{sigma:<5}{row}")
network.float().requires_grad_(True)

# %%
# The standard deviation of the plain loss grows as :math:`1 / \sigma^2`, that of its gradient as :math:`1 / \sigma`;
# with the control variate both stay bounded. It takes a second call of the network, and helps where the noise is small.
#
# Sampling by Langevin dynamics
# -----------------------------
#
# Section 2.2.1. Follow the score and add noise, again and again:
#
# .. math:: x \leftarrow x + \frac{\epsilon}{2} \nabla \log p(x) + \sqrt{\epsilon} \, z .
#
# Where :math:`\epsilon \to 0` and the updates are many, x is a draw of p. At a finite step it is a draw of something a
# little wider: of N(0, 1), the variance is :math:`1 / (1 - \epsilon / 4)`. Here the score is that of an energy,
# :math:`E(x) = x^2 / 2`, and all that is known is E.

normal = scores.minus_gradient(lambda x: (x**2).sum(1) / 2)
for step in (1.0, 0.1):
    sampler = pyrodiff.LangevinSampler(normal, step_size=step)
    end = sampler(torch.zeros(20000, 1), num_updates=round(20 / step), generator=0)
    expected = 1 / (1 - step / 4)
    print(f"step {step}: variance {mean(end[:, 0] ** 2)}, expected {expected:.3f}")

# %%
# The manifold hypothesis
# -----------------------
#
# Section 2.3, the limits. Data in many dimensions lie on something of few, and nearly all of the space around them,
# the *ambient space*, is empty. For figure 3 the text has only the name, the curse of dimensionality. It means: 100
# random points in a line, a square and a cube, cut in ten along each side.

figure = Figure(figsize=(7.5, 2.8), layout="constrained")
points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
for D in (1, 2, 3):
    cells = len((10 * points[:, :D]).long().unique(dim=0))
    print(f"{D} dimensions: {cells:3} of {10**D:4} cells hold a point")
    title = f"Figure 3: {cells} of {10**D} cells"
    if D == 3:
        axes = figure.add_subplot(1, 3, D, projection="3d")
        axes.scatter(*points.T, s=6, color=BLUE, depthshade=False)
        axes.set(zlim=(0, 1), zticks=[0, 1])
    else:
        axes = figure.add_subplot(1, 3, D)
        height = points[:, 1] if D == 2 else torch.full((100,), 0.5)
        axes.scatter(points[:, 0], height, s=6, color=BLUE)
        axes.set(aspect="equal")
        for edge in torch.arange(11) / 10:
            axes.axvline(edge, color=GREY, linewidth=0.4)
            if D == 2:
                axes.axhline(edge, color=GREY, linewidth=0.4)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], yticks=[0, 1] if D > 1 else [])
    axes.set_title(title if D == 1 else title[10:], fontsize=9)

# %%
# On a curve the density is infinite, and off it 0: there is no score to match. One sees it in the loss. This is where
# 002 brings in *sliced* score matching (Song et al., 2019): since :math:`\mathbb{E}[v v^\top] = I`, the trace is the
# mean of :math:`v^\top \nabla s \, v` over random directions v, each of which takes one gradient in place of D. 002
# draws v from N(0, I); here v are random signs, whose estimate varies less. First that the mean is right, for a
# network of ten dimensions:

wide = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 10))
at = torch.randn(1, 10).expand(20000, 10)
with torch.no_grad():
    print("implicit       ", f"{float(scores.implicit(wide, at[:1])):.4f}")
    for number in (1, 4):
        sliced = scores.sliced(wide, at, num_projections=number)
        scatter = f"{float(sliced.std()):.3f}"
        print(f"sliced, {number} v's   {mean(sliced, 4)}, one scatters by {scatter}")

# %%
# Figure 4 has the sliced loss over the iterations, of CIFAR-10 and a large network: without noise it goes up and down
# and settles nowhere, with noise of 0.01 it does. Here is the roll of figure 1, and noise of 0.3, fresh in every step.
# With noise the loss has a least value, minus half the mean squared length of the true score, which is drawn as a
# line: the score of a cloud of points with noise is known, too.


def score_of_points(points, sigma):
    """The score of the density of such points with noise."""

    def score(x):
        shares = (-(torch.cdist(x, points) ** 2) / 2 / sigma**2).softmax(1)
        return (shares @ points - x) / sigma**2

    return score


def match(data, sigma=0.0, num_steps=900, hidden=64):
    """Train a network by the sliced loss; also returns its losses."""
    network = nn.Sequential(
        *(nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()),
        nn.Linear(hidden, 2),
    )
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-2, fused=True), []
    for _ in range(num_steps):
        batch = data[torch.randint(len(data), (128,))]
        loss = scores.sliced(network, batch + sigma * torch.randn_like(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return network, torch.tensor(losses)


sigma = 0.3
noisy = roll + sigma * torch.randn_like(roll)
floor = -float(score_of_points(roll, sigma)(noisy).square().sum(1).mean() / 2)
figure = Figure(figsize=(7, 2.8), layout="constrained")
left, right = figure.subplots(1, 2)
for axes, noise, title in ((left, 0.0, "no noise"), (right, sigma, "noise of 0.3")):
    _, losses = match(roll, noise)
    thirds = [f"{float(part[-100:].mean()):.1f}" for part in losses.chunk(3)]
    print(f"{title:12} loss around step 250, 550, 850: {', '.join(thirds)}")
    axes.plot(losses, color=RED, linewidth=0.6)
    axes.set(xlabel="iteration", title=f"Figure 4: {title}")
right.axhline(floor, color=BLUE, linewidth=1.5, label="least possible")
right.legend(frameon=False, loc="upper right")
left.set_ylabel("sliced loss")
print(f"least possible with noise: {floor:.1f}")

# %%
# Without noise the loss falls for ever, as the network gets steeper across the curve, and measures nothing. With noise
# it has a lower bound, and settles near it.
#
# Where there are no data
# -----------------------
#
# A loss is a mean over data, so that it does not constrain a score where there are none. Figure 5 has the true score of
# the two Gaussians, and the learned one.

learned, _ = match(draw(20000), num_steps=600)
line = torch.linspace(-2, 2, 17)
grid = torch.cartesian_prod(line, line)
fine = torch.linspace(-2, 2, 200)
density = log_shares(torch.cartesian_prod(fine, fine)).logsumexp(1).exp()
figure = Figure(figsize=(7.5, 3.9), layout="constrained")
for axes, title, score in zip(
    figure.subplots(1, 2),
    (r"Figure 5: $\nabla \log p(x)$", r"learned, $s_\theta(x)$"),
    (true_score, learned),
    strict=True,
):
    with torch.no_grad():
        arrows = score(grid)
    axes.imshow(
        density.reshape(200, 200).T.numpy(),
        extent=(-2, 2, -2, 2),
        origin="lower",
        cmap="Oranges",
    )
    axes.quiver(*grid.T, *arrows.T, color=BLUE, scale=450, width=0.004)
    axes.set(xticks=[-1.25, 1.25], yticks=[-1.25, 1.25], aspect="equal", title=title)

with torch.no_grad():
    for name, place in (
        ("on data", draw(5000)),
        ("everywhere", 4 * torch.rand(5000, 2) - 2),
    ):
        loss = scores.explicit(learned, place, true_score)
        print(f"explicit loss {name:11} {mean(loss, 2)}")

# %%
# Where there are data the two nearly agree. Between the modes and in the corners the learned score is far too short,
# and points elsewhere; taken everywhere, the loss is more than a hundred times as large. A chain that starts there goes
# astray.
#
# Slow mixing
# -----------
#
# The second problem exists even with the true score. Of :math:`p = \pi p_1 + (1 - \pi) p_2` the score is
# :math:`r \nabla \log p_1 + (1 - r) \nabla \log p_2`, with r the share of the first part at x. (002 has the sum of
# both, which is that of their product; see :doc:`/errata`.) Where the parts are far from each other, r is 0 or 1 nearly
# everywhere, and the score does not depend on :math:`\pi`. So Langevin dynamics cannot find it: how many points end in
# a mode depends on where they start.
#
# *Annealed* Langevin dynamics, Algorithm 1 of 002, follows the score of noisy data, with less noise from level to
# level. With much noise all is one mode, and as it falls the points divide as they should. Its step is :math:`\alpha_i
# = \epsilon \sigma_i^2 / \sigma_L^2`.
#
# Here it is a sampler like any other, of a diffusion whose signal is 1 throughout (*variance exploding*). Its noise
# grows geometrically (section 2.4.2), and the true score takes the place of a network. ``ScorePrediction`` declares
# that it is a score.


class Exact(nn.Module):
    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t):
        return true_score(x_t, self.schedule.noise(t))


schedule = pyrodiff.GeometricSchedule(num_steps=40, sigma_min=0.025, sigma_max=5.0)
forward = pyrodiff.GaussianForward(schedule)


def diffusion_of(network, forward, event_shape):
    denoiser = pyrodiff.ScorePrediction(network, forward)
    reverse = pyrodiff.GaussianReverse(forward, denoiser)
    return pyrodiff.Diffusion(forward, reverse, event_shape)


exact = diffusion_of(Exact(schedule), forward, (2,))
start = 4 * torch.rand(3000, 2) - 2
langevin = pyrodiff.LangevinSampler(true_score, step_size=0.003)
annealed = pyrodiff.AnnealedLangevinSampler(
    exact, step_size=0.2 * 0.025**2, num_updates=60
)
samples = {
    "(a) exact draws": draw(3000),
    "(b) Langevin": langevin(start, num_updates=500, generator=0),
    "(c) annealed Langevin": annealed(3000, generator=0),
}


def small_mode(x):
    return (x.sum(1) < 0).float()


figure = Figure(figsize=(8, 3), layout="constrained")
print(f"{'start of (b)':24}{mean(small_mode(start))} in the small mode")
for axes, (title, points) in zip(figure.subplots(1, 3), samples.items(), strict=True):
    print(f"{title:24}{mean(small_mode(points))} in the small mode")
    axes.scatter(*points.T, s=2, alpha=0.4, color=BLUE if title[1] == "a" else RED)
    axes.set(
        xlim=(-2.25, 2.25),
        ylim=(-2.25, 2.25),
        xticks=[-1.25, 1.25],
        yticks=[-1.25, 1.25],
        aspect="equal",
    )
    axes.set_title(title if title[1] != "a" else f"Figure 6: {title}", fontsize=9)

# %%
# From a wide start, Langevin dynamics ends near 1/2 and 1/2, with the true score and after any number of updates that
# one would wait for. Annealed, it ends near 1/5 and 4/5.
#
# Many noises
# -----------
#
# Section 2.4. Figures 7 to 12 show why one network should be trained at many noise levels. Figures 7 and 8 are figures
# 1 and 2 again. In 9 and 11 stands the score with little noise. Another step size makes its arrows shorter or longer,
# and they point where they did (10). More noise makes another field (12), which far from the data is smooth, and leads
# to them from anywhere.
#
# An arrow is a fraction of :math:`\sigma^2 s(x)`, which leads to the mean of the data given x (Tweedie's formula).

panels = (
    ("Figures 9, 11: σ = 0.15", 0.15, 0.4),
    ("Figure 10: the same, smaller steps", 0.15, 0.15),
    ("Figure 12: σ = 1", 1.0, 0.4),
)
line = torch.linspace(-2.5, 2.5, 15)
grid = torch.cartesian_prod(line, line)
figure = Figure(figsize=(8.4, 3), layout="constrained")
for axes, (title, sigma, part) in zip(figure.subplots(1, 3), panels, strict=True):
    arrows = part * sigma**2 * score_of_points(roll, sigma)(grid)
    axes.scatter(*roll.T, s=1, color="#f0b48f")
    quiver = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
    axes.quiver(*grid.T, *arrows.T, color=BLUE, **quiver)
    axes.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)

# %%
# A noise conditional score network
# ---------------------------------
#
# NCSN is one network for all noises, trained by the denoising losses of all of them at once, each with a weight:
#
# .. math:: \mathcal{L} = \frac1L \sum_{i=1}^L \lambda(\sigma_i) \, \ell(\theta; \sigma_i),
#     \qquad \lambda(\sigma) = \sigma^2 .
#
# That is the one-step pair of a diffusion with :class:`pyrodiff.ScoreWeighting`: for each datum one random time t, and
# the sum over the levels instead of the mean. (Their i runs from the largest noise down, t from the smallest up.)


class ScoreNetwork(Exact):
    """The score times its noise, from points of a size of about 1."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.network = networks.MLP((2,), hidden=64, num_blocks=1, frequency=0.0)

    def forward(self, x_t, t):
        noise = self.schedule.noise(t).to(x_t.dtype).reshape(-1, 1)
        return self.network(x_t / (1 + noise**2).sqrt(), t) / noise


def fit(diffusion, data, num_steps, batch, learning_rate, average=None):
    """Train by NCSN's loss; with an average, at one learning rate throughout."""
    schedule = diffusion.forward_process.schedule
    weighting = pyrodiff.ScoreWeighting(lambda t: schedule.noise(t) ** 2)
    pair = diffusion.one_step(weighting=weighting)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.Adam(parameters, lr=learning_rate, fused=True),
        pyrodiff.DiffusionELBO(),
        scheduler=None
        if average
        else lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=num_steps
        ),
        average=average,
    )
    for _ in range(num_steps):
        svi.step(data[torch.randint(len(data), (batch,))])
    return svi


pyro.set_rng_seed(0)
ncsn = diffusion_of(ScoreNetwork(schedule), forward, (2,))
fit(ncsn, draw(50000), num_steps=700, batch=512, learning_rate=6e-3)

# %%
# Why :math:`\sigma^2`: 002 says that the length of the score goes as :math:`1 / \sigma`, so that :math:`\sigma^2 \ell`
# is of one size at all noises. Beside it, the signal of an update of Algorithm 1 over its noise, :math:`\tfrac14
# \alpha_i \, \mathbb{E} \lVert s \rVert^2 / D`, which for :math:`\alpha_i \propto \sigma_i^2` should not depend on i
# either.

x_0 = draw(4000)
rows = ["σ", "root E|s|²", "σ root E|s|²", "ℓ", "σ² ℓ", "signal/noise"]
print("".join(f"{one:>14}" for one in rows))
for t in (1, 8, 16, 24, 32, 40):
    sigma = float(schedule.noise(t))

    def score(x, t=t):
        return ncsn.reverse.denoiser.network(x, torch.full((len(x),), t))

    with torch.no_grad():
        length = score(x_0 + sigma * torch.randn_like(x_0)).square().sum(1).mean()
        loss = float(scores.denoising(score, x_0, sigma).mean())
    alpha, root = float(annealed.step_sizes(t)), float(length.sqrt())
    ratio = alpha * root**2 / 8
    values = (sigma, root, sigma * root, loss, sigma**2 * loss, ratio)
    print("".join(f"{value:14.3g}" for value in values))

# %%
# The loss itself spans six powers of ten, and :math:`\sigma^2 \ell` is about 1 at most, half the number of dimensions.
# The length times :math:`\sigma` is nearly constant only where there is more noise than a mode is wide, 0.25. With
# less it has to fall, as the score becomes that of the data. Of data in single points or on a curve it would not.
#
# Now Algorithm 1 with the learned score; and since NCSN is a diffusion, there is a bound. It measures the score at all
# noise levels together; beside it are the bound of the true score and the entropy, a lower limit for any model. (Forty
# steps are few for a factor of 200 in noise, which raises the bound of the true score too.)

learned = pyrodiff.AnnealedLangevinSampler(
    ncsn, step_size=0.2 * 0.025**2, num_updates=60
)
share = small_mode(learned(1000, generator=0))
print(f"annealed, NCSN: {mean(share)} in the small mode")

cost = -log_shares(x_0).logsumexp(1)
print(f"truth        {mean(cost)} nats")
for name, diffusion in (("true score", exact), ("NCSN", ncsn)):
    nats = pyrodiff.bound(diffusion, x_0, num_particles=2, generator=0).nats
    print(f"{name:12} {mean(nats)} nats, {mean(nats - cost)} above the truth")

# %%
# Annealed with the learned score, about a fifth is in the small mode. The exact fraction is decided at the few noise
# levels where the modes separate, and depends on how well the score is learned there; ``examples/ncsn.py`` trains for
# longer. The bound hardly notices: NCSN is as good as the true score there.
#
# Five techniques
# ---------------
#
# Section 2.4.3. For pictures one has to choose the noises, the levels, the network and the steps with more care, and
# Song and Ermon (2020) say how. Here they are, with the handwritten digits of 8 × 8 pixels, scaled to [-1, 1].
#
# *Technique 1*: the largest noise is the largest distance between two of the data. With less, a chain could not get
# from any of them to any other.
#
# *Technique 2*: neighbouring noises have a ratio of which, in D dimensions, half of one noise lies within reach of the
# next. Noise in D dimensions is a thin shell, so with more dimensions it takes more levels. (For D below 5 all overlap
# whatever the ratio, and :func:`pyrodiff.noise_ratio` refuses it; so far on this page the ratio was a free choice.)

digits = datasets.digits().flatten(1) / 8 - 1
test = datasets.digits("test").flatten(1) / 8 - 1
sigma_max, sigma_min = pyrodiff.initial_noise(digits), 0.05
for D in (64, 3072):
    ratio = pyrodiff.noise_ratio(D)
    levels = 2 + int(math.log(sigma_max / sigma_min) / math.log(ratio))
    print(f"D = {D:4}: a ratio of {ratio:.3f}, {levels} levels", end=" ")
    print(f"from {sigma_min} to {sigma_max:.2f}")
D = 64
levels = 2 + int(math.log(sigma_max / sigma_min) / math.log(pyrodiff.noise_ratio(D)))
schedule = pyrodiff.GeometricSchedule(levels, sigma_min, sigma_max)

# %%
# *Technique 4*: as many updates as one can afford at each level, and then the step that leaves the variance there as
# near to 1, in units of :math:`\sigma^2`, as it can be (Eq. 4 of the paper). Their second paper writes an update as
# :math:`x + \alpha s + \sqrt{2 \alpha} z`, the first, Algorithm 1 and the sampler as :math:`x + \tfrac{\alpha}{2} s +
# \sqrt{\alpha} z`: the sampler is given twice the size.

num_updates = 10
size = pyrodiff.langevin_step_size(schedule, D, num_updates)
gamma = float(schedule.noise(2) / schedule.noise(1))


def variance_left(epsilon):
    """Equation 4."""
    r = epsilon / sigma_min**2
    rest = 2 / (2 - r)
    return (1 - r) ** (2 * num_updates) * (gamma**2 - rest) + rest


for factor in (0.5, 1.0, 2.0):
    left = variance_left(factor * size)
    print(f"step {factor * size:.5f}: {left:.3f} of the variance that should be")

figure = Figure(figsize=(4.6, 2.8), layout="constrained")
axes = figure.subplots()
sizes = torch.linspace(0.02, 4, 200) * size
axes.plot(sizes / sigma_min**2, [variance_left(float(one)) for one in sizes], color=RED)
axes.plot(
    size / sigma_min**2,
    variance_left(size),
    "o",
    color=BLUE,
    label="langevin_step_size",
)
axes.set(xlabel="step size, over σ²", ylabel="variance left, over σ²")
axes.axhline(1, color=GREY, linewidth=0.8)
axes.legend(frameon=False)

# %%
# *Technique 3*: the network is not given the noise; it is divided by it, :math:`s(x, \sigma) = f(x) / \sigma`. That is
# :class:`pyrodiff.networks.DividedByNoise`. It works because in many dimensions the norm of x reveals the noise. In the
# plane it does not, and the network should be given the noise.
#
# *Technique 5*: draw with an exponential average of the weights, ``average=pyrodiff.exponential_average(0.995)``. It
# replaces a decay of the learning rate, which is constant here.


class Unconditional(nn.Module):
    def __init__(self, hidden=256):
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Linear(D + 1, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
            ),
            *(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, D)),
        )

    def forward(self, x):
        size = (1 + x.square().mean(1, keepdim=True)).sqrt()
        return self.body(torch.cat([x / size, size.log()], 1)) - x / size


pyro.set_rng_seed(0)
forward = pyrodiff.GaussianForward(schedule)
network = networks.DividedByNoise(Unconditional(), schedule)
improved = diffusion_of(network, forward, (D,))
average = pyrodiff.exponential_average(0.995)
svi = fit(
    improved, digits, num_steps=400, batch=128, learning_rate=3e-3, average=average
)

with torch.no_grad():
    raw = pyrodiff.bound(improved, test, num_particles=2, generator=0).nats
    with svi.averaged():
        nats = pyrodiff.bound(improved, test, num_particles=2, generator=0).nats
        sampler = pyrodiff.AnnealedLangevinSampler(improved, 2 * size, num_updates)
        pictures = sampler(36, generator=0)
print(f"bound of {len(test)} test digits {mean(nats, 2)} nats")
print(f"without the average      {mean(raw - nats, 2)} more")

figure = Figure(figsize=(7.6, 1.5), layout="constrained")
rows = torch.cat([digits[-18:], pictures])
for i, axes in enumerate(figure.subplots(3, 18).flat):
    axes.imshow(rows[i].reshape(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    if i % 18 == 0:
        axes.set_ylabel("data" if i == 0 else "NCSN", fontsize=8)

# %%
# The first row are data, the others are draws, after some seconds of training on a thousand pictures. (The bound is of
# a density, as the levels are treated as real numbers; for probabilities see :doc:`3_discrete_data`.)
#
# From here
# ---------
#
# Section 3 of 002 asks whether the noise might grow gradually, step by step, in place of being applied to the data
# anew. It is the same object: a :class:`pyrodiff.GeometricSchedule` *is* a chain whose steps add noise, and
# ``AncestralSampler(ncsn)`` draws from the chain with the same network, in forty calls of it in place of 2400. For two
# modes so far apart these are too few, even with the true score: hence the gap of the bound above.

for name, diffusion in (("true score", exact), ("NCSN", ncsn)):
    share = small_mode(pyrodiff.AncestralSampler(diffusion)(4000, generator=0))
    print(f"ancestral, {name:10} {mean(share)} in the small mode")

# %%
# The rest of section 3 is :doc:`1_first_model`, and what a bound says is :doc:`2_reading_a_bound`.
# ``examples/ncsn.py`` is the two modes at full length.
