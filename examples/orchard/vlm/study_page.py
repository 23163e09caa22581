"""The page of the study, `docs/experiment-vlm.md`, and its pictures, from `trials.jsonl` and `findings.md`.

python examples/orchard/vlm/study_page.py
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from make_vlm import HERE, expert, place
from train_vlm import PARTS, VLMS
from trials import EXP_WEIGHTS, LOSS, VL_WEIGHTS, Point, Trial, chosen, grid, read, swapped
from wording import SCENARIOS

from graftkit.measuring.resampling import interval, resampled_sums

DOCS = HERE.parents[2] / "docs"
METHODS = {"task_arithmetic": (None,), "dare": (0.3, 0.7), "ties": (0.3, 0.7)}
RESAMPLES = 10_000
Known = dict[tuple[Point, str, str], Trial]


def bits(trial: Trial) -> Any:
    """Right or not by item, as numbers."""
    return np.array(list(map(int, trial.right)), dtype=np.float64)


def told(values: Any, key: str, signed: bool = False) -> str:
    """A mean in points with its 95 % bootstrap interval over items."""
    drawn = resampled_sums(values[:, None], RESAMPLES, 0, key)[:, 0] / len(values)
    low, high = interval(drawn)
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(100 * value for value in (values.mean(), low, high)))


def weights(point: Point) -> str:
    """A point's coefficients."""
    if not point.expert:
        return "-"
    made = f"{point.vl_weight:g} / {point.exp_weight:g}"
    return made if point.density is None else f"{made}, density {point.density:g}"


def candidates(vlm: str, name: str, scenario: str, known: Known) -> Iterator[tuple[str, Point]]:
    """What was tested, in the order of the table."""
    yield "VLM", Point(vlm)
    yield "expert swapped in", swapped(vlm, name)
    for method, densities in METHODS.items():
        points = grid(vlm, name, method, densities)
        best = chosen(known, points, scenario)
        tried = sum((point, "dev", scenario) in known for point in points)
        if best:
            yield method + ("" if tried == len(points) else f" ({tried} of {len(points)} points tried)"), best
        if tried == len(points) and method == "task_arithmetic":
            confined = chosen(known, [one for one in points if abs(one.total - 1) < 1e-9], scenario)
            if confined:
                yield "task_arithmetic, sum 1", confined


def study_rows(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """The table's rows of one VLM and one scenario."""
    plain = {task: known.get((Point(vlm), "test", task)) for task in (scenario, "digits", "shapes")}
    for label, point in candidates(vlm, name, scenario, known):
        tests = {task: known.get((point, "test", task)) for task in plain}
        if any(tests[task] is None or plain[task] is None for task in (scenario, "digits")):
            continue
        dev = [known[point, "dev", task].share for task in (scenario, "digits")]
        cells = [scenario, label, weights(point), f"{100 * dev[0]:.1f}, {100 * dev[1]:.1f}"]
        for task, trial in tests.items():
            cells.append("" if trial is None else told(bits(trial), task))
            if point.expert and task != "shapes":
                cells.append(told(bits(trial) - bits(plain[task]), task, signed=True))
            elif task != "shapes":
                cells.append("")
        yield "| " + " | ".join(cells) + " |"


HEAD = (
    "| scenario | model | vl / exp weight | dev: skill, own | skill | gain | own: digits | change | shapes |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def by_way(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """Test shares by way to ask."""
    for label, point in candidates(vlm, name, scenario, known):
        trial = known.get((point, "test", scenario))
        if trial:
            shares = ", ".join(f"{way} {100 * share:.1f}" for way, share in sorted(trial.subtasks.items()))
            yield f"| {scenario} | {label} | {shares} |"


def confined_rows(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """What confining the sum of the coefficients costs, on dev and on test (where it was tested)."""
    points = grid(vlm, name, "task_arithmetic")
    best = chosen(known, points, scenario)
    if best is None or any((point, "dev", scenario) not in known for point in points):
        return
    top = known[best, "dev", scenario].share
    for label, width in (("1", 1e-9), ("0.75 to 1.25", 0.25 + 1e-9)):
        found = chosen(known, [one for one in points if abs(one.total - 1) <= width], scenario)
        if found:
            share = known[found, "dev", scenario].share
            tests = [known.get((one, "test", scenario)) for one in (best, found)]
            tested = f"{100 * tests[0].share:.1f} to {100 * tests[1].share:.1f}" if all(tests) else "not tested"
            lost = 100 * (top - share) / top if top else 0.0
            cells = [scenario, label, weights(best), weights(found), f"{100 * top:.1f} to {100 * share:.1f}"]
            yield "| " + " | ".join([*cells, f"{lost:.0f} %", tested]) + " |"


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


def missing(known: Known) -> Iterator[str]:
    """What the command would still run."""
    for method, densities in METHODS.items():
        left = []
        for vlm, name, scenario in PAIRS:
            points = grid(vlm, name, method, densities)
            count = sum((point, "dev", scenario) not in known for point in points)
            left += [f"{vlm} with {name} ({count} of {len(points)} points)"] if count else []
        if left:
            yield f"- {method}: {', '.join(left)}"


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
COSTS = "Medians of seconds of computing, one thread, on a machine that others used at the same time."
SQUARE = "Task arithmetic, %; the red square is the chosen point, empty cells were not tried."
WAYS = "| scenario | model | test, % |\n|---|---|---|"
CONFINED = (
    "| scenario | sum | best of all | best so confined | dev skill | lost | test skill |\n|---|---|---|---|---|---|---|"
)
PAIRS = (
    *((vlm, name, name) for vlm in ("neutral", "sketch") for name in SCENARIOS),
    ("neutral-seed1", "language-seed1", "language"),
)


def tables(title: str, head: str, rows: Callable[[str, str, str, Known], Iterator[str]], known: Known) -> Iterator[str]:
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
        *tables("Results", HEAD, study_rows, known),
        *tables("By way to ask", WAYS, by_way, known),
        "## Confined to a sum of one", "", "Where the whole grid was tried.", "",
        *tables("Coefficients confined", CONFINED, confined_rows, known),
        "## Landscapes on dev", "", SQUARE, "", *pictures(known),
        "## What a trial takes", "", COSTS, "", costs(known), "", "## Not run", "", *missing(known), "",
    ])  # fmt: skip


def main() -> None:
    (DOCS / "experiment-vlm.md").write_text(page(), encoding="utf-8")
    print(DOCS / "experiment-vlm.md")


if __name__ == "__main__":
    main()
