"""Which method with which knob values applies to each output tensor: defaults, then `knobs`, then the values beside
the models, then the rules, later ones winning; gradients over depth become one value per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit import methods
from graftkit.errors import PlanError, RecipeError, unknown
from graftkit.recipes import layout
from graftkit.recipes.recipe import Recipe

if TYPE_CHECKING:
    from graftkit.recipes.plan import Step


@dataclass(frozen=True)
class Setting:
    """A method's name and the values of all its knobs for one tensor; per-model knobs are tuples, one value a model."""

    method: str
    knobs: Mapping[str, Any]


def check_names(recipe: Recipe) -> None:
    """Refuses unknown methods and knobs, wherever they stand, before any model is opened."""
    known = [methods.get(recipe.method)]
    for r, rule in enumerate(recipe.rules):
        used = methods.get(rule.method) if rule.method else known[0]
        known.append(used)
        _check_known(rule.knobs, used.knobs, f"recipe.rules[{r}].knobs", used.name)
    _check_known(recipe.knobs, known[0].knobs, "recipe.knobs", recipe.method)
    everywhere = {name: knob for used in known for name, knob in used.knobs.items() if knob.per_model}
    for k, entry in enumerate(recipe.models):
        _check_known(entry.knobs, everywhere, f"recipe.models[{k}]", recipe.method, "per-model knob")


def _check_known(given: Mapping[str, Any], known: Iterable[str], where: str, method: str, what: str = "knob") -> None:
    for name in given:
        if name not in known:
            raise RecipeError(f"{where}: " + unknown(f"{what} of {method}", name, known))


def settings(recipe: Recipe, name: str, last_layer: int) -> Setting:
    """The method and knob values of one output tensor. Raises RecipeError for a value out of its range.

    `last_layer` is the number of the output's deepest layer, where gradients end.
    """
    chosen, given = recipe.method, {key: (value, f"recipe.knobs.{key}") for key, value in recipe.knobs.items()}
    beside = _beside(recipe)
    for r, rule in enumerate(recipe.rules):
        if not layout.matches(rule.where, name):
            continue
        if rule.method and rule.method != chosen:
            chosen = rule.method
            given = {key: item for key, item in given.items() if key in methods.get(chosen).knobs}
        given |= {key: (value, f"recipe.rules[{r}].knobs.{key}") for key, value in rule.knobs.items()}
        beside = {key: item for key, item in beside.items() if key not in rule.knobs}
    method, position = methods.get(chosen), _position(name, last_layer)
    given |= {key: item for key, item in beside.items() if key in method.knobs}
    values = {key: _value(knob, given.get(key), position, len(recipe.models)) for key, knob in method.knobs.items()}
    if values.get("normalize") and abs(sum(values["weight"])) <= 1e-12 * sum(map(abs, values["weight"])):
        where = given["weight"][1] if "weight" in given else "recipe.knobs.weight"
        raise RecipeError(f"{where}: the weights sum to zero, and {chosen} divides by their sum")
    if values.get("take", 0) >= len(recipe.models):
        raise RecipeError(
            f"{chosen}: take is {values['take']}, but there are {len(recipe.models)} models, counted from 0"
        )
    return Setting(chosen, values)


def _beside(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """Values beside models, as lists; a model without one takes the value under `knobs` or the default."""
    found: dict[str, tuple[Any, str]] = {}
    for key in dict.fromkeys(key for entry in recipe.models for key in entry.knobs):
        fallback = recipe.knobs.get(key, _Default)
        if isinstance(fallback, list) and len(fallback) != len(recipe.models):
            raise RecipeError(f"recipe.knobs.{key}: {len(fallback)} values for {len(recipe.models)} models")
        values = [
            entry.knobs.get(key, fallback[k] if isinstance(fallback, list) else fallback)
            for k, entry in enumerate(recipe.models)
        ]
        found[key] = (values, f"recipe.models[*].{key}")
    return found


class _Default:
    """Stands for a knob's default until the method is known."""


def _value(knob: Any, given: tuple[Any, str] | None, position: float, models: int) -> Any:
    value, where = given if given else (knob.default, f"default of {knob.name}")
    if isinstance(value, list) and knob.per_model:
        if len(value) != models:
            raise RecipeError(f"{where}: {len(value)} values for {models} models; give one value, or one per model")
        value = [
            knob.default if item is _Default else _at(item, position, f"{where}[{k}]") for k, item in enumerate(value)
        ]
    else:
        value = _at(value, position, where)
    checked = knob.check(value, where)
    return (checked,) * models if knob.per_model and not isinstance(checked, tuple) else checked


def _at(value: Any, position: float, where: str) -> Any:
    """A gradient's value at a relative depth in [0, 1], by straight lines between its points."""
    if not isinstance(value, Mapping):
        return value
    points: Any = value.get("gradient")
    good = set(value) == {"gradient"} and isinstance(points, list) and bool(points)
    if not good or not all(isinstance(p, (int, float)) and not isinstance(p, bool) and abs(p) < 1e300 for p in points):
        raise RecipeError(f"{where}: got {dict(value)!r}, expected a number or {{gradient: [0.2, 0.8]}}")
    place = position * (len(points) - 1)
    left = min(int(place), len(points) - 1)
    right = min(left + 1, len(points) - 1)
    return points[left] + (points[right] - points[left]) * (place - left)


def _position(name: str, last_layer: int) -> float:
    """Relative depth of a tensor: 0 in the first layer and before the stack, 1 in the last and after it."""
    number = layout.layer(name)
    if number is None:
        return 0.0 if layout.role(name) == "embedding" else 1.0
    return number / last_layer if last_layer else 0.0


def contributes(step: Step, k: int) -> bool:
    """Whether model `k` can change the result of a step: it is read, and its weight is not 0."""
    itself = step.base is not None and step.models[k] == step.base and "deltas" in methods.get(step.method).reads
    if step.models[k].kind == "base" or itself:
        return False
    weight = step.knobs.get("weight")
    take = step.knobs.get("take")
    return (weight is None or weight[k] != 0) and (take is None or take == k)


def check_rules_match(recipe: Recipe, names: Iterable[str]) -> None:
    """Refuses a rule whose condition holds for no tensor of the output."""
    listed = list(names)
    for r, rule in enumerate(recipe.rules):
        if not any(layout.matches(rule.where, name) for name in listed):
            condition = rule.where.model_dump(exclude_none=True)
            raise PlanError(
                f"recipe.rules[{r}].where: {condition} matches no tensor; names look like {listed[len(listed) // 2]!r}"
            )
