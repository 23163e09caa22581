"""Nearswap, RAM, Arcee fusion, Localize-and-Stitch (`methods.md` 23) and Consensus-TA (10), entry by entry."""

import numpy as np

from reference.ties import kth_magnitude


def nearswap(base, model, t):
    merged = np.array(base)
    for place in np.ndindex(base.shape):
        apart = abs(base[place] - model[place])
        share = 1.0 if apart <= t else t / apart
        merged[place] = base[place] + share * (model[place] - base[place])
    return merged


def ram(base, models, epsilon, r=0.0, alpha=0.2):
    deltas = [model - base for model in models]
    changed = [np.abs(delta) > epsilon for delta in deltas]
    gains = []
    for own in changed:
        shared = sum(1 for place in np.ndindex(base.shape) if own[place] and sum(c[place] for c in changed) > 1)
        alone = sum(1 for place in np.ndindex(base.shape) if own[place] and sum(c[place] for c in changed) == 1)
        gains.append(1 + r * min(shared / alone if alone else 0.0, alpha))
    merged = np.array(base)
    for place in np.ndindex(base.shape):
        who = [k for k, own in enumerate(changed) if own[place]]
        if len(who) == 1:
            merged[place] += gains[who[0]] * deltas[who[0]][place]
        elif who:
            merged[place] += np.mean([deltas[k][place] for k in who])
    return merged


def consensus_ta(base, models, weight, scale, selectivity, agreement):
    deltas = [w * (model - base) for w, model in zip(weight, models, strict=True)]
    merged = np.array(base)
    for place in np.ndindex(base.shape):
        values = [delta[place] for delta in deltas]
        total = sum(values)
        votes = sum(abs(v) > lam * abs(total - v) for v, lam in zip(values, selectivity, strict=True))
        if votes >= agreement:
            merged[place] += scale * total
    return merged


def stitched(deltas, limits, weight, scale):
    merged = np.zeros(deltas[0].shape)
    for place in np.ndindex(merged.shape):
        kept = [(w, d[place]) for w, d, k in zip(weight, deltas, limits, strict=True) if abs(d[place]) >= k]
        share = sum(w for w, _ in kept)
        merged[place] = scale * sum(w * x for w, x in kept) / (share or 1.0)
    return merged


def localize_and_stitch(base, models, weight, density, scale):
    deltas = [model - base for model in models]
    limits = [kth_magnitude(delta, share) for delta, share in zip(deltas, density, strict=True)]
    return base + stitched(deltas, limits, weight, scale)


def localize_and_stitch_model(bases, models, weight, density, scale):
    """Scope model: `bases` is a list of tensors, `models` are lists of them."""
    deltas = [[tensor - base for tensor, base in zip(model, bases, strict=True)] for model in models]
    flat = [np.concatenate([d.ravel() for d in model]) for model in deltas]
    limits = [kth_magnitude(whole, share) for whole, share in zip(flat, density, strict=True)]
    return [base + stitched([d[i] for d in deltas], limits, weight, scale) for i, base in enumerate(bases)]


def softmax(row):
    raised = np.exp(row - row.max())
    return raised / raised.sum()


def arcee_fusion(base, model):
    if not base.size:
        return base.copy()
    width = base.shape[-1] if base.ndim else 1
    old, new = base.reshape(-1, width), model.reshape(-1, width)
    importance = np.zeros(old.shape)
    for k, (before, after) in enumerate(zip(old, new, strict=True)):
        p, q = softmax(after), softmax(before)
        importance[k] = np.abs(after - before) * np.sum(p * np.log(p / q))
    ranked = np.sort(importance, axis=None)
    low, middle, high = (ranked[int(share * (ranked.size - 1))] for share in (0.25, 0.5, 0.75))
    kept = importance >= middle + 1.5 * (high - low)
    return np.where(kept.reshape(base.shape), model, base)
