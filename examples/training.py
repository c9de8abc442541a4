"""What the examples share: a loop of SVI with a progress bar, and a folder for the pictures."""

import argparse
import math
from pathlib import Path

import torch
from tqdm import trange

import pyrodiff


def train(
    diffusion: pyrodiff.Diffusion,
    x_0: torch.Tensor,
    num_steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    name: str = "training",
) -> None:
    """Train by SVI on the one-step pair, the learning rate falling to 0 as a cosine.

    Arguments:
        diffusion: The model, trained in place.
        x_0: The data, with shape (N, *event_shape).
        num_steps: The number of gradient steps.
        batch_size: The number of data a step, drawn with replacement.
        lr: The learning rate at the start.
        weight_decay: AdamW's.
        name: What the progress bar is called.
    """
    pair = diffusion.one_step(drawing=pyrodiff.LowDiscrepancyDrawing())
    svi = pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
        pyrodiff.DiffusionELBO(),
        clip_norm=10.0 * batch_size,
    )
    diffusion.train()
    running = None
    with trange(num_steps, desc=name, unit="step", mininterval=0.5) as bar:
        for step in bar:
            loss = svi.step(x_0[torch.randint(len(x_0), (batch_size,))]) / batch_size
            running = loss if running is None else 0.99 * running + 0.01 * loss
            for group in svi.optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * (step + 1) / num_steps)) / 2
            if step % 50 == 49:
                bar.set_postfix_str(f"bound {float(running):.3f} nats")
    diffusion.eval()


def output_folder(description: str) -> Path:
    """The folder given on the command line, made if it is not there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    return folder
