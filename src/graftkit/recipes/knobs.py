"""Which method with which knob values applies to each output tensor: defaults, then `knobs`, then the values beside
the models, then the rules, later ones winning; gradients over depth become one value per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit import methods
from graftkit.errors import PlanError, RecipeError, unknown
from graftkit.methods.composition import Kind, get_part
from graftkit.recipes import coefficients, layout
from graftkit.recipes.recipe import Recipe, Rule

KINDS: dict[Kind, str] = {"preparation": "prepare", "finisher": "finish"}
"""The keys of a recipe under which parts around the method stand."""

if TYPE_CHECKING:
    from graftkit.recipes.steps import Step


@dataclass(frozen=True)
class Chosen:
    """A preparation or a finisher for one tensor, and the values of its knobs."""

    name: str
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Depth:
    """Where a tensor lies for a gradient: its share of the way down, and whether it is `inside` the stack of layers."""

    share: float
    inside: bool = True


@dataclass(frozen=True)
class Setting:
    """A method's name and the values of all its knobs for one tensor; per-model knobs are tuples, one value a model."""

    method: str
    knobs: Mapping[str, Any]
    prepare: tuple[Chosen, ...] = ()
    finish: tuple[Chosen, ...] = ()


def check_names(recipe: Recipe) -> None:
    """Refuses unknown methods and knobs, wherever they stand, before any model is opened."""
    known = [_known_method(recipe.method, "recipe.method")]
    for kind in KINDS:
        _check_parts(kind, recipe, "recipe")
        for r, rule in enumerate(recipe.rules):
            _check_parts(kind, rule, f"recipe.rules[{r}]")
    for r, rule in enumerate(recipe.rules):
        if rule.where.slice is not None and rule.where.slice >= len(recipe.slices):
            raise RecipeError(
                f"recipe.rules[{r}].where.slice: got {rule.where.slice}, and the recipe has {len(recipe.slices)} "
                "slices, counted from 0"
            )
        used = _known_method(rule.method, f"recipe.rules[{r}].method") if rule.method else known[0]
        known.append(used)
        _check_known(rule.knobs, used.knobs, f"recipe.rules[{r}].knobs", used.name)
    _check_known(recipe.knobs, known[0].knobs, "recipe.knobs", recipe.method)
    for k, part in enumerate(recipe.slices):
        used = _known_method(part.method, f"recipe.slices[{k}].method") if part.method else known[0]
        known.append(used)
        _check_known(part.knobs, used.knobs, f"recipe.slices[{k}].knobs", used.name)
        beside = {
            name: knob for other in (used, *known[1 : len(recipe.rules) + 1]) for name, knob in other.knobs.items()
        }
        for n, source in enumerate(part.sources):
            place = f"recipe.slices[{k}].sources[{n}]"
            _check_known(
                source.knobs, [m for m, knob in beside.items() if knob.per_model], place, used.name, "per-model knob"
            )
    everywhere = {name: knob for used in known for name, knob in used.knobs.items() if knob.per_model}
    for k, entry in enumerate(recipe.models):
        _check_known(entry.knobs, everywhere, f"recipe.models[{k}]", recipe.method, "per-model knob")


def _known_method(name: str, where: str) -> methods.Method:
    try:
        return methods.get(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _check_known(given: Mapping[str, Any], known: Iterable[str], where: str, method: str, what: str = "knob") -> None:
    for name in given:
        if name not in known:
            raise RecipeError(f"{where}: " + unknown(f"{what} of {method}", name, known))


def settings(recipe: Recipe, name: str, last_layer: int) -> Setting:
    """The method and knob values of one output tensor. Raises RecipeError for a value out of its range.

    `last_layer` is the number of the output's deepest layer, where gradients end.
    """
    chosen, given = recipe.method, {key: (value, f"recipe.knobs.{key}") for key, value in recipe.knobs.items()}
    given |= _for_lookups(chosen, name)
    beside = _beside(recipe)
    for r, rule in enumerate(recipe.rules):
        if not layout.matches(rule.where, name):
            continue
        if rule.method and rule.method != chosen:
            chosen = rule.method
            given = {key: item for key, item in given.items() if key in methods.get(chosen).knobs}
            given |= _for_lookups(chosen, name)
        for key, value in rule.knobs.items():
            before = beside.pop(key, given.get(key, (_Default, "")))[0]
            given[key] = (_over(before, value), f"recipe.rules[{r}].knobs.{key}")
    method, position = methods.get(chosen), _position(name, last_layer)
    given |= {key: item for key, item in beside.items() if key in method.knobs}
    given = {
        key: (coefficients.given(item, where, key, recipe, name) if method.knobs[key].per_model else item, where)
        for key, (item, where) in given.items()
    }
    values = {key: _value(knob, given.get(key), position, len(recipe.models)) for key, knob in method.knobs.items()}
    if values.get("normalize") and abs(sum(values["weight"])) <= 1e-12 * sum(map(abs, values["weight"])):
        where = given["weight"][1] if "weight" in given else "recipe.knobs.weight"
        raise RecipeError(f"{where}: the weights sum to zero, and {chosen} divides by their sum")
    if values.get("take", 0) >= len(recipe.models):
        raise RecipeError(
            f"{chosen}: take is {values['take']}, but there are {len(recipe.models)} models, counted from 0"
        )
    prepare, finish = (_composed(recipe, kind, name, position) for kind in KINDS)
    return Setting(chosen, values, prepare, finish)


def _for_lookups(method: str, name: str) -> dict[str, tuple[Any, str]]:
    """What a method says of the knobs of embeddings and heads."""
    if layout.role(name) not in ("embedding", "head"):
        return {}
    return {
        key: (value, f"{method}'s own for embeddings and heads") for key, value in methods.get(method).lookups.items()
    }


def _check_parts(kind: Kind, section: Recipe | Rule, where: str) -> None:
    """Refuses unknown preparations or finishers, and unknown knobs of them."""
    for k, step in enumerate(getattr(section, KINDS[kind]) or []):
        for name, given in step.items():
            place = f"{where}.{KINDS[kind]}[{k}]"
            try:
                part = get_part(kind, name)
            except RecipeError as error:
                raise RecipeError(f"{place}: {error}") from None
            _check_known(given, part.knobs, place, name)


def _composed(recipe: Recipe, kind: Kind, name: str, position: Depth) -> tuple[Chosen, ...]:
    """The preparations or finishers of one tensor: the recipe's, or those of the last rule that says any."""
    key = KINDS[kind]
    steps, where = getattr(recipe, key), f"recipe.{key}"
    for r, rule in enumerate(recipe.rules):
        own = getattr(rule, key)
        if own is not None and layout.matches(rule.where, name):
            steps, where = own, f"recipe.rules[{r}].{key}"
    found = []
    for k, (part, given) in enumerate(pair for step in steps for pair in step.items()):
        places = {key: (value, f"{where}[{k}].{key}") for key, value in given.items()}
        knobs = get_part(kind, part).knobs
        values = {n: _value(knob, places.get(n), position, len(recipe.models)) for n, knob in knobs.items()}
        found.append(Chosen(part, values))
    return tuple(found)


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


def _over(before: Any, value: Any) -> Any:
    """A rule's value; where it is a list with nothing for a model, that model's value stays as it was."""
    if not isinstance(value, list) or None not in value:
        return value
    held = before if isinstance(before, list) else [before] * len(value)
    return [held[k] if item is None and k < len(held) else item for k, item in enumerate(value)]


class _Default:
    """Stands for a knob's default until the method is known."""


def _value(knob: Any, given: tuple[Any, str] | None, position: Depth, models: int) -> Any:
    value, where = given if given else (knob.default, f"default of {knob.name}")
    if isinstance(value, coefficients.Measured):
        return value
    if isinstance(value, list) and knob.per_model:
        if len(value) != models:
            raise RecipeError(f"{where}: {len(value)} values for {models} models; give one value, or one per model")
        value = [
            knob.default if item is _Default else at(item, position, f"{where}[{k}]") for k, item in enumerate(value)
        ]
    else:
        value = at(value, position, where)
    checked = knob.check(value, where)
    return (checked,) * models if knob.per_model and not isinstance(checked, tuple) else checked


def at(value: Any, depth: Depth, where: str) -> Any:
    """A gradient's value at a depth, by straight lines between its points; `outside` the layers it may have its own."""
    if not isinstance(value, Mapping):
        return value
    points: Any = value.get("gradient")
    good = {"gradient"} <= set(value) <= {"gradient", "outside"} and isinstance(points, list) and bool(points)
    numbers = [*points, value.get("outside", 0.0)] if good else []
    if not good or not all(isinstance(p, (int, float)) and not isinstance(p, bool) and abs(p) < 1e300 for p in numbers):
        raise RecipeError(
            f"{where}: got {dict(value)!r}, expected a number, {{gradient: [0.2, 0.8]}}, or the same with a number for "
            "what is `outside` the layers"
        )
    if not depth.inside and "outside" in value:
        return value["outside"]
    place = depth.share * (len(points) - 1)
    left = min(int(place), len(points) - 1)
    right = min(left + 1, len(points) - 1)
    return points[left] + (points[right] - points[left]) * (place - left)


def _position(name: str, last_layer: int) -> Depth:
    """The depth of a tensor: 0 in the first layer and before the stack, 1 in the last and after it."""
    number = layout.layer(name)
    if number is None:
        return Depth(0.0 if layout.role(name) == "embedding" else 1.0, False)
    return Depth(number / last_layer if last_layer else 1.0)


def contributes(step: Step, k: int) -> bool:
    """Whether model `k` can change the result of a step: it is read, and its weight is not 0."""
    itself = step.base is not None and step.models[k] == step.base and "deltas" in methods.get(step.method).reads
    if step.models[k].kind == "base" or itself:
        return False
    weight = step.knobs.get("weight")
    take = step.knobs.get("take")
    return (weight is None or weight[k] != 0) and (take is None or take == k)


def check_rules_match(recipe: Recipe, names: Iterable[str]) -> None:
    """Refuses a rule whose condition holds for no tensor of the output, unless it says that it is optional."""
    listed = list(names)
    for r, rule in enumerate(recipe.rules):
        if not rule.optional and not any(layout.matches(rule.where, name) for name in listed):
            condition = rule.where.model_dump(exclude_none=True)
            raise PlanError(
                f"recipe.rules[{r}].where: {condition} matches no tensor; names look like {listed[len(listed) // 2]!r}"
            )
