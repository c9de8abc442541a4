"""The solver against closed forms, gradients through the flow against finite differences, and draws by the flow."""

import itertools
import math

import pytest
import torch
from exact import EightGaussians
from test_flows import Expected, Network, chain, diffusion_of, law_of, some_data
from torch import nn

import pyrodiff
from pyrodiff import FlowSampler, ode_log_prob
from pyrodiff.base.solver import solve


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def circle(t, y, rows):
    """A rotation, the faster the later the row."""
    return torch.stack([y[:, 1], -y[:, 0]], 1) * (1 + rows[:, None])


STARTS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)


def rotated(y, angle):
    """The rows, each turned by an angle of its own."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos * y[:, 0] + sin * y[:, 1], cos * y[:, 1] - sin * y[:, 0]], 1)


@pytest.mark.parametrize(("start", "end"), [(0.0, 3.0), (3.0, 0.0), (-1.0, -1.5)])
def test_rows_arrive_where_they_should_forwards_and_backwards(start, end):
    found = solve(circle, STARTS, number(start), number(end), 1e-9, 10000)
    expected = rotated(STARTS, (end - start) * torch.arange(1, 4))
    torch.testing.assert_close(found.y, expected, rtol=0, atol=1e-7)
    assert not found.failed.any()


def test_the_error_of_a_step_is_of_fifth_order():
    """With steps of a given length, half the length has 2^5 = 32 times less error in all."""

    def error(length):
        one = STARTS[:1]
        return float(
            (
                solve(circle, one, number(0), number(2), 0.9, 10000, stops=torch.arange(0, 2, length).double()).y
                - rotated(one, number([2.0]))
            ).norm()
        )

    lengths = [0.2, 0.1, 0.05]
    errors = [error(length) for length in lengths]
    for long, short in itertools.pairwise(errors):
        assert 4.7 < math.log2(long / short) < 5.3


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_error_follows_the_tolerance(tolerance):
    found = solve(circle, STARTS, number(0), number(3), tolerance, 10000)
    error = (found.y - rotated(STARTS, 3.0 * torch.arange(1, 4))).abs().max()
    assert error < 30 * tolerance


def test_a_row_is_what_it_is_alone():
    together = solve(circle, STARTS, number(0), number(3), 1e-6, 10000)
    for i in range(3):

        def drift(t, y, rows, i=i):
            return circle(t, y, rows + i)

        alone = solve(drift, STARTS[i : i + 1], number(0), number(3), 1e-6, 10000)
        assert torch.equal(alone.y[0], together.y[i])
        assert alone.num_evaluations[0] == together.num_evaluations[i]


def test_evaluations_are_counted():
    calls = []

    def drift(t, y, rows):
        calls.append(rows.tolist())
        return circle(t, y, rows)

    found = solve(drift, STARTS, number(0), number(3), 1e-6, 10000)
    assert [sum(i in call for call in calls) for i in range(3)] == found.num_evaluations.tolist()


def test_rows_that_blow_up_or_take_too_many_steps_have_failed_alone():
    """y' = y^2 from 1 is 1 / (1 - t), infinite at 1; from 0.1 it is 0.125 at 2."""
    found = solve(lambda t, y, rows: y**2, number([[1.0], [0.1]]), number(0), number(2), 1e-8, 1000)
    assert found.failed.tolist() == [True, False]
    torch.testing.assert_close(found.y[1], number([0.125]))
    few = solve(circle, STARTS, number(0), number(3), 1e-8, 3)
    assert few.failed.all()
    assert few.num_evaluations.tolist() == [20] * 3
    broken = solve(lambda t, y, rows: y * math.nan, number([[1.0]]), number(0), number(1), 1e-8, 10000)
    assert broken.failed.all()


def test_a_zero_drift_and_no_time_at_all_are_solved():
    still = solve(lambda t, y, rows: 0 * y, STARTS, number(0), number(5), 1e-6, 100)
    assert torch.equal(still.y, STARTS)
    assert torch.equal(solve(circle, STARTS, number(2), number(2), 1e-6, 100).y, STARTS)


def test_gradients_are_those_of_the_solution():
    """Of y_1 = y_0 e^{k (t_1 - t_0)}, to all four."""
    inputs = [number([[0.7], [-0.2]]), number(0.3), number(1.4), number(-0.8)]
    y, start, end, k = (x.requires_grad_() for x in inputs)
    found = solve(lambda t, y, rows: k * y, y, start, end, 1e-10, 1000)
    gradients = torch.autograd.grad(found.y.sum(), [y, start, end, k])
    growth = math.exp(-0.8 * 1.1)
    expected = [
        torch.full((2, 1), growth).double(),
        -k.detach() * 0.5 * growth,
        k.detach() * 0.5 * growth,
        number(0.5 * 1.1 * growth),
    ]
    torch.testing.assert_close(list(gradients), expected, rtol=1e-7, atol=1e-8)


# gradients of log p


class WithContext(nn.Module):
    """A network of all numbers of a state, and of one context number for each datum."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.5)

    def forward(self, x_t, t, y):
        t = torch.as_tensor(t).expand(x_t.shape[:1])[:, None].double() / 3
        return self.second(torch.tanh(self.first(torch.cat([x_t, t, y[:, None]], 1))))


def difference(value, parameters, directions, h=1e-2):
    """The derivative of a value along directions of some parameters, by differences of fourth order."""
    values = []
    for step in (h, -h, 2 * h, -2 * h):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
            values.append(value())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(-step * direction)
    return (8 * (values[0] - values[1]) - values[2] + values[3]) / (12 * h)


def learned():
    forward = pyrodiff.GaussianForward(pyrodiff.LearnedBetaSchedule([0.1, 0.3, 0.4, 0.6]))
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, WithContext()), (2,))


@pytest.mark.parametrize("num_probes", [0, 2])
def test_log_p_has_the_gradient_of_finite_differences(num_probes):
    """To the data, the context, the network's weights and the schedule's, with an exact divergence and with probes."""
    diffusion = learned()
    x_0, y = torch.randn(3, 2).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    options = {"num_probes": num_probes, "tolerance": 1e-9, "max_steps": 10**6, "generator": 1}

    def log_p(**more):
        return ode_log_prob(diffusion, x_0, y, **options, **more).log_prob.sum()

    network = diffusion.reverse.denoiser
    inputs = [x_0, y, network.first.weight, network.second.bias, *diffusion.forward_process.schedule.parameters()]
    gradients = torch.autograd.grad(log_p(differentiable=True), inputs)
    assert not log_p().requires_grad
    assert all((gradient != 0).any() for gradient in gradients)
    directions = [torch.randn(parameter.shape, dtype=torch.float64) for parameter in inputs]
    slope = difference(lambda: float(log_p()), inputs, directions)
    expected = sum(float((gradient * d).sum()) for gradient, d in zip(gradients, directions, strict=True))
    assert abs(slope - expected) < 2e-5 * abs(expected)


def test_the_bound_behind_a_decoder_has_a_gradient_too():
    """x_1 is drawn as a function of the data, so that the whole estimate has the gradient of finite differences."""
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.1, 0.3, 0.4]))
    denoiser = pyrodiff.DataPrediction(nn.Linear(2, 2).double(), forward)
    denoiser.network.forward = lambda x_t, t, layer=denoiser.network: torch.tanh(x_t @ layer.weight.T)
    reverse = pyrodiff.GaussianReverse(forward, denoiser)
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,), pyrodiff.DiscretizedDecoder(5))
    x_0 = pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1]]), 5).double()
    weight, options = denoiser.network.weight, {"tolerance": 1e-9, "max_steps": 100000, "generator": 2}
    (gradient,) = torch.autograd.grad(ode_log_prob(diffusion, x_0, differentiable=True, **options).nats.sum(), weight)
    direction = torch.tensor([[0.3, -0.5], [0.2, 0.7]]).double()
    slope = difference(lambda: float(ode_log_prob(diffusion, x_0, **options).nats.sum()), [weight], [direction])
    assert abs(slope - float((gradient * direction).sum())) < 1e-5


def test_the_gradient_of_log_p_is_the_score_of_gaussian_data():
    m, v = law_of((2,))
    schedule = pyrodiff.LogSNRSchedule(400, 12.0, -18.0)
    diffusion = diffusion_of(Expected(m, v, schedule), schedule, (2,))
    x_0 = some_data((2,)).requires_grad_()
    (score,) = torch.autograd.grad(
        ode_log_prob(diffusion, x_0, tolerance=1e-7, differentiable=True).log_prob.sum(), x_0
    )
    torch.testing.assert_close(score, ((m - x_0) / v).detach(), rtol=1e-3, atol=1e-3)


# the sampler


def gaussian(kind="preserving", T=5, **options):
    m, v = law_of((2,))
    schedule, _ = chain(kind, T)
    return diffusion_of(Expected(m, v, schedule), schedule, (2,), **options), m, v


@pytest.mark.parametrize("kind", ["preserving", "exploding"])
@pytest.mark.parametrize("T", [1, 5])
def test_log_p_of_the_draws_is_what_the_flow_says_of_them(kind, T):
    schedule, _ = chain(kind, T)
    diffusion = diffusion_of(Network((2,), schedule), schedule, (2,))
    sampler = FlowSampler(diffusion, tolerance=1e-9, max_steps=100000)
    x_0, log_p = sampler.with_log_prob(6, generator=3)
    torch.testing.assert_close(sampler(6, generator=3), x_0, rtol=1e-6, atol=1e-6)
    again = ode_log_prob(diffusion, x_0, tolerance=1e-9, max_steps=100000)
    torch.testing.assert_close(log_p, again.log_prob, rtol=1e-6, atol=1e-6)


def test_the_flow_of_gaussian_data_keeps_every_quantile():
    """The flow of one Gaussian into another is monotone, a number by itself: (x_0 - m) / s is (x_T - m_T) / s_T."""
    torch.set_default_dtype(torch.float64)  # of a model without parameters
    m, v = law_of((2,))
    schedule = pyrodiff.LogSNRSchedule(200, 14.0, -6.0)
    diffusion = diffusion_of(Expected(m, v, schedule), schedule, (2,))
    x_T, x_0 = FlowSampler(diffusion, tolerance=1e-8).trajectory(7, times=(200, 0), generator=1)
    a, b = schedule.signal(200), schedule.noise(200)
    expected = m + v.sqrt() * (x_T - a * m) / (a**2 * v + b**2).sqrt()
    torch.testing.assert_close(x_0, expected, rtol=0, atol=2e-4)


def test_states_on_the_way_are_those_of_the_flow():
    """Stopping on the way changes nothing but the solver's steps; the flow up from each state leads to x_T again."""
    torch.set_default_dtype(torch.float64)  # of a model without parameters
    diffusion, *_ = gaussian()
    sampler = FlowSampler(diffusion, tolerance=1e-9, max_steps=100000)
    states = sampler.trajectory(4, times=(5, 3, 1, 0), generator=2)
    torch.testing.assert_close(states[-1], sampler(4, generator=2), rtol=1e-6, atol=1e-7)
    flow = pyrodiff.pair.flow.Flow(diffusion, 1e-9, 100000)
    for t, x in zip((3, 1, 0), states[1:], strict=True):
        torch.testing.assert_close(flow.carry(x, t, 5, ())[0], states[0], rtol=1e-6, atol=1e-6)
    steps = sampler.step(states[0], torch.full((4,), 5)), sampler.last(states[2], torch.ones(4).long())
    torch.testing.assert_close(
        sampler.step(sampler.step(steps[0], torch.full((4,), 4)), torch.full((4,), 3)),
        flow.carry(states[0], 5, 2, ())[0],
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(steps[1], states[3], rtol=1e-6, atol=1e-6)


def test_a_chain_of_fewer_steps_has_a_flow_of_its_own():
    torch.set_default_dtype(torch.float64)  # of a model without parameters
    schedule = pyrodiff.LogSNRSchedule(50, 8.0, -8.0)
    diffusion = diffusion_of(EightGaussians(schedule), schedule, (2,))
    short = diffusion.subchain([1, 13, 26, 38, 50])
    sampler = FlowSampler(diffusion, tolerance=1e-7, max_steps=5000)
    assert sampler(3, num_steps=5, generator=1).shape == (3, 2)
    x_0, log_p = sampler.with_log_prob(3, num_steps=5, generator=1)
    times = sampler.chain.forward_process.schedule.times
    torch.testing.assert_close(
        log_p, ode_log_prob(diffusion.subchain(times), x_0, tolerance=1e-7, max_steps=5000).log_prob, rtol=0, atol=1e-4
    )
    assert short.num_steps == len(times)


def test_a_decoder_makes_the_last_step():
    schedule, _ = chain("preserving")
    diffusion = diffusion_of(Network((2,), schedule), schedule, (2,), decoder=pyrodiff.DiscretizedDecoder(5))
    x_0 = FlowSampler(diffusion)(50, generator=1)
    assert pyrodiff.Levels(5).check(x_0).all()
    with pytest.raises(ValueError, match=r"diffusion must end without a decoder .*DiscretizedDecoder: ode_log_prob"):
        FlowSampler(diffusion).with_log_prob(3)


def test_log_p_of_draws_given_their_context():
    diffusion, y = learned(), torch.tensor([0.5, -1.0, 2.0]).double()
    sampler, before = FlowSampler(diffusion), torch.get_rng_state()
    x_0, log_p = sampler.with_log_prob(3, y, generator=5, num_probes=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(x_0, sampler(3, y, generator=5), rtol=1e-3, atol=1e-3)
    exact = ode_log_prob(diffusion, x_0, y, num_probes=50, generator=1)
    assert ((log_p - exact.log_prob).abs() < 3).all()
    single = sampler.with_log_prob(3, y[:1], generator=5)[0]
    torch.testing.assert_close(single[0], x_0[0], rtol=1e-3, atol=1e-3)


def test_a_flow_that_does_not_converge_says_so():
    diffusion, *_ = gaussian()
    with pytest.raises(RuntimeError, match="did not converge for 3 of 3 data"):
        FlowSampler(diffusion, max_steps=1)(3)


@pytest.mark.parametrize("how", ["no grad", "detach"])
def test_a_network_that_cuts_the_graph_is_refused(how):
    """Its divergence would count as that of a constant, in silence, also where its weights have a gradient."""

    class Cut(Network):
        def forward(self, x_t, t):
            with torch.set_grad_enabled(how == "detach"):
                return super().forward(x_t.detach(), t)

    schedule, _ = chain("preserving")
    diffusion = diffusion_of(Cut((2,), schedule), schedule, (2,))
    for call in (lambda: FlowSampler(diffusion).with_log_prob(3), lambda: ode_log_prob(diffusion, some_data((2,)))):
        with pytest.raises(ValueError, match="denoiser must be differentiable in x_t for a flow"):
            call()


@pytest.mark.parametrize(("start", "end"), [(0.0, 3.0), (3.0, 0.0)])
def test_no_step_passes_over_a_stop(start, end):
    """A drift with kinks is solved to the tolerance, each row by itself; times beyond the ends are no stops."""
    stops, seen = torch.tensor([-1.0, 0.7, 1.1, 2.6, 9.0], dtype=torch.float64), []

    def drift(t, y, rows):
        seen.append(t)
        return (t - 0.7).abs()[:, None] + (t - 1.1).abs()[:, None] * (1 + rows[:, None])

    y = torch.zeros(2, 1, dtype=torch.float64)
    found = solve(drift, y, number(start), number(end), 1e-8, 1000, stops=stops)
    area = [(b**2 + (3 - b) ** 2) / 2 for b in (0.7, 1.1)]
    expected = math.copysign(1, end - start) * number([[area[0] + area[1]], [area[0] + 2 * area[1]]])
    torch.testing.assert_close(found.y, expected, rtol=0, atol=1e-12)
    assert found.num_evaluations.max() < 60
