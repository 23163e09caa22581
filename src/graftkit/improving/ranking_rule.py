"""What speaks for merging two experts, in numbers, and the two-factor rule.

For experts e, and tasks t that stand for the target, `p(e, t) = (score(e) - score(base)) / (score(best) - score(base))`
is an expert's proficiency: 0 the base, 1 the best of these experts (0 for all where none is better than the base).

    two_factor = weight C + (1 - weight) P

C: the compatibility (equation 14, normalised; the mean over the target's data sets, of a pair also over its models),
scaled to [0, 1] over the candidates that are ranked. P: the mean over tasks of p, of a pair on each task that of its
stronger expert there, cut to [0, 1]. The paper names the two factors and no formula; this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "proficiency": Predictor("higher", "the stronger expert's own score on each task: 0 the base, 1 the best of all"),
    "both": Predictor("higher", "the mean of the two experts' own scores"),
    "headroom": Predictor("higher", "what a merge that kept the stronger expert's score on every task would gain"),
    "interference": Predictor("lower", "how much each moves the other's answers, in units of that one's own moves"),
    "gate_residual": Predictor("lower", "share of the experts' moves that the best free gates of channels lose"),
    "convex_residual": Predictor("lower", "the same for the best gates that sum to one"),
    "similarity": Predictor("higher", "linear CKA of the two experts' activations on the target"),
    "cosine": Predictor("lower", "absolute cosine of the deltas"),
    "sign_conflict": Predictor("lower", "share of entries that both change, in opposite directions"),
    "overlap": Predictor("lower", "squared cosine of the principal angles of what both write to and read from"),
    "size": Predictor("lower", "norm of the larger delta, in units of the base's"),
}
"""All but `two_factor`, `proficiency`, `both` and `headroom` are there without scores."""


def default_predictor(tasks: int) -> str:
    """What orders pairs unless something is asked for; `docs/compatibility.md` says why."""
    return "headroom" if tasks > 1 else "both"


def proficiency(scores: Sequence[Sequence[float]], base: Sequence[float], better: Sequence[str]) -> Array:
    """`p(e, t)` [experts, tasks] from scores of that shape, the base's [tasks], and each task's better direction."""
    signs = np.array([1.0 if direction == "higher" else -1.0 for direction in better])
    gains = (np.asarray(scores, dtype=np.float64) - np.asarray(base)) * signs
    best = gains.max(axis=0)
    return np.where(best > 0, gains / np.where(best > 0, best, 1.0), 0.0)  # type: ignore[no-any-return]


def strength(*experts: Array) -> float:
    """The second factor of one expert or two, each [tasks]: the stronger one's score on each task, cut to [0, 1]."""
    return float(np.clip(np.max(experts, axis=0), 0, 1).mean())


def headroom(one: Array, other: Array, best: float | None = None) -> float:
    """What a merge of two experts, each [tasks], would gain if it kept the stronger one's score on every task: over the
    mean score `best` of the best expert of all, by default the better of the two."""
    alone = max(one.mean(), other.mean()) if best is None else best
    return float(np.maximum(one, other).mean() - alone)


def two_factor(compatibility: Sequence[float], own: Sequence[float], weight: float) -> list[float]:
    """The rule for candidates that are ranked together: their compatibilities, and their strengths."""
    found = np.asarray(compatibility, dtype=np.float64)
    span = found.max() - found.min()
    scaled = (found - found.min()) / span if span > 0 else np.full(len(found), 0.5)
    return [float(v) for v in weight * scaled + (1 - weight) * np.asarray(own, dtype=np.float64)]


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
