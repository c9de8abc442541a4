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

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64
from ..process.forward import Forward, GaussianForward, with_parts
from ..process.quantization import DiscretizedNormal, LevelCategorical, Levels

__all__ = ["Decoder", "DiscretizedDecoder", "GaussianDecoder", "SoftmaxDecoder", "TransitionDecoder"]


class Decoder(nn.Module, ABC):
    """The last step of the chain.

    Attributes:
        levels: The number of levels of the data that it gives a probability to; None if it has a density.
    """

    levels: int | None = None

    @abstractmethod
    def forward(self, kernel: dist.TorchDistribution, x_1: Tensor) -> dist.TorchDistribution:
        """p_θ(x_0 | x_1).

        Arguments:
            kernel: The reverse kernel at t = 1, with batch_shape (B,) and the data's event_shape.
            x_1: The state at t = 1, with shape (B, *event_shape).

        Returns:
            A distribution with the same shapes.
        """

    def check_kind(self, x_0: Tensor) -> None:
        """Refuse integers where levels on [-1, 1] are needed.

        Raises:
            ValueError: If so.
        """
        if self.levels is not None and isinstance(x_0, Tensor) and not x_0.is_floating_point():
            raise ArgumentError(
                "x_0",
                f"must have a floating dtype, the levels on [-1, 1] that "
                f"pyrodiff.from_levels(k, levels={self.levels}) gives, but its dtype is {x_0.dtype}",
            )

    def check(self, x_0: Tensor) -> None:
        """Refuse data that are not levels.

        Raises:
            ValueError: If so.
        """
        if self.levels is None:
            return
        valid = Levels(self.levels).check(x_0)
        if not checks.holds(valid):
            whole = bool(((x_0 == x_0.round()) & (x_0 >= 0) & (x_0 < self.levels)).all()) and float(x_0.max()) > 1
            hint = f": they look like such k, so give pyrodiff.from_levels(x_0, levels={self.levels})" if whole else ""
            raise ArgumentError(
                "x_0",
                f"must be one of {self.levels} levels on [-1, 1] everywhere, the values that "
                f"pyrodiff.from_levels(k, levels={self.levels}) gives for k in 0..{self.levels - 1}, but "
                f"{int((~valid).sum())} of its {x_0.numel()} values are not, the first {x_0[~valid][0].item():.6g}; "
                f"they lie in [{x_0.min().item():.6g}, {x_0.max().item():.6g}]{hint}",
            )

    def subchain(self, forward: Forward) -> "Decoder":
        """The decoder of a chain of fewer steps, given its forward process: itself, if it does not depend on that."""
        return self


class GaussianDecoder(Decoder):
    """The reverse kernel itself, unchanged: for data with a density, and for bits, where the kernel is a Bernoulli.

    Example:
        >>> kernel = pyro.distributions.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> pyrodiff.GaussianDecoder()(kernel, torch.zeros(5, 2)) is kernel
        True
    """

    def forward(self, kernel: dist.TorchDistribution, x_1: Tensor) -> dist.TorchDistribution:
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

    def forward(self, kernel: dist.TorchDistribution, x_1: Tensor) -> dist.TorchDistribution:
        t = torch.ones(kernel.batch_shape, dtype=torch.long, device=x_1.device)
        return self.forward_process.transition(x_1.expand(t.shape + kernel.event_shape), t)

    def subchain(self, forward: Forward) -> "TransitionDecoder":
        return with_parts(self, forward_process=forward)


class DiscretizedDecoder(Decoder):
    r"""The Gaussian reverse kernel as a distribution over levels: each level has the probability of its bin.

    .. math:: p_\theta(x_0 = v_k | x_1) = \int_{v_k - \Delta/2}^{v_k + \Delta/2}
        N(x; \, \mu_\theta(x_1, 1), \, \sigma_1^2) \, dx, \qquad \Delta = \frac{2}{L - 1},

    independently per dimension, the outer bins open to infinity, so that the probabilities of all levels add up to 1.
    The number of levels must be the data's own: with more, most of the probability goes to levels that never occur.

    Arguments:
        levels: The number of levels L of the data, at least 2.

    Raises:
        ValueError: If ``levels`` is not an int of at least 2; on a call, if the kernel is not Gaussian.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.3 and Eq. 13, there with 256 levels.

    Example:
        >>> kernel = pyro.distributions.Normal(torch.zeros(5, 2), 0.1).to_event(1)
        >>> pyrodiff.DiscretizedDecoder(levels=17)(kernel, torch.zeros(5, 2)).sample().shape
        torch.Size([5, 2])
    """

    levels: int

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = arguments.levels(levels)

    def forward(self, kernel: dist.TorchDistribution, x_1: Tensor) -> dist.TorchDistribution:
        base = kernel.base_dist if isinstance(kernel, torch.distributions.Independent) else kernel
        if not isinstance(base, torch.distributions.Normal):
            raise ArgumentError("kernel", f"must be Gaussian for DiscretizedDecoder, but it is {kernel!r}")
        return DiscretizedNormal(base.loc, base.scale, self.levels).to_event(len(kernel.event_shape))

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class SoftmaxDecoder(Decoder):
    r"""The posterior of the level given the noisy :math:`x_1` alone, with nothing learned.

    .. math:: p(x_0 = v_k | x_1) = \frac{q(x_1 | x_0 = v_k)}{\sum_j q(x_1 | x_0 = v_j)}

    independently per dimension. It costs next to nothing where the noise :math:`b_1 / a_1` is well below half a bin,
    :math:`1 / (L - 1)`; where it is not, neighbouring levels are confused, whatever the network knows.

    Arguments:
        forward: The forward process.
        levels: The number of levels L of the data, at least 2.

    Raises:
        ValueError: If ``forward`` is not a :class:`GaussianForward`, or ``levels`` not an int of at least 2.

    References:
        Variational Diffusion Models (Kingma et al., 2021), section 3.3, https://arxiv.org/abs/2107.00630

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=1000))
        >>> decoder = pyrodiff.SoftmaxDecoder(forward, levels=17)
        >>> x_1 = torch.tensor([[-0.98, 0.01, 0.14]])
        >>> decoder(pyro.distributions.Normal(x_1, 1.0).to_event(1), x_1).sample()
        tensor([[-1.0000,  0.0000,  0.1250]])
    """

    levels: int

    def __init__(self, forward: GaussianForward, levels: int) -> None:
        super().__init__()
        checks.instance("forward", forward, GaussianForward)
        self.forward_process, self.levels = forward, arguments.levels(levels)

    def forward(self, kernel: dist.TorchDistribution, x_1: Tensor) -> dist.TorchDistribution:
        signal, noise = self.forward_process.schedule.scales(1)
        x = float64(x_1)[..., None]
        logits = -((x - signal * Levels(self.levels).points(x)) ** 2) / (2 * noise**2)
        return LevelCategorical(logits.to(x_1.dtype).to(x_1.device)).to_event(len(kernel.event_shape))

    def subchain(self, forward: Forward) -> "SoftmaxDecoder":
        return with_parts(self, forward_process=forward)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"
