"""`graft compatibility MODEL... --data DATA...`: which models fit which data; with --rank, which to merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftkit.improving.ranking import Ranking
    from graftkit.measuring.compatibility import Compatibility

PARTS, KINDS = ("all", "attention", "mlp"), ("outputs", "contribution")
Places = list[str]


def compatibility(
    models: Annotated[
        Places,
        typer.Argument(
            help="Checkpoints, adapters, hub ids; with --rank, folders of them.", metavar="MODEL", show_default=False
        ),
    ],
    data: Annotated[
        Places,
        typer.Option("--data", "-d", help="A data set or task; may be repeated.", metavar="FILE", show_default=False),
    ],
    rank: Annotated[bool, typer.Option("--rank", help="Order experts and pairs by what they promise.")] = False,
    tasks: Annotated[
        Places | None,
        typer.Option(
            "--tasks", "-t", help="--rank: what scores experts, if not the data.", metavar="FILE", show_default=False
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="--rank: the predictor that orders the pairs.")] = "two_factor",
    weight: Annotated[
        float, typer.Option(min=0, max=1, help="--rank: of compatibility, against the expert's own score.")
    ] = 0.5,
    base: Annotated[str | None, typer.Option(help="What adapters stand on; with --rank, every expert.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each data set, at most.")] = 64,
    part: Annotated[str, typer.Option(help="Projections that count: all, attention or mlp.")] = "all",
    of: Annotated[str, typer.Option(help="Their outputs, or an adapter's own contribution.")] = "outputs",
    epsilon: Annotated[float, typer.Option(min=0, help="Small is below so much of a module's scale.")] = 0.1,
    resamples: Annotated[int, typer.Option(min=0, help="Draws of the bootstrap over samples.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A directory for the JSON and the pictures.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure how models' activations fit data (Graft, equations 9 to 14), raw and normalised, with intervals.

    With --rank: order experts, and pairs of them, for a target, without merging any; docs/compatibility.md.
    """
    from graftkit.cli import console

    _check(part, of, rank, bool(tasks) or by != "two_factor" or weight != 0.5)
    console.quiet_libraries(threads)
    options: dict[str, Any] = {
        "samples": samples, "epsilon": epsilon, "resamples": resamples, "seed": seed, "device": device, "base": base,
    }  # fmt: skip
    with console.progress("samples") as bar:
        if rank:
            found: Any = _ranked(
                models, data, options | {"tasks": tasks or (), "by": by, "weight": weight}, bar, threads
            )
        else:
            from graftkit.measuring.compatibility import compatibility as measure

            found = measure(models, data, part=part, of=of, progress=bar, **options)  # type: ignore[arg-type]
    if out is not None:
        _write(found, out, rank)
    if json:
        console.print_json(found.to_dict())
        return
    for table in found.tables():
        console.print_table(table)
    for reason in found.reasons if rank else ():
        typer.echo(reason)
    if out is not None:
        typer.echo(f"{out}: the JSON and the pictures")


def _check(part: str, of: str, rank: bool, ranking: bool) -> None:
    from graftkit.errors import GraftError, unknown

    for option, value, known in (("--part", part, PARTS), ("--of", of, KINDS)):
        if value not in known:
            raise GraftError(f"{option}: {unknown('value', value, known)}")
    if rank and (part, of) != ("all", "outputs"):
        raise GraftError("--rank looks at the outputs of all projections; leave out --part and --of")
    if ranking and not rank:
        raise GraftError("--tasks, --by and --weight are for a ranking; add --rank, or leave them out")


def _ranked(
    models: list[str],
    data: list[str],
    options: dict[str, Any],
    bar: Callable[[str, int, int], None],
    threads: int | None,
) -> Ranking:
    import os

    from graftkit.checkpoints.resolve import cache_directory
    from graftkit.improving.ranking import rank

    cache, workers = cache_directory() / "evaluations", threads or os.cpu_count() or 1
    return rank(models, data, progress=bar, cache=cache, workers=workers, **options)


def _write(found: Compatibility | Ranking, out: Path, rank: bool) -> None:
    from graftkit.cli import console
    from graftkit.errors import OutputError
    from graftkit.reporting import compatibility as pictures

    made = pictures.of_ranking(found) if rank else pictures.pictures(found)  # type: ignore[arg-type]
    console.write_json(out / ("ranking.json" if rank else "compatibility.json"), found.to_dict())
    try:
        for name, svg in made.items():
            (out / name).write_text(svg, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
