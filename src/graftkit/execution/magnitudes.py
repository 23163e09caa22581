"""DoRA: an adapter whose weight is `magnitude * (W0 + L R) / |W0 + L R|`, with one magnitude and norm a channel.

Its delta is dense, so it is formed block by block: the factor of each output channel takes one pass over the base's
weights, and is kept for the passes that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.errors import NonFiniteError

Read = Callable[[int, int], np.ndarray]
"""Reads elements `[start, stop)` of the base's weight as numbers."""

BLOCK = 1 << 18  # elements that the pass over the base looks at together


@dataclass(frozen=True)
class Rescaled:
    """The delta `(W0 + L R) * factor - W0`: a factor for each output channel, which are columns where `transposed`."""

    product: LowRank
    factor: np.ndarray
    transposed: bool

    def block(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` of the flattened delta; `base` holds the same elements of the base's weight."""
        columns, positions = self.product.right.shape[1], np.arange(start, stop)
        channels = positions % columns if self.transposed else positions // columns
        factor = self.factor[channels]
        delta = factor * self.product.block(start, stop) + (factor - 1) * base
        return delta.astype(base.dtype, copy=False)


def rescaled(adapter: Adapter, name: str, product: LowRank, read: Read, label: str) -> Rescaled:
    """The delta of one tensor under DoRA. Raises NonFiniteError for a channel without a direction or magnitude."""
    transposed = adapter.factors[name].transposed
    if name not in adapter.channels:
        norms = _norms(product, read, transposed)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = adapter.magnitude(name) / norms
        if not np.isfinite(factor).all():
            raise NonFiniteError(
                f"{label}: {name!r} has a DoRA magnitude that is not finite, or a channel of zeros, which has no "
                "direction"
            )
        adapter.channels[name] = factor
    return Rescaled(product, adapter.channels[name], transposed)


def _norms(product: LowRank, read: Read, transposed: bool) -> np.ndarray:
    """Norms of `W0 + L R` over the input axis, in whole rows at a time; float64 [out]."""
    rows, columns = product.left.shape[0], product.right.shape[1]
    step = max(1, BLOCK // columns)
    squares = np.zeros(columns if transposed else rows)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        wide = product.block(first * columns, last * columns).astype(np.float64)
        wide += read(first * columns, last * columns)
        wide = (wide * wide).reshape(last - first, columns)
        if transposed:
            squares += wide.sum(axis=0)
        else:
            squares[first:last] = wide.sum(axis=1)
    return np.sqrt(squares)
