"""Stochastic variational inference: what a step of training needs, over one torch optimizer for all parameters."""

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from . import checks, processes
from .compilation import Compiled, kind_of
from .steps import Drawing
from .terms import Recorder

__all__ = ["SVI"]


class SVI:
    """Pyro's SVI interface over one torch optimizer, which sees all parameters together.

    ``pyro.optim`` keeps an optimizer a tensor and clips every tensor's gradient by itself; here one optimizer has them
    all, and the gradient is clipped by its global norm. The parameters are those of the model and of the guide, where
    they are modules, and of every ``pyro.param`` and ``pyro.module`` that they come upon, whenever they first do.

    The first step with data of some shape is run with Pyro's validation, if that is on, and with the checks of the pair
    and of the data; the following ones take them on trust, and do not wait for the device. Under
    ``torch.distributed`` every process takes its own step on its own batch, and what is learned, and returned, is that
    of all batches joined (see :doc:`training`).

    Arguments:
        model, guide: The programs.
        optim: Called once with the parameters, it returns a ``torch.optim.Optimizer``.
        loss: The ELBO.
        clip_norm: The norm that the gradient of the loss (of the whole batch, summed) is clipped to; not if None.
        scheduler: Called once with the optimizer, it returns a torch scheduler of the learning rate, which is stepped
            after each step of the optimizer.
        accumulate: The number of batches whose gradients are summed for one step of the optimizer.
        autocast: The dtype that networks compute in where that does no harm, ``torch.bfloat16`` or ``torch.float16``
            (whose gradients are then scaled); parameters, and all that is summed to a bound, stay as they are.
        average: Called once with the model, it returns a ``torch.optim.swa_utils.AveragedModel`` of it, which is
            updated after each step of the optimizer; see :meth:`averaged`.
        nonfinite: What to do where the loss, or the gradient, is infinite or NaN: "stop" raises, "skip" warns and takes
            no step. Either waits for the device at every step. If None, it is not looked at.
        compile: Whether the loss and its gradient run as one graph, compiled at the second step with data of a shape.
        validate: Whether to validate and check at every step (True) or at none (False), and not at the first of each
            shape.

    Attributes:
        optimizer, scheduler, average: What ``optim``, ``scheduler`` and ``average`` returned; None before the first
            step.
        scaler: The ``torch.amp.GradScaler`` where ``autocast`` is ``torch.float16``, else None.
        num_steps: How many steps the optimizer has taken.

    Raises:
        ValueError: If an argument is of another kind or out of range. On a step, if there is nothing to learn.
        FloatingPointError: On a step, where ``nonfinite`` is "stop" and the loss or the gradient is not finite: no step
            is taken.

    References:
        Averaging weights: Denoising Diffusion Probabilistic Models (Ho et al., 2020), Appendix B, with 0.9999.

    Example:
        >>> def model(x):
        ...     rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.distributions.Exponential(rate), obs=x)
        >>> def guide(x):
        ...     pass
        >>> optim = lambda parameters: torch.optim.Adam(parameters, lr=0.1)
        >>> svi = pyrodiff.SVI(model, guide, optim, pyrodiff.DiffusionELBO())
        >>> losses = [svi.step(torch.full((10,), 0.5)) for _ in range(200)]
        >>> pyro.param("rate")  # the best is 1 / 0.5
        tensor(2.0000, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        loss: ELBO,
        clip_norm: float | None = None,
        *,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        average: Callable[[nn.Module], AveragedModel] | None = None,
        nonfinite: Literal["stop", "skip"] | None = None,
        compile: bool = False,
        validate: bool | None = None,
    ) -> None:
        for name, value in (("model", model), ("guide", guide), ("optim", optim)):
            if not callable(value):
                raise ValueError(f"{name} must be a callable (optim: called with parameters), but it is {value!r}")
        for name, value in (("scheduler", scheduler), ("average", average)):
            if value is not None and not callable(value):
                raise ValueError(f"{name} must be a callable or None, but it is {value!r}")
        checks.instance("loss", loss, ELBO)
        if not hasattr(loss, "differentiable_loss"):
            raise ValueError(f"loss must have a differentiable_loss, but it is {loss!r}")
        if clip_norm is not None:
            checks.number("clip_norm", clip_norm, 0, math.inf)
        checks.positive_int("accumulate", accumulate)
        checks.one_of("autocast", autocast, (None, torch.bfloat16, torch.float16))
        checks.one_of("nonfinite", nonfinite, (None, "stop", "skip"))
        checks.one_of("compile", compile, (False, True))
        checks.one_of("validate", validate, (None, False, True))
        if average is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module to be averaged, but it is {model!r}")
        self.model, self.guide, self.optim, self.loss, self.clip_norm = model, guide, optim, loss, clip_norm
        self.accumulate, self.autocast, self.nonfinite = accumulate, autocast, nonfinite
        self.compile, self.validate = compile, validate
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.average: AveragedModel | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.num_steps = 0
        self._make_scheduler, self._make_average = scheduler, average
        self._objective: nn.Module = _Objective(self)
        self._parameters: dict[int, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        self._called: dict[int, nn.Module] = {}
        self._known: set[Hashable] = set()
        self._compiled: Compiled | None = None
        self._batches, self._calls = 0, 0
        self._share_out()

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step; ``args`` and ``kwargs`` go to the model and the guide.

        Returns:
            The loss before the step, in nats summed over the batch, as a detached tensor with shape (), still on its
            device. Of several processes, the sum over their batches.
        """
        known = self._knows(args, kwargs)
        self._calls += 1
        if self._batches == 0:
            for parameter in self._parameters.values():
                parameter.grad = None
        compiled = self._compilation() if known and self.compile else None
        if compiled is None:
            loss = self._add_gradient(args, kwargs, known)
        else:
            loss = self._add_compiled_gradient(compiled, args, kwargs)
        self._batches = (self._batches + 1) % self.accumulate
        if self._batches == 0:
            self._update(loss)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without a step, as :meth:`step` returns it."""
        with torch.no_grad(), self._trust(self._knows(args, kwargs, new=False)):
            return processes.together([self._loss(*args, **kwargs)])[0]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the averaged weights (and buffers, where ``AveragedModel`` was told to use them).

        Raises:
            ValueError: If there is no average, or no step was taken yet.
        """
        if self.average is None:
            raise ValueError("average must be given to SVI, and a step taken, for the weights to be averaged")
        ours, means = (dict(program.named_parameters()) for program in (self.model, self.average.module))
        if self.average.use_buffers:
            ours.update(self.model.named_buffers())
            means.update(self.average.module.named_buffers())
        kept = {name: tensor.detach().clone() for name, tensor in ours.items()}
        try:
            _put(ours, means)
            yield
        finally:
            _put(ours, kept)

    def _knows(self, args: tuple, kwargs: dict, new: bool = True) -> bool:
        """Whether arguments of this kind were checked before; they are from now on, if they are ``new``."""
        if self.validate is not None:
            return not self.validate and self.optimizer is not None
        kind = kind_of((args, kwargs) if kwargs else args)
        try:
            known = kind in self._known
        except TypeError:  # something that cannot be hashed
            return False
        if new and len(self._known) < 1000:
            self._known.add(kind)
        return known

    @staticmethod
    def _trust(known: bool) -> AbstractContextManager:
        return checks.trusting() if known else nullcontext()

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of this process's batch, with its networks in the precision asked for."""
        with nullcontext() if self.autocast is None else torch.autocast(self._device(args).type, self.autocast):
            return self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def _device(self, args: tuple = ()) -> torch.device:
        tensors = [arg for arg in args if isinstance(arg, Tensor)] or list(self._parameters.values())
        return tensors[0].device if tensors else torch.device("cpu")

    def _add_gradient(self, args: tuple, kwargs: dict, known: bool) -> Tensor:
        """The loss; its gradient is added to the parameters'."""
        last = self._batches == self.accumulate - 1
        if processes.count() > 1 and self.optimizer is None:
            self._discover(args, kwargs)
        with self._trust(known), Recorder() as heard, nullcontext() if known else self._noting_modules():
            waiting = self._is_replicated() and not last
            with self._objective.no_sync() if waiting else nullcontext():
                loss = (self._objective if self._is_replicated() else self._loss)(*args, **kwargs)
                self._register(heard.parameters, known)
                if self.optimizer is None or not loss.requires_grad:
                    raise ValueError(
                        "model and guide must have a parameter to learn, but none was found that requires grad: let a "
                        "program be a torch.nn.Module, or call pyro.module(name, network) in it"
                    )
                joined = processes.together([loss.detach()])[0]
                if self._is_finite(joined, "loss"):
                    factor = self._factor()
                    (loss if factor is None else loss * factor).backward()
        if last and not self._is_replicated():
            self._join_gradients()
        return joined

    def _gradients(self, factor: Tensor | None, args: tuple, kwargs: dict) -> tuple[Tensor | None, ...]:
        """The loss and the gradients of all parameters, as a function that can be traced."""
        with self._trust(True):
            loss = self._loss(*args, **kwargs)
            parameters = list(self._parameters.values())
            scaled = loss if factor is None else loss * factor
            return loss.detach(), *_apart(torch.autograd.grad(scaled, parameters, allow_unused=True))

    def _compilation(self) -> Compiled | None:
        """The gradient as a compiled function; None where parameters are sharded, which hides them from a graph."""
        if any(processes.is_sharded(parameter) for parameter in self._parameters.values()):
            warnings.warn(
                "the programs run without being compiled: a parameter is sharded", RuntimeWarning, stacklevel=3
            )
            self.compile = False
            return None
        store = pyro.get_param_store()._params
        if self._compiled is None or any(store.get(name) is not value for name, value in self._stored.items()):
            programs = [program for program in (self.model, self.guide) if isinstance(program, nn.Module)]
            modules = [*programs, *self._called.values()]
            self._compiled = Compiled(self._gradients, modules, self._parameters.values(), name="the pair of programs")
        return self._compiled

    def _add_compiled_gradient(self, compiled: Compiled, args: tuple, kwargs: dict) -> Tensor:
        """As :meth:`_add_gradient`, by the graph."""
        factor = self._factor()
        loss, *gradients = compiled(factor, args, kwargs)
        joined = processes.together([loss])[0]
        if self._is_finite(joined, "loss"):
            for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)
        if self._batches == self.accumulate - 1:
            self._join_gradients()
        return joined

    def _factor(self) -> Tensor | None:
        """What the loss is multiplied by before its gradient is taken: the scaler's scale, and what averages undo."""
        averages = self._is_replicated() or self._is_sharded()
        number = processes.count() if averages else 1
        if self.scaler is not None:
            return self.scaler.scale(torch.full((), float(number), device=self._device()))
        return None if number == 1 else torch.full((), float(number), device=self._device())

    def _is_replicated(self) -> bool:
        return isinstance(self._objective, DistributedDataParallel)

    def _is_sharded(self) -> bool:
        return processes.count() > 1 and any(processes.is_sharded(value) for value in self._parameters.values())

    def _join_gradients(self) -> None:
        """Sum the gradients over processes, where nobody else does, and let buffers that changed be the first's."""
        if processes.count() == 1:
            return
        share = 1 / processes.count() if self._is_sharded() else 1.0
        plain = [p for p in self._parameters.values() if p.grad is not None and not processes.is_sharded(p)]
        for parameter, total in zip(plain, processes.together([p.grad for p in plain]), strict=True):
            parameter.grad = total * share
        buffers = self._buffers()
        processes.agree(buffer for buffer in buffers if buffer._version != self._versions.get(id(buffer), 0))
        self._versions = {id(buffer): buffer._version for buffer in buffers}

    def _update(self, loss: Tensor) -> None:
        """A step of the optimizer, with the gradient of all batches since the last."""
        parameters = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        if not parameters:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        elif self.nonfinite is not None and self.scaler is None:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < before:  # the gradient was not finite, and no step taken
                return
        elif self.nonfinite is None or self._is_finite(norm, "norm of the gradient"):
            self.optimizer.step()
        else:
            return
        self._after_step(loss)

    def _after_step(self, loss: Tensor) -> None:
        self.num_steps += 1
        if self.scheduler is not None:
            self.scheduler.step(*((float(loss),) if isinstance(self.scheduler, ReduceLROnPlateau) else ()))
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _is_finite(self, value: Tensor, name: str) -> bool:
        """Whether a number is finite, as far as anybody wants to know."""
        if self.nonfinite is None or math.isfinite(float(value)):
            return True
        message = f"{name} is {float(value)} at step {self._calls}"
        if self.nonfinite == "stop":
            self._batches = 0
            raise FloatingPointError(f"{message}: no step was taken")
        warnings.warn(f"{message}: skipped", RuntimeWarning, stacklevel=4)
        return False

    def _share_out(self) -> None:
        """Of several processes: start from the parameters of the first, and draw noise and times of one's own."""
        if processes.count() == 1:
            return
        processes.agree([*self._program_parameters(), *self._buffers()])
        key = processes.set_apart(self._device())
        for module in self._modules():
            if isinstance(module, Drawing):
                module.spread(processes.number(), processes.count(), key)
        self._versions = {id(buffer): buffer._version for buffer in self._buffers()}

    def _discover(self, args: tuple, kwargs: dict) -> None:
        """Of several processes: find the parameters, those of the first, before the first loss is taken."""
        with Recorder() as heard, torch.no_grad():
            self._loss(*args, **kwargs)
        self._register(heard.parameters, known=False)
        processes.agree(self._parameters.values())
        modules = [program for program in (self.model, self.guide) if isinstance(program, nn.Module)]
        inside = {id(parameter) for program in modules for parameter in program.parameters()}
        if not self.compile and not self._is_sharded() and self._parameters and inside >= set(self._parameters):
            self._objective = DistributedDataParallel(self._objective)

    def _modules(self) -> list[nn.Module]:
        programs = [program for program in (self.model, self.guide) if isinstance(program, nn.Module)]
        every = [module for program in (*programs, *self._called.values()) for module in program.modules()]
        return list({id(module): module for module in every}.values())

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self._modules() for buffer in module._buffers.values() if buffer is not None]

    def _program_parameters(self) -> list[Tensor]:
        return [
            parameter
            for module in self._modules()
            for parameter in module._parameters.values()
            if parameter is not None
        ]

    @contextmanager
    def _noting_modules(self) -> Iterator[None]:
        """Within, every module that is called is noted, also where a program is a function that closes over it."""

        def note(module: nn.Module, args: tuple) -> None:
            self._called[id(module)] = module

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def _register(self, heard: dict[str, Tensor], known: bool) -> None:
        """Hand parameters that were not there before to the optimizer."""
        found = [] if known else self._program_parameters()
        new = {
            id(parameter): parameter
            for parameter in (*found, *heard.values())
            if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._parameters
        }
        self._stored.update({name: value for name, value in heard.items() if id(value) in new})
        if not new:
            return
        if self.optimizer is None:
            self.optimizer = self._made("optim", self.optim, list(new.values()), torch.optim.Optimizer)
            if self._make_scheduler is not None:
                self.scheduler = self._made("scheduler", self._make_scheduler, self.optimizer, LRScheduler)
            if self._make_average is not None:
                self.average = self._made("average", self._make_average, self.model, AveragedModel)
            if self.autocast is torch.float16:
                self.scaler = torch.amp.GradScaler(next(iter(new.values())).device.type)
        else:
            self.optimizer.param_groups[-1]["params"].extend(new.values())
        self._parameters.update(new)
        self._compiled = None

    @staticmethod
    def _made(name: str, make: Callable, given: object, kind: type) -> Any:
        made = make(given)
        if not isinstance(made, kind):
            like = ", as lambda parameters: torch.optim.Adam(parameters) does" if name == "optim" else ""
            raise ValueError(
                f"{name} must return a {kind.__module__}.{kind.__name__}{like}, but it returned {made!r}"
                f"{' (pyro.optim goes with pyro.infer.SVI)' if name == 'optim' else ''}"
            )
        return made


class _Objective(nn.Module):
    """The loss as a module that holds the programs: what DistributedDataParallel wraps."""

    def __init__(self, svi: SVI) -> None:
        super().__init__()
        self.model, self.guide = svi.model, svi.guide
        self.loss = svi._loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss(*args, **kwargs)


def _put(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _apart(gradients: tuple[Tensor | None, ...]) -> Iterator[Tensor | None]:
    """The gradients, each in memory of its own, so that they can be changed in place."""
    taken = set()
    for gradient in gradients:
        if gradient is not None:
            place = gradient.untyped_storage().data_ptr()
            overlapping = any(
                step == 0 and size > 1 for step, size in zip(gradient.stride(), gradient.shape, strict=True)
            )
            if place in taken or overlapping:
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            taken.add(place)
        yield gradient
