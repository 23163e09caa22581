"""Statistics of the gates' experiment: a scenario's examples as files, what is measured of them, what it costs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.checkpoints.statistics import all_statistics, write_statistics
from graftkit.data.tasks import Task
from graftkit.measuring.statistics import collect
from graftkit.measuring.statistics_grams import Sketch, moments_of
from graftkit.recipes.recipe import Recipe

COST = "cost.json"


def placed(task: Task, directory: Path) -> Path:
    """Writes a task's items beside its description, and returns the description's place."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": item.prompt, "answer": item.choices[0]}) + "\n" for item in task.items]
    (directory / f"{task.skill}.jsonl").write_text("".join(lines), encoding="utf-8")
    head = f"name: {task.skill}\nkind: answer_loss\ndata: {task.skill}.jsonl\nchat: {str(task.chat).lower()}\n"
    place = directory / f"{task.skill}.yaml"
    place.write_text(head, encoding="utf-8")
    return place


def measured(recipe: Recipe, directory: str, samples: int) -> dict[str, Any]:
    """Measures what a recipe reads, into the directory of its statistics; tells bytes, tokens, CPU seconds.

    Grams in the form that the directory is called by, such as `sketch-64`, are made from full ones: what a run of their
    own would give, without the run. Seconds are of the run that measured, whichever row it was made for.
    """
    place = Path(directory)
    form = place.name.replace("-", ":")
    if form != "full" and not place.is_dir():
        _cheaper(place.parent / "full", place, form)
    started, cost = time.process_time(), place.parent / COST
    made = collect(recipe, samples=samples, form=form, device="cpu")
    costs = json.loads(cost.read_text()) if cost.is_file() else {}
    key = " ".join(sorted({f"{one.about.kind} {one.about.form}".removesuffix(f" {form}") for one in made}))
    if form == "full" and not all(one.reused for one in made):
        costs[key] = time.process_time() - started
        cost.write_text(json.dumps(costs))
    told = {"form": form, "kinds": key, "bytes": sum(one.nbytes for one in made)}
    return told | {"tokens": sum(one.about.tokens for one in made), "cpu_seconds": costs.get(key)}


def _cheaper(full: Path, place: Path, form: str) -> None:
    for own in all_statistics(full):
        if own.about.kind == "gram":
            values = {name: _in_form(own.values(name), form) for name in own.tensors}
            write_statistics(place / own.file.name, replace(own.about, form=form), values)


def _in_form(values: Any, form: str) -> Any:
    """A full matrix of second moments, as `block:SIZE` or `sketch:RANK` keeps it."""
    import torch

    full = torch.from_numpy(values)
    held: Any = moments_of(form, len(full), "cpu")
    held.tokens = 1
    if isinstance(held, Sketch):
        held.total, held.diagonal = full @ held.directions, full.diagonal().clone()
    else:
        padded = torch.nn.functional.pad(full, (0, held.missing, 0, held.missing))
        ends = range(0, len(padded), held.size)
        held.total = torch.stack([padded[k : k + held.size, k : k + held.size] for k in ends])
    return held.mean()
