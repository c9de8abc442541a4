"""What tests of training share: optimizers, the choice of a pair, and parameters as they were."""

import torch
from torch import Tensor, nn

import pyrodiff


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
