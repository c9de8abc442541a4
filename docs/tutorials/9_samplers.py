r"""
Drawing in few steps
====================

The samplers, side by side on data whose law is known: the paths they take, how their error falls with the number of
network calls, and what log p is of a draw.

A sampler can be no better than its network. To see the samplers alone, the network here is the exact denoiser of a
mixture of three Gaussians, and nothing is trained.
"""

# %%
# An exact denoiser
# -----------------
#
# For a mixture, :math:`q(x_t)` is a mixture too, and :math:`\hat x_0 = E[x_0 \mid x_t]` is an average over the parts.
# Any module may take the place of a network, and a float64 prior makes the whole diffusion one of float64.

import torch
from matplotlib.figure import Figure
from pyro import distributions as dist
from torch import nn

import pyrodiff

WEIGHTS = torch.tensor([0.5, 0.3, 0.2]).double()
CENTRES = torch.tensor([[-1.2, 0.6], [1.1, 0.9], [0.2, -1.3]]).double()
SCALE = 0.25


class Mixture(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward_process = forward

    def forward(self, x_t, t):
        a, b = (c[..., None] for c in self.forward_process.scales(x_t, t))
        variance = a**2 * SCALE**2 + b**2
        off = x_t[:, None] - a * CENTRES
        belief = WEIGHTS.log() - (off**2 / 2 / variance).sum(-1)
        means = CENTRES + a * SCALE**2 / variance * off
        return (belief.softmax(-1)[..., None] * means).sum(1)


truth = dist.MixtureSameFamily(
    dist.Categorical(WEIGHTS),
    dist.Normal(CENTRES, torch.tensor(SCALE).double()).to_event(1),
)
forward = pyrodiff.GaussianForward(
    pyrodiff.LogSNRSchedule(num_steps=2049, first=8.0, last=-9.0)
)
diffusion = pyrodiff.Diffusion(
    forward,
    pyrodiff.GaussianReverse(forward, Mixture(forward)),
    event_shape=(2,),
    prior=dist.Normal(torch.zeros(2).double(), 1.0).to_event(1),
)

# %%
# Paths
# -----
#
# Each sampler is made of a diffusion, and is called with the number of steps to draw. ``trajectory`` also keeps states
# on the way. Here are four. Two of them draw noise in every step, and two solve the probability flow, which transports
# the same marginals along smooth curves. With the same seed all start from the same points (grey). Each path ends at
# its other dot; the distribution of the data is blue.
#
# - :class:`pyrodiff.AncestralSampler` runs the generative chain itself.
# - :class:`pyrodiff.PredictorCorrectorSampler` draws such a step and then makes steps of Langevin dynamics at the new
#   time, each with another network call.
# - :class:`pyrodiff.DDIMSampler` is Euler's method for the flow. Its ``eta`` puts noise back in.
# - :class:`pyrodiff.HeunSampler` is Heun's method, two calls per step.

samplers = {
    "ancestral, 60 steps": (pyrodiff.AncestralSampler(diffusion), 60),
    "predictor-corrector, 30 steps": (
        pyrodiff.PredictorCorrectorSampler(diffusion),
        30,
    ),
    "DDIM, 60 steps": (pyrodiff.DDIMSampler(diffusion), 60),
    "Heun, 15 steps": (pyrodiff.HeunSampler(diffusion), 15),
}

grid = torch.linspace(-3, 3, 150).double()
plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
density = truth.log_prob(plane).exp()


def paths(sampler, num_steps):
    times = (*reversed(sampler.spaced(num_steps)), 0)
    return sampler.trajectory(200, num_steps=num_steps, times=times, generator=10)


colors = ("#b5452c", "#3c8c5a", "#c48a00", "#7a4f9a", "#1f4e79")
figure = Figure(figsize=(7.6, 7.8), layout="constrained")
panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
for axes, (name, given) in zip(panels, samplers.items(), strict=True):
    axes.contourf(grid, grid, density, levels=12, cmap="Blues", alpha=0.6)
    for path, color in zip(paths(*given).unbind(1)[:5], colors, strict=True):
        axes.plot(*path.T, color=color, linewidth=0.8, marker=".", markersize=3)
        axes.plot(*path[0], "o", color="0.5", markersize=5)
        axes.plot(*path[-1], "o", color=color, markersize=5)
    axes.set(title=name, aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))

# %%
# The solvers map each point of noise to one datum, so that they agree on where a path ends, up to their errors. From
# the same noise, the stochastic samplers draw another datum each time, from the same distribution.

ends = {name: paths(*given)[-1] for name, given in samplers.items()}
for other in ("DDIM, 60 steps", "ancestral, 60 steps"):
    off = (ends[other] - ends["Heun, 15 steps"]).norm(dim=1)
    print(
        f"{other}: ends {float(off.median()):.3f} from where Heun's method does, in the median"
    )

# %%
# The order of a solver
# ---------------------
#
# With h a step in the log signal-to-noise ratio, the error of a solver falls as h to its *order*. It is an attribute,
# and can be measured: here by the mean distance at t = 1 to the end of the flow from the same :math:`x_T`, which Heun's
# method in all 2049 steps gives to about a millionth.
#
# :class:`pyrodiff.DPMSolverSampler` is of order 2 with one call per step, since it reuses the network's output of the
# step before.

(reference,) = pyrodiff.HeunSampler(diffusion).trajectory(400, times=(1,), generator=1)
numbers = (9, 17, 33, 65, 129, 257)
solvers = {
    "DDIM": (pyrodiff.DDIMSampler(diffusion), 1),
    "DPM-Solver++(2M)": (pyrodiff.DPMSolverSampler(diffusion), 1),
    "Heun": (pyrodiff.HeunSampler(diffusion), 2),
}
figure = Figure(figsize=(6.4, 3.4), layout="constrained")
axes = figure.subplots()
print(f"{'':18}order   measured between {numbers} steps")
for color, (name, (solver, calls)) in zip(
    ("#b5452c", "#1f4e79", "#3c8c5a"), solvers.items(), strict=True
):
    errors = []
    for num_steps in numbers:
        (x_1,) = solver.trajectory(400, num_steps=num_steps, times=(1,), generator=1)
        errors.append(float((x_1 - reference).norm(dim=1).mean()))
    measured = -torch.tensor(errors).log2().diff()
    print(f"{name:18}{solver.order:5}   ", *(f"{order:.2f}" for order in measured))
    axes.plot(
        [calls * number for number in numbers],
        errors,
        "o-",
        color=color,
        label=name,
        markersize=4,
    )
axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="error at t = 1")
axes.legend(frameon=False)

# %%
# An order describes what happens as h goes to 0, not which sampler is best at ten calls. Heun's steps cost twice as
# much, and large ones multiply errors: below some ten steps it is the worst of the three.
#
# What the draws are worth
# ------------------------
#
# A stochastic sampler has no such error, as it has no single path to follow. But the distribution of its samples can be
# compared with that of the data, by the *energy distance*, say,
#
# .. math:: 2 E|x - y| - E|x - x'| - E|y - y'| ,
#
# which is 0 only for equal distributions, and has an unbiased estimate. For as many exact draws it is 0 up to noise,
# which the first line shows.


def distances(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def within(x):
    return distances(x, x).sum() / len(x) / (len(x) - 1)


torch.manual_seed(2)
y = truth.sample((2500,))
within_y = within(y)


def energy(x):
    return float(2 * distances(x, y).mean() - within(x) - within_y)


exact = torch.tensor([energy(truth.sample((2500,))) for _ in range(5)])
print(f"exact draws: up to {float(exact.abs().max()):.4f}")
print(f"{'network calls':22}" + "".join(f"{calls:10}" for calls in (6, 12, 24, 48)))
judged = {
    "ancestral": (pyrodiff.AncestralSampler(diffusion), 1),
    "predictor-corrector": (pyrodiff.PredictorCorrectorSampler(diffusion), 2),
    "DDIM": (pyrodiff.DDIMSampler(diffusion), 1),
    "DPM-Solver++(2M)": (pyrodiff.DPMSolverSampler(diffusion), 1),
    "Heun": (pyrodiff.HeunSampler(diffusion), 2),
}
for name, (sampler, each) in judged.items():
    found = [
        energy(sampler(2500, num_steps=calls // each, generator=1))
        for calls in (6, 12, 24, 48)
    ]
    print(f"{name:22}" + "".join(f"{error:10.4f}" for error in found))

# %%
# With 48 calls all are as good as exact draws, as far as 2500 samples can show. With a trained network the network's
# error remains. Noise that is drawn in each step, or added by corrections or by Heun's ``churn``, makes the chain
# forget earlier errors, which may help. :doc:`/samplers` has the numbers for a trained Swiss roll and for digits.
#
# log p of a draw
# ---------------
#
# The flow is a change of variables, so that the density of a sample follows from that of its :math:`x_T`.
# :class:`pyrodiff.FlowSampler` solves it with adaptive steps, to a tolerance, and ``with_log_prob`` returns both.
# Compared with the mixture:

flow = pyrodiff.FlowSampler(diffusion, tolerance=1e-5)
x_0, log_prob = flow.with_log_prob(500, generator=1)
expected = truth.log_prob(x_0)
print(
    f"mean of log p: {float(log_prob.mean()):.4f}, of the truth {float(expected.mean()):.4f} nats"
)
print(f"they differ by up to {float((log_prob - expected).abs().max()):.4f} nats")

# sphinx_gallery_thumbnail_number = 1
figure = Figure(figsize=(7.6, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
points = left.scatter(*x_0.T, c=log_prob, s=8, cmap="viridis")
figure.colorbar(points, ax=left, label="log p, nats")
left.set(
    title="samples of the flow", aspect="equal", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5)
)
right.axline((0, 0), slope=1, color="#1f4e79", linewidth=1)
right.scatter(expected, log_prob, s=8, color="#b5452c")
right.set(title="log p, nats", xlabel="truth", ylabel="flow")

# %%
# The remaining difference is due to the signal that is left in :math:`x_T`, which the prior ignores, and to the score
# being held constant below t = 1.
#
# Which to take
# -------------
#
# - Few calls, any Gaussian diffusion: :class:`pyrodiff.DPMSolverSampler` with 10 to 20 steps.
# - Samples of exactly the model that is bounded, or data in levels: :class:`pyrodiff.AncestralSampler`, in all steps if
#   there is time.
# - log p of the samples: :class:`pyrodiff.FlowSampler`.
#
# :doc:`/samplers` says more about each.
