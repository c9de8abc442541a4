"""Data as people have them: floats that stand for something else, labels in names, pictures of any name and size."""

import gzip
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, points, saved, train, without_pictures

from pyrodiff import datasets, readers
from pyrodiff.base.randomness import kept_sources
from pyrodiff.command import data as loading
from pyrodiff.command import grids, models
from pyrodiff.command.plans import prepare
from pyrodiff.command.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:the data have mean")

CPU = torch.device("cpu")
DRAWS = np.random.default_rng(0)
BYTES = DRAWS.integers(0, 256, (60, 4, 4))
SIGNS = 2 * DRAWS.integers(0, 2, (60, 5)) - 1
MEANS, SCALES = (np.array(three).reshape(3, 1, 1) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch.setattr)
    with kept_sources():
        yield


@pytest.fixture
def made(tmp_path):
    """What makes a file of an array, and gives its path."""
    counted = itertools.count()
    return lambda x: str(saved(tmp_path / f"{next(counted)}.npy", x))


def prepared(data, **options):
    return prepare({"data": str(data), **TINY, **options}, CPU)


# Floats that stand evenly

EVEN = {  # what is to be written instead
    "bytes in [0, 1]": ((BYTES / 255).astype("f4"), "--levels 256,"),
    "bytes in [0, 1], divided in float32": (BYTES.astype("f4") / np.float32(255), "--levels 256,"),
    "float32 kept as float64": ((BYTES.astype("f4") / np.float32(255)).astype("f8"), "--levels 256,"),
    "half precision": ((BYTES / 255).astype("f2"), "--levels 256,"),
    "half precision kept as float32": ((BYTES / 255).astype("f2").astype("f4"), "--levels 256,"),
    "bytes in [-1, 1]": ((2 * BYTES / 255 - 1).astype("f4"), "--levels 256,"),
    "dark bytes": ((BYTES // 3 / 255).astype("f4"), "--levels 256,"),
    "few rows of bytes": ((BYTES[:10, 0] / 255).astype("f4"), "--levels 256,"),
    "two bytes": (DRAWS.integers(0, 65536, (60, 4)) / 65535, "--levels 65536,"),
    "quarters": ((BYTES % 5 / 4).astype("f4"), "--levels 5,"),
    "thirds": (BYTES % 4 / 3, "--levels 4,"),
    "halves": ((BYTES % 3 / 2).astype("f2"), "--levels 3,"),
    "whole": (BYTES.astype("f4"), "--levels 256,"),
    "whole, few": (np.arange(10.0), "--levels 10,"),
    "spins": (SIGNS.astype("f4"), "--read-as bits"),
    "half spins": (SIGNS / 2, "--read-as bits"),
    "prices": (DRAWS.uniform(1, 100, (60, 2)).round(2), "whole numbers"),
    "prices of float32": (DRAWS.uniform(1, 100, (60, 2)).round(2).astype("f4"), "whole numbers"),
    "dear prices": (DRAWS.uniform(1, 9999, (60, 2)).round(2), "whole numbers"),
    "whole and negative": (BYTES[:, 0] - 100.0, "whole numbers"),
    "normed bytes": ((BYTES / 255 - 0.1307) / 0.3081, "whole numbers"),
    "bytes normed by channel": ((DRAWS.integers(0, 256, (60, 3, 4, 4)) / 255 - MEANS) / SCALES, "number 0"),
    "a column of counts": (np.stack([DRAWS.normal(size=60), BYTES[:, 0, 0] % 7], 1), "number 1"),
    "a column of spins": (np.stack([DRAWS.normal(size=60), SIGNS[:, 0]], 1), "number 1"),
}


@pytest.mark.parametrize(("x", "way"), EVEN.values(), ids=EVEN)
def test_floats_that_stand_evenly_are_no_density(made, tmp_path, x, way):
    path = made(x)
    assert train(path, tmp_path / "run").is_refused("--read-as must be given", way, "--read-as numbers")
    assert not (tmp_path / "run").exists()
    assert prepared(path, read_as="numbers")[1].form.read_as == "numbers"


LAWS = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "far from 0": lambda draw, shape: draw.normal(size=shape) + 100,
    "uniform": lambda draw, shape: draw.random(shape),
    "of many sizes": lambda draw, shape: draw.lognormal(0, 3, shape),
    "of no mean": lambda draw, shape: draw.standard_cauchy(shape),
    "clipped": lambda draw, shape: draw.normal(0.5, 1, shape).clip(0, 1),
    "rectified": lambda draw, shape: draw.normal(-1, 1, shape).clip(0, None),
    "bytes and noise": lambda draw, shape: (draw.integers(0, 256, shape) + draw.random(shape)) / 256,
    "roots of bytes": lambda draw, shape: np.sqrt(draw.integers(0, 256, shape)),
    "huge": lambda draw, shape: draw.normal(0, 1e12, shape),
}
KEPT = {  # how numbers are kept
    "float64": lambda x: x,
    "float32": lambda x: x.float(),
    "float32, then float64": lambda x: x.float().double(),
    "bfloat16, then float32": lambda x: x.bfloat16().float(),
    "float16": lambda x: x.clamp(-6e4, 6e4).half(),
    "float16, then float32": lambda x: x.clamp(-6e4, 6e4).half().float(),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_real_numbers_are_a_density(law, kept):
    for seed, shape in enumerate([(20, 1), (40, 2), (60, 4, 4), (30, 3, 4, 4), (300, 3)]):
        x = kept(torch.from_numpy(law(np.random.default_rng(seed), shape)))
        if x.abs().max() < 6e4 or kept not in (KEPT["float16"], KEPT["float16, then float32"]):
            grids.refuse_grid(x[: 2**17], lambda x=x: iter([x.double()]), bool((x == x.round()).all()))


def test_numbers_between_the_steps_make_a_density(made):
    x = (BYTES / 255).astype("f4")
    x[:6] += (DRAWS.random((6, 4, 4)) / 255).astype("f4")
    assert prepared(made(x))[1].form.read_as == "numbers"


def test_all_numbers_have_to_stand_evenly_and_not_those_alone_that_are_tried(made):
    x = DRAWS.integers(0, 256, (3000, 64)) / 255
    rows = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[-100:]  # the last of those to learn from
    path = made(np.where(np.isin(np.arange(3000), rows)[:, None], DRAWS.random(x.shape), x))
    assert prepared(path)[1].form.read_as == "numbers"


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize(("scale", "start"), [(1, 0), (1 / 255, 0), (2 / 255, -1)])
def test_floats_are_the_levels_that_they_stand_for(made, scale, start, dtype):
    path = made((BYTES * scale + start).astype(dtype))
    plan, data = prepared(path, levels=256)
    assert (plan.reading.read_as, data.form.levels) == ("levels", 256)
    _, plain = prepared(made(BYTES.astype(np.uint8)))
    for name in ("train", "validation", "test"):
        assert torch.equal(data.split(name), plain.split(name))
    assert prepared(path, levels=256, binarize="threshold")[1].form.read_as == "bits"


def test_a_little_noise_is_not_lost_in_levels(made, tmp_path):
    x = (BYTES % 5 / 4).astype("f4") * 0.99
    assert train(made(x), tmp_path / "run", levels=5).is_refused("--levels must cover")


@pytest.mark.parametrize("levels", [2, 128, 300, 1000])
def test_floats_that_stand_for_other_levels_are_refused(made, tmp_path, levels):
    path = made((BYTES / 255).astype("f4"))
    assert train(path, tmp_path / "run", levels=levels).is_refused("--levels must cover", f"k / {levels - 1}")


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.25, 0.75), (0, 255), (-1, 1), (3, 7)])
def test_two_values_are_bits_where_that_is_asked_for(made, tmp_path, values):
    x = np.where(SIGNS > 0, values[1], values[0])
    _, data = prepared(made(x), read_as="bits")
    _, plain = prepared(made(SIGNS > 0))
    assert torch.equal(data.split("test"), plain.split("test"))
    assert data.form.rate == plain.form.rate
    x[0, 0] = 5
    assert train(made(x), tmp_path / "run", read_as="bits").is_refused("--read-as", "two values")


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8"])
def test_negative_whole_numbers_say_what_to_subtract(made, tmp_path, dtype):
    x = (BYTES[:, 0] % 128 - 100).astype(dtype)
    x[0, :2] = -100, 27
    done = train(made(x), tmp_path / "run")
    assert done.is_refused("the smallest is -100: subtract it", "--levels 128")
    assert prepared(made(x.astype("i8") + 100), levels=128)[1].form.levels == 128
    assert train(made(x), tmp_path / "run", levels=100).is_refused("--levels must cover", "-100", "subtract")


# Pictures of any number of bands and of any size


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 7, 9), (5, 5), (2, 6, 3), (1, 1, 1), (12, 2, 2)])
def test_bands_and_sizes_of_a_unet(made, tmp_path, shape):
    x = DRAWS.integers(0, 256, (30, *shape), dtype=np.uint8)
    x[:, ..., 0] = np.arange(30).reshape(30, *[1] * (len(shape) - 1))
    plan, _ = prepared(made(x), network="unet")
    assert len(plan.model.channels) == 1 + min(
        1, next(n for n in (1, 0) if not any(size % 2**n for size in shape[-2:]))
    )
    assert train(made(x), tmp_path / "run", network="unet").code == 0
    assert Run.opened(tmp_path / "run").form.event_shape == shape


@pytest.mark.parametrize("options", [{}, {"channels": (4, 8)}, {"attention": (4,)}])
def test_what_is_no_picture_is_refused_by_a_unet(made, tmp_path, options):
    for shape in ((4,), (8,), (2, 4, 4, 4)):
        done = train(made(DRAWS.normal(size=(30, *shape))), tmp_path / "run", network="unet", **options)
        assert done.is_refused("--network must be mlp for data of shape")


def test_too_many_halvings_of_an_odd_size(made, tmp_path):
    x = DRAWS.integers(0, 256, (30, 3, 7, 9), dtype=np.uint8)
    assert train(made(x), tmp_path / "run", network="unet", channels=(4, 8)).is_refused("--channels", "7 x 9")
    assert train(made(x), tmp_path / "run", channels=(4, 8)).is_refused("--channels", "--network mlp")


# Folders


def idx(path, x):
    header = bytes([0, 0, 8, x.ndim]) + b"".join(size.to_bytes(4, "big") for size in x.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + x.tobytes()) if path.suffix == ".gz" else header + x.tobytes())


def mnist(folder, end=""):
    x = DRAWS.integers(0, 256, (40, 4, 4), dtype=np.uint8)
    idx(folder / f"train-images-idx3-ubyte{end}", x[:30])
    idx(folder / f"t10k-images-idx3-ubyte{end}", x[30:])
    return x


@pytest.mark.parametrize("inner", ["", "raw", "MNIST/raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_are_found_where_torchvision_puts_them(tmp_path, inner, end):
    x = mnist(tmp_path / "root" / inner, end)
    (tmp_path / "root" / inner / "notes.txt").touch()
    assert datasets.idx_folder(tmp_path / "root", "test").tolist() == x[30:].tolist()
    _, data = prepared(tmp_path / "root")
    assert data.parts["test"][:].tolist() == x[30:].tolist()
    assert data.form.contents == "27 train, 3 validation, 10 test; 1 passed over: notes.txt"


def test_several_sets_of_idx_files_are_refused(tmp_path):
    for name in ("MNIST", "KMNIST"):
        mnist(tmp_path / "root" / name / "raw")
    words = ("one set of IDX files", "KMNIST/raw", "root/MNIST/raw", "name one")
    assert train(tmp_path / "root", tmp_path / "run").is_refused(*words)
    assert prepared(tmp_path / "root" / "MNIST")[1].form.event_shape == (4, 4)


FORMATS = [*("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")]


def test_pictures_are_known_by_their_first_bytes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    for number, kind in enumerate(FORMATS * 2):
        name = f"a/{number:02}" + ("" if number < len(FORMATS) else ".dat")
        image.fromarray(np.full((4, 4, 3), 10 * number, np.uint8)).save(folder / name, kind)
    for name in (".DS_Store", "a/readme.md", "a/labels.csv", "a/empty"):
        (folder / name).write_text("BMW, P5 and GIF: what is in here" * (name != "a/empty"))
    (folder / ".git").mkdir()
    found, others = readers.picture_files(folder)
    assert len(found) == 2 * len(FORMATS)
    assert others == [".DS_Store", ".git/", "a/empty", "a/labels.csv", "a/readme.md"]
    _, data = prepared(folder)
    contents = "12 train, 1 validation, 1 test; 5 passed over: .DS_Store, .git/, a/empty, a/labels.csv, a/readme.md"
    assert data.form.contents == contents
    assert type(data.form).of(data.form.plain()).contents == contents


def test_what_is_passed_over_is_named_in_text_that_can_be_printed(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number in range(10):
        image.fromarray(np.full((4, 4), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
    for number in range(8):
        Path(str(tmp_path).encode().decode(), b"x\xff%d".decode("utf-8", "surrogateescape") % number).touch()
    contents = prepared(tmp_path)[1].form.contents
    assert contents.startswith("8 train, 1 validation, 1 test; 8 passed over: x")
    assert contents.endswith("4, ...")
    contents.encode()


# Labels, as they are read


def labelled(data, **options):
    return prepared(data, labels=True, **options)


def known(data):
    """Each datum with its label, from all parts."""
    parts = data.parts.values()
    return {(bytes(x.numpy()), int(y)) for part in parts for x, y in zip(part[:], *part.context(), strict=True)}


def test_labels_beside_an_array(tmp_path):
    x, y = BYTES.astype(np.uint8), DRAWS.integers(0, 4, 60)
    np.savez(tmp_path / "x.npz", x=x, y=y, z=x[::-1])
    expected = {(bytes(one), int(label)) for one, label in zip(x, y, strict=True)}
    plan, data = labelled(tmp_path / "x.npz")
    assert known(data) == expected
    assert data.form.classes == 4
    assert known(labelled(tmp_path / "x.npz", array="z")[1]) == {
        (bytes(one), int(label)) for one, label in zip(x[::-1], y, strict=True)
    }
    x_0, drawn = data.draw(50)
    assert {
        (bytes(one.numpy()), int(label)) for one, label in zip(data.form.decoded(x_0), drawn, strict=True)
    } <= expected
    assert [len(one) for one in next(iter(data.batches("test", 3)))] == [3, 3]
    assert prepared(tmp_path / "x.npz", array="x")[1].draw(5)[1:] == ()
    diffusion = models.build(plan, data.form)
    assert diffusion.reverse(x_0, 2, drawn).batch_shape[0] == 50


@pytest.mark.parametrize("y", [np.zeros(59, int), np.zeros(60), np.zeros((60, 1), int), np.full(60, -1)])
def test_what_are_no_labels_is_refused(tmp_path, y):
    np.savez(tmp_path / "x.npz", x=BYTES.astype(np.uint8), y=y)
    with pytest.raises(ValueError, match="labels must be"):
        labelled(tmp_path / "x.npz")


def test_data_without_labels_are_refused_where_they_are_asked_for(tmp_path, made):
    mnist(tmp_path / "idx")
    np.savez(tmp_path / "x.npz", x=BYTES)
    for data in (tmp_path / "idx", tmp_path / "x.npz", made(points()), "digits"):
        with pytest.raises(ValueError, match=r"labels|'y'"):
            labelled(data)


def test_labels_of_idx_files_and_of_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    x, y = mnist(tmp_path / "idx"), DRAWS.integers(0, 3, 40, dtype=np.uint8)
    idx(tmp_path / "idx" / "train-labels-idx1-ubyte", y[:30])
    idx(tmp_path / "idx" / "t10k-labels-idx1-ubyte.gz", y[30:])
    for number, (one, label) in enumerate(zip(x, y, strict=True)):
        (tmp_path / "folders" / "abc"[label]).mkdir(parents=True, exist_ok=True)
        image.fromarray(one).save(tmp_path / "folders" / "abc"[label] / f"{number}.png")
    expected = {(bytes(one), int(label)) for one, label in zip(x, y, strict=True)}
    for name in ("idx", "folders"):
        _, data = labelled(tmp_path / name)
        assert known(data) == expected
        assert data.form.classes == 3
        assert data.form.fingerprint != prepared(tmp_path / name)[1].form.fingerprint


# Memory


def test_an_array_is_left_in_its_file(tmp_path):
    path = saved(tmp_path / "x.npy", BYTES.astype("f4"))
    x = datasets.array(path, mapped=True)
    assert torch.equal(x, datasets.array(path))
    x.zero_()
    assert datasets.array(path).any(), "what is written is written to the tensor alone"
    content = path.read_bytes()
    for wrong, word in ((content[:-1], "cut short"), (content + b"0", "too long")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=word):
            datasets.array(path, mapped=True)
    for other in (BYTES.astype(">f4"), BYTES.astype("u2"), np.asfortranarray(BYTES)):
        np.save(path, other)
        assert datasets.array(path, mapped=True).tolist() == other.tolist()


def test_parts_share_what_is_held(made):
    _, data = prepared(made(BYTES.astype(np.uint8)))
    assert len({part.whole.data_ptr() for part in data.parts.values()}) == 1
    assert data.parts["train"].whole.dtype == torch.uint8


def test_data_are_looked_at_in_blocks(made, monkeypatch):
    """A block is a row, and nothing but the speed is another."""
    path = {kind: made(x) for kind, x in (("numbers", points()), ("levels", BYTES.astype(np.uint8)))}
    known = {kind: prepared(path[kind])[1] for kind in path}
    monkeypatch.setattr(loading.Part, "blocks", lambda self: (self[i : i + 1] for i in range(len(self))))
    for kind, data in known.items():
        _, again = prepared(path[kind])
        assert again.form.fingerprint == data.form.fingerprint
        assert torch.equal(again.split("test"), data.split("test")) or kind == "numbers"
        torch.testing.assert_close(again.split("train"), data.split("train"), rtol=1e-6, atol=1e-6)
    assert torch.equal(known["levels"].often(), prepared(path["levels"])[1].often())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells the peak")
def test_the_benchmark_of_memory_runs():
    script = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    done = subprocess.run(
        [sys.executable, str(script), "--number", "100", "--only", "bytes.npy"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "\nbytes.npy " in done.stdout


# Files that change


def test_a_mapped_file_that_is_cut_short_is_refused_by_whatever_reads_it(tmp_path):
    path = saved(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20000, 4)))
    data = prepared(path)[1]
    with path.open("ab") as file:
        file.write(bytes(100))
    data.draw(4)  # more is no harm
    os.truncate(path, 10000)  # to look behind this, page by page, would be a SIGBUS
    for read in (lambda: data.draw(4), lambda: data.split("test"), lambda: list(data.raw("train", 9).blocks())):
        with pytest.raises(ValueError, match="has become shorter") as caught:
            read()
        assert caught.value.argument == "data"


def test_what_is_no_longer_in_its_file_needs_no_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 4))
    np.savez(tmp_path / "x.npz", x=x)
    data = prepared(tmp_path / "x.npz")[1]
    os.truncate(tmp_path / "x.npz", 0)
    assert data.draw(4)[0].shape == (4, 4)


def test_labels_are_refused_that_a_network_has_no_place_for(tmp_path):
    for greatest in (2**16, 2**40):
        np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(40, 2)), y=[greatest] + 39 * [0])
        with pytest.raises(ValueError, match=f"below 65536, but the greatest is {greatest}"):
            prepared(tmp_path / "x.npz", labels=True)
