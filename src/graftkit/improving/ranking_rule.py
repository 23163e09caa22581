"""What speaks for merging two experts, in numbers, and the two-factor rule.

For experts e, and tasks t that stand for the target, `p(e, t) = (score(e) - score(base)) / (score(best) - score(base))`
is an expert's proficiency: 0 the base, 1 the best of these experts (0 for all where none is better than the base).

    two_factor = weight C + (1 - weight) P

C: the compatibility (equation 14, normalised; the mean over the target's data sets, of a pair also over its models),
scaled to [0, 1] over the candidates that are ranked. P: `mean_t p` of the expert, of a pair of its better expert, cut
to [0, 1]. The paper names the two factors and no formula; this one is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftkit.improving.closed_forms import convex, free
from graftkit.measuring.predictors import Responses, interference

Array = NDArray[np.float64]
RIDGE, PRIOR = 0.1, 1.0  # of the free gates whose residual is told; those of `graft gates solve`


@dataclass(frozen=True)
class Predictor:
    """A number that is there before a merge, which direction promises a gain, and what it is."""

    better: Literal["higher", "lower"]
    what: str


PREDICTORS: dict[str, Predictor] = {
    "two_factor": Predictor("higher", "compatibility and the better expert's own score, half and half"),
    "compatibility": Predictor("higher", "Graft's score (14, normalised), the mean of the two experts'"),
    "compatibility_raw": Predictor("higher", "the same from (12), not normalised"),
    "proficiency": Predictor("higher", "the better expert's own score: 0 the base, 1 the best of all experts"),
    "headroom": Predictor("higher", "what a merge would gain that kept the better expert's score on every task"),
    "forecast": Predictor("higher", "headroom with each expert's part divided by 1 + the interference that it meets"),
    "interference": Predictor("lower", "how much each moves the other's answers, in units of that one's own moves"),
    "gate_residual": Predictor("lower", "share of the experts' moves that the best free gates of channels lose"),
    "convex_residual": Predictor("lower", "the same for the best gates that sum to one"),
    "similarity": Predictor("higher", "linear CKA of the two experts' activations on the target"),
    "cosine": Predictor("lower", "absolute cosine of the deltas"),
    "sign_conflict": Predictor("lower", "share of entries that both change, in opposite directions"),
    "overlap": Predictor("lower", "squared cosine of the principal angles of what both write to and read from"),
    "size": Predictor("lower", "norm of the larger delta, in units of the base's"),
}
"""All but `proficiency`, `headroom`, `forecast` and `two_factor` are there without scores."""


def proficiency(scores: Sequence[Sequence[float]], base: Sequence[float], better: Sequence[str]) -> Array:
    """`p(e, t)` [experts, tasks] from scores of that shape, the base's [tasks], and each task's better direction."""
    signs = np.array([1.0 if direction == "higher" else -1.0 for direction in better])
    gains = (np.asarray(scores, dtype=np.float64) - np.asarray(base)) * signs
    best = gains.max(axis=0)
    return np.where(best > 0, gains / np.where(best > 0, best, 1.0), 0.0)  # type: ignore[no-any-return]


def headroom(one: Array, other: Array) -> float:
    """What a merge of two experts, each [tasks], would gain over the better one if it kept the best on every task."""
    return float(np.maximum(one, other).mean() - max(one.mean(), other.mean()))


def forecast(one: Array, other: Array, met: tuple[float, float]) -> float:
    """Headroom where the better expert on a task keeps `1 / (1 + interference)` of its score; `met` by each."""
    kept = np.where(one >= other, one / (1 + met[0]), other / (1 + met[1]))
    return float(kept.mean() - max(one.mean(), other.mean()))


def two_factor(compatibility: Sequence[float], own: Sequence[float], weight: float) -> list[float]:
    """The rule for candidates that are ranked together: their compatibilities, and their (better) experts' scores."""
    found = np.asarray(compatibility, dtype=np.float64)
    span = found.max() - found.min()
    scaled = (found - found.min()) / span if span > 0 else np.full(len(found), 0.5)
    return [float(v) for v in weight * scaled + (1 - weight) * np.clip(np.asarray(own, dtype=np.float64), 0, 1)]


def met(one: Responses, other: Responses) -> tuple[float, float]:
    """The interference that each of two experts meets from the other, on the data that it ran on."""
    return interference(one, other.own), interference(other, one.own)


def residuals(one: Responses, other: Responses) -> tuple[float, float]:
    """What the best gates of two experts lose: free coefficients of deltas, and weights that sum to one.

    `sum_s E_s |sum_t alpha_t D_t x - D_s x|^2 / sum_s E_s |D_s x|^2` over both experts' runs, the mean over the
    matrices that both change; 0 where they share none.
    """
    pair, found = (one.own, other.own), []
    for name in one.squares:
        moments = np.stack([one.moments(name, pair), other.moments(name, pair)])  # [domains, 2, 2, out]
        if min(float(moments[s, s, s].sum()) for s in (0, 1)) > 0:
            found.append([_lost(moments, alpha) for alpha in (free(moments, RIDGE, PRIOR), convex(moments))])
    lost = np.mean(found, axis=0) if found else np.zeros(2)
    return float(lost[0]), float(lost[1])


def _lost(moments: Array, alpha: Array) -> float:
    """Of one matrix, with coefficients [2, out]."""
    lost, own = 0.0, 0.0
    for s in (0, 1):
        apart = alpha.copy()
        apart[s] -= 1
        lost += float(np.einsum("ti,tui,ui->", apart, moments[s], apart))
        own += float(moments[s, s, s].sum())
    return lost / own


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
        parts.append(f"their changes point the same way (cosine {cosine:.2f}): average them")
    return "; ".join(parts)


LARGE = 0.1  # of the base's norm: a change so large that something may have gone wrong
ALIKE = 0.5  # cosine from which two changes are largely one


def _disturbance(value: float) -> str:
    if value < 0.1:
        return f"they hardly disturb each other ({value:.2f})"
    if value < 1:
        return f"they disturb each other in part ({value:.2f})"
    return f"one moves the other's answers more than that one does itself ({value:.1f}): expect harm"
