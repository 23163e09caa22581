"""What a search maximises: the score of a recipe on tasks, merged into a live model.

Scores of different tasks are made comparable by what they can gain: 0 is the base (without one, the worst of the
models), 1 the best single model on that task, whichever way the metric runs. Both are measured once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from graftkit.data.tasks import Task
from graftkit.errors import DataError
from graftkit.execution.live import Live
from graftkit.measuring.evaluation import evaluate
from graftkit.measuring.items import METRICS, METRICS_OF
from graftkit.recipes.recipe import Recipe

GOALS = ("mean", "worst", "raw", "each")
"""`mean` or `worst` of the normalised scores; `raw`: the mean of scores of one metric as they are; `each` task by
itself, normalised: the Pareto front."""

LOOKS = (0.25, 0.5)  # shares of the items at which a trial may be given up
ERROR = 0.05  # the chance to give up a trial that is as good as the best so far, over all looks

Parts = dict[str, np.ndarray]
"""By task, numerators and denominators of its metric, [items, 2], signed so that more is better."""


@dataclass(frozen=True)
class Trial:
    """What a trial found: the score (or scores), by task, the seconds of merging and scoring, and how many of the items
    were looked at before it was given up, all without."""

    score: float | tuple[float, ...]
    tasks: Mapping[str, float]
    merge_seconds: float
    seconds: float
    share: float = 1.0


@dataclass
class Objective:
    """Scores recipes on tasks. By `calibrate`: `limits`, by task what counts as 0 and as 1; `alone`, the scores of base
    and models by task."""

    live: Live
    tasks: Sequence[Task]
    goal: str = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    device: str | None = None
    alone: dict[str, dict[str, float]] = field(default_factory=dict)

    def calibrate(self, told: Callable[[str], None] = lambda name: None) -> None:
        """Measures the base and each model by itself. Raises DataError for a task that no model is better at."""
        recipe = self.live.recipe
        for name in dict.fromkeys([*([recipe.base] if recipe.base else []), *(entry.model for entry in recipe.models)]):
            told(name)
            self.alone[name] = scores(self.parts(alone(recipe, name)))
        self.limit()

    def limit(self) -> None:
        """Sets the limits by the scores of base and models. Raises DataError for a task that no model is better at."""
        recipe = self.live.recipe
        for task in self.tasks:
            singles = [self.alone[entry.model][task.name] for entry in recipe.models]
            low = self.alone[recipe.base][task.name] if recipe.base else min(singles)
            if max(singles) <= low:
                raise DataError(
                    f"task {task.name}: no model of the recipe is better at it than the base ({low:.4g}), so there is "
                    "no scale from 0 to 1; leave the task out, or take the goal `raw`"
                )
            self.limits[task.name] = low, max(singles)

    def parts(self, recipe: Recipe, tasks: Sequence[Task] | None = None) -> Parts:
        """Merges a recipe and scores it item by item."""
        self.live.apply(recipe)
        return self._measured(self.tasks if tasks is None else tasks)

    def _measured(self, tasks: Sequence[Task]) -> Parts:
        found = evaluate([self.live.named("trial")], tasks, resamples=1, device=self.device)
        made = {}
        for score, summary in zip(found.scores, found.tasks, strict=True):
            sign = 1 if summary.metric.better == "higher" else -1
            values = np.array([item.parts(summary.metric.name) for item in score.items], np.float64)
            made[score.task] = values * [sign, 1]
        return made

    def score(self, parts: Parts) -> tuple[float | tuple[float, ...], dict[str, float]]:
        """The score that items amount to, and each task's."""
        found = scores(parts)
        if self.goal == "raw":
            return self._mean(found), found
        shares = self.shares(found)
        if self.goal == "each":
            return tuple(shares.values()), shares
        return min(shares.values()) if self.goal == "worst" else self._mean(shares), shares

    def shares(self, found: Mapping[str, float]) -> dict[str, float]:
        """Scores by task between their limits, 0 and 1."""
        return {name: (value - self.limits[name][0]) / self._width(name) for name, value in found.items()}

    def _width(self, task: str) -> float:
        low, high = self.limits[task]
        return high - low

    def _mean(self, found: Mapping[str, float]) -> float:
        weights = {name: self.weights.get(name, 1.0) for name in found}
        return sum(found[name] * weight for name, weight in weights.items()) / sum(weights.values())

    def __call__(self, recipe: Recipe, best: Parts | None = None) -> tuple[Trial, Parts]:
        """A trial. With the items of the `best` so far it is given up where it is clearly worse on some of them."""
        started = time.perf_counter()
        self.live.apply(recipe)
        merged = time.perf_counter()
        if best is None or self.goal not in ("mean", "raw"):
            parts, share = self._measured(self.tasks), 1.0
        else:
            parts, share = self._looked(best)
        score, tasks = self.score(parts if share == 1 else _completed(parts, best or {}))
        return Trial(score, tasks, merged - started, time.perf_counter() - started, share), parts

    def _looked(self, best: Parts) -> tuple[Parts, float]:
        """Items in growing shares, the same for all trials; stops where the trial is worse than the best."""
        orders = {t.name: np.random.default_rng(0).permutation(len(t.items)) for t in self.tasks}
        done: Parts = {task.name: np.full((len(task.items), 2), np.nan) for task in self.tasks}
        before = 0.0
        for share in (*LOOKS, 1.0):
            todo = []
            for task in self.tasks:
                count = len(task.items)
                chosen = np.sort(orders[task.name][round(before * count) : round(share * count)])
                if chosen.size:
                    todo.append((task, chosen))
            parts = self._measured([replace(t, items=tuple(t.items[k] for k in chosen)) for t, chosen in todo])
            for task, chosen in todo:
                done[task.name][chosen] = parts[task.name]
            before = share
            if share < 1 and self._is_worse(done, best):
                return done, share
        return done, 1.0

    def _is_worse(self, done: Parts, best: Parts) -> bool:
        """Whether the weighted mean of paired differences is below zero, by a normal test at the error of one look."""
        mean = variance = 0.0
        total = sum(self.weights.get(name, 1.0) for name in done)
        for name, parts in done.items():
            seen = ~np.isnan(parts[:, 0])
            if seen.sum() < 8:
                return False
            gaps = (parts[seen, 0] - best[name][seen, 0]) / best[name][:, 1].mean()
            factor = self.weights.get(name, 1.0) / total / (1.0 if self.goal == "raw" else self._width(name))
            mean += factor * float(gaps.mean())
            variance += factor**2 * float(gaps.var(ddof=1)) / int(seen.sum())
        limit = NormalDist().inv_cdf(1 - ERROR / len(LOOKS))
        return mean + limit * math.sqrt(variance) < 0


def scores(parts: Parts) -> dict[str, float]:
    """Each task's score, from its items."""
    return {name: float(values[:, 0].sum() / values[:, 1].sum()) for name, values in parts.items()}


def _completed(parts: Parts, best: Parts) -> Parts:
    """The items that were not looked at as the best's, moved by the mean difference of those that were."""
    made = {}
    for name, values in parts.items():
        seen, whole = ~np.isnan(values[:, 0]), best[name].copy()
        whole[:, 0] += (values[seen, 0] - best[name][seen, 0]).mean()
        made[name] = np.where(seen[:, None], values, whole)
    return made


def alone(recipe: Recipe, name: str) -> Recipe:
    """One of a recipe's models, or its base, as a recipe; in a VLM's recipe with all of the VLM around it."""
    entry = next((e for e in recipe.models if e.model == name), None)
    model = {"model": name} | ({"data": entry.data} if entry and entry.data else {})
    kept: dict[str, Any] = {k: v for k, v in recipe.to_dict().items() if k in ("base", "output", "accept_base", "seed")}
    models, vlm = [model], recipe.output.like if recipe.output.align else None
    if vlm and name != vlm:
        models = [{"model": vlm}, model]
        kept |= {"knobs": {"take": 1}, "base": None if name == recipe.base else recipe.base}
    elif vlm:  # its backbone is found by a text model
        kept["base"] = recipe.base or next(e.model for e in recipe.models if e.model != vlm)
    made = Recipe.model_validate({"method": "passthrough", "models": models, **kept})
    return made.model_copy(update={"directory": recipe.directory})


def check_goal(goal: str, tasks: Sequence[Task]) -> None:
    """Refuses a mean of scores that are not measured alike."""
    metrics = {METRICS_OF[task.kind][0] for task in tasks}
    if goal == "raw" and len(metrics) > 1:
        raise DataError(
            f"the tasks are measured by {', '.join(sorted(metrics))}, of which no mean can be taken; take the goal "
            f"`mean` (each {METRICS[min(metrics)].name} between base and best model), or name tasks of one metric"
        )
