"""One small model of every kind, each twice: as it is, and another of the same shapes with other numbers in it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyrodiff

T, TIMES, LEVELS, SIZE = 3, (1, 3, 4), 5, 2


class Network(nn.Module):
    """A linear layer that is told the time; a buffer multiplies what it returns, of each number so many outputs."""

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.layer, self.outputs = nn.Linear(SIZE + 1, SIZE * (outputs or 1)), outputs
        self.register_buffer("gain", 0.5 + torch.rand(()))

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[:-1])
        found = self.gain * self.layer(torch.cat([x_t, t[..., None].to(x_t.dtype) / T], -1))
        return found if self.outputs is None else found.unflatten(-1, (SIZE, self.outputs))


SCHEDULES = {  # name: the schedule of so many steps, with numbers so much larger
    "linear": lambda T, k: pyrodiff.LinearSchedule(T, 0.02 * k, 0.4 * k),
    "cosine": lambda T, k: pyrodiff.CosineSchedule(T, 0.01 * k, 0.9),
    "reciprocal": lambda T, k: (
        pyrodiff.ReciprocalSchedule(T)
        if k == 1
        else pyrodiff.BetaSchedule([(t / T) ** 2 for t in range(1, T + 1)])  # another with no signal left
    ),
    "geometric": lambda T, k: pyrodiff.GeometricSchedule(T, 0.1 * k, 8.0 * k),
    "log SNR": lambda T, k: pyrodiff.LogSNRSchedule(T, 4.0 * k, -4.0 * k),
    "beta": lambda T, k: pyrodiff.BetaSchedule([0.1 * k + 0.1 * (t % 3) for t in range(T)]),
}
VARIANCES = {
    "forward": lambda T, k: pyrodiff.ForwardVariance(),
    "posterior": lambda T, k: pyrodiff.PosteriorVariance(),
    "fixed large": lambda T, k: pyrodiff.FixedLargeVariance(),
    "fixed": lambda T, k: pyrodiff.FixedVariance([0.1 * k * t for t in range(1, T + 1)]),
}
DENOISERS = {
    "data": pyrodiff.DataPrediction,
    "noise": pyrodiff.NoisePrediction,
    "score": pyrodiff.ScorePrediction,
    "velocity": pyrodiff.VelocityPrediction,
    "levels": lambda network, forward: pyrodiff.LevelPrediction(Network(LEVELS), forward, LEVELS),
    "network": lambda network, forward: network,
    "MLP": lambda network, forward: pyrodiff.NoisePrediction(
        pyrodiff.networks.MLP((SIZE,), hidden=8, num_blocks=1), forward
    ),
}
DECODERS = {
    "kernel": lambda forward: None,
    "transition": pyrodiff.TransitionDecoder,
    "discretized": lambda forward: pyrodiff.DiscretizedDecoder(LEVELS),
    "softmax": lambda forward: pyrodiff.SoftmaxDecoder(forward, LEVELS),
}
BIT_REVERSES = {"binomial": pyrodiff.BinomialReverse, "D3PM": pyrodiff.D3PMReverse}


def gaussian(
    k: float,
    schedule: str = "linear",
    denoiser: str = "noise",
    variance: str = "forward",
    decoder: str = "kernel",
    cut: bool = False,
) -> pyrodiff.Diffusion:
    """A Gaussian diffusion of T steps, or one of more, cut to T."""
    steps = max(TIMES) if cut else T
    forward = pyrodiff.GaussianForward(SCHEDULES[schedule](steps, k))
    reverse = pyrodiff.GaussianReverse(forward, DENOISERS[denoiser](Network(), forward), VARIANCES[variance](steps, k))
    whole = pyrodiff.Diffusion(forward, reverse, (SIZE,), decoder=DECODERS[decoder](forward))
    return whole.subchain(TIMES) if cut else whole


def bits(k: float, reverse: str = "binomial", schedule: str = "reciprocal", cut: bool = False) -> pyrodiff.Diffusion:
    """A binomial diffusion of T steps, or one of more, cut to T."""
    steps = max(TIMES) if cut else T
    forward = pyrodiff.BinomialForward(SCHEDULES[schedule](steps, k), rate=torch.tensor([0.2 * k, 0.6]))
    denoiser = pyrodiff.LogitPrediction(Network(), forward)
    whole = pyrodiff.Diffusion(forward, BIT_REVERSES[reverse](forward, denoiser), (SIZE,))
    return whole.subchain(TIMES) if cut else whole


def second_moment(k: float) -> pyrodiff.LossSecondMoment:
    """A drawing that has learned."""
    drawing = pyrodiff.LossSecondMoment(T, history=2)
    t = torch.arange(1, T + 1, device=drawing.costs.device).repeat(2)
    drawing.tell(t, k * t.float() ** k, torch.ones_like(t, dtype=torch.bool))
    return drawing


DRAWINGS = {
    "uniform": lambda k: pyrodiff.UniformDrawing(),
    "low discrepancy": lambda k: pyrodiff.LowDiscrepancyDrawing(),
    "importance": lambda k: pyrodiff.ImportanceDrawing([0.1 * k, 0.3, 0.7 - 0.1 * k]),
    "second moment": second_moment,
}


@dataclass(frozen=True)
class Kind:
    """What a model is made of: called with a factor of its numbers, ``make`` gives the diffusion.

    Arguments:
        make: Makes the diffusion.
        drawing: The name of the drawing of the pair that is trained; the trajectory pair if empty.
        simple: Whether the one-step pair has the simple weighting.
        options: What ``make`` is called with besides.
    """

    make: Callable[..., pyrodiff.Diffusion]
    drawing: str = ""
    simple: bool = False
    options: tuple[tuple[str, object], ...] = ()

    def pair(self, other: bool = False) -> tuple[pyrodiff.Diffusion, pyrodiff.Diffusion | pyrodiff.OneStep]:
        """The diffusion, and the pair of it that is trained; another with the same shapes if so asked."""
        k = 1.2 if other else 1.0
        with torch.random.fork_rng([]):
            torch.manual_seed(12 if other else 10)
            diffusion = self.make(k, **dict(self.options))
            if not self.drawing:
                return diffusion, diffusion
            weighting = pyrodiff.SimpleWeighting(diffusion.reverse) if self.simple else None
            return diffusion, diffusion.one_step(DRAWINGS[self.drawing](k), weighting)

    @property
    def is_of_bits(self) -> bool:
        return self.make is bits

    @property
    def has_flow(self) -> bool:
        """Whether the probability flow is there: Gaussian, with signal at the end."""
        return self.make is gaussian and dict(self.options).get("schedule") != "reciprocal"

    def data(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Three data."""
        if self.is_of_bits:
            return torch.tensor([[0, 1], [1, 1], [0, 0]]).to(dtype)
        return pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1], [2, 4]]), levels=LEVELS, dtype=dtype)


def _kind(make: Callable, drawing: str = "", simple: bool = False, **options: object) -> Kind:
    return Kind(make, drawing, simple, tuple(options.items()))


KINDS = {  # every schedule, variance, denoiser, decoder, kernel of bits and drawing is a part of one of them at least
    "linear schedule": _kind(gaussian, denoiser="velocity"),
    "reciprocal schedule": _kind(gaussian, schedule="reciprocal", denoiser="velocity", variance="posterior"),
    "fixed variance of a sub-chain": _kind(gaussian, variance="fixed", decoder="transition", cut=True),
    "MLP prediction": _kind(gaussian, "low discrepancy", denoiser="MLP"),
    "levels, discretized": _kind(gaussian, "uniform", denoiser="levels", decoder="discretized"),
    "levels, softmax": _kind(gaussian, denoiser="levels", decoder="softmax", schedule="log SNR"),
    "transition decoder": _kind(gaussian, "low discrepancy", decoder="transition", schedule="geometric"),
    "bits": _kind(bits, "low discrepancy"),
    "bits, D3PM": _kind(bits, reverse="D3PM"),
    "bits of a sub-chain": _kind(bits, "uniform", cut=True),
    "importance drawing": _kind(gaussian, "importance", schedule="cosine", denoiser="score"),
    "second moment drawing": _kind(
        gaussian, "second moment", schedule="beta", denoiser="network", variance="fixed large"
    ),
    "simple weighting": _kind(gaussian, "uniform", simple=True, denoiser="data", variance="posterior"),
    "simple weighting, drawn by importance": _kind(gaussian, "importance", simple=True, variance="fixed"),
    "simple weighting of a sub-chain": _kind(gaussian, "second moment", simple=True, cut=True),
}


def prior_of_weights(diffusion):
    """The guide that draws the random weights of a diffusion from their prior, said aloud."""

    def guide(*args):
        with diffusion.model.running():
            pass

    return guide
