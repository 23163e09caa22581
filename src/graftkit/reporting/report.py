"""The HTML report: one file that needs nothing else, on a screen, on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import OutputError, missing_extra
from graftkit.measuring.comparison import compare, normalised_table
from graftkit.measuring.results import Evaluation
from graftkit.measuring.table import Cell, Column, Table, Value
from graftkit.reporting import plots, records

if TYPE_CHECKING:
    from jinja2 import Template

Merge = tuple[str, Mapping[str, Any]]
"""A merged model's name and its record, the content of `graft.json`."""


def write_report(
    out: Path,
    *,
    title: str,
    evaluation: Evaluation | Mapping[str, Any] | None,
    merges: Sequence[Merge] = (),
    story: str = "",
    commands: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML file and return its path.

    `evaluation`: an evaluation, its `to_dict()`, or None to show merges alone. `merges`: names (those of the
    evaluation, where it has the model) with records. `story`: plain text, paragraphs apart by an empty line.
    `commands`: what to type to get the same again. Everything is escaped. Raises GraftError without the extra `report`,
    DataError where the evaluation's JSON is none, OutputError where the file cannot be written.
    """
    if evaluation is not None and not isinstance(evaluation, Evaluation):
        evaluation = Evaluation.from_dict(evaluation)
    page = _template().render(
        title=title,
        paragraphs=[part.strip() for part in re.split(r"\n\s*\n", story) if part.strip()],
        commands=list(commands),
        **_scores(evaluation),
        **_merges(merges),
        versions=_versions(evaluation, merges),
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
        return {"evaluation": None}
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
        "differences": _differences(evaluation), **_normalised(evaluation),
    }  # fmt: skip


def _differences(evaluation: Evaluation) -> Table | None:
    """Every model minus the base, task by task, paired."""
    base = evaluation.base
    if base is None or evaluation.resamples < 1 or len(evaluation.models) < 2:
        return None
    rows: list[tuple[Cell, ...]] = []
    for model in evaluation.models:
        if model != base:
            found = compare(evaluation, model, base).differences
            rows.append((model, *(f"{item.difference.value:+.3f} {item.verdict}" for item in found)))
    columns = (Column("model"), *(Column(task.name) for task in evaluation.tasks))
    return Table(columns, tuple(rows))


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


def _merges(merges: Sequence[Merge]) -> dict[str, Any]:
    top = max(
        (max(grid.known(), default=0.0) for _, record in merges for grid in records.norm_grids(record)), default=0.0
    )
    shown = [
        {
            "name": name,
            "recipe": record.get("recipe_yaml", ""),
            "plan": record.get("plan", {}).get("hash", ""),
            "inputs": records.inputs_table(record),
            "pictures": _layers(record, top),
        }
        for name, record in merges
    ]
    if not shown:
        return {"merges": []}
    return {"merges": shown, "costs": records.costs_table(merges), "deltas": records.deltas_table(merges)}


def _layers(record: Mapping[str, Any], top: float) -> list[tuple[str, str]]:
    """Captions and heat maps: norms of deltas, up to the same `top` in all merges, and what the cast swallowed."""
    pictures = []
    for grid in records.norm_grids(record):
        picture = plots.heat_map(grid.values, grid.layers, grid.roles, label="norm of the delta", top=top)
        pictures.append((f"How far each matrix moved ({grid.stack})", picture))
    for grid in records.swallowed_grids(record):
        picture = plots.heat_map(grid.values, grid.layers, grid.roles, label="% of weights", color=plots.OTHER, top=100)
        pictures.append((f"Changes too small for the output's dtype ({grid.stack})", picture))
    return pictures


def _versions(evaluation: Evaluation | None, merges: Sequence[Merge]) -> Table:
    """Versions and machines behind the evaluation and each merge."""
    sources: list[tuple[str, Mapping[str, Any]]] = [("evaluation", evaluation.versions)] if evaluation else []
    sources += [(name, record.get("versions", {}) | record.get("machine", {})) for name, record in merges]
    keys = list(dict.fromkeys(key for _, found in sources for key in found))
    rows = tuple(
        (name, *(str(found[key]) if found.get(key) is not None else None for key in keys)) for name, found in sources
    )
    return Table((Column("of"), *(Column(key) for key in keys)), rows)
