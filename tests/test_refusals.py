"""Small faults are refused or said, each in a line that names what to change, and what is right passes in silence."""

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from loops import adam
from pyro.infer import Trace_ELBO
from torch import nn

import pyrodiff
from pyrodiff import SVI, AncestralSampler, Bound, DiffusionELBO, bound, importance_bound

T, D, LEVELS = 4, 2, 5


class Network(nn.Module):
    """A network with a parameter, of each number so many outputs, whose result is changed by a function."""

    def __init__(self, change=None, outputs=None):
        super().__init__()
        self.weight, self.change, self.outputs = nn.Parameter(torch.tensor(0.3)), change, outputs

    def forward(self, x_t, t):
        found = self.weight * x_t
        if self.outputs is not None:
            found = found[..., None].expand(*x_t.shape, self.outputs)
        return found if self.change is None else self.change(found)


def gaussian(network=None, schedule=None, prediction=pyrodiff.NoisePrediction):
    forward = pyrodiff.GaussianForward(schedule or pyrodiff.LinearSchedule(T, 0.1, 0.5))
    denoiser = prediction(Network() if network is None else network, forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (D,))


def bits(network=None, kind=pyrodiff.BinomialReverse):
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.3)
    denoiser = pyrodiff.LogitPrediction(Network() if network is None else network, forward)
    return pyrodiff.Diffusion(forward, kind(forward, denoiser), (D,))


def levels(network=None):
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T, 4.0, -4.0))
    network = Network(outputs=LEVELS) if network is None else network
    denoiser = pyrodiff.LevelPrediction(network, forward, LEVELS)
    decoder = pyrodiff.SoftmaxDecoder(forward, LEVELS)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), (D,), decoder=decoder)


X = torch.tensor([[0.3, -1.2], [1.1, 0.4], [-0.8, 0.9], [0.2, 1.7]])
ONES = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
POINTS = pyrodiff.from_levels(torch.tensor([[0, 3], [4, 1], [2, 4]]), levels=LEVELS)


def svi_of(pair, optim=adam, loss=None, **options):
    return SVI(pair.model, pair.guide, optim, loss or DiffusionELBO(), **options)


def values(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


PAIRS = {"trajectory": lambda diffusion: diffusion, "one step": lambda diffusion: diffusion.one_step()}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def refused(call, *words):
    """Whether a call is a ValueError of one line and less than 500 characters, with these words."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        call()
    said = str(error.value)
    assert len(said) < 500, said
    assert "\n" not in said, said
    for word in words:
        assert word in said, said


# steps


@every_pair
def test_an_optimizer_that_evaluates_the_loss_several_times_is_refused(pair):
    diffusion = gaussian()
    before = values(diffusion)
    svi = svi_of(pair(diffusion), lambda parameters: torch.optim.LBFGS(parameters))
    refused(lambda: svi.step(X), "optim", "LBFGS", "one gradient per step", "differentiable_loss")
    assert all(torch.equal(*both) for both in zip(before, values(diffusion), strict=True))


def test_what_is_said_of_lbfgs_works():
    diffusion, loss = gaussian(), DiffusionELBO()
    optimizer = torch.optim.LBFGS(diffusion.parameters(), lr=0.1, max_iter=5)
    before = bound(diffusion, X, num_particles=20, generator=1).mean

    def closure():
        optimizer.zero_grad()
        torch.manual_seed(2)
        found = loss.differentiable_loss(diffusion.model, diffusion.guide, X)
        found.backward()
        return found

    for _ in range(5):
        optimizer.step(closure)
    assert bound(diffusion, X, num_particles=20, generator=1).mean < before


@every_pair
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_without_gradients_is_refused_and_one_with_them_is_not(pair, without, compile):
    diffusion = gaussian()
    before, svi = values(diffusion), svi_of(pair(diffusion), compile=compile)
    with without():
        refused(lambda: svi.step(X), "gradients must be enabled", "no_grad")
    assert all(torch.equal(*both) for both in zip(before, values(diffusion), strict=True))
    assert svi.num_steps == 0
    svi.step(X)
    with without():
        refused(lambda: svi.step(X), "gradients must be enabled")
        assert math.isfinite(float(svi.evaluate_loss(X)))
    assert svi.num_steps == 1
    assert not all(torch.equal(*both) for both in zip(before, values(diffusion), strict=True))
    with torch.no_grad(), torch.enable_grad():
        svi.step(X[:3])
    assert svi.num_steps == 2


# data


@pytest.mark.parametrize(
    "evaluate", [bound, lambda *args: importance_bound(*args, num_particles=2), pyrodiff.ode_log_prob]
)
def test_arrays_are_refused_and_what_to_do_is_said(evaluate):
    refused(lambda: evaluate(gaussian(), X.numpy()), "x_0", "ndarray", "torch.from_numpy")
    evaluate(gaussian(), torch.from_numpy(X.numpy()))
    if evaluate is not pyrodiff.ode_log_prob:
        refused(lambda: evaluate(bits(), ONES.numpy()), "x_0", "ndarray", "torch.from_numpy")
        refused(lambda: evaluate(levels(), POINTS.numpy()), "x_0", "ndarray", "torch.from_numpy")


@every_pair
def test_arrays_are_refused_by_programs_too(pair):
    for diffusion, x_0 in ((gaussian(), X), (bits(), ONES), (levels(), POINTS)):
        refused(lambda diffusion=diffusion, x=x_0: svi_of(pair(diffusion)).step(x.numpy()), "x_0", "torch.from_numpy")


# networks

CHANGES = {
    "a dict": lambda found: {"sample": found, "mean": found + 1},
    "nothing": lambda found: None,
    "a tuple": lambda found: (found, found),
    "a list": lambda found: [found] * 50,
    "a tuple of one": lambda found: (found,),
    "a dict of text": lambda found: {f"output {k}": "word " * 50 for k in range(20)},
    "a number": lambda found: 0.5,
    "an array": lambda found: found.detach().numpy(),
    "another shape": lambda found: found[..., :1],
    "no batch": lambda found: found[0],
}
MODELS = {
    **{
        kind.__name__: (lambda network, kind=kind: gaussian(network, prediction=kind), X, None)
        for kind in (
            pyrodiff.DataPrediction,
            pyrodiff.NoisePrediction,
            pyrodiff.ScorePrediction,
            pyrodiff.VelocityPrediction,
        )
    },
    "bits": (bits, ONES, None),
    "D3PM": (lambda network: bits(network, pyrodiff.D3PMReverse), ONES, None),
    "levels": (levels, POINTS, LEVELS),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_network_that_returns_something_else_is_named(change, model):
    make, x_0, outputs = model
    if outputs is not None and change is CHANGES["another shape"]:
        change = lambda found: found[..., 0]  # noqa: E731
    diffusion = make(Network(change, outputs))
    for use in (
        lambda: bound(diffusion, x_0),
        lambda: importance_bound(diffusion, x_0, num_particles=2),
        lambda: svi_of(diffusion).step(x_0),
        lambda: svi_of(diffusion.one_step()).step(x_0),
        lambda: AncestralSampler(diffusion)(3),
    ):
        refused(use, "network must return a tensor of shape")


@pytest.mark.parametrize("change", ["a dict", "nothing", "a tuple", "a number"])
def test_a_network_that_is_the_denoiser_and_returns_something_else_is_named(change):
    """Without a prediction around it, as GaussianReverse takes one."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.1, 0.5))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, Network(CHANGES[change])), (D,))
    for use in (lambda: bound(diffusion, X), lambda: svi_of(diffusion).step(X), lambda: AncestralSampler(diffusion)(3)):
        refused(use, "must return a tensor of shape")


# noise that float32 cannot tell

SMALL = {
    "linear": lambda low: pyrodiff.LinearSchedule(T, low**2, 0.5),
    "beta": lambda low: pyrodiff.BetaSchedule([low**2, 0.1, 0.2, 0.5]),
    "log SNR": lambda low: pyrodiff.LogSNRSchedule(T, -2 * math.log(low), -4.0),
    "geometric": lambda low: pyrodiff.GeometricSchedule(T, low, 20.0),
}


@pytest.mark.parametrize("schedule", SMALL.values(), ids=SMALL)
def test_noise_that_float32_cannot_tell_is_refused_there_and_not_in_float64(schedule):
    diffusion = gaussian(schedule=schedule(0.9e-7))
    pair = diffusion.one_step()
    with pyro.validation_enabled(True):
        for program in (diffusion.model, diffusion.guide, pair.model, pair.guide):
            refused(lambda program=program: program(X), "forward", "float32", "float64", "9e-08")
    for use in (
        lambda: bound(diffusion, X),
        lambda: importance_bound(diffusion, X, num_particles=2),
        lambda: svi_of(diffusion).step(X),
        lambda: svi_of(pair).step(X),
    ):
        refused(use, "forward", "float32", "float64", "9e-08")
    diffusion.double()
    x_0 = X.double()
    assert bool(bound(diffusion, x_0).nats.isfinite().all())
    assert math.isfinite(float(svi_of(diffusion).step(x_0)))
    assert math.isfinite(float(svi_of(pair).step(x_0)))
    with pyro.validation_enabled(True):
        for program in (diffusion.model, diffusion.guide, pair.model, pair.guide):
            program(x_0)


@pytest.mark.parametrize("schedule", SMALL.values(), ids=SMALL)
def test_noise_just_above_what_float32_tells_is_taken(schedule):
    diffusion = gaussian(schedule=schedule(1e-6))
    assert bool(bound(diffusion, X).nats.isfinite().all())
    svi_of(diffusion).step(X)


def test_a_sub_chain_that_starts_with_more_noise_is_taken():
    diffusion = gaussian(schedule=SMALL["beta"](1e-8))
    refused(lambda: bound(diffusion, X), "forward", "float64")
    assert bool(bound(diffusion.subchain((2, 4)), X).nats.isfinite().all())
    refused(lambda: bound(diffusion.subchain((1, 4)), X), "forward", "float64")


def test_bits_have_no_noise_that_is_too_small():
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([1e-16, 0.2, 0.5]), 0.3)
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(Network(), forward))
    assert bool(bound(pyrodiff.Diffusion(forward, reverse, (D,)), ONES).nats.isfinite().all())


# data that are far from the prior


def said_of(call):
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


FAR = {"mean": (100.0, 1.0), "large": (0.0, 50.0), "small": (0.0, 0.01), "both": (-3.0, 7.0)}


def data(mean, scale, B=64):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    return mean + scale * (x - x.mean()) / x.std()


@every_pair
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("mean", "scale"), FAR.values(), ids=FAR)
def test_the_first_step_says_once_how_far_the_data_are_from_the_prior(pair, compile, mean, scale, monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args, **kwargs: graph)
    svi, x_0 = svi_of(pair(gaussian()), compile=compile), data(mean, scale)
    (warning,) = said_of(lambda: svi.step(x_0))
    assert warning.category is UserWarning
    assert warning.filename == __file__
    said = str(warning.message)
    assert f"mean {float(x_0.mean()):.3g} " in said
    assert f"standard deviation {float(x_0.std()):.3g}" in said
    assert "standardise" in said
    later = (x_0, x_0, x_0[:5], data(200.0, 3.0), x_0[:1])
    for x in later:
        assert not said_of(lambda x=x: svi.step(x))


@every_pair
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (1.0, 0.5), (-1.5, 3.0), (0.3, 0.25)])
def test_nothing_is_said_of_data_near_it(pair, mean, scale):
    assert not said_of(lambda: svi_of(pair(gaussian())).step(data(mean, scale)))


class Regression:
    """A pair that is no diffusion."""

    def __init__(self):
        self.linear = nn.Linear(D, 1)

    def model(self, x):
        pyro.module("linear", self.linear)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.linear(x)[:, 0], 1.0), obs=x.sum(-1))

    def guide(self, x):
        pass


@every_pair
def test_nothing_is_said_of_bits_levels_and_single_numbers(pair):
    assert not said_of(lambda: svi_of(pair(bits())).step(ONES))
    assert not said_of(lambda: svi_of(pair(bits())).step(torch.zeros(5, D)))  # of which the deviation is 0
    assert not said_of(lambda: svi_of(pair(levels())).step(POINTS))
    assert not said_of(lambda: svi_of(Regression()).step(data(100.0, 1.0)))


def test_nothing_is_said_where_the_first_step_is_refused():
    svi = svi_of(gaussian())
    assert not said_of(lambda: refused(lambda: svi.step(data(100.0, 1.0)[:, :1]), "x_0"))
    assert len(said_of(lambda: svi.step(data(100.0, 1.0)))) == 1


# summaries


def a_bound(B=5):
    k = torch.arange(1.0, B + 1).double()
    return Bound(k, torch.stack([k.sqrt(), 3 - k, 0.1 * k**2]), 2 * k - 7, torch.Size((D,)))


SUMMARIES = {
    "bound": a_bound,
    "importance": lambda B=5: pyrodiff.ImportanceBound(torch.arange(3.0 * B).reshape(3, B).sin(), torch.Size((D,))),
    "flow": lambda B=4: pyrodiff.ode_log_prob(gaussian(), X[:B]),
}
every_summary = pytest.mark.parametrize("make", SUMMARIES.values(), ids=SUMMARIES)


@every_summary
def test_the_mean_and_its_error_are_numbers(make):
    it = make()
    nats = it.nats.double()
    mean = sum(nats.tolist()) / len(nats)
    deviation = math.sqrt(sum((cost - mean) ** 2 for cost in nats.tolist()) / (len(nats) - 1))
    for number, expected in ((it.mean, mean), (it.standard_error, deviation / math.sqrt(len(nats)))):
        assert isinstance(number, float)
        assert number == pytest.approx(expected, rel=1e-6)
        assert f"{number:.3f}" == f"{float(number):.3f}"
        assert math.isfinite(number + 1)
        assert number in {float(number): 1}
    assert it.mean == float(it.nats.mean())
    assert it.standard_error == float(it.nats.std() / math.sqrt(len(nats)))


@every_summary
def test_they_can_be_called_with_other_values(make):
    it, other = make(), torch.tensor([1.0, 2.0, 6.0, 7.0]).double()
    expected = 4.0, math.sqrt((9 + 4 + 4 + 9) / 3) / 2
    for summary in (it, type(it), Bound, pyrodiff.Likelihood):
        assert isinstance(summary.mean(other), float)
        assert summary.mean(other) == expected[0]
        assert float(summary.standard_error(other)) == pytest.approx(expected[1], rel=1e-12)
        assert summary.standard_error(other).shape == ()
        assert math.isnan(summary.standard_error(other[:1]))
    assert it.mean(it.nats) == it.mean


@every_summary
def test_of_one_datum_the_error_is_not_known(make):
    it = make(B=1)
    assert it.mean == float(it.nats)
    assert math.isnan(it.standard_error)


@every_summary
@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy, copy.copy])
def test_they_survive_being_copied(make, copied):
    it = make()
    for number in (it.mean, it.standard_error):
        found = copied(number)
        assert isinstance(found, float)
        assert found == number
    twin = copied(it)
    assert (twin.mean, twin.standard_error) == (it.mean, it.standard_error)
    assert twin.mean(it.nats) == it.mean
    assert copied({"mean": it.mean, "all": [it.standard_error]}) == {"mean": it.mean, "all": [it.standard_error]}


# learned schedules


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
    diffusion = gaussian(Network().to(dtype), Learned(T), pyrodiff.DataPrediction)
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
        svi, before = svi_of(pair), values(diffusion)
        for _ in range(3):
            svi.step(X.double())
        assert all(not torch.equal(*both) for both in zip(before, values(diffusion), strict=True))
    bound(diffusion, X.double())
    importance_bound(diffusion, X.double(), num_particles=2)
    assert AncestralSampler(diffusion)(3).dtype == torch.float64
    repr(diffusion)


def test_a_learned_schedule_in_float64_does_not_keep_a_network_from_float32():
    diffusion = learned(torch.float32)
    assert diffusion.model.dtype() == torch.float32
    assert bool(bound(diffusion, X).nats.isfinite().all())
    svi_of(diffusion.one_step()).step(X)
    assert AncestralSampler(diffusion)(3).dtype == torch.float32
    assert diffusion.model(num_samples=3).dtype == torch.float32


# validation


class Wrong(nn.Module):
    """A reverse process whose distribution has another event_shape: all of its dimensions are the batch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x_t, t):
        return dist.Normal(self.weight * x_t, 1.0)


def wrong():
    return pyrodiff.Diffusion(pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.1, 0.5)), Wrong(), (D,))


BAD = {
    "a half bit": (bits, torch.tensor([[0.0, 0.5]])),
    "a bit below 0": (bits, torch.tensor([[-1.0, 0.0]])),
    "not a number": (gaussian, torch.tensor([[0.0, math.nan]])),
    "infinite": (gaussian, torch.tensor([[math.inf, 0.0]])),
    "no level": (levels, torch.tensor([[0.3, 0.5]])),
}
EVALUATIONS = {"bound": bound, "importance": lambda *args: importance_bound(*args, num_particles=2)}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_bounds_validate_whatever_pyro_was_told(enabled, evaluate):
    with pyro.validation_enabled(enabled):
        for make, x_0 in BAD.values():
            refused(lambda make=make, x=x_0: evaluate(make(), x), "x_0")
            refused(lambda make=make, x=x_0: evaluate(make(), [x]), "x_0", "in batch 0")
        refused(lambda: evaluate(wrong(), X), "reverse", "event_shape (2,)")
        assert pyro.poutine.util.is_validation_enabled() == enabled
        evaluate(gaussian(), X)
        assert pyro.poutine.util.is_validation_enabled() == enabled


@pytest.mark.parametrize("enabled", [False, True])
def test_the_sampler_validates_whatever_pyro_was_told(enabled):
    with pyro.validation_enabled(enabled):
        refused(lambda: AncestralSampler(wrong())(3), "reverse", "event_shape (2,)")
        assert pyro.poutine.util.is_validation_enabled() == enabled
        AncestralSampler(gaussian())(3)
        assert pyro.poutine.util.is_validation_enabled() == enabled


@every_pair
@pytest.mark.parametrize("enabled", [False, True])
def test_the_first_step_of_each_shape_validates_whatever_pyro_was_told(pair, enabled):
    with pyro.validation_enabled(enabled):
        for make, x_0 in BAD.values():
            refused(lambda make=make, x=x_0: svi_of(pair(make())).step(x), "x_0")
        refused(lambda: svi_of(pair(wrong())).step(X), "reverse", "event_shape (2,)")
        svi = svi_of(pair(bits()))
        svi.step(ONES)
        svi.step(0.5 * ONES)  # of a shape that was there, which is taken on trust
        refused(lambda: svi.step(0.5 * ONES[:2]), "x_0")
        svi.step(ONES[:2])
        svi.step(0.5 * ONES[:2])
        assert pyro.poutine.util.is_validation_enabled() == enabled


@every_pair
@pytest.mark.parametrize("enabled", [False, True])
def test_every_step_validates_where_it_is_asked_to(pair, enabled):
    with pyro.validation_enabled(enabled):
        svi = svi_of(pair(bits()), validate=True)
        svi.step(ONES)
        refused(lambda: svi.step(0.5 * ONES), "x_0")


@every_pair
@pytest.mark.parametrize("enabled", [False, True])
def test_no_step_validates_where_it_is_asked_not_to(pair, enabled):
    with pyro.validation_enabled(enabled):
        svi = svi_of(pair(bits()), validate=False)
        for x_0 in (0.5 * ONES, 0.5 * ONES[:2]):
            svi.step(x_0)
        assert svi.num_steps == 2
        assert pyro.poutine.util.is_validation_enabled() == enabled


@pytest.mark.parametrize("enabled", [False, True])
def test_pyros_own_losses_are_validated_as_well(enabled):
    with pyro.validation_enabled(enabled):
        svi = svi_of(bits(), loss=Trace_ELBO())
        with pytest.raises(ValueError, match="x_0 must be 0 or 1 everywhere"):
            svi.step(0.5 * ONES)
        svi.step(ONES)
        svi = svi_of(bits(), loss=Trace_ELBO(), validate=False)
        svi.step(ONES)


# tables


def with_tables():
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T))
    denoiser = pyrodiff.NoisePrediction(Network(), forward)
    reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.FixedVariance([0.1, 0.2, 1 / 3, 0.4]))
    return pyrodiff.Diffusion(forward, reverse, (D,))


CASTS = {
    "float": lambda module: module.float(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "half and back": lambda module: module.half().float(),
    "double": lambda module: module.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("make", [with_tables, bits, lambda: with_tables().subchain((1, 3, 4)), levels])
def test_the_tables_of_a_state_stay_what_they_are(cast, make):
    diffusion = make()
    names = [name for name, tensor in diffusion.state_dict().items() if tensor.dtype == torch.float64]
    before = {name: diffusion.state_dict()[name].clone() for name in names}
    assert any("_table" in name for name in names)
    after = cast(diffusion).state_dict()
    for name in names:
        assert after[name].dtype == torch.float64
        assert torch.equal(after[name], before[name])
    weights = [tensor.dtype for name, tensor in after.items() if name not in names and tensor.is_floating_point()]
    assert weights
    assert all(dtype == next(diffusion.parameters()).dtype for dtype in weights)


@pytest.mark.parametrize("cast", ["float", "half", "half and back"])
def test_tables_of_drawings_stay_what_they_are(cast):
    for drawing in (pyrodiff.ImportanceDrawing([0.1, 0.2, 0.3, 0.4]), pyrodiff.LossSecondMoment(T)):
        pair = gaussian().one_step(drawing)
        before = {key: value.clone() for key, value in drawing.state_dict().items()}
        CASTS[cast](pair)
        for key, value in drawing.state_dict().items():
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key])
