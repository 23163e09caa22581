"""Every predictor of every two experts, from what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from graftkit.improving import ranking_rule as rule
from graftkit.improving.ranking_weights import Weighed
from graftkit.measuring.predictors import Responses, pooled, similarity
from graftkit.measuring.predictors_observing import Observed

Values = dict[str, float | None]


def pair_values(
    names: Sequence[str],
    fit: Mapping[str, tuple[float, float]],
    own: Mapping[str, Mapping[str, float]],
    watched: Mapping[str, Sequence[Observed]],
    weighed: Weighed,
    weight: float = 0.5,
) -> dict[tuple[str, str], Values]:
    """Every predictor of every two experts.

    `fit`: each expert's compatibility, normalised and raw; `own`: p(e, t); `watched`: each expert on the target's data
    sets, in one order for all.
    """
    pairs = list(combinations(names, 2))
    best = max(float(np.mean(list(row.values()))) for row in own.values())
    found: dict[tuple[str, str], Values] = {}
    for place, pair in enumerate(pairs):
        one, other = pair
        found[pair] = pair_predictors(
            (fit[one], fit[other]), (list(own[one].values()), list(own[other].values())),
            (watched[one], watched[other]), best,
        ) | {
            "cosine": None if weighed.cosines[place] is None else abs(weighed.cosines[place] or 0.0),
            "sign_conflict": weighed.conflicts[place],
            "overlap": weighed.overlaps[place],
            "size": _largest(weighed, names.index(one), names.index(other)),
        }  # fmt: skip
    known = [[float(own[name] or 0) for own in found.values()] for name in ("compatibility", "proficiency")]
    factors = rule.two_factor(known[0], known[1], weight)
    return {pair: {"two_factor": factor, **found[pair]} for pair, factor in zip(pairs, factors, strict=True)}


def _largest(weighed: Weighed, one: int, other: int) -> float | None:
    sizes = [size for size in (weighed.sizes[one], weighed.sizes[other]) if size is not None]
    return max(sizes) if len(sizes) == 2 else None


def pair_predictors(
    fit: tuple[tuple[float, float], tuple[float, float]],
    own: tuple[Sequence[float], Sequence[float]],
    watched: tuple[Sequence[Observed], Sequence[Observed]],
    best: float | None = None,
) -> Values:
    """Those predictors of one pair that need data: compatibilities (normalised, raw), scores p(e, t), and runs.

    `best`: the mean score of the best expert of all; by default of the two.
    """
    alike = [similarity(a.grams, b.grams) for a, b in zip(*watched, strict=True)]
    one, other = (_answers(runs) for runs in watched)
    lost = rule.residuals(one, other)
    a, b = (np.asarray(row, dtype=np.float64) for row in own)
    return {
        "compatibility": (fit[0][0] + fit[1][0]) / 2,
        "compatibility_raw": (fit[0][1] + fit[1][1]) / 2,
        "proficiency": rule.strength(a, b),
        "both": float((a + b).mean() / 2),
        "headroom": rule.headroom(a, b, best),
        "interference": sum(rule.met(one, other)) / 2,
        "gate_residual": lost[0],
        "convex_residual": lost[1],
        "similarity": None if None in alike else float(np.mean([value for value in alike if value is not None])),
    }


def _answers(runs: Sequence[Observed]) -> Responses:
    return pooled([run.responses for run in runs if run.responses is not None])
