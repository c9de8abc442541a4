"""A residual multi-layer perceptron."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from .embeddings import ContextEmbedding, TimeEmbedding, check_context, check_input

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""A residual multi-layer perceptron on the flattened event, with sine features and the time in every block.

    .. math::
        h &\leftarrow W x_t + U \sin(\omega (F x_t + c)) + b \\
        h &\leftarrow h + W_2 \, \mathrm{SiLU}(W_1 \, \mathrm{LayerNorm}(h) + V e_t) \qquad \text{in each block} \\
        f &= \left(1 + \tfrac{1}{10} s_t\right) W_3 \, \mathrm{SiLU}(h) + \tfrac{1}{10} g_t \, x_t

    with :math:`e_t` the embedded time, to which a :class:`ContextEmbedding` is added where there is context, and
    :math:`s_t, g_t` linear in it. What is predicted is nearly linear in :math:`x_t` at one end of the chain (the noise,
    where all is noise; the data, where there is none), and errors there may weigh a thousand times as much as
    elsewhere: :math:`g_t` and :math:`s_t` let f be linear, and the factors 1/10 damp the jitter of the optimizer in
    them. At the other end the sines resolve fine detail; on few data of many dimensions they overfit.

    Arguments:
        event_shape: The shape of one datum.
        hidden: The number of hidden units, even.
        num_blocks: The number of residual blocks.
        dropout: The probability that a hidden unit of a block is dropped while training.
        frequency: :math:`\omega`, the frequency of the sine features; 0 for none.
        outputs: How many numbers are returned per number of the input, in a last dimension; only the first has the
            linear part :math:`g_t`. If not given: one, without that dimension.
        classes: The number of labels, 0..classes - 1; none if not given.
        vector: The number of features of a context vector; none if not given.

    Raises:
        ValueError: If ``event_shape`` is not a sequence of positive ints, ``hidden`` is not a positive even int,
            ``num_blocks``, ``outputs``, ``classes`` or ``vector`` is not a positive int, ``dropout`` lies outside
            [0, 1), or ``frequency`` is negative. On a call, if the context is not what :class:`ContextEmbedding` takes.

    References:
        Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains (Tancik et al., 2020),
        https://arxiv.org/abs/2006.10739: why sines.

    Example:
        >>> network = pyrodiff.networks.MLP(event_shape=(8, 8), hidden=64)
        >>> network(torch.zeros(5, 8, 8), t=3).shape
        torch.Size([5, 8, 8])
        >>> network = pyrodiff.networks.MLP(event_shape=(2,), classes=10, vector=3)
        >>> network(torch.zeros(5, 2), 3, torch.tensor([0, 9, 3, -1, 1]), torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: int = 128,
        num_blocks: int = 3,
        dropout: float = 0.0,
        frequency: float = 3.0,
        *,
        outputs: int | None = None,
        classes: int | None = None,
        vector: int | None = None,
    ) -> None:
        super().__init__()
        hidden = arguments.positive_int("hidden", hidden, even=True)
        num_blocks, dropout = (
            arguments.positive_int("num_blocks", num_blocks),
            arguments.probability("dropout", dropout),
        )
        if not (arguments.is_number(frequency) and 0 <= frequency < math.inf):
            raise ArgumentError("frequency", f"must be a number of at least 0, but it is {frequency!r}")
        self.event_shape, self.frequency = checks.event_shape(event_shape), float(frequency)
        self.outputs = None if outputs is None else arguments.positive_int("outputs", outputs)
        check_context(classes, vector)
        size = self.event_shape.numel()
        self.embedding = nn.Sequential(TimeEmbedding(hidden), nn.SiLU())
        self.inlet = nn.Linear(size, hidden)
        if frequency > 0:
            self.directions, self.sines = nn.Linear(size, hidden), nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, dropout) for _ in range(num_blocks))
        self.outlet = nn.Linear(hidden, size * (outputs or 1))
        self.scale, self.gate = nn.Linear(hidden, size), nn.Linear(hidden, size)
        for parameter in self.outlet.parameters():
            nn.init.zeros_(parameter)
        self.labels = ContextEmbedding(hidden, classes, vector)

    def forward(
        self, x_t: Tensor, t: int | Tensor, *context: int | Tensor | None, y: int | Tensor | None = None
    ) -> Tensor:
        """The output, with the shape of ``x_t``, and a last dimension of ``outputs`` if that is given.

        The context is a label, a vector, or a label and a vector, for which see :class:`ContextEmbedding`.
        """
        check_input(x_t, t)
        batch_shape = x_t.shape[: x_t.dim() - len(self.event_shape)]
        if x_t.shape[len(batch_shape) :] != self.event_shape:
            raise ArgumentError(
                "x_t",
                f"must have shape (B, {', '.join(map(str, self.event_shape))}), the MLP's event_shape, but its "
                f"shape is {tuple(x_t.shape)}",
            )
        told, (time, activation) = self.labels(batch_shape, *context, y=y), self.embedding
        embedding = activation(time(torch.as_tensor(t, device=x_t.device)) + told)
        x = x_t.reshape((*batch_shape, -1))
        h = self.inlet(x)
        if self.frequency > 0:
            h = h + self.sines(torch.sin(self.frequency * self.directions(x)))
        for block in self.blocks:
            h = h + block(h, embedding)
        output, *others = self.outlet(nn.functional.silu(h)).chunk(self.outputs or 1, -1)
        output = (1 + self.scale(embedding) / 10) * output + self.gate(embedding) / 10 * x
        if self.outputs is None:
            return output.reshape(x_t.shape)
        return torch.stack([output, *others], -1).reshape((*x_t.shape, self.outputs))


class _Block(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(hidden), nn.Dropout(dropout)
        self.first, self.time, self.second = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.second(self.dropout(nn.functional.silu(self.first(self.norm(h)) + self.time(embedding))))
