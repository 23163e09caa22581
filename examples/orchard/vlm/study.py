"""The study: text skills injected into the test bed's VLMs by merging, tuned on dev, tested once.

    OMP_NUM_THREADS=1 python examples/orchard/vlm/study.py                       # all of it; hours on one core
    OMP_NUM_THREADS=1 python examples/orchard/vlm/study.py --scenarios language --methods task_arithmetic
    python examples/orchard/vlm/study_page.py                                    # the page of what has been run

Resumable: a trial that stands in `trials.jsonl` is not run again. Needs `make_vlm.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from make_vlm import MADE, TASKS, expert
from trials import DENSITIES, EXP_WEIGHTS, VL_WEIGHTS, Point, Trial, chosen, grid, keep, read, swapped
from wording import SCENARIOS

from prepare_model import MODEL_DIR

METHODS = ("task_arithmetic", "dare", "ties")
OWN_DEV, OWN_TEST, SHAPES_TEST = 60, 500, 150
BATCH = 1024
NOTHING = 1e-9  # a coefficient that float32 weights do not feel; a recipe refuses a model with 0


class Bed:
    """A VLM in memory that an expert is merged into, and the questions that it is asked."""

    def __init__(self, vlm: str, expert_name: str) -> None:
        import torch
        import vlm_parts

        from graftkit.execution.live import Live

        torch.set_num_threads(1)
        self.vlm, self.expert = vlm, expert_name
        self.live = Live.open(self.recipe(Point(vlm, expert_name, "task_arithmetic", 1.0, 1.0)), workers=1)
        self.processor, self.questions, self.scorer = vlm_parts.processor(), dict[Any, Any](), None

    def recipe(self, point: Point) -> dict[str, Any]:
        """What a point is, as a recipe."""
        vlm = str(MADE / point.vlm)
        shared: dict[str, Any] = {"base": str(MODEL_DIR), "accept_base": True, "seed": 0}
        knobs = {} if point.density is None else {"knobs": {"density": point.density}}
        method = point.method if point.method in METHODS else "task_arithmetic"
        return {
            **shared, **knobs, "method": method, "vlm": vlm, "experts": [str(expert(point.expert))],
            "vl_weight": point.vl_weight or NOTHING, "exp_weight": point.exp_weight, "embeddings": "keep",
            "output": {"dtype": "float32"},
        }  # fmt: skip

    def merged(self, point: Point) -> float:
        """Merges a point into the model; the seconds of computing that it took."""
        start = time.process_time()
        self.live.apply(self.recipe(point))
        return time.process_time() - start

    def asked(self, split: str, task: str, model: Any) -> Any:
        """A task's questions, encoded once."""
        from graftkit.data import load_task
        from graftkit.data.tasks import sample
        from graftkit.measuring import greedy, scoring

        if (split, task) not in self.questions:
            limit = {
                "dev": OWN_DEV if task == "digits" else None,
                "test": SHAPES_TEST if task == "shapes" else OWN_TEST,
            }
            wanted = sample(load_task(TASKS / split / f"{task}.yaml"), limit[split])
            self.questions[split, task] = greedy.asked(model, self.processor, wanted)
        self.scorer = self.scorer or scoring.choose_scorer(model, self.questions[split, task].rows)
        return self.questions[split, task]

    def trial(self, point: Point, split: str, task: str, merge_seconds: float, model: Any) -> Trial:
        """One task under what is merged now."""
        from graftkit.measuring.generated import answered

        questions = self.asked(split, task, model)
        start = time.process_time()
        items = answered(model, questions, BATCH, scorer=self.scorer)
        seconds = time.process_time() - start
        by: dict[str, list[bool]] = {}
        for item in items:
            by.setdefault(item.subtask, []).append(item.right)
        subtasks = {name: round(sum(found) / len(found), 4) for name, found in by.items()}
        right = "".join(str(int(item.right)) for item in items)
        return Trial(point, split, task, right, subtasks, round(merge_seconds, 3), round(seconds, 3))


def run(bed: Bed, points: Iterable[Point], split: str, tasks: Sequence[str]) -> None:
    """Every point on every task of a split, but for what has been run."""
    for point in points:
        known = read()
        left = [task for task in tasks if (point, split, task) not in known]
        if not left:
            continue
        if point.expert:
            seconds, model = bed.merged(point), bed.live.model
            made = [bed.trial(point, split, task, seconds, model) for task in left]
        else:
            made = _plain(bed, point, split, left)
        keep(made)
        told = ", ".join(f"{trial.task} {trial.share:.3f}" for trial in made)
        print(f"{split} {point.vlm}+{point.expert or '-'} {point.name} {point.vl_weight}/{point.exp_weight}"
              f"{'' if point.density is None else f' density {point.density}'}: {told};"
              f" merge {made[0].merge_seconds:.2f} s, answers {sum(trial.seconds for trial in made):.1f} s",
              flush=True)  # fmt: skip


def _plain(bed: Bed, point: Point, split: str, tasks: Sequence[str]) -> list[Trial]:
    """The VLM as it is on disk, beside the model that merges go into."""
    from graftkit.measuring.loading import opened

    with opened(str(MADE / point.vlm), device="cpu", dtype="float32") as (model, _):
        return [bed.trial(point, split, task, 0.0, model) for task in tasks]


def study(vlm: str, expert_name: str, scenario: str, methods: Sequence[str], most: int | None = None) -> None:
    """One VLM and one scenario: dev first (at most so many points, from the grid's middle), then the chosen on test."""
    bed = Bed(vlm, expert_name)
    plain, swap = Point(vlm), swapped(vlm, expert_name)
    run(bed, [plain], "dev", (scenario, "digits"))
    for method in methods:
        points = grid(vlm, expert_name, method, (None,) if method == "task_arithmetic" else DENSITIES)
        run(bed, sorted(points, key=_from_middle)[:most], "dev", (scenario, "digits"))
        best = chosen(read(), points, scenario)
        run(bed, [*([best] if best else []), plain], "test", (scenario, "digits", "shapes"))
        if method == "task_arithmetic":
            confined = chosen(read(), [point for point in points if abs(point.total - 1) < 1e-9], scenario)
            run(bed, [swap], "dev", (scenario, "digits"))
            run(bed, [swap, *([confined] if confined else [])], "test", (scenario, "digits"))
    bed.live.close()


def _from_middle(point: Point) -> float:
    return round(abs(point.vl_weight - VL_WEIGHTS[2]) + abs(point.exp_weight - EXP_WEIGHTS[2]), 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vlms", nargs="+", default=["neutral", "sketch"])
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--most", type=int, help="points of each method tried on dev, from the grid's middle; all")
    parser.add_argument("--seed", type=int, default=0, help="1: the second trainings, of the neutral VLM and language")
    arguments = parser.parse_args()
    ending = f"-seed{arguments.seed}" if arguments.seed else ""
    for vlm in arguments.vlms:
        for scenario in arguments.scenarios:
            study(vlm + ending, scenario + ending, scenario, arguments.methods, arguments.most)


if __name__ == "__main__":
    main()
