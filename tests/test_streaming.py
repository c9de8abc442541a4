"""Batches of a data set, drawn by their number: which data, in what order, by which process, and what is left of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, StackDataset, TensorDataset

import pyrodiff
from pyrodiff.streaming import ArrayFile, Blocks, PictureFolder, Stream

X = torch.arange(40).reshape(20, 2)


class Noisy(Dataset):
    """Items that are drawn, from all three sources."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        return {"i": i, "drawn": torch.rand(2), "numpy": np.random.rand(), "python": random.random()}


class Broken(Dataset):
    """A data set of which one item cannot be had."""

    def __len__(self):
        return 9

    def __getitem__(self, i):
        if i == 7:
            raise KeyError("no such file")
        return torch.tensor(i)


class Together(Broken):
    """The same, that gives items together."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def same(a, b):
    """Whether two batches are equal, number by number and dtype by dtype."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b)


def state():
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


@pytest.fixture
def file(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    return tmp_path / "x.npy"


@pytest.mark.parametrize("kind", ["tensor", "array", "mapped", "file", "tuples", "noisy"])
def test_a_batch_is_the_same_whoever_reads_it_and_wherever_one_begins(kind, file):
    dataset = {
        "tensor": X,
        "array": X.numpy(),
        "mapped": np.load(file, mmap_mode="r"),
        "file": ArrayFile(file),
        "tuples": TensorDataset(X, X[:, 0] % 3),
        "noisy": Noisy(),
    }[kind]
    one_by_one = [Stream(dataset, 6, seed=3).batch(number) for number in range(5)]
    for num_workers in (0, 1, 2):
        stream = Stream(dataset, 6, seed=3, num_workers=num_workers)
        assert same(list(stream.batches(until=5)), one_by_one)
        assert same(list(stream.batches(start=3, until=5)), one_by_one[3:])
        rest = stream.batches(start=1)
        assert same([next(rest), next(rest)], one_by_one[1:3])
        rest.close()
    assert not same(one_by_one[0], one_by_one[1])


def test_a_batch_holds_the_rows_that_its_indices_say():
    stream = Stream(X, 6, seed=3)
    for number in range(4):
        indices = stream.indices(number)
        assert indices.shape == (6,)
        assert torch.equal(stream.batch(number), X[indices])


def test_draws_are_uniform_and_independent_and_others_by_every_part_of_the_key(monkeypatch):
    """Counts of 20,000 draws against the multinomial law, and pairs of neighbouring batches against independence."""
    stream = Stream(torch.arange(7), 4, seed=11)
    drawn = torch.stack([stream.batch(number) for number in range(5000)])
    expected = 20_000 / 7
    assert float(((drawn.flatten().bincount() - expected) ** 2 / expected).sum()) < 6 + 5 * 12**0.5  # chi squared, 6
    pairs = (7 * drawn[:-1, 0] + drawn[1:, 0]).bincount(minlength=49)
    expected = 4999 / 49
    assert float(((pairs - expected) ** 2 / expected).sum()) < 48 + 5 * 96**0.5
    large = [Stream(torch.arange(10**6), 4, seed=seed).batch(number) for seed in (0, 1) for number in (0, 1)]
    monkeypatch.setattr("pyrodiff.base.ranks.number", lambda: 1)
    large.append(Stream(torch.arange(10**6), 4).batch(0))
    assert len({tuple(batch.tolist()) for batch in large}) == 5


def test_which_data_are_drawn_does_not_change_with_a_version():
    """NumPy promises the bits of its generators, so these numbers hold for good."""
    raw = np.random.PCG64(np.random.SeedSequence(5, spawn_key=(0, 2))).random_raw(3)
    assert Stream(torch.arange(1000), 3, seed=5).batch(2).tolist() == [int(bits) % 1000 for bits in raw]
    assert Stream(torch.arange(1000), 3, seed=5).batch(2).tolist() == [329, 414, 167]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_items_draw_leaves_the_sources_of_this_process_alone(num_workers):
    before = state()
    list(Stream(Noisy(), 4, num_workers=num_workers).batches(until=3))
    list(Blocks(Noisy(), 20, num_workers=num_workers))
    assert state() == before


def test_what_items_draw_differs_from_batch_to_batch():
    found = torch.cat([batch["drawn"] for batch in Stream(Noisy(), 4).batches(until=10)])
    assert len(found.unique()) == 80
    again = Stream(Noisy(), 4, seed=1).batch(0)
    assert not same(again["drawn"], found[:4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_blocks_have_each_datum_once_in_order(num_workers, file):
    for dataset in (X, ArrayFile(file), X.numpy()):
        blocks = Blocks(dataset, 6, num_workers=num_workers)
        assert [len(block) for block in blocks] == [6, 6, 6, 2]
        assert len(blocks) == 4
        assert torch.equal(torch.cat(list(blocks)), X)
    assert same(list(Blocks(Noisy(), 20, num_workers=num_workers)), list(Blocks(Noisy(), 20)))


def test_a_bound_of_blocks_is_that_of_the_data():
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(5))
    torch.manual_seed(0)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,), hidden=4))
    diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
    x_0 = pyrodiff.datasets.swiss_roll(30)
    whole = pyrodiff.bound(diffusion, x_0, generator=0)
    assert torch.allclose(pyrodiff.bound(diffusion, Blocks(x_0, 7), generator=0).nats, whole.nats, atol=1e-5)


def test_training_that_is_resumed_is_the_training_that_was_not_cut(tmp_path, file):
    """From a checkpoint, with another number of processes, the losses of the uncut run to the last bit."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(20))

    def made():
        torch.manual_seed(0)
        reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,), hidden=4))
        pair = pyrodiff.Diffusion(forward, reverse, event_shape=(2,)).one_step()
        return pyrodiff.SVI(pair.model, pair.guide, torch.optim.Adam, pyrodiff.DiffusionELBO())

    def train(svi, stream, start, until):
        return [float(svi.step((batch / 40).float())) for batch in stream.batches(start, until)]

    uncut = train(made(), Stream(X, 4, seed=2), 0, 8)
    svi = made()
    first = train(svi, Stream(ArrayFile(file), 4, seed=2, num_workers=2), 0, 5)
    pyrodiff.checkpoints.save(tmp_path / "run.pt", svi, batches=5)
    again = made()
    start = pyrodiff.checkpoints.restore(tmp_path / "run.pt", again)["batches"]
    assert first + train(again, Stream(ArrayFile(file), 4, seed=2, num_workers=1), start, 8) == uncut


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [Broken(), Together()], ids=["one by one", "together"])
def test_an_item_that_cannot_be_had_is_named(dataset, num_workers):
    stream = Stream(dataset, 3, seed=1, num_workers=num_workers)
    bad = next(number for number in range(100) if 7 in stream.indices(number))
    assert len(list(stream.batches(until=bad))) == bad
    with pytest.raises(pyrodiff.ArgumentError, match="its 9 items, but item 7 cannot be had: KeyError: 'no such file'"):
        list(stream.batches(start=bad, until=bad + 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_items_that_differ_are_refused(num_workers):
    with pytest.raises(pyrodiff.ArgumentError, match=r"items 0, 1, 2, 3 do not: RuntimeError: stack expects"):
        list(Blocks([torch.zeros(2)] * 3 + [torch.zeros(3)], 4, num_workers=num_workers))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": Endless()}, "dataset must be a map-style data set"),
        ({"dataset": iter([1])}, "dataset must be a map-style data set"),
        ({"dataset": "x.npy"}, "dataset must be a map-style data set"),
        ({"dataset": X[:0]}, "dataset must have an item at least"),
        ({"dataset": torch.tensor(1)}, "dataset must have an item at least"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1"),
        ({"batch_size": 2.0}, "batch_size must be an int of at least 1"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"num_workers": True}, "num_workers must be an int of at least 0"),
        ({"in_order": False}, "in_order must be an option among"),
        ({"generator": torch.Generator()}, "generator must be an option among"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(arguments, message):
    given = {"dataset": X, "batch_size": 4, **arguments}
    with pytest.raises(pyrodiff.ArgumentError, match=message):
        Stream(given.pop("dataset"), given.pop("batch_size"), **given)


def test_numbers_of_batches_are_checked_at_once():
    stream = Stream(X, 4)
    for call in (stream.batch, stream.indices, stream.batches):
        with pytest.raises(pyrodiff.ArgumentError, match="must be an int of at least 0, but it is -1"):
            call(-1)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "uint16", "bool", "float64", ">f4"])
def test_a_file_of_rows_gives_what_reading_all_of_it_gives(dtype, tmp_path):
    x = np.arange(24).reshape(4, 3, 2).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    rows, whole = ArrayFile(tmp_path / "x.npy"), pyrodiff.datasets.array(tmp_path / "x.npy")
    assert same(torch.stack([rows[i] for i in range(4)]), whole)
    assert same(Stream(rows, 5).batch(0), whole[Stream(rows, 5).indices(0)])
    assert rows.shape == (4, 3, 2)
    with pytest.raises(IndexError):
        rows[4]


def test_a_file_of_numbers_one_a_datum(tmp_path):
    np.save(tmp_path / "y.npy", np.arange(5))
    labels = ArrayFile(tmp_path / "y.npy")
    assert same(labels[2], torch.tensor(2))
    x, y = Stream(StackDataset(X[:5], labels), 3).batch(0)
    assert torch.equal(x[:, 0], 2 * y)


def test_files_that_have_no_rows_to_read_are_refused(tmp_path, file):
    np.savez(tmp_path / "x.npz", x=X.numpy())
    with pytest.raises(pyrodiff.ArgumentError, match="save its array by itself"):
        ArrayFile(tmp_path / "x.npz")
    np.save(tmp_path / "turned.npy", np.asfortranarray(X.numpy()))
    with pytest.raises(pyrodiff.ArgumentError, match="first index runs fastest"):
        ArrayFile(tmp_path / "turned.npy")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(pyrodiff.ArgumentError, match="a pickle"):
        ArrayFile(tmp_path / "object.npy")
    content = file.read_bytes()
    for wrong, message in (
        (content[:-1], "is cut short and has 319"),
        (content + b"1", "too long and has at least 321"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(pyrodiff.ArgumentError, match=message):
            ArrayFile(file)


def test_a_file_that_becomes_shorter_is_refused(file):
    rows = ArrayFile(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(pyrodiff.ArgumentError, match="has become shorter"):
        list(Blocks(rows, 20))


@pytest.fixture
def pictures(tmp_path):
    """Five pictures in two sub-folders, the first and the last coloured."""
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(["a/0", "a/1", "a/2", "b/0", "b/1"]):
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        image.fromarray(levels if number in (0, 4) else levels[..., 0]).save(path)
    return tmp_path / "pictures"


def test_a_folder_of_pictures_gives_what_reading_all_of_it_gives(pictures):
    whole = pyrodiff.datasets.image_folder(pictures)
    labels = pyrodiff.datasets.image_folder(pictures, "labels")
    for num_workers in (0, 2):
        assert torch.equal(torch.cat(list(Blocks(PictureFolder(pictures), 2, num_workers=num_workers))), whole)
    x, y = next(iter(Blocks(PictureFolder(pictures, labels=True), 5)))
    assert same(x, whole)
    assert same(y, labels)
    (pictures / "a/0.png").unlink()
    (pictures / "b/1.png").unlink()
    (pictures / "notes.txt").write_text("none")
    folder = PictureFolder(pictures)
    assert torch.equal(torch.cat(list(Blocks(folder, 2))), pyrodiff.datasets.image_folder(pictures))
    assert folder.shape == (4, 6)
    assert folder.passed_over == ["notes.txt"]
    assert torch.equal(PictureFolder(pictures, colour=True)[0], folder[0].expand(3, 4, 6))


def test_a_picture_that_does_not_fit_is_named_when_it_is_asked_for(pictures):
    from PIL import Image

    Image.new("RGB", (5, 4)).save(pictures / "b/0.png")
    (pictures / "a/1.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    folder = PictureFolder(pictures)
    for i, message in ((1, r"a/1\.png"), (3, r"0\.png is 6 x 4 and .*b/0\.png is 5 x 4; resize")):
        with pytest.raises(pyrodiff.ArgumentError, match=message):
            folder[i]
    with pytest.raises(pyrodiff.ArgumentError, match=r"items, but item 1 cannot be had: ArgumentError: folder must"):
        list(Blocks(folder, 5))
    with pytest.raises(pyrodiff.ArgumentError, match="is coloured: give colour=True"):
        PictureFolder(pictures, colour=False)
    (pictures / "a/0.png").unlink()
    (pictures / "a/1.png").unlink()
    with pytest.raises(pyrodiff.ArgumentError, match=r"b/1\.png is coloured: give colour=True"):
        PictureFolder(pictures)[2]


SCRIPT = """
import json, multiprocessing, os, signal, sys
import torch
from pyrodiff.streaming import Stream

lives = {}
for how in sys.argv[1:]:  # this process has imported everything: each that it parts into leads a group, and reads
    lives[how] = os.fork()
    if lives[how] == 0:
        os.setsid()
        for descriptor, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{how}.{end}", os.O_WRONLY | os.O_CREAT), descriptor)
        break
else:
    print(json.dumps(lives), flush=True)
    print(json.dumps({how: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for how, pid in lives.items()}))
    sys.exit()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
batches = Stream(torch.arange(100), 4, num_workers=2).batches()
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if how == "exits":
    sys.exit(3)
if how == "raises":
    raise ValueError("of its own")
while True:
    next(batches)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").split()[2] != "Z" if os.path.isdir("/proc") else True


def awaited(what, seconds):
    """What a call gives once it is true, or when so many seconds have passed."""
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


SENT = {
    "exits": None,
    "raises": None,
    "interrupted": signal.SIGINT,
    "interrupted with its group": signal.SIGINT,
    "terminated": signal.SIGTERM,
    "killed": signal.SIGKILL,
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Of processes that end in each way while two others read for them: the code, the last words, and the readers."""
    folder = tmp_path_factory.mktemp("ends")
    environment = {**os.environ, "PYTHONPATH": str(Path(pyrodiff.__file__).parents[1])}
    line = [sys.executable, "-c", SCRIPT, *SENT]
    parent = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
    lives, readers = json.loads(parent.stdout.readline()), {}
    for how, pid in lives.items():
        said = folder / f"{how}.out"
        assert awaited(lambda said=said: said.exists() and said.read_text().endswith("\n"), 60), how
        readers[how] = [int(one) for one in said.read_text().split()]
        if SENT[how]:  # to its group, which it leads, or to it alone
            (os.killpg if how.endswith("group") else os.kill)(pid, SENT[how])
    codes = json.loads(parent.communicate(timeout=60)[0])
    return {how: (codes[how], (folder / f"{how}.err").read_text().strip(), readers[how]) for how in lives}


@pytest.mark.parametrize("how", SENT)
def test_no_process_is_left_behind(ends, how):
    code, said, readers = ends[how]
    assert code == {"exits": 3, "raises": 1}.get(how, -(SENT[how] or 0))
    words = {"exits": "", "raises": "of its own", "terminated": "", "killed": ""}
    assert said.endswith(words.get(how, "KeyboardInterrupt"))
    assert len(readers) == 2  # each looks every five seconds whether the one it reads for is there
    assert awaited(lambda: not any(map(alive, readers)), 12)


def test_processes_end_with_the_iterator():
    import multiprocessing

    batches = Stream(X, 4, num_workers=2).batches()
    next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    assert len(workers) == 2
    batches.close()
    assert not any(map(alive, workers))
