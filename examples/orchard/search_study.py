"""Which optimiser finds good coefficients in few trials: the study of docs/experiment-search.md.

    OMP_NUM_THREADS=1 python examples/orchard/search_grids.py     # grids of two experts, measured once (hours for all)
    OMP_NUM_THREADS=1 python examples/orchard/vlm/study.py        # grids of an expert in a VLM
    OMP_NUM_THREADS=1 python examples/orchard/search_study.py     # optimisers on what there is; writes the page

Every grid becomes a smooth landscape (`search_landscapes.py`). On it every optimiser runs from every seed; a run is
appended to `.cache/orchard/search_runs.jsonl` when it is done, so a stopped study goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "vlm"))

from trials import DENSITIES
from trials import read as answers

import search_grids
from make_experts import CACHE
from search_landscapes import OWN, Landscape, Surrogate, of_experts, of_vlms, sum_to_one, with_density
from search_pictures import on_other_items, over_trials
from search_runs import Kept, Runs

DOCS = Path(__file__).resolve().parents[2] / "docs"
RUNS = CACHE / "search_runs.jsonl"
OPTIMISERS = ("random", "sobol", "grid", "cma", "pattern", "powell", "gp", "tasks")
SEEDS = 10
NEAR = 0.3  # how far from one a sum may be to be near it
KNOWN_FIRST = tuple(f"{scenario} task_arithmetic" for scenario in
                    ("math+code", "neutral+language", "neutral+instruction", "neutral+arithmetic"))  # fmt: skip
SMALL = 0.01  # the regret that counts as having found it
LEFT_OUT = """Which of the two is ahead in the mean hangs on single landscapes (before sketch+arithmetic was
measured it was 0.0094 against 0.0055), so it is not called better, and the package leaves it out."""
Checked = Sequence[tuple[Runs, Landscape]]


def landscapes(lines: Sequence[dict[str, Any]], known: Any) -> list[Landscape]:
    """All that are whole: of two experts, of VLMs, of both with the density as an axis."""
    found = [*of_experts(lines), *of_vlms(known)]
    return [*found, *with_density(found)]


def pairs(lines: Sequence[dict[str, Any]], known: Any) -> list[tuple[Landscape, Landscape]]:
    """Landscapes to search on, and of the same merges on other items: dev and test, or every other item of dev."""
    test = {found.name: found for found in of_experts(lines, "test")}
    halves = zip(*(of_vlms(known, slice(k, None, 2)) for k in range(2)), strict=True)
    return [
        *((found, test[found.name]) for found in of_experts(lines) if found.name in test),
        *((one, other) for one, other in halves if one.method == "task_arithmetic"),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def page(made: Sequence[Runs], checked: Checked, missing: Sequence[str], seeds: int) -> str:
    """The whole page."""
    parts = [
        _opening(made),
        _landscapes(made),
        *_rankings(made, seeds),
        _ours(made),
        _on_test(checked),
        _not_run(missing),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _opening(made: Sequence[Runs]) -> str:
    scenarios = dict.fromkeys(runs.surrogate.of.scenario for runs in made)
    merge, score = np.median([runs.surrogate.of.seconds for runs in made], axis=0)
    few = "\nFewer than four scenarios rank the optimisers on these, not in general." if len(scenarios) < 4 else ""
    axis = "; `density` in a name: the densities are a third axis" if any(r.surrogate.of.size > 2 for r in made) else ""
    return f"""# Which optimiser finds good coefficients

Made by `examples/orchard/search_study.py` from grids that `search_grids.py` and `vlm/study.py` measured beside it.

Landscapes: {len(made)}, of {len(scenarios)} scenarios. Two experts of the orchard on SmolLM2-135M, where a score is the
mean over their skills of how much of the gap between base and expert in loss a merge closes; or an expert in a VLM of
the [test bed](experiment-vlm.md), where it is the mean of the share of right answers to the expert's task and of the
share to the VLM's own task divided by the VLM's. Five values of each coefficient{axis}.
Between the points of a grid stands an interpolation by radial basis functions, so what follows is about these smooth
landscapes, and holds for searches on real scores as far as their noise is small.{few}
One thread, on a machine that others used: a merge into the live model took {merge:.2f} s, its scoring {score:.1f} s
(medians over landscapes).
"""


def _landscapes(made: Sequence[Runs]) -> str:
    rows = []
    for runs in made:
        surrogate, of = runs.surrogate, runs.surrogate.of
        best = ", ".join(f"{value:g}" for value in of.points[of.scores.argmax()])
        rows.append([
            of.name, of.items, f"{of.scores.min():.3f}", f"{of.scores.max():.3f}", best,
            f"{100 * sum_to_one(of):.1f} %", f"{100 * sum_to_one(of, NEAR):.1f} %", surrogate.kernel,
            f"{100 * surrogate.errors[surrogate.kernel]:.1f} %",
        ])  # fmt: skip
    head = ["landscape", "dev items", "worst", "best", "best at", "lost where the sum is 1", f"within {NEAR}",
            "kernel", "left-out error"]  # fmt: skip
    return f"""## The landscapes

*Lost*: of the grid's best score, if the coefficients have to sum to one (or to within {NEAR} of it). *Left-out error*:
root mean square over the points inside the square of coefficients, each predicted from all others, in percent of the
range.

{table(head, rows)}"""


def _rankings(made: Sequence[Runs], seeds: int) -> Iterator[str]:
    yield f"""## The optimisers

{seeds} seeds each. *Regret*: 0 at the landscape's best, 1 at its worst; median (nine tenths quantile) over landscapes
and seeds after so many trials. *Over random*: for each landscape the mean regret over seeds divided by that of random
search; the median over landscapes, and the range. *Trials to {SMALL}*: until the regret is no more than that, median
(nine tenths quantile); those that never get there count as one more than the budget. Best first by the median over
random after all trials. The paper has GP-BO first, Pattern Search good but volatile, CMA-ES too slow.
"""
    for size, told in ((2, "Two coefficients"), (3, "Two coefficients and the density")):
        own = [runs for runs in made if runs.surrogate.of.size == size]
        if own:
            yield _ranking(own, f"{told}, {own[0].surrogate.of.budget} trials")
    yield "![Regret by trials](experiment-search.png)\n"


def _ranking(made: Sequence[Runs], title: str) -> str:
    budget = made[0].surrogate.of.budget
    after = {name: np.array([runs.regrets(name) for runs in made]) for name in made[0].tried}
    over = {name: found.mean(axis=1) / after["random"].mean(axis=1) for name, found in after.items()}
    ranked = sorted(after, key=lambda name: (float(np.median(over[name][:, -1])), float(over[name][:, -1].mean())))
    rows = []
    for name in ranked:
        shown = [(after[name][:, :, count - 1], over[name][:, count - 1]) for count in (budget // 2, budget)]
        regrets = [f"{np.median(one):.4f} ({np.quantile(one, 0.9):.4f})" for one, _ in shown]
        ratios = [f"{np.median(one):.3f} ({one.min():.3f} to {one.max():.3f})" for _, one in shown]
        rows.append([name, *regrets, *ratios, _until(after[name])])
    head = ["optimiser", *(f"{what}, {count}" for what in ("regret", "over random") for count in (budget // 2, budget)),
            f"trials to {SMALL}"]  # fmt: skip
    last = {name: found[:, budget // 2 - 1] for name, found in over.items()}
    return f"""### {title}

{table(head, rows)}
Over random after {budget // 2} trials, median by method and by scenario:

{_grouped(made, ranked, last)}"""


def _count(regrets: np.ndarray) -> float:
    """The median of trials until the regret is small."""
    return float(np.median((regrets > SMALL).sum(axis=-1) + 1))


def _until(regrets: np.ndarray) -> str:
    """The same with the nine tenths quantile, [..., trials]."""
    counts = (regrets > SMALL).sum(axis=-1) + 1
    return f"{np.median(counts):g} ({np.quantile(counts, 0.9):g})"


def _grouped(made: Sequence[Runs], ranked: Sequence[str], ratios: dict[str, np.ndarray]) -> str:
    rows = []
    for key in ("method", "scenario"):
        kinds = [getattr(runs.surrogate.of, key) for runs in made]
        for kind in dict.fromkeys(kinds):
            own = np.array([one == kind for one in kinds])
            rows.append([kind, own.sum(), *(f"{np.median(ratios[name][own]):.3f}" for name in ranked)])
    return table(["", "landscapes", *ranked], rows)


def _ours(made: Sequence[Runs]) -> str:
    if any({"gp", "tasks"} - set(runs.tried) for runs in made):
        return ""
    names = [runs.surrogate.of.name for runs in made]
    held = np.array([_halves(runs) for runs in made])
    rows: list[list[object]] = [
        [name, len(runs.surrogate.of.known), *_four(own), _until(runs.regrets("tasks")), _until(runs.regrets("gp"))]
        for name, runs, own in zip(names, made, held, strict=True)
    ]
    fresh = held[[name not in KNOWN_FIRST for name in names]]
    rows.append(["mean", "", *_four(held.mean(axis=0)), "", ""])
    rows += [["mean of the later", "", *_four(fresh.mean(axis=0)), "", ""]] if len(fresh) else []
    judged = fresh if len(fresh) else held
    _, same, half, whole = judged.mean(axis=0)
    head = ["landscape", "known", "`tasks`, a quarter", "`gp`, half", "`tasks`, half", "`gp`, all",
            f"`tasks`, trials to {SMALL}", "`gp`"]  # fmt: skip
    ratios = [_count(runs.regrets("tasks")) / _count(runs.regrets("gp")) for runs in made]
    return f"""## What a merge tells beyond its score

`tasks` is our own (`search_tasks.py`). It has a Gaussian process for each task with a quadratic as its mean, averages
over hyperparameters instead of taking the likeliest, starts at the middle, and of a plain sum of deltas it knows base
and models, which every search scores anyway for its scale (*known*). Mean regret over seeds after a part of the budget:

{table(head, rows)}
Trials to {SMALL}, `tasks` over `gp`: {np.median(ratios):.2f} (median over landscapes of the ratio of medians,
{min(ratios):.2f} to {max(ratios):.2f}). When it was settled only task arithmetic's landscapes of math+code and of the
VLM `neutral` were measured; the others, the *later*, are those to judge it by. The aim was the regret of `gp` at half
the trials. In the mean over {len(judged)} landscapes it is {"reached" if half <= whole else "missed"}:
{half:.4f} after half the budget, that of `gp` {same:.4f} after half and {whole:.4f} after all of it.
{LEFT_OUT}

Not used: gradients of the loss by the coefficients, since for two or three of them one costs as much as the further
trials it is worth, and answers have none; and scores of single items, since processes of items with one kernel sum to
the process of their sum.
"""


def _halves(runs: Runs) -> tuple[float, ...]:
    """Mean regrets over seeds: `tasks` after a quarter of the budget, `gp` after half, `tasks` too, `gp` after all."""
    gp, ours, half = runs.regrets("gp"), runs.regrets("tasks"), runs.surrogate.of.budget // 2
    return tuple(float(one.mean()) for one in (ours[:, half // 2 - 1], gp[:, half - 1], ours[:, half - 1], gp[:, -1]))


def _four(values: np.ndarray) -> list[str]:
    return [f"{one:.4f}" for one in values]


def _on_test(checked: Checked) -> str:
    rows = []
    for runs, other in checked:
        one, there, (name,) = runs.surrogate.of, Surrogate(other), runs.tried
        ranks = [np.argsort(np.argsort(of.scores)) for of in (one, other)]
        counts = (10, 20, runs.surrogate.of.budget)
        regrets = [np.median([runs.regrets(name, on)[:, k - 1] for k in counts], axis=1) for on in (None, there)]
        rows.append([
            one.name, one.items, other.items, f"{np.corrcoef(*ranks)[0, 1]:.2f}",
            *(f"{here:.3f}, {on_test:.3f}" for here, on_test in zip(*regrets, strict=True)),
        ])  # fmt: skip
    head = ["landscape", "searched on", "other items", "rank correlation", *(f"{k} trials" for k in (10, 20, 40))]
    picture = "\n![Regret on the items searched on, and on the others](experiment-search-test.png)\n" if rows else ""
    return f"""## Searched on dev, worth on other items

What `gp` has found after so many trials: its median regret on the items that were searched on, and on others that no
choice used, each in shares of their own landscape. Of two experts these are the test items; of an expert in a VLM,
whose test items were asked at the chosen points only, every other item of dev.

{table(head, rows) if rows else "None yet."}{picture}
"""


def _not_run(missing: Sequence[str]) -> str:
    return f"""## Not run

{", ".join(missing) or "Nothing"}. `search_grids.py` and `vlm/study.py` measure what is missing when they are started
again, and `search_study.py` takes it in.
"""


def not_run(found: Sequence[Landscape]) -> list[str]:
    """The grids that are not whole, by scenario and method with their densities."""
    here = {(of.scenario, of.method, of.density) for of in found}
    wanted = [(f"{s.one}+{s.other}", s.method, d) for s in search_grids.SCENARIOS for d in s.densities or (None,)]
    vlms = dict.fromkeys(of.scenario for of in found if OWN in of.items)
    wanted += [(vlm, method, d) for vlm in vlms for method in ("ties", "dare") for d in DENSITIES]
    lost: dict[str, list[str]] = {}
    for scenario, method, density in wanted:
        if (scenario, method, density) not in here:
            lost.setdefault(f"{scenario} {method}", []).extend([f"{density:g}"] if density else [])
    return [f"{name} {' '.join(densities)}".strip() for name, densities in lost.items()]


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=DOCS, help="where the page and its pictures go")
    options = parser.parse_args()
    lines, known, kept = search_grids.read(), answers(), Kept(RUNS)
    found = landscapes(lines, known)
    if not found:
        raise SystemExit("no whole grid yet: run search_grids.py or vlm/study.py first")
    made = [kept.runs(Surrogate(of), OPTIMISERS, options.seeds) for of in found]
    checked = [(kept.runs(Surrogate(one), ("gp",), options.seeds), other) for one, other in pairs(lines, known)]
    text = page(made, checked, not_run(found), options.seeds)
    (options.out / "experiment-search.md").write_text(text, encoding="utf-8")
    over_trials(made, options.out / "experiment-search.png")
    on_other_items(checked, options.out / "experiment-search-test.png")


if __name__ == "__main__":
    main()
