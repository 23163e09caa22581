"""docs/experiment-graft.md, written from the results of gates_experiment.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.measuring.resampling import interval, resampled_sums

RESAMPLES = 10_000
GENERAL = "general"
Items = Sequence[Sequence[float]]

HEAD = """# Graft against the other methods, on the orchard

Written by `examples/orchard/gates_page.py` from `examples/orchard/gates_results.json`, which
`examples/orchard/gates_experiment.py` fills; do not edit. Losses are per answer token, in nats, on test items that
nothing here was trained, tuned or stopped by. **kept** is the mean over the skills of
`(base - merged) / (base - expert)`: 1 where a merge is as good as each expert on its own skill. Brackets are 95 %
intervals of a paired bootstrap over items.
Tuned rows chose one of four settings by the mean dev loss. One seed, one base model of 135 million parameters.
"""


def drawn(found: Mapping[str, Items], skill: str) -> np.ndarray:
    """The loss on a skill as measured, then in each resample: the same items for all rows of a scenario."""
    parts = np.asarray(found[skill], np.float64)
    sums = np.concatenate([parts.sum(axis=0)[None], resampled_sums(parts, RESAMPLES, 0, skill)])
    return np.asarray(sums[:, 0] / sums[:, 1])


def kept(held: Mapping[str, Any], name: str) -> np.ndarray:
    """The share of the experts' gains that a row keeps, as measured and in each resample."""
    rows, shares = held["rows"], []
    for skill in held["skills"]:
        base, expert, own = (drawn(rows[n]["test"], skill) for n in ("base", f"expert {skill}", name))
        shares.append((base - own) / (base - expert))
    return np.asarray(np.mean(shares, axis=0))


def told(values: np.ndarray) -> str:
    """A value with its interval."""
    low, high = interval(values[1:])
    return f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"


def lines(key: str, held: Mapping[str, Any]) -> Iterator[str]:
    """A scenario's table, and what was chosen and learnt in it."""
    skills, rows = held["skills"], held["rows"]
    merged = [name for name in rows if name != "base" and not name.startswith("expert ")]
    scores = {name: kept(held, name) for name in merged}
    baselines = [name for name in merged if not name.startswith("graft")]
    best = max(baselines, key=lambda name: scores[name][0], default=None)
    budget = held["budget"]
    yield f"\n## {key}\n"
    yield (
        f"{', '.join(skills)}; {budget['dev']} dev and up to {budget['test']} test items a skill, {budget['samples']} "
        f"training examples a skill, at most {budget['steps']} steps of 4 examples. torch {held['versions']['torch']}."
    )
    yield f"\n| row | kept | minus {best} | {' | '.join(skills)} | {GENERAL} | CPU s |"
    yield "|---" * (5 + len(skills)) + "|"
    for name in ("base", *merged):
        found = rows[name]
        losses = [f"{drawn(found['test'], skill)[0]:.3f}" for skill in (*skills, GENERAL)]
        share, gap = ("0", "") if name == "base" else (told(scores[name]), _gap(scores, name, best))
        yield f"| {name} | {share} | {gap} | {' | '.join(losses)} | {found.get('cpu_seconds', 0):.0f} |"
    losses = [f"{drawn(rows[f'expert {skill}']['test'], skill)[0]:.3f}" for skill in skills]
    yield f"| each expert on its own | 1 | | {' | '.join(losses)} | | |"
    yield from _chosen(rows)
    yield from _learnt(rows)
    yield from _verdicts(scores, best)


def _gap(scores: Mapping[str, np.ndarray], name: str, best: str | None) -> str:
    return "" if best is None or name == best else told(scores[name] - scores[best])


def _chosen(rows: Mapping[str, Any]) -> Iterator[str]:
    chosen = {name: found["chosen"] for name, found in rows.items() if "chosen" in found}
    if chosen:
        settings = "; ".join(
            f"{name}: " + ", ".join(f"{k} {v}" for k, v in own.items()) for name, own in chosen.items()
        )
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


def _verdicts(scores: Mapping[str, np.ndarray], best: str | None) -> Iterator[str]:
    """In words: which rows differ from the best baseline beyond their interval, and what the paper's factors do."""
    if best is None:
        return
    yield ""
    for name in scores:
        if name.startswith("graft"):
            low, high = interval((scores[name] - scores[best])[1:])
            verdict = "above" if low > 0 else "below" if high < 0 else "not told apart from"
            yield f"- {name}: {verdict} {best}."
    pairs = (("graft, both", "average"), ("graft, both", "graft, local only"), ("graft, both", "graft, global only"))
    for one, other in (*pairs, ("graft, free, then trained", "graft, solved free")):
        if one in scores and other in scores:
            yield f"- {one} minus {other}: {told(scores[one] - scores[other])}."


def write_page(held: Mapping[str, Any], place: Path) -> None:
    """Writes the page."""
    text = [HEAD.rstrip(), *(line for key, own in held.items() for line in lines(key, own))]
    place.write_text("\n".join(text) + "\n", encoding="utf-8")
