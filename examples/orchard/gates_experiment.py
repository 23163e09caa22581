"""Gates against every other method on the orchard's experts: tuned on dev, scored on test, differences with intervals.

From the root of the repository, after prepare_model.py (full experts after `make orchard`):

    OMP_NUM_THREADS=1 python examples/orchard/gates_experiment.py                    # what the page holds
    OMP_NUM_THREADS=1 python examples/orchard/gates_experiment.py --budget full      # hours; never run
    OMP_NUM_THREADS=1 python examples/orchard/gates_experiment.py --scenario four --row average --budget small

Every row goes into gates_results.json as soon as it is done; the same command goes on where it stopped. The page
docs/experiment-graft.md is written from that file at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from experts import SOURCES
from gates_measured import measured, placed
from gates_page import write_page
from gates_rows import BUDGETS, SCENARIOS, WIDER, WRITING, Budget, Row, Scenario
from graftkit.data.tasks import Item, Task, load_task, sample
from graftkit.execution.live import Live
from graftkit.improving import adamerging
from graftkit.improving.folding import fold
from graftkit.improving.gates import solve
from graftkit.improving.learnable import Form
from graftkit.improving.learning import PRESETS, Settings
from graftkit.improving.training import train
from graftkit.measuring.evaluation import evaluate
from graftkit.recipes.recipe import Recipe
from prepare_model import MODEL_DIR

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / ".cache" / "orchard" / "gates"
RESULTS = HERE / "gates_results.json"
SEED = 0
GENERAL = ("text", "mmlu")  # what nobody was trained for


def task_of(skill: str, split: str, count: int) -> Task:
    """Records of a split of a skill's source, drawn once."""
    records = SOURCES[skill].load(split)
    chosen = random.Random(SEED).sample(records, min(count, len(records)))
    items = tuple(Item(record.prompt, (record.answer,), 0) for record in chosen)
    return Task(f"{skill}_{split}", "answer_loss", items, SOURCES[skill].chat, skill=skill)


class Bench:
    """One scenario: its models, its examples, and a live model that every row is merged into."""

    def __init__(self, scenario: Scenario, budget: Budget) -> None:
        self.scenario, self.budget, self.skills = scenario, budget, scenario.skills
        self.paths = [str(ROOT / scenario.place.format(skill)) for skill in self.skills]
        self.dev = [task_of(skill, "dev", budget.dev) for skill in self.skills]
        self.train = [task_of(skill, "train", budget.samples) for skill in self.skills]
        self.general = [replace(load_task(HERE / "general" / f"{name}.yaml"), skill=name) for name in GENERAL]
        self.test = [sample(load_task(HERE / "tasks" / f"{s}.yaml"), budget.test) for s in self.skills]
        self.test += [sample(task, budget.general) for task in self.general]
        self.splits = {"dev": self.dev, "test": self.test}
        self.place = WORK / scenario.name.replace(" ", "-") / budget.name

    def recipe(self, wanted: Any, form: str = "", samples: int = 0) -> dict[str, Any]:
        """A row's recipe with this scenario's models, and with the place of its statistics where they have a form."""
        models = [{"model": path} for path in self.paths]
        told = {**wanted, "base": str(MODEL_DIR), "models": models, "accept_base": True, "output": {"dtype": "float32"}}
        if form:
            data = [str(placed(task, self.place / "data")) for task in self.train]
            told["models"] = [{"model": path, "data": own} for path, own in zip(self.paths, data, strict=True)]
            place = f"statistics-{samples}" if samples else "statistics"
            told["statistics"] = str(self.place / place / form.replace(":", "-"))
        return told

    def settings(self) -> Settings:
        """How gates are trained here."""
        return replace(PRESETS["small"], steps=self.budget.steps, every=-(-self.budget.steps // 3))

    def pair(self, recipe: Recipe, out: Path, tasks: Sequence[Sequence[Task]]) -> None:
        """Trains the gates of two models of a fold, on the examples of both."""
        data = [task for own in tasks for task in own]
        train(recipe, out, data=data, dev=self.dev, settings=self.settings(), device="cpu")

    @contextmanager
    def opened(self) -> Iterator[Live]:
        """The live model."""
        with Live.open(self.recipe({"method": "task_arithmetic"}), dtype="float32", workers=1) as live:
            yield live


def scores(live: Live, tasks: Sequence[Task]) -> dict[str, Any]:
    """By skill, for every item the two parts of the metric: summed loss and answer tokens, or 1 where right and 1."""
    found = evaluate([live.named("merged")], tasks, resamples=0, device="cpu", dtype="float32")
    return {
        summary.measures: [[round(part, 5) for part in item.parts(summary.metric.name)] for item in score.items]
        for summary, score in zip(found.tasks, found.scores, strict=True)
    }


def losses(found: dict[str, Any]) -> dict[str, float]:
    """The loss per answer token of each skill."""
    return {skill: sum(loss for loss, _ in items) / sum(n for _, n in items) for skill, items in found.items()}


Bounds = dict[str, tuple[float, float]]
"""By skill the dev loss of the base and of the expert."""


def lost(found: dict[str, Any], bounds: Bounds) -> float:
    """The mean over skills of the share of an expert's gain on dev that a merge has lost."""
    shares = [(own - bounds[n][1]) / (bounds[n][0] - bounds[n][1]) for n, own in losses(found).items()]
    return sum(shares) / len(shares)


def gated(bench: Bench, row: Row) -> tuple[Any, dict[str, Any]]:
    """The recipe of a row after its gates were made, and what to tell of that."""
    budget, out = bench.budget, bench.place / row.name.replace(" ", "-").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)
    recipe = Recipe.model_validate(bench.recipe(row.recipe))
    if row.gates == "solve":
        made = solve(recipe, out, data=bench.train, samples=budget.samples, device="cpu")
        return made.recipe, {"examples": made.examples, "tokens": made.tokens}
    if row.gates == "adamerging":
        chosen = adamerging.Settings(**row.training, steps=budget.steps, batch=1, samples=budget.samples)
        adapted = adamerging.adamerging(recipe, out, data=bench.train, settings=chosen)
        return adapted.recipe, {"entropies": [adapted.entropies[0], adapted.entropies[-1]]}
    options = dict(row.training)
    tasks = [sample(task, options.pop("samples", budget.samples)) for task in bench.train]
    if row.gates == "fold":
        return fold(recipe, out, bench.pair, data=tasks), {}
    if row.start:
        options["start"] = bench.place / row.start.replace(" ", "-").replace(",", "") / "gates.safetensors"
    settings = bench.settings()
    settings = replace(settings, rate=0.01) if row.start else settings
    trained = train(recipe, out, data=tasks, dev=bench.dev, settings=settings, form=Form(**options), device="cpu")
    told = {"phi": trained.phi, "learnt": trained.learnt, "change": asdict(trained.change)}
    told |= {"sharpness": trained.sharpness, "steps": len(trained.course.curve), "settings": asdict(settings)}
    return trained.recipe, told | {"dev": [trained.course.first, trained.course.best]}


def run(bench: Bench, live: Live, row: Row, bounds: Bounds) -> dict[str, Any]:
    """One row: gates or tuning first, then the test."""
    told: dict[str, Any] = {}
    wanted: Any = bench.recipe(row.recipe, row.form, row.samples)
    if row.form:
        asked = Recipe.model_validate(wanted)
        told["statistics"] = measured(asked, wanted["statistics"], row.samples or bench.budget.samples)
    cpu = time.process_time()
    if row.gates:
        wanted, told["gates"] = gated(bench, row)
        told["making"] = time.process_time() - cpu
        gates = wanted.parent / "gates.safetensors"
        told |= {"bytes": gates.stat().st_size} if gates.is_file() else {}
    elif row.tune:
        told |= tuned(bench, live, row, bounds)
        wanted = bench.recipe(changed(row, told["chosen"]))
        told["making"] = time.process_time() - cpu
    cpu = time.process_time()
    live.apply(wanted)
    told["merging"] = time.process_time() - cpu
    return told | {"test": scores(live, bench.test)}


def changed(row: Row, change: Mapping[str, Any]) -> dict[str, Any]:
    """A row's recipe with some of its knobs changed."""
    return {**row.recipe, "knobs": {**row.recipe.get("knobs", {}), **change}}


def tuned(bench: Bench, live: Live, row: Row, bounds: Bounds) -> dict[str, Any]:
    """Tries a row's changes; the one that keeps most on dev is chosen."""
    tried = []
    for change in row.tune:
        live.apply(bench.recipe(changed(row, change)))
        tried.append(lost(scores(live, bench.dev), bounds))
    best = row.tune[min(range(len(tried)), key=tried.__getitem__)]
    return {
        "tuned": [[dict(change), 1 - own] for change, own in zip(row.tune, tried, strict=True)],
        "chosen": dict(best),
    }


def references(bench: Bench, live: Live, skill: str | None) -> dict[str, Any]:
    """The base, or one expert, on test and dev."""
    recipe = bench.recipe({"method": "task_arithmetic", "knobs": {"scale": 1.0 if skill else 1e-30}})  # adds nothing
    if skill:
        recipe["models"] = [recipe["models"][bench.skills.index(skill)]]
    live.apply(recipe)
    own = {split: [t for t in tasks if skill in (None, t.skill, t.name)] for split, tasks in bench.splits.items()}
    return {"test": scores(live, own["test"]), "dev": losses(scores(live, own["dev"]))}


def further(bench: Bench, live: Live, rows: dict[str, Any], done: Callable[[str], None]) -> None:
    """For a few rows: more items of what nobody was trained for, and answers that are written."""
    wide = [sample(task, bench.budget.wider) for task in bench.general]
    written = [replace(load_task(HERE / "tasks" / f"{name}.yaml"), skill=name) for name in bench.scenario.written]
    nothing = Row("base", {"method": "task_arithmetic", "knobs": {"scale": 1e-30}})
    for part, names, tasks in (("wider", WIDER, wide), ("written", WRITING, written)):
        for row in (nothing, *bench.scenario.rows):
            if tasks and row.name in names and row.name in rows and part not in rows[row.name]:
                wanted = bench.recipe(changed(row, rows[row.name].get("chosen", {})), row.form, row.samples)
                if row.form:  # another row may have measured the same kind in another way since
                    measured(Recipe.model_validate(wanted), wanted["statistics"], row.samples or bench.budget.samples)
                live.apply(wanted)
                rows[row.name][part] = scores(live, tasks)
                done(f"{row.name}, {part}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", nargs="+", default=names, choices=names)
    parser.add_argument("--budget", default="page", choices=BUDGETS)
    parser.add_argument("--row", nargs="+", help="only these rows, whatever the budget")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    budget = BUDGETS[arguments.budget]
    held = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for scenario in SCENARIOS:
        if scenario.name in arguments.scenario:
            fill(Bench(scenario, budget), held, f"{scenario.name} {arguments.budget}", arguments.row)
    write_page(held, ROOT / "docs" / "experiment-graft.md")


def fill(bench: Bench, held: dict[str, Any], key: str, only: list[str] | None) -> None:
    """Runs the rows of a scenario that are still missing, and saves after each."""
    found = held.setdefault(key, {"scenario": bench.scenario.name, "skills": list(bench.skills), "rows": {}})
    found |= {"budget": asdict(bench.budget), "seed": SEED, "versions": {"torch": torch.__version__}}
    wanted = [row for row in bench.scenario.rows if not only or row.name in only]
    with bench.opened() as live:
        for skill in (None, *bench.skills):
            name = f"expert {skill}" if skill else "base"
            if name not in found["rows"]:
                found["rows"][name] = references(bench, live, skill)
                save(held, key, name)
        rows = found["rows"]
        bounds = {skill: (rows["base"]["dev"][skill], rows[f"expert {skill}"]["dev"][skill]) for skill in bench.skills}
        for row in wanted:
            if row.name not in found["rows"]:
                rows[row.name] = run(bench, live, row, bounds)
                save(held, key, row.name)
        further(bench, live, rows, lambda name: save(held, key, name))


def save(held: dict[str, Any], key: str, name: str) -> None:
    """Writes all results, whole or not at all."""
    fresh = RESULTS.with_suffix(".new")
    fresh.write_text(json.dumps(held) + "\n")
    fresh.replace(RESULTS)
    print(f"{key}: {name} done", flush=True)


if __name__ == "__main__":
    main()
