"""Which tensor of a text model is which tensor of a VLM's language backbone, from names and shapes alone.

A language model is a stack of layers with an embedding, a last norm and a head around it, and so is what a VLM speaks
with. Layers that hold the same tensors in the same shapes are paired in order; what stands around the stack is paired
by what follows the stack's own prefix, the head by its role. No family is named anywhere, and layers that a VLM has
between (Mllama's cross-attention) are passed over. What fits in no way, or in two, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes import layout, ties
from graftkit.recipes.projections import Heads, Piece, canonical, compared, fitting

_POSITIONS = re.compile(r"(wpe|positions?)\.weight$|position_embeddings")

Stack = Mapping[int, Mapping[str, TensorInfo]]
"""Layers by their number, their tensors by what follows the number, as most families spell it."""


@dataclass(frozen=True)
class Alignment:
    """Where the tensors of an output are in another model: by the output's names, in `pieces` of the model's tensors.

    `layers` are pairs of the model's number of a layer and the output's; `stacks` the prefixes of the two stacks.
    `unmapped` are the model's tensors that have no place in the output.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    layers: tuple[tuple[int, int], ...]
    stacks: tuple[str, str]
    unmapped: tuple[str, ...] = ()


def align(own: Checkpoint, like: Checkpoint, label: str, like_label: str) -> Alignment:
    """The alignment of a model with the language backbone of the output's model.

    Raises PlanError where its layers fit none of the output's stacks, or several, or where a text model has tensors
    without a place.
    """
    ours, theirs = _stacks(own.tensors), _stacks(like.tensors)
    heads = Heads.of(own.config), Heads.of(like.config)
    fits: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {}
    reasons: list[tuple[int, str]] = []
    for prefix in _speaking(ours, own.tensors):
        for other in _speaking(theirs, like.tensors) or theirs:
            found = _pairs(ours[prefix], theirs[other], heads)
            if isinstance(found, tuple):
                fits[prefix, other] = found
            else:
                reasons.append((found.fitting, f"{found.reason} ({other}*)"))
    if len(fits) != 1:
        raise PlanError(_refusal(label, like_label, list(fits), reasons))
    stacks, layers = next(iter(fits.items()))
    pieces: dict[str, tuple[Piece, ...]] = {}
    for n, m in layers:
        like_layer = theirs[stacks[1]][m]
        made = fitting(ours[stacks[0]][n], like_layer, *heads)
        pieces |= {like_layer[suffix].name: parts for suffix, parts in made.items()}
    around, used = _around(own, like, stacks, label)
    pieces |= around
    used |= {piece.name for parts in pieces.values() for piece in parts}
    unmapped = tuple(name for name in own.tensors if name not in used and not layout.BUFFERS.search(name))
    _check_surplus(unmapped, ours, label, like_label)
    return Alignment(pieces, layers, stacks, unmapped)


def identity(like: Checkpoint) -> Alignment:
    """The alignment of the output's own model."""
    return Alignment({name: (Piece(name),) for name in like.tensors}, (), ("", ""))


def _stacks(tensors: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    return {
        prefix: {n: {canonical(suffix): tensors[name] for suffix, name in held.items()} for n, held in layers.items()}
        for prefix, layers in layout.stacks(n for n in tensors if not layout.BUFFERS.search(n)).items()
    }


def _parent(prefix: str) -> str:
    """What stands before `layers.` in a stack's prefix: `model.`"""
    return prefix[: prefix[:-1].rfind(".") + 1]


def _embeds(name: str) -> bool:
    return layout.role(name) == "embedding" and not _POSITIONS.search(name)


def _is_head(name: str) -> bool:
    return layout.role(name) == "head"


def _speaking(stacks: Mapping[str, Stack], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The stacks that read tokens: those beside an embedding of them; all where there is none."""
    beside = {name.rpartition(".")[0].rpartition(".")[0] for name in tensors if _embeds(name)}
    return [prefix for prefix in stacks if _parent(prefix).removesuffix(".") in beside] or list(stacks)


@dataclass(frozen=True)
class _Misfit:
    """Why a model's layers are not those of a stack, and how many of them would fit."""

    reason: str
    fitting: int


def _pairs(own: Stack, like: Stack, heads: tuple[Heads, Heads]) -> tuple[tuple[int, int], ...] | _Misfit:
    """The layers in pairs, in order; unique, else a misfit."""
    known: dict[tuple[Any, Any], bool] = {}

    def fits(n: int, m: int) -> bool:
        key = _shape(own[n]), _shape(like[m])
        if key not in known:
            known[key] = bool(fitting(own[n], like[m], *heads))
        return known[key]

    first = _greedy(sorted(own), sorted(like), fits)
    last = _greedy(sorted(own, reverse=True), sorted(like, reverse=True), fits)[::-1]
    if len(first) < len(own):
        return _misfit(own, like, heads, first)
    if first != last:
        n, m, other = next((n, m, o) for (n, m), (_, o) in zip(first, last, strict=True) if m != o)
        return _Misfit(f"has {len(own)} layers, which fit in several ways: layer {n} could be {m} or {other}", len(own))
    return tuple(first)


def _greedy(own: Sequence[int], like: Sequence[int], fits: Any) -> list[tuple[int, int]]:
    """Each layer with the next that it fits."""
    found, places = [], iter(like)
    for n in own:
        m = next((m for m in places if fits(n, m)), None)
        if m is None:
            break
        found.append((n, m))
    return found


def _shape(layer: Mapping[str, TensorInfo]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((suffix, info.shape) for suffix, info in layer.items())


def _misfit(own: Stack, like: Stack, heads: tuple[Heads, Heads], found: list[tuple[int, int]]) -> _Misfit:
    """What is wrong with the first layer that fits nowhere, by the layer that is nearest to it."""
    n = sorted(own)[len(found)]
    if found and any(fitting(own[n], layer, *heads) for layer in like.values()):
        return _Misfit(f"has {len(own)} layers, and only {len(found)} of its stack fit", len(found))
    near = max(like.values(), key=lambda layer: -len(compared(own[n], layer, *heads)[1]))
    _, lacking, surplus = compared(own[n], near, *heads)
    wrong = next((suffix for suffix in lacking if suffix in near), None)
    if wrong:
        shapes = f"{list(own[n][wrong].shape)}, and the stack as {list(near[wrong].shape)}"
        return _Misfit(f"has {wrong!r} in its layers as {shapes}", 0)
    instead = f"{_first(surplus)} instead" if surplus else "nothing instead"
    return _Misfit(f"has {_first(lacking)} in its layers, and the stack has {instead}", 0)


def _first(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _refusal(label: str, like: str, fits: list[tuple[str, str]], reasons: list[tuple[int, str]]) -> str:
    if fits:
        named = " or ".join(f"{own}* in {other}*" for own, other in fits)
        return f"{label} fits the language backbone of {like} in several ways: {named}; name models with one backbone"
    why = max(reasons, key=lambda reason: reason[0], default=(0, "has no stack of layers"))[1]
    return (
        f"{label} {why}, so it is not the language backbone of {like}: name the text model that the VLM was made from, "
        "in the form in which its layers are kept there"
    )


def _around(
    own: Checkpoint, like: Checkpoint, stacks: tuple[str, str], label: str
) -> tuple[dict[str, tuple[Piece, ...]], set[str]]:
    """What stands around the stacks: embeddings, last norms, heads; and which of the model's tensors that settles."""
    ours, theirs = (_outside(source.tensors) for source in (own, like))
    parents = _parent(stacks[0]), _parent(stacks[1])
    places = {parents[1] + canonical(n.removeprefix(parents[1])): n for n in theirs if n.startswith(parents[1])}
    found: dict[str, tuple[Piece, ...]] = {}
    for name in ours:
        place = places.get(parents[1] + canonical(name.removeprefix(parents[0]))) if name.startswith(parents[0]) else ""
        if _is_head(name):
            place = _head(name, theirs, parents[1])
        if place and _alike(name, ours[name], theirs[place], label):
            found[place] = (Piece(name),)
    heads, embeddings = ([n for n in ours if is_kind(n)] for is_kind in (_is_head, _embeds))
    head = _head("lm_head.weight", theirs, parents[1])
    if head and not heads and len(embeddings) == 1:  # no head on disk: it is the embedding, whatever a config says
        found[head] = (Piece(embeddings[0]),)
    return found, set(heads) if ties.says_tied(own.config) else set()


def _outside(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that belong to no layer."""
    return {n: info for n, info in tensors.items() if layout.layer(n) is None and not layout.BUFFERS.search(n)}


def _head(name: str, theirs: Iterable[str], parent: str) -> str:
    """The output's head that stands nearest to its language stack."""
    kind = name.rpartition(".")[2]
    heads = [n for n in theirs if layout.role(n) == "head" and n.endswith(kind)]
    return max(heads, key=lambda n: len(_shared(n, parent)), default="")


def _shared(one: str, other: str) -> str:
    return one[
        : next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def _alike(name: str, own: TensorInfo, like: TensorInfo, label: str) -> bool:
    """Whether two tensors are of one shape, rows for tokens not counted. Raises PlanError for a language model's."""
    rows = layout.has_rows(name) and own.shape[1:] == like.shape[1:]
    if own.shape == like.shape or rows:
        return True
    if layout.role(name) == "other":
        return False
    raise PlanError(
        f"{label} has {name!r} as {list(own.shape)}, and the VLM {like.name!r} as {list(like.shape)}: it is not the "
        "VLM's language backbone"
    )


def _check_surplus(unmapped: tuple[str, ...], stacks: Mapping[str, Stack], label: str, like: str) -> None:
    """Refuses a text model with tensors that the backbone has not; of another VLM the backbone alone is used."""
    surplus = [name for name in unmapped if not _is_head(name)]
    if surplus and len(stacks) == 1:
        raise PlanError(f"{label} has {_first(surplus)}, for which the language backbone of {like} has no place")
