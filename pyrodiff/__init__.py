"""Diffusion models as pairs of Pyro programs, with a bound on the likelihood that is exact term by term."""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__version__ = "0.2.0"


# Importing torch and Pyro takes seconds. They come with the first name that is asked for, so that the command can say
# at once what is wrong with a line.


_RENAMED = {"dequantize": "from_levels", "quantize": "to_levels"}  # until version 0.3


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warn(f"pyrodiff.{name} is now {_RENAMED[name]}, and goes with version 0.3", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if not name.startswith("_") and _is_module(name):
        return import_module(f"{__name__}.{name}")
    if not name.startswith("_") or name == "__all__":
        api = import_module(f"{__name__}.api")
        globals().update({one: getattr(api, one) for one in api.__all__}, __all__=api.__all__)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(f"{__name__}.{name}") is not None


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(f"{__name__}.api").__all__})
