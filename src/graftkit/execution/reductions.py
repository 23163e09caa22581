"""Statistics of scope tensor and model, made in fixed blocks: exact thresholds by radix selection, norms and dots.

The k-th largest magnitude is found without sorting or keeping anything: the bit patterns of non-negative floats are
ordered like the floats, so one pass counts the upper 16 bits, which fixes the bin that holds the k-th, and a second
pass counts the lower 16 bits within that bin. Counts are integers: any order of workers gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from graftkit.execution.blocks import Reader, Workspace, cuts
from graftkit.methods import Method
from graftkit.methods.parts import kept_count
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Step

BINS = 1 << 16


@dataclass(frozen=True)
class Threshold:
    """Per model the magnitude at or above which entries are kept, and the share that this keeps."""

    values: np.ndarray
    density: tuple[float, ...]


def statistics_of(
    method: Method, step: Step, sources: tuple[Named, ...], space: Workspace, known: Threshold | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a method reads beside blocks, and what the record should say of it; `known` is from a stage before."""
    found: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {}
    if "threshold" in method.statistics:
        threshold = known or select([step], step.knobs["density"], sources, space)
        found["threshold"] = threshold.values
        notes["density"] = list(threshold.density)
    if "norms" in method.statistics or "dots" in method.statistics:
        dots = inner_products(step, sources, space, "deltas" in method.reads)
        found |= {"dots": dots, "norms": np.sqrt(np.diagonal(dots))}
    return found, notes


Spread = Callable[[Callable[[Step, Workspace], np.ndarray], Sequence[Step]], Iterable[np.ndarray]]
"""Runs a function on every step, on any number of workers, and yields its results."""


def select(
    steps: Sequence[Step],
    density: Sequence[float],
    sources: tuple[Named, ...],
    space: Workspace,
    spread: Spread | None = None,
) -> Threshold:
    """The exact threshold of each model over all `steps` together."""
    run: Spread = spread or (lambda work, todo: (work(step, space) for step in todo))
    elements = sum(step.elements for step in steps)
    wanted = np.array([kept_count(share, elements) for share in density], np.int64)
    everything = wanted >= elements

    def upper(step: Step, scratch: Workspace) -> np.ndarray:
        return _count(step, sources, scratch, None)

    high = sum(run(upper, steps), np.zeros((len(wanted), BINS), np.int64))
    bins, above = _locate(high, wanted)

    def lower(step: Step, scratch: Workspace) -> np.ndarray:
        return _count(step, sources, scratch, bins)

    needed = (wanted > 0) & ~everything
    low = sum(run(lower, steps), np.zeros_like(high)) if needed.any() else np.zeros_like(high)
    rest, over = _locate(low, np.maximum(wanted - above, 1))
    exact = ((bins.astype(np.uint32) << np.uint32(16)) | rest.astype(np.uint32)).view(np.float32)
    values = np.where(wanted == 0, np.float32(np.inf), np.where(everything, np.float32(0), exact)).astype(np.float32)
    kept = above + over + low[np.arange(len(wanted)), rest]
    shares = np.where(everything, 1.0, np.where(wanted == 0, 0.0, kept / max(elements, 1)))
    return Threshold(values, tuple(shares.tolist()))


def _count(step: Step, sources: tuple[Named, ...], space: Workspace, bins: np.ndarray | None) -> np.ndarray:
    """Counts of the magnitudes' upper 16 bits, or of the lower 16 within the given bins; [models, 65536]."""
    counts = np.zeros((len(step.models), BINS), np.int64)
    reader = Reader(step, sources, space)
    for start, stop in cuts(step):
        deltas = reader.read_deltas(start, stop, reader.read_base(start, stop))
        for k, row in enumerate(deltas):
            bits = row.astype(np.float32, copy=False).view(np.uint32)
            if bins is None:
                _count_upper(bits, counts[k])
            else:
                _count_lower(bits, np.uint32(bins[k]), counts[k])
    return counts


def _locate(counts: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per model the bin that holds the `wanted`-th largest, and how many lie in the bins above it."""
    from_top = np.cumsum(counts[:, ::-1], axis=1)
    places = np.array([int(np.searchsorted(row, k)) for row, k in zip(from_top, np.maximum(wanted, 1), strict=True)])
    places = np.minimum(places, BINS - 1)
    above = np.array([row[p - 1] if p else 0 for row, p in zip(from_top, places, strict=True)], np.int64)
    return BINS - 1 - places, above


def inner_products(step: Step, sources: tuple[Named, ...], space: Workspace, of_deltas: bool) -> np.ndarray:
    """Inner products of the models' deltas or tensors, float64 [models, models]; blocks are added in their order."""
    count = len(step.models)
    dots = np.zeros((count, count), np.float64)
    reader = Reader(step, sources, space)
    for start, stop in cuts(step):
        base = reader.read_base(start, stop)
        stack = reader.read_deltas(start, stop, base) if of_deltas else reader.read_models(start, stop, base)
        for i in range(count):
            for j in range(i, count):
                dots[i, j] += _dot(stack[i], stack[j])
    return np.triu(dots) + np.triu(dots, 1).T


def groups_of(steps: Iterable[Step]) -> Mapping[str, list[Step]]:
    """The steps that share model-scope statistics, by group."""
    found: dict[str, list[Step]] = {}
    for step in steps:
        if step.group:
            found.setdefault(step.group, []).append(step)
    return found


@njit(nogil=True, cache=True)
def _count_upper(bits, counts):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        counts[(bits[i] >> np.uint32(16)) & np.uint32(0x7FFF)] += 1


@njit(nogil=True, cache=True)
def _count_lower(bits, bin, counts):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        if ((bits[i] >> np.uint32(16)) & np.uint32(0x7FFF)) == bin:
            counts[bits[i] & np.uint32(0xFFFF)] += 1


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _dot(left, right):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(left.size):
        total += np.float64(left[i]) * np.float64(right[i])
    return total
