"""What a trial of the study takes: its merge, and the answers to the dev questions in both ways to get them.

    OMP_NUM_THREADS=1 python examples/orchard/vlm/trial_cost.py --label "this version"

Seconds of computing, all in one process: some merges of each method, then the questions of `language` and `digits` read
in one pass and generated token by token. Adds a line for each method to `trial_costs.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import study
from trials import Point

COSTS = Path(__file__).with_name("trial_costs.jsonl")
METHODS = {"task_arithmetic": None, "dare": 0.7, "ties": 0.7}
EXP_WEIGHTS = (1.0, 0.5, 0.75, 1.5)


def generated(model: Any, questions: Any) -> str:
    """Which answers are right, item by item, when each is generated."""
    from graftkit.data.normalisation import normalised, right_answer
    from graftkit.measuring.generation import generate

    rules, items = questions.settings.normalise, questions.task.items
    replies = generate(model, questions.reader, questions.task, study.BATCH, lambda done: None)
    rights = [
        normalised(reply.text, rules) in [right_answer(choice, rules) for choice in item.choices]
        for item, reply in zip(items, replies, strict=True)
    ]
    return "".join(str(int(right)) for right in rights)


def cost(bed: study.Bed, method: str, density: float | None) -> dict[str, Any]:
    """One method: seconds of each merge, and of the answers under the last."""
    points = [Point(bed.vlm, bed.expert, method, 0.5, exp, density) for exp in EXP_WEIGHTS]
    merges = [round(bed.merged(point), 3) for point in points]
    model, tasks = bed.live.model, ("language", "digits")
    asked = [bed.asked("dev", task, model) for task in tasks]  # encoded before the clock runs
    read = [bed.trial(points[-1], "dev", task, 0.0, model) for task in tasks]
    start = time.process_time()
    written = [generated(model, questions) for questions in asked]
    spent = time.process_time() - start
    alike = sum(a == b for one, other in zip(read, written, strict=True) for a, b in zip(one.right, other, strict=True))
    return {
        "method": method, "merges": merges, "one_pass": round(sum(trial.seconds for trial in read), 2),
        "generated": round(spent, 2), "questions": sum(map(len, written)), "alike": alike,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", required=True, help="what is measured")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    bed = study.Bed("neutral", "language")
    for method in arguments.methods:
        row = {"label": arguments.label, **cost(bed, method, METHODS[method])}
        with COSTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    bed.live.close()


if __name__ == "__main__":
    main()
