"""Model soups (Wortsman et al. 2022, section 2): a weighted mean of weights."""

import numpy as np


def average(models, weight, normalize=True):
    merged = np.zeros(models[0].shape)
    for place in np.ndindex(merged.shape):
        merged[place] = sum(w * model[place] for w, model in zip(weight, models, strict=True))
        if normalize:
            merged[place] /= sum(weight)
    return merged
