"""A recipe: what is wanted, as YAML or as Python objects. Strict: what is not understood is refused.

method: ties
base: path or hub id
models:
  - {model: experts/math, weight: 0.6}     # a per-model knob stands beside its model
  - {model: experts/code, weight: 0.4}
knobs: {density: 0.2}
rules:                                     # later rules win
  - where: {role: mlp, layers: 0-11}
    method: task_arithmetic
output: {dtype: bfloat16, like: base}
seed: 0
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from graftkit.errors import RecipeError, nearest

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
DEEPEST = 99_999  # the largest number of a layer
ROLES = ("attention", "mlp", "embedding", "head", "norm", "other")
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ModelEntry(BaseModel):
    """One model and the values of its per-model knobs, which the plan checks against the method."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    model: str = Field(min_length=1)

    @property
    def knobs(self) -> dict[str, Any]:
        """The values that stand beside the model."""
        return dict(self.model_extra or {})


class Where(BaseModel):
    """Which output tensors a rule is for: all conditions that are given must hold."""

    model_config = STRICT
    name: str | list[str] | None = None
    role: Literal["attention", "mlp", "embedding", "head", "norm", "other"] | list[str] | None = None
    layers: int | str | list[int] | None = None

    @field_validator("role")
    @classmethod
    def _known_roles(cls, value: Any) -> Any:
        for role in value if isinstance(value, list) else []:
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
        return value

    @property
    def layer_numbers(self) -> frozenset[int] | None:
        """The layers meant, counted in the output; None for any."""
        if self.layers is None:
            return None
        if isinstance(self.layers, list):
            return frozenset(self.layers)
        parts = str(self.layers).replace(" ", "").split(",")
        return frozenset(n for part in parts for n in _span(part))

    @model_validator(mode="after")
    def _sound(self) -> Where:
        if self.name is None and self.role is None and self.layers is None:
            raise ValueError("names no condition; give name, role or layers")
        _ = self.layer_numbers
        return self


def _span(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or not int(match[1]) <= int(match[2] or match[1]) <= DEEPEST:
        raise ValueError(f"layers are a number, a span such as 0-11, or a list, up to {DEEPEST}; got {text!r}")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


class Rule(BaseModel):
    """Another method or other knobs for some tensors; later rules win."""

    model_config = STRICT
    where: Where
    method: str | None = None
    knobs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.method is None and not self.knobs:
            raise ValueError("changes nothing; give it a method or knobs")
        return self


class Output(BaseModel):
    """The form of the result. `like` says whose names, config, tokenizer and untouched tensors it takes."""

    model_config = STRICT
    as_: Literal["checkpoint"] = Field("checkpoint", alias="as")
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    like: str | None = None
    shard: str = "5GB"

    @field_validator("shard")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int:
        """The most bytes of tensors in one file."""
        return parse_size(self.shard)


def parse_size(text: str) -> int:
    """Bytes of `"5GB"`, `"512MiB"` or `"1000"`. Raises ValueError for anything else or for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in SIZES or float(match[1]) <= 0:
        raise ValueError(f"a size is a number and B, KB, MB, GB, KiB, MiB or GiB, such as 5GB; got {text!r}")
    size = float(match[1]) * SIZES[match[2]]
    if size > 2**63:
        raise ValueError(f"a size is at most 8 EiB; got {text[:40]!r}")
    return int(size)


class Recipe(BaseModel):
    """A whole recipe. `directory` is where its relative paths start; it is not part of the YAML."""

    model_config = STRICT
    method: str
    base: str | None = None
    models: list[ModelEntry] = Field(min_length=1)
    knobs: dict[str, Any] = Field(default_factory=dict)
    rules: list[Rule] = Field(default_factory=list)
    output: Output = Field(default_factory=Output)  # type: ignore[arg-type]
    accept_base: bool = False
    seed: int = Field(0, ge=0, lt=2**64)
    directory: Path = Field(Path("."), exclude=True)

    @field_validator("models", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """A model may be given as a bare name."""
        return (
            [{"model": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data with defaults left out, the form that is hashed and recorded."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def to_yaml(self) -> str:
        """The recipe as YAML, in the order of the documentation."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def load(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe from a file's path, from YAML text with a line break in it, from a mapping, or as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _validated(dict(recipe), "recipe", Path("."))
    if isinstance(recipe, str) and "\n" in recipe:
        return _validated(_parse(recipe, "recipe"), "recipe", Path("."))
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: the recipe is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return _validated(_parse(text, str(path)), str(path), path.parent)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent's, after the check."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, (str, int, float)) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name if isinstance(name, (str, int, float)) else id(key))
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(  # YAML 1.1 takes 1e-3 for text
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: cannot be read ({str(error)[:200]})") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{where}: a recipe is a mapping with the keys method, base, models, ...; got {type(data).__name__}"
        )
    return data


def _validated(data: dict[str, Any], where: str, directory: Path) -> Recipe:
    if "directory" in data:
        raise RecipeError(f"{where}: unknown key 'directory'")
    try:
        return Recipe.model_validate({**data, "directory": directory})
    except ValidationError as error:
        raise RecipeError(_explain(error.errors()[0], where)) from error


_FIELDS: dict[str, type[BaseModel]] = {"": Recipe, "rules": Rule, "where": Where, "output": Output}


def _explain(fault: Any, where: str) -> str:
    """One pydantic error in the house's form: where, got what, expected what, what to do."""
    location = [part for part in fault["loc"] if part not in ("str", "list[str]", "int", "list[int]")]
    location = [p for p in location if not (isinstance(p, str) and p.startswith("literal["))]
    path = ".".join(str(p) for p in location).replace(".", "", 0)
    path = re.sub(r"\.(\d+)", r"[\1]", path)
    at = f"{where}: {path}" if path else where
    if fault["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(location, path)}"
    if fault["type"] == "missing":
        return f"{where}: the key {path!r} is missing"
    if fault["type"] == "value_error":
        return f"{at}: {fault['ctx']['error']}"
    if fault["type"] == "literal_error":
        close = nearest(str(fault["input"]), re.findall(r"'([^']+)'", fault["ctx"]["expected"]))
        hint = f"; did you mean {close!r}?" if close else ""
        return f"{at}: got {fault['input']!r}, expected {fault['ctx']['expected']}{hint}"
    expected = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{at}: got {fault['input']!r}; {expected}"


def _unknown_key(location: list[Any], path: str) -> str:
    parents = [p for p in location[:-1] if isinstance(p, str)]
    known = [
        f.alias or name
        for name, f in _FIELDS[parents[-1] if parents else ""].model_fields.items()
        if name != "directory"
    ]
    key = str(location[-1])
    close = nearest(key, known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}; a method's knobs stand under 'knobs'"
    return f"unknown key {path!r}; {hint}"
