"""Files on disk: what is written here by struct, gzip and NumPy comes back bit by bit; anything else is refused."""

import bz2
import gzip
import io
import os
import pickle
import re
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pyrodiff
from pyrodiff import datasets

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IDX_TYPES = {  # the format's table: code, how struct writes one number of it, torch's dtype, numbers that use all bytes
    0x08: ("B", torch.uint8, (0, 1, 127, 128, 254, 255)),
    0x09: ("b", torch.int8, (-128, -1, 0, 1, 2, 127)),
    0x0B: ("h", torch.int16, (-32768, -2, 0, 1, 258, 32767)),
    0x0C: ("i", torch.int32, (-(2**31), -2, 0, 1, 16909060, 2**31 - 1)),
    0x0D: ("f", torch.float32, (-1.5, 0.0, 0.1, 2.0**-149, 3.0e38, float("inf"))),
    0x0E: ("d", torch.float64, (-1.5, 0.0, 0.1, 5e-324, 1e308, float("-inf"))),
}
PACKED = {"plain": bytes, "gzipped": gzip.compress}
packed = pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)


def idx_bytes(code, shape, numbers):
    header = struct.pack(">BBBB", 0, 0, code, len(shape)) + b"".join(struct.pack(">I", size) for size in shape)
    return header + b"".join(struct.pack(">" + IDX_TYPES[code][0], number) for number in numbers)


def npy_bytes(numbers, **kwargs):
    buffer = io.BytesIO()
    np.save(buffer, numbers, **kwargs)
    return buffer.getvalue()


def header_bytes(header, version=(1, 0)):
    """The start of a .npy file, from the format's description."""
    text = (str(header) + "\n").encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


def npz_bytes(save=np.savez, **arrays):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def zip_bytes(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_npy", ".npy"), content)
    return buffer.getvalue()


@pytest.fixture
def written(tmp_path):
    """A function that writes bytes into a file and gives its path."""

    def write(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(call, start, *words):
    """Checks that a call raises a ValueError whose message begins with the one and has the other words somewhere."""
    with pytest.raises(ValueError, match="^" + re.escape(start)) as caught:
        call()
    assert not [word for word in words if str(word) not in str(caught.value)], str(caught.value)


def same(x, expected, dtype):
    """The same numbers, shape and dtype."""
    return x.dtype == dtype and x.tolist() == expected


# IDX


@packed
@pytest.mark.parametrize("code", IDX_TYPES, ids=hex)
def test_an_idx_file_of_each_type_comes_back(written, pack, code):
    _, dtype, numbers = IDX_TYPES[code]
    path = written(pack(idx_bytes(code, (2, 3), numbers)))
    expected = torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(2, 3).tolist()
    assert same(datasets.idx(path), expected, dtype)
    assert same(datasets.idx(str(path)), expected, dtype)


@packed
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3), (1, 6, 1), (3, 1, 2, 1), (1,) * 70 + (6,)])
def test_an_idx_file_of_each_shape_comes_back(written, pack, shape):
    numbers = list(range(1, 1 + int(np.prod(shape))))
    x = datasets.idx(written(pack(idx_bytes(0x0B, shape, numbers))))
    assert tuple(x.shape) == shape
    assert x.flatten().tolist() == numbers


def test_the_first_bytes_tell_what_is_gzipped_and_not_the_name(written):
    content = idx_bytes(0x08, (3,), (5, 6, 7))
    assert datasets.idx(written(content, "plain.gz")).tolist() == [5, 6, 7]
    assert datasets.idx(written(gzip.compress(content), "zipped")).tolist() == [5, 6, 7]
    members = gzip.compress(content[:5]) + gzip.compress(content[5:])
    assert datasets.idx(written(members, "two members")).tolist() == [5, 6, 7]


def test_what_is_read_is_the_callers_own(written):
    path = written(idx_bytes(0x08, (3,), (5, 6, 7)))
    datasets.idx(path).zero_()
    assert datasets.idx(path).tolist() == [5, 6, 7]


@packed
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"\0\0\x08", ["IDX", "00 00 08"]),
        (b"\x89PNG\r\n", ["IDX", "89 50 4e 47"]),
        (b"\0\1\x08\1\0\0\0\1\5", ["IDX", "00 01 08 01"]),
        (b"\1\0\x08\1\0\0\0\1\5", ["IDX", "01 00 08 01"]),
        (b"\0\0\x0a\1\0\0\0\1\5", ["type code", "0x08", "0x0e", "0x0a"]),
        (b"\0\0\0\0\0\0\0\0", ["type code", "0x00"]),
        (b"\0\0\x08\2\0\0\0\1\0\0\0", ["8 in all", "cut short", "has 7"]),
        (b"\0\0\x08\0\5", ["dimension", "shape ()"]),
        (b"\0\0\x08\2\0\0\0\3\0\0\0\0", ["element", "shape (3, 0)"]),
        (idx_bytes(0x0B, (2, 3), range(5)), ["12 bytes", "(2, 3)", "int16", "cut short", "10"]),
        (idx_bytes(0x0B, (2, 3), range(6))[:-1], ["12 bytes", "(2, 3)", "int16", "cut short", "11"]),
        (idx_bytes(0x08, (2, 3), ()), ["6 bytes", "(2, 3)", "uint8", "cut short", "has 0"]),
        (idx_bytes(0x0E, (2,), (1.0, 2.0)) + b"\0", ["16 bytes", "(2,)", "float64", "too long", "at least 17"]),
        (idx_bytes(0x08, (2,), range(99)), ["2 bytes", "too long", "at least 3"]),
        (b"\0\0\x0e\xff" + b"\xff" * 1020 + b"\5", ["cut short", "has 1"]),
    ],
)
def test_what_is_not_idx_is_refused(written, pack, content, words):
    path = written(pack(content))
    refused(lambda: datasets.idx(path), "path must be", path, *words)


def test_a_damaged_gzip_file_is_refused(written):
    zipped = gzip.compress(idx_bytes(0x08, (200,), range(200)))
    for size in range(2, len(zipped)):
        path = written(zipped[:size])
        refused(lambda path=path: datasets.idx(path), "path must be", path, "cut short or corrupt")
    for place in (12, len(zipped) - 8, len(zipped) - 1):  # in the data, the checksum, the length
        content = bytearray(zipped)
        content[place] ^= 0xFF
        path = written(bytes(content))
        refused(lambda path=path: datasets.idx(path), "path must be", path, "cut short or corrupt")
    refused(lambda: datasets.idx(written(zipped + b"rest")), "path must be", "cut short or corrupt")


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1, 2**21])
def test_the_end_of_a_long_file_is_looked_at(written, size):
    content = struct.pack(">HBBI", 0, 0x08, 1, size) + bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert int(datasets.idx(written(content)).sum(dtype=torch.int64)) == sum(content[8:])
    refused(lambda: datasets.idx(written(content + b"\0")), "path must be", "too long")
    refused(lambda: datasets.idx(written(content[:-1])), "path must be", "cut short")
    zipped = gzip.compress(content, 1)
    assert len(datasets.idx(written(zipped))) == size
    zipped = zipped[:-8] + bytes([zipped[-8] ^ 1]) + zipped[-7:]  # the checksum
    refused(lambda: datasets.idx(written(zipped)), "path must be", "corrupt")


@pytest.mark.parametrize("read", [datasets.idx, datasets.array])
def test_a_path_without_a_file_is_refused(tmp_path, read):
    missing = tmp_path / "missing"
    refused(lambda: read(missing), "path must be the path of a file", missing, "does not exist")
    refused(lambda: read(tmp_path), "path must be the path of a file", tmp_path, "is a folder")
    (tmp_path / "link").symlink_to(missing)
    refused(lambda: read(tmp_path / "link"), "path must be the path of a file", "does not exist")
    for value in (None, 5, b"name"):
        refused(lambda value=value: read(value), "path must be the path of a file", "a str", repr(value))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: datasets.idx(tmp_path / "pipe"), "path must be", "neither a file nor a folder")


# Folders


IMAGES = {"train": (5, 3, 2), "t10k": (4, 3, 2)}


def contents(prefix):
    """The images and the labels of a split, the bytes that are its files."""
    shape = IMAGES[prefix]
    pixels = [(37 * place + len(prefix)) % 256 for place in range(int(np.prod(shape)))]
    return pixels, {
        "images": idx_bytes(0x08, shape, pixels),
        "labels": idx_bytes(0x08, shape[:1], range(len(prefix), len(prefix) + shape[0])),
    }


def fill(folder, mark="-", end="", pack=bytes):
    for prefix in IMAGES:
        for kind, content in contents(prefix)[1].items():
            rank = {"images": 3, "labels": 1}[kind]
            (folder / f"{prefix}-{kind}{mark}idx{rank}-ubyte{end}").write_bytes(pack(content))
    return folder


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize(("end", "pack"), [("", bytes), (".gz", gzip.compress), (".gz", bytes)])
def test_a_folder_gives_its_images_and_labels(tmp_path, mark, end, pack):
    fill(tmp_path, mark, end, pack)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels, _ = contents(prefix)
        images, labels = (datasets.idx_folder(tmp_path, split, kind) for kind in ("images", "labels"))
        assert images.shape == IMAGES[prefix]
        assert same(images.flatten(), pixels, torch.uint8)
        assert same(labels, list(range(len(prefix), len(prefix) + len(images))), torch.uint8)
        x = pyrodiff.from_levels(images, levels=256)
        assert torch.equal(pyrodiff.to_levels(x, 256), images.long())
    assert torch.equal(datasets.idx_folder(str(tmp_path)), datasets.idx_folder(tmp_path, "train", "images"))


def test_images_need_no_labels_and_labels_no_images(tmp_path):
    fill(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    assert datasets.idx_folder(tmp_path).shape == (5, 3, 2)
    assert datasets.idx_folder(tmp_path, "test", "labels").shape == (4,)


@pytest.mark.parametrize("mark", ["-", "."])
def test_the_plain_file_is_taken_where_the_gzipped_one_is_there_too(tmp_path, mark):
    fill(tmp_path, mark)
    for path in list(tmp_path.iterdir()):
        path.with_name(path.name.replace(mark + "idx", "-idx") + ".gz").write_bytes(b"damaged")
    assert datasets.idx_folder(tmp_path).shape == (5, 3, 2)
    assert datasets.idx_folder(tmp_path, "test", "labels").shape == (4,)


def test_a_folder_of_that_name_is_no_file(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    refused(lambda: datasets.idx_folder(tmp_path), "folder must hold", "holds train-images-idx3-ubyte/")
    fill(tmp_path, end=".gz", pack=gzip.compress)
    assert datasets.idx_folder(tmp_path).shape == (5, 3, 2)


def test_a_folder_without_the_file_is_refused(tmp_path):
    wanted = "train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
    refused(lambda: datasets.idx_folder(tmp_path), "folder must hold", wanted, tmp_path, "holds nothing")
    for letter in "jihgfedcba":
        (tmp_path / letter).touch()
    refused(lambda: datasets.idx_folder(tmp_path), "folder must hold", wanted, "holds a, b, c, d, e, f, g, h, i, j")
    with pytest.raises(ValueError, match=r"i, j$"):
        datasets.idx_folder(tmp_path)
    (tmp_path / "k").touch()
    (tmp_path / "l").touch()
    refused(lambda: datasets.idx_folder(tmp_path), "folder must hold", wanted, "h, i, j and 2 more")
    wanted = "t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"
    refused(lambda: datasets.idx_folder(tmp_path, "test", "labels"), "folder must hold", wanted, "a, b, c")


def test_no_folder_no_split_and_no_kind_are_refused(tmp_path):
    fill(tmp_path)
    missing, file = tmp_path / "missing", tmp_path / "train-images-idx3-ubyte"
    refused(lambda: datasets.idx_folder(missing), "folder must be the path of a folder", missing, "not exist")
    refused(lambda: datasets.idx_folder(file), "folder must be the path of a folder", file, "is a file")
    refused(lambda: datasets.idx_folder(None), "folder must be the path of a folder", "None")
    for split in ("t10k", "validation", None, 5, []):
        words = ("split must be one of train, test", repr(split))
        refused(lambda split=split: datasets.idx_folder(tmp_path, split), *words)
    for kind in ("image", None, 5, []):
        words = ("kind must be one of images, labels", repr(kind))
        refused(lambda kind=kind: datasets.idx_folder(tmp_path, kind=kind), *words)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_as_many_images_as_labels(tmp_path, kind):
    fill(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(0x08, (6,), range(6)))
    words = ("folder must hold as many", tmp_path / "train-images-idx3-ubyte", "5 images", labels, "6 labels")
    refused(lambda: datasets.idx_folder(tmp_path, kind=kind), *words)
    assert len(datasets.idx_folder(tmp_path, "test", kind)) == 4


@packed
@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("images", "images-idx3", idx_bytes(0x08, (5, 6), range(30)), ["uint8 in 3 dimensions", "uint8", "(5, 6)"]),
        ("images", "images-idx3", idx_bytes(0x0C, (5, 3, 2), range(30)), ["uint8 in 3", "int32", "(5, 3, 2)"]),
        ("images", "images-idx3", idx_bytes(0x09, (5, 3, 2), range(30)), ["uint8 in 3", "int8", "(5, 3, 2)"]),
        ("labels", "labels-idx1", idx_bytes(0x08, (5, 1), range(5)), ["uint8 in 1 dimension,", "(5, 1)"]),
        ("labels", "labels-idx1", idx_bytes(0x0C, (5,), range(5)), ["uint8 in 1 dimension,", "int32", "(5,)"]),
        ("images", "labels-idx1", idx_bytes(0x08, (5, 1), range(5)), ["uint8 in 1 dimension,", "(5, 1)"]),
        ("images", "images-idx3", idx_bytes(0x08, (5, 3, 2), range(29)), ["30 bytes", "cut short", "29"]),
        ("images", "images-idx3", idx_bytes(0x08, (5, 3, 2), range(31)), ["30 bytes", "too long", "31"]),
        ("images", "images-idx3", b"", ["an IDX file", "empty"]),
        ("labels", "labels-idx1", b"hello", ["an IDX file", "68 65 6c 6c"]),
    ],
)
def test_files_of_another_kind_in_a_folder_are_refused(tmp_path, pack, kind, name, content, words):
    fill(tmp_path)
    path = tmp_path / f"train-{name}-ubyte"
    path.write_bytes(pack(content))
    refused(lambda: datasets.idx_folder(tmp_path, "train", kind), "folder must hold", path, *words)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_as_many_of_each_class():
    for split, n in (("train", 60_000), ("test", 10_000)):
        images, labels = (datasets.idx_folder(DEBIAN, split, kind) for kind in ("images", "labels"))
        assert images.shape == (n, 28, 28)
        assert labels.bincount().tolist() == [n // 10] * 10


# NumPy's files


TORCH_TYPES = {
    "?": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "u2": torch.int32,
    "u4": torch.int64,
}


def extremes(kind):
    """Six numbers of a dtype in two rows, the least and the greatest among them."""
    dtype = np.dtype(kind)
    if dtype.kind == "b":
        return np.array([[True, False, True], [True, True, False]])
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[info.min, 0, 1], [2, 3, info.max]], dtype)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", TORCH_TYPES)
def test_an_array_of_each_type_comes_back(written, kind, order):
    numbers = extremes(order + kind)
    for content in (npy_bytes(numbers), npz_bytes(x=numbers), npz_bytes(np.savez_compressed, x=numbers)):
        assert same(datasets.array(written(content)), numbers.tolist(), TORCH_TYPES[kind])


@pytest.mark.parametrize("shape", [(1,), (12,), (3, 4), (2, 1, 3, 2)])
def test_an_array_of_each_shape_and_order_comes_back(written, shape):
    numbers = np.arange(12.0)[: np.prod(shape)].reshape(shape)
    for array in (numbers, np.asfortranarray(numbers), numbers[..., ::-1], numbers.T):
        x = datasets.array(written(npy_bytes(array)))
        assert same(x, array.tolist(), torch.float64)
        assert x.is_contiguous()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(written, version):
    header = {"descr": "<i2", "fortran_order": False, "shape": (2, 1)}
    path = written(header_bytes(header, version) + struct.pack("<hh", -3, 258), "name.txt")
    assert same(datasets.array(path), [[-3], [258]], torch.int16)
    assert np.load(path).tolist() == [[-3], [258]]


def test_a_name_chooses_among_the_arrays(written):
    arrays = {"x": extremes("f4"), "y": np.arange(3), "a/b": np.ones((1, 2), bool)}
    for save in (np.savez, np.savez_compressed):
        path = written(npz_bytes(save, **arrays), "name.npy")
        for name, array in arrays.items():
            assert datasets.array(path, name).tolist() == array.tolist()
    assert datasets.array(written(npz_bytes(y=np.arange(3))), "y").tolist() == [0, 1, 2]
    mixed = zip_bytes(readme="hello", y_npy=npy_bytes(np.arange(3)))
    assert datasets.array(written(mixed)).tolist() == [0, 1, 2]


def test_a_name_that_chooses_none_is_refused(written):
    several = written(npz_bytes(images=extremes("u1"), labels=np.arange(7, dtype=">i8")))
    there = ("'images' (2, 3) uint8", "'labels' (7,)", "i8")
    for name in (None, "image", "", "images.npy"):
        refused(lambda name=name: datasets.array(several, name), "name must", several, repr(name), *there)
    one = written(npz_bytes(x=extremes("f8")), "one")
    refused(lambda: datasets.array(one, "y"), "name must", one, "'y'", "'x' (2, 3) float64")
    many = written(npz_bytes(**{f"a{n:02}": np.arange(n + 1) for n in range(13)}), "many")
    refused(lambda: datasets.array(many), "name must", "'a09' (10,) int64 and 3 more")
    alone = written(npy_bytes(np.arange(3)), "alone")
    refused(lambda: datasets.array(alone, "x"), "name must be None", "'x'", alone)
    for name in (0, b"x", ["x"]):
        refused(lambda name=name: datasets.array(several, name), "name must be a str or None", repr(name))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array(["a", "bc"]), ["<U2"]),
        (np.array([b"a", b"bc"]), ["|S2"]),
        (np.array(["2020-01-01"], "M8[D]"), ["datetime64[D]"]),
        (np.array([5], "m8[s]"), ["timedelta64[s]"]),
        (np.array([1 + 2j]), ["complex128"]),
        (np.array([1 + 2j], "c8"), ["complex64"]),
        (np.array([5], "u8"), ["uint64"]),
        (np.zeros(3, [("x", "f4"), ("y", "i8")]), ["'x'"]),
        (np.zeros(3, [("xä", "f4")]), ["'x"]),
        (np.zeros(3, "V4"), ["V4"]),
    ],
)
def test_an_array_of_what_is_no_number_is_refused(written, array, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NumPy's, of names in format 3.0
        contents = (npy_bytes(array), npz_bytes(x=array))
    for content, start in zip(contents, ("path must be", "path must hold"), strict=True):
        path = written(content)
        refused(lambda path=path: datasets.array(path), start, "dtype among bool", path, array.shape, *words)


@pytest.mark.parametrize("array", [np.array(5.0), np.zeros(0), np.zeros((3, 0, 2), "u1")])
def test_an_array_without_a_dimension_or_an_element_is_refused(written, array):
    for content in (npy_bytes(array), npz_bytes(x=array)):
        path = written(content)
        refused(lambda path=path: datasets.array(path), "path must", "element", path, f"shape {array.shape}")


class Harm:
    """What unpickles into a file written."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_run(written, tmp_path):
    harm = np.array([Harm(tmp_path / "harm")], object)
    pickled = pickle.dumps(Harm(tmp_path / "harm"))
    words = ("object", "pickle, which may run code")
    alone = written(npy_bytes(harm, allow_pickle=True), "alone")
    refused(lambda: datasets.array(alone), "path must be", alone, "(1,)", *words)
    archive = written(npz_bytes(x=np.arange(3), y=harm), "archive")
    refused(lambda: datasets.array(archive, "y"), "path must hold", "'y' in", archive, *words)
    refused(lambda: datasets.array(archive), "name must", "'x' (3,) int64, 'y' (1,) object")
    assert datasets.array(archive, "x").tolist() == [0, 1, 2]
    numbers = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    refused(lambda: datasets.array(written(header_bytes(numbers) + pickled)), "path must be", *words)
    refused(lambda: datasets.array(written(pickled)), "path must be a .npy or .npz file", pickled[:8].hex(" "))
    torch.save(torch.ones(3), tmp_path / "torch.pt")
    refused(lambda: datasets.array(tmp_path / "torch.pt"), "path must be", "an .npz file with an array", "data.pkl")
    assert not (tmp_path / "harm").exists()
    np.load(alone, allow_pickle=True)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"hello", ["68 65 6c 6c 6f"]),
        (gzip.compress(b"\x93NUMPY", mtime=0), ["1f 8b"]),
        (b"\x93NUMPY", ["cut short or corrupt"]),
        (b"\x93NUMPY\1\0\x10\0{'descr': '<f8'", ["cut short or corrupt"]),
        (b"\x93NUMPY\x04\0" + npy_bytes(np.arange(3))[8:], ["version (4, 0)"]),
        (header_bytes({"descr": "<f8", "shape": (2,)}) + bytes(16), ["corrupt", "keys"]),
        (header_bytes({"descr": "<q9", "fortran_order": False, "shape": (2,)}) + bytes(16), ["corrupt", "descr"]),
        (header_bytes("(" * 500) + bytes(16), ["corrupt"]),
        (header_bytes("-" * 9000 + "1") + bytes(16), ["corrupt"]),
        (header_bytes({"descr": "<f8", "fortran_order": False, "shape": (-2, -1)}) + bytes(16), ["(-2, -1)"]),
        (npy_bytes(np.arange(6.0).reshape(2, 3))[:-1], ["48 bytes", "(2, 3)", "float64", "cut short", "47"]),
        (npy_bytes(np.arange(6.0).reshape(3, 2).T)[:-8], ["48 bytes", "(2, 3)", "cut short", "40"]),
        (npy_bytes(np.arange(6.0).reshape(2, 3)) + b"\0", ["48 bytes", "(2, 3)", "too long", "at least 49"]),
        (npz_bytes(), ["an .npz file with an array", "holds nothing"]),
        (zip_bytes(readme="hello"), ["an .npz file with an array", "holds readme"]),
        (zip_bytes(x_npy=npy_bytes(np.arange(3))[:-1]), ["'x' in", "cut short", "has 23"]),
        (zip_bytes(x_npy=npy_bytes(np.arange(3)) + b"\0"), ["'x' in", "too long", "at least 25"]),
        (zip_bytes(x_npy=b"hello"), ["'x' in", "cut short or corrupt"]),
        (b"PK\3\4hello", ["cut short or corrupt", "zip"]),
    ],
)
def test_what_numpy_did_not_save_is_refused(written, content, words):
    path = written(content)
    refused(lambda: datasets.array(path), "path must", path, *words)


def test_an_archive_that_asks_for_a_password_or_an_unknown_packing_is_refused(written):
    content = npz_bytes(x=np.arange(3))
    for field, value, word in ((6, 1, "password"), (8, 99, "compression")):
        damaged = bytearray(content)
        for start, shift in ((damaged.index(b"PK\3\4"), 0), (damaged.index(b"PK\1\2"), 2)):
            damaged[start + field + shift] = value
        path = written(bytes(damaged))
        refused(lambda path=path, word=word: datasets.array(path), "path must be", path, "corrupt", word)


def test_an_archive_that_points_beyond_its_end_is_refused(written):
    content = bytearray(npz_bytes(x=np.arange(3)))
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 42, len(content) - 5)
    path = written(bytes(content))
    refused(lambda: datasets.array(path), "path must be", path, "cut short or corrupt")


def test_an_archive_of_any_packing_is_read_and_a_damaged_one_refused(written):
    array = npy_bytes(np.arange(500) % 7)
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", packing) as archive:
            archive.writestr("x.npy", array)
        content = bytearray(buffer.getvalue())
        assert datasets.array(written(bytes(content))).tolist() == [n % 7 for n in range(500)]
        content[content.index(b"PK\1\2") // 2] ^= 0xFF
        path = written(bytes(content))
        refused(lambda path=path: datasets.array(path), "path must", path, "cut short or corrupt")
    refused(lambda: datasets.array(written(bz2.compress(array))), "path must be", "42 5a 68")


# Files of every kind


FILES = {
    "idx": (idx_bytes(0x0B, (2, 3), range(6)), datasets.idx),
    "gzipped idx": (gzip.compress(idx_bytes(0x0B, (2, 3), range(6))), datasets.idx),
    "npy": (npy_bytes(np.arange(6)), datasets.array),
    "npz": (npz_bytes(x=np.arange(6)), datasets.array),
    "packed npz": (npz_bytes(np.savez_compressed, x=np.arange(6), y=np.ones(9)), lambda p: datasets.array(p, "y")),
}


@pytest.mark.parametrize(("content", "read"), FILES.values(), ids=FILES)
def test_a_file_cut_short_anywhere_is_refused(written, content, read):
    for size in range(len(content)):
        path = written(content[:size])
        refused(lambda path=path: read(path), "path must", path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("content", "read"), FILES.values(), ids=FILES)
def test_a_file_with_a_wrong_byte_anywhere_is_read_or_refused(written, content, read):
    for place in range(len(content)):
        for flip in (0x01, 0x10, 0xFF):
            path = written(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            try:
                message = str(path) if read(path).numel() else "nothing"
            except ValueError as error:
                message = str(error)
            assert str(path) in message


HUGE = 2**31
LONG = 2**26
BOMBS = {  # headers that promise far more than there is, and packed data far beyond what their header says
    "idx": (struct.pack(">HBBII", 0, 0x08, 2, HUGE, HUGE) + bytes(9), datasets.idx),
    "gzipped idx": (gzip.compress(struct.pack(">HBBI", 0, 0x0E, 1, HUGE) + bytes(9)), datasets.idx),
    "long gzipped idx": (gzip.compress(struct.pack(">HBBI", 0, 0x08, 1, 9) + bytes(LONG), 1), datasets.idx),
    "npy": (header_bytes({"descr": "|u1", "fortran_order": False, "shape": (HUGE, HUGE)}) + bytes(9), datasets.array),
    "npy header": (b"\x93NUMPY\2\0" + struct.pack("<I", HUGE) + bytes(9), datasets.array),
    "packed npy": (
        zip_bytes(x_npy=header_bytes({"descr": "|u1", "fortran_order": False, "shape": (HUGE,)}) + bytes(9)),
        datasets.array,
    ),
    "long packed npy": (zip_bytes(x_npy=npy_bytes(np.arange(3)) + bytes(LONG)), datasets.array),
    "long packed npy header": (
        zip_bytes(x_npy=b"\x93NUMPY\2\0" + struct.pack("<I", LONG) + bytes(LONG)),
        datasets.array,
    ),
}


@pytest.mark.parametrize(("content", "read"), BOMBS.values(), ids=BOMBS)
def test_no_header_is_believed_further_than_there_are_bytes(written, content, read):
    path = written(content)
    tracemalloc.start()
    try:
        refused(lambda: read(path), "path must", path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**23
