"""The gradient of an ELBO, of any pair of programs: as they run, or as one compiled graph, and over several ranks."""

import copy
import math
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..base import ranks
from ..base.randomness import kept_sources
from ..pair.programs import Generative
from ..pair.terms import Recorder, is_listened_to
from ..pair.times import Drawing
from ..process.forward import GaussianForward
from ..running.compilation import Compiled, Graph, as_written, kind_of

__all__ = ["Gradient", "Programs"]


class Programs:
    """The modules of a pair of programs, including those that functions call, and its parameters in Pyro's store.

    Arguments:
        model, guide: The programs.
    """

    def __init__(self, model: Callable, guide: Callable) -> None:
        self.model, self.guide = model, guide
        self._roots = dict.fromkeys(program for program in (model, guide) if isinstance(program, nn.Module))
        self._stored: dict[str, Tensor] = {}  # parameters outside of all modules, by their names in Pyro's store
        self._snapshot: tuple[list[dict], list[Tensor], list, list] | None = None

    def modules(self) -> list[nn.Module]:
        """All modules, each once."""
        return list(dict.fromkeys(module for root in self._roots for module in root.modules()))

    def tensors(self, kind: str) -> dict[Tensor, None]:
        """The modules' tensors, each once.

        Arguments:
            kind: "_parameters" or "_buffers".
        """
        every = chain.from_iterable(getattr(module, kind).values() for module in self.modules())
        return dict.fromkeys(tensor for tensor in every if tensor is not None)

    def drawings(self) -> list[Drawing]:
        """The modules that draw times."""
        return [module for module in self.modules() if isinstance(module, Drawing)]

    def roots(self) -> dict[str, nn.Module]:
        """The outermost modules: the programs, and the modules that programs call which are functions."""
        programs = {"model": self.model, "guide": self.guide}
        roots = {name: program for name, program in programs.items() if isinstance(program, nn.Module)}
        inside = {part for root in self._roots for part in root.modules() if part is not root} | {*roots.values()}
        called = [module for module in self._roots if module not in inside and module.state_dict()]
        return roots | {f"called {i}": module for i, module in enumerate(called)}

    def stored(self) -> dict[str, Tensor]:
        """The parameters outside of all modules, unconstrained, by name, if still in Pyro's store."""
        there = dict(pyro.get_param_store().named_parameters()) if self._stored else {}
        return {name: value for name, value in self._stored.items() if "$$$" in name or there.get(name) is value}

    def names(self) -> dict[Tensor, str]:
        """The names of all parameters."""
        found = {parameter: name for name, parameter in self.stored().items()}
        for root, module in reversed(self.roots().items()):
            found |= {parameter: f"{root}.{name}" for name, parameter in module.named_parameters()}
        return found

    def collect(self, found: dict[str, Tensor]) -> list[Tensor]:
        """Collect the parameters that can be learned, and take the snapshot that :meth:`are_unchanged` compares with.

        Arguments:
            found: The parameters in Pyro's messages, by name.
        """
        own = self.tensors("_parameters")
        self._stored |= found
        self._stored = {name: value for name, value in self.stored().items() if value not in own}
        tensors = list(own | dict.fromkeys(self._stored.values()))
        tables = [table for module in self.modules() for table in (module._parameters, module._modules)]
        self._snapshot = tables, tensors, *_found_in(tables, tensors)
        return [parameter for parameter in tensors if _can_be_learned(parameter)]

    def are_unchanged(self) -> bool:
        """Whether modules, parameters and what of them is learned are the same as when they were collected."""
        if self._snapshot is None:
            return False
        tables, tensors, parts, kinds = self._snapshot
        parts_now, kinds_now = _found_in(tables, tensors)
        is_same = kinds_now == kinds and len(parts_now) == len(parts) and all(map(operator.is_, parts_now, parts))
        return is_same and len(self.stored()) == len(self._stored)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """A context in which the programs change copies of their buffers; modules that functions call are collected."""
        seen: set[nn.Module] = set()
        before: list[tuple[dict, str, Any]] = []
        copies: dict[Tensor, Tensor] = {}

        def set_aside(root: nn.Module, args: tuple = ()) -> None:
            if root in seen:
                if args and isinstance(root, LazyModuleMixin) and root.has_uninitialized_params():
                    root.initialize_parameters(*args)  # before it runs, so that its buffers exist and can be restored
                    before.extend(_swapped(root, copies))
                return
            self._roots[root] = None
            for module in set(root.modules()) - seen:
                before.extend(_swapped(module, copies))
                if isinstance(module, Drawing):
                    before.append((vars(module), "share", module.share))
                    module.share, vars(module)["tell"] = copy.deepcopy(module.share), lambda *args: None
            seen.update(root.modules())
            set_aside(root, args)  # now seen: initialises the root if it is lazy

        for root in list(self._roots):
            set_aside(root)
        handle = register_module_forward_pre_hook(set_aside)
        try:
            yield
        finally:
            handle.remove()
            for parts, name, part in reversed(before):  # in reverse, as two modules may share one dict
                parts[name] = part
            for drawing in self.drawings():
                vars(drawing).pop("tell", None)  # the instance's; the class has the real one

    def take_from_store(self, names: set[str]) -> None:
        """Take the modules' parameters out of Pyro's store.

        Arguments:
            names: The names that were there before, which are kept.
        """
        store = pyro.get_param_store()
        state = store.get_state()  # without Pyro's weak references on tensors, which cannot be pickled
        new = state["params"].keys() - names
        if new:
            own = self.tensors("_parameters")
            for name in new:
                if "$$$" in name or state["params"][name] in own:
                    del state["params"][name], state["constraints"][name]
            store.clear()  # deleting one by one fails where a tensor has two names
            store.set_state(state)


class Gradient:
    """The loss of a pair of programs, and its gradient, which is added to that of the parameters.

    Before the first step with new programs, or with arguments of a new kind, there is a dry run: the programs run once,
    validated, and leave nothing behind but parameters in Pyro's store. The step itself is then like every other, so
    that a resumed run, which repeats the dry run, makes the same draws.

    Arguments:
        programs: The programs.
        learn: Called with new parameters, before their first gradient.
        loss, autocast, compile, validate: As of :class:`SVI`.

    Attributes:
        parameters: All parameters that were found, in the order in which they were.
        compiled: The gradient as a compiled function; None before it is compiled.
        scaler: The loss scaler if the dtype is ``torch.float16``; None before the first parameter is found.
    """

    def __init__(
        self,
        programs: Programs,
        learn: Callable,
        loss: ELBO,
        autocast: torch.dtype | None,
        compile: bool,
        validate: bool | None,
    ) -> None:
        self.programs, self.learn = programs, learn
        self.loss: Any = loss  # Any, as Pyro's base class does not declare differentiable_loss
        self.autocast, self.compile, self.validate = autocast, compile, validate
        self.parameters: dict[Tensor, None] = {}
        self.compiled: Compiled | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self._validated: set[Hashable] = set()  # kinds of arguments
        self._key = ranks.set_apart()
        self._synchronise(self.programs.tensors("_parameters"))

    def add(self, args: tuple, kwargs: dict, accept: Callable[[Tensor], bool]) -> Tensor:
        """Add the gradient of this rank's batch; :meth:`join` sums it over ranks.

        Arguments:
            args, kwargs: The arguments of the programs.
            accept: Called with the loss; returns whether its gradient counts.

        Returns:
            The loss, detached, with shape (); over several ranks, the sum.

        Raises:
            ValueError: If there is nothing to learn.
        """
        kind, settled = _kind(args, kwargs), self._is_settled()
        if settled and kind in self._validated:
            # the usual case: any step but the first with arguments of a kind
            compiled = self._compilation(args, kwargs) if self.compile else None
            return self._run(args, kwargs, accept) if compiled is None else self._replay(compiled, args, kwargs, accept)
        is_first = not self.parameters
        if self._needs_dry_run(settled):
            self.dry_run(args, kwargs)
        if is_first and self.validate is not False:
            self._warn_of_scale(args)
        loss = self._run(args, kwargs, accept)
        if len(self._validated) < _MOST:
            self._validated.add(kind)
        return loss

    def value(self, args: tuple, kwargs: dict) -> Tensor:
        """The loss alone, without a gradient, as :meth:`add` returns it.

        Arguments:
            args, kwargs: What the programs are called with.
        """
        kind, settled = _kind(args, kwargs), self._is_settled()
        alone = "without a gradient", kind
        with torch.no_grad():
            known = settled and self._validated & {kind, alone}
            if self.validate is None and not known and self._needs_dry_run(settled):
                self._parameters_of(args, kwargs)
                self._validated.add(alone)
            with pyro.validation_enabled(self.validate is True):
                loss = ranks.together([self._loss(*args, **kwargs)])[0]
        ranks.shard_again(self.programs.modules())
        return loss

    def dry_run(self, args: tuple, kwargs: dict) -> None:
        """Run the programs once, validated, to find their parameters; nothing else is kept.

        Arguments:
            args, kwargs: What the programs are called with.
        """
        settled, found = self._is_settled(), self._parameters_of(args, kwargs)
        if not settled or self._are_new(found):
            self.register(found)

    def register(self, found: dict[str, Tensor]) -> None:
        """Collect the parameters, and learn those that are new.

        Arguments:
            found: As of :meth:`Programs.collect`.
        """
        new = [parameter for parameter in self.programs.collect(found) if parameter not in self.parameters]
        self._synchronise(new)
        if not new:
            return
        for parameter in new:
            parameter.grad = None
        self.parameters |= dict.fromkeys(new)
        self.compiled = None
        if self.autocast is torch.float16 and self.scaler is None:
            self.scaler = torch.amp.GradScaler(self._device().type)
        self.learn(new)

    def join(self) -> None:
        """Sum the gradients over ranks, and set the buffers to those of rank 0.

        A parameter without a gradient on this rank may have one on another: it counts as 0 here.
        """
        if ranks.count() == 1:
            return
        learned = [parameter for parameter in self.parameters if parameter.requires_grad]
        if any(parameter.grad is not None for parameter in learned):
            plain = [parameter for parameter in learned if not ranks.is_sharded(parameter)]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in plain]
            for parameter, total in zip(plain, ranks.together(gradients), strict=True):
                parameter.grad = total
            for parameter in learned:
                if parameter.grad is not None and ranks.is_sharded(parameter.grad):
                    parameter.grad.to_local().mul_(ranks.count())  # fully_shard has averaged it
        ranks.agree(self.programs.tensors("_buffers"))

    def graph_for(self, args: tuple) -> Graph | None:
        """The compiled graph of the gradient, if there is one and the programs are unchanged.

        Arguments:
            args: What the programs are called with.
        """
        if self.compiled is None or not self._is_settled() or self._is_listened_to():
            return None
        return self.compiled.graph_for(None, None, *args)  # scale and kwargs are None

    # The loss and its gradient

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, differentiable, with networks under autocast if asked for."""
        model, guide, store = self.programs.model, self.programs.guide, pyro.get_param_store()
        names = set(store.keys())
        try:
            device = self._device(args).type
            if self.autocast is None or not torch.amp.is_autocast_available(device):  # a meta device has none
                return self.loss.differentiable_loss(model, guide, *args, **kwargs)
            with torch.autocast(device, self.autocast):
                return self.loss.differentiable_loss(model, guide, *args, **kwargs)
        finally:
            if store:
                self.programs.take_from_store(names)

    def _run(self, args: tuple, kwargs: dict, accept: Callable[[Tensor], bool]) -> Tensor:
        """Add the gradient by running the programs."""
        counts = False
        try:
            with pyro.validation_enabled(self.validate is True), Recorder() as run:
                loss = self._loss(*args, **kwargs)
            if self._are_new(run.parameters):
                self.register(run.parameters)
            if not self.parameters or not loss.requires_grad:
                raise ValueError(
                    "model and guide must have a parameter to learn, but none was found that requires grad: let a "
                    "program be a torch.nn.Module, or call pyro.module(name, network) in it"
                )
            joined = ranks.together([loss.detach()])[0]
            counts = accept(joined)
            if counts:
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        finally:
            if not counts:
                ranks.shard_again(self.programs.modules())
        return joined

    def _replay(self, compiled: Compiled, args: tuple, kwargs: dict, accept: Callable[[Tensor], bool]) -> Tensor:
        """Add the gradient by running the compiled graph."""
        scale = None if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device()))
        loss, *gradients = compiled(scale, kwargs or None, *args)
        joined = ranks.together([loss])[0]
        if accept(joined):
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)
        return joined

    def _as_a_function(self, scale: Tensor | None, kwargs: dict | None, *args: Any) -> tuple[Tensor | None, ...]:
        """The loss and the gradients of all parameters as a function of tensors, to be compiled."""
        with pyro.validation_enabled(False):
            loss = self._loss(*args, **(kwargs or {}))
            learned = [parameter for parameter in self.parameters if parameter.requires_grad]
            scaled = loss if scale is None else loss * scale
            found = iter(_unaliased(torch.autograd.grad(scaled, learned, allow_unused=True)))
        return loss.detach(), *(next(found) if p.requires_grad else None for p in self.parameters)

    def _is_listened_to(self) -> bool:
        """Whether handlers around the step, or hooks of parameters, would hear of what a graph does not do."""
        return is_listened_to() or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters)

    def _compilation(self, args: tuple, kwargs: dict) -> Compiled | None:
        """The gradient as a compiled function; None under handlers, hooks or gradients of inputs."""
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            return None
        if self._is_listened_to():
            return None
        if any(map(ranks.is_sharded, self.parameters)):  # sharding hides parameters from a graph
            message = "the pair of programs runs without being compiled: a parameter is sharded"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            self.compile = False
            return None
        if self.compiled is None:
            modules, name = self.programs.modules(), "the pair of programs"
            self.compiled = Compiled(self._as_a_function, modules, self.parameters, name=name, options=self._options)
        return self.compiled

    def _options(self) -> Hashable:
        """What attributes of the loss are numbers or strings, ``num_particles`` say."""
        return tuple((k, v) for k, v in vars(self.loss).items() if isinstance(v, int | float | str) and k[0] != "_")

    def _device(self, args: tuple = ()) -> torch.device:
        tensors = (tensor for tensor in (*args, *self.parameters) if isinstance(tensor, Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    # Dry runs and new parameters

    def _is_settled(self) -> bool:
        """Whether the programs are unchanged since their parameters were collected.

        Sharded modules count as settled: they switch between shards and whole tensors.
        """
        return self.programs.are_unchanged() or self._is_sharded()

    def _is_sharded(self) -> bool:
        return any(map(ranks.is_sharded, self.parameters))

    def _needs_dry_run(self, settled: bool) -> bool:
        """Whether arguments of a new kind need a dry run.

        At most ``_MOST`` kinds have one, as each step may have another kind. None where running the programs
        communicates between ranks: if only one had a batch of a new shape, it would wait forever.
        """
        if not settled:
            return True
        talks = self._is_sharded() or any(isinstance(module, nn.SyncBatchNorm) for module in self.programs.modules())
        return self.validate is None and len(self._validated) < _MOST and not talks

    def _parameters_of(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """Run the programs, validated and isolated; returns the parameters in Pyro's messages, by name."""
        gradients = torch.is_grad_enabled() and not any(map(ranks.is_sharded, self.programs.tensors("_parameters")))
        validated, isolated = pyro.validation_enabled(self.validate is not False), self.programs.isolated()
        with kept_sources(), isolated, validated, torch.set_grad_enabled(gradients), Recorder() as run:
            with as_written():
                self._loss(*args, **kwargs)
        ranks.shard_again(self.programs.modules())
        return run.parameters

    def _are_new(self, found: dict[str, Tensor]) -> bool:
        return any(value not in self.parameters and _can_be_learned(value) for value in found.values())

    def _synchronise(self, parameters: Iterable[Tensor]) -> None:
        """Broadcast parameters and buffers from rank 0, and spread the times over the batches of all ranks."""
        if ranks.count() == 1:
            return
        ranks.agree([*parameters, *self.programs.tensors("_buffers")])
        device = next((parameter.device for parameter in (*parameters, *self.parameters)), None)
        for drawing in self.programs.drawings():
            if drawing.share is None:
                drawing.spread(ranks.number(), ranks.count(), self._key, device)

    def _warn_of_scale(self, args: tuple) -> None:
        """Warn of data far from mean 0 and variance 1, which the prior of a Gaussian diffusion assumes."""
        x_0, model = args[0].detach() if args and isinstance(args[0], Tensor) else None, self.programs.model
        if not isinstance(model, Generative) or not isinstance(model.forward_process, GaussianForward):
            return
        if x_0 is None or x_0.is_meta or not x_0.is_floating_point() or x_0.numel() < 2:
            return
        mean, scale = float(x_0.mean()), float(x_0.std())
        signal, noise = model.forward_process.schedule.scales(model.num_steps).tolist()
        if signal == 1 and max(abs(mean), scale) < noise / 5:  # VE, with noise far larger than the data
            return
        if math.isfinite(mean) and (abs(mean) > 2 or not 0.2 <= scale <= 5):
            warnings.warn(
                f"the data have mean {mean:.3g} and standard deviation {scale:.3g}, far from 0 and 1, which a Gaussian "
                f"diffusion is made for: standardise them, and add the log of what they were divided by to the bound "
                f"(Likelihood.rescaled)",
                UserWarning,
                stacklevel=4,
            )


_MOST = 100  # kinds of arguments that have a dry run
_KIND, _VALUES = operator.attrgetter("requires_grad", "dtype", "device"), operator.methodcaller("values")


def _found_in(tables: list[dict], tensors: list[Tensor]) -> tuple[list, list]:
    """What these tables of modules hold, and whether and how tensors are learned."""
    return list(chain.from_iterable(map(_VALUES, tables))), list(map(_KIND, tensors))


def _kind(args: tuple, kwargs: dict) -> Hashable:
    """The key of arguments that share one dry run; a new object each time if it cannot be hashed."""
    kind = kind_of((args, kwargs) if kwargs else args)
    try:
        hash(kind)
    except TypeError:
        return object()
    return kind


def _swapped(module: nn.Module, copies: dict[Tensor, Tensor]) -> list[tuple[dict, str, Any]]:
    """Replace a module's buffers by copies; returns the originals and where to put them back."""
    before = [(module._buffers, name, buffer) for name, buffer in module._buffers.items()]
    for buffers, name, buffer in before:
        if buffer is not None and not is_lazy(buffer):
            buffers[name] = copies.setdefault(buffer, buffer.detach().clone())
    return before


def _can_be_learned(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.is_leaf


def _unaliased(gradients: tuple[Tensor | None, ...]) -> Iterator[Tensor | None]:
    """The gradients, each in its own memory, so that they can be changed in place."""
    taken = set()
    for gradient in gradients:
        if gradient is not None:
            place, sizes = gradient.untyped_storage().data_ptr(), zip(gradient.stride(), gradient.shape, strict=True)
            if place in taken or any(step == 0 and size > 1 for step, size in sizes):
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            taken.add(place)
        yield gradient
