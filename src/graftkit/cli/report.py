"""`graft report RUN...`: one HTML file out of what merges and evaluations have left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.measuring.results import Evaluation

EVALUATION, RECORD = "evaluation.json", "graft.json"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Outputs of merges, evaluations, or directories that hold some.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "A merge, measured",
    inspect: Annotated[
        bool, typer.Option("--inspect/--no-inspect", help="Measure the merged models too, which reads their weights.")
    ] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads for that; all cores by default.")] = None,
) -> None:
    """Write an HTML report that needs nothing else: what was merged, scores, per-layer pictures, costs."""
    import os

    from graftkit.cli import console
    from graftkit.reporting.experts import measure_experts
    from graftkit.reporting.report import write_report

    evaluation, merges = collect(runs)
    with console.progress("entries") as bar:
        beside = measure_experts(merges, workers or os.cpu_count() or 1, bar) if inspect else []
    write_report(out, title=title, evaluation=evaluation, merges=merges, beside=beside)
    for missing in (one.missing for one in beside if one.missing):
        typer.echo(f"the merged models were not measured: {missing}")
    typer.echo(f"{out}: {len(merges)} merges" + (", evaluated" if evaluation else ", no evaluation"))


def collect(runs: Sequence[Path]) -> tuple[Evaluation | None, list[tuple[str, dict[str, Any]]]]:
    """The evaluation and the merges' records that lie in some files and directories (one level deep).

    Raises GraftError when there is nothing to report on, more than one evaluation, or JSON of another kind.
    """
    from graftkit.checkpoints.sources import read_json
    from graftkit.errors import GraftError
    from graftkit.measuring.loading import model_names

    found = {file: read_json(file) for run in runs for file in _files(run)}
    scores = [file for file, data in found.items() if _kind(file, data) == EVALUATION]
    merges = [file for file, data in found.items() if _kind(file, data) == RECORD]
    if len(scores) > 1:
        raise GraftError(f"{len(scores)} evaluations ({scores[0]}, {scores[1]}); a report shows one: name it")
    if not found:
        raise GraftError(
            f"{', '.join(map(str, runs))}: neither a merge ({RECORD}) nor an evaluation ({EVALUATION}) here"
        )
    names = model_names([file.resolve().parent for file in merges])
    return (
        _evaluation(scores[0], found[scores[0]]) if scores else None,
        [(name, found[file]) for name, file in zip(names, merges, strict=True)],
    )


def _files(run: Path) -> list[Path]:
    from graftkit.errors import GraftError

    if run.is_file():
        return [run]
    if not run.is_dir():
        raise GraftError(
            f"{run}: no such file or directory; name the output of a merge, an evaluation, or what holds them"
        )
    return sorted(file for name in (EVALUATION, RECORD) for at in (name, f"*/{name}") for file in run.glob(at))


def _kind(file: Path, data: dict[str, Any]) -> str:
    """What a file is, by what stands in it."""
    from graftkit.errors import DataError

    if "scores" in data or (file.name == EVALUATION and "tensors" not in data):
        return EVALUATION
    if "recipe_yaml" in data or file.name == RECORD:
        return RECORD
    keys = ", ".join(sorted(data)[:8]) or "nothing"
    raise DataError(f"{file}: neither a merge's record ({RECORD}) nor an evaluation ({EVALUATION}): it has {keys}")


def _evaluation(file: Path, data: dict[str, Any]) -> Evaluation:
    from graftkit.errors import DataError
    from graftkit.measuring.results import Evaluation

    try:
        return Evaluation.from_dict(data)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
