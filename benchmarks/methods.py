"""What methods cost beside task arithmetic, as the study of cross-modal skill injection counts: one configuration, all
that it needs included, the examples that a method looks at among it.

    OMP_NUM_THREADS=1 python benchmarks/methods.py full --rounds 3       # of math and medicine, after make orchard
    OMP_NUM_THREADS=1 python benchmarks/methods.py adapters --rounds 3   # math and code

CPU seconds of one worker, in turn. Statistics are measured once, of a few examples of each model; the time of 500 is
that times 500 over as many, since it is the runs over the examples that cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from graftkit.execution.local import merge
from graftkit.measuring.statistics import collect
from graftkit.recipes.recipe import Recipe
from harness import RESULTS, ROOT, seconds_in_turn

ORCHARD = ROOT / "examples" / "orchard"

EXPERTS = {
    "full": {"math": ROOT / ".cache/orchard/math-full", "medicine": ROOT / ".cache/orchard/medicine-full"},
    "adapters": {"math": ORCHARD / "adapters/math", "code": ORCHARD / "adapters/code"},
}
WANTED = 500
PLAIN: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic"},
    "ties": {"method": "ties"},
    "dare": {"method": "dare"},
    "NaN": {"method": "task_arithmetic", "knobs": {"weight": {"from": "nan"}}},
    "MetaGPT": {"method": "task_arithmetic", "knobs": {"weight": {"from": "metagpt"}}},
    "WUDI": {"method": "wudi"},
    "TSV": {"method": "tsv"},
}
QUICK = ("task_arithmetic", "ties", "dare", "NaN", "MetaGPT")
LOOKING = {"RegMean": "regmean", "Fisher": "fisher"}


def recipe(experts: dict[str, Path], **more: Any) -> dict[str, Any]:
    """A merge of two experts."""
    models = [{"model": str(path)} for path in experts.values()]
    base = str(ROOT / ".cache" / "smollm2")
    return {"base": base, "models": models, "accept_base": True, "output": {"dtype": "bfloat16"}, **more}


def looking(experts: dict[str, Path], method: str, place: Path, examples: int) -> tuple[dict[str, Any], float]:
    """A recipe whose statistics have been measured, and the CPU seconds that those of 500 examples a model take."""
    told = recipe(experts, method=method, statistics=str(place / method))
    for model, skill in zip(told["models"], experts, strict=True):
        model["data"] = str(ORCHARD / "tasks" / f"{skill}.yaml")
    started = time.process_time()
    collect(Recipe.model_validate(told), samples=examples, device="cpu")
    return told, (time.process_time() - started) * WANTED / examples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("kind", choices=list(EXPERTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=20)
    options = parser.parse_args()
    experts = EXPERTS[options.kind]
    with tempfile.TemporaryDirectory() as folder:
        recipes = {name: recipe(experts, **told) for name, told in PLAIN.items()}
        before = dict.fromkeys(recipes, 0.0)
        for name, method in LOOKING.items():
            recipes[name], before[name] = looking(experts, method, Path(folder), options.examples)
        run = partial(merge, out=Path(folder) / "out", workers=1, overwrite=True)
        works = {name: partial(run, told) for name, told in recipes.items()}
        seconds_in_turn({name: works[name] for name in QUICK}, 0)  # loads what all share
        spent = seconds_in_turn(works, options.rounds, warm=False)
    first = statistics.median(spent["task_arithmetic"])
    rows = {
        name: {"merge": statistics.median(own), "examples": before[name],
               "ratio": (statistics.median(own) + before[name]) / first}
        for name, own in spent.items()
    }  # fmt: skip
    print("| method | merge, s | 500 examples a model, s | times task arithmetic |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['merge']:.2f} | {row['examples']:.0f} | {row['ratio']:.1f} |")
    file = RESULTS / f"{datetime.now(tz=timezone.utc):%Y-%m-%d-%H%M}-methods-{options.kind}.json"
    file.write_text(json.dumps({"rounds": options.rounds, "measured": options.examples, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
