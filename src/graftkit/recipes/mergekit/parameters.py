"""mergekit's parameters as knobs and rules of ours.

There a value may stand at four levels, the nearest wins; it may be a list with filters, of which the first that is a
part of the tensor's name wins; and it may be a list of numbers, a gradient over the layers. Here a plain value stands
under `knobs` or beside its model, and each filter becomes a rule: the last that matches wins, so they are reversed.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftkit import methods
from graftkit.errors import RecipeError, nearest
from graftkit.recipes.mergekit.document import Parameters
from graftkit.recipes.mergekit.methods import ELSEWHERE, FORMER, METHODS, REQUIRED, Parameter, Theirs

Chain = tuple[tuple[str, Any], ...]
"""Filters and values, the first that matches wins; the filter "" matches every tensor."""

_SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NUMBERED = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class Said:
    """What the parameters of one section come to: `knobs`, what stands beside each of its models, and rules."""

    knobs: dict[str, Any] = field(default_factory=dict)
    beside: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """Where a parameter is looked for: the levels that all models share, and per model its own and its first layer."""

    own: tuple[Parameters, ...]
    shared: tuple[Parameters, ...]
    first_layers: tuple[int, ...]
    output_layer: int
    names: tuple[str, ...]
    where: str


def say(method: str, theirs: Theirs, given: Given, condition: Mapping[str, Any]) -> Said:
    """All parameters of one section. `condition` narrows its rules to it, where it is one of several slices."""
    said = Said(beside=[{} for _ in given.own])
    known = methods.get(theirs.ours).knobs
    for parameter in theirs.parameters:
        if not parameter.knob:
            continue
        if parameter.each == "shared" or not known[parameter.knob].per_model:
            _say_shared(parameter, given, known[parameter.knob].default, said, condition)
        else:
            _say_each(parameter, given, known[parameter.knob].default, said, condition)
    said.notes += _unused(method, given)
    return said


def constant(parameter: Parameter, levels: Iterable[Parameters], where: str) -> Any:
    """The one value of a parameter that holds for all tensors. Raises RecipeError where it has several."""
    chain = chain_of(parameter, levels, where)
    if any(condition for condition, _ in chain) or isinstance(chain[-1][1], Mapping):
        raise RecipeError(
            f"{where}: {parameter.name} has several values; it chooses the method here, so give one for all tensors"
        )
    return chain[-1][1]


def chain_of(parameter: Parameter, levels: Iterable[Parameters], where: str) -> Chain:
    """The values of a parameter in the order in which mergekit looks for them, up to the first that always holds.

    Where none does, the default follows; None for a parameter that has none, which the plan refuses where it is left.
    """
    found: list[tuple[str, Any]] = []
    for level in levels:
        for condition, value in _entries(parameter, level.get(parameter.name), where):
            found.append((condition, value))
            if not condition:
                return tuple(found)
    if not found and parameter.default is REQUIRED:
        raise RecipeError(f"{where}: {parameter.name} is missing, and mergekit has no default for it; give a value")
    default = None if parameter.default is REQUIRED else _become(parameter, parameter.default)
    return (*found, ("", default))


def _entries(parameter: Parameter, setting: Any, where: str) -> list[tuple[str, Any]]:
    """Filters and values of one level."""
    if setting is None or setting == []:
        return []
    place = f"{where}: {parameter.name}"
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not any(isinstance(item, Mapping) for item in setting):
        return [("", _value(parameter, setting, place))]
    found = []
    for item in setting:
        if not isinstance(item, Mapping) or not {"value"} <= set(item) <= {"value", "filter"}:
            raise RecipeError(
                f"{place}: got {item!r}, expected a filter and a value, such as {{filter: mlp, value: 0.5}}"
            )
        condition = item.get("filter")
        if condition is not None and not isinstance(condition, str):
            raise RecipeError(f"{place}: got the filter {condition!r}, expected part of a tensor's name")
        found.append(("" if condition in (None, "*") else condition, _value(parameter, item["value"], place)))
    return found


def _value(parameter: Parameter, value: Any, where: str) -> Any:
    """A plain value or a gradient, in our form. Outside the layers mergekit takes the first value of a gradient."""
    if not isinstance(value, list):
        return _become(parameter, _plain(parameter, value, where))
    values = [_plain(parameter, item, where) for item in value]
    if not values:
        raise RecipeError(f"{where}: the list is empty; give it a value")
    if len(set(values)) == 1:
        return _become(parameter, values[0])
    if parameter.kind != "number":
        raise RecipeError(f"{where}: {value} changes over the layers, and here only numbers do; use filters")
    return {"gradient": values, "outside": values[0]}


def _become(parameter: Parameter, value: Any) -> Any:
    return parameter.becomes.get(value, value)


def _plain(parameter: Parameter, value: Any, where: str) -> Any:
    """One value as mergekit reads it: numbers may be in quotes, and switches may be words or 0 and 1."""
    if parameter.kind == "switch":
        word = str(value).lower() if isinstance(value, (bool, int, str)) else ""
        if word not in _SWITCHES:
            raise RecipeError(f"{where}: got {value!r}, expected true or false")
        return _SWITCHES[word]
    try:
        number = float(value) if isinstance(value, (bool, int, float, str)) else None
    except ValueError:
        number = None
    whole = number is not None and (parameter.kind == "number" or number.is_integer())
    if number is None or not whole:
        raise RecipeError(f"{where}: got {value!r}, expected {'a' if parameter.kind == 'number' else 'a whole'} number")
    return int(number) if parameter.kind == "integer" or type(value) is int else number


def _say_shared(parameter: Parameter, given: Given, default: Any, said: Said, condition: Mapping[str, Any]) -> None:
    """A knob that is the same for all models. One model's own level counts where the parameter is each model's."""
    levels = (*given.own[:1], *given.shared) if parameter.each != "shared" else given.shared
    *filtered, (_, last) = chain_of(parameter, levels, given.where)
    if last != default and (last is not None or parameter.default is REQUIRED):
        said.knobs[parameter.knob] = last
    for text, value in reversed(filtered):
        said.rules.append(_rule(text, condition, {parameter.knob: value}))


def _say_each(parameter: Parameter, given: Given, default: Any, said: Said, condition: Mapping[str, Any]) -> None:
    """A knob with a value for each model."""
    chains = [
        chain_of(parameter, (own, *given.shared), f"{given.where}: {name}")
        for own, name in zip(given.own, given.names, strict=True)
    ]
    lasts = [chain[-1][1] for chain in chains]
    if any(parameter.name in own for own in given.own) or len({repr(last) for last in lasts}) > 1:
        for beside, last in zip(said.beside, lasts, strict=True):
            beside[parameter.knob] = last
    elif lasts[0] != default:
        said.knobs[parameter.knob] = lasts[0]
    said.rules += _rules_of_each(
        parameter.knob, [_shifted(chain, k, given) for k, chain in enumerate(chains)], condition
    )


def _rules_of_each(knob: str, chains: Sequence[Chain], condition: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rules with a value for each model that has the filters in question, and none for the others."""
    orders = dict.fromkeys(tuple(text for text, _ in chain) for chain in chains)
    rules = []
    for order in orders:
        having = [tuple(text for text, _ in chain) == order for chain in chains]
        for place in reversed(range(len(order) - 1)):
            values = [chain[place][1] if has else None for chain, has in zip(chains, having, strict=True)]
            same = all(having) and len({repr(value) for value in values}) == 1
            rules.append(_rule(order[place], condition, {knob: values[0] if same else values}))
    return rules


def _shifted(chain: Chain, model: int, given: Given) -> Chain:
    """A model's filters, which are parts of its own names, for the output's, where its layers have other numbers."""
    shift = given.output_layer - given.first_layers[model]
    return tuple((_NUMBERED.sub(lambda m: str(int(m[0]) + shift), text), value) for text, value in chain)


def _rule(text: str, condition: Mapping[str, Any], knobs: dict[str, Any]) -> dict[str, Any]:
    return {"where": {"name": f"*{glob.escape(text)}*", **condition}, "knobs": knobs, "optional": True}


def _unknown(name: str, method: str, theirs: Theirs) -> str:
    known = [parameter.name for parameter in theirs.parameters]
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known) or 'none'}"
    return f"mergekit has no parameter {name!r} in {method}, and would ignore it; {hint}"


def _unused(method: str, given: Given) -> list[str]:
    """Notes on parameters that mergekit passes over here. Raises RecipeError for what no method of its has."""
    theirs, told = METHODS[method], []
    for name in dict.fromkeys(name for level in (*given.own, *given.shared) for name in level):
        parameter = theirs.parameter(name)
        if parameter is None and name not in ELSEWHERE | FORMER:
            raise RecipeError(f"{given.where}: " + _unknown(str(name), method, theirs))
        if parameter is None or (not parameter.knob and name in ("int8_mask", "eps", "density", "rescale")):
            told.append(f"{name} changes nothing in {method}, in mergekit neither")
        elif parameter.each == "shared" and any(name in own for own in given.own):
            told.append(f"{name} beside a model changes nothing; mergekit reads it under the recipe's parameters")
    return told
