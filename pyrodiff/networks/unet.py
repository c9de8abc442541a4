"""A convolutional network for pictures."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from .embeddings import ContextEmbedding, TimeEmbedding, check_context, check_input

__all__ = ["UNet"]


class UNet(nn.Module):
    r"""A convolutional network for pictures: residual blocks at each of a few sizes, each half the one before.

    Blocks are group-normalised, FiLM-conditioned on time (a scale and a shift of each channel) and zero-initialised.
    Self-attention over all places, zero-initialised too, follows each block at the sizes that ask for it. At the
    smallest size a layer of hidden units sees the whole picture. The coordinates of each pixel are two more input
    channels, so that the network need not do the same everywhere. A :class:`ContextEmbedding` of the context, if there
    is any, is added to the embedded time.

    Arguments:
        event_shape: The shape of one picture, (H, W) or (C, H, W).
        channels: The number of channels at each size, from H x W down; each a positive even int.
        hidden: The number of hidden units that see the whole picture at the smallest size; 0 for none.
        num_blocks: The number of residual blocks at each size, on the way down and on the way up.
        dropout: The probability of dropout, in the blocks and in the hidden layer.
        outputs: How many numbers are returned per number of the input, in a last dimension. If not given: one, without
            that dimension.
        attention: The heights, of H, H / 2, ..., at which attention follows each block.
        heads: The number of heads of each attention; it divides the channels there.
        groups: The number of groups of each group normalisation; it divides all channels.
        time: What embeds the time: a module called as ``time(t)``, with t of shape (B,), that returns features, with
            shape (B, ``time.features``). ``TimeEmbedding(64)`` if not given.
        classes: The number of labels, 0..classes - 1; none if not given.
        vector: The number of features of a context vector; none if not given.

    Raises:
        ValueError: If ``event_shape`` does not have two or three dimensions or cannot be halved often enough,
            ``channels`` is empty, a number is not a positive int, ``dropout`` lies outside [0, 1), ``attention`` names
            a height that does not occur, ``heads`` or ``groups`` do not divide the channels, or ``time`` is not a
            module with a number of features. On a call, if the context is not what :class:`ContextEmbedding` takes.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), Appendix B, https://arxiv.org/abs/2006.11239

        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), section 3: attention at several
        sizes, with several heads, and labels added to the time, https://arxiv.org/abs/2105.05233

        FiLM: Visual Reasoning with a General Conditioning Layer (Perez et al., 2018): the scale and shift,
        https://arxiv.org/abs/1709.07871

    Example:
        >>> network = pyrodiff.networks.UNet(event_shape=(8, 8), channels=(16, 32), outputs=17)
        >>> network(torch.zeros(5, 8, 8), t=3).shape
        torch.Size([5, 8, 8, 17])
        >>> network = pyrodiff.networks.UNet((3, 32, 32), (16, 32), attention=(16,), heads=4, groups=8, classes=10)
        >>> network(torch.zeros(5, 3, 32, 32), t=3, y=torch.tensor([0, 9, 3, 3, 1])).shape
        torch.Size([5, 3, 32, 32])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        num_blocks: int = 1,
        dropout: float = 0.1,
        outputs: int | None = None,
        *,
        attention: Sequence[int] = (),
        heads: int = 1,
        groups: int = 1,
        time: nn.Module | None = None,
        classes: int | None = None,
        vector: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.outputs = checks.event_shape(event_shape), outputs
        check_context(classes, vector)
        _check_unet(self.event_shape, channels, hidden, num_blocks, dropout, outputs)
        planes, (height, width) = self.event_shape[:-2].numel(), self.event_shape[-2:]
        sizes = {height >> depth: size for depth, size in enumerate(channels)}
        _check_parts(sizes, attention, heads, groups)
        time = TimeEmbedding(64) if time is None else checks.instance("time", time, nn.Module)
        features = arguments.positive_int("time.features", getattr(time, "features", None))

        def blocks() -> nn.ModuleList:
            """The blocks of each size, with heads where there is attention."""
            kinds = [(size, features, dropout, groups, heads * (high in attention)) for high, size in sizes.items()]
            return nn.ModuleList(_Blocks(_Residual(*kind) for _ in range(num_blocks)) for kind in kinds)

        self.embedding = nn.Sequential(time, nn.SiLU())
        self.inlet = nn.Conv2d(planes + 2, channels[0], 3, padding=1)
        self.before = blocks()
        self.down = nn.ModuleList(nn.Conv2d(here, below, 2, stride=2) for here, below in pairwise(channels))
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, here, 2, stride=2) for here, below in pairwise(channels))
        self.after = blocks()
        area = (height * width) >> (2 * len(self.down))
        self.whole = _Whole(channels[-1] * area, hidden, features, dropout) if hidden else None
        self.norm = _GroupNorm(groups, channels[0])
        self.outlet = _zero(nn.Conv2d(channels[0], planes * (outputs or 1), 3, padding=1))
        self.labels = ContextEmbedding(features, classes, vector)

    def forward(
        self, x_t: Tensor, t: int | Tensor, *context: int | Tensor | None, y: int | Tensor | None = None
    ) -> Tensor:
        """The output, with the shape of ``x_t``, and a last dimension of ``outputs`` if that is given.

        The context is a label, a vector, or a label and a vector, for which see :class:`ContextEmbedding`.
        """
        check_input(x_t, t)
        batch_shape = x_t.shape[: x_t.dim() - len(self.event_shape)]
        told, (time, activation) = self.labels(batch_shape, *context, y=y), self.embedding
        times = torch.as_tensor(t, device=x_t.device).expand(batch_shape).reshape(-1)
        embedding = activation(time(times).reshape(*batch_shape, time.features) + told)
        x = x_t.reshape((-1, self.event_shape[:-2].numel(), *self.event_shape[-2:]))
        lines = (torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in x.shape[2:])
        place = torch.stack(torch.meshgrid(*lines, indexing="ij"))  # of each pixel
        h = self.inlet(torch.cat([x, place.expand(len(x), *place.shape)], 1))
        skips = []
        for depth, blocks in enumerate(self.before):
            h = blocks(h, embedding)
            if depth < len(self.down):
                skips.append(h)
                h = self.down[depth](h)
        if self.whole is not None:
            h = self.whole(h, embedding)
        for depth in reversed(range(len(self.after))):
            h = self.after[depth](h, embedding)
            if depth > 0:
                h = skips.pop() + self.up[depth - 1](h)
        output = self.outlet(nn.functional.silu(self.norm(h)))
        if self.outputs is None:
            return output.reshape(x_t.shape)
        return output.unflatten(1, (-1, self.outputs)).movedim(2, -1).reshape((*x_t.shape, self.outputs))


def _check_unet(
    event_shape: torch.Size, channels: Sequence[int], hidden: int, num_blocks: int, dropout: float, outputs: int | None
) -> None:
    if not isinstance(channels, Sequence) or isinstance(channels, str | bytes) or len(channels) == 0:
        raise ArgumentError("channels", f"must be a sequence of at least one int, but it is {channels!r}")
    for size in channels:
        arguments.positive_int("channels", size, even=True)
    halvings = len(channels) - 1
    if len(event_shape) not in (2, 3) or any(size % 2**halvings for size in event_shape[-2:]):
        raise ArgumentError(
            "event_shape",
            f"must be (H, W) or (C, H, W) with H and W divisible by {2**halvings} for {halvings} halvings, "
            f"but it is {tuple(event_shape)}",
        )
    if not (arguments.is_int(hidden) and hidden == 0):
        arguments.positive_int("hidden", hidden)
    arguments.positive_int("num_blocks", num_blocks)
    arguments.probability("dropout", dropout)
    if outputs is not None:
        arguments.positive_int("outputs", outputs)


def _check_parts(sizes: dict[int, int], attention: Sequence[int], heads: int, groups: int) -> None:
    """``sizes`` maps each height to the channels there."""
    is_sequence = isinstance(attention, Sequence) and not isinstance(attention, str)
    if not is_sequence or any(high not in tuple(sizes) for high in attention):
        there = ", ".join(map(str, sizes))
        raise ArgumentError(
            "attention", f"must be a sequence of heights of the network, of {there}, but it is {attention!r}"
        )
    attending = [sizes[high] for high in attention]
    for name, number, channels in (("heads", heads, attending), ("groups", groups, sizes.values())):
        arguments.positive_int(name, number)
        if any(size % number for size in channels):
            raise ArgumentError(name, f"must divide the channels {tuple(channels)}, but it is {number}")


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _GroupNorm(nn.GroupNorm):
    """Group normalisation in at least float32, as under autocast on a GPU; on a CPU autocast does not do so."""

    def forward(self, h: Tensor) -> Tensor:
        if torch.finfo(h.dtype).bits < 32:
            return super().forward(h.float()).to(h.dtype)
        return super().forward(h)


class _Modulation(nn.Module):
    """FiLM: a scale and a shift of each channel by the time."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.layer = _zero(nn.Linear(features, 2 * channels))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.layer(embedding).reshape(len(h), -1, *(1,) * (h.dim() - 2)).chunk(2, 1)
        return (1 + scale) * h + shift


class _Residual(nn.Module):
    """Two convolutions around a residual path, and self-attention if there are heads."""

    def __init__(self, channels: int, features: int, dropout: float, groups: int, heads: int) -> None:
        super().__init__()
        self.norm, self.time = _GroupNorm(groups, channels), _Modulation(channels, features)
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = _zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = _Attention(channels, groups, heads) if heads else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(nn.functional.silu(self.time(self.norm(h), embedding)))
        h = h + self.second(self.dropout(nn.functional.silu(inner)))
        return h if self.attention is None else self.attention(h)


class _Blocks(nn.ModuleList):
    """Residual blocks, one after the other."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            h = block(h, embedding)
        return h


class _Attention(nn.Module):
    """Multi-head self-attention over all places."""

    def __init__(self, channels: int, groups: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, _GroupNorm(groups, channels)
        self.inlet, self.outlet = nn.Linear(channels, 3 * channels), _zero(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        places = self.norm(h).flatten(2).mT  # (B, places, channels)
        parts = self.inlet(places).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # each (B, heads, places, channels of a head)
        found = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return h + self.outlet(found.transpose(1, 2).flatten(2)).mT.reshape(h.shape)


class _Whole(nn.Module):
    """A hidden layer that sees all channels everywhere."""

    def __init__(self, size: int, hidden: int, features: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, hidden), _zero(nn.Linear(hidden, size))
        self.time, self.dropout = _Modulation(hidden, features), nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(self.dropout(nn.functional.silu(h.flatten(1))))
        inner = self.dropout(nn.functional.silu(self.time(inner, embedding)))
        return h + self.second(inner).reshape(h.shape)
