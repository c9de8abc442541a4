r"""Unweighted, approximate samples given an observation: by replacement of known values, or by guided kernels.

Two recipes from the literature. Neither samples the posterior exactly, however many steps the chain has, or tells how
far off it is: :func:`posterior`, which weights its particles, does both.

- *Replacement* puts the known values, with the noise of time t, into the state at each step. The unknown part is drawn
  as if the known part came from the chain itself, without regard to the known values of later steps.
- *Repeated multiplication* (Sohl-Dickstein et al.) multiplies each kernel by r(x_t), the factor of the data. The exact
  factor would be :math:`r_t(x_t) = \mathbb{E}[r(x_0) | x_t]`, which is flatter: see :func:`product`.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.5,
    https://arxiv.org/abs/1503.03585

    RePaint: Inpainting using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), Algorithm 1,
    https://arxiv.org/abs/2201.09865

    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 2.2: what
    replacement leaves out, https://arxiv.org/abs/2306.17775
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..pair.diffusion import Diffusion
from .observations import Conditioned, Inpainting, conditioning
from .twists import RepeatedTwist, Twist

__all__ = ["perturbed", "replacement"]


def replacement(
    diffusion: Diffusion,
    observation: Inpainting,
    *context: Tensor,
    num_samples: int = 64,
    num_repeats: int = 1,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Inpaint by replacement, which is fast but biased; :func:`posterior` is exact in the limit.

    At each step the known numbers are drawn from :math:`q(x_{t-1} | x_0 = y)`, the others from the kernel. With
    ``num_repeats`` above 1 each step is undone by :math:`q(x_t | x_{t-1})` and repeated, which brings known and unknown
    into agreement: less bias, at that many times the network calls.

    The result is not distributed as p(x_0 | y), not even with more steps: for dependent numbers, mean and spread are
    wrong. There are no weights, no evidence, and no estimate of the error.

    Arguments:
        diffusion: The diffusion, of numbers with a density, of levels or of bits.
        observation: The known values; if it has noise, y plus noise of that standard deviation is taken for the data.
        *context: The context of the datum, for the network: tensors of one row.
        num_samples: How many samples n.
        num_repeats: How often each step is taken, U of RePaint.
        generator: A generator or a seed; a seed from torch's global generator if not given.

    Returns:
        A tensor with shape (n, *event_shape).

    Raises:
        ValueError: If an argument is of another kind or out of range, or the mask has another shape than a datum.

    References:
        RePaint: Inpainting using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), Algorithm 1,
        https://arxiv.org/abs/2201.09865

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> first = pyrodiff.Inpainting(torch.tensor([True, False]), torch.tensor([0.5, 0.0]))
        >>> pyrodiff.replacement(diffusion, first, num_samples=3, generator=0)[:, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    n = arguments.positive_int("num_samples", num_samples)
    repeats = arguments.positive_int("num_repeats", num_repeats)
    checks.instance("observation", observation, Inpainting)
    with conditioning(diffusion, observation, context, None, n, generator) as (given, rows):
        q, T, y = diffusion.forward_process, diffusion.num_steps, _values(given, n)
        mask = observation.mask.to(y.device)

        def step(before: Tensor | None, s: int) -> Tensor:
            known = q.marginal(y, torch.full((n,), s, device=y.device)).sample() if s > 0 else y
            return torch.where(mask, known, given.law(s, before, n, *rows).sample())

        x = step(None, T)
        for s in range(T - 1, -1, -1):
            x = step(x, s)
            for _ in range(repeats - 1 if s > 0 else 0):
                x = step(q.transition(x, torch.full((n,), s + 1, device=y.device)).sample(), s)
    return x


def _values(given: Conditioned, n: int) -> Tensor:
    """n rows of data with the known values, with fresh noise per row if there is noise; other values are arbitrary."""
    seen: Any = given.observation
    if seen.noise == 0:
        return given.filled.expand(n, *given.filled.shape)
    y = seen.values.to(given.dtype).to(given.diffusion.model.device)
    return y + seen.noise * torch.randn((n, *y.shape), dtype=y.dtype, device=y.device)


def perturbed(
    diffusion: Diffusion,
    observation: Callable,
    *context: Tensor,
    obs: Tensor | None = None,
    num_samples: int = 64,
    twist: Twist | None = None,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Draw from the chain whose kernels are multiplied by a twist, without weights: an approximation.

    With r(x_0) = p(y | x_0) and no twist given, each kernel is :math:`\propto p(x_{t-1} | x_t) \, r(x_{t-1})`, as in
    the paper. More steps do not make that exact: each multiplies by r once more. With the twist :class:`GaussianTwist`,
    it is guidance by Tweedie's moments. Without weights only the backward message is exact (:func:`product`); with
    weights, any twist is (:func:`posterior`).

    Arguments:
        diffusion, observation, *context, obs, generator: As of :func:`posterior`.
        num_samples: How many samples n.
        twist: A twist with a proposal of its own; :class:`RepeatedTwist` if not given.

    Returns:
        A tensor with shape (n, *event_shape).

    Raises:
        ValueError: As :func:`posterior`; also if the twist leaves a kernel unchanged, which then ignores y.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.5,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> total = pyrodiff.Linear(torch.ones(1, 2), torch.tensor([1.0]), noise=0.5)
        >>> pyrodiff.perturbed(diffusion, total, num_samples=3, generator=0).shape
        torch.Size([3, 2])
    """
    n = arguments.positive_int("num_samples", num_samples)
    with conditioning(diffusion, observation, context, obs, n, generator) as (given, rows):
        given.refuse_exact_densities()
        twist = RepeatedTwist() if twist is None else twist
        checks.instance("twist", twist, Twist)
        twist.check(given)
        before: Tensor | None = None
        for s in range(diffusion.num_steps, -1, -1):
            law = given.law(s, before, n, *rows)
            q = twist.proposal(given, law, s, before, *rows)
            if q is law:
                raise ArgumentError(
                    "twist",
                    f"must have a proposal of its own where nothing is weighed, but {type(twist).__name__} leaves the "
                    f"law of x_{s} as it is: give posterior(..., twist=...), which weighs",
                )
            before = x = q.sample()
    return x
