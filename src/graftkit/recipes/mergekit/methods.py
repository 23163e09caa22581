"""mergekit's methods (0.1.5) and their parameters, each beside the method and the knob of ours that means the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
"""In place of a default: mergekit asks for a value."""


@dataclass(frozen=True)
class Parameter:
    """One parameter. `each`: one value for each model (`all`, the base too; `tuned`), or one in all (`shared`).

    `knob` is ours, "" for what changes nothing here or chooses the method; `becomes` says what its values turn into.
    """

    name: str
    kind: Literal["number", "integer", "switch"]
    default: Any
    knob: str = ""
    each: Literal["shared", "all", "tuned"] = "shared"
    becomes: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Theirs:
    """One method of mergekit's. `base`: it works on deltas from it (`required`, `optional`), takes it as the first of
    two models (`first`), or as any other model (`model`). `fixed`: knobs that make ours do as theirs. `count`: how many
    models beside the base, for one that is `model` or `first` the base included. `variants`: other methods of ours, by
    the values of its switches that are no knob of ours."""

    ours: str
    base: Literal["required", "optional", "first", "model"]
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    count: tuple[int, int | None] = (1, None)
    notes: tuple[str, ...] = ()
    variants: Mapping[tuple[bool, ...], str] = field(default_factory=dict)

    @property
    def switches(self) -> tuple[Parameter, ...]:
        """The parameters that choose a variant."""
        return tuple(p for p in self.parameters if self.variants and p.kind == "switch" and not p.knob)

    def parameter(self, name: str) -> Parameter | None:
        """A parameter by its name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


_MASK = Parameter("int8_mask", "switch", False)
_LAMBDA = Parameter("lambda", "number", 1.0, "scale")
_MEAN = {True: "mean", False: "sum"}

_ELECTION = "mergekit's weights count in the election of signs; without `weighted_election` every model has one vote"
_L1 = "mergekit rescales a tensor by one ratio of L1 norms; `rescale_by: chance` is the papers', and unbiased"


def _weight(each: Literal["all", "tuned"] = "tuned") -> Parameter:
    return Parameter("weight", "number", REQUIRED, "weight", each)


def _sparse(ours: str, *more: Parameter, normalize: bool, rescale: bool, elect: bool | None, **fixed: Any) -> Theirs:
    """A method of mergekit's generalised task arithmetic. `elect`: TIES' vote or not; None where it always votes."""
    votes = elect is not False
    combine = Parameter(
        "normalize", "switch", normalize, "combine" if votes else "normalize", becomes=_MEAN if votes else {}
    )
    knobs = dict(fixed) if elect is None else {"elect": "sign" if elect else "none", **fixed}
    if votes:
        knobs["weighted_election"] = True
    notes = (*((_ELECTION,) if votes else ()), *((_L1,) if "rescale_by" in fixed else ()))
    shared = (combine, Parameter("rescale", "switch", rescale, "rescale"), _LAMBDA, _MASK)
    return Theirs(
        ours, "required", (_weight(), Parameter("density", "number", 1.0, "density", "tuned"), *more, *shared), knobs,
        notes=notes,
    )  # fmt: skip


_GAMMA = Parameter("gamma", "number", 0.01, "outliers", "tuned")
_EPSILON = Parameter("epsilon", "number", 0.15, "epsilon", "tuned")
_RAM = Parameter("epsilon", "number", 1e-5, "epsilon")

METHODS: Mapping[str, Theirs] = {
    "linear": Theirs("average", "model", (_weight("all"), Parameter("normalize", "switch", True, "normalize"))),
    "slerp": Theirs("slerp", "first", (Parameter("t", "number", REQUIRED, "t"),), count=(2, 2)),
    "nuslerp": Theirs(
        "nuslerp", "optional",
        (_weight(), Parameter("nuslerp_flatten", "switch", True), Parameter("nuslerp_row_wise", "switch", False)),
        count=(2, 2), variants={(False, False): "nuslerp_rows", (False, True): "nuslerp_columns"},
    ),
    "multislerp": Theirs(
        "multislerp", "optional",
        (_weight(), Parameter("normalize_weights", "switch", True, "normalize"), Parameter("eps", "number", 1e-8)),
    ),
    "karcher": Theirs(
        "karcher", "model",
        (Parameter("max_iter", "integer", 10, "iterations"), Parameter("tol", "number", 1e-5, "tolerance")),
        notes=("mergekit's karcher stops after 10 steps; without `iterations` and `tolerance` it goes on to the mean",),
    ),
    "task_arithmetic": Theirs(
        "task_arithmetic", "required",
        (
            _weight(), Parameter("normalize", "switch", False, "normalize"), _LAMBDA, _MASK,
            Parameter("density", "number", 1.0, each="tuned"), Parameter("rescale", "switch", False),
        ),
    ),
    "ties": _sparse("ties", normalize=True, rescale=False, elect=None),
    "dare_ties": _sparse("dare", normalize=False, rescale=True, elect=True, rescale_by="l1"),
    "dare_linear": _sparse("dare", normalize=False, rescale=True, elect=False, rescale_by="l1"),
    "breadcrumbs": _sparse("breadcrumbs", _GAMMA, normalize=False, rescale=False, elect=False),
    "breadcrumbs_ties": _sparse("breadcrumbs", _GAMMA, normalize=False, rescale=False, elect=True),
    "della": _sparse("della", _EPSILON, normalize=True, rescale=True, elect=True, rescale_by="l1"),
    "della_linear": _sparse("della", _EPSILON, normalize=False, rescale=True, elect=False, rescale_by="l1"),
    "sce": Theirs(
        "sce", "required", (Parameter("select_topk", "number", 1.0, "select_topk"), _MASK), {"floor": 1e-6},
        notes=("mergekit's sce takes equal weights where the deltas' mean squares sum to less than 1e-6, as those of "
               "most fine-tuning do; without `floor` the energies decide everywhere",),
    ),
    "model_stock": Theirs(
        "model_stock", "required", (Parameter("filter_wise", "switch", False),), {"extrapolate": True}, (2, None),
        ("mergekit's model_stock steps past the base where the models point apart; without `extrapolate` it stays",),
        {(True,): "model_stock_rows"},
    ),
    "nearswap": Theirs("nearswap", "required", (Parameter("t", "number", REQUIRED, "t"),), count=(1, 1)),
    "arcee_fusion": Theirs("arcee_fusion", "required", (), count=(1, 1)),
    "ram": Theirs("ram", "required", (_RAM,)),
    "ramplus_tl": Theirs(
        "ram", "required", (Parameter("r", "number", 0.1, "r"), Parameter("alpha", "number", 0.2, "alpha"), _RAM)
    ),
    "passthrough": Theirs("passthrough", "model", (Parameter("scale", "number", None, "scale", "all"),), count=(1, 1)),
}  # fmt: skip

ELSEWHERE = frozenset(parameter.name for theirs in METHODS.values() for parameter in theirs.parameters)
"""Every parameter that some method has: mergekit passes over it where a method has it not."""

FORMER = frozenset({"embed_slerp"})
"""Parameters of earlier versions, which 0.1.5 passes over."""
