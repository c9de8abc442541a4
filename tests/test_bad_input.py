"""Bad input is a ValueError that names the argument, what it was and the way out, before anything is drawn or computed.

One table, in sections by what is called, for all of the Python interface; the command and files have their own. A row
is a call and what is said of it, from its first word, the argument, on; ... stands for any words.
"""

import functools
import math
import os
import random
import re
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import bit_diffusion, gaussian_diffusion
from loops import adam, nothing
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader

import pyrodiff
from pyrodiff import datasets, networks, plots, scores, streaming

NAN, INF = math.nan, math.inf
part = functools.partial


class Network(nn.Module):
    """A network of one parameter that counts its calls, and whose output is changed by a function."""

    calls = 0

    def __init__(self, change=lambda found: found):
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.tensor(0.3)), change

    def forward(self, x_t, t, *context):
        Network.calls += 1
        return self.change(self.weight * x_t)


class Returns(nn.Module):
    """A part that returns what it was given, whatever it is called with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *args):
        return self.output(*args) if isinstance(self.output, types.FunctionType) else self.output


def each(call, name, *values):
    """Rows of one argument that cannot have some values, each of which is said."""
    return [(part(call, **{name: value}), f"{name} ... {value!r}") for value in values]


def title(call):
    """The name of what is called, where it has one."""
    while isinstance(call, functools.partial):
        call = call.func
    name = getattr(call, "__qualname__", type(call).__name__)
    return "" if "<" in name else f"{name}: "


# What is no int of at least 1, no number above 0, none in (0, 1), none of False and True, and no source of draws
COUNTS, POSITIVES, PARTS = (0, -2, 2.5, True, "3", None), (0, -1.0, NAN, INF, "1", None, True), (0, 1, NAN, "0.1", None)
SWITCHES, SOURCES = (2, "no", None), (1.5, True, "3", 10**30, np.random.default_rng(3))


class Own(nn.Module):
    """A kernel of one's own, without a denoiser."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t):
        return dist.Normal(x_t + self.shift, 1.0).to_event(1)


class Batches(Own):
    """A kernel all of whose dimensions are the batch's."""

    def forward(self, x_t, t):
        return super().forward(x_t, t).base_dist


class Random(PyroModule):
    """A kernel with a random weight, and a parameter."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.weight = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x_t, t):
        return dist.Normal(self.weight * x_t + self.shift, 1.0).to_event(1)


class Flat(pyrodiff.GaussianForward):
    """A process one of whose laws forgets which dimensions are its event's."""

    def __init__(self, kernel):
        super().__init__(LINEAR)
        setattr(self, kernel, lambda *args: getattr(pyrodiff.GaussianForward, kernel)(self, *args).base_dist)


class Falling(pyrodiff.Schedule):
    """Noise that falls."""

    def signal(self, t):
        return torch.ones_like(torch.as_tensor(t), dtype=torch.float64)

    def noise(self, t):
        return 1 / (1 + torch.as_tensor(t).double())


class Walk(pyrodiff.GaussianForward):
    """A process that does not say how it is cut."""

    subchain = pyrodiff.Forward.subchain


LINEAR, RECIPROCAL = pyrodiff.LinearSchedule(4, 0.1, 0.5), pyrodiff.ReciprocalSchedule(4)
VE = pyrodiff.GeometricSchedule(4, 0.3, 4.0)
Q, EMPTY, EXPLODING = (pyrodiff.GaussianForward(schedule) for schedule in (LINEAR, RECIPROCAL, VE))
BITS = pyrodiff.BinomialForward(RECIPROCAL, 0.2)
NOISE, LOGITS = pyrodiff.NoisePrediction(Network(), Q), pyrodiff.LogitPrediction(Network(), BITS)
REVERSE, BIT_REVERSE = pyrodiff.GaussianReverse(Q, NOISE), pyrodiff.BinomialReverse(BITS, LOGITS)
DIFFUSION = pyrodiff.Diffusion(Q, REVERSE, (2,))
BIT_DIFFUSION = pyrodiff.Diffusion(BITS, BIT_REVERSE, (2,))
PAIR, BIT_PAIR = DIFFUSION.one_step(), BIT_DIFFUSION.one_step()
X, ONES = torch.full((5, 2), 0.7), torch.ones(5, 2)
META = torch.empty(5, 2, device="meta")
LEARNED = nn.Parameter(torch.tensor([0.4, 0.6]))
PROGRAMS, BIT_PROGRAMS = (
    {
        "model": diffusion.model,
        "guide": diffusion.guide,
        "one-step model": pair.model,
        "one-step guide": pair.guide,
        "bound": part(pyrodiff.bound, diffusion),
    }
    for diffusion, pair in ((DIFFUSION, PAIR), (BIT_DIFFUSION, BIT_PAIR))
)
PREDICTIONS = [pyrodiff.DataPrediction, pyrodiff.NoisePrediction, pyrodiff.ScorePrediction, pyrodiff.VelocityPrediction]


def filled(value, shape=(5, 2)):
    x = torch.full(shape, 0.7)
    x.view(-1)[3] = value
    return x


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape) - 1)


def gaussian(reverse=None, forward=Q, shape=(2,), **parts):
    """A diffusion, of parts of one's own."""
    if reverse is None:
        reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, shape, **parts)


def of_network(change, kind=pyrodiff.NoisePrediction):
    """A diffusion whose network's output is changed."""
    return gaussian(pyrodiff.GaussianReverse(Q, kind(Network(change), Q)))


def of_bits(rate):
    forward = pyrodiff.BinomialForward(RECIPROCAL, rate)
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, (2,))


def svi(model=nothing, guide=nothing, optim=adam, loss=None, clip_norm=None, **options):
    return pyrodiff.SVI(model, guide, optim, pyrodiff.DiffusionELBO() if loss is None else loss, clip_norm, **options)


def logits(values, dtype=torch.float32):
    return pyrodiff.LevelCategorical(torch.tensor(values).to(dtype), validate_args=True)


class OfDimension(pyrodiff.Variance):
    """A variance for each dimension, where there is to be one for each datum."""

    def forward(self, process, t):
        return torch.tensor([0.01, 1.0]).double().expand(*(t.shape if isinstance(t, torch.Tensor) else ()), 2)


class Weighed(nn.Module):
    """A decoder with a factor of its own."""

    def forward(self, kernel, x_1):
        pyro.factor("weight", torch.tensor(-1e4))
        return kernel


def own_sampler(step=lambda x: x, last=lambda x: x):
    class Sampler(pyrodiff.Sampler):
        def step(self, x_t, t, *context):
            return step(x_t)

        def last(self, x_1, t, *context):
            return last(x_1)

    return Sampler(DIFFUSION)


def named(call, **options):
    """A call with options, and its name."""
    return functools.update_wrapper(part(call, **options), call)


def svi_of(pair):
    return svi(pair.model, pair.guide)


def loss_of(pair, x_0=X):
    return pyrodiff.DiffusionELBO().loss(pair.model, pair.guide, x_0)


def shaped(event_shape):
    return pyrodiff.Diffusion(Q, REVERSE, event_shape)


def missing(x, imputer=None):
    pair = pyrodiff.MissingData(DIFFUSION, imputer)
    return svi(pair.model, pair.guide).step(x)


def levels_with(value):
    x_0 = LEVELS.clone()
    x_0[1, 1] = value
    return x_0


LEVELS = pyrodiff.from_levels(torch.tensor([[0, 3], [16, 8], [2, 5]]), 17)
DECODERS = {"discretized": pyrodiff.DiscretizedDecoder(17), "softmax": pyrodiff.SoftmaxDecoder(Q, 17)}
OF_LEVELS = gaussian(
    pyrodiff.GaussianReverse(Q, pyrodiff.LevelPrediction(networks.MLP((2,), 8, outputs=17), Q, 17)),
    decoder=DECODERS["softmax"],
)
LEVEL_PROGRAMS = [
    (decoder, program, call)
    for decoder, diffusion in (
        ("a discretized decoder", gaussian(decoder=DECODERS["discretized"])),
        ("a softmax", OF_LEVELS),
    )
    for program, call in (
        ("model", diffusion.model),
        ("one-step model", diffusion.one_step().model),
        ("bound", part(pyrodiff.bound, diffusion)),
    )
]
FIVE = pyrodiff.LevelPrediction(Network(), Q, 5)
MOST_LEVELS = {torch.float16: 513, torch.bfloat16: 65, torch.float32: 2**22 + 1}
PRIOR = dist.Normal(torch.zeros(2), 1.0).to_event(1)
OF_NOISE = gaussian(pyrodiff.GaussianReverse(EXPLODING, pyrodiff.ScorePrediction(Network(), EXPLODING)), EXPLODING)
EXACT = gaussian_diffusion(LINEAR, torch.zeros(2).double(), torch.ones(2).double())
ANCESTRAL, FLOW = pyrodiff.AncestralSampler(DIFFUSION), pyrodiff.FlowSampler(DIFFUSION)
SOLVERS = [pyrodiff.DDIMSampler, pyrodiff.DPMSolverSampler, pyrodiff.HeunSampler, pyrodiff.PredictorCorrectorSampler]
FEW = "num_steps must be at least 2 for order=2, but it is 1: take more steps, or order=1"
GUIDED = {  # what takes the guide of random weights
    "bound": lambda d, **options: pyrodiff.bound(d, X, **options),
    "importance_bound": lambda d, **options: pyrodiff.importance_bound(d, X, num_particles=2, **options),
    "flow": lambda d, **options: pyrodiff.ode_log_prob(d, X, **options),
    "verify": lambda d, **options: pyrodiff.verify(d, X, num_repeats=10, **options),
    "account": lambda d, **options: pyrodiff.variance_account(d, X, num_pairs=2, num_particles=4, **options),
    "sampler": lambda d, **options: pyrodiff.AncestralSampler(d, **options)(3),
    "trajectory": lambda d, **options: pyrodiff.AncestralSampler(d, **options).trajectory(3),
}
BOUND = pyrodiff.Bound(torch.ones(3), torch.ones(3, 3), torch.ones(3), torch.Size((2,)))
IMPORTANCE = pyrodiff.ImportanceBound(torch.zeros(3, 5), torch.Size((2,)))
WHOLE, RANDOM = torch.arange(30).reshape(5, 6) % 5, torch.linspace(-1, 1, 10).reshape(5, 2)
PICTURES = torch.zeros(5, 4, 4)
MASK, VALUES = torch.tensor([True, False]), torch.zeros(2)
INPAINTING, KNOWN = pyrodiff.Inpainting(MASK, VALUES, 0.1), pyrodiff.Inpainting(MASK, VALUES)
THREE = pyrodiff.Inpainting(torch.tensor([True, False, True]), torch.zeros(3), 0.1)
SUM = pyrodiff.Linear(torch.ones(1, 2), torch.ones(1), 0.5)
POSTERIOR = pyrodiff.posterior(DIFFUSION, INPAINTING, num_particles=4, twist=pyrodiff.IsotropicTwist(), generator=0)


TABLE = {}

TABLE["data"] = [
    *[
        (part(call, x_0), f"x_0 ... {said}")
        for name, x_0, said in (
            ("a list", [[0.7, 0.7]], "list"),
            ("an array", X.numpy(), "ndarray ... torch.from_numpy"),
            ("too few dimensions", torch.zeros(2), "(B, 2) ... (2,)"),
            ("too many dimensions", torch.zeros(3, 5, 2), "(B, 2) ... (3, 5, 2)"),
            ("another event", torch.zeros(5, 3), "(B, 2) ... (5, 3)"),
            ("an empty batch", torch.zeros(0, 2), "(0, 2)"),
            ("integers", torch.zeros(5, 2, dtype=torch.long), "floating ... torch.int64"),
            ("booleans", torch.zeros(5, 2, dtype=torch.bool), "torch.bool"),
            ("complex", torch.zeros(5, 2, dtype=torch.complex64), "torch.complex64"),
            ("another device", META, "cpu ... meta"),
            ("NaN", filled(NAN), "nan"),
            ("infinity", filled(INF), "inf"),
            ("minus infinity", filled(-INF), "-inf"),
        )
        for program, call in PROGRAMS.items()
    ],
    *[
        (part(call, ONES.index_fill(0, torch.tensor(1), value)), f"x_0 ... 0 or 1 ... {value}")
        for value in (2.0, -1.0, 0.5, NAN)
        for program, call in BIT_PROGRAMS.items()
    ],
    *[
        (part(PROGRAMS[program], X.double()), "x_0 ... torch.float32 ... torch.float64")
        for program in ("model", "one-step model", "bound")
    ],
    (lambda: DIFFUSION.model(), "x_0 or num_samples must be given, and not both ... None"),
    (lambda: DIFFUSION.model(X, num_samples=3), "x_0 or num_samples must be given, and not both ... 3"),
    (lambda: DIFFUSION.model(5), "num_samples must be given by keyword, num_samples=5"),
    *each(DIFFUSION.model, "num_samples", *COUNTS[:-1]),
    (lambda: DIFFUSION(X), "a diffusion ... by its programs, diffusion.model(x_0) and diffusion.guide(x_0)"),
]

TABLE["levels as data"] = [
    *[
        (part(call, x_0), f"x_0 must be one of 17 levels ... {said}")
        for decoder, program, call in LEVEL_PROGRAMS
        for name, x_0, said in (
            ("a level too many", levels_with(1.125), "1.125"),
            ("half a bin off", LEVELS + 0.0625, "6 of its 6 ... -0.9375"),
        )
    ],
    *[
        (part(pyrodiff.bound, OF_LEVELS, x_0), f"x_0 ... {said}")
        for name, x_0, said in (
            ("off the grid", levels_with(0.013), "17 levels ... levels=17 ... 0..16 ... 1 of its 6 ... 0.013"),
            ("a level too few", levels_with(-1.125), "17 levels ... -1.125"),
            ("33 levels", pyrodiff.from_levels(torch.tensor([[1, 2], [31, 0]]), 33), "17 levels ... 2 of its 4"),
            ("256 levels", pyrodiff.from_levels(torch.tensor([[1, 200]]), 256), "17 levels ... 2 of its 2"),
            ("raw levels", torch.tensor([[0.0, 3.0], [16.0, 8.0]]), "17 levels ... [0, 16]"),
            ("levels as integers", torch.tensor([[0, 3], [16, 8]]), "torch.int64"),
            ("levels as bytes", torch.tensor([[0, 3]], dtype=torch.uint8), "torch.uint8"),
            (
                "levels with noise",
                pyrodiff.from_levels(torch.tensor([[0, 3]]), 17, uniform=True, generator=1),
                "17 levels ... 2 of its 2",
            ),
            ("levels that are NaN", levels_with(NAN), "nan"),
            ("an array of levels", LEVELS.numpy(), "ndarray ... torch.from_numpy"),
        )
    ],
]

TABLE["loaders"] = [
    (lambda evaluate=evaluate, x_0=x_0: evaluate(DIFFUSION, x_0(), num_particles=2), f"x_0 ... {said}")
    for evaluate in (pyrodiff.bound, pyrodiff.importance_bound)
    for x_0, said in (
        (lambda: [], "at least one batch ... list"),
        (lambda: DataLoader(X[:0]), "at least one batch ... DataLoader"),
        (lambda: [X.double(), X], "float64 ... in batch 0 of the loader"),
        (lambda: [(X.long(), torch.arange(5))], "floating ... int64 ... in batch 0 of the loader"),
        (lambda: iter([{"x": X}]), "dict ... in batch 0 of the loader"),
        (lambda: range(3), "int ... in batch 0 of the loader"),
        (lambda: iter([None]), "in batch 0 of the loader"),
        (lambda: iter([()]), "tuple ... in batch 0 of the loader"),
        (lambda: [(X.numpy(),)], "ndarray ... in batch 0 of the loader"),
        (lambda: {"x": X}, "dict"),
        (lambda: "data.npz", "str"),
        (lambda: None, "NoneType"),
        (lambda: 3, "int"),
    )
]

LOG_SNR = networks.LogSNREmbedding(LINEAR, 8)
TIMED = {
    "transition": lambda t: Q.transition(X, t),
    "marginal": lambda t: Q.marginal(X, t),
    "posterior": lambda t: Q.posterior(X, X, t),
    "transition of bits": lambda t: BITS.transition(ONES, t),
    "posterior of bits": lambda t: BITS.posterior(ONES, ONES, t),
    "reverse": lambda t: REVERSE(X, t),
    "reverse of bits": lambda t: BIT_REVERSE(ONES, t),
    "forward variance": lambda t: pyrodiff.ForwardVariance()(Q, t),
    "posterior variance": lambda t: pyrodiff.PosteriorVariance()(Q, t),
    "fixed variance": lambda t: pyrodiff.FixedVariance([0.1] * 4)(Q, t),
    "fixed large variance": lambda t: pyrodiff.FixedLargeVariance()(Q, t),
    "analytic variance": lambda t: pyrodiff.AnalyticVariance([0.5] * 4)(Q, t),
    "range variance": lambda t: pyrodiff.RangeVariance()(Q, t, X),
    "diagonal variance": lambda t: pyrodiff.DiagonalVariance()(Q, t, X),
    "divided by noise": lambda t: networks.DividedByNoise(nn.Identity(), LINEAR)(X, t),
}
TABLE["times"] = [
    *[(part(call, t), f"t ... 1..4 ... {t!r}") for kernel, call in TIMED.items() for t in (0, 5, 2.5, "3", None, True)],
    *[
        (part(call, torch.tensor(t)), f"t ... 1..4 ... {said}")
        for kernel, call in TIMED.items()
        for t, said in (
            ([2.0] * 5, "torch.float32"),
            ([True] * 5, "torch.bool"),
            ([2, 2, 0, 2, 2], "0..2"),
            ([2, 2, 5, 2, 2], "2..5"),
        )
    ],
    *[
        (part(TIMED[kernel], torch.full(shape, 2)), f"t ... (5, 2) ... {shape}")
        for kernel in ("transition", "posterior", "transition of bits", "reverse")
        for shape in ((4,), (1,), (2,), (5, 1), (5, 2, 1))
    ],
    (lambda: Q.transition(X, torch.full((5,), 2, device="meta")), "t ... cpu ... meta"),
    *[
        (part(call, s), f"s ... {s}")
        for kernel, call in {
            "transition": lambda s: Q.transition(X, 2, s),
            "posterior": lambda s: Q.posterior(X, X, 2, s),
            "transition of bits": lambda s: BITS.transition(ONES, 2, s),
            "posterior of bits": lambda s: BITS.posterior(ONES, ONES, 2, s),
        }.items()
        for s in (2, 3, -1, 0.5, "1")
    ],
    (lambda: Q.posterior(X, X, 2, 0), "s must satisfy 1 <= s < t <= 4 ... s is 0"),
    (lambda: Q.posterior(X, X, 1), "s must satisfy 1 <= s < t <= 4 ... s is 0"),
    (lambda: BITS.posterior(ONES, ONES, 2, 0), "s must satisfy 1 <= s < t <= 4 ... s is 0"),
    (lambda: Q.transition(X, torch.full((5,), 2), torch.full((3,), 1)), "s ... (5,) ... (3,)"),
    *[
        (part(getattr(schedule, name), t), f"t ... 0..{schedule.num_steps} ... {said}")
        for schedule, names in {
            LINEAR: ("beta", "alpha_bar", "signal", "noise", "log_snr"),
            pyrodiff.LearnedBetaSchedule([0.1, 0.2, 0.4, 0.4]): ("beta", "log_snr", "scales"),
            pyrodiff.LearnedLogSNRSchedule(4, 5.0, -5.0): ("beta", "log_snr", "scales"),
            pyrodiff.SubSchedule(LINEAR, (2, 3, 4)): ("beta", "signal"),
        }.items()
        for name in names
        for t, said in (
            (-1, -1),
            (5, 5),
            (2.5, 2.5),
            ("3", "'3'"),
            (True, True),
            (None, None),
            (torch.tensor([1, -1]), "-1..1"),
            (torch.tensor(5), "5..5"),
            (torch.tensor(2.0), torch.float32),
            (torch.tensor(True), torch.bool),
        )
    ],
    *[
        (part(call, one), f"{name} ... 4 ... {one!r}")
        for schedule in (pyrodiff.LearnedLogSNRSchedule(4, 5.0, -5.0), pyrodiff.SubSchedule(LINEAR, (1, 2, 3, 4)))
        for name, call in {
            "t must": schedule.posterior,
            "s must": part(schedule.step, 2),
        }.items()
        for one in (None, "3", 2.5, True, 5)
    ],
    (lambda: DIFFUSION.subchain((2, 3, 4)).reverse(X, 4), "t ... 1..3 ... 4"),
    *[(part(LOG_SNR, torch.tensor([1, t])), f"t must lie in ... {t}") for t in (0, 5)],
]

TABLE["states"] = [
    *[
        (part(process.posterior, x_t, x_0, 2), f"x_0 must be a tensor with a floating dtype ... {said}")
        for process, x_t in ((Q, X), (BITS, ONES))
        for x_0, said in ((X.long(), "int64"), (X > 0, "bool"), (X + 0j, "complex64"), (None, "None"))
    ],
    *[
        (part(process.prior, shape), f"event_shape ... {shape!r}")
        for process in (Q, BITS)
        for shape in (3, (2.5,), "2", None)
    ],
    (lambda: Q.transition(torch.ones(5, 2, dtype=torch.long), 2), "x_s ... torch.int64"),
    (lambda: Q.posterior(X.long(), X, 2), "x_t ... torch.int64"),
    (lambda: BITS.transition(X.bool(), 2), "x_s ... torch.bool"),
    (lambda: Q.transition([[0.7, 0.7]], 2), "x_s ... [[0.7, 0.7]]"),
    (lambda: Q.posterior(X, torch.zeros(3, 2), 2), "x_0 ... (5, 2) ... (3, 2)"),
    *[
        (part(getattr(Q, name), *states, t), said)
        for name in ("noise", "score", "velocity")
        for states, t, said in (
            ((X, torch.zeros(3, 2)), 2, "x_0 ... (5, 2) ... (3, 2)"),
            ((X, 0.7), 2, "x_0 must be a tensor with a floating dtype ... 0.7"),
            ((X.long(), X), 2, "x_t ... torch.int64"),
            ((X, X), 0, "t must lie in 1..4, but it is 0"),
        )
    ],
]

TABLE["schedules"] = [
    *each(pyrodiff.LinearSchedule, "num_steps", 2**63),
    (
        lambda: pyrodiff.BetaSchedule(torch.ones(2).to_sparse()),
        "betas must be a dense tensor ... give betas.to_dense()",
    ),
    *[
        (part(cut, times), "times must be increasing ints")
        for cut in (Q.subchain, DIFFUSION.subchain)
        for times in ({1}, {1: 2}, META)
    ],
    *[
        (part(pyrodiff.BinomialForward, RECIPROCAL, rate), "rate must be a sequence of at least one number")
        for rate in ([], torch.ones(0, 2))
    ],
    (lambda: pyrodiff.Clipped(NOISE, [], 1), "low must be a sequence of at least one number"),
    (lambda: pyrodiff.BetaSchedule([0.1, 0.0]), "betas ... (0, 1] ... 0.0"),
    (lambda: pyrodiff.BetaSchedule([-0.1, 0.2]), "betas ... (0, 1] ... -0.1"),
    (lambda: pyrodiff.BetaSchedule([0.1, 1.5]), "betas ... (0, 1] ... 1.5"),
    (lambda: pyrodiff.BetaSchedule([0.1] * 20 + [1.5]), "betas ... (0, 1] ... 1.5"),
    (lambda: pyrodiff.BetaSchedule([0.1, NAN]), "betas ... nan"),
    (lambda: pyrodiff.BetaSchedule([0.1, INF]), "betas ... inf"),
    (lambda: pyrodiff.BetaSchedule([]), "betas ... (0,)"),
    (lambda: pyrodiff.BetaSchedule(0.1), "betas ... ()"),
    (lambda: pyrodiff.BetaSchedule([[0.1, 0.2]]), "betas ... (1, 2)"),
    (lambda: pyrodiff.BetaSchedule([0.1, 1.0, 0.2]), "betas ... betas[1] ... 1"),
    (lambda: pyrodiff.BetaSchedule([True, True]), "betas ... real numbers ... bool"),
    *[
        row
        for schedule, values in {
            pyrodiff.LinearSchedule: {"num_steps": COUNTS, "beta_start": PARTS, "beta_end": PARTS},
            pyrodiff.CosineSchedule: {"num_steps": COUNTS, "offset": POSITIVES, "beta_max": PARTS},
            pyrodiff.ReciprocalSchedule: {"num_steps": COUNTS},
            pyrodiff.GeometricSchedule: {
                "num_steps": COUNTS,
                "sigma_min": POSITIVES,
                "sigma_max": (0.005, 0.01, *POSITIVES),
            },
            pyrodiff.LogSNRSchedule: {
                "num_steps": COUNTS,
                "first": (INF, NAN, "9", None, 800.0),
                "last": (9.0, 10.0, -2000.0, NAN, "1", None),
            },
            part(pyrodiff.LearnedLogSNRSchedule, first=5.0, last=-5.0): {
                "num_steps": COUNTS,
                "first": (INF, None),
                "last": (5.0, 6.0, None),
                "hidden": COUNTS,
                "learn_ends": SWITCHES,
            },
        }.items()
        for name, wrong in values.items()
        for row in each(schedule if name == "num_steps" else part(schedule, 4), name, *wrong)
    ],
    *each(LINEAR.even_times, "num_steps", *COUNTS, 5),
    (lambda: pyrodiff.LearnedBetaSchedule([]), "betas must be a sequence of at least one number"),
    (lambda: pyrodiff.LearnedBetaSchedule([[0.1]]), "betas must be a sequence"),
    (lambda: pyrodiff.LearnedBetaSchedule([0.2, 1.0]), "betas ... betas[1] of 2 is 1.0"),
    (lambda: pyrodiff.LearnedBetaSchedule([0.0, 0.2]), "betas ... betas[0] of 2 is 0.0"),
    (lambda: pyrodiff.LearnedBetaSchedule([0.2, NAN]), "betas ... betas[1] of 2 is nan"),
    (lambda: pyrodiff.LearnedBetaSchedule([0.2]), "fixed must be an int in 0..T-1 = 0"),
    (lambda: pyrodiff.LearnedBetaSchedule([0.2, 0.3], fixed=2), "fixed must be an int in 0..T-1 = 1 ... is 2: give"),
    *each(part(pyrodiff.LearnedBetaSchedule, [0.2, 0.3]), "fixed", -1, True, 0.5),
    *[
        (part(make, LEARNED), f"{name} must be fixed numbers, ... give {name}.detach()")
        for name, make in (
            ("betas", pyrodiff.BetaSchedule),
            ("betas", pyrodiff.LearnedBetaSchedule),
            ("variances", pyrodiff.FixedVariance),
            ("rate", part(pyrodiff.BinomialForward, RECIPROCAL)),
            ("probabilities", pyrodiff.ImportanceDrawing),
            ("errors", pyrodiff.AnalyticVariance),
            ("high", part(pyrodiff.Clipped, NOISE, -1.0)),
        )
    ],
    *[
        (part(make, torch.ones(4).to(dtype)), f"{name} ... real numbers ... {dtype}")
        for name, make in (
            ("betas", pyrodiff.BetaSchedule),
            ("betas", pyrodiff.LearnedBetaSchedule),
            ("variances", pyrodiff.FixedVariance),
            ("rate", part(pyrodiff.BinomialForward, RECIPROCAL)),
        )
        for dtype in (torch.complex64, torch.bool)
    ],
    *[
        (part(cut, times), "times must be increasing ints in 1..4, at least one")
        for name, cut in (
            ("SubSchedule", part(pyrodiff.SubSchedule, LINEAR)),
            ("Gaussian process", Q.subchain),
            ("process of bits", BITS.subchain),
            ("diffusion", DIFFUSION.subchain),
        )
        for times in (
            (),
            (0, 3),
            (3, 2),
            (3, 3, 4),
            (3, 8),
            (1.0, 3.0),
            (True, 3),
            torch.tensor([1.0, 3.0]),
            torch.tensor([True]),
            ((1, 2), (3, 4)),
            "12",
            3,
            None,
        )
    ],
    (lambda: DIFFUSION.subchain((1, 3, 4)).subchain((2, 4)), "times ... 1..3 ... (2, 4)"),
    (lambda: pyrodiff.SubSchedule([0.1, 0.35], (1, 2)), "schedule ... 0.35"),
    (lambda: pyrodiff.SubSchedule(Q, (1, 2)), "schedule ... GaussianForward"),
    (lambda: gaussian(prior=PRIOR).subchain((2, 3)), "times ... T = 4 ... prior ... (2, 3)"),
    (lambda: gaussian(Own()).subchain((2, 4)), "reverse ... subchain(forward) ... Own"),
    (lambda: gaussian(decoder=nn.Identity()).subchain((2, 4)), "decoder ... subchain(forward) ... Identity"),
    (lambda: gaussian(forward=Walk(LINEAR)).subchain((2, 4)), "forward ... subchain(times) ... Walk"),
]

CUT = [  # what a network may return that is no tensor of the state's shape
    ("a dict", lambda x: {"sample": x, "mean": x + 1}, "a dict"),
    ("None", lambda x: None, "None"),
    ("a tuple", lambda x: (x, x), "a tuple"),
    ("a list", lambda x: [x] * 50, "a list"),
    ("a dict of text", lambda x: {f"output {k}": "word " * 50 for k in range(20)}, "a dict"),
    ("a number", lambda x: 0.5, "0.5"),
    ("an array", lambda x: x.detach().numpy(), "a ndarray"),
    ("one number a datum", lambda x: x[:, 0], "(5,)"),
    ("another event", lambda x: torch.zeros(5, 3), "(5, 3)"),
    ("one row", lambda x: x[:1], "(1, 2)"),
    ("a batch more", lambda x: torch.zeros(2, 5, 2), "(2, 5, 2)"),
    ("integers", lambda x: x.long(), "of dtype torch.int64"),
    ("complex numbers", lambda x: x + 0j, "of dtype torch.complex64"),
]

TABLE["forward processes and denoisers"] = [
    (lambda: pyrodiff.GaussianForward([0.1, 0.2]), "schedule ... [0.1, 0.2]"),
    (lambda: pyrodiff.BinomialForward("linear"), "schedule ... 'linear'"),
    (lambda: pyrodiff.BinomialForward(VE), "schedule ... GeometricSchedule"),
    *[
        (part(pyrodiff.BinomialForward, RECIPROCAL, rate), f"rate ... {said}")
        for rate, said in (
            (0, "0.0"),
            (1, "1.0"),
            (NAN, "nan"),
            (-0.1, "-0.1"),
            (1.5, "1.5"),
            (torch.tensor([0.5, 1.0, 0.25]), "1.0"),
        )
    ],
    (lambda: of_bits(torch.tensor([0.5, 0.2, 0.25])).guide(ONES), "rate ... (2,) ... (3,)"),
    (lambda: of_bits(torch.full((5, 2), 0.2)).guide(ONES), "rate ... (2,) ... (5, 2)"),
    *[
        (part(kind, *args), f"{name} ... {said}")
        for kind in PREDICTIONS
        for args, name, said in (
            ((nothing, Q), "network", "function nothing"),
            ((Network(), BITS), "forward", "BinomialForward"),
            ((Network(), LINEAR), "forward", "LinearSchedule"),
            ((Network(), None), "forward", "None"),
        )
    ],
    (lambda: pyrodiff.LogitPrediction(nothing, BITS), "network ... nothing"),
    (lambda: pyrodiff.LogitPrediction(Network(), Q), "forward ... GaussianForward"),
    (lambda: pyrodiff.LogitPrediction(Network(), None), "forward ... None"),
    *[
        (part(kind, Network(), EMPTY), "forward ... signal ... ReciprocalSchedule")
        for kind in (pyrodiff.NoisePrediction, pyrodiff.ScorePrediction)
    ],
    (lambda: pyrodiff.LevelPrediction(Network(), Q, levels=1), "levels ... at least 2, but it is 1"),
    *[
        (part(kind, denoiser, *args), f"denoiser must be {said}")
        for kind, args in ((pyrodiff.Clipped, (-1, 1)), (pyrodiff.Thresholded, ()))
        for denoiser, said in ((None, "a torch.nn ... None"), (LOGITS, "made for a GaussianForward"))
    ],
    *[
        (part(pyrodiff.Clipped, NOISE, low, high), said)
        for low, high, said in (
            (1, -1, "low must be below high, but low is 1.0 and high is -1.0"),
            (1, 1, "low must be below high, but low is 1.0 and high is 1.0"),
            (-1, NAN, "low must be below high, but low is -1.0 and high is nan"),
            ([0, 2], [1, 1], "low must be below high, but low is [0.0, 2.0] and high is"),
            ([0, 0], [1, 1, 1], "low must be below high, but low is [0.0, 0.0] and high"),
            ("a", 1, "low must be numbers, but it is 'a'"),
            (-1, None, "high must be numbers, but it is None"),
        )
    ],
    *each(part(pyrodiff.Thresholded, NOISE), "quantile", 0, -0.1, 1.01, NAN, "0.9", True),
    *each(part(pyrodiff.Thresholded, NOISE), "most", 0.99, -1, NAN, "2", None, True),
    (lambda: pyrodiff.Clipped(Returns(X), [0, 0, 0], 1)(X, 1), "low must broadcast ... (2,) ... (3,)"),
    (lambda: pyrodiff.Clipped(Returns(X), 0, [[1, 1]])(X, 1), "high must broadcast ... (2,) ... (1, 2)"),
    (lambda: pyrodiff.Clipped(Returns(X[:, :1]), [0, 0], 1)(X[:, :1], 1), "low must broadcast ... (1,) ... (2,)"),
]

TABLE["reverse processes, variances and decoders"] = [
    *[
        (
            lambda variance=variance, v=v: variance(LINEAR, 2, *v),
            "process must be a pyrodiff.GaussianForward ... LinearSchedule",
        )
        for variance, v in (
            (pyrodiff.ForwardVariance(), []),
            (pyrodiff.FixedVariance([0.1] * 4), []),
            (pyrodiff.AnalyticVariance([0.5] * 4), []),
            (pyrodiff.RangeVariance(), [X]),
        )
    ],
    (lambda: pyrodiff.DiagonalVariance()(Q, 2, X.long()), "v must be a tensor with a floating dtype ... int64"),
    (lambda: pyrodiff.GaussianReverse(BITS, NOISE), "forward ... BinomialForward"),
    (lambda: pyrodiff.GaussianReverse(None, NOISE), "forward ... None"),
    (lambda: pyrodiff.GaussianReverse(Q, nothing), "denoiser ... nothing"),
    *each(part(pyrodiff.GaussianReverse, Q, NOISE), "variance", 0.1, 0.0, [0.1]),
    (lambda: pyrodiff.BinomialReverse(Q, LOGITS), "forward ... GaussianForward"),
    (lambda: pyrodiff.BinomialReverse(BITS, NOISE), "denoiser ... NoisePrediction"),
    (lambda: pyrodiff.D3PMReverse(BITS, NOISE), "denoiser ... NoisePrediction"),
    (
        lambda: pyrodiff.GaussianReverse(pyrodiff.GaussianForward(LINEAR), NOISE),
        "denoiser ... NoisePrediction ... another",
    ),
    (
        lambda: pyrodiff.GaussianReverse(EXPLODING, pyrodiff.Clipped(NOISE, -1, 1)),
        "denoiser ... same forward process ... Clipped",
    ),
    *[
        (part(pyrodiff.FixedVariance, values), f"variances ... {values}")
        for values in ([0.1, -0.2], [0.1, 0.0], [0.1, NAN], [INF], [[0.1]], 0.1)
    ],
    *[
        (
            lambda number=number, process=process: pyrodiff.FixedVariance([0.1] * number)(process, 1),
            f"variances must be T = 4 numbers, but there are {number}",
        )
        for number in (1, 3, 5)
        for what, process in (("chain", Q), ("sub-chain", Q.subchain((2, 4))))
    ],
    (lambda: pyrodiff.GaussianReverse(Q, NOISE, pyrodiff.FixedVariance([0.1] * 3)), "variances ... 4 ... 3"),
    *[
        (part(pyrodiff.AnalyticVariance, errors), "errors must")
        for errors in ([], [[1.0]], [-1.0, 1.0], [NAN], [INF], "two")
    ],
    *[(part(pyrodiff.AnalyticVariance, [1.0], least=least), "least must") for least in (-0.1, INF, [0.1, 0.2], "one")],
    *[
        (
            part(pyrodiff.GaussianReverse, process, Network(), pyrodiff.AnalyticVariance([0.5] * 5)),
            "errors must be T = 4 numbers, but there are 5",
        )
        for what, process in (("chain", Q), ("sub-chain", Q.subchain((2, 4))))
    ],
    *each(pyrodiff.DiscretizedDecoder, "levels", 1, 2.0, True, "17", None),
    *each(part(pyrodiff.SoftmaxDecoder, Q), "levels", 1, 2.0, True, "17", None),
    (lambda: pyrodiff.TransitionDecoder(LINEAR), "forward ... LinearSchedule"),
    (lambda: pyrodiff.SoftmaxDecoder(BITS, 17), "forward ... GaussianForward"),
    (lambda: pyrodiff.SoftmaxDecoder(LINEAR, 17), "forward ... LinearSchedule"),
    (
        lambda: pyrodiff.DiscretizedDecoder(17)(dist.Bernoulli(torch.full((5, 2), 0.3)).to_event(1), X),
        "kernel ... Gaussian",
    ),
    (
        lambda: pyrodiff.DiscretizedDecoder(17)(dist.Laplace(torch.zeros(5), 1.0), torch.zeros(5)),
        "kernel ... Gaussian ... Laplace",
    ),
]

TABLE["diffusions, drawings and weightings"] = [
    (
        lambda: pyrodiff.OneStep(3, pyrodiff.UniformDrawing(), torch.ones_like),
        "diffusion must be a pyrodiff.Diffusion, but it is 3",
    ),
    *[
        (part(pyrodiff.DiffusionELBO().loss, *pair, X), said)
        for pair, said in (
            ((3, PAIR.guide), "model must be a program, but it is 3"),
            ((PAIR.model, None), "guide must be a program, but it is None"),
        )
    ],
    (lambda: pyrodiff.Diffusion(LINEAR, REVERSE, (2,)), "forward ... LinearSchedule"),
    (lambda: pyrodiff.Diffusion(Q, nothing, (2,)), "reverse ... nothing"),
    (lambda: gaussian(decoder=nothing), "decoder ... nothing"),
    (lambda: gaussian(REVERSE, pyrodiff.GaussianForward(LINEAR)), "reverse ... GaussianReverse ... another"),
    (
        lambda: gaussian(decoder=pyrodiff.SoftmaxDecoder(pyrodiff.GaussianForward(LINEAR), 17)),
        "decoder ... SoftmaxDecoder ... another",
    ),
    *[
        (
            part(gaussian, reverse, decoder=pyrodiff.DiscretizedDecoder(6)),
            "decoder must have the 5 levels that the denoiser predicts, but it has 6",
        )
        for kind, reverse in (
            ("plain", pyrodiff.GaussianReverse(Q, FIVE)),
            ("clipped", pyrodiff.GaussianReverse(Q, pyrodiff.Clipped(FIVE, -1, 1))),
            ("thresholded", pyrodiff.GaussianReverse(Q, pyrodiff.Thresholded(FIVE))),
        )
    ],
    *[
        (part(make, shape), f"event_shape ... {shape!r}")
        for make in (shaped, networks.MLP, networks.UNet, pyrodiff.GaussianImputer)
        for shape in (2, (2, 0), (-1,), (2.5,), (True, 8, 8), {2, 3}, {2: 1}, None, "2", "", b"ab")
    ],
    (part(shaped, torch.tensor([True, True])), "event_shape ... torch.bool"),
    (part(shaped, torch.tensor(2)), "event_shape ... ()"),
    (lambda: gaussian(prior=torch.zeros(2)), "prior ... tensor"),
    (lambda: gaussian(prior=normal(1, 3)), "prior ... (2,) ... (3,)"),
    (lambda: gaussian(prior=normal(2)), "prior ... (2,) ... ()"),
    (lambda: gaussian(prior=Returns(normal(1, 3))).model(X), "prior ... (2,) ... (3,)"),
    (lambda: gaussian(prior=Returns(torch.zeros(2))).model(X), "prior ... tensor"),
    *each(gaussian, "name", None, 3, b"a"),
    *each(gaussian, "plate", None, 3, b"a", ""),
    *each(DIFFUSION.one_step, "drawing", "uniform", pyrodiff.UniformDrawing, 0),
    *each(DIFFUSION.one_step, "weighting", 2.0, 0.0),
    (lambda: pyrodiff.SimpleWeighting(BIT_REVERSE), "reverse ... BinomialReverse"),
    (lambda: pyrodiff.SimpleWeighting(gaussian(forward=EMPTY).reverse), "reverse ... signal ... ReciprocalSchedule"),
    (
        lambda: pyrodiff.SimpleWeighting(pyrodiff.GaussianReverse(Q, NOISE, pyrodiff.RangeVariance())),
        "reverse ... RangeVariance ... HybridWeighting()",
    ),
    *each(pyrodiff.HybridWeighting, "scale", *POSITIVES),
    (lambda: pyrodiff.HybridWeighting(torch.ones(2)), "scale must be a number in (0, inf), but it is"),
    (lambda: pyrodiff.ScoreWeighting(3), "weight must be called with t, ... but it is 3"),
    *[
        (part(pyrodiff.ImportanceDrawing, p), "probabilities must")
        for p in (
            [],
            [0.5, 0.0, 0.5],
            [1.5, -0.5],
            [0.5, 0.4],
            [0.5, 0.6],
            [0.5, NAN],
            [[0.5, 0.5]],
            1.0,
            "uniform",
            None,
        )
    ],
    *[
        (part(pyrodiff.ImportanceDrawing.of, moments), "second_moments must")
        for moments in ([], [1.0, -1.0], [0.0, 0.0], [1.0, INF], [1.0, NAN], [[1.0, 1.0]], "all")
    ],
    *each(part(pyrodiff.ImportanceDrawing.of, [1.0, 2.0]), "uniform", 0, 1.0, -0.1, True),
    *each(pyrodiff.LossSecondMoment, "num_steps", *COUNTS),
    *each(part(pyrodiff.LossSecondMoment, 4), "history", *COUNTS),
    *each(part(pyrodiff.LossSecondMoment, 4), "uniform", 0.0, 1.0),
]

TABLE["training"] = [
    (lambda: pyrodiff.exponential_average()(3), "model must be a torch.nn"),
    (lambda: svi(model=3), "model ... 3"),
    *each(pyrodiff.DiffusionELBO, "num_particles", *COUNTS),
    (lambda: svi(guide=None), "guide ... None"),
    (lambda: svi(optim=adam([torch.zeros(1)])), "optim ... Adam"),
    (lambda: svi(loss=nothing), "loss ... nothing"),
    *[
        row
        for name, values in {
            "clip_norm": (0, -1.0, NAN, "1"),
            "scheduler": (0.1,),
            "average": (0.999,),
            "accumulate": COUNTS,
            "autocast": (torch.float32, "bfloat16"),
            "nonfinite": ("raise", True),
            "compile": (1, None),
            "validate": ("always", 0),
        }.items()
        for row in each(svi, name, *values)
    ],
    (lambda: svi(average=pyrodiff.exponential_average()), "model must be a torch.nn.Module"),
    (lambda: svi(compile=True, validate=True), "validate must not be True where compile is"),
    (lambda: svi().averaged().__enter__(), "average must be given"),
    (
        lambda: svi(DIFFUSION.model, DIFFUSION.guide, average=pyrodiff.exponential_average()).averaged().__enter__(),
        "... must have taken a step",
    ),
    (lambda: svi(loss=Trace_ELBO()).step(X), "model ... parameter"),
    (lambda: svi().step(X), "model ... parameter"),
    *each(pyrodiff.exponential_average, "decay", 1.0, -0.1, NAN, "0.9", None),
    (lambda: pyrodiff.fastest_threads(3), "work must"),
    *each(part(pyrodiff.fastest_threads, nothing), "seconds", 0, "x"),
]

TABLE["bounds and what is made of them"] = [
    (lambda: pyrodiff.variance_account(DIFFUSION, X, drawings=X), "drawings must be drawings by name"),
    (lambda: pyrodiff.yardsticks(np.array(-1), X), "train must be a tensor of floats"),
    *[
        row
        for call, names in {
            part(pyrodiff.bound, DIFFUSION, X): {
                "num_particles": COUNTS,
                "memory_budget": COUNTS[:-1],
                "num_times": (*COUNTS[:-1], 4, 5, False),
                "generator": SOURCES,
                "progress": SWITCHES,
            },
            part(pyrodiff.importance_bound, DIFFUSION, X, num_particles=2): {
                "num_particles": COUNTS,
                "memory_budget": COUNTS[:-1],
                "generator": SOURCES,
                "progress": SWITCHES,
            },
            part(pyrodiff.ode_log_prob, DIFFUSION, X): {
                "num_probes": (-1, 2.5, True, False),
                "tolerance": PARTS,
                "max_steps": COUNTS,
                "num_particles": (2, 0),
                "generator": SOURCES,
                "differentiable": SWITCHES,
            },
            part(pyrodiff.verify, DIFFUSION, X): {
                "num_repeats": (9, 10.0),
                "num_particles": (1, True),
                "generator": ("x",),
            },
            part(pyrodiff.variance_account, DIFFUSION, X): {
                "num_particles": (0, 1),
                "batch_size": COUNTS,
                "num_pairs": (1, True),
                "generator": SOURCES,
                "drawings": ({}, {"it": "uniform"}),
            },
            part(pyrodiff.analytic_variance, DIFFUSION, X): {"num_particles": COUNTS},
            part(pyrodiff.best_subchain, DIFFUSION, X, num_steps=2): {
                "num_steps": (5, *COUNTS),
                "candidates": (0, [3, 9]),
                "num_particles": (0.5,),
            },
        }.items()
        for name, values in names.items()
        for row in each(call, name, *values)
    ],
    *[
        (lambda call=call: call(REVERSE, X), "diffusion must be a pyrodiff.Diffusion")
        for call in (
            pyrodiff.bound,
            pyrodiff.ode_log_prob,
            pyrodiff.verify,
            pyrodiff.variance_account,
            pyrodiff.analytic_variance,
            named(pyrodiff.importance_bound, num_particles=2),
            named(pyrodiff.best_subchain, num_steps=1),
        )
    ],
    *[
        (lambda call=call: call(DIFFUSION, torch.ones(3, 5)), "x_0 must have shape")
        for call in (pyrodiff.verify, pyrodiff.variance_account, pyrodiff.ode_log_prob)
    ],
    (lambda: pyrodiff.ode_log_prob(DIFFUSION, X.numpy()), "x_0 ... ndarray ... torch.from_numpy"),
    (
        lambda: pyrodiff.bound(
            gaussian(forward=pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.4]))), X, num_times=1
        ),
        "num_times must be at most T - 1 = 0, but it is 1",
    ),
    *[
        (part(pyrodiff.bound, DIFFUSION, X.to(dtype)), "x_0 must be float32 or float64")
        for dtype in (torch.float16, torch.bfloat16)
    ],
    *[
        (
            lambda times=times, steps=steps: pyrodiff.Bound(
                torch.ones(3), torch.ones(2, 3), torch.ones(3), torch.Size((2,)), times=times, steps=steps
            ),
            "times must lie in 2",
        )
        for times, steps in (
            (torch.tensor([[2, 2, 2], [3, 3, 9]]), 8),
            (torch.ones(2, 3).int(), 8),
            (torch.full((2, 3), 2), None),
        )
    ],
    (
        lambda: pyrodiff.variance_account(gaussian(Returns(normal)), X),
        "diffusion must have a parameter that requires a gradient, but it has none",
    ),
    *each(IMPORTANCE.at, "num_particles", *COUNTS, 4),
    *each(BOUND.bits_per_dim_in_bins, "width", *POSITIVES),
    *each(part(pyrodiff.yardsticks, X, X, 5), "smoothing", 0, NAN),
    (
        lambda: pyrodiff.ode_log_prob(BIT_DIFFUSION, ONES),
        "diffusion must be Gaussian to have a flow, but it is of BinomialForward",
    ),
    (
        lambda: pyrodiff.ode_log_prob(gaussian(forward=EMPTY), X),
        "diffusion must leave some signal at t = T, but its schedule is Reciprocal",
    ),
    (
        lambda: pyrodiff.analytic_variance(BIT_DIFFUSION, ONES),
        "diffusion must be of a GaussianForward ... BinomialForward",
    ),
    (
        lambda: pyrodiff.analytic_variance(gaussian(Own()), X),
        "diffusion must have a reverse process with a denoiser ... Own has none: give",
    ),
    (lambda: pyrodiff.analytic_variance(DIFFUSION, X[:1]), "x_0 must be at least 2 data ... there is 1"),
    (
        lambda: pyrodiff.best_subchain(DIFFUSION, X, num_steps=3, candidates=[1, 4]),
        "num_steps must be at most 2, the number",
    ),
    (
        lambda: pyrodiff.best_subchain(gaussian(prior=PRIOR), X, num_steps=1, candidates=[1, 3]),
        "candidates must end at T = 4, the time of the given prior",
    ),
    (lambda: pyrodiff.best_subchain(gaussian(Own()), X, num_steps=2), "reverse must have a method subchain"),
    *[
        (part(pyrodiff.pareto_k, log_weights), "log_weights must be floats with shape (K, B)")
        for log_weights in (torch.zeros(30), torch.zeros(30, 2).long(), np.zeros((30, 2)), None)
    ],
    *[
        (part(pyrodiff.yardsticks, *args), said)
        for args, said in (
            ((WHOLE, WHOLE), "train must be a tensor of floats ... give levels for their probabilities"),
            ((X.numpy(), X), "train must be a tensor of floats"),
            ((RANDOM, [3]), "test must be a tensor of floats"),
            ((RANDOM, 3), "test must be a tensor of floats"),
            ((RANDOM, X[:0]), "test must have shape (n, *event_shape), not empty"),
            ((X[:, 0], X), "train must have shape (n, *event_shape), not empty"),
            (([], X), "train must have a batch at least"),
            ((RANDOM, X[:, :1]), "test must have data of shape (2,), as those before, but it is (1,)"),
            (([X, X[:, :1]], X), "train must have data of shape (2,)"),
            ((X / 0, X), "train must be finite, but 10 of its values are not"),
            ((RANDOM, filled(NAN)), "test must be finite, but 1 of"),
            (
                (RANDOM * torch.tensor([1.0, 0.0]), X),
                "train must vary in every dimension ... 1 of 2 dimensions are constant",
            ),
            ((RANDOM.double() * torch.tensor([1.0, 0.0]) + 0.1, X), "train must vary in every dimension"),
            ((RANDOM[:1], X), "train must vary in every dimension"),
            ((WHOLE, WHOLE, 4), "train must be whole numbers in 0..3"),
            ((WHOLE, WHOLE - 1, 5), "test must be whole numbers in 0..4"),
            ((WHOLE, WHOLE, 1), "levels must be an int of at least 2"),
        )
    ],
]

CONTEXTS = {
    "bound": lambda x, *y: pyrodiff.bound(DIFFUSION, x, *y),
    "importance_bound": lambda x, *y: pyrodiff.importance_bound(DIFFUSION, x, *y, num_particles=2),
    "ode_log_prob": lambda x, *y: pyrodiff.ode_log_prob(DIFFUSION, x, *y),
    "verify": lambda x, *y: pyrodiff.verify(DIFFUSION, x, *y),
    "variance_account": lambda x, *y: pyrodiff.variance_account(DIFFUSION, x, *y),
    "analytic_variance": lambda x, *y: pyrodiff.analytic_variance(DIFFUSION, x, *y),
    "best_subchain": lambda x, *y: pyrodiff.best_subchain(DIFFUSION, x, *y, num_steps=2),
    "model": lambda x, *y: DIFFUSION.model(x, *y),
    "one-step model": lambda x, *y: PAIR.model(x, *y),
    "generation": lambda x, *y: DIFFUSION.model(None, *y, num_samples=5),
    "sampler": lambda x, *y: pyrodiff.AncestralSampler(DIFFUSION)(5, *y),
    "trajectory": lambda x, *y: pyrodiff.AncestralSampler(DIFFUSION).trajectory(5, *y),
    "step": lambda x, *y: svi(DIFFUSION.model, DIFFUSION.guide).step(x, *y),
    "posterior": lambda x, *y: pyrodiff.posterior(DIFFUSION, INPAINTING, *y),
}
TABLE["context"] = [
    *[
        (part(call, X, *y), f"context must {said}")
        for way, call in CONTEXTS.items()
        for what, y, said in (
            ("None", (None,), "be tensors, but context[0] is None"),
            ("a list after a tensor", (torch.zeros(1), [1, 2]), "be tensors, but context[1] is [1, 2]"),
            ("a context of other rows", (torch.zeros(3, 2),), "have a first dimension of ... 1"),
            ("a context of no rows", (torch.zeros(()),), "have a first dimension of ... ()"),
            ("an array", (np.zeros(5),), "be tensors, but context[0] is a ndarray: give torch.from_numpy of it"),
        )
    ],
    *[
        (part(call, X, *y), f"context ... options are given by keyword, {keyword} say")
        for keyword, call, y in (
            ("num_particles=4", CONTEXTS["bound"], (4,)),
            ("num_particles=4", CONTEXTS["bound"], (torch.zeros(5), 4)),
            ("num_particles=4", lambda x, y: pyrodiff.bound(DIFFUSION, [x], y), (4,)),
            ("num_particles=4", CONTEXTS["importance_bound"], (4,)),
            ("num_particles=5", CONTEXTS["analytic_variance"], (5,)),
            ("num_steps=3", lambda x, y: pyrodiff.best_subchain(DIFFUSION, x, y), (3,)),
            ("num_probes=0", CONTEXTS["ode_log_prob"], (0,)),
            ("num_repeats=20", CONTEXTS["verify"], (20,)),
            ("num_particles=20", CONTEXTS["variance_account"], (20,)),
            ("generator=7", CONTEXTS["sampler"], (7,)),
            ("times=7", CONTEXTS["trajectory"], (7,)),
        )
    ],
    (
        lambda: pyrodiff.AncestralSampler(DIFFUSION).trajectory(3, (3, 0)),
        "context must be tensors, but context[0] is (3, 0)",
    ),
    (lambda: pyrodiff.AncestralSampler(DIFFUSION)(3, torch.Generator()), "context must be tensors, but context"),
    (lambda: pyrodiff.bound(DIFFUSION, [X], X), "context must come from the loader"),
]

TABLE["samplers"] = [
    *[
        row
        for call in (pyrodiff.AncestralSampler, pyrodiff.DDIMSampler, pyrodiff.FlowSampler)
        for row in each(part(call, DIFFUSION), "guide", 1, "x", False)
    ],
    (lambda: ANCESTRAL.trajectory(2, times=META), "times must be decreasing ints in 0..4"),
    *[
        row
        for call, names in {
            pyrodiff.AncestralSampler: {
                "compile": (1, "no", None),
                "num_steps": (0, 5, 2.5, True, "3"),
                "times": ((4, 3), (0, 3), (3, 5), (1.0, 4.0), 3, ()),
            },
            pyrodiff.DDIMSampler: {"eta": (-0.1, 1.1, NAN, "0", True)},
            pyrodiff.DPMSolverSampler: {"order": (0, 3, 2.0, True, None)},
            pyrodiff.HeunSampler: {
                name: (-1.0, INF, NAN, None, True) for name in ("churn", "churn_from", "churn_noise")
            }
            | {"churn_to": (-1.0, "all")},
            pyrodiff.PredictorCorrectorSampler: {"snr": POSITIVES, "num_corrections": COUNTS},
            pyrodiff.FlowSampler: {"tolerance": PARTS, "max_steps": COUNTS},
            part(pyrodiff.AnnealedLangevinSampler, step_size=0.01, num_updates=1): {
                "step_size": POSITIVES,
                "num_updates": COUNTS,
                "denoise": SWITCHES,
                "compile": SWITCHES,
                "num_steps": (9,),
            },
        }.items()
        for name, values in names.items()
        for row in each(part(call, OF_NOISE), name, *values)
    ],
    *[
        (part(kind, diffusion, **options), f"diffusion must {said}")
        for kind, options in {
            **{kind: {} for kind in (pyrodiff.AncestralSampler, *SOLVERS, pyrodiff.FlowSampler)},
            pyrodiff.AnnealedLangevinSampler: {"step_size": 0.1, "num_updates": 1},
        }.items()
        for what, diffusion, said in (
            ("None", None, "be a pyrodiff.Diffusion, but it is None"),
            ("bits", BIT_DIFFUSION, "... Gaussian ... BinomialForward"),
            ("a kernel of one's own", gaussian(Own(), EXPLODING), "... Own"),
        )
        if what == "None" or kind not in (pyrodiff.AncestralSampler, what == "bits" or pyrodiff.FlowSampler)
    ],
    (lambda: pyrodiff.DPMSolverSampler(DIFFUSION, num_steps=1), FEW),
    (lambda: pyrodiff.DPMSolverSampler(DIFFUSION, times=(3,)), FEW),
    (lambda: pyrodiff.DPMSolverSampler(gaussian(forward=pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.4])))), FEW),
    (
        lambda: pyrodiff.HeunSampler(DIFFUSION, churn_from=2.0, churn_to=1.0),
        "churn_to must be a number of at least churn_from = 2.0, but",
    ),
    (
        lambda: pyrodiff.HeunSampler(gaussian(forward=EMPTY)),
        "diffusion must leave some signal at t = T for HeunSampler",
    ),
    (
        lambda: pyrodiff.DDIMSampler(DIFFUSION, num_steps=3, times=(1, 4)),
        "num_steps must be None where times are given",
    ),
    (
        lambda: pyrodiff.AnnealedLangevinSampler(OF_NOISE, 0.36, 1),
        "step_size must be below ... 4 * 0.3^2 = 0.36, ... 0.009",
    ),
    (
        lambda: pyrodiff.AnnealedLangevinSampler(DIFFUSION, 0.01, 1),
        "diffusion must have a signal of 1 ... but that of LinearSchedule ... at t = T: give",
    ),
    (
        lambda: pyrodiff.AnnealedLangevinSampler(gaussian(forward=pyrodiff.GaussianForward(Falling(4))), 0.01, 1),
        "diffusion must have noise that rises with t ... but that of Falling",
    ),
    *[
        row
        for name, call in (
            ("AncestralSampler", ANCESTRAL),
            ("trajectory", ANCESTRAL.trajectory),
            ("FlowSampler", FLOW),
            ("with_log_prob", FLOW.with_log_prob),
        )
        for row in (*each(call, "num_samples", *COUNTS), *each(part(call, 2), "generator", *SOURCES))
    ],
    *each(part(FLOW.with_log_prob, 2), "num_probes", -1, 2.5, True),
    (
        lambda: pyrodiff.FlowSampler(gaussian(decoder=pyrodiff.DiscretizedDecoder(5))).with_log_prob(3),
        "diffusion must end without a decoder ... DiscretizedDecoder: ode_log_prob",
    ),
    *[
        (
            part(ANCESTRAL.trajectory, 2, times=times),
            "times must be decreasing ints in 0..4, at least one, but they are",
        )
        for times in ((), (5, 0), (0, -1), (0, 4), (3, 3), (2.0, 1.0), (True, 0), 5, "40", torch.tensor([[4, 0]]))
    ],
    (lambda: pyrodiff.AncestralSampler(gaussian(Random()), compile=True), "diffusion must have no random weights"),
    (lambda: pyrodiff.LangevinSampler(None, 0.1), "score must be called with points, but it is None"),
    *each(part(pyrodiff.LangevinSampler, torch.neg), "step_size", *POSITIVES),
    *[
        (part(pyrodiff.LangevinSampler(torch.neg, 0.1), x, 1), f"x must {said}")
        for x, said in (
            ([[0.0]], "be a float32 or float64 tensor, but it is [[0"),
            (X.int(), "be a float32 or float64 tensor ... int32"),
            (X.half(), "be a float32 or float64 tensor ... float16"),
            (torch.tensor(1.0), "have shape ... but its shape is ()"),
            (X[:0], "have shape ... with a point ... shape is (0, 2)"),
            (X / 0, "be finite"),
        )
    ],
    *each(part(pyrodiff.LangevinSampler(torch.neg, 0.1), X), "num_updates", *COUNTS),
    *each(part(pyrodiff.LangevinSampler(torch.neg, 0.1), X, 1), "generator", *SOURCES),
    (
        lambda: pyrodiff.LangevinSampler(lambda x: x[:, 0], 0.1)(X, 1),
        "score must return a tensor of shape (5, 2) ... (5,)",
    ),
    (lambda: pyrodiff.LangevinSampler(nothing, 0.1)(X, 1), "score must return ... but it is None"),
    (lambda: pyrodiff.LangevinSampler(lambda x: x / 0, 0.1)(X, 1), "score must be finite at the points x"),
]


def poisson(x):
    return dist.Poisson(x.exp()).to_event(1)


def per_number(x):
    return dist.Normal(x, 1.0)


TABLE["observations and inference"] = [
    *each(part(pyrodiff.Linear, torch.ones(1, 2), torch.ones(1)), "noise", INF),
    (lambda: pyrodiff.Conditioned(REVERSE, torch.sum), "diffusion must be a pyrodiff.Diffusion, ... GaussianReverse"),
    *each(part(pyrodiff.DiffusionDistribution(DIFFUSION).log_prob), "value", 3, None),
    *each(POSTERIOR.draw, "num_samples", *COUNTS),
    *[
        (make, said)
        for said, make in {
            "mask must be a bool tensor, but it is a tensor of dtype torch.float32": lambda: pyrodiff.Inpainting(
                VALUES, VALUES
            ),
            "mask must be True somewhere and False somewhere, but it is True": lambda: pyrodiff.Inpainting(
                MASK | True, VALUES
            ),
            "mask must be True somewhere and False somewhere, but it is False": lambda: pyrodiff.Inpainting(
                MASK & False, VALUES
            ),
            "values must have the shape (2,) of the mask": lambda: pyrodiff.Inpainting(MASK, torch.zeros(3)),
            "values must be a tensor of finite numbers, but it is not finite": lambda: pyrodiff.Inpainting(
                MASK, VALUES * NAN
            ),
            "values must be a tensor of finite numbers, but it is 3": lambda: pyrodiff.Inpainting(MASK, 3),
            "noise must be a number of at least 0, but it is -1": lambda: pyrodiff.Inpainting(MASK, VALUES, -1),
            "operator must be a matrix of shape": lambda: pyrodiff.Linear(VALUES, VALUES, 1.0),
            "values must have the shape (1,) that the operator returns": lambda: pyrodiff.Linear(
                torch.ones(1, 2), VALUES, 1.0
            ),
            "noise must be positive and finite, but it is 0": lambda: pyrodiff.Linear(torch.ones(2, 2), VALUES, 0),
        }.items()
    ],
    *[
        (lambda args=args, options=options: pyrodiff.posterior(*args, **options), said)
        for said, args, options in (
            ("diffusion must be a pyrodiff.Diffusion", (3, INPAINTING), {}),
            ("observation must be called with data, but it is 3", (DIFFUSION, 3), {}),
            ("mask must have the event_shape (2,)", (DIFFUSION, THREE), {}),
            (
                "operator must have as many columns as data have numbers, 2",
                (DIFFUSION, pyrodiff.Linear(torch.ones(1, 3), torch.ones(1), 0.1)),
                {},
            ),
            ("... batch_shape (2,) and the event_shape (3,) of obs", (DIFFUSION, per_number), {"obs": torch.zeros(3)}),
            ("... put .to_event", (DIFFUSION, per_number), {"obs": torch.zeros(2)}),
            ("obs must be given where the observation returns a distr", (DIFFUSION, poisson), {}),
            ("obs must be given where ... and only there", (DIFFUSION, lambda x: 3), {"obs": torch.zeros(2)}),
            ("obs must be None where the observation has its own", (DIFFUSION, INPAINTING), {"obs": torch.zeros(1)}),
            ("obs must be a tensor, but it is 1.0", (DIFFUSION, lambda x: dist.Normal(x[:, 0], 1.0)), {"obs": 1.0}),
            ("... be a program whose sites are all observed", (DIFFUSION, lambda x: 3), {}),
            ("... latent sites are ['z']", (DIFFUSION, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)) and None), {}),
            (
                "num_particles must be a multiple of the 4 islands, but it is 3",
                (DIFFUSION, INPAINTING),
                {"num_particles": 3},
            ),
            ("num_particles must be an int of at least 1", (DIFFUSION, INPAINTING), {"num_particles": 0}),
            ("num_islands must be an int of at least 1", (DIFFUSION, INPAINTING), {"num_islands": 0.5}),
            ("twist must be a pyrodiff.Twist", (DIFFUSION, INPAINTING), {"twist": 3}),
            ("generator must be", (DIFFUSION, INPAINTING), {"generator": "a seed"}),
            ("noise must be positive where data have a density", (DIFFUSION, KNOWN), {}),
            (
                "observation must be Inpainting(mask, values, noise=0) for KnownTwist, but it is another",
                (DIFFUSION, INPAINTING),
                {"twist": pyrodiff.KnownTwist()},
            ),
        )
    ],
    *[
        (lambda args=args, obs=obs: pyrodiff.product(*args, obs=obs), said)
        for said, args, obs in (
            ("operator must be linear", (EXACT, pyrodiff.Linear(lambda x: x**2, VALUES, 0.3)), None),
            ("... must return Normal ... MultivariateNormal", (EXACT, poisson), VALUES.double()),
            ("noise must be positive where data have a density", (EXACT, KNOWN), None),
            (
                "diffusion must be Gaussian, or of at most 10 bits",
                (bit_diffusion([0.2], 0.5, 11), lambda x: dist.Bernoulli(0.9 * x).to_event(1)),
                torch.ones(11),
            ),
            ("diffusion must be a pyrodiff.Diffusion", (3, SUM), None),
            ("diffusion must end without a decoder", (gaussian(decoder=pyrodiff.DiscretizedDecoder(5)), SUM), None),
        )
    ],
    (lambda: pyrodiff.perturbed(EXACT, SUM, twist=3), "twist must be a pyrodiff.Twist"),
    (lambda: pyrodiff.perturbed(EXACT, KNOWN), "noise must be positive"),
    *each(part(pyrodiff.perturbed, EXACT, SUM), "num_samples", *COUNTS),
    *[
        (lambda args=args: pyrodiff.replacement(*args), said)
        for said, args in (
            ("observation must be a pyrodiff.Inpainting", (DIFFUSION, per_number)),
            ("diffusion must be a pyrodiff.Diffusion", (3, INPAINTING)),
            ("mask must have the event_shape (2,)", (DIFFUSION, THREE)),
            ("values must be data where the mask is True", (BIT_DIFFUSION, pyrodiff.Inpainting(MASK, VALUES + 0.5))),
        )
    ],
    *each(part(pyrodiff.replacement, DIFFUSION, INPAINTING), "num_samples", *COUNTS),
    *each(part(pyrodiff.replacement, DIFFUSION, INPAINTING), "num_repeats", *COUNTS),
    *each(part(pyrodiff.replacement, DIFFUSION, INPAINTING), "generator", *SOURCES),
    *[
        (make, said)
        for said, make in {
            "diffusion must be a pyrodiff.Diffusion": lambda: pyrodiff.MissingData(3),
            "diffusion must be one of data with a density": lambda: pyrodiff.MissingData(BIT_DIFFUSION),
            "imputer must be a torch.nn": lambda: pyrodiff.MissingData(DIFFUSION, per_number),
            "estimate must be a OneStepEstimate": lambda: pyrodiff.MissingData(DIFFUSION, estimate=3),
            "plate must be a string": lambda: pyrodiff.MissingData(DIFFUSION, plate=""),
            "x must be a tensor with shape (B, 2)": lambda: missing(X[:, :1]),
            "x must have a known number in each datum, but in 1 of 1 all are missing": lambda: missing(X[:1] * NAN),
            "x must ... some numbers are infinite": lambda: missing(filled(INF)),
            "imputer must return Normal(...).to_event": lambda: missing(X, Returns(dist.Laplace(X, 1.0).to_event(1))),
            "network must be a torch.nn": lambda: pyrodiff.NetworkImputer(3),
            "network must return a tensor of shape": lambda: missing(X, pyrodiff.NetworkImputer(Returns(X))),
            "... must be run with its guide": lambda: pyrodiff.MissingData(DIFFUSION).model(X),
        }.items()
    ],
    *[
        (make, said)
        for said, make in {
            "diffusion must be a pyrodiff.Diffusion": lambda: pyrodiff.DiffusionDistribution(3),
            "diffusion must have no random weights": lambda: pyrodiff.DiffusionDistribution(gaussian(Random())),
            "estimate must be a OneStepEstimate or a FlowEstimate": lambda: pyrodiff.DiffusionDistribution(
                DIFFUSION, estimate=3
            ),
            "sampler must be a pyrodiff.Sampler": lambda: pyrodiff.DiffusionDistribution(DIFFUSION, sampler=3),
            "sampler must be ... of this very diffusion": lambda: pyrodiff.DiffusionDistribution(
                DIFFUSION, sampler=pyrodiff.AncestralSampler(gaussian())
            ),
            "num_draws must be an int of at least 1": lambda: pyrodiff.OneStepEstimate(num_draws=0),
            "reference must be a pair": lambda: pyrodiff.OneStepEstimate(reference=True),
            "variance of reference must be positive": lambda: pyrodiff.OneStepEstimate(reference=(VALUES, VALUES - 1)),
            "mean of reference must be numbers": lambda: pyrodiff.OneStepEstimate(reference=("a", VALUES + 1)),
            "mean of reference must broadcast": lambda: pyrodiff.DiffusionDistribution(
                DIFFUSION, estimate=pyrodiff.OneStepEstimate(reference=(torch.zeros(3), VALUES + 1))
            ),
            "reference must be None or False where the forward process is no Gaussian": lambda: (
                pyrodiff.DiffusionDistribution(
                    BIT_DIFFUSION, estimate=pyrodiff.OneStepEstimate(reference=(VALUES, VALUES + 1))
                )
            ),
            "num_steps must be an int of at least 1": lambda: pyrodiff.FlowEstimate(num_steps=0),
            "tolerance must be a number": lambda: pyrodiff.FlowEstimate(tolerance=2.0),
            "max_steps must be an int": lambda: pyrodiff.FlowEstimate(max_steps=0),
            "num_steps must be at most T = 4": lambda: pyrodiff.DiffusionDistribution(
                DIFFUSION, estimate=pyrodiff.FlowEstimate(num_steps=99)
            ),
            "diffusion must end without a decoder ... DiscretizedDecoder: give estimate=OneStepEstimate": lambda: (
                pyrodiff.DiffusionDistribution(
                    gaussian(decoder=pyrodiff.DiscretizedDecoder(5)), estimate=pyrodiff.FlowEstimate()
                )
            ),
            "batch_shape must be one that": lambda: pyrodiff.DiffusionDistribution(DIFFUSION, X).expand([4]),
            "context must be tensors of one number of rows": lambda: pyrodiff.DiffusionDistribution(
                DIFFUSION, X, X[:2]
            ),
            "context must be tensors with 1 dimension": lambda: pyrodiff.DiffusionDistribution(DIFFUSION, 3),
            "batch_dim must be an int of at least 0": lambda: pyrodiff.DiffusionDistribution(
                DIFFUSION, X, batch_dim=-1
            ),
        }.items()
    ],
    *[
        (part(call, DIFFUSION, guide=nothing), "guide must be None where there are no random weights")
        for way, call in GUIDED.items()
    ],
    *[
        (part(call, gaussian(Random())), "guide must be given where there are random weights")
        for way, call in GUIDED.items()
    ],
]


def unvalidated(call, *args):
    with pyro.validation_enabled(False):
        return call(*args)


def told(make, *channels, options):
    """A network of pictures, with a context."""
    return make((4, 4), *channels, hidden=8, **options)


LAYER, OF_TIME = nn.Linear(2, 1), networks.MLP((2,), 8)
LABEL, VECTOR = {"classes": 3}, {"vector": 2}
Y, V = torch.tensor([0, 2, 1, -1, 0]), torch.full((5, 2), 0.5)
NO_LABEL = "y must be an int or an integer tensor, in 0..2, or -1 for no label, but it is"
NO_VECTOR = "vector must be given, as in network(x_t, t, vector), with shape (5, 2), ... but it is"
WAY_OUT = "give classes= ... loader must yield x_0 alone, (x_0 for x_0, y in loader)"
TABLE["networks"] = [
    *[
        row
        for call in (networks.MLP((4, 4), 8), networks.UNet((4, 4), (2, 4), hidden=8))
        for row in (
            *each(part(call, PICTURES), "t", 2.5, NAN, 1j, True, None, "1", [1]),
            *each(part(call, t=1), "x_t", None, 3),
        )
    ],
    *each(part(networks.UNet, (8, 8)), "hidden", 0.0, False),
    *each(part(networks.UNet, (8, 8)), "channels", b"ab", "ab"),
    *[
        row
        for call, names in {
            part(networks.MLP, (2,)): {
                "hidden": (7, *COUNTS),
                "num_blocks": COUNTS,
                "dropout": (1.5, 1.0, NAN),
                "frequency": (-1.0, INF),
                "outputs": COUNTS[:-1],
                "classes": COUNTS[:-1],
                "vector": COUNTS[:-1],
            },
            part(networks.UNet, (8, 8)): {
                "channels": ((), 8, None),
                "hidden": (-1,),
                "num_blocks": COUNTS,
                "dropout": (1.0,),
                "outputs": COUNTS[:-1],
                "attention": (8, (8, 2), ([8],)),
                "heads": (0, 2.0),
                "groups": (0, 64),
                "time": (64,),
                "classes": COUNTS[:-1],
                "vector": COUNTS[:-1],
            },
            part(networks.ContextEmbedding, features=4): {
                "features": COUNTS,
                "classes": COUNTS[:-1],
                "vector": COUNTS[:-1],
            },
            networks.TimeEmbedding: {"features": (7, *COUNTS)},
            part(networks.LogSNREmbedding, LINEAR): {"features": (7, *COUNTS)},
        }.items()
        for name, values in names.items()
        for row in each(call, name, *values)
    ],
    (lambda: networks.UNet((8,)), "event_shape must be (H, W) or (C, H, W)"),
    (lambda: networks.UNet((6, 8), (4, 4, 4)), "event_shape ... divisible by 4 for 2 halvings"),
    (lambda: networks.UNet((8, 8), (3,)), "channels must be an int of at least 1, even"),
    (lambda: networks.UNet((8, 8), attention=""), "attention must be a sequence of heights ... ''"),
    (lambda: networks.UNet((8, 8), attention=(4,), heads=3), "heads must divide the channels (64,), but it is 3"),
    (lambda: networks.UNet((8, 8), time=LAYER), "time.features must be an int"),
    (lambda: networks.LogSNREmbedding(10, 8), "schedule must be a pyrodiff.Schedule, but it is 10"),
    (lambda: networks.LogSNREmbedding(LAYER, 8), "schedule must be a pyrodiff.Schedule, but it is a Linear"),
    (
        lambda: networks.LogSNREmbedding(RECIPROCAL, 8),
        "schedule ... finite log signal-to-noise ratio at t = 1 and T, but of ReciprocalSchedule",
    ),
    (lambda: networks.Offset(len, torch.zeros(2)), "network must be a torch.nn"),
    (lambda: networks.Offset(nn.Identity(), [0.0, 1.0]), "offset must be a torch.Tensor"),
    (lambda: networks.Offset(nn.Identity(), torch.zeros(2, dtype=torch.long)), "offset must be finite floats"),
    (lambda: networks.Offset(nn.Identity(), torch.tensor([0.0, -INF])), "offset must be finite floats"),
    *[
        (
            lambda shape=shape: networks.Offset(Returns(X), torch.zeros(shape))(X, 1),
            "offset must broadcast to the output, of shape (5, 2), but its shape is",
        )
        for shape in ((3,), (1, 1, 2))
    ],
    (lambda: networks.DividedByNoise(torch.neg, VE), "network must be a torch ... Module"),
    (lambda: networks.DividedByNoise(nn.Identity(), 0.1), "schedule must be a pyrodiff.Schedule ... 0.1"),
    (lambda: networks.DividedByNoise(nn.Identity(), LAYER), "schedule must be a pyrodiff.Schedule ... Linear"),
    (lambda: networks.DividedByNoise(LAYER, VE)(X, 1), "network ... (5, 2) ... (5, 1)"),
    (
        lambda: networks.DividedByNoise(OF_TIME, VE)(X, 1),
        "network must take x_t and 0 tensors of context, and no time ... MLP",
    ),
    (
        lambda: networks.DividedByNoise(LAYER, VE)(X, 1, X),
        "network must take x_t and 1 tensor of context, and no ... Linear",
    ),
    *[
        (part(call, told(*kind, options=options), PICTURES, 1, *context), said)
        for call, kind in (
            (lambda network, *args: network(*args), [networks.MLP]),
            (unvalidated, [networks.UNet, (2, 4)]),
        )
        for options, context, said in (
            (LABEL, [3], "y must be in 0..2, or -1 for no label, but it is 3"),
            (LABEL, [-2], "y must be in 0..2, or -1 for no label, but it is -2"),
            (LABEL, [1.0], f"{NO_LABEL} 1.0"),
            (LABEL, [True], f"{NO_LABEL} True"),
            (LABEL, [[0, 1, 2, 0, 1]], NO_LABEL),
            (LABEL, [Y.double()], f"{NO_LABEL} a tensor of dtype torch.float64"),
            (LABEL, [Y > 0], f"{NO_LABEL} a tensor of dtype torch.bool"),
            (LABEL, [Y + 0j], f"{NO_LABEL} a tensor of dtype torch.complex64"),
            (LABEL, [Y[:4]], "y must be an int, or broadcast to the batch shape (5,), but its shape is (4,)"),
            (LABEL, [Y[:, None]], "y must be an int, or broadcast to the batch shape (5,), but its shape is (5, 1)"),
            (LABEL, [Y[None]], "y must be an int, or broadcast to the batch shape (5,), but its shape is (1, 5)"),
            (
                LABEL,
                [Y, V],
                f"context must be y, as in network(x_t, t, y), but it is a tensor ... and a tensor ...: {WAY_OUT}",
            ),
            (VECTOR, [], f"{NO_VECTOR} None"),
            (VECTOR, [None], f"{NO_VECTOR} None"),
            (VECTOR, [1.5], f"{NO_VECTOR} 1.5"),
            (VECTOR, [Y], f"{NO_VECTOR} a tensor of dtype torch.int64 and shape (5,)"),
            (VECTOR, [V[:, :1]], f"{NO_VECTOR} a tensor of dtype torch.float32 and shape (5, 1)"),
            (VECTOR, [torch.zeros(5, 3)], NO_VECTOR),
            (VECTOR, [torch.zeros(())], NO_VECTOR),
            (VECTOR, [V[:4]], NO_VECTOR),
            (VECTOR, [V[None]], NO_VECTOR),
            (VECTOR, [V, V], "context must be vector, as in network(x_t, t, vector), but it is a tensor"),
            (LABEL | VECTOR, [Y], "vector must be given, as in network(x_t, t, y, vector), ... but it is None"),
            (LABEL | VECTOR, [], "vector must be given"),
            (LABEL | VECTOR, [V, Y], f"{NO_LABEL} a tensor of dtype torch.float32"),
            (LABEL | VECTOR, [Y, V, V], "context must be y and vector, as in network(x_t, t, y, vector)"),
            ({}, [Y], f"context must be left out, as in network(x_t, t), ... torch.int64 ... {WAY_OUT}"),
            ({}, [0], "context must be left out ... but it is 0"),
        )
    ],
    *[
        (part(told(networks.MLP, options=options), PICTURES, 1, y=1), "context must be ... but it is 1")
        for options in ({}, VECTOR)
    ],
]

STROKES = datasets.Strokes(torch.zeros(3, 8, 8))
TABLE["data sets and levels"] = [
    *each(part(datasets.swiss_roll, 5), "seed", 2**64, -(10**30)),
    *each(part(pyrodiff.from_levels, torch.arange(3), 17), "generator", *SOURCES),
    *each(pyrodiff.Levels, "levels", 2**53 + 1),
    *[
        (part(pyrodiff.DiscretizedNormal, *args, 17), f"{name} must be a tensor with a floating dtype")
        for name, args in (("loc", (0.5, X)), ("loc", (X > 0, X)), ("scale", (X, 1.0)), ("scale", (X, X + 0j)))
    ],
    *[
        row
        for name in ("swiss_roll", "checkerboard", "eight_gaussians", "heartbeat")
        for row in (
            *each(getattr(datasets, name), "num_samples", *COUNTS),
            *each(part(getattr(datasets, name), 5), "seed", 2.5, True, "3", None),
        )
    ],
    *each(part(datasets.swiss_roll, 5), "noise", -0.1, NAN, INF, "0.1", None),
    *each(part(datasets.heartbeat, 5), "length", 7, *COUNTS),
    *each(part(datasets.heartbeat, 5), "period", *COUNTS),
    *each(datasets.digits, "binary", "no"),
    *each(datasets.digits, "split", "valid", None, ["test"]),
    *each(part(datasets.swiss_roll_log_prob, X), "noise", 0, 1e-9, INF),
    (lambda: datasets.swiss_roll_log_prob(filled(NAN)), "x ... 1 of its values"),
    (lambda: datasets.Strokes(torch.zeros(3, 64)), "k must have shape (n, 8, 8), ... (3, 64)"),
    (lambda: datasets.Strokes(torch.zeros(0, 8, 8)), "k must have shape"),
    (lambda: datasets.Strokes(torch.full((3, 8, 8), 17.0)), "k must be whole numbers in 0..16 ... 192 ... 17.0"),
    (lambda: datasets.Strokes([1]), "k must be a tensor of whole numbers in 0..16"),
    *[
        (part(STROKES, i), "i must be integers in 0..2")
        for i in (torch.tensor([3]), torch.tensor([-1]), torch.tensor(1), 2, torch.tensor([0.5]))
    ],
    *[
        (lambda options=options: datasets.binarize(**{"k": torch.tensor([0, 255]), **options}), said)
        for options, said in (
            (
                {"k": torch.tensor([0, 256])},
                "k must be whole numbers in 0..255, for 256 levels, but 1 of its 2 ... 256",
            ),
            ({"k": torch.tensor([-1, 0])}, "k must be whole numbers ... -1"),
            ({"k": torch.tensor([0.5])}, "k must be whole numbers ... 0.5"),
            ({"k": torch.tensor([NAN])}, "k must be whole numbers ... nan"),
            ({"k": [0, 1]}, "k must be a tensor of whole numbers in 0..255"),
            ({"levels": 1}, "levels must be an int of at least 2"),
            ({"threshold": 0}, "threshold must be an int in 1..255 or None, but it is 0"),
            ({"threshold": 256}, "threshold must be ... 256"),
            ({"threshold": 0.5}, "threshold must be an int ... 0.5"),
            ({"threshold": True}, "threshold must be ... True"),
            ({"threshold": 9, "generator": 3}, "generator must be None with a threshold"),
            ({"generator": "a"}, "generator must be a torch.Generator, a seed or None, but it is 'a'"),
            ({"generator": True}, "generator must be"),
        )
    ],
    *[
        row
        for name, call in {
            "bin_width": pyrodiff.bin_width,
            "from_levels": part(pyrodiff.from_levels, torch.zeros(2)),
            "to_levels": part(pyrodiff.to_levels, torch.zeros(2)),
            "Levels": pyrodiff.Levels,
            "DiscretizedNormal": part(pyrodiff.DiscretizedNormal, torch.zeros(2), torch.ones(2)),
        }.items()
        for row in each(call, "levels", 1, 0, -3, 2.0, True, "17", None)
    ],
    *[
        (
            lambda value=value: pyrodiff.from_levels(torch.tensor([3.0, value]), 17, uniform=True),
            f"k ... 0..16 ... 1 of its 2 values are not, the first {value}",
        )
        for value in (-1.0, 17.0, 0.5, NAN, INF)
    ],
    (lambda: pyrodiff.from_levels(torch.arange(256), 17), "k ... 0..16 ... 17 levels ... 239 ... 17"),
    (lambda: pyrodiff.from_levels([0, 1], 17), "k ... tensor ... [0, 1]"),
    (lambda: pyrodiff.from_levels(torch.zeros(2, dtype=torch.complex64), 17), "k ... complex"),
    *each(
        part(pyrodiff.from_levels, torch.arange(3), 17), "dtype", torch.int64, torch.bool, torch.complex64, "float32"
    ),
    *each(part(pyrodiff.from_levels, torch.arange(3), 17), "uniform", *SWITCHES),
    *each(part(pyrodiff.from_levels, torch.arange(3), 17, uniform=True), "generator", *SOURCES),
    *[
        (
            lambda dtype=dtype, most=most: pyrodiff.from_levels(torch.arange(3), most + 1, dtype=dtype),
            f"levels ... {most + 1}",
        )
        for dtype, most in MOST_LEVELS.items()
    ],
    *[
        (part(pyrodiff.to_levels, x, 5), f"x ... {said}")
        for x, said in (
            (torch.arange(3), "torch.int64"),
            ([0.5], "[0.5]"),
            (filled(0.5) + 0j, "complex64"),
            (filled(INF), "finite ... 1 of ... inf"),
            (filled(-INF), "finite ... 1 of ... -inf"),
            (filled(NAN), "finite ... 1 of ... nan"),
        )
    ],
    (lambda: pyrodiff.LevelCategorical(torch.zeros(3, 1)), "levels ... 1"),
    (lambda: pyrodiff.LevelCategorical(torch.zeros(())), "levels ... 0"),
    *[(part(logits, values), "logits must be log probabilities") for values in ([NAN, 0.0], [INF, 0.0], [-INF, -INF])],
    *[
        (part(logits, [0, 1], dtype), f"logits ... floats ... {dtype}")
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ],
]

STATES = torch.linspace(0, 1, 240).reshape(3, 5, 4, 4)
TABLE["plots"] = [
    (call, said)
    for call, said in (
        (lambda: plots.bits(STATES[0], columns=0), "columns must be an int of at least 1, but it is 0"),
        (lambda: plots.diffusion_process(DIFFUSION, X, times=()), "times must be ints in 0..4, but they are ()"),
        (lambda: plots.diffusion_process(DIFFUSION, X, times={1}), "times must be ints in 0..4, but they are {1}"),
        *(
            (
                part(plots.diffusion_process, DIFFUSION, X, extent=extent),
                f"extent must be a number in (0, inf), but it is {extent!r}",
            )
            for extent in (0, -1, NAN, True)
        ),
        (lambda: plots.histograms(X, None), "data must be a torch.Tensor, but it is None"),
        (lambda: plots.bits(torch.zeros(3)), "x must have shape ... (3,)"),
        (lambda: plots.bits(None), "x must have shape ... None"),
        (lambda: plots.samples(X, axes="left"), "axes must be a matplotlib.axes._axes.Axes, but it is 'left'"),
        (lambda: plots.samples(X > 0), "x must be points ... torch.bool"),
        (lambda: plots.diffusion_process(REVERSE, X), "diffusion must be a pyrodiff.Diffusion"),
        (lambda: plots.curves(None), "records must be a list of mappings, but it is None"),
        (lambda: plots.diffusion_process(DIFFUSION, X, times=(7,)), "times must be ints in 0..4, but they are (7,)"),
        (
            lambda: plots.diffusion_process(gaussian(shape=(4,)), X),
            "diffusion must have event_shape (2,), but it is (4,)",
        ),
        (lambda: plots.pictures(torch.zeros(4, 4)), "x must have shape (B, height, width) or ... (4, 4)"),
        (lambda: plots.pictures(torch.zeros(4, 2, 4, 4)), "x must have shape ... (4, 2, 4, 4)"),
        (lambda: plots.pictures(torch.zeros(0, 4, 4)), "x must have shape ... B at least 1"),
        (lambda: plots.pictures([1]), "x must have shape ... [1]"),
        (lambda: plots.pictures(2 * STATES[0] - 1), "x must be numbers in [0, 1], ... [- ... (x + 1) / 2"),
        (lambda: plots.pictures(NAN * STATES[0]), "x must be numbers in [0, 1], ... nan"),
        (lambda: plots.pictures(STATES[0], columns=0), "columns must be an int of at least 1, but it is 0"),
        (lambda: plots.samples(torch.zeros(4)), "x must be points ... sequences, ... pictures, ... (4,)"),
        (lambda: plots.samples(torch.zeros(4, 4, 9, 9)), "x must be points ... (4, 4, 9, 9)"),
        (lambda: plots.samples(torch.full((4, 2), INF)), "x must be finite, but 8 of its numbers are not"),
        (lambda: plots.samples(None), "x must be points"),
        (lambda: plots.samples(STATES[0], limits=(1, 0)), "limits must be two numbers, the lower first"),
        (lambda: plots.samples(STATES[0], limits=3), "limits must be two numbers, ... 3"),
        (lambda: plots.trajectory(STATES[:, 0], (2, 1)), "times must be one for each of the 3 states ... (2, 1)"),
        (lambda: plots.trajectory(torch.zeros(3, 5), (2, 1, 0)), "states must be points ... len(times), B"),
        (lambda: plots.trajectory(STATES, (2, 1, 0), rows=0), "rows must be an int of at least 1"),
        (lambda: plots.trajectory(STATES / 0, (2, 1, 0)), "states must be finite"),
        (lambda: plots.trajectory(STATES, 5), "times must be one for each of the 3 states, but they are 5"),
        (lambda: plots.animation(STATES, (2, 1, 0), interval=0), "interval must be an int of at least 1"),
        (lambda: plots.animation(STATES, ()), "times must be one for each"),
        (lambda: plots.curves([]), "records must hold a step with a loss or a bound, but none of the 0 does"),
        (lambda: plots.curves([{"loss": 1.0}]), "records must hold a step ... none of the 1 does"),
        (lambda: plots.curves([[1, 2]]), "records must be mappings, but number 0 is [1, 2]"),
        (lambda: plots.curves([{"step": 1, "loss": "2"}]), "records must have numbers, ... 0 has loss = '2'"),
    )
]

TABLE["streams"] = [
    row
    for name, values in {
        "prefetch_factor": COUNTS[:-1],
        "pin_memory": SWITCHES,
        "timeout": (-1, NAN, "1", None),
    }.items()
    for row in each(part(streaming.Stream, X, 2), name, *values)
]

CLOUD, SCORE = torch.linspace(-1, 1, 12).reshape(4, 3), nn.Linear(3, 3)
LOSSES = {
    "explicit": lambda score, x: scores.explicit(score, x, lambda x: -x),
    "implicit": scores.implicit,
    "sliced": scores.sliced,
    "denoising": lambda score, x: scores.denoising(score, x, 1.0),
}


def cut(x):
    return (2 * x).detach()


TABLE["scores and noise levels"] = [
    *each(part(scores.sliced, SCORE, CLOUD), "variance_reduced", *SWITCHES),
    *each(part(scores.denoising, SCORE, CLOUD, 1.0), "control_variate", *SWITCHES),
    (lambda: scores.denoising(SCORE, CLOUD, 1.0, noise=CLOUD.long()), "noise ... int64"),
    (lambda: scores.explicit(SCORE, CLOUD, CLOUD > 0), "true_score must ... bool"),
    *[
        (part(loss, score, x), said)
        for name, loss in LOSSES.items()
        for score, x, said in (
            (SCORE, CLOUD.long(), "x must be a tensor of floats"),
            (SCORE, torch.tensor(1.0), "x must be a tensor of floats ... shape ()"),
            (SCORE, CLOUD.half(), "x must be float32 or float64"),
            (CLOUD, CLOUD, "score must be a function of x"),
            (None, CLOUD, "score must be a function of x ... None"),
        )
    ],
    (lambda: scores.explicit(SCORE, [1.0], CLOUD), "x must be a tensor of floats ... [1.0]"),
    (lambda: scores.explicit(SCORE, CLOUD, CLOUD[:1]), "true_score must have the shape of x, (4, 3) ... (1, 3)"),
    (lambda: scores.explicit(SCORE, CLOUD, lambda x: x[:1]), "true_score must return ... (1, 3)"),
    (lambda: scores.explicit(SCORE, CLOUD, 2.0), "true_score must be a function of x ... 2.0"),
    *each(part(scores.sliced, SCORE, CLOUD), "num_projections", *COUNTS),
    *each(part(scores.denoising, SCORE, CLOUD), "sigma", 0, -1.0, INF, NAN),
    *[
        (part(scores.denoising, SCORE, CLOUD, sigma), f"sigma ... {said}")
        for sigma, said in (
            (torch.ones(3), "(4,) ... (3,)"),
            (torch.ones(4, dtype=torch.long), "int64"),
            (torch.tensor([1.0, 0.0, 1.0, 1.0]), "positive ... 0.0..1.0"),
            (torch.tensor(NAN), "positive"),
        )
    ],
    (lambda: scores.denoising(SCORE, CLOUD, 1.0, noise=CLOUD[:1]), "noise ... (4, 3) ... (1, 3)"),
    (lambda: scores.denoising(SCORE, CLOUD, 1.0, noise=2.0), "noise ... 2.0"),
    (lambda: scores.minus_gradient(CLOUD), "energy must be a function of x"),
    (lambda: scores.minus_gradient(SCORE)(CLOUD), "energy ... (4,) ... (4, 3)"),
    (lambda: scores.minus_gradient(lambda x: cut(x).sum(1))(CLOUD), "energy must be differentiable in x"),
    (lambda: scores.minus_gradient(lambda x: x.sum(1))(CLOUD.long()), "x must be a tensor of floats"),
    (lambda: pyrodiff.initial_noise(CLOUD[:1]), "x must hold at least 2 data ... 1"),
    (lambda: pyrodiff.initial_noise(CLOUD.to(torch.uint8)), "x must be a tensor of floats ... uint8"),
    (lambda: pyrodiff.initial_noise(CLOUD / 0), "x must be finite"),
    *each(part(pyrodiff.initial_noise, CLOUD), "num_samples", 1, 5, 2.0),
    *each(part(pyrodiff.initial_noise, CLOUD, 2), "generator", *SOURCES),
    (lambda: pyrodiff.initial_noise(CLOUD, generator=1), "generator must be None without num_samples ... 1"),
    *each(pyrodiff.noise_ratio, "D", 0, 1, 4, 7.0, True, "8"),
    *each(part(pyrodiff.noise_ratio, 9), "overlap", 0, 1, 0.9974, -1, "a"),
    *each(part(pyrodiff.langevin_step_size, VE, 2), "num_updates", *COUNTS),
    *each(part(pyrodiff.langevin_step_size, VE, num_updates=3), "D", *COUNTS),
    *[
        (
            part(pyrodiff.langevin_step_size, schedule, 2, 3),
            f"schedule must have a signal of 1 and a geometric noise ... {said}",
        )
        for schedule, said in (
            (pyrodiff.CosineSchedule(4), "CosineSchedule"),
            (pyrodiff.LogSNRSchedule(6), "LogSNRSchedule"),
            (pyrodiff.LogSNRSchedule(6, 20.0, 16.0), "LogSNRSchedule"),  # of geometric noise, but some signal lost
            (pyrodiff.GeometricSchedule(1), "GeometricSchedule"),
            (pyrodiff.SubSchedule(VE, [1, 2, 4]), "SubSchedule"),
            (0.1, "0.1"),
            (nn.Linear(1, 1), "Linear"),
        )
    ],
]

# What only shows when a part is called: the chain may have begun, and the network may have run
LATE = [
    *[
        (part(loss, score, CLOUD), f"score ... (4, 3) ... {said}")
        for loss in LOSSES.values()
        for score, said in ((lambda x: x[:, :2], "(4, 2)"), (lambda x: x.sum(), "()"))
    ],
    *[
        (part(call, drawing), "drawing must be one of T = 4 times, but it is one of 6")
        for drawing in (pyrodiff.ImportanceDrawing([1 / 6] * 6), pyrodiff.LossSecondMoment(6))
        for what, call in (
            ("in a pair", lambda drawing: DIFFUSION.one_step(drawing).guide(X)),
            ("called", lambda drawing: drawing(torch.zeros(3), 4)),
        )
    ],
    (
        lambda: pyrodiff.bound(DIFFUSION, [(X[:3], X[:3]), (X[3:], X[:1].repeat(3, 1))]),
        "context must have a first dimension ... in batch 1 of the loader",
    ),
    *[
        (part(LOSSES[name], score, CLOUD), "score must be differentiable in x ... detach")
        for name in ("implicit", "sliced")
        for what, score in (
            ("cut", cut),
            ("cut below", lambda x: SCORE(cut(x))),
            ("without a gradient", torch.no_grad()(SCORE.forward)),
        )
    ],
    (lambda: pyrodiff.analytic_variance(DIFFUSION, [X[:1]]), "x_0 must be at least 2 data"),
    *[
        (
            lambda call=call: call(DIFFUSION, X, memory_budget=1),
            "memory_budget must hold one datum, which takes ... bytes",
        )
        for call in (
            pyrodiff.bound,
            pyrodiff.ode_log_prob,
            pyrodiff.variance_account,
            named(pyrodiff.importance_bound, num_particles=2),
        )
    ],
    *[
        (part(evaluate, DIFFUSION, x_0, num_particles=2), f"x_0 ... {said}")
        for evaluate in (pyrodiff.bound, pyrodiff.importance_bound)
        for x_0, said in (
            ([X, X[:0]], "B >= 1 ... in batch 1 of the loader"),
            ([X, X, X[:, :1]], "(5, 1) ... in batch 2 of the loader"),
            ([X, X * NAN], "in batch 1 of the loader"),
        )
    ],
    (lambda: svi(DIFFUSION.model, DIFFUSION.guide, list).step(X), "optim ... list"),
    (
        lambda: svi(DIFFUSION.model, DIFFUSION.guide, average=lambda model: model).step(X),
        "average must return a torch.optim.",
    ),
    (
        lambda: svi(DIFFUSION.model, DIFFUSION.guide, scheduler=lambda optimizer: optimizer).step(X),
        "scheduler must return a torch.optim.",
    ),
    *[
        (
            lambda change=change: of_network(change).model(X),
            f"network must return a tensor of shape (5, 2) ... but it is {said}",
        )
        for name, change, said in CUT
    ],
    *[
        (
            lambda kind=kind: kind(Network(lambda x: (x,)), Q)(X, 2),
            "network must return a tensor of shape (5, 2) ... a tuple",
        )
        for kind in PREDICTIONS
    ],
    *[
        (
            lambda change=change: gaussian(pyrodiff.GaussianReverse(Q, Network(change))).model(X),
            f"denoiser must return a tensor of shape (5, 2) ... but it is {said}",
        )
        for name, change, said in CUT
    ],
    *[
        (call, "network must return a tensor of shape ... 1)")
        for name, call in {
            "importance_bound": lambda: pyrodiff.importance_bound(of_network(lambda x: x[:, :1]), X, num_particles=1),
            "a step": lambda: svi_of(of_network(lambda x: x[:, :1])).step(X),
            "a one-step pair's step": lambda: svi_of(of_network(lambda x: x[:, :1]).one_step()).step(X),
            "a sampler": lambda: pyrodiff.AncestralSampler(of_network(lambda x: x[:, :1]))(5),
            "bits": lambda: pyrodiff.BinomialReverse(BITS, pyrodiff.LogitPrediction(Network(lambda x: x[:, :1]), BITS))(
                ONES, 2
            ),
            "D3PM": lambda: pyrodiff.D3PMReverse(BITS, pyrodiff.LogitPrediction(Network(lambda x: x[:, :1]), BITS))(
                ONES, 2
            ),
        }.items()
    ],
    (
        lambda: pyrodiff.LevelPrediction(Returns(X), Q, levels=4)(X, 1),
        "network must return a tensor of shape (5, 2, 4) ... but it is (5, 2)",
    ),
    *[
        (lambda call=call, output=output: call(Returns(output))(X, 1), f"denoiser must return ... (5, 2) ... {said}")
        for call, output, said in (
            (part(pyrodiff.Clipped, low=0, high=1), X[:, 0], "(5,)"),
            (pyrodiff.Thresholded, 0.5, "0.5"),
        )
    ],
    *[
        (
            lambda change=change: pyrodiff.GaussianReverse(
                Q, pyrodiff.DataPrediction(Network(change), Q), pyrodiff.RangeVariance()
            )(X, 2),
            f"network {said}",
        )
        for change, said in (
            (lambda x: x, "must return two numbers ... (5, 2, 2), but ... (5, 2): give ... outputs=2"),
            (lambda x: torch.stack([x] * 3, -1), "... (5, 2) ... (5, 2, 2) for a learned ... is (5, 2, 3)"),
            (lambda x: x[..., None], "must return ... but it is (5, 2, 1)"),
            (lambda x: (x, x), "must return ... but it is a tuple"),
        )
    ],
    (
        lambda: gaussian(pyrodiff.GaussianReverse(Q, Network(), pyrodiff.RangeVariance())).model(X),
        "denoiser must return what a learned variance ... DataPrediction(network",
    ),
    *[
        (
            lambda t=t: pyrodiff.GaussianReverse(Q, NOISE, OfDimension())(X, t),
            "variance must return a tensor of the shape",
        )
        for t in (2, torch.full((5,), 2))
    ],
    (lambda: gaussian(Returns(torch.zeros(5, 2))).model(X), "reverse ... distribution ... tensor"),
    (lambda: gaussian(Returns(None)).model(X), "reverse ... distribution ... None"),
    (lambda: gaussian(Returns(normal(5, 3))).model(X), "reverse ... (2,) ... (3,)"),
    (lambda: gaussian(Returns(normal(3, 2))).model(X), "reverse ... (5,) ... (3,)"),
    (lambda: gaussian(Returns(normal(5, 2).base_dist)).model(X), "reverse ... (2,) ... () ... (5, 2)"),
    *[
        (lambda call=call: call(gaussian(Batches())), "reverse must have the event_shape (2,)")
        for name, call in GUIDED.items()
        if name != "flow" and name != "verify"
    ],
    *[
        (
            lambda kernel=kernel: pyrodiff.bound(gaussian(forward=Flat(kernel)), X),
            f"forward.{kernel} must have the event_shape (2,), but ... is ()",
        )
        for kernel in ("marginal", "posterior", "prior")
    ],
    (lambda: gaussian(decoder=Returns(torch.zeros(5, 2))).model(X), "decoder ... distribution ... tensor"),
    (lambda: gaussian(decoder=Returns(normal(5, 3))).model(X), "decoder ... (2,) ... (3,)"),
    *[
        (lambda value=value: gaussian().one_step(weighting=lambda t: value).guide(X), f"weighting {said}")
        for what, value, said in (
            ("numbers", 0.5, "... (5,) ... 0.5"),
            ("one number", torch.ones(()), "... (5,) ... shape ()"),
            ("3", torch.ones(3), "... (5,) ... shape (3,)"),
            ("less than 0", torch.full((5,), -1.0), "must return finite numbers of at least 0, but at t = "),
            ("NaN", torch.full((5,), NAN), "must return finite numbers of at least 0, but at t = "),
            ("infinity", torch.full((5,), INF), "must return finite numbers of at least 0, but at t = "),
        )
    ],
    *[
        (lambda value=value: loss_of(gaussian().one_step(weighting=pyrodiff.ScoreWeighting(lambda t: value))), said)
        for what, value, said in (
            ("3", torch.ones(3), "weight must return a tensor of the shape (5,) of t"),
            ("less than 0", torch.full((5,), -1.0), "weighting must return finite numbers of at least 0, but at t = "),
        )
    ],
    *[
        (
            lambda weighting=weighting: loss_of(BIT_DIFFUSION.one_step(weighting=weighting), ONES),
            f"weighting must not be a {type(weighting).__name__} ... not Gaussian, but a Bits",
        )
        for weighting in (pyrodiff.ScoreWeighting(lambda t: torch.ones(t.shape)), pyrodiff.HybridWeighting())
    ],
    *[
        (lambda parts=parts: own_sampler(**parts)(5), said)
        for name, parts, said in (
            ("step returns None", {"step": lambda x: None}, "step must return a tensor of shape (5, 2)"),
            ("step returns a row", {"step": lambda x: x[:1]}, "step must return a tensor of shape (5, 2)"),
            (
                "step returns a law",
                {"step": lambda x: dist.Normal(x, 1.0)},
                "step must return a tensor of shape (5, 2)",
            ),
            (
                "step returns float64",
                {"step": lambda x: x.double()},
                "step ... states of dtype torch.float32, but they are of torch.float64",
            ),
            ("last returns a column", {"last": lambda x: x[:, 0]}, "last must return a tensor of shape (5, 2)"),
        )
    ],
    (
        lambda: pyrodiff.DDIMSampler(gaussian(pyrodiff.GaussianReverse(Q, Network(lambda x: x[:1]))))(3),
        "denoiser must return a tensor of shape (3, 2)",
    ),
    (
        lambda: pyrodiff.AnnealedLangevinSampler(
            gaussian(pyrodiff.GaussianReverse(EXPLODING, Network(lambda x: x[:1])), EXPLODING), 0.01, 1
        )(3),
        "denoiser must return ... (3, 2)",
    ),
    *[
        (
            part(call, gaussian(Random()), guide=nothing),
            "guide must draw every random weight of the diffusion, but 'reverse.weight' is missing",
        )
        for way, call in GUIDED.items()
    ],
    *[
        (
            lambda change=change: pyrodiff.ode_log_prob(of_network(change), X),
            "denoiser must be differentiable in x_t for a flow",
        )
        for what, change in (("cut", torch.detach),)
    ],
    (
        lambda: pyrodiff.FlowSampler(of_network(torch.detach)).with_log_prob(3),
        "denoiser must be differentiable in x_t for a flow",
    ),
    *[
        (lambda call=call: call(gaussian(decoder=Weighed())), "... no Pyro sites of its own ... 'weight'")
        for name, call in (
            ("bound", lambda d: pyrodiff.bound(d, X)),
            ("importance_bound", lambda d: pyrodiff.importance_bound(d, X, num_particles=2)),
            ("flow", lambda d: pyrodiff.ode_log_prob(d, X)),
            ("law", lambda d: pyrodiff.DiffusionDistribution(d).log_prob(X)),
        )
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder to be in, where a file that is written is seen."""
    before, here = os.getcwd(), tmp_path_factory.mktemp("empty")
    os.chdir(here)
    yield here
    os.chdir(before)


def drawn_from():
    """The state of every source of random numbers."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()


@pytest.mark.filterwarnings("ignore:the data have mean")
def test_the_objects_of_the_table_work():
    of_bits(torch.tensor([0.5, 0.2])).guide(ONES)
    for diffusion, x_0 in ((DIFFUSION, X), (BIT_DIFFUSION, ONES), (OF_LEVELS, LEVELS), (EXACT, X.double())):
        pyrodiff.bound(diffusion, x_0)
        diffusion.one_step().model(x_0)
    svi(DIFFUSION.model, DIFFUSION.guide).step(X)
    pyrodiff.AnnealedLangevinSampler(OF_NOISE, 0.01, 1)(2)
    own_sampler()(5)


@pytest.mark.parametrize(
    ("call", "said", "late"),
    [
        pytest.param(
            call, said, section == "late", id=re.sub(" at 0x[0-9A-Fa-f]+", "", f"{section}: {title(call)}{said}")
        )
        for section, rows in {**TABLE, "late": LATE}.items()
        for call, said in rows
    ],
)
def test_bad_input_is_refused_by_name_before_any_work(call, said, late, folder):
    drawn, calls = drawn_from(), Network.calls
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        call()
    message = str(error.value)
    said_so = re.escape(said).replace(r"\ \.\.\.\ ", ".*").replace(r"\.\.\.", ".*")
    assert re.match(said_so, message), message
    assert "\n" not in message
    assert len(message) < 500, message
    assert type(error.value) in (ValueError, pyrodiff.ArgumentError)
    if isinstance(error.value, pyrodiff.ArgumentError):
        assert said.startswith((error.value.argument, "...")), error.value.argument
    assert not os.listdir(folder), "something was written"
    if not late:
        assert drawn_from() == drawn, "something was drawn"
        assert Network.calls == calls, "the network was called"
