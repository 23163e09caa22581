"""Models against each other: paired differences, and the normalised score that says how much of an expert was kept."""

from __future__ import annotations

import math
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


def normalised_score(base: float, merged: float, expert: float) -> float:
    """How much of the expert's gain a merged model has: `(base - merged) / (base - expert)`.

    0 is the base, 1 the expert; the same expression serves losses and accuracies. NaN where expert and base are equal.
    """
    return (base - merged) / (base - expert) if base != expert else math.nan


def normalised_scores(evaluation: Evaluation, model: str) -> dict[str, Value]:
    """A model's normalised score on each task with an expert, with a paired interval; their mean under the key `mean`.

    A task whose expert does not differ clearly from the base (the interval of their difference holds zero) has NaN: its
    ratio means nothing, and the mean leaves it out. Raises DataError where the evaluation names no base.
    """
    if evaluation.base is None:
        raise DataError("normalised scores need a base; name it as base=")
    tasks = [task for task in evaluation.tasks if task.name in evaluation.experts]
    scores, drawn = {}, []
    for task in tasks:
        value, samples = _normalised(evaluation, task, model)
        scores[task.name] = value
        drawn += [samples] if samples is not None else []
    known = [score.value for score in scores.values() if not math.isnan(score.value)]
    scores["mean"] = Value(float(np.mean(known)), *interval(np.mean(drawn, axis=0))) if known else Value(math.nan)
    return scores


def normalised_table(evaluation: Evaluation) -> Table:
    """Models by tasks with experts: normalised scores and their mean; base and experts are there as marks."""
    found = {model: normalised_scores(evaluation, model) for model in evaluation.models}
    names = list(next(iter(found.values())))
    columns = (Column("model"), *(Column(name, better="higher", digits=2) for name in names))
    rows: list[tuple[Cell, ...]] = [(model, *(scores[name] for name in names)) for model, scores in found.items()]
    # Whether a task has scores depends on its base and expert only, so any model tells.
    unclear = [name for name in names if name != "mean" and math.isnan(found[evaluation.models[0]][name].value)]
    note = "0 is the base, 1 the task's expert"
    if unclear:
        note += f"; no score on {', '.join(unclear)}, nor in the mean: the expert does not differ clearly from the base"
    return Table(columns, tuple(rows), note=note)


def _difference(evaluation: Evaluation, task: TaskSummary, model: str, other: str) -> Difference:
    metric = task.metric
    samples = _resampled(evaluation, task, (model, other))
    first, second = (evaluation.score(name, task.name).metrics[metric.name].value for name in (model, other))
    low, high = interval(samples[:, 0] - samples[:, 1])
    verdict = "unclear"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == (metric.better == "higher") else "worse"
    return Difference(task.name, metric.name, Value(first - second, low, high), verdict)


def _normalised(evaluation: Evaluation, task: TaskSummary, model: str) -> tuple[Value, Array | None]:
    names = (str(evaluation.base), model, evaluation.experts[task.name])
    base, merged, expert = (evaluation.score(name, task.name).metrics[task.metric.name].value for name in names)
    samples = _resampled(evaluation, task, names)
    gain = samples[:, 0] - samples[:, 2]
    low, high = interval(gain)
    if low <= 0 <= high:
        return Value(math.nan), None
    ratios = (samples[:, 0] - samples[:, 1]) / np.where(gain == 0, np.nan, gain)
    ratios = np.where(np.isnan(ratios), np.nanmedian(ratios), ratios)  # a draw without gain: at most a few in a hundred
    return Value(normalised_score(base, merged, expert), *interval(ratios)), ratios


def _resampled(evaluation: Evaluation, task: TaskSummary, models: tuple[str, ...]) -> Array:
    """The primary metric of each model in each resample, `[resamples, models]`."""
    scores = [evaluation.score(model, task.name) for model in models]
    if evaluation.resamples < 1:
        raise DataError("comparisons need resamples; evaluate with resamples of 1000 or more")
    parts = np.stack([parts_of(score, task.metric.name) for score in scores], axis=1)  # [items, models, 2]
    sums = resampled_sums(parts.reshape(len(parts), -1), evaluation.resamples, evaluation.seed, task.name)
    pairs = sums.reshape(-1, len(models), 2)
    return pairs[..., 0] / pairs[..., 1]
