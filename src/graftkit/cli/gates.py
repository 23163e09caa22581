"""`graft gates solve RECIPE OUT`: gates from examples, and the recipe that merges by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make the gates that a recipe merges by.")


@app.callback()
def _gates() -> None:
    """Make the gates that a recipe merges by."""


@app.command("solve")
def solve(
    recipe: Annotated[Path, typer.Argument(help="A recipe by graft, graft_convex or graft_free.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT", show_default=False)],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", help="A task of prompts and answers; once a model, in order.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples of each domain, at most.")] = 200,
    ridge: Annotated[float, typer.Option(min=0, help="graft_free: pull towards the prior.")] = 0.1,
    prior: Annotated[float, typer.Option(help="graft_free: the coefficient where nothing is known.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="Where models run; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Solve gates in closed form: each model runs once, over examples of its own domain. Writes gates and a recipe."""
    from dataclasses import asdict

    from graftkit.cli import console
    from graftkit.improving import gates

    console.quiet_libraries(threads)
    found = gates.solve(
        recipe, out, data=data or (), samples=samples, ridge=ridge, prior=prior, device=device,
        advance=(lambda *_: None) if json else _tell,
    )  # fmt: skip
    if json:
        console.print_json({**asdict(found), "recipe": str(found.recipe)})
    else:
        typer.echo(
            f"{found.recipe}: {found.kind}s of {found.channels} channels of {found.matrices} matrices, from "
            f"{found.examples} examples ({found.tokens} tokens) in {found.seconds:.1f} s"
        )


def _tell(name: str, done: int, total: int) -> None:
    typer.echo(f"\r{name}: {done} of {total} examples", err=True, nl=done == total)
