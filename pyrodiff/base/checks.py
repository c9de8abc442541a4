"""Checks of arguments: each raises a ValueError that names the argument and its value where it cannot be that.

Objects (a schedule, a decoder) check their arguments when they are made. What is called at every step, kernels and
programs, checks them only while Pyro's own validation is on (``pyro.enable_validation``). Entry points (:func:`bound`,
samplers, the first step of :class:`SVI` for each shape) turn it on for what they are given.
"""

import inspect
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from . import arguments
from .arguments import ArgumentError
from .precision import default_home, home

__all__: list[str] = []

Kind = TypeVar("Kind")


def validating() -> bool:
    """Whether Pyro validates, so that what is called at every step is checked."""
    return is_validation_enabled()


def numbers(name: str, value: object) -> Tensor:
    """Fixed real numbers (no gradient), as a float64 copy on their own device."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ArgumentError(
            name,
            f"must be fixed numbers, but they require a gradient, and nothing here would learn them: give "
            f"{name}.detach(), or write a module of your own with parameters",
        )
    try:
        if isinstance(value, list | tuple):
            value = [arguments.plain(one) for one in value]
        given = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        if given.dtype.is_complex or given.dtype == torch.bool:  # a cast would make other numbers
            raise ArgumentError(name, f"must be real numbers, but the dtype is {given.dtype}")
        if given.numel() == 0:
            shape = tuple(given.shape)
            raise ArgumentError(name, f"must be a sequence of at least one number, but its shape is {shape}")
        if given.layout != torch.strided:
            raise ArgumentError(name, f"must be a dense tensor, but it is {given.layout}: give {name}.to_dense()")
        if isinstance(value, Tensor):
            return value.detach().to(home(value.device)).to(torch.float64, copy=True)
        return torch.tensor(value, dtype=torch.float64, device=default_home())
    except ArgumentError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(name, f"must be numbers, but it is {arguments.described(value)}") from error


def event_shape(value: Sequence[int]) -> torch.Size:
    """The shape of one datum, a sequence of ints of at least 1."""
    is_ordered = isinstance(value, Sequence | Tensor | np.ndarray) and not isinstance(value, str | bytes)
    try:
        found = [arguments.plain(n) for n in value] if is_ordered else None
    except TypeError:  # a tensor without dimensions
        found = None
    if found is None or not all(arguments.is_int(n) and 1 <= n < 2**63 for n in found):
        raise ArgumentError(
            "event_shape", f"must be a sequence of ints of at least 1, but it is {arguments.described(value)}"
        )
    return torch.Size(map(int, found))


def increasing(name: str, value: Any, high: int) -> tuple[int, ...]:
    """Increasing ints in 1..high, at least one."""
    try:
        found = tuple(value.tolist() if isinstance(value, Tensor) else value)
    except (TypeError, RuntimeError):  # no iterable, or without values to read
        found = ()
    is_ordered = not isinstance(value, Set | Mapping) and bool(found) and all(map(arguments.is_int, found))
    if not (is_ordered and all(a < b for a, b in pairwise((0, *found, high + 1)))):
        raise ArgumentError(name, f"must be increasing ints in 1..{high}, at least one, but they are {value!r}")
    return tuple(int(one) for one in found)


def returned(name: str, value: object, shape: torch.Size | tuple[int, ...], x_t: Tensor, or_else: str = "") -> None:
    """Check that what a module, a network say, returned for a state is a tensor of this shape, of floats for floats."""
    if isinstance(value, Tensor):
        is_number = value.is_floating_point() or not x_t.is_floating_point()
        if value.shape == shape and is_number:
            return
        got = str(tuple(value.shape)) if is_number else f"of dtype {value.dtype}, and no floats"
    else:
        got = repr(value) if arguments.is_number(value) or value is None else f"a {type(value).__name__}"
    raise ArgumentError(
        name,
        f"must return a tensor of shape {tuple(shape)} for input of shape {tuple(x_t.shape)}{or_else}, but it is {got}",
    )


def instance(name: str, value: object, kind: type[Kind]) -> Kind:
    """An instance of a class, as it is."""
    if not isinstance(value, kind):
        home = "pyrodiff" if kind.__module__.startswith("pyrodiff.") else kind.__module__
        raise ArgumentError(name, f"must be a {home}.{kind.__name__}, but it is {arguments.described(value)}")
    return value


def context(values: Sequence, size: int, device: torch.device, keyword: str = "") -> None:
    """Tensors on a device, each with a first dimension of the size of the data, or of 1."""
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            hint = (
                f": options are given by keyword, {keyword}={value!r} say"
                if keyword and arguments.is_number(value)
                else ""
            )
            hint = ": give torch.from_numpy of it" if isinstance(value, np.ndarray) else hint
            raise ArgumentError("context", f"must be tensors, but context[{i}] is {arguments.described(value)}{hint}")
        if value.dim() == 0 or value.shape[0] not in (1, size):
            raise ArgumentError(
                "context",
                f"must have a first dimension of {size}, as many as there are data, or of 1, but the shape of "
                f"context[{i}] is {tuple(value.shape)}",
            )
        if value.device != device:
            raise ArgumentError(
                "context", f"must be on the device of the data, {device}, but context[{i}] is on {value.device}"
            )


def takes_context(name: str, module: nn.Module, context: Sequence[Tensor], **options: bool) -> None:
    """Check, while Pyro validates, that a module's ``forward`` takes x_t, t, this context and these options."""
    if not validating():
        return
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # it has no signature to read
        return
    try:
        signature.bind("x_t", "t", *context, **options)
    except TypeError as error:
        if options and _binds(signature, context):
            raise ArgumentError(
                name,
                f"must return what a learned variance is made of, when it is called with variance=True, but it "
                f"is a {type(module).__name__}, called as {signature}: put DataPrediction(network, forward), say, "
                f"around a network of two outputs",
            ) from error
        given = f"{len(context)} tensor{'s' * (len(context) != 1)} of context"
        way = (
            "let its forward take them as (x_t, t, *context), or drop them: svi.step(x_0), bound(diffusion, x_0), or "
            "(x_0 for x_0, y in loader)"
            if context
            else "give its context after the data: svi.step(x_0, y), bound(diffusion, x_0, y), sampler(num_samples, y)"
        )
        raise ArgumentError(
            name,
            f"must take what it is called with, a state, a time and {given}, but it is a "
            f"{type(module).__name__}, called as {signature}: {way}",
        ) from error


def _binds(signature: inspect.Signature, context: Sequence[Tensor]) -> bool:
    try:
        signature.bind("x_t", "t", *context)
    except TypeError:
        return False
    return True


def same_process(name: str, module: object, forward: nn.Module) -> None:
    """Check that a module with an attribute ``forward_process`` was made for this one."""
    if getattr(module, "forward_process", forward) is not forward:
        raise ArgumentError(
            name,
            f"must be made for the same forward process, the very object {type(forward).__name__}, but it is a "
            f"{type(module).__name__} made for another",
        )


def data(x: object) -> None:
    """Data: floats of full precision, one datum for each index of the first dimension."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        raise ArgumentError(
            "x",
            f"must be a tensor of floats, one datum for each index of its first dimension, but it is "
            f"{arguments.described(x)}: give x.float(), or pyrodiff.from_levels(k, levels) of levels",
        )
    full_precision("x", x.dtype)


def full_precision(name: str, dtype: torch.dtype) -> None:
    """Check for a dtype that bounds can be computed in: half precision is for networks only, under autocast."""
    if torch.finfo(dtype).bits < 32:
        raise ArgumentError(
            name,
            f"must be float32 or float64, but the dtype is {dtype}: keep weights and data in float32 "
            f"(diffusion.float(), x_0.float()), and let networks compute in half precision by autocast, "
            f"SVI(..., autocast=torch.bfloat16) for training",
        )


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; assumed true of a meta tensor, which has no values."""
    return condition.is_meta or bool(condition.all())


def time(name: str, t: object, high: int, low: int = 0) -> None:
    """Check that a time lies in low..high: an int always, an integer tensor only while Pyro validates."""
    if isinstance(t, Tensor):
        if not validating():
            return
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ArgumentError(
                name, f"must be an int or an integer tensor in {low}..{high}, but it is a tensor of dtype {t.dtype}"
            )
        if not (t.is_meta or torch.equal(t.clamp(low, high), t)):
            raise ArgumentError(name, f"must lie in {low}..{high}, but it has values in {t.min()}..{t.max()}")
    elif not arguments.is_int(t):
        raise ArgumentError(
            name, f"must be an int or an integer tensor in {low}..{high}, but it is {arguments.described(t)}"
        )
    elif not low <= t <= high:
        raise ArgumentError(name, f"must lie in {low}..{high}, but it is {t}")


def state(name: str, x: object) -> None:
    """Check for a tensor of floats."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is {arguments.described(x)}"
        raise ArgumentError(name, f"must be a tensor with a floating dtype, but it {got}")


def step(name: str, x: Tensor, t: int | Tensor, s: int | Tensor | None, num_steps: int, first: int = 0) -> None:
    """Check, while Pyro validates, for a floating state and first <= s < t <= T, where s is t - 1 if None."""
    if not validating():
        return
    state(name, x)
    time("t", t, num_steps, low=1)
    s = t - 1 if s is None else s
    time("s", s, num_steps - 1)
    for name, one in (("t", t), ("s", s)):
        if isinstance(one, Tensor) and one.shape not in (torch.Size(), x.shape[: one.dim()]):
            raise ArgumentError(
                name,
                f"must be an int or have the batch shape {tuple(x.shape[: max(one.dim(), 1)])} of the state of "
                f"shape {tuple(x.shape)}, but its shape is {tuple(one.shape)}",
            )
    ordered = (s >= first) & (s < t)
    if not (holds(ordered) if isinstance(ordered, Tensor) else ordered):
        when, before = (f"in {one.min()}..{one.max()}" if isinstance(one, Tensor) else one for one in (t, s))
        raise ArgumentError("s", f"must satisfy {first} <= s < t <= {num_steps}, but t is {when} and s is {before}")
