r"""A diffusion as the law of a site in a larger program: the prior of a latent, or the likelihood of data.

Its density has no closed form. Two estimates stand for it. The *one-step estimate* draws one t, or a few,

.. math::
    \log p(z) \ge -L_T(z) - T \, \mathbb{E}_{t, \, q(x_t | z)} \left[ L_{t-1}(z, x_t) \right],

without bias for the bound on the right, at one network call. It varies much, since :math:`T L_0` is large and comes
once in T draws. The terms :math:`L^r` of the exact chain of a Gaussian :math:`r` (the *reference*) vary with it, and
their sum has the mean :math:`-\log r(z)`, so that

.. math::
    \log r(z) - \left[ L_T - L_T^r \right](z)
    - \frac{T}{n} \sum_{j=1}^n \left[ L_{t_j - 1} - L_{t_j - 1}^r \right](z, x_{t_j})

has the same mean and varies little, at the same calls: the reference is a control variate.

An estimate is good for a sum of log densities, an ELBO, and for nothing else: inside a logarithm (of a mean of weights,
of a sum over classes) it is no longer unbiased, and of a guide's site it would bound the ELBO from the wrong side.
There it is refused, by the name of who asks, and the density of the *probability flow* serves.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Eq. 5, https://arxiv.org/abs/2006.11239

    Score-based Generative Modeling in Latent Space (Vahdat et al., 2021), section 3: a diffusion as the prior of a
    latent, https://arxiv.org/abs/2106.05931

    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3,
    https://arxiv.org/abs/2011.13456
"""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import FrameType
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from pyro.infer import WeighedPredictive
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from .base import arguments, checks
from .base.arguments import ArgumentError
from .base.precision import coefficients, home, precisely
from .model.decoders import GaussianDecoder
from .pair.diffusion import Diffusion, evenly_spaced
from .pair.entropy import relative_entropy
from .pair.flow import Flow, check_flow
from .pair.terms import Recorder, prior_cost, runs, step_costs
from .pair.times import LowDiscrepancyDrawing
from .process.forward import GaussianForward, event_dim
from .process.quantization import Levels
from .running.evaluation import evaluation_mode
from .sampling.ancestral import AncestralSampler
from .sampling.flow import FlowSampler
from .sampling.sampler import Sampler

__all__ = ["DiffusionDistribution", "FlowEstimate", "OneStepEstimate"]


class _Estimate(ABC):
    """What stands for log p.

    Attributes:
        is_bound: Whether it has the mean of a bound, so that it is good for a sum only.
    """

    is_bound: bool

    @abstractmethod
    def check(self, diffusion: Diffusion) -> None:
        """Refuse a diffusion that has no such estimate."""

    @abstractmethod
    def sampler(self, diffusion: Diffusion) -> Sampler:
        """A sampler of the law whose density it is."""

    @abstractmethod
    def log_prob(self, diffusion: Diffusion, x: Tensor, shape: torch.Size, context: list[Tensor]) -> Tensor:
        """The estimate, with this shape, of data whose batch_shape has as many dimensions and broadcasts to it."""


class OneStepEstimate(_Estimate):
    """The bound at a few draws of t, without bias, with gradients to the data, their context and all parameters.

    Times are spread evenly over the draws for each datum and over the data. The noise is shared where the data are:
    where a class that they do not depend on is enumerated, all classes see the same draws.

    Arguments:
        num_draws: The draws of t for each datum, n; a network call has so many rows for each.
        reference: Mean and variance of a Gaussian, tensors that broadcast to a datum, the nearer to the moments of the
            data the better; or None, for mean 0 and variance 1 where data of a :class:`GaussianForward` have a density,
            and else for no reference; or False, for none.

    Raises:
        ValueError: If ``num_draws`` is no positive int, or ``reference`` something else.

    Example:
        >>> pyrodiff.OneStepEstimate(num_draws=4, reference=(torch.tensor([1.0, -2.0]), torch.tensor(0.5))).num_draws
        4
    """

    is_bound = True

    def __init__(self, num_draws: int = 1, reference: tuple[Tensor, Tensor] | bool | None = None) -> None:
        self.num_draws = arguments.positive_int("num_draws", num_draws)
        if reference is not None and reference is not False:
            if not isinstance(reference, tuple | list) or len(reference) != 2:
                raise ArgumentError(
                    "reference",
                    f"must be a pair (mean, variance), None or False, but it is {arguments.described(reference)}",
                )
            reference = tuple(map(checks.numbers, ("mean of reference", "variance of reference"), reference))
            if not checks.holds((reference[1] > 0) & reference[1].isfinite()):
                raise ValueError(f"variance of reference must be positive, but it is {reference[1].tolist()}")
        self.reference = reference

    def check(self, diffusion: Diffusion) -> None:
        if not isinstance(self.reference, tuple):
            return
        if not _is_gaussian(diffusion):
            raise ArgumentError(
                "reference",
                f"must be None or False where the forward process is no GaussianForward, whose exact chain "
                f"it would be, but the process is {diffusion.forward_process!r}",
            )
        for name, value in zip(("mean", "variance"), self.reference, strict=True):
            if not _fits(value.shape, diffusion.event_shape):
                raise ValueError(
                    f"{name} of reference must broadcast to the event_shape {tuple(diffusion.event_shape)}, but its "
                    f"shape is {tuple(value.shape)}"
                )

    def sampler(self, diffusion: Diffusion) -> Sampler:
        return AncestralSampler(diffusion)

    def log_prob(self, diffusion: Diffusion, x: Tensor, shape: torch.Size, context: list[Tensor]) -> Tensor:
        model, n, event = diffusion.model, self.num_draws, diffusion.event_shape
        lead, x = x.shape[: x.dim() - len(event)], x.reshape(-1, *event)

        def wide(values: Tensor) -> Tensor:  # rows of all draws of all data, where these broadcast to more
            rest = values.shape[1:]
            return values.reshape(n, *lead, *rest).expand(n, *shape, *rest).flatten(0, len(shape))

        with precisely():
            repeated = x.expand(n, *x.shape).flatten(0, 1)
            t = self._times(n * len(x), diffusion)
            x_t = diffusion.forward_process.marginal(repeated, t)()
            once, at_t = -prior_cost(model, x), torch.zeros((), dtype=x_t.dtype, device=x.device)
            if (moments := self._moments(diffusion, x)) is not None:
                once = once + _of_data(diffusion.forward_process, *moments, x)
                at_t = wide(_of_steps(diffusion.forward_process, *moments, repeated, t, x_t))
        context = [values.expand(n, *values.shape).flatten(0, len(shape)) for values in context]
        costs = step_costs(model, wide(repeated), wide(t), wide(x_t), context, later=diffusion.num_steps > 1)
        with precisely():
            return once.reshape(lead) - diffusion.num_steps * (costs - at_t).reshape(n, *shape).mean(0)

    def _times(self, size: int, diffusion: Diffusion) -> Tensor:
        """So many times, spread: of u_k = (u + k / size) mod 1 the draws of one datum are 1 / n apart."""
        device, drawing = diffusion.model.device, LowDiscrepancyDrawing()
        u = drawing.uniforms(torch.empty(size, dtype=torch.float64, device=home(device)))()
        return drawing(u, diffusion.num_steps)[0].to(device)

    def _moments(self, diffusion: Diffusion, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the reference, in the dtype of the data; None where there is none."""
        if isinstance(self.reference, tuple):
            return tuple(value.to(x.dtype).to(x.device) for value in self.reference)
        if self.reference is False or diffusion.levels is not None or not _is_gaussian(diffusion):
            return None
        return x.new_zeros(()), x.new_ones(())


class FlowEstimate(_Estimate):
    """The log density of the probability flow, a number and no bound: good also inside a logarithm and for NUTS.

    It is another model than the chain, near it where the denoiser is exact and the steps are small. It can be
    differentiated as :func:`ode_log_prob`, with an exact divergence: one gradient per dimension and evaluation. Modules
    are in evaluation mode meanwhile. Draws of the site are by default those of the flow too (:class:`FlowSampler`), so
    that it may be the law of a guide's site.

    Arguments:
        num_steps: The number of steps of the chain whose flow it is, evenly spaced; all T if not given.
        tolerance, max_steps: As of :func:`ode_log_prob`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> law = pyrodiff.DiffusionDistribution(diffusion, estimate=pyrodiff.FlowEstimate())
        >>> z = torch.randn(5, 2)
        >>> torch.allclose(law.log_prob(z), pyrodiff.ode_log_prob(diffusion, z).log_prob.float(), atol=1e-3)
        True
    """

    is_bound = False

    def __init__(self, num_steps: int | None = None, tolerance: float = 1e-5, max_steps: int = 1000) -> None:
        self.num_steps = None if num_steps is None else arguments.positive_int("num_steps", num_steps)
        self.tolerance = arguments.number("tolerance", tolerance, 0, 1)
        self.max_steps = arguments.positive_int("max_steps", max_steps)

    def check(self, diffusion: Diffusion) -> None:
        check_flow(diffusion, self.tolerance, self.max_steps)
        if not runs(diffusion.model.decoder, GaussianDecoder):
            raise ArgumentError(
                "diffusion",
                f"must end without a decoder to have the density of a flow, but it has a "
                f"{type(diffusion.model.decoder).__name__}: give estimate=OneStepEstimate()",
            )
        self._chain(diffusion)

    def sampler(self, diffusion: Diffusion) -> Sampler:
        return FlowSampler(diffusion, self.tolerance, self.max_steps, num_steps=self.num_steps)

    def log_prob(self, diffusion: Diffusion, x: Tensor, shape: torch.Size, context: list[Tensor]) -> Tensor:
        rows = x.expand(shape + diffusion.event_shape).reshape(-1, *diffusion.event_shape)
        context = tuple(values.reshape(len(rows), *values.shape[len(shape) :]) for values in context)
        chain = self._chain(diffusion)
        flow = Flow(chain, self.tolerance, self.max_steps, num_probes=0, differentiable=torch.is_grad_enabled())
        with evaluation_mode(diffusion):
            x_T, change, _ = flow.carry(rows, 0, chain.num_steps, context)
            return (flow.log_prob_of_prior(x_T) + change[0]).reshape(shape).to(x.device, x.dtype)

    def _chain(self, diffusion: Diffusion) -> Diffusion:
        if self.num_steps is None:
            return diffusion
        return diffusion.subchain(evenly_spaced(self.num_steps, diffusion.num_steps))


class DiffusionDistribution(TorchDistribution):
    r"""A diffusion as a Pyro distribution: ``pyro.sample("z", DiffusionDistribution(prior))`` in a model.

    Its event is a datum. Its batch_shape is (), or that of the context; plates and particles expand it. Draws are a
    sampler's, outside of Pyro's handlers: no site of the chain is seen, and no gradient passes through. ``log_prob`` is
    an estimate, another number each time (:class:`OneStepEstimate`): its mean is the bound. Training finds the
    parameters of the diffusion, by :class:`SVI` and by Pyro's.

    Where a mean is not what is taken, the one-step estimate is refused, and :class:`FlowEstimate` serves: inside a
    logarithm (``RenyiELBO``, ``Importance``, ``SMCFilter``, :func:`pair_importance_bound`, a class in its context that
    ``TraceEnum_ELBO`` enumerates in the model), in HMC and NUTS, which want a fixed density, and as the law of a
    guide's site, where a bound on log q bounds nothing. A class that is enumerated in the guide is right.

    Arguments:
        diffusion: The diffusion, without random weights.
        *context: What is known of each datum, for the network: tensors of B rows.
        estimate: What stands for log p, a :class:`OneStepEstimate` (if not given) or a :class:`FlowEstimate`.
        sampler: A sampler of this diffusion; if not given, :class:`AncestralSampler`, or, for a flow,
            :class:`FlowSampler`.
        batch_dim: How many dimensions of a context are its batch's, the first ones; 1 if not given. Where a class is
            enumerated in parallel within a plate it has two, and ``batch_dim=y.dim()`` of a class y is always right.

    Raises:
        ValueError: If an argument is of another kind, or the diffusion has random weights; on ``log_prob``, if the
            value is no datum while Pyro validates, a part of the diffusion has Pyro sites of its own, or the estimate
            is not right for who asks.

    References:
        Score-based Generative Modeling in Latent Space (Vahdat et al., 2021), section 3,
        https://arxiv.org/abs/2106.05931

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> denoiser = pyrodiff.VelocityPrediction(pyrodiff.networks.MLP(event_shape=(2,)), forward)
        >>> prior = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", pyrodiff.DiffusionDistribution(prior))
        ...         pyro.sample("x", pyro.distributions.Normal(z.sum(-1), 0.5), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> optimizer = pyro.optim.Adam({"lr": 1e-2})
        >>> svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.ones(5))
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = False

    def __init__(
        self,
        diffusion: Diffusion,
        *context: Tensor,
        estimate: OneStepEstimate | FlowEstimate | None = None,
        sampler: Sampler | None = None,
        batch_dim: int | None = None,
    ) -> None:
        checks.instance("diffusion", diffusion, Diffusion)
        if diffusion.model.is_random():
            raise ArgumentError(
                "diffusion",
                "must have no random weights (PyroSample) to be a distribution, since it could not score "
                "them, but it has some: use its programs, diffusion.model and diffusion.guide",
            )
        estimate = OneStepEstimate() if estimate is None else estimate
        if not isinstance(estimate, _Estimate):
            raise ArgumentError(
                "estimate", f"must be a OneStepEstimate or a FlowEstimate, but it is {arguments.described(estimate)}"
            )
        estimate.check(diffusion)
        if sampler is not None:
            checks.instance("sampler", sampler, Sampler)
            if sampler.diffusion is not diffusion:
                raise ArgumentError("sampler", "must be one of this very diffusion, but it is one of another")
        self.diffusion, self.estimate, self.context, self._sampler = diffusion, estimate, context, sampler
        self._batch_dim = 1 if batch_dim is None else batch_dim
        super().__init__(_batch_shape(context, self._batch_dim), diffusion.event_shape, validate_args=False)
        self._tell()

    @property
    def support(self) -> constraints.Constraint:
        """What a datum may be."""
        process, decoder = self.diffusion.forward_process, self.diffusion.model.decoder
        levels = getattr(decoder, "levels", None)
        one = process.support if levels is None or process.is_integer else Levels(levels)
        return constraints.independent(one, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "DiffusionDistribution":
        """The same law with a larger batch_shape.

        Raises:
            ValueError: If this one's does not broadcast to it.
        """
        new, batch_shape = copy.copy(self), torch.Size(batch_shape)
        if not _fits(self.batch_shape, batch_shape):
            raise ArgumentError(
                "batch_shape",
                f"must be one that {tuple(self.batch_shape)} broadcasts to, but it is {tuple(batch_shape)}",
            )
        new._batch_shape = batch_shape
        self._tell()
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws of the sampler, fixed numbers with shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        context = [values.reshape(-1, *values.shape[len(shape) :]) for values in self._context(shape)]
        with poutine.block():
            sampler = self.estimate.sampler(self.diffusion) if self._sampler is None else self._sampler
            return sampler(shape.numel(), *context).reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The estimate, with gradients to the value, the context and the parameters of the diffusion.

        Arguments:
            value: Data, with a shape ``(*, *event_shape)``, where * broadcasts against the batch_shape.

        Returns:
            A tensor in nats, of that shape.
        """
        event, model = len(self.event_shape), self.diffusion.model
        lead = value.shape[: value.dim() - event]
        if checks.validating():
            model.check(value.reshape(-1, *value.shape[value.dim() - event :]))
        shape = torch.broadcast_shapes(lead, self.batch_shape)
        self._refuse(shape)
        value = value.reshape((1,) * (len(shape) - len(lead)) + value.shape)
        with model.running(), Recorder() as heard:
            log_prob = self.estimate.log_prob(self.diffusion, value, shape, self._context(shape))
        if heard.sites:
            raise ArgumentError(
                "diffusion",
                f"must have no Pyro sites of its own inside its parts to be a distribution, but "
                f"{heard.sites[0]!r} is one: it would not be scored",
            )
        return log_prob

    def refuse_in_guide(self) -> None:
        """Refuse to be the law of a guide's site, where log p is a bound.

        Raises:
            ValueError: If so.
        """
        if self.estimate.is_bound:
            raise ValueError(
                f"{_ONE_STEP} as the law of a guide's site, where a bound on log q would raise the ELBO above what it "
                f"bounds: {_WAY_OUT}"
            )

    def _context(self, shape: torch.Size) -> list[Tensor]:
        """The context, expanded to a batch shape."""
        return [values.expand(shape + values.shape[self._batch_dim :]) for values in self.context]

    def _tell(self) -> None:
        """Tell Pyro's SVI of the parameters: it takes no gradient where no trace of the programs holds one."""
        if _is_pyros_step():
            with self.diffusion.model.running():
                for module in self.diffusion.model.of_pyro():  # these tell of each parameter as it is read
                    for name in (*module._pyro_params, *module._parameters):
                        if not name.endswith("_unconstrained"):
                            getattr(module, name)

    def _refuse(self, shape: torch.Size) -> None:
        """Refuse to be scored, with a result of this shape, where that is not right."""
        in_guide = False
        for frame, homes in _callers():
            module, function = homes[0], frame.f_code.co_name
            if function == "compute_log_prob" and "site" in frame.f_locals:
                shape = _scored_shape(frame.f_locals["site"], shape)
            if (module, function) == ("pyro.infer.enum", "get_importance_trace") and "model_trace" in frame.f_locals:
                traces = [frame.f_locals[name] for name in ("guide_trace", "model_trace")]
                self._refuse_unheard(traces)
                if self.estimate.is_bound and _enumerates(*traces, shape):
                    raise ValueError(f"{_ONE_STEP} of a class that is enumerated in the model{_IN_A_LOGARITHM}")
            for start, at, name in _NOT_SUMS if self.estimate.is_bound else ():
                if at in (None, function, frame.f_code) and any(home.startswith(start) for home in homes):
                    raise ValueError(f"{_ONE_STEP} in {name}")
            in_guide = in_guide or (module, function) == ("pyro.poutine.trace_struct", "compute_score_parts")
        if in_guide:
            self.refuse_in_guide()

    def _refuse_unheard(self, traces: list[poutine.Trace]) -> None:
        """Refuse a step of Pyro's SVI that would learn nothing, in silence."""
        heard = any(site["type"] == "param" for trace in traces for site in trace.nodes.values())
        learns = any(parameter.requires_grad for parameter in self.diffusion.parameters())
        if learns and not heard and _is_pyros_step():
            raise ArgumentError(
                "diffusion",
                "must be seen by the programs where nothing else is learned, or Pyro's SVI takes no gradient:"
                " make the DiffusionDistribution in the model, or in a plate, or train by pyrodiff.SVI",
            )


# Where a bound is not right


_ONE_STEP = "estimate must not be a OneStepEstimate"
_WAY_OUT = "give DiffusionDistribution(..., estimate=FlowEstimate())"
_IN_A_LOGARITHM = f", inside a logarithm, where it would no longer have the right mean: {_WAY_OUT}"
_FIXED = f", which wants a density that is the same number each time: {_WAY_OUT}"
_NOT_SUMS = (  # how the name of a module starts, which function or any, and what is said
    ("pyro.infer.mcmc", None, "HMC or NUTS" + _FIXED),
    ("pyro.infer.autoguide.guides", "laplace_approximation", "AutoLaplaceApproximation" + _FIXED),
    ("pyro.infer.renyi_elbo", None, "RenyiELBO" + _IN_A_LOGARITHM),
    ("pyro.infer.importance", None, "Importance" + _IN_A_LOGARITHM),
    ("pyro.infer.predictive", WeighedPredictive.forward.__code__, "WeighedPredictive" + _IN_A_LOGARITHM),
    ("pyro.infer.smcfilter", None, "SMCFilter" + _IN_A_LOGARITHM),
    ("pyro.infer.resampler", None, "Resampler" + _IN_A_LOGARITHM),
    ("pyro.infer.rws", None, "ReweightedWakeSleep" + _IN_A_LOGARITHM),
    ("pyro.infer.tracetmc_elbo", None, "TraceTMC_ELBO" + _IN_A_LOGARITHM),
    ("pyro.infer.trace_tail_adaptive_elbo", None, "TraceTailAdaptive_ELBO" + _IN_A_LOGARITHM),
    ("pyro.infer.discrete", None, "infer_discrete" + _IN_A_LOGARITHM),
    ("pyrodiff.likelihood.pairs", "log_weights", "pair_importance_bound" + _IN_A_LOGARITHM),
)


def _callers() -> Iterator[tuple[FrameType, list[str]]]:
    """Who asks for the density: the frames out to the inference algorithm, and not what runs that in its turn.

    With each, the module that it is in, and, of a method of Pyro's algorithms, those of the classes of its object.
    """
    frame, entered = sys._getframe(2), False
    while frame is not None:
        homes = [frame.f_globals.get("__name__", "")]
        is_pyros = homes[0].startswith("pyro.infer")
        if entered and not homes[0].startswith(("pyro.", "pyrodiff.", "torch.", "contextlib", "functools")):
            return
        entered = entered or is_pyros or homes[0].startswith("pyrodiff.likelihood")
        if is_pyros and "self" in frame.f_locals:
            homes += [kind.__module__ for kind in type(frame.f_locals["self"]).__mro__]
        yield frame, homes
        frame = frame.f_back


def _scored_shape(site: dict, shape: torch.Size) -> torch.Size:
    """The shape of what a site is scored by, this law in it: a mask or a scale, or laws around, may broadcast more."""
    around = [site[handler].shape for handler in ("mask", "scale") if isinstance(site[handler], Tensor)]
    return torch.broadcast_shapes(shape, site["fn"].batch_shape, *around)


def _enumerates(guide_trace: poutine.Trace, model_trace: poutine.Trace, shape: torch.Size) -> bool:
    """Whether a result of this shape has a dimension of a site that is enumerated in the model, not in the guide."""
    sites = [site for name, site in model_trace.nodes.items() if name not in guide_trace.nodes]
    dims = [site["infer"].get("_enumerate_dim") for site in sites if site["type"] == "sample"]
    return any(dim is not None and -dim <= len(shape) and shape[dim] > 1 for dim in dims)


def _is_pyros_step() -> bool:
    """Whether Pyro's SVI listens for what it is to learn."""
    return any(isinstance(frame, TraceMessenger) and frame.param_only for frame in _PYRO_STACK)


def _fits(shape: torch.Size, larger: torch.Size) -> bool:
    """Whether a shape broadcasts to a larger one."""
    try:
        return torch.broadcast_shapes(shape, larger) == larger
    except RuntimeError:
        return False


def _batch_shape(context: tuple[Tensor, ...], batch_dim: int) -> torch.Size:
    if not (arguments.is_int(batch_dim) and batch_dim >= 0):
        raise ArgumentError("batch_dim", f"must be an int of at least 0, but it is {arguments.described(batch_dim)}")
    for i, values in enumerate(context):
        if not isinstance(values, Tensor) or values.dim() < batch_dim:
            raise ArgumentError(
                "context",
                f"must be tensors with {batch_dim} dimension{'s' * (batch_dim != 1)} of the batch, but "
                f"context[{i}] is {arguments.described(values)}: options are given by keyword, and batch_dim says how "
                "many",
            )
    try:
        return torch.broadcast_shapes(*(values.shape[:batch_dim] for values in context))
    except RuntimeError:
        shapes = ", ".join(str(tuple(values.shape)) for values in context)
        raise ArgumentError(
            "context", f"must be tensors of one number of rows, but their shapes are {shapes}"
        ) from None


# The exact chain of a Gaussian


def _is_gaussian(diffusion: Diffusion) -> bool:
    """Whether the forward process has the kernels that the chain of a reference is made for."""
    process, kernels = diffusion.forward_process, ("transition", "marginal", "posterior")
    return isinstance(process, GaussianForward) and all(
        getattr(type(process), kernel) is getattr(GaussianForward, kernel) for kernel in kernels
    )


def _of_data(process: GaussianForward, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """log r(x) + L_T^r of the reference r = N(mean, variance), with shape (R,)."""
    T, event = process.num_steps, x.dim() - 1
    a, b = process.scales(x, T)
    top = dist.Normal((a * mean).expand_as(x), (a**2 * variance + b**2).sqrt()).to_event(event)
    law = dist.Normal(mean, variance.sqrt()).expand(x.shape).to_event(event)
    return law.log_prob(x) + relative_entropy(process.marginal(x, T), top)


def _of_steps(process: GaussianForward, mean: Tensor, variance: Tensor, x: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
    """L_{t-1}^r, and L_0^r where t = 1, with the shape of t."""
    a, b = process.scales(x_t, t)
    weight_t, weight_0, noise = coefficients(process.schedule.posterior(t), x_t)
    total = a**2 * variance + b**2  # of x_t; given it, x_0 is Gaussian, and so is what the posterior makes of that
    loc = weight_t * x_t + weight_0 * (b**2 * mean + a * variance * x_t) / total
    scale = (noise**2 + weight_0**2 * variance * b**2 / total).sqrt()
    kernel = dist.Normal(loc, scale).to_event(event_dim(x_t, t))
    if process.num_steps == 1:
        return -kernel.log_prob(x)
    later = relative_entropy(process.posterior(x_t, x, t.clamp(min=2)), kernel)
    return torch.where(t == 1, -kernel.log_prob(x), later)
