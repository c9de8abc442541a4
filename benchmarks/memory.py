"""What data of a command need in memory while they are read, checked, divided and held, above what an import needs.

Run with ``python benchmarks/memory.py``; a quarter of a minute. Each kind of file holds 10,000 pictures of 3 x 64 x 64
bytes, or as much, and is read in a process of its own; the peak is that of its resident memory, in which pages of a
mapped file count. It is to stay below twice the data. Linux only.
"""

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPE = (3, 64, 64)


def idx(folder: Path, x: np.ndarray, pack: Callable[[bytes], bytes] = bytes) -> None:
    """Grey pictures, nine tenths of them in the file to learn from."""
    folder.mkdir()
    x = x.reshape(-1, SHAPE[1], SHAPE[2])
    for name, part in (("train", x[: len(x) * 9 // 10]), ("t10k", x[len(x) * 9 // 10 :])):
        header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in part.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(pack(header + part.tobytes()))


FILES: dict[str, Callable[[Path, np.ndarray], None]] = {  # what writes them
    "bytes.npy": np.save,
    "bytes.npz": lambda path, x: np.savez(path, x=x),
    "packed.npz": lambda path, x: np.savez_compressed(path, x=x),
    "idx": idx,
    "gzipped-idx": lambda path, x: idx(path, x, lambda content: gzip.compress(content, 1)),
    "floats.npy": lambda path, x: np.save(path, np.random.default_rng(0).random((len(x) // 4, *SHAPE), np.float32)),
}


def held(path: Path) -> None:
    """Print the size of the data, the memory that an import needs, and its peak with the data, in bytes."""
    import torch

    from pyrodiff.command.plans import prepare

    torch.randn(1000).sum()
    before = peak()
    _, data = prepare({"data": str(path)}, torch.device("cpu"))
    data.draw(128)
    wholes = {part.whole.untyped_storage().data_ptr(): part.whole.untyped_storage() for part in data.parts.values()}
    print(sum(storage.nbytes() for storage in wholes.values()), before, peak())


def peak() -> int:
    """The most memory that was resident, in bytes; only Linux says it of this process without the one that made it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> int:
    """Print a line for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000, help="how many pictures (default: 10000)")
    parser.add_argument("--only", choices=tuple(FILES), help="one kind of file")
    parser.add_argument("--held", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.held is not None:
        held(options.held)
        return 0
    x = np.random.default_rng(0).integers(0, 256, (options.number, *SHAPE), dtype=np.uint8)
    print(f"{'':12}  {'data':>9}  {'import':>9}  {'peak':>9}  above import / data")
    for name, write in FILES.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder, name), x)
            command = [sys.executable, __file__, "--held", str(Path(folder, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        size, before, most = map(int, done.stdout.split())
        sizes = "  ".join(f"{number / 2**20:5.0f} MiB" for number in (size, before, most))
        print(f"{name:12}  {sizes}  {(most - before) / size:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
