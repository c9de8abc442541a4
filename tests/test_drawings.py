"""How t is drawn: by given or learned probabilities, evenly over the batch, without bias, and with less variance."""

import io
import math
from collections import deque

import pyro
import pyro.distributions as dist
import pytest
import torch
from computing import (
    DRAWINGS,
    KNOWN,
    Apart,
    concrete,
    drawn,
    known_diffusion,
    learned,
    make,
)
from exact import bit_diffusion, differ, far, gradient, repeat
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from test_one_step import step_of

import pyrodiff
from pyrodiff import SVI, DiffusionELBO, Drawing, ImportanceDrawing, LossSecondMoment, UniformDrawing

GIVEN = {
    "one": [1.0],
    "even": [0.25] * 4,
    "uneven": [0.5, 0.2, 0.3],
    "nearly nothing": [1e-9, 0.7, 1e-9, 0.3 - 2e-9],
    "falling": [2.0**-k for k in range(1, 12)] + [2.0**-11],
    "many": [2 * t / (300 * 301) for t in range(1, 301)],
}
given = pytest.mark.parametrize("p", GIVEN.values(), ids=GIVEN)
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


# What all share


def test_every_public_drawing_is_among_those_that_are_tested():
    assert concrete(Drawing) <= {type(make(3)).__name__ for make, _ in DRAWINGS.values()}


@every_drawing
@pytest.mark.parametrize(("B", "T"), [(1, 4), (7, 5), (3, 10)])
def test_every_datum_sees_every_time_by_its_probability(name, B, T):
    """And is told that probability; the lowest u is of t = 1, the highest of T."""
    drawing, p = (part(T) for part in DRAWINGS[name])
    u = torch.stack([drawing.uniforms(torch.zeros(B)).sample() for _ in range(2000)])
    t, probability = drawing(u, T)
    assert t.shape == probability.shape == (2000, B)
    torch.testing.assert_close(probability.double(), p[t - 1], rtol=1e-6, atol=0)
    assert not far((t[..., None] == torch.arange(1, T + 1)).double(), p)


@every_drawing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_stay_in_range_for_uniforms_at_the_ends(name, dtype):
    u = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    for T in (1, 3, 1000):
        drawing, p = (part(T) for part in DRAWINGS[name])
        t, probability = drawing(u, T)
        assert t.tolist() == [1, T]
        assert (t.dtype, probability.dtype) == (torch.long, dtype)
        assert probability.tolist() == pytest.approx(p[t - 1].tolist())
    if name in ("uniform", "low discrepancy"):
        assert 10**6 - 1 <= drawing(u, 10**6)[0].tolist()[1] <= 10**6  # whose last part is less than float32's steps


@pytest.mark.parametrize("B", [1, 7, 64])
@pytest.mark.parametrize("name", [name for name in DRAWINGS if name not in ("uniform", "importance, apart")])
def test_those_that_are_spread_see_each_time_as_often_as_its_probability_says(name, B):
    """Evenly spread points fall into an interval of length p floor or ceil of B p times."""
    drawing, p = (part(10) for part in DRAWINGS[name])
    for _ in range(30):
        counts = torch.bincount(drawn(drawing, torch.zeros(B).double(), 10)[0], minlength=11)[1:]
        assert ((counts >= (B * p - 1e-6).floor()) & (counts <= (B * p + 1e-6).ceil())).all()


# One by one


@given
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (5, 8)])
def test_a_batch_has_each_time_as_often_as_its_probability_says(p, shape):
    """Evenly spread points fall into an interval of length p floor or ceil of B p times."""
    drawing, B = ImportanceDrawing(p), math.prod(shape)
    exact = B * torch.tensor(p, dtype=torch.float64)
    for _ in range(30):
        t, probability = drawn(drawing, torch.zeros(shape, dtype=torch.float64), len(p))
        assert t.shape == probability.shape == shape
        assert (t.dtype, probability.dtype) == (torch.long, torch.float64)
        assert probability.flatten().tolist() == pytest.approx([p[time - 1] for time in t.flatten().tolist()])
        counts = torch.bincount(t.flatten(), minlength=len(p) + 1)[1:]
        assert len(counts) == len(p)
        assert ((counts >= (exact - 1e-6).floor()) & (counts <= (exact + 1e-6).ceil())).all()


def test_where_the_counts_are_whole_they_are_exact():
    drawing = ImportanceDrawing([0.5, 0.2, 0.3])
    for _ in range(200):
        t, _ = drawn(drawing, torch.zeros(20), 3)
        assert torch.bincount(t).tolist() == [0, 10, 4, 6]


@given
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_of_any_probabilities_stay_in_range_for_uniforms_at_the_ends(p, dtype):
    last = 1 - torch.finfo(dtype).eps / 2
    t, probability = ImportanceDrawing(p)(torch.tensor([0.0, last], dtype=dtype), len(p))
    assert t.tolist()[0] == 1
    assert t.tolist()[1] == len(p)
    assert probability.dtype == dtype
    assert probability.tolist() == pytest.approx([p[0], p[-1]])


def test_a_uniform_belongs_to_the_interval_that_it_begins():
    """Half-open intervals [c_{t-1}, c_t), as u is in [0, 1)."""
    p = [0.25, 0.5, 0.125, 0.125]
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.874, 0.875, 0.999])
    assert ImportanceDrawing(p)(u, 4)[0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert LossSecondMoment(4)(u, 4)[0].tolist() == [1, 1, 2, 3, 4, 4, 4, 4]


def test_probabilities_add_up_to_one_whatever_their_rounding():
    p = torch.full((1000,), 1e-3)  # in float32
    assert float(ImportanceDrawing(p).probabilities.sum()) == pytest.approx(1, abs=1e-14)
    assert ImportanceDrawing(p).probabilities.dtype == torch.float64
    assert ImportanceDrawing(p).float().half().probabilities.dtype == torch.float64
    p[0] = 0.5
    assert float(ImportanceDrawing(torch.tensor([1e-3] * 1000)).probabilities[0]) == pytest.approx(1e-3)


SECOND_MOMENTS = [9.0, 0.25, 0.0, 4.0, 100.0]


@pytest.mark.parametrize("uniform", [1e-12, 1e-3, 0.5])
def test_the_drawing_of_second_moments_is_of_their_roots(uniform):
    roots = [3.0, 0.5, 0.0, 2.0, 10.0]
    expected = [(1 - uniform) * root / 15.5 + uniform / 5 for root in roots]
    for moments in (SECOND_MOMENTS, torch.tensor(SECOND_MOMENTS)):
        assert ImportanceDrawing.of(moments, uniform).probabilities.tolist() == pytest.approx(expected, rel=1e-9)
    assert learned([[root] for root in roots], uniform=uniform).probabilities.tolist() == pytest.approx(expected)
    assert ImportanceDrawing.of(SECOND_MOMENTS).probabilities[2].item() == pytest.approx(0.02)


def test_no_other_probabilities_have_a_lower_second_moment():
    """sum E[L^2] / p is at least (sum of the roots)^2, by Cauchy and Schwarz, and that is where it is."""
    m = torch.tensor([9.0, 0.25, 1e-4, 4.0, 100.0]).double()
    p = ImportanceDrawing.of(m, 1e-12).probabilities
    least = float((m / p).sum())
    assert least == pytest.approx(float(m.sqrt().sum()) ** 2, rel=1e-9)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            step = torch.randn(5).double()
            other = (p + size * p.min() * (step - step.mean()) / step.abs().max() / 2).clamp(min=1e-9)
            rise = float((m / (other / other.sum())).sum()) - least
            assert rise > 0
    for other in (torch.full((5,), 0.2).double(), m / m.sum(), m**0.25 / (m**0.25).sum()):
        assert float((m / other).sum()) > least * 1.1


def losses(pair, x_0):
    """What the one-step pair says of each datum's bound."""
    with torch.no_grad():
        return sum(DiffusionELBO().terms(pair.model, pair.guide, x_0).values())


def test_the_second_moment_of_independent_draws_is_the_formula():
    diffusion, x_0 = known_diffusion(KNOWN), torch.full((20000, 1), 0.75).double()
    costs = torch.tensor(KNOWN).double()
    top = float(pyrodiff.bound(diffusion, x_0[:1]).prior)
    for p in (torch.full((7,), 1 / 7).double(), ImportanceDrawing.of(costs**2, 0.3).probabilities):
        beyond = losses(diffusion.one_step(Apart(p)), x_0) - top
        assert not far(beyond, float(costs.sum()))
        assert not far(beyond**2, float((costs**2 / p).sum()))


@pytest.mark.parametrize("kind", [Apart, ImportanceDrawing, LossSecondMoment])
def test_with_probabilities_in_proportion_to_known_costs_nothing_varies(kind):
    """Each datum's estimate is the whole bound: every L_{t-1} / p(t) is the sum of them all."""
    diffusion, x_0 = known_diffusion(KNOWN), torch.full((50, 1), 0.75).double()
    costs = torch.tensor(KNOWN).double()
    drawing = learned(costs[:, None], uniform=1e-13) if kind is LossSecondMoment else kind.of(costs**2, 1e-13)
    total = pyrodiff.bound(diffusion, x_0).nats
    for _ in range(5):
        torch.testing.assert_close(losses(diffusion.one_step(drawing), x_0), total, rtol=1e-9, atol=1e-9)
    assert float(losses(diffusion.one_step(), x_0).std()) > 1


def values_and_gradients(pair, x_0, number):
    def draw():
        loss = DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0) / len(x_0)
        return torch.cat([loss.detach()[None], gradient(loss, pair.model.reverse)])

    return repeat(number, draw)


@pytest.fixture(scope="module", params=["vp", "ve", "bits"])
def trajectories(request):
    """A diffusion, data, and draws of the trajectory pair's value and gradient."""
    pyro.set_rng_seed(0)
    diffusion, x_0 = make(request.param)
    return diffusion, x_0.repeat(4, 1), values_and_gradients(diffusion, x_0.repeat(4, 1), 25)


@every_drawing
def test_value_and_gradient_are_the_trajectory_pairs_in_mean(trajectories, name):
    """The learned drawing goes on learning from the evaluations."""
    diffusion, x_0, expected = trajectories
    found = values_and_gradients(diffusion.one_step(DRAWINGS[name][0](5)), x_0, 30)
    assert not differ(expected, found)
    error = (expected.var(0) / len(expected) + found.var(0) / len(found)).sqrt()
    assert (expected.mean(0)[1:].abs() > 5 * error[1:]).any()  # there is a gradient to see
    assert float(error[0]) < 0.05 * float(expected.mean(0)[0].abs())


class Reference:
    """The learned drawing, from its description: a deque of the last costs a time."""

    def __init__(self, T, history, uniform):
        self.kept, self.uniform = [deque(maxlen=history) for _ in range(T)], uniform

    def tell(self, t, cost, scored):
        for time, number, counts in zip(
            t.flatten().tolist(), cost.flatten().tolist(), scored.flatten().tolist(), strict=True
        ):
            if counts and math.isfinite(number):
                self.kept[time - 1].append(number)

    def probabilities(self):
        T = len(self.kept)
        if any(len(kept) < kept.maxlen for kept in self.kept):
            return [1 / T] * T
        roots = [math.sqrt(math.fsum(number**2 for number in kept) / len(kept)) for kept in self.kept]
        total = math.fsum(roots)
        return [(1 - self.uniform) * root / total + self.uniform / T if total else 1 / T for root in roots]


def kept(drawing):
    """The costs that are kept of each t, the oldest first."""
    history = drawing.costs.shape[1]
    rows = []
    for row, count in zip(drawing.costs.tolist(), drawing.counts.tolist(), strict=True):
        rows.append([row[i % history] for i in range(max(0, count - history), count)])
    return rows


def random_telling(T, shape):
    """Times that favour the first, some not scored, and now and then costs that are no numbers."""
    t = (torch.rand(shape) ** 2 * T).long() + 1
    cost = torch.randn(shape, dtype=torch.float64) * 10.0 ** t.double().clamp(max=3)
    broken = torch.rand(shape)
    cost = cost.masked_fill(broken < 0.05, math.nan).masked_fill((broken > 0.95) & (broken < 0.98), math.inf)
    cost = cost.masked_fill(broken > 0.98, -math.inf)
    return t, cost, torch.rand(shape) < 0.8


@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (30,), (3, 7), (1, 1, 12)])
@pytest.mark.parametrize("history", [1, 2, 10])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_the_last_costs_of_each_time_are_kept_in_their_order(T, history, shape):
    drawing, reference = LossSecondMoment(T, history, uniform=0.01), Reference(T, history, 0.01)
    for number in range(60):
        telling = random_telling(T, shape)
        drawing.tell(*telling)
        reference.tell(*telling)
        assert kept(drawing) == [list(costs) for costs in reference.kept]
        assert drawing.probabilities.tolist() == pytest.approx(reference.probabilities(), rel=1e-12)
        if number == 30:  # what is saved goes on as what was not
            file = io.BytesIO()
            torch.save(drawing.state_dict(), file)
            drawing = LossSecondMoment(T, history, uniform=0.01)
            drawing.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))


def test_it_is_uniform_until_every_time_was_seen_so_often():
    drawing, yes = LossSecondMoment(3, history=2), torch.tensor([True])
    for t, cost in ((1, 5.0), (1, 7.0), (1, 9.0), (2, 1.0), (2, 1.0), (3, 4.0)):
        assert drawing.probabilities.tolist() == pytest.approx([1 / 3] * 3, rel=1e-14)
        drawing.tell(torch.tensor([t]), torch.tensor([cost]), yes)
    assert drawing.probabilities.tolist() == pytest.approx([1 / 3] * 3, rel=1e-14)
    drawing.tell(torch.tensor([3]), torch.tensor([-2.0]), yes)
    roots = [math.sqrt((49 + 81) / 2), 1.0, math.sqrt(10)]
    expected = [0.9 * root / sum(roots) + 0.1 / 3 for root in roots]
    assert drawing.probabilities.tolist() == pytest.approx(expected)


def test_costs_of_nothing_leave_it_uniform():
    assert learned([[0.0, 0.0], [0.0, 0.0]]).probabilities.tolist() == [0.5, 0.5]
    assert learned([[0.0, 0.0], [0.0, 1.0]], uniform=0.1).probabilities.tolist() == pytest.approx([0.05, 0.95])


def test_a_telling_of_nothing_that_counts_changes_nothing():
    drawing = learned([[1.0, 2.0], [3.0, 4.0]])
    before = {name: value.clone() for name, value in drawing.state_dict().items()}
    t = torch.tensor([1, 2, 1])
    drawing.tell(t, torch.tensor([9.0, 9.0, 9.0]), torch.zeros(3, dtype=torch.bool))
    drawing.tell(t, torch.tensor([math.nan, math.inf, -math.inf]), torch.ones(3, dtype=torch.bool))
    assert all(torch.equal(drawing.state_dict()[name], value) for name, value in before.items())
    assert set(before) == {"costs", "counts"}


def test_the_state_is_part_of_the_pairs():
    diffusion = known_diffusion(KNOWN)
    one, other = (diffusion.one_step(LossSecondMoment(7, history=1)) for _ in range(2))
    x_0 = torch.full((64, 1), 0.75).double()
    for _ in range(4):
        DiffusionELBO().differentiable_loss(one.model, one.guide, x_0)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    p, q = (pair.guide.step.drawing.probabilities for pair in (one, other))
    assert torch.equal(p, q)
    assert float(p.max()) > 0.3
    with pytest.raises(RuntimeError, match="size mismatch"):
        LossSecondMoment(7, history=2).load_state_dict(LossSecondMoment(7, history=1).state_dict())


class Recorded(UniformDrawing):
    """It writes down what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def tell(self, t, cost, scored):
        assert t.shape == cost.shape == scored.shape
        assert scored.dtype == torch.bool
        assert not cost.requires_grad
        self.told.append((t.clone(), cost.clone(), scored.clone()))

    def costs(self):
        """Of all that counts: (t, cost), in order."""
        return [
            (time, number)
            for t, cost, scored in self.told
            for time, number in zip(t[scored].tolist(), cost[scored].tolist(), strict=True)
        ]


class Weighting(torch.nn.Module):
    def forward(self, t):
        return 0.1 * t + 1.0


@pytest.mark.parametrize("weighting", [None, Weighting()])
def test_a_drawing_is_told_the_costs_of_its_steps_and_nothing_else(weighting):
    """As they are: not weighted, not over p(t), not scaled."""
    diffusion, x_0 = known_diffusion(KNOWN), torch.full((200, 1), 0.75).double()
    drawing = Recorded()
    pair = diffusion.one_step(drawing, weighting)
    model, guide = (poutine.scale(program, 0.3) for program in (pair.model, pair.guide))
    DiffusionELBO().differentiable_loss(model, guide, x_0)
    assert [bool(scored.all()) for _, _, scored in drawing.told] == [False, False]
    for t, _, scored in drawing.told:
        assert (scored == (t > 1)).all() or (scored == (t == 1)).all()
    assert (drawing.told[0][2] ^ drawing.told[1][2]).all()  # each datum is scored once
    costs = drawing.costs()
    assert len(costs) == 200
    assert {time for time, _ in costs} == set(range(1, 8))
    assert [cost for _, cost in costs] == pytest.approx([KNOWN[time - 1] for time, _ in costs], rel=1e-9)


def closed_form_costs(kind, diffusion, x_0, t, x_t):
    """The cost of each datum's step at a given state, from the definitions."""
    costs = []
    for i, time in enumerate(t.tolist()):
        kernel = diffusion.reverse(x_t[i : i + 1], torch.tensor([time])).base_dist
        if kind == "bits":
            p, schedule = kernel.probs[0].tolist(), diffusion.forward_process.schedule
            if time == 1:
                costs.append(-sum(math.log(q if x else 1 - q) for x, q in zip(x_0[i].tolist(), p, strict=True)))
                continue
            keep, before = 1 - float(schedule.beta(time)), float(schedule.alpha_bar(time - 1))
            rate, total = 0.2, 0.0
            for x, now, q in zip(x_0[i].tolist(), x_t[i].tolist(), p, strict=True):
                joint = []
                for s in (0, 1):
                    first = before * (x == s) + (1 - before) * (rate if s else 1 - rate)
                    joint.append(first * (keep * (s == now) + (1 - keep) * (rate if now else 1 - rate)))
                one = joint[1] / sum(joint)
                total += one * math.log(one / q) + (1 - one) * math.log((1 - one) / (1 - q))
            costs.append(total)
            continue
        mean, scale, schedule = kernel.loc[0], kernel.scale[0], diffusion.forward_process.schedule
        if time == 1:
            costs.append(float((0.5 * ((x_0[i] - mean) / scale) ** 2 + (scale * math.sqrt(2 * math.pi)).log()).sum()))
            continue
        beta, now, before = (
            float(f) for f in (schedule.beta(time), *schedule.alpha_bar(torch.tensor([time, time - 1])))
        )
        true = (math.sqrt(before) * beta * x_0[i] + math.sqrt(1 - beta) * (1 - before) * x_t[i]) / (1 - now)
        variance = beta * (1 - before) / (1 - now)
        ratio = variance / scale**2
        costs.append(float((0.5 * (ratio - 1 - ratio.log() + (true - mean) ** 2 / scale**2)).sum()))
    return costs


@pytest.mark.parametrize("kind", ["vp", "bits"])
def test_a_step_of_training_tells_the_costs_before_it(kind):
    diffusion, x_0 = make(kind)
    drawing = Recorded()
    pair = diffusion.one_step(drawing)
    svi = SVI(
        pair.model, pair.guide, lambda parameters: torch.optim.Adam(parameters, 0.1), DiffusionELBO(), validate=True
    )
    for seed in range(2):
        t, x_t = step_of(pair, x_0, seed)
        with torch.no_grad():
            expected = closed_form_costs(kind, diffusion, x_0, t, x_t)
        drawing.told.clear()
        torch.manual_seed(seed)
        svi.step(x_0)
        told = torch.zeros(len(x_0), dtype=torch.float64)
        for times, cost, scored in drawing.told:
            assert torch.equal(times, t)
            told += torch.where(scored, cost, 0.0)
        assert told.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert len(set(t.tolist())) == 5


def test_without_gradients_nothing_is_told():
    diffusion, x_0 = make("vp")
    drawing = Recorded()
    pair = diffusion.one_step(drawing)
    svi = SVI(pair.model, pair.guide, lambda parameters: torch.optim.Adam(parameters, 0.1), DiffusionELBO())
    svi.evaluate_loss(x_0)
    DiffusionELBO().loss(pair.model, pair.guide, x_0)
    losses(pair, x_0)
    pyrodiff.bound(diffusion, x_0)
    assert drawing.told == []
    DiffusionELBO().loss_and_grads(pair.model, pair.guide, x_0)
    assert len(drawing.told) == 2


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("vectorised", [False, True])
def test_every_particle_is_told(num_particles, vectorised):
    diffusion, x_0 = known_diffusion(KNOWN), torch.full((30, 1), 0.75).double()
    drawing = Recorded()
    pair = diffusion.one_step(drawing)
    elbo = DiffusionELBO(num_particles=num_particles, vectorize_particles=vectorised, max_plate_nesting=1)
    elbo.differentiable_loss(pair.model, pair.guide, x_0)
    assert {tuple(t.shape) for t, _, _ in drawing.told} == {(num_particles, 30) if vectorised else (30,)}
    costs = drawing.costs()
    assert len(costs) == 30 * num_particles
    assert [cost for _, cost in costs] == pytest.approx([KNOWN[time - 1] for time, _ in costs], rel=1e-9)


@pytest.mark.parametrize("vectorised", [False, True])
def test_the_learned_probabilities_of_known_costs_are_in_proportion_to_them(vectorised):
    diffusion, x_0 = known_diffusion(KNOWN), torch.full((64, 1), 0.75).double()
    drawing = LossSecondMoment(7, history=3, uniform=1e-12)
    pair = diffusion.one_step(drawing)
    elbo = DiffusionELBO(num_particles=3, vectorize_particles=vectorised, max_plate_nesting=1)
    elbo.differentiable_loss(pair.model, pair.guide, x_0)
    assert drawing.probabilities.tolist() == pytest.approx([cost / sum(KNOWN) for cost in KNOWN], rel=1e-6)
    total = pyrodiff.bound(diffusion, x_0).nats
    torch.testing.assert_close(losses(pair, x_0), total, rtol=1e-6, atol=1e-6)


def test_a_single_step_is_told_by_its_decoder():
    drawing = Recorded()
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.4]))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((2,), hidden=4, num_blocks=1))
    pair = pyrodiff.Diffusion(forward, reverse, (2,)).one_step(drawing)
    terms = DiffusionELBO().terms(pair.model, pair.guide, torch.full((5, 2), 0.7))
    assert len(drawing.told) == 1
    t, cost, scored = drawing.told[0]
    assert t.tolist() == [1] * 5
    assert scored.all()
    torch.testing.assert_close(cost, terms["x_0"].detach())


def test_the_other_drawings_learn_nothing_from_what_they_are_told():
    told = torch.tensor([1, 2]), torch.tensor([3.0, 1.0]), torch.tensor([True, True])
    for drawing in (UniformDrawing(), pyrodiff.LowDiscrepancyDrawing(), ImportanceDrawing([0.5, 0.5])):
        before = {name: value.clone() for name, value in drawing.state_dict().items()}
        assert drawing.tell(*told) is None
        assert {name: value.tolist() for name, value in drawing.state_dict().items()} == {
            name: value.tolist() for name, value in before.items()
        }


def test_a_drawing_of_ones_own_need_not_listen():
    class Odd(Drawing):
        """t = 1 or T, each with probability 1/2."""

        def uniforms(self, like):
            return dist.Uniform(like.new_zeros(()), 1.0).expand(like.shape)

        def forward(self, u, num_steps):
            return torch.where(u < 0.5, 1, num_steps), torch.full_like(u, 0.5)

    diffusion, x_0 = known_diffusion([3.0, 5.0]), torch.full((4000, 1), 0.75).double()
    pair = diffusion.one_step(Odd())
    for elbo in (DiffusionELBO(), TraceMeanField_ELBO()):
        elbo.loss_and_grads(pair.model, pair.guide, x_0[:5])
    assert not far(losses(pair, x_0), float(pyrodiff.bound(diffusion, x_0[:1]).nats))


def training(kind):
    if kind == "table of bits":
        return bit_diffusion([0.1, 0.2, 0.3, 0.4, 0.6], 0.2, 2), (torch.rand(48, 2) < 0.7).double()
    return make(kind)


@pytest.mark.parametrize("kind", ["vp", "ve", "table of bits"])
def test_training_goes_with_it_and_it_with_training(kind):
    diffusion, x_0 = training(kind)
    drawing = LossSecondMoment(5)
    pair = diffusion.one_step(drawing)
    svi = SVI(pair.model, pair.guide, lambda parameters: torch.optim.Adam(parameters, 0.02), DiffusionELBO())
    before = pyrodiff.bound(diffusion, x_0, num_particles=20)
    for _ in range(100):
        assert svi.step(x_0).isfinite()
    after = pyrodiff.bound(diffusion, x_0, num_particles=20)
    assert float(after.nats.mean()) < float(before.nats.mean()) - 0.3
    p = drawing.probabilities
    assert float(p.sum()) == pytest.approx(1)
    assert float(p.min()) >= 1e-3 / 5
    assert float(p.max()) > 0.22
    assert (drawing.counts > 10).all()
    assert int(drawing.counts.sum()) == 100 * 48


@pytest.mark.parametrize("kind", ["vp", "bits"])
def test_the_costs_that_are_kept_are_draws_of_the_terms_costs(kind):
    diffusion, x_0 = make(kind)
    drawing = LossSecondMoment(5, history=500)
    pair = diffusion.one_step(drawing)
    while int(drawing.counts.min()) < 500:
        DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0.repeat(10, 1))
    expected = torch.cat(
        [(terms := pyrodiff.bound(diffusion, x_0, num_particles=50)).reconstruction[None], terms.denoising]
    ).mean(1)
    assert not far(drawing.costs.T, expected.double(), 6)  # some of the error is the expected ones'
