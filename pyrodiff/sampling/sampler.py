r"""What every sampler shares: the loop from x_T to x_0, its seed, progress bar, compiled graph and intermediate states.

A sampler is one method, :meth:`Sampler.step`, a draw of :math:`x_{t-1}` given :math:`x_t`. Fewer steps are a shorter
chain, another :class:`Diffusion`, so that a step is always from t to t - 1. A multistep method defines
:meth:`Sampler.advance` too, which passes tensors from one step to the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..pair.diffusion import Diffusion, evenly_spaced
from ..running.compilation import Compiled, Composition
from ..running.evaluation import evaluating, progress_bar, validated

__all__ = ["Sampler", "drawn"]


class Sampler(ABC):
    """Draws data step by step, from x_T to x_0.

    A sampler of your own defines :meth:`step`, on the chain :attr:`chain`. Its denoiser, which returns the estimate of
    x_0 whatever the network predicts, is ``self.chain.reverse.denoiser(x_t, t, *context)``; signal and noise, in the
    dtype of x_t and broadcastable against it, are ``self.chain.forward_process.scales(x_t, t)``, of a Gaussian
    diffusion. With fewer steps, too, t and t - 1 are times of that chain. The last step, from x_1 to x_0, is
    :meth:`last`, by default a draw of the decoder: a deterministic sampler overrides it too. Modules are in evaluation
    mode meanwhile, and random weights (each ``PyroSample``) are drawn once per call, from their guide.

    Arguments:
        diffusion: The model.
        compile: Whether a step runs as one compiled graph, made at the first call with each number of samples. A model
            with random weights cannot be compiled.
        num_steps: The number of steps, at the times of :meth:`spaced`; if not given, all T, or the given times.
        times: The times of the steps, increasing ints in 1..T, instead of their number.
        guide: The guide of random weights, called as ``guide(None, *context)``; only if there are such.

    Attributes:
        order: The order of a solver of the probability flow: its error falls as this power of the step in the log
            signal-to-noise ratio. None for a stochastic sampler.
        diffusion: The model.
        chain: The diffusion whose steps are taken: the model, or its chain of fewer steps.

    Raises:
        ValueError: If an argument is of another kind or out of range, random weights are to be compiled, or both
            ``num_steps`` and ``times`` are given.

    Example:
        >>> class DDIM(pyrodiff.Sampler):  # deterministic, with eta = 0 (Song et al., 2021)
        ...     def step(self, x_t, t, *context):
        ...         process, x_0 = self.chain.forward_process, self.last(x_t, t, *context)
        ...         (a_t, b_t), (a_s, b_s) = process.scales(x_t, t), process.scales(x_t, t - 1)
        ...         return a_s * x_0 + b_s / b_t * (x_t - a_t * x_0)
        ...     def last(self, x_1, t, *context):
        ...         return self.chain.reverse.denoiser(x_1, t, *context)
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> DDIM(diffusion, num_steps=5)(num_samples=3).shape
        torch.Size([3, 2])
    """

    order: int | None = None

    def __init__(
        self,
        diffusion: Diffusion,
        compile: bool = False,
        *,
        num_steps: int | None = None,
        times: Sequence[int] | None = None,
        guide: Callable | None = None,
    ) -> None:
        checks.instance("diffusion", diffusion, Diffusion)
        arguments.one_of("compile", compile, (False, True))
        if compile and diffusion.model.is_random():
            raise ArgumentError("diffusion", "must have no random weights (PyroSample) to be compiled, but it has some")
        if num_steps is not None and times is not None:
            raise ArgumentError("num_steps", f"must be None where times are given, but it is {num_steps!r}")
        if guide is not None and not callable(guide):
            raise ArgumentError("guide", f"must be a program, or None, but it is {arguments.described(guide)}")
        self.diffusion, self.guide = diffusion, guide
        self._times_given = None if times is None else checks.increasing("times", times, diffusion.num_steps)
        self._num_steps, self._compiles = num_steps, compile
        self._cut(self._wanted(None))

    def _cut(self, times: Sequence[int] | None) -> None:
        """Make the chain of these times, or of all, from the diffusion's present parts, and record these."""
        modules = list(self.diffusion.modules())
        self._made_of = Composition(modules, [], keyed=modules)
        self.chain = self.diffusion if times is None else self.diffusion.subchain(times)
        self._is_cut = times is not None
        self._times = tuple(int(t) for t in (range(1, self.diffusion.num_steps + 1) if times is None else times))
        self._compiled = Compiled(self._as_a_function, [self.chain.model], name="sampling") if self._compiles else None

    def spaced(self, num_steps: int) -> tuple[int, ...]:
        """The times of ``num_steps`` steps: evenly spaced in 1..T, unless a sampler has others that suit it better.

        Arguments:
            num_steps: How many, in 1..T.

        Raises:
            ValueError: If it is out of range.
        """
        return evenly_spaced(num_steps, self.diffusion.num_steps)

    @abstractmethod
    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """A draw of :math:`x_{t-1}`, for t = 2..T of the chain.

        Arguments:
            x_t: The states, with shape (n, *event_shape).
            t: Their time, an integer tensor with shape (n,), the same everywhere.
            *context: Tensors of n rows, or of one for all.

        Returns:
            A tensor with the shape of ``x_t``.
        """

    def advance(
        self, x_t: Tensor, t: Tensor, memory: tuple[Tensor, ...], *context: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A step that passes tensors to the next one; a multistep method defines it instead of relying on :meth:`step`.

        Arguments:
            x_t, t, *context: As of :meth:`step`, which this calls by default, passing nothing on.
            memory: The tensors from the step before; none in the first step.

        Returns:
            A tensor with the shape of ``x_t``, and the tensors for the next step, the same number in every step.
        """
        return self.step(x_t, t, *context), ()

    def last(self, x_1: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        """A draw of x_0 by the decoder, given the states at t = 1; arguments and result as of :meth:`step`."""
        model = self.chain.model
        return drawn(model.decoded(model.kernel(x_1, t, *context), x_1), len(x_1))

    def __call__(
        self,
        num_samples: int,
        *context: Tensor,
        num_steps: int | None = None,
        generator: torch.Generator | int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples.

        Arguments:
            num_samples: How many, n.
            *context: The context of each sample, for the network: tensors of n rows, or of one for all.
            num_steps: The number of steps, at the times of :meth:`spaced`; the sampler's own if not given.
            generator: A generator or a seed, for the same draws each time; a seed from torch's global generator if not
                given.
            progress: Whether to show a progress bar, where there is a terminal.

        Returns:
            A tensor with shape (n, *event_shape).

        Raises:
            ValueError: If ``num_samples`` is not a positive int, a context is not a tensor of n rows or one,
                ``num_steps`` is no int in 1..T, or ``generator`` is of another kind.
        """
        self._choose(num_steps)
        return self._states((0,), num_samples, context, "generator", generator, progress)[0]

    def trajectory(
        self,
        num_samples: int,
        *context: Tensor,
        num_steps: int | None = None,
        times: Sequence[int] | None = None,
        generator: torch.Generator | int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples, and keep intermediate states; steps and draws, and so x_0, are those of a plain call.

        Arguments:
            num_samples: How many, n.
            *context: See :meth:`__call__`.
            num_steps: See :meth:`__call__`.
            times: The times t of the states x_t to keep, decreasing ints, each 0 or the time of a step. If not given:
                the last time, 0, and nine evenly between them, or all if there are fewer than 10.
            generator: See :meth:`__call__`.
            progress: See :meth:`__call__`.

        Returns:
            A tensor with shape ``(len(times), n, *event_shape)``.

        Raises:
            ValueError: As :meth:`__call__`; if ``times`` is anything else.

        Example:
            >>> forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=20))
            >>> denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP(event_shape=(4,)), forward)
            >>> reverse = pyrodiff.BinomialReverse(forward, denoiser)
            >>> sampler = pyrodiff.AncestralSampler(pyrodiff.Diffusion(forward, reverse, event_shape=(4,)))
            >>> states = sampler.trajectory(num_samples=3, times=(20, 10, 0), generator=5)
            >>> states.shape, torch.equal(states[-1], sampler(num_samples=3, generator=5))
            (torch.Size([3, 3, 4]), True)
        """
        self._choose(num_steps)
        found = _spread((0, *self._times)) if times is None else _decreasing(times, self.diffusion.num_steps)
        missing = [t for t in found if t not in (0, *self._times)]
        if missing:
            raise ArgumentError(
                "times", f"must be 0 or times of the {len(self._times)} steps, but {missing[0]} is none of them"
            )
        return torch.stack(self._states(found, num_samples, context, "times", generator, progress))

    def _wanted(self, num_steps: int | None) -> tuple[int, ...] | None:
        """The times of ``num_steps`` steps, or of those that the sampler was made for; None for all."""
        num_steps = self._num_steps if num_steps is None else num_steps
        return self._times_given if num_steps is None else self.spaced(num_steps)

    def __getstate__(self) -> dict[str, Any]:
        """All but the chain and its graph, which are rebuilt."""
        return {name: value for name, value in vars(self).items() if name not in ("chain", "_made_of", "_compiled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._cut(self._times if self._is_cut else None)

    def _choose(self, num_steps: int | None) -> None:
        """Choose the number of steps (None: the sampler's own); rebuild the chain if it or the parts have changed."""
        times = self._wanted(num_steps)
        is_other = self._is_cut if times is None else not self._is_cut or tuple(times) != self._times
        if is_other or (self._is_cut and not self._made_of.holds()):
            self._cut(times)

    def _states(
        self,
        times: tuple[int, ...],
        num_samples: int,
        context: tuple[Tensor, ...],
        keyword: str,
        generator: torch.Generator | int | None,
        progress: bool,
    ) -> list[Tensor]:
        """The states at these times, copied out of inference mode, so that gradients may pass through them."""
        num_samples = arguments.positive_int("num_samples", num_samples)
        checks.context(context, num_samples, self.diffusion.model.device, keyword)
        no_gradient = torch.inference_mode() if self._compiled is None else torch.no_grad()
        evaluated = evaluating(self.chain, generator, guide=self.guide, given=(None, *context))
        with evaluated, no_gradient, progress_bar(progress, "samples") as bar:
            bar.total = num_samples * len(self._times)
            at = dict(zip((0, *self._times), range(len(self._times) + 1), strict=True))
            wanted = {at[t] for t in times}
            kept = {k: x for k, x in self._run(num_samples, context, bar, wanted) if k in wanted}
        return [kept[at[t]].clone() for t in times]

    def _run(
        self, num_samples: int, context: tuple[Tensor, ...], bar: tqdm, wanted: set[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields t and x_t of the chain from T to 0, at least at wanted times; the first network call is validated."""
        model, T = self.chain.model, self.chain.num_steps
        with validated(model.device):
            x = drawn(model.top(model.dtype(), model.device), num_samples)
        yield T, x
        times = torch.arange(T + 1, device=x.device)[:, None].expand(-1, num_samples).unbind()
        context = tuple(values.expand(num_samples, *values.shape[1:]) for values in context)
        step: Callable[..., Any] = self._as_a_function
        memory: Sequence[Tensor] = ()
        start, compiled, self._contexts = x, self._compiled, len(context)
        for t in range(T, 1, -1):
            with validated(x.device) if t == T else nullcontext():
                x, *memory = step(x, times[t], *context, *memory)
            if t == T:
                _check_states("step", x, start)
            bar.update(num_samples)
            yield t - 1, x
            if compiled is not None and step is compiled:  # nothing is replaced from here on: skip the check
                step = compiled.graph_for(x, times[t], *context, *memory) or step
            elif t == T and compiled is not None:
                step = compiled
        with validated(x.device) if T == 1 else nullcontext():
            x = self.last(x, times[1], *context)
        _check_states("last", x, start)
        bar.update(num_samples)
        yield 0, x

    def _as_a_function(self, x_t: Tensor, t: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        context, memory = given[: self._contexts], given[self._contexts :]
        x, memory = self.advance(x_t, t, memory, *context)
        return x, *memory


def _check_states(name: str, x: Tensor, like: Tensor) -> None:
    """Check the states that a step returned."""
    checks.returned(name, x, like.shape, like)
    if x.dtype != like.dtype:
        raise ArgumentError(name, f"must return states of dtype {like.dtype}, but they are of {x.dtype}")


def drawn(law: Distribution, num_samples: int) -> Tensor:
    """A draw for each sample; the distribution may have one batch row for all.

    Arguments:
        law: The distribution.
        num_samples: How many samples there are.
    """
    return law.sample() if law.batch_shape == (num_samples,) else law.expand((num_samples,)).sample()


def _spread(times: tuple[int, ...]) -> tuple[int, ...]:
    """The first, the last and nine of the times evenly between them, or all if there are fewer; decreasing."""
    return tuple(sorted({times[round((len(times) - 1) * part / 10)] for part in range(11)}, reverse=True))


def _decreasing(times: Sequence[int], num_steps: int) -> tuple[int, ...]:
    """Check for decreasing ints in 0..T, at least one."""
    try:
        found = tuple(times.tolist() if isinstance(times, Tensor) else times)
    except (TypeError, RuntimeError):  # no iterable, or without values to read
        found = ()
    if not (
        found
        and all(arguments.is_int(t) and 0 <= t <= num_steps for t in found)
        and all(before > after for before, after in pairwise(found))
    ):
        raise ArgumentError("times", f"must be decreasing ints in 0..{num_steps}, at least one, but they are {times!r}")
    return tuple(int(t) for t in found)
