"""mergekit's `tokenizer_source` and `tokenizer` as our `output.tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.errors import RecipeError
from graftkit.recipes.mergekit.document import check_keys, reference

KEYS = ("source", "tokens", "pad_to_multiple_of")


def tokenizer_of(rest: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The tokenizer of a recipe, as mergekit fills and pads embeddings; None where it leaves them alone."""
    short, long = rest.get("tokenizer_source"), rest.get("tokenizer")
    if short and long:
        raise RecipeError(f"{where}: got both tokenizer_source and tokenizer; give one of them")
    if long is None:
        return _made(short, {}, None, f"{where}: tokenizer_source") if short else None
    check_keys(long, KEYS, f"{where}: tokenizer")
    tokens = long.get("tokens") or {}
    rows = {str(token): _row(row, f"{where}: tokenizer.tokens[{token!r}]") for token, row in tokens.items()}
    made = {token: row for token, row in rows.items() if row}
    return _made(long.get("source", "union"), made, long.get("pad_to_multiple_of"), f"{where}: tokenizer.source")


def _made(source: Any, tokens: dict[str, Any], multiple: Any, where: str) -> dict[str, Any]:
    named = source if source in ("union", "base") else reference(source, where)
    made = {
        "source": named,
        "missing": "fill",
        "tokens": tokens,
        "pad_to_multiple_of": multiple or 1,
        "padding": "mean",
    }
    return {key: value for key, value in made.items() if value != {}}


def _row(row: Any, where: str) -> dict[str, Any]:
    """Where the row of one token comes from; nothing where mergekit would decide as for any other token."""
    if not isinstance(row, Mapping) or not set(row) <= {"source", "force"}:
        raise RecipeError(f"{where}: got {row!r}, expected a mapping with source and force")
    source, force = row.get("source"), {"force": True} if row.get("force") else {}
    if source is None:
        if force:
            raise RecipeError(f"{where}: force needs a source: which model's row is to be taken by all?")
        return {}
    if isinstance(source, Mapping) and source.get("kind") == "zero":
        return {"zero": True, **force}
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        other = {"id": source["token_id"]} if source.get("token_id") is not None else {"token": source.get("token")}
        return {"model": reference(source.get("model"), f"{where}.source.model"), **other, **force}
    return {"model": reference(source, f"{where}.source"), **force}
