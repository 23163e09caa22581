"""Compiled twins of the methods, for the hot path: the same mathematics on numpy arrays, one block at a time.

A twin takes what its method reads, flattened to [models, n] float32 or float64, the method's knobs, and `out` [n],
which it fills. `deltas` and `models` are the engine's scratch and may be overwritten. The torch function stays the
reference; a test holds the two within one unit of the output's last place. Compiled by numba without fast-math.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graftkit.compiling import compiled
from graftkit.methods.competition import sce_weights
from graftkit.methods.parts import deviation, spread
from graftkit.methods.random import MULTIPLIERS, WEYL, Keyed

CHUNK = 2048  # entries that an election handles at once: its accumulators stay in the first-level cache

Value = float | Sequence[float]


def weighted_sum(stack: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
    """Twin of every method that declares `factors`: their sum over the tensors of `stack` [models, n]."""
    _weighted_sum(stack, factors.astype(stack.dtype), out)


def ties(
    deltas: np.ndarray,
    threshold: np.ndarray,
    retained: np.ndarray,
    *,
    weight: Value,
    density: Value,
    scale: float,
    scope: str,
    combine: str,
    weighted_election: bool,
    rescale: bool,
    out: np.ndarray,
) -> None:
    """Twin of `arithmetic.ties`; `density` and `scope` are in the threshold already, `rescale` in what is retained."""
    weights = _per_model(weight, deltas)
    votes = weights if weighted_election else np.ones_like(weights)
    limits = threshold.astype(np.float32)
    if rescale:
        for row, limit in zip(deltas, limits, strict=True):
            row[np.abs(row).astype(np.float32, copy=False) < limit] = 0
        _restore(deltas, retained)
        limits = np.zeros_like(limits)
    _elect(deltas, limits, weights, votes, combine == "mean", deltas.dtype.type(scale), out)


def dare(
    deltas: np.ndarray,
    rng: Keyed,
    retained: np.ndarray,
    *,
    weight: Value,
    density: Value,
    scale: float,
    elect: str,
    normalize: bool,
    combine: str,
    weighted_election: bool,
    rescale: bool,
    rescale_by: str,
    out: np.ndarray,
) -> None:
    """Twin of `arithmetic.dare`; drops in place."""
    drop(deltas, rng, density, rescale and rescale_by == "chance")
    if rescale and rescale_by == "l1":
        _restore(deltas, retained)
    _combined(deltas, weight, scale, elect, normalize, combine, weighted_election, out)


def drop(deltas: np.ndarray, rng: Keyed, density: Value, rescale: bool) -> None:
    """Twin of `parts.drop`, in place."""
    for t, share in enumerate(spread(density, len(deltas)).tolist()):
        factor = deltas.dtype.type(1 / share if rescale and share > 0 else 1)
        if share < 1:
            cut = np.uint64(math.ceil(share * 2**32))
            _drop(deltas[t], np.uint64(rng.keys[t]), np.uint64(rng.start), cut, factor)


def random_words(key: int, start: int, count: int) -> np.ndarray:
    """The random words `start` to `start + count` of a stream, uint32."""
    blocks, skip = (start % 4 + count + 3) // 4, start % 4
    words = np.empty(4 * blocks, np.uint32)
    philox_words(np.uint64(key), np.uint64(start // 4), blocks, words)
    return words[skip : skip + count]


def _restore(deltas: np.ndarray, retained: np.ndarray) -> None:
    deltas /= retained.astype(deltas.dtype)[:, None]


def _combined(
    deltas: np.ndarray,
    weight: Value,
    scale: float,
    elect: str,
    normalize: bool,
    combine: str,
    weighted_election: bool,
    out: np.ndarray,
) -> None:
    """Twin of `parts.combined`, times the scale."""
    weights, factor = _per_model(weight, deltas), deltas.dtype.type(scale)
    if elect == "none":
        return weighted_sum(deltas, weights * factor / (weights.sum() if normalize else 1), out)
    votes = weights if weighted_election else np.ones_like(weights)
    return _elect(deltas, np.zeros(len(deltas), np.float32), weights, votes, combine == "mean", factor, out)  # type: ignore[no-any-return]


def nearswap(deltas: np.ndarray, *, t: float, out: np.ndarray) -> None:
    """Twin of `masks.nearswap`."""
    np.clip(deltas[0], deltas.dtype.type(-t), deltas.dtype.type(t), out=out)


def breadcrumbs(
    deltas: np.ndarray,
    band: np.ndarray,
    retained: np.ndarray,
    *,
    weight: Value,
    density: Value,
    outliers: Value,
    scale: float,
    elect: str,
    normalize: bool,
    combine: str,
    weighted_election: bool,
    rescale: bool,
    out: np.ndarray,
) -> None:
    """Twin of `sparse.breadcrumbs`; `density` and `outliers` are in the band already."""
    for row, low, high in zip(deltas, *band.astype(np.float32), strict=True):
        magnitudes = np.abs(row).astype(np.float32, copy=False)
        row[(magnitudes < low) | (magnitudes > high)] = 0
    if rescale:
        _restore(deltas, retained)
    _combined(deltas, weight, scale, elect, normalize, combine, weighted_election, out)


def sce(
    deltas: np.ndarray,
    variation: np.ndarray,
    energies: np.ndarray,
    *,
    select_topk: float,
    scale: float,
    floor: float,
    out: np.ndarray,
) -> None:
    """Twin of `competition.sce`; `select_topk` is in the variation already."""
    if variation[0] > 0:
        deltas[:, deviation(deltas.astype(np.float64)).astype(np.float32) < variation[0]] = 0
    weights = np.asarray(sce_weights(energies, floor), deltas.dtype)
    limits = np.zeros(len(deltas), np.float32)
    _elect(deltas, limits, weights, np.ones_like(weights), True, deltas.dtype.type(scale), out)


def _per_model(value: Value, stack: np.ndarray) -> np.ndarray:
    return spread(value, len(stack)).astype(stack.dtype)


@compiled
def _weighted_sum(stack, factors, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = factors[0] * stack[0, i]
    for t in range(1, stack.shape[0]):
        factor = factors[t]
        for i in range(out.size):
            out[i] += factor * stack[t, i]


@compiled
def _elect(deltas, limits, weights, votes, mean, scale, out):  # type: ignore[no-untyped-def]
    total, share = np.empty(CHUNK, out.dtype), np.empty(CHUNK, out.dtype)
    for first in range(0, out.size, CHUNK):
        merged = out[first : first + CHUNK]
        n = merged.size
        elect_part(deltas, first, limits, weights, votes, mean, scale, total[:n], share[:n], merged)


@compiled
def elect_part(
    deltas: np.ndarray, first: int, limits: np.ndarray, weights: np.ndarray, votes: np.ndarray, mean: bool,
    scale: float, total: np.ndarray, share: np.ndarray, merged: np.ndarray,
) -> None:  # fmt: skip
    """Trims the deltas from entry `first` on in place, and combines those of the elected sign into `merged`."""
    n = merged.size
    total[:] = 0
    share[:] = 0
    merged[:] = 0
    for t in range(deltas.shape[0]):
        trim_and_vote(deltas[t, first : first + n], limits[t], votes[t], total)
    elect_signs(total)
    for t in range(deltas.shape[0]):
        side = np.float32(1) if votes[t] >= 0 else np.float32(-1)
        _add_agreeing(deltas[t, first : first + n], total, side, weights[t], merged, share)
    _divide(merged, share, mean, scale)


@compiled
def trim_and_vote(deltas: np.ndarray, limit: np.float32, vote: float, total: np.ndarray) -> None:
    """Leaves out what is smaller than the limit, in place, and adds the rest to the election, times the vote."""
    for i in range(total.size):
        kept = deltas[i] * np.float32(np.float32(abs(deltas[i])) >= limit)  # a product, not a branch: it vectorises
        deltas[i] = kept
        total[i] += vote * kept


@compiled
def elect_signs(total: np.ndarray) -> None:
    """1 where a sum is not negative, -1 elsewhere."""
    one = total.dtype.type(1)
    for i in range(total.size):
        total[i] = one if total[i] >= 0 else -one


@compiled
def _add_agreeing(deltas, sign, side, weight, merged, share):  # type: ignore[no-untyped-def]
    for i in range(merged.size):
        factor = weight * np.float32(deltas[i] * (side * sign[i]) > 0)
        merged[i] += factor * deltas[i]
        share[i] += factor


@compiled
def _divide(merged, share, mean, scale):  # type: ignore[no-untyped-def]
    none, one = share.dtype.type(0), share.dtype.type(1)
    if mean:
        for i in range(merged.size):
            merged[i] = scale * (merged[i] / (share[i] if share[i] != none else one))
    else:
        for i in range(merged.size):
            merged[i] *= scale


@compiled
def _drop(values, key, start, cut, factor):  # type: ignore[no-untyped-def]
    words = np.empty(CHUNK + 8, np.uint32)
    skip = np.int64(start % np.uint64(4))
    for first in range(0, values.size, CHUNK):
        part = values[first : first + CHUNK]
        philox_words(key, (start + np.uint64(first)) // np.uint64(4), (part.size + skip + 3) // 4, words)
        keep_below(part, words[skip : skip + part.size], cut, factor)


@compiled
def keep_below(values: np.ndarray, words: np.ndarray, cut: np.uint64, factor: float) -> None:
    """Multiplies values whose random word lies below the cut by a factor, and the others by nothing."""
    highest = np.uint32(cut - np.uint64(1)) if cut > np.uint64(0) else np.uint32(0)
    factor = factor if cut > np.uint64(0) else factor - factor
    none = factor - factor
    for i in range(values.size):
        values[i] *= factor if words[i] <= highest else none


@compiled
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    p0, p1 = np.uint64(MULTIPLIERS[0]) * (c0 & mask), np.uint64(MULTIPLIERS[1]) * (c2 & mask)  # 32 x 32 bits: cheap
    return (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask


@compiled
def _keyed_round(c0, c1, c2, c3, key, r):  # type: ignore[no-untyped-def]
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0 = ((key & mask) + np.uint64(r) * np.uint64(WEYL[0])) & mask
    k1 = ((key >> half) + np.uint64(r) * np.uint64(WEYL[1])) & mask
    return _round(c0, c1, c2, c3, k0, k1)


@compiled
def philox_words(key: np.uint64, first: np.uint64, blocks: int, words: np.ndarray) -> None:
    """Random words of the blocks from `first` on, four for each."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for b in range(blocks):
        counter = first + np.uint64(b)
        c0, c1, c2, c3 = counter & mask, counter >> half, np.uint64(0), np.uint64(0)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 0)  # written out: only then are blocks vectorised
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 1)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 2)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 3)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 4)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 5)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 6)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 7)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 8)
        c0, c1, c2, c3 = _keyed_round(c0, c1, c2, c3, key, 9)
        words[4 * b] = np.uint32(c0)
        words[4 * b + 1] = np.uint32(c1)
        words[4 * b + 2] = np.uint32(c2)
        words[4 * b + 3] = np.uint32(c3)
