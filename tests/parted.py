"""Processes that part from one that has imported torch, and are there in milliseconds."""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

gc.freeze()  # all that is imported stays: a process that has parted looks for no garbage there, which takes it 0.2 s


def context() -> ForkServerContext:
    """What they part from: one process for all tests of this one, which has imported what any of them needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pyrodiff.command.train", "pyrodiff.api", "pyro.infer.autoguide", "pytest", "torch._dynamo"]
    )
    return context


def _heard(work: Callable[[int, str], None], rank: int, folder: str) -> None:
    """Do the work of one of two, and write all that is said into a file."""
    log = os.open(f"{folder}/log {rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    work(rank, folder)


def both(work: Callable[[int, str], None], seconds: float = 120) -> list[Any]:
    """What each of two processes saves under its number, in a folder where they meet; what they said, if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        started = [context().Process(target=_heard, args=(work, rank, folder)) for rank in range(2)]
        try:
            for process in started:
                process.start()
            until = time.monotonic() + seconds
            while any(process.is_alive() for process in started) and time.monotonic() < until:
                if any(process.exitcode for process in started):  # one has failed, and the other would wait for it
                    break
                time.sleep(0.05)
        finally:
            for process in started:
                process.kill()
                process.join()
        said = "\n".join(path.read_text() for path in sorted(Path(folder).glob("log *")))
        assert [process.exitcode for process in started] == [0, 0], said
        return [torch.load(f"{folder}/{rank}") for rank in range(2)]
