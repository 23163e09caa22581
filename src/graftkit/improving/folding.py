"""`graft gates fold`: several models by recipes of two, each the result so far and the next model, as the papers read.

The order of the models matters. What was merged speaks for all domains that went into it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftkit.checkpoints.adapters import CONFIG
from graftkit.data.tasks import Task
from graftkit.errors import OutputError, PlanError
from graftkit.execution.local import merge
from graftkit.improving.gated import RECIPE, Place, domains
from graftkit.recipes.recipe import ModelEntry, Output, Recipe, load

RECORD = "fold.json"
Make = Callable[[Recipe, Path, Sequence[Sequence[Task]]], Any]
"""Makes the gates of a recipe of two models under a directory, from the examples of each."""


def fold(
    recipe: Recipe | str | Path,
    out: Path,
    make: Make,
    *,
    data: Sequence[Place] = (),
    settings: Mapping[str, Any] | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Path:
    """Makes gates for two models, merges them, goes on with the next; returns the recipe of the last pair.

    Under `out` stands a directory for each pair: `1`, `2`, ...; `merged` in it is what the next begins with. Adapters
    stay adapters, their ranks added up. Pairs that are there already are not made again; `fold.json` says of what they
    were made, and by which `settings` of `make`.
    Raises PlanError for fewer than three models, OutputError for a directory that holds something else, and what `make`
    and the merge raise.
    """
    asked = load(recipe)
    if len(asked.models) < 3:
        raise PlanError(f"a fold goes over three models or more, and the recipe has {len(asked.models)}")
    tasks = domains(asked, data)
    _take(out, _identity(asked, tasks, settings or {}))
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


def _identity(asked: Recipe, tasks: Sequence[Sequence[Task]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that a fold's result depends on, as JSON holds it."""
    from graftkit.checkpoints.resolve import open_source

    models = [open_source(Path(_entry(asked, k).model)) for k in range(len(asked.models))]
    told = {
        "recipe": asked.model_dump(mode="json", exclude={"models"}),
        "models": [[entry.model_dump(mode="json", exclude={"model", "data"}), source.fingerprint()]
                   for entry, source in zip(asked.models, models, strict=True)],
        "data": [[[task.kind, task.fingerprint] for task in own] for own in tasks],
        "settings": dict(settings),
    }  # fmt: skip
    for source in models:
        source.close()
    found: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return found


def _take(out: Path, identity: dict[str, Any]) -> None:
    """Makes the directory, or goes on in that of the same fold. Raises OutputError where anything else stands there."""
    file = out / RECORD
    try:
        if out.exists() and not file.is_file() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out}: exists already and holds no fold; choose another name")
        held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else identity
        changed = next((key for key, value in identity.items() if held.get(key) != value), None)
        if changed is not None:
            raise OutputError(f"{out}: holds a fold with another {changed}; choose another name, or repeat that one's")
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read or written ({error})") from error


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
