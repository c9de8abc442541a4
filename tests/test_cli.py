"""The command line: what it says, what it refuses, what comes out, and that it is what the library gives."""

import html.parser
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from commands import TINY, call, files, points, saved, train, with_pictures, without_pictures, words

import pyrodiff
from pyrodiff import checkpoints
from pyrodiff.base.randomness import kept_sources
from pyrodiff.command import cli, models, options, runs
from pyrodiff.command import train as training
from pyrodiff.command.models import SAMPLERS
from pyrodiff.command.options import Plan, flag
from pyrodiff.command.plans import prepare
from pyrodiff.command.runs import Metrics, Run

FIELDS = [one for fields in options.groups().values() for one in fields.values()]
LEVELS = np.random.default_rng(1).integers(0, 6, (40, 4, 4)).astype(np.uint8)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch.setattr)
    with kept_sources():
        yield


@pytest.fixture
def pictures(quick, monkeypatch):
    """Pictures that are drawn."""
    with_pictures(monkeypatch.setattr)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a run of points with true pictures, and one of small pictures."""
    home = tmp_path_factory.mktemp("home & <co>")
    with kept_sources():
        done = train(saved(home / "x.npy", points()), home / "run", seed=1234567)
        with pytest.MonkeyPatch.context() as patch:
            without_pictures(patch.setattr)
            assert train(saved(home / "levels.npy", LEVELS), home / "levels", levels=6, channels=(8, 8)).code == 0
    assert done.code == 0, done.err
    (home / "said").write_text(done.out)
    return home


# What it says


def help_of(*line):
    done = call(*line, "--help")
    assert (done.code, done.err) == (0, "")
    return " ".join(done.out.split())


def test_help():
    said = help_of()
    assert all(name in said for name in ("train", "bound", "sample", "plot", "info"))
    for name in ("bound", "sample", "plot", "info"):
        assert "RUN" in help_of(name)


@pytest.mark.parametrize("one", FIELDS, ids=lambda one: one.name)
def test_every_option_is_in_the_help_with_its_meaning_and_default(one):
    said = help_of("train")
    assert re.search(rf"{flag(one.name)}\b" if one.name != "data" else "DATA", said)
    assert " ".join(one.metadata["help"].split()) in said.replace("- ", "-")
    assert next(group for group, fields in options.groups().items() if one.name in fields) in said
    if one.default is not None and not one.metadata["varies"] and one.name != "data":
        assert f"(default: {str(one.default).lower()})" in said


def test_a_mistake_on_the_line():
    assert call().is_refused("COMMAND")
    assert call("fly").is_refused("fly", "train")
    assert call("train", "swiss-roll", "--speed=3").is_refused("--speed=3")
    assert call("train").is_refused("swiss-roll", "digits")
    assert call("train", "--out", "there").is_refused("swiss-roll")
    assert call("train", "").is_refused("data")
    assert call("sample").is_refused("RUN")
    for line in (["train", "swiss-roll", "--T=1e3"], ["bound", "there", "--times=0"], ["sample", "a", "--number=x"]):
        done = call(*line)
        assert done.is_refused(line[2].split("=")[0])
        assert "meant" not in done.err  # it is that option


@pytest.mark.parametrize("name", ["T", "batch_size", "hidden", "blocks", "samples", "workers", "levels", "channels"])
def test_numbers_that_would_fill_the_memory(name, tmp_path):
    for number in (10**25, 2**63 - 1):
        done = call("train", "swiss-roll", "--out", tmp_path / "run", *words(**{name: number}))
        assert done.is_refused(options.flag(name), "at most")
    assert call("bound", "there", f"--particles={10**25}").is_refused("--particles", "at most")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "meant", "where"),
    [
        (["train", "swiss-roll", "--stpes", "10"], "--train-steps", "pyrodiff train --help"),
        (["train", "swiss-roll", "--stpes=10"], "--train-steps", "pyrodiff train --help"),
        (["train", "--batchsize=3", "swiss-roll"], "--batch-size", "pyrodiff train --help"),
        (["bound", "there", "--partciles=3"], "--particles", "pyrodiff bound --help"),
        (["sample", "there", "--sampler=ancestrall"], "ancestral", "pyrodiff sample --help"),
        (["trian", "swiss-roll"], "train", "pyrodiff --help"),
        (["--verison", "info"], "--version", "pyrodiff"),
    ],
)
def test_a_mistyped_word(line, meant, where):
    assert call(*line).is_refused(f"is {meant} meant?", f"see {where}")


@pytest.mark.parametrize(
    "line", [["bound", "x\udcff"], ["train", "digits", "--out=b\udcff"], ["info", "a\0b"], ["\x1b[2J"]]
)
def test_words_that_are_no_text(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*line)
    assert done.is_refused("pyrodiff")
    assert all(one.isprintable() for one in done.err.rstrip("\n"))
    assert not list(tmp_path.iterdir())


def test_names_that_are_too_long(home, tmp_path):
    name = 300 * "x"
    assert train(home / "x.npy", tmp_path / name).is_refused("too long")
    assert call("train", tmp_path / name, "--out", tmp_path / "run").is_refused("too long")
    assert call("train", "digits", "--config", tmp_path / name).is_refused("too long")
    for command in ("bound", "sample", "plot", "info"):
        assert call(command, tmp_path / name).is_refused("too long")
    assert call("sample", home / "run", "--save", tmp_path / f"{name}.npz").is_refused("--save")
    assert call("sample", home / "run", "--checkpoint", tmp_path / name).is_refused("too long")
    assert not list(tmp_path.iterdir())


def test_a_pipe_in_the_place_of_a_file(home, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for line in (["train", "digits", "--config"], ["train", "digits", "--out"], ["bound"], ["info"]):
        assert call(*line, tmp_path / "pipe").is_refused("pipe")
    assert call("sample", home / "run", "--checkpoint", tmp_path / "pipe").is_refused("pipe")


@pytest.mark.parametrize("line", [["info"], ["--help"], ["train", "--help"], ["--version"]])
def test_a_full_disk_behind_the_output(line, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli.main(line) == 2
        full.flush()  # nothing is left that could not be written
    assert re.fullmatch(r"pyrodiff: error: .*No space left on device\n", capsys.readouterr().err)


def test_more_threads_than_there_can_be(home, tmp_path, monkeypatch):
    set_threads, asked = torch.set_num_threads, []
    monkeypatch.setattr(torch, "set_num_threads", lambda number: (asked.append(number), set_threads(number)))
    assert train(home / "x.npy", tmp_path / "run", threads=10**6).is_refused("--threads", "at most", str(10**6))
    assert 10**6 not in asked
    assert not (tmp_path / "run").exists()


def test_what_does_something_to_a_terminal_is_escaped(home, tmp_path):
    folder = tmp_path / "a\x1b[2J\nb\x07"
    folder.mkdir()
    shutil.copy(home / "x.npy", folder / "x.npy")
    done = [train(folder / "x.npy", folder / "run", train_steps=2)]
    done += [call(name, folder / "run") for name in ("bound", "sample", "plot", "info")]
    done += [call("bound", folder / "run", "--data", folder), call("info", folder / "\x9b")]
    for one in done:
        assert all(c.isprintable() or c == "\n" for c in one.out + one.err), one
    assert [one.code for one in done] == [0, 0, 0, 0, 0, 2, 2]
    assert "\\x1b[2J\\nb" in done[4].out


def test_as_a_module_and_as_a_command(tmp_path):
    line = [sys.executable, "-m", "pyrodiff", "train", "swiss-roll", "--out", str(tmp_path / "run"), "--train-steps=0"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--train-steps" in done.stderr
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.scripts]\npyrodiff = "pyrodiff.__main__:main"\n' in project


@pytest.mark.parametrize(
    "line",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "digits", "--stpes=3"],
        ["trian"],
        ["train", "x", "--T=0"],
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(line):
    code = "import sys; from pyrodiff.command.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0, 0.4])
def test_a_signal_while_everything_is_imported(tmp_path, number, delay):
    line = [sys.executable, "-m", "pyrodiff", "train", "digits", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode in ((130,) if number == signal.SIGINT else (-number, 143))
    assert (out, "Traceback" in err) == ("", False)
    assert not (tmp_path / "run").exists()


def test_earlier_spellings_of_options_stay_accepted(home, tmp_path):
    """On the line, where today's are named, in a file, and in what an earlier version recorded."""
    folder = shutil.copytree(home / "run", tmp_path / "run")
    record = folder / "settings.toml"
    text = record.read_text()
    record.write_text(text.replace("train_steps = 6", "steps = 6").replace("T = 5", "num_steps = 5"))
    for path in (folder / "checkpoints").iterdir():
        state = checkpoints.load(path)
        kept = {{"train_steps": "steps", "T": "num_steps"}.get(k, k): v for k, v in state["more"]["settings"].items()}
        torch.save({**state, "more": {**state["more"], "settings": kept}}, path)
    for line, today in (
        (("bound", folder, "--num-steps=3"), "--num-steps is now --chain-steps"),
        (("sample", folder, "--num-steps=3", "--number=2"), "--num-steps is now --sample-steps"),
        (("train", "--out", folder, "--resume", "--steps=8"), "--steps is now --train-steps"),
    ):
        done = call(*line)
        assert done.code == 0
        assert today in done.err
    found = options.read(record, "record")
    assert (found["train_steps"], found["T"]) == (8, 5)


# Settings

EXAMPLES = {int: 7, float: 0.25, bool: True, str: "x"}


def example(one):
    """A value that an option can have, and not its default."""
    kind = options.described(one.name)[1]
    if get_origin(kind) is Literal:
        return next(value for value in get_args(kind) if value != one.default)
    return EXAMPLES.get(kind, (8, 16))


@pytest.mark.parametrize("one", FIELDS, ids=lambda one: one.name)
def test_an_option_is_the_same_on_the_line_in_a_file_and_in_the_record(one, tmp_path, monkeypatch):
    given, value = [], example(one)

    def begin(folder, values, *more):
        given.append(values)
        raise OSError("enough")

    monkeypatch.setattr(training, "_begin", begin)
    monkeypatch.setattr(training, "_join", lambda device: None)
    plain = {"data": "digits"} if one.name != "data" else {}
    settings = {**plain, one.name: value}
    line = words(**{one.name: value}) if one.name != "data" else [value]
    config = tmp_path / "options.toml"
    text = "".join(line for line in Plan.of(settings).toml().splitlines(True) if line.split(" =")[0] in settings)
    config.write_text(text)
    hyphens = tmp_path / "hyphens.toml"
    hyphens.write_text(text.replace(f"{one.name} =", f"{one.name.replace('_', '-')} ="))
    for said in ([*plain.values(), *line], ["--config", config], ["--config", hyphens]):
        assert call("train", "--out", tmp_path / "run", *said).is_refused("enough")
    assert given == [settings] * 3
    assert type(given[0][one.name]) is type(given[1][one.name]) is type(value)


def test_the_line_goes_before_the_file(tmp_path, home):
    config = tmp_path / "a.toml"
    config.write_text(
        f"data = {json.dumps(str(home / 'x.npy'))}\nlr = 0.5\nhidden = 10\ntrain-steps = 2\nchannels = [8]\n"
    )
    more = words(**{name: value for name, value in TINY.items() if name not in ("hidden", "train_steps", "lr")})
    assert call("train", "--config", config, "--out", tmp_path / "no", *more).is_refused("--channels")
    config.write_text(config.read_text().replace("channels = [8]\n", ""))
    done = call("train", "--config", config, "--out", tmp_path / "run", *more, "--lr=0.25")
    assert done.code == 0
    record = options.read(tmp_path / "run" / "settings.toml", "record")
    assert (record["lr"], record["hidden"], record["train_steps"]) == (0.25, 10, 2)
    again = call("train", "--config", tmp_path / "run" / "settings.toml", "--out", tmp_path / "again")
    assert again.code == 0
    assert options.read(tmp_path / "again" / "settings.toml", "record") == record
    for name in ("bound.npz", "samples.npz"):
        with np.load(tmp_path / "run" / name) as ours, np.load(tmp_path / "again" / name) as theirs:
            assert all(np.array_equal(ours[one], theirs[one]) for one in ours.files)


def test_all_options_are_recorded(home):
    record = options.read(home / "run" / "settings.toml", "record")
    free = {"array", "levels", "log_snr_first", "log_snr_last", "channels", "attention", "final_times"}
    assert record.keys() >= set(options.names()) - free
    assert record["data"] == str(home / "x.npy")
    for name, value in TINY.items():
        assert record[name] == value
    plan, _ = prepare(record, torch.device("cpu"))
    assert plan == Plan.of(record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hiden = 8", ["hiden", "hidden"]),
        ("[model]\nhidden = 8", ["model"]),
        ("hidden 8", ["--config", "options.toml"]),
        ("hidden = 8.0", ["--hidden", "8.0"]),
        ("hidden = true", ["--hidden", "True"]),
        ('hidden = "8"', ["--hidden", "'8'"]),
        ("compile = 1", ["--compile", "1"]),
        ("lr = 'x'", ["--lr", "'x'"]),
        ("lr = nan", ["--lr", "nan"]),
        (f"lr = 1{'0' * 400}", ["--lr"]),
        ("data = 3", ["data", "3"]),
        ("channels = 8", ["--channels", "8"]),
        ("channels = []", ["--channels"]),
        ("channels = [8, 'x']", ["--channels", "'x'"]),
        ("steps = 3\nsteps = 4", ["--config"]),
        ("steps = 3\ntrain-steps = 4", ["--config", "two spellings"]),
        ("num_steps = 0", ["--T", "0"]),
        ("batch-size = 3\nbatch_size = 4", ["batch"]),
        ("seed = 2026-01-01", ["--seed"]),
        ("\xff", []),
        ("schedule = 'cosin'", ["--schedule", "cosine"]),
        ("a = " + "[" * 30000, ["--config", "options.toml"]),
        ("a = " + "{b = " * 9000, ["--config", "options.toml"]),
        ("# " + "x" * 2**17, ["--config", "64 KiB"]),
        ("hidden = 1" + "0" * 5000, ["--config", "options.toml"]),
        ("hidden = 0x" + "f" * 5000, ["--hidden", "options.toml"]),
        ("lr = 0x" + "f" * 5000, ["--lr", "options.toml"]),
        ("channels = [0x" + "f" * 5000 + "]", ["--channels", "options.toml"]),
    ],
)
def test_a_file_of_options_with_a_mistake(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(models, "build", None)  # nothing is built
    config = tmp_path / "options.toml"
    config.write_bytes(text.encode("latin-1"))
    assert call("train", "digits", "--out", tmp_path / "run", "--config", config).is_refused(*expected)
    assert files(tmp_path) == {"options.toml"}


@pytest.mark.parametrize("name", ["nothing.toml", "."])
def test_a_file_of_options_that_is_none(tmp_path, name):
    line = ["train", "digits", "--out", tmp_path / "run", "--config", tmp_path / name]
    assert call(*line).is_refused("--config", str(tmp_path))


COUNTS = ["0", "-1", "2.5", "x", ""]
WRONG = {
    **{
        name: COUNTS for name in ("T", "blocks", "train_steps", "batch_size", "accumulate", "threads", "evaluate_every")
    },
    **{name: COUNTS for name in ("evaluate_on", "evaluate_times", "checkpoint_every", "keep", "log_every", "samples")},
    "final_times": COUNTS,
    **{name: ["0", "-1", "nan", "inf", "x", ""] for name in ("lr", "clip_norm")},
    **{name: ["nan", "inf", "-inf", "x"] for name in ("log_snr_first", "log_snr_last")},
    **{name: ["-0.1", "1", "nan", "2", "x"] for name in ("dropout", "average")},
    **{name: ["x", "", "None"] for name in ("read_as", "binarize", "augment", "schedule", "prediction", "variance")},
    **{name: ["x", "", "None"] for name in ("network", "drawing", "weighting", "autocast")},
    **{name: ["-1", "2.5", "x"] for name in ("hidden", "warmup")},
    "weight_decay": ["-1", "nan", "inf", "x"],
    "holdout": ["0", "0.5", "-0.1", "nan", "x"],
    "levels": ["1", "0", "-1", "2.5", "x"],
    "channels": ["", "0", "8,0", "8,-8", "8;8", "8.5", "x", "8,"],
    "attention": ["", "8,0", "-8", "x"],
    "seed": ["-1", "4294967296", "2.5", "x"],
    "compile": ["1"],
    "device": ["", "x", "cuda:99", "meta", "cpu:x"],
    "data": ["", "nothing-there", "/nothing/there"],
    "array": ["x"],
    "labels": ["1"],
    "stream": ["1"],
    "workers": ["-1", "2.5", "x"],
}


@pytest.mark.parametrize("one", FIELDS, ids=lambda one: one.name)
def test_an_option_out_of_range_is_refused_before_anything_is_done(one, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", None)  # nothing is built
    for value in WRONG[one.name]:
        line = ["digits", f"{flag(one.name)}={value}"] if one.name != "data" else [value]
        done = call("train", *line, "--out", tmp_path / "run")
        assert done.is_refused(flag(one.name))
        if value and one.name != "compile":
            assert any(part in done.err for part in re.split("[,/]", value) if part)
        assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        assert train(home / "x.npy", tmp_path / "run", device=device).is_refused("--device", "GPU", "cpu")
        for name in ("bound", "sample", "plot"):
            assert call(name, home / "run", "--device", device).is_refused("--device", "GPU", "cpu")
    assert files(tmp_path) == set()


# Data and folders that cannot be


X = points()
MISTAKES = {
    "empty folder": (lambda path: path.mkdir(), ["data"]),
    "folder of others": (lambda path: (path.mkdir(), (path / "a.txt").write_text("x")), ["a.txt"]),
    "empty file": (lambda path: path.write_bytes(b""), ["empty"]),
    "text": (lambda path: path.write_text("1 2 3"), [".npy"]),
    "cut short": (lambda path: saved(path, X).write_bytes(path.read_bytes()[:-9]), ["cut short"]),
    "objects": (lambda path: np.save(path, np.array([{}] * 20), allow_pickle=True), ["pickle"]),
    "text in an array": (lambda path: np.save(path, np.array(["a"] * 20)), ["dtype"]),
    "complex": (lambda path: np.save(path, X * 1j), ["complex"]),
    "no dimension": (lambda path: np.save(path, np.array(1.0)), ["shape ()"]),
    "no data": (lambda path: np.save(path, X[:0]), ["(0, 2)"]),
    "few data": (lambda path: np.save(path, X[:9]), ["10", "9"]),
    "NaN": (lambda path: np.save(path, np.where(X == X[3], np.nan, X)), ["NaN"]),
    "infinite": (lambda path: np.save(path, np.where(X == X[3], np.inf, X)), ["finite"]),
    "huge": (lambda path: np.save(path, X * 1e300), ["data"]),
    "constant": (lambda path: np.save(path, np.stack([X[:, 0], X[:, 0] * 0 + 3], 1)), ["(1,)", "same in all"]),
    "all the same": (lambda path: np.save(path, X * 0 + 3.5), ["(0,)"]),
    "channels last": (lambda path: np.save(path, np.zeros((20, 8, 8, 3), np.uint8)), ["channels first", "(8, 8, 3)"]),
    "negative levels": (lambda path: np.save(path, np.arange(-20, 20).reshape(20, 2)), ["--levels"]),
    "many levels": (lambda path: np.save(path, np.arange(40).reshape(20, 2) * 10**6), ["--levels"]),
    "labels": (
        lambda path: (
            path.mkdir(),
            [
                (path / f"{split}-{what}-ubyte").write_bytes(header + bytes(size))
                for split in ("train", "t10k")
                for what, header, size in (
                    ("images-idx3", bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 4, 0, 0, 0, 4]), 320),
                    ("labels-idx1", bytes([0, 0, 8, 1, 0, 0, 0, 19]), 19),
                )
            ],
        ),
        ["20 images", "19 labels"],
    ),
    "no test": (
        lambda path: (
            path.mkdir(),
            (path / "train-images-idx3-ubyte").write_bytes(
                bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(320)
            ),
        ),
        ["t10k"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_data_that_cannot_be(name, tmp_path):
    make, expected = MISTAKES[name]
    path = tmp_path / "x.npy"
    make(path)
    before = files(tmp_path)
    assert train(path, tmp_path / "run").is_refused(*expected)
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_pictures_of_different_sizes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "x").mkdir()
    for i in range(12):
        image.new("L", (4, 4 + i // 11)).save(tmp_path / "x" / f"{i:02}.png")
    assert train(tmp_path / "x", tmp_path / "run").is_refused("4 x 4", "4 x 5", "11.png")
    (tmp_path / "x" / "11.png").write_text("no picture")
    assert train(tmp_path / "x", tmp_path / "run").is_refused("11.png")
    assert not (tmp_path / "run").exists()


def test_pictures_without_pillow(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_text("")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert train(tmp_path / "x", tmp_path / "run").is_refused("Pillow", "pip install")


def test_a_folder_to_write_to_that_cannot_be(home, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    for out in (file, full, half, file / "sub", "/dev/null/run", "/proc/run"):
        shown = str(out).removesuffix("/sub").removesuffix("/run")
        assert train(home / "x.npy", out).is_refused(shown, "--out")
        assert train(home / "x.npy", out, "--resume").is_refused(shown, "--out")
    assert files(tmp_path) == {"file", "full/thesis.tex"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(home, tmp_path):
    tmp_path.chmod(0o500)
    assert train(home / "x.npy", tmp_path / "run").is_refused("--out")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 10**7},
        {"hidden": 10**7, "blocks": 2, "schedule": "log-snr"},
    ],
    ids=str,
)
def test_more_memory_than_there_is(home, tmp_path, options):
    done = train(home / "x.npy", tmp_path / "run", **options)
    assert done.code in (1, 2)
    assert "memory" in done.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["bound", "sample", "plot", "info"])
def test_a_run_that_is_none(name, home, tmp_path):
    for path in (tmp_path, tmp_path / "nothing", home / "x.npy"):
        assert call(name, path).is_refused("RUN", str(path))
    if name != "info":
        assert call(name, home / "run", "--checkpoint=nothing.pt").is_refused("nothing.pt")
        assert call(name, home / "run", "--checkpoint", home / "x.npy").is_refused("x.npy")
        assert call(name, home / "run", "--seed=1.5").is_refused("--seed")


@pytest.mark.parametrize("name", ["bound", "sample", "plot"])
@pytest.mark.parametrize("seed", ["-1", "4294967296", str(10**30)])
def test_a_seed_that_cannot_be(name, seed, home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    assert call(name, folder, f"--seed={seed}").is_refused("--seed")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["bound", "--times=5"], ["--times", "5"]),
        (["bound", "--number=0"], ["--number"]),
        (["bound", "--particles=0"], ["--particles"]),
        (["bound", "--split=all"], ["--split"]),
        (["bound", "--save=/nothing/x.npz"], ["--save", "/nothing"]),
        (["bound", "--save=/tmp"], ["--save"]),
        (["sample", "--number=0"], ["--number"]),
        (["sample", "--batch-size=0"], ["--batch-size"]),
        (["sample", "--num-steps=0"], ["--num-steps"]),
        (["sample", "--save=/nothing/x.npz"], ["--save", "/nothing"]),
        (["sample", "--save=x.png"], ["--save", ".npz"]),
        (["sample", "--trajectory=film"], ["--trajectory"]),
        (["sample", "--save={run}/samples.npz"], ["--save", "files of the run"]),
        (["sample", "--save={run}/../run/bound.npz"], ["--save", "files of the run"]),
        (["sample", "--save={run}/pictures/samples.npz"], ["--save", "files of the run"]),
        (["bound", "--save={run}/bound.npz"], ["--save", "files of the run"]),
    ],
)
def test_what_cannot_be_asked_of_a_run(home, monkeypatch, line, expected):
    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr(pyrodiff.AncestralSampler, "__call__", work)
    if "--times=5" not in line:
        monkeypatch.setattr(training, "bound", work)
    before = files(home)
    assert call(line[0], home / "run", *(word.format(run=home / "run") for word in line[1:])).is_refused(*expected)
    assert files(home) == before


# What comes out


def opened(folder):
    run = Run.opened(folder)
    return run, prepare(run.plan.values(), torch.device("cpu"))[1]


def test_what_a_run_leaves(home):
    run = home / "run"
    steps = [f"{what}-{step:08d}.png" for step in (2, 4, 6) for what in ("samples", "terms")]
    expected = {"settings.toml", "commands.txt", "metrics.jsonl", "bound.npz", "samples.npz", "samples.png"}
    expected |= {"report.html", *(f"pictures/{name}" for name in steps)}
    expected |= {f"checkpoints/{name}" for name in ("best.pt", "step-00000004.pt", "step-00000006.pt")}
    assert files(run) == expected
    for path in run.rglob("*.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") > 100
    command = shlex.split((run / "commands.txt").read_text())
    assert command[:3] == ["pyrodiff", "train", str(home / "x.npy")]


@pytest.mark.parametrize("name", ["run", "levels"])
def test_the_last_bound_is_that_of_the_library(home, name):
    run, data = opened(home / name)
    found = run.form.in_units(pyrodiff.bound(run.diffusion, data.split("test"), generator=run.plan.training.seed))
    kept = pyrodiff.Bound.load(home / name / "bound.npz")
    torch.testing.assert_close(kept.nats, found.nats, rtol=1e-6, atol=1e-6)
    if name == "run":
        assert f"{float(found.nats.mean()):.2f}" in (home / "said").read_text()
        assert str(found) in (home / "said").read_text()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_bound(home, tmp_path, split):
    done = call("bound", home / "run", "--split", split, "--number=3", "--seed=5", "--save", tmp_path / "b.npz")
    assert (done.code, done.err) == (0, "")
    run, data = opened(home / "run")
    found = run.form.in_units(pyrodiff.bound(run.diffusion, data.split(split)[:3], generator=5))
    torch.testing.assert_close(pyrodiff.Bound.load(tmp_path / "b.npz").nats, found.nats, rtol=0, atol=1e-6)
    assert str(found) in done.out


def test_the_bound_of_some_times_of_fewer_steps_and_of_particles(home, tmp_path):
    run, data = opened(home / "run")
    line = ["bound", home / "run", "--save", tmp_path / "b.npz"]
    assert call(*line, "--times=2").code == 0
    found = pyrodiff.bound(run.diffusion, data.split("test"), num_times=2, generator=0)
    kept = pyrodiff.Bound.load(tmp_path / "b.npz")
    torch.testing.assert_close(kept.nats, run.form.in_units(found).nats, rtol=0, atol=1e-6)
    assert call(*line, "--chain-steps=3").code == 0
    kept = pyrodiff.Bound.load(tmp_path / "b.npz")
    assert kept.denoising.shape == (2, len(kept.nats))
    found = pyrodiff.bound(models.shortened(run.diffusion, 3, "--chain-steps"), data.split("test"), generator=0)
    torch.testing.assert_close(kept.nats, run.form.in_units(found).nats, rtol=0, atol=1e-6)
    done = call(*line, "--particles=3")
    assert done.code == 0
    tighter = pyrodiff.importance_bound(run.diffusion, data.split("test"), num_particles=3, generator=0)
    assert str(run.form.in_units(tighter)) in done.out


def drawn(path):
    with np.load(path) as file:
        assert file.files == ["samples"]
        return file["samples"]


def test_sample(home, tmp_path):
    found = {}
    for name, more in {
        "all": ["--number=7"],
        "again": ["--number=7"],
        "parts": ["--number=7", "--batch-size=3"],
        "parts again": ["--number=7", "--batch-size=3"],
        "seed": ["--number=7", "--batch-size=3", "--seed=1"],
        "short": ["--number=7", "--sample-steps=2"],
    }.items():
        assert call("sample", home / "run", *more, "--save", tmp_path / f"{name}.npz").code == 0
        found[name] = drawn(tmp_path / f"{name}.npz")
        assert found[name].shape == (7, 2)
    assert np.array_equal(found["all"], found["again"])
    assert np.array_equal(found["parts"], found["parts again"])
    for a, b in (("all", "seed"), ("parts", "seed"), ("all", "short")):
        assert not np.array_equal(found[a], found[b])
    rows = [tuple(row) for row in (*found["parts"], *found["seed"])]
    assert len(set(rows)) == 14, "batches of one seed are those of another"
    run, _ = opened(home / "run")
    generator = torch.Generator().manual_seed(0)
    expected = run.form.decoded(pyrodiff.AncestralSampler(run.diffusion)(7, generator=generator))
    np.testing.assert_allclose(found["all"], expected.numpy(), rtol=1e-6)
    short = pyrodiff.AncestralSampler(models.shortened(run.diffusion, 2, ""))(
        7, generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(found["short"], run.form.decoded(short).numpy(), rtol=1e-6)


def test_samples_have_a_new_name_where_none_is_given(home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    for number in (1, 2):
        assert str(folder / f"samples-{number}.npz") in call("sample", folder, "--number=2").out
        assert drawn(folder / f"samples-{number}.npz").shape == (2, 2)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert files(folder) - before.keys() == {f"samples-{number}.{end}" for number in (1, 2) for end in ("npz", "png")}


def test_samples_that_are_not_finite(home, tmp_path, monkeypatch, pictures):
    sampler = pyrodiff.AncestralSampler.__call__
    monkeypatch.setattr(pyrodiff.AncestralSampler, "__call__", lambda *a, **k: sampler(*a, **k) / 0)
    for line in (["sample", home / "run", "--save", tmp_path / "s.npz"], ["plot", home / "run"]):
        done = call(*line)
        assert (done.code, "training failed" in done.err, "Traceback" in done.err) == (1, True, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ddim", "dpm", "heun", "pc", "flow"])
def test_sample_by_any_sampler(home, tmp_path, name):
    """The file holds what the sampler of that name draws, in so many steps."""
    run, _ = opened(home / "run")
    options = [f"--sampler={name}", "--sample-steps=3", "--number=4", "--save", tmp_path / "s.npz"]
    assert call("sample", home / "run", *options).code == 0
    generator = torch.Generator().manual_seed(0)
    expected = run.form.decoded(SAMPLERS[name](run.diffusion)(4, num_steps=3, generator=generator))
    np.testing.assert_allclose(drawn(tmp_path / "s.npz"), expected.numpy(), rtol=1e-5)


def test_a_sampler_that_does_not_suit_is_refused_before_anything_is_written(home, tmp_path):
    assert train(saved(tmp_path / "b.npy", points() > 0), tmp_path / "bits").code == 0
    said = call("sample", tmp_path / "bits", "--sampler=dpm", "--save", tmp_path / "s.npz")
    assert said.is_refused("--sampler dpm", "AncestralSampler")
    assert not (tmp_path / "s.npz").exists()
    assert call("sample", home / "run", "--sampler=euler").is_refused("--sampler", "ancestral")


def test_samples_are_in_the_units_of_the_data(home, tmp_path):
    assert call("sample", home / "run", "--number=400", "--save", tmp_path / "s.npz").code == 0
    x = drawn(tmp_path / "s.npz")
    assert x.mean(0) == pytest.approx([1.0, -2.0], abs=1.5)
    assert 2 < x[:, 0].std() / x[:, 1].std() < 18
    assert call("sample", home / "levels", "--number=5", "--save", tmp_path / "l.npz").code == 0
    x = drawn(tmp_path / "l.npz")
    assert (x.dtype, x.shape) == (np.uint8, (5, 4, 4))
    assert 0 <= x.min() < x.max() <= 5


@pytest.mark.parametrize("name", ["run", "levels"])
def test_pictures_of_samples_and_of_their_way(home, tmp_path, pictures, name):
    image = pytest.importorskip("PIL.Image")
    for what, frames in (("gif", 6), ("strip", 1)):
        line = ["sample", home / name, "--number=5", "--save", tmp_path / "s.npz", "--trajectory", what]
        done = call(*line)
        assert (done.code, done.err) == (0, "")
        path = tmp_path / f"s-trajectory.{'gif' if what == 'gif' else 'png'}"
        assert str(path) in done.out
        with image.open(path) as picture:
            assert getattr(picture, "n_frames", 1) == frames
            assert np.asarray(picture.convert("L")).std() > 0
        with image.open(tmp_path / "s.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 0
    assert files(tmp_path) == {"s.npz", "s.png", "s-trajectory.gif", "s-trajectory.png"}


def test_plot(home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(folder / "pictures")
    done = call("plot", folder)
    assert (done.code, done.err) == (0, "")
    names = [f"pictures/{name}.png" for name in ("curves", "terms", "samples", "process")]
    assert {name for name in files(folder) if "pictures" in name} == set(names)
    assert done.out.split("\n")[:-1] == [str(folder / name) for name in names]
    (folder / "bound.npz").unlink()
    (folder / "metrics.jsonl").unlink()
    assert call("plot", folder).code == 0


def test_info(home):
    done = call("info", home / "run")
    assert (done.code, done.err) == (0, "")
    said = " ".join(done.out.split())
    run = Run.opened(home / "run", "last")
    number = sum(one.numel() for one in run.diffusion.parameters())
    for part in (f"{number:,}", "6 of 6", "CosineSchedule", "num_steps=5", str(home / "x.npy"), "best.pt"):
        assert part in said
    assert f"{run.state['best']:.4f}" in said
    done = call("info")
    assert (done.code, done.err) == (0, "")
    for part in (torch.__version__, pyrodiff.__version__, np.__version__, "swiss-roll"):
        assert part in done.out


def test_a_bound_that_would_fill_the_memory_is_not_loaded(home, tmp_path, monkeypatch):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    np.savez_compressed(folder / "bound.npz", nats=np.zeros(10**7))
    monkeypatch.setattr(np, "load", None)
    for name in ("info", "plot"):
        assert call(name, folder).is_refused("bound.npz says to hold more")


class Page(html.parser.HTMLParser):
    """What a page says, and what it needs."""

    def __init__(self, text):
        super().__init__()
        self.needs, self.said, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.needs += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag in ("table", "pre", "h1", "h2", "p", "figure", "code", "td", "tr", "style", "title", "figcaption"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "co")

    def handle_endtag(self, tag):
        if tag in ("table", "pre", "h1", "h2", "p", "figure", "code", "td", "tr", "style", "title", "figcaption"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


def test_the_report(home):
    text = (home / "run" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.needs, "there are no pictures"
    assert all(need.startswith("data:image/png;base64,") for need in page.needs)
    assert len(page.needs) >= 3
    assert not re.search(r"https?://|url\(|@import", text)
    kept = pyrodiff.Bound.load(home / "run" / "bound.npz")
    settings = options.read(home / "run" / "settings.toml", "record")
    mean, error = float(kept.nats.mean()), float(kept.nats.std() / math.sqrt(len(kept.nats)))
    for part in (f"{mean:.2f} ± {error:.2f} nats", str(kept), "1234567", torch.__version__, pyrodiff.__version__):
        assert part in page.said
    assert (home / "run" / "commands.txt").read_text().strip() in page.said
    assert str(home / "x.npy") in page.said
    assert "home & <co>" in page.said
    for name in settings:
        assert name in page.said
    assert page.open == []


def test_the_report_has_all_commands(home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    assert call("train", "--out", folder, "--resume", "--train-steps=8").code == 0
    lines = (folder / "commands.txt").read_text().splitlines()
    assert len(lines) == 2
    assert lines[1] == shlex.join(["pyrodiff", "train", "--out", str(folder), "--resume", "--train-steps=8"])
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "\n".join(lines) in page.said


# A bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_alone(home, tmp_path, monkeypatch):
    done = train(home / "x.npy", tmp_path / "quiet")
    assert "\r" not in done.err
    assert "%" not in done.err
    assert all(line.startswith("pyrodiff: ") for line in done.err.splitlines())
    terminal = Terminal()
    line = ["train", str(home / "x.npy"), "--out", str(tmp_path / "run"), *words(**TINY)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(sys, "stdout", io.StringIO())
        assert cli.main(line) == 0
    assert "6/6" in terminal.getvalue()
    assert "loss" in terminal.getvalue()


def test_a_pipe_that_is_closed_and_a_backend_of_matplotlib_that_is_not_there(home):
    """Neither is an error: one process has both."""
    line = f"{shlex.quote(sys.executable)} -m pyrodiff info {shlex.quote(str(home / 'run'))} | true"
    line = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    environment = {**os.environ, "MPLBACKEND": "nowhere"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_nothing_global_is_changed(home, tmp_path):
    threads, default, mode = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    train(home / "x.npy", tmp_path / "run", train_steps=1)
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == (threads, default, mode)
    assert Metrics.read(tmp_path / "run")
    assert runs.last_checkpoint(tmp_path / "run") is not None


def test_the_checkpoint_of_another_run_is_refused(home, tmp_path):
    other = tmp_path / "other"
    assert train(home / "x.npy", other, hidden=16).code == 0
    before = (other / "samples.npz").read_bytes()
    done = call("sample", other, f"--checkpoint={home / 'run' / 'checkpoints' / 'best.pt'}", "--number=2")
    assert done.is_refused("--hidden")
    assert (other / "samples.npz").read_bytes() == before


def test_data_may_move(home, tmp_path):
    x = tmp_path / "x.npy"
    x.write_bytes((home / "x.npy").read_bytes())
    assert train(x, tmp_path / "run").code == 0
    x.rename(tmp_path / "y.npy")
    assert call("bound", tmp_path / "run").is_refused("data", "there is no")
    assert call("bound", tmp_path / "run", "--data", tmp_path / "y.npy").code == 0
    assert call("train", tmp_path / "y.npy", "--out", tmp_path / "run", "--resume", "--train-steps=8").code == 0
    assert call("bound", tmp_path / "run").code == 0


def test_more_steps_than_the_chain_has_are_refused(home):
    for command, name in (("bound", "--chain-steps"), ("sample", "--sample-steps")):
        assert call(command, home / "run", f"{name}=6").is_refused(name, "at most 5")


def test_the_version(capsys):
    assert call("--version").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_mistake_that_cannot_be_said_has_its_code():
    line = [sys.executable, "-m", "pyrodiff", "train", "swiss-roll", "--T=0"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(line, stderr=full, stdout=subprocess.DEVNULL, timeout=20).returncode == 2
