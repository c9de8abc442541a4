"""The gradient of an ELBO, of any pair of programs: as they run, as one compiled graph, and over several processes."""

import math
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from ..base import ranks
from ..base.randomness import kept_sources
from ..pair.programs import Generative
from ..pair.terms import Recorder, is_listened_to
from ..pair.times import Drawing
from ..process.forward import GaussianForward
from ..running.compilation import Compiled, Composition, kind_of

__all__ = ["Gradient"]


class Gradient:
    """The loss of a pair of programs, and its gradient, which is added to that of the parameters.

    Arguments of a kind that was there before, given to programs of the same parts, are not validated again.

    Arguments:
        model, guide: The programs.
        loss: The ELBO.
        learn: Called with parameters that were not there before, before a gradient is taken.
        autocast: The dtype that networks compute in, if not their own.
        compile: Whether it is compiled.
        validate: Whether to validate at every step (True), at none (False), or once for each kind of arguments (None).

    Attributes:
        parameters: All parameters that were found, by identity.
        compiled: The gradient as a compiled function, once it is.
        scaler: What scales the loss where the dtype is ``torch.float16``; None before the first parameter is found.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        loss: ELBO,
        learn: Callable[[list[Tensor]], None],
        autocast: torch.dtype | None,
        compile: bool,
        validate: bool | None,
    ) -> None:
        self.model, self.guide, self.loss, self.learn = model, guide, loss, learn
        self.autocast, self.compile, self.validate = autocast, compile, validate
        self.parameters: dict[int, Tensor] = {}
        self.compiled: Compiled | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self._objective: nn.Module = _Objective(self)
        self._stored: dict[str, Tensor] = {}  # parameters that are Pyro's own, not a module's
        self._called: dict[int, nn.Module] = {}  # modules that the programs were heard to call
        self._parts: Composition | None = None
        self._kinds: set[Hashable] = set()
        self._checked_before: set[str] = set()  # kinds that were, in the run that this one goes on with
        self._goes_on = False
        self._replicated: set[int] = set()
        self._is_joined = False
        self._key = ranks.set_apart()
        self._share_out()

    def add(
        self, args: tuple, kwargs: dict, last: bool = True, accept: Callable[[Tensor], bool] | None = None
    ) -> Tensor:
        """Take the gradient.

        Arguments:
            args, kwargs: What the programs are called with.
            last: Whether it is the last one before a step of the optimizer.
            accept: Told the loss, whether its gradient is to count.

        Returns:
            The loss, detached, with shape (); of several processes, the sum.

        Raises:
            ValueError: If there is nothing to learn.
        """
        accept = accept or (lambda loss: True)
        kind = self._checked_kind(args, kwargs)
        settled = self._is_settled()
        validated = self._validates(kind, settled)
        may_compile = settled and not validated and not _asks_for_gradients((args, kwargs))
        compiled = self._compilation() if may_compile else None
        if compiled is None:
            loss = self._add_as_it_runs(args, kwargs, validated, settled, last, accept)
            if validated and not self._kinds:
                self._look_at_data(args)
        else:
            loss = self._add_compiled(compiled, args, kwargs, accept)
            if last:
                self._join()
        if kind is not None and len(self._kinds) + len(self._checked_before) < 1000:
            self._kinds.add(kind)
        return loss

    def value(self, args: tuple, kwargs: dict) -> Tensor:
        """The loss alone, without a gradient; arguments and result as of :meth:`add`."""
        kind = self._checked_kind(args, kwargs)
        with torch.no_grad(), pyro.validation_enabled(self._validates(kind, self._is_settled())):
            loss = ranks.together([self.of_batch(*args, **kwargs)])[0]
        ranks.shard_again(self._modules())
        return loss

    def of_batch(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of this process's batch, with its networks in the precision asked for; it can be differentiated."""
        device = self._device(args).type
        used = self.autocast is not None and torch.amp.is_autocast_available(device)  # a meta device has none
        with torch.autocast(device, self.autocast) if used else nullcontext():
            return self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def rehearse(self, args: tuple, kwargs: dict) -> None:
        """Check the programs and arguments of this kind, and find the parameters, with no other trace.

        The steps that follow are those of a run in which this was done before; arguments as of :meth:`add`.
        """
        shares = [(drawing, drawing.share, drawing.share.drawn.clone()) for drawing in self.drawings() if drawing.share]
        with kept_sources(), pyro.validation_enabled(self.validate is not False):
            self._discover(args, kwargs)
        for drawing, share, drawn in shares:
            share.drawn.copy_(drawn)
            drawing.share = share
        kind = _kind(args, kwargs)
        if _in_words(kind) in self._checked_before:
            self._kinds.add(kind)
            self._checked_before.discard(_in_words(kind))

    def look(self, names: list[str]) -> bool:
        """Find parameters without running the programs, if those of these names are among them; whether they are."""
        there = [id(parameter) for parameter in self._of_modules("_parameters") if _can_be_learned(parameter)]
        keys = dict.fromkeys([*self.parameters, *there])
        if not set(names) <= set(self._names(keys)):
            return False
        if len(keys) > len(self.parameters):
            self._find({}, settled=False)
        return True

    def roots(self) -> dict[str, nn.Module]:
        """The modules that have all others within: the programs, and what programs that are functions call."""
        programs = {"model": self.model, "guide": self.guide}
        programs = {name: program for name, program in programs.items() if isinstance(program, nn.Module)}
        inside = {id(module) for program in programs.values() for module in program.modules()}
        called = [module for key, module in self._called.items() if key not in inside]
        inside |= {id(part) for module in called for part in module.modules() if part is not module}
        outermost = [module for module in called if id(module) not in inside and module.state_dict()]
        return programs | {f"called {i}": module for i, module in enumerate(outermost)}

    def names(self) -> list[str]:
        """The names of all parameters, in the order in which they were found; empty where one is no longer there."""
        return self._names(self.parameters)

    def stored(self) -> dict[str, Tensor]:
        """The parameters that are Pyro's own, unconstrained, by name."""
        of_modules, store = {id(p) for p in self._of_modules("_parameters")}, pyro.get_param_store()._params
        found = {name: tensor for name, tensor in store.items() if id(tensor) in self.parameters}
        return {name: tensor for name, tensor in found.items() if id(tensor) not in of_modules}

    def checked(self) -> list[str]:
        """The kinds of arguments that were checked, in words."""
        return sorted({_in_words(kind) for kind in self._kinds} | self._checked_before)

    def shares(self) -> list[list[int] | None]:
        """Of several processes, what each drawing goes on from: the key of its draws, and their number."""
        return [drawing.share and [drawing.share.key, int(drawing.share.drawn)] for drawing in self.drawings()]

    def go_on(self, checked: list[str], shares: list[list[int] | None]) -> None:
        """Check again what was checked in the run that this one goes on with, but let steps, and draws, be as there."""
        self._checked_before, self._kinds, self._goes_on = set(checked), set(), True
        for drawing, share in zip(self.drawings(), shares, strict=True):
            if drawing.share is not None and share is not None:
                self._key = drawing.share.key = share[0]
                drawing.share.drawn.fill_(share[1])

    def drawings(self) -> list[Drawing]:
        """How times are drawn in the programs."""
        return [module for module in self._modules() if isinstance(module, Drawing)]

    def forget(self) -> None:
        """Let the parameters have no gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def graph_for(self, args: tuple) -> Callable | None:
        """The compiled graph that the gradient is at arguments, if it is one and the programs are what they were."""
        ready = self.compiled is not None and self._is_settled() and not is_listened_to()
        return self.compiled.graph_for(None, None, *args) if ready else None

    def is_replicated(self) -> bool:
        """Whether DistributedDataParallel sums the gradients of several processes."""
        return isinstance(self._objective, DistributedDataParallel)

    def factor(self) -> Tensor | None:
        """What the loss is multiplied by before its gradient is taken: the scaler's scale, and what averages undo."""
        number = ranks.count() if self.is_replicated() or self._is_sharded() else 1
        if self.scaler is not None:
            return self.scaler.scale(torch.full((), float(number), device=self._device()))
        return None if number == 1 else torch.full((), float(number), device=self._device())

    def _checked_kind(self, args: tuple, kwargs: dict) -> Hashable | None:
        """The kind of arguments, which are checked again if they were in the run that this one goes on with."""
        kind = _kind(args, kwargs)
        was_checked = bool(self._checked_before) and _in_words(kind) in self._checked_before
        if was_checked or (self._goes_on and ranks.count() > 1 and not self._is_joined):
            self.rehearse(args, kwargs)
        return kind

    def _validates(self, kind: Hashable | None, settled: bool) -> bool:
        """Whether arguments of this kind, and the programs, are to be validated."""
        if self.validate is not None:
            return self.validate
        return not (settled and kind in self._kinds)

    def _look_at_data(self, args: tuple) -> None:
        """Warn of data of a Gaussian diffusion far from mean 0 and variance 1, which its prior is made for."""
        x_0 = args[0].detach() if args and isinstance(args[0], Tensor) else None
        if not isinstance(self.model, Generative) or not isinstance(self.model.forward_process, GaussianForward):
            return
        if x_0 is None or x_0.is_meta or not x_0.is_floating_point() or x_0.numel() < 2:
            return
        mean, scale = float(x_0.mean()), float(x_0.std())
        if math.isfinite(mean) and (abs(mean) > 2 or not 0.2 <= scale <= 5):
            warnings.warn(
                f"the data have mean {mean:.3g} and standard deviation {scale:.3g}, far from 0 and 1, which a Gaussian "
                f"diffusion is made for: standardise them, and add the log of what they were divided by to the bound "
                f"(Likelihood.rescaled)",
                UserWarning,
                stacklevel=4,
            )

    def _is_settled(self) -> bool:
        """Whether the programs have the parameters that they had when they were last looked through."""
        if self._parts is None or not (self._is_sharded() or self._parts.holds()):
            return False
        store = pyro.get_param_store()._params
        return all(store.get(name) is value for name, value in self._stored.items())

    def _add_as_it_runs(
        self,
        args: tuple,
        kwargs: dict,
        validated: bool,
        settled: bool,
        last: bool,
        accept: Callable[[Tensor], bool],
    ) -> Tensor:
        if ranks.count() > 1 and not self.parameters:
            self._discover(args, kwargs)
        before, counts = set(self.parameters), False
        waiting = self._objective.no_sync() if self.is_replicated() and not last else nullcontext()
        try:
            with pyro.validation_enabled(validated), Recorder() as heard, waiting:
                with nullcontext() if settled else self._noting_modules():
                    loss = (self._objective if self.is_replicated() else self.of_batch)(*args, **kwargs)
                self._find(heard.parameters, settled)
                self._refuse_what_learns_nothing(loss)
                joined = ranks.together([loss.detach()])[0]
                counts = accept(joined)
                if counts:
                    factor = self.factor()
                    (loss if factor is None else loss * factor).backward()
        finally:
            for parameter in self.parameters.values():  # where Pyro leaves a reference to the parameter itself, which
                vars(parameter).pop("unconstrained", None)  # cannot be pickled; it is put there at every message
            if not counts:
                ranks.shard_again(self._modules())
        ranks.agree(self.parameters[key] for key in self.parameters if key not in before)
        if last:
            self._join(by_hand=not counts)
        return joined

    def _refuse_what_learns_nothing(self, loss: Tensor) -> None:
        if not self.parameters or not loss.requires_grad:
            raise ValueError(
                "model and guide must have a parameter to learn, but none was found that requires grad: let a program "
                "be a torch.nn.Module, or call pyro.module(name, network) in it"
            )

    def _compilation(self) -> Compiled | None:
        """The gradient as a compiled function, if it is to be: not while a handler listens or a parameter has a hook,
        nor where parameters are sharded, which hides them from a graph.
        """
        if not self.compile or is_listened_to() or any(map(_has_hooks, self.parameters.values())):
            return None
        if any(ranks.is_sharded(parameter) for parameter in self.parameters.values()):
            message = "the pair of programs runs without being compiled: a parameter is sharded"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            self.compile = False
            return None
        if self.compiled is None:
            modules, tensors = self._modules(), self.parameters.values()
            self.compiled = Compiled(self._as_a_function, modules, tensors, name="the pair of programs")
        return self.compiled

    def _as_a_function(self, factor: Tensor | None, kwargs: dict | None, *args: Any) -> tuple[Tensor | None, ...]:
        """The loss and the gradients of all parameters."""
        with pyro.validation_enabled(False):
            loss = self.of_batch(*args, **(kwargs or {}))
            learned = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
            scaled = loss if factor is None else loss * factor
            found = iter(_apart(torch.autograd.grad(scaled, learned, allow_unused=True)))
        return loss.detach(), *(next(found) if p.requires_grad else None for p in self.parameters.values())

    def _add_compiled(self, compiled: Compiled, args: tuple, kwargs: dict, accept: Callable[[Tensor], bool]) -> Tensor:
        loss, *gradients = compiled(self.factor(), kwargs or None, *args)
        joined = ranks.together([loss])[0]
        if accept(joined):
            for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)
        return joined

    def _device(self, args: tuple = ()) -> torch.device:
        tensors = [arg for arg in args if isinstance(arg, Tensor)] or list(self.parameters.values())
        return tensors[0].device if tensors else torch.device("cpu")

    # What the programs consist of

    def _modules(self) -> list[nn.Module]:
        programs = [program for program in (self.model, self.guide) if isinstance(program, nn.Module)]
        every = [module for program in (*programs, *self._called.values()) for module in program.modules()]
        return list({id(module): module for module in every}.values())

    def _names(self, keys: Iterable[int]) -> list[str]:
        found = {id(tensor): name for name, tensor in self.stored().items()}
        for root, module in reversed(self.roots().items()):
            found |= {id(parameter): f"{root}.{name}" for name, parameter in module.named_parameters()}
        return [found.get(key, "") for key in keys]

    def _of_modules(self, kind: str) -> list[Tensor]:
        """The modules' ``_parameters`` or ``_buffers``."""
        every = [tensor for module in self._modules() for tensor in getattr(module, kind).values()]
        return list({id(tensor): tensor for tensor in every if tensor is not None}.values())

    @contextmanager
    def _noting_modules(self) -> Iterator[None]:
        """Within, every module that is called is noted, also where a program is a function that closes over it."""

        def note(module: nn.Module, args: tuple) -> None:
            if not isinstance(module, DistributedDataParallel | _Objective):  # which hold the programs, and are ours
                self._called[id(module)] = module

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def _find(self, heard: dict[str, Tensor], settled: bool) -> None:
        """Hand on parameters that were not there before; look through the programs, if they are not ``settled``."""
        if settled and not heard:
            return
        own = [] if settled or self._is_sharded() else self._of_modules("_parameters")
        new = {
            id(parameter): parameter
            for parameter in (*own, *heard.values())
            if _can_be_learned(parameter) and id(parameter) not in self.parameters
        }
        if not settled:
            of_modules = {id(parameter) for parameter in self._of_modules("_parameters")}
            self._stored = {name: value for name, value in heard.items() if id(value) not in of_modules}
            learned = [*self._of_modules("_parameters"), *self.parameters.values(), *new.values()]
            self._parts = Composition(self._modules(), learned, whole=False)
        elif new:
            self._stored.update({name: value for name, value in heard.items() if id(value) in new})
        if not new:
            return
        for parameter in new.values():
            parameter.grad = None
        self.parameters.update(new)
        self.compiled = None
        if self.autocast is torch.float16 and self.scaler is None:
            self.scaler = torch.amp.GradScaler(self._device().type)
        self.learn(list(new.values()))

    # Several processes

    def _is_sharded(self) -> bool:
        return ranks.count() > 1 and any(ranks.is_sharded(value) for value in self.parameters.values())

    def _share_out(self) -> None:
        """Have the parameters of the first process, and spread the times over all batches."""
        if ranks.count() == 1:
            return
        learned = list({id(p): p for p in (*self._of_modules("_parameters"), *self.parameters.values())}.values())
        ranks.agree([*learned, *self._of_modules("_buffers")])
        device = next((tensor.device for tensor in learned), None)
        for drawing in self.drawings():
            drawing.spread(ranks.number(), ranks.count(), self._key, device)

    def _discover(self, args: tuple, kwargs: dict) -> None:
        """Find the parameters, those of the first process, before the first loss is taken."""
        if ranks.count() > 1:
            self._find({}, settled=False)  # before the forward pass, which gathers what is sharded
        kept = [(buffer, buffer.clone()) for buffer in self._of_modules("_buffers")]
        with Recorder() as heard, self._noting_modules(), torch.set_grad_enabled(not self._is_sharded()):
            loss = self.of_batch(*args, **kwargs)
        self._find(heard.parameters, settled=False)
        alone, self._is_joined = ranks.count() == 1 or self._is_joined, True
        if not alone and ranks.all_say(self._can_be_replicated(loss)):
            self._objective = DistributedDataParallel(self._objective)
            self._objective.broadcast_buffers = False  # not at every forward pass: they are agreed on after the step
            self._replicated = set(self.parameters)
        ranks.shard_again(self._modules())
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        if not alone:
            self._share_out()

    def _can_be_replicated(self, loss: Tensor) -> bool:
        """Whether DistributedDataParallel will do: all parameters are in the programs, with a part in the loss."""
        inside = {id(parameter) for parameter in self._objective.parameters()}
        if self.compile or self._is_sharded() or not loss.requires_grad or not inside >= set(self.parameters):
            return False
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        return all(gradient is not None for gradient in gradients)

    def _join(self, by_hand: bool = False) -> None:
        """Sum the gradients over processes, where no backward pass did, and let the buffers be those of the first.

        A parameter that had no part in the loss of one process may have had in another's: its gradient is 0 here.
        """
        if ranks.count() == 1:
            return
        done = set() if by_hand else self._replicated
        learned = [p for p in self.parameters.values() if p.requires_grad and not ranks.is_sharded(p)]
        plain = [parameter for parameter in learned if id(parameter) not in done]
        if any(parameter.grad is not None for parameter in self.parameters.values()):
            averages = self.is_replicated() or self._is_sharded()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in plain]
            for parameter, total in zip(plain, ranks.together(gradients), strict=True):
                parameter.grad = total / ranks.count() if averages else total
        ranks.agree(self._of_modules("_buffers"))


class _Objective(nn.Module):
    """The loss as a module that holds the programs: what DistributedDataParallel wraps."""

    def __init__(self, gradient: Gradient) -> None:
        super().__init__()
        self.model, self.guide = gradient.model, gradient.guide
        self.of_batch = gradient.of_batch

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.of_batch(*args, **kwargs)


def _kind(args: tuple, kwargs: dict) -> Hashable | None:
    """What is checked once; None where it cannot be hashed."""
    kind = kind_of((args, kwargs) if kwargs else args)
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def _in_words(kind: Hashable | None) -> str:
    """A kind as another Python would have it: without the places of objects in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(kind))


def _can_be_learned(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.is_leaf


def _has_hooks(parameter: Tensor) -> bool:
    """Whether something is to happen to its gradient, or after it, that a graph would not do."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _asks_for_gradients(args: Any) -> bool:
    """Whether an argument is to have a gradient, which a graph does not give it."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _leaves(args))


def _leaves(args: Any) -> Iterator[Any]:
    for arg in args.values() if isinstance(args, dict) else args:
        if isinstance(arg, tuple | list | dict):
            yield from _leaves(arg)
        else:
            yield arg


def _apart(gradients: tuple[Tensor | None, ...]) -> Iterator[Tensor | None]:
    """The gradients, each in memory of its own, so that they can be changed in place."""
    taken = set()
    for gradient in gradients:
        if gradient is not None:
            place, sizes = gradient.untyped_storage().data_ptr(), zip(gradient.stride(), gradient.shape, strict=True)
            if place in taken or any(step == 0 and size > 1 for step, size in sizes):
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            taken.add(place)
        yield gradient
