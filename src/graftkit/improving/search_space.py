"""What a search may change in a recipe: axes, from the ranges of knobs and the recipe's section `search:`.

    search:
      weight: {low: 0, high: 1.5}                 # a per-model knob: an axis for each model
      weight: {low: 0, high: 1.5, each: one}      # one for all; or groups of models by place: [[0, 1], [2]]
      weight: {low: 0, high: 1, gradient: 3}      # over the layers, three points for each model
      weight: {low: 0, high: 1, roles: [attention, mlp]}    # for each role by itself; other tensors keep the recipe's
      density: {low: 0.01, high: 1, log: true}
      scope: {values: [tensor, model]}            # one of a few
      dare.density: {low: 0.1, high: 0.9}         # a knob of a part under `prepare` or `finish`
      scale: 0.7                                  # fixed

Without the section every number with a range to search in is an axis: weights for each model, anything else for all.
Left out are a factor on a sum whose weights are searched, whole numbers, and what sets how exactly a method computes.
With the section only what it names is an axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit import methods
from graftkit.errors import RecipeError, unknown
from graftkit.methods.composition import Kind, get_part
from graftkit.methods.knobs import Knob
from graftkit.recipes.recipe import ROLES, Recipe, load

KEYS = ("low", "high", "log", "values", "each", "gradient", "roles")
PARTS: dict[str, Kind] = {"prepare": "preparation", "finish": "finisher"}

Value = float | int | str | bool

EXACTNESS = ("tolerance", "momentum", "ridge", "floor")
"""Knobs that set how exactly a method computes."""

NOTHING = 1e-9
"""What stands in a recipe for a weight of 0, under which a plan would refuse the model as useless."""


@dataclass(frozen=True)
class Axis:
    """One number or choice that a search sets: `models` at these places, in `role`, as point `point` of a gradient."""

    name: str
    knob: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    log: bool = False
    values: tuple[Value, ...] = ()
    models: tuple[int, ...] = ()
    role: str = ""
    point: int = -1

    def at(self, unit: float) -> Value:
        """The value at a place in [0, 1]."""
        place = min(max(float(unit), 0.0), 1.0)
        if self.values:
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        if self.log:
            found = math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + place * (self.high - self.low)
        return round(found) if self.whole else min(max(float(f"{found:.12g}"), self.low), self.high)

    def place(self, value: Value) -> float:
        """Where a value lies in [0, 1]."""
        if self.values:
            return (self.values.index(value) + 0.5) / len(self.values)
        number = min(max(float(value), self.low), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return ((math.log(number) if self.log else number) - low) / (high - low)


@dataclass(frozen=True)
class Space:
    """The axes of a search, and the recipe whose values they change."""

    recipe: Recipe
    axes: tuple[Axis, ...]

    def at(self, units: Iterable[float]) -> tuple[Value, ...]:
        """The values at a point of the unit cube."""
        return tuple(axis.at(unit) for axis, unit in zip(self.axes, units, strict=True))

    def place(self, values: Sequence[Value]) -> list[float]:
        """The point of the unit cube for values."""
        return [axis.place(value) for axis, value in zip(self.axes, values, strict=True)]

    def recipe_of(self, values: Sequence[Value]) -> Recipe:
        """The recipe with these values on its axes."""
        data, count = self.recipe.to_dict(), len(self.recipe.models)
        chosen: dict[Axis, Value] = {}
        for axis, value in zip(self.axes, values, strict=True):
            chosen[axis] = NOTHING if axis.knob == "weight" and value == 0 else value
        for knob, role in dict.fromkeys((axis.knob, axis.role) for axis in self.axes):
            own = {axis: value for axis, value in chosen.items() if (axis.knob, axis.role) == (knob, role)}
            _put(data, knob, role, _joined(own, count))
        return load(data).model_copy(update={"directory": self.recipe.directory})


def _joined(chosen: Mapping[Axis, Value], count: int) -> Any:
    """What stands under a knob: one value, a list by model, or the same of gradients."""
    if not any(axis.models for axis in chosen):
        return _points(list(chosen.items()))
    by_model: list[Any] = [None] * count
    for k in range(count):
        by_model[k] = _points([(axis, value) for axis, value in chosen.items() if k in axis.models])
    return by_model


def _points(chosen: list[tuple[Axis, Value]]) -> Any:
    if len(chosen) == 1 and chosen[0][0].point < 0:
        return chosen[0][1]
    return {"gradient": [value for _, value in sorted(chosen, key=lambda pair: pair[0].point)]}


def _put(data: dict[str, Any], knob: str, role: str, value: Any) -> None:
    """Writes a knob's value into a recipe's data; beside the models nothing is left of it."""
    part, _, name = knob.rpartition(".")
    if part:
        step = next(step for key in PARTS for step in data.get(key, []) if part in step)
        step[part] = {**step[part], name: value}
    elif role:
        data["rules"] = [*data.get("rules", []), {"where": {"role": role}, "knobs": {name: value}}]
    else:
        data["knobs"] = {**data.get("knobs", {}), name: value}
        data["models"] = [{k: v for k, v in model.items() if k != name} for model in data.get("models", [])]


def space_of(recipe: Recipe) -> Space:
    """The space of a recipe. Raises RecipeError for a section that names what there is not, or nothing to search."""
    section = recipe.search
    axes = tuple(_named(recipe, section) if section is not None else _default(recipe))
    if recipe.slices:
        raise RecipeError("recipe.slices: a search changes values of `models`; merge the slices first")
    if not axes:
        raise RecipeError(
            f"recipe: {recipe.method} has no number with a range to search in; name some under `search:`, such as "
            "{weight: {low: 0, high: 1}}"
        )
    return Space(_fixed(recipe, section or {}), axes)


def _fixed(recipe: Recipe, section: Mapping[str, Any]) -> Recipe:
    """The recipe with what the section fixes."""
    data = recipe.to_dict()
    for knob, given in section.items():
        if not isinstance(given, Mapping):
            _put(data, knob, "", given)
    return load(data).model_copy(update={"directory": recipe.directory})


def _default(recipe: Recipe) -> Iterator[Axis]:
    knobs = methods.get(recipe.method).knobs
    each = "weight" in knobs and knobs["weight"].per_model
    for name, knob in knobs.items():
        low, high = knob.range.search or (knob.range.low, knob.range.high)
        if knob.kind == "number" and math.isfinite(low) and math.isfinite(high) and name not in EXACTNESS:
            if not (name == "scale" and each):
                yield from _axes(recipe, name, knob, {"each": "model" if name == "weight" else "one"})
    for key, kind in PARTS.items():
        for part, given in ((part, given) for step in getattr(recipe, key) for part, given in step.items()):
            for name, knob in get_part(kind, part).knobs.items():
                if name == "density" and not isinstance(given.get(name), list):
                    yield from _axes(recipe, f"{part}.{name}", knob, {"each": "one"})


def _named(recipe: Recipe, section: Mapping[str, Any]) -> Iterator[Axis]:
    for name, given in section.items():
        knob = _knob(recipe, name)
        if isinstance(given, Mapping):
            yield from _axes(recipe, name, knob, given)
        elif not isinstance(given, (int, float, str, bool)):
            raise RecipeError(f"recipe.search.{name}: got {given!r}, expected a value, or a mapping such as {{low: 0}}")


def _knob(recipe: Recipe, name: str) -> Knob:
    part, _, own = name.rpartition(".")
    if not part:
        known = methods.get(recipe.method).knobs
    else:
        held = {p: kind for key, kind in PARTS.items() for step in getattr(recipe, key) for p in step}
        if part not in held:
            raise RecipeError(f"recipe.search.{name}: {unknown('part of this recipe', part, held)}")
        known = get_part(held[part], part).knobs
    if own not in known:
        raise RecipeError(f"recipe.search: {unknown(f'knob of {part or recipe.method}', own, known)}")
    return known[own]


def _axes(recipe: Recipe, name: str, knob: Knob, given: Mapping[str, Any]) -> Iterator[Axis]:
    """The axes of one knob: for each group of models, role and point of a gradient."""
    where = f"recipe.search.{name}"
    for key in given:
        if key not in KEYS:
            raise RecipeError(f"{where}: {unknown('key', key, KEYS)}")
    form = _form(knob, given, where)
    part = "." in name
    if part and (given.get("roles") or given.get("gradient")):
        raise RecipeError(f"{where}: knobs of parts are the same in all tensors; leave out roles and gradient")
    for role in _roles(given, where):
        for group in _groups(recipe, knob, given.get("each", "model" if knob.per_model and not part else "one"), where):
            for point in _gradient(given, where):
                told = [name, *(["+".join(map(str, group))] if group else []), *([role] if role else [])]
                yield Axis(
                    " ".join([*told, *([f"point {point}"] if point >= 0 else [])]), name, *form, group, role, point
                )


def _form(knob: Knob, given: Mapping[str, Any], where: str) -> tuple[float, float, bool, bool, tuple[Value, ...]]:
    """Low, high, whole, log and values."""
    if "values" in given:
        beside = [key for key in ("low", "high", "log") if key in given]
        if not isinstance(given["values"], list) or not given["values"] or beside:
            also = f" beside {', '.join(beside)}" if beside else ""
            raise RecipeError(
                f"{where}: got values {given['values']!r}{also}, expected a list of at least one value, or low and high"
            )
        values = tuple(knob.check(value, f"{where}.values") for value in given["values"])
        return 0.0, 1.0, False, False, values
    if knob.kind not in ("number", "integer"):
        return 0.0, 1.0, False, False, (knob.choices or (False, True))
    low, high = knob.range.search or (knob.range.low, knob.range.high)
    low, high = given.get("low", low), given.get("high", high)
    for key, value in (("low", low), ("high", high)):
        if key in given and (not isinstance(value, (int, float)) or math.isnan(value)):
            raise RecipeError(f"{where}.{key}: got {value!r}, expected a number")
        if not math.isfinite(value):
            raise RecipeError(f"{where}: {key} is missing, expected a number ({knob.name} has no end of its own there)")
        knob.check(value, f"{where}.{key}")
    log = bool(given.get("log", False))
    if not low < high or (log and low <= 0):
        raise RecipeError(f"{where}: got low {low} and high {high}, expected low < high" + (", 0 < low" if log else ""))
    return float(low), float(high), knob.kind == "integer", log, ()


def _groups(recipe: Recipe, knob: Knob, each: Any, where: str) -> list[tuple[int, ...]]:
    if each == "one" or (each == "model" and not knob.per_model):
        return [()]
    if each == "model":
        return [(k,) for k in range(len(recipe.models))]
    groups = (
        [tuple(group) for group in each] if isinstance(each, list) and all(isinstance(g, list) for g in each) else []
    )
    if not knob.per_model or sorted(k for group in groups for k in group) != list(range(len(recipe.models))):
        raise RecipeError(
            f"{where}.each: got {each!r}, expected one, model, or groups with each model once, such as [[0, 1], [2]]"
        )
    return groups


def _roles(given: Mapping[str, Any], where: str) -> list[str]:
    roles = given.get("roles") or [""]
    for role in roles:
        if role and role not in ROLES:
            raise RecipeError(f"{where}.roles: {unknown('role', str(role), ROLES)}")
    return list(roles)


def _gradient(given: Mapping[str, Any], where: str) -> list[int]:
    points = given.get("gradient")
    if points is None:
        return [-1]
    if not isinstance(points, int) or isinstance(points, bool) or not 2 <= points <= 16:
        raise RecipeError(f"{where}.gradient: got {points!r}, expected 2 to 16 points")
    return list(range(points))
