"""Means of directions (`methods.md` 7 and 8), computed on the vectors themselves: Model Stock (Jang et al. 2024), the
Karcher mean by its fixed point, and mergekit's multislerp and nuslerp."""

import itertools

import numpy as np

CANCELLED = 1e-7


def size(vector):
    return float(np.sqrt(np.sum(np.square(vector))))


def cosine(one, other):
    lengths = size(one) * size(other)
    return float(np.clip(np.sum(one * other) / lengths, -1, 1)) if lengths else 0.0


def model_stock(base, models, extrapolate=False):
    deltas = [model - base for model in models]
    c = np.mean([cosine(one, other) for one, other in itertools.combinations(deltas, 2)])
    divisor = 1 + (len(deltas) - 1) * c
    t = len(deltas) * c / divisor if (c > 0 or extrapolate) and abs(divisor) >= 1e-6 else 0.0
    return t * np.mean(models, axis=0) + (1 - t) * base


def model_stock_rows(base, models, extrapolate=False):
    if base.ndim < 2:
        return model_stock(base, models, extrapolate)
    rows = [model_stock(base[k], [model[k] for model in models], extrapolate) for k in range(len(base))]
    return np.stack(rows) if rows else base.copy()


def logarithm(point, unit):
    """The tangent at a point of the sphere that leads to another, as long as the angle."""
    c = np.clip(np.sum(point * unit), -1, 1)
    across = unit - c * point
    return np.arccos(c) * across / size(across) if size(across) > CANCELLED else 0 * point


def karcher(tensors):
    units = [tensor / size(tensor) for tensor in tensors if size(tensor) > 0]
    start = np.sum(units, axis=0) if units else np.zeros_like(tensors[0])
    if size(start) <= CANCELLED * max(len(units), 1):
        return np.mean(tensors, axis=0)
    mean = start / size(start)
    for _ in range(1000):
        tangent = np.mean([logarithm(mean, unit) for unit in units], axis=0)
        if size(tangent) < 1e-14:
            break
        mean = np.cos(size(tangent)) * mean + np.sin(size(tangent)) * tangent / size(tangent)
        mean = mean / size(mean)
    return np.mean([size(tensor) for tensor in tensors]) * mean


def multislerp(tensors, weight, normalize=True):
    weight = [w / (sum(weight) if normalize else 1.0) for w in weight]
    pairs = list(zip(weight, tensors, strict=True))
    direction = sum((w * x / size(x) for w, x in pairs if size(x) > 0), np.zeros_like(tensors[0]))
    if size(direction) <= CANCELLED * sum(map(abs, weight)):
        return sum(w * x for w, x in pairs)
    return sum(w * size(x) for w, x in pairs) * direction / size(direction)


def nuslerp_along(first, second, weight, axis):
    """Row by row (axis -1) or column by column (axis 0); a vector is one of either."""
    if first.ndim < 2:
        return nuslerp(first, second, weight)
    pairs = [np.moveaxis(part, axis, -1) for part in (first, second)]
    merged = np.zeros(pairs[0].shape)
    for place in np.ndindex(merged.shape[:-1]):
        merged[place] = nuslerp(pairs[0][place], pairs[1][place], weight)
    return np.moveaxis(merged, -1, axis)


def nuslerp(first, second, weight):
    t = weight[1] / (weight[0] + weight[1])
    c = cosine(first, second) if size(first) and size(second) else 1.0
    if 1 - c * c <= 1e-7:
        return (1 - t) * first + t * second
    angle = np.arccos(c)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
