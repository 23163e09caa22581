"""Which optimiser finds good coefficients in few trials: the study of docs/experiment-search.md.

    OMP_NUM_THREADS=1 python examples/orchard/search_grids.py     # the grids, measured once (hours for all of them)
    OMP_NUM_THREADS=1 python examples/orchard/search_study.py     # optimisers on what there is; writes the page

What is committed was measured by `search_grids.py "math+code task_arithmetic" --dev math=5 --dev code=4`, without its
test items.

Every grid becomes a smooth landscape by radial basis functions, of which the leave-one-out error is known in closed
form (Rippa 1999). On it every optimiser runs from every seed; a run is appended to `.cache/orchard/search_runs.jsonl`
when it is done, so a stopped study goes on where it was. Regret is 1 at the worst point of the landscape, 0 at its
best.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.improving import optimisers
from graftkit.improving.optimisers import Asked
from graftkit.improving.search_space import Axis, Space
from graftkit.recipes.recipe import load
from make_experts import CACHE
from search_grids import AXIS, SCENARIOS, Scenario, read

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "experiment-search.md"
RUNS = CACHE / "search_runs.jsonl"
KERNELS = ("thin_plate_spline", "cubic", "linear")
OPTIMISERS = ("random", "sobol", "grid", "cma", "pattern", "powell", "gp")
SEEDS, BUDGETS, FINE = 10, (20, 40, 60), 201
NEAR = 0.3  # how far from one a sum may be to be near it


@dataclass(frozen=True)
class Grid:
    """A scenario's scores, [5, 5], and the losses of its items; on dev or on test."""

    scenario: Scenario
    density: float | None
    scores: np.ndarray
    seconds: tuple[float, float]  # of a merge and of a scoring, the median
    items: str = ""  # of each domain

    @property
    def name(self) -> str:
        """The scenario, with its density."""
        return self.scenario.name + (f" {self.density:g}" if self.density is not None else "")


def grids(lines: Sequence[dict[str, Any]], split: str) -> list[Grid]:
    """All grids that are whole."""
    found = []
    for scenario in SCENARIOS:
        for density in scenario.densities or (None,):
            grid = _grid(lines, scenario, density, split)
            found += [grid] if grid else []
    return found


def _grid(lines: Sequence[dict[str, Any]], scenario: Scenario, density: float | None, split: str) -> Grid | None:
    """The whole grid of the items that were measured last."""
    here = [line for line in lines if line["split"] == split and line["domains"] == [scenario.one, scenario.other]]
    contents = reversed(dict.fromkeys(line["content"] for line in here))
    made = (_of_items([line for line in here if line["content"] == one], scenario, density) for one in contents)
    return next((grid for grid in made if grid), None)


def _of_items(here: Sequence[dict[str, Any]], scenario: Scenario, density: float | None) -> Grid | None:
    pair = [scenario.one, scenario.other]
    single = {tuple(line["models"]): _losses(line) for line in here if len(line["models"]) < 2}
    merged = [
        line for line in here
        if line["models"] == pair and line["method"] == scenario.method and line["knobs"].get("density") == density
    ]  # fmt: skip
    if len(merged) < len(AXIS) ** 2 or len(single) < 3:
        return None
    low, high = single[()], {domain: min(single[one][domain] for one in single if one) for domain in pair}
    scores = np.empty((len(AXIS), len(AXIS)))
    for line in merged:
        losses = _losses(line)
        shares = [(low[d] - losses[d]) / (low[d] - high[d]) for d in pair]
        scores[tuple(AXIS.index(w) for w in line["knobs"]["weight"])] = np.mean(shares)
    merge, score = (float(np.median([line["seconds"][key] for line in merged])) for key in ("merge", "score"))
    items = ", ".join(f"{domain} {len(merged[0]['items'][domain])}" for domain in pair)
    return Grid(scenario, density, scores, (merge, score), items)


def _losses(line: dict[str, Any]) -> dict[str, float]:
    return {domain: sum(i[0] for i in items) / sum(i[1] for i in items) for domain, items in line["items"].items()}


POINTS = np.array([(a, b) for a in AXIS for b in AXIS])


class Surrogate:
    """A grid's landscape: the interpolation whose leave-one-out error on interior points is least."""

    def __init__(self, scores: np.ndarray) -> None:
        from scipy.interpolate import RBFInterpolator

        values = scores.ravel()
        self.errors = {kernel: left_out(kernel, values) for kernel in KERNELS}
        self.kernel = min(KERNELS, key=lambda kernel: self.errors[kernel])
        degree = 0 if self.kernel == "linear" else 1
        self._of = RBFInterpolator(POINTS, values, kernel=self.kernel, degree=degree)
        line = np.linspace(AXIS[0], AXIS[-1], FINE)
        self.fine = self._of(np.array([(a, b) for a in line for b in line]))
        self.best, self.worst = float(self.fine.max()), float(self.fine.min())

    def __call__(self, point: Sequence[float]) -> float:
        """The score at a point."""
        return float(self._of(np.array([point], float))[0])


def left_out(kernel: str, values: np.ndarray) -> float:
    """Root mean square, over interior points and in shares of the range, of what the others miss a point by.

    In closed form: `e_i = c_i / (A^-1)_ii` with `A = [[K, P], [P^T, 0]]` and `c` the coefficients of the whole.
    """
    gaps = np.linalg.norm(POINTS[:, None] - POINTS[None], axis=2)
    matrix = {
        "linear": lambda r: -r,
        "cubic": lambda r: r**3,
        "thin_plate_spline": lambda r: np.where(r > 0, r**2 * np.log(np.maximum(r, 1e-300)), 0.0),
    }[kernel](gaps)
    tail = np.ones((len(POINTS), 1)) if kernel == "linear" else np.column_stack([np.ones(len(POINTS)), POINTS])
    whole = np.block([[matrix, tail], [tail.T, np.zeros((tail.shape[1],) * 2)]])
    inverse = np.linalg.inv(whole)
    errors = (inverse @ np.concatenate([values, np.zeros(tail.shape[1])]))[: len(POINTS)] / np.diag(inverse)[
        : len(POINTS)
    ]
    inner = np.all((POINTS > AXIS[0]) & (POINTS < AXIS[-1]), axis=1)
    return float(np.sqrt(np.mean(errors[inner] ** 2)) / np.ptp(values))


def sum_to_one(scores: np.ndarray, near: float = 0.0) -> float:
    """What is lost of the best of the grid where the coefficients have to sum to one, in shares of it."""
    sums = np.abs(POINTS.sum(axis=1) - 1) <= near + 1e-9
    return float((scores.max() - scores.ravel()[sums].max()) / scores.max())


def space() -> Space:
    """The square of the grid."""
    recipe = load({"method": "task_arithmetic", "base": "base", "models": ["one", "other"]})
    return Space(recipe, tuple(Axis(f"weight {k}", "weight", AXIS[0], AXIS[-1], models=(k,)) for k in range(2)))


def run(surrogate: Surrogate, name: str, seed: int) -> list[float]:
    """The normalised regret after each trial."""
    record: dict[Any, float] = {}
    regrets, square = [], space()
    for number in range(max(BUDGETS)):
        values = optimisers.ask(name, Asked(square, record, number, seed, max(BUDGETS)))
        record[values] = surrogate(values)
        gap = surrogate.best - max(record.values())
        regrets.append(round(max(gap, 0.0) / (surrogate.best - surrogate.worst), 7))
    return regrets


def runs(found: Sequence[Grid], seeds: int) -> dict[tuple[str, str, int], list[float]]:
    """All runs, those that are kept read."""
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.is_file() else []
    done = {(line["grid"], line["optimizer"], line["seed"], line["scores"]): line["regrets"] for line in kept}
    made = {}
    for grid in found:
        surrogate = Surrogate(grid.scores)
        content = hashlib.sha256(np.round(grid.scores, 9).tobytes()).hexdigest()[:16]
        for name in OPTIMISERS:
            for seed in range(seeds):
                key = grid.name, name, seed, content
                if key not in done:
                    done[key] = run(surrogate, name, seed)
                    line = dict(zip(("grid", "optimizer", "seed", "scores"), key, strict=True))
                    with RUNS.open("a") as file:
                        file.write(json.dumps(line | {"regrets": done[key]}) + "\n")
                made[grid.name, name, seed] = done[key]
    return made


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def page(lines: Sequence[dict[str, Any]], seeds: int) -> str:
    """The whole page."""
    found = grids(lines, "dev")
    made = runs(found, seeds)
    return "\n".join([_opening(found), _landscapes(found), _ranking(found, made, seeds), _on_test(found, lines),
                      _not_run(found)])  # fmt: skip


def _opening(found: Sequence[Grid]) -> str:
    merge, score = (np.median([grid.seconds[k] for grid in found]) for k in (0, 1))
    few = "\nFewer than four landscapes rank the optimisers on these, not in general." if len(found) < 4 else ""
    return f"""# Which optimiser finds good coefficients

Made by `examples/orchard/search_grids.py` and `examples/orchard/search_study.py`; the second writes this page.

Landscapes: {len(found)}, of two experts of the orchard on SmolLM2-135M, both coefficients at
{", ".join(map(str, AXIS))}. A score is the mean over the two skills of how much of the gap between base and
expert in loss a merge closes: 0 is the base, 1 both experts. Between the points of a grid stands an interpolation by
radial basis functions, so what follows is about these smooth landscapes, and holds for searches on real scores only as
far as their noise is small.{few}
One thread, on a machine that others used: a merge into the live model took {merge:.2f} s, its scoring {score:.1f} s
(medians).
"""


def _landscapes(found: Sequence[Grid]) -> str:
    rows = []
    for grid in found:
        surrogate = Surrogate(grid.scores)
        first, second = POINTS[int(grid.scores.argmax())]
        rows.append([
            grid.name, grid.items, f"{grid.scores.min():.3f}", f"{grid.scores.max():.3f}", f"{first:g}, {second:g}",
            f"{100 * sum_to_one(grid.scores):.1f} %", f"{100 * sum_to_one(grid.scores, NEAR):.1f} %", surrogate.kernel,
            f"{100 * surrogate.errors[surrogate.kernel]:.1f} %",
        ])  # fmt: skip
    head = [
        "landscape",
        "dev items",
        "worst",
        "best",
        "best at",
        "lost where the sum is 1",
        f"within {NEAR}",
        "kernel",
        "left-out error",
    ]
    return f"""## The landscapes

*Lost*: of the grid's best score, if the coefficients have to sum to one (or to within {NEAR} of it, as only few points
do). *Left-out error*: root mean square over the nine interior points, each predicted from the 24 others, in percent of
the range.

{table(head, rows)}"""


def _ranking(found: Sequence[Grid], made: dict[tuple[str, str, int], list[float]], seeds: int) -> str:
    after = {name: np.array([[made[g.name, name, s] for s in range(seeds)] for g in found]) for name in OPTIMISERS}
    over = {n: runs.mean(axis=1) / after["random"].mean(axis=1) for n, runs in after.items()}  # [landscapes, trials]
    ranked, rows = sorted(OPTIMISERS, key=lambda name: float(np.median(over[name][:, 39]))), []
    for name in ranked:
        held = [after[name][:, :, b - 1] for b in BUDGETS]
        cells = [f"{np.median(one):.4f} ({np.quantile(one, 0.9):.4f})" for one in held]
        held = [over[name][:, b - 1] for b in BUDGETS]
        rows.append([name, *cells, *(f"{np.median(one):.3f} ({one.min():.3f} to {one.max():.3f})" for one in held)])
    head = ["optimiser", *(f"regret, {b}" for b in BUDGETS), *(f"over random, {b}" for b in BUDGETS)]
    methods = sorted({grid.scenario.method for grid in found})
    of_method = {m: [k for k, grid in enumerate(found) if grid.scenario.method == m] for m in methods}
    by_method = [[n, *(f"{np.median(over[n][of_method[m], 39]):.3f}" for m in methods)] for n in ranked]
    by_task = [[g.name, *(f"{over[name][k, 39]:.3f}" for name in ranked)] for k, g in enumerate(found)]
    return f"""## The optimisers

{seeds} seeds each. *Regret*: median (nine tenths quantile) over landscapes and seeds after so many trials. *Over
random*: for each landscape the mean regret over seeds divided by that of random search; the median over landscapes, and
the range.

{table(head, rows)}
By method, over random after 40 trials:

{table(["optimiser", *methods], by_method)}
By landscape, the same:

{table(["landscape", *ranked], by_task)}"""


def _on_test(found: Sequence[Grid], lines: Sequence[dict[str, Any]]) -> str:
    tests = {grid.name: grid.scores for grid in grids(lines, "test")}
    rows = []
    for grid in found:
        if grid.name in tests:
            test, place = tests[grid.name].ravel(), int(grid.scores.argmax())
            ranks = [np.argsort(np.argsort(scores.ravel())) for scores in (grid.scores, test)]
            rows.append([
                grid.name, f"{np.corrcoef(*ranks)[0, 1]:.2f}", f"{grid.scores.max():.3f}", f"{test[place]:.3f}",
                f"{test.max():.3f}", f"{(test.max() - test[place]) / np.ptp(test):.3f}",
            ])  # fmt: skip
    head = ["landscape", "rank correlation", "best on dev", "the same on test", "best on test", "its regret on test"]
    return f"""## Dev and test

The grids that were scored on the test items of both skills too, which no choice used:

{table(head, rows) if rows else "None yet."}
"""


def _not_run(found: Sequence[Grid]) -> str:
    here = {grid.name for grid in found}
    lost = [Grid(s, d, np.empty(0), (0, 0)).name for s in SCENARIOS for d in s.densities or (None,)]
    lost = [name for name in lost if name not in here]
    told = ", ".join(lost) if lost else "nothing"
    return f"""## Not run

{told}. `search_grids.py` measures what is missing when it is started again, and `search_study.py` takes it in.
"""


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    lines = read()
    if not grids(lines, "dev"):
        raise SystemExit("no whole grid in search_grids.jsonl yet: run search_grids.py first")
    options.out.write_text(page(lines, options.seeds).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
