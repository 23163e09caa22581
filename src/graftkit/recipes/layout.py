"""Which input tensor feeds which output tensor: names, roles, layers, ties and wrappers, read off headers.

The output takes its names from one model (`like`), verbatim. Every other model must offer each of them: under the same
name, under one prefix that all its names share or lack (`model.`), or through a tie (an output embedding that is not on
disk is the input embedding). What fits none of these is refused by name; nothing is skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes.recipe import Where

BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")
"""Constants that old checkpoints carry along; they are computed, not learnt, so a model may lack them."""

EXPERTS = re.compile(r"\.experts\.")
ENCODERS = re.compile(r"(^|[._])(encoder|vision|visual|audio|image|tower|resampler|perceiver|projector)", re.IGNORECASE)
"""Stacks that feed a language model, and are none."""

FOR_VLMS = "a text model is merged into the backbone of one with an encoder by the keys `vlm` and `experts`"
"""What to do about tensors of encoders that only some models have."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
_POSITIONS = re.compile(r"(wpe|embed_positions|position_embeddings)\.weight$")
_ROLES = (
    (
        "embedding",
        re.compile(r"(embed_tokens|wte|wpe|word_embeddings|tok_embeddings|embed_in|embed_positions)\.weight$"),
    ),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$")),
    ("norm", re.compile(r"(norm|layernorm|ln_\w+|ln)\d*\.(weight|bias)$", re.IGNORECASE)),
    ("attention", re.compile(r"(attn|attention)", re.IGNORECASE)),
    ("mlp", re.compile(r"(mlp|feed_forward|ffn|experts|moe|\.fc\d)", re.IGNORECASE)),
)


@lru_cache(maxsize=1 << 16)  # every step asks several times
def role(name: str) -> str:
    """What a tensor is for: attention, mlp, embedding, head, norm or other."""
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def layer(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside the stack."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def stacks(names: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """The stacks of layers among some tensors: prefix (`model.layers.`), number, what follows it, to the whole name."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if match := _LAYER.search(name):
            layers = found.setdefault(name[: match.start(1)], {})
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = name
    return found


def matches(where: Where, name: str) -> bool:
    """Whether a rule's condition holds for an output tensor."""
    patterns = [where.name] if isinstance(where.name, str) else where.name
    roles = [where.role] if isinstance(where.role, str) else where.role
    return (
        (patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns))
        and (roles is None or role(name) in roles)
        and (where.layer_numbers is None or layer(name) in where.layer_numbers)
    )


def match_checkpoint(
    wanted: Mapping[str, TensorInfo], source: Checkpoint, label: str, *, rows: bool = False
) -> dict[str, str]:
    """For every wanted output tensor, the name under which the model holds it.

    `rows`: embeddings and heads may differ in their rows, which the vocabulary aligns. Raises PlanError when tensors
    are missing, when shapes differ, or when the model has tensors that have no place.
    """
    held = source.tensors
    prefix_out, prefix_in = _prefixes(wanted, held)
    found, missing = {}, []
    for name in wanted:
        candidate = prefix_in + name.removeprefix(prefix_out)
        candidate = next((n for n in (name, candidate, _tied(name, held)) if n in held), "")
        if candidate:
            found[name] = candidate
        elif not BUFFERS.search(name):
            missing.append(name)
    if missing:
        hint = "all models of a merge need the same tensors"
        if any(EXPERTS.search(n) for n in missing) and any(EXPERTS.search(n) for n in held):
            hint = "its experts are kept in other tensors; choose output.like from the models that keep them apart"
        if any(ENCODERS.search(n) for n in missing):
            hint = FOR_VLMS
        raise PlanError(f"{label} lacks {_some(missing)}; {hint}")
    surplus = [n for n in held if n not in set(found.values()) and not BUFFERS.search(n) and not _is_tie(n, source)]
    encoder = any(ENCODERS.search(n) for n in surplus)
    if not encoder:
        _check_shapes(wanted, {name: held[other].shape for name, other in found.items()}, label, rows)
    if surplus:
        hint = FOR_VLMS if encoder else "choose it by output.like, or drop it"
        raise PlanError(f"{label} has {_some(surplus)}, for which the output has no place; {hint}")
    return found


def match_adapter(
    wanted: Mapping[str, TensorInfo], adapter: Adapter, label: str, *, rows: bool = False
) -> dict[str, str]:
    """For every output tensor that the adapter changes, the adapter's own name of it.

    Raises PlanError when a module has no place in the output, or when shapes do not fit.
    """
    names = [*adapter.factors, *adapter.tensors]
    found = {}
    for name in names:
        if role(name) == "head" and name not in wanted and adapter.config.get("ensure_weight_tying"):
            continue  # the embedding's change, under its other name
        places = [name] if name in wanted else [w for w in wanted if w.endswith("." + name) or name.endswith("." + w)]
        if not places:  # a VLM's modules are called otherwise in memory, where adapters are trained, than on disk
            places = [w for w in wanted if _ends_alike(_bare(w), _bare(name))]
        if len(places) != 1:
            verdict = "is in several places" if places else "is not"
            if role(name) == "head" and not places:
                raise PlanError(
                    f"{label} adapts {name!r}, which the output's model ties to its input embedding: "
                    "untie it first, or merge the adapter into its base with PEFT"
                )
            raise PlanError(
                f"{label} adapts {name!r}, which {verdict} in the output's model: is it the adapter's base?"
            )
        found[places[0]] = name
    shapes = {
        w: adapter.factors[n].shape if n in adapter.factors else adapter.tensors[n].shape for w, n in found.items()
    }
    _check_shapes(wanted, shapes, label, rows)
    return found


def changed_by(adapters: Iterable[Adapter]) -> dict[str, tuple[int, ...]]:
    """The tensors that some adapters of one base change, and their shapes; by its longer name what two call otherwise,
    as an adapter of a bare model does (`layers.0` for `model.layers.0`)."""
    found: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        known = {_bare(name): name for name in found}
        shapes: list[tuple[str, tuple[int, ...]]] = [(name, pair.shape) for name, pair in adapter.factors.items()]
        shapes += [(name, info.shape) for name, info in adapter.tensors.items()]
        for name, shape in shapes:
            alike = known.get(_bare(name), name)
            if len(alike) < len(name):
                found.pop(alike)
            found[max(name, alike, key=len)] = shape
    return found


def called(name: str, own: Sequence[str], base: Checkpoint) -> str:
    """What a tensor of the base on disk is called in memory, where PEFT looks for it: as adapters call it, but for the
    wrappers of another model in which they were trained."""
    close = [known for known in own if _bare(known) == _bare(name)]
    if close or not own:
        return max((*close, name), key=len)
    return own[0] if any(ENCODERS.search(held) for held in base.tensors) else name


def live_names(names: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """For each name on disk, the name of the same parameter in a live module; those that have none are left out.

    A parameter keeps its name, or differs only in wrappers around the model (`model.`), or, last, is the only one that
    ends as the other does: a module inside of another, as a language model's stands in that of one with images.
    """
    parameters = list(held)
    same, bare = set(parameters), _by_bare(parameters)
    found = {}
    for name in names:
        short = _bare(name)
        close = [name] if name in same else bare.get(short, [])
        if not close:
            close = [own for own in parameters if _ends_alike(_bare(own), short)]
        if len(close) == 1:
            found[name] = close[0]
    return found


_WRAPPERS = ("model", "transformer", "base_model")


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _by_bare(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_bare(name), []).append(name)
    return found


def _ends_alike(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def has_rows(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return role(name) in ("embedding", "head") and not _POSITIONS.search(name)


def _check_shapes(
    wanted: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], label: str, aligned: bool = False
) -> None:
    for name, shape in shapes.items():
        if shape != wanted[name].shape:
            rows = has_rows(name) and shape[1:] == wanted[name].shape[1:]
            if rows and aligned:
                continue
            hint = (
                "vocabularies differ; align them by token with `output: {tokenizer: base}` (or union, or a model)"
                if rows
                else "the models are not of one architecture"
            )
            raise PlanError(f"{label} has {name!r} as {list(shape)}, the output as {list(wanted[name].shape)}: {hint}")


def _prefixes(wanted: Iterable[str], held: Iterable[str]) -> tuple[str, str]:
    """The prefix that the output's names have and the model's lack, or the reverse: ("model.", "") say."""
    ours, theirs = ({name for name in names if role(name) != "head"} for names in (wanted, held))
    for prefix in ("model.", "transformer.", "base_model.", "language_model."):
        if not ours & theirs and any(prefix + name in ours for name in theirs):
            return prefix, ""
        if not ours & theirs and any(prefix + name in theirs for name in ours):
            return "", prefix
    return "", ""


def _tied(name: str, held: Mapping[str, TensorInfo]) -> str:
    """The input embedding, for an output embedding that is not on disk."""
    if role(name) != "head" or not name.endswith(".weight"):
        return ""
    return next((other for other in held if role(other) == "embedding" and not other.endswith("wpe.weight")), "")


def _is_tie(name: str, source: Checkpoint) -> bool:
    """Whether a surplus output embedding is, by the model's config, only a copy of its input embedding."""
    nested = source.config.get("text_config")
    text = nested if isinstance(nested, dict) else source.config
    return role(name) == "head" and bool(
        source.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensors ({shown}{more})" if len(names) > 1 else f"the tensor {shown}"
