"""`graft evaluate MODEL... --tasks FILE...`: scores with confidence intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, hub ids or LoRA adapters.", show_default=False)],
    tasks: Annotated[
        list[Path],
        typer.Option("--tasks", "-t", help="A task's YAML or JSONL file; may be repeated.", show_default=False),
    ],
    base: Annotated[str | None, typer.Option(help="Which of the models is the base, for normalised scores.")] = None,
    adapter_base: Annotated[str | None, typer.Option(help="The base that adapters stand on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the evaluation, every item's score included, as JSON.")
    ] = None,
    subtasks: Annotated[bool, typer.Option("--subtasks", help="Print a table of subtasks for each task.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON.")] = False,
) -> None:
    """Score models on tasks: answer loss and multiple choice, with bootstrap intervals."""
    from graftkit.cli import console
    from graftkit.measuring.evaluation import evaluate as run

    console.quiet_libraries(threads)
    with console.progress("answers") as bar:
        found = run(
            models, tasks, base=base, adapter_base=adapter_base, seed=seed, device=device,
            progress=lambda done, total: bar("answers", done, total),
        )  # fmt: skip
    if out:
        console.write_json(out, found.to_dict())
    if json:
        console.print_json(found.to_dict())
        return
    for table in [found.table()] + [found.table(task.name) for task in found.tasks if subtasks]:
        console.print_table(table)
