"""The passes over tensors behind an inspection: what is summed, in fixed blocks, each read once for all comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit

from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.checkpoints.headers import FLOATING, TensorInfo
from graftkit.checkpoints.resolve import Source, directory_of, open_source, split_task
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.execution.blocks import Workspace
from graftkit.execution.local import Progress
from graftkit.measuring.findings import (
    Breakdown,
    Change,
    NonFinite,
    Pair,
    Weights,
    breakdown,
    change_of,
    pair_of,
    weights_of,
)
from graftkit.recipes import layout
from graftkit.recipes.steps import BLOCK

BINS = 10  # of the histogram whose entropy is told
T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
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
class Opened:
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

    def part(self, name: str | None) -> Part:
        """Its share in a tensor, by its own name of it."""
        source = self.source
        if name is None:
            return Part(self.label)
        if name in source.tensors:
            store = source.store if isinstance(source, Adapter) else source
            return Part(self.label, name, store, source.tensors[name])
        assert isinstance(source, Adapter)
        return Part(self.label, name, delta=source.load(name, np.float32))


def open_model(given: str, name: str, role: str, allow_pickle: bool) -> Opened:
    """Opens a directory or hub id. Raises PlanError where it holds no floating-point tensor, so nothing to measure."""
    model, task = split_task(given, Path())
    source = open_source(directory_of(model, Path()), task=task, allow_pickle=allow_pickle)
    opened = Opened(given, name, f"{role} {name!r}", source)
    if not opened.shapes():
        dtypes = ", ".join(sorted({info.dtype for info in source.tensors.values()}))
        raise PlanError(f"{opened.label}: no tensor of floating point in {source.directory}, only {dtypes or 'none'}: "
                        "there is nothing to measure")  # fmt: skip
    return opened


@dataclass
class Run:
    """One inspection under way; `broken` counts NaN and infinities by model, tensor and block."""

    models: tuple[Opened, ...]
    base: Opened | None
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


def weigh(run: Run, model: Opened) -> Breakdown[Weights]:
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

    return breakdown((model.name,), weights_of, run.spread(f"weights of {model.name}", one, shapes))


def compare(run: Run) -> tuple[tuple[Breakdown[Change], ...], tuple[Breakdown[Pair], ...]]:
    """All models beside each other, in one pass: how far each lies from the base, and any two from each other."""
    shapes, places = _matched(run)
    if not shapes:
        raise PlanError(f"{' and '.join(model.label for model in run.models)} share no tensor of floating point")
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
    changes = [breakdown((m.name,), change_of, {n: made[n][0][k] for n in made}) for k, m in enumerate(run.models)]
    pairs = [breakdown((run.models[i].name, run.models[j].name), pair_of, {n: made[n][1][k] for n in made})
             for k, (i, j) in enumerate(couples)]  # fmt: skip
    return tuple(changes) if run.base else (), tuple(pairs)


def _matched(run: Run) -> tuple[Shapes, list[dict[str, str]]]:
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


def _matched_adapters(models: Sequence[Opened]) -> tuple[Shapes, list[dict[str, str]]]:
    """The same without a base, for adapters whose deltas are all low-rank."""
    whole = next((model for model in models if model.source.tensors), None)
    if whole:
        raise PlanError(f"{whole.label} holds whole weights, and adapters hold deltas: give --base to compare them")
    shapes = {name: shape for model in models for name, shape in model.shapes().items()}
    odd = next((name for model in models for name, shape in model.shapes().items() if shape != shapes[name]), None)
    if odd is not None:
        raise PlanError(f"the adapters change {odd!r} in different shapes: they belong to different bases")
    return shapes, [{name: name for name in model.shapes()} for model in models]


def _blocks(run: Run, parts: Sequence[Part], size: int) -> Iterator[np.ndarray]:
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


def _subtract_base(parts: Sequence[Part], rows: np.ndarray) -> float:
    """Turns all rows but the last, which is the base's, into deltas; returns the base's sum of squares."""
    for part, row in zip(parts[:-1], rows[:-1], strict=True):
        if part.info is not None:
            row -= rows[-1]
    return float(_products(rows[-1], rows[-1])[0])


def _edges(low: float, high: float, dtype: Any) -> np.ndarray:
    """The inner edges of the bins, rounded up to `dtype`, so that comparing with them there is exact."""
    exact = np.linspace(low, high, BINS + 1)[1:-1]
    edges = exact.astype(dtype)
    return np.where(edges < exact, np.nextafter(edges, dtype(np.inf)), edges)


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
