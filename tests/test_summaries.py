"""The mean of a likelihood and its standard error: numbers, that can be called with other values."""

import copy
import math
import pickle

import pytest
import torch
from models import Network

import pyrodiff
from pyrodiff import Bound

T, D = 4, 2


def gaussian():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.1, 0.5))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(Network(), forward))
    return pyrodiff.Diffusion(forward, reverse, (D,))


X = torch.tensor([[0.3, -1.2], [1.1, 0.4], [-0.8, 0.9], [0.2, 1.7]])


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
