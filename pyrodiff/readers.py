r"""Data of your own, read from disk; nothing is downloaded. Everything public here is at hand in ``datasets``.

Data keep the shape and dtype of their file, and no more memory is taken than the file has bytes, whatever its header
says; pictures are uint8 levels, as Pillow reads them. No file can run code. All data are on the CPU.
"""

import gzip
import io
import lzma
import math
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from .base import arguments
from .base.arguments import ArgumentError

__all__ = [
    "array",
    "array_place",
    "idx",
    "idx_folder",
    "idx_place",
    "image_folder",
    "is_npy",
    "picture",
    "picture_files",
    "picture_labels",
]

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_STEMS = {"images": "images{}idx3-ubyte", "labels": "labels{}idx1-ubyte"}
_TORCH_TYPES = {  # the torch dtype of each NumPy dtype; unsigned ones that torch supports only in part are widened
    **{name: name for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")},
    **{"uint16": "int32", "uint32": "int64"},
}
_PICTURES = {  # file endings of pictures, and Pillow's names of the formats
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP"},
    **{".tif": "TIFF", ".tiff": "TIFF", ".pbm": "PPM", ".pgm": "PPM", ".ppm": "PPM", ".pnm": "PPM"},
}
_FIRST_BYTES = re.compile(  # of these formats
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|BM.{4}\0{4}|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*|P[1-6]\s+[\d#]", re.DOTALL
)
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA")  # Pillow's modes
_DAMAGE = (EOFError, OSError, RuntimeError, struct.error, lzma.LZMAError, zipfile.BadZipFile, zlib.error)


def idx(path: str | os.PathLike[str]) -> Tensor:
    """One file in the IDX format, that of MNIST, plain or gzipped; its first bytes tell which, not its name.

    Two zero bytes, a type code (0x08 uint8, 0x09 int8, 0x0B int16, 0x0C int32, 0x0D float32, 0x0E float64), the number
    of dimensions, their sizes as uint32, then the numbers, all big-endian.

    Arguments:
        path: The file.

    Returns:
        The numbers, with the shape and dtype of the file.

    Raises:
        ValueError: If there is no such file, if it is not IDX or is corrupt, or if it has fewer or more bytes of data
            than its header says.

    References:
        The MNIST database of handwritten digits (Y. LeCun, C. Cortes, C. J. C. Burges, 1998), "File formats",
        http://yann.lecun.com/exdb/mnist/

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "numbers")
        ...     _ = path.write_bytes(bytes([0, 0, 0x0B, 2, 0, 0, 0, 1, 0, 0, 0, 2]) + bytes([1, 0, 255, 255]))
        ...     pyrodiff.datasets.idx(path)
        tensor([[256,  -1]], dtype=torch.int16)
    """
    file = _existing("path", path, "file")
    with _opened(("path", "must be"), file) as stream:
        return _numbers(("path", "must be"), file, stream, *_idx_header(("path", "must be"), file, stream))


def idx_folder(folder: str | os.PathLike[str], split: str = "train", kind: str = "images") -> Tensor:
    """The images or labels of a folder with the four files of MNIST, or of a data set in its format.

    The files may be in the folder, in its sub-folder ``raw``, or in ``raw`` of a sub-folder, as torchvision's
    MNIST/raw. The files are {train,t10k}-{images-idx3,labels-idx1}-ubyte or, with a dot,
    {train,t10k}-{images.idx3,...}-ubyte, each plain or, with .gz at the end, gzipped; the plain one is taken where
    there are both.

    Arguments:
        folder: The folder.
        split: "train" or "test", whose files are called t10k.
        kind: "images" or "labels".

    Returns:
        Images as levels 0..255 with shape (n, height, width), for ``pyrodiff.from_levels(images, levels=256)``, or
        labels with shape (n,); both uint8.

    Raises:
        ValueError: If there is no such folder, split or kind; if the folder lacks the file; if the file is none that
            :func:`idx` reads, or not uint8 with these dimensions; if the folder has another number of labels than of
            images.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     labels = pathlib.Path(folder, "t10k-labels-idx1-ubyte")
        ...     _ = labels.write_bytes(bytes([0, 0, 0x08, 1, 0, 0, 0, 3]) + bytes([7, 2, 1]))
        ...     pyrodiff.datasets.idx_folder(folder, "test", "labels")
        tensor([7, 2, 1], dtype=torch.uint8)
    """
    for name, value, known in (("split", split, ("train", "test")), ("kind", kind, ("images", "labels"))):
        if value not in known:
            raise ArgumentError(name, f"must be one of {', '.join(known)}, but it is {value!r}")
    held = _existing("folder", folder, "folder")
    held = idx_place(held)[0] or held
    files = {either: _idx_file(held, split, either) for either in _IDX_STEMS}
    file = files[kind]
    if file is None:
        names = [entry.name + "/" * entry.is_dir() for entry in sorted(held.iterdir())]
        wanted = f"{'t10k' if split == 'test' else split}-{_IDX_STEMS[kind].format('-')}"
        raise ArgumentError("folder", f"must hold {wanted} or {wanted}.gz, but {held} holds {_few(names)}")
    counts = {either: _idx_shape(file, either)[0] for either, file in files.items() if file is not None}
    if len(set(counts.values())) > 1:
        raise ArgumentError(
            "folder",
            f"must hold as many images as labels, but {files['images']} has {counts['images']} images and "
            f"{files['labels']} has {counts['labels']} labels",
        )
    with _opened(("folder", "must hold"), file) as stream:
        return _numbers(("folder", "must hold"), file, stream, *_idx_header(("folder", "must hold"), file, stream))


def idx_place(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Where the IDX files of a folder lie, for :func:`idx_folder`.

    Arguments:
        folder: The folder.

    Returns:
        The folder itself, or ``raw`` in it or in a folder of it; None if there are none. And the names of what else
        lies there, sorted.

    Raises:
        ValueError: If there is no such folder, or several have such files.
    """
    held = _existing("folder", folder, "folder")
    known = re.compile(r"(train|t10k)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
    for places in ([held], [held / "raw"], sorted(held.glob("*/raw"))):
        found = [
            place for place in places if place.is_dir() and any(known.fullmatch(one.name) for one in place.iterdir())
        ]
        if len(found) > 1:
            raise ArgumentError(
                "folder", f"must hold one set of IDX files, but there are {_few(map(str, found))}: name one"
            )
        if found:
            return found[0], sorted(one.name for one in found[0].iterdir() if not known.fullmatch(one.name))
    return None, []


def array(path: str | os.PathLike[str], name: str | None = None, mapped: bool = False) -> Tensor:
    """One array that NumPy saved, in a .npy or .npz file; its first bytes tell which, not its name.

    Arguments:
        path: The file.
        name: Which array of an .npz file; not needed if it has one.
        mapped: Whether to memory-map an .npy file, so that it may be larger than memory; the file must not change
            meanwhile. Writing to the tensor does not change the file.

    Returns:
        The array, with its shape and dtype; uint16 as int32 and uint32 as int64, which torch has more operations for.

    Raises:
        ValueError: If there is no such file; if it is not as NumPy saves it, or is corrupt; if it has fewer or more
            bytes of data than its header says; if ``name`` does not choose one of its arrays; if the array has no
            dimension or no element; if its dtype is not bool, int8 to int64, uint8 to uint32 or float16 to float64. An
            array of objects is a pickle, which may run code when loaded.

    Example:
        >>> from importlib import resources
        >>> with resources.as_file(resources.files("pyrodiff") / "data/digits.npz") as path:
        ...     pyrodiff.datasets.array(path, "images").shape
        torch.Size([1797, 8, 8])
    """
    if not (name is None or isinstance(name, str)):
        raise ArgumentError("name", f"must be a str or None, but it is {name!r}")
    file = _existing("path", path, "file")
    with file.open("rb") as stream:
        first = stream.read(8)
        stream.seek(0)
        if first[:4] in (b"PK\3\4", b"PK\5\6"):
            return _from_npz(file, stream, name)
        if first[:6] != b"\x93NUMPY":
            begins = f"begins with the bytes {first.hex(' ')}" if first else "is empty"
            raise ArgumentError("path", f"must be a .npy or .npz file as NumPy saves it, but {file} {begins}")
        if name is not None:
            raise ArgumentError(
                "name", f"must be None for a .npy file, which has one array, but it is {name!r} for {file}"
            )
        return _from_npy(("path", "must be"), file, stream, mapped)


def is_npy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as an .npy file does.

    Arguments:
        path: The file.
    """
    with Path(path).open("rb") as stream:
        return stream.read(6) == b"\x93NUMPY"


def array_place(path: str | os.PathLike[str]) -> tuple[int, tuple[int, ...], np.dtype, str]:
    """Where the numbers of an .npy file are, one datum after another, so that some can be read without the rest.

    Arguments:
        path: The file.

    Returns:
        The offset of the first byte; the shape; the dtype in the file; the name of the dtype that :func:`array`
        returns.

    Raises:
        ValueError: If :func:`array` would refuse the file; if it is an .npz file, or its first index runs fastest, so
            that a datum does not lie in one piece.
    """
    file, must = _existing("path", path, "file"), ("path", "must be")
    with file.open("rb") as stream:
        first = stream.read(6)
        if first != b"\x93NUMPY":
            packed = ": save its array by itself, numpy.save" * (first[:2] == b"PK")
            raise ArgumentError("path", f"must be a .npy file as NumPy saves it, but {file} is none{packed}")
        stream.seek(0)
        dtype, shape, fortran = _npy_header(must, file, stream)
        start = stream.tell()
        held = stream.seek(0, os.SEEK_END) - start
    _check_dtype(must, file, dtype, shape)
    _check_shape(must, file, shape)
    if fortran and len(shape) > 1:
        raise ArgumentError(
            "path",
            f"must hold one datum after another, but in {file} the first index runs fastest: save "
            f"numpy.ascontiguousarray(x)",
        )
    _check_size(must, file, dtype, shape, held)
    return start, shape, dtype, _TORCH_TYPES[dtype.name]


def image_folder(folder: str | os.PathLike[str], kind: str = "images") -> Tensor:
    """All pictures in a folder and its sub-folders, sorted by name, or their labels, the numbers of the sub-folders.

    Pictures are files that begin as PNG, JPEG, BMP, GIF, WebP, TIFF or PNM do, whatever their names, or whose names end
    in .png, .jpg, .jpeg, .bmp, .gif, .webp, .tif, .tiff, .pbm, .pgm, .ppm or .pnm; other files are passed over, and so
    is whatever has a name that begins with a dot (:func:`~pyrodiff.readers.picture_files`). Names are sorted as text,
    folder by folder: "10.png" comes before "2.png".

    Levels are given as the file has them. Black and white is 0 and 255; a palette is colour; where some pictures are
    grey and others coloured, the grey ones have three equal channels. Whatever would need a choice is refused: 16 bits
    a channel, CMYK and other colour spaces, a pixel that is not opaque, more than one frame, an EXIF orientation that
    asks for a rotation. One tensor is filled, picture by picture.

    Arguments:
        folder: The folder.
        kind: "images" or "labels".

    Returns:
        Images as levels 0..255, uint8, with shape (n, height, width) if all are grey and (n, 3, height, width) if not,
        for ``pyrodiff.from_levels(images, levels=256)``; or labels with shape (n,), int64, the number, from 0, of the
        top-level sub-folder that each picture is in, sorted by name.

    Raises:
        ValueError: If there is no such folder or kind; if there is no picture; if a picture is none, is cut short or
            corrupt, is as refused above, is so large that Pillow warns of a decompression bomb, or has another size
            than the first; for labels, if a picture lies in no sub-folder, or a sub-folder is without pictures.
        ImportError: If Pillow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, levels in {"ones": [0, 255], "twos": [255, 7]}.items():
        ...         pathlib.Path(folder, name).mkdir()
        ...         _ = pathlib.Path(folder, name, "a.pgm").write_bytes(b"P5 2 1 255 " + bytes(levels))
        ...     pyrodiff.datasets.image_folder(folder), pyrodiff.datasets.image_folder(folder, "labels")
        (tensor([[[  0, 255]], [[255,   7]]], dtype=torch.uint8), tensor([0, 1]))
    """
    arguments.one_of("kind", kind, ("images", "labels"))
    held = _existing("folder", folder, "folder")
    files, _ = picture_files(held)
    if kind == "labels":
        return picture_labels(held, files)
    with _pillow("image_folder") as Image:
        heads = [_of_picture(Image, file, _head) for file in files]
        (width, height), _ = heads[0]
        for file, (size, _) in zip(files, heads, strict=True):
            if size != (width, height):
                raise ArgumentError(
                    "folder",
                    f"must hold pictures of one size, but {files[0]} is {width} x {height} and {file} is "
                    f"{size[0]} x {size[1]}; resize them first",
                )
        colour = any(mode in _COLOUR for _, mode in heads)
        channels = (3,) if colour else ()
        levels = torch.empty((len(files), *channels, height, width), dtype=torch.uint8)
        for row, file in zip(levels, files, strict=True):
            row.copy_(_of_picture(Image, file, _pixels_in("RGB" if colour else "L")))
    return levels


def picture(file: str | os.PathLike[str]) -> Tensor:
    """One picture, as :func:`image_folder` reads it, opened once.

    Arguments:
        file: The file.

    Returns:
        Levels 0..255, uint8, with shape (height, width) if it is grey and (3, height, width) if not.

    Raises:
        ValueError: If it is none, is cut short or corrupt, or has to be changed first.
        ImportError: If Pillow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.pgm")
        ...     _ = path.write_bytes(b"P5 2 1 255 " + bytes([255, 7]))
        ...     pyrodiff.readers.picture(path)
        tensor([[255,   7]], dtype=torch.uint8)
    """

    def whole(image: Any) -> Tensor | str:
        head = _head(image)
        return head if isinstance(head, str) else _pixels_in("RGB" if head[1] in _COLOUR else "L")(image)

    with _pillow("picture") as Image:
        return _of_picture(Image, Path(file), whole)


@contextmanager
def _pillow(reader: str) -> Iterator[Any]:
    """Pillow's ``Image``, in a context that refuses pictures of a size that Pillow warns of."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{reader} needs Pillow: pip install 'pyrodiff[images]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield Image


def picture_files(folder: str | os.PathLike[str]) -> tuple[list[Path], list[str]]:
    """The pictures that :func:`image_folder` reads, and the files that it ignores.

    Arguments:
        folder: The folder.

    Returns:
        The pictures in the folder and its sub-folders, at least one, in order; and the names of all other files, and of
        folders that are not searched, sorted.

    Raises:
        ValueError: If there is no such folder, one cannot be read, or there is no picture.
    """
    folder = _existing("folder", folder, "folder")

    def refuse(error: OSError) -> None:
        raise ArgumentError("folder", f"must be one that can be read, but {error.filename} cannot: {error}") from error

    found: list[Path] = []
    beside: list[Path] = []
    seen = {folder.resolve()}
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside = {name: Path(place, name).resolve() for name in sorted(folders)}
        folders[:] = [
            name for name, real in inside.items() if name[0] != "." and real not in seen
        ]  # links go in circles
        seen.update(inside.values())
        beside += [Path(place, name, "") for name in inside if name not in folders]
        for path in (Path(place, name) for name in names):
            (found if path.name[0] != "." and _is_picture(path) else beside).append(path)
    others = sorted(str(path.relative_to(folder)) + "/" * path.is_dir() for path in beside)
    if not found:
        held = sorted([*others, *(f"{name}/" for name in _folders(folder))])
        raise ArgumentError(
            "folder",
            f"must hold pictures, files that begin as such or whose names end in {', '.join(_PICTURES)}, but "
            f"{folder} holds {_few(held)}",
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts), others


def picture_labels(folder: str | os.PathLike[str], files: list[Path]) -> Tensor:
    """The label of each picture, the number of its sub-folder, as of ``image_folder(folder, "labels")``.

    Arguments:
        folder: The folder.
        files: The pictures in it, as :func:`picture_files` returns them.

    Returns:
        Numbers from 0 on, int64, with shape (n,).

    Raises:
        ValueError: If a picture lies in no sub-folder, or a sub-folder is without pictures.
    """
    folder = Path(folder)
    loose = [file for file in files if file.parent == folder]
    if loose:
        raise ArgumentError(
            "folder",
            f"must hold pictures in sub-folders alone, for kind='labels', but {len(loose)} of {len(files)} lie "
            f"directly in it, the first {loose[0]}",
        )
    names = [file.relative_to(folder).parts[0] for file in files]
    empty = sorted(set(_folders(folder)) - set(names))
    if empty:
        raise ArgumentError(
            "folder",
            f"must hold sub-folders with a picture each, for kind='labels', but in {folder} there is none in "
            f"{_few(empty)}",
        )
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names])


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its name or its first bytes."""
    if path.suffix.lower() in _PICTURES or not path.is_file():
        return path.suffix.lower() in _PICTURES
    with path.open("rb") as stream:
        return _FIRST_BYTES.match(stream.read(64)) is not None


def _existing(name: str, value: str | os.PathLike[str], kind: str) -> Path:
    """The path of an existing file or folder."""
    try:
        path = Path(value)
    except TypeError:
        raise ArgumentError(name, f"must be the path of a {kind}, a str or os.PathLike, but it is {value!r}") from None
    if not (path.is_file() if kind == "file" else path.is_dir()):
        other = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
        got = f"is {other}" if path.exists() else "does not exist"
        raise ArgumentError(name, f"must be the path of a {kind}, but {path} {got}")
    return path


def _few(names: Iterable[str]) -> str:
    """At most ten names."""
    names = list(names)
    return (", ".join(names[:10]) or "nothing") + f" and {len(names) - 10} more" * (len(names) > 10)


@contextmanager
def _whole(must: tuple[str, str], where: object) -> Iterator[None]:
    """A context that turns errors of unpacking a damaged file into one of the argument ``must[0]``."""
    try:
        yield
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ArgumentError(
            must[0], f"{must[1]} a whole file, but {where} is cut short or corrupt: {reason}"
        ) from error


@contextmanager
def _opened(must: tuple[str, str], file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unzipped if it is gzipped."""
    with file.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        with _whole(must, file), gzip.GzipFile(fileobj=plain) if zipped else plain as stream:
            yield cast(IO[bytes], stream)  # GzipFile is one in all but name


def _idx_header(must: tuple[str, str], file: Path, stream: IO[bytes]) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape in the header of an IDX file."""
    first = stream.read(4)
    if len(first) < 4 or first[:2] != b"\0\0":
        begins = f"begins with the bytes {first.hex(' ')}" if first else "is empty"
        raise ArgumentError(
            must[0],
            f"{must[1]} an IDX file, that begins with 00 00, a type code and the number of dimensions, but {file} "
            f"{begins}",
        )
    code, dimensions = first[2:]
    if code not in _IDX_TYPES:
        known = ", ".join(f"0x{known:02x}" for known in _IDX_TYPES)
        raise ArgumentError(
            must[0], f"{must[1]} an IDX file with a type code among {known}, but {file} has 0x{code:02x}"
        )
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ArgumentError(
            must[0],
            f"{must[1]} an IDX file with 4 bytes for the size of each of its dimensions, {4 * dimensions} in all, but "
            f"{file} is cut short and has {len(sizes)}",
        )
    return np.dtype(_IDX_TYPES[code]), struct.unpack(f">{dimensions}I", sizes)


def _idx_file(folder: Path, split: str, kind: str) -> Path | None:
    """The file of a folder like MNIST's, if there is one."""
    prefix = {"train": "train", "test": "t10k"}[split]
    names = [f"{prefix}-{_IDX_STEMS[kind].format(mark)}{end}" for end in ("", ".gz") for mark in ("-", ".")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_shape(file: Path, kind: str) -> tuple[int, ...]:
    """The shape of a file of images or labels, from its header, if it is one for these."""
    dimensions = {"images": 3, "labels": 1}[kind]
    with _opened(("folder", "must hold"), file) as stream:
        dtype, shape = _idx_header(("folder", "must hold"), file, stream)
    if dtype != np.uint8 or len(shape) != dimensions:
        raise ArgumentError(
            "folder",
            f"must hold {kind} of dtype uint8 in {dimensions} dimension{'s' * (dimensions > 1)}, but {file} has "
            f"dtype {dtype.name} and shape {shape}",
        )
    return shape


def _numbers(
    must: tuple[str, str],
    where: object,
    stream: IO[bytes],
    dtype: np.dtype,
    shape: tuple[int, ...],
    fortran: bool = False,
) -> Tensor:
    """The rest of a stream as a tensor, read in pieces and to at most a byte beyond what the shape needs."""
    _check_shape(must, where, shape)
    needed = math.prod(shape) * dtype.itemsize
    data = bytearray()
    while len(data) <= needed and (piece := stream.read(min(needed + 1 - len(data), 2**20))):
        data += piece
    _check_size(must, where, dtype, shape, len(data))
    numbers = torch.from_numpy(np.frombuffer(data, dtype).astype(_TORCH_TYPES[dtype.name], copy=False))
    if not fortran:
        return numbers.reshape(shape)
    return numbers.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()


def _check_shape(must: tuple[str, str], where: object, shape: tuple[int, ...]) -> None:
    if not shape or min(shape) < 1:
        raise ArgumentError(
            must[0], f"{must[1]} an array with a dimension and an element, but {where} has shape {shape}"
        )


def _check_size(must: tuple[str, str], where: object, dtype: np.dtype, shape: tuple[int, ...], held: int) -> None:
    """Refuse an array with more or fewer bytes of data than its header says."""
    needed = math.prod(shape) * dtype.itemsize
    if held != needed:
        got = f"is too long and has at least {held}" if held > needed else f"is cut short and has {held}"
        raise ArgumentError(
            must[0],
            f"{must[1]} an array with {needed} bytes of data, for shape {shape} and dtype {dtype.name}, but {where} "
            f"{got}",
        )


def _check_dtype(must: tuple[str, str], where: object, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype.name not in _TORCH_TYPES:
        pickled = ": a pickle, which may run code when loaded" * dtype.hasobject
        raise ArgumentError(
            must[0],
            f"{must[1]} an array with a dtype among {', '.join(_TORCH_TYPES)}, but {where} has shape {shape} and dtype "
            f"{dtype}{pickled}",
        )


def _npy_header(must: tuple[str, str], where: object, stream: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], bool]:
    """The dtype and the shape in the header of an array, and whether its first index runs fastest (Fortran order)."""
    magic = stream.read(8)
    length = stream.read(2 if magic[6:7] == b"\1" else 4)
    header = stream.read(min(int.from_bytes(length, "little"), 10_000))  # NumPy refuses longer ones, after reading
    whole = io.BytesIO(magic + length + header)
    try:
        version = np.lib.format.read_magic(whole)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"there is no format version {version}")
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(whole)
        else:  # 3.0 differs from 2.0 by names of fields alone, and an array with fields is refused
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(whole)
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        reason = str(error) or type(error).__name__
        raise ArgumentError(
            must[0], f"{must[1]} an array as NumPy saves it, but {where} is cut short or corrupt: {reason}"
        ) from error
    return dtype, shape, fortran


def _from_npy(must: tuple[str, str], where: object, stream: IO[bytes], mapped: bool = False) -> Tensor:
    dtype, shape, fortran = _npy_header(must, where, stream)
    _check_dtype(must, where, dtype, shape)
    if mapped and dtype.isnative and dtype.name == _TORCH_TYPES[dtype.name] and min(shape, default=0) > 0:
        start = stream.tell()
        if stream.seek(0, os.SEEK_END) - start == math.prod(shape) * dtype.itemsize:
            return torch.from_numpy(np.memmap(stream, dtype, "c", start, shape, "F" if fortran else "C"))
        stream.seek(start)
    return _numbers(must, where, stream, dtype, shape, fortran)


def _from_npz(file: Path, stream: IO[bytes], name: str | None) -> Tensor:
    with _whole(("path", "must be"), file), zipfile.ZipFile(stream) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist() if entry.endswith(".npy")]
        if not names:
            raise ArgumentError(
                "path", f"must be an .npz file with an array, but {file} holds {_few(archive.namelist())}"
            )
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            raise ArgumentError(
                "name",
                f"must be that of an array in {file}, but it is {name!r}; there are "
                f"{_few(_described(file, archive, name) for name in names)}",
            )
        with archive.open(f"{name}.npy") as member:
            return _from_npy(("path", "must hold"), f"{name!r} in {file}", member)


def _described(file: Path, archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(f"{name}.npy") as member:
        dtype, shape, _ = _npy_header(("path", "must hold"), f"{name!r} in {file}", member)
    return f"{name!r} {shape} {dtype}"


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _of_picture(pillow: Any, file: Path, read: Callable[[Any], tuple | Tensor | str]) -> Any:
    """The result of ``read`` on a picture; if that is a string, it is the reason why the picture is refused."""
    if not file.is_file():
        got = (
            "is neither a file nor a folder" if file.exists() else "does not exist, or is a link to what does not exist"
        )
        raise ArgumentError("folder", f"must hold pictures, but {file} {got}")
    try:
        with pillow.open(file, formats=sorted(set(_PICTURES.values()))) as image:
            found = read(image)
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise ArgumentError(
            "folder", f"must hold pictures of a size to be read, but {file} is too large: {error}"
        ) from error
    except pillow.UnidentifiedImageError:
        with file.open("rb") as stream:
            first = stream.read(8)
        found = f"is none: it begins with the bytes {first.hex(' ')}" if first else "is empty"
    except Exception as error:  # a damaged picture makes Pillow raise almost anything
        reason = str(error) or type(error).__name__
        raise ArgumentError(
            "folder", f"must hold whole pictures, but {file} is cut short or corrupt: {reason}"
        ) from error
    if isinstance(found, str):
        raise ArgumentError(
            "folder", f"must hold still and opaque pictures, grey or RGB, of up to 8 bits a channel, but {file} {found}"
        )
    return found


def _head(image: Any) -> tuple[tuple[int, int], str] | str:
    """Width and height of a picture, and Pillow's mode; or the reason why it is refused."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        return f"has {frames} frames; save the one to be read as a picture of its own"
    for codec, _, _, packing in image.tile:
        packing = packing if isinstance(packing, tuple) else (packing,)
        deep = any(isinstance(part, str) and ";16" in part for part in packing)
        if deep or (codec.startswith("ppm") and packing[1] > 255):
            return "has 16 bits a channel; convert it to 8 bits first"
    if image.mode not in (*_GREY, *_COLOUR):
        return f"has pixels of the kind {image.mode!r}; convert it to 8 bits of grey or RGB first"
    return image.size, image.mode


def _pixels_in(mode: str) -> Callable[[Any], Tensor | str]:
    """A function that reads a picture's levels as "L", with shape (height, width), or "RGB", (3, height, width)."""

    def pixels(image: Any) -> Tensor | str:
        if image.getexif().get(0x0112, 1) not in (0, 1):  # EXIF orientation; read before load(), which may apply it
            return "is to be turned or mirrored when it is shown, says its EXIF orientation; turn it first"
        image.load()
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                return "has pixels that are not opaque; lay it onto a background first"
        levels = torch.from_numpy(np.array(image.convert(mode)))
        return levels if mode == "L" else levels.permute(2, 0, 1)

    return pixels
