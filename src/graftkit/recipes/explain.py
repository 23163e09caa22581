"""A plan in words and numbers, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from graftkit.recipes import gates, layout, mapping, statistics, vocabulary
from graftkit.recipes.coefficients import told
from graftkit.recipes.plan import Plan
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Step


def as_yaml(recipe: Recipe) -> str:
    """A recipe as YAML that makes the same plan; notes are comments too, and short lists stand on one line."""
    return yaml.dump(recipe.to_dict(), Dumper=_Short, sort_keys=False, allow_unicode=True, width=100)


class _Short(yaml.SafeDumper):
    """YAML in which a list or a mapping of plain values stands on one line, as people write it."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        """As the parent's; on one line where no text in it is a sentence."""
        values = list(sequence)
        return super().represent_sequence(tag, values, flow_style=flow_style or all(map(_plain, values)))

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        """As the parent's; on one line where all of it is plain, but for the recipe itself."""
        short = all(map(_small, mapping.values())) and "method" not in mapping
        return super().represent_mapping(tag, mapping, flow_style=flow_style or short)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 40)


def _small(value: Any) -> bool:
    return _plain(value) or (isinstance(value, list) and len(value) <= 8 and all(map(_plain, value)))


def summary(plan: Plan, *, tensors: bool = False) -> dict[str, Any]:
    """What a plan does: output, inputs, groups of tensors that are treated alike, work; every tensor if asked."""
    told: dict[str, Any] = {
        "hash": plan.hash,
        "output": {
            "like": plan.sources[plan.like].name,
            "as": plan.recipe.output.as_,
            "parameters": sum(step.written for step in plan.steps),
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
    if plan.gates:
        told["gates"] = gates.told(plan.gates)
    if plan.statistics:
        told["statistics"] = statistics.told(plan.statistics)
    if plan.backbone:
        told |= {"recipe": plan.recipe.to_dict(), "backbone": mapping.told(plan.backbone)}
    if plan.vocabulary and plan.rows:
        told["vocabulary"] = vocabulary.told(plan.vocabulary, plan.rows, plan.sources)
    if tensors:
        told["tensors"] = [_tensor(plan, step) for step in plan.steps]
    return told


def _alike(steps: Sequence[Step]) -> list[list[Step]]:
    groups: dict[str, list[Step]] = {}
    for step in steps:
        key = [step.method, told(step.knobs), _around(step), _form(step)]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(step)
    return list(groups.values())


def _around(step: Step) -> dict[str, Any]:
    """Preparations and finishers, where there are any."""
    parts = {"prepare": step.prepare, "finish": step.finish}
    return {
        key: [{"name": a.name, "knobs": dict(a.knobs)} for a in applied] for key, applied in parts.items() if applied
    }


def _form(step: Step) -> dict[str, Any]:
    """For a delta that leaves as factors: by which path."""
    return {"factors": step.form.path} if step.form else {}


def _group(steps: list[Step]) -> dict[str, Any]:
    return {
        "method": steps[0].method,
        "knobs": told(steps[0].knobs),
        **_around(steps[0]),
        **_form(steps[0]),
        "tensors": len({step.name for step in steps}),
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
        **({"part": step.part} if step.part else {}),
        "shape": list(step.shape),
        "dtype": step.dtype,
        "method": step.method,
        "knobs": told(step.knobs),
        **_around(step),
        "from": [f"{plan.sources[p.source].name}:{p.name or 'as the base'}" for p in parts],
    }
