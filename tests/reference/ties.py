"""TIES (Yadav et al. 2023, section 4, algorithm 1): trim, elect sign, disjoint merge.

Where the paper is silent, as `methods.md` section 3 settles it: what ties with the k-th entry is kept, at least one
entry is kept, a zero sum elects plus, and the mean is weighted.
"""

from fractions import Fraction

import numpy as np


def kth_magnitude(delta, density):
    """The smallest magnitude that is kept; the count is taken exactly, as the decimal number that a person wrote."""
    if density == 0 or not delta.size:
        return np.inf
    count = max(1, int(Fraction(str(density)) * delta.size))
    return np.sort(np.abs(delta), axis=None)[::-1][count - 1]


def trimmed(delta, smallest):
    return np.where(np.abs(delta) >= smallest, delta, 0.0)


def disjoint(values, weight, votes, mean):
    """One entry of all models: what voted for the elected sign, combined."""
    cast = [v * x for v, x in zip(votes, values, strict=True)]
    sign = 1.0 if sum(cast) >= 0 else -1.0
    agreeing = [(w, x) for w, x, vote in zip(weight, values, cast, strict=True) if vote * sign > 0]
    total, share = sum(w * x for w, x in agreeing), sum(w for w, _ in agreeing)
    return total / share if mean and share else total


def merged_delta(deltas, weight, scale=1.0, combine="mean", weighted_election=False):
    merged = np.zeros(deltas[0].shape)
    votes = weight if weighted_election else [1.0] * len(weight)
    for place in np.ndindex(merged.shape):
        merged[place] = scale * disjoint([d[place] for d in deltas], weight, votes, combine == "mean")
    return merged


def with_norm_of(kept, delta):
    """A sparse delta, as large in the L1 norm as it was."""
    left = np.sum(np.abs(kept))
    return kept * (np.sum(np.abs(delta)) / left) if left else kept


def ties(base, models, weight, density, rescale=False, **options):
    """Scope tensor: the share is counted in this tensor."""
    deltas = [model - base for model in models]
    kept = [trimmed(d, kth_magnitude(d, share)) for d, share in zip(deltas, density, strict=True)]
    if rescale:
        kept = [with_norm_of(k, d) for k, d in zip(kept, deltas, strict=True)]
    return base + merged_delta(kept, weight, **options)


def ties_model(bases, models, weight, density, **options):
    """Scope model: the share is counted over all tensors; `bases` is a list of tensors, `models` lists of them."""
    kept = []
    for tensors, share in zip(models, density, strict=True):
        deltas = [tensor - base for tensor, base in zip(tensors, bases, strict=True)]
        smallest = kth_magnitude(np.concatenate([d.ravel() for d in deltas]), share)
        kept.append([trimmed(d, smallest) for d in deltas])
    return [b + merged_delta([model[i] for model in kept], weight, **options) for i, b in enumerate(bases)]
