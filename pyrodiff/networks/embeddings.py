r"""Embeddings of the time: the number of a step, or its log signal-to-noise ratio, as features.

References:
    Attention Is All You Need (Vaswani et al., 2017), section 3.5: the sinusoidal embedding,
    https://arxiv.org/abs/1706.03762
"""

import math

import torch
from torch import Tensor, nn

from ..base import checks

__all__ = ["LogSNREmbedding", "TimeEmbedding"]


class TimeEmbedding(nn.Module):
    r"""The time as sines and cosines of geometrically spaced frequencies, then two linear layers.

    .. math:: \left(\sin(t \omega_k), \cos(t \omega_k)\right)_{k = 0}^{K - 1}, \qquad \omega_k = 10000^{-k / K}

    Arguments:
        features: The number of features returned, even: 2 K.

    Raises:
        ValueError: If ``features`` is not a positive even int.

    Example:
        >>> pyrodiff.networks.TimeEmbedding(32)(torch.tensor([1, 2, 3])).shape
        torch.Size([3, 32])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features = checks.positive_int("features", features, even=True)
        self.layers = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, t: Tensor) -> Tensor:
        """The features of times ``t`` of any shape (*), with shape (*, features)."""
        dtype, half = self.layers[0].weight.dtype, self.features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
        angles = t[..., None].to(dtype) * frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class LogSNREmbedding(nn.Module):
    r"""The log signal-to-noise ratio of the time, embedded as :class:`TimeEmbedding` embeds the time itself.

    .. math:: \left(\sin(50 \lambda_t \omega_k), \cos(50 \lambda_t \omega_k)\right)_{k = 0}^{K - 1}, \qquad
        \omega_k = 10000^{-k / K}

    A network that is told :math:`\lambda_t`, and not the number of a step, means the same under any schedule and any
    number of steps. Variational diffusion models spread the schedule's ends over 1000 radians; they are some 20 nats
    apart, so 50 radians a nat is nearly that, but the ends need not be known, and where they are learned the network
    sees them move.

    The schedule is asked at each call and is a part of the module, so the tables of a schedule stand in the
    ``state_dict`` under this name too, as they do under each name that a model has for its schedule.

    Arguments:
        schedule: The noise schedule, its log signal-to-noise ratio finite at all of t = 1..T.
        features: The number of features returned, even: 2 K.

    Raises:
        ValueError: If ``schedule`` is not one or is infinite at t = 1 or T, or ``features`` is not a positive even int.
            On a call, if t is none of 1..T, as far as may be seen.

    References:
        Variational Diffusion Models (Kingma et al., 2021), Appendix B, https://arxiv.org/abs/2107.00630: the network
        is told :math:`\gamma = -\lambda`.

    Example:
        >>> schedule = pyrodiff.LogSNRSchedule(num_steps=1000)
        >>> time = pyrodiff.networks.LogSNREmbedding(schedule, features=128)
        >>> network = pyrodiff.networks.UNet(event_shape=(8, 8), time=time)
        >>> network(torch.zeros(5, 8, 8), t=3).shape
        torch.Size([5, 8, 8])
    """

    def __init__(self, schedule: nn.Module, features: int) -> None:
        super().__init__()
        if not (isinstance(schedule, nn.Module) and hasattr(schedule, "log_snr") and hasattr(schedule, "num_steps")):
            raise ValueError(f"schedule must be a pyrodiff.Schedule, but it is {checks.described(schedule)}")
        ends = torch.stack([schedule.log_snr(t) for t in (1, schedule.num_steps)])
        if not checks.holds(ends.isfinite()):
            raise ValueError(
                f"schedule must have a finite log signal-to-noise ratio at t = 1 and T, but of {schedule!r} they are "
                f"{ends.tolist()}"
            )
        self.schedule, self.embedding, self.features = schedule, TimeEmbedding(features), features

    def forward(self, t: Tensor) -> Tensor:
        """The features of times ``t`` of any shape (*), with shape (*, features)."""
        log_snr = self.schedule.log_snr(t)
        if checks.validating() and not checks.holds(log_snr.isfinite()):
            raise ValueError(f"t must lie in 1..{self.schedule.num_steps}, but it has values in {t.min()}..{t.max()}")
        return self.embedding(50 * log_snr)
