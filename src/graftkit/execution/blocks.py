"""One worker's scratch, and how a step's inputs become numbers in it, one block at a time.

The scratch is allocated once and reused, so memory depends on the block, never on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.resolve import Source
from graftkit.errors import CheckpointError, NonFiniteError
from graftkit.methods import Method
from graftkit.methods.random import Keyed
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import BLOCK, Input, Step


def cuts(step: Step) -> Iterator[tuple[int, int]]:
    """The element ranges in which a step is computed: fixed by its shape and its method's grain, by nothing else."""
    grain = methods.get(step.method).grain if step.method else "element"
    row = (
        step.elements // step.shape[0] if len(step.shape) > 1 and step.shape[0] else step.elements
    )  # a vector is one row
    size = BLOCK if grain == "element" else max(1, BLOCK // max(row, 1)) * row if grain == "row" else step.elements
    for start in range(0, step.elements, max(size, 1)):
        yield start, min(start + size, step.elements)


def block_shape(step: Step, start: int, stop: int) -> tuple[int, ...]:
    """The shape in which a method sees a block: flat, whole rows, or the whole tensor, by its grain."""
    grain = methods.get(step.method).grain
    if grain == "tensor" or (grain == "row" and len(step.shape) < 2):
        return step.shape
    return (stop - start,) if grain == "element" else ((stop - start) * step.shape[0] // step.elements, *step.shape[1:])


@dataclass(frozen=True)
class Feed:
    """One input of a step, ready to be read: a tensor on disk, an adapter's low-rank delta, or nothing (`base`)."""

    label: str
    source: Source | None = None
    info: TensorInfo | None = None
    delta: LowRank | None = None

    def raw(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Bytes of elements `[start, stop)`, unchecked."""
        assert self.info is not None and self.source is not None and not isinstance(self.source, Adapter)
        return self.source.read(self.info, start, stop, buffer)

    def numbers(
        self, start: int, stop: int, buffer: np.ndarray, out: np.ndarray, minus: np.ndarray | None = None
    ) -> None:
        """Elements as numbers into `out`, less `minus`; refuses NaN and infinity by model and tensor."""
        assert self.info is not None
        raw, dtype = self.raw(start, stop, buffer), self.info.dtype
        good = storage.widen(raw, dtype, out) if minus is None else storage.subtract(raw, dtype, minus, out)
        if not good:
            raise non_finite(self.label, self.info)


def non_finite(label: str, info: TensorInfo) -> NonFiniteError:
    """The error for a broken input."""
    return NonFiniteError(
        f"{label}: tensor {info.name!r} in {info.file} holds NaN or infinity; the model is broken, leave it out"
    )


def open_feed(part: Input, sources: tuple[Named, ...], dtype: Any) -> Feed:
    """Opens one input; an adapter's factors are loaded whole, in `dtype`."""
    named = sources[part.source]
    source = named.source
    if part.kind == "base":
        return Feed(named.label)
    if not isinstance(source, Adapter):
        return Feed(named.label, source, source.tensors[part.name])
    if part.kind == "tensor":
        return Feed(named.label, source.store, source.tensors[part.name])
    delta = source.load(part.name, dtype)
    if not (np.isfinite(delta.left).all() and np.isfinite(delta.right).all()):
        raise non_finite(named.label, source.factors[part.name].b)
    return Feed(named.label, delta=delta)


@dataclass
class Workspace:
    """Reused buffers of one worker, by purpose."""

    buffers: dict[tuple[str, Any], np.ndarray] = field(default_factory=dict)

    def take(self, purpose: str, size: int, dtype: Any) -> np.ndarray:
        """`size` elements of a buffer that later calls for the same purpose will overwrite."""
        held = self.buffers.get((purpose, dtype))
        if held is None or held.size < size:
            held = self.buffers[purpose, dtype] = np.empty(size, dtype)
        return held[:size]

    def stack(self, purpose: str, count: int, size: int, dtype: Any) -> np.ndarray:
        """As `take`, [count, size]."""
        return self.take(purpose, count * size, dtype).reshape(count, size)


class Reader:
    """The inputs of one step as blocks of numbers, in the step's computing precision."""

    def __init__(self, step: Step, sources: tuple[Named, ...], space: Workspace) -> None:
        self.step, self.space = step, space
        self.dtype = storage.compute_dtype(step.dtype)
        self.base = open_feed(step.base, sources, self.dtype) if step.base else None
        self.models = tuple(open_feed(part, sources, self.dtype) for part in step.models)

    def _buffer(self, count: int) -> np.ndarray:
        return self.space.take("raw", count * 8, np.uint8)

    def read_base(self, start: int, stop: int) -> np.ndarray | None:
        """Elements of the base [n], or None where the step needs none."""
        if self.base is None or self.base.info is None:
            return None
        out = self.space.take("base", stop - start, self.dtype)
        self.base.numbers(start, stop, self._buffer(stop - start), out)
        return out

    def read_deltas(self, start: int, stop: int, base: np.ndarray | None) -> np.ndarray:
        """Tuned minus base of every model, [models, n]; the models themselves where the step has no base."""
        stack = self.space.stack("deltas", len(self.models), stop - start, self.dtype)
        for feed, row in zip(self.models, stack, strict=True):
            if feed.info is not None:
                feed.numbers(start, stop, self._buffer(stop - start), row, base)
            elif feed.delta is not None:
                row[:] = feed.delta.block(start, stop)
            else:
                row[:] = 0
        return stack

    def read_patterns(self, start: int, stop: int) -> np.ndarray:
        """Bit patterns of the deltas' float32 magnitudes, uint32 [models, n]: ordered as the magnitudes are."""
        deltas = self.read_deltas(start, stop, self.read_base(start, stop))
        patterns = deltas.astype(np.float32, copy=False).view(np.uint32)
        return np.bitwise_and(patterns, np.uint32(0x7FFFFFFF), out=patterns)

    def read_models(self, start: int, stop: int, base: np.ndarray | None) -> np.ndarray:
        """The weights of every model, [models, n]."""
        stack = self.space.stack("models", len(self.models), stop - start, self.dtype)
        for feed, row in zip(self.models, stack, strict=True):
            if feed.info is not None:
                feed.numbers(start, stop, self._buffer(stop - start), row)
                continue
            if base is None:
                raise CheckpointError(
                    f"{feed.label}: an adapter needs its base's weights here, and the step has none; this is a bug"
                )
            row[:] = base
            if feed.delta is not None:
                row += feed.delta.block(start, stop)
        return stack


def inputs_of(
    method: Method, reader: Reader, start: int, stop: int, statistics: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Everything that a method reads, for one block, by name; `base` is there whenever the step reads it."""
    base = reader.read_base(start, stop)
    given: dict[str, Any] = {"base": base, **statistics}
    if "deltas" in method.reads:
        given["deltas"] = reader.read_deltas(start, stop, base)
    if "models" in method.reads:
        given["models"] = reader.read_models(start, stop, base)
    if "rng" in method.reads:
        given["rng"] = Keyed(reader.step.keys, start)
    return given
