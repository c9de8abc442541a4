"""Ranks, the processes of one run, on torch.distributed: which one this is, and what all agree on and share.

With a single process these are no-ops. Under ``torchrun`` a script calls
``torch.distributed.init_process_group()``, and is one of many.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed
from torch import Tensor, nn

from .randomness import copied_source

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = [
    "agree",
    "all_say",
    "clip",
    "count",
    "each",
    "is_sharded",
    "number",
    "set_apart",
    "shard_again",
    "together",
    "total_norm",
]


def count() -> int:
    """How many ranks there are."""
    return torch.distributed.get_world_size() if _are_many() else 1


def number() -> int:
    """The number of this one, from 0 on."""
    return torch.distributed.get_rank() if _are_many() else 0


def _are_many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def agree(tensors: Iterable[Tensor]) -> None:
    """Broadcast the tensors of rank 0 to all ranks, in place. Sharded tensors are left alone.

    Arguments:
        tensors: As many in each rank, of the same shapes.
    """
    if count() == 1:
        return
    different = {id(tensor): tensor for tensor in tensors if not is_sharded(tensor)}
    for alike in _alike([_once(tensor.detach()) for tensor in different.values()]):
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        torch.distributed.broadcast(flat, 0)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def all_say(yes: bool) -> bool:
    """Whether all ranks say yes; every rank has to call this.

    Arguments:
        yes: What this one says.
    """
    return all(each(yes))


def each(value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks.

    Arguments:
        value: The value of this rank, which can be pickled.
    """
    if count() == 1:
        return [value]
    values = [value] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def together(tensors: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over all ranks, in one all-reduce per dtype.

    Arguments:
        tensors: As many in each rank, of the same shapes.
    """
    if count() == 1:
        return tensors
    sums: dict[int, Tensor] = {}
    for alike in _alike(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            sums[id(tensor)] = part.view(tensor.shape)
    return [sums[id(tensor)] for tensor in tensors]


def _alike(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of one dtype and device, each of which fits into one message."""
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _once(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of ``expand``, which cannot be written to."""
    for dim, (step, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether each rank holds a part of it only, as ``fully_shard`` has it.

    Arguments:
        tensor: The tensor.
    """
    return hasattr(tensor, "full_tensor")


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all tensors together, sharded or not, with shape ().

    Arguments:
        tensors: At least one.
    """
    plain = [tensor for tensor in tensors if not is_sharded(tensor)]
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    norms = [nn.utils.get_total_norm(plain)] if plain else []
    if sharded:
        norm = nn.utils.get_total_norm(sharded)
        norms.append(norm.full_tensor() if is_sharded(norm) else norm)
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip(parameters: list[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients, sharded or not, down to a norm.

    Arguments:
        parameters: The parameters, each with a gradient.
        limit: The norm that they have at most.
        norm: The norm that they have.
    """
    nn.utils.clip_grads_with_norm_([p for p in parameters if not is_sharded(p)], limit, norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if is_sharded(gradient)]
    if parts:
        torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))


def shard_again(modules: Iterable[nn.Module]) -> None:
    """Free the parameters that ``fully_shard`` gathered for a forward pass, where no backward pass follows.

    Arguments:
        modules: The modules, sharded or not.
    """
    for module in modules if count() > 1 else ():
        if _shards(module):
            module.reshard()


def _shards(module: nn.Module) -> TypeGuard["FSDPModule"]:
    return hasattr(module, "set_reshard_after_forward")


def set_apart() -> int:
    """Give each rank its own seed, unless the ranks already differ; returns a number that all ranks know."""
    if count() == 1:
        return 0
    next_draw = int(torch.randint(2**31 - 1, (), generator=copied_source(), device="cpu"))
    draws = each(next_draw)
    if draws.index(next_draw) < number():  # an earlier rank has the same generator state
        torch.manual_seed(next_draw * count() + number())
    return draws[0]
