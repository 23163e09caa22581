"""Merges of adapters and plain tensors, a strip of four rows at a time, in the very order of a merge to disk.

A strip's deltas are formed, thinned out, added up, put on the base and rounded while they are in the nearest cache.
Which values count (what is drawn, what outlasts trimming and agrees with the elected sign) is found by a pass of its
own and kept as bits: in most merges that follow only weights are new, and they have no say in it. Every number is made
by the operations, in the order, and in the precision in which blocks have them made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graftkit.checkpoints import storage
from graftkit.compiling import compiled
from graftkit.execution.casting import round_bfloat16
from graftkit.methods.ballots import Ballot
from graftkit.methods.kernels import elect_signs, keep_below, philox_words, trim_and_vote

ROWS = 4  # of a tile: those that a product forms together
STRIP = 576  # columns that are made together, a multiple of 64; a tile's products of one adapter are then 18 KB
MOST = 8  # models: so many have bits of a byte, and are still laid out side by side by the compiler
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
    def selection(self) -> tuple[np.ndarray, ...]:
        """What decides which values count, as `mark_rows` takes it."""
        return self.limits, self.cuts, self.keys, self.gains, self.votes

    @cached_property
    def combination(self) -> tuple[Any, ...]:
        """What `merge_rows` takes of it."""
        wide = self.weights.dtype.type
        gains = None if self.plain else tuple(self.gains[-MOST:])
        begin = wide(0 if self.votes.size else -0.0)  # to minus nothing every number is added unchanged
        scale, early = wide(self.scale if self.votes.size else 1), slice(None, -MOST)
        return (
            self.weights[early],
            self.gains[early],
            begin,
            gains,
            tuple(self.weights[-MOST:]),
            scale,
            self.mean or None,
        )

    def selects_as(self, other: Rule) -> bool:
        """Whether of the same inputs the same values count."""
        pairs = zip(self.selection, other.selection, strict=True)
        return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


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


def bits_of(count: int) -> int:
    """How many bits an element takes in a byte for so many models: 1, 2, 4 or 8."""
    return min(1 << (count - 1).bit_length(), MOST)


def marks_for(rows: int, columns: int, count: int) -> np.ndarray:
    """Room for the marks of so many models, [groups, rows, words]: first the last `MOST` models, then the earlier."""
    groups = 1 + -(-max(count - MOST, 0) // MOST)
    return np.empty((groups, rows, -(-columns * bits_of(count) // 64)), np.uint64)


@compiled
def mark_rows(
    left: np.ndarray, right: np.ndarray, ranks: np.ndarray, base: np.ndarray, plain: tuple[np.ndarray, ...],
    delta: bool, near: np.ndarray, start: int, columns: int, bits: int, marks: np.ndarray, limits: np.ndarray,
    cuts: np.ndarray, keys: np.ndarray, gains: np.ndarray, votes: np.ndarray,
) -> None:  # fmt: skip
    """Fills the `marks_for` elements of a tensor from `start` on: a bit for each model whose value counts.

    `left` [rows, r] and `right` [r, columns] are the factors of all adapters side by side, of which each model has
    `ranks[t]`, or is the next of `plain`, float32 [rows * columns], where that is negative; anything stands in `plain`
    where none is. Without `delta` a model's values are its weights and not what it adds to the base. `near`
    [models * ROWS, STRIP] is scratch, and its precision is that of all arithmetic.
    """
    total, random = np.empty(STRIP, near.dtype), np.empty(STRIP + 8, np.uint32)
    words, early = np.zeros(STRIP // 8, np.uint64), max(limits.size - MOST, 0)
    flags = words.view(np.uint8)
    for row in range(0, left.shape[0], ROWS):
        high = min(ROWS, left.shape[0] - row)
        for first in range(0, columns, STRIP):
            n, word = min(STRIP, columns - first), first * bits // 64
            if votes.size:
                _form_all(left, right, ranks, 0, base, plain, 0, delta, 0, row, high, first, columns, n, near)
            for i in range(high):
                at = np.uint64(start + (row + i) * columns + first)
                if votes.size:
                    _elect(near, i, at, limits, cuts, keys, gains, votes, total[:n], random)
                for group in range(marks.shape[0]):
                    begin, end = (early, limits.size) if group == 0 else ((group - 1) * MOST, min(group * MOST, early))
                    flags[:n] = 0
                    if votes.size:
                        _flag_agreeing(near, i, begin, end, votes, total[:n], flags[:n])
                    else:
                        _flag_drawn(at, begin, end, cuts, keys, random, flags[:n])
                    _pack(words, bits, marks[group, row + i, word : word + (n * bits + 63) // 64])


@compiled
def merge_rows(
    left: np.ndarray, right: np.ndarray, ranks: np.ndarray, base: np.ndarray, plain: tuple[np.ndarray, ...], delta: Any,
    near: np.ndarray, headed: Any, bits: int, marks: np.ndarray, early: np.ndarray, early_gains: np.ndarray,
    begin: float, gains: Any, weights: tuple[float, ...], scale: float, mean: Any, short: Any, out: np.ndarray,
) -> bool:  # fmt: skip
    """Fills `out`, float32 [rows * columns]; whether all of it is finite.

    `delta`, `headed`, `mean`, `short` are True or None, so that loops are compiled for either. `gains` are None where
    all values count; otherwise those count that `marks` tell. `early` are the weights of models before the last `MOST`.
    Where `headed`, deltas of the first model, then the first of `plain`, are made as they are used. `short` rounds the
    result to bfloat16. All else is as `mark_rows` has it.
    """
    columns, skip, finite = out.size // left.shape[0], 0 if headed is None else 1, True
    exact, words = np.empty(STRIP, near.dtype), np.empty(STRIP // 8, np.uint64)
    sums, shares = np.full((ROWS, STRIP), begin, near.dtype), np.zeros((ROWS, STRIP), near.dtype)
    flags, added = words.view(np.uint8), delta is not None
    for row in range(0, left.shape[0], ROWS):
        high = min(ROWS, left.shape[0] - row)
        for first in range(0, columns, STRIP):
            n, word, r, place = min(STRIP, columns - first), first * bits // 64, 0, 0
            stop = word + (n * bits + 63) // 64
            if early.size:
                sums[:] = begin
                shares[:] = 0
                for t in range(early.size):
                    rank, whole = ranks[t], plain[min(place, len(plain) - 1)]
                    _form(left, right, rank, r, base, whole, added, row, high, first, columns, n, near[:ROWS])
                    r, place = (r + rank, place) if rank >= 0 else (r, place + 1)
                    for i in range(high):
                        values, begun, parted = near[i, :n], sums[i, :n], shares[i, :n]
                        if gains is None:
                            storage.add_scaled(early[t], values, begun)
                        else:
                            _unpack(marks[1 + t // MOST, row + i, word:stop], bits, words)
                            _add_counted(values, flags, np.uint8(t % MOST), early_gains[t], early[t], begun, parted)
            _form_all(
                left, right, ranks[early.size :], r, base, plain, place, added, skip, row, high, first, columns, n, near
            )
            for i in range(high):
                at, merged = (row + i) * columns + first, exact[:n]
                own, lead, part = base[at : at + n], plain[0][at : at + n], out[at : at + n]
                if gains is not None:
                    _unpack(marks[0, row + i, word:stop], bits, words)
                finite &= _combine(
                    near, i, lead, headed, own, delta, flags, gains, sums[i, :n], shares[i, :n], weights, scale, mean,
                    short, merged, part,
                )  # fmt: skip
                if short is not None:
                    finite &= _shorten(merged, part)
    return finite


@compiled
def _form_all(  # type: ignore[no-untyped-def]
    left, right, ranks, r, base, plain, place, delta, skip, row, high, first, columns, n, near
):
    """The values of a strip of a tile, each model's in its own rows of `near`; but for those of the first `skip`.

    Factors begin at direction `r`, and tensors at `place`.
    """
    for t in range(ranks.size):
        rows = near[t * ROWS : (t + 1) * ROWS]
        if ranks[t] >= 0:
            _form(left, right, ranks[t], r, base, base, delta, row, high, first, columns, n, rows)
            r += ranks[t]
        else:
            if t >= skip:
                _form(left, right, ranks[t], r, base, plain[place], delta, row, high, first, columns, n, rows)
            place += 1


@compiled
def _form(left, right, rank, r, base, whole, delta, row, high, first, columns, n, near):  # type: ignore[no-untyped-def]
    """The values of a model in a strip of a tile: those of an adapter, or those that stand in `whole`."""
    if rank >= 0:
        _multiply(left, right, row, high, r, rank, first, n, near)
    for i in range(high):
        at, values = (row + i) * columns + first, near[i, :n]
        if rank < 0:
            _subtract(whole[at : at + n], base[at : at + n], delta, values)
        elif not delta:
            _add(base[at : at + n], values)


@compiled
def _multiply(left, right, row, high, r, rank, first, n, near):  # type: ignore[no-untyped-def]
    """An adapter's product, as `storage.add_products` has it."""
    tiled = rank - rank % 4 if high == ROWS else 0
    for i in range(high):
        near[i, :n] = 0
    for k in range(r, r + tiled, 4):
        storage.add_tile(left, right, row, k, first, n, near)
    for k in range(r + tiled, r + rank):
        for i in range(high):
            storage.add_scaled(left[row + i, k], right[k, first : first + n], near[i, :n])


@compiled
def _add(own, values):  # type: ignore[no-untyped-def]
    for j in range(values.size):
        values[j] = values.dtype.type(own[j]) + values[j]


@compiled
def _subtract(whole, own, delta, values):  # type: ignore[no-untyped-def]
    if delta:
        for j in range(values.size):
            values[j] = values.dtype.type(whole[j]) - values.dtype.type(own[j])
    else:
        for j in range(values.size):
            values[j] = whole[j]


@compiled
def _elect(near, i, at, limits, cuts, keys, gains, votes, total, random):  # type: ignore[no-untyped-def]
    """Draws, trims and elects in place, in part of a row; `total` becomes the elected signs."""
    total[:] = 0
    for t in range(limits.size):
        values = near[t * ROWS + i, : total.size]
        if cuts[t] < np.uint64(ALL):
            keep_below(values, _drawn(keys[t], at, values.size, random), cuts[t], gains[t])
        trim_and_vote(values, limits[t], votes[t], total)
    elect_signs(total)


@compiled
def _drawn(key, start, count, random):  # type: ignore[no-untyped-def]
    """Random words of a model's stream, from element `start` on."""
    skip = np.int64(start % np.uint64(4))
    philox_words(key, start // np.uint64(4), (count + skip + 3) // 4, random)
    return random[skip : skip + count]


@compiled
def _flag_agreeing(near, i, first, last, votes, signs, flags):  # type: ignore[no-untyped-def]
    """A bit for each of some models where its value is left and agrees."""
    for t in range(first, last):
        _flag_side(
            near[t * ROWS + i, : flags.size], signs, 1 if votes[t] >= 0 else -1, np.uint8(1 << (t - first)), flags
        )


@compiled
def _flag_side(values, signs, side, bit, flags):  # type: ignore[no-untyped-def]
    turn = values.dtype.type(side)
    for j in range(flags.size):
        flags[j] |= bit if values[j] * (turn * signs[j]) > 0 else np.uint8(0)


@compiled
def _flag_drawn(at, first, last, cuts, keys, random, flags):  # type: ignore[no-untyped-def]
    """A bit for each of some models where a value is drawn, whatever it is."""
    for t in range(first, last):
        if cuts[t] < np.uint64(ALL):
            _flag_below(_drawn(keys[t], at, flags.size, random), cuts[t], np.uint8(1 << (t - first)), flags)
        else:
            flags |= np.uint8(1 << (t - first))


@compiled
def _flag_below(words, cut, bit, flags):  # type: ignore[no-untyped-def]
    if cut > np.uint64(0):
        highest = np.uint32(cut - np.uint64(1))
        for j in range(flags.size):
            flags[j] |= bit if words[j] <= highest else np.uint8(0)


@compiled
def _pack(words, bits, marks):  # type: ignore[no-untyped-def]
    """Lays bytes of which `bits` bits are in use over one another, eight at a time."""
    marks[:] = 0
    for k in range(8 // bits):
        for j in range(marks.size):
            marks[j] |= words[k * marks.size + j] << np.uint64(k * bits)


@compiled
def _unpack(marks, bits, words):  # type: ignore[no-untyped-def]
    """What `_pack` has packed."""
    mask = np.uint64(0x0101010101010101) * np.uint64((1 << bits) - 1)
    for k in range(8 // bits):
        for j in range(marks.size):
            words[k * marks.size + j] = (marks[j] >> np.uint64(k * bits)) & mask


@compiled
def _add_counted(values, flags, bit, gain, weight, sums, shares):  # type: ignore[no-untyped-def]
    none = weight - weight
    for j in range(sums.size):
        counts = (flags[j] >> bit) & np.uint8(1)
        sums[j] += weight * (values[j] * (gain if counts else none))
        shares[j] += weight if counts else none


@compiled
def _combine(  # type: ignore[no-untyped-def]
    near, row, lead, headed, own, delta, flags, gains, sums, shares, weights, scale, mean, short, exact, out
):
    """The models' sum or mean on the base, in part of a row; whether all of it is finite as float32.

    All in one loop, made for what it is given: how many weights there are, and what is None, is known when it is
    compiled. In parts it would take half as long again. Where the result is rounded further, `exact` takes it.
    """
    wide, broken = near.dtype.type, np.uint32(0)
    none, one = wide(0), wide(1)
    for j in range(out.size):
        total, share = sums[j], shares[j]
        for t in range(len(weights)):
            value = near[t * ROWS + row, j]
            if headed is not None:
                value = wide(lead[j]) - wide(own[j]) if t == 0 else value
            if gains is None:
                total += weights[t] * value
            else:
                counts = (flags[j] >> np.uint8(t)) & np.uint8(1)
                total += weights[t] * (value * (gains[t] if counts else none))
                if mean is not None:
                    share += weights[t] if counts else none
        if mean is not None:
            total /= share if share != none else one
        total *= scale
        if delta is not None:
            total += wide(own[j])
        if short is None:
            out[j] = total
        else:
            exact[j] = total
        full = np.uint32(np.float32(total).view(np.uint32) & FULL)
        broken = np.uint32(broken | np.uint32(full + CARRY))
    return broken & SIGN == 0


@compiled
def _shorten(merged, out):  # type: ignore[no-untyped-def]
    """Rounds to bfloat16; whether all are finite."""
    bits = np.empty(out.size, np.uint16)
    round_bfloat16(merged, out, bits)
    return storage.widen_bfloat16(bits, out) == 0
