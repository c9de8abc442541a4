"""The one-step pair with a loss of the noise's squared error: NCSN's, and any other, against its own arithmetic."""

import math
import warnings

import pyro
import pytest
import torch
from exact import far, gradient, repeat
from torch import nn

import pyrodiff

T = 6
SCHEDULES = {
    "exploding": pyrodiff.GeometricSchedule(T, 0.2, 5.0),
    "preserving": pyrodiff.LinearSchedule(T, 0.05, 0.5),
}
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)
every_prediction = pytest.mark.parametrize(
    "prediction", [pyrodiff.ScorePrediction, pyrodiff.NoisePrediction, pyrodiff.DataPrediction]
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x_t, t):
        return torch.tanh(self.layer(torch.cat([x_t, t[..., None] / T], -1)))


def diffusion_of(kind, prediction=pyrodiff.ScorePrediction, **options):
    forward = pyrodiff.GaussianForward(SCHEDULES[kind])
    reverse = pyrodiff.GaussianReverse(forward, prediction(Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, (2,), **options)


def score_of(diffusion, x_t, t):
    """The score that the network stands for, by Tweedie's formula from x_0."""
    a, b = (c[:, None] for c in diffusion.forward_process.schedule.scales(t))
    return (a * diffusion.reverse.denoiser(x_t, t) - x_t) / b**2


def loss_of_all(diffusion, weight, x_0, epsilon):
    """The sum over t of weight(t) times half the squared error of the score, datum by datum."""
    total = 0.0
    for t in range(1, T + 1):
        times = torch.full((len(x_0),), t)
        a, b = diffusion.forward_process.schedule.scales(t)
        x_t = a * x_0 + b * epsilon[t - 1]
        error = score_of(diffusion, x_t, times) + epsilon[t - 1] / b
        total = total + weight(times) * (error**2).sum(1) / 2
    return total


class EveryTime(pyrodiff.UniformDrawing):
    """Datum i has the time i mod T + 1: of each T data, each time once."""

    def forward(self, u, num_steps):
        t = torch.arange(u.numel()).reshape(u.shape) % num_steps + 1
        return t, torch.full_like(u, 1 / num_steps)


@every_schedule
@every_prediction
@pytest.mark.parametrize("validate", [True, False])
def test_its_loss_is_the_sum_of_denoising_score_matching_at_all_noises(kind, prediction, validate):
    """NCSN's Eq. 6 times the number of levels, value and gradient, with Pyro's messages and without."""
    diffusion, x = diffusion_of(kind, prediction), torch.randn(1, 2).double()
    schedule = diffusion.forward_process.schedule
    weighting = pyrodiff.ScoreWeighting(lambda t: schedule.noise(t) ** 2)
    pair, copies = diffusion.one_step(EveryTime(), weighting), 25
    x_0, elbo = x.expand(copies * T, 2), pyrodiff.DiffusionELBO()
    prior = torch.distributions.kl_divergence(diffusion.forward_process.marginal(x_0, T), diffusion.model.top(x.dtype))

    def drawn(seed):
        pyro.set_rng_seed(seed)
        with pyro.validation_enabled(validate):
            loss = (elbo.differentiable_loss(pair.model, pair.guide, x_0) - prior.sum()) / copies / T
        return torch.cat([loss[None], gradient(loss, diffusion)]).detach()

    def expected(seed):
        torch.manual_seed(1000 + seed)
        epsilon = torch.randn(T, copies, 2).double()
        loss = loss_of_all(diffusion, lambda t: schedule.noise(t) ** 2, x.expand(copies, 2), epsilon).mean()
        return torch.cat([loss[None], gradient(loss, diffusion)]).detach()

    draws = torch.stack([drawn(seed) - expected(seed) for seed in range(20)])
    assert not far(draws, 0.0)


@every_schedule
def test_each_datum_costs_the_error_of_the_score_at_its_own_time(kind):
    """Draw for draw: the site's cost is weight / (2 p) times the squared error at the t and x_t that were drawn."""
    diffusion = diffusion_of(kind)
    schedule = diffusion.forward_process.schedule
    pair = diffusion.one_step(pyrodiff.UniformDrawing(), pyrodiff.ScoreWeighting(lambda t: 0.1 * t.double()))
    x_0 = torch.randn(9, 2).double()
    guide = pyro.poutine.trace(pair.guide).get_trace(x_0)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(x_0)
    t, x_t = (guide.nodes["u"]["value"] * T).long() + 1, guide.nodes["x_t"]["value"]
    site = model.nodes["noise"]
    cost = -site["scale"] * site["fn"].log_prob(site["value"])
    a, b = (c[:, None] for c in schedule.scales(t))
    error = score_of(diffusion, x_t, t) + (x_t - a * x_0) / b**2
    torch.testing.assert_close(cost, 0.1 * t.double() * T * (error**2).sum(1) / 2, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(site["value"], (x_t - a * x_0) / b, rtol=1e-9, atol=1e-9)


def test_the_bounds_own_step_costs_nothing():
    diffusion = diffusion_of("exploding")
    pair = diffusion.one_step(weighting=pyrodiff.ScoreWeighting(lambda t: torch.ones(t.shape)))
    terms = pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, torch.randn(20, 2).double())
    assert set(terms) == {"x_T", "x_s", "x_0", "noise"}
    assert not terms["x_s"].any()
    assert not terms["x_0"].any()


class Both(pyrodiff.NoiseWeighting):
    """Twice the squared error, and half of the bound."""

    def forward(self, t):
        return torch.full(t.shape, 0.5)

    def noise(self, t, schedule):
        return 2 * torch.ones(t.shape) / schedule.num_steps


@pytest.mark.parametrize("validate", [True, False])
def test_one_of_ones_own_weighs_both_as_it_says(validate):
    """In the mean it is 2 E ||eps - eps_hat||^2 and half of the bound's steps."""
    diffusion, x_0 = diffusion_of("preserving"), torch.randn(4000, 2).double()
    pair, elbo, schedule = diffusion.one_step(weighting=Both()), pyrodiff.DiffusionELBO(), SCHEDULES["preserving"]
    with pyro.validation_enabled(validate):
        draws = repeat(20, lambda: elbo.loss(pair.model, pair.guide, x_0) / len(x_0))
    bound = pyrodiff.bound(diffusion, x_0, num_particles=10, generator=1)
    t = torch.randint(1, T + 1, (10, len(x_0)))
    squares = []
    for times in t:
        a, b = (c[:, None] for c in schedule.scales(times))
        epsilon = torch.randn_like(x_0)
        error = epsilon + b * score_of(diffusion, a * x_0 + b * epsilon, times)
        squares.append((error**2).sum(1).detach())
    expected = 2 * torch.stack(squares).mean(0) + 0.5 * (bound.nats - bound.prior) + bound.prior
    error = math.hypot(draws.std() / 20**0.5, expected.std() / len(x_0) ** 0.5)
    assert abs(draws.mean() - expected.mean()) < 5 * error


@pytest.mark.parametrize(
    ("schedule", "shift", "warns"),
    [
        (pyrodiff.LinearSchedule(T, 0.05, 0.5), 3.0, True),
        (pyrodiff.GeometricSchedule(T, 0.1, 50.0), 3.0, False),
        (pyrodiff.GeometricSchedule(T, 0.1, 5.0), 3.0, True),
    ],
)
def test_data_far_from_the_prior_are_warned_of_unless_the_noise_is_far_beyond_them(schedule, shift, warns):
    forward = pyrodiff.GaussianForward(schedule)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Network()), (2,))
    pair, x_0 = diffusion.one_step(), shift + torch.randn(50, 2).double()
    svi = pyrodiff.SVI(pair.model, pair.guide, torch.optim.Adam, pyrodiff.DiffusionELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(x_0)
    assert any("far from 0 and 1" in str(one.message) for one in caught) == warns


def test_a_learned_schedule_is_not_trained_by_what_is_no_bound():
    forward = pyrodiff.GaussianForward(pyrodiff.LearnedBetaSchedule([0.1, 0.2, 0.4]))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Network()), (2,))
    for weighting in (pyrodiff.HybridWeighting(), pyrodiff.SimpleWeighting(diffusion.reverse)):
        with pytest.raises(ValueError, match="weighting must be the bound's where the schedule is learned"):
            diffusion.one_step(weighting=weighting)
    forward.schedule.requires_grad_(False)
    diffusion.one_step(weighting=pyrodiff.HybridWeighting())
