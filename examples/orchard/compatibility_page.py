"""The measured part of docs/compatibility.md, and its pictures, from compatibility.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftkit.improving.ranking_rule import PREDICTORS
from graftkit.measuring.table import Column, Table, Value
from graftkit.reporting import plots

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
PAGE, PICTURES = DOCS / "compatibility.md", DOCS / "compatibility"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
TITLES = {
    "task_arithmetic": "task arithmetic", "average": "average", "all": "all pairs", "two skills": "two skills",
    "not damaged": "without overheated", "good experts": "no bad expert", "one task": "gain, one task",
    "all, score": "the merge's score, all pairs", "one task, score": "the merge's score, one task",
}  # fmt: skip
SEVERAL = ("all", "two skills", "not damaged", "good experts")
WEIGHED = ("all", "two skills", "one task", "all, score", "one task, score")
OTHERS = ("one task", "all, score", "one task, score")


def read() -> dict[str, Any]:
    """What was measured."""
    return dict(json.loads((HERE / "compatibility.json").read_text()))


def write() -> None:
    """Puts the page's measured part and its pictures in their places."""
    found = read()
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(head + BEGIN + "\n\n" + section(found) + "\n\n" + END + rest.partition(END)[2], encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name, svg in pictures(found).items():
        (PICTURES / name).write_text(svg, encoding="utf-8")


def section(found: dict[str, Any]) -> str:
    """The measured part as Markdown."""
    return "\n\n".join(_parts(found))


def _parts(found: dict[str, Any]) -> Iterator[str]:
    settings = found["settings"]
    yield _setting(found)
    yield _correlations(found, SEVERAL).to_markdown()
    yield "![Spearman of each predictor with the gain](compatibility/spearman.svg)"
    yield _verdict(found)
    yield _one_task(found)
    yield _correlations(found, OTHERS).to_markdown()
    best = order(found)[0]
    yield (
        f"![Gain by Graft's score](compatibility/score.svg) ![Gain by {_words(best)}](compatibility/best.svg)\n\n"
        "Each point is a pair; the gains are those of task arithmetic."
    )
    yield _picked(found).to_markdown()
    yield _weights(found).to_markdown()
    yield "### The score itself"
    yield _single(found).to_markdown()
    if found["by_samples"]:
        yield "### How many samples"
        yield "![The score by the number of samples](compatibility/samples.svg)"
        yield _samples(found).to_markdown()
    yield "### How it was measured"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    yield (
        f"`python examples/orchard/compatibility_study.py`; every number is in `examples/orchard/compatibility.json`. "
        f"Base: {settings['base']}. Dev records run for activations: {_counts(settings['dev_samples'])}. Test items "
        f"that merges are scored on: {_counts(settings['test_items'])}; other test items, which give the experts' own "
        f"scores: {_counts(settings['apart'])}. Reference experts: those called as their skill. "
        f"Seed {settings['seed']}, {settings['draws']} draws of experts. float32, one thread. Versions: {versions}."
    )


def _setting(found: dict[str, Any]) -> str:
    experts, recipes = found["experts"], found["settings"]["recipes"]
    bad = [name for name, one in experts.items() if one["note"]]
    scales = ", ".join(f"{TITLES[name]} with {recipes[name]['knobs']['scale']}" for name in found["gains"])
    return (
        f"{len(experts)} experts of the [orchard](../examples/orchard/README.md), three of them bad on purpose "
        f"({', '.join(bad)}): {len(next(iter(found['gains'].values())))} pairs, each merged ({scales} on each delta) "
        "and scored on the test items of both skills. Gain: normalised score of the merge minus that of the better of "
        "the two, mean over the pair's skills. Predictors see dev records, weights, and the experts' own scores on "
        "items that no merge is scored on."
    )


def order(found: dict[str, Any], group: str = "all") -> list[str]:
    """Predictors, the best first, by task arithmetic."""
    own = found["spearman"]["task_arithmetic"][group]
    return sorted((name for name in own if name in PREDICTORS), key=lambda name: -own[name]["value"])


def _correlations(found: dict[str, Any], wanted: tuple[str, ...]) -> Table:
    places = [(recipe, group) for recipe in found["spearman"] for group in wanted]
    several = len(found["spearman"]) > 1
    heads = [Column(f"{TITLES[recipe]}, " * several + TITLES[group], digits=2) for recipe, group in places]
    rows = []
    for name in (name for name in order(found, wanted[0]) if name in found["spearman"]["task_arithmetic"][wanted[-1]]):
        cells = [found["spearman"][recipe][group][name] for recipe, group in places]
        arrow = "more" if PREDICTORS[name].better == "higher" else "less"
        rows.append((_words(name), arrow, *(Value(c["value"], c["low"], c["high"]) for c in cells)))
    counts = found["spearman"]["task_arithmetic"]
    sizes = ", ".join(f"{TITLES[group]}: {next(iter(counts[group].values()))['pairs']}" for group in wanted)
    note = (
        f"Spearman{' with the gain' * (wanted == SEVERAL)}, signed so that 1 is a perfect promise; 95% intervals over "
        f"draws of experts. Pairs: {sizes}."
    )
    return Table((Column("predictor"), Column("promises"), *heads), tuple(rows), note=note)


def _verdict(found: dict[str, Any]) -> str:
    own = found["spearman"]["task_arithmetic"]["all"]
    names = order(found)
    best = names[0]
    rule, score = own["two_factor"], own["compatibility"]
    return (
        f"The paper reports 0.86 between its score and the gain. Here the score has **{_number(score)}**, and the "
        f"two-factor rule **{_number(rule)}**. What foretells best over all pairs is **{_words(best)}** with "
        f"**{_number(own[best])}**, then {_words(names[1])} ({_number(own[names[1]])}) and {_words(names[2])} "
        f"({_number(own[names[2]])})."
    )


def _one_task(found: dict[str, Any]) -> str:
    made = found["one_task"]["gains"]["task_arithmetic"]
    sound = [one["gain"] for key, one in made.items() if "overheated" not in key]
    better = sum(one["gain"] > 0 for one in made.values())
    return (
        f"On one of its skills alone a merge beats the better of its two experts in {better} of {len(made)} cases; "
        f"without overheated the mean gain there is {sum(sound) / len(sound):.2f}. For that target, and for what the "
        "merge itself scores (0 the base, 1 the reference expert):"
    )


def _number(one: dict[str, float]) -> str:
    return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _picked(found: dict[str, Any]) -> Table:
    names = ["the best", *order(found), "any"]
    titles = {"the best": "(the best pairs)", "any": "(any pair)"}
    rows = tuple((titles.get(name, _words(name)), *(own[name] for own in found["picked"].values())) for name in names)
    heads = (Column("picked by"), *(Column(TITLES[recipe], digits=2) for recipe in found["picked"]))
    return Table(heads, rows, f"Mean gain of the first {found['settings']['top']} pairs")


def _weights(found: dict[str, Any]) -> Table:
    rows = []
    for name in (n for n in found["better"] if n.startswith("two_factor")):
        weight = 0.5 if name == "two_factor" else float(name.rpartition("_")[2])
        cells = [found["spearman"]["task_arithmetic"][group][name] for group in WEIGHED]
        rows.append((weight, *(Value(c["value"], c["low"], c["high"]) for c in cells)))
    rows.sort(key=lambda row: row[0])
    heads = (Column("weight of the score", digits=2), *(Column(TITLES[group], digits=2) for group in WEIGHED))
    return Table(heads, tuple(rows), "The two-factor rule by its weight (task arithmetic)")


def _single(found: dict[str, Any]) -> Table:
    skills = list(next(iter(found["single"].values())))
    rows = tuple(
        (name, *(Value(**own[skill]["normalised"]) for skill in skills)) for name, own in found["single"].items()
    )
    title = "Equation 14, normalised, of each expert on each skill's dev records"
    return Table((Column("expert"), *(Column(skill, digits=4) for skill in skills)), rows, title)


def _samples(found: dict[str, Any]) -> Table:
    lines = found["by_samples"]
    sizes = [one["samples"] for one in next(iter(lines.values()))]
    rows = tuple((str(size), *(Value(**_value(own[k])) for own in lines.values())) for k, size in enumerate(sizes))
    note = "Mean and 95% interval over draws of so many samples, with replacement."
    return Table((Column("samples"), *(Column(name, digits=4) for name in lines)), rows, note=note)


def _value(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key != "samples"}


def pictures(found: dict[str, Any]) -> dict[str, str]:
    """The pictures, by file name."""
    own, names = found["spearman"]["task_arithmetic"]["all"], order(found)
    values = [Value(own[name]["value"], own[name]["low"], own[name]["high"]) for name in names]
    made = {
        "spearman.svg": plots.interval_plot(
            [_words(name) for name in names], values, xlabel="Spearman with the gain, all pairs",
            best=frozenset([0]), lines=[0.0, 0.86], title="Spearman of predictors with the gain; 0.86 is the paper's",
        ),
        "score.svg": _scatter(found, "compatibility"),
        "best.svg": _scatter(found, names[0]),
    }  # fmt: skip
    if found["by_samples"]:
        lines = {name: [(o["samples"], Value(**_value(o))) for o in own] for name, own in found["by_samples"].items()}
        made["samples.svg"] = plots.band_plot(
            lines, xlabel="samples", ylabel="score, normalised", title="the score by the number of samples"
        )
    return {name: plots.standalone(svg) for name, svg in made.items()}


def _scatter(found: dict[str, Any], name: str) -> str:
    bad = {expert for expert, one in found["experts"].items() if one["note"]}
    groups: dict[str, list[tuple[float, float]]] = {"two skills": [], "one skill": [], "with a bad expert": []}
    for pair, one in found["gains"]["task_arithmetic"].items():
        value = found["predictors"][pair][name]
        experts = pair.split("+")
        skills = {found["experts"][expert]["skill"] for expert in experts}
        key = "with a bad expert" if bad & set(experts) else "two skills" if len(skills) == 2 else "one skill"
        if value is not None:
            groups[key].append((value, max(one["gain"], FLOOR)))
    values = [point[0] for points in groups.values() for point in points]
    wide = min(values) > 0 and max(values) > 100 * min(values)
    floor = min(one["gain"] for one in found["gains"]["task_arithmetic"].values()) < FLOOR
    label = f"gain (below {FLOOR:g}: at {FLOOR:g})" if floor else "gain"
    return plots.scatter_plot(groups, xlabel=_words(name), ylabel=label, logarithmic=wide)


FLOOR = -1.5  # gains below stand here in the pictures


def _words(name: str) -> str:
    return "Graft's score" if name == "compatibility" else name.replace("_", " ")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{skill} {count}" for skill, count in counts.items())
