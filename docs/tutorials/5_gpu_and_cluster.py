r"""
On a GPU, and on several
========================

What changes on the way from a laptop to a GPU and to a cluster: a device, a few options of SVI, a checkpoint, a
launcher.

The model does not change, and neither does the bound. This page runs small and on the CPU, as all of these pages do;
the lines that need a GPU or a compiler's patience are shown and not run, and say so.
"""

# %%
# One program for both
# --------------------
#
# A diffusion is a ``torch.nn.Module`` and moves like one, its schedule's tables with it. Data have to be where the
# model is. Make the pair after the move.

import contextlib
import io
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyrodiff
from pyrodiff import checkpoints, datasets, networks
from pyrodiff.command.cli import main

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pyro.set_rng_seed(0)
data, test_set = (
    datasets.swiss_roll(20000, seed=1).to(device),
    datasets.swiss_roll(500, seed=2).to(device),
)


def build():
    forward = pyrodiff.GaussianForward(
        pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0)
    )
    denoiser = pyrodiff.VelocityPrediction(
        networks.MLP(event_shape=(2,), hidden=32, num_blocks=1), forward
    )
    reverse = pyrodiff.GaussianReverse(forward, denoiser)
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,)).to(device)


# %%
# What a longer training needs
# ----------------------------
#
# Each option is off unless it is given (:doc:`/training` has all of them).
#
# - ``autocast=torch.bfloat16``: networks compute in bfloat16 where that does no harm. Parameters, the kernels and the
#   bound stay in float32.
# - ``average``: a moving average of the weights, which is what one samples from and scores.
# - ``fused=True``: the optimizer's arithmetic in one kernel.


def svi_of(diffusion):
    pair = diffusion.one_step()
    return pyrodiff.SVI(
        pair.model,
        pair.guide,
        partial(torch.optim.AdamW, lr=3e-3, fused=True),
        pyrodiff.DiffusionELBO(),
        clip_norm=2560.0,  # of the gradient of the loss, which is a sum over the batch
        scheduler=partial(CosineAnnealingLR, T_max=300),
        autocast=torch.bfloat16,
        average=pyrodiff.exponential_average(0.99),
    )


def train(svi, num_steps):
    batches = (
        data[torch.randint(len(data), (256,), device=device)] for _ in range(num_steps)
    )
    return torch.stack([svi.step(batch) / 256 for batch in batches])


diffusion = build()
svi = svi_of(diffusion)
losses = train(svi, 150)
print(f"{svi.num_steps} steps, the last loss is {float(losses[-1]):.3f} nats per datum")

# %%
# ``svi.step`` returns a tensor that is still on the device. Reading its value synchronises with the device, so do that
# now and then, not at each step.
#
# Stop, and go on
# ---------------
#
# A checkpoint holds the whole state of a run: weights and their average, optimizer, scheduler, counts, and the RNG
# states. It is written atomically, and loading one cannot run code. Here a run continues for 150 steps; another, in a
# new model, resumes from the checkpoint; on a CPU they are the same bit for bit.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "run.pt")
    checkpoints.save(path, svi, epoch=1)
    left_alone = train(svi, 150)

    again = build()
    resumed = svi_of(again)
    more = checkpoints.restore(path, resumed)
    print("restored:", more, "after", resumed.num_steps, "steps")
    gone_on = train(resumed, 150)

print("the same losses: ", torch.equal(gone_on, left_alone))
weights = zip(diffusion.reverse.parameters(), again.reverse.parameters(), strict=True)
print("the same weights:", all(torch.equal(one, other) for one, other in weights))

figure = Figure(figsize=(6, 2.6), layout="constrained")
axes = figure.subplots()
axes.plot(
    range(1, 301),
    torch.cat([losses, left_alone]).cpu(),
    color="#1f4e79",
    label="the run",
)
axes.plot(
    range(151, 301), gone_on.cpu(), ":", color="#b5452c", label="from the checkpoint"
)
axes.axvline(150, color="#888888", linewidth=1)
axes.set(xlabel="step", ylabel="nats per datum", ylim=(0, 5))
axes.legend(frameon=False)

# %%
# The bound of the averaged weights, of data on the model's device; the batches of a loader are moved there. On a GPU a
# batch of network calls is as large as an eighth of its memory allows, or a ``memory_budget`` that is given.

with svi.averaged():
    print(pyrodiff.bound(diffusion, test_set, generator=0))

# %%
# One graph
# ---------
#
# With ``compile=True`` the loss of the pair and its gradient become one compiled graph: the second step takes some
# seconds to compile, and the rest are faster. With ``capturable=True`` in the optimizer the whole step is a CUDA graph,
# so that the GPU does not wait for Python: 12.4 ms for 16.7, of a U-Net of 10.8 million parameters on an H200. (Not run
# here.)
#
# .. code-block:: python
#
#    svi = pyrodiff.SVI(
#        pair.model,
#        pair.guide,
#        partial(torch.optim.AdamW, lr=torch.tensor(3e-3, device=device), fused=True, capturable=True),
#        pyrodiff.DiffusionELBO(),
#        autocast=torch.bfloat16,
#        compile=True,
#    )
#    sampler = pyrodiff.AncestralSampler(diffusion, compile=True)
#
# Several processes
# -----------------
#
# Under ``torchrun`` the same script is run by several processes, a GPU each. If a process group is initialised, SVI
# starts all processes from the same weights, each draws its own times and noise for its own batch, and the update is
# that of all batches together. ``bound(..., sharded=True)`` splits the work of the bound, and gives each process the
# same bound as one alone. Here is a whole script:

script = """
import os
from functools import partial

import torch

import pyrodiff
from pyrodiff import datasets, networks

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
number, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(number)

forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0))
denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=32, num_blocks=1), forward)
reverse = pyrodiff.GaussianReverse(forward, denoiser)
diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,)).to(device)
pair = diffusion.one_step()
svi = pyrodiff.SVI(pair.model, pair.guide, partial(torch.optim.AdamW, lr=3e-3), pyrodiff.DiffusionELBO())

x_0 = datasets.swiss_roll(20000, seed=1).to(device)
for _ in range(50):
    loss = svi.step(x_0[torch.randint(len(x_0), (256 // count,), device=device)])  # summed over all processes

test_set = datasets.swiss_roll(100, seed=2).to(device)
shared = pyrodiff.bound(diffusion, test_set, generator=0, sharded=True)
alone = pyrodiff.bound(diffusion, test_set, generator=0)
if number == 0:
    print(f"{count} processes, {svi.num_steps} steps")
    print("bound, the work shared:", f"{float(shared.nats.mean()):.4f}", "alone:", f"{float(alone.nats.mean()):.4f}")
torch.distributed.destroy_process_group()
"""

# %%
# ``torchrun --standalone --nproc-per-node 2 script.py`` runs it twice on this machine.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "script.py")
    path.write_text(script)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run([*launcher, str(path)], capture_output=True, text=True)
print(done.stdout if done.returncode == 0 else done.stderr)
if done.returncode:
    raise RuntimeError("the processes failed")

# %%
# On a cluster the launcher is told of the machines, and the script stays as it is. Each machine runs, under Slurm say,
#
# .. code-block:: sh
#
#    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$FIRST_MACHINE:29500" script.py
#
# All processes call ``checkpoints.save``, and the first one writes; all call ``restore``.
#
# The command line
# ----------------
#
# For data of the package, or files of your own, there is a command for all of this. It trains, evaluates on held-out
# data, keeps checkpoints and writes a report into a folder (:doc:`/command`).
#
# .. code-block:: sh
#
#    pyrodiff train digits --device cuda --compile --autocast bfloat16 --out runs/digits
#    pyrodiff train --out runs/digits --resume    # go on where it was killed
#    torchrun --standalone --nproc-per-node 8 -m pyrodiff train pictures/ --out runs/pictures
#    pyrodiff bound runs/digits
#    pyrodiff sample runs/digits
#
# A small run on the CPU, by ``main``, which the shell's ``pyrodiff`` calls. What it says meanwhile is not shown.

with tempfile.TemporaryDirectory() as folder:
    roll = Path(folder, "roll")
    command = "train swiss-roll --train-steps 100 --evaluate-every 50 --hidden 32 --average 0".split()
    more = "--device cpu --threads 1 --final-times 10 --samples 200".split()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*command, *more, "--out", str(roll)])
    if code:
        raise RuntimeError(said.getvalue())
    print(*sorted(path.name for path in roll.iterdir()), sep="\n")
    print(pyrodiff.Bound.load(roll / "bound.npz"))
