"""The mathematics of merging: methods as functions of tensors. Knows no files, and imports no torch by itself.

A method's positional parameters name what it reads, from a closed vocabulary:

    base      [*shape]          the common ancestor
    models    [models, *shape]  the tuned models
    deltas    [models, *shape]  tuned minus base
    rng                         keyed random numbers (`graftkit.methods.random.Keyed`)
    shape                       the tensor's own shape, also where `deltas` are cores of adapters (see `rotations`)
    threshold [models]          magnitude at or above which a share `density` of each model's delta lies
    norms     [models]          Euclidean norms of `deltas` if the method reads them, else of `models`; float64
    dots      [models, models]  inner products of the same
    band      [2, models]       smallest and largest magnitude of the share `density` below the share `outliers`
    overlap   [models]          entries changed by more than `epsilon` that others change too, per one changed alone
    variation [1]               deviation over models at or above which the share `select_topk` of positions lies
    energies  [models]          mean squares of the deltas, of which only these positions count; float64
    retained  [models]          share of its L1 norm that the method's sparsifier leaves of each delta; float64, and 1
                                unless the knobs ask to restore norms
    range     [2, models]       smallest and largest value; float64
    histogram [models, bins]    values in each of `bins` equal bins of a model's range (knob `last_bin`); float64
    distance  [models, out]     L1 distance of each output channel from the mean of the others' channels; float64
    signals   [models]          what the knob `global_signal` names: entropy, spectral norm, or zeros; float64
    gates     [models, out, in or 1]    values that a gates file holds for each output channel, or each element
    fisher    [models, *shape]  diagonal Fisher information of each weight, over its root mean square in the model
    gram      [models, in, in]  mean of `x x^T` over the inputs that a linear layer gets in each model's domain
    merged_gram [models, in, in]    the same of the inputs behind the merged layers before it, not the model's own
    core_gram [models, features, in]    rows whose squares make `gram` in a few directions; of others nothing is known

Its keyword-only parameters are knobs. A method that reads `deltas` and not `base` returns the merged delta; any other
returns weights. Block cutting, dtypes, files, adapters and devices are not its business.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any, TypeVar

from graftkit.errors import GraftError, RecipeError, unknown
from graftkit.methods.knobs import Knob, PerModel, Range, knobs_of

__all__ = ["INPUTS", "STATISTICS", "Method", "PerModel", "Range", "get", "method", "names"]

STATISTICS = (
    "threshold", "norms", "dots", "band", "overlap", "variation", "energies", "retained", "range", "histogram",
    "distance", "signals",
)  # fmt: skip
"""Reductions over a tensor (or over the model) that the engine makes just before a method runs."""

MEASURED = ("gram", "merged_gram", "core_gram", "fisher")
"""Statistics of examples of each model's domain, made by `graft statistics` and stored."""

INPUTS = ("base", "models", "deltas", "rng", "shape", "gates", *MEASURED, *STATISTICS)
"""What a method may read."""

BY_ROWS = ("gates", "distance")
"""What goes by output channel: a block has that of its own rows."""

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
    sparsifier: str | None = None
    factors: Callable[..., Any] | None = None
    ballot: Callable[..., Any] | None = None
    masks: Callable[..., Any] | None = None
    gates: tuple[str, ...] = ()
    lookups: Mapping[str, Any] = field(default_factory=dict)
    matrices: bool = False
    entrywise: Mapping[str, Any] = field(default_factory=dict)
    shares: Callable[..., Any] | None = None
    halves: Callable[..., Any] | None = None

    @property
    def compiled(self) -> bool:
        """Whether it runs on numpy arrays, compiled, so that a merge by it needs no torch."""
        return self.kernel is not None or self.factors is not None

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

    @property
    def measured_with_examples(self) -> tuple[str, ...]:
        """The statistics of examples that it reads, in order."""
        return tuple(name for name in self.reads if name in MEASURED)

    def scope(self, knobs: Mapping[str, Any]) -> str:
        """Over what its statistics are taken: `tensor`, or `model` where its knob `scope` says so."""
        return str(knobs.get("scope", "tensor"))

    def commutes(self, knobs: Mapping[str, Any]) -> str | None:
        """With which rotations of a matrix it commutes: `both`, `output` or none."""
        entrywise = any(knobs.get(name) == value for name, value in self.entrywise.items())
        return None if entrywise else self.rotations

    def restores_norms(self, knobs: Mapping[str, Any]) -> bool:
        """Whether sparse deltas are scaled to the L1 norms that they had."""
        return self.sparsifier is not None and bool(knobs["rescale"]) and knobs.get("rescale_by", "l1") == "l1"

    def sparse(self, given: Mapping[str, Any], knobs: Mapping[str, Any], *, compiled: bool = False) -> Any:
        """The deltas as its sparsifier leaves them, not rescaled; its compiled twin works in place, on flat ones."""
        from graftkit.methods.composition import get_part

        part = get_part("preparation", str(self.sparsifier))
        chosen = {name: knobs[name] for name in part.knobs} | ({"rescale": False} if "rescale" in part.knobs else {})
        inputs = [given[name] for name in part.reads]
        if not compiled or not part.kernel:
            return part.function(*inputs, **chosen)
        kernel_of(part.kernel)(*inputs, **chosen)
        return inputs[0]

    def factors_of(self, given: Mapping[str, Any], knobs: Mapping[str, Any], count: int) -> Any:
        """For a weighted sum of what it reads: the factors, float64 [models]."""
        assert self.factors is not None
        return _numbers(self.factors, given, knobs, count)

    def ballot_of(self, given: Mapping[str, Any], knobs: Mapping[str, Any], count: int) -> Any:
        """For a method that thins deltas out and votes on them: its `methods.ballots.Ballot`."""
        assert self.ballot is not None
        return _numbers(self.ballot, given, knobs, count)

    def shares_of(self, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> Any:
        """For a sum whose weights go by channel: the weight of each model's delta, [models, out, in or 1]."""
        assert self.shares is not None
        values = {**knobs, **given}
        return self.shares(**{name: values[name] for name in inspect.signature(self.shares).parameters})

    def merged_halves(self, a: Any, b: Any, roots: Any, knobs: Mapping[str, Any]) -> Any:
        """For a merge of adapters' factors A [models, rank, in] and B [models, out, rank] together: the merged two.

        `roots`: what each A, and each B, is to be multiplied by, [models] each.
        """
        assert self.halves is not None
        wanted = list(inspect.signature(self.halves).parameters)[3:]
        return self.halves(a, b, roots, **{name: knobs[name] for name in wanted})

    def masked(self, deltas: Any, merged: Any, knobs: Mapping[str, Any]) -> Any:
        """The models' masks, of a method that has some."""
        assert self.masks is not None
        wanted = list(inspect.signature(self.masks).parameters)[2:]
        return self.masks(deltas, merged, **{name: knobs[name] for name in wanted})

    def run(self, *, base: Any = None, models: Any = None, rng: Any = None, gates: Any = None, **knobs: Any) -> Any:
        """Merges whole tensors in memory: `base` [*shape], `models` [models, *shape]; returns the merged weights.

        `gates` [models, out] or [models, out, in], for a method that reads them; in the same way, beside the knobs,
        `gram`, `core_gram` and `fisher`, as above.

        The reference for everything that the engine does in blocks. A knob may be a tensor, to take gradients by it.
        Raises RecipeError for a knob that does not exist or is out of its range, and for inputs that are missing.
        """
        examples = {name: knobs.pop(name) for name in self.measured_with_examples if knobs.get(name) is not None}
        values = self.settings(knobs)
        fewest, most = self.model_count
        if not fewest <= len(models) <= (most or len(models)):
            wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
            raise RecipeError(f"{self.name} takes {wanted} models, got {len(models)}")
        if self.needs_base and base is None:
            raise RecipeError(f"{self.name} works on deltas: it needs a base")
        if "rng" in self.reads and rng is None:
            raise RecipeError(f"{self.name} draws random numbers: give rng=Keyed.of(seed=0, models={len(models)})")
        lacking = next((name for name in self.measured_with_examples if name not in examples), None)
        if lacking:
            raise RecipeError(f"{self.name} reads what is measured with examples: give {lacking}=[models, ...]")
        product = values.get("of") == "product"
        if product and "models" in self.reads and base is None:
            raise RecipeError(f"{self.name} with `of: product` looks at deltas: it needs a base")
        deltas = (models if base is None else models - base) if self.uses_base or product else None
        given = {"base": base, "models": models, "deltas": deltas, "rng": rng, "shape": tuple(models.shape[1:])}
        given |= {"gates": self._gates_of(gates, models, values), **examples}
        given |= self.measured(given, values)
        result = self.function(*(given[name] for name in self.reads), **values)
        return base + result if self.returns_delta and base is not None else result

    def measured(self, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
        """The statistics that it reads, of whole tensors: of `deltas` where it reads them, else of `models`."""
        from graftkit.methods import parts

        stack = given["deltas" if "deltas" in self.reads or knobs.get("of") == "product" else "models"]
        plain = [name for name in self.statistics if name != "retained"]
        found = {n: parts.statistic(n, given["deltas"] if n == "threshold" else stack, knobs) for n in plain}
        if "retained" in self.statistics:
            left = self.sparse({**given, **found}, knobs) if self.restores_norms(knobs) else stack
            found["retained"] = parts.retained_of(stack, left)
        return found

    def reads_gates(self, knobs: Mapping[str, Any], dimensions: int) -> bool:
        """Whether it wants gates for a tensor: it reads some, its knobs say so, and the tensor has channels."""
        return "gates" in self.reads and knobs.get("local_signal") != "none" and dimensions > 1

    def _gates_of(self, gates: Any, models: Any, knobs: Mapping[str, Any]) -> Any:
        """Gates in the shape in which a method sees them; equal ones where it wants none."""
        if not self.reads_gates(knobs, models.ndim - 1):
            return models.detach().new_full((len(models), 1, 1), 1 / len(models)).double()
        if gates is None:
            raise RecipeError(f"{self.name} reads gates: give gates=[models, out], or local_signal='none'")
        if tuple(gates.shape[:2]) != tuple(models.shape[:2]):
            raise RecipeError(
                f"{self.name}: gates of shape {tuple(gates.shape)} for models of shape {tuple(models.shape)}; "
                "they are [models, out] or [models, out, in]"
            )
        return gates.reshape(*gates.shape[:2], -1) if gates.ndim > 2 else gates[..., None]

    def settings(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """The values of all its knobs: the given ones, checked (tensors and arrays as they are), else defaults."""
        for name in knobs:
            if name not in self.knobs:
                raise RecipeError(unknown(f"knob of {self.name}", name, self.knobs))
        arrays = {name: value for name, value in knobs.items() if hasattr(value, "__array__")}
        checked = {n: self.knobs[n].check(v, f"{self.name}: {n}") for n, v in knobs.items() if n not in arrays}
        return {name: knob.default for name, knob in self.knobs.items()} | checked | arrays


def _numbers(function: Callable[..., Any], given: Mapping[str, Any], knobs: Mapping[str, Any], count: int) -> Any:
    """Calls a function with what it names: the `count` of models, knobs, and inputs."""
    wanted = parameters_of(function)
    values = {"count": count, **knobs, **{name: given[name] for name in wanted if name in INPUTS}}
    return function(**{name: values[name] for name in wanted})


@lru_cache
def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """What a function takes, by name."""
    return tuple(inspect.signature(function).parameters)


_REGISTRY: dict[str, Method] = {}


@lru_cache
def kernel_of(name: str) -> Callable[..., None]:
    """The compiled twin named `module:function`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def method(
    *,
    source: str,
    grain: str,
    rotations: str | None = None,
    ordered: bool = False,
    model_count: tuple[int, int | None] = (1, None),
    base_optional: bool = False,
    kernel: str | None = None,
    sparsifier: str | None = None,
    factors: Callable[..., Any] | None = None,
    ballot: Callable[..., Any] | None = None,
    masks: Callable[..., Any] | None = None,
    matrices: bool = False,
    entrywise: Mapping[str, Any] | None = None,
    gates: tuple[str, ...] = (),
    lookups: Mapping[str, Any] | None = None,
    shares: Callable[..., Any] | None = None,
    halves: Callable[..., Any] | None = None,
) -> Callable[[F], F]:
    """Registers a function as a method; the function itself is returned unchanged.

    `source`: the paper. `grain`: how the engine may cut, `element`, `row` or `tensor`. `rotations`: `both` or
    `output` where it commutes with rotations, save with a value of a knob in `entrywise`. `ordered`: permuting models
    changes the meaning. `model_count`: fewest and most models. `base_optional`: it reads `deltas`, and without a base
    the models themselves. `kernel`:
    `module:function`, a twin on numpy arrays for the hot path (see `methods/kernels.py`). `sparsifier`: for a method
    that reads `retained`, the preparation that makes deltas sparse as it does, with knobs of the same names.
    `factors`: where the result is a weighted sum of the tensors, what gives the factors [models] in float64 from their
    `count`, statistics (numpy arrays) and knobs, by name; the engine then needs nothing else of the method.
    `ballot`: where it thins deltas out and adds up the rest, or what agrees with an elected sign, what gives its
    numbers (`methods.ballots.Ballot`) in the same way, for merges of bfloat16 tensors in one pass.
    `masks`: for a unified model with a bit mask for each of the models, what gives these, [models, *shape], from
    `deltas`, the `merged` delta, and knobs, by name; a knob `rescale` says over what masked deltas are scaled to the
    L1 norms of the models' (`model`, `means` of its tensors, `tensor` or `none`).
    `matrices`: it is for matrices of linear layers, and has the knobs `weight` and `scale`; every other tensor (norms,
    biases, embeddings, output embeddings) gets `scale` times the weighted mean of the deltas from the engine.
    `gates`: for a method that reads them, the kinds of gates that it takes. `lookups`: values of knobs for embeddings
    and heads, whose rows are looked up, where no rule says otherwise. `shares`: where the merged delta is a sum of the
    models' deltas with weights by channel or entry, what gives these [models, out, in or 1] from `signals`, `gates` and
    knobs, by name. `halves`: where it has a knob `of` and merges adapters' factors together, what gives the merged A
    and B from all A [models, rank, in], all B [models, out, rank], what these are to be multiplied by, and knobs.
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
            sparsifier,
            factors,
            ballot,
            masks,
            gates,
            lookups or {},
            matrices,
            entrywise or {},
            shares,
            halves,
        )
        return function

    return register


@lru_cache(maxsize=1)
def _load_all() -> None:
    """Imports the built-in methods and every module registered under the entry point `graftkit.methods`."""
    for theme in ("averages", "spheres", "arithmetic", "sparse", "masks", "competition", "unified", "factors", "graft",
                  "spectral", "wudi", "curvature"):  # fmt: skip
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
