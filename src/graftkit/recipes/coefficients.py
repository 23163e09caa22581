"""Values of per-model knobs that a rule or a file gives: `weight: {from: metagpt}`, `{from: nan}`, `{from: FILE}`.

A rule is fixed here, and its numbers are found from norms when the merge begins; a file is read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from graftkit.errors import PlanError, RecipeError, unknown
from graftkit.recipes.recipe import Recipe, StrictYaml

if TYPE_CHECKING:
    from graftkit.recipes.steps import Step

OPTIONS = {
    "metagpt": {"of": ("delta",), "scope": ("model", "layer", "tensor")},
    "nan": {"of": ("delta", "weight"), "scope": ("layer", "model", "tensor")},
}
"""What each rule leaves open, its default first."""


@dataclass(frozen=True)
class Rule:
    """`metagpt`: squared norms over their sum. `nan`: inverse norms over theirs. Of `delta` or `weight`, over `scope`.

    Both are multiplied by `scale`.
    """

    name: str
    of: str
    scope: str
    scale: float = 1.0

    def values(self, squares: Iterable[float]) -> list[float]:
        """The coefficients, from each model's squared norm; a model without a norm gets 0, or all the same."""
        found = list(squares)
        raw = [s if self.name == "metagpt" else s**-0.5 if s > 0 else 0.0 for s in found]
        total = sum(raw)
        return [self.scale * (r / total if total else 1 / len(raw)) for r in raw]


class Measured(tuple[float, ...]):
    """The values of a knob that a rule will find; until then all alike. `members` counts the recipe's models."""

    rule: Rule
    members: tuple[int, ...]

    @classmethod
    def by(cls, rule: Rule, members: Iterable[int]) -> Measured:
        """The values for some of the models."""
        chosen = tuple(members)
        made = cls((rule.scale / len(chosen),) * len(chosen))
        made.rule, made.members = rule, chosen
        return made

    def of(self, positions: Iterable[int]) -> Measured:
        """The values of some of its entries."""
        return Measured.by(self.rule, (self.members[k] for k in positions))

    def __str__(self) -> str:
        given = asdict(self.rule)
        return f"from {given.pop('name')} ({', '.join(f'{key} {value}' for key, value in given.items())})"


def picked(values: tuple[Any, ...], positions: Iterable[int]) -> tuple[Any, ...]:
    """The values of some of the models."""
    return values.of(positions) if isinstance(values, Measured) else tuple(values[k] for k in positions)


def given(value: Any, where: str, knob: str, recipe: Recipe, tensor: str) -> Any:
    """What stands under a knob: a rule as `Measured`, a file's numbers for this tensor, anything else as it is.

    Raises RecipeError for an unknown rule, option or file, and where a rule cannot give the knob's values.
    """
    if not isinstance(value, Mapping) or "from" not in value:
        return value
    name = value["from"]
    if name not in OPTIONS:
        return _from_file(value, where, recipe, tensor)
    if knob != "weight":
        raise RecipeError(f"{where}: {name} gives weights, and {knob!r} is none; give numbers, or {{from: FILE}}")
    if recipe.slices:
        raise RecipeError(f"{where}: {name} measures whole models, and `slices` takes parts of them; give numbers")
    return Measured.by(_rule(value, where), range(len(recipe.models)))


def _rule(value: Mapping[str, Any], where: str) -> Rule:
    options = OPTIONS[value["from"]]
    for key in value:
        if key not in ("from", "scale", *options):
            raise RecipeError(f"{where}: " + unknown(f"option of {value['from']}", key, (*options, "scale")))
    chosen = {key: value.get(key, choices[0]) for key, choices in options.items()}
    for key, choice in chosen.items():
        if choice not in options[key]:
            raise RecipeError(f"{where}.{key}: got {choice!r}, expected {' | '.join(options[key])}")
    scale = value.get("scale", 1.0)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) < 1e300:
        raise RecipeError(f"{where}.scale: got {scale!r}, expected a number")
    return Rule(value["from"], chosen["of"], chosen["scope"], float(scale))


def _from_file(value: Mapping[str, Any], where: str, recipe: Recipe, tensor: str) -> Any:
    path = recipe.directory / str(value["from"])
    if set(value) != {"from"} or not path.is_file():
        raise RecipeError(
            f"{where}: got {dict(value)!r}, expected {{from: metagpt}}, {{from: nan}} or {{from: FILE}} with a file of "
            f"coefficients; {str(path)!r} is none"
        )
    held = _read(path, path.stat().st_mtime_ns)
    chosen = held.get("values")
    for pattern, numbers in (held.get("tensors") or {}).items():
        if fnmatchcase(tensor, pattern):
            chosen = numbers
    if not isinstance(chosen, list):
        raise RecipeError(f"{where}: {path} has no values for {tensor!r}; give a list, one number per model")
    return chosen


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int) -> Mapping[str, Any]:
    """The content of a file of coefficients: `values: [..]` for all tensors, `tensors: {pattern: [..]}` for some."""
    try:
        held = yaml.load(path.read_text(encoding="utf-8"), StrictYaml)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as a file of coefficients ({str(error).splitlines()[0]})") from error
    if not isinstance(held, dict) or not set(held) <= {"values", "tensors"} or not held:
        raise RecipeError(f"{path}: a file of coefficients has the keys `values` and `tensors`, and no others")
    if not isinstance(held.get("tensors") or {}, dict):
        raise RecipeError(f"{path}: `tensors` maps patterns of names to lists, one number per model")
    return held


def told(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Values of knobs for people to read: a rule by its name, where there are no numbers yet."""
    return {name: str(value) if isinstance(value, Measured) else value for name, value in knobs.items()}


def measured(step: Step) -> list[tuple[str, Measured]]:
    """The knobs of a step whose values are still to be found."""
    return [(name, value) for name, value in step.knobs.items() if isinstance(value, Measured)]


def check(steps: Iterable[Step]) -> None:
    """Refuses a rule that measures what a step does not read. Raises PlanError."""
    for step in steps:
        for name, value in measured(step):
            whole = [part for part in step.models if part.kind not in ("base", "factors")]
            needs = whole if value.rule.of == "delta" else step.models
            if needs and step.base is None and (value.rule.of == "delta" or len(whole) < len(step.models)):
                raise PlanError(
                    f"{name} {value}: {step.name!r} is merged without a base, which the norms need; name it as `base:`,"
                    " or write a checkpoint"
                )
