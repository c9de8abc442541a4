"""Langevin dynamics settles where its recursion says, and annealed it is Algorithm 1 of Song and Ermon (2019)."""

import math

import numpy as np
import pyro
import pytest
import torch
from exact import far
from torch import nn

import pyrodiff
from pyrodiff import AnnealedLangevinSampler, LangevinSampler, networks

M, V = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([2.0, 0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.8], dtype=torch.float64)  # Figure 6 of NCSN
CENTERS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64)


def linear(x):
    """The score of N(M, V)."""
    return (M.to(x.dtype) - x) / V.to(x.dtype)


def of_mixture(x, variance=1.0):
    """The score of the two modes."""
    off = CENTERS.to(x.dtype) - x[:, None]
    shares = torch.softmax(WEIGHTS.to(x.dtype).log() - (off**2).sum(-1) / 2 / variance, -1)
    return (shares[..., None] * off).sum(1) / variance


class GaussianData(nn.Module):
    """E[x_0 | x_t] of N(M, V), in variance exploding noise."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t):
        noise = self.schedule.noise(t)[:, None].to(x_t.dtype) ** 2
        return x_t + noise * (M.to(x_t.dtype) - x_t) / (V.to(x_t.dtype) + noise)


class Mixture(GaussianData):
    def forward(self, x_t, t):
        noise = self.schedule.noise(t)[:, None].to(x_t.dtype) ** 2
        return x_t + noise * of_mixture(x_t, 1 + noise)


class Steep(GaussianData):
    """A score as steep as the context says, at the times from `first` on, which no score of noisy data can be."""

    def __init__(self, schedule, first=1):
        super().__init__(schedule)
        self.first = first

    def forward(self, x_t, t, steepness):
        return x_t - torch.where(t[:, None] >= self.first, steepness, 0.5) * (x_t - 1)


class Network(nn.Module):
    """A network that keeps the times it is asked at."""

    def __init__(self, **options):
        super().__init__()
        self.asked, self.net = [], networks.MLP((2,), hidden=8, **options)
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x_t, t, *context):
        self.asked.append(int(t[0]))
        return self.net(x_t, t, *context)


def exploding(kind=GaussianData, T=5, low=0.3, high=4.0, dtype=torch.float64, schedule=None, **options):
    schedule = pyrodiff.GeometricSchedule(T, low, high) if schedule is None else schedule
    forward = pyrodiff.GaussianForward(schedule)
    denoiser = kind(schedule, **options) if issubclass(kind, GaussianData) else kind
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))
    diffusion.reverse.scale = nn.Parameter(torch.ones(()))  # so that the model has a dtype
    return diffusion.to(dtype)


def predicting(prediction=pyrodiff.NoisePrediction, T=5):
    torch.manual_seed(0)
    forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(T, 0.3, 4.0))
    reverse = pyrodiff.GaussianReverse(forward, prediction(Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, (2,)).double()


def recursion(mean, variance, curvature, step_size, num_updates, centre=M):
    """The law of x after updates with the score of N(centre, 1 / curvature), from a law of this mean and variance."""
    factor = 1 - step_size * curvature / 2
    for _ in range(num_updates):
        mean, variance = centre + factor * (mean - centre), factor**2 * variance + step_size
    return mean, variance


def is_law(x, mean, variance):
    """Whether points have this mean and this variance, to five standard errors."""
    return not far(x, mean) and not far((x - mean) ** 2, variance)


# Langevin dynamics


@pytest.mark.parametrize(("share", "num_updates"), [(0.05, 300), (1.0, 60), (2.0, 60), (3.6, 60)])
def test_it_settles_on_a_variance_that_is_wider_by_the_step(share, num_updates):
    """Of N(m, v) it is v / (1 - ε / 4 v): where v = (1 - ε / 2 v)^2 v + ε."""
    x = torch.cat(
        [
            LangevinSampler(lambda x, i=i: linear(torch.stack([x, x], 1))[:, i], share * float(V[i]))(
                torch.full((40000,), 1.0, dtype=torch.float64), num_updates, generator=i
            )[:, None]
            for i in range(2)
        ],
        1,
    )
    assert is_law(x, M, V / (1 - share / 4))


@pytest.mark.parametrize("num_updates", [1, 2, 7])
def test_the_law_after_some_updates_is_that_of_the_recursion(num_updates):
    start = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(40000, 2)
    x = LangevinSampler(linear, 0.4)(start, num_updates, generator=0)
    mean, variance = recursion(start[0], torch.zeros(2), 1 / V, 0.4, num_updates)
    assert is_law(x, mean, variance)
    assert torch.equal(start, torch.tensor([1.0, 2.0]).double().expand(40000, 2))  # not written into


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_4_v_on_it_diverges_and_the_error_says_so(dtype):
    """The smaller of the two variances, 0.5, bounds the step: 4 * 0.5 = 2."""
    start = torch.zeros(20, 2, dtype=dtype)
    x = LangevinSampler(linear, 1.96)(start, 2000, generator=0)
    assert bool(x.isfinite().all())
    assert x.dtype == dtype
    with pytest.raises(ValueError, match=r"step_size must .* with 2\.1 it does, after .* give less than 2$"):
        LangevinSampler(linear, 2.1)(start, 2000, generator=0)


def test_the_step_that_would_not_diverge_is_told_by_the_largest_curvature_where_it_differs():
    """Curvatures of 5, 1 and -30, of which the last repels but does not oscillate; far out it is that of 0.5."""
    A = torch.tensor([[3.0, 2.0], [2.0, 3.0]], dtype=torch.float64)  # curvatures of 1 and 5

    def score(x):
        return torch.cat([-x[..., :2] @ A, 30 * torch.tanh(x[..., 2:])], -1)

    start = torch.full((5, 4, 3), 0.01, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"give less than 0\.8$"):
        LangevinSampler(score, 0.85)(start, 2000, generator=0)
    x = LangevinSampler(score, 0.78)(start, 2000, generator=0)
    assert x.shape == start.shape
    assert bool(x.isfinite().all())
    only_one = torch.full((50, 2), 0.01)  # of many points, the one that diverges is asked
    only_one[30] = 40.0

    def bent(x):
        return torch.where(x.abs() > 20, -20 * x, -x / 2)

    with pytest.raises(ValueError, match=r"give less than 0\.2$"):
        LangevinSampler(bent, 0.25)(only_one, 200, generator=0)


@pytest.mark.parametrize(
    ("score", "step_size"),
    [
        (lambda x: -x.detach() / 2, 9.0),  # no derivative
        (lambda x: -(x**3), 0.5),  # hardly any curvature where it starts, but far out
    ],
)
def test_no_size_is_told_that_is_not_known(score, step_size):
    with pytest.raises(ValueError, match=r"it does, after .* updates: give a smaller one$"):
        LangevinSampler(score, step_size)(torch.full((400, 1), 0.01), 300, generator=0)


def test_points_that_travel_far_are_no_alarm():
    x = LangevinSampler(lambda x: (1e6 - x) * 1e-2, 1.0)(torch.zeros(3, 1), 5000, generator=0)
    assert bool(((x - 1e6).abs() < 100).all())
    walk = LangevinSampler(torch.zeros_like, 1e6)(torch.zeros(3, 1), 1000, generator=0)
    assert bool(walk.isfinite().all())


def test_a_module_is_evaluated_and_then_as_it_was_and_no_gradient_is_kept():
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2).eval())
    modes = [part.training for part in net.modules()]
    start = torch.zeros(4, 2, requires_grad=True)
    x = LangevinSampler(net, 0.1)(start, 3, generator=1)
    assert [part.training for part in net.modules()] == modes == [True, True, True, False]
    assert torch.equal(x, LangevinSampler(net.eval(), 0.1)(start, 3, generator=1))
    assert not x.requires_grad
    assert not x.is_inference()
    assert LangevinSampler(lambda x: linear(x.double()), 0.1)(start, 3).dtype == torch.float32

    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    failing = Failing()
    with pytest.raises(RuntimeError):
        LangevinSampler(failing, 0.1)(start, 3)
    assert failing.training


@pytest.mark.parametrize("seed", [3, torch.Generator().manual_seed(3)])
def test_the_draws_are_those_of_the_seed_and_the_source_is_left_alone(seed):
    def draw(one):
        return LangevinSampler(linear, 0.1)(torch.zeros(4, 2), 3, generator=one)

    pyro.set_rng_seed(0)
    before = torch.get_rng_state()
    x = draw(seed)
    assert torch.equal(torch.get_rng_state(), before)
    again = draw(seed)
    assert torch.equal(x, again) == isinstance(seed, int)  # a generator goes on
    assert not torch.equal(draw(None), draw(None))
    pyro.set_rng_seed(0)
    first = draw(None)
    pyro.set_rng_seed(0)
    assert torch.equal(first, draw(None))
    with pytest.raises(ValueError, match="step_size"):
        LangevinSampler(linear, 99.0)(torch.zeros(4, 2), 300, generator=1)


def test_a_score_may_differentiate_a_density():
    def log_p(x):
        return -((x - M) ** 2 / V).sum() / 2

    start = torch.zeros(5, 2, dtype=torch.float64)
    by_density = LangevinSampler(torch.vmap(torch.func.grad(log_p)), 0.3)
    expected = LangevinSampler(linear, 0.3)(start, 9, generator=0)
    torch.testing.assert_close(by_density(start, 9, generator=0), expected, rtol=1e-12, atol=1e-12)


# Annealed Langevin dynamics


def algorithm_1(network, sigmas, x, step_size, num_updates, noise, denoise):
    """Song and Ermon's Algorithm 1, with sigmas from the largest on, and i for the network's time."""
    calls = 0
    for sigma, t in sigmas:
        alpha = step_size * sigma**2 / sigmas[-1][0] ** 2
        for _ in range(num_updates):
            x = x + alpha / 2 * network(x, sigma, t) + np.sqrt(alpha) * next(noise)
            calls += 1
    if denoise:
        x = x + sigmas[-1][0] ** 2 * network(x, *sigmas[-1])
    return x, calls


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("times", [(1, 2, 3, 4, 5), (2, 4, 5), (1,)])
@pytest.mark.parametrize("prediction", [pyrodiff.NoisePrediction, pyrodiff.ScorePrediction])
def test_it_is_algorithm_1_letter_for_letter(monkeypatch, prediction, times, denoise):
    diffusion = predicting(prediction)
    network, num_updates, step_size = diffusion.reverse.denoiser.network, 3, 0.05
    draws = np.random.default_rng(0).normal(size=(len(times) * num_updates, 6, 2))
    given = iter(torch.from_numpy(draws))
    monkeypatch.setattr(torch, "randn_like", lambda x: next(given))
    sampler = AnnealedLangevinSampler(diffusion, step_size, num_updates, denoise, times=times)
    top, x = sampler.trajectory(6, times=(times[-1], 0), generator=1)
    assert next(given, None) is None
    asked, network.asked = network.asked, []

    def score(x, sigma, t):
        with torch.no_grad():
            output = network.eval()(torch.from_numpy(x), torch.full((6,), t)).numpy()
        return output if prediction is pyrodiff.ScorePrediction else -output / sigma

    sigmas = [(0.3 * (4.0 / 0.3) ** ((t - 1) / 4), t) for t in reversed(times)]
    expected, calls = algorithm_1(score, sigmas, top.numpy(), step_size, num_updates, iter(draws), denoise)
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-9)
    assert asked == network.asked
    assert len(asked) == len(times) * num_updates + denoise == calls + denoise


def test_the_step_sizes_are_those_of_the_chain():
    sampler = AnnealedLangevinSampler(exploding(), 0.02, 1, times=(2, 5))
    sigma = [0.3 * (4.0 / 0.3) ** 0.25, 4.0]
    expected = torch.tensor([0.02, 0.02 * sigma[1] ** 2 / sigma[0] ** 2], dtype=torch.float64)
    torch.testing.assert_close(sampler.step_sizes(torch.tensor([1, 2])), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "num_updates"), [(0.1, 4), (1.5, 2), (3.0, 3)])
def test_the_law_of_gaussian_data_is_that_of_the_recursion(share, num_updates, dtype):
    """With the exact scores, from the prior N(0, σ_T^2 + 1) on; and the last denoising is linear."""
    step_size = share * 0.3**2
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.full((2,), 1 + 4.0**2, dtype=torch.float64)
    for i in reversed(range(5)):
        sigma2 = (0.3 * (4.0 / 0.3) ** (i / 4)) ** 2
        alpha = step_size * sigma2 / 0.3**2
        mean, variance = recursion(mean, variance, 1 / (V + sigma2), alpha, num_updates)
    noisy = AnnealedLangevinSampler(exploding(dtype=dtype), step_size, num_updates, denoise=False)(40000, generator=0)
    assert noisy.dtype == dtype
    assert is_law(noisy.double(), mean, variance)
    clean = AnnealedLangevinSampler(exploding(dtype=dtype), step_size, num_updates)(40000, generator=1)
    factor = V / (V + 0.3**2)
    assert is_law(clean.double(), M + factor * (mean - M), factor**2 * variance)


def test_the_states_of_a_trajectory_are_those_that_the_updates_start_from():
    sampler = AnnealedLangevinSampler(exploding(), 0.05, 3)
    states = sampler.trajectory(40000, times=(5, 4, 0), generator=0)
    top = torch.full((2,), 17.0, dtype=torch.float64)
    assert is_law(states[0], 0, top)
    alpha = 0.05 * (4.0 / 0.3) ** 2
    assert is_law(states[1], *recursion(torch.zeros(2), top, 1 / (V + 16), alpha, 3))
    assert torch.equal(states[2], sampler(40000, generator=0))


# Figure 6


def small_mode(x):
    """The share of points that lie with the mode of weight 1/5, and its standard error."""
    share = float((((x[:, None] - CENTERS.to(x.dtype)) ** 2).sum(-1).argmin(1) == 0).double().mean())
    return share, math.sqrt(share * (1 - share) / len(x))


def share_by_quadrature():
    """Where Langevin dynamics ends from U[-8, 8]^2 that does not cross back: by the scale function of the diffusion.

    Along (1, 1) / √2 the law is a mixture on a line, and across it one Gaussian, so that which mode is met first is
    a matter of u = (x_1 + x_2) / √2: of the right one with probability h(u) = ∫_-c^u 1/p / ∫_-c^c 1/p.
    """
    c = 5 * math.sqrt(2)
    u = np.linspace(-c, c, 20001)
    p = 0.2 * np.exp(-((u + c) ** 2) / 2) + 0.8 * np.exp(-((u - c) ** 2) / 2)
    h = np.cumsum(1 / p) / np.sum(1 / p)
    side = np.linspace(-8, 8, 1601)
    start = (side[:, None] + side[None]) / math.sqrt(2)
    return float(1 - np.interp(start, u, h, left=0, right=1).mean())


def test_langevin_dynamics_does_not_find_the_weights_of_two_modes():
    """Not 1/5 but nearly 1/2, and just as much as starts on that side: 0.491."""
    start = 16 * torch.rand(8000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 8
    x = LangevinSampler(of_mixture, 0.02)(start, 600, generator=0)
    share, error = small_mode(x)
    expected = share_by_quadrature()
    assert abs(expected - 0.49) < 0.01
    assert abs(share - expected) < 5 * error
    assert share - 0.2 > 40 * error
    inside = x[(x - CENTERS[1]).norm(dim=1) < 6]
    assert is_law(inside, CENTERS[1], torch.full((2,), 1 / (1 - 0.02 / 4), dtype=torch.float64))  # within it is right


def test_annealed_it_does():
    """From σ = 20 to 0.1: 0.2, with the same scores. In half as many levels it is 0.206 ± 0.003."""
    diffusion = exploding(Mixture, T=40, low=0.1, high=20.0)
    x = AnnealedLangevinSampler(diffusion, 0.2 * 0.1**2, 100)(3000, generator=0)
    share, error = small_mode(x)
    assert abs(share - 0.2) < 5 * error
    assert error < 0.01


def test_a_decoder_is_not_asked():
    diffusion = exploding()
    levels = pyrodiff.Diffusion(
        diffusion.forward_process, diffusion.reverse, (2,), pyrodiff.DiscretizedDecoder(9)
    ).double()
    ours, theirs = (AnnealedLangevinSampler(one, 0.05, 2)(3, generator=0) for one in (diffusion, levels))
    assert torch.equal(ours, theirs)


# What is refused


@pytest.mark.parametrize("first", [1, 3])
def test_states_that_diverge_are_told_with_the_time_and_the_step_that_would_not(first):
    """s = -50 (x - m) / σ^2 of one datum, at every t from `first` on: stable below ε = 4 σ_1^2 / 50 = 0.0072."""
    diffusion, y = exploding(Steep, first=first), torch.ones(20, 1, dtype=torch.float64)
    y[12] = 50.0
    with pytest.raises(ValueError, match=r"with 0\.009 it does, in the updates of t = 5: .* less than 0\.0072$"):
        AnnealedLangevinSampler(diffusion, 0.009, 300)(20, y, generator=0)
    for size, steepness in ((0.007, y), (0.009, y[:1])):
        x = AnnealedLangevinSampler(diffusion, size, 300)(20, steepness, generator=0)
        assert bool(x.isfinite().all())


def test_states_that_diverge_at_the_last_noise_are_told_too():
    schedule = pyrodiff.GeometricSchedule(3, 0.3, 4.0)

    class Last(GaussianData):
        def forward(self, x_t, t):
            return x_t - torch.where(t[:, None] == 1, 50.0, 0.5) * (x_t - 1)

    with pytest.raises(ValueError, match=r"in the updates of t = 1: .* less than 0\.0072$"):
        AnnealedLangevinSampler(exploding(Last, schedule=schedule), 0.009, 300)(20, generator=0)


def test_a_denoiser_that_is_not_finite_is_told_as_such():
    class NotANumber(GaussianData):
        def forward(self, x_t, t):
            return x_t * torch.where(t[:, None] == 2, math.nan, 1.0)

    with pytest.raises(ValueError, match="denoiser must return finite numbers, but at t = 2"):
        AnnealedLangevinSampler(exploding(NotANumber), 0.009, 3)(20, generator=0)


def test_the_noise_is_looked_at_again_where_it_may_be_another():
    """A chain of other times, or a schedule whose table was written anew."""
    diffusion = exploding()
    sampler = AnnealedLangevinSampler(diffusion, 1.0, 1, times=(3, 5))  # 4 * 0.3^2 = 0.36 < 1 < 4 * 1.2 = 4.8
    assert sampler(3).shape == (3, 2)
    with pytest.raises(ValueError, match=r"step_size must be below .* = 0\.36, .* but it is 1;"):
        sampler(3, num_steps=5)
    sampler = AnnealedLangevinSampler(diffusion, 0.3, 1)
    diffusion.forward_process.schedule._table[2, 1] = 0.2
    with pytest.raises(ValueError, match=r"step_size must be below .* = 0\.16"):
        sampler.trajectory(3)


def test_the_points_that_are_given_stay_as_they_are():
    x = torch.ones(3, 2)
    LangevinSampler(lambda x: x.neg_(), 0.1)(x, 1)
    assert torch.equal(x, torch.ones(3, 2))
