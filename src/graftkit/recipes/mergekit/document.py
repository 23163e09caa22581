"""A mergekit recipe (0.1.5) as it stands: its keys checked, its models named, its levels of parameters kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftkit.errors import RecipeError, nearest

TOP = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
       "tokenizer_source", "tokenizer", "chat_template", "name")  # fmt: skip
"""Keys of a whole recipe; `name` is mergekit-multi's."""

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One model of a section: its name in our form, its own parameters, and its layers `[a, b)` in a slice."""

    model: str
    parameters: Parameters
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Section:
    """A slice, or the whole model: its sources, the parameters that they share, nearest first, and its base."""

    sources: tuple[Source, ...]
    levels: tuple[Parameters, ...] = ()
    base: str | None = None
    base_layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Document:
    """A whole recipe. `sections` are its slices, or one section for all layers where `sliced` is false."""

    method: str
    base: str | None
    sections: tuple[Section, ...]
    sliced: bool
    rest: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a recipe is written in mergekit's form: by the keys that only mergekit has."""
    theirs = {"merge_method", "base_model", "modules", "parameters", "tokenizer_source", "out_dtype"}
    return "merge_method" in data or ("method" not in data and bool(theirs & set(data)))


def read(data: Mapping[str, Any], where: str) -> Document:
    """The parts of a mergekit recipe. Raises RecipeError for keys and shapes that mergekit does not have."""
    check_keys(data, TOP, where)
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise RecipeError(f"{where}: merge_method: got {method!r}, expected the name of one of mergekit's methods")
    forms = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(forms) != 1:
        found = " and ".join(forms) or "none"
        raise RecipeError(f"{where}: got {found}, expected exactly one of models, slices and modules")
    levels: tuple[Parameters, ...] = (_parameters(data.get("parameters"), f"{where}: parameters"),)
    body, notes, place = data, (), where  # type: Mapping[str, Any], tuple[str, ...], str
    if forms == ["modules"]:
        body, notes, place = _only_module(data["modules"], where)
        levels = (_parameters(body.get("parameters"), f"{place}.parameters"), *levels)
    base = reference(data["base_model"], f"{where}: base_model") if data.get("base_model") else None
    sliced = bool(body.get("slices"))
    sections = _slices(body["slices"], levels, place) if sliced else (_whole(body["models"], levels, place),)
    rest = {key: data[key] for key in TOP[6:11] if data.get(key) is not None}
    return Document(method, base, sections, sliced, rest, notes)


def reference(value: Any, where: str) -> str:
    """A model as mergekit names it (`path@revision+lora`, or a mapping with these parts) in our form."""
    if isinstance(value, Mapping) and "model" in value:
        check_keys(value, ("model", "lora", "override_architecture"), where)
        parts = [_path(value["model"], f"{where}.model")]
        parts += [_path(value["lora"], f"{where}.lora")] if value.get("lora") else []
        return "+".join(parts)
    name = _path(value, where)
    if name.count("+") > 1 or any(part.count("@") > 1 for part in name.split("+")):
        raise RecipeError(f"{where}: got {name!r}, expected a path or hub id, with at most one @revision and one +lora")
    return name


def _path(value: Any, where: str) -> str:
    if isinstance(value, Mapping) and "path" in value:
        check_keys(value, ("path", "revision"), where)
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{where}: got {value!r}, expected a path or a hub id")
    return value


def _only_module(modules: Any, where: str) -> tuple[Mapping[str, Any], tuple[str, ...], str]:
    """The one module of a recipe. Several are taken as one where they say the same."""
    if not isinstance(modules, Mapping) or not all(isinstance(part, Mapping) for part in modules.values()):
        raise RecipeError(f"{where}: modules: got {modules!r}, expected a mapping of modules")
    for name, part in modules.items():
        check_keys(part, ("slices", "models", "parameters"), f"{where}: modules.{name}")
        if bool(part.get("slices")) == bool(part.get("models")):
            raise RecipeError(f"{where}: modules.{name}: expected either slices or models")
    (first, *others) = modules.items()
    for name, part in others:
        if part != first[1]:
            raise RecipeError(
                f"{where}: modules.{name} differs from modules.{first[0]}: which tensors are of which module is "
                "mergekit's own knowledge of the architecture; write a recipe of ours with rules by tensor names"
            )
    note = "modules: {} are merged alike, as one model".format(", ".join(modules))
    return first[1], (note,) if others else (), f"{where}: modules.{first[0]}"


def _whole(models: Any, levels: tuple[Parameters, ...], where: str) -> Section:
    entries = _list(models, f"{where}: models")
    return Section(tuple(_source(entry, f"{where}: models[{k}]") for k, entry in enumerate(entries)), levels)


def _slices(slices: Any, levels: tuple[Parameters, ...], where: str) -> tuple[Section, ...]:
    found = []
    for k, part in enumerate(_list(slices, f"{where}: slices")):
        place = f"{where}: slices[{k}]"
        check_keys(part, ("sources", "base_model", "residual_weight", "parameters"), place)
        entries = _list(part.get("sources"), f"{place}.sources")
        sources = tuple(_sliced(entry, f"{place}.sources[{n}]") for n, entry in enumerate(entries))
        base = reference(part["base_model"], f"{place}.base_model") if part.get("base_model") else None
        found.append(Section(sources, (_parameters(part.get("parameters"), f"{place}.parameters"), *levels), base))
    return tuple(found)


def _source(entry: Any, where: str) -> Source:
    check_keys(entry, ("model", "parameters"), where)
    own = _parameters(entry.get("parameters"), f"{where}.parameters")
    return Source(reference(entry.get("model"), f"{where}.model"), own)


def _sliced(entry: Any, where: str) -> Source:
    check_keys(entry, ("model", "parameters", "layer_range"), where)
    layers = entry.get("layer_range")
    whole = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
    if not whole or not 0 <= layers[0] < layers[1]:
        raise RecipeError(f"{where}.layer_range: got {layers!r}, expected [first, one after the last], such as [0, 12]")
    own = _parameters(entry.get("parameters"), f"{where}.parameters")
    return Source(reference(entry.get("model"), f"{where}.model"), own, (layers[0], layers[1]))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: got {value!r}, expected a list of models or slices, with their keys")
    return value


def _parameters(value: Any, where: str) -> Parameters:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: got {value!r}, expected a mapping of parameters, such as {{weight: 0.5}}")
    return value


def check_keys(value: Any, known: tuple[str, ...], where: str) -> None:
    """Refuses what mergekit passes over in silence: a key that does not exist."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: got {value!r}, expected a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            close = nearest(str(key), known)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
            raise RecipeError(f"{where}: mergekit has no key {key!r} here, and would ignore it; {hint}")
