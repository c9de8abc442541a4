r"""Denoisers around a denoiser, which keep :math:`\hat x_0` within the range that the data have.

A network that predicts the noise says little of the data where there is hardly any signal: its error is divided by
:math:`a_t` in :math:`\hat x_0 = (x_t - b_t \hat\epsilon) / a_t`, which on the cosine schedule is 5e-5 at t = T.
Pictures lie on [-1, 1], and :math:`\hat x_0` has no reason to lie outside. So codes of DDPMs clip it, in each step of
their samplers and in their bounds: a likelihood or a sample of theirs is that of the clipped model.

Clipping belongs to the model and not to the sampler, since a bound is that of the kernels that samples are drawn by. So
it is a denoiser here, around the one that was trained, with the same weights.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), their code: ``clip_denoised`` in
    ``diffusion_utils_2.py``, https://github.com/hojonathanho/diffusion

    Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022), section 2.3,
    https://arxiv.org/abs/2205.11487
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import Float64Module
from ..process.forward import GaussianForward, event_dim

__all__ = ["Clipped", "Thresholded"]


class _Around(Float64Module, ABC):
    """A denoiser that changes another's estimate of x_0; process, levels and network are the other's."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        checks.instance("denoiser", denoiser, nn.Module)
        process = getattr(denoiser, "forward_process", None)
        if process is not None and not isinstance(process, GaussianForward):
            raise ArgumentError(
                "denoiser",
                f"must be made for a GaussianForward for {type(self).__name__}, but it is a "
                f"{type(denoiser).__name__} made for {process!r}",
            )
        self.denoiser = denoiser

    @property
    def forward_process(self) -> GaussianForward:
        """The forward process of the denoiser, if it has one."""
        return self._of_denoiser("forward_process")

    @property
    def levels(self) -> int:
        """The number of levels that the denoiser predicts, where it does."""
        return self._of_denoiser("levels")

    @property
    def network(self) -> nn.Module:
        """The network of the denoiser, where it has one."""
        return self._of_denoiser("network")

    def _of_denoiser(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def forward(
        self, x_t: Tensor, t: int | Tensor, *context: Tensor, **options: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""The data :math:`\hat x_0`, within their range.

        Arguments:
            x_t: The state, with shape (B, *event_shape).
            t: The time, in 1..T: an int, or an integer tensor with shape (B,).
            *context: What is known of each datum, for the denoiser: tensors of B rows.
            **options: The denoiser's own: with ``variance=True`` it also returns what a :class:`LearnedVariance` is
                made of, which passes through.

        Returns:
            A tensor with the shape of ``x_t``, or a pair of them.

        Raises:
            ValueError: If the denoiser returns another shape, or takes another context.
        """
        checks.takes_context("denoiser", self.denoiser, context, **options)
        found = self.denoiser(x_t, t, *context, **options)
        x_0, *v = found if isinstance(found, tuple) else (found,)
        checks.returned("denoiser", x_0, x_t.shape, x_t)
        x_0 = self._within(x_0.to(x_t.dtype), event_dim(x_t, t))
        return (x_0, *v) if v else x_0

    @abstractmethod
    def _within(self, x_0: Tensor, event: int) -> Tensor:
        """The estimate of x_0, changed; its last ``event`` dimensions are those of one datum."""


class Clipped(_Around):
    r"""A denoiser whose :math:`\hat x_0` is clipped to a range.

    .. math:: \hat x_0 \leftarrow \min(\max(\hat x_0, \, l), \, h)

    Where the data lie in [l, h] this never moves :math:`\hat x_0` away from them, so no :math:`L_{t-1}` grows, whatever
    is drawn, nor :math:`L_0` of a Gaussian. (A :class:`DiscretizedDecoder` gives an outer level the more, the further
    outside the mean is.) Where the network predicts the noise and little signal is left, what is clipped away may be
    most of the bound.

    Train without it: where it clips, the gradient is 0, and what is far off is not learned. Bound and sample with it:
    both models share the weights, and the clipped one may be made before the training or after. The drift of a
    probability flow (:func:`ode_log_prob`) then has kinks, where a number comes to an end of its range: it is
    continuous, so the flow and its density are as defined, and the solver takes short steps there.

    Arguments:
        denoiser: A module called as ``denoiser(x_t, t, *context)`` that returns :math:`\hat x_0`, with the shape of
            ``x_t``.
        low: The least value l: a number, or a tensor that broadcasts against one datum (one value per dimension).
        high: The greatest value h, likewise.

    Raises:
        ValueError: If ``denoiser`` is not a module, or one of a process that is not Gaussian; if ``low`` or ``high`` is
            not made of fixed numbers, or ``low`` is not below ``high`` everywhere; on a call, if they do not broadcast
            against one datum.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), their code: ``clip_denoised``.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=1000))
        >>> noise = pyrodiff.NoisePrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> x_t = torch.tensor([[0.02, -0.01]])
        >>> noise(x_t, t=1000).abs().amin() > 100
        tensor(True)
        >>> clipped = pyrodiff.Clipped(noise, low=-1.0, high=1.0)
        >>> clipped(x_t, t=1000).detach()
        tensor([[ 1., -1.]])
        >>> reverse = pyrodiff.GaussianReverse(forward, clipped, pyrodiff.PosteriorVariance())
    """

    low: Tensor
    high: Tensor

    def __init__(self, denoiser: nn.Module, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__(denoiser)
        low, high = checks.numbers("low", low), checks.numbers("high", high)
        if not _broadcast(low.shape, high.shape) or not checks.holds(low < high):
            raise ArgumentError("low", f"must be below high, but low is {low.tolist()} and high is {high.tolist()}")
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def _within(self, x_0: Tensor, event: int) -> Tensor:
        shape = x_0.shape[x_0.dim() - event :]
        for name, limit in (("low", self.low), ("high", self.high)):
            if not _broadcast(limit.shape, shape) or torch.broadcast_shapes(limit.shape, shape) != shape:
                raise ArgumentError(
                    name,
                    f"must broadcast against one datum of shape {tuple(shape)}, but its shape is {tuple(limit.shape)}",
                )
        low, high = (limit.to(x_0.dtype).to(x_0.device) for limit in (self.low, self.high))
        return torch.clamp(x_0, low, high)

    def extra_repr(self) -> str:
        numbers = (limit.dim() == 0 and not limit.is_meta for limit in (self.low, self.high))
        return f"low={float(self.low):g}, high={float(self.high):g}" if all(numbers) else ""


class Thresholded(_Around):
    r"""A denoiser with dynamic thresholding: :math:`\hat x_0` is clipped to a range of its own, and scaled to [-1, 1].

    .. math::
        s = \min\left(\max\left(1, \, \mathrm{quantile}_p |\hat x_0|\right), \, s_\max\right), \qquad
        \hat x_0 \leftarrow \frac{\min(\max(\hat x_0, \, -s), \, s)}{s}

    each datum by itself, with the quantile over all its numbers, linear between two of them. Where next to nothing of a
    datum lies outside [-1, 1], s is 1 and this is ``Clipped(denoiser, -1.0, 1.0)``; where much does, as under strong
    guidance, the datum is made less bright, instead of being cut at the ends.

    It is for data on [-1, 1], and for samples. A bound is the worse for it, unlike with :class:`Clipped`: where a
    single number is a little over 1, all others of its datum are scaled too, away from the data, and at small t that
    costs. Train without it, as without :class:`Clipped`.

    Arguments:
        denoiser: A module called as ``denoiser(x_t, t, *context)`` that returns :math:`\hat x_0`, with the shape of
            ``x_t``.
        quantile: The part p of a datum's numbers that lie within [-s, s], in (0, 1].
        most: The greatest :math:`s_\max`, at least 1; infinity, as in the paper, if not given. With 1 it is
            :class:`Clipped`.

    Raises:
        ValueError: If ``denoiser`` is not a module, or one of a process that is not Gaussian; if ``quantile`` lies
            outside (0, 1] or ``most`` is below 1.

    References:
        Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022), section
        2.3, "dynamic thresholding"; the greatest s is that of diffusers, ``sample_max_value``.

    Example:
        >>> class Says(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return torch.tensor([[0.5, -4.0, 2.0], [0.5, -0.9, 0.2]])
        >>> pyrodiff.Thresholded(Says(), quantile=0.5)(torch.zeros(2, 3), t=1)
        tensor([[ 0.2500, -1.0000,  1.0000],
                [ 0.5000, -0.9000,  0.2000]])
    """

    def __init__(self, denoiser: nn.Module, quantile: float = 0.995, most: float = math.inf) -> None:
        super().__init__(denoiser)
        if not (arguments.is_number(quantile) and 0 < quantile <= 1):
            raise ArgumentError("quantile", f"must be a number in (0, 1], but it is {arguments.described(quantile)}")
        if not (arguments.is_number(most) and most >= 1):
            raise ArgumentError("most", f"must be a number of at least 1, but it is {arguments.described(most)}")
        self.quantile, self.most = float(quantile), float(most)

    def _within(self, x_0: Tensor, event: int) -> Tensor:
        batch_shape = x_0.shape[: x_0.dim() - event]
        ordered = x_0.abs().reshape(*batch_shape, math.prod(x_0.shape[x_0.dim() - event :])).sort(-1).values
        rank = self.quantile * (ordered.shape[-1] - 1)
        below, above = (ordered[..., i] for i in (math.floor(rank), math.ceil(rank)))
        s = torch.lerp(below, above, rank - math.floor(rank)).clamp(1, self.most)
        s = s.reshape(batch_shape + (1,) * event)
        return torch.clamp(x_0, -s, s) / s

    def extra_repr(self) -> str:
        return f"quantile={self.quantile:g}, most={self.most:g}"


def _broadcast(*shapes: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True
