"""What the examples share: a loop of SVI with a progress bar, and a folder for the pictures."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel
from tqdm import trange

import pyrodiff


def train(
    diffusion: pyrodiff.Diffusion,
    x_0: torch.Tensor | Callable[[int], torch.Tensor],
    num_steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    name: str = "training",
    drawing: pyrodiff.Drawing | None = None,
    average: float = 0.0,
    compile: bool = False,
) -> None:
    """Train by SVI on the one-step pair, the learning rate falling to 0 as a cosine.

    Arguments:
        diffusion: The model, trained in place.
        x_0: The data, with shape (N, *event_shape); or a function that draws so many.
        num_steps: The number of gradient steps.
        batch_size: The number of data a step, drawn with replacement.
        lr: The learning rate at the start.
        weight_decay: AdamW's.
        name: What the progress bar is called.
        drawing: How t is drawn: low discrepancy if not given.
        average: The decay of the running average of the weights, which replaces them in the end; 0 for none.
        compile: Whether the step runs as one compiled graph.
    """
    draw = x_0 if callable(x_0) else lambda size: x_0[torch.randint(len(x_0), (size,))]
    pair = diffusion.one_step(drawing=drawing)
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
        pyrodiff.DiffusionELBO(),
        clip_norm=10.0 * batch_size,
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, num_steps),
        average=(lambda model: AveragedModel(model, multi_avg_fn=_running_average(average))) if average > 0 else None,
        compile=compile,
    )
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


def _running_average(decay: float) -> Callable:
    """As torch.optim.swa_utils has it, but short at the start, so that the first weights are soon forgotten."""

    def update(means: list[torch.Tensor], weights: list[torch.Tensor], number: torch.Tensor) -> None:
        torch._foreach_lerp_(means, weights, 1 - min(decay, (1 + int(number)) / (10 + int(number))))

    return update


def output_folder(description: str) -> Path:
    """The folder given on the command line, made if it is not there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    return folder
