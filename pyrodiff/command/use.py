"""``pyrodiff bound``, ``sample`` and ``plot``: the uses of a trained run."""

import itertools
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.animation import PillowWriter
from torch import Tensor
from tqdm import tqdm

from .. import plots
from ..base.arguments import ArgumentError
from ..base.files import write
from ..likelihood.bounds import bound as bound_of
from ..likelihood.bounds import importance_bound
from ..sampling.sampler import Sampler
from .data import Data
from .given import Given, completed
from .models import shortened
from .plans import prepare
from .runs import Metrics, Run, bound_in, curves, finite, picture, save_arrays, save_figure, show
from .stopping import Stop

__all__ = ["bound", "plot", "sample", "save_samples", "write_samples"]


def bound(
    run: Path,
    checkpoint: str,
    device: str,
    seed: int,
    data: str | None,
    split: str,
    number: int | None,
    times: int | None,
    chain_steps: int | None,
    particles: int | None,
    save: Path | None,
) -> int:
    """Print the bound on -log p of a run's data, term by term.

    Arguments: see :command:`pyrodiff bound --help`.

    Returns:
        The exit code.

    Raises:
        ArgumentError: If one is invalid.
    """
    if save is not None:
        _refuse_place(save, run)
    opened = Run.opened(run, checkpoint, device)
    batches = _data_of(opened, data).batches(split, number)
    diffusion = shortened(opened.diffusion, chain_steps, "--chain-steps")
    with Stop() as stop, finite(opened.svi.num_steps):
        found = bound_of(diffusion, stop.between(batches), num_times=times, generator=seed, progress=True)
        found = opened.form.in_units(found)
        show(found)
        show(f"{split} data: {found.summary}")
        if particles is not None:
            tighter = importance_bound(
                diffusion, stop.between(batches), num_particles=particles, generator=seed, progress=True
            )
            show(opened.form.in_units(tighter))
    if save is not None:
        found.save(save)
    return 0


def sample(
    run: Path,
    checkpoint: str,
    device: str,
    seed: int,
    number: int,
    batch_size: int,
    sampler: str,
    sample_steps: int | None,
    save: Path | None,
    trajectory: str | None,
    label: int | None,
    given: Path | None,
    mask: Path | None,
    noise: float,
    particles: int,
    replacement: bool,
) -> int:
    """Draw samples into an .npz file, and a picture of them; also the rest of a datum given a part of it.

    Arguments: see :command:`pyrodiff sample --help`.

    Returns:
        The exit code.

    Raises:
        ArgumentError: If one is invalid.
    """
    opened = Run.opened(run, checkpoint, device)
    shortened(opened.diffusion, sample_steps, "--sample-steps")
    classes = opened.form.classes
    if label is not None and (classes is None or label >= classes):
        what = "left out for a run without labels" if classes is None else f"below {classes}, as many as there are"
        raise ArgumentError("--label", f"must be {what}, but it is {label}")
    drawn_by = opened.sampler(sampler)
    free = (n for n in itertools.count(1) if not any(run.glob(f"samples-{n}[.-]*")))
    path = save if save is not None else run / f"samples-{next(free)}.npz"
    _refuse_place(path, run)
    if trajectory is not None and not opened.form.is_drawable:
        raise ArgumentError("--trajectory", f"must be left out for data of shape {tuple(opened.form.event_shape)}")
    if given is not None:
        _refuse_beside_given(sampler, sample_steps, trajectory)
        part = Given(opened, given, mask, noise)
        x_0 = completed(opened, part, number, particles, replacement, seed, opened.context(1, label=label))
        save_samples(opened, path, x_0)
        return 0
    for option, value in {"--mask": mask, "--noise": noise or None, "--replacement": replacement or None}.items():
        if value is not None:
            raise ArgumentError("--given", f"must be given with {option}: a file of the datum")
    write_samples(opened, path, partial(drawn_by, num_steps=sample_steps), number, batch_size, seed, label=label)
    if trajectory is not None:
        _write_trajectory(opened, path, drawn_by, number, sample_steps, seed, trajectory == "gif", label)
    return 0


def _refuse_beside_given(sampler: str, sample_steps: int | None, trajectory: str | None) -> None:
    """Refuse options that sequential Monte Carlo, which runs the whole chain, would ignore."""
    for option, value, plain in (
        ("--sampler", sampler, "ancestral"),
        ("--sample-steps", sample_steps, None),
        ("--trajectory", trajectory, None),
    ):
        if value != plain:
            raise ArgumentError(option, f"must be left out with --given, but it is {value}")


def plot(run: Path, checkpoint: str, device: str, seed: int, data: str | None) -> int:
    """Draw a run's curves, the terms of its bound over t, and samples beside data.

    Arguments: see :command:`pyrodiff plot --help`.

    Returns:
        The exit code.

    Raises:
        ArgumentError: If one is invalid.
    """
    opened = Run.opened(run, checkpoint, device)
    folder, form, T = run / "pictures", opened.form, opened.plan.model.T
    if folder.is_symlink():
        raise ArgumentError("RUN", f"must have folders of its own, but {folder} is a link")
    folder.mkdir(exist_ok=True)
    x_0, records = _data_of(opened, data).split("test", 2000), Metrics.read(run)
    pictures: dict[str, Any] = {}
    if any(record.get("loss", record.get("bound")) is not None for record in records):
        pictures["curves"] = curves(form, records)
    path = run / "bound.npz"
    if path.is_file() and T > 1:
        pictures["terms"] = plots.terms(bound_in(path)).figure
    if form.is_drawable:
        number = 64 if form.event_shape != (2,) else 2000
        with finite(opened.svi.num_steps):
            samples = opened.sampler("ancestral")(number, *opened.context(number), generator=seed, progress=True)
            pictures["samples"] = picture(form, samples, x_0[: len(samples)])
    if form.event_shape == (2,) and form.classes is None:
        with finite(opened.svi.num_steps):
            times = sorted({0, T // 8, T // 4, T // 2, T})
            pictures["process"] = plots.diffusion_process(opened.diffusion, x_0, times)
    for name, figure in pictures.items():
        save_figure(folder / f"{name}.png", figure)
        show(folder / f"{name}.png")
    return 0


def _data_of(run: Run, path: str | None) -> Data:
    """The data that a run began with, which may have moved."""
    moved = {} if path is None else {"data": str(Path(path).resolve())}
    _, data = prepare({**run.plan.values(), **moved}, run.device)
    run.refuse_other_data(data.form, "what is there now")
    return data


def _refuse_place(path: Path, folder: Path) -> None:
    """Refuse early a path that cannot be written, or that is a file of the run itself."""
    if path.suffix != ".npz" or len(os.fsencode(path.name)) > 200:
        raise ArgumentError("--save", f"must end in .npz, in 200 bytes, but it is {path}")
    if not path.parent.is_dir() or path.is_dir():
        raise ArgumentError("--save", f"must be a file in a folder that is there, but it is {path}")
    place, run = path.parent.resolve(), folder.resolve()
    if place in (run / "pictures", run / "checkpoints") or (place == run and path.stem in ("samples", "bound")):
        raise ArgumentError("--save", f"must leave the files of the run as they are, but it is {path}")


def write_samples(
    run: Run,
    path: Path,
    draw: Callable[..., Tensor],
    number: int,
    size: int,
    seed: int,
    data: Tensor | None = None,
    label: int | None = None,
) -> Tensor:
    """Write samples to a file, and a picture of the first ones beside it.

    Arguments:
        run: The run.
        path: The .npz file.
        draw: Called with a number, labels if there are any, a generator and whether to show a bar.
        number: The number of samples.
        size: The number of samples per call.
        seed: The seed of all of them.
        data: Data to draw beside them, as the model has them.
        label: The label of all of them; all labels in turn if not given.

    Returns:
        The samples, as the model has them.

    Raises:
        FloatingPointError: If they are not finite.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = [size] * (number // size) + [number % size] * (number % size > 0)
    several, bar_of = len(sizes) > 1, partial(tqdm, desc="samples", unit="batch")
    with finite(run.svi.num_steps), bar_of(sizes, disable=None if several else True) as bar:
        x_0 = torch.cat(
            [
                draw(n, *run.context(n, i * size, label), generator=generator, progress=not several)
                for i, n in enumerate(bar)
            ]
        )
    save_samples(run, path, x_0, data)
    return x_0


def save_samples(run: Run, path: Path, x_0: Tensor, data: Tensor | None = None) -> None:
    """Save samples to a file, and a picture of the first ones beside it.

    Arguments:
        run: The run.
        path: The .npz file.
        x_0: The samples, as the model has them.
        data: Data to draw beside them, likewise.

    Raises:
        FloatingPointError: If the samples are not finite.
    """
    samples = run.form.decoded(x_0)
    if not bool(samples.isfinite().all()):
        raise FloatingPointError(f"samples of the weights of step {run.svi.num_steps} are not finite")
    save_arrays(path, samples=samples)
    place = path.with_suffix(".png")
    if run.form.is_drawable:
        shown = x_0 if run.form.event_shape == (2,) else x_0[:256]
        save_figure(place, picture(run.form, shown, data))
    show(f"{len(x_0)} samples: {path}" + f", {place}" * run.form.is_drawable)


def _write_trajectory(
    run: Run, path: Path, sampler: Sampler, number: int, steps: int | None, seed: int, gif: bool, label: int | None
) -> None:
    """Write the states of the first samples from noise to data, as a strip or an animation."""
    T = run.diffusion.num_steps
    every = (0, *(range(1, T + 1) if steps is None else sampler.spaced(steps)))
    shown = torch.linspace(0, len(every) - 1, min(len(every), 61 if gif else 9)).round().int().tolist()
    times = sorted({every[i] for i in shown}, reverse=True)
    number = min(number, (64 if gif else 6) if run.form.event_shape != (2,) else 2000)
    context = run.context(number, label=label)
    with finite(run.svi.num_steps):
        states = sampler.trajectory(number, *context, num_steps=steps, times=times, generator=seed, progress=True)
    states = torch.stack([run.form.drawable(state) for state in states])
    out = path.with_name(f"{path.stem}-trajectory.{'gif' if gif else 'png'}")
    if gif:
        with tempfile.TemporaryDirectory() as folder:
            plots.animation(states, times).save(Path(folder, out.name), PillowWriter(fps=12))
            write(out, Path(folder, out.name).read_bytes())
    else:
        save_figure(out, plots.trajectory(states, times))
    show(f"from noise to data: {out}")
