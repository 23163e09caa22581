"""`graft subsample DATA OUT -n N`: a few records that stand for many."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from graftkit.improving.subsample import Subsample
    from graftkit.measuring.table import Table


def subsample(
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL, JSON, CSV, Parquet or text file, a directory or hub id for `datasets` (#SPLIT).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT", show_default=False)],
    count: Annotated[int, typer.Option("-n", min=1, help="Records to choose.", show_default=False)],
    method: Annotated[
        Literal["kmeans", "random", "kcenter", "herding"], typer.Option(help="How they are chosen.")
    ] = "kmeans",
    clusters: Annotated[str, typer.Option(help="How many, or a range to choose from by silhouette.")] = "8-64",
    embedder: Annotated[
        str, typer.Option(help="`wordllama`, or a model of sentence-transformers by path or name.")
    ] = "wordllama",
    duplicates: Annotated[
        float | None, typer.Option(help="Pass over records with this cosine to a chosen one, such as 0.95.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="A column of another name: prompt=question. May be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Of the clustering and the samples.")] = 0,
    picture: Annotated[bool, typer.Option(help="Draw landscape.svg and landscape.png.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Choose records that stand for all: embed, cluster, take those nearest to the centroids in balance."""
    from graftkit.cli import console
    from graftkit.improving.subsample import RECORD
    from graftkit.improving.subsample import subsample as choose

    if embedder != "wordllama":
        console.quiet_libraries(None)  # this loads torch
    drawn: list[Path] = []

    def draw(made: Subsample, directory: Path) -> None:
        from graftkit.reporting.landscape import draw_landscape

        drawn.extend(out / path.name for path in draw_landscape(made, directory, seed))

    with console.progress("work") as bar:
        made = choose(
            data, out, count, method=method, clusters=_range(clusters), embed=embedder, duplicates=duplicates,
            columns=_columns(column or []), seed=seed, progress=bar, draw=draw if picture else None,
        )  # fmt: skip
    if json:
        import json as reader

        console.print_json(reader.loads((out / RECORD).read_text(encoding="utf-8")))
        return
    console.print_table(_table(made))
    for line in _lines(made, drawn):
        typer.echo(line)


def _range(told: str) -> tuple[int, int]:
    from graftkit.errors import DataError

    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", told.strip())
    if not found:
        raise DataError(f"--clusters: expected a number or a range such as 8-64, got {told!r}")
    return int(found[1]), int(found[2] or found[1])


def _columns(told: list[str]) -> dict[str, str]:
    from graftkit.errors import DataError

    wrong = next((one for one in told if not all(one.partition("="))), None)
    if wrong is not None:
        raise DataError(f"--column: expected OURS=THEIRS such as prompt=question, got {wrong!r}")
    return {one.partition("=")[0]: one.partition("=")[2] for one in told}


def _table(made: Subsample) -> Table:
    from graftkit.measuring.table import Column, Table

    heads = ("subset", "distance to the nearest chosen", "of 95 % below", "topics", "balance of topics")
    better = ("lower", "lower", "higher", "higher")
    columns = [Column(heads[0]), *(Column(name, "", way) for name, way in zip(heads[1:], better, strict=True))]  # type: ignore[arg-type]
    rows = [
        (name, found.distance, found.farthest, found.topics, found.balance)
        for name, found in (("this one", made.coverage), ("random, as large", made.at_random))
    ]
    return Table(tuple(columns), tuple(rows))


def _lines(made: Subsample, drawn: list[Path]) -> list[str]:
    total, clusters = len(made.records.vectors), made.clusters
    chosen = f"{made.file}: {len(made.chosen)} of {total} records"
    passed = f", {len(made.refused)} near duplicates passed over" if len(made.refused) else ""
    score = clusters.silhouettes.get(len(clusters.centroids))
    told = "" if score is None else f" (silhouette {score:.3f} on {clusters.sample} records; {clusters.fit})"
    lines = [f"{chosen}{passed}, from {_counted(len(clusters.centroids))}{told} in {made.seconds:.1f} s"]
    if made.coverage.distance > made.at_random.distance:
        lines.append(f"note: a random subset lies nearer to the rest than this one; try --clusters {len(made.chosen)}")
    return lines + [f"{path}: the landscape" for path in drawn]


def _counted(count: int) -> str:
    return f"{count} cluster{'s' * (count != 1)}"
