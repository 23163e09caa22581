"""The plan of a recipe that differs from a planned one in its models' weights alone, as the next trial of many does.

Weights that are numbers, and not 0, decide nothing but what comes out: inputs, their alignment and all steps stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graftkit import methods
from graftkit.recipes import knobs
from graftkit.recipes.plan import Plan, hash_of
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Step


def reweighted(before: Plan, recipe: Recipe) -> Plan | None:
    """What `plan` makes of a recipe, while no input is written to; None where more than weights is new.

    Raises RecipeError for weights that the method does not take.
    """
    merged = [step for step in before.steps if step.method]
    held = _without_weights(before.recipe)
    if held is None or held != _without_weights(recipe) or not _are_plain(before, merged):
        return None
    old, new = (knobs.settings(one, merged[0].name, 0).knobs.get("weight", ()) for one in (before.recipe, recipe))
    if not (old and all(old) and all(new)) or any(step.knobs["weight"] != old for step in merged):
        return None
    shards = tuple(
        replace(shard, steps=tuple(_with_weight(step, new) for step in shard.steps)) for shard in before.shards
    )
    planned = replace(before, recipe=recipe, shards=shards)
    return replace(planned, hash=hash_of(planned))


def _are_plain(before: Plan, merged: Sequence[Step]) -> bool:
    """Whether one method merges all tensors, in one stage, by what the recipe says of it for all of them."""
    recipe, method = before.recipe, before.recipe.method
    one = all(step.method == method and not step.group for step in merged)
    beside = recipe.rules or recipe.slices or before.gates or before.statistics or _reads_file(recipe)
    nested = any(named.nested for named in before.sources)
    return one and not beside and not nested and "weight" not in methods.get(method).lookups


def _reads_file(recipe: Recipe) -> bool:
    """Whether a knob's values stand in a file, which may have been written to."""
    return any(isinstance(value, dict) and "from" in value for value in recipe.knobs.values())


def _without_weights(recipe: Recipe) -> Any:
    """All else of a recipe, where all weights that it gives are numbers."""
    told = recipe.to_dict()
    places = (*told.get("models", ()), told.setdefault("knobs", {}))
    given = [place.pop("weight", 0) for place in places]
    flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
    return (recipe.directory, told) if all(isinstance(one, (int, float)) for one in flat) else None


def _with_weight(step: Step, weight: Any) -> Step:
    return replace(step, knobs={**step.knobs, "weight": weight}) if step.method else step
