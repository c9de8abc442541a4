"""The bound, all T terms of it: right term by term, and never better than the data's entropy allows."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from exact import Gaussian, GaussianPosterior, bit_diffusion, far, gaussian_diffusion, repeat
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrodiff
from pyrodiff import Bound, DiffusionELBO, bound, networks
from pyrodiff.evaluation import bytes_a_row

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
X_0 = torch.tensor([[1.0, 2.0], [0.0, -1.5], [3.0, -4.0]], dtype=torch.float64)
T = 4
BETA = np.array([0.1, 0.2, 0.35, 0.5])
SCHEDULE = pyrodiff.BetaSchedule(BETA.tolist())


def stacked(result):
    """The terms from t = 1 on, and L_T last, with shape (T + 1, B)."""
    return torch.cat([result.reconstruction[None], result.denoising, result.prior[None]])


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
    terms = Bound(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([-7.0, 9.0]), size)
    lines = str(terms).splitlines()
    assert lines[0] == "bound on -log p(x_0), T = 3, mean of 2 data of 2 dimensions"
    assert lines[-1] == "p is a density, per unit of the data as given"
    rows = {"L_T": terms.prior, "ΣL_t-1": terms.denoising.sum(0), "L_0": terms.reconstruction, "bound": terms.nats}
    for line, (name, values) in zip(lines[2:6], rows.items(), strict=True):
        mean, error = float(values.mean()), float(values.std()) / 2**0.5
        expected = [mean, error, mean / math.log(2), error / math.log(2)]
        assert line.startswith(name)
        assert [float(word) for word in line.split()[-4:]] == pytest.approx(expected, abs=1e-4)
    assert float(lines[6].split()[-4]) == pytest.approx(float(terms.nats.mean()) / 2, abs=1e-4)


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
    diffusion = gaussian_diffusion(SCHEDULE, M, V, shift, widen)
    draws = torch.stack([stacked(bound(diffusion, X_0, num_particles=200)) for _ in range(30)])
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
    result = bound(diffusion, x_0, num_particles, rows * bytes_a_row(diffusion, x_0[:1]))
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


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_the_mean_does_not_depend_on_the_memory_budget(rows):
    diffusion = gaussian_diffusion(SCHEDULE, M, V, 0.3, 1.4)
    memory_budget = rows * bytes_a_row(diffusion, X_0[:1])
    draws = torch.stack([stacked(bound(diffusion, X_0, 2, memory_budget)) for _ in range(50)])
    assert not far(draws, expected_kls(X_0, 0.3, 1.4))


def test_the_memory_budget_bounds_the_batches():
    sizes = []

    class Counted(GaussianPosterior):
        def forward(self, x_t, t):
            sizes.append(len(x_t))
            return super().forward(x_t, t)

    data = Gaussian(M, V, SCHEDULE)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Counted(data), (2,), prior=data)
    row = bytes_a_row(diffusion, X_0[:1])
    for budget, most in ((row, 1), (row + 1, 1), (5 * row - 1, 4), (10**9, 24)):
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


def test_evaluation_mode_within_and_each_modules_own_mode_after():
    modes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.frozen = nn.Dropout(0.9), nn.Dropout(0.9).eval()
            self.scale = nn.Parameter(torch.ones(()).double())

        def forward(self, x_t, t):
            modes.extend(module.training for module in self.modules())
            return dist.Normal(self.frozen(self.inner(x_t)) * self.scale, torch.ones_like(x_t)).to_event(1)

    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Watched(), (2,))
    before = {name: module.training for name, module in diffusion.named_modules()}
    bound(diffusion, X_0)
    assert not any(modes)
    assert {name: module.training for name, module in diffusion.named_modules()} == before
    assert not before["model.reverse.frozen"]
    assert before["model.reverse.inner"]

    class Broken(Watched):
        def forward(self, x_t, t):
            raise RuntimeError("broken")

    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(SCHEDULE), Broken(), (2,))
    with pytest.raises(RuntimeError, match="broken"):
        bound(diffusion, X_0)
    assert diffusion.reverse.training


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
    assert not far(torch.stack([bound(diffusion, X_0, num_particles=25).prior for _ in range(60)]), expected)


class EightGaussians(nn.Module):
    """E[x_0 | x_t] of eight Gaussians, in closed form."""

    def __init__(self, schedule):
        super().__init__()
        angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
        self.schedule = schedule
        self.centers = 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
        self.variance = 0.125

    def log_density(self, x):
        squares = ((x[:, None] - self.centers) ** 2).sum(-1)
        return torch.logsumexp(-squares / 2 / self.variance, -1) - math.log(8 * 2 * math.pi * self.variance)

    def forward(self, x_t, t):
        a, b = self.schedule.signal(t), self.schedule.noise(t)
        a, b = (c.reshape(-1, 1, 1).expand(len(x_t), 1, 1) for c in (a, b))
        total = a**2 * self.variance + b**2
        off = x_t[:, None] - a * self.centers
        weights = torch.softmax(-(off**2).sum(-1) / 2 / total[..., 0], -1)
        return (weights[..., None] * (self.centers + a * self.variance / total * off)).sum(1)


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
    assert repeat(1, lambda: bound(diffusion, x_0[:100]).nats.mean()).isfinite().all()


def test_a_random_weight_is_drawn_once_for_the_whole_bound():
    class Drift(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))
            self.seen = []

        def forward(self, x_t, t):
            self.seen.append(float(self.weight))
            return dist.Normal(x_t * self.weight, 1.0).to_event(1)

    process = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(5, 0.1, 0.3))
    diffusion = pyrodiff.Diffusion(process, Drift(), event_shape=(2,))
    x_0 = torch.full((4, 2), 0.7)
    budget = bytes_a_row(diffusion, x_0[:1])
    diffusion.reverse.seen.clear()
    bound(diffusion, x_0, memory_budget=budget)
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
