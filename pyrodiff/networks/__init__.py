r"""Plain networks, functions of x_t, t and a context, which know nothing of probability.

A network takes the state ``x_t``, with shape (B, *event_shape), the time ``t``, an int or an integer tensor with shape
(B,), and the context, tensors whose first dimension is the batch's: none, a label, a vector, or whatever a network of
yours takes. It returns a tensor of the shape of ``x_t``. A denoiser says what that tensor means. The parts, named sizes
and the context are shown in :doc:`networks`.

References:
    Attention Is All You Need (Vaswani et al., 2017), section 3.5: the sinusoidal embedding,
    https://arxiv.org/abs/1706.03762
"""

from .embeddings import ContextEmbedding, LogSNREmbedding, TimeEmbedding
from .mlp import MLP
from .offset import Offset
from .scaled import DividedByNoise
from .unet import UNet

__all__ = ["ContextEmbedding", "DividedByNoise", "LogSNREmbedding", "MLP", "Offset", "TimeEmbedding", "UNet"]
