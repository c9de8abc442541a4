"""Stochastic variational inference: what a step of training needs, over one torch optimizer for all parameters."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from . import checks, processes
from .compilation import Replayed
from .diffusion import Diffusion, OneStep
from .elbo import DiffusionELBO
from .gradients import Gradient

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
            after each step of the optimizer (``ReduceLROnPlateau`` with the loss of the last batch).
        accumulate: The number of calls of :meth:`step` whose gradients are summed for one step of the optimizer.
        autocast: The dtype that networks compute in where that does no harm, ``torch.bfloat16`` or ``torch.float16``
            (whose gradients are then scaled); parameters, and all that is summed to a bound, stay as they are.
        average: Called once with the model, it returns a ``torch.optim.swa_utils.AveragedModel`` of it, which is
            updated after each step of the optimizer; see :meth:`averaged` and :meth:`adopt_average`.
        nonfinite: What to do where the loss, or the gradient, is infinite or NaN: "stop" raises, "skip" warns and takes
            no step with it (of accumulated batches, that one does not count). Either waits for the device at every
            step. If None, it is not looked at. A gradient that overflows float16 is the scaler's to skip.
        compile: Whether the loss and its gradient run as one graph, compiled at the second step with data of a shape;
            for :class:`DiffusionELBO` only.
        validate: Whether to validate and check at every step (True, which cannot be compiled) or at none (False), and
            not at the first of each shape.

    Attributes:
        optimizer, scheduler, average: What ``optim``, ``scheduler`` and ``average`` returned; None before the first
            step.
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
        _check_callables(model, guide, optim, scheduler, average)
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
        if compile and validate:
            raise ValueError("validate must not be True where compile is: a graph checks nothing")
        if compile and not isinstance(loss, DiffusionELBO):
            raise ValueError(
                f"loss must be a DiffusionELBO to be compiled, but it is {loss!r}: Pyro's own read numbers as they go"
            )
        if average is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module to be averaged, but it is {model!r}")
        self.model, self.guide, self.optim, self.loss, self.clip_norm = model, guide, optim, loss, clip_norm
        self.accumulate, self.autocast, self.nonfinite = accumulate, autocast, nonfinite
        self.validate = validate
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self.average: AveragedModel | None = None
        self.num_steps = 0
        self._make_scheduler, self._make_average = scheduler, average
        self._gradient = Gradient(model, guide, loss, self._learn, autocast, compile, validate)
        self._replays: dict[Callable, tuple[int, Replayed | None, list[dict]]] = {}
        self._captures, self._batches, self._calls, self._skipped = compile, 0, 0, ""
        self._is_averaged = False

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step; ``args`` and ``kwargs`` go to the model and the guide.

        Returns:
            The loss before the step, in nats summed over the batch, as a detached tensor with shape (), still on its
            device. Of several processes, the sum over their batches.
        """
        self._refuse_averages()
        self._calls += 1
        replayed = self._replayed(args) if self._is_capturable(args, kwargs) else None
        if replayed is not None:
            loss = replayed(*args)
            self._after_step(loss)
            return loss
        if self._batches == 0:
            self._gradient.forget()
        last = self._batches == self.accumulate - 1
        try:
            loss = self._gradient.add(args, kwargs, last, self._accepts)
        except BaseException:
            self._batches = 0  # a gradient that may be half there is not gone on with
            raise
        self._batches = (self._batches + 1) % self.accumulate
        if last:
            self._update(loss)
        if self._skipped:
            warnings.warn(self._skipped, RuntimeWarning, stacklevel=2)
            self._skipped = ""
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without a step, as :meth:`step` returns it."""
        return self._gradient.value(args, kwargs)

    @property
    def compile(self) -> bool:
        """Whether the loss and its gradient are to run as a graph; no longer where parameters prove to be sharded."""
        return self._gradient.compile

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss where ``autocast`` is ``torch.float16``; None otherwise, and before the first step."""
        return self._gradient.scaler

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the averaged weights (and buffers, where ``AveragedModel`` was told to use them).

        The guide keeps its own, but for what it shares with the model. No step may be taken meanwhile.

        Raises:
            ValueError: If there is no average, no step was taken yet, or the model has its averages already.
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
        """Let the model have the averaged weights for good; errors as of :meth:`averaged`."""
        _put(*self._averages_of_weights())

    def _refuse_averages(self) -> None:
        if self._is_averaged:
            raise ValueError(
                "averaged() must be left first: within, the model's weights are not those that are learned"
            )

    def _averages_of_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's tensors and their averages, by name."""
        self._refuse_averages()
        if self._make_average is None:
            raise ValueError("average must be given to SVI for the weights to be averaged, but it is None")
        if self.num_steps == 0:
            raise ValueError("the weights must have taken a step to be averaged, but there was none yet")
        ours, means = (dict(program.named_parameters()) for program in (self.model, self.average.module))
        if self.average.use_buffers:
            ours.update(self.model.named_buffers())
            means.update(self.average.module.named_buffers())
        return ours, means

    def _replayed(self, args: tuple[Tensor, ...]) -> Replayed | None:
        """On a GPU the whole step as one CUDA graph, from the fourth compiled one on; None where there is none yet."""
        graph = self._gradient.graph_for(args)
        if graph is None:
            return None
        settings = [
            {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}
            for group in self.optimizer.param_groups
        ]
        runs, replayed, captured = self._replays.get(graph, (0, None, settings))
        if captured != settings:
            self._captures = False
            message = (
                "the step runs as a compiled graph, not as a CUDA graph: the optimizer's settings change; give lr as a "
                "tensor on the device, torch.tensor(1e-3, device=...), for a schedule to change it there"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return None
        replayed = Replayed(self._whole_step, args) if replayed is None and runs >= 3 else replayed
        self._replays[graph] = runs + 1, replayed, settings
        return replayed

    def _whole_step(self, *args: Tensor) -> Tensor:
        """A step in which nothing is decided, as it is captured."""
        self._gradient.forget()
        loss = self._gradient.add(args, {})
        self._clip()
        self.optimizer.step()
        return loss

    def _is_capturable(self, args: tuple, kwargs: dict) -> bool:
        """Whether a step is the same for the device each time, and nobody waits for what comes of it."""
        return (
            self._captures
            and self.optimizer is not None
            and self.accumulate == 1
            and self.scaler is None
            and self.nonfinite is None
            and processes.count() == 1
            and not kwargs
            and all(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
            and all(group.get("capturable", False) for group in self.optimizer.param_groups)
        )

    def _update(self, loss: Tensor) -> None:
        """A step of the optimizer, with the gradient of all batches since the last."""
        if all(parameter.grad is None for parameter in self._gradient.parameters.values()):
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._clip()
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

    def _clip(self) -> Tensor | None:
        """The norm of the gradient, which is clipped to what it may be; None if nobody wants to know."""
        if self.clip_norm is None and (self.nonfinite is None or self.scaler is not None):
            return None
        parameters = [parameter for parameter in self._gradient.parameters.values() if parameter.grad is not None]
        norm = processes.total_norm([parameter.grad for parameter in parameters])
        if self.clip_norm is not None:
            processes.clip(parameters, self.clip_norm, norm)
        return norm

    def _after_step(self, loss: Tensor) -> None:
        self.num_steps += 1
        if self.scheduler is not None:
            self.scheduler.step(*((float(loss),) if isinstance(self.scheduler, ReduceLROnPlateau) else ()))
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _accepts(self, loss: Tensor) -> bool:
        return self._is_finite(loss, "loss")

    def _is_finite(self, value: Tensor, name: str) -> bool:
        """Whether a number is finite, as far as anybody wants to know."""
        if self.nonfinite is None or math.isfinite(float(value)):
            return True
        message = f"{name} is {float(value)} at step {self._calls}{' (calls of step)' * (self.accumulate > 1)}"
        if self.nonfinite == "stop":
            raise FloatingPointError(f"{message}: no step was taken")
        self._skipped = f"{message}: skipped"
        return False

    def _learn(self, parameters: list[Tensor]) -> None:
        """Hand parameters that were not there before to the optimizer."""
        if self.optimizer is not None:
            self.optimizer.param_groups[-1]["params"].extend(parameters)
            return
        self.optimizer = self._made("optim", self.optim, parameters, torch.optim.Optimizer)
        if self._make_scheduler is not None:
            self.scheduler = self._made("scheduler", self._make_scheduler, self.optimizer, LRScheduler)
            if self.scheduler.optimizer is not self.optimizer:
                raise ValueError("scheduler must return one of the optimizer it is called with, but it is of another")
        if self._make_average is not None:
            self.average = self._made("average", self._make_average, self.model, AveragedModel)

    @staticmethod
    def _made(name: str, make: Callable, given: object, kind: type) -> Any:
        made = make(given)
        if not isinstance(made, kind):
            hint = f"as {_EXAMPLES[name]} does" + ", and no pyro.optim" * (name == "optim")
            raise ValueError(
                f"{name} must return a {kind.__module__}.{kind.__name__}, {hint}, but it returned "
                f"{checks.described(made)}"
            )
        return made


_EXAMPLES = {
    "optim": "lambda parameters: torch.optim.Adam(parameters)",
    "scheduler": "lambda optimizer: CosineAnnealingLR(optimizer, 1000)",
    "average": "lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))",
}


def _check_callables(model: object, guide: object, optim: object, scheduler: object, average: object) -> None:
    for name, program in (("model", model), ("guide", guide)):
        if isinstance(program, Diffusion | OneStep):
            raise ValueError(f"{name} must be a program, but it is a {type(program).__name__}: give its .{name}")
        if not callable(program):
            raise ValueError(f"{name} must be a callable, but it is {checks.described(program)}")
    for name, make in (("optim", optim), ("scheduler", scheduler), ("average", average)):
        missing = make is None and name != "optim"
        if not missing and (not callable(make) or isinstance(make, nn.Module)):
            raise ValueError(f"{name} must be a callable, {_EXAMPLES[name]} say, but it is {checks.described(make)}")


def _put(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
