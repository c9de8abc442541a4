"""What tests of training share: optimizers, small diffusions and their data, the choice of a pair, parameters."""

import models
import torch
from torch import Tensor, nn

import pyrodiff

X = torch.tensor([[0.3, -1.2], [1.1, 0.4], [-0.8, 0.9], [0.2, 1.7]])  # data of two numbers, and of two bits
ONES = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])


def gaussian(schedule: pyrodiff.Schedule | None = None) -> pyrodiff.Diffusion:
    forward = pyrodiff.GaussianForward(schedule or pyrodiff.LinearSchedule(models.T, 0.1, 0.5))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(models.Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, (models.SIZE,))


def bits() -> pyrodiff.Diffusion:
    return models.bits(1.0)


def levels() -> pyrodiff.Diffusion:
    return models.gaussian(1.0, schedule="log SNR", denoiser="levels", decoder="softmax")


def svi_of(pair, optim=None, loss=None, **options) -> pyrodiff.SVI:
    return pyrodiff.SVI(pair.model, pair.guide, optim or adam, loss or pyrodiff.DiffusionELBO(), **options)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(parameters: list[Tensor], lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def still(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """One that changes nothing."""
    return sgd(parameters, lr=0.0)


def nothing(*args: object) -> None:
    """The guide of a program without latents."""


def pair_of(diffusion: pyrodiff.Diffusion, one_step: bool) -> pyrodiff.Diffusion | pyrodiff.OneStep:
    return diffusion.one_step() if one_step else diffusion


def values(module: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two lists of tensors are the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def level_data() -> Tensor:
    """Three data of two numbers, of five levels each."""
    return pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1], [2, 4]]), levels=5).double()
