"""Projections that one model keeps in one tensor and another apart, and how families spell the tensors of a layer.

    qkv_proj        the rows of q_proj, then k_proj, then v_proj                      (Phi-3 and others)
    gate_up_proj    the rows of gate_proj, then up_proj                               (Phi-3 and others)
    wqkv            for each key-value head its queries' rows, its key's, its value's (InternLM2)

Any other fusion, such as GPT-NeoX's `query_key_value`, whose rows lie in an order of its own, is not taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.rows import Rows

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
         "wqkv": ("q_proj", "k_proj", "v_proj")}  # fmt: skip
"""Fused projections and their parts."""

SPELLED = (
    (re.compile(r"^attention\.wo\."), "self_attn.o_proj."),
    (re.compile(r"^attention\.wqkv\."), "self_attn.wqkv."),
    (re.compile(r"^feed_forward\.w1\."), "mlp.gate_proj."),
    (re.compile(r"^feed_forward\.w3\."), "mlp.up_proj."),
    (re.compile(r"^feed_forward\.w2\."), "mlp.down_proj."),
    (re.compile(r"^attention_norm\."), "input_layernorm."),
    (re.compile(r"^ffn_norm\."), "post_attention_layernorm."),
    (re.compile(r"^tok_embeddings\."), "embed_tokens."),
)
"""InternLM2's names (Meta's first ones for Llama, too) as those that most families share."""


@dataclass(frozen=True)
class Piece:
    """A tensor, or some of its rows."""

    name: str
    rows: Rows | None = None


@dataclass(frozen=True)
class Heads:
    """How many heads of queries, and of keys and values, a language model has; 0 where its config does not say."""

    queries: int
    keys: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        """As a config says, or the part of it that is the language model's."""
        parts = [config.get(key) for key in ("text_config", "llm_config")]
        text = next((part for part in parts if isinstance(part, dict)), config)
        queries = text.get("num_attention_heads")
        keys = text.get("num_key_value_heads", queries)
        return cls(*(value if isinstance(value, int) and value > 0 else 0 for value in (queries, keys)))


@lru_cache(maxsize=1 << 12)  # layers repeat
def canonical(suffix: str) -> str:
    """A tensor of a layer, as most families spell it."""
    for pattern, spelled in SPELLED:
        suffix = pattern.sub(spelled, suffix)
    return suffix


def fitting(
    own: Mapping[str, TensorInfo], like: Mapping[str, TensorInfo], own_heads: Heads, like_heads: Heads
) -> dict[str, tuple[Piece, ...]]:
    """For each tensor of a layer of `like` that a layer of another model makes, its pieces; empty where one is left.

    Each piece is a tensor of the other model, or those of its rows that belong there.
    """
    found, left, _ = compared(own, like, own_heads, like_heads)
    return {} if left else found


def compared(
    own: Mapping[str, TensorInfo], like: Mapping[str, TensorInfo], own_heads: Heads, like_heads: Heads
) -> tuple[dict[str, tuple[Piece, ...]], list[str], list[str]]:
    """What fits, as `fitting` gives it, and what has no counterpart: in the other model's layer, and in `like`'s."""
    found: dict[str, tuple[Piece, ...]] = {}
    found |= {suffix: (Piece(info.name),) for suffix, info in own.items() if _same(info, like.get(suffix))}
    left = {suffix: info for suffix, info in own.items() if suffix not in found}
    free = {suffix: info for suffix, info in like.items() if suffix not in found}
    found |= _joined(left, free, like_heads)
    found |= _parted(left, free, own_heads)
    used = {piece.name for parts in found.values() for piece in parts}
    lacking = [suffix for suffix, info in own.items() if info.name not in used]
    return found, lacking, [suffix for suffix in like if suffix not in found]


def _same(one: TensorInfo, other: TensorInfo | None) -> bool:
    return other is not None and one.shape == other.shape


def _joined(
    left: Mapping[str, TensorInfo], free: Mapping[str, TensorInfo], heads: Heads
) -> dict[str, tuple[Piece, ...]]:
    """Fused tensors of the output, out of the other model's parts."""
    found = {}
    for suffix, info in free.items():
        parts = _parts(suffix, left)
        rows = _rows(suffix, [part.shape[0] for part in parts], heads) if _fill(parts, info) else []
        if rows:
            runs = sorted((first, k, count) for k, part in enumerate(rows) for first, count in part.runs)
            taken = [0] * len(parts)
            pieces = []
            for _, k, count in runs:
                pieces.append(Piece(parts[k].name, Rows(((taken[k], count),))))
                taken[k] += count
            found[suffix] = tuple(pieces)
    return found


def _parted(
    left: Mapping[str, TensorInfo], free: Mapping[str, TensorInfo], heads: Heads
) -> dict[str, tuple[Piece, ...]]:
    """The output's tensors as rows of what the other model keeps fused."""
    found: dict[str, tuple[Piece, ...]] = {}
    for suffix, info in left.items():
        parts = _parts(suffix, free)
        rows = _rows(suffix, [part.shape[0] for part in parts], heads) if _fill(parts, info) else []
        names = [_named(suffix, part) for part in FUSED.get(_module(suffix), ())]
        found |= {name: (Piece(info.name, own),) for name, own in zip(names, rows, strict=False)}
    return found


def _module(suffix: str) -> str:
    return suffix.rpartition(".")[0].rpartition(".")[2]


def _named(suffix: str, part: str) -> str:
    head, _, kind = suffix.rpartition(".")
    return f"{head.rpartition('.')[0]}.{part}.{kind}"


def _parts(suffix: str, held: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """The tensors that a fused one is made of, where all are there."""
    names = [_named(suffix, part) for part in FUSED.get(_module(suffix), ())]
    return [held[name] for name in names] if names and all(name in held for name in names) else []


def _fill(parts: Sequence[TensorInfo], whole: TensorInfo) -> bool:
    return bool(parts) and whole.shape == (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _rows(suffix: str, heights: Sequence[int], heads: Heads) -> list[Rows]:
    """For each part the rows of the fused tensor that are its own, in order; none where the heads are unknown."""
    if _module(suffix) != "wqkv":
        starts = [sum(heights[:k]) for k in range(len(heights))]
        return [Rows(((start, height),)) for start, height in zip(starts, heights, strict=True)]
    if not heads.keys or heights[0] % heads.keys or heights[1] % heads.keys or heads.queries % heads.keys:
        return []
    sizes = [height // heads.keys for height in heights]  # rows of a group: its queries, its key, its value
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [
        Rows(tuple((group * sum(sizes) + start, size) for group in range(heads.keys)))
        for start, size in zip(starts, sizes, strict=True)
    ]
