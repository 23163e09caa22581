"""What follows from the rows of the gates' experiment, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gates_scores import Share, drawn, told, verdict

OURS, AIM = "core RegMean", "RegMean"
SMALLER = 100  # times, that the statistic is to be

PAIRS = (
    ("graft, both", "average", "the paper's Graft against the plain mean that it starts from"),
    ("graft, both", "graft, local only", "what the entropy gate adds to the local ones"),
    ("graft, both", "graft, global only", "what the local gates add to the entropy gate"),
    ("graft, global only", "average", "the entropy gate alone"),
    ("graft, spectral", "graft, both", "spectral norms instead of entropies"),
    ("graft, 8x8 blocks", "graft, both", "8 x 8 blocks instead of channels"),
    ("graft, attention only", "graft, both", "attention alone"),
    ("graft, mlp only", "graft, both", "MLPs alone"),
    ("graft, fold", "graft, both", "one model after another instead of all at once"),
    ("graft, sharpness 20", "graft, both", "weights that may leave 0.41 to 0.59"),
    ("graft, sharpness learned", "graft, both", "the same, learnt"),
    ("graft, solved convex", "graft, both", "convex weights solved instead of trained"),
    ("graft, solved convex, squashed", "graft, solved convex", "the paper's squashing of solved weights"),
    ("graft, solved free", "graft, solved convex", "free coefficients instead of convex weights"),
    ("graft, free, then trained", "graft, solved free", "training from the solved start"),
    ("graft, phi channelwise", "graft, both", "phi channelwise instead of affine"),
    ("graft, sharpness 20, phi channelwise", "graft, sharpness 20", "phi channelwise at sharpness 20"),
    ("graft, sharpness 20, phi mlp", "graft, sharpness 20", "phi mlp instead of affine at sharpness 20"),
    ("graft, sharpness 20, phi dense", "graft, sharpness 20", "phi dense instead of affine at sharpness 20"),
    ("graft, bins 20", "graft, both", "20 bins instead of 10"),
    ("graft, c 600", "graft, both", "c 600"),
    ("graft, a 0.6", "graft, both", "a 0.6"),
    ("graft, 8 samples", "graft, both", "8 training examples a skill"),
    ("core RegMean", "core RegMean, not balanced", "balance in the core"),
    ("core RegMean", "core RegMean, no probes", "probes in the core"),
    ("core RegMean, 64 probes", "core RegMean", "64 probes instead of 32"),
    ("core RegMean", "core RegMean, no probes, not balanced", "both, against the adapters' factors alone"),
    ("core RegMean", "core RegMean, 8 samples", "30 examples a skill instead of 8"),
    ("RegMean", "RegMean, 8 samples", "the same for RegMean"),
    ("RegMean++", "RegMean", "inputs behind the merged layers"),
)


def claims(held: Mapping[str, Any], scores: Mapping[str, Share], tuned: Sequence[str]) -> Iterator[str]:
    """The aim, checked: against every tuned baseline, against RegMean and its size, on what nobody was trained for."""
    if OURS not in scores:
        return
    yield f"\n**{OURS}** beside the tuned rows and {AIM}:\n"
    for name in (*tuned, AIM):
        if name in scores:
            gap = scores[OURS] - scores[name]
            yield f"- minus {name}: {told(gap)}, {verdict(gap)} it;"
    yield from _size(held["rows"])
    yield from _general(held["rows"])


def _size(rows: Mapping[str, Any]) -> Iterator[str]:
    own, aim = (rows.get(name, {}).get("statistics", {}).get("bytes", 0) for name in (OURS, AIM))
    if own and aim:
        how = "as was wanted" if aim >= SMALLER * own else f"and {SMALLER} was wanted"
        yield f"- statistic: {own / 1e6:.1f} MB, {aim / own:.0f} times smaller than {AIM}'s {aim / 1e6:.0f} MB, {how};"


def _general(rows: Mapping[str, Any]) -> Iterator[str]:
    part = "wider" if all("wider" in rows[name] for name in (OURS, "base")) else "test"
    for task, what, end in (("text", "loss on general text", ";"), ("mmlu", "MMLU", ".")):
        own, base = (drawn(rows[name][part], task) for name in (OURS, "base"))
        others = [name for name in rows if name not in (OURS, "base") and "wider" in rows[name]]
        beside = "".join(f"; {name} {drawn(rows[name]['wider'], task)[0]:.3f}" for name in others)
        items = len(rows[OURS][part][task])
        yield f"- {what}: {own[0]:.3f} on {items} items, minus the base's: {told(own - base)}{beside}{end}"


def factors(scores: Mapping[str, Share]) -> Iterator[str]:
    """One thing changed at a time."""
    here = [(one, other, what) for one, other, what in PAIRS if one in scores and other in scores]
    if not here:
        return
    yield "\n| one thing changed | difference in kept | verdict |\n|---|---|---|"
    for one, other, what in here:
        gap = scores[one] - scores[other]
        yield f"| {what}: {one}, minus {other} | {told(gap)} | {verdict(gap)} |"
