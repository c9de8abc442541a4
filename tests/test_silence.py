"""Ways in which a number was once wrong without a word: each is right now, or refused."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.autoname import scope
from torch import nn

import pyrodiff
from pyrodiff import SVI, AncestralSampler, DiffusionELBO, bound, ode_log_prob, verify
from pyrodiff.pair.terms import pair_costs

X_0 = torch.tensor([[0.4, -1.2], [1.5, 0.3], [-0.7, 0.9]], dtype=torch.float64)


class Noise(nn.Module):
    """The exact noise prediction of N(0, I) data, b_t x_t."""

    def __init__(self, forward, gain=1.0):
        super().__init__()
        self.forward_process, self.gain = forward, nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x_t, t):
        return self.gain * self.forward_process.scales(x_t, t)[1] * x_t


def gaussian(T=6, network=Noise, decoder=None, reverse=pyrodiff.GaussianReverse):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.05, 0.5))
    kernel = reverse(forward, pyrodiff.NoisePrediction(network(forward), forward))
    return pyrodiff.Diffusion(forward, kernel, (2,), decoder)


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def direct(pair):
    with pyro.validation_enabled(False):
        return pair_costs(pair.model, pair.guide, (X_0,), {})


# Derivatives that were not there


def test_the_flow_has_its_divergence_also_in_inference_mode():
    truth = -dist.Normal(0.0, 1.0).log_prob(X_0).sum(-1)
    diffusion = gaussian(T=200)
    with torch.inference_mode():
        found = ode_log_prob(diffusion, X_0.clone()).nats
    torch.testing.assert_close(found, ode_log_prob(diffusion, X_0).nats)
    torch.testing.assert_close(found, truth, atol=0.02, rtol=0)


def test_a_network_without_gradients_has_no_flow():
    class Cut(Noise):
        @torch.no_grad()
        def forward(self, x_t, t):
            return super().forward(x_t, t)

    with pytest.raises(ValueError, match="denoiser must be differentiable"):
        ode_log_prob(gaussian(network=Cut), X_0)


def test_verify_tries_the_gradient_also_where_none_is_taken():
    with torch.no_grad():
        found = verify(gaussian(T=3), X_0, num_repeats=10, generator=0)
    assert found.passed
    assert not [claim for claim in found.claims if claim.passed is None and "gradient" in claim.name]


class Wider(pyrodiff.GaussianDecoder):
    """A decoder of one's own, of a class that the flow knows."""

    def forward(self, kernel, x_1):
        return dist.Normal(kernel.mean, 100 * kernel.stddev).to_event(1)


def test_a_decoder_of_another_class_follows_the_flow():
    assert not ode_log_prob(gaussian(), X_0).is_bound
    assert ode_log_prob(gaussian(decoder=Wider()), X_0, generator=0).is_bound


# What is scored


class Weighed(pyrodiff.GaussianDecoder):
    """A decoder with a factor of its own."""

    def forward(self, kernel, x_1):
        pyro.factor("weight", torch.tensor(-1e4))
        return kernel


@pytest.mark.parametrize("one_step", [False, True])
def test_a_factor_inside_of_a_part_is_scored_at_every_step(one_step):
    diffusion = gaussian(decoder=Weighed())
    pair = diffusion.one_step(pyrodiff.UniformDrawing()) if one_step else diffusion
    svi = SVI(pair.model, pair.guide, still, DiffusionELBO())
    assert all(float(svi.step(X_0)) > 9e3 for _ in range(3))
    assert direct(pair) is None


@pytest.mark.parametrize("change", ["the model's", "the step's"])
def test_a_pair_of_two_processes_is_not_evaluated_directly(change):
    pair = gaussian().one_step()
    assert direct(pair) is not None
    other = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(6, 0.5, 0.9))
    (pair.model if change == "the model's" else pair.model.step).forward_process = other
    assert direct(pair) is None


def test_a_program_whose_class_was_changed_is_not_evaluated_directly(monkeypatch):
    pair = gaussian().one_step()
    forward = type(pair.model).forward
    monkeypatch.setattr(type(pair.model), "forward", lambda self, x_0: forward(self, 2 * x_0))
    assert direct(pair) is None


# Draws


def test_a_sampler_draws_for_each_sample_of_a_law_for_one():
    class One(pyrodiff.GaussianReverse):
        def forward(self, x_t, t):
            return dist.Normal(torch.zeros(1, 2, dtype=x_t.dtype), 1.0).to_event(1)

    samples = AncestralSampler(gaussian(reverse=One))(6, generator=0)
    assert samples.shape == (6, 2)
    assert len(samples.unique(dim=0)) == 6


def test_a_kernel_that_changes_its_kind_is_bounded_alike_whatever_the_memory():
    class Kinds(pyrodiff.GaussianReverse):
        """Normal at t = 1, Student-t above, which has no KL with a normal law."""

        def forward(self, x_t, t):
            law = super().forward(x_t, t)
            if int(torch.as_tensor(t).max()) == 1:
                return law
            return dist.StudentT(5.0, law.mean, law.stddev).to_event(1)

    diffusion = gaussian(reverse=Kinds)
    size = pyrodiff.running.evaluation.bytes_per_row(diffusion, X_0[:1])
    found = [bound(diffusion, X_0, memory_budget=budget, generator=0).nats for budget in (2**28, size)]
    torch.testing.assert_close(*found)


# Chains of fewer steps


def test_a_sub_chain_of_all_steps_keeps_what_was_put_on_its_parts():
    class Tempered(pyrodiff.GaussianReverse):
        factor = 1.0

        def forward(self, x_t, t):
            law = super().forward(x_t, t)
            return dist.Normal(law.mean, self.factor * law.stddev).to_event(1)

    whole = gaussian(reverse=Tempered)
    before = bound(whole, X_0, generator=0).nats
    whole.reverse.factor = 4.0
    whole.reverse.register_forward_hook(lambda module, args, law: dist.Normal(law.mean + 1, law.stddev).to_event(1))
    cut = whole.subchain(range(1, 7))
    found = [bound(diffusion, X_0, generator=0).nats for diffusion in (whole, cut)]
    torch.testing.assert_close(*found)
    assert (found[0] - before).abs().min() > 0.1


def test_a_process_with_more_than_its_class_gives_it_is_not_cut():
    diffusion = gaussian()
    diffusion.forward_process.prior = lambda *args: dist.Normal(torch.ones(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"subchain\(times\) of its own .*prior"):
        diffusion.subchain([2, 6])


def test_a_sub_chain_of_bits_follows_a_rate_that_is_replaced():
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(6), 0.5)
    cut = forward.subchain([2, 6])
    forward.load_state_dict({**forward.state_dict(), "rate": torch.tensor(0.1, dtype=torch.float64)}, assign=True)
    assert float(cut.prior((1,)).mean) == pytest.approx(0.1)


# Graphs


class Gained(nn.Module):
    """A network that reads an attribute of its class."""

    gain = 1.0

    def __init__(self, forward=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x_t, t):
        return self.gain * self.weight * x_t


def test_a_graph_sees_its_classes(interpreted, monkeypatch):
    pair = gaussian(network=Gained).one_step(pyrodiff.UniformDrawing())
    svis = [SVI(pair.model, pair.guide, still, DiffusionELBO(), compile=compiled) for compiled in (False, True)]
    losses = []
    for gain in (1.0, 1.0, 5.0):
        monkeypatch.setattr(Gained, "gain", gain)
        losses.append([(torch.manual_seed(3), float(svi.step(X_0)))[1] for svi in svis])
    for eager, compiled in losses[1:]:
        assert compiled == pytest.approx(eager, rel=1e-9)
    monkeypatch.setattr(Gained, "forward", lambda self, x_t, t: x_t - self.weight)
    eager, compiled = ((torch.manual_seed(3), float(svi.step(X_0)))[1] for svi in svis)
    assert compiled == pytest.approx(eager, rel=1e-9)


def zeroed(parameter):
    parameter.grad.zero_()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_gradient_act_in_a_compiled_run(interpreted, kind, late):
    """Each sets the gradient to 0, so that nothing moves."""
    diffusion = gaussian(network=Gained)
    pair, weight = diffusion.one_step(), diffusion.reverse.denoiser.network.weight

    def put():
        getattr(weight, kind)((lambda g: 0 * g) if kind == "register_hook" else zeroed)

    svi = SVI(pair.model, pair.guide, lambda p: torch.optim.SGD(p, lr=0.1), DiffusionELBO(), compile=True)
    if not late:
        put()
    for step in range(5):
        if late and step == 3:
            put()
            before = weight.detach().clone()
        svi.step(X_0)
    assert torch.equal(weight, before if late else torch.ones_like(weight))


# Numbers and laws that do not fit


def test_data_whose_numbers_are_too_coarse_for_the_first_noise_are_refused():
    """Beside 1e5 float32 has steps of 0.008, as large as the first noise of 0.01."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1000))
    diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((2,))), (2,))
    with pytest.raises(ValueError, match=r"more noise at t = 1 .*float64"):
        bound(diffusion, 1e5 + torch.randn(4, 2), num_times=5)
    bound(diffusion, 1e3 + torch.randn(4, 2), num_times=5)


def test_a_kernel_in_float64_of_states_in_float32_is_bounded():
    class Double(pyrodiff.GaussianReverse):
        def forward(self, x_t, t):
            law = super().forward(x_t, t)
            return dist.Normal(law.mean.double(), law.stddev.double()).to_event(1)

    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(6, 0.05, 0.5))
    network = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1)
    found = []
    for kind in (pyrodiff.GaussianReverse, Double):
        diffusion = pyrodiff.Diffusion(forward, kind(forward, pyrodiff.NoisePrediction(network, forward)), (2,))
        found.append(bound(diffusion, X_0.float(), generator=0).nats)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_a_prior_of_torch_is_drawn_from():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(6))
    law = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1))
    diffusions = [pyrodiff.Diffusion(forward, reverse, (2,), prior=prior) for prior in (law, None)]
    torch.testing.assert_close(*(AncestralSampler(diffusion)(4, generator=0) for diffusion in diffusions))


# A network wrapped or lazy, a weighting of another chain, a warning for the right reason


def of_data_prediction(network, T=3):
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T))
    return pyrodiff.Diffusion(
        forward, pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(network, forward)), (2,)
    )


def losses_of(network, steps=3):
    diffusion, x_0 = of_data_prediction(network), pyrodiff.datasets.swiss_roll(16)
    pair = diffusion.one_step()
    svi = pyrodiff.SVI(pair.model, pair.guide, lambda p: torch.optim.SGD(p, lr=1e-6), pyrodiff.DiffusionELBO())
    torch.manual_seed(1)
    return diffusion, torch.stack([svi.step(x_0) for _ in range(steps)])


def test_a_network_that_torch_compiles_is_trained_as_it_is():
    torch.manual_seed(0)
    network = pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1)
    wrapped = torch.compile(copy.deepcopy(network), backend="eager")
    (_, ours), (diffusion, theirs) = losses_of(network), losses_of(wrapped)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    x_0 = pyrodiff.datasets.swiss_roll(8)
    assert pyrodiff.pair_bound(diffusion.model, diffusion.guide, x_0, generator=0).nats.isfinite().all()


class Normed(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.layer = norm, torch.nn.Linear(2, 2)

    def forward(self, x_t, t):
        return self.layer(self.norm(x_t))


def test_a_lazy_layer_keeps_the_statistics_of_the_steps_alone():
    torch.manual_seed(0)
    plain = Normed(torch.nn.BatchNorm1d(2))
    lazy = Normed(torch.nn.LazyBatchNorm1d())
    lazy.layer.load_state_dict(plain.layer.state_dict())
    (_, ours), (_, theirs) = losses_of(plain), losses_of(lazy)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    torch.testing.assert_close(lazy.norm.running_mean, plain.norm.running_mean, rtol=1e-6, atol=0)
    assert int(lazy.norm.num_batches_tracked) == int(plain.norm.num_batches_tracked) == 3


def test_a_weighting_of_the_whole_chain_is_refused_by_its_sub_chain():
    diffusion = of_data_prediction(pyrodiff.networks.MLP((2,), hidden=8), T=10)
    short = diffusion.subchain([2, 5, 10])
    with pytest.raises(ValueError, match="weighting must be made for the same forward process"):
        short.one_step(weighting=pyrodiff.SimpleWeighting(diffusion.reverse))
    short.one_step(weighting=pyrodiff.SimpleWeighting(short.reverse))


def test_parts_that_two_chains_share_are_the_same_after_a_step():
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(4), 0.3)
    denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP((2,), hidden=8, num_blocks=1), forward)
    whole = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), (2,))
    short, rate = whole.subchain([2, 4]), forward.rate

    class Both(torch.nn.Module):
        def __init__(self, part):
            super().__init__()
            self.whole, self.short = getattr(whole, part), getattr(short, part)

        def forward(self, x_0):
            with scope(prefix="whole"):
                self.whole(x_0)
            with scope(prefix="short"):
                self.short(x_0)

    svi = pyrodiff.SVI(Both("model"), Both("guide"), torch.optim.Adam, pyrodiff.DiffusionELBO())
    svi.step(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert forward.rate is rate
    assert short.forward_process.rate is rate


class Signs(torch.nn.Module):
    """The mean of independent signs given x_t."""

    def __init__(self, forward):
        super().__init__()
        self.forward_process = forward

    def forward(self, x_t, t):
        a, b = self.forward_process.scales(x_t, t)
        return torch.tanh(a * x_t / b**2)


def test_a_step_that_stands_for_many_is_no_cause_to_warn():
    """An exact denoiser, and one draw of t that counts for all others: no warning, whatever is drawn."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(1000))
    diffusion = pyrodiff.Diffusion(
        forward, pyrodiff.GaussianReverse(forward, Signs(forward)), (16,), pyrodiff.SoftmaxDecoder(forward, 2)
    )
    x_0 = torch.ones(1, 16)
    for seed in range(40):  # a warning is an error here
        pyrodiff.bound(diffusion, x_0, num_times=1, generator=seed)


class Rotated(pyro.distributions.TorchDistribution):
    """A Gaussian whose axes are turned, by a product of matrices that autocast would take in half precision."""

    arg_constraints = {}  # noqa: RUF012 - torch's own form
    support = torch.distributions.constraints.real_vector
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Rotated(self.loc.expand(*batch_shape, 8))

    def log_prob(self, x):
        scale = torch.linspace(0.3, 1.2, 8)
        return dist.Normal(torch.zeros(8), scale).log_prob((x - self.loc) @ self.turn).sum(-1)


class TurnedKernel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.8))

    def forward(self, x_t, t):
        return Rotated(self.weight * x_t)


@pytest.mark.parametrize("one_step", [True, False])
def test_what_is_summed_to_a_bound_is_never_in_half_precision(one_step):
    """Under autocast networks may compute in less; the laws and their costs do not, in any of the ways to a loss."""
    diffusion = pyrodiff.Diffusion(pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4)), TurnedKernel(), (8,))
    pair, x_0 = diffusion.one_step() if one_step else diffusion, torch.randn(16, 8)
    for validated in (False, True):
        found = []
        for enabled in (False, True):
            torch.manual_seed(3)
            with pyro.validation_enabled(validated), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0))
        assert torch.equal(*found), validated
    bounds = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            bounds.append(bound(diffusion, x_0, generator=1).nats)
    assert torch.equal(*bounds)
