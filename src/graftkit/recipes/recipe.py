"""A recipe: what is wanted, as YAML or as Python objects. Strict: what is not understood is refused.

method: ties
base: path or hub id
models:
  - {model: experts/math, weight: 0.6}     # a per-model knob stands beside its model
  - {model: experts/code, weight: 0.4}
prepare: [{dare: {density: 0.5}}]          # deltas to deltas, before the method
knobs: {density: 0.2}
gates: gates.safetensors                   # for methods that read gates
finish: [svc]                              # the merged delta, after it
rules:                                     # later rules win
  - where: {role: mlp, layers: 0-11}
    method: task_arithmetic
output: {dtype: bfloat16, like: base}
seed: 0
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from graftkit.errors import RecipeError, nearest
from graftkit.recipes import chat_templates, vlm
from graftkit.recipes.parts import Steps
from graftkit.recipes.ranks import Energy, Outside, Rank, checked
from graftkit.recipes.sections import STRICT, Slice, SliceBase, Tokenizer, TokenRow, parse_size

DEEPEST = 99_999  # the largest number of a layer
MOST_VALUES = 100_000  # in a recipe, its anchors written out
ROLES = ("attention", "mlp", "embedding", "head", "norm", "other")


class ModelEntry(BaseModel):
    """One model and the values of its per-model knobs, which the plan checks against the method.

    `data`: a file of examples of the model's domain, for what is measured with examples.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    model: str = Field(min_length=1)
    data: str | None = None

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
    slice: int | None = Field(None, ge=0)

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
        if self.name is None and self.role is None and self.layers is None and self.slice is None:
            raise ValueError("names no condition; give name, role, layers or slice")
        _ = self.layer_numbers
        return self


def _span(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or not int(match[1]) <= int(match[2] or match[1]) <= DEEPEST:
        raise ValueError(f"layers are a number, a span such as 0-11, or a list, up to {DEEPEST}; got {text!r}")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


class Rule(BaseModel):
    """Another method or other knobs for some tensors; later rules win. An `optional` one may be for no tensor."""

    model_config = STRICT
    where: Where
    method: str | None = None
    knobs: dict[str, Any] = Field(default_factory=dict)
    prepare: Steps | None = None
    finish: Steps | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.method is None and not self.knobs and self.prepare is None and self.finish is None:
            raise ValueError("changes nothing; give it a method, knobs, prepare or finish")
        return self


class Output(BaseModel):
    """The form of the result. `like` says whose names, config, tokenizer and untouched tensors it takes."""

    model_config = STRICT
    as_: Literal["checkpoint", "adapter"] = Field("checkpoint", alias="as")
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    like: str | None = None
    align: Literal["backbone"] | None = None
    embeddings: Literal["keep", "shared-rows"] | None = None
    shard: str = "5GB"
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    rank: Rank | None = None
    outside: Outside | None = None

    @field_validator("rank", mode="before")
    @classmethod
    def _known_rank(cls, value: Any) -> Any:
        return checked(value)

    @model_validator(mode="after")
    def _of_one_form(self) -> Output:
        whole = ("like", "align", "embeddings", "shard", "tokenizer", "chat_template")
        theirs = {"checkpoint": ("rank", "outside"), "adapter": whole}[self.as_]
        wrong = [name for name in theirs if name in self.model_fields_set and getattr(self, name) is not None]
        if wrong:
            other = "as: adapter" if self.as_ == "checkpoint" else "as: checkpoint"
            raise ValueError(f"{wrong[0]!r} is for `{other}`, and this output is `as: {self.as_}`; drop one of the two")
        return self

    @model_validator(mode="after")
    def _of_one_model(self) -> Output:
        if self.align and not self.like:
            raise ValueError("'align' is for the backbone of a model; name it as `like`")
        if self.embeddings and not self.align:
            raise ValueError("'embeddings' says what an aligned backbone's are; say `align: backbone`, or drop it")
        if self.align and self.tokenizer:
            raise ValueError(
                "'tokenizer' chooses a vocabulary, and an aligned backbone keeps its own; drop one of the two"
            )
        return self

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """The source alone may be given, as a bare name."""
        return {"source": value} if isinstance(value, str) else value

    @field_validator("chat_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        return None if value is None else chat_templates.check(value)

    @field_validator("shard")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int:
        """The most bytes of tensors in one file."""
        return parse_size(self.shard)


class Recipe(BaseModel):
    """A whole recipe. `directory` is where its relative paths start; it is not part of the YAML."""

    model_config = STRICT
    method: str
    base: str | None = None
    models: list[ModelEntry] = Field(default_factory=list, min_length=1)
    slices: list[Slice] = Field(default_factory=list)
    prepare: Steps = Field(default_factory=list)
    knobs: dict[str, Any] = Field(default_factory=dict)
    gates: str | None = None
    statistics: str | None = None
    finish: Steps = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)
    output: Output = Field(default_factory=Output)  # type: ignore[arg-type]
    accept_base: bool = False
    seed: int = Field(0, ge=0, lt=2**64)
    search: dict[str, Any] | None = Field(None, exclude=True)  # for `graft search`; a merge leaves it alone
    notes: list[str] = Field(default_factory=list)
    directory: Path = Field(Path("."), exclude=True)

    @field_validator("models", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """A model may be given as a bare name."""
        return (
            [{"model": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _models_or_slices(self) -> Recipe:
        if self.models and self.slices:
            raise ValueError("has both models and slices; a slice names its own sources, so drop `models`")
        if self.output.align and self.slices:
            raise ValueError("has both slices and `output.align`; a backbone keeps its layers, so drop one of the two")
        if not self.models and not self.slices:
            raise ValueError("the key 'models' is missing, expected a list of at least one model, or `slices`")
        return self

    @property
    def listed(self) -> list[str]:
        """The models by name, as often as they are listed: those of `models`, or of the slices in their order."""
        return [entry.model for entry in self.models] + [
            source.model for part in self.slices for source in part.sources
        ]

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


class StrictYaml(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error instead of a silent choice, and anchors do not explode."""

    def get_single_node(self) -> yaml.Node | None:
        """As the parent's, after the check."""
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MOST_VALUES:
            fault = f"its anchors are more than {MOST_VALUES} values written out, or one holds itself"
            raise yaml.constructor.ConstructorError(None, None, fault, node.start_mark)
        return node

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


StrictYaml.add_implicit_resolver(  # YAML 1.1 takes 1e-3 for text
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a piece of YAML is with its anchors written out; one that holds itself has no end."""
    if id(node) not in known:
        known[id(node)] = math.inf
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        known[id(node)] = 1 + sum(_written_out(one, known) for one in inner)
    return known[id(node)]


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=StrictYaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        fault = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{where}{place}: not valid YAML: {fault}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: cannot be read ({str(error)[:200]})") from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else type(data).__name__
        raise RecipeError(f"{where}: a recipe is a mapping with the keys method, base, models, ...; got {got}")
    return data


def _validated(data: dict[str, Any], where: str, directory: Path) -> Recipe:
    if "directory" in data:
        raise RecipeError(f"{where}: unknown key 'directory'")
    if "method" not in data or "merge_method" in data:
        from graftkit.recipes import mergekit  # a package of its own, for recipes of its kind only

        data = mergekit.translated(data, where) if mergekit.is_mergekit(data) else data
    if vlm.KEYS & data.keys():
        data = vlm.expanded(data, where)
    try:
        return Recipe.model_validate({**data, "directory": directory})
    except ValidationError as error:
        raise RecipeError(_explain(error.errors()[0], where)) from error


_FIELDS: dict[str, type[BaseModel]] = {
    "": Recipe, "rules": Rule, "where": Where, "output": Output, "slices": Slice,
    "base": SliceBase, "tokenizer": Tokenizer, "tokens": TokenRow, "rank": Energy,
}  # fmt: skip


EXPECTED = {
    "method": "the name of a method, such as ties",
    "base": "a path or a hub id",
    "models": "a list of at least one model",
    "models[]": "a path, a hub id, the file of a recipe, or a mapping with the key 'model'",
    "models[].model": "a path, a hub id or the file of a recipe",
    "knobs": "a mapping of a method's knobs, such as {density: 0.2}",
    "gates": "the path of a file of gates",
    "statistics": "the directory that `graft statistics` fills, by default `statistics` beside the recipe",
    "rules": "a list of rules",
    "rules[]": "a mapping such as {where: {role: mlp}, knobs: {scale: 0.5}}",
    "rules[].where": "a mapping with name, role or layers",
    "rules[].where.name": "a pattern such as '*.mlp.*', or a list of them",
    "rules[].where.role": f"one or a list of {', '.join(ROLES)}",
    "rules[].where.layers": "a number, a span such as 0-11, or a list of numbers",
    "rules[].method": "the name of a method, such as ties",
    "rules[].knobs": "a mapping of a method's knobs, such as {density: 0.2}",
    "output": "a mapping such as {dtype: bfloat16}",
    "output.like": "`base`, or one of the recipe's models",
    "output.align": "backbone: the other models are merged into the language backbone of `like`",
    "output.embeddings": "keep or shared-rows",
    "output.shard": "a size such as 5GB",
    "output.chat_template": "auto, the name of a template, or Jinja text",
    "output.tokenizer": "base, union, one of the recipe's models, or a mapping with the key 'source'",
    "slices": "a list of slices",
    "slices[]": "a mapping such as {sources: [{model: a, layer_range: [0, 12]}]}",
    "slices[].sources": "a list of at least one mapping such as {model: a, layer_range: [0, 12]}",
    "slices[].sources[].model": "a path, a hub id or the file of a recipe",
    "slices[].sources[].layer_range": "[first, one after the last], such as [0, 12]",
    "slices[].base": "a mapping such as {model: a, layer_range: [0, 12]}",
    "slices[].base.layer_range": "[first, one after the last], such as [0, 12]",
    "accept_base": "true or false",
    "seed": "a whole number from 0 to 2^64 - 1",
    "search": "a mapping from knobs to what a search may choose, such as {weight: {low: 0, high: 1.5}}",
}
"""What the recipe's keys take, in words."""

_KINDS = {
    "string": "text", "list": "a list", "dict": "a mapping", "model": "a mapping", "int": "a whole number",
    "float": "a number", "bool": "true or false",
}  # fmt: skip
"""The same for any other key, by the first word of pydantic's name of the fault."""


def _explain(fault: Any, where: str) -> str:
    """One pydantic error in the house's form: where, got what, expected what, what to do."""
    location = [part for part in fault["loc"] if part not in ("str", "list[str]", "int", "list[int]")]
    location = [p for p in location if not (isinstance(p, str) and p.startswith("literal["))]
    path = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(p) for p in location))
    at = f"{where}: {path}" if path else where
    if fault["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(location, path)}"
    if fault["type"] == "value_error":
        return f"{at}: {fault['ctx']['error']}"
    if fault["type"] == "invalid_key" or location[-1:] == ["[key]"]:
        return f"{where}: the key {fault['input']!r} is not text; write it in quotes"
    kind = _KINDS.get(fault["type"].partition("_")[0], "another value")
    expected = EXPECTED.get(re.sub("[0-9]+", "", path), kind)
    if fault["type"] == "missing":
        close = nearest(str(location[-1]), map(str, fault["input"])) if isinstance(fault["input"], dict) else None
        hint = f"; is {close!r} meant to be it?" if close else ""
        return f"{where}: the key {path!r} is missing, expected {expected}{hint}"
    got = "nothing" if fault["input"] is None else repr(fault["input"])
    return f"{at}: got {got if len(got) <= 200 else got[:200] + '...'}, expected {_choices(fault) or expected}"


def _choices(fault: Any) -> str:
    """The values of a key that takes one of a few, and the nearest."""
    if fault["type"] != "literal_error":
        return ""
    close = nearest(str(fault["input"]), re.findall(r"'([^']+)'", fault["ctx"]["expected"]))
    return str(fault["ctx"]["expected"]) + (f"; did you mean {close!r}?" if close else "")


def _unknown_key(location: list[Any], path: str) -> str:
    parents = [p for p in location[:-1] if isinstance(p, str)]
    section = "tokens" if "tokens" in parents else parents[-1] if parents else ""
    known = [f.alias or name for name, f in _FIELDS[section].model_fields.items() if name != "directory"]
    known += [] if section else sorted(vlm.KEYS)
    key = str(location[-1])
    close = nearest(key, known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}; a method's knobs stand under 'knobs'"
    return f"unknown key {path!r}; {hint}"
