"""Does anything foretell what merging two experts gains? Every pair of the orchard, measured.

    OMP_NUM_THREADS=1 python examples/orchard/compatibility_study.py          # goes on where it stopped
    OMP_NUM_THREADS=1 python examples/orchard/compatibility_study.py --page   # the page, from the JSON

Writes compatibility.json, and the numbers and pictures of docs/compatibility.md. The gain of a pair: normalised score
of the merge (0 the base, 1 the reference expert of a skill) minus that of the better of the two, mean over the pair's
skills, on test items (`pair_gains.py`); and the same on each of its skills alone. What foretells it is measured on dev
data and on weights (`pair_probes.py`). Intervals: experts are drawn with replacement, since pairs share them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

import pair_probes
from experts import EXPERTS
from graftkit.cli import console
from graftkit.improving import ranking_rule as rule
from graftkit.improving.ranking_pairs import pair_predictors
from graftkit.measuring.compatibility import EPSILON
from graftkit.measuring.compatibility_observing import FIRST
from graftkit.measuring.compatibility_scores import by_samples, resampled, scores, with_interval
from graftkit.measuring.predictors_observing import Observed
from graftkit.measuring.resampling import interval
from make_experts import base_name
from pair_gains import FEWER, ITEMS, RECIPES, REFERENCE, SKILLS, Pair, is_kept, losses, measure, pairs, places

HERE = Path(__file__).resolve().parent
JSON = HERE / "compatibility.json"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of compatibility in the two-factor rule
DRAWS, SEED, TOP = 1000, 0, 5
DAMAGED = "overheated"
Point = tuple[str, Pair]  # something that is foretold, and the pair that it is of


def loss(label: str, skill: str, *, apart: bool = False) -> float:
    """On the items that merges are scored on; `apart` on the other ones, which only single models are scored on."""
    held = losses(label, skill)["items"]
    items = held[FEWER[skill] :] if apart else held[: FEWER[skill]]
    return -sum(item[0] for item in items) / sum(item[1] for item in items)


def normalised(label: str, skill: str) -> float:
    """0 the base, 1 the skill's reference expert."""
    base = loss("base", skill)
    return (base - loss(label, skill)) / (base - loss(REFERENCE[skill], skill))


def gain(pair: Pair, recipe: str, skills: Sequence[str] = ()) -> dict[str, float]:
    """The merge, the better single expert, and their difference; each the mean over skills, by default the pair's."""
    skills = skills or pair.skills
    merged = float(np.mean([normalised(f"{pair}-{recipe}", skill) for skill in skills]))
    single = max(float(np.mean([normalised(e, skill) for skill in skills])) for e in (pair.one, pair.other))
    return {"merged": merged, "single": single, "gain": merged - single}


def own_scores(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """p(e, t) by expert and skill, on items that no merge is scored on."""
    table = [[loss(name, skill, apart=True) for skill in SKILLS] for name in names]
    base = [loss("base", skill, apart=True) for skill in SKILLS]
    found = rule.proficiency(table, base, ["lower"] * len(SKILLS))
    return {name: dict(zip(SKILLS, map(float, row), strict=True)) for name, row in zip(names, found, strict=True)}


def observations(names: Sequence[str]) -> dict[str, dict[str, Observed]]:
    """Every expert on every skill's dev data."""
    found: dict[str, dict[str, Observed]] = {}
    for name in names:
        made = {skill: file for file, skill, count, _ in pair_probes.runs(name) if count == pair_probes.SAMPLES[skill]}
        found[name] = {skill: Observed.load(file) for skill, file in made.items()}
    return found


def predictors(names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Every predictor of every pair, for the target that is the pair's own skills."""
    return _foretold(names, [(str(pair), pair, pair.skills) for pair in pairs(list(names))])


def predictors_of_one_task(names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The same where the target is one skill alone, for each of a pair's skills."""
    return _foretold(names, [(key, pair, (key.rpartition(" ")[2],)) for key, pair in one_task(names)])


def _foretold(
    names: Sequence[str], targets: Sequence[tuple[str, Pair, Sequence[str]]]
) -> dict[str, dict[str, float | None]]:
    own, seen, weighed = own_scores(names), observations(names), pair_probes.weights(names)
    fits = {n: {s: scores(one.statistics.values.mean(axis=0)) for s, one in seen[n].items()} for n in names}
    places = {both: place for place, both in enumerate(combinations(names, 2))}
    found: dict[str, dict[str, float | None]] = {}
    for key, pair, skills in targets:
        both = (pair.one, pair.other)
        fit = [tuple(float(np.mean([fits[e][s][k] for s in skills])) for k in (1, 0)) for e in both]
        watched = [_watched(seen[e], EXPERTS[e].skill, own[e], skills) for e in both]
        found[key] = pair_predictors(
            (fit[0], fit[1]), ([own[pair.one][s] for s in skills], [own[pair.other][s] for s in skills]),
            (watched[0], watched[1]),
        ) | {
            "cosine": abs(weighed["cosines"][places[both]]),
            "sign_conflict": weighed["conflicts"][places[both]],
            "overlap": weighed["overlaps"][places[both]],
            "size": max(weighed["sizes"][names.index(e)] for e in both),
        }  # fmt: skip
    for weight in WEIGHTS:
        known = [[float(v[name] or 0) for v in found.values()] for name in ("compatibility", "proficiency")]
        for values, factor in zip(found.values(), rule.two_factor(known[0], known[1], weight), strict=True):
            values["two_factor" if weight == 0.5 else f"two_factor_{weight:g}"] = factor
    return found


def _watched(seen: dict[str, Observed], skill: str, own: dict[str, float], skills: Sequence[str]) -> list[Observed]:
    """An expert on the target's data, with the answers of deltas only where it is best: what the command looks at.

    They were measured on the skill that an expert goes by; where that is not in the target, they are taken from there.
    """
    home = max((s for s in skills if seen[s].responses), key=lambda s: own[s], default=skills[0])
    answers = seen[home].responses or seen[skill].responses
    return [Observed(seen[s].statistics, seen[s].grams, answers if s == home else None) for s in skills]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation; NaN where one does not vary."""
    a, b = rankdata(one), rankdata(other)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")


def correlation(
    names: Sequence[str], chosen: Sequence[Point], value: dict[str, float], gains: dict[str, float]
) -> dict[str, Any]:
    """Spearman over some pairs, with a 95% interval over draws of experts: a pair counts as often as both are drawn."""
    point = spearman([value[key] for key, _ in chosen], [gains[key] for key, _ in chosen])
    source, drawn = np.random.default_rng(SEED), []
    for _ in range(DRAWS):
        counts = dict(
            zip(names, np.bincount(source.integers(len(names), size=len(names)), minlength=len(names)), strict=True)
        )
        often = [int(counts[p.one] * counts[p.other]) for _, p in chosen]
        if sum(often):
            drawn.append(spearman(*(np.repeat([held[key] for key, _ in chosen], often) for held in (value, gains))))  # type: ignore[arg-type]
    known = np.array(drawn)[np.isfinite(drawn)]
    low, high = interval(known) if len(known) else (float("nan"), float("nan"))
    return {"value": point, "low": low, "high": high, "pairs": len(chosen)}


def groups(names: Sequence[str]) -> dict[str, list[Point]]:
    """All pairs; those of different skills; those without the damaged expert, and without any deliberately bad one."""
    every = [(str(pair), pair) for pair in pairs(list(names))]
    return {
        "all": every,
        "two skills": [(key, pair) for key, pair in every if len(pair.skills) == 2],
        "not damaged": [(key, pair) for key, pair in every if DAMAGED not in (pair.one, pair.other)],
        "good experts": [(key, p) for key, p in every if not EXPERTS[p.one].note and not EXPERTS[p.other].note],
    }


def one_task(names: Sequence[str]) -> list[Point]:
    """Every pair on each of its skills."""
    return [(f"{pair} on {skill}", pair) for pair in pairs(list(names)) for skill in pair.skills]


def study() -> dict[str, Any]:
    """Everything, from what was measured: of the experts that are wholly measured."""
    names = measured()
    own, known = own_scores(names), predictors(names)
    better = {n: rule.PREDICTORS["two_factor" if n.startswith("two_factor") else n].better for n in _names(known)}
    found = {recipe: made for recipe in RECIPES if (made := _gains(names, recipe))}
    alone, single = predictors_of_one_task(names), {recipe: _gains_of_one_task(names, recipe) for recipe in found}
    return {
        "experts": {n: {"skill": EXPERTS[n].skill, "note": EXPERTS[n].note, "p": own[n]} for n in names},
        "settings": {
            "base": base_name(), "recipes": RECIPES, "reference": REFERENCE, "test_items": FEWER,
            "dev_samples": pair_probes.SAMPLES, "many": pair_probes.MANY,
            "apart": {skill: ITEMS[skill] - FEWER[skill] for skill in SKILLS},
            "draws": DRAWS, "seed": SEED, "scale_from_first": FIRST, "epsilon": EPSILON, "top": TOP,
        },
        "versions": losses("base", SKILLS[0])["versions"],
        "predictors": known,
        "better": better,
        "gains": found,
        "one_task": {"predictors": alone, "gains": single},
        "spearman": {
            recipe: correlations(names, known, better, made) | of_one_task(names, alone, better, single[recipe])
            for recipe, made in found.items()
        },
        "picked": picked(found, known, better),
        "single": single_fits(names),
        "by_samples": samples_study(),
    }  # fmt: skip


def measured() -> list[str]:
    """The experts of which every run, and every pair by task arithmetic, is kept, in the order of the orchard."""
    found: list[str] = []
    for name in places():
        kept = all(file.is_file() for file, _, count, _ in pair_probes.runs(name) if count != pair_probes.MANY)
        if kept and all(is_kept(Pair(other, name), "task_arithmetic") for other in found):
            found.append(name)
    return found


def _gains(names: Sequence[str], recipe: str) -> dict[str, dict[str, float]]:
    """Of every pair; nothing where some are not measured yet."""
    try:
        return {str(pair): gain(pair, recipe) for pair in pairs(list(names))}
    except FileNotFoundError:
        print(f"{recipe}: not measured yet")
        return {}


def _gains_of_one_task(names: Sequence[str], recipe: str) -> dict[str, dict[str, float]]:
    return {key: gain(pair, recipe, (key.rpartition(" ")[2],)) for key, pair in one_task(names)}


def correlations(
    names: Sequence[str], known: dict[str, Any], better: dict[str, str], made: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """By group of pairs and predictor: with the gain, and over all pairs also with the merge's own score."""
    values = {name: _signed(known, name, direction) for name, direction in better.items()}
    asked = {group: (chosen, "gain") for group, chosen in groups(names).items()}
    asked["all, score"] = (asked["all"][0], "merged")
    return {group: _each(names, chosen, values, made, what) for group, (chosen, what) in asked.items()}


def of_one_task(
    names: Sequence[str], known: dict[str, Any], better: dict[str, str], made: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The same for targets of one skill; without headroom, which is nothing there."""
    values = {name: _signed(known, name, way) for name, way in better.items() if name != "headroom"}
    asked = {"one task": "gain", "one task, score": "merged"}
    return {group: _each(names, one_task(names), values, made, what) for group, what in asked.items()}


def _each(
    names: Sequence[str], chosen: Sequence[Point], values: dict[str, dict[str, float]],
    made: dict[str, dict[str, float]], what: str,
) -> dict[str, Any]:  # fmt: skip
    outcomes = {key: one[what] for key, one in made.items()}
    return {name: correlation(names, chosen, value, outcomes) for name, value in values.items()}


def _names(known: dict[str, dict[str, float | None]]) -> list[str]:
    return list(next(iter(known.values())))


def _signed(known: dict[str, dict[str, float | None]], name: str, better: str) -> dict[str, float]:
    """A predictor so that higher promises more; what is not known promises nothing."""
    sign = 1 if better == "higher" else -1
    return {pair: float("-inf") if own[name] is None else sign * float(own[name] or 0) for pair, own in known.items()}


def picked(found: dict[str, Any], known: dict[str, Any], directions: dict[str, str]) -> dict[str, Any]:
    """The mean gain of the first five pairs by each predictor, of the best five, and of all."""
    made = {}
    for recipe, own in found.items():
        gains = {pair: one["gain"] for pair, one in own.items()}
        orders = {name: _signed(known, name, better) for name, better in directions.items()} | {"the best": gains}
        tops = {name: sorted(value, key=lambda pair, value=value: -value[pair])[:TOP] for name, value in orders.items()}
        made[recipe] = {name: float(np.mean([gains[pair] for pair in top])) for name, top in tops.items()}
        made[recipe]["any"] = float(np.mean(list(gains.values())))
    return made


def single_fits(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Equation 14 of each expert on each skill's data, raw and normalised, with intervals."""
    made: dict[str, dict[str, Any]] = {}
    for name, own in observations(names).items():
        made[name] = {}
        for skill, one in own.items():
            drawn = resampled(one.statistics.values, 1000, SEED, skill)
            raw, scaled = scores(one.statistics.values.mean(axis=0))
            made[name][skill] = {
                "raw": with_interval(float(raw), drawn[0], len(one.statistics.values)).to_dict(),
                "normalised": with_interval(float(scaled), drawn[1], len(one.statistics.values)).to_dict(),
            }
    return made


def samples_study() -> dict[str, Any]:
    """How the score depends on the number of samples."""
    made = {}
    for name in pair_probes.ALSO:
        for file, skill, count, _ in pair_probes.runs(name):
            if count == pair_probes.MANY and file.is_file():
                spreads = by_samples(Observed.load(file).statistics.values, 1000, SEED)
                made[f"{name} on {skill}"] = [{"samples": s.samples, **s.normalised.to_dict()} for s in spreads]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page from compatibility.json")
    parser.add_argument("--as-is", action="store_true", help="measure nothing more; take what is kept")
    arguments = parser.parse_args()
    if not arguments.page:
        torch.set_num_threads(arguments.threads)
        console.quiet_libraries(arguments.threads)
        if not arguments.as_is:
            pair_probes.measure()
            measure()
        JSON.write_text(json.dumps(study(), indent=1) + "\n")
    import compatibility_page

    compatibility_page.write()


if __name__ == "__main__":
    main()
