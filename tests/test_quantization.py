"""Levels and the laws over them, against exact fractions, fifty digits of the normal law, and frequencies."""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pyro
import pytest
import torch
from exact import far
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyrodiff

EPS = torch.finfo(torch.float64).eps
LEVELS = (2, 3, 17, 256)
SCALES = (1e-6, 1e-3, 0.05, 0.4, 1.0, 30.0, 1e4)
LOCS = (0.3, 0.0, -0.97, 1.0, -1.0, 0.0625, 1 / 255, -2.5, 40.0, -1e3)  # some on a level, some on an edge
KINDS = {torch.float16: (2, 3, 17, 256, 513), torch.bfloat16: (2, 3, 17, 65), torch.float32: (2, 17, 2**22 + 1)}


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def point(k, levels):
    return Fraction(2 * k, levels - 1) - 1


def some(levels):
    return sorted({0, 1, levels // 3, levels // 2, levels - 2, levels - 1} & set(range(levels)))


def edges(k, levels, loc, scale):
    """The ends of the bin of level k in standard deviations from the mean, None where it is open."""
    half = mpmath.mpf(1) / (levels - 1)
    v = mpmath.mpf(2 * k) / (levels - 1) - 1
    lower = None if k == 0 else (v - half - mpmath.mpf(loc)) / mpmath.mpf(scale)
    upper = None if k == levels - 1 else (v + half - mpmath.mpf(loc)) / mpmath.mpf(scale)
    return lower, upper


def log_mass(k, levels, loc, scale):
    """The log of what N(loc, scale^2) gives to the bin of level k, and its derivatives in loc and scale."""
    with mpmath.workdps(50):
        below = lambda z: mpmath.erfc(-z / mpmath.sqrt(2)) / 2  # noqa: E731
        lower, upper = edges(k, levels, loc, scale)
        left, right = 0 if lower is None else below(lower), 0 if upper is None else below(-upper)
        if left + right < 0.5:
            log_p = mpmath.log1p(-(left + right))
        elif right > left:  # all of the law is on the right, or far on the left as seen from the mean
            log_p = mpmath.log(below(upper) - left)
        else:
            log_p = mpmath.log(below(-lower) - right)
        by_loc = by_scale = mpmath.mpf(0)
        for z, sign in ((lower, 1), (upper, -1)):
            if z is not None:
                density = mpmath.exp(-z * z / 2 - log_p) / mpmath.sqrt(2 * mpmath.pi) / mpmath.mpf(scale)
                by_loc, by_scale = by_loc + sign * density, by_scale + sign * z * density
        return float(log_p), float(by_loc), float(by_scale)


def probabilities(levels, loc, scale):
    return f64([math.exp(log_mass(k, levels, loc, scale)[0]) for k in range(levels)])


# the levels


@pytest.mark.parametrize("levels", [*LEVELS, 5, 100, 1000])
def test_points_are_the_fractions_rounded_once(levels):
    expected = f64([float(point(k, levels)) for k in range(levels)])
    k = torch.arange(levels)
    assert torch.equal(pyrodiff.Levels(levels).points(), expected)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(pyrodiff.from_levels(k, levels, dtype=dtype), expected.to(dtype))
    assert pyrodiff.bin_width(levels) == float(Fraction(2, levels - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_levels_inverts_from_levels_for_every_number_of_levels(dtype):
    for levels in range(2, 1001):
        k = torch.arange(levels)
        x = pyrodiff.from_levels(k, levels, dtype=dtype)
        assert (x[0].item(), x[-1].item(), x.dtype) == (-1, 1, dtype)
        assert torch.equal(pyrodiff.to_levels(x, levels), k)
        noisy = pyrodiff.from_levels(k, levels, uniform=True, dtype=dtype)
        assert torch.equal(pyrodiff.to_levels(noisy, levels), k)


@pytest.mark.parametrize(("dtype", "levels"), [(dtype, levels) for dtype in KINDS for levels in KINDS[dtype]])
def test_to_levels_inverts_from_levels_up_to_the_most_levels_of_a_dtype(dtype, levels):
    k = torch.arange(levels) if levels < 10**6 else torch.tensor([0, 1, levels // 2, levels - 2, levels - 1])
    x = pyrodiff.from_levels(k, levels, dtype=dtype)
    assert (x[0].item(), x[-1].item(), x.dtype) == (-1, 1, dtype)
    assert torch.equal(pyrodiff.to_levels(x, levels), k)
    assert pyrodiff.Levels(levels).check(x).all()
    if torch.finfo(dtype).eps > 1e-3 * pyrodiff.bin_width(levels):  # the noise would be another than uniform
        with pytest.raises(ValueError, match="dtype must resolve the noise"):
            pyrodiff.from_levels(k, levels, uniform=True, dtype=dtype)
        return
    noisy = pyrodiff.from_levels(k.expand(500, -1), levels, uniform=True, dtype=dtype)
    assert torch.equal(pyrodiff.to_levels(noisy, levels), k.expand(500, -1))


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float16, (2,)), (torch.float32, (2, 17, 256, 10_000)), (torch.float64, (2, 17, 256, 1000))],
)
def test_even_the_outermost_noise_stays_in_its_bin(extreme, dtype, most, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, **_: torch.full(shape, extreme, dtype=dtype))
    for levels in most:
        k = torch.arange(min(levels, 2000))
        x = pyrodiff.from_levels(k, levels, uniform=True, dtype=dtype)
        assert torch.equal(pyrodiff.to_levels(x, levels), k), levels
        away = (x.double() - pyrodiff.from_levels(k, levels, dtype=torch.float64)) / pyrodiff.bin_width(levels)
        slack = 4 * torch.finfo(dtype).eps / pyrodiff.bin_width(levels)
        torch.testing.assert_close(away, torch.full_like(away, extreme - 0.5), rtol=0, atol=slack)


def test_the_noise_is_uniform_on_the_bin():
    k = torch.arange(17).repeat(20000, 1)
    x = pyrodiff.from_levels(k, 17, uniform=True, dtype=torch.float64)
    away = (x - f64([float(point(j, 17)) for j in range(17)])) / 0.125
    assert not far(away, 0.0)
    assert not far(away**2, 1 / 12)
    for fraction in (0.1, 0.35, 0.8):
        assert not far((away < fraction - 0.5).double(), fraction)
    assert not far(away[:, :-1] * away[:, 1:], 0.0)


def test_a_generator_gives_the_noise_again_and_leaves_the_other_alone():
    k = torch.arange(17).repeat(3, 1)
    state = torch.get_rng_state()
    first, again = (
        pyrodiff.from_levels(k, 17, uniform=True, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(pyrodiff.from_levels(k, 17, uniform=True), first)
    assert not torch.equal(torch.get_rng_state(), state)
    pyrodiff.from_levels(k, 17, generator=torch.Generator())
    assert first.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64])
def test_whole_levels_have_any_dtype_and_shape(dtype):
    k = torch.tensor([[0, 3], [16, 5]]).to(dtype)
    assert torch.equal(pyrodiff.from_levels(k, 17), torch.tensor([[-1.0, -0.625], [1.0, -0.375]]))
    assert pyrodiff.from_levels(k[:0], 17, uniform=True).shape == (0, 2)
    assert pyrodiff.from_levels(k[0, 1], 17).shape == ()
    assert torch.equal(pyrodiff.from_levels(torch.tensor([False, True]), 2), torch.tensor([-1.0, 1.0]))


def test_to_levels_gives_the_nearest_level_and_the_outer_bins_are_open():
    x = f64([-1e30, -9.0, -1.0, -0.9376, -0.9374, -0.3, 0.0624, 0.0626, 0.9374, 0.9376, 4.0, 1e30])
    expected = [0, 0, 0, 0, 1, 6, 8, 9, 15, 16, 16, 16]
    assert pyrodiff.to_levels(x, 17).tolist() == expected
    assert pyrodiff.to_levels(x.float().reshape(3, 4), 17).tolist() == [expected[:4], expected[4:8], expected[8:]]
    assert pyrodiff.to_levels(x, 2).tolist() == [0] * 6 + [1] * 6  # the edge is 0


@pytest.mark.parametrize("levels", LEVELS)
def test_levels_are_recognised_to_a_thousandth_of_a_bin(levels):
    support, width = pyrodiff.Levels(levels), pyrodiff.bin_width(levels)
    assert (support.is_discrete, repr(support)) == (True, f"Levels({levels})")
    x = pyrodiff.from_levels(torch.arange(levels), levels, dtype=torch.float64)
    for off in (0.0, 9e-4, -9e-4):
        assert support.check(x + off * width).all()
    for off in (2e-3, -2e-3, 0.5, -0.3):
        assert not support.check(x + off * width).any()
    assert support.check(x.reshape(-1, 1)).shape == (levels, 1)
    for outside in (-1 - width, 1 + width, math.nan, math.inf, -math.inf):
        assert not support.check(f64([outside])).any()


# the discretised normal law


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_level_has_the_difference_of_two_normal_distribution_functions(levels, scale):
    width = pyrodiff.bin_width(levels)
    for loc, k in itertools.product((*LOCS, -1 + 1.5 * width, 1 - width / 2 + 1e-9), some(levels)):
        law = pyrodiff.DiscretizedNormal(f64(loc), f64(scale), levels)
        value = law.log_prob(pyrodiff.from_levels(torch.tensor(k), levels, dtype=torch.float64)).item()
        # a wide law is the difference of two halves, with their rounding; a narrow one sees the edge's own
        atol = 8 * EPS * (scale / width + 1 / scale) if value < -1e-3 else 0
        assert value == pytest.approx(log_mass(k, levels, loc, scale)[0], rel=4e-13, abs=atol)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_mass_of_all_levels_is_one(levels):
    loc, scale = (x.flatten() for x in torch.meshgrid(f64([*LOCS, 1e8]), f64([*SCALES, 1e-9]), indexing="ij"))
    law = pyrodiff.DiscretizedNormal(loc, scale, levels)
    mass = law.log_prob(law.enumerate_support()).exp().sum(0)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-12)


def gradients(cases, levels):
    """The derivatives of the log probability in loc and scale at each (k, loc, scale), ours and the exact ones."""
    k, loc, scale = zip(*cases, strict=True)
    loc, scale = f64(loc).requires_grad_(), f64(scale).requires_grad_()
    x = pyrodiff.from_levels(torch.tensor(k), levels, dtype=torch.float64)
    value = pyrodiff.DiscretizedNormal(loc, scale, levels).log_prob(x)
    assert value.isfinite().all()
    ours = torch.stack(torch.autograd.grad(value.sum(), (loc, scale)), -1)
    return ours, f64([log_mass(k, levels, loc, scale)[1:] for k, loc, scale in cases])


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_gradient_is_that_of_the_exact_law(levels, scale):
    width, cases = pyrodiff.bin_width(levels), []
    for k, sigmas in itertools.product(some(levels), (0.0, 0.2, -0.2, 3.0, -3.0, 40.0, -40.0, 300.0, -300.0)):
        for start in (-1.0, 0.3, float(point(k, levels)), float(point(k, levels)) + width / 2):
            loc = start + sigmas * scale
            cases += [(k, loc, scale)] * ((2 + abs(loc)) / scale < 3000)
    if cases:
        ours, exact = gradients(cases, levels)
        away = (2 + f64([[loc] for _, loc, _ in cases]).abs()) / scale  # in standard deviations
        # the square is torch's; a wide law is a difference; a narrow one sees the rounding of an edge
        rtol = 4e-12 + 4 * EPS * away**2 + 16 * EPS * (1 + away) * scale / width
        atol = 64 * EPS * (1 + scale / width + 1 / scale) / scale
        assert ((ours - exact).abs() <= (rtol * exact.abs()).clamp(min=atol)).all()


@pytest.mark.parametrize("sigmas", [1e5, 1e7, 1e9])
def test_the_gradient_is_right_however_far_off(sigmas):
    cases = [(k, sign * 40.0, 40.0 / sigmas) for k, sign in itertools.product((0, 5, 16), (-1, 1))]
    torch.testing.assert_close(*gradients(cases, 17), rtol=1e-9, atol=1e-12)


def test_the_far_tails_are_finite_in_single_precision():
    for loc, scale, levels in itertools.product((-1e4, -40.0, 0.3, 40.0, 1e4), (1e-4, 0.1), LEVELS):
        mean, deviation = torch.tensor(loc, requires_grad=True), torch.tensor(scale, requires_grad=True)
        law = pyrodiff.DiscretizedNormal(mean, deviation, levels)
        value = law.log_prob(law.enumerate_support())
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert all(gradient.isfinite() for gradient in torch.autograd.grad(value.sum(), (mean, deviation)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_shorter_dtype_gets_the_float64_value_rounded(dtype):
    levels = 17
    loc, scale = (x.flatten().to(dtype) for x in torch.meshgrid(f64(LOCS[:7]), f64([0.05, 0.4, 3.0]), indexing="ij"))
    short = pyrodiff.DiscretizedNormal(loc, scale, levels)
    long = pyrodiff.DiscretizedNormal(loc.double(), scale.double(), levels)
    assert torch.equal(short.log_prob(short.enumerate_support()), long.log_prob(long.enumerate_support()).to(dtype))
    one = torch.tensor(0.5, dtype=dtype)  # of no dimension, which decides no dtype by itself
    assert torch.equal(short.log_prob(one), long.log_prob(one.double()).to(dtype))


@pytest.mark.parametrize(
    ("levels", "loc", "scale"), [(2, 0.2, 0.7), (17, 0.3, 0.2), (17, -0.97, 0.02), (17, 3.0, 2.0), (256, 0.7, 0.01)]
)
def test_draws_have_the_frequencies_of_the_law(levels, loc, scale):
    law = pyrodiff.DiscretizedNormal(f64(loc), f64(scale), levels)
    x = law.sample((50_000,))
    k = pyrodiff.to_levels(x, levels)
    assert torch.equal(x, pyrodiff.from_levels(k, levels, dtype=torch.float64))
    frequencies, p = torch.bincount(k, minlength=levels) / 50_000, probabilities(levels, loc, scale)
    often = p * 50_000 > 10
    error = (p * (1 - p) / 50_000).sqrt()
    assert ((frequencies - p).abs()[often] < 5 * error[often] + 1e-10).all()
    assert (frequencies[~often] * 50_000 < 40).all()
    torch.testing.assert_close(law.mean, (p * pyrodiff.Levels(levels).points()).sum(), rtol=0, atol=1e-12)


def test_narrow_laws_round_their_mean():
    loc = f64([-5.0, -0.95, -0.1, 0.05, 0.07, 0.9, 8.0])
    law = pyrodiff.DiscretizedNormal(loc, f64(1e-9), 17)
    expected = pyrodiff.from_levels(pyrodiff.to_levels(loc, 17), 17, dtype=torch.float64)
    assert torch.equal(law.sample((3,)), expected.expand(3, -1))
    torch.testing.assert_close(law.mean, expected)


# laws over levels in general


def discretized(shape, dtype=torch.float64):
    return pyrodiff.DiscretizedNormal(
        torch.linspace(-1.2, 0.9, math.prod(shape), dtype=dtype).reshape(shape), torch.tensor(0.3, dtype=dtype), 5
    )


def categorical(shape, dtype=torch.float64):
    return pyrodiff.LevelCategorical(torch.linspace(-3, 2, math.prod(shape) * 5, dtype=dtype).sin().reshape(*shape, 5))


every_law = pytest.mark.parametrize("law", [discretized, categorical])


@every_law
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(law, shape, dtype):
    law = law(shape, dtype)
    assert (law.batch_shape, law.event_shape, law.levels) == (shape, (), 5)
    assert (law.has_enumerate_support, law.has_rsample, repr(law.support)) == (True, False, "Levels(5)")
    points = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=dtype)
    whole, column = law.enumerate_support(), law.enumerate_support(expand=False)
    assert torch.equal(column, points.reshape(5, *(1 for _ in shape)))
    assert torch.equal(whole, column.expand(5, *shape))
    for x, expected in ((law.sample(), shape), (law.sample((4,)), (4, *shape)), (law.sample((4, 2)), (4, 2, *shape))):
        assert (x.shape, x.dtype, x.requires_grad) == (expected, dtype, False)
        assert law.log_prob(x).shape == expected
        assert law.log_prob(x).dtype == dtype
        assert torch.isin(x, points).all()
    log_p = law.log_prob(column)
    assert torch.equal(log_p, law.log_prob(whole))
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(shape, dtype=dtype))
    torch.testing.assert_close(law.mean, (whole * log_p.exp()).sum(0))
    event = law.to_event(len(shape))
    assert (event.batch_shape, event.event_shape, event.sample((4,)).shape) == ((), shape, (4, *shape))


@every_law
def test_an_expanded_law_is_the_law_many_times(law):
    law = law((3,))
    wide = law.expand((2, 4, 3))
    assert (type(wide), wide.batch_shape, wide.sample((6,)).shape) == (type(law), (2, 4, 3), (6, 2, 4, 3))
    x = wide.sample()
    assert torch.equal(wide.log_prob(x), law.log_prob(x))
    assert torch.equal(wide.enumerate_support()[:, 1, 2], law.enumerate_support())
    torch.testing.assert_close(wide.mean, law.mean.expand(2, 4, 3))
    assert not torch.equal(x[0], x[1])
    with pyro.plate("data", 2):  # Pyro expands a law in a plate
        assert pyro.sample("x", law.to_event(1)).shape == (2, 3)


@every_law
def test_no_level_is_refused_under_validation_alone(law):
    for shape in ((), (2,)):
        for value in (0.01, -1.5, 1.5, 0.25, math.nan, math.inf):
            with pytest.raises(ValueError, match="Levels"):
                law(shape).log_prob(f64(value))
    with pytest.raises(ValueError, match="Levels"):
        law((2,)).to_event(1).log_prob(f64([0.5, 0.3]))
    pyro.enable_validation(False)
    assert law(()).log_prob(f64(0.51)) == law(()).log_prob(f64(0.5))  # of the nearest level


@every_law
def test_an_expanded_law_refuses_no_level_too(law):
    with pytest.raises(ValueError, match="Levels"):
        law((3,)).expand((2, 3)).log_prob(f64(0.3))


@every_law
def test_a_level_summed_out_by_pyro_is_summed_out(law):
    law, x = law(()), f64([0.2, -0.9, 0.6])

    @config_enumerate
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", law.expand((3,)))
            pyro.sample("x", pyro.distributions.Normal(z, 0.3), obs=x)

    p, points = law.log_prob(law.enumerate_support()).exp().numpy(), np.linspace(-1, 1, 5)
    density = np.exp(-0.5 * ((x.numpy()[:, None] - points) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    assert loss == pytest.approx(-np.log(density @ p).sum(), abs=1e-10)


# any law


def test_a_level_categorical_normalises_and_gathers():
    logits = torch.randn(2, 3, 17, dtype=torch.float64) * 4 + 9
    weights = np.exp(logits.numpy())
    p = weights / weights.sum(-1, keepdims=True)
    law = pyrodiff.LevelCategorical(logits)
    for k in range(17):
        np.testing.assert_allclose(law.log_prob(f64(float(point(k, 17)))).numpy(), np.log(p[..., k]), rtol=1e-12)
    k = torch.tensor([[0, 16, 5], [8, 1, 2]])
    expected = np.log(np.take_along_axis(p, k[..., None].numpy(), -1)[..., 0])
    x = pyrodiff.from_levels(k, 17, dtype=torch.float64)
    np.testing.assert_allclose(law.log_prob(x).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(law.mean.numpy(), (p * np.linspace(-1, 1, 17)).sum(-1), rtol=1e-12, atol=1e-13)


def test_a_level_categorical_draws_its_probabilities():
    p = f64([[0.2, 0.05, 0.0, 0.75], [0.4, 0.3, 0.2, 0.1]])
    law = pyrodiff.LevelCategorical((5 * p).log())
    x = law.sample((40_000,))
    for k in range(4):
        drawn = (x - float(point(k, 4))).abs() < 1e-12
        assert not far(drawn.double(), p[:, k])
    assert law.log_prob(f64([float(point(2, 4)), 1.0])).exp().tolist() == pytest.approx([0, 0.1])


def test_the_gradient_in_the_logits_is_one_hot_less_the_probabilities():
    logits = f64([0.3, -1.2, 2.0]).requires_grad_()
    value = pyrodiff.LevelCategorical(logits).log_prob(f64(0.0))
    p = np.exp(logits.detach().numpy()) / np.exp(logits.detach().numpy()).sum()
    np.testing.assert_allclose(torch.autograd.grad(value, logits)[0].numpy(), [-p[0], 1 - p[1], -p[2]], rtol=1e-13)


# bad input


@pytest.mark.parametrize(("old", "new"), [("dequantize", "from_levels"), ("quantize", "to_levels")])
def test_earlier_names_are_accepted_with_a_warning_that_says_the_new_one(old, new):
    with pytest.warns(DeprecationWarning, match=f"pyrodiff.{old} is now {new}") as warned:
        function = getattr(pyrodiff, old)
    assert function is getattr(pyrodiff, new)
    assert warned[0].filename == __file__
    assert old not in dir(pyrodiff)
