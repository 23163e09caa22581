"""DARE (Yu et al. 2024, section 3): drop entries of the task vectors at random and rescale what is left."""

import numpy as np

from reference.sparse import combine
from reference.ties import with_norm_of


def dare(base, models, uniform, weight, density, rescale=True, rescale_by="chance", **options):
    """`uniform`: per model the numbers in [0, 1) that decide, [*shape]; below the density is kept."""
    own = rescale and rescale_by == "chance"
    kept = []
    for model, numbers, share in zip(models, uniform, density, strict=True):
        delta = np.zeros(base.shape)
        for place in np.ndindex(base.shape):
            if numbers[place] < share:
                delta[place] = (model[place] - base[place]) / (share if own else 1.0)
        kept.append(with_norm_of(delta, model - base) if rescale and not own else delta)
    return base + combine(kept, weight, **options)
