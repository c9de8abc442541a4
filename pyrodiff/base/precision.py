"""Float64 where exactness is the point: tables that stay float64, and coefficients that are cast at the last moment.

Not every accelerator has float64 (Apple's has none). What has to be float64 then stays on the CPU, where its
coefficients are computed, and only these, in the dtype of the state, are sent to the device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

__all__ = [
    "Float64Module",
    "coefficients",
    "costs_dtype",
    "default_home",
    "float64",
    "holds_float64",
    "home",
    "precisely",
]


def holds_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64.

    Arguments:
        device: The device.
    """
    return device.type != "mps"


def home(device: torch.device) -> torch.device:
    """Where the float64 numbers of a model on a device are kept: there, or on the CPU.

    Arguments:
        device: The device.
    """
    return device if holds_float64(device) else torch.device("cpu")


def default_home() -> torch.device:
    """The device for float64 numbers that are given none: torch's default device if it has float64, else the CPU."""
    return home(torch.get_default_device())


def float64(x: Tensor) -> Tensor:
    """The numbers in float64, on their device, or on the CPU if that has no float64.

    Arguments:
        x: A tensor of any dtype.
    """
    return x.to(home(x.device)).double()


def coefficients(values: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Coefficients of a state: in its dtype, on its device, and each broadcastable against it.

    Arguments:
        values: k coefficients in float64, with shape (k,) for one time or (k, *batch_shape) for a time per datum.
        x: The state, with shape (*batch_shape, *event_shape).
    """
    values = values.to(x.dtype)
    if values.device != x.device:
        values = values.to(x.device)
    if values.dim() > 1:
        values = values.reshape(values.shape + (1,) * (x.dim() + 1 - values.dim()))
    return values.unbind()


def costs_dtype(x_0: Tensor) -> torch.dtype:
    """The dtype of costs: that of the data, or torch's default where these are integers.

    Arguments:
        x_0: The data.
    """
    return x_0.dtype if x_0.is_floating_point() else torch.get_default_dtype()


def precisely() -> AbstractContextManager:
    """A context without autocast: networks may compute in a lower precision, but the terms of a bound may not.

    It is off from this call to the end of its ``with``.
    """
    stack = ExitStack()
    for kind in ("cpu", "cuda", "mps", "xpu"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


class Float64Module(nn.Module):
    """A module whose buffers keep their dtype, whatever dtype the module is cast to; they follow it to a device.

    Where the device has no float64 they stay on the CPU, so that a state_dict has them in full precision.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float64Module":
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = buffers
        for name, buffer in buffers.items():
            if buffer is not None:
                device = home(fn(torch.empty(0, device=buffer.device)).device)
                emptied = buffer.is_meta and device.type != "meta"  # by to_empty, after which a state_dict is loaded
                buffers[name] = torch.empty_like(buffer, device=device) if emptied else buffer.to(device)
        return self
