"""Steps of tensors with a row for each token, split by who has the token.

Rows with equal contributors are one step: their rows are gathered from each model, merged as a tensor of their own, and
written to where the output's vocabulary has them. Where missing rows are filled every model has every row, and all
rows are one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.rows import Rows
from graftkit.errors import PlanError
from graftkit.recipes import inputs, layout
from graftkit.recipes.coefficients import picked
from graftkit.recipes.forms import Form
from graftkit.recipes.steps import Applied, Context, Input, Step
from graftkit.recipes.vocabulary import MISSING, Vocabulary

OWN, ABSENT, MEAN, ZERO, CENTROID = "own", "absent", "mean", "zero", "centroid"
Origin = str | int
"""Where a participant's row comes from: its own, nowhere, the mean of those that have it, zeros, the mean of its rows,
or a donor, by its source."""


@dataclass(frozen=True)
class Group:
    """Rows of one kind: the origin of each participant's row (the base's first, if there is one)."""

    kind: str
    origins: tuple[Origin, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Table:
    """The participants in a step and the rows that they have of the output's tokens."""

    step: Step
    context: Context
    vocabulary: Vocabulary
    parts: tuple[Input, ...]  # the base first, where the step reads it, then the models
    maps: tuple[Sequence[int], ...]  # per part
    base_map: Sequence[int] | None  # of the recipe's base, read or not

    @property
    def anchored(self) -> bool:
        return self.step.base is not None


def split(step: Step, context: Context, form: Form) -> list[Step]:
    """The steps of one tensor of the output; what happens to its rows is told in `form.rows`."""
    vocabulary = form.vocabulary
    if vocabulary is None or not layout.has_rows(step.name) or not step.shape:
        return [step]
    table = _table(step, context, vocabulary)
    height = step.shape[0]
    identity = all(
        list(rows) == list(range(height)) and _height(context, part, step.name) == height
        for part, rows in zip(table.parts, table.maps, strict=True)
    )
    if identity and not vocabulary.given:
        form.rows[step.name] = [("merged", (), tuple(range(height)))]
        return [step]
    if step.method and methods.get(step.method).masks:
        raise PlanError(
            f"recipe.output.tokenizer: {step.method} writes a bit mask for each weight of {step.name!r}, and aligned "
            "rows have none; merge checkpoints of one vocabulary"
        )
    key = (tuple(map(id, table.maps)), id(table.base_map), table.anchored, tuple(part.source for part in table.parts))
    groups = vocabulary.grouped.setdefault(key, None) or _groups(table)
    vocabulary.grouped[key] = groups
    form.rows[step.name] = [(group.kind, _holders(table, group), group.rows) for group in groups]
    if step.method and vocabulary.spec.missing == "fill" and all(part.kind == "tensor" for part in table.parts):
        return [_joined(table, groups)]
    return [_step(table, k, group, groups) for k, group in enumerate(groups)]


def _holders(table: _Table, group: Group) -> tuple[int, ...]:
    """The sources that have a group's tokens, where not all do."""
    owners = [part.source for part, origin in zip(table.parts, group.origins, strict=True) if origin == OWN]
    return tuple(dict.fromkeys(owners)) if len(owners) < len(table.parts) else ()


def _table(step: Step, context: Context, vocabulary: Vocabulary) -> _Table:
    parts = (*([step.base] if step.base else []), *step.models)
    height = step.shape[0]
    maps = []
    for part in parts:
        held = _height(context, part, step.name)
        maps.append(vocabulary.row_map(part.source, held, height))
        if part.kind == "rescaled" and maps[-1] != list(range(held)):
            raise PlanError(
                f"{context.sources[part.source].label}: its DoRA adapter rescales {step.name!r}, whose rows the "
                "vocabulary moves; merge it into its base first"
            )
    base = context.base
    base_map = None
    if base is not None and step.name in base.names:
        held = context.sources[base.source].source.tensors[base.names[step.name]].shape[0]
        base_map = vocabulary.row_map(base.source, held, height)
    return _Table(step, context, vocabulary, parts, tuple(maps), base_map)


def _height(context: Context, part: Input, name: str) -> int:
    """How many rows a participant has; an adapter that leaves the tensor alone or adds to it has its base's."""
    source = context.sources[part.source].source
    if part.kind == "tensor":
        return source.tensors[part.name].shape[0]
    if isinstance(source, Adapter) and part.name in source.factors:
        return source.factors[part.name].shape[0]
    below = context.base or context.like
    return context.sources[below.source].source.tensors[below.names[name]].shape[0]


def _groups(table: _Table) -> list[Group]:
    """The rows by the origins of all participants; the group that all have comes first."""
    vocabulary = table.vocabulary
    tokens = set(vocabulary.words.ids.values())
    full = (OWN,) * len(table.parts)
    found: dict[tuple[str, tuple[Origin, ...]], list[int]] = {("merged", full): []}
    for row, numbers in enumerate(zip(*table.maps, strict=True)):
        if min(numbers) >= 0 and row not in vocabulary.given:
            found["merged", full].append(row)
        else:
            found.setdefault(_origins(table, row, numbers, row in tokens), []).append(row)
    return [Group(kind, origins, tuple(rows)) for (kind, origins), rows in found.items() if rows]


def _origins(table: _Table, row: int, numbers: Sequence[int], token: bool) -> tuple[str, tuple[Origin, ...]]:
    """Where every participant's row comes from, and what that is called."""
    given = table.vocabulary.given.get(row)
    if given:
        donor: Origin = ZERO if given.source is None else given.source
        return "given", tuple(donor if given.force or n < 0 else OWN for n in numbers)
    what = "" if token else "padding, "
    if max(numbers) < 0:
        if table.base_map and table.base_map[row] >= 0:
            assert table.context.base is not None
            return what + "the base's", (table.context.base.source,) * len(numbers)
        return what + "the mean of all tokens", (CENTROID,) * len(numbers)
    if table.vocabulary.spec.missing == "skip":
        kind = _shared(table, numbers)
        return what + kind, tuple(OWN if n >= 0 else ABSENT for n in numbers)
    return what + "filled", tuple(OWN if n >= 0 else _donor(table, row, numbers) for n in numbers)


def _shared(table: _Table, numbers: Sequence[int]) -> str:
    """What becomes of a row that only some have."""
    models = numbers[1:] if table.anchored else numbers
    if not table.anchored or numbers[0] < 0:
        return "the mean of those that have it" if sum(n >= 0 for n in models) > 1 else "one model's"
    return "merged by those that have it" if max(models, default=MISSING) >= 0 else "the base's"


def _donor(table: _Table, row: int, numbers: Sequence[int]) -> Origin:
    """Who lends a row to those that lack it: the base, else the only one that has it, else the mean of all that do."""
    if table.base_map and table.base_map[row] >= 0:
        assert table.context.base is not None
        return table.context.base.source
    owners = dict.fromkeys(part.source for part, n in zip(table.parts, numbers, strict=True) if n >= 0)
    return next(iter(owners)) if len(owners) == 1 else MEAN


def _joined(table: _Table, groups: Sequence[Group]) -> Step:
    """The step that makes all rows, group after group: what looks at the whole tensor then sees all of it, as mergekit.

    An adapter has no rows to fill.
    """
    rows = Rows.of([row for group in groups for row in group.rows])

    def whole(p: int) -> Input:
        found = []
        for group in groups:
            part = _input(table, p, group, groups)
            assert part is not None, "a filled row that nobody has; this is a bug"
            found.append(replace(part, rows=part.rows or Rows.of(range(len(group.rows)))))
        return Input(table.parts[p].source, "joined", table.parts[p].name, rows, tuple(found))

    parts = tuple(whole(p) for p in range(len(table.parts)))
    base, models = (parts[0], parts[1:]) if table.anchored else (None, parts)
    shape = (rows.count, *table.step.shape[1:])
    return replace(
        table.step, shape=shape, base=base, models=models, whole=table.step.shape, rows=rows, part="0 filled"
    )


def _step(table: _Table, k: int, group: Group, groups: Sequence[Group]) -> Step:
    """The step that makes a group's rows."""
    step = table.step
    parts = [_input(table, p, group, groups) for p in range(len(table.parts))]
    base, models = (parts[0], parts[1:]) if table.anchored else (None, parts)
    made = replace(
        step,
        shape=(len(group.rows), *step.shape[1:]),
        whole=step.shape,
        rows=Rows.of(group.rows),
        part=f"{k} {group.kind}",
    )
    if k and step.keys:
        order = tuple(member.source for member in table.context.models)
        made = replace(made, keys=inputs.keys(table.context.recipe, table.context.sources, order, f"{step.name}\t{k}"))
    have = [t for t, part in enumerate(models) if part is not None]
    if not step.method:
        return replace(made, base=base or _first(parts), models=())
    if base is None and table.anchored:
        return _mean(made, models, have)
    if not have:
        return replace(_plain(made), method="", knobs={}, base=base, models=())
    if len(have) == len(models):
        return replace(made, base=base, models=tuple(part for part in models if part is not None))
    low, _ = methods.get(step.method).model_count
    if base is None or len(have) < low or "take" in step.knobs:
        return _mean(made, models, have, base)
    if step.group or any(applied.group for applied in step.prepare):  # thresholds over the whole model: the same models
        silent = tuple(part or Input(step.models[t].source, "base", "") for t, part in enumerate(models))
        return replace(made, base=base, models=silent)
    return _subset(replace(made, base=base), models, have)


def _first(parts: Sequence[Input | None]) -> Input:
    return next(part for part in parts if part is not None)


def _plain(step: Step) -> Step:
    """A step without what is put around its method."""
    return replace(step, prepare=(), finish=(), group="", keys=())


def _mean(step: Step, models: Sequence[Input | None], have: Sequence[int], base: Input | None = None) -> Step:
    """The weighted mean of those that have a row; equal weights where the recipe's say nothing of them."""
    if "take" in step.knobs and step.knobs["take"] in have:
        have = [step.knobs["take"]]
    weight = step.knobs.get("weight")
    weights = [max(float(weight[t]), 0.0) if isinstance(weight, tuple) else 1.0 for t in have]
    knobs = {"weight": tuple(weights if sum(weights) > 0 else [1.0] * len(have)), "normalize": True}
    chosen = tuple(part for t in have if (part := models[t]) is not None)
    own = base if any(part.kind in ("base", "factors", "rescaled") for part in chosen) else None
    return replace(_plain(step), method="average", knobs=knobs, base=own, models=chosen)


def _subset(step: Step, models: Sequence[Input | None], have: Sequence[int]) -> Step:
    """The method on those of the models that have a row, each with its own values of the knobs."""
    chosen = tuple(part for t in have if (part := models[t]) is not None)

    def knobs_of(part: methods.Method, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: picked(value, have) if part.knobs[name].per_model and isinstance(value, tuple) else value
            for name, value in values.items()
        }

    def applied(one: Applied, part: methods.Method) -> Applied:
        return replace(one, knobs=knobs_of(part, one.knobs), keys=tuple(one.keys[t] for t in have) if one.keys else ())

    before = len(step.prepare)
    around = step.parts
    return replace(
        step,
        models=chosen,
        knobs=knobs_of(methods.get(step.method), step.knobs),
        keys=tuple(step.keys[t] for t in have) if step.keys else (),
        prepare=tuple(applied(one, part) for one, part in zip(step.prepare, around[:before], strict=True)),
        finish=tuple(applied(one, part) for one, part in zip(step.finish, around[before + 1 :], strict=True)),
    )


def _input(table: _Table, p: int, group: Group, groups: Sequence[Group]) -> Input | None:
    """One participant's rows of a group."""
    part, origin = table.parts[p], group.origins[p]
    if origin == ABSENT:
        return None
    if origin == OWN:
        return part if part.kind == "base" else replace(part, rows=Rows.of([table.maps[p][r] for r in group.rows]))
    if origin == CENTROID:
        return _centroid(table, p, groups)
    if origin == ZERO:
        return Input(part.source, "zero", _donor_name(table, part.source), Rows.of(range(len(group.rows))))
    if origin == MEAN:
        owners = [q for q, other in enumerate(group.origins) if other == OWN]
        parts = tuple(other for q in owners if (other := _input(table, q, group, groups)) is not None)
        return Input(parts[0].source, "mean", parts[0].name, parts=parts)
    assert isinstance(origin, int)
    return Input(origin, "tensor", _donor_name(table, origin), Rows.of(_donor_rows(table, origin, group)))


def _centroid(table: _Table, p: int, groups: Sequence[Group]) -> Input | None:
    """The mean of all rows that a participant has of tokens, its own and lent ones; an adapter leaves it alone."""
    part, tokens = table.parts[p], set(table.vocabulary.words.ids.values())
    if part.kind != "tensor":
        return Input(part.source, "base", "")
    found = []
    for group in groups:
        rows = tuple(r for r in group.rows if r in tokens)
        if rows and group.origins[p] not in (CENTROID, ABSENT):
            found.append(_input(table, p, replace(group, rows=rows), groups))
    parts = tuple(one for one in found if one is not None)
    return Input(part.source, "centroid", part.name, parts=parts) if parts else None


def _donor_name(table: _Table, source: int) -> str:
    """A donor's own name of the tensor."""
    context, name = table.context, table.step.name
    members = (*([context.base] if context.base else []), *context.models, context.like)
    found = next((member.names[name] for member in members if member.source == source and name in member.names), None)
    if found is None:
        raise PlanError(
            f"recipe.output.tokenizer.tokens: {context.sources[source].label} lends a row of {name!r}, and is no model "
            "that this tensor is merged from"
        )
    return found


def _donor_rows(table: _Table, source: int, group: Group) -> list[int]:
    given, context = table.vocabulary.given, table.context
    held = context.sources[source].source.tensors[_donor_name(table, source)].shape[0]
    rows = table.vocabulary.row_map(source, held, table.step.shape[0])
    found = [given[r].row if r in given and given[r].source == source else rows[r] for r in group.rows]
    assert MISSING not in found, "a donor without the row that it lends; this is a bug"
    return found
