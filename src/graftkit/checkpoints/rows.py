"""Some rows of a tensor, in any order: what an embedding's tokens are gathered from, and where they go.

Rows that follow each other on disk are one run, read or written in one piece.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

PART = "\t"
"""What stands between a tensor's name and that of a part of it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `first, first + 1, ...` of a tensor, `count` of each run; packed they are numbered from 0."""

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers, in their order."""
        runs: list[tuple[int, int]] = []
        first, count = 0, 0
        for number in numbers:
            if count and number == first + count:
                count += 1
            else:
                runs += [(first, count)] if count else []
                first, count = number, 1
        return cls((*runs, (first, count)) if count else ())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Per run the packed number after its last row."""
        return tuple(accumulate(count for _, count in self.runs))

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.ends[-1] if self.runs else 0

    @cached_property
    def digest(self) -> str:
        """Names the rows and their order."""
        return hashlib.blake2b(repr(self.runs).encode(), digest_size=16).hexdigest()

    def __iter__(self) -> Iterator[int]:
        return (number for first, count in self.runs for number in range(first, first + count))

    def spans(self, start: int, stop: int, width: int) -> Iterator[tuple[int, int, int]]:
        """Packed elements `[start, stop)` of rows that are `width` wide, in pieces that lie together in the tensor.

        Yields (element of the tensor, first packed element, how many).
        """
        run = bisect_right(self.ends, start // width) if width else len(self.runs)
        while start < stop:
            first, count = self.runs[run]
            before = (self.ends[run] - count) * width
            size = min(stop, self.ends[run] * width) - start
            yield first * width + start - before, start, size
            start, run = start + size, run + 1
