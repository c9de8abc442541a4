"""What arguments may be: each check refuses anything else by a ValueError that names the argument and its value."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from numbers import Integral

import pyro
import torch
from torch import Tensor, nn

_trusting: ContextVar[bool] = ContextVar("trusting", default=False)
_blind: ContextVar[bool] = ContextVar("blind", default=False)


@contextmanager
def trusting(blind: bool | None = None) -> Iterator[None]:
    """Within, what was checked before is taken on trust: shapes, dtypes and values of states, times and data.

    Pyro and torch do not validate distributions meanwhile.

    Arguments:
        blind: Whether no value of a tensor may be read either, as while a program is traced into a graph; as before,
            if not given.
    """
    tokens = _trusting.set(True), _blind.set(_blind.get() if blind is None else blind)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        _trusting.reset(tokens[0])
        _blind.reset(tokens[1])


def trusted() -> bool:
    """Whether states, times and data are to be taken on trust."""
    return _trusting.get()


def blind() -> bool:
    """Whether no value of a tensor may be read, as while a program is traced."""
    return _blind.get()


def legible(x: Tensor) -> bool:
    """Whether values may be read: not while a program is traced, nor on an accelerator, which that would stall."""
    return x.device.type == "cpu" and not _blind.get()


def positive_int(name: str, value: object, *, even: bool = False) -> None:
    """An int of at least 1, even if so asked."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (even and value % 2):
        raise ValueError(f"{name} must be an int of at least 1{', even' * even}, but it is {value!r}")


def levels(value: object, name: str = "levels") -> None:
    """A number of levels, an int of at least 2."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(f"{name} must be an int of at least 2, but it is {value!r}")


def numbers(name: str, value: object) -> Tensor:
    """Numbers, as a copy in float64."""
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, but it is {value!r}") from error


def number(name: str, value: object, low: float, high: float) -> None:
    """A number strictly between two others."""
    if isinstance(value, bool) or not (isinstance(value, int | float) and low < value < high):
        raise ValueError(f"{name} must be a number in ({low}, {high}), but it is {value!r}")


def one_of(name: str, value: object, values: Sequence) -> None:
    """One of a few values."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in values):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, but it is {value!r}")


def probability(name: str, value: object) -> None:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value < 1):
        raise ValueError(f"{name} must be a number in [0, 1), but it is {value!r}")


def event_shape(value: Sequence[int]) -> torch.Size:
    """The shape of one datum, a sequence of ints of at least 1."""
    try:
        shape = torch.Size(value)
    except TypeError:
        shape = None
    if shape is None or any(size < 1 for size in shape):
        raise ValueError(f"event_shape must be a sequence of ints of at least 1, but it is {value!r}")
    return shape


def increasing(name: str, value: Sequence[int], high: int) -> tuple[int, ...]:
    """Increasing ints in 1..high, at least one."""
    try:
        numbers = tuple(value.tolist() if isinstance(value, Tensor) else value)
    except TypeError:
        numbers = ()
    rising = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers) and all(
        before < after for before, after in pairwise((0, *numbers, high + 1))
    )
    if not (numbers and rising):
        raise ValueError(f"{name} must be increasing ints in 1..{high}, at least one, but they are {value!r}")
    return tuple(int(number) for number in numbers)


def described(value: object) -> str:
    """What an argument is, in few words."""
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    large = isinstance(value, nn.Module) or hasattr(value, "__array__")
    return f"a {type(value).__name__}" if large else repr(value)


def instance(name: str, value: object, kind: type) -> None:
    """An instance of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__module__}.{kind.__name__}, but it is {described(value)}")


def same_process(name: str, module: nn.Module, forward: nn.Module) -> None:
    """A module made for this forward process, where it says for which."""
    if getattr(module, "forward_process", forward) is not forward:
        raise ValueError(
            f"{name} must be made for the same forward process, the very object {type(forward).__name__}, but it is a "
            f"{type(module).__name__} made for another"
        )


def integer(name: str, value: object, high: int, low: int = 0) -> None:
    """An int or an integer tensor; the bounds are for the message, and checked by others, who know how cheaply."""
    if isinstance(value, Tensor):
        got = f"a tensor of dtype {value.dtype}"
        fits = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    else:
        got, fits = repr(value), isinstance(value, Integral) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"{name} must be an int or an integer tensor in {low}..{high}, but it is {got}")


def holds(condition: bool | Tensor) -> bool:
    """Whether a condition holds everywhere; it is taken to where it is not to be read."""
    return (not legible(condition) or bool(condition.all())) if isinstance(condition, Tensor) else condition


def step(t: int | Tensor, num_steps: int) -> None:
    """The number of a step, in 1..T."""
    if trusted():
        return
    integer("t", t, num_steps, low=1)
    if not holds((t >= 1) & (t <= num_steps)):
        raise ValueError(f"t must lie in 1..{num_steps}, but it is {t}")
