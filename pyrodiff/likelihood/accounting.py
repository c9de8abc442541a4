r"""Where the variance of training comes from: the variance of each term, and of the estimate for each way of drawing t.

The one-step estimate of a datum's bound is :math:`L_T + L_{t-1} / p(t)`. For independent draws its second moment
beyond :math:`L_T` is :math:`\sum_t \mathbb{E}[L_{t-1}^2] / p(t)`, least where p(t) is proportional to the root of
:math:`\mathbb{E}[L_{t-1}^2]`; the same holds of the gradient, with :math:`\mathbb{E} \lVert \nabla L_{t-1} \rVert^2`.

References:
    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 3.3 and Eq. 18,
    https://arxiv.org/abs/2102.09672
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64
from ..pair.diffusion import Diffusion, OneStep
from ..pair.elbo import DiffusionELBO
from ..pair.terms import step_costs
from ..pair.times import Drawing, ImportanceDrawing, LossSecondMoment, LowDiscrepancyDrawing, UniformDrawing
from ..running.evaluation import Batch, batches, dry_run, evaluating, progress_bar

__all__ = ["VarianceAccount", "variance_account"]


@dataclass(frozen=True)
class VarianceAccount:
    """The variance of the terms of the bound, and of its one-step estimates. Printed, it is a table.

    Variances are those of a batch's mean, multiplied by the batch size. All in nats.

    Arguments:
        mean: The mean of L_{t-1} for t = 1..T (at t = 1 it is L_0), over data and draws, with shape (T,).
        std: Its standard deviation over data and draws, with shape (T,).
        drawings: The ways of drawing t, by name.
        value: For each, the variance of the one-step estimate of the bound, and the standard error of that variance.
        gradient: For each, the variance of the gradient, summed over all parameters, and its standard error.
        batch_size: The size of the batch.
    """

    mean: Tensor
    std: Tensor
    drawings: dict[str, Drawing]
    value: dict[str, tuple[float, float]]
    gradient: dict[str, tuple[float, float]]
    batch_size: int

    @property
    def second_moment(self) -> Tensor:
        r""":math:`\mathbb{E}[L_{t-1}^2]` for t = 1..T, with shape (T,)."""
        return self.mean**2 + self.std**2

    def __str__(self) -> str:
        largest = int(self.std.argmax())
        lines = [
            f"variance of one-step estimates, T = {len(self.mean)}, batches of {self.batch_size} "
            f"(the terms vary most at t = {largest + 1}: {self.mean[largest]:.3g} ± {self.std[largest]:.3g} nats)",
            "".join(
                [
                    f"{'drawing of t':24}",
                    *(f"{name:>12}{'± s.e.':>11}{'relative':>10}" for name in ("value", "gradient")),
                ]
            ),
        ]
        first = next(iter(self.drawings))
        for name in self.drawings:
            row = f"{name:24}"
            for account in (self.value, self.gradient):
                variance, error = account[name]
                row += f"{variance:12.4g}{error:11.2g}{variance / account[first][0]:10.3f}"
            lines.append(row)
        return "\n".join(lines)


def variance_account(
    diffusion: Diffusion,
    x_0: Tensor,
    *context: Tensor,
    drawings: dict[str, Drawing] | None = None,
    num_particles: int = 100,
    num_pairs: int = 100,
    batch_size: int = 128,
    memory_budget: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> VarianceAccount:
    r"""The variance of each term of the bound, and of the one-step estimate under each way of drawing t.

    Nothing is trained. Modules are in evaluation mode, so that dropout adds nothing.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape).
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        drawings: The ways of drawing t, by name. If not given: "uniform"; "low discrepancy"; "loss second moment",
            with a full history of costs at each t; "optimal", from the second moments measured here.
        num_particles: The number of draws of a datum and its :math:`x_t` at each t, for the moments; at least 2.
        num_pairs: The number of pairs of batches, whose differences give the variances; at least 2.
        batch_size: The number of data in a batch, drawn with replacement.
        memory_budget: The memory for the states and activations of one batch of network calls, in bytes; if not
            given, 2^28, or on a GPU about an eighth of its memory. The draws depend on it.
        generator: A generator or a seed, for the same numbers each time; torch's global generator if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, which are drawn from it once: a program, called with the data (None for a
            loader) and their context. Required if there are random weights, else not allowed.

    Returns:
        The account.

    Raises:
        ValueError: If ``x_0`` cannot be data of the model, ``diffusion`` is not one or has no parameters that require a
            gradient, ``drawings`` are not drawings by name, or a number is out of range.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=20))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> account = pyrodiff.variance_account(diffusion, torch.randn(50, 2) / 2, num_pairs=10)
        >>> account.std.shape, sorted(account.value)
        (torch.Size([20]), ['loss second moment', 'low discrepancy', 'optimal', 'uniform'])
    """
    checks.instance("diffusion", diffusion, Diffusion)
    checks.instance("x_0", x_0, Tensor)
    num_particles = arguments.positive_int("num_particles", num_particles)
    batch_size, num_pairs = (
        arguments.positive_int("batch_size", batch_size),
        arguments.positive_int("num_pairs", num_pairs),
    )
    for name, value in (("num_particles", num_particles), ("num_pairs", num_pairs)):
        if value < 2:
            raise ArgumentError(name, f"must be at least 2, but it is {value}")
    if not any(parameter.requires_grad for parameter in diffusion.model.parameters()):
        raise ArgumentError("diffusion", "must have a parameter that requires a gradient, but it has none")
    named = isinstance(drawings, dict) and all(isinstance(drawing, Drawing) for drawing in drawings.values())
    if drawings is not None and not (named and drawings):
        raise ArgumentError("drawings", f"must be drawings by name, at least one, but they are {drawings!r}")
    evaluated = evaluating(diffusion, generator, guide=guide, given=(x_0, *context))
    with evaluated, progress_bar(progress, "variance account") as bar:
        (data,) = batches(diffusion, x_0, context, "num_particles")
        costs = _costs(diffusion, data, num_particles, memory_budget)
        drawings = _drawings(costs) if drawings is None else drawings
        bar.total = 2 * num_pairs * batch_size * len(drawings)
        pairs = {name: diffusion.one_step(_Fixed(drawing)) for name, drawing in drawings.items()}
        halves: dict[str, list[tuple[float, float]]] = {name: [] for name in drawings}
        for _ in range(num_pairs):
            i = torch.randint(len(data), (2, batch_size), device=x_0.device)  # the same for all, for a fair ratio
            for name, pair in pairs.items():
                halves[name].append(_half_squares(*(_estimate(pair, data.rows(half)) for half in i)))
                bar.update(2 * batch_size)
    squares = {
        name: torch.tensor(some, dtype=torch.float64, device="cpu") * batch_size for name, some in halves.items()
    }
    of_value, of_gradient = ({name: _mean(some[:, which]) for name, some in squares.items()} for which in (0, 1))
    return VarianceAccount(costs.mean(1), costs.std(1), drawings, of_value, of_gradient, batch_size)


@torch.no_grad()
def _costs(diffusion: Diffusion, data: Batch, num_particles: int, memory_budget: int | None) -> Tensor:
    """Costs at each t of data drawn with replacement, with shape (T, num_particles)."""
    T, rows, device = diffusion.num_steps, dry_run(memory_budget, diffusion, data).rows, data.x_0.device
    i = torch.randint(len(data), (T * num_particles,), device=device)
    t = torch.arange(T * num_particles, device=device) // num_particles + 1
    costs, q = [], diffusion.forward_process
    for part, now in zip(i.split(rows), t.split(rows), strict=True):
        some = data.rows(part)
        x_t = q.marginal(some.x_0, now).sample()
        costs.append(step_costs(diffusion.model, some.x_0, now, x_t, some.context, later=T > 1))
    return float64(torch.cat(costs)).reshape(T, num_particles)


class _Fixed(Drawing):
    """A drawing that does not learn while it is measured."""

    def __init__(self, drawing: Drawing) -> None:
        super().__init__()
        self.drawing = drawing

    def uniforms(self, like: Tensor) -> TorchDistribution:
        return self.drawing.uniforms(like)

    def forward(self, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        return self.drawing(u, num_steps)


def _estimate(pair: OneStep, data: Batch) -> list[Tensor]:
    """The one-step estimate of the bound, the mean over a batch, and its gradient."""
    value = DiffusionELBO().differentiable_loss(pair.model, pair.guide, data.x_0, *data.context) / len(data)
    parameters = [parameter for parameter in pair.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(value, parameters, allow_unused=True)
    return [value.detach(), *(value.new_zeros(()) if part is None else part for part in gradient)]


def _half_squares(first: list[Tensor], second: list[Tensor]) -> tuple[float, float]:
    """Half the squared difference of two independent estimates, whose mean is their variance: value and gradient."""
    squares = [
        float((float64(one - other.to(one.device)) ** 2).sum()) / 2 for one, other in zip(first, second, strict=True)
    ]
    return squares[0], sum(squares[1:])


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _drawings(costs: Tensor) -> dict[str, Drawing]:
    T, particles = costs.shape
    learned = LossSecondMoment(T, history=min(10, particles)).to(costs.device)
    t = torch.arange(1, T + 1, device=costs.device)
    for cost in costs.T[: learned.costs.shape[1]]:
        learned.tell(t, cost, torch.ones_like(t, dtype=torch.bool))
    return {
        "uniform": UniformDrawing(),
        "low discrepancy": LowDiscrepancyDrawing(),
        "loss second moment": learned,
        "optimal": ImportanceDrawing.of((costs**2).mean(1)),
    }
