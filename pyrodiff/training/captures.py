"""Steps of training as CUDA graphs: when a step may be captured, and when a captured one is still the step.

A CUDA graph repeats kernels on the memory that they had. Whatever else a step would see, another tensor in the place of
one, a number or a hook, it does not; so before each step all that it reads is compared with what was captured.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_leaves

from ..running.compilation import Replayed
from .gradients import Gradient

__all__ = ["Captures"]


class Captures:
    """The captured steps of one SVI: one for each graph of the gradient, optimizer, norm and precision.

    Arguments:
        gradient: The gradient.
        step: A whole step without decisions in Python, the optimizer's included, called with tensors.
        is_on: Whether steps are captured at all.

    Attributes:
        is_on: Whether they still are.
    """

    def __init__(self, gradient: Gradient, step: Callable, is_on: bool) -> None:
        self.gradient, self.step, self.is_on = gradient, step, is_on
        self._replays: dict[Hashable, tuple[int, Replayed | None, list]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_replays": {}}  # a copy captures steps of its own

    def of(self, args: tuple[Tensor, ...], optimizer: Optimizer, clip_norm: float | None) -> Replayed | None:
        """The step as a CUDA graph, from the fourth compiled step on; None if there is none yet, or cannot be.

        Arguments:
            args: What the step is called with.
            optimizer: The optimizer.
            clip_norm: What the gradient's norm is clipped to.

        Raises:
            RuntimeError: If the step cannot be captured, which torch finds too late to go on without.
        """
        graph = self.gradient.graph_for(args) if self._can_hold(optimizer, args) else None
        if graph is None or graph.changes_arguments:
            return None
        held, settings = _read_by(optimizer)
        state = [*graph.inputs, *held]
        sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
        key = graph, optimizer, optimizer.step, sizes, clip_norm, _precision()
        runs, replayed, captured = self._replays.get(key, (0, None, settings))
        is_settled = len(captured) == len(settings) and all(map(_is_same, captured, settings))
        if not is_settled or len({*graph.draws_on, *(tensor.device for tensor in state)}) > 1:
            self.is_on = False
            self._replays.clear()
            why = "its tensors are on several devices" if is_settled else "the optimizer's settings change"
            warnings.warn(
                f"the step runs as a compiled graph, not as a CUDA graph: {why}; give lr as a tensor on the device, "
                "torch.tensor(1e-3, device=...), for a schedule to change it there",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        if replayed is not None and not replayed.fits(state):
            runs, replayed = 0, None  # a tensor was replaced, and others may be yet to be made
        if replayed is None and runs >= 3:
            replayed = self._captured(args, state)
        self._replays[key] = runs + 1, replayed, settings
        return replayed

    def _captured(self, args: tuple, state: list[Tensor]) -> Replayed:
        try:
            return Replayed(self.step, args, state)
        except RuntimeError as error:  # for good, as torch then draws no more on the device
            raise RuntimeError(
                "a step must not read values from the device, or move weights in memory, to be captured as a CUDA "
                "graph: let the optimizer have capturable=False for steps that are compiled and not captured "
                f"({str(error).splitlines()[0]})"
            ) from error

    def _can_hold(self, optimizer: Optimizer, args: tuple[Tensor, ...]) -> bool:
        """Whether the optimizer says that it can be captured, does nothing besides, and no argument is expanded."""
        groups = optimizer.param_groups
        return (
            all(group.get("capturable", False) for group in groups)
            and all(parameter in self.gradient.parameters for group in groups for parameter in group["params"])
            and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            and not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
            and not any(map(_is_expanded, args))
        )


def _is_expanded(tensor: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _read_by(optimizer: Optimizer) -> tuple[list[Tensor], list]:
    """What a step of an optimizer reads: tensors, and all else (numbers, mostly), each in a fixed order.

    That is its parameters, their state, the settings of its groups, and its own attributes, other than private ones.
    """
    attributes = [vars(optimizer)[name] for name in vars(optimizer) if not name.startswith("_") and name not in _KNOWN]
    values = [value for value in attributes if not callable(value)]
    for group in optimizer.param_groups:
        values += group["params"]
        values += [value for name, value in group.items() if name != "params"]
    for kept in optimizer.state.values():
        values += kept.values() if isinstance(kept, dict) else [kept]
    held: list[Tensor] = []
    others: list = []
    for value in values:
        if isinstance(value, Tensor):  # most are
            held.append(value)
        else:
            for leaf in tree_leaves(value):
                (held if isinstance(leaf, Tensor) else others).append(leaf)
    return held, others


_KNOWN = {"defaults", "state", "param_groups", "step"}  # attributes of every optimizer


def _precision() -> Hashable:
    """By which of torch's settings kernels are chosen that compute the same to another precision."""
    backends: Any = torch.backends  # Any, as torch declares not all of them
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    precisions = (one.fp32_precision for one in (backends, matmul, cudnn, cudnn.conv))
    sums = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    return *precisions, *sums, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()


def _is_same(ours: object, theirs: object) -> bool:
    plain = type(ours) is type(theirs) and isinstance(ours, int | float | complex | str)
    return ours is theirs or (plain and ours == theirs)
