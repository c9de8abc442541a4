"""Score matching: each loss against quadrature and closed forms, and the techniques against arithmetic of their own."""

import math

import numpy as np
import pytest
import torch
from exact import far, gradient
from torch import nn

import pyrodiff
from pyrodiff import scores
from pyrodiff.networks import DividedByNoise

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 1.0], [0.5, -0.7], [1.8, 0.4]], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
every_size = pytest.mark.parametrize("D", [1, 2])
either_form = pytest.mark.parametrize("control_variate", [False, True])
either_length = pytest.mark.parametrize("variance_reduced", [False, True])


class Mixture:
    """Three normals in one or two dimensions, with noise: density, score and draws, in closed form."""

    def __init__(self, D, sigma=0.0):
        self.means, self.variances = MEANS[:, :D], VARIANCES + sigma**2

    def parts(self, x):
        off = x[:, None] - self.means
        log = -(off**2).sum(-1) / 2 / self.variances - off.shape[-1] / 2 * (2 * math.pi * self.variances).log()
        return off, WEIGHTS * log.exp()

    def density(self, x):
        return self.parts(x)[1].sum(-1)

    def score(self, x):
        off, p = self.parts(x)
        return -(p[..., None] * off / self.variances[:, None]).sum(1) / p.sum(1, keepdim=True)

    def draw(self, number):
        part = torch.multinomial(WEIGHTS, number, replacement=True)
        return self.means[part] + self.variances[part, None].sqrt() * torch.randn_like(self.means[part])

    def grid(self):
        """Points and weights of a quadrature: of smooth densities the trapezoid rule is exact but for rounding."""
        D = self.means.shape[1]
        line = torch.linspace(-11, 11, 281 if D == 1 else 141, dtype=torch.float64)
        x = torch.cartesian_prod(*[line] * D).reshape(-1, D)
        return x, self.density(x) * (line[1] - line[0]) ** D


def network(D):
    """A small score, smooth and with random weights."""
    net = nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, D)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.7)
    return net


def fisher(mixture):
    """Half the mean of the squared length of the true score."""
    x, weight = mixture.grid()
    return (weight * mixture.score(x).square().sum(1)).sum() / 2


# The losses


@every_size
def test_the_explicit_loss_is_the_implicit_one_and_a_constant(D):
    mixture, score = Mixture(D), network(D)
    x, weight = mixture.grid()
    assert float(weight.sum()) == pytest.approx(1, abs=1e-12)
    explicit = (weight * scores.explicit(score, x, mixture.score)).sum()
    implicit = (weight * scores.implicit(score, x)).sum()
    torch.testing.assert_close(explicit - implicit, fisher(mixture), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient(explicit, score), gradient(implicit, score), rtol=1e-8, atol=1e-9)


def test_so_they_are_in_the_mean_over_data():
    mixture, score = Mixture(2), network(2)
    x = mixture.draw(20000)
    difference = scores.explicit(score, x, mixture.score) - scores.implicit(score, x)
    assert not far(difference.detach(), fisher(mixture))
    assert far(difference.detach(), fisher(mixture) + 0.2)


def test_the_explicit_loss_is_half_the_squared_distance():
    x, true = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    score = network(3)
    expected = [0.5 * float(((score(x[b]).detach() - true[b]) ** 2).sum()) for b in range(5)]
    for given in (true, lambda x: true):
        loss = scores.explicit(score, x, given)
        assert loss.shape == (5,)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("event_shape", [(), (1,), (4,), (2, 3)])
def test_the_divergence_is_the_trace_of_the_jacobian(event_shape):
    D = math.prod(event_shape)
    net = network(D)

    def score(x):
        return net(x.reshape(-1, D)).reshape(x.shape)

    x = torch.randn(5, *event_shape, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(net))(x.reshape(5, D))
    expected = (score(x) ** 2).reshape(5, D).sum(1) / 2 + jacobian.diagonal(dim1=1, dim2=2).sum(1)
    loss = scores.implicit(score, x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss.sum(), net), gradient(expected.sum(), net))


@pytest.mark.parametrize(("D", "sigma"), [(1, 0.3), (1, 1.0), (2, 0.3)])
@either_form
def test_the_denoising_loss_is_the_explicit_one_of_the_noisy_data_and_a_constant(D, sigma, control_variate):
    score, noisy = network(D), Mixture(D, sigma)
    x, weight = Mixture(D).grid()
    x, weight = x[weight > 1e-13], weight[weight > 1e-13]
    line = torch.linspace(-7.5, 7.5, 91 if D == 1 else 21, dtype=torch.float64)
    noise = torch.cartesian_prod(*[line] * D).reshape(-1, D)
    normal = (-(noise**2).sum(1) / 2).exp()
    normal, mean, slope = normal / normal.sum(), 0.0, 0.0
    for e, part in zip(noise, normal, strict=True):
        given = {"noise": e.expand_as(x), "control_variate": control_variate}
        loss = part * (weight * scores.denoising(score, x, sigma, **given)).sum()
        mean, slope = mean + loss.detach(), slope + gradient(loss, score)
    y, weight = noisy.grid()
    explicit = (weight * scores.explicit(score, y, noisy.score)).sum()
    torch.testing.assert_close(mean - explicit, D / 2 / sigma**2 - fisher(noisy), rtol=0, atol=2e-8)
    torch.testing.assert_close(slope, gradient(explicit, score), rtol=1e-6, atol=2e-8)


@every_size
def test_without_noise_the_denoising_loss_is_the_implicit_one_and_a_constant(D):
    """With noise and its mirror image, and both scaled so that their second moment is that of N(0, I): to sigma^2."""
    score = network(D)
    x, weight = Mixture(D).grid()
    expected = (weight * scores.implicit(score, x)).sum().detach()
    errors = []
    for sigma in (0.02, 0.01):
        losses = [
            scores.denoising(score, x, sigma, noise=sign * D**0.5 * unit.expand_as(x), control_variate=True)
            for unit in torch.eye(D, dtype=torch.float64)
            for sign in (1, -1)
        ]
        found = (weight * torch.stack(losses).mean(0)).sum().detach()
        errors.append(float(found - D / 2 / sigma**2 - expected))
    assert abs(errors[1]) < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.1)


def test_the_control_variate_bounds_the_variance():
    """And that of the gradient: here in a factor of the score, one for each draw."""
    net, number = network(2), 20000
    x, found = Mixture(2).draw(number), {}
    for sigma in (1.0, 0.1, 0.01, 0.001):
        noise = torch.randn_like(x)
        for controlled in (False, True):
            factor = torch.ones(number, 1, dtype=torch.float64, requires_grad=True)
            loss = scores.denoising(
                lambda x, factor=factor: factor * net(x).detach(), x, sigma, control_variate=controlled, noise=noise
            )
            slope = torch.autograd.grad(loss.sum(), factor)[0][:, 0]
            found[sigma, controlled] = loss.detach(), slope
    ratios, slopes = [], []
    for sigma in (1.0, 0.1, 0.01, 0.001):
        (plain, plain_slope), (loss, slope) = found[sigma, False], found[sigma, True]
        assert not far(loss - plain, 0.0)
        assert not far(slope - plain_slope, 0.0)
        ratios.append(float(plain.var() / loss.var()))
        slopes.append(float(plain_slope.var() / slope.var()))
    variances = [float(found[sigma, True][0].var()) for sigma in (0.1, 0.01, 0.001)]
    slope_variances = [float(found[sigma, True][1].var()) for sigma in (0.1, 0.01, 0.001)]
    assert max(variances) < 1.2 * min(variances)
    assert max(slope_variances) < 1.2 * min(slope_variances)
    assert ratios[2] / ratios[1] == pytest.approx(1e4, rel=0.3)  # sigma^-4 of the plain loss
    assert slopes[3] / slopes[2] == pytest.approx(1e2, rel=0.3)  # sigma^-2 of its gradient
    assert float(found[0.001, False][0].var()) == pytest.approx(2 / 2 / 0.001**4, rel=0.1)  # D / 2 sigma^4


def test_noise_of_a_datum_is_its_own():
    x, noise = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0])  # of float32, as a schedule's float64 meets float32 data
    score = network(3)
    for controlled in (False, True):
        losses = scores.denoising(score, x, sigma, noise=noise, control_variate=controlled)
        for b, one in enumerate(sigma.tolist()):
            expected = scores.denoising(score, x[b : b + 1], one, noise=noise[b : b + 1], control_variate=controlled)
            torch.testing.assert_close(losses[b : b + 1], expected)
        zero_dim = scores.denoising(score, x, sigma[1], noise=noise, control_variate=controlled)
        torch.testing.assert_close(zero_dim[1], losses[1])


def test_the_noise_is_drawn_standard_normal():
    x, seen = torch.full((40000, 2), 0.7, dtype=torch.float64), []

    def score(x):
        seen.append(x)
        return torch.zeros_like(x)

    loss = scores.denoising(score, x, 0.5)
    noise = (seen[0] - x) / 0.5
    assert len(seen) == 1
    assert not far(noise, 0.0)
    assert not far(noise**2, 1.0)
    assert not far(noise.prod(1), 0.0)
    torch.testing.assert_close(loss, (noise**2).sum(1) / 2 / 0.5**2)


@either_length
def test_of_one_number_the_sliced_loss_is_the_implicit_one(variance_reduced):
    net, x = network(1), torch.randn(7, 1, dtype=torch.float64)
    for num_projections in (1, 3):
        loss, implicit = scores.sliced(net, x, num_projections, variance_reduced), scores.implicit(net, x)
        torch.testing.assert_close(loss, implicit)
        torch.testing.assert_close(gradient(loss.sum(), net), gradient(implicit.sum(), net))


@either_length
def test_of_two_numbers_there_are_two_directions_whose_mean_is_the_implicit_loss(variance_reduced):
    net, x = network(2), torch.randn(6, 2, dtype=torch.float64)
    losses = torch.stack([scores.sliced(net, x, 1, variance_reduced).detach() for _ in range(40)])
    low, high = losses.min(0).values, losses.max(0).values
    between = torch.minimum((losses - low).abs(), (losses - high).abs())
    assert float(between.max()) < 1e-12
    assert bool((high - low > 1e-3).all())
    torch.testing.assert_close((low + high) / 2, scores.implicit(net, x).detach())
    four = scores.sliced(net, x, 4, variance_reduced).detach()
    parts = (four - low) / (high - low) * 4  # so many of the four were the higher
    torch.testing.assert_close(parts, parts.round(), rtol=0, atol=1e-9)
    assert len(set(parts.round().tolist())) > 1


@either_length
def test_the_sliced_loss_is_the_implicit_one_in_the_mean(variance_reduced):
    net, number = network(5), 20000
    x = torch.randn(1, 5, dtype=torch.float64)
    losses = scores.sliced(net, x.expand(number, 5), 2, variance_reduced)
    assert not far(losses.detach(), scores.implicit(net, x).detach())
    mean = gradient(losses.mean(), net)
    spread = torch.stack([gradient(scores.sliced(net, x, 2, variance_reduced).sum(), net) for _ in range(300)]).std(0)
    assert bool(((mean - gradient(scores.implicit(net, x).sum(), net)).abs() <= 6 * spread / number**0.5 + 1e-9).all())


def test_more_directions_and_a_whole_length_vary_less():
    net, x = network(5), torch.randn(1, 5, dtype=torch.float64).expand(20000, 5)
    whole, four, paper = (
        float(scores.sliced(net, x, number, reduced).detach().var())
        for number, reduced in ((1, True), (4, True), (1, False))
    )
    assert whole / four == pytest.approx(4, rel=0.2)
    assert paper > whole


LOSSES = {
    "explicit": lambda score, x: scores.explicit(score, x, torch.zeros_like(x)),
    "implicit": scores.implicit,
    "sliced": scores.sliced,
    "denoising": lambda score, x: scores.denoising(score, x, 0.5),
    "controlled": lambda score, x: scores.denoising(score, x, 0.5, control_variate=True),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_a_loss_is_the_same_where_no_gradient_is_kept(name):
    net, x = network(3), torch.randn(4, 3, dtype=torch.float64)
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with mode():
            found.append(LOSSES[name](net, x))
    assert [loss.requires_grad for loss in found] == [True, False, False]
    for loss in found[1:]:
        torch.testing.assert_close(loss, found[0].detach())
    assert not x.requires_grad


@every_loss
def test_losses_of_data_that_are_computed_reach_what_they_were_computed_from(name):
    net, z = network(3), torch.randn(4, 3, dtype=torch.float64)

    def loss(shift):
        torch.manual_seed(1)
        return LOSSES[name](net, z + shift).sum()

    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(shift), shift)
    with torch.no_grad():
        expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_loss
def test_what_a_network_computes_in_half_precision_is_summed_in_that_of_the_data(name):
    net, x, seen = network(3).float(), torch.randn(4, 3), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        loss = LOSSES[name](net, x)
    torch.manual_seed(1)
    assert set(seen) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](net, x), rtol=0.1, atol=0.2)


@every_loss
def test_a_half_precise_score_is_rounded_once(name):
    x, found = torch.randn(4, 300), []
    for score in (lambda x: (1.2345 * x).bfloat16(), lambda x: (1.2345 * x).bfloat16().float()):
        torch.manual_seed(1)
        found.append(LOSSES[name](score, x).detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_constant_score_and_one_of_fixed_numbers_diverge_as_they_should():
    x, shift = torch.randn(4, 3), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    for loss in (scores.implicit, scores.sliced):
        torch.testing.assert_close(loss(torch.zeros_like, x), torch.zeros(4))
        found = loss(lambda x: shift.expand_as(x), x)
        torch.testing.assert_close(found.detach(), torch.full((4,), 7.0))
        torch.testing.assert_close(torch.autograd.grad(found.sum(), shift)[0], 4 * shift.detach())
        torch.testing.assert_close(loss(lambda x: -2 * x, x).detach(), 2 * (x**2).sum(1) - 6)


# Energies


class Energy(nn.Module):
    """x^T A x / 2 + c . x, of a parameter A and a context c."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[2.0, 0.5], [0.1, 1.0]], dtype=torch.float64))

    def forward(self, x, c=0.0):
        return ((x @ self.A) * x).sum(1) / 2 + (c * x).sum(1)


def test_a_score_is_minus_the_gradient_of_an_energy():
    energy, x, c = Energy(), *torch.randn(2, 5, 2, dtype=torch.float64)
    score = scores.minus_gradient(energy)
    symmetric = ((energy.A + energy.A.T) / 2).detach()
    torch.testing.assert_close(score(x).detach(), -x @ symmetric)
    torch.testing.assert_close(score(x, c).detach(), -x @ symmetric - c)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = score(x)
        assert not found.requires_grad
        torch.testing.assert_close(found.clone(), -x @ symmetric)


def test_an_energy_is_learned_by_the_gradient_of_its_losses():
    energy, x = Energy(), torch.randn(5, 2, dtype=torch.float64)
    A = energy.A.detach().clone().requires_grad_()
    symmetric = (A + A.T) / 2
    expected = ((x @ symmetric) ** 2).sum(1) / 2 - symmetric.trace()
    loss = scores.implicit(scores.minus_gradient(energy), x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss.sum(), energy), torch.autograd.grad(expected.sum(), A)[0].flatten())
    noise = torch.randn_like(x)
    loss = scores.denoising(scores.minus_gradient(energy), x, 0.5, noise=noise)
    expected = ((noise / 0.5 - (x + 0.5 * noise) @ ((A + A.T) / 2)) ** 2).sum(1) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss.sum(), energy), torch.autograd.grad(expected.sum(), A)[0].flatten())


def test_the_best_quadratic_energy_is_that_of_the_normal_law():
    """The implicit loss of data of covariance C is least at A = C^-1."""
    C = torch.tensor([[1.5, 0.4], [0.4, 0.7]], dtype=torch.float64)
    x = torch.randn(4000, 2, dtype=torch.float64)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / 4000), x.T, upper=False).T
    x = x @ torch.linalg.cholesky(C).T  # of the covariance C to rounding
    energy = Energy()
    with torch.no_grad():
        energy.A.copy_(torch.linalg.inv(C))
    loss = scores.implicit(scores.minus_gradient(energy), x).mean()
    torch.testing.assert_close(gradient(loss, energy), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(loss.detach()) == pytest.approx(-float(torch.linalg.inv(C).trace()) / 2, abs=1e-12)


# The noise to train with


def largest_distance(x):
    x = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    return max(float(np.sqrt(((x - row) ** 2).sum(1)).max()) for row in x)


@pytest.mark.parametrize("shape", [(2,), (7, 3), (1300, 2), (600, 2, 3), (1100, 40)])
def test_the_initial_noise_is_the_largest_distance(shape):
    x = 0.3 + torch.randn(shape, dtype=torch.float64).exp()
    assert scores.initial_noise(x) == pytest.approx(largest_distance(x), rel=1e-12)


def test_the_initial_noise_is_found_in_another_block_and_where_all_are_near_each_other():
    ring = torch.randn(1500, 2, dtype=torch.float64)
    ring = ring / ring.norm(dim=1, keepdim=True)  # all as far from the mean
    assert scores.initial_noise(ring) == pytest.approx(largest_distance(ring), rel=1e-12)
    near = 1000 + 0.01 * torch.randn(700, 3)  # in float32, where products of coordinates would lose all
    assert scores.initial_noise(near) == pytest.approx(largest_distance(near), rel=1e-4)
    assert scores.initial_noise(torch.ones(3, 2)) == 0


def test_the_initial_noise_of_some_data():
    x = torch.randn(50, 2, dtype=torch.float64)
    found = scores.initial_noise(x, num_samples=10, generator=3)
    assert found == scores.initial_noise(x, 10, torch.Generator().manual_seed(3))
    chosen = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:10]
    assert found == pytest.approx(largest_distance(x[chosen]), rel=1e-12)
    assert found < scores.initial_noise(x)
    assert scores.initial_noise(x, 50, 1) == pytest.approx(scores.initial_noise(x), rel=1e-12)
    assert len({scores.initial_noise(x, 3) for _ in range(5)}) > 1  # of torch's source
    before = torch.get_rng_state()
    scores.initial_noise(x, 3, 1)
    assert torch.equal(before, torch.get_rng_state())


def normal_below(z):
    return (1 + math.erf(z / math.sqrt(2))) / 2


def overlap_of(D, ratio):
    root = math.sqrt(2 * D)
    return normal_below(root * (ratio - 1) + 3 * ratio) - normal_below(root * (ratio - 1) - 3 * ratio)


@pytest.mark.parametrize("D", [5, 20, 784, 3072, 196608])
@pytest.mark.parametrize("overlap", [0.01, 0.5, 0.9, 0.997])
def test_the_noise_ratio_satisfies_its_equation(D, overlap):
    ratio = scores.noise_ratio(D, overlap)
    assert ratio > 1
    assert overlap_of(D, ratio) == pytest.approx(overlap, abs=1e-11)
    assert overlap_of(D, ratio * (1 + 1e-6)) < overlap < overlap_of(D, 1 + (ratio - 1) * (1 - 1e-6))


@pytest.mark.parametrize("D", [5, 784, 3072, 10**6])
def test_at_a_half_the_ratio_is_where_the_lower_end_is_the_middle(D):
    """The lower end, sqrt(2 D) (gamma - 1) - 3 gamma, is at 0, and the upper is at 6 gamma, where nothing is left."""
    root = math.sqrt(2 * D)
    assert scores.noise_ratio(D) == pytest.approx(root / (root - 3), rel=1e-8)


def test_the_overlap_is_that_of_the_lengths_of_noises():
    D = 3072
    ratio = scores.noise_ratio(D, 0.3)
    length = torch.distributions.Chi2(torch.tensor(float(D), dtype=torch.float64)).sample((100000,)).sqrt()
    inside = (length - ratio * D**0.5).abs() < 3 * ratio / 2**0.5
    assert float(inside.double().mean()) == pytest.approx(0.3, abs=0.01)


def test_a_smaller_overlap_and_fewer_numbers_take_a_larger_ratio():
    ratios = [scores.noise_ratio(D, overlap) for D, overlap in ((3072, 0.9), (3072, 0.5), (3072, 0.1), (784, 0.1))]
    assert ratios == sorted(ratios)
    assert scores.noise_ratio(5, 1e-290) < math.inf


@pytest.mark.parametrize("D", [1, 2, 3, 4])
def test_of_fewer_than_five_numbers_no_ratio_overlaps_less(D):
    least = math.erf(3 / math.sqrt(2))
    assert min(overlap_of(D, 1 + 10.0**power) for power in np.linspace(-6, 3, 200)) >= least - 1e-12
    with pytest.raises(ValueError, match="D must be an int of at least 5"):
        scores.noise_ratio(D)


def variance_left(epsilon, sigmas, i, updates):
    """The variance after Langevin updates at noise i of the exact score, over what it should be; sigmas fall."""
    variance, alpha = sigmas[i - 1] ** 2, epsilon * sigmas[i] ** 2 / sigmas[-1] ** 2
    for _ in range(updates):
        variance = (1 - alpha / sigmas[i] ** 2) ** 2 * variance + 2 * alpha
    return variance / sigmas[i] ** 2


@pytest.mark.parametrize("updates", [1, 2, 5, 100])
@pytest.mark.parametrize(("T", "low", "high"), [(2, 0.3, 2.0), (5, 0.01, 50.0), (232, 0.01, 50.0)])
def test_the_step_size_leaves_the_least_variance(updates, T, low, high):
    sigmas = [high * (low / high) ** (i / (T - 1)) for i in range(T)]
    found = scores.langevin_step_size(pyrodiff.GeometricSchedule(T, low, high), 2, updates)
    at = [variance_left(found, sigmas, i, updates) for i in range(1, T)]
    np.testing.assert_allclose(at, at[0], rtol=1e-10)  # the same at every noise
    grid = low**2 * 10.0 ** np.linspace(-9, math.log10(2), 4000)  # beyond twice the squared noise all is unstable
    all_of_them = variance_left(grid, sigmas, 1, updates)
    assert all_of_them.min() > 1
    assert 1 < at[0] <= all_of_them.min() + 1e-12
    assert all_of_them.min() - at[0] < 1e-3 * (at[0] - 1)
    slope = [variance_left(found * (1 + h), sigmas, 1, updates) for h in (-1e-3, 1e-3)]
    assert min(slope) > at[0]
    assert abs(slope[1] - slope[0]) < 0.02 * (slope[0] + slope[1] - 2 * at[0])


@pytest.mark.parametrize("ratio", [1.01, 2.0, 30.0])
def test_the_step_size_of_one_update(ratio):
    """The variance over sigma^2 is gamma^2 u^2 + 2 - 2 u at u = 1 - epsilon / sigma^2: least at u = gamma^-2."""
    found = scores.langevin_step_size(pyrodiff.GeometricSchedule(3, 0.2, 0.2 * ratio**2), 2, 1)
    assert found == pytest.approx(0.2**2 * (1 - ratio**-2), rel=1e-12)


@pytest.mark.parametrize(
    ("high", "T", "updates", "published"),
    [(50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6), (348, 2311, 3, 0.9e-6)],
)
def test_the_step_sizes_of_the_paper(high, T, updates, published):
    """Of CIFAR-10, CelebA, LSUN bedrooms and FFHQ, as its published settings have them, to their last digit."""
    found = scores.langevin_step_size(pyrodiff.GeometricSchedule(T, 0.01, high), 2, updates)
    assert found == pytest.approx(published, abs=0.06e-6)


def test_the_step_size_of_a_chain_of_evenly_chosen_noises():
    whole = pyrodiff.GeometricSchedule(9, 0.1, 8.0)
    found = scores.langevin_step_size(pyrodiff.SubSchedule(whole, [1, 3, 5, 7, 9]), 2, 4)
    assert found == pytest.approx(scores.langevin_step_size(pyrodiff.GeometricSchedule(5, 0.1, 8.0), 2, 4), rel=1e-9)


# The network divided by the noise

VP, VE = pyrodiff.CosineSchedule(6), pyrodiff.GeometricSchedule(6, 0.1, 9.0)
both = pytest.mark.parametrize("schedule", [VP, VE], ids=["VP", "VE"])


class Shifted(nn.Module):
    """A network without a time, but with a context, that counts its calls."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x_t, shift=0.0):
        return 2 * x_t + self.shift + shift


@both
@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
def test_the_network_is_divided_by_the_noise_of_each_datum(schedule, event_shape):
    x = torch.randn(5, *event_shape, dtype=torch.float64)
    score = DividedByNoise(Shifted(), schedule)
    for t in (1, 4, 6):
        torch.testing.assert_close(score(x, t), (2 * x + 0.7) / float(schedule.noise(t)))
        torch.testing.assert_close(score(x, torch.tensor(t)), score(x, t))
    t = torch.tensor([1, 6, 3, 3, 2])
    expected = torch.stack([(2 * one + 0.7) / float(schedule.noise(int(k))) for one, k in zip(x, t, strict=True)])
    torch.testing.assert_close(score(x, t), expected)
    torch.testing.assert_close(score(x.expand(2, *x.shape), t.expand(2, 5)), expected.expand(2, *x.shape))
    shift = torch.randn_like(x)
    torch.testing.assert_close(score(x, 4, shift), (2 * x + 0.7 + shift) / float(schedule.noise(4)))


def test_the_score_has_the_dtype_of_the_state():
    for dtype in (torch.float32, torch.float64):
        score = DividedByNoise(nn.Linear(3, 3), pyrodiff.GeometricSchedule(6, 0.1, 9.0)).to(dtype)
        assert score(torch.randn(5, 3, dtype=dtype), torch.arange(1, 6)).dtype == dtype
        assert score.schedule.noise(3).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert score.float()(torch.randn(5, 3), 2).dtype == torch.float32


def test_the_schedule_is_a_part_and_shared():
    forward = pyrodiff.GaussianForward(pyrodiff.GeometricSchedule(6, 0.1, 9.0))
    score = DividedByNoise(nn.Linear(3, 3).double(), forward.schedule)
    denoiser = pyrodiff.ScorePrediction(score, forward)
    other = pyrodiff.GeometricSchedule(6, 0.2, 30.0)
    state = {**denoiser.state_dict(), **{f"network.schedule.{k}": v for k, v in other.state_dict().items()}}
    state |= {f"forward_process.schedule.{k}": v for k, v in other.state_dict().items()}
    x = torch.randn(5, 3, dtype=torch.float64)
    before = score(x, 2)
    denoiser.load_state_dict(state)
    torch.testing.assert_close(score(x, 2), before * VE.noise(2) / other.noise(2))
    assert torch.equal(forward.schedule.noise(2), other.noise(2))


def test_a_learned_noise_is_learned_through_it_once():
    schedule = pyrodiff.LearnedLogSNRSchedule(6, 5.0, -5.0)
    forward = pyrodiff.GaussianForward(schedule)
    denoiser = pyrodiff.ScorePrediction(DividedByNoise(nn.Linear(3, 3).double(), schedule), forward)
    names = [name for name, _ in denoiser.named_parameters()]
    assert len(names) == 2 + len(list(schedule.parameters()))
    denoiser.network(torch.randn(5, 3, dtype=torch.float64), 2).sum().backward()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in schedule.parameters())


def test_in_a_chain_of_fewer_steps_the_noise_is_that_of_the_whole():
    forward = pyrodiff.GaussianForward(VE)
    score = DividedByNoise(Shifted(), VE)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.ScorePrediction(score, forward))
    whole = pyrodiff.Diffusion(forward, reverse, event_shape=(3,))
    x = torch.randn(5, 3, dtype=torch.float64)
    found = whole.subchain([2, 5]).reverse.denoiser(x, 2)
    torch.testing.assert_close(found, x + VE.noise(5) * (2 * x + 0.7))
    torch.testing.assert_close(found, whole.reverse.denoiser(x, 5))
    assert bool(pyrodiff.bound(whole.double(), x, generator=1).nats.isfinite().all())


# Bad input


def test_noises_that_do_not_overlap_in_so_many_dimensions_are_warned_of():
    """NCSN's first ten noises, from 1 to 0.01, are 1.67 apart: in the 3072 dimensions of CIFAR-10 they are disjoint."""
    schedule = pyrodiff.GeometricSchedule(10, 0.01, 1.0)
    with pytest.warns(UserWarning, match=r"ratio of 1.668, do not overlap in 3072 dimensions .*noise_ratio"):
        far = pyrodiff.langevin_step_size(schedule, 3072, 100)
    assert far == pyrodiff.langevin_step_size(schedule, 2, 100)  # as it does not depend on D
    even = pyrodiff.GeometricSchedule(232, 0.01, 50.0)
    assert pyrodiff.langevin_step_size(even, 3072, 5) == pytest.approx(6.2e-6, rel=0.01)
    with pytest.raises(ValueError, match="D must be an int of at least 1, but it is 0"):
        pyrodiff.langevin_step_size(even, 0, 5)
