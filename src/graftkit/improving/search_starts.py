"""What a search may begin with: weights by a rule without tuning, or of gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.checkpoints.gates import Gates, is_gates, open_gates
from graftkit.errors import RecipeError
from graftkit.execution.live import Live
from graftkit.improving.search_space import Axis, Space, Value
from graftkit.recipes.gates import content
from graftkit.recipes.recipe import load

RULES = ("nan", "metagpt")


def first(given: str, live: Live, space: Space) -> tuple[Value, ...]:
    """The weights of a rule, or the means of a file's gates; on every other axis the middle.

    Raises RecipeError for what is neither, and for gates that are no weights or of other models.
    """
    if given in RULES:
        weights = _by_rule(given, live, space)
    elif is_gates(given):
        weights = _by_gates(Path(given), live)
    else:
        raise RecipeError(f"--start: got {given!r}, expected {' | '.join(RULES)} | a file of gates")
    return tuple(_value(axis, weights) for axis in space.axes)


def _value(axis: Axis, weights: Sequence[float]) -> Value:
    if axis.knob != "weight" or axis.values:
        return axis.at(0.5)
    own = [weights[k] for k in axis.models] or list(weights)
    return axis.at(axis.place(sum(own) / len(own)))


def _by_rule(rule: str, live: Live, space: Space) -> list[float]:
    data = space.recipe.to_dict()
    data["models"] = [{k: v for k, v in model.items() if k != "weight"} for model in data["models"]]
    data["knobs"] = {**data.get("knobs", {}), "weight": {"from": rule, "scope": "model"}}
    planned = live.apply(load(data).model_copy(update={"directory": space.recipe.directory}))
    found: Any = next(step.knobs["weight"] for step in planned.steps if "weight" in step.knobs)
    return list(found)


def _by_gates(file: Path, live: Live) -> list[float]:
    gates = open_gates(file)
    try:
        if gates.kind == "local":
            raise RecipeError(
                f"--start: {file} holds gates of kind local, which are no weights; take those of kind weight or "
                "coefficient, as `graft gates solve` makes them"
            )
        _check(gates, live)
        values = [gates.values(name) for name in gates.tensors]
    finally:
        gates.close()
    return [float(mean) for mean in np.concatenate([v.reshape(len(v), -1) for v in values], axis=1).mean(axis=1)]


def _check(gates: Gates, live: Live) -> None:
    """Refuses gates of other models, or of these in another order."""
    here = [found for found in map(content, live.plan.sources) if found in gates.models]
    if here != list(gates.models) or len(here) != len(live.plan.recipe.models):
        raise RecipeError(
            f"--start: {gates.file} was made for other models than the recipe's {len(live.plan.recipe.models)}, or for "
            "these in another order; make it anew"
        )
