r"""The likelihood of the probability flow: an ordinary differential equation with the marginals of the diffusion.

With :math:`\lambda` the log signal-to-noise ratio, :math:`a = \mathrm{sigmoid}(\lambda)^{1/2}`, and
:math:`z = x_t / (a_t^2 + b_t^2)^{1/2}`, which has unit scale throughout,

.. math::
    \frac{dz}{d\lambda} = \frac{a}{2} \left(\hat x_0(z, \lambda) - a z\right), \qquad
    \log p(z_1) = \log p(z_T) + \int_{\lambda_1}^{\lambda_T} \nabla \cdot \frac{dz}{d\lambda} \, d\lambda .

A denoiser is known at t = 1..T; between two times :math:`\hat x_0` is taken as linear in :math:`\lambda` at fixed z,
so that the flow is a model of its own, solved to a tolerance. Below t = 1 the score is held: with
:math:`y = x_t / a_t` and r the part :math:`\sigma^2 / \sigma_1^2` of the variance :math:`\sigma_1^2 = b_1^2 / a_1^2`,

.. math:: \frac{dy}{dr} = \frac12 \left(y - \hat x_0(a_1 y, 1)\right), \qquad r = 0, \dots, 1,

which has an error of order :math:`\sigma_1^4` and leads to a density at :math:`x_0` itself.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3 and
    Eqs. 39-40, https://arxiv.org/abs/2011.13456

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019), section
    3.1: the estimate of the trace, https://arxiv.org/abs/1810.01367
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..base import checks
from ..base.precision import float64, home
from ..model.decoders import GaussianDecoder
from ..model.reverse import GaussianReverse
from ..pair.diffusion import Diffusion
from ..pair.terms import runs
from ..process.forward import GaussianForward
from ..running.evaluation import Batch, batches, evaluating, expect, guided, look, progress_bar
from .estimate import Likelihood

__all__ = ["FlowLikelihood", "ode_log_prob"]

_EXACT_UP_TO = 20  # dimensions
Context = tuple[Tensor, ...]


@dataclass(frozen=True, repr=False, eq=False)
class FlowLikelihood(Likelihood):
    """-log p(x_0) of the probability flow, or, where it is followed by a decoder, a bound on it, in nats.

    Arguments:
        estimates: Estimates of the cost, each unbiased, with shape (S, B): one a draw of x_1, or one a probe.
        is_bound: Whether their mean is a bound on the cost, or the cost itself.
        event_shape: The shape of one datum.
        levels: The number of levels of a dimension, where p is a probability; None where it is a density.
        num_steps: The number of steps T.
        num_probes: The number of probes of the divergence; 0 if it was computed.
        num_evaluations: The evaluations of the drift that the solver needed, with shape (B,), the mean over draws.
    """

    estimates: Tensor
    is_bound: bool
    event_shape: torch.Size
    levels: int | None
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
        """The standard error of each datum's cost, with shape (B,): from the draws of x_1, or else from the probes.

        NaN where there is but one of them: of a bound, ask for several ``num_particles``. Where the divergence is exact
        and no decoder follows, nothing is drawn and it is 0.
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


@torch.no_grad()
def ode_log_prob(
    diffusion: Diffusion,
    x_0: Tensor | Iterable,
    *context: Tensor,
    num_probes: int | None = None,
    num_particles: int | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    memory_budget: int = 2**28,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
    guide: Callable | None = None,
) -> FlowLikelihood:
    r"""The likelihood under the probability flow of a diffusion.

    Where the data have a density (:class:`GaussianDecoder`), it is the density of the flow at :math:`x_0`, a number
    and not a bound. Any other decoder makes the last step, and what comes out is the bound

    .. math:: -\log p(x_0) \le -\mathbb{E}_{q(x_1 | x_0)} \left[
        \log p_\mathrm{flow}(x_1) + \log p_\theta(x_0 | x_1) - \log q(x_1 | x_0) \right].

    The error is controlled for each datum by itself, so its number does not depend on the data beside it, but for what
    is drawn (probes and :math:`x_1`) and the rounding of the network. The flow is another model than the chain: the two
    agree where the denoiser is exact and the steps are small, and else the bound may lie on either side. The solver is
    torchode's, in the extra ``pyrodiff[ode]``.

    Arguments:
        diffusion: A Gaussian diffusion. Its :math:`\hat x_0` is the denoiser's, or, of a reverse process of another
            kind, what the mean of its kernel says.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context.
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_probes: The number of random signs whose mean estimates the divergence; 0 to compute it, D gradients an
            evaluation. If not given, 0 up to 20 dimensions and 10 above.
        num_particles: The number of draws of :math:`x_1`, where a decoder follows; 1 if not given.
        tolerance: The error allowed in a step, absolute and relative, of each number and of log p.
        max_steps: The number of steps after which a datum is given up.
        memory_budget: What the states and activations of one batch of network calls may take, in bytes.
        generator: A generator or a seed, for the same number each time; torch's global source if not given.
        progress: Whether to show a progress bar, where there is a terminal.
        guide: The guide of random weights, which are drawn from it once: a program, called with the data, or None in
            the place of a loader, and their context. To be given where there are random weights, and only there.

    Returns:
        The costs, a datum each.

    Raises:
        ValueError: As :func:`bound`; if the diffusion is not Gaussian, or its schedule ends without signal; if
            ``num_particles`` is given where nothing is drawn.
        RuntimeError: If the solver does not converge for a datum.
        ImportError: If torchode is not installed.

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
    """
    num_probes, tolerance, max_steps = _checked(diffusion, num_probes, tolerance, max_steps)
    is_bound, D = not runs(diffusion.model.decoder, GaussianDecoder), diffusion.event_shape.numel()
    if num_particles is not None:
        num_particles = checks.positive_int("num_particles", num_particles)
        if not is_bound:
            raise ValueError(f"num_particles must be None where no decoder follows the flow, but it is {num_particles}")
    if num_probes is None:
        num_probes = 0 if D <= _EXACT_UP_TO else 10
    differentiable = torch.inference_mode(False)  # the divergence is a derivative
    evaluated = evaluating(diffusion, generator, guide=guide, given=guided(x_0, context))
    with differentiable, evaluated, progress_bar(progress, "probability flow") as bar:
        flow, results = _Flow(diffusion, num_probes, tolerance, max_steps), []
        for batch in batches(diffusion, x_0, context, "num_probes"):
            batch = batch.differentiable()
            rows = max(1, look(memory_budget, diffusion, batch).rows // 4)  # two times, and their gradients
            _refuse_a_cut_graph(diffusion, batch.rows(slice(1)))
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


def _checked(
    diffusion: Diffusion, num_probes: int | None, tolerance: float, max_steps: int
) -> tuple[int | None, float, int]:
    checks.instance("diffusion", diffusion, Diffusion)
    if not isinstance(diffusion.forward_process, GaussianForward):
        raise ValueError(f"diffusion must be Gaussian to have a flow, but it is of {diffusion.forward_process!r}")
    if not checks.holds(diffusion.forward_process.schedule.signal(diffusion.num_steps) != 0):
        schedule = diffusion.forward_process.schedule
        raise ValueError(f"diffusion must leave some signal at t = T, but its schedule is {schedule!r}")
    if num_probes is not None and not (checks.is_int(num_probes) and num_probes >= 0):
        raise ValueError(f"num_probes must be an int of at least 0, or None, but it is {num_probes!r}")
    tolerance, max_steps = checks.number("tolerance", tolerance, 0, 1), checks.positive_int("max_steps", max_steps)
    return None if num_probes is None else int(num_probes), tolerance, max_steps


def _refuse_a_cut_graph(diffusion: Diffusion, one: Batch) -> None:
    """Refuse a network whose output changes with the state but has no gradient: that would count as no divergence."""
    denoiser, x_0, context = getattr(diffusion.reverse, "denoiser", None), one.x_0, one.context
    network, t = getattr(denoiser, "network", denoiser), torch.ones(1, dtype=torch.long, device=x_0.device)
    if not isinstance(network, nn.Module):
        return
    with torch.enable_grad():
        output = network(x_0.detach().clone().requires_grad_(), t, *context)
        if not output.requires_grad and not torch.equal(output, network(x_0 + 0.1, t, *context)):
            raise ValueError(
                "denoiser must be differentiable in x_t for a flow, but what its network returns has no gradient, as "
                "under torch.no_grad()"
            )


def _costs(flow: "_Flow", data: Batch, datum: Tensor, is_bound: bool, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Costs, with shape (probes, R), and evaluations, with shape (R,), of R rows of data of the given numbers."""
    diffusion, x_0, context = flow.diffusion, data.x_0, data.context
    if is_bound:
        q = diffusion.forward_process.marginal(x_0, 1)
        x_1 = q.sample()
        log_p, evaluations = flow.log_prob_of_x_1(x_1, context, datum)
        last = diffusion.model.decoded(diffusion.model.kernel(x_1, 1, *context), x_1)
        log_p = log_p + last.log_prob(x_0) - q.log_prob(x_1)
    else:
        log_p, evaluations = flow.log_prob_of_x_0(x_0, context, datum)
    bar.update(len(x_0))
    return -log_p, evaluations


class _Flow:
    """The flow of a diffusion, upwards from the data: log densities of rows of data, each with probes of its own.

    A row's state is flat and in float64: the D numbers of the datum, then an integral of the divergence for each probe.
    """

    def __init__(self, diffusion: Diffusion, num_probes: int, tolerance: float, max_steps: int) -> None:
        self.diffusion, self.num_probes, self.tolerance, self.max_steps = diffusion, num_probes, tolerance, max_steps
        schedule, T = diffusion.forward_process.schedule, diffusion.num_steps
        t = torch.arange(1, T + 1, device=schedule.device)
        self.signal, self.log_snr = schedule.signal(t).detach(), schedule.log_snr(t).detach()
        self.scale = (self.signal**2 + schedule.noise(t).detach() ** 2).sqrt()
        self.D = diffusion.event_shape.numel()

    def log_prob_of_x_0(self, x_0: Tensor, context: Context, datum: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x_0), with shape (probes, R), and the evaluations, with shape (R,)."""
        probes = self._probes(x_0)

        def drift(r: Tensor, state: Tensor) -> Tensor:
            with torch.enable_grad():
                y = state[:, : self.D].detach().requires_grad_()
                t = torch.ones_like(r, dtype=torch.long)
                estimate = self._estimate(self.signal[0] * y, t, context, x_0.dtype)
                divergence = self._divergence(estimate, y, probes)
            return torch.cat([y.detach() - estimate.detach(), self.D - divergence], 1) / 2

        y_1, integral, first = self._solve(
            drift, float64(x_0).reshape(len(x_0), -1), self.signal.new_zeros(()), self.signal.new_ones(()), datum
        )
        z_1 = self.signal[0] / self.scale[0] * y_1
        log_p, evaluations = self._log_prob(z_1, probes, context, x_0.dtype, datum)
        return log_p + integral + self.D * self.signal[0].log() - self.D * self.scale[0].log(), first + evaluations

    def log_prob_of_x_1(self, x_1: Tensor, context: Context, datum: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x_1), as above."""
        z_1 = float64(x_1).reshape(len(x_1), -1) / self.scale[0]
        log_p, evaluations = self._log_prob(z_1, self._probes(x_1), context, x_1.dtype, datum)
        return log_p - self.D * self.scale[0].log(), evaluations

    def _log_prob(
        self, z_1: Tensor, probes: Tensor, context: Context, dtype: torch.dtype, datum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p(z_1) of the state of unit scale at t = 1."""
        z_T, integral, evaluations = z_1, z_1.new_zeros((max(self.num_probes, 1), len(z_1))), torch.zeros_like(datum)
        if len(self.log_snr) > 1:

            def drift(time: Tensor, state: Tensor) -> Tensor:
                with torch.enable_grad():
                    z = state[:, : self.D].detach().requires_grad_()
                    a = torch.sigmoid(-time)[:, None].sqrt()
                    estimate = self._between(z, -time, context, dtype)
                    divergence = self._divergence(estimate, z, probes)
                return -a / 2 * torch.cat([estimate.detach() - a * z.detach(), divergence - a * self.D], 1)

            # the drift has a kink at each t: a step is short enough not to pass over the kinks of a short chain unseen
            longest = float(self.log_snr[0] - self.log_snr[-1]) / 20
            z_T, integral, evaluations = self._solve(drift, z_1, -self.log_snr[0], -self.log_snr[-1], datum, longest)
        x_T = (self.scale[-1] * z_T).reshape((len(z_T), *self.diffusion.event_shape))
        prior = self.diffusion.model.top(torch.float64, x_T.device)
        top = prior.log_prob(x_T.to(prior.sample().dtype)).double()  # a given prior has a dtype of its own
        return top + self.D * self.scale[-1].log() + integral, evaluations

    def _between(self, z: Tensor, log_snr: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        """The estimate of x_0 at any log SNR: linear between the two times around it."""
        falling = -self.log_snr
        after = torch.searchsorted(falling, -log_snr.contiguous()).clamp(1, len(falling) - 1)
        before = after - 1  # times are index + 1
        part = ((-log_snr - falling[before]) / (falling[after] - falling[before])).clamp(0, 1)[:, None]
        x = torch.cat([self.scale[before, None] * z, self.scale[after, None] * z])
        context = tuple(torch.cat([values, values]) for values in context)
        first, second = self._estimate(x, torch.cat([before, after]) + 1, context, dtype).chunk(2)
        return (1 - part) * first + part * second

    def _estimate(self, x: Tensor, t: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
        """The estimate of x_0, flat and in float64."""
        reverse, process, device = self.diffusion.reverse, self.diffusion.forward_process, self.diffusion.model.device
        x_t = x.to(dtype).to(device).reshape((len(x), *self.diffusion.event_shape))
        if runs(reverse, GaussianReverse):
            return float64(reverse.denoiser(x_t, t.to(device), *context)).reshape(x.shape)
        weight_t, weight_0, _ = process.schedule.posterior(t)
        mean = float64(self.diffusion.model.kernel(x_t, t.to(device), *context).mean).reshape(x.shape)
        return (mean - weight_t[:, None] * x) / weight_0[:, None]  # E[x_{t-1}] is that of the posterior's mean

    def _probes(self, x: Tensor) -> Tensor:
        """Random signs, with shape (probes, R, D)."""
        signs = torch.randint(2, (self.num_probes, len(x), self.D), device=home(x.device))
        return 2 * signs.double() - 1

    def _divergence(self, f: Tensor, z: Tensor, probes: Tensor) -> Tensor:
        """The divergence of f, row by row, with shape (R, probes); exact, with shape (R, 1), without probes."""
        if self.num_probes == 0:
            columns = (_gradient(f[:, i], z, i + 1 < self.D)[:, i] for i in range(self.D))
            return sum(columns, torch.zeros_like(f[:, 0].detach()))[:, None]
        estimates = [
            (_gradient((f * probe).sum(1), z, i + 1 < self.num_probes) * probe).sum(1) for i, probe in enumerate(probes)
        ]
        return torch.stack(estimates, 1)

    def _solve(
        self, drift: Callable, x: Tensor, start: Tensor, end: Tensor, datum: Tensor, longest: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers at the end, the integrals, with shape (probes, R), and the evaluations, with shape (R,)."""
        torchode = _torchode()
        y_0 = torch.cat([x, x.new_zeros(len(x), max(self.num_probes, 1))], 1)
        start, end = (bound.double().expand(len(x)) for bound in (start, end))
        term = torchode.ODETerm(drift)
        limits = {"term": term, "norm": _largest, "dt_max": longest}
        control = torchode.IntegralController(self.tolerance, self.tolerance, **limits)
        # torchode takes the last step that it allows for one too many
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control, max_steps=self.max_steps + 1)
        solution = solver.to(x.device).solve(torchode.InitialValueProblem(y_0, start, end))
        failed = (solution.status != 0) | ~solution.ys[:, -1].isfinite().all(1)
        if bool(failed.any()):
            reasons = {torchode.Status(int(status)).name for status in solution.status[failed]}
            raise RuntimeError(
                f"the flow did not converge for {int(failed.sum())} of {len(x)} data, the first number "
                f"{int(datum[failed][0])} of its batch ({', '.join(sorted(reasons))}): allow more than max_steps = "
                f"{self.max_steps}, or a larger tolerance than {self.tolerance:g}"
            )
        state = solution.ys[:, -1]
        return state[:, : self.D], state[:, self.D :].T, 1 + 6 * solution.stats["n_steps"]


def _gradient(f: Tensor, z: Tensor, more: bool) -> Tensor:
    if not f.requires_grad:
        return torch.zeros_like(z)
    gradient = torch.autograd.grad(f.sum(), z, retain_graph=more, allow_unused=True)[0]
    return torch.zeros_like(z) if gradient is None else gradient


def _largest(error: Tensor) -> Tensor:
    return error.abs().amax(1)


def _torchode() -> Any:
    try:
        import torchode
    except ImportError as error:
        raise ImportError("ode_log_prob needs torchode: pip install 'pyrodiff[ode]'") from error
    return torchode
