"""`graft search RECIPE OUT --data FILE`: the values of a recipe's knobs that score best on examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.improving.search import Found

Files = Annotated[
    list[str],
    typer.Option("--data", "-d", help="Tasks to score on; may be repeated.", metavar="FILE", show_default=False),
]
Tests = Annotated[
    list[str],
    typer.Option("--test", "-t", help="Tasks on which the best is scored, once.", metavar="FILE", show_default=False),
]


def search(
    recipe: Annotated[Path, typer.Argument(help="The recipe whose knobs are searched.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A directory; the same command goes on in it.", show_default=False)],
    data: Files,
    test: Tests = [],  # noqa: B006 (typer's way)
    optimizer: Annotated[str, typer.Option(help="gp, sobol, random, grid, cma, pattern or powell.")] = "gp",
    budget: Annotated[int, typer.Option(min=1, help="Trials.")] = 40,
    goal: Annotated[str, typer.Option(help="mean, worst, raw, or each for a Pareto front.")] = "mean",
    weight: Annotated[list[str], typer.Option(help="A task's weight in the mean.", metavar="TASK=NUMBER")] = [],  # noqa: B006
    start: Annotated[str | None, typer.Option(help="First trial: nan, metagpt, or a file of gates.")] = None,
    stop_early: Annotated[bool, typer.Option("--stop-early", help="Give up trials that are clearly worse.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items of each task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the optimiser.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes on one study, each with a model of its own.")] = 1,
    device: Annotated[str, typer.Option(help="Where the model stands.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="In which it is scored.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Search the values of a recipe's knobs that score best; writes the best recipe, the study and its landscape."""
    from graftkit.cli import console
    from graftkit.improving.search import search as run
    from graftkit.improving.search_objective import GOALS

    _choice("--goal", goal, GOALS)
    console.quiet_libraries(threads)
    with console.progress("trials") as bar:
        found = run(
            recipe, data, out, workers=workers, told=bar, optimizer=optimizer, budget=budget, goal=goal, test=test,
            weights=_weights(weight), start=start, stop_early=stop_early, limit=limit, seed=seed, device=device,
            dtype=dtype, threads=threads,
        )  # fmt: skip
    pictured = _pictured(found, out)
    if json:
        console.print_json({**found.record, "out": str(out)})
    else:
        _tell(found, out, pictured)


def _choice(option: str, given: str, known: tuple[str, ...]) -> None:
    from graftkit.errors import GraftError, unknown

    if given not in known:
        raise GraftError(f"{option}: " + unknown("goal", given, known))


def _weights(given: list[str]) -> dict[str, float]:
    from graftkit.errors import GraftError

    found = {}
    for text in given:
        task, equals, number = text.partition("=")
        try:
            found[task] = float(number)
        except ValueError:
            equals = ""
        if not equals or not found[task] > 0:
            raise GraftError(f"--weight: expected TASK=NUMBER with a number above 0, as in math=2, got {text!r}")
    return found


def _pictured(found: Found, out: Path) -> bool:
    """Draws the landscape where the extra `report` is installed."""
    from graftkit.errors import GraftError
    from graftkit.reporting.landscape_search import draw

    try:
        return draw(found, out / "landscape.png")
    except GraftError as error:
        typer.echo(f"no picture: {error}", err=True)
        return False


def _tell(found: Found, out: Path, pictured: bool) -> None:
    best: Any = found.record["best"]
    for axis, value in best["values"].items():
        share = found.importances.get(axis)
        typer.echo(f"{axis:24} {_short(value):>10}" + (f"   importance {share:.2f}" if share is not None else ""))
    typer.echo(f"best on dev: {_scores(found.score)} (trial {best['trial']} of {len(found.trials)})")
    if found.test:
        typer.echo(f"on test, scored once: {_scores(found.test['score'])}")
    else:
        typer.echo("on test: not scored; the best of many trials on dev looks better than it is, name a --test")
    given_up = found.record["given_up"]
    if given_up:
        typer.echo(f"{given_up} trials were given up on part of the items; their scores are estimates")
    if found.front:
        typer.echo(f"{len(found.front)} recipes that no other is better than in everything: {out / 'front'}")
    typer.echo(
        f"{out / 'recipe.yaml'}: merge it with `graft merge`" + ("; landscape.png beside it" if pictured else "")
    )


def _scores(score: Any) -> str:
    return ", ".join(f"{one:.4f}" for one in (score if isinstance(score, (list, tuple)) else [score]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
