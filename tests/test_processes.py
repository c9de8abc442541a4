"""Two processes with a batch each learn what one would of both batches: on the CPU, by gloo."""

import math
import time
import warnings
from datetime import timedelta
from functools import partial

import loops
import parted
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
import torch.distributed.fsdp
from loops import adam, nothing
from pyro.distributions import TorchDistribution
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyrodiff
from pyrodiff import SVI, DiffusionELBO
from pyrodiff.base import ranks
from pyrodiff.pair import times

B, T = 8, 6  # the batch of one process, and the steps of a diffusion
sgd = partial(loops.sgd, lr=1e-2)


# What is learned.


class Given(TorchDistribution):
    """A law that draws what it was given, whatever the seed."""

    has_rsample, arg_constraints = True, {}
    support = dist.constraints.real

    def __init__(self, value):
        self.value = value
        super().__init__(value.shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return self.value

    def log_prob(self, value):
        return torch.zeros_like(value)


class Middles(pyrodiff.UniformDrawing):
    """u are the middles of equal parts of [0, 1), over the batches of all processes."""

    def uniforms(self, like):
        number, count = (0, 1) if self.share is None else (self.share.number, self.share.count)
        return Given((number + (torch.arange(len(like), dtype=like.dtype) + 0.5) / len(like)) / count)


class Still(dist.Normal):
    """A Gaussian whose draw is a function of its mean."""

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * torch.cos(9 * self.loc)


class StillForward(pyrodiff.GaussianForward):
    """A forward process whose noise is a function of the datum and of t."""

    def marginal(self, x_0, t):
        law = super().marginal(x_0, t).base_dist
        return Still(law.loc, law.scale).to_event(1)


class Network(nn.Module):
    """A network of x_t and t."""

    def __init__(self, norm=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16) if norm else nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, (t / T).to(x.dtype)[:, None]], -1))


LEARNED = {
    "betas": lambda: pyrodiff.LearnedBetaSchedule(pyrodiff.LinearSchedule(T, 0.05, 0.5).beta(torch.arange(1, T + 1))),
    "log SNR": lambda: pyrodiff.LearnedLogSNRSchedule(T, 4.0, -4.0, hidden=8),
}


def diffusion(norm=False, forward=pyrodiff.GaussianForward, learned=None):
    forward = forward(LEARNED[learned]() if learned else pyrodiff.LinearSchedule(T, 0.05, 0.5))
    denoiser = pyrodiff.NoisePrediction(Network(norm), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))


class Regression(nn.Module):
    """A program without draws."""

    def __init__(self, unused=False):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.unused = nn.Parameter(torch.ones(())) if unused else None

    def forward(self, x, also=False):
        mean = self.linear(x).squeeze(-1) * (self.unused if also else 1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))


def by_parameters(x):
    """A program of functions, without draws."""
    weight = pyro.param("weight", lambda: torch.randn(2))
    scale = pyro.param("scale", lambda: torch.rand(()) + 0.5, constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=x.sum(-1))


# What is done, in each process of two, or in one for both (``rank`` is None).


def batch(rank, seed=0, first=B):
    """The data of one process, or of both: the first has so many of the 2 B."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2 * B, 2, generator=generator) * torch.tensor([0.5, 2.0]) + torch.tensor([1.0, -1.0])
    return both if rank is None else both[first:] if rank else both[:first]


def tensors(module):
    """Copies of all parameters, whole, by name."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in parameters.items()}


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def gradients(svi):
    found = [parameter.grad for parameter in svi._gradient.parameters]
    return [(grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone() for grad in found]


def training(rank, compile=False):
    """Twenty steps of a diffusion, from parameters of one's own: batch statistics, learned times, an average."""
    pyro.set_rng_seed(5 + rank)
    model = diffusion(norm=True)
    start = tensors(model)
    pair = model.one_step(drawing=pyrodiff.LossSecondMoment(T, history=2))
    average = partial(AveragedModel, avg_fn=lambda mean, weight, number: 0.7 * mean + 0.3 * weight, use_buffers=True)
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO(), average=average, compile=compile)
    losses = torch.stack([svi.step(batch(rank, seed)) for seed in range(20)])
    return {
        "start": start,
        "end": tensors(model),
        "buffers": buffers(pair),
        "average": {**tensors(svi.average.module), **buffers(svi.average.module)},
        "losses": losses,
        "drawn": int(pair.model.step.drawing.share.drawn),
        "failure": svi._gradient.compiled.failure if compile else None,
    }


def draws(rank, lead=0):
    """What is drawn, all processes having been seeded alike, or each for itself."""
    pyro.set_rng_seed(0 if lead == 0 else rank + lead)
    model = diffusion()
    pair = model.one_step()
    before = torch.get_rng_state()
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO())
    kept = torch.equal(before, torch.get_rng_state())
    drawing = pair.model.step.drawing
    u = [drawing.uniforms(torch.zeros(B, dtype=torch.float64)).sample() for _ in range(5)]
    noise = torch.randn(5)
    svi.step(batch(rank))
    return {"u": torch.stack(u), "noise": noise, "kept": kept, "after": torch.randn(5), "end": tensors(model)}


def same_draws(rank, steps=1, shard=False, learned=None, **options):
    """Steps of a diffusion whose draws are functions of the data."""
    pyro.set_rng_seed(3)
    model = diffusion(forward=StillForward, learned=learned)
    if shard:
        network = model.reverse.denoiser.network
        for part in (network.layers[0], network.layers[2], network):
            torch.distributed.fsdp.fully_shard(part)
    pair = model.one_step(drawing=Middles())
    svi = SVI(pair.model, pair.guide, sgd, DiffusionELBO(), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = torch.stack([svi.step(batch(rank, seed)) for seed in range(steps)])
    evaluated = svi.evaluate_loss(batch(rank, 99))
    return {
        "losses": losses,
        "gradients": gradients(svi),
        "end": tensors(model),
        "evaluated": evaluated,
        "registered": [type(parameter).__name__ for parameter in svi._gradient.parameters],
        "compile": svi.compile,
        "warnings": [str(warning.message) for warning in caught],
    }


def nonfinite(rank, what, accumulate=1):
    """Four batches, of which the last of the second process is not finite."""
    pyro.set_rng_seed(4)
    program = Regression()
    svi = SVI(program, nothing, adam, DiffusionELBO(), nonfinite=what, accumulate=accumulate)
    for seed in range(3):
        svi.step(batch(rank, seed))
    before, taken, bad = tensors(program), svi.num_steps, batch(rank, 3).clone()
    if rank != 0:
        bad[-1] = math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            svi.step(bad)
            said = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
        except FloatingPointError as error:
            said = [str(error)]
    after, now = tensors(program), svi.num_steps
    for seed in range(4, 6):
        svi.step(batch(rank, seed))
    return {"before": before, "after": after, "taken": now - taken, "said": said, "end": tensors(program)}


def regression(rank, compile=False):
    """Ten steps of a program with statistics of the batch."""
    pyro.set_rng_seed(10 + rank)
    program = nn.Module()
    program.norm, program.regression = nn.BatchNorm1d(2), Regression()
    program.forward = lambda x: program.regression(program.norm(x))
    svi = SVI(program, nothing, adam, DiffusionELBO(), compile=compile)
    for seed in range(10):
        svi.step(batch(rank, seed))
    failure = svi._gradient.compiled.failure if compile else None
    return {"end": tensors(program), "buffers": buffers(program), "failure": failure}


def half(rank, shard=False, **options):
    """Steps with gradients in float16, scaled, on the same batches, until one is taken."""
    pyro.set_rng_seed(3)
    model = diffusion(forward=StillForward)
    if shard:
        torch.distributed.fsdp.fully_shard(model.reverse.denoiser.network)
    pair = model.one_step(drawing=Middles())
    svi = SVI(pair.model, pair.guide, sgd, DiffusionELBO(), autocast=torch.float16, **options)
    start = tensors(model)
    while svi.num_steps == 0 and svi._calls < 40:
        svi.step(batch(rank, svi._batches))
    return {"gradients": gradients(svi), "start": start, "end": tensors(model), "scale": svi.scaler.get_scale()}


def partly(rank, shard=False, **options):
    """Steps of a diffusion of which one layer is sharded."""
    pyro.set_rng_seed(3)
    model = diffusion(forward=StillForward)
    if shard:
        torch.distributed.fsdp.fully_shard(model.reverse.denoiser.network.layers[0])
    pair = model.one_step(drawing=Middles())
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO(), clip_norm=5.0, nonfinite="stop", accumulate=2)
    for seed in range(4):
        svi.step(batch(rank, seed))
    return {"gradients": gradients(svi), "end": tensors(model)}


def averaged(rank, shard=False):
    """An average of sharded parameters is made before they are, since torch does not copy what is sharded."""
    pyro.set_rng_seed(3)
    model = diffusion(forward=StillForward)
    pair = model.one_step(drawing=Middles())
    average = AveragedModel(pair.model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    if shard:
        torch.distributed.fsdp.fully_shard(model.reverse.denoiser.network)
        torch.distributed.fsdp.fully_shard(average.module.reverse.denoiser.network)
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO(), average=lambda program: average)
    for seed in range(4):
        svi.step(batch(rank, seed))
    with svi.averaged():
        within = tensors(model)
    return {"average": within, "end": tensors(model)}


def functions(rank, compile=False):
    """A program of functions, whose first values are other ones in each process."""
    pyro.clear_param_store()
    pyro.set_rng_seed(6 + (rank or 0))
    svi = SVI(by_parameters, nothing, sgd, DiffusionELBO(), compile=compile)
    losses = torch.stack([svi.step(batch(rank, seed, first=5)) for seed in range(5)])
    found = {name: pyro.param(name).detach().clone() for name in ("weight", "scale")}
    return {"losses": losses, "end": found, "failure": svi._gradient.compiled.failure if compile else None}


def late(rank):
    """A program that comes upon a parameter at its third step, with other first values in each process."""
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    program = Regression()

    def model(x, late):
        program(x)
        if late:
            value = pyro.param("late", lambda: torch.full((), 1.0 + (rank or 0)))
            pyro.sample("z", dist.Normal(value, 1.0), obs=torch.zeros(()))

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.program = program

        def forward(self, x, late):
            model(x, late)

    svi = SVI(Module(), nothing, sgd, DiffusionELBO())
    for step in range(6):
        svi.step(batch(rank, step), step > 1)
    return {
        "end": {**tensors(program), "late": pyro.param("late").detach().clone()},
    }


def unused(rank, ever):
    """A program with a parameter that has a part in the loss of the second process only, or never."""
    pyro.set_rng_seed(8)
    program = Regression(unused=True)
    svi = SVI(program, nothing, sgd, DiffusionELBO())
    for seed in range(4):
        svi.step(batch(rank, seed), ever and rank == 1 and seed != 2)
    return {"end": tensors(program)}


def wrapped(rank):
    """A pair that is called by functions: its buffers and its drawing are found on the way."""
    pyro.clear_param_store()
    pyro.set_rng_seed(9 + (rank or 0))
    model = diffusion(norm=True)
    pair = model.one_step()
    svi = SVI(lambda x: pair.model(x), lambda x: pair.guide(x), adam, DiffusionELBO())
    for seed in range(3):
        svi.step(batch(rank, seed))
    share = pair.model.step.drawing.share
    return {"end": tensors(model), "buffers": buffers(pair), "share": share and (share.number, share.count, share.key)}


def bounded(rank, learned=None):
    """The bound of a model, in many small batches of network calls, by a seed and from the global source."""
    pyro.set_rng_seed(10)
    model, x_0 = diffusion(learned=learned), torch.randn(7, 2)
    options = {"num_particles": 3, "memory_budget": 12_000, "sharded": True}
    calls = []
    handle = model.reverse.denoiser.network.register_forward_hook(
        lambda module, args, output: calls.append(len(output))
    )
    seeded = pyrodiff.bound(model, x_0, generator=4, **options)
    handle.remove()
    pyro.set_rng_seed(11 + (rank or 0))
    unseeded = pyrodiff.bound(model, x_0, **options)
    loaded = pyrodiff.bound(model, x_0.split(3), generator=4, **options)
    found = {"seeded": seeded, "unseeded": unseeded, "loaded": loaded}
    terms = {name: [one.prior, one.denoising, one.reconstruction] for name, one in found.items()}
    return {**terms, "rows": sum(calls), "calls": len(calls), "source": torch.rand(3)}


EAGER = {
    "bound": bounded,
    "bound, learned": partial(bounded, learned="log SNR"),
    "learned betas": partial(same_draws, steps=5, learned="betas"),
    "learned log SNR": partial(same_draws, steps=4, accumulate=2, learned="log SNR"),
    "learned betas, sharded": partial(same_draws, steps=5, learned="betas", shard=True),
    "training": training,
    "seeded alike": draws,
    "seeded apart": partial(draws, lead=20),
    "a step": same_draws,
    "clipped": partial(same_draws, clip_norm=0.5),
    "accumulated": partial(same_draws, steps=4, accumulate=2),
    "float16": partial(half, clip_norm=10.0),
    "float16, accumulated": partial(half, accumulate=2),
    "float16, sharded": partial(half, shard=True),
    "partly sharded": partial(partly, shard=True),
    "sharded, averaged": partial(averaged, shard=True),
    "regression": regression,
    "five steps": partial(same_draws, steps=5),
    "skipped": partial(nonfinite, what="skip"),
    "stopped": partial(nonfinite, what="stop"),
    "skipped, accumulated": partial(nonfinite, what="skip", accumulate=2),
    "functions": functions,
    "late": late,
    "unused": partial(unused, ever=False),
    "unused in one": partial(unused, ever=True),
    "wrapped": wrapped,
    "sharded": partial(same_draws, steps=5, shard=True, clip_norm=1e6),  # which is above the norm
    "sharded, clipped": partial(same_draws, clip_norm=0.5, nonfinite="stop", shard=True),
    "sharded, accumulated": partial(same_draws, steps=4, accumulate=2, shard=True),
    "sharded, compiled": partial(same_draws, steps=5, compile=True, shard=True),
}
TRACED = {  # the graphs run as they are, since inductor takes half a minute
    "training, compiled": partial(training, compile=True),
    "accumulated, compiled": partial(same_draws, steps=4, accumulate=2, compile=True, clip_norm=5.0),
    "functions, compiled": partial(functions, compile=True),
    "regression, compiled": partial(regression, compile=True),
}


def work(rank, folder):
    """One process of two."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    torch._inductor.compile, found = lambda graph, *args, **kwargs: graph, {}
    for name, job in {**EAGER, **TRACED}.items():
        begun = time.perf_counter()
        found[name] = job(rank)
        print(f"{time.perf_counter() - begun:6.2f} s  {name}", flush=True)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both():
    """What each of two processes finds in all jobs."""
    return parted.both(work)


def same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


def close(ours, theirs):
    """But for rounding in float32."""
    same(ours, theirs, rtol=1e-4, atol=2e-5)


# The claims.


@pytest.mark.parametrize("name", [name for name in (*EAGER, *TRACED) if "seeded" not in name and "bound" not in name])
def test_both_processes_learn_the_same(both, name):
    """To the last bit, and whatever they started from: parameters, gradients, buffers, averages, losses."""
    first, second = (found[name] for found in both)
    for key in ("end", "buffers", "average", "gradients", "losses", "evaluated", "after"):
        if key in first:
            same(first[key], second[key])
    assert not any(value.isnan().any() for value in first["end"].values())


@pytest.mark.parametrize("name", ["training", "training, compiled"])
def test_a_diffusion_is_trained_from_the_parameters_of_the_first(both, name):
    first, second = (found[name] for found in both)
    assert any(not torch.equal(first["start"][key], second["start"][key]) for key in first["start"])
    for key, start in first["start"].items():
        assert 0 < (first["end"][key] - start).abs().max() < 20 * 1.1e-2  # what Adam can do in twenty steps
    assert not first["failure"]
    assert first["drawn"] == second["drawn"] == 20
    counts = [value for key, value in first["buffers"].items() if key.endswith("counts")]
    assert counts
    assert int(counts[0].sum()) == 20 * B
    assert all(int(value) == 20 for key, value in first["buffers"].items() if key.endswith("num_batches_tracked"))
    assert first["losses"][-5:].mean() < first["losses"][:5].mean()


@pytest.mark.parametrize("name", ["seeded alike", "seeded apart"])
def test_each_process_draws_noise_of_its_own(both, name):
    first, second = (found[name] for found in both)
    for key in ("noise", "after"):
        assert (first[key] - second[key]).abs().min() > 1e-4
    same(first["end"], second["end"])
    assert first["kept"]  # who is the only one of a source keeps it
    assert second["kept"] == (name == "seeded apart")


@pytest.mark.parametrize("name", ["seeded alike", "seeded apart"])
def test_times_are_spread_evenly_over_the_batches_of_both(both, name):
    u = torch.cat([found[name]["u"] for found in both], 1).sort(1).values
    assert u.shape == (5, 2 * B)
    assert ((u >= 0) & (u < 1)).all()
    same(u.diff(dim=1), torch.full_like(u[:, 1:], 1 / (2 * B)), rtol=0, atol=1e-12)
    assert u[:, 0].unique().numel() == 5  # and at every step anew


def test_the_number_that_all_have_in_common_is_uniform_and_new_at_every_step():
    n = 20000
    for key in (0, 1, 123456789, 2**31 - 2):
        share = times._Share(0, 2, key)
        one_by_one = torch.stack([share.uniform() for _ in range(5)])
        share.drawn = torch.arange(n)
        u = share.uniform()
        same(u[:5], one_by_one)
        ours, expected = u.sort().values, (torch.arange(n) + 0.5) / n
        assert (ours - expected).abs().max() * math.sqrt(n) < 1.95  # Kolmogorov and Smirnov: one in a thousand
        for lag in (1, 2, 3):
            correlation = ((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean() * 12
            assert abs(correlation) < 5 / math.sqrt(n)
    first = torch.stack([times._Share(0, 2, key).uniform() for key in range(2000)])
    assert (first.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max() * math.sqrt(2000) < 1.95


STILL = ["a step", "clipped", "accumulated", "five steps", "accumulated, compiled", "learned betas", "learned log SNR"]
STILL.append("learned betas, sharded")
SHARDED = ["sharded", "sharded, clipped", "sharded, accumulated", "sharded, compiled"]
OPTIONS = {
    "a step": {},
    "clipped": {"clip_norm": 0.5},
    "accumulated": {"steps": 4, "accumulate": 2},
    "five steps": {"steps": 5},
    "accumulated, compiled": {"steps": 4, "accumulate": 2, "clip_norm": 5.0},
    "sharded": {"steps": 5},
    "sharded, clipped": {"clip_norm": 0.5},
    "sharded, accumulated": {"steps": 4, "accumulate": 2},
    "sharded, compiled": {"steps": 5},
    "learned betas": {"steps": 5, "learned": "betas"},
    "learned log SNR": {"steps": 4, "accumulate": 2, "learned": "log SNR"},
    "learned betas, sharded": {"steps": 5, "learned": "betas"},
}


@pytest.mark.parametrize("name", STILL + SHARDED)
def test_what_is_learned_is_what_one_process_would_of_both_batches(both, name):
    """Where the draws are the same: the loss, its gradient and the parameters are those of the batches joined."""
    together, alone = both[0][name], same_draws(None, **OPTIONS[name])
    for key in ("losses", "evaluated", "gradients", "end"):
        close(together[key], alone[key])


@pytest.mark.parametrize("name", SHARDED)
def test_parameters_are_learned_in_parts_where_they_are_sharded(both, name):
    assert all(found[name]["registered"] == ["DTensor"] * 4 for found in both)


@pytest.mark.parametrize(("job", "learned"), [("bound", None), ("bound, learned", "log SNR")])
def test_the_bound_of_all_is_that_of_one(both, job, learned):
    alone = bounded(None, learned)
    for found in both:
        for name in ("seeded", "loaded"):
            torch.testing.assert_close(found[job][name], alone[name], rtol=1e-6, atol=1e-6)
        assert found[job]["rows"] < 0.7 * alone["rows"]
    assert alone["calls"] > 3
    first, second = (found[job] for found in both)
    torch.testing.assert_close(first["unseeded"], second["unseeded"], rtol=0, atol=0)
    assert not torch.allclose(first["source"], second["source"])  # the sources are where they were


def test_sharded_parameters_are_not_compiled_and_that_is_said(both):
    for found in both:
        (said,) = found["sharded, compiled"]["warnings"]
        assert "sharded" in said
        assert found["sharded, compiled"]["compile"] is False
        assert found["sharded"]["warnings"] == found["a step"]["warnings"] == []


def test_sharded_parameters_are_averaged_where_the_average_was_made_before(both):
    together, alone = both[0]["sharded, averaged"], averaged(None)
    for key in ("average", "end"):
        close(together[key], alone[key])
    assert not torch.allclose(*(next(iter(together[key].values())) for key in ("average", "end")))


def test_some_parameters_may_be_sharded_and_others_not(both):
    together, alone = both[0]["partly sharded"], partly(None)
    for key in ("gradients", "end"):
        close(together[key], alone[key])


@pytest.mark.parametrize(
    ("name", "options"),
    [("float16", {"clip_norm": 10.0}), ("float16, accumulated", {"accumulate": 2}), ("float16, sharded", {})],
)
def test_scaled_gradients_are_those_of_one_process(both, name, options):
    together, alone = both[0][name], half(None, **options)
    for ours, theirs in zip(together["gradients"], alone["gradients"], strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()  # float16 has eleven bits
    for key, start in together["start"].items():
        assert not torch.equal(together["end"][key], start)
    assert both[0][name]["scale"] == both[1][name]["scale"]


@pytest.mark.parametrize(
    ("name", "what", "accumulate"),
    [("skipped", "skip", 1), ("stopped", "stop", 1), ("skipped, accumulated", "skip", 2)],
)
def test_a_loss_that_is_not_finite_in_one_process_is_so_in_all(both, name, what, accumulate):
    alone = nonfinite(None, what, accumulate)
    for found in (entry[name] for entry in both):
        assert found["taken"] == alone["taken"] == accumulate - 1  # of two batches, the finite one is learned from
        assert len(found["said"]) == 1
        assert found["said"] == alone["said"]
        for key in ("before", "after", "end"):
            close(found[key], alone[key])


@pytest.mark.parametrize("name", ["functions", "functions, compiled"])
def test_parameters_of_functions_are_shared(both, name):
    """Also where the batches differ in size."""
    together, alone = both[0][name], functions(None)
    close(together["losses"], alone["losses"])
    close(together["end"], alone["end"])
    assert not together["failure"]


def test_a_parameter_that_is_come_upon_later_is_that_of_the_first(both):
    found = both[0]["late"]
    assert float(found["end"]["late"]) != 1.0


@pytest.mark.parametrize("name", ["unused", "unused in one"])
def test_a_parameter_may_have_no_part_in_the_loss_of_a_process(both, name):
    moved = float(both[0][name]["end"]["unused"]) != 1.0
    assert moved == (name == "unused in one")


@pytest.mark.parametrize("name", ["regression", "regression, compiled"])
def test_statistics_of_the_batch_are_those_of_the_first(both, name):
    generator = [batch(0, seed).mean(0) for seed in range(10)]
    expected = sum(0.1 * 0.9 ** (9 - seed) * mean for seed, mean in enumerate(generator))
    close(both[1][name]["buffers"]["norm.running_mean"], expected)
    assert int(both[1][name]["buffers"]["norm.num_batches_tracked"]) == 10
    assert not both[1][name]["failure"]


def test_a_pair_that_functions_call_is_shared_too(both):
    first, second = (found["wrapped"]["share"] for found in both)
    assert (first[:2], second[:2]) == ((0, 2), (1, 2))
    assert first[2] == second[2]


def test_a_process_alone_has_nothing_of_it():
    model = diffusion()
    pair = model.one_step()
    before = torch.get_rng_state()
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO())
    assert torch.equal(before, torch.get_rng_state())
    svi.step(batch(None))
    assert (ranks.count(), ranks.number()) == (1, 0)
    assert pair.model.step.drawing.share is None
    tensor = torch.tensor([1.0, 2.0])
    assert ranks.together([tensor])[0] is tensor
    assert ranks.all_say(True)
    assert not ranks.all_say(False)
