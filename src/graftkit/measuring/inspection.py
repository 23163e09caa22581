"""What models hold, and how they lie to each other: norms, entropies, deltas, cosines and sign conflicts.

Read in blocks, each once for all that is compared on it, so memory depends on the block and not on the model; an
adapter's delta is formed block by block from its factors. NaN and infinity are named, and left out of every sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numba import njit

from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.checkpoints.headers import FLOATING, TensorInfo
from graftkit.checkpoints.resolve import Source, directory_of, open_source
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.execution.blocks import Workspace
from graftkit.execution.local import Progress
from graftkit.measuring.loading import model_names
from graftkit.recipes import layout
from graftkit.recipes.plan import BLOCK

BINS = 10  # of the histogram whose entropy is told
T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]
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


def inspect(
    models: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    *,
    allow_pickle: bool = False,
) -> Inspection:
    """Measures models (directories or hub ids): alone, against a base, and against each other.

    Without a base: norms, entropies and zeros of each model, and for any two cosine, distance and sign conflicts of
    their weights (of their deltas, where all are adapters). With a base: the delta of each model, and the same
    comparison of deltas. Entries and deltas are float32 (float64 where an input is), sums float64 over fixed blocks:
    `workers` threads change no number. `progress` is told of entries.

    NaN and infinity are reported, not refused. Raises PlanError where models do not fit each other, CheckpointError for
    what cannot be read.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    if not given:
        raise PlanError("inspect: no model given")
    named = zip(given, model_names(given), strict=True)
    opened = tuple(_open(str(one), name, "model", allow_pickle) for one, name in named)
    stem = None if base is None else _open(str(base), Path(base).name, "base", allow_pickle)
    try:
        return _inspect(_Run(opened, stem, workers, progress))
    finally:
        for model in (*opened, *([stem] if stem else [])):
            model.source.close()


def _inspect(run: _Run) -> Inspection:
    weights = () if run.base else tuple(_weigh(run, model) for model in run.models)
    changes, pairs = _compare(run) if run.base or len(run.models) > 1 else ((), ())
    low_rank = all(isinstance(model.source, Adapter) for model in run.models)
    return Inspection(
        models=tuple(_facts(model) for model in run.models),
        base=_facts(run.base) if run.base else None,
        compared="deltas" if run.base or low_rank else "weights",
        weights=weights,
        changes=changes,
        pairs=pairs,
        non_finite=run.non_finite(),
        notes=_notes(run),
    )


@dataclass(frozen=True)
class _Part:
    """One model's share in a tensor: a tensor on disk, a low-rank delta, or neither (left alone by an adapter)."""

    label: str
    name: str = ""
    store: Checkpoint | None = None
    info: TensorInfo | None = None
    delta: LowRank | None = None

    @property
    def dtype(self) -> Any:
        """What to compute in."""
        return np.float64 if self.info is not None and self.info.dtype == "F64" else np.float32

    def fill(self, start: int, stop: int, space: Workspace, out: np.ndarray) -> None:
        """Entries `[start, stop)` into `out`."""
        if self.store is not None and self.info is not None:
            raw = self.store.read(self.info, start, stop, space.take("raw", (stop - start) * 8, np.uint8))
            storage.widen(raw, self.info.dtype, out)
        else:
            out[:] = 0 if self.delta is None else self.delta.block(start, stop)


@dataclass(frozen=True)
class _Opened:
    """A model, as it was given and as it is called."""

    given: str
    name: str
    label: str
    source: Source

    def shapes(self) -> Shapes:
        """The floating-point tensors; an adapter's factors by the weights that they change."""
        low_rank = self.source.factors if isinstance(self.source, Adapter) else {}
        held = {name: info.shape for name, info in self.source.tensors.items() if info.dtype in FLOATING}
        return {name: factors.shape for name, factors in low_rank.items()} | held

    def part(self, name: str | None) -> _Part:
        """Its share in a tensor, by its own name of it."""
        source = self.source
        if name is None:
            return _Part(self.label)
        if name in source.tensors:
            store = source.store if isinstance(source, Adapter) else source
            return _Part(self.label, name, store, source.tensors[name])
        assert isinstance(source, Adapter)
        return _Part(self.label, name, delta=source.load(name, np.float32))


def _open(given: str, name: str, role: str, allow_pickle: bool) -> _Opened:
    source = open_source(directory_of(given, Path()), allow_pickle=allow_pickle)
    return _Opened(given, name, f"{role} {name!r}", source)


@dataclass
class _Run:
    """One inspection under way; `broken` counts NaN and infinities by model, tensor and block."""

    models: tuple[_Opened, ...]
    base: _Opened | None
    workers: int
    progress: Progress | None
    broken: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)

    def non_finite(self) -> tuple[NonFinite, ...]:
        """Adds up the blocks of each tensor."""
        found: dict[tuple[str, str], Any] = {}
        for (label, name, _), counts in self.broken.items():
            found[label, name] = found.get((label, name), 0) + counts
        return tuple(NonFinite(*key, *map(int, found[key])) for key in sorted(found))

    def spread(self, stage: str, work: Callable[[str], T], shapes: Shapes) -> dict[str, T]:
        """`work` on every tensor, the largest first, on all workers; results in the order of `shapes`."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        done, order, results = 0, sorted(sizes, key=lambda name: -sizes[name]), {}
        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="graft") as pool:
            try:
                for name, result in zip(order, pool.map(work, order), strict=True):
                    results[name], done = result, done + sizes[name]
                    if self.progress:
                        self.progress(stage, done, sum(sizes.values()))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return {name: results[name] for name in shapes}


def _facts(model: _Opened) -> Facts:
    source = model.source
    infos = list((source.store if isinstance(source, Adapter) else source).tensors.values())
    dtypes = {kind: sum(i.elements for i in infos if i.dtype == kind) for kind in sorted({i.dtype for i in infos})}
    parameters, size = sum(dtypes.values()), sum(info.nbytes for info in infos)
    adapter = _adapter_facts(source) if isinstance(source, Adapter) else None
    where = str(source.directory.resolve())
    return Facts(model.name, model.given, where, source.kind, len(infos), parameters, size, dtypes, adapter)


def _adapter_facts(source: Adapter) -> AdapterFacts:
    factors = source.factors.values()
    return AdapterFacts(
        base=source.base_name,
        ranks=tuple(sorted({f.rank for f in factors})),
        alpha=source.config.get("lora_alpha"),
        scales=tuple(sorted({f.scale for f in factors})),
        targets=tuple(sorted({name.split(".")[-2] for name in source.factors})),
        modules=len(factors),
        whole_tensors=tuple(sorted(source.tensors)),
    )


def _notes(run: _Run) -> tuple[str, ...]:
    """What a reader of the numbers should know although nothing is wrong."""
    found = []
    for model in (*run.models, *([run.base] if run.base else [])):
        source = model.source
        left = sum(info.dtype not in FLOATING for info in source.tensors.values())
        if left:
            found.append(f"{model.label}: {left} tensors that are not floating point are not measured")
        recorded = Path(source.base_name).name.lower() if isinstance(source, Adapter) else ""
        if run.base and recorded and recorded != Path(run.base.given).name.lower():
            found.append(f"{model.label} records another base, {recorded!r}; it is measured on {run.base.given!r}")
    return tuple(found)


def _blocks(run: _Run, parts: Sequence[_Part], size: int) -> Iterator[np.ndarray]:
    """The parts' entries beside each other, [parts, n], without those that are not finite in all of them."""
    dtype: Any = np.result_type(*(part.dtype for part in parts)).type
    space = Workspace()
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        rows = space.stack("rows", len(parts), stop - start, dtype)
        broken = False
        for part, row in zip(parts, rows, strict=True):
            part.fill(start, stop, space, row)
            if not storage.finite(row.view(np.uint8), "F64" if dtype == np.float64 else "F32"):
                broken = True
                run.broken[part.label, part.name, start] = np.array([np.isnan(row).sum(), np.isinf(row).sum()])
        yield np.ascontiguousarray(rows[:, np.isfinite(rows).all(axis=0)]) if broken else rows


def _breakdown(models: Sequence[_Opened], kind: Callable[..., Measure], sums: Sums) -> Breakdown[Measure]:
    """Adds up the sums of each group of tensors, and tells what follows from them."""
    roles: dict[str, Any] = {}
    layers: dict[int, Any] = {}
    for name, found in sums.items():
        role, number = layout.role(name), layout.layer(name)
        roles[role] = roles.get(role, 0) + found
        if number is not None:
            layers[number] = layers.get(number, 0) + found
    return Breakdown(
        tuple(model.name for model in models),
        kind(*sum(roles.values())),
        {role: kind(*found) for role, found in roles.items()},
        {number: kind(*layers[number]) for number in sorted(layers)},
        {name: kind(*found) for name, found in sums.items()},
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _weights(elements: float, squares: float, zero: float, entropies: float) -> Weights:
    return Weights(int(elements), math.sqrt(squares), _share(entropies, elements), _share(zero, elements))


def _change(elements: float, squares: float, base: float, same: float) -> Change:
    relative = math.sqrt(squares / base) if base else None if squares else 0.0
    return Change(int(elements), math.sqrt(squares), relative, _share(same, elements))


def _pair(elements: float, dot: float, left: float, right: float, apart: float, *counts: float) -> Pair:
    alike, both, opposed = counts
    scale = math.sqrt(left) * math.sqrt(right)
    cosine = max(-1.0, min(1.0, float(dot / scale))) if scale else None
    shares = _share(alike, elements), _share(both, elements), _share(opposed, both)
    return Pair(int(elements), cosine, math.sqrt(apart), *shares)


def _weigh(run: _Run, model: _Opened) -> Breakdown[Weights]:
    """Norm, zeros and range of each tensor in one pass, the histogram over that range in a second."""
    shapes = model.shapes()

    def one(name: str) -> np.ndarray:
        part, size = model.part(name), math.prod(shapes[name])
        low, high, sums = math.inf, -math.inf, np.zeros(4)
        for (row,) in _blocks(run, [part], size):
            low, high = float(row.min(initial=low)), float(row.max(initial=high))
            sums[:3] += row.size, _products(row, row)[0], row.size - np.count_nonzero(row)
        if low < high:
            edges, above = _edges(low, high, part.dtype), np.zeros(BINS - 1)
            for (row,) in _blocks(run, [part], size):
                above += [np.count_nonzero(row >= edge) for edge in edges]
            shares = -np.diff([sums[0], *above, 0]) / sums[0]
            sums[3] = -sum(p * math.log(p) for p in shares if p) * sums[0]
        return sums

    return _breakdown([model], _weights, run.spread(f"weights of {model.name}", one, shapes))


def _edges(low: float, high: float, dtype: Any) -> np.ndarray:
    """The inner edges of the bins, rounded up to `dtype`, so that comparing with them there is exact."""
    exact = np.linspace(low, high, BINS + 1)[1:-1]
    edges = exact.astype(dtype)
    return np.where(edges < exact, np.nextafter(edges, dtype(np.inf)), edges)


def _matched(run: _Run) -> tuple[Shapes, list[dict[str, str]]]:
    """The tensors that are compared, and under which name each model holds them."""
    if run.base is None and any(isinstance(model.source, Adapter) for model in run.models):
        return _matched_adapters(run.models)
    stem = run.base or run.models[0]
    if isinstance(stem.source, Adapter):
        raise PlanError(f"{stem.label} is an adapter; the base is a whole checkpoint")
    places = []
    for model in run.models:
        match: Any = layout.match_adapter if isinstance(model.source, Adapter) else layout.match_checkpoint
        try:
            places.append(match(stem.source.tensors, model.source, model.label))
        except PlanError as error:
            raise PlanError(f"cannot be compared with {stem.label}: {error}") from error
    whole = [place for model, place in zip(run.models, places, strict=True) if isinstance(model.source, Checkpoint)]
    return {name: shape for name, shape in stem.shapes().items() if all(name in place for place in whole)}, places


def _matched_adapters(models: Sequence[_Opened]) -> tuple[Shapes, list[dict[str, str]]]:
    """The same without a base, for adapters whose deltas are all low-rank."""
    whole = next((model for model in models if model.source.tensors), None)
    if whole:
        raise PlanError(f"{whole.label} holds whole weights, and adapters hold deltas: give --base to compare them")
    shapes = {name: shape for model in models for name, shape in model.shapes().items()}
    odd = next((name for model in models for name, shape in model.shapes().items() if shape != shapes[name]), None)
    if odd is not None:
        raise PlanError(f"the adapters change {odd!r} in different shapes: they belong to different bases")
    return shapes, [{name: name for name in model.shapes()} for model in models]


def _compare(run: _Run) -> tuple[tuple[Breakdown[Change], ...], tuple[Breakdown[Pair], ...]]:
    """All models beside each other, in one pass: how far each lies from the base, and any two from each other."""
    shapes, places = _matched(run)
    count, couples = len(run.models), list(combinations(range(len(run.models)), 2))

    def one(name: str) -> tuple[np.ndarray, np.ndarray]:
        parts = [model.part(place.get(name)) for model, place in zip(run.models, places, strict=True)]
        parts += [run.base.part(name)] if run.base else []
        changes, pairs = np.zeros((count, 4)), np.zeros((len(couples), 8))
        for rows in _blocks(run, parts, math.prod(shapes[name])):
            size, base = rows.shape[1], _subtract_base(parts, rows) if run.base else 0.0
            norms = [_products(row, row)[0] for row in rows[:count]]
            for k in range(count):
                changes[k] += size, norms[k], base, size - np.count_nonzero(rows[k])
            for k, (i, j) in enumerate(couples):
                dot, apart = _products(rows[i], rows[j])
                pairs[k] += size, dot, norms[i], norms[j], apart, *_signs(rows[i], rows[j])
        return changes, pairs

    made = run.spread("comparison", one, shapes)
    changes = [_breakdown([m], _change, {n: made[n][0][k] for n in made}) for k, m in enumerate(run.models)]
    pairs = [_breakdown([run.models[i], run.models[j]], _pair, {n: made[n][1][k] for n in made})
             for k, (i, j) in enumerate(couples)]  # fmt: skip
    return tuple(changes) if run.base else (), tuple(pairs)


def _subtract_base(parts: Sequence[_Part], rows: np.ndarray) -> float:
    """Turns all rows but the last, which is the base's, into deltas; returns the base's sum of squares."""
    for part, row in zip(parts[:-1], rows[:-1], strict=True):
        if part.info is not None:
            row -= rows[-1]
    return float(_products(rows[-1], rows[-1])[0])


@njit(nogil=True, cache=True, fastmath={"reassoc"})  # a report's sums, not a weight
def _products(left, right):  # type: ignore[no-untyped-def]
    dot, apart = 0.0, 0.0
    for i in range(left.size):
        gap = np.float64(left[i]) - np.float64(right[i])
        dot += np.float64(left[i]) * np.float64(right[i])
        apart += gap * gap
    return dot, apart


@njit(nogil=True, cache=True)
def _signs(left, right):  # type: ignore[no-untyped-def]
    """How many entries are equal, how many non-zero in both, and how many of those differ in sign."""
    alike, both, opposed = np.int32(0), np.int32(0), np.int32(0)
    for i in range(left.size):
        alike += np.int32(left[i] == right[i])
        both += np.int32((left[i] != 0) & (right[i] != 0))
        opposed += np.int32(((left[i] > 0) & (right[i] < 0)) | ((left[i] < 0) & (right[i] > 0)))
    return alike, both, opposed
