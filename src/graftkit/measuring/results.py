"""What an evaluation found: scores per item, per subtask and per task, with intervals; frozen, and JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit.errors import DataError, unknown
from graftkit.measuring.items import METRICS, METRICS_OF, AnyItem, GeneratedItem, ItemScore, MeasuredItem, Metric
from graftkit.measuring.resampling import Array, ratio_estimates
from graftkit.measuring.table import Cell, Column, Table, Value

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["Evaluation", "GeneratedItem", "ItemScore", "MeasuredItem", "Metric", "Score", "TaskSummary", "summarise"]

FORMAT = 2
READABLE = (1, 2)  # format 1 knew neither skills nor generated items


@dataclass(frozen=True)
class Score:
    """One model on one task: metrics with intervals, in all and by subtask (empty without subtasks), and the items.

    `seconds`: what scoring took; where `cached`, in the run that did it.
    """

    model: str
    task: str
    metrics: Mapping[str, Value]
    subtasks: Mapping[str, Mapping[str, Value]]
    items: tuple[AnyItem, ...]
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class TaskSummary:
    """What was asked: a task without its items; `skill` is what it measures, `metrics` are given where the kind of
    task does not tell them, the primary one first."""

    name: str
    kind: str
    chat: bool
    description: str
    fingerprint: str
    items: int
    skill: str = ""
    metrics: tuple[Metric, ...] = ()

    @property
    def measures(self) -> str:
        """The skill, by default the task's name."""
        return self.skill or self.name

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return self.measured[0]

    @property
    def measured(self) -> tuple[Metric, ...]:
        """All metrics."""
        return self.metrics or tuple(METRICS[name] for name in METRICS_OF[self.kind])


@dataclass(frozen=True)
class Scored:
    """The items of a task under a model, and the seconds that they took (when they were computed)."""

    task: TaskSummary
    items: tuple[AnyItem, ...]
    seconds: float
    cached: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Scores of every model on every task.

    `sources` says where each model came from; `base` and `experts` (skill to model) name those that normalised scores
    refer to; `settings` holds what else the numbers depend on: seed, resamples, device, dtype.
    """

    models: tuple[str, ...]
    tasks: tuple[TaskSummary, ...]
    scores: tuple[Score, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of the bootstrap."""
        return int(self.settings.get("seed", 0))

    @property
    def resamples(self) -> int:
        """How many resamples the intervals rest on."""
        return int(self.settings.get("resamples", 10_000))

    def task(self, name: str) -> TaskSummary:
        """A task by name, or DataError with the nearest one."""
        found = {task.name: task for task in self.tasks}
        if name not in found:
            raise DataError(unknown("task", name, found))
        return found[name]

    def named(self, model: str) -> str:
        """A model's name, from its name or from where it came; DataError with the nearest one."""
        found = {source: name for name, source in self.sources.items()} | {name: name for name in self.models}
        if model not in found:
            raise DataError(unknown("model", model, found))
        return found[model]

    def score(self, model: str, task: str) -> Score:
        """The score of a model on a task, or DataError with the nearest name."""
        if model not in self.models:
            raise DataError(unknown("model", model, self.models))
        self.task(task)
        return next(score for score in self.scores if (score.model, score.task) == (model, task))

    def table(self, task: str | None = None) -> Table:
        """Models by tasks, each by its primary metric; or, for one task, its subtasks by models."""
        return _task_table(self, self.task(task)) if task is not None else _table(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with scores per item, task fingerprints, versions and seed; `from_dict` reads it back."""
        return {"format": FORMAT} | asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Evaluation:
        """An evaluation from its JSON; DataError where it is none, or not whole."""
        if not isinstance(data, Mapping) or data.get("format") not in READABLE or "scores" not in data:
            keys = ", ".join(sorted(map(str, data))[:8]) if isinstance(data, Mapping) else type(data).__name__
            wanted = " or ".join(map(str, READABLE))
            raise DataError(f"not an evaluation of format {wanted}: it has {keys or 'nothing'}")
        known = {part.name for part in fields(Evaluation)}
        found: Evaluation = parsed(_adapter(), {key: data[key] for key in data if key in known}, "not an evaluation")
        _check_whole(found)
        return found


def parsed(adapter: TypeAdapter[Any], data: Any, refusal: str) -> Any:
    """JSON as what `adapter` makes of it; DataError with the place of the first thing that does not fit."""
    from pydantic import ValidationError

    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{refusal}: {where}: {first['msg']}, got {first['input']!r:.60}") from error


@cache
def _adapter() -> TypeAdapter[Evaluation]:
    from pydantic import TypeAdapter

    return TypeAdapter(Evaluation)


def _check_whole(found: Evaluation) -> None:
    """Every model has a score on every task, each with one entry per item."""
    scores = {(score.model, score.task): score for score in found.scores}
    for task in found.tasks:
        if task.kind not in METRICS_OF and not task.metrics:
            raise DataError(f"not an evaluation: task {task.name}: {unknown('kind', task.kind, METRICS_OF)}")
        for model in found.models:
            score = scores.get((model, task.name))
            if score is None or len(score.items) != task.items or task.metric.name not in score.metrics:
                raise DataError(f"not a whole evaluation: {model} has no full score on {task.name}; evaluate again")


def parts_of(score: Score, metric: str) -> Array:
    """Numerators and denominators of a metric, `[items, 2]`."""
    return np.array([item.parts(metric) for item in score.items], dtype=np.float64)


def summarise(
    model: str, task: TaskSummary, items: tuple[AnyItem, ...], seconds: float, *, resamples: int, seed: int,
    cached: bool = False,
) -> Score:  # fmt: skip
    """The score that items amount to, with bootstrap intervals over items, in all and by subtask."""
    names = [metric.name for metric in task.measured]
    parts = np.array([[item.parts(name) for name in names] for item in items])  # [items, metrics, 2]

    def estimates(chosen: Array, key: str) -> dict[str, Value]:
        return dict(zip(names, ratio_estimates(chosen, resamples, seed, key), strict=True))

    labels = np.array([item.subtask for item in items])
    found = sorted(set(labels.tolist()))
    subtasks = (
        {name: estimates(parts[labels == name], f"{task.name}/{name}") for name in found} if found != [""] else {}
    )
    return Score(model, task.name, estimates(parts, task.name), subtasks, items, seconds, cached)


def _table(evaluation: Evaluation) -> Table:
    tasks = evaluation.tasks
    columns = [Column(task.name, task.metric.unit or task.metric.name, task.metric.better) for task in tasks]
    rows = [_row(evaluation, model) for model in evaluation.models]
    note = f"95% bootstrap intervals over items ({', '.join(f'{task.name}: {task.items}' for task in tasks)})"
    return Table((Column("model"), *columns), tuple(rows), note=note)


def _row(evaluation: Evaluation, model: str) -> tuple[Cell, ...]:
    scores = [evaluation.score(model, task.name).metrics[task.metric.name] for task in evaluation.tasks]
    return (model, *scores)


def _task_table(evaluation: Evaluation, task: TaskSummary) -> Table:
    """Subtasks by models: there may be many of the first."""
    scores = [evaluation.score(model, task.name) for model in evaluation.models]
    metric = task.metric
    columns = [Column(model, metric.unit or metric.name, metric.better) for model in evaluation.models]
    rows: list[tuple[Cell, ...]] = [("all", *(score.metrics[metric.name] for score in scores))]
    for name in scores[0].subtasks:
        rows.append((name or "(none)", *(score.subtasks[name][metric.name] for score in scores)))
    title, note = f"{task.name} by subtask", task.description
    return Table((Column("subtask"), *columns), tuple(rows), title, note, across=True)
