"""The keys of a recipe for a VLM and text experts, written out as an ordinary recipe.

vlm: some/vlm                        # the first of the models, and what the output is like
experts: [text/expert]               # the others
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


def expanded(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The recipe without these keys. Raises RecipeError for what they cannot mean."""
    rest = {key: value for key, value in data.items() if key not in KEYS}
    if not isinstance(data.get("vlm"), str) or not data["vlm"]:
        got = f"got {data['vlm']!r}" if "vlm" in data else f"{min(KEYS & data.keys())!r} stands without it"
        raise RecipeError(
            f"{where}: vlm: {got}, expected a path or a hub id of the VLM that text models are merged into"
        )
    for key in ("models", "slices"):
        if key in data:
            raise RecipeError(f"{where}: has both vlm and {key}; list the text models as `experts`, and drop `{key}`")
    experts = _experts(data, where)
    _check_weights(data, where)
    weights = _spread(data, len(experts), where)
    models = [{"model": data["vlm"]}, *experts]
    for entry, weight in zip(models, weights, strict=True):
        if weight is not None and "weight" in entry:
            raise RecipeError(f"{where}: {entry['model']!r} has a weight of its own and one by exp_weight; drop one")
        entry |= {} if weight is None else {"weight": weight}
    rules = rest.get("rules")
    made: dict[str, Any] = {**rest, "models": models, "output": _output(rest.get("output", {}), data, where)}
    if isinstance(rules, list):
        made["rules"] = [_rule(rule, len(experts), f"{where}: rules[{r}]") for r, rule in enumerate(rules)]
    return made


def _experts(data: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    given = data.get("experts")
    if not isinstance(given, list) or not given:
        got = f"got {given!r}, " if "experts" in data else "the key is missing, "
        raise RecipeError(f"{where}: experts: {got}expected a list of at least one text model or adapter")
    found = []
    for k, item in enumerate(given):
        entry = {"model": item} if isinstance(item, str) else item
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise RecipeError(
                f"{where}: experts[{k}]: got {item!r}, expected a path, a hub id, or a mapping with 'model'"
            )
        if {"weight", "exp_weight"} <= entry.keys():
            raise RecipeError(f"{where}: experts[{k}]: weight and exp_weight are one thing; drop one")
        found.append({"weight" if key == "exp_weight" else key: value for key, value in entry.items()})
    return found


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


def _output(output: Any, data: Mapping[str, Any], where: str) -> Any:
    if not isinstance(output, Mapping):
        return output
    for key, value in (("like", data["vlm"]), ("align", "backbone")):
        if output.get(key, value) != value:
            raise RecipeError(f"{where}: output.{key}: got {output[key]!r}, and with `vlm` it is {value!r}; drop it")
    kept = {"embeddings": data["embeddings"]} if "embeddings" in data else {}
    return {**output, "like": data["vlm"], "align": "backbone", **kept}
