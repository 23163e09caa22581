"""`graft gates solve`: gates in closed form from examples of each model's domain, and the recipe that merges by them.

For full models the deltas are held in memory, a float32 copy of the matrices for each; for adapters their factors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.gates import write_gates
from graftkit.data.tasks import Task, load_task, sample
from graftkit.errors import DataError, OutputError, PlanError
from graftkit.execution.blocks import Reader, Workspace, cuts
from graftkit.improving.closed_forms import convex, free
from graftkit.measuring.encoding import encode
from graftkit.measuring.loading import default_device, opened
from graftkit.measuring.responses import Delta, measure
from graftkit.recipes.gates import content, reads_gates
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import Recipe, load
from graftkit.recipes.steps import Step

FILE, RECIPE = "gates.safetensors", "recipe.yaml"
BATCH_TOKENS = 2048  # tokens that a model runs on at once, padding included

Tell = Callable[[str, int, int], None]
"""Told of a model's name, and how many of its examples are done with."""


@dataclass(frozen=True)
class Solved:
    """What was solved: where the recipe stands, matrices and channels, and the seconds that the models ran."""

    recipe: Path
    kind: str
    matrices: int
    channels: int
    examples: int
    tokens: int
    seconds: float


def solve(
    recipe: Recipe | str | Path,
    out: Path,
    *,
    data: Sequence[str | Path] = (),
    samples: int = 200,
    ridge: float = 0.1,
    prior: float = 1.0,
    device: str | None = None,
    advance: Tell = lambda name, done, total: None,
) -> Solved:
    """Solves gates for every matrix that the recipe merges by gates, and writes them and the recipe under `out`.

    The recipe's method says which form: `graft_free` takes free coefficients (`ridge` towards `prior`), the others
    weights that sum to one. `data`: a task of kind answer_loss for each model, where none stands beside it in the
    recipe; at most `samples` examples of each are used, all their tokens. Each model runs once, over its own examples.
    Raises PlanError, DataError or OutputError.
    """
    asked = load(recipe)
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name")
    tasks = [sample(task, samples) for task in _tasks(asked, data)]
    planned = plan(asked, without_gates=True)
    steps = [step for step in planned.steps if reads_gates(step)]
    _check(planned, steps)
    deltas = {step.key: _deltas(planned, step, device or default_device()) for step in steps}
    started = time.perf_counter()
    found, rows = _moments(planned, tasks, deltas, device or default_device(), advance)
    kind = methods.get(steps[0].method).gates[0]
    kind = "coefficient" if kind == "coefficient" else "weight"
    solved = {n: free(own, ridge, prior) if kind == "coefficient" else convex(own) for n, own in found.items()}
    place = _write(planned, out, solved, kind)
    channels = sum(own.shape[1] for own in solved.values())
    return Solved(place, kind, len(solved), channels, *rows, time.perf_counter() - started)


def _tasks(recipe: Recipe, data: Sequence[str | Path]) -> list[Task]:
    """The examples of each model: beside it in the recipe, else from `data`, in order."""
    beside = [entry.data and recipe.directory / entry.data for entry in recipe.models]
    missing = [entry.model for entry, own in zip(recipe.models, beside, strict=True) if own is None]
    if len(data) not in (0, len(recipe.models)) or (missing and not data):
        raise DataError(
            f"{len(recipe.models)} models need examples of {len(recipe.models)} domains, got {len(data)}: give --data "
            "once for each model, in the recipe's order, or `data:` beside each model"
        )
    tasks = [load_task(place) for place in (data or [own for own in beside if own])]
    for task in tasks:
        if task.kind != "answer_loss":
            raise DataError(f"task {task.name}: gates are solved on prompts and answers (answer_loss), got {task.kind}")
    return tasks


def _check(planned: Plan, steps: Sequence[Step]) -> None:
    """Refuses recipes that read no gates, by methods of different kinds, or for models that cannot be run."""
    if not steps:
        raise PlanError(
            f"recipe.method: {planned.recipe.method} reads no gates; choose graft, graft_convex or graft_free, without "
            "`local_signal: none`"
        )
    kinds = {methods.get(step.method).gates[0] == "coefficient" for step in steps}
    if len(kinds) > 1:
        raise PlanError("recipe.rules: graft_free and methods of weights in one recipe; solve them one by one")
    if planned.recipe.slices or len({step.key for step in steps if not step.part}) < len(steps):
        raise PlanError(
            "recipe: gates are solved for models of one depth whose matrices stand alone; merge those first"
        )
    nested = next((named for named in planned.sources if named.nested), None)
    if nested:
        raise PlanError(f"{nested.label} is a recipe; merge it first, and name what it made")


def _deltas(planned: Plan, step: Step, device: str) -> list[Delta]:
    """Each model's delta of a matrix: factors for adapters; without a base, from the first model."""
    import torch

    reader = Reader(step, planned.sources, Workspace())
    if all(part.kind in ("factors", "base") for part in step.models):
        factors = [feed.delta_factors() if feed.delta is not None else None for feed in reader.models]
        pairs = [(own.left, own.right) if own else (None, None) for own in factors]
        return [Delta(*(None if m is None else torch.from_numpy(m).float().to(device) for m in pair)) for pair in pairs]
    whole = np.empty((len(step.models), step.elements), np.float32)
    for start, stop in cuts(step):
        stack = reader.read_deltas(start, stop, reader.read_base(start, stop))
        whole[:, start:stop] = stack - stack[0] if reader.base is None else stack
    shaped = torch.from_numpy(whole).to(device).reshape(len(whole), *step.shape)
    return [Delta(right=own if bool(own.any()) else None) for own in shaped]


def _moments(
    planned: Plan, tasks: Sequence[Task], deltas: dict[str, list[Delta]], device: str, advance: Tell
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """The moments of each matrix, [domains, models, models, out], and how many examples and tokens they are of."""
    found: dict[str, list[Any]] = {name: [] for name in deltas}
    examples = tokens = 0
    for named, task in zip(_models(planned), tasks, strict=True):
        base = next((one.source.directory for one in planned.sources if one.role == "base"), None)
        with opened(str(named.source.directory), device=device, dtype="float32", adapter_base=base) as (
            live,
            tokenizer,
        ):
            rows = encode(tokenizer, task, getattr(live.config, "max_position_embeddings", None))
            done = 0

            def tell(count: int, label: str = named.name, total: int = len(rows)) -> None:
                nonlocal done
                done += count
                advance(label, done, total)

            for name, own in measure(live, rows, deltas, batch_tokens=BATCH_TOKENS, advance=tell).items():
                found[name].append(own)
        examples, tokens = examples + len(rows), tokens + sum(row.length for row in rows)
    return {name: np.stack(own) for name, own in found.items()}, (examples, tokens)


def _models(planned: Plan) -> list[Named]:
    """The models in the order of the recipe; one that is listed twice comes twice."""
    from graftkit.checkpoints.resolve import directory_of

    by_place = {named.source.directory.resolve(): named for named in planned.sources}
    recipe = planned.recipe
    places = [directory_of(name.rpartition("+")[2], recipe.directory).resolve() for name in recipe.listed]
    return [by_place[place] for place in places]


def _write(planned: Plan, out: Path, values: dict[str, np.ndarray], kind: str) -> Path:
    """Writes the gates, and the recipe beside them, with paths that lead to its models from there."""
    recipe, models = planned.recipe, _models(planned)
    base = next((named for named in planned.sources if named.role == "base"), None)
    needed = any(isinstance(named.source, Adapter) for named in models) or kind == "coefficient"
    try:
        write_gates(
            out / FILE, values, kind=kind, models=[content(named) for named in models],
            base=content(base) if base and needed else "",
        )  # fmt: skip
        entries = [
            entry.model_copy(update={"model": str(named.source.directory.resolve()), "data": None})
            for entry, named in zip(recipe.models, models, strict=True)
        ]
        changed = {"models": entries, "gates": FILE, "base": str(base.source.directory.resolve()) if base else None}
        (out / RECIPE).write_text(recipe.model_copy(update=changed).to_yaml(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    return out / RECIPE
