"""Steps whose delta is made of factors, and the adapter that they make together.

A weighted sum of adapters is their factors side by side; a method that commutes with rotations runs on their cores, or
on as many rows as their ranks, whether the delta leaves as factors or is added to a base; anything else is dense rows
that go by. Only the last reads a base, and only where models or method need one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.adapter_sink import AdapterSink
from graftkit.checkpoints.adapters import WRAPPER, LowRank
from graftkit.errors import GraftError, NonFiniteError
from graftkit.execution import measured, shared
from graftkit.execution.apart import apart
from graftkit.execution.apply import apply, refusing
from graftkit.execution.blocks import Reader, Workspace, open_feed
from graftkit.execution.factoring import Core, Factored, Wanted, balanced, core_of, sketched, stacked
from graftkit.methods.random import key_of
from graftkit.recipes.plan import Plan
from graftkit.recipes.ranks import DEFAULT_ENERGY, Energy
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import BLOCK, KEPT, Step

Merged = Callable[[int, int], tuple[np.ndarray, np.ndarray | None, bool]]
"""A method's result for elements `[start, stop)`, the base's, and whether the result is a delta."""

Pair = tuple[np.ndarray, np.ndarray]


def wanted_of(recipe: Recipe) -> Wanted:
    """How much of each delta the recipe keeps."""
    rank = recipe.output.rank
    if isinstance(rank, int):
        return Wanted(rank=rank)
    if rank == "exact":
        return Wanted()
    return Wanted(energy=rank.energy if isinstance(rank, Energy) else DEFAULT_ENERGY)


def from_factors(plan: Plan, sink: AdapterSink, step: Step, device: str, space: Workspace) -> dict[str, Any]:
    """Merges adapters by their factors and writes the result; returns the step's line of the record."""
    assert step.form is not None
    if step.form.path == "apart":
        return _write(sink, step, apart(plan, step))
    if step.form.path == "shares":
        made, notes = shared.beside(plan, step, space, wanted_of(plan.recipe))
        return {**_write(sink, step, made), **notes}
    method = methods.get(step.method)
    wanted = wanted_of(plan.recipe)
    beside = step.form.path == "stack" and wanted == Wanted() and step.form.directions <= min(step.shape)
    kind = np.float32 if beside and step.dtype == "F32" else np.float64
    pairs = [_pair(plan, step, k, kind) for k in range(len(step.models))]
    here = [pair for pair in pairs if pair is not None]
    given = _statistics(pairs) if method.statistics else {}
    if step.form.path == "stack":
        factors = refusing(method, lambda: method.factors_of(given, step.knobs, len(pairs)))
        used = np.array([f for f, pair in zip(factors, pairs, strict=True) if pair is not None])
        left, right = stacked(here, used)
        if beside:
            return _write(sink, step, balanced(left, right))
        core = core_of([(left, right)])
        return _write(sink, step, core.factored(core.cores[0], wanted))
    core, mixed = _merged(plan, step, pairs, given, device, space)
    return _write(sink, step, core.factored(mixed, wanted))


def on_core(plan: Plan, reader: Reader, device: str) -> Merged:
    """What merges the blocks of a step whose method runs on the core of its adapters: rows of one small product."""
    step = reader.step
    pairs = [_pair(plan, step, k, np.float64) for k in range(len(step.models))]
    given = _statistics(pairs) if methods.get(step.method).statistics else {}
    core, made = _merged(plan, step, pairs, given, device, reader.space)
    left, right = (core.rows, made) if core.columns is None else (core.rows @ made, core.columns.T.copy())
    delta = LowRank(left, right)

    def block(start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None, bool]:
        return delta.block(start, stop).astype(reader.dtype, copy=False), reader.read_base(start, stop), True

    return block


def _pair(plan: Plan, step: Step, k: int, kind: Any) -> Pair | None:
    """One model's delta as factors, of a `kind` of float; None where it leaves the tensor alone."""
    if step.models[k].kind == "base":
        return None
    delta = open_feed(step.models[k], plan.sources, kind).delta_factors()
    return delta.left, delta.right


def _statistics(pairs: Sequence[Pair | None]) -> dict[str, np.ndarray]:
    """Inner products and norms of the deltas, from the small products of their factors."""
    dots = np.zeros((len(pairs), len(pairs)))
    for s, one in enumerate(pairs):
        for t, other in enumerate(pairs[: s + 1]):
            if one is not None and other is not None:
                dots[s, t] = dots[t, s] = float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())
    return {"dots": dots, "norms": np.sqrt(np.maximum(np.diagonal(dots), 0))}


def _merged(
    plan: Plan, step: Step, pairs: Sequence[Pair | None], given: dict[str, Any], device: str, space: Workspace
) -> tuple[Core, np.ndarray]:
    """The core of some factors, and what the method makes of it."""
    here = [pair for pair in pairs if pair is not None]
    both, more = methods.get(step.method).commutes(step.knobs) == "both", measured.beside(step, plan.statistics)
    core = core_of(here, columns_too=both, beside=more)
    given = given | measured.in_core(step, plan.statistics, core, here)
    return core, _in_core(step, core, pairs, given, device, space)


def _in_core(
    step: Step, core: Core, pairs: Sequence[Pair | None], given: Mapping[str, Any], device: str, space: Workspace
) -> np.ndarray:
    """The method's result on the cores [models, rows, columns]; a model without factors has a core of zeros."""
    cores, found = np.zeros((len(pairs), *core.cores.shape[1:])), iter(core.cores)
    for k, pair in enumerate(pairs):
        if pair is not None:
            cores[k] = next(found)
    flat = {**given, "deltas": cores.reshape(len(pairs), -1), "shape": step.shape}
    result = apply(methods.get(step.method), flat, step.knobs, cores.shape[1:], device, space)
    return np.array(result, np.float64).reshape(cores.shape[1:])


def from_rows(plan: Plan, sink: AdapterSink, step: Step, merged: Merged) -> dict[str, Any]:
    """Sketches a merged delta whose rows `merged` gives, and writes its factors; returns the line of the record."""
    height, width = step.shape
    rows = max(1, BLOCK // width) if step.grain != "tensor" else height
    kept: list[np.ndarray] = []

    def deltas() -> Iterator[np.ndarray]:
        if kept:
            yield from kept
            return
        for delta in made():
            if step.elements <= KEPT:
                kept.append(delta)
            yield delta

    def made() -> Iterator[np.ndarray]:
        for first in range(0, height, rows):
            last = min(first + rows, height)
            result, base, is_delta = merged(first * width, last * width)
            delta = np.array(result, np.float64)  # the method's own buffer is used again
            if not is_delta and base is not None:
                delta -= base
            if not np.isfinite(delta).all():
                raise NonFiniteError(f"tensor {step.name!r}: the merged delta is not finite")
            yield delta.reshape(last - first, width)

    wanted = wanted_of(plan.recipe)
    found = sketched(deltas, (height, width), wanted, key_of(plan.recipe.seed, "sketch", 0, step.name))
    if found is None:
        raise GraftError(
            f"tensor {step.name!r}: a share of {wanted.energy} of its energy takes factors larger than the tensor; "
            "name a rank or a smaller share under output.rank, or write a checkpoint"
        )
    return _write(sink, step, found)


def pieces_of(step: Step, rank: int) -> list[tuple[str, tuple[int, int]]]:
    """The names and shapes of A and B in the adapter, as PEFT keeps them."""
    assert step.form is not None
    names = ("lora_embedding_A", "lora_embedding_B") if step.form.kind == "embedding" else _LINEAR
    out, inner = step.shape if step.form.kind == "linear" else step.shape[::-1]
    a, b = (f"{WRAPPER}{step.form.module}.{name}" for name in names)
    return [(a, (rank, inner)), (b, (out, rank))]


def largest(plan: Plan) -> list[tuple[str, tuple[int, int]]]:
    """All pieces that may come, at the largest ranks that they may have."""
    return [piece for step in plan.steps if step.form for piece in pieces_of(step, step.form.most)]


def _write(sink: AdapterSink, step: Step, made: Factored) -> dict[str, Any]:
    """Puts the factors into the spool; a delta of zeros leaves nothing."""
    assert step.form is not None
    a, b = (made.right, made.left) if step.form.kind == "linear" else (made.left.T, made.right.T)
    for (name, shape), factor in zip(pieces_of(step, made.rank) if made.rank else (), (a, b), strict=False):
        raw = storage.as_bytes(np.ascontiguousarray(factor).reshape(-1), step.dtype)
        if not storage.finite(raw, step.dtype):
            raise NonFiniteError(f"tensor {step.name!r}: a factor is not finite in {step.dtype}")
        sink.put(sink.reserve(step.name, name, shape), 0, raw)
    return {
        "method": step.method,
        "rank": made.rank,
        "delta_norm": made.norm,
        "error_norm": made.error,
        "energy": made.kept,
    }


_LINEAR = ("lora_A.weight", "lora_B.weight")


def begin_whole(sink: AdapterSink, step: Step) -> None:
    """Makes room for a tensor that the adapter holds whole."""
    sink.reserve(step.name, f"{WRAPPER}{step.name}", step.shape)
