"""What an inspection finds, and how it follows from sums over tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from graftkit.recipes import layout

Sums = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Weights:
    """What a model's tensors hold; an adapter's factors count as the delta that they stand for.

    `norm`: Frobenius. `entropy`: in nats, of a histogram of 10 equal bins from the smallest to the largest entry, the
    last bin closed; 0 for a constant, at most ln 10; over several tensors the mean, weighted by their entries. `zeros`:
    share of entries that are exactly zero.
    """

    elements: int
    norm: float
    entropy: float
    zeros: float


@dataclass(frozen=True)
class Change:
    """A model's delta, tuned minus base.

    `norm`: Frobenius. `relative`: |delta| / |base|, None where the base is zero and the delta is not. `unchanged`:
    share of entries whose delta is exactly zero.
    """

    elements: int
    norm: float
    relative: float | None
    unchanged: float


@dataclass(frozen=True)
class Pair:
    """Two models' deltas, or weights, beside each other.

    `cosine`: None where one is zero. `distance`: norm of the difference. `equal`: share of entries that are equal;
    `shared`: that are non-zero in both; `conflicts`: share of those shared whose signs differ.
    """

    elements: int
    cosine: float | None
    distance: float
    equal: float
    shared: float
    conflicts: float


Measure = TypeVar("Measure", Weights, Change, Pair)


@dataclass(frozen=True)
class Breakdown(Generic[Measure]):
    """A measure of one model, or of a pair: in total, by role, by layer, and by tensor."""

    models: tuple[str, ...]
    total: Measure
    roles: Mapping[str, Measure]
    layers: Mapping[int, Measure]
    tensors: Mapping[str, Measure]


@dataclass(frozen=True)
class AdapterFacts:
    """How an adapter was made: the base that it records, the ranks and scales that occur, and what it changes."""

    base: str
    ranks: tuple[int, ...]
    alpha: float | None
    scales: tuple[float, ...]
    targets: tuple[str, ...]
    modules: int
    whole_tensors: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What the headers of a model say; `dtypes` are parameters by dtype."""

    name: str
    source: str
    directory: str
    kind: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    adapter: AdapterFacts | None = None


@dataclass(frozen=True)
class NonFinite:
    """A tensor that holds NaN or infinity, and how many of each. A merge refuses its model."""

    model: str
    tensor: str
    nan: int
    infinite: int


@dataclass(frozen=True)
class Inspection:
    """What was found: for each model its `changes` with a base, its `weights` without one; and `pairs` of any two, of
    their deltas where `compared` says so (there is a base, or all are adapters), else of their weights."""

    models: tuple[Facts, ...]
    base: Facts | None
    compared: str
    weights: tuple[Breakdown[Weights], ...]
    changes: tuple[Breakdown[Change], ...]
    pairs: tuple[Breakdown[Pair], ...]
    non_finite: tuple[NonFinite, ...]
    notes: tuple[str, ...]

    def to_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """For JSON; without `tensors`, totals, roles and layers only."""
        told = asdict(self)
        for found in () if tensors else (*told["weights"], *told["changes"], *told["pairs"]):
            del found["tensors"]
        return told


def breakdown(models: tuple[str, ...], kind: Callable[..., Measure], sums: Sums) -> Breakdown[Measure]:
    """Adds up the sums of each group of tensors, and tells what follows from them."""
    roles: dict[str, Any] = {}
    layers: dict[int, Any] = {}
    for name, found in sums.items():
        role, number = layout.role(name), layout.layer(name)
        roles[role] = roles.get(role, 0) + found
        if number is not None:
            layers[number] = layers.get(number, 0) + found
    return Breakdown(
        models,
        kind(*sum(roles.values())),
        {role: kind(*found) for role, found in roles.items()},
        {number: kind(*layers[number]) for number in sorted(layers)},
        {name: kind(*found) for name, found in sums.items()},
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def weights_of(elements: float, squares: float, zero: float, entropies: float) -> Weights:
    """From sums over entries: how many, their squares, how many are zero, entropies times entries."""
    return Weights(int(elements), math.sqrt(squares), _share(entropies, elements), _share(zero, elements))


def change_of(elements: float, squares: float, base: float, same: float) -> Change:
    """From sums over entries: how many, the delta's squares, the base's squares, how many are unchanged."""
    relative = math.sqrt(squares / base) if base else None if squares else 0.0
    return Change(int(elements), math.sqrt(squares), relative, _share(same, elements))


def pair_of(elements: float, dot: float, left: float, right: float, apart: float, *counts: float) -> Pair:
    """From sums over entries: how many, products, squares of both and of their difference; counts of equal ones, of
    those that are non-zero in both, and of those whose signs differ."""
    alike, both, opposed = counts
    scale = math.sqrt(left) * math.sqrt(right)
    cosine = max(-1.0, min(1.0, float(dot / scale))) if scale else None
    shares = _share(alike, elements), _share(both, elements), _share(opposed, both)
    return Pair(int(elements), cosine, math.sqrt(apart), *shares)
