"""How the deltas of experts lie to each other, from their weights alone: no data, no run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from graftkit.errors import PlanError
from graftkit.execution.extraction import extract
from graftkit.measuring.inspection import inspect
from graftkit.measuring.loading import is_adapter
from graftkit.measuring.subspaces import subspaces

RANK = 8  # directions that a full model's delta is cut to, for its overlap with others


@dataclass(frozen=True)
class Weighed:
    """Of each model the norm of its delta in units of the base's; of each two, in the order of `combinations`, the
    cosine, the share of signs in conflict, and the overlap of directions (None where it is not defined)."""

    sizes: tuple[float | None, ...]
    cosines: tuple[float | None, ...]
    conflicts: tuple[float, ...]
    overlaps: tuple[float | None, ...]


def weigh(models: Sequence[str | Path], base: str | Path, workers: int = 1) -> Weighed:
    """Measures the deltas of models to a base.

    Overlap: mean over what both write to and read from of the squared cosines of principal angles; a full model counts
    with the best 8 directions of each matrix.
    """
    found = inspect(list(models), base, workers)
    totals = [pair.total for pair in found.pairs]
    return Weighed(
        sizes=tuple(change.total.relative for change in found.changes),
        cosines=tuple(total.cosine for total in totals),
        conflicts=tuple(total.conflicts for total in totals),
        overlaps=_overlaps(models, base, workers),
    )


def _overlaps(models: Sequence[str | Path], base: str | Path, workers: int) -> tuple[float | None, ...]:
    with tempfile.TemporaryDirectory(prefix="graft-directions-") as scratch:
        places = [_as_adapter(model, base, Path(scratch) / str(k), workers) for k, model in enumerate(models)]
        known = [place for place in places if place]
        pairs = subspaces(known, [str(k) for k, place in enumerate(places) if place]) if len(known) > 1 else ()
    found = {pair.models: pair.total for pair in pairs}
    totals = [found.get((str(one), str(other))) for one, other in combinations(range(len(models)), 2)]
    return tuple(None if total is None else (total.columns + total.rows) / 2 for total in totals)


def _as_adapter(model: str | Path, base: str | Path, out: Path, workers: int) -> str | None:
    """An adapter as it is, a full model's delta as one; None for a model without a delta that has directions."""
    if is_adapter(str(model)):
        return str(model)
    try:
        extract(base, model, out, rank=RANK, outside="drop", workers=workers)
    except PlanError:
        return None
    return str(out)
