r"""Ancestral sampling: the generative chain itself, without Pyro's messages.

.. math:: x_T \sim p(x_T), \qquad x_{t-1} \sim p_\theta(x_{t-1} | x_t) \quad (t = T, \dots, 2), \qquad
    x_0 \sim p_\theta(x_0 | x_1),

which is what ``diffusion.model(num_samples=n)`` does as a Pyro program; with the same seed, the draws are the same.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), Algorithm 2, https://arxiv.org/abs/2006.11239
"""

from torch import Tensor

from .sampler import Sampler, drawn

__all__ = ["AncestralSampler"]


class AncestralSampler(Sampler):
    """Draws data by running the chain, or one of fewer steps (:meth:`Diffusion.subchain`), from x_T to x_0.

    Arguments, errors: see :class:`Sampler`.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.AncestralSampler(diffusion)(num_samples=5).shape
        torch.Size([5, 2])
    """

    def step(self, x_t: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return drawn(self.chain.model.kernel(x_t, t, *context), len(x_t))
