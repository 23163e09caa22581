"""Scores of merges on whole grids of coefficients, item by item: what the study of optimisers interpolates.

    OMP_NUM_THREADS=1 python examples/orchard/search_grids.py [SCENARIO...]

Merges go into a live model. Every point is appended to `search_grids.jsonl` as soon as it is measured, so a stopped run
goes on where it was; a line counts only for the same scenario, method, knobs and items.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from experts import SOURCES
from graftkit.data.records import Item
from graftkit.data.tasks import Task, load_task, sample
from graftkit.execution.live import Live
from graftkit.measuring.scoring import score_task
from prepare_model import MODEL_DIR

HERE = Path(__file__).resolve().parent
LINES = HERE / "search_grids.jsonl"
AXIS = (0.2, 0.5, 0.8, 1.1, 1.4)  # of each coefficient; three points of the grid sum to one
DEV = {"math": 12, "code": 8, "medicine": 20, "languages": 20}  # items of each domain
TEST = {"math": 12, "code": 8, "medicine": 20, "languages": 20}


@dataclass(frozen=True)
class Scenario:
    """Two experts, a method and, where it has one, the densities of the grid."""

    one: str
    other: str
    method: str
    densities: tuple[float, ...] = ()
    test: bool = False

    @property
    def name(self) -> str:
        """`math+code task_arithmetic`."""
        return f"{self.one}+{self.other} {self.method}"

    @property
    def knobs(self) -> list[dict[str, Any]]:
        """The points of the grid."""
        pairs = [{"weight": [first, second]} for first, second in product(AXIS, AXIS)]
        return [{**pair, "density": d} for d in self.densities for pair in pairs] if self.densities else pairs


SCENARIOS = (
    Scenario("math", "code", "task_arithmetic", test=True),
    Scenario("math", "languages", "task_arithmetic", test=True),
    Scenario("code", "medicine", "task_arithmetic"),
    Scenario("medicine", "languages", "task_arithmetic"),
    Scenario("math", "code", "ties", (0.3,)),
    Scenario("math", "code", "dare", (0.3,)),
    Scenario("math", "languages", "ties", (0.3,)),
    Scenario("math", "languages", "dare", (0.3,)),
    Scenario("math", "code", "ties", (0.1, 0.5, 0.9)),
    Scenario("math", "code", "dare", (0.1, 0.5, 0.9)),
    *(Scenario(one, other, method, (0.1, 0.3, 0.5, 0.9))
      for one, other in (("code", "medicine"), ("medicine", "languages")) for method in ("ties", "dare")),
)  # fmt: skip


def chosen(names: Sequence[str]) -> Iterator[Scenario]:
    """The scenarios of these names, with the densities that are named; all where there are none."""
    for scenario in SCENARIOS:
        densities = tuple(d for d in scenario.densities if f"{scenario.name} {d:g}" in names)
        if not names or scenario.name in names:
            yield scenario
        elif densities:
            yield replace(scenario, densities=densities)


def dev_task(domain: str) -> Task:
    """The first dev items of what an expert learnt; the training saw none of them, the test tasks hold none."""
    source = SOURCES[domain]
    items = tuple(Item(record.prompt, (record.answer,)) for record in source.load("dev"))
    return sample(Task(domain, "answer_loss", items, source.chat), DEV[domain])


def tasks_of(split: str, domains: Sequence[str]) -> list[Task]:
    """The tasks of a split."""
    if split == "dev":
        return [dev_task(domain) for domain in domains]
    return [sample(load_task(HERE / "tasks" / f"{domain}.yaml"), TEST[domain]) for domain in domains]


def read() -> list[dict[str, Any]]:
    """All lines that are measured."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.is_file() else []


def key_of(line: dict[str, Any]) -> str:
    """What a line is a measurement of."""
    return json.dumps([line[k] for k in ("models", "method", "knobs", "split", "content")], sort_keys=True)


def wanted(scenario: Scenario) -> Iterator[dict[str, Any]]:
    """The measurements of a scenario: base and experts first."""
    pair = [scenario.one, scenario.other]
    for split in ("dev", "test") if scenario.test else ("dev",):
        for own in ([], [scenario.one], [scenario.other]):
            knobs = {"weight": [1.0] * len(own)}
            yield {"models": own, "method": "task_arithmetic", "knobs": knobs, "split": split, "domains": pair}
    for knobs in scenario.knobs:
        for split in ("dev", "test") if scenario.test else ("dev",):
            yield {"models": pair, "method": scenario.method, "knobs": knobs, "split": split, "domains": pair}


def recipe(models: Sequence[str], method: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """A line's merge."""
    places = [str(HERE / "adapters" / name) for name in models]
    return {"method": method, "base": str(MODEL_DIR), "models": places, "knobs": knobs, "accept_base": True, "seed": 0}


def measure(live: Live, line: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """A line with the losses of its items, `[summed loss, tokens]`, and what it took."""
    started = time.perf_counter()
    if line["models"]:
        live.apply(recipe(line["models"], line["method"], line["knobs"]))
    merged = time.perf_counter()
    scores = {}
    for task in tasks:
        items = score_task(live.model, live.tokenizer, task, 2048)
        scores[task.name] = [[round(value, 5) for value in item.parts("loss")] for item in items]
    seconds = {"merge": round(merged - started, 3), "score": round(time.perf_counter() - merged, 3)}
    return {**line, "items": scores, "seconds": seconds}


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", nargs="*", help="such as 'math+code ties', or 'math+code ties 0.3' for one density")
    parser.add_argument("--dev", action="append", default=[], help="dev items of a domain, such as math=5")
    parser.add_argument("--test", action="append", default=[], help="its test items")
    options = parser.parse_args()
    for counts, given in ((DEV, options.dev), (TEST, options.test)):
        counts.update({domain: int(count) for domain, count in (one.split("=") for one in given)})
    done = {key_of(line) for line in read()}
    for scenario in chosen(options.grids):
        cases = {split: tasks_of(split, (scenario.one, scenario.other)) for split in ("dev", "test")}
        contents = {
            s: hashlib.sha256("".join(t.content for t in ts).encode()).hexdigest()[:16] for s, ts in cases.items()
        }
        todo = [line | {"content": contents[line["split"]]} for line in wanted(scenario)]
        todo = sorted((one for one in todo if key_of(one) not in done), key=lambda one: bool(one["models"]))
        if not todo:
            continue
        with Live.open(recipe((scenario.one, scenario.other), "task_arithmetic", {}), workers=1) as live:
            for line in todo:  # the base first: the module holds it until something is applied
                made = measure(live, line, cases[line["split"]])
                with LINES.open("a") as file:
                    file.write(json.dumps(made) + "\n")
                done.add(key_of(line))
                print(scenario.name, line["split"], line["models"], line["knobs"], made["seconds"], flush=True)


if __name__ == "__main__":
    main()
