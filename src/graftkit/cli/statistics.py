"""`graft statistics RECIPE`: what a recipe's methods read that must be measured with examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graftkit.measuring.statistics import Made


def statistics(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe by regmean, core_regmean or fisher, a YAML file.", show_default=False)
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", help="Examples; once a model, in the recipe's order.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples of each model's domain, at most.")] = 500,
    gram: Annotated[str, typer.Option(help="How grams are kept: full, block:SIZE or sketch:RANK.")] = "full",
    memory: Annotated[
        str | None, typer.Option(help="Memory to stay within, such as 2GB: layer by layer where it is short.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where models run; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens that fisher draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Measure what a recipe needs of examples, each model on its own domain; writes files beside the recipe.

    Files that are there already stay; a command that was stopped goes on at the first one that is missing.
    """
    from dataclasses import asdict

    from graftkit.cli import console
    from graftkit.cli.options import memory_bytes
    from graftkit.measuring.statistics import collect

    console.quiet_libraries(threads)
    with console.progress("examples") as bar:
        made = collect(
            recipe, data=data or (), samples=samples, form=gram, memory=memory_bytes(memory), device=device, seed=seed,
            advance=bar,
        )  # fmt: skip
    if json:
        console.print_json([{**asdict(one), "file": str(one.file)} for one in made])
        return
    for one in made:
        _tell(one)


def _tell(made: Made) -> None:
    from graftkit.cli.console import size_of

    about = made.about
    how = "was there already" if made.reused else f"in {about.seconds:.1f} s"
    form = f" ({about.form})" if about.kind == "gram" else ""
    typer.echo(
        f"{made.file}: {about.kind}{form} of {about.samples} examples ({about.tokens} tokens) of {about.place}, "
        f"{size_of(made.nbytes)}, {how}"
    )
