"""A network without a time, divided by the noise."""

import inspect
from typing import Any

from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients, precisely

__all__ = ["DividedByNoise"]


class DividedByNoise(nn.Module):
    r"""A score from a network without a time, divided by the noise: :math:`s(x_t, t) = f(x_t) / \sigma_t`.

    The norm of a score of noisy data is about proportional to one over the noise, whatever the data; so one network
    without a time serves all noise levels. The noise is the schedule's, :math:`\sigma_t = b_t`. It goes into
    :class:`ScorePrediction`.

    The schedule is a submodule, evaluated at each call: its tables are in the ``state_dict`` under this name too, as
    under each name that a model has for its schedule. Give the forward process's own schedule object: then both are
    moved and learned together.

    Arguments:
        network: A module called as ``network(x_t, *context)``, without a time, that returns a tensor of the shape of
            ``x_t``. Wrap one that takes a time, as :class:`UNet`, in a module that always gives it the same.
        schedule: The noise schedule.

    Raises:
        ValueError: If ``network`` is not a module, or ``schedule`` is not a schedule. On a call, if the network takes
            something else or returns another shape, or t is not in 1..T (a tensor: while Pyro validates).

    References:
        Improved Techniques for Training Score-Based Generative Models (Song and Ermon, 2020), Technique 3,
        https://arxiv.org/abs/2006.09011

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(num_steps=3, sigma_min=0.1, sigma_max=10.0))
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
        >>> score = pyrodiff.networks.DividedByNoise(network, forward.schedule)
        >>> denoiser = pyrodiff.ScorePrediction(score, forward)
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(score(x, 1), 100 * score(x, 3))
        True
    """

    def __init__(self, network: nn.Module, schedule: nn.Module) -> None:
        super().__init__()
        checks.instance("network", network, nn.Module)
        if not (isinstance(schedule, nn.Module) and hasattr(schedule, "noise") and hasattr(schedule, "num_steps")):
            raise ArgumentError("schedule", f"must be a pyrodiff.Schedule, but it is {arguments.described(schedule)}")
        self.network = network
        self.schedule: Any = schedule

    def forward(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> Tensor:
        """The score, with the shape of ``x_t``, for t an int or an integer tensor with the batch's shape."""
        checks.time("t", t, self.schedule.num_steps, low=1)
        self._check_call(x_t, *context)
        output = self.network(x_t, *context)
        checks.returned("network", output, x_t.shape, x_t)
        with precisely():
            (noise,) = coefficients(self.schedule.noise(t)[None], x_t)
            return output.to(x_t.dtype) / noise

    def _check_call(self, x_t: Tensor, *context: Tensor) -> None:
        if not checks.validating():
            return
        try:
            signature = inspect.signature(self.network.forward)
        except (TypeError, ValueError):  # it has no signature to read
            return
        try:
            signature.bind(x_t, *context)
        except TypeError as error:
            raise ArgumentError(
                "network",
                f"must take x_t and {len(context)} tensor{'s' * (len(context) != 1)} of context, and no time, "
                f"but it is a {type(self.network).__name__}, called as {signature}: put a module of yours around it, "
                f"which calls it with the same time always, network(x_t, 1, *context)",
            ) from error
