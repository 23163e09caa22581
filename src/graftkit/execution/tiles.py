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
STRIP = 592  # and that it holds of the sums of a tile
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
    def plain(self) -> bool:
        """Whether all values are added up, as they are."""
        return not self.votes.size and bool((self.cuts >= ALL).all())

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
    places = _places(ranks)
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
                _gather(ranks, places, near, i, first, stack, at, own, delta, values, n)
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
def sum_rows(
    left: np.ndarray, right: np.ndarray, ranks: np.ndarray, base: np.ndarray, stack: np.ndarray, short: bool,
    out: np.ndarray, weights: np.ndarray,
) -> bool:  # fmt: skip
    """As `merge_rows` for a weighted sum of all deltas as they are: a delta is added up as it is made."""
    rows, columns, finite = left.shape[0], out.size // left.shape[0], True
    near, merged = np.empty((ROWS, STRIP), weights.dtype), np.empty((ROWS, STRIP), weights.dtype)
    for row in range(0, rows, ROWS):
        high = min(ROWS, rows - row)
        for first in range(0, columns, STRIP):
            n = min(STRIP, columns - first)
            at, r, plain = row * columns + first, 0, 0
            for t in range(ranks.size):
                if ranks[t] >= 0:
                    _add_product(left, right, row, high, r, ranks[t], first, n, weights[t], t == 0, near, merged)
                    r += ranks[t]
                else:
                    for i in range(high):
                        begin = at + i * columns
                        own, whole = base[begin : begin + n], stack[plain, begin : begin + n]
                        _add_difference(whole, own, weights[t], t == 0, merged[i, :n])
                    plain += 1
            for i in range(high):
                begin = at + i * columns
                finite &= _settle(merged[i, :n], base[begin : begin + n], True, short, out[begin : begin + n])
    return finite


@compiled
def _add_product(left, right, row, high, r, rank, first, n, weight, fresh, near, merged):  # type: ignore[no-untyped-def]
    """Adds a multiple of an adapter's delta to a strip of a tile; of whole tiles the last directions as they come."""
    last = rank - 4 if high == ROWS and rank > 0 and rank % 4 == 0 else rank
    for i in range(high):
        near[i, :n] = 0
        if fresh:
            merged[i, :n] = -0.0  # to which every number is added unchanged
    if last < rank:
        for k in range(r, r + last, 4):
            storage.add_tile(left, right, row, k, first, n, near)
        _add_last(left, right, row, r + last, first, n, weight, near, merged)
        return
    for i in range(high):
        for k in range(r, r + rank):
            storage.add_scaled(left[row + i, k], right[k, first : first + n], near[i, :n])
        _add(near[i, :n], weight, False, merged[i, :n])


@compiled
def _add_last(left, right, i, k, first, n, weight, near, merged):  # type: ignore[no-untyped-def]
    """A product whose last four directions are missing, with them, times a weight: as `storage.add_tile`."""
    p0, p1, p2, p3 = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
    q0, q1, q2, q3 = left[i + 1, k], left[i + 1, k + 1], left[i + 1, k + 2], left[i + 1, k + 3]
    s0, s1, s2, s3 = left[i + 2, k], left[i + 2, k + 1], left[i + 2, k + 2], left[i + 2, k + 3]
    t0, t1, t2, t3 = left[i + 3, k], left[i + 3, k + 1], left[i + 3, k + 2], left[i + 3, k + 3]
    a, b, c, d, last = near[0], near[1], near[2], near[3], first + n
    e, f, g, h = merged[0], merged[1], merged[2], merged[3]
    u0, u1, u2, u3 = right[k, first:last], right[k + 1, first:last], right[k + 2, first:last], right[k + 3, first:last]
    for j in range(n):
        r0, r1, r2, r3 = u0[j], u1[j], u2[j], u3[j]
        e[j] += weight * ((((a[j] + p0 * r0) + p1 * r1) + p2 * r2) + p3 * r3)
        f[j] += weight * ((((b[j] + q0 * r0) + q1 * r1) + q2 * r2) + q3 * r3)
        g[j] += weight * ((((c[j] + s0 * r0) + s1 * r1) + s2 * r2) + s3 * r3)
        h[j] += weight * ((((d[j] + t0 * r0) + t1 * r1) + t2 * r2) + t3 * r3)


@compiled
def _places(ranks):  # type: ignore[no-untyped-def]
    """Where each model's values lie: how many adapters, or how many plain tensors, come before it."""
    counts, places = np.zeros(2, np.int64), np.empty(ranks.size, np.int64)
    for t in range(ranks.size):
        kind = 1 if ranks[t] >= 0 else 0
        places[t] = counts[kind]
        counts[kind] += 1
    return places


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
def _gather(ranks, places, near, i, first, stack, at, own, delta, values, n):  # type: ignore[no-untyped-def]
    """The models' values of a part of a row."""
    for t in range(ranks.size):  # a row is cut where it is used: of a slice of all rows none would be contiguous
        if ranks[t] >= 0:
            _take(near[places[t] * ROWS + i, first : first + n], own, delta, values[t, :n])
        else:
            _subtract(stack[places[t], at : at + n], own, delta, values[t, :n])


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
    if delta:
        for j in range(values.size):
            values[j] = values.dtype.type(whole[j]) - values.dtype.type(own[j])
    else:
        for j in range(values.size):
            values[j] = whole[j]


@compiled
def _draw(values, key, start, cut, gain, words):  # type: ignore[no-untyped-def]
    skip = np.int64(start % np.uint64(4))
    philox_words(key, start // np.uint64(4), (values.size + skip + 3) // 4, words)
    keep_below(values, words[skip : skip + values.size], cut, gain)


@compiled
def _add_up(values, weights, merged):  # type: ignore[no-untyped-def]
    for t in range(weights.size):
        _add(values[t, : merged.size], weights[t], t == 0, merged)


@compiled
def _add(values, weight, fresh, merged):  # type: ignore[no-untyped-def]
    if fresh:
        for j in range(merged.size):
            merged[j] = weight * values[j]
    else:
        for j in range(merged.size):
            merged[j] += weight * values[j]


@compiled
def _add_difference(whole, own, weight, fresh, merged):  # type: ignore[no-untyped-def]
    wide = merged.dtype.type
    if fresh:
        for j in range(merged.size):
            merged[j] = weight * (wide(whole[j]) - wide(own[j]))
    else:
        for j in range(merged.size):
            merged[j] += weight * (wide(whole[j]) - wide(own[j]))


@compiled
def _settle(merged, own, delta, short, out):  # type: ignore[no-untyped-def]
    """Adds the base to a delta and rounds once; whether all are finite."""
    if short:
        if delta:
            for j in range(out.size):
                merged[j] += own[j]
        bits = np.empty(out.size, np.uint16)
        round_bfloat16(merged, out, bits)
        return storage.widen_bfloat16(bits, out) == 0
    broken, wide = np.uint32(0), merged.dtype.type
    for j in range(out.size):
        single = np.float32(merged[j] + wide(own[j]) if delta else merged[j])
        out[j] = single
        full = np.uint32(single.view(np.uint32) & FULL)
        broken = np.uint32(broken | np.uint32(full + CARRY))
    return broken & SIGN == 0
