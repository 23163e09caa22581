"""WUDI on the orchard's adapters: how long the closed form should descend, beside 300 steps of the published Adam.

    OMP_NUM_THREADS=1 python examples/orchard/wudi_experiment.py

Dev losses of every row choose among the lengths of the descent; the test says what the choice is worth, beside the sum
of the deltas and Adam. Rows that are in wudi_results.json stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import graftkit
from experts import SOURCES
from graftkit.checkpoints.adapters import Adapter, open_adapter
from graftkit.data.tasks import Item, Task, load_task, sample
from graftkit.measuring.evaluation import evaluate, normalised_scores
from prepare_model import MODEL_DIR

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "wudi_results.json"
WORK = HERE.parents[1] / ".cache" / "orchard" / "wudi"
PAIRS = (("math", "code"), ("math", "languages"))
LENGTHS = (3, 10, 30, 100, 300)
STEPS, RATE = 300, 1e-5
"""Adam's, as published."""


def dev_task(skill: str, count: int) -> Task:
    """Records of the dev split, drawn once."""
    records = random.Random(0).sample(SOURCES[skill].load("dev"), count)
    items = tuple(Item(record.prompt, (record.answer,), 0) for record in records)
    return Task(f"{skill}_dev", "answer_loss", items, SOURCES[skill].chat, skill=skill)


def merged(pair: Sequence[str], row: str, out: Path) -> float:
    """Writes a row's merge; returns its seconds."""
    started = time.process_time()
    if row == "adam":
        by_adam(pair, out)
    else:
        told = {"scale": 1.0} if row == "sum" else {"steps": int(row)}
        models = [str(HERE / "adapters" / skill) for skill in pair]
        recipe = {"method": "task_arithmetic" if row == "sum" else "wudi", "base": str(MODEL_DIR), "knobs": told}
        recipe |= {"models": models, "accept_base": True, "output": {"as": "adapter", "rank": "exact"}}
        graftkit.merge(recipe, out, overwrite=True, workers=1)
    return time.process_time() - started


def by_adam(pair: Sequence[str], out: Path) -> None:
    """A checkpoint by the published optimiser in float32; its gradient is formed in the adapters' rows, to rounding."""
    partial = out.with_suffix(".partial")
    shutil.copytree(MODEL_DIR, partial, dirs_exist_ok=True)
    weights = load_file(partial / "model.safetensors")
    adapters = [open_adapter(HERE / "adapters" / skill) for skill in pair]
    for name in adapters[0].factors:
        weights[name] = weights[name].float() + descended(adapters, name)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(out)


def descended(adapters: Sequence[Adapter], name: str) -> torch.Tensor:
    """One matrix: from the sum of the deltas, `STEPS` steps along `2 (M C - D)`."""
    held = [adapter.load(name, np.float64) for adapter in adapters]
    frame, _ = np.linalg.qr(np.concatenate([delta.right for delta in held]).T)  # [in, R]: all rows of all deltas
    cores = [delta.left @ (delta.right @ frame) for delta in held]  # [out, R]
    grams = [core.T @ core / np.square(core).sum() for core in cores]
    total, pull, basis = (
        torch.from_numpy(part).float()
        for part in (sum(grams), sum(c @ g for c, g in zip(cores, grams, strict=True)), frame)
    )
    made = torch.nn.Parameter(torch.from_numpy(sum(delta.left @ delta.right for delta in held)).float())
    optimizer = torch.optim.Adam([made], lr=RATE, fused=True)
    for _ in range(STEPS):
        made.grad = 2 * ((made.detach() @ basis) @ total - pull) @ basis.T
        optimizer.step()
    return made.detach()


def scored(out: Path, pair: Sequence[str], tasks: Sequence[Task]) -> dict[str, Any]:
    """Shares of the experts' gains, and losses; those of base and experts are cached."""
    experts = {skill: str(HERE / "adapters" / skill) for skill in pair}
    models = [str(MODEL_DIR), *experts.values(), str(out)]
    found = evaluate(models, tasks, base=str(MODEL_DIR), experts=experts, device="cpu", cache=WORK / "scores")
    shares = {skill: asdict(value) for skill, value in normalised_scores(found, found.models[-1]).items()}
    losses = {task.measures: found.score(found.models[-1], task.name).metrics[task.metric.name].value
              for task in found.tasks}  # fmt: skip
    return {"shares": shares, "losses": losses}


def keep(made: dict[str, Any], pair: Sequence[str], row: str, split: str) -> None:
    """Adds a row to the file, which another process may have written to meanwhile."""
    held = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    held.setdefault(" + ".join(pair), {"dev": {}, "test": {}})[split][row] = made
    RESULTS.write_text(json.dumps(held, indent=1) + "\n")


def chosen(done: dict[str, Any]) -> str:
    """The length with the best mean share on dev, over the pairs."""
    rows = [str(length) for length in LENGTHS]
    return max(rows, key=lambda row: sum(own["dev"][row]["shares"]["mean"]["value"] for own in done.values()))


def measured(done: dict[str, Any], pair: Sequence[str], row: str, split: str, tasks: Sequence[Task]) -> None:
    """One row on one split, unless it is there."""
    own = done.setdefault(" + ".join(pair), {"dev": {}, "test": {}})
    if row in own[split]:
        return
    out = WORK / "merged" / "-".join((*pair, row))
    seconds = None if out.is_dir() else merged(pair, row, out)
    own[split][row] = {**scored(out, pair, tasks), "merge_cpu_seconds": seconds}
    keep(own[split][row], pair, row, split)
    print(" + ".join(pair), row, split, own[split][row]["shares"]["mean"], seconds, flush=True)


def main() -> None:
    """All rows on dev, then what was chosen, the default and the others on test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", type=int, default=6)
    parser.add_argument("--test", type=int, default=10)
    parser.add_argument("--rows", nargs="+", help="only these on dev, and no test")
    parser.add_argument("--final", nargs="+", help="only these on test")
    budget = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for pair in PAIRS:
        for row in [] if budget.final else budget.rows or ("sum", *map(str, LENGTHS), "adam"):
            measured(done, pair, row, "dev", [dev_task(skill, budget.dev) for skill in pair])
    for pair in PAIRS if budget.final or not budget.rows else ():
        for row in budget.final or dict.fromkeys(("sum", "10", chosen(done), "adam")):
            tasks = [sample(load_task(HERE / "tasks" / f"{skill}.yaml"), budget.test) for skill in pair]
            measured(done, pair, row, "test", tasks)


if __name__ == "__main__":
    main()
