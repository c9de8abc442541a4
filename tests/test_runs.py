"""A run that is killed, stopped, or out of disk goes on as if nothing had happened; and what is watched is true."""

import copy
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import types
from typing import ClassVar

import numpy as np
import parted
import pytest
import torch
from commands import call, content, files, notes, points, same, saved, states, train, without_pictures, words

import pyrodiff
from pyrodiff import checkpoints
from pyrodiff.base.randomness import kept_sources
from pyrodiff.command import cli, options, runs
from pyrodiff.command import train as training
from pyrodiff.command.data import Data
from pyrodiff.command.plans import prepare
from pyrodiff.command.runs import Metrics, Run
from pyrodiff.command.stopping import Stop
from pyrodiff.command.train import Trainer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch.setattr)
    with kept_sources():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, and a run of them that is left alone."""
    home = tmp_path_factory.mktemp("home")
    saved(home / "x.npy", points())
    with pytest.MonkeyPatch.context() as patch, kept_sources():
        without_pictures(patch.setattr)
        assert train(home / "x.npy", home / "alone").code == 0
    return home


@pytest.fixture(scope="module")
def context():
    return parted.context()


def resumed(folder, *more, **options):
    return call("train", "--out", folder, "--resume", *more, *words(**options))


def is_as_alone(folder, alone, but=()):
    """Whether a run came out as the one that was left alone."""
    assert same(states(folder), states(alone))
    assert notes(folder) == notes(alone)
    for name in ("bound.npz", "samples.npz"):
        with np.load(folder / name) as ours, np.load(alone / name) as theirs:
            assert ours.files == theirs.files
            assert all(np.array_equal(ours[name], theirs[name], equal_nan=False) for name in ours.files)
    assert files(folder) - set(but) == files(alone)
    return True


# Kills

KILLED = {
    "train_steps": 100,
    "checkpoint_every": 1,
    "evaluate_every": 24,
    "log_every": 3,
    "evaluate_times": 4,
    "keep": 3,
}
KILLED = {**KILLED, "drawing": "loss-second-moment", "dropout": 0.2}


def mortal(line, delay, write):
    """A run that is killed so many steps and seconds after training began, or in the middle of its so many-th write."""
    torch.set_num_threads(1)
    without_pictures()
    sys.stderr = sys.stdout = open(os.devnull, "w")
    begin, sync, counted = Trainer.train, os.fsync, iter(range(10**9))

    def die(svi, until):
        while svi.num_steps < until:
            time.sleep(0.001)
        time.sleep(delay[1])
        os.kill(os.getpid(), signal.SIGKILL)

    def training(self):
        if delay is not None:
            until = self.run.svi.num_steps + delay[0]
            threading.Thread(target=die, args=(self.run.svi, until), daemon=True).start()
        begin(self)

    def syncing(descriptor):
        if next(counted) == write:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):  # and no folder
                os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    Trainer.train, os.fsync = training, syncing
    sys.exit(cli.main(line))


def lived(context, line, delay=None, write=None):
    process = context.Process(target=mortal, args=(line, delay, write))
    process.start()
    process.join(60)
    return process.exitcode


def test_a_run_that_is_killed_again_and_again_is_the_one_left_alone(home, tmp_path, context):
    folder, alone, moments = tmp_path / "killed", tmp_path / "alone", random.Random(0)
    line = ["train", str(home / "x.npy"), *words(**{"hidden": 8, "blocks": 1, "batch_size": 4, "T": 5})]
    line += words(**KILLED, samples=3, evaluate_on=4)
    assert lived(context, [*line, "--out", str(alone)]) == 0
    found, parts = [], 0
    for number in range(26):
        by_time = number % 4 != 3  # 20 at a random moment, 6 in the middle of a write
        when = (
            {"delay": (moments.randrange(4), moments.uniform(0, 0.01))}
            if by_time
            else {"write": moments.randrange(4, 12)}
        )
        code = lived(context, [*line, "--out", str(folder), "--resume"], **when)
        last = runs.last_checkpoint(folder)
        found.append((code, 0 if last is None else int(last.stem[5:])))
        parts += any(path.suffix == ".part" for path in folder.rglob(".*.part"))
        for path in (folder / "checkpoints").glob("*.pt"):
            assert checkpoints.load(path)["format"] == 1
        if (folder / "settings.toml").is_file():
            assert (folder / "settings.toml").read_text() == (alone / "settings.toml").read_text()
        steps = [record["step"] for record in Metrics.read(folder)]
        assert steps == sorted(steps)
        if code == 0:
            break
    during = {step for code, step in found if code == -signal.SIGKILL and 0 < step < KILLED["train_steps"]}
    assert len(during) >= 5, found
    assert sum(code == -signal.SIGKILL for code, _ in found) >= 20, found
    assert parts >= 2
    assert lived(context, [*line, "--out", str(folder), "--resume"]) == 0
    assert is_as_alone(folder, alone)


# Signals


def asked_at(monkeypatch, step, number):
    """Let a signal come in the middle of a step."""
    draw, counted = Data.draw, iter(range(1, 10**9))

    def drawing(self, size):
        if next(counted) == step:
            signal.raise_signal(number)
        return draw(self, size)

    monkeypatch.setattr(Data, "draw", drawing)


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 6)],
)
def test_a_signal_saves_the_step_and_leaves(home, tmp_path, monkeypatch, number, code, step):
    folder, handlers = tmp_path / "a run", [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        asked_at(patch, step, number)
        done = train(home / "x.npy", folder)
    assert done.code == code
    last = done.err.splitlines()[-1]
    assert f"{signal.Signals(number).name} at step {step}" in last
    assert "--resume" in last
    assert str(folder) in last
    assert runs.last_checkpoint(folder).name == f"step-{step:08d}.pt"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = resumed(folder)
    assert again.code == 0
    assert f"from step {step} of 6" in again.err
    if step % 2 == 0:
        assert is_as_alone(folder, home / "alone")
    else:  # a checkpoint more was made, so that others were the last two
        assert same(states(folder)["step-00000006.pt"], states(home / "alone")["step-00000006.pt"])
        assert notes(folder) == notes(home / "alone")


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_signal_before_anything_is_begun(home, tmp_path, monkeypatch, which):
    """While data are read or threads are tried, it stops at once, and nothing is written."""
    name, place = {1: ("prepare", training), 2: ("fastest_threads", training), 3: ("often", Data)}[which]

    def asked(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("this is not reached")

    monkeypatch.setattr(place, name, asked)
    x, options = home / "x.npy", {}
    if which == 3:
        x = saved(tmp_path / "pictures.npy", np.random.default_rng(0).integers(0, 4, (40, 4, 4)).astype(np.uint8))
        options = {"levels": 4, "channels": (8, 8)}
    before = files(tmp_path)
    done = train(x, tmp_path / "run", **options)
    assert (done.code, done.err) == (143, "pyrodiff: stopped by SIGTERM: nothing was written\n")
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_signal_in_an_evaluation(home, tmp_path, monkeypatch, which):
    bound, counted = training.bound, iter(range(1, 10**9))

    def asked(*args, **kwargs):
        if next(counted) == which:
            signal.raise_signal(signal.SIGTERM)
        return bound(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "bound", asked)
        done = train(home / "x.npy", tmp_path / "run")
    assert done.code == 143
    assert f"SIGTERM at step {2 * which}" in done.err
    assert runs.last_checkpoint(tmp_path / "run").name == f"step-{2 * which:08d}.pt"
    assert resumed(tmp_path / "run").code == 0
    assert is_as_alone(tmp_path / "run", home / "alone")


@pytest.mark.parametrize("part", ["bound", "Run.sampler"])
def test_a_signal_after_the_last_step(home, tmp_path, monkeypatch, part):
    with monkeypatch.context() as patch:
        if part == "bound":
            bound = training.bound
            patch.setattr(training, "bound", lambda *a, **k: (signal.raise_signal(signal.SIGINT), bound(*a, **k))[1])
        else:
            sampler = Run.sampler

            def asked(self, *args, **kwargs):
                if self.svi.num_steps == 6 and self.folder.joinpath("bound.npz").exists():
                    signal.raise_signal(signal.SIGINT)
                return sampler(self, *args, **kwargs)

            # the best weights may be of an earlier step: those that are opened in the end
            patch.setattr(Run, "sampler", asked)
            patch.setattr(Run, "opened", classmethod(lambda cls, folder, which, device: OPENED(folder, "last", device)))
        done = train(home / "x.npy", tmp_path / "run")
    assert done.code == 130
    assert not (tmp_path / "run" / "report.html").exists()
    assert resumed(tmp_path / "run").code == 0
    assert is_as_alone(tmp_path / "run", home / "alone")


OPENED = Run.opened


def test_a_second_signal_leaves_at_once(home, tmp_path, monkeypatch):
    def twice(self, size):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Data, "draw", twice)
        done = train(home / "x.npy", tmp_path / "run")
    assert done.code == 130
    assert done.err.count("\n") == 2  # what the data are, and that it leaves
    assert resumed(tmp_path / "run").code == 0
    assert is_as_alone(tmp_path / "run", home / "alone")


# Going on


def copied(home, tmp_path):
    shutil.copytree(home / "alone", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_is_done_stays_as_it_is(home, tmp_path):
    folder = copied(home, tmp_path)
    assert resumed(folder).code == 0
    assert is_as_alone(folder, home / "alone")


def test_the_last_checkpoint_may_be_lost(home, tmp_path):
    folder = copied(home, tmp_path)
    runs.last_checkpoint(folder).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 3.\n{"step": 8, "lo')
    done = resumed(folder)
    assert (done.code, "from step 4 of 6" in done.err) == (0, True)
    assert is_as_alone(folder, home / "alone")


def test_all_checkpoints_may_be_lost(home, tmp_path):
    folder = copied(home, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    assert resumed(folder).code == 0
    assert is_as_alone(folder, home / "alone")


def test_more_steps(home, tmp_path):
    folder = copied(home, tmp_path)
    done = resumed(folder, train_steps=9)
    assert (done.code, "from step 6 of 9" in done.err) == (0, True)
    assert runs.last_checkpoint(folder).name == "step-00000009.pt"
    assert options.read(folder / "settings.toml", "record")["train_steps"] == 9
    assert [one["step"] for one in notes(folder) if "bound" in one] == [2, 4, 6, 8, 9]
    assert notes(folder)[:6] == notes(home / "alone")[:6]


@pytest.fixture(scope="module")
def longer(home, tmp_path_factory):
    """The metrics of the run after three steps more."""
    with pytest.MonkeyPatch.context() as patch, kept_sources():
        without_pictures(patch.setattr)
        folder = copied(home, tmp_path_factory.mktemp("longer"))
        assert resumed(folder, train_steps=9).code == 0
    return notes(folder)


def as_on_a_gpu(rate, device):
    """The optimizer's options there, but for those that a CPU does not have."""
    return {"lr": torch.tensor(rate), "fused": True}


@pytest.mark.parametrize("there", [True, False], ids=["on a GPU", "on a CPU"])
@pytest.mark.parametrize("here", [True, False], ids=["on a GPU", "on a CPU"])
def test_a_run_resumes_where_its_rate_is_a_tensor_or_a_number(home, longer, tmp_path, monkeypatch, here, there):
    folder, ways = tmp_path / "moved", {True: as_on_a_gpu, False: runs._ways}
    monkeypatch.setattr(runs, "_ways", ways[there])
    assert train(home / "x.npy", folder).code == 0
    monkeypatch.setattr(runs, "_ways", ways[here])
    assert resumed(folder, train_steps=9).code == 0
    for ours, theirs in zip(notes(folder), longer, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert call("bound", folder).code == 0


def test_fewer_steps_than_were_made_are_refused(home, tmp_path):
    folder = copied(home, tmp_path)
    assert resumed(folder, train_steps=5).is_refused("--train-steps", "5", "6")
    assert options.read(folder / "settings.toml", "record")["train_steps"] == 6


def test_with_what_a_kill_left_before_the_first_checkpoint(home, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".settings.toml.part").write_text("da")
    (folder / "commands.txt").touch()
    assert train(home / "x.npy", folder, "--resume").code == 0
    assert is_as_alone(folder, home / "alone")


def test_parts_that_a_kill_left_are_swept_away(home, tmp_path):
    folder = copied(home, tmp_path)
    (folder / "checkpoints" / ".step-00000005.pt.0123456789abcdef.part").write_text("PK")
    assert resumed(folder).code == 0
    assert not list(folder.rglob("*.part"))


def test_from_another_working_directory(home, tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    shutil.copy(home / "x.npy", tmp_path / "a b" / "x y.npy")
    monkeypatch.chdir(tmp_path / "a b")
    assert train("x y.npy", "r 1").code == 0
    monkeypatch.chdir(tmp_path)
    assert resumed("a b/r 1", train_steps=8).code == 0
    assert call("bound", "a b/r 1", "--number=2").code == 0


@pytest.mark.parametrize("name", ['\N{GRINNING FACE} é a "quoted" \\ one', "[x] # y, tab\tnew\nline del\x7f"])
def test_names_of_all_kinds(home, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(home / "x.npy", folder / "x.npy")
    assert train(folder / "x.npy", folder / "run", train_steps=2).code == 0
    assert options.read(folder / "run" / "settings.toml", "record")["data"] == str(folder / "x.npy")
    assert resumed(folder / "run").code == 0


# What does not fit


def other(path, **values):
    """A checkpoint with other parts."""
    torch.save({**content(path), **values}, path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), ["cut short or corrupt"]),
        (lambda path: path.write_bytes(b""), ["cut short or corrupt"]),
        (lambda path: torch.save(print, path), ["code"]),
        (lambda path: other(path, format=2), ["newer version"]),
        (lambda path: other(path, more={"epoch": 3}), ["something else"]),
        (lambda path: other(path, more={**content(path)["more"], "form": {"a": 1}}), ["something else"]),
        (lambda path: other(path, more={**content(path)["more"], "state": {}}), []),
    ],
    ids=["cut short", "empty", "code", "newer", "another's", "another's form", "without a state"],
)
def test_a_checkpoint_that_is_none(home, tmp_path, harm, words):
    folder = copied(home, tmp_path)
    path = runs.last_checkpoint(folder)
    harm(path)
    before = bytes_of(folder)
    for line in (["train", "--out", folder, "--resume"], ["info", folder], ["bound", folder, "--checkpoint", "last"]):
        done = call(*line)
        if words == [] and line[0] != "train":
            assert done.code in (0, 2)
        else:
            assert done.is_refused(path.name, *words)
        assert bytes_of(folder) == before


def test_a_setting_of_a_newer_version_in_a_checkpoint(home, tmp_path):
    folder = copied(home, tmp_path)
    path = runs.last_checkpoint(folder)
    more = content(path)["more"]
    other(path, more={**more, "settings": {**more["settings"], "of_tomorrow": 3}})
    assert call("info", folder).is_refused(path.name)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("hidden = 8", "hidden = 16", ["hidden"]),
        ("blocks = 1", "blocks = 2", ["blocks"]),
        ('"cosine"', '"linear"', ["schedule"]),
        ("T = 5", "T = 6", ["--T"]),
        ('"velocity"', '"noise"', ["prediction"]),
        ('"forward"', '"posterior"', ["variance"]),
        ('weighting = "bound"', 'weighting = "simple"', ["weighting"]),
        ("batch_size = 4", "batch_size = 8", ["batch"]),
        ("average = 0.9", "average = 0.5", ["average"]),
        ("average = 0.9", "average = 0", ["average"]),
        ("seed = 0", "seed = 1", ["seed"]),
        ("lr = 0.01", "lr = 0.02", ["lr"]),
        ('"low-discrepancy"', '"uniform"', ["drawing"]),
        ("hidden = 8", "hiden = 8", ["hiden", "hidden"]),
        ("hidden = 8", "hidden = ", ["settings.toml"]),
        ("seed = 0", "seed = -1", ["seed", "-1"]),
    ],
)
def test_a_record_that_was_edited(home, tmp_path, before, after, words):
    folder = copied(home, tmp_path)
    record = folder / "settings.toml"
    assert before in record.read_text()
    record.write_text(record.read_text().replace(before, after))
    assert resumed(folder).is_refused(*words)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden", 16), ("schedule", "linear"), ("seed", 3), ("batch_size", 5), ("lr", 0.5), ("T", 6)],
)
def test_a_run_goes_on_as_it_began(home, tmp_path, name, value):
    assert resumed(copied(home, tmp_path), **{name: value}).is_refused(
        f"--{name.replace('_', '-')} must stay", str(value)
    )


def test_a_run_is_not_begun_anew_by_mistake(home, tmp_path):
    folder = copied(home, tmp_path)
    assert train(home / "x.npy", folder).is_refused("--resume", str(folder))
    assert is_as_alone(folder, home / "alone")


# Harm


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


@pytest.mark.parametrize("name", [".lock", "commands.txt", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_in_a_folder_leads_out_of_it(home, tmp_path, name, kind):
    folder = copied(home, tmp_path)
    (tmp_path / "precious").write_text("precious")
    (folder / name).unlink(missing_ok=True)
    if kind == "link":
        (folder / name).symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(folder / name)
    done = resumed(folder, train_steps=8)
    if kind == "pipe" and name == "metrics.jsonl":  # it is no file, and one is put there
        assert done.code == 0
    else:
        assert done.is_refused(name)
        assert runs.last_checkpoint(folder).name == "step-00000006.pt"
        assert options.read(folder / "settings.toml", "record")["train_steps"] == 6
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_last_checkpoint_is_that_of_the_largest_step(home, tmp_path):
    folder = copied(home, tmp_path)
    checkpoint = folder / "checkpoints" / "step-00000004.pt"
    others = [checkpoint.with_name(name) for name in ("step-keep.pt", "step-5 copy.pt", "step-x9.pt", "step-\u0669.pt")]
    for other in others:
        shutil.copy(checkpoint, other)
    checkpoint.with_name("step-00000099.pt").mkdir()
    checkpoint.with_name("step-00000001.pt").mkdir()
    runs.last_checkpoint(folder).rename(checkpoint.with_name("step-6.pt"))
    assert runs.last_checkpoint(folder).name == "step-6.pt"
    done = resumed(folder, train_steps=10)
    assert (done.code, "from step 6 of 10" in done.err) == (0, True)
    assert all(other.is_file() for other in others)
    assert {path.name for path in checkpoint.parent.iterdir()} >= {"step-00000008.pt", "step-00000010.pt"}
    assert not checkpoint.exists()


def test_a_checkpoint_of_another_step_than_it_says_is_refused(home, tmp_path):
    folder = copied(home, tmp_path)
    path = runs.last_checkpoint(folder)
    shutil.copy(path, path.with_name("step-00000100.pt"))
    before = bytes_of(folder)
    assert resumed(folder, train_steps=200).is_refused("step-00000100.pt is of step 6", path.name)
    assert bytes_of(folder) == before
    done = resumed(folder, "--resume=whole", train_steps=8)
    assert (done.code, "from step 6 of 8" in done.err) == (0, True)


def test_the_best_checkpoint_alone_is_gone_on_from(home, tmp_path):
    folder = copied(home, tmp_path)
    for path in (folder / "checkpoints").glob("step-*.pt"):
        path.unlink()
    step = checkpoints.load(folder / "checkpoints" / "best.pt")["svi"]["counts"]["num_steps"]
    done = resumed(folder)
    assert (done.code, f"from step {step} of 6" in done.err) == (0, True)
    assert same(states(folder)["best.pt"], states(home / "alone")["best.pt"])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_run_goes_on_from_the_newest_whole_checkpoint_where_that_is_asked_for(home, tmp_path):
    folder = copied(home, tmp_path)
    cut(runs.last_checkpoint(folder))
    before = bytes_of(folder)
    assert resumed(folder).is_refused("step-00000006.pt", "step-00000004.pt is whole", "--resume=whole")
    assert bytes_of(folder) == before
    done = call("train", "--out", folder, "--resume=whole")
    assert (done.code, "from step 4 of 6" in done.err) == (0, True)
    assert same(states(folder), states(home / "alone"))


def test_a_damaged_checkpoint_takes_nobody_s_place(home, tmp_path):
    folder = copied(home, tmp_path)
    damaged = runs.last_checkpoint(folder).with_name("step-00000099.pt")
    damaged.write_text("PK")
    assert call("train", "--out", folder, "--resume=whole", "--train-steps=8", "--keep=1").code == 0
    names = {path.name for path in damaged.parent.iterdir()}
    assert names == {"best.pt", "step-00000008.pt", damaged.name}


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(home, tmp_path):
    folder = copied(home, tmp_path)
    for path in (folder / "checkpoints").iterdir():
        cut(path)
    before = bytes_of(folder)
    assert call("train", "--out", folder, "--resume=whole").is_refused("cut short")
    assert bytes_of(folder) == before


def test_the_lock_is_taken_before_anything_is_read(home, tmp_path, monkeypatch):
    folder = copied(home, tmp_path)
    monkeypatch.setattr(training, "prepare", None)
    with training._lock(folder):
        assert resumed(folder, train_steps=8).is_refused("--out", "nobody else")


def test_a_run_that_somebody_else_began_meanwhile_is_left_alone(home, tmp_path, monkeypatch):
    prepare, folder = training.prepare, tmp_path / "run"

    def meanwhile(*args):
        if not folder.exists():
            shutil.copytree(home / "alone", folder)
        return prepare(*args)

    monkeypatch.setattr(training, "prepare", meanwhile)
    assert train(home / "x.npy", folder, "--resume").is_refused("--out", "meanwhile")
    assert is_as_alone(folder, home / "alone")


FOREIGN = [
    *(
        b"5",
        b"[3]",
        b"null",
        b'"x"',
        b"{}",
        b"[" * 50000,
        b"{" * 50000,
        b"\xff\xfe",
        b"\x00",
        b"9" * 5000,
        b"x" * 10**5,
    ),
    *(
        b'{"a": ' * 9000 + b"1" + b"}" * 9000,
        b'{"note": "lr"}',
        b'{"step": "6", "loss": 1}',
        b'{"step": 6, "loss": "x"}',
    ),
    *(b'{"step": 6, "loss": [1]}', b'{"step": 6, "bound": NaN}', b'{"step": 6, "bound": -Infinity}', b'{"step": 1e3}'),
    *(b'{"step": 6, "bound": 1' + b"0" * 400 + b"}", b'{"step": 6, "loss": 1e999}', b'{"step": null}'),
    *(b'{"step": 1' + b"0" * 400 + b', "loss": 1}', b'{"step": 6, "bound": {"a": 1}}', b'{"step": true, "loss": 1}'),
]


def test_foreign_lines_of_metrics_stop_nothing(home, tmp_path):
    folder = copied(home, tmp_path)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(FOREIGN) + b"\n")
    assert notes(folder) == notes(home / "alone")
    assert resumed(folder).code == 0
    assert is_as_alone(folder, home / "alone")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(FOREIGN) + b"\n")
    for name in ("plot", "info"):
        assert call(name, folder).code == 0


@pytest.mark.parametrize("what", ["samples", "bound", "error"])
def test_what_is_not_finite_is_a_training_that_failed(home, tmp_path, monkeypatch, what):
    folder, bound, sampler = tmp_path / "run", training.bound, pyrodiff.AncestralSampler.__call__
    counted = iter(range(1, 10**9))

    def broken(found):
        if next(counted) < 2:
            return found
        if what == "error":
            raise ValueError("loc must be finite")
        return found * math.nan if what == "samples" else pyrodiff.Bound(found.prior * math.nan, *parts_of(found))

    if what == "samples":
        monkeypatch.setattr(pyrodiff.AncestralSampler, "__call__", lambda *a, **k: broken(sampler(*a, **k)))
    else:
        monkeypatch.setattr(training, "bound", lambda *a, **k: broken(bound(*a, **k)))
    done = train(home / "x.npy", folder)
    assert (done.code, "training failed" in done.err, "at step 4" in done.err) == (1, True, True), done
    assert "Traceback" not in done.err
    assert runs.last_checkpoint(folder).name == "step-00000002.pt"
    assert checkpoints.load(folder / "checkpoints" / "best.pt")["svi"]["counts"]["num_steps"] == 2


def parts_of(found):
    return found.denoising, found.reconstruction, found.event_shape


@pytest.mark.parametrize("place", ["average", "moments"])
def test_what_is_not_finite_is_in_no_checkpoint(home, tmp_path, place):
    run = Run(tmp_path, **made_as(home))
    run.restore(runs.kept(runs.last_checkpoint(home / "alone")))
    moments = next(iter(run.svi.optimizer.state.values()))
    broken = next(run.svi.average.parameters()) if place == "average" else moments["exp_avg_sq"]
    with torch.no_grad():
        broken.flatten()[0] = math.inf
    (tmp_path / "checkpoints").mkdir()
    trainer = Trainer(run, None, Stop())
    with pytest.raises(FloatingPointError, match="not finite any more at step 6"):
        trainer._save()
    assert not list((tmp_path / "checkpoints").iterdir())


def made_as(home):
    run = Run.opened(home / "alone", "last")
    return {"plan": run.plan, "form": run.form, "device": run.device}


def forged(path, where, **values):
    """A checkpoint with other values in a part of what the run keeps."""
    more = content(path)["more"]
    other(path, more={**more, where: {**more[where], **values}})


DAG = [[0]]
for _ in range(40):
    DAG = [DAG, DAG]


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("settings", {"hidden": 20000}),
        ("settings", {"num_steps": 10**12}),
        ("settings", {"blocks": 10**9}),
        ("settings", {"channels": [10**5], "network": "unet"}),
        ("settings", {"hidden": DAG}),
        ("settings", {"hidden": None}),
        ("settings", {"hidden": 10**400}),
        ("form", {"event_shape": [10**6, 10**6]}),
        ("form", {"event_shape": [2**62, 2**62]}),
        ("form", {"event_shape": [-2]}),
        ("form", {"classes": 10**9}),
        ("form", {"event_shape": "x"}),
        ("form", {"scale": torch.ones(1).expand(10**12)}),
        ("form", {"shift": 3}),
        ("form", {"read_as": 3}),
        ("form", {"scale": torch.tensor([-1.0, 1.0]).double()}),
        ("form", {"shift": torch.tensor([float("nan"), 1.0]).double()}),
        ("form", {"shift": None}),
        ("form", {"rate": 0.5}),
        ("form", {"levels": 4}),
        ("form", {"classes": torch.zeros(2)}),
        ("form", {"fingerprint": torch.zeros(2)}),
        ("form", {"contents": 3}),
        ("state", {"loss": torch.tensor([True])}),
        ("state", {"loss": "x"}),
        ("state", {"best": "x"}),
        ("state", {"seconds": [1]}),
        ("state", {"logged": None}),
        ("state", {"drawn": "x"}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else ",".join(value),
)
def test_a_forged_checkpoint_is_refused_before_anything_is_built(home, tmp_path, monkeypatch, where, values):
    folder = copied(home, tmp_path)
    forged(runs.last_checkpoint(folder), where, **values)
    monkeypatch.setattr(runs.models, "build", None)
    before = bytes_of(folder)
    for line in (["train", "--out", folder, "--resume"], ["info", folder], ["bound", folder, "--checkpoint", "last"]):
        assert call(*line).is_refused("step-00000006.pt", "step-00000004.pt is whole")
        assert bytes_of(folder) == before


@pytest.mark.parametrize("name", ["checkpoints", "pictures"])
def test_a_folder_that_is_a_link_is_not_followed(home, tmp_path, name):
    folder, elsewhere = copied(home, tmp_path), tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = bytes_of(elsewhere)
    assert resumed(folder, train_steps=8).is_refused("--out", name, "is a link")
    assert bytes_of(elsewhere) == before


@pytest.mark.parametrize("place", ["moments", "count", "names"])
def test_a_checkpoint_with_other_things_in_the_state_of_training(home, tmp_path, place):
    folder = copied(home, tmp_path)
    key, value = {
        "moments": (("optimizer", 1, "state", 0, "exp_avg"), "x"),
        "names": (("names",), "x"),
        "count": (("counts", "num_steps"), "6"),
    }[place]
    forged_in(runs.last_checkpoint(folder), ("svi", *key), value)
    assert resumed(folder, train_steps=8).is_refused("step-00000006.pt")


def test_a_folder_that_cannot_be_begun_is_not_there(home, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert train(home / "x.npy", tmp_path / "a" / "b" / "run").is_refused("No space left")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    assert train(home / "x.npy", tmp_path / "empty").is_refused("No space left")
    assert files(tmp_path) == set()


# A full disk


@pytest.mark.parametrize("write", [0, 2, 9, 20, 36])
def test_a_full_disk_loses_nothing(home, tmp_path, monkeypatch, write):
    folder, sync, counted = tmp_path / "run", os.fsync, iter(range(10**9))

    def full(descriptor):
        if next(counted) >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = train(home / "x.npy", folder)
    if done.code == 0:  # the disk lasted
        assert next(counted) <= write + 10
        return
    assert done.code == 2
    assert sum("error: " in line for line in done.err.splitlines()) == 1
    assert "No space left on device" in done.err.splitlines()[-1]
    assert not list(folder.rglob("*.part"))
    for path in (folder / "checkpoints").glob("*.pt"):
        checkpoints.load(path)
    assert train(home / "x.npy", folder, "--resume").code == 0
    assert is_as_alone(folder, home / "alone")


def test_metrics_on_a_full_disk(home, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "note", full)
        done = train(home / "x.npy", tmp_path / "run")
    assert done.code == 2
    assert "No space left" in done.err
    assert resumed(tmp_path / "run").code == 0
    assert is_as_alone(tmp_path / "run", home / "alone")


# The best, and the last


def test_the_best_is_the_one_with_the_least_held_out_bound(home, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 1.5, 5.0])
    bound = training.bound

    def given(*args, **kwargs):
        found = bound(*args, **kwargs)
        if (value := next(values, None)) is None:  # that of the test data
            return found
        shift = value - found.nats.mean()
        return pyrodiff.Bound(found.prior + shift, found.denoising, found.reconstruction, found.event_shape)

    monkeypatch.setattr(training, "bound", given)
    folder = tmp_path / "run"
    assert train(home / "x.npy", folder, train_steps=10, keep=1, checkpoint_every=3).code == 0
    best, last = (checkpoints.load(folder / "checkpoints" / name) for name in ("best.pt", "step-00000010.pt"))
    assert best["svi"]["counts"]["num_steps"] == 4
    assert last["more"]["state"]["best_step"] == 4
    opened = Run.opened(folder)
    assert opened.svi.num_steps == 4
    assert Run.opened(folder, "last").svi.num_steps == 10
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.pt", "step-00000010.pt"}
    shift = opened.form.log_scale
    assert last["more"]["state"]["best"] == pytest.approx(1.0 + shift)


def test_the_first_evaluation_comes_with_the_first_line_of_metrics(home, tmp_path):
    assert train(home / "x.npy", tmp_path / "run", train_steps=8, log_every=3, evaluate_every=4).code == 0
    records = notes(tmp_path / "run")
    assert [one["step"] for one in records if "bound" in one] == [3, 4, 8]
    assert [one["step"] for one in records if "loss" in one] == [3, 6, 8]


def test_the_average_is_what_is_opened(home):
    run = Run.opened(home / "alone", "last")
    state = checkpoints.load(runs.last_checkpoint(home / "alone"))
    again = Run(home, run.plan, run.form, torch.device("cpu"))
    again.restore(runs.kept(runs.last_checkpoint(home / "alone")))
    assert state["format"] == 1
    with again.svi.averaged():
        for (name, ours), theirs in zip(run.diffusion.named_parameters(), again.diffusion.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert not all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(run.diffusion.parameters(), again.diffusion.parameters(), strict=True)
    )
    assert not run.diffusion.training


def test_the_last_k_are_kept(home, tmp_path):
    assert train(home / "x.npy", tmp_path / "run", train_steps=12, checkpoint_every=3, keep=3).code == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best.pt", *(f"step-{step:08d}.pt" for step in (6, 9, 12))}


# Metrics


def test_what_is_noted(home):
    records = Metrics.read(home / "alone")
    logged, evaluated = ([one for one in records if name in one] for name in ("loss", "bound"))
    assert [one["step"] for one in logged] == [one["step"] for one in evaluated] == [2, 4, 6]
    for one in evaluated:
        assert one["bound"] == pytest.approx(one["prior"] + one["denoising"] + one["reconstruction"], rel=1e-5)
        assert one["bits_per_dim"] == pytest.approx(one["bound"] / math.log(2) / 2, rel=1e-5)
    for one in logged:
        assert one["lr"] == pytest.approx(0.01 * (1 + math.cos(math.pi * one["step"] / 6)) / 2, abs=1e-9)
    state = checkpoints.load(runs.last_checkpoint(home / "alone"))["more"]["state"]
    assert state["best"] == min(one["bound"] for one in evaluated)


def test_the_held_out_bound_is_that_of_the_averaged_weights(home):
    run = Run.opened(home / "alone", "last")
    _, data = prepare(run.plan.values(), torch.device("cpu"))
    x_0 = data.split("validation", 4)
    found = run.form.in_units(pyrodiff.bound(run.diffusion, x_0, generator=0))
    assert notes(home / "alone")[-1]["bound"] == pytest.approx(float(found.nats.mean()), rel=1e-6)


def test_a_line_of_metrics_is_json_even_where_a_number_is_none(tmp_path):
    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    assert train(saved(tmp_path / "x.npy", points(10)), tmp_path / "run").code == 0
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)


def test_the_loss_that_is_noted_is_that_of_a_datum(home, tmp_path):
    """Its mean is the bound on training data, in their units, if the weights stay."""
    options = {"lr": 1e-12, "average": 0.0, "T": 3, "train_steps": 50, "log_every": 50, "evaluate_every": 50}
    folder = tmp_path / "run"
    assert train(home / "x.npy", folder, **options, checkpoint_every=50, batch_size=192, accumulate=2).code == 0
    run = Run.opened(folder, "last")
    _, data = prepare(run.plan.values(), torch.device("cpu"))
    x_0 = data.split("train").repeat(200, 1)
    found = run.form.in_units(pyrodiff.bound(run.diffusion, x_0, generator=1))
    error = float(found.nats.std()) * (5 / (50 * 384) ** 0.5 * 2 + 5 / len(x_0) ** 0.5)
    assert notes(folder)[0]["loss"] == pytest.approx(float(found.nats.mean()), abs=error)


class Board:
    """In the place of TensorBoard's writer."""

    made: ClassVar = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.noted, self.closed = folder, purge_step, [], False
        Board.made.append(self)

    def add_scalar(self, name, value, step):
        self.noted.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(home, tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Board, "made", [])
    folder = tmp_path / "run"
    assert train(home / "x.npy", folder).code == 0
    assert resumed(folder, train_steps=8).code == 0
    first, second = Board.made
    assert first.closed
    assert second.closed
    assert second.purge_step == 7
    assert folder in first.folder.parents
    expected = [(name, value, one["step"]) for one in notes(folder) for name, value in one.items() if name != "step"]
    assert [one for one in first.noted + second.noted if one[0] != "seconds"] == expected


def test_training_that_fails_says_so(home, tmp_path):
    done = train(home / "x.npy", tmp_path / "run", lr=1e12, train_steps=20)
    assert done.code == 1
    assert done.err.count("\n") <= 20
    assert "Traceback" not in done.err
    assert "--lr" in done.err.splitlines()[-1]


def test_weights_that_are_not_finite_take_no_place(home, tmp_path):
    """The step that breaks them is one of a checkpoint: the one before stays, and the run can be opened."""
    folder = copied(home, tmp_path)
    before = runs.last_checkpoint(folder).read_bytes()
    run = Run.opened(folder, "last")
    data = prepare(run.plan.values(), run.device)[1]
    with torch.no_grad():
        next(run.diffusion.parameters()).fill_(math.inf)
    trainer = Trainer(run, data, Stop())
    run.state.update(saved=0, evaluated=0)
    for watched in (trainer._save, trainer._evaluate):
        with pytest.raises(FloatingPointError, match="is not finite any more at step 6"):
            watched()
    assert runs.last_checkpoint(folder).read_bytes() == before


def test_other_data_than_the_run_began_with(tmp_path):
    x, folder = points(), tmp_path / "run"
    assert train(saved(tmp_path / "x.npy", x), folder).code == 0
    before = bytes_of(folder)
    for other in (np.concatenate([x, x[:1]]), 1000 * x, np.where(x == x[0], x + 1e-6, x)):
        saved(tmp_path / "x.npy", other)
        for line in (["train", "--out", folder, "--resume", "--train-steps=8"], ["bound", folder], ["plot", folder]):
            assert call(*line).is_refused("data must be those that the run began with"), line
            assert bytes_of(folder) == before


def test_the_learning_rate_is_that_of_the_steps_there_are_now(home, tmp_path):
    folder = copied(home, tmp_path)
    assert resumed(folder, train_steps=12, log_every=1).code == 0
    rates = {one["step"]: one["lr"] for one in notes(folder) if "lr" in one}
    for step in range(7, 12):
        assert rates[step] == pytest.approx(0.01 * (1 + math.cos(math.pi * step / 12)) / 2, rel=1e-12)
    run = Run.opened(home / "alone", "last")
    longer = Run(folder, run.plan.but(train_steps=12), run.form, run.device)
    longer.restore(runs.kept(runs.last_checkpoint(home / "alone")))
    assert longer.svi.optimizer.param_groups[0]["lr"] == pytest.approx(0.005, rel=1e-12)  # half-way, not 0


@pytest.mark.filterwarnings("ignore:the step from t")  # of networks that are not trained
def test_a_weighted_loss_is_called_no_likelihood(tmp_path):
    options = {"weighting": "simple", "prediction": "noise"}
    assert train(saved(tmp_path / "x.npy", points()), tmp_path / "run", **options).code == 0
    assert {name for one in notes(tmp_path / "run") for name in one} & {"loss", "simple_loss"} == {"simple_loss"}


def test_a_run_is_trained_by_one_process_at_a_time(home, tmp_path):
    folder = copied(home, tmp_path)
    metrics = (folder / "metrics.jsonl").read_bytes()
    with training._lock(folder):
        assert resumed(folder, train_steps=8).is_refused("--out", "nobody else")
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert resumed(folder, train_steps=8).code == 0


def test_the_gradient_a_datum_is_clipped_alike_by_any_number_of_processes(home, monkeypatch):
    run = Run.opened(home / "alone")
    monkeypatch.setattr(runs, "SVI", lambda model, guide, optim, loss, clip_norm, **options: clip_norm)
    for count in (1, 2, 5):
        monkeypatch.setattr(runs.ranks, "count", lambda count=count: count)
        assert run._svi() == 10.0 * 4 * count


def test_a_bound_of_which_nothing_is_known(home, tmp_path):
    folder = copied(home, tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "bound": null}\n')
    assert call("info", folder).code == 0


# Several processes


def one_of_two(rank, port, line, folder):
    torch.set_num_threads(1)
    without_pictures()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    drawn, draw = [], Data.draw

    def drawing(self, size):
        found = draw(self, size)
        drawn.append(found[0])
        return found

    Data.draw = drawing
    with open(f"{folder}/out {rank}", "w") as out, open(f"{folder}/err {rank}", "w") as err:
        sys.stdout, sys.stderr = out, err
        code = cli.main(line)
        torch.save(drawn, f"{folder}/drawn {rank}")
    sys.exit(code)


def in_two(context, line, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=one_of_two, args=(rank, port, line, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes(home, tmp_path, context):
    folder = tmp_path / "run"
    line = ["train", str(home / "x.npy"), "--out", str(folder), *words(hidden=8, blocks=1, batch_size=4, T=5)]
    line += words(samples=3, evaluate_every=2, evaluate_on=4, log_every=2, checkpoint_every=2, device="cpu")
    assert in_two(context, [*line, "--train-steps=4"], tmp_path) == [0, 0], (tmp_path / "err 0").read_text()
    ours, theirs = (torch.load(tmp_path / f"drawn {rank}") for rank in range(2))
    assert (tmp_path / "out 1").read_text() == (tmp_path / "err 1").read_text() == ""
    assert (folder / "report.html").is_file()
    assert [one["step"] for one in notes(folder) if "loss" in one] == [2, 4]
    assert len((folder / "commands.txt").read_text().splitlines()) == 1
    assert in_two(context, [*line, "--train-steps=6", "--resume"], tmp_path) == [0, 0], (tmp_path / "err 0").read_text()
    assert [one["step"] for one in notes(folder) if "loss" in one] == [2, 4, 6]
    assert len(torch.load(tmp_path / "drawn 1")) == 2
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert not torch.equal(a, b), f"batch {i} is the same in both processes"


# Checkpoints that are whole as files, and of no run


def forged_in(path, place, value):
    """Something else at a place in a checkpoint."""
    state = part = dict(content(path))
    for key in place[:-1]:
        part[key] = copy.copy(part[key])
        part = part[key]
    part[place[-1]] = value
    torch.save(state, path)


OF_NO_RUN = {
    "without end": (("svi", "optimizer", 1, "state", 0, "exp_avg"), DAG),
    "without end, unknown": (("more", "state", "other"), DAG),
    "moments of one number": (("svi", "optimizer", 1, "state", 0, "exp_avg"), torch.zeros(1).half().expand(2**33)),
    "a tensor in the place of a setting": (("svi", "optimizer", 1, "param_groups", 0, "amsgrad"), torch.zeros(3)),
    "another weight decay": (("svi", "optimizer", 1, "param_groups", 0, "weight_decay"), 0.5),
    "betas that are no numbers": (("svi", "optimizer", 1, "param_groups", 0, "betas"), (torch.zeros(2), 0.9)),
    "an average that is none": (("svi", "average", 1), "x"),
    "names": (("svi", "names"), "x"),
    "sources": (("sources", 0, "torch"), torch.zeros(3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", OF_NO_RUN)
def test_what_does_not_fit_the_run_is_refused_the_other_one_named_and_gone_on_from(home, tmp_path, name):
    folder = copied(home, tmp_path)
    forged_in(runs.last_checkpoint(folder), *OF_NO_RUN[name])
    before = bytes_of(folder)
    assert resumed(folder, train_steps=8).is_refused("step-00000006.pt", "step-00000004.pt is whole")
    assert call("info", folder).is_refused("step-00000004.pt is whole")
    assert bytes_of(folder) == before
    done = call("train", "--out", folder, "--resume=whole")
    assert (done.code, "from step 4 of 6" in done.err) == (0, True)
    assert same(states(folder), states(home / "alone"))


@pytest.mark.parametrize(
    ("hurt", "is_built"),
    [(cut, False), (functools.partial(forged_in, place=("svi", "average", 1), value="x"), True)],
    ids=["cut short", "of another shape"],
)
def test_an_unfit_best_checkpoint_is_found_at_the_start_and_made_anew(home, tmp_path, monkeypatch, hurt, is_built):
    folder = copied(home, tmp_path)
    hurt(folder / "checkpoints" / "best.pt")
    before = bytes_of(folder)
    with monkeypatch.context() as patch:
        if not is_built:
            patch.setattr(training, "Run", None)
        assert resumed(folder, train_steps=8).is_refused("best.pt", "step-00000006.pt is whole")
    assert bytes_of(folder) == before
    assert call("train", "--out", folder, "--resume=whole").code == 0
    assert Run.opened(folder).svi.num_steps == 6


def test_a_run_of_which_no_checkpoint_fits_is_left_as_it_is(home, tmp_path):
    folder = copied(home, tmp_path)
    for path in (folder / "checkpoints").iterdir():
        forged_in(path, ("svi", "average", 1), "x")
    before = bytes_of(folder)
    assert call("train", "--out", folder, "--resume=whole").is_refused("has none")
    assert bytes_of(folder) == before


@pytest.mark.parametrize("command", ["bound", "sample", "plot"])
def test_weights_so_large_that_what_they_give_is_not_finite_are_a_training_that_failed(home, tmp_path, command):
    folder = copied(home, tmp_path)
    path = folder / "checkpoints" / "best.pt"
    average = torch.load(path, weights_only=True)["svi"]["average"][1]
    for name, weight in average.items():
        if weight.is_floating_point() and "network" in name:
            forged_in(path, ("svi", "average", 1, name), torch.full_like(weight, 3e38))
    done = call(command, folder)
    assert (done.code, "training failed" in done.err, "Traceback" in done.err) == (1, True, False)


def test_plot_does_not_follow_a_link_in_the_place_of_pictures(home, tmp_path):
    folder, elsewhere = copied(home, tmp_path), tmp_path / "elsewhere"
    (folder / "pictures").rename(elsewhere)
    (folder / "pictures").symlink_to(elsewhere)
    before = bytes_of(elsewhere)
    assert call("plot", folder).is_refused("pictures is a link")
    assert bytes_of(elsewhere) == before


@pytest.mark.parametrize("command", ["bound", "sample", "plot"])
def test_the_best_checkpoint_of_another_run_is_not_taken_for_this_one_s(home, tmp_path, command):
    folder = copied(home, tmp_path)
    assert train(home / "x.npy", tmp_path / "other", hidden=16).code == 0
    shutil.copy(tmp_path / "other" / "checkpoints" / "best.pt", folder / "checkpoints" / "best.pt")
    before = bytes_of(folder)
    assert call(command, folder).is_refused("--hidden must be 16 as in", "best.pt")
    assert bytes_of(folder) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_process_that_reads_batches_does_not_keep_the_lock_of_a_run_that_was_killed(tmp_path):
    lock = training._lock(tmp_path)
    reader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    reader.start()
    try:
        with pytest.raises(ValueError, match="nobody else trains"):
            training._lock(tmp_path)
        lock.close()  # as a kill does
        deadline = time.monotonic() + 30
        while True:  # the process may not have begun yet
            try:
                training._lock(tmp_path).close()
                break
            except ValueError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        reader.kill()
        reader.join()
