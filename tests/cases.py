"""What a diffusion is made of, an entry each: how it is made, and arithmetic of its own that it is held against.

Every property of a kind is one test in the file of that kind, over all its entries: SCHEDULES in test_schedules.py,
PROCESSES in test_forward.py, DENOISERS in test_denoisers.py, REVERSES in test_reverse.py, VARIANCES in
test_variances.py, DECODERS in test_decoders.py. The arithmetic is numpy's and Python's, in float64, from the
definitions alone; of a network it reads what the network itself returns.
"""

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrodiff

T = 7
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25, 0.5, 0.8]
PAIRS = [(s, t) for t in range(1, T + 1) for s in range(t)]
TIMES = {  # of chains of fewer steps
    "all": tuple(range(1, T + 1)),
    "some": (2, 3, 7),
    "early": (1, 4, 5),
    "the first two": (1, 2),
    "late": (5, 6, 7),
    "the last": (7,),
    "one": (4,),
    "the first": (1,),
}
BAD_TIMES = (-1, T + 1, 1.0, True, torch.tensor([0, T + 1]), torch.tensor([0.5]))


# What all tests of these share


def array(value):
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)


def close(actual, expected, rtol=1e-9, atol=0.0):
    """Numbers, arrays or tensors, of one shape after broadcasting."""
    np.testing.assert_allclose(array(actual), array(expected), rtol=rtol, atol=atol)


def same_law(law, moments, rtol=1e-10, atol=1e-10):
    """Whether the mean and the variance of normal laws, or of bits, are those given: they determine it."""
    mean, variance = moments
    is_bits = isinstance(getattr(law, "base_dist", law), torch.distributions.Bernoulli)
    close(law.mean, mean, *((1e-11, 0.0) if is_bits else (rtol, atol)))
    close(law.variance, np.broadcast_to(variance, tuple(law.mean.shape)), rtol)


def one_by_one(kernel, t, *states):
    """A kernel at times of shape (P, B), of a particle and of a datum by itself, where all have to be the same."""
    event_shape = states[0].shape[2:]
    whole = kernel(t, *states)
    value = whole.sample()
    assert (whole.batch_shape, whole.event_shape, value.shape) == (t.shape, event_shape, states[0].shape)
    for p in range(len(t)):
        by_datum = kernel(t[p], *(x[p] for x in states))
        assert (by_datum.batch_shape, by_datum.event_shape) == (t.shape[1:], event_shape)
        close(by_datum.log_prob(value[p]), whole.log_prob(value)[p], rtol=1e-13)
        for i in range(t.shape[1]):
            one = kernel(int(t[p, i]), *(x[p, i : i + 1] for x in states))
            assert (one.batch_shape, one.event_shape) == ((1,), event_shape)
            close(one.log_prob(value[p, i : i + 1]), whole.log_prob(value)[p, i : i + 1], rtol=1e-13)


def drawn(law, moments, number):
    """Whether the draws of a law have its mean, variance and fourth moment, within five standard errors."""
    mean, variance = (np.asarray(one) for one in moments)
    x = law.sample((number,)).double().numpy()
    off = x - mean
    assert (np.abs(off.mean(0)) < 5 * np.sqrt(variance / number) + 1e-12).all()
    assert (np.abs((off**2).mean(0) - variance) < 5 * (off**2).std(0) / number**0.5 + 1e-12).all()


def copies(module, other):
    """The module in a copy, in a pickle, and in another of the same shapes that is given its state."""
    other.load_state_dict(module.state_dict())
    return copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other


def casts():
    """What casts a module."""
    return (
        lambda module: module.float(),
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: nn.Sequential(module).half().float()[0],
    )


def stays_float64(make, values):
    """Whether what a module says is float64, and the same to the last bit, whatever the module is cast to."""
    expected = values(make())
    for cast in casts():
        found = values(cast(make()))
        assert found.dtype == torch.float64
        assert torch.equal(found, expected)


def refused(call, *words):
    """Whether a call is a ValueError that says all of these words."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


def normal(*shape, m=0.7, v=2.3):
    return m + v**0.5 * torch.randn(shape, dtype=torch.float64)


def coins(*shape):
    return torch.randint(2, shape).double()


# Networks


class Returns(nn.Module):
    """A network that returns what it was given, a tensor or a function of what it is asked, which it remembers."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t, *context):
        self.asked = x_t, t, context
        return self.output(x_t, t, *context) if callable(self.output) else self.output


class Timed(nn.Module):
    """A network that tells the times apart, and learns; of each number so many outputs."""

    def __init__(self, outputs=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))
        self.outputs = outputs

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype)
        t = t.reshape(t.shape + (1,) * (x_t.dim() - t.dim()))
        found = self.weight * (x_t + t).sin() + self.bias * t
        if self.outputs is None:
            return found
        return torch.stack([k * found + torch.cos(x_t + k) for k in range(self.outputs)], -1)


# Schedules


@dataclass(frozen=True)
class Schedule:
    """A schedule of so many steps, and the (gain, variance) of each step x_t = gain x_{t-1} + sqrt(variance) eps."""

    make: Callable
    definition: Callable
    preserving: bool = True

    def steps(self, T):
        return _steps(self, T)


@functools.cache
def _steps(schedule, T):
    return schedule.definition(T)


def of_betas(make, betas):
    return Schedule(make, lambda T: oracles.preserving_steps(betas(T)))


def some_betas(T):
    return (BETAS * 3)[:T] if T < 20 else [1e-3 + 1e-5 * i for i in range(T)]


def ends(T):
    """Of betas on a line: the first and the last."""
    return min(0.02, 1.5 / T), min(0.4, 30 / T)


def some_times(T):
    """So many of twice as many times: 1, 4, 5, 8, 9, ..."""
    return [2 * k - k % 2 for k in range(1, T + 1)]


def at_times(schedule):
    """Every other of a schedule's times or so."""

    def steps(T):
        whole = schedule.steps(2 * T)
        return [oracles.span(whole, s, t) for s, t in itertools.pairwise([0, *some_times(T)])]

    return Schedule(
        lambda T: pyrodiff.SubSchedule(schedule.make(2 * T), some_times(T)), steps, preserving=schedule.preserving
    )


def log_snr_schedule(T=T, first=4.0, last=-3.0, hidden=6, learn_ends=True, seed=0, shaken=1.0):
    """A learned one whose parameters are far from those of the start, the ends but for that."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        schedule = pyrodiff.LearnedLogSNRSchedule(T, first, last, hidden, learn_ends)
        for parameter in (schedule.line, schedule.slopes, schedule.offsets, schedule.weights):
            parameter += shaken * torch.randn_like(parameter)
    return schedule


def log_snrs(schedule, times):
    """Of a learned one, by its network's definition."""
    first, last = float(schedule.first.detach()), float(schedule.last.detach())
    parameters = (p.tolist() for p in (schedule.line, schedule.slopes, schedule.offsets, schedule.weights))
    return oracles.monotone_log_snrs(times, schedule.num_steps, first, last, *parameters)


def of_network(**options):
    def make(T):
        return log_snr_schedule(T, **options)

    return of_betas(make, lambda T: oracles.betas_of_log_snrs(log_snrs(make(T), range(1, T + 1))))


SCHEDULES = {
    "BetaSchedule": of_betas(lambda T: pyrodiff.BetaSchedule(some_betas(T)), some_betas),
    "LinearSchedule": of_betas(
        lambda T: pyrodiff.LinearSchedule(T, *ends(T)), lambda T: oracles.linear_betas(T, *ends(T))
    ),
    "CosineSchedule": of_betas(
        lambda T: pyrodiff.CosineSchedule(T, offset=0.01, beta_max=0.98), lambda T: oracles.cosine_betas(T, 0.01, 0.98)
    ),
    "ReciprocalSchedule": of_betas(pyrodiff.ReciprocalSchedule, oracles.reciprocal_betas),
    "LogSNRSchedule": of_betas(
        lambda T: pyrodiff.LogSNRSchedule(T, 6.5, -5.0), lambda T: oracles.log_snr_betas(T, 6.5, -5.0)
    ),
    "GeometricSchedule": Schedule(
        lambda T: pyrodiff.GeometricSchedule(T, 0.3, 20.0),
        lambda T: oracles.exploding_steps(oracles.geometric_sigmas(T, 0.3, 20.0)),
        preserving=False,
    ),
    "LearnedBetaSchedule": of_betas(lambda T: pyrodiff.LearnedBetaSchedule(some_betas(T), min(1, T - 1)), some_betas),
    "LearnedLogSNRSchedule": of_network(),
    "LearnedLogSNRSchedule, ends kept": of_network(learn_ends=False, seed=1),
}
SCHEDULES |= {
    f"SubSchedule of a {name}": at_times(SCHEDULES[name])
    for name in ("LinearSchedule", "GeometricSchedule", "LearnedLogSNRSchedule")
}
LEARNED = [name for name in SCHEDULES if name.startswith("Learned")]
PRESERVING = [name for name in SCHEDULES if SCHEDULES[name].preserving]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


# Forward processes: (mean, variance) of every kernel, number by number


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian process of T steps."""

    schedule: Schedule

    draw = staticmethod(normal)

    def make(self):
        return pyrodiff.GaussianForward(self.schedule.make(T))

    def transition(self, x_s, s, t):
        gain, variance = oracles.span(self.schedule.steps(T), s, t)
        return gain * array(x_s), variance

    def posterior(self, x_t, x_0, s, t):
        """Of x_s, by conditioning one normal law on the other."""
        if s == 0:
            return array(x_0), 0.0
        steps = self.schedule.steps(T)
        gain, variance = oracles.span(steps, 0, s)
        return oracles.condition(gain * array(x_0), variance, *oracles.span(steps, s, t), array(x_t))

    def prior(self, shape, t=T):
        """Of x_t, of data of mean 0 and variance 1."""
        gain, variance = oracles.span(self.schedule.steps(T), 0, t)
        return np.zeros(shape), gain**2 + variance


@dataclass(frozen=True)
class Binomial:
    """A process of bits of T steps, with rates of each of the last dimension, or one of all."""

    schedule: Schedule
    rates: tuple

    draw = staticmethod(coins)

    def make(self):
        rate = torch.tensor(self.rates, dtype=torch.float64) if len(self.rates) > 1 else self.rates[0]
        return pyrodiff.BinomialForward(self.schedule.make(T), rate)

    def _each(self, table, *states):
        """Of each bit what the table of its rate has for its states."""
        tables = np.array([table(rate) for rate in self.rates])
        p = tables[(np.arange(len(self.rates)), *(array(x).astype(int) for x in states))]
        return p, p * (1 - p)

    def betas(self):
        return [variance for _, variance in self.schedule.steps(T)]

    def transition(self, x_s, s, t):
        betas = self.betas()
        return self._each(lambda rate: np.array(oracles.bit_matrix(betas, rate, s, t))[:, 1], x_s)

    def posterior(self, x_t, x_0, s, t):
        """Of x_s, both states weighed by the matrices."""
        if s == 0:
            return array(x_0), 0.0
        betas = self.betas()
        return self._each(
            lambda rate: [[oracles.bit_posterior(betas, rate, i, j, t, s)[1] for j in (0, 1)] for i in (0, 1)],
            x_t,
            x_0,
        )

    def prior(self, shape, t=T):
        p = np.broadcast_to(self.rates, shape)
        return p, p * (1 - p)


PROCESSES = {f"GaussianForward, {name}": Gaussian(schedule) for name, schedule in SCHEDULES.items()} | {
    "BinomialForward, reciprocal": Binomial(SCHEDULES["ReciprocalSchedule"], (0.2,)),
    "BinomialForward, betas": Binomial(SCHEDULES["BetaSchedule"], (0.5,)),
    "BinomialForward, a rate for each": Binomial(SCHEDULES["LinearSchedule"], (0.1, 0.5, 0.73)),
    "BinomialForward, at some times": Binomial(SCHEDULES["SubSchedule of a LinearSchedule"], (0.3,)),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


# Denoisers: what they make of any output of the network, and the output that is exact


@dataclass(frozen=True)
class Denoiser:
    """A denoiser of a network.

    Arguments:
        make: Makes it, of the network and the forward process.
        read: The data, of x_t, what the network returned, the signal, the noise and the number of a datum's dimensions.
        target: What the network returns where it is right, of the data, the noise in x_t, and the two.
        data: Data that it can be right about, of a shape.
        processes: The names of its processes.
        outputs: How many numbers the network returns for each of x_t's, one without a dimension of its own if None.
    """

    make: Callable
    read: Callable
    target: Callable
    data: Callable = normal
    processes: tuple = ("GaussianForward, BetaSchedule", "GaussianForward, GeometricSchedule")
    outputs: int | None = None


LEVELS = 4


def level_data(*shape):
    return pyrodiff.from_levels(torch.randint(LEVELS, shape), LEVELS, dtype=torch.float64)


def of_levels(x_t, logits, a, b, dims=1):
    """The mean of x_0 by Bayes' rule, level by level, with the weights of the network as the prior."""
    values, (x, a, b) = np.linspace(-1, 1, LEVELS), (np.asarray(one)[..., None] for one in (x_t, a, b))
    log_p = logits - (x - a * values) ** 2 / (2 * b**2)
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    return (p * values).sum(-1) / p.sum(-1)


def clipped(x_0):
    return np.clip(x_0, -1.0, 0.8)


def thresholded(x_0, dims=1):
    """Each datum by its own quantile."""
    flat = x_0.reshape(*x_0.shape[: x_0.ndim - dims], -1)
    s = np.clip(np.quantile(np.abs(flat), 0.7, axis=-1, keepdims=True), 1.0, 1.9)
    return (np.clip(flat, -s, s) / s).reshape(x_0.shape)


def within(*shape):
    """Within [-0.8, 0.8], mostly high."""
    return 0.8 * (1 - 2 * torch.rand(shape, dtype=torch.float64) ** 2)


def to_noise(x_0, eps, a, b):
    return eps


def of_noise(x_t, output, a, b, dims=1):
    return (x_t - b * output) / a


BITS = ("BinomialForward, reciprocal", "BinomialForward, a rate for each")
DENOISERS = {
    "DataPrediction": Denoiser(pyrodiff.DataPrediction, lambda x_t, f, a, b, dims: f, lambda x_0, eps, a, b: x_0),
    "NoisePrediction": Denoiser(pyrodiff.NoisePrediction, of_noise, to_noise),  # Luo Eq. 115
    "ScorePrediction": Denoiser(  # Luo Eqs. 133 and 151
        pyrodiff.ScorePrediction, lambda x_t, f, a, b, dims: (x_t + b**2 * f) / a, lambda x_0, eps, a, b: -eps / b
    ),
    "VelocityPrediction": Denoiser(
        pyrodiff.VelocityPrediction,
        lambda x_t, f, a, b, dims: (a * x_t - b * f) / (a**2 + b**2),
        lambda x_0, eps, a, b: a * eps - b * x_0,
    ),
    "LevelPrediction": Denoiser(
        lambda network, forward: pyrodiff.LevelPrediction(network, forward, LEVELS),
        of_levels,
        lambda x_0, eps, a, b: 1e4 * torch.nn.functional.one_hot(pyrodiff.to_levels(x_0, LEVELS), LEVELS).double(),
        level_data,
        outputs=LEVELS,
    ),
    "LogitPrediction": Denoiser(
        pyrodiff.LogitPrediction,
        lambda x_t, f, a, b, dims: 1 / (1 + np.exp(-f)),
        lambda x_0, eps, a, b: 2000 * x_0 - 1000,
        coins,
        processes=BITS,
    ),
    "Clipped": Denoiser(
        lambda network, forward: pyrodiff.Clipped(pyrodiff.NoisePrediction(network, forward), -1.0, 0.8),
        lambda *given: clipped(of_noise(*given)),
        to_noise,
        within,
    ),
    "Thresholded": Denoiser(
        lambda network, forward: pyrodiff.Thresholded(pyrodiff.NoisePrediction(network, forward), 0.7, 1.9),
        lambda *given: thresholded(of_noise(*given), given[-1]),
        to_noise,
        within,
    ),
}
every_denoiser = pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)


# Reverse processes: (mean, variance) of their kernels, at any x_0 that the denoiser says, between any s < t


@dataclass(frozen=True)
class Reverse:
    """A reverse process of a network, of a process and a denoiser that have entries."""

    make: Callable
    process: Gaussian | Binomial
    denoiser: Denoiser
    kernel: Callable

    def of(self, network):
        forward = self.process.make()
        return self.make(forward, self.denoiser.make(network, forward))

    def says(self, x_t, output, t):
        """The data, as the denoiser says."""
        a, b = scales(self.process, t)
        return self.denoiser.read(array(x_t), array(output), a, b, 1)


def scales(process, t):
    """Signal and noise at t, numbers or arrays."""
    gain, variance = np.array(oracles.moments(process.schedule.steps(T)), dtype=float).T
    return gain[t], np.sqrt(variance)[t]


def gaussian_kernel(process, x_t, x_0, s, t):
    """The posterior's mean, and the variance of the forward step."""
    return process.posterior(x_t, x_0, s, t)[0], process.transition(x_t, s, t)[1]


def mixture(process, x_t, p, s, t):
    """The posterior summed over both x_0, which is 1 with probability p."""
    one, zero = (process.posterior(x_t, np.full(p.shape, x_0), s, t)[0] for x_0 in (1, 0))
    found = p * one + (1 - p) * zero
    return found, found * (1 - found)


def joint(process, x_t, p, s, t):
    """Austin et al., Eq. 4: the sum over x_0 of q(x_s, x_t | x_0) p(x_0), normalised over x_s."""
    if s == 0:
        return p, p * (1 - p)
    weights = []
    for x_s in (0, 1):
        after = process.transition(np.full(p.shape, x_s), s, t)[0]
        after = np.where(array(x_t) == 1, after, 1 - after)
        one, zero = (process.transition(np.full(p.shape, x_0), 0, s)[0] for x_0 in (1, 0))
        before = p * one + (1 - p) * zero
        weights.append(after * (before if x_s else 1 - before))
    found = weights[1] / (weights[0] + weights[1])
    return found, found * (1 - found)


class Table(nn.Module):
    """Log odds of a few bits of the data, a number for every state and time; it counts its calls."""

    def __init__(self, num_steps, bits):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        logits = 1.5 * torch.randn(num_steps + 1, 2**bits, bits, dtype=torch.float64, generator=generator)
        self.logits, self.calls = nn.Parameter(logits), 0

    def forward(self, x_t, t):
        self.calls += 1
        return self.logits[t, (x_t * 2 ** torch.arange(x_t.shape[-1], dtype=x_t.dtype)).sum(-1).long()]

    def believes(self, t):
        """The probabilities of a 1 in each bit of the data, for each of ``all_states``."""
        bits = self.logits.shape[-1]
        return 1 / (1 + np.exp(-array(self.logits)[t, all_states(bits) @ 2 ** np.arange(bits)]))


def all_states(bits):
    return np.array(list(itertools.product((0, 1), repeat=bits)))


def chances(ones):
    """Of rows with a probability of a 1 for each bit, those of all states, with a column for each."""
    x = all_states(ones.shape[-1])
    return np.where(x == 1, ones[:, None], 1 - ones[:, None]).prod(-1)


class Enumerated:
    """What the steps of a chain of bits cost a datum x_0, and the law that it generates, summed over all states.

    Arguments:
        betas: Of the whole chain.
        rate: The stationary rate.
        kernel: ``mixture`` or ``joint``.
        believes: The probabilities of a 1 in each bit of the data, of a time, with a row for each state.
    """

    def __init__(self, betas, rate, kernel, believes, bits=2):
        self.process = Binomial(of_betas(None, lambda T: betas), (rate,))
        self.kernel, self.believes, self.x, self.rate = kernel, believes, all_states(bits), np.full((1, bits), rate)

    def step(self, s, t):
        """p(x_s | x_t), with a row for each x_t and a column for each x_s."""
        return chances(self.kernel(self.process, self.x, self.believes(t), s, t)[0])

    def cost(self, x_0, s, t):
        """L of the step from t to s; L_0 at s = 0."""
        x_0 = np.broadcast_to(x_0, self.x.shape)
        at_t = chances(self.process.transition(x_0[:1], 0, t)[0])[0]
        q, p = chances(self.process.posterior(self.x, x_0, s, t)[0]), self.step(s, t)
        return float(at_t @ (q * np.log(np.where(q > 0, q, 1) / p)).sum(-1))

    def last(self, x_0, t):
        """L_T of a chain that ends at t."""
        q, p = chances(self.process.transition(np.array([x_0]), 0, t)[0])[0], chances(self.rate)[0]
        return float(q @ np.log(q / p))

    def likelihood(self, times):
        """p(x_0) of all states: the prior and the steps, multiplied."""
        p = chances(self.rate)[0]
        for s, t in reversed(list(itertools.pairwise((0, *times)))):
            p = p @ self.step(s, t)
        return p


REVERSES = {
    f"GaussianReverse, {name}, {process.split()[1]}": Reverse(
        pyrodiff.GaussianReverse, PROCESSES[process], denoiser, gaussian_kernel
    )
    for name, denoiser in DENOISERS.items()
    for process in denoiser.processes
    if process.startswith("Gaussian")
} | {
    f"{kind.__name__}, {name.split(', ')[1]}": Reverse(kind, process, DENOISERS["LogitPrediction"], kernel)
    for kind, kernel in ((pyrodiff.BinomialReverse, mixture), (pyrodiff.D3PMReverse, joint))
    for name, process in PROCESSES.items()
    if name.startswith("Binomial")
}
every_reverse = pytest.mark.parametrize("reverse", REVERSES.values(), ids=REVERSES)


# Variances: those of the steps between the kept times, from the steps of the whole chain


@dataclass(frozen=True)
class Variance:
    """A variance for a chain of given steps.

    Arguments:
        make: Makes it, of the (gain, variance) of all steps.
        of: Its numbers, of these, the times that are kept, and what a network says, with a row for each time.
        learned: Whether a network says something.
    """

    make: Callable
    of: Callable
    learned: bool = False

    def expected(self, steps, times, *v):
        return np.array(self.of(steps, times, *(array(one) for one in v)))

    def says(self, number):
        """What a network says at so many times, of two numbers a state."""
        return (torch.tensor([[1.5 * math.sin(3 * k + d) for d in (0, 1)] for k in range(number)]).double(),)[
            : self.learned
        ]


def given(numbers, of):
    """A FixedVariance of numbers; the step from t = 1 to the data, which is in both chains, keeps its own."""

    def kept(steps, times):
        whole = numbers(steps, range(1, len(steps) + 1))
        found = list(of(steps, times))
        return [whole[0], *found[1:]] if times[0] == 1 else found

    return Variance(lambda steps: pyrodiff.FixedVariance(numbers(steps, range(1, len(steps) + 1))), kept)


def best(v):
    return lambda steps, times: oracles.best_variances(steps, times, v)


def ratio(part):
    return lambda steps, times: [part * one for one in oracles.posterior_variances(steps, times)]


def large(steps, times):
    forward = oracles.forward_variances(steps, times)
    return [oracles.posterior_variances(steps, times)[0], *forward[1:]]


def analytic(steps):
    errors = [oracles.condition(0.0, 0.4, *oracles.span(steps, 0, t), 0.0)[1] for t in range(1, len(steps) + 1)]
    return pyrodiff.AnalyticVariance(errors)


def in_range(steps, times, v):
    low, high = (np.log(one(steps, times))[:, None] for one in (oracles.posterior_variances, oracles.forward_variances))
    return np.exp((1 + v) / 2 * high + (1 - v) / 2 * low)


def diagonal(steps, times, v):
    found = []
    for s, t, one in zip((0, *times[:-1]), times, v, strict=True):
        gain, noise = oracles.span(steps, 0, t)
        narrow = oracles.posterior_variances(steps, (s, t))[1] if s else 0.0
        found.append(narrow + oracles.weight_of_data(steps, s, t) ** 2 * noise / (gain**2 + noise) * np.exp(one))
    return found


VARIANCES = {
    "ForwardVariance": Variance(lambda steps: pyrodiff.ForwardVariance(), oracles.forward_variances),
    "PosteriorVariance": Variance(lambda steps: pyrodiff.PosteriorVariance(), oracles.posterior_variances),
    "FixedLargeVariance": Variance(lambda steps: pyrodiff.FixedLargeVariance(), large),
    "FixedVariance, the betas": given(oracles.forward_variances, oracles.forward_variances),
    "FixedVariance, of the posterior": given(oracles.posterior_variances, oracles.posterior_variances),
    **{f"FixedVariance, the best of N(m, {v:g})": given(best(v), best(v)) for v in (1e-3, 0.3, 1.0, 4.0, 300.0)},
    **{f"FixedVariance, {part:g} of the posterior's": given(ratio(part), ratio(part)) for part in (0.3, 1e-6)},
    "AnalyticVariance": Variance(analytic, best(0.4)),
    "AnalyticVariance, of a least": Variance(
        lambda steps: pyrodiff.AnalyticVariance(analytic(steps).errors, least=0.3),
        lambda steps, times: [max(0.3, best(0.4)(steps, times)[0]), *best(0.4)(steps, times)[1:]],
    ),
    "RangeVariance": Variance(lambda steps: pyrodiff.RangeVariance(), in_range, learned=True),
    "DiagonalVariance": Variance(lambda steps: pyrodiff.DiagonalVariance(), diagonal, learned=True),
}
every_variance = pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES)


# Decoders: the log probability of each number, given the kernel's mean and deviation, and x_1


@dataclass(frozen=True)
class Decoder:
    """A decoder of a forward process, and log p(x_0 | x_1) of x_0, the kernel's mean and deviation, and x_1."""

    make: Callable
    log_prob: Callable
    process: Gaussian | Binomial = PROCESSES["GaussianForward, BetaSchedule"]
    levels: int | None = None

    def kernel(self, x_1, event=1):
        """A kernel with numbers of its own, so many dimensions of which are its event's."""
        if isinstance(self.process, Binomial):
            return dist.Bernoulli(0.2 + 0.5 * x_1).to_event(event)
        return dist.Normal(0.8 * x_1 - 0.1, (0.05 + x_1.abs()) / 3).to_event(event)


def of_step(process, x_0, mean, deviation, x_1, t=1):
    """The first step, turned round."""
    mean, variance = process.transition(x_1, 0, t)
    if isinstance(process, Binomial):
        return np.log(np.where(array(x_0) == 1, mean, 1 - mean))
    return oracles.log_normal(array(x_0), mean, variance)


def of_mass(process, x_0, mean, deviation, x_1, t=1, levels=17):
    return np.log(at_level(oracles.masses(mean, deviation, levels), x_0))


def of_softmax(process, x_0, mean, deviation, x_1, t=1, levels=17):
    gain, variance = oracles.span(process.schedule.steps(T), 0, t)
    return np.log(at_level(oracles.softmax(x_1, gain, variance, levels), x_0))


def at_level(p, x_0):
    k = np.rint((array(x_0) + 1) * (p.shape[-1] - 1) / 2).astype(int)
    return np.take_along_axis(p, k[..., None], -1)[..., 0]


DECODERS = {
    "GaussianDecoder": Decoder(
        lambda forward: pyrodiff.GaussianDecoder(),
        lambda process, x_0, mean, deviation, x_1, t=1: oracles.log_normal(array(x_0), mean, deviation**2),
    ),
    "TransitionDecoder": Decoder(pyrodiff.TransitionDecoder, of_step),
    "TransitionDecoder, exploding": Decoder(
        pyrodiff.TransitionDecoder, of_step, PROCESSES["GaussianForward, GeometricSchedule"]
    ),
    "TransitionDecoder, bits": Decoder(pyrodiff.TransitionDecoder, of_step, PROCESSES["BinomialForward, betas"]),
    "DiscretizedDecoder": Decoder(lambda forward: pyrodiff.DiscretizedDecoder(17), of_mass, levels=17),
    "SoftmaxDecoder": Decoder(lambda forward: pyrodiff.SoftmaxDecoder(forward, 17), of_softmax, levels=17),
    "SoftmaxDecoder, exploding": Decoder(
        lambda forward: pyrodiff.SoftmaxDecoder(forward, 17),
        of_softmax,
        PROCESSES["GaussianForward, GeometricSchedule"],
        levels=17,
    ),
}
every_decoder = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
