"""The claims that a bound rests on: what is right passes, and each way to be wrong fails the claim that it breaks."""

import math

import models
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Gaussian, GaussianPosterior, bit_diffusion
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrodiff
from pyrodiff import Claim, Verification, verify
from pyrodiff.likelihood import verification
from pyrodiff.pair.diffusion import TrajectoryModel

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
BETAS = [0.1, 0.2, 0.35, 0.5]
PAIR = "the trajectory pair agrees in sites, order, scales and masks"
ONE_STEP_PAIR = "the one-step pair agrees in sites, order, scales and masks"
BAYES = "posterior x marginal = transition x marginal, s = t - 1"
ANY_S = "the same from any s < t, for chains of fewer steps"
SITES = "the sites of the trajectory pair cost what the bound's terms say"
UNBIASED = "the one-step pair is unbiased for the bound"
GRADIENT = "and so is its gradient"
WEIGHTS = "the log weights have the bound as their mean"
FALLS = "bounds do not rise with K"
CLAIMS = [PAIR, ONE_STEP_PAIR, BAYES, ANY_S, SITES, UNBIASED, GRADIENT, WEIGHTS, FALLS]


def data(number=6, dtype=torch.float64):
    return dist.Normal(M, V.sqrt()).sample((number,)).to(dtype)


def failed(result):
    """The claims that failed, and what was found of them."""
    return {claim.name: claim.found for claim in result.claims if claim.passed is False}


def gaussian(schedule=None, forward=None, **perturbed):
    """N(M, V), with kernels off a little, so that no term is 0."""
    schedule = pyrodiff.BetaSchedule(BETAS) if schedule is None else schedule
    law = Gaussian(M, V, schedule)
    kernel = GaussianPosterior(law, **{"shift": 0.3, "widen": 1.4, **perturbed})
    forward = pyrodiff.GaussianForward(schedule) if forward is None else forward
    return pyrodiff.Diffusion(forward, kernel, (2,), prior=law)


def mlp(dtype=torch.float32, T=5, decoder=None, **options):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.4))
    network = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1, **options)
    for parameter in network.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
    return pyrodiff.Diffusion(forward, reverse, (2,), decoder=decoder).to(dtype)


# what is right


class LearnedPrior(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(M.clone()), nn.Parameter(torch.zeros(2).double())

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class RandomWeight(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = PyroSample(dist.Normal(0.5, 0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x_t, t):
        return dist.Normal(self.weight * x_t + self.bias, 0.7).to_event(1)


def right(kind):
    if kind == "VP":
        return gaussian(), data()
    if kind == "VE":
        return gaussian(pyrodiff.GeometricSchedule(4, 0.3, 4.0)), data()
    if kind == "exact":
        return gaussian(shift=0.0, widen=1.0), data()
    if kind == "bits":
        return bit_diffusion(BETAS, 0.3, 2), torch.tensor([[0, 1], [1, 1], [0, 0]]).double()
    if kind == "learned prior":
        diffusion = gaussian()
        return pyrodiff.Diffusion(diffusion.forward_process, diffusion.reverse, (2,), prior=LearnedPrior()), data()
    if kind == "levels":
        return mlp(decoder=pyrodiff.DiscretizedDecoder(5)), torch.tensor([[0.5, -1.0], [0.0, 1.0], [1.0, -0.5]])
    if kind == "random weight":
        forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule(BETAS))
        return pyrodiff.Diffusion(forward, RandomWeight(), (2,)), data(dtype=torch.float32)
    if kind == "subchain":
        return mlp(T=20).subchain([3, 9, 20]), data(dtype=torch.float32)
    if kind == "dropout":
        return mlp(dropout=0.5), data(dtype=torch.float32)
    return gaussian(pyrodiff.BetaSchedule(BETAS[1 : 1 + int(kind)])), data()


RIGHT = ["VP", "VE", "exact", "bits", "learned prior", "levels", "random weight", "subchain", "dropout", "1", "2"]


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_right_passes(kind):
    diffusion, x_0 = right(kind)
    guide = models.prior_of_weights(diffusion) if kind == "random weight" else None
    result = verify(diffusion, x_0, num_repeats=10, generator=1, guide=guide)
    assert not failed(result), result
    assert result.passed
    assert [claim.name for claim in result.claims] == CLAIMS
    tried = {claim.name: claim.passed for claim in result.claims}
    assert tried[BAYES] is (None if kind == "1" else True)
    assert tried[ANY_S] is (None if kind in "12" else True)
    assert all(tried[name] for name in CLAIMS if name not in (BAYES, ANY_S))


@pytest.mark.parametrize("kind", ["network", "bits"])
def test_no_seed_raises_a_false_alarm(kind):
    for seed in range(6):
        pyro.set_rng_seed(seed)
        diffusion, x_0 = (mlp(T=3), data(4, torch.float32)) if kind == "network" else right("bits")
        result = verify(diffusion, x_0, num_repeats=10, num_particles=4, generator=seed)
        assert result.passed, result


def test_without_parameters_there_is_no_gradient_to_try():
    diffusion, x_0 = right("VP")
    diffusion.requires_grad_(False)
    result = verify(diffusion, x_0, num_repeats=10)
    assert result.passed
    assert {claim.name: claim.passed for claim in result.claims}[GRADIENT] is None


def test_a_seed_gives_the_same_findings_and_leaves_torchs_source_and_the_modes():
    diffusion, x_0 = right("dropout")
    diffusion.reverse.denoiser.network.blocks[0].dropout.eval()
    modes = {name: module.training for name, module in diffusion.named_modules()}
    state = torch.get_rng_state()
    first, again, other = (str(verify(diffusion, x_0, num_repeats=10, generator=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other
    assert {name: module.training for name, module in diffusion.named_modules()} == modes
    assert all(parameter.grad is None for parameter in diffusion.parameters())


# what is wrong in the forward process


class ScaledPosterior(pyrodiff.GaussianForward):
    def posterior(self, x_t, x_0, t, s=None):
        law = super().posterior(x_t, x_0, t, s).base_dist
        return dist.Normal(1.02 * law.loc, law.scale).to_event(1)


class WidePosteriorAtThree(pyrodiff.GaussianForward):
    def posterior(self, x_t, x_0, t, s=None):
        law = super().posterior(x_t, x_0, t, s).base_dist
        three = (torch.as_tensor(t) == 3).reshape(-1, 1)
        return dist.Normal(law.loc, law.scale * torch.where(three, 1.02, 1.0)).to_event(1)


class VarianceForScale(pyrodiff.GaussianForward):
    def marginal(self, x_0, t):
        law = super().marginal(x_0, t).base_dist
        return dist.Normal(law.loc, law.scale**2).to_event(1)


class TransitionOff(pyrodiff.GaussianForward):
    def transition(self, x_s, t, s=None):
        law = super().transition(x_s, t, s).base_dist
        data = isinstance(s, int) and s == 0
        return dist.Normal(law.loc, law.scale * (1.0 if data else 1.01)).to_event(1)


class StepByStep(pyrodiff.GaussianForward):
    """A posterior that takes s to be t - 1."""

    def posterior(self, x_t, x_0, t, s=None):
        return super().posterior(x_t, x_0, t)


class Unfinished(pyrodiff.GaussianForward):
    def posterior(self, x_t, x_0, t, s=None):
        if s is not None and isinstance(t, int) and s < t - 1:
            raise NotImplementedError("one step only")
        return super().posterior(x_t, x_0, t, s)


@pytest.mark.parametrize(
    ("process", "broken", "times"),
    [
        (ScaledPosterior, {BAYES, ANY_S}, "2, 3, 4"),
        (WidePosteriorAtThree, {BAYES, ANY_S}, "3"),
        (VarianceForScale, {BAYES, ANY_S}, "2, 3, 4"),
        (TransitionOff, {BAYES, ANY_S}, "2, 3, 4"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_that_are_not_bayes_fail_and_their_times_are_named(process, broken, times, dtype):
    diffusion = gaussian(forward=process(pyrodiff.BetaSchedule(BETAS))).to(dtype)
    found = failed(verify(diffusion, data(50, dtype), num_repeats=10))
    assert broken <= set(found)
    assert not {PAIR, ONE_STEP_PAIR} & set(found)
    assert found[BAYES].endswith(f"; beyond rounding at t = {times}")
    assert "nats, at s = " in found[BAYES]


def test_the_largest_difference_is_given_with_its_times():
    """Scales off by 2 % at t = 3 alone: log densities differ by log 1.02 less half of z^2 (1 - 1.02^-2)."""
    diffusion = gaussian(forward=WidePosteriorAtThree(pyrodiff.BetaSchedule(BETAS)))
    claim = verify(diffusion, data(4), num_repeats=10).claims[2]
    words = claim.found.split()
    assert words[words.index("=") + 1] == "2,"
    assert "at s = 2, t = 3;" in claim.found
    assert 1e-4 < float(words[words.index("most") + 1]) < 0.5


@pytest.mark.parametrize("process", [StepByStep, Unfinished])
def test_a_posterior_that_knows_one_step_only_fails_nothing_but_the_claim_of_any_s(process):
    found = failed(verify(gaussian(forward=process(pyrodiff.BetaSchedule(BETAS))), data(), num_repeats=10))
    assert set(found) == {ANY_S}
    assert "t = 3, 4" in found[ANY_S] if process is StepByStep else "NotImplementedError: one step only" in found[ANY_S]


@pytest.mark.parametrize("value", [math.nan, 1e200])
def test_what_is_not_finite_is_not_within_rounding(value):
    class Undefined(pyrodiff.GaussianForward):
        def marginal(self, x_0, t):
            law = super().marginal(x_0, t).base_dist
            two = torch.as_tensor(t == 2).reshape(-1, 1)
            loc = torch.where(two, torch.tensor(value, dtype=law.loc.dtype), law.loc)
            return dist.Normal(loc, law.scale, validate_args=False).to_event(1)

        def transition(self, x_s, t, s=None):
            law = super().transition(x_s, t, s).base_dist
            return dist.Normal(law.loc, law.scale, validate_args=False).to_event(1)

    pyro.enable_validation(False)
    found = failed(verify(gaussian(forward=Undefined(pyrodiff.BetaSchedule(BETAS))), data(), num_repeats=10))
    assert BAYES in found


# what is wrong in a pair


def guided(diffusion, program):
    """The diffusion with another guide."""

    class Guide(nn.Module):
        def __init__(self, guide):
            super().__init__()
            self.guide = guide

        def forward(self, x_0):
            return program(self.guide, x_0)

    diffusion.guide = Guide(diffusion.guide)
    return diffusion


def in_forward_order(guide, x_0):
    q, x = guide.forward_process, x_0
    with pyro.plate("data", len(x_0), dim=-1):
        for t in range(1, q.num_steps + 1):
            x = pyro.sample(f"x_{t}", q.transition(x, t))


def without_a_site(guide, x_0):
    return poutine.block(guide, hide=["x_2"])(x_0)


def with_one_more(guide, x_0):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    return guide(x_0)


def scaled(guide, x_0):
    return poutine.scale(guide, 2.0)(x_0)


def masked(guide, x_0):
    return poutine.mask(guide, torch.arange(len(x_0)) > 0)(x_0)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (in_forward_order, "in another order than the model"),
        (without_a_site, "'x_2' is missing"),
        (with_one_more, "'z' is not one"),
        (scaled, "a scale must stand in both programs, but at site 'x_4' it is 1.0 in the model and 2.0"),
        (masked, "a mask must stand in both programs, but at site 'x_4'"),
    ],
)
def test_a_guide_that_does_not_fit_the_model_fails_that_claim_and_no_means_are_tried(program, words):
    result = verify(guided(gaussian(), program), data())
    found = failed(result)
    assert set(found) == {PAIR}
    assert words in found[PAIR]
    kinds = ("UserWarning: ",) if program is in_forward_order else ("ValueError: ", "ArgumentError: ")
    assert found[PAIR].startswith(kinds)
    assert [claim.name for claim in result.claims] == CLAIMS[:4]
    assert not result.passed


def test_a_model_with_a_site_too_few_fails():
    class Short(TrajectoryModel):
        def _chain(self, x_0, size, top, context):
            data = pyro.plate("data", size, dim=-1)
            with data:
                x = pyro.sample("x_4", top)
            for t in (4, 3):
                kernel = self.kernel(x, t)
                with data:
                    x = pyro.sample(f"x_{t - 1}", kernel)
            with data:
                return pyro.sample("x_0", self.kernel(x, 1), obs=x_0)

    diffusion = gaussian()
    model = diffusion.model
    diffusion.model = Short(model.forward_process, model.reverse, model.event_shape, model.decoder, model.prior)
    found = failed(verify(diffusion, data()))
    assert set(found) == {PAIR}
    assert "'x_1' is not one" in found[PAIR]


def test_a_cost_that_is_not_finite_is_named():
    class Distant(GaussianPosterior):
        def forward(self, x_t, t):
            law = super().forward(x_t, t).base_dist
            far = 1e200 * (torch.as_tensor(t) == 3).reshape(-1, 1).double()
            return dist.Normal(law.loc + far, law.scale).to_event(1)

    schedule = pyrodiff.BetaSchedule(BETAS)
    law = Gaussian(M, V, schedule)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), Distant(law), (2,), prior=law)
    result = verify(diffusion, data(40))
    found = failed(result)
    assert found[PAIR] == "the cost is not finite at x_2"
    assert found[ONE_STEP_PAIR] == "the cost is not finite at x_s"
    assert len(result.claims) == 4


def test_a_program_that_raises_fails_with_what_it_said():
    class Broken(GaussianPosterior):
        def forward(self, x_t, t):
            if not isinstance(t, int):
                raise RuntimeError("only ints")
            return super().forward(x_t, t)

    schedule = pyrodiff.BetaSchedule(BETAS)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), Broken(Gaussian(M, V, schedule)), (2,))
    found = failed(verify(diffusion, data()))
    assert set(found) == {ONE_STEP_PAIR}
    assert found[ONE_STEP_PAIR].startswith("RuntimeError: only ints")


def test_an_evaluation_that_raises_later_fails_too(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no bound")

    monkeypatch.setattr(verification, "bound", broken)
    result = verify(gaussian(), data())
    assert failed(result) == {"its bounds can be evaluated": "RuntimeError: no bound"}


# what is wrong in the mean


class Overstated(pyrodiff.UniformDrawing):
    def forward(self, u, num_steps):
        t, probability = super().forward(u, num_steps)
        return t, 1.3 * probability


class NeverTheLast(pyrodiff.UniformDrawing):
    def forward(self, u, num_steps):
        t, probability = super().forward(u, num_steps)
        return t.clamp(max=num_steps - 1), probability


class Steep(pyrodiff.UniformDrawing):
    """Twice as often below T / 2 as it says."""

    def forward(self, u, num_steps):
        return super().forward(u**2, num_steps)


@pytest.mark.parametrize("drawing", [Overstated, NeverTheLast, Steep])
def test_a_one_step_pair_that_is_biased_fails(drawing):
    class Biased(pyrodiff.Diffusion):
        def one_step(self, given=None, weighting=None):
            return super().one_step(drawing() if given is None else given, weighting)

    base = mlp(torch.float64, T=4) if drawing is Steep else gaussian(shift=1.0)  # terms as unlike as it takes
    diffusion = Biased(base.forward_process, base.reverse, (2,), prior=base.model.prior)
    found = failed(verify(diffusion, data(200), num_repeats=30))
    assert UNBIASED in found
    assert set(found) <= {UNBIASED, GRADIENT}
    assert " at the bound; beyond 5 at the bound" in found[UNBIASED]


class Different(GaussianPosterior):
    """Kernels that differ where t is an int, as in the trajectory pair, and a tensor, as in the others."""

    def __init__(self, data, at, cut=False):
        super().__init__(data, shift=0.3, widen=1.4)
        self.at, self.cut, self.gain = at, cut, nn.Parameter(torch.tensor(1.0).double())

    def forward(self, x_t, t):
        law = super().forward(x_t, t).base_dist
        gain = self.gain.detach() if self.cut and not isinstance(t, int) else self.gain
        off = 0.5 if not self.cut and isinstance(t, int) and t == self.at else 0.0
        return dist.Normal(gain * law.loc + off, law.scale).to_event(1)


def different(**options):
    schedule = pyrodiff.BetaSchedule(BETAS)
    law = Gaussian(M, V, schedule)
    return pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), Different(law, **options), (2,), prior=law)


@pytest.mark.parametrize(("t", "name"), [(1, "L_0 (t = 1)"), (3, "L_2 (t = 3)"), (4, "L_3 (t = 4)")])
def test_a_trajectory_pair_that_costs_something_else_at_one_time_fails_there(t, name):
    found = failed(verify(different(at=t), data(50), num_repeats=15))
    assert SITES in found
    assert found[SITES].endswith(f"; beyond 5 at {name}")
    assert set(found) <= {SITES, GRADIENT, WEIGHTS}  # weights too are of a trajectory


def test_a_prior_that_differs_between_the_pair_and_the_bound_is_named():
    class Fickle(Gaussian):
        calls = 0

        def forward(self):
            Fickle.calls += 1
            return dist.Normal(self.m + 0.5 * (torch.is_grad_enabled()), 1.0).to_event(1)

    schedule = pyrodiff.BetaSchedule(BETAS)
    kernel = GaussianPosterior(Gaussian(M, V, schedule), 0.3, 1.4)
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), kernel, (2,), prior=Fickle(M, V, schedule))
    found = failed(verify(diffusion, data(50), num_repeats=20))
    assert found[SITES].endswith("; beyond 5 at L_4")


def test_a_gradient_that_is_cut_in_one_pair_fails_and_the_parameter_is_named():
    found = failed(verify(different(at=0, cut=True), data(50), num_repeats=20))
    assert set(found) == {GRADIENT}
    assert found[GRADIENT].endswith("; beyond 5 at reverse.gain")


def test_log_weights_of_another_mean_fail(monkeypatch):
    true = verification.importance_bound

    def shifted(*args, **kwargs):
        result = true(*args, **kwargs)
        return pyrodiff.ImportanceBound(result.log_weights + 3.0, result.event_shape)

    monkeypatch.setattr(verification, "importance_bound", shifted)
    assert set(failed(verify(gaussian(), data(50), num_repeats=15))) == {WEIGHTS}


def test_a_bound_that_rises_with_k_fails(monkeypatch):
    true, calls = verification.importance_bound, []

    def worse(diffusion, x_0, num_particles, guide):
        calls.append(num_particles)
        result = true(diffusion, x_0, num_particles=num_particles, guide=guide)
        return pyrodiff.ImportanceBound(result.log_weights - 20.0 * (num_particles == 40), result.event_shape)

    monkeypatch.setattr(verification, "importance_bound", worse)
    found = failed(verify(gaussian(), data(50), num_particles=4))
    assert calls == [50, 40]
    assert set(found) == {FALLS}
    assert "nats at K = 1, " in found[FALLS]
    assert " at K = 4 (± " in found[FALLS]


def test_the_bound_of_k_is_that_of_groups_of_k():
    """The exact model's weights are all p(x_0): its bound is -log p(x_0) at any K, to rounding."""
    x_0 = data(5)
    claim = verify(gaussian(shift=0.0, widen=1.0), x_0, num_repeats=10, num_particles=4).claims[-1]
    expected = -float(dist.Normal(M, V.sqrt()).to_event(1).log_prob(x_0).mean())
    numbers = claim.found.split()
    assert [float(numbers[0]), float(numbers[6])] == pytest.approx([expected, expected], rel=1e-4)


# what is said


def test_findings_print_as_a_list():
    claims = (Claim("one", True, "fits"), Claim("two", False, "off"), Claim("three", None, "cannot"))
    assert str(Verification(claims)).splitlines() == [
        "holds     one",
        "          fits",
        "FAILS     two",
        "          off",
        "not tried three",
        "          cannot",
    ]
    assert not Verification(claims).passed
    assert Verification(claims[::2]).passed


def test_a_long_list_of_times_is_cut_short():
    schedule = pyrodiff.LinearSchedule(9, 0.05, 0.4)
    found = failed(verify(gaussian(schedule, ScaledPosterior(schedule)), data(30), num_repeats=10))
    assert found[BAYES].endswith("beyond rounding at t = 2, 3, 4, 5, 6 and 3 more")
