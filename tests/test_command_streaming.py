"""Data that are read as they are needed: the run is that of the same data held, and is resumed bit for bit."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from commands import TINY, call, notes, points, same, saved, states, train, without_pictures
from PIL import Image

from pyrodiff.base.randomness import kept_sources
from pyrodiff.command import train as training
from pyrodiff.command.data import Rows
from pyrodiff.command.plans import prepare
from pyrodiff.command.runs import Run
from pyrodiff.streaming import ArrayFile
from pyrodiff.training.svi import SVI

CPU = torch.device("cpu")
PICTURES = np.random.default_rng(2).integers(0, 256, (40, 3, 4, 4)).astype(np.uint8)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch.setattr)
    with kept_sources():
        yield


def folder_of(path, pictures):
    for i, one in enumerate(pictures):
        place = path / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.transpose(1, 2, 0)).save(place / f"{i:03d}.png")
    return path


@pytest.mark.parametrize("kind", ["numbers", "levels", "unit", "pictures", "labelled"])
def test_what_is_streamed_is_what_is_held(tmp_path, kind):
    """All but which data are drawn: the parts, the form, how they are encoded, their labels."""
    x = {"numbers": points(), "levels": PICTURES, "unit": PICTURES.astype(np.float32) / 255}.get(kind)
    data = folder_of(tmp_path / "pictures", PICTURES) if x is None else saved(tmp_path / "x.npy", x)
    given = {"data": str(data), **TINY, "labels": kind == "labelled"}
    given |= {"levels": 256} if kind == "unit" else {}
    (plan, held), (again, streamed) = (prepare({**given, "stream": stream}, CPU) for stream in (False, True))
    assert plan.but(stream=True) == again
    assert same(vars(held.form), vars(streamed.form))
    for part in ("train", "validation", "test"):
        for ours, theirs in zip(held.batches(part), streamed.batches(part), strict=True):
            assert same(ours, theirs)
    drawn = streamed.drawn(30, 0, 0, 0)
    rows = {bytes(one.numpy()): k for k, one in enumerate(held.split("train"))}
    x_0, *labels = next(drawn)
    places = [rows[bytes(one.numpy())] for one in x_0]
    assert len(set(places)) > 10
    if labels:
        assert torch.equal(labels[0], torch.cat([y for _, y in held.batches("train")])[places])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_is_resumed_bit_for_bit(tmp_path, monkeypatch, workers):
    """Stopped at step 2, where a worker has read ahead, and resumed, by any number of them, it is one left alone."""
    x, bound = saved(tmp_path / "x.npy", PICTURES), training.bound
    options = {"stream": True, "channels": (8, 8), "augment": "flip", "accumulate": 2}
    assert train(x, tmp_path / "alone", **options).code == 0

    def asked(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return bound(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "bound", asked)
        assert train(x, tmp_path / "run", **options, workers=workers).code == 143
    assert call("train", "--out", tmp_path / "run", "--resume").code == 0
    assert same(states(tmp_path / "run"), states(tmp_path / "alone"))
    assert notes(tmp_path / "run") == notes(tmp_path / "alone")


def test_a_streamed_run_goes_on_with_the_next_batch(tmp_path, monkeypatch):
    x = saved(tmp_path / "x.npy", points())
    _, data = prepare({"data": str(x), **TINY, "stream": True}, CPU)
    drawn = data.drawn(4, 0, 5, 0)
    batches = [next(drawn)[0] for _ in range(6)]
    again = data.drawn(4, 3, 5, 0)
    assert all(torch.equal(next(again)[0], one) for one in batches[3:])
    assert not torch.equal(next(data.drawn(4, 0, 6, 0))[0], batches[0])


def test_the_bound_and_samples_of_a_streamed_run(tmp_path):
    x = saved(tmp_path / "x.npy", points())
    assert train(x, tmp_path / "run", stream=True).code == 0
    assert call("bound", tmp_path / "run", "--split=train").code == 0
    assert call("plot", tmp_path / "run").code == 0
    assert Run.opened(tmp_path / "run").plan.reading.stream


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("npz", {}, ["--stream", ".npy file or a folder"]),
        ("npy", {"labels": True}, ["--stream", "without --labels"]),
        ("npy", {"binarize": "static"}, ["--binarize", "held"]),
        ("npy", {"binarize": "dynamic"}, ["--binarize", "held"]),
        ("digits", {}, ["--stream", "built-in"]),
    ],
)
def test_what_cannot_be_streamed(tmp_path, kind, options, words):
    saved(tmp_path / "x.npy", PICTURES)
    np.savez(tmp_path / "x.npz", x=PICTURES)
    data = "digits" if kind == "digits" else tmp_path / f"x.{kind}"
    assert train(data, tmp_path / "run", stream=True, **options).is_refused(*words)
    assert not (tmp_path / "run").exists()


def test_workers_without_a_stream(tmp_path):
    assert train(saved(tmp_path / "x.npy", points()), tmp_path / "run", workers=2).is_refused("--workers", "--stream")


def spoiled(kind, path):
    """Data that change while they are trained on."""
    if kind == "shorter":
        os.truncate(path, 1000)
    elif kind == "levels":
        rows = np.load(path, mmap_mode="r+")
        rows[:] = 200
        rows.flush()
    else:
        for file in path.rglob("*.png"):
            file.unlink() if kind == "deleted" else file.write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("kind", ["shorter", "levels", "deleted", "broken"])
@pytest.mark.parametrize("when", ["step", "bound"])
def test_data_that_change_meanwhile(tmp_path, monkeypatch, kind, when):
    """They are named as data, in one line, and what was saved before stays."""
    is_file = kind in ("shorter", "levels")
    path = saved(tmp_path / "x.npy", PICTURES % 16) if is_file else folder_of(tmp_path / "pictures", PICTURES)
    levels, place = {"levels": 16} if is_file else {}, training if when == "bound" else SVI
    before, counted = getattr(place, when), iter(range(9))

    def spoiling(*args, **kwargs):
        if next(counted) == 1:
            spoiled(kind, path)
        return before(*args, **kwargs)

    monkeypatch.setattr(place, when, spoiling)
    done = train(path, tmp_path / "run", stream=True, channels=(8, 8), **levels)
    assert (done.code, "Traceback" in done.err) == (2, False), done
    assert done.err.splitlines()[-1].startswith("pyrodiff: error: data must"), done
    saved_before = sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved_before == (["best.pt", "step-00000002.pt"] if when == "bound" else [])


def test_a_process_that_reads_is_killed(tmp_path, monkeypatch):
    """One line tells of it, and the run can be resumed; what is sent to the group of the one that trains is its own."""
    x, step, counted, groups = saved(tmp_path / "x.npy", PICTURES), SVI.step, iter(range(99)), []

    def killed(*args, **kwargs):
        if next(counted) == 2:
            for child in multiprocessing.active_children():
                groups.append(os.getpgid(child.pid))
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SVI, "step", killed)
        done = train(x, tmp_path / "run", stream=True, workers=2, channels=(8, 8))
    assert (done.code, done.err.splitlines()[-1][:42]) == (1, "pyrodiff: a process that reads batches was"), done
    assert len(set(groups)) == 2
    assert os.getpgid(0) not in groups
    assert call("train", "--out", tmp_path / "run", "--resume").code == 0


def test_rows_are_like_a_tensor(tmp_path):
    for x in (points(), np.arange(7.0)):
        rows = Rows(ArrayFile(saved(tmp_path / "x.npy", x)))
        held = torch.from_numpy(x).reshape(len(x), -1)
        assert (rows.dtype, rows.shape, len(rows)) == (held.dtype, held.shape, len(held))
        i = torch.tensor([3, 0, 3])
        assert torch.equal(rows[i], held[i])
