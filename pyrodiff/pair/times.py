r"""The steps of the one-step pair: how t is drawn, and how the step is weighted.

The bound is a sum over t. To draw one t per datum with probability p(t) and scale its term by 1 / p(t) leaves the
expectation as it is. A *drawing* defines p and how the draws of a batch are correlated: it turns auxiliary uniform
variables u into times. A *weighting* is a function w(t) > 0 that multiplies the term: 1 for the bound.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1: the low-discrepancy drawing,
    https://arxiv.org/abs/2107.00630

    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eq. 14: the simple loss,
    https://arxiv.org/abs/2006.11239
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import Float64Module, default_home, float64
from ..model.reverse import GaussianReverse
from ..model.variances import LearnedVariance
from ..process.forward import GaussianForward
from ..process.quantization import Shape
from ..process.schedules import Schedule

__all__ = [
    "BoundWeighting",
    "Drawing",
    "HybridWeighting",
    "ImportanceDrawing",
    "LossSecondMoment",
    "LowDiscrepancyDrawing",
    "NoiseWeighting",
    "ScoreWeighting",
    "SimpleWeighting",
    "UniformDrawing",
]


class Drawing(Float64Module, ABC):
    """How one t per datum is drawn: a distribution of u in [0, 1), and a map from u to t and its probability.

    Attributes:
        share: Which of several processes, with a batch each, this is; None if it is the only one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share: _Share | None = None

    def spread(self, number: int, count: int, key: int, device: torch.device | None = None) -> None:
        """Draw for one of several processes, so that draws are spread over their batches together.

        Arguments:
            number: Which process this is, in 0..count-1.
            count: How many there are.
            key: The seed of the draws that they share, the same number in all.
            device: Where the times are drawn.
        """
        self.share = _Share(number, count, key, device)

    @abstractmethod
    def uniforms(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution of the auxiliary u, each uniform on [0, 1), with the batch_shape (B,) of ``like``."""

    @abstractmethod
    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """The times and their probabilities p(t).

        Arguments:
            u: The auxiliary variables, of any shape (*).
            num_steps: The number of steps T.

        Returns:
            Integers in 1..T and probabilities, both with shape (*).
        """

    def tell(self, t: Tensor, cost: Tensor, scored: Tensor) -> None:
        """Called with the costs of the steps, from which a drawing may learn.

        :class:`DiffusionELBO` calls it at each evaluation of the one-step pair with gradients; Pyro's own ELBOs never
        do.

        Arguments:
            t: The times, of any shape (*).
            cost: The costs of the steps in nats, unweighted, with shape (*).
            scored: Which of the costs count, with shape (*).
        """


def _equal_parts(u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    num_steps = int(num_steps)
    t = (u * num_steps).long().clamp(max=num_steps - 1) + 1
    return t, torch.full((), 1 / num_steps, dtype=u.dtype, device=u.device).expand(t.shape)


class UniformDrawing(Drawing):
    """Every t with probability 1 / T, independently for each datum.

    Example:
        >>> pyrodiff.UniformDrawing()(torch.tensor([0.0, 0.3, 0.99]), num_steps=10)
        (tensor([ 1,  4, 10]), tensor([0.1000, 0.1000, 0.1000]))
    """

    def uniforms(self, like: Tensor) -> dist.TorchDistribution:
        return dist.Uniform(like.new_zeros(()), like.new_ones(())).expand(like.shape)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return _equal_parts(u, num_steps)


class LowDiscrepancyDrawing(Drawing):
    """Every t with probability 1 / T, spread evenly over the batch: one draw for all data, shifted by 1 / B.

    A batch of at least T data then sees every t. Where the terms change slowly with t, the estimate of the bound has
    less variance than with uniform draws.

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendix I.1.

    Example:
        >>> drawing = pyrodiff.LowDiscrepancyDrawing()
        >>> u = drawing.uniforms(torch.zeros(10)).sample()
        >>> drawing(u, num_steps=10)[0].sort().values
        tensor([ 1,  2,  3,  4,  5,  6,  7,  8,  9, 10])
    """

    def uniforms(self, like: Tensor) -> dist.TorchDistribution:
        return _SpreadUniform(like, self.share)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return _equal_parts(u, num_steps)


class ImportanceDrawing(Drawing):
    r"""Given probabilities of the times, spread evenly over the batch.

    Of independent draws, those with p(t) proportional to the root of :math:`\mathbb{E}[L_{t-1}^2]` estimate the bound
    with the least variance (:meth:`of`, which mixes in a uniform part). Spreading them helps where the costs change
    slowly with t.

    Arguments:
        probabilities: T positive numbers that add up to 1.

    Raises:
        ValueError: If they are not; on a call, if there are not T of them.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), Eq. 18,
        https://arxiv.org/abs/2102.09672

    Example:
        >>> drawing = pyrodiff.ImportanceDrawing([0.5, 0.2, 0.3])
        >>> drawing(torch.tensor([0.1, 0.6, 0.99]), num_steps=3)
        (tensor([1, 2, 3]), tensor([0.5000, 0.2000, 0.3000]))
    """

    probabilities: Tensor

    def __init__(self, probabilities: Sequence[float] | Tensor) -> None:
        super().__init__()
        p = checks.numbers("probabilities", probabilities)
        if p.dim() != 1 or len(p) == 0 or not checks.holds((p > 0) & p.isfinite() & ((p.sum() - 1).abs() <= 1e-6)):
            raise ArgumentError(
                "probabilities", f"must be positive numbers that add up to 1, but they are {p.tolist()}"
            )
        self.register_buffer("probabilities", p / p.sum())

    @classmethod
    def of(cls, second_moments: Tensor, uniform: float = 0.1) -> "ImportanceDrawing":
        r"""The drawing of least variance, given :math:`\mathbb{E}[L_{t-1}^2]` at each time.

        Arguments:
            second_moments: T numbers, not negative and not all 0, of the costs for the least variance of the value, or
                of the norms of their gradients for the least variance of the gradient
                (:func:`variance_account` measures both).
            uniform: The part of the probability that is uniform over all times, in (0, 1), so that none is left out.

        Raises:
            ValueError: If an argument is none of that.
        """
        moments = checks.numbers("second_moments", second_moments)
        uniform = arguments.number("uniform", uniform, 0, 1)
        if moments.dim() != 1 or not ((moments >= 0) & moments.isfinite()).all() or not (moments > 0).any():
            raise ArgumentError(
                "second_moments", f"must be numbers of at least 0, not all 0, but they are {moments.tolist()}"
            )
        return cls(_least_variance(moments, uniform))

    def uniforms(self, like: Tensor) -> dist.TorchDistribution:
        return _SpreadUniform(like, self.share)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return _by_probability(u, self.probabilities, num_steps)


class LossSecondMoment(Drawing):
    r"""p(t) proportional to the root mean square of the last costs at t, learned during training.

    Uniform until every t has been drawn ``history`` times; then it follows the costs as they fall. Its state, the last
    costs of each t, is in its ``state_dict``. Draws are spread evenly over the batch. It learns under
    :class:`DiffusionELBO` only.

    Ten costs are few where most are nearly 0 and some are large: times whose large costs were missed are drawn too
    seldom and weighted too much. The uniform part bounds that weight; where :func:`variance_account` shows a variance
    above that of uniform draws, a longer history or a larger uniform part helps.

    Arguments:
        num_steps: The number of steps T.
        history: The number of costs kept per t.
        uniform: The part of the probability that is uniform over all times, in (0, 1): a t has at most 1 / uniform
            times the weight that it has under uniform draws. The paper has 0.001.

    Raises:
        ValueError: If an argument is out of range; on a call, if T is another.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), Eq. 18, with 10 costs,
        https://arxiv.org/abs/2102.09672

    Example:
        >>> drawing = pyrodiff.LossSecondMoment(num_steps=2, history=1)
        >>> drawing.tell(torch.tensor([1, 2]), torch.tensor([3.0, 1.0]), torch.tensor([True, True]))
        >>> drawing(torch.tensor([0.5, 0.9]), num_steps=2)
        (tensor([1, 2]), tensor([0.7250, 0.2750]))
    """

    costs: Tensor
    counts: Tensor

    def __init__(self, num_steps: int, history: int = 10, uniform: float = 0.1) -> None:
        super().__init__()
        num_steps, history = arguments.positive_int("num_steps", num_steps), arguments.positive_int("history", history)
        self.uniform, device = arguments.number("uniform", uniform, 0, 1), default_home()
        self.register_buffer("costs", torch.zeros(num_steps, history, dtype=torch.float64, device=device))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.long, device=device))

    @property
    def probabilities(self) -> Tensor:
        """p(t) for t = 1..T, in float64 with shape (T,)."""
        known = (self.counts >= self.costs.shape[1]).all() & (self.costs != 0).any()
        largest = self.costs.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # so that no square overflows
        moments = torch.where(known, ((self.costs / largest) ** 2).mean(1), 1.0)
        return _least_variance(moments, self.uniform)

    def uniforms(self, like: Tensor) -> dist.TorchDistribution:
        return _SpreadUniform(like, self.share)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return _by_probability(u, self.probabilities, num_steps)

    @torch.no_grad()
    def tell(self, t: Tensor, cost: Tensor, scored: Tensor) -> None:
        """Keep the last costs of each t. Row t - 1 of the table is a ring: the n-th cost ever is in column n % history.

        No value is read from the device: so what does not count is not left out, but goes to an extra row T.
        """
        (T, history), device = self.costs.shape, self.costs.device
        row, cost = (t - 1).flatten().to(device), cost.detach().flatten().to(device).double()
        row = torch.where(scored.flatten().to(device) & cost.isfinite(), row, T)
        order = row.argsort(stable=True)
        row, cost = row[order], cost[order]
        nth = torch.arange(len(row), device=device) - torch.searchsorted(row, row)  # of its t in this batch, from 0 on
        new = torch.zeros(T + 1, dtype=torch.long, device=device).index_add_(0, row, torch.ones_like(row))
        column = (torch.cat([self.counts, new.new_zeros(1)])[row] + nth) % history
        row = torch.where(nth < new[row] - history, T, row)  # more than a ring holds: the last stay
        table = torch.cat([self.costs, self.costs.new_zeros(1, history)])
        table[row, column] = cost
        self.costs.copy_(table[:T])
        self.counts.add_(new[:T])


def _least_variance(moments: Tensor, uniform: float) -> Tensor:
    weights = moments.sqrt()
    return (1 - uniform) * weights / weights.sum() + uniform / len(moments)


def _by_probability(u: Tensor, probabilities: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """The inverse of the cumulative probability at u."""
    if len(probabilities) != num_steps:
        raise ArgumentError("drawing", f"must be one of T = {num_steps} times, but it is one of {len(probabilities)}")
    ends = probabilities.cumsum(0)
    index = torch.searchsorted(ends, float64(u).contiguous(), right=True).clamp(max=num_steps - 1)
    return index + 1, probabilities[index].to(u.dtype)


class _Share:
    """Uniform numbers that all processes share without communication: hashes of a key and a counter."""

    def __init__(self, number: int, count: int, key: int, device: torch.device | None = None) -> None:
        self.number, self.count, self.key = number, count, key
        self.drawn = torch.zeros((), dtype=torch.long, device=device)

    def uniform(self) -> Tensor:
        """The next one, in float64: a multiple of 2^-32."""
        x = (self.drawn * 0x9E3779B9 + self.key) & 0xFFFFFFFF
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        self.drawn += 1
        return (x ^ (x >> 16)).double() / 2**32


class _SpreadUniform(TorchDistribution):
    """u_i = (u + i / B) mod 1 with one uniform u: each u_i is uniform, and together they cover [0, 1) evenly.

    Of P processes, the k-th has the part u_i = (u + (k + i / B) / P) mod 1.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, like: Tensor, share: _Share | None = None) -> None:
        self.like, self.share = like, share
        super().__init__(like.shape, validate_args=False)

    def expand(self, batch_shape: Shape, _instance: None = None) -> "_SpreadUniform":
        return type(self)(self.like.expand(batch_shape), self.share)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        shape = self._extended_shape(sample_shape)
        size = shape.numel()
        places = torch.linspace(0, 1 - 1 / size, size, device=self.like.device, dtype=self.like.dtype)
        places = places if places.shape == shape else places.reshape(shape)
        if self.share is None:
            return (torch.rand((), device=self.like.device, dtype=self.like.dtype) + places).frac()
        u = self.share.uniform().to(self.like.device, self.like.dtype)
        return (u + (self.share.number + places) / self.share.count).frac()

    def log_prob(self, value: Tensor) -> Tensor:
        """0, the log density of each u_i by itself; the draws of a batch are dependent and have no joint density."""
        return torch.zeros_like(value)


class BoundWeighting(nn.Module):
    """w(t) = 1: the one-step pair is unbiased for the bound."""

    def forward(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.get_default_dtype())


class SimpleWeighting(nn.Module):
    r"""The weighting that makes the step's cost the squared error of the noise: :math:`L_\mathrm{simple}`.

    .. math:: w(t) = \frac{1}{T} \frac{2 \sigma_t^2}{w_0(t)^2} \frac{a_t^2}{b_t^2}, \qquad
        \mathbb{E}_t \left[ \frac{w(t)}{p(t)} L_{t-1} \right]
        = \mathbb{E}_{t \sim U\{1..T\}} \left\| \epsilon - \hat\epsilon \right\|^2 + \text{const}

    where :math:`w_0(t)` is the weight of :math:`x_0` in the posterior's mean; the constant does not depend on the
    denoiser. For VP schedules the inverse of the second factor is
    :math:`\beta_t^2 / (2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t))`, the weight of Ho's Eq. 12. The step at t = 1 is
    scored by the decoder, which for this has to be the Gaussian kernel.

    Arguments:
        reverse: The reverse process, whose variance :math:`\sigma_t^2` the weighting undoes.

    Raises:
        ValueError: If ``reverse`` is not a :class:`GaussianReverse`, its variance is learned by its network
            (:class:`HybridWeighting` is for that), or its schedule ends without signal.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eqs. 12 and 14.
    """

    def __init__(self, reverse: GaussianReverse) -> None:
        super().__init__()
        checks.instance("reverse", reverse, GaussianReverse)
        if isinstance(reverse.variance, LearnedVariance):
            raise ArgumentError(
                "reverse",
                f"must have a variance that is a function of t, for the weighting to undo, but it has a "
                f"{type(reverse.variance).__name__}, which the simple loss would not train: give "
                f"HybridWeighting(), or no weighting, which is the bound's",
            )
        process = reverse.forward_process
        if not checks.holds(process.schedule.signal(process.num_steps) != 0):
            raise ArgumentError("reverse", f"must leave some signal at t = T, but its schedule is {process.schedule!r}")
        self._reverse = (reverse,)  # read, but no part of this module: in a tuple, torch does not register it

    @property
    def forward_process(self) -> GaussianForward:
        """The forward process that the weighting is made for."""
        return self._reverse[0].forward_process

    def forward(self, t: Tensor) -> Tensor:
        (reverse,) = self._reverse
        schedule = reverse.forward_process.schedule
        _, weight_0, _ = schedule.posterior(t)
        variance = reverse.variance(reverse.forward_process, t).detach()
        return 2 * variance / weight_0**2 * schedule.log_snr(t).exp() / schedule.num_steps


class NoiseWeighting(nn.Module, ABC):
    r"""A weighting that adds the squared error of the noise to the bound's step, or puts it in its place.

    .. math:: L = \sum_{t=1}^T w_\epsilon(t) \, \mathbb{E} \lVert \epsilon - \hat\epsilon \rVert^2 + w(t) \, L_{t-1},
        \qquad \hat\epsilon = \frac{x_t - a_t \hat x_0}{b_t},

    where :meth:`noise` returns :math:`w_\epsilon`, and a call w, which is 0 unless overridden. The one-step pair then
    has one more site, ``noise``, where :math:`\epsilon` is observed under :math:`N(\hat\epsilon, \frac{1}{2 \pi})`,
    whose
    :math:`-\log p` is :math:`\pi` times the squared error; in ``x_s`` and ``x_0`` the mean is detached. Any Gaussian
    kernel will do: its mean implies :math:`\hat x_0`. The loss is not a bound, so a schedule cannot be learned by it.

    Example:
        >>> class MinSNR(pyrodiff.NoiseWeighting):  # Hang et al., 2023
        ...     def noise(self, t, schedule):
        ...         return (5.0 / schedule.log_snr(t).exp()).clamp(max=1) / schedule.num_steps
        >>> MinSNR().noise(torch.tensor([250, 500]), pyrodiff.CosineSchedule(num_steps=1000)) * 1000
        tensor([0.9031, 1.0000], dtype=torch.float64)
    """

    def forward(self, t: Tensor) -> Tensor:
        """The weight w(t) of the bound's step, with the shape (B,) of t."""
        return torch.zeros(t.shape, dtype=torch.float64, device=t.device)

    @abstractmethod
    def noise(self, t: Tensor, schedule: Schedule) -> Tensor:
        r"""The weight :math:`w_\epsilon(t)` of the squared error.

        Arguments:
            t: The times, with shape (B,).
            schedule: The schedule.

        Returns:
            Numbers of at least 0, with the shape of t.
        """


class HybridWeighting(NoiseWeighting):
    r"""The simple loss for the mean, plus a small multiple of the bound for the variance alone.

    .. math:: L_\mathrm{hybrid} = \mathbb{E}_{t \sim U\{1..T\}} \left\| \epsilon - \hat\epsilon \right\|^2
        + \lambda L_\mathrm{vlb}

    with the mean detached in :math:`L_\mathrm{vlb}`, so that a network learns the mean by the first term, and the v of
    a :class:`LearnedVariance` by the second. Unlike other weightings it is not just a factor of the step.

    Arguments:
        scale: :math:`\lambda`, a positive number. Both losses are summed over a datum's numbers, the second in nats;
            theirs is in bits, so that their 0.001 is 0.00144 here.

    Raises:
        ValueError: If ``scale`` is not positive; on a call of the programs, if the kernel is not Gaussian.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), Eq. 16,
        https://arxiv.org/abs/2102.09672

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> network = pyrodiff.networks.MLP(event_shape=(2,), outputs=2)
        >>> denoiser = pyrodiff.NoisePrediction(network, forward)
        >>> reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.RangeVariance())
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pair = diffusion.one_step(weighting=pyrodiff.HybridWeighting())
        >>> sorted(pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, torch.randn(5, 2)))
        ['noise', 'x_0', 'x_T', 'x_s']
    """

    def __init__(self, scale: float = 0.001) -> None:
        super().__init__()
        self.scale = arguments.number("scale", scale, 0, math.inf)

    def forward(self, t: Tensor) -> Tensor:
        return torch.full(t.shape, self.scale, dtype=torch.float64, device=t.device)

    def noise(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.full(t.shape, 1 / schedule.num_steps, dtype=torch.float64, device=t.device)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class ScoreWeighting(NoiseWeighting):
    r"""Denoising score matching at all noise levels, NCSN's loss, instead of the bound.

    .. math:: \sum_{t=1}^T \lambda(t) \, \ell(\theta; t), \qquad
        \ell(\theta; t) = \tfrac12 \mathbb{E} \left\| \hat s(x_t, t) + \frac{x_t - a_t x_0}{b_t^2} \right\|^2
        = \frac{1}{2 b_t^2} \mathbb{E} \lVert \epsilon - \hat\epsilon \rVert^2

    of the score :math:`\hat s = -\hat\epsilon / b_t`, whatever the network predicts. NCSN is that for
    :class:`GeometricSchedule` and :class:`ScorePrediction` with :math:`\lambda(t) = \sigma_t^2`, where
    :math:`\sigma_t` is the noise :math:`b_t`; theirs is the mean over the levels. The variance of the reverse kernel
    plays no part.

    Arguments:
        weight: :math:`\lambda`: called with integers of shape (B,), it returns numbers of at least 0, of that shape.

    Raises:
        ValueError: If ``weight`` is not callable; on a call of the programs, if it returns another shape, or the kernel
            is not Gaussian.

    References:
        Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon, 2019), Eqs. 5 and 6,
        https://arxiv.org/abs/1907.05600

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(10, 0.01, 10.0))
        >>> denoiser = pyrodiff.ScorePrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> weighting = pyrodiff.ScoreWeighting(lambda t: forward.schedule.noise(t) ** 2)
        >>> pair = diffusion.one_step(weighting=weighting)
    """

    def __init__(self, weight: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(weight):
            raise ArgumentError(
                "weight", f"must be called with t, as lambda t: schedule.noise(t) ** 2, but it is {weight!r}"
            )
        self.weight = weight

    def noise(self, t: Tensor, schedule: Schedule) -> Tensor:
        weight = self.weight(t)
        if not isinstance(weight, Tensor) or weight.shape != t.shape:
            raise ArgumentError(
                "weight",
                f"must return a tensor of the shape {tuple(t.shape)} of t, but it is {arguments.described(weight)}",
            )
        return weight / (2 * schedule.noise(t) ** 2)
