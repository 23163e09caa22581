"""The loop: every step of a plan, on any number of threads of this machine.

Workers change no byte: a step is computed in fixed blocks by one worker, its random numbers are keyed, and each tensor
has its place in the output before anything is computed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graftkit import methods
from graftkit.checkpoints import storage
from graftkit.checkpoints.adapter_sink import AdapterSink
from graftkit.checkpoints.masked import FOLDER, INDEX
from graftkit.checkpoints.sink import Sink
from graftkit.errors import BusyError, CheckpointError, GraftError, OutputError, PlanError
from graftkit.execution import adapter_files, adapters, coefficients, gating, masking, measured, record, reductions
from graftkit.execution.aligning import places
from graftkit.execution.apply import apply, numbers_of
from graftkit.execution.blending import fused_of
from graftkit.execution.blocks import Reader, Workspace, block_shape, cuts, inputs_of, non_finite, open_feed
from graftkit.execution.casting import Tally, cast
from graftkit.execution.finishing import Block, Merged, finished
from graftkit.execution.preparing import opened
from graftkit.execution.reductions import Threshold
from graftkit.recipes import inputs
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Step

RESIDENT = 300 << 20  # bytes that the interpreter, numpy and the compiled code occupy, measured, rounded up
TORCH = 350 << 20  # and torch, where a method needs it


class Progress(Protocol):
    """Told of bytes read, as they are done with."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a stage's inputs."""


class _Stopped(Exception):
    """Another worker failed; its error is the one to show."""


@dataclass
class Job:
    """A plan under way."""

    plan: Plan
    sink: Sink
    workers: int
    device: str
    progress: Progress | None
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    local: threading.local = field(default_factory=threading.local)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done_bytes: int = 0

    @property
    def space(self) -> Workspace:
        """This thread's scratch."""
        if not hasattr(self.local, "space"):
            self.local.space = Workspace()
        return self.local.space  # type: ignore[no-any-return]

    def advance(self, stage: str, count: int, total: int) -> None:
        """Reports progress."""
        with self.lock:
            self.done_bytes += count
            if self.progress:
                self.progress(stage, self.done_bytes, total)


def execute(
    planned: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carries out a plan and returns its record, which also stands in `OUT/graft.json`.

    `memory`: bytes that the process may use, at least roughly 400 MB; it limits the workers. Neither it nor `workers`
    changes a byte of the output. A run that was interrupted goes on where it stopped.
    Raises PlanError, CheckpointError or OutputError; nothing stands under `out` unless all of it does.
    """
    check_device(device)
    out = Path(os.path.abspath(out))
    _check_apart(planned, out)
    count = _allowed_workers(planned, workers or os.cpu_count() or 1, memory)
    state = inputs.signature(planned.sources)
    sink = _open_sink(planned, out, f"{planned.hash} {state}", overwrite)
    job = Job(planned, sink, count, device, progress)
    machine: dict[str, Any] = {"workers": workers, "memory": memory, "device": device, "progress": progress}
    try:
        for named in planned.sources:
            make_nested(named, machine)
        return _run(job, state)
    finally:
        sink.close()
        for held in (*(named.source for named in planned.sources), planned.gates, planned.statistics):
            if held is not None:
                held.close()


def _open_sink(planned: Plan, out: Path, token: str, overwrite: bool) -> Sink:
    if planned.recipe.output.as_ == "adapter":
        room = adapters.largest(planned)
        return AdapterSink(out, planned.steps[0].dtype, token, overwrite=overwrite, largest=room)
    layout = [(shard.file, shard.layout) for shard in planned.shards]
    return Sink(out, layout, token, overwrite=overwrite, beside=masking.files(planned))


def make_nested(named: inputs.Named, machine: dict[str, Any]) -> None:
    """Carries out the recipe that a source is the result of, unless the cache holds it; waits for others."""
    while named.nested and not _in_cache(named):
        try:
            execute(named.nested, named.source.directory, overwrite=True, **machine)
        except BusyError:
            time.sleep(0.5)


def _in_cache(named: inputs.Named) -> bool:
    ends: dict[Path, int] = {}
    for tensor in named.source.tensors.values():
        ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.end)
    whole = all(file.is_file() and file.stat().st_size >= end for file, end in ends.items())
    return whole and (named.source.directory / record.FILE).is_file()


def _run(job: Job, state: str) -> dict[str, Any]:
    started, resumed = time.perf_counter(), len(job.sink.done)
    found = _coefficients(job)
    job.plan = coefficients.resolved(job.plan, found)
    stages = [_stage(job, name) for name in job.plan.stages]
    seconds = time.perf_counter() - started
    made = record.build(job.plan, job.sink.done, stages, seconds, resumed, job.workers, job.device)
    made |= {"coefficients": found} if found else {}
    for name, content in record.side_files(job.plan, made).items():
        job.sink.add_file(name, content)
    if masking.masked_steps(job.plan):
        job.sink.add_file(f"{FOLDER}/{INDEX}", masking.index(job.plan, job.sink.done))
    if isinstance(job.sink, AdapterSink):
        adapter_files.assemble(job.plan, job.sink)
    if inputs.signature(job.plan.sources) != state:
        raise CheckpointError(f"{job.sink.out}: an input was written to while it was merged; run the command again")
    job.sink.complete()
    return made


def _check_apart(planned: Plan, out: Path) -> None:
    """Refuses an output whose writing would remove one of its inputs, those of nested recipes included."""
    kept = [*inputs.files_of(planned.sources), *(named.source.directory.resolve() for named in planned.sources)]
    kept.append(planned.recipe.directory.resolve() / "recipe.yaml")
    kept += [planned.gates.file.resolve()] if planned.gates else []
    kept += [own.file.resolve() for own in planned.statistics.distinct] if planned.statistics else []
    for path in kept:
        if out.resolve() in (path, *path.parents):
            raise OutputError(f"{out}: holds {path.name!r}, an input of this merge; choose another name")


def check_device(device: str) -> None:
    """Refuses a device that torch does not have."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).add(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GraftError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error


def _allowed_workers(plan: Plan, wanted: int, memory: int | None) -> int:
    if memory is None:
        return max(1, wanted)
    each = plan.worker_bytes()
    resident = RESIDENT + (TORCH if plan.needs_torch() else 0)
    room = (memory - resident) // max(each, 1)
    if room < 1:
        raise PlanError(
            f"--memory {memory / 1e9:.2f} GB is too little: one worker needs {(each + resident) / 1e9:.2f} GB here"
        )
    return int(max(1, min(wanted, room)))


def _stage(job: Job, name: str) -> dict[str, Any]:
    started, job.done_bytes = time.perf_counter(), 0
    steps = _statistics(job) if name == "statistics" else _merge(job)
    return {
        "name": name,
        "seconds": round(time.perf_counter() - started, 4),
        "steps": steps,
        "peak_memory_bytes": record.peak_memory(),
    }


def _coefficients(job: Job) -> coefficients.Found:
    """The numbers of all rules such as `{from: metagpt}`, from norms that take a pass over what they measure."""
    steps, note = coefficients.users(job.plan.steps), "coefficients"
    if steps and note not in job.sink.notes:
        job.done_bytes, total, sums = 0, sum(job.plan.input_bytes(step) for step in steps), {}

        def run(step: Step) -> None:
            sums[step.key] = coefficients.squares(step, job.plan.sources, job.space)
            job.advance("statistics", job.plan.input_bytes(step), total)

        _on_workers(job, run, steps)
        job.sink.note(note, coefficients.found(steps, sums, len(job.plan.recipe.models)))
    return job.sink.notes[note] if steps else {}


def _statistics(job: Job) -> int:
    """The stage of model-scope thresholds: two passes over the steps of each group, preparations first."""
    steps = 0
    for group in reductions.groups_of(job.plan.steps):
        key = f"threshold {group.name}"
        if key not in job.sink.notes:
            total = 2 * sum(job.plan.input_bytes(step) for step in group.steps)
            made = reductions.select(
                group.steps, group.density, _opening(job, group.level), job.space, _spreader(job, total)
            )
            job.sink.note(key, {"values": made.values.view(np.uint32).tolist(), "density": list(made.density)})
        noted = job.sink.notes[key]
        job.thresholds[group.name] = Threshold(
            np.array(noted["values"], np.uint32).view(np.float32), tuple(noted["density"])
        )
        steps += len(group.steps)
    return steps


def _opening(job: Job, level: int | None) -> reductions.Open:
    return lambda step, space: opened(step, job.plan.sources, space, job.thresholds, level)[0]


def _spreader(job: Job, total: int) -> reductions.Spread:
    def spread(work: Callable[[Step, Workspace], np.ndarray], steps: Sequence[Step]) -> Iterable[np.ndarray]:
        results: list[np.ndarray] = []

        def run(step: Step) -> None:
            counts = work(step, job.space)
            with job.lock:
                if results:
                    results[0] += counts
                else:
                    results.append(counts)
            job.advance("statistics", job.plan.input_bytes(step), total)

        _on_workers(job, run, steps)
        return results

    return spread


def _merge(job: Job) -> int:
    """The stage that writes: every step that an interrupted run has not finished."""
    steps = [step for step in job.plan.steps if step.key not in job.sink.done]
    total = sum(job.plan.input_bytes(step) for step in steps)

    def run(step: Step) -> None:
        job.sink.finish(step.key, _made(job, step))
        job.advance("merge", job.plan.input_bytes(step), total)

    _on_workers(job, run, steps)
    return len(steps)


def _made(job: Job, step: Step) -> dict[str, Any]:
    """Computes and writes one tensor, or the factors of its delta; returns its line of the record."""
    if not step.method:
        return _copy_step(job, step)
    if not isinstance(job.sink, AdapterSink):
        return _merge_step(job, step)
    if step.form and step.form.path != "rows":
        return adapters.from_factors(job.plan, job.sink, step, job.device, job.space)
    if not step.form:
        adapters.begin_whole(job.sink, step)
    return _merge_step(job, step)


def _on_workers(job: Job, run: Callable[[Step], None], steps: Sequence[Step]) -> None:
    """Runs all steps, the largest first so that workers end together; the first error stops the rest and is raised."""

    def guarded(step: Step) -> None:
        if not job.stop.is_set():
            try:
                run(step)
            except BaseException:
                job.stop.set()
                raise

    with ThreadPoolExecutor(job.workers, thread_name_prefix="graft") as pool:
        futures: list[Future[None]] = [pool.submit(guarded, step) for step in sorted(steps, key=lambda s: -s.elements)]
        try:
            wait(futures)
        except BaseException:
            job.stop.set()
            raise
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])


def _merge_step(job: Job, step: Step) -> dict[str, Any]:
    """Computes and writes one tensor; returns its line of the record."""
    method, space = methods.get(step.method), job.space
    reader, prepared = opened(step, job.plan.sources, space, job.thresholds)
    statistics, notes = _found(job, reader)
    tally, fused = Tally(), fused_of(method, statistics, reader) if job.device == "cpu" else None
    here = (
        adapters.on_core(job.plan, reader, job.device) if step.directions else partial(_merged, job, reader, statistics)
    )
    merged = finished(here, reader, job.device)
    marked = masking.Marked(merged, reader, job.plan.sources, job.sink) if method.masks else None
    if step.form and isinstance(job.sink, AdapterSink):
        return {**adapters.from_rows(job.plan, job.sink, step, _stoppable(job, merged)), **notes}
    for start, stop in cuts(step):
        if job.stop.is_set():
            raise _Stopped
        raw = fused.block(start, stop, tally) if fused else _block(job, step, marked or merged, start, stop, tally)
        for place, first, last in places(step, start, stop):
            job.sink.write(step.name, place, raw[first:last])
    around = {"prepare": prepared, "finish": [applied.name for applied in step.finish]}
    around |= marked.record() if marked else {}
    return {"method": step.method, **{k: v for k, v in around.items() if v}, **tally.record(step.elements), **notes}


def _found(job: Job, reader: Reader) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the method reads beside blocks, and what the record says of it; on a core it is found there."""
    step, method = reader.step, methods.get(reader.step.method)
    if step.directions:
        return {}, {}
    statistics, notes = reductions.statistics_of(method, step.knobs, reader, job.thresholds.get(step.group))
    statistics |= gating.read(method, step, job.plan.gates) | measured.read(step, job.plan.statistics, reader)
    notes |= gating.evidence(step, job.plan.gates, statistics)
    return statistics | numbers_of(method, statistics, step.knobs, len(step.models)), notes


def _stoppable(job: Job, merged: Merged) -> Merged:
    """The same blocks, until another worker fails."""

    def block(start: int, stop: int) -> Block:
        if job.stop.is_set():
            raise _Stopped
        return merged(start, stop)

    return block


def _merged(job: Job, reader: Reader, statistics: dict[str, Any], start: int, stop: int) -> Block:
    """The method's result for elements `[start, stop)` of a tensor."""
    step, method = reader.step, methods.get(reader.step.method)
    given = inputs_of(method, reader, start, stop, statistics)
    result = apply(method, given, step.knobs, block_shape(step, start, stop), job.device, job.space)
    return result, given["base"], method.returns_delta and given["base"] is not None


def _block(job: Job, step: Step, merged: Merged, start: int, stop: int, tally: Tally) -> np.ndarray:
    """The bytes of elements `[start, stop)` of a tensor."""
    result, base, is_delta = merged(start, stop)
    return cast(result, base, is_delta, step.dtype, tally, job.space, f"tensor {step.name!r}")


def _copy_step(job: Job, step: Step) -> dict[str, Any]:
    """Copies one tensor, bit for bit unless the output has another dtype; refuses integers that differ."""
    assert step.base is not None
    feed, *twins = (open_feed(part, job.plan.sources, np.float64) for part in (step.base, *step.models))
    assert feed.info is not None
    space, tally, dtype = job.space, Tally(), feed.info.dtype
    for start, stop in cuts(step):
        raw = feed.raw(start, stop, space.take("raw", (stop - start) * 8, np.uint8))
        if not storage.finite(raw, dtype):
            raise non_finite(feed.label, feed.info)
        for twin in twins:
            if not np.array_equal(raw, twin.raw(start, stop, space.take("twin", (stop - start) * 8, np.uint8))):
                raise CheckpointError(
                    f"{twin.label}: {step.name!r} ({dtype}) differs from {feed.label}'s, and integers are not merged"
                )
        if dtype != step.dtype:
            wide = space.take("base", stop - start, storage.STORAGE[step.compute])
            feed.numbers(start, stop, space.take("raw", (stop - start) * 8, np.uint8), wide)
            raw = cast(wide, wide, False, step.dtype, tally, space, f"tensor {step.name!r}")
        for place, first, last in places(step, start, stop):
            job.sink.write(step.name, place, raw[first:last])
    return {"method": "", **tally.record(step.elements)}


def merge(recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Plans and carries out a recipe: `merge("recipe.yaml", "out", workers=2)`.

    `options` are those of `execute`, and `allow_pickle` and `full_hash` of `plan`. Returns the record.
    """
    opening = {name: options.pop(name) for name in ("allow_pickle", "full_hash") if name in options}
    return execute(plan(recipe, **opening), out, **options)
