"""Learned schedules: what they are, that the bound is what teaches them, and the best of them where it is known."""

import math
from functools import partial

import cases
import mpmath
import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import log_snr_schedule
from exact import far, gradient
from loops import adam, pair_of, same, values
from torch import nn
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

import pyrodiff
from pyrodiff import SVI, DiffusionELBO, checkpoints
from pyrodiff.process.learned import LearnedBetaSchedule, LearnedLogSNRSchedule

T, M, V = 5, 0.7, 0.3
BETAS = [0.05, 0.2, 0.1, 0.5, 0.7]
MILLION = 10**6


close = partial(cases.close, rtol=1e-12, atol=1e-14)

MAKE = {
    "betas": lambda: LearnedBetaSchedule(BETAS),
    "log SNR": partial(log_snr_schedule, T),
    "log SNR, ends kept": partial(log_snr_schedule, T, learn_ends=False),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
every_pair = pytest.mark.parametrize("one_step", [False, True], ids=["trajectory", "one step"])


class ExactMean(nn.Module):
    """E[x_0 | x_t] of N(M, V)."""

    def __init__(self, forward):
        super().__init__()
        self.process = forward

    def forward(self, x_t, t):
        a, b = self.process.scales(x_t, t)
        return M + a * V / (a**2 * V + b**2) * (x_t - a * M)


def exact(schedule, variance=None):
    forward = pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, ExactMean(forward), variance)
    return pyrodiff.Diffusion(forward, reverse, (2,))


def networked(schedule, seed=3):
    torch.manual_seed(seed)
    forward = pyrodiff.GaussianForward(schedule)
    denoiser = pyrodiff.NoisePrediction(pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))


def data(size=20, dtype=torch.float32):
    return M + math.sqrt(V) * torch.randn(size, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )


def svi_of(pair, **options):
    return SVI(pair.model, pair.guide, adam, DiffusionELBO(), **options)


# What they are: what every schedule is, is in test_schedules.py


def betas_of(schedule):
    return schedule.beta(torch.arange(1, schedule.num_steps + 1)).detach()


@pytest.mark.parametrize("seed", range(5))
def test_it_falls_whatever_its_parameters_are(seed):
    schedule = log_snr_schedule(T=200, seed=seed, shaken=5.0)
    with torch.no_grad():
        schedule.log_fall.fill_(-3.0 * seed)
    assert bool((schedule.log_snr(torch.arange(201)).diff() < 0).all())
    assert float(schedule.last.detach()) < float(schedule.first.detach())


def test_at_the_start_it_is_nearly_a_line():
    t, expected = torch.arange(1, 101), pyrodiff.LogSNRSchedule(100, 9.0, -9.0)
    for hidden in (8, 1024):
        found = LearnedLogSNRSchedule(100, 9.0, -9.0, hidden)
        assert float((found.log_snr(t) - expected.log_snr(t)).detach().abs().max()) < 0.03 * 18


@pytest.mark.parametrize("hidden", [3, 7, 100, 1024])
def test_ends_that_are_kept_are_exact_whatever_else_is_asked(hidden):
    for T in (5, 37, MILLION):
        schedule = log_snr_schedule(T, 3.3, -7.1, hidden, False)
        for size in (0, 1, 5, 17):
            t = torch.cat([torch.randint(1, T + 1, (size,)), torch.tensor([1, T])])
            assert schedule.log_snr(t).tolist()[-2:] == [3.3, -7.1]


@pytest.mark.parametrize("fixed", [0, 2, 4])
def test_betas_start_where_they_are_told(fixed):
    schedule = LearnedBetaSchedule(BETAS, fixed)
    close(schedule.betas, BETAS)
    assert betas_of(schedule)[:fixed].tolist() == BETAS[:fixed]
    assert schedule.logits.shape == (T - fixed,)


def test_of_one_step_there_is_the_first_log_snr_only():
    schedule = LearnedLogSNRSchedule(1, 2.0, -5.0, hidden=3)
    assert schedule.log_snr(1).item() == 2
    assert schedule.beta(1).item() == pytest.approx(1 / (1 + math.exp(2)))


# The bound teaches them


def expected_bound(schedule, x_0):
    """The bound on N(M, V) data in closed form, beta_t being the variance of each reverse step, with shape (B,)."""
    T = schedule.num_steps
    t = torch.arange(1, T + 1)
    alpha_bar, beta = schedule.alpha_bar(t), schedule.beta(t)
    alpha_bar_s = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    gain = alpha_bar.sqrt() * V / (alpha_bar * V + 1 - alpha_bar)
    error = (1 - gain * alpha_bar.sqrt()) ** 2 * (x_0[..., None] - M) ** 2 + gain**2 * (1 - alpha_bar)
    weight = alpha_bar_s.sqrt() * beta / (1 - alpha_bar)
    posterior = (1 - alpha_bar_s) / (1 - alpha_bar) * beta
    ratio = posterior[1:] / beta[1:]
    later = (ratio - 1 - ratio.log()) / 2 + weight[1:] ** 2 * error[..., 1:] / (2 * beta[1:])
    first = (2 * math.pi * beta[0]).log() / 2 + error[..., 0] / (2 * beta[0])
    top = (alpha_bar[-1] * (x_0**2 - 1) - (1 - alpha_bar[-1]).log()) / 2
    return (top + later.sum(-1) + first).sum(-1)


@every
@every_pair
def test_the_gradient_of_either_pair_is_that_of_the_bound_in_closed_form(make, one_step):
    diffusion, x_0 = exact(make()), data(3, torch.float64)
    schedule, pair = diffusion.forward_process.schedule, pair_of(diffusion, one_step)
    expected = gradient(expected_bound(schedule, x_0).mean(), schedule)
    many, draws, losses = x_0.repeat(400, 1), [], []
    for _ in range(30):
        loss = DiffusionELBO().differentiable_loss(pair.model, pair.guide, many) / len(many)
        losses.append(loss.detach())
        draws.append(gradient(loss, schedule))
    assert not far(torch.stack(draws), expected)
    assert not far(torch.stack(losses), expected_bound(schedule, x_0).mean().detach())
    assert float(expected.abs().min()) > 0


@pytest.mark.parametrize("name", MAKE)
@every_pair
def test_they_are_learned_and_what_is_fixed_stays_exactly(name, one_step):
    diffusion = networked(MAKE[name]())
    schedule, svi = diffusion.forward_process.schedule, svi_of(pair_of(diffusion, one_step), clip_norm=10.0)
    before, t = values(schedule), torch.tensor([1, T])
    betas, ends = betas_of(schedule), schedule.log_snr(t).detach()
    for _ in range(5):
        svi.step(data())
    assert all(not torch.equal(*both) for both in zip(before, values(schedule), strict=True))
    stay = [bool(betas_of(schedule)[0] == betas[0]), *(schedule.log_snr(t).detach() == ends).tolist()]
    assert stay == {"betas": [True, True, False], "log SNR": [False] * 3, "log SNR, ends kept": [True] * 3}[name]


@pytest.mark.parametrize("fixed", [0, 1, 3])
def test_so_many_of_the_first_betas_stay(fixed):
    diffusion = networked(LearnedBetaSchedule(BETAS, fixed=fixed))
    before = betas_of(diffusion.forward_process.schedule)
    svi_of(diffusion).step(data())
    stay = betas_of(diffusion.forward_process.schedule) == before
    assert stay.tolist() == [t < fixed for t in range(T)]


def test_frozen_noise_is_a_seed_before_each_step():
    """2015: the noise is held constant, so that the bound is a fixed function of the schedule, and falls."""
    diffusion = exact(LearnedBetaSchedule([0.3, 0.3, 0.3]))
    svi, losses = svi_of(diffusion), []
    for _ in range(40):
        pyro.set_rng_seed(1)
        losses.append(float(svi.step(data(dtype=torch.float64))))
    assert losses == sorted(losses, reverse=True)
    pyro.set_rng_seed(1)
    with torch.no_grad():
        again = DiffusionELBO().loss(diffusion.model, diffusion.guide, data(dtype=torch.float64))
    pyro.set_rng_seed(1)
    assert again == DiffusionELBO().loss(diffusion.model, diffusion.guide, data(dtype=torch.float64))


# The best


def mean_squared_error_of_x_0(snr):
    return V / (1 + V * snr)


def terms(schedule, error, t):
    """L_{t-1} of steps that are exact but for their mean, from the posterior's weights; error is a function of SNR."""
    _, weight, deviation = schedule.posterior(t)
    return weight**2 / (2 * deviation**2) * error(schedule.log_snr(t).exp())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("T", "first", "last"), [(6, 4.0, -3.0), (10, 9.0, -9.0)])
def test_the_best_signal_to_noise_ratios_are_geometric(T, first, last, seed):
    """1 + V SNR_t is, and the sum is n (r^(1/n) - 1) / 2 with r the ratio of its ends."""
    schedule, t = log_snr_schedule(T, first, last, 32, False, seed), torch.arange(2, T + 1)
    ends = 1 + V * torch.tensor([first, last], dtype=torch.float64).exp()
    best = (T - 1) / 2 * ((ends[0] / ends[1]) ** (1 / (T - 1)) - 1)
    optimizer = torch.optim.LBFGS(schedule.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = terms(schedule, mean_squared_error_of_x_0, t).sum()
        value.backward()
        return value

    start = float(optimizer.step(loss).detach())
    assert start > 1.05 * float(best)
    assert float(best) * (1 - 1e-12) < float(loss().detach()) < 1.0001 * float(best)
    geometric = ends[0].log() + torch.linspace(0, 1, T).double() * (ends[1] / ends[0]).log()
    close((1 + V * schedule.log_snr(torch.arange(1, T + 1)).exp()).log(), geometric, rtol=0.02, atol=0.02)


def test_the_terms_are_those_of_the_kernels():
    """What the test above makes least is what the bound has with the posterior's variance."""
    diffusion = exact(log_snr_schedule(T), pyrodiff.PosteriorVariance())
    x_0 = M + math.sqrt(V) * torch.randn(20000, 2, dtype=torch.float64)
    found = pyrodiff.bound(diffusion, x_0, generator=2).denoising
    expected = terms(diffusion.forward_process.schedule, mean_squared_error_of_x_0, torch.arange(2, T + 1))
    assert not far(found.T, 2 * expected.detach())


# A million steps


WEIGHTS, MEANS = np.array([0.3, 0.5, 0.2]), np.array([-1.2, 0.4, 1.5])
SPREAD = 0.15


def mixture_error(log_snr):
    """The least mean squared error of x_0 of three Gaussians, by quadrature over x_t / a_t."""
    variance = np.exp(-log_snr)
    deviation = np.sqrt(SPREAD**2 + variance)
    y = np.linspace(-2 - 10 * deviation, 2.5 + 10 * deviation, 6001)
    laws = WEIGHTS * np.exp(oracles.log_normal(y[:, None], MEANS, deviation**2))
    density = laws.sum(1)
    parts = laws / np.maximum(density, 1e-300)[:, None]
    means = MEANS + SPREAD**2 / deviation**2 * (y[:, None] - MEANS)
    mean = (parts * means).sum(1)
    within = SPREAD**2 * variance / deviation**2 + (parts * (means - mean[:, None]) ** 2).sum(1)
    return (density * within).sum() * (y[1] - y[0])


class MixtureMean(nn.Module):
    """E[x_0 | x_t] of the three."""

    def __init__(self, forward):
        super().__init__()
        self.process = forward

    def forward(self, x_t, t):
        a, b = self.process.scales(x_t, t)
        weights, means = torch.tensor(WEIGHTS), torch.tensor(MEANS)
        total = (a * SPREAD) ** 2 + b**2
        off = x_t - a * means
        parts = (weights.log() - off**2 / (2 * total)).softmax(-1)
        return (parts * (means + a * SPREAD**2 / total * off)).sum(-1, keepdim=True)


FIRST, LAST = 8.0, -5.0
SHAPES = [partial(log_snr_schedule, MILLION, FIRST, LAST, 8, False, seed, 2.0) for seed in range(3)]


@pytest.fixture(scope="module")
def continuous():
    """Half the SNR times the error as a polynomial of the log SNR, and its integral: the terms of infinitely many."""
    error = np.polynomial.Chebyshev.interpolate(
        np.vectorize(lambda log_snr: mixture_error(log_snr) * np.exp(log_snr) / 2), 100, [LAST, FIRST]
    )
    integral = error.integ()
    return error, integral(FIRST) - integral(LAST)


@pytest.mark.parametrize("make", SHAPES)
def test_the_bound_of_a_million_steps_is_the_integral_over_the_signal_to_noise_ratio(make, continuous):
    schedule, (error, integral) = make(), continuous
    total = 0.0
    with torch.no_grad():
        for t in torch.arange(2, MILLION + 1).split(100000):
            _, weight, deviation = schedule.posterior(t)
            log_snr = schedule.log_snr(t)
            fall = (weight / deviation) ** 2 * (-log_snr).exp()  # of the SNR, in parts of it
            total += float(fall.numpy() @ error(log_snr.numpy()))
    assert total == pytest.approx(integral, rel=1e-4)
    assert total > integral


def test_three_schedules_of_the_same_ends_have_one_bound(continuous):
    """And its estimates at a random t vary by what is between the ends alone."""
    component = torch.multinomial(torch.tensor(WEIGHTS), 20000, replacement=True)
    x_0 = (torch.tensor(MEANS)[component] + SPREAD * torch.randn(20000).double())[:, None]
    deviations = []
    for make in SHAPES:
        forward = pyrodiff.GaussianForward(make())
        reverse = pyrodiff.GaussianReverse(forward, MixtureMean(forward), pyrodiff.PosteriorVariance())
        pair = pyrodiff.Diffusion(forward, reverse, (1,)).one_step()
        with torch.no_grad():
            found = DiffusionELBO().terms(pair.model, pair.guide, x_0)
        assert not far(found["x_s"], continuous[1])
        deviations.append(float(found["x_s"].std()))
    assert max(deviations) > 1.05 * min(deviations)


def test_falls_of_the_log_snr_are_exact_to_nine_digits_in_a_million_steps():
    """Against forty digits: the difference of two log SNRs, of 2e-5 or so each, does not cancel too far."""
    schedule = log_snr_schedule(MILLION, 13.3, -5.0, 16, False)
    for t in (2, 1000, 333333, 777777, MILLION):
        before, now = cases.log_snrs(schedule, (t - 1, t))
        assert (schedule.log_snr(t) - schedule.log_snr(t - 1)).item() == pytest.approx(float(now - before), rel=2e-9)
        a_s = mpmath.sqrt(1 / (1 + mpmath.exp(-before)))
        expected = float(-a_s * mpmath.expm1(now - before))
        assert schedule.posterior(t)[1].item() == pytest.approx(expected, rel=2e-9)


class Largest(TorchDispatchMode):
    """The most numbers that the result of an operation has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


def test_no_tensor_of_a_step_is_as_long_as_the_chain():
    diffusion = networked(log_snr_schedule(MILLION, hidden=16))
    pair = diffusion.one_step()
    with Largest() as largest:
        gradient(DiffusionELBO().differentiable_loss(pair.model, pair.guide, data()), pair.model)
    assert largest.numel <= 2 * 20 * 16
    svi_of(pair).step(data())


# The variance of the estimate


class Steady(DiffusionELBO):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        found = self.terms(model, guide, *args, **kwargs)
        schedule = model.forward_process.schedule
        return found["x_T"].sum() + found["x_0"].sum() + schedule.steadied(found["x_s"])


def test_between_the_ends_the_gradient_is_that_of_the_squares_and_the_bounds_elsewhere():
    pair = networked(log_snr_schedule(T)).one_step()
    schedule, losses, gradients = pair.model.forward_process.schedule, [], []
    for loss in (Steady(), DiffusionELBO()):
        torch.manual_seed(2)
        losses.append(loss.differentiable_loss(pair.model, pair.guide, data()))
        found = torch.autograd.grad(losses[-1], list(pair.model.parameters()))
        gradients.append(dict(zip(names(pair), found, strict=True)))
    torch.manual_seed(2)
    costs = DiffusionELBO().terms(pair.model, pair.guide, data())["x_s"]
    between = ("line", "slopes", "offsets", "weights")
    squares = torch.autograd.grad((costs**2).sum(), [getattr(schedule, name) for name in between])
    expected = dict(zip(between, squares, strict=True))
    torch.testing.assert_close(*losses)
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, expected.get(name.split(".")[-1], gradients[1][name]), msg=name)
    assert len(expected) == 4 < len(gradients[0])


def names(pair):
    return [name if "schedule" in name else f"{name}_" for name, _ in pair.model.named_parameters()]


def test_without_a_gradient_the_steadied_loss_is_the_sum():
    schedule = log_snr_schedule(T)
    with torch.no_grad():
        assert float(schedule.steadied(torch.tensor([1.0, 2.0]))) == 3
    costs = schedule.log_snr(torch.tensor([1, T]))
    schedule.requires_grad_(False)
    assert float(schedule.steadied(costs.detach())) == float(costs.sum().detach())


def test_the_variance_of_the_estimate_falls_where_its_mean_cannot():
    """Of N(M, V) a nat of log SNR costs V SNR / (1 + V SNR): the spread is least with more times where it is more."""
    diffusion = exact(log_snr_schedule(MILLION, 5.0, -5.0, 32, False, shaken=0.1), pyrodiff.PosteriorVariance())
    pair, x_0 = diffusion.one_step(), M + math.sqrt(V) * torch.randn(5000, 2).double()

    def estimates():
        torch.manual_seed(6)
        with torch.no_grad():
            return DiffusionELBO().terms(pair.model, pair.guide, x_0)["x_s"]

    before = estimates()
    svi = SVI(pair.model, pair.guide, lambda p: torch.optim.Adam(p, lr=0.05), Steady())
    for i in range(100):
        svi.step(x_0[50 * i : 50 * i + 50])
    after = estimates()
    assert float(after.var()) < 0.8 * float(before.var())
    assert abs(float(after.mean() - before.mean())) < 5 * float((before.var() + after.var()) / 5000) ** 0.5


# Parameters like any other


@every
@every_pair
def test_a_run_goes_on_from_a_file(make, one_step, tmp_path):
    def run(seed):
        return svi_of(pair_of(networked(make(), seed), one_step), average=pyrodiff.exponential_average(0.5))

    def on(svi):
        torch.manual_seed(7)
        for _ in range(2):
            svi.step(data())
        return values(svi.model), values(svi.average.module)

    ours, theirs = run(1), run(2)
    on(ours)
    checkpoints.save(tmp_path / "run.pt", ours)
    checkpoints.restore(tmp_path / "run.pt", theirs)
    (weights, means), again = on(ours), on(theirs)
    assert same(weights, again[0])
    assert same(means, again[1])
    schedule = ours.model.forward_process.schedule
    averaged = ours.average.module.forward_process.schedule
    assert all(p.dtype == torch.float64 for p in averaged.parameters())
    assert not same(values(schedule), values(averaged))
    with ours.averaged():
        assert same(values(schedule), values(averaged))


@every
def test_a_frozen_schedule_stays(make):
    diffusion = networked(make())
    schedule = diffusion.forward_process.schedule.requires_grad_(False)
    before, network = values(schedule), values(diffusion.reverse.denoiser.network)
    svi = svi_of(diffusion)
    svi.step(data())
    assert same(before, values(schedule))
    assert not same(network, values(diffusion.reverse.denoiser.network))
    schedule.requires_grad_(True)
    svi.step(data())
    assert not same(before, values(schedule))


@pytest.mark.parametrize(("name", "one_step"), [("betas", False), ("log SNR", True), ("log SNR, ends kept", True)])
def test_a_graph_learns_as_the_programs_do(name, one_step, interpreted):
    found = []
    for compile in (False, True):
        pair = pair_of(networked(MAKE[name]()), one_step)
        svi = svi_of(pair, compile=compile)
        for seed in range(3):
            torch.manual_seed(seed)
            svi.step(data())
        found.append([betas_of(pair.model.forward_process.schedule), *values(pair.model)])
    assert len(interpreted) > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


SEEN = {
    "bound": lambda d: pyrodiff.bound(d, data(), generator=1).nats,
    "bound of some times": lambda d: pyrodiff.bound(d, data(), num_times=2, generator=1).nats,
    "bound of a sub-chain": lambda d: pyrodiff.bound(d.subchain([1, 3, T]), data(), generator=1).nats,
    "bound of a sub-chain without ends": lambda d: pyrodiff.bound(d.subchain([2, 4]), data(), generator=1).nats,
    "importance": lambda d: pyrodiff.importance_bound(d, data(), num_particles=3, generator=1).nats,
    "sampler": lambda d: pyrodiff.AncestralSampler(d)(5, generator=1),
    "sampler of fewer steps": lambda d: pyrodiff.AncestralSampler(d, num_steps=3)(5, generator=1),
    "flow": lambda d: pyrodiff.ode_log_prob(d, data(3), num_probes=0, generator=1, tolerance=1e-4).nats,
    "program": lambda d: DiffusionELBO().terms(d.model, d.guide, data())["x_0"].detach(),
}


@pytest.mark.parametrize("name", ["betas", "log SNR"])
@pytest.mark.parametrize("see", SEEN.values(), ids=SEEN)
def test_what_reads_a_schedule_reads_what_was_learned(name, see):
    """As it would a fixed schedule of these betas, before it learns and after."""
    diffusion = networked(MAKE[name]())
    for learns in (False, True):
        if learns:
            svi_of(diffusion.one_step()).step(data())
        fixed = networked(pyrodiff.BetaSchedule(betas_of(diffusion.forward_process.schedule)))
        fixed.reverse.denoiser.network.load_state_dict(diffusion.reverse.denoiser.network.state_dict())
        torch.manual_seed(4)
        found = see(diffusion)
        torch.manual_seed(4)
        torch.testing.assert_close(found, see(fixed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["betas", "log SNR"])
def test_a_diffusion_of_one_is_verified(name):
    found = pyrodiff.verify(networked(MAKE[name]()).double(), data(dtype=torch.float64), num_repeats=20, generator=4)
    assert found.passed, str(found)


# A prior on the betas


def test_a_prior_on_a_beta_has_the_posterior_of_quadrature():
    """logit beta_2 ~ N(0, 1): the best Gaussian q for p(z) exp(-bound(z)), the bound in closed form at each z."""
    schedule, x_0 = LearnedBetaSchedule([0.3, 0.5]), data(100, torch.float64)
    diffusion, zero = exact(schedule), torch.zeros(1, dtype=torch.float64)
    del schedule.logits  # no parameter from now on, but what a program sets

    def model(x_0):
        schedule.logits = pyro.sample("logit", dist.Normal(zero, 1.0).to_event(1))
        diffusion.model(x_0)

    def guide(x_0):
        loc, scale = pyro.param("loc", zero + 0), pyro.param("scale", zero + 1, constraint=constraints.positive)
        schedule.logits = pyro.sample("logit", dist.Normal(loc, scale).to_event(1))
        diffusion.guide(x_0)

    schedule.logits = zero
    svi = SVI(
        model,
        guide,
        lambda parameters: torch.optim.Adam(parameters, lr=0.15),
        DiffusionELBO(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97),
    )
    for _ in range(160):
        svi.step(x_0)

    def log_density(z):
        found = []
        for schedule.logits in z[:, None]:
            found.append(-(schedule.logits**2).sum() / 2 - expected_bound(schedule, x_0).sum())
        return torch.stack(found)

    loc, scale = best_gaussian(log_density)
    assert float(pyro.param("loc").detach()) == pytest.approx(loc, abs=0.2 * scale)
    assert float(pyro.param("scale").detach()) == pytest.approx(scale, rel=0.2)
    assert scale < 0.65
    assert abs(loc) > scale


def best_gaussian(log_density):
    """Mean and deviation of the Gaussian of least KL to a density, by quadrature and Newton's method."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(12))
    weights = weights / weights.sum()
    q = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([q], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -(weights * log_density(q[0] + q[1].exp() * nodes)).sum() - q[1]
        value.backward()
        return value

    optimizer.step(loss)
    return float(q[0].detach()), float(q[1].detach().exp())


# Bits, and bad input


@every_pair
def test_with_bits_a_schedule_is_not_learned_but_may_be_used(one_step):
    forward = pyrodiff.BinomialForward(LearnedBetaSchedule(BETAS), rate=0.3)
    denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1), forward)
    pair = pair_of(pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), (2,)), one_step)
    x_0 = (data() > M).float()
    for compile in (False, True):
        with pytest.raises(ValueError, match=r"not reparameterised.*Bits"):
            svi_of(pair, compile=compile).step(x_0)
    forward.schedule.requires_grad_(False)
    assert math.isfinite(float(svi_of(pair).step(x_0)))
