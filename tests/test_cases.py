"""Every part that a diffusion can be made of has an entry in the registry of the tests, and with it their claims."""

import inspect

import cases
import pytest
import torch

import pyrodiff

NETWORK = cases.Timed()


def of_denoiser(denoiser):
    return denoiser.make(NETWORK, cases.PROCESSES[denoiser.processes[0]].make())


KINDS = {  # the modules of a kind, its base class, and one of each entry
    "schedules": (
        "process.schedules process.learned",
        pyrodiff.Schedule,
        [s.make(3) for s in cases.SCHEDULES.values()],
    ),
    "processes": ("process.forward", pyrodiff.Forward, [p.make() for p in cases.PROCESSES.values()]),
    "denoisers": (
        "model.denoisers model.clipping",
        pyrodiff.Denoiser,
        [of_denoiser(d) for d in cases.DENOISERS.values()],
    ),
    "reverses": ("model.reverse", (), [r.of(NETWORK) for r in cases.REVERSES.values()]),
    "variances": (
        "model.variances",
        pyrodiff.Variance,
        [v.make(cases.SCHEDULES["BetaSchedule"].steps(3)) for v in cases.VARIANCES.values()],
    ),
    "decoders": (
        "model.decoders",
        pyrodiff.Decoder,
        [d.make(d.process.make()) for d in cases.DECODERS.values()],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_public_part_has_an_entry(kind):
    """Each concrete class of ``pyrodiff.__all__`` that is of a kind, by its base class or by where it is defined."""
    modules, base, made = KINDS[kind]
    public = [getattr(pyrodiff, name) for name in pyrodiff.__all__]
    classes = {one for one in public if inspect.isclass(one) and issubclass(one, torch.nn.Module)}
    homes = [f"pyrodiff.{module}" for module in modules.split()]
    of_kind = {one for one in classes if issubclass(one, base) or one.__module__ in homes}
    concrete = {one.__name__ for one in of_kind if not inspect.isabstract(one)}
    assert concrete == {type(one).__name__ for one in made}
    assert len(concrete) > 1
