"""Statistics of scope tensor and model, made in fixed blocks: exact thresholds by radix selection, norms and dots.

The k-th largest magnitude is found without sorting or keeping anything: the bit patterns of non-negative floats are
ordered like the floats, so one pass counts the upper 16 bits, which fixes the bin that holds the k-th, and a second
pass counts the lower 16 bits within that bin. A large tensor takes one pass: a sample of its blocks says where the k-th
should lie, and the pass counts what is above a window of 65536 patterns around that place, and each pattern within. The
counts tell whether the k-th is there; where it is not, the two passes follow. All counts are exact integers, so
neither the sample nor the order of workers changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.compiling import reassociated
from graftkit.execution import signals
from graftkit.execution.blocks import Reader, Workspace, block_shape, cuts, inputs_of
from graftkit.execution.counting import BINS, Read, Window, count, sample
from graftkit.methods import Method
from graftkit.methods.parts import band_ranks, deviation, kept_count, spread
from graftkit.recipes.steps import Step

SAMPLE = 4  # blocks that place the window


@dataclass(frozen=True)
class Threshold:
    """Per model the magnitude at or above which entries are kept, and the share that this keeps."""

    values: np.ndarray
    density: tuple[float, ...]


def statistics_of(
    method: Method, knobs: Mapping[str, Any], reader: Reader, known: Threshold | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a method reads beside blocks, and what the record should say of it; `known` is from a stage before."""
    found: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    if "threshold" in method.statistics:
        shares = densities(knobs, len(reader.models))
        threshold = known or select([reader.step], shares, lambda *_: reader, reader.space)
        found["threshold"] = threshold.values
        notes["density"] = list(threshold.density)
    if "norms" in method.statistics or "dots" in method.statistics:
        dots = inner_products(reader, "deltas" in method.reads)
        found |= {"dots": dots, "norms": np.sqrt(np.diagonal(dots))}
    if "band" in method.statistics:
        found["band"], notes["density"] = band(reader, knobs)
    if "overlap" in method.statistics:
        found["overlap"] = overlap(reader, knobs)
    if "variation" in method.statistics:
        found["variation"], notes["select_topk"] = variation(reader, knobs)
    if "energies" in method.statistics:
        found["energies"] = energies(reader, found["variation"])
    if "retained" in method.statistics:
        found["retained"] = retained(method, knobs, reader, found)
    more, told = signals.measured(method, knobs, reader)
    found, notes = found | more, notes | told
    return found, notes


def densities(knobs: Mapping[str, Any], models: int, knob: str = "density") -> tuple[float, ...]:
    """A share that is a knob, one value per model."""
    return tuple(spread(knobs[knob], models).tolist())


Open = Callable[[Step, Workspace], Reader]
"""Opens the inputs of a step, with the preparations that come before the statistic."""


Spread = Callable[[Callable[[Step, Workspace], np.ndarray], Sequence[Step]], Iterable[np.ndarray]]
"""Runs a function on every step, on any number of workers, and yields its results."""


def select(
    steps: Sequence[Step], density: Sequence[float], opening: Open, space: Workspace, spread: Spread | None = None
) -> Threshold:
    """The exact threshold of each model over all `steps` together."""
    elements = sum(step.elements for step in steps)
    wanted = np.array([kept_count(share, elements) for share in density], np.int64)
    open_models = (wanted > 0) & (wanted < elements)  # density 0 keeps nothing, density 1 everything: no k-th to find
    bits, kept = np.zeros(len(wanted), np.uint32), np.zeros(len(wanted), np.int64)
    if open_models.any():
        target = np.clip(wanted, 1, max(elements - 1, 1))
        alone = spread is None and len(steps) == 1
        found = _select_by_window(opening(steps[0], space), target) if alone else None
        bits, _, kept = found or _select_by_radix(_over(steps, opening, space, spread), target)
    edge = np.where(wanted == 0, np.float32(np.inf), np.float32(0))
    values = np.where(open_models, bits.view(np.float32), edge).astype(np.float32)
    shares = np.where(open_models, kept / max(elements, 1), (wanted > 0).astype(np.float64))
    return Threshold(values, tuple(shares.tolist()))


Selected = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Per row of what was read: bit pattern of the k-th value, how many are above it, how many at or above it."""


Counted = Callable[[Window], np.ndarray]
"""How many entries of each row lie at each place of a window, [rows, BINS]."""


def _over(
    steps: Sequence[Step],
    opening: Open,
    space: Workspace,
    spread: Spread | None = None,
    read: Read = Reader.read_patterns,
) -> Counted:
    """Counts over all of the steps."""
    run: Spread = spread or (lambda work, todo: (work(step, space) for step in todo))

    def counted(window: Window) -> np.ndarray:
        counts = run(lambda step, scratch: count(opening(step, scratch), window, read), steps)
        return np.asarray(sum(counts))[:, 1:]  # one after another: those of all steps may not fit in memory

    return counted


def _select_by_radix(counted: Counted, wanted: np.ndarray) -> Selected:
    """The k-th value of each row of what is counted; two passes."""
    bins, above = _locate(counted(Window.at(np.zeros(len(wanted)), shift=16)), wanted)
    low = counted(Window.at(bins << 16))
    rest, over = _locate(low, wanted - above)
    bits = (bins.astype(np.uint32) << np.uint32(16)) | rest.astype(np.uint32)
    return bits, above + over, above + over + low[np.arange(len(wanted)), rest]


def _select_by_window(reader: Reader, wanted: np.ndarray) -> Selected | None:
    """As `_select_by_radix` for one tensor, in one pass; None where it is small, or where the window missed."""
    blocks = list(cuts(reader.step))
    if len(blocks) < 2 * SAMPLE:
        return None
    chosen = [blocks[k * (len(blocks) - 2) // (SAMPLE - 1)] for k in range(SAMPLE)]  # all but the last block are full
    size = sum(stop - start for start, stop in chosen)
    places = np.clip(wanted * size // reader.step.elements, 1, size)
    sampled, _, _ = _select_by_radix(sample(reader, chosen), places)
    middle = sampled.astype(np.int64)
    first = np.maximum(middle - BINS // 2, 0)
    found = count(reader, Window(0, first, middle - first))
    above, counts = found[:, 0], found[:, 1:]
    if (above >= wanted).any() or (above + counts.sum(axis=1) < wanted).any():
        return None
    place, over = _locate(counts, wanted - above)
    return (first + place).astype(np.uint32), above + over, above + over + counts[np.arange(len(wanted)), place]


def _locate(counts: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per model the bin that holds the `wanted`-th largest, and how many lie in the bins above it."""
    from_top = np.cumsum(counts[:, ::-1], axis=1)
    places = np.array([int(np.searchsorted(row, k)) for row, k in zip(from_top, np.maximum(wanted, 1), strict=True)])
    places = np.minimum(places, BINS - 1)
    above = np.array([row[p - 1] if p else 0 for row, p in zip(from_top, places, strict=True)], np.int64)
    return BINS - 1 - places, above


def band(reader: Reader, knobs: Mapping[str, Any]) -> tuple[np.ndarray, list[float]]:
    """Smallest and largest magnitude that breadcrumbs keep, float32 [2, models], and the share that this keeps."""
    models = len(reader.models)
    shares = zip(densities(knobs, models), densities(knobs, models, "outliers"), strict=True)
    ranks = np.array([band_ranks(*pair, reader.step.elements) for pair in shares], np.int64).T
    (lower, _, reached), (upper, removed, _) = (_of_rank(reader, wanted) for wanted in ranks)
    return np.stack([lower, upper]), ((reached - removed) / max(reader.step.elements, 1)).tolist()


def _of_rank(reader: Reader, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per model the magnitude of a rank, counted from 1 at the largest, how many are above and how many reach it.

    Rank 0 is infinity, which none reaches.
    """
    found, above, reached = np.full(len(wanted), np.inf, np.float32), np.zeros_like(wanted), np.zeros_like(wanted)
    if wanted.any():
        target = np.maximum(wanted, 1)
        made = _select_by_window(reader, target)
        bits, *counts = made or _select_by_radix(_over([reader.step], lambda *_: reader, reader.space), target)
        found = np.where(wanted > 0, bits.view(np.float32), found)
        above, reached = (np.where(wanted > 0, count, 0) for count in counts)
    return found, above, reached


def overlap(reader: Reader, knobs: Mapping[str, Any]) -> np.ndarray:
    """Per model how many of its changed entries others change too, over how many it changes alone; float64 [models]."""
    shared, alone = np.zeros(len(reader.models), np.int64), np.zeros(len(reader.models), np.int64)
    for start, stop in cuts(reader.step):
        changed = np.abs(reader.read_deltas(start, stop, reader.read_base(start, stop))) > knobs["epsilon"]
        several = changed.sum(axis=0) > 1
        shared += (changed & several).sum(axis=1)
        alone += (changed & ~several).sum(axis=1)
    return shared / np.maximum(alone, 1)  # type: ignore[no-any-return]


def variation(reader: Reader, knobs: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """The deviation at or above which a share of the positions with any deviation lies, [1]; and that share."""
    if knobs["select_topk"] >= 1:
        return np.zeros(1, np.float32), 1.0
    varied = sum(int(np.count_nonzero(_deviations(reader, start, stop))) for start, stop in cuts(reader.step))
    wanted = np.array([kept_count(knobs["select_topk"], varied)], np.int64)
    if not wanted.any():
        return np.full(1, np.inf, np.float32), 0.0
    bits, _, reached = _select_by_radix(
        _over([reader.step], lambda *_: reader, reader.space, None, _deviations), wanted
    )
    return bits.view(np.float32), float(reached[0]) / varied


def _deviations(reader: Reader, start: int, stop: int) -> np.ndarray:
    """Bit patterns of the deltas' deviation over models, uint32 [1, n]."""
    deltas = reader.read_deltas(start, stop, reader.read_base(start, stop))
    return deviation(deltas.astype(np.float64)).astype(np.float32).view(np.uint32)[None]  # type: ignore[no-any-return]


def energies(reader: Reader, limit: np.ndarray) -> np.ndarray:
    """Per model the mean square of its delta, 0 where the deviation is below the limit [1]; float64 [models]."""
    found = np.zeros(len(reader.models), np.float64)
    for start, stop in cuts(reader.step):
        deltas = reader.read_deltas(start, stop, reader.read_base(start, stop)).astype(np.float64)
        chosen = deviation(deltas).astype(np.float32) >= limit[0] if limit[0] > 0 else slice(None)
        found += np.square(deltas[:, chosen]).sum(axis=1)
    return found / max(reader.step.elements, 1)  # type: ignore[no-any-return]


def retained(method: Method, knobs: Mapping[str, Any], reader: Reader, found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Per model the share of its delta's L1 norm that the method's sparsifier leaves; 1 where it is not to be restored.

    Where nothing is left there is nothing to restore, and the share is 1.
    """
    before, after = np.zeros(len(reader.models)), np.zeros(len(reader.models))
    if method.restores_norms(knobs):
        for start, stop in cuts(reader.step):
            given = inputs_of(method, reader, start, stop, dict(found))
            before += [_l1(row) for row in given["deltas"]]
            after += [_l1(row) for row in _sparse(method, knobs, given, block_shape(reader.step, start, stop))]
    return np.where(after > 0, after, 1.0) / np.where(after > 0, before, 1.0)  # type: ignore[no-any-return]


def _sparse(method: Method, knobs: Mapping[str, Any], given: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """A block of the deltas after the method's sparsifier, flat [models, n]; the block may be overwritten."""
    if method.compiled:
        return method.sparse(given, knobs, compiled=True)  # type: ignore[no-any-return]
    import torch

    with torch.inference_mode():
        tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
        tensors["deltas"] = tensors["deltas"].reshape(-1, *shape)
        return method.sparse(tensors, knobs).reshape(len(given["deltas"]), -1).numpy()  # type: ignore[no-any-return]


def inner_products(reader: Reader, of_deltas: bool) -> np.ndarray:
    """Inner products of the models' deltas or tensors, float64 [models, models]; blocks are added in their order."""
    count = len(reader.models)
    dots = np.zeros((count, count), np.float64)
    for start, stop in cuts(reader.step):
        base = reader.read_base(start, stop)
        stack = reader.read_deltas(start, stop, base) if of_deltas else reader.read_models(start, stop, base)
        for i in range(count):
            for j in range(i, count):
                dots[i, j] += dot(stack[i], stack[j])
    return np.triu(dots) + np.triu(dots, 1).T


@dataclass(frozen=True)
class Group:
    """Steps that share a model-scope threshold: of their method, or of their preparation number `level`."""

    name: str
    level: int | None
    density: tuple[float, ...]
    steps: list[Step]


def groups_of(steps: Iterable[Step]) -> list[Group]:
    """The groups in the order in which they can be made: first preparations come first, methods last."""
    found: dict[str, Group] = {}
    for step in steps:
        levels = [(k, applied.group, applied.knobs) for k, applied in enumerate(step.prepare)]
        for level, name, knobs in (*levels, (None, step.group, step.knobs)):
            if name:
                group = Group(name, level, densities(knobs, len(step.models)), [])
                found.setdefault(name, group).steps.append(step)
    return sorted(found.values(), key=lambda group: math.inf if group.level is None else group.level)


@reassociated
def _l1(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(values.size):
        total += np.float64(abs(values[i]))
    return total


@reassociated
def dot(left: np.ndarray, right: np.ndarray) -> float:
    """The inner product of two blocks, added in float64."""
    total = 0.0
    for i in range(left.size):
        total += np.float64(left[i]) * np.float64(right[i])
    return total
