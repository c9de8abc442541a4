r"""Score matching: losses for a score network, or for minus the gradient of an energy; and choices of the noise.

The score of a density is the gradient of its logarithm, :math:`\nabla \log p(x)`. A loss compares it with a *score*
:math:`s`, any function from x, with shape (B, \*event_shape), to a tensor of the same shape: a network, or
:func:`minus_gradient` of an energy. Each loss is per datum, with shape (B,); minimise its mean over the data. With D
numbers per datum,

.. math::
    \text{explicit:} \quad & \tfrac12 \lVert s(x) - \nabla \log p(x) \rVert^2 \\
    \text{implicit:} \quad & \tfrac12 \lVert s(x) \rVert^2 + \nabla \cdot s(x) \\
    \text{sliced:} \quad & \tfrac12 \lVert s(x) \rVert^2 + v^\top \nabla s(x) \, v,
        \qquad \mathbb{E}[v v^\top] = I \\
    \text{denoising:} \quad & \tfrac12 \lVert s(x + \sigma \epsilon) + \epsilon / \sigma \rVert^2,
        \qquad \epsilon \sim N(0, I)

In expectation, the implicit and the sliced loss are the explicit one less
:math:`\tfrac12 \mathbb{E} \lVert \nabla \log p \rVert^2`, which does not depend on the score s. Denoising is the
explicit loss of the noisy data, again up to a constant, so that its best score is that of :math:`p_\sigma`, the density
of the noisy data.

A diffusion is trained by the bound, at all times at once; these losses are for a score by itself, at one noise level,
or at one per datum. A network that takes the time is given as ``lambda x: network(x, t)``, and NCSN's weight
:math:`\lambda(\sigma) = \sigma^2` is ``sigma**2 * denoising(score, x, sigma)``.

Of the five techniques of Song and Ermon (2020), the first, second and fourth are :func:`initial_noise`,
:func:`noise_ratio` and
:func:`langevin_step_size`; the third is :class:`pyrodiff.networks.DividedByNoise`, and the fifth
:func:`pyrodiff.exponential_average`.

References:
    Estimation of Non-Normalized Statistical Models by Score Matching (Hyvärinen, 2005),
    https://jmlr.org/papers/v6/hyvarinen05a.html

    A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011),
    https://doi.org/10.1162/NECO_a_00142

    Sliced Score Matching: A Scalable Approach to Density and Score Estimation (Song et al., 2019),
    https://arxiv.org/abs/1905.07088

    Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020),
    https://arxiv.org/abs/2006.09011
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .base import arguments, checks
from .base.arguments import ArgumentError
from .base.precision import coefficients, precisely
from .process.noise_levels import initial_noise, langevin_step_size, noise_ratio

__all__ = [
    "denoising",
    "explicit",
    "implicit",
    "initial_noise",
    "langevin_step_size",
    "minus_gradient",
    "noise_ratio",
    "sliced",
]


def explicit(score: Callable[[Tensor], Tensor], x: Tensor, true_score: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    r"""Half the squared distance to the true score, :math:`\tfrac12 \lVert s(x) - \nabla \log p(x) \rVert^2`.

    Arguments:
        score: The score, a function of x.
        x: The data, floats with shape (B, \*event_shape).
        true_score: The true score :math:`\nabla \log p(x)`: a tensor of the shape of ``x``, or a function of x.

    Returns:
        The loss, with shape (B,).

    Raises:
        ValueError: If ``x`` is not a tensor of floats with a first dimension, or ``score`` or ``true_score`` is, or
            returns, something else.

    References:
        Estimation of Non-Normalized Statistical Models by Score Matching (Hyvärinen, 2005), Eq. 2.

    Example:
        >>> pyrodiff.scores.explicit(lambda x: 1 - x, torch.tensor([[1.0, 3.0]]), lambda x: -x)
        tensor([1.])
    """
    _check(score, x)
    if not isinstance(true_score, Tensor):
        _check(true_score, x, "true_score")
        true_score = _scored(true_score, x, "true_score")
    elif true_score.shape != x.shape or not true_score.is_floating_point():
        raise ArgumentError(
            "true_score",
            f"must have the shape of x, {tuple(x.shape)}, or be a function of x, but it is "
            f"{arguments.described(true_score)}",
        )
    s = _scored(score, x)
    with precisely():
        return _half_square(s - true_score.to(x.dtype))


def implicit(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""The explicit loss without the true score: :math:`\tfrac12 \lVert s(x) \rVert^2 + \nabla \cdot s(x)`.

    In expectation it is the explicit loss less :math:`\tfrac12 \mathbb{E} \lVert \nabla \log p \rVert^2`, if
    :math:`p(x) s(x)` vanishes at infinity. The divergence is exact, by D gradients, and is differentiable in the
    parameters of the score.

    Arguments:
        score: The score, a function of x that is differentiable in x, row by row.
        x: The data, floats with shape (B, \*event_shape).

    Returns:
        The loss, with shape (B,).

    Raises:
        ValueError: If ``x`` is not a tensor of floats with a first dimension, or ``score`` is not a function, returns
            another shape, or changes with x but has no gradient there.

    References:
        Estimation of Non-Normalized Statistical Models by Score Matching (Hyvärinen, 2005), Theorem 1.

    Example:
        >>> pyrodiff.scores.implicit(lambda x: 1 - x, torch.tensor([[1.0, 3.0]])).tolist()  # half of 4, less 2
        [0.0]
    """
    _check(score, x)
    kept = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        x = _variable(x)
        s = _scored(score, x)
        units = torch.eye(x.shape[1:].numel(), dtype=x.dtype, device=x.device)
        directions = (unit.reshape(x.shape[1:]).expand(x.shape) for unit in units)
        gradients = enumerate(_gradients(score, x, s, directions, kept))
        divergence = torch.stack([_flat(gradient)[:, i] for i, gradient in gradients]).sum(0)
        with precisely():
            loss = _half_square(s) + divergence
    return loss if kept else loss.detach()


def sliced(
    score: Callable[[Tensor], Tensor], x: Tensor, num_projections: int = 1, variance_reduced: bool = True
) -> Tensor:
    r"""The implicit loss along random directions: one gradient, for :math:`v^\top \nabla s(x) v`, in place of D.

    Its mean over the directions is :func:`implicit`, and so is that of its gradient, since
    :math:`\mathbb{E}[v v^\top] = I`. The directions are random signs, whose estimates vary less than those of any other
    independent numbers, N(0, 1) among them: of data of one number nothing is left to vary.

    Arguments:
        score: The score, a function of x that is differentiable in x, row by row.
        x: The data, floats with shape (B, \*event_shape).
        num_projections: The number of directions to average over, drawn independently per datum.
        variance_reduced: Whether to use the exact :math:`\tfrac12 \lVert s \rVert^2`, or the paper's first form,
            :math:`\tfrac12 (v^\top s)^2`, which has the same mean and a larger variance.

    Returns:
        The loss, with shape (B,).

    Raises:
        ValueError: As :func:`implicit`, and if ``num_projections`` is not an int of at least 1.

    References:
        Sliced Score Matching: A Scalable Approach to Density and Score Estimation (Song et al., 2019),
        section 3, which calls the variance-reduced form SSM-VR.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> pyrodiff.scores.sliced(lambda x: 1 - x, x).tolist(), pyrodiff.scores.implicit(lambda x: 1 - x, x).tolist()
        ([0.0], [0.0])
    """
    _check(score, x)
    num_projections = arguments.positive_int("num_projections", num_projections)
    arguments.one_of("variance_reduced", variance_reduced, (False, True))
    kept = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        x = _variable(x)
        s = _scored(score, x)
        signs = 2 * torch.randint(2, (num_projections, *x.shape), device=x.device).to(x.dtype) - 1
        gradients = list(_gradients(score, x, s, signs, kept))
        with precisely():
            loss = torch.stack(
                [
                    (_half_square(s) if variance_reduced else _flat(v * s).sum(1) ** 2 / 2) + _flat(v * gradient).sum(1)
                    for v, gradient in zip(signs, gradients, strict=True)
                ]
            ).mean(0)
    return loss if kept else loss.detach()


def denoising(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float | Tensor,
    *,
    control_variate: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    r"""The score of the noisy data against that of the noise, :math:`\tfrac12 \lVert s(\tilde x) + \epsilon / \sigma
    \rVert^2` at :math:`\tilde x = x + \sigma \epsilon`, since :math:`\nabla \log N(\tilde x; x, \sigma^2 I) = -\epsilon
    / \sigma`.

    Expanded, it has two terms that grow as :math:`\sigma` falls, and whose expectations are known:
    :math:`s(x) \cdot \epsilon / \sigma`, of mean 0, and :math:`\lVert \epsilon \rVert^2 / 2 \sigma^2`, of mean
    :math:`D / 2 \sigma^2`. With the control variate they are replaced by these,

    .. math:: \tfrac12 \lVert s(\tilde x) \rVert^2 + (s(\tilde x) - s(x)) \cdot \frac{\epsilon}{\sigma}
        + \frac{D}{2 \sigma^2} .

    The expectation is the same, and so is that of the gradient. The variance of the plain loss grows as
    :math:`\sigma^{-4}`, and that of its gradient as :math:`\sigma^{-2}`; with the control variate both stay bounded for
    a smooth score, since :math:`(s(\tilde x) - s(x)) / \sigma \to \nabla s(x) \epsilon`: as :math:`\sigma \to 0` it is
    :func:`sliced`, variance reduced and along :math:`\epsilon`, and a constant. It costs a second call of the score. At
    a large :math:`\sigma` its variance may be above that of the plain loss, and it does not help with a score that is
    random itself, as by dropout.

    Arguments:
        score: The score, a function of x.
        x: The data, floats with shape (B, \*event_shape).
        sigma: The standard deviation of the noise, positive: a number, or a tensor with shape (B,) or ().
        control_variate: Whether to take the low-variance form.
        noise: The noise :math:`\epsilon`, with the shape of ``x``; drawn from torch's global generator if not given.

    Returns:
        The loss, with shape (B,). In float32 the constant :math:`D / 2 \sigma^2` hides the last digits of the rest
        where :math:`\sigma` is small; the gradient does not have it.

    Raises:
        ValueError: If ``x`` is not a tensor of floats with a first dimension, ``sigma`` is not positive or has another
            shape, ``score`` is not a function or returns another shape, or ``noise`` has another shape.

    References:
        A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011).

        A Wasserstein Minimum Velocity Approach to Learning Unnormalized Models (Wang et al., 2020): a control variate
        for it, https://arxiv.org/abs/2002.07501

        How to Train Your Energy-Based Models (Song and Kingma, 2021), the section on denoising score matching: its
        variance at small noise, https://arxiv.org/abs/2101.03288

    Example:
        >>> x, noise = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]])
        >>> pyrodiff.scores.denoising(lambda x: -x, x, sigma=0.5, noise=noise)  # at (1.5, 2.5)
        tensor([10.2500])
        >>> pyrodiff.scores.denoising(lambda x: -x, x, sigma=0.5, noise=noise, control_variate=True)
        tensor([6.2500])
    """
    _check(score, x)
    sigma = _noise_scale(sigma, x)
    arguments.one_of("control_variate", control_variate, (False, True))
    if noise is None:
        noise = torch.randn_like(x)
    elif not isinstance(noise, Tensor) or noise.shape != x.shape or not noise.is_floating_point():
        raise ArgumentError(
            "noise",
            f"must be a tensor of the shape of x, {tuple(x.shape)}, or None, to be drawn, but it is "
            f"{arguments.described(noise)}",
        )
    s, clean = _scored(score, x + sigma * noise), _scored(score, x) if control_variate else None
    with precisely():
        if clean is None:
            return _half_square(s + noise / sigma)
        constant = x.shape[1:].numel() / (2 * sigma.reshape(-1) ** 2)
        return _half_square(s) + _flat((s - clean) * noise / sigma).sum(1) + constant


def minus_gradient(energy: Callable[..., Tensor]) -> Callable[..., Tensor]:
    r"""The score of the density :math:`e^{-E(x)} / Z`, which is :math:`-\nabla E(x)` whatever Z is.

    It is differentiable in the parameters of the energy, and in x, where gradients are on; under ``torch.no_grad()`` it
    returns the numbers alone.

    Arguments:
        energy: The energy :math:`E`, a function of x, with shape (B, \*event_shape), and perhaps of more, such as a
            time, that returns a tensor of shape (B,), row by row.

    Returns:
        A function of the same arguments that returns a tensor of the shape of x.

    Raises:
        ValueError: If ``energy`` is not a function. On a call, if it returns another shape, or changes with x but has
            no gradient there, or if x is not a tensor of floats with a first dimension.

    Example:
        >>> score = pyrodiff.scores.minus_gradient(lambda x: (x**2).sum(1) / 2)
        >>> score(torch.tensor([[1.0, 3.0]])).tolist()
        [[-1.0, -3.0]]
    """
    if not callable(energy):
        raise ArgumentError(
            "energy", f"must be a function of x, as a network is, but it is {arguments.described(energy)}"
        )

    def score(x: Tensor, *rest: object) -> Tensor:
        _check(energy, x, "energy")
        kept = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = _variable(x)
            value = energy(x, *rest)
            checks.returned("energy", value, x.shape[:1], x)
            ones = (torch.ones_like(value),)
            (gradient,) = _gradients(lambda x: energy(x, *rest), x, value, ones, kept, "energy")
        return -gradient

    return score


def _check(function: object, x: object, name: str = "score") -> None:
    """Check for data that are floats, and for a function."""
    checks.data(x)
    if not callable(function):
        raise ArgumentError(
            name,
            f"must be a function of x, as a network or minus_gradient(energy) is, but it is "
            f"{arguments.described(function)}",
        )


def _scored(score: Callable[[Tensor], Tensor], x: Tensor, name: str = "score") -> Tensor:
    s = score(x)
    checks.returned(name, s, x.shape, x)
    return s.to(x.dtype)  # under autocast the network's output has a lower precision


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel())


def _half_square(x: Tensor) -> Tensor:
    return (_flat(x) ** 2).sum(1) / 2


def _variable(x: Tensor) -> Tensor:
    """The data as a leaf that requires a gradient."""
    return x if x.requires_grad else x.detach().clone().requires_grad_()


def _gradients(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    value: Tensor,
    directions: Iterable[Tensor],
    kept: bool,
    name: str = "score",
) -> Iterator[Tensor]:
    """The gradients in x of the sum of v times the value, for each direction v; differentiable if ``kept``."""
    for v in directions:
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x, v, retain_graph=True, create_graph=kept, allow_unused=True)
        if gradient is None:
            _refuse_a_cut_graph(function, x, value, name)
            gradient = torch.zeros_like(x)
        yield gradient


def _refuse_a_cut_graph(function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, name: str) -> None:
    """Refuse a function that changes with x but has no gradient in it, and so would count as constant."""
    with torch.no_grad():
        if not torch.equal(value, function(x + 0.1).to(value.dtype)):
            raise ArgumentError(
                name,
                "must be differentiable in x, but what it returns changes with x and has no gradient there, as "
                "under torch.no_grad() or after detach(): compute it from x itself",
            )


def _noise_scale(sigma: float | Tensor, x: Tensor) -> Tensor:
    """The standard deviations of the noise, broadcastable against the data."""
    if not isinstance(sigma, Tensor):
        return x.new_tensor(arguments.number("sigma", sigma, 0, math.inf))
    if not sigma.is_floating_point() or sigma.shape not in (torch.Size(), x.shape[:1]):
        raise ArgumentError(
            "sigma",
            f"must be a positive number or a tensor of floats with shape {tuple(x.shape[:1])}, one for each "
            f"datum, but it is {arguments.described(sigma)}",
        )
    if checks.validating() and not checks.holds((sigma > 0) & sigma.isfinite()):
        raise ArgumentError(
            "sigma",
            f"must be positive and finite, but it has values in {float(sigma.min())}..{float(sigma.max())}: "
            f"of a schedule, take the noise of t = 1..T",
        )
    (sigma,) = coefficients(sigma[None], x)
    return sigma
