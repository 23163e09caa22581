"""`graft methods [NAME]`: the table of methods, or one method's page."""

from __future__ import annotations

import inspect as python
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method; without it, all are listed.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the methods, or show one with its formula, knobs and source."""
    from graftkit.cli import console
    from graftkit.methods import get, names

    chosen = [get(n) for n in ([name] if name else names())]
    if json:
        console.print_json([_data(m) for m in chosen])
    elif name:
        _page(chosen[0])
    else:
        width = max(len(m.name) for m in chosen)
        for m in chosen:
            typer.echo(f"{m.name:{width}}  {_first_line(m)}")


def _first_line(method: Any) -> str:
    return (python.getdoc(method.function) or "").partition("\n")[0]


def _data(method: Any) -> dict[str, Any]:
    return {
        "name": method.name,
        "about": python.getdoc(method.function),
        "source": method.source,
        "reads": list(method.reads),
        "grain": method.grain,
        "needs_base": method.needs_base,
        "ordered": method.ordered,
        "knobs": [{"name": k.name, "accepts": k.describe, "default": k.default} for k in method.knobs.values()],
    }


def _page(method: Any) -> None:
    typer.echo(f"{method.name}\n\n{python.getdoc(method.function)}\n")
    typer.echo(
        f"Reads: {', '.join(method.reads)}. Base: {'needed' if method.needs_base else 'not needed'}. "
        f"Grain: {method.grain}."
    )
    for knob in method.knobs.values():
        typer.echo(f"  {knob.name} = {knob.default}    {knob.describe}")
