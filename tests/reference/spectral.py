"""TSV-M, Iso-C, Iso-CTS, KnOTS, WUDI and OptMerge (`methods.md` 16 to 18 and 20.6) as their formulas say: full SVDs,
pseudo-inverses, descent step by step; in float64, for matrices."""

import numpy as np

from reference.ties import kth_magnitude, trimmed


def svd(matrix):
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    real = sizes > 1e-6 * sizes[0] if len(sizes) else []
    return left[:, real], sizes[real], right[real]


def polar(frame):
    left, _, right = svd(frame)
    return left @ right


def weighted(deltas, weight):
    return [w * d for w, d in zip(weight, deltas, strict=True) if np.any(w * d)]


def tsv(deltas, weight, scale=1.0):
    live = weighted(deltas, weight)
    most = max(1, min(deltas[0].shape) // max(len(live), 1))
    pieces = [svd(delta) for delta in live]
    left = np.hstack([u[:, :most] for u, _, _ in pieces])
    sizes = np.concatenate([s[:most] for _, s, _ in pieces])
    right = np.vstack([v[:most] for _, _, v in pieces])
    return scale * polar(left) @ np.diag(sizes) @ polar(right)


def iso_c(deltas, weight, scale=1.0):
    left, sizes, right = svd(np.sum(weighted(deltas, weight), axis=0))
    return scale * np.mean(sizes) * left @ right


def iso_cts(deltas, weight, common, scale=1.0):
    live = weighted(deltas, weight)
    rank, count = min(deltas[0].shape), len(live)
    shared = int(rank * common)
    own = round((rank - shared) / count)
    shared = rank - own * count
    left, sizes, right = (part[..., :shared] if k < 2 else part[:shared] for k, part in enumerate(svd(np.sum(live, 0))))
    lefts, all_sizes, rights = [left], [sizes], [right]
    for delta in live:
        u, s, v = np.linalg.svd(delta - left @ left.T @ delta, full_matrices=False)
        lefts.append(u[:, :own])
        all_sizes.append(s[:own])
        rights.append(v[:own])
    return scale * np.mean(np.concatenate(all_sizes)) * polar(np.hstack(lefts)) @ polar(np.vstack(rights))


def knots(deltas, weight, density, scale=1.0):
    """With an election and the mean over those who agree, entry by entry."""
    left, sizes, right = svd(np.hstack(deltas))
    width = deltas[0].shape[1]
    turned = [sizes[:, None] * right[:, t * width : (t + 1) * width] for t in range(len(deltas))]
    kept = [trimmed(d, kth_magnitude(d, share)) for d, share in zip(turned, density, strict=True)]
    merged = np.zeros(turned[0].shape)
    for place in np.ndindex(merged.shape):
        votes = [(d[place], w) for d, w in zip(kept, weight, strict=True)]
        sign = 1 if sum(v for v, _ in votes) >= 0 else -1
        agreeing = [(v, w) for v, w in votes if np.sign(v) == sign]
        total = sum(w for _, w in agreeing)
        merged[place] = sum(v * w for v, w in agreeing) / (total if total else 1)
    return scale * left @ merged


def wudi_objective(merged, deltas):
    return sum(np.sum(((merged - d) @ d.T) ** 2) / np.sum(d**2) for d in deltas)


def wudi_slope(merged, deltas, seen=None):
    pairs = zip(deltas, deltas if seen is None else seen, strict=True)
    return sum(2 * (merged - e) @ e.T @ e / np.sum(d**2) for d, e in pairs)


def wudi_early(deltas, weight, steps, start, ridge=0.0, fine=2000):
    """The flow along the gradient, and the ridge's pull to the start, by steps of Runge and Kutta."""
    live = weighted(deltas, weight)
    first = {"sum": 1.0, "mean": 1 / len(live), "zero": 0.0}[start] * np.sum(live, axis=0)

    def flow(merged):
        return -wudi_slope(merged, live) / 2 - ridge * (merged - first)

    merged, step = first, steps / fine
    for _ in range(fine):
        one = flow(merged)
        two = flow(merged + step / 2 * one)
        three = flow(merged + step / 2 * two)
        four = flow(merged + step * three)
        merged = merged + step / 6 * (one + 2 * two + 2 * three + four)
    return merged


def wudi_least_norm(deltas):
    """The minimum of least norm, as a least-squares problem over all entries."""
    rows = np.hstack([d.T / np.sqrt(np.sum(d**2)) for d in deltas])
    wanted = np.hstack([d @ d.T / np.sqrt(np.sum(d**2)) for d in deltas])
    return np.linalg.lstsq(rows.T, wanted.T, rcond=1e-8)[0].T


def opt_merge(deltas, weight, steps, rate, momentum):
    """Descent with momentum from the mean, on what the first directions of each delta show."""
    live = weighted(deltas, weight)
    most = max(1, min(deltas[0].shape) // len(live))
    seen = [(u[:, :most] * s[:most]) @ v[:most] for u, s, v in map(svd, live)]
    merged, speed = np.mean(live, axis=0), 0.0
    for _ in range(steps):
        speed = momentum * speed + wudi_slope(merged, live, seen)
        merged = merged - rate * speed
    return merged
