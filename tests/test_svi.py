"""Our SVI is a torch loop: one optimizer, whatever the parameters are and whenever they appear."""

import copy
from functools import partial

import loops
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from loops import adam, pair_of, same, values
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

import pyrodiff
from pyrodiff import SVI, DiffusionELBO, networks

X_0 = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]])
sgd = partial(loops.sgd, lr=1.0)


class PlainReverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype).expand(x_t.shape[:-1])
        return dist.Normal(x_t + self.net(torch.cat([x_t, t[..., None] / 4], -1)), 0.7).to_event(1)


class PyroReverse(PyroModule):
    def __init__(self, net=None):
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 2) if net is None else net

    forward = PlainReverse.forward


def make(reverse=None, T=4):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    if reverse is None:
        denoiser = pyrodiff.NoisePrediction(networks.MLP((2,), hidden=8), forward)
        reverse = pyrodiff.GaussianReverse(forward, denoiser)
    return pyrodiff.Diffusion(forward, reverse, (2,))


@pytest.mark.parametrize("one_step", [False, True])
def test_a_step_returns_the_loss_before_it_as_a_detached_tensor(one_step):
    pair = pair_of(make(), one_step)
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO())
    pyro.set_rng_seed(3)
    with pyro.validation_enabled(False):  # as steps are
        expected = DiffusionELBO().loss(pair.model, pair.guide, X_0)
    pyro.set_rng_seed(3)
    evaluated = svi.evaluate_loss(X_0)
    pyro.set_rng_seed(3)
    stepped = svi.step(X_0)
    for loss in (evaluated, stepped):
        assert isinstance(loss, torch.Tensor)
        assert loss.shape == ()
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(expected)


def test_evaluating_changes_nothing():
    diffusion = make()
    svi = SVI(diffusion.model, diffusion.guide, adam, DiffusionELBO())
    before = values(diffusion)
    svi.evaluate_loss(X_0)
    assert svi.optimizer is None
    svi.step(X_0)
    state, after = copy.deepcopy(svi.optimizer.state_dict()), values(diffusion)
    assert not same(before, after)
    gradients = [p.grad.clone() for p in diffusion.parameters()]
    svi.evaluate_loss(X_0)
    assert same(after, values(diffusion))
    assert same(gradients, [p.grad for p in diffusion.parameters()])
    for old, new in zip(state["state"].values(), svi.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("one_step", [False, True])
def test_steps_equal_a_torch_loop(one_step, clip_norm):
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    pairs = [pair_of(diffusion, one_step) for diffusion in (ours, theirs)]
    svi = SVI(pairs[0].model, pairs[0].guide, adam, DiffusionELBO(), clip_norm=clip_norm, validate=True)
    optimizer = adam(list(theirs.parameters()))
    for seed in range(10):
        pyro.set_rng_seed(seed)
        loss = svi.step(X_0)
        pyro.set_rng_seed(seed)
        optimizer.zero_grad()
        expected = DiffusionELBO().differentiable_loss(pairs[1].model, pairs[1].guide, X_0)
        expected.backward()
        if clip_norm is not None:
            norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
            assert norm > clip_norm  # there is something to clip
            for parameter in theirs.parameters():
                parameter.grad.mul_(clip_norm / norm)
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach())
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_by_its_global_norm():
    """Two tensors with gradients 30 and 40: the norm is 50, so a clip to 1 leaves 0.6 and 0.8."""

    def model():
        a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        for name, value, slope in (("x", a, 30.0), ("y", b, 40.0)):
            pyro.sample(name, dist.Normal(value, 1.0), obs=torch.tensor(slope))

    svi = SVI(model, lambda: None, sgd, DiffusionELBO(), clip_norm=1.0)
    svi.step()
    assert pyro.param("a").item() == pytest.approx(0.6, abs=1e-5)
    assert pyro.param("b").item() == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("kind", ["module", "pyro module", "pyro.module", "pyro.param"])
def test_parameters_are_found_wherever_they_stand(kind):
    """One SGD step on -log N(3; w, 1) at w = 1 moves w by 2."""
    w = nn.Parameter(torch.tensor(1.0))

    class Program(PyroModule if kind == "pyro module" else nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w

        def forward(self):
            pyro.sample("x", dist.Normal(self.w, 1.0), obs=torch.tensor(3.0))

    module = nn.Module()
    module.w = w

    def with_module():
        pyro.module("m", module)
        pyro.sample("x", dist.Normal(module.w, 1.0), obs=torch.tensor(3.0))

    def with_param():
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(1.0)), 1.0), obs=torch.tensor(3.0))

    model = {"pyro.module": with_module, "pyro.param": with_param}.get(kind) or Program()
    SVI(model, lambda: None, sgd, DiffusionELBO()).step()
    assert float(pyro.param("w").detach() if kind == "pyro.param" else w.detach()) == pytest.approx(3.0)


def test_constrained_parameters_move_unconstrained():
    """-log N(0; 0, s) = log s + const has slope 1 in log s."""

    def model():
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(0.0))

    svi = SVI(model, lambda: None, sgd, DiffusionELBO())
    for number in (1, 2):
        svi.step()
        assert float(pyro.param("scale").detach().log()) == pytest.approx(0.6931472 - number, abs=1e-5)


def test_parameters_of_the_guide_are_learned():
    def model():
        pyro.sample("z", dist.Normal(2.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    SVI(model, guide, sgd, DiffusionELBO()).step()
    assert float(pyro.param("loc").detach()) == pytest.approx(2.0)  # the slope of (loc - 2)^2 / 2


def test_parameters_that_appear_later_join_the_one_optimizer():
    def model(late):
        pyro.sample("x", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))
        if late:
            pyro.sample("y", dist.Normal(pyro.param("b", torch.tensor(0.0)), 1.0), obs=torch.tensor(3.0))

    calls = []

    def optim(parameters):
        calls.append(parameters)
        return sgd(parameters)

    svi = SVI(model, lambda late: None, optim, DiffusionELBO())
    svi.step(False)
    optimizer = svi.optimizer
    assert float(pyro.param("a").detach()) == pytest.approx(1.0)
    svi.step(late=True)
    assert float(pyro.param("b").detach()) == pytest.approx(3.0)
    assert svi.optimizer is optimizer
    assert len(calls) == 1
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_frozen_parameters_of_a_plain_network_stay():
    diffusion = make(PlainReverse())
    weight, bias = diffusion.reverse.net.weight.requires_grad_(False), diffusion.reverse.net.bias
    before = weight.clone(), bias.detach().clone()
    diffusion.eval()  # Pyro warns of frozen parameters of a module that is in training
    svi = SVI(diffusion.model, diffusion.guide, adam, DiffusionELBO())
    svi.step(X_0)
    assert torch.equal(weight, before[0])
    assert not torch.equal(bias, before[1])


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("reverse", [PlainReverse, PyroReverse, lambda: PyroReverse(nn.Linear(3, 2))])
def test_both_kinds_of_module_train_under_our_svi_and_under_pyros(reverse, one_step):
    for ours in (True, False):
        pyro.clear_param_store()
        diffusion = make(reverse())
        pair = pair_of(diffusion, one_step)
        if ours:
            svi = SVI(pair.model, pair.guide, adam, DiffusionELBO())
        else:
            optim = pyro.optim.Adam({"lr": 1e-2})
            svi = pyro.infer.SVI(pair.model, pair.guide, optim, pyro.infer.TraceMeanField_ELBO())
        before = values(diffusion)
        first = float(pyrodiff.bound(diffusion, X_0, num_particles=50).nats.mean())
        for _ in range(40):
            svi.step(X_0)
        assert not any(torch.equal(a, b) for a, b in zip(before, values(diffusion), strict=True))
        assert float(pyrodiff.bound(diffusion, X_0, num_particles=50).nats.mean()) < first - 0.1


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("reverse", [lambda: None, PlainReverse, PyroReverse])
def test_two_diffusions_train_independently(reverse, one_step):
    first, second, alone = (make(reverse()) for _ in range(3))
    alone.load_state_dict(second.state_dict())
    pairs = [pair_of(diffusion, one_step) for diffusion in (first, second, alone)]
    svis = [SVI(pair.model, pair.guide, adam, DiffusionELBO()) for pair in pairs]
    svis[0].step(X_0)
    trained = values(first)
    pyro.set_rng_seed(9)
    loss = svis[1].step(X_0)
    assert same(trained, values(first))
    svis[0].step(X_0)
    assert not same(trained, values(first))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}

    pyro.clear_param_store()  # the second is as it would be without the first
    pyro.set_rng_seed(9)
    torch.testing.assert_close(svis[2].step(X_0), loss)
    for a, b in zip(values(second), values(alone), strict=True):
        torch.testing.assert_close(a, b)


class BayesianReverse(PlainReverse, PyroModule):
    """A random weight with a normal prior."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 2)
        self.net.weight = PyroSample(dist.Normal(0.0, 0.5).expand([2, 3]).to_event(2))


def random_weights(program):
    """The names of the sites of random weights."""
    trace = poutine.trace(program).get_trace(X_0)
    return [name for name, site in trace.nodes.items() if site["type"] == "sample" and name.endswith("weight")]


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("one_step", [False, True])
def test_a_prior_on_a_weight_is_learned_with_the_diffusion(one_step, auto):
    pair = pair_of(make(BayesianReverse()), one_step)
    (name,) = random_weights(pair.model)
    if auto:
        # the guide of the weight alone: the rest of the model's sites are hidden from it
        weights = AutoNormal(poutine.block(pair.model, expose=[name]), init_scale=0.1)
    else:

        def weights(x_0):
            loc = pyro.param("loc", torch.zeros(2, 3))
            scale = pyro.param("scale", torch.full((2, 3), 0.1), constraint=constraints.positive)
            pyro.sample(name, dist.Normal(loc, scale).to_event(2))

    def guide(x_0):
        weights(x_0)
        pair.guide(x_0)

    guide(X_0)
    terms = DiffusionELBO(num_particles=2).terms(pair.model, guide, X_0)
    assert terms[name].shape == ()
    svi = SVI(pair.model, guide, adam, DiffusionELBO())
    losses = [float(svi.step(X_0)) for _ in range(150)]
    assert sum(losses[-30:]) < sum(losses[:30]) - 30 * 0.5
    if not auto:
        assert pyro.param("loc").abs().min() > 0
        one = torch.tensor(1.0)
        kl = torch.distributions.kl_divergence(
            dist.Normal(pyro.param("loc"), pyro.param("scale")), dist.Normal(0.0 * one, 0.5 * one)
        )
        found = DiffusionELBO().terms(pair.model, guide, X_0)[name]
        torch.testing.assert_close(found, kl.sum())


def test_a_random_weight_is_drawn_once_in_a_chain_of_either_pair():
    diffusion = make(BayesianReverse())
    one_step = diffusion.one_step()
    for program in (one_step.model, diffusion.model):
        trace = poutine.trace(program).get_trace(X_0)
        (name,) = random_weights(program)
        assert trace.nodes[name]["cond_indep_stack"] == ()


class Scaled(PyroModule):
    """A kernel, or a decoder, with a constrained scale of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = PyroParam(torch.tensor(scale), constraint=constraints.positive)

    def forward(self, x, t):
        x = t if isinstance(t, torch.Tensor) and t.is_floating_point() else x  # a decoder is called with (kernel, x_1)
        return dist.Normal(0.9 * x, self.scale).to_event(1)


@pytest.mark.parametrize("svi", [SVI, pyro.infer.SVI])
def test_parameters_of_one_name_are_not_shared(svi):
    """Of a reverse process and its decoder, and of two diffusions in one process, under either SVI."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(3, 0.1, 0.3))
    names = ("", "") if svi is SVI else ("", "second")  # Pyro's own leaves the first one's parameters in the store
    first, second = (
        pyrodiff.Diffusion(forward, Scaled(scale), (2,), decoder=Scaled(scale / 2), name=name)
        for scale, name in zip((1.0, 4.0), names, strict=True)
    )
    for diffusion in (first, second):
        optim = adam if svi is SVI else pyro.optim.Adam({"lr": 1e-2})
        elbo = DiffusionELBO() if svi is SVI else pyro.infer.TraceMeanField_ELBO()
        steps = svi(diffusion.model, diffusion.guide, optim, elbo)
        before = [float(part.scale.detach()) for part in (first.reverse, first.model.decoder)]
        scales = [float(part.scale.detach()) for part in (diffusion.reverse, diffusion.model.decoder)]
        assert scales[0] == pytest.approx(2 * scales[1])
        for _ in range(3):
            steps.step(X_0)
        assert all(
            float(part.scale.detach()) != scale
            for part, scale in zip((diffusion.reverse, diffusion.model.decoder), scales, strict=True)
        )
        if diffusion is second:
            assert before == [float(part.scale.detach()) for part in (first.reverse, first.model.decoder)]
    if svi is SVI:
        assert sum(len(group["params"]) for group in steps.optimizer.param_groups) == 2


# What a step leaves in Pyro's store


def pyro_reverse():
    """Parameters that Pyro hears of one by one, one of them constrained."""
    reverse = PyroReverse()
    reverse.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
    reverse.forward = lambda x, t: dist.Normal(PyroReverse.forward(reverse, x, t).mean, reverse.scale).to_event(1)
    return reverse


def in_functions():
    """Functions that tell Pyro of a module under two names, and have parameters of their own."""
    net = nn.Linear(2, 2)

    def model(x):
        pyro.module("net", net)
        pyro.module("again", net)
        scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def guide(x):
        mean = pyro.param("mean", lambda: torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    return model, guide, net


def of_diffusion(reverse, one_step):
    pair = pair_of(make(reverse), one_step)
    return pair.model, pair.guide, pair.model


LEFT = {
    "modules": (partial(of_diffusion, None, True), set()),
    "modules, trajectory": (partial(of_diffusion, None, False), set()),
    "pyro modules": (lambda: of_diffusion(pyro_reverse(), True), set()),
    "functions": (in_functions, {"scale", "mean"}),
}


@pytest.mark.parametrize("options", [{}, {"validate": True}, {"validate": False}])
@pytest.mark.parametrize("kind", LEFT)
def test_the_store_is_left_as_it_was_found_but_for_parameters_of_no_module(kind, options):
    make_programs, left = LEFT[kind]
    pyro.param("before", torch.tensor(3.0))
    pyro.module("other", nn.Linear(1, 1))
    store = pyro.get_param_store()
    before = {name: (value, value.detach().clone()) for name, value in store.named_parameters()}
    model, guide, module = make_programs()
    svi = SVI(model, guide, adam, DiffusionELBO(), **options)
    trained = values(module)
    for act in (svi.evaluate_loss, svi.step, svi.step, svi.evaluate_loss):
        act(X_0)
        assert set(store.keys()) == before.keys() | left
        for name, (tensor, value) in before.items():
            assert dict(store.named_parameters())[name] is tensor
            assert torch.equal(tensor, value)
            assert store.param_name(tensor) == name
    assert not any(torch.equal(a, b) for a, b in zip(trained, values(module), strict=True))
    assert not any(hasattr(parameter, "unconstrained") for parameter in module.parameters())  # it cannot be pickled
