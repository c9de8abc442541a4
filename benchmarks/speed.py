"""What everything costs beside the bare network and a loop written by hand, and whether that is within the targets.

Run with ``python benchmarks/speed.py``; about eight minutes on two cores, most of it compiling. All calls of a section
that concern one network are timed in turn in one process, and each figure is the median of its rounds. The bare network
is called on states and times at hand; the loop by hand draws t and noise, and minimises the squared error of the noise.
"""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyro
import torch
from cases import (
    Case,
    bare_step,
    bound_calls,
    cases,
    diffusers_loop,
    hand_written,
    one_step,
    samplers,
    trajectory,
    vanilla_one_step,
    vanilla_trajectory,
)
from measure import Clock, Timed, Used, memory_above_rest, table

import pyrodiff

Results = Mapping[str, Mapping[str, Timed | Used]]
HAND, COMPILED_HAND = "hand-written", "hand-written, network compiled"
EAGER, COMPILED = "pyrodiff.SVI", "pyrodiff.SVI, compiled"
BARE, PYRO = "bare network", "pyro.infer.SVI"
NEEDED = {"D": "mlp", "E": "mlp", "F": "unet"}  # sections that are about one network
MEMORY: dict[str, Callable[[Case], Callable[[], object]]] = {
    HAND: hand_written,
    COMPILED_HAND: lambda case: hand_written(case, compile=True),
    EAGER: one_step,
    COMPILED: lambda case: one_step(case, compile=True),
}


@dataclass(frozen=True)
class Target:
    """A ratio that is to be kept: of a section's call to another, with what it is at most.

    Arguments:
        title: What it is.
        section: The letter of the section.
        call, reference: The names of the two calls.
        most: For the MLP, the U-Net on a CPU and the U-Net on a GPU.
        beside: A call whose ratio is shown beside, without a target.
    """

    title: str
    section: str
    call: str
    reference: str
    most: tuple[float, float, float]
    beside: str | None = None

    def cell(self, results: Mapping[str, Results], network: str, case: Case) -> str:
        """The ratio of a network, and the target."""
        calls = results.get(self.section, {}).get(case.title, {})
        if self.call not in calls:
            return "-"
        ratio, most = calls[self.call].value / calls[self.reference].value, self._most(network, case.device)
        text = f"{ratio:.3f}" if most is None else f"{ratio:.3f} (<= {most:g})"
        if self.beside in calls:
            text += f", compiled {calls[self.beside].value / calls[self.reference].value:.3f}"
        return text

    def _most(self, network: str, device: torch.device) -> float | None:
        index = {"mlp": 0, "unet": 2 if device.type == "cuda" else 1}.get(network)
        return None if index is None else self.most[index]


TARGETS = (
    Target("SVI step, eager / hand-written eager loop", "A", EAGER, HAND, (1.8, 1.02, 1.05)),
    Target("SVI step, compiled / hand-written eager loop", "A", COMPILED, HAND, (1.0, 0.92, 0.8)),
    Target(
        "SVI step, compiled / hand-written loop on a torch.compile'd network",
        *("A", COMPILED, COMPILED_HAND, (1.15, 1.02, 1.0)),
    ),
    Target(
        "all-T bound / bare network, same calls",
        *("B", "pyrodiff.bound", BARE, (1.1, 1.02, 1.02), "pyrodiff.bound, compiled"),
    ),
    Target(
        "ancestral sampling, T = 1000 / bare network calls",
        *("C", "AncestralSampler", BARE, (1.3, 1.02, 1.05), "AncestralSampler, compiled"),
    ),
)


class Benchmark:
    """The sections, each of which prints its lines as soon as it has them.

    Arguments:
        found: The networks, by name.
        clock: What times them.
        quick: Whether as little as possible is measured, and nothing compiled.
        extra: Other libraries to compare with.
    """

    def __init__(self, found: dict[str, Case], clock: Clock, quick: bool, extra: list[str]) -> None:
        self.cases, self.clock, self.quick, self.compile, self.extra = found, clock, quick, not quick, extra
        self.results: dict[str, Results] = {}

    def run(self, sections: str) -> None:
        """Measure and print these sections, and the targets."""
        sections_by_letter = {
            "A": ("a training step", self._training),
            "B": ("the bound, all terms", self._bounds),
            "C": ("ancestral sampling", self._samples),
            "D": ("a training step of the trajectory pair", self._trajectories),
            "E": ("how a training step of the one-step pair grows", self._growth),
            "F": ("peak memory of a training step, above what lies between two", self._memory),
        }
        for letter, (title, measure) in sections_by_letter.items():
            if letter not in sections or NEEDED.get(letter, letter) not in (*self.cases, letter):
                continue
            start = time.perf_counter()
            self.results[letter] = measure()
            lines = table(self.results[letter], (HAND, COMPILED_HAND) if letter == "A" else ())
            print(f"\n{letter}. {title} ({time.perf_counter() - start:.0f} s)\n{lines}", flush=True)
        self._targets()

    def _training(self) -> Results:
        found = {}
        for case in self.cases.values():
            calls = {BARE: bare_step(case), HAND: hand_written(case), EAGER: one_step(case)}
            if self.compile:
                calls[COMPILED_HAND], calls[COMPILED] = hand_written(case, compile=True), one_step(case, compile=True)
            calls[PYRO] = vanilla_one_step(case)
            if "diffusers" in self.extra:
                calls["diffusers' loop"] = diffusers_loop(case)
            found[case.title] = self.clock.compare(calls)
        return found

    def _bounds(self) -> Results:
        found = list(self.cases.values())
        if "digits" in self.cases:
            digits = self.cases["digits"]
            found.append(replace(digits, title=f"{digits.title}, 17 levels", levels=17))
        return {case.title: self.clock.compare(bound_calls(case, self.compile)) for case in found}

    def _samples(self) -> Results:
        return {case.title: self.clock.compare(samplers(case, self.compile)) for case in self.cases.values()}

    def _trajectories(self) -> Results:
        """For T = 10 and 100, and 1000 where it is compiled."""
        found = {}
        for num_steps in (10,) if self.quick else (10, 100, 1000):
            case = replace(self.cases["mlp"], num_steps=num_steps)
            calls = {BARE: bare_step(case, calls=num_steps)}
            if num_steps < 1000:
                calls[EAGER] = trajectory(case)
            else:
                calls[COMPILED] = trajectory(case, compile=True)
            if num_steps == 10:
                calls[PYRO] = vanilla_trajectory(case)
            found[f"{case.title}, T = {num_steps}"] = self.clock.compare(calls)
        return found

    def _growth(self) -> Results:
        """With T, the batch and the dimension, one at a time, all timed in turn."""
        base, few = self.cases["mlp"], 2 if self.quick else 3
        kinds = {
            "number of steps": {f"T = {T}": replace(base, num_steps=T) for T in (10, 100, 1000)[:few]},
            "batch": {f"B = {B}": replace(base, batch=B) for B in (32, 128, 512)[:few]},
            "dimension": {f"D = {D}": replace(base, shape=(D,)) for D in (2, 64, 1024)[:few]},
        }
        ways = {BARE: bare_step, EAGER: one_step}
        if self.compile:
            ways[COMPILED] = lambda case: one_step(case, compile=True)
        distinct = dict.fromkeys(case for group in kinds.values() for case in group.values())
        timed = self.clock.compare({(case, way): ways[way](case) for case in distinct for way in ways})
        return {
            f"{way}, {base.title}, with the {kind}": {name: timed[case, way] for name, case in group.items()}
            for kind, group in kinds.items()
            for way in ways
        }

    def _memory(self) -> Results:
        ways = [name for name in MEMORY if self.compile or name in (HAND, EAGER)]
        case = self.cases["unet"]
        return {case.title: {name: Used(_memory_of(name, case, self.quick)) for name in ways}}

    def _targets(self) -> None:
        titles = [case.title for case in self.cases.values()]
        print(f"\nTargets, at most{'':54}" + "".join(f"{title:32}" for title in titles).rstrip())
        for target in TARGETS:
            cells = (target.cell(self.results, name, case) for name, case in self.cases.items())
            print(f"{target.title:70}" + "".join(f"{cell:32}" for cell in cells).rstrip())


def _memory_of(name: str, case: Case, quick: bool) -> int:
    """What a training step takes, in a process of its own."""
    options = ["--memory", name, "--device", case.device.type, *(["--quick"] if quick else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # so that glibc hands back what is freed
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {name!r} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _head(device: torch.device) -> str:
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        where = models[0] if models else platform.processor() or platform.machine()
    versions = f"pyrodiff {pyrodiff.__version__}, torch {torch.__version__}, pyro {pyro.__version__}"
    return f"{device.type}: {where}, {torch.get_num_threads()} threads; {versions}, Python {platform.python_version()}"


def _quiet() -> None:
    """Silence what torch says of itself; and never pass for compiled what was not."""
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch\b")
    warnings.filterwarnings("error", message=".*without being compiled")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--rounds", type=int, help="rounds of each that count (default: 15; quick: 2)")
    parser.add_argument("--only", nargs="+", choices=("mlp", "digits", "unet"), help="these networks (default: all)")
    parser.add_argument("--sections", default="ABCDEF", help="the letters of these sections (default: ABCDEF)")
    parser.add_argument("--extra", nargs="+", choices=("diffusers",), default=[], help="other libraries beside")
    parser.add_argument("--quick", action="store_true", help="as little as possible, nothing compiled: a smoke test")
    parser.add_argument("--memory", choices=tuple(MEMORY), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for library in arguments.extra:
        if importlib.util.find_spec(library) is None:
            parser.error(f"--extra {library}: it is not installed; pip install -e .[bench]")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, but it is {arguments.rounds}")
    return arguments


def main() -> None:
    arguments = _arguments()
    _quiet()
    pyro.set_rng_seed(0)
    device, quick = torch.device(arguments.device), arguments.quick
    found = cases(device, quick)
    if arguments.memory is not None:
        print(memory_above_rest(MEMORY[arguments.memory](found["unet"]), device))
        return
    rounds = arguments.rounds or (2 if quick else 15)
    found = {name: case for name, case in found.items() if arguments.only is None or name in arguments.only}
    print(f"{_head(device)}\nmedians of {rounds} rounds in turn, +- half the interquartile range")
    print("\n".join(map(str, found.values())), flush=True)
    clock = Clock(device, rounds, floor=0.002 if quick else 0.02)
    Benchmark(found, clock, quick, arguments.extra).run(arguments.sections)


if __name__ == "__main__":
    main()
