"""What stands around a method: preparations (deltas to deltas, before it) and finishers (merged delta to merged delta).

Both are functions in the way of methods: positional parameters name what they read, keyword-only ones are knobs. A
preparation reads `deltas` [models, *shape] first, may read `rng` and the statistics of methods, and returns deltas of
that shape. A finisher reads `delta` [*shape] first, the merged delta, and returns one like it; it may read

    deltas    [models, *shape]  the models' deltas as they came, before any preparation
    norm      []                Euclidean norm of `delta`; float64
    norms     [models]          Euclidean norms of `deltas`; float64
    dots      [models, models]  inner products of `deltas`; float64

Statistics of a preparation are those of what the preparations before it left; a method's own are of what all left.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from graftkit.errors import RecipeError, unknown
from graftkit.methods import GRAINS, STATISTICS, F, Method, get, names
from graftkit.methods.knobs import knobs_of

if TYPE_CHECKING:
    from torch import Tensor

    from graftkit.methods.random import Keyed

__all__ = ["Part", "finisher", "finishers", "get_part", "preparation", "preparations", "run"]

Kind = Literal["preparation", "finisher"]

READS = {
    "preparation": ("deltas", "rng", *STATISTICS),
    "finisher": ("delta", "deltas", "norm", "norms", "dots"),
}
"""What each kind may read."""

Chosen = str | tuple[str, Mapping[str, Any]]
"""A preparation or finisher by name, with the values of its knobs."""


@dataclass(frozen=True)
class Part(Method):
    """A preparation or a finisher. `matrices`: it is only for matrices, embeddings and output embeddings left out."""

    kind: Kind = "preparation"
    matrices: bool = False

    def measured(self, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
        """The statistics that it reads, of whole tensors; they are always of `deltas`."""
        return super().measured({**given, "models": given["deltas"]}, knobs)


_REGISTRY: dict[tuple[str, str], Part] = {}


def preparation(*, source: str, grain: str, kernel: str | None = None) -> Callable[[F], F]:
    """Registers a function of deltas as a preparation, for a recipe's `prepare:`.

    As `method`. The `kernel` takes the flat deltas [models, n], what else is read, and the knobs; it works in place.
    """
    return _registering("preparation", source, grain, kernel, False)


def finisher(*, source: str, grain: str, matrices: bool = False) -> Callable[[F], F]:
    """Registers a function of the merged delta as a finisher, for a recipe's `finish:`."""
    return _registering("finisher", source, grain, None, matrices)


def _registering(kind: Kind, source: str, grain: str, kernel: str | None, matrices: bool) -> Callable[[F], F]:
    def register(function: F) -> F:
        name, parameters = function.__name__, inspect.signature(function).parameters.values()
        reads = tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)
        strange = [read for read in reads if read not in READS[kind]]
        if strange:
            raise TypeError(f"{kind} {name!r}: " + unknown("input", strange[0], READS[kind]))
        if not reads or reads[0] != READS[kind][0]:
            raise TypeError(f"{kind} {name!r} reads {list(reads)}; {READS[kind][0]!r} comes first")
        if grain not in GRAINS:
            raise TypeError(f"{kind} {name!r}: " + unknown("grain", grain, GRAINS))
        held = _REGISTRY.get((kind, name))
        if held and held.function.__module__ != function.__module__:
            raise TypeError(f"{kind} {name!r} is already registered by {held.function.__module__}")
        made = Part(name, function, reads, knobs_of(function), source, grain, kernel=kernel, kind=kind,
                    matrices=matrices)  # fmt: skip
        _REGISTRY[kind, name] = made
        return function

    return register


@lru_cache(maxsize=1)
def _load_all() -> None:
    """Imports the built-in parts, and the plug-ins of methods, which may bring parts along."""
    for theme in ("preparations", "finishing"):
        importlib.import_module(f"graftkit.methods.{theme}")
    names()


def preparations() -> list[str]:
    """The names of all preparations, sorted."""
    _load_all()
    return sorted(name for kind, name in _REGISTRY if kind == "preparation")


def finishers() -> list[str]:
    """The names of all finishers, sorted."""
    _load_all()
    return sorted(name for kind, name in _REGISTRY if kind == "finisher")


def get_part(kind: Kind, name: str) -> Part:
    """A preparation or a finisher by name. Raises RecipeError with the nearest name when there is none."""
    _load_all()
    if (kind, name) not in _REGISTRY:
        raise RecipeError(unknown(kind, name, preparations() if kind == "preparation" else finishers()))
    return _REGISTRY[kind, name]


def run(
    method: str,
    *,
    base: Tensor,
    models: Tensor,
    prepare: Sequence[Chosen] = (),
    finish: Sequence[Chosen] = (),
    rng: Keyed | None = None,
    **knobs: Any,
) -> Tensor:
    """Merges whole tensors as a recipe with `prepare:` and `finish:` does: the reference for what the engine does.

    `run("ties", base=base, models=models, prepare=[("dare", {"density": 0.5})], rng=Keyed.of(seed=0, models=2))`.
    The first of the preparations and the method that draws random numbers takes them from `rng`, the next from
    `rng.derived(1)`, and so on. Raises RecipeError as `Method.run`.
    """
    deltas, drawn, used = models - base, 0, get(method)
    if rng is None and any("rng" in part.reads for part in (used, *(_named("preparation", c)[0] for c in prepare))):
        raise RecipeError(f"{method} or a preparation draws random numbers: give rng=Keyed.of(seed=0, models=...)")
    for part, values in (_named("preparation", chosen) for chosen in prepare):
        given = {"deltas": deltas, "rng": rng.derived(drawn) if rng else None}
        given |= part.measured(given, values)
        deltas = part.function(*(given[read] for read in part.reads), **values)
        drawn += "rng" in part.reads
    values = used.settings(knobs)
    given = {"base": base, "deltas": deltas, "models": base + deltas if prepare else models}
    given |= {"rng": rng.derived(drawn) if rng else None} | used.measured(given, values)
    merged = used.function(*(given[read] for read in used.reads), **values)
    if not finish:
        return base + merged if used.returns_delta else merged  # type: ignore[no-any-return]
    return base + finished(merged if used.returns_delta else merged - base, models - base, finish)


def finished(delta: Tensor, deltas: Tensor, finish: Sequence[Chosen]) -> Tensor:
    """A merged delta [*shape] after finishers, one after another; `deltas` [models, *shape] are the models'."""
    for part, values in (_named("finisher", chosen) for chosen in finish):
        given: dict[str, Any] = {"delta": delta, "deltas": deltas, "norm": delta.detach().double().norm()}
        given |= part.measured(given, values)
        delta = part.function(*(given[read] for read in part.reads), **values)
    return delta


def _named(kind: Kind, chosen: Chosen) -> tuple[Part, dict[str, Any]]:
    name, knobs = (chosen, {}) if isinstance(chosen, str) else chosen
    part = get_part(kind, name)
    return part, part.settings(knobs)
