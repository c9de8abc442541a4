"""What a training step may be told: each option is what a loop in plain torch does, alone and with the others."""

import copy
import functools
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import bit_diffusion, far, gradient, repeat
from loops import adam, level_data, nothing, pair_of, same, sgd, still, values
from oracles import bit_matrix, exploding_steps, moments, preserving_steps
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyrodiff
from pyrodiff import SVI, DiffusionELBO, networks

X_0 = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 2.0]])
NAN = math.nan


def mean_of(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))


def make(T=4, decoder=None, network=None):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    network = networks.MLP((2,), hidden=8, num_blocks=1) if network is None else network
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=decoder)


def stepped(pair, optim=adam, **options):
    return SVI(pair.model, pair.guide, optim, DiffusionELBO(), **options)


class Line(nn.Module):
    """p(y | x) = N(w x + b, 1), observed: nothing is drawn. The mean of x is a buffer."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x, y):
        self.seen += x.detach().mean()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.w * x + self.b, 1.0), obs=y)


X, Y = torch.tensor([0.5, 2.0, -1.0, 3.0]), torch.tensor([1.0, 2.5, 0.5, 7.0])


def line(optim=sgd, **options):
    return SVI(Line(), nothing, optim, DiffusionELBO(), **options)


def error(model, x, y):
    """The loss of a line, from the density."""
    return ((y - model.w * x - model.b) ** 2 / 2 + math.log(2 * math.pi) / 2).sum()


# All together


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("nonfinite", [None, "skip"])
def test_all_options_together_equal_a_torch_loop(one_step, nonfinite):
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    pairs = [pair_of(diffusion, one_step) for diffusion in (ours, theirs)]

    def cosine(optimizer):
        return LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / 10)) / 2)

    options = {"clip_norm": 0.5, "scheduler": cosine, "accumulate": 2, "average": mean_of, "nonfinite": nonfinite}
    svi = stepped(pairs[0], validate=True, **options)
    optimizer = adam(list(theirs.parameters()))
    scheduler, average = cosine(optimizer), mean_of(pairs[1].model)
    for seed in range(12):
        pyro.set_rng_seed(seed)
        loss = svi.step(X_0)
        pyro.set_rng_seed(seed)
        expected = DiffusionELBO().differentiable_loss(pairs[1].model, pairs[1].guide, X_0)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        if seed % 2:
            assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.5) > 0.5  # there is something to clip
            optimizer.step()
            scheduler.step()
            average.update_parameters(pairs[1].model)
            optimizer.zero_grad()
        assert svi.num_steps == (seed + 1) // 2
        assert svi.scheduler.get_last_lr() == scheduler.get_last_lr()
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(values(svi.average), values(average), strict=True):
        torch.testing.assert_close(a, b)
    assert not same(values(svi.average.module), values(pairs[0].model))


# The learning rate


def test_a_scheduler_is_stepped_once_a_step_of_the_optimizer():
    """SGD at rates 0.1, 0.05, 0.025: w moves by the rate times the slope y - w, which is 1, 0.9, 0.855."""

    def model():
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))

    svi = SVI(model, nothing, sgd, DiffusionELBO(), scheduler=lambda o: LambdaLR(o, lambda k: 0.5**k))
    for left in (0.9, 0.9 * 0.95, 0.9 * 0.95 * 0.975):
        svi.step()
        assert 1 - float(pyro.param("w").detach()) == pytest.approx(left, rel=1e-5)
    assert svi.scheduler.get_last_lr() == pytest.approx([0.0125])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_cycle_ends_with_its_last_step(accumulate):
    total = 6
    svi = line(scheduler=lambda o: OneCycleLR(o, max_lr=0.01, total_steps=total), accumulate=accumulate)
    plain = OneCycleLR(sgd([nn.Parameter(torch.zeros(()))]), max_lr=0.01, total_steps=total)
    rates = []
    for _ in range((total - 1) * accumulate):
        svi.step(X, Y)
        rates.append(svi.optimizer.param_groups[0]["lr"])
    plain.optimizer.step()
    for number in range(total - 1):
        plain.step()
        assert rates[(number + 1) * accumulate - 1] == plain.get_last_lr()[0]
    assert svi.num_steps == total - 1


def test_a_plateau_is_told_the_loss():
    """A parameter at its best: the loss never falls, and the rate does, a tenth every 2 steps after the first."""

    def model():
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(1.0)), 1.0), obs=torch.tensor(1.0))

    svi = SVI(model, nothing, sgd, DiffusionELBO(), scheduler=lambda o: ReduceLROnPlateau(o, patience=1))
    rates = []
    for _ in range(5):
        loss = svi.step()
        rates.append(svi.optimizer.param_groups[0]["lr"])
    assert svi.scheduler.best == pytest.approx(float(loss))
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


# Several batches a step


@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize("k", [2, 4])
def test_accumulating_equals_one_batch_of_all_data(k, clip_norm):
    one, many = line(clip_norm=clip_norm), line(clip_norm=clip_norm, accumulate=k)
    for number in range(1, 4):
        whole = one.step(X, Y)
        start = values(many.model)
        parts = []
        for x, y in zip(X.chunk(k), Y.chunk(k), strict=True):
            assert same(start, values(many.model))  # no step before all are there
            parts.append(many.step(x, y))
        torch.testing.assert_close(sum(parts), whole)
        assert one.num_steps == many.num_steps == number
        for a, b in zip(values(one.model), values(many.model), strict=True):
            torch.testing.assert_close(a, b)


# Lower precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("validate", [True, None])
def test_networks_run_in_low_precision_and_the_bound_does_not(one_step, dtype, validate):
    diffusion = make()
    nn.init.normal_(diffusion.reverse.denoiser.network.outlet.weight)
    pair, seen = pair_of(diffusion, one_step), []
    diffusion.reverse.denoiser.network.inlet.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    low, full = (stepped(pair, still, autocast=kind, validate=validate) for kind in (dtype, None))
    for svi in (low, full):
        diffusion.zero_grad()
        svi.step(X_0)
    for seed in range(3):
        losses = []
        for svi, kind in ((low, dtype), (full, torch.float32)):
            pyro.set_rng_seed(seed)
            seen.clear()
            losses.append(svi.step(X_0))
            assert seen
            assert set(seen) == {kind}
        assert losses[0].dtype == torch.float32
        assert losses[0] != losses[1]
        torch.testing.assert_close(*losses, rtol=10 * torch.finfo(dtype).eps, atol=0)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in diffusion.parameters())
    assert (low.scaler is not None) == (dtype == torch.float16)


class Large(nn.Module):
    """A loss of w x, whose gradient is x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        pyro.factor("x", -self.w * x)


def test_a_scaled_gradient_that_overflows_takes_no_step_and_counts_as_none():
    """The scale starts at 65536: times 1e35 it is infinite in float32, times 2 it is not."""
    svi = SVI(
        Large(),
        nothing,
        sgd,
        DiffusionELBO(),
        autocast=torch.float16,
        scheduler=lambda o: LambdaLR(o, lambda k: 0.5**k),
        average=mean_of,
    )
    x = torch.tensor(2.0)
    svi.step(x)
    assert float(svi.model.w.detach()) == pytest.approx(0.8)
    scale = svi.scaler.get_scale()
    svi.step(torch.tensor(1e35))
    assert float(svi.model.w.detach()) == pytest.approx(0.8)
    assert svi.scaler.get_scale() == scale / 2
    assert svi.num_steps == int(svi.average.n_averaged) == 1
    assert svi.scheduler.get_last_lr() == [0.05]
    svi.step(x)
    assert float(svi.model.w.detach()) == pytest.approx(0.7)
    assert svi.num_steps == int(svi.average.n_averaged) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaled_gradient_is_clipped_by_the_norm_that_it_has_unscaled(accumulate):
    """A gradient of 2 a batch, clipped to 1, times the rate 0.1."""
    svi = SVI(Large(), nothing, sgd, DiffusionELBO(), clip_norm=1.0, autocast=torch.float16, accumulate=accumulate)
    for _ in range(3 * accumulate):
        svi.step(torch.tensor(2.0))
    assert float(svi.model.w.detach()) == pytest.approx(0.7, abs=1e-5)


# Averages


@pytest.mark.parametrize("kind", ["torch's", "torch's with buffers", "exponential"])
def test_averaged_weights_are_those_of_the_recursion_and_the_others_come_back(kind):
    """m_1 = w_1, m_k = d_k m_{k-1} + (1 - d_k) w_k, of the buffer too if asked for, else it is the model's own.

    torch's with d_k = 0.7; ours with d_k = min(0.2, k / (9 + k)): 2/11, then 0.2.
    """
    use_buffers, ours = kind.endswith("buffers"), pyrodiff.exponential_average(0.2)

    def average(model):
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use_buffers)

    optim = functools.partial(torch.optim.SGD, lr=0.01)
    svi = line(optim=optim, average=ours if kind == "exponential" else average)
    means = None
    for d in (0.0, 2 / 11, 0.2, 0.2) if kind == "exponential" else (0.7,) * 4:
        svi.step(X, Y)
        now = [*values(svi.model), svi.model.seen.clone()]
        means = now if means is None else [d * mean + (1 - d) * value for mean, value in zip(means, now, strict=True)]
    expected = means if use_buffers else [*means[:2], now[2]]

    def found():
        return [*values(svi.model), svi.model.seen.clone()]

    parameters = list(svi.model.parameters())
    with svi.averaged():
        for a, b in zip(found(), expected, strict=True):
            torch.testing.assert_close(a, b)
        assert all(a is b for a, b in zip(parameters, svi.model.parameters(), strict=True))
    assert same(found(), now)
    with pytest.raises(RuntimeError, match="within"), svi.averaged():
        raise RuntimeError("within")
    assert same(found(), now)
    assert all(p.requires_grad for p in svi.model.parameters())
    svi.step(X, Y)
    assert not same(found(), now)


def test_a_copy_of_a_run_learns_what_is_put_into_its_own_programs():
    svi = line()
    svi.step(X, Y)
    other = copy.deepcopy(svi)
    name, parameter = next(other.model.named_parameters())
    replaced = torch.nn.Parameter(parameter.detach().clone())
    setattr(other.model, name, replaced)
    other.step(X, Y)
    assert not torch.equal(replaced, parameter)


def test_an_exponential_average_has_the_integers_of_its_model_and_may_be_empty():
    model = torch.nn.Linear(1, 1)
    model.table = torch.nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    average = pyrodiff.exponential_average(0.5)(model)
    for _ in range(3):
        model.table.add_(1)
        average.update_parameters(model)
    assert average.module.table.tolist() == [4, 5]
    empty = torch.nn.Identity()
    average = pyrodiff.exponential_average(0.5)(empty)
    average.update_parameters(empty)
    assert int(average.n_averaged) == 1


@pytest.mark.parametrize("one_step", [False, True])
def test_the_bound_of_averaged_weights_is_that_of_a_model_with_them(one_step):
    diffusion = make()
    svi = stepped(pair_of(diffusion, one_step), average=mean_of)
    for _ in range(5):
        svi.step(X_0)
    other, kept = copy.deepcopy(diffusion), values(diffusion)
    for ours, mean in zip(other.reverse.parameters(), svi.average.module.reverse.parameters(), strict=True):
        ours.data.copy_(mean)
    with svi.averaged():
        pyro.set_rng_seed(1)
        inside = pyrodiff.bound(diffusion, X_0).nats
    pyro.set_rng_seed(1)
    assert torch.equal(inside, pyrodiff.bound(other, X_0).nats)
    assert same(kept, values(diffusion))


# What is not finite


def bad_loss():
    return torch.tensor([NAN, 1.0, 2.0, 3.0])


def state_of(svi):
    return [value.clone() for state in svi.optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_no_step(nonfinite, accumulate, clip_norm):
    ours, theirs = (
        line(adam, nonfinite=nonfinite, accumulate=accumulate, validate=False, clip_norm=clip_norm) for _ in range(2)
    )
    for svi in (ours, theirs):
        for _ in range(accumulate):
            svi.step(X, Y)
    before, state = values(ours.model), state_of(ours)
    for number in range(accumulate + 1, 2 * accumulate + 1):
        if nonfinite == "stop":
            with pytest.raises(FloatingPointError, match=rf"loss is nan at step {number}\b"):
                ours.step(X, bad_loss())
        else:
            with pytest.warns(RuntimeWarning, match=rf"loss is nan at step {number}\b") as record:
                ours.step(X, bad_loss())
            assert record[0].filename == __file__
    assert same(before, values(ours.model))
    assert same(state, state_of(ours))
    assert ours.num_steps == 1
    for svi in (ours, theirs):
        for _ in range(accumulate):
            svi.step(X, Y)
    assert ours.num_steps == theirs.num_steps == 2
    assert same(values(ours.model), values(theirs.model))


def test_of_accumulated_batches_only_the_one_that_is_not_finite_is_skipped():
    ours, theirs = line(nonfinite="skip", accumulate=3, validate=False), line()
    theirs.step(X.repeat(2), Y.repeat(2))
    ours.step(X, Y)
    with pytest.warns(RuntimeWarning, match="step 2"):
        ours.step(X, bad_loss())
    ours.step(X, Y)
    for a, b in zip(values(ours.model), values(theirs.model), strict=True):
        torch.testing.assert_close(a, b)


def test_after_a_stop_the_batches_before_it_do_not_count():
    ours, theirs = (line(nonfinite="stop", accumulate=2, validate=False) for _ in range(2))
    ours.step(X, Y)
    with pytest.raises(FloatingPointError, match="step 2"):
        ours.step(X, bad_loss())
    for svi in (ours, theirs):
        svi.step(X, Y)
        assert svi.num_steps == 0
        svi.step(X, Y)
        assert svi.num_steps == 1
    assert same(values(ours.model), values(theirs.model))


class Root(nn.Module):
    """A loss sqrt(w - 1) + (v - x)^2 / 2: finite at w = 1, where its slope is infinite."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        pyro.factor("root", -(self.w - 1).sqrt() - (self.v - x) ** 2 / 2)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_is_no_step(nonfinite, accumulate, clip_norm):
    options = {"nonfinite": nonfinite, "accumulate": accumulate, "clip_norm": clip_norm}
    svi = SVI(Root(), nothing, adam, DiffusionELBO(), scheduler=lambda o: StepLR(o, 1), average=mean_of, **options)
    x = torch.tensor(3.0)
    for _ in range(accumulate - 1):
        svi.step(x)
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match=rf"gradient is inf at step {accumulate}\b"):
            svi.step(x)
    else:
        with pytest.warns(RuntimeWarning, match=rf"gradient is inf at step {accumulate}\b") as record:
            svi.step(x)
        assert record[0].filename == __file__
    assert [float(value) for value in values(svi.model)] == [1.0, 0.0]
    assert not svi.optimizer.state
    assert svi.num_steps == int(svi.average.n_averaged) == svi.scheduler.last_epoch == 0
    svi.model.w.data.fill_(5.0)
    for _ in range(accumulate):
        svi.step(x)
    assert [float(value) for value in values(svi.model)] == pytest.approx([4.99, 0.01], abs=1e-6)  # Adam's first step
    assert svi.num_steps == int(svi.average.n_averaged) == svi.scheduler.last_epoch == 1


def test_what_is_not_finite_is_not_looked_at_unless_asked_for():
    svi = line()
    svi.step(X, Y)
    svi.step(X, bad_loss())
    assert all(value.isnan() for value in values(svi.model))


# What is validated


@pytest.mark.parametrize("one_step", [False, True])
def test_data_of_a_shape_are_checked_once(one_step):
    svi = stepped(pair_of(make(), one_step), still)
    bad = X_0.clone()
    bad[1, 1] = NAN
    svi.step(X_0)
    assert svi.step(bad).isnan()
    assert svi.evaluate_loss(bad).isnan()
    for other in (bad[:2], bad.double(), bad[None]):
        with pytest.raises(ValueError, match="x_0"):
            svi.evaluate_loss(other)
        with pytest.raises(ValueError, match="x_0"):
            svi.step(other)


@pytest.mark.parametrize("one_step", [False, True])
def test_data_that_were_refused_are_refused_again(one_step):
    svi = stepped(pair_of(make(), one_step))
    svi.step(X_0)
    bad = torch.full((2, 2), NAN)
    for _ in range(2):
        with pytest.raises(ValueError, match="x_0"):
            svi.step(bad)


@pytest.mark.parametrize("one_step", [False, True])
def test_a_first_step_that_was_refused_leaves_nothing_behind(one_step):
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    svis = [stepped(pair_of(diffusion, one_step)) for diffusion in (ours, theirs)]
    with pytest.raises(ValueError, match="x_0"):
        svis[0].step(torch.full_like(X_0, NAN))
    for svi in svis:
        pyro.set_rng_seed(1)
        svi.step(X_0)
    assert same(values(ours), values(theirs))


@pytest.mark.parametrize("one_step", [False, True])
def test_validating_always_or_never(one_step):
    bad = X_0.clone()
    bad[1, 1] = NAN
    always, never = (stepped(pair_of(make(), one_step), validate=validate) for validate in (True, False))
    for _ in range(3):
        always.step(X_0)
        with pytest.raises(ValueError, match="x_0"):
            always.step(bad)
    never.step(X_0)
    for data in (bad, bad[:2]):
        assert never.step(data).isnan()


@pytest.mark.parametrize("one_step", [False, True])
def test_validating_never_is_also_at_the_first_step(one_step):
    bad = torch.full_like(X_0, NAN)
    assert stepped(pair_of(make(), one_step), validate=False).evaluate_loss(bad).isnan()
    assert stepped(pair_of(make(), one_step), validate=False).step(bad).isnan()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("one_step", [False, True])
def test_a_dry_run_leaves_no_trace(one_step, wrapped):
    """First steps of shapes draw, count and learn what steps do that are never validated: random numbers of all
    sources, statistics of the batch, the costs that a drawing keeps; also where functions call the pair."""

    class Noisy(Normed):
        def forward(self, x_t, t):
            return super().forward(x_t, t) + 0.1 * random.gauss(0, 1) + 0.1 * np.random.normal()

    found = []
    for validate in (None, False):
        pyro.set_rng_seed(7)
        diffusion = make(network=Noisy())
        pair = diffusion.one_step(pyrodiff.LossSecondMoment(4, history=2)) if one_step else diffusion
        programs = (lambda x, p=pair: p.model(x), lambda x, p=pair: p.guide(x)) if wrapped else (pair.model, pair.guide)
        svi = SVI(*programs, adam, DiffusionELBO(), validate=validate)
        losses = [act(X_0[:n]) for act, n in ((svi.evaluate_loss, 2), (svi.step, 3), (svi.step, 2), (svi.step, 3))]
        draws = [torch.rand(3), torch.tensor([random.random(), np.random.rand()])]
        found.append((torch.stack(losses), dict(pair.model.state_dict()), draws))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_is_put_in_the_place_of_a_buffer_is_put_back():
    """Of a dry run; two modules may share a buffer."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.other = nn.Parameter(torch.tensor(0.3)), nn.Module()
            self.register_buffer("mean", torch.zeros(()))
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("fixed", torch.tensor(0.5).expand(3))
            self.other.register_buffer("calls", self.calls)

        def forward(self, x):
            if self.calls is not self.other.calls:
                raise ValueError("the two modules no longer share their buffer")
            self.mean = 0.5 * self.mean + x.mean()
            self.other.calls += 1
            pyro.sample("x", dist.Normal(self.w + self.calls + self.mean + self.fixed, 1.0).to_event(1), obs=x)

    losses = []
    for validate in (None, False):
        svi = SVI(Mean(), nothing, sgd, DiffusionELBO(), validate=validate)
        losses.append(torch.stack([svi.step(torch.tensor([1.0, 2.0, 3.0])) for _ in range(3)]))
        assert float(svi.model.calls) == 3
        assert float(svi.model.mean) == 2 * (1 + 0.5 + 0.25)
        assert svi.model.calls is svi.model.other.calls
    assert torch.equal(*losses)


def test_ever_new_arguments_do_not_have_dry_runs_for_ever():
    calls = []

    def model(weight):
        calls.append(weight)
        with pyro.poutine.scale(scale=weight):
            pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))

    svi = SVI(model, nothing, sgd, DiffusionELBO())
    for number in range(150):
        svi.step(1 / (1 + number))
    assert 200 <= len(calls) <= 260


def test_pyros_validation_is_on_again_after_a_step():
    svi = stepped(make())
    for _ in range(2):
        svi.step(X_0)
        with pytest.raises(ValueError, match="scale"):
            dist.Normal(0.0, torch.tensor(-1.0))


# What is learned


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_from_before_does_not_count(late):
    w = nn.Parameter(torch.tensor(0.0))
    w.grad = torch.tensor(1e6)

    def model(new):
        pyro.sample("x", dist.Normal(pyro.param("v", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))
        if new:
            module = nn.Module()
            module.w = w
            pyro.module("m", module)
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(1.0))

    svi = SVI(model, nothing, sgd, DiffusionELBO())
    if late:
        svi.step(False)
    svi.step(True)
    assert float(w.detach()) == pytest.approx(0.1)


@pytest.mark.parametrize("one_step", [False, True])
def test_a_parameter_that_is_thawed_later_is_learned_from_then_on(one_step):
    diffusion = make().eval()  # Pyro warns of frozen parameters of a module that is in training
    svi, inlet = stepped(pair_of(diffusion, one_step)), diffusion.reverse.denoiser.network.gate
    inlet.requires_grad_(False)
    before = values(inlet)
    for _ in range(3):
        svi.step(X_0)
    assert same(before, values(inlet))
    inlet.requires_grad_(True)
    svi.step(X_0)
    assert not any(torch.equal(a, b) for a, b in zip(before, values(inlet), strict=True))


@pytest.mark.parametrize("one_step", [False, True])
def test_a_network_that_takes_the_place_of_another_is_learned(one_step):
    diffusion = make()
    svi = stepped(pair_of(diffusion, one_step))
    for _ in range(3):
        svi.step(X_0)
    diffusion.reverse.denoiser.network = networks.MLP((2,), hidden=8, num_blocks=1)
    outlet = diffusion.reverse.denoiser.network.outlet
    before = values(outlet)
    svi.step(X_0)
    assert not any(torch.equal(a, b) for a, b in zip(before, values(outlet), strict=True))


# The bound without messages


def bits():
    return bit_diffusion([0.2, 0.3, 0.5], rate=0.3, bits=2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()


def gaussians(decoder=None):
    diffusion = make(3, decoder).double()
    network = diffusion.reverse.denoiser.network
    nn.init.normal_(network.outlet.weight)
    return diffusion, X_0.double() if decoder is None else level_data()


PAIRS = {
    "gaussian": gaussians,
    "levels": lambda: gaussians(pyrodiff.DiscretizedDecoder(levels=5)),
    "bits": bits,
}


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_the_bound_without_messages_is_that_of_pyros_handlers(kind, one_step):
    """In the mean, the value and the gradient in every parameter: 5 standard errors of the difference."""
    diffusion, x_0 = PAIRS[kind]()
    pair, x_0, number = pair_of(diffusion, one_step), x_0.repeat(16, 1), 50

    def draw():
        loss = DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0)
        return torch.cat([loss.detach().reshape(1), gradient(loss, diffusion)])

    def draw_directly():
        with pyro.validation_enabled(False):
            assert DiffusionELBO()._direct_costs(pair.model, pair.guide, (x_0,), {}) is not None
            return draw()

    by_messages, directly = repeat(number, draw), repeat(number, draw_directly)
    deviation = ((by_messages.var(0) + directly.var(0)) / number).sqrt()
    off = (by_messages.mean(0) - directly.mean(0)).abs()
    assert (off <= 5 * deviation + 1e-9).all()
    assert (deviation > 0).any()


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_the_terms_given_the_states_are_those_of_pyros_handlers(kind, one_step, monkeypatch):
    """With the same states the two agree to rounding, so that nothing is left to the noise of draws."""
    diffusion, x_0 = PAIRS[kind]()
    pair, elbo = pair_of(diffusion, one_step), DiffusionELBO()
    for seed in range(5):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(pair.guide).get_trace(x_0)

        def given(site, law, trace=trace):
            return trace.nodes[site]["value"]

        replayed = poutine.replay(pair.guide, trace=trace)
        expected = elbo.differentiable_loss(pair.model, replayed, x_0)
        T, forward = diffusion.num_steps, diffusion.forward_process
        with monkeypatch.context() as patch, pyro.validation_enabled(False):
            if one_step:
                step, draw = pair.model.step, type(pair.model.step).draw
                patch.setattr(step, "draw", lambda x, sample, step=step, draw=draw: draw(step, x, given))
            else:
                states = torch.cat([trace.nodes[f"x_{t}"]["value"] for t in range(1, T + 1)])
                marginal = forward.marginal

                def drawn(x, t, states=states, marginal=marginal):
                    return (lambda: states) if isinstance(t, torch.Tensor) else marginal(x, t)

                patch.setattr(forward, "marginal", drawn)
            found = elbo.differentiable_loss(pair.model, pair.guide, x_0)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        ours, theirs = gradient(found, diffusion), gradient(expected, diffusion)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * float(theirs.abs().max()))


@pytest.fixture
def direct(monkeypatch):
    """How often the bound was evaluated without messages, and how often it was not although on trust."""
    counts, plain = {True: 0, False: 0}, DiffusionELBO._direct_costs

    def counted(self, *args):
        costs = plain(self, *args)
        counts[costs is not None] += 1
        return costs

    monkeypatch.setattr(DiffusionELBO, "_direct_costs", counted)
    return counts


class Listener(Messenger):
    def __init__(self):
        super().__init__()
        self.names = set()

    def _pyro_post_sample(self, msg):
        self.names.add(msg["name"])


@pytest.mark.parametrize("one_step", [False, True])
def test_whoever_listens_hears_all_sites(one_step, direct):
    svi = stepped(pair_of(make(), one_step))
    for _ in range(3):
        svi.step(X_0)
    assert direct == {True: 3, False: 1}  # the dry run is heard
    for _ in range(2):
        with Listener() as listener:
            svi.step(X_0)
        assert listener.names >= ({"x_T", "u", "x_t", "x_s", "x_0"} if one_step else {f"x_{t}" for t in range(5)})
    assert direct == {True: 3, False: 3}
    svi.step(X_0)
    assert direct == {True: 4, False: 3}


class RandomWeight(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 2)
        self.net.weight = PyroSample(dist.Normal(0.0, 0.5).expand([2, 3]).to_event(2))

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype).expand(x_t.shape[:-1])
        return dist.Normal(x_t + self.net(torch.cat([x_t, t[..., None] / 4], -1)), 0.7).to_event(1)


@pytest.mark.parametrize("one_step", [False, True])
def test_random_weights_need_messages(one_step, direct):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, 0.05, 0.5))
    pair = pair_of(pyrodiff.Diffusion(forward, RandomWeight(), (2,)), one_step)

    def guide(x_0):
        pyro.sample("reverse.net.weight", dist.Normal(pyro.param("loc", torch.zeros(2, 3)), 0.1).to_event(2))
        pair.guide(x_0)

    svi = SVI(pair.model, guide, adam, DiffusionELBO())
    for _ in range(3):
        svi.step(X_0)
    assert direct[True] == 0
    assert pyro.param("loc").abs().min() > 0
    with pyro.validation_enabled(False):  # also under the guide that the pair has by itself
        assert pyrodiff.pair.terms.pair_costs(pair.model, pair.guide, (X_0,), {}) is None


class Normed(nn.Module):
    """A network with statistics of the batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

    def forward(self, x_t, t):
        return self.norm(self.layer(x_t))


@pytest.mark.parametrize("one_step", [False, True])
def test_statistics_of_the_batch_are_of_one_step_at_a_time(one_step, direct):
    diffusion = make(network=Normed())
    svi, norm = stepped(pair_of(diffusion, one_step)), diffusion.reverse.denoiser.network.norm
    for _ in range(3):
        svi.step(X_0)
    assert direct[True] == (3 if one_step else 0)
    assert int(norm.num_batches_tracked) == 3 * (1 if one_step else diffusion.num_steps)
    diffusion.eval()
    svi.step(X_0)
    assert direct[True] == (4 if one_step else 1)
    assert int(norm.num_batches_tracked) == 3 * (1 if one_step else diffusion.num_steps)


def test_a_drawing_is_told_the_same_without_messages(monkeypatch):
    """Given t and x_t, the costs that it keeps are those that Pyro's handlers say."""
    drawing = pyrodiff.LossSecondMoment(num_steps=4, history=2)
    pair = make().one_step(drawing)
    pair.double()
    x_0 = X_0.double()
    pyro.set_rng_seed(2)
    trace = poutine.trace(pair.guide).get_trace(x_0)
    DiffusionELBO().differentiable_loss(pair.model, poutine.replay(pair.guide, trace=trace), x_0)
    kept = drawing.costs.clone(), drawing.counts.clone()
    drawing.costs.zero_()
    drawing.counts.zero_()
    step, draw = pair.model.step, type(pair.model.step).draw
    monkeypatch.setattr(step, "draw", lambda x, sample: draw(step, x, lambda name, law: trace.nodes[name]["value"]))
    with pyro.validation_enabled(False):
        DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0)
    torch.testing.assert_close((drawing.costs, drawing.counts), kept)
    assert int(drawing.counts.sum()) == len(x_0)


# All states at once

SCHEDULES = {
    "linear": lambda: pyrodiff.LinearSchedule(4, 0.05, 0.5),
    "cosine": lambda: pyrodiff.CosineSchedule(4),
    "reciprocal": lambda: pyrodiff.ReciprocalSchedule(4),
    "geometric": lambda: pyrodiff.GeometricSchedule(4, 0.1, 3.0),
    "log SNR": lambda: pyrodiff.LogSNRSchedule(4, 4.0, -3.0),
    "beta": lambda: pyrodiff.BetaSchedule([0.3, 0.1, 0.6, 1.0]),
    "some": lambda: pyrodiff.SubSchedule(pyrodiff.ReciprocalSchedule(9), [1, 4, 7, 9]),
    "one": lambda: pyrodiff.LinearSchedule(1, 0.3),
}


def steps_of(schedule):
    """(gain, variance) of each step, from beta or sigma alone."""
    T = schedule.num_steps
    if float(schedule.signal(T)) == 1:
        return exploding_steps([float(schedule.noise(t)) for t in range(1, T + 1)])
    return preserving_steps([float(schedule.beta(t)) for t in range(1, T + 1)])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_all_states_at_once_have_the_covariances_of_the_chain(kind):
    """Cov(x_s, x_t | x_0) = a_t / a_s b_s^2 for s <= t, and the mean a_t x_0."""
    schedule = SCHEDULES[kind]()
    T, steps, x_0 = schedule.num_steps, steps_of(schedule), 1.7
    x = pyrodiff.GaussianForward(schedule).trajectory(torch.full((40000, 1), x_0, dtype=torch.float64))[..., 0]
    assert x.shape == (T, 40000)
    marginal = moments(steps)
    for t in range(1, T + 1):
        gain, _ = marginal[t]
        assert not far(x[t - 1], gain * x_0)
        for s in range(1, t + 1):
            expected = moments(steps, s)[t - s][0] * marginal[s][1]
            off = [x[u - 1] - marginal[u][0] * x_0 for u in (s, t)]
            assert not far(off[0] * off[1], expected), (s, t)


@pytest.mark.parametrize("kind", ["linear", "reciprocal", "geometric"])
def test_all_states_at_once_are_independent_numbers(kind):
    """Of two data with two numbers each: their states have no covariance, and each its own mean."""
    schedule, x_0 = SCHEDULES[kind](), torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    forward = pyrodiff.GaussianForward(schedule)
    batches = repeat(400, lambda: forward.trajectory(x_0.repeat(10, 1)))  # of ten times the two, side by side
    draws = batches.unflatten(2, (10, 2)).transpose(1, 2).flatten(0, 1)
    gains = torch.tensor([gain for gain, _ in moments(steps_of(schedule))[1:]], dtype=torch.float64)
    off = (draws - gains[:, None, None] * x_0).flatten(2)
    assert not far(off, 0.0)
    products = off[..., :, None] * off[..., None, :]
    others = products[..., ~torch.eye(4, dtype=torch.bool)]
    assert not far(others, 0.0)


def test_all_states_of_bits_have_the_law_of_the_chain():
    """Every path of three bits, by the product of the transition matrices."""
    betas, rate = [0.2, 0.35, 0.5], 0.3
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate=rate)
    for x_0 in (0, 1):
        x = forward.trajectory(torch.full((20000, 1), float(x_0)))[..., 0].long()
        for path in range(8):
            states = [x_0, *(path >> i & 1 for i in range(3))]
            expected = math.prod(bit_matrix(betas, rate, t, t + 1)[states[t]][states[t + 1]] for t in range(3))
            hit = torch.stack([x[t] == states[t + 1] for t in range(3)]).all(0).double()
            assert not far(hit, expected)


# Bad arguments


class Still(nn.Module):
    """A network that computes nothing, and so loses nothing by a lower precision."""

    def __init__(self, levels=None):
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(-0.4, 0.3, levels or 2))

    def forward(self, x_t, t):
        return self.offset.expand(*x_t.shape[:-1], 2) if len(self.offset) == 2 else self.offset.expand(*x_t.shape, -1)


class Correlated(nn.Module):
    """A kernel whose KL multiplies matrices."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([[0.9, 0.0], [0.3, 0.7]]))

    def forward(self, x_t, t):
        return dist.MultivariateNormal(0.9 * x_t, scale_tril=self.factor)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["levels", "correlated"])
def test_what_is_summed_to_the_bound_keeps_its_precision(kind, direct):
    """bfloat16 has 8 bits: where the network does nothing, autocast must not be seen."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(3, 0.05, 0.5))
    x_0 = pyrodiff.from_levels(torch.randint(7, (64, 2)), 7)
    losses = []
    for autocast in (None, torch.bfloat16):
        if kind == "levels":
            reverse = pyrodiff.GaussianReverse(forward, pyrodiff.LevelPrediction(Still(7), forward, 7))
            diffusion = pyrodiff.Diffusion(forward, reverse, (2,), pyrodiff.DiscretizedDecoder(7))
        else:
            diffusion = pyrodiff.Diffusion(forward, Correlated(), (2,))
        pair = diffusion.one_step()
        optim = functools.partial(torch.optim.SGD, lr=0.0)
        validate = None if direct else True
        svi = SVI(pair.model, pair.guide, optim, DiffusionELBO(), autocast=autocast, validate=validate)
        svi.step(x_0)
        pyro.set_rng_seed(1)
        losses.append(svi.step(x_0))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


# What is taken on trust is what is there: parts of one's own, and parts that take the place of others


class Scaled(pyrodiff.Variance):
    """A variance with a number of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, process, t):
        return self.scale * process.schedule.beta(t)


class Narrow(pyrodiff.GaussianForward):
    """A process with another posterior, and what follows from it."""

    def posterior(self, x_t, x_0, t, s=None):
        q = super().posterior(x_t, x_0, t, s)
        return dist.Normal(q.mean, q.base_dist.stddev / 2).to_event(1)


class Displaced(pyrodiff.GaussianForward):
    """A process that forgets the data towards 3."""

    def transition(self, x_s, t, s=None):
        q = super().transition(x_s - 3, t, s)
        return dist.Normal(q.mean + 3, q.base_dist.stddev).to_event(1)

    def marginal(self, x_0, t):
        return self.transition(x_0, t, s=0)

    def posterior(self, x_t, x_0, t, s=None):
        q = super().posterior(x_t - 3, x_0 - 3, t, s)
        return dist.Normal(q.mean + 3, q.base_dist.stddev).to_event(1)


def of(forward=pyrodiff.GaussianForward, variance=None, seed=0):
    torch.manual_seed(seed)
    process = forward(pyrodiff.LinearSchedule(6, 0.05, 0.4))
    reverse = pyrodiff.GaussianReverse(
        process, pyrodiff.NoisePrediction(networks.MLP((2,), hidden=8), process), variance
    )
    return pyrodiff.Diffusion(process, reverse, (2,)).double()


def change_number(diffusion):
    diffusion.reverse.variance.scale = 4.0


def change_variance(diffusion):
    diffusion.reverse.variance = pyrodiff.PosteriorVariance()


def change_sequence(diffusion):
    diffusion.reverse.variance = pyrodiff.FixedVariance([0.1] * 6)


def change_buffer(diffusion):
    diffusion.reverse.variance.variances = torch.full((6,), 0.1, dtype=torch.float64)


CHANGES = {
    "a number of one's own": (lambda: Scaled(1.0), change_number),
    "another variance": (pyrodiff.ForwardVariance, change_variance),
    "another sequence": (lambda: pyrodiff.FixedVariance([0.5] * 6), change_sequence),
    "another buffer": (lambda: pyrodiff.FixedVariance([0.5] * 6), change_buffer),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bound_after_a_change_is_that_of_the_changed_model(name):
    variance, change = CHANGES[name]
    changed, fresh = of(variance=variance()), of(variance=variance())
    x_0 = torch.randn(20, 2, dtype=torch.float64)
    before = pyrodiff.bound(changed, x_0, generator=0).nats
    change(changed)
    change(fresh)
    after = [pyrodiff.bound(diffusion, x_0, generator=0).nats for diffusion in (changed, fresh)]
    torch.testing.assert_close(*after, rtol=1e-12, atol=1e-12)
    assert (after[0] - before).abs().max() > 0.1


def hooked(diffusion):
    diffusion.reverse.register_forward_hook(
        lambda module, args, law: dist.Normal(law.mean, 2 * law.base_dist.stddev).to_event(1)
    )
    return diffusion


OWN = {
    "a posterior": lambda: of(Narrow),
    "a transition": lambda: of(Displaced),
    "a hook on the kernel": lambda: hooked(of()),
}


@pytest.mark.parametrize(
    ("name", "one_step"),
    [(name, one_step) for name in OWN for one_step in (False, True) if (name, one_step) != ("a posterior", False)],
)
def test_kernels_of_ones_own_are_those_that_are_scored(name, one_step):
    """The step without messages against the handlers, 5 standard errors of 30 batches of 300.

    A posterior that is none of the process's, as Narrow's, has other states on a trajectory than the process: there the
    pairs are not those of one bound, which ``verify`` says.
    """
    pair = pair_of(OWN[name](), one_step)
    x_0 = 1 + torch.randn(300, 2, dtype=torch.float64)
    elbo, losses = DiffusionELBO(), []
    for direct in (False, True):
        with pyro.validation_enabled(not direct), torch.no_grad():
            losses.append(torch.stack([elbo.differentiable_loss(pair.model, pair.guide, x_0) for _ in range(30)]) / 300)
    error = sum(loss.var() / 30 for loss in losses).sqrt()
    assert abs(losses[0].mean() - losses[1].mean()) < 5 * error


def test_a_gradient_of_the_data_is_there_at_every_step():
    encoder, pair = nn.Linear(2, 2), make().one_step()
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO(), compile=True)
    for _ in range(4):
        encoder.zero_grad()
        svi.step(encoder(X_0))
        assert encoder.weight.grad.abs().sum() > 0


def test_weights_stay_averages_until_that_is_left():
    pair = make().one_step()
    average = functools.partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    svi = SVI(pair.model, pair.guide, adam, DiffusionELBO(), average=average)
    svi.step(X_0)
    with svi.averaged():
        for forbidden in (lambda: svi.step(X_0), svi.adopt_average, lambda: svi.averaged().__enter__()):
            with pytest.raises(ValueError, match="must be left first"):
                forbidden()
    svi.step(X_0)
    assert svi.num_steps == 2
