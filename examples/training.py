"""What the examples share: a loop of SVI with a progress bar, the command line, pictures in a grid; nothing to run."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import trange

import pyrodiff
from pyrodiff import plots


def train(
    diffusion: pyrodiff.Diffusion,
    x_0: torch.Tensor | Callable[[int], torch.Tensor],
    num_steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    name: str = "training",
    drawing: pyrodiff.Drawing | None = None,
    weighting: Callable[[torch.Tensor], torch.Tensor] | None = None,
    average: float = 0.0,
    compile: bool = False,
) -> None:
    """Train by SVI on the one-step pair, the learning rate falling to 0 as a cosine.

    Arguments:
        diffusion: The model, trained in place.
        x_0: The data, with shape (N, *event_shape); or a function that draws a given number.
        num_steps: The number of gradient steps.
        batch_size: The number of data per step, drawn with replacement.
        lr: The learning rate at the start.
        weight_decay: AdamW's.
        name: What the progress bar is called.
        drawing: How t is drawn: low discrepancy if not given.
        weighting: The weights of the steps: those of the bound if not given.
        average: The decay of the running average of the weights, which replaces them in the end; 0 for none.
        compile: Whether the step runs as one compiled graph.
    """
    draw = x_0 if callable(x_0) else lambda size: x_0[torch.randint(len(x_0), (size,))]
    pair = diffusion.one_step(drawing, weighting)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
        pyrodiff.DiffusionELBO(),
        clip_norm=10.0 * batch_size,
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, num_steps),
        average=pyrodiff.exponential_average(average) if average > 0 else None,
        compile=compile,
    )
    choose_threads(copy.deepcopy(diffusion).one_step(drawing, weighting), draw, batch_size)
    diffusion.train()
    running = None
    with trange(num_steps, desc=name, unit="step", mininterval=0.5) as bar:
        for step in bar:
            loss = svi.step(draw(batch_size)) / batch_size
            running = loss if running is None else 0.99 * running + 0.01 * loss
            if step % 50 == 49:
                bar.set_postfix_str(f"bound {float(running):.3f} nats")
    diffusion.eval()
    if average > 0:
        svi.adopt_average()


def choose_threads(pair: pyrodiff.OneStep, draw: Callable[[int], torch.Tensor], batch_size: int) -> None:
    """Use the number of threads with which a step of a copy of this pair is fastest; print it if it matters."""

    def work() -> None:
        pyrodiff.DiffusionELBO().differentiable_loss(pair.model, pair.guide, draw(batch_size)).backward()

    number, most = pyrodiff.fastest_threads(work), torch.get_num_threads()
    if most > 1:
        print(f"threads: {number} of {most}, the fastest for this network")
    torch.set_num_threads(number)


def options(description: str, num_steps: int | None = None, out: str = "out") -> argparse.ArgumentParser:
    """The options of an example: a folder for its pictures and, if there is a default, the number of steps."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=folder, default=out, help=f"folder for the pictures (default: {out})")
    if num_steps is not None:
        parser.add_argument("--steps", type=int, default=num_steps, help=f"gradient steps (default: {num_steps})")
    return parser


def folder(name: str) -> Path:
    """The folder of that name, made if it is not there."""
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def draw_pictures(pictures: dict[str, torch.Tensor], path: Path, columns: int = 8) -> None:
    """Grids of pictures, with shape (n, H, W) and values in [0, 1], side by side under their titles, as a file."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    for axes, (title, x) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        plots.bits(x, axes, columns=columns).set_title(title)
    figure.savefig(path, dpi=130)
