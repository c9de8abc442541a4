r"""Embeddings: the time, as the number of a step or its log signal-to-noise ratio, and the context, as features.

References:
    Attention Is All You Need (Vaswani et al., 2017), section 3.5: the sinusoidal embedding,
    https://arxiv.org/abs/1706.03762
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError

__all__ = ["ContextEmbedding", "LogSNREmbedding", "TimeEmbedding"]


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
        self.features = features = arguments.positive_int("features", features, even=True)
        self.layers = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, t: Tensor) -> Tensor:
        """The features of times ``t`` of any shape (*), with shape (*, features)."""
        weight, half = cast(nn.Linear, self.layers[0]).weight, self.features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=weight.dtype, device=weight.device) / half)
        angles = t[..., None].to(weight.dtype).to(weight.device) * frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class LogSNREmbedding(nn.Module):
    r"""The log signal-to-noise ratio of the time, embedded as :class:`TimeEmbedding` embeds the time itself.

    .. math:: \left(\sin(50 \lambda_t \omega_k), \cos(50 \lambda_t \omega_k)\right)_{k = 0}^{K - 1}, \qquad
        \omega_k = 10000^{-k / K}

    A network that is given :math:`\lambda_t`, and not the number of a step, means the same under any schedule and any
    number of steps. Variational diffusion models stretch the schedule's range, some 20 nats, to 1000 radians. 50
    radians per nat are nearly that; but the ends need not be known, and where they are learned the network sees them
    move.

    The schedule is a submodule, evaluated at each call: its tables are in the ``state_dict`` under this name too, as
    under each name that a model has for its schedule.

    Arguments:
        schedule: The noise schedule, its log signal-to-noise ratio finite at all of t = 1..T.
        features: The number of features returned, even: 2 K.

    Raises:
        ValueError: If ``schedule`` is not one or is infinite at t = 1 or T, or ``features`` is not a positive even int.
            On a call, while Pyro validates, if t is not in 1..T.

    References:
        Variational Diffusion Models (Kingma et al., 2021), Appendix B, https://arxiv.org/abs/2107.00630: the network
        is given :math:`\gamma = -\lambda`.

    Example:
        >>> schedule = pyrodiff.LogSNRSchedule(num_steps=1000)
        >>> time = pyrodiff.networks.LogSNREmbedding(schedule, features=128)
        >>> network = pyrodiff.networks.UNet(event_shape=(8, 8), time=time)
        >>> network(torch.zeros(5, 8, 8), t=3).shape
        torch.Size([5, 8, 8])
    """

    def __init__(self, schedule: nn.Module, features: int) -> None:
        super().__init__()
        log_snr, T = getattr(schedule, "log_snr", None), getattr(schedule, "num_steps", None)
        if not isinstance(schedule, nn.Module) or log_snr is None or T is None:
            raise ArgumentError("schedule", f"must be a pyrodiff.Schedule, but it is {arguments.described(schedule)}")
        ends = torch.stack([log_snr(t) for t in (1, T)])
        if not checks.holds(ends.isfinite()):
            raise ArgumentError(
                "schedule",
                f"must have a finite log signal-to-noise ratio at t = 1 and T, but of {schedule!r} they are "
                f"{ends.tolist()}",
            )
        self.schedule: Any = schedule
        self.embedding, self.features = TimeEmbedding(features), features

    def forward(self, t: Tensor) -> Tensor:
        """The features of times ``t`` of any shape (*), with shape (*, features)."""
        log_snr = self.schedule.log_snr(t)
        if checks.validating() and not checks.holds(log_snr.isfinite()):
            raise ArgumentError(
                "t", f"must lie in 1..{self.schedule.num_steps}, but it has values in {t.min()}..{t.max()}"
            )
        return self.embedding(50 * log_snr)


def check_context(classes: int | None, vector: int | None) -> tuple[int | None, int | None]:
    """The numbers of labels and of features of a vector, where they are given."""
    return (
        None if classes is None else arguments.positive_int("classes", classes),
        None if vector is None else arguments.positive_int("vector", vector),
    )


def check_input(x_t: object, t: object) -> None:
    """A tensor, and a time that is an int or a tensor."""
    checks.instance("x_t", x_t, Tensor)
    if not isinstance(t, Tensor) and not arguments.is_int(t):
        raise ArgumentError("t", f"must be an int or an integer tensor, but it is {arguments.described(t)}")


class ContextEmbedding(nn.Module):
    r"""The context of a datum, a label or a vector or both, as features to be added to those of the time.

    .. math:: E_{y + 1} + W v, \qquad y \in \{-1, 0, \dots, \text{classes} - 1\}, \quad v \in \mathbb{R}^{\text{vector}}

    with -1 for no label, which has a row of its own. E and W are 0 at the start of training, so a fresh network does
    not depend on its context. :class:`UNet` and :class:`MLP` have one each; in a network of yours it is called as
    ``embedding(batch_shape, *context)``.

    Arguments:
        features: The number of features returned.
        classes: The number of labels, 0..classes - 1; there are none if not given.
        vector: The number of features of a context vector; there is none if not given.

    Raises:
        ValueError: If a number is not a positive int. On a call, if there is more context than expected, a label is not
            in -1..classes - 1 (a tensor: while Pyro validates), the vector is left out or has another number of
            features, or either does not broadcast to the batch.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), section 3: labels added to the
        time, https://arxiv.org/abs/2105.05233

        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), section 3.2: no label, as one more of them,
        https://arxiv.org/abs/2207.12598

    Example:
        >>> embedding = pyrodiff.networks.ContextEmbedding(32, classes=10, vector=2)
        >>> embedding((5,), torch.tensor([0, 9, 3, -1, 1]), torch.randn(5, 2)).shape
        torch.Size([5, 32])
    """

    def __init__(self, features: int, classes: int | None = None, vector: int | None = None) -> None:
        super().__init__()
        features = arguments.positive_int("features", features)
        self.classes, self.vector = check_context(classes, vector)
        self.names = [name for name, number in (("y", classes), ("vector", vector)) if number is not None]
        self.embedding = None if self.classes is None else nn.Embedding(self.classes + 1, features)
        self.linear = None if self.vector is None else nn.Linear(self.vector, features, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, batch_shape: Sequence[int], *context: int | Tensor | None, y: int | Tensor | None = None
    ) -> Tensor | int:
        """The features, with a shape that broadcasts to (*batch_shape, features); 0 without classes and vector.

        The context is the label, if there are classes, then the vector, if there is one. A label is an int, an integer
        tensor that broadcasts to ``batch_shape``, or None, for no label; it may be given by its name ``y``, or left out
        where nothing follows it. A vector has shape (*batch_shape, vector), or broadcasts to it over the batch.
        """
        context = context if y is None else (y, *context)
        if len(context) > len(self.names) or (y is not None and self.embedding is None):
            raise ArgumentError(
                "context",
                f"must be {' and '.join(self.names) or 'left out'}, as in {self._call()}, but it is "
                f"{' and '.join(map(arguments.described, context))}: give classes= (for labels) or vector= to the "
                f"network, or drop what it is not to know; its loader must yield x_0 alone, (x_0 for x_0, y in loader)",
            )
        given, features = dict(zip(self.names, context, strict=False)), []
        if self.embedding is not None and self.classes is not None:
            label = given.get("y")
            label = -1 if label is None else label
            _check_label(label, self.classes, tuple(batch_shape))
            features.append(self.embedding(torch.as_tensor(label, device=self.embedding.weight.device).long() + 1))
        if self.linear is not None:
            known = self._checked_vector(given.get("vector"), tuple(batch_shape))
            features.append(self.linear(known.to(self.linear.weight)))
        return sum(features)

    def _checked_vector(self, vector: object, batch_shape: tuple[int, ...]) -> Tensor:
        shape = (*batch_shape, self.vector)
        if isinstance(vector, Tensor) and vector.shape[-1:] == shape[-1:] and _fits(vector.shape[:-1], batch_shape):
            return vector
        raise ArgumentError(
            "vector",
            f"must be given, as in {self._call()}, with shape {shape}, or one that broadcasts to it over "
            f"the batch, but it is {arguments.described(vector)}",
        )

    def _call(self) -> str:
        return f"network({', '.join(('x_t', 't', *self.names))})"


def _check_label(y: int | Tensor, classes: int, batch_shape: tuple[int, ...]) -> None:
    where = f"in 0..{classes - 1}, or -1 for no label"
    if isinstance(y, Tensor):
        whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    else:
        whole = arguments.is_int(y)
    if not whole:
        raise ArgumentError("y", f"must be an int or an integer tensor, {where}, but it is {arguments.described(y)}")
    if not isinstance(y, Tensor):
        if not -1 <= y < classes:
            raise ArgumentError("y", f"must be {where}, but it is {y}")
        return
    if not _fits(y.shape, batch_shape):
        raise ArgumentError(
            "y", f"must be an int, or broadcast to the batch shape {batch_shape}, but its shape is {tuple(y.shape)}"
        )
    if checks.validating() and not checks.holds((y.long() >= -1) & (y.long() < classes)):
        raise ArgumentError("y", f"must be {where}, but it has values in {y.min()}..{y.max()}")


def _fits(shape: Sequence[int], batch_shape: Sequence[int]) -> bool:
    """Whether a shape broadcasts to that of the batch."""
    pairs = zip(reversed(shape), reversed(batch_shape), strict=False)
    return len(shape) <= len(batch_shape) and all(size in (1, number) for size, number in pairs)
