"""What of a VLM is merged with text models, what is kept, and what of the text models has no place: for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.recipes import layout
from graftkit.recipes.ancestry import LEAST, Kinship
from graftkit.recipes.backbones import Backbone

WRAPPERS = ("model", "language_model")
"""Parts of names that say nothing of what a tensor is for."""


def told(backbone: Backbone) -> dict[str, Any]:
    """The mapping by group: mapped, kept, and per model its stack, its layers' places and what is not used of it."""
    held = backbone.sources[backbone.like].source.tensors
    stack = backbone.alignments[backbone.reference].stacks[1]
    kept = {name: info for name, info in held.items() if name not in backbone.merged}
    rows = {name: held[name].shape[0] - count for name, count in backbone.rows.items()}
    return {
        "like": backbone.sources[backbone.like].name,
        "stack": stack,
        "mapped": _groups({name: held[name] for name in held if name in backbone.merged}, layout.role),
        "kept": _groups(kept, lambda name: group(name, stack)),
        "rows": [{"name": name, "shared": count, "kept": rows[name]} for name, count in backbone.rows.items()],
        "models": [_model(backbone, k) for k in range(len(backbone.sources)) if k != backbone.like],
        "ancestry": [_kin(backbone, one) for one in backbone.kin],
    }


def group(name: str, stack: str) -> str:
    """What a tensor of a VLM belongs to: the tower or projector by its name, or its place in the language model."""
    if name.startswith(stack) and stack:
        parts = name.removeprefix(stack).split(".")[1:]
        return f"{parts[0]} in the language layers"
    if layout.has_rows(name) and not layout.ENCODERS.search(name):
        return layout.role(name)
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return parts[0] if parts else name


def _groups(held: Mapping[str, TensorInfo], of: Any) -> list[dict[str, Any]]:
    found: dict[str, list[TensorInfo]] = {}
    for name, info in held.items():
        found.setdefault(of(name), []).append(info)
    return [
        {"group": called, "tensors": len(infos), "parameters": sum(info.elements for info in infos)}
        for called, infos in found.items()
    ]


def _model(backbone: Backbone, k: int) -> dict[str, Any]:
    named, alignment = backbone.sources[k], backbone.alignments[k]
    adapter = isinstance(named.source, Adapter)
    pieces = [parts for name, parts in alignment.pieces.items() if name in backbone.merged]
    apart = sum(len(parts) > 1 or parts[0].rows is not None for parts in pieces)
    return {
        "source": named.name,
        "role": named.role,
        "kind": named.kind,
        "stack": alignment.stacks[0],
        "layers": [] if adapter else [list(pair) for pair in alignment.layers],
        "fused": 0 if adapter else apart,
        "unused": _named(backbone.left.get(k, ())),
    }


def _named(names: Iterable[str]) -> list[dict[str, Any]]:
    """Tensors that are not used, by what they belong to; alone in its group one is told by its own name."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(group(name, ""), []).append(name)
    return [{"group": c if len(held) > 1 else held[0], "tensors": len(held)} for c, held in found.items()]


def _kin(backbone: Backbone, one: Kinship) -> dict[str, Any]:
    return {
        "source": backbone.sources[one.source].name,
        "of": backbone.sources[one.other].name,
        "cosine": round(one.cosine, 4),
        "lowest": round(min(one.cosines, default=1.0), 4),
        "distance": round(one.distance, 4),
        "matrices": len(one.cosines),
        "values": one.values,
        "least": LEAST,
    }


def shifts(layers: Sequence[Sequence[int]]) -> str:
    """Pairs of layers as spans: `0-2 -> 0-2, 3-6 -> 4-7`; empty where every layer keeps its number."""
    if all(own == other for own, other in layers):
        return ""
    spans: list[list[int]] = []
    for own, other in layers:
        if spans and own == spans[-1][1] + 1 and other == spans[-1][3] + 1:
            spans[-1][1], spans[-1][3] = own, other
        else:
            spans.append([own, own, other, other])
    return ", ".join(f"{_span(a, b)} -> {_span(c, d)}" for a, b, c, d in spans)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
