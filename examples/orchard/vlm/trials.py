"""The study's trials: one line each in `trials.jsonl`, which answers were right, item by item, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRIALS = Path(__file__).with_name("trials.jsonl")
VL_WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25)
EXP_WEIGHTS = (0.5, 0.75, 1.0, 1.5, 2.0)
DENSITIES = (0.3, 0.7)
LOSS = 0.05  # of the VLM's own task, that a point may cost on dev to be chosen


@dataclass(frozen=True)
class Point:
    """A model of the study: a VLM as it is (no expert), an expert swapped in, or both merged."""

    vlm: str
    expert: str = ""
    method: str = ""
    vl_weight: float = 1.0
    exp_weight: float = 0.0
    density: float | None = None

    @property
    def total(self) -> float:
        """The sum of the coefficients."""
        return self.vl_weight + self.exp_weight

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.method if self.expert else "VLM"


def swapped(vlm: str, expert: str) -> Point:
    """The expert in place of the VLM's backbone."""
    return Point(vlm, expert, "expert swapped in", 0.0, 1.0)


def grid(vlm: str, expert: str, method: str, densities: Sequence[float | None] = (None,)) -> list[Point]:
    """5 x 5 coefficients for each density."""
    return [Point(vlm, expert, method, vl, exp, density)
            for density in densities for vl in VL_WEIGHTS for exp in EXP_WEIGHTS]  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A model on a task of a split: 1 where an answer was right, 0 where not, in the order of the items."""

    point: Point
    split: str
    task: str
    right: str
    subtasks: dict[str, float]
    merge_seconds: float
    seconds: float

    @property
    def share(self) -> float:
        """The share of right answers."""
        return self.right.count("1") / len(self.right)


def read() -> dict[tuple[Point, str, str], Trial]:
    """All trials so far, by point, split and task."""
    if not TRIALS.is_file():
        return {}
    rows = [json.loads(line) for line in TRIALS.read_text(encoding="utf-8").splitlines()]
    made = [Trial(**{**row, "point": Point(**row["point"])}) for row in rows]
    return {(trial.point, trial.split, trial.task): trial for trial in made}


def keep(made: Iterable[Trial]) -> None:
    """Adds trials to the file."""
    with TRIALS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(trial)) + "\n" for trial in made)


def chosen(known: dict[Any, Trial], points: Sequence[Point], scenario: str) -> Point | None:
    """Of those tried on dev the one with the most right answers to the scenario that costs at most LOSS of the
    VLM's own task; where all cost more, the one with the most right answers to both. The first of equals."""
    tried = [point for point in points if (point, "dev", scenario) in known]
    if not tried:
        return None
    gained = {point: known[point, "dev", scenario].share for point in tried}
    own = {point: known[point, "dev", "digits"].share for point in tried}
    least = known[Point(tried[0].vlm), "dev", "digits"].share - LOSS
    kept = [point for point in tried if own[point] >= least - 1e-9]
    if kept:
        return max(kept, key=lambda point: (gained[point], own[point]))
    return max(tried, key=lambda point: round(gained[point] + own[point], 9))
