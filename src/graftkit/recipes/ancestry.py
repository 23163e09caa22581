"""Whether two models come from one: measured on a bounded sample of their values, without numpy or torch.

Shapes prove nothing: every seven-billion-parameter model of one year has the same ones. Matrices that were trained
apart are as good as random to each other, so the cosine of n of their values is 0, give or take 1 / sqrt(n); those of a
model and of a fine-tune of it stay near 1. Refused is what lies below the middle.
"""

from __future__ import annotations

import math
import statistics
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul

from graftkit.checkpoints.headers import ITEMSIZE, TensorInfo
from graftkit.errors import CheckpointError
from graftkit.recipes.projections import Piece

LEAST = 0.5
"""The median cosine below which two models are refused: half-way from strangers (0) to a model and itself (1)."""

MATRICES, ROWS, COLUMNS = 24, 4, 512
"""What is read at most: the heads of a few rows of a few matrices, 96 KiB a model in 16 bits."""

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Kinship:
    """How alike two models are: cosines and relative distances `|W - W0| / |W0|` of samples, one per matrix."""

    source: int
    other: int
    cosines: tuple[float, ...]
    distances: tuple[float, ...]
    values: int

    @property
    def cosine(self) -> float:
        """The median cosine; 1 where nothing could be compared."""
        return statistics.median(self.cosines) if self.cosines else 1.0

    @property
    def distance(self) -> float:
        """The median relative distance."""
        return statistics.median(self.distances) if self.distances else 0.0

    @property
    def related(self) -> bool:
        """Whether the models share an ancestor, as far as the sample tells."""
        return self.cosine >= LEAST


@dataclass(frozen=True)
class Side:
    """One of the two models: its tensors, and the pieces of them that make each tensor of the output."""

    source: int
    tensors: Mapping[str, TensorInfo]
    pieces: Mapping[str, tuple[Piece, ...]]


def kinship(one: Side, other: Side, shapes: Mapping[str, tuple[int, ...]]) -> Kinship:
    """Compares two models on a sample of the matrices of an output, given by name and shape."""
    cosines, distances, values = [], [], 0
    for name in _spread(list(shapes), MATRICES):
        left, right = _sample(one, name, shapes[name]), _sample(other, name, shapes[name])
        dot, norms = sum(map(mul, left, right)), (sum(map(mul, left, left)), sum(map(mul, right, right)))
        if not all(math.isfinite(norm) and norm > 0 for norm in norms):
            continue  # zeros tell nothing, and what is broken or quantised is refused by name where it is read
        values += len(left)
        cosines.append(dot / math.sqrt(norms[0]) / math.sqrt(norms[1]))
        distances.append(math.sqrt(max(0.0, norms[0] + norms[1] - 2 * dot) / norms[1]))
    return Kinship(one.source, other.source, tuple(cosines), tuple(distances), values)


def _spread(names: Sequence[str], count: int) -> list[str]:
    """Some of the names, from everywhere, and not in step with the period in which layers repeat."""
    if len(names) <= count:
        return list(names)
    places = dict.fromkeys(int(len(names) * (k * GOLDEN % 1)) for k in range(1, count + 1))
    return [names[place] for place in places]


def _sample(side: Side, name: str, shape: tuple[int, ...]) -> Sequence[float]:
    """The heads of some rows of an output's tensor, as a model has them; none of what holds no plain numbers."""
    if any(side.tensors[piece.name].dtype not in NUMBERS for piece in side.pieces[name]):
        return ()
    rows = dict.fromkeys(shape[0] * (2 * k + 1) // (2 * ROWS) for k in range(ROWS)) if shape[0] else {}
    width, found = math.prod(shape[1:]), list[float]()
    for row in rows:
        info, own = _place(side, name, row)
        found.extend(_read(info, own * width, min(width, COLUMNS)))
    return found


def _place(side: Side, name: str, row: int) -> tuple[TensorInfo, int]:
    """The model's tensor, and the row of it, in which a row of the output's is."""
    for piece in side.pieces[name]:
        info = side.tensors[piece.name]
        for first, count in piece.rows.runs if piece.rows else ((0, info.shape[0]),):
            if row < count:
                return info, first + row
            row -= count
    raise AssertionError(f"{name!r} has fewer rows than the output; this is a bug")


def _read(info: TensorInfo, start: int, count: int) -> Sequence[float]:
    size = ITEMSIZE[info.dtype]
    try:
        with open(info.file, "rb") as file:
            file.seek(info.begin + start * size)
            raw = file.read(count * size)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read any more ({error.strerror})") from error
    if len(raw) < count * size:
        raise CheckpointError(f"{info.file}: ends within tensor {info.name!r}: truncated while being read")
    return NUMBERS[info.dtype](raw)


def _bfloat16(raw: bytes) -> Sequence[float]:
    """The upper halves of float32 numbers."""
    wide = bytearray(2 * len(raw))
    wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
    return array("f", bytes(wide))


NUMBERS: Mapping[str, Callable[[bytes], Sequence[float]]] = {
    "BF16": _bfloat16,
    "F16": lambda raw: struct.unpack(f"<{len(raw) // 2}e", raw),
    "F32": lambda raw: array("f", raw),
    "F64": lambda raw: array("d", raw),
}
"""How numbers are read from bytes, by the dtypes that are compared."""
