"""The bootstrap over items: intervals for ratios of sums, paired between models since items are drawn once for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftkit.measuring.table import Value

Array = NDArray[np.float64]
CONFIDENCE = 0.95
_BLOCK = 2_000_000  # drawn items held at once: bounds memory, changes no result


def resampled_sums(parts: Array, resamples: int, seed: int, key: str) -> Array:
    """Sums over items drawn with replacement.

    `parts` is `[items, columns]`; the result `[resamples, columns]`. All columns see the same draws, which is what
    makes differences between models paired. The draws depend on `seed`, `key` (a task's name, so that tasks are
    independent) and the number of items, nothing else.
    """
    sums = [_sums(_counts(drawn), parts) for drawn in _draws(len(parts), resamples, seed, key)]
    return np.concatenate(sums) if sums else np.empty((0, parts.shape[1]))


def interval(values: Array) -> tuple[float, float]:
    """The percentile interval (95%) of resampled values `[resamples]`."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def ratio_estimates(parts: Array, resamples: int, seed: int, key: str) -> list[Value]:
    """Ratio of sums for each pair of columns, with its interval; no interval for one item or without resamples.

    `parts` is `[items, ratios, 2]`, numerators and denominators. Where every item agrees, as when all answers are
    right, the interval has no width: it says that the items agree, not that the next item will.
    """
    items, ratios, _ = parts.shape
    totals = parts.sum(axis=0)  # [ratios, 2]
    values = totals[:, 0] / totals[:, 1]
    if items < 2 or resamples < 1:
        return [Value(float(value)) for value in values]
    sums = resampled_sums(parts.reshape(items, ratios * 2), resamples, seed, key).reshape(-1, ratios, 2)
    drawn = sums[..., 0] / sums[..., 1]  # [resamples, ratios]
    return [Value(float(value), *interval(drawn[:, index])) for index, value in enumerate(values)]


def _draws(items: int, resamples: int, seed: int, key: str) -> Iterator[NDArray[Any]]:
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, word])
    rows = max(1, _BLOCK // items)
    for start in range(0, resamples, rows):
        yield generator.integers(items, size=(min(rows, resamples - start), items))


def _sums(counts: Array, parts: Array) -> Array:
    """`counts @ parts`, each sum by itself: the order in which BLAS adds depends on the number of rows."""
    return np.stack([(counts * column).sum(axis=1) for column in parts.T], axis=1)


def _counts(drawn: NDArray[Any]) -> Array:
    """How often each item was drawn: `[resamples, items]` indices to `[resamples, items]` counts."""
    rows, items = drawn.shape
    flat = drawn + np.arange(rows)[:, None] * items
    return np.bincount(flat.ravel(), minlength=rows * items).reshape(rows, items).astype(np.float64)
