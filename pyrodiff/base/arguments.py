"""The error that names an argument, and checks of plain arguments: numbers, strings, one of a few values.

Nothing here imports torch, so that the command can say what is wrong with an option at once.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = ["ArgumentError"]


class ArgumentError(ValueError):
    """An argument has a value that it cannot have.

    Arguments:
        argument: Its name in the signature of the function that was called.
        said: The rest of the message: "must be an int of at least 1, but it is 0"; if not given, ``argument`` holds
            both, the name first.

    Attributes:
        argument, said: As given. The message is both.

    Example:
        >>> import pyrodiff
        >>> try:
        ...     pyrodiff.LinearSchedule(0)
        ... except pyrodiff.ArgumentError as error:
        ...     print(error.argument, "|", error)
        num_steps | num_steps must be an int of at least 1, but it is 0
    """

    __module__ = "pyrodiff"

    def __init__(self, argument: str, said: str | None = None) -> None:
        if said is None:  # Pyro's traces re-raise an error as type(error)(message and shapes of the sites)
            argument, _, said = argument.partition("\nTrace Shapes:")[0].partition(" ")
        said = " ".join(said.split())  # one line, also where it shows a module
        super().__init__(argument, said)
        self.argument, self.said = argument, said

    def __str__(self) -> str:
        return f"{self.argument} {self.said}"


def amended(error: ValueError, words: str) -> ValueError:
    """The same error with words after its message."""
    if isinstance(error, ArgumentError):
        return ArgumentError(error.argument, f"{error.said} {words}")
    return ValueError(f"{error} {words}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether this is a whole number, Python's or NumPy's, and no bool."""
    value = plain(value)
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a real number, Python's or NumPy's, and no bool."""
    value = plain(value)
    return isinstance(value, Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """The number in an array, or a tensor, that has no dimensions and is not to be learned; all else as it is."""
    if isinstance(value, Real) or getattr(value, "ndim", None) != 0:
        return value
    is_hidden = getattr(value, "requires_grad", False) or getattr(value, "is_meta", False)
    return value.item() if hasattr(value, "item") and not is_hidden else value


def positive_int(name: str, value: object, *, even: bool = False) -> int:
    """Check for an int of at least 1, and for an even one if ``even``."""
    if not is_int(value) or value < 1 or (even and value % 2):
        raise ArgumentError(name, f"must be an int of at least 1{', even' * even}, but it is {described(value)}")
    if int(value) >= 2**63:
        raise ArgumentError(name, f"must be at most 2^63 - 1, but it is {value}")
    return int(value)


def levels(value: object, name: str = "levels") -> int:
    """A number of levels, an int of at least 2 that float64 can tell from its neighbours."""
    if not is_int(value) or value < 2:
        raise ArgumentError(name, f"must be an int of at least 2, but it is {described(value)}")
    if int(value) > 2**53:
        raise ArgumentError(name, f"must be at most 2^53, which float64 can tell apart, but it is {value}")
    return int(value)


def number(name: str, value: object, low: float, high: float) -> float:
    """A number strictly between two others."""
    if not (is_number(value) and low < value < high):
        raise ArgumentError(name, f"must be a number in ({low}, {high}), but it is {described(value)}")
    return float(value)


def probability(name: str, value: object) -> float:
    """A number in [0, 1)."""
    if not (is_number(value) and 0 <= value < 1):
        raise ArgumentError(name, f"must be a number in [0, 1), but it is {described(value)}")
    return float(value)


def one_of(name: str, value: object, values: Sequence) -> None:
    """One of a few values."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in values):
        raise ArgumentError(name, f"must be one of {', '.join(map(repr, values))}, but it is {described(value)}")


def text(name: str, value: object, *, empty: bool = False) -> None:
    """A string, not empty unless it may be."""
    if not isinstance(value, str) or not (value or empty):
        raise ArgumentError(name, f"must be a string{', not empty' * (not empty)}, but it is {described(value)}")


def described(value: Any) -> str:
    """What an argument is, in one line."""
    if isinstance(value, type):
        return repr(value)
    if hasattr(value, "requires_grad") and hasattr(value, "dtype"):  # a tensor, of whatever class
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    if hasattr(value, "state_dict") or (hasattr(value, "__array__") and not is_number(value)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 300 and "\n" not in text else f"a {type(value).__name__}"
