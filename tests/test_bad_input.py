"""Bad input is a ValueError that names the argument and says what it was, before anything is drawn or computed."""

import functools
import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyrodiff
from pyrodiff import datasets, networks

NAN, INF = math.nan, math.inf


class Network(nn.Module):
    """A network of one parameter that counts its calls."""

    calls = 0

    def __init__(self, shape=None):
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.tensor(0.3)), shape

    def forward(self, x_t, t):
        Network.calls += 1
        return self.weight * (x_t if self.shape is None else torch.zeros(self.shape))


class Reverse(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t):
        return self.output


class Decoder(Reverse):
    pass


class Prior(Reverse):
    def forward(self):
        return self.output


def categorical(values, dtype=torch.float32):
    return pyrodiff.LevelCategorical(torch.tensor(values).to(dtype), validate_args=True)


def shaped(event_shape):
    return pyrodiff.Diffusion(Q, REVERSE, event_shape)


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape) - 1)


LINEAR, RECIPROCAL, VE = pyrodiff.LinearSchedule(4), pyrodiff.ReciprocalSchedule(4), pyrodiff.GeometricSchedule(4)
Q, EMPTY = pyrodiff.GaussianForward(LINEAR), pyrodiff.GaussianForward(RECIPROCAL)
BITS = pyrodiff.BinomialForward(RECIPROCAL, 0.2)
NOISE, LOGITS = pyrodiff.NoisePrediction(Network(), Q), pyrodiff.LogitPrediction(Network(), BITS)
REVERSE, BIT_REVERSE = pyrodiff.GaussianReverse(Q, NOISE), pyrodiff.BinomialReverse(BITS, LOGITS)
DIFFUSION = pyrodiff.Diffusion(Q, REVERSE, event_shape=(2,))
BIT_DIFFUSION = pyrodiff.Diffusion(BITS, BIT_REVERSE, event_shape=(2,))
PAIR, BIT_PAIR = DIFFUSION.one_step(), BIT_DIFFUSION.one_step()
X = torch.full((5, 2), 0.7)
META = torch.empty(5, 2, device="meta")
PROGRAMS = {
    "model": DIFFUSION.model,
    "guide": DIFFUSION.guide,
    "one-step model": PAIR.model,
    "one-step guide": PAIR.guide,
    "bound": functools.partial(pyrodiff.bound, DIFFUSION),
}
BIT_PROGRAMS = {
    "model": BIT_DIFFUSION.model,
    "guide": BIT_DIFFUSION.guide,
    "one-step model": BIT_PAIR.model,
    "one-step guide": BIT_PAIR.guide,
    "bound": functools.partial(pyrodiff.bound, BIT_DIFFUSION),
}


def filled(value, shape=(5, 2), **kwargs):
    x = torch.full(shape, 0.7, **kwargs)
    x.view(-1)[3] = value
    return x


def unused():
    return pyrodiff.GaussianReverse(Q, pyrodiff.NoisePrediction(Network(), Q))


def unused_bits(rate):
    q = pyrodiff.BinomialForward(RECIPROCAL, rate)
    return q, pyrodiff.BinomialReverse(q, pyrodiff.LogitPrediction(Network(), q))


def with_reverse(output):
    return lambda: pyrodiff.Diffusion(Q, Reverse(output), event_shape=(2,)).model(X)


def with_decoder(output):
    return lambda: pyrodiff.Diffusion(Q, unused(), (2,), decoder=Decoder(output)).model(X)


def with_weighting(output):
    return lambda: pyrodiff.Diffusion(Q, unused(), (2,)).one_step(weighting=lambda t: output).guide(X)


def nothing(x=None):
    return None


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def svi(model=nothing, guide=nothing, optim=adam, loss=None, clip_norm=None):
    return pyrodiff.SVI(model, guide, optim, pyrodiff.DiffusionELBO() if loss is None else loss, clip_norm)


BAD_DATA = [  # (id, x_0, words)
    ("a list", [[0.7, 0.7]], ("x_0", "list")),
    ("too few dimensions", torch.zeros(2), ("x_0", "(2,)", "(B, 2)")),
    ("too many dimensions", torch.zeros(3, 5, 2), ("x_0", "(3, 5, 2)", "(B, 2)")),
    ("another event", torch.zeros(5, 3), ("x_0", "(5, 3)", "(B, 2)")),
    ("an empty batch", torch.zeros(0, 2), ("x_0", "(0, 2)")),
    ("integers", torch.zeros(5, 2, dtype=torch.long), ("x_0", "torch.int64")),
    ("booleans", torch.zeros(5, 2, dtype=torch.bool), ("x_0", "torch.bool")),
    ("complex", torch.zeros(5, 2, dtype=torch.complex64), ("x_0", "torch.complex64")),
    ("another device", META, ("x_0", "cpu", "meta")),
    ("NaN", filled(NAN), ("x_0", "nan")),
    ("infinity", filled(INF), ("x_0", "inf")),
    ("minus infinity", filled(-INF), ("x_0", "-inf")),
]

TABLE = [
    # the data
    *[
        (f"{program} of {name}", functools.partial(call, x_0), words)
        for name, x_0, words in BAD_DATA
        for program, call in PROGRAMS.items()
    ],
    *[
        (f"{program} of bits that are {value}", functools.partial(call, filled(value).round().nan_to_num(value)), words)
        for value, words in ((2.0, ("x_0", "0 or 1", "2.0")), (-1.0, ("x_0", "0 or 1", "-1.0")))
        for program, call in BIT_PROGRAMS.items()
    ],
    *[
        (
            f"{program} of bits with {value}",
            functools.partial(call, torch.ones(5, 2).index_fill(0, torch.tensor(1), value)),
            words,
        )
        for value, words in ((0.5, ("x_0", "0 or 1", "0.5")), (NAN, ("x_0", "0 or 1", "nan")))
        for program, call in BIT_PROGRAMS.items()
    ],
    *[
        (
            f"{program} of float64",
            functools.partial(PROGRAMS[program], X.double()),
            ("x_0", "torch.float32", "torch.float64"),
        )
        for program in ("model", "one-step model", "bound")
    ],
    ("model of nothing", lambda: DIFFUSION.model(), ("x_0", "num_samples", "None")),
    ("model of both", lambda: DIFFUSION.model(X, num_samples=3), ("x_0", "num_samples", "3")),
    *[
        (f"num_samples {n!r}", functools.partial(DIFFUSION.model, num_samples=n), ("num_samples", repr(n)))
        for n in (0, -1, 2.5, True, "3")
    ],
    # the time
    *[
        (f"{kernel} at t = {t!r}", functools.partial(call, t), ("t", str(t)))
        for kernel, call in {
            "transition": lambda t: Q.transition(X, t),
            "marginal": lambda t: Q.marginal(X, t),
            "posterior": lambda t: Q.posterior(X, X, t),
            "transition of bits": lambda t: BITS.transition(X.round(), t),
            "posterior of bits": lambda t: BITS.posterior(X.round(), X.round(), t),
            "reverse": lambda t: REVERSE(X, t),
            "reverse of bits": lambda t: BIT_REVERSE(X.round(), t),
            "forward variance": lambda t: pyrodiff.ForwardVariance()(Q, t),
            "posterior variance": lambda t: pyrodiff.PosteriorVariance()(Q, t),
            "fixed variance": lambda t: pyrodiff.FixedVariance([0.1] * 4)(Q, t),
        }.items()
        for t in (0, 5, -1, 2.5, "3", None, NAN)
    ],
    *[
        (f"{kernel} at t = {t}", functools.partial(call, t), ("t", word))
        for kernel, call in {
            "transition": lambda t: Q.transition(X, t),
            "posterior": lambda t: Q.posterior(X, X, t),
            "posterior of bits": lambda t: BITS.posterior(X.round(), X.round(), t),
            "reverse": lambda t: REVERSE(X, t),
            "posterior variance": lambda t: pyrodiff.PosteriorVariance()(Q, t),
            "fixed variance": lambda t: pyrodiff.FixedVariance([0.1] * 4)(Q, t),
        }.items()
        for t, word in (
            (True, "True"),
            (torch.tensor([2.0] * 5), "torch.float32"),
            (torch.tensor([True] * 5), "torch.bool"),
            (torch.tensor([2, 2, 0, 2, 2]), "0"),
            (torch.tensor([2, 2, 5, 2, 2]), "5"),
            (torch.tensor([2, 2, -1, 2, 2]), "-1"),
        )
    ],
    *[
        (f"{kernel} at t of shape {shape}", functools.partial(call, torch.full(shape, 2)), ("t", str(shape), "(5, 2)"))
        for kernel, call in {
            "transition": lambda t: Q.transition(X, t),
            "posterior": lambda t: Q.posterior(X, X, t),
            "transition of bits": lambda t: BITS.transition(X.round(), t),
            "reverse": lambda t: REVERSE(X, t),
        }.items()
        for shape in ((4,), (1,), (2,), (5, 1), (5, 2, 1))
    ],
    ("t on another device", lambda: Q.transition(X, torch.full((5,), 2, device="meta")), ("t", "cpu", "meta")),
    *[
        (f"{kernel} from s = {s} to t = 2", functools.partial(call, s), ("s", str(s)))
        for kernel, call in {
            "transition": lambda s: Q.transition(X, 2, s),
            "posterior": lambda s: Q.posterior(X, X, 2, s),
            "transition of bits": lambda s: BITS.transition(X.round(), 2, s),
            "posterior of bits": lambda s: BITS.posterior(X.round(), X.round(), 2, s),
        }.items()
        for s in (2, 3, -1, 0.5, "1")
    ],
    ("posterior at s = 0", lambda: Q.posterior(X, X, 2, 0), ("s", "1 <= s", "s is 0")),
    ("posterior at s = t - 1 = 0", lambda: Q.posterior(X, X, 1), ("s", "1 <= s", "s is 0")),
    ("posterior of bits at s = 0", lambda: BITS.posterior(X.round(), X.round(), 2, 0), ("s", "1 <= s", "s is 0")),
    (
        "s of another shape",
        lambda: Q.transition(X, torch.full((5,), 2), torch.full((3,), 1)),
        ("s", "(3,)", "(5,)"),
    ),
    *[
        (f"{name} at t = {t!r}", functools.partial(getattr(LINEAR, name), t), ("t", "0..4", str(word)))
        for name in ("beta", "alpha_bar", "signal", "noise", "log_snr")
        for t, word in (
            (-1, -1),
            (5, 5),
            (2.5, 2.5),
            ("3", "3"),
            (True, True),
            (None, None),
            (torch.tensor([1, -1]), -1),
            (torch.tensor(5), 5),
            (torch.tensor(2.0), torch.float32),
            (torch.tensor(True), torch.bool),
        )
    ],
    # the state
    ("a state of integers", lambda: Q.transition(torch.ones(5, 2, dtype=torch.long), 2), ("state", "torch.int64")),
    ("a posterior of integers", lambda: Q.posterior(X.long(), X, 2), ("state", "torch.int64")),
    ("a state of bools", lambda: BITS.transition(X.bool(), 2), ("state", "torch.bool")),
    ("a posterior's x_0 of another shape", lambda: Q.posterior(X, torch.zeros(3, 2), 2), ("x_0", "(3, 2)", "(5, 2)")),
    ("a list for a state", lambda: Q.transition([[0.7, 0.7]], 2), ("state", "list")),
    # schedules
    ("betas with 0", lambda: pyrodiff.BetaSchedule([0.1, 0.0]), ("betas", "(0, 1]", "0.0")),
    ("betas below 0", lambda: pyrodiff.BetaSchedule([-0.1, 0.2]), ("betas", "(0, 1]", "-0.1")),
    ("betas above 1", lambda: pyrodiff.BetaSchedule([0.1, 1.5]), ("betas", "(0, 1]", "1.5")),
    ("a bad beta late", lambda: pyrodiff.BetaSchedule([0.1] * 20 + [1.5]), ("betas", "(0, 1]", "1.5")),
    ("betas with NaN", lambda: pyrodiff.BetaSchedule([0.1, NAN]), ("betas", "nan")),
    ("betas with infinity", lambda: pyrodiff.BetaSchedule([0.1, INF]), ("betas", "inf")),
    ("no betas", lambda: pyrodiff.BetaSchedule([]), ("betas", "(0,)")),
    ("one beta", lambda: pyrodiff.BetaSchedule(0.1), ("betas", "()")),
    ("betas in a table", lambda: pyrodiff.BetaSchedule([[0.1, 0.2]]), ("betas", "(1, 2)")),
    ("a beta of 1 before the end", lambda: pyrodiff.BetaSchedule([0.1, 1.0, 0.2]), ("betas", "betas[1]", "1")),
    *[
        (f"{schedule.__name__} of {n!r} steps", functools.partial(schedule, n), ("num_steps", repr(n)))
        for schedule in (
            pyrodiff.LinearSchedule,
            pyrodiff.CosineSchedule,
            pyrodiff.ReciprocalSchedule,
            pyrodiff.GeometricSchedule,
        )
        for n in (0, -1, 2.5, True, "3", None)
    ],
    *[
        (f"{schedule.__name__}({name}={value!r})", functools.partial(schedule, 4, **{name: value}), (name, repr(value)))
        for schedule, name, values in (
            (pyrodiff.LinearSchedule, "beta_start", (0, 1, -0.1, 1.5, NAN, "0.1", None)),
            (pyrodiff.LinearSchedule, "beta_end", (0, 1, -0.1, 1.5, NAN, "0.1", None)),
            (pyrodiff.CosineSchedule, "offset", (0, -0.1, NAN, INF, "0.1", None)),
            (pyrodiff.CosineSchedule, "beta_max", (0, 1, -0.1, 1.5, NAN, None)),
            (pyrodiff.GeometricSchedule, "sigma_min", (0, -0.1, NAN, INF, "0.1", None)),
            (pyrodiff.GeometricSchedule, "sigma_max", (0.005, 0.01, -1, NAN, INF, "0.1", None)),
        )
        for value in values
    ],
    # forward processes
    ("a schedule that is none", lambda: pyrodiff.GaussianForward([0.1, 0.2]), ("schedule", "[0.1, 0.2]")),
    ("a schedule of bits that is none", lambda: pyrodiff.BinomialForward("linear"), ("schedule", "'linear'")),
    ("a VE schedule for bits", lambda: pyrodiff.BinomialForward(VE), ("schedule", "GeometricSchedule")),
    *[
        (f"rate {rate!r}", functools.partial(pyrodiff.BinomialForward, RECIPROCAL, rate), ("rate", str(rate)))
        for rate in (0, 1, NAN, -0.1, 1.5)
    ],
    (
        "a rate with a bad entry",
        lambda: pyrodiff.BinomialForward(RECIPROCAL, torch.tensor([0.5, 1.0, 0.25])),
        ("rate", "1.0"),
    ),
    (
        "a rate of another event",
        lambda: pyrodiff.Diffusion(*unused_bits(torch.tensor([0.5, 0.2, 0.25])), event_shape=(2,)).guide(
            torch.ones(5, 2)
        ),
        ("rate", "(3,)", "(2,)"),
    ),
    (
        "a rate of more dimensions than a datum",
        lambda: pyrodiff.Diffusion(*unused_bits(torch.full((5, 2), 0.2)), event_shape=(2,)).guide(torch.ones(5, 2)),
        ("rate", "(5, 2)", "(2,)"),
    ),
    # denoisers
    *[
        (f"{kind.__name__} of no network", functools.partial(kind, nothing, Q), ("network", "function nothing"))
        for kind in (
            pyrodiff.DataPrediction,
            pyrodiff.NoisePrediction,
            pyrodiff.ScorePrediction,
            pyrodiff.VelocityPrediction,
        )
    ],
    *[
        (f"{kind.__name__} for {type(wrong).__name__}", functools.partial(kind, Network(), wrong), ("forward", word))
        for kind in (
            pyrodiff.DataPrediction,
            pyrodiff.NoisePrediction,
            pyrodiff.ScorePrediction,
            pyrodiff.VelocityPrediction,
        )
        for wrong, word in ((BITS, "BinomialForward"), (LINEAR, "LinearSchedule"), (None, "None"))
    ],
    ("LogitPrediction of no network", lambda: pyrodiff.LogitPrediction(nothing, BITS), ("network", "nothing")),
    ("LogitPrediction for numbers", lambda: pyrodiff.LogitPrediction(Network(), Q), ("forward", "GaussianForward")),
    ("LogitPrediction for none", lambda: pyrodiff.LogitPrediction(Network(), None), ("forward", "None")),
    *[
        (
            f"{kind.__name__} without signal",
            functools.partial(kind, Network(), EMPTY),
            ("forward", "ReciprocalSchedule"),
        )
        for kind in (pyrodiff.NoisePrediction, pyrodiff.ScorePrediction)
    ],
    # reverse processes
    ("reverse of bits", lambda: pyrodiff.GaussianReverse(BITS, NOISE), ("forward", "BinomialForward")),
    ("reverse of none", lambda: pyrodiff.GaussianReverse(None, NOISE), ("forward", "None")),
    ("a function for a denoiser", lambda: pyrodiff.GaussianReverse(Q, nothing), ("denoiser", "nothing")),
    ("a number for a variance", lambda: pyrodiff.GaussianReverse(Q, NOISE, 0.1), ("variance", "0.1")),
    ("zero for a variance", lambda: pyrodiff.GaussianReverse(Q, NOISE, 0.0), ("variance", "0.0")),
    ("a list for a variance", lambda: pyrodiff.GaussianReverse(Q, NOISE, [0.1]), ("variance", "[0.1]")),
    (
        "too few variances",
        lambda: pyrodiff.GaussianReverse(Q, NOISE, pyrodiff.FixedVariance([0.1] * 3)),
        ("variances", "4", "3"),
    ),
    (
        "too many variances",
        lambda: pyrodiff.FixedVariance([0.1] * 5)(Q, 1),
        ("variances", "4", "5"),
    ),
    *[
        (f"variances {values}", functools.partial(pyrodiff.FixedVariance, values), ("variances", str(values)))
        for values in ([], [0.1, -0.2], [0.1, 0.0], [0.1, NAN], [INF], [[0.1]], 0.1)
    ],
    ("bit reverse of numbers", lambda: pyrodiff.BinomialReverse(Q, LOGITS), ("forward", "GaussianForward")),
    ("bit reverse of noise", lambda: pyrodiff.BinomialReverse(BITS, NOISE), ("denoiser", "NoisePrediction")),
    # decoders
    ("transition decoder of none", lambda: pyrodiff.TransitionDecoder(LINEAR), ("forward", "LinearSchedule")),
    # the pair
    ("a schedule for a process", lambda: pyrodiff.Diffusion(LINEAR, unused(), (2,)), ("forward", "LinearSchedule")),
    ("a function for a reverse", lambda: pyrodiff.Diffusion(Q, nothing, (2,)), ("reverse", "nothing")),
    (
        "a function for a decoder",
        lambda: pyrodiff.Diffusion(Q, unused(), (2,), decoder=nothing),
        ("decoder", "nothing"),
    ),
    ("an int for an event_shape", lambda: pyrodiff.Diffusion(Q, unused(), 2), ("event_shape", "2")),
    ("an event_shape with 0", lambda: pyrodiff.Diffusion(Q, unused(), (2, 0)), ("event_shape", "(2, 0)")),
    ("an event_shape with -1", lambda: pyrodiff.Diffusion(Q, unused(), (-1,)), ("event_shape", "(-1,)")),
    ("an event_shape with 2.5", lambda: pyrodiff.Diffusion(Q, unused(), (2.5,)), ("event_shape", "2.5")),
    ("a tensor for a prior", lambda: pyrodiff.Diffusion(Q, unused(), (2,), prior=torch.zeros(2)), ("prior", "tensor")),
    ("a prior of 3", lambda: pyrodiff.Diffusion(Q, unused(), (2,), prior=normal(1, 3)), ("prior", "(3,)", "(2,)")),
    ("a prior of a batch", lambda: pyrodiff.Diffusion(Q, unused(), (2,), prior=normal(2)), ("prior", "()", "(2,)")),
    (
        "a prior module of 3",
        lambda: pyrodiff.Diffusion(Q, unused(), (2,), prior=Prior(normal(1, 3))).model(X),
        ("prior", "(3,)", "(2,)"),
    ),
    (
        "a prior module of a tensor",
        lambda: pyrodiff.Diffusion(Q, unused(), (2,), prior=Prior(torch.zeros(2))).model(X),
        ("prior", "tensor"),
    ),
    (
        "drawing 'uniform'",
        lambda: pyrodiff.Diffusion(Q, unused(), (2,)).one_step(drawing="uniform"),
        ("drawing", "'uniform'"),
    ),
    (
        "drawing a class",
        lambda: pyrodiff.Diffusion(Q, unused(), (2,)).one_step(drawing=pyrodiff.UniformDrawing),
        ("drawing", "UniformDrawing"),
    ),
    ("drawing 0", lambda: pyrodiff.Diffusion(Q, unused(), (2,)).one_step(drawing=0), ("drawing", "0")),
    ("weighting 2", lambda: pyrodiff.Diffusion(Q, unused(), (2,)).one_step(weighting=2.0), ("weighting", "2.0")),
    ("weighting 0", lambda: pyrodiff.Diffusion(Q, unused(), (2,)).one_step(weighting=0.0), ("weighting", "0.0")),
    (
        "simple weighting of bits",
        lambda: pyrodiff.SimpleWeighting(BIT_REVERSE),
        ("reverse", "BinomialReverse"),
    ),
    (
        "simple weighting without signal",
        lambda: pyrodiff.SimpleWeighting(pyrodiff.GaussianReverse(EMPTY, pyrodiff.DataPrediction(Network(), EMPTY))),
        ("reverse", "ReciprocalSchedule"),
    ),
    # what is learned, and what is asked
    ("SVI of no model", lambda: svi(model=3), ("model", "3")),
    ("SVI of no guide", lambda: svi(guide=None), ("guide", "None")),
    ("SVI of an optimizer", lambda: svi(optim=adam([torch.zeros(1)])), ("optim", "Adam")),
    ("SVI of a function for a loss", lambda: svi(loss=nothing), ("loss", "nothing")),
    *[
        (f"SVI clipped to {norm!r}", functools.partial(svi, clip_norm=norm), ("clip_norm", repr(norm)))
        for norm in (0, -1.0, NAN, "1")
    ],
    ("SVI with nothing to learn", lambda: svi(loss=Trace_ELBO()).step(X), ("model", "parameter")),
    *[
        (f"{name}={value!r}", functools.partial(pyrodiff.bound, DIFFUSION, X, **{name: value}), (name, repr(value)))
        for name in ("num_particles", "memory_budget")
        for value in (0, -1, 2.5, True, "3", None)
    ],
    ("the bound of a number", lambda: pyrodiff.bound(DIFFUSION, 3), ("x_0", "int")),
    ("the bound of a reverse process", lambda: pyrodiff.bound(REVERSE, X), ("diffusion", "GaussianReverse")),
    # networks
    *[
        (f"hidden={n!r}", functools.partial(networks.MLP, (2,), hidden=n), ("hidden", repr(n)))
        for n in (7, 0, -2, 2.5, True)
    ],
    *[
        (f"num_blocks={n!r}", functools.partial(networks.MLP, (2,), num_blocks=n), ("num_blocks", repr(n)))
        for n in (0, -1, 2.5, True)
    ],
    ("dropout", lambda: networks.MLP((2,), dropout=1.5), ("dropout", "1.5")),
    ("dropout NaN", lambda: networks.MLP((2,), dropout=NAN), ("dropout", "nan")),
    ("frequency", lambda: networks.MLP((2,), frequency=-1.0), ("frequency", "-1.0")),
    ("frequency inf", lambda: networks.MLP((2,), frequency=float("inf")), ("frequency", "inf")),
    ("an int for an MLP's event_shape", lambda: networks.MLP(2), ("event_shape", "2")),
    *[
        (f"features={n!r}", functools.partial(networks.TimeEmbedding, n), ("features", repr(n)))
        for n in (7, 0, 2.5, True)
    ],
    # data sets
    *[
        (f"{name}({n!r})", functools.partial(getattr(datasets, name), n), ("num_samples", repr(n)))
        for name in ("swiss_roll", "checkerboard", "eight_gaussians", "heartbeat")
        for n in (0, -1, 2.5, True, "3", None)
    ],
    *[
        (f"{name}(seed={seed!r})", functools.partial(getattr(datasets, name), 5, seed=seed), ("seed", repr(seed)))
        for name in ("swiss_roll", "checkerboard", "eight_gaussians", "heartbeat")
        for seed in (2.5, True, "3", None)
    ],
    *[
        (f"swiss_roll(noise={noise!r})", functools.partial(datasets.swiss_roll, 5, noise=noise), ("noise", repr(noise)))
        for noise in (-0.1, NAN, INF, "0.1", None)
    ],
    *[
        (f"heartbeat(length={n!r})", functools.partial(datasets.heartbeat, 5, length=n), ("length", repr(n)))
        for n in (0, -5, 7, 2.5, "20")
    ],
    *[
        (f"heartbeat(period={n!r})", functools.partial(datasets.heartbeat, 5, period=n), ("period", repr(n)))
        for n in (0, -5, 2.5, "5")
    ],
    ("digits, binary or not", lambda: datasets.digits(binary="no"), ("binary", "'no'")),
    ("a roll's density at NaN", lambda: datasets.swiss_roll_log_prob(filled(NAN)), ("x", "1 of its values")),
    # numbers that a cast would let pass
    *[
        (
            f"to_levels({value})",
            functools.partial(pyrodiff.to_levels, filled(value), 5),
            ("x", "finite", "1 of", repr(value)),
        )
        for value in (INF, -INF, NAN)
    ],
    ("to_levels complex", lambda: pyrodiff.to_levels(filled(0.5) + 0j, 5), ("x", "complex64")),
    ("from_levels to 'float32'", lambda: pyrodiff.from_levels(filled(1), 5, dtype="float32"), ("dtype", "'float32'")),
    ("from_levels uniform=2", lambda: pyrodiff.from_levels(filled(1), 5, uniform=2), ("uniform", "2")),
    *[
        (f"logits {values}", functools.partial(categorical, values), ("logits", "must be log probabilities"))
        for values in ([NAN, 0.0], [INF, 0.0], [-INF, -INF])
    ],
    *[
        (f"logits of {dtype}", functools.partial(categorical, [0, 1], dtype), ("logits", "floats", str(dtype)))
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ],
    *[
        (
            f"{name} of {dtype}",
            functools.partial(make, torch.ones(4).to(dtype)),
            (name.strip(), "real numbers", str(dtype)),
        )
        for name, make in {
            "betas": pyrodiff.BetaSchedule,
            "betas ": pyrodiff.LearnedBetaSchedule,
            "variances": pyrodiff.FixedVariance,
            "rate": functools.partial(pyrodiff.BinomialForward, RECIPROCAL),
        }.items()
        for dtype in (torch.complex64, torch.bool)
    ],
    ("betas True", lambda: pyrodiff.BetaSchedule([True, True]), ("betas", "real numbers", "bool")),
    *[
        (f"event_shape {shape!r} of {make.__name__}", functools.partial(make, shape), ("event_shape", repr(shape)))
        for make in (shaped, networks.MLP, networks.UNet)
        for shape in ((True,), (True, 8, 8), {2, 3}, {2: 1})
    ],
    *[
        (f"progress={value!r}", functools.partial(evaluate, DIFFUSION, X, progress=value), ("progress", repr(value)))
        for evaluate in (pyrodiff.bound, functools.partial(pyrodiff.importance_bound, num_particles=2))
        for value in ("no", 2, None)
    ],
    ("digits of no split", lambda: datasets.digits("valid"), ("split", "'valid'")),
    ("digits of no split at all", lambda: datasets.digits(None), ("split", "None")),
]

# What only shows when a part is called: the chain may have begun, and the network may have run.
LATE = [
    ("SVI with a list for optim", lambda: svi(DIFFUSION.model, DIFFUSION.guide, list).step(X), ("optim", "list")),
    *[
        (f"a network that returns {shape}", functools.partial(call, Network(shape)), ("network", str(shape), "(5, 2)"))
        for shape in ((5,), (5, 3), (1, 2))
        for call in (
            lambda network: pyrodiff.GaussianReverse(Q, pyrodiff.NoisePrediction(network, Q))(X, 2),
            lambda network: pyrodiff.BinomialReverse(BITS, pyrodiff.LogitPrediction(network, BITS))(X.round(), 2),
        )
    ],
    ("a reverse of tensors", with_reverse(torch.zeros(5, 2)), ("reverse", "distribution", "tensor")),
    ("a reverse of None", with_reverse(None), ("reverse", "distribution", "None")),
    ("a reverse of 3", with_reverse(normal(5, 3)), ("reverse", "(3,)", "(2,)")),
    (
        "a reverse for another process",
        lambda: pyrodiff.Diffusion(pyrodiff.GaussianForward(LINEAR), REVERSE, (2,)),
        ("reverse", "GaussianReverse", "another"),
    ),
    (
        "a denoiser for another process",
        lambda: pyrodiff.GaussianReverse(pyrodiff.GaussianForward(LINEAR), NOISE),
        ("denoiser", "NoisePrediction", "another"),
    ),
    ("a reverse of another batch", with_reverse(normal(3, 2)), ("reverse", "(5,)", "(3,)")),
    ("a reverse of batches", with_reverse(normal(5, 2).base_dist), ("reverse", "()", "(2,)", "(5, 2)")),
    ("a decoder of tensors", with_decoder(torch.zeros(5, 2)), ("decoder", "distribution", "tensor")),
    ("a decoder of 3", with_decoder(normal(5, 3)), ("decoder", "(3,)", "(2,)")),
    ("a weighting of numbers", with_weighting(0.5), ("weighting", "0.5", "(5,)")),
    ("a weighting of one number", with_weighting(torch.ones(())), ("weighting", "shape ()", "(5,)")),
    ("a weighting of 3", with_weighting(torch.ones(3)), ("weighting", "shape (3,)", "(5,)")),
]


@pytest.mark.filterwarnings("ignore:the data have mean")
def test_the_objects_of_the_table_work():
    pyrodiff.Diffusion(*unused_bits(torch.tensor([0.5, 0.2])), (2,)).guide(torch.ones(5, 2))
    DIFFUSION.model(X), PAIR.model(X), BIT_DIFFUSION.model(torch.ones(5, 2)), BIT_PAIR.model(torch.ones(5, 2))
    svi(DIFFUSION.model, DIFFUSION.guide).step(X)


@pytest.mark.parametrize(
    ("call", "words", "late"),
    [(*case[1:], False) for case in TABLE] + [(*case[1:], True) for case in LATE],
    ids=[case[0] for case in TABLE + LATE],
)
def test_bad_input_is_refused_by_name_before_any_work(call, words, late):
    random, calls = torch.get_rng_state(), Network.calls
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        call()
    assert type(error.value) in (ValueError, pyrodiff.ArgumentError)
    for word in words:
        assert word in str(error.value)
    if not late:
        assert torch.equal(torch.get_rng_state(), random), "something was drawn"
        assert Network.calls == calls, "the network was called"
