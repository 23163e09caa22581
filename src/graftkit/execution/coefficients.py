"""The numbers behind `weight: {from: metagpt}`: norms of models over the tensors that use a rule, then its formula."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graftkit.execution.blocks import Reader, Workspace, cuts, open_feed
from graftkit.execution.reductions import dot
from graftkit.recipes import layout
from graftkit.recipes.coefficients import Measured, Rule, measured
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Input, Step

Found = dict[str, dict[str, list[float]]]
"""By rule and by what is measured together, each model's coefficient."""


def users(steps: Iterable[Step]) -> list[Step]:
    """The steps with a knob that a rule gives."""
    return [step for step in steps if measured(step)]


def squares(step: Step, sources: tuple[Named, ...], space: Workspace) -> Mapping[str, dict[int, float]]:
    """For each thing that is measured, `delta` or `weight`, the square of its norm for each model of the recipe."""
    reader, found = Reader(step, sources, space), {}
    thin = all(part.kind in ("base", "factors") and part.rows is None for part in step.models)
    for _, value in measured(step):
        of_delta = value.rule.of == "delta"
        by_factors = thin and of_delta
        sums = [_of_factors(p, sources) for p in step.models] if by_factors else _of_blocks(reader, of_delta)
        found[value.rule.of] = dict(zip(value.members, sums, strict=True))
    return found


def _of_factors(part: Input, sources: tuple[Named, ...]) -> float:
    """The square of an adapter's delta, by small products of its factors."""
    if part.kind == "base":
        return 0.0
    pair = open_feed(part, sources, np.float64).delta_factors()
    return float(((pair.left.T @ pair.left) * (pair.right @ pair.right.T)).sum())


def _of_blocks(reader: Reader, of_delta: bool) -> list[float]:
    """The squares of all models' deltas or weights, block by block."""
    sums = [0.0] * len(reader.models)
    for start, stop in cuts(reader.step):
        base = reader.read_base(start, stop)
        stack = reader.read_deltas(start, stop, base) if of_delta else reader.read_models(start, stop, base)
        sums = [total + float(dot(row, row)) for total, row in zip(sums, stack, strict=True)]
    return sums


def together(step: Step, rule: Rule) -> str:
    """What a tensor is measured together with: the model, its layer, or nothing."""
    if rule.scope == "model":
        return "model"
    number = layout.layer(step.name)
    return step.name if rule.scope == "tensor" else "outside the layers" if number is None else f"layer {number}"


def found(steps: Iterable[Step], sums: Mapping[str, Mapping[str, Mapping[int, float]]], count: int) -> Found:
    """The coefficients of all rules, from the squares of each step by its key."""
    totals: dict[str, dict[str, list[float]]] = {}
    rules: dict[str, Rule] = {}
    for step in steps:
        for _, value in measured(step):
            rules[str(value)] = value.rule
            line = totals.setdefault(str(value), {}).setdefault(together(step, value.rule), [0.0] * count)
            for k, square in sums[step.key][value.rule.of].items():
                line[k] += square
    return {name: {key: rules[name].values(line) for key, line in lines.items()} for name, lines in totals.items()}


def resolved(plan: Plan, coefficients: Found) -> Plan:
    """The plan with numbers in place of rules."""
    shards = tuple(
        replace(shard, steps=tuple(_numbered(s, coefficients) for s in shard.steps)) for shard in plan.shards
    )
    return replace(plan, shards=shards)


def _numbered(step: Step, coefficients: Found) -> Step:
    def number(value: Any) -> Any:
        if not isinstance(value, Measured):
            return value
        line = coefficients[str(value)][together(step, value.rule)]
        return tuple(line[k] for k in value.members)

    return replace(step, knobs={name: number(value) for name, value in step.knobs.items()}) if measured(step) else step
