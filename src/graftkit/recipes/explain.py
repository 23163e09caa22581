"""A plan in words and numbers, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from graftkit.recipes import layout
from graftkit.recipes.plan import Plan, Step


def summary(plan: Plan, *, tensors: bool = False) -> dict[str, Any]:
    """What a plan does: output, inputs, groups of tensors that are treated alike, work; every tensor if asked."""
    told: dict[str, Any] = {
        "hash": plan.hash,
        "output": {
            "like": plan.sources[plan.like].name,
            "parameters": sum(step.elements for step in plan.steps),
            "dtypes": list(dict.fromkeys(step.dtype for step in plan.steps)),
            "bytes": plan.bytes_written,
            "files": len(plan.shards),
        },
        "inputs": [
            {
                "role": n.role,
                "kind": n.kind,
                "source": n.name,
                "directory": str(n.source.directory),
                "fingerprint": n.fingerprint,
            }
            for n in plan.sources
        ],
        "stages": list(plan.stages),
        "bytes_read": plan.bytes_read,
        "worker_bytes": plan.worker_bytes(),
        "groups": [_group(steps) for steps in _alike(plan.steps)],
        "notes": list(plan.notes),
    }
    if tensors:
        told["tensors"] = [_tensor(plan, step) for step in plan.steps]
    return told


def _alike(steps: Sequence[Step]) -> list[list[Step]]:
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(json.dumps([step.method, step.knobs], sort_keys=True), []).append(step)
    return list(groups.values())


def _group(steps: list[Step]) -> dict[str, Any]:
    return {
        "method": steps[0].method,
        "knobs": dict(steps[0].knobs),
        "tensors": len(steps),
        "parameters": sum(step.elements for step in steps),
        "where": where(steps),
    }


def where(steps: Sequence[Step]) -> str:
    """The roles and layers of some tensors: `attention, mlp; layers 0-11`."""
    roles = list(dict.fromkeys(layout.role(step.name) for step in steps))
    numbers = sorted({n for step in steps if (n := layout.layer(step.name)) is not None})
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    told = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
    return ", ".join(roles) + (f"; layers {told}" if told else "")


def _tensor(plan: Plan, step: Step) -> dict[str, Any]:
    parts = [part for part in (step.base, *step.models) if part]
    return {
        "name": step.name,
        "shape": list(step.shape),
        "dtype": step.dtype,
        "method": step.method,
        "knobs": dict(step.knobs),
        "from": [f"{plan.sources[p.source].name}:{p.name or 'as the base'}" for p in parts],
    }
