r"""Plain networks f(x_t, t), which know nothing of probability.

A network takes the state ``x_t``, with shape (B, *event_shape), and the time ``t``, an int or an integer tensor with
shape (B,), and returns a tensor of the shape of ``x_t``. What that tensor means is said by a denoiser.

References:
    Attention Is All You Need (Vaswani et al., 2017), section 3.5: the sinusoidal embedding,
    https://arxiv.org/abs/1706.03762
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from . import checks

__all__ = ["MLP", "TimeEmbedding", "UNet"]


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
        checks.positive_int("features", features, even=True)
        frequencies = torch.exp(-math.log(10000) * torch.arange(features // 2) / (features // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, t: Tensor) -> Tensor:
        """The features of times ``t`` of any shape (*), with shape (*, features)."""
        angles = t[..., None].to(self.frequencies.dtype) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class MLP(nn.Module):
    r"""A residual multi-layer perceptron on the flattened event, with sine features and the time in every block.

    .. math::
        h &\leftarrow W x_t + U \sin(\omega (F x_t + c)) + b \\
        h &\leftarrow h + W_2 \, \mathrm{SiLU}(W_1 \, \mathrm{LayerNorm}(h) + V e_t) \qquad \text{in each block} \\
        f &= \left(1 + \tfrac{1}{10} s_t\right) W_3 \, \mathrm{SiLU}(h) + \tfrac{1}{10} g_t \, x_t

    with :math:`e_t` the embedded time and :math:`s_t, g_t` linear in it. What is predicted is nearly linear in
    :math:`x_t` at one end of the chain (the noise, where all is noise; the data, where there is none), and errors there
    may weigh a thousand times as much as elsewhere: :math:`g_t` and :math:`s_t` let f be linear, and the tenths keep
    them from the jitter of the optimizer. At the other end the sines resolve fine detail; on few data of many
    dimensions they overfit.

    Arguments:
        event_shape: The shape of one datum.
        hidden: The number of hidden units, even.
        num_blocks: The number of residual blocks.
        dropout: The probability that a hidden unit of a block is dropped while training.
        frequency: :math:`\omega`, the frequency of the sine features; 0 for none.

    Raises:
        ValueError: If ``event_shape`` is not a sequence of positive ints, ``hidden`` is not a positive even int,
            ``num_blocks`` is not a positive int, ``dropout`` lies outside [0, 1), or ``frequency`` is negative.

    References:
        Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains (Tancik et al., 2020),
        https://arxiv.org/abs/2006.10739: why sines.

    Example:
        >>> network = pyrodiff.networks.MLP(event_shape=(8, 8), hidden=64)
        >>> network(torch.zeros(5, 8, 8), t=3).shape
        torch.Size([5, 8, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: int = 128,
        num_blocks: int = 3,
        dropout: float = 0.0,
        frequency: float = 3.0,
    ) -> None:
        super().__init__()
        checks.positive_int("hidden", hidden, even=True)
        checks.positive_int("num_blocks", num_blocks)
        checks.probability("dropout", dropout)
        if not (isinstance(frequency, int | float) and 0 <= frequency < math.inf):
            raise ValueError(f"frequency must be a number of at least 0, but it is {frequency!r}")
        self.event_shape, self.frequency = checks.event_shape(event_shape), frequency
        size = self.event_shape.numel()
        self.embedding = nn.Sequential(TimeEmbedding(hidden), nn.SiLU())
        self.inlet = nn.Linear(size, hidden)
        if frequency > 0:
            self.directions, self.sines = nn.Linear(size, hidden), nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, dropout) for _ in range(num_blocks))
        self.outlet, self.scale, self.gate = (nn.Linear(hidden, size) for _ in range(3))
        for parameter in self.outlet.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The output, with the shape of ``x_t``."""
        batch_shape = x_t.shape[: x_t.dim() - len(self.event_shape)]
        x = x_t.reshape((*batch_shape, -1))
        embedding = self.embedding(torch.as_tensor(t, device=x_t.device))
        h = self.inlet(x)
        if self.frequency > 0:
            h = h + self.sines(torch.sin(self.frequency * self.directions(x)))
        for block in self.blocks:
            h = h + block(h, embedding)
        output = (1 + self.scale(embedding) / 10) * self.outlet(nn.functional.silu(h)) + self.gate(embedding) / 10 * x
        return output.reshape(x_t.shape)


class _Block(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(hidden), nn.Dropout(dropout)
        self.first, self.time, self.second = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.second(self.dropout(nn.functional.silu(self.first(self.norm(h)) + self.time(embedding))))


class UNet(nn.Module):
    r"""A convolutional network for pictures: residual blocks at each of a few sizes, each half the one before.

    Each block is normed, told the time by a scale and a shift of its channels, and left out at the start of training.
    At the smallest size a layer of hidden units sees the whole picture. The place of a pixel is known to it, so that it
    need not be the same everywhere.

    Arguments:
        event_shape: The shape of one picture, (H, W) or (C, H, W).
        channels: The number of channels at each size, from H x W down; each a positive even int.
        hidden: The number of hidden units that see the whole picture at the smallest size; 0 for none.
        num_blocks: The number of residual blocks at each size, on the way down and on the way up.
        dropout: The probability that a channel's number, or a hidden unit, is dropped while training.
        outputs: How many numbers are returned for each of the input's, in a last dimension; just one, without that
            dimension, if not given.

    Raises:
        ValueError: If ``event_shape`` does not have two or three dimensions or is not divisible by 2 so often,
            ``channels`` is empty, a number is not a positive int, or ``dropout`` lies outside [0, 1).

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Appendix B, https://arxiv.org/abs/2006.11239

        FiLM: Visual Reasoning with a General Conditioning Layer (Perez et al., 2018): the scale and shift,
        https://arxiv.org/abs/1709.07871

    Example:
        >>> network = pyrodiff.networks.UNet(event_shape=(8, 8), channels=(16, 32), outputs=17)
        >>> network(torch.zeros(5, 8, 8), t=3).shape
        torch.Size([5, 8, 8, 17])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        num_blocks: int = 1,
        dropout: float = 0.1,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.outputs = checks.event_shape(event_shape), outputs
        _check_unet(self.event_shape, channels, hidden, num_blocks, dropout, outputs)
        planes, (height, width) = self.event_shape[:-2].numel(), self.event_shape[-2:]
        self.embedding = nn.Sequential(TimeEmbedding(64), nn.SiLU())
        self.inlet = nn.Conv2d(planes + 2, channels[0], 3, padding=1)
        sizes = list(pairwise(channels))
        self.before = nn.ModuleList(_blocks(size, num_blocks, dropout) for size in channels)
        self.down = nn.ModuleList(nn.Conv2d(here, below, 2, stride=2) for here, below in sizes)
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, here, 2, stride=2) for here, below in sizes)
        self.after = nn.ModuleList(_blocks(size, num_blocks, dropout) for size in channels)
        area = (height * width) >> (2 * len(sizes))
        self.whole = _Whole(channels[-1] * area, hidden, dropout) if hidden else None
        self.norm = nn.GroupNorm(1, channels[0])
        self.outlet = _zero(nn.Conv2d(channels[0], planes * (outputs or 1), 3, padding=1))
        lines = (torch.linspace(-1, 1, size) for size in (height, width))
        self.register_buffer("place", torch.stack(torch.meshgrid(*lines, indexing="ij")), persistent=False)

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The output, with the shape of ``x_t``, and a last dimension of ``outputs`` if that is given."""
        batch_shape = x_t.shape[: x_t.dim() - len(self.event_shape)]
        x = x_t.reshape((-1, self.event_shape[:-2].numel(), *self.event_shape[-2:]))
        embedding = self.embedding(torch.as_tensor(t, device=x.device).expand(batch_shape).reshape(-1))
        h = self.inlet(torch.cat([x, self.place.expand(len(x), *self.place.shape)], 1))
        skips = []
        for depth, blocks in enumerate(self.before):
            for block in blocks:
                h = block(h, embedding)
            if depth < len(self.down):
                skips.append(h)
                h = self.down[depth](h)
        if self.whole is not None:
            h = self.whole(h, embedding)
        for depth in reversed(range(len(self.after))):
            for block in self.after[depth]:
                h = block(h, embedding)
            if depth > 0:
                h = skips.pop() + self.up[depth - 1](h)
        output = self.outlet(nn.functional.silu(self.norm(h)))
        if self.outputs is None:
            return output.reshape(x_t.shape)
        return output.unflatten(1, (-1, self.outputs)).movedim(2, -1).reshape((*x_t.shape, self.outputs))


def _check_unet(
    event_shape: torch.Size, channels: Sequence[int], hidden: int, num_blocks: int, dropout: float, outputs: int | None
) -> None:
    if isinstance(channels, int) or len(channels) == 0:
        raise ValueError(f"channels must be a sequence of at least one int, but it is {channels!r}")
    for size in channels:
        checks.positive_int("channels", size, even=True)
    halvings = len(channels) - 1
    if len(event_shape) not in (2, 3) or any(size % 2**halvings for size in event_shape[-2:]):
        raise ValueError(
            f"event_shape must be (H, W) or (C, H, W) with H and W divisible by {2**halvings} for {halvings} halvings, "
            f"but it is {tuple(event_shape)}"
        )
    if hidden != 0:
        checks.positive_int("hidden", hidden)
    checks.positive_int("num_blocks", num_blocks)
    checks.probability("dropout", dropout)
    if outputs is not None:
        checks.positive_int("outputs", outputs)


def _blocks(channels: int, number: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(_Residual(channels, dropout) for _ in range(number))


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Modulation(nn.Module):
    """A scale and a shift of each channel by the time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = _zero(nn.Linear(64, 2 * channels))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.layer(embedding).reshape(len(h), -1, *(1,) * (h.dim() - 2)).chunk(2, 1)
        return (1 + scale) * h + shift


class _Residual(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.time, self.dropout = nn.GroupNorm(1, channels), _Modulation(channels), nn.Dropout(dropout)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = _zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(nn.functional.silu(self.time(self.norm(h), embedding)))
        return h + self.second(self.dropout(nn.functional.silu(inner)))


class _Whole(nn.Module):
    """A hidden layer that sees all channels everywhere."""

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, hidden), _zero(nn.Linear(hidden, size))
        self.time, self.dropout = _Modulation(hidden), nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(self.dropout(nn.functional.silu(h.flatten(1))))
        inner = self.dropout(nn.functional.silu(self.time(inner, embedding)))
        return h + self.second(inner).reshape(h.shape)
