"""What a trial without disk takes: a merge into a live model beside the evaluation that follows, and beside the floor.

    OMP_NUM_THREADS=1 python benchmarks/live.py adapters --items 200 --rounds 5    # SmolLM2, math and code adapters
    OMP_NUM_THREADS=1 python benchmarks/live.py vlm --rounds 5                     # needs `make vlm`

One worker, in turn, every merge with other weights; CPU seconds of the process, since other programs may run: medians
and ranges over rounds. *Floor*: every parameter copied once from memory. *Other density*, in turns of its own: what
outlasts thresholds and draws is found anew.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

import graftkit
from graftkit.data.tasks import load_task, sample
from graftkit.execution.live import Live
from harness import seconds_in_turn

ROOT = Path(__file__).resolve().parents[1]
ORCHARD = ROOT / "examples" / "orchard"
METHODS: dict[str, dict[str, Any]] = {"task_arithmetic": {}, "ties": {"density": 0.3}, "dare": {"density": 0.3}}
Work = Callable[[], object]
Works = dict[str, Work]
Trials = Iterator[float]


def weights() -> Trials:
    """Other weights every time."""
    step = 0
    while True:
        step += 1
        yield round(0.3 + 0.001 * step, 3)


def floor(live: Live) -> Work:
    """Copies as many bytes as the parameters have, once."""
    held = [parameter.detach() for parameter in live.model.parameters()]
    kept = [parameter.clone() for parameter in held]
    return lambda: [mine.copy_(other) for mine, other in zip(held, kept, strict=True)]


def others(merge: Callable[[str], Work]) -> Works:
    """Merges of another density each time."""
    return {f"{method}, other density": lambda method=method: merge(method)() for method in ("ties", "dare")}  # type: ignore[misc]


def adapters(items: int) -> tuple[Live, Works, Works]:
    """The base with two adapters of rank 8, and the evaluation of so many of their items."""
    places = [str(ORCHARD / "adapters" / name) for name in ("math", "code")]
    told = {"base": str(ROOT / ".cache" / "smollm2"), "models": places, "accept_base": True}
    live, trials = Live.open({"method": "task_arithmetic", **told}, workers=1), weights()
    tasks = [sample(load_task(ORCHARD / "tasks" / f"{name}.yaml"), items // 2) for name in ("math", "code")]

    def merge(method: str, **knobs: Any) -> Work:
        return lambda: live.apply({"method": method, **told, "knobs": {**knobs, "weight": [next(trials), 0.5]}})

    works: Works = {f"evaluation, {items} items": lambda: graftkit.evaluate([live.named("trial")], tasks, resamples=1)}
    works |= {method: merge(method, **knobs) for method, knobs in METHODS.items()}
    return live, {**works, "floor": floor(live)}, others(lambda method: merge(method, density=next(trials)))


def vlm(_: int) -> tuple[Live, Works, Works]:
    """A dense VLM and an adapter of rank 4 on its base, and 180 questions of dev in one pass."""
    sys.path[:0] = [str(ORCHARD), str(ORCHARD / "vlm")]
    from study import Bed
    from trials import Point

    bed, trials = Bed("neutral", "language"), weights()

    def merge(method: str, density: float | None = None) -> Work:
        return lambda: bed.merged(Point("neutral", "language", method, next(trials), 1.0, density))

    point = Point("neutral", "language", "task_arithmetic", 1.0, 1.0)
    asked = [("dev", "language"), ("dev", "digits")]
    works: Works = {"evaluation, 180 questions": lambda: [bed.trial(point, *one, 0.0, bed.live.model) for one in asked]}
    works |= {method: merge(method, **knobs) for method, knobs in METHODS.items()}

    return bed.live, {**works, "floor": floor(bed.live)}, others(lambda method: merge(method, next(trials)))


def tell(spent: dict[str, list[float]]) -> None:
    """Seconds, and ratios to the first and to the floor."""
    middle = {name: statistics.median(own) for name, own in spent.items()}
    first, last = next(iter(middle.values())), middle["floor"]
    for name, own in spent.items():
        told = f"{middle[name]:8.3f} s CPU [{min(own):.3f}, {max(own):.3f}]"
        print(f"{name:28}{told:36}{middle[name] / first:8.2%} of it {middle[name] / last:8.1f} x floor", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bed", choices=("adapters", "vlm"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    live, works, anew = {"adapters": adapters, "vlm": vlm}[options.bed](options.items)
    with live:
        tell(seconds_in_turn(works, options.rounds) | seconds_in_turn(anew, options.rounds))


if __name__ == "__main__":
    main()
