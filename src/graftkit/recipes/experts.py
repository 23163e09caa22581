"""Mixtures of experts whose experts stand in one tensor: [experts, rows, columns], or [experts, n] for their biases.

For a method each expert's matrix is a tensor of its own, with its own rows, thresholds and angles, just as in
checkpoints that keep every expert under a name of its own. Where one model of a merge keeps them so and another in one
tensor, the latter is read expert by expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from graftkit.checkpoints.headers import ITEMSIZE, TensorInfo
from graftkit.checkpoints.rows import Rows
from graftkit.checkpoints.sources import Checkpoint
from graftkit.recipes import inputs
from graftkit.recipes.steps import Context, Input, Step

STACK = re.compile(r"(\.experts\.(?!\d+\.)[\w.]+|moe\.(input|output)_linear\.weight)$")
ROUTER = re.compile(r"\.(gate|router(\.\w+)?)\.weight$")
"""The matrix that chooses experts; a live model keeps it in a module of its own, which is no linear layer."""

_FUSED = re.compile(r"(?P<head>.*)\.(?P<block>mlp|feed_forward)\.experts\.(?P<part>gate_up_proj|down_proj)(\.weight)?$")
_APART = re.compile(r"\.(?P<block>\w+)\.experts\.\d+\.(?P<part>\w+)\.weight$")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
"""Families whose experts are kept as [columns, rows], and never apart."""


def is_stack(info: TensorInfo) -> bool:
    """Whether a tensor holds one matrix, or one bias, for each expert."""
    wanted = 2 if info.name.endswith("bias") else 3
    return bool(STACK.search(info.name)) and len(info.shape) == wanted


def split(step: Step, info: TensorInfo, context: Context) -> list[Step]:
    """One step for each expert, where a method looks at more than one element at a time."""
    whole = all(part.grain == "element" and not part.statistics for part in step.parts)
    if not is_stack(info) or whole or any(part.masks for part in step.parts):
        return [step]
    if step.rows is not None or any(not _is_plain(part) for part in (step.base, *step.models) if part):
        return [step]
    order = tuple(member.source for member in context.models)
    made = []
    for e in range(step.shape[0]):
        one = Rows(((e, 1),))
        keys = inputs.keys(context.recipe, context.sources, order, f"{step.name}\t{e}") if step.keys else ()
        made.append(
            replace(
                step,
                shape=step.shape[1:],
                whole=step.shape,
                rows=one,
                part=f"expert {e}",
                keys=keys,
                base=replace(step.base, rows=one) if step.base else None,
                models=tuple(replace(part, rows=one) if part.kind == "tensor" else part for part in step.models),
            )
        )
    return made


def _is_plain(part: Input) -> bool:
    return part.kind in ("tensor", "base") and part.rows is None


def aligned(sources: tuple[inputs.Named, ...], like: int) -> tuple[inputs.Named, ...]:
    """The sources, those with experts in one tensor as if they kept them apart, where the output's model does."""
    form = next((match for name in sources[like].source.tensors if (match := _APART.search(name))), None)
    if form is None:
        return sources
    found = []
    for named in sources:
        source = named.source
        fused = isinstance(source, Checkpoint) and source.config.get("model_type") not in TRANSPOSED
        if fused and any(_FUSED.match(name) and len(info.shape) == 3 for name, info in source.tensors.items()):
            assert isinstance(source, Checkpoint)
            named = replace(named, source=replace(source, tensors=_apart(source.tensors, form["block"])))
        found.append(named)
    return tuple(found)


def _apart(tensors: Mapping[str, TensorInfo], block: str) -> dict[str, TensorInfo]:
    """The tensors of a model with each expert's matrices under names of their own, as a family calls them."""
    found = {}
    for name, info in tensors.items():
        match = _FUSED.match(name)
        pieces = list(_pieces(info, match["head"], match["part"])) if match and len(info.shape) == 3 else [info]
        for piece in pieces:
            called = _renamed(piece.name, block)
            found[called] = replace(piece, name=called)
    return found


def _pieces(info: TensorInfo, head: str, part: str) -> Iterator[TensorInfo]:
    experts, rows, columns = info.shape
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    shape = (rows // len(parts), columns)
    size = math.prod(shape) * ITEMSIZE[info.dtype]
    for e in range(experts):
        for k, each in enumerate(parts):
            begin = info.begin + (e * len(parts) + k) * size
            yield TensorInfo(f"{head}.mlp.experts.{e}.{each}.weight", info.dtype, shape, info.file, begin, begin + size)


def _renamed(name: str, block: str) -> str:
    if block != "block_sparse_moe":
        return name
    for ours, theirs in MIXTRAL.items():
        name = re.sub(rf"\.mlp\.experts\.(\d+)\.{ours}\.", rf".{block}.experts.\1.{theirs}.", name)
    return re.sub(r"\.mlp\.gate\.weight$", f".{block}.gate.weight", name)
