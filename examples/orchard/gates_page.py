"""docs/experiment-graft.md, written from the results of gates_experiment.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gates_picture import PICTURE, write_picture
from gates_rows import SCENARIOS
from gates_scores import Share, drawn, gain, kept, told
from gates_text import HEAD, WHY, sizes
from gates_verdicts import OURS, claims, factors

TUNED = ("average", "task arithmetic", "TIES", "DARE")


def merges(held: Mapping[str, Any]) -> list[str]:
    """The rows that are merges, in the order of the table."""
    return [name for name in held["rows"] if name != "base" and not name.startswith("expert ")]


def lines(held: Mapping[str, Any]) -> Iterator[str]:
    """A scenario's section: its table, what was chosen and learnt, and what follows."""
    rows, skills = held["rows"], held["skills"]
    scores: dict[str, Share] = {name: kept(held, name) for name in merges(held)}
    best = max((name for name in TUNED if name in scores), key=lambda name: scores[name][0], default="")
    yield f"\n## {held['scenario']}: {', '.join(skills)}\n"
    yield sizes(held)
    columns = [
        "row",
        "kept",
        f"minus {best}",
        *skills,
        "text",
        "MMLU",
        "statistic, MB",
        "its s",
        "made, s",
        "merged, s",
    ]
    yield f"\n| {' | '.join(columns)} |"
    yield "|---" * (9 + len(skills)) + "|"
    for name in sorted(scores, key=lambda name: -scores[name][0]):
        gap = "" if name == best or not best else told(scores[name] - scores[best])
        own = [f"{gain(held, name, skill)[0]:.2f}" for skill in skills]
        yield f"| {' | '.join([name, told(scores[name]), gap, *own, *_general(rows[name]), *_costs(rows[name])])} |"
    text, mmlu = _general(rows["base"])
    yield f"| the base | 0 | | {' | '.join('0' for _ in skills)} | {text} | {mmlu} | | | | |"
    yield from _chosen(rows)
    yield from _learnt(rows)
    yield from claims(held, scores, [name for name in TUNED if name in scores])
    yield from factors(scores)
    yield from _written(rows)


def _general(found: Mapping[str, Any]) -> list[str]:
    return [f"{drawn(found['test'], 'text')[0]:.3f}", f"{drawn(found['test'], 'mmlu')[0]:.2f}"]


def _costs(found: Mapping[str, Any]) -> list[str]:
    """What a row's statistic takes on disk, and CPU seconds of measuring, making and merging."""
    measured = found.get("statistics", {})
    size = measured.get("bytes", found.get("bytes"))
    return [
        f"{size / 1e6:.1f}" if size else "",
        f"{measured['cpu_seconds']:.0f}" if measured.get("cpu_seconds") else "",
        f"{found['making']:.0f}" if "making" in found else "",
        f"{found['merging']:.1f}" if "merging" in found else "",
    ]


def _chosen(rows: Mapping[str, Any]) -> Iterator[str]:
    chosen = {name: found["chosen"] for name, found in rows.items() if "chosen" in found}
    settings = "; ".join(f"{name}: " + ", ".join(f"{k} {v}" for k, v in own.items()) for name, own in chosen.items())
    if settings:
        yield f"\nChosen on dev: {settings}."


def _learnt(rows: Mapping[str, Any]) -> Iterator[str]:
    trained = {name: found["gates"] for name, found in rows.items() if "change" in found.get("gates", {})}
    if not trained:
        return
    yield "\nThe last column is the first model's coefficient: least, median, largest of all channels.\n"
    yield "| trained | phi, numbers | steps | dev loss | mean change | coefficient |"
    yield "|---|---|---|---|---|---|"
    for name, own in trained.items():
        change = own["change"]
        sharp = f", sharpness {own['sharpness']:.2f}" if own.get("sharpness") else ""
        lies = ", ".join(f"{change[k]:.3f}" for k in ("low", "middle", "high"))
        dev = " -> ".join(f"{value:.4f}" for value in own["dev"])
        cells = (f"{name}{sharp}", f"{own['phi']}, {own['learnt']}", own["steps"], dev, f"{change['mean']:.2g}", lies)
        yield f"| {' | '.join(map(str, cells))} |"


def _written(rows: Mapping[str, Any]) -> Iterator[str]:
    """How many answers are right word by word, where they were generated."""
    found = {
        name: {task: drawn(own["written"], task) for task in own["written"]}
        for name, own in rows.items()
        if "written" in own
    }
    if "base" not in found:
        return
    tasks = list(found["base"])
    yield f"\nAnswers that were written, and are right as a whole, beside `{OURS}`'s (paired):\n"
    yield f"| row | {' | '.join(f'{task} | minus {OURS}' for task in tasks)} |"
    yield "|---" * (1 + 2 * len(tasks)) + "|"
    for name in sorted(found, key=lambda name: -sum(own[0] for own in found[name].values())):
        cells = [
            f"{told(found[name][task])} | {told(found[name][task] - found[OURS][task]) if name != OURS else ''}"
            for task in tasks
            if OURS in found
        ]
        yield f"| {' | '.join([name, *cells])} |"


def _missing(scenarios: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the rows' file names and nobody has run."""
    held = {own["scenario"]: own["rows"] for own in scenarios}
    left = {s.name: [row.name for row in s.rows if row.name not in held.get(s.name, {})] for s in SCENARIOS}
    if any(left.values()):
        yield "Of the page's own rows these (of a scenario without a table: all):\n"
    for name, names in left.items():
        if names:
            yield f"- {name}: {'; '.join(names)}"


def write_page(held: Mapping[str, Any], place: Path) -> None:
    """Writes the page of all scenarios that have results, and its picture beside it."""
    scenarios: Sequence[Mapping[str, Any]] = list(held.values())
    text = [HEAD.rstrip()]
    four = next((own for own in scenarios if own["scenario"] == "four"), None)
    if four:
        write_picture(four, place.parent / PICTURE)
        text.append(f"\n![score against the size of the statistic]({PICTURE})")
    text += [line for own in scenarios for line in lines(own)]
    place.write_text("\n".join([*text, WHY.rstrip(), "", *_missing(scenarios)]) + "\n", encoding="utf-8")
