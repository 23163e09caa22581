"""The page of the study, `docs/experiment-vlm.md`, and its pictures, from `trials.jsonl` and `findings.md`.

python examples/orchard/vlm/study_page.py
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from make_vlm import HERE, expert, place
from study_tables import (
    BESIDE,
    CONFINED,
    METHODS,
    PRICES,
    RESULTS,
    WAYS,
    Known,
    Rows,
    beside_rows,
    by_way,
    confined_rows,
    price_rows,
    study_rows,
    tried,
)
from train_vlm import PARTS, VLMS
from trials import EXP_WEIGHTS, LOSS, VL_WEIGHTS, Point, Trial, chosen, grid, read
from wording import SCENARIOS

DOCS, COSTS_FILE = HERE.parents[2] / "docs", HERE / "trial_costs.jsonl"


def landscape(vlm: str, name: str, scenario: str, known: Known, out: Path) -> bool:
    """Two pictures over the grid of task arithmetic: the skill and the VLM's own task, on dev."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = grid(vlm, name, "task_arithmetic")
    best = chosen(known, points, scenario)
    if best is None:
        return False
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for panel, task, title in zip(
        panels, (scenario, "digits"), (f"{scenario} (emergent)", "digits (own)"), strict=True
    ):
        found = [known.get((point, "dev", task)) for point in points]
        shares = np.array([one.share if one else np.nan for one in found]).reshape(5, 5).T * 100
        panel.imshow(shares, origin="lower", vmin=0, vmax=100, cmap="viridis", aspect="auto")
        panel.set(title=title, xlabel="vl_weight", ylabel="exp_weight")
        panel.set_xticks(range(5), [f"{value:g}" for value in VL_WEIGHTS])
        panel.set_yticks(range(5), [f"{value:g}" for value in EXP_WEIGHTS])
        for (row, column), share in np.ndenumerate(shares):
            if np.isnan(share):
                continue
            panel.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if share > 60 else "white")
        at = points.index(best)
        panel.plot(at // 5, at % 5, "s", ms=24, mfc="none", mec="red", mew=2)
    figure.savefig(out, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return True


def trained(known: Known) -> Iterator[str]:
    """What was trained, from the records of the trainings."""
    yield "| part | seed | steps | rate | CPU s | what it reaches |\n|---|---|---|---|---|---|"
    for name in VLMS:
        file = place("parts", name, PARTS) / "training.json"
        if file.is_file():
            one = json.loads(file.read_text())
            settings, near = one["settings"], one["dev_tokens_nearest_to_their_word"]
            yield (f"| VLM `{name}` | {settings['seed']} | {settings['steps']} | {settings['rate']:g} |"
                   f" {one['cpu_seconds']} | loss {one['loss']['last five']}; dev tokens nearest to their word:"
                   f" {near['projector alone']} before, {near['trained']} after |")  # fmt: skip
    for name in (*SCENARIOS, "language-seed1"):
        file = expert(name) / "training.json"
        if file.is_file():
            one = json.loads(file.read_text())
            check = {who: float(np.mean(list(found.values()))) for who, found in one["text_check"].items()}
            yield (f"| expert `{name}` | {one['seed']} | {one['steps']} | {one['settings']['rate']:g} |"
                   f" {one['cpu_seconds']} | on text: {100 * check['expert']:.0f} % right, the base"
                   f" {100 * check['base']:.0f} % |")  # fmt: skip


def costs(known: Known) -> str:
    """Seconds of computing of a trial's merge and of its answers, over all dev trials of merges."""
    trials: dict[Point, list[Trial]] = {}
    for (point, split, _), trial in known.items():
        if split == "dev" and point.method in METHODS:
            trials.setdefault(point, []).append(trial)
    rows = []
    for method in METHODS:
        own = [made for point, made in trials.items() if point.method == method]
        if own:
            merge = float(np.median([made[0].merge_seconds for made in own]))
            answers = float(np.median([sum(trial.seconds for trial in made) for made in own]))
            rows.append(f"| {method} | {len(own)} | {merge:.2f} | {answers:.1f} | {100 * merge / answers:.1f} % |")
    return (
        "| method | dev trials | merge, CPU s | answers, CPU s | merge of answers |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
    )


def both_ways() -> Iterator[str]:
    """What `trial_cost.py` measured: merges beside the answers of one process, read in one pass and generated."""
    if not COSTS_FILE.is_file():
        return
    yield from (BOTH, COSTS_HEAD)
    for line in COSTS_FILE.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        merge = float(np.median(one["merges"]))
        cells = [one["label"], one["method"], f"{merge:.2f}"]
        for way in ("one_pass", "generated"):
            cells += [f"{one[way]:.1f}", f"{100 * merge / one[way]:.1f} %"]
        yield "| " + " | ".join([*cells, f"{one['alike']} of {one['questions']}"]) + " |"


def missing(known: Known) -> Iterator[str]:
    """What the command would still run, under its heading; nothing where all has been run."""
    told = []
    for method, densities in METHODS.items():
        left = []
        for vlm, name, scenario in PAIRS:
            points = grid(vlm, name, method, densities)
            count = len(points) - len(tried(points, scenario, known))
            left += [f"{vlm} with {name} ({count} of {len(points)} points)"] if count else []
        if left:
            told.append(f"- {method}: {', '.join(left)}")
    if told:
        yield from ("## Not run", "", *told, "")


def versions() -> str:
    """Of what trained and what measures; seeds beside those of the trainings."""
    packages = json.loads((expert("language") / "training.json").read_text())["packages"]
    told = ", ".join(f"{name} {number}" for name, number in packages.items())
    return f"Python {platform.python_version()}, {told}. Merges and bootstrap: seed 0. Splits: `pictures.py`."


INTRODUCTION = """
Made by `python examples/orchard/vlm/study_page.py` from `examples/orchard/vlm/trials.jsonl`, which
`python examples/orchard/vlm/study.py` writes: every answer, item by item. Seeds, splits and the test bed:
`examples/orchard/vlm/README.md`.
"""
LEGEND = f"""
Shares of right answers in %, with 95 % bootstrap intervals over items; gain and change are paired differences to the
VLM. Chosen on dev: most right answers of the skill at no more than {100 * LOSS:g} points of the VLM's own task; if no
point keeps that, most of both together. `skill` is what only the expert learnt, asked of a picture.
"""
PRICE = """
The most right answers of the skill on dev, in %, of all points that cost the VLM at most so many points of its own task
(digits on dev), by method. Not what was tested: the point chosen is the best of the column "at most 5", if it has one.
"""
SAME = """
What DARE and TIES have more than task arithmetic at the same coefficients, in points on dev: the mean over all that
both were tried at, the least and the most.
"""
SUM = """
Of task arithmetic, where the whole grid was tried. Left the point with most skill on dev, whatever it costs the VLM,
and what of it is lost, as a share, by confining the sum; right the point chosen as above among the same points.
"""
COSTS = """
Medians of seconds of computing over all trials above, whichever version made them; one thread, on a machine that others
used at the same time.
"""
BOTH = """
Measured by `trial_cost.py`, each line in one process: the median of four merges, and the answers under the last to the
180 dev questions, read in one pass over the right answers and generated token by token; alike are the verdicts.
"""
COSTS_HEAD = (
    "| version | method | merge, CPU s | one pass, CPU s | merge of it | generated, CPU s | merge of it | alike |\n"
)
COSTS_HEAD += "|---|---|---|---|---|---|---|---|"
SQUARE = "Task arithmetic, %; the red square is the chosen point, empty cells were not tried."
PAIRS = (
    *((vlm, name, name) for vlm in ("neutral", "sketch") for name in SCENARIOS),
    ("neutral-seed1", "language-seed1", "language"),
)


def tables(title: str, head: str, rows: Rows, known: Known) -> Iterator[str]:
    """A table for each VLM of which there is something to tell."""
    for vlm in dict.fromkeys(vlm for vlm, _, _ in PAIRS):
        found = [row for own, name, scenario in PAIRS if own == vlm for row in rows(own, name, scenario, known)]
        if found:
            yield from (f"### {title}, VLM `{vlm}`", "", head, *found, "")


def pictures(known: Known) -> Iterator[str]:
    """The landscapes that are whole."""
    for vlm, name, scenario in PAIRS:
        file = f"experiment-vlm-{vlm}-{scenario}.png"
        if landscape(vlm, name, scenario, known, DOCS / file):
            yield from (f"![{scenario}, VLM {vlm}: share of right answers over the two coefficients]({file})", "")


def page() -> str:
    """The whole page."""
    known, findings = read(), (HERE / "findings.md").read_text(encoding="utf-8").strip()
    return "\n".join([
        "# Skills from text experts in a VLM", INTRODUCTION, findings, "",
        "## What was trained", "", *trained(known), "", versions(), "",
        "## Results on test", LEGEND,
        *tables("Results", RESULTS, study_rows, known),
        *tables("By way to ask", WAYS, by_way, known),
        "## What a skill costs", PRICE, *tables("Skill on dev by loss", PRICES, price_rows, known),
        "## Beside task arithmetic", SAME, *tables("Beside task arithmetic", BESIDE, beside_rows, known),
        "## Confined to a sum of one", SUM, *tables("Coefficients confined", CONFINED, confined_rows, known),
        "## Landscapes on dev", "", SQUARE, "", *pictures(known),
        "## What a trial takes", COSTS, costs(known), *both_ways(), "",
        *missing(known),
    ])  # fmt: skip


def main() -> None:
    (DOCS / "experiment-vlm.md").write_text(page(), encoding="utf-8")
    print(DOCS / "experiment-vlm.md")


if __name__ == "__main__":
    main()
