r"""The best variance of a Gaussian reverse process, from how far its denoiser is off.

The mean of a step from t to s is the forward posterior's at :math:`\hat x_0`, so that with a variance
:math:`\sigma^2`, the same for all numbers of a state, the step costs, in the mean over data and :math:`x_t`,

.. math:: L = \frac D2 \left(\frac{v}{\sigma^2} - 1 - \log \frac{\tilde\beta_{s|t}}{\sigma^2}\right), \qquad
    v = \tilde\beta_{s|t} + w_0(s, t)^2 \, \frac1D \mathbb{E} \lVert x_0 - \hat x_0(x_t, t) \rVert^2,

which is least at :math:`\sigma^2 = v`. What the denoiser has to do with it is one number for each t, whatever s is.

References:
    Analytic-DPM (Bao et al., 2022), Theorem 1, https://arxiv.org/abs/2201.06503
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import checks
from ..process.forward import GaussianForward
from ..process.schedules import SubSchedule
from .reverse import Variance

__all__ = ["AnalyticVariance"]


class AnalyticVariance(Variance):
    r"""The variance of least bound, given the mean squared error :math:`e_t` of the denoiser at each time.

    .. math:: \sigma_{s|t}^2 = \tilde\beta_{s|t} + w_0(s, t)^2 \, e_t, \qquad
        e_t = \frac1D \mathbb{E} \lVert x_0 - \hat x_0(x_t, t) \rVert^2

    with the variance :math:`\tilde\beta_{s|t}` of :math:`q(x_s | x_t, x_0)` and the weight :math:`w_0` of
    :math:`x_0` in its mean; s is the time before t in the chain that it is asked for, the whole one or one of fewer
    steps (:meth:`Diffusion.subchain`). In the step to the data, s = 0, it is :math:`e_t` itself.
    :func:`analytic_variance` measures the :math:`e_t`.

    Arguments:
        errors: The :math:`e_1, \dots, e_T`, T numbers of at least 0, in the square of the data's unit.
        least: The least variance of the step to the data.

    Raises:
        ValueError: If ``errors`` are not one-dimensional, none, negative, not finite or require a gradient; if
            ``least`` is negative, or 0 where an error is; on a call, if there are not T of them, of the process or of
            one that it is a shorter chain of.

    References:
        Analytic-DPM (Bao et al., 2022), Theorem 1, https://arxiv.org/abs/2201.06503: there for
        :math:`\hat x_0 = E[x_0 | x_t]`, by the norm of the score.

        Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models (Bao et al., 2022),
        https://arxiv.org/abs/2206.07309: for any mean, by its error.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=10))
        >>> variance = pyrodiff.AnalyticVariance([0.5] * 10)  # of a denoiser that is off by that, whatever t is
        >>> variance(forward.subchain([3, 10]), 1)
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, errors: Sequence[float] | Tensor, least: float = 0.0) -> None:
        super().__init__()
        errors, least = checks.numbers("errors", errors), checks.numbers("least", least)
        if least.dim() or not checks.holds((least >= 0) & least.isfinite()):
            raise ValueError(f"least must be a number of at least 0, but it is {least.tolist()}")
        if errors.dim() != 1 or len(errors) == 0 or not checks.holds((errors >= 0) & errors.isfinite()):
            raise ValueError(f"errors must be a sequence of numbers of at least 0, but they are {errors.tolist()}")
        if not checks.holds(errors + least.to(errors.device) > 0):
            t = int((errors == 0).nonzero()[0]) + 1
            raise ValueError(
                f"errors must be positive where no least variance is given, but that at t = {t} is 0: a step to the "
                f"data would have no density; give least, or data that the denoiser does not know by heart"
            )
        self.register_buffer("errors", errors)
        self.register_buffer("least", least)

    def forward(self, process: GaussianForward, t: int | Tensor) -> Tensor:
        checks.time("t", t, process.num_steps, low=1)
        schedule, time, T = process.schedule, t, len(self.errors)
        while schedule.num_steps != T and isinstance(schedule, SubSchedule):
            schedule, time = schedule.schedule, schedule.times_at(time)
        if schedule.num_steps != T:
            raise ValueError(f"errors must be T = {schedule.num_steps} numbers, but there are {T}")
        time = torch.as_tensor(time, device=self.errors.device)
        error = self.errors.index_select(0, time.reshape(-1) - 1).reshape(time.shape)
        _, weight, deviation = process.schedule.posterior(t)
        variance = deviation**2 + weight**2 * error
        is_last = torch.as_tensor(t == 1, device=variance.device)
        return torch.where(is_last, torch.maximum(variance, self.least), variance)

    def extra_repr(self) -> str:
        return f"num_steps={len(self.errors)}"
