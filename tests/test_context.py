"""What is known of each datum: every number of a labelled batch is that of log p(x_0 | y), datum by datum.

The data are N(m_y, v), the reverse kernels exact, and the last state keeps nothing of the data: p(x_0 | y) is N(m_y, v)
whatever the label is, right or wrong, each trajectory weighs exactly that, and each term has a mean in closed form.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import far, repeat
from loops import adam, pair_of, same, still, values
from models import prior_of_weights
from oracles import log_normal
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrodiff
from pyrodiff import (
    SVI,
    AncestralSampler,
    DiffusionELBO,
    bound,
    importance_bound,
    ode_log_prob,
    variance_account,
    verify,
)
from pyrodiff.pair.terms import pair_costs
from pyrodiff.running.evaluation import bytes_per_row

MEANS = torch.tensor([[-1.5, 0.5], [2.0, -0.3], [0.2, 1.8]], dtype=torch.float64)
V = torch.tensor([0.4, 1.3], dtype=torch.float64)
X_0 = torch.tensor([[-1.1, 0.9], [2.4, -1.2], [0.6, 2.1], [-2.0, -0.7], [1.7, 0.8], [0.1, 0.4]], dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
WRONG = torch.tensor([2, 0, 1, 1, 2, 0])
T = 5
every_pair = pytest.mark.parametrize("one_step", [False, True], ids=["trajectory", "one step"])


class Exact(nn.Module):
    """p(x_{t-1} | x_t, y) of data N(m_y, v): the joint of two states, conditioned."""

    def __init__(self, schedule):
        super().__init__()
        self.means, self.schedule = nn.Parameter(MEANS.clone()), schedule

    def at(self, t, m):
        """Signal, variance of the noise, mean and variance of q(x_t | y)."""
        a, b = self.schedule.signal(t), self.schedule.noise(t)
        a, b = (c.reshape(c.shape + (1,) * bool(c.dim())) for c in (a, b))
        return a, b**2, a * m, a**2 * V + b**2

    def moments(self, x_t, t, y):
        """The mean is shift + factor x_t."""
        m = self.means[y]
        (a_s, noise_s, mean_s, var_s), (a_t, noise_t, mean_t, var_t) = self.at(t - 1, m), self.at(t, m)
        step = a_t / a_s
        factor = step * var_s / var_t
        return mean_s + factor * (x_t - mean_t), var_s * (noise_t - step**2 * noise_s) / var_t, factor

    def forward(self, x_t, t, y):
        assert y.shape == x_t.shape[:-1], "the network sees a label for each state"
        mean, variance, _ = self.moments(x_t, t, y)
        return dist.Normal(mean, variance.sqrt().expand(mean.shape)).to_event(1)

    def subchain(self, forward):
        other = Exact(forward.schedule)
        other.means = self.means
        return other


def exact(num_steps=T, kernel=Exact):
    """The prior is q(x_T | y) of each label: no signal is left."""
    forward = pyrodiff.GaussianForward(pyrodiff.ReciprocalSchedule(num_steps))
    return pyrodiff.Diffusion(forward, kernel(forward.schedule), (2,))


def truth(x_0, y):
    """-log p(x_0 | y), each datum by itself."""
    return torch.from_numpy(-log_normal(x_0.numpy(), MEANS[y].numpy(), V.numpy()).sum(-1))


def terms(diffusion, x_0, y):
    """The means of L_T, L_{T-1}, ..., L_0, with shape (T + 1, B), from x_t = a_t x_0 + b_t eps alone."""
    schedule, kernel, found = diffusion.forward_process.schedule, diffusion.reverse, [torch.zeros(len(x_0)).double()]
    with torch.no_grad():
        for t in range(diffusion.num_steps, 0, -1):
            a, b = schedule.signal(t), schedule.noise(t)
            mean, variance, factor = kernel.moments(a * x_0, t, y)
            if t == 1:
                off = (x_0 - mean) ** 2 + (factor * b) ** 2
                cost = (torch.log(2 * math.pi * variance) + off / variance) / 2
            else:
                weight_t, weight_0, noise = schedule.posterior(t)
                off = weight_t * a * x_0 + weight_0 * x_0 - mean
                ratio = noise**2 / variance
                cost = (ratio - 1 - ratio.log() + (off**2 + ((weight_t - factor) * b) ** 2) / variance) / 2
            found.append(cost.expand(x_0.shape).sum(-1))
    return torch.stack(found)


def costs(diffusion, pair, x_0, *context):
    """A pair's costs without messages."""
    with pyro.validation_enabled(False):
        return pair_costs(pair.model, pair.guide, (x_0, *context), {})


# The number is that of log p(x_0 | y), datum by datum


@pytest.mark.parametrize("y", [Y, WRONG, Y[:1]], ids=["right", "wrong", "one for all"])
def test_trajectories_weigh_the_conditional_density(y):
    found = importance_bound(exact(), X_0, y, num_particles=7, generator=0)
    torch.testing.assert_close(found.log_weights, -truth(X_0, y.expand(6)).expand(7, 6))


def test_a_wrong_label_costs_what_it_costs():
    right, wrong = (importance_bound(exact(), X_0, y, num_particles=2, generator=0).nats for y in (Y, WRONG))
    assert (wrong > right + 0.1).all()
    assert (terms(exact(), X_0, WRONG).sum(0) > terms(exact(), X_0, Y).sum(0)).all()
    torch.testing.assert_close(terms(exact(), X_0, WRONG).sum(0), truth(X_0, WRONG))


@pytest.mark.parametrize("y", [Y, WRONG, Y[:1]], ids=["right", "wrong", "one for all"])
def test_each_term_of_the_bound_is_that_of_the_label(y):
    """Datum by datum and t by t: neighbours with the same datum and label are draws of their own."""
    diffusion, number = exact(), 400
    found = bound(diffusion, X_0.repeat(number, 1), y if len(y) == 1 else y.repeat(number), generator=0)
    draws = torch.cat([found.prior[None], found.denoising.flip(0), found.reconstruction[None]])
    expected = terms(diffusion, X_0, y.expand(6))
    assert not far(draws.T.reshape(number, 6, T + 1), expected.T)
    assert not far(found.nats.reshape(number, 6), truth(X_0, y.expand(6)))


def test_the_flow_has_the_conditional_density():
    class Told(nn.Module):
        """E[x_0 | x_t, y]."""

        def __init__(self, forward):
            super().__init__()
            self.forward_process, self.means = forward, nn.Parameter(MEANS.clone())

        def forward(self, x_t, t, y):
            (a, b), m = self.forward_process.scales(x_t, t), self.means[y]
            return m + a * V / (a**2 * V + b**2) * (x_t - a * m)

    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(30, 8.0, -10.0))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Told(forward)), (2,))
    for y in (Y, WRONG):
        torch.testing.assert_close(ode_log_prob(diffusion, X_0, y).nats, truth(X_0, y), atol=0.03, rtol=0.005)
    one = ode_log_prob(diffusion, X_0, Y[:1]).nats
    torch.testing.assert_close(one, ode_log_prob(diffusion, X_0, Y[:1].repeat(6)).nats)
    two_rows = 8 * bytes_per_row(diffusion, X_0[:1], Y[:1])  # a flow takes a quarter of what fits
    rows = ode_log_prob(diffusion, X_0, Y, memory_budget=two_rows).nats
    torch.testing.assert_close(rows, ode_log_prob(diffusion, X_0, Y).nats)


@pytest.mark.parametrize("times", [(2, 3, 5), (1, 5), (5,)])
def test_a_chain_of_fewer_steps_is_told_the_same(times):
    sub = exact().subchain(times)
    weights = importance_bound(sub, X_0, Y, num_particles=3, generator=0).log_weights
    torch.testing.assert_close(weights, -truth(X_0, Y).expand(3, 6))
    found = bound(sub, X_0.repeat(300, 1), Y.repeat(300), generator=0).nats
    assert not far(found.reshape(300, 6), truth(X_0, Y))


@every_pair
def test_pyros_own_elbo_has_the_conditional_density(one_step):
    pair = pair_of(exact(), one_step)
    if not one_step:  # exact at every draw, whatever is drawn
        loss = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1).loss
        assert loss(pair.model, pair.guide, X_0, Y) == pytest.approx(float(truth(X_0, Y).sum()))
        assert loss(pair.model, pair.guide, X_0, Y[:1]) == pytest.approx(float(truth(X_0, Y[:1].expand(6)).sum()))
    many = X_0.repeat(40, 1), WRONG.repeat(40)
    for elbo in (TraceMeanField_ELBO(), DiffusionELBO(), DiffusionELBO(5, 1, vectorize_particles=True)):
        draws = repeat(20, lambda elbo=elbo: elbo.loss(pair.model, pair.guide, *many) / 40)
        assert not far(draws, truth(X_0, WRONG).sum())


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, DiffusionELBO])
@every_pair
def test_vectorised_particles_see_each_datum_with_its_label(elbo, one_step):
    """Sites of P particles, and a network that is called with labels of shape (P, B)."""
    pair, shapes = pair_of(exact(), one_step), set()

    class Watched(Exact):
        def forward(self, x_t, t, y):
            shapes.add(tuple(y.shape))
            assert all(torch.equal(row, Y) for row in y.reshape(-1, 6))
            return super().forward(x_t, t, y)

    pair = pair_of(exact(kernel=Watched), one_step)
    loss = elbo(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    loss.loss(pair.model, pair.guide, X_0, Y)
    assert shapes == {(5, 6)} if one_step else (5, 6) in shapes


@every_pair
def test_costs_without_messages_are_those_of_the_labels(one_step):
    """In the mean, datum by datum, and at T = 1 to rounding, where no draw is left but that of x_1."""
    diffusion = exact()
    pair = pair_of(diffusion, one_step)
    for y in (Y, WRONG, Y[:1]):
        x_0, labels = X_0.repeat(500, 1), y if len(y) == 1 else y.repeat(500)
        with torch.no_grad():
            draws = costs(diffusion, pair, x_0, labels).reshape(500, 6)
        if one_step:  # a time of one datum depends on those of the others: the data are not independent
            draws = torch.stack([part.mean(0) for part in draws.split(20)])
        assert not far(draws, truth(X_0, y.expand(6)))


@every_pair
def test_a_chain_of_one_step_without_messages(one_step):
    diffusion = exact(1)
    pair = pair_of(diffusion, one_step)
    with torch.no_grad():
        torch.testing.assert_close(costs(diffusion, pair, X_0, WRONG), truth(X_0, WRONG))
        torch.testing.assert_close(bound(diffusion, X_0, WRONG).nats, truth(X_0, WRONG))


@every_pair
def test_the_gradient_is_that_of_each_datums_own_class(one_step):
    """Of -log N(x_0; m_y, v) in m: a class that no datum has does not move."""
    diffusion = exact()
    pair, some = pair_of(diffusion, one_step), Y != 1

    def draw():
        with pyro.validation_enabled(False):
            data = X_0[some].repeat(30, 1), Y[some].repeat(30)
            loss = DiffusionELBO().differentiable_loss(pair.model, pair.guide, *data) / 30
        return torch.autograd.grad(loss, diffusion.reverse.means)[0]

    draws = repeat(20, draw)
    expected = torch.zeros_like(MEANS)
    expected.index_add_(0, Y[some], (MEANS[Y[some]] - X_0[some]) / V)
    assert not far(draws, expected)
    assert (draws[:, 1] == 0).all()
    assert (expected[[0, 2]] != 0).all()


def test_the_account_of_variances_is_of_the_labels():
    """The means over data and draws of each term, and of the one-step estimates, are in closed form."""
    diffusion, x_0, y = exact(), X_0[:3].repeat(5, 1), WRONG[:3].repeat(5)
    for budget in (2**28, 10_000):
        options = {"num_particles": 1000, "num_pairs": 2, "generator": 0, "memory_budget": budget}
        account = variance_account(diffusion, x_0, y, **options)
        expected = terms(diffusion, X_0[:3], WRONG[:3])[1:].flip(0).mean(1)
        assert ((account.mean - expected).abs() < 5 * account.std / 1000**0.5).all()


def test_a_few_data_are_verified_each_with_its_label():
    """Also where data are repeated, for a batch as large as T."""
    assert verify(exact(), X_0[:2], WRONG[:2], num_repeats=50, generator=0).passed
    assert verify(exact().subchain((1, 2, 5)), X_0[:2], Y[:2], num_repeats=50, generator=0).passed


# Where data are split and joined


def test_labels_stay_with_their_data_in_batches_of_any_size():
    diffusion, x_0, y = exact(), X_0.repeat(20, 1), Y.repeat(20)
    y[::7] = WRONG.repeat(20)[::7]
    whole, options = bound(diffusion, x_0, y, generator=3), {"num_particles": 3, "generator": 3}
    few = bound(diffusion, x_0, y, generator=3, memory_budget=10_000)
    torch.testing.assert_close(few.nats, whole.nats)
    weights = importance_bound(diffusion, x_0, y, memory_budget=10_000, **options).log_weights
    torch.testing.assert_close(weights, -truth(x_0, y).expand(3, -1))
    some = bound(diffusion, x_0, y, generator=3, num_times=2, memory_budget=10_000)
    torch.testing.assert_close(some.nats, bound(diffusion, x_0, y, generator=3, num_times=2).nats)


def loader(*tensors, size=4):
    return DataLoader(TensorDataset(*tensors), batch_size=size)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_loader_of_data_and_labels_is_a_tensor_of_each(size):
    diffusion = exact()
    for estimate in (bound, lambda *args, **options: importance_bound(*args, num_particles=2, **options)):
        of_tensor = estimate(diffusion, X_0, Y, generator=3).nats
        torch.testing.assert_close(estimate(diffusion, loader(X_0, Y, size=size), generator=3).nats, of_tensor)
    lists = [[X_0[i : i + size], Y[i : i + size]] for i in range(0, 6, size)]
    torch.testing.assert_close(bound(diffusion, lists, generator=3).nats, bound(diffusion, X_0, Y, generator=3).nats)
    one = [(X_0[i : i + size], Y[:1]) for i in range(0, 6, size)]
    torch.testing.assert_close(bound(diffusion, one, generator=3).nats, bound(diffusion, X_0, Y[:1], generator=3).nats)


def test_a_shuffled_order_has_the_shuffled_weights():
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    found = importance_bound(exact(), X_0[order], WRONG[order], num_particles=2, generator=0).nats
    torch.testing.assert_close(found, truth(X_0, WRONG)[order])


def test_one_row_for_all_is_that_row_for_each():
    diffusion, one, each = exact(), Y[1:2], Y[1:2].repeat(6)
    for estimate in (
        lambda y: bound(diffusion, X_0, y, generator=1).nats,
        lambda y: importance_bound(diffusion, X_0, y, num_particles=2, generator=1).nats,
        lambda y: AncestralSampler(diffusion)(6, y, generator=1),
        lambda y: variance_account(diffusion, X_0, y, num_pairs=2, num_particles=5, generator=1).mean,
        lambda y: torch.tensor([len(verify(diffusion, X_0, y, num_repeats=10, generator=1).claims)]),
    ):
        torch.testing.assert_close(estimate(one), estimate(each), rtol=0, atol=0)
    for one_step in (False, True):
        pair = pair_of(diffusion, one_step)
        losses = []
        for y in (one, each):
            pyro.set_rng_seed(0)
            losses += [DiffusionELBO().loss(pair.model, pair.guide, X_0, y)]
            with pyro.validation_enabled(False):
                losses += [DiffusionELBO().loss(pair.model, pair.guide, X_0, y)]
        assert losses[:2] == losses[2:]


@pytest.mark.parametrize("times", [range(1, T + 1), (2, 5), (3,)], ids=["whole", "two steps", "one step"])
def test_each_datum_has_the_number_that_it_has_where_all_have_its_label(times):
    """Of a network, in the whole chain and in fewer steps, by every estimate and in samples."""
    diffusion = made().subchain(times)
    for estimate in (
        lambda y: bound(diffusion, X_0.float(), y, generator=1).nats,
        lambda y: importance_bound(diffusion, X_0.float(), y, num_particles=2, generator=1).nats,
        lambda y: ode_log_prob(diffusion, X_0.float(), y, tolerance=1e-3).nats.float(),
        lambda y: AncestralSampler(diffusion)(6, y, generator=1),
    ):
        found, alike = estimate(WRONG), [estimate(torch.tensor([label])) for label in range(3)]
        torch.testing.assert_close(found, torch.stack([alike[label][i] for i, label in enumerate(WRONG.tolist())]))
        assert not torch.allclose(alike[0], alike[1])


# Samples


def test_samples_are_of_their_labels():
    diffusion, y = exact(), torch.arange(3).repeat(1000)
    for draw in (
        lambda: AncestralSampler(diffusion)(3000, y, generator=0),
        lambda: AncestralSampler(diffusion, num_steps=3)(3000, y, generator=0),
        lambda: AncestralSampler(diffusion).trajectory(3000, y, times=(T, 2, 0), generator=0)[-1],
        lambda: diffusion.model(None, y, num_samples=3000).detach(),
    ):
        pyro.set_rng_seed(0)
        samples = draw().reshape(1000, 3, 2)
        assert not far(samples, MEANS)
        assert not far((samples - MEANS) ** 2, V)
    assert AncestralSampler(diffusion)(4, Y[:1]).shape == (4, 2)
    assert diffusion.model(None, Y[:1], num_samples=4).shape == (4, 2)


def test_a_sampler_of_ones_own_is_told_the_label():
    class Means(pyrodiff.Sampler):
        def step(self, x_t, t, y):
            return self.chain.model.kernel(x_t, t, y).mean

        def last(self, x_1, t, y):
            return self.step(x_1, t, y)

    samples = Means(exact(200))(6, Y, generator=0)
    assert ((samples - MEANS[Y]).abs() < 4 * V.sqrt()).all()
    again = Means(exact(200))(6, WRONG, generator=0)
    assert (samples != again).all()


def test_a_compiled_sampler_has_the_draws_of_the_labels(interpreted):
    net = of_network(Told((2,), classes=3))
    plain, compiled = AncestralSampler(net), AncestralSampler(net, compile=True)
    for y in (Y, WRONG, Y[:1]):
        torch.testing.assert_close(compiled(6, y, generator=2), plain(6, y, generator=2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(6, Y, generator=2), plain(6, WRONG, generator=2))
    assert len(interpreted) == 2  # one for rows, and one for a row


# Training


class Told(nn.Module):
    """A network of any context: each is embedded, or mapped, to the shape of a datum, and added."""

    def __init__(self, event_shape, classes=0, vector=0, picture=False, outputs=None):
        super().__init__()
        self.event_shape, D = event_shape, math.prod(event_shape)
        self.outputs = outputs
        self.layer = nn.Linear(D, D * (outputs or 1))
        self.label = nn.Embedding(classes, D) if classes else None
        self.vector = nn.Linear(vector, D) if vector else None
        self.picture = nn.Parameter(torch.randn(())) if picture else None

    def forward(self, x_t, t, *context):
        context, batch = list(context), x_t.shape[: x_t.dim() - len(self.event_shape)]
        t = torch.as_tensor(t, device=x_t.device).expand(batch)
        h = x_t.flatten(len(batch)) + t[..., None] / 10
        for part in (self.label, self.vector, self.picture):
            if part is not None:
                y = context.pop(0)
                assert y.shape[: len(batch)] == batch
                h = h + (part * y.flatten(len(batch)) if part is self.picture else part(y))
        assert not context
        out = self.layer(h.tanh())
        return out.reshape(x_t.shape if self.outputs is None else (*x_t.shape, self.outputs))


def of_network(network, event_shape=(2,), dtype=torch.float32):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    denoiser = pyrodiff.VelocityPrediction(network, forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape).to(dtype)


def made(**options):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return of_network(Told((2,), **({"classes": 3} | options)))


@every_pair
def test_training_moves_the_labels_of_the_batch_and_no_others(one_step):
    diffusion = made()
    pair, table = pair_of(diffusion, one_step), diffusion.reverse.denoiser.network.label.weight
    svi = SVI(pair.model, pair.guide, lambda ps: torch.optim.SGD(ps, lr=0.1), DiffusionELBO())
    for label in (1, 2, 1, 0, 0):
        before = table.detach().clone()
        svi.step(X_0.float(), torch.full((6,), label))
        moved = (table != before).any(1)
        assert moved.tolist() == [k == label for k in range(3)]


@every_pair
def test_a_compiled_step_is_told_the_labels_of_its_own_batch(one_step, interpreted):
    """One graph for all labels, with the losses and parameters of steps that are not compiled."""
    found = []
    for compile in (False, True):
        pyro.set_rng_seed(4)
        diffusion = made()
        pair = pair_of(diffusion, one_step)
        svi = SVI(pair.model, pair.guide, lambda ps: torch.optim.SGD(ps, lr=0.05), DiffusionELBO(), compile=compile)
        losses = []
        for k in range(6):
            table = diffusion.reverse.denoiser.network.label.weight
            before = table.detach().clone()
            pyro.set_rng_seed(k)
            losses.append(float(svi.step(X_0.float(), torch.full((6,), k % 3))))
            assert (table != before).any(1).tolist() == [j == k % 3 for j in range(3)]
        found.append((losses, values(diffusion)))
    assert len(interpreted) == 1
    torch.testing.assert_close(found[1], found[0])


@every_pair
def test_a_resumed_run_has_the_labels_bit_for_bit(one_step, tmp_path):
    def run():
        diffusion = made()
        pair = pair_of(diffusion, one_step)
        return diffusion, SVI(pair.model, pair.guide, adam, DiffusionELBO(), accumulate=2)

    def steps(svi, first, last):
        return [float(svi.step(X_0.float().roll(k, 0), Y.roll(2 * k))) for k in range(first, last)]

    pyro.set_rng_seed(7)
    diffusion, svi = run()
    steps(svi, 0, 4)
    pyrodiff.checkpoints.save(tmp_path / "run.pt", svi)
    left = steps(svi, 4, 8)
    other, again = run()
    pyro.set_rng_seed(8)
    pyrodiff.checkpoints.restore(tmp_path / "run.pt", again)
    assert steps(again, 4, 8) == left
    assert same(values(diffusion), values(other))


@every_pair
def test_accumulated_batches_have_each_its_labels(one_step):
    """At T = 1 nothing but x_1 is drawn, of which the exact kernels keep nothing: two halves are the whole."""
    steps = []
    for batches in ([(X_0, Y)], [(X_0[:3], Y[:3]), (X_0[3:], Y[3:])]):
        diffusion = exact(1)
        pair = pair_of(diffusion, one_step)
        make = lambda ps: torch.optim.SGD(ps, lr=0.01)  # noqa: E731
        svi = SVI(pair.model, pair.guide, make, DiffusionELBO(), accumulate=len(batches))
        for x_0, y in batches:
            svi.step(x_0, y)
        steps.append(values(diffusion)[0])
    torch.testing.assert_close(*steps)
    expected = MEANS.clone().index_add_(0, Y, 0.01 * (X_0 - MEANS[Y]) / V)
    torch.testing.assert_close(steps[0], expected)


@every_pair
def test_the_loss_without_a_step_is_that_of_the_labels(one_step):
    pair = pair_of(exact(1), one_step)
    svi = SVI(pair.model, pair.guide, still, DiffusionELBO())
    for y in (Y, WRONG):
        assert float(svi.evaluate_loss(X_0, y)) == pytest.approx(float(truth(X_0, y).sum()))
        assert float(svi.step(X_0, y)) == pytest.approx(float(truth(X_0, y).sum()))


# Every kind of context, and every kind of model

V_0 = torch.tensor(
    [[0.5, -1.0, 0.1], [2.0, 0.3, -0.4], [-0.7, 1.1, 0.9], [0.0, 0.4, 1.0], [1.5, 1.5, 0.2], [-2.0, 0.9, 0.0]]
)
CONTEXTS = {
    "labels": ({"classes": 3}, (Y,)),
    "int32 labels": ({"classes": 3}, (Y.int(),)),
    "vectors": ({"vector": 3}, (V_0,)),
    "pictures": ({"picture": True}, (V_0[:, :1, None].expand(6, 2, 2),)),
    "labels and vectors": ({"classes": 3, "vector": 3}, (Y, V_0)),
    "labels, one vector and pictures": (
        {"classes": 3, "vector": 3, "picture": True},
        (Y, V_0[:1], torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(0))),
    ),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_every_way_in_takes_every_context(kind):
    options, context = CONTEXTS[kind]
    torch.manual_seed(0)
    diffusion = of_network(Told((2, 2), **options), (2, 2))
    x_0 = torch.randn(6, 2, 2) + 0.3
    for pair in (diffusion, diffusion.one_step(), diffusion.subchain((1, 4)).one_step()):
        svi = SVI(pair.model, pair.guide, adam, DiffusionELBO())
        assert all(math.isfinite(svi.step(x_0, *context)) for _ in range(2))
        poutine.trace(pair.model).get_trace(x_0, *context)
        poutine.trace(pair.guide).get_trace(x_0, *context)
    for chain in (diffusion, diffusion.subchain((1, 3, 5))):
        found = bound(chain, x_0, *context, generator=0).nats
        batches = [
            tuple(values[i : i + 2] if len(values) > 1 else values for values in (x_0, *context)) for i in (0, 2, 4)
        ]
        torch.testing.assert_close(bound(chain, batches, generator=0).nats, found)
        torch.testing.assert_close(bound(chain, x_0, *context, generator=0, memory_budget=40_000).nats, found)
        assert importance_bound(chain, x_0, *context, num_particles=2, generator=0).nats.isfinite().all()
        assert verify(chain, x_0, *context, num_repeats=10, num_particles=2, generator=0).passed
        assert AncestralSampler(chain)(6, *context).isfinite().all()
        assert AncestralSampler(chain).trajectory(6, *context).shape[1:] == (6, 2, 2)
        assert chain.model(None, *context, num_samples=6).shape == (6, 2, 2)
    assert ode_log_prob(diffusion, x_0, *context, tolerance=1e-1).nats.isfinite().all()
    assert variance_account(diffusion, x_0, *context, num_pairs=2, num_particles=4, batch_size=4).mean.isfinite().all()


def test_levels_and_bits_take_a_label():
    """Levels by their log probabilities, bits by their log odds: with the label of another class, another number."""
    k = torch.tensor([[0, 3], [4, 1], [2, 4], [1, 1], [0, 0], [3, 2]])
    gaussian = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    binomial = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T))
    torch.manual_seed(0)
    levels = pyrodiff.LevelPrediction(Told((2,), classes=3, outputs=5), gaussian, 5)
    logits = pyrodiff.LogitPrediction(Told((2,), classes=3), binomial)
    models = [
        (pyrodiff.GaussianReverse(gaussian, levels), pyrodiff.DiscretizedDecoder(5), gaussian),
        (pyrodiff.GaussianReverse(gaussian, levels), pyrodiff.SoftmaxDecoder(gaussian, 5), gaussian),
        (pyrodiff.BinomialReverse(binomial, logits), None, binomial),
        (pyrodiff.D3PMReverse(binomial, logits), None, binomial),
    ]
    for reverse, decoder, forward in models:
        diffusion = pyrodiff.Diffusion(forward, reverse, (2,), decoder)
        x_0 = (k > 1).float() if forward is binomial else pyrodiff.from_levels(k, levels=5)
        numbers = [bound(diffusion, x_0, y, generator=0) for y in (Y, WRONG)]
        assert (numbers[0].nats != numbers[1].nats).all()
        assert numbers[0].levels == (2 if forward is binomial else 5)
        for i in (0, 4):  # the label of one datum is no matter to another
            y = Y.clone()
            y[i] = WRONG[i]
            changed = bound(diffusion, x_0, y, generator=0).nats != numbers[0].nats
            assert changed.tolist() == [j == i for j in range(6)]
        for chain in (diffusion, diffusion.subchain((2, 5))):
            pair = chain.one_step()
            svi = SVI(pair.model, pair.guide, adam, DiffusionELBO())
            assert all(math.isfinite(svi.step(x_0, Y)) for _ in range(2))
            assert AncestralSampler(chain)(6, Y).shape == (6, 2)
            assert importance_bound(chain, x_0, Y, num_particles=2).nats.isfinite().all()
            assert verify(chain, x_0, Y, num_repeats=10, num_particles=2, generator=0).passed


class OneBit(nn.Module):
    """p(x_{t-1} | x_t, y) of one bit: a table of log odds, with shape (classes, T + 1, 2)."""

    def __init__(self, num_steps):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.logits = nn.Parameter(torch.randn(3, num_steps + 1, 2, dtype=torch.float64, generator=generator))

    def forward(self, x_t, t, y):
        return dist.Bernoulli(logits=self.logits[y, t, x_t.long()])


def test_bits_with_a_label_are_enumerated_to_rounding():
    """The sum over all paths, by hand, of each datum with its own label."""
    betas, rate = [0.2, 0.3, 0.6], 0.3
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate=rate)
    diffusion = pyrodiff.Diffusion(forward, OneBit(3), ())
    x_0, y = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).double(), torch.tensor([0, 0, 1, 2, 2])
    odds = diffusion.reverse.logits.detach()

    def step(x, x_next, keep):
        return keep * (x == x_next) + (1 - keep) * (rate if x_next else 1 - rate)

    def log_p(label, t, x_t, x):
        p = float(odds[label, t, x_t].sigmoid())
        return math.log(p if x else 1 - p)

    expected = 0.0
    for bit, label in zip(x_0.int().tolist(), y.tolist(), strict=True):
        for path in itertools.product((0, 1), repeat=3):
            states = (bit, *path)
            q = math.prod(step(states[t - 1], states[t], 1 - betas[t - 1]) for t in (1, 2, 3))
            log_joint = math.log(rate if states[3] else 1 - rate)
            log_joint += sum(log_p(label, t, states[t], states[t - 1]) for t in (1, 2, 3))
            expected -= q * (log_joint - math.log(q))
    guide, elbo = config_enumerate(diffusion.guide, "parallel"), TraceEnum_ELBO(max_plate_nesting=1)
    assert elbo.loss(diffusion.model, guide, x_0, y) == pytest.approx(expected, rel=1e-9)
    draws = bound(diffusion, x_0.repeat(400), y.repeat(400), generator=0).nats.reshape(400, 5).sum(1)
    assert not far(draws, expected)


def test_meta_tensors_take_a_label():
    diffusion = made().to("meta")
    x_0, y = X_0.float().to("meta"), Y.to("meta")
    pair = diffusion.one_step()
    with pyro.validation_enabled(False):
        assert DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0, y).shape == ()
        assert diffusion.model(None, y, num_samples=6).is_meta
    assert bound(diffusion, x_0, y, generator=0).nats.shape == (6,)
    assert AncestralSampler(diffusion)(6, y[:1]).is_meta
    with pytest.raises(ValueError, match="context must be on the device of the data, meta"):
        diffusion.model(x_0, Y)


class Random(PyroModule):
    """An exact kernel whose mean is off by a random weight."""

    def __init__(self, schedule):
        super().__init__()
        self.exact = Exact(schedule)
        self.off = PyroSample(dist.Normal(torch.zeros(2).double(), 0.5).to_event(1))

    def forward(self, x_t, t, y):
        law = self.exact(x_t, t, y).base_dist
        return dist.Normal(law.loc + self.off, law.scale).to_event(1)


def test_random_weights_and_a_label():
    """The weight 0 has the density of the label; the KL of the weights is a row of its own."""
    diffusion, seen = exact(kernel=Random), []

    def guide(x_0, y):
        seen.append((x_0 is None or torch.equal(x_0, X_0), y))
        pyro.sample("reverse.off", dist.Normal(torch.zeros(2).double(), 1e-12).to_event(1))

    found = importance_bound(diffusion, X_0, Y, num_particles=3, guide=guide)
    torch.testing.assert_close(found.log_weights, -truth(X_0, Y).expand(3, 6))
    assert bound(diffusion, X_0, Y, guide=guide).global_kl > 50
    assert AncestralSampler(diffusion, guide=guide)(6, Y).shape == (6, 2)
    assert verify(diffusion, X_0, Y, num_repeats=10, guide=guide, generator=0).passed
    assert all(at and torch.equal(y, Y) for at, y in seen)
    for pair in (diffusion, diffusion.one_step()):

        def whole(x_0, y, pair=pair):
            pyro.sample("reverse.off", dist.Normal(torch.zeros(2).double(), 0.5).to_event(1))
            pair.guide(x_0, y)

        with pyro.validation_enabled(True):
            terms = DiffusionELBO().terms(pair.model, whole, X_0, Y)
        assert float(terms["reverse.off"]) == 0
    assert bound(diffusion, X_0, Y, guide=prior_of_weights(diffusion)).global_kl.shape == ()


# Plates that repeat the programs


def test_predictions_of_many_in_parallel_are_of_the_labels():
    diffusion = exact()
    found = Predictive(diffusion.model, num_samples=800, parallel=True)(None, Y, num_samples=6)["x_0"]
    assert found.shape == (800, 6, 2)
    assert not far(found, MEANS[Y])


# What is refused

NO_TENSORS = {
    "a list": ([0, 1, 2, 0, 1, 2], r"context must be tensors, but context\[0\] is \[0, 1"),
    "None": (None, r"context must be tensors, but context\[0\] is None"),
    "numpy": (Y.numpy(), r"context must be tensors, but context\[0\] is a ndarray: give torch.from_numpy of it"),
    "rows": (Y[:4], r"first dimension of 6, as many as there are data, or of 1, .* \(4,\)"),
    "a number of its own": (torch.tensor(2), r"first dimension of 6, .* \(\)"),
}
WAYS = {
    "bound": lambda d, x, *y: bound(d, x, *y),
    "importance_bound": lambda d, x, *y: importance_bound(d, x, *y, num_particles=2),
    "verify": lambda d, x, *y: verify(d, x, *y),
    "variance_account": lambda d, x, *y: variance_account(d, x, *y),
    "model": lambda d, x, *y: d.model(x, *y),
    "one step": lambda d, x, *y: d.one_step().model(x, *y),
    "generation": lambda d, x, *y: d.model(None, *y, num_samples=6),
    "sampler": lambda d, x, *y: AncestralSampler(d)(6, *y),
    "trajectory": lambda d, x, *y: AncestralSampler(d).trajectory(6, *y),
    "SVI": lambda d, x, *y: SVI(d.model, d.guide, adam, DiffusionELBO()).step(x, *y),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_is_no_context_is_refused(way, kind):
    value, message = NO_TENSORS[kind]
    with pytest.raises(ValueError, match=message):
        WAYS[way](exact(), X_0, value)
    with pytest.raises(ValueError, match=message.replace("[0\\]", "[1\\]")):
        WAYS[way](exact(), X_0, Y, value)


def test_what_is_no_context_of_a_flow_is_refused():
    diffusion = of_network(Told((2,), classes=3), dtype=torch.float64)
    for value, message in NO_TENSORS.values():
        with pytest.raises(ValueError, match=message):
            ode_log_prob(diffusion, X_0, value)


@pytest.mark.parametrize(
    ("call", "keyword"),
    [
        (lambda d: bound(d, X_0, 4), "num_particles=4"),
        (lambda d: bound(d, X_0, Y, 4), "num_particles=4"),
        (lambda d: bound(d, loader(X_0), 4), "num_particles=4"),
        (lambda d: importance_bound(d, X_0, 4), "num_particles=4"),
        (lambda d: importance_bound(d, X_0, Y, 4), "num_particles=4"),
        (lambda d: importance_bound(d, loader(X_0), 4), "num_particles=4"),
        (lambda d: ode_log_prob(of_network(Told((2,), classes=3), dtype=torch.float64), X_0, 0), "num_probes=0"),
        (lambda d: verify(d, X_0, 20), "num_repeats=20"),
        (lambda d: variance_account(d, X_0, 20), "num_particles=20"),
        (lambda d: AncestralSampler(d)(3, 7), "generator=7"),
        (lambda d: AncestralSampler(d).trajectory(3, 7), "times=7"),
    ],
)
def test_an_option_in_the_place_of_a_context_is_refused_by_its_keyword(call, keyword):
    with pytest.raises(ValueError, match=f"options are given by keyword, {keyword} say"):
        call(exact())


def test_other_options_in_the_place_of_a_context_are_refused():
    with pytest.raises(ValueError, match=r"context must be tensors, but context\[0\] is \(5, 0\)"):
        AncestralSampler(exact()).trajectory(3, (5, 0))
    with pytest.raises(ValueError, match="context must be tensors, but context"):
        AncestralSampler(exact())(3, torch.Generator())
    with pytest.raises(ValueError, match="num_samples must be given by keyword, num_samples=5"):
        exact().model(5)


UNTOLD = {**WAYS, "loader": lambda d, x, *y: bound(d, loader(x, *y))}


@pytest.mark.parametrize("way", UNTOLD)
def test_a_missing_context_is_an_error(way):
    if way == "verify":  # a program that raises is a claim that fails
        found = verify(exact(), X_0)
        assert not found.passed
        assert "give its context after the data" in str(found)
        return
    with pytest.raises(ValueError, match=r"give its context after the data: svi.step\(x_0, y\), bound\(diffusion"):
        UNTOLD[way](exact(), X_0)


@pytest.mark.parametrize("way", UNTOLD)
@pytest.mark.parametrize("part", ["reverse", "denoiser", "network"])
def test_a_context_that_nobody_takes_is_an_error(way, part):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2).double()

        def forward(self, x_t, t):
            out = self.layer(x_t)
            return dist.Normal(out, torch.ones_like(out)).to_event(1) if part == "reverse" else out

    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    reverse = Deaf()
    if part != "reverse":
        reverse = pyrodiff.GaussianReverse(
            forward, Deaf() if part == "denoiser" else pyrodiff.DataPrediction(Deaf(), forward)
        )
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,))
    if way == "verify":
        assert f"{part} must take what it is called with" in str(verify(diffusion, X_0, Y))
        return
    with pytest.raises(ValueError, match=rf"{part} must take .* 1 tensor of context.* drop them: svi.step\(x_0\)"):
        UNTOLD[way](diffusion, X_0, Y)


def test_a_context_beside_a_loader_is_refused():
    with pytest.raises(ValueError, match="context must come from the loader"):
        bound(exact(), loader(X_0), Y)
    with pytest.raises(ValueError, match=r"first dimension of 3, .* \(2,\) \(in batch 1 of the loader\)"):
        bound(exact(), [(X_0[:3], Y[:3]), (X_0[3:], Y[:2])])


def test_a_label_that_the_network_does_not_know_is_not_taken_for_another():
    with pytest.raises(IndexError):
        bound(exact(), X_0, Y + 1)


# States of any dtype: categories

K, LETTERS = 3, torch.tensor([0, 2, 1])
KEEP = [0.7, 0.5, 0.2]


class Categories(pyrodiff.Forward):
    """Each category is kept, or drawn anew of K alike."""

    support, is_integer = constraints.integer_interval(0, K - 1), True

    def matrix(self, t, s):
        """q(x_t | x_s), with shape (*t.shape, K, K)."""
        keep = torch.cat([torch.ones(1), torch.tensor(KEEP).double().cumprod(0)])
        keep = (keep[t] / keep[s])[..., None, None]
        return keep * torch.eye(K) + (1 - keep) / K

    def of(self, matrix, x):
        """Rows of a matrix for each category."""
        matrix = matrix.reshape(*matrix.shape[:-2], *(1,) * (x.dim() - matrix.dim() + 2), K, K).expand(*x.shape, K, K)
        return matrix.gather(-2, x.long()[..., None, None].expand(*x.shape, 1, K)).squeeze(-2)

    def transition(self, x_s, t, s=None):
        s = t - 1 if s is None else torch.as_tensor(s)
        law = dist.Categorical(self.of(self.matrix(torch.as_tensor(t), s), x_s))
        return law.to_event(x_s.dim() - max(torch.as_tensor(t).dim(), 1))

    def posterior(self, x_t, x_0, t, s=None):
        t = torch.as_tensor(t)
        s = t - 1 if s is None else torch.as_tensor(s)
        after = self.of(self.matrix(t, s).transpose(-1, -2), x_t)
        law = dist.Categorical(after * self.of(self.matrix(s, torch.zeros_like(s)), x_0))
        return law.to_event(x_t.dim() - max(t.dim(), 1))

    def prior(self, event_shape, dtype=None, device=None):
        return dist.Categorical(torch.ones(*event_shape, K).double()).to_event(len(event_shape))

    def subchain(self, times):
        raise AssertionError


class Letters(nn.Module):
    """p(x_{t-1} | x_t, y): a table of logits, with shape (classes, T + 1, K, K)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.logits = nn.Parameter(torch.randn(2, 4, K, K, dtype=torch.float64, generator=generator))

    def forward(self, x_t, t, y=None):
        t = torch.as_tensor(t).expand(x_t.shape[:1])
        y = torch.zeros_like(t) if y is None else y
        return dist.Categorical(logits=self.logits[y[:, None], t[:, None], x_t]).to_event(1)


def categorical():
    forward = Categories(pyrodiff.BetaSchedule([0.1, 0.2, 0.3]))
    return pyrodiff.Diffusion(forward, Letters(), (1,))


def paths(diffusion, x_0, label):
    """log p(x_0:3) and q(x_1:3 | x_0) of every path, by the definitions."""
    log_p = diffusion.reverse.logits.detach().log_softmax(-1)[label].tolist()

    def q(i, j, t):
        return KEEP[t - 1] * (i == j) + (1 - KEEP[t - 1]) / K

    for rest in itertools.product(range(K), repeat=3):
        x = (x_0, *rest)
        log_joint = -math.log(K) + sum(log_p[t][x[t]][x[t - 1]] for t in (1, 2, 3))
        yield log_joint, math.prod(q(x[t - 1], x[t], t) for t in (1, 2, 3))


def log_likelihood(diffusion, x_0, label=0):
    return math.log(sum(math.exp(log_p) for log_p, _ in paths(diffusion, x_0, label)))


def enumerated(diffusion, x_0, label=0):
    return sum(q * (math.log(q) - log_p) for log_p, q in paths(diffusion, x_0, label))


@pytest.mark.parametrize("y", [None, torch.tensor([0, 1, 1])], ids=["alone", "with labels"])
def test_categories_have_the_bound_and_the_likelihood_of_all_paths(y):
    diffusion, x_0, number = categorical(), LETTERS[:, None], 1500
    labels = [0, 0, 0] if y is None else y.tolist()
    context = () if y is None else (y.repeat(number),)
    found = bound(diffusion, x_0.repeat(number, 1), *context, generator=0)
    expected = [enumerated(diffusion, *pair) for pair in zip(LETTERS.tolist(), labels, strict=True)]
    assert found.levels == K
    assert "probability, of 3 levels" in found.convention
    assert not far(found.nats.reshape(number, 3).double(), torch.tensor(expected).double(), errors=5)
    context = () if y is None else (y,)
    tight = importance_bound(diffusion, x_0, *context, num_particles=4000, generator=0)
    truth = [-log_likelihood(diffusion, *pair) for pair in zip(LETTERS.tolist(), labels, strict=True)]
    weights = (tight.log_weights.double() + torch.tensor(truth).double()).exp()  # their mean is 1
    assert not far(weights, torch.ones(3).double())
    assert (torch.tensor(expected) > torch.tensor(truth)).all()


@every_pair
def test_categories_are_trained(one_step):
    """The losses are those of all paths in the mean, by messages and without; a step changes what it should."""
    diffusion, x_0, y = categorical(), LETTERS[:, None].repeat(40, 1), torch.tensor([0, 1, 1]).repeat(40)
    pair = pair_of(diffusion, one_step)
    expected = 40 * sum(enumerated(diffusion, *one) for one in zip(LETTERS.tolist(), [0, 1, 1], strict=True))
    for validate in (True, False):
        with pyro.validation_enabled(validate):
            draws = repeat(20, lambda: DiffusionELBO().loss(pair.model, pair.guide, x_0, y))
        assert not far(draws, expected)
    assert costs(diffusion, pair, x_0, y).shape == (120,)
    svi = SVI(pair.model, pair.guide, lambda ps: torch.optim.SGD(ps, lr=0.01), DiffusionELBO())
    before = diffusion.reverse.logits.detach().clone()
    for _ in range(3):
        svi.step(x_0, torch.ones(1, dtype=torch.long))
    moved = (diffusion.reverse.logits != before).flatten(1).any(1)
    assert moved.tolist() == [False, True]


def test_categories_are_sampled_verified_and_accounted_for():
    diffusion = categorical()
    samples = AncestralSampler(diffusion)(6000, torch.ones(1, dtype=torch.long), generator=0)
    assert samples.dtype == torch.long
    assert samples.shape == (6000, 1)
    expected = torch.tensor([math.exp(log_likelihood(diffusion, k, 1)) for k in range(K)]).double()
    assert expected.sum() == pytest.approx(1)
    assert not far(nn.functional.one_hot(samples[:, 0], K).double(), expected)
    states = AncestralSampler(diffusion).trajectory(5)
    assert states.dtype == torch.long
    assert states.shape == (4, 5, 1)
    assert diffusion.model(num_samples=5).dtype == torch.long
    assert diffusion.model.dtype() == torch.long  # what the prior is asked for
    x_0 = LETTERS[:, None]
    assert verify(diffusion, x_0, num_repeats=30, generator=0).passed
    account = variance_account(diffusion, x_0, num_pairs=5, num_particles=500, generator=0)
    mean = sum(enumerated(diffusion, x) for x in LETTERS.tolist()) / 3
    prior = bound(diffusion, x_0).prior.mean()
    error = float((account.std**2).sum().sqrt()) / 500**0.5
    assert abs(float(account.mean.sum() + prior) - mean) < 5 * error
    assert (Trace_ELBO(num_particles=3, vectorize_particles=False).loss(diffusion.model, diffusion.guide, x_0)) > 0


def test_how_many_values_a_state_may_take():
    class Counts(Categories):
        support = constraints.nonnegative_integer

    schedule = pyrodiff.BetaSchedule([0.1, 0.2, 0.3])
    assert Categories(schedule).levels == K
    assert Counts(schedule).levels == math.inf
    assert pyrodiff.BinomialForward(schedule).levels == 2
    assert pyrodiff.GaussianForward(schedule).levels is None
    found = bound(pyrodiff.Diffusion(Counts(schedule), Letters(), (1,)), LETTERS[:, None])
    assert found.levels == math.inf
    assert "p is a probability, of countably many values a dimension" in str(found)


def test_infinitely_many_values_are_kept_in_a_file(tmp_path):
    class Counts(Categories):
        support = constraints.nonnegative_integer

    diffusion = pyrodiff.Diffusion(Counts(pyrodiff.BetaSchedule([0.1, 0.2, 0.3])), Letters(), (1,))
    found = bound(diffusion, LETTERS[:, None])
    found.save(tmp_path / "bound.npz")
    assert pyrodiff.Bound.load(tmp_path / "bound.npz").levels == math.inf
    with pytest.raises(ValueError, match="levels must be None"):
        found.rescaled(1.0)


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (LETTERS[:, None].float(), r"x_0 must have dtype torch.long, .* torch.float32: give x_0.long\(\)"),
        (LETTERS[:, None] > 0, "x_0 must have dtype torch.long, .* torch.bool"),
        (LETTERS[:, None] + 1, "x_0 must be in .* everywhere, but 1 of its 3 values are not, the first 3"),
        (-LETTERS[:, None], "x_0 must be in .* everywhere, but 2 of its 3"),
        (LETTERS, r"x_0 must have shape \(B, 1\)"),
    ],
)
def test_what_is_no_category_is_refused(x_0, message):
    diffusion = categorical()
    for call in (bound, lambda d, x: d.model(x), lambda d, x: d.guide(x), lambda d, x: d.one_step().model(x)):
        with pytest.raises(ValueError, match=message):
            call(diffusion, x_0)


def test_integers_of_a_gaussian_process_are_refused():
    with pytest.raises(ValueError, match="x_0 must have a floating dtype"):
        bound(exact(), torch.ones(3, 2, dtype=torch.long), Y[:3])


class Counted(nn.Module):
    """A decoder whose law is discrete, and which does not say so."""

    def forward(self, kernel, x_1):
        return dist.Poisson(kernel.mean.exp()).to_event(1)


@pytest.mark.parametrize(
    "estimate", [bound, lambda *args: importance_bound(*args, num_particles=2), ode_log_prob], ids=["", "K", "ODE"]
)
def test_a_discrete_law_that_does_not_say_so_is_refused(estimate):
    diffusion = of_network(Told((2,)), dtype=torch.float64)
    diffusion = pyrodiff.Diffusion(diffusion.forward_process, diffusion.reverse, (2,), Counted())
    with pytest.raises(ValueError, match=r"decoder must say .* an attribute levels, .*Counted says nothing"):
        estimate(diffusion, torch.ones(3, 2).double())
    diffusion.model.decoder.levels = math.inf
    assert estimate(diffusion, torch.ones(3, 2).double()).levels == math.inf


# Several processes: tests/test_paired_draws.py asks two for these


def shared(sharded):
    x_0, y = X_0.repeat(10, 1), WRONG.repeat(10)
    options = {"generator": 5, "sharded": sharded}
    return {
        "labels": bound(exact(), x_0, y, **options).nats,
        "one label": bound(exact(), x_0, y[:1], num_particles=2, **options).nats,
        "loader": bound(exact(), loader(x_0, y, size=17), **options).nats,
        "some times": bound(exact(), x_0, y, num_times=2, memory_budget=20_000, **options).nats,
    }


def step_of(rank):
    """A step at T = 1, of one half of the data or, without a rank, of all."""
    diffusion, part = exact(1), slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    svi = SVI(diffusion.model, diffusion.guide, lambda ps: torch.optim.SGD(ps, lr=0.01), DiffusionELBO())
    loss = svi.step(X_0[part], Y[part])
    return loss, diffusion.reverse.means.detach()
