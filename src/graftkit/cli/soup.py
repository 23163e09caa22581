"""`graft soup RECIPE OUT.yaml --tasks FILE`: choose by scores which of a recipe's models to average."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graftkit.improving.soup import Trial


def soup(
    recipe: Annotated[Path, typer.Argument(help="The recipe whose models are the candidates.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The recipe to write.", metavar="OUT.yaml", show_default=False)],
    tasks: Annotated[
        list[Path],
        typer.Option("--tasks", "-t", help="A task's YAML or JSONL file; may be repeated.", show_default=False),
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Threads of a merge; all cores by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Where models are scored; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every trial as JSON.")] = False,
) -> None:
    """Greedy soup: take models best first, and keep each that makes the average no worse. Writes the recipe."""
    from dataclasses import asdict

    from graftkit.cli import console
    from graftkit.errors import OutputError
    from graftkit.improving.soup import greedy_soup, on_tasks
    from graftkit.recipes.moving import moved
    from graftkit.recipes.recipe import load

    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name")
    console.quiet_libraries(threads)
    candidates = load(recipe)
    score = on_tasks(tasks, scratch=out.absolute().parent, workers=workers, device=device)
    found = greedy_soup(candidates, score, None if json else _tell)
    try:
        out.write_text(moved(found.recipe, out.parent).to_yaml(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    if json:
        console.print_json({"score": found.score, "trials": [asdict(trial) for trial in found.trials]})
    else:
        typer.echo(f"{out}: {len(found.recipe.models)} of {len(candidates.models)} models, score {found.score:.4f}")


def _tell(trial: Trial) -> None:
    *others, last = trial.models
    verdict = "alone" if not others else "stays" if trial.kept else "left out"
    typer.echo(f"{trial.score:10.4f}  {last} {verdict}" + (f", with {', '.join(others)}" if others else ""))
