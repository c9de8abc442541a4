"""An accelerator that computes on the CPU: its tensors have values, and cannot be mixed with those of the CPU.

It stands in for a GPU. A tensor there holds one of the CPU, on which its operations are done, so that what comes out is
what the CPU gives; but an operation on tensors of both is an error, as on a GPU. Torch's meta device has no values, and
cannot show what happens after the first that is read.

Torch keeps what it is told of a device for the life of a process: use it in one that ends.
"""

import contextlib
import functools

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

from pyrodiff import checkpoints
from pyrodiff.base import precision
from pyrodiff.likelihood import bounds

NAME = "standin"
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # by what may be on the CPU


class There(torch.Tensor):
    """A tensor of the accelerator."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self):
        return f"There({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # operations that consist of others come as they are called
            found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return computed(func, args, kwargs or {})


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def computed(func, args, kwargs):
    """An operation, done on what the tensors hold; there, if one of them is or it is asked for."""
    given, packet, device = list(tensors_in((*args, *kwargs.values()))), func.overloadpacket, kwargs.get("device")
    there = {id(one.held): one for one in given if isinstance(one, There)}
    if there and packet not in COPIES:
        strangers = given[:1] if packet in INDEXED and isinstance(args[0], torch.Tensor) else given
        if any(one.dim() > 0 and not isinstance(one, There) for one in strangers):
            raise RuntimeError(f"Expected all tensors to be on the same device, but some are on the CPU: {func}")
    if device is None:
        is_there = isinstance(args[0], There) if packet is aten.copy_ else bool(there)
    else:
        is_there, kwargs = torch.device(device).type == NAME, {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda one: one.held if isinstance(one, There) else one, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad():
        found = func(*args, **kwargs)
        return tree_map(functools.partial(_put, there), found) if is_there else found


def _put(there, found):
    """A tensor there that holds what was found: the one that was given, if it held this."""
    if not isinstance(found, torch.Tensor):
        return found
    if found.dtype == torch.float64 and not precision.holds_float64(torch.device(NAME)):
        raise TypeError("the accelerator has no float64")
    return there[id(found)] if id(found) in there else There(found)


@contextlib.contextmanager
def without_float64():
    """A context in which the accelerator has no float64, as that of Apple has none."""
    holds = precision.holds_float64
    precision.holds_float64 = lambda device: device.type != NAME
    try:
        yield
    finally:
        precision.holds_float64 = holds


class Generator(torch.Generator):
    """A source of random numbers: those of the CPU, wherever they are drawn."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Module(backend_registration._DummyBackendModule):
    """What torch has under the name of the device."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.default_generator.manual_seed)
    device = staticmethod(lambda device: contextlib.nullcontext())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class Accelerator(TorchFunctionMode):
    """What makes tensors there makes them on the CPU, and copies them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = args[0].device if func is torch.Tensor.new_tensor else kwargs.get("device")
        if device is None or torch.device(device).type != NAME or func is torch.Tensor.to:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(device)


def begin():
    """Give this process the accelerator; its draws are in the blocks that those of a CPU are in."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    kept.append(torch.library.Library("_", "IMPL"))
    kept[0].fallback(lambda func, *args, **kwargs: computed(func, args, kwargs), "PrivateUse1")
    kept[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch.Generator = Generator
    bounds._ROWS_ELSEWHERE, bounds._NUMBERS_ELSEWHERE = bounds._ROWS, bounds._NUMBERS
    plain = checkpoints._plain
    checkpoints._plain = lambda name, value: plain(name, value.detach().cpu() if isinstance(value, There) else value)
    Accelerator().__enter__()


kept = []
