"""Model Breadcrumbs (`methods.md` 6) and DELLA (5), by full sorts."""

from fractions import Fraction

import numpy as np

from reference.ties import merged_delta, with_norm_of


def crumbs(delta, density, outliers):
    """Entries outside the band become 0; counts are exact, of the decimals that a person wrote."""
    count = delta.size
    kept = 0 if density == 0 or not count else max(1, int(Fraction(str(density)) * count))
    if not kept:
        return np.zeros_like(delta)
    removed = min(int(Fraction(str(outliers)) * count), count - kept)
    falling = np.sort(np.abs(delta), axis=None)[::-1]
    lowest, highest = falling[removed + kept - 1], falling[removed] if removed else np.inf
    return np.where((np.abs(delta) >= lowest) & (np.abs(delta) <= highest), delta, 0.0)


def combine(kept, weight, scale=1.0, elect="none", normalize=False, combine="mean", weighted_election=False):
    if elect == "sign":
        return merged_delta(kept, weight, scale, combine, weighted_election)
    return scale * sum(w * d for w, d in zip(weight, kept, strict=True)) / (sum(weight) if normalize else 1.0)


def breadcrumbs(base, models, weight, density, outliers, rescale=False, **options):
    kept = []
    for model, *share in zip(models, density, outliers, strict=True):
        left = crumbs(model - base, *share)
        kept.append(with_norm_of(left, model - base) if rescale else left)
    return base + combine(kept, weight, **options)


def chances(row, density, epsilon):
    """DELLA's keep probabilities of a row: linear in the rank of the magnitude, equal ones ranked by position."""
    epsilon = min(epsilon, density, 1 - density)
    order = sorted(range(len(row)), key=lambda k: (abs(row[k]), k))
    found = np.full(len(row), density)
    for rank, k in enumerate(order):
        if len(row) > 1:
            found[k] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return found


def della(base, models, uniform, weight, density, epsilon, rescale=True, rescale_by="chance", **options):
    """`uniform`: per model the numbers in [0, 1) that decide, [*shape]; below the chance is kept."""
    kept = []
    for model, numbers, share, window in zip(models, uniform, density, epsilon, strict=True):
        delta = model - base
        width = delta.shape[-1] if delta.ndim else 1
        rows = delta.reshape(-1, width) if delta.size else np.zeros((0, 1))
        chance = np.array([chances(row, share, window) for row in rows]).reshape(delta.shape)
        left = np.where(numbers < chance, delta, 0.0)
        own = left / np.maximum(chance, 1e-3) if rescale_by == "chance" else with_norm_of(left, delta)
        kept.append(own if rescale else left)
    return base + combine(kept, weight, **options)
