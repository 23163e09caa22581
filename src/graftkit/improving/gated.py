"""A recipe whose gates are still to be made: its matrices, what the models add to them, what is written in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from graftkit.execution.local import check_device
from graftkit.measuring.loading import opened
from graftkit.measuring.responses import Delta
from graftkit.recipes.gates import content, reads_gates
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Step

FILE, RECIPE = "gates.safetensors", "recipe.yaml"

Place = str | Path | Task
"""Where examples are: a file, or a task in memory."""


@dataclass(frozen=True)
class Gated:
    """A plan, and those of its steps that want gates."""

    plan: Plan
    steps: tuple[Step, ...]

    @property
    def free(self) -> bool:
        """Whether they are free coefficients of deltas, not weights that sum to one."""
        return methods.get(self.steps[0].method).gates[0] == "coefficient"

    @property
    def base(self) -> Named | None:
        """The models' base, where the recipe has one."""
        return next((named for named in self.plan.sources if named.role == "base"), None)

    @property
    def models(self) -> list[Named]:
        """The models in the order of the recipe; one that is listed twice comes twice."""
        from graftkit.checkpoints.resolve import directory_of

        by_place = {named.source.directory.resolve(): named for named in self.plan.sources}
        recipe = self.plan.recipe
        places = [directory_of(name.rpartition("+")[2], recipe.directory).resolve() for name in recipe.listed]
        return [by_place[place] for place in places]

    @contextmanager
    def live(self, named: Named, device: str, dtype: str = "float32") -> Iterator[tuple[Any, Any]]:
        """One of the models, running, and its tokenizer."""
        base = self.base.source.directory if self.base else None
        with opened(str(named.source.directory), device=device, dtype=dtype, adapter_base=base) as found:
            yield found


def gated(recipe: Recipe) -> Gated:
    """Plans a recipe up to its gates.

    Raises PlanError where it reads none, by methods of different kinds, or for models that cannot be run.
    """
    planned = plan(recipe, without_gates=True)
    steps = tuple(step for step in planned.steps if reads_gates(step))
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
    if any(step.prepare or step.finish for step in steps):
        raise PlanError("recipe: gates are made for deltas as they are; leave out `prepare` and `finish`")
    if any(step.knobs.get("of") == "factors" for step in steps):
        raise PlanError(
            "recipe.knobs.of: gates are made of what adapters do, not of their factors; make them with `of: product`, "
            "and merge the file with `of: factors`"
        )
    nested = next((named for named in planned.sources if named.nested), None)
    if nested:
        raise PlanError(f"{nested.label} is a recipe; merge it first, and name what it made")
    return Gated(planned, steps)


def domains(
    recipe: Recipe, data: Sequence[Place | Sequence[Task]], samples: int | None = None
) -> list[tuple[Task, ...]]:
    """The examples of each model, at most `samples` of them in equal shares of its tasks: beside it in the recipe, else
    from `data`, in order. Raises DataError."""
    beside = [entry.data and recipe.directory / entry.data for entry in recipe.models]
    missing = [entry.model for entry, own in zip(recipe.models, beside, strict=True) if own is None]
    if len(data) not in (0, len(recipe.models)) or (missing and not data):
        raise DataError(
            f"{len(recipe.models)} models need examples of {len(recipe.models)} domains, got {len(data)}: give --data "
            "once for each model, in the recipe's order, or `data:` beside each model"
        )
    chosen = list(data) or [own for own in beside if own]
    each = [[own] if isinstance(own, str | Path | Task) else own for own in chosen]
    return [tuple(examples(own, samples and -(-samples // len(own)))) for own in each]


def examples(places: Sequence[Place], limit: int | None = None) -> list[Task]:
    """Tasks of prompts and answers, at most `limit` items of each. Raises DataError for any other kind."""
    tasks = [sample(place, limit) if isinstance(place, Task) else load_task(place, limit) for place in places]
    for task in tasks:
        if task.kind != "answer_loss":
            raise DataError(f"task {task.name}: gates are made from prompts and answers (answer_loss), got {task.kind}")
    return tasks


def deltas_of(asked: Gated, step: Step, device: str) -> list[Delta]:
    """Each model's delta of a matrix: factors for adapters; without a base, from the first model."""
    import torch

    check_device(device)
    reader = Reader(step, asked.plan.sources, Workspace())
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


def write(
    asked: Gated,
    out: Path,
    values: Mapping[str, np.ndarray],
    kind: str,
    *,
    granularity: str = "channel",
    size: int = 1,
    about: Mapping[str, str] | None = None,
    knobs: Mapping[str, Any] | None = None,
    moved: tuple[Path, Path] | None = None,
) -> Path:
    """Writes the gates, and the recipe beside them, with paths that lead to its models from there.

    `about`: notes that the file carries; `knobs`: changes to the recipe's; `moved`: a directory that holds models, and
    where it will be. Raises OutputError.
    """
    recipe, models, base = asked.plan.recipe, asked.models, asked.base
    needed = any(isinstance(named.source, Adapter) for named in models) or kind == "coefficient"
    try:
        write_gates(
            out / FILE, values, kind=kind, models=[content(named) for named in models],
            base=content(base) if base and needed else "", granularity=granularity, size=size, about=about,
        )  # fmt: skip
        entries = [
            entry.model_copy(update={"model": _place(named, moved), "data": None})
            for entry, named in zip(recipe.models, models, strict=True)
        ]
        changed: dict[str, Any] = {
            "models": entries,
            "gates": FILE,
            "base": str(base.source.directory.resolve()) if base else None,
        }
        if recipe.output.like not in (None, "base"):
            like = _place(asked.plan.sources[asked.plan.like], moved)
            changed["output"] = recipe.output.model_copy(update={"like": like})
        changed["knobs"] = {**recipe.knobs, **(knobs or {})}
        (out / RECIPE).write_text(recipe.model_copy(update=changed).to_yaml(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    return out / RECIPE


def _place(named: Named, moved: tuple[Path, Path] | None) -> str:
    place = named.source.directory.resolve()
    if moved and place.is_relative_to(moved[0].resolve()):
        place = moved[1].resolve() / place.relative_to(moved[0].resolve())
    return str(place)
