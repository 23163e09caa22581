"""The steps of a live merge: from inputs that stay straight into parameters, on all workers.

What no weight changes (thresholds of a density, norms, dots) is found once and kept for the next merge.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.headers import ITEMSIZE
from graftkit.errors import CheckpointError
from graftkit.execution import adapters, coefficients, gating, measured, reductions
from graftkit.execution.aligning import places
from graftkit.execution.apply import apply, numbers_of
from graftkit.execution.blending import fused_of
from graftkit.execution.blocks import Reader, Workspace, block_shape, cuts, inputs_of, non_finite, open_feed
from graftkit.execution.casting import Tally, cast
from graftkit.execution.direct import UNMEASURED, Directly, array_of, is_held
from graftkit.execution.finishing import Block, finished
from graftkit.execution.module import tensor_of
from graftkit.execution.preparing import opened
from graftkit.execution.reductions import Threshold
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step

if TYPE_CHECKING:
    from torch import Tensor

REMEMBERED = 1 << 14
"""Statistics of tensors that are kept, at most; they are few numbers each."""

Target = Callable[[Step], "Tensor | None"]
"""The tensor that a step's result is written into, whole; None for one that has no place."""


class LiveSteps:
    """Carries out plans, one after another, and remembers their statistics."""

    def __init__(self, workers: int) -> None:
        self._local, self._workers = threading.local(), workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="live")
        self.forget()

    def forget(self) -> None:
        """Leaves nothing of what was found before, as is right where an input has been written to."""
        self._statistics: dict[str, dict[str, Any]] = {}
        self._thresholds: dict[str, Threshold] = {}
        self._directly = Directly()

    def close(self) -> None:
        """Ends the threads, and lets go of what was kept."""
        self._pool.shutdown()
        self.forget()

    def carry_out(self, planned: Plan, target: Target) -> Plan:
        """Writes every step's result; returns the plan with numbers in place of rules."""
        planned = coefficients.resolved(planned, self._coefficients(planned))
        self._directly.begin([_identity(named) for named in planned.sources])
        known: dict[str, Threshold] = {}
        for group in reductions.groups_of(planned.steps):
            known[group.name] = self._threshold(group, planned, known)
        self._each(lambda step: self._write(step, planned, known, target(step)), planned.steps)
        return planned

    @property
    def _space(self) -> Workspace:
        """This thread's scratch."""
        if not hasattr(self._local, "space"):
            self._local.space = Workspace()
            _one_thread()
        return self._local.space  # type: ignore[no-any-return]

    def _each(self, work: Callable[[Step], Any], steps: Any) -> list[Any]:
        """Does something for every step on all workers, the largest first, in no order; the first error is raised."""
        todo = iter(sorted(steps, key=lambda step: -step.elements))

        def run() -> list[Any]:
            try:
                return [work(step) for step in todo]
            finally:
                deque(todo, 0)  # after an error nobody goes on

        futures = [self._pool.submit(run) for _ in range(self._workers)]
        try:
            return [one for future in futures for one in future.result()]
        finally:
            deque(todo, 0)

    def _coefficients(self, planned: Plan) -> coefficients.Found:
        """The numbers of rules such as `{from: metagpt}`."""
        steps = coefficients.users(planned.steps)
        squares = self._each(lambda s: (s.key, coefficients.squares(s, planned.sources, self._space)), steps)
        return coefficients.found(steps, dict(squares), len(planned.recipe.models)) if steps else {}

    def _threshold(self, group: reductions.Group, planned: Plan, known: Mapping[str, Threshold]) -> Threshold:
        """A threshold over the model; found once for its steps, their inputs, and what was done to these before."""
        before = [_prepared(step, known, group.level) for step in group.steps]
        key = repr((group.density, [_inputs(step, planned) for step in group.steps], before))
        if key not in self._thresholds:
            self._thresholds[key] = reductions.select(
                group.steps,
                group.density,
                lambda step, space: opened(step, planned.sources, space, known, group.level)[0],
                Workspace(),
                lambda work, steps: self._each(lambda step: work(step, self._space), steps),
            )
        return self._thresholds[key]

    def _measured(self, step: Step, planned: Plan, reader: Reader, known: Mapping[str, Threshold]) -> dict[str, Any]:
        """What the method reads beside blocks."""
        method = methods.get(step.method)
        if not method.statistics:
            return {}
        knobs = {name: value for name, value in step.knobs.items() if name not in UNMEASURED}
        threshold = known.get(step.group)
        shared = None if threshold is None else threshold.values.tolist()
        key = repr((step.key, step.method, knobs, shared, step.keys, _inputs(step, planned), _prepared(step, known)))
        held = self._statistics.get(key)
        if held is None:
            found, _ = reductions.statistics_of(method, step.knobs, reader, threshold)
            if not all(isinstance(value, np.ndarray) for value in found.values()):
                return found  # what is read by rows reads through this thread's scratch
            held = found
            if len(self._statistics) >= REMEMBERED:
                self._statistics.clear()
            self._statistics[key] = held
        return dict(held)

    def _found(self, step: Step, planned: Plan, reader: Reader, known: Mapping[str, Threshold]) -> dict[str, Any]:
        """All that the method reads beside blocks."""
        method = methods.get(step.method)
        found = self._measured(step, planned, reader, known) | gating.read(method, step, planned.gates)
        found |= measured.read(step, planned.statistics, reader)
        return found | numbers_of(method, found, step.knobs, len(step.models))

    def _write(self, step: Step, planned: Plan, known: Mapping[str, Threshold], target: Tensor | None) -> None:
        """One step's result into its parameter."""
        if target is None:
            return
        place = Place(step, target)
        if not step.method:
            return _copy(step, planned, place, self._space)
        threshold = known.get(step.group)
        again, view = self._directly.again(step, threshold), place.view
        if again and view is not None and again.write(view, self._space):
            return None
        method = methods.get(step.method)
        reader, _ = opened(step, planned.sources, self._space, known)
        found = {} if step.directions else self._found(step, planned, reader, known)
        direct = self._directly.of(method, found, reader, repr(_inputs(step, planned)), threshold)
        if direct and view is not None and direct.write(view, self._space):
            return None
        here = adapters.on_core(planned, reader, "cpu") if step.directions else partial(_merged, reader, found)
        merged, tally = finished(here, reader, "cpu"), Tally()
        fused = fused_of(method, found, reader)
        for start, stop in cuts(step):
            if fused:
                place.put(start, stop, fused.block(start, stop, tally))
                continue
            result, base, is_delta = merged(start, stop)
            raw = cast(result, base, is_delta, step.dtype, tally, self._space, f"tensor {step.name!r}")
            place.put(start, stop, raw)
        return None


def _identity(named: Named) -> tuple[str, str]:
    """An input: its content, of which not every byte was looked at, and where it lies."""
    return named.fingerprint, str(named.source.directory)


def _inputs(step: Step, planned: Plan) -> Any:
    """What a step reads, by content and place, and in which precision."""
    return (
        step.key,
        step.compute,
        [(_identity(planned.sources[part.source]), part) for part in (step.base, *step.models) if part],
    )


def _prepared(step: Step, known: Mapping[str, Threshold], upto: int | None = None) -> Any:
    """What is done to a step's deltas first."""
    shared = {applied.group: known[applied.group].values.tolist() for applied in step.prepare[:upto] if applied.group}
    return [(applied.name, dict(applied.knobs), applied.keys) for applied in step.prepare[:upto]], shared


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _merged(reader: Reader, statistics: dict[str, Any], start: int, stop: int) -> Block:
    """The method's result for elements `[start, stop)` of a tensor."""
    step, method = reader.step, methods.get(reader.step.method)
    given = inputs_of(method, reader, start, stop, statistics)
    result = apply(method, given, step.knobs, block_shape(step, start, stop), "cpu", reader.space)
    return result, given["base"], method.returns_delta and given["base"] is not None


@dataclass(frozen=True)
class Place:
    """A parameter, as a step fills it."""

    step: Step
    target: Tensor

    @property
    def view(self) -> np.ndarray | None:
        """Its memory, where a sum can be written right into it: float32, or the bits of bfloat16."""
        import torch

        whole, kind = self.step.rows is None and self.target.is_contiguous(), self.target.dtype
        if not whole or self.target.device.type != "cpu" or kind not in (torch.float32, torch.bfloat16):
            return None
        held = self.target.detach()
        return (held if kind == torch.float32 else held.view(torch.uint16)).numpy().reshape(-1)  # type: ignore[no-any-return]

    def put(self, start: int, stop: int, raw: np.ndarray) -> None:
        """Elements `[start, stop)` of the step, as bytes of its dtype."""
        flat = self.target.detach().view(-1)
        for first, begin, end in places(self.step, start, stop):
            values = tensor_of(raw[begin:end], self.step.dtype)
            flat[first : first + (end - begin) // ITEMSIZE[self.step.dtype]].copy_(values)


def _copy(step: Step, planned: Plan, place: Place, space: Workspace) -> None:
    """A tensor that is taken over; refuses integers that differ."""
    assert step.base is not None
    feed, *twins = (open_feed(part, planned.sources, np.float64) for part in (step.base, *step.models))
    assert feed.info is not None
    dtype, tally, view = feed.info.dtype, Tally(), place.view
    if view is not None and view.dtype == np.float32 and dtype == step.dtype == "F32" and is_held(feed):
        if storage.copy_finite(array_of(feed).view(np.uint32), view.view(np.uint32)):
            return
    for start, stop in cuts(step):
        raw = feed.raw(start, stop, space.take("raw", (stop - start) * 8, np.uint8))
        if not storage.finite(raw, dtype):
            raise non_finite(feed.label, feed.info)
        for twin in twins:
            if not np.array_equal(raw, twin.raw(start, stop, space.take("twin", (stop - start) * 8, np.uint8))):
                raise CheckpointError(
                    f"{twin.label}: {step.name!r} differs from {feed.label}'s; integers are not merged"
                )
        if dtype != step.dtype:
            wide = storage.as_float(raw, dtype, storage.STORAGE[step.compute])
            raw = cast(wide, wide, False, step.dtype, tally, space, f"tensor {step.name!r}")
        place.put(start, stop, raw)
