"""What every test and doctest starts from: a fixed seed, an empty parameter store, validation on, float32.

And what tests of graphs share."""

from collections.abc import Iterator

import pyro
import pytest
import torch

import pyrodiff


@pytest.fixture(autouse=True)
def _fresh(doctest_namespace: dict) -> Iterator[None]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float32)
    doctest_namespace.update(pyro=pyro, pyrodiff=pyrodiff, torch=torch, constraints=torch.distributions.constraints)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list:
    """The graphs, run operation by operation: nothing is compiled, which would take its time. Returns the list."""
    made = []

    def keep(module: torch.fx.GraphModule, *args: object, **kwargs: object) -> torch.fx.GraphModule:
        made.append(module)
        return module

    monkeypatch.setattr("torch._inductor.compile", keep)
    return made
