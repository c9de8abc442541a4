"""Pyro's names: the param store before, between and after, plates around the pair, and the guides of random weights."""

import parted
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import far, gaussian_diffusion, repeat
from loops import pair_of, same, values
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.distributions import constraints
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyrodiff
from pyrodiff import (
    SVI,
    AncestralSampler,
    DiffusionELBO,
    adopt_stored,
    bound,
    importance_bound,
    ode_log_prob,
    variance_account,
    verify,
)

X_0 = torch.tensor([[0.4, -1.2], [1.5, 0.3], [-0.7, 0.9], [0.2, 2.0]])
T = 5
every_pair = pytest.mark.parametrize("one_step", [False, True], ids=["trajectory", "one step"])


@pytest.fixture(autouse=True)
def empty():
    """A store that is empty, and is left so."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


# Diffusions of every kind of module


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x_t, t):
        return 0.3 * self.layer(x_t).tanh()


class OfPyro(PyroModule):
    """A PyroModule with a constrained parameter, one of torch's layers, and one of Pyro's."""

    def __init__(self):
        super().__init__()
        self.plain, self.layer = nn.Linear(2, 2), PyroModule[nn.Linear](2, 2)
        self.scale = PyroParam(torch.rand(2) + 0.5, constraints.positive)

    def forward(self, x_t, t):
        return 0.3 * (self.scale * self.layer(x_t) + self.plain(x_t)).tanh()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Plain(), OfPyro()

    def forward(self, x_t, t):
        return self.one(x_t, t) + self.other(x_t, t)


class Kernel(OfPyro):
    """A reverse process that speaks to Pyro by itself."""

    def forward(self, x_t, t):
        loc = x_t + super().forward(x_t, t)
        return dist.Normal(loc, self.scale.expand(loc.shape)).to_event(1)


def with_network(network, **options):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    denoiser = pyrodiff.VelocityPrediction(network, forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,), **options)


def kernel_of_pyro(**options):
    return pyrodiff.Diffusion(
        pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5)), Kernel(), (2,), **options
    )


def shared(**options):
    """The reverse process and the prior have parameters in common: two names for one tensor."""
    return gaussian_diffusion(pyrodiff.LinearSchedule(T, 0.05, 0.5), torch.randn(2), torch.rand(2) + 0.5)


KINDS = {
    "plain": lambda **options: with_network(Plain(), **options),
    "PyroModule": lambda **options: with_network(OfPyro(), **options),
    "mixed": lambda **options: with_network(Mixed(), **options),
    "kernel": kernel_of_pyro,
    "shared": shared,
    "named": lambda **options: with_network(Mixed(), **{"name": "of mine", **options}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained(pair, steps=3, x_0=X_0):
    """By Pyro's own SVI and optimizer."""
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    for _ in range(steps):
        svi.step(x_0)


def of(diffusion, seed=1):
    return bound(diffusion, X_0, generator=seed).nats


def stored():
    """What the store holds, by key: the tensors themselves, their values and constraints."""
    state = pyro.get_param_store().get_state()
    return {key: (p, p.detach().clone(), str(state["constraints"][key])) for key, p in state["params"].items()}


def as_it_was(before, after=None):
    after = stored() if after is None else after
    return before.keys() == after.keys() and all(
        p is after[key][0] and torch.equal(value, after[key][1]) and constraint == after[key][2]
        for key, (p, value, constraint) in before.items()
    )


# A store that was saved, and a diffusion built anew


@every_pair
@every_kind
def test_what_was_trained_and_saved_is_adopted(kind, one_step, tmp_path):
    diffusion = KINDS[kind]()
    trained(pair_of(diffusion, one_step))
    expected = of(diffusion)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    before, new = stored(), KINDS[kind]()
    ours = values(new)
    for call in (
        of,
        lambda d: AncestralSampler(d)(3),
        lambda d: trained(pair_of(d, one_step)),
        lambda d: verify(d, X_0),
    ):
        with pytest.raises(ValueError, match=r"another .*adopt_stored\(.*name='second'.*clear_param_store\(\)"):
            call(new)
        assert as_it_was(before)
        assert same(ours, values(new))
    adopt_stored(new)
    assert torch.equal(of(new), expected)
    assert same(values(new), values(diffusion))
    ours = values(new)
    trained(pair_of(new, one_step))
    assert all(not torch.equal(a, b) for a, b in zip(ours, values(new), strict=True))
    assert not same(values(diffusion), values(new))
    assert not torch.equal(of(new), expected)
    adopt_stored(new)  # what is adopted already
    assert set(before) <= set(stored())


@every_kind
def test_what_is_not_in_the_store_is_not_adopted_by_halves(kind, tmp_path):
    diffusion = KINDS[kind]()
    trained(diffusion)
    state = pyro.get_param_store().get_state()
    last = list(state["params"])[-1]
    for change in ("lost", "longer", "double"):
        params = dict(state["params"])
        name = last.replace("$$$", ".").removesuffix("_unconstrained")
        keys = [key for key in params if key.replace("$$$", ".").removesuffix("_unconstrained") == name]
        for key in keys:
            tensor = params.pop(key).detach()
            if change != "lost":
                params[key] = torch.cat([tensor, tensor]) if change == "longer" else tensor.double()
        pyro.clear_param_store()
        constraints_of = {key: state["constraints"][key] for key in params}
        pyro.get_param_store().set_state({"params": params, "constraints": constraints_of})
        before, new = stored(), KINDS[kind]()
        ours = values(new)
        with pytest.raises(ValueError, match="is missing" if change == "lost" else "of the diffusion's shapes"):
            adopt_stored(new)
        assert as_it_was(before)
        assert same(ours, values(new))


def test_an_empty_store_and_other_things_are_refused():
    with pytest.raises(ValueError, match=r"but it holds none: Pyro's own SVI fills it"):
        adopt_stored(KINDS["plain"]())
    with pytest.raises(ValueError, match=r"diffusion must be a pyrodiff.Diffusion"):
        adopt_stored(KINDS["plain"]().one_step())
    trained(KINDS["plain"]())
    with pytest.raises(ValueError, match=r"'other.reverse.denoiser.network.layer.weight' say, but it holds none"):
        adopt_stored(KINDS["plain"](name="other"))


def test_frozen_parameters_need_not_be_stored():
    diffusion = with_network(Mixed())
    diffusion.reverse.denoiser.network.one.requires_grad_(False)
    new = with_network(Mixed())
    new.load_state_dict(diffusion.state_dict())
    new.reverse.denoiser.network.one.requires_grad_(False)
    trained(diffusion)
    expected = of(diffusion)
    adopt_stored(new)
    assert torch.equal(of(new), expected)


def test_what_others_store_is_left_alone_by_an_adoption():
    pyro.param("mine", torch.tensor(2.0), constraint=constraints.positive)
    trained(with_network(Mixed()))
    before = stored()["mine"]
    adopt_stored(with_network(Mixed()))
    assert stored()["mine"][0] is before[0]
    assert pyro.param("mine").item() == pytest.approx(2.0)


def test_a_new_process_adopts_what_this_one_trained(tmp_path):
    diffusion = KINDS["mixed"]()
    trained(diffusion.one_step())
    pyro.get_param_store().save(tmp_path / "store")
    process = parted.context().Process(target=anew, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    found = torch.load(tmp_path / "found")
    assert torch.equal(found["bound"], of(diffusion))
    assert found["said"].startswith("Pyro's param store must hold the diffusion's own parameters")
    assert found["moved"]


def anew(folder):
    """In a process that knows nothing but the file."""
    torch.set_num_threads(1)
    torch.manual_seed(123)
    diffusion = KINDS["mixed"]()
    pyro.get_param_store().load(f"{folder}/store")
    try:
        said = str(of(diffusion))
    except ValueError as error:
        said = str(error)
    adopt_stored(diffusion)
    found = {"bound": of(diffusion), "said": said}
    before = values(diffusion)
    trained(diffusion.one_step())
    found["moved"] = all(not torch.equal(a, b) for a, b in zip(before, values(diffusion), strict=True))
    torch.save(found, f"{folder}/found")


# Two diffusions in one program


@every_pair
@every_kind
def test_two_diffusions_need_two_names(kind, one_step):
    pair, other = (pair_of(KINDS[kind](), one_step) for _ in range(2))
    trained(pair)
    before, ours = stored(), values(other)
    with pytest.raises(ValueError, match=r"loaded or another diffusion's: .*name='second'"):
        trained(other)
    assert as_it_was(before)
    assert same(ours, values(other))


@every_pair
@pytest.mark.parametrize("kind", ["plain", "PyroModule", "mixed", "kernel"])
def test_two_named_diffusions_learn_in_one_program(kind, one_step):
    """Each from its own sites, which a block keeps apart: all of what both have moves, as it does for each alone."""

    def pairs():
        torch.manual_seed(0)
        return [pair_of(KINDS[kind](name=name, plate=f"rows of {name}"), one_step) for name in ("a", "b")]

    first, second = pairs()

    def both(programs):
        def program(x_0):
            for name, one in zip("ab", programs, strict=True):
                with scope(prefix=name):
                    one(x_0 if name == "a" else -x_0)

        return program

    before = values(first.model), values(second.model)
    svi = pyro.infer.SVI(
        both([first.model, second.model]),
        both([first.guide, second.guide]),
        pyro.optim.Adam({"lr": 0.05}),
        TraceMeanField_ELBO(),
    )
    for _ in range(3):
        svi.step(X_0)
    for ours, pair in zip(before, (first, second), strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(ours, values(pair.model), strict=True))
    prefixes = {key.split(".")[0] for key in pyro.get_param_store()}
    assert prefixes == {"a", "b"}


def test_one_after_the_other_named_diffusions_learn():
    for name in ("a", "b"):
        diffusion = KINDS["mixed"](name=name)
        before = values(diffusion)
        trained(diffusion)
        assert all(not torch.equal(a, b) for a, b in zip(before, values(diffusion), strict=True))


def test_chains_and_readings_of_one_network_need_no_second_name():
    """They share the tensors themselves."""
    diffusion = KINDS["mixed"]()
    trained(diffusion)
    for other in (diffusion.one_step(), diffusion.subchain((1, 3, 5)), diffusion.subchain((2, 5)).one_step()):
        before = values(diffusion)
        trained(other)
        assert not same(before, values(diffusion))
    clipped = pyrodiff.Clipped(diffusion.reverse.denoiser, -3.0, 3.0)
    reverse = pyrodiff.GaussianReverse(diffusion.forward_process, clipped)
    of(pyrodiff.Diffusion(diffusion.forward_process, reverse, (2,)))


# What leaves the store alone


def leave_alone(diffusion):
    """Everything but Pyro's own SVI."""
    diffusion.model(num_samples=3)
    diffusion.model(X_0)
    diffusion.guide(X_0)
    chain = diffusion.subchain([1, 3, 5])
    AncestralSampler(chain, compile=True)(1)
    verify(chain, X_0, num_repeats=10)
    reverse = pyrodiff.GaussianReverse(diffusion.forward_process, diffusion.reverse.denoiser)
    again = pyrodiff.Diffusion(diffusion.forward_process, reverse, (2,))
    again.model(num_samples=2)
    for one in (diffusion, chain, again):
        bound(one, X_0)
        importance_bound(one, X_0, num_particles=2)
        ode_log_prob(one, X_0, tolerance=1e-2)
        variance_account(one, X_0, num_pairs=2, num_particles=4)
        AncestralSampler(one)(3)
        AncestralSampler(one).trajectory(3)
        for pair in (one, one.one_step()):
            DiffusionELBO().loss(pair.model, pair.guide, X_0)
            DiffusionELBO().terms(pair.model, pair.guide, X_0)
            TraceMeanField_ELBO().loss(pair.model, pair.guide, X_0)
            poutine.trace(pair.model).get_trace(X_0)
            svi = SVI(pair.model, pair.guide, lambda ps: torch.optim.SGD(ps, lr=0.01), DiffusionELBO())
            svi.step(X_0)
            svi.step(X_0)
            svi.evaluate_loss(X_0)
            pair.model(X_0)


@pytest.mark.parametrize("kind", ["plain", "PyroModule", "mixed"])
def test_the_store_is_left_as_it_was_found(kind, interpreted):
    leave_alone(KINDS[kind]())
    assert stored() == {}
    pyro.param("mine", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
    trained(KINDS["mixed"](name="another"))
    others, diffusion = stored(), KINDS[kind]()
    trained(diffusion)
    before = stored()
    leave_alone(diffusion)
    found = stored()
    assert found.keys() == before.keys() > others.keys()
    assert all(p is before[key][0] for key, (p, *_) in found.items())
    assert as_it_was(others, {key: found[key] for key in others})


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x_t, t):
        return 0.1 * self.conv(x_t)


@every_pair
def test_parameters_that_are_not_contiguous_are_refused_under_pyros_svi(one_step):
    """Pyro's store would learn a copy of them, and they would stand still."""
    forward, x_0 = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5)), torch.randn(3, 2, 4, 4)
    denoiser = pyrodiff.VelocityPrediction(Pictures().to(memory_format=torch.channels_last), forward)
    pair = pair_of(pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2, 4, 4)), one_step)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameters must be contiguous .*conv.weight.*train by pyrodiff.SVI"):
            trained(pair, steps=1, x_0=x_0)  # the first step, and then any other
    pyro.clear_param_store()
    before = values(pair.model)
    SVI(pair.model, pair.guide, lambda ps: torch.optim.SGD(ps, lr=0.01), DiffusionELBO()).step(x_0)
    assert not same(before, values(pair.model))
    pair.model.to(memory_format=torch.contiguous_format)
    before = values(pair.model)
    trained(pair, x_0=x_0)
    assert all(not torch.equal(a, b) for a, b in zip(before, values(pair.model), strict=True))


# Plates


@every_pair
def test_a_plate_of_ones_own_beside_the_diffusions_needs_another_name(one_step):
    def program(pair, observed):
        def run(x_0):
            with pyro.plate("data", len(x_0)):
                if observed:
                    pyro.sample("mean", dist.Normal(0.0, 1.0), obs=x_0.mean(1))
            (pair.model if observed else pair.guide)(x_0)

        return run

    clash = pair_of(KINDS["plain"](), one_step)
    fine = pair_of(KINDS["plain"](plate="rows"), one_step)
    for elbo in (DiffusionELBO(), TraceMeanField_ELBO(), Trace_ELBO()):
        with pytest.raises(ValueError, match=r"plate 'data' must be the diffusion's alone.*plate='rows'"):
            elbo.loss(program(clash, True), program(clash, False), X_0)
        elbo.loss(program(fine, True), program(fine, False), X_0)
    beside = DiffusionELBO().terms(program(fine, True), program(fine, False), X_0)
    torch.testing.assert_close(beside["mean"], -dist.Normal(0.0, 1.0).log_prob(X_0.mean(1)))
    assert poutine.trace(fine.model).get_trace(X_0).nodes["rows"]["value"].shape == (4,)


def test_a_chain_of_fewer_steps_has_the_name_and_the_plate():
    diffusion = KINDS["mixed"](name="a", plate="rows").subchain((2, 5))
    for pair in (diffusion, diffusion.one_step()):
        assert (pair.model.name, pair.model.plate) == ("a", "rows")
        for program in (pair.model, pair.guide):
            nodes = poutine.trace(program).get_trace(X_0).nodes
            assert "rows" in nodes
            assert "data" not in nodes


@every_pair
@pytest.mark.parametrize("size", [2, 4], ids=["subsampled", "full"])
def test_a_plate_around_the_pair_is_refused(one_step, size):
    pair = pair_of(KINDS["plain"](), one_step)

    def around(program):
        def run(x_0):
            with pyro.plate("batch", 4, subsample_size=size, dim=-2) as i:
                program(x_0[i])

        return run

    message = (
        r"plate 'batch' must not stand around the pair.* it draws 2 of 4: .*poutine.scale\(scale=4 / 2\)"
        if size == 2
        else "plate 'batch' must not stand around the pair.* each datum would count 4 times"
    )
    for model, guide in ((around(pair.model), around(pair.guide)), (around(pair.model), pair.guide)):
        for elbo in (DiffusionELBO(), TraceMeanField_ELBO()):
            with pytest.raises(ValueError, match=message):
                elbo.loss(model, guide, X_0)
        with pytest.raises(ValueError, match=message):
            SVI(model, guide, lambda ps: torch.optim.SGD(ps, lr=0.1), DiffusionELBO()).step(X_0)
    with pytest.raises(ValueError, match=message):
        around(pair.guide)(X_0)


@every_pair
def test_a_scale_in_the_place_of_a_plate_is_that_of_all_data(one_step):
    pair, i = pair_of(KINDS["plain"](), one_step), torch.tensor([2, 0])
    found = []
    for scale in (1.0, 4 / 2):
        pyro.set_rng_seed(0)
        model, guide = (poutine.scale(program, scale=scale) for program in (pair.model, pair.guide))
        found.append(DiffusionELBO().loss(model, guide, X_0[i]))
    assert found[1] == pytest.approx(2 * found[0])


def test_plates_that_repeat_a_program_are_pyros_own():
    diffusion = KINDS["plain"]()
    for pair in (diffusion, diffusion.one_step()):
        for kind in (TraceMeanField_ELBO, DiffusionELBO, Trace_ELBO):
            elbo = kind(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
            assert elbo.loss(pair.model, pair.guide, X_0) != 0
    found = Predictive(diffusion.model, num_samples=7, parallel=True)(num_samples=3)
    assert found["x_0"].shape == (7, 3, 2)
    found = Predictive(diffusion.model, guide=diffusion.guide, num_samples=7, parallel=True)(X_0)
    assert found["x_1"].shape == (7, 4, 2)


# Random weights


class Random(PyroModule):
    """A network with a random weight, which notes its values."""

    def __init__(self, prior=None):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.5, 2.0).expand([2]).to_event(1) if prior is None else prior)
        self.gain, self.seen = nn.Parameter(torch.ones(2)), []

    def forward(self, x_t, t):
        self.seen.append(self.weight.detach().clone())
        return 0.1 * x_t * self.weight * self.gain


W = "reverse.denoiser.network.weight"
Q = torch.distributions.Normal(torch.tensor([1.0, -0.4]), torch.tensor([0.3, 0.6]))
P = torch.distributions.Normal(0.5, 2.0)
KL = torch.distributions.kl_divergence(Q, P).sum()


def by_hand(*args):
    pyro.sample(W, dist.Normal(Q.loc, Q.scale).to_event(1))


def automatic(diffusion, kind=AutoNormal):
    """Pyro's guide of the weights alone, with the law Q."""
    guide = kind(poutine.block(diffusion.model, expose=[W]))
    guide(X_0)
    if kind is AutoNormal:
        network = guide.locs.reverse.denoiser.network, guide.scales.reverse.denoiser.network
        for part, value in zip(network, (Q.loc, Q.scale), strict=True):
            part.weight = value
    return guide


def drawn_ones(diffusion):
    """The values that the weight had, each once."""
    seen = torch.stack(diffusion.reverse.denoiser.network.seen)
    diffusion.reverse.denoiser.network.seen.clear()
    return seen.unique(dim=0)


@pytest.mark.parametrize("name", ["", "a"])
def test_random_weights_are_named_after_their_parts(name):
    diffusion = with_network(Random(), name=name)
    expected = f"a.{W}" if name else W
    programs = [diffusion.model, diffusion.one_step().model]
    for one in programs:
        nodes = poutine.trace(one).get_trace(X_0).nodes
        assert expected in nodes
        assert nodes[expected]["cond_indep_stack"] == ()
        assert [name for name in nodes if "weight" in name] == [expected]
        assert len(drawn_ones(diffusion)) == 1
    diffusion.model(X_0)
    diffusion.model(X_0)
    assert len(drawn_ones(diffusion)) == 2
    diffusion.model(num_samples=3)
    assert len(drawn_ones(diffusion)) == 1


@pytest.mark.parametrize("part", ["reverse", "denoiser", "network"])
def test_random_weights_of_fewer_steps_have_the_names_of_the_whole_chain(part):
    """So that a guide of one is a guide of the other."""

    class Says(Random):
        def forward(self, x_t, t):
            return x_t * self.weight

    class Reverse(Random):
        def forward(self, x_t, t):
            return dist.Normal(x_t * self.weight, 1.0).to_event(1)

        def subchain(self, forward):
            return self

    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    if part == "reverse":
        reverse = Reverse()
    else:
        denoiser = Says() if part == "denoiser" else pyrodiff.VelocityPrediction(Says(), forward)
        reverse = pyrodiff.GaussianReverse(forward, denoiser)
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,))
    chains = [diffusion, diffusion.subchain((1, 3, 5)), diffusion.subchain((1, 3, 5)).subchain((2, 3)), diffusion]
    names = [
        [name for name in poutine.trace(one.model).get_trace(X_0).nodes if "weight" in name]
        for chain in chains
        for one in (chain, chain.one_step())
    ]
    assert all(found == names[0] for found in names)
    assert len(names[0]) == 1


def test_random_weights_of_bits_have_the_same_names_in_fewer_steps():
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T))
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(Random(), forward))
    diffusion, x_0 = pyrodiff.Diffusion(forward, reverse, (2,)), (X_0 > 0).float()
    for chain in (diffusion, diffusion.subchain((2, 5)), diffusion):
        assert W in poutine.trace(chain.model).get_trace(x_0).nodes
        assert bound(chain, x_0, guide=by_hand).global_kl == pytest.approx(float(KL))


GUIDES = {"by hand": lambda diffusion: by_hand, "AutoNormal": automatic}
every_guide = pytest.mark.parametrize("guide", GUIDES)
ESTIMATES = {
    "bound": lambda d, guide: bound(d, X_0, guide=guide, num_particles=2).nats,
    "importance_bound": lambda d, guide: importance_bound(d, X_0, num_particles=2, guide=guide).nats,
    "flow": lambda d, guide: ode_log_prob(d, X_0, guide=guide, tolerance=1e-2).nats,
    "account": lambda d, guide: variance_account(d, X_0, num_pairs=2, num_particles=4, guide=guide).mean,
    "sampler": lambda d, guide: AncestralSampler(d, guide=guide)(3),
    "trajectory": lambda d, guide: AncestralSampler(d, guide=guide).trajectory(3),
    "in fewer steps": lambda d, guide: AncestralSampler(d, num_steps=3, guide=guide)(3),
    "bound of fewer steps": lambda d, guide: bound(d.subchain((1, 4)), X_0, guide=guide).nats,
    "loader": lambda d, guide: bound(d, [X_0[:2], X_0[2:]], guide=guide).nats,
}


@every_guide
@pytest.mark.parametrize("name", ESTIMATES)
def test_weights_are_drawn_once_from_the_guide(name, guide):
    diffusion = with_network(Random())
    q, draws = GUIDES[guide](diffusion), []
    drawn_ones(diffusion) if diffusion.reverse.denoiser.network.seen else None
    before = stored()
    for _ in range(60):
        assert ESTIMATES[name](diffusion, q).isfinite().all()
        ones = drawn_ones(diffusion)
        assert len(ones) == 1
        draws.append(ones[0])
        if name not in ("sampler", "bound") and len(draws) == 2:
            break
    assert as_it_was(before)
    if len(draws) == 60:
        draws = torch.stack(draws)
        assert not far(draws, Q.loc)
        assert not far((draws - Q.loc) ** 2, Q.variance)


@every_guide
def test_the_divergence_of_the_weights_is_theirs_alone(guide, tmp_path):
    """In closed form, of no datum, and no part of the bound."""
    diffusion = with_network(Random())
    q = GUIDES[guide](diffusion)
    for estimate in (bound, lambda *args, **options: importance_bound(*args, num_particles=3, **options)):
        found = estimate(diffusion, X_0, guide=q, generator=0)
        assert found.global_kl.shape == ()
        torch.testing.assert_close(found.global_kl, KL)
        assert found.total == pytest.approx(float(found.nats.sum() + KL), rel=1e-5)
        table = [line for line in str(found).splitlines() if line.startswith("KL of random weights")]
        assert len(table) == 1
        assert f"{float(KL):.4f}" in table[0]
        assert "per dimension" in str(found)
        twice = found + estimate(diffusion, X_0[:2], guide=q, generator=1)
        torch.testing.assert_close(twice.global_kl, KL)
        assert len(twice.nats) == 6
        found.save(tmp_path / "found.npz")
        again = type(found).load(tmp_path / "found.npz")
        assert torch.equal(again.global_kl, found.global_kl)
        assert again.global_kl.shape == ()
        assert torch.equal(again.nats, found.nats)
        loader = estimate(diffusion, [X_0[:1], X_0[1:]], guide=q, generator=0)
        torch.testing.assert_close(loader.global_kl, KL)
        torch.testing.assert_close(loader.nats, found.nats)
    kept = found.rescaled(2.0)
    torch.testing.assert_close(kept.nats, found.nats + 2)
    assert torch.equal(kept.global_kl, found.global_kl)
    without = bound(KINDS["plain"](), X_0)
    assert without.global_kl is None
    assert without.total == pytest.approx(float(without.nats.sum()), rel=1e-5)
    assert "random weights" not in str(without)


@pytest.mark.parametrize("kind", ["AutoMultivariateNormal", "of positive weights"])
def test_a_divergence_that_is_not_registered_is_right_in_the_mean(kind):
    """The law of a guide of Pyro's is that of an auxiliary site, which is moved to the weights."""
    if kind == "AutoMultivariateNormal":
        diffusion = with_network(Random())
        guide = automatic(diffusion, AutoMultivariateNormal)
        with torch.no_grad():
            guide.loc.copy_(torch.tensor([1.0, -0.4]))
        scale_tril = (guide.scale[:, None] * guide.scale_tril).detach()
        q = torch.distributions.MultivariateNormal(guide.loc.detach(), scale_tril=scale_tril)
        p = torch.distributions.MultivariateNormal(torch.full((2,), 0.5), 4 * torch.eye(2))
    else:
        diffusion = with_network(Random(dist.LogNormal(0.5, 2.0).expand([2]).to_event(1)))
        guide, q, p = automatic(diffusion), Q, P
    expected = torch.distributions.kl_divergence(q, p).sum()
    chain = diffusion.subchain((5,))
    draws = repeat(150, lambda: bound(chain, X_0[:1], guide=guide).global_kl)
    assert not far(draws, expected)


def test_what_a_guide_draws_beside_the_weights_is_no_part_of_their_divergence():
    diffusion = with_network(Random())

    def whole(x_0=None):
        by_hand()
        pyro.sample("beside", dist.Normal(0.0, 1.0))
        if x_0 is not None:
            diffusion.guide(x_0)

    torch.testing.assert_close(bound(diffusion, X_0, guide=whole).global_kl, KL)
    assert AncestralSampler(diffusion, guide=whole)(3).shape == (3, 2)


def test_a_guide_of_another_shape_is_refused():
    """Two numbers in a plate, against a vector of two: the law of the vector would count twice."""

    def in_a_plate(*args):
        with pyro.plate("weights", 2):
            pyro.sample(W, dist.Normal(Q.loc, Q.scale))

    with pytest.raises(ValueError, match=f"guide must draw '{W}' with the batch_shape .*event_shape"):
        bound(with_network(Random()), X_0, guide=in_a_plate)


@every_guide
def test_a_diffusion_with_random_weights_is_verified_under_its_guide(guide):
    diffusion = with_network(Random())
    assert verify(diffusion, X_0, num_repeats=20, generator=0, guide=GUIDES[guide](diffusion)).passed


def test_a_bound_with_one_weight_is_that_of_the_weight():
    """A guide that always draws one value has the bound of a network that has it, whatever the prior is."""

    class Fixed(nn.Module):
        def forward(self, x_t, t):
            return 0.1 * x_t * torch.tensor([1.5, -0.7])

    def one(*args):
        pyro.sample(W, dist.Delta(torch.tensor([1.5, -0.7])).to_event(1))

    fixed, diffusion = with_network(Fixed()), with_network(Random())
    torch.testing.assert_close(bound(diffusion, X_0, guide=one, generator=3).nats, of(fixed, 3))
    ours = AncestralSampler(diffusion, guide=one)(5, generator=3)
    torch.testing.assert_close(ours, AncestralSampler(fixed)(5, generator=3))
