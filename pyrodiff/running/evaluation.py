"""What every evaluation of a diffusion shares: its mode and its seed, its data batch by batch, its memory, its bar."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..base import checks, ranks
from ..base.randomness import copied_source, seed_draws
from ..pair.diffusion import Diffusion
from ..pair.terms import Recorder

__all__ = ["Look", "batches", "bytes_per_row", "evaluating", "expect", "look", "progress_bar", "validated"]


@contextmanager
def evaluating(diffusion: Diffusion, generator: torch.Generator | int | None, agreed: bool = False) -> Iterator[int]:
    """Within: evaluation mode, random weights drawn once, no validation, and draws from a source of their own.

    Afterwards each submodule has its own mode again, and torch's global sources are where they were. What is given is
    validated by :func:`batches` and :func:`look`.

    Arguments:
        diffusion: The diffusion.
        generator: A seed; or a generator, from which one is drawn; or None, for torch's global source.
        agreed: Whether all processes draw alike, as the first does.

    Yields:
        The seed, not negative.

    Raises:
        ValueError: If ``generator`` is something else.
    """
    checks.instance("diffusion", diffusion, Diffusion)
    seeded = _seeded(generator, diffusion.model.device, agreed)
    with seeded as seed, _evaluation_mode(diffusion), diffusion.model.evaluated(), pyro.validation_enabled(False):
        yield seed


@contextmanager
def _seeded(generator: torch.Generator | int | None, device: torch.device, agreed: bool) -> Iterator[int]:
    source = copied_source()  # drawn from, once all went well
    if generator is None:
        seed = int(torch.randint(2**63 - 1, (), generator=source, device="cpu"))
    elif isinstance(generator, torch.Generator):
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    elif checks.is_int(generator) and -(2**63) <= generator < 2**64:
        seed = int(generator)
    else:
        raise ValueError(f"generator must be a torch.Generator, a seed or None, but it is {generator!r}")
    if agreed:
        of_first = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)
        ranks.agree([of_first])
        seed = int(of_first)
    on_cpu = device.type in ("cpu", "meta")
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        seed_draws(seed, device)
        yield seed % 2**64
    if generator is None:
        torch.set_rng_state(source.get_state())


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def batches(diffusion: Diffusion, x_0: Tensor | Iterable) -> Iterator[Tensor]:
    """The data batch by batch, checked: a tensor is one batch, anything else is iterated over.

    Arguments:
        diffusion: The diffusion.
        x_0: Data with shape (B, *event_shape), or a loader of such batches or of tuples that begin with one; those are
            moved to the model's device.

    Raises:
        ValueError: If a batch cannot be data of the model, or there is none.
    """
    if not _loads(x_0):
        _refuse_what_is_no_data(diffusion, x_0)
        yield x_0
        return
    number = -1
    for number, batch in enumerate(x_0):
        batch = batch[0] if isinstance(batch, tuple | list) and len(batch) > 0 else batch
        try:
            batch = batch.to(diffusion.model.device) if isinstance(batch, Tensor) else batch
            _refuse_what_is_no_data(diffusion, batch)
        except ValueError as error:
            raise ValueError(f"{error} (in batch {number} of the loader)") from None
        yield batch
    if number < 0:
        raise ValueError(f"x_0 must have at least one batch, but this {type(x_0).__name__} is empty")


def _loads(x_0: object) -> bool:
    """Whether this is a loader of batches: not a tensor, nor a list of numbers."""
    first = x_0
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if checks.is_number(first):
        return False
    return isinstance(x_0, Iterable) and not isinstance(x_0, Tensor | np.ndarray | str | bytes | dict)


def _refuse_what_is_no_data(diffusion: Diffusion, x_0: object) -> None:
    diffusion.model.check(x_0)


class Look(NamedTuple):
    """What a first, validated call of the kernels for one datum says.

    Arguments:
        rows: How many rows a batch of network calls has: as fit a memory budget, and on a CPU its cache.
        is_analytic: Whether the KL of the posterior and the reverse kernel is registered.
    """

    rows: int
    is_analytic: bool


def look(memory_budget: int, diffusion: Diffusion, x_0: Tensor) -> Look:
    """Validate the kernels, and say how network calls are batched.

    Arguments:
        memory_budget: The budget in bytes.
        diffusion: The diffusion.
        x_0: Data with shape (B, *event_shape).

    Raises:
        ValueError: If no row fits the budget, or it is not a positive int; if a part of the model returns no law, or
            has Pyro sites of its own.
    """
    memory_budget = checks.positive_int("memory_budget", memory_budget)
    size, kernel, sites = _called(diffusion, x_0[:1])
    if sites:
        raise ValueError(
            f"diffusion must have no Pyro sites of its own inside its parts to be evaluated outside of its programs, "
            f"but {sites[0]!r} is one: it would not be scored"
        )
    if size > memory_budget:
        raise ValueError(f"memory_budget must hold one datum, which takes {size} bytes here, but it is {memory_budget}")
    cached = min(memory_budget, max(_CACHE, size)) if x_0.device.type == "cpu" else memory_budget
    return Look(max(1, cached // max(1, size)), _is_analytic(diffusion, x_0[:1], kernel))


_CACHE = 2**26  # bytes of results on the way, few of which live at the same time


def bytes_per_row(diffusion: Diffusion, x_0: Tensor) -> int:
    """What one datum takes in a network call and in the kernels and the decoder around it, in bytes; validated.

    It is the sum of all results on the way, whether they live at the same time or not.

    Arguments:
        diffusion: The diffusion.
        x_0: One datum, with shape (1, *event_shape).
    """
    return _called(diffusion, x_0)[0]


def _called(diffusion: Diffusion, x_0: Tensor) -> tuple[int, Distribution, list[str]]:
    """The bytes that one datum takes, the reverse kernel, and the Pyro sites that it came upon."""
    t = torch.full((1,), min(2, diffusion.num_steps), device=x_0.device)  # at t = 1 the kernel may be of another kind
    with torch.no_grad(), validated(x_0.device), Recorder() as heard, _Results() as results:
        kernel = diffusion.model.kernel(x_0, t)
        diffusion.model.decoded(kernel, x_0).log_prob(x_0)
    return 16 * x_0.nbytes + results.nbytes, kernel, heard.sites


def _is_analytic(diffusion: Diffusion, x_0: Tensor, kernel: Distribution) -> bool:
    if diffusion.num_steps == 1:
        return True
    posterior = diffusion.forward_process.posterior(x_0, x_0, torch.full((1,), 2, device=x_0.device))
    try:
        kl_divergence(posterior, kernel)
    except NotImplementedError:
        return False
    return True


def validated(device: torch.device) -> AbstractContextManager:
    """Within, Pyro validates, where there are values to read: a meta tensor has none.

    Arguments:
        device: Where the tensors are.
    """
    return pyro.validation_enabled(device.type != "meta")


class _Results(TorchDispatchMode):
    """Counts the bytes of what operations return, but for views of what they were given."""

    nbytes = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.nbytes += leaf.nbytes
        return results


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def expect(bar: tqdm, x_0: Tensor | Iterable, batch: Tensor, rows: int) -> None:
    """Tell the bar, at the first batch, how many rows all data will take, where a loader says how many batches it has.

    Arguments:
        bar: The bar.
        x_0: The data, or a loader.
        batch: The first batch.
        rows: The rows that the batch takes.
    """
    if bar.total is None:
        try:
            bar.total = rows * (1 if isinstance(x_0, Tensor) else len(x_0))
        except TypeError:  # it does not know
            bar.total = None


@contextmanager
def progress_bar(progress: bool, description: str) -> Iterator[tqdm]:
    """A bar over rows of network calls; quiet unless asked for, and where there is no terminal.

    Arguments:
        progress: Whether it is asked for.
        description: What stands before it.
    """
    with tqdm(desc=description, unit="row", unit_scale=True, disable=None if progress else True) as bar:
        yield bar
        bar.total = bar.n  # a last batch may have been shorter
        bar.refresh()
