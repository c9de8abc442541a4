r"""Samplers: draws from a trained diffusion, without a message of Pyro's.

Ancestral sampling runs the generative chain,

.. math:: x_T \sim p(x_T), \qquad x_{t-1} \sim p_\theta(x_{t-1} | x_t) \quad (t = T, \dots, 2), \qquad
    x_0 \sim p_\theta(x_0 | x_1),

which is what ``diffusion.model(num_samples=n)`` does as a Pyro program; seeded alike, in the same draws.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Algorithm 2, https://arxiv.org/abs/2006.11239
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm import tqdm

from . import checks
from .compilation import Compiled
from .diffusion import Diffusion
from .evaluation import evaluating, progress_bar

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
        diffusion.model.look_again()
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
        checks.positive_int("num_samples", num_samples)
        no_gradient = torch.inference_mode() if self._compiled is None else torch.no_grad()
        with evaluating(self.diffusion, generator), no_gradient, progress_bar(progress, "samples") as bar:
            bar.total = num_samples * self.diffusion.num_steps
            x = self._chain(num_samples, bar)
        return x.clone()  # one that gradients may pass through, which a tensor of inference mode is not

    def _chain(self, num_samples: int, bar: tqdm) -> Tensor:
        """x_0; only the first step is checked."""
        model, T = self.diffusion.model, self.diffusion.num_steps
        x = model.top(model.dtype())((num_samples,))
        times = torch.arange(T + 1, device=x.device)[:, None].expand(-1, num_samples).unbind()
        if T > 1:
            (x,) = self._step(x, times[T])
            bar.update(num_samples)
        with checks.trusting() if T > 1 else nullcontext():
            step = self._step if self._compiled is None else self._compiled
            for t in range(T - 1, 1, -1):
                (x,) = step(x, times[t])
                bar.update(num_samples)
                if step is self._compiled:
                    step = self._compiled.graph_for(x, times[t]) or step
            x = _drawn(model.decoded(model.kernel(x, times[1]), x), num_samples)
            bar.update(num_samples)
        return x

    def _step(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        """A draw of x_{t-1}."""
        return (_drawn(self.diffusion.model.kernel(x, t), len(x)),)


def _drawn(law: Distribution, num_samples: int) -> Tensor:
    """A draw for each sample, also of a law that is the same for all."""
    return law.sample() if law.batch_shape else law.sample((num_samples,))
