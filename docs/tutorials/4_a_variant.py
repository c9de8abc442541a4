r"""
A variant of your own
=====================

Another kernel, another variance, another prior: a few lines each, checked by ``verify``, trained and bounded as before.

Everything that reads a diffusion (training, bounds, samples, shorter chains) reads its two programs and not its
classes. So a variant is another part, or another program, and nothing has to be registered anywhere.
"""

# %%
# A chain that is too short
# -------------------------
#
# Five Gaussian steps are few for eight Gaussians on a circle. Given a noisy state, the state one step earlier can be in
# one of several places, which a single Gaussian cannot represent. This is the plain model:

import math

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

import pyrodiff
from pyrodiff import datasets, networks

pyro.set_rng_seed(0)
data, x_0 = (
    datasets.eight_gaussians(20000, seed=1),
    datasets.eight_gaussians(1000, seed=2),
)
T = 5
forward = pyrodiff.GaussianForward(
    pyrodiff.LogSNRSchedule(num_steps=T, first=5.0, last=-5.0)
)


def train(diffusion, num_steps=250):
    pair = diffusion.one_step()
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=8e-3, fused=True),
        pyrodiff.DiffusionELBO(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=num_steps
        ),
    )
    for _ in range(num_steps):
        svi.step(data[torch.randint(len(data), (256,))])
    return pyrodiff.bound(diffusion, x_0, num_particles=2, generator=0)


def line(name, bound):
    nats = bound.nats
    error = float(bound.standard_error(nats))
    print(f"{name:24}{float(nats.mean()):7.3f} ± {error:.3f} nats")


denoiser = pyrodiff.VelocityPrediction(
    networks.MLP(event_shape=(2,), hidden=64, num_blocks=1), forward
)
plain = pyrodiff.Diffusion(
    forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,)
)
bounds = {"Gaussian, variance β": train(plain)}
line(*list(bounds.items())[-1])

# %%
# A variance that is learned
# --------------------------
#
# ``GaussianReverse`` takes any module for a variance: called with the forward process and t, it returns
# :math:`\sigma_t^2`. Nichol and Dhariwal (2021) learn where it lies between :math:`\tilde\beta_t` and
# :math:`\beta_t`, in logarithms. Here it is one number for each t, which begins at
# :math:`\beta_t` and may leave the interval. Theirs is a network's, of the state as well:
# ``pyrodiff.RangeVariance()`` is that, and ``DiagonalVariance()`` any variance, instead of the class below, with
# ``networks.MLP(..., outputs=2)``. One of your own that reads the network is a ``pyrodiff.LearnedVariance``, called
# with its second output v too (:doc:`10_learned_noise`).


class BetweenVariance(pyrodiff.Variance):
    def __init__(self, num_steps):
        super().__init__()
        self.part = torch.nn.Parameter(torch.ones(num_steps))

    def forward(self, process, t):
        upper, lower = (
            pyrodiff.ForwardVariance()(process, t),
            pyrodiff.PosteriorVariance()(process, t),
        )
        return lower * (upper / lower) ** self.part[t - 1]


variance = BetweenVariance(T)
denoiser = pyrodiff.VelocityPrediction(
    networks.MLP(event_shape=(2,), hidden=64, num_blocks=1), forward
)
learned = pyrodiff.Diffusion(
    forward, pyrodiff.GaussianReverse(forward, denoiser, variance), event_shape=(2,)
)
bounds["Gaussian, learned"] = train(learned)
line(*list(bounds.items())[-1])
parts = variance.part.detach().tolist()
print("between β̃ (0) and β (1):", *(f"{part:.2f}" for part in parts))

# %%
# A kernel
# --------
#
# A reverse process is any module that is called as ``reverse(x_t, t)`` and returns a distribution of :math:`x_{t-1}`,
# with a batch_shape of one entry per datum. A ``GaussianReverse`` estimates the data, and its mean is the posterior's
# at that estimate. This one makes 16 estimates (which begin at 16 of the data), gives each a probability, and returns
# the mixture.


class MixtureReverse(torch.nn.Module):
    def __init__(self, schedule, guesses):
        super().__init__()
        self.schedule = schedule
        self.guesses = torch.nn.Parameter(guesses.clone())
        self.time = networks.TimeEmbedding(64)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(66, 96),
            torch.nn.SiLU(),
            torch.nn.Linear(96, 96),
            torch.nn.SiLU(),
            torch.nn.Linear(96, 4 * len(guesses)),
            torch.nn.Unflatten(-1, (len(guesses), 4)),
        )

    def forward(self, x_t, t):
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        output = self.body(torch.cat([x_t, self.time(t)], -1))
        weight, log_scale, shift = output.split((1, 1, 2), -1)
        numbers = *self.schedule.posterior(t)[:2], self.schedule.beta(t).sqrt()
        of_x_t, of_x_0, noise = torch.stack(numbers).to(x_t.dtype)[..., None, None]
        places = of_x_t * x_t[:, None] + of_x_0 * (self.guesses + shift)
        parts = dist.Normal(places, noise * log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=weight[..., 0]), parts)


mixture = pyrodiff.Diffusion(
    forward, MixtureReverse(forward.schedule, data[:16]), event_shape=(2,)
)

# %%
# Check it
# --------
#
# Matching shapes prove nothing. ``verify`` tests, on a few data, the claims that a bound rests on: the two programs
# agree, the forward kernels obey Bayes' rule, the terms, the one-step pair and its gradient agree in expectation, and
# bounds fall with K.

print(pyrodiff.verify(mixture, x_0[:8], num_repeats=10, generator=0))

# %%
# No KL of a Gaussian and a mixture is known in closed form. At such a site ``DiffusionELBO`` takes the log ratio at the
# draw: the same in expectation, with more variance.

bounds["mixture of 16"] = train(mixture)
for row in bounds.items():
    line(*row)
print("entropy of the data       2.830 nats")

figure = Figure(figsize=(8, 2.6), layout="constrained")
models = {
    "data": None,
    "Gaussian, variance β": plain,
    "Gaussian, learned": learned,
    "mixture of 16": mixture,
}
for axes, (title, model) in zip(figure.subplots(1, 4), models.items(), strict=True):
    with torch.no_grad():
        x = x_0 if model is None else model.model(num_samples=1000)
    axes.scatter(*x.T, s=1, color="#1f4e79" if model is None else "#b5452c")
    axes.set(xlim=(-5, 5), ylim=(-5, 5), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)

# %%
# A prior that is learned
# -----------------------
#
# The prior :math:`p(x_T)` may be any distribution with the shape of a datum, or a module that returns one, which can be
# trained. Cut the chain off early, where a lot of signal is left: the default prior, of mean 0 and variance 1 for data
# that have these, does not fit. A learned scale fixes part of that, and :math:`L_T` shows how much.


class LearnedPrior(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = (
            torch.nn.Parameter(torch.zeros(2)),
            torch.nn.Parameter(torch.zeros(2)),
        )

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


early = pyrodiff.GaussianForward(
    pyrodiff.LogSNRSchedule(num_steps=T, first=5.0, last=-1.0)
)
for name, prior in (("default prior", None), ("learned prior", LearnedPrior())):
    denoiser = pyrodiff.VelocityPrediction(
        networks.MLP(event_shape=(2,), hidden=64, num_blocks=1), early
    )
    reverse = pyrodiff.GaussianReverse(early, denoiser, BetweenVariance(T))
    bound = train(
        pyrodiff.Diffusion(early, reverse, event_shape=(2,), prior=prior), num_steps=120
    )
    line(name, bound)
    print(f"   of which L_T {float(bound.prior.mean()):7.3f}")
scale = prior.log_scale.detach().exp()
print("learned scale   ", scale)
print("that of q(x_T)  ", early.marginal(data, T).sample().std(0))

# %%
# What a mistake looks like
# -------------------------
#
# A forward process can be varied as well, by its three kernels. They have to belong to one chain. This one claims the
# variance of a step, :math:`\beta_t`, for its posterior, which is too wide, and a bound made with it would not be a
# bound. No type or shape is wrong. ``verify`` says what is, and at which t.


class TooWide(pyrodiff.GaussianForward):
    def posterior(self, x_t, x_0, t, s=None):
        beta = self.schedule.beta(t)[..., None].to(x_t.dtype)
        return dist.Normal(
            super().posterior(x_t, x_0, t, s).mean, beta.sqrt()
        ).to_event(1)


wrong_process = TooWide(forward.schedule)
denoiser = pyrodiff.VelocityPrediction(
    networks.MLP(event_shape=(2,), hidden=16), wrong_process
)
wrong = pyrodiff.Diffusion(
    wrong_process, pyrodiff.GaussianReverse(wrong_process, denoiser), event_shape=(2,)
)
found = pyrodiff.verify(wrong, x_0[:8], num_repeats=10, generator=0)
print(*(claim for claim in found.claims if not claim.passed), sep="\n")

# %%
# A program by hand
# -----------------
#
# If none of the parts fits, write the programs. ``DiffusionELBO`` needs no class of this package: two programs with the
# same sites, in the same order. Here each datum has a label, which the model draws first and which every step may read.
# The guide computes it from the data. Given the label a step back is nearly a Gaussian, and five of them are enough.

K = 8
network = networks.MLP(event_shape=(4,), hidden=64)
schedule = forward.schedule


def label_of(x_0):
    return (torch.atan2(x_0[:, 1], x_0[:, 0]) / (2 * math.pi / K)).round().long() % K


means = torch.stack([data[label_of(data) == k].mean(0) for k in range(K)])


def kernel(x, t, place, log_scale):
    of_x_t, of_x_0, _ = (one.float() for one in schedule.posterior(t))
    guess = place + network(torch.cat([x, place], -1), t)[:, :2]
    scale = schedule.beta(t).sqrt().float() * log_scale[t - 1].exp()
    return dist.Normal(of_x_t * x + of_x_0 * guess, scale).to_event(1)


def model(x_0):
    pyro.module("network", network)
    places, log_scale = (
        pyro.param("places", means),
        pyro.param("log_scale", torch.zeros(T)),
    )
    with pyro.plate("data", len(x_0)):
        place = places[pyro.sample("label", dist.Categorical(torch.ones(K)))]
        x = pyro.sample(f"x_{T}", forward.prior((2,)))
        for t in range(T, 1, -1):
            x = pyro.sample(f"x_{t - 1}", kernel(x, t, place, log_scale))
        pyro.sample("x_0", kernel(x, 1, place, log_scale), obs=x_0)


def guide(x_0):
    with pyro.plate("data", len(x_0)):
        pyro.sample("label", dist.Delta(label_of(x_0)))
        x = pyro.sample(f"x_{T}", forward.marginal(x_0, T))
        for t in range(T, 1, -1):
            x = pyro.sample(f"x_{t - 1}", forward.posterior(x, x_0, t))


elbo = pyrodiff.DiffusionELBO()
svi = pyrodiff.SVI(
    model,
    guide,
    lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, fused=True),
    elbo,
)
for _ in range(100):
    svi.step(data[torch.randint(len(data), (256,))])
with torch.no_grad():
    terms = elbo.terms(model, guide, x_0)
for name, cost in terms.items():
    print(f"{name:6}{float(cost.mean()):8.3f} nats")
print(f"bound {float(sum(terms.values()).mean()):8.3f} nats")
