"""Compiled twins of preparations: in place on the engine's flat deltas [models, n], one block at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graftkit.compiling import compiled
from graftkit.methods.kernels import drop
from graftkit.methods.random import Keyed

Value = float | Sequence[float]


def trim(deltas: np.ndarray, threshold: np.ndarray, *, density: Value, scope: str) -> None:
    """Twin of `preparations.trim`; `density` and `scope` are in the threshold already."""
    for row, limit in zip(deltas, threshold.astype(np.float32), strict=True):
        if limit > 0:
            _keep(row, limit, np.float32(np.inf))


def dare(deltas: np.ndarray, rng: Keyed, *, density: Value, rescale: bool) -> None:
    """Twin of `preparations.dare`."""
    drop(deltas, rng, density, rescale)


def breadcrumbs(deltas: np.ndarray, band: np.ndarray, *, density: Value, outliers: Value) -> None:
    """Twin of `preparations.breadcrumbs`; `density` and `outliers` are in the band already."""
    for row, low, high in zip(deltas, *band.astype(np.float32), strict=True):
        _keep(row, low, high)


@compiled
def _keep(values, low, high):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        size = np.float32(abs(values[i]))
        values[i] *= np.float32((size >= low) & (size <= high))
