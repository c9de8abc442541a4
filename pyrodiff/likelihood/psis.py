r"""How heavy the tail of importance weights is, by Pareto's k: it tells whether their mean can be trusted.

The largest of K weights follow a generalised Pareto law of shape k above some u,

.. math:: P(w > u + y \mid w > u) \to \left(1 + k y / \sigma\right)^{-1/k},

and moments of the weights exist up to 1 / k: from k = 1/2 on their variance is infinite, from k = 1 on their mean.
By the paper, the mean of a practical number of weights can be trusted for k below 0.7; above, it cannot, however even
the weights that were drawn look, which is all that an effective sample size measures.

References:
    Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao & Gabry, 2024), https://arxiv.org/abs/1507.02646

    A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang & Stephens, 2009)
"""

import math
import warnings

import torch
from torch import Tensor

from ..base import arguments
from ..base.arguments import ArgumentError
from ..base.precision import float64

__all__ = ["effective_size", "pareto_k", "pareto_words", "warn_of_tails"]

LIMIT, FEWEST = 0.7, 100  # of k; of weights: with fewer, k is too uncertain


def effective_size(log_weights: Tensor, dim: int) -> Tensor:
    r"""The effective sample size :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, in 1..K; 0 where there is no weight.

    Arguments:
        log_weights: Logarithms of the weights.
        dim: The dimension of the K weights.
    """
    return (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp().nan_to_num(0.0)


@torch.no_grad()
def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The estimate :math:`\hat k` of the shape of the tail of importance weights, for each of B data.

    The tail is the largest :math:`\lceil\min(K / 5, 3 \sqrt K)\rceil` weights, less the largest of the rest. Their k is
    estimated as by Zhang and Stephens, and shrunk towards 1/2 by a prior that counts as ten weights (Vehtari et al.
    2024, appendix C). Its standard deviation is about :math:`(1 + k) / \sqrt M` with M weights in the tail: 0.35 for K
    = 100, 0.17 for K = 1,000.

    Arguments:
        log_weights: Logarithms of the weights, up to a constant, with shape (K, B); minus infinity for a weight of 0.

    Returns:
        k, with shape (B,), in float64: 0 where the weights of the tail are equal up to rounding. NaN where there is no
        tail to fit: K is below 21, so that it has fewer than five weights; more than half of these are ties, as where
        states are discrete; or a weight is NaN or infinite.

    Raises:
        ValueError: If ``log_weights`` are something else.

    Example:
        >>> u = (torch.arange(4000.0)[:, None] + 0.5) / 4000
        >>> weights = u ** -torch.tensor([0.2, 0.5, 0.9])  # quantiles of Pareto laws of these shapes
        >>> pyrodiff.pareto_k(weights.log()).round(decimals=1)
        tensor([0.2000, 0.5000, 0.9000], dtype=torch.float64)
    """
    if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point() or log_weights.dim() != 2:
        raise ArgumentError(
            "log_weights", f"must be floats with shape (K, B), but it is {arguments.described(log_weights)}"
        )
    K, rounding = len(log_weights), 16 * torch.finfo(log_weights.dtype).eps
    size = math.ceil(min(K / 5, 3 * math.sqrt(K)))
    if size < 5:
        return float64(log_weights.new_full((log_weights.shape[1],), math.nan))
    logs = float64(log_weights).topk(size + 1, 0).values
    # discrete states give few distinct weights; weights of 0 do not count as ties
    is_tied = (logs[1:] == logs[:-1]) & logs[1:].isfinite()
    tail = (logs - logs[0]).exp()
    excess = (tail[:-1] - tail[-1]).flip(0)  # ascending
    k = _zhang_stephens(excess.clamp(min=1e-300))
    k = (size * k + 10 * 0.5) / (size + 10)
    k = k.masked_fill(is_tied.sum(0) > size / 2, math.nan)
    k = torch.where(excess[-1] <= rounding, torch.zeros_like(k), k)
    return k.masked_fill(~excess.isfinite().all(0), math.nan)


def _zhang_stephens(x: Tensor) -> Tensor:
    """The shape of generalised Pareto laws, of ascending draws with shape (n, B): Zhang and Stephens, Eqs. 6 to 8."""
    n, quartile, largest = len(x), x[math.floor(len(x) / 4 + 0.5) - 1], x[-1]
    m = 30 + math.floor(math.sqrt(n))
    j = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)[:, None]
    theta = 1 / largest + (1 - (m / (j - 0.5)).sqrt()) / (3 * quartile)
    shape = torch.stack([torch.log1p(-one * x).mean(0) for one in theta])  # one by one, for (m, n, B) may be large
    profile = n * ((-theta / shape).log() - shape - 1)
    mean = (theta * profile.softmax(0)).sum(0)
    return torch.log1p(-mean * x).mean(0)


def pareto_words(k: Tensor, num_particles: int) -> str:
    """The tails in words, for a title, if there are enough weights.

    Arguments:
        k: What :func:`pareto_k` returned.
        num_particles: The number of weights.
    """
    if num_particles < FEWEST or k.is_meta or bool(k.isnan().all()):
        return ""
    heavy = int((k > LIMIT).sum())
    return f", Pareto k {float(k.nanmedian()):.2f}" + f" (above {LIMIT} for {heavy})" * (heavy > 0)


def warn_of_tails(k: Tensor, num_particles: int) -> None:
    """Warn of tails too heavy for the mean of the weights, if there are enough weights.

    Arguments:
        k: What :func:`pareto_k` returned.
        num_particles: The number of weights.
    """
    heavy = k > LIMIT
    if num_particles >= FEWEST and not k.is_meta and bool(heavy.any()):
        warnings.warn(
            f"Pareto k of the importance weights is above {LIMIT} for {int(heavy.sum())} of {len(k)} data, "
            f"{float(k[heavy].max()):.2f} at most: their variance may be infinite, and neither their mean nor the "
            f"effective sample size is to be trusted. It is a bound still, but more particles help little: bring the "
            f"model's kernels nearer to the posteriors, and see result.pareto_k",
            UserWarning,
            stacklevel=4,  # the caller of the function that made the weights, past the frame of torch.no_grad
        )
