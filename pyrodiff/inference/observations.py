r"""Observations of data, :math:`p(y | x_0)`: a matrix and noise, a part of the data, or any distribution."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients
from ..pair.diffusion import Diffusion
from ..pair.entropy import innermost
from ..process.forward import GaussianForward
from ..running.evaluation import evaluating, validated

__all__ = ["Conditioned", "Inpainting", "Linear", "LinearGaussian", "conditioning"]


class Linear:
    r"""An observation :math:`y = A x_0 + N(0, \text{noise}^2)`: a blur, a picture at less resolution, a projection.

    Arguments:
        operator: A, a matrix with shape (M, D) for data of D numbers in all; or a linear function of data with shape
            (n, *event_shape) that returns a tensor of n rows.
        values: y, with shape (M,), or that of a row.
        noise: The standard deviation, positive: a number, or a tensor that broadcasts to y.

    Raises:
        ValueError: If the operator is neither, or the noise is not positive. Whether a function is linear is checked
            only by the twists that need it.

    Example:
        >>> pairs = pyrodiff.Linear(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0.3]), noise=0.1)
        >>> pairs(torch.ones(2, 3)).mean
        tensor([[1.],
                [1.]])
    """

    def __init__(self, operator: Tensor | Callable[[Tensor], Tensor], values: Tensor, noise: float | Tensor) -> None:
        matrix = operator if isinstance(operator, Tensor) and operator.dim() == 2 else None
        if matrix is None and (isinstance(operator, Tensor) or not callable(operator)):
            raise ArgumentError(
                "operator",
                f"must be a matrix of shape (M, D) or a function of data, but it is {arguments.described(operator)}",
            )
        _check_values(values)
        if matrix is not None and values.shape != matrix.shape[:1]:
            raise ArgumentError(
                "values",
                f"must have the shape {tuple(matrix.shape[:1])} that the operator returns, but it is "
                f"{arguments.described(values)}",
            )
        given = checks.numbers("noise", noise)
        if not checks.holds((given > 0) & given.isfinite()):
            raise ArgumentError("noise", f"must be positive and finite, but it is {noise}: give a small one for none")
        self.operator, self.obs, self.noise = operator, values, noise

    def __call__(self, x_0: Tensor) -> dist.TorchDistribution:
        """The distribution of y given data of shape (n, *event_shape)."""
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
        values: Their values, a tensor of the event_shape; other entries do not matter.
        noise: The standard deviation of the known values; 0 if they are exact, for bits and levels.

    Raises:
        ValueError: If the mask is no such tensor, the values have another shape, or the noise is negative.

    Example:
        >>> first = pyrodiff.Inpainting(torch.tensor([True, False]), torch.tensor([0.5, 0.0]), noise=0.1)
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

    def __call__(self, x_0: Tensor) -> dist.TorchDistribution:
        """The distribution of the known values given data of shape (n, *event_shape)."""
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
        y: With shape (M,), with the constant part of the mean subtracted.
    """

    A: Tensor
    R: Tensor
    y: Tensor


class Conditioned:
    r"""A diffusion and an observation of its data; a :class:`Twist` is called with it.

    Arguments:
        diffusion: The diffusion.
        observation: See :func:`posterior`.
        obs: y, if the observation does not hold it.

    Attributes:
        diffusion: The diffusion.
        y: The observed values; None for a program. filled: For exactly known values, a datum with these, and arbitrary
            values elsewhere.
        is_gaussian: Whether the chain is Gaussian.
        dtype: That of the states.

    Raises:
        ValueError: If the observation does not fit the diffusion's data, or y has another shape than its distribution.
    """

    def __init__(self, diffusion: Diffusion, observation: Callable, obs: Tensor | None = None) -> None:
        checks.instance("diffusion", diffusion, Diffusion)
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
        self.dtype, self.y = model.dtype(), None
        if obs is not None:
            is_float = obs.is_floating_point() and self.dtype.is_floating_point
            if is_float and next(model.reverse.parameters(), None) is None:
                self.dtype = obs.dtype
            # A copy, since one of torch.inference_mode could not be differentiated by.
            self.y = obs.clone().to(self.dtype if is_float else obs.dtype).to(model.device)
        if self.is_gaussian:
            self._check(torch.randn((2, *model.event_shape), dtype=self.dtype, device=model.device))
        else:
            self._check(model.top(self.dtype, model.device).expand(torch.Size([2])).sample())

    def _check(self, x_0: Tensor) -> None:
        """Call the observation once, with two data."""
        law: Any = self._traced(x_0).nodes["_RETURN"]["value"]
        self.is_program = not isinstance(law, Distribution)
        self.is_normal = not self.is_program and isinstance(innermost(law), _NORMAL)
        if self.is_program != (self.y is None):
            raise ArgumentError(
                "obs",
                f"must be given where the observation returns a distribution, and only there, but it is "
                f"{arguments.described(self.y)}, and what it returned is {arguments.described(law)}",
            )
        if self.y is None:
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

    def refuse_exact_densities(self) -> None:
        """Refuse exactly known values where data have a density.

        Raises:
            ValueError: If so: every weight would be 0.
        """
        if self.known is not None and self.diffusion.levels is None:
            raise ArgumentError(
                "noise",
                "must be positive where data have a density, since no twist here can bear data that are known "
                "exactly, but it is 0: give Inpainting(mask, values, noise=0.01), say",
            )

    def _check_known(self, known: Inpainting) -> None:
        model = self.diffusion.model
        y = torch.where(known.mask, known.values, -1.0 if self.is_gaussian else 0.0)
        self.filled = y.to(self.dtype).to(model.device)
        try:
            model.check(self.filled[None])
        except ValueError as error:
            raise ArgumentError("values", f"must be data where the mask is True: {error}") from None

    @property
    def known(self) -> Inpainting | None:
        """The observation, if it is of exactly known values."""
        ours = self.observation
        return ours if isinstance(ours, Inpainting) and ours.noise == 0 else None

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """log p(y | x_0) for data with shape (n, *event_shape), with shape (n,)."""
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
        return torch.stack([part.reshape(-1, n).sum(0) for part in parts]).sum(0)

    def _traced(self, x_0: Tensor) -> Trace:
        return poutine.trace(self.observation).get_trace(x_0)

    def estimate(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        r"""The denoiser's :math:`\hat x_0`; without a denoiser, the one that the Gaussian kernel's mean implies.

        Arguments:
            x_t: The states, with shape (n, *event_shape).
            t: Their time, with shape (n,).
            *context: The context.

        Returns:
            A tensor with the shape of ``x_t``; of bits, the probability of a 1.

        Raises:
            ValueError: If there is no denoiser and the chain is not Gaussian.
        """
        model = self.diffusion.model
        denoiser: Any = getattr(model.reverse, "denoiser", None)
        if denoiser is not None:
            return denoiser(x_t, t, *context)
        if not self.is_gaussian:
            raise ArgumentError(
                "reverse",
                f"must have a denoiser for this twist where it is not Gaussian, but it is a "
                f"{type(model.reverse).__name__}, which has none: give it one as its attribute denoiser, or write a "
                f"Twist of your own",
            )
        weight_t, weight_0, _ = coefficients(model.forward_process.schedule.posterior(t), x_t)
        kernel: Any = innermost(model.kernel(x_t, t, *context))
        return (kernel.mean - weight_t * x_t) / weight_0

    def law(self, s: int, x_t: Tensor | None, n: int, *context: Tensor) -> dist.TorchDistribution:
        """The chain's own distribution of x_s given x_{s+1}: p(x_T), the kernel, or, at s = 0, the decoder's.

        Arguments:
            s: The time, in 0..T.
            x_t: The states at s + 1, with shape (n, *event_shape); None at s = T.
            n: How many states there are.
            *context: Tensors of n rows.

        Returns:
            A distribution with batch_shape (n,); validated at the first two times.
        """
        model = self.diffusion.model
        with validated(model.device) if s >= self.diffusion.num_steps - 1 else nullcontext():
            if x_t is None:
                return model.top(self.dtype, model.device).expand(torch.Size([n]))
            kernel = model.kernel(x_t, torch.full((n,), s + 1, device=model.device), *context)
            return model.decoded(kernel, x_t) if s == 0 else kernel

    def scales(self, t: int) -> tuple[float, float]:
        """Signal and noise of the schedule at t."""
        signal, noise = self.diffusion.forward_process.schedule.scales(t).tolist()
        return signal, noise

    @property
    def linear(self) -> LinearGaussian:
        """The matrices of a linear Gaussian observation, extracted at each call.

        Raises:
            ValueError: If it is not.
        """
        event, device = self.diffusion.event_shape, self.diffusion.model.device
        source = torch.Generator().manual_seed(0)  # its own generator, so that other draws do not change
        x, z = torch.randn((2, *event), generator=source, dtype=self.dtype).to(device)
        law: Any = (
            None if self.is_program else self.observation(torch.stack([torch.zeros_like(x), x, z, 2 * x - 3 * z]))
        )
        if self.y is None or not self.is_normal:
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
        last: Any = innermost(law)
        R = last.variance[0].flatten().diag() if last is not law else law.covariance_matrix[0]
        basis = torch.eye(event.numel(), dtype=self.dtype, device=device).unflatten(1, event)
        A = torch.cat([self.observation(rows).mean.flatten(1) for rows in basis.split(256)]) - zero
        return LinearGaussian(A.T, R, self.y.to(A).flatten() - zero)


@contextmanager
def conditioning(
    diffusion: Diffusion,
    observation: Callable,
    context: tuple[Tensor, ...],
    obs: Tensor | None,
    n: int,
    generator: torch.Generator | int | None,
) -> Iterator[tuple[Conditioned, tuple[Tensor, ...]]]:
    """The context of conditional sampling: evaluation mode, no gradients, its own seed; yields a :class:`Conditioned`.

    Arguments:
        diffusion: The diffusion, without random weights.
        observation: See :func:`posterior`.
        context: Tensors of one row.
        obs: y, if the observation does not hold it.
        n: The number of rows to expand the context to.
        generator: A generator, a seed, or None for torch's global generator.

    Yields:
        The diffusion with the observation, and the context with n rows.

    Raises:
        ValueError: If one of them is something else.
    """
    checks.instance("diffusion", diffusion, Diffusion)
    if diffusion.model.is_random():
        raise ArgumentError("diffusion", "must have no random weights (PyroSample) to be conditioned, but it has some")
    checks.context(context, 1, diffusion.model.device, "obs")
    with torch.inference_mode(False), evaluating(diffusion, generator), torch.no_grad():
        rows = tuple(values.clone().expand(n, *values.shape[1:]) for values in context)
        with validated(diffusion.model.device):
            given = Conditioned(diffusion, observation, obs)
        yield given, rows
