"""Diffusions that are known in closed form, and the judgement of random numbers by their standard error."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyrodiff


def far(draws: Tensor, expected: Tensor | float, errors: float = 5.0) -> bool:
    """Whether the mean of ``draws`` over the first dimension is, anywhere, 5 standard errors off."""
    error = draws.std(0) / len(draws) ** 0.5
    return bool(((draws.mean(0) - expected).abs() > errors * error + 1e-10).any())


def repeat(number: int, draw: Callable[[], Tensor | float]) -> Tensor:
    """So many draws, stacked in float64."""
    return torch.stack([torch.as_tensor(draw(), dtype=torch.float64).detach() for _ in range(number)])


def differ(ours: Tensor, theirs: Tensor, rounding: float = 1e-10) -> bool:
    """Whether the means of two samples are, anywhere, 5 standard errors apart."""
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    return bool(((ours.mean(0) - theirs.mean(0)).abs() > 5 * error + rounding).any())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, Pyro, and this package, may say what they like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def side_by_side(number: int, *programs: Callable) -> list[Callable]:
    """The programs, each run so often at once: in a plate around all their sites, which makes draws of each run.

    A loss is then the sum of so many, for the time that Python takes for one.
    """

    def many(program: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            with pyro.plate("num_particles_vectorized", number, dim=-4):  # as Pyro calls its own
                return program(*args, **kwargs)

        return run

    return [many(program) for program in programs]


def of_each(terms: dict[str, Tensor], number: int) -> Tensor:
    """The losses of runs side by side, from the terms of all sites."""
    return sum(term.detach().double().reshape(number, -1).sum(1) for term in terms.values())


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """The gradient of the loss in all parameters of the module, as one vector."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


class Gaussian(nn.Module):
    """N(m, v), a number of the data by itself, diffused: the law of x_0, and q(x_T) as a prior."""

    def __init__(self, m: Tensor, v: Tensor, schedule: pyrodiff.Schedule) -> None:
        super().__init__()
        self.m, self.v, self.schedule = nn.Parameter(m.clone()), nn.Parameter(v.clone()), schedule

    def moments(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_t)."""
        a, b = self.coefficients(t)
        return a * self.m, a**2 * self.v + b**2

    def coefficients(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.schedule.signal(t), self.schedule.noise(t)
        shape = a.shape + (1,) * (self.m.dim() if a.dim() else 0)
        return a.reshape(shape).to(self.m.dtype), b.reshape(shape).to(self.m.dtype)

    def law(self, t: int) -> dist.Distribution:
        mean, variance = self.moments(t)
        return dist.Normal(mean, variance.sqrt()).to_event(self.m.dim())

    def forward(self) -> dist.Distribution:
        return self.law(self.schedule.num_steps)


class GaussianPosterior(nn.Module):
    """p(x_{t-1} | x_t) of N(m, v): the joint of (x_{t-1}, x_t), conditioned; then shifted and widened if asked."""

    def __init__(self, data: Gaussian, shift: float = 0.0, widen: float = 1.0) -> None:
        super().__init__()
        self.data, self.shift, self.widen = data, shift, widen

    def moments(self, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        (a_s, b_s), (a_t, b_t) = self.data.coefficients(t - 1), self.data.coefficients(t)
        (mean_s, var_s), (mean_t, var_t) = self.data.moments(t - 1), self.data.moments(t)
        step = a_t / a_s
        mean = mean_s + step * var_s / var_t * (x_t - mean_t)
        return mean, var_s * (b_t**2 - step**2 * b_s**2) / var_t

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        mean, variance = self.moments(x_t, t)
        scale = (variance.sqrt() * self.widen).expand(mean.shape)
        return dist.Normal(mean + self.shift * scale, scale).to_event(self.data.m.dim())


def gaussian_diffusion(
    schedule: pyrodiff.Schedule, m: Tensor, v: Tensor, shift: float = 0.0, widen: float = 1.0
) -> pyrodiff.Diffusion:
    """The diffusion whose p(x_0) is N(m, v), and whose gap is 0 unless its kernels are shifted or widened."""
    data = Gaussian(m, v, schedule)
    forward = pyrodiff.GaussianForward(schedule)
    return pyrodiff.Diffusion(forward, GaussianPosterior(data, shift, widen), event_shape=m.shape, prior=data)


class ShiftedGaussian(nn.Module):
    """p(x_{t-1} | x_t, y) of data N(mean + y, variance), with y as context; exact where x_T is noise alone."""

    def __init__(self, schedule: pyrodiff.Schedule, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.schedule, self.m, self.variance = schedule, nn.Parameter(mean.clone()), variance

    def moments(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The signal and the noise at t, and the mean and the variance of x_t."""
        a, b = (c.reshape(-1, 1) for c in (self.schedule.signal(t), self.schedule.noise(t)))
        return a, b, a * (self.m + y), a**2 * self.variance + b**2

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> dist.TorchDistribution:
        (a_s, b_s, mean_s, var_s), (a_t, b_t, mean_t, var_t) = self.moments(t - 1, y), self.moments(t, y)
        step = a_t / a_s
        mean = mean_s + step * var_s / var_t * (x_t - mean_t)
        return dist.Normal(mean, (var_s * (b_t**2 - step**2 * b_s**2) / var_t).sqrt()).to_event(1)


class EightGaussians(nn.Module):
    """E[x_0 | x_t] of eight Gaussians, in closed form."""

    def __init__(self, schedule):
        super().__init__()
        angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
        self.schedule = schedule
        self.centers = 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
        self.variance = 0.125

    def log_density(self, x):
        squares = ((x[:, None] - self.centers) ** 2).sum(-1)
        return torch.logsumexp(-squares / 2 / self.variance, -1) - math.log(8 * 2 * math.pi * self.variance)

    def forward(self, x_t, t):
        a, b = self.schedule.signal(t), self.schedule.noise(t)
        a, b = (c.reshape(-1, 1, 1).expand(len(x_t), 1, 1) for c in (a, b))
        total = a**2 * self.variance + b**2
        off = x_t[:, None] - a * self.centers
        weights = torch.softmax(-(off**2).sum(-1) / 2 / total[..., 0], -1)
        return (weights[..., None] * (self.centers + a * self.variance / total * off)).sum(1)

    def law(self, t):
        """q(x_t)."""
        a, b = self.schedule.signal(t), self.schedule.noise(t)
        scale = (a**2 * self.variance + b**2).sqrt().expand(8, 2)
        law = torch.distributions.Independent(torch.distributions.Normal(a * self.centers, scale), 1)
        even = torch.distributions.Categorical(torch.ones(8, dtype=torch.float64))
        return torch.distributions.MixtureSameFamily(even, law)


class Drift(PyroModule):
    """A kernel with a random weight, and a record of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0))
        self.seen = []

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        self.seen.append(float(self.weight))
        return dist.Normal(x_t * self.weight, 1.0).to_event(1)


class BitTable(nn.Module):
    """p(x_{t-1} | x_t) of a few bits as a table of log odds, with shape (T + 1, 2^bits, bits)."""

    def __init__(self, num_steps: int, bits: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_steps + 1, 2**bits, bits, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        row = (x_t * 2 ** torch.arange(x_t.shape[-1], dtype=x_t.dtype)).sum(-1).long()
        return dist.Bernoulli(logits=self.logits[t, row]).to_event(1)


def bit_diffusion(betas: list[float], rate: float, bits: int) -> pyrodiff.Diffusion:
    """A short binomial chain with a table as its reverse process."""
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate=rate)
    return pyrodiff.Diffusion(forward, BitTable(len(betas), bits), event_shape=(bits,))
