"""Greedy soup: which of several models to average, decided by a score.

Wortsman et al. 2022, Model soups (arXiv 2203.05482), recipe 1. The models are taken best first; each stays in the soup
if the average with it scores at least as well as without. What comes out is a recipe.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.data.tasks import Task, load_task
from graftkit.errors import DataError, RecipeError
from graftkit.recipes.recipe import Recipe, load

Score = Callable[[Recipe], float]
"""How good the result of a recipe is: higher is better."""

Told = Callable[["Trial"], None]
"""Hears of every trial when its score is there."""


@dataclass(frozen=True)
class Trial:
    """One scored recipe: the models in it, and whether the last of them stayed. Single models come first."""

    models: tuple[str, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """The recipe of the models that were kept, its score, and every trial on the way."""

    recipe: Recipe
    score: float
    trials: tuple[Trial, ...]


def greedy_soup(recipe: Recipe | Mapping[str, Any] | str | Path, score: Score, told: Told | None = None) -> Soup:
    """Chooses among the models of a recipe, whose method (`average`, for the paper's soup) merges those in the pot.

    `score` is asked once for every model alone and once for every further candidate: 2 n - 1 times for n models. It is
    given recipes; `on_tasks` makes one that merges and evaluates them. Models that score alike keep their order.
    Raises RecipeError for a recipe of slices or with values listed by model, DataError for a score that is no number.
    """
    whole = load(recipe)
    _check(whole)
    trials: list[Trial] = []

    def tried(chosen: Sequence[int], best: float) -> float:
        pot = whole.model_copy(update={"models": [whole.models[k] for k in chosen]})
        found = float(score(pot))
        names = tuple(entry.model for entry in pot.models)
        if math.isnan(found):
            raise DataError(f"the score of {', '.join(names)} is not a number; nothing can be decided by it")
        trials.append(Trial(names, found, found >= best))
        if told:
            told(trials[-1])
        return found

    alone = [tried([k], -math.inf) for k in range(len(whole.models))]
    order = sorted(range(len(alone)), key=lambda k: -alone[k])
    kept, best = order[:1], alone[order[0]]
    for k in order[1:]:
        found = tried([*kept, k], best)
        if found >= best:
            kept, best = [*kept, k], found
    return Soup(whole.model_copy(update={"models": [whole.models[k] for k in kept]}), best, tuple(trials))


def _check(recipe: Recipe) -> None:
    if recipe.slices:
        raise RecipeError("recipe.slices: a soup is chosen among `models`; slices have no candidates")
    parts = [*recipe.prepare, *(step for rule in recipe.rules for step in rule.prepare or [])]
    given = [recipe.knobs, *(rule.knobs for rule in recipe.rules), *(next(iter(part.values())) for part in parts)]
    listed = next((name for knobs in given for name, value in knobs.items() if isinstance(value, list)), None)
    if listed:
        raise RecipeError(
            f"recipe: {listed!r} has one value for each of the models, and a soup leaves some out; "
            "write the values beside the models"
        )


def on_tasks(
    tasks: Sequence[Task | str | Path],
    *,
    scratch: Path | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> Score:
    """A score that merges a recipe into a directory under `scratch` (or the system's), evaluates it, and removes it.

    The score is the mean over tasks of their primary metric, negative where lower is better. Raises DataError for tasks
    that are not measured alike: no sum of accuracies and losses says which model is better.
    """
    from graftkit.execution.local import execute
    from graftkit.measuring.evaluation import evaluate
    from graftkit.recipes.plan import plan

    loaded = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    if not loaded:
        raise DataError("no task to score by")

    def score(recipe: Recipe) -> float:
        with tempfile.TemporaryDirectory(prefix=".graft-soup-", dir=scratch) as directory:
            out = Path(directory) / "soup"
            execute(plan(recipe), out, workers=workers)
            found = evaluate([out], loaded, resamples=100, device=device)
        metrics = {task.metric for task in found.tasks}
        if len(metrics) > 1:
            names = ", ".join(sorted(metric.name for metric in metrics))
            raise DataError(f"the tasks are measured by {names}; a soup needs tasks of one metric, so name fewer")
        metric = metrics.pop()
        values = [one.metrics[metric.name].value for one in found.scores]
        return (1 if metric.better == "higher" else -1) * sum(values) / len(values)

    return score
