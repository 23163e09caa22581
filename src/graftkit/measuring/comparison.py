"""Models against each other: differences on the same items, with paired bootstrap intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from graftkit.errors import DataError
from graftkit.measuring.resampling import Array, interval, resampled_sums
from graftkit.measuring.results import Evaluation, TaskSummary, parts_of
from graftkit.measuring.table import Cell, Column, Table, Value


@dataclass(frozen=True)
class Difference:
    """How far `model` is from `other` on a task: the first's metric minus the second's, with a paired interval."""

    task: str
    metric: str
    difference: Value
    verdict: str
    """`better`, `worse`, or `unclear` where the interval holds zero."""


@dataclass(frozen=True)
class Comparison:
    """Two models on all tasks of an evaluation."""

    model: str
    other: str
    differences: tuple[Difference, ...]

    def table(self) -> Table:
        """Tasks by difference and verdict."""
        columns = (Column("task"), Column("metric"), Column("difference"), Column("verdict"))
        rows = tuple((d.task, d.metric, d.difference, d.verdict) for d in self.differences)
        note = "paired bootstrap over items, 95%"
        return Table(columns, rows, title=f"{self.model} minus {self.other}", note=note)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(evaluation: Evaluation, model: str, other: str) -> Comparison:
    """The paired difference of two models on every task, by its primary metric.

    The same items are drawn for both, so what makes an item hard for all models cancels. Raises DataError for an
    unknown name, and where there are no resamples to draw.
    """
    return Comparison(model, other, tuple(_difference(evaluation, task, model, other) for task in evaluation.tasks))


def compare_all(evaluation: Evaluation, other: str) -> tuple[Comparison, ...]:
    """Every other model of an evaluation against one of them."""
    return tuple(compare(evaluation, model, other) for model in evaluation.models if model != other)


def differences_table(evaluation: Evaluation, other: str) -> Table:
    """Models by tasks: each model minus `other`, a mark where the paired interval excludes zero."""
    rows: list[tuple[Cell, ...]] = [
        (found.model, *(cell for d in found.differences for cell in (d.difference, d.verdict)))
        for found in compare_all(evaluation, other)
    ]
    columns = [Column("model")]
    for task in evaluation.tasks:
        columns += [Column(task.name, f"Δ {task.metric.name}"), Column("")]
    note = "paired bootstrap over items, 95%; unclear where the interval holds zero"
    return Table(tuple(columns), tuple(rows), title=f"minus {other}, on the same items", note=note)


def resampled_metric(evaluation: Evaluation, task: TaskSummary, models: tuple[str, ...]) -> Array:
    """The primary metric of each model in each resample, `[resamples, models]`: the same items drawn for all."""
    scores = [evaluation.score(model, task.name) for model in models]
    if evaluation.resamples < 1:
        raise DataError("comparisons need resamples; evaluate with resamples of 1000 or more")
    parts = np.stack([parts_of(score, task.metric.name) for score in scores], axis=1)  # [items, models, 2]
    sums = resampled_sums(parts.reshape(len(parts), -1), evaluation.resamples, evaluation.seed, task.name)
    pairs = sums.reshape(-1, len(models), 2)
    return pairs[..., 0] / pairs[..., 1]


def _difference(evaluation: Evaluation, task: TaskSummary, model: str, other: str) -> Difference:
    metric = task.metric
    samples = resampled_metric(evaluation, task, (model, other))
    first, second = (evaluation.score(name, task.name).metrics[metric.name].value for name in (model, other))
    low, high = interval(samples[:, 0] - samples[:, 1])
    verdict = "unclear"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == (metric.better == "higher") else "worse"
    return Difference(task.name, metric.name, Value(first - second, low, high), verdict)
