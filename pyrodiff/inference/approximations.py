r"""Samples given an observation that no weight corrects: known values put in place, kernels moved up a guess.

Two recipes from the literature. Neither has the posterior's law, however many steps the chain has, and neither says how
far it is off: :func:`posterior`, which weighs its particles, does both.

- *Replacement* puts what is known, with the noise of its time, into the state at each step. What is unknown is drawn as
  if the known part were the chain's own, and what will be known at later steps is not looked at.
- *Repeated multiplication* (2015) multiplies each kernel by r(x_t), the factor that the data are multiplied by. Right
  would be :math:`r_t(x_t) = \mathbb{E}[r(x_0) | x_t]`, which is flatter: see :func:`product`.

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
    r"""Fill in what is unknown by replacement, which is fast and biased; :func:`posterior` is right.

    At each step the known numbers are drawn from :math:`q(x_{t-1} | x_0 = y)`, the others from the kernel. With
    ``num_repeats`` above 1 each step is gone back, :math:`q(x_t | x_{t-1})`, and taken again so often, which brings
    known and unknown into agreement, less biased at as many times the network calls.

    The law of what is filled in is not p(x_0 | y), nor does it become that with more steps: of numbers that hang
    together it errs in mean and spread. There are no weights, no evidence, and nothing that would say how wrong it is.

    Arguments:
        diffusion: The diffusion, of numbers with a density, of levels or of bits.
        observation: What is known; where it has noise, y plus noise of that deviation is taken for the data.
        *context: What is known of the datum besides, for the network: tensors of one row.
        num_samples: How many samples n.
        num_repeats: How often each step is taken, U of RePaint.
        generator: A generator or a seed; a seed from torch's source if not given.

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
    """Data of n rows with what is known, drawn anew for each where it is known with noise; something else elsewhere."""
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
    r"""Draw from the chain whose kernels are multiplied by a twist, without weights: 2015's recipe, an approximation.

    Of r(x_0) = p(y | x_0), each kernel is :math:`\propto p(x_{t-1} | x_t) \, r(x_{t-1})` if no twist is given. More
    steps do not make that right: each takes r in once more. With the twist :class:`GaussianTwist`, it is guidance by
    Tweedie's moments. Only the backward message is right without weights (:func:`product`), and any twist is with them
    (:func:`posterior`).

    Arguments:
        diffusion, observation, *context, obs, generator: As of :func:`posterior`.
        num_samples: How many samples n.
        twist: A twist with a proposal of its own; :class:`RepeatedTwist` if not given.

    Returns:
        A tensor with shape (n, *event_shape).

    Raises:
        ValueError: As :func:`posterior`; also if the twist leaves a kernel as it is, which then knows nothing of y.

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
