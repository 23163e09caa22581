"""EMR (`methods.md` 11) and TALL masks (10), entry by entry: the unified delta, the masks, the scales."""

import numpy as np


def emr(deltas):
    """`deltas`: per model an array. The unified delta and the masks."""
    unified = np.zeros(deltas[0].shape)
    masks = [np.zeros(unified.shape, bool) for _ in deltas]
    for place in np.ndindex(unified.shape):
        values = [delta[place] for delta in deltas]
        sign = 1 if sum(values) > 0 else -1
        unified[place] = sign * max([abs(v) for v in values if v * sign > 0], default=0.0)
        for mask, value in zip(masks, values, strict=True):
            mask[place] = value * sign > 0
    return unified, masks


def emr_scales(models, rescale):
    """`models`: per tensor the models' deltas. Per model the scales of the tensors."""
    made = [emr(deltas) for deltas in models]
    scales = []
    for k in range(len(models[0])):
        own = [np.sum(np.abs(deltas[k])) for deltas in models]
        kept = [np.sum(np.abs(unified * masks[k])) for unified, masks in made]
        if rescale == "means":
            sizes = [max(deltas[0].size, 1) for deltas in models]
            own, kept = ([x / n for x, n in zip(part, sizes, strict=True)] for part in (own, kept))
        if rescale in ("model", "means"):
            own, kept = [sum(own)] * len(own), [sum(kept)] * len(kept)
        scales.append([1.0 if rescale == "none" else o / k if k else 0.0 for o, k in zip(own, kept, strict=True)])
    return scales


def tall(deltas, selectivity):
    total = sum(deltas)
    masks = [np.abs(d) > share * np.abs(total - d) for d, share in zip(deltas, selectivity, strict=True)]
    return total, masks
