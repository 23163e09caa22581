"""The normalised score: how much of what its experts have learnt a merged model has, on one scale for all skills.

For a skill with base `b`, expert `e` and merged model `m`, each scored by the same metric on the same items,

    score = (b - m) / (b - e)

0 is the base, 1 the expert, above 1 better than the expert, below 0 worse than the base. Losses and accuracies need no
case of their own: both differences turn their sign with the metric. A skill with several tasks has their mean; a model
has the mean over its skills. Intervals are paired: each resample draws one set of items for base, expert and merged
model, and tasks are drawn independently of each other.

Where the expert is not clearly better than the base (the 95% interval of their difference reaches zero), the ratio
means nothing: such a task has no score (NaN) and is left out of every mean, which the table says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graftkit.errors import DataError
from graftkit.measuring.comparison import resampled_metric
from graftkit.measuring.resampling import Array, interval
from graftkit.measuring.results import Evaluation, TaskSummary
from graftkit.measuring.table import Cell, Column, Table, Value

MEAN = "mean"
_Drawn = tuple[float, Array]  # a score, and the same in each resample


def normalised_score(base: float, merged: float, expert: float) -> float:
    """How much of the expert's gain a merged model has: `(base - merged) / (base - expert)`.

    0 is the base, 1 the expert; the same expression serves losses and accuracies. NaN where expert and base are equal.
    """
    return (base - merged) / (base - expert) if base != expert else math.nan


def normalised_scores(evaluation: Evaluation, model: str) -> dict[str, Value]:
    """A model's normalised score on each skill with an expert, with a paired interval; their mean under the key `mean`.

    NaN where no task of the skill has a clear expert. Raises DataError where the evaluation names no base.
    """
    if evaluation.base is None:
        raise DataError("normalised scores need a base; name it as base=")
    found = {skill: _of_skill(evaluation, skill, model) for skill in _skills(evaluation)}
    scores = {skill: _value(drawn) for skill, drawn in found.items()}
    return scores | {MEAN: _value(_mean([drawn for drawn in found.values() if drawn is not None]))}


def normalised_table(evaluation: Evaluation) -> Table:
    """Models by skills with experts: normalised scores and their mean; base and experts are there as marks."""
    found = {model: normalised_scores(evaluation, model) for model in evaluation.models}
    names = list(next(iter(found.values())))
    columns = (Column("model"), *(Column(name, better="higher", digits=2) for name in names))
    rows: list[tuple[Cell, ...]] = [(model, *(scores[name] for name in names)) for model, scores in found.items()]
    note = "0 is the base, 1 the skill's expert; 95% paired bootstrap intervals"
    unclear = unclear_tasks(evaluation)
    if unclear:
        note += f"; no score on {', '.join(unclear)}, nor in the mean: the expert is not clearly better than the base"
    if all(task.measures in evaluation.experts for task in evaluation.tasks):
        note += "; no task asks for what no expert learnt, so what a merge lost of the base is not seen"
    return Table(columns, tuple(rows), title="normalised score", note=note)


def unclear_tasks(evaluation: Evaluation) -> list[str]:
    """The tasks whose expert is not clearly better than the base; a matter of those two, whatever was merged."""
    base = str(evaluation.base)
    return [
        task.name
        for skill in _skills(evaluation)
        for task in _tasks(evaluation, skill)
        if _of_task(evaluation, task, base, evaluation.experts[skill]) is None
    ]


def _skills(evaluation: Evaluation) -> list[str]:
    """The skills with an expert, in the order of their tasks."""
    return [skill for skill in dict.fromkeys(task.measures for task in evaluation.tasks) if skill in evaluation.experts]


def _tasks(evaluation: Evaluation, skill: str) -> list[TaskSummary]:
    return [task for task in evaluation.tasks if task.measures == skill]


def _of_skill(evaluation: Evaluation, skill: str, model: str) -> _Drawn | None:
    expert = evaluation.experts[skill]
    found = (_of_task(evaluation, task, model, expert) for task in _tasks(evaluation, skill))
    return _mean([drawn for drawn in found if drawn is not None])


def _of_task(evaluation: Evaluation, task: TaskSummary, model: str, expert: str) -> _Drawn | None:
    names = (str(evaluation.base), model, expert)
    base, merged, goal = (evaluation.score(name, task.name).metrics[task.metric.name].value for name in names)
    samples = resampled_metric(evaluation, task, names)
    gain = samples[:, 0] - samples[:, 2]
    low, high = interval(gain)
    if low <= 0 <= high or (low > 0) != (task.metric.better == "lower"):
        return None
    ratios = (samples[:, 0] - samples[:, 1]) / np.where(gain == 0, np.nan, gain)
    ratios = np.where(np.isnan(ratios), np.nanmedian(ratios), ratios)  # a draw without gain: at most a few in a hundred
    return normalised_score(base, merged, goal), ratios


def _mean(found: Sequence[_Drawn]) -> _Drawn | None:
    if not found:
        return None
    return float(np.mean([score for score, _ in found])), np.mean([drawn for _, drawn in found], axis=0)


def _value(drawn: _Drawn | None) -> Value:
    return Value(math.nan) if drawn is None else Value(drawn[0], *interval(drawn[1]))
