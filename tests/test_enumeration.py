"""A short binomial chain, all of its paths summed by hand: log p(x_0), the bound term by term, and its gradient."""

import itertools
import math

import pytest
import torch
from exact import BitTable, bit_diffusion, far, gradient, repeat
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO

import pyrodiff

BETAS = [0.2, 0.3, 0.6]
CASES = [(bits, rate) for bits in (1, 2) for rate in (0.2, 0.5)]


def step(x, y, keep, rate):
    """q(x_t = y | x_s = x), with the probability ``keep`` that a bit is kept rather than drawn anew."""
    return math.prod(keep * (a == b) + (1 - keep) * (rate if b else 1 - rate) for a, b in zip(x, y, strict=True))


def transition(x, y, t, rate):
    return step(x, y, 1 - BETAS[t - 1], rate)


def log_kernels(table: BitTable):
    """log p(x_{t-1} | x_t) from the table alone, a tensor with shape (T + 1, states, states)."""
    bits = table.logits.shape[-1]
    states = torch.tensor([[row >> k & 1 for k in range(bits)] for row in range(2**bits)]).double()
    odds = table.logits[:, :, None]
    return (states * odds.sigmoid().log() + (1 - states) * (-odds).sigmoid().log()).sum(-1)


def row(x):
    return sum(bit << k for k, bit in enumerate(x))


def log_chain(log_p, path, t):
    """log p(x_{t-1} | x_t) on a path."""
    return log_p[t, row(path[t]), row(path[t - 1])]


def log_model(log_p, path, rate):
    """log p(x_0, ..., x_3) of a path."""
    prior = sum(math.log(rate if bit else 1 - rate) for bit in path[3])
    return prior + sum(log_chain(log_p, path, t) for t in (1, 2, 3))


def log_likelihood(table, x_0, rate):
    """log p(x_0) as a number."""
    rows = log_kernels(table).tolist()
    total = 0.0
    for path in paths(x_0):
        prior = math.prod(rate if bit else 1 - rate for bit in path[3])
        total += prior * math.exp(sum(rows[t][row(path[t])][row(path[t - 1])] for t in (1, 2, 3)))
    return math.log(total)


def paths(x_0):
    """All (x_0, x_1, x_2, x_3) from x_0."""
    states = list(itertools.product((0, 1), repeat=len(x_0)))
    return [(x_0, *rest) for rest in itertools.product(states, repeat=3)]


def q_path(path, rate):
    """q(x_1:3 | x_0), forwards."""
    return math.prod(transition(path[t - 1], path[t], t, rate) for t in (1, 2, 3))


def posterior(path, t, rate):
    """q(x_{t-1} | x_t, x_0), by Bayes' rule with a sum for its denominator."""
    states = itertools.product((0, 1), repeat=len(path[0]))
    keep = math.prod(1 - beta for beta in BETAS[: t - 1])
    joint = {x: step(path[0], x, keep, rate) * transition(x, path[t], t, rate) for x in states}
    return joint[path[t - 1]] / sum(joint.values())


def enumerated_bound(table, x_0, rate):
    """-E_q log p(x_0:3) / q(x_1:3 | x_0), a tensor."""
    log_p = log_kernels(table)
    return -sum(
        q_path(path, rate) * (log_model(log_p, path, rate) - math.log(q_path(path, rate))) for path in paths(x_0)
    )


def enumerated_terms(table, x_0, rate):
    """The same by sites: x_3, x_2, x_1, x_0."""
    log_p = log_kernels(table).detach()
    keep = math.prod(1 - beta for beta in BETAS)
    terms = dict.fromkeys(("x_3", "x_2", "x_1", "x_0"), torch.zeros((), dtype=torch.float64))
    for path in paths(x_0):
        weight = q_path(path, rate)
        prior = math.prod(rate if bit else 1 - rate for bit in path[3])
        terms["x_3"] = terms["x_3"] + weight * math.log(step(x_0, path[3], keep, rate) / prior)
        for t in (2, 3):
            log_ratio = math.log(posterior(path, t, rate)) - log_chain(log_p, path, t)
            terms[f"x_{t - 1}"] = terms[f"x_{t - 1}"] + weight * log_ratio
        terms["x_0"] = terms["x_0"] - weight * log_chain(log_p, path, 1)
    return terms


def data(bits):
    return list(itertools.product((0, 1), repeat=bits))


def tensor(x_0, copies=1):
    return torch.tensor(x_0, dtype=torch.float64).expand(copies, len(x_0))


def pairs(diffusion):
    return diffusion, diffusion.one_step(), diffusion.one_step(pyrodiff.LowDiscrepancyDrawing())


@pytest.mark.parametrize(("bits", "rate"), CASES)
def test_the_enumeration_is_consistent(bits, rate):
    table = bit_diffusion(BETAS, rate, bits).reverse
    total = 0.0
    for x_0 in data(bits):
        assert sum(q_path(path, rate) for path in paths(x_0)) == pytest.approx(1)
        log_p = log_likelihood(table, x_0, rate)
        bound = float(enumerated_bound(table, x_0, rate).detach())
        assert bound >= -log_p
        assert float(sum(enumerated_terms(table, x_0, rate).values())) == pytest.approx(bound, abs=1e-12)
        total += math.exp(log_p)
    assert total == pytest.approx(1)


@pytest.mark.parametrize(("bits", "rate"), CASES)
def test_terms_of_the_trajectory_pair_are_the_enumerated_ones(bits, rate):
    diffusion = bit_diffusion(BETAS, rate, bits)
    for x_0 in data(bits):
        terms = pyrodiff.DiffusionELBO().terms(diffusion.model, diffusion.guide, tensor(x_0, 20000))
        expected = enumerated_terms(diffusion.reverse, x_0, rate)
        assert list(terms) == list(expected)
        for name, term in terms.items():
            assert not far(term, expected[name]), name
        torch.testing.assert_close(terms["x_3"], expected["x_3"].expand(20000))
        assert not far(sum(terms.values()), enumerated_bound(diffusion.reverse, x_0, rate))


@pytest.mark.parametrize(("bits", "rate"), CASES)
def test_terms_of_the_one_step_pair_are_the_enumerated_ones(bits, rate):
    diffusion = bit_diffusion(BETAS, rate, bits)
    pair = diffusion.one_step()
    for x_0 in data(bits):
        terms = pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, tensor(x_0, 20000))
        expected = enumerated_terms(diffusion.reverse, x_0, rate)
        torch.testing.assert_close(terms["x_T"], expected["x_3"].expand(20000))
        assert not far(terms["x_s"], expected["x_2"] + expected["x_1"])
        assert not far(terms["x_0"], expected["x_0"])


@pytest.mark.parametrize(("bits", "rate"), CASES)
def test_terms_of_the_bound_are_the_enumerated_ones(bits, rate):
    diffusion = bit_diffusion(BETAS, rate, bits)
    for x_0 in data(bits):
        bound = pyrodiff.bound(diffusion, tensor(x_0, 20000))
        expected = enumerated_terms(diffusion.reverse, x_0, rate)
        torch.testing.assert_close(bound.prior, expected["x_3"].detach().expand(20000))
        assert not far(bound.denoising.T, torch.stack([expected["x_1"], expected["x_2"]]))
        assert not far(bound.reconstruction, expected["x_0"])
        assert not far(bound.nats, enumerated_bound(diffusion.reverse, x_0, rate))


@pytest.mark.parametrize(("bits", "rate"), [(1, 0.5), (2, 0.2)])
@pytest.mark.parametrize("pair", [0, 1, 2])
def test_the_gradient_is_that_of_the_enumerated_bound(bits, rate, pair):
    diffusion = bit_diffusion(BETAS, rate, bits)
    programs = pairs(diffusion)[pair]
    x_0 = torch.tensor(data(bits), dtype=torch.float64).repeat(400, 1)
    expected = gradient(sum(enumerated_bound(diffusion.reverse, x, rate) for x in data(bits)), diffusion)
    elbo = pyrodiff.DiffusionELBO()

    def draw():
        return gradient(elbo.differentiable_loss(programs.model, programs.guide, x_0) / 400, diffusion)

    draws = repeat(25, draw)
    assert float(expected.abs().max()) > 0.1
    assert not far(draws, expected)


@pytest.mark.parametrize(("bits", "rate"), [(1, 0.2), (2, 0.5)])
def test_a_network_as_the_reverse_process_has_the_enumerated_bound(bits, rate):
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(BETAS), rate=rate)
    network = pyrodiff.networks.MLP((bits,), hidden=8).double()
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(network, forward))
    diffusion = pyrodiff.Diffusion(forward, reverse, (bits,))
    programs = pairs(diffusion)
    table = BitTable(3, bits)
    for t, x_t in itertools.product((1, 2, 3), data(bits)):
        odds = network(tensor(x_t), t)[0].detach()
        one = odds.sigmoid()
        for k in range(bits):  # the mixture over what each bit may have been
            keep = math.prod(1 - beta for beta in BETAS[: t - 1])
            q = []
            for x in (0, 1):
                joint = [step((x,), (y,), keep, rate) * transition((y,), (x_t[k],), t, rate) for y in (0, 1)]
                q.append(joint[1] / sum(joint))
            table.logits.data[t, row(x_t), k] = torch.logit(one[k] * q[1] + (1 - one[k]) * q[0])
    for x_0 in data(bits):
        expected = enumerated_bound(table, x_0, rate)
        for pair in programs:
            if pair is diffusion:
                losses = sum(pyrodiff.DiffusionELBO().terms(pair.model, pair.guide, tensor(x_0, 10000)).values())
            else:
                losses = repeat(
                    20, lambda p=pair, x=x_0: pyrodiff.DiffusionELBO().loss(p.model, p.guide, tensor(x, 500)) / 500
                )
            assert not far(losses, expected)


@pytest.mark.parametrize(("bits", "rate"), CASES)
def test_the_importance_weight_is_unbiased_for_the_likelihood(bits, rate):
    diffusion = bit_diffusion(BETAS, rate, bits)
    for x_0 in data(bits):
        x = tensor(x_0, 20000)
        guide_trace = poutine.trace(diffusion.guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(diffusion.model, trace=guide_trace)).get_trace(x)
        log_ratio = 0.0
        for trace, sign in ((model_trace, 1), (guide_trace, -1)):
            trace.compute_log_prob()
            log_ratio = log_ratio + sign * sum(
                site["log_prob"] for name, site in trace.nodes.items() if name.startswith("x_")
            )
        p = math.exp(log_likelihood(diffusion.reverse, x_0, rate))
        assert not far(log_ratio.exp(), p)


@pytest.mark.parametrize(("bits", "rate"), CASES)
def test_the_model_generates_with_the_enumerated_likelihood(bits, rate):
    diffusion = bit_diffusion(BETAS, rate, bits)
    drawn = diffusion.model(num_samples=20000)
    for x_0 in data(bits):
        p = math.exp(log_likelihood(diffusion.reverse, x_0, rate))
        assert not far((drawn == torch.tensor(x_0)).all(-1).double(), p)


def test_other_elbos_agree_with_the_enumeration_where_they_can():
    diffusion = bit_diffusion(BETAS, 0.2, 2)
    x_0 = (1, 0)
    bound = float(enumerated_bound(diffusion.reverse, x_0, 0.2).detach())
    log_p = log_likelihood(diffusion.reverse, x_0, 0.2)
    for pair in pairs(diffusion):
        draws = repeat(20, lambda p=pair: Trace_ELBO().loss(p.model, p.guide, tensor(x_0, 2500)) / 2500)
        assert not far(draws, bound)
    renyi = RenyiELBO(0, 20000, max_plate_nesting=1, vectorize_particles=True)
    weights = repeat(20, lambda: math.exp(-renyi.loss(diffusion.model, diffusion.guide, tensor(x_0))))
    assert not far(weights, math.exp(log_p))
    assert float(-weights.mean().log()) < bound
