"""The number of threads: the fastest that was measured, fewer where it matters little, and nothing left behind."""

import os
import time

import pyro
import pytest
import torch

import pyrodiff
from pyrodiff.running import threads


@pytest.fixture(autouse=True)
def four(monkeypatch):
    """Four cores, and time that passes as told."""
    state = {"threads": 4, "now": 0.0}
    monkeypatch.setattr(threads, "_physical_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: state.update(threads=number))
    monkeypatch.setattr(time, "perf_counter", lambda: state["now"])
    return state


@pytest.mark.parametrize(
    ("took", "expected"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0}, 4),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({1: 4.0, 2: 1.0, 4: 2.0}, 2),
        ({1: 1.0, 2: 0.95, 4: 0.92}, 1),
        ({1: 0.085, 2: 7.7, 4: 7.7}, 1),
        ({1: 4.0, 2: 2.0, 4: 1.85}, 2),
    ],
)
def test_the_fastest_number_is_found(four, took, expected):
    def work():
        four["now"] += took[four["threads"]]

    assert pyrodiff.fastest_threads(work) == expected
    assert four["threads"] == 4


def test_the_first_time_does_not_count(four):
    """It allocates, and starts threads."""
    seen = []

    def work():
        four["now"] += 0.01 / four["threads"] if four["threads"] in seen else 0.05 * four["threads"]
        seen.append(four["threads"])

    assert pyrodiff.fastest_threads(work) == 4


def test_slow_work_is_done_once(four):
    seen = []

    def work():
        four["now"] += 8 / four["threads"]
        seen.append(four["threads"])

    assert pyrodiff.fastest_threads(work) == 4
    assert seen == [1, 2, 4]


def test_an_error_leaves_the_number_as_it_was(four):
    def work():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        pyrodiff.fastest_threads(work)
    assert four["threads"] == 4


def test_it_leaves_no_trace(four):
    """Neither in the random numbers that follow, nor in Pyro's param store."""

    def work():
        four["now"] += 0.01
        pyro.param("of the work", torch.randn(3))

    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    pyro.clear_param_store()
    pyrodiff.fastest_threads(work)
    assert torch.equal(torch.randn(3), expected)
    assert not list(pyro.get_param_store())


def test_one_thread_is_not_measured(four):
    four["threads"] = 1
    assert pyrodiff.fastest_threads(lambda: 1 / 0) == 1


def test_physical_cores_are_no_more_than_the_cores_there_are(monkeypatch):
    monkeypatch.undo()
    assert 1 <= threads._physical_cores() <= os.cpu_count()
