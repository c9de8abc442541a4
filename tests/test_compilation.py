"""A compiled step is the step: the same draws, the same numbers, the same state, or a warning that says why not."""

import copy
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import bit_diffusion
from gpu import on_a_gpu
from loops import adam, level_data, nothing, sgd, still
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints
from torch.nn.modules.module import register_module_full_backward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyrodiff
from pyrodiff import SVI, DiffusionELBO
from pyrodiff.running.compilation import Compiled, Composition, Graph, captured

X_0 = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]], dtype=torch.float64)
X = torch.tensor([1.0, -2.0, 4.0])


class Network(nn.Module):
    """Two hidden layers with what is random, and what changes, in training."""

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_t, t):
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[:-1])
        hidden = self.first(torch.cat([x_t, t[..., None].to(x_t.dtype) / 4], -1))
        return self.last(self.dropout(torch.tanh(self.norm(self.dropout(hidden)))))


def make(network=None, T=3, decoder=None, dtype=torch.float64):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network or Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=decoder).to(dtype)


def twins(pair, optim=adam, **options):
    """The pair's SVI compiled, and a copy's that is not."""
    other = copy.deepcopy(pair)
    return [
        SVI(one.model, one.guide, optim, DiffusionELBO(), compile=compiled, **options)
        for one, compiled in ((pair, True), (other, False))
    ]


def graphs(svi):
    """The number of compiled graphs that are kept."""
    return 0 if svi._gradient.compiled is None else len(svi._gradient.compiled._graphs)


ROUNDING = {"rtol": 1e-9, "atol": 1e-11}


def left(program):
    """A copy of the state and the gradients."""
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}
    return {**{name: value.clone() for name, value in program.state_dict().items()}, **gradients}


def agree(svis, batches, seed=0, tolerance=ROUNDING):
    """Take the steps with each SVI, from the same seeds, and compare all that each leaves behind; return the losses."""
    found = []
    for svi in reversed(svis):
        found.append([])
        for number, batch in enumerate(batches):
            pyro.set_rng_seed(seed + number)
            found[-1].append((svi.step(*batch), left(svi.model)))
    torch.testing.assert_close(*found, **tolerance)
    return [float(loss) for loss, _ in found[0]]


def test_a_copy_of_a_compiled_run_makes_graphs_of_its_own(interpreted):
    svi, _ = twins(make().one_step())
    x_0 = torch.randn(5, 2, dtype=torch.float64)
    svi.step(x_0)
    svi.step(x_0)
    other, before = copy.deepcopy(svi), left(svi.model)
    assert (graphs(svi), graphs(other)) == (1, 0)
    agree([svi, other], [(x_0,)] * 3)
    assert graphs(other) == 1
    pairs = list(zip(svi.model.named_parameters(), other.model.parameters(), strict=True))
    assert not any(ours is theirs or torch.equal(ours, before[name]) for (name, ours), theirs in pairs)


def fails(svi, *args, match):
    """Take a step that says in one warning why it is not compiled."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        loss = svi.step(*args)
    (warning,) = record
    assert warning.category is RuntimeWarning
    assert str(warning.message).startswith("the pair of programs runs without being compiled: ")
    for part in match:
        assert part in str(warning.message)
    return loss


@pytest.fixture
def scalar():
    """Inductor without vector instructions, whose code is written and compiled in less than half the time."""
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield


# The same steps


@pytest.mark.usefixtures("scalar")
def test_the_one_step_pair_of_gaussians():
    """Value, gradient, parameters and statistics of the batch, with the same draws of noise, times and dropout."""
    svis = twins(make(Network(dropout=0.4, norm=True)).one_step(), clip_norm=5.0)
    losses = agree(svis, [[X_0]] * 5)
    assert len(set(losses)) == 5
    assert graphs(svis[0]) == 1
    assert graphs(svis[1]) == 0


def test_all_that_changes_in_a_step_is_what_it_would_be(interpreted):
    """Weights, batch statistics, the costs that a drawing keeps, averages; dropout, and evaluation in between."""
    drawing = pyrodiff.LossSecondMoment(num_steps=3, history=2)
    pair = make(Network(dropout=0.4, norm=True)).one_step(drawing)
    average = functools.partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=False)
    svis = twins(pair, clip_norm=5.0, average=average, accumulate=2)
    losses = agree(svis, [[X_0]] * 8)
    assert len(set(losses)) == 8
    assert graphs(svis[0]) == 1
    assert graphs(svis[1]) == 0
    assert svis[0].num_steps == 4
    assert int(drawing.counts.sum()) == 8 * len(X_0)
    norm = pair.model.reverse.denoiser.network.norm
    assert int(norm.num_batches_tracked) == 8
    for a, b in zip(svis[0].average.state_dict().values(), svis[1].average.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)

    for svi in svis:  # a new graph, without dropout
        svi.model.eval()
        svi.accumulate = 1
        for group in svi.optimizer.param_groups:
            group["lr"] = 0.0
    agree(svis, [[X_0]] * 3, seed=20)
    assert svis[0]._gradient.compiled.made == 2
    assert int(norm.num_batches_tracked) == 8

    with torch.no_grad():  # state in place is read anew: no new graph
        for svi in svis:
            svi.model.load_state_dict({name: 0.9 * value for name, value in svi.model.state_dict().items()})
            svi.model.forward_process.schedule.load_state_dict(pyrodiff.CosineSchedule(3).state_dict())
    agree(svis, [[X_0]] * 2, seed=30)
    assert svis[0]._gradient.compiled.made == 2


@pytest.mark.usefixtures("scalar")
def test_draws_differ_from_call_to_call_and_within_one():
    """Of two draws of one kind in a program, and, at a rate of 0 and with no new seed, of one after another."""

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.dropout = nn.Parameter(torch.ones(40, dtype=torch.float64)), nn.Dropout(0.5)

        def forward(self):
            first, second = self.dropout(self.w), self.dropout(self.w)
            pyro.factor("x", -(first * second).sum() - (first**2).sum() / 100)

    svi, eager = (SVI(Program(), nothing, sgd, DiffusionELBO(), compile=compiled) for compiled in (True, False))
    agree([svi, eager], [[]] * 5)
    assert graphs(svi) == 1
    assert (svi.model.w.grad == 0).any()  # what is dropped by both: never, were they one
    assert len(set((svi.model.w.grad / svi.model.w).tolist())) > 2
    svi.optimizer.param_groups[0]["lr"] = 0.0
    assert len({float(svi.step()) for _ in range(8)}) > 5


@pytest.mark.usefixtures("scalar")
def test_the_trajectory_pair_with_a_decoder_of_levels():
    svis = twins(make(decoder=pyrodiff.DiscretizedDecoder(levels=5), T=2))
    agree(svis, [[level_data()]] * 3)
    assert graphs(svis[0]) == 1


@pytest.mark.parametrize("one_step", [False, True])
def test_a_last_short_batch_has_a_graph_of_its_own(one_step, interpreted):
    levels, diffusion = level_data(), make(decoder=pyrodiff.DiscretizedDecoder(levels=5))
    svis = twins(diffusion.one_step() if one_step else diffusion)
    agree(svis, [[levels], [levels], [levels[:2]]] * 3)
    assert graphs(svis[0]) == 2


@pytest.mark.usefixtures("scalar")
def test_the_pair_of_bits():
    """In the mean of value and gradient, by 5 standard errors: inductor draws bits in a way of its own."""
    x_0 = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    svis = twins(bit_diffusion([0.2, 0.3, 0.5], rate=0.3, bits=2).one_step(), still)
    means, variances = [], []
    for svi in reversed(svis):
        svi.step(x_0)
        draws = []
        for _ in range(100):
            loss = svi.step(x_0)
            draws.append(torch.cat([loss.reshape(1), *(p.grad.flatten() for p in svi.model.parameters())]))
        means.append(torch.stack(draws).mean(0))
        variances.append(torch.stack(draws).var(0) / 100)
    assert graphs(svis[0]) == 1
    assert ((means[0] - means[1]).abs() <= 5 * sum(variances).sqrt() + 1e-9).all()
    assert (variances[0] > 0).any()


class Recognised(nn.Module):
    """p(x | z) of a latent z, in plain Pyro: a module, and a constrained parameter beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1).double()

    def forward(self, x):
        pyro.module("layer", self.layer)
        scale = pyro.param("scale", lambda: torch.tensor(0.8, dtype=torch.float64), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.layer(z[:, None])[:, 0], scale), obs=x)


def recogniser(x):
    weight = pyro.param("weight", lambda: torch.tensor([0.3, 0.1], dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight[0] * x + weight[1], 0.5))


def stored():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.usefixtures("scalar")
def test_a_pair_in_plain_pyro():
    found, layer = [], nn.Linear(1, 1).double()
    for compiled in (True, False):
        pyro.clear_param_store()
        model = Recognised()
        model.layer.load_state_dict(layer.state_dict())
        svi = SVI(lambda x, model=model: model(x), recogniser, adam, DiffusionELBO(), compile=compiled)
        pyro.set_rng_seed(1)
        losses = torch.stack([svi.step(X.double()) for _ in range(6)])
        assert graphs(svi) == compiled
        found.append((losses, stored(), *(parameter.detach() for parameter in model.layer.parameters())))
    assert set(found[0][1]) == {"scale", "weight"}
    assert not torch.equal(found[0][2], layer.weight)
    assert found[0][1]["scale"] != 0.8
    torch.testing.assert_close(*found, **ROUNDING)


class RandomWeight(PyroModule):
    """A kernel with a random weight, of a given law."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](2, 2)
        self.net.weight = PyroSample(dist.Normal(torch.zeros(2, 2).double(), 0.5).to_event(2))

    def forward(self, x_t, t):
        return dist.Normal(x_t + self.net(x_t), 0.7).to_event(1)


@pytest.mark.usefixtures("scalar")
def test_a_random_weight_is_drawn_and_its_law_learned():
    found, first = [], RandomWeight().double()
    for compiled in (True, False):
        pyro.clear_param_store()
        forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(2, 0.1, 0.5))
        diffusion = pyrodiff.Diffusion(forward, copy.deepcopy(first), (2,))

        def guide(x_0, diffusion=diffusion):
            loc = pyro.param("loc", lambda: torch.zeros(2, 2, dtype=torch.float64))
            pyro.sample("reverse.net.weight", dist.Normal(loc, 0.1).to_event(2))
            diffusion.guide(x_0)

        svi = SVI(diffusion.model, guide, adam, DiffusionELBO(), compile=compiled)
        pyro.set_rng_seed(1)
        losses = torch.stack([svi.step(X_0) for _ in range(5)])
        assert graphs(svi) == compiled
        found.append((losses, stored()))
    assert found[0][1]["loc"].abs().min() > 0
    assert len(set(found[0][0].tolist())) == 5
    torch.testing.assert_close(*found, **ROUNDING)


@pytest.mark.usefixtures("scalar")
def test_in_low_precision_without_a_warning():
    """What bfloat16 rounds differs between the two by its 8 bits; the loss is float32."""
    pair = make(dtype=torch.float32).one_step()
    svis = twins(pair, still, autocast=torch.bfloat16)
    found = []
    for svi in reversed(svis):
        found.append([])
        for seed in range(4):
            pyro.set_rng_seed(seed)
            found[-1].append(svi.step(X_0.float()))
    assert all(loss.dtype == torch.float32 for losses in found for loss in losses)
    torch.testing.assert_close(*found, rtol=10 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert graphs(svis[0]) == 1
    assert all(p.grad.dtype == torch.float32 for p in svis[0].model.parameters())


# State that is replaced


class Sum(nn.Module):
    """p(x) = N((p + q) shift, 1) with a learned sum, whose two parts have the same gradient."""

    def __init__(self):
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.full((3,), start)) for start in (0.5, -0.2))
        self.register_buffer("shift", torch.tensor(1.5))

    def forward(self, x):
        pyro.sample("x", dist.Normal((self.p + self.q) * self.shift, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_equal_gradients_do_not_share_memory(accumulate):
    svis = [
        SVI(Sum(), nothing, sgd, DiffusionELBO(), compile=compiled, accumulate=accumulate, clip_norm=0.5)
        for compiled in (True, False)
    ]
    for _ in range(3 * accumulate):
        agree(svis, [[X]], tolerance={"rtol": 1e-5, "atol": 1e-6})
        ours = svis[0].model
        assert ours.p.grad.untyped_storage().data_ptr() != ours.q.grad.untyped_storage().data_ptr()
        assert X.tolist() == [1.0, -2.0, 4.0]
    assert graphs(svis[0]) == 1


def replaced_buffer(model):
    model.shift = torch.tensor(0.3)


def replaced_parameter(model):
    model.q = nn.Parameter(torch.tensor([2.0, 1.0, 0.0]))


def changed_in_place(model):
    model.load_state_dict({"p": torch.ones(3), "q": torch.arange(3.0), "shift": torch.tensor(-0.4)})


def frozen(model):
    model.q.requires_grad_(False)


def frozen_and_thawed(model):
    model.q.requires_grad_(False).requires_grad_(True)


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        frozen_and_thawed,
        replaced_buffer,
        frozen,
        replaced_parameter,
    ],
)
def test_a_changed_module_is_not_stale(change, interpreted):
    svis = [SVI(Sum(), nothing, sgd, DiffusionELBO(), compile=compiled) for compiled in (True, False)]
    agree(svis, [[X]] * 3, tolerance={"rtol": 1e-5, "atol": 1e-6})
    for svi in svis:
        change(svi.model)
    q = svis[0].model.q.detach().clone()
    for _ in range(2):
        losses = [svi.step(X) for svi in svis]
        torch.testing.assert_close(*losses)
        for a, b in zip(svis[0].model.parameters(), svis[1].model.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(q, svis[0].model.q) == (change is frozen)


def parted(x):
    pyro.sample("x", dist.Normal(pyro.param("p", lambda: torch.zeros(3)), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("again", [True, False])
def test_parameters_that_were_cleared_are_not_stale(again, interpreted):
    found = []
    for compiled in (True, False):
        pyro.clear_param_store()
        svi = SVI(parted, nothing, sgd, DiffusionELBO(), compile=compiled)
        losses = [svi.step(X) for _ in range(3)]
        pyro.clear_param_store()
        if again:
            pyro.param("p", torch.tensor([5.0, 0.0, 1.0]))
        losses += [svi.step(X) for _ in range(3)]
        found.append((torch.stack(losses), stored()))
        if compiled:
            assert svi._gradient.compiled.made == 1
    torch.testing.assert_close(*found)


# What cannot be compiled


class Branching(nn.Module):
    """A program that looks at its data, after it has drawn and changed a buffer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))
        self.norm = nn.BatchNorm1d(1).double()

    def forward(self, x):
        self.calls += 1
        x = self.norm(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.w, 1.0))
            shift = 1.0 if x.sum() < z.sum() else 2.0  # here
            pyro.sample("x", dist.Normal(shift * z, 1.0), obs=x)


def branching_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.4 * x, 0.7))


def test_control_flow_on_data_is_said_and_runs_as_it_is():
    """The operation, the line and the site; buffers and the random source are as if it had not been tried."""
    svis = [
        SVI(model, branching_guide, sgd, DiffusionELBO(), compile=compiled)
        for model, compiled in ((Branching(), True), (Branching(), False))
    ]
    data = X.double()
    pyro.set_rng_seed(4)
    expected = [svis[1].step(data) for _ in range(5)]
    state = torch.get_rng_state()
    pyro.set_rng_seed(4)
    found = [svis[0].step(data)]
    match = ("aten._local_scalar_dense reads the value of a tensor", "in forward", "# here", "after site 'z'")
    found.append(fails(svis[0], data, match=match))
    found += [svis[0].step(data) for _ in range(3)]  # said once
    assert torch.equal(torch.stack(found), torch.stack(expected))
    torch.testing.assert_close(left(svis[0].model), left(svis[1].model), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(svis[0].model.calls) == 5
    assert graphs(svis[0]) == 0


def test_control_flow_on_a_parameter_is_not_baked_in():
    """The parameter falls below 0 after the graph would have been made: the other branch has another slope."""

    def model():
        loc = pyro.param("loc", lambda: torch.tensor(0.25, dtype=torch.float64))
        slope = 2.0 if loc < 0 else 1.0
        pyro.sample("x", dist.Normal(slope * loc, 1.0), obs=torch.tensor(-1.0, dtype=torch.float64))

    found = []
    for compiled in (True, False):
        pyro.clear_param_store()
        svi = SVI(model, nothing, sgd, DiffusionELBO(), compile=compiled)
        losses = [svi.step()]
        match = ("aten._local_scalar_dense", "in model", "if loc < 0")
        losses.append(fails(svi, match=match) if compiled else svi.step())
        losses += [svi.step() for _ in range(6)]
        found.append(torch.stack(losses))
        assert pyro.param("loc") < 0
    assert torch.equal(*found)


def test_without_a_compiler_it_runs_as_it_is(monkeypatch):
    found = []

    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler here\nand more")

    monkeypatch.setattr("torch._inductor.compile", fail)
    svi, eager = twins(make(Network(dropout=0.4, norm=True)).one_step())
    for one in (eager, svi):
        pyro.set_rng_seed(7)
        losses = [one.step(X_0)]
        losses.append(one.step(X_0) if one is eager else fails(one, X_0, match=["RuntimeError: no C++ compiler here"]))
        losses += [one.step(X_0) for _ in range(3)]
        found.append((torch.stack(losses), left(one.model)))
    torch.testing.assert_close(*found, **ROUNDING)
    assert int(svi.model.reverse.denoiser.network.norm.num_batches_tracked) == 5
    assert graphs(svi) == 0


@pytest.mark.parametrize("one_step", [False, True])
def test_two_diffusions_side_by_side_have_a_graph_each(one_step, interpreted):
    svis = []
    for _ in range(2):
        pair = make().one_step() if one_step else make()
        svis.append(SVI(pair.model, pair.guide, adam, DiffusionELBO(), compile=True))
    for _ in range(5):
        for svi in svis:
            svi.step(X_0)
    assert len(interpreted) == 2


def test_training_and_evaluation_have_a_graph_each(interpreted):
    svi = SVI(Sum(), nothing, sgd, DiffusionELBO(), compile=True)
    for _ in range(10):
        for mode in (True, False):
            svi.model.train(mode)
            svi.step(X)
    assert len(interpreted) == 2


# A function by itself


def test_only_so_many_graphs_are_made():
    """The second shape is one too many: it runs as it is, with a warning, and the first goes on as a graph."""
    calls = []

    def squares(x):
        calls.append(len(x))
        return ((x**2).sum(),)

    compiled = Compiled(squares, limit=1, name="it")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for size in (3, 3, 2, 3, 2, 4):
            x = torch.arange(1.0, size + 1)
            assert float(compiled(x)[0]) == float((x * x).sum())
    (warning,) = record
    assert str(warning.message).startswith("it runs without being compiled: 1 graphs were made")
    assert calls == [3, 2, 2, 4]


def test_a_tensor_that_was_given_twice_may_later_be_two():
    compiled = Compiled(lambda x, y: (2 * x + y,))
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -3.0])
    assert [compiled(x, x)[0].tolist() for _ in range(2)] == [[3.0, 6.0]] * 2
    assert compiled(x, y)[0].tolist() == [7.0, 1.0]


def test_a_tensor_of_another_layout():
    x = torch.tensor([[1.0, 2.0, 5.0], [3.0, -4.0, 0.5]])
    compiled = Compiled(lambda x: (x * torch.arange(3.0),))
    for data in (x, x, x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert compiled(data)[0].tolist() == (x * torch.arange(3.0)).tolist()


def test_a_module_s_buffer_as_an_argument_is_not_taken_for_the_buffer():
    module = nn.Module()
    module.register_buffer("shift", torch.tensor([1.0, 2.0]))
    compiled = Compiled(lambda x: (x + 10 * module.shift,), [module])
    for x in (module.shift, module.shift, torch.tensor([5.0, 7.0])):
        assert compiled(x)[0].tolist() == (x + 10 * module.shift).tolist()


def test_a_module_of_another_dtype_has_another_graph(interpreted):
    svi = SVI(Sum(), nothing, sgd, DiffusionELBO(), compile=True)
    for _ in range(3):
        svi.step(X)
    svi.model.double()
    losses = [svi.step(X.double()) for _ in range(3)]
    assert all(loss.dtype == torch.float64 for loss in losses)
    assert len(interpreted) == 2


# The whole step as one CUDA graph, and on a CPU with a stand-in for it


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph: the operations of a function, repeated on the same memory, without its Python."""

    def __init__(self):
        super().__init__()
        self.operations, self.changed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read")
        given = [tensor.untyped_storage() for tensor in tensors_of((args, kwargs))]
        self.changed += [(memory, memory.clone()) for memory in given]  # batch norm changes what it says it does not
        results = func(*args, **(kwargs or {}))
        places = {memory.data_ptr() for memory in given}
        own = [tensor.untyped_storage().data_ptr() not in places for tensor in tensors_of(results)]
        self.operations.append((functools.partial(func, *args, **(kwargs or {})), results, own))
        return results

    def undo(self):
        """A capture is without effect."""
        for memory, before in reversed(self.changed):
            memory.copy_(before)

    @torch.no_grad()
    def replay(self):
        for run, results, own in self.operations:
            for kept, new, is_own in zip(tensors_of(results), tensors_of(run()), own, strict=True):
                if is_own:
                    kept.copy_(new)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def recorded(function, device):
    random = torch.get_rng_state()
    try:
        with Recording() as recording:
            results = function()
    finally:
        recording.undo()
        torch.set_rng_state(random)

    def replay():
        recording.replay()
        return results

    return replay


class Captures(list):
    """What was captured, and where tensors are."""

    device = "cpu"


@pytest.fixture(params=["recorded", pytest.param("on a GPU", marks=on_a_gpu)])
def captures(request, monkeypatch):
    """What was captured: on a GPU, or with the stand-in, where tensors count as a GPU's."""
    made, capture = Captures(), recorded
    if request.param == "recorded":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    else:
        made.device, capture = "cuda", captured
    monkeypatch.setattr("pyrodiff.running.compilation.captured", lambda *args: made.append(args) or capture(*args))
    return made


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum; its rate is a tensor, or a number."""

    def __init__(self, parameters, lr=None):
        parameters = list(parameters)
        rate = torch.tensor(0.01, dtype=torch.float64, device=parameters[0].device) if lr is None else lr
        super().__init__(parameters, {"lr": rate, "capturable": True})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                kept = self.state[parameter]
                if not kept:
                    kept["sum"] = torch.zeros_like(parameter)
                kept["sum"].mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * kept["sum"])


class Noise(nn.Module):
    """x is noise z that a network has changed, and more noise: a pair of few operations, of which a graph is soon made.

    It draws, and has weights, dropout and statistics of the batch, as a diffusion's pair.
    """

    def __init__(self):
        super().__init__()
        self.network = Network(norm=True)

    @property
    def model(self):
        return self

    def forward(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(self.network(z, 1), 2.0).to_event(2), obs=x)

    def guide(self, x):
        pyro.sample("z", dist.Normal(x, 0.5).to_event(2))


def placed(captures, optim=Momentum, diffusion=False, **options):
    """The twins, of a diffusion's pair or of one of few operations, and a batch, where captures are made."""
    pair = make(Network(norm=True)).one_step() if diffusion else Noise().double()
    return twins(pair.to(captures.device), optim, **options), X_0.to(captures.device)


def test_a_captured_step_is_the_step(interpreted, captures):
    """In all that it leaves behind, also where batches of two shapes take turns."""
    average = functools.partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    svis, x_0 = placed(captures, diffusion=True, clip_norm=5.0, average=average)
    losses = agree(svis, [[x_0]] * 8)
    assert len(set(losses)) == 8
    assert svis[0].num_steps == 8
    torch.testing.assert_close(*(dict(svi.average.named_parameters()) for svi in svis), **ROUNDING)
    assert len(captures) == 1
    agree(svis, [[x_0[:2]]] * 8)
    assert len(captures) == 2
    agree(svis, [[x_0], [x_0[:2]]] * 3)
    assert len(captures) == 2


def elsewhere(svi):
    for tensor in (*svi.model.parameters(), *svi.model.buffers()):
        if tensor.is_floating_point():
            tensor.data = 0.9 * tensor.data


def changed_state(svi):
    state = copy.deepcopy(svi.optimizer.state_dict())
    for kept in state["state"].values():
        kept["sum"].mul_(-2.0)
    svi.optimizer.load_state_dict(state)


def another_rate(svi):
    (group,) = svi.optimizer.param_groups
    group["lr"] = 0.5 * group["lr"]


def another_optimizer(svi):
    svi.optimizer = Momentum(svi.optimizer.param_groups[0]["params"])


def hook_of_a_gradient(svi):
    next(svi.model.parameters()).register_hook(lambda gradient: 3 * gradient)


def hook_of_the_optimizer(svi):
    @torch.no_grad()
    def shrink(optimizer, args, kwargs):
        for parameter in svi.model.parameters():
            parameter.mul_(1 - svi.num_steps / 100)  # a number of this step alone

    svi.optimizer.register_step_post_hook(shrink)


def resumed(svi):
    state = copy.deepcopy(svi.state_dict())
    svi.step(X_0.to(next(svi.model.parameters()).device))
    svi.load_state_dict(state)


def network_of(svi):
    (network,) = (module for module in svi.model.modules() if isinstance(module, Network))
    return network


def parameters_in_another_order(svi):
    parameters = svi.optimizer.param_groups[0]["params"]
    parameters.insert(0, parameters.pop())


def another_step_of_the_optimizer(svi):
    step = svi.optimizer.step

    @torch.no_grad()
    def stepped():
        step()
        for parameter in svi.model.parameters():
            parameter.mul_(0.9)

    svi.optimizer.step = stepped


def step(svi, *args):
    pyro.set_rng_seed(8)
    svi.step(*args or (X_0.to(next(svi.model.parameters()).device),))


def learned_again(svi):
    parameter = next(svi.model.parameters())
    parameter.requires_grad_(False)
    step(svi)
    parameter.requires_grad_(True)


def another_layer(svi):
    pyro.set_rng_seed(5)
    network_of(svi).first = nn.Linear(3, 6).to(network_of(svi).last.weight)


def another_buffer(svi):
    norm = network_of(svi).norm
    norm.running_mean = norm.running_mean + 1


def assigned(svi):
    state = {name: value.clone().mul_(2) for name, value in svi.model.state_dict().items()}
    svi.model.load_state_dict(state, assign=True)


def waiting_gradient(svi):
    svi.accumulate = 2
    step(svi)
    svi.accumulate = 1


def gradients_of_ones_own(svi):
    for parameter in svi.model.parameters():
        parameter.grad = torch.ones_like(parameter)


def steps_of_another(svi):
    other = SVI(svi.model, svi.guide, adam, DiffusionELBO())
    for _ in range(2):
        step(other, X_0.to(next(svi.model.parameters()).device))


def step_that_fails(svi):
    handle = network_of(svi).register_forward_pre_hook(lambda *args: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not compiled
        with pytest.raises(ZeroDivisionError):
            step(svi)
    handle.remove()


def step_under_a_handler(svi):
    with pyro.poutine.scale(scale=3.0):
        step(svi)


def step_under_autocast(svi):
    with torch.autocast(next(svi.model.parameters()).device.type, torch.bfloat16):
        step(svi)


CHANGES = {  # what a program may do between two steps, and how often steps are captured in all
    "weights in place": (lambda svi: [parameter.data.mul_(0.9) for parameter in svi.model.parameters()], 1),
    "weights elsewhere": (elsewhere, 2),
    "another state of the optimizer": (changed_state, 2),
    "another optimizer": (another_optimizer, 2),
    "a rate in place": (lambda svi: svi.optimizer.param_groups[0]["lr"].mul_(0.5), 1),
    "another rate": (another_rate, 2),
    "another norm": (lambda svi: setattr(svi, "clip_norm", 0.5), 2),
    "no norm": (lambda svi: setattr(svi, "clip_norm", None), 2),
    "a weight that is learned no more": (lambda svi: next(svi.model.parameters()).requires_grad_(False), 2),
    "a hook of a gradient": (hook_of_a_gradient, 1),
    "a hook of the optimizer": (hook_of_the_optimizer, 1),
    "gradients that are dropped": (lambda svi: svi.optimizer.zero_grad(), 1),
    "accumulation": (lambda svi: setattr(svi, "accumulate", 2), 1),
    "evaluation": (lambda svi: svi.model.eval(), 2),
    "another dtype of weights and back": (lambda svi: svi.model.float().double(), 2),
    "a state that is loaded": (resumed, 2),
    "a parameter that the optimizer has no more": (lambda svi: svi.optimizer.param_groups[0]["params"].pop(0), 2),
    "parameters in another order": (parameters_in_another_order, 2),
    "another step of the optimizer": (another_step_of_the_optimizer, 2),
    "a copy of the optimizer": (lambda svi: setattr(svi, "optimizer", copy.deepcopy(svi.optimizer)), 1),
    "no state of the optimizer": (lambda svi: svi.optimizer.state.clear(), 2),
    "no state of one parameter": (lambda svi: svi.optimizer.state[next(svi.model.parameters())].clear(), 2),
    "a weight that is learned again": (learned_again, 1),
    "another layer": (another_layer, 2),
    "another buffer": (another_buffer, 2),
    "weights that are assigned": (assigned, 2),
    "dropout": (lambda svi: setattr(network_of(svi).dropout, "p", 0.5), 2),
    "statistics that are kept": (lambda svi: network_of(svi).norm.eval(), 2),
    "more particles": (lambda svi: setattr(svi.loss, "num_particles", 3), 2),
    "a gradient that waits": (waiting_gradient, 1),
    "gradients of one's own": (gradients_of_ones_own, 1),
    "steps of another SVI": (steps_of_another, 1),
    "a step that fails": (step_that_fails, 1),
    "a step under a handler": (step_under_a_handler, 1),
    "a step under autocast": (step_under_autocast, 1),
    "a copy of the model": (lambda svi: copy.deepcopy(svi.model), 1),
}


OF_A_DIFFUSION = ("another layer", "more particles", "a step under a handler")  # which its loss hears in its own way


@pytest.mark.parametrize("change", CHANGES)
def test_a_captured_step_sees_what_is_changed(interpreted, captures, change):
    """A graph knows memory alone: another tensor, number or hook in the place of one would be lost without a word."""
    svis, x_0 = placed(captures, diffusion=change in OF_A_DIFFUSION, clip_norm=5.0)
    make_change, number = CHANGES[change]
    agree(svis, [[x_0]] * 6)
    assert len(captures) == 1
    for svi in svis:
        pyro.set_rng_seed(4)
        make_change(svi)
    agree(svis, [[x_0]] * 8, seed=20)
    assert len(captures) == number


@pytest.mark.parametrize("steps", [3, 4, 5])
@pytest.mark.parametrize("change", ["no state of the optimizer", "a gradient that waits", "another rate"])
def test_a_step_sees_what_is_changed_before_it_is_captured(interpreted, captures, change, steps):
    svis, x_0 = placed(captures, clip_norm=5.0)
    make_change, _ = CHANGES[change]
    agree(svis, [[x_0]] * steps)
    for svi in svis:
        make_change(svi)
    agree(svis, [[x_0]] * 8, seed=20)
    assert captures


def test_a_captured_step_computes_in_the_precision_that_is_set(interpreted, captures):
    """Its kernels are those of another setting: it is captured once for each."""
    svis, x_0 = placed(captures)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            agree(svis, [[x_0]] * 6)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(captures) == 2


def test_a_captured_step_hears_the_hooks_of_every_optimizer(interpreted, captures):
    svis, x_0 = placed(captures)
    agree(svis, [[x_0]] * 6)

    @torch.no_grad()
    def shrink(optimizer, args, kwargs):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.mul_(0.9)

    handle = register_optimizer_step_post_hook(shrink)
    try:
        agree(svis, [[x_0]] * 3)
    finally:
        handle.remove()
    agree(svis, [[x_0]] * 3)
    assert len(captures) == 1


def test_a_compiled_step_hears_the_backward_hooks_of_every_module(interpreted):
    svis = twins(make().one_step())
    agree(svis, [[X_0]] * 4)

    def triple(module, given, found):
        return tuple(None if one is None else 3 * one for one in given) if isinstance(module, nn.Linear) else None

    handle = register_module_full_backward_hook(triple)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of modules that return no tensors
            agree(svis, [[X_0]] * 3)
    finally:
        handle.remove()
    agree(svis, [[X_0]] * 3)


def test_a_compiled_loss_has_the_options_that_it_has_now(interpreted):
    svis = twins(make().one_step())
    for number in (1, 3, 1):
        for svi in svis:
            svi.loss.num_particles = number
        agree(svis, [[X_0]] * 4)


def test_a_captured_step_sees_that_a_parameter_is_in_another_group(interpreted, captures):
    """Where rates are numbers, and the parameters of all groups together in the same order."""

    def grouped(parameters):
        first, *others = parameters
        return Momentum([{"params": [first]}, {"params": others, "lr": 0.1}], lr=0.01)

    svis, x_0 = placed(captures, grouped)
    agree(svis, [[x_0]] * 6)
    for svi in svis:
        first, second = svi.optimizer.param_groups
        first["params"].append(second["params"].pop(0))
    agree(svis, [[x_0]] * 6)
    assert len(captures) == 2


class Decaying(Momentum):
    """Its steps shrink by what it keeps in one place or another."""

    def __init__(self, parameters, where):
        super().__init__(parameters)
        self.where, self.decay, self.count = where, 0.9, 0
        (group,) = self.param_groups
        group["pair"], group["list"] = (torch.full_like(group["lr"], 0.9), 0.5), [0.9]

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        self.count += self.where == "a counter"
        for parameter in group["params"]:
            kept = self.state[parameter]
            kept.setdefault("sums", [torch.ones_like(parameter)])
            kept["count"] = kept.get("count", 0) + (self.where == "a counter of each parameter")
            parameter.sub_(0.01 * kept["sums"][0].mul_(group["pair"][0]))
            parameter.mul_(1 - 0.01 * (self.decay + group["list"][0] + self.count + kept["count"]))


def other_sums(svi):
    for kept in svi.optimizer.state.values():
        kept["sums"][0] = 3 * kept["sums"][0]


def other_pair(svi):
    """First one of the same value, and then another value in place."""
    (group,) = svi.optimizer.param_groups
    group["pair"] = (group["pair"][0].clone(), 0.5)
    step(svi)
    group["pair"][0].mul_(0.5)


READ = {  # where an optimizer may keep what it reads, how it changes, and whether a step then captured goes on
    "a tensor in a tuple": (other_pair, True),
    "tensors in a list": (other_sums, True),
    "a number in a list": (lambda svi: svi.optimizer.param_groups[0]["list"].__setitem__(0, 5.0), False),
    "an attribute": (lambda svi: setattr(svi.optimizer, "decay", 5.0), False),
    "a counter": (lambda svi: None, None),
    "a counter of each parameter": (lambda svi: None, None),
}


@pytest.mark.parametrize("where", READ)
def test_a_captured_step_sees_what_an_optimizer_of_ones_own_reads(interpreted, captures, where):
    svis, x_0 = placed(captures, functools.partial(Decaying, where=where))
    change, goes_on = READ[where]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        agree(svis, [[x_0]] * 6)
        assert len(captures) == (goes_on is not None)
        for svi in svis:
            change(svi)
        agree(svis, [[x_0]] * 6)
    assert len(captures) == (0 if goes_on is None else 1 + goes_on)
    assert len(record) == (not goes_on)
    assert all("the optimizer's settings change" in str(warning.message) for warning in record)


LAYOUTS = {  # of a batch of shape (3, 2), and whether a step with it is captured
    "columns of a wider one": (lambda x: torch.cat([x, x], 1)[:, :2], True),
    "every other row": (lambda x: torch.cat([x, x])[::2], True),
    "transposed": (lambda x: x.T.contiguous().T, True),
    "overlapping rows": (lambda x: x.flatten()[:4].unfold(0, 2, 1), True),
    "expanded": (lambda x: x[:1].expand(3, 2), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_captured_step_has_its_data_as_they_are_laid_out(interpreted, captures, layout):
    svis, x_0 = placed(captures)
    laid_out, is_captured = LAYOUTS[layout]
    agree(svis, [[laid_out(number * x_0)] for number in range(1, 9)])
    assert len(captures) == is_captured


class Pairs(nn.Module):
    """Two data, of which the second may be halved in place."""

    def __init__(self, halves=False):
        super().__init__()
        self.w, self.halves = nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), halves

    def forward(self, x, y):
        for name, value in (("x", x), ("y", y)):
            pyro.sample(name, dist.Normal(self.w, 2.0).expand(value.shape).to_event(2), obs=value)
        if self.halves:
            y.mul_(0.5)


@pytest.mark.parametrize("halves", [False, True])
def test_a_captured_step_with_one_tensor_twice_or_one_that_it_changes(interpreted, captures, halves):
    found, x_0 = [], X_0.to(captures.device)
    for compiled in (True, False):
        svi = SVI(Pairs(halves).to(x_0.device), nothing, Momentum, DiffusionELBO(), compile=compiled)
        y = x_0.clone()
        found.append([(svi.step(x_0 if halves else y, y), y.clone()) for _ in range(8)])
    torch.testing.assert_close(*found, **ROUNDING)
    assert len(captures) == (not halves)


def test_a_graph_tells_where_it_draws():
    """A draw elsewhere than on the device would be made once, as a step is captured."""
    x, found = torch.zeros(2, device="meta"), []
    for draw in (lambda: torch.rand(()), lambda: torch.rand(2, device="meta"), lambda: torch.ones(())):
        graph = Graph(lambda x, draw=draw: (x * draw(),), (x,), [], [], [])
        found.append([device.type for device in graph.draws_on])
    assert found == [["cpu"], ["meta"], []]


def test_a_tensor_of_another_shape_in_the_same_place_is_seen():
    layer = nn.BatchNorm1d(4)
    parts = Composition([layer], list(layer.buffers()))
    assert parts.holds()
    layer.running_mean.data = layer.running_mean.data[:2]
    assert not parts.holds()


def test_a_captured_step_gives_no_gradient_to_its_data(interpreted, captures):
    svis, x_0 = placed(captures)
    agree(svis, [[x_0]] * 6)
    data = [x_0.clone().requires_grad_() for _ in svis]
    for svi, x in zip(svis, data, strict=True):
        pyro.set_rng_seed(1)
        svi.step(x)
    torch.testing.assert_close(*(x.grad for x in data), **ROUNDING)
    assert len(captures) == 1


def test_a_captured_step_that_cannot_go_on_says_so(interpreted, captures):
    """A learning rate that is a number is a constant of the graph: it goes on without the capture."""
    svis, x_0 = placed(captures, functools.partial(Momentum, lr=0.01))
    agree(svis, [[x_0]] * 7)
    for svi in svis:
        svi.optimizer.param_groups[0]["lr"] = 0.001
    with pytest.warns(RuntimeWarning, match="give lr as a tensor on the device"):
        agree(svis, [[x_0]])
    agree(svis, [[x_0]] * 5)
    assert len(captures) == 1


def test_a_step_that_reads_what_is_on_another_device_is_not_captured(interpreted, captures):
    """A graph would keep the value that it had, and not see it change in place."""
    svis, x_0 = placed(captures)
    agree(svis, [[x_0]] * 2)
    for svi in svis:
        svi.optimizer.param_groups[0]["elsewhere"] = torch.zeros((), device="meta")
    with pytest.warns(RuntimeWarning, match="on several devices; give lr as a tensor on the device"):
        agree(svis, [[x_0]] * 8)
    assert not captures


class Reading(Momentum):
    def step(self, closure=None):
        assert all(float(parameter.grad.sum()) < 1e9 for parameter in self.param_groups[0]["params"])
        super().step()


class Moving(Momentum):
    """It puts other tensors in the place of weights, which a graph would go on to read where they were."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.01 * parameter.grad


@pytest.mark.parametrize("captures", ["recorded"], indirect=True)  # after it, torch draws no more on a GPU
@pytest.mark.parametrize(("optim", "why"), [(Reading, "a value is read"), (Moving, "a tensor is moved")])
def test_a_step_that_cannot_be_captured_says_so(interpreted, captures, optim, why):
    svis, x_0 = placed(captures, optim)
    agree(svis, [[x_0]] * 5)
    with pytest.raises(RuntimeError, match=rf"must not read values .* capturable=False .* captured \({why}"):
        svis[0].step(x_0)


@pytest.mark.parametrize("option", [{"accumulate": 2}, {"nonfinite": "stop"}])
def test_a_step_in_which_something_is_decided_is_not_captured(interpreted, captures, option):
    svis, x_0 = placed(captures, **option)
    agree(svis, [[x_0]] * 8)
    assert not captures


class Running(nn.Module):
    """A running mean, kept by another tensor in each call."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, x):
        self.mean = (self.mean + x) / 2
        pyro.sample("x", dist.Normal(self.w + self.mean, 1.0), obs=x)


def test_a_buffer_that_the_program_replaces_is_kept(interpreted):
    """1/2, 3/4, ..., 31/32."""
    svis = [SVI(Running(), nothing, sgd, DiffusionELBO(), compile=compiled) for compiled in (True, False)]
    x = torch.tensor(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to run it as it is would do
        losses = [[float(svi.step(x)) for _ in range(5)] for svi in svis]
    assert losses[0] == pytest.approx(losses[1])
    assert float(svis[0].model.mean) == pytest.approx(31 / 32)


def test_handlers_around_a_step_have_their_effect(interpreted):
    svis = [SVI(Sum(), nothing, sgd, DiffusionELBO(), compile=compiled) for compiled in (True, False)]
    for number in range(4):
        with pyro.poutine.scale(scale=1.0 + number):
            torch.testing.assert_close(*(svi.step(X) for svi in svis))


def test_a_graph_computes_in_the_precision_that_autocast_asks_for():
    """Each precision has a graph of its own: the same arguments under another one are not run by the first."""
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    compiled = Compiled(lambda x: (layer(x),), [layer])
    for precision in (None, torch.bfloat16, None, torch.bfloat16):
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None), torch.no_grad():
            (found,), expected = compiled(x), layer(x)
        assert found.dtype == expected.dtype == (precision or torch.float32)
        torch.testing.assert_close(found, expected)
    assert compiled.made == 2


def test_a_graph_makes_numbers_of_the_default_dtype():
    x = torch.arange(3)
    compiled = Compiled(lambda x: (x * torch.full((3,), 1 / 3),))
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            (found,) = compiled(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found, torch.tensor([0, 1 / 3, 2 / 3], dtype=dtype))
    finally:
        torch.set_default_dtype(before)
