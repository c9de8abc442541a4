r"""The probability flow of a diffusion: an ordinary differential equation that carries its marginals into each other.

With :math:`\lambda` the log signal-to-noise ratio, :math:`a = \mathrm{sigmoid}(\lambda)^{1/2}`, and
:math:`z = x_t / (a_t^2 + b_t^2)^{1/2}`, which has unit scale throughout,

.. math::
    \frac{dz}{d\lambda} = \frac{a}{2} \left(\hat x_0(z, \lambda) - a z\right), \qquad
    \log p(z_1) = \log p(z_T) + \int_{\lambda_1}^{\lambda_T} \nabla \cdot \frac{dz}{d\lambda} \, d\lambda .

A denoiser is defined at t = 1..T; between two times :math:`\hat x_0` is interpolated linearly in :math:`\lambda` at
fixed z. So the flow is a model of its own, solved to a tolerance. Below t = 1 the score is held constant: with
:math:`y = x_t / a_t` and the fraction :math:`r = \sigma^2 / \sigma_1^2` of the variance
:math:`\sigma_1^2 = b_1^2 / a_1^2`,

.. math:: \frac{dy}{dr} = \frac12 \left(y - \hat x_0(a_1 y, 1)\right), \qquad r = 0, \dots, 1,

which has an error of order :math:`\sigma_1^4` and leads to a density at :math:`x_0` itself.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3 and
    Eqs. 39-40, https://arxiv.org/abs/2011.13456

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019), section
    3.1: the estimate of the trace, https://arxiv.org/abs/1810.01367
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64, home
from ..base.solver import solve
from ..model.reverse import GaussianReverse
from ..process.forward import GaussianForward
from .diffusion import Diffusion
from .terms import runs

__all__ = ["Flow", "check_flow", "refuse_a_cut_graph"]

_SHORT = 100  # steps
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_flow(diffusion: Diffusion, tolerance: float, max_steps: int) -> tuple[float, int]:
    """Check that a diffusion has a flow; returns the checked tolerance and number of steps.

    Arguments:
        diffusion, tolerance, max_steps: As of :class:`Flow`.

    Raises:
        ValueError: If the diffusion is not Gaussian or its schedule ends without signal, or another argument is out of
            range.
    """
    checks.instance("diffusion", diffusion, Diffusion)
    if not isinstance(diffusion.forward_process, GaussianForward):
        raise ArgumentError("diffusion", f"must be Gaussian to have a flow, but it is of {diffusion.forward_process!r}")
    schedule = diffusion.forward_process.schedule
    if not checks.holds(schedule.signal(diffusion.num_steps) != 0):
        raise ArgumentError("diffusion", f"must leave some signal at t = T, but its schedule is {schedule!r}")
    return arguments.number("tolerance", tolerance, 0, 1), arguments.positive_int("max_steps", max_steps)


def refuse_a_cut_graph(diffusion: Diffusion, x: Tensor, context: tuple[Tensor, ...]) -> None:
    """Refuse a network whose output depends on the state but has no gradient: its divergence would come out as 0.

    Arguments:
        diffusion: The diffusion.
        x: Some states, with shape (R, *event_shape).
        context: Their context.

    Raises:
        ValueError: If so.
    """
    denoiser = getattr(diffusion.reverse, "denoiser", None)
    network, t = getattr(denoiser, "network", denoiser), torch.ones(len(x), dtype=torch.long, device=x.device)
    if not isinstance(network, nn.Module):
        return
    with torch.enable_grad():
        given = x.detach().clone().requires_grad_()
        output = network(given, t, *context)
        gradient = None
        if output.requires_grad:
            (gradient,) = torch.autograd.grad(output.sum(), given, allow_unused=True)
        if gradient is None and not torch.equal(output, network(x + 0.1, t, *context)):
            raise ArgumentError(
                "denoiser",
                "must be differentiable in x_t for a flow, but what its network returns has no gradient, "
                "as under torch.no_grad() or after detach()",
            )


class Flow:
    """The flow between the times 0..T of a chain, for rows of states; time 0 is the data.

    Arguments:
        diffusion: A Gaussian diffusion, checked by :func:`check_flow`.
        tolerance: The error allowed per step, absolute and relative, of each number and of log p.
        max_steps: The number of steps after which a row is given up.
        num_probes: The number of random sign vectors (Hutchinson's probes) whose mean estimates the divergence; 0 to
            compute it exactly; None where no density is asked for.
        differentiable: Whether gradients flow to the states, their context and the parameters.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        tolerance: float,
        max_steps: int,
        num_probes: int | None = None,
        differentiable: bool = False,
    ) -> None:
        self.diffusion, self.tolerance, self.max_steps = diffusion, tolerance, max_steps
        self.num_probes, self.differentiable = num_probes, differentiable
        schedule, T = diffusion.forward_process.schedule, diffusion.num_steps
        t = torch.arange(1, T + 1, device=schedule.device)
        tables = (schedule.signal(t), schedule.noise(t), schedule.log_snr(t))
        self.signal, self.noise, self.log_snr = map(self._kept, tables)
        self.scale = (self.signal**2 + self.noise**2).sqrt()
        self.D = diffusion.event_shape.numel()

    def carry(
        self, x: Tensor, start: int, end: int, context: tuple[Tensor, ...], datum: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry states from one time to another.

        Arguments:
            x: The states at ``start``, with shape (R, *event_shape), in the dtype that the network takes.
            start, end: Two times in 0..T, in either order.
            context: The context of each datum, tensors of R rows.
            datum: The number of each row, for errors; counted from 0 if not given.

        Returns:
            The states at ``end``, in float64 with the shape of ``x``; log p(x_start) - log p(x_end), with shape
            (probes, R), or (1, R) where the divergence is exact, or not asked for (then it is 0); and the number of
            evaluations of the velocity, with shape (R,).

        Raises:
            RuntimeError: If the solver does not converge for a row.
        """
        state, dtype, R = float64(x).reshape(len(x), -1), x.dtype, len(x)
        change = state.new_zeros(max(self.num_probes or 0, 1), R)
        evaluations = torch.zeros(R, dtype=torch.long, device=state.device)
        probes = self._probes(state)
        datum = torch.arange(R, device=state.device) if datum is None else datum
        legs = [self._below(start, end, dtype, context), self._above(start, end, dtype, context)]
        for leg in legs if start < end else reversed(legs):
            if leg is None:
                continue
            velocity, scales, times, stops = leg
            state, integral, more = self._solved(velocity, state / scales[0], times, stops, probes, datum)
            state = state * scales[1]
            change = change + integral + self.D * (scales[1].log() - scales[0].log())
            evaluations = evaluations + more
        return state.reshape(x.shape), change, evaluations

    def log_prob_of_prior(self, x_T: Tensor) -> Tensor:
        """log p(x_T), with shape (R,)."""
        prior = self.diffusion.model.top(torch.float64, x_T.device)
        return prior.log_prob(x_T.to(prior.sample().dtype)).double()  # a given prior has a dtype of its own

    def _kept(self, x: Tensor) -> Tensor:
        return x if self.differentiable else x.detach()

    def _below(self, start: int, end: int, dtype: torch.dtype, context: tuple[Tensor, ...]) -> tuple | None:
        """The leg between the data and t = 1, if it is needed: the velocity of y, its scales, times and stops."""
        if min(start, end) > 0 or start == end:
            return None
        signal, one = self.signal[0], torch.ones_like(self.signal[0])

        def velocity(r: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            t = torch.ones_like(rows)
            return (y - self._estimate(signal * y, t, [values[rows] for values in context], dtype)) / 2

        scales, times = (one, signal), (0 * one, one)
        return (velocity, scales, times, None) if start < end else (velocity, scales[::-1], times[::-1], None)

    def _above(self, start: int, end: int, dtype: torch.dtype, context: tuple[Tensor, ...]) -> tuple | None:
        """The leg above t = 1: the velocity of z along the falling log SNR, its scales, times and stops."""
        start, end = max(start, 1) - 1, max(end, 1) - 1
        if start == end:
            return None

        def velocity(time: Tensor, z: Tensor, rows: Tensor) -> Tensor:
            a = torch.sigmoid(-time)[:, None].sqrt()
            return -a / 2 * (self._between(z, -time, [values[rows] for values in context], dtype) - a * z)

        # the velocity has a kink at each t, which is a stop in a short chain; in a long one kinks are slight, and 20
        # stops keep steps from skipping narrow features
        T = len(self.log_snr)
        stops = -self.log_snr[:: 1 if T <= _SHORT else math.ceil(T / 20)]
        times = (-self.log_snr[start], -self.log_snr[end])
        return velocity, (self.scale[start], self.scale[end]), times, stops

    def _between(self, z: Tensor, log_snr: Tensor, context: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The estimate of x_0 at any log SNR: linear between the two times around it."""
        falling = -self.log_snr
        after = torch.searchsorted(falling.detach(), -log_snr.detach().contiguous()).clamp(1, len(falling) - 1)
        before = after - 1  # times are index + 1
        part = ((-log_snr - falling[before]) / (falling[after] - falling[before])).clamp(0, 1)[:, None]
        x = torch.cat([self.scale[before, None] * z, self.scale[after, None] * z])
        context = [torch.cat([values, values]) for values in context]
        first, second = self._estimate(x, torch.cat([before, after]) + 1, context, dtype).chunk(2)
        return (1 - part) * first + part * second

    def _estimate(self, x: Tensor, t: Tensor, context: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The estimate of x_0, flat and in float64."""
        reverse, process, device = self.diffusion.reverse, self.diffusion.forward_process, self.diffusion.model.device
        x_t = x.to(dtype).to(device).reshape((len(x), *self.diffusion.event_shape))
        if runs(reverse, GaussianReverse):
            return float64(reverse.denoiser(x_t, t.to(device), *context)).reshape(x.shape)
        weight_t, weight_0, _ = process.schedule.posterior(t)
        mean = float64(self.diffusion.model.kernel(x_t, t.to(device), *context).mean).reshape(x.shape)
        return (mean - weight_t[:, None] * x) / weight_0[:, None]  # x_0 whose posterior mean is E[x_{t-1}]

    def _probes(self, x: Tensor) -> Tensor:
        """Random signs, with shape (R, probes, D)."""
        signs = torch.randint(2, (self.num_probes or 0, len(x), self.D), device=home(x.device))
        return (2 * signs.double() - 1).transpose(0, 1)

    def _solved(
        self,
        velocity: Velocity,
        x: Tensor,
        times: tuple[Tensor, Tensor],
        stops: Tensor | None,
        probes: Tensor,
        datum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state at the end of a leg, the integral of the divergence per probe, and the number of evaluations."""

        def drift(time: Tensor, state: Tensor, rows: Tensor) -> Tensor:
            if self.num_probes is None:
                return self._kept(velocity(time, state, rows))
            with torch.enable_grad():
                x = state[:, : self.D]
                x = x if self.differentiable and x.requires_grad else x.detach().requires_grad_()
                found = velocity(time, x, rows)
                both = torch.cat([found, self._divergence(found, x, probes[rows])], 1)
            return self._kept(both)

        state = x if self.num_probes is None else torch.cat([x, x.new_zeros(len(x), max(self.num_probes, 1))], 1)
        start, end = (time.double().to(x.device) for time in times)
        stops = None if stops is None else stops.double().to(x.device)
        solution = solve(drift, state, start, end, self.tolerance, self.max_steps, stops)
        if bool(solution.failed.any()):
            failed = solution.failed
            raise RuntimeError(
                f"the flow did not converge for {int(failed.sum())} of {len(x)} data, the first number "
                f"{int(datum[failed.to(datum.device)][0])} of its batch: allow more than max_steps = "
                f"{self.max_steps}, or a larger tolerance than {self.tolerance:g}"
            )
        integral = solution.y[:, self.D :].T if self.num_probes is not None else x.new_zeros(1, len(x))
        return solution.y[:, : self.D], integral, solution.num_evaluations

    def _divergence(self, f: Tensor, x: Tensor, probes: Tensor) -> Tensor:
        """The divergence of f, row by row, with shape (R, probes); exact, with shape (R, 1), without probes."""
        if self.num_probes == 0:
            columns = (self._gradient(f[:, i], x, i + 1 < self.D)[:, i] for i in range(self.D))
            return sum(columns, torch.zeros_like(f[:, 0].detach()))[:, None]
        signs = probes.unbind(1)
        estimates = [
            (self._gradient((f * sign).sum(1), x, i + 1 < len(signs)) * sign).sum(1) for i, sign in enumerate(signs)
        ]
        return torch.stack(estimates, 1)

    def _gradient(self, f: Tensor, x: Tensor, more: bool) -> Tensor:
        if not f.requires_grad:
            return torch.zeros_like(x)
        keep, again = more or self.differentiable, self.differentiable
        (gradient,) = torch.autograd.grad(f.sum(), x, retain_graph=keep, create_graph=again, allow_unused=True)
        return torch.zeros_like(x) if gradient is None else gradient
