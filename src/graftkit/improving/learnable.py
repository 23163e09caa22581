"""What there is to learn of a recipe: deltas, signals and distances of its matrices, and where their gates start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.errors import PlanError
from graftkit.execution.blocks import Reader, Workspace
from graftkit.execution.signals import measured
from graftkit.improving.gated import Gated, deltas_of
from graftkit.improving.phi import Gating, Kind, Matrix, Phi, distances, heads_of, standardised
from graftkit.measuring.responses import Delta
from graftkit.recipes.plan import plan
from graftkit.recipes.steps import Step


@dataclass(frozen=True)
class Form:
    """What is learnt: which phi (None: `affine` for graft, `direct` for the others), on which grid, from which start.

    `size`: of blocks, 0 for channels; `raw`: d is not standardised; `start`: a file of gates; `sharpness`: learn that
    knob too; `weights`: the adapters' factors learn along, which is no longer merging; `prior`: the coefficients that
    graft_free starts from without a file.
    """

    phi: Kind | None = None
    size: int = 0
    raw: bool = False
    start: Path | None = None
    sharpness: bool = False
    weights: bool = False
    prior: float = 1.0


@dataclass
class Learnable:
    """A recipe's matrices with what is learnt of them; `size`: of blocks, 0 for channels."""

    asked: Gated
    deltas: dict[str, list[Delta]]
    gating: Gating
    size: int


def learnable(asked: Gated, form: Form, device: str, seed: int = 0) -> Learnable:
    """Deltas, signals, distances and starts of a recipe's matrices. Raises PlanError for what cannot be learnt."""
    kind = "coefficient" if asked.free else "local" if any(s.method == "graft" for s in asked.steps) else "weight"
    chosen: Kind = form.phi or ("affine" if kind == "local" else "direct")
    if chosen == "dense" and form.size:
        raise PlanError("phi dense maps channels to channels; for blocks choose affine, channelwise, mlp or direct")
    if form.weights and (form.size or not all(isinstance(named.source, Adapter) for named in asked.models)):
        raise PlanError(
            "gates+weights lets factors of adapters learn along, gated by channels; these models are others"
        )
    starts = _starts(asked, form)
    deltas, features, matrices = {}, {}, {}
    for step in asked.steps:
        own = deltas[step.key] = deltas_of(asked, step, device)
        grid = (len(own), *_grid(step.shape, form.size))
        heads = heads_of(kind, len(own))
        if chosen == "direct":
            features[step.key] = torch.zeros((heads, *grid[1:]), device=device)
        else:
            found = distances(own, (step.shape[0], step.elements // step.shape[0]), form.size)
            features[step.key] = (found if form.raw else standardised(found))[:heads]
        start = starts[step.key] if starts else np.full(grid, form.prior if asked.free else 1 / len(own))
        matrices[step.key] = Matrix(
            step.method, step.knobs, _signals(asked, step).to(device), torch.from_numpy(start).float().to(device)
        )
    _check_differ(asked, deltas)
    sharpness = _sharpness(asked) if form.sharpness else None
    gating = Gating(Phi(chosen, features, seed), matrices, kind, sharpness)
    return Learnable(asked, deltas, gating.to(device), form.size)


def _check_differ(asked: Gated, deltas: Mapping[str, Sequence[Delta]]) -> None:
    """Refuses models of which any mixture is the same."""
    nothing = all(delta.right is None for own in deltas.values() for delta in own)
    one = not asked.free and len({named.source.directory.resolve() for named in asked.models}) == 1
    if nothing or one:
        raise PlanError("recipe.models: they do not differ in any matrix, so nothing can be learnt; name other models")


def _grid(shape: Sequence[int], size: int) -> tuple[int, ...]:
    if not size:
        return (shape[0],)
    across = int(np.prod(shape[1:]))
    return -(-shape[0] // size), -(-across // size)


def _starts(asked: Gated, form: Form) -> dict[str, np.ndarray]:
    """The values of the file that a training starts from, which must be one that the recipe could merge by."""
    if form.start is None:
        return {}
    try:
        held = plan(asked.plan.recipe.model_copy(update={"gates": str(form.start.resolve())})).gates
    except PlanError as error:
        raise PlanError(f"--start: {str(error).removeprefix('recipe.gates: ')}") from error
    assert held is not None
    if (held.granularity, held.size) != granularity_of(form.size):
        grid = " of ".join(map(str, granularity_of(form.size)))
        raise PlanError(f"{form.start}: holds gates by {held.granularity} of {held.size}; {grid} is to be learnt")
    return {step.key: held.values(step.key) for step in asked.steps}


def granularity_of(size: int) -> tuple[str, int]:
    """What a file of gates calls blocks of a size, 0 for channels."""
    return ("channel", 1) if not size else ("element", 1) if size == 1 else ("block", size)


def _signals(asked: Gated, step: Step) -> Tensor:
    """What the merge will see of the matrix: `signals` of each model, zeros where the method reads none."""
    method = methods.get(step.method)
    found, _ = measured(method, step.knobs, Reader(step, asked.plan.sources, Workspace()))
    return torch.from_numpy(np.asarray(found.get("signals", np.zeros(len(step.models)))))


def _sharpness(asked: Gated) -> float:
    found = {step.knobs.get("sharpness") for step in asked.steps if step.method == "graft"}
    if len(found) != 1 or 0 in found:
        raise PlanError("one sharpness above 0 is learnt for all matrices; the recipe has none, or several")
    return float(found.pop())  # type: ignore[arg-type]
