"""The HTML report: one file that needs nothing else, on a screen, on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import OutputError, missing_extra
from graftkit.measuring.comparison import compare_all, differences_table
from graftkit.measuring.normalised import normalised_table
from graftkit.measuring.results import Evaluation, Metric
from graftkit.measuring.table import Cell, Column, Table, Value
from graftkit.reporting import experts, gates, plots, records
from graftkit.reporting.experts import Beside
from graftkit.reporting.lineage import is_nested, lineage
from graftkit.reporting.records import Record

if TYPE_CHECKING:
    from jinja2 import Template

_FAINT = 1.0  # per cent: below it a heat map is faint all over

Merge = tuple[str, Mapping[str, Any]]
"""A merged model's name and its record, the content of `graft.json`."""


def write_report(
    out: Path,
    *,
    title: str,
    evaluation: Evaluation | Mapping[str, Any] | None,
    merges: Sequence[Merge] = (),
    beside: Sequence[Beside] = (),
    story: str = "",
    commands: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML file and return its path.

    `evaluation`: an evaluation, its `to_dict()`, or None to show merges alone. `merges`: names (those of the
    evaluation, where it has the model) with records. `beside`: the merges' inputs, measured (`measure_experts`).
    `story`: plain text, paragraphs apart by an empty line. `commands`: what to type to get the same again. Everything
    is escaped. Raises GraftError without the extra `report`, DataError where the JSON of the evaluation or of a record
    is none, OutputError where the file cannot be written.
    """
    if evaluation is not None and not isinstance(evaluation, Evaluation):
        evaluation = Evaluation.from_dict(evaluation)
    read = [(name, records.read(record, name)) for name, record in merges]
    page = _template().render(
        title=title,
        paragraphs=[part.strip() for part in re.split(r"\n\s*\n", story) if part.strip()],
        commands=[*commands, *_commands(evaluation, commands)],
        **_scores(evaluation),
        **_merges(read),
        beside=experts.shown(beside),
        versions=_versions(evaluation, read),
    )
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: the report cannot be written: {error.strerror}") from error
    return out


def _template() -> Template:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise missing_extra("report", "jinja2") from error
    environment = Environment(
        loader=PackageLoader("graftkit.reporting", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["picture"] = Markup  # our own SVG, whose texts matplotlib has escaped
    return environment.get_template("report.html.jinja")


def _scores(evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {"evaluation": None, "spent": None}
    table = evaluation.table()
    pictures = [
        plots.interval_plot(
            evaluation.models,
            [evaluation.score(model, task.name).metrics[task.metric.name] for model in evaluation.models],
            xlabel=table.columns[index].heading,
            best=table.best(index),
        )
        for index, task in enumerate(evaluation.tasks, start=1)
    ]
    breakdowns = [
        evaluation.table(task.name)
        for task in evaluation.tasks
        if evaluation.score(evaluation.models[0], task.name).subtasks
    ]
    return {
        "evaluation": evaluation, "scores": table, "score_pictures": pictures, "breakdowns": breakdowns,
        "spent": _spent(evaluation), **_differences(evaluation), **_normalised(evaluation),
    }  # fmt: skip


def _differences(evaluation: Evaluation) -> dict[str, Any]:
    """Every model minus the base, task by task, paired: a table, and a picture a task."""
    base = evaluation.base
    if base is None or evaluation.resamples < 1 or len(evaluation.models) < 2:
        return {"differences": None}
    found = compare_all(evaluation, base)
    drawn = [
        plots.interval_plot(
            [one.model for one in found], [one.differences[index].difference for one in found],
            xlabel=f"Δ {_named(task.metric)} ({task.metric.better} is better)",
            best=frozenset(k for k, one in enumerate(found) if one.differences[index].verdict == "better"),
            lines=(0.0,),
        )
        for index, task in enumerate(evaluation.tasks)
    ]  # fmt: skip
    return {"differences": differences_table(evaluation, base), "difference_pictures": drawn}


def _named(metric: Metric) -> str:
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


def _normalised(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.base is None or not evaluation.experts or evaluation.resamples < 1:
        return {"normalised": None}
    table = normalised_table(evaluation)
    last = len(table.columns) - 1
    means = [row[last] for row in table.rows]
    values = [cell if isinstance(cell, Value) else Value(float("nan")) for cell in means]
    picture = plots.interval_plot(
        evaluation.models, values, xlabel="mean normalised score ↑", best=table.best(last), lines=(0.0, 1.0)
    )
    return {"normalised": table, "normalised_picture": picture}


def _spent(evaluation: Evaluation) -> Table:
    """Seconds of each model on each task; the note tells what was read from a cache."""
    columns = (Column("model"), *(Column(task.name, "s", None, 1) for task in evaluation.tasks))
    rows: list[tuple[Cell, ...]] = [
        (model, *(evaluation.score(model, task.name).seconds for task in evaluation.tasks))
        for model in evaluation.models
    ]
    cached = sum(score.cached for score in evaluation.scores)
    note = (
        f"{cached} of {len(evaluation.scores)} were read from the cache: the seconds are of the run that computed them"
    )
    return Table(columns, tuple(rows), note=note if cached else "")


def _merges(merges: Sequence[tuple[str, Record]]) -> dict[str, Any]:
    moved, swallowed = (
        max((value for _, record in merges for grid in kind(record) for value in grid.known()), default=0.0)
        for kind in (records.norm_grids, records.swallowed_grids)
    )
    shown = [_merge(name, record, moved, swallowed) for name, record in merges]
    if not shown:
        return {"merges": []}
    return {"merges": shown, "costs": records.costs_table(merges), "deltas": records.deltas_table(merges)}


def _merge(name: str, record: Record, moved: float, swallowed: float) -> dict[str, Any]:
    ancestors = lineage(record)
    return {
        "name": name, "recipe": record.recipe_yaml, "inputs": records.inputs_table(record), "notes": record.notes,
        "plan": record.plan.hash, "pictures": _layers(record, moved, swallowed),
        "lineage": ancestors if is_nested(ancestors) else (),
    }  # fmt: skip


def _layers(record: Record, moved: float, swallowed: float) -> list[tuple[str, str]]:
    """Captions and heat maps: norms of deltas and what the cast swallowed, each up to the largest in all merges."""
    pictures = []
    for grid in records.norm_grids(record):
        picture = records.heat_map(grid, "norm of the delta", top=moved)
        pictures.append((f"How far each matrix moved ({grid.stack})", picture))
    for caption, grids in (
        ("What rounding did to it", records.cast_grids(record)),
        ("What the adapter's rank left out", records.rank_grids(record)),
    ):
        for grid in grids:
            picture = records.heat_map(grid, "% of the delta", color=plots.OTHER, top=max(_FAINT, *grid.known()))
            pictures.append((f"{caption} ({grid.stack})", picture))
    for grid in records.swallowed_grids(record):
        picture = records.heat_map(grid, "% of weights", color=plots.OTHER, top=max(_FAINT, swallowed))
        pictures.append((f"Changes too small for the output's dtype ({grid.stack})", picture))
    return pictures + gates.pictures(record)


def _commands(evaluation: Evaluation | None, given: Sequence[str]) -> list[str]:
    """The command behind an evaluation, where it is known and nothing better was given."""
    command = evaluation.settings.get("command") if evaluation and not given else None
    return [str(command)] if command else []


def _versions(evaluation: Evaluation | None, merges: Sequence[tuple[str, Record]]) -> Table:
    """Versions and machines behind the evaluation and each merge; merges of one kind share a column."""
    sources: list[tuple[str, Mapping[str, Any]]] = [("evaluation", evaluation.versions)] if evaluation else []
    sources += [(name, {**record.versions, **record.machine}) for name, record in merges]
    keys = list(dict.fromkeys(key for _, found in sources for key in found))
    alike: dict[tuple[str | None, ...], list[str]] = {}
    for name, found in sources:
        values = (found.get(key) for key in keys)
        alike.setdefault(tuple(None if value is None else str(value) for value in values), []).append(name)
    heads = (Column("of"), *(Column(", ".join(names)) for names in alike.values()))
    return Table(heads, tuple((key, *(values[place] for values in alike)) for place, key in enumerate(keys)))
