"""Methods that look at examples against those that do not, on the orchard's four LoRA experts: scores and costs.

    OMP_NUM_THREADS=1 python examples/orchard/statistics_experiment.py

Statistics are of training examples of each expert's own domain, scores are of the test tasks; nothing is tuned. What is
done already, statistics and rows, stays when the command is given again. The table goes into docs/statistics.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import graftkit
from experts import SOURCES
from graftkit.checkpoints.statistics import all_statistics, write_statistics
from graftkit.measuring.evaluation import evaluate, normalised_scores
from graftkit.measuring.statistics import collect
from graftkit.measuring.statistics_grams import Sketch, moments_of
from prepare_model import MODEL_DIR

HERE = Path(__file__).resolve().parent
PAGE, MARKS = HERE.parents[1] / "docs" / "statistics.md", ("<!-- measured -->\n", "<!-- /measured -->\n")
WORK = HERE.parents[1] / ".cache" / "orchard" / "statistics"
SKILLS = ("math", "code", "medicine", "languages")
ADAPTER = {"as": "adapter", "rank": "exact"}
WHOLE = {"dtype": "float32"}


def summed(scale: float) -> tuple[dict[str, Any], str]:
    """Task arithmetic."""
    return {"method": "task_arithmetic", "knobs": {"scale": scale}, "output": ADAPTER}, ""


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "task_arithmetic, scale 1.0": summed(1.0),
    "core_regmean": ({"method": "core_regmean", "output": ADAPTER}, "full"),
    "average": summed(0.25),
    "task_arithmetic, scale 0.7": summed(0.7),
    "regmean": ({"method": "regmean", "output": WHOLE}, "full"),
    "fisher": ({"method": "fisher", "output": WHOLE}, "full"),
    "task_arithmetic, scale 0.5": summed(0.5),
    "core_regmean, rank 8": ({"method": "core_regmean", "output": {"as": "adapter", "rank": 8}}, "full"),
    "regmean, sketch:64": ({"method": "regmean", "output": WHOLE}, "sketch:64"),
    "regmean, block:64": ({"method": "regmean", "output": WHOLE}, "block:64"),
}
"""By name: a recipe without its models, and the form of its statistics, empty where it needs none."""

FEWER = {"fisher": 2}
"""By what the number of examples is divided, for a method that takes gradients of each."""


def examples(skill: str, count: int) -> Path:
    """Records of the training split, drawn once, as a task beside the statistics."""
    records = SOURCES[skill].load("train")
    chosen = random.Random(0).sample(records, min(count, len(records)))
    lines = [json.dumps({"prompt": record.prompt, "answer": record.answer}) + "\n" for record in chosen]
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / f"{skill}.jsonl").write_text("".join(lines), encoding="utf-8")
    head = f"name: {skill}\nkind: answer_loss\ndata: {skill}.jsonl\nchat: {str(SOURCES[skill].chat).lower()}\n"
    (WORK / f"{skill}.yaml").write_text(head, encoding="utf-8")
    return WORK / f"{skill}.yaml"


def recipe(told: dict[str, Any], form: str, places: dict[str, Path]) -> graftkit.Recipe:
    """A row's recipe, its statistics in a directory for each form."""
    models = [{"model": str(HERE / "adapters" / skill), "data": str(places[skill])} for skill in SKILLS]
    whole = {**told, "base": str(MODEL_DIR), "accept_base": True, "models": models}
    whole |= {"statistics": str(WORK / form.replace(":", "-"))} if form else {}
    return graftkit.Recipe.model_validate(whole)


def row(name: str, arguments: argparse.Namespace, places: dict[str, Path]) -> dict[str, Any]:
    """Measures, merges, scores."""
    told, form = ROWS[name]
    asked = recipe(told, form, places)
    samples = arguments.samples // FEWER.get(told["method"], 1)
    if form not in ("", "full"):
        cheaper(form)
    made = collect(asked, samples=samples, form=form, device="cpu") if form else []
    out = WORK / "merged" / name.replace(" ", "_").replace(",", "").replace(":", "-")
    record = graftkit.merge(asked, out, overwrite=True, workers=1)
    scores = scored(out, arguments.limit)
    shutil.rmtree(out)
    return {
        **scores,
        "merge seconds": record["execution"]["seconds"],
        "statistics seconds": sum(one.about.seconds for one in made),
        "statistics bytes": sum(one.nbytes for one in made),
        "statistics tokens": sum(one.about.tokens for one in made),
    }


def cheaper(form: str) -> None:
    """Grams in a cheaper form, from full ones: what a run of its own would give, without the run."""
    for own in all_statistics(WORK / "full"):
        if own.about.kind != "gram":
            continue
        values = {}
        for name in own.tensors:
            full = torch.from_numpy(own.values(name))
            held: Any = moments_of(form, len(full), "cpu")
            held.tokens = 1
            if isinstance(held, Sketch):
                held.total, held.diagonal = full @ held.directions, full.diagonal().clone()
            else:
                ends = range(0, len(full), held.size)
                held.total = torch.stack([full[k : k + held.size, k : k + held.size] for k in ends])
            values[name] = held.mean()
        write_statistics(WORK / form.replace(":", "-") / own.file.name, replace(own.about, form=form), values)


def scored(out: Path, limit: int) -> dict[str, Any]:
    """Normalised scores of a merge, and its loss on general text beside the base's; the others' scores are cached."""
    experts = {skill: str(HERE / "adapters" / skill) for skill in SKILLS}
    tasks = [*(HERE / "tasks" / f"{skill}.yaml" for skill in SKILLS), HERE / "general" / "text.yaml"]
    models = [str(MODEL_DIR), *experts.values(), str(out)]
    cache = WORK / "scores"
    found = evaluate(models, tasks, base=str(MODEL_DIR), experts=experts, limit=limit, device="cpu", cache=cache)
    name = found.models[-1]
    normalised = {skill: asdict(value) for skill, value in normalised_scores(found, name).items()}
    losses = {
        model: {task.name: found.score(model, task.name).metrics[task.metric.name].value for task in found.tasks}
        for model in (found.models[0], name)
    }
    return {"normalised": normalised, "base": losses[found.models[0]], "losses": losses[name]}


def table(done: dict[str, Any], samples: int, limit: int) -> str:
    """The rows as a page shows them."""
    head = f"| method | {' | '.join(SKILLS)} | mean | general text, loss | statistics, s | MB | merge, s |\n"
    lines = [head, "|---" * (len(SKILLS) + 6) + "|\n"]
    for name, row in done.items():
        cells = [f"{row['normalised'][skill]['value']:.2f}" for skill in SKILLS]
        mean = row["normalised"]["mean"]
        cells.append(f"{mean['value']:.3f} [{mean['low']:.2f}, {mean['high']:.2f}]")
        cells.append(f"{row['losses']['general_text']:.3f}")
        costs = row["statistics seconds"], row["statistics bytes"] / 1e6
        cells += [f"{cost:.0f}" if cost >= 10 else f"{cost:.1f}" for cost in costs] if costs[1] else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['merge seconds']:.1f} |\n")
    base = next(iter(done.values()))["base"]["general_text"]
    told = [
        f"`--samples {samples} --limit {limit}`: {samples} training examples an expert",
        f"({samples // 2} for fisher), {limit} items of",
        f"each test task; general text of the base: {base:.3f}. One thread of a machine that others used as well, so",
        "seconds are upper bounds; those of the two cheap forms are of the full grams that they were made from.",
    ]
    return "\n".join(told) + "\n\n" + "".join(lines)


def write_page(text: str) -> None:
    """Puts the table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


def main() -> None:
    """All rows that are not in the file of results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "statistics_results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    places = {skill: examples(skill, arguments.samples) for skill in SKILLS}
    done = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for name in ROWS:
        if name not in done:
            started = time.perf_counter()
            done[name] = row(name, arguments, places)
            arguments.out.write_text(json.dumps(done, indent=1))
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
            write_page(table(done, arguments.samples, arguments.limit))


if __name__ == "__main__":
    main()
