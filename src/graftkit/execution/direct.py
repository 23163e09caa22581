"""Merges straight into a live parameter: steps that `tiles` can make, from inputs that stay.

Weighted sums, TIES and DARE of adapters, of plain tensors, and of both. What is written is equal to the bit to a merge
to disk and a load, and takes little longer than reading and writing once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import LowRank
from graftkit.execution.apply import numbers_of
from graftkit.execution.blocks import Feed, Reader, Workspace
from graftkit.execution.reductions import Threshold
from graftkit.execution.resident import ResidentCheckpoint
from graftkit.execution.tiles import (
    MOST,
    ROWS,
    STRIP,
    Rule,
    bits_of,
    elected,
    mark_rows,
    marks_for,
    merge_rows,
    weighted,
)
from graftkit.methods import Method
from graftkit.recipes.steps import Step

PART, WHOLE = 1 << 16, 1 << 24
"""Elements that are made together: where inputs or result pass through scratch, so many as the middle cache holds."""

NOTHING = np.empty(0, np.float32)
NO_MARKS = np.empty((0, 0, 0), np.uint64)

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]

READ = {"base", "deltas", "rng", "threshold", "retained"}
"""What a method may read beside its knobs that is the same the next time."""

UNMEASURED = ("weight", "scale", "t", "take")
"""Knobs on which no statistic depends."""

OTHERS = tuple(one.name for one in fields(Step) if one.name not in ("knobs", "group"))
"""All else that a step is; a group is known by its threshold."""


@dataclass(frozen=True)
class Factors:
    """The factors of a step's adapters side by side, `left` [rows, r] and `right` [r, columns]; and by model its rank,
    or -1 for one that is a tensor."""

    left: np.ndarray
    right: np.ndarray
    ranks: np.ndarray

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Of `left`, those of elements `[start, stop)`; without adapters any elements are one row of nothing."""
        columns = self.right.shape[1]
        return self.left[start // columns : stop // columns] if columns else self.left

    def size(self, most: int) -> int:
        """How many elements to make together, not many more than `most`: whole tiles."""
        tile = ROWS * self.right.shape[1]
        return max(most // tile, 1) * tile if tile else most


@dataclass(frozen=True)
class Direct:
    """A step that goes straight into its parameter: a rule on the models' deltas, which `base` is then added to; or
    where `delta` is False on their weights, of which an adapter's are those of `base` and what it adds. `marks` tell
    which values count, by where a block begins and ends."""

    step: Step
    rule: Rule
    factors: Factors
    base: np.ndarray
    plain: tuple[np.ndarray, ...]
    delta: bool
    marks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def by(self, rule: Rule, step: Step) -> Direct:
        """The same inputs by another rule; marks stay where the same values count."""
        marks = self.marks if self.rule.selects_as(rule) else {}
        return Direct(step, rule, self.factors, self.base, self.plain, self.delta, marks)

    def write(self, target: np.ndarray, space: Workspace) -> bool:
        """Fills a parameter, float32 or bits of bfloat16; False where an element is not finite."""
        scratch = any(part.dtype != np.float32 for part in (target, self.base, *self.plain))
        size = self.factors.size(PART if scratch else WHOLE)
        ends = [(start, min(start + size, target.size)) for start in range(0, target.size, size)]
        for other in self.marks.keys() - set(ends):  # another target was cut into other blocks
            del self.marks[other]
        return all(self._block(start, stop, target[start:stop], space) for start, stop in ends)

    def _block(self, start: int, stop: int, target: np.ndarray, space: Workspace) -> bool:
        wide, short = target.dtype == np.float32, self.step.dtype == "BF16" or None
        out = target if wide else space.take("single", target.size, np.float32)
        base = _singles(self.base[start:stop], space, "base")
        plain = tuple(_singles(part[start:stop], space, f"plain {t}") for t, part in enumerate(self.plain)) or (base,)
        inputs = self.factors.rows(start, stop), self.factors.right, self.factors.ranks, base, plain
        count = len(self.factors.ranks)
        near = space.stack("near", count * ROWS, STRIP, self.rule.weights.dtype)
        marks = NO_MARKS if self.rule.plain else self._marked(start, stop, inputs, near)
        headed = (self.delta and self.factors.ranks[0] < 0 and count <= MOST) or None
        settings = headed, bits_of(count), marks, *self.rule.combination, short, out
        finite = merge_rows(*inputs, self.delta or None, near, *settings)
        if not wide:
            storage.narrow_bfloat16(out.view(np.uint32), target)
        return bool(finite)

    def _marked(self, start: int, stop: int, inputs: Inputs, near: np.ndarray) -> np.ndarray:
        """Which values of a block count."""
        if (start, stop) not in self.marks:
            columns, count = self.factors.right.shape[1] or stop - start, len(self.factors.ranks)
            marks = marks_for((stop - start) // columns, columns, count)
            mark_rows(*inputs, self.delta, near, start, columns, bits_of(count), marks, *self.rule.selection)
            self.marks[start, stop] = marks
        return self.marks[start, stop]


def _singles(values: np.ndarray, space: Workspace, purpose: str) -> np.ndarray:
    """Numbers of a file as float32, as they are if they are that; to read, as files are, so that all have one type."""
    if values.dtype != np.float32:
        values, bits = space.take(purpose, values.size, np.float32), values
        storage.widen_bfloat16(bits, values)
    shown = values.view()
    shown.flags.writeable = False
    return shown


@dataclass
class Held:
    """A step as it was made, by what the method read beside blocks, and under which threshold over the model."""

    made: Direct
    given: dict[str, Any]
    threshold: Threshold | None


@dataclass
class Directly:
    """Finds steps that go straight; keeps the stacked factors, which no weight touches, by what a step reads, and of
    every method the steps as they were last, of which mostly only weights are new the next time."""

    kept: dict[str, Factors] = field(default_factory=dict)
    held: dict[tuple[str, str], Held] = field(default_factory=dict)
    inputs: Any = None

    def begin(self, inputs: Any) -> None:
        """Told before each merge what its inputs are: all that was made of others is forgotten."""
        if inputs != self.inputs:
            self.kept.clear()
            self.held.clear()
            self.inputs = inputs

    def again(self, step: Step, threshold: Threshold | None) -> Direct | None:
        """A step that was made before, under the same threshold, with the weights of now."""
        held = self.held.get((step.method, step.key))
        if held is None or held.threshold is not threshold or not _is_reweighted(held.made.step, step):
            return None
        method = methods.get(step.method)
        rule = _rule(method, held.given | numbers_of(method, held.given, step.knobs, len(step.models)), step)
        if rule is None:
            return None
        held.made = held.made.by(rule, step)
        return held.made

    def of(
        self, method: Method, given: dict[str, Any], reader: Reader, key: str, threshold: Threshold | None
    ) -> Direct | None:
        """The step of a reader, with the factors or the ballot in `given`; None where it is more, or where an input is
        no plain resident tensor."""
        step, base = reader.step, reader.base
        plain = not (step.prepare or step.finish or step.rows or step.directions) and step.dtype in ("F32", "BF16")
        feeds = (*([base] if base else []), *reader.models)
        held = all(is_held(feed) for feed in feeds) and (base is None or base.info is not None)
        if not plain or not held or (method.returns_delta and base is None):
            return None
        rule = _rule(method, given, step)
        tensors = all(feed.info is not None for feed in reader.models)
        short = step.dtype == "BF16" and all(feed.info is not None and feed.info.dtype == "BF16" for feed in feeds)
        if rule is None or (short and not method.factors):
            return None  # bits of bfloat16 are voted on in a pass of their own, as in a merge to disk
        own = array_of(base) if base and (method.returns_delta or not tensors) else NOTHING
        arrays = tuple(array_of(feed) for feed in reader.models if feed.info is not None)
        if short and method.returns_delta:  # one sum of base and models
            rest = np.concatenate([[1 - rule.weights.sum()], rule.weights])
            return Direct(step, weighted(rest), _flat([-1] * len(rest)), NOTHING, (own, *arrays), False)
        factors = _flat([-1] * len(arrays)) if tensors else self._stacked(reader, key)
        made = Direct(step, rule, factors, own, arrays, method.returns_delta)
        if method.returns_delta and set(method.reads) <= READ:
            self.held[step.method, step.key] = Held(made, given, threshold)
        return made

    def _stacked(self, reader: Reader, key: str) -> Factors:
        if not any(isinstance(feed.delta, LowRank) for feed in reader.models if feed.info is None):
            return _flat([-1 if feed.info else 0 for feed in reader.models])
        if key not in self.kept:
            pairs = [_pair(feed, reader) for feed in reader.models if feed.info is None]
            left = np.concatenate([pair.left for pair in pairs], axis=1)
            right = np.concatenate([pair.right for pair in pairs])
            ranks = [-1 if feed.info is not None else _pair(feed, reader).left.shape[1] for feed in reader.models]
            self.kept[key] = Factors(left, right, np.array(ranks))
        return self.kept[key]


def _rule(method: Method, given: dict[str, Any], step: Step) -> Rule | None:
    """What the method does with the models; None where it is not told, or by other numbers than the compiled twin."""
    if method.factors:
        return weighted(given["factors"]) if step.compute == "F64" else None
    if not method.ballot or not method.kernel or step.knobs.get("normalize") or (given["retained"] != 1).any():
        return None
    rule = elected(given["ballot"], step.keys, storage.STORAGE[step.compute])
    return rule if np.isfinite(rule.gains).all() else None


def _is_reweighted(old: Step, new: Step) -> bool:
    """Whether nothing but weights, and what else no statistic depends on, is new."""
    knobs = old.knobs.keys() | new.knobs.keys()
    alike = all(old.knobs.get(name) == new.knobs.get(name) for name in knobs if name not in UNMEASURED)
    return alike and all(getattr(old, name) == getattr(new, name) for name in OTHERS)


def is_held(feed: Feed) -> bool:
    """Whether all of an input is in memory: a tensor of a mapped file, or an adapter's factors."""
    if feed.info is None:
        return feed.delta is None or isinstance(feed.delta, LowRank)
    return isinstance(feed.source, ResidentCheckpoint) and feed.info.dtype in ("F32", "BF16")


def array_of(feed: Feed) -> np.ndarray:
    """A tensor as it lies in its mapped file, flat."""
    assert isinstance(feed.source, ResidentCheckpoint) and feed.info is not None
    return feed.source.array(feed.info)


def _pair(feed: Feed, reader: Reader) -> LowRank:
    """An adapter's factors; none where it leaves the tensor alone."""
    if isinstance(feed.delta, LowRank):
        return feed.delta
    rows, columns = reader.step.shape[0], reader.step.elements // max(reader.step.shape[0], 1)
    return LowRank(np.zeros((rows, 0), reader.dtype), np.zeros((0, columns), reader.dtype))


def _flat(ranks: list[int]) -> Factors:
    """Tensors, and adapters that leave them alone, without factors."""
    return Factors(np.empty((1, 0)), np.empty((0, 0)), np.array(ranks))
