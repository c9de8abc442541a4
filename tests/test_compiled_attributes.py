"""A graph sees what is there: whatever a program reads from a module's plain attributes is what it would be eagerly."""

import math
import random
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Gaussian, GaussianPosterior
from loops import nothing, sgd, still
from torch import nn

import pyrodiff
from pyrodiff import SVI, AncestralSampler, DiffusionELBO
from pyrodiff.running.compilation import Compiled

X = torch.tensor([1.0, -2.0, 4.0])
GLOBAL = torch.tensor(0.5)
SCALED_BY = 2.0


def heard(call):
    """What a call returns, and what it warns of, all in RuntimeWarnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = call()
    assert all(warning.category is RuntimeWarning for warning in record)
    return result, [str(warning.message) for warning in record]


def expected_loss(w, shift=0.0, scale=1.0):
    """-log N(x; w + shift, scale^2) of the data."""
    w, shift = torch.as_tensor(w).detach(), torch.as_tensor(shift).detach()
    return -torch.distributions.Normal(w + shift, torch.as_tensor(float(scale))).log_prob(X).sum()


class Holder(nn.Module):
    """p(x) = N(w + f(module), 1), where f reads what the module holds."""

    def __init__(self, read, **attributes):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.2, 0.1]))
        self.read = read
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        pyro.sample("x", dist.Normal(self.w + self.read(self), 1.0).to_event(1), obs=x)


class Inner(nn.Module):
    """A module that returns what it holds."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        return self.value * 1.0


class Settings:
    """A plain object of the user's."""

    def __init__(self, shift):
        self.shift = shift


def replace(name, value):
    return lambda module: setattr(module, name, value)


def hooked(module):
    module.inner.register_forward_hook(lambda module, args, output: output + 2.0)


def hooked_before(module):
    module.inner.register_forward_pre_hook(lambda module, args: (args[0] - 3.0,))


def unhooked(module):
    module.handle.remove()


def with_a_hook(read):
    module = Holder(read, inner=nn.Identity())
    module.handle = module.inner.register_forward_hook(lambda module, args, output: 3 * output)
    return module


def through_inner(module):
    return module.inner(torch.tensor(1.0))


def of_string(module):
    return {"up": 1.0, "down": -1.0}[module.way]


def set_item(name, key, value):
    def change(module):
        getattr(module, name)[key] = value

    return change


CASES = {  # how a module is made, what changes, and what it reads before and after
    "tensor": (lambda: Holder(lambda m: m.shift, shift=torch.tensor(1.0)), replace("shift", torch.tensor(3.0)), 1, 3),
    "number": (lambda: Holder(lambda m: m.shift, shift=1.0), replace("shift", 3.0), 1, 3),
    "int": (lambda: Holder(lambda m: m.shift, shift=1), replace("shift", 3), 1, 3),
    "number of another type": (
        lambda: Holder(lambda m: 1.0 / (1 + isinstance(m.shift, bool)), shift=1),
        replace("shift", True),
        1,
        0.5,
    ),
    "bool": (lambda: Holder(lambda m: 1.0 if m.on else 3.0, on=True), replace("on", False), 1, 3),
    "none": (lambda: Holder(lambda m: 1.0 if m.on is None else 3.0, on=None), replace("on", 0), 1, 3),
    "string": (lambda: Holder(of_string, way="up"), replace("way", "down"), 1, -1),
    "function": (lambda: Holder(lambda m: m.f(1.0), f=lambda x: x), replace("f", lambda x: 3 * x), 1, 3),
    "tensor in a list": (
        lambda: Holder(lambda m: m.all[1], all=[torch.tensor(0.0), torch.tensor(1.0)]),
        set_item("all", 1, torch.tensor(3.0)),
        1,
        3,
    ),
    "number in a list": (lambda: Holder(lambda m: m.all[1], all=[0.0, 1.0]), set_item("all", 1, 3.0), 1, 3),
    "length of a list": (lambda: Holder(lambda m: len(m.all), all=["a"]), lambda m: m.all.extend("bc"), 1, 3),
    "number in a list in a list": (lambda: Holder(lambda m: m.all[0][0], all=[[1.0]]), set_item("all", 0, [3.0]), 1, 3),
    "number deep in a list": (
        lambda: Holder(lambda m: m.all[0][0], all=[[1.0]]),
        lambda m: m.all[0].__setitem__(0, 3.0),
        1,
        3,
    ),
    "tensor in a dict": (
        lambda: Holder(lambda m: m.all["b"], all={"b": torch.tensor(1.0)}),
        set_item("all", "b", torch.tensor(3.0)),
        1,
        3,
    ),
    "number in a dict": (lambda: Holder(lambda m: m.all["b"], all={"b": 1.0}), set_item("all", "b", 3.0), 1, 3),
    "new entry of a dict": (lambda: Holder(lambda m: 1 + 2 * len(m.all), all={}), set_item("all", "b", 3.0), 1, 3),
    "exchanged entry of a dict": (
        lambda: Holder(lambda m: sum(m.all.values()) if "a" in m.all else 3.0, all={"a": 1.0}),
        lambda m: (m.all.pop("a"), m.all.update(b=1.0)),
        1,
        3,
    ),
    "exchanged key of a dict": (
        lambda: Holder(lambda m: 1.0 if "a" in m.all else 3.0, all={"a": None}),
        lambda m: (m.all.pop("a"), m.all.update(b=None)),
        1,
        3,
    ),
    "order of a dict": (
        lambda: Holder(lambda m: next(iter(m.all.values())), all={"a": 1.0, "b": 3.0}),
        lambda m: m.all.update(a=m.all.pop("a")),
        1,
        3,
    ),
    "attribute of a module in a list": (
        lambda: Holder(lambda m: m.all[0].value, all=[Inner(1.0)]),
        lambda m: setattr(m.all[0], "value", 3.0),
        1,
        3,
    ),
    "module in a list": (
        lambda: Holder(lambda m: m.all[0](), all=[Inner(1.0)]),
        set_item("all", 0, Inner(3.0)),
        1,
        3,
    ),
    "forward of a submodule": (
        lambda: Holder(through_inner, inner=nn.Identity()),
        lambda m: setattr(m.inner, "forward", lambda x: 3 * x),
        1,
        3,
    ),
    "tuple": (lambda: Holder(lambda m: m.all[1], all=(0.0, 1.0)), replace("all", (0.0, 3.0)), 1, 3),
    "dict in a tuple": (
        lambda: Holder(lambda m: m.all[0]["a"], all=({"a": 1.0},)),
        lambda m: m.all[0].update(a=3.0),
        1,
        3,
    ),
    "object": (lambda: Holder(lambda m: m.it.shift, it=Settings(1.0)), replace("it", Settings(3.0)), 1, 3),
    "law": (
        lambda: Holder(lambda m: m.law.mean, law=dist.Normal(1.0, 1.0)),
        replace("law", dist.Normal(3.0, 1.0)),
        1,
        3,
    ),
    "parameter of a law": (
        lambda: Holder(lambda m: m.law.loc, law=dist.Normal(1.0, 1.0)),
        lambda m: setattr(m.law, "loc", torch.tensor(3.0)),
        1,
        3,
    ),
    "attribute of a submodule": (
        lambda: Holder(lambda m: m.inner.p, inner=nn.Dropout(1.0)),
        lambda m: setattr(m.inner, "p", 3.0),
        1,
        3,
    ),
    "submodule": (
        lambda: Holder(through_inner, inner=nn.Identity()),
        lambda m: setattr(m, "inner", nn.ReLU().register_forward_hook(lambda *a: 3 * a[-1]) and nn.Hardtanh(3.0, 4.0)),
        1,
        3,
    ),
    "new attribute": (lambda: Holder(lambda m: getattr(m, "late", 1.0)), replace("late", 3.0), 1, 3),
    "attribute that is gone": (
        lambda: Holder(lambda m: getattr(m, "early", 3.0), early=1.0),
        lambda m: delattr(m, "early"),
        1,
        3,
    ),
    "hook": (lambda: Holder(through_inner, inner=nn.Identity()), hooked, 1, 3),
    "hook before": (lambda: Holder(through_inner, inner=nn.Identity()), hooked_before, 1, -2),
    "hook that is gone": (lambda: with_a_hook(through_inner), unhooked, 3, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_program_reads_from_a_module_is_what_is_there(case, interpreted):
    """Eager value after the change, and after it is taken back; a graph each, and no warning."""
    make, change, before, after = CASES[case]
    svi = SVI(make(), nothing, still, DiffusionELBO(), compile=True)
    for value in (before, after):
        for _ in range(4):
            loss, messages = heard(lambda: svi.step(X))
            torch.testing.assert_close(loss, expected_loss(svi.model.w, float(value)))
            torch.testing.assert_close(svi.model.w.grad, svi.model.w.detach() + float(value) - X)
            assert messages == []
        if value == before:
            change(svi.model)
    assert len(interpreted) == 2


def test_what_nobody_changes_needs_one_graph(interpreted):
    """All kinds of attributes at once, and values that are equal to what was there."""
    module = Holder(
        lambda m: m.number * m.all[0] + m.law.loc,
        number=1.0,
        way="up",
        all=[0.5, {"a": (torch.tensor(1.0), None)}],
        law=dist.Normal(0.5, 1.0),
        it=Settings(3.0),
        handle=None,
    )
    module.register_forward_hook(lambda *args: None)
    svi = SVI(module, nothing, still, DiffusionELBO(), compile=True)
    for number in (1.0, 1.0, float("1.0"), 2.0 / 2):
        module.number, module.way, module.all[0] = number, "".join(["u", "p"]), 1.0 / 2
        torch.testing.assert_close(svi.step(X), expected_loss(module.w, 1.0))
    assert len(interpreted) == 1


@pytest.mark.parametrize("where", ["attribute", "list", "dict", "law"])
def test_what_is_written_into_a_plain_tensor_is_seen_without_a_new_graph(where, interpreted):
    shift = torch.tensor(1.0)
    held = {"attribute": shift, "list": [shift], "dict": {"a": shift}, "law": dist.Normal(shift, 1.0)}[where]
    read = {
        "attribute": lambda m: m.it,
        "list": lambda m: m.it[0],
        "dict": lambda m: m.it["a"],
        "law": lambda m: m.it.loc,
    }[where]
    svi = SVI(Holder(read, it=held), nothing, sgd, DiffusionELBO(), compile=True)
    eager = SVI(Holder(read, it=held), nothing, sgd, DiffusionELBO())
    for number in range(6):
        held_now = {"attribute": lambda: held, "list": lambda: held[0], "dict": lambda: held["a"]}.get(
            where, lambda: held.loc
        )()
        held_now.fill_(float(number) ** 2)
        (ours, messages), theirs = heard(lambda: svi.step(X)), eager.step(X)
        assert messages == []
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.new_tensor(svi.model.w.tolist()), eager.model.w.detach())
    assert len(interpreted) == 1


def test_only_so_many_values_have_a_graph(interpreted):
    """A number that grows with every step: eight graphs, a warning, and the eager value from then on."""
    svi = SVI(Holder(lambda m: m.shift, shift=0.0), nothing, still, DiffusionELBO(), compile=True)
    said = []
    for number in range(14):
        svi.model.shift = float(number)
        loss, messages = heard(lambda: svi.step(X))
        said += messages
        torch.testing.assert_close(loss, expected_loss(svi.model.w, float(number)))
    assert len(interpreted) == 8
    (message,) = said
    assert "8 graphs were made" in message


class Counting(nn.Module):
    """A program that keeps something in an attribute at every call."""

    def __init__(self, keep):
        super().__init__()
        self.w, self.kept, self.log = nn.Parameter(torch.tensor([0.5, -0.2, 0.1])), 0.0, []
        self.last, self.keep = torch.tensor(0.0), keep

    def forward(self, x):
        self.keep(self, x)
        pyro.sample("x", dist.Normal(self.w + self.kept + len(self.log) + self.last, 1.0).to_event(1), obs=x)


def counted(module, x):
    module.kept = module.kept + 1.0


def logged(module, x):
    module.log.append("a call")


def remembered(module, x):
    module.last = module.last / 2 + 1.0


KEEPERS = {
    "kept": (counted, lambda n: n),
    "list": (logged, lambda n: n),
    "last": (remembered, lambda n: 2 - 0.5 ** (n - 1)),
}


@pytest.mark.parametrize("name", KEEPERS)
def test_what_changes_at_every_call_is_named_and_runs_as_it_is(name, interpreted):
    keep, value = KEEPERS[name]
    svi = SVI(Counting(keep), nothing, still, DiffusionELBO(), compile=True)
    said, calls = [], 1  # a dry run, which is validated
    for _ in range(6):
        loss, messages = heard(lambda: svi.step(X))
        said += messages
        calls += 1
        torch.testing.assert_close(loss, expected_loss(svi.model.w, float(value(calls))))
    (message,) = said
    assert message.startswith("the pair of programs runs without being compiled: ")
    assert name in message
    assert interpreted == []


def test_an_attribute_that_changes_now_and_then_is_seen(interpreted):
    """By the program itself, at every third call: what is there is always what the eager twin has."""

    def keep(module, x):
        module.count = getattr(module, "count", 0) + 1
        module.kept = float(module.count // 3)

    svis = [SVI(Counting(keep), nothing, sgd, DiffusionELBO(), compile=compiled) for compiled in (True, False)]
    for _ in range(10):
        (ours, _), theirs = heard(lambda: svis[0].step(X)), svis[1].step(X)
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(svis[0].model.w, svis[1].model.w)


# What no module holds


class Plain(nn.Module):
    """p(x) = N(w + shift(), 1) with a parameter, and a function that reads from elsewhere."""

    def __init__(self, shift):
        super().__init__()
        self.w, self.shift = nn.Parameter(torch.tensor([0.5, -0.2, 0.1])), shift

    def forward(self, x):
        pyro.sample("x", dist.Normal(self.w + self.shift(), 1.0).to_event(1), obs=x)


def closed_over():
    hidden = torch.tensor(0.5)
    return lambda: hidden + 0.0


def closed_over_twice():
    hidden = torch.tensor(0.5)

    def inner():
        return hidden * 1.0

    return lambda: inner()


def of_the_module():
    return GLOBAL * 1.0


READS = {
    "closure": (closed_over, "'hidden'"),
    "closure of a closure": (closed_over_twice, "'hidden'"),
    "global": (lambda: of_the_module, "'GLOBAL'"),
}


@pytest.mark.parametrize("name", READS)
def test_a_tensor_that_a_program_closes_over_is_named_as_the_graph_is_made(name, interpreted):
    make, words = READS[name]
    svi = SVI(Plain(make()), nothing, still, DiffusionELBO(), compile=True)
    said = []
    for _ in range(4):
        loss, messages = heard(lambda: svi.step(X))
        said.append(messages)
        torch.testing.assert_close(loss, expected_loss(svi.model.w, 0.5))
    assert [len(messages) for messages in said] == [0, 1, 0, 0]
    assert words in said[1][0]
    assert "no module of it holds" in said[1][0]
    assert len(interpreted) == 1


def test_a_program_that_is_a_function_names_what_it_closes_over(interpreted):
    offset = torch.tensor(0.5)

    def model(x):
        w = pyro.param("w", lambda: torch.tensor([0.5, -0.2, 0.1]))
        pyro.sample("x", dist.Normal(w + offset + GLOBAL, 1.0).to_event(1), obs=x)

    svi = SVI(model, nothing, still, DiffusionELBO(), compile=True)
    svi.step(X)
    loss, (message,) = heard(lambda: svi.step(X))
    torch.testing.assert_close(loss, expected_loss(pyro.param("w"), 1.0))
    assert "'offset'" in message
    assert "'GLOBAL'" in message
    offset.fill_(2.0)  # in place: seen
    torch.testing.assert_close(svi.step(X), expected_loss(pyro.param("w"), 2.5))
    assert len(interpreted) == 1


def test_literals_and_what_is_made_of_arguments_are_not_named(interpreted):
    """Of all kinds: tensors made in the program, of numbers, lists and arguments."""

    def shift():
        literal = torch.tensor(0.5) + torch.tensor([0.25, 0.25, 0.25]) + torch.full((), 0.25)
        return literal + torch.as_tensor([0.0, 0.0, 0.0]) + SCALED_BY * torch.arange(3.0)[0] + torch.zeros(())

    svi = SVI(Plain(shift), nothing, still, DiffusionELBO(), compile=True)
    for _ in range(4):
        loss, messages = heard(lambda: svi.step(X))
        assert messages == []
        torch.testing.assert_close(loss, expected_loss(svi.model.w, 1.0))
    assert len(interpreted) == 1


@pytest.mark.parametrize("way", ["attribute", "list", "closed over"])
def test_tensors_that_modules_hold_are_not_named(way, interpreted):
    """A plain attribute of a module below, of one in a plain list, of one that a function closes over."""
    inner = Inner(torch.tensor(0.5))
    if way == "attribute":
        module = Plain(inner)
        model = module
    elif way == "list":
        module = Holder(lambda m: m.all[0](), all=[inner])
        model = module
    else:
        module = Plain(lambda: inner())
        model = lambda x: module(x)  # noqa: E731 - a function is what this is about
    svi = SVI(model, nothing, still, DiffusionELBO(), compile=True)
    for value in (0.5, 0.5, 0.5, 3.0, 3.0):
        inner.value = torch.tensor(value) if value != float(inner.value) else inner.value
        loss, messages = heard(lambda: svi.step(X))
        assert messages == []
        torch.testing.assert_close(loss, expected_loss(module.w, value))
    assert len(interpreted) == 2


# The package's own


X_0 = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]], dtype=torch.float64)


def network(dtype=torch.float64):
    return pyrodiff.networks.MLP((2,), hidden=4, num_blocks=1).to(dtype)


def diffusion_of(kind):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    denoiser = pyrodiff.NoisePrediction(network(), forward)
    variances = {
        "variance": pyrodiff.PosteriorVariance(),
        "fixed variance": pyrodiff.FixedVariance([0.1, 0.2, 0.3, 0.4]),
        "large variance": pyrodiff.FixedLargeVariance(),
    }
    reverse = pyrodiff.GaussianReverse(forward, denoiser, variance=variances.get(kind))
    scale = torch.full((2,), 1.1, dtype=torch.float64)
    priors = {
        "prior": dist.Normal(torch.zeros(2, dtype=torch.float64), scale).to_event(1),
        "joint prior": dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2).double()),
    }
    decoders = {"levels": pyrodiff.DiscretizedDecoder(levels=5), "transition": pyrodiff.TransitionDecoder(forward)}
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=decoders.get(kind), prior=priors.get(kind))


KINDS = ["plain", "prior", "joint prior", "variance", "fixed variance", "large variance", "levels", "transition"]
DRAWINGS = {
    "low discrepancy": lambda d: d.one_step(),
    "uniform": lambda d: d.one_step(pyrodiff.UniformDrawing()),
    "given": lambda d: d.one_step(pyrodiff.ImportanceDrawing([0.1, 0.2, 0.3, 0.4])),
    "learned": lambda d: d.one_step(pyrodiff.LossSecondMoment(4, history=2)),
    "simple": lambda d: d.one_step(weighting=pyrodiff.SimpleWeighting(d.reverse)),
}


def silent_and_right(pair, x_0, interpreted, graphs=1):
    """Steps without a warning, in the eager numbers of the same seeds."""
    svis = [SVI(pair.model, pair.guide, still, DiffusionELBO(), compile=compiled) for compiled in (True, False)]
    for svi in svis:
        svi.step(x_0)
    for seed in range(3):
        losses = []
        for svi in svis:
            pyro.set_rng_seed(seed)
            loss, messages = heard(lambda svi=svi: svi.step(x_0))
            assert messages == []
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    assert len(interpreted) == graphs


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_diffusion_is_named(kind, one_step, interpreted):
    diffusion = diffusion_of(kind)
    x_0 = pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1], [2, 4]]), 5).double() if kind == "levels" else X_0
    silent_and_right(diffusion.one_step() if one_step else diffusion, x_0, interpreted)


@pytest.mark.parametrize("kind", [name for name in DRAWINGS if name != "learned"])
def test_no_drawing_and_no_weighting_is_named(kind, interpreted):
    silent_and_right(DRAWINGS[kind](diffusion_of("prior")), X_0, interpreted)


def test_a_drawing_that_learns_is_not_named(interpreted):
    pair = DRAWINGS["learned"](diffusion_of("plain"))
    svi = SVI(pair.model, pair.guide, sgd, DiffusionELBO(), compile=True)
    for _ in range(6):
        assert heard(lambda: svi.step(X_0))[1] == []
    assert len(interpreted) == 1


def test_a_weighting_that_is_a_function_names_its_tensor_and_is_seen_replaced(interpreted):
    """What it closes over is named; another weighting, put in its place, is seen."""
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    diffusion = diffusion_of("plain")
    pair = diffusion.one_step(pyrodiff.UniformDrawing(), weighting=lambda t: weights[t])
    svi = SVI(pair.model, pair.guide, still, DiffusionELBO(), compile=True)
    svi.step(X_0)
    _, (message,) = heard(lambda: svi.step(X_0))
    assert "'weights'" in message
    pair.model.step.weighting = lambda t: torch.full_like(t, 1e6, dtype=torch.float64)
    assert float(svi.step(X_0)) > 1e4
    assert len(interpreted) == 2


def test_a_prior_that_is_replaced_is_seen(interpreted):
    """L_T is in closed form, so that a loss tells the prior: only it differs between two equal seeds."""
    diffusion = diffusion_of("prior")
    svi, losses = SVI(diffusion.model, diffusion.guide, still, DiffusionELBO(), compile=True), []
    mean, scale = (
        X_0 * float(diffusion.forward_process.schedule.signal(4)),
        float(diffusion.forward_process.schedule.noise(4)),
    )
    found = []
    for loc in (0.0, 0.0, 2.0, 2.0):
        if loc != (losses or [0.0])[-1]:
            law = dist.Normal(torch.full((2,), loc, dtype=torch.float64), 1.3)
            diffusion.model.prior = law.to_event(1)
        losses.append(loc)
        pyro.set_rng_seed(3)
        found.append(svi.step(X_0))
    torch.testing.assert_close(found[2], found[3])

    def prior_cost(loc, s):
        return (math.log(s / scale) + (scale**2 + (mean - loc) ** 2) / (2 * s**2) - 0.5).sum()

    torch.testing.assert_close(found[2] - found[1], prior_cost(2.0, 1.3) - prior_cost(0.0, 1.1), rtol=1e-9, atol=1e-9)
    assert len(interpreted) == 2


# Samplers


class Shifted(nn.Module):
    """p(x_{t-1} | x_t) = N(0.5 x_t + shift, 1e-8^2), which draws say the shift of."""

    def __init__(self, **attributes):
        super().__init__()
        self.inner = nn.Identity()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x_t, t):
        shift = self.shift[0] if isinstance(self.shift, list) else self.shift
        return dist.Normal(0.5 * self.inner(x_t) + shift, 1e-8 * torch.ones_like(x_t)).to_event(1)


class Unregistered(nn.Module):
    """Likewise, with the shift of a module that stands in a plain list."""

    def __init__(self, value):
        super().__init__()
        self.all = [Inner(value)]

    def forward(self, x_t, t):
        return dist.Normal(0.5 * x_t + self.all[0](), 1e-8 * torch.ones_like(x_t)).to_event(1)


def drawn(reverse, sampler):
    """The mean state x_1 of three steps, 0.5^3 x_4 + 1.75 shift, less that part of x_4."""
    states = sampler.trajectory(num_samples=3, times=(4, 1), generator=5)
    return states[1] - 0.125 * states[0]


SAMPLED = {
    "number": (1.0, lambda r: setattr(r, "shift", 3.0)),
    "tensor": (torch.tensor(1.0), lambda r: setattr(r, "shift", torch.tensor(3.0))),
    "in place": (torch.tensor(1.0), lambda r: r.shift.fill_(3.0)),
    "list": ([1.0], lambda r: r.shift.__setitem__(0, 3.0)),
}


@pytest.mark.parametrize("case", SAMPLED)
def test_a_compiled_sampler_sees_what_its_model_reads(case, interpreted):
    shift, change = SAMPLED[case]
    reverse = Shifted(shift=shift)
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    sampler = AncestralSampler(pyrodiff.Diffusion(forward, reverse, (2,)), compile=True)
    for value in (1.0, 3.0):
        for _ in range(2):
            states, messages = heard(lambda: drawn(reverse, sampler))
            assert messages == []
            torch.testing.assert_close(states, torch.full((3, 2), 1.75 * value), rtol=0, atol=1e-5)
        if value == 1.0:
            change(reverse)
    assert len(interpreted) == (1 if case == "in place" else 2)


def test_a_compiled_sampler_sees_what_a_module_in_a_plain_list_holds(interpreted):
    reverse = Unregistered(1.0)
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    sampler = AncestralSampler(pyrodiff.Diffusion(forward, reverse, (2,)), compile=True)
    for value in (1.0, 1.0, 3.0, 3.0):
        reverse.all[0].value = value
        torch.testing.assert_close(drawn(reverse, sampler), torch.full((3, 2), 1.75 * value), rtol=0, atol=1e-5)


def test_a_compiled_sampler_sees_hooks(interpreted):
    reverse = Shifted(shift=1.0)
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    sampler = AncestralSampler(pyrodiff.Diffusion(forward, reverse, (2,)), compile=True)
    plain = torch.full((3, 2), 1.75)
    for _ in range(2):
        torch.testing.assert_close(drawn(reverse, sampler), plain, rtol=0, atol=1e-5)
    handle = reverse.inner.register_forward_hook(lambda module, args, output: output + 2.0)
    for _ in range(2):  # each step is then shifted by 0.5 * 2 more
        torch.testing.assert_close(drawn(reverse, sampler), 2 * plain, rtol=0, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(drawn(reverse, sampler), plain, rtol=0, atol=1e-5)
    again = reverse.register_forward_hook(
        lambda module, args, law: dist.Normal(law.mean + 1.0, 1e-8 * torch.ones_like(law.mean)).to_event(1)
    )
    torch.testing.assert_close(drawn(reverse, sampler), 2 * plain, rtol=0, atol=1e-5)
    again.remove()
    torch.testing.assert_close(drawn(reverse, sampler), plain, rtol=0, atol=1e-5)


def test_a_compiled_sampler_draws_what_the_sampler_does(interpreted):
    schedule = pyrodiff.LinearSchedule(6, 0.05, 0.5)
    data = Gaussian(torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double(), schedule)
    posterior = GaussianPosterior(data)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), posterior, (2,), prior=data)
    samplers = [AncestralSampler(diffusion, compile=compiled) for compiled in (True, False)]
    for shift in (0.0, 0.0, 0.7, 0.7):
        posterior.shift = shift
        (ours, messages), theirs = heard(lambda: samplers[0](4, generator=2)), samplers[1](4, generator=2)
        assert messages == []
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-9)
    assert len(interpreted) == 2


def test_an_attribute_that_a_sampler_s_model_changes_at_every_call_is_named(interpreted):
    class Counter(Shifted):
        def forward(self, x_t, t):
            self.shift = self.shift + 1.0
            return super().forward(x_t, t)

    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    found, said = [], []
    for compiled in (True, False):
        sampler = AncestralSampler(pyrodiff.Diffusion(forward, Counter(shift=0.0), (2,)), compile=compiled)
        for _ in range(3):
            states, messages = heard(lambda sampler=sampler: sampler(2, generator=1))
            found.append(states)
            said += messages
    (message,) = said
    assert "'shift'" in message
    torch.testing.assert_close(found[:3], found[3:], rtol=0, atol=1e-5)
    assert interpreted == []


# A function by itself


def test_what_python_does_in_a_function_happens_once_for_a_graph(interpreted):
    """As its docstring says: a draw of Python's own random numbers is a constant of the graph."""
    random.seed(1)
    expected = random.random()
    random.seed(1)
    compiled = Compiled(lambda x: (x + random.random(),))
    zero = torch.zeros(())
    assert [float(compiled(zero)[0]) for _ in range(3)] == pytest.approx([expected] * 3)


def test_a_graph_that_was_left_is_not_run_for_what_was_there_before(interpreted):
    """There and back again: each value is right, whichever graph it has."""
    module = Holder(lambda m: m.shift, shift=0.0)
    compiled = Compiled(lambda x: (x + module.shift * module.w,), [module], limit=20)
    x = torch.zeros(3)
    for value in (1.0, 1.0, 2.0, 1.0, 2.0, 2.0):
        module.shift = value
        torch.testing.assert_close(compiled(x)[0].detach(), value * module.w.detach())


def test_with_real_compilation_attributes_are_seen():
    """One change of a number, and of a tensor in place: two graphs."""
    module = Holder(lambda m: m.shift * m.weight, shift=1.0, weight=torch.tensor(0.5))
    svi = SVI(module, nothing, sgd, DiffusionELBO(), compile=True)
    eager = SVI(
        Holder(lambda m: m.shift * m.weight, shift=1.0, weight=torch.tensor(0.5)), nothing, sgd, DiffusionELBO()
    )

    def agree():
        for _ in range(3):
            torch.testing.assert_close(svi.step(X), eager.step(X), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(svi.model.w, eager.model.w, rtol=1e-5, atol=1e-6)

    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        agree()
        for one in (svi, eager):
            one.model.weight.fill_(1.5)
        agree()
        for one in (svi, eager):
            one.model.shift = 3.0
        agree()
    assert svi._gradient.compiled.made == 2
    assert svi._gradient.compiled.failure == ""
