r"""The largest noise, the ratio of noise levels and the size of a Langevin step, chosen as in NCSN's second paper.

Of its five techniques these are the first, second and fourth; the third is :class:`pyrodiff.networks.DividedByNoise`,
and the fifth :func:`pyrodiff.exponential_average`. A :class:`GeometricSchedule` has the levels.

References:
    Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020),
    https://arxiv.org/abs/2006.09011
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.randomness import generator_of
from .schedules import Schedule

__all__ = ["initial_noise", "langevin_step_size", "noise_ratio"]

_BLOCK = 512  # distances are computed for blocks of 512 x 512 pairs


def initial_noise(x: Tensor, num_samples: int | None = None, generator: torch.Generator | int | None = None) -> float:
    r"""The noise to begin with, Technique 1: the largest distance between two of the data.

    With so much noise, a chain that begins at any of the data gets to any other. Distances are computed a block of
    pairs at a time, in the dtype of the data, beginning with the data that are farthest from their mean; pairs that are
    too near to it to be the farthest are left out. At worst all :math:`N (N - 1) / 2` pairs are computed.

    Arguments:
        x: The data, finite floats with shape (N, \*event_shape), at least 2.
        num_samples: The size of a random subset, drawn without replacement, whose largest distance is returned (at most
            that of all data); all data if not given.
        generator: A generator or a seed, for the same subset each time; torch's global generator if not given.

    Returns:
        The distance, Euclidean: :math:`\sigma_1` of the paper, the ``sigma_max`` of a :class:`GeometricSchedule`.

    Raises:
        ValueError: If ``x`` is not a tensor of finite floats, at least 2 data, ``num_samples`` is not an int in 2..N,
            or ``generator`` is of another kind, or is given where nothing is drawn.

    References:
        Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020), Technique 1.

    Example:
        >>> pyrodiff.initial_noise(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]]))
        5.0
    """
    checks.data(x)
    N = len(x)
    if N < 2:
        raise ArgumentError("x", f"must hold at least 2 data, to have a distance between them, but it holds {N}")
    if not checks.holds(x.isfinite()):
        raise ArgumentError("x", "must be finite, but it has values that are not: leave out the data that hold them")
    x = x.detach().reshape(N, x.shape[1:].numel())
    if num_samples is not None:
        if not arguments.is_int(num_samples) or not 2 <= num_samples <= N:
            raise ArgumentError(
                "num_samples", f"must be an int in 2..{N}, or None, but it is {arguments.described(num_samples)}"
            )
        x = x[_permuted(N, generator)[:num_samples].to(x.device)]
    elif generator is not None:
        raise ArgumentError(
            "generator", f"must be None without num_samples, as nothing is drawn, but it is {generator!r}"
        )
    return _farthest(x)


def noise_ratio(D: int, overlap: float = 0.5) -> float:
    r"""The ratio of neighbouring noise levels, Technique 2: the :math:`\gamma > 1` at which they overlap by a given
    fraction.

    .. math:: \Phi(\sqrt{2 D} (\gamma - 1) + 3 \gamma) - \Phi(\sqrt{2 D} (\gamma - 1) - 3 \gamma) = \text{overlap}

    is the probability that the length of noise of standard deviation :math:`\sigma` lies within three standard
    deviations of that of :math:`\gamma \sigma`, with the length approximated as normal,
    :math:`N(\sqrt{D} \sigma, \sigma^2 / 2)`, as holds for large D. The overlap is 0.9973 at :math:`\gamma = 1`. For D
    below 5 the three standard deviations of the larger noise reach 0, so that the overlap is at least 0.9973 for any
    ratio.

    Arguments:
        D: The dimension of the data, at least 5.
        overlap: The fraction, between 0 and 0.9973.

    Returns:
        The ratio :math:`\gamma` of the larger noise to the smaller, exact up to rounding: :math:`b_{t + 1} / b_t` of a
        :class:`GeometricSchedule`, and :math:`\sigma_{i - 1} / \sigma_i` of the paper, where noises fall with i.

    Raises:
        ValueError: If ``D`` is not an int of at least 5, or ``overlap`` is not between 0 and 0.9973.

    References:
        Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020), Technique 2 and
        Proposition 2.

    Example:
        >>> ratio = pyrodiff.noise_ratio(D=3 * 32 * 32)
        >>> ratio
        1.0397...
        >>> 2 + int(torch.log(torch.tensor(50 / 0.01)) / torch.log(torch.tensor(ratio)))  # steps from 0.01 to 50
        220
    """
    if not arguments.is_int(D) or D < 5:
        raise ArgumentError(
            "D",
            f"must be an int of at least 5, as below that any two noises overlap by 0.9973 or more, but it is "
            f"{arguments.described(D)}: choose the ratio by hand",
        )
    overlap, high = arguments.number("overlap", overlap, 0, math.erf(3 / math.sqrt(2))), 1.0
    while _overlap(D, high) > overlap:
        high *= 2
    return 1 + _change(lambda excess: _overlap(D, excess) > overlap, 0.0, high)


def _overlap(D: int, excess: float) -> float:
    """The overlap of two noise levels whose ratio is 1 + excess."""
    middle, half = math.sqrt(2 * D) * excess, 3 * (1 + excess)
    return (math.erfc((middle - half) / math.sqrt(2)) - math.erfc((middle + half) / math.sqrt(2))) / 2


def langevin_step_size(schedule: Schedule, D: int, num_updates: int) -> float:
    r"""The size of a Langevin step, Technique 4: with it the variance at each noise is nearest to what it should be.

    Annealed Langevin dynamics goes down the noises, and at each, :math:`\sigma_i`, makes U updates

    .. math:: x \leftarrow x + \alpha_i s(x, \sigma_i) + \sqrt{2 \alpha_i} \, z, \qquad
        \alpha_i = \epsilon \, \sigma_i^2 / \sigma_L^2,

    with :math:`\sigma_L` the smallest. If x begins with the variance :math:`\gamma^2 \sigma_i^2` of the noise before,
    and the score is that of :math:`N(0, \sigma_i^2 I)`, its variance after U updates, over :math:`\sigma_i^2`, is

    .. math:: \left(1 - \frac{\epsilon}{\sigma_L^2}\right)^{2 U} \left(\gamma^2 - c\right) + c, \qquad
        c = \frac{2 \epsilon}{\sigma_L^2 - \sigma_L^2 (1 - \epsilon / \sigma_L^2)^2}
          = \frac{2}{2 - \epsilon / \sigma_L^2} .

    It is above 1 for every :math:`\epsilon`, and least for one, which is returned, exact up to rounding: it depends on
    :math:`\gamma` and :math:`\sigma_L` alone, and not on the dimension D of the data. But x begins so only where
    neighbouring noise levels overlap in D dimensions (:func:`noise_ratio`): below an overlap of 0.01 there is a
    warning.

    In the paper of 2019, and in :class:`AnnealedLangevinSampler`, an update is
    :math:`x + \tfrac12 \alpha s + \sqrt{\alpha} z`: give these **twice this size**.

    Arguments:
        schedule: The noise schedule, with geometric noise and a signal of 1, of at least two steps: a
            :class:`GeometricSchedule`.
        D: The dimension of the data.
        num_updates: The number U of updates at each noise, T of the paper, at least 1.

    Returns:
        The size :math:`\epsilon` of a step at the smallest noise, in squared units of the data.

    Raises:
        ValueError: If ``schedule`` is another, or ``D`` or ``num_updates`` is not an int of at least 1.

    References:
        Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020), Technique 4,
        Proposition 3 and its Eq. 4.

        Generative Modeling by Estimating Gradients of the Data Distribution (Song and Ermon, 2019), Algorithm 1,
        https://arxiv.org/abs/1907.05600

    Example:
        >>> schedule = pyrodiff.GeometricSchedule(num_steps=232, sigma_min=0.01, sigma_max=50.0)
        >>> pyrodiff.langevin_step_size(schedule, D=3 * 32 * 32, num_updates=5)  # the paper has 6.2e-6
        6.184...e-06
    """
    U, (log_first, log_ratio) = arguments.positive_int("num_updates", num_updates), _geometric(schedule)
    overlap = _overlap(arguments.positive_int("D", D), math.expm1(log_ratio))
    if overlap < 0.01:
        warnings.warn(
            f"neighbouring noises of the schedule, of a ratio of {math.exp(log_ratio):.4g}, do not overlap in {D} "
            f"dimensions ({overlap:.2g}), so that Langevin dynamics at one does not begin where the one before ends: "
            f"take more steps, noise_ratio(D) has a ratio that would do",
            UserWarning,
            stacklevel=2,
        )
    gain = math.expm1(2 * log_ratio)  # gamma^2 - 1

    def falls(r: float) -> bool:
        """Whether the variance after U updates decreases at r, the step divided by the squared noise."""
        log_rest = math.log1p(-r)
        less = U * math.exp((2 * U - 1) * log_rest) * (2 - r) * (2 * gain - (1 + gain) * r)
        return less > -math.expm1(2 * U * log_rest)

    return _change(falls, 0.0, 1.0) * math.exp(2 * log_first)


def _permuted(number: int, generator: torch.Generator | int | None) -> Tensor:
    """The ints below a number, in random order; a seed draws on the CPU."""
    source = generator_of(generator, torch.device("cpu"))
    return torch.randperm(number, generator=source, device="cpu" if source is None else source.device)


def _farthest(x: Tensor) -> float:
    """The largest distance between two rows. By the triangle inequality, pairs too near to the mean are skipped."""
    distance = torch.nn.functional.pairwise_distance
    radius, order = distance(x, x.mean(0, keepdim=True), eps=0.0).sort(descending=True)
    radii, found = radius.tolist(), 0.0
    for i in range(0, len(x), _BLOCK):
        rows = x[order[i : i + _BLOCK]]
        for j in range(i, len(x), _BLOCK):
            if radii[i] + radii[j] <= found:
                break
            columns = x[order[j : j + _BLOCK]]
            pairs = torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
            found = max(found, float(pairs.max()))
    return found


def _geometric(schedule: Schedule) -> tuple[float, float]:
    """The logarithms of the smallest noise and of the ratio of neighbouring ones."""
    methods = all(callable(getattr(schedule, name, None)) for name in ("signal", "noise"))
    T = getattr(schedule, "num_steps", 0)
    if isinstance(schedule, nn.Module) and methods and T > 1:
        t = torch.arange(1, T + 1, device=schedule.noise(1).device)
        log_noise, signal = schedule.noise(t).detach().double().log(), schedule.signal(t).detach()
        steps = log_noise.diff()
        even = (steps > 0) & ((steps - steps.mean()).abs() <= 1e-6 * steps.mean())
        if bool(even.all()) and bool((signal == 1).all()):
            return float(log_noise[0]), float(log_noise[-1] - log_noise[0]) / (T - 1)
    raise ArgumentError(
        "schedule",
        f"must have a signal of 1 and a geometric noise, of at least two steps, as "
        f"pyrodiff.GeometricSchedule(num_steps, sigma_min, sigma_max) has, but it is "
        f"{repr(schedule) if isinstance(schedule, nn.Module) else arguments.described(schedule)}",
    )


def _change(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The point above ``low`` from which on a condition no longer holds, by bisection down to rounding."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high
