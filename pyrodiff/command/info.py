"""``pyrodiff info``: a summary of a run and its progress, or of versions and devices."""

import platform
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..base.files import printable
from .options import BUILT_IN
from .runs import Metrics, Run, bound_in, show

__all__ = ["info", "versions"]


def info(folder: Path | None) -> int:
    """Print a summary of a run and its progress.

    Arguments:
        folder: Its folder; versions and devices are printed if not given.

    Returns:
        The exit code.

    Raises:
        ArgumentError: If it is no run's.
    """
    facts = _machine() if folder is None else _run(folder)
    width = max(map(len, facts))
    for name, value in facts.items():
        show(f"{name:{width}}  {printable(value)}")
    return 0


def versions(device: torch.device) -> dict[str, str]:
    """The versions and the machine, on which a figure may depend.

    Arguments:
        device: The device of the computation.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "pyrodiff": __version__,
        **{name: metadata.version(name) for name in ("torch", "pyro-ppl", "numpy", "matplotlib")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
    }


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = torch.device("cuda" if gpus else "cpu")
    return {**versions(device), "GPUs": ", ".join(gpus) or "none", "data": ", ".join(BUILT_IN)}


def _run(folder: Path) -> dict[str, str]:
    run = Run.opened(folder, "last", "cpu")
    plan, form, state = run.plan, run.form, run.state
    records = [record for record in Metrics.read(folder) if record.get("bound") is not None]
    forward_process = run.diffusion.forward_process
    held_out = best = "none yet"
    if records:
        held_out = f"{form.per_unit(records[-1]['bound']):.4f} {form.unit} at step {records[-1]['step']}"
        best = f"{form.per_unit(state['best']):.4f} {form.unit} at step {state['best_step']}"
    facts = {
        "data": plan.reading.data,
        "read as": f"{form.read_as}, each of shape {tuple(form.event_shape)}",
        "parts": form.contents,
        "process": f"{type(forward_process).__name__}, {forward_process.schedule!r}",
        "denoiser": f"{plan.model.prediction}, {plan.model.network}",
        "parameters": f"{sum(parameter.numel() for parameter in run.diffusion.parameters()):,}",
        "steps": f"{run.svi.num_steps} of {plan.training.train_steps}, {state['seconds'] / 60:.1f} minutes",
        "held-out bound": held_out,
        "best": best,
    }
    path = folder / "bound.npz"
    if path.is_file():
        facts["test bound"] = bound_in(path).summary
    return {**facts, "checkpoints": ", ".join(sorted(one.name for one in (folder / "checkpoints").glob("*.pt")))}
