"""Stochastic variational inference with one torch optimizer over all parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

from . import checks

__all__ = ["SVI"]


class SVI:
    """Pyro's SVI interface over one torch optimizer, which sees all parameters together.

    ``pyro.optim`` keeps an optimizer a tensor and clips every tensor's gradient by itself; here one optimizer has them
    all, and the gradient is clipped by its global norm. The parameters are those of the model and of the guide, where
    they are modules, and of every ``pyro.param`` and ``pyro.module`` that they come upon, whenever they first do.

    Arguments:
        model, guide: The programs.
        optim: Called once with the parameters, it returns a ``torch.optim.Optimizer``.
        loss: The ELBO.
        clip_norm: The norm that the gradient of the loss (of the whole batch, summed) is clipped to; not if None.

    Raises:
        ValueError: If an argument is of another kind, or ``clip_norm`` is not positive. On a step, if there is nothing
            to learn.

    Example:
        >>> def model(x):
        ...     rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", pyro.distributions.Exponential(rate), obs=x)
        >>> def guide(x):
        ...     pass
        >>> optim = lambda parameters: torch.optim.Adam(parameters, lr=0.1)
        >>> svi = pyrodiff.SVI(model, guide, optim, pyrodiff.DiffusionELBO())
        >>> losses = [svi.step(torch.full((10,), 0.5)) for _ in range(200)]
        >>> pyro.param("rate")  # the best is 1 / 0.5
        tensor(2.0000, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        loss: ELBO,
        clip_norm: float | None = None,
    ) -> None:
        for name, value in (("model", model), ("guide", guide), ("optim", optim)):
            if not callable(value):
                raise ValueError(f"{name} must be a callable (optim: called with parameters), but it is {value!r}")
        checks.instance("loss", loss, ELBO)
        if not hasattr(loss, "differentiable_loss"):
            raise ValueError(f"loss must have a differentiable_loss, but it is {loss!r}")
        if clip_norm is not None:
            checks.number("clip_norm", clip_norm, 0, math.inf)
        self.model, self.guide, self.optim, self.loss, self.clip_norm = model, guide, optim, loss, clip_norm
        self.optimizer: torch.optim.Optimizer | None = None
        self._parameters: dict[int, Tensor] = {}

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step; ``args`` and ``kwargs`` go to the model and the guide.

        Returns:
            The loss before the step, in nats summed over the batch, as a detached tensor with shape (), still on its
            device.
        """
        with poutine.trace(param_only=True) as capture:
            loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
        self._register(capture.trace)
        if self.optimizer is None or not loss.requires_grad:
            raise ValueError(
                "model and guide must have a parameter to learn, but none was found that requires grad: let a program "
                "be a torch.nn.Module, or call pyro.module(name, network) in it"
            )
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters.values(), self.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without a step, as :meth:`step` returns it."""
        with torch.no_grad():
            return self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def _register(self, trace: poutine.Trace) -> None:
        """Hand parameters that were not there before to the optimizer."""
        found = [
            parameter
            for program in (self.model, self.guide)
            if isinstance(program, nn.Module)
            for parameter in program.parameters()
        ]
        found += [
            site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
            for site in trace.nodes.values()
            if site["type"] == "param"
        ]
        new = {
            id(parameter): parameter
            for parameter in found
            if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._parameters
        }
        if not new:
            return
        if self.optimizer is None:
            optimizer = self.optim(list(new.values()))
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise ValueError(
                    f"optim must return a torch.optim.Optimizer, as lambda parameters: torch.optim.Adam(parameters) "
                    f"does, but it returned {optimizer!r} (pyro.optim goes with pyro.infer.SVI)"
                )
            self.optimizer = optimizer
        else:
            self.optimizer.add_param_group({"params": list(new.values())})
        self._parameters.update(new)
