"""The plan: everything that a merge will do, fixed from headers alone, and where every refusal happens.

A plan is a flat list of steps, one per output tensor, in stages. It can be printed, costed, hashed, resumed and spread
over workers; the executor only carries it out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import graftkit
from graftkit import methods
from graftkit.checkpoints.adapters import WEIGHTS, Adapter
from graftkit.checkpoints.gates import Gates
from graftkit.checkpoints.headers import ITEMSIZE
from graftkit.errors import PlanError
from graftkit.recipes import (
    adapters,
    backbones,
    coefficients,
    experts,
    forms,
    gates,
    inputs,
    knobs,
    layout,
    matrices,
    rowgroups,
    statistics,
    vocabulary,
)
from graftkit.recipes.recipe import Recipe, load
from graftkit.recipes.steps import Input, Step, check_contributions, copied, make, scratch


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors that go into it."""

    file: str
    steps: tuple[Step, ...]

    @property
    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Its tensors as (name, dtype, shape); several steps may make one."""
        return list({step.name: (step.name, step.dtype, step.whole or step.shape) for step in self.steps}.values())


@dataclass(frozen=True)
class Plan:
    """All that a merge does. `hash` names it: same recipe, same inputs, same version, same hash."""

    recipe: Recipe
    sources: tuple[inputs.Named, ...]
    base: int | None
    like: int
    shards: tuple[Shard, ...]
    stages: tuple[str, ...]
    hash: str = ""
    notes: tuple[str, ...] = field(default=())
    config: Mapping[str, Any] | None = None  # of the output, where it is not the like model's
    vocabulary: vocabulary.Vocabulary | None = None  # of the output, where the recipe chooses one
    rows: Mapping[str, Any] | None = None  # and what happens to each of its rows
    gates: Gates | None = None  # the opened file that methods read their gates from
    statistics: statistics.Measured | None = None  # what methods read that was measured with examples
    backbone: backbones.Backbone | None = None  # that of a VLM, where models are aligned with it

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of the output's files."""
        return tuple(step for shard in self.shards for step in shard.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors in the output."""
        return sum(step.written * ITEMSIZE[step.dtype] for step in self.steps)

    @property
    def bytes_read(self) -> int:
        """Bytes of distinct input tensors that the steps need, each counted once per model."""
        return sum(self.input_bytes(step) for step in self.steps)

    def input_bytes(self, step: Step) -> int:
        """Bytes of input tensors of one step."""
        return sum(self._bytes(part) for part in ({step.base} | set(step.models)) - {None} if part)

    def _bytes(self, part: Input) -> int:
        source = self.sources[part.source].source
        if part.kind in ("factors", "rescaled") and isinstance(source, Adapter):
            factors = source.factors[part.name]
            return factors.a.nbytes + factors.b.nbytes
        if part.parts:
            return sum(self._bytes(one) for one in part.parts)
        held = 0 if part.kind in ("base", "zero") else source.tensors[part.name].nbytes
        return held if part.rows is None else held * part.rows.count // max(source.tensors[part.name].shape[0], 1)

    def worker_bytes(self) -> int:
        """Scratch memory that one worker needs at most, in bytes."""
        return max((scratch(step) for step in self.steps), default=0)

    def needs_torch(self) -> bool:
        """Whether a step's method runs as its torch function."""
        return any(step.method and not methods.get(step.method).compiled for step in self.steps)


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow_pickle: bool = False,
    full_hash: bool = False,
    within: tuple[Path, ...] = (),
    without_gates: bool = False,
    without_statistics: bool = False,
) -> Plan:
    """Plans a merge: opens headers, resolves every knob of every tensor, lays out the output.

    `full_hash`: fingerprint inputs by every byte. `within`: the recipes that this one is a source of.
    `without_gates`, `without_statistics`: leave them unopened, as they are still to be made; such a plan cannot be
    executed.
    Raises PlanError, RecipeError or CheckpointError for everything that would make the merge wrong or impossible.
    """
    recipe = load(recipe)
    knobs.check_names(recipe)

    def plan_nested(file: Path | Recipe) -> Plan:
        if isinstance(file, Recipe):
            return plan(file, allow_pickle=allow_pickle, full_hash=full_hash, within=within)
        if file.resolve() in within:
            raise PlanError(f"{file}: the recipe is among its own sources")
        return plan(file, allow_pickle=allow_pickle, full_hash=full_hash, within=(*within, file.resolve()))

    sources, base, entries = inputs.open_all(recipe, inputs.Opening(allow_pickle, full_hash, plan_nested))
    like = forms.like_of(recipe, sources, base, entries)
    sources = experts.aligned(sources, like)
    form = forms.form_of(recipe, sources, base, like, entries)
    made = _steps(recipe, form)
    if recipe.output.as_ == "adapter":
        made = adapters.as_factors(form.contexts[0], made)
        shards: tuple[Shard, ...] = (Shard(WEIGHTS, tuple(made)),)
    else:
        adapters.check_products(made)
        made = adapters.on_cores(form.contexts[0], made)
        shards = _shards(made, recipe.output.shard_bytes)
    coefficients.check(made)
    scopes = {methods.get(s.method).scope(s.knobs) for s in made if s.method and methods.get(s.method).statistics}
    whole = "model" in scopes or any(applied.group for step in made for applied in step.prepare)
    stages = ("statistics", "merge") if whole else ("merge",)
    notes = (*inputs.notes(recipe, sources, form.like, full_hash), *form.notes, *adapters.notes(made))
    planned = Plan(recipe, sources, base, form.like, shards, stages, notes=notes, config=form.config)
    read = None if without_gates else gates.gates_of(recipe, sources, base, entries, planned.steps)
    held = None if without_statistics else statistics.statistics_of(recipe, sources, base, entries, planned.steps)
    planned = replace(planned, statistics=held)
    planned = replace(planned, vocabulary=form.vocabulary, rows=form.rows, gates=read, backbone=form.backbone)
    return replace(planned, hash=hash_of(planned))


def _steps(recipe: Recipe, form: forms.Form) -> list[Step]:
    """The steps of all tensors; refuses rules and models that change nothing."""
    knobs.check_rules_match(recipe, form.settings)
    made = []
    for name, info in form.tensors.items():
        context = form.contexts[form.place[name]]
        if name not in form.settings:
            made.append(copied(context, info))
            continue
        made.append(make(context, info, matrices.fitted(context, info, form.settings[name])))
    spared = form.like if form.backbone else None
    if form.backbone:
        backbones.check_measured(made, form.backbone)
    for k, context in enumerate(form.contexts):
        check_contributions(context, [step for step in made if form.place[step.name] == k], spared)
    return [part for step in made for part in _split(step, form)]


def _split(step: Step, form: forms.Form) -> list[Step]:
    """The steps that make one tensor: by who has its tokens, by experts, or one."""
    context = form.contexts[form.place[step.name]]
    if form.backbone and layout.has_rows(step.name):
        return backbones.split(step, context, form.backbone)
    if layout.has_rows(step.name):
        return rowgroups.split(step, context, form)
    return experts.split(step, form.tensors[step.name], context)


def _shards(steps: list[Step], limit: int) -> tuple[Shard, ...]:
    """Fills files in the order of the tensors, each up to `limit` bytes (a larger tensor has a file of its own)."""
    groups: list[list[Step]] = [[]]
    size = 0
    for _, parts in itertools.groupby(steps, key=lambda step: step.name):
        tensor = list(parts)
        nbytes = sum(step.elements * ITEMSIZE[step.dtype] for step in tensor)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1] += tensor
        size += nbytes
    count = len(groups)
    single = count == 1
    names = ["model.safetensors"] if single else [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    return tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def _read(part: Input) -> list[Any]:
    """All of an input as plain data."""
    return [
        part.source,
        part.kind,
        part.name,
        part.rows.digest if part.rows else "",
        [_read(one) for one in part.parts],
    ]


def _content(step: Step) -> list[Any]:
    """All of a step as plain data."""
    parts = [_read(part) if part else None for part in (step.base, *step.models)]
    around = [[(a.name, dict(a.knobs), a.keys, a.group) for a in applied] for applied in (step.prepare, step.finish)]
    form = asdict(step.form) if step.form else None
    return [
        step.name, step.shape, step.dtype, step.method, dict(step.knobs), parts, step.keys, step.group, around, form,
        step.rows.digest if step.rows else "", step.whole, step.directions,
    ]  # fmt: skip


def hash_of(made: Plan) -> str:
    """Names what will be done: version, recipe, inputs by content, and every step."""
    content = {
        "version": graftkit.__version__,
        "recipe": made.recipe.to_dict(),
        "inputs": [named.fingerprint for named in made.sources],
        "like": made.like,
        "config": made.config,
        "vocabulary": made.vocabulary.digest if made.vocabulary else None,
        "gates": made.gates.digest if made.gates else None,
        **({"statistics": made.statistics.digest} if made.statistics else {}),
        "shards": [(shard.file, [_content(step) for step in shard.steps]) for shard in made.shards],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
