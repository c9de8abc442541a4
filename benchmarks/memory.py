"""What data need in memory: of a command that holds them, and of training that holds or streams them.

Run with ``python benchmarks/memory.py``; a minute. Each kind of file holds 10,000 pictures of 3 x 64 x 64 bytes, or as
much, and is read in a process of its own; the peak is that of its resident memory, in which pages of a mapped file
count. Of a command that reads, checks, divides and holds the data it is to stay below twice the data, above what an
import needs. Of training on batches that are streamed it is to stay at that of training on a batch that is there. Linux
only.
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

SHAPE, BATCH = (3, 64, 64), 16
WAYS = ("a batch", "streamed", "2 workers", "mapped", "held")  # of a process without those that read for it


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


def trained(way: str, path: Path) -> None:
    """Print the size of the data, the memory that an import needs, and the peak of a training, in bytes."""
    import torch

    import pyrodiff
    from pyrodiff.streaming import ArrayFile, Blocks, Stream

    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(1000))
    torch.randn(1000).sum()
    before = peak()
    if way == "a batch":
        dataset = torch.zeros(BATCH, *SHAPE, dtype=torch.uint8)
    elif way in ("held", "mapped"):
        dataset = pyrodiff.datasets.array(path, mapped=way == "mapped")
    else:
        dataset = ArrayFile(path)
    workers = 2 if way == "2 workers" else 0
    network = pyrodiff.networks.UNet(SHAPE, channels=(8, 8), hidden=32)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
    pair = pyrodiff.Diffusion(forward, reverse, SHAPE, decoder=pyrodiff.DiscretizedDecoder(256)).one_step()
    svi = pyrodiff.SVI(pair.model, pair.guide, torch.optim.Adam, pyrodiff.DiffusionELBO())
    for block in Blocks(dataset, BATCH, num_workers=workers):  # all of it once, as for what is checked or fitted
        block.amax()
    for batch in Stream(dataset, BATCH, num_workers=workers).batches(until=20):
        svi.step(pyrodiff.from_levels(batch, 256))
    print(path.stat().st_size, before, peak())


def peak() -> int:
    """The most memory that was resident, in bytes; only Linux says it of this process without the one that made it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> int:
    """Print a line for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000, help="how many pictures (default: 10000)")
    parser.add_argument("--only", choices=(*FILES, "training"), help="one kind of file, or training")
    parser.add_argument("--held", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trained", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.held is not None:
        held(options.held)
        return 0
    if options.trained is not None:
        trained(options.trained, options.path)
        return 0
    x = np.random.default_rng(0).integers(0, 256, (options.number, *SHAPE), dtype=np.uint8)
    print(f"{'':12}  {'data':>9}  {'import':>9}  {'peak':>9}  above import / data")
    for name, write in FILES.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder, name), x)
                show(name, "--held", str(Path(folder, name)))
    if options.only in (None, "training"):
        print(f"training on batches of {BATCH} pictures, of")
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder, "x.npy"), x)
            for way in WAYS:
                show(way, "--trained", way, "--path", str(Path(folder, "x.npy")))
    return 0


def show(name: str, *options: str) -> None:
    """Run this script in a process of its own, and print what it measured."""
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    size, before, most = map(int, done.stdout.split())
    sizes = "  ".join(f"{number / 2**20:5.0f} MiB" for number in (size, before, most))
    print(f"{name:12}  {sizes}  {(most - before) / size:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
