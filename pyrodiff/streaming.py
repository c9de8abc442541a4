r"""Data larger than memory: batches that are read when needed, by worker processes if asked for.

.. math:: \text{batch}_n = (x_{i_1}, \dots, x_{i_B}), \qquad i_1, \dots, i_B \sim U\{0, \dots, N - 1\}
    \text{ from the seed, the rank and } n

Any map-style data set will do, with ``len(dataset)`` and ``dataset[i]``: a tensor, a memory-mapped NumPy array, one of
torch's. :class:`ArrayFile` and :class:`PictureFolder` are such, for data larger than memory.

Batch n depends only on the seed, n, the rank, N and B: not on earlier batches, or on the number of workers. So to be
resumed, a run has to save one number only, how many batches it has drawn.

Data are drawn with replacement. So SVI's loss, that of a batch times N / B, and its gradient are unbiased at every
step, whatever came before; with shuffled epochs that holds on average only, a permutation of all N numbers is kept in
memory, and the last batch is short. The price: N draws leave out one datum in e = 2.7, on average. :class:`Blocks` has
each datum once, in order.
"""

import math
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from multiprocessing import context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .base import arguments, ranks
from .base.arguments import ArgumentError
from .base.randomness import kept_sources, seed_of
from .readers import array_place, picture, picture_files, picture_labels

__all__ = ["ArrayFile", "Blocks", "PictureFolder", "Stream"]

_LOADER = ("multiprocessing_context", "pin_memory", "prefetch_factor", "timeout")  # options of DataLoader to pass on


class Stream:
    """Batches of a data set, drawn with replacement, which can begin at any batch number.

    Random numbers in items, as of augmentation, come from a seed of their batch, by torch's global CPU generator,
    NumPy's and Python's; in the calling process these are restored. Under ``torchrun`` each rank draws batches of its
    own.

    Arguments:
        dataset: A map-style data set: a tensor or a NumPy array of shape (N, ...), or an object with a length and
            items, which are tensors, arrays, numbers, or tuples or dicts of them, all alike. If it has
            ``__getitems__``, that is called once per batch.
        batch_size: The number of data in a batch, B.
        seed: The seed of all draws.
        num_workers: The number of worker processes; with 0, this process reads. They end with the iterator, and with
            this process.
        **options: Of torch's ``DataLoader``: ``prefetch_factor``, how many batches each process reads ahead (2);
            ``pin_memory``, ``timeout``, ``multiprocessing_context``.

    Raises:
        ValueError: If the data set has no length or no items, is empty or is an ``IterableDataset``, which has no item
            to begin at; if a number is out of range; as batches are drawn, if an item cannot be had, which is named.

    Example:
        >>> stream = pyrodiff.streaming.Stream(torch.arange(1000), batch_size=3, seed=5)
        >>> first = [batch for batch in stream.batches(until=4)]
        >>> all(torch.equal(a, b) for a, b in zip(first[2:], stream.batches(start=2, until=4)))
        True
        >>> torch.equal(stream.batch(3), first[3])
        True
    """

    def __init__(
        self,
        dataset: Dataset | Sequence | Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        self.dataset, self.batch_size = _checked(dataset), arguments.positive_int("batch_size", batch_size)
        self.seed, self.num_workers = _whole("seed", seed), _whole("num_workers", num_workers)
        self.options = _known(options)

    def indices(self, number: int) -> Tensor:
        """Which data a batch has, on this rank, with shape (B,).

        Arguments:
            number: The number of the batch, from 0 on.

        Raises:
            ValueError: If it is none.
        """
        return self._reader().indices(_whole("number", number))

    def batch(self, number: int) -> Any:
        """One batch, read by this process.

        Arguments:
            number: The number of the batch, from 0 on.

        Returns:
            What the items are, each tensor with a first dimension of B, on the CPU.

        Raises:
            ValueError: If ``number`` is none, or an item cannot be had.
        """
        return _returned(self._reader()[_whole("number", number)])

    def batches(self, start: int = 0, until: int | None = None) -> Iterator[Any]:
        """The batches from a number on.

        Arguments:
            start: The number of the first: in a resumed run, how many were drawn.
            until: The number to end before; without end if not given.

        Returns:
            An iterator over what :meth:`batch` returns. Its worker processes end when it is exhausted, closed or
            garbage-collected.

        Raises:
            ValueError: If a number is out of range; as batches are drawn, if an item cannot be had.
        """
        numbers = _Numbers(_whole("start", start), None if until is None else _whole("until", until))
        return _read(self._reader(), numbers, self.num_workers, self.options)

    def _reader(self) -> "_Drawn":
        return _Drawn(self.dataset, self.batch_size, self.seed, ranks.number())


class Blocks:
    """A data set once, in order, in blocks: for checks, for what is fitted to the data, for their bound.

    It may be iterated over many times. Random numbers in items come from a seed of the block, the same each time.

    Arguments:
        dataset, num_workers, **options: As :class:`Stream`.
        batch_size: The number of data in a block; the last may have fewer.

    Raises:
        ValueError: As :class:`Stream`.

    Example:
        >>> blocks = pyrodiff.streaming.Blocks(torch.arange(10.0), batch_size=4)
        >>> len(blocks), [len(block) for block in blocks], float(sum(block.sum() for block in blocks))
        (3, [4, 4, 2], 45.0)
    """

    def __init__(
        self, dataset: Dataset | Sequence | Tensor, batch_size: int, *, num_workers: int = 0, **options: Any
    ) -> None:
        self.dataset, self.batch_size = _checked(dataset), arguments.positive_int("batch_size", batch_size)
        self.num_workers, self.options = _whole("num_workers", num_workers), _known(options)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        reader = _InOrder(self.dataset, self.batch_size, 0, 0)
        return _read(reader, _Numbers(0, len(self)), self.num_workers, self.options)


class ArrayFile(Dataset):
    """The rows of an .npy file, read when they are needed: memory holds one batch, whatever the file's size.

    :func:`~pyrodiff.datasets.array` with ``mapped=True`` is an alternative that looks like any tensor; but pages of a
    mapped file count as memory of the process until the system reclaims them. The file must not change meanwhile.

    Arguments:
        path: The file.

    Attributes:
        shape: The shape of the array; a row has ``shape[1:]``.

    Raises:
        ValueError: If :func:`~pyrodiff.readers.array_place` refuses it; as rows are read, if it has become shorter.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "x.npy")
        ...     numpy.save(path, numpy.arange(6).reshape(3, 2))
        ...     rows = pyrodiff.streaming.ArrayFile(path)
        ...     len(rows), rows[1], pyrodiff.streaming.Stream(rows, batch_size=4).batch(0).shape
        (3, tensor([2, 3]), torch.Size([4, 2]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._start, self.shape, self._dtype, self._held = array_place(self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> Tensor:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Several rows, for one opening of the file."""
        rows = np.empty((len(indices), *self.shape[1:]), self._dtype)
        with self.path.open("rb", buffering=0) as stream:
            for row, i in zip(rows.reshape(len(indices), -1).view(np.uint8), map(self._number, indices), strict=True):
                stream.seek(self._start + i * len(row))
                if _fill(stream, row) < len(row):
                    raise ArgumentError("path", f"must be whole while it is read, but {self.path} has become shorter")
        return torch.from_numpy(rows.astype(self._held, copy=False)).unbind()

    def _number(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} is no row of {len(self)}")
        return int(i) % len(self)


def _fill(stream: Any, row: np.ndarray) -> int:
    """Read into a row until it is full or the file ends; returns the number of bytes."""
    done = 0
    while done < len(row) and (more := stream.readinto(row[done:])):
        done += more
    return done


class PictureFolder(Dataset):
    """The pictures in a folder and its sub-folders, each opened when it is needed.

    Files, their order and their levels are those of :func:`~pyrodiff.datasets.image_folder`, but the first picture
    determines the size of all, and whether they are grey or coloured. A grey one among coloured ones gets three equal
    channels.

    Arguments:
        folder: The folder.
        labels: Whether items are tuples of a picture and the number of its sub-folder.
        colour: Whether pictures have three channels; as the first, if not given.

    Attributes:
        files: The files, in order.
        passed_over: The names of the other files in the folder.
        shape: The shape of a picture, (height, width) or (3, height, width).

    Raises:
        ValueError: If there is no such folder, or no picture in it; on reading a picture, which is named, if it cannot
            be read, has another size, or is coloured where the others are grey; for labels, as
            ``image_folder(folder, "labels")``.
        ImportError: If Pillow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, levels in {"ones": [0, 255], "twos": [255, 7]}.items():
        ...         pathlib.Path(folder, name).mkdir()
        ...         _ = pathlib.Path(folder, name, "a.pgm").write_bytes(b"P5 2 1 255 " + bytes(levels))
        ...     pyrodiff.streaming.PictureFolder(folder, labels=True)[1]
        (tensor([[255,   7]], dtype=torch.uint8), tensor(1))
    """

    def __init__(self, folder: str | os.PathLike[str], labels: bool = False, colour: bool | None = None) -> None:
        arguments.one_of("labels", labels, (False, True))
        arguments.one_of("colour", colour, (None, False, True))
        files, self.passed_over = picture_files(folder)
        self.files = [file.absolute() for file in files]
        self.labels = picture_labels(Path(folder), files) if labels else None
        first = picture(self.files[0])
        self._colour = first.dim() == 3 if colour is None else colour
        self.shape = torch.Size((3, *first.shape[-2:]) if self._colour else first.shape[-2:])
        self[0]  # raises if the first is coloured and colour is False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor | tuple[Tensor, Tensor]:
        levels = self._levels(self.files[i])
        return levels if self.labels is None else (levels, self.labels[i])

    def _levels(self, file: Path) -> Tensor:
        levels = picture(file)
        if levels.shape[-2:] != self.shape[-2:]:
            (height, width), (high, wide) = self.shape[-2:], levels.shape[-2:]
            raise ArgumentError(
                "folder",
                f"must hold pictures of one size, but {self.files[0]} is {width} x {height} and {file} is {wide} x "
                f"{high}; resize them first",
            )
        if levels.dim() == 3 and not self._colour:
            raise ArgumentError(
                "folder", f"must hold grey pictures, as the first is, but {file} is coloured: give colour=True"
            )
        return levels if levels.dim() == len(self.shape) else levels.expand(self.shape)


class _Numbers:
    """The numbers of batches, in order, with or without an end."""

    def __init__(self, start: int, until: int | None) -> None:
        self.start, self.until = start, until

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while self.until is None or number < self.until:
            yield number
            number += 1


class _Reader(Dataset):
    """Batches by number, as torch's loader requests them, in any process.

    Arguments:
        dataset: The data set.
        batch_size: The number of data in a batch.
        seed, rank: All draws depend on these and the number of the batch.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, rank: int) -> None:
        self.dataset, self.batch_size, self.seed, self.rank = dataset, batch_size, seed, rank
        self.workers = False  # whether it runs in worker processes

    def indices(self, number: int) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, number: int) -> Any:
        """The batch, or an :class:`_Unread`: an error raised in a worker would arrive with another type and text."""
        indices = self.indices(number)
        if isinstance(self.dataset, Tensor):
            return self.dataset[indices.to(self.dataset.device)].cpu()
        if isinstance(self.dataset, np.ndarray):
            return torch.from_numpy(np.array(self.dataset[indices.numpy()]))
        with nullcontext() if self.workers else kept_sources():
            _seed(seed_of(self.seed, self.rank, number, 1))
            try:
                return default_collate(self._items(indices.tolist()))
            except _Unread as unread:
                return unread
            except Exception as error:  # of torch, which collates them
                return _Unread(f"must give items that make a batch, but items {_few(indices.tolist())} do not", error)

    def _items(self, indices: list[int]) -> list[Any]:
        together = getattr(self.dataset, "__getitems__", None)
        if together is not None:
            try:
                return together(indices)
            except Exception as error:
                for i in indices:  # to find the one at fault
                    self._one(together, [i])
                raise _Unread(f"must give the items {_few(indices)} together, but does not", error) from error
        return [self._one(self.dataset.__getitem__, i) for i in indices]

    def _one(self, get: Any, i: Any) -> Any:
        try:
            return get(i)
        except Exception as error:
            raise self._unread(i[0] if isinstance(i, list) else i, error) from error

    def _unread(self, i: int, error: Exception) -> "_Unread":
        return _Unread(f"must give each of its {len(self.dataset)} items, but item {i} cannot be had", error)


class _Drawn(_Reader):
    """Batches that are drawn with replacement."""

    def indices(self, number: int) -> Tensor:
        """Drawn from raw bits, which NumPy promises not to change; the bias is at most N / 2^64."""
        raw = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(self.rank, number)))
        return torch.from_numpy((raw.random_raw(self.batch_size) % len(self.dataset)).astype(np.int64))


class _InOrder(_Reader):
    """Blocks in the order of the data."""

    def indices(self, number: int) -> Tensor:
        first = number * self.batch_size
        return torch.arange(first, min(first + self.batch_size, len(self.dataset)), device="cpu")


class _Unread(Exception):
    """An error about an item, as text, so that it can be sent between processes."""

    def __init__(self, said: str, error: Exception | None = None) -> None:
        if error is not None:
            said = f"{said}: {type(error).__name__}: {error}"
        super().__init__(said)


def _returned(batch: Any) -> Any:
    """The batch, or its error raised."""
    if isinstance(batch, _Unread):
        raise ArgumentError("dataset", str(batch)) from batch.__cause__
    return batch


def _read(reader: _Reader, numbers: _Numbers, num_workers: int, options: dict[str, Any]) -> Iterator[Any]:
    """The batches of these numbers; workers end with the iterator, also after an error."""
    reader.workers = num_workers > 0
    loader = DataLoader(
        reader,
        batch_size=None,  # an item of the reader is a batch
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_leave_signals, os.getpid()),
        generator=torch.Generator("cpu"),  # else the loader would use torch's global generator
        # without workers DataLoader refuses the other options
        **(options if num_workers else {name: options[name] for name in options if name == "pin_memory"}),
    )
    batches = iter(loader)
    try:
        for batch in batches:
            yield _returned(batch)
    finally:
        del batches  # ends the workers


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(parent: int, worker: int) -> None:
    """Leave signals, which Ctrl-C and schedulers send to a whole group, to the main process, which may finish its
    step."""
    # torch ends a worker whose parent changes, but records the parent only after this; check for one that is dead
    # already
    has_other_parent = isinstance(multiprocessing.current_process(), getattr(context, "ForkServerProcess", ()))
    if os.getppid() != parent and not has_other_parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def _seed(seed: int) -> None:
    """Seed all generators that items may use. Not by ``torch.manual_seed``, which would seed devices too."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _checked(dataset: Any) -> Any:
    has = [hasattr(dataset, name) for name in ("__len__", "__getitem__")]
    if isinstance(dataset, IterableDataset | str | bytes | dict) or not all(has):
        raise ArgumentError(
            "dataset",
            f"must be a map-style data set, that has a length and items, so that a stream can begin anywhere, but "
            f"it is a {type(dataset).__name__}",
        )
    if getattr(dataset, "ndim", 1) == 0 or len(dataset) < 1:
        raise ArgumentError("dataset", f"must have an item at least, but this {type(dataset).__name__} has none")
    return dataset


def _whole(name: str, value: Any) -> int:
    if not arguments.is_int(value) or value < 0:
        raise ArgumentError(name, f"must be an int of at least 0, but it is {arguments.described(value)}")
    return int(value)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _LOADER:
            raise ArgumentError(name, f"must be an option among {', '.join(_LOADER)}, but there is no such one here")
    if options.get("prefetch_factor") is not None:
        arguments.positive_int("prefetch_factor", options["prefetch_factor"])
    arguments.one_of("pin_memory", options.get("pin_memory", False), (False, True))
    timeout = options.get("timeout", 0)
    if not (arguments.is_number(timeout) and 0 <= timeout < math.inf):
        raise ArgumentError("timeout", f"must be a number of seconds, at least 0, but it is {timeout!r}")
    return options


def _few(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:5])) + ", ..." * (len(indices) > 5)
