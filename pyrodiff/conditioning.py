r"""Conditioning: samples of the data given an observation, :math:`p(x_0 | y)`, with weights, and the evidence p(y).

Particles walk down the chain, :math:`x_T` to :math:`x_0`. At each t a twist :math:`\psi_t(x_t)` guesses
:math:`p(y | x_t)`; it says where particles are drawn, and their weights make good whatever is wrong with the guess:

.. math::
    w_{t-1} = w_t \,
        \frac{p_\theta(x_{t-1} | x_t) \, \psi_{t-1}(x_{t-1})}{q(x_{t-1} | x_t, y) \, \psi_t(x_t)}, \qquad
    \psi_0(x_0) = p(y | x_0)

With any positive twist the mean weight is an unbiased estimate of p(y) under the chain, and weighted samples are of the
chain's own posterior as their number grows. How many are needed is the twist's doing. Particles are resampled,
systematically, where the effective sample size falls below a half.

References:
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3,
    https://arxiv.org/abs/2306.17775

    Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023): the covariance by the Jacobian,
    https://arxiv.org/abs/2310.06721
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from .base import arguments, checks
from .base.arguments import ArgumentError
from .base.precision import coefficients
from .model.denoisers import LevelPrediction, LogitPrediction
from .pair.diffusion import Diffusion
from .pair.entropy import innermost
from .process.forward import GaussianForward
from .running.evaluation import evaluating, validated

__all__ = [
    "Conditioned",
    "DenoiserTwist",
    "GaussianTwist",
    "Inpainting",
    "IsotropicTwist",
    "KnownTwist",
    "Linear",
    "Posterior",
    "Twist",
    "posterior",
]


class Linear:
    r"""An observation :math:`y = A x_0 + N(0, \text{noise}^2)`: a blur, a picture at less resolution, a projection.

    Arguments:
        operator: A, a matrix with shape (M, D) for data of D numbers in all; or a linear function of data with shape
            (n, *event_shape) that returns a tensor of n rows.
        values: y, with shape (M,), or that of a row.
        noise: The standard deviation, positive: a number, or a tensor that broadcasts to y.

    Raises:
        ValueError: If the operator is neither, or the noise is not positive. Whether a function is linear is asked
            where it matters, by the twist.

    Example:
        >>> pairs = pyrodiff.conditioning.Linear(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0.3]), noise=0.1)
        >>> pairs(torch.ones(2, 3)).mean
        tensor([[1.],
                [1.]])
    """

    def __init__(self, operator: Tensor | Callable[[Tensor], Tensor], values: Tensor, noise: float | Tensor) -> None:
        is_matrix = isinstance(operator, Tensor) and operator.dim() == 2
        if not is_matrix and (isinstance(operator, Tensor) or not callable(operator)):
            raise ArgumentError(
                "operator",
                f"must be a matrix of shape (M, D) or a function of data, but it is {arguments.described(operator)}",
            )
        _check_values(values)
        if is_matrix and values.shape != operator.shape[:1]:
            raise ArgumentError(
                "values",
                f"must have the shape {tuple(operator.shape[:1])} that the operator returns, but it is "
                f"{arguments.described(values)}",
            )
        if not checks.holds(checks.numbers("noise", noise) > 0):
            raise ArgumentError("noise", f"must be positive, but it is {noise}: give a small one")
        self.operator, self.obs, self.noise = operator, values, noise

    def __call__(self, x_0: Tensor) -> dist.Distribution:
        """The law of y given data of shape (n, *event_shape)."""
        if isinstance(self.operator, Tensor):
            x = x_0.flatten(1)
            if x.shape[1] != self.operator.shape[1]:
                raise ArgumentError(
                    "operator",
                    f"must have as many columns as data have numbers, {x.shape[1]}, but its shape is "
                    f"{tuple(self.operator.shape)}",
                )
            loc = x @ self.operator.to(x).T
        else:
            loc = self.operator(x_0)
        scale = torch.as_tensor(self.noise, dtype=loc.dtype, device=loc.device)
        return dist.Normal(loc, scale.expand(loc.shape)).to_event(loc.dim() - 1)


class Inpainting:
    """Some dimensions of the data are observed, exactly or with noise: the others are filled in.

    Arguments:
        mask: Which are known, a bool tensor of the event_shape, with some True and some False.
        values: What they are, a tensor of the event_shape; what it holds elsewhere does not matter.
        noise: The standard deviation of what is known; 0 where it is known exactly, for bits and levels.

    Raises:
        ValueError: If the mask is no such tensor, the values have another shape, or the noise is negative.

    Example:
        >>> first = pyrodiff.conditioning.Inpainting(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), noise=0.1)
        >>> first.obs
        tensor([0.5000])
    """

    def __init__(self, mask: Tensor, values: Tensor, noise: float = 0.0) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ArgumentError("mask", f"must be a bool tensor, but it is {arguments.described(mask)}: give mask == 1")
        if not bool(mask.any()) or bool(mask.all()):
            raise ArgumentError(
                "mask",
                f"must be True somewhere and False somewhere, but it is {bool(mask.any())} in all of its "
                f"{mask.numel()} numbers: with none known draw by a sampler, with all known pyrodiff.bound is the cost",
            )
        _check_values(values)
        if values.shape != mask.shape:
            raise ArgumentError(
                "values",
                f"must have the shape {tuple(mask.shape)} of the mask, but it is {arguments.described(values)}",
            )
        if not arguments.is_number(noise) or not 0 <= noise < math.inf:
            raise ArgumentError("noise", f"must be a number of at least 0, but it is {arguments.described(noise)}")
        self.mask, self.values, self.noise, self.obs = mask, values, noise, values[mask]

    def __call__(self, x_0: Tensor) -> dist.Distribution:
        """The law of what is known given data of shape (n, *event_shape)."""
        if x_0.shape[1:] != self.mask.shape:
            raise ArgumentError(
                "mask",
                f"must have the event_shape {tuple(x_0.shape[1:])} of the data, but its shape is "
                f"{tuple(self.mask.shape)}",
            )
        known = x_0[:, self.mask]
        return dist.Normal(known, self.noise).to_event(1) if self.noise > 0 else dist.Delta(known, event_dim=1)


def _check_values(values: object) -> None:
    if not isinstance(values, Tensor) or not checks.holds(values.isfinite()):
        got = arguments.described(values) if not isinstance(values, Tensor) else "not finite everywhere"
        raise ArgumentError("values", f"must be a tensor of finite numbers, but it is {got}")


_NORMAL = torch.distributions.Normal, torch.distributions.MultivariateNormal


class LinearGaussian(NamedTuple):
    """An observation N(y; A x_0, R).

    Arguments:
        A: With shape (M, D).
        R: With shape (M, M).
        y: With shape (M,); a constant that the mean adds is taken off.
    """

    A: Tensor
    R: Tensor
    y: Tensor


class Conditioned:
    r"""A diffusion and what is observed of its data: what a :class:`Twist` is given.

    Arguments:
        diffusion: The diffusion.
        observation: See :func:`posterior`.
        obs: y, where the observation does not carry it.

    Attributes:
        diffusion: The diffusion.
        y: What is observed; None of a program.
        filled: Of data known exactly, a datum with what is known, and something else elsewhere.
        is_gaussian: Whether the chain is Gaussian.
        dtype: That of the states.

    Raises:
        ValueError: If the observation is none of the diffusion's data, or y has another shape than its law.
    """

    def __init__(self, diffusion: Diffusion, observation: Callable, obs: Tensor | None = None) -> None:
        if not callable(observation):
            raise ArgumentError(
                "observation", f"must be called with data, but it is {arguments.described(observation)}"
            )
        own = getattr(observation, "obs", None)
        if own is not None and obs is not None:
            raise ArgumentError(
                "obs", f"must be None where the observation has its own, but it is {arguments.described(obs)}"
            )
        obs = own if obs is None else obs
        if not isinstance(obs, Tensor | None):
            raise ArgumentError("obs", f"must be a tensor, but it is {arguments.described(obs)}")
        self.diffusion, self.observation, model = diffusion, observation, diffusion.model
        self.is_gaussian = isinstance(model.forward_process, GaussianForward)
        self.dtype, of_floats = model.dtype(), obs is not None and obs.is_floating_point()
        if next(model.reverse.parameters(), None) is None and of_floats and self.dtype.is_floating_point:
            self.dtype = obs.dtype
        if obs is not None:  # a copy, since one of torch.inference_mode could not be differentiated by
            obs = obs.clone().to(self.dtype if of_floats and self.dtype.is_floating_point else obs.dtype)
        self.y = None if obs is None else obs.to(model.device)
        like = {"dtype": self.dtype, "device": model.device}
        x_0 = torch.randn((2, *model.event_shape), **like) if self.is_gaussian else None
        self._check(model.top(**like).expand((2,)).sample() if x_0 is None else x_0)

    def _check(self, x_0: Tensor) -> None:
        """Call the observation once, with two data."""
        law = self._traced(x_0).nodes["_RETURN"]["value"]
        self.is_program = not isinstance(law, Distribution)
        self.is_normal = not self.is_program and isinstance(innermost(law), _NORMAL)
        if self.is_program != (self.y is None):
            raise ArgumentError(
                "obs",
                f"must be given where the observation returns a distribution, and only there, but it is "
                f"{arguments.described(self.y)}, and what it returned is {arguments.described(law)}",
            )
        if self.is_program:
            self.log_likelihood(x_0)
        elif law.batch_shape != (2,) or law.event_shape != self.y.shape:
            raise ArgumentError(
                "observation",
                f"must return, for 2 data, a distribution with batch_shape (2,) and the event_shape "
                f"{tuple(self.y.shape)} of obs, but they are {tuple(law.batch_shape)} and {tuple(law.event_shape)}: "
                f"put .to_event(...) around it, or give obs of that shape",
            )
        elif self.known is not None:
            self._check_known(self.known)

    def _check_known(self, known: Inpainting) -> None:
        model = self.diffusion.model
        if self.diffusion.levels is None:
            raise ArgumentError(
                "noise",
                "must be positive where data have a density, since no twist here can bear data that are known "
                "exactly, but it is 0: give Inpainting(mask, values, noise=0.01), say",
            )
        y = torch.where(known.mask, known.values, -1.0 if self.is_gaussian else 0.0)
        self.filled = y.to(self.dtype).to(model.device)
        try:
            model.check(self.filled[None])
        except ValueError as error:
            raise ArgumentError("values", f"must be data where the mask is True: {error}") from None

    @property
    def known(self) -> Inpainting | None:
        """What is known exactly, if that is what is observed."""
        ours = self.observation
        return ours if isinstance(ours, Inpainting) and ours.noise == 0 else None

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """log p(y | x_0), of data with shape (n, *event_shape), with shape (n,)."""
        if not self.is_program:
            return self.observation(x_0).log_prob(self.y)
        trace, n = self._traced(x_0), len(x_0)
        trace.compute_log_prob(lambda name, site: site["is_observed"])
        parts = [trace.nodes[name]["log_prob"] for name in trace.observation_nodes]
        latent = [name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])]
        if latent or not parts or any(part.shape[-1:] != (n,) for part in parts):
            raise ArgumentError(
                "observation",
                f"must return a distribution, or be a program whose sites are all observed, in a plate of "
                f"the {n} data at dim=-1, but it is none: its latent sites are {latent}, its observed "
                f"ones {trace.observation_nodes}",
            )
        return sum(part.reshape(-1, n).sum(0) for part in parts)

    def _traced(self, x_0: Tensor) -> Trace:
        return poutine.trace(self.observation).get_trace(x_0)

    def estimate(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        r"""The denoiser's :math:`\hat x_0`; without a denoiser, the one that the Gaussian kernel's mean stands for.

        Arguments:
            x_t: The states, with shape (n, *event_shape).
            t: Their time, with shape (n,).
            *context: The context.

        Returns:
            A tensor with the shape of ``x_t``; of bits, the probability of a 1.

        Raises:
            ValueError: If there is neither.
        """
        model = self.diffusion.model
        if hasattr(model.reverse, "denoiser"):
            return model.reverse.denoiser(x_t, t, *context)
        if not self.is_gaussian:
            raise ArgumentError(
                "reverse",
                f"must have a denoiser for this twist where it is not Gaussian, but it is a "
                f"{type(model.reverse).__name__}, which has none: give it one as its attribute denoiser, or write a "
                f"Twist of your own",
            )
        weight_t, weight_0, _ = coefficients(model.forward_process.schedule.posterior(t), x_t)
        return (innermost(model.kernel(x_t, t, *context)).mean - weight_t * x_t) / weight_0

    def scales(self, t: int) -> tuple[float, float]:
        """Signal and noise of the schedule at t."""
        signal, noise = self.diffusion.forward_process.schedule.scales(t).tolist()
        return signal, noise

    @cached_property
    def linear(self) -> LinearGaussian:
        """The matrices of an observation that is linear and Gaussian.

        Raises:
            ValueError: If it is not.
        """
        event, like = self.diffusion.event_shape, {"dtype": self.dtype, "device": self.diffusion.model.device}
        x, z = torch.randn((2, *event), **like)
        law = None if self.is_program else self.observation(torch.stack([torch.zeros_like(x), x, z, 2 * x - 3 * z]))
        if not self.is_normal:
            raise ArgumentError(
                "observation",
                f"must return Normal(...).to_event(...) or MultivariateNormal for this twist, but it is "
                f"{arguments.described(law) if law else 'a program'}: give DenoiserTwist(), or a Twist of your own",
            )
        zero, *means, both = law.mean.flatten(1)
        expected = 2 * means[0] - 3 * means[1] + 2 * zero
        size = float((law.mean.abs() + law.stddev).amax())
        off = max(float((both - expected).abs().amax()), float((law.stddev - law.stddev[:1]).abs().amax()))
        if not off <= 100 * torch.finfo(self.dtype).eps ** 0.75 * size:
            raise ArgumentError(
                "operator",
                f"must be linear, with noise that is the same for all data, for this twist, but at random "
                f"data it is off by {off:.2g}: give DenoiserTwist(), or a Twist of your own",
            )
        basis = torch.eye(event.numel(), **like).unflatten(1, event)
        A = torch.cat([self.observation(rows).mean.flatten(1) for rows in basis.split(256)]) - zero
        R = law.variance[0].flatten().diag() if innermost(law) is not law else law.covariance_matrix[0]
        return LinearGaussian(A.T, R, self.y.to(A).flatten() - zero)


class Twist(ABC):
    r"""A guess :math:`\psi_t(x_t)` of :math:`p(y | x_t)`, and where to draw :math:`x_{t-1}` accordingly.

    A twist of one's own defines :meth:`log_prob`; with that alone particles are drawn from the chain and only weighed.
    Any positive function is allowed, and only a bad one is slow: :func:`posterior` warns where it leaves but a few
    particles of weight.

    Example:
        >>> class Near(pyrodiff.conditioning.Twist):  # a guess that knows nothing of the model
        ...     def log_prob(self, given, x_t, t, *context):
        ...         return -(x_t[:, 0] - given.y[0]) ** 2 / 2 / (1 + given.scales(int(t[0]))[1] ** 2)
    """

    def check(self, given: Conditioned) -> None:  # noqa: B027 - a twist need not define it
        """Refuse what the twist is not made for; nothing, by default.

        Arguments:
            given: The diffusion and what is observed.

        Raises:
            ValueError: If so.
        """

    @abstractmethod
    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        r"""The :math:`\log \psi_t(x_t)`, for t = 1..T; at t = 0 it is log p(y | x_0), which is not asked for.

        Arguments:
            given: The diffusion and what is observed.
            x_t: The states, with shape (n, *event_shape).
            t: Their time, the same everywhere, with shape (n,).
            *context: Tensors of n rows.

        Returns:
            A tensor with shape (n,).
        """

    def proposal(
        self, given: Conditioned, law: dist.Distribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.Distribution:
        r"""The law that :math:`x_s` is drawn from, s = t - 1; by default the chain's own.

        Arguments:
            given: The diffusion and what is observed.
            law: The chain's: :math:`p(x_T)` at s = T, the kernel, and the decoder's law at s = 0.
            s: The time of the state to draw, T..0.
            x_t: The states before, with shape (n, *event_shape); None at s = T.
            *context: Tensors of n rows.

        Returns:
            A distribution with batch_shape (n,) and the data's event_shape, whose support holds that of ``law`` where
            the observation is possible.
        """
        return law


class _LinearTwist(Twist):
    """A Gaussian twist N(y; o, S), linear around the kernel's mean, which the proposal takes in in closed form."""

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
        o, _, S = self.moments(given, x_t, t, *context)
        return _log_normal(given.linear.y - o, _cholesky(S))

    def proposal(
        self, given: Conditioned, law: dist.Distribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.Distribution:
        if not isinstance(innermost(law), torch.distributions.Normal):
            return law
        A, R, y = given.linear
        mean = innermost(law).mean
        if s == 0:
            o, H, S = mean.flatten(1) @ A.T, A.expand(len(mean), *A.shape), R.expand(len(mean), *R.shape)
        else:
            o, H, S = self.moments(given, mean, torch.full((len(mean),), s, device=mean.device), *context)
        return _Updated(law, y - o, H, S)

    @abstractmethod
    def moments(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean o of y, its derivative H in x_t and its covariance S, with shapes (n, M), (n, M, D) and (n, M, M)."""


class GaussianTwist(_LinearTwist):
    r"""For linear Gaussian observations of a Gaussian chain: Tweedie's mean and covariance, by Jacobian products.

    .. math:: \psi_t(x_t) = N\left(y; \; A \hat x_0, \; R + \tfrac{b_t^2}{a_t} A J A^T\right), \qquad
        J = \frac{\partial \hat x_0}{\partial x_t},

    the covariance made symmetric, its negative eigenvalues 0. The proposal is the kernel times the twist linear around
    the kernel's mean. Where data are Gaussian and kernels exact, all weights are equal. It takes two network calls and
    2 M derivatives a step, M being how many numbers are observed.

    References:
        Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2023), https://arxiv.org/abs/2310.06721
    """

    def moments(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, R, _ = given.linear
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
    r"""As :class:`GaussianTwist`, with the covariance :math:`b_t^2 / (a_t^2 + b_t^2)` of data N(0, I), no derivatives.

    .. math:: \psi_t(x_t) = N\left(y; \; A \hat x_0, \; R + \tfrac{b_t^2}{a_t^2 + b_t^2} A A^T\right)

    References:
        Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023): this covariance.
    """

    def moments(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, R, _ = given.linear
        signal, noise = given.scales(int(t[0]))
        total = signal**2 + noise**2
        o = given.estimate(x_t, t, *context).flatten(1) @ A.T
        shape = (len(o), *A.shape)
        return o, (signal / total * A).expand(shape), (R + noise**2 / total * A @ A.T).expand(len(o), *R.shape)


class DenoiserTwist(Twist):
    r"""The naive twist :math:`\psi_t(x_t) = p(y | x_0 = \hat x_0(x_t))`, for any observation.

    It takes the estimate for the datum, and is far too sure of it at large t: where the noise of the observation is
    small it collapses, and :func:`posterior` warns. Of a Gaussian chain the kernel's mean is moved by
    :math:`\sigma_t^2 \nabla \log \psi_{t-1}`; bits are drawn from the kernel.

    References:
        Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023): this estimate,
        https://arxiv.org/abs/2209.14687. Wu et al., 2023: as a twist.
    """

    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return given.log_likelihood(given.estimate(x_t, t, *context))

    def proposal(
        self, given: Conditioned, law: dist.Distribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.Distribution:
        base = innermost(law)
        if not isinstance(base, torch.distributions.Normal):
            return law
        with torch.enable_grad():
            x = base.mean.detach().requires_grad_()
            times = torch.full((len(x),), s, device=x.device)
            value = given.log_likelihood(x) if s == 0 else self.log_prob(given, x, times, *context)
            shift = _gradient(self, value.sum(), x)
        return dist.Normal(base.mean + base.variance * shift, base.stddev).to_event(x.dim() - 1)


class KnownTwist(Twist):
    r"""For numbers that are known exactly, of bits or of levels: what the denoiser believes them to be.

    .. math:: \psi_t(x_t) = \prod_{i \text{ known}} \hat p_i(y_i | x_t)

    The known are drawn from :math:`q(x_{t-1} | x_t, x_0 = y)`, which is where the forward process has them; the others
    from the kernel. Of levels, without :class:`LevelPrediction`, it is a Gaussian around :math:`\hat x_0`, as wide as
    that of :class:`IsotropicTwist` and half a bin more.
    """

    def check(self, given: Conditioned) -> None:
        if given.known is None:
            raise ArgumentError(
                "observation",
                "must be Inpainting(mask, values, noise=0) for KnownTwist, but it is another: give another twist",
            )

    def log_prob(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        mask = given.known.mask.to(x_t.device)
        return self._belief(given, x_t, t, *context)[:, mask].sum(1)

    def _belief(self, given: Conditioned, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """The log probability of each known number, with the shape of ``x_t``."""
        y = given.filled.expand(x_t.shape)
        denoiser, most = getattr(given.diffusion.reverse, "denoiser", None), -math.log(torch.finfo(x_t.dtype).eps)
        if isinstance(denoiser, LevelPrediction):
            k = ((y + 1) / 2 * (denoiser.levels - 1)).round().long().clamp(0, denoiser.levels - 1)
            return denoiser.log_probs(x_t, t, *context).clamp(min=-most).gather(-1, k[..., None])[..., 0]
        if given.is_gaussian:
            signal, noise = given.scales(int(t[0]))
            deviation = (noise**2 / (signal**2 + noise**2)) ** 0.5 + 1 / (given.diffusion.levels - 1)
            return dist.Normal(given.estimate(x_t, t, *context), deviation).log_prob(y)
        if isinstance(denoiser, LogitPrediction):
            logits = denoiser.output(x_t, t, *context)
        else:
            logits = given.estimate(x_t, t, *context).clamp(0, 1).logit()
        return dist.Bernoulli(logits=logits.clamp(-most, most)).log_prob(y)

    def proposal(
        self, given: Conditioned, law: dist.Distribution, s: int, x_t: Tensor | None, *context: Tensor
    ) -> dist.Distribution:
        process, y = given.diffusion.forward_process, given.filled.expand(law.batch_shape + law.event_shape)
        times = torch.full(law.batch_shape, s, device=y.device)
        if s == 0:
            known = dist.Delta(y)
        else:
            known = innermost(process.marginal(y, times) if x_t is None else process.posterior(x_t, y, times + 1))
        return _Partly(given.known.mask.to(y.device), known, innermost(law), len(law.event_shape))


def _gradient(twist: Twist, value: Tensor, x: Tensor) -> Tensor:
    """The derivative of a number in x, where there is one."""
    found = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise ValueError(
            f"diffusion and observation must have a gradient in x_t for {type(twist).__name__}, but there is none: "
            f"leave out torch.no_grad() in the network, or give IsotropicTwist(), which needs none"
        )
    return found


def _cholesky(covariance: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool(info.any()):
        raise ArgumentError(
            "noise",
            f"must be large enough for covariances to be positive in {covariance.dtype}, but some are not: give "
            f"more noise, fewer numbers that say the same, or float64 (diffusion.double() and obs.double())",
        )
    return factor


def _log_normal(off: Tensor, cholesky: Tensor) -> Tensor:
    """log N(off; 0, L L^T), with shape (n,)."""
    white = torch.linalg.solve_triangular(cholesky, off[..., None], upper=False)[..., 0]
    log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(white**2).sum(-1) / 2 - log_det - off.shape[-1] / 2 * math.log(2 * math.pi)


class _Updated(dist.TorchDistribution):
    r"""N(μ, σ²) times N(off; H (x - μ), S), normalised: N(μ + K off, σ² (I - K H)), by Matheron's rule.

    Arguments:
        law: N(μ, σ²), with batch_shape (n,).
        off: y - o, with shape (n, M).
        H: With shape (n, M, D).
        S: With shape (n, M, M).
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, law: dist.Distribution, off: Tensor, H: Tensor, S: Tensor) -> None:
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        base = innermost(law)
        self.law, self.off, self.H = law, off, H
        self.mu, self.gain = base.mean.flatten(1), H.mT * base.variance.flatten(1)[..., None]  # σ² Hᵀ
        self.of_S, self.of_G = _cholesky(S), _cholesky(H @ self.gain + S)

    def _moved(self, off: Tensor) -> Tensor:
        return (self.gain @ torch.cholesky_solve(off[..., None], self.of_G))[..., 0]

    @property
    def mean(self) -> Tensor:
        return (self.mu + self._moved(self.off)).view(self.law.batch_shape + self.law.event_shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        x = self.law.sample(sample_shape)
        noise = (self.of_S @ torch.randn_like(self.off)[..., None])[..., 0]
        predicted = (self.H @ (x.flatten(1) - self.mu)[..., None])[..., 0] + noise
        return x + self._moved(self.off - predicted).view(x.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        rest = self.off - (self.H @ (x.flatten(1) - self.mu)[..., None])[..., 0]
        return self.law.log_prob(x) + _log_normal(rest, self.of_S) - _log_normal(self.off, self.of_G)


class _Partly(dist.TorchDistribution):
    """Independent numbers, of one law where a mask is and of another elsewhere."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, mask: Tensor, inside: Distribution, outside: Distribution, event_dim: int) -> None:
        shape = outside.batch_shape
        super().__init__(shape[: len(shape) - event_dim], shape[len(shape) - event_dim :], validate_args=False)
        self.mask, self.inside, self.outside = mask, inside, outside

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return torch.where(self.mask, self.inside.sample(sample_shape), self.outside.sample(sample_shape))

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.inside.log_prob(x), self.outside.log_prob(x)).flatten(1).sum(1)


@dataclass(frozen=True, repr=False, eq=False)
class Posterior:
    """Weighted samples of p(x_0 | y), and the evidence p(y). Printed, it is a table.

    Arguments:
        samples: The x_0, with shape (n, *event_shape), island after island.
        log_weights: Their log weights in nats, with shape (n,); the mean weight is the estimate of p(y).
        effective_sample_size: Of x_T, ..., x_0, before particles were resampled, summed over the islands; with shape
            (T + 1,), in 1..n.
        num_islands: How many groups of particles walked by themselves.
    """

    samples: Tensor
    log_weights: Tensor
    effective_sample_size: Tensor
    num_islands: int

    @property
    def islands(self) -> Tensor:
        """The log evidence of each island, with shape (num_islands,)."""
        return _log_mean(self.log_weights.view(self.num_islands, -1))

    @property
    def log_evidence(self) -> Tensor:
        """log p(y) in nats, with shape (): of the mean over the islands of unbiased estimates of p(y)."""
        return _log_mean(self.islands)

    @property
    def standard_error(self) -> Tensor:
        """That of the log evidence, from how the islands differ, with shape (); NaN of one island."""
        ratios = (self.islands - self.log_evidence).exp()
        return ratios.std() / self.num_islands**0.5 if self.num_islands > 1 else ratios.new_tensor(math.nan)

    @property
    def mean(self) -> Tensor:
        """The posterior's mean, with the event_shape."""
        return torch.tensordot(self.log_weights.softmax(0), self.samples.to(self.log_weights), 1)

    @property
    def standard_deviation(self) -> Tensor:
        """The posterior's standard deviation, number by number, with the event_shape."""
        return torch.tensordot(self.log_weights.softmax(0), (self.samples - self.mean) ** 2, 1).sqrt()

    def __str__(self) -> str:
        n, ess = len(self.samples), self.effective_sample_size
        lines = [
            f"posterior given an observation, {n} particles in {self.num_islands} islands, T = {len(ess) - 1}",
            f"{'log evidence':34}{float(self.log_evidence):10.4f} ± {float(self.standard_error):.4f} nats",
            f"{'effective sample size at t = 0':34}{float(ess[-1]):10.1f} of {n}",
            f"{f'the least, at t = {len(ess) - 1 - int(ess.argmin())}':34}{float(ess.min()):10.1f}",
        ]
        if len(self.mean.flatten()) <= 8:
            for i, moments in enumerate(torch.stack([self.mean, self.standard_deviation]).flatten(1).T.tolist()):
                lines.append("{:34}{:10.4f}, {:.4f}".format(f"x_0[{i}], mean and deviation", *moments))
        return "\n".join(lines)

    def __repr__(self) -> str:
        evidence = f"{float(self.log_evidence):.6g} ± {float(self.standard_error):.2g} nats"
        return f"<{type(self).__name__}: {len(self.samples)} particles, log evidence {evidence}>"


def posterior(
    diffusion: Diffusion,
    observation: Callable,
    *context: Tensor,
    obs: Tensor | None = None,
    num_particles: int = 64,
    num_islands: int = 4,
    twist: Twist | None = None,
    generator: torch.Generator | int | None = None,
) -> Posterior:
    r"""Draw from :math:`p(x_0 | y)` of a chain by twisted sequential Monte Carlo, and estimate :math:`\log p(y)`.

    Arguments:
        diffusion: The model; a chain of fewer steps, ``diffusion.subchain(times)``, is another.
        observation: A function of data with shape (n, *event_shape), which returns the law of y with batch_shape (n,);
            or :class:`Inpainting` or :class:`Linear`; or a Pyro program called with these data, whose sites are all
            observed, in a plate of n at dim=-1.
        *context: What is known of the datum besides, for the network: tensors of one row.
        obs: y, with the law's event_shape, where the observation does not carry it.
        num_particles: How many particles n in all, a multiple of the islands.
        num_islands: In how many groups, which know nothing of each other: from these is the standard error.
        twist: :class:`GaussianTwist` if not given, for a linear Gaussian observation of a Gaussian chain, and
            :class:`KnownTwist` for bits and levels that are known exactly.
        generator: A generator or a seed; a seed from torch's source if not given.

    Returns:
        Samples, weights and evidence.

    Raises:
        ValueError: If an argument is of another kind or out of range, ``obs`` has another shape than the observation's
            law, the twist is not made for the observation or the chain, or there is none by default.

    Warns:
        UserWarning: If the effective sample size collapsed: then neither samples nor evidence are to be trusted.

    References:
        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), Algorithm 1,
        https://arxiv.org/abs/2306.17775

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> first = pyrodiff.conditioning.Inpainting(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), noise=0.3)
        >>> found = pyrodiff.conditioning.posterior(diffusion, first, generator=0)
        >>> found.samples.shape, found.log_weights.shape, found.log_evidence.shape
        (torch.Size([64, 2]), torch.Size([64]), torch.Size([]))
    """
    checks.instance("diffusion", diffusion, Diffusion)
    if diffusion.model.is_random():
        raise ArgumentError("diffusion", "must have no random weights (PyroSample) to be conditioned, but it has some")
    n = arguments.positive_int("num_particles", num_particles)
    islands = arguments.positive_int("num_islands", num_islands)
    if n % islands:
        raise ArgumentError("num_particles", f"must be a multiple of the {islands} islands, but it is {n}")
    checks.context(context, 1, diffusion.model.device, "obs")
    with torch.inference_mode(False), evaluating(diffusion, generator), torch.no_grad():
        context = tuple(values.clone().expand(n, *values.shape[1:]) for values in context)
        with validated(diffusion.model.device):
            given = Conditioned(diffusion, observation, obs)
        twist = _default(given) if twist is None else twist
        checks.instance("twist", twist, Twist)
        twist.check(given)
        found = _run(given, twist, n, islands, context)
    _warn_of_collapse(found, twist)
    return found


def _default(given: Conditioned) -> Twist:
    """The twist of an observation, where there is a good one."""
    if given.known is not None:
        return KnownTwist()
    if given.is_gaussian and given.is_normal:
        return GaussianTwist()
    raise ArgumentError(
        "twist",
        "must be given where the observation is neither linear and Gaussian, of a Gaussian chain, nor exact, "
        "Inpainting(mask, values, noise=0), but it is None: give DenoiserTwist(), or a Twist of your own",
    )


def _run(given: Conditioned, twist: Twist, n: int, islands: int, context: tuple[Tensor, ...]) -> Posterior:
    model, T = given.diffusion.model, given.diffusion.num_steps
    x, psi, log_w, sizes = None, 0.0, None, []
    for s in range(T, -1, -1):
        times = torch.full((n,), s, device=model.device)
        with validated(model.device) if s >= T - 1 else nullcontext():
            if x is None:
                law = model.top(given.dtype, model.device).expand((n,))
            else:
                x, psi, log_w = _resampled(x, psi, log_w)
                law = model.kernel(x, times + 1, *context)
                law = model.decoded(law, x) if s == 0 else law
        q = twist.proposal(given, law, s, x, *context)
        x = q.sample()
        now = given.log_likelihood(x) if s == 0 else twist.log_prob(given, x, times, *context)
        _check_twist(now, n, s)
        ratio = 0.0 if q is law else (law.log_prob(x) - q.log_prob(x)).view(islands, -1)
        now = now.view(islands, -1)
        log_w = torch.zeros_like(now) if log_w is None else log_w
        log_w = torch.where(log_w.isneginf(), log_w, log_w + ratio + now - psi)
        psi = now
        sizes.append(_size(log_w).sum())
    return Posterior(x, log_w.flatten(), torch.stack(sizes), islands)


def _check_twist(value: object, n: int, s: int) -> None:
    name = "observation" if s == 0 else "twist"
    if not isinstance(value, Tensor) or value.shape != (n,):
        raise ArgumentError(
            name, f"must return {n} log probabilities at t = {s}, but it is {arguments.described(value)}"
        )
    if bool((value.isnan() | value.isposinf()).any()):
        raise ArgumentError(name, f"must have finite log probabilities, but at t = {s} some are {float(value.amax())}")


def _resampled(x: Tensor, psi: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States, twists and log weights of shape (islands, m), each island resampled where it has to be."""
    islands, m = log_w.shape
    needs = (_size(log_w) < m / 2)[:, None]
    index = torch.where(needs, _systematic(log_w, m), torch.arange(m, device=x.device))
    log_w = torch.where(needs, _log_mean(log_w)[:, None], log_w)
    rows = (index + m * torch.arange(islands, device=x.device)[:, None]).flatten()
    return x[rows], psi.gather(1, index), log_w


def _systematic(log_w: Tensor, m: int) -> Tensor:
    """Ancestors of m particles for each row of log weights, one uniform number a row (Kitagawa, 1996)."""
    weights = log_w.softmax(1).nan_to_num(1.0)  # of a row without weight, any
    ends = (weights.cumsum(1) / weights.sum(1, keepdim=True)).clamp(max=1.0)
    u = torch.rand(len(log_w), 1, dtype=log_w.dtype, device=log_w.device)
    points = (torch.arange(m, dtype=log_w.dtype, device=log_w.device) + u) / m
    return torch.searchsorted(ends, points).clamp(max=log_w.shape[1] - 1)


def _log_mean(log_w: Tensor) -> Tensor:
    """The logarithm of the mean over the last dimension."""
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])


def _size(log_w: Tensor) -> Tensor:
    """The effective sample size over the last dimension; 0 where there is no weight."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp().nan_to_num(0.0)


def _warn_of_collapse(found: Posterior, twist: Twist) -> None:
    """Warn where an island's particles were as good as one, or where the islands contradict each other."""
    ess, m = found.effective_sample_size, len(found.samples) // found.num_islands
    worst, spread = int(ess.argmin()), float(found.islands.std()) if found.num_islands > 1 else 0.0
    each = float(ess[worst]) / found.num_islands
    if each < min(2.0, m / 4) or not (spread <= 1 or float(found.standard_error) <= 0.25):
        warnings.warn(
            f"the effective sample size collapsed, with {type(twist).__name__}: at t = {len(ess) - 1 - worst} it was "
            f"{each:.1f} of the {m} particles of an island, and the islands' log evidence differs by {spread:.1f} "
            f"nats, so that neither samples nor evidence can be trusted: give more particles or another twist",
            UserWarning,
            stacklevel=3,
        )
