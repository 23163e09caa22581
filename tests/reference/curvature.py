"""Fisher merging and RegMean (`methods.md` 13, 14), and the regression in a core space, as their formulas say."""

import numpy as np


def fisher(models, information, weight, floor):
    out = np.zeros_like(models[0])
    for place in np.ndindex(out.shape):
        counts = [w * (f[place] + floor) for w, f in zip(weight, information, strict=True)]
        out[place] = sum(c * m[place] for c, m in zip(counts, models, strict=True)) / sum(counts)
    return out


def ridged(grams, ridge, alpha=1.0):
    level = np.mean([np.mean(np.diag(g)) for g in grams])
    eye = np.eye(len(grams[0]))
    return [np.where(eye > 0, g, alpha * g) + ridge * level * eye for g in grams]


def regmean(models, grams, weight, alpha, ridge):
    held = ridged(grams, ridge, alpha)
    total = sum(w * g for w, g in zip(weight, held, strict=True))
    return sum(w * m @ g for w, m, g in zip(weight, models, held, strict=True)) @ np.linalg.inv(total)


def core_regmean(deltas, roots, weight, ridge, balance, outside):
    """Least squares over an orthonormal basis of the roots' rows, `[tokens, in]` for each model: each model's own
    answers, over how large they are, with the ridge as further rows that ask for each delta itself; `outside` times
    the sum of the deltas elsewhere."""
    values, vectors = np.linalg.svd(np.vstack(roots), full_matrices=False)[1:]
    basis = vectors[values > 1e-6 * values[0]]
    counts = [np.linalg.norm(s @ d.T) ** (-2 * balance) for s, d in zip(roots, deltas, strict=True)]
    seen = [np.sqrt(c) * s @ basis.T for c, s in zip(counts, roots, strict=True)]
    level = np.mean([np.mean((z**2).sum(axis=0)) for z in seen])
    rows, wanted = [], []
    for w, delta, z in zip(weight, deltas, seen, strict=True):
        more = np.sqrt(w) * np.vstack([z, np.sqrt(ridge * level) * np.eye(len(basis))])
        rows.append(more)
        wanted.append(more @ basis @ delta.T)
    inside = np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0].T
    added = outside * sum(w * delta for w, delta in zip(weight, deltas, strict=True))
    return added + (inside - added @ basis.T) @ basis
