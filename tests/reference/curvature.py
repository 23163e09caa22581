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


def core_regmean(lefts, rights, inputs, ridge):
    """`Bhat A` of adapters `B_t A_t` from the inputs [tokens, in] of each domain, over an orthonormal basis of A's
    rows: least squares, with the ridge as further rows that ask for each delta itself."""
    basis = np.linalg.svd(np.vstack(rights), full_matrices=False)[2]
    seen = [x @ basis.T / np.sqrt(len(x)) for x in inputs]
    level = np.mean([np.mean((z**2).sum(axis=0)) for z in seen])
    rows, wanted = [], []
    for left, right, z in zip(lefts, rights, seen, strict=True):
        delta = left @ right @ basis.T
        more = np.vstack([z, np.sqrt(ridge * level) * np.eye(len(basis))])
        rows.append(more)
        wanted.append(more @ delta.T)
    return np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0].T @ basis
