"""The benchmark runs, and prints the lines that are read off it. What it measures is not tested."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed.py"


def run(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for one another are slow beside others
    command = [sys.executable, "-W", "error", str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_quick_run_prints_every_section_and_every_target():
    done = run("--quick", "--only", "mlp")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cpu: ")
    assert "1 threads; pyrodiff" in lines[0]
    assert [line[0] for line in lines if line[1:3] == ". "] == list("ABCDE")
    for name in ("bare network", "hand-written", "pyrodiff.SVI", "pyro.infer.SVI", "pyrodiff.bound", "the Pyro model"):
        measured = [line for line in lines if line.startswith(f"  {name} ") and " ms +-" in line]
        assert measured, name
        assert all(float(line.split(" ms ")[0].split()[-1]) > 0 for line in measured)
    at = next(number for number, line in enumerate(lines) if line.startswith("Targets"))
    targets = lines[at + 1 :]
    assert len(targets) == 5
    assert [("(<= " in line, line.endswith(" -")) for line in targets] == [
        (measured, not measured) for measured in (True, False, False, True, True)
    ]


def test_a_number_of_rounds_below_one_is_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--rounds", "0"])
    for name in ("cases", "measure"):  # the tests have modules of their own, that are put back
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--rounds must be at least 1" in capsys.readouterr().err
