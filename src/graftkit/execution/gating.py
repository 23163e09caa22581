"""What the file of gates holds for a step, as blocks of its rows; and what became of it, for the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints.gates import Gates
from graftkit.execution.blocks import ByRows
from graftkit.methods import Method
from graftkit.methods.graft import global_gate
from graftkit.recipes.gates import reads_gates
from graftkit.recipes.steps import Step

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
MOST = 1 << 16  # values that quantiles are taken of; least and largest are of all


def read(method: Method, step: Step, gates: Gates | None) -> dict[str, Any]:
    """The input `gates` of a method that has it: the stored ones, or equal ones where it wants none."""
    if "gates" not in method.reads:
        return {}
    if gates is None or not reads_gates(step):
        return {"gates": equal(step)}
    columns = step.elements // max(step.shape[0], 1)
    return {"gates": ByRows(lambda first, last: gates.rows(step.key, columns, first, last), max(columns, 1))}


def equal(step: Step) -> np.ndarray:
    """Gates that prefer no model, [models, 1, 1]."""
    return np.full((len(step.models), 1, 1), 1 / len(step.models))


def whole(method: Method, step: Step, gates: Gates | None) -> np.ndarray:
    """All gates of a step on their own grid, [models, out, 1] or [models, out/size, in/size]; equal ones for none."""
    if gates is None or not reads_gates(step):
        return equal(step)
    found = gates.values(step.key)
    return found if found.ndim > 2 else found[..., None]


def evidence(step: Step, gates: Gates | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a method of gates made of a matrix: the weights that it gave each model, by quantiles, and w_global.

    Nothing for any other method, nor where neither gates nor signals decide.
    """
    method = methods.get(step.method)
    decided = reads_gates(step) or step.knobs.get("global_signal", "none") != "none"
    if method.shares is None or len(step.shape) < 2 or not decided:
        return {}
    signals = np.asarray(given.get("signals", np.zeros(len(step.models))))
    weights = method.shares_of({"signals": signals, "gates": whole(method, step, gates)}, step.knobs)
    flat = weights.reshape(len(weights), -1)
    quantiles = np.quantile(flat[:, :: max(1, flat.shape[1] // MOST)], QUANTILES, axis=1).T
    quantiles[:, 0], quantiles[:, -1] = flat.min(axis=1), flat.max(axis=1)
    told: dict[str, Any] = {"weights": quantiles.round(6).tolist(), "mean_weights": flat.mean(axis=1).round(6).tolist()}
    if "signals" in method.reads:
        knobs = {name: step.knobs[name] for name in ("a", "c", "normaliser")}
        told["w_global"] = global_gate(signals, **knobs).round(6).tolist()
    return told
