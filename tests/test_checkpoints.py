"""A run that goes on from a file is, to the last bit, the one that was left; and the file is whole or not there."""

import copy
import errno
import math
import os
import pickle
import random
import re
import resource
import secrets
import signal
import time
import zipfile
from datetime import timedelta
from functools import partial

import numpy as np
import parted
import pyro
import pyro.distributions as dist
import pytest
import torch
from loops import adam, nothing, pair_of, sgd
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyrodiff
from pyrodiff import SVI, DiffusionELBO, checkpoints
from pyrodiff.base import ranks
from pyrodiff.base.files import plainly, printable
from pyrodiff.base.randomness import kept_sources, sources

T = 4


def data(size, seed=0):
    generator = torch.Generator().manual_seed(size + 10 * seed)
    return torch.randn(size, 2, generator=generator) * torch.tensor([0.5, 2.0]) + torch.tensor([1.0, -1.0])


def named_ema(model, **options):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), **options)


class Network(nn.Module):
    """A network of x_t and t that drops units, and may keep statistics of the batch."""

    def __init__(self, hidden=8, norm=False, dropout=0.3, depth=1):
        super().__init__()
        parts = [[nn.Linear(3 if i == 0 else hidden, hidden), nn.SiLU(), nn.Dropout(dropout)] for i in range(depth)]
        norms = [nn.BatchNorm1d(hidden)] if norm else []
        self.layers = nn.Sequential(*[layer for part in parts for layer in part], *norms, nn.Linear(hidden, 2))

    def forward(self, x, t):
        t = torch.as_tensor(t / T, dtype=x.dtype).expand(len(x))
        return self.layers(torch.cat([x, t[:, None]], -1))


def diffusion(network=None, schedule=None):
    forward = pyrodiff.GaussianForward(schedule or pyrodiff.LinearSchedule(T, 0.05, 0.5))
    denoiser = pyrodiff.NoisePrediction(network or Network(), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))


def of_pair(one_step=True, optim=adam, drawing=None, network=None, schedule=None, **options):
    model = diffusion(network and network(), schedule and schedule())
    pair = model.one_step(drawing and drawing()) if drawing else pair_of(model, one_step)
    return SVI(pair.model, pair.guide, optim, DiffusionELBO(), **options)


# Programs that are no diffusion


class Line(nn.Module):
    """p(y | x), observed, with noise of the sources of NumPy and of Python, and a mean of the batches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.mul_(0.5).add_(x.mean())
        noise = float(np.random.normal(0.3, 0.2)) + random.gauss(0.2, 0.1)
        mean = self.linear(x[:, :1]).squeeze(-1) + noise + self.seen
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x[:, 1])


class Constrained(PyroModule):
    """With a positive parameter, and a weight that is random."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.5) + torch.rand(()), constraint=constraints.positive)
        self.weight = PyroSample(dist.Normal(0.4, 1.0))

    def forward(self, x):
        mean = x[:, 0] * self.weight
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=x[:, 1])


def guide_of_weight(x):
    mean, scale = pyro.param("mean", lambda: torch.rand(())), pyro.param("s", torch.ones(()), constraints.positive)
    pyro.sample("weight", dist.Normal(mean, scale))


def functions():
    """Functions that close over modules, one of which Pyro is told of, and have parameters of their own."""
    norm, network, head = nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.4)), nn.Linear(4, 1)

    def model(x):
        pyro.module("head", head)
        scale = pyro.param("scale", lambda: torch.rand(()) + 0.5, constraints.positive)
        mean = head(nn.Tanh()(network(norm(x)))).squeeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 1.0))
            pyro.sample("y", dist.Normal(mean + z, scale), obs=x[:, 1])

    def guide(x):
        slope = pyro.param("slope", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, 0.8))

    return SVI(model, guide, adam, DiffusionELBO(), clip_norm=3.0)


def wrapped():
    pair = diffusion(Network(norm=True)).one_step(pyrodiff.LossSecondMoment(T, history=1))
    return SVI(lambda x: pair.model(x), lambda x: pair.guide(x), adam, DiffusionELBO())


class Mixed(nn.Module):
    """A module that also has a parameter of Pyro's own, which only shows when it runs."""

    def __init__(self, late=False, shape=()):
        super().__init__()
        self.linear, self.late, self.shape = nn.Linear(2, 1), late, shape

    def forward(self, x):
        mean, log = self.linear(x).squeeze(-1), torch.zeros(())
        if not self.late or len(x) < 8:
            log = pyro.param("log", lambda: torch.rand(self.shape)).sum()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, log.exp()), obs=x[:, 1])


class Lazy(Mixed):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(1)


def two_groups(parameters):
    """Decay for matrices only, as is usual."""
    groups = [[p for p in parameters if (p.dim() > 1) is flat] for flat in (True, False)]
    return torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.3}, {"params": groups[1]}], lr=1e-2)


def by_average_guide(kind=AutoNormal):
    model = Constrained()
    return SVI(model, kind(model), adam, DiffusionELBO())


def by_numpy(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda k: np.cos(0.1 * k))


def sequence(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.CosineAnnealingLR(optimizer, 4)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def skipping():
    """Every batch of five data has a loss that is not finite."""

    class Skipping(Mixed):
        def forward(self, x):
            super().forward(x * math.nan if len(x) == 5 else x)

    return SVI(Skipping(), nothing, adam, DiffusionELBO(), nonfinite="skip", validate=False)


ALL = {
    "clip_norm": 2.0,
    "accumulate": 2,
    "average": pyrodiff.exponential_average(0.8),
    "nonfinite": "skip",
    "scheduler": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
}
BATCH_NORM = partial(Network, norm=True)
MOMENTS = partial(pyrodiff.LossSecondMoment, T, history=1)
RUNS = {
    "one step": of_pair,
    "trajectory": partial(of_pair, one_step=False),
    "one step, all options": partial(of_pair, **ALL),
    "trajectory, all options": partial(of_pair, one_step=False, **ALL),
    "moments, statistics": partial(of_pair, drawing=MOMENTS, network=BATCH_NORM, average=named_ema),
    "statistics, averaged too": partial(
        of_pair, one_step=False, network=BATCH_NORM, average=partial(named_ema, use_buffers=True)
    ),
    "uniform": partial(of_pair, drawing=pyrodiff.UniformDrawing),
    "float16": partial(of_pair, autocast=torch.float16, clip_norm=5.0),
    "bfloat16": partial(of_pair, autocast=torch.bfloat16),
    "checked always": partial(of_pair, validate=True),
    "checked never": partial(of_pair, validate=False, one_step=False),
    "sgd": partial(of_pair, optim=partial(torch.optim.SGD, lr=0.001, momentum=0.9, nesterov=True)),
    "rate as a tensor": partial(
        of_pair,
        optim=lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
        scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    ),
    "plateau": partial(of_pair, scheduler=partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5)),
    "milestones": partial(of_pair, scheduler=lambda o: lr_scheduler.MultiStepLR(o, [2, 7, 7])),
    "rate of NumPy's": partial(of_pair, scheduler=by_numpy),
    "schedulers in sequence": partial(of_pair, scheduler=sequence),
    "NumPy and Python": lambda: SVI(Line(), nothing, adam, DiffusionELBO()),
    "random weights": lambda: SVI(Constrained(), guide_of_weight, adam, DiffusionELBO()),
    "automatic guide": by_average_guide,
    "functions": functions,
    "pair in functions": wrapped,
    "module and store": lambda: SVI(Mixed(), nothing, adam, DiffusionELBO(), average=named_ema),
    "groups": lambda: SVI(Mixed(), nothing, two_groups, DiffusionELBO()),
    "groups of a pair": partial(of_pair, optim=two_groups),
    "lazy": lambda: SVI(Lazy(), nothing, adam, DiffusionELBO()),
    "skipping": skipping,
}
SIZES = [8, 8, 5, 8, 8, 8, 5, 8, 3, 8, 8, 5]  # six before, with a short one that comes again, and one that is new


def fresh(make, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return make()


def steps(svi, sizes, seed=0):
    return [svi.step(data(size, seed + i)) for i, size in enumerate(sizes)]


def kept(svi):
    """All that a run has, by other means than its own, and the next draws of each source."""
    owners = [program for program in (svi.model, svi.guide) if isinstance(program, nn.Module)]
    if not owners:
        owners = [module for module in svi._gradient.programs.modules() if module.state_dict()]
    keepers = [svi.optimizer, svi.scheduler, svi.average, svi.scaler]
    with kept_sources():
        draws = [
            torch.randn(3),
            torch.randint(9, (3,)),
            np.random.normal(size=3),
            np.random.rand(2),
            random.gauss(0, 1),
        ]
        draws += [random.random() for _ in range(3)]
    return copy.deepcopy(
        {
            "modules": [owner.state_dict() for owner in owners],
            "store": {name: value.detach() for name, value in pyro.get_param_store()._params.items()},
            "keepers": [keeper.state_dict() for keeper in keepers if keeper is not None],
            "rates": [float(group["lr"]) for group in svi.optimizer.param_groups],
            "counts": [svi.num_steps, svi._calls],
            "draws": draws,
        }
    )


def alike(ours, theirs, where=""):
    """Whether two trees are the same to the last bit."""
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        return all(alike(ours[key], theirs[key], f"{where}.{key}") for key in ours)
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        return all(alike(a, b, f"{where}.{i}") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    if isinstance(ours, torch.Tensor | np.ndarray):
        ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(torch.nan_to_num(ours, nan=7.5), torch.nan_to_num(theirs, nan=7.5)), where
        return True
    assert ours == theirs, where
    return True


# It goes on


@pytest.mark.filterwarnings("ignore:loss is nan", "ignore:norm of the gradient is")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_last_bit(name, tmp_path):
    svi = fresh(RUNS[name], 1)
    steps(svi, SIZES[:6])
    saved = kept(svi)
    checkpoints.save(tmp_path / "run.pt", svi, epoch=3)
    assert alike(saved, kept(svi))  # to save changes nothing
    expected = steps(svi, SIZES[6:], 6), kept(svi)
    assert not torch.equal(expected[0][1], expected[0][3])
    again = fresh(RUNS[name], 2)
    assert checkpoints.restore(tmp_path / "run.pt", again) == {"epoch": 3}
    assert alike(expected[0], steps(again, SIZES[6:], 6), "losses")
    assert alike(expected[1], kept(again))
    checkpoints.save(tmp_path / "run.pt", again)  # and it can be left again
    steps(again, [8, 3])
    expected = kept(again)
    third, content = fresh(RUNS[name], 3), checkpoints.load(tmp_path / "run.pt")
    (tmp_path / "run.pt").unlink()  # it has been read
    checkpoints.restore(tmp_path / "run.pt", third, content)
    steps(third, [8, 3])
    assert alike(expected, kept(third))


@pytest.mark.parametrize(
    "name", ["one step", "trajectory", "functions", "module and store", "lazy", "NumPy and Python"]
)
def test_a_loss_that_is_evaluated_first_is_that_of_the_run(name, tmp_path):
    """The path by which the loss of what was checked is taken draws other numbers than the one that checks."""
    svi = fresh(RUNS[name], 1)
    steps(svi, SIZES[:6])
    checkpoints.save(tmp_path / "run.pt", svi)
    expected = svi.evaluate_loss(data(5)), steps(svi, SIZES[6:]), kept(svi)
    again = fresh(RUNS[name], 2)
    checkpoints.restore(tmp_path / "run.pt", again)
    assert alike(expected, (again.evaluate_loss(data(5)), steps(again, SIZES[6:]), kept(again)))


def test_parameters_that_came_later_are_in_their_place(tmp_path):
    def make():
        return SVI(Mixed(late=True), nothing, adam, DiffusionELBO())

    svi = fresh(make, 1)
    steps(svi, [8, 8, 3, 8])
    checkpoints.save(tmp_path / "run.pt", svi)
    expected = steps(svi, [3, 8, 3]), kept(svi)
    again = fresh(make, 2)
    checkpoints.restore(tmp_path / "run.pt", again)
    with pytest.raises(ValueError, match="log is there alone"):
        again.step(data(8))  # where it does not show
    with pytest.raises(ValueError, match="log is there alone"):
        again.step(data(8))  # nor does it learn from other weights then
    assert again.num_steps == 0
    assert alike(expected, (steps(again, [3, 8, 3]), kept(again)))


def test_a_run_goes_back_to_a_state_of_its_own(tmp_path):
    for make in (partial(of_pair, **ALL), functions):
        svi = fresh(make, 1)
        steps(svi, SIZES[:6])
        checkpoints.save(tmp_path / "run.pt", svi)
        expected = steps(svi, SIZES[6:10]), kept(svi)
        svi.step(data(3))  # half of a step, of two
        checkpoints.restore(tmp_path / "run.pt", svi)
        assert alike(expected, (steps(svi, SIZES[6:10]), kept(svi)))


@pytest.mark.parametrize("name", ["one step, all options", "functions", "lazy"])
def test_two_runs_that_part_share_nothing(name):
    """A state that was loaded, or waits, is a copy."""
    svi = fresh(RUNS[name], 1)
    steps(svi, SIZES[:6])
    state = svi.state_dict()
    pyro.clear_param_store()
    other = RUNS[name]()
    other.load_state_dict(state)
    before = checkpoints._plain("", other.state_dict())
    numbers = torch.cat([part.double().flatten() for part in tensors_of(before)])
    steps(svi, [8, 8])
    assert torch.equal(numbers, torch.cat([part.double().flatten() for part in tensors_of(other.state_dict())]))


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return (
        [t for part in (tree.values() if isinstance(tree, dict) else tree) for t in tensors_of(part)]
        if isinstance(tree, dict | list | tuple)
        else []
    )


def test_what_is_kept_beside_comes_back(tmp_path):
    svi = of_pair()
    svi.step(data(8))
    more = {
        "none": None,
        "losses": [1.5, np.float64(2.5)],
        "shape": torch.Size([2, 3]),
        "of": {"a": torch.arange(3), 4: (True, "x")},
        "weights": nn.Linear(2, 1).state_dict(),
    }
    checkpoints.save(tmp_path / "run.pt", svi, **more)
    found = checkpoints.load(tmp_path / "run.pt")
    assert set(found) == {"format", "svi", "sources", "more"}
    assert alike(more, found["more"])
    assert type(found["more"]["losses"][1]) is float


def test_the_average_and_the_weights_are_there_without_a_step(tmp_path):
    """Also where the guide is a function: a model is restored to be used, not only to be trained."""
    for make in (partial(of_pair, **ALL), lambda: SVI(Line(), nothing, adam, DiffusionELBO(), average=named_ema)):
        svi = fresh(make, 1)
        steps(svi, SIZES[:6])
        checkpoints.save(tmp_path / "run.pt", svi)
        again = fresh(make, 2)
        checkpoints.restore(tmp_path / "run.pt", again)
        assert alike(svi.model.state_dict(), again.model.state_dict())
        with svi.averaged(), again.averaged():
            assert alike(svi.model.state_dict(), again.model.state_dict())


def test_a_graph_goes_on_from_the_weights(tmp_path, interpreted):
    """As it runs, since inductor takes half a minute; the draws are the same, so are the losses but for rounding."""
    make = partial(of_pair, compile=True)
    svi = fresh(make, 1)
    steps(svi, [8] * 6)
    checkpoints.save(tmp_path / "run.pt", svi)
    expected = torch.stack(steps(svi, [8] * 4))
    again = fresh(make, 2)
    checkpoints.restore(tmp_path / "run.pt", again)
    torch.testing.assert_close(torch.stack(steps(again, [8] * 4)), expected)
    assert again._gradient.compiled.made == 1


# Nothing is loaded where it does not belong


class AdamTwo(torch.optim.Adam):
    pass


def reversed_adam(parameters):
    return adam(parameters[::-1])


def other_order():
    svi = of_pair()
    layer = svi.model.reverse.denoiser.network.layers[0]
    layer._parameters = dict(reversed(layer._parameters.items()))
    return svi


OTHERS = {
    "width": (of_pair, partial(of_pair, network=partial(Network, hidden=9)), r"same architecture.*shape \(8"),
    "depth": (of_pair, partial(of_pair, network=partial(Network, depth=2)), "same architecture"),
    "depth, less": (partial(of_pair, network=partial(Network, depth=2)), of_pair, "same architecture"),
    "dtype": (of_pair, partial(of_pair, network=lambda: Network().double()), "same architecture.*float64"),
    "T": (of_pair, partial(of_pair, schedule=partial(pyrodiff.LinearSchedule, 5, 0.05, 0.5)), "same noise schedule"),
    "rates": (
        of_pair,
        partial(of_pair, schedule=partial(pyrodiff.LinearSchedule, T, 0.05, 0.4)),
        "same noise schedule",
    ),
    "schedule": (of_pair, partial(of_pair, schedule=partial(pyrodiff.CosineSchedule, T)), "same noise schedule"),
    "optimizer": (of_pair, partial(of_pair, optim=AdamTwo), "optimizer AdamTwo, but it is with Adam"),
    "order": (of_pair, partial(of_pair, optim=reversed_adam), "group of the optimizer in the same order"),
    "order in the model": (of_pair, other_order, "same parameters in the same order, but the order is another"),
    "groups": (of_pair, partial(of_pair, optim=two_groups), "optimizer"),
    "groups alike": (
        partial(of_pair, optim=lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:]}])),
        partial(of_pair, optim=lambda p: torch.optim.Adam([{"params": p[:2]}, {"params": p[2:]}])),
        "group of the optimizer",
    ),
    "number of groups": (
        of_pair,
        partial(of_pair, optim=lambda p: torch.optim.Adam([{"params": p[:2]}, {"params": p[2:]}])),
        "2 groups of parameters, but it has 1",
    ),
    "no average": (partial(of_pair, **ALL), partial(of_pair, **{**ALL, "average": None}), "average None"),
    "average": (of_pair, partial(of_pair, average=named_ema), "average AveragedModel, but it is with None"),
    "average of a part": (
        partial(of_pair, average=named_ema),
        partial(of_pair, average=lambda model: named_ema(model.reverse)),
        "same architecture, but average",
    ),
    "no scheduler": (partial(of_pair, **ALL), partial(of_pair, **{**ALL, "scheduler": None}), "scheduler None"),
    "scheduler": (
        partial(of_pair, **ALL),
        partial(of_pair, **{**ALL, "scheduler": by_numpy}),
        "scheduler LambdaLR, but it is with OneCycleLR",
    ),
    "no scaler": (partial(of_pair, autocast=torch.float16), of_pair, "scaler None, but it is with GradScaler"),
    "pair": (of_pair, partial(of_pair, one_step=False), "same architecture|same noise"),
    "drawing": (of_pair, partial(of_pair, drawing=MOMENTS), "same architecture.*drawing"),
    "history": (
        partial(of_pair, drawing=MOMENTS),
        partial(of_pair, drawing=partial(pyrodiff.LossSecondMoment, T, history=2)),
        "same architecture.*drawing.costs",
    ),
    "functions": (functions, of_pair, "same architecture"),
}


def fused(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, fused=True)


RATES = {"a number": lambda: 1e-2, "a tensor": lambda: torch.tensor(1e-2)}


@pytest.mark.parametrize("there", RATES)
@pytest.mark.parametrize("here", RATES)
def test_a_rate_is_a_number_or_a_tensor_as_the_program_that_resumes_has_it(here, there):
    """And the optimizer computes in the way that this program asks for: the other machine's may not be there."""
    falls = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step)
    before = of_pair(optim=partial(fused, lr=RATES[there]()), scheduler=falls)
    steps(before, [4] * 3)
    plain = partial(torch.optim.Adam, lr=RATES[here]())
    svi = of_pair(optim=plain if here == "a number" else partial(fused, lr=RATES[here]()), scheduler=falls)
    svi.load_state_dict(copy.deepcopy(before.state_dict()))
    losses = []
    for one in (before, svi):
        torch.manual_seed(5)
        losses.append([float(loss) for loss in steps(one, [4] * 3, seed=7)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    (group,) = svi.optimizer.param_groups
    assert type(group["lr"]) is type(RATES[here]())
    assert float(group["lr"]) == pytest.approx(1e-2 * 0.5**6)
    assert group["fused"] is (True if here == "a tensor" else None)


class Bare(pyrodiff.Schedule):
    """A schedule without a table."""

    def __init__(self, power):
        super().__init__(T)
        self.power = power

    def noise(self, t):
        return (torch.as_tensor(t, dtype=torch.float64) / 5) ** self.power

    def signal(self, t):
        return (1 - self.noise(t) ** 2).sqrt()

    def log_snr(self, t):
        return 2 * (self.signal(t) / self.noise(t)).log()

    def beta(self, t):
        return 1 - (self.signal(t) / self.signal(t - 1)) ** 2


OTHERS["schedule without a table"] = (
    partial(of_pair, schedule=partial(Bare, 0.5)),
    partial(of_pair, schedule=partial(Bare, 0.6)),
    "same noise schedule",
)


def subchain(times):
    pair = diffusion(schedule=pyrodiff.LinearSchedule(9, 0.05, 0.5)).subchain(times).one_step()
    return SVI(pair.model, pair.guide, adam, DiffusionELBO())


OTHERS["subchain"] = partial(subchain, [1, 4, 9]), partial(subchain, [1, 5, 9]), "same noise schedule"


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_and_nothing_loaded(name, tmp_path):
    make, other, message = OTHERS[name]
    svi = fresh(make, 1)
    steps(svi, [8, 8])
    checkpoints.save(tmp_path / "run.pt", svi)
    again = fresh(other, 2)
    before = [value.clone() for value in again.model.state_dict().values()]
    source = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.restore(tmp_path / "run.pt", again)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(
        f"path must be a checkpoint of this run, but {tmp_path / 'run.pt'} is not: state"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, again.model.state_dict().values(), strict=True))
    assert torch.equal(source, torch.get_rng_state())
    assert again.num_steps == 0
    x_0 = data(8).to(next(again.model.parameters()).dtype)
    first = again.step(x_0)  # as if nothing had been
    ended = kept(again)
    alone = fresh(other, 2)
    assert torch.equal(first, alone.step(x_0))
    assert alike(kept(alone), ended)


def shaped(shape):
    return SVI(Mixed(shape=shape), nothing, adam, DiffusionELBO())


def scaled(size):
    head = nn.Linear(2, size)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(head(x).mean(-1), 1.0), obs=x[:, 1])

    return SVI(model, nothing, adam, DiffusionELBO())


@pytest.mark.parametrize(
    ("make", "other", "message"),
    [
        (partial(shaped, ()), partial(shaped, (2,)), r"pyro.param.log is .* shape \(\) in it"),
        (partial(shaped, (1,)), partial(shaped, (2,)), r"pyro.param.log is .* shape \(1,\) in it"),
        (partial(scaled, 1), partial(scaled, 2), "called 0.weight"),
        (functions, partial(scaled, 2), "same parameters in the same order, but called 1.0.weight is there alone"),
        (RUNS["lazy"], lambda: SVI(Lazy(), nothing, sgd, DiffusionELBO()), "optimizer SGD, but it is with Adam"),
        (RUNS["automatic guide"], partial(by_average_guide, pyro.infer.autoguide.AutoDelta), "there alone"),
    ],
)
def test_another_program_is_refused_once_it_runs(make, other, message, tmp_path):
    svi = fresh(make, 1)
    steps(svi, [8, 8])
    checkpoints.save(tmp_path / "run.pt", svi)
    again = fresh(other, 2)
    checkpoints.restore(tmp_path / "run.pt", again)
    for run in (again.step, again.step, again.evaluate_loss):
        with pytest.raises(ValueError, match=message):
            run(data(8))
    assert again.num_steps == 0
    assert again._calls == 0


def test_the_same_schedule_may_have_parameters_that_were_learned(tmp_path):
    """Only a table says which schedule it is; what is learned is loaded."""

    class Learned(Bare):
        def __init__(self):
            nn.Module.__init__(self)
            self.num_steps, self.power = T, nn.Parameter(0.5 + torch.rand(()).double())

    make = partial(of_pair, schedule=Learned, optim=lambda parameters: adam(parameters[1:]))
    svi = fresh(make, 1)
    steps(svi, [8, 8])
    checkpoints.save(tmp_path / "run.pt", svi)
    again = fresh(make, 2)
    checkpoints.restore(tmp_path / "run.pt", again)
    assert torch.equal(svi.model.forward_process.schedule.power, again.model.forward_process.schedule.power)


# A state is that of a whole step


def test_there_is_a_state_after_a_whole_step_only():
    svi = of_pair(accumulate=2, average=named_ema)
    with pytest.raises(ValueError, match="svi must have taken a step"):
        svi.state_dict()
    svi.step(data(8))
    with pytest.raises(ValueError, match="1 of 2 are accumulated"):
        svi.state_dict()
    svi.step(data(8))
    state = svi.state_dict()
    with svi.averaged():
        for act in (svi.state_dict, partial(svi.load_state_dict, state)):
            with pytest.raises(ValueError, match="averaged\\(\\) must be left first"):
                act()
    svi.load_state_dict(state)


@pytest.mark.parametrize(("saved", "own"), [(0.5, torch.tensor(1.0)), (torch.tensor(0.5), 1.0), (1, torch.tensor(1.0))])
def test_a_resumed_rate_is_a_number_or_a_tensor_as_it_was_made(saved, own):
    """And what a scheduler keeps is of its class."""

    def make(lr):
        optim = partial(torch.optim.SGD, lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
        return of_pair(optim=optim, scheduler=lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5))

    svi, again = make(saved), make(own)
    svi.step(data(8))
    again.load_state_dict(svi.state_dict())
    (ours,), (theirs,) = again.optimizer.param_groups, svi.optimizer.param_groups
    assert type(ours["lr"]) is type(own)
    assert float(ours["lr"]) == float(theirs["lr"]) == float(saved) / 2
    assert type(again.scheduler.milestones) is type(svi.scheduler.milestones)
    for one in (svi, again):
        for _ in range(2):
            one.scheduler.step()
    assert float(ours["lr"]) == float(theirs["lr"]) == float(saved) / 4


def test_there_is_no_state_of_sharded_parameters(monkeypatch, tmp_path):
    svi, other = of_pair(), of_pair()
    svi.step(data(8))
    state = svi.state_dict()
    monkeypatch.setattr(ranks, "is_sharded", lambda tensor: tensor.dim() == 2)
    for act in (svi.state_dict, partial(other.load_state_dict, state), partial(checkpoints.save, tmp_path / "x", svi)):
        with pytest.raises(ValueError, match=r"must not be sharded: torch.distributed.checkpoint"):
            act()


def test_there_is_no_state_of_parameters_that_are_gone():
    svi = functions()
    svi.step(data(8))
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="parameters must stay in the programs to be saved"):
        svi.state_dict()


@pytest.mark.parametrize("state", [None, 3, {}, {"modules": {}}, [1], {"modules": {}, "stored": {}, "names": []}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="state must be what state_dict"):
        of_pair().load_state_dict(state)


# The file


@pytest.fixture
def there(tmp_path):
    """A run, and a checkpoint of it from before its last step, with its bytes."""
    svi = fresh(partial(of_pair, average=named_ema), 1)
    steps(svi, [8, 8])
    path = tmp_path / "run.pt"
    checkpoints.save(path, svi, number=1)
    svi.step(data(8))
    return svi, path, path.read_bytes()


def unharmed(path, before):
    return path.read_bytes() == before and os.listdir(path.parent) == [path.name]


class Whatever:
    ran = False

    def __reduce__(self):
        return setattr, (Whatever, "ran", True)


class Numbers(tuple):
    pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"a": Whatever()}, r"more\['a'\] must be a tensor, a number or a string"),
        ({"a": [1, {"b": {1, 2}}]}, r"more\['a'\]\[1\]\['b'\] must be"),
        ({"a": {(1, 2): 3}}, r"more\['a'\] must have strings or ints as keys, but one is \(1, 2\)"),
        ({"a": {np.int64(1): 3}}, "must have strings or ints as keys"),
        ({"a": np.ones(3)}, r"more\['a'\] must be .* a ndarray"),
        ({"a": np.float32(3)}, r"more\['a'\] must be"),
        ({"a": nn.Linear(1, 1)}, r"more\['a'\] must be .* a Linear"),
        ({"a": print}, r"more\['a'\] must be"),
        ({"a": 1j}, r"more\['a'\] must be"),
    ],
)
def test_what_is_not_plain_is_not_saved(there, more, message):
    svi, path, before = there
    with pytest.raises(ValueError, match=message):
        checkpoints.save(path, svi, **more)
    assert unharmed(path, before)
    assert not Whatever.ran


def test_kinds_of_ones_own_are_saved_as_what_they_are_made_of(there):
    """A named tuple, say, which the file could not be read with."""
    svi, path, _ = there
    checkpoints.save(path, svi, pair=Numbers([1, np.float64(2)]), text=np.str_("a"))
    assert checkpoints.load(path)["more"] == {"pair": (1, 2.0), "text": "a"}


def test_a_failure_of_the_disk_leaves_the_file_before(there, monkeypatch):
    svi, path, before = there

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stopped(*args):
        raise KeyboardInterrupt

    for owner, name, kind, fails in (
        (os, "fsync", OSError, full),
        (os, "fsync", KeyboardInterrupt, stopped),
        (type(path), "replace", OSError, full),
    ):
        monkeypatch.setattr(owner, name, fails)
        with pytest.raises(kind):
            checkpoints.save(path, svi)
        monkeypatch.undo()
        assert unharmed(path, before)
    checkpoints.save(path, svi, number=2)
    assert checkpoints.load(path)["more"] == {"number": 2}
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_be_brought_to_the_disk_is_no_failure(there, monkeypatch):
    svi, path, _ = there
    fsync, calls = os.fsync, []

    def of_files_only(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    checkpoints.save(path, svi, number=2)
    assert len(calls) == 2
    assert checkpoints.load(path)["more"] == {"number": 2}


def test_no_folder_no_file(there, tmp_path):
    svi, path, before = there
    for place in (tmp_path / "none" / "run.pt", path / "run.pt", tmp_path):
        with pytest.raises(OSError, match=str(place.parent)):
            checkpoints.save(place, svi)
        assert unharmed(path, before)
    for place in (None, 3, "", [path]):
        for act in (partial(checkpoints.save, place, svi), partial(checkpoints.load, place)):
            with pytest.raises(ValueError, match="path must be the path of a file"):
                act()
    for act in (partial(checkpoints.save, path), partial(checkpoints.restore, path)):
        with pytest.raises(ValueError, match="svi must be a"):
            act(svi.model)
    with pytest.raises(ValueError, match="path must be the path of a checkpoint, but there is no file"):
        checkpoints.load(tmp_path / "another.pt")
    with pytest.raises(ValueError, match="path must be the path of a checkpoint, but there is no file"):
        checkpoints.load(tmp_path)


def test_a_file_that_is_cut_short_is_refused(there):
    svi, path, whole = there
    for size in [0, 1, 10, *(int(len(whole) * part) for part in (0.1, 0.5, 0.9)), len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is cut short or corrupt"):
            checkpoints.restore(path, svi)
    path.write_text("the run of last Friday\n" * 100)
    with pytest.raises(ValueError, match="is cut short or corrupt"):
        checkpoints.restore(path, svi)


def test_a_byte_that_is_another_is_noticed_in_every_record(there):
    svi, path, whole = there
    before = kept(svi)
    with zipfile.ZipFile(path) as file:
        records = [(record.header_offset, record.file_size) for record in file.infolist() if record.file_size]
    assert len(records) > 20
    for offset, size in records:
        name, extra = (int.from_bytes(whole[offset + at : offset + at + 2], "little") for at in (26, 28))
        for at in (0, size - 1):
            flipped = bytearray(whole)
            flipped[offset + 30 + name + extra + at] ^= 4
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match="is cut short or corrupt") as caught:
                checkpoints.restore(path, svi)
            assert "\n" not in str(caught.value)
    assert alike(before, kept(svi))


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The records of a checkpoint, changed, in the place of it."""
    with zipfile.ZipFile(path) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in change(records).items():
            file.writestr(name, content)


@pytest.mark.parametrize("how", ["compressed", "again and again"])
def test_a_file_that_says_to_hold_more_than_it_does_is_not_read(there, monkeypatch, how):
    _, path, _ = there
    if how == "compressed":
        rewritten(path, lambda records: records, zipfile.ZIP_DEFLATED)
    else:
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("run/data/999", bytes(10**5))
            file.filelist += 10 * [file.filelist[-1]]
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    with pytest.raises(ValueError, match="says to hold more than it does"):
        checkpoints.load(path)


@pytest.mark.parametrize("called", ["builtins bytearray", "torch Tensor", "torch._utils _rebuild_qtensor"])
def test_what_takes_memory_that_a_file_does_not_is_not_called(there, monkeypatch, called):
    _, path, _ = there
    bomb = b"\x80\x02c" + called.replace(" ", "\n").encode() + b"\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
    rewritten(path, lambda records: {n: bomb if n.endswith("data.pkl") else one for n, one in records.items()})
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="holds something else"):
        checkpoints.load(path)


@pytest.mark.parametrize("part", ["modules", "optimizer", "counts", "sources"])
@pytest.mark.parametrize("value", [3, "x", None, [3], {"a": "b"}, [{"torch": torch.zeros(3).byte()}]], ids=str)
def test_other_kinds_of_things_in_a_whole_file_are_refused(there, part, value):
    svi, path, _ = there
    state = checkpoints.load(path)
    if part == "sources":
        state["sources"] = value
    else:
        state["svi"] = {**state["svi"], part: value}
    torch.save(state, path)
    with pytest.raises(ValueError, match="path must be a checkpoint"):
        checkpoints.restore(path, svi)


def test_a_link_in_the_place_of_a_part_is_not_followed(there, tmp_path, monkeypatch):
    svi, path, _ = there
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    link = path.parent / f".run.pt.{'0' * 16}.part"
    link.symlink_to(tmp_path / "precious")
    checkpoints.save(path, svi)
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["precious", "run.pt"]
    monkeypatch.setattr(type(path), "unlink", lambda self, **options: None)  # it is put there again at once
    link.symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        checkpoints.save(path, svi)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_is_opened_plainly_or_not_at_all(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "nowhere", "pipe"):
        for mode in ("a", "r", "w"):
            with pytest.raises(OSError, match=name):
                open(tmp_path / name, mode, opener=plainly)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    with open(tmp_path / "new", "a", opener=plainly) as file:
        file.write("x")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_text_that_does_something_to_a_terminal_is_escaped():
    assert printable("a\x1b[2J\n\x07\u202e\udcff\x9b", "\n") == "a\\x1b[2J\n\\x07\\u202e\\udcff\\x9b"
    assert printable("é ± \N{GRINNING FACE}") == "é ± \N{GRINNING FACE}"


def test_a_file_that_would_run_code_is_not_loaded(there):
    svi, path, _ = there
    for content in (Whatever(), {"format": 1, "svi": Whatever(), "sources": [], "more": {}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="something else, which may run code"):
            checkpoints.restore(path, svi)
    path.write_bytes(pickle.dumps(Whatever()))
    with pytest.raises(ValueError, match="is cut short or corrupt"):
        checkpoints.restore(path, svi)
    torch.save(Whatever(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is cut short or corrupt"):
        checkpoints.restore(path, svi)
    assert not Whatever.ran


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 1).state_dict(), "some other file of torch's"),
        (torch.ones(3), "some other file of torch's"),
        ({"format": "1"}, "some other file of torch's"),
        ({"format": 1}, "has no 'more'"),
        ({"format": 2}, "of format 1 at most, but .* has 2.* a newer version"),
        ({"format": 1, "svi": {}, "sources": [], "more": {}}, "state must be what state_dict"),
    ],
)
def test_a_file_of_another_kind_is_refused(there, content, message):
    svi, path, _ = there
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.restore(path, svi)
    assert str(caught.value).startswith("path must be")
    assert "\n" not in str(caught.value)


# Processes


@pytest.fixture(scope="module")
def context():
    return parted.context()


def limited(path, pipe):
    """Save where a file may have 20 kB only."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    svi = of_pair()
    svi.step(data(8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        checkpoints.save(path, svi, large=torch.zeros(10_000))
    except OSError as error:
        pipe.send(error.errno)
    else:
        pipe.send(None)


def test_a_full_disk_leaves_the_file_before(there, context):
    _, path, before = there
    ours, theirs = context.Pipe()
    process = context.Process(target=limited, args=(path, theirs))
    process.start()
    assert ours.recv() == errno.EFBIG
    process.join(20)
    assert process.exitcode == 0
    assert unharmed(path, before)


def saving(path, pipe):
    """Save for ever, each time with another number."""
    torch.set_num_threads(1)
    svi = of_pair()
    svi.step(data(8))
    for number in range(10**6):
        checkpoints.save(path, svi, number=number, numbers=torch.full((300_000,), number))
        if number == 0:
            pipe.send(True)


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path, context):
    path, moments = tmp_path / "run.pt", random.Random(0)
    found = []
    for _ in range(20):
        ours, theirs = context.Pipe()
        process = context.Process(target=saving, args=(path, theirs))
        process.start()
        assert ours.recv()
        time.sleep(moments.uniform(0.0, 0.02))
        process.kill()
        process.join(20)
        more = checkpoints.load(path)["more"]
        assert (more["numbers"] == more["number"]).all()
        found.append(more["number"])
    assert max(found) > 0
    assert all(
        name == "run.pt" or re.fullmatch(r"\.run\.pt\.[0-9a-f]{16}\.part", name) for name in os.listdir(tmp_path)
    )
    svi = of_pair()
    svi.step(data(8))
    checkpoints.save(path, svi)
    assert os.listdir(tmp_path) == ["run.pt"]  # what was left is taken up


def in_processes(rank, folder):
    """One process of two: a run that is left alone, and the same from its file, with sources of their own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    found = {}
    for name in ("one step, all options", "moments, statistics", "functions", "pair in functions"):
        path = f"{folder}/{name}"
        svi = fresh(RUNS[name], 1)
        losses = [svi.step(data(size, 10 * i + rank)) for i, size in enumerate(SIZES[:6])]
        checkpoints.save(path, svi)
        expected = [svi.step(data(size, 10 * i + rank)) for i, size in enumerate(SIZES[6:])], kept(svi)
        again = fresh(RUNS[name], 2 + 5 * rank)
        checkpoints.restore(path, again)
        result = [again.step(data(size, 10 * i + rank)) for i, size in enumerate(SIZES[6:])], kept(again)
        shares = [
            [(d.share.key, int(d.share.drawn)) for d in run._gradient.programs.drawings()] for run in (svi, again)
        ]
        for run in (svi, again):
            run.scheduler = run.average = None
        found[name] = {"expected": expected, "result": result, "shares": shares, "losses": losses}
    again = fresh(RUNS["one step"], 3)
    checkpoints.restore(f"{folder}/alone", again)
    again.step(data(8, rank))
    found["more processes"] = {"draw": torch.rand(3), "weights": list(again.model.state_dict().values())}
    try:
        checkpoints.save(f"{folder}/none/run.pt", again)
    except OSError as error:
        found["failure"] = str(error)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(context, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    svi = fresh(RUNS["one step"], 1)
    steps(svi, [8, 8])
    checkpoints.save(folder / "alone", svi)
    running = [context.Process(target=in_processes, args=(rank, folder)) for rank in (0, 1)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    return folder, [torch.load(folder / str(rank), weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["one step, all options", "moments, statistics", "functions", "pair in functions"])
def test_each_of_two_processes_goes_on(two, name):
    _, ranks = two
    for found in ranks:
        assert alike(found[name]["expected"], found[name]["result"])
        assert alike(*found[name]["shares"])
    draws = [found[name]["result"][1]["draws"][0] for found in ranks]
    assert not torch.equal(*draws)


def test_the_processes_may_be_fewer_or_more(two):
    folder, ranks = two
    again = fresh(RUNS["one step, all options"], 9)
    checkpoints.restore(folder / "one step, all options", again)
    assert len(checkpoints.load(folder / "one step, all options")["sources"]) == 2
    assert torch.equal(torch.get_rng_state(), checkpoints.load(folder / "one step, all options")["sources"][0]["torch"])
    again.step(data(8))
    ours, theirs = (found["more processes"] for found in ranks)
    assert alike(ours["weights"], theirs["weights"])
    assert not torch.equal(ours["draw"], theirs["draw"])


def test_a_failure_to_write_is_one_of_all(two):
    _, ranks = two
    assert "No such file" in ranks[0]["failure"]
    assert "by another rank" in ranks[1]["failure"]


# Sources of random numbers


def test_sources_go_on_whatever_was_drawn():
    random.gauss(0, 1), np.random.normal()  # each keeps a second draw back
    with kept_sources():
        expected = [torch.rand(3), np.random.normal(size=2), random.gauss(0, 1), random.random()]
        torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert alike(expected, [torch.rand(3), np.random.normal(size=2), random.gauss(0, 1), random.random()])


def test_sources_go_on_after_an_error():
    def fail():
        torch.rand(3), np.random.rand(), random.random()
        raise KeyError

    before = sources()
    with pytest.raises(KeyError), kept_sources():
        fail()
    assert alike(before, sources())


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_call_by_a_pickle_of_any_protocol_is_refused_without_a_warning(there, monkeypatch, protocol):
    _, path, _ = there
    call = pickle.dumps(Whatever(), protocol)
    rewritten(path, lambda records: {n: call if n.endswith("data.pkl") else one for n, one in records.items()})
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="holds something else"):
        checkpoints.load(path)
