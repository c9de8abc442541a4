"""The KL divergence of two distributions of one site: analytic, or its estimate at a draw."""

import torch
from pyro.distributions import Delta, MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

__all__ = ["innermost", "relative_entropy"]


def relative_entropy(
    q: TorchDistribution, p: TorchDistribution, x: Tensor | None = None, analytic: bool = True
) -> Tensor:
    """KL(q || p) where it is registered; else its estimate log q(x) - log p(x) at the draw ``x`` of q.

    Arguments:
        q, p: Distributions of one event_shape, whose batch_shapes broadcast.
        x: A draw of q; a fresh one if it is needed and not given.
        analytic: Whether the analytic KL may be taken.

    Returns:
        A tensor of the batch_shape, in nats.
    """
    if isinstance(q, MaskedDistribution) != isinstance(p, MaskedDistribution):
        q, p = _bare(q), _bare(p)
    if analytic and not isinstance(innermost(q), Delta):  # whose log density Pyro's KL leaves out
        try:
            return _as_tensor(kl_divergence(q, p), q)
        except NotImplementedError:
            pass
    x = q() if x is None else x
    return _as_tensor(q.log_prob(x), q) - _as_tensor(p.log_prob(x), q)


def _bare(law: TorchDistribution) -> TorchDistribution:
    """The distribution without a mask of True, with which Pyro would find no KL."""
    while isinstance(law, MaskedDistribution) and law._mask is True:
        law = law.base_dist
    return law


def _as_tensor(value: Tensor | float, law: TorchDistribution) -> Tensor:
    """The value as a tensor: for distributions that are masked altogether, Pyro returns the number 0."""
    return value if isinstance(value, Tensor) else torch.full(law.batch_shape, float(value))


def innermost(law: Distribution) -> Distribution:
    """The distribution without ``Independent`` and masks around it.

    Arguments:
        law: The distribution.
    """
    while isinstance(law, Independent | MaskedDistribution):
        law = law.base_dist
    return law
