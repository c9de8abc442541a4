r"""The terms of the bound by arithmetic alone: what the programs of a diffusion score, without a message of Pyro's.

.. math::
    L_T = KL(q(x_T | x_0) \| p(x_T)), \quad
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t)), \quad
    L_0 = -\log p_\theta(x_0 | x_1), \qquad x_t \sim q(x_t | x_0).

The forward process is fixed, so its states can be drawn before any network is called, and the networks of all steps
run as one batch. :func:`pair_costs` does so for the pairs of a :class:`Diffusion`, whose terms Pyro's handlers would
give site by site, in the same law and with the same gradient in the mean.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 58, https://arxiv.org/abs/2208.11970
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pyro.distributions as dist
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, kl_divergence

from . import checks
from .diffusion import Generative, OneStepGuide, OneStepModel, TrajectoryGuide, TrajectoryModel
from .forward import BinomialForward, GaussianForward, Isotropic
from .reverse import GaussianReverse
from .steps import Drawing

__all__ = [
    "Recorder",
    "innermost",
    "is_listened_to",
    "pair_costs",
    "precisely",
    "prior_cost",
    "relative_entropy",
    "step_costs",
]


class Recorder(Messenger):
    """Hears of parameters and sites, and changes nothing.

    Attributes:
        parameters: The unconstrained parameters that a message came of, by name.
        sites: The names of the sites, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Tensor] = {}
        self.sites: list[str] = []

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        self.parameters[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value

    def _pyro_post_sample(self, msg: dict) -> None:
        self.sites.append(msg["name"])


def is_listened_to() -> bool:
    """Whether Pyro's handlers would hear the messages of a program, other than a recorder."""
    return any(type(frame) is not Recorder for frame in _PYRO_STACK)


def relative_entropy(q: Distribution, p: Distribution, x: Tensor | None = None) -> Tensor:
    """KL(q || p) where it is registered; else its estimate log q(x) - log p(x) at the draw ``x`` of q.

    Arguments:
        q, p: Distributions with the same batch_shape (B,) and event_shape.
        x: A draw of q, with shape (B, *event_shape); a fresh one if it is needed and not given.

    Returns:
        A tensor with shape (B,), in nats.
    """
    if isinstance(q, Isotropic) or not isinstance(innermost(q), Delta):  # whose log density Pyro's KL leaves out
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            pass
    x = q() if x is None else x
    return q.log_prob(x) - p.log_prob(x)


def innermost(law: Distribution) -> Distribution:
    """The law without what makes dimensions its event's, and without masks.

    Arguments:
        law: The law.
    """
    while isinstance(law, Independent | MaskedDistribution):
        law = law.base_dist
    return law


def prior_cost(model: Generative, x_0: Tensor) -> Tensor:
    """L_T, with shape (B,).

    Arguments:
        model: The model.
        x_0: The data, with shape (B, *event_shape).
    """
    forward = model.forward_process
    plain = type(forward) is GaussianForward and forward.__dict__.keys().isdisjoint(("marginal", "transition", "prior"))
    if model.prior is None and plain and checks.trusted() and x_0.dim() > 1:
        return forward.prior_divergence(x_0)
    q = forward.marginal(x_0, model.num_steps)
    return relative_entropy(q, model.top(x_0.dtype).expand(q.batch_shape))


def step_costs(
    model: Generative, x_0: Tensor, t: Tensor, x_t: Tensor | None = None, first: bool = True, later: bool = True
) -> Tensor:
    """L_{t-1} where t > 1 and L_0 where t = 1; it can be differentiated.

    Arguments:
        model: The model; ``model.running()`` holds around the call if it has random weights.
        x_0: The data, with shape (B, *event_shape).
        t: The times, with shape (B,).
        x_t: The states, with the shape of ``x_0``: fresh draws if not given.
        first, later: Whether t is 1 for some data, and whether it is above for some.

    Returns:
        Costs in nats, with shape (B,).
    """
    q = model.forward_process
    x_t = q.marginal(x_0, t).sample() if x_t is None else x_t
    reverse, gaussian = model.reverse, checks.trusted() and x_0.dim() > 1 and _is_plain(model)
    if gaussian:  # whose KL is known without the two laws
        found = reverse.denoiser(x_t, t)
    else:
        found = model.kernel(x_t, t)
    with precisely():
        if later:
            above = t.clamp(min=2) if first else t
            cost = (
                reverse.divergence(x_0, found, above)
                if gaussian
                else relative_entropy(q.posterior(x_t, x_0, above), found)
            )
            if not first:
                return cost
        kernel = reverse.at(x_t, found, t) if gaussian else found
        first_cost = -model.decoded(kernel, x_t).log_prob(x_0)
        return torch.where(t == 1, first_cost, cost) if later else first_cost


def _is_plain(model: Generative) -> bool:
    """Whether the kernels are those of the package, with nothing put around or in the place of a method."""
    reverse, forward = model.reverse, model.forward_process
    return (
        type(reverse) is GaussianReverse
        and type(forward) is GaussianForward
        and not _hooked(reverse)
        and reverse.__dict__.keys().isdisjoint(("forward", "at", "divergence"))
        and forward.__dict__.keys().isdisjoint(("marginal", "posterior", "transition", "prior"))
    )


def precisely() -> AbstractContextManager:
    """Within, nothing is cast to a lower precision: networks may run so, but what is summed to a bound may not."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return torch.autocast(kinds[0], enabled=False) if kinds else nullcontext()


def pair_costs(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """What each datum costs a pair of a diffusion, in nats with shape (B,); None of any other pair.

    None also where Pyro's handlers would make a difference: random weights, hooks on the programs, and, where the
    networks of all steps would run as one batch, statistics of the batch.

    Arguments:
        model, guide: The programs.
        args, kwargs: What both are called with: the data, with shape (B, *event_shape).
    """
    if kwargs or len(args) != 1:
        return None
    kinds = {TrajectoryModel: (TrajectoryGuide, _trajectory_costs), OneStepModel: (OneStepGuide, _one_step_costs)}
    kind, costs = kinds.get(type(model), (None, None))
    if type(guide) is not kind or not model.matches(guide) or _hooked(model) or _hooked(guide):
        return None
    if model.is_random():
        return None
    if kind is TrajectoryGuide and (
        type(model.forward_process) not in (GaussianForward, BinomialForward)  # one's own may draw its states otherwise
        or any(part.training for part in model.parts().of_batch)
    ):
        return None
    with model.quiet():
        return costs(model, *args)


def _hooked(program: nn.Module) -> bool:
    return bool(program._forward_hooks or program._forward_pre_hooks)


def _drawn(name: str, law: dist.Distribution) -> Tensor:
    return law()


def _one_step_costs(model: OneStepModel, x_0: Tensor) -> Tensor:
    step = model.step
    with precisely():
        prior = prior_cost(model, x_0)
        t, x_t, scale = step.draw(x_0, _drawn)
    first = model.parts().decoder_learns or not checks.legible(t) or bool((t == 1).any())
    costs = step_costs(model, x_0, t, x_t, first, model.num_steps > 1)
    if torch.is_grad_enabled() and type(step.drawing).tell is not Drawing.tell:
        step.drawing.tell(t, costs.detach(), torch.ones_like(t, dtype=torch.bool))
    return torch.addcmul(prior, costs, scale)


def _trajectory_costs(model: TrajectoryModel, x_0: Tensor) -> Tensor:
    B, T = len(x_0), model.num_steps
    with precisely():
        x_t = model.forward_process.trajectory(x_0)
        prior = prior_cost(model, x_0)
    t = torch.arange(1, T + 1, device=x_0.device).repeat_interleave(B)
    costs = prior + step_costs(model, x_0, t[:B], x_t[0], later=False)
    if T == 1:
        return costs
    repeated = x_0.expand((T - 1, *x_0.shape)).flatten(0, 1)
    later = step_costs(model, repeated, t[B:], x_t[1:].flatten(0, 1), first=False)
    return costs + later.reshape(T - 1, B).sum(0)
