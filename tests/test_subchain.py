"""A chain of fewer steps is a diffusion by itself: the same law of the states that it keeps, its own exact bound."""

import copy
import itertools
import math
from functools import partial

import cases
import models
import numpy as np
import oracles
import pyro.distributions as dist
import pytest
import torch
from cases import BETAS, SCHEDULES, TIMES, Returns, T, Timed
from exact import Gaussian, far, gradient, repeat
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrodiff

RATE = 0.3
GAUSSIAN = {  # name: (schedule, its (gain, variance) step by step)
    "preserving": SCHEDULES["BetaSchedule"],
    "erasing": SCHEDULES["ReciprocalSchedule"],
    "exploding": SCHEDULES["GeometricSchedule"],
}
GAUSSIAN = {name: (schedule.make(T), schedule.steps(T)) for name, schedule in GAUSSIAN.items()}
every_schedule = pytest.mark.parametrize("name", sorted(GAUSSIAN))
every_times = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
M, V = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64), 0.6
X_0 = torch.tensor([[0.2, -2.0, 1.5], [1.1, 0.4, 3.0], [-4.0, 5.0, 0.0]], dtype=torch.float64)
close = partial(cases.close, rtol=1e-10, atol=1e-12)


def diffusion(name="preserving", prediction=pyrodiff.DataPrediction, variance=None, decoder=None, network=None):
    forward = pyrodiff.GaussianForward(GAUSSIAN[name][0])
    reverse = pyrodiff.GaussianReverse(
        forward, prediction(Timed() if network is None else network, forward), variance and variance()
    )
    decoder = None if decoder is None else decoder(forward)
    return pyrodiff.Diffusion(forward, reverse, (3,), decoder=decoder)


def bit_diffusion(dims=2, rate=RATE, network=None):
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS), rate)
    network = Timed() if network is None else network
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(network, forward))
    return pyrodiff.Diffusion(forward, reverse, (dims,))


# the weights of the simple loss


@every_times
@pytest.mark.parametrize("variance", [pyrodiff.ForwardVariance, pyrodiff.PosteriorVariance])
def test_simple_weights_are_of_the_whole_steps(variance, times):
    """Weighted, a KL is the squared error of the noise: half (w_0 (x_0 - x_0'))^2 / sigma^2 where they differ."""
    steps, sub = GAUSSIAN["preserving"][1], diffusion(variance=variance).subchain(times)
    weights = pyrodiff.SimpleWeighting(sub.reverse)(torch.arange(1, len(times) + 1))
    for k in range(1, len(times) + 1):
        t, s = (0, *times)[k], (0, *times)[k - 1]
        (gain_t, variance_t), (gain_s, variance_s) = oracles.moments(steps)[t], oracles.moments(steps)[s]
        gain, spread = oracles.moments(steps, s)[t - s]
        of_x_0 = oracles.condition(gain_s, variance_s, gain, spread, 0)[0] if s else 1.0
        deviation = sub.reverse.variance(sub.forward_process, k).item() ** 0.5
        kl = 0.5 * (of_x_0 * 0.3 / deviation) ** 2
        error = (gain_t * 0.3) ** 2 / variance_t
        close(weights[k - 1] * kl * len(times), error)


# the bound


def bounds_of(chain, x_0, seed=3):
    torch.manual_seed(seed)
    bound = pyrodiff.bound(chain, x_0, num_particles=2)
    return torch.cat([bound.prior[None], bound.denoising, bound.reconstruction[None]])


def losses_of(pair, x_0, seed=3):
    torch.manual_seed(seed)
    elbos = (pyrodiff.DiffusionELBO(), Trace_ELBO())
    return torch.tensor([elbo.loss(pair.model, pair.guide, x_0) for elbo in elbos], dtype=torch.float64)


CHAINS = {
    **{f"gaussian, {name}": lambda name=name: (diffusion(name), X_0) for name in GAUSSIAN},
    "posterior variance": lambda: (diffusion(variance=pyrodiff.PosteriorVariance), X_0),
    "noise prediction": lambda: (diffusion(prediction=pyrodiff.NoisePrediction), X_0),
    "transition decoder": lambda: (diffusion(decoder=pyrodiff.TransitionDecoder), X_0),
    "levels": lambda: (diffusion(decoder=lambda q: pyrodiff.SoftmaxDecoder(q, 5)), torch.tensor([[-1, 0.5, 1]] * 3)),
    "bits": lambda: (bit_diffusion(), torch.tensor([[0, 1], [1, 1], [0, 0.0]])),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_sub_chain_of_all_times_is_the_chain_draw_by_draw(chain):
    whole, x_0 = CHAINS[chain]()
    x_0, sub = x_0.double(), whole.subchain(range(1, T + 1))
    close(bounds_of(sub, x_0), bounds_of(whole, x_0))
    close(losses_of(sub, x_0), losses_of(whole, x_0))
    close(losses_of(sub.one_step(), x_0), losses_of(whole.one_step(), x_0))
    draws = []
    for each in (whole, sub):
        torch.manual_seed(4)
        draws.append(each.model(num_samples=5).double())
    close(*draws)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_sub_chain_of_a_sub_chain_is_a_sub_chain(chain):
    whole, x_0 = CHAINS[chain]()
    nested, direct = whole.subchain((1, 3, 4, 6, 7)).subchain((2, 3, 5)), whole.subchain((3, 4, 7))
    close(bounds_of(nested, x_0.double()), bounds_of(direct, x_0.double()))
    k = torch.arange(4)
    for method in ("beta", "signal", "noise", "log_snr"):
        ours, theirs = (getattr(each.forward_process.schedule, method)(k) for each in (nested, direct))
        close(ours, theirs)


def best(steps):
    """E[x_0 | x_t] of data N(m, v) with v the same in each dimension, by conditioning; t is of the whole chain."""
    moments = torch.tensor(oracles.moments(steps), dtype=torch.float64)
    return Returns(lambda x_t, t: oracles.condition(M, V, *moments[t].T[..., None], x_t)[0])


class BestVariance(pyrodiff.Variance):
    """The variance of x_s given x_t, of data of variance v, for steps between given times."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.times = steps, range(T + 1)

    def forward(self, process, t):
        variances = [math.nan, *oracles.best_variances(self.steps, self.times[1:], V)]
        return torch.tensor(variances, dtype=torch.float64)[t]


def exact_diffusion(name, prior=True):
    """The diffusion whose kernels are those of data N(m, v), and its part that must hear of the times."""
    schedule, steps = GAUSSIAN[name]
    forward, variance = pyrodiff.GaussianForward(schedule), BestVariance(steps)
    reverse = pyrodiff.GaussianReverse(forward, best(steps), variance)
    prior = Gaussian(M, torch.full_like(M, V), schedule) if prior else None
    return pyrodiff.Diffusion(forward, reverse, (3,), prior=prior), variance


def log_ratio(chain, x_0):
    """log p(x_0, x_1, ..., x_K) / q(x_1, ..., x_K | x_0) of one draw, and the x_K drawn."""
    guide = poutine.trace(chain.guide).get_trace(x_0)
    model = poutine.trace(poutine.replay(chain.model, trace=guide)).get_trace(x_0)
    model.compute_log_prob(), guide.compute_log_prob()
    p, q = (
        sum(site["log_prob"] for name, site in trace.nodes.items() if name.startswith("x_")) for trace in (model, guide)
    )
    return (p - q).detach(), guide.nodes[f"x_{chain.num_steps}"]["value"]


def log_data(x_0):
    return oracles.log_normal(x_0.numpy(), M.numpy(), V).sum(-1)


@every_schedule
@pytest.mark.parametrize("times", [(1, 2, 3, 4, 5, 6, 7), (2, 3, 7), (7,), (1, 7)])
def test_every_single_draw_is_the_log_density_where_the_kernels_are_exact(name, times):
    whole, variance = exact_diffusion(name)
    sub, variance.times = whole.subchain(times), (0, *times)
    assert sub.model.prior is whole.model.prior
    for _ in range(3):
        close(log_ratio(sub, X_0)[0], log_data(X_0), rtol=0, atol=1e-9)
    x_0 = X_0.repeat(600, 1)
    for pair in (sub.one_step(), sub.one_step(pyrodiff.UniformDrawing())):
        draws = sum(pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, x_0).values())
        assert not far(draws.detach().reshape(600, 3), -torch.from_numpy(log_data(X_0)))


@every_schedule
@every_times
def test_a_prior_not_given_is_that_of_the_last_time(name, times):
    whole, variance = exact_diffusion(name, prior=False)
    sub, variance.times = whole.subchain(times), (0, *times)
    assert sub.model.prior is None
    gain, spread = oracles.moments(GAUSSIAN[name][1])[times[-1]]
    for _ in range(3):
        ratio, x_K = log_ratio(sub, X_0)
        given = oracles.log_normal(x_K.numpy(), 0.0, gain**2 + spread)
        true = oracles.log_normal(x_K.numpy(), gain * M.numpy(), gain**2 * V + spread)
        close(ratio, log_data(X_0) + (given - true).sum(-1), rtol=0, atol=1e-9)


def test_the_exact_sub_chain_generates_the_data():
    whole, variance = exact_diffusion("preserving")
    sub, variance.times = whole.subchain((2, 3, 7)), (0, 2, 3, 7)
    x_0 = sub.model(num_samples=20_000).double()
    assert not far(x_0, M)
    assert not far((x_0 - M) ** 2, V)


def test_sites_are_those_of_the_steps():
    sub = diffusion().subchain((2, 3, 7))
    guide, model = (poutine.trace(program).get_trace(X_0) for program in (sub.guide, sub.model))
    assert [name for name in guide.nodes if name.startswith("x_")] == ["x_3", "x_2", "x_1"]
    assert [name for name in model.nodes if name.startswith("x_") and name[2:].isdigit()] == [
        "x_3",
        "x_2",
        "x_1",
        "x_0",
    ]


# bits, enumerated

BIT_TIMES = (2, 3, 6)
STATES = list(itertools.product((0, 1), repeat=2))


class Mixed(nn.Module):
    """Log odds of each of two bits that look at both, and at the time."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[1.7, -0.8], [0.6, 1.1]], dtype=torch.float64))

    def forward(self, x_t, t):
        t = torch.as_tensor(t, dtype=x_t.dtype)
        t = t.reshape(t.shape + (1,) * (x_t.dim() - t.dim()))
        return x_t @ self.mix - 0.3 * t + 0.5


def enumerated(network):
    mix = network.mix.detach().numpy()
    believes = lambda t: 1 / (1 + np.exp(-(np.array(STATES) @ mix - 0.3 * t + 0.5)))  # noqa: E731
    return cases.Enumerated(BETAS, RATE, cases.mixture, believes)


@pytest.mark.parametrize("x_0", STATES)
def test_the_bound_of_a_sub_chain_of_bits_is_the_enumerated_one(x_0):
    network = Mixed()
    sub = bit_diffusion(network=network).subchain(BIT_TIMES)
    truth, x = enumerated(network), torch.tensor(x_0, dtype=torch.float64).expand(20_000, 2)
    steps = [truth.cost(x_0, s, t) for s, t in itertools.pairwise((0, *BIT_TIMES))]
    expected = [truth.last(x_0, BIT_TIMES[-1]), *reversed(steps)]
    assert sum(expected) > -math.log(truth.likelihood(BIT_TIMES)[STATES.index(x_0)])
    bound = pyrodiff.bound(sub, x)
    close(bound.prior, np.full(20_000, expected[0]))
    assert not far(bound.denoising.T, torch.tensor(expected[2:0:-1], dtype=torch.float64))
    assert not far(bound.reconstruction, expected[3])
    assert not far(bound.nats, sum(expected))
    terms = pyrodiff.DiffusionELBO().terms(sub.model, sub.guide, x)
    assert list(terms) == ["x_3", "x_2", "x_1", "x_0"]
    for term, mean in zip(terms.values(), expected, strict=True):
        assert not far(term.detach(), mean)
    pair = sub.one_step()
    draws = sum(pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, x).values())
    assert not far(draws.detach(), sum(expected))


def test_a_sub_chain_of_bits_generates_with_the_enumerated_likelihood():
    network = Mixed()
    drawn = bit_diffusion(network=network).subchain(BIT_TIMES).model(num_samples=20_000)
    p = enumerated(network).likelihood(BIT_TIMES)
    assert p.sum() == pytest.approx(1)
    for x_0, chance_of_it in zip(STATES, p, strict=True):
        assert not far((drawn == torch.tensor(x_0)).all(-1).double(), chance_of_it)


# decoders


def test_the_decoder_of_a_sub_chain_is_that_of_its_first_step():
    x_1 = cases.normal(4, 3)
    gain, variance = oracles.span(GAUSSIAN["preserving"][1], 0, 3)
    for decoder in (pyrodiff.TransitionDecoder, lambda q: pyrodiff.SoftmaxDecoder(q, 5)):
        sub = diffusion(decoder=decoder).subchain((3, 5, 7))
        assert sub.model.decoder.forward_process is sub.forward_process
    transition = diffusion(decoder=pyrodiff.TransitionDecoder).subchain((3, 5, 7)).model
    cases.same_law(transition.decoded(transition.kernel(x_1, 1), x_1), (gain * x_1, variance))
    whole = diffusion(decoder=lambda q: pyrodiff.DiscretizedDecoder(9))
    sub = whole.subchain((3, 5, 7)).model
    assert sub.decoder is whole.model.decoder
    close(sub.decoded(sub.kernel(x_1, 1), x_1).base_dist.scale, np.full((4, 3), variance**0.5))  # of the whole step


# what is shared


def test_a_sub_chain_shares_its_parameters_both_ways():
    for whole, x_0 in ((diffusion(), X_0), (bit_diffusion(), cases.coins(6, 2))):
        sub = whole.subchain((2, 3, 7))
        assert {id(p) for p in sub.parameters()} == {id(p) for p in whole.parameters()}
        before = bounds_of(whole, x_0), bounds_of(sub, x_0)
        for trained in (whole, sub):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
            pair = trained.one_step()
            pyrodiff.DiffusionELBO().differentiable_loss(pair.model, pair.guide, x_0).backward()
            optimizer.step()
            after = bounds_of(whole, x_0), bounds_of(sub, x_0)
            for old, new in zip(before, after, strict=True):
                assert (old.sum(0) - new.sum(0)).abs().min() > 1e-6
            before = after


def test_the_gradient_of_the_sub_chain_of_all_times_is_the_chains():
    whole = diffusion()
    slopes = []
    for chain in (whole, whole.subchain(range(1, T + 1))):
        torch.manual_seed(3)
        loss = pyrodiff.DiffusionELBO().differentiable_loss(chain.model, chain.guide, X_0)
        slopes.append(gradient(loss, whole))
    close(*slopes)
    assert slopes[0].abs().min() > 0.1


def test_svi_trains_one_by_the_other():
    whole = diffusion()
    sub, start = whole.subchain((3, 7)), copy.deepcopy(whole.state_dict())
    for trained in (sub, whole, sub):
        svi = pyrodiff.SVI(trained.model, trained.guide, lambda p: torch.optim.SGD(p, lr=0.01), Trace_ELBO())
        before = copy.deepcopy(whole.state_dict())
        svi.step(X_0)
        name = "model.reverse.denoiser.network.weight"
        assert whole.state_dict()[name] != before[name]
        assert sub.reverse.denoiser.module.network.weight is whole.reverse.denoiser.network.weight
    assert whole.state_dict().keys() == start.keys()


def test_a_sub_chain_follows_to_another_dtype_with_its_times_and_tables():
    for cast_whole in (True, False):
        network = pyrodiff.networks.MLP(event_shape=(3,), hidden=8)
        whole = diffusion(prediction=pyrodiff.VelocityPrediction, network=network)
        sub = whole.subchain((2, 3, 7))
        assert pyrodiff.bound(sub, X_0.float()).nats.dtype == torch.float32
        (whole if cast_whole else sub).to(torch.float64)
        schedule = sub.forward_process.schedule
        assert torch.equal(schedule.time(torch.arange(4)), torch.tensor([0, 2, 3, 7]))
        assert (schedule.noise(2).dtype, schedule.beta(torch.tensor([2])).dtype) == (torch.float64, torch.float64)
        assert pyrodiff.bound(sub, X_0).nats.dtype == torch.float64
        assert sub.model(num_samples=4).dtype == torch.float64
        sub.half()
        assert torch.equal(schedule.time(torch.arange(4)), torch.tensor([0, 2, 3, 7]))
        assert torch.equal(
            schedule.signal(torch.arange(4)), GAUSSIAN["preserving"][0].signal(torch.tensor([0, 2, 3, 7]))
        )


def test_a_copy_is_a_sub_chain_of_its_own():
    sub = diffusion().subchain((2, 3, 7))
    twin = copy.deepcopy(sub)
    close(bounds_of(twin, X_0), bounds_of(sub, X_0))
    assert not {id(p) for p in sub.parameters()} & {id(p) for p in twin.parameters()}
    twin.load_state_dict(sub.state_dict())


class Random(PyroModule):
    """A network with a random weight."""

    def __init__(self):
        super().__init__()
        one = torch.ones((), dtype=torch.float64)
        self.weight = PyroSample(dist.Normal(0.4 * one, 0.3 * one))

    def forward(self, x_t, t):
        return self.weight * x_t


def test_random_weights_keep_one_value_in_a_sub_chain():
    sub = diffusion(network=Random()).subchain((2, 3, 7))
    trace = poutine.trace(sub.model).get_trace(X_0)
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name.endswith("weight")]
    assert len(names) == 1
    assert names == [name for name in poutine.trace(diffusion(network=Random()).model).get_trace(X_0) if name in names]
    assert pyrodiff.bound(sub, X_0, guide=models.prior_of_weights(sub)).nats.isfinite().all()
    weights = repeat(60, lambda: poutine.trace(sub.model).get_trace(X_0[:1]).nodes[names[0]]["value"])
    assert not far(weights, 0.4)


# parts that fit

WHOLE = diffusion()


def with_parts(forward=None, reverse=None, decoder=None, prior=None):
    forward = WHOLE.forward_process if forward is None else forward
    if reverse is None:
        reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(Timed(), forward))
    return pyrodiff.Diffusion(forward, reverse, (3,), decoder=decoder, prior=prior)


NORMAL = dist.Normal(torch.zeros(3), 1.0).to_event(1)


def test_what_is_refused_elsewhere_is_fine_where_it_fits():
    assert with_parts(prior=NORMAL).subchain((2, 7)).model.prior is NORMAL
    kept = diffusion(variance=lambda: pyrodiff.FixedVariance([0.1 * k for k in range(1, 8)])).subchain(range(1, 8))
    close(kept.reverse(X_0, 3).variance, np.full((3, 3), 0.3))
