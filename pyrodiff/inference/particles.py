"""Particles and their weights: the mean weight, and systematic resampling where needed."""

import math

import torch
from torch import Tensor

from ..likelihood.psis import effective_size

__all__ = ["log_mean", "needs_resampling", "resampled", "systematic"]


def resampled(x: Tensor, psi: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Resample the particles of each island whose effective sample size is below half of their number.

    Arguments:
        x: The states, island after island, with a first dimension of (islands * m).
        psi: Their log twists, with shape (islands, m).
        log_w: Their log weights, with that shape.

    Returns:
        The three, for the particles after resampling.
    """
    islands, m = log_w.shape
    needs = needs_resampling(log_w)[:, None]
    index = torch.where(needs, systematic(log_w, m), torch.arange(m, device=x.device))
    log_w = torch.where(needs, log_mean(log_w)[:, None], log_w)
    rows = (index + m * torch.arange(islands, device=x.device)[:, None]).flatten()
    return x[rows], psi.gather(1, index), log_w


def needs_resampling(log_w: Tensor) -> Tensor:
    """Which islands have an effective sample size below half of their particles.

    Arguments:
        log_w: Log weights, with shape (islands, m).
    """
    return effective_size(log_w, -1) < log_w.shape[-1] / 2


def systematic(log_w: Tensor, m: int) -> Tensor:
    """Systematic resampling, with one uniform number per row (Kitagawa, 1996): each ancestor in proportion to its
    weight.

    Arguments:
        log_w: Log weights, with shape (islands, K).
        m: How many ancestors are drawn for each row.

    Returns:
        Indices in 0..K-1, with shape (islands, m).
    """
    weights = log_w.softmax(1).nan_to_num(1.0)  # a row without any weight: all alike
    ends = (weights.cumsum(1) / weights.sum(1, keepdim=True)).clamp(max=1.0)
    u = torch.rand(len(log_w), 1, dtype=log_w.dtype, device=log_w.device)
    points = (torch.arange(m, dtype=log_w.dtype, device=log_w.device) + u) / m
    return torch.searchsorted(ends, points).clamp(max=log_w.shape[1] - 1)


def log_mean(log_w: Tensor) -> Tensor:
    """The logarithm of the mean weight over the last dimension.

    Arguments:
        log_w: Log weights, with shape (..., m).
    """
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])
