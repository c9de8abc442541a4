r"""The terms of the bound as plain arithmetic: the one place where programs are evaluated without Pyro's messages.

.. math::
    L_T = KL(q(x_T | x_0) \| p(x_T)), \quad
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t)), \quad
    L_0 = -\log p_\theta(x_0 | x_1), \qquad x_t \sim q(x_t | x_0).

The two pairs of a :class:`Diffusion` are defined by their programs. Their costs are computed here, from the same public
kernels: each term depends on one :math:`x_t`, whose distribution is known, so each can be computed by itself
(:func:`step_costs`), and the networks of all steps can run as one batch. Bounds are sums of these, and so is the loss
of either pair (:func:`pair_costs`); Pyro's handlers would give the same loss and gradient in expectation.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eq. 58, https://arxiv.org/abs/2208.11970
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeGuard, TypeVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..base.precision import precisely
from ..model.decoders import DiscretizedDecoder, GaussianDecoder, SoftmaxDecoder, TransitionDecoder
from ..model.reverse import GaussianReverse
from .entropy import relative_entropy
from .programs import Generative, OneStepGuide, OneStepModel, TrajectoryGuide, TrajectoryModel

__all__ = [
    "Recorder",
    "is_listened_to",
    "pair_costs",
    "prior_cost",
    "runs",
    "step_costs",
]


def prior_cost(model: Generative, x_0: Tensor, x_T: Tensor | None = None) -> Tensor:
    """L_T, with shape (B,).

    Arguments:
        model: The model.
        x_0: The data, with shape (B, *event_shape).
        x_T: Draws of q(x_T | x_0), used only where no KL is registered for the two distributions; fresh ones if not
            given.
    """
    with precisely():
        q = model.forward_process.marginal(x_0, model.num_steps)
        return relative_entropy(q, model.top(x_0.dtype, x_0.device), x_T)


def step_costs(
    model: Generative,
    x_0: Tensor,
    t: Tensor,
    x_t: Tensor,
    context: Sequence[Tensor] = (),
    x_s: Tensor | None = None,
    first: bool = True,
    later: bool = True,
) -> Tensor:
    """L_{t-1} where t > 1 and L_0 where t = 1; it can be differentiated.

    Arguments:
        model: The model; ``model.evaluated()`` holds around the call.
        x_0: The data, with shape (B, *event_shape).
        t: The times, with shape (B,).
        x_t: The states, draws of q(x_t | x_0), with the shape of ``x_0``.
        context: The context of each datum, for the network: tensors of B rows, or of one.
        x_s: Draws of the posterior q(x_{t-1} | x_t, x_0): L_{t-1} is then the log ratio at these. If not given, it is
            the KL, or, where none is registered, the log ratio at fresh draws.
        first, later: Whether t = 1 for some data, and t > 1 for some.

    Returns:
        Costs in nats, with shape (B,).
    """
    return _kernel_costs(model, model.kernel(x_t, t, *context), x_0, t, x_t, x_s, first, later)


def _kernel_costs(
    model: Generative,
    kernel: TorchDistribution,
    x_0: Tensor,
    t: Tensor,
    x_t: Tensor,
    x_s: Tensor | None,
    first: bool,
    later: bool,
) -> Tensor:
    """The costs of steps, given the reverse kernels."""
    with precisely():
        if later:
            posterior = model.forward_process.posterior(x_t, x_0, t.clamp(min=2) if first else t)
            cost = relative_entropy(posterior, kernel, x_s, analytic=x_s is None)
            if not first:
                return cost
        reconstruction = -model.decoded(kernel, x_t).log_prob(x_0)
        return torch.where(t == 1, reconstruction, cost) if later else reconstruction


# The pairs of a Diffusion, evaluated without messages


class Recorder(Messenger):
    """A handler that records parameters and sites, and changes nothing.

    Attributes:
        parameters: The unconstrained parameters that were registered, by name.
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
    return any(not isinstance(frame, Recorder) for frame in _PYRO_STACK)


def pair_costs(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """The cost of each datum under a pair of a diffusion, in nats with shape (B,); None for any other pair.

    None also where Pyro's handlers could make a difference: random weights, sites inside of a part (``pyro.factor``,
    say), programs with hooks or another ``forward``, and batch normalisation in the trajectory pair, whose networks run
    on all steps as one batch.

    Arguments:
        model, guide: The programs.
        args, kwargs: What both are called with: the data, with shape (B, *event_shape), and their context.
    """
    if kwargs or not isinstance(model, Generative) or not (args and all(isinstance(arg, Tensor) for arg in args)):
        return None
    of_pyro = model.of_pyro()
    if any(part._pyro_samples for part in of_pyro):
        return None
    step = getattr(model, "step", None)
    if (
        runs(model, OneStepModel)
        and runs(guide, OneStepGuide)
        and guide.step is step
        and step.forward_process is model.forward_process
        and step.event_shape == model.event_shape
    ):
        costs = partial(_one_step_costs, model)
    elif (
        runs(model, TrajectoryModel)
        and runs(guide, TrajectoryGuide)
        and guide.forward_process is model.forward_process
        and guide.event_shape == model.event_shape
        and not any(part.training and isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    ):
        costs = partial(_trajectory_costs, model)
    else:
        return None
    try:
        with model.running() if of_pyro else nullcontext(), _Listener():
            return costs(args[0], args[1:])
    except _HasSites:
        return None


Kind = TypeVar("Kind", bound=nn.Module)


def runs(program: Callable, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a call of a module runs exactly the ``forward`` of this class: not overridden, and without hooks.

    Arguments:
        program: The module.
        kind: The class: a program's, :class:`GaussianReverse`, or a decoder's of this package.
    """
    return (
        isinstance(program, kind)
        and type(program).forward is _AS_WRITTEN[kind]
        and "forward" not in vars(program)
        and not program._forward_hooks
        and not program._forward_pre_hooks
        and not any(map(_is_foreign, (*_global_forward_hooks.values(), *_global_forward_pre_hooks.values())))
    )


def _is_foreign(hook: Callable) -> bool:
    """Whether a global hook is from outside of this package, whose own only record what is called."""
    return not getattr(hook, "__module__", "").startswith("pyrodiff.")


_DECODERS = (GaussianDecoder, DiscretizedDecoder, SoftmaxDecoder, TransitionDecoder)
_PROGRAMS = (TrajectoryModel, TrajectoryGuide, OneStepModel, OneStepGuide)
_AS_WRITTEN: dict[type[nn.Module], Callable] = {
    kind: kind.forward for kind in (*_PROGRAMS, *_DECODERS, GaussianReverse)
}


class _HasSites(Exception):
    """A part of a diffusion has a site of its own."""


class _Listener(Messenger):
    """Stops the evaluation at the first site."""

    def _pyro_sample(self, msg: dict) -> None:
        raise _HasSites


def _one_step_costs(model: OneStepModel, x_0: Tensor, context: tuple[Tensor, ...]) -> Tensor:
    """L_T + w(t) / p(t) L_{t-1} at one t per datum."""
    step = model.step
    with precisely():
        prior = prior_cost(model, x_0)
        t, x_t, scale, noise_scale = step.draw(x_0, lambda name, law: law())
    # the decoder is skipped if no t is 1, where that is cheap to know (not on an accelerator, nor in a graph being
    # traced) and has no side effects: a decoder of your own may have sites, or parameters, whose gradient must be 0,
    # not None
    known = t.device.type == "cpu" and get_proxy_mode() is None and any(runs(model.decoder, k) for k in _DECODERS)
    first = not known or bool((t == 1).any())
    kernel = model.kernel(x_t, t, *context)
    if noise_scale is not None:
        with precisely():
            # -log N(ε; ε̂, 1 / 2π) is π ||ε - ε̂||², so divided by π it is the squared error itself
            kernel, of_noise, epsilon = step.apart(kernel, x_0, x_t, t)
            prior = prior - noise_scale / math.pi * of_noise.log_prob(epsilon)
    costs = _kernel_costs(model, kernel, x_0, t, x_t, None, first, model.num_steps > 1)
    if torch.is_grad_enabled():
        step.drawing.tell(t, costs.detach(), torch.ones_like(t, dtype=torch.bool))
    return torch.addcmul(prior, scale, costs)


def _trajectory_costs(model: TrajectoryModel, x_0: Tensor, context: tuple[Tensor, ...]) -> Tensor:
    """L_T + the sum of all L_{t-1}, each x_t drawn independently: in expectation the same as along a trajectory."""
    B, T = len(x_0), model.num_steps
    t = torch.arange(1, T + 1, device=x_0.device).repeat_interleave(B)
    repeated, *given = (_repeated(values.expand(B, *values.shape[1:]), T) for values in (x_0, *context))
    with precisely():
        x_t = model.forward_process.marginal(repeated, t)()
        prior = prior_cost(model, x_0)
    costs = prior + step_costs(model, x_0, t[:B], x_t[:B], [c[:B] for c in given], later=False)
    if T == 1:
        return costs
    later = step_costs(model, repeated[B:], t[B:], x_t[B:], [c[B:] for c in given], first=False)
    return costs + later.reshape(T - 1, B).sum(0)


def _repeated(values: Tensor, T: int) -> Tensor:
    """The rows of all data, repeated T times."""
    return values.expand((T, *values.shape)).flatten(0, 1)
