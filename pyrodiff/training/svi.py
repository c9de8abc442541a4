"""Stochastic variational inference: a step of training, with one torch optimizer for all parameters."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from ..base import arguments, checks, ranks
from ..base.arguments import ArgumentError
from ..pair.diffusion import Diffusion, OneStep
from ..pair.elbo import DiffusionELBO
from ..process.schedules import Schedule
from ..running.compilation import Replayed
from .captures import Captures
from .gradients import Gradient, Programs

__all__ = ["SVI", "exponential_average"]


class SVI:
    """Pyro's SVI interface, with one torch optimizer for all parameters together.

    ``pyro.optim`` has an optimizer per tensor and clips each tensor's gradient separately; here one optimizer has all
    of them, and the gradient is clipped by its global norm. The parameters are those of the model and of the guide, if
    they are modules, and of every ``pyro.param`` and ``pyro.module`` that they call, from the first call on.

    Before the first step with data of some shape there is a dry run: the programs run once more, validated by Pyro and
    by the checks of the pair and of the data, whatever ``pyro.enable_validation`` says. The global random number
    generators and all buffers are restored afterwards; anything else that a program changes (a counter in Python, a
    generator of its own, a parameter in place, a buffer that it registers as it runs) it changes once more. No other
    step is validated, or synchronises with the device. Pyro's store is left unchanged, except for parameters that no
    module holds. Under ``torch.distributed`` every rank calls ``step`` with its own batch, and the update, and the
    returned loss, are those of all batches together (see :doc:`training`).

    Arguments:
        model, guide: The programs.
        optim: Called once with the parameters, it returns a ``torch.optim.Optimizer``.
        loss: The ELBO.
        clip_norm: The norm that the gradient (of the loss summed over the batch) is clipped to; None for no clipping.
        scheduler: Called once with the optimizer, it returns a torch scheduler of the learning rate, which is stepped
            after each step of the optimizer (``ReduceLROnPlateau`` with the loss of the last batch).
        accumulate: The number of calls of :meth:`step` whose gradients are summed for one optimizer step.
        autocast: The dtype of ``torch.autocast`` for networks, ``torch.bfloat16`` or ``torch.float16`` (with gradient
            scaling); parameters and the terms of the bound keep their precision.
        average: Called once with the model, it returns a ``torch.optim.swa_utils.AveragedModel`` of it, which is
            updated after each step of the optimizer; see :meth:`averaged` and :meth:`adopt_average`.
        nonfinite: What to do if the loss or the gradient is infinite or NaN: "stop" raises, "skip" warns and leaves the
            step out (with accumulation, that batch). Both synchronise with the device at every step. None does not
            check. A gradient that overflows float16 is skipped by the scaler in any case.
        compile: Whether the loss and its gradient run as one graph, compiled at the second step with data of a shape;
            for :class:`DiffusionELBO` only.
        validate: True to validate every step (which cannot be compiled), False for none, None for a dry run before the
            first step of each shape.

    Attributes:
        optimizer, scheduler, average: What ``optim``, ``scheduler`` and ``average`` returned; None before the first
            step.
        num_steps: How many steps the optimizer has taken.

    Raises:
        ValueError: If an argument is of another kind or out of range. On a step, if there is nothing to learn.
        FloatingPointError: On a step, if ``nonfinite`` is "stop" and the loss or the gradient is not finite; the
            parameters are unchanged.

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
        _check_callables(model, guide, optim, scheduler, average)
        checks.instance("loss", loss, ELBO)
        if not hasattr(loss, "differentiable_loss"):
            raise ArgumentError("loss", f"must have a differentiable_loss, but it is {loss!r}")
        if clip_norm is not None:
            clip_norm = arguments.number("clip_norm", clip_norm, 0, math.inf)
        accumulate = arguments.positive_int("accumulate", accumulate)
        arguments.one_of("autocast", autocast, (None, torch.bfloat16, torch.float16))
        arguments.one_of("nonfinite", nonfinite, (None, "stop", "skip"))
        arguments.one_of("compile", compile, (False, True))
        arguments.one_of("validate", validate, (None, False, True))
        if compile and validate:
            raise ArgumentError("validate", "must not be True where compile is: a graph checks nothing")
        if compile and not isinstance(loss, DiffusionELBO):
            raise ArgumentError(
                "loss",
                f"must be a DiffusionELBO to be compiled, but it is {loss!r}: Pyro's own read numbers as they go",
            )
        if average is not None and not isinstance(model, nn.Module):
            raise ArgumentError("model", f"must be a torch.nn.Module to be averaged, but it is {model!r}")
        self.model, self.guide, self.optim, self.loss, self.clip_norm = model, guide, optim, loss, clip_norm
        self.accumulate, self.autocast, self.nonfinite = accumulate, autocast, nonfinite
        self.validate = validate
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.average: AveragedModel | None = None
        self.num_steps = 0
        self._make_scheduler, self._make_average = scheduler, average
        self._programs = Programs(model, guide)
        self._gradient = Gradient(self._programs, self._learn, loss, autocast, compile, validate)
        self._captures = Captures(self._gradient, self._whole_step, compile)
        self._batches, self._calls, self._skipped = 0, 0, ""
        self._is_averaged = False
        self._state: dict[str, Any] | None = None  # a loaded state that waits for all parameters to be known

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step; ``args`` and ``kwargs`` go to the model and the guide.

        Returns:
            The loss before the step, in nats summed over the batch, as a detached tensor with shape () on its device.
            With several ranks, the sum over their batches.
        """
        self._refuse_averages()
        if not torch.is_grad_enabled():
            raise ArgumentError("gradients", "must be enabled for a step, but it is taken under torch.no_grad()")
        if self._state is not None:
            self._gradient.dry_run(args, kwargs)
            self._resume(self._state)
        self._calls += 1
        if self._captures.is_on and self.optimizer is not None and self._is_capturable(args, kwargs):
            replayed = self._captures.of(args, self.optimizer, self.clip_norm)
            if replayed is not None:
                return self._replay(replayed, args)
        if self._batches == 0:
            self._drop_gradients()
        try:
            loss = self._gradient.add(args, kwargs, self._accepts)
        except BaseException:
            self._batches = 0  # a gradient that may be incomplete is dropped
            raise
        self._batches += 1
        if self._batches >= self.accumulate:
            self._batches = 0
            self._gradient.join()
            self._update(loss)
        if self._skipped:
            warnings.warn(self._skipped, RuntimeWarning, stacklevel=2)
            self._skipped = ""
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without a step, as :meth:`step` returns it."""
        if self._state is not None:
            self._gradient.dry_run(args, kwargs)
            self._resume(self._state)
        return self._gradient.value(args, kwargs)

    @property
    def compile(self) -> bool:
        """Whether the loss and its gradient run as a compiled graph; False once parameters prove to be sharded."""
        return self._gradient.compile

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler if ``autocast`` is ``torch.float16``; None otherwise, and before the first step."""
        return self._gradient.scaler

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ArgumentError("svi", "must have taken a step to have an optimizer, but there was none yet")
        return self.optimizer

    # The average

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has the averaged weights (and buffers, if ``AveragedModel`` has
        ``use_buffers``). The guide keeps its own, except for what it shares with the model. No step may be taken
        meanwhile.

        Raises:
            ValueError: If there is no average, no step was taken yet, or the context is already entered.
        """
        ours, means = self._averages_of_weights()
        kept = {name: tensor.detach().clone() for name, tensor in ours.items()}
        try:
            self._is_averaged = True
            _put(ours, means)
            yield
        finally:
            self._is_averaged = False
            _put(ours, kept)

    def adopt_average(self) -> None:
        """Copy the averaged weights into the model for good; errors as of :meth:`averaged`."""
        _put(*self._averages_of_weights())

    def _averages_of_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's tensors and their averages, by name."""
        self._refuse_averages()
        if self._make_average is None:
            raise ArgumentError("average", "must be given to SVI for the weights to be averaged, but it is None")
        model, average = self.model, self.average
        if average is None or self.num_steps == 0 or not isinstance(model, nn.Module):
            raise ValueError("the weights must have taken a step to be averaged, but there was none yet")
        ours: dict[str, Tensor] = dict(model.named_parameters())
        means: dict[str, Tensor] = dict(average.module.named_parameters())
        if average.use_buffers:
            ours.update(model.named_buffers())
            means.update(average.module.named_buffers())
        return ours, means

    def _refuse_averages(self) -> None:
        if self._is_averaged:
            raise ValueError(
                "averaged() must be left first: within, the model's weights are not those that are learned"
            )

    # A step of the optimizer

    def _learn(self, parameters: list[Tensor]) -> None:
        """Hand new parameters to the optimizer."""
        if self.optimizer is not None:
            self.optimizer.param_groups[-1]["params"].extend(parameters)
            return
        self.optimizer = _made("optim", self.optim, parameters, torch.optim.Optimizer)
        if self._make_scheduler is not None:
            self.scheduler = _made("scheduler", self._make_scheduler, self.optimizer, LRScheduler)
            if self.scheduler.optimizer is not self.optimizer:
                raise ArgumentError(
                    "scheduler", "must return one of the optimizer it is called with, but it is of another"
                )
        if self._make_average is not None:
            self.average = _made("average", self._make_average, self.model, AveragedModel)

    def _drop_gradients(self) -> None:
        for parameter in self._gradient.parameters:
            parameter.grad = None

    def _accepts(self, loss: Tensor) -> bool:
        return self.nonfinite is None or self._is_finite(loss, "loss")

    def _update(self, loss: Tensor) -> None:
        """A step of the optimizer, with the gradient of all batches since the last."""
        if all(parameter.grad is None for parameter in self._gradient.parameters):
            return
        scaler, is_looked_at = self.scaler, self.nonfinite is not None and self.scaler is None
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        norm = self._clip() if self.clip_norm is not None or is_looked_at else None
        if scaler is not None:
            before = scaler.get_scale()
            scaler.step(self._optimizer)
            scaler.update()
            if scaler.get_scale() < before:  # the gradient was not finite, and no step taken
                return
        elif norm is not None and is_looked_at and not self._is_finite(norm, "norm of the gradient"):
            return
        else:
            self._optimizer.step()
        self._after_step(loss)

    def _clip(self) -> Tensor:
        """The norm of the gradient before clipping; the gradient is clipped."""
        parameters = [parameter for parameter in self._gradient.parameters if parameter.grad is not None]
        norm = ranks.total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.clip_norm is not None:
            ranks.clip(parameters, self.clip_norm, norm)
        return norm

    def _after_step(self, loss: Tensor) -> None:
        self.num_steps += 1
        if self.scheduler is not None:
            self.scheduler.step(*((float(loss),) if isinstance(self.scheduler, ReduceLROnPlateau) else ()))
        if self.average is not None and isinstance(self.model, nn.Module):
            self.average.update_parameters(self.model)

    def _is_finite(self, value: Tensor, name: str) -> bool:
        """Whether a number is finite; if not, raise, or prepare the warning that :meth:`step` gives at its end."""
        number = float(value)
        if math.isfinite(number):
            return True
        message = f"{name} is {number} at step {self._calls}{' (calls of step)' * (self.accumulate > 1)}"
        if self.nonfinite == "stop":
            raise FloatingPointError(f"{message}: no step was taken")
        self._skipped = f"{message}: skipped"
        return False

    # The step as one CUDA graph

    def _is_capturable(self, args: tuple, kwargs: dict) -> bool:
        """Whether every step does the same on the device, without reading a value from it."""
        return (
            self.accumulate == 1
            and self._batches == 0
            and self.scaler is None
            and self.nonfinite is None
            and ranks.count() == 1
            and not kwargs
            and all(isinstance(arg, Tensor) and arg.is_cuda and not arg.requires_grad for arg in args)
        )

    def _whole_step(self, *args: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """A step without decisions in Python, to be captured; returns the loss and the gradients."""
        self._drop_gradients()
        loss = self._gradient.add(args, {}, self._accepts)
        if self.clip_norm is not None:
            self._clip()
        self._optimizer.step()
        return loss, [parameter.grad for parameter in self._gradient.parameters]

    def _replay(self, replayed: Replayed, args: tuple) -> Tensor:
        """The step by its CUDA graph; returns the loss."""
        loss, gradients = replayed(*args)
        for parameter, gradient in zip(self._gradient.parameters, gradients, strict=True):
            if parameter.grad is not gradient:  # but of a step with other arguments, say
                parameter.grad = gradient
        loss = loss.clone()
        self._after_step(loss)
        return loss

    # The state

    def state_dict(self) -> dict[str, Any]:
        """The whole state of a run: weights and buffers, average, optimizer, scheduler, scaler, counts.

        The state of the random number generators is not included; :mod:`pyrodiff.checkpoints` saves that too.

        Returns:
            Tensors, numbers and strings, in dicts and lists. Tensors are not copied.

        Raises:
            ValueError: If no step was taken yet, accumulated gradients wait for an optimizer step, or parameters are
                sharded (torch has ``torch.distributed.checkpoint`` for these).
        """
        self._refuse_averages()
        if self._state is not None:
            return self._state
        if self.optimizer is None:
            raise ArgumentError("svi", "must have taken a step to have a state, but there was none yet")
        if self._batches:
            waiting = f"{self._batches} of {self.accumulate} are accumulated"
            raise ArgumentError("svi", f"must have taken a step with all gradients, but {waiting}")
        self._refuse_shards()
        state = self._as_it_is()
        if "" in state["names"]:
            raise ArgumentError("parameters", "must stay in the programs to be saved, but one that is learned is gone")
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume a run from its state, exactly as it would have continued: on a CPU bit for bit, unless compiled.

        The programs, and what ``optim``, ``scheduler`` and ``average`` make, must be of the same kinds. If a program
        shows parameters only when it runs, the state is loaded at the next step or loss. Attributes of a program that
        are not tensors are not in the state: make them buffers.

        Arguments:
            state: What :meth:`state_dict` returned; it is copied.

        Raises:
            ValueError: If the state is of other programs, another schedule or another optimizer, or parameters are
                sharded; nothing is loaded. On a step, if it turns out only then that the programs are others.
        """
        self._refuse_averages()
        missing = _PARTS - state.keys() if isinstance(state, dict) else _PARTS
        if missing:
            raise ArgumentError(
                "state",
                f"must be what state_dict() returned, but it is a {type(state).__name__} without {min(missing)!r}",
            )
        self._refuse_shards()
        roots, names = self._programs.roots(), self._programs.names().values()
        is_lazy = any(map(_is_lazy, roots.values()))
        if not is_lazy:
            _refuse_other_modules(_of_modules({name: roots[name] for name in roots if "called" not in name}), state)
        state = copy.deepcopy(state)
        if not is_lazy and roots.keys() == state["modules"].keys() and set(state["names"]) <= set(names):
            self._gradient.register({})
            self._resume(state)
        else:
            self._state = state

    def _as_it_is(self) -> dict[str, Any]:
        """The state, whether or not it can be resumed from."""
        programs, found = self._programs, self._programs.names()
        keepers = {name: getattr(self, name) for name in _KEEPERS}
        drawn = [drawing.share and [drawing.share.key, int(drawing.share.drawn)] for drawing in programs.drawings()]
        return {
            **_of_modules(programs.roots()),
            "stored": {name: tensor.detach() for name, tensor in programs.stored().items()},
            "names": [found.get(parameter, "") for parameter in self._gradient.parameters],
            "groups": [[found.get(p, "") for p in group["params"]] for group in self._optimizer.param_groups],
            "shares": drawn,  # with several ranks, the shared draws of times: a key and a counter
            "counts": {"num_steps": self.num_steps, "calls": self._calls},
            **{name: [_kind(kept), kept.state_dict()] for name, kept in keepers.items() if kept is not None},
        }

    def _resume(self, state: dict[str, Any]) -> None:
        """Load a state, now that all parameters are known."""
        _refuse_other(self._as_it_is(), state)
        self._state, programs = None, self._programs
        for name, module in programs.roots().items():
            module.load_state_dict(state["modules"][name])
        _put(programs.stored(), state["stored"])
        for name in _KEEPERS:
            if name in state:
                kept, saved = getattr(self, name), state[name][1]
                adapts = name in ("optimizer", "scheduler")
                kept.load_state_dict(_adapted(saved, kept.state_dict()) if adapts else saved)
        for drawing, share in zip(programs.drawings(), state["shares"], strict=True):
            if drawing.share is not None and share is not None:
                drawing.share.key = share[0]
                drawing.share.drawn.fill_(share[1])
        self.num_steps, self._calls = state["counts"]["num_steps"], state["counts"]["calls"]
        self._batches = 0

    def _refuse_shards(self) -> None:
        parameters = [p for module in self._programs.roots().values() for p in module.parameters()]
        if any(ranks.is_sharded(parameter) for parameter in (*parameters, *self._gradient.parameters)):
            raise ArgumentError("parameters", "must not be sharded: torch.distributed.checkpoint saves and loads those")


_EXAMPLES = {
    "optim": "lambda parameters: torch.optim.Adam(parameters)",
    "scheduler": "lambda optimizer: CosineAnnealingLR(optimizer, 1000)",
    "average": "lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))",
}


def _check_callables(model: object, guide: object, optim: object, scheduler: object, average: object) -> None:
    for name, program in (("model", model), ("guide", guide)):
        if isinstance(program, Diffusion | OneStep):
            raise ArgumentError(name, f"must be a program, but it is a {type(program).__name__}: give its .{name}")
        if not callable(program):
            raise ArgumentError(name, f"must be a callable, but it is {arguments.described(program)}")
    for name, make in (("optim", optim), ("scheduler", scheduler), ("average", average)):
        missing = make is None and name != "optim"
        if not missing and (not callable(make) or isinstance(make, nn.Module)):
            raise ArgumentError(
                name, f"must be a callable, {_EXAMPLES[name]} say, but it is {arguments.described(make)}"
            )


def _made(name: str, make: Callable, given: object, kind: type) -> Any:
    made = make(given)
    if not isinstance(made, kind):
        hint = f"as {_EXAMPLES[name]} does" + ", and no pyro.optim" * (name == "optim")
        raise ArgumentError(
            name,
            f"must return a {kind.__module__}.{kind.__name__}, {hint}, but it returned {arguments.described(made)}",
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ArgumentError(
            "optim",
            "must return an optimizer that takes one gradient per step, such as torch.optim.Adam, but it "
            "returned LBFGS, which evaluates the loss several times: call its step(closure) with "
            "loss.differentiable_loss(model, guide, x) yourself",
        )
    return made


_KEEPERS = ("optimizer", "scheduler", "average", "scaler")  # attributes with a state_dict of their own
_PARTS = {"modules", "stored", "names", "groups", "schedules", "shares", "counts", "optimizer"}


def _adapted(saved: Any, own: Any) -> Any:
    """Saved settings as this machine has them: the way an optimizer computes, and rates as numbers or on a device."""
    if isinstance(saved, dict) and isinstance(own, dict):
        ways = [name for name in ("capturable", "foreach", "fused") if name in saved and name in own]
        adapted = copy.copy(saved)  # of its class: a Counter of milestones, say
        for name, value in saved.items():
            adapted[name] = _adapted(value, own.get(name))
        for name in ways:
            adapted[name] = own[name]
        return adapted
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        return [_adapted(value, other) for value, other in zip(saved, own, strict=True)]
    if isinstance(own, Tensor) and isinstance(saved, Tensor | float | int):
        return torch.as_tensor(saved, dtype=own.dtype, device=own.device)
    return float(saved) if isinstance(own, float) and isinstance(saved, Tensor) else saved


def _kind(kept: object) -> str:
    """The name of a class in a state; averages of all classes are alike in what they keep."""
    return "AveragedModel" if isinstance(kept, AveragedModel) else type(kept).__name__


def _is_lazy(module: nn.Module) -> bool:
    """Whether a module is built only when it first runs: one of Pyro's automatic guides, or a lazy layer of torch."""
    return any(
        getattr(part, "prototype_trace", part) is None
        or (isinstance(part, LazyModuleMixin) and part.has_uninitialized_params())
        for part in module.modules()
    )


def _of_modules(roots: dict[str, nn.Module]) -> dict[str, Any]:
    """The part of a state for these modules, and signal and noise of fixed schedules, each with shape (2, T + 1)."""
    found = {f"{root}.{path}": part for root, module in roots.items() for path, part in module.named_modules()}
    schedules = {
        name: part.scales(torch.arange(part.num_steps + 1, device=part.device))
        for name, part in found.items()
        if isinstance(part, Schedule) and not list(part.parameters())
    }
    return {"modules": {name: module.state_dict() for name, module in roots.items()}, "schedules": schedules}


def _refuse_other(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse the state of other programs, before any of it is loaded."""
    _refuse_other_names("parameters", ours["names"], theirs["names"])
    _refuse_other_modules(ours, theirs)
    _refuse_other_tensors("pyro.param", ours["stored"], theirs["stored"])
    for name in _KEEPERS:
        here, there = (state.get(name, [None])[0] for state in (ours, theirs))
        if here != there:
            raise ArgumentError("state", f"must be one with the {name} {here}, but it is with {there}")
    if "average" in ours:
        _refuse_other_tensors("average", ours["average"][1], theirs["average"][1])
    here, there = len(ours["groups"]), len(theirs["groups"])
    if here != there:
        raise ArgumentError("state", f"must be one of the optimizer's {here} groups of parameters, but it has {there}")
    for groups in zip(ours["groups"], theirs["groups"], strict=True):
        _refuse_other_names("parameters in a group of the optimizer", *groups)
    if len(ours["shares"]) != len(theirs["shares"]):
        raise ArgumentError("state", "must be one of as many drawings, but it is not")


def _refuse_other_modules(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse the state of another schedule, or of another architecture."""
    for name, here in ours["schedules"].items():
        there = theirs["schedules"].get(name, here)
        if here.shape != there.shape or not torch.allclose(here.cpu(), there.cpu(), rtol=1e-9, atol=0):
            raise ArgumentError("state", f"must be one of the same noise schedule, but {name} is another there")
    for name, tensors in ours["modules"].items():
        _refuse_other_tensors(name, tensors, theirs["modules"].get(name, {}))


def _refuse_other_tensors(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    def described(tensors: dict[str, Any], key: str) -> str:
        part = tensors.get(key, "not there")
        return arguments.described(part) if isinstance(part, Tensor) else part if key not in tensors else "no tensor"

    for key in [*ours, *theirs]:
        here, there = described(ours, key), described(theirs, key)
        if here != there:
            raise ArgumentError(
                "state",
                f"must be one of the same architecture, but {name}.{key} is {there} in it, and {here} in the program",
            )


def _refuse_other_names(what: str, ours: list[str], theirs: list[str]) -> None:
    if ours == theirs:
        return
    pairs = ((theirs, ours, "there"), (ours, theirs, "here"))
    alone = [f"{name} is {where} alone" for a, b, where in pairs for name in [name for name in a if name not in b][:1]]
    raise ArgumentError(
        "state",
        f"must be one of the same {what} in the same order, but {' and '.join(alone) or 'the order is another'}",
    )


def _put(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def exponential_average(decay: float = 0.999) -> Callable[[nn.Module], AveragedModel]:
    r"""An exponential moving average of the weights, with a warm-up of the decay: an ``average`` for :class:`SVI`.

    .. math:: \bar\theta \leftarrow d_n \bar\theta + (1 - d_n) \theta, \qquad
        d_n = \min\left(d, \frac{1 + n}{10 + n}\right) \text{ after step } n + 1, \qquad
        \bar\theta = \theta \text{ after the first}

    Unlike torch's own averages, it does not wait for the device at each step.

    Arguments:
        decay: :math:`d`, in [0, 1): the average is over about the last 1 / (1 - d) steps.

    Returns:
        A function that makes such an average of a module.

    Raises:
        ValueError: If ``decay`` lies outside [0, 1).

    Example:
        >>> average = pyrodiff.exponential_average(0.9)(torch.nn.Linear(2, 1))
        >>> int(average.n_averaged)
        0
    """
    decay = arguments.probability("decay", decay)
    return lambda model: _ExponentialAverage(checks.instance("model", model, nn.Module), decay)


class _ExponentialAverage(AveragedModel):
    """torch's average, without its copy of a number to the device at every step, for which the step would wait."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        number = int(self.n_averaged)  # on the CPU
        means: list[Tensor] = []
        weights: list[Tensor] = []
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(self.module.parameters(), model.parameters(), strict=True)
        for mean, weight in pairs:
            if number > 0 and (mean.is_floating_point() or mean.is_complex()):
                means.append(mean)
                weights.append(weight)
            else:  # integers have no average
                mean.copy_(weight)
        if means:
            torch._foreach_lerp_(means, weights, 1 - min(self.decay, (1 + number) / (10 + number)))
        for held, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            held.copy_(buffer)
        self.n_averaged += 1
