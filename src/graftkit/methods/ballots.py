"""What TIES, DARE and their kin do with deltas, in numbers: entries are thinned out, elect a sign, and are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Ballot:
    """A method's numbers, arrays of one for each model; the engine does the rest, in one pass in float64.

    limits: entries of a smaller magnitude are left out; 0 for none.
    shares: the chance of each entry to be kept.
    gains: the factor on what is kept.
    votes: factors in the sum whose sign is elected; None where all entries are added up instead.
    weights: factors in the combination, `mean` or sum.
    scale: the factor on the merged delta.
    """

    limits: np.ndarray
    shares: np.ndarray
    gains: np.ndarray
    votes: np.ndarray | None
    weights: np.ndarray
    mean: bool
    scale: float
