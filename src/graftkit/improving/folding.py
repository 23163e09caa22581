"""`graft gates fold`: several models by recipes of two, each the result so far and the next model, as the papers read.

The order of the models matters. What was merged speaks for all domains that went into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graftkit.checkpoints.adapters import CONFIG
from graftkit.data.tasks import Task
from graftkit.errors import PlanError
from graftkit.execution.local import merge
from graftkit.improving.gated import RECIPE, Place, domains
from graftkit.recipes.recipe import ModelEntry, Output, Recipe, load

Make = Callable[[Recipe, Path, Sequence[Sequence[Task]]], Any]
"""Makes the gates of a recipe of two models under a directory, from the examples of each."""


def fold(
    recipe: Recipe | str | Path,
    out: Path,
    make: Make,
    *,
    data: Sequence[Place] = (),
    told: Callable[[str], None] = lambda line: None,
) -> Path:
    """Makes gates for two models, merges them, goes on with the next; returns the recipe of the last pair.

    Under `out` stands a directory for each pair: `1`, `2`, ...; `merged` in it is what the next begins with. Adapters
    stay adapters, their ranks added up. Pairs that are there already are not made again.
    Raises PlanError for fewer than three models, and what `make` and the merge raise.
    """
    asked = load(recipe)
    if len(asked.models) < 3:
        raise PlanError(f"a fold goes over three models or more, and the recipe has {len(asked.models)}")
    tasks = domains(asked, data)
    sofar, seen = _entry(asked, 0), list(tasks[0])
    for k in range(1, len(asked.models)):
        place = out / str(k)
        pair = asked.model_copy(update={"models": [sofar, _entry(asked, k)]})
        if not (place / RECIPE).is_file():
            told(f"gates of {sofar.model} and {asked.models[k].model}")
            make(pair, place, [tuple(seen), tasks[k]])
        seen += tasks[k]
        if k + 1 < len(asked.models):
            sofar = ModelEntry(model=str(_merged(asked, place).resolve()))
    return place / RECIPE


def _entry(asked: Recipe, k: int) -> ModelEntry:
    """A model by a path that leads to it from anywhere, with what stands beside it."""
    from graftkit.checkpoints.resolve import directory_of

    entry = asked.models[k]
    return entry.model_copy(update={"model": str(directory_of(entry.model, asked.directory).resolve()), "data": None})


def _merged(asked: Recipe, place: Path) -> Path:
    """The result of a pair, in float32, so that rounding does not add up: an adapter where all models are."""
    from graftkit.checkpoints.resolve import directory_of

    out = place / "merged"
    if out.exists():
        return out
    adapters = all((directory_of(entry.model, asked.directory) / CONFIG).is_file() for entry in asked.models)
    form = {"as": "adapter", "rank": "exact", "dtype": "float32"} if adapters else {"dtype": "float32"}
    pair = load(place / RECIPE)
    merge(pair.model_copy(update={"output": Output.model_validate(form)}), out)
    return out
