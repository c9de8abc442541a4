r"""A diffusion as the distribution of a site in a larger program: the prior of a latent, or the likelihood of data.

Its density has no closed form: see :mod:`pyrodiff.inference.estimates`.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..pair.diffusion import Diffusion
from ..pair.terms import Recorder
from ..process.quantization import Levels
from ..sampling.sampler import Sampler
from .callers import is_pyros_step, refuse_callers, refuse_in_guide
from .estimates import Estimate, FlowEstimate, OneStepEstimate, broadcasts

__all__ = ["DiffusionDistribution"]


class DiffusionDistribution(TorchDistribution):
    r"""A diffusion as a Pyro distribution: ``pyro.sample("z", DiffusionDistribution(prior))`` in a model.

    Its event is a datum. Its batch_shape is (), or that of the context; plates and particles expand it. Draws are made
    by a sampler outside of Pyro's handlers: the chain has no sites in the program, and no gradient flows through it.
    ``log_prob`` is a random estimate (:class:`OneStepEstimate`), whose mean is the bound. Both :class:`SVI` and Pyro's
    own train the parameters of the diffusion.

    Where log densities are not just summed, the one-step estimate is refused, and :class:`FlowEstimate` is needed:
    inside a logarithm (``RenyiELBO``, ``Importance``, ``SMCFilter``, :func:`pair_importance_bound`, a class in its
    context that ``TraceEnum_ELBO`` enumerates in the model), in HMC and NUTS, which need a deterministic density, and
    as the distribution of a guide's site, where a bound on log q gives no bound. Enumerating a class in the guide is
    allowed.

    Arguments:
        diffusion: The diffusion, without random weights.
        *context: The context of each datum, for the network: tensors of B rows.
        estimate: The estimate of log p, a :class:`OneStepEstimate` (if not given) or a :class:`FlowEstimate`.
        sampler: A sampler of this diffusion; if not given, :class:`AncestralSampler`, or, for a flow,
            :class:`FlowSampler`.
        batch_dim: How many leading dimensions of a context are batch dimensions; 1 if not given. A class y that is
            enumerated in parallel within a plate has two; ``batch_dim=y.dim()`` is always right.

    Raises:
        ValueError: If an argument is of another kind, or the diffusion has random weights; on ``log_prob``, if the
            value is not a datum (while Pyro validates), a part of the diffusion has Pyro sites of its own, or the
            estimate is not valid for the calling inference algorithm.

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
        if not isinstance(estimate, Estimate):
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

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "DiffusionDistribution":
        """The same distribution with a larger batch_shape.

        Raises:
            ValueError: If this one's does not broadcast to it.
        """
        new, batch_shape = copy.copy(self), torch.Size(batch_shape)
        if not broadcasts(self.batch_shape, batch_shape):
            raise ArgumentError(
                "batch_shape",
                f"must be one that {tuple(self.batch_shape)} broadcasts to, but it is {tuple(batch_shape)}",
            )
        new._batch_shape = batch_shape
        self._tell()
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
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
        lead = checks.instance("value", value, Tensor).shape[: value.dim() - event]
        if checks.validating():
            model.check(value.reshape(-1, *value.shape[value.dim() - event :]))
        shape = torch.broadcast_shapes(lead, self.batch_shape)
        refuse_callers(self.diffusion, self.estimate.is_bound, shape)
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
        refuse_in_guide(self.estimate.is_bound)

    def _context(self, shape: torch.Size) -> list[Tensor]:
        """The context, expanded to a batch shape."""
        return [values.expand(shape + values.shape[self._batch_dim :]) for values in self.context]

    def _tell(self) -> None:
        """Register the parameters with Pyro's SVI, which takes no gradient if the traces hold no parameter."""
        if is_pyros_step():
            with self.diffusion.model.running():
                for module in self.diffusion.model.of_pyro():  # these register each parameter when it is read
                    for name in (*module._pyro_params, *module._parameters):
                        if not name.endswith("_unconstrained"):
                            getattr(module, name)


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
