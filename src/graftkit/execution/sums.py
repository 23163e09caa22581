"""Weighted sums straight into a live parameter, with the bits that a merge to disk and a load would give it.

Tensors are added in the order of the merge itself. The deltas of adapters are summed by one product of all their
factors, which a library adds up in another order: where that could change the rounding, an element is added up again in
the merge's order. What is left is equal to the bit, and takes as long as reading and writing once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import LowRank
from graftkit.compiling import compiled
from graftkit.execution.blocks import Feed, Reader, Workspace
from graftkit.execution.casting import round_bfloat16
from graftkit.execution.resident import ResidentCheckpoint
from graftkit.methods import Method
from graftkit.recipes.steps import Step

PART = 1 << 16
"""Elements that go through a sum together, in the nearer cache."""

NEAREST = 1024  # of them, which the nearest cache holds
UNIT = 2.0**-53
NOTHING = np.empty(0, np.float32)

Write = Callable[[int, int, np.ndarray, bool], bool]
"""Writes elements `[start, stop)` of a step as float32 numbers into an array, rounded to bfloat16 first if so told;
False where one is not finite."""


@dataclass(frozen=True)
class Sum:
    """One step as a weighted sum: what writes a block of it, of `size` elements."""

    block: Write
    size: int


def write(step: Step, made: Sum, target: np.ndarray, space: Workspace) -> bool:
    """Writes a step's sum into a parameter, float32 or bits of bfloat16; False where an element is not finite."""
    short = step.dtype == "BF16"
    for start in range(0, step.elements, made.size):
        stop = min(start + made.size, step.elements)
        wide = target.dtype == np.float32
        out = target[start:stop] if wide else space.take("single", stop - start, np.float32)
        if not made.block(start, stop, out, short):
            return False
        if not wide:
            storage.narrow_bfloat16(out.view(np.uint32), target[start:stop])
    return True


def sum_of(method: Method, factors: np.ndarray, reader: Reader) -> Sum | None:
    """The step of a reader as a sum; None where it is more than one, or where an input is no plain resident tensor."""
    step = reader.step
    plain = not (step.prepare or step.finish or step.rows) and step.compute == "F64" and step.dtype in ("F32", "BF16")
    feeds = (*([reader.base] if reader.base else []), *reader.models)
    held = all(_is_held(feed) for feed in feeds)
    if not plain or not held or (method.returns_delta and reader.base is None):
        return None
    if all(feed.info is not None for feed in reader.models):
        return _of_tensors(method, factors, reader)
    if any(feed.info is not None for feed in reader.models) or reader.base is None:
        return None
    return _of_adapters(method, factors, reader)


def _is_held(feed: Feed) -> bool:
    if feed.info is None:
        return feed.delta is None or isinstance(feed.delta, LowRank)
    return isinstance(feed.source, ResidentCheckpoint) and feed.info.dtype in ("F32", "BF16")


def _array(feed: Feed) -> np.ndarray:
    assert isinstance(feed.source, ResidentCheckpoint) and feed.info is not None
    return feed.source.array(feed.info)


def _of_tensors(method: Method, factors: np.ndarray, reader: Reader) -> Sum:
    """Of whole tensors: one sum where all are bfloat16 (as `blending` has it), else of the models less the base."""
    arrays, space = [_array(feed) for feed in reader.models], reader.space
    base = _array(reader.base) if reader.base and method.returns_delta else None
    parts = arrays if base is None else [base, *arrays]
    shares = factors if base is None else np.concatenate([[1 - factors.sum()], factors])

    def blended(start: int, stop: int, out: np.ndarray, short: bool) -> bool:
        total = space.take("sum", stop - start, np.float64)
        for t, (part, share) in enumerate(zip(parts, shares, strict=True)):
            _add_bits(part[start:stop], share, total, t == 0)
        return _round(total, NOTHING, short, out)  # type: ignore[no-any-return]

    def summed(start: int, stop: int, out: np.ndarray, short: bool) -> bool:
        total = space.take("sum", stop - start, np.float64)
        below = NOTHING if base is None else _singles(base[start:stop], space, "below")
        for t, (part, share) in enumerate(zip(arrays, factors, strict=True)):
            _add(_singles(part[start:stop], space, "part"), below, share, total, t == 0)
        return _round(total, below, short, out)  # type: ignore[no-any-return]

    together = reader.step.dtype == "BF16" and all(part.dtype == np.uint16 for part in parts)
    return Sum(blended if together else summed, PART)


def _of_adapters(method: Method, factors: np.ndarray, reader: Reader) -> Sum:
    """Of low-rank deltas on a base, of which the sum adds one, or each model has its own."""
    step, space, delta = reader.step, reader.space, method.returns_delta
    assert reader.base is not None
    base, columns = _array(reader.base), step.shape[-1]
    pairs = [feed.delta if isinstance(feed.delta, LowRank) else _nothing(step) for feed in reader.models]
    whole, right = np.concatenate([pair.left for pair in pairs], axis=1), np.concatenate([pair.right for pair in pairs])
    ranks = np.array([pair.left.shape[1] for pair in pairs])
    shares = np.asarray(factors, np.float64)
    left, below = whole * np.repeat(shares, ranks), 1.0 if delta else float(shares.sum())
    reach = float(np.abs(left).max(axis=0, initial=0) @ np.abs(right).max(axis=1, initial=0))
    error = 4 * UNIT * (ranks.sum() + len(pairs) + 4)  # of a sum of so many, for each unit that its terms reach
    slack = np.array([error * reach, error * (1 + np.abs(shares).sum())])

    across = np.ascontiguousarray(right.T)

    def block(start: int, stop: int, out: np.ndarray, short: bool) -> bool:
        total, own = space.take("sum", stop - start, np.float64), _singles(base[start:stop], space, "below")
        rows = slice(start // columns, stop // columns)
        _product(left[rows], right, total.reshape(-1, columns))
        return _round_surely(  # type: ignore[no-any-return]
            total, own, below, slack, short, out, whole[rows], across, ranks, shares, delta
        )

    return Sum(block, max(1, PART // columns) * columns)


def _nothing(step: Step) -> LowRank:
    return LowRank(np.zeros((step.shape[0], 0)), np.zeros((0, step.shape[-1])))


def _product(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    import torch

    torch.mm(torch.from_numpy(left), torch.from_numpy(right), out=torch.from_numpy(out))


def _singles(values: np.ndarray, space: Workspace, purpose: str) -> np.ndarray:
    """Numbers of a file as float32, which holds them all."""
    if values.dtype == np.float32:
        return values
    out = space.take(purpose, values.size, np.float32)
    storage.widen_bfloat16(values, out)
    return out


@compiled
def _add_bits(bits, share, total, first):  # type: ignore[no-untyped-def]
    """Adds `share * number`; a sum begins at the number that no other is changed by."""
    if first:
        total[:] = -0.0
    for i in range(total.size):
        total[i] += share * np.float64(np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32))


@compiled
def _add(values, below, share, total, first):  # type: ignore[no-untyped-def]
    """Adds `share * (values - below)`, or of `values` where `below` is empty."""
    if first:
        total[:] = -0.0
    if below.size:
        for i in range(total.size):
            total[i] += share * (np.float64(values[i]) - np.float64(below[i]))
    else:
        for i in range(total.size):
            total[i] += share * np.float64(values[i])


@compiled
def _round(total, base, short, out):  # type: ignore[no-untyped-def]
    """Adds the base, if there is one, and rounds once; whether all are finite."""
    if base.size:
        for i in range(total.size):
            total[i] += np.float64(base[i])
    if short:
        bits = np.empty(total.size, np.uint16)
        round_bfloat16(total, out, bits)
        return storage.widen_bfloat16(bits, out) == 0
    broken = 0
    for i in range(total.size):
        out[i] = total[i]
        broken += not np.isfinite(out[i])
    return broken == 0


@compiled
def _round_surely(total, base, below, slack, short, out, left, across, ranks, shares, delta):  # type: ignore[no-untyped-def]
    """Adds `below` times the base; an element that lies too near to a tie is added up again; then rounds once."""
    columns, finite, doubts = across.shape[0], True, np.empty(NEAREST, np.uint32)
    for first in range(0, total.size, NEAREST):
        values, own = total[first : first + NEAREST], base[first : first + NEAREST]
        if short:
            _doubt_short(values, own, below, slack, doubts)
        else:
            _doubt(values, own, below, slack, doubts)
        for i in range(values.size):
            if doubts[i]:
                row, column = (first + i) // columns, (first + i) % columns
                values[i] = _in_order(own[i], left[row], across[column], ranks, shares, delta)
        finite &= _round(values, base[:0], short, out[first : first + NEAREST])
    return finite


@compiled
def _doubt(values, base, below, slack, doubts):  # type: ignore[no-untyped-def]
    """Adds the base, and tells where an error might change what a number is rounded to in float32: not 0."""
    for i in range(values.size):
        own = np.float64(base[i])
        value, near = values[i] + below * own, slack[0] + slack[1] * abs(own)
        values[i] = value
        doubts[i] = np.float32(value - near).view(np.uint32) ^ np.float32(value + near).view(np.uint32)


@compiled
def _doubt_short(values, base, below, slack, doubts):  # type: ignore[no-untyped-def]
    """The same in bfloat16, which is in doubt at all its ties in float32 too."""
    for i in range(values.size):
        own = np.float64(base[i])
        value, near = values[i] + below * own, slack[0] + slack[1] * abs(own)
        values[i] = value
        low, high = np.float32(value - near).view(np.uint32), np.float32(value + near).view(np.uint32)
        tie = (np.float32(value).view(np.uint32) & np.uint32(0xFFFF)) == np.uint32(0x8000)
        doubts[i] = np.uint32(_short(low) ^ _short(high)) | np.uint32(tie)


@compiled
def _short(u):  # type: ignore[no-untyped-def]
    """Bits of float32 to those of the nearest bfloat16."""
    return np.uint32(np.uint32(u + np.uint32(0x7FFF)) + np.uint32((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@compiled
def _in_order(base, left, right, ranks, shares, delta):  # type: ignore[no-untyped-def]
    """One element as a merge adds it up: each model's product by its rank, then the models."""
    total, r = -0.0, 0
    for t in range(ranks.size):
        own = 0.0
        for _ in range(ranks[t]):
            own += left[r] * right[r]
            r += 1
        total += shares[t] * (own if delta else np.float64(base) + own)
    return np.float64(base) + total if delta else total
