"""The runs behind `graft statistics`: one model over its examples, or all models layer by layer, into files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.statistics import About, write_statistics, writing
from graftkit.data.tasks import Task
from graftkit.errors import NonFiniteError, PlanError
from graftkit.execution.blocks import Reader, Workspace
from graftkit.execution.features import features, packed
from graftkit.measuring.activations import Listener, batches, linear_layers, run, shared
from graftkit.measuring.encoding import Row, encode
from graftkit.measuring.layerwise import Layers, stack_of
from graftkit.measuring.loading import opened
from graftkit.measuring.statistics_fisher import diagonal
from graftkit.measuring.statistics_grams import moments_of, stored_shape
from graftkit.measuring.statistics_merged import Stage, measure
from graftkit.recipes import statistics
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step

if TYPE_CHECKING:
    from graftkit.recipes.inputs import Named

BATCH_TOKENS = 2048  # tokens that a model runs on at once, padding included
RESIDENT = 900 << 20  # bytes of a process that has torch and transformers, and of a batch's activations

Tell = Callable[[str, int, int], None]
"""Told of a model's name, and how many of its examples are done with, of how many."""


@dataclass(frozen=True)
class Options:
    """How statistics are measured."""

    form: str = "full"
    memory: int | None = None
    device: str = "cpu"
    seed: int = 0
    advance: Tell = lambda name, done, total: None


@dataclass(frozen=True)
class Subject:
    """One model of a recipe with its examples."""

    planned: Plan
    steps: tuple[Step, ...]
    place: int
    named: Named
    name: str
    task: Task


def run_one(subject: Subject, about: About, file: Path, options: Options) -> None:
    """Runs one model on its examples, and writes the file."""
    planned, started = subject.planned, time.perf_counter()
    base = next((one.source.directory for one in planned.sources if one.role == "base"), None)
    steps = [step for step in subject.steps if about.kind in statistics.needed(step)]
    measure_kind = {"gram": _gram, "core_gram": _core_gram, "fisher": _fisher}[about.kind]
    place = str(subject.named.source.directory)
    with opened(place, device=options.device, dtype="float32", adapter_base=base) as (live, reader):
        _check_weights(subject.name, dict(live.named_parameters()))
        rows = rows_of(live, reader, subject.task)
        job = Job(file, replace(about, tokens=_tokens(rows)), started)
        measure_kind(live, rows, subject, steps, job, options)


def run_merged(subjects: Sequence[Subject], abouts: Sequence[About], files: Sequence[Path], options: Options) -> None:
    """Goes through the layers of all models together, and writes their files."""
    planned, started = subjects[0].planned, time.perf_counter()
    like = planned.sources[planned.like]  # of a vlm's recipe the VLM, which reads the texts of its experts, too
    with ExitStack() as stack:
        live, reader = stack.enter_context(opened(str(like.source.directory), device=options.device, dtype="float32"))
        stage = Stage.of(live, planned)
        names = [step.name for step in subjects[0].steps if "merged_gram" in statistics.needed(step)]
        layers = linear_layers(live, names, turned=True, what=_NO_GRAM)
        rows = [rows_of(live, reader, subject.task) for subject in subjects]
        owners = _owners(live, layers, rows[0])
        kept = [(name, "F32", (_width(layers[name]),) * 2) for name, owner in owners.items() if owner == name]
        jobs = [Job(f, replace(a, tokens=_tokens(r)), started) for f, a, r in zip(files, abouts, rows, strict=True)]
        writers = [stack.enter_context(writing(job.file, job.told(shared=_others(owners)), kept)) for job in jobs]
        total = sum(map(len, rows)) * (2 * len(stack_of(live)) + 1)
        tell = _teller(replace(subjects[0], name="merged"), options, total)
        measure(stage, layers, owners, rows, writers, tell, BATCH_TOKENS)


def _check_weights(model: str, weights: Mapping[str, Any]) -> None:
    broken = next((name for name, own in weights.items() if not bool(own.isfinite().all())), None)
    if broken:
        raise NonFiniteError(
            f"{model}: {broken} has weights that are NaN or infinite, so nothing can be measured; repair the model"
        )


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.length for row in rows)


def _owners(live: Any, layers: dict[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """For each layer, the one under whose name its inputs are kept. Raises PlanError for a layer that gets none."""
    owners = shared(live, layers, min(rows, key=lambda row: row.length))
    unheard = next((name for name in layers if name not in owners), None)
    if unheard:
        raise PlanError(f"{unheard!r} is in a layer that these examples do not reach; give it another method by a rule")
    return owners


def _others(owners: dict[str, str]) -> dict[str, str]:
    return {name: owner for name, owner in owners.items() if owner != name}


@dataclass(frozen=True)
class Job:
    """A file to be written, what it is of, and when its measuring began."""

    file: Path
    about: About
    started: float

    def told(self, **more: Any) -> About:
        """What the file is of, with the seconds that it took."""
        return replace(self.about, seconds=round(time.perf_counter() - self.started, 3), **more)


def rows_of(live: Any, reader: Any, task: Task) -> list[Row]:
    """A row for each example, with its right answer only."""
    rows = encode(reader, task, getattr(live.config.get_text_config(), "max_position_embeddings", None))
    right = [item.answer if task.kind == "multiple_choice" else 0 for item in task.items]
    return [replace(row, answers=(row.answers[k],), slots=(0,)) for row, k in zip(rows, right, strict=True)]


def _teller(subject: Subject, options: Options, total: int) -> Callable[[int], None]:
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        options.advance(subject.name, min(done, total), total)

    return tell


def _gram(
    live: Any, rows: Sequence[Row], subject: Subject, steps: Sequence[Step], job: Job, options: Options
) -> None:  # fmt: skip
    """Moments of all layers in one pass, or layer by layer where they would not fit."""
    layers = linear_layers(live, [step.name for step in steps], turned=True, what=_NO_GRAM)
    owners = _owners(live, layers, rows)
    own = {name: module for name, module in layers.items() if owners[name] == name}
    widths = {name: _width(module) for name, module in own.items()}
    form = job.about.form
    layout = [(name, "F32", stored_shape(form, width)) for name, width in widths.items()]
    groups = _groups(live, rows, own, {n: 4 * _product(stored_shape(form, w)) for n, w in widths.items()}, options)
    with writing(job.file, job.told(shared=_others(owners)), layout) as writer:

        def measure(names: Sequence[str], pass_over: Callable[[list[Listener]], None]) -> None:
            held = {name: moments_of(form, widths[name], options.device) for name in names}
            pass_over([Listener(own[name], inputs=moments.add) for name, moments in held.items()])
            for name, moments in held.items():
                writer.put(name, moments.mean())

        if groups is None:
            tell = _teller(subject, options, len(rows))
            measure(list(own), lambda heard: run(live, rows, heard, batch_tokens=BATCH_TOKENS, advance=tell))
        else:
            _by_layers(live, rows, groups, measure, _teller(subject, options, len(rows) * (max(groups) + 2)))


_NO_GRAM = "so its inputs cannot be measured; give it another method by a rule"


def _width(module: Any) -> int:
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])


def _product(shape: Sequence[int]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found


def _groups(
    live: Any, rows: Sequence[Row], own: dict[str, Any], sizes: dict[str, int], options: Options
) -> dict[int, list[str]] | None:
    """The matrices by layer, where their moments do not fit together; None where they do."""
    if options.memory is None:
        return None
    model = sum(p.numel() * p.element_size() for p in live.parameters())
    if model + sum(sizes.values()) + RESIDENT <= options.memory:
        return None
    layers = Layers(live, [], Path())
    groups: dict[int, list[str]] = {}
    for name, module in own.items():
        number = layers.of(module)
        if number is None:
            raise PlanError(f"{name!r} stands outside of the model's stack of layers; leave out --memory")
        groups.setdefault(number, []).append(name)
    least = model + max(sum(sizes[name] for name in names) for names in groups.values()) + RESIDENT
    if least > options.memory:
        raise PlanError(
            f"--memory {options.memory / 1e9:.2f} GB is too little: the model and the moments of one layer need "
            f"{least / 1e9:.2f} GB; take --gram block:128 or sketch:256, or give more"
        )
    return groups


def _by_layers(
    live: Any,
    rows: Sequence[Row],
    groups: dict[int, list[str]],
    measure: Callable[[Sequence[str], Callable[[list[Listener]], None]], None],
    tell: Callable[[int], None],
) -> None:
    with tempfile.TemporaryDirectory(prefix="graft-hidden-") as spool:
        layers = Layers(live, list(batches(rows, BATCH_TOKENS)), Path(spool))
        layers.start(tell)
        last = max(groups)
        for number in range(last + 1):
            names = groups.get(number, [])
            measure(names, lambda heard, n=number: layers.through(n, heard, tell, keep=n < last))  # type: ignore[misc]


def _core_gram(
    live: Any, rows: Sequence[Row], subject: Subject, steps: Sequence[Step], job: Job, options: Options
) -> None:  # fmt: skip
    """Moments of what the models read of the inputs, and of what probes do."""
    import torch

    layers = linear_layers(live, [step.name for step in steps], what=_NO_GRAM)
    held, listeners = {}, []
    for step in steps:
        read = features(Reader(step, subject.planned.sources, Workspace()))
        factor = torch.from_numpy(read).float().to(options.device)
        held[step.name] = moments = moments_of("full", len(read), options.device, "float64")
        listeners.append(Listener(layers[step.name], inputs=_projected(moments, factor)))
    run(live, rows, listeners, batch_tokens=BATCH_TOKENS, advance=_teller(subject, options, len(rows)))
    write_statistics(job.file, job.told(), {name: packed(moments.mean()) for name, moments in held.items()})


def _projected(moments: Any, factor: Any) -> Callable[[Any], None]:
    return lambda inputs: moments.add(inputs @ factor.T)


def _fisher(
    live: Any, rows: Sequence[Row], subject: Subject, steps: Sequence[Step], job: Job, options: Options
) -> None:  # fmt: skip
    tell = _teller(subject, options, len(rows))
    found = diagonal(live, rows, [step.name for step in steps], seed=options.seed, advance=tell)
    values = {name: value.numpy() for name, value in found.values.items()}
    write_statistics(job.file, job.told(scale=found.scale), values)
