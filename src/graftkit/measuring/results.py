"""What an evaluation found: scores per item, per subtask and per task, with intervals; frozen, and JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from graftkit.errors import DataError, unknown
from graftkit.measuring.resampling import Array, ratio_estimates
from graftkit.measuring.table import Cell, Column, Table, Value

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """A score: its name, unit and better direction; for every metric a task's score is a ratio of sums over items."""

    name: str
    unit: str
    better: Literal["higher", "lower"]


METRICS = {
    "loss": Metric("loss", "nats/token", "lower"),
    "bits_per_byte": Metric("bits_per_byte", "bits/byte", "lower"),
    "accuracy": Metric("accuracy", "", "higher"),
    "accuracy_by_sum": Metric("accuracy_by_sum", "", "higher"),
}
"""`loss`: negative log-probability per token of the right answers. `bits_per_byte`: the same per byte of their text,
which compares across tokenizers. `accuracy`: the choice with the highest log-probability per byte is the right one;
`accuracy_by_sum`: the one with the highest log-probability, whatever its length."""

METRICS_OF = {"answer_loss": ("loss", "bits_per_byte"), "multiple_choice": ("accuracy", "accuracy_by_sum", "loss")}
"""The metrics of each kind of task; the first is the primary one."""


@dataclass(frozen=True)
class ItemScore:
    """One item under one model; each tuple has one entry per choice: summed log-probability (nats), tokens, bytes."""

    subtask: str
    answer: int
    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    def parts(self, metric: str) -> tuple[float, float]:
        """Numerator and denominator of a metric; a task's score is the sum of the first over the sum of the second."""
        loss = -self.log_probs[self.answer]
        if metric == "loss":
            return loss, self.tokens[self.answer]
        if metric == "bits_per_byte":
            return loss / float(np.log(2)), self.bytes[self.answer]
        per = self.bytes if metric == "accuracy" else [1] * len(self.bytes)
        picked = int(np.argmax([value / size for value, size in zip(self.log_probs, per, strict=True)]))
        return float(picked == self.answer), 1.0


@dataclass(frozen=True)
class Score:
    """One model on one task: metrics with intervals, in all and by subtask (empty without subtasks), and the items."""

    model: str
    task: str
    metrics: Mapping[str, Value]
    subtasks: Mapping[str, Mapping[str, Value]]
    items: tuple[ItemScore, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class TaskSummary:
    """What was asked: a task without its items."""

    name: str
    kind: str
    chat: bool
    description: str
    fingerprint: str
    items: int

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return METRICS[METRICS_OF[self.kind][0]]


@dataclass(frozen=True)
class Evaluation:
    """Scores of every model on every task.

    `sources` says where each model came from; `base` and `experts` (task to model) name those that normalised scores
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

    def score(self, model: str, task: str) -> Score:
        """The score of a model on a task, or DataError with the nearest name."""
        if model not in self.models:
            raise DataError(unknown("model", model, self.models))
        self.task(task)
        return next(score for score in self.scores if (score.model, score.task) == (model, task))

    def table(self, task: str | None = None) -> Table:
        """Models by tasks, each by its primary metric; or, for one task, models by subtasks."""
        return _task_table(self, self.task(task)) if task is not None else _table(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with scores per item, task fingerprints, versions and seed; `from_dict` reads it back."""
        return {"format": FORMAT} | asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Evaluation:
        """An evaluation from its JSON; DataError where it is none."""
        if data.get("format") != FORMAT or "scores" not in data:
            raise DataError(f"not an evaluation of format {FORMAT}: keys {', '.join(sorted(map(str, data))[:8])}")
        tasks = tuple(TaskSummary(**task) for task in data["tasks"])
        scores = tuple(_score_from(score) for score in data["scores"])
        rest = {key: data[key] for key in ("sources", "base", "experts", "settings", "versions")}
        return Evaluation(tuple(data["models"]), tasks, scores, **rest)


def parts_of(score: Score, metric: str) -> Array:
    """Numerators and denominators of a metric, `[items, 2]`."""
    return np.array([item.parts(metric) for item in score.items], dtype=np.float64)


def summarise(
    model: str, task: TaskSummary, items: tuple[ItemScore, ...], seconds: float, *, resamples: int, seed: int
) -> Score:
    """The score that items amount to, with bootstrap intervals over items, in all and by subtask."""
    names = METRICS_OF[task.kind]
    parts = np.array([[item.parts(name) for name in names] for item in items])  # [items, metrics, 2]

    def estimates(chosen: Array, key: str) -> dict[str, Value]:
        return dict(zip(names, ratio_estimates(chosen, resamples, seed, key), strict=True))

    labels = np.array([item.subtask for item in items])
    found = sorted(set(labels.tolist()))
    subtasks = (
        {name: estimates(parts[labels == name], f"{task.name}/{name}") for name in found} if found != [""] else {}
    )
    return Score(model, task.name, estimates(parts, task.name), subtasks, items, seconds)


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
    scores = [evaluation.score(model, task.name) for model in evaluation.models]
    metric, subtasks = task.metric, list(scores[0].subtasks)
    unit = metric.unit or metric.name
    columns = [Column(name or "(none)", unit, metric.better) for name in (task.name, *subtasks)]
    rows: list[tuple[Cell, ...]] = [
        (s.model, s.metrics[metric.name], *(s.subtasks[name][metric.name] for name in subtasks)) for s in scores
    ]
    return Table((Column("model"), *columns), tuple(rows), title=task.name, note=task.description)


def _score_from(data: Mapping[str, Any]) -> Score:
    def values(metrics: Mapping[str, Any]) -> dict[str, Value]:
        return {name: Value.from_dict(value) for name, value in metrics.items()}

    items = tuple(
        ItemScore(i["subtask"], i["answer"], tuple(i["log_probs"]), tuple(i["tokens"]), tuple(i["bytes"]))
        for i in data["items"]
    )
    subtasks = {name: values(metrics) for name, metrics in data["subtasks"].items()}
    return Score(data["model"], data["task"], values(data["metrics"]), subtasks, items, data["seconds"])
