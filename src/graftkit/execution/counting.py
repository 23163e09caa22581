"""How often each magnitude occurs, in windows of 65536 of them: what selecting the k-th largest needs to know.

Magnitudes are the bits of float32 numbers without the sign, which are ordered as the numbers are. Deltas of bfloat16
tensors are formed and counted in one compiled pass over the files' bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graftkit.compiling import compiled
from graftkit.execution.blending import bits_of, read_bits, scratch
from graftkit.execution.blocks import Feed, Reader, Workspace, cuts
from graftkit.execution.casting import PART
from graftkit.execution.machine_code import Pass

BINS = 1 << 16
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32's bits without its sign
TOGETHER = 128  # entries that are looked at together for one in the window

Read = Callable[[Reader, int, int], np.ndarray]
"""Reads elements as bit patterns of float32 numbers, uint32 [rows, n]; their signs do not count."""


@dataclass(frozen=True)
class Window:
    """Magnitudes without their lowest `shift` bits, from `first` [rows] on; most are expected `middle` [rows] above."""

    shift: int
    first: np.ndarray
    middle: np.ndarray

    @classmethod
    def at(cls, first: np.ndarray, shift: int = 0) -> Window:
        """A window with nothing expected anywhere but at its beginning."""
        return cls(shift, first.astype(np.int64), np.zeros(len(first), np.int64))


def count(reader: Reader, window: Window, read: Read = Reader.read_patterns) -> np.ndarray:
    """Per row how many of a step's entries lie above the window, and how many at each of its places; [rows, 1 + BINS].

    NaN and infinity count as the largest; the pass that merges refuses them.
    """
    counts = np.zeros((len(window.first), 1 + BINS), np.int64)
    for start, stop in cuts(reader.step):
        _add(_entries(reader, start, stop, read), window, reader.space, counts)
    return counts


def sample(reader: Reader, blocks: Sequence[tuple[int, int]]) -> Callable[[Window], np.ndarray]:
    """As `count` of some blocks, which are read once; without what lies above, [rows, BINS]."""
    held: np.ndarray | None = None
    size, end = sum(stop - start for start, stop in blocks), 0
    for start, stop in blocks:
        entries = _entries(reader, start, stop, Reader.read_patterns)
        held = reader.space.stack("sample", len(entries), size, entries.dtype.type) if held is None else held
        held[:, end : end + stop - start] = entries
        end += stop - start
    assert held is not None, "a sample of no blocks"

    def counted(window: Window) -> np.ndarray:
        counts = np.zeros((len(window.first), 1 + BINS), np.int64)
        _add(held, window, reader.space, counts)
        return counts[:, 1:]

    return counted


def _entries(reader: Reader, start: int, stop: int, read: Read) -> np.ndarray:
    """Patterns of some entries, uint32 [rows, n]; or the bits of base and models that they are between, uint16."""
    feeds = delta_bits(reader) if read is Reader.read_patterns else None
    return read_bits(feeds, start, stop, reader.space) if feeds else read(reader, start, stop)


def _add(entries: np.ndarray, window: Window, space: Workspace, counts: np.ndarray) -> None:
    """Adds what `_entries` gave to counts [rows, 1 + BINS]."""
    if entries.dtype == np.uint16:
        numbers = np.concatenate([[window.shift], window.first, window.middle]).astype(np.float64)
        COUNT(entries, numbers, counts.reshape(-1), entries[0], numbers, *scratch(space, len(entries)))
        return
    for k, row in enumerate(entries):
        _count_window(row, np.uint32(window.shift), np.int32(window.first[k]), np.int32(window.middle[k]), counts[k])


def delta_bits(reader: Reader) -> tuple[Feed, ...] | None:
    """The base and the models of a step as plain bfloat16 tensors; None where some are not, or there is no base."""
    return bits_of(reader) if reader.base else None


@compiled
def _count_deltas(raws, numbers, counts, out, sums, wide, single):  # type: ignore[no-untyped-def]
    models, shift = raws.shape[0] - 1, np.uint32(numbers[0])
    for start in range(0, raws.shape[1], PART):
        bits = raws[0, start : start + PART]
        delta = single[: bits.size]
        for t in range(models):
            _subtract(raws[t + 1, start : start + bits.size], bits, delta)
            first, middle = np.int32(numbers[1 + t]), np.int32(numbers[1 + models + t])
            row = counts[t * (1 + BINS) : (t + 1) * (1 + BINS)]
            _count_window(delta.view(np.uint32), shift, first, middle, row)


@compiled
def _subtract(bits, base, delta):  # type: ignore[no-untyped-def]
    for i in range(delta.size):
        number = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)
        delta[i] = number - np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32)


@compiled
def _count_window(patterns, shift, first, middle, counts):  # type: ignore[no-untyped-def]
    above, equal = np.int64(0), np.int64(0)  # deltas of bfloat16 models tie: `middle` alone may be a tenth of all
    bins, zero = np.int32(BINS), np.int32(0)
    for start in range(0, patterns.size, TOGETHER):
        part = patterns[start : start + TOGETHER]
        over, reached, same = np.int32(0), np.int32(0), np.int32(0)
        for i in range(part.size):
            place = np.int32(np.int32((part[i] & MAGNITUDE) >> shift) - first)  # a sum of int32 would be 64 bits wide
            over = np.int32(over + np.int32(place >= bins))
            reached = np.int32(reached + np.int32(place >= zero))
            same = np.int32(same + np.int32(place == middle))
        above += over
        equal += same
        if reached > over + same:  # few parts have another entry in the window
            for i in range(part.size):
                place = np.int32(np.int32((part[i] & MAGNITUDE) >> shift) - first)
                if 0 <= place < BINS and place != middle:
                    counts[1 + place] += 1
    counts[0] += above
    counts[1 + middle] += equal


COUNT = Pass(_count_deltas)
