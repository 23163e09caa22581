"""Task arithmetic (Ilharco et al. 2023, section 2): the base plus a scaled sum of task vectors."""

import numpy as np


def task_arithmetic(base, models, weight, scale=1.0, normalize=False):
    merged = np.zeros(base.shape)
    for place in np.ndindex(base.shape):
        moved = sum(w * (model[place] - base[place]) for w, model in zip(weight, models, strict=True))
        merged[place] = base[place] + scale * moved / (sum(weight) if normalize else 1.0)
    return merged
