"""The global random number generators: torch's on every device, NumPy's and Python's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from . import arguments
from .arguments import ArgumentError

__all__ = ["copied_source", "forked", "generator_of", "kept_sources", "put_sources", "seed_draws", "seed_of", "sources"]


def sources() -> dict[str, Any]:
    """The state of every global generator, as tensors, numbers and strings."""
    of_numpy = np.random.get_state(legacy=False)
    words_of_numpy = torch.from_numpy(of_numpy["state"]["key"].astype(np.int64))
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "numpy": [
            of_numpy["bit_generator"],
            words_of_numpy,
            of_numpy["state"]["pos"],
            of_numpy["has_gauss"],
            of_numpy["gauss"],
        ],
        "python": [version, torch.tensor(words, device="cpu"), gauss],
    }


def put_sources(state: dict[str, Any]) -> None:
    """Set the state of every global generator; devices that the state or this machine lacks are left alone.

    Arguments:
        state: What :func:`sources` returned.
    """
    torch.set_rng_state(state["torch"])
    for device, source in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(source, device)
    kind, keys, *numpy_rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *numpy_rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))


@contextmanager
def kept_sources() -> Iterator[None]:
    """A context after which every global generator has its earlier state, as if nothing had been drawn."""
    state = sources()
    try:
        yield
    finally:
        put_sources(state)


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed torch's generators on the CPU and on one device, and on no other.

    Arguments:
        seed: The seed.
        device: The device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "meta"):
        module = getattr(torch, device.type)
        with module.device(device) if hasattr(module, "device") else nullcontext():  # torch.mps has none
            module.manual_seed(seed)


@contextmanager
def forked(seed: int, device: torch.device) -> Iterator[None]:
    """A context in which torch draws from a seed on the CPU and on one device, whose generators have their earlier
    state afterwards.

    Arguments:
        seed: The seed.
        device: The device.
    """
    on_cpu = device.type in ("cpu", "meta")
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        seed_draws(seed, device)
        yield


def copied_source() -> torch.Generator:
    """A copy of torch's global CPU generator: it draws the same numbers, without advancing the global one."""
    return torch.Generator("cpu").set_state(torch.get_rng_state())


def generator_of(value: torch.Generator | int | None, device: torch.device) -> torch.Generator | None:
    """The generator to draw from: the one given, a new one for a seed, None for None.

    Arguments:
        value: A generator, a seed, or None for torch's global generator.
        device: The device of a new one.

    Raises:
        ValueError: If it is something else.
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    if not arguments.is_int(value) or not -(2**63) <= int(value) < 2**64:
        raise ArgumentError("generator", f"must be a torch.Generator, a seed or None, but it is {value!r}")
    return torch.Generator(device).manual_seed(int(value))


def seed_of(seed: int, *key: int) -> int:
    """A seed derived from another and from what the draws are for: each piece of work has its own, on any rank.

    Arguments:
        seed: The seed, not negative.
        *key: Numbers that say what the draws are for, not negative.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
