r"""The programs of the two pairs, and what the two models share: the parts of p_θ and how they are checked.

:mod:`pyrodiff.pair.diffusion` explains them and puts them together.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Delta, constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.params import param_with_module_name
from pyro.params.param_store import StateDict
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.primitives import plate as Plate
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import coefficients, costs_dtype, home
from ..model.decoders import Decoder
from ..model.denoisers import Retimed
from ..process.forward import Forward, event_dim
from ..process.quantization import Shape
from .entropy import innermost, relative_entropy
from .times import Drawing, NoiseWeighting

__all__ = [
    "Generative",
    "OneStepGuide",
    "OneStepModel",
    "Step",
    "TrajectoryGuide",
    "TrajectoryModel",
    "check_law",
    "name_in_store",
]


def check_law(law: object, name: str, event_shape: torch.Size) -> dist.TorchDistribution:
    """Check for a distribution with this event_shape.

    Arguments:
        law: The distribution.
        name: Its name in the error.
        event_shape: The shape of one datum.

    Raises:
        ValueError: If it is not a distribution, or has another event_shape.
    """
    if not isinstance(law, torch.distributions.Distribution):
        raise ArgumentError(name, f"must be a distribution or return one, but it is {arguments.described(law)}")
    if law.event_shape != event_shape:
        raise ArgumentError(
            name,
            f"must have the event_shape {tuple(event_shape)}, but its event_shape is {tuple(law.event_shape)} "
            f"(and its batch_shape {tuple(law.batch_shape)})",
        )
    return cast(dist.TorchDistribution, law)  # or the like: Pyro's distributions share a mixin, and no common class


def _in_whole_chain(part: nn.Module, path: str) -> Iterator[str]:
    """The names on a path to a module, without those of :class:`Retimed`, so that a shorter chain has the same ones."""
    for name in path.split(".") if path else ():
        if not (isinstance(part, Retimed) and name == "module"):
            yield name
        part = part.get_submodule(name)


def name_in_store(key: str) -> str:
    """The name of a parameter, from its key in Pyro's param store.

    Arguments:
        key: The key.
    """
    return key.replace("$$$", ".").removesuffix("_unconstrained")


def _time(x: Tensor, t: int, event_shape: torch.Size) -> int | Tensor:
    """The time t of all data; a tensor if the batch has more than one dimension (vectorised particles)."""
    batch_shape = x.shape[: x.dim() - len(event_shape)]
    return t if len(batch_shape) == 1 else torch.full(batch_shape, t, device=x.device)


def _data_plate(name: str, size: int) -> Plate:
    """The plate of the data, with an error in plain words if its name is taken."""
    try:
        return pyro.plate(name, size, dim=-1)
    except RuntimeError as error:  # raised by Pyro at a second site of this name
        raise ValueError(
            f"plate {name!r} must be the diffusion's alone, but this program has another plate or site of that name: "
            f"put pyro.contrib.autoname.scope(prefix=...) around each of two diffusions; beside a plate of your own, "
            f"give one of them another name, Diffusion(..., plate='rows')"
        ) from error


class _Unstored(Messenger):
    """Lets handlers hear of parameters without touching Pyro's param store."""

    def _pyro_param(self, msg: dict) -> None:
        _, parameter = msg["args"][:2]
        msg["fn"] = lambda *args, **kwargs: parameter


@contextmanager
def _store_as_it_is() -> Iterator[None]:
    """A context at whose end whatever was added to Pyro's param store is removed."""
    store = pyro.get_param_store()
    names = set(store.keys())
    try:
        yield
    finally:
        if store.keys() - names:
            state = store.get_state()
            kept: StateDict = {
                "params": {name: value for name, value in state["params"].items() if name in names},
                "constraints": {name: value for name, value in state["constraints"].items() if name in names},
            }
            store.clear()  # deleting one by one fails where a tensor has two names
            store.set_state(kept)


_PARTICLES = ("num_particles_vectorized", "_num_predictive_samples")  # Pyro's own plates, which vectorise a program


def _refuse_plates_around() -> None:
    """Refuse a plate around a pair that is given data: it would repeat them, or count a part of them for all."""
    for frame in _PYRO_STACK:
        if not isinstance(frame, Plate) or frame.name in _PARTICLES:
            continue
        if frame.subsample_size < frame.size:
            raise ValueError(
                f"plate {frame.name!r} must not stand around the pair, which has a plate of its own for the data, but "
                f"it draws {frame.subsample_size} of {frame.size}: leave it out, call both programs with the batch "
                f"x_0[i], and put poutine.scale(scale={frame.size} / {frame.subsample_size}) around both"
            )
        raise ValueError(
            f"plate {frame.name!r} must not stand around the pair, which has a plate of its own for the data: each "
            f"datum would count {frame.size} times; leave it out"
        )


class TrajectoryGuide(nn.Module):
    """The guide q(x_1:T | x_0): sites ``x_T .. x_1`` in the model's order, in the plate of the data.

    Called as ``guide(x_0, *context)``, with data of shape (B, *event_shape); the context is not used.

    Arguments: see :class:`Generative`.
    """

    def __init__(self, forward: Forward, event_shape: torch.Size, plate: str = "data") -> None:
        super().__init__()
        self.forward_process, self.event_shape, self.plate = forward, event_shape, plate

    def forward(self, x_0: Tensor, *context: Tensor) -> None:
        q, T = self.forward_process, self.forward_process.num_steps
        if checks.validating():
            _refuse_plates_around()
            q.check(x_0, self.event_shape)
        with _data_plate(self.plate, len(x_0)):
            x = pyro.sample(f"x_{T}", q.marginal(x_0, T))
            for t in range(T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", q.posterior(x, x_0, _time(x, t, self.event_shape)))


class Generative(nn.Module):
    """The parts of p_θ(x_0:T); the distributions that they return are checked while Pyro validates.

    Arguments:
        forward: The forward process.
        reverse: The reverse process.
        event_shape: The shape of one datum.
        decoder: The last step.
        prior: p(x_T), or None for the forward process's.
        name: The prefix of the names that its parameters and random weights have in Pyro.
        plate: The name of the plate of the data.
    """

    def __init__(
        self,
        forward: Forward,
        reverse: nn.Module,
        event_shape: torch.Size,
        decoder: nn.Module,
        prior: TorchDistributionMixin | nn.Module | None,
        name: str = "",
        plate: str = "data",
    ) -> None:
        super().__init__()
        self.forward_process, self.reverse, self.event_shape = forward, reverse, event_shape
        self.decoder, self.prior = decoder, prior
        self.name, self.plate = name, plate

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return self.forward_process.num_steps

    @property
    def device(self) -> torch.device:
        """The device of states: that of the reverse process's parameters, or the schedule's if it has none.

        A learned schedule's parameters, in float64, are not asked: they may have to stay on the CPU.
        """
        for parameter in self.reverse.parameters():
            if not any(parameter is one for one in self.forward_process.parameters()):
                return parameter.device
        return self.forward_process.schedule.device

    def top(self, dtype: torch.dtype, device: torch.device | None = None) -> dist.TorchDistribution:
        """p(x_T), with batch_shape (), for states of a dtype and on a device, the model's if not given."""
        if self.prior is None:
            device = self.device if device is None else device
            elsewhere = {} if home(device) == device else {"device": device}
            law = self.forward_process.prior(self.event_shape, dtype, **elsewhere)
            return check_law(law, "forward.prior", self.event_shape) if checks.validating() else law
        return check_law(self.prior() if isinstance(self.prior, nn.Module) else self.prior, "prior", self.event_shape)

    def kernel(self, x_t: Tensor, t: int | Tensor, *context: Tensor) -> dist.TorchDistribution:
        """p_θ(x_{t-1} | x_t), given a context of B rows, or of one for all."""
        t = t if isinstance(t, Tensor) else _time(x_t, t, self.event_shape)
        if context:
            x_t, t, context = self._alike(x_t, t, context)
        checks.takes_context("reverse", self.reverse, context)
        return self._checked(self.reverse(x_t, t, *context), "reverse", x_t)

    def _alike(
        self, x_t: Tensor, t: int | Tensor, context: tuple[Tensor, ...]
    ) -> tuple[Tensor, int | Tensor, tuple[Tensor, ...]]:
        """State, time and context, expanded to their common batch_shape: particles and enumeration add dimensions."""
        event = self.event_shape
        batch_shape = torch.broadcast_shapes(x_t.shape[: x_t.dim() - len(event)], *(c.shape[:1] for c in context))
        t = t.expand(batch_shape) if isinstance(t, Tensor) else t
        context = tuple(c.expand(batch_shape + c.shape[1:]) for c in context)
        return x_t.expand(batch_shape + event), t, context

    def decoded(self, kernel: dist.TorchDistribution, x_1: Tensor) -> dist.TorchDistribution:
        """p_θ(x_0 | x_1), from the kernel at t = 1."""
        return self._checked(self.decoder(kernel, x_1), "decoder", x_1)

    def _checked(self, law: dist.TorchDistribution, name: str, x: Tensor) -> dist.TorchDistribution:
        if not checks.validating():
            return law
        batch_shape, found = x.shape[: x.dim() - len(self.event_shape)], check_law(law, name, self.event_shape)
        try:  # a state may broadcast, as under enumeration
            fits = not found.batch_shape or torch.broadcast_shapes(found.batch_shape, batch_shape)
        except RuntimeError:
            fits = False
        enumerating = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
        if not fits or (len(found.batch_shape) > len(batch_shape) and not enumerating):
            raise ArgumentError(
                name,
                f"must return a distribution with the batch_shape {tuple(batch_shape)} of its state, but its "
                f"batch_shape is {tuple(law.batch_shape)}",
            )
        return law

    def dtype(self) -> torch.dtype:
        """The dtype of the states: torch.long for integers, else that of the parameters, if there are any.

        Raises:
            ValueError: If all parameters are of half precision.
        """
        dtypes = self._dtypes()
        if self.forward_process.is_integer:
            return torch.long
        return dtypes[0] if dtypes else torch.get_default_dtype()

    def check(self, x_0: Tensor, *context: Tensor) -> None:
        """Refuse what cannot be data of this model, or the context of such data.

        Raises:
            ValueError: If ``x_0`` has another shape than (B, *event_shape), another dtype or device than the model, or
                a value outside the support; if a context is no tensor of B rows or of one, on that device; or if all
                parameters are of half precision.
        """
        dtypes, q = self._dtypes(), self.forward_process
        decoder = self.decoder if isinstance(self.decoder, Decoder) and not q.is_integer else None
        if decoder is not None:
            decoder.check_kind(x_0)
        q.check(x_0, self.event_shape)
        if decoder is not None:
            decoder.check(x_0)
        if dtypes and x_0.is_floating_point() and x_0.dtype not in dtypes:
            raise ArgumentError(
                "x_0", f"must have the dtype of the model's parameters, {dtypes[0]}, but it is {x_0.dtype}"
            )
        checks.context(context, len(x_0), x_0.device)

    def _dtypes(self) -> list[torch.dtype]:
        """The dtypes of the parameters that states may have."""
        learned = {id(parameter) for parameter in self.forward_process.parameters()}  # a learned schedule is float64
        parameters = [parameter for parameter in self.reverse.parameters() if id(parameter) not in learned]
        dtypes = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
        full = [dtype for dtype in dtypes if torch.finfo(dtype).bits >= 32]
        if dtypes and not full:
            checks.full_precision("weights", dtypes[0])
        return full

    # Names and parameters in Pyro

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context in which the program runs: Pyro knows its parameters, and each random weight keeps one value.

        Parameters are put into Pyro's param store only under Pyro's own SVI, which learns what it finds there. Random
        weights (each ``PyroSample``) are drawn now, before the chain and outside its plate. A ``PyroModule`` forgets
        them when its outermost call returns, so the modules' contexts are kept open for all of the chain.

        Raises:
            ValueError: If Pyro's param store holds another tensor under the name of a parameter.
        """
        modules = self._named_of_pyro()
        is_trained = any(isinstance(frame, TraceMessenger) and frame.param_only for frame in _PYRO_STACK)
        if is_trained or modules:  # both read and write the store
            self.refuse_other_stored()
        with nullcontext() if is_trained or not modules else _store_as_it_is(), ExitStack() as stack:
            if _PYRO_STACK:
                with nullcontext() if is_trained else _Unstored():
                    self._tell_of_parameters()
            if is_trained:
                self.refuse_other_stored()  # the store copies parameters that are not contiguous
            for context in {id(module._pyro_context): module._pyro_context for module in modules}.values():
                stack.enter_context(context)
            for module in modules:
                for name in module._pyro_samples:
                    getattr(module, name)
            yield

    def _tell_of_parameters(self) -> None:
        """As ``pyro.module`` of each part, but without its warning about frozen parameters."""
        for name, part in self.named_children():
            if isinstance(part, PyroModule):  # it registers its parameters by itself
                continue
            for path, parameter in part.named_parameters():
                if parameter.requires_grad:
                    pyro.param(param_with_module_name(self._path(name), path), parameter)

    def of_pyro(self) -> list[PyroModule]:
        """The submodules that are ``PyroModule``, and so send messages when they are called."""
        return [module for module in self.modules() if isinstance(module, PyroModule)]

    def is_random(self) -> bool:
        """Whether there are random weights, each a ``PyroSample``."""
        return any(module._pyro_samples for module in self.of_pyro())

    def named_for_store(self) -> dict[str, Tensor]:
        """The parameters by their names in Pyro's param store, with "." for its divider ``$$$``."""
        return {
            f"{self._path(name)}.{path}".removesuffix("_unconstrained"): parameter
            for name, part in self.named_children()
            for path, parameter in part.named_parameters()
        }

    def other_stored(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Tensors in Pyro's param store under the name of a parameter that they are not, by key, with the parameter."""
        stored = pyro.get_param_store().named_parameters()
        if not stored:
            return {}
        own = self.named_for_store()
        found = ((key, tensor, own.get(name_in_store(key))) for key, tensor in stored)
        return {
            key: (tensor, parameter)
            for key, tensor, parameter in found
            if parameter is not None and tensor is not parameter
        }

    def refuse_other_stored(self, unless_anothers: bool = False) -> None:
        """Refuse a param store that holds another tensor under a parameter's name: either could be meant.

        Arguments:
            unless_anothers: Whether to accept a store that lacks a tensor of the right shape for some parameter: it is
                then another model's.

        Raises:
            ValueError: If so.
        """
        found = self.other_stored()
        alike = {name_in_store(key) for key, (tensor, parameter) in found.items() if tensor.shape == parameter.shape}
        learned = (
            {name for name, parameter in self.named_for_store().items() if parameter.requires_grad} if found else set()
        )
        if unless_anothers and not learned <= alike:
            return
        for key, (_, parameter) in found.items():
            if not parameter.is_contiguous():
                raise ArgumentError(
                    "parameters",
                    f"must be contiguous for Pyro's param store, which keeps a copy of {key!r} that nothing "
                    f"here would see learn: train by pyrodiff.SVI, or give .to(memory_format=torch.contiguous_format)",
                )
            raise ValueError(
                f"Pyro's param store must hold the diffusion's own parameters, but under {key!r} it holds another "
                f"tensor, loaded or another diffusion's: pyrodiff.adopt_stored(diffusion) copies the stored values in, "
                f"Diffusion(..., name='second') gives this one other names, pyro.clear_param_store() forgets the stored"
            )

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _named_of_pyro(self) -> list[PyroModule]:
        """The ``PyroModule`` submodules, after giving each the name of the part that it belongs to."""
        named: set[PyroModule] = set()
        for name, part in self.named_children():
            for path, module in part.named_modules():
                if isinstance(module, PyroModule) and module not in named:  # named after the first part that has it
                    named.add(module)
                    module._pyro_name = ".".join([self._path(name), *_in_whole_chain(part, path)])
        return self.of_pyro()

    @contextmanager
    def evaluated(self, guide: Callable | None = None, given: tuple = ()) -> Iterator[Tensor | None]:
        """The context for calling the parts outside of the programs; Pyro's param store is restored afterwards.

        Random weights are drawn once, now, from their guide.

        Arguments:
            guide: A program that draws every random weight, and may draw more.
            given: The arguments of that program.

        Yields:
            The KL of the random weights, or its estimate at the draw where none is registered, in nats and of shape ();
            None where there are none.

        Raises:
            ValueError: As :meth:`running`; if there are random weights and no guide of them, or a guide and no random
                weights.
        """
        self.refuse_other_stored(unless_anothers=True)
        if self.is_random() != (guide is not None):
            raise ArgumentError(
                "guide",
                "must be given where there are random weights (PyroSample), to draw them from what was learned, "
                "guide=AutoNormal(...) say: else they would be drawn from their prior"
                if guide is None
                else "must be None where there are no random weights (PyroSample), but it is given",
            )
        if not self.of_pyro():  # no part sends messages
            yield None
            return
        store = pyro.get_param_store()
        with store.scope(store.get_state()), ExitStack() as stack:
            if guide is None:
                stack.enter_context(self.running())
                yield None
                return
            learned = poutine.trace(guide).get_trace(*given)
            with poutine.trace() as drawn, poutine.replay(trace=learned):
                stack.enter_context(self.running())
            yield _global_cost(drawn.trace, learned)


def _global_cost(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """The KL of random weights, summed, with shape ().

    Pyro's automatic guides draw an auxiliary site, and a Delta for the weight itself: the entropy is then the auxiliary
    site's.
    """
    drawn, total = _latent(guide_trace), torch.zeros(())
    auxiliary = {name: site for name, site in drawn.items() if site["infer"].get("is_auxiliary")}
    for name, site in _latent(model_trace).items():
        if name not in drawn:
            raise ArgumentError("guide", f"must draw every random weight of the diffusion, but {name!r} is missing")
        q, p = drawn[name]["fn"], site["fn"]
        if (q.batch_shape, q.event_shape) != (p.batch_shape, p.event_shape):
            raise ArgumentError(
                "guide",
                f"must draw {name!r} with the batch_shape {tuple(p.batch_shape)} and the event_shape "
                f"{tuple(p.event_shape)} that it has in the diffusion, but they are {tuple(q.batch_shape)} and "
                f"{tuple(q.event_shape)}",
            )
        stands_for = auxiliary.get(f"{name}_unconstrained")
        if isinstance(innermost(q), Delta) and stands_for and torch.equal(stands_for["value"], site["value"]):
            q = auxiliary.pop(f"{name}_unconstrained")["fn"]
        total = total + relative_entropy(q, p, site["value"]).sum()
    return total + sum(site["fn"].log_prob(site["value"]).sum() for site in auxiliary.values())


def _latent(trace: Trace) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"]}


class TrajectoryModel(Generative):
    """The model p_θ(x_0:T): sites ``x_T .. x_1`` and ``x_0``, in the plate of the data.

    Called as ``model(x_0, *context)``, with data of shape (B, *event_shape), it observes them; called as
    ``model(num_samples=n)``, or ``model(None, *context, num_samples=n)``, it draws n data. It returns ``x_0`` either
    way.

    Arguments: see :class:`Generative`.
    """

    def forward(self, x_0: Tensor | None = None, *context: Tensor, num_samples: int | None = None) -> Tensor:
        if (x_0 is None) == (num_samples is None):
            raise ArgumentError(
                "x_0", f"or num_samples must be given, and not both, but num_samples is {num_samples!r}"
            )
        if arguments.is_int(x_0):
            raise ArgumentError("num_samples", f"must be given by keyword, num_samples={x_0}, but x_0 is {x_0}")
        if x_0 is None:
            size = arguments.positive_int("num_samples", num_samples)
            if checks.validating():
                checks.context(context, size, self.device)
        else:
            if checks.validating():
                _refuse_plates_around()
                self.check(x_0, *context)
            size = len(x_0)
        with self.running():
            states = (self.dtype(), self.device) if x_0 is None else (x_0.dtype, x_0.device)
            return self._chain(x_0, size, self.top(*states), context)

    def _chain(self, x_0: Tensor | None, size: int, top: dist.TorchDistribution, context: tuple[Tensor, ...]) -> Tensor:
        data, T = _data_plate(self.plate, size), self.num_steps
        with data:
            x = pyro.sample(f"x_{T}", top)
        for t in range(T, 1, -1):
            kernel = self.kernel(x, t, *context)
            with data:
                x = pyro.sample(f"x_{t - 1}", kernel)
        law = self.decoded(self.kernel(x, 1, *context), x)
        with data:
            return pyro.sample("x_0", law, obs=x_0)


class _Unscored(dist.TorchDistribution):
    """A distribution under ``mask(False)``, whose log density is never used: 0 in the dtype of costs.

    Arguments:
        law: The distribution, with batch_shape (B,).
        x_0: The data.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, law: dist.TorchDistribution, x_0: Tensor) -> None:
        self.law, self.x_0, self.has_rsample = law, x_0, law.has_rsample
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.law.support

    def expand(self, batch_shape: Shape, _instance: None = None) -> "_Unscored":
        return _Unscored(self.law.expand(batch_shape), self.x_0)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return self.law.rsample(sample_shape)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return self.law.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.x_0.new_zeros(value.shape, dtype=costs_dtype(self.x_0))


class Drawn(NamedTuple):
    """What the one-step pair draws.

    Arguments:
        t: The times, with shape (B,).
        x_t: The states.
        scale: w(t) / p(t), the weight of the bound's step, with shape (B,).
        noise_scale: The weight of the squared error of the noise, under a :class:`NoiseWeighting`.
    """

    t: Tensor
    x_t: Tensor
    scale: Tensor
    noise_scale: Tensor | None = None


class Step(nn.Module):
    """What the two programs of the one-step pair share: how t and x_t are drawn, and how the step is scaled.

    Arguments:
        model: The model of the trajectory pair.
        drawing: How t is drawn.
        weighting: The weight w(t) of a step.
    """

    def __init__(self, model: Generative, drawing: Drawing, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward_process, self.event_shape, self.plate = model.forward_process, model.event_shape, model.plate
        self.drawing, self.weighting = drawing, weighting

    def draw(self, x_0: Tensor, sample: Callable[[str, dist.TorchDistribution], Tensor]) -> "Drawn":
        """Draw times and states, with their weights; ``sample(name, distribution)`` makes each draw."""
        like = x_0.new_empty(len(x_0), dtype=torch.float64, device=home(x_0.device))  # exact where a t is rare
        u = sample("u", self.drawing.uniforms(like))
        t, probability = self.drawing(u, self.forward_process.num_steps)
        weights = [self.weighting(t)]
        if isinstance(self.weighting, NoiseWeighting):
            weights.append(self.weighting.noise(t, self.forward_process.schedule))
        for weight in weights:
            if not isinstance(weight, Tensor) or weight.shape != t.shape:
                raise ArgumentError(
                    "weighting",
                    f"must return a tensor of the shape {tuple(t.shape)} of t, but it is {arguments.described(weight)}",
                )
            if checks.validating() and not checks.holds((weight >= 0) & weight.isfinite()):
                i = int((~((weight >= 0) & weight.isfinite())).flatten().nonzero()[0])
                raise ArgumentError(
                    "weighting",
                    f"must return finite numbers of at least 0, but at t = {int(t.flatten()[i])} it is "
                    f"{float(weight.flatten()[i]):g}",
                )
        scales = [(weight / probability).to(costs_dtype(x_0)).to(x_0.device) for weight in weights]
        t = t.to(x_0.device)
        if t.dim() > 1:  # vectorised particles
            x_0 = x_0.expand(t.shape + self.event_shape)
        return Drawn(t, sample("x_t", self.forward_process.marginal(x_0, t)), *scales)

    def apart(
        self, kernel: dist.TorchDistribution, x_0: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[dist.TorchDistribution, dist.TorchDistribution, Tensor]:
        """Split a kernel into mean and variance, for a :class:`NoiseWeighting`.

        Returns the kernel with its mean detached; N(ε̂, 1 / 2π), with the noise ε̂ that the mean implies, whose -log
        p(ε) is exactly π times the squared error; and the noise ε itself.
        """
        law = innermost(kernel)
        if not isinstance(law, torch.distributions.Normal):
            raise ArgumentError(
                "weighting",
                f"must not be a {type(self.weighting).__name__} where the reverse kernel is not Gaussian, "
                f"but a {type(law).__name__}: give none, which is the bound's",
            )
        event, schedule = event_dim(x_t, t), self.forward_process.schedule
        signal, noise = coefficients(schedule.scales(t), x_t)
        weight_t, weight_0, _ = coefficients(schedule.posterior(t), x_t)
        off = (law.loc - weight_t * x_t - weight_0 * x_0) / weight_0  # implied estimate of x_0, less x_0
        epsilon = (x_t - signal * x_0) / noise
        of_noise = dist.Normal(epsilon - signal / noise * off, (2 * math.pi) ** -0.5)
        return dist.Normal(law.loc.detach(), law.scale).to_event(event), of_noise.to_event(event), epsilon

    def sampled(self, x_0: Tensor) -> "Drawn":
        """The same draws as sites ``u`` and ``x_t``, which cost nothing."""

        def sample(name: str, law: dist.TorchDistribution) -> Tensor:
            return pyro.sample(name, _Unscored(law, x_0) if name == "u" else law)

        with poutine.mask(mask=False):
            return self.draw(x_0, sample)

    @staticmethod
    @contextmanager
    def scored(scale: Tensor, where: Tensor) -> Iterator[None]:
        """A context that scales the costs of sites and masks them to ``where``; scales of 0 are masked too."""
        counts = scale > 0
        mask = poutine.mask(mask=where & counts)  # type: ignore[call-overload] # its type asks for a BoolTensor
        with poutine.scale(scale=torch.where(counts, scale, 1.0)), mask:
            yield

    def told(self, t: Tensor, where: Tensor) -> Any:
        """The ``infer`` of a scored site (in the guide, if latent), which passes its cost to the drawing."""
        return {"tell": lambda cost: self.drawing.tell(t, cost, where)}


class OneStepGuide(nn.Module):
    """The guide of the one-step pair, called as ``guide(x_0, *context)``.

    Arguments, sites: see :class:`OneStep`.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x_0: Tensor, *context: Tensor) -> None:
        q = self.step.forward_process
        if checks.validating():
            _refuse_plates_around()
            q.check(x_0, self.step.event_shape)
        with _data_plate(self.step.plate, len(x_0)):
            pyro.sample("x_T", q.marginal(x_0, q.num_steps))
            t, x_t, scale, _ = self.step.sampled(x_0)
            if q.num_steps > 1:
                with self.step.scored(scale, t > 1):  # at t = 1 the posterior is a point: t = 2 stands in, masked
                    pyro.sample("x_s", q.posterior(x_t, x_0, t.clamp(min=2)), infer=self.step.told(t, t > 1))


class OneStepModel(Generative):
    """The model of the one-step pair, called as ``model(x_0, *context)``.

    Arguments, sites: see :class:`OneStep`.
    """

    def __init__(self, model: Generative, step: Step) -> None:
        parts = model.forward_process, model.reverse, model.event_shape, model.decoder, model.prior
        super().__init__(*parts, name=model.name, plate=model.plate)
        self.step = step

    def forward(self, x_0: Tensor, *context: Tensor) -> None:
        if checks.validating():
            _refuse_plates_around()
            self.check(x_0, *context)
        with self.running():
            self._score(x_0, context)

    def _score(self, x_0: Tensor, context: tuple[Tensor, ...]) -> None:
        data, step = _data_plate(self.plate, len(x_0)), self.step
        with data:
            pyro.sample("x_T", self.top(x_0.dtype, x_0.device))
            t, x_t, scale, noise_scale = step.sampled(x_0)
        kernel = self.kernel(x_t, t, *context)
        if noise_scale is not None:
            kernel, of_noise, epsilon = step.apart(kernel, x_0, x_t, t)
            with data, step.scored(noise_scale / math.pi, t > 0):
                pyro.sample("noise", of_noise, obs=epsilon)
        law = self.decoded(kernel, x_t)
        with data:
            if self.num_steps > 1:
                with step.scored(scale, t > 1):
                    pyro.sample("x_s", kernel)
            with step.scored(scale, t == 1):
                pyro.sample("x_0", law, obs=x_0, infer=step.told(t, t == 1))
