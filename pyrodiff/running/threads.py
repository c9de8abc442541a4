"""How many threads to compute with: more are not always faster, and on a busy machine can be far slower."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pyro
import torch

from ..base import arguments
from ..base.arguments import ArgumentError

__all__ = ["fastest_threads"]


def _physical_cores() -> int:
    """The number of physical cores that this process may use: two hyperthreads of one core count once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    places = [Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in usable]
    try:
        return len({place.read_text() for place in places})
    except OSError:  # another system than Linux
        return len(usable)


def fastest_threads(work: Callable[[], object], seconds: float = 1.0) -> int:
    """The number of threads with which a piece of work is fastest, measured now: 1, 2, 4, ... up to the physical cores.

    More threads are chosen only if a tenth faster: threads wait for each other, which costs most if the machine becomes
    busy later. Never more are tried than torch would use by itself, so ``OMP_NUM_THREADS`` stays a ceiling. The state
    of torch's CPU generator and Pyro's param store are restored afterwards.

    Arguments:
        work: The function to time, such as a step on one batch. It is called a few times per number, once if slow.
        seconds: How long to measure in total.

    Returns:
        The number, to be given to ``torch.set_num_threads``; the current setting is not changed.

    Raises:
        ArgumentError: If ``work`` cannot be called, or ``seconds`` is not positive.

    Example:
        >>> x = torch.randn(64, 64)
        >>> pyrodiff.fastest_threads(lambda: x @ x, seconds=0.01) <= torch.get_num_threads()
        True
    """
    if not callable(work):
        raise ArgumentError("work", f"must be a function, but it is {arguments.described(work)}")
    arguments.number("seconds", seconds, 0, float("inf"))
    before = torch.get_num_threads()
    most = min(before, _physical_cores())
    numbers = [2**n for n in range(most.bit_length()) if 2**n < most] + [most]
    if len(numbers) == 1:
        return numbers[0]
    best, fastest = 1, float("inf")
    try:
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            for number in numbers:
                torch.set_num_threads(number)
                took = _time(work, seconds / len(numbers))
                if took < 0.9 * fastest:
                    best, fastest = number, took
    finally:
        torch.set_num_threads(before)
    return best


def _time(work: Callable[[], object], seconds: float) -> float:
    """The median time of the work over so many seconds, without the first time, which allocates and starts threads.

    The work is repeated at least three times; if the first takes longer than the seconds, its time is the result.
    """
    first = _once(work)
    if first > seconds:
        return first
    took: list[float] = []
    while len(took) < 3 or sum(took) < seconds:
        took.append(_once(work))
    return median(took)


def _once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
