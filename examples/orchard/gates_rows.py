"""The rows of the gates' experiment: which experts meet, by which methods, tuned over what, with gates from where.

A row is a recipe without models. `tune` are changes to its knobs, of which dev chooses one; `gates` says how they are
made: solved, or trained by a form and settings. A row may start from another row's gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CODE, MATH, LANGUAGES, MEDICINE = "code", "math", "languages", "medicine"


@dataclass(frozen=True)
class Row:
    """One line of the table. `training`: options of a training beside the budget's; `start`: the row it starts from."""

    name: str
    recipe: Mapping[str, Any]
    tune: tuple[Mapping[str, Any], ...] = ()
    gates: str = ""  # solve, train or fold
    training: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""


@dataclass(frozen=True)
class Scenario:
    """Experts that are merged: their skills, and where the weights stand under the repository's root.

    `few`: the names of the rows that a small budget has, beside the baselines.
    """

    name: str
    skills: tuple[str, ...]
    place: str = "examples/orchard/adapters/{}"
    rows: tuple[Row, ...] = ()
    few: tuple[str, ...] = ()

    def chosen(self, whole: bool) -> list[Row]:
        """All rows, or the few."""
        return [row for row in self.rows if whole or row in BASELINES or row.name in self.few]


@dataclass(frozen=True)
class Budget:
    """How much is spent: items of each domain on dev and on test, examples and steps for gates, most rows."""

    dev: int
    test: int
    samples: int
    steps: int
    whole: bool


BUDGETS = {"small": Budget(8, 16, 30, 20, False), "full": Budget(48, 96, 200, 120, True)}

TIES = [{"density": d, "scale": s} for d in (0.2, 0.5) for s in (1.0, 1.5)]
DARE = [{"density": d, "scale": s} for d in (0.5, 0.9) for s in (0.5, 0.8)]


def tuned(name: str, method: str, changes: list[dict[str, Any]]) -> Row:
    """A baseline, whose knobs dev chooses among four."""
    return Row(name, {"method": method}, tuple(changes))


def graft(name: str, **knobs: Any) -> Row:
    """Graft by trained gates."""
    form = {key: knobs.pop(key) for key in ("phi", "size", "sharpness", "raw", "samples") if key in knobs}
    rules = knobs.pop("rules", [])
    wanted: dict[str, Any] = {"method": "graft", "knobs": knobs.pop("knobs", knobs)}
    wanted |= {"rules": rules} if rules else {}
    return Row(name, wanted, gates="train", training=form)


def without(role: str) -> list[dict[str, Any]]:
    """A rule that leaves some projections to the plain average."""
    return [{"where": {"role": role}, "method": "average"}]


BASELINES = (
    Row("average", {"method": "average"}),
    tuned("task arithmetic", "task_arithmetic", [{"scale": s} for s in (0.3, 0.5, 0.7, 1.0)]),
    tuned("TIES", "ties", TIES),
    tuned("DARE", "dare", DARE),
)
OURS = (
    Row("graft, solved convex", {"method": "graft_convex"}, gates="solve"),
    Row("graft, solved convex, squashed", {"method": "graft"}, gates="solve"),
    Row("graft, solved free", {"method": "graft_free"}, gates="solve"),
    Row("graft, free, then trained", {"method": "graft_free"}, gates="train", start="graft, solved free"),
    Row("graft, free, trained from 1", {"method": "graft_free"}, gates="train"),
)
PAPERS = (
    Row("graft, global only", {"method": "graft", "knobs": {"local_signal": "none"}}),
    graft("graft, local only", global_signal="none"),
    graft("graft, both"),
    graft("graft, spectral", global_signal="spectral"),
    graft("graft, 8x8 blocks", size=8),
    graft("graft, attention only", rules=without("mlp")),
    graft("graft, mlp only", rules=without("attention")),
    graft("graft, sharpness learned", sharpness=True),
    graft("graft, sharpness 20", knobs={"sharpness": 20}),
)
PHI = tuple(graft(f"graft, phi {kind}", phi=kind) for kind in ("channelwise", "mlp", "dense"))
FOLD = (Row("graft, fold", {"method": "graft"}, gates="fold"),)
SWEEPS = (
    *(graft(f"graft, bins {bins}", bins=bins) for bins in (5, 15, 20)),
    *(graft(f"graft, c {c}", c=c) for c in (200.0, 400.0, 600.0)),
    *(graft(f"graft, a {a}", a=a) for a in (0.1, 0.2, 0.6)),
    *(graft(f"graft, {count} samples", samples=count) for count in (25, 50, 100, 400)),
)

SOLVED = ("graft, solved convex", "graft, solved free")
FACTORS = ("graft, global only", "graft, local only", "graft, both")
FOUR = (*FACTORS, *SOLVED, "graft, free, then trained")
ONE_PAIR = ("graft, both", "graft, sharpness learned", "graft, phi channelwise", "graft, phi mlp", *SOLVED)

SCENARIOS = (
    Scenario("four", (MATH, CODE, MEDICINE, LANGUAGES), rows=(*BASELINES, *PAPERS, *OURS, *FOLD), few=FOUR),
    Scenario("math-languages", (MATH, LANGUAGES), rows=(*BASELINES, *PAPERS, *PHI, *OURS, *SWEEPS), few=ONE_PAIR),
    Scenario("math-code", (MATH, CODE), rows=(*BASELINES, *PAPERS, *OURS), few=SOLVED),
    Scenario("code-medicine", (CODE, MEDICINE), rows=(*BASELINES, *PAPERS, *OURS), few=SOLVED),
    Scenario("full math-medicine", (MATH, MEDICINE), ".cache/orchard/{}-full", (*BASELINES, *PAPERS, *OURS), SOLVED),
)
