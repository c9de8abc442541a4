r"""Sampling by the probability flow, with an adaptive solver, and log p of the samples in the same solve.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3,
    https://arxiv.org/abs/2011.13456
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64
from ..model.decoders import GaussianDecoder
from ..pair.diffusion import Diffusion
from ..pair.flow import Flow, check_flow, refuse_a_cut_graph
from ..pair.terms import runs
from ..running.evaluation import evaluating, progress_bar, validated
from .sampler import Sampler, drawn

__all__ = ["FlowSampler"]


class FlowSampler(Sampler):
    r"""Carries draws of p(x_T) down the probability flow by an adaptive solver, each draw with its own steps.

    The flow is exactly that of :func:`ode_log_prob`, also between times and below t = 1, so that :meth:`with_log_prob`
    can return the density of each sample. With fewer steps (``num_steps``, ``times``) it is the flow of the chain of
    these times; the solver chooses how often the network is called. If a decoder makes the last step
    (:class:`DiscretizedDecoder`, say), x_0 is drawn from it, given :math:`x_1`.

    Arguments:
        diffusion: A Gaussian diffusion.
        tolerance: The error allowed per step, absolute and relative, of each number (and of log p).
        max_steps: The number of the solver's steps after which a sample is given up.
        num_steps, times, guide: As of :class:`Sampler`.

    Raises:
        ValueError: As :class:`Sampler`; if the diffusion is not Gaussian, its schedule ends without signal, or
            ``tolerance`` or ``max_steps`` are out of range.
        RuntimeError: On a call, if the solver does not converge for a sample.

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3,
        https://arxiv.org/abs/2011.13456

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> denoiser = pyrodiff.VelocityPrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> sampler = pyrodiff.FlowSampler(diffusion)
        >>> x_0, log_prob = sampler.with_log_prob(5, generator=1)
        >>> torch.allclose(log_prob, pyrodiff.ode_log_prob(diffusion, x_0).log_prob, atol=1e-3)
        True
    """

    def __init__(
        self,
        diffusion: Diffusion,
        tolerance: float = 1e-5,
        max_steps: int = 1000,
        *,
        num_steps: int | None = None,
        times: Sequence[int] | None = None,
        guide: Callable | None = None,
    ) -> None:
        self.tolerance, self.max_steps = check_flow(diffusion, tolerance, max_steps)
        super().__init__(diffusion, num_steps=num_steps, times=times, guide=guide)

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """The states at t - 1."""
        return self._carried(x_t, int(t[0]), int(t[0]) - 1, context)

    def last(self, x_1: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """The data at the end of the flow from t = 1, or a draw of the decoder."""
        if not runs(self.chain.model.decoder, GaussianDecoder):
            return super().last(x_1, t, *context)
        return self._carried(x_1, 1, 0, context)

    def with_log_prob(
        self,
        num_samples: int,
        *context: Tensor,
        num_steps: int | None = None,
        num_probes: int = 0,
        generator: torch.Generator | int | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draw samples, and compute log p of each in the same solve.

        Arguments:
            num_samples, *context, num_steps, generator, progress: See :meth:`Sampler.__call__`.
            num_probes: The number of random sign vectors whose mean estimates the divergence; 0 to compute it exactly.

        Returns:
            The samples, with shape (n, *event_shape), and log p of each under the flow, in nats and
            float64 with shape (n,).

        Raises:
            ValueError: As :meth:`Sampler.__call__`; if a decoder makes the last step, so that p has no closed form.
        """
        if not runs(self.diffusion.model.decoder, GaussianDecoder):
            raise ArgumentError(
                "diffusion",
                f"must end without a decoder for log p of its samples, but it has a "
                f"{type(self.diffusion.model.decoder).__name__}: ode_log_prob bounds log p of samples there",
            )
        if not (arguments.is_int(num_probes) and num_probes >= 0):
            raise ArgumentError("num_probes", f"must be an int of at least 0, but it is {num_probes!r}")
        num_samples = arguments.positive_int("num_samples", num_samples)
        checks.context(context, num_samples, self.diffusion.model.device, "num_steps")
        self._choose(num_steps)
        evaluated, T = evaluating(self.chain, generator, guide=self.guide, given=(None, *context)), self.chain.num_steps
        derived = torch.inference_mode(False)  # the divergence is a derivative
        with derived, torch.no_grad(), evaluated, progress_bar(progress, "samples") as bar:
            x_T, context = self._start(num_samples, context)
            refuse_a_cut_graph(self.chain, x_T[:1], tuple(values[:1] for values in context))
            flow = Flow(self.chain, self.tolerance, self.max_steps, num_probes)
            x_0, change, _ = flow.carry(x_T, T, 0, context)
            bar.update(num_samples)
            log_prob = flow.log_prob_of_prior(float64(x_T)) - change.mean(0)
        return x_0.to(x_T.dtype).to(x_T.device), log_prob

    def _run(
        self, num_samples: int, context: tuple[Tensor, ...], bar: tqdm, wanted: set[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """As of any sampler, but stopping only at times whose states are wanted."""
        x, context = self._start(num_samples, context)
        t = self.chain.num_steps
        yield t, x
        for k in sorted((wanted | {1}) - {0, t}, reverse=True):
            if k == 1 and 1 not in wanted and runs(self.chain.model.decoder, GaussianDecoder):
                continue  # the flow goes on to the data without a stop
            x, t = self._carried(x, t, k, context), k
            yield k, x
        if runs(self.chain.model.decoder, GaussianDecoder):
            x = self._carried(x, t, 0, context)
        else:
            x = self.last(x, torch.ones(num_samples, dtype=torch.long, device=x.device), *context)
        bar.update(num_samples * self.chain.num_steps)
        yield 0, x

    def _start(self, num_samples: int, context: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Draws of p(x_T), and the context of each; the first network call is validated."""
        model = self.chain.model
        with validated(model.device):
            x = drawn(model.top(model.dtype(), model.device), num_samples)
            context = tuple(values.expand(num_samples, *values.shape[1:]) for values in context)
            model.kernel(x, torch.full((num_samples,), self.chain.num_steps, device=x.device), *context)
        return x, context

    def _carried(self, x: Tensor, start: int, end: int, context: tuple[Tensor, ...]) -> Tensor:
        carried, _, _ = Flow(self.chain, self.tolerance, self.max_steps).carry(x, start, end, context)
        return carried.to(x.dtype).to(x.device)
