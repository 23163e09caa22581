"""How two adapters lie to each other: the directions that they write to and read from, before anything is merged.

An adapter's delta `B A` writes to the column space of B and reads from the row space of A. Where two adapters share
neither, their sum does to each input what each would do alone; where they share both, they interfere or agree. Measured
on the factors: no delta is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.resolve import directory_of, open_source
from graftkit.errors import PlanError
from graftkit.execution.factoring import core_of
from graftkit.recipes import layout

BENIGN = 0.1  # share of a delta inside the other's directions below which their sum keeps nearly all of both
READ = 0.5  # share of common directions read from which each delta acts on the other's inputs
ALIGNED = 0.5  # cosine from which two deltas do largely the same, or the opposite


@dataclass(frozen=True)
class Overlap:
    """One or several modules of two adapters.

    `columns` and `rows`: mean squared cosine of the principal angles between what the two write to, and read from; 1
    where the smaller space lies in the larger. `chance`: what random spaces of these ranks would give for both in turn.
    `inside`: the share of each delta's energy that lies in the other's columns and rows. `norms` are the deltas'. Of
    several modules, `columns`, `rows` and `chance` are means weighted by the product of the norms.
    """

    modules: int
    columns: float
    rows: float
    chance: tuple[float, float]
    inside: tuple[float, float]
    cosine: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Subspaces:
    """Two adapters, compared where both adapt a module: in all, by role and by module; and what only one adapts."""

    models: tuple[str, str]
    total: Overlap | None
    roles: Mapping[str, Overlap]
    modules: Mapping[str, Overlap]
    alone: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One sentence: whether adding the two is likely to be benign. Rules of thumb, on the adapters as a whole."""
        one, other = self.models
        if self.total is None:
            return f"{one} and {other} adapt no module in common: adding them is benign"
        cosine, most = self.total.cosine, max(self.total.inside)
        told = f"cosine {cosine:.3f}; {most:.1%} of a change lies in the directions of the other"
        if abs(cosine) >= ALIGNED:
            what = "do largely the same: average them" if cosine > 0 else "undo each other: adding them cancels both"
            return f"{one} and {other} {what} ({told})"
        if most < BENIGN and self.total.rows >= READ:
            return (
                f"{one} and {other} write to different directions but read the same ({self.total.rows:.0%} of them): "
                f"each acts on what the other is for: search for weights, or take core_regmean ({told})"
            )
        if most < BENIGN:
            return f"{one} and {other} use different directions: adding them is likely to be benign ({told})"
        return (
            f"{one} and {other} share directions and differ in them: expect interference, search for weights ({told})"
        )


def subspaces(models: Sequence[str | Path], names: Sequence[str] | None = None) -> tuple[Subspaces, ...]:
    """Every two of some adapters (directories or hub ids), called by `names`, else by the ends of their paths.

    Raises PlanError for what is no plain LoRA adapter.
    """
    opened = [open_source(directory_of(str(model), Path())) for model in models]
    for model, source in zip(models, opened, strict=True):
        if not isinstance(source, Adapter) or any(factors.magnitude for factors in source.factors.values()):
            raise PlanError(f"{model}: is no plain LoRA adapter, so it has no low-rank directions to compare")
    called = names or [Path(model).name for model in models]
    pairs = combinations(zip(called, opened, strict=True), 2)
    return tuple(_pair((a, b), one, other) for (a, one), (b, other) in pairs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Sums:
    """What overlaps of several modules are made from."""

    columns: float
    rows: float
    chance: tuple[float, float]
    inside: tuple[float, float]
    dot: float
    norms: tuple[float, float]


def _pair(models: tuple[str, str], one: Adapter, other: Adapter) -> Subspaces:
    both = [name for name in one.factors if name in other.factors]
    for name in both:
        if one.factors[name].shape != other.factors[name].shape:
            raise PlanError(f"{' and '.join(models)}: {name!r} has different shapes; are they of one base?")
    sums = {name: _module(one, other, name) for name in both}
    roles = list(dict.fromkeys(layout.role(name) for name in both))
    return Subspaces(
        models,
        _joined(sums.values()) if both else None,
        {role: _joined(found for name, found in sums.items() if layout.role(name) == role) for role in roles},
        {name: _joined([found]) for name, found in sums.items()},
        (len(one.factors) - len(both), len(other.factors) - len(both)),
    )


def _module(one: Adapter, other: Adapter, name: str) -> _Sums:
    """One module of both adapters, in the frames that hold both."""
    pairs = [(low_rank.left, low_rank.right) for low_rank in (a.load(name, np.float64) for a in (one, other))]
    cores = core_of(pairs).cores
    spaces = [np.linalg.svd(core) for core in cores]
    ranks = [int((s > 1e-12 * max(s[0], 1e-300)).sum()) for _, s, _ in spaces]
    writes = [u[:, :rank] for (u, _, _), rank in zip(spaces, ranks, strict=True)]
    reads = [vt[:rank].T for (_, _, vt), rank in zip(spaces, ranks, strict=True)]
    shape, least = one.factors[name].shape, max(min(ranks), 1)
    norms = [float(np.linalg.norm(core)) for core in cores]
    projected = [writes[1].T @ cores[0] @ reads[1], writes[0].T @ cores[1] @ reads[0]]
    return _Sums(
        columns=float(np.linalg.norm(writes[0].T @ writes[1]) ** 2) / least,
        rows=float(np.linalg.norm(reads[0].T @ reads[1]) ** 2) / least,
        chance=(min(max(ranks) / shape[0], 1.0), min(max(ranks) / shape[1], 1.0)),
        inside=(float(np.linalg.norm(projected[0]) ** 2), float(np.linalg.norm(projected[1]) ** 2)),
        dot=float(np.vdot(cores[0], cores[1])),
        norms=(norms[0], norms[1]),
    )


def _joined(modules: Iterable[_Sums]) -> Overlap:
    """Several modules as one vector; the means weighted by the product of their norms."""
    held = list(modules)
    weights = np.array([found.norms[0] * found.norms[1] for found in held])
    share = weights / weights.sum() if weights.sum() else np.full(len(held), 1 / len(held))
    norms = [math.hypot(*(found.norms[k] for found in held)) for k in (0, 1)]

    def mean(value: Callable[[_Sums], float]) -> float:
        return float(sum(w * value(found) for w, found in zip(share, held, strict=True)))

    inside = [sum(found.inside[k] for found in held) / norms[k] ** 2 if norms[k] else 0.0 for k in (0, 1)]
    return Overlap(
        modules=len(held),
        columns=mean(lambda found: found.columns),
        rows=mean(lambda found: found.rows),
        chance=(mean(lambda found: found.chance[0]), mean(lambda found: found.chance[1])),
        inside=(inside[0], inside[1]),
        cosine=sum(found.dot for found in held) / (norms[0] * norms[1]) if norms[0] * norms[1] else 0.0,
        norms=(norms[0], norms[1]),
    )
