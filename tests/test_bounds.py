"""The bound, all T terms of it: right term by term, and never better than the data's entropy allows."""

import dataclasses
import io
import math
import sys

import models
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from computing import KNOWN, known_diffusion
from exact import Drift, EightGaussians, Gaussian, GaussianPosterior, bit_diffusion, far, gaussian_diffusion
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrodiff
from pyrodiff import Bound, DiffusionELBO, bound, networks
from pyrodiff.likelihood import bounds
from pyrodiff.likelihood.estimate import rounded
from pyrodiff.running.evaluation import bytes_per_row

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
X_0 = torch.tensor([[1.0, 2.0], [0.0, -1.5], [3.0, -4.0]], dtype=torch.float64)
T = 4
BETA = np.array([0.1, 0.2, 0.35, 0.5])
SCHEDULE = pyrodiff.BetaSchedule(BETA.tolist())


def stacked(result):
    """The terms from t = 1 on, and L_T last, with shape (T + 1, B)."""
    return torch.cat([result.reconstruction[None], result.denoising, result.prior[None]])


def draws_of(diffusion, copies, x_0=X_0, **options):
    """Draws of the terms of all data, from copies of them in one batch, with shape (copies, T + 1, B)."""
    return stacked(bound(diffusion, x_0.repeat(copies, 1), **options)).unflatten(1, (copies, len(x_0))).transpose(0, 1)


def test_a_bound_is_the_sum_of_its_terms_in_any_unit():
    terms = Bound(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([7.0, 9.0]), (2, 3))
    terms = Bound(terms.prior, terms.denoising, terms.reconstruction, torch.Size((2, 3)))
    torch.testing.assert_close(terms.nats, torch.tensor([16.0, 21.0]))
    torch.testing.assert_close(terms.bits, torch.tensor([16.0, 21.0]) / math.log(2))
    torch.testing.assert_close(terms.bits_per_dim, torch.tensor([16.0, 21.0]) / math.log(2) / 6)
    assert float(Bound.standard_error(terms.nats)) == pytest.approx(2.5)  # 5 / sqrt(2) / sqrt(2)
    assert math.isnan(Bound.standard_error(terms.nats[:1]))


def test_the_printed_table_has_the_numbers():
    size = torch.Size((2,))
    terms = Bound(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.6], [5.0, 6.0]]), torch.tensor([-7.0, 9.0]), size)
    lines = str(terms).splitlines()
    assert lines[0] == "bound on -log p(x_0), T = 3, mean of 2 data of 2 dimensions"
    assert lines[-1] == "p is a density, per unit of the data as given"
    rows = {"L_T": terms.prior, "ΣL_t-1": terms.denoising.sum(0), "L_0": terms.reconstruction, "bound": terms.nats}
    for line, (name, values) in zip(lines[2:6], rows.items(), strict=True):
        mean, error = float(values.mean()), float(values.std()) / 2**0.5
        expected = f"{rounded(mean, error)} {rounded(mean / math.log(2), error / math.log(2))}"
        assert line.startswith(name)
        assert line.split()[-4:] == expected.replace("±", "").split()
    nats = terms.nats / 2
    assert lines[6].split()[-4] == rounded(float(nats.mean()), float(nats.std()) / 2**0.5).split()[0]


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_shapes(event_shape, T):
    m, v = torch.ones(event_shape).double(), torch.full(event_shape, 0.5).double()
    diffusion = gaussian_diffusion(pyrodiff.LinearSchedule(T, 0.1, 0.5), m, v)
    result = bound(diffusion, torch.randn((7, *event_shape)).double(), num_particles=2)
    assert result.prior.shape == result.reconstruction.shape == result.nats.shape == (7,)
    assert result.denoising.shape == (T - 1, 7)
    assert result.event_shape == event_shape
    assert not any(term.requires_grad for term in (result.prior, result.denoising, result.reconstruction, result.nats))
    torch.testing.assert_close(result.bits_per_dim, result.nats / math.log(2) / max(1, math.prod(event_shape)))


def expected_kls(x_0, shift, widen):
    """The mean of each term for N(M, V), with kernels of the mean moved by so many scales and wider by a factor."""
    m, v = M.numpy(), V.numpy()
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - BETA)])
    S = alpha_bar[:, None] * v + 1 - alpha_bar[:, None]
    x, noise, terms = x_0.numpy(), np.array([-1.0, 1.0])[:, None, None], []
    for t in range(1, len(BETA) + 1):
        b, now, before = BETA[t - 1], alpha_bar[t], alpha_bar[t - 1]
        x_t = np.sqrt(now) * x + np.sqrt(1 - now) * noise  # all is quadratic in the noise: two points give the mean
        mean = (np.sqrt(before) * b * x + np.sqrt(1 - b) * (1 - before) * x_t) / (1 - now)
        variance = b * (1 - before) / (1 - now)
        true = S[t - 1] * b / S[t]
        center = np.sqrt(before) * m + np.sqrt(1 - b) * S[t - 1] / S[t] * (x_t - np.sqrt(now) * m)
        center = center + shift * widen * np.sqrt(true)
        scale = widen**2 * true
        if t == 1:
            cost = 0.5 * np.log(2 * np.pi * scale) + 0.5 * (x - center) ** 2 / scale
        else:
            cost = 0.5 * (variance / scale - 1 - np.log(variance / scale) + (mean - center) ** 2 / scale)
        terms.append(cost.sum(-1).mean(0))
    prior = S[-1]
    ratio = (1 - alpha_bar[-1]) / prior
    terms.append((0.5 * (ratio - 1 - np.log(ratio) + alpha_bar[-1] * (x - m) ** 2 / prior)).sum(-1))
    return torch.from_numpy(np.stack(terms))


@pytest.mark.parametrize(("shift", "widen"), [(0.0, 1.0), (0.3, 1.4)])
def test_each_term_of_a_linear_gaussian_diffusion_is_its_closed_form(shift, widen):
    draws = draws_of(gaussian_diffusion(SCHEDULE, M, V, shift, widen), 3000, num_particles=2)
    expected = expected_kls(X_0, shift, widen)
    assert not far(draws, expected)
    torch.testing.assert_close(draws[0, -1], expected[-1])
    density = -dist.Normal(M, V.sqrt()).to_event(1).log_prob(X_0)
    if shift == 0:
        torch.testing.assert_close(expected.sum(0), density)
    assert not far(draws.sum(1), expected.sum(0))


def test_the_gap_of_perturbed_kernels_is_the_sum_of_their_kls():
    """A kernel moved by d scales and widened by c costs the same against the true posterior at every t."""
    d, c = 0.3, 1.4
    kl = math.log(c) + (1 / c**2 + d**2) / 2 - 0.5  # of N(0, 1) from N(c d, c^2), a number of the data
    x_0 = dist.Normal(M, V.sqrt()).sample((20000,))  # data of the model's own law: x_t then has the chain's law
    gap = bound(gaussian_diffusion(SCHEDULE, M, V, d, c), x_0).nats + dist.Normal(M, V.sqrt()).log_prob(x_0).sum(-1)
    assert not far(gap, 2 * T * kl)


@pytest.mark.parametrize("kind", ["gaussian", "bits"])
def test_terms_agree_with_the_trajectory_pairs(kind):
    diffusion = gaussian_diffusion(SCHEDULE, M, V, 0.3, 1.4) if kind == "gaussian" else bit_diffusion(BETA, 0.2, 2)
    x_0 = X_0[:1] if kind == "gaussian" else torch.tensor([[1.0, 0.0]]).double()
    x_0 = x_0.expand(20000, 2)
    ours = stacked(bound(diffusion, x_0))
    terms = DiffusionELBO().terms(diffusion.model, diffusion.guide, x_0)
    assert list(terms) == ["x_4", "x_3", "x_2", "x_1", "x_0"]
    theirs = torch.stack(list(terms.values())[::-1]).detach()
    error = ((ours.var(1) + theirs.var(1)) / 20000).sqrt()
    assert ((ours.mean(1) - theirs.mean(1)).abs() <= 5 * error + 1e-10).all()


@pytest.mark.parametrize("rows", [1, 5, 10**6])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_each_term_stays_at_its_time_and_datum_whatever_the_batches(rows, num_particles):
    """With kernels that give away the time, and data that differ a thousandfold, the costs tell which is which."""

    class Clock(nn.Module):
        def forward(self, x_t, t):
            scale = 10.0 ** torch.as_tensor(t, dtype=x_t.dtype).expand(x_t.shape[:1])
            return dist.Normal(torch.zeros_like(x_t), scale[:, None]).to_event(1)

    forward = pyrodiff.GaussianForward(SCHEDULE)
    diffusion = pyrodiff.Diffusion(forward, Clock(), (1,))
    x_0 = torch.tensor([[0.0], [1e6], [1e9]], dtype=torch.float64)
    result = bound(diffusion, x_0, num_particles=num_particles, memory_budget=rows * bytes_per_row(diffusion, x_0[:1]))
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - BETA)])
    for t in (2, 3, 4):
        variance = BETA[t - 1] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        for i, x in enumerate((0.0, 1e6, 1e9)):
            expected = 0.5 * (variance - 10.0 ** (2 * t)) / 10.0 ** (2 * t) + math.log(10.0**t / math.sqrt(variance))
            expected += 0.5 * alpha_bar[t - 1] * x**2 / 10.0 ** (2 * t)
            assert float(result.denoising[t - 2, i]) == pytest.approx(expected, rel=1e-2)
    expected = [0.5 * math.log(2 * math.pi * 100) + 0.5 * x**2 / 100 for x in (0.0, 1e6, 1e9)]
    assert result.reconstruction.tolist() == pytest.approx(expected, rel=1e-9)
    expected = [0.5 * (alpha_bar[4] * x**2 - alpha_bar[4] - math.log(1 - alpha_bar[4])) for x in (0.0, 1e6, 1e9)]
    assert result.prior.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_memory_budget_bounds_the_batches():
    sizes = []

    class Counted(GaussianPosterior):
        def forward(self, x_t, t):
            sizes.append(len(x_t))
            return super().forward(x_t, t)

    data = Gaussian(M, V, SCHEDULE)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Counted(data), (2,), prior=data)
    row = bytes_per_row(diffusion, X_0[:1])
    for budget, most in ((row, 1), (row + 1, 1), (5 * row - 1, 4), (10**9, 18)):
        sizes.clear()
        bound(diffusion, X_0, num_particles=2, memory_budget=budget)
        assert max(sizes) == most
        assert sum(sizes) == 25  # every row once, and one to measure
    with pytest.raises(ValueError, match=f"memory_budget must hold one datum, which takes {row} bytes"):
        bound(diffusion, X_0, memory_budget=row - 1)


def test_particles_lower_the_variance():
    diffusion = gaussian_diffusion(SCHEDULE, M, V, 0.3, 1.4)
    x_0 = X_0[:1].expand(2000, 2)
    variances = [float(bound(diffusion, x_0, num_particles=n).nats.var()) for n in (1, 16)]
    assert variances[1] == pytest.approx(variances[0] / 16, rel=0.3)


def test_dropout_is_off():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1, 0.5))
    network = networks.MLP((2,), hidden=16, dropout=0.8).double()
    for parameter in network.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    seen = []
    network.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    bound(pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(network, forward)), (2,)), X_0)  # fmt: skip # noqa: E501
    network.eval()
    for args, output in seen[:]:
        torch.testing.assert_close(network(*args), output)


def test_a_kernel_without_an_analytic_kl_is_bounded_in_mean():
    class Heavy(nn.Module):
        def forward(self, x_t, t):
            return dist.StudentT(4.0, 0.5 * x_t, torch.full_like(x_t, 0.8))

    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.2, 0.4]))
    x = 1.5
    result = bound(pyrodiff.Diffusion(forward, Heavy(), ()), torch.full((40000,), x).double())
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    noise, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    x_1 = math.sqrt(0.8) * x + math.sqrt(0.2) * noise
    expected = -float((weights * dist.StudentT(4.0, 0.5 * x_1, 0.8).log_prob(torch.tensor(x).double())).sum())
    assert not far(result.reconstruction, expected)
    x_2 = math.sqrt(0.48) * x + math.sqrt(0.52) * noise[:, None]
    mean, variance = (math.sqrt(0.8) * 0.4 * x + math.sqrt(0.6) * 0.2 * x_2) / 0.52, 0.4 * 0.2 / 0.52
    law = dist.Normal(mean, math.sqrt(variance))
    drawn = mean + math.sqrt(variance) * noise
    cost = (law.log_prob(drawn) - dist.StudentT(4.0, 0.5 * x_2, 0.8).log_prob(drawn)) @ weights
    assert not far(result.denoising[0], float(weights @ cost))


def test_a_prior_without_an_analytic_kl_is_bounded_in_mean():
    data = Gaussian(M, V, SCHEDULE)
    prior = dist.StudentT(5.0, torch.zeros(2).double(), 1.2).to_event(1)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), GaussianPosterior(data), (2,), prior=prior)
    alpha_bar = float(np.prod(1 - BETA))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x = math.sqrt(alpha_bar) * X_0[..., None] + math.sqrt(1 - alpha_bar) * torch.tensor(nodes)
    log_p = (dist.StudentT(5.0, 0.0, 1.2).log_prob(x) @ torch.tensor(weights / weights.sum())).sum(-1)
    expected = -(1 + math.log(2 * math.pi * (1 - alpha_bar))) - log_p
    assert not far(draws_of(diffusion, 2000)[:, -1], expected)


@pytest.mark.parametrize("variance", [pyrodiff.ForwardVariance(), pyrodiff.PosteriorVariance()])
def test_no_bound_is_below_the_entropy_and_the_exact_denoiser_comes_near(variance):
    schedule = pyrodiff.CosineSchedule(60)
    forward, denoiser = pyrodiff.GaussianForward(schedule), EightGaussians(schedule)
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser, variance), (2,))
    x_0 = pyrodiff.datasets.eight_gaussians(4000, seed=3).double()
    log_p = denoiser.log_density(x_0)
    assert not far(-denoiser.log_density(pyrodiff.datasets.eight_gaussians(40000, seed=1).double()), 2.830, 6)
    gap = bound(diffusion, x_0).nats + log_p
    error = float(gap.std()) / 4000**0.5
    assert float(gap.mean()) > -5 * error
    assert float(gap.mean()) < (0.6 if isinstance(variance, pyrodiff.ForwardVariance) else 5.0)


def test_a_random_weight_is_drawn_once_for_the_whole_bound():
    process = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(5, 0.1, 0.3))
    diffusion = pyrodiff.Diffusion(process, Drift(), event_shape=(2,))
    x_0 = torch.full((4, 2), 0.7)
    budget = bytes_per_row(diffusion, x_0[:1])
    diffusion.reverse.seen.clear()
    bound(diffusion, x_0, memory_budget=budget, guide=models.prior_of_weights(diffusion))
    assert len(diffusion.reverse.seen) > 5
    assert len(set(diffusion.reverse.seen)) == 1


def test_a_state_dict_carries_weights_and_schedule(tmp_path):
    def build(schedule, rate):
        process = pyrodiff.BinomialForward(schedule, rate)
        denoiser = pyrodiff.LogitPrediction(networks.MLP(event_shape=(3,), hidden=8), process)
        return pyrodiff.Diffusion(process, pyrodiff.BinomialReverse(process, denoiser), event_shape=(3,))

    saved, x_0 = build(pyrodiff.LinearSchedule(4, 0.1, 0.3), 0.3), torch.tensor([[0.0, 1.0, 1.0]])
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    loaded = build(pyrodiff.ReciprocalSchedule(4), 0.5)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    numbers = []
    for diffusion in (saved, loaded):
        torch.manual_seed(1)
        numbers.append(bound(diffusion, x_0).nats)
    assert torch.equal(*numbers)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(pyrodiff.ReciprocalSchedule(5), 0.5).load_state_dict(saved.state_dict())


def test_known_costs_come_out_to_the_last_digit():
    result = bound(known_diffusion(KNOWN), torch.full((3, 1), 0.75).double(), num_particles=2)
    expected = torch.tensor(KNOWN).double()[:, None].expand(7, 3)
    torch.testing.assert_close(stacked(result)[:-1], expected, rtol=1e-10, atol=1e-10)


def shifted():
    return gaussian_diffusion(SCHEDULE, M, V, 0.3, 1.4)


def equal(one, other):
    return torch.equal(stacked(one), stacked(other))


def test_the_global_source_comes_back_after_an_error_too():
    diffusion, before = shifted(), torch.get_rng_state()
    with pytest.raises(ValueError, match="in batch 1"):
        bound(diffusion, [X_0, X_0[:, :1]], generator=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert diffusion.training


def test_a_seed_does_not_make_the_draws_less_random():
    draws = torch.stack([draws_of(shifted(), 100, generator=seed).mean(0) for seed in range(20)])
    assert not far(draws, expected_kls(X_0, 0.3, 1.4))


class Told(nn.Module):
    """N(0, 10^2): L_0 and L_T say exactly which datum it is."""

    def forward(self, x_t, t):
        return dist.Normal(torch.zeros_like(x_t), 10.0).to_event(1)


DATA = torch.arange(1.0, 8).double()[:, None] * torch.tensor([1.0, -3.0]).double()


@pytest.mark.parametrize("rows", [1, 4, 10**6])
@pytest.mark.parametrize("size", [1, 3])
def test_a_loader_has_the_terms_of_its_data_in_their_order(size, rows):
    for diffusion in (pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Told(), (2,)), shifted()):
        options = {"memory_budget": rows * bytes_per_row(diffusion, DATA[:1]), "num_particles": 2, "generator": 1}
        result, whole = (bound(diffusion, x_0, **options) for x_0 in (DATA.split(size), DATA))
        assert torch.equal(result.prior, whole.prior)
        torch.testing.assert_close(stacked(result), stacked(whole), rtol=1e-12, atol=0)
        assert all(len(set(term.tolist())) == 7 for term in (result.prior, result.reconstruction))
        assert result.denoising.shape == (3, 7)
        assert result.event_shape == (2,)


def test_the_terms_of_data_that_differ_much_are_the_closed_form():
    assert not far(draws_of(shifted(), 4000, DATA), expected_kls(DATA, 0.3, 1.4))


def test_a_loader_of_one_batch_is_that_batch():
    assert equal(bound(shifted(), [X_0], generator=2), bound(shifted(), X_0, generator=2))
    assert not equal(bound(shifted(), [X_0, X_0], generator=2), bound(shifted(), [X_0, X_0], generator=3))


def test_a_loader_that_shuffles_follows_the_seed():
    diffusion, before = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Told(), (2,)), torch.get_rng_state()
    loader = DataLoader(TensorDataset(DATA), batch_size=2, shuffle=True)
    results = [bound(diffusion, loader, generator=seed) for seed in (1, 1, 2)]
    assert equal(*results[:2])
    assert results[0].prior.tolist() != results[2].prior.tolist()
    assert sorted(results[0].prior.tolist()) == sorted(results[2].prior.tolist())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_times", [1, 2, 3, 4, 5, 6])
def test_each_datum_sees_one_time_of_each_part(num_times):
    """Of T - 1 = 6 times. The costs are known, so that what is not 0 says t, and its scale the size of the part."""
    diffusion, costs, x_0 = known_diffusion(KNOWN), torch.tensor(KNOWN[1:]).double(), torch.full((400, 1), 0.75)
    result = bound(diffusion, x_0.double(), num_times=num_times)
    scale = (result.denoising / costs[:, None]).amax(1)  # the size of each time's part
    torch.testing.assert_close(scale, scale.round())
    parts, start = [], 0
    while start < 6:
        assert scale[start] > 0.5
        parts.append(slice(start, start + int(scale[start].round())))
        start = parts[-1].stop
    sizes = [part.stop - part.start for part in parts]
    assert sum(sizes) == 6
    assert len(sizes) == num_times
    assert max(sizes) - min(sizes) <= 1
    for num_particles in (1, 3):
        result = bound(diffusion, x_0.double(), num_particles=num_particles, num_times=num_times)
        seen = result.denoising / costs[:, None] / scale[:, None] * num_particles
        torch.testing.assert_close(seen, seen.round())
        assert all((seen[part].sum(0).round() == num_particles).all() for part in parts)
        torch.testing.assert_close(result.reconstruction, torch.full((400,), KNOWN[0]).double())
        assert not far(result.denoising.T, costs)


@pytest.mark.parametrize("num_times", [1, 2, 3])
def test_some_of_the_times_are_unbiased_for_all_of_them(num_times):
    draws = torch.stack([draws_of(shifted(), 200, num_particles=2, num_times=num_times).mean(0) for _ in range(20)])
    expected = expected_kls(X_0, 0.3, 1.4)
    assert not far(draws, expected)
    assert not far(draws.sum(1), expected.sum(0))
    torch.testing.assert_close(draws[0, -1], expected[-1])


def test_some_of_the_times_cost_so_many_network_calls():
    calls, diffusion = [], known_diffusion(KNOWN)
    x_0 = torch.full((5, 1), 0.75).double()
    for num_times, rows in ((1, 2), (4, 5), (6, 7), (None, 7)):
        hook = diffusion.reverse.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
        bound(diffusion, x_0, num_particles=3, num_times=num_times)
        hook.remove()
        assert sum(calls) - 1 == rows * 3 * 5  # one call measures the memory
        calls.clear()


def test_all_of_the_times_are_what_they_are_without_asking():
    diffusion = shifted()
    assert equal(
        bound(diffusion, X_0, num_particles=2, num_times=T - 1, generator=6),
        bound(diffusion, X_0, num_particles=2, generator=6),
    )
    assert bound(gaussian_diffusion(pyrodiff.BetaSchedule([0.4]), M, V), X_0).denoising.shape == (0, 3)


class Terminal(io.StringIO):
    """Standard error that says whether it is a terminal."""

    def __init__(self, is_one):
        super().__init__()
        self.is_one = is_one

    def isatty(self):
        return self.is_one


EVALUATIONS = {
    "bound": (
        lambda progress: bound(shifted(), DATA.split(3), num_particles=2, num_times=2, progress=progress),
        3 * 2 * 7,
    ),
    "importance bound": (
        lambda progress: pyrodiff.importance_bound(shifted(), DATA.split(3), num_particles=5, progress=progress),
        5 * 7 * T,
    ),
}


@pytest.mark.parametrize(("evaluate", "rows"), EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_where_it_is_asked_for_and_there_is_a_terminal(evaluate, rows, asked, terminal, monkeypatch):
    error, out = Terminal(terminal), Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr(sys, "stdout", out)
    evaluate(asked)
    assert out.getvalue() == ""
    if not (asked and terminal):
        assert error.getvalue() == ""
        return
    last = error.getvalue().strip().split("\r")[-1]
    assert "bound: 100%" in last
    assert f"{rows}" in last.replace(".0", "")


def test_progress_is_not_shown_unless_asked_for(capsys):
    bound(shifted(), X_0, progress=True)  # there is no terminal here
    bound(shifted(), X_0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("num_times", [None, 1])
def test_the_standard_error_is_that_of_a_new_data_set(num_times):
    """Data sets of 40 from the model's own law, whose entropy the bound of exact kernels is."""
    diffusion = gaussian_diffusion(SCHEDULE, M, V)
    x_0 = dist.Normal(M, V.sqrt()).sample((500, 40))
    result = bound(diffusion, x_0.flatten(0, 1), num_times=num_times)
    nats = result.nats.reshape(500, 40)
    entropy = float(0.5 * (2 * math.pi * math.e * V).log().sum())
    assert not far(nats.mean(1), entropy)
    errors = torch.stack([Bound.standard_error(values) for values in nats])
    assert not far((nats.mean(1) - entropy) ** 2 - errors**2, 0.0)
    assert not far((nats.mean(1) - entropy) ** 2 / errors.mean() ** 2, 1.0, 6)
    first = Bound(result.prior[:40], result.denoising[:, :40], result.reconstruction[:40], diffusion.event_shape)
    printed = str(first).splitlines()[5].split()
    assert printed[0] == "bound"
    assert printed[1:3] == rounded(float(nats[0].mean()), float(errors[0])).replace("±", "").split()


class Same(nn.Module):
    def forward(self, x_t, t):
        return x_t


class Opened(nn.Module):
    """A network that returns what it is given, and does something more with it."""

    def __init__(self, more):
        super().__init__()
        self.more = more

    def forward(self, x_t, t):
        self.more(x_t)
        return x_t


@pytest.mark.parametrize(
    ("more", "numbers"),
    [
        (lambda x: x[:, 2:].view(-1), 0),  # views, alone and in a list, and what is written in place
        (lambda x: torch.ops.aten.split.Tensor(x, 20, 1), 0),
        (lambda x: x.add_(0.0), 0),
        (lambda x: x + 1, 50),
        (lambda x: torch.cat([x, x]), 100),
        (lambda x: torch.ops.aten.stack([x, x])[0], 100),
        (lambda x: torch.ops.aten.split_copy.Tensor(x, 20, 1), 50),  # a list of new tensors
        (lambda x: x.sort(), 100),  # two: numbers and their places
        (lambda x: torch._foreach_add([x, x], 1.0), 100),
        (lambda x: torch._foreach_add_([x], 0.0), 0),
    ],
)
def test_a_row_takes_the_bytes_of_new_tensors(more, numbers):
    forward, x_0 = pyrodiff.GaussianForward(SCHEDULE), torch.ones(1, 50, dtype=torch.float64)
    plain, opened = (
        bytes_per_row(pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (50,)), x_0)
        for denoiser in (pyrodiff.DataPrediction(network, forward) for network in (Same(), Opened(more)))
    )
    assert opened - plain == 8 * numbers


def test_the_memory_of_a_decoder_counts():
    forward = pyrodiff.GaussianForward(SCHEDULE)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(Same(), forward))
    x_0 = torch.ones(1, 50, dtype=torch.float64)
    plain, levels = (
        bytes_per_row(pyrodiff.Diffusion(forward, reverse, (50,), decoder), x_0)
        for decoder in (pyrodiff.GaussianDecoder(), pyrodiff.SoftmaxDecoder(forward, 256))
    )
    assert levels - plain > 3 * 50 * 256 * 8


def test_a_sum_of_bounds_is_that_of_all_data():
    diffusion = gaussian_diffusion(SCHEDULE, M, V)
    parts = [bound(diffusion, x[None], generator=0) for x in X_0]
    assert sum(parts).nats.tolist() == [float(part.nats) for part in parts]
    assert "mean of 3 data" in repr(sum(parts))


def of_few_times(x_0, **options):
    """A bound of one of 40 steps, and the same with all its terms kept."""
    diffusion = gaussian_diffusion(pyrodiff.LinearSchedule(41, beta_start=0.02, beta_end=0.3), M + 0.5, V)
    found = bound(diffusion, x_0.double(), generator=0, **options)
    assert found.times is not None
    whole = found.changed(denoising=found.denoising, times=None, steps=None)
    assert whole.times is None
    return found, whole


@pytest.mark.parametrize(("num_times", "num_particles"), [(1, 1), (3, 1), (2, 5)])
def test_what_was_drawn_is_kept_and_says_what_all_terms_say(num_times, num_particles, tmp_path):
    found, whole = of_few_times(torch.randn(50, 2), num_times=num_times, num_particles=num_particles)
    assert found.times.shape == (num_times * num_particles, 50)
    assert whole.denoising.shape == (40, 50)
    assert ((whole.denoising != 0).sum(0) <= num_times * num_particles).all()
    for one, other in (
        (found.nats, whole.nats),
        (found.denoising_sum, whole.denoising.sum(0)),
        (found.denoising_mean, whole.denoising.mean(1)),
        (whole.denoising_mean, whole.denoising.mean(1)),
        (found.rescaled(2.0).nats, whole.nats + 2),
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert str(found) == str(whole)
    assert found.num_steps == whole.num_steps == 41
    found.save(tmp_path / "found.npz")
    whole.save(tmp_path / "whole.npz")
    again = Bound.load(tmp_path / "found.npz")
    assert torch.equal(again.denoising, whole.denoising)
    assert torch.equal(again.times, found.times)
    assert torch.equal(Bound.load(tmp_path / "whole.npz").denoising, whole.denoising)


def test_bounds_of_few_times_and_of_all_add_up():
    found, whole = of_few_times(torch.randn(20, 2), num_times=2)
    assert (found + found).times.shape == (2, 40)
    for parts in ((found, whole), (whole, found), (found, of_few_times(torch.randn(7, 2), num_times=3)[0])):
        total = parts[0] + parts[1]
        assert torch.equal(total.denoising, torch.cat([part.denoising for part in parts], 1))
        assert total.num_steps == 41
    replaced = dataclasses.replace(found, prior=found.prior + 1)
    torch.testing.assert_close(replaced.nats, found.nats + 1)


def test_the_terms_of_a_batch_stand_at_their_times_whatever_the_batches():
    x_0 = torch.randn(50, 2)
    found, whole = of_few_times(x_0, num_times=3)
    diffusion = gaussian_diffusion(pyrodiff.LinearSchedule(41, beta_start=0.02, beta_end=0.3), M + 0.5, V)
    in_batches = bound(diffusion, DataLoader(x_0.double(), 7), generator=0, num_times=3)
    assert torch.equal(in_batches.times, found.times)
    torch.testing.assert_close(in_batches.denoising, whole.denoising)


def test_memory_is_bounded_by_what_is_drawn():
    """Of 20,000 data with 2 of 999 terms, all terms would be 80 MB; what is allocated at once stays below a tenth."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1000))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(networks.MLP((1,), hidden=2), forward))
    diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(1,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = bound(diffusion, torch.randn(20_000, 1), num_times=2, generator=0)
        str(found)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 20_000 * 4 < largest < 8e6


def test_of_the_prior_only_the_data_given_are_scored(monkeypatch):
    """Not those outside of the batch that a block of draws has beside."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(3))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, networks.MLP((2,), hidden=8)), (2,))
    cost, scored = bounds.prior_cost, []
    monkeypatch.setattr(bounds, "prior_cost", lambda model, x_0, x_T: scored.append(len(x_0)) or cost(model, x_0, x_T))
    bound(diffusion, torch.randn(3, 2), num_particles=2)
    assert scored == [3, 3]
