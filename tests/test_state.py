"""There is no state but the state: whatever is done to a part, what comes next is what a new model of that state gives.

A new model is one made anew, with the ``state_dict`` of the one that was changed. Bounds, steps, samples and flows of
the two are compared to the last bit, those of graphs to rounding.
"""

import ast
import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loops import sgd
from models import (
    BIT_REVERSES,
    DECODERS,
    DENOISERS,
    DRAWINGS,
    KINDS,
    SCHEDULES,
    TIMES,
    VARIANCES,
    Kind,
    Network,
    T,
    gaussian,
)
from torch import nn

import pyrodiff

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def slowly(parameters):
    return sgd(parameters, lr=1e-3)


class Subject:
    """A model with all that is done with it, made once: a sampler, and a training without messages and one with."""

    def __init__(self, kind: Kind, parts: tuple, compile: bool = False, sampled: bool = True) -> None:
        self.kind, (self.diffusion, self.pair) = kind, parts
        self.seeds = (3, 4, 5) if compile else (3,)  # the first step after a change may run without a graph
        self.x_0 = kind.data(next(self.diffusion.parameters()).dtype)
        self.sampled = sampled  # whether bounds and samples are asked for, or steps alone
        self.sampler = pyrodiff.AncestralSampler(self.diffusion, compile=compile)
        options = ({"compile": compile, "validate": False}, {"validate": True})
        self.svis = [
            pyrodiff.SVI(self.pair.model, self.pair.guide, slowly, pyrodiff.DiffusionELBO(), **one)
            for one in options[: 1 if compile else 2]
        ]

    def gives(self, heard: bool = True) -> dict:
        """What a bound, a sample and steps of training give, each from a seed: the steps change the parameters."""
        found = {}
        if self.sampled:
            bound = pyrodiff.bound(self.diffusion, self.x_0, generator=1)
            found["bound"] = torch.cat([bound.prior[None], bound.denoising, bound.reconstruction[None]])
            found["sample"] = self.sampler.trajectory(3, generator=2)
        for svi in self.svis[: 2 if heard else 1]:
            for seed in self.seeds[:1] if svi.validate else self.seeds:
                torch.manual_seed(seed)
                name = f"step {seed}{', heard' * bool(svi.validate)}"
                found[f"loss of {name}"] = svi.step(self.x_0)
                for part, tensor in self.pair.named_parameters():
                    found[f"gradient of {part} in {name}"] = None if tensor.grad is None else tensor.grad.clone()
            for part, tensor in tensors(self.pair).items():
                found[f"{part} after {name}"] = tensor.detach().clone()
        return found

    def flows(self) -> dict:
        """What the flow gives."""
        flow = pyrodiff.ode_log_prob(self.diffusion, self.x_0, num_probes=1, generator=6, tolerance=1e-2)
        return {"flow": flow.estimates}

    def anew(self, change: Callable | None = None) -> "Subject":
        """A model newly made, with the state of this one; changed likewise where that is not in the state."""
        dtype = next(self.diffusion.parameters()).dtype
        parts = self.kind.pair()
        parts[1].to(dtype).load_state_dict(self.pair.state_dict())
        if change is not None:
            change(parts)
        new = Subject(self.kind, parts, sampled=self.sampled)
        new.seeds = self.seeds
        return new


def made(kind, dtype=torch.float32, compile=False, heard=True, sampled=True):
    """A model that has been bounded, sampled from and trained already."""
    parts = kind.pair()
    parts[1].to(dtype)
    subject = Subject(kind, parts, compile, sampled)
    subject.gives(heard)
    return subject


def agree(ours, theirs, after="", **tolerance):
    """Compare all that two models give, to the last bit where no tolerance is given."""
    assert ours.keys() == theirs.keys(), after
    for name, value in ours.items():
        other = theirs[name]
        if value is None or other is None:
            assert value is other, (after, name)
        elif tolerance:
            assert torch.allclose(value, other, **tolerance), (after, name, value, other)
        else:
            assert torch.equal(value, other), (after, name, value, other)


def differ(kind, ours, theirs):
    """Whether all that is computed is another: the bound, the losses and, unless it is one of few values, a sample."""
    few = kind.is_of_bits or "levels" in str(kind.options)
    names = [name for name in ours if name in ("bound", "flow") or name.startswith("loss")] + ["sample"] * (not few)
    return all(not torch.equal(ours[name], theirs[name]) for name in names if name in ours and name in theirs)


# What may be done to a model


def tensors(module):
    """Each parameter and each buffer once, by a name of it."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def others(kind, dtype=torch.float32, other=True):
    """Another model of the kind, or the first again, and what it has in the place of each tensor."""
    model = kind.pair(other)[1].to(dtype)
    return model, {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def in_place(parts, other, values):
    with torch.no_grad():
        for name, tensor in tensors(parts[1]).items():
            tensor.copy_(values[name])


def through_data(parts, other, values):
    for name, tensor in tensors(parts[1]).items():
        tensor.data[...] = values[name]


def through_numpy(parts, other, values):
    for name, tensor in tensors(parts[1]).items():
        tensor.detach().numpy()[...] = values[name].numpy()


def loaded(parts, other, values):
    parts[1].load_state_dict(other.state_dict())


def replaced_tensors(parts, other, values):
    _replace_tensors(parts, tensors(parts[1]), values)


def replaced_buffers(parts, other, values):
    _replace_tensors(parts, dict(parts[1].named_buffers()), values)


def _replace_tensors(parts, found, values):
    """Put another tensor in the place of each that is named, the same in all modules that share one."""
    new = {
        id(tensor): nn.Parameter(values[name].clone()) if isinstance(tensor, nn.Parameter) else values[name].clone()
        for name, tensor in found.items()
    }
    for module in list(parts[1].modules()):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) in new:
                setattr(module, name, new[id(tensor)])


def replaced_modules(parts, other, values):
    """Another module in the place of each that has tensors of its own and none with a child below, wherever it is."""
    new = {}
    for path, module in parts[1].named_modules():
        of_its_own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if of_its_own and not list(module.children()):
            new[id(module)] = copy.deepcopy(other.get_submodule(path))
    assert new
    for module in {id(part): part for root in parts for part in root.modules()}.values():
        for name, child in list(module.named_children()):
            if id(child) in new:
                setattr(module, name, new[id(child)])


def replaced_networks(parts, other, values):
    _replace(parts, other, (Network, pyrodiff.networks.MLP))


def replaced_numbers(parts, other, values):
    """Schedule, variance and drawing: what has no parameters."""
    _replace(parts, other, (pyrodiff.Schedule, pyrodiff.Variance, pyrodiff.Drawing))


def _replace(parts, other, kinds):
    """Put the other model's modules of some kinds in the place of these, wherever they stand."""
    new = {}
    for path, module in parts[1].named_modules():
        if isinstance(module, kinds) and not isinstance(module, pyrodiff.SubSchedule):
            new[id(module)] = copy.deepcopy(other.get_submodule(path))
    for place in {id(part): part for root in parts for part in root.modules()}.values():
        for name, child in list(place.named_children()):
            if id(child) in new:
                setattr(place, name, new[id(child)])


def hooked(parts, *rest):
    """A hook on everything that is called, which changes the network, the variance and the drawn bits."""

    def halve(module, args, output):
        return output * 0.5 if isinstance(output, torch.Tensor) and output.is_floating_point() else None

    return [
        module.register_forward_hook(halve)
        for module in parts[1].modules()
        if isinstance(module, nn.Linear | pyrodiff.Variance | pyrodiff.Denoiser | pyrodiff.SimpleWeighting)
    ]


def hooked_and_unhooked(parts, *rest):
    for handle in hooked(parts):
        handle.remove()


def cast_and_back(parts, *rest):
    there = torch.float32 if next(parts[0].parameters()).dtype == torch.float64 else torch.float64
    back = next(parts[0].parameters()).dtype
    parts[1].to(there).to(back)


WRITES = {
    "in place": in_place,
    "through data": through_data,
    "through NumPy": through_numpy,
    "a state that is loaded": loaded,
    "replaced tensors": replaced_tensors,
    "replaced modules": replaced_modules,
    "replaced networks": replaced_networks,
    "replaced numbers": replaced_numbers,
}
STAY = {"a hook for nothing": hooked_and_unhooked, "cast and back": cast_and_back}
IN_PLACE = {name: write for name, write in WRITES.items() if not name.startswith("replaced")}
REPLACING = {name: write for name, write in WRITES.items() if name.startswith("replaced")}
REPLACING["replaced buffers of replaced modules"] = replaced_buffers
REPLACING["replaced tensors of replaced modules"] = replaced_tensors


def writes(subject, kind, changes, dtype=torch.float32):
    """Do to the model one thing after the other, each time with the numbers of another model than before."""
    for number, (name, write) in enumerate(changes.items()):
        write((subject.diffusion, subject.pair), *others(kind, dtype, other=number % 2 == 0))
        yield name


@pytest.mark.parametrize("parts", [SCHEDULES, VARIANCES, DENOISERS, DECODERS, BIT_REVERSES, DRAWINGS])
def test_every_part_is_that_of_a_model(parts):
    calls = [inspect.signature(kind.make).bind(1.0, **dict(kind.options)) for kind in KINDS.values()]
    for call in calls:
        call.apply_defaults()
    used = {kind.drawing for kind in KINDS.values()}.union(*(call.arguments.values() for call in calls))
    assert used >= parts.keys()


@every_kind
def test_what_is_written_is_all_that_counts(kind):
    subject = made(kind)
    before = subject.gives()
    for name in writes(subject, kind, WRITES):
        new, heard = subject.anew(), name in ("in place", "replaced tensors")
        ours = subject.gives(heard)
        agree(ours, new.gives(heard), name)
        assert differ(kind, ours, before), name
        before = ours


@every_kind
def test_each_tensor_counts_as_soon_as_it_is_written(kind):
    subject = made(kind)
    _, values = others(kind)
    for name, tensor in tensors(subject.pair).items():
        with torch.no_grad():
            tensor.copy_(values[name])
        new = subject.anew()
        agree(subject.gives(heard=False), new.gives(heard=False), name)


FLOWS = [name for name, kind in KINDS.items() if kind.has_flow and not kind.simple]


@pytest.mark.parametrize("kind", [KINDS[name] for name in FLOWS], ids=FLOWS)
def test_a_flow_follows_what_is_written(kind):
    subject = made(kind)
    before = subject.flows()
    changes = {name: WRITES[name] for name in ("through NumPy", "replaced numbers")}
    for name in writes(subject, kind, changes):
        ours = subject.flows()
        agree(ours, subject.anew().flows(), name)
        assert differ(kind, ours | {"sample": ours["flow"]}, before | {"sample": before["flow"]}), name
        before = ours


@every_kind
def test_what_changes_no_state_changes_nothing(kind):
    subject = made(kind)
    for name, change in STAY.items():
        new = subject.anew()
        change((subject.diffusion, subject.pair))
        agree(subject.gives(), new.gives(), name)


@every_kind
def test_a_hook_is_run_while_it_is_there_and_not_after(kind):
    subject = made(kind)
    plain, new = subject.anew(), subject.anew(change=hooked)
    handles = hooked((subject.diffusion, subject.pair))
    ours = subject.gives()
    agree(ours, new.gives())
    assert differ(kind, ours, plain.gives())
    for handle in handles:
        handle.remove()
    new = subject.anew()
    agree(subject.gives(), new.gives())


@every_kind
def test_a_copy_is_a_model_of_its_own(kind):
    subject = made(kind)
    parts = subject.diffusion, subject.pair
    twins = {"deepcopy": copy.deepcopy(parts), "pickle": pickle.loads(pickle.dumps(parts))}
    kept, written = subject.anew().gives(), None
    for how, twin in twins.items():
        twin = Subject(kind, twin)
        agree(twin.gives(), kept, how)  # which trains the copy
        in_place((twin.diffusion, twin.pair), *others(kind))
        written = written or twin.anew().gives(heard=False)
        agree(twin.gives(heard=False), written, how)
    agree(subject.gives(), kept)  # the one that was copied knows nothing of it


def test_a_model_that_was_heard_by_pyro_can_be_pickled():
    subject = made(KINDS["linear schedule"])
    twin = pickle.loads(pickle.dumps(subject.diffusion))
    bounds = [pyrodiff.bound(one, subject.x_0, generator=1).nats for one in (subject.diffusion, twin)]
    assert torch.equal(*bounds)


ROUNDING = {"rtol": 1e-9, "atol": 1e-11}


def agree_as_graphs(subject, after, change=None):
    """Compare three steps, of which the second or the third runs a graph, with those of a new model."""
    new = subject.anew(change)
    agree(subject.gives(), new.gives(heard=False), after, **ROUNDING)


GRAPHS = [  # the sampler is compiled too
    "linear schedule",
    "fixed variance of a sub-chain",
    "levels, discretized",
    "bits of a sub-chain",
    "second moment drawing",
    "simple weighting, drawn by importance",
]


@pytest.mark.parametrize("name", KINDS)
def test_a_graph_reads_what_is_written(name, interpreted):
    kind = KINDS[name]
    subject = made(kind, torch.float64, compile=True, sampled=name in GRAPHS)
    number = len(interpreted)
    assert number == 1 + (name in GRAPHS)
    for write in writes(subject, kind, IN_PLACE, torch.float64):
        agree_as_graphs(subject, write)
    assert len(interpreted) == number


REPLACED = ["linear schedule", "bits of a sub-chain", "second moment drawing", "simple weighting, drawn by importance"]


@pytest.mark.parametrize(("name", "sampled"), [*((name, False) for name in REPLACED), ("levels, discretized", True)])
def test_a_graph_is_not_run_where_a_part_was_replaced(name, sampled, interpreted):
    kind = KINDS[name]
    subject = made(kind, torch.float64, compile=True, sampled=sampled)
    for change in writes(subject, kind, REPLACING, torch.float64):
        agree_as_graphs(subject, change)
    assert not subject.svis[0]._gradient.compiled.failure


@pytest.mark.parametrize(
    "name", ["fixed variance of a sub-chain", "levels, discretized", "bits", "simple weighting, drawn by importance"]
)
def test_a_graph_runs_the_hooks_that_are_there(name, interpreted):
    subject = made(KINDS[name], torch.float64, compile=True)
    handles = hooked((subject.diffusion, subject.pair))
    agree_as_graphs(subject, "hooks", hooked)
    for handle in handles:
        handle.remove()
    agree_as_graphs(subject, "hooks that were taken off")
    for change, do in STAY.items():
        do((subject.diffusion, subject.pair))
        agree_as_graphs(subject, change)


def test_a_graph_that_is_really_compiled_reads_what_is_written():
    """What needs no other graph: numbers that are written into the tensors that it reads."""
    kind = KINDS["simple weighting, drawn by importance"]
    parts = kind.pair()
    parts[1].double()
    subject = Subject(kind, parts)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        svi = pyrodiff.SVI(subject.pair.model, subject.pair.guide, slowly, pyrodiff.DiffusionELBO(), compile=True)
        for _ in range(3):
            svi.step(subject.x_0)
        for _ in writes(subject, kind, IN_PLACE, torch.float64):
            new, losses = subject.anew(), []
            for one in (svi, new.svis[0]):
                torch.manual_seed(3)
                losses.append(one.step(subject.x_0))
            torch.testing.assert_close(*losses, **ROUNDING)
            for ours, theirs in zip(subject.pair.parameters(), new.pair.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert svi._gradient.compiled.made == 1
    assert not svi._gradient.compiled.failure


# What is said, and what is shared


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_shows_the_numbers_that_were_loaded(name):
    ours, theirs = (SCHEDULES[name](T, k) for k in (1.0, 1.2))
    before = repr(ours)
    assert before.split("(")[1] != repr(theirs).split("(")[1]
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours).split("(")[1] == repr(theirs).split("(")[1]
    assert type(ours).__name__ in repr(ours)


@pytest.mark.parametrize("variance", VARIANCES)
def test_a_weighting_follows_what_is_loaded_into_the_process_that_it_weighs(variance):
    ours, theirs = (gaussian(k, variance=variance) for k in (1.0, 1.2))
    t = torch.arange(1, T + 1)
    weighting = pyrodiff.SimpleWeighting(ours.reverse)
    before = weighting(t)
    ours.forward_process.load_state_dict(theirs.forward_process.state_dict())
    half = weighting(t)
    assert not (half == before).any()
    ours.reverse.load_state_dict(theirs.reverse.state_dict())
    assert torch.equal(weighting(t), pyrodiff.SimpleWeighting(theirs.reverse)(t))
    assert torch.equal(half, weighting(t)) == (variance != "fixed")


def whole(kind, other=False):
    """The diffusion of all steps that a kind is made of, uncut."""
    options = {**dict(kind.options), "cut": False}
    with torch.random.fork_rng([]):
        torch.manual_seed(2 if other else 1)
        return kind.make(1.2 if other else 1.0, **options)


CUT = [name for name in KINDS if "sub-" in name]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("write", ["in place", "through data", "through NumPy", "a state that is loaded"])
def test_a_chain_that_was_cut_follows_the_one_that_it_was_cut_from(write, name):
    kind, times = KINDS[name], (1, 3)
    ours, theirs = whole(kind), whole(kind, other=True)
    sub, x_0 = ours.subchain(times), kind.data()
    before = pyrodiff.bound(sub, x_0, generator=1).nats
    seen = [before]
    for part in tensors(ours):  # the schedule, the variance, the rate, and the network, one after the other
        values = {part: tensors(theirs)[part].detach().clone()}
        if write == "a state that is loaded":
            ours.load_state_dict({**ours.state_dict(), **{part: values[part]}})
            ours.load_state_dict({k: v for k, v in _shared(ours, part, values[part]).items()})
        else:
            _write(write, tensors(ours)[part], values[part])
        nats = pyrodiff.bound(sub, x_0, generator=1).nats
        assert torch.equal(nats, pyrodiff.bound(ours.subchain(times), x_0, generator=1).nats)
        assert not torch.equal(nats, seen[-1])
        seen.append(nats)
        assert torch.equal(
            pyrodiff.AncestralSampler(sub)(5, generator=2),
            pyrodiff.AncestralSampler(ours.subchain(times))(5, generator=2),
        )
    assert torch.equal(seen[-1], pyrodiff.bound(theirs.subchain(times), x_0, generator=1).nats)


def _shared(module, part, value):
    """The state of a module, with a value under each name that one tensor has there."""
    tensor, state = tensors(module)[part], module.state_dict()
    names = [name for name, one in state.items() if one.data_ptr() == tensor.data_ptr()]
    return {**state, **dict.fromkeys(names, value)}


def _write(how, tensor, value):
    if how == "in place":
        with torch.no_grad():
            tensor.copy_(value)
    elif how == "through data":
        tensor.data[...] = value
    else:
        tensor.detach().numpy()[...] = value.numpy()


def test_a_chain_of_a_chain_follows_as_well():
    kind = KINDS["fixed variance of a sub-chain"]
    ours, theirs = (kind.pair(other)[0] for other in (False, True))
    short = ours.subchain((2, 3))
    ours.load_state_dict(theirs.state_dict())
    x_0 = kind.data()
    found = [pyrodiff.bound(one, x_0, generator=1).nats for one in (short, theirs.subchain((2, 3)))]
    assert torch.equal(*found)
    assert short.forward_process.schedule.schedule.times == TIMES


# What the sources say

FOLDER = Path(pyrodiff.__file__).parent
SIMPLE = [
    *(
        "process/schedules",
        "process/learned",
        "process/noise_levels",
        "process/quantization",
        "process/forward",
        "model/denoisers",
        "model/clipping",
        "model/variances",
    ),
    *("model/reverse", "model/decoders", "pair/times"),
    *("networks/embeddings", "networks/mlp", "networks/unet", "networks/offset", "networks/scaled"),
]
WORDS = ("trust", "blind", "tabulat", "proxy", "make_fx", "tracing", "traced", "_version", "lru_cache", "cached")
NAMES = {"cache", "trace", "tracer", "_version"}
BELOW = {"elbo", "compilation", "gradients", "svi"}


def names_in(tree):
    """Every name that a source reads, writes, defines, imports or takes as an argument."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("module", SIMPLE)
def test_what_a_model_is_made_of_knows_nothing_of_graphs_or_caches(module):
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    for name in names_in(tree):
        lower = name.lower()
        assert not [word for word in WORDS if word in lower], name
        assert not set(lower.split(".")) & NAMES, name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not BELOW & {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            assert not [name for name in found if name.startswith(("pyrodiff", "torch.fx", "torch._", "functools"))]


@pytest.mark.parametrize("module", SIMPLE)
def test_nothing_depends_on_an_exact_type(module):
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                called = side.func if isinstance(side, ast.Call) else None
                assert not (isinstance(called, ast.Name) and called.id == "type"), node.lineno
                assert not (isinstance(side, ast.Attribute) and side.attr == "__class__"), node.lineno
