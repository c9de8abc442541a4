r"""Samplers: draws from a trained diffusion, without a message of Pyro's.

Ancestral sampling runs the generative chain,

.. math:: x_T \sim p(x_T), \qquad x_{t-1} \sim p_\theta(x_{t-1} | x_t) \quad (t = T, \dots, 2), \qquad
    x_0 \sim p_\theta(x_0 | x_1),

which is what ``diffusion.model(num_samples=n)`` does as a Pyro program; seeded alike, in the same draws.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Algorithm 2, https://arxiv.org/abs/2006.11239
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from ..base import checks
from ..pair.diffusion import Diffusion
from ..running.compilation import Compiled
from ..running.evaluation import evaluating, progress_bar, validated

__all__ = ["AncestralSampler"]


class AncestralSampler:
    """Draws data by running the chain from x_T to x_0.

    Modules are in evaluation mode meanwhile, and random weights (each ``PyroSample``) are drawn once a call. Fewer
    steps are those of :meth:`Diffusion.subchain`.

    Arguments:
        diffusion: The model.
        compile: Whether a step runs as one compiled graph, made at the first call with so many samples. A model with
            random weights cannot be compiled.

    Raises:
        ValueError: If an argument is of another kind, or random weights are to be compiled.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.AncestralSampler(diffusion)(num_samples=5).shape
        torch.Size([5, 2])
    """

    def __init__(self, diffusion: Diffusion, compile: bool = False) -> None:
        checks.instance("diffusion", diffusion, Diffusion)
        checks.one_of("compile", compile, (False, True))
        if compile and diffusion.model.is_random():
            raise ValueError("diffusion must have no random weights (PyroSample) to be compiled, but it has some")
        self.diffusion = diffusion
        self._compiled = Compiled(self._step, [diffusion.model], name="sampling") if compile else None

    def __call__(
        self, num_samples: int, generator: torch.Generator | int | None = None, progress: bool = False
    ) -> Tensor:
        """Draw.

        Arguments:
            num_samples: How many, n.
            generator: A generator or a seed, for the same draws each time; a seed from torch's source if not given.
            progress: Whether to show a progress bar, where there is a terminal.

        Returns:
            A tensor with shape (n, *event_shape).

        Raises:
            ValueError: If ``num_samples`` is not a positive int, or ``generator`` is of another kind.
        """
        return self._states((0,), num_samples, generator, progress)[0]

    def trajectory(
        self,
        num_samples: int,
        times: Sequence[int] | None = None,
        generator: torch.Generator | int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw, and keep states on the way: the same chain in the same draws as without, so that x_0 is the same.

        Arguments:
            num_samples: How many, n.
            times: The times t of the states x_t to keep, decreasing ints in 0..T; T and 0 and, evenly between them,
                nine more, or all if T is below 10, if not given.
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
        T = self.diffusion.num_steps
        times = _spread(T) if times is None else _decreasing(times, T)
        return torch.stack(self._states(times, num_samples, generator, progress))

    def _states(
        self, times: tuple[int, ...], num_samples: int, generator: torch.Generator | int | None, progress: bool
    ) -> list[Tensor]:
        """The states at these times, as tensors that gradients may pass through, which those of inference are not."""
        num_samples = checks.positive_int("num_samples", num_samples)
        no_gradient = torch.inference_mode() if self._compiled is None else torch.no_grad()
        with evaluating(self.diffusion, generator), no_gradient, progress_bar(progress, "samples") as bar:
            bar.total = num_samples * self.diffusion.num_steps
            kept = {t: x for t, x in self._chain(num_samples, bar) if t in times}
        return [kept[t].clone() for t in times]

    def _chain(self, num_samples: int, bar: tqdm) -> Iterator[tuple[int, Tensor]]:
        """t and x_t, from T to 0; the first network call is validated."""
        model, T = self.diffusion.model, self.diffusion.num_steps
        with validated(model.device):
            top = model.top(model.dtype(), model.device)
            top = top.expand((num_samples,))
            x = top() if callable(top) else top.sample()  # one of torch's own
        yield T, x
        times = torch.arange(T + 1, device=x.device)[:, None].expand(-1, num_samples).unbind()
        step = self._step
        for t in range(T, 1, -1):
            with validated(x.device) if t == T else nullcontext():
                (x,) = step(x, times[t])
            bar.update(num_samples)
            yield t - 1, x
            if step is self._compiled:  # nothing changes from here on, so that its graph need not ask
                step = self._compiled.graph_for(x, times[t]) or step
            elif t == T and self._compiled is not None:
                step = self._compiled
        with validated(x.device) if T == 1 else nullcontext():
            x = _drawn(model.decoded(model.kernel(x, times[1]), x), num_samples)
        bar.update(num_samples)
        yield 0, x

    def _step(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        """A draw of x_{t-1}."""
        return (_drawn(self.diffusion.model.kernel(x, t), len(x)),)


def _drawn(law: Distribution, num_samples: int) -> Tensor:
    """A draw for each sample, also of a law that is the same for all."""
    return law.sample() if law.batch_shape == (num_samples,) else law.expand((num_samples,)).sample()


def _spread(num_steps: int) -> tuple[int, ...]:
    """T and 0 and nine times evenly between them, or all there are."""
    return tuple(sorted({round(num_steps * part / 10) for part in range(11)}, reverse=True))


def _decreasing(times: Sequence[int], num_steps: int) -> tuple[int, ...]:
    """Decreasing ints in 0..T, at least one."""
    try:
        found = tuple(times.tolist() if isinstance(times, Tensor) else times)
    except TypeError:
        found = ()
    if not (
        found
        and all(checks.is_int(t) and 0 <= t <= num_steps for t in found)
        and all(before > after for before, after in pairwise(found))
    ):
        raise ValueError(f"times must be decreasing ints in 0..{num_steps}, at least one, but they are {times!r}")
    return tuple(int(t) for t in found)
