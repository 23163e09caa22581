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
    """One line of the table.

    `training`: options of a training beside the budget's; `start`: the row it starts from; `form`: of the statistics
    that the method reads, empty where it reads none;
    `samples`: of each domain for these, the budget's where 0.
    """

    name: str
    recipe: Mapping[str, Any]
    tune: tuple[Mapping[str, Any], ...] = ()
    gates: str = ""  # solve, train, fold or adamerging
    training: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    form: str = ""
    samples: int = 0


@dataclass(frozen=True)
class Scenario:
    """Experts that are merged: their skills, where the weights stand under the repository's root, and by what.

    `written`: tasks whose answers are generated and compared whole, for the rows in WRITING.
    """

    name: str
    skills: tuple[str, ...]
    place: str = "examples/orchard/adapters/{}"
    rows: tuple[Row, ...] = ()
    written: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """How much is spent: items of each domain on dev and on test, and of each general task; examples of each domain
    for statistics and gates; steps of a training, of an example of each domain in turn."""

    name: str
    dev: int
    test: int
    general: int
    samples: int
    steps: int
    wider: int  # items of each general task, for the rows in WIDER


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("small", 4, 4, 4, 8, 2, 8),  # to see that all runs
        Budget("page", 6, 20, 12, 30, 20, 54),
        Budget("full", 48, 96, 278, 200, 120, 278),
    )
}

TIES = [{"density": d, "scale": s} for d in (0.2, 0.5) for s in (1.0, 1.5)]
DARE = [{"density": d, "scale": s} for d in (0.5, 0.9) for s in (0.5, 0.8)]


def tuned(name: str, method: str, changes: list[dict[str, Any]]) -> Row:
    """A baseline, whose knobs dev chooses among four."""
    return Row(name, {"method": method}, tuple(changes))


def seen(name: str, method: str, form: str = "full", samples: int = 0, **knobs: Any) -> Row:
    """A method that reads statistics of examples, as it comes; `samples`: of each domain, the budget's where 0."""
    return Row(name, {"method": method, **({"knobs": knobs} if knobs else {})}, form=form, samples=samples)


def graft(name: str, **knobs: Any) -> Row:
    """Graft by trained gates."""
    form: dict[str, Any] = {
        key: knobs.pop(key) for key in ("phi", "size", "sharpness", "raw", "samples") if key in knobs
    }
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
SCALES = [{"scale": s} for s in (0.5, 1.0, 1.5)]
REGMEAN, CORE = seen("RegMean", "regmean"), seen("core RegMean", "core_regmean")
LOOKING = (
    REGMEAN,
    CORE,
    seen("core RegMean, not balanced", "core_regmean", balance=0.0),
    seen("RegMean, sketch:64", "regmean", "sketch:64"),
    seen("RegMean, block:64", "regmean", "block:64"),
    seen("core RegMean, no probes", "core_regmean", probes=0),
    seen("core RegMean, no probes, not balanced", "core_regmean", probes=0, balance=0.0),
)
SIZES = (
    seen("core RegMean, 64 probes", "core_regmean", probes=64),
    seen("core RegMean, 8 samples", "core_regmean", samples=8),
    seen("RegMean, 8 samples", "regmean", samples=8),
)
FISHER = seen("Fisher", "fisher")
OTHERS = (
    tuned("TSV", "tsv", SCALES),
    tuned("Iso-C", "iso_c", SCALES),
    tuned("WUDI", "wudi", SCALES),
    Row("AdaMerging", {"method": "task_arithmetic"}, gates="adamerging"),
    seen("RegMean++", "regmean_plus"),
)
AS_THEY_COME = (
    Row("NaN", {"method": "task_arithmetic", "knobs": {"weight": {"from": "nan"}}}),
    Row("MetaGPT", {"method": "task_arithmetic", "knobs": {"weight": {"from": "metagpt"}}}),
    Row("KnOTS", {"method": "knots"}),
    Row("RobustMerge, products", {"method": "robustmerge", "knobs": {"of": "product"}}),
    Row("opt_merge", {"method": "opt_merge"}),
    Row("Iso-CTS", {"method": "iso_cts"}),
    Row("task arithmetic, SVC", {"method": "task_arithmetic", "finish": ["svc"]}),
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
SHARP = {"sharpness": 20}
PHI = (
    graft("graft, phi channelwise", phi="channelwise"),
    *(graft(f"graft, sharpness 20, phi {kind}", phi=kind, knobs=SHARP) for kind in ("channelwise", "mlp", "dense")),
)
FOLD = (Row("graft, fold", {"method": "graft"}, gates="fold"),)
SWEEPS = (
    graft("graft, bins 20", bins=20),
    graft("graft, c 600", c=600.0),
    graft("graft, a 0.6", a=0.6),
    graft("graft, 8 samples", samples=8),
)
SOLVED = OURS[:1] + OURS[2:3]  # convex and free
MAIN = PAPERS[:3] + PAPERS[7:]  # the global gate alone, the local ones, both, and with sharpness
FINAL = (*BASELINES, REGMEAN, CORE, *SOLVED)

WIDER = ("base", "core RegMean", "task arithmetic")
WRITING = ("base", "average", "task arithmetic", "TIES", "DARE", "RegMean", "core RegMean")

SCENARIOS = (
    Scenario(
        "four",
        (MATH, CODE, MEDICINE, LANGUAGES),
        rows=(*BASELINES, *LOOKING, FISHER, *OURS, *OTHERS[:3], *MAIN, *SIZES, *OTHERS[3:], *AS_THEY_COME, *FOLD),
        written=("math_familiar", "languages_exact"),
    ),
    Scenario("full math-medicine", (MATH, MEDICINE), ".cache/orchard/{}-full", FINAL),
    Scenario("math-languages", (MATH, LANGUAGES), rows=(*FINAL, *PAPERS, *PHI, *SWEEPS)),
    Scenario("math-code", (MATH, CODE), rows=FINAL),
    Scenario("code-medicine", (CODE, MEDICINE), rows=FINAL),
)
