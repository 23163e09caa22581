"""The keys of a recipe for a VLM and text experts, written out as an ordinary recipe.

vlm: some/vlm                        # the first of the models, and what the output is like
experts: [text/expert]               # the others; each, and the VLM, may be a mapping with `data:` and the like
vl_weight: 1.0                       # the VLM's `weight`
exp_weight: 0.5                      # the experts' `weight`: one for all, one each, or beside an expert
embeddings: keep                     # or shared-rows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit import methods
from graftkit.errors import RecipeError

KEYS = frozenset(("vlm", "experts", "vl_weight", "exp_weight", "embeddings"))
WEIGHTS = ("vl_weight", "exp_weight")
EXPECTED = "expected a path or a hub id"


def expanded(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The recipe without these keys. Raises RecipeError for what they cannot mean."""
    rest = {key: value for key, value in data.items() if key not in KEYS}
    if "vlm" not in data:
        raise RecipeError(f"{where}: vlm: {min(KEYS & data.keys())!r} stands without it, {EXPECTED} of the VLM")
    vlm = _entry(data["vlm"], "vl_weight", f"{where}: vlm")
    for key in ("models", "slices"):
        if key in data:
            raise RecipeError(f"{where}: has both vlm and {key}; list the text models as `experts`, and drop `{key}`")
    experts = _experts(data, where)
    _check_weights(data, where)
    weights = _spread(data, len(experts), where)
    models = [vlm, *experts]
    for k, (entry, weight) in enumerate(zip(models, weights, strict=True)):
        if weight is not None and "weight" in entry:
            key = WEIGHTS[min(k, 1)]
            raise RecipeError(f"{where}: {entry['model']!r} has a weight of its own and one by {key}; drop one")
        entry |= {} if weight is None else {"weight": weight}
    rules, output = rest.get("rules"), _output(rest.get("output", {}), vlm["model"], data, where)
    made: dict[str, Any] = {**rest, "models": models, "output": output}
    if isinstance(rules, list):
        made["rules"] = [_rule(rule, len(experts), f"{where}: rules[{r}]") for r, rule in enumerate(rules)]
    return made


def _experts(data: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    given = data.get("experts")
    if not isinstance(given, list) or not given:
        got = f"got {given!r}, " if "experts" in data else "the key is missing, "
        raise RecipeError(f"{where}: experts: {got}expected a list of at least one text model or adapter")
    return [_entry(item, "exp_weight", f"{where}: experts[{k}]") for k, item in enumerate(given)]


def _entry(item: Any, key: str, where: str) -> dict[str, Any]:
    """A model's entry in a recipe, its weight under the name that it has there."""
    entry = {"model": item} if isinstance(item, str) else item
    if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str) or not entry["model"]:
        raise RecipeError(f"{where}: got {item!r}, {EXPECTED}, or a mapping with 'model'")
    if {"weight", key} <= entry.keys():
        raise RecipeError(f"{where}: weight and {key} are one thing; drop one")
    return {"weight" if name == key else name: value for name, value in entry.items()}


def _check_weights(data: Mapping[str, Any], where: str) -> None:
    """Refuses weights for a method that has none; with rules, other methods may have them."""
    given, name = [key for key in WEIGHTS if data.get(key) is not None], data.get("method")
    if given and isinstance(name, str) and not data.get("rules") and "weight" not in methods.get(name).knobs:
        own = ", ".join(methods.get(name).knobs) or "none"
        raise RecipeError(
            f"{where}: {given[0]}: {name} has no weights, its knobs are: {own}; drop {' and '.join(given)}"
        )


def _spread(data: Mapping[str, Any], count: int, where: str) -> list[Any]:
    """A weight for the VLM, and one for each expert; None where there is none."""
    given = data.get("exp_weight")
    if isinstance(given, list) and len(given) != count:
        raise RecipeError(f"{where}: exp_weight: {len(given)} values for {count} experts; give one, or one per expert")
    return [data.get("vl_weight"), *(given if isinstance(given, list) else [given] * count)]


def _rule(rule: Any, count: int, where: str) -> Any:
    """A rule whose vl_weight and exp_weight have become the knob that they are."""
    if not isinstance(rule, Mapping) or not rule.keys() & set(WEIGHTS):
        return rule
    knobs = rule.get("knobs", {})
    if not isinstance(knobs, Mapping) or "weight" in knobs:
        raise RecipeError(f"{where}: has weights under knobs too; give vl_weight and exp_weight, or knobs.weight")
    rest = {key: value for key, value in rule.items() if key not in WEIGHTS}
    return {**rest, "knobs": {**knobs, "weight": _spread(rule, count, where)}}


def _output(output: Any, vlm: str, data: Mapping[str, Any], where: str) -> Any:
    if not isinstance(output, Mapping):
        return output
    for key, value in (("like", vlm), ("align", "backbone")):
        if output.get(key, value) != value:
            raise RecipeError(f"{where}: output.{key}: got {output[key]!r}, and with `vlm` it is {value!r}; drop it")
    kept = {"embeddings": data["embeddings"]} if "embeddings" in data else {}
    return {**output, "like": vlm, "align": "backbone", **kept}
