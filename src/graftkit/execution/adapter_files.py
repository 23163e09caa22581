"""An adapter's two files, put together from its finished steps: PEFT's names and PEFT's configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftkit.checkpoints.adapter_sink import AdapterSink
from graftkit.checkpoints.adapters import WRAPPER, Adapter
from graftkit.checkpoints.sources import Checkpoint
from graftkit.recipes import ties
from graftkit.recipes.adapters import called, task_type
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step


def assemble(plan: Plan, sink: AdapterSink) -> None:
    """Writes the adapter's weights and configuration from the finished steps."""
    ranks = {s.form.module: sink.done[s.name]["rank"] for s in plan.steps if s.form and sink.done[s.name]["rank"]}
    whole = _whole(plan, sink)
    tied = _tied_embedding(plan, whole)
    names = {step.name: called(step, plan.sources, plan.sources[plan.like].source) for step in whole}
    biases = [name for name in names if name.endswith(".bias") and name.removesuffix("bias") + "weight" not in names]
    saved = dict.fromkeys(own.rpartition(".")[0] for name, own in names.items() if name not in biases)
    beside = [name for name in biases if names[name].rpartition(".")[0] in ranks]
    names |= {name: names[name].replace(".bias", ".base_layer.bias") for name in beside}
    pieces = [piece for step in plan.steps if step.form for piece in sink.pieces[step.name]]
    pieces += [replace(sink.pieces[name][0], name=WRAPPER + called) for name, called in names.items()]
    if tied:
        saved["lm_head"] = None
        pieces.append(replace(sink.pieces[tied][0], name=f"{WRAPPER}lm_head.weight"))
    sink.assemble(pieces, _config(plan, ranks, list(saved), bool(biases), bool(tied)))


def _whole(plan: Plan, sink: AdapterSink) -> list[Step]:
    """The steps of tensors that the adapter holds whole: of modules in which any of them changes."""
    steps = [step for step in plan.steps if not step.form]
    changed = {s.name.rpartition(".")[0] for s in steps if s.base is None or sink.done[s.name]["changed"]}
    return [step for step in steps if step.name.rpartition(".")[0] in changed]


def _tied_embedding(plan: Plan, whole: Sequence[Step]) -> str:
    """The embedding that is held whole and stays tied to the head: PEFT needs it under both names."""
    base = plan.sources[plan.like].source
    assert isinstance(base, Checkpoint)
    embedding = ties.tied_embedding(base)
    parted = embedding and ties.untied(base, plan.sources)[2]
    return embedding if not parted and any(step.name == embedding for step in whole) else ""


def _config(plan: Plan, ranks: Mapping[str, int], saved: list[str], biases: bool, tied: bool) -> dict[str, Any]:
    """PEFT's configuration: a scale of 1 everywhere, since the factors carry theirs."""
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    other = {module: rank for module, rank in ranks.items() if rank != common}
    kinds = {step.form.kind for step in plan.steps if step.form and step.form.module in ranks}
    named = plan.sources[plan.like]
    recorded = [s.source.base_name for s in plan.sources if isinstance(s.source, Adapter) and s.source.base_name]
    config = {
        "peft_type": "LORA",
        "task_type": task_type(plan.sources, plan.like),
        "base_model_name_or_path": recorded[0] if recorded else named.name,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": _targets(plan, ranks),
        "modules_to_save": saved or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": "transposed" in kinds,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return config | ({"ensure_weight_tying": True} if tied else {})


def _targets(plan: Plan, ranks: Mapping[str, int]) -> list[str]:
    """The adapted modules: by their last names where that means the same modules of the base, else in full."""
    base = plan.sources[plan.like].source
    held = {n.removesuffix(".weight") for n, info in base.tensors.items() if n.endswith(".weight")}
    short = {module.rpartition(".")[2] for module in ranks}
    same = base.kind != "absent" and {m for m in held if m.rpartition(".")[2] in short} == set(ranks)
    return sorted(short) if same else list(ranks)
