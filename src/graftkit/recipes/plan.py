"""The plan: everything that a merge will do, fixed from headers alone, and where every refusal happens.

A plan is a flat list of steps, one per output tensor, in stages. It can be printed, costed, hashed, resumed and spread
over workers; the executor only carries it out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import graftkit
from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import DTYPE_NAMES, FLOATING, ITEMSIZE, TensorInfo
from graftkit.checkpoints.resolve import Source
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes import inputs, knobs, layout
from graftkit.recipes.recipe import Recipe, load

BLOCK = 1 << 18
"""Elements that the engine handles at once. Fixed: reductions and random numbers are defined over these blocks."""


@dataclass(frozen=True)
class Input:
    """One model's part in a step. `kind`: `tensor` (read it), `factors` (the base plus an adapter's low-rank delta),
    `base` (an adapter that leaves this tensor alone). `source` counts the plan's sources."""

    source: int
    kind: str
    name: str


@dataclass(frozen=True)
class Step:
    """One output tensor. `method` is empty for a tensor that is copied from the model that the output is like; its
    `models` are then the other models' copies, which must be equal (integers cannot be merged)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    knobs: Mapping[str, Any]
    base: Input | None
    models: tuple[Input, ...]
    keys: tuple[int, ...] = ()
    group: str = ""  # steps of one group share model-scope statistics

    @property
    def elements(self) -> int:
        """Number of elements of the output tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors that go into it."""

    file: str
    steps: tuple[Step, ...]


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

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of the output's files."""
        return tuple(step for shard in self.shards for step in shard.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors in the output."""
        return sum(step.elements * ITEMSIZE[step.dtype] for step in self.steps)

    @property
    def bytes_read(self) -> int:
        """Bytes of distinct input tensors that the steps need, each counted once per model."""
        return sum(self.input_bytes(step) for step in self.steps)

    def input_bytes(self, step: Step) -> int:
        """Bytes of input tensors of one step."""
        return sum(self._bytes(part) for part in ({step.base} | set(step.models)) - {None} if part)

    def _bytes(self, part: Input) -> int:
        source = self.sources[part.source].source
        if part.kind == "factors" and isinstance(source, Adapter):
            factors = source.factors[part.name]
            return factors.a.nbytes + factors.b.nbytes
        return 0 if part.kind == "base" else source.tensors[part.name].nbytes

    def worker_bytes(self) -> int:
        """Scratch memory that one worker needs at most, in bytes."""
        return max((_scratch(step) for step in self.steps), default=0)

    def needs_torch(self) -> bool:
        """Whether a step's method runs as its torch function."""
        return any(step.method and not methods.get(step.method).kernel for step in self.steps)


TEMPORARIES = 8
"""An estimate of the block-sized arrays, for each input, that a method's torch function makes on its way."""


def _scratch(step: Step) -> int:
    """Bytes of one step's blocks: raw, base, models, result, the cast's, and a method's temporaries."""
    method = methods.get(step.method) if step.method else None
    block = step.elements if method and method.grain == "tensor" else min(step.elements, BLOCK)
    wide = 4 if step.dtype in ("F16", "BF16") else 8
    floats = (len(step.models) + 2) * (TEMPORARIES if method and not method.kernel else 1)
    return block * (floats * wide + 2 * 8)


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow_pickle: bool = False,
    full_hash: bool = False,
    within: tuple[Path, ...] = (),
) -> Plan:
    """Plans a merge: opens headers, resolves every knob of every tensor, lays out the output.

    `full_hash`: fingerprint inputs by every byte. `within`: the recipes that this one is a source of. Raises
    PlanError, RecipeError or CheckpointError for everything that would make the merge wrong or impossible.
    """
    recipe = load(recipe)
    knobs.check_names(recipe)

    def plan_nested(file: Path) -> Plan:
        if file.resolve() in within:
            raise PlanError(f"{file}: the recipe is among its own sources")
        return plan(file, allow_pickle=allow_pickle, full_hash=full_hash, within=(*within, file.resolve()))

    sources, base, entries = inputs.open_all(recipe, inputs.Opening(allow_pickle, full_hash, plan_nested))
    like = _like(recipe, sources, base, entries)
    names = sources[like].source.tensors
    matched = _match_all(recipe, sources, names, like if base is None else base)
    last = max((layout.layer(name) or 0 for name in names), default=0)
    steps = [
        _step(recipe, info, sources, matched, base, like, entries, knobs.settings(recipe, name, last))
        for name, info in names.items()
    ]
    _check_contributions(recipe, steps, entries, sources)
    knobs.check_rules_match(recipe, names)
    shards = _shards(steps, recipe.output.shard_bytes)
    scopes = {methods.get(s.method).scope(s.knobs) for s in steps if s.method and methods.get(s.method).statistics}
    stages = ("statistics", "merge") if "model" in scopes else ("merge",)
    made = Plan(recipe, sources, base, like, shards, stages)
    return Plan(recipe, sources, base, like, shards, stages, _hash(made), inputs.notes(recipe, sources))


def _like(recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, entries: tuple[int, ...]) -> int:
    """Which source gives the output its names: `output.like`, else the base, else the first checkpoint."""
    wanted = recipe.output.like
    if wanted is None or (wanted == "base" and base is not None):
        first = next((e for e in entries if isinstance(sources[e].source, Checkpoint)), None)
        chosen = base if base is not None else first
        if chosen is None:
            raise PlanError(
                "recipe: all models are adapters and none records a base that is here; name it with `base:`"
            )
        return chosen
    names = {named.name.rstrip("/"): k for k, named in enumerate(sources)}
    wanted = wanted.rstrip("/")
    if wanted not in names or not isinstance(sources[names[wanted]].source, Checkpoint):
        known = [n for n, k in names.items() if isinstance(sources[k].source, Checkpoint)]
        raise PlanError(
            f"recipe.output.like: got {wanted!r}, expected `base` or one of the checkpoints: {', '.join(known)}"
        )
    return names[wanted]


def _match_all(
    recipe: Recipe, sources: tuple[inputs.Named, ...], names: Mapping[str, TensorInfo], base: int
) -> tuple[dict[str, str], ...]:
    """Per source: output tensor name to the source's own name."""
    matched = []
    for named in sources:
        if isinstance(named.source, Adapter):
            inputs.check_base(recipe, named, sources[base])
            matched.append(layout.match_adapter(names, named.source, named.label))
        else:
            matched.append(layout.match_checkpoint(names, named.source, named.label))
    return tuple(matched)


def _step(
    recipe: Recipe,
    info: TensorInfo,
    sources: tuple[inputs.Named, ...],
    matched: tuple[dict[str, str], ...],
    base: int | None,
    like: int,
    entries: tuple[int, ...],
    setting: knobs.Setting,
) -> Step:
    """The step of one output tensor."""
    name = info.name
    floating = info.dtype in FLOATING
    dtype = DTYPE_NAMES[recipe.output.dtype] if recipe.output.dtype and floating else info.dtype
    original = Input(like, "tensor", name)
    if info.dtype.startswith("F8"):
        raise PlanError(
            f"{sources[like].label} keeps {name!r} as {info.dtype}; quantised weights are not merged: dequantise first"
        )
    _check_kinds(info, sources, matched)
    if not floating or layout.BUFFERS.search(name):
        twins = [Input(e, "tensor", matched[e][name]) for e in entries if e != like and name in matched[e]]
        same = [t for t in twins if sources[t.source].source.tensors[t.name].dtype == info.dtype and not floating]
        return Step(name, info.shape, dtype, "", {}, original, tuple(same))
    method = methods.get(setting.method)
    if method.needs_base and base is None:
        raise PlanError(f"recipe.base is missing: {method.name} works on deltas and needs the models' common base")
    anchor = Input(base, "tensor", matched[base][name]) if base is not None and name in matched[base] else None
    models = tuple(_input(sources[e].source, e, matched[e], name) for e in entries)
    if method.returns_delta and all(part.kind == "base" for part in models):
        return Step(name, info.shape, dtype, "", {}, anchor or original, ())
    keys = inputs.keys(recipe, sources, entries, name) if "rng" in method.reads else ()
    own = any(part.kind != "tensor" for part in models)
    needed = anchor if method.uses_base or own else None
    if own and needed is None:
        needed = Input(like, "tensor", name)
    group = (
        f"{setting.method} {json.dumps(setting.knobs, sort_keys=True)}"
        if method.scope(setting.knobs) == "model"
        else ""
    )
    return Step(name, info.shape, dtype, method.name, setting.knobs, needed, models, keys, group)


def _check_kinds(info: TensorInfo, sources: tuple[inputs.Named, ...], matched: tuple[dict[str, str], ...]) -> None:
    """Refuses a tensor that is floating point in one model and not in another, or quantised."""
    for named, names in zip(sources, matched, strict=True):
        own = named.source.tensors.get(names.get(info.name, ""))
        if own and (own.dtype in FLOATING) != (info.dtype in FLOATING):
            raise PlanError(
                f"{named.label} has {own.name!r} as {own.dtype}, the output as {info.dtype}: quantised and integer "
                "weights are not merged; dequantise the model first"
            )


def _input(source: Source, index: int, matched: Mapping[str, str], name: str) -> Input:
    if name not in matched:
        return Input(index, "base", "")
    own = matched[name]
    return Input(index, "factors" if isinstance(source, Adapter) and own in source.factors else "tensor", own)


def _check_contributions(
    recipe: Recipe, steps: list[Step], entries: tuple[int, ...], sources: tuple[inputs.Named, ...]
) -> None:
    """Refuses a model whose weight is 0 everywhere, and a number of models that the method does not take."""
    merged = [step for step in steps if step.method]
    if not merged:
        raise PlanError("recipe: no tensor would be merged; every model leaves the base as it is")
    for step in merged:
        low, high = methods.get(step.method).model_count
        if not low <= len(entries) <= (high or len(entries)):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise PlanError(f"recipe.models: {step.method} takes {wanted} models, got {len(entries)}")
    for k, entry in enumerate(entries):
        if not any(knobs.contributes(step, k) for step in merged):
            raise PlanError(
                f"recipe.models[{k}] ({sources[entry].name}) contributes nothing: its weight is 0, or no tensor of it "
                "is used; leave it out, or give it a weight"
            )


def _shards(steps: list[Step], limit: int) -> tuple[Shard, ...]:
    """Fills files in the order of the tensors, each up to `limit` bytes (a larger tensor has a file of its own)."""
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        nbytes = step.elements * ITEMSIZE[step.dtype]
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += nbytes
    count = len(groups)
    single = count == 1
    names = ["model.safetensors"] if single else [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    return tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def _content(step: Step) -> list[Any]:
    """All of a step as plain data."""
    parts = [(part.source, part.kind, part.name) if part else None for part in (step.base, *step.models)]
    return [step.name, step.shape, step.dtype, step.method, dict(step.knobs), parts, step.keys, step.group]


def _hash(made: Plan) -> str:
    """Names what will be done: version, recipe, inputs by content, and every step."""
    content = {
        "version": graftkit.__version__,
        "recipe": made.recipe.to_dict(),
        "inputs": [named.fingerprint for named in made.sources],
        "like": made.like,
        "shards": [(shard.file, [_content(step) for step in shard.steps]) for shard in made.shards],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
