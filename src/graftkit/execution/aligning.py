"""The inputs of a step whose rows another vocabulary puts in another order, opened for reading; and where they go."""

from __future__ import annotations

import math
from collections.abc import Iterator

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.aligned import Averaged, Centroid, Gathered, Joined, Readable, Zeros, packed
from graftkit.checkpoints.headers import ITEMSIZE, TensorInfo
from graftkit.recipes.inputs import Named
from graftkit.recipes.steps import Input, Step


def view_of(part: Input, sources: tuple[Named, ...]) -> tuple[Readable, TensorInfo]:
    """A view of some rows, and what it looks like."""
    source = sources[part.source].source
    info = source.tensors[part.name]
    if part.kind == "zero":
        return Zeros(), packed(info, part.rows.count if part.rows else info.shape[0])
    if part.kind == "joined" and part.rows:
        views = tuple(view_of(one, sources) for one in part.parts)
        counts = tuple(one.rows.count * math.prod(info.shape[1:]) for one in part.parts if one.rows)
        joined = Joined(views, counts)
        return joined, packed(info, part.rows.count, joined.dtype)
    if part.kind == "mean":
        views = tuple(view_of(one, sources) for one in part.parts)
        return Averaged(views), packed(views[0][1], views[0][1].shape[0], "F32")
    if part.kind == "centroid":
        views = tuple(view_of(one, sources) for one in part.parts)
        return Centroid(views, math.prod(info.shape[1:])), packed(info, 1, "F32")
    store: Readable = source.store if isinstance(source, Adapter) else source
    return (store, info) if part.rows is None else (Gathered(store, info, part.rows), packed(info, part.rows.count))


def places(step: Step, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where elements `[start, stop)` of a step belong in its tensor: (element there, first byte here, one after)."""
    size = ITEMSIZE[step.dtype]
    if step.rows is None:
        yield start, 0, (stop - start) * size
        return
    width = step.elements // max(step.rows.count, 1)
    for place, first, count in step.rows.spans(start, stop, width):
        yield place, (first - start) * size, (first - start + count) * size
