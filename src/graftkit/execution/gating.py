"""What the file of gates holds for a step, as blocks of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftkit.checkpoints.gates import Gates
from graftkit.execution.blocks import ByRows
from graftkit.methods import Method
from graftkit.recipes.gates import reads_gates
from graftkit.recipes.steps import Step


def read(method: Method, step: Step, gates: Gates | None) -> dict[str, Any]:
    """The input `gates` of a method that has it: the stored ones, or equal ones where it wants none."""
    if "gates" not in method.reads:
        return {}
    if gates is None or not reads_gates(step):
        return {"gates": np.full((len(step.models), 1, 1), 1 / len(step.models))}
    columns = step.elements // max(step.shape[0], 1)
    return {"gates": ByRows(lambda first, last: gates.rows(step.key, columns, first, last), max(columns, 1))}
