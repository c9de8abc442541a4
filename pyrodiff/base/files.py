"""Atomic writes, so that a file is there whole or not at all; and opening files without following links."""

import errno
import glob
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from .arguments import ArgumentError

__all__ = ["path_of", "plainly", "printable", "write"]


def write(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file atomically: it is there whole or not at all, whatever happens meanwhile. One process at a time.

    Arguments:
        path: The file; one that is there is replaced once the new one is on the disk.
        data: What it is to hold.

    Raises:
        OSError: If it cannot be written; what was there before is as it was.
    """
    path = path_of(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")  # a name that nobody can have made a link of
    for left in path.parent.glob(f".{glob.escape(path.name)}.{16 * '[0-9a-f]'}.part"):  # by a killed process
        with suppress(OSError):
            left.unlink()
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flush the folder's entries to the disk, on systems that can."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):  # the file itself is written; some file systems cannot sync a folder
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def path_of(value: str | os.PathLike[str]) -> Path:
    """The path of a file.

    Arguments:
        value: The argument.

    Raises:
        ValueError: If it is not the path of a file.
    """
    if not isinstance(value, str | os.PathLike) or not Path(value).name:
        raise ArgumentError("path", f"must be the path of a file, a str or os.PathLike, but it is {value!r}")
    return Path(value)


def plainly(path: str, flags: int) -> int:
    """The opener of ``open(..., opener=plainly)``, which opens regular files only: no link, no pipe.

    Arguments:
        path: The file.
        flags: What it is opened for.

    Raises:
        OSError: If it is something else, or cannot be opened.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "this is no regular file", path)
    return descriptor


def printable(value: object, but: str = "") -> str:
    """A value as text that is safe to print on a terminal: what is not printable is escaped.

    Arguments:
        value: The value.
        but: Characters that are not escaped.
    """
    return "".join(one if one.isprintable() or one in but else ascii(one)[1:-1] for one in str(value))
