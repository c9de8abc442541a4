"""The likelihood of the probability flow, against closed forms and against an integration of its own in numpy."""

import math

import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from exact import EightGaussians, Gaussian, GaussianPosterior, far
from torch import nn

import pyrodiff
from pyrodiff import FlowLikelihood, ode_log_prob
from pyrodiff.likelihood.estimate import rounded
from pyrodiff.running.evaluation import bytes_per_row

BETAS = [0.05, 0.1, 0.3, 0.4, 0.5]
SIGMAS = (0.3, 3.0)  # the least and the greatest noise
every_kind = pytest.mark.parametrize("kind", ["preserving", "exploding"])
every_shape = pytest.mark.parametrize("event_shape", [(), (2,), (2, 3)])


def chain(kind, T=5):
    """A schedule of T steps, and the same as (gain, variance) of each step."""
    if kind == "preserving":
        betas = BETAS[:T] if T > 1 else [0.4]
        return pyrodiff.BetaSchedule(betas), oracles.preserving_steps(betas)
    return pyrodiff.GeometricSchedule(T, *SIGMAS), oracles.exploding_steps(oracles.geometric_sigmas(T, *SIGMAS))


def runge_kutta(slope, y, start, end, number):
    h = (end - start) / number
    for i in range(number):
        time = start + i * h
        k1 = slope(time, y)
        k2 = slope(time + h / 2, y + h / 2 * k1)
        k3 = slope(time + h / 2, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(time + h, y + h * k3))
    return y


def flowed(estimate, steps, x, number=30, from_one=False):
    """x_T of data x_0, or of x_1, along dy / d log sigma = y - x_0(y), with y = x / a and sigma = b / a.

    Song's ODE is this for any schedule. The estimate of x_0 at a sigma between two times is between theirs, linear in
    log sigma, each read at the state of the same direction and unit scale; below sigma_1 the score is that at t = 1.
    """
    gain, variance = np.array(oracles.moments(steps)).T
    scale, sigma = np.sqrt(gain**2 + variance), np.sqrt(variance) / gain
    if from_one:
        y = x / gain[1]
    else:
        y = runge_kutta(lambda time, y: (y - estimate(gain[1] * y, 1)) / 2, x, 0.0, 1.0, number)
    for t in range(1, len(steps)):
        low, high = math.log(sigma[t]), math.log(sigma[t + 1])

        def slope(time, y, t=t, low=low, high=high):
            z, part = y / math.sqrt(1 + math.exp(2 * time)), (time - low) / (high - low)
            return y - (1 - part) * estimate(scale[t] * z, t) - part * estimate(scale[t + 1] * z, t + 1)

        y = runge_kutta(slope, y, low, high, number)
    return gain[-1] * y


def flow_log_prob(estimate, steps, x, log_top, **options):
    """log p of x of shape (B, D): that of x_T, and the determinant of the whole map, by differences of fourth order."""
    size, h = x.shape[-1], 1e-3
    shifts = np.array([0, 1, -1, 2, -2])[:, None, None, None] * h * np.eye(size)[:, None]
    _, up, down, upper, lower = ends = flowed(estimate, steps, x + shifts, **options)
    jacobian = (8 * (up - down) - upper + lower) / (12 * h)  # with shape (D, B, D), the first that of x_0
    return log_top(ends[0, 0]) + np.linalg.slogdet(jacobian.transpose(1, 2, 0))[1]


def standard_top(steps):
    """The log density of the default prior, N(0, a_T^2 + b_T^2) a number."""
    gain, variance = oracles.moments(steps)[-1]
    return lambda x: oracles.log_normal(x, 0.0, gain**2 + variance).sum(-1)


def read(denoiser, event_shape):
    """A denoiser as a function of numpy arrays of shape (..., D) and an int t."""

    @torch.no_grad()
    def estimate(x, t):
        x_t = torch.from_numpy(np.ascontiguousarray(x)).reshape((-1, *event_shape))
        return denoiser(x_t, torch.full((len(x_t),), t)).reshape(x.shape).numpy()

    return estimate


class Expected(nn.Module):
    """E[x_0 | x_t] of N(m, v), a number of the data by itself."""

    def __init__(self, m, v, schedule):
        super().__init__()
        self.m, self.v, self.schedule = m, v, schedule

    def forward(self, x_t, t):
        t = torch.as_tensor(t).expand(x_t.shape[:1])
        a, b = (c.reshape((-1,) + (1,) * self.m.dim()) for c in (self.schedule.signal(t), self.schedule.noise(t)))
        return self.m + a * self.v / (a**2 * self.v + b**2) * (x_t - a * self.m)


class Network(Expected):
    """That, and what a small random network adds to it; all numbers of a datum know of each other."""

    def __init__(self, event_shape, schedule, hidden=12):
        super().__init__(torch.full(event_shape, 0.4).double(), torch.full(event_shape, 1.5).double(), schedule)
        size = math.prod(event_shape)
        self.first, self.second = nn.Linear(size + 1, hidden).double(), nn.Linear(hidden, size).double()
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.5)

    def forward(self, x_t, t):
        time = torch.as_tensor(t).expand(x_t.shape[:1])[:, None].double() / 3
        hidden = torch.tanh(self.first(torch.cat([x_t.reshape(len(x_t), -1), time], 1)))
        return super().forward(x_t, t) + self.second(hidden).reshape(x_t.shape)


class Constant(nn.Module):
    def __init__(self, value, learned=False):
        super().__init__()
        self.value = nn.Parameter(value) if learned else value

    def forward(self, x_t, t):
        return self.value.expand(x_t.shape)


def diffusion_of(denoiser, schedule, event_shape, **options):
    forward = pyrodiff.GaussianForward(schedule)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape, **options)


def law_of(event_shape):
    """Means and variances of data, every number its own."""
    numbers = torch.arange(math.prod(event_shape), dtype=torch.float64).reshape(event_shape)
    return 0.7 - 0.4 * numbers, 0.3 + 0.25 * numbers


def some_data(event_shape, number=5):
    m, v = law_of(event_shape)
    return dist.Normal(m, 2 * v.sqrt()).sample((number,))


# closed forms


@pytest.mark.parametrize("prior", ["standard", "exact"])
def test_the_exact_denoiser_gives_the_log_density_of_eight_gaussians_for_every_datum(prior):
    schedule = pyrodiff.CosineSchedule(1000)
    denoiser = EightGaussians(schedule)
    mixture = denoiser.law(1000) if prior == "exact" else None
    x_0 = pyrodiff.datasets.eight_gaussians(48, seed=3).double()
    result = ode_log_prob(diffusion_of(denoiser, schedule, (2,), prior=mixture), x_0)
    log_p = denoiser.log_density(x_0)
    assert float((result.log_prob - log_p).abs().max()) < 1e-3
    assert result.event_shape == (2,)
    assert (result.is_bound, result.levels, result.num_steps, result.num_probes) == (False, None, 1000, 0)


@pytest.mark.parametrize(
    ("schedule", "most"),
    [
        (pyrodiff.LinearSchedule(1000), 1e-3),
        (pyrodiff.GeometricSchedule(1000, 0.01, 50.0), 1e-3),
        (pyrodiff.CosineSchedule(250), 5e-3),
    ],
)
def test_so_does_any_schedule_with_an_exact_prior(schedule, most):
    denoiser = EightGaussians(schedule)
    x_0 = pyrodiff.datasets.eight_gaussians(24, seed=4).double()
    result = ode_log_prob(diffusion_of(denoiser, schedule, (2,), prior=denoiser.law(schedule.num_steps)), x_0)
    assert float((result.log_prob - denoiser.log_density(x_0)).abs().max()) < most


def test_fewer_steps_of_the_same_chain_have_a_flow_of_their_own_and_it_comes_near_too():
    schedule = pyrodiff.LinearSchedule(1000)
    denoiser = EightGaussians(schedule)
    whole = diffusion_of(denoiser, schedule, (2,), prior=denoiser.law(1000))
    x_0 = pyrodiff.datasets.eight_gaussians(16, seed=5).double()
    errors = []
    for number in (50, 250):
        step = 1000 // number
        result = ode_log_prob(whole.subchain(range(step, 1001, step)), x_0)
        assert result.num_steps == number
        errors.append(float((result.log_prob - denoiser.log_density(x_0)).abs().max()))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 3


@every_kind
@every_shape
def test_normal_data_have_their_density(kind, event_shape):
    m, v = law_of(event_shape)
    schedule = (
        pyrodiff.CosineSchedule(1000, beta_max=0.99)
        if kind == "preserving"
        else pyrodiff.GeometricSchedule(1000, 0.01, 10)
    )
    prior = Gaussian(m, v, schedule)
    x_0 = some_data(event_shape)
    result = ode_log_prob(diffusion_of(Expected(m, v, schedule), schedule, event_shape, prior=prior), x_0)
    expected = dist.Normal(m, v.sqrt()).to_event(len(event_shape)).log_prob(x_0)
    torch.testing.assert_close(result.log_prob, expected, atol=1e-3 * max(1, math.prod(event_shape)), rtol=0)
    assert result.nats.shape == result.noise.shape == result.num_evaluations.shape == (5,)


@every_kind
@every_shape
def test_one_step_is_its_closed_form(kind, event_shape):
    """With x_0(a y) - m = k a (y - m) the deviation grows by exp((1 - k a) / 2) until the noise is that of t = 1."""
    schedule, steps = chain(kind, 1)
    m, v = law_of(event_shape)
    a, variance = oracles.moments(steps)[1]
    x_0 = some_data(event_shape)
    growth = (1 - a**2 * v.numpy() / (a**2 * v.numpy() + variance)) / 2
    x_1 = a * (m.numpy() + np.exp(growth) * (x_0.numpy() - m.numpy()))
    expected = oracles.log_normal(x_1, 0.0, a**2 + variance) + np.log(a) + growth
    expected = torch.from_numpy(np.asarray(expected).reshape(5, -1).sum(1))
    result = ode_log_prob(diffusion_of(Expected(m, v, schedule), schedule, event_shape), x_0, tolerance=1e-7)
    torch.testing.assert_close(result.log_prob, expected, atol=1e-6, rtol=0)


@every_kind
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("learned", [False, True])
def test_a_denoiser_that_does_not_look_is_a_scaling_about_what_it_says(kind, T, learned):
    """dy / d log sigma = y - c: by sigma_T / sigma_1, after exp(1/2) below t = 1; the divergence of c is 0."""
    schedule, steps = chain(kind, T)
    c = torch.tensor([0.8, -1.7]).double()
    moments = oracles.moments(steps)
    (a_1, v_1), (a_T, v_T) = moments[1], moments[-1]
    growth = 0.5 + math.log(math.sqrt(v_T) / a_T) - math.log(math.sqrt(v_1) / a_1)
    x_0 = some_data((2,))
    x_T = a_T * (c + math.exp(growth) * (x_0 - c)).numpy()
    expected = oracles.log_normal(x_T, 0.0, a_T**2 + v_T).sum(-1) + 2 * (growth + math.log(a_T))
    for num_probes in (0, 3):
        result = ode_log_prob(
            diffusion_of(Constant(c, learned), schedule, (2,)), x_0, num_probes=num_probes, tolerance=1e-7
        )
        torch.testing.assert_close(result.log_prob, torch.from_numpy(expected), atol=1e-5, rtol=1e-7)


# an integration of its own


@every_kind
@every_shape
@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_random_network_has_the_density_of_the_documented_equations(kind, event_shape, T):
    schedule, steps = chain(kind, T)
    network = Network(event_shape, schedule)
    x_0 = some_data(event_shape)
    expected = flow_log_prob(read(network, event_shape), steps, x_0.reshape(5, -1).numpy(), standard_top(steps))
    result = ode_log_prob(diffusion_of(network, schedule, event_shape), x_0, tolerance=1e-6)
    torch.testing.assert_close(result.log_prob, torch.from_numpy(expected), atol=1e-4, rtol=0)
    assert torch.equal(result.noise, torch.zeros(5).double())


def test_a_subchain_has_the_density_of_its_own_equations():
    schedule, _ = chain("preserving")
    kept = 1 - np.array(BETAS)
    betas = [1 - np.prod(kept[:2]), 1 - np.prod(kept[2:5])]
    network, steps = Network((2,), schedule), oracles.preserving_steps(betas)
    estimate, x_0 = read(network, (2,)), some_data((2,))
    expected = flow_log_prob(lambda x, k: estimate(x, (None, 2, 5)[k]), steps, x_0.numpy(), standard_top(steps))
    result = ode_log_prob(diffusion_of(network, schedule, (2,)).subchain([2, 5]), x_0, tolerance=1e-6)
    torch.testing.assert_close(result.log_prob, torch.from_numpy(expected), atol=1e-4, rtol=0)


@every_kind
def test_a_given_prior_is_the_law_of_the_end(kind):
    schedule, steps = chain(kind)
    network, x_0 = Network((2,), schedule), some_data((2,))
    prior = dist.StudentT(5.0, torch.tensor([0.3, -0.4]).double(), 1.5).to_event(1)
    end = flowed(read(network, (2,)), steps, x_0.numpy())
    other = flow_log_prob(read(network, (2,)), steps, x_0.numpy(), lambda x: 0.0)
    expected = prior.log_prob(torch.from_numpy(end)) + torch.from_numpy(other)
    result = ode_log_prob(diffusion_of(network, schedule, (2,), prior=prior), x_0, tolerance=1e-6)
    torch.testing.assert_close(result.log_prob, expected, atol=1e-4, rtol=0)


@every_kind
@pytest.mark.parametrize("event_shape", [(), (2,)])
def test_a_reverse_process_of_another_kind_is_read_by_the_mean_of_its_kernel(kind, event_shape):
    """The posterior's mean is linear in x_0: the kernel's mean says one, shifted or not."""
    schedule, steps = chain(kind)
    m, v = law_of(event_shape)
    kernel = GaussianPosterior(Gaussian(m, v, schedule), shift=0.3, widen=1.7)
    moments = oracles.moments(steps)

    def estimate(x, t):
        x_t = torch.from_numpy(np.ascontiguousarray(x)).reshape((-1, *event_shape))
        mean = kernel(x_t, t).mean.detach().numpy().reshape(x.shape)
        if t == 1:
            return mean
        (a_s, v_s), (gain, variance) = moments[t - 1], steps[t - 1]
        at_0, at_1 = (oracles.condition(a_s * x_0, v_s, gain, variance, x)[0] for x_0 in (0.0, 1.0))
        return (mean - at_0) / (at_1 - at_0)

    x_0 = some_data(event_shape)
    expected = flow_log_prob(estimate, steps, x_0.reshape(5, -1).numpy(), standard_top(steps))
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), kernel, event_shape)
    result = ode_log_prob(diffusion, x_0, tolerance=1e-6)
    torch.testing.assert_close(result.log_prob, torch.from_numpy(expected), atol=1e-4, rtol=0)
    exact = pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), GaussianPosterior(kernel.data), event_shape)
    same = diffusion_of(Expected(m, v, schedule), schedule, event_shape)
    ours, theirs = (ode_log_prob(one, x_0).log_prob for one in (exact, same))
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)


@every_kind
@pytest.mark.parametrize("T", [1, 3])
def test_the_density_of_a_random_network_adds_up_to_one(kind, T):
    schedule, _ = chain(kind, T)
    x = torch.linspace(-1, 1, 1601).double()
    x_0 = 30 * torch.sinh(3 * x) / math.sinh(3)  # dense in the middle
    weight = 30 * 3 * torch.cosh(3 * x) / math.sinh(3) * float(x[1] - x[0])
    result = ode_log_prob(diffusion_of(Network((), schedule), schedule, ()), x_0, tolerance=1e-6)
    assert float((weight * result.log_prob.exp()).sum()) == pytest.approx(1, abs=3e-4)


# estimates


@pytest.mark.parametrize("T", [1, 3])
def test_probes_estimate_the_exact_number_and_say_how_far_they_are(T):
    schedule, _ = chain("preserving", T)
    diffusion, x_0 = diffusion_of(Network((2, 3), schedule), schedule, (2, 3)), some_data((2, 3))
    exact = ode_log_prob(diffusion, x_0)
    result = ode_log_prob(diffusion, x_0, num_probes=40)
    assert result.estimates.shape == (40, 5)
    assert result.num_probes == 40
    assert not far(result.estimates, exact.nats)
    assert float(result.noise.min()) > 1e-3
    torch.testing.assert_close(result.noise, result.estimates.std(0) / math.sqrt(40))
    torch.testing.assert_close(result.nats, result.estimates.mean(0))


def test_each_datum_has_probes_of_its_own():
    schedule, _ = chain("preserving", 2)
    diffusion = diffusion_of(Network((3,), schedule), schedule, (3,))
    result = ode_log_prob(diffusion, torch.full((3, 3), 0.4).double(), num_probes=4)
    assert len(set(result.estimates.flatten().tolist())) > 4
    one = ode_log_prob(diffusion, torch.full((3, 3), 0.4).double(), num_probes=1)
    assert one.noise.isnan().all()


def test_one_number_a_datum_has_no_need_of_more_than_one_sign():
    schedule, _ = chain("exploding", 3)
    diffusion, x_0 = diffusion_of(Network((), schedule), schedule, ()), some_data(())
    exact, probed = (ode_log_prob(diffusion, x_0, num_probes=number, tolerance=1e-6) for number in (0, 2))
    torch.testing.assert_close(probed.estimates, exact.estimates.expand(2, -1), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("size", "num_probes"), [(20, 0), (21, 10)])
def test_the_divergence_is_computed_up_to_twenty_dimensions(size, num_probes):
    schedule, _ = chain("preserving", 1)
    result = ode_log_prob(diffusion_of(Constant(torch.tensor(0.3)), schedule, (size,)), torch.full((2, size), 0.5))
    assert result.num_probes == num_probes
    assert result.estimates.shape == (max(1, num_probes), 2)


@pytest.mark.parametrize("num_probes", [0, 5])
def test_a_seed_gives_the_same_number_each_time_and_leaves_torchs_source(num_probes):
    schedule, _ = chain("preserving", 3)
    diffusion, x_0 = diffusion_of(Network((2,), schedule), schedule, (2,)), some_data((2,))
    state = torch.get_rng_state()
    first, again, other = (
        ode_log_prob(diffusion, x_0, num_probes=num_probes, generator=seed).nats for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (num_probes == 0)


def test_a_datums_number_depends_on_no_other():
    """Neither on those beside it, easy or stiff, nor on their order, nor on how many fit the memory."""
    schedule, _ = chain("exploding", 5)
    diffusion = diffusion_of(Network((2,), schedule), schedule, (2,))
    x_0 = torch.cat([some_data((2,)), torch.tensor([[6.0, -8.0], [0.0, 0.0]]).double()])
    whole = ode_log_prob(diffusion, x_0)
    assert len(set(whole.num_evaluations.tolist())) > 1
    alone = [ode_log_prob(diffusion, x_0[i : i + 1]) for i in range(7)]
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    row = bytes_per_row(diffusion, x_0[:1])
    few = ode_log_prob(diffusion, x_0, memory_budget=8 * row)
    batches = ode_log_prob(diffusion, [x_0[:3], (x_0[3:],)])
    for nats, evaluations in (
        (torch.cat([one.nats for one in alone]), torch.cat([one.num_evaluations for one in alone])),
        (ode_log_prob(diffusion, x_0[order]).nats[order.argsort()], None),
        (few.nats, few.num_evaluations),
        (batches.nats, batches.num_evaluations),
    ):
        torch.testing.assert_close(nats, whole.nats, atol=1e-9, rtol=1e-12)
        if evaluations is not None:
            assert torch.equal(evaluations, whole.num_evaluations)


def test_a_lower_tolerance_leaves_a_lower_error_for_more_evaluations():
    schedule, steps = chain("preserving")
    network, x_0 = Network((2,), schedule), some_data((2,))
    expected = flow_log_prob(read(network, (2,)), steps, x_0.numpy(), standard_top(steps), number=60)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        result = ode_log_prob(diffusion_of(network, schedule, (2,)), x_0, tolerance=tolerance)
        errors.append(float((result.log_prob - torch.from_numpy(expected)).abs().max()))
        evaluations.append(float(result.num_evaluations.mean()))
        assert errors[-1] < 100 * tolerance + 1e-7  # of the differences that are compared with
    assert evaluations[3] > evaluations[0]


@pytest.mark.parametrize("make", [pyrodiff.LogSNRSchedule, pyrodiff.CosineSchedule, pyrodiff.LinearSchedule])
def test_kinks_between_the_times_are_not_stepped_over(make):
    """Of two narrow modes the velocity bends much at each of 20 times; a step across would not see its own error."""
    schedule = make(20)

    class TwoModes(nn.Module):
        def forward(self, x_t, t):
            a, b = (c.reshape(-1, 1) for c in schedule.scales(t))
            total = a**2 * 0.04 + b**2
            sign = torch.tanh(a * x_t / total)
            return sign + 0.04 * a / total * (x_t - a * sign)

    diffusion, x_0 = diffusion_of(TwoModes(), schedule, (1,)), torch.linspace(-1.5, 1.5, 9).double()[:, None]
    exact = ode_log_prob(diffusion, x_0, tolerance=1e-10, max_steps=10**5).log_prob
    for tolerance in (1e-5, 1e-7):
        found = ode_log_prob(diffusion, x_0, tolerance=tolerance).log_prob
        assert (found - exact).abs().max() < 50 * tolerance


@pytest.mark.parametrize("T", [1, 3])
def test_evaluations_are_the_drifts_that_were_asked_for(T):
    schedule, _ = chain("preserving", T)
    diffusion, calls = diffusion_of(Network((2,), schedule), schedule, (2,)), []
    diffusion.reverse.denoiser.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    result = ode_log_prob(diffusion, some_data((2,))[:1], num_probes=2)
    solves = 1 if T == 1 else 2
    assert (
        abs(len(calls) - 1 - float(result.num_evaluations)) <= solves + 1
    )  # one measures memory, one looks for gradients; one a start


def test_a_float32_model_is_integrated_in_float64():
    schedule, _ = chain("preserving", 3)
    network, x_0 = Network((2,), schedule), some_data((2,))
    exact = ode_log_prob(diffusion_of(network, schedule, (2,)), x_0.float().double()).nats
    result = ode_log_prob(diffusion_of(_Halved(network), schedule, (2,)), x_0.float())
    torch.testing.assert_close(result.nats.double(), exact, atol=1e-3, rtol=0)


class _Halved(nn.Module):
    """A float64 network seen through float32."""

    def __init__(self, network):
        super().__init__()
        self.network = [network]

    def forward(self, x_t, t):
        assert x_t.dtype == torch.float32
        return self.network[0](x_t.double(), t).float()


# a decoder follows


LEVELS = 5
POINTS = np.linspace(-1, 1, LEVELS)
PROBABILITIES = {"even": np.full(LEVELS, 1 / LEVELS), "uneven": np.array([0.05, 0.3, 0.15, 0.4, 0.1])}


class LevelMean(nn.Module):
    """E[x_0 | x_t] of levels with given probabilities."""

    def __init__(self, probabilities, schedule):
        super().__init__()
        self.log_p, self.points = torch.from_numpy(np.log(probabilities)), torch.from_numpy(POINTS)
        self.schedule = schedule

    def forward(self, x_t, t):
        t = torch.as_tensor(t).expand(x_t.shape)
        a, b = self.schedule.signal(t)[..., None], self.schedule.noise(t)[..., None]
        return (self.log_p - (x_t[..., None] - a * self.points) ** 2 / (2 * b**2)).softmax(-1) @ self.points


def level_diffusion(decoder, denoiser, schedule, variance=None, prior=None):
    forward = pyrodiff.GaussianForward(schedule)
    decoder = (
        pyrodiff.DiscretizedDecoder(LEVELS) if decoder == "discretized" else pyrodiff.SoftmaxDecoder(forward, LEVELS)
    )
    reverse = pyrodiff.GaussianReverse(forward, denoiser, variance)
    return pyrodiff.Diffusion(forward, reverse, (), decoder=decoder, prior=prior)


def log_decoded(decoder, estimate, steps, x_1):
    """log p(v_k | x_1) for each k along a new last dimension, the kernel at t = 1 being N(x_0 estimated, beta_1)."""
    if decoder == "softmax":
        gain, variance = steps[0]
        log_q = oracles.log_normal(x_1[..., None], gain * POINTS, variance)
        return log_q - np.logaddexp.reduce(log_q, -1, keepdims=True)
    below = np.vectorize(lambda z: math.erfc(-z / math.sqrt(2)) / 2)
    edges = np.concatenate([[-40.0], POINTS[:-1] + 1 / (LEVELS - 1), [40.0]])
    z = (edges - estimate(x_1, 1)[..., None]) / math.sqrt(steps[0][1])
    sign = np.where(z[..., :-1] + z[..., 1:] > 0, -1, 1)
    return np.log(np.abs(below(sign * z[..., 1:]) - below(sign * z[..., :-1])) + 1e-300)


def level_bound(decoder, estimate, steps, log_top):
    """The bound of each level: the mean over x_1 ~ q(x_1 | x_0) by quadrature."""
    (gain, variance), nodes = steps[0], np.linspace(-8, 8, 161)
    weights = np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
    x_1 = gain * POINTS[:, None] + math.sqrt(variance) * nodes
    log_p = flow_log_prob(estimate, steps, x_1.reshape(-1, 1), log_top, number=20, from_one=True).reshape(x_1.shape)
    log_p = log_p + np.stack([log_decoded(decoder, estimate, steps, x_1)[k, :, k] for k in range(LEVELS)])
    log_q = oracles.log_normal(x_1, gain * POINTS[:, None], variance)
    return torch.from_numpy(-(log_p - log_q) @ weights)


@every_kind
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("decoder", ["discretized", "softmax"])
def test_where_a_decoder_follows_it_is_the_documented_bound(decoder, T, kind):
    schedule, steps = chain(kind, T)
    network = Network((), schedule)
    diffusion = level_diffusion(decoder, network, schedule)
    expected = level_bound(decoder, read(network, ()), steps, standard_top(steps))
    result = ode_log_prob(diffusion, torch.from_numpy(POINTS), num_particles=400)
    assert not far(result.estimates, expected, 5)
    assert result.estimates.shape == (400, LEVELS)
    assert (result.is_bound, result.levels) == (True, LEVELS)
    assert result.title == f"bound on -log p(x_0) of the probability flow, T = {T}"
    torch.testing.assert_close(result.noise, result.estimates.std(0) / 20)
    one = ode_log_prob(diffusion, torch.from_numpy(POINTS))
    assert one.estimates.shape == (1, LEVELS)
    assert one.noise.isnan().all()


def quantised(first, last, number):
    """A VP schedule, its steps, and q(x_T) of levels, as the prior of exact denoisers."""
    betas = oracles.linear_betas(number, first, last)
    return pyrodiff.BetaSchedule(betas), oracles.preserving_steps(betas)


@pytest.mark.parametrize("data", ["even", "uneven"])
@pytest.mark.parametrize("decoder", ["discretized", "softmax"])
def test_with_the_exact_denoiser_the_bound_is_above_the_cost_of_a_level_and_near_it(decoder, data):
    probabilities = PROBABILITIES[data]
    schedule, _ = quantised(0.002, 0.05, 300)
    a, b = float(schedule.signal(300)), float(schedule.noise(300))
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.from_numpy(probabilities)),
        torch.distributions.Normal(a * torch.from_numpy(POINTS), torch.tensor(b).double()),
    )
    denoiser = LevelMean(probabilities, schedule)
    diffusion = level_diffusion(decoder, denoiser, schedule, prior=law)
    result = ode_log_prob(diffusion, torch.from_numpy(POINTS), num_particles=30)
    gap = result.nats + torch.from_numpy(np.log(probabilities))
    assert (gap > -5 * result.noise - 1e-3).all()  # 1e-3: of the flow's own steps
    assert (gap < 5 * result.noise + 1e-3).all()  # noise of 0.045 with bins of 0.5 gives every level away


def test_probes_and_draws_of_a_bound_are_one_mean():
    schedule, _ = chain("preserving", 3)
    diffusion = diffusion_of(Network((2,), schedule), schedule, (2,), decoder=pyrodiff.DiscretizedDecoder(LEVELS))
    x_0 = torch.tensor([[0.5, -1.0], [0.0, 1.0], [1.0, 1.0]]).double()
    exact = ode_log_prob(diffusion, x_0, num_particles=300, generator=1)
    probed = ode_log_prob(diffusion, x_0, num_probes=3, num_particles=300, generator=2)
    assert probed.estimates.shape == (300, 3)
    error = (exact.noise**2 + probed.noise**2).sqrt()
    assert ((exact.nats - probed.nats).abs() <= 5 * error).all()
    assert exact.num_evaluations.shape == (3,)


class Swapped(nn.Module):
    def forward(self, x_t, t):
        return 1.5 * x_t.flip(-1)


def test_more_probes_lower_the_noise_of_a_bound():
    """With a Jacobian off the diagonal each number is what no probe tells, and noise of the mean of the probes."""
    schedule, _ = chain("preserving", 4)
    diffusion = diffusion_of(Swapped(), schedule, (2,), decoder=pyrodiff.DiscretizedDecoder(LEVELS))
    x_0 = torch.tensor([[0.5, 0.5]]).double()
    exact, one, many = (  # the same draws of x_1, which come first
        ode_log_prob(diffusion, x_0, num_probes=number, num_particles=300, tolerance=1e-5, generator=3).estimates
        for number in (0, 1, 12)
    )
    assert not far(one - exact, 0.0)
    assert not far(many - exact, 0.0)
    assert float((many - exact).var()) == pytest.approx(float((one - exact).var()) / 12, rel=0.4)


# what is said of it


def test_what_it_says_and_what_it_keeps(tmp_path):
    schedule, _ = chain("preserving", 3)
    diffusion, x_0 = diffusion_of(Network((2,), schedule), schedule, (2,)), some_data((2,))
    result = ode_log_prob(diffusion, x_0)
    lines = str(result).splitlines()
    assert lines[0] == "-log p(x_0) of the probability flow, T = 3, mean of 5 data of 2 dimensions"
    assert lines[2].startswith("-log p(x_0)")
    assert lines[2].split()[-4] == rounded(result.mean, result.standard_error).split()[0]
    assert lines[-1] == "p is a density, per unit of the data as given"
    result.save(tmp_path / "flow.npz")
    loaded = FlowLikelihood.load(tmp_path / "flow.npz")
    assert torch.equal(loaded.estimates, result.estimates)
    assert torch.equal(loaded.num_evaluations, result.num_evaluations)
    assert str(loaded) == str(result)
    levels = FlowLikelihood(torch.ones(2, 3), True, torch.Size((2,)), 5, 4, 0, torch.ones(3))
    assert str(levels).splitlines()[2].startswith("bound ")
    assert str(levels).splitlines()[-1] == "p is a probability, of 5 levels a dimension"


def small():
    schedule, _ = chain("preserving", 2)
    return diffusion_of(Network((2,), schedule), schedule, (2,))


def test_data_that_do_not_converge_are_counted_and_the_first_is_named():
    with pytest.raises(RuntimeError, match=r"did not converge for 5 of 5 data, the first number 0 .*max_steps = 1,"):
        ode_log_prob(small(), some_data((2,)), max_steps=1)

    class Broken(Network):
        def forward(self, x_t, t):
            return torch.where(x_t[:, :1] > 50, math.nan, super().forward(x_t, t))

    schedule, _ = chain("preserving", 2)
    x_0 = torch.cat([some_data((2,)), torch.tensor([[99.0, 0.0], [99.0, 1.0]]).double()])
    diffusion = diffusion_of(Broken((2,), schedule), schedule, (2,))
    with pytest.raises(RuntimeError, match=r"did not converge for 2 of 7 data, the first number 5 of its batch"):
        ode_log_prob(diffusion, x_0, max_steps=60)
    row = bytes_per_row(diffusion, x_0[:1])
    with pytest.raises(RuntimeError, match=r"the first number 5 of its batch"):
        ode_log_prob(diffusion, x_0, max_steps=60, memory_budget=8 * row)
