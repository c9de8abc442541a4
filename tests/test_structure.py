"""The shape of the package: who imports whom, what an import changes, what the docstrings say."""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pyrodiff

FOLDER = Path(pyrodiff.__file__).parent
DRAWING = re.search(
    r"```text\npyrodiff/[^\n]*\n(.*?)```", (FOLDER.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
)[1]
HOUSE = [line.split() for line in DRAWING.splitlines()]
ROOMS = {line[0].rstrip("/"): line[1:] for line in HOUSE if line[0].endswith("/")}  # in their order, as they are drawn
FILES = [name for line in HOUSE if not line[0].endswith("/") for name in line]  # modules in no room
ORDER = [
    f"{line[0].rstrip('/')}.{name}" if line[0].endswith("/") else name
    for line in HOUSE
    for name in line[line[0].endswith("/") :]
]
INSIDE = {  # what modules share, and the package does not offer
    "Estimate",
    "LinearGaussian",
    "Partly",
    "Tabulated",
    "Updated",
    "conditioning",
    "broadcasts",
    "cholesky",
    "effective_size",
    "is_pyros_step",
    "refuse_callers",
    "refuse_in_guide",
    "log_mean",
    "needs_resampling",
    "log_normal",
    "resampled",
    "systematic",
    "Batch",
    "Captures",
    "Drawn",
    "Flow",
    "Generative",
    "Solution",
    "check_flow",
    "check_law",
    "costs_dtype",
    "drawn",
    "evenly_spaced",
    "guided",
    "name_in_store",
    "OneStepGuide",
    "Programs",
    "OneStepModel",
    "Step",
    "TrajectoryGuide",
    "TrajectoryModel",
    "Compiled",
    "Composition",
    "Gradient",
    "Graph",
    "Recorder",
    "Replayed",
    "agree",
    "all_say",
    "agreed",
    "as_written",
    "batches",
    "bytes_per_row",
    "captured",
    "clip",
    "coefficients",
    "copied_source",
    "count",
    "default_home",
    "each",
    "evaluating",
    "evaluation_mode",
    "expect",
    "float64",
    "Float64Module",
    "forked",
    "generator_of",
    "holds_float64",
    "home",
    "innermost",
    "is_listened_to",
    "is_sharded",
    "kept_sources",
    "kind_of",
    "dry_run",
    "DryRun",
    "validated",
    "warn_of_tails",
    "number",
    "number_of_values",
    "pair_costs",
    "pareto_words",
    "path_of",
    "plainly",
    "precisely",
    "printable",
    "prior_cost",
    "progress_bar",
    "put_sources",
    "refuse_a_cut_graph",
    "relative_entropy",
    "rounded",
    "runs",
    "seed_draws",
    "seeded",
    "seed_of",
    "set_apart",
    "shard_again",
    "solve",
    "sources",
    "step_costs",
    "together",
    "total_norm",
    "write",
}
OFFERED_WHOLE = {"checkpoints", "datasets", "plots", "readers", "scores", "streaming"}  # as modules, as ``networks`` is
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.stem not in ("__init__", "__main__", "api")  # which only say what is offered, or run the command
)
every_module = pytest.mark.parametrize("module", MODULES)


def file_of(module):
    return FOLDER.joinpath(*module.split(".")).with_suffix(".py")


def tree(module):
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def imported(module):
    """The package's modules that a module imports, anywhere in it."""
    room, names = module.split(".")[:-1], set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*room, *(node.module or "").split(".")] if node.level == 1 else (node.module or "").split(".")
            path = ".".join(part for part in start if part)
            inside = [f"{path}.{alias.name}".strip(".") for alias in node.names if alias.name != "__version__"]
            names |= {name if name in MODULES else path or name for name in inside}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pyrodiff":
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pyrodiff"}
    return names


def room_of(module):
    """The room that a module, or all that a room offers, belongs to; of a module in no room, itself."""
    return module.split(".")[0]


def public(module):
    """(name, object) of what a module says is public."""
    module = importlib.import_module(f"pyrodiff.{module}")
    return [(name, getattr(module, name)) for name in getattr(module, "__all__", [])]


def own_methods(cls):
    """(name, function) of the public methods that the package defines for a class."""
    for name, value in vars(cls).items():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(value, types.FunctionType) and not name.startswith("_"):
            yield name, value


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def constructor(cls):
    """The __init__ that a class of the package has of its own, if any."""
    return vars(cls).get("__init__")


def test_every_module_stands_in_the_drawing():
    assert sorted(ORDER) == MODULES
    assert len(HOUSE) <= 12
    assert all(
        (FOLDER / room / "__init__.py").read_text(encoding="utf-8").startswith(('"""', 'r"""')) for room in ROOMS
    )


@every_module
def test_each_module_imports_only_from_what_is_drawn_before_it(module):
    before = set(ORDER[: ORDER.index(module)]) | ({"networks"} if room_of(module) == "command" else set())
    assert imported(module) <= before
    if room_of(module) == "networks":  # which know nothing of probability
        assert {room_of(name) for name in imported(module)} <= {"base", "networks"}
    elif room_of(module) != "command":
        assert "networks" not in {room_of(name) for name in imported(module)}


def longest(arrows):
    """The longest chain of imports, as the list of what it passes through."""

    @functools.cache
    def chain(start):
        return max(([start, *chain(end)] for end in arrows.get(start, ())), key=len, default=[start])

    return max(map(chain, arrows), key=len)


def test_chains_of_imports_between_rooms_are_short():
    arrows = {}
    for module in MODULES:
        arrows.setdefault(room_of(module), set()).update(map(room_of, imported(module)))
    arrows = {room: ends - {room} for room, ends in arrows.items()}
    assert len(longest(arrows)) <= 9


@every_module
def test_nothing_private_of_another_module_is_imported(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert not [
                alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
            ]


def test_what_the_modules_say_is_public_is_what_the_package_offers():
    offered = {name for name in pyrodiff.__all__ if not isinstance(getattr(pyrodiff, name), types.ModuleType)}
    for module in ORDER:
        if module not in OFFERED_WHOLE and room_of(module) not in ("networks", "command"):
            names = {name for name, value in public(module)}
            assert names - offered <= INSIDE, module
            offered -= names
    assert not offered
    assert pyrodiff.__all__ == sorted(pyrodiff.__all__)


IMPORT = """
import json, logging, os, random, sys, warnings
import pyrodiff
assert not {"torch", "pyrodiff.api"} & sys.modules.keys()
import numpy, pyro, torch
import torch.distributions

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro settings": repr(sorted(pyro.settings.get().items())),
        "parameters": sorted(pyro.get_param_store().keys()),
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state()),
        "python random state": repr(random.getstate()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "environment": dict(os.environ),
        "log handlers": repr(logging.getLogger().handlers),
    }

pyro.enable_validation(True)
torch.distributions.Distribution.set_default_validate_args(False)  # another value than Pyro's: setting both shows
before = state()
try:
    sys.exit(f"{pyrodiff.nothing} is there")
except AttributeError as error:
    assert str(error) == "module 'pyrodiff' has no attribute 'nothing'"
assert "pyrodiff.api" in sys.modules  # all comes, and torch with it, with the first name that is asked for
assert "SVI" in dir(pyrodiff)
from pyrodiff import *
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def test_importing_the_package_changes_nothing_global():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, cwd=FOLDER.parent
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [], done.stdout


@every_module
def test_every_module_opens_with_a_docstring_and_says_what_is_public(module):
    assert ast.get_docstring(tree(module))
    assert all(hasattr(importlib.import_module(f"pyrodiff.{module}"), name) for name, _ in public(module))
    assert public(module) or module == "base.checks"


@every_module
def test_sources_hold_no_control_characters(module):
    """A backslash lost on the way turns the LaTeX of a docstring into tabs, bells and backspaces."""
    text = file_of(module).read_bytes().decode()
    assert not sorted({character for character in text if ord(character) < 32 and character != "\n"})
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            assert not {character for character in docstring if ord(character) < 32 and character != "\n"}, node


@every_module
def test_every_public_docstring_names_its_arguments(module):
    for name, value in public(module):
        docstring = inspect.getdoc(value)
        assert docstring, name
        function = constructor(value) if inspect.isclass(value) else value
        if function is None or not arguments(function) or ": see :" in docstring:
            continue
        assert "Arguments" in docstring, f"{name} takes arguments, but its docstring has no such section"
        if "errors: see" not in docstring:
            section = docstring.split("Arguments:")[1]
            assert not [argument for argument in arguments(function) if argument not in section], name


@every_module
def test_what_raises_a_value_error_says_so(module):
    for name, value in public(module):
        function = constructor(value) if inspect.isclass(value) else value
        if function is None or dataclasses.is_dataclass(value) or ": see :" in inspect.getdoc(value):
            continue
        if "raise ValueError" in inspect.getsource(function):
            assert "rror" in inspect.getdoc(value), f"{name} raises, but its docstring does not say when"


@every_module
def test_every_public_method_has_a_docstring_of_its_own_or_of_its_base(module):
    for name, value in public(module):
        if inspect.isclass(value):
            missing = [method for method, _ in own_methods(value) if not inspect.getdoc(getattr(value, method))]
            assert not missing, f"{name}: {missing}"


@every_module
def test_every_example_stands_in_a_section_of_that_name(module):
    """Where a docstring holds an example, it stands in a section of that name, so that it runs as a doctest."""
    for name, value in public(module):
        docstring = inspect.getdoc(value)
        assert (">>>" in docstring) == ("Example:" in docstring), name


@every_module
def test_no_function_body_is_over_forty_lines(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name} has {lines} lines"


def test_the_tests_that_the_docs_name_are_there():
    text = (FOLDER.parent / "docs" / "equations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"tests/(\w+\.py)::(\w+)", text))
    assert len(named) > 50
    for file, name in sorted(named):
        assert f"def {name}(" in (FOLDER.parent / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_the_files_that_the_way_in_names_are_there():
    root = FOLDER.parent
    for page in ("CONTRIBUTING.md", "README.md"):
        named = set(re.findall(r"`([\w/]+\.(?:py|md))`", (root / page).read_text(encoding="utf-8")))
        assert named, page
        for file in sorted(named):
            assert (root / file).is_file() or (FOLDER / file).is_file(), f"{page} names {file}"
