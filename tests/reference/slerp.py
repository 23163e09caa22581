"""SLERP (Shoemake 1985, section 3.3) of two tensors taken as vectors; the raw vectors are combined, as in the peers."""

import numpy as np


def slerp(first, second, t):
    lengths = np.sqrt(np.sum(first**2)), np.sqrt(np.sum(second**2))
    if min(lengths) == 0:
        return (1 - t) * first + t * second
    cosine = np.sum((first / lengths[0]) * (second / lengths[1]))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
