"""Statistics of scope tensor and model, made in fixed blocks: exact thresholds by radix selection, norms and dots.

The k-th largest magnitude is found without sorting or keeping anything: the bit patterns of non-negative floats are
ordered like the floats, so one pass counts the upper 16 bits, which fixes the bin that holds the k-th, and a second
pass counts the lower 16 bits within that bin. A large tensor takes one pass: a sample of its blocks says where the k-th
should lie, and the pass counts what is above a window of 65536 patterns around that place, and each pattern within. The
counts tell whether the k-th is there; where it is not, the two passes follow. All counts are exact integers, so
neither the sample nor the order of workers changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from graftkit.execution.blocks import Reader, Workspace, cuts
from graftkit.methods import Method
from graftkit.methods.parts import band_ranks, deviation, kept_count
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Step

BINS = 1 << 16
SAMPLE = 4  # blocks that place the window
PART = 64  # entries that are looked at together for one in the window


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
        threshold = known or select([step], densities(step), sources, space)
        found["threshold"] = threshold.values
        notes["density"] = list(threshold.density)
    if "norms" in method.statistics or "dots" in method.statistics:
        dots = inner_products(step, sources, space, "deltas" in method.reads)
        found |= {"dots": dots, "norms": np.sqrt(np.diagonal(dots))}
    for name, make in (("band", band), ("overlap", overlap), ("variation", variation)):
        if name in method.statistics:
            found[name] = make(step, sources, space)
    if "energies" in method.statistics:
        found["energies"] = energies(step, sources, space, found["variation"])
    return found, notes


def densities(step: Step, knob: str = "density") -> tuple[float, ...]:
    """A share that is a knob, one value per model."""
    return tuple(np.broadcast_to(step.knobs[knob], len(step.models)).tolist())


Spread = Callable[[Callable[[Step, Workspace], np.ndarray], Sequence[Step]], Iterable[np.ndarray]]
"""Runs a function on every step, on any number of workers, and yields its results."""

Read = Callable[[Reader, int, int], np.ndarray]
"""Reads elements as bit patterns of non-negative float32 numbers, uint32 [rows, n]."""


def select(
    steps: Sequence[Step],
    density: Sequence[float],
    sources: tuple[Named, ...],
    space: Workspace,
    spread: Spread | None = None,
) -> Threshold:
    """The exact threshold of each model over all `steps` together."""
    elements = sum(step.elements for step in steps)
    wanted = np.array([kept_count(share, elements) for share in density], np.int64)
    open_models = (wanted > 0) & (wanted < elements)  # density 0 keeps nothing, density 1 everything: no k-th to find
    bits, kept = np.zeros(len(wanted), np.uint32), np.zeros(len(wanted), np.int64)
    if open_models.any():
        target = np.clip(wanted, 1, max(elements - 1, 1))
        found = _select_by_window(steps[0], target, sources, space) if spread is None and len(steps) == 1 else None
        bits, kept = found or _select_by_radix(steps, target, sources, space, spread)
    edge = np.where(wanted == 0, np.float32(np.inf), np.float32(0))
    values = np.where(open_models, bits.view(np.float32), edge).astype(np.float32)
    shares = np.where(open_models, kept / max(elements, 1), (wanted > 0).astype(np.float64))
    return Threshold(values, tuple(shares.tolist()))


def _select_by_radix(
    steps: Sequence[Step],
    wanted: np.ndarray,
    sources: tuple[Named, ...],
    space: Workspace,
    spread: Spread | None,
    read: Read = Reader.read_patterns,
) -> tuple[np.ndarray, np.ndarray]:
    """Bit pattern of the k-th value, and how many are at or above it, per row of what is read; two passes."""
    run: Spread = spread or (lambda work, todo: (work(step, space) for step in todo))
    zeros = np.zeros((len(wanted), BINS), np.int64)
    high = sum(run(lambda step, scratch: _count(step, sources, scratch, zeros, None, read), steps), zeros)
    bins, above = _locate(high, wanted)
    low = sum(run(lambda step, scratch: _count(step, sources, scratch, zeros, bins, read), steps), zeros)
    rest, over = _locate(low, wanted - above)
    bits = (bins.astype(np.uint32) << np.uint32(16)) | rest.astype(np.uint32)
    return bits, above + over + low[np.arange(len(wanted)), rest]


def _select_by_window(
    step: Step, wanted: np.ndarray, sources: tuple[Named, ...], space: Workspace
) -> tuple[np.ndarray, np.ndarray] | None:
    """As `_select_by_radix` for one tensor, in one pass; None where it is small, or where the window missed."""
    blocks = list(cuts(step))
    if len(blocks) < 2 * SAMPLE:
        return None
    reader = Reader(step, sources, space)
    chosen = [blocks[k * (len(blocks) - 2) // (SAMPLE - 1)] for k in range(SAMPLE)]  # all but the last block are full
    size = chosen[0][1] - chosen[0][0]
    patterns = space.stack("sample", len(wanted), SAMPLE * size, np.uint32)
    for k, block in enumerate(chosen):
        patterns[:, k * size : (k + 1) * size] = reader.read_patterns(*block)
    places = np.clip(wanted * patterns.shape[1] // step.elements, 1, patterns.shape[1])
    for row, k in zip(patterns, places, strict=True):
        row.partition(row.size - k)
    middle = np.array([row[row.size - k] for row, k in zip(patterns, places, strict=True)], np.int64)
    first = np.maximum(middle - BINS // 2, 0).astype(np.uint32)
    counts, above = np.zeros((len(wanted), BINS), np.int64), np.zeros(len(wanted), np.int64)
    for start, stop in blocks:
        for k, row in enumerate(reader.read_patterns(start, stop)):
            above[k] += _count_window(row, first[k], middle[k] - first[k], counts[k])
    if (above >= wanted).any() or (above + counts.sum(axis=1) < wanted).any():
        return None
    place, over = _locate(counts, wanted - above)
    return first + place.astype(np.uint32), above + over + counts[np.arange(len(wanted)), place]


def _count(
    step: Step, sources: tuple[Named, ...], space: Workspace, zeros: np.ndarray, bins: np.ndarray | None, read: Read
) -> np.ndarray:
    """Counts of the patterns' upper 16 bits, or of the lower 16 within the given bins; [rows, 65536], as `zeros`."""
    counts = zeros.copy()
    reader = Reader(step, sources, space)
    for start, stop in cuts(step):
        for k, row in enumerate(read(reader, start, stop)):
            if bins is None:
                _count_upper(row, counts[k])
            else:
                _count_lower(row, np.uint32(bins[k]), counts[k])
    return counts


def _locate(counts: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per model the bin that holds the `wanted`-th largest, and how many lie in the bins above it."""
    from_top = np.cumsum(counts[:, ::-1], axis=1)
    places = np.array([int(np.searchsorted(row, k)) for row, k in zip(from_top, np.maximum(wanted, 1), strict=True)])
    places = np.minimum(places, BINS - 1)
    above = np.array([row[p - 1] if p else 0 for row, p in zip(from_top, places, strict=True)], np.int64)
    return BINS - 1 - places, above


def band(step: Step, sources: tuple[Named, ...], space: Workspace) -> np.ndarray:
    """Smallest and largest magnitude that breadcrumbs keep, float32 [2, models]."""
    shares = zip(densities(step), densities(step, "outliers"), strict=True)
    ranks = np.array([band_ranks(*pair, step.elements) for pair in shares], np.int64).T
    return np.stack([_of_rank(step, wanted, sources, space) for wanted in ranks])


def _of_rank(step: Step, wanted: np.ndarray, sources: tuple[Named, ...], space: Workspace) -> np.ndarray:
    """Per model the magnitude of a rank, counted from 1 at the largest; infinity for rank 0."""
    found = np.full(len(wanted), np.inf, np.float32)
    if wanted.any():
        target = np.maximum(wanted, 1)
        made = _select_by_window(step, target, sources, space)
        bits, _ = made or _select_by_radix([step], target, sources, space, None)
        found = np.where(wanted > 0, bits.view(np.float32), found)
    return found


def overlap(step: Step, sources: tuple[Named, ...], space: Workspace) -> np.ndarray:
    """Per model how many of its changed entries others change too, over how many it changes alone; float64 [models]."""
    shared, alone = np.zeros(len(step.models), np.int64), np.zeros(len(step.models), np.int64)
    reader = Reader(step, sources, space)
    for start, stop in cuts(step):
        changed = np.abs(reader.read_deltas(start, stop, reader.read_base(start, stop))) > step.knobs["epsilon"]
        several = changed.sum(axis=0) > 1
        shared += (changed & several).sum(axis=1)
        alone += (changed & ~several).sum(axis=1)
    return shared / np.maximum(alone, 1)  # type: ignore[no-any-return]


def variation(step: Step, sources: tuple[Named, ...], space: Workspace) -> np.ndarray:
    """The deviation over models at or above which a share of the positions lies whose deviation is not 0; [1]."""
    if step.knobs["select_topk"] >= 1:
        return np.zeros(1, np.float32)
    reader = Reader(step, sources, space)
    varied = sum(int(np.count_nonzero(_deviations(reader, start, stop))) for start, stop in cuts(step))
    wanted = np.array([kept_count(step.knobs["select_topk"], varied)], np.int64)
    if not wanted.any():
        return np.full(1, np.inf, np.float32)
    return _select_by_radix([step], wanted, sources, space, None, _deviations)[0].view(np.float32)


def _deviations(reader: Reader, start: int, stop: int) -> np.ndarray:
    """Bit patterns of the deltas' deviation over models, uint32 [1, n]."""
    deltas = reader.read_deltas(start, stop, reader.read_base(start, stop))
    return deviation(deltas.astype(np.float64)).astype(np.float32).view(np.uint32)[None]  # type: ignore[no-any-return]


def energies(step: Step, sources: tuple[Named, ...], space: Workspace, limit: np.ndarray) -> np.ndarray:
    """Per model the sum of squares of its delta where the deviation reaches the limit [1]; float64 [models]."""
    found = np.zeros(len(step.models), np.float64)
    reader = Reader(step, sources, space)
    for start, stop in cuts(step):
        deltas = reader.read_deltas(start, stop, reader.read_base(start, stop)).astype(np.float64)
        chosen = deviation(deltas).astype(np.float32) >= limit[0] if limit[0] > 0 else slice(None)
        found += np.square(deltas[:, chosen]).sum(axis=1)
    return found


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
def _count_upper(patterns, counts):  # type: ignore[no-untyped-def]
    for i in range(patterns.size):
        counts[patterns[i] >> np.uint32(16)] += 1


@njit(nogil=True, cache=True)
def _count_lower(patterns, bin, counts):  # type: ignore[no-untyped-def]
    for i in range(patterns.size):
        if (patterns[i] >> np.uint32(16)) == bin:
            counts[patterns[i] & np.uint32(0xFFFF)] += 1


@njit(nogil=True, cache=True)
def _count_window(patterns, first, middle, counts):  # type: ignore[no-untyped-def]
    above, equal = np.int64(0), np.int64(0)  # deltas of bfloat16 models tie: `middle` alone may be a tenth of all
    for start in range(0, patterns.size, PART):
        part = patterns[start : start + PART]
        over, reached, same = np.int32(0), np.int32(0), np.int32(0)
        for i in range(part.size):
            place = np.int32(part[i]) - np.int32(first)
            over += np.int32(place >= BINS)
            reached += np.int32(place >= 0)
            same += np.int32(place == middle)
        above += over
        equal += same
        if reached > over + same:  # few parts have another entry in the window
            for i in range(part.size):
                place = np.int32(part[i]) - np.int32(first)
                if 0 <= place < BINS and place != middle:
                    counts[place] += 1
    counts[middle] += equal
    return above


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _dot(left, right):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(left.size):
        total += np.float64(left[i]) * np.float64(right[i])
    return total
