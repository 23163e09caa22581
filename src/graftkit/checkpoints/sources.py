"""Where tensors come from: a checkpoint directory, an adapter, or another merge's result.

A source answers "which tensors, of what shape" from headers alone, and hands out readers that fetch a range of a
tensor's elements into a buffer that the caller reuses. Files are read with `pread`, never mapped: resident memory
stays at the size of the buffers, and a file that shrinks under us is an error message instead of a bus error.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.headers import (
    ITEMSIZE,
    METADATA,
    DuplicateNameError,
    TensorInfo,
    encode_header,
    inside,
    read_header,
    unique_pairs,
)
from graftkit.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = 8 << 20  # a file of so many bytes goes into a fingerprint whole
SAMPLES, SAMPLE_BYTES = 16, 4096  # what a fingerprint reads of a larger file, beside header and size
TENSORS, MIDDLE_BYTES = 512, 512  # and from the middles of how many of its tensors, and how much of each


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors files, as `transformers` writes them."""

    directory: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    kind: str = "checkpoint"
    _files: dict[Path, int] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in the order of their names."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    def fingerprint(self) -> str:
        """A short hash of headers, sizes and sampled bytes of all weight files; the same for a copy elsewhere."""
        return fingerprint(self.files, self.tensors.values())

    def content(self) -> str:
        """The fingerprint of the one file that the tensors would make, in however many files they are kept."""
        header, offsets = encode_header([(t.name, t.dtype, t.shape) for t in self.tensors.values()], METADATA)
        ordered = sorted(self.tensors.values(), key=lambda tensor: (offsets[tensor.name], tensor.nbytes))
        starts = [offsets[tensor.name] for tensor in ordered]
        size, digest = len(header) + sum(tensor.nbytes for tensor in ordered), hashlib.blake2b(digest_size=16)

        def read(position: int, length: int) -> bytes:
            found, stop = bytearray(header[position : position + length]), min(length, size - position)
            while len(found) < stop:
                k = bisect_right(starts, position + len(found)) - 1
                found += self._bytes(ordered[k], position + len(found) - starts[k], stop - len(found))
            return bytes(found)

        ends = ((tensor, start + tensor.nbytes) for tensor, start in zip(ordered, starts, strict=True))
        moved = [replace(tensor, file=Path(), begin=end - tensor.nbytes, end=end) for tensor, end in ends]
        _sample(digest, size, read, _middles(moved).get(Path(), []))
        self.close()
        return digest.hexdigest()

    def _bytes(self, tensor: TensorInfo, skip: int, most: int) -> bytes:
        """Bytes of a tensor behind its first `skip`, `most` or up to its end."""
        found = os.pread(self._descriptor(tensor.file), min(most, tensor.nbytes - skip), tensor.begin + skip)
        if not found:
            raise _cut_short(tensor)
        return found

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` of a tensor, as raw bytes in the head of `buffer` (uint8, long enough)."""
        size = ITEMSIZE[tensor.dtype]
        view = buffer[: (stop - start) * size]
        read_exactly(self._descriptor(tensor.file), view, tensor.begin + start * size, tensor)
        return view

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                try:
                    self._files[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read any more ({error.strerror})") from error
            return self._files[file]

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


def read_exactly(descriptor: int, view: np.ndarray, position: int, tensor: TensorInfo) -> None:
    """Fills `view` from the file at `position`. Raises CheckpointError where the file ends before."""
    done, memory = 0, memoryview(view.data)
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], position + done)
        if count == 0:
            raise _cut_short(tensor)
        done += count


def _cut_short(tensor: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{tensor.file}: ends within tensor {tensor.name!r}: truncated while being read")


def fingerprint(files: tuple[Path, ...], tensors: Iterable[TensorInfo] = ()) -> str:
    """BLAKE2 of each file's header, size and samples of its bytes; names and times do not count.

    All bytes of a small file; of a larger one samples at even distances, and one in the middle of each of `tensors`
    that stand in it, or of `TENSORS` of them at even distances.
    """
    digest, middles = hashlib.blake2b(digest_size=16), _middles(tensors)
    for file in files:
        with open(file, "rb") as handle:
            _sample(digest, file.stat().st_size, partial(_read_at, handle.fileno()), middles.get(file, []))
    return digest.hexdigest()


def _read_at(descriptor: int, position: int, length: int) -> bytes:
    return os.pread(descriptor, length, position)


def _sample(digest: Any, size: int, read: Callable[[int, int], bytes], middles: Sequence[tuple[int, int]]) -> None:
    """Updates a hash by a file's size and all of its bytes, or header, samples and `middles`; `read` takes a range."""
    digest.update(size.to_bytes(8, "little"))
    if size <= SMALL:
        digest.update(read(0, size))
        return
    digest.update(read(8, min(size, 8 + int.from_bytes(read(0, 8), "little"))))
    for k in range(SAMPLES):
        digest.update(read(max(0, (size - SAMPLE_BYTES) * k // (SAMPLES - 1)), SAMPLE_BYTES))
    for place, length in middles:
        digest.update(read(place, length))


def _middles(tensors: Iterable[TensorInfo]) -> dict[Path, list[tuple[int, int]]]:
    """Where the middles of tensors stand, and how much of each is looked at, by file."""
    found: dict[Path, list[tuple[int, int]]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        length = min(tensor.nbytes, MIDDLE_BYTES)
        found.setdefault(tensor.file, []).append((tensor.begin + (tensor.nbytes - length) // 2, length))
    return {file: places[:: -(-len(places) // TENSORS)] for file, places in found.items()}


def full_hash(files: tuple[Path, ...]) -> str:
    """BLAKE2 of every byte of the files, in order; seconds per gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads the headers of a checkpoint directory.

    Raises CheckpointError for missing or truncated shards, index entries that are not in their file or leave the
    directory, pickle-only checkpoints, and directories where a single file and an index contradict each other.
    """
    index, single = directory / INDEX, directory / WEIGHTS
    if index.is_file():
        tensors = _indexed(directory, index)
        if single.is_file() and not any(t.file == single for t in tensors.values()):
            raise CheckpointError(
                f"{directory}: holds both {WEIGHTS} and an index of other shards, and tools differ in which they read; "
                "delete the stale one"
            )
    else:
        tensors, _ = read_header(single if single.is_file() else _only_file(directory))
    if not tensors:
        raise CheckpointError(f"{directory}: the weights hold no tensor")
    return Checkpoint(directory, tensors, read_json(directory / "config.json", missing={}))


def _indexed(directory: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; copy it anew")
    shards = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        path = inside(directory, shard)
        if not _is_file(path):
            raise CheckpointError(f"{index}: names the shard {shard!r}, which is missing; download the model again")
        shards[shard] = read_header(path)[0]
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index}: places tensor {name!r} in {shard!r}, which does not hold it")
    extra = sorted(name for shard, held in shards.items() for name in held if weight_map.get(name) != shard)
    if extra:
        raise CheckpointError(
            f"{index}: does not list tensor {extra[0]!r}, which its shards hold; index and shards differ"
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def _only_file(directory: Path) -> Path:
    files = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{directory}: {len(files)} safetensors files but no {INDEX}; which belong together?")
    if pickles(directory):
        raise CheckpointError(
            f"{directory}: only pickle weights ({pickles(directory)[0].name}), which can run code when loaded; "
            "convert them to safetensors, or pass --allow-pickle to read them with weights-only loading"
        )
    raise CheckpointError(f"{directory}: no {WEIGHTS}, no {INDEX}: not a checkpoint")


def pickles(directory: Path) -> list[Path]:
    """The pickle weight files of a directory."""
    return sorted(path for pattern in ("pytorch_model*.bin", "*.pth", "*.pt") for path in directory.glob(pattern))


def read_json(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file; `missing` when the file does not exist, if given."""
    if missing is not None and not file.is_file():
        return missing
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_pairs)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except DuplicateNameError as error:
        raise CheckpointError(f"{file}: the key {error} stands twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value
