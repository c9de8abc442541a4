r"""The programs of the two pairs, and what the two models share: the parts of p_θ and how they are checked.

What they mean is said in :mod:`pyrodiff.pair.diffusion`, which puts them together.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from ..base import checks
from ..base.precision import home
from ..model.decoders import Decoder
from ..process.forward import Forward
from .times import Drawing

__all__ = ["Generative", "OneStepGuide", "OneStepModel", "Step", "TrajectoryGuide", "TrajectoryModel"]


def check_law(law: dist.Distribution, name: str, event_shape: torch.Size) -> dist.Distribution:
    if not isinstance(law, torch.distributions.Distribution):
        raise ValueError(f"{name} must be a distribution or return one, but it is {law!r}")
    if law.event_shape != event_shape:
        raise ValueError(
            f"{name} must have the event_shape {tuple(event_shape)}, but its event_shape is {tuple(law.event_shape)} "
            f"(and its batch_shape {tuple(law.batch_shape)})"
        )
    return law


def _time(x: Tensor, t: int, event_shape: torch.Size) -> int | Tensor:
    """The time t of all data, as a tensor where the batch has more dimensions than one (vectorised particles)."""
    batch_shape = x.shape[: x.dim() - len(event_shape)]
    return t if len(batch_shape) == 1 else torch.full(batch_shape, t, device=x.device)


class TrajectoryGuide(nn.Module):
    """The guide q(x_1:T | x_0): sites ``x_T .. x_1`` in the model's order, in the plate "data".

    Called as ``guide(x_0)``, with data of shape (B, *event_shape).
    """

    def __init__(self, forward: Forward, event_shape: torch.Size) -> None:
        super().__init__()
        self.forward_process, self.event_shape = forward, event_shape

    def forward(self, x_0: Tensor) -> None:
        q, T = self.forward_process, self.forward_process.num_steps
        if checks.validating():
            q.check(x_0, self.event_shape)
        with pyro.plate("data", len(x_0), dim=-1):
            x = pyro.sample(f"x_{T}", q.marginal(x_0, T))
            for t in range(T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", q.posterior(x, x_0, _time(x, t, self.event_shape)))


class Generative(nn.Module):
    """The parts of p_θ(x_0:T), whose laws are checked while Pyro validates."""

    def __init__(
        self,
        forward: Forward,
        reverse: nn.Module,
        event_shape: torch.Size,
        decoder: nn.Module,
        prior: dist.Distribution | nn.Module | None,
    ) -> None:
        super().__init__()
        self.forward_process, self.reverse, self.event_shape = forward, reverse, event_shape
        self.decoder, self.prior = decoder, prior

    @property
    def num_steps(self) -> int:
        return self.forward_process.num_steps

    @property
    def device(self) -> torch.device:
        """Where states are: the device of the reverse process's parameters, or the schedule's where it has none."""
        parameter = next(self.reverse.parameters(), None)
        return self.forward_process.schedule.device if parameter is None else parameter.device

    def top(self, dtype: torch.dtype, device: torch.device | None = None) -> dist.Distribution:
        """p(x_T), with batch_shape (), for states of a dtype and on a device, the model's if not given."""
        if self.prior is None:
            device = self.device if device is None else device
            elsewhere = {} if home(device) == device else {"device": device}
            return self.forward_process.prior(self.event_shape, dtype, **elsewhere)
        return check_law(self.prior() if isinstance(self.prior, nn.Module) else self.prior, "prior", self.event_shape)

    def kernel(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        """p_θ(x_{t-1} | x_t)."""
        t = t if isinstance(t, Tensor) else _time(x_t, t, self.event_shape)
        return self._checked(self.reverse(x_t, t), "reverse", x_t)

    def decoded(self, kernel: dist.Distribution, x_1: Tensor) -> dist.Distribution:
        """p_θ(x_0 | x_1), from the kernel at t = 1."""
        return self._checked(self.decoder(kernel, x_1), "decoder", x_1)

    def _checked(self, law: dist.Distribution, name: str, x: Tensor) -> dist.Distribution:
        if not checks.validating():
            return law
        batch_shape, found = x.shape[: x.dim() - len(self.event_shape)], check_law(law, name, self.event_shape)
        try:  # a state may broadcast, as under enumeration
            fits = not found.batch_shape or torch.broadcast_shapes(found.batch_shape, batch_shape)
        except RuntimeError:
            fits = False
        enumerating = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
        if not fits or (len(found.batch_shape) > len(batch_shape) and not enumerating):
            raise ValueError(
                f"{name} must return a distribution with the batch_shape {tuple(batch_shape)} of its state, but its "
                f"batch_shape is {tuple(law.batch_shape)}"
            )
        return law

    def dtype(self) -> torch.dtype:
        """The dtype of the states: that of the parameters, if there are any.

        Raises:
            ValueError: If all parameters are of half precision.
        """
        dtypes = self._dtypes()
        return dtypes[0] if dtypes else torch.get_default_dtype()

    def check(self, x_0: Tensor) -> None:
        """Refuse what cannot be data of this model.

        Raises:
            ValueError: If ``x_0`` has another shape than (B, *event_shape), another dtype or device than the model, or
                a value that no datum has; or if all parameters are of half precision.
        """
        dtypes = self._dtypes()
        if isinstance(self.decoder, Decoder):
            self.decoder.check_kind(x_0)
        self.forward_process.check(x_0, self.event_shape)
        if isinstance(self.decoder, Decoder):
            self.decoder.check(x_0)
        if dtypes and x_0.dtype not in dtypes:
            raise ValueError(f"x_0 must have the dtype of the model's parameters, {dtypes[0]}, but it is {x_0.dtype}")

    def _dtypes(self) -> list[torch.dtype]:
        """The dtypes of the parameters that states may have."""
        learned = {id(parameter) for parameter in self.forward_process.parameters()}  # of a schedule, which is float64
        parameters = [parameter for parameter in self.reverse.parameters() if id(parameter) not in learned]
        dtypes = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
        full = [dtype for dtype in dtypes if torch.finfo(dtype).bits >= 32]
        if dtypes and not full:
            checks.full_precision("weights", dtypes[0])
        return full

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the program runs: its parameters are known to Pyro, and each random weight keeps one value.

        Random weights (each ``PyroSample``) are drawn now, before the chain and outside its plate. A ``PyroModule``
        forgets them when its outermost call returns, so the modules' contexts are kept open for all of the chain.
        """
        for name, part in self.named_children():
            _claim_names(name, part)
            if not isinstance(part, PyroModule):  # which tells Pyro of its parameters by itself
                pyro.module(name, part)
        modules = self.of_pyro()
        with ExitStack() as stack:
            for context in {id(module._pyro_context): module._pyro_context for module in modules}.values():
                stack.enter_context(context)
            for module in modules:
                for name in module._pyro_samples:
                    getattr(module, name)
            yield

    def of_pyro(self) -> list[PyroModule]:
        """The modules below that speak to Pyro by themselves, when they are called."""
        return [module for module in self.modules() if isinstance(module, PyroModule)]

    def is_random(self) -> bool:
        """Whether there are random weights, each a ``PyroSample``."""
        return any(module._pyro_samples for module in self.of_pyro())

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within, the parts are called outside of the programs, and Pyro's param store is afterwards as it was.

        Random weights are drawn once, now.
        """
        if not self.of_pyro():  # nothing below sends a message
            yield
            return
        store = pyro.get_param_store()
        with store.scope(store.get_state()), self.running():
            yield


def _claim_names(name: str, part: nn.Module) -> None:
    """Name a part's sites and parameters after it, and let the param store hold this part's tensors under those names.

    The store is global, and Pyro would put what it holds under a name, another diffusion's tensor say, in place of a
    part's own, or train it in its stead.
    """
    for path, module in part.named_modules():
        if isinstance(module, PyroModule):
            module._pyro_name = f"{name}.{path}".rstrip(".")
    own = {f"{name}.{path}".removesuffix("_unconstrained"): parameter for path, parameter in part.named_parameters()}
    store = pyro.get_param_store()
    for key, held in list(store._params.items()):
        if own.get(key.replace("$$$", "."), held) is not held:
            store._param_to_name.setdefault(held, key)  # one tensor may stand under two names, which the store forgets
            del store[key]


class TrajectoryModel(Generative):
    """The model p_θ(x_0:T): sites ``x_T .. x_1`` and ``x_0``, in the plate "data".

    Called as ``model(x_0)``, with data of shape (B, *event_shape), it observes them; called as
    ``model(num_samples=n)`` it draws n of them. It returns ``x_0`` either way.
    """

    def forward(self, x_0: Tensor | None = None, num_samples: int | None = None) -> Tensor:
        if (x_0 is None) == (num_samples is None):
            raise ValueError(f"either x_0 or num_samples must be given, but num_samples is {num_samples!r}")
        size = checks.positive_int("num_samples", num_samples) if x_0 is None else None
        if x_0 is not None and checks.validating():
            self.check(x_0)
        with self.running():
            states = (self.dtype(), self.device) if x_0 is None else (x_0.dtype, x_0.device)
            return self._chain(x_0, len(x_0) if size is None else size, self.top(*states))

    def matches(self, guide: nn.Module) -> bool:
        """Whether this is the guide of the same diffusion."""
        return isinstance(guide, TrajectoryGuide) and guide.forward_process is self.forward_process

    def _chain(self, x_0: Tensor | None, size: int, top: dist.Distribution) -> Tensor:
        data, T = pyro.plate("data", size, dim=-1), self.num_steps
        with data:
            x = pyro.sample(f"x_{T}", top)
        for t in range(T, 1, -1):
            kernel = self.kernel(x, t)
            with data:
                x = pyro.sample(f"x_{t - 1}", kernel)
        law = self.decoded(self.kernel(x, 1), x)
        with data:
            return pyro.sample("x_0", law, obs=x_0)


class _Unscored(dist.TorchDistribution):
    """A law whose density nothing depends on, since it stands under ``mask(False)``: 0 in the dtype of the states.

    Arguments:
        law: The law, with batch_shape (B,).
        x_0: The data.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, law: dist.Distribution, x_0: Tensor) -> None:
        self.law, self.x_0, self.has_rsample = law, x_0, law.has_rsample
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self.law.support

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "_Unscored":
        return _Unscored(self.law.expand(batch_shape), self.x_0)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return self.law.rsample(sample_shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return self.law.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.x_0.new_zeros(value.shape)


class Step(nn.Module):
    """What the two programs of the one-step pair share: the drawing of t and x_t, and the scale of the step."""

    def __init__(
        self, forward: Forward, event_shape: torch.Size, drawing: Drawing, weighting: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.forward_process, self.event_shape = forward, event_shape
        self.drawing, self.weighting = drawing, weighting

    def draw(self, x_0: Tensor, sample: Callable[[str, dist.Distribution], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The times, with shape (B,), the states x_t and the scale w(t) / p(t); ``sample`` draws from a law by name."""
        like = x_0.new_empty(len(x_0), dtype=torch.float64, device=home(x_0.device))  # exact where a t is rare
        u = sample("u", _Unscored(self.drawing.uniforms(like), x_0))
        t, probability = self.drawing(u, self.forward_process.num_steps)
        weight = self.weighting(t)
        if not isinstance(weight, Tensor) or weight.shape != t.shape:
            raise ValueError(
                f"weighting must return a tensor of the shape {tuple(t.shape)} of t, but it is "
                f"{checks.described(weight)}"
            )
        scale = (weight / probability).to(x_0.dtype).to(x_0.device)
        t = t.to(x_0.device)
        return t, sample("x_t", self.forward_process.marginal(x_0.expand(t.shape + self.event_shape), t)), scale

    @staticmethod
    @contextmanager
    def scored(scale: Tensor, where: Tensor) -> Iterator[None]:
        """Sites within cost ``scale`` times as much, and nothing but ``where``."""
        with poutine.scale(scale=scale), poutine.mask(mask=where):
            yield

    def told(self, t: Tensor, where: Tensor) -> dict[str, Callable[[Tensor], None]]:
        """The ``infer`` of a scored site, the guide's where it is latent: the drawing is told its cost."""
        return {"tell": lambda cost: self.drawing.tell(t, cost, where)}


class OneStepGuide(nn.Module):
    """The guide of the one-step pair, called as ``guide(x_0)``: see :class:`OneStep`."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x_0: Tensor) -> None:
        q = self.step.forward_process
        if checks.validating():
            q.check(x_0, self.step.event_shape)
        with pyro.plate("data", len(x_0), dim=-1):
            pyro.sample("x_T", q.marginal(x_0, q.num_steps))
            with poutine.mask(mask=False):
                t, x_t, scale = self.step.draw(x_0, pyro.sample)
            if q.num_steps > 1:
                with self.step.scored(scale, t > 1):  # at t = 1 the posterior is a point: another stands in, unscored
                    pyro.sample("x_s", q.posterior(x_t, x_0, t.clamp(min=2)), infer=self.step.told(t, t > 1))


class OneStepModel(Generative):
    """The model of the one-step pair, called as ``model(x_0)``: see :class:`OneStep`."""

    def __init__(self, model: TrajectoryModel, step: Step) -> None:
        super().__init__(model.forward_process, model.reverse, model.event_shape, model.decoder, model.prior)
        self.step = step

    def forward(self, x_0: Tensor) -> None:
        if checks.validating():
            self.check(x_0)
        with self.running():
            self._score(x_0)

    def matches(self, guide: nn.Module) -> bool:
        """Whether this is the guide of the same pair."""
        return isinstance(guide, OneStepGuide) and guide.step is self.step

    def _score(self, x_0: Tensor) -> None:
        data, step = pyro.plate("data", len(x_0), dim=-1), self.step
        with data:
            pyro.sample("x_T", self.top(x_0.dtype, x_0.device))
            with poutine.mask(mask=False):
                t, x_t, scale = step.draw(x_0, pyro.sample)
        kernel = self.kernel(x_t, t)
        law = self.decoded(kernel, x_t)
        with data:
            if self.num_steps > 1:
                with step.scored(scale, t > 1):
                    pyro.sample("x_s", kernel)
            with step.scored(scale, t == 1):
                pyro.sample("x_0", law, obs=x_0, infer=step.told(t, t == 1))
