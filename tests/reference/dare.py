"""DARE (Yu et al. 2024, section 3): drop entries of the task vectors at random and rescale what is left."""

import numpy as np

from reference.ties import merged_delta


def dare(base, models, uniform, weight, density, scale=1.0, elect="none", rescale=True):
    """`uniform`: per model the numbers in [0, 1) that decide, [*shape]; below the density is kept."""
    kept = []
    for model, numbers, share in zip(models, uniform, density, strict=True):
        delta = np.zeros(base.shape)
        for place in np.ndindex(base.shape):
            if numbers[place] < share:
                delta[place] = (model[place] - base[place]) / (share if rescale else 1.0)
        kept.append(delta)
    if elect == "sign":
        return base + merged_delta(kept, weight, scale)
    return base + scale * sum(w * d for w, d in zip(weight, kept, strict=True))
