"""`graft evaluate MODEL... --tasks FILE...`: scores with confidence intervals."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.measuring.harness import Harness
    from graftkit.measuring.results import Evaluation
    from graftkit.measuring.table import Table

TASK_FILES = (".yaml", ".yml", ".jsonl")


Models = Annotated[
    list[str],
    typer.Argument(
        help="Checkpoints, hub ids or LoRA adapters; task files too, so that `--tasks tasks/*.yaml` works.",
        metavar="MODEL", show_default=False,
    ),
]  # fmt: skip
Tasks = Annotated[
    list[str],
    typer.Option(
        "--tasks", "-t", help="A task's YAML or JSONL file, a directory of them, or `humaneval`; may be repeated.",
        metavar="FILE", show_default=False,
    ),
]  # fmt: skip
Experts = Annotated[
    list[str],
    typer.Option(
        "--expert", help="The expert of a skill, for normalised scores; may be repeated.", metavar="SKILL=MODEL",
        show_default=False,
    ),
]  # fmt: skip
LmEval = Annotated[
    list[str], typer.Option("--lm-eval", help="lm-eval's tasks, apart by commas.", metavar="NAMES", show_default=False)
]
Name = str | None


def evaluate(
    models: Models = [],  # noqa: B006 (typer's way)
    tasks: Tasks = [],  # noqa: B006
    base: Annotated[Name, typer.Option(help="What models are compared with, and adapters stand on.")] = None,
    experts: Experts = [],  # noqa: B006
    against: Annotated[Name, typer.Option(help="Compare with this model, not the base.")] = None,
    adapter_base: Annotated[Name, typer.Option(help="What adapters stand on, if it is not --base.")] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Run what models write, in a sandbox.")] = False,
    lm_eval: LmEval = [],  # noqa: B006
    lm_eval_tasks: Annotated[Path | None, typer.Option(help="A directory with more of lm-eval's tasks.")] = None,
    lm_eval_chat: Annotated[bool, typer.Option("--lm-eval-chat", help="Ask lm-eval's tasks as a chat.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items of each task, for all alike.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the evaluation as JSON, every item included.")] = None,
    subtasks: Annotated[bool, typer.Option("--subtasks", help="Print a table of subtasks for each task.")] = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Read and keep scores of items by content.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    device: Annotated[Name, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON.")] = False,
) -> None:
    """Score models on tasks, with bootstrap intervals, paired comparisons and normalised scores.

    Kinds of tasks: answer loss, multiple choice, exact match, pass@1; and lm-eval's own.
    """
    from graftkit.checkpoints.resolve import cache_directory
    from graftkit.cli import console
    from graftkit.measuring.evaluation import evaluate as run
    from graftkit.measuring.evaluation import with_roles

    asked, named = _tasks(models, tasks), _experts(experts)
    named_models = [model for model in models if model not in asked]
    given = with_roles(with_roles(named_models, against, {}), base, named)
    _refuse_nothing(given, asked, lm_eval)
    console.quiet_libraries(threads)
    harness = _harness(lm_eval, lm_eval_tasks, limit, lm_eval_chat)
    with console.progress("work") as bar:
        found = run(
            given, asked, base=base, experts=named, adapter_base=adapter_base, seed=seed, device=device,
            run_code=run_code, limit=limit, harness=harness,
            cache=cache_directory() / "evaluations" if cache else None,
            progress=lambda done, total: bar("evaluating", done, total),
        )  # fmt: skip
    found = replace(found, settings={**found.settings, "command": shlex.join(["graft", *sys.argv[1:]])})
    other = against or found.base
    if out:
        console.write_json(out, _told(found, other))
    if json:
        console.print_json(_told(found, other))
        return
    for table in _tables(found, other, subtasks):
        console.print_table(table)
    _say_cached(found)
    if found.settings.get("sandbox") == "limits only":
        typer.echo("this machine gives no namespaces: programs ran under limits, but with network and writable files")


def _tasks(models: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The tasks, those included that a shell's `*` has put among the models."""
    return [*tasks, *(model for model in models if model.endswith(TASK_FILES) and Path(model).is_file())]


def _experts(given: Sequence[str]) -> dict[str, str]:
    from graftkit.errors import GraftError

    found: dict[str, str] = {}
    for text in given:
        skill, equals, model = text.partition("=")
        if not equals or not skill or not model:
            raise GraftError(f"--expert: expected SKILL=MODEL, as in math=runs/math, got {text!r}")
        if skill in found:
            raise GraftError(f"--expert: {skill} has two experts, {found[skill]} and {model}; give one")
        found[skill] = model
    return found


def _refuse_nothing(models: Sequence[Any], tasks: Sequence[str], lm_eval: Sequence[str]) -> None:
    from graftkit.errors import GraftError

    if not models:
        raise GraftError("no model given: name checkpoints, adapters or hub ids before --tasks")
    if not tasks and not lm_eval:
        raise GraftError("no task given: name some by --tasks FILE or --lm-eval NAME")


def _harness(names: Sequence[str], directory: Path | None, limit: int | None, chat: bool) -> Harness | None:
    if not names:
        return None
    from graftkit.measuring.harness import load_harness

    return load_harness([name for listed in names for name in listed.split(",")], directory, limit, chat)


def _tables(found: Evaluation, other: str | None, subtasks: bool) -> Iterator[Table]:
    from graftkit.measuring.comparison import differences_table
    from graftkit.measuring.normalised import normalised_table

    yield found.table()
    if other is not None and len(found.models) > 1:
        yield differences_table(found, found.named(other))
    if found.base is not None and found.experts:
        yield normalised_table(found)
    if subtasks:
        yield from (found.table(task.name) for task in found.tasks)


def _told(found: Evaluation, other: str | None) -> dict[str, Any]:
    """For JSON: the evaluation, and what follows from it."""
    from graftkit.measuring.comparison import compare_all
    from graftkit.measuring.normalised import normalised_scores

    told = found.to_dict()
    if other is not None:
        told["comparisons"] = [one.to_dict() for one in compare_all(found, found.named(other))]
    if found.base is not None and found.experts:
        told["normalised"] = {
            model: {skill: value.to_dict() for skill, value in normalised_scores(found, model).items()}
            for model in found.models
        }
    return told


def _say_cached(found: Evaluation) -> None:
    cached = sum(score.cached for score in found.scores)
    if cached:
        typer.echo(f"{cached} of {len(found.scores)} scores were read from the cache; --no-cache computes them anew")
