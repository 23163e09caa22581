"""Graft's equations (papers.md 1.1) by loops over channels, and entropy by numpy's own histogram; float64."""

import math

import numpy as np


def entropy(values, bins=10):
    counts, _ = np.histogram(values, bins=bins)
    shares = [count / values.size for count in counts if count]
    return -sum(p * math.log(p) for p in shares) if np.ptp(values) else 0.0


def open_entropy(values, bins=10):
    """As filter grafting's code: float32 edges, every bin without its upper edge."""
    values = np.asarray(values, np.float32)
    low, step = values.min(), (values.max() - values.min()) / np.float32(bins)
    total = 0.0
    for k in range(bins):
        inside = (values >= low + np.float32(k) * step) & (values < low + np.float32(k + 1) * step)
        p = inside.mean()
        total -= p * math.log(p) if p else 0.0
    return total


def paper(base, graft, w_local, a=0.4, c=500.0, divisor=math.pi, signal=entropy):
    """Equations 3 to 8 for two matrices, `w_local` one a channel."""
    w_global = a / divisor * math.atan(c * (signal(base) - signal(graft))) + 0.5
    fused, weights = np.empty_like(base), []
    for i, local in enumerate(w_local):
        u_b = w_global * (1 - math.exp(-w_global * local))
        u_g = (1 - w_global) * (1 - math.exp(-(1 - w_global) * (1 - local)))
        w_b = math.exp(u_b) / (math.exp(u_b) + math.exp(u_g))
        fused[i] = w_b * base[i] + (1 - w_b) * graft[i]
        weights.append(w_b)
    return fused, np.array(weights)


def joint(models, gates, a=0.4, c=500.0, sharpness=1.0, signal=entropy):
    """design.md 2 for any number of models, gates [models, out]."""
    held = [signal(model) for model in models]
    fused = np.zeros_like(models[0])
    for i in range(len(fused)):
        raised = []
        for t, own in enumerate(held):
            others = [h for k, h in enumerate(held) if k != t]
            g = 0.5 + a / math.pi * math.atan(c * (own - sum(others) / len(others)))
            raised.append(math.exp(sharpness * g * (1 - math.exp(-g * gates[t][i]))))
        fused[i] = sum(r * model[i] for r, model in zip(raised, models, strict=True)) / sum(raised)
    return fused
