"""Files that are there whole or not at all, whatever happens while they are written."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["path_of", "write"]


def write(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile; by one process at a time.

    Arguments:
        path: The file; one that is there is replaced once the new one is on the disk.
        data: What it is to hold.

    Raises:
        OSError: If it cannot be written; what was there before is as it was.
    """
    path = path_of(path)
    part = path.with_name(f".{path.name}.part")  # what a kill leaves is taken up by the next one
    try:
        with part.open("wb") as file:
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
    """Bring a new name to the disk, where a system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):  # the file is there, and whole; some file systems know no more
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def path_of(value: str | os.PathLike[str]) -> Path:
    """The path of a file.

    Arguments:
        value: What is given as one.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str | os.PathLike) or not Path(value).name:
        raise ValueError(f"path must be the path of a file, a str or os.PathLike, but it is {value!r}")
    return Path(value)
