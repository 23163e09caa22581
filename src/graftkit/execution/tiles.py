"""Merges of adapters and plain tensors, a tile of four rows at a time, in the very order of a merge to disk.

A tile's deltas are formed, thinned out, voted on or added up, put on the base and rounded while they are in the nearer
caches. Every number is made by the operations, in the order, and in the precision in which blocks have them made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.checkpoints import storage
from graftkit.compiling import compiled
from graftkit.execution.casting import round_bfloat16
from graftkit.methods.ballots import Ballot
from graftkit.methods.kernels import elect_part, keep_below, philox_words

ROWS = 4  # of a tile: those that a product forms together
PART = 512  # elements of a row that the nearest cache holds for all models
FULL, CARRY, SIGN = np.uint32(0x7F800000), np.uint32(0x00800000), np.uint32(0x80000000)  # as those of bfloat16
ALL = 1 << 33  # above every random word


@dataclass(frozen=True)
class Rule:
    """What becomes of the models' values, arrays of one number for each, in computing precision but for the first two.

    limits: values of a smaller magnitude are left out, float32.
    cuts: a value is kept, times the model's gain, where its random word lies below; `ALL` leaves all as they are.
    votes: factors in the sum whose sign is elected; empty where all values are added up instead.
    weights: factors in the combination, `mean` or sum, which is multiplied by `scale` after an election.
    """

    limits: np.ndarray
    cuts: np.ndarray
    keys: np.ndarray
    gains: np.ndarray
    votes: np.ndarray
    weights: np.ndarray
    mean: bool = False
    scale: float = 1.0

    @property
    def values(self) -> tuple[Any, ...]:
        """What `merge_rows` takes last."""
        scale = self.weights.dtype.type(self.scale)
        return self.limits, self.cuts, self.keys, self.gains, self.votes, self.weights, self.mean, scale


def weighted(factors: np.ndarray) -> Rule:
    """A weighted sum in float64."""
    count = len(factors)
    none, all_ = np.zeros(count, np.float32), np.full(count, ALL, np.uint64)
    weights = np.ascontiguousarray(factors, np.float64)
    return Rule(none, all_, np.zeros(count, np.uint64), np.ones(count), np.empty(0), weights)


def elected(ballot: Ballot, keys: tuple[int, ...], dtype: Any) -> Rule:
    """A ballot without norms to restore or weights to normalise; `keys` are those of random numbers, if any."""
    cuts = [math.ceil(share * 2**32) if share < 1 else ALL for share in ballot.shares.tolist()]
    limits, gains, weights = ballot.limits.astype(np.float32), ballot.gains.astype(dtype), ballot.weights.astype(dtype)
    if ballot.votes is None:
        votes, weights = np.empty(0, dtype), weights * dtype(ballot.scale)
    else:
        votes = ballot.votes.astype(dtype)
    streams = np.array(keys or [0] * len(cuts), np.uint64)
    return Rule(limits, np.array(cuts, np.uint64), streams, gains, votes, weights, ballot.mean, ballot.scale)


@compiled
def merge_rows(
    left: np.ndarray, right: np.ndarray, ranks: np.ndarray, base: np.ndarray, stack: np.ndarray, delta: bool,
    start: int, short: bool, near: np.ndarray, out: np.ndarray, limits: np.ndarray, cuts: np.ndarray, keys: np.ndarray,
    gains: np.ndarray, votes: np.ndarray, weights: np.ndarray, mean: bool, scale: float,
) -> bool:  # fmt: skip
    """Fills `out`, float32 [rows * columns] from element `start` of a tensor on; whether all of it is finite.

    `left` [rows, r] and `right` [r, columns] are the factors of all adapters side by side, of which each model has
    `ranks[t]`, or is the next of `stack` [plain, rows * columns] where that is negative. Without `delta` a model's
    values are its weights and not what it adds to the base, and so is the result. `near` [adapters * ROWS, columns]
    is scratch, and its precision is that of all arithmetic; `short` rounds the result to bfloat16.
    """
    rows, columns, finite = left.shape[0], out.size // left.shape[0], True
    values, words = np.empty((ranks.size, PART), near.dtype), np.empty(PART + 8, np.uint32)
    total, share, merged = np.empty(PART, near.dtype), np.empty(PART, near.dtype), np.empty(PART, near.dtype)
    for row in range(0, rows, ROWS):
        high = min(ROWS, rows - row)
        _form(left[row : row + high], right, ranks, near)
        for i in range(high):
            for first in range(0, columns, PART):
                n = min(PART, columns - first)
                at = (row + i) * columns + first
                own = base[at : at + n]
                _gather(ranks, near, i, first, stack, at, own, delta, values, n)
                for t in range(ranks.size):
                    if cuts[t] < np.uint64(ALL):
                        _draw(values[t, :n], keys[t], np.uint64(start + at), cuts[t], gains[t], words)
                if votes.size:
                    elect_part(values, 0, limits, weights, votes, mean, scale, total[:n], share[:n], merged[:n])
                else:
                    _add_up(values, weights, merged[:n])
                finite &= _settle(merged[:n], own, delta, short, out[at : at + n])
    return finite


@compiled
def _form(left, right, ranks, near):  # type: ignore[no-untyped-def]
    """The adapters' products of some rows, each in its own rows of `near`."""
    r, place = 0, 0
    for t in range(ranks.size):
        if ranks[t] >= 0:
            own = near[place : place + ROWS]
            own[:] = 0
            storage.add_products(left[:, r : r + ranks[t]], right[r : r + ranks[t]], own)
            r, place = r + ranks[t], place + ROWS


@compiled
def _gather(ranks, near, i, first, stack, at, own, delta, values, n):  # type: ignore[no-untyped-def]
    """The models' values of a part of a row."""
    adapters, plain = 0, 0
    for t in range(ranks.size):
        if ranks[t] >= 0:
            _take(near[adapters * ROWS + i, first : first + n], own, delta, values[t, :n])
            adapters += 1
        else:
            _subtract(stack[plain, at : at + n], own, delta, values[t, :n])
            plain += 1


@compiled
def _take(product, own, delta, values):  # type: ignore[no-untyped-def]
    if delta:
        for j in range(values.size):
            values[j] = product[j]
    else:
        for j in range(values.size):
            values[j] = values.dtype.type(own[j]) + product[j]


@compiled
def _subtract(whole, own, delta, values):  # type: ignore[no-untyped-def]
    for j in range(values.size):
        values[j] = whole[j]
    if delta:
        for j in range(values.size):
            values[j] -= own[j]


@compiled
def _draw(values, key, start, cut, gain, words):  # type: ignore[no-untyped-def]
    skip = np.int64(start % np.uint64(4))
    philox_words(key, start // np.uint64(4), (values.size + skip + 3) // 4, words)
    keep_below(values, words[skip : skip + values.size], cut, gain)


@compiled
def _add_up(values, weights, merged):  # type: ignore[no-untyped-def]
    for j in range(merged.size):
        merged[j] = weights[0] * values[0, j]
    for t in range(1, weights.size):
        for j in range(merged.size):
            merged[j] += weights[t] * values[t, j]


@compiled
def _settle(merged, own, delta, short, out):  # type: ignore[no-untyped-def]
    """Adds the base to a delta and rounds once; whether all are finite."""
    if delta:
        for j in range(out.size):
            merged[j] += own[j]
    if short:
        bits = np.empty(PART, np.uint16)
        round_bfloat16(merged, out, bits[: out.size])
        return storage.widen_bfloat16(bits[: out.size], out) == 0
    broken = np.uint32(0)
    for j in range(out.size):
        single = np.float32(merged[j])
        out[j] = single
        full = np.uint32(single.view(np.uint32) & FULL)
        broken = np.uint32(broken | np.uint32(full + CARRY))
    return broken & SIGN == 0
