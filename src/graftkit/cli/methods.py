"""`graft methods [NAME]`: the table of methods, or one method's page."""

from __future__ import annotations

import inspect as python
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A method, or prepare.NAME or finish.NAME; without it, all are listed.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    pages: Annotated[
        Path | None, typer.Option(help="Write the pages of docs/methods to this directory.", hidden=True)
    ] = None,
) -> None:
    """List the methods, or show one: when to use it, formula, knobs, cost, example, source."""
    from graftkit.cli import console
    from graftkit.cli.pages import entries, write
    from graftkit.errors import RecipeError, unknown

    if pages:
        typer.echo(f"{len(write(pages))} pages in {pages}")
        return
    every = entries()
    if name and name not in every:
        raise RecipeError(unknown("method", name, every))
    chosen = {name: every[name]} if name else every
    if json:
        console.print_json([_data(*item) for item in chosen.items()])
    elif name:
        _show(chosen[name])
    else:
        width = max(map(len, chosen))
        for listed, method in chosen.items():
            typer.echo(f"{listed:{width}}  {_first_line(method)}")
        typer.echo("\ngraft methods NAME shows one with its formula, knobs and an example.")


def _first_line(method: Any) -> str:
    return (python.getdoc(method.function) or "").partition("\n")[0]


def _data(name: str, method: Any) -> dict[str, Any]:
    return {
        "name": name,
        "about": python.getdoc(method.function),
        "source": method.source,
        "reads": list(method.reads),
        "grain": method.grain,
        "needs_base": method.needs_base,
        "ordered": method.ordered,
        "knobs": [{"name": k.name, "accepts": k.describe, "default": k.default} for k in method.knobs.values()],
    }


def _show(method: Any) -> None:
    from graftkit.cli.pages import page

    if not sys.stdout.isatty():
        typer.echo(page(method), nl=False)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(page(method)))
