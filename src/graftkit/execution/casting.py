"""The one rounding: numbers to the output's bytes, and what was lost by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graftkit.checkpoints import storage
from graftkit.compiling import compiled, reassociated
from graftkit.errors import NonFiniteError
from graftkit.execution.blocks import Workspace

PART = 1024  # elements: what a part goes through is in the nearest cache, and float32 still counts and adds them up


@dataclass
class Tally:
    """What a merge did to one tensor, and what the cast swallowed of it.

    `delta` and `lost` are sums of squares of the wanted change and of the cast's error; `swallowed` counts weights
    that should have changed and did not. Without a base only the cast's error counts.
    """

    delta: float = 0.0
    lost: float = 0.0
    swallowed: int = 0
    wanted: int = 0

    def add(self, sums: np.ndarray) -> None:
        """Adds a block's `delta`, `lost`, `wanted` and `swallowed`."""
        self.delta += float(sums[0])
        self.lost += float(sums[1])
        self.wanted += int(sums[2])
        self.swallowed += int(sums[3])

    def record(self, elements: int) -> dict[str, float]:
        """For the journal and `graft.json`."""
        return {
            "delta_norm": float(np.sqrt(self.delta)),
            "cast_error_norm": float(np.sqrt(self.lost)),
            "unchanged": self.swallowed / self.wanted if self.wanted else 0.0,
            "changed": (self.wanted - self.swallowed) / elements if elements else 0.0,
        }


def cast(
    result: np.ndarray, base: np.ndarray | None, is_delta: bool, dtype: str, tally: Tally, space: Workspace, label: str
) -> np.ndarray:
    """Adds the base to a delta and casts once; returns the bytes to write.

    Raises NonFiniteError when the result overflows the output dtype or is undefined (weights that sum to zero).
    """
    start, anchored = result if base is None else base, base is not None
    sums = np.zeros(4)
    if dtype == "BF16":
        raw = space.take("out", result.size * 2, np.uint8)
        _cast_bfloat16(result, start, is_delta, anchored, raw.view(np.uint16), sums)
    else:
        wide = result
        if is_delta:
            with np.errstate(over="ignore", invalid="ignore"):
                wide = np.add(start, result, out=space.take("wide", result.size, result.dtype))
        raw = storage.narrow(wide, dtype, space.take("out", result.size * 8, np.uint8))
        back = space.take("back", result.size, result.dtype)
        storage.widen(raw, dtype, back)
        _tally_all(wide, start, back, anchored, sums)
    check(raw, dtype, sums, label)
    tally.add(sums)
    return raw


def check(raw: np.ndarray, dtype: str, sums: np.ndarray, label: str) -> None:
    """Refuses bytes that are not finite. They show in the sums; so do squares too large for them, which do no harm."""
    if not np.isfinite(sums).all() and not storage.finite(raw, dtype):
        raise NonFiniteError(
            f"{label}: the result is not finite in {dtype}: weights that sum to zero, or too large for it"
        )


@compiled
def _cast_bfloat16(result, base, is_delta, anchored, bits, sums):  # type: ignore[no-untyped-def]
    """As for other dtypes, a part at a time, so that what it goes over again is still in the nearest cache."""
    wide, single = np.empty(PART, result.dtype), np.empty(PART, np.float32)
    before, after = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for first in range(0, result.size, PART):
        part, start, wanted = bits[first : first + PART], base[first : first + PART], result[first : first + PART]
        n = part.size
        for i in range(n):
            before[i] = start[i]
            wide[i] = wanted[i]
        if is_delta:
            for i in range(n):
                wide[i] += start[i]
        round_bfloat16(wide[:n], single[:n], part)
        storage.widen_bfloat16(part, after[:n])
        tally_part(single[:n], before[:n], after[:n], anchored, sums)


@compiled
def round_bfloat16(wide: np.ndarray, single: np.ndarray, bits: np.ndarray) -> None:
    """The bfloat16 nearest to each number, as bits; and the number as float32."""
    storage.shorten(wide, single)
    storage.narrow_bfloat16(single.view(np.uint32), bits)


@compiled
def _tally_all(wide, before, after, anchored, sums):  # type: ignore[no-untyped-def]
    for first in range(0, wide.size, PART):
        part = slice(first, first + PART)
        tally_part(wide[part], before[part], after[part], anchored, sums)


@reassociated
def tally_part(wide: np.ndarray, before: np.ndarray, after: np.ndarray, anchored: bool, sums: np.ndarray) -> None:
    """Adds to `sums` what a `Tally` counts, for numbers before a merge, wanted by it, and after the cast."""
    moved = lost = wanted = swallowed = wide.dtype.type(0)
    none, one = wide.dtype.type(0), wide.dtype.type(1)
    for i in range(wide.size):
        change, error = wide[i] - before[i], after[i] - wide[i]
        counts = one if change != none else none
        moved += change * change
        lost += error * error
        wanted += counts
        swallowed += counts if after[i] == before[i] else none
    sums[1] += lost
    if anchored:
        sums[0] += moved
        sums[2] += wanted
        sums[3] += swallowed
