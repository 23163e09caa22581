"""Adapters on a model that ties its head to its input embedding: the merged checkpoint unties them where they part.

PEFT gives an adapter of the embedding, or of the head, to one of the two only: while it runs, they are no longer equal.
A checkpoint that kept the tie would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.recipes import layout
from graftkit.recipes.inputs import Named

HEAD = "lm_head.weight"
_POSITIONS = re.compile(r"(wpe|positions)\.weight$")


def tied_embedding(source: Checkpoint) -> str:
    """The input embedding that is also the head, by name; empty where the head has weights of its own."""
    if not says_tied(source.config) or any(layout.role(name) == "head" for name in source.tensors):
        return ""
    names = [name for name in source.tensors if layout.role(name) == "embedding" and not _POSITIONS.search(name)]
    return names[0] if len(names) == 1 else ""


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the input embedding."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def untied(
    like: Checkpoint, models: tuple[Named, ...]
) -> tuple[Mapping[str, TensorInfo], Mapping[str, Any] | None, tuple[str, ...]]:
    """The tensors of the output, its config where that changes, and a note: with a head where adapters part the two."""
    embedding = tied_embedding(like)
    parting = [named.label for named in models if embedding and _parts(named, embedding)]
    if not parting:
        return like.tensors, None, ()
    told = (
        f"{', '.join(parting)}: changes only one of the embedding and the head, which are tied in the base; the output "
        "is untied, its config too"
    )
    head = replace(like.tensors[embedding], name=HEAD)
    return {**like.tensors, HEAD: head}, _untied_config(like.config), (told,)


def _parts(named: Named, embedding: str) -> bool:
    """Whether a model is an adapter that changes the embedding or the head, and not both alike."""
    source = named.source
    if not isinstance(source, Adapter):
        return False
    held = [*source.factors, *source.tensors]
    ours = [n for n in held if layout.role(n) == "head" or embedding.endswith(n) or n.endswith(embedding)]
    return bool(ours) and not (source.config.get("ensure_weight_tying") and len(ours) > 1)


def _untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**config, "tie_word_embeddings": False}
    for key, part in config.items():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            changed[key] = {**part, "tie_word_embeddings": False}
    return changed
