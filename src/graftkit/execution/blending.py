"""Weighted sums of bfloat16 tensors, from the files' bytes to the output's in one compiled pass.

Most merges are one: of the models, or of the base and its models where the method's factors are for deltas. A part of a
block goes through all of it while it is in the nearest cache, in float64, and is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from graftkit.checkpoints import storage
from graftkit.execution.blocks import Feed, Reader, Workspace, non_finite
from graftkit.execution.casting import PART, Tally, check, round_bfloat16, tally_part
from graftkit.methods import Method


@dataclass(frozen=True)
class Blend:
    """One step as a weighted sum: `feeds` and their `factors`, the base the first of them if `anchored`."""

    feeds: tuple[Feed, ...]
    factors: np.ndarray
    anchored: bool
    space: Workspace
    label: str

    def block(self, start: int, stop: int, tally: Tally) -> np.ndarray:
        """The bytes of elements `[start, stop)`. Raises NonFiniteError for a broken input or result."""
        raws = self.space.stack("raws", len(self.feeds), stop - start, np.uint16)
        for feed, row in zip(self.feeds, raws, strict=True):
            feed.raw(start, stop, row.view(np.uint8))
        out, sums = self.space.take("blend", stop - start, np.uint16), np.zeros(4)
        _blend(raws, self.factors, self.anchored, out, sums)
        if not np.isfinite(sums).all():
            self._check(raws)
        check(out.view(np.uint8), "BF16", sums, self.label)
        tally.add(sums)
        return out.view(np.uint8)

    def _check(self, raws: np.ndarray) -> None:
        for feed, row in zip(self.feeds, raws, strict=True):
            if not storage.finite(row.view(np.uint8), "BF16"):
                assert feed.info is not None
                raise non_finite(feed.label, feed.info)


def blend_of(method: Method, factors: np.ndarray, reader: Reader) -> Blend | None:
    """The step of a reader as a blend; None where an input or the output is no bfloat16 tensor on disk."""
    step, feeds = reader.step, reader.models
    anchored = method.returns_delta and reader.base is not None
    if anchored:
        assert reader.base is not None
        feeds, factors = (reader.base, *feeds), np.concatenate([[1 - factors.sum()], factors])
    composed = step.prepare or step.finish
    if composed or step.dtype != "BF16" or any(feed.info is None or feed.info.dtype != "BF16" for feed in feeds):
        return None
    return Blend(feeds, factors, anchored, reader.space, f"tensor {step.name!r}")


@njit(nogil=True, cache=True, error_model="numpy")
def _blend(raws, factors, anchored, out, sums):  # type: ignore[no-untyped-def]
    total, single = np.empty(PART, np.float64), np.empty(PART, np.float32)
    before, after = np.empty(PART, np.float32), np.empty(PART, np.float32)
    for first in range(0, out.size, PART):
        bits = out[first : first + PART]
        n = bits.size
        total[:n] = -0.0  # the only number that every other is unchanged by: -0.0 stays -0.0
        for t in range(raws.shape[0]):
            _add(raws[t, first : first + n], factors[t], total[:n])  # a slice of all rows would not be contiguous
        round_bfloat16(total[:n], single[:n], bits)
        storage.widen_bfloat16(raws[0, first : first + n], before[:n])
        storage.widen_bfloat16(bits, after[:n])
        tally_part(single[:n], before[:n], after[:n], anchored, sums)


@njit(nogil=True, cache=True, error_model="numpy")
def _add(bits, factor, total):  # type: ignore[no-untyped-def]
    for i in range(total.size):
        total[i] += factor * np.float64(np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32))
