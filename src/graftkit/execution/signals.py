"""What a graft looks at in a matrix (`methods/signals.py`), made in fixed blocks: nothing here holds a whole matrix.

Values are counted by comparing them with the edges of their bins, which both this and the whole-tensor form take from
the same function: counts are equal integers, whatever the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from graftkit.compiling import compiled
from graftkit.execution.blocks import ByRows, Reader, cuts
from graftkit.methods import Method
from graftkit.methods.signals import counts_of, edges_of, entropy_of

CHUNK = 2048  # values that are compared with all edges at once: they stay in the first-level cache
NEAR = 1 << 15  # values of each model that are looked at twice while they are near
TURNS = 200  # most passes of the spectral norm
SETTLED = 1e-13  # relative change of the spectral norm at which it stands still

Blocks = Callable[[str], Iterator[tuple[int, np.ndarray]]]
"""Goes over a tensor by a grain: where a block starts, and its values [models, n]."""


def measured(method: Method, knobs: Mapping[str, Any], reader: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statistics of this file that a method reads, and what the record should say of them."""
    wanted = set(method.statistics)
    found: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    of_deltas = "deltas" in method.reads or knobs.get("of") == "product"
    if "signals" in wanted and knobs["global_signal"] != "none" and not of_deltas:
        reader.keep_models()
    blocks = partial(_blocks, reader, of_deltas)
    if "range" in wanted:
        found["range"] = span(blocks, len(reader.models))
    if "histogram" in wanted:
        found["histogram"] = histogram(blocks, len(reader.models), knobs).astype(np.float64)
    if "distance" in wanted:
        found["distance"] = _by_rows(distance(blocks, reader), reader)
    if "signals" in wanted:
        found["signals"] = signals(blocks, reader, knobs)
        notes |= {knobs["global_signal"]: found["signals"].tolist()} if found["signals"].any() else {}
    return found, notes


def _blocks(reader: Reader, of_deltas: bool, grain: str) -> Iterator[tuple[int, np.ndarray]]:
    for start, stop in cuts(reader.step, grain):
        if reader.kept is not None and not of_deltas:
            yield start, reader.kept[:, start:stop]
            continue
        base = reader.read_base(start, stop)
        yield start, (reader.read_deltas if of_deltas else reader.read_models)(start, stop, base)


def _rows(reader: Reader) -> int:
    """How many output channels a tensor has; a vector is one."""
    return reader.step.shape[0] if len(reader.step.shape) > 1 else 1


def _by_rows(values: np.ndarray, reader: Reader) -> ByRows:
    return ByRows(lambda first, last: values[:, first:last], max(reader.step.elements // max(_rows(reader), 1), 1))


def span(blocks: Blocks, models: int) -> np.ndarray:
    """The smallest and the largest value of each model, zeros where there is none: float64 [2, models]."""
    low, high = np.full(models, np.inf), np.full(models, -np.inf)
    for _, stack in blocks("element"):
        for part in (stack[:, k : k + NEAR] for k in range(0, stack.shape[1], NEAR)):
            low, high = np.minimum(low, part.min(axis=1)), np.maximum(high, part.max(axis=1))
    found = np.stack([low, high])
    return np.where(np.isfinite(found), found, 0.0)  # type: ignore[no-any-return]


def histogram(blocks: Blocks, models: int, knobs: Mapping[str, Any]) -> np.ndarray:
    """How many values of each model lie in each of its own bins: int64 [models, bins]."""
    edges = edges_of(span(blocks, models), knobs["bins"], knobs["last_bin"])
    reached = np.zeros(edges.shape, np.int64)
    closed = knobs["last_bin"] == "closed"  # all reach its first edge, and its last decides nothing
    inner = reached[:, 1:-1] if closed else reached
    for _, stack in blocks("element"):
        limits = _at_least(edges[:, 1:-1] if closed else edges, stack.dtype)
        reached[:, 0] += stack.shape[1] if closed else 0
        for values, own, counts in zip(stack, limits, inner, strict=True):
            _count_reached(values, np.ascontiguousarray(own), counts)
    return counts_of(reached, knobs["last_bin"])


def _at_least(edges: np.ndarray, dtype: Any) -> np.ndarray:
    """The smallest numbers of a dtype that are not below some float64 ones: as limits both select the same values."""
    with np.errstate(over="ignore"):
        near = edges.astype(dtype)
    return np.where(near < edges, np.nextafter(near, dtype.type(np.inf)), near)  # type: ignore[no-any-return]


def signals(blocks: Blocks, reader: Reader, knobs: Mapping[str, Any]) -> np.ndarray:
    """What the knob `global_signal` names of each model; zeros for a tensor that is no matrix; float64 [models]."""
    step, models = reader.step, len(reader.models)
    if knobs["global_signal"] == "none" or len(step.shape) < 2:
        return np.zeros(models)
    if knobs["global_signal"] == "spectral":
        return spectral(blocks, reader)
    return entropy_of(histogram(blocks, models, knobs), step.elements)


def distance(blocks: Blocks, reader: Reader) -> np.ndarray:
    """Per output channel the L1 distance of each model from the mean of the others: float64 [models, out]."""
    models, rows = len(reader.models), _rows(reader)
    found = np.zeros((models, rows))
    width = reader.step.elements // max(rows, 1)
    for start, stack in blocks("row"):
        wide = stack.reshape(models, -1, width).astype(np.float64)
        others = (wide.sum(axis=0) - wide) / max(models - 1, 1)
        found[:, start // width : start // width + wide.shape[1]] = np.abs(wide - others).sum(axis=2)
    return found


def spectral(blocks: Blocks, reader: Reader) -> np.ndarray:
    """The largest singular value of each model's matrix, by Lanczos on W'W with all vectors kept: float64 [models].

    A pass over the blocks of rows for each vector; beside a block it holds these, each as long as a row.
    """
    models, rows = len(reader.models), _rows(reader)
    width = reader.step.elements // max(rows, 1)
    if not width or not rows:
        return np.zeros(models)

    def squared(vectors: np.ndarray) -> np.ndarray:  # [models, in] -> W'W v of each
        total = np.zeros((models, width))
        for _, stack in blocks("row"):
            wide = stack.reshape(models, -1, width).astype(np.float64)
            total += np.einsum("mi,mij->mj", np.einsum("mij,mj->mi", wide, vectors), wide)
        return total

    return np.sqrt(_largest(squared, models, width))  # type: ignore[no-any-return]


def _largest(squared: Callable[[np.ndarray], np.ndarray], models: int, width: int) -> np.ndarray:
    """The largest eigenvalues of some positive operators, float64 [models]."""
    start = np.random.default_rng(0).standard_normal(width)
    kept = np.tile(start / np.linalg.norm(start), (models, 1))[:, None]  # [models, vectors, in], orthonormal
    held, found = np.zeros((models, 0, width)), np.zeros(models)  # what the operators make of them
    for turn in range(min(TURNS, width)):
        held = np.concatenate([held, squared(kept[:, -1])[:, None]], axis=1)
        values = np.linalg.eigvalsh(kept @ held.transpose(0, 2, 1))[:, -1]
        if turn and (np.abs(values - found) <= SETTLED * np.abs(values)).all():
            return np.maximum(values, 0.0)  # type: ignore[no-any-return]
        found, rest = values, held[:, -1]
        for _ in range(2):  # once leaves rounding behind
            rest = rest - np.einsum("mk,mkj->mj", np.einsum("mkj,mj->mk", kept, rest), kept)
        sizes = np.linalg.norm(rest, axis=1, keepdims=True)
        kept = np.concatenate([kept, (rest / np.where(sizes > 0, sizes, 1.0))[:, None]], axis=1)
    return np.maximum(found, 0.0)  # type: ignore[no-any-return]


@compiled
def _count_reached(values, edges, counts):  # type: ignore[no-untyped-def]
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        for k in range(edges.size):
            edge, count = edges[k], np.int32(0)
            for i in range(part.size):
                count = np.int32(count + np.int32(part[i] >= edge))
            counts[k] += count
