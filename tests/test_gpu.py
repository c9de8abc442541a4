"""On a GPU everything is what it is on a CPU, and steps do not wait for it. (Captured steps: test_compilation.py.)"""

import copy
import functools

import pyro
import pytest
import torch
from gpu import DrawnOnTheCPU, on_a_gpu
from models import KINDS, SIZE
from test_compilation import Network, agree, make, twins
from test_devices import ENTRIES, SOME

import pyrodiff
from pyrodiff import checkpoints
from pyrodiff.likelihood import bounds
from pyrodiff.running.evaluation import _memory

pytestmark = on_a_gpu
EXACT = {"rtol": 1e-8, "atol": 1e-9}
every_kind = pytest.mark.parametrize("name", KINDS)


def placed(name, device, dtype=torch.float64):
    """A model and its data."""
    diffusion, pair = KINDS[name].pair()
    pair.to(device, dtype)
    diffusion.to(device, dtype)
    return diffusion, pair, KINDS[name].data().to(device, dtype)


def adam(parameters, lr=1e-2):
    """What a CUDA graph can hold."""
    parameters = list(parameters)
    rate = torch.tensor(lr, device=parameters[0].device)
    return torch.optim.Adam(parameters, lr=rate, capturable=parameters[0].is_cuda)


def still(parameters):
    return adam(parameters, lr=0.0)


# The same draws, the same numbers


@pytest.fixture
def same_blocks(monkeypatch):
    """A bound's draws are in the blocks that they are in on a CPU."""
    monkeypatch.setattr(bounds, "_ROWS_ELSEWHERE", bounds._ROWS)
    monkeypatch.setattr(bounds, "_NUMBERS_ELSEWHERE", bounds._NUMBERS)


@every_kind
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_gives_what_it_gives_on_a_cpu(entry, name, same_blocks):
    if (entry == "ode_log_prob" and not KINDS[name].has_flow) or (entry == "verify" and name not in SOME[:2]):
        pytest.skip("it has no flow, or takes its time")
    found = []
    for device in ("cpu", "cuda"):
        parts = placed(name, device)
        with DrawnOnTheCPU():
            found.append([value.cpu() for value in ENTRIES[entry](*parts)])
    torch.testing.assert_close(*found, **EXACT)


@every_kind
def test_every_entry_is_what_it_is_in_single_precision(name, same_blocks):
    found = []
    for device in ("cpu", "cuda"):
        parts = placed(name, device, torch.float32)
        with DrawnOnTheCPU():
            found.append([value.cpu() for value in [*ENTRIES["bound"](*parts), *ENTRIES["SVI"](*parts)]])
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["MLP prediction", "levels, softmax", "bits", "levels, discretized"])
def test_what_is_compiled_draws_what_it_draws_uncompiled(name):
    diffusion, *_ = placed(name, "cuda")
    samplers = [pyrodiff.AncestralSampler(diffusion, compile=compiled) for compiled in (False, True)]
    many = [sampler(4000, generator=1) for sampler in samplers]
    assert all(x.shape == (4000, SIZE) for x in many)
    if KINDS[name].is_of_bits:  # inductor draws bits in a way of its own
        error = (many[0].var(0) / 4000 + many[1].var(0) / 4000).sqrt()
        assert ((many[0].mean(0) - many[1].mean(0)).abs() < 5 * error).all()
    else:
        torch.testing.assert_close(*many, **EXACT)


# Steps


COMPILED = {
    "dropout and batch statistics": lambda: (make(Network(dropout=0.4, norm=True)).one_step(), torch.randn(6, 2)),
    **{
        kind: functools.partial(lambda kind: (KINDS[kind].pair()[1].double(), KINDS[kind].data()), kind)
        for kind in ("MLP prediction", "levels, softmax", "second moment drawing")
    },
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_step_that_is_compiled_and_captured_is_the_step(name):
    pair, x_0 = COMPILED[name]()
    svis = twins(
        pair.to("cuda"),
        adam,
        clip_norm=5.0,
        average=pyrodiff.exponential_average(0.7),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
    )
    losses = agree(svis, [[x_0.double().to("cuda")]] * 10, tolerance=EXACT)
    assert len(set(losses)) == 10
    torch.testing.assert_close(*(dict(svi.average.named_parameters()) for svi in svis), **EXACT)
    assert [replayed is not None for _, replayed, _ in svis[0]._captures._replays.values()] == [True]


@pytest.mark.parametrize("name", [*COMPILED, "bits"])
def test_captured_steps_draw_anew_each_time_as_the_steps_do(name):
    """Without a seed for each: their losses, at weights that stay, have the mean and the spread of the loss."""
    pair, x_0 = COMPILED[name]() if name in COMPILED else (KINDS[name].pair()[1].double(), KINDS[name].data())
    pair, x_0, found = pair.to("cuda"), x_0.double().to("cuda"), []
    for svi, number in zip(twins(pair, still), (4000, 1000), strict=True):
        found.append(torch.stack([svi.step(x_0) for _ in range(number)])[8:].cpu())
        if name != "bits":
            assert len(found[-1].unique()) > 0.9 * number
    means, errors = zip(*((x.mean(), x.std() / len(x) ** 0.5) for x in found), strict=True)
    assert abs(means[0] - means[1]) < 5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    spreads = [x.std() for x in found]
    assert 0.8 < spreads[0] / spreads[1] < 1.25
    together = found[0] - found[0].mean()
    assert abs((together[1:] * together[:-1]).mean() / together.var()) < 5 / len(together) ** 0.5


def test_a_rate_on_the_cpu_is_followed():
    """Where it is part of a graph it would stay what it was."""
    svis = twins(make().one_step().to("cuda"), lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), capturable=True))
    with pytest.warns(RuntimeWarning, match="on several devices"):
        agree(svis, [[torch.randn(6, 2).double().to("cuda")]] * 8, tolerance=EXACT)
    for svi in svis:
        svi.optimizer.param_groups[0]["lr"].mul_(0.1)
    agree(svis, [[torch.randn(6, 2).double().to("cuda")]] * 8, tolerance=EXACT)


@every_kind
def test_a_step_does_not_wait_for_the_gpu(name):
    _, pair, x_0 = placed(name, "cuda", torch.float32)
    options = {"clip_norm": 5.0, "average": pyrodiff.exponential_average()}
    svi = pyrodiff.SVI(pair.model, pair.guide, adam, pyrodiff.DiffusionELBO(), **options)
    for _ in range(3):
        svi.step(x_0)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            svi.step(x_0)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_under_autocast_are_near(dtype, compiled):
    """The mean of many losses at weights that stay, of other draws: within a tenth of that in single precision."""
    network = pyrodiff.networks.UNet((8, 8), (8, 16), hidden=32).cuda()
    x_0, means = torch.randn(32, 8, 8, device="cuda"), []
    for autocast in (None, dtype):
        forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(20)).cuda()
        denoiser = pyrodiff.NoisePrediction(copy.deepcopy(network), forward)
        diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (8, 8)).cuda()
        pair = diffusion.one_step()
        svi = pyrodiff.SVI(pair.model, pair.guide, still, pyrodiff.DiffusionELBO(), autocast=autocast, compile=compiled)
        losses = torch.stack([svi.step(x_0) for _ in range(100)])
        assert losses.isfinite().all()
        assert losses.dtype == torch.float32
        means.append(float(losses.mean()))
        gradients = [parameter.grad for parameter in pair.model.parameters() if parameter.requires_grad]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert means[1] == pytest.approx(means[0], rel=0.1)


# A run that is moved


def test_a_run_on_a_gpu_is_resumed_there_and_on_a_cpu(tmp_path):
    """On the GPU with the same draws; on the CPU from the same weights, averages and state of the optimizer."""
    pair, x_0 = COMPILED["MLP prediction"]()

    def started(device):
        there = copy.deepcopy(pair).to(device)
        average = pyrodiff.exponential_average(0.7)
        return pyrodiff.SVI(there.model, there.guide, adam, pyrodiff.DiffusionELBO(), average=average)

    svi, x_0 = started("cuda"), x_0.double()
    for _ in range(5):
        svi.step(x_0.cuda())
    checkpoints.save(tmp_path / "run.pt", svi)
    expected = torch.stack([svi.step(x_0.cuda()) for _ in range(4)])
    pyro.set_rng_seed(99)
    again = started("cuda")
    checkpoints.restore(tmp_path / "run.pt", again)
    assert torch.equal(expected, torch.stack([again.step(x_0.cuda()) for _ in range(4)]))
    found = []
    for device in ("cuda", "cpu"):
        moved = started(device)
        checkpoints.restore(tmp_path / "run.pt", moved)
        torch.manual_seed(5)
        with DrawnOnTheCPU():
            losses = [moved.step(x_0.to(device)).cpu() for _ in range(4)]
        found.append([*losses, *(value.cpu() for value in moved.average.state_dict().values())])
    torch.testing.assert_close(*found, **EXACT)


def test_data_elsewhere_are_refused_by_name():
    diffusion, pair, x_0 = placed("MLP prediction", "cuda")
    svi = pyrodiff.SVI(pair.model, pair.guide, adam, pyrodiff.DiffusionELBO())
    for call in (
        lambda: pyrodiff.bound(diffusion, x_0.cpu()),
        lambda: svi.step(x_0.cpu()),
        lambda: pyrodiff.importance_bound(diffusion, x_0.cpu(), num_particles=2),
        lambda: pyrodiff.ode_log_prob(diffusion, x_0.cpu()),
    ):
        with pytest.raises(ValueError, match="cuda"):
            call()


def test_a_bound_takes_its_part_of_the_memory():
    """And is the same up to rounding with a budget that is given."""
    diffusion, _, x_0 = placed("MLP prediction", "cuda")
    free, whole = torch.cuda.mem_get_info()
    assert 2**28 <= _memory(x_0.device) <= max(2**28, whole / 8)
    if free > whole / 2:
        assert _memory(x_0.device) > whole / 16
    by_itself, given = (pyrodiff.bound(diffusion, x_0, memory_budget=m, generator=1).nats for m in (None, 2**16))
    torch.testing.assert_close(by_itself, given, **EXACT)
