"""What every evaluation of a diffusion shares: evaluation mode, seed, batches, memory budget, progress bar."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ..base import arguments, checks, ranks
from ..base.arguments import ArgumentError
from ..base.randomness import copied_source, forked
from ..pair.diffusion import Diffusion
from ..pair.programs import check_law
from ..pair.terms import Recorder

__all__ = [
    "Batch",
    "DryRun",
    "batches",
    "bytes_per_row",
    "evaluating",
    "evaluation_mode",
    "expect",
    "guided",
    "dry_run",
    "progress_bar",
    "seeded",
    "validated",
]


@contextmanager
def evaluating(
    diffusion: Diffusion,
    generator: torch.Generator | int | None,
    agreed: bool = False,
    guide: Callable | None = None,
    given: tuple = (),
) -> Iterator[tuple[int, Tensor | None]]:
    """The context of an evaluation: evaluation mode, random weights drawn once, no validation, its own random
    generator.

    Afterwards each submodule has its own mode again, and torch's global generators their earlier state. The input is
    validated by :func:`batches` and :func:`dry_run` instead.

    Arguments:
        diffusion: The diffusion.
        generator: A seed; or a generator, from which a seed is drawn; or None, for torch's global generator.
        agreed: Whether all processes use the seed of the first.
        guide: The guide of random weights.
        given: What the guide is called with.

    Yields:
        The seed, not negative, and the KL of the random weights in nats, of shape (); None where there are none.

    Raises:
        ValueError: If ``generator`` is something else, or random weights and their guide do not go together.
    """
    checks.instance("diffusion", diffusion, Diffusion)
    draws, evaluated = seeded(generator, diffusion.model.device, agreed), diffusion.model.evaluated(guide, given)
    with draws as seed, evaluation_mode(diffusion), evaluated as cost, pyro.validation_enabled(False):
        yield seed, cost


def guided(x_0: Tensor | Iterable, context: tuple[Tensor, ...]) -> tuple:
    """The arguments of a guide of random weights: the data, if they are one tensor, and their context.

    Arguments:
        x_0: The data, or a loader.
        context: Their context.
    """
    return (x_0 if isinstance(x_0, Tensor) else None, *context)


@contextmanager
def seeded(generator: torch.Generator | int | None, device: torch.device, agreed: bool = False) -> Iterator[int]:
    """A context with its own random state, set by a seed; afterwards torch's global generators have their earlier
    state.

    Arguments:
        generator: A seed; or a generator, from which a seed is drawn; or None, for torch's global generator.
        device: The device that is drawn on, besides the CPU.
        agreed: Whether all ranks use the seed of the first.

    Yields:
        The seed, not negative.

    Raises:
        ValueError: If ``generator`` is something else.
    """
    source = copied_source()  # the global one advances only if nothing fails
    if generator is None:
        seed = int(torch.randint(2**63 - 1, (), generator=source, device="cpu"))
    elif isinstance(generator, torch.Generator):
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    elif arguments.is_int(generator) and -(2**63) <= int(generator) < 2**64:
        seed = int(generator)
    else:
        raise ArgumentError("generator", f"must be a torch.Generator, a seed or None, but it is {generator!r}")
    if agreed:
        of_first = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)
        ranks.agree([of_first])
        seed = int(of_first)
    with forked(seed, device):
        yield seed % 2**64
    if generator is None:
        torch.set_rng_state(source.get_state())


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A context with a module in evaluation mode; afterwards each submodule has its own mode again.

    Arguments:
        module: The module.
    """
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


@dataclass(frozen=True)
class Batch:
    """Data and the context of each.

    Arguments:
        x_0: The data, with shape (B, *event_shape).
        context: Tensors of B rows.
    """

    x_0: Tensor
    context: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.x_0)

    def rows(self, index: Tensor | slice) -> "Batch":
        """The data of these rows, and their context."""
        if isinstance(index, slice):
            return Batch(self.x_0[index], tuple(values[index] for values in self.context))
        return Batch(self.x_0.index_select(0, index), tuple(v.index_select(0, index) for v in self.context))

    def differentiable(self) -> "Batch":
        """The same, with tensors of ``torch.inference_mode``, which cannot be differentiated, copied."""
        x_0, *context = (v.clone() if v.is_inference() else v for v in (self.x_0, *self.context))
        return Batch(x_0, tuple(context))


def batches(
    diffusion: Diffusion, x_0: Tensor | Iterable, context: Sequence[Tensor] = (), keyword: str = ""
) -> Iterator[Batch]:
    """The data batch by batch, checked: a tensor is one batch, anything else is iterated over.

    Arguments:
        diffusion: The diffusion.
        x_0: Data with shape (B, *event_shape), or a loader of such batches or of tuples of one and its context, which
            are moved to the model's device.
        context: The context of a tensor of data: tensors of B rows, or of one for all.
        keyword: An option of the caller, named in the error if a number is given as context.

    Raises:
        ValueError: If a batch or its context cannot be that of the model, or there is no batch; if a context is given
            beside a loader.
    """
    if not _loads(x_0):
        yield _batch(diffusion, x_0, context, keyword)
        return
    if context:
        if not isinstance(context[0], Tensor):
            checks.context(context[:1], 1, diffusion.model.device, keyword)
        raise ArgumentError("context", "must come from the loader, which yields (x_0, y), but it is given beside one")
    number = -1
    for number, batch in enumerate(x_0):
        try:
            yield _batch(diffusion, *_loaded(batch, diffusion.model.device))
        except ValueError as error:
            raise arguments.amended(error, f"(in batch {number} of the loader)") from None
    if number < 0:
        raise ArgumentError("x_0", f"must have at least one batch, but this {type(x_0).__name__} is empty")


def _loads(x_0: object) -> bool:
    """Whether this is a loader of batches: not a tensor, nor a list of numbers."""
    first = x_0
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if arguments.is_number(first):
        return False
    return isinstance(x_0, Iterable) and not isinstance(x_0, Tensor | np.ndarray | str | bytes | dict)


def _loaded(batch: object, device: torch.device) -> tuple[Any, tuple]:
    """The data and the context of one item of a loader, on a device."""
    x_0, *context = batch if isinstance(batch, tuple | list) and len(batch) > 0 else (batch,)
    x_0, *context = (values.to(device) if isinstance(values, Tensor) else values for values in (x_0, *context))
    return x_0, tuple(context)


def _batch(diffusion: Diffusion, x_0: Any, context: Sequence, keyword: str = "") -> Batch:
    diffusion.model.check(x_0)
    checks.context(context, len(x_0), x_0.device, keyword)
    return Batch(x_0, tuple(values.expand(len(x_0), *values.shape[1:]) for values in context))


class DryRun(NamedTuple):
    """The result of a first, validated call of the kernels, for one datum.

    Arguments:
        rows: How many rows a batch of network calls has, so as to fit into the memory budget, and on a CPU into its
            cache.
        is_analytic: Whether the KL of the posterior and the reverse kernel is registered.
    """

    rows: int
    is_analytic: bool


def dry_run(memory_budget: int | None, diffusion: Diffusion, batch: Batch) -> DryRun:
    """Validate the kernels, and choose the size of batches of network calls.

    Arguments:
        memory_budget: The budget in bytes; if not given, 2^28, or on a GPU about an eighth of its memory.
        diffusion: The diffusion.
        batch: Some data.

    Raises:
        ValueError: If no row fits the budget, or it is not a positive int; if a part of the model returns no
            distribution, takes another context, or has Pyro sites of its own; if the last step is a discrete
            distribution, but neither decoder nor process has a number of levels.
    """
    one = batch.rows(slice(1))
    if memory_budget is None:
        memory_budget = _memory(one.x_0.device)
    memory_budget = arguments.positive_int("memory_budget", memory_budget)
    size, kernel, sites = _called(diffusion, one)
    if sites:
        raise ArgumentError(
            "diffusion",
            f"must have no Pyro sites of its own inside its parts to be evaluated outside of its programs, "
            f"but {sites[0]!r} is one: it would not be scored",
        )
    if size > memory_budget:
        raise ArgumentError(
            "memory_budget", f"must hold one datum, which takes {size} bytes here, but it is {memory_budget}"
        )
    cached = min(memory_budget, max(_CACHE, size)) if one.x_0.device.type == "cpu" else memory_budget
    return DryRun(max(1, cached // max(1, size)), _is_analytic(diffusion, one.x_0, kernel))


def _memory(device: torch.device) -> int:
    """The memory for a batch of network calls if nothing is said. In small batches a GPU would wait for Python."""
    if device.type != "cuda":
        return 2**28
    free, whole = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    most = min(whole // 8, free // 2)  # usually the eighth: flows and accounts draw batch by batch, the same each time
    return 2 ** max(28, most.bit_length() - 1)


_CACHE = 2**26  # bytes of intermediate results, few of which live at the same time


def bytes_per_row(diffusion: Diffusion, x_0: Tensor, *context: Tensor) -> int:
    """The memory of one datum in a network call and the kernels and decoder around it, in bytes; validated.

    It is the sum of all intermediate results, whether they live at the same time or not.

    Arguments:
        diffusion: The diffusion.
        x_0: One datum, with shape (1, *event_shape).
        *context: Its context.

    Raises:
        ValueError: As :func:`dry_run`.
    """
    return _called(diffusion, Batch(x_0, context))[0]


def _called(diffusion: Diffusion, one: Batch) -> tuple[int, Distribution, list[str]]:
    """The bytes that one datum takes, the reverse kernel, and the Pyro sites that were met."""
    x_0, q = one.x_0, diffusion.forward_process
    t = torch.full((1,), min(2, diffusion.num_steps), device=x_0.device)  # at t = 1 the kernel may be of another kind
    with torch.no_grad(), validated(x_0.device), Recorder() as heard, _Results() as results:
        diffusion.model.top(x_0.dtype, x_0.device)
        check_law(q.marginal(x_0, t), "forward.marginal", diffusion.event_shape)
        if diffusion.num_steps > 1:
            check_law(q.posterior(x_0, x_0, t), "forward.posterior", diffusion.event_shape)
        kernel = diffusion.model.kernel(x_0, t, *one.context)
        last = diffusion.model.decoded(kernel, x_0)
        last.log_prob(x_0)
    if diffusion.levels is None and _is_discrete(last):
        raise ArgumentError(
            "decoder",
            f"must say how many values a number may take, by an attribute levels, where its law is discrete, "
            f"but {type(diffusion.model.decoder).__name__} says nothing: p would be taken for a density",
        )
    return 16 * x_0.nbytes + results.nbytes, kernel, heard.sites


def _is_discrete(law: Distribution) -> bool:
    try:
        return law.support is not None and bool(law.support.is_discrete)
    except NotImplementedError:  # it has no support
        return False


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
    """A context in which Pyro validates, except on the meta device, where there are no values.

    Arguments:
        device: The device of the tensors.
    """
    return pyro.validation_enabled(device.type != "meta")


class _Results(TorchDispatchMode):
    """Counts the bytes that operations return, without views of their inputs."""

    nbytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports its compiler at the first operation, half a second
        return False

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        given = {_storage(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        results = func(*args, **kwargs)
        for tensor in _tensors((results,)):
            if _storage(tensor) not in given:
                self.nbytes += tensor.nbytes
        return results


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """The tensors that an operation takes or returns, alone or in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def expect(bar: tqdm, x_0: Tensor | Iterable, rows: int) -> None:
    """Set the bar's total at the first batch, if the loader has a length.

    Arguments:
        bar: The bar.
        x_0: The data, or a loader.
        rows: The rows that the batch takes.
    """
    if bar.total is None and isinstance(x_0, Sized):
        try:
            bar.total = rows * (1 if isinstance(x_0, Tensor) else len(x_0))
        except TypeError:  # it has no length
            bar.total = None


@contextmanager
def progress_bar(progress: bool, description: str) -> Iterator[tqdm]:
    """A progress bar over rows of network calls; shown only if asked for, and on a terminal.

    Arguments:
        progress: Whether to show it.
        description: The text before it.
    """
    arguments.one_of("progress", progress, (False, True))
    with tqdm(desc=description, unit="row", unit_scale=True, disable=None if progress else True) as bar:
        yield bar
        bar.total = bar.n  # a last batch may have been shorter
        bar.refresh()
