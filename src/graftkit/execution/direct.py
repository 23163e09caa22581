"""Merges straight into a live parameter: steps that `tiles` can make, from inputs that stay.

Weighted sums, TIES and DARE of adapters, of plain tensors, and of both. What is written is equal to the bit to a merge
to disk and a load, and takes little longer than reading and writing once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.adapters import LowRank
from graftkit.execution.apply import refusing
from graftkit.execution.blocks import Feed, Reader, Workspace
from graftkit.execution.resident import ResidentCheckpoint
from graftkit.execution.tiles import ROWS, Rule, elected, merge_rows, sum_rows, weighted
from graftkit.methods import Method
from graftkit.recipes.steps import Step

PART, WHOLE = 1 << 15, 1 << 24
"""Elements that are made together: where inputs or result pass through scratch, so many as the middle cache holds."""

NOTHING = np.empty(0, np.float32)


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
    where `delta` is False on their weights, of which an adapter's are those of `base` and what it adds."""

    step: Step
    rule: Rule
    factors: Factors
    base: np.ndarray
    plain: tuple[np.ndarray, ...]
    delta: bool

    def write(self, target: np.ndarray, space: Workspace) -> bool:
        """Fills a parameter, float32 or bits of bfloat16; False where an element is not finite."""
        scratch = len(self.plain) > 1 or any(part.dtype != np.float32 for part in (target, self.base, *self.plain))
        size = self.factors.size(PART if scratch else WHOLE)
        ends = ((start, min(start + size, target.size)) for start in range(0, target.size, size))
        return all(self._block(start, stop, target[start:stop], space) for start, stop in ends)

    def _block(self, start: int, stop: int, target: np.ndarray, space: Workspace) -> bool:
        wide, short = target.dtype == np.float32, self.step.dtype == "BF16"
        out = target if wide else space.take("single", target.size, np.float32)
        base, stack = _singles(self.base[start:stop], space), self._stack(start, stop, space)
        factors = self.factors.rows(start, stop), self.factors.right, self.factors.ranks
        if self.delta and self.rule.plain:
            finite = sum_rows(*factors, base, stack, short, out, self.rule.weights)
        else:
            adapters = int((self.factors.ranks >= 0).sum())
            near = space.stack("near", adapters * ROWS, self.factors.right.shape[1], self.rule.weights.dtype)
            finite = merge_rows(*factors, base, stack, self.delta, start, short, near, out, *self.rule.values)
        if not wide:
            storage.narrow_bfloat16(out.view(np.uint32), target)
        return bool(finite)

    def _stack(self, start: int, stop: int, space: Workspace) -> np.ndarray:
        """Elements of the plain tensors, float32 [plain, n]; a sole one as it lies in its file."""
        if len(self.plain) == 1 and self.plain[0].dtype == np.float32:
            return self.plain[0][None, start:stop]
        stack = space.stack("plain", len(self.plain), stop - start, np.float32)
        for part, row in zip(self.plain, stack, strict=True):
            _widen(part[start:stop], row)
        return stack


def _singles(values: np.ndarray, space: Workspace) -> np.ndarray:
    """Numbers of a file as float32, as they are if they are that."""
    if values.dtype == np.float32:
        return values
    out = space.take("below", values.size, np.float32)
    _widen(values, out)
    return out


def _widen(values: np.ndarray, out: np.ndarray) -> None:
    """Numbers of a file as float32, which holds them all."""
    if values.dtype == np.float32:
        np.copyto(out, values)
    else:
        storage.widen_bfloat16(values, out)


@dataclass
class Directly:
    """Finds steps that go straight; keeps the stacked factors, which no weight touches, by what a step reads, and
    weighted sums, of which only the weights are new the next time."""

    kept: dict[str, Factors] = field(default_factory=dict)
    sums: dict[str, Direct] = field(default_factory=dict)
    prints: list[str] = field(default_factory=list)

    def begin(self, prints: list[str]) -> None:
        """Told of the inputs' fingerprints before each merge: sums of others are forgotten."""
        if prints != self.prints:
            self.sums.clear()
            self.prints = prints

    def again(self, step: Step) -> Direct | None:
        """A weighted sum of deltas that was made before, with the knobs of now."""
        held = self.sums.get(step.key)
        if held is None or replace(held.step, knobs=step.knobs) != step:
            return None
        method = methods.get(step.method)
        factors = refusing(method, lambda: method.factors_of({}, step.knobs, len(step.models)))
        return replace(held, step=step, rule=weighted(factors))

    def of(self, method: Method, given: dict[str, Any], reader: Reader, key: str) -> Direct | None:
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
            return Direct(step, weighted(rest), _flat(len(rest)), NOTHING, (own, *arrays), False)
        factors = _flat(len(arrays)) if tensors else self._stacked(reader, key)
        made = Direct(step, rule, factors, own, arrays, method.returns_delta)
        if method.factors and method.returns_delta and set(method.reads) <= {"base", "deltas"}:
            self.sums[step.key] = made
        return made

    def _stacked(self, reader: Reader, key: str) -> Factors:
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
    return elected(given["ballot"], step.keys, storage.STORAGE[step.compute])


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


def _flat(count: int) -> Factors:
    """Tensors alone, without factors."""
    return Factors(np.empty((1, 0)), np.empty((0, 0)), np.full(count, -1))
