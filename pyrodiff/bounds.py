r"""The bound of a diffusion, all T terms of it, datum by datum.

.. math:: -\log p_\theta(x_0) \le L_T + \sum_{t=2}^{T} L_{t-1} + L_0

Here every :math:`x_t` is drawn from :math:`q(x_t | x_0)` by itself, which leaves the mean of each term as it is and
lets all t run in one batch (Luo 2022, Eqs. 57-58).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import checks
from .diffusion import Diffusion
from .elbo import relative_entropy

__all__ = ["Bound", "bound"]


@dataclass(frozen=True)
class Bound:
    """The terms of the bound on -log p(x_0), in nats, positive as a cost. Printed, it is a table.

    Arguments:
        prior: L_T, with shape (B,).
        denoising: L_{t-1} for t = 2..T, with shape (T - 1, B).
        reconstruction: L_0, with shape (B,).
        event_shape: The shape of one datum.
    """

    prior: Tensor
    denoising: Tensor
    reconstruction: Tensor
    event_shape: torch.Size

    @property
    def nats(self) -> Tensor:
        """The bound in nats a datum, with shape (B,)."""
        return self.prior + self.denoising.sum(0) + self.reconstruction

    @property
    def bits(self) -> Tensor:
        """The bound in bits a datum, with shape (B,)."""
        return self.nats / math.log(2)

    @property
    def bits_per_dim(self) -> Tensor:
        """The bound in bits a dimension, with shape (B,)."""
        return self.bits / self.event_shape.numel()

    @staticmethod
    def standard_error(values: Tensor) -> Tensor:
        """The standard error of the mean of values with shape (B,); NaN where B = 1."""
        return values.std() / math.sqrt(len(values)) if len(values) > 1 else values.new_tensor(math.nan)

    def __str__(self) -> str:
        B, D, T = len(self.prior), self.event_shape.numel(), len(self.denoising) + 1
        rows = {
            "L_T      prior": self.prior,
            "ΣL_t-1   denoising": self.denoising.sum(0),
            "L_0      reconstruction": self.reconstruction,
            "bound": self.nats,
            "bound per dimension": self.nats / D,
        }
        lines = [
            f"bound on -log p(x_0), mean of {B} data of {D} dimension{'s' * (D > 1)}, T = {T}",
            f"{'':24}{'nats':>11}{'± s.e.':>10}{'bits':>11}{'± s.e.':>10}",
        ]
        for name, values in rows.items():
            mean, error = float(values.mean()), float(self.standard_error(values))
            numbers = (mean, error, mean / math.log(2), error / math.log(2))
            lines.append(f"{name:24}" + "".join(f" {n:{w}.4f}" for n, w in zip(numbers, (10, 9, 10, 9), strict=True)))
        return "\n".join(lines)


@torch.no_grad()
def bound(diffusion: Diffusion, x_0: Tensor, num_particles: int = 1, memory_budget: int = 2**28) -> Bound:
    """The bound on -log p(x_0), each of its T terms estimated with fresh draws.

    Modules are in evaluation mode meanwhile. Random weights (each ``PyroSample``) are drawn once, for all of it: the
    bound is the one given those weights.

    Arguments:
        diffusion: The model.
        x_0: The data, with shape (B, *event_shape).
        num_particles: The number of draws of each x_t that a term is the mean of.
        memory_budget: What the states and activations of one batch of network calls may take, in bytes. The bound
            does not depend on it but for the draws.

    Returns:
        The terms, in nats, a datum each.

    Raises:
        ValueError: If ``x_0`` cannot be data of the model, ``diffusion`` is not one, or a number is not a positive int.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=100))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> bound = pyrodiff.bound(pyrodiff.Diffusion(forward, reverse, event_shape=(2,)), torch.randn(50, 2))
        >>> bound.denoising.shape, bound.nats.shape
        (torch.Size([99, 50]), torch.Size([50]))
    """
    checks.instance("diffusion", diffusion, Diffusion)
    checks.positive_int("num_particles", num_particles)
    checks.positive_int("memory_budget", memory_budget)
    diffusion.model.dtype(x_0, wait=True)  # refuse what cannot be data
    model, B, T, P = diffusion.model, len(x_0), diffusion.num_steps, num_particles
    with _evaluating(diffusion), model.running():
        rows = max(1, memory_budget // _bytes_a_row(diffusion, x_0[:1]))
        steps = x_0.new_zeros(T * B)
        for start in range(0, T * P * B, rows):
            row = torch.arange(start, min(start + rows, T * P * B), device=x_0.device)
            t, i = row // (P * B), row % B
            steps.index_add_(0, t * B + i, _step_costs(diffusion, x_0[i], t + 1))
        prior = _prior_cost(diffusion, x_0, P)
    steps = steps.reshape(T, B) / P
    return Bound(prior, steps[1:], steps[0], diffusion.event_shape)


def _prior_cost(diffusion: Diffusion, x_0: Tensor, num_particles: int) -> Tensor:
    """L_T, with shape (B,)."""
    q = diffusion.forward_process.marginal(x_0, diffusion.num_steps)
    p = diffusion.model.top(x_0.dtype).expand(q.batch_shape)
    return torch.stack([relative_entropy(q, p, q.sample()) for _ in range(num_particles)]).mean(0)


def _step_costs(diffusion: Diffusion, x_0: Tensor, t: Tensor) -> Tensor:
    """L_{t-1} where t > 1 and L_0 where t = 1, one fresh draw of x_t a datum, with shape (B,)."""
    model, q = diffusion.model, diffusion.forward_process
    x_t = q.marginal(x_0, t).sample()
    kernel = model.kernel(x_t, t)
    cost = x_0.new_zeros(len(t))
    if t[-1] > 1:  # the times ascend
        posterior = q.posterior(x_t, x_0, t.clamp(min=2))
        cost = relative_entropy(posterior, kernel, posterior.sample())
    if t[0] == 1:
        cost = torch.where(t == 1, -model.decoded(kernel, x_t).log_prob(x_0), cost)
    return cost


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within (no dropout, say), and then each submodule's own mode again."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _bytes_a_row(diffusion: Diffusion, x_0: Tensor) -> int:
    """What one datum's state takes in the kernels, and in the outputs of the modules of the reverse process."""
    sizes = [16 * x_0.nbytes]

    def count(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    hooks = [module.register_forward_hook(count) for module in diffusion.reverse.modules()]
    try:
        diffusion.model.kernel(x_0, torch.ones(1, dtype=torch.long, device=x_0.device))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes)
