"""What tests of the command line share: a call of it, tiny data, tiny runs, and pictures that cost nothing."""

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from pyrodiff import plots
from pyrodiff.command import cli
from pyrodiff.command.runs import Metrics

TINY = {
    **{"train_steps": 6, "hidden": 8, "blocks": 1, "batch_size": 4, "T": 5, "samples": 3, "lr": 0.01},
    **{"evaluate_every": 2, "evaluate_on": 4, "log_every": 2, "checkpoint_every": 2, "average": 0.9},
}
cli._parser = functools.cache(cli._parser)  # which a process needs once, and makes 3 ms long
SAVEFIG, NO_FIGURE = Figure.savefig, Figure()
DRAWN = {name: getattr(plots, name) for name in ("samples", "beside", "histograms", "terms", "curves")}
PIXEL = bytes.fromhex(  # a picture of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe0d"
    "c23a2d0000000049454e44ae426082"
)


class Done(NamedTuple):
    """What a command gave back, and what it printed."""

    code: int
    out: str
    err: str

    def is_refused(self, *words: str) -> bool:
        """Whether it says in one line what cannot be, with these words, and nothing else."""
        assert (self.code, self.out, self.err.count("\n")) == (2, "", 1), self
        assert self.err.startswith("pyrodiff"), self
        assert "error: " in self.err, self
        for word in words:
            assert word in self.err, (word, self)
        return True


def words(**options: Any) -> list[str]:
    """Options as they stand on a line."""
    line = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            line.append(f"{flag}={text}")
    return line


def call(*line: Any) -> Done:
    """The command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in line])
        except SystemExit as left:
            code = left.code
    return Done(code, out.getvalue(), err.getvalue())


def train(data: Any, folder: Path, *more: Any, **options: Any) -> Done:
    """A tiny run."""
    return call("train", data, "--out", folder, *more, *words(**{**TINY, **options}))


def points(size: int = 40) -> np.ndarray:
    """Points of two dimensions, of different scale and mean."""
    return np.random.default_rng(0).normal(size=(size, 2)) * [3.0, 0.5] + [1.0, -2.0]


def saved(path: Path, x: np.ndarray) -> Path:
    """An array in a file."""
    np.save(path, x)
    return path


def blank(self: Figure, file: Any, **options: Any) -> None:
    """In the place of ``Figure.savefig``: a picture at no cost."""
    if hasattr(file, "write"):
        file.write(PIXEL)
    else:
        Path(file).write_bytes(PIXEL)


def without_pictures(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let pictures cost nothing, that nobody looks at: neither their axes are drawn nor their pixels."""
    put(Figure, "savefig", blank)
    for name in DRAWN:
        figure = NO_FIGURE if name in ("beside", "histograms") else SimpleNamespace(figure=NO_FIGURE)
        put(plots, name, lambda *args, figure=figure, **options: figure)


def with_pictures(put: Callable[[Any, str, Any], None]) -> None:
    """Let pictures be drawn again."""
    put(Figure, "savefig", SAVEFIG)
    for name, draw in DRAWN.items():
        put(plots, name, draw)


def files(folder: Path) -> set[str]:
    """All files in a folder, by their paths in it, but for the lock, which says nothing."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def notes(folder: Path) -> list[dict[str, Any]]:
    """The metrics, but for the time it took."""
    return [{name: value for name, value in one.items() if name != "seconds"} for one in Metrics.read(folder)]


@functools.lru_cache(64)
def _read(data: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(data), weights_only=True)


def content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, which is not to be changed: the same bytes are read once."""
    return _read(path.read_bytes())


def states(folder: Path) -> dict[str, Any]:
    """All checkpoints, but for the time it took, when it was saved before, and the options."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("*.pt")):
        state = content(path)
        more = {**state["more"], "state": {**state["more"]["state"], "seconds": None, "saved": None}, "settings": None}
        found[path.name] = {**state, "more": more}
    return found


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nested states are the same to the last bit."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs
