"""Preparations and finishers: trim, DARE, breadcrumbs, MagPrune; SVC (`methods.md` 18) and rescaling, in float64."""

import numpy as np

from reference.sparse import chances, crumbs
from reference.ties import kth_magnitude, trimmed


def trim(deltas, density):
    return [trimmed(d, kth_magnitude(d, share)) for d, share in zip(deltas, density, strict=True)]


def breadcrumbs(deltas, density, outliers):
    return [crumbs(*given) for given in zip(deltas, density, outliers, strict=True)]


def dare(deltas, uniform, density, rescale=True):
    made = []
    for delta, numbers, share in zip(deltas, uniform, density, strict=True):
        kept = np.zeros(delta.shape)
        for place in np.ndindex(delta.shape):
            if numbers[place] < share:
                kept[place] = delta[place] / (share if rescale else 1.0)
        made.append(kept)
    return made


def magprune(deltas, uniform, density, epsilon, rescale=True):
    made = []
    for delta, numbers, share, window in zip(deltas, uniform, density, epsilon, strict=True):
        width = delta.shape[-1] if delta.ndim else 1
        rows = delta.reshape(-1, width) if delta.size else np.zeros((0, 1))
        chance = np.array([chances(row, share, window) for row in rows]).reshape(delta.shape)
        kept = np.where(numbers < chance, delta, 0.0)
        made.append(kept / np.maximum(chance, 1e-3) if rescale else kept)
    return made


def svc(delta, deltas, alpha):
    """Direction by direction: one rank-one piece of the merged delta after another, each with its own gain."""
    if delta.ndim != 2 or not delta.size:
        return delta
    left, sizes, right = np.linalg.svd(delta, full_matrices=False)
    made = np.zeros(delta.shape)
    for r, size in enumerate(sizes):
        along = left[:, r] @ delta
        shares = []
        for own in deltas:
            part = left[:, r] @ own
            energy = part @ part
            shares.append(max(alpha, along @ part / energy if energy else alpha))
        gain = len(deltas) / sum(shares) if sum(shares) else 1.0
        made += gain * size * np.outer(left[:, r], right[r])
    return made


def rescale(delta, deltas, to, factor):
    length, mean = np.sqrt(np.sum(delta**2)), np.mean([np.sqrt(np.sum(d**2)) for d in deltas])
    return factor * delta * (mean / length if to == "mean" and length else 1.0)
