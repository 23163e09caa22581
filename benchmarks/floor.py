"""The floor: read every input byte once and write one output's bytes once, with nothing computed in between.

    python benchmarks/floor.py 1.5B [--threads 2]

Each thread has one reused buffer: it reads a piece of base, math and code in turn, then writes the buffer (weights, so
never zeros) at the same place of a fresh file. The page cache is warm, nothing is flushed, and the output is removed
after the clock has stopped. Threads take contiguous parts of the model, so that they seldom write to the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness import MODELS, OUTPUTS, clear_outputs, models_folder, warm, weight_files

BUFFER = 8 << 20


@dataclass(frozen=True)
class Piece:
    shard: int
    offset: int
    length: int


def pieces(paths: list[Path], buffer: int) -> list[Piece]:
    sizes = [path.stat().st_size for path in paths]
    return [Piece(i, at, min(buffer, n - at)) for i, n in enumerate(sizes) for at in range(0, n, buffer)]


def copy(part: list[Piece], inputs: list[list[int]], outputs: list[int], buffer: int) -> int:
    """Move the pieces of one thread; gives the number of bytes read and written."""
    view, moved = memoryview(bytearray(buffer)), 0
    for piece in part:
        window = view[: piece.length]
        for model in inputs:
            moved += os.preadv(model[piece.shard], [window], piece.offset)
        moved += os.pwrite(outputs[piece.shard], window, piece.offset)
    return moved


def floor(size: str, threads: int, buffer: int = BUFFER) -> dict[str, float]:
    folder, target = models_folder(size), OUTPUTS / f"floor{threads}"
    target.mkdir(parents=True)
    sources = [weight_files(folder / model) for model in MODELS]
    start = time.perf_counter()
    inputs = [[os.open(path, os.O_RDONLY) for path in paths] for paths in sources]
    outputs = [os.open(target / path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644) for path in sources[0]]
    work = pieces(sources[0], buffer)
    share = -(-len(work) // threads)
    parts = [work[at : at + share] for at in range(0, len(work), share)]
    with ThreadPoolExecutor(threads) as pool:
        moved = sum(pool.map(lambda part: copy(part, inputs, outputs, buffer), parts))
    for file in [*outputs, *(file for model in inputs for file in model)]:
        os.close(file)
    seconds = time.perf_counter() - start
    expected = sum(path.stat().st_size for paths in [*sources, sources[0]] for path in paths)
    if moved != expected:
        raise SystemExit(f"moved {moved} bytes of {expected}: the disk is full, or the models changed")
    return {"threads": threads, "seconds": seconds, "bytes": moved, "gigabytes_per_second": moved / seconds / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True, help="read the inputs first")
    options = parser.parse_args()
    if options.warm:
        warm(options.size)
    for threads in options.threads:
        clear_outputs()
        try:
            print(json.dumps(floor(options.size, threads)))
        finally:
            clear_outputs()


if __name__ == "__main__":
    main()
