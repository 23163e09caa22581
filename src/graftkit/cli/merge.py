"""`graft merge RECIPE OUT`: carry out a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; all cores by default. Changes no byte of the result.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to stay within, such as 1GB. Changes no byte of the result.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, whole.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickle checkpoints, with weights-only loading.")
    ] = False,
    full_hash: Annotated[
        bool, typer.Option("--full-hash", help="Fingerprint inputs by every byte instead of samples.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Merge models into a checkpoint that transformers loads as it is.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    from graftkit.cli import console
    from graftkit.cli.options import memory_bytes
    from graftkit.recipes.plan import plan

    made = plan(recipe, allow_pickle=allow_pickle, full_hash=full_hash)
    from graftkit.execution.local import execute

    with console.progress("bytes") as bar:
        record = execute(
            made, out, workers=workers, memory=memory_bytes(memory), device=device, overwrite=overwrite, progress=bar
        )
    console.print_json(record) if json else summary(record, out)


def summary(record: dict[str, Any], out: Path) -> None:
    """Says what was made, at what cost, and what it lost."""
    from graftkit.cli.console import size_of

    run, tensors = record["execution"], [t for t in record["tensors"] if t["method"]]
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    names, merged = ({t["name"] for t in some} for some in (record["tensors"], tensors))  # a tensor may have parts
    typer.echo(
        f"{out}: {len(merged)} tensors merged by {record['recipe']['method']}, "
        f"{len(names - merged)} copied, {size_of(written)} "
        f"in {run['seconds']:.1f} s, at most {size_of(run['peak_memory_bytes'])} of memory"
    )
    if run["resumed_steps"]:
        typer.echo(f"  went on from an interrupted run that had finished {run['resumed_steps']} tensors")
    for note in record["notes"]:
        typer.echo(f"  note: {note}")
    factored, whole = ([t for t in tensors if ("rank" in t) == low_rank] for low_rank in (True, False))
    if factored:
        _factors(factored)
    elif whole:
        _cast(whole)


def _factors(tensors: list[dict[str, Any]]) -> None:
    """What truncation left out of an adapter."""
    ranks, worst = [t["rank"] for t in tensors], max(tensors, key=lambda t: 1 - t["energy"])
    lost, wanted = (sum(t[k] ** 2 for t in tensors) ** 0.5 for k in ("error_norm", "delta_norm"))
    typer.echo(
        f"  an adapter of {len(tensors)} modules, ranks {min(ranks)} to {max(ranks)}; it leaves out "
        f"{lost / wanted if wanted else 0:.2%} of the change's norm; most in {worst['name']}, "
        f"which keeps {worst['energy']:.2%} of its energy"
    )


def _cast(tensors: list[dict[str, Any]]) -> None:
    """What the cast to the output's dtype swallowed."""
    largest = sorted(tensors, key=lambda t: -t["unchanged"])[:1]
    lost, wanted = (sum(t[k] ** 2 for t in tensors) ** 0.5 for k in ("cast_error_norm", "delta_norm"))
    if wanted:
        typer.echo(
            f"  the cast to {tensors[0]['dtype']} lost {lost / wanted:.1%} of the change's norm; most in "
            f"{largest[0]['name']}, where {largest[0]['unchanged']:.1%} of the changed weights came out as they were"
        )
