"""Several processes at one task, on torch.distributed: who one is, what all agree on, what all have together.

A process that was started alone is the only one of its kind: then nothing here does anything. Under ``torchrun`` a
script calls ``torch.distributed.init_process_group()``, and is one of many.
"""

from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor

__all__ = ["agree", "count", "is_sharded", "number", "set_apart", "together"]


def count() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _are_many() else 1


def number() -> int:
    """The number of this one, from 0 on."""
    return torch.distributed.get_rank() if _are_many() else 0


def _are_many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def agree(tensors: Iterable[Tensor]) -> None:
    """Give all processes the tensors of the first, in place. Those that are sharded over processes are left alone.

    Arguments:
        tensors: As many in each process, of the same shapes.
    """
    if count() > 1:
        for tensor in tensors:
            if not is_sharded(tensor):
                with torch.no_grad():
                    whole = tensor.detach().contiguous()
                    torch.distributed.broadcast(whole, 0)
                    tensor.copy_(whole)


def together(tensors: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over all processes: one message for each dtype.

    Arguments:
        tensors: As many in each process, of the same shapes.
    """
    if count() == 1 or not tensors:
        return tensors
    sums: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen])
        torch.distributed.all_reduce(flat)
        for i, part in zip(chosen, flat.split([tensors[i].numel() for i in chosen]), strict=True):
            sums[i] = part.view(tensors[i].shape)
    return sums


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it only, as ``fully_shard`` has it.

    Arguments:
        tensor: The tensor.
    """
    return hasattr(tensor, "full_tensor")


def set_apart(device: torch.device) -> int:
    """Let the random draws of this process be others than those of the rest; a number that all know is returned.

    Processes that were seeded alike would draw the same noise, and be worth one. Those whose source is another already
    keep theirs.

    Arguments:
        device: Where tensors live that processes exchange.
    """
    if count() == 1:
        return 0
    next_draw = int(torch.randint(2**31 - 1, (), generator=_copy()))
    all_draws = torch.zeros(count(), dtype=torch.long, device=device)
    all_draws[number()] = next_draw
    torch.distributed.all_reduce(all_draws)
    draws = all_draws.tolist()
    if draws.index(next_draw) < number():  # an earlier one has this source
        torch.manual_seed(next_draw * count() + number())
    return draws[0]


def _copy() -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator
