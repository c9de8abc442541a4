r"""A diffusion times a factor, :math:`p(x_0) \, r(x_0) / Z`, as another diffusion, exactly.

A posterior is such a product, with a likelihood as r. Sohl-Dickstein et al. (2015) multiplied each kernel by r(x_t).
The chain's distribution of x_0 is exactly the product if kernels are multiplied by the *backward message* instead,

.. math::
    r_0 = r, \qquad r_t(x_t) = \int p(x_{t-1} | x_t) \, r_{t-1}(x_{t-1}) \, dx_{t-1} = \mathbb{E}[r(x_0) | x_t],

.. math::
    \tilde p(x_T) = \frac{p(x_T) \, r_T(x_T)}{Z}, \qquad
    \tilde p(x_{t-1} | x_t) = \frac{p(x_{t-1} | x_t) \, r_{t-1}(x_{t-1})}{r_t(x_t)}, \qquad
    Z = \int p(x_T) \, r_T(x_T) \, dx_T = \int p(x_0) \, r(x_0) \, dx_0,

since in the product over t everything but :math:`r_0 / Z` cancels. For kernels that are Gaussian around an affine
function and a linear Gaussian factor, the messages are Gaussian densities of y, linear in :math:`x_t`; for a few bits
they are tables. For any other chain a :class:`Twist` approximates them, and weights correct that: :func:`posterior`.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.5,
    https://arxiv.org/abs/1503.03585
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.arguments import ArgumentError
from ..model.decoders import GaussianDecoder
from ..pair.diffusion import Diffusion
from ..pair.entropy import innermost
from ..pair.terms import runs
from ..process.forward import BinomialForward
from .observations import Conditioned, conditioning
from .proposals import Tabulated, Updated, cholesky, log_normal

__all__ = ["Product", "product"]

_MOST_BITS = 10
_OTHERWISE = "give posterior(...), whose weights make a guess of the messages good"


@dataclass(frozen=True, eq=False)
class Product:
    """A diffusion times a factor.

    Arguments:
        diffusion: The product as a diffusion of its own, with the same forward process: it is sampled and bounded like
            any other. It takes no context and has nothing to learn.
        log_evidence: log Z in nats, with shape (): the evidence log p(y), where the factor is p(y | x_0).
    """

    diffusion: Diffusion
    log_evidence: Tensor


def product(diffusion: Diffusion, observation: Callable, *context: Tensor, obs: Tensor | None = None) -> Product:
    r"""The diffusion of :math:`p(x_0) \, r(x_0) / Z`, with kernels that are multiplied by the exact backward message.

    The parts of the diffusion are copied: later training does not change the product.

    Arguments:
        diffusion: The diffusion: of kernels :math:`N(F_t x_t + c_t, \sigma_t^2)`, with a variance for each number that
            depends on t alone; or of at most ten bits.
        observation, obs: The factor r(x_0) = p(y | x_0), as of :func:`posterior`: linear and Gaussian for a Gaussian
            chain; for bits anything, also a Pyro program with ``pyro.factor("r", log_r(x_0))`` in a plate of the data.
        *context: What is known of the datum besides, for the network: tensors of one row.

    Returns:
        The diffusion and the evidence.

    Raises:
        ValueError: If an argument is of another kind, the messages have no closed form, or the factor is 0 wherever the
            data are.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.5,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=10))
        >>> denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP(event_shape=(3,)), forward)
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), event_shape=(3,))
        >>> def both_ends_alike(x_0):
        ...     with pyro.plate("data", len(x_0)):
        ...         pyro.factor("alike", -2.0 * (x_0[:, 0] - x_0[:, 2]).abs())
        >>> found = pyrodiff.product(diffusion, both_ends_alike)
        >>> found.diffusion.model(num_samples=5).shape, bool(found.log_evidence < 0)
        (torch.Size([5, 3]), True)
    """
    with conditioning(diffusion, observation, context, obs, 1, 0) as (given, rows):
        if not runs(diffusion.model.decoder, GaussianDecoder):
            raise ArgumentError(
                "diffusion",
                f"must end without a decoder to be multiplied, but it has a "
                f"{type(diffusion.model.decoder).__name__}: {_OTHERWISE}",
            )
        given.refuse_exact_densities()
        whole = copy.deepcopy(diffusion).requires_grad_(False).eval()
        given = Conditioned(whole, observation, obs)
        messages: _Messages = _Gaussians(given, rows) if given.is_gaussian else _Tables(given, rows)
        if not bool(messages.log_evidence.isfinite()):
            raise ArgumentError(
                "observation", f"must be possible somewhere, but log Z is {float(messages.log_evidence)}"
            )
    process, model = whole.forward_process, whole.model
    reverse, top = _Kernels(whole.reverse, messages, rows), _Top(whole, messages, given.dtype)
    found = Diffusion(process, reverse, whole.event_shape, prior=top, name=model.name, plate=model.plate)
    return Product(found, messages.log_evidence)


class _Messages(nn.Module):
    """The messages r_t of a chain at every t, and distributions multiplied by them."""

    log_evidence: Tensor

    def times(self, law: Any, s: int | Tensor) -> Any:
        """A distribution of x_s times r_s, normalised; s is one time, or one per row."""
        raise NotImplementedError


class _Gaussians(_Messages):
    """r_t(x_t) = N(y; H_t x_t + g_t, R_t), by the affine means of the kernels."""

    H: Tensor
    g: Tensor
    R: Tensor
    y: Tensor

    def __init__(self, given: Conditioned, context: tuple[Tensor, ...]) -> None:
        super().__init__()
        H, R, y = given.linear
        g, messages = torch.zeros_like(y), [(H, torch.zeros_like(y), R)]
        for t in range(1, given.diffusion.num_steps + 1):
            F, c, variance = _affine(given, t, context)
            H, g, R = H @ F, H @ c + g, R + (H * variance) @ H.T
            messages.append((H, g, R))
        for name, values in zip("HgR", zip(*messages, strict=True), strict=True):
            self.register_buffer(name, torch.stack(values))
        self.register_buffer("y", y)
        top: Any = innermost(given.diffusion.model.top(given.dtype, y.device))
        if not isinstance(top, torch.distributions.Normal):
            raise ArgumentError("prior", f"must be Normal(...).to_event(...), but it is a {type(top).__name__}")
        off = y - g - H @ top.mean.flatten()
        self.log_evidence = log_normal(off, cholesky(R + (H * top.variance.flatten()) @ H.T))

    def times(self, law: Any, s: int | Tensor) -> Updated:
        mean, H = innermost(law).mean, self.H[s]
        mu = mean.reshape(*mean.shape[: mean.dim() - len(law.event_shape)], -1)
        return Updated(law, self.y - self.g[s] - (H @ mu[..., None])[..., 0], H, self.R[s])


def _affine(given: Conditioned, t: int, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """F, c and the variances of a kernel N(F x_t + c, variance), with shapes (D, D), (D,) and (D,)."""
    event, device = given.diffusion.event_shape, given.diffusion.model.device
    D = event.numel()
    source = torch.Generator().manual_seed(0)
    x, z = torch.randn((2, D), generator=source, dtype=given.dtype).to(device)
    zero = torch.zeros_like(x)[None]
    points = torch.cat([zero, x[None], z[None], (2 * x - 3 * z)[None], torch.eye(D, dtype=given.dtype, device=device)])
    rows = (values.expand(len(points), *values.shape[1:]) for values in context)
    law: Any = innermost(given.diffusion.model.kernel(points.view(-1, *event), torch.full((len(points),), t), *rows))
    if not isinstance(law, torch.distributions.Normal):
        raise ArgumentError(
            "reverse", f"must return Normal(...).to_event(...), but it returns a {type(law).__name__}: {_OTHERWISE}"
        )
    mean, deviation = law.mean.flatten(1), law.stddev.flatten(1)
    off = (mean[3] - 2 * mean[1] + 3 * mean[2] - 2 * mean[0]).abs().amax()
    off = torch.maximum(off, (deviation - deviation[:1]).abs().amax())
    if not bool(off <= 100 * torch.finfo(mean.dtype).eps ** 0.75 * (mean.abs() + deviation).amax()):
        raise ArgumentError(
            "reverse",
            f"must return Normal laws whose mean is affine in x_t, of one variance at each t, but at random states of "
            f"t = {t} they are off by {float(off):.2g}: {_OTHERWISE}",
        )
    return (mean[4:] - mean[0]).T, mean[0], deviation[0] ** 2


class _Tables(_Messages):
    """r_t(x_t) of each state of a few bits."""

    log_r: Tensor
    states: Tensor

    def __init__(self, given: Conditioned, context: tuple[Tensor, ...]) -> None:
        super().__init__()
        model, event, bits = given.diffusion.model, given.diffusion.event_shape, given.diffusion.event_shape.numel()
        if not isinstance(given.diffusion.forward_process, BinomialForward) or bits > _MOST_BITS:
            raise ArgumentError(
                "diffusion",
                f"must be Gaussian, or of at most {_MOST_BITS} bits, to be multiplied exactly, but it has {bits} "
                f"numbers of a {type(given.diffusion.forward_process).__name__}: {_OTHERWISE}",
            )
        digits = torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1
        self.register_buffer("states", digits.to(given.dtype).view(-1, *event).to(model.device))
        log_r = [given.log_likelihood(self.states)]
        rows = [values.expand(len(self.states), *values.shape[1:]) for values in context]
        for t in range(1, given.diffusion.num_steps + 1):
            kernel = model.kernel(self.states, torch.full((len(self.states),), t, device=model.device), *rows)
            log_r.append((self._table(kernel) + log_r[-1]).logsumexp(-1))
        self.register_buffer("log_r", torch.stack(log_r))
        self.log_evidence = (self._table(model.top(given.dtype, model.device)) + log_r[-1]).logsumexp(-1)

    def _table(self, law: Any) -> Tensor:
        """The log probability of each state, with shape (*batch_shape, S)."""
        alone = (1,) * len(law.batch_shape)
        return law.log_prob(self.states.view(-1, *alone, *self.states.shape[1:])).movedim(0, -1)

    def times(self, law: Any, s: int | Tensor) -> Tabulated:
        return Tabulated(self._table(law) + self.log_r[s], self.states)


class _Kernels(nn.Module):
    """p(x_{t-1} | x_t) r_{t-1}(x_{t-1}) / r_t(x_t)."""

    def __init__(self, reverse: nn.Module, messages: _Messages, context: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.reverse, self.messages, self.context = reverse, messages, context

    def forward(self, x_t: Tensor, t: int | Tensor) -> Any:
        rows = (values.expand(len(x_t), *values.shape[1:]) for values in self.context)
        return self.messages.times(self.reverse(x_t, t, *rows), t - 1)


class _Top(nn.Module):
    """p(x_T) r_T(x_T) / Z."""

    def __init__(self, whole: Diffusion, messages: _Messages, dtype: torch.dtype) -> None:
        super().__init__()
        self.whole, self.messages, self.dtype = whole, messages, dtype

    def forward(self) -> Any:
        model = self.whole.model
        return self.messages.times(model.top(self.dtype, model.device), model.num_steps)
