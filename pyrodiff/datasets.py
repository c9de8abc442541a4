r"""Data: generated from a seed, carried inside the package, or read from disk; nothing is downloaded.

What is generated or carried is float32 with shape (n, *event_shape), the same for the same seed. What is read keeps the
shape and dtype of its file; no header is believed further than there are bytes, and no file can run code. All is on the
CPU.
"""

import gzip
import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import checks

__all__ = ["array", "checkerboard", "digits", "eight_gaussians", "heartbeat", "idx", "idx_folder", "swiss_roll"]

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_STEMS = {"images": "images{}idx3-ubyte", "labels": "labels{}idx1-ubyte"}
_TORCH_TYPES = {  # what torch holds a number type of numpy as; the unsigned ones that it half supports, widened
    **{name: name for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")},
    **{"uint16": "int32", "uint32": "int64"},
}
_DAMAGE = (EOFError, OSError, RuntimeError, struct.error, lzma.LZMAError, zipfile.BadZipFile, zlib.error)


def _generator(num_samples: int, seed: int) -> torch.Generator:
    checks.positive_int("num_samples", num_samples)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, but it is {seed!r}")
    return torch.Generator().manual_seed(seed)


def swiss_roll(num_samples: int, seed: int = 0, noise: float = 0.05) -> Tensor:
    r"""A spiral in the plane, of unit variance a dimension as in the paper.

    .. math:: x \propto (r \cos r, r \sin r) / 4 + \text{noise}, \qquad r \sim U[1.5 \pi, 4.5 \pi]

    shifted and scaled, by its exact moments, to mean 0 and variance 1 in each dimension. Its entropy has no closed
    form. The 2015 paper does not say how much noise its roll has.

    Arguments:
        num_samples: The number of points.
        seed: The seed.
        noise: The standard deviation of the Gaussian noise, in units of the standard deviation of the roll; at
            least 0.

    Returns:
        Points with shape (num_samples, 2).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 3.1.1,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> pyrodiff.datasets.swiss_roll(1000).shape
        torch.Size([1000, 2])
    """
    generator = _generator(num_samples, seed)
    if not (isinstance(noise, int | float) and 0 <= noise < math.inf):
        raise ValueError(f"noise must be a number of at least 0, but it is {noise!r}")
    r = math.pi * (1.5 + 3 * torch.rand(num_samples, generator=generator, dtype=torch.float64))
    x = torch.stack([r * r.cos(), r * r.sin()], -1)
    mean, std = _swiss_roll_moments()
    x = (x - mean) / std
    x = x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x / math.sqrt(1 + noise**2)).float()


def _swiss_roll_moments() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (r cos r, r sin r) with r uniform on [1.5 pi, 4.5 pi], from antiderivatives."""
    r = math.pi * torch.tensor([1.5, 4.5], dtype=torch.float64)
    mean = torch.stack([(r * r.sin() + r.cos()).diff(), (r.sin() - r * r.cos()).diff()]).flatten()
    swing = r**2 / 4 * (2 * r).sin() + r / 4 * (2 * r).cos() - (2 * r).sin() / 8
    square = torch.stack([(r**3 / 6 + swing).diff(), (r**3 / 6 - swing).diff()]).flatten()
    mean, square = mean / r.diff(), square / r.diff()
    return mean, (square - mean**2).sqrt()


def checkerboard(num_samples: int, seed: int = 0) -> Tensor:
    r"""Uniform on the dark squares of a 4 x 4 board on [-4, 4]^2.

    Its entropy is :math:`\log 32 = 3.4657` nats exactly: no bound on -log p may have a lower mean.

    Arguments, errors: see :func:`swiss_roll`.

    Returns:
        Points with shape (num_samples, 2).

    Example:
        >>> x = pyrodiff.datasets.checkerboard(1000)
        >>> bool((((x // 2).sum(-1) % 2) == 0).all())
        True
    """
    generator = _generator(num_samples, seed)
    column = torch.randint(4, (num_samples,), generator=generator)
    row = 2 * torch.randint(2, (num_samples,), generator=generator) + column % 2
    inside = torch.rand((num_samples, 2), generator=generator, dtype=torch.float32)
    return 2 * (torch.stack([column, row], -1) + inside) - 4


def eight_gaussians(num_samples: int, seed: int = 0) -> Tensor:
    r"""Eight Gaussians on a circle, equally likely, with FFJORD's scaling.

    Centres at distance :math:`4 / \sqrt 2` from 0, standard deviation :math:`0.5 / \sqrt 2`. Neighbours hardly overlap:
    the entropy is 2.830 nats, :math:`\log 8 + \log(2 \pi e \, 0.125) = 2.838` less what they overlap.

    Arguments, errors: see :func:`swiss_roll`.

    Returns:
        Points with shape (num_samples, 2).

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019),
        https://arxiv.org/abs/1810.01367

    Example:
        >>> pyrodiff.datasets.eight_gaussians(1000).shape
        torch.Size([1000, 2])
    """
    generator = _generator(num_samples, seed)
    angle = math.pi / 4 * torch.randint(8, (num_samples,), generator=generator).float()
    centre = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    return (centre + 0.5 * torch.randn((num_samples, 2), generator=generator, dtype=torch.float32)) / math.sqrt(2)


def heartbeat(num_samples: int, seed: int = 0, length: int = 20, period: int = 5) -> Tensor:
    r"""Binary sequences with a 1 in every ``period``-th place, from a random start.

    Its entropy is log(period) exactly, :math:`\log_2 5 = 2.322` bits a sequence for the paper's 20 bits and period 5.

    Arguments:
        num_samples: The number of sequences.
        seed: The seed.
        length: The number of bits, a multiple of ``period``.
        period: The distance between ones, at least 1.

    Returns:
        Zeros and ones with shape (num_samples, length).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 3.1.2,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> pyrodiff.datasets.heartbeat(1, length=10)
        tensor([[0., 0., 0., 0., 1., 0., 0., 0., 0., 1.]])
    """
    generator = _generator(num_samples, seed)
    checks.positive_int("period", period)
    checks.positive_int("length", length)
    if length % period:
        raise ValueError(f"length must be a positive multiple of period = {period}, but it is {length!r}")
    start = torch.randint(period, (num_samples, 1), generator=generator)
    return (torch.arange(length) % period == start).float()


def digits(split: str = "train", binary: bool = False) -> Tensor:
    """Handwritten digits, 8 x 8 pixels of 17 grey levels: 1,797 images in a fixed shuffled order.

    The test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), UCI Machine Learning
    Repository, https://doi.org/10.24432/C50P49, under CC BY 4.0; here shuffled and split. Their entropy is not known.

    Arguments:
        split: "train" (1,000 images), "validation" (350) or "test" (447).
        binary: Whether to return bits, 1 where the level is 8 or more, or the levels 0..16.

    Returns:
        Numbers with shape (n, 8, 8).

    Raises:
        ValueError: If there is no such split.

    Example:
        >>> pyrodiff.datasets.digits("test").shape, pyrodiff.datasets.digits("test", binary=True).unique()
        (torch.Size([447, 8, 8]), tensor([0., 1.]))
    """
    bounds = {"train": (0, 1000), "validation": (1000, 1350), "test": (1350, 1797)}
    if split not in bounds:
        raise ValueError(f"split must be one of {', '.join(bounds)}, but it is {split!r}")
    with resources.files(__package__).joinpath("data/digits.npz").open("rb") as file:
        images = np.load(file)["images"]
    levels = torch.from_numpy(images[slice(*bounds[split])]).float()
    return (levels >= 8).float() if binary else levels


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
    with _opened("path must be", file) as stream:
        return _numbers("path must be", file, stream, *_idx_header("path must be", file, stream))


def idx_folder(folder: str | os.PathLike[str], split: str = "train", kind: str = "images") -> Tensor:
    """The images or labels of a folder with the four files of MNIST, or of a data set that took over its format.

    The files are {train,t10k}-{images-idx3,labels-idx1}-ubyte or, with a dot, {train,t10k}-{images.idx3,...}-ubyte,
    each plain or, with .gz at the end, gzipped; the plain one is taken where there are both.

    Arguments:
        folder: The folder.
        split: "train" or "test", whose files are called t10k.
        kind: "images" or "labels".

    Returns:
        Images as levels 0..255 with shape (n, height, width), for ``pyrodiff.dequantize(images, levels=256)``, or
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
            raise ValueError(f"{name} must be one of {', '.join(known)}, but it is {value!r}")
    held = _existing("folder", folder, "folder")
    files = {either: _idx_file(held, split, either) for either in _IDX_STEMS}
    file = files[kind]
    if file is None:
        names = [entry.name + "/" * entry.is_dir() for entry in sorted(held.iterdir())]
        wanted = f"{'t10k' if split == 'test' else split}-{_IDX_STEMS[kind].format('-')}"
        raise ValueError(f"folder must hold {wanted} or {wanted}.gz, but {held} holds {_few(names)}")
    counts = {either: _idx_shape(file, either)[0] for either, file in files.items() if file is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"folder must hold as many images as labels, but {files['images']} has {counts['images']} images and "
            f"{files['labels']} has {counts['labels']} labels"
        )
    with _opened("folder must hold", file) as stream:
        return _numbers("folder must hold", file, stream, *_idx_header("folder must hold", file, stream))


def array(path: str | os.PathLike[str], name: str | None = None) -> Tensor:
    """One array that NumPy saved, in a .npy or .npz file; its first bytes tell which, not its name.

    Arguments:
        path: The file.
        name: Which array of an .npz file; not needed if it has one.

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
        raise ValueError(f"name must be a str or None, but it is {name!r}")
    file = _existing("path", path, "file")
    with file.open("rb") as stream:
        first = stream.read(8)
        stream.seek(0)
        if first[:4] in (b"PK\3\4", b"PK\5\6"):
            return _from_npz(file, stream, name)
        if first[:6] != b"\x93NUMPY":
            begins = f"begins with the bytes {first.hex(' ')}" if first else "is empty"
            raise ValueError(f"path must be a .npy or .npz file as NumPy saves it, but {file} {begins}")
        if name is not None:
            raise ValueError(f"name must be None for a .npy file, which has one array, but it is {name!r} for {file}")
        return _from_npy("path must be", file, stream)


def _existing(name: str, value: str | os.PathLike[str], kind: str) -> Path:
    """The path of a file or folder that is there."""
    try:
        path = Path(value)
    except TypeError:
        raise ValueError(f"{name} must be the path of a {kind}, a str or os.PathLike, but it is {value!r}") from None
    if not (path.is_file() if kind == "file" else path.is_dir()):
        other = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
        got = f"is {other}" if path.exists() else "does not exist"
        raise ValueError(f"{name} must be the path of a {kind}, but {path} {got}")
    return path


def _few(names: Iterable[str]) -> str:
    """At most ten names."""
    names = list(names)
    return (", ".join(names[:10]) or "nothing") + f" and {len(names) - 10} more" * (len(names) > 10)


@contextmanager
def _whole(must: str, where: object) -> Iterator[None]:
    """What unpacking a damaged file raises, as a ValueError that begins with ``must``, as "path must be"."""
    try:
        yield
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{must} a whole file, but {where} is cut short or corrupt: {reason}") from error


@contextmanager
def _opened(must: str, file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unzipped if it is gzipped."""
    with file.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        with _whole(must, file), gzip.GzipFile(fileobj=plain) if zipped else plain as stream:
            yield stream


def _idx_header(must: str, file: Path, stream: BinaryIO) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape that an IDX file says it has."""
    first = stream.read(4)
    if len(first) < 4 or first[:2] != b"\0\0":
        begins = f"begins with the bytes {first.hex(' ')}" if first else "is empty"
        raise ValueError(
            f"{must} an IDX file, that begins with 00 00, a type code and the number of dimensions, but {file} {begins}"
        )
    code, dimensions = first[2:]
    if code not in _IDX_TYPES:
        known = ", ".join(f"0x{known:02x}" for known in _IDX_TYPES)
        raise ValueError(f"{must} an IDX file with a type code among {known}, but {file} has 0x{code:02x}")
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError(
            f"{must} an IDX file with 4 bytes for the size of each of its dimensions, {4 * dimensions} in all, but "
            f"{file} is cut short and has {len(sizes)}"
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
    with _opened("folder must hold", file) as stream:
        dtype, shape = _idx_header("folder must hold", file, stream)
    if dtype != np.uint8 or len(shape) != dimensions:
        raise ValueError(
            f"folder must hold {kind} of dtype uint8 in {dimensions} dimension{'s' * (dimensions > 1)}, but {file} has "
            f"dtype {dtype.name} and shape {shape}"
        )
    return shape


def _numbers(
    must: str, where: object, stream: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], fortran: bool = False
) -> Tensor:
    """The rest of a stream as a tensor, read in pieces and to at most a byte beyond what the shape needs."""
    if not shape or min(shape) < 1:
        raise ValueError(f"{must} an array with a dimension and an element, but {where} has shape {shape}")
    needed = math.prod(shape) * dtype.itemsize
    data = bytearray()
    while len(data) <= needed and (piece := stream.read(min(needed + 1 - len(data), 2**20))):
        data += piece
    if len(data) != needed:
        got = f"is too long and has at least {len(data)}" if len(data) > needed else f"is cut short and has {len(data)}"
        raise ValueError(
            f"{must} an array with {needed} bytes of data, for shape {shape} and dtype {dtype.name}, but {where} {got}"
        )
    numbers = torch.from_numpy(np.frombuffer(data, dtype).astype(_TORCH_TYPES[dtype.name], copy=False))
    if not fortran:
        return numbers.reshape(shape)
    return numbers.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()


def _npy_header(must: str, where: object, stream: BinaryIO) -> tuple[np.dtype, tuple[int, ...], bool]:
    """The dtype and the shape that an array says it has, and whether its first index runs fastest."""
    magic = stream.read(8)
    length = stream.read(2 if magic[6:7] == b"\1" else 4)
    header = stream.read(min(int.from_bytes(length, "little"), 10_000))  # NumPy takes no longer one, but would read it
    header = io.BytesIO(magic + length + header)
    try:
        version = np.lib.format.read_magic(header)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"there is no format version {version}")
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
        else:  # 3.0 differs from 2.0 by names of fields alone, and an array with fields is refused
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(header)
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{must} an array as NumPy saves it, but {where} is cut short or corrupt: {reason}") from error
    return dtype, shape, fortran


def _from_npy(must: str, where: object, stream: BinaryIO) -> Tensor:
    dtype, shape, fortran = _npy_header(must, where, stream)
    if dtype.name not in _TORCH_TYPES:
        pickled = ": a pickle, which may run code when loaded" * dtype.hasobject
        raise ValueError(
            f"{must} an array with a dtype among {', '.join(_TORCH_TYPES)}, but {where} has shape {shape} and dtype "
            f"{dtype}{pickled}"
        )
    return _numbers(must, where, stream, dtype, shape, fortran)


def _from_npz(file: Path, stream: BinaryIO, name: str | None) -> Tensor:
    with _whole("path must be", file), zipfile.ZipFile(stream) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist() if entry.endswith(".npy")]
        if not names:
            raise ValueError(f"path must be an .npz file with an array, but {file} holds {_few(archive.namelist())}")
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            raise ValueError(
                f"name must be that of an array in {file}, but it is {name!r}; there are "
                f"{_few(_described(file, archive, name) for name in names)}"
            )
        with archive.open(f"{name}.npy") as member:
            return _from_npy("path must hold", f"{name!r} in {file}", member)


def _described(file: Path, archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(f"{name}.npy") as member:
        dtype, shape, _ = _npy_header("path must hold", f"{name!r} in {file}", member)
    return f"{name!r} {shape} {dtype}"
