"""An accelerator that computes on the CPU: its tensors have values, and cannot be mixed with those of the CPU.

It stands in for a GPU. A tensor there holds one of the CPU, on which its operations are done, so that what comes out is
what the CPU gives; but an operation on tensors of both is an error, as on a GPU. Torch's meta device has no values, and
cannot show what happens after the first that is read.

Torch registers a device for the life of a process: use it in one that ends.
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
COPIES = {aten.copy_, aten._to_copy}  # from one place to another
INDEXED = {aten.index, aten.index_put, aten.index_put_}  # by a list of tensors that may be on the CPU
ASKED = {  # of a tensor there, which may have changed its shape in place
    aten.sym_size.default: torch.Tensor.size,
    aten.size.default: torch.Tensor.size,
    aten.sym_stride.default: torch.Tensor.stride,
    aten.stride.default: torch.Tensor.stride,
    aten.dim.default: torch.Tensor.dim,
    aten.numel.default: torch.Tensor.numel,
    aten.sym_numel.default: torch.Tensor.numel,
    aten.sym_storage_offset.default: torch.Tensor.storage_offset,
    aten.storage_offset.default: torch.Tensor.storage_offset,
    aten.is_contiguous.default: torch.Tensor.is_contiguous,
    aten.is_contiguous.memory_format: lambda x, layout: x.is_contiguous(memory_format=layout),
    aten.is_strides_like_format.default: lambda x, layout: False,
    aten.is_non_overlapping_and_dense.default: lambda x: True,
}


class There(torch.Tensor):
    """A tensor of the accelerator."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        layout["dispatch_sizes_strides_policy"] = "sizes"  # torch asks below, by ASKED
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self):
        return f"There({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):  # by which a bound tells a view from a result
        return self.held.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in ASKED:
            return ASKED[func](args[0].held, *args[1:])
        if torch.is_inference_mode_enabled():  # operations that consist of others come as they are called
            found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return computed(func, args, kwargs or {})


def tensors_in(values):
    """The tensors that an operation takes or returns, alone or in lists: many times as fast as torch's pytree."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def computed(func, args, kwargs):
    """An operation, done on what the tensors hold; there, if one of them is there or the device is asked for."""
    packet, device = func.overloadpacket, kwargs.get("device")
    wrappers = {id(one.held): one for one in tensors_in((*args, *kwargs.values())) if isinstance(one, There)}
    if wrappers and packet not in COPIES:
        together = args if packet not in INDEXED else [args[0], *args[2:]]  # without the indices
        if any(one.dim() > 0 and not isinstance(one, There) for one in tensors_in((*together, *kwargs.values()))):
            raise RuntimeError(f"Expected all tensors to be on the same device, but some are on the CPU: {func}")
    if device is None:
        is_there = isinstance(args[0], There) if packet is aten.copy_ else bool(wrappers)
    else:
        is_there, kwargs = torch.device(device).type == NAME, {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda one: one.held if isinstance(one, There) else one, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad():  # else torch could not note the versions of views
        found = func(*args, **kwargs)
        return tree_map(functools.partial(_put, wrappers), found) if is_there else found


def _put(wrappers, found):
    """A tensor there that holds what was found: the one that was given, if it held this, as it was changed in place."""
    if not isinstance(found, torch.Tensor):
        return found
    if found.dtype == torch.float64 and not precision.holds_float64(torch.device(NAME)):
        raise TypeError("the accelerator has no float64")
    return wrappers[id(found)] if id(found) in wrappers else There(found)


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
    """What torch has under the name of the device: as Apple's, without a context of a device."""

    get_rng_state = staticmethod(lambda device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.default_generator.manual_seed)


class MadeThere(TorchFunctionMode):
    """What makes tensors there makes them on the CPU, and copies them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = args[0].device if func is torch.Tensor.new_tensor else kwargs.get("device")
        if device is None or torch.device(device).type != NAME or func is torch.Tensor.to:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(device)


def begin():
    """Give this process the accelerator. Autocast does nothing there.

    The draws of a bound are in blocks of the size that they have on a CPU, so that they are the same. Checkpoints hold
    tensors of the CPU.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    kernels = torch.library.Library("_", "IMPL")
    kernels.fallback(lambda func, *args, **kwargs: computed(func, args, kwargs), "PrivateUse1")
    kernels.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    kept.append(kernels)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a tensor there cannot be given other data
    torch.Generator = Generator
    bounds._ROWS_ELSEWHERE, bounds._NUMBERS_ELSEWHERE = bounds._ROWS, bounds._NUMBERS
    plain = checkpoints._plain
    checkpoints._plain = lambda name, value: plain(name, value.detach().cpu() if isinstance(value, There) else value)
    MadeThere().__enter__()


kept = []  # what torch forgets with its last reference
