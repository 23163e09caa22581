"""One worker's scratch, and how a step's inputs become numbers in it, one block at a time.

The scratch is allocated once and reused, so memory depends on the block, never on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.checkpoints.aligned import Readable
from graftkit.checkpoints.headers import TensorInfo
from graftkit.errors import CheckpointError, NonFiniteError
from graftkit.execution.aligning import view_of
from graftkit.execution.magnitudes import Rescaled, rescaled
from graftkit.methods import Method
from graftkit.methods.random import Keyed
from graftkit.recipes.inputs import Named
from graftkit.recipes.steps import BLOCK, KEPT_MODELS, Input, Step


def cuts(step: Step, grain: str = "") -> Iterator[tuple[int, int]]:
    """The element ranges in which a step is computed: fixed by its shape and its method's grain, by nothing else."""
    grain = grain or step.grain
    row = (
        step.elements // step.shape[0] if len(step.shape) > 1 and step.shape[0] else step.elements
    )  # a vector is one row
    size = BLOCK if grain == "element" else max(1, BLOCK // max(row, 1)) * row if grain == "row" else step.elements
    for start in range(0, step.elements, max(size, 1)):
        yield start, min(start + size, step.elements)


def block_shape(step: Step, start: int, stop: int, grain: str | None = None) -> tuple[int, ...]:
    """The shape in which a method sees a block: flat, whole rows, or the whole tensor, by its grain."""
    grain = grain or methods.get(step.method).grain
    if grain == "tensor" or (grain == "row" and len(step.shape) < 2):
        return step.shape
    return (stop - start,) if grain == "element" else ((stop - start) * step.shape[0] // step.elements, *step.shape[1:])


@dataclass(frozen=True)
class Feed:
    """One input of a step, ready to be read: a tensor on disk, an adapter's low-rank delta, or nothing (`base`)."""

    label: str
    source: Readable | None = None
    info: TensorInfo | None = None
    delta: LowRank | Rescaled | None = None

    def raw(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Bytes of elements `[start, stop)`, unchecked."""
        assert self.info is not None and self.source is not None
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

    def delta_factors(self) -> LowRank:
        """An adapter's delta as its two factors."""
        assert isinstance(self.delta, LowRank)
        return self.delta

    def delta_block(self, start: int, stop: int, base: np.ndarray | None) -> np.ndarray:
        """Elements of an adapter's delta; `base` holds the base's, without which DoRA has none."""
        if isinstance(self.delta, LowRank):
            return self.delta.block(start, stop)
        assert self.delta is not None and base is not None
        return self.delta.block(start, stop, base)


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
    if part.kind in ("mean", "centroid", "zero", "joined") or (part.rows is not None and part.kind == "tensor"):
        return Feed(named.label, *view_of(part, sources))
    if not isinstance(source, Adapter):
        return Feed(named.label, source, source.tensors[part.name])
    if part.kind == "tensor":
        return Feed(named.label, source.store, source.tensors[part.name])
    delta = source.load(part.name, dtype, direction=part.kind == "rescaled")
    if not delta.finite:
        raise non_finite(named.label, source.factors[part.name].b)
    if part.rows is not None:
        delta = replace(delta, left=delta.left[list(part.rows)])
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


Preparation = Callable[[np.ndarray, int, int], None]
"""Changes the deltas [models, n] of elements `[start, stop)`, in place."""


class Reader:
    """The inputs of one step as blocks of numbers, in the step's computing precision, after `prepared`."""

    def __init__(self, step: Step, sources: tuple[Named, ...], space: Workspace) -> None:
        self.step, self.space = step, space
        self.dtype = storage.STORAGE[step.compute]
        self.base = open_feed(step.base, sources, self.dtype) if step.base else None
        self.prepared: tuple[Preparation, ...] = ()
        self.kept: np.ndarray | None = None
        self.kept_base: np.ndarray | None = None
        self.models = tuple(self._open(part, sources) for part in step.models)  # DoRA's read the base

    def then(self, preparation: Preparation) -> Reader:
        """The same inputs with one more preparation, after those that it has."""
        more = copy(self)
        more.prepared, more.kept = (*self.prepared, preparation), None
        return more

    def unprepared(self) -> Reader:
        """The same inputs as they came."""
        plain = copy(self)
        plain.prepared, plain.kept = (), None
        return plain

    def keep_models(self) -> None:
        """Reads the base and the models of a small tensor once for all passes over them, unless it has."""
        anchored = self.base is not None and self.base.info is not None
        count = len(self.models) + anchored
        if self.kept is not None or count * self.step.elements > KEPT_MODELS:
            return
        whole = self.space.stack("kept", count, self.step.elements, self.dtype)
        for start, stop in cuts(self.step, "element"):
            base = self.read_base(start, stop)
            whole[: len(self.models), start:stop] = self.read_models(start, stop, base)
            if base is not None:
                whole[-1, start:stop] = base
        self.kept, self.kept_base = whole[: len(self.models)], whole[-1] if anchored else None

    def _open(self, part: Input, sources: tuple[Named, ...]) -> Feed:
        """A model's feed; an adapter that rescales its base's channels (DoRA) is bound to the step's base."""
        feed, source = open_feed(part, sources, self.dtype), sources[part.source].source
        if part.kind != "rescaled":
            return feed
        assert isinstance(source, Adapter) and isinstance(feed.delta, LowRank)

        def read(start: int, stop: int) -> np.ndarray:
            found = self.read_base(start, stop)
            assert found is not None, "a DoRA adapter needs its base's weights here; this is a bug"
            return found

        return replace(feed, delta=rescaled(source, part.name, feed.delta, read, feed.label))

    def _buffer(self, count: int) -> np.ndarray:
        return self.space.take("raw", count * 8, np.uint8)

    def read_base(self, start: int, stop: int) -> np.ndarray | None:
        """Elements of the base [n], or None where the step needs none."""
        if self.base is None or self.base.info is None:
            return None
        if self.kept_base is not None:
            return self.kept_base[start:stop]
        out = self.space.take("base", stop - start, self.dtype)
        self.base.numbers(start, stop, self._buffer(stop - start), out)
        return out

    def read_deltas(self, start: int, stop: int, base: np.ndarray | None) -> np.ndarray:
        """Tuned minus base of every model, prepared, [models, n]; without a base the models themselves."""
        stack = self.space.stack("deltas", len(self.models), stop - start, self.dtype)
        for feed, row in zip(self.models, stack, strict=True):
            if feed.info is not None:
                feed.numbers(start, stop, self._buffer(stop - start), row, base)
            elif feed.delta is not None:
                row[:] = feed.delta_block(start, stop, base)
            else:
                row[:] = 0
        for prepare in self.prepared:
            prepare(stack, start, stop)
        return stack

    def read_patterns(self, start: int, stop: int) -> np.ndarray:
        """Bit patterns of the deltas as float32, uint32 [models, n]: without the sign ordered as the magnitudes are."""
        deltas = self.read_deltas(start, stop, self.read_base(start, stop))
        return deltas.astype(np.float32, copy=False).view(np.uint32)

    def read_models(self, start: int, stop: int, base: np.ndarray | None) -> np.ndarray:
        """The weights of every model, [models, n]; with preparations the base plus what they leave of its delta."""
        if self.kept is not None:
            stack = self.space.stack("models", len(self.models), stop - start, self.dtype)
            stack[:] = self.kept[:, start:stop]
            return stack
        if self.prepared:
            assert base is not None
            stack = self.space.stack("models", len(self.models), stop - start, self.dtype)
            return np.add(self.read_deltas(start, stop, base), base, out=stack)
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
                row += feed.delta_block(start, stop, base)
        return stack


@dataclass(frozen=True)
class ByRows:
    """What goes by output channel, [models, out, ...]: a block has that of its own rows, each of `row` elements."""

    read: Callable[[int, int], np.ndarray]
    row: int

    def block(self, start: int, stop: int) -> np.ndarray:
        """Of the rows of elements `[start, stop)`."""
        return self.read(start // self.row, -(-stop // self.row))


def inputs_of(method: Method, reader: Reader, start: int, stop: int, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a method reads, for one block, by name; `base` is there whenever the step reads it."""
    base = reader.read_base(start, stop)
    rows = {n: v.block(start, stop) if isinstance(v, ByRows) else v for n, v in statistics.items()}
    given: dict[str, Any] = {"base": base, **rows}
    if "deltas" in method.reads:
        given["deltas"] = reader.read_deltas(start, stop, base)
    if "models" in method.reads:
        given["models"] = reader.read_models(start, stop, base)
    if "rng" in method.reads:
        given["rng"] = Keyed(reader.step.keys, start)
    if "shape" in method.reads:
        given["shape"] = reader.step.shape
    return given
