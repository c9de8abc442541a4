"""Samplers that read the denoiser: orders measured, formulas in numpy, laws by standard errors, and what is refused."""

import functools
import math
from itertools import pairwise

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from exact import EightGaussians, Gaussian, GaussianPosterior, far
from torch import nn

import pyrodiff
from pyrodiff import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, PredictorCorrectorSampler

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
SCHEDULES = {
    "log SNR": lambda T: pyrodiff.LogSNRSchedule(T, 8.0, -8.0),
    "linear": lambda T: pyrodiff.LinearSchedule(T, 0.1 / T, 20 / T),
    "geometric": lambda T: pyrodiff.GeometricSchedule(T, 0.05, 20.0),
    "reciprocal": pyrodiff.ReciprocalSchedule,
}
SOLVERS = {"DDIM": DDIMSampler, "DPM-Solver++": DPMSolverSampler, "Heun": HeunSampler}
ALL = {
    **SOLVERS,
    "DDIM, eta": lambda diffusion, **options: DDIMSampler(diffusion, 0.5, **options),
    "churn": lambda diffusion, **options: HeunSampler(diffusion, churn=3.0, **options),
    "corrector": lambda diffusion, **options: PredictorCorrectorSampler(diffusion, **options),
}
every_solver = pytest.mark.parametrize("kind", SOLVERS.values(), ids=SOLVERS)
every_sampler = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


class Mean(nn.Module):
    """E[x_0 | x_t] of N(m, v); a context is added to it."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def forward(self, x_t, t, *context):
        (a, b), m, v = self.data.coefficients(t), self.data.m, self.data.v
        return m + a * v / (a**2 * v + b**2) * (x_t - a * m) + sum(context)


def gaussian(schedule="log SNR", T=65, exact=False):
    """N(m, v), diffused, with the exact denoiser and q(x_T) for a prior; if so asked with the exact kernel too."""
    schedule = SCHEDULES[schedule](T)
    data, forward = Gaussian(M, V, schedule).requires_grad_(False), pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, Mean(data), pyrodiff.PosteriorVariance())
    if exact:
        reverse = GaussianPosterior(data)
        reverse.denoiser = Mean(data)
    return pyrodiff.Diffusion(forward, reverse, (2,), prior=data)


def eight(schedule, T):
    schedule = SCHEDULES[schedule](T)
    forward = pyrodiff.GaussianForward(schedule)
    scale = torch.hypot(*schedule.scales(T))
    prior = dist.Normal(torch.zeros(2).double(), scale).to_event(1)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, EightGaussians(schedule)), (2,), prior=prior)


def network(schedule=None, T=12, outputs=None, dtype=torch.float64, decoder=None, variance=None):
    """A small network, not trained but not zero."""
    forward = pyrodiff.GaussianForward(schedule or pyrodiff.LinearSchedule(T, 0.02, 0.4))
    options = {} if outputs is None else {"outputs": outputs}
    inner = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1, **options)
    nn.init.normal_(inner.outlet.weight, std=0.3)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(inner, forward), variance)
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=decoder).to(dtype)


def slopes(kind, diffusion, truth, numbers):
    """The order found between each number of steps and the next."""
    T, errors = diffusion.num_steps, []
    for num_steps in numbers:
        x_T, x_1 = kind(diffusion, num_steps=num_steps).trajectory(20, times=(T, 1), generator=1)
        errors.append(float((x_1 - truth(x_T)).square().mean().sqrt()))
    return [math.log2(before / after) for before, after in pairwise(errors)]


# Orders


@pytest.mark.parametrize("schedule", ["log SNR", "linear", "geometric"])
@every_solver
def test_the_order_is_that_of_the_error_on_gaussian_data(kind, schedule):
    """x_1 = m_1 + (x_T - m_T) (v_1 / v_T)^(1/2), with m_t, v_t the moments of q(x_t)."""
    diffusion = gaussian(schedule, 4097)
    (m_T, v_T), (m_1, v_1) = (diffusion.model.prior.moments(t) for t in (4097, 1))
    found = slopes(kind, diffusion, lambda x_T: m_1 + (x_T - m_T) * (v_1 / v_T).sqrt(), (129, 257, 513))
    assert all(abs(slope - kind(diffusion).order) < 0.2 for slope in found), found


@functools.cache
def ends_of_eight(schedule):
    diffusion = eight(schedule, 2049)
    return diffusion, HeunSampler(diffusion).trajectory(20, times=(2049, 1), generator=1)


@pytest.mark.parametrize("schedule", ["log SNR", "geometric"])
@every_solver
def test_the_order_is_that_of_the_error_on_eight_gaussians(kind, schedule):
    """Against Heun's method in all 2049 steps, whose own error is a hundred times smaller."""
    diffusion, (start, end) = ends_of_eight(schedule)

    def truth(x_T):
        assert torch.equal(x_T, start)
        return end

    found = slopes(kind, diffusion, truth, (65, 129, 257))
    assert all(abs(slope - kind(diffusion).order) < 0.2 for slope in found), found


def test_what_draws_has_no_order_and_what_does_not_says_its_own():
    diffusion = gaussian()
    orders = [DDIMSampler(diffusion, 0.3), HeunSampler(diffusion, churn=1), PredictorCorrectorSampler(diffusion)]
    assert [sampler.order for sampler in orders] == [None, None, None]
    orders = [DDIMSampler(diffusion), DPMSolverSampler(diffusion, 1), DPMSolverSampler(diffusion)]
    assert [sampler.order for sampler in orders] == [1, 1, 2]
    assert HeunSampler(diffusion).order == 2


# Formulas, in numpy


class Arithmetic:
    """Signal, noise and the exact denoiser at the times 1..K of a chain and at no others, in numpy."""

    def __init__(self, schedule, times):
        self.a, self.b = ([None, *(float(part(t)) for t in times)] for part in (schedule.signal, schedule.noise))
        self.m, self.v = M.numpy(), V.numpy()

    def x_0(self, x, k):
        a, b = self.a[k], self.b[k]
        return self.m + a * self.v / (a**2 * self.v + b**2) * (x - a * self.m)


TIMES = (1, 4, 9, 23, 40, 65)


def run(kind, schedule):
    """A trajectory of all states, and the arithmetic of its chain."""
    diffusion = gaussian(schedule)
    states = kind(diffusion, times=TIMES).trajectory(5, times=(*TIMES[::-1], 0), generator=3).numpy()
    return dict(zip(range(6, -1, -1), states, strict=True)), Arithmetic(diffusion.forward_process.schedule, TIMES)


@every_schedule
def test_ddim_is_equation_12(schedule):
    for kind in (DDIMSampler, lambda diffusion, **options: DPMSolverSampler(diffusion, order=1, **options)):
        x, of = run(kind, schedule)
        for k in range(6, 1, -1):
            x_0 = of.x_0(x[k], k)
            noise = (x[k] - of.a[k] * x_0) / of.b[k]
            close(x[k - 1], of.a[k - 1] * x_0 + of.b[k - 1] * noise)
        close(x[0], of.x_0(x[1], 1))


@every_schedule
def test_dpm_solver_is_algorithm_2_of_lu(schedule):
    """With lambda half the log SNR, h_i its rise and r_i = h_(i-1) / h_i."""
    x, of = run(DPMSolverSampler, schedule)
    with np.errstate(divide="ignore"):
        lam = [None, *np.log(np.array(of.a[1:]) / np.array(of.b[1:]))]
    for k in range(6, 1, -1):
        h, D = lam[k - 1] - lam[k], of.x_0(x[k], k)
        if k < 6:
            r = (lam[k] - lam[k + 1]) / h
            D = (1 + 1 / (2 * r)) * D - 1 / (2 * r) * of.x_0(x[k + 1], k + 1)
        close(x[k - 1], of.b[k - 1] / of.b[k] * x[k] - of.a[k - 1] * (np.exp(-h) - 1) * D)
    close(x[0], of.x_0(x[1], 1))


@pytest.mark.parametrize("schedule", ["log SNR", "linear", "geometric"])
def test_heun_is_algorithm_1_of_karras(schedule):
    """In y = x / a at the times sigma = b / a, where dy / d sigma = (y - D) / sigma."""
    x, of = run(HeunSampler, schedule)
    for k in range(6, 1, -1):
        sigma, after, y = of.b[k] / of.a[k], of.b[k - 1] / of.a[k - 1], x[k] / of.a[k]
        d = (y - of.x_0(x[k], k)) / sigma
        euler = y + (after - sigma) * d
        d_after = (euler - of.x_0(of.a[k - 1] * euler, k - 1)) / after
        close(x[k - 1], of.a[k - 1] * (y + (after - sigma) * (d + d_after) / 2))
    close(x[0], of.x_0(x[1], 1))


def step(sampler, x_t, t):
    """One step, of states that are all at a time of the chain."""
    with torch.no_grad():
        return sampler.step(x_t, torch.full((len(x_t),), t))


@every_schedule
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_moments_of_a_step_are_those_of_equation_12(eta, schedule):
    """sigma^2 = eta^2 (b_s^2 / b_t^2) (1 - alpha_bar_t / alpha_bar_s), with b_t^2 - (a_t / a_s)^2 b_s^2 in general."""
    diffusion, n = gaussian(schedule), 40000
    sampler, of = DDIMSampler(diffusion, eta, times=TIMES), Arithmetic(diffusion.forward_process.schedule, TIMES)
    for k in (6, 3, 2):
        x_t = torch.tensor([[0.4, -2.0]]).double()
        x_0, ratio = of.x_0(x_t.numpy(), k), of.a[k] / of.a[k - 1]
        variance = eta**2 * (of.b[k - 1] / of.b[k]) ** 2 * (of.b[k] ** 2 - ratio**2 * of.b[k - 1] ** 2)
        noise = (x_t.numpy() - of.a[k] * x_0) / of.b[k]
        mean = torch.as_tensor(of.a[k - 1] * x_0 + np.sqrt(of.b[k - 1] ** 2 - variance) * noise)
        x_s = step(sampler, x_t.expand(n, 2), k)
        assert not far(x_s, mean[0])
        assert not far((x_s - mean) ** 2, variance)
        assert not far((x_s - mean).prod(-1), 0.0)


@every_schedule
def test_ddim_with_eta_one_draws_as_the_chain_of_posterior_variances_does(schedule):
    """Seeded alike, in the same draws; but for the last step, where DDIM takes the mean."""
    diffusion = gaussian(schedule, 33)
    for options in ({}, {"num_steps": 9}):
        both = [
            sampler.trajectory(6, times=(33, 1), generator=2)
            for sampler in (DDIMSampler(diffusion, 1.0, **options), AncestralSampler(diffusion, **options))
        ]
        close(*both, 1e-9)


def test_samples_of_ddim_with_eta_one_have_the_moments_of_ancestral_ones():
    diffusion, n = gaussian("linear", 33), 40000
    ours = DDIMSampler(diffusion, 1.0).trajectory(n, times=(5, 1), generator=1)
    theirs = AncestralSampler(diffusion).trajectory(n, times=(5, 1), generator=2)
    for x, y in zip(ours, theirs, strict=True):
        for power in (1, 2):
            assert not far(x**power - y**power, 0.0)


# Laws


@pytest.mark.parametrize("schedule", ["log SNR", "geometric"])
def test_churn_leaves_the_law_as_it_is(schedule):
    """Of data N(m, v): in 64 of 2049 steps the flow is nearly exact, and half the noise is drawn anew many times."""
    n = 5000
    diffusion = gaussian(schedule, 2049)
    sampler = HeunSampler(diffusion, churn=20.0, num_steps=128)
    x_T, x_1 = sampler.trajectory(n, times=(2049, 1), generator=1)
    mean, variance = diffusion.model.prior.moments(1)
    assert not far(x_1, mean)
    assert not far((x_1 - mean) ** 2, variance)
    still = HeunSampler(diffusion, num_steps=128).trajectory(n, times=(2049, 1), generator=1)[1]
    for one, correlated in ((x_1, False), (still, True)):
        together = ((x_T - x_T.mean(0)) * (one - mean)).mean(0) / (x_T.std(0) * variance.sqrt())
        assert bool((together.abs() > 0.9).all() if correlated else (together.abs() < 0.5).all()), together


@pytest.mark.parametrize("schedule", ["log SNR", "geometric", "learned"])
@pytest.mark.parametrize(
    ("churn", "options"),
    [
        (2.0, {}),
        (100.0, {}),
        (3.0, {"churn_from": 0.3, "churn_to": 5.0}),
        (3.0, {"churn_noise": 1.5}),
    ],
)
def test_a_churned_step_is_algorithm_2_of_karras(churn, options, schedule, monkeypatch):
    """Nearest time by a search through all; y_u = y_t + (sigma_u^2 - sigma_t^2)^(1/2) S_noise z; then Heun's step."""
    monkeypatch.setitem(SCHEDULES, "learned", lambda T: pyrodiff.LearnedLogSNRSchedule(T, 6.0, -6.0, hidden=4))
    diffusion, T, K = gaussian(schedule, 129), 129, 17
    sampler = HeunSampler(diffusion, churn, num_steps=K, **options)
    diffusion.requires_grad_(False)
    whole, times = diffusion.forward_process.schedule, sampler.chain.forward_process.schedule.times
    of = Arithmetic(whole, range(1, T + 1))
    sigma = np.array([np.inf, *(b / a for a, b in zip(of.a[1:], of.b[1:], strict=True))])
    x_t = torch.randn(4, 2, dtype=torch.float64)
    changed = 0
    for k in (17, 16, 9, 4, 2):
        t, s = times[k - 1], times[k - 2]
        u = t
        if options.get("churn_from", 0) <= sigma[t] <= options.get("churn_to", math.inf):
            rise = 1 + min(churn / K, math.sqrt(2) - 1)
            u = 1 + int(np.abs(sigma[1:] - rise * sigma[t]).argmin())
        changed += u != t
        torch.manual_seed(k)
        found = step(sampler, x_t, k)
        torch.manual_seed(k)
        z = torch.randn_like(x_t).numpy() * options.get("churn_noise", 1.0)
        y = x_t.numpy() / of.a[t] + np.sqrt(max(sigma[u] ** 2 - sigma[t] ** 2, 0)) * z
        d = (y - of.x_0(of.a[u] * y, u)) / sigma[u]
        euler = y + (sigma[s] - sigma[u]) * d
        d_after = (euler - of.x_0(of.a[s] * euler, s)) / sigma[s]
        close(found, of.a[s] * (y + (sigma[s] - sigma[u]) * (d + d_after) / 2), 1e-8)
    assert changed == (4 if "churn_from" not in options else changed)
    assert changed > 0


@pytest.mark.parametrize("schedule", ["log SNR", "geometric"])
@pytest.mark.parametrize("num_corrections", [1, 3])
def test_corrections_change_the_law_by_what_is_known(schedule, num_corrections):
    """x' = x + d s(x) + (2 d)^(1/2) z of N(m, v) has the mean m, and the variance v (1 - d / v)^2 + 2 d.

    The predictor is exact here, so that the law before is q(x_s); d follows from the mean norm of the score.
    """
    diffusion, n, r = gaussian(schedule, 65, exact=True), 40000, 0.3
    data, process = diffusion.model.prior, diffusion.forward_process
    sampler = PredictorCorrectorSampler(diffusion, r, num_corrections)
    for t in (65, 30, 2):
        mean, variance = data.moments(t - 1)
        x_t = data.law(t).sample((n,))
        x_s = step(sampler, x_t, t)
        signal, before = float(process.schedule.signal(t - 1)), float(process.schedule.signal(t - 2))
        expected = variance
        for _ in range(num_corrections):
            score = torch.randn(400000, 2, dtype=torch.float64) * expected.sqrt() / variance
            norm = float(score.norm(dim=1).mean())
            size = 2 * (signal / before) ** 2 * r**2 * 2 / norm**2
            expected = expected * (1 - size / variance) ** 2 + 2 * size
        assert not far(x_s, mean)
        assert not far((x_s - mean) ** 2, expected, 6)  # some of the error is the norm's
        assert bool((expected > 1.002 * variance).all())


def test_a_correction_is_algorithm_4_of_song():
    """In numpy, from the same draws; alpha_s = a_s^2 / a_(s-1)^2, in a chain of fewer steps that of this chain."""
    for schedule in SCHEDULES:
        diffusion, r = gaussian(schedule), 0.2
        sampler, of = PredictorCorrectorSampler(diffusion, r, times=TIMES), None
        of = Arithmetic(diffusion.forward_process.schedule, TIMES)
        x_t = torch.randn(7, 2, dtype=torch.float64)
        for k in (6, 3, 2):
            torch.manual_seed(k)
            found = step(sampler, x_t, k)
            torch.manual_seed(k)
            x = sampler.chain.reverse(x_t, torch.full((7,), k)).sample().numpy()
            z = torch.randn_like(x_t).numpy()
            score = (of.a[k - 1] * of.x_0(x, k - 1) - x) / of.b[k - 1] ** 2
            alpha = (of.a[k - 1] / (of.a[k - 2] if k > 2 else 1.0)) ** 2
            size = 2 * alpha * (r * math.sqrt(2) / np.linalg.norm(score, axis=1).mean()) ** 2
            close(found, x + size * score + np.sqrt(2 * size) * z)


@pytest.mark.parametrize("schedule", ["log SNR", "geometric"])
def test_corrections_repair_a_chain_of_few_steps(schedule):
    """Data N(m, v) in 12 steps: variances of the posterior are too small, and the corrector makes up for most of it."""
    diffusion, n = gaussian(schedule, 257), 20000
    mean, variance = diffusion.model.prior.moments(1)
    errors = []
    for sampler in (
        AncestralSampler(diffusion, num_steps=12),
        PredictorCorrectorSampler(diffusion, 0.16, 8, num_steps=12),
    ):
        x_1 = sampler.trajectory(n, times=(1,), generator=1)[0]
        errors.append((((x_1 - mean) ** 2).mean(0) / variance - 1).abs().max())
    assert errors[1] < errors[0] / 2, errors


class Nothing(nn.Module):
    def forward(self, x_t, t):
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_score_nothing_is_corrected(dtype):
    """A network that says 0 for the noise, as one not yet trained may, says that all scores are 0, but for rounding."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(12, 0.02, 0.4))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(Nothing(), forward))
    prior = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,), prior=prior)
    options = {"times": (12, 1), "generator": 1}
    found, expected = PredictorCorrectorSampler(diffusion, num_steps=2), AncestralSampler(diffusion, num_steps=2)
    assert torch.equal(found.trajectory(4, **options), expected.trajectory(4, **options))
    x = PredictorCorrectorSampler(diffusion)(4, generator=1)
    assert x.dtype == dtype
    assert float(x.abs().max()) < 1000


# diffusers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers
@pytest.mark.parametrize("kind", ["DDIM", "DPM-Solver++"])
def test_the_steps_are_those_of_diffusers(kind):
    """Its t is ours less one; in float32, as it keeps its tables; from one x_T, with one network."""
    diffusers = pytest.importorskip("diffusers")
    diffusion = network(pyrodiff.LinearSchedule(100, 1e-3, 0.1))
    options = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1, "prediction_type": "v_prediction"}
    if kind == "DDIM":
        theirs = diffusers.DDIMScheduler(clip_sample=False, **options)
        theirs.set_timesteps(10)
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(**options)
        theirs.set_timesteps(timesteps=list(range(90, -1, -10)))
    times = [int(t) + 1 for t in theirs.timesteps]
    assert times[-1] == 1
    x_T, *states = SOLVERS[kind](diffusion, times=times[::-1]).trajectory(5, times=(*times, 0), generator=1)
    x, denoiser = x_T, diffusion.reverse.denoiser.eval()
    for t, expected in zip(theirs.timesteps, states, strict=True):
        with torch.no_grad():
            v = denoiser.network(x, torch.full((5,), int(t) + 1))
        x = theirs.step(v, t, x).prev_sample
        close(x.double(), expected, 1e-4)


# Precision, and what the network predicts


def test_a_multistep_sampler_compiles_for_real():
    diffusion = gaussian()
    compiled, eager = DPMSolverSampler(diffusion, compile=True, num_steps=6), DPMSolverSampler(diffusion, num_steps=6)
    for seed in range(2):
        close(compiled(5, generator=seed), eager(5, generator=seed), 1e-9)


@every_solver
def test_float32_states_have_coefficients_of_float64(kind):
    """Those of float64 to rounding, where 1 - alpha_bar_1 = 6e-6 in float32 would be off by one part in a hundred."""
    diffusion, found = network(pyrodiff.LogSNRSchedule(1000, 12.0, -12.0)), []
    x_t = 0.3 + torch.randn(50, 2, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        sampler = kind(diffusion.to(dtype), num_steps=20)
        found.append(torch.stack([step(sampler, x_t.to(dtype), k) for k in (2, 10, 20)]))
        assert found[-1].dtype == dtype
    close(found[1].double(), found[0], 2e-5)


@every_sampler
def test_a_denoiser_of_more_precision_is_read_in_that_of_the_states(kind):
    class Double(nn.Module):
        def forward(self, x_t, t):
            return x_t.double() / 2

    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(12, 0.02, 0.4))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Double()), (2,))
    if kind is not ALL["corrector"]:  # whose kernel is of the other dtype
        assert kind(diffusion, num_steps=4)(3).dtype == torch.float32


@every_sampler
def test_samples_of_a_clipped_denoiser_are_clipped(kind):
    diffusion = network()
    forward, inner = diffusion.forward_process, diffusion.reverse.denoiser
    clipped = pyrodiff.GaussianReverse(forward, pyrodiff.Clipped(inner, -0.5, 0.5))
    x = kind(pyrodiff.Diffusion(forward, clipped, (2,)).double(), num_steps=6)(500, generator=1)
    if kind is ALL["corrector"]:  # a draw of the kernel
        assert bool(x.isfinite().all())
    else:
        assert float(x.abs().max()) == 0.5
        assert float(kind(diffusion, num_steps=6)(500, generator=1).abs().max()) > 0.5


@every_sampler
def test_learned_variances_and_schedules_are_sampled_from(kind):
    """Only the predictor reads the variance; the estimate of x_0 is the first of two numbers."""
    schedule = pyrodiff.LearnedLogSNRSchedule(12, 6.0, -6.0, hidden=4)
    learned = network(schedule, outputs=2, variance=pyrodiff.RangeVariance())
    for num_steps in (5, None):
        assert bool(kind(learned)(4, num_steps=num_steps, generator=1).isfinite().all())


@pytest.mark.parametrize("kind", [one for name, one in ALL.items() if name != "DPM-Solver++"])
def test_one_step_is_the_last(kind):
    diffusion = gaussian(T=17)
    for options in ({"num_steps": 1}, {"times": (17,)}):
        x_T, x_0 = kind(diffusion, **options).trajectory(4, times=(17, 0), generator=1)
        if kind is not ALL["corrector"]:
            close(x_0, diffusion.reverse.denoiser(x_T, torch.tensor([17])))
        assert x_0.shape == (4, 2)
    assert DPMSolverSampler(diffusion, num_steps=2)(4, generator=1).shape == (4, 2)


def test_the_last_step_is_a_mean_and_rounds_to_levels_or_a_draw():
    """Of quantised data: the solvers' samples are numbers, the predictor-corrector's are levels."""
    diffusion = network(dtype=torch.float32, decoder=pyrodiff.DiscretizedDecoder(5))
    x = DDIMSampler(diffusion)(50, generator=1)
    k = pyrodiff.to_levels(x.clamp(-1, 1), 5)
    assert set(k.unique().tolist()) <= set(range(5))
    assert len(x.unique()) == 100
    drawn = PredictorCorrectorSampler(diffusion)(50, generator=1)
    close(drawn, pyrodiff.from_levels(pyrodiff.to_levels(drawn, 5), 5))


@pytest.mark.parametrize("kind", [DDIMSampler, ALL["DDIM, eta"], DPMSolverSampler, ALL["corrector"]])
def test_a_chain_that_ends_without_signal_is_sampled_from(kind):
    """x_T is noise alone; the law of x_1 is right nonetheless, but for the error of 256 steps."""
    diffusion, n = gaussian("reciprocal", 256), 8000
    x_1 = kind(diffusion).trajectory(n, times=(1,), generator=1)[0]
    mean, variance = diffusion.model.prior.moments(1)
    close(x_1.mean(0), mean, 0.05)
    close(((x_1 - mean) ** 2).mean(0) / variance, torch.ones(2).double(), 0.1)


# Refusals


def test_too_few_steps_are_refused_each_time_they_are_asked_for():
    sampler = DPMSolverSampler(network())
    expected = sampler(3, generator=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="num_steps must be at least 2 for order=2, but it is 1"):
            sampler(3, num_steps=1)
    assert torch.equal(sampler(3, generator=1), expected)
    diffusion = network(pyrodiff.ReciprocalSchedule(12))
    sampler = HeunSampler(diffusion, times=(1, 5, 11))
    assert sampler(3).isfinite().all()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"use DDIMSampler or DPMSolverSampler, or times that end before T"):
            sampler(3, num_steps=4)
