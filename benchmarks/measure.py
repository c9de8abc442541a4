"""How things are measured: several calls in turn, the memory of one, and the lines that are printed of both."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyro
import torch

__all__ = ["Clock", "Timed", "Used", "memory_above_rest", "table"]

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


class Timed(NamedTuple):
    """What a call takes: the median of the rounds in seconds, and half their interquartile range over it."""

    value: float
    spread: float

    def __str__(self) -> str:
        return f"{1e3 * self.value:10.3f} ms +-{100 * self.spread:3.0f} %"


class Used(NamedTuple):
    """What a call needs, in bytes."""

    value: int

    def __str__(self) -> str:
        return f"{self.value / 2**20:10.1f} MiB{'':7}"


class Clock:
    """Times calls in turn, round by round, so that what else the machine does falls on all of them alike.

    Each call has a parameter store of Pyro's of its own, as it would in a process of its own. Before the rounds that
    count, each is called a few times, so that what compiles has compiled, and there is a round of warm-up.

    Arguments:
        device: Where the calls compute; the clock waits for it.
        rounds: How many rounds count.
        floor: What a call's turn in a round takes at least, in seconds: a fast one is repeated.
    """

    def __init__(self, device: torch.device, rounds: int, floor: float = 0.02) -> None:
        self.device, self.rounds, self.floor = device, rounds, floor

    def compare(self, calls: Mapping[Name, Call]) -> dict[Name, Timed]:
        """What each call takes, by name."""
        stores = {name: {"params": {}, "constraints": {}} for name in calls}
        taken: dict[Name, list[float]] = {name: [] for name in calls}

        def turn(name: Name, repeats: int) -> float:
            with pyro.get_param_store().scope(stores[name]):
                return self._time(calls[name], repeats)

        repeats = {}
        for name in calls:
            turn(name, 2)
            seconds = turn(name, 1)
            if seconds < 10 * self.floor:  # it may have waited for something else, or still have had to warm up
                seconds = min(turn(name, 1) for _ in range(5))
            repeats[name] = max(1, math.ceil(self.floor / seconds))
        order, shuffle = list(calls), random.Random(0).shuffle
        gc.collect()
        for round_ in range(self.rounds + 1):
            shuffle(order)
            for name in order:
                seconds = turn(name, repeats[name])
                if round_ > 0:
                    taken[name].append(seconds)
        return {name: _summary(seconds) for name, seconds in taken.items()}

    def _time(self, call: Call, repeats: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        return (time.perf_counter() - start) / repeats

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _summary(seconds: Sequence[float]) -> Timed:
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return Timed(median, math.nan)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Timed(median, (high - low) / 2 / median)


def memory_above_rest(call: Call, device: torch.device, warm_up: int = 3, repeats: int = 5) -> int:
    """The peak memory of a call that has been warmed up, above what is held between two calls, in bytes.

    On a CPU it is the resident memory of the process, which should be one of its own.

    Raises:
        OSError: On a CPU, where the system does not let that peak be reset: only Linux does.
    """
    for _ in range(warm_up):
        call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest, peak = torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device)
    else:
        rest, peak = _reset_peak(), lambda: _status("VmHWM")
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return peak() - rest


def _reset_peak() -> int:
    """The resident memory in bytes, which is the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def table(groups: Mapping[str, Mapping[str, Timed | Used]], references: Sequence[str] = ()) -> str:
    """The lines of a section: for each group its calls, and how many times as much as each of the references it takes.

    Without references, it is as much as the first of the group.
    """
    width = max(len(name) for calls in groups.values() for name in calls) + 2
    firsts = {next(iter(calls)) for calls in groups.values()}
    own = firsts.pop() if len(firsts) == 1 else "the first"
    columns = {name: len(name) + 5 for name in references or (own,)}
    lines = [" " * (width + 22) + "".join(f"{'/ ' + name:>{size}}" for name, size in columns.items())]
    for title, calls in groups.items():
        lines.append(title)
        known = calls if references else {own: next(iter(calls.values()))}
        for call, figure in calls.items():
            ratios = "".join(
                f"{figure.value / known[name].value:{size}.3f}" if name in known else f"{'-':>{size}}"
                for name, size in columns.items()
            )
            lines.append(f"  {call:{width}}{figure}{ratios}")
    return "\n".join(lines)
