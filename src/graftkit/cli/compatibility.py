"""`graft compatibility MODEL... --data DATA...`: which models fit which data; with --rank, which to merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftkit.improving.ranking import Ranking
    from graftkit.measuring.compatibility import Compatibility

    Bar = Callable[[str, int, int], None]

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
    by: Annotated[
        str | None,
        typer.Option(help="--rank: what orders pairs; by default headroom, for one task both.", show_default=False),
    ] = None,
    weight: Annotated[
        float, typer.Option(min=0, max=1, help="--rank: of compatibility, against the expert's own score.")
    ] = 0.5,
    base: Annotated[str | None, typer.Option(help="What adapters stand on; with --rank, every expert.")] = None,
    accept_base: Annotated[
        bool, typer.Option("--accept-base", help="--rank: adapters may name another base than --base.")
    ] = False,
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

    _check(part, of, out)
    rankings: dict[str, Any] = {"tasks": tasks or (), "by": by, "weight": weight, "accept_base": accept_base}
    _check_ranking(rank, rankings, (part, of))
    console.quiet_libraries(threads)
    options: dict[str, Any] = {
        "samples": samples, "epsilon": epsilon, "resamples": resamples, "seed": seed, "device": device, "base": base,
    }  # fmt: skip
    with console.progress("samples") as bar:
        more = rankings if rank else {"part": part, "of": of}
        found = (_ranked if rank else _measured)(models, data, options | more, bar, threads)
    if out is not None:
        _write(found, out, rank)
    if json:
        console.print_json(found.to_dict())
    else:
        _show(found, out)


def _check(part: str, of: str, out: Path | None) -> None:
    from graftkit.errors import GraftError, OutputError, unknown

    for option, value, known in (("--part", part, PARTS), ("--of", of, KINDS)):
        if value not in known:
            raise GraftError(f"{option}: {unknown('value', value, known)}")
    if out is not None and out.exists():
        raise OutputError(f"{out}: exists already; choose another name")


def _check_ranking(rank: bool, given: dict[str, Any], measured: tuple[str, str]) -> None:
    from graftkit.errors import GraftError

    if rank and measured != ("all", "outputs"):
        raise GraftError("--rank looks at the outputs of all projections; leave out --part and --of")
    if not rank and given != {"tasks": (), "by": None, "weight": 0.5, "accept_base": False}:
        raise GraftError("--tasks, --by, --weight and --accept-base are for a ranking; add --rank, or leave them out")


def _measured(models: Places, data: Places, options: dict[str, Any], bar: Bar, threads: int | None) -> Compatibility:
    from graftkit.measuring.compatibility import compatibility as measure

    return measure(models, data, progress=bar, **options)


def _ranked(models: Places, data: Places, options: dict[str, Any], bar: Bar, threads: int | None) -> Ranking:
    import os

    from graftkit.checkpoints.resolve import cache_directory
    from graftkit.improving.ranking import rank

    cache, workers = cache_directory() / "evaluations", threads or os.cpu_count() or 1
    return rank(models, data, progress=bar, cache=cache, workers=workers, **options)


def _write(found: Compatibility | Ranking, out: Path, rank: bool) -> None:
    """All of it or nothing: it stands under its name once everything is there."""
    import json
    import os
    import shutil

    from graftkit.errors import OutputError
    from graftkit.reporting import compatibility as pictures

    made = pictures.of_ranking(found) if rank else pictures.pictures(found)  # type: ignore[arg-type]
    made["ranking.json" if rank else "compatibility.json"] = json.dumps(found.to_dict(), ensure_ascii=False) + "\n"
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        draft.mkdir(parents=True)
        for name, text in made.items():
            (draft / name).write_text(text, encoding="utf-8")
        draft.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _show(found: Compatibility | Ranking, out: Path | None) -> None:
    from graftkit.cli import console

    for table in found.tables():
        console.print_table(table)
    for reason in getattr(found, "reasons", ()):
        typer.echo(reason)
    if hasattr(found, "advice"):
        typer.echo(f"Advice: {found.advice}.")
    if out is not None:
        typer.echo(f"{out}: the JSON and the pictures")
