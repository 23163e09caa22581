"""`graft report RUN...`: one HTML file out of what merges and evaluations have left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EVALUATION, RECORD = "evaluation.json", "graft.json"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Outputs of merges, evaluations, or directories that hold some.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "A merge, measured",
) -> None:
    """Write an HTML report that needs nothing else: what was merged, scores, per-layer pictures, costs."""
    from graftkit.reporting.report import write_report

    evaluation, merges = collect(runs)
    write_report(out, title=title, evaluation=evaluation, merges=merges)
    typer.echo(f"{out}: {len(merges)} merges" + (", evaluated" if evaluation else ", no evaluation"))


def collect(runs: list[Path]) -> tuple[dict[str, Any] | None, list[tuple[str, dict[str, Any]]]]:
    """The evaluation and the merges' records that lie in some files and directories (one level deep).

    Raises GraftError when there is nothing to report on, or more than one evaluation.
    """
    from graftkit.checkpoints.sources import read_json
    from graftkit.errors import GraftError

    files = [
        f for run in runs for f in ([run] if run.is_file() else sorted([*run.glob("*.json"), *run.glob("*/*.json")]))
    ]
    scores = [f for f in files if f.name == EVALUATION or (f in runs and f.name != RECORD)]
    records = [f for f in files if f.name == RECORD]
    if len(scores) > 1:
        raise GraftError(f"{len(scores)} evaluations ({scores[0]}, {scores[1]}); a report shows one: name it")
    if not scores and not records:
        raise GraftError(
            f"{', '.join(map(str, runs))}: neither a merge ({RECORD}) nor an evaluation ({EVALUATION}) here"
        )
    return (read_json(scores[0]) if scores else None), [(f.parent.name, read_json(f)) for f in records]
