"""How well some records stand for all: how far the others are from the nearest of them, and which topics they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 2048


@dataclass(frozen=True)
class Coverage:
    """`distance`: the mean over records of 1 - cosine with the nearest chosen one; `farthest`: the same at the 95th
    percentile; `topics`: the share of labels that occur among the chosen; `balance`: the entropy of the chosen over the
    labels, as a share of the largest possible (1: all labels alike)."""

    distance: float
    farthest: float
    topics: float
    balance: float


def coverage(vectors: np.ndarray, chosen: np.ndarray, labels: Sequence[object]) -> Coverage:
    """Of unit `vectors` `[records, dimensions]` by those at the indices `chosen`; one label a record."""
    held = vectors[chosen].astype(np.float32)
    gaps = [
        1 - (vectors[start : start + _CHUNK].astype(np.float32) @ held.T).max(axis=1)
        for start in range(0, len(vectors), _CHUNK)
    ]
    gap = np.maximum(np.concatenate(gaps), 0)
    names, coded = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    counts = np.bincount(coded[chosen], minlength=len(names))
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    balance = entropy / np.log(len(names)) if len(names) > 1 else 1.0
    return Coverage(float(gap.mean()), float(np.quantile(gap, 0.95)), float((counts > 0).mean()), float(balance))
