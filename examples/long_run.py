"""Training in parts, for the scripts of MNIST: a run that stops after some minutes, and resumes where it stopped.

Its checkpoint holds the whole state of the run, the random states included, so that the parts make one run. The loop
synchronises with a GPU only for a printed line every 200 steps, and for the held-out bound twenty times a run. There is
nothing to run here.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import training
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import pyrodiff
from pyrodiff import checkpoints


def options(description: str, out: str, num_steps: int, batch_size: int) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    parser = training.options(description, num_steps, out)
    cuda = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files, gzipped or not")
    parser.add_argument("--batch", type=int, default=batch_size, help=f"pictures per step (default: {batch_size})")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="train so long, and leave (default: to the end)"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu", help="cuda or cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="compile the step")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=cuda, help="networks in bfloat16")
    parser.add_argument("--small", action="store_true", help="a small network and a shorter chain, for a CPU")
    return parser


def make_svi(diffusion: pyrodiff.Diffusion, arguments: argparse.Namespace, lr: float, average: float) -> pyrodiff.SVI:
    """SVI for a long run: warm-up and a cosine, clipping, a weight average, bfloat16 and a fused AdamW."""
    cuda, warm_up = arguments.device.type == "cuda", min(1000, arguments.steps // 10)
    options = {"fused": True, "capturable": True} if cuda else {}  # so that a compiled step is one CUDA graph
    initial = torch.tensor(lr, device=arguments.device) if cuda else lr
    pair = diffusion.one_step(drawing=pyrodiff.LossSecondMoment(diffusion.num_steps))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (warm_up + 1)) * (1 + math.cos(math.pi * min(1.0, step / arguments.steps))) / 2

    return pyrodiff.SVI(
        pair.model,
        pair.guide,
        lambda parameters: torch.optim.AdamW(parameters, lr=initial, weight_decay=0.01, **options),
        pyrodiff.DiffusionELBO(),
        clip_norm=1000.0 * arguments.batch,
        scheduler=lambda optimizer: LambdaLR(optimizer, rate),
        autocast=torch.bfloat16 if arguments.bfloat16 else None,
        average=pyrodiff.exponential_average(average),
        compile=arguments.compile,
    )


def train(
    svi: pyrodiff.SVI,
    draw: Callable[[int], Tensor],
    measure: Callable[[], tuple[float, float]],
    arguments: argparse.Namespace,
    unit: str,
) -> bool:
    """Continue the run until all steps are taken, or the minutes are over.

    Arguments:
        svi: The result of :func:`make_svi`, before its first step here.
        draw: Draws a batch, on the device.
        measure: The held-out bound of the averaged weights and its standard error.
        arguments: The options.
        unit: The bound's.

    Returns:
        Whether all steps were taken before this call, or there was no limit: whether it is time for the test set.
    """
    path, begun = arguments.out / "checkpoint.pt", time.monotonic()
    kept = checkpoints.restore(path, svi) if path.exists() else {"minutes": 0.0, "curve": []}
    if svi.num_steps >= arguments.steps:
        return True
    total, number, curve = 0.0, 0, kept["curve"]
    while svi.num_steps < arguments.steps and (number == 0 or time.monotonic() - begun < 60 * arguments.minutes):
        total, number = total + svi.step(draw(arguments.batch)), number + 1
        if svi.num_steps % 200 == 0 or number == 10:
            cost, minutes = float(total) / number / arguments.batch, (time.monotonic() - begun) / 60
            print(f"step {svi.num_steps}: {cost:.1f} nats, {number / minutes / 60:.2f} steps a second", flush=True)
        if svi.num_steps % max(arguments.steps // 20, 1) == 0:
            bound, error = measure()
            row = {"minutes": kept["minutes"] + (time.monotonic() - begun) / 60, "step": svi.num_steps}
            curve.append(row | {"held_out": bound, "error": error, "unit": unit, "device": arguments.device.type})
            print(f"step {svi.num_steps}, {row['minutes']:.1f} min: {bound:.4f} ± {error:.4f} {unit}", flush=True)
    checkpoints.save(path, svi, minutes=kept["minutes"] + (time.monotonic() - begun) / 60, curve=curve)
    draw_curve(curve, arguments.out, unit)
    ready = svi.num_steps >= arguments.steps and arguments.minutes == math.inf
    if not ready:
        print(f"left at step {svi.num_steps} of {arguments.steps}: the same command resumes", flush=True)
    return ready


def draw_curve(curve: list[dict], out: Path, unit: str) -> None:
    """The held-out bound against the minutes, as a picture and as JSON lines."""
    (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    columns = ([row[name] for row in curve] for name in ("minutes", "held_out", "error"))
    axes.errorbar(*columns, color="#b5452c", marker="o", ms=3)
    axes.set(xlabel="minutes on the device", ylabel=f"bound, held out ({unit})")
    figure.savefig(out / "curve.png", dpi=130)
