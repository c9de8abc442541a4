"""What every test and doctest starts from: a fixed seed, an empty parameter store, validation on, float32.

And what tests of graphs share."""

import gc
import os
import traceback
import types
from collections.abc import Iterator

# The instructions that the processor says it has are there: inductor need not compile a file for each kind to find out.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pyro
import pytest
import torch
from torch._subclasses import fake_tensor

import pyrodiff

# Whenever it is seeded, and for every tensor of a graph, torch notes the stack, for a message should something
# fail later. Below pytest the stack is deep: a third of a millisecond each time, much of what tests cost. So it is
# told that the stack is empty.
for _module in (torch.cuda, torch.xpu, torch.mtia, fake_tensor):
    _module.traceback = types.SimpleNamespace(**vars(traceback) | {"format_stack": list, "extract_stack": list})
os.fsync = lambda descriptor: None  # nor is the disk waited for: what a process wrote is there when it has died


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keep no log: pytest would listen to each of torch's 50 loggers anew, three times for each test."""
    session.config.pluginmanager.unregister(name="logging-plugin")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage among what is collected, all of which stays; nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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
    """The graphs, run operation by operation: nothing is compiled, which would take its time. Returns the list.

    Nor is each tensor of a graph copied into what is known of it, for which only a compiler asks: half of its making.
    """
    made = []

    def keep(module: torch.fx.GraphModule, *args: object, **kwargs: object) -> torch.fx.GraphModule:
        made.append(module)
        return module

    monkeypatch.setattr("torch._inductor.compile", keep)
    monkeypatch.setattr("torch.fx.experimental.proxy_tensor.extract_val", lambda value, include_real=False: value)
    return made
