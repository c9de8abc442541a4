r"""Decoders: the last step :math:`p_\theta(x_0 | x_1)`, made of the reverse kernel at t = 1.

A decoder is called as ``decoder(kernel, x_1)`` with the distribution ``kernel`` :math:`= p_\theta(x_0 | x_1)` of the
reverse process, and returns the distribution by which the data are scored and drawn.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.3, https://arxiv.org/abs/2006.11239
"""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from . import checks
from .forward import Forward

__all__ = ["Decoder", "GaussianDecoder", "TransitionDecoder"]


class Decoder(nn.Module, ABC):
    """The last step of the chain."""

    @abstractmethod
    def forward(self, kernel: dist.Distribution, x_1: Tensor) -> dist.Distribution:
        """p_θ(x_0 | x_1).

        Arguments:
            kernel: The reverse kernel at t = 1, with batch_shape (B,) and the data's event_shape.
            x_1: The state at t = 1, with shape (B, *event_shape).

        Returns:
            A distribution with the same shapes.
        """


class GaussianDecoder(Decoder):
    """The reverse kernel itself, for data with a density; for bits that kernel is a Bernoulli.

    Example:
        >>> kernel = pyro.distributions.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> pyrodiff.GaussianDecoder()(kernel, torch.zeros(5, 2)) is kernel
        True
    """

    def forward(self, kernel: dist.Distribution, x_1: Tensor) -> dist.Distribution:
        return kernel


class TransitionDecoder(Decoder):
    r"""Sohl-Dickstein's first step, which is not learned: the forward kernel once more, now from :math:`x_1` to x_0.

    .. math:: p(x_0 | x_1) = q(x_1 \leftarrow x_0) \big|_{x_0 \to x_1} = N(\sqrt{1 - \beta_1} \, x_1, \; \beta_1)

    for a Gaussian process. On data of unit second moment the bound is then K of Eq. 14 there, the sum of KLs and
    entropies.

    Arguments:
        forward: The forward process.

    Raises:
        ValueError: If ``forward`` is not a forward process.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), Appendix B.2,
        https://arxiv.org/abs/1503.03585
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        checks.instance("forward", forward, Forward)
        self.forward_process = forward

    def forward(self, kernel: dist.Distribution, x_1: Tensor) -> dist.Distribution:
        t = torch.ones(kernel.batch_shape, dtype=torch.long, device=x_1.device)
        return self.forward_process.transition(x_1.expand(t.shape + kernel.event_shape), t)
