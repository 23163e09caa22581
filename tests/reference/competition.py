"""SCE (`methods.md` 9) and PCB (12, the form of the evolution-strategy script), by full sorts."""

from fractions import Fraction

import numpy as np

from reference.ties import disjoint


def sce(base, models, select_topk, scale=1.0, floor=0.0):
    deltas = np.array([model - base for model in models])
    if select_topk < 1:
        spread = np.array(np.std(deltas, axis=0), np.float32)
        spread[(deltas == deltas[0]).all(axis=0)] = 0
        varied = int(np.sum(spread > 0))
        count = 0 if select_topk == 0 or not varied else max(1, int(Fraction(str(select_topk)) * varied))
        smallest = np.sort(spread, axis=None)[::-1][count - 1] if count else np.inf
        deltas = np.where(spread >= smallest, deltas, 0.0)
    energies = [float(np.sum(delta**2)) for delta in deltas]
    total = sum(energies)
    small = total == 0 or total / deltas[0].size < floor
    weight = [1 / len(deltas) if small else energy / total for energy in energies]
    merged = np.zeros(base.shape)
    for place in np.ndindex(base.shape):
        merged[place] = scale * disjoint([d[place] for d in deltas], weight, [1.0] * len(deltas), True)
    return base + merged


def scaled(values, low, high, level):
    """From 0 at `low` to 1 at `high`; where there is no such range, `level`."""
    return (values - low) / (high - low) if high > low else level


def pcb(base, models, weight, density):
    deltas = np.array([(model - base).ravel() for model in models])
    count = deltas.shape[1]
    if not count:
        return base.copy()
    clipped, normal = [], []
    for delta in deltas:
        ranked = np.sort(np.abs(delta))
        low = ranked[int(count * 0.01)]
        high = ranked[max(int(count * 0.99) - 1, int(count * 0.01))]
        magnitude = np.clip(np.abs(delta), low, high)
        clipped.append(np.sign(delta) * magnitude)
        normal.append(np.sign(delta) * scaled(magnitude, low, high, 1.0))
    total, divisor = np.zeros(count), np.zeros(count)
    for own, values, w in zip(normal, clipped, weight, strict=True):
        score = np.exp(len(models) * own**2) * sum(np.tanh(own * other) for other in normal)
        wanted = 0 if density == 0 else max(1, int(Fraction(str(density)) * count))
        if wanted:
            low = np.sort(score)[::-1][wanted - 1]
            share = np.where(score >= low, scaled(score, low, score.max(), (score > 0) * 1.0), 0.0)
            total, divisor = total + share * w * values, divisor + share
    return base + (total / np.where(divisor > 0, divisor, 1.0)).reshape(base.shape)
