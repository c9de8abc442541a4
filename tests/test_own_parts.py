"""Parts of one's own: what a sampler, a schedule and a forward process have to define, and what is refused."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from exact import far, gaussian_diffusion
from loops import adam, values
from models import Network
from pyro.contrib.autoname import scope
from torch import nn

import pyrodiff

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()


class Exact(nn.Module):
    """The mean of x_0 given x_t, of data N(m, v)."""

    def __init__(self, forward):
        super().__init__()
        self.forward_process, self.m, self.v = forward, M, V

    def forward(self, x_t, t, *context):
        a, b = self.forward_process.scales(x_t, t)
        return self.m + a * self.v / (a**2 * self.v + b**2) * (x_t - a * self.m)


class DDIM(pyrodiff.Sampler):
    """Euler's method for x / a over b / a."""

    def slope(self, x_t, t, *context):
        a, b = self.chain.forward_process.scales(x_t, t)
        return (x_t - a * self.chain.reverse.denoiser(x_t, t, *context)) / b

    def step(self, x_t, t, *context):
        (a, b), (c, d) = (self.chain.forward_process.scales(x_t, when) for when in (t, t - 1))
        return c * (x_t / a + (d / c - b / a) * self.slope(x_t, t, *context))

    def last(self, x_1, t, *context):
        a, _ = self.chain.forward_process.scales(x_1, t)
        return x_1 / a  # as far as the tests follow it


class Heun(DDIM):
    """Karras et al. (2022), Algorithm 1."""

    def step(self, x_t, t, *context):
        (a, b), (c, d) = (self.chain.forward_process.scales(x_t, when) for when in (t, t - 1))
        h, slope = d / c - b / a, self.slope(x_t, t, *context)
        euler = c * (x_t / a + h * slope)
        return c * (x_t / a + h * (slope + self.slope(euler, t - 1, *context)) / 2)


def exact(T=1024):
    schedule = pyrodiff.GeometricSchedule(T, sigma_min=0.05, sigma_max=20.0)
    forward = pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, Exact(forward)).double()
    return pyrodiff.Diffusion(forward, reverse, (2,), prior=dist.Normal(torch.zeros(2).double(), 20.0).to_event(1))


@pytest.mark.parametrize(("kind", "order"), [(DDIM, 1), (Heun, 2)])
def test_a_deterministic_sampler_of_ones_own_converges_with_its_order(kind, order):
    """y(sigma) = m + (y_T - m) sqrt((v + sigma^2) / (v + sigma_T^2)), for data N(m, v)."""
    diffusion, errors, steps = exact(), [], (33, 65, 129)
    for num_steps in steps:
        times = torch.linspace(1, 1024, num_steps).round().long().tolist()
        x_T, x_0 = kind(diffusion, times=times).trajectory(50, times=(1024, 0), generator=1)
        ends = [diffusion.forward_process.schedule.noise(t) for t in (1, 1024)]
        truth = M + (x_T - M) * ((V + ends[0] ** 2) / (V + ends[1] ** 2)).sqrt()
        errors.append(float((x_0 - truth).abs().max()))
    found = math.log(errors[0] / errors[2]) / math.log(4)
    assert abs(found - order) < 0.15, (errors, found)


def test_a_sampler_of_ones_own_has_the_loop_of_all(interpreted):
    diffusion = exact(64)
    eager, compiled = Heun(diffusion, num_steps=16), Heun(diffusion, compile=True, num_steps=16)
    torch.testing.assert_close(compiled(3, generator=2), eager(3, generator=2), rtol=1e-9, atol=1e-9)
    states = eager.trajectory(3, generator=2)
    assert states.shape == (11, 3, 2)
    assert torch.equal(states[-1], eager(3, generator=2))
    assert len(interpreted) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sampler_of_fewer_steps_has_the_parts_that_the_diffusion_has_now(compiled, interpreted):
    """Written in place, replaced, put back: the samples are those of a sampler newly made."""
    diffusion = exact(32)
    sampler = pyrodiff.AncestralSampler(diffusion, compile=compiled, num_steps=8)

    def agrees():
        new = pyrodiff.AncestralSampler(diffusion, num_steps=8)(4, generator=1)
        torch.testing.assert_close(sampler(4, generator=1), new, rtol=1e-9, atol=1e-9)
        return new

    first, denoiser = agrees(), diffusion.reverse.denoiser
    diffusion.reverse.denoiser = Exact(diffusion.forward_process)
    diffusion.reverse.denoiser.m = M + 5
    assert not torch.allclose(agrees(), first)
    diffusion.reverse.variance = pyrodiff.PosteriorVariance()
    agrees()
    diffusion.reverse.denoiser, diffusion.reverse.variance = denoiser, pyrodiff.ForwardVariance()
    assert torch.equal(agrees(), first)


class Two(pyrodiff.Schedule):
    """A schedule of two methods, linear in the square of the noise."""

    def signal(self, t):
        return (1 - 0.9 * torch.as_tensor(t).double() / self.num_steps).sqrt()

    def noise(self, t):
        return (0.9 * torch.as_tensor(t).double() / self.num_steps).sqrt()


def test_a_schedule_is_its_signal_and_its_noise():
    schedule, t = Two(6), torch.arange(7)
    alpha_bar = 1 - 0.15 * t.double()
    same = pyrodiff.BetaSchedule(1 - alpha_bar[1:] / alpha_bar[:-1])
    for name in ("beta", "signal", "noise", "alpha_bar", "log_snr"):
        torch.testing.assert_close(getattr(schedule, name)(t), getattr(same, name)(t), rtol=1e-12, atol=1e-15)
        for k in range(7):
            torch.testing.assert_close(getattr(schedule, name)(k), getattr(same, name)(t)[k], rtol=1e-12, atol=1e-15)
    ours, theirs = (gaussian_diffusion(one, M, V, 0.3, 1.4) for one in (schedule, same))
    x_0 = torch.tensor([[1.0, 2.0], [0.3, -1.0]]).double()
    found = [pyrodiff.bound(one, x_0, generator=3).nats for one in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_two_diffusions_stand_in_one_program():
    schedule, x_0 = pyrodiff.LinearSchedule(3, 0.1, 0.3), torch.tensor([[1.0, 2.0]]).double().expand(200, 2)
    first, second = (gaussian_diffusion(schedule, M, V, shift, 1.4) for shift in (0.3, 0.6))

    def beside(one, other):
        def program(x):
            with scope(prefix="first"):
                one(x)
            with scope(prefix="second"):
                other(x)

        return program

    elbo = pyrodiff.DiffusionELBO()
    pair = beside(first.model, second.model), beside(first.guide, second.guide)
    both = torch.stack([elbo.differentiable_loss(*pair, x_0) for _ in range(50)])
    each = torch.stack([pyrodiff.bound(one, x_0).nats.sum() for one in (first, second) for _ in range(50)])
    assert not far(both, float(each.reshape(2, 50).mean(1).sum()), 7)  # some of the error is the expected ones'

    def clash(x):
        first.model(x)
        second.model(x)

    with pytest.raises(ValueError, match=r"plate 'data' must be .* pyro.contrib.autoname.scope"):
        elbo.loss(clash, lambda x: first.guide(x), x_0)


def test_a_sampler_keeps_its_times_and_can_be_copied():
    """Whatever becomes of the list that it was given; a generator is a sequence like any other."""
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(10))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, nn.Linear(1, 1)), (2,))
    diffusion.reverse.denoiser.forward = lambda x_t, t: x_t / 2
    times = [1, 3, 6]
    sampler, before = pyrodiff.DDIMSampler(diffusion, times=times), pyrodiff.DDIMSampler(diffusion, times=(1, 3, 6))
    expected = before(4, generator=1)
    times[:] = [2, 6]
    generated = pyrodiff.DDIMSampler(diffusion, times=(t for t in (1, 3, 6)))
    for one in (sampler, generated, copy.deepcopy(sampler)):
        assert torch.equal(one(4, generator=1), expected)
        assert one.trajectory(4, generator=1).shape == (4, 4, 2)
    again = pyrodiff.DPMSolverSampler(diffusion, num_steps=4)
    with torch.no_grad():
        forward.schedule.load_state_dict(pyrodiff.CosineSchedule(10).state_dict())
    assert torch.equal(again(4, generator=1), again(4, num_steps=4, generator=1))  # of the schedule as it is now


# A schedule of one's own that is learned

T, X = 4, torch.tensor([[0.3, -1.2], [1.1, 0.4], [-0.8, 0.9], [0.2, 1.7]])


class Learned(pyrodiff.Schedule):
    """A VP schedule whose log signal-to-noise ratios fall by learned steps."""

    def __init__(self, num_steps):
        super().__init__(num_steps)
        self.first = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.falls = nn.Parameter(torch.linspace(0.2, 0.6, num_steps - 1, dtype=torch.float64))

    def log_snr(self, t):
        falls = torch.cat([self.falls.new_zeros(1), nn.functional.softplus(self.falls)]).cumsum(0)
        line = torch.cat([self.first.new_full((1,), math.inf), self.first - falls])
        return line[torch.as_tensor(t)]

    def signal(self, t):
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def noise(self, t):
        t = torch.as_tensor(t)
        safe = torch.where(t == 0, 1.0, torch.sigmoid(-self.log_snr(t.clamp(min=1))))
        return torch.where(t == 0, 0.0, safe.sqrt())

    def beta(self, t):
        t = torch.as_tensor(t)
        return torch.where(t == 0, 0.0, self.step(t.clamp(min=1), t.clamp(min=1) - 1)[1] ** 2)


def learned(dtype=torch.float64):
    forward = pyrodiff.GaussianForward(Learned(T))
    denoiser = pyrodiff.DataPrediction(Network().to(dtype), forward)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))
    assert sum("schedule" in name for name, _ in diffusion.named_parameters()) >= 2
    return diffusion


def test_a_learned_schedule_is_one():
    schedule, t = Learned(T), torch.arange(T + 1)
    alpha_bar = schedule.alpha_bar(t).detach()
    torch.testing.assert_close(alpha_bar + schedule.noise(t).detach() ** 2, torch.ones(T + 1).double())
    torch.testing.assert_close(schedule.beta(t[1:]).detach(), 1 - alpha_bar[1:] / alpha_bar[:-1])
    assert float(schedule.beta(0).detach()) == 0


def test_a_diffusion_with_a_learned_schedule_is_verified_in_silence():
    found = pyrodiff.verify(learned(), X.double(), num_repeats=20, generator=4)
    assert found.passed, str(found)
    assert all(claim.passed for claim in found.claims), str(found)
    assert len(found.claims) == 9


def test_a_learned_schedule_is_learned_in_silence():
    diffusion = learned()
    for pair in (diffusion, diffusion.one_step()):
        svi, before = pyrodiff.SVI(pair.model, pair.guide, adam, pyrodiff.DiffusionELBO()), values(diffusion)
        for _ in range(3):
            svi.step(X.double())
        assert all(not torch.equal(*both) for both in zip(before, values(diffusion), strict=True))
    pyrodiff.bound(diffusion, X.double())
    pyrodiff.importance_bound(diffusion, X.double(), num_particles=2)
    assert pyrodiff.AncestralSampler(diffusion)(3).dtype == torch.float64
    repr(diffusion)


def test_a_learned_schedule_in_float64_does_not_keep_a_network_from_float32():
    diffusion = learned(torch.float32)
    assert diffusion.model.dtype() == torch.float32
    assert bool(pyrodiff.bound(diffusion, X).nats.isfinite().all())
    pair = diffusion.one_step()
    pyrodiff.SVI(pair.model, pair.guide, adam, pyrodiff.DiffusionELBO()).step(X)
    assert pyrodiff.AncestralSampler(diffusion)(3).dtype == torch.float32
    assert diffusion.model(num_samples=3).dtype == torch.float32
