"""Denoisers around a denoiser: what they do to x_0, to the kernel, to the bound and to all that is made of them."""

import ast
import itertools
import math
from pathlib import Path

import numpy as np
import oracles
import pyro
import pytest
import torch
from cases import Returns
from loops import adam, values

import pyrodiff
from pyrodiff.model.clipping import Clipped, Thresholded

T = 6
LEVELS = 5


class Tells(torch.nn.Module):
    """A network of two parameters, told the time: its noise is far off where there is much of it."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.shift = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        t = t.reshape(t.shape + (1,) * (x_t.dim() - t.dim()))
        return self.slope * x_t + self.shift * torch.sin(3 * x_t + t)


def noise_prediction(schedule=None):
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T) if schedule is None else schedule)
    return forward, pyrodiff.NoisePrediction(Tells(), forward)


KINDS = {
    "clipped": lambda denoiser: Clipped(denoiser, -1.0, 0.8),
    "thresholded": lambda denoiser: Thresholded(denoiser, 0.7, 1.9),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def diffusion_of(kind="clipped", event_shape=(3,), levels=None, variance=None):
    forward, noise = noise_prediction()
    denoiser = KINDS[kind](noise) if kind else noise
    reverse = pyrodiff.GaussianReverse(forward, denoiser, variance)
    decoder = None if levels is None else pyrodiff.DiscretizedDecoder(levels)
    return pyrodiff.Diffusion(forward, reverse, event_shape, decoder=decoder)


def data(*shape):
    """Within [-0.8, 0.8], mostly high."""
    return 0.8 * (1 - 2 * torch.rand(shape, dtype=torch.float64) ** 2)


# What is said of the data: what every denoiser does, is in test_denoisers.py and test_reverse.py


@pytest.mark.parametrize("dims", [1, 2, 5, 48])
@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.995, 1.0])
def test_the_threshold_is_numpy_s_quantile_of_each_datum(quantile, dims):
    x_0 = 3 * torch.randn(4, dims, dtype=torch.float64)
    found = Thresholded(Returns(x_0), quantile)(data(4, dims), 1)
    s = np.maximum(np.quantile(np.abs(x_0.numpy()), quantile, axis=1, keepdims=True), 1)
    np.testing.assert_allclose(found.numpy(), np.clip(x_0.numpy(), -s, s) / s, rtol=1e-14)


def test_thresholds_are_those_of_diffusers():
    """``_threshold_sample`` of their schedulers, written out: dynamic_thresholding_ratio and sample_max_value."""

    def theirs(sample, ratio, largest):
        flat = sample.reshape(len(sample), -1)
        s = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1, max=largest)[:, None]
        return (torch.clamp(flat, -s, s) / s).reshape(sample.shape)

    x_0 = torch.tensor([0.3, 1.0, 1.2, 5.0])[:, None, None, None] * torch.randn(4, 3, 8, 8)
    for ratio, largest in itertools.product((0.5, 0.9, 0.995), (1.0, 1.5, 100.0)):
        found = Thresholded(Returns(x_0), ratio, largest)(torch.zeros(4, 3, 8, 8), 2)
        torch.testing.assert_close(found, theirs(x_0, ratio, largest), rtol=1e-6, atol=1e-6)


def test_with_one_as_the_greatest_threshold_it_is_clipped():
    x_0 = 2 * torch.randn(5, 4, dtype=torch.float64)
    found = Thresholded(Returns(x_0), 0.9, most=1)(data(5, 4), 3)
    assert torch.equal(found, Clipped(Returns(x_0), -1, 1)(data(5, 4), 3))


@every_kind
def test_what_lies_within_is_left_to_the_last_bit(kind):
    x_0 = 1.6 * torch.rand(5, 4, dtype=torch.float64) - 0.8
    assert torch.equal(KINDS[kind](Returns(x_0))(data(5, 4), 3), x_0)


def test_each_dimension_may_have_a_range_of_its_own():
    low, high = torch.tensor([-1.0, 0.0, -math.inf]), torch.tensor([[1.0], [2.0]])
    x_0 = 3 * torch.randn(5, 2, 3, dtype=torch.float64)
    found = Clipped(Returns(x_0), low, high)(data(5, 2, 3), 3)
    np.testing.assert_array_equal(found.numpy(), np.clip(x_0.numpy(), low.numpy(), high.numpy()))


def test_where_it_clips_the_gradient_is_zero_and_elsewhere_that_of_the_denoiser():
    output = torch.tensor([[-3.0, -0.5, 0.3, 2.0]], dtype=torch.float64, requires_grad=True)
    Clipped(Returns(output), -1.0, 1.0)(data(1, 4), 3).sum().backward()
    assert output.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_the_threshold_has_a_gradient_too():
    """Of x / s with s the largest number, by central differences."""
    x_0 = torch.tensor([[0.4, -2.0, 1.5], [0.2, -0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: Thresholded(Returns(x), 0.6)(x, 3), x_0)


# The kernel and the bound


def expectations(x_0, low, high):
    """L_T, L_1 .. L_{T-1} and L_0 of a datum of one number, by quadrature over x_t, with sigma_t^2 = beta_t."""
    betas = oracles.cosine_betas(T)
    steps, moments = oracles.preserving_steps(betas), oracles.moments(oracles.preserving_steps(betas))
    terms = [oracles.normal_kl(moments[T][0] * x_0, moments[T][1], 0.0, 1.0)]
    nodes = np.linspace(-9, 9, 20001)
    weights = np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
    for t in range(1, T + 1):
        gain, variance = moments[t]
        x_t = gain * x_0 + variance**0.5 * nodes
        epsilon = 0.7 * x_t + 0.4 * np.sin(3 * x_t + t)
        estimate = np.clip((x_t - variance**0.5 * epsilon) / gain, low, high)
        if t == 1:
            terms.append(-(weights * oracles.log_normal(x_0, estimate, betas[0])).sum())
            continue
        gain_s, variance_s = moments[t - 1]
        mean_q, variance_q = oracles.condition(gain_s * x_0, variance_s, *steps[t - 1], x_t)
        mean_p, _ = oracles.condition(gain_s * estimate, variance_s, *steps[t - 1], x_t)
        terms.append((weights * oracles.normal_kl(mean_q, variance_q, mean_p, betas[t - 1])).sum())
    return terms


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.8), (0.0, 0.35)])
def test_the_bound_term_by_term_is_that_of_the_integrals(low, high):
    forward, noise = noise_prediction()
    reverse = pyrodiff.GaussianReverse(forward, Clipped(noise, low, high))
    diffusion = pyrodiff.Diffusion(forward, reverse, (1,))
    for x_0 in (0.3, -0.6):
        found = pyrodiff.bound(diffusion, torch.full((20_000, 1), x_0, dtype=torch.float64), generator=3)
        expected = expectations(x_0, low, high)
        for ours, theirs in zip([found.prior, found.reconstruction, *found.denoising], expected, strict=True):
            assert abs(float(ours.mean()) - theirs) <= 5 * float(ours.std()) / len(ours) ** 0.5 + 1e-9 * abs(theirs)
    plain = expectations(0.3, -math.inf, math.inf)
    assert sum(plain) > sum(expectations(0.3, -1.0, 0.8)) + 1  # what was tested is no small matter


def test_no_kl_grows_where_the_data_lie_within_whatever_is_drawn():
    x_0 = data(50, 3)
    plain, clipped = diffusion_of(""), diffusion_of("clipped")
    ours = pyrodiff.bound(clipped, x_0, generator=1)
    with pytest.warns(UserWarning, match=r"the step from t = 6 is \d+ % of the bound: .* pyrodiff.Clipped\("):
        theirs = pyrodiff.bound(plain, x_0, generator=1)
    assert (ours.denoising <= theirs.denoising + 1e-12).all()
    assert (ours.denoising < theirs.denoising - 0.1).any()
    assert (ours.reconstruction <= theirs.reconstruction + 1e-12).all()
    assert torch.equal(ours.prior, theirs.prior)


# What is made of it


@every_kind
def test_it_is_of_the_denoiser_s_process_network_and_levels(kind):
    forward, noise = noise_prediction()
    around = KINDS[kind](noise)
    assert around.forward_process is forward
    assert around.network is noise.network
    assert not hasattr(around, "levels")
    with pytest.raises(ValueError, match="denoiser must be made for the same forward process"):
        pyrodiff.GaussianReverse(pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T)), around)
    bare = KINDS[kind](Returns(torch.zeros(5, 3)))
    assert not any(hasattr(bare, name) for name in ("forward_process", "levels", "network"))
    pyrodiff.GaussianReverse(forward, bare)


@every_kind
def test_a_prediction_of_levels_is_left_as_it_is(kind):
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T))
    network = Returns(torch.randn(4, 3, LEVELS, dtype=torch.float64))
    inner = pyrodiff.LevelPrediction(network, forward, LEVELS)
    around = Clipped(inner, -1.0, 1.0) if kind == "clipped" else Thresholded(inner)
    assert around.levels == LEVELS
    x_t = data(4, 3)
    assert torch.equal(around(x_t, 2), inner(x_t, 2))
    reverse = pyrodiff.GaussianReverse(forward, around)
    with pytest.raises(ValueError, match="decoder must have the 5 levels that the denoiser predicts, but it has 6"):
        pyrodiff.Diffusion(forward, reverse, (3,), decoder=pyrodiff.DiscretizedDecoder(LEVELS + 1))


@every_kind
def test_compiled_samples_are_those_of_the_steps_as_they_are(kind):
    eager, compiled = (pyrodiff.AncestralSampler(diffusion_of(kind), compile=compile) for compile in (False, True))
    for seed in range(3):
        torch.testing.assert_close(compiled(5, generator=seed), eager(5, generator=seed), rtol=1e-9, atol=1e-9)


@every_kind
def test_graphs_of_a_shorter_chain_and_of_training_compute_what_the_programs_do(kind, interpreted):
    short = diffusion_of(kind).subchain((1, 3, 6))
    eager, compiled = (pyrodiff.AncestralSampler(short, compile=compile) for compile in (False, True))
    for seed in range(3):
        torch.testing.assert_close(compiled(5, generator=seed), eager(5, generator=seed), rtol=1e-9, atol=1e-9)
    x_0, found, sampled = data(8, 3), [], len(interpreted)
    for compile in (False, True):
        diffusion = diffusion_of(kind)
        pair = diffusion.one_step()
        svi = pyrodiff.SVI(pair.model, pair.guide, adam, pyrodiff.DiffusionELBO(), compile=compile)
        pyro.set_rng_seed(2)
        found.append(([float(svi.step(x_0)) for _ in range(4)], values(diffusion)))
    assert len(interpreted) > sampled > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_a_changed_range_is_no_stale_graph(interpreted):
    diffusion = diffusion_of()
    sampler, eager = pyrodiff.AncestralSampler(diffusion, compile=True), pyrodiff.AncestralSampler(diffusion)
    before = [sampler(5, generator=0) for _ in range(2)][-1]
    diffusion.reverse.denoiser.high.fill_(0.1)
    torch.testing.assert_close(sampler(5, generator=0), eager(5, generator=0), rtol=1e-9, atol=1e-9)
    assert not torch.equal(sampler(5, generator=0), before)


@every_kind
def test_the_flow_s_density_integrates_to_one(kind):
    """The drift has kinks where a number comes to the edge of its range; the flow and its density are as defined."""
    forward, noise = noise_prediction(pyrodiff.LogSNRSchedule(T, 4.0, -4.0))
    reverse = pyrodiff.GaussianReverse(forward, KINDS[kind](noise))
    x = torch.linspace(-3, 3, 1201, dtype=torch.float64)[:, None]
    clips = (noise(x, 4)[:, 0] > 1).double()
    assert 0.05 < clips.mean() < 0.95
    flow = pyrodiff.ode_log_prob(pyrodiff.Diffusion(forward, reverse, (1,)), x)
    total = float(torch.trapezoid(flow.log_prob.exp(), x[:, 0]))
    assert abs(total - 1) < 1e-3, total


@every_kind
def test_its_state_is_the_denoisers_and_its_range(kind):
    diffusion, plain = diffusion_of(kind), diffusion_of("")
    inside = {f"denoiser.{key}" for key in plain.reverse.denoiser.state_dict()}
    keys = set(diffusion.reverse.denoiser.state_dict())
    assert keys == inside | ({"low", "high"} if kind == "clipped" else set())
    assert [name for name, _ in diffusion.reverse.denoiser.named_parameters()] == [
        "denoiser.network.slope",
        "denoiser.network.shift",
    ]


def test_the_range_stays_whole_in_another_precision():
    around = Clipped(torch.nn.Identity(), 0.1, 0.7).half()
    assert around.low.dtype == torch.float64
    assert float(around.high) == 0.7
    assert repr(around).startswith("Clipped(\n  low=0.1, high=0.7")
    assert "quantile=0.5, most=inf" in repr(Thresholded(torch.nn.Identity(), 0.5))


# What docs/tutorials/6_from_ddpm.py says of the options of a scheduler, against their formulas

PAGE = Path(pyrodiff.__file__).parent.parent / "docs" / "tutorials" / "6_from_ddpm.py"
NAMES = ("linspace", "leading", "trailing", "rescaled", "LearnedRange", "AtTimes")
LOW, HIGH, LONG = 1e-4, 0.02, 1000


@pytest.fixture(scope="module")
def page():
    """The functions and classes of the page, without what it runs."""
    tree = ast.parse(PAGE.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if getattr(node, "name", None) in NAMES]
    assert [node.name for node in wanted] == list(NAMES)
    found = {"np": np, "torch": torch, "dist": pyro.distributions, "pyrodiff": pyrodiff}
    exec(compile(ast.Module(wanted, []), str(PAGE), "exec"), found)
    return found


@pytest.mark.parametrize(
    ("code", "betas"),
    [
        ("LinearSchedule(T, a, b)", [LOW + (HIGH - LOW) * i / (LONG - 1) for i in range(LONG)]),
        (
            "BetaSchedule(torch.linspace(a**0.5, b**0.5, T, dtype=torch.float64) ** 2)",
            [(LOW**0.5 + (HIGH**0.5 - LOW**0.5) * i / (LONG - 1)) ** 2 for i in range(LONG)],
        ),
        ("CosineSchedule(T)", oracles.cosine_betas(LONG)),
    ],
)
def test_betas_of_a_name(code, betas):
    assert f"``{code}``" in PAGE.read_text(encoding="utf-8")
    schedule = eval(f"pyrodiff.{code}", {"pyrodiff": pyrodiff, "torch": torch, "T": LONG, "a": LOW, "b": HIGH})
    t = torch.arange(1, LONG + 1)
    np.testing.assert_allclose(schedule.beta(t).numpy(), betas, rtol=1e-10)
    np.testing.assert_allclose(schedule.alpha_bar(t).numpy(), np.cumprod(1 - np.array(betas)), rtol=1e-9)


class Bent(torch.nn.Module):
    """A network that reads no time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, x_t, t):
        return self.weight * torch.sin(3 * x_t)


def test_betas_without_signal_at_the_end(page):
    """Lin et al. (2024), Algorithm 1: sqrt(alpha_bar) shifted to 0 at T, and scaled to what it was at 1."""
    betas = [(LOW**0.5 + (HIGH**0.5 - LOW**0.5) * i / (LONG - 1)) ** 2 for i in range(LONG)]
    root = np.sqrt(np.cumprod(1 - np.array(betas)))
    root = root[0] * (root - root[-1]) / (root[0] - root[-1])
    schedule = pyrodiff.BetaSchedule(page["rescaled"](torch.tensor(betas, dtype=torch.float64)))
    alpha_bar = schedule.alpha_bar(torch.arange(1, LONG + 1)).numpy()
    np.testing.assert_allclose(alpha_bar, root**2, rtol=1e-9, atol=1e-15)
    assert alpha_bar[-1] == 0
    assert float(schedule.beta(LONG)) == 1
    forward = pyrodiff.GaussianForward(schedule)
    for refused in (pyrodiff.NoisePrediction, pyrodiff.ScorePrediction):
        with pytest.raises(ValueError, match="signal"):
            refused(torch.nn.Identity(), forward)
    x_0 = pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1]]), levels=LEVELS)
    network = Returns(torch.zeros(2, 2, LEVELS))
    for denoiser in (
        pyrodiff.VelocityPrediction(Bent(), forward),
        pyrodiff.DataPrediction(Bent(), forward),
    ):
        diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (2,))
        found = pyrodiff.bound(diffusion, x_0, num_times=20, generator=0)
        assert found.nats.isfinite().all()
        assert (found.prior == 0).all()
        with pytest.raises(ValueError, match="signal"):
            pyrodiff.SimpleWeighting(diffusion.reverse)
        with pytest.raises(ValueError, match="signal"):
            pyrodiff.ode_log_prob(diffusion, x_0)
    levels = pyrodiff.LevelPrediction(network, forward, LEVELS)
    assert levels(torch.randn(2, 2), LONG).abs().max() < 1e-6  # nothing is known: the mean of the levels


@pytest.mark.parametrize("num_steps", [1000, 999, 250, 7])
def test_times_of_a_shorter_chain(page, num_steps):
    """theirs, from 0 and downwards, written out as in ``set_timesteps``; and what is ours, from 1 and upwards."""
    for n in (*range(2, 8), 10, 25, 50, 99):
        if n > num_steps:
            continue
        ratio = num_steps // n
        theirs = {
            "linspace": np.linspace(0, num_steps - 1, n).round()[::-1].astype(np.int64),
            "leading": (np.arange(0, n) * ratio).round()[::-1].astype(np.int64),
            "trailing": np.round(np.arange(num_steps, 0, -(num_steps / n))).astype(np.int64)[:n] - 1,
        }
        for name, timesteps in theirs.items():
            assert page[name](num_steps, n) == [int(i) + 1 for i in timesteps[::-1]], (name, n)
        pyrodiff.SubSchedule(pyrodiff.CosineSchedule(num_steps), page["trailing"](num_steps, n))
    assert page["leading"](1000, 4, steps_offset=1) == [2, 252, 502, 752]


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("prediction", "theirs"), [("Noise", "epsilon"), ("Data", "sample"), ("Velocity", "v")])
def test_a_step_is_theirs(name, prediction, theirs):
    """``DDPMScheduler.step`` with clip_sample, written out in numpy from its table of alphas_cumprod."""
    betas = np.array([LOW + (HIGH - LOW) * i / (LONG - 1) for i in range(LONG)])
    alphas_cumprod = np.cumprod(1 - betas)
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(LONG, LOW, HIGH))
    variance = {"fixed_small": pyrodiff.PosteriorVariance(), "fixed_large": pyrodiff.ForwardVariance()}[name]
    denoiser = getattr(pyrodiff, f"{prediction}Prediction")(Bent(), forward)
    reverse = pyrodiff.GaussianReverse(forward, Clipped(denoiser, -1.0, 1.0), variance)
    x_t = (1.5 * torch.randn(4, 1, 3, 3, dtype=torch.float64)).numpy()
    for i in (1, 10, 500, 999):
        output, now, before = 0.25 * np.sin(3 * x_t), alphas_cumprod[i], alphas_cumprod[i - 1]
        x_0 = {
            "epsilon": (x_t - (1 - now) ** 0.5 * output) / now**0.5,
            "sample": output,
            "v": now**0.5 * x_t - (1 - now) ** 0.5 * output,
        }[theirs].clip(-1, 1)
        beta = 1 - now / before
        mean = before**0.5 * beta / (1 - now) * x_0 + (now / before) ** 0.5 * (1 - before) / (1 - now) * x_t
        small = (1 - before) / (1 - now) * beta
        kernel = reverse(torch.tensor(x_t), i + 1)
        np.testing.assert_allclose(kernel.mean.detach().numpy(), mean, rtol=1e-9, atol=1e-9)
        expected = {"fixed_small": small, "fixed_large": beta}[name]
        np.testing.assert_allclose(kernel.variance.numpy(), np.full_like(x_t, expected), rtol=1e-8)


class TwoThings(torch.nn.Module):
    """A network of twice as many channels, told the time."""

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype).reshape(-1, *(1 for _ in x_t.shape[1:]))
        return torch.cat([torch.sin(3 * x_t + t), torch.cos(x_t - t)], 1)


@pytest.mark.parametrize("times", [None, (3, 40, 70, 100)], ids=["whole", "cut"])
def test_learned_range_of_the_page_is_theirs(page, times):
    """Of a chain of fewer steps too: from the betas of the shorter chain, as in OpenAI's SpacedDiffusion."""
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(100))
    diffusion = pyrodiff.Diffusion(forward, page["LearnedRange"](forward, TwoThings()), (2, 3, 3))
    diffusion = diffusion if times is None else diffusion.subchain(times)
    times = range(1, 101) if times is None else times
    alphas_cumprod = [np.cumprod(1 - np.array(oracles.cosine_betas(100)))[t - 1] for t in times]
    x_t = 1.5 * torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for k in range(2, len(times) + 1):
        now, before, output = alphas_cumprod[k - 1], alphas_cumprod[k - 2], TwoThings()(x_t, times[k - 1]).numpy()
        x = x_t.numpy()
        x_0 = ((x - (1 - now) ** 0.5 * output[:, :2]) / now**0.5).clip(-1, 1)
        beta = 1 - now / before
        mean = before**0.5 * beta / (1 - now) * x_0 + (now / before) ** 0.5 * (1 - before) / (1 - now) * x
        low, high, part = np.log((1 - before) / (1 - now) * beta), np.log(beta), (output[:, 2:] + 1) / 2
        kernel = diffusion.reverse(x_t, k)
        np.testing.assert_allclose(kernel.mean.numpy(), mean, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(kernel.variance.numpy(), np.exp(part * high + (1 - part) * low), rtol=1e-8)
        each = diffusion.reverse(x_t, torch.full((4,), k))
        torch.testing.assert_close(each.mean, kernel.mean)
    assert pyrodiff.bound(diffusion, 0.3 * torch.randn(5, 2, 3, 3) + 0.2, generator=0).nats.isfinite().all()
