"""Particles and their weights: the mean weight, and systematic resampling where it is needed."""

import math

import torch
from torch import Tensor

from ..likelihood.psis import effective_size

__all__ = ["log_mean", "needs_resampling", "resampled", "systematic"]


def resampled(x: Tensor, psi: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Resample the particles of each island whose effective sample size is below a half.

    Arguments:
        x: The states, island after island, with a first dimension of (islands * m).
        psi: Their log twists, with shape (islands, m).
        log_w: Their log weights, with that shape.

    Returns:
        The three, of the particles that are kept.
    """
    islands, m = log_w.shape
    needs = needs_resampling(log_w)[:, None]
    index = torch.where(needs, systematic(log_w, m), torch.arange(m, device=x.device))
    log_w = torch.where(needs, log_mean(log_w)[:, None], log_w)
    rows = (index + m * torch.arange(islands, device=x.device)[:, None]).flatten()
    return x[rows], psi.gather(1, index), log_w


def needs_resampling(log_w: Tensor) -> Tensor:
    """Which islands have an effective sample size below a half.

    Arguments:
        log_w: Log weights, with shape (islands, m).
    """
    return effective_size(log_w, -1) < log_w.shape[-1] / 2


def systematic(log_w: Tensor, m: int) -> Tensor:
    """Ancestors, each as often as it weighs up to rounding: one uniform number for each row (Kitagawa, 1996).

    Arguments:
        log_w: Log weights, with shape (islands, K).
        m: How many ancestors are drawn for each row.

    Returns:
        Indices in 0..K-1, with shape (islands, m).
    """
    weights = log_w.softmax(1).nan_to_num(1.0)  # of a row without weight, any
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
