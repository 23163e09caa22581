"""Sums of adapters with weights by channel, as an adapter: `sum_t diag(w_t) B_t A_t` is the factors side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.execution import gating
from graftkit.execution.blocks import Reader, Workspace, non_finite, open_feed
from graftkit.execution.factoring import Factored, Wanted, balanced, core_of, norm_of
from graftkit.execution.signals import measured
from graftkit.methods.signals import signals_of
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step


def beside(plan: Plan, step: Step, space: Workspace, wanted: Wanted) -> tuple[Factored, dict[str, Any]]:
    """The merged delta as factors, exact at the sum of the ranks, and what the record says of it."""
    reader = Reader(step, plan.sources, space)
    method = methods.get(step.method)
    given, notes = measured(method, step.knobs, reader)
    weights = _by_channel(gating.whole(method, step, plan.gates), step, given)
    here = [k for k, part in enumerate(step.models) if part.kind != "base"]
    pairs = [open_feed(step.models[k], plan.sources, np.float64).delta_factors() for k in here]
    left = np.concatenate([weights[k][:, None] * pair.left for k, pair in zip(here, pairs, strict=True)], axis=1)
    right = np.concatenate([pair.right for pair in pairs])
    notes |= gating.evidence(step, plan.gates, given)
    if wanted == Wanted() and left.shape[1] <= min(step.shape):
        return balanced(left, right), notes
    core = core_of([(left, right)])
    return core.factored(core.cores[0], wanted), notes


def _by_channel(gates: np.ndarray, step: Step, given: dict[str, Any]) -> np.ndarray:
    """The weight of each model's delta in each channel, [models, out]."""
    found = methods.get(step.method).shares_of({**given, "gates": gates}, step.knobs)[..., 0]
    return np.broadcast_to(found, (len(step.models), step.shape[0]))


def apart(plan: Plan, step: Step) -> Factored:
    """Graft on the factors, each with the root of its adapter's scale: B by the gates, A by its entropies alone."""
    import torch

    method, made = methods.get(step.method), {}
    halves: dict[str, list[np.ndarray]] = {"left": [], "right": []}
    for part in step.models:
        source = plan.sources[part.source].source
        assert isinstance(source, Adapter)
        factors, raw = source.factors[part.name], source.load(part.name, np.float64, scaled=False)
        if not (np.isfinite(raw.left).all() and np.isfinite(raw.right).all()):
            raise non_finite(plan.sources[part.source].label, factors.b)
        if factors.scale < 0:
            raise ValueError("an adapter with a negative scale has no root to share out between its factors")
        for half in halves:
            halves[half].append(np.sqrt(factors.scale) * getattr(raw, half))
    for half, own in halves.items():
        stack = np.stack(own)
        gates = gating.whole(method, step, plan.gates if half == "left" else None)
        given = {"signals": signals_of(torch.from_numpy(stack), step.knobs).numpy(), "gates": gates}
        weights = method.shares_of(given, step.knobs)
        made[half] = stack[0] + (weights[1:] * (stack[1:] - stack[0])).sum(axis=0)
    left, right = made["left"], made["right"]
    return Factored(left, right, norm_of(left.T @ left, right @ right.T), 0.0)
