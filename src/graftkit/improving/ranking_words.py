"""A ranking in words: why an expert or a pair stands where it stands, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LARGE = 0.1  # of the base's norm: a change so large that something may have gone wrong
ALIKE = 0.1  # cosine of deltas: experts of one skill had more on the orchard, good ones of two skills less
MOVED, LOST = 10, 100  # interference: more than good experts met on the orchard; only what one damaged expert did there
LITTLE = 0.05  # in units of p: a gain too small to merge for


def reason_of_expert(name: str, own: Mapping[str, float], size: float | None) -> str:
    """Why an expert stands where it stands, in words."""
    parts = []
    if own:
        mean = float(np.mean(list(own.values())))
        best = max(own, key=lambda task: own[task])
        if mean <= 0 and own[best] <= 0:
            parts.append("no better than the base on the target")
        elif len(own) == 1:
            parts.append(
                "the best on the target" if mean == 1 else f"{mean:.0%} of the best expert's gain on the target"
            )
        else:
            parts.append(f"strongest on {best}, with {own[best]:.0%} of the best expert's gain")
    if size is not None and size >= LARGE:
        parts.append(f"its change is {size:.0%} of the base's norm, so large that it may be damaged")
    return "; ".join(parts) or f"{name} was not scored"


def reason_of_pair(
    names: tuple[str, str], own: tuple[Mapping[str, float], Mapping[str, float]], values: Mapping[str, float | None]
) -> str:
    """Why a pair stands where it stands, in words: what each brings, and what they do to each other."""
    parts = []
    if own[0]:
        leads = {t: max((0, 1), key=lambda k: own[k][t]) for t in own[0]}
        useful = {t: k for t, k in leads.items() if own[k][t] > 0}
        if not useful:
            parts.append("neither is better than the base on the target")
        elif len(set(useful.values())) == 2:
            each = [f"{names[k]} brings {own[k][t]:.0%} on {t}" for t, k in useful.items()]
            parts.append(", ".join(each))
        else:
            lead = next(iter(useful.values()))
            parts.append(f"{names[lead]} leads on all of the target, {names[1 - lead]} adds nothing that shows")
    disturbed, cosine = values.get("interference"), values.get("cosine")
    if disturbed is not None:
        parts.append(_disturbance(disturbed))
    if cosine is not None and cosine >= ALIKE:
        parts.append(f"they have learnt much the same (cosine {cosine:.2f}), so there is little to gain")
    return "; ".join(parts)


def _disturbance(value: float) -> str:
    if value < MOVED:
        return f"they disturb each other no more than good experts do ({value:.1f})"
    more = f"one moves the other's answers {value:.0f} times as much as the other's own change does"
    return f"{more}, which {'may be' if value < LOST else 'will be'} lost"


def advice(
    own: Mapping[str, Mapping[str, float]],
    pairs: Mapping[tuple[str, str], Mapping[str, float | None]],
) -> str:
    """What to do with experts of these scores p by task, and pairs of these values, in a sentence or two."""
    means = {name: float(np.mean(list(row.values()))) for name, row in own.items()}
    best = max(means, key=lambda name: means[name])
    sound = {pair: values for pair, values in pairs.items() if (values["size"] or 0) < LARGE}
    if max(max(row.values()) for row in own.values()) <= 0:
        return "merge none of them: no expert is better than the base on the target"
    if not sound:
        return f"take {best} alone: every pair holds an expert whose change is so large that it may be damaged"
    if len(next(iter(own.values()))) == 1:
        pair = max(sound, key=lambda pair: sound[pair]["both"] or 0)
        return (
            f"take {best} alone: on a single task few merges beat the better expert; if one does, it is most likely "
            f"{' + '.join(pair)}"
        )
    pair = max(sound, key=lambda pair: sound[pair]["headroom"] or 0)
    gain = sound[pair]["headroom"] or 0
    if gain < LITTLE:
        return f"take {best} alone: no pair could gain more than {max(gain, 0):.2f} over it (in units of p)"
    return (
        f"merge {' + '.join(pair)}: if the merge keeps on each task what the stronger of them can, it gains {gain:.2f} "
        f"over {best}, the best alone (in units of p); then evaluate it, since few keep all"
    )
