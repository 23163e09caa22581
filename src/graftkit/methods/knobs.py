"""Kinds and ranges of hyperparameters ("knobs"), as they stand in the annotations of a method's signature.

`density: Annotated[PerModel, Range(0, 1)] = 0.2` says three things at once: one value or one per model, where it may
lie, and its default. Validation, the recipe's schema, help, documentation and the search space are read from there.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftkit.errors import RecipeError, nearest

LARGEST = 1e300  # beyond it no arithmetic is left

PerModel = float | Sequence[float]
"""A knob that takes one value for all models or one per model, in their order."""


@dataclass(frozen=True)
class Range:
    """Where a number may lie, ends included; `search` is the part that a search looks at (else all)."""

    low: float = -math.inf
    high: float = math.inf
    search: tuple[float, float] | None = None

    def __str__(self) -> str:
        left = "(-inf" if self.low == -math.inf else f"[{self.low:g}"
        right = "inf)" if self.high == math.inf else f"{self.high:g}]"
        return f"{left}, {right}"


@dataclass(frozen=True)
class Knob:
    """One hyperparameter: `kind` is `number`, `integer`, `choice` (of `choices`) or `switch`."""

    name: str
    kind: str
    default: Any
    range: Range
    per_model: bool
    choices: tuple[str, ...] = ()

    @property
    def describe(self) -> str:
        """What it accepts, in words."""
        if self.kind == "choice":
            return " | ".join(self.choices)
        if self.kind == "switch":
            return "true | false"
        return f"{self.kind} in {self.range}" + (", one or one per model" if self.per_model else "")

    def check(self, value: Any, where: str) -> Any:
        """The value, validated. Raises RecipeError that says where, what was given and what is accepted."""
        if self.per_model and isinstance(value, (list, tuple)):
            return tuple(self._check_one(item, f"{where}[{k}]") for k, item in enumerate(value))
        return self._check_one(value, where)

    def _check_one(self, value: Any, where: str) -> Any:
        if self.kind == "switch":
            good = isinstance(value, bool)
        elif self.kind == "choice":
            good = isinstance(value, str) and value in self.choices
        else:
            number = _is_number(value) and abs(value) <= LARGEST
            whole = self.kind != "integer" or (number and float(value).is_integer())
            good = number and whole and self.range.low <= value <= self.range.high
        if good:
            return float(value) if self.kind == "number" else int(value) if self.kind == "integer" else value
        close = nearest(value, self.choices) if isinstance(value, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        if _is_number(value) and LARGEST < abs(value) < math.inf:
            hint = f"; beyond {LARGEST:g} nothing is computed"
        raise RecipeError(f"{where}: got {value!r}, expected {self.describe}{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def knobs_of(function: Callable[..., Any]) -> dict[str, Knob]:
    """The knobs of a method: its keyword-only parameters, in order. Raises TypeError for one that cannot be read."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _knob(p) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _knob(parameter: inspect.Parameter) -> Knob:
    annotation, limits = parameter.annotation, Range()
    if isinstance(annotation, str):
        raise TypeError(
            f"knob {parameter.name!r}: annotations of knobs must be objects; drop `from __future__ import annotations`"
        )
    if parameter.default is inspect.Parameter.empty:
        raise TypeError(f"knob {parameter.name!r} has no default; every knob has one")
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *extras = typing.get_args(annotation)
        limits = next((extra for extra in extras if isinstance(extra, Range)), limits)
    name, default = parameter.name, parameter.default
    if typing.get_origin(annotation) is Literal:
        return Knob(name, "choice", default, limits, False, tuple(typing.get_args(annotation)))
    kinds = {bool: "switch", int: "integer", float: "number", PerModel: "number"}
    if annotation not in kinds:
        raise TypeError(f"knob {name!r}: {annotation!r} is none of float, int, bool, Literal, PerModel")
    return Knob(name, kinds[annotation], default, limits, annotation == PerModel)
