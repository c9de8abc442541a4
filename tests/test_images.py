"""Folders of pictures: what Pillow writes from an array comes back level by level; anything doubtful is refused."""

import builtins
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import pyrodiff
from pyrodiff import datasets

GREY = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2 + 3], -1)


def write(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def refused(folder, *words, kind="images"):
    with pytest.raises(ValueError, match=r"^folder must") as caught:
        datasets.image_folder(folder, kind)
    assert not [word for word in words if str(word) not in str(caught.value)], str(caught.value)


def png(kind, depth, raw, *chunks, size=(4, 3)):
    """The bytes of a PNG file, from the format's description."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("end", [".png", ".bmp", ".PNG", ".tif", ".tiff", ".gif", ".pgm", ".pnm"])
def test_grey_pictures_come_back(tmp_path, end):
    arrays = [GREY, GREY[::-1].copy(), 255 - GREY]
    options = {"format": "TIFF"} if end.startswith(".tif") else {}
    for number, array in enumerate(arrays):
        write(tmp_path / f"{number}{end}", array, **options)
    x = datasets.image_folder(str(tmp_path))
    assert x.dtype == torch.uint8
    if end == ".gif":  # whose pictures have a palette, of greys here
        assert torch.equal(x[:, 0], x[:, 2])
        x = x[:, 1]
    assert x.tolist() == [array.tolist() for array in arrays]
    levels = pyrodiff.to_levels(pyrodiff.from_levels(x, levels=256), 256)
    assert torch.equal(levels, x.long())


@pytest.mark.parametrize("end", [".png", ".bmp", ".tiff", ".ppm"])
def test_coloured_pictures_come_back(tmp_path, end):
    arrays = [COLOUR, COLOUR[::-1].copy()]
    for number, array in enumerate(arrays):
        write(tmp_path / f"{number}{end}", array)
    x = datasets.image_folder(tmp_path)
    assert x.shape == (2, 3, 3, 4)
    assert x.is_contiguous()
    assert x.permute(0, 2, 3, 1).tolist() == [array.tolist() for array in arrays]


@pytest.mark.parametrize(("end", "options"), [(".jpg", {"quality": 95}), (".jpeg", {}), (".webp", {"lossless": True})])
def test_what_is_packed_with_a_loss_is_as_pillow_unpacks_it(tmp_path, end, options):
    path = write(tmp_path / f"a{end}", np.repeat(np.repeat(COLOUR, 4, 0), 4, 1), **options)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).tolist()
    assert datasets.image_folder(tmp_path).permute(0, 2, 3, 1)[0].tolist() == expected


def test_every_way_to_have_pixels_is_given_as_levels(tmp_path):
    """Each is the same picture of 0 and 255: grey stays grey, but a palette or a coloured one makes all coloured."""
    bits = (GREY > 100).astype(np.uint8) * 255
    opaque = np.stack([bits, np.full_like(bits, 255)], -1)
    write(tmp_path / "1.png", bits > 0)
    write(tmp_path / "2.png", bits)
    write(tmp_path / "3.png", opaque)
    raw = b"".join(b"\0" + bytes((np.packbits(row[None] > 0)).tolist()) for row in bits)
    (tmp_path / "4.png").write_bytes(png(0, 1, raw))
    expected = torch.from_numpy(bits).expand(4, 3, 4)
    assert torch.equal(datasets.image_folder(tmp_path), expected)
    write(tmp_path / "5.png", bits, "RGB")
    write(tmp_path / "6.png", bits, "P")
    write(tmp_path / "7.png", bits, "RGBA")
    with Image.open(tmp_path / "6.png") as image:
        assert image.mode == "P"
    coloured = torch.from_numpy(bits).expand(7, 3, 3, 4)
    assert torch.equal(datasets.image_folder(tmp_path), coloured)
    indices = b"".join(b"\0" + bytes((row // 255).tolist()) for row in bits)
    palette = (b"PLTE", bytes([9, 8, 7, 200, 100, 50]))
    (tmp_path / "8.png").write_bytes(png(3, 8, indices, palette, (b"tRNS", bytes([255, 255]))))
    found = datasets.image_folder(tmp_path)[7]
    for channel, (low, high) in enumerate(((9, 200), (8, 100), (7, 50))):
        assert found[channel].tolist() == np.where(bits > 0, high, low).tolist()


def test_the_order_is_that_of_names_folder_by_folder_and_labels_are_in_it(tmp_path):
    names = [
        "b/2.png",
        "b/10.png",
        "a/z.png",
        "a/y/q.png",
        "c-d/.hidden.png",
        "c-d/0.png",
        ".git/a.png",
        "a/_.txt",
        "c/9.png",
    ]
    for number, name in enumerate(names):
        path = write((tmp_path / name).with_suffix(".png"), np.full((2, 2), number, np.uint8))
        path.rename(tmp_path / name)
    (tmp_path / "a" / "_.txt").write_text("no picture")
    assert datasets.image_folder(tmp_path)[:, 0, 0].tolist() == [3, 2, 1, 0, 8, 5]
    labels = datasets.image_folder(tmp_path, "labels")
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 1, 1, 2, 3]


def test_the_first_bytes_tell_the_format_and_not_the_name(tmp_path):
    write(tmp_path / "a.jpg", GREY, format="PNG")
    assert datasets.image_folder(tmp_path)[0].tolist() == GREY.tolist()


def test_folders_without_pictures_are_refused(tmp_path):
    refused(tmp_path / "missing", "the path of a folder", tmp_path / "missing", "does not exist")
    refused(None, "the path of a folder", "None")
    refused(write(tmp_path / "x" / "a.png", GREY), "the path of a folder", "is a file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "names end in .png, .jpg", empty, "holds nothing")
    (empty / "inner").mkdir()
    (empty / "inner" / "notes.txt").touch()
    (empty / "labels.csv").touch()
    refused(empty, empty, "holds inner/, inner/notes.txt, labels.csv")
    for kind in ("image", None):
        with pytest.raises(ValueError, match=f"kind must be one of 'images', 'labels', but it is {kind!r}"):
            datasets.image_folder(tmp_path, kind)


def test_pictures_of_another_size_are_refused(tmp_path):
    paths = [write(tmp_path / f"{n}.png", np.zeros((3, 4 + (n > 1)), np.uint8)) for n in range(4)]
    refused(tmp_path, "of one size", f"{paths[0]} is 4 x 3", f"{paths[2]} is 5 x 3", "resize them first")


def test_labels_need_a_sub_folder_for_each_picture_and_a_picture_in_each(tmp_path):
    write(tmp_path / "a" / "1.png", GREY)
    loose = write(tmp_path / "2.png", GREY)
    assert len(datasets.image_folder(tmp_path)) == 2
    refused(tmp_path, "sub-folders alone", "1 of 2", loose, kind="labels")
    loose.unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / ".c").mkdir()
    refused(tmp_path, "a picture each", tmp_path, "none in b", kind="labels")
    write(tmp_path / "b" / "inner" / "1.png", GREY)
    assert datasets.image_folder(tmp_path, "labels").tolist() == [0, 1]


def noisy(path, **options):
    array = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return write(path, array, **options).read_bytes()


DOUBTFUL = {
    "text": ("a.png", b"hello you", ["is none", "68 65 6c 6c 6f"]),
    "nothing": ("a.jpg", b"", ["is empty"]),
    "a program of PostScript": (
        "a.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        ["is none", "25 21 50 53"],
    ),
    "16 bits of grey": ("a.png", png(0, 16, (b"\0" + bytes(8)) * 3), ["16 bits a channel", "8 bits first"]),
    "16 bits of grey and alpha": ("a.png", png(4, 16, (b"\0" + bytes(16)) * 3), ["16 bits a channel"]),
    "16 bits of colour": ("a.png", png(2, 16, (b"\0" + bytes(24)) * 3), ["16 bits a channel"]),
    "16 bits of PPM": ("a.ppm", b"P6 2 2 65535\n" + bytes(24), ["16 bits a channel"]),
    "more than 8 bits of PGM": ("a.pgm", b"P2 2 2 1000\n1 2 3 4", ["16 bits a channel"]),
    "clear grey": ("a.png", png(0, 8, (b"\0" + bytes(4)) * 3, (b"tRNS", bytes(2))), ["not opaque", "background"]),
    "a clear colour": ("a.png", png(2, 8, (b"\0" + bytes(12)) * 3, (b"tRNS", bytes(6))), ["not opaque"]),
    "a clear entry of a palette": (
        "a.png",
        png(3, 8, (b"\0" + bytes(4)) * 3, (b"PLTE", bytes(6)), (b"tRNS", bytes([254, 255]))),
        ["not opaque"],
    ),
    "alpha": ("a.png", png(6, 8, (b"\0" + bytes([1, 2, 3, 254]) * 4) * 3), ["not opaque"]),
    "packed data that are none": ("a.png", png(0, 8, b"").replace(b"\x78\x9c", b"\x79\x9c"), ["cut short or corrupt"]),
}


@pytest.mark.parametrize(("name", "content", "words"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_is_no_picture_of_8_bits_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, "pictures", tmp_path / name, *words)


def test_float_cmyk_frames_and_what_is_to_be_turned_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", np.zeros((3, 4), np.float32))
    refused(tmp_path, path, "'F'", "convert it")
    path.unlink()
    path = write(tmp_path / "a.jpg", COLOUR, "CMYK")
    refused(tmp_path, path, "'CMYK'")
    path.unlink()
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for name in ("a.gif", "a.tif", "a.png"):
        path = write(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        refused(tmp_path, path, "has 2 frames")
        path.unlink()
    for name in ("a.jpg", "a.png", "a.tif", "a.webp"):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = write(tmp_path / name, COLOUR, exif=exif)
        refused(tmp_path, path, "EXIF orientation", "turn it first")
        exif[0x0112] = 1
        write(path, COLOUR, exif=exif)
        assert datasets.image_folder(tmp_path).shape == (1, 3, 3, 4)
        path.unlink()


@pytest.mark.parametrize("end", [".png", ".jpg", ".bmp", ".webp", ".ppm"])
def test_a_picture_cut_short_anywhere_is_refused(tmp_path, end):
    content = noisy(tmp_path / f"a{end}")
    for size in [*range(0, 60, 3), *range(60, len(content) - 40, len(content) // 20)]:
        (tmp_path / f"a{end}").write_bytes(content[:size])
        refused(tmp_path, tmp_path / f"a{end}")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damage that does not touch the pixels
@pytest.mark.parametrize("end", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tif", ".ppm"])
def test_a_picture_with_a_wrong_byte_is_read_or_refused(tmp_path, end):
    content = noisy(tmp_path / f"a{end}")
    for place in [*range(120), *range(120, len(content), len(content) // 40)]:
        (tmp_path / f"a{end}").write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            message = str(tmp_path / f"a{end}") if datasets.image_folder(tmp_path).numel() else ""
        except ValueError as error:
            message = str(error)
        assert str(tmp_path / f"a{end}") in message


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(0, 8, bytes(1000), size=size))
    tracemalloc.start()
    try:
        refused(tmp_path, tmp_path / "a.png", "too large" if size[0] < 2**31 - 1 else "")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_links_are_followed_once_and_what_is_no_file_is_refused(tmp_path):
    write(tmp_path / "real" / "a" / "1.png", GREY)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "folder")
    assert datasets.image_folder(tmp_path / "folder").shape == (1, 3, 4)
    (tmp_path / "folder" / "b.png").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "folder", "b.png", "does not exist")
    (tmp_path / "folder" / "b.png").unlink()
    os.mkfifo(tmp_path / "folder" / "b.png")
    refused(tmp_path / "folder", "b.png", "neither a file nor a folder")


def test_pictures_are_not_held_twice(tmp_path):
    """32 pictures of 192 KiB: beside the tensor, no more than a few of them."""
    for number in range(32):
        write(tmp_path / f"{number}.bmp", np.full((256, 256, 3), number, np.uint8))
    tracemalloc.start()
    try:
        x = datasets.image_folder(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert x.nbytes == 32 * 3 * 256 * 256
    assert peak < 5 * x[0].nbytes


def test_without_pillow_it_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "a" / "1.png", GREY)
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"image_folder needs Pillow: pip install 'pyrodiff\[images\]'"):
        datasets.image_folder(tmp_path)
    assert datasets.image_folder(tmp_path, "labels").tolist() == [0]
