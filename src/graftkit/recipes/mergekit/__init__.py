"""mergekit's YAML (0.1.5) as a recipe of ours: translated, and run like any other.

What mergekit does and we would not (weights before the election, rescaling by L1 norms, floors) is kept, by knobs, and
stands in the recipe's `notes`. What has no counterpart here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftkit.errors import RecipeError, unknown
from graftkit.recipes.mergekit.document import Document, Section, Source, is_mergekit, read
from graftkit.recipes.mergekit.methods import METHODS, Theirs
from graftkit.recipes.mergekit.parameters import Given, Said, constant, say
from graftkit.recipes.mergekit.tokenizer import tokenizer_of

__all__ = ["is_mergekit", "translated"]

DTYPES = ("float32", "float16", "bfloat16")


def translated(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A mergekit recipe in our form, as plain data. Raises RecipeError for what has no counterpart."""
    document = read(data, where)
    if document.method not in METHODS:
        raise RecipeError(f"{where}: merge_method: " + unknown("method of mergekit", document.method, METHODS))
    theirs = METHODS[document.method]
    base = _base(document, theirs, where)
    sections = [_with_base(section, theirs, base, where) for section in document.sections]
    parts = _say(document, theirs, sections, where)
    recipe = {
        "method": _ours(document, theirs, where),
        "base": _named_base(theirs, base, sections),
        **_body(document.sliced, parts),
        "rules": [rule for _, said in parts for rule in said.rules],
        "output": _output(document, theirs, base, where),
        "notes": _notes(document, theirs, [said for _, said in parts]),
    }
    recipe["knobs"] = {**theirs.fixed, **recipe.get("knobs", {})}
    order = ("method", "base", "models", "slices", "knobs", "rules", "output", "notes")
    return {key: recipe[key] for key in order if recipe.get(key) not in (None, {}, [])}


def _base(document: Document, theirs: Theirs, where: str) -> str | None:
    """The base of all sections."""
    own = {section.base or document.base for section in document.sections}
    if len(own) > 1:
        raise RecipeError(
            f"{where}: base_model: slices have different bases ({', '.join(sorted(map(str, own)))}), and here all have "
            "one; write a recipe of ours, with `base:` in its slices"
        )
    base = own.pop()
    if base is None and theirs.base in ("required", "first"):
        raise RecipeError(f"{where}: base_model is missing; {document.method} needs it")
    return base


def _named_base(theirs: Theirs, base: str | None, sections: list[Section]) -> str | None:
    """Our recipe's base. A method that works without one is given the model that adapters stand on, to read them there.

    Our karcher works on deltas where there is a base, and mergekit's does not.
    """
    if theirs.ours == "karcher":
        return None
    below = [
        source.model.partition("+")[0] for section in sections for source in section.sources if "+" in source.model
    ]
    return base or (below[0] if below and theirs.base == "model" else None)


def _with_base(section: Section, theirs: Theirs, base: str | None, where: str) -> Section:
    """A section as our method takes it: the base first among its models, or beside them."""
    own = next((source for source in section.sources if source.model == base), None)
    others = [source for source in section.sources if source is not own]
    if len({source.model for source in others}) < len(others) or any(source.model == base for source in others):
        raise RecipeError(f"{where}: a model stands twice among those that are merged; give it once")
    sliced = section.sources[0].layers is not None
    if base and own is None and sliced and theirs.base != "model":
        raise RecipeError(f"{where}: slices: the base, {base!r}, is not among the sources of each; give its layers too")
    if base and not sliced:
        own = own or Source(base, {})
    if own and theirs.base in ("model", "first"):
        others = [own, *others]
    _check_count(theirs, len(others), where)
    return Section(tuple(others), section.levels, base, own.layers if own else None)


def _check_count(theirs: Theirs, count: int, where: str) -> None:
    low, high = theirs.count
    if not low <= count <= (high or count):
        wanted = f"exactly {low}" if low == high else f"at least {low}"
        models = ("model" if low == 1 else "models") + ("" if theirs.base in ("model", "first") else " beside the base")
        raise RecipeError(f"{where}: merge_method: the method takes {wanted} {models}, got {count}")


def _ours(document: Document, theirs: Theirs, where: str) -> str:
    """Our method; switches may choose a variant."""
    chosen = {
        tuple(constant(parameter, section.levels, where) for parameter in theirs.switches)
        for section in document.sections
    }
    if len(chosen) > 1:
        names = ", ".join(parameter.name for parameter in theirs.switches)
        raise RecipeError(f"{where}: {names}: slices differ in it, and it chooses the method here; give one for all")
    return theirs.variants.get(chosen.pop(), theirs.ours)


def _say(document: Document, theirs: Theirs, sections: list[Section], where: str) -> list[tuple[Section, Said]]:
    """Each section with what its parameters come to, without models of no weight."""
    parts, layer = [], 0
    for k, section in enumerate(sections):
        sources, several = section.sources, len(sections) > 1
        given = Given(
            tuple(source.parameters for source in sources),
            section.levels,
            tuple(source.layers[0] if source.layers else 0 for source in sources),
            layer,
            tuple(source.model for source in sources),
            f"{where}: slices[{k}]" if document.sliced else where,
        )
        said = say(document.method, theirs, given, {"slice": k} if several else {})
        parts.append(_without_idle(section, said) if theirs.ours != "nuslerp" else (section, said))
        layer += sources[0].layers[1] - sources[0].layers[0] if sources[0].layers else 0
    return parts


def _without_idle(section: Section, said: Said) -> tuple[Section, Said]:
    """A section without the models whose weight is 0 everywhere: mergekit reads them for nothing."""
    lists = [rule["knobs"]["weight"] for rule in said.rules if "weight" in rule["knobs"]]

    def idle(k: int) -> bool:
        others = [values[k] if isinstance(values, list) else values for values in lists]
        return said.beside[k].get("weight") == 0 and not any(others)

    kept = [k for k in range(len(section.sources)) if not idle(k)]
    if not kept or len(kept) == len(section.sources):
        return section, said
    for rule in said.rules:
        for knob, values in rule["knobs"].items():
            rule["knobs"][knob] = [values[k] for k in kept] if isinstance(values, list) else values
    gone = [source.model for k, source in enumerate(section.sources) if k not in kept]
    said.notes.append(f"{', '.join(gone)}: left out, for the weight is 0")
    said.beside = [said.beside[k] for k in kept]
    return replace(section, sources=tuple(section.sources[k] for k in kept)), said


def _body(sliced: bool, parts: list[tuple[Section, Said]]) -> dict[str, Any]:
    """The models or slices, with what stands beside them."""
    if not sliced:
        ((section, said),) = parts
        pairs = zip(section.sources, said.beside, strict=True)
        return {"models": [{"model": source.model, **beside} for source, beside in pairs], "knobs": said.knobs}
    slices = []
    for section, said in parts:
        pairs = zip(section.sources, said.beside, strict=True)
        made: dict[str, Any] = {
            "sources": [{"model": s.model, "layer_range": list(s.layers or ()), **beside} for s, beside in pairs]
        }
        if section.base_layers and section.base not in [source.model for source in section.sources]:
            made["base"] = {"layer_range": list(section.base_layers)}
        slices.append({**made, "knobs": said.knobs} if said.knobs else made)
    return {"slices": slices}


def _output(document: Document, theirs: Theirs, base: str | None, where: str) -> dict[str, Any]:
    """The form of the result."""
    rest = document.rest
    names = {key: str(rest[key]).removeprefix("torch.") for key in ("dtype", "out_dtype") if key in rest}
    dtype = names.get("out_dtype", names.get("dtype"))
    if dtype is not None and dtype not in DTYPES:
        key = "out_dtype" if "out_dtype" in names else "dtype"
        raise RecipeError(f"{where}: {key}: got {dtype!r}; outputs are {', '.join(DTYPES)}")
    found = {
        "dtype": dtype,
        "like": base if theirs.ours == "karcher" else None,
        "tokenizer": tokenizer_of(rest, where),
        "chat_template": rest.get("chat_template"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _notes(document: Document, theirs: Theirs, said: list[Said]) -> list[str]:
    """What a reader of the recipe should know: what is kept for mergekit's sake, and what is better here."""
    notes = [*document.notes, *theirs.notes]
    levels = [*document.sections[0].levels, *(s.parameters for part in document.sections for s in part.sources)]
    if (
        theirs.parameter("density")
        and theirs.ours != "task_arithmetic"
        and not any("density" in level for level in levels)
    ):
        notes.append(f"density is not given: in mergekit's {document.method} it is 1, which leaves every delta whole")
    dtype = str(document.rest.get("dtype", "")).removeprefix("torch.")
    if dtype in ("bfloat16", "float16"):
        notes.append(f"mergekit computes in {dtype}; here nothing is rounded before the end")
    return list(dict.fromkeys([*notes, *(note for part in said for note in part.notes)]))
