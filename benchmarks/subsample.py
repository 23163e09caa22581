"""Ways to choose examples, compared: what they cover of a mixture, and what gates solved on them are worth.

python benchmarks/make_mixture.py 4000 mixture.jsonl
python benchmarks/subsample.py coverage mixture.jsonl coverage.json
python benchmarks/subsample.py gates gates.json        # needs `make model`; about ten minutes on one core
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
ORCHARD = ROOT / "examples" / "orchard"
SIZES, SEEDS = (50, 200, 500), range(3)
WAYS: dict[str, tuple[str, Any]] = {
    "kmeans, K from 2 to 64": ("kmeans", (2, 64)),
    "kmeans, K from 8 to 64": ("kmeans", (8, 64)),
    "kmeans, K = N": ("kmeans", None),
    "random": ("random", (2, 2)),
    "kcenter": ("kcenter", (2, 2)),
    "herding": ("herding", (2, 2)),
}
POOL, FEW, ASKED = 2000, 50, 24
RUNS = (
    ("random", 0),
    ("kmeans", 0),
    ("random", 1),
    ("kmeans", 1),
    ("kcenter", 0),
    ("random", 2),
    ("kmeans", 2),
    ("herding", 0),
)


def cover(data: Path) -> list[dict[str, Any]]:
    """Coverage of every way, size and seed; a topic is a skill with a subtask."""
    from graftkit.improving.subsample_choice import choose
    from graftkit.improving.subsample_clusters import cluster
    from graftkit.measuring.coverage import coverage
    from graftkit.measuring.embedding import embedded, embedder

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    vectors = np.concatenate(list(embedded((f"{row['prompt']}\n{row['completion']}" for row in rows), embedder())))
    topics = [f"{row['skill']}: {row['subtask']}" for row in rows]
    held: dict[Any, Any] = {}
    found = []
    for size in SIZES:
        for way, (method, span) in WAYS.items():
            for seed in SEEDS if method in ("kmeans", "random") else SEEDS[:1]:  # the others have none
                key = (*(span or (size, size)), seed)
                held[key] = held.get(key) or cluster(vectors, *key)
                chosen, _ = choose(vectors, held[key], size, method, None, seed)  # type: ignore[arg-type]
                made = asdict(coverage(vectors, chosen, topics)) | {"clusters": len(held[key].centroids)}
                found.append({"size": size, "way": way, "seed": seed, **made})
    return found


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Means over seeds, with the range."""
    yield "| N | way | clusters | distance to the nearest | 95 % below | topics | balance |"
    yield "|---|---|---|---|---|---|---|"
    for size in SIZES:
        for way in WAYS:
            own = [row for row in found if (row["size"], row["way"]) == (size, way)]
            cells = [_spread([row[key] for row in own]) for key in ("distance", "farthest", "topics", "balance")]
            clusters = sorted({row["clusters"] for row in own}) if way.startswith("kmeans") else []
            told = f"{clusters[0]}-{clusters[-1]}" if clusters and clusters[0] != clusters[-1] else str(*clusters[:1])
            yield f"| {size} | {way} | {told or '-'} | {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    middle = f"{statistics.mean(values):.3f}"
    return middle if min(values) == max(values) else f"{middle} [{min(values):.3f}, {max(values):.3f}]"


def solve_gates() -> list[dict[str, Any]]:
    """Losses on the orchard's test tasks of math and medicine, merged by free gates solved on 50 + 50 examples."""
    sys.path.insert(0, str(ORCHARD))
    import icd_chapters
    import math_problems
    from graftkit.improving.subsample import subsample
    from records import write_lines

    pools = {
        "math": [problem.record for problem in math_problems.problems("train", POOL, 200)],
        "medicine": icd_chapters.records("train")[:POOL],
    }
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for skill, records in pools.items():
            write_lines(
                Path(scratch) / f"{skill}.jsonl", ({"instruction": r.prompt, "output": r.answer} for r in records)
            )
        found.append({"way": "no gates: task arithmetic at 1", "seed": 0, **_scored(Path(scratch), None)})
        print(found[-1], flush=True)
        for method, seed in RUNS:
            out = Path(scratch) / f"{method}{seed}"
            for skill in pools:
                subsample(Path(scratch) / f"{skill}.jsonl", out / skill, FEW, method=method, seed=seed)  # type: ignore[arg-type]
            found.append({"way": method, "seed": seed, **_scored(Path(scratch), out)})
            print(found[-1], flush=True)
    return found


def _scored(scratch: Path, chosen: Path | None) -> dict[str, float]:
    import graftkit
    from graftkit.improving.gates import solve

    told: dict[str, Any] = {
        "method": "task_arithmetic" if chosen is None else "graft_free",
        "base": str(ROOT / ".cache" / "smollm2"),
        "accept_base": True,
        "models": [str(ORCHARD / "adapters" / skill) for skill in ("math", "medicine")],
        "output": {"as": "adapter"},
    }
    recipe = scratch / "recipe.yaml"
    recipe.write_text(json.dumps(told))
    if chosen is not None:
        data = [chosen / skill / "task.yaml" for skill in ("math", "medicine")]
        recipe = solve(recipe, chosen / "gates", data=data, samples=FEW).recipe
    out = (chosen or scratch) / "merged"
    graftkit.merge(recipe, out, workers=1)
    tasks = [ORCHARD / "tasks" / f"{skill}.yaml" for skill in ("math", "medicine")]
    found = graftkit.evaluate([str(out)], tasks, resamples=10, adapter_base=told["base"], limit=ASKED)
    return {score.task: round(score.metrics["loss"].value, 4) for score in found.scores}


if __name__ == "__main__":
    if sys.argv[1] == "coverage":
        results = cover(Path(sys.argv[2]))
        print("\n".join(table(results)))
    else:
        results = solve_gates()
    Path(sys.argv[-1]).write_text(json.dumps(results, indent=1) + "\n")
