"""On an accelerator that computes on the CPU, all that is computed is what it is on the CPU."""

import contextlib
import functools
import io
import os
import traceback

import accelerator
import numpy as np
import parted
import pyro.distributions as dist
import pytest
import torch
from loops import adam
from models import KINDS
from test_devices import ENTRIES

import pyrodiff
from pyrodiff import datasets, plots
from pyrodiff.command import cli, runs, train
from pyrodiff.likelihood import bounds

DEVICES = ("cpu", accelerator.NAME)
SIZES = "--T 4 --train-steps 4 --batch-size 8 --evaluate-every 4 --evaluate-on 8 --log-every 4 --checkpoint-every 2"
SIZES += " --samples 4 --threads 1 --hidden 8"
NETWORK = " --channels 8 --blocks 1"
TRIED_ON = {  # entries, and kinds of models that they are tried on
    "ode_log_prob": ["levels, softmax", "MLP prediction"],
    "variance_account": ["bits of a sub-chain", "second moment drawing"],
    "verify": ["levels, softmax"],
    "bound of some times": ["levels, discretized", "fixed variance of a sub-chain"],
}
RUNS = {
    "levels": "labelled.npz --labels --augment flip" + NETWORK,
    "a density": "numbers.npy --average 0.9 --drawing loss-second-moment",
}


def data_anywhere(device):
    """What is given data of the accelerator, or of both places."""
    digits, roll = datasets.digits("train")[:60].to(device), datasets.swiss_roll(50).to(device)
    torch.manual_seed(1)
    plots.beside(roll, datasets.swiss_roll(40))
    plots.histograms(roll, datasets.swiss_roll(40))
    yield from (one.costs for one in pyrodiff.yardsticks(digits, datasets.digits("test"), levels=17).values())
    yield from (one.costs for one in pyrodiff.yardsticks(datasets.swiss_roll(50), roll).values())
    yield datasets.swiss_roll_log_prob(roll)
    yield datasets.Strokes(digits)(torch.arange(4, device=device))


def of_entry(entry, name, device):
    diffusion, pair = KINDS[name].pair()
    for part in (pair, diffusion):
        part.to(device)
    torch.manual_seed(1)
    return ENTRIES[entry](diffusion, pair, KINDS[name].data().to(device))


def of_every_entry(name, device):
    entries = ("bound", "importance_bound", "trajectory", "SVI")
    return [value for entry in entries for value in of_entry(entry, name, device)]


def of_results(device):
    """What is made of bounds and flows; a network of the log SNR; a picture of pictures."""
    torch.manual_seed(1)
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(4, 3.0, -3.0))
    time = pyrodiff.networks.LogSNREmbedding(forward.schedule, 8)
    network = pyrodiff.networks.UNet((8, 8), (8,), time=time).to(device)
    yield network(torch.ones(2, 8, 8).to(device), torch.tensor([1, 3]).to(device))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1))
    diffusion, x_0 = pyrodiff.Diffusion(forward, reverse, (2,)).to(device), torch.randn(3, 2).to(device)
    bound = pyrodiff.bound(diffusion, x_0, generator=1)
    yield torch.tensor([bound.total, float(bound.K.mean())])
    yield bound.denoising_mean
    yield from pyrodiff.FlowSampler(diffusion, tolerance=1e-2).with_log_prob(3, generator=1)
    yield pyrodiff.FlowSampler(diffusion, tolerance=1e-2)(3, generator=1)
    plots.samples(torch.rand(4, 8, 8).to(device))


def of_blocks(device):
    """Bounds with blocks of another size, of data at once and in batches, where draws of x_T count."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(3))
    torch.manual_seed(1)
    network, prior = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1), dist.StudentT(5.0, torch.zeros(2).to(device))
    reverse = pyrodiff.GaussianReverse(forward, network)
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,), prior=prior.to_event(1)).to(device)
    x_0 = torch.randn(7, 2).to(device)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_ROWS", "_ROWS_ELSEWHERE"):
            patch.setattr(bounds, name, 2**13)
        for data in (x_0, x_0.split(3)):
            yield pyrodiff.bound(diffusion, data, generator=1).nats
            yield pyrodiff.importance_bound(diffusion, data, num_particles=2, generator=1).nats


def of_a_learned_schedule(device):
    """Its parameters stay on the CPU where there is no float64."""
    torch.manual_seed(1)
    forward = pyrodiff.GaussianForward(pyrodiff.LearnedLogSNRSchedule(4, 3.0, -3.0, hidden=4))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1))
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,)).to(device)
    pair, x_0 = diffusion.one_step(), torch.randn(3, 2).to(device)
    svi = pyrodiff.SVI(pair.model, pair.guide, adam, pyrodiff.DiffusionELBO())
    yield from [svi.step(x_0) for _ in range(2)]
    yield diffusion.model(num_samples=3)
    yield pyrodiff.DDIMSampler(diffusion)(3, generator=1)
    yield datasets.binarize(torch.arange(256).to(device), generator=1)


def in_single_precision(compute, *given):
    """On the accelerator without float64."""
    with accelerator.without_float64():
        return [*compute(*given)]


def of_run(words, device):
    """What a run writes and says, and what the uses of it do."""
    out = f"{words.split()[0]} {device}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for line in (
            ["train", *words.split(), *SIZES.split(), "--device", device, "--out", out],
            ["bound", out, "--device", device, "--number", "5", "--particles", "2", "--save", f"{out}/b.npz"],
            ["sample", out, "--device", device, "--number", "3", "--sample-steps", "3", "--save", f"{out}/s.npz"],
        ):
            assert cli.main(line) == 0, line
    arrays = [array for name in "bs" for array in np.load(f"{out}/{name}.npz").values()]
    return [torch.from_numpy(array) for array in arrays if array.dtype.kind in "fiu"]


MADE = {
    **{f"{name}, {entry}": (of_entry, entry, name) for entry in TRIED_ON for name in TRIED_ON[entry]},
    "data": (data_anywhere,),
    "what is made of results": (of_results,),
    "other blocks": (of_blocks,),
    "a learned schedule": (of_a_learned_schedule,),
}
EVERY = {name: (of_every_entry, name) for name in KINDS}
GROUPS = {
    "every kind": EVERY,
    "every kind, without float64": {name: (in_single_precision, *given) for name, given in EVERY.items()},
    "more": MADE,
    "more, without float64": {name: (in_single_precision, *given) for name, given in MADE.items()},
    "a run": {name: (of_run, words) for name, words in RUNS.items()},
}


def outcome(compute, *given):
    """What the two devices give, or what went wrong."""
    try:
        return [[value.detach().cpu() for value in compute(*given, device)] for device in DEVICES]
    except Exception:
        return traceback.format_exc()


def half(group, rank, folder):
    """Every second of a group, in a process of its own."""
    accelerator.begin()
    runs.device_of = train.device_of = torch.device
    os.mkdir(f"{folder}/of {rank}")
    os.chdir(f"{folder}/of {rank}")
    np.save("numbers.npy", np.random.default_rng(0).normal(size=(60, 2)))
    pictures = np.random.default_rng(0).integers(0, 256, size=(60, 8, 8)).astype(np.uint8)
    np.savez("labelled.npz", x=pictures, y=np.arange(60) % 3)
    computed = GROUPS[group]
    torch.save({name: outcome(*computed[name]) for name in list(computed)[rank::2]}, f"{folder}/{rank}")


@functools.cache
def outcomes(group):
    first, second = parted.both(functools.partial(half, group))
    return {**first, **second}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in GROUPS[group]])
def test_it_is_what_it_is_on_a_cpu(group, name):
    found = outcomes(group)[name]
    assert isinstance(found, list), found
    here, there = found
    assert here or "verify" in name
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-12)
