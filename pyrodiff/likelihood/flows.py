r"""The likelihood of the probability flow, an ordinary differential equation with the marginals of the diffusion.

The flow is defined in :mod:`pyrodiff.pair.flow`.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3 and
    Eqs. 39-40, https://arxiv.org/abs/2011.13456

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019), section
    3.1: the estimate of the trace, https://arxiv.org/abs/1810.01367
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..base import arguments
from ..base.arguments import ArgumentError
from ..base.precision import float64
from ..model.decoders import GaussianDecoder
from ..pair.diffusion import Diffusion
from ..pair.flow import Flow, check_flow, refuse_a_cut_graph
from ..pair.terms import runs
from ..running.evaluation import Batch, batches, dry_run, evaluating, expect, guided, progress_bar
from .estimate import Likelihood

__all__ = ["FlowLikelihood", "ode_log_prob"]

_EXACT_UP_TO = 20  # dimensions


@dataclass(frozen=True, repr=False, eq=False)
class FlowLikelihood(Likelihood):
    """-log p(x_0) of the probability flow, or, if a decoder follows it, a bound on that, in nats.

    Arguments:
        estimates: Unbiased estimates of the cost, with shape (S, B): one per draw of x_1, or one per probe.
        is_bound: Whether their mean is a bound on the cost, or the cost itself.
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
        num_steps: The number of steps T.
        num_probes: The number of probes of the divergence; 0 if it was computed exactly.
        num_evaluations: The number of evaluations of the drift by the solver, with shape (B,), the mean over draws.
    """

    estimates: Tensor
    is_bound: bool
    event_shape: torch.Size
    levels: int | float | None
    num_steps: int
    num_probes: int
    num_evaluations: Tensor

    @property
    def nats(self) -> Tensor:
        return self.estimates.mean(0)

    def _raised(self, nats: float) -> dict[str, Tensor]:
        return {"estimates": self.estimates + nats}

    @property
    def noise(self) -> Tensor:
        """The standard error of each datum's cost, with shape (B,): over the draws of x_1, or else over the probes.

        NaN if there is only one: for a bound, ask for several ``num_particles``. Where the divergence is exact and no
        decoder follows, nothing is drawn and it is 0.
        """
        if len(self.estimates) == 1:
            return torch.full_like(self.estimates[0], math.nan if self.is_bound or self.num_probes else 0.0)
        return self.estimates.std(0) / math.sqrt(len(self.estimates))

    @property
    def title(self) -> str:
        kind = "bound on -log p(x_0)" if self.is_bound else "-log p(x_0)"
        return f"{kind} of the probability flow, T = {self.num_steps}"

    def rows(self) -> dict[str, Tensor]:
        return {"bound" if self.is_bound else "-log p(x_0)": self.nats}


def ode_log_prob(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    *context: Tensor,
    num_probes: int | None = None,
    num_particles: int | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    memory_budget: int | None = None,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
    differentiable: bool = False,
) -> FlowLikelihood:
    r"""The likelihood under the probability flow of a diffusion.

    Where the data have a density (:class:`GaussianDecoder`), it is the density of the flow at :math:`x_0`, a number
    and not a bound. With any other decoder, which makes the last step, the result is the bound

    .. math:: -\log p(x_0) \le -\mathbb{E}_{q(x_1 | x_0)} \left[
        \log p_\mathrm{flow}(x_1) + \log p_\theta(x_0 | x_1) - \log q(x_1 | x_0) \right].

    The error is controlled per datum, so a datum's result depends on the other data only through the draws (probes and
    :math:`x_1`) and the rounding of the network. The flow is another model than the chain: the two agree if the
    denoiser is exact and the steps are small; else the bound may be on either side.

    Arguments:
        diffusion: A Gaussian diffusion. Its :math:`\hat x_0` is the denoiser's, or, for another kind of reverse
            process, the one that the mean of its kernel implies.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_probes: The number of random sign vectors whose mean estimates the divergence; 0 to compute it exactly, by D
            gradients per evaluation. If not given, 0 up to 20 dimensions and 10 above.
        num_particles: The number of draws of :math:`x_1`, if a decoder follows; 1 if not given.
        tolerance: The error allowed per step, absolute and relative, of each number and of log p.
        max_steps: The number of steps after which a datum is given up.
        memory_budget: The memory for the states and activations of one batch of network calls, in bytes; if not
            given, 2^28, or on a GPU about an eighth of its memory. Draws of x_1 and of probes depend on it.
        generator: A generator or a seed, for the same number each time; torch's global generator if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, which are drawn from it once: a program, called with the data (None for a
            loader) and their context. Required if there are random weights, else not allowed.
        differentiable: Whether the costs can be differentiated, with respect to the data, their context and all
            parameters: then log p may be a term of a program, or of a loss. The gradients are those of the solver's
            steps, with their sizes held fixed. The graph of every evaluation is kept in memory.

    Returns:
        The costs, one per datum.

    Raises:
        ValueError: As :func:`bound`; if the diffusion is not Gaussian, or its schedule ends without signal; if
            ``num_particles`` is given where nothing is drawn.
        RuntimeError: If the solver does not converge for a datum.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3,
        https://arxiv.org/abs/2011.13456

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=20))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> flow = pyrodiff.ode_log_prob(diffusion, torch.randn(5, 2))
        >>> flow.log_prob.shape, flow.is_bound
        (torch.Size([5]), False)
        >>> x_0 = torch.randn(5, 2, requires_grad=True)
        >>> pyrodiff.ode_log_prob(diffusion, x_0, tolerance=1e-3, differentiable=True).log_prob.sum().backward()
        >>> x_0.grad.shape
        torch.Size([5, 2])
    """
    tolerance, max_steps = check_flow(diffusion, tolerance, max_steps)
    if num_probes is not None and not (arguments.is_int(num_probes) and num_probes >= 0):
        raise ArgumentError("num_probes", f"must be an int of at least 0, or None, but it is {num_probes!r}")
    arguments.one_of("differentiable", differentiable, (False, True))
    is_bound, D = not runs(diffusion.model.decoder, GaussianDecoder), diffusion.event_shape.numel()
    if num_particles is not None:
        num_particles = arguments.positive_int("num_particles", num_particles)
        if not is_bound:
            raise ArgumentError(
                "num_particles", f"must be None where no decoder follows the flow, but it is {num_particles}"
            )
    if num_probes is None:
        num_probes = 0 if D <= _EXACT_UP_TO else 10
    graph = torch.enable_grad() if differentiable else torch.no_grad()
    evaluated = evaluating(diffusion, generator, guide=guide, given=guided(x_0, context))
    derived = torch.inference_mode(False)  # the divergence is a derivative
    with derived, graph, evaluated, progress_bar(progress, "probability flow") as bar:
        flow, results = Flow(diffusion, tolerance, max_steps, num_probes, differentiable), []
        for batch in batches(diffusion, x_0, context, "num_probes"):
            batch = batch.differentiable()
            rows = max(1, dry_run(memory_budget, diffusion, batch).rows // 4)  # two times, and their gradients
            one = batch.rows(slice(1))
            refuse_a_cut_graph(diffusion, one.x_0, one.context)
            draws, B = (num_particles or 1) if is_bound else 1, len(batch)
            expect(bar, x_0, draws * B)
            row = torch.arange(draws * B, device=batch.x_0.device) % B
            parts = [_costs(flow, batch.rows(chunk), chunk, is_bound, bar) for chunk in row.split(rows)]
            costs, evaluations = (torch.cat(part, -1) for part in zip(*parts, strict=True))
            estimates = costs.mean(0).reshape(draws, B) if is_bound else costs
            results.append((estimates, evaluations.reshape(draws, B).double().mean(0)))
    estimates, evaluations = (torch.cat(parts, -1) for parts in zip(*results, strict=True))
    levels, T = diffusion.levels, diffusion.num_steps
    return FlowLikelihood(estimates, is_bound, diffusion.event_shape, levels, T, num_probes, evaluations)


def _costs(flow: Flow, data: Batch, datum: Tensor, is_bound: bool, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Costs, with shape (probes, R), and evaluations, with shape (R,), of R rows of data of the given numbers."""
    diffusion, x_0, context, start = flow.diffusion, data.x_0, data.context, 0
    extra: Tensor | float = 0.0
    x = x_0
    if is_bound:
        q = diffusion.forward_process.marginal(x_0, 1)
        x, start = q.rsample(), 1
        last = diffusion.model.decoded(diffusion.model.kernel(x, 1, *context), x)
        extra = float64(last.log_prob(x_0) - q.log_prob(x))
    x_T, change, evaluations = flow.carry(x, start, diffusion.num_steps, context, datum)
    bar.update(len(x_0))
    return -(flow.log_prob_of_prior(x_T) + change + extra), evaluations
