"""Stopping on a signal, without losing work."""

import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Stop", "leave"]


def leave(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends the process at once, for use while nothing can be lost.

    Arguments:
        number: The number of the signal.
        frame: The interrupted frame.
    """
    os.write(2, f"pyrodiff: stopped by {signal.Signals(number).name}: nothing was written\n".encode())
    os._exit(128 + number)


class Interrupted(BaseException):  # not an Exception, which readers take for a damaged file
    """A signal asked to stop, and the work stopped at a safe point.

    Arguments:
        signal: The number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Stop:
    """A context in which the first SIGINT or SIGTERM stops at the next safe point, and the second at once.

    Arguments:
        alone: Whether this is the only process. Several stop together, so none of them stops by :meth:`check`.

    Attributes:
        signal: The first signal, if there was one. is_safe: Whether every point is a safe one, as nothing can be lost
            yet.
    """

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        self.signal: int | None = None
        self.is_safe = False

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(number)
        self.signal = number
        if self.is_safe:
            self.check()

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal asked to stop."""
        if self.signal is not None and self.alone:
            raise Interrupted(self.signal)

    def between(self, batches: Any) -> "Checked":
        """The batches, with a safe point before each.

        Arguments:
            batches: A sized iterable.
        """
        return Checked(self, batches)


class Checked:
    """Batches with a safe point before each."""

    def __init__(self, stop: Stop, batches: Any) -> None:
        self.stop, self.batches = stop, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.stop.check()
            yield batch
