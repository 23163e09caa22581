"""Headers of safetensors files: which tensors, of what dtype and shape, at which bytes. No torch, no weights read.

A header is checked as it is read: a truncated file, overlapping or gapped tensors and sizes that contradict shapes
are refused with the file's name, so that a merge never starts on a broken input.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library

ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the format's names of dtypes."""

MOST_ELEMENTS, MOST_DIMENSIONS = 2**63 - 1, 64  # what torch and numpy can hold; empty dimensions do not excuse others

FLOATING = ("F64", "F32", "F16", "BF16")
"""The dtypes that can be merged."""

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The recipe's names of dtypes (torch's) to the file format's."""

METADATA = {"format": "pt"}
"""The metadata that `transformers` asks for in a file of weights."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: its file, dtype (`"BF16"`), shape and the byte range `[begin, end)` within the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor occupies."""
        return self.end - self.begin


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, and the file's metadata.

    Raises CheckpointError when the file is missing, truncated, malformed, or its tensors overlap or leave gaps.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes); copy it anew")
            raw = json.loads(handle.read(length), object_pairs_hook=unique_pairs)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except DuplicateNameError as error:
        raise CheckpointError(f"{file}: the header names {error} twice; copy the file anew") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}); copy the file anew") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object; copy the file anew")
    metadata = raw.pop("__metadata__", None) or {}
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in raw.items()}
    _check_extents(file, list(tensors.values()), 8 + length, size)
    return tensors, metadata


class DuplicateNameError(ValueError):
    """A key that stands twice in a JSON object."""


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose keys are distinct. Raises DuplicateNameError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateNameError(next(repr(name) for name in names if names.count(name) > 1))
    return result


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        name.encode()
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: the entry of tensor {name!r} is malformed; copy the file anew")
    if dtype not in ITEMSIZE:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype!r}, which cannot be read; convert it first")
    if len(shape) > MOST_DIMENSIONS or math.prod(n for n in shape if n) > MOST_ELEMENTS:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {_shown(shape)} is larger than a tensor can be; the file is malformed, "
            "copy it anew"
        )
    if end - begin != math.prod(shape) * ITEMSIZE[dtype]:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {_shown(shape)} and dtype {dtype} cannot have {end - begin} bytes; "
            "the file is malformed, copy it anew"
        )
    return TensorInfo(name, dtype, shape, file, data_start + begin, data_start + end)


def _shown(shape: tuple[int, ...]) -> str:
    """A shape for a message; cut short where somebody made it long."""
    text = str(list(shape))
    return text if len(text) <= 80 else f"{text[:80]}...]"


def _check_extents(file: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            fault = "overlaps its neighbour" if tensor.begin < position else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {tensor.name!r} {fault}; the file is malformed")
        position = tensor.end
    if position != size:
        verdict = "truncated" if position > size else "longer than its header says"
        raise CheckpointError(f"{file}: {verdict} ({size} bytes, its header needs {position}); copy it anew")


def encode_header(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes that open a safetensors file, and the file offset of each tensor.

    `tensors`: (name, dtype, shape). The order in the file is that of the safetensors library, element size descending
    and then name, so that the file is byte for byte what the library would have written.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets, position = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-ITEMSIZE[t[1]], t[0])):
        end = position + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, refused when the name would lead out of the directory (symbolic links of a hub cache may)."""
    path = directory / name
    if os.path.isabs(name) or Path(os.path.normpath(name)).parts[:1] == ("..",):
        raise CheckpointError(f"{directory}: the index names {name!r}, which leaves the directory; refused")
    return path
