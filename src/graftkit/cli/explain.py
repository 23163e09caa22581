"""`graft explain RECIPE`: what a merge would do, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.recipes.plan import Plan


def explain(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickle checkpoints, with weights-only loading.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a merge would do, tensor by tensor, and refuse what it could not. Reads no weights."""
    from graftkit.cli import console
    from graftkit.recipes.explain import summary
    from graftkit.recipes.plan import plan

    made = plan(recipe, allow_pickle=allow_pickle)
    told = summary(made, tensors=tensors or json)
    console.print_json(told) if json else _print(made, told)


def _print(made: Plan, told: dict[str, Any]) -> None:
    from graftkit.cli.console import count_of, size_of

    out = told["output"]
    typer.echo(f"plan {told['hash']}")
    typer.echo(
        f"output: like {out['like']}, {count_of(out['parameters'])} parameters as {', '.join(out['dtypes'])}, "
        f"{size_of(out['bytes'])} in {out['files']} file{'s' * (out['files'] > 1)}"
    )
    typer.echo(
        f"work: read {size_of(told['bytes_read'])}, stages {', '.join(told['stages'])}, "
        f"{size_of(told['worker_bytes'])} of scratch a worker"
    )
    for source in told["inputs"]:
        typer.echo(f"  {source['role']:6} {source['kind']:10} {source['source']}  ({source['directory']})")
    for group in told["groups"]:
        knobs = ", ".join(f"{key} {_shown(value)}" for key, value in group["knobs"].items())
        typer.echo(
            f"{group['method'] or 'copied'}: {group['tensors']} tensors, "
            f"{count_of(group['parameters'])} parameters ({group['where']})"
        )
        if knobs:
            typer.echo(f"    {knobs}")
    for note in told["notes"]:
        typer.echo(f"note: {note}")
    for step in told.get("tensors", []):
        typer.echo(
            f"  {step['name']}  {step['shape']} {step['dtype']}  "
            f"{step['method'] or 'copied'}  from {', '.join(step['from'])}"
        )


def _shown(value: Any) -> str:
    return (
        "[" + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + "]"
        if isinstance(value, tuple)
        else str(value)
    )
