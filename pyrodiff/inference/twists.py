r"""Twists: approximations :math:`\psi_t(x_t)` of :math:`p(y | x_t)`, which guide where particles are drawn.

References:
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3,
    https://arxiv.org/abs/2306.17775

    Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023): the covariance by the Jacobian,
    https://arxiv.org/abs/2310.06721
"""

import math
from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..base import checks
from ..base.arguments import ArgumentError
from ..model.denoisers import LevelPrediction, LogitPrediction
from ..pair.entropy import innermost
from .observations import Conditioned, LinearGaussian
from .proposals import Partly, Updated, cholesky, log_normal

__all__ = ["DenoiserTwist", "GaussianTwist", "IsotropicTwist", "KnownTwist", "RepeatedTwist", "Twist"]


class Twist(ABC):
    r"""An approximation :math:`\psi_t(x_t)` of :math:`p(y | x_t)`, and a proposal for :math:`x_{t-1}`.

    A twist of your own defines :meth:`log_prob`; with that alone particles are drawn from the chain and only weighted.
    Any positive function is valid, but a bad one needs many particles: :func:`posterior` warns if only a few have
    weight.

    Example:
        >>> class Near(pyrodiff.Twist):  # a guess that knows nothing of the model
        ...     def log_prob(self, given, x_t, t, *context):
        ...         return -(x_t[:, 0] - given.y[0]) ** 2 / 2 / (1 + given.scales(int(t[0]))[1] ** 2)
    """

    def check(self, given: Conditioned) -> None:  # noqa: B027 - a twist need not define it
        """Refuse what the twist does not fit; by default, nothing.

        Arguments:
            given: The diffusion and the observation.

        Raises:
            ValueError: If so.
        """

    @property
    def control(self) -> "Twist | None":
        """Another twist, with which :func:`posterior` checks the result of this one; None for no check."""
        return None

    @abstractmethod
    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        r"""The :math:`\log \psi_t(x_t)`, for t = 1..T; at t = 0, log p(y | x_0) is used instead.

        Arguments:
            given: The diffusion and the observation.
            x_t: The states, with shape (n, *event_shape).
            t: Their time, the same everywhere, with shape (n,).
            *context: Tensors of n rows.

        Returns:
            A tensor with shape (n,).
        """

    def proposal(
        self, given: Conditioned, law: dist.TorchDistribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.TorchDistribution:
        r"""The distribution that :math:`x_s` is drawn from, s = t - 1; by default the chain's own.

        Arguments:
            given: The diffusion and the observation.
            law: The chain's own: :math:`p(x_T)` at s = T, then the kernel, and the decoder's at s = 0.
            s: The time of the state to draw, T..0.
            x_t: The states before, with shape (n, *event_shape); None at s = T.
            *context: Tensors of n rows.

        Returns:
            A distribution with batch_shape (n,) and the data's event_shape, whose support includes that of ``law``
            wherever the observation is possible.
        """
        return law


class _LinearTwist(Twist):
    """A Gaussian twist N(y; o, S), linearised at the kernel's mean, so that kernel times twist has a closed form."""

    def check(self, given: Conditioned) -> None:
        if not given.is_gaussian:
            raise ArgumentError(
                "twist",
                f"must be one for bits where the chain is not Gaussian, but it is {type(self).__name__}(): give "
                f"none with Inpainting(mask, values, noise=0), or DenoiserTwist()",
            )
        if not checks.holds(given.linear.R.diagonal() > 0):
            raise ArgumentError(
                "observation", f"must have noise in all of y for {type(self).__name__}, but some has none"
            )

    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        linear = given.linear
        o, _, S = self.moments(given, linear, x_t, t, *context)
        return log_normal(linear.y - o, cholesky(S))

    def proposal(
        self, given: Conditioned, law: dist.TorchDistribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.TorchDistribution:
        base = innermost(law)
        if not isinstance(base, torch.distributions.Normal):
            return law
        linear, mean = given.linear, base.mean
        A, R, y = linear
        if s == 0:
            o, H, S = mean.flatten(1) @ A.T, A.expand(len(mean), *A.shape), R.expand(len(mean), *R.shape)
        else:
            o, H, S = self.moments(given, linear, mean, torch.full((len(mean),), s, device=mean.device), *context)
        return Updated(law, y - o, H, S)

    @abstractmethod
    def moments(
        self, given: Conditioned, linear: LinearGaussian, x_t: Tensor, t: Tensor, *context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean o of y, its derivative H in x_t and its covariance S, with shapes (n, M), (n, M, D) and (n, M, M)."""


class GaussianTwist(_LinearTwist):
    r"""For linear Gaussian observations of a Gaussian chain: Tweedie's mean and covariance, by Jacobian products.

    .. math:: \psi_t(x_t) = N\left(y; \; A \hat x_0, \; R + \tfrac{b_t^2}{a_t} A J A^T\right), \qquad
        J = \frac{\partial \hat x_0}{\partial x_t},

    with the covariance symmetrised and negative eigenvalues set to 0. The proposal is the kernel times the twist,
    linearised at the kernel's mean. If the data are Gaussian and the kernels exact, all weights are equal. It takes two
    network calls and 2 M derivatives per step, M being how many numbers are observed.

    The Jacobian of a poorly trained network can be far off at large t, where the factor :math:`b_t^2 / a_t` is large.
    Then all particles are guided to where the model has little mass, and agree on an evidence that is too low. So
    :func:`posterior` also runs as many particles with :class:`IsotropicTwist`, and warns if these find more evidence.

    References:
        Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023), https://arxiv.org/abs/2310.06721
    """

    @property
    def control(self) -> Twist:
        return IsotropicTwist()

    def moments(
        self, given: Conditioned, linear: LinearGaussian, x_t: Tensor, t: Tensor, *context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        A, R, _ = linear
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            o = given.estimate(x_t, t, *context).flatten(1) @ A.T
            rows = [_gradient(self, one.sum(), x_t).flatten(1) for one in o.unbind(1)]
        H = torch.stack(rows, 1)
        signal, noise = given.scales(int(t[0]))
        covariance = noise**2 / signal * H @ A.T if signal > 0 else noise**2 * A @ A.T
        values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
        return o.detach(), H, R + (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT


class IsotropicTwist(_LinearTwist):
    r"""As :class:`GaussianTwist`, with the covariance :math:`b_t^2 / (a_t^2 + b_t^2)` of data N(0, I): no derivatives.

    .. math:: \psi_t(x_t) = N\left(y; \; A \hat x_0, \; R + \tfrac{b_t^2}{a_t^2 + b_t^2} A A^T\right)

    References:
        Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023): this covariance.
    """

    def moments(
        self, given: Conditioned, linear: LinearGaussian, x_t: Tensor, t: Tensor, *context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        A, R, _ = linear
        signal, noise = given.scales(int(t[0]))
        total = signal**2 + noise**2
        o = given.estimate(x_t, t, *context).flatten(1) @ A.T
        shape = (len(o), *A.shape)
        return o, (signal / total * A).expand(shape), (R + noise**2 / total * A @ A.T).expand(len(o), *R.shape)


class DenoiserTwist(Twist):
    r"""The naive twist :math:`\psi_t(x_t) = p(y | x_0 = \hat x_0(x_t))`, for any observation.

    It treats the estimate as the datum, which is far too certain at large t: if the observation has little noise it
    collapses, and :func:`posterior` warns. For a Gaussian chain the kernel's mean is shifted by
    :math:`\sigma_t^2 \nabla \log \psi_{t-1}`; bits are drawn from the kernel.

    References:
        Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023): this estimate,
        https://arxiv.org/abs/2209.14687. Wu et al., 2023: as a twist.
    """

    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return given.log_likelihood(given.estimate(x_t, t, *context))

    def proposal(
        self, given: Conditioned, law: dist.TorchDistribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.TorchDistribution:
        base = innermost(law)
        if not isinstance(base, torch.distributions.Normal):
            return law
        with torch.enable_grad():
            x = base.mean.detach().requires_grad_()
            times = torch.full((len(x),), s, device=x.device)
            value = given.log_likelihood(x) if s == 0 else self.log_prob(given, x, times, *context)
            shift = _gradient(self, value.sum(), x)
        return dist.Normal(base.mean + base.variance * shift, base.stddev).to_event(x.dim() - 1)


class RepeatedTwist(_LinearTwist):
    r"""The factor itself at every t, :math:`\psi_t(x_t) = r(x_t) = p(y | x_0 = x_t)`, as in the 2015 paper.

    It treats the state as the datum: a poor approximation at large t, which the weights have to correct. For linear
    Gaussian observations of a Gaussian chain; the kernels are multiplied by it in closed form.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.5 and
        Appendix C, https://arxiv.org/abs/1503.03585
    """

    def moments(
        self, given: Conditioned, linear: LinearGaussian, x_t: Tensor, t: Tensor, *context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        A, R, _ = linear
        n = len(x_t)
        return x_t.flatten(1) @ A.T, A.expand(n, *A.shape), R.expand(n, *R.shape)


class KnownTwist(Twist):
    r"""For exactly known bits or levels: their probability under the denoiser.

    .. math:: \psi_t(x_t) = \prod_{i \text{ known}} \hat p_i(y_i | x_t)

    Known numbers are drawn from the forward posterior :math:`q(x_{t-1} | x_t, x_0 = y)`, the others from the kernel.
    For levels without :class:`LevelPrediction`, the probability is a Gaussian around :math:`\hat x_0`, with the
    standard deviation of :class:`IsotropicTwist` plus half a bin.
    """

    def check(self, given: Conditioned) -> None:
        self._mask(given)

    def _mask(self, given: Conditioned) -> Tensor:
        """Which numbers are known."""
        if given.known is None:
            raise ArgumentError(
                "observation",
                "must be Inpainting(mask, values, noise=0) for KnownTwist, but it is another: give another twist",
            )
        return given.known.mask.to(given.filled.device)

    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return self._belief(given, x_t, t, *context)[:, self._mask(given)].sum(1)

    def _belief(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """The log probability of each known number, with the shape of ``x_t``."""
        y = given.filled.expand(x_t.shape)
        denoiser, most = getattr(given.diffusion.reverse, "denoiser", None), -math.log(torch.finfo(x_t.dtype).eps)
        if isinstance(denoiser, LevelPrediction):
            k = ((y + 1) / 2 * (denoiser.levels - 1)).round().long().clamp(0, denoiser.levels - 1)
            return denoiser.log_probs(x_t, t, *context).clamp(min=-most).gather(-1, k[..., None])[..., 0]
        if given.is_gaussian:
            signal, noise = given.scales(int(t[0]))
            half_a_bin = 1 / ((given.diffusion.levels or math.inf) - 1)
            deviation = (noise**2 / (signal**2 + noise**2)) ** 0.5 + half_a_bin
            return dist.Normal(given.estimate(x_t, t, *context), deviation).log_prob(y)
        if isinstance(denoiser, LogitPrediction):
            logits = denoiser.output(x_t, t, *context)
        else:
            logits = given.estimate(x_t, t, *context).clamp(0, 1).logit()
        return dist.Bernoulli(logits=logits.clamp(-most, most)).log_prob(y)

    def proposal(
        self, given: Conditioned, law: dist.TorchDistribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.TorchDistribution:
        process, y = given.diffusion.forward_process, given.filled.expand(law.batch_shape + law.event_shape)
        times = torch.full(law.batch_shape, s, device=y.device)
        if s == 0:
            known: Distribution = dist.Delta(y)
        else:
            known = innermost(process.marginal(y, times) if x_t is None else process.posterior(x_t, y, times + 1))
        return Partly(self._mask(given), known, innermost(law), len(law.event_shape))


def _gradient(twist: Twist, value: Tensor, x: Tensor) -> Tensor:
    """The derivative of a number in x; an error if there is none."""
    found = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise ValueError(
            f"diffusion and observation must have a gradient in x_t for {type(twist).__name__}, but there is none: "
            f"leave out torch.no_grad() in the network, or give IsotropicTwist(), which needs none"
        )
    return found
