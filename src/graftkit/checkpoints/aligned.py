"""Views of tensors whose rows another vocabulary puts in another order: gathered, averaged, zero, or joined.

Each answers as a checkpoint does, "give me these elements", and holds no more than one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from graftkit.checkpoints import storage
from graftkit.checkpoints.headers import ITEMSIZE, TensorInfo
from graftkit.checkpoints.rows import Rows

CHUNK = 1 << 18  # elements that are averaged at once


class Readable(Protocol):
    """Whatever hands out elements of a tensor as raw bytes."""

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` in the head of `buffer`."""


def packed(info: TensorInfo, count: int, dtype: str | None = None) -> TensorInfo:
    """What a tensor's header would say of `count` of its rows."""
    return replace(info, shape=(count, *info.shape[1:]), dtype=dtype or info.dtype)


@dataclass(frozen=True)
class Gathered:
    """Some rows of a tensor, packed."""

    source: Readable
    origin: TensorInfo
    rows: Rows

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Packed elements `[start, stop)` as raw bytes; runs of rows are read together."""
        size, width = ITEMSIZE[self.origin.dtype], math.prod(self.origin.shape[1:])
        for place, first, count in self.rows.spans(start, stop, width):
            piece = buffer[(first - start) * size : (first - start + count) * size]
            self.source.read(self.origin, place, place + count, piece)
        return buffer[: (stop - start) * size]


@dataclass(frozen=True)
class Averaged:
    """The mean of several packed tensors of one shape, in float32."""

    parts: tuple[tuple[Readable, TensorInfo], ...]

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` of the mean."""
        total = np.zeros(stop - start, np.float64)
        for source, info in self.parts:
            total += _numbers(source, info, start, stop)
        return _put(total / len(self.parts), buffer)


@dataclass(frozen=True)
class Centroid:
    """The mean of all rows of several packed tensors of one width, once for each row that is asked for, in float32."""

    parts: tuple[tuple[Readable, TensorInfo], ...]
    width: int
    _held: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` of rows that are all the same."""
        if not self._held:
            self._held.append(self._mean())
        first = start % self.width
        repeats = -(-(first + stop - start) // self.width)
        return _put(np.tile(self._held[0], repeats)[first : first + stop - start], buffer)

    def _mean(self) -> np.ndarray:
        total, rows = np.zeros(self.width, np.float64), 0
        step = max(1, CHUNK // self.width) * self.width
        for source, info in self.parts:
            for start in range(0, info.elements, step):
                stop = min(start + step, info.elements)
                total += _numbers(source, info, start, stop).reshape(-1, self.width).sum(axis=0)
            rows += info.shape[0]
        return total / max(rows, 1)


@dataclass(frozen=True)
class Joined:
    """Views one after the other, `counts` elements of each; as they are if all have one dtype, else widened."""

    parts: tuple[tuple[Readable, TensorInfo], ...]
    counts: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The dtype of what is handed out."""
        dtypes = {info.dtype for _, info in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)`, counted through all views."""
        size, begin = ITEMSIZE[tensor.dtype], 0
        for (source, info), count in zip(self.parts, self.counts, strict=True):
            first, last = max(start, begin), min(stop, begin + count)
            if first < last:
                piece = buffer[(first - start) * size : (last - start) * size]
                if info.dtype == tensor.dtype:
                    source.read(info, first - begin, last - begin, piece)
                else:
                    numbers = _numbers(source, info, first - begin, last - begin)
                    piece.view(storage.STORAGE[tensor.dtype])[:] = numbers
            begin += count
        return buffer[: (stop - start) * size]


@dataclass(frozen=True)
class Zeros:
    """Rows of zeros."""

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)`, all zero."""
        view = buffer[: (stop - start) * ITEMSIZE[tensor.dtype]]
        view[:] = 0
        return view


def _numbers(source: Readable, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    raw = source.read(info, start, stop, np.empty((stop - start) * ITEMSIZE[info.dtype], np.uint8))
    return storage.as_float(raw, info.dtype, np.float64)


def _put(numbers: Any, buffer: np.ndarray) -> np.ndarray:
    view = buffer[: numbers.size * 4]
    view.view(np.float32)[:] = numbers
    return view
