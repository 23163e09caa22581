"""The mathematics of merging: methods as functions of tensors. Knows no files, and imports no torch by itself.

A method's positional parameters name what it reads, from a closed vocabulary:

    base      [*shape]          the common ancestor
    models    [models, *shape]  the tuned models
    deltas    [models, *shape]  tuned minus base
    rng                         keyed random numbers (`graftkit.methods.random.Keyed`)
    threshold [models]          magnitude at or above which a share `density` of each model's delta lies
    norms     [models]          Euclidean norms of `deltas` if the method reads them, else of `models`; float64
    dots      [models, models]  inner products of the same
    band      [2, models]       smallest and largest magnitude of the share `density` below the share `outliers`
    overlap   [models]          entries changed by more than `epsilon` that others change too, per one changed alone
    variation [1]               deviation over models at or above which the share `select_topk` of positions lies
    energies  [models]          sums of squares of the deltas at these positions; float64

Its keyword-only parameters are knobs. A method that reads `deltas` and not `base` returns the merged delta; any other
returns weights. Block cutting, dtypes, files, adapters and devices are not its business.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any, TypeVar

from graftkit.errors import GraftError, RecipeError, unknown
from graftkit.methods.knobs import Knob, PerModel, Range, knobs_of

__all__ = ["INPUTS", "STATISTICS", "Method", "PerModel", "Range", "get", "method", "names"]

STATISTICS = ("threshold", "norms", "dots", "band", "overlap", "variation", "energies")
"""Reductions over a tensor (or over the model) that the engine makes just before a method runs."""

INPUTS = ("base", "models", "deltas", "rng", *STATISTICS)
"""What a method may read."""

GRAINS = ("element", "row", "tensor")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A registered method. Call `function` with plain tensors, or `run` to have statistics made on the way."""

    name: str
    function: Callable[..., Any]
    reads: tuple[str, ...]
    knobs: Mapping[str, Knob]
    source: str
    grain: str
    rotations: str | None = None
    ordered: bool = False
    model_count: tuple[int, int | None] = (1, None)
    base_optional: bool = False
    kernel: str | None = None

    @property
    def uses_base(self) -> bool:
        """Whether it works with the models' base where the recipe names one."""
        return "base" in self.reads or "deltas" in self.reads

    @property
    def needs_base(self) -> bool:
        """Whether a recipe must name a base."""
        return self.uses_base and not self.base_optional

    @property
    def returns_delta(self) -> bool:
        """Whether the result is a delta, to which the engine adds the base."""
        return "deltas" in self.reads and "base" not in self.reads

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics that it reads, in order."""
        return tuple(name for name in self.reads if name in STATISTICS)

    def scope(self, knobs: Mapping[str, Any]) -> str:
        """Over what its statistics are taken: `tensor`, or `model` where its knob `scope` says so."""
        return str(knobs.get("scope", "tensor"))

    def run(self, *, base: Any = None, models: Any = None, rng: Any = None, **knobs: Any) -> Any:
        """Merges whole tensors in memory: `base` [*shape], `models` [models, *shape]; returns the merged weights.

        The reference for everything that the engine does in blocks. A knob may be a tensor, to take gradients by it.
        Raises RecipeError for a knob that does not exist or is out of its range, and for inputs that are missing.
        """
        values = {name: knob.default for name, knob in self.knobs.items()} | self._checked(knobs)
        fewest, most = self.model_count
        if not fewest <= len(models) <= (most or len(models)):
            wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
            raise RecipeError(f"{self.name} takes {wanted} models, got {len(models)}")
        if self.needs_base and base is None:
            raise RecipeError(f"{self.name} works on deltas: it needs a base")
        if "rng" in self.reads and rng is None:
            raise RecipeError(f"{self.name} draws random numbers: give rng=Keyed.of(seed=0, models={len(models)})")
        deltas = (models if base is None else models - base) if self.uses_base else None
        given = {"base": base, "models": models, "deltas": deltas, "rng": rng}
        given |= self.measured(given, values)
        result = self.function(*(given[name] for name in self.reads), **values)
        return base + result if self.returns_delta and base is not None else result

    def measured(self, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
        """The statistics that it reads, of whole tensors: of `deltas` where it reads them, else of `models`."""
        from graftkit.methods import parts

        stack = given["deltas" if "deltas" in self.reads else "models"]
        return {n: parts.statistic(n, given["deltas"] if n == "threshold" else stack, knobs) for n in self.statistics}

    def _checked(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """The values of knobs, validated; tensors and arrays are taken as they are."""
        for name in knobs:
            if name not in self.knobs:
                raise RecipeError(unknown(f"knob of {self.name}", name, self.knobs))
        arrays = {name: value for name, value in knobs.items() if hasattr(value, "__array__")}
        return {n: self.knobs[n].check(v, f"{self.name}: {n}") for n, v in knobs.items() if n not in arrays} | arrays


_REGISTRY: dict[str, Method] = {}


def method(
    *,
    source: str,
    grain: str,
    rotations: str | None = None,
    ordered: bool = False,
    model_count: tuple[int, int | None] = (1, None),
    base_optional: bool = False,
    kernel: str | None = None,
) -> Callable[[F], F]:
    """Registers a function as a method; the function itself is returned unchanged.

    `source`: the paper. `grain`: how the engine may cut, `element`, `row` or `tensor`. `rotations`: `both` or
    `output` where it commutes with rotations. `ordered`: permuting models changes the meaning. `model_count`: fewest
    and most models. `base_optional`: it reads `deltas`, and without a base the models themselves. `kernel`:
    `module:function`, a twin on numpy arrays for the hot path (see `methods/kernels.py`).
    """

    def register(function: F) -> F:
        name = function.__name__
        parameters = inspect.signature(function).parameters.values()
        reads = tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)
        strange = [n for n in reads if n not in INPUTS]
        if strange:
            raise TypeError(f"method {name!r}: " + unknown("input", strange[0], INPUTS))
        if grain not in GRAINS:
            raise TypeError(f"method {name!r}: " + unknown("grain", grain, GRAINS))
        if name in _REGISTRY and _REGISTRY[name].function.__module__ != function.__module__:
            raise TypeError(f"method {name!r} is already registered by {_REGISTRY[name].function.__module__}")
        _REGISTRY[name] = Method(
            name,
            function,
            reads,
            knobs_of(function),
            source,
            grain,
            rotations,
            ordered,
            model_count,
            base_optional,
            kernel,
        )
        return function

    return register


@lru_cache(maxsize=1)
def _load_all() -> None:
    """Imports the built-in methods and every module registered under the entry point `graftkit.methods`."""
    for theme in ("averages", "spheres", "arithmetic", "sparse", "masks", "competition"):
        importlib.import_module(f"graftkit.methods.{theme}")
    for entry in metadata.entry_points(group="graftkit.methods"):
        try:
            entry.load()
        except (ImportError, AttributeError, TypeError) as error:
            raise GraftError(f"the plug-in {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error


def names() -> list[str]:
    """The names of all registered methods, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def get(name: str) -> Method:
    """The method of that name. Raises RecipeError with the nearest name when there is none."""
    _load_all()
    if name not in _REGISTRY:
        raise RecipeError(unknown("method", name, _REGISTRY))
    return _REGISTRY[name]
