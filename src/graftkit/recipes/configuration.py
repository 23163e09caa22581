"""The output's config.json: what of it follows from another depth.

Whatever a config says layer by layer (a list, a list of numbers, a period, a threshold) is read as a statement about
the layer that an output layer comes from, and said again for the output. What cannot be said is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from graftkit.errors import PlanError

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")
"""How configs call the number of layers."""

LISTS = (
    "layer_types", "layers_block_type", "mlp_layer_types", "block_types", "no_rope_layers", "attention_layers",
    "moe_layer_freq", "num_key_value_heads", "num_attention_heads", "num_query_heads", "num_kv_heads",
    "intermediate_size", "ffn_multipliers", "activation_sparsity_pattern", "hybrid_override_pattern",
)  # fmt: skip
"""Keys that may hold one value per layer, in a list (or a string) as long as the model is deep."""

NUMBERS = (
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers",
    "global_attn_layers", "dense_layers",
)  # fmt: skip
"""Keys that list the numbers of layers of one kind."""

PERIODS = (
    "decoder_sparse_step", "interleave_moe_layer_step", "attn_layer_period", "expert_layer_period",
    "moe_layer_frequency", "no_rope_layer_interval", "global_attn_every_n_layers", "hybrid_attention_period",
)  # fmt: skip
"""Keys by which every n-th layer is of another kind."""

OVERRULED = {"interleave_moe_layer_step": "moe_layers", "no_rope_layer_interval": "no_rope_layers"}
"""Keys of a period that a list, where there is one, goes before."""

PREFIXES = ("first_k_dense_replace", "num_dense_layers")
"""Keys by which the first n layers are of another kind."""

SUFFIXES = ("num_kv_shared_layers",)
"""Keys by which the last n layers are of another kind."""

TEXT = ("text_config", "llm_config", "language_config", "decoder")
"""Where configs of several parts keep that of the language model."""

ATTENTION_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
"""Families whose every n-th layer attends fully, though their config may not say so."""

Origin = tuple[Mapping[str, Any], int]
"""The config of the model that an output layer comes from, and the layer's number there."""


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config."""
    return next((config[key] for key in TEXT if isinstance(config.get(key), Mapping)), config)


def depth_of(config: Mapping[str, Any]) -> int | None:
    """How many layers a config says the language model has."""
    text = text_of(config)
    order = DEPTHS[::-1] if _decodes(text) else DEPTHS
    return next((text[key] for key in order if type(text.get(key)) is int), None)


def _decodes(text: Mapping[str, Any]) -> bool:
    """Whether it is of an encoder and a decoder: the decoder has the stack that is sliced."""
    return bool(text.get("is_encoder_decoder"))


def deepened(config: Mapping[str, Any], old: int, origins: Sequence[Origin], label: str) -> dict[str, Any]:
    """The config of an output of other layers: `old` is the depth that it speaks of, `origins` are one per layer.

    Raises PlanError for what the output's config could not say.
    """
    text = text_of(config)
    changed = _text(text, old, [(text_of(other), n) for other, n in origins], label)
    if text is config:
        return changed
    key = next(key for key in TEXT if config.get(key) is text)
    top = {k: len(origins) if k in DEPTHS and v == old else v for k, v in config.items()}
    return {**top, key: changed}


def _text(text: Mapping[str, Any], old: int, origins: Sequence[Origin], label: str) -> dict[str, Any]:
    new = dict(text)
    for key in _depth_keys(text, old):
        new[key] = len(origins)
    for key in LISTS:
        if isinstance(text.get(key), (list, str)) and len(text[key]) == old:
            new[key] = _listed(key, origins, label)
    for key in NUMBERS:
        if isinstance(text.get(key), list):
            new[key] = [n for n, (other, m) in enumerate(origins) if m in (other.get(key) or [])]
    for key, sense in _senses(text):
        if not new.get(OVERRULED.get(key, "")) and not _uniform(key, origins, sense, new, old):
            _respell(key, text, new, origins, label)
    _attention(text, new, old, origins)
    return new


def _depth_keys(text: Mapping[str, Any], old: int) -> list[str]:
    keys = [key for key in DEPTHS if text.get(key) == old]
    decoders = [key for key in keys if "decoder" in key]
    return decoders if _decodes(text) and decoders else keys


def _listed(key: str, origins: Sequence[Origin], label: str) -> Any:
    """One value per output layer, each from its own model's list."""
    values = []
    for other, m in origins:
        held = other.get(key)
        if not isinstance(held, (list, str)) or len(held) <= m:
            raise PlanError(
                f"{label}: its config has a list {key!r} with a value per layer, and that of a model in `slices` has "
                f"none for layer {m}; add it there"
            )
        values.append(held[m])
    return "".join(values) if all(isinstance(other.get(key), str) for other, _ in origins) else values


Sense = Callable[[Mapping[str, Any], int, int], bool]
"""Whether layer n of a model of some depth is of the special kind, by its config."""


def _senses(text: Mapping[str, Any]) -> Iterator[tuple[str, Sense]]:
    """The keys of a config that speak of layers by their number, and what they say."""
    for keys, sense in ((PERIODS, _periodic), (PREFIXES, _leading), (SUFFIXES, _trailing)):
        for key in keys:
            if type(text.get(key)) is int:
                yield key, sense(key)


def _leading(key: str) -> Sense:
    return lambda config, n, depth: n < (config.get(key) or 0)


def _trailing(key: str) -> Sense:
    return lambda config, n, depth: n >= depth - (config.get(key) or 0)


def _periodic(key: str) -> Sense:
    """Every n-th layer, or those whose number leaves the offset that the config names."""
    offset = key.replace("_period", "_offset") if key.endswith("_period") else ""

    def sense(config: Mapping[str, Any], n: int, _: int) -> bool:
        period = config.get(key) or 1
        return bool(n % period == (config.get(offset, period - 1) if offset else period - 1))

    return sense


def _uniform(key: str, origins: Sequence[Origin], sense: Sense, new: Mapping[str, Any], old: int) -> bool:
    """Whether the key, as it stands, says of every output layer what it said of that layer's origin."""
    depth = len(origins)
    return all(sense(new, n, depth) == sense(c, m, depth_of(c) or old) for n, (c, m) in enumerate(origins))


def _respell(key: str, text: Mapping[str, Any], new: dict[str, Any], origins: Sequence[Origin], label: str) -> None:
    """Says it in another way where there is one: another count, or an explicit list."""
    sense, depth = dict(_senses(text))[key], len(origins)
    kinds = [sense(c, m, depth_of(c) or depth) for c, m in origins]
    count = sum(kinds)
    if key in PREFIXES and kinds == [True] * count + [False] * (depth - count):
        new[key] = count
    elif key in SUFFIXES and kinds == [False] * (depth - count) + [True] * count:
        new[key] = count
    elif key == "decoder_sparse_step":
        dense = [n for n, (c, m) in enumerate(origins) if m in (c.get("mlp_only_layers") or []) or not kinds[n]]
        new[key], new["mlp_only_layers"] = 1, dense
    elif key == "no_rope_layer_interval":
        new["no_rope_layers"] = [int(not kind) for kind in kinds]
    else:
        n = next(n for n in range(depth) if sense(new, n, depth) != kinds[n])
        raise PlanError(
            f"{label}: its config's {key} {text[key]} would make output layer {n} of another kind than layer "
            f"{origins[n][1]}, which it comes from; choose slices that keep the pattern"
        )


def _attention(text: Mapping[str, Any], new: dict[str, Any], old: int, origins: Sequence[Origin]) -> None:
    """Which layers attend within a window: by list where the config's rule would say something else of the output."""
    if isinstance(text.get("layer_types"), list) and len(text["layer_types"]) == old:
        kinds = new["layer_types"]
    else:
        kinds = [attention_kind(c, m) for c, m in origins]
    if text.get("max_window_layers") == old and not text.get("use_sliding_window"):
        new["max_window_layers"] = len(origins)
    elif "max_window_layers" in text and text.get("use_sliding_window"):
        leading = next((n for n, kind in enumerate(kinds) if kind != "full_attention"), len(kinds))
        new["max_window_layers"] = leading
    if any(kinds) and [attention_kind({**new, "layer_types": None}, n) for n in range(len(kinds))] != kinds:
        new["layer_types"] = kinds


def attention_kind(config: Mapping[str, Any], n: int) -> str | None:
    """How layer `n` attends, by `layer_types` or by the older keys; None where all layers do alike."""
    listed = config.get("layer_types")
    if isinstance(listed, list) and n < len(listed):
        return str(listed[n])
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    period = period or ATTENTION_PERIODS.get(str(config.get("model_type")))
    if type(period) is int:
        return "sliding_attention" if (n + 1) % period else "full_attention"
    if type(config.get("full_attention_interval")) is int:
        return "linear_attention" if (n + 1) % config["full_attention_interval"] else "full_attention"
    if config.get("use_sliding_window") and type(config.get("max_window_layers")) is int:
        return "sliding_attention" if n >= config["max_window_layers"] else "full_attention"
    return None


def with_tokens(
    config: Mapping[str, Any], height: int, translate: Callable[[str, int], int] | None, other: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of an output with another vocabulary of `height` rows.

    Ids of special tokens are those of `other`, the config that belongs to the vocabulary, where it has the key; else
    the same tokens' new ids, by `translate` (None where no id changes).
    """

    def changed(part: Mapping[str, Any], theirs: Mapping[str, Any], main: bool) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for key, value in part.items():
            if isinstance(value, Mapping) and key.endswith("_config"):
                inner = theirs.get(key)
                new[key] = changed(value, inner if isinstance(inner, Mapping) else {}, key in TEXT)
            elif key == "vocab_size" and main:
                new[key] = height
            else:
                new[key] = special(key, value, theirs, translate)
        return new

    return changed(config, other, True)


def special(key: str, value: Any, theirs: Mapping[str, Any], translate: Callable[[str, int], int] | None) -> Any:
    """The value of one key, if it is the id of a token or a list of such."""
    if translate is None or not key.endswith(("_token_id", "_token_ids", "_token_index")):
        return value
    if key in theirs:
        return theirs[key]
    if type(value) is int:
        return translate(key, value)
    return [translate(key, one) for one in value] if isinstance(value, list) else value
