"""Changed depth: an output whose layers are slices of the models' layers, in any order and any number of times.

The output's names are those of the model that it is like, with the layers numbered anew. What stands before the stack
of layers (embeddings, say) is merged from the first slice's models, the final norm and the head from the last slice's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes import configuration, inputs, knobs, layout
from graftkit.recipes.recipe import ModelEntry, Recipe, Rule
from graftkit.recipes.sections import Slice
from graftkit.recipes.steps import Context, Member

_AFTER = re.compile(r"(^|\.)(norm|ln_f|norm_f|final_norm|final_layernorm|final_layer_norm|layer_norm)\.(weight|bias)$")


@dataclass(frozen=True)
class Stack:
    """The layers of one model: the prefix of their names, and per layer the names by what follows the number."""

    prefix: str
    layers: tuple[Mapping[str, str], ...]


def stack_of(source: Checkpoint, label: str) -> Stack:
    """The layers of a model that slices are cut from: its only stack, or the one that is no encoder.

    Raises PlanError when there is none, when several are left, or when a number is missing.
    """
    stacks = layout.stacks(source.tensors)
    chosen = [prefix for prefix in stacks if not layout.ENCODERS.search(prefix)] if len(stacks) > 1 else list(stacks)
    if len(chosen) != 1:
        found = ", ".join(repr(prefix) for prefix in stacks) or "none"
        raise PlanError(f"{label}: slices need one stack of layers such as 'model.layers.'; found {found}")
    held = stacks[chosen[0]]
    if sorted(held) != list(range(len(held))):
        missing = min(set(range(max(held) + 1)) - set(held))
        raise PlanError(f"{label}: layer {missing} of {chosen[0]!r} is missing")
    return Stack(chosen[0], tuple(held[n] for n in range(len(held))))


@dataclass(frozen=True)
class Cut:
    """One slice of the output: which of the recipe's, its first output layer, and who takes part in it.

    `origins` are (index of the source, its first layer) of its sources; `base` is the same, where it has one.
    """

    number: int
    part: Slice
    first: int
    origins: tuple[tuple[int, int], ...]
    base: tuple[int, int] | None
    adapted: int | None  # the base that adapters among the sources stand on
    lead: tuple[int, int]  # the first of all these that is a checkpoint: the slice has its tensors

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"recipe.slices[{self.number}]"


@dataclass(frozen=True)
class Sliced:
    """The whole output of a recipe with slices: its tensors, each with its slice; and each layer's origin."""

    tensors: Mapping[str, TensorInfo]
    contexts: tuple[Context, ...]
    place: Mapping[str, int]  # output name -> slice
    cuts: tuple[Cut, ...]
    origins: tuple[tuple[int, int], ...]  # per output layer the first checkpoint's index and layer
    like: int
    stacks: Mapping[int, Stack]
    outside: Mapping[str, float]  # output name -> position in its slice, for tensors outside the stack

    @property
    def depth(self) -> int:
        """Layers of the output."""
        return len(self.origins)


def lay_out(
    recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, like: int, entries: tuple[int, ...]
) -> Sliced:
    """The output's tensors, and for each slice who takes part with which tensors.

    `entries`: the sources' indices in the order of `recipe.listed`. Raises PlanError where ranges leave a model, where
    layers do not fit one another, or where a model's config and files disagree about its depth.
    """
    stacks = {k: stack_of(n.source, n.label) for k, n in enumerate(sources) if isinstance(n.source, Checkpoint)}
    cuts = tuple(_cuts(recipe, sources, base, entries, stacks))
    form = _Form(sources, stacks, like, bool(recipe.output.tokenizer))
    last = len(cuts) - 1
    tensors: dict[str, TensorInfo] = {}
    place: dict[str, int] = {}
    contexts, origins = [], []
    outside = {name: float(_is_after(name)) for name in form.outside(like)}
    for k, cut in enumerate(cuts):
        ends = [name for name, after in outside.items() if (k == 0 and not after) or (k == last and after)]
        context = _context(recipe, cut, form, ends)
        made = form.infos(context.like, cut, ends)
        tensors |= made
        place |= dict.fromkeys(made, k)
        contexts.append(context)
        origins += [(cut.lead[0], cut.lead[1] + n) for n in range(cut.part.depth)]
    return Sliced(
        _in_order(tensors, place, outside), tuple(contexts), place, cuts, tuple(origins), like, stacks, outside
    )


def _in_order(
    tensors: Mapping[str, TensorInfo], place: Mapping[str, int], outside: Mapping[str, float]
) -> dict[str, TensorInfo]:
    """Embeddings first, then the layers, then norm and head: the order in which files are filled."""
    return dict(sorted(tensors.items(), key=lambda item: 2 * outside[item[0]] if item[0] in outside else 1.0))


def _is_after(name: str) -> bool:
    return layout.role(name) == "head" or bool(_AFTER.search(name) and not layout.ENCODERS.search(name))


def _cuts(
    recipe: Recipe,
    sources: tuple[inputs.Named, ...],
    base: int | None,
    entries: tuple[int, ...],
    stacks: Mapping[int, Stack],
) -> Iterator[Cut]:
    remaining, first = list(entries[: len(recipe.listed)]), 0
    bases = {part.base.model: None for part in recipe.slices if part.base.model}
    own_bases = dict(zip(bases, entries[len(recipe.listed) :], strict=True))
    for number, part in enumerate(recipe.slices):
        chosen, remaining = remaining[: len(part.sources)], remaining[len(part.sources) :]
        origins = tuple((e, s.layer_range[0]) for e, s in zip(chosen, part.sources, strict=True))
        anchor = own_bases[part.base.model] if part.base.model else base
        start = _base_start(part)
        below = None if anchor is None or start is None else (anchor, start)
        lead = next((pair for pair in (*origins, *([below] if below else [])) if pair[0] in stacks), origins[0])
        cut = Cut(number, part, first, origins, below, anchor, lead)
        _check_ranges(cut, sources, stacks)
        yield cut
        first += part.depth


def _base_start(part: Slice) -> int | None:
    """The base's first layer: as given, else that of all sources; None where these differ."""
    if part.base.layer_range:
        return part.base.layer_range[0]
    starts = {source.layer_range[0] for source in part.sources}
    return starts.pop() if len(starts) == 1 else None


def _check_ranges(cut: Cut, sources: tuple[inputs.Named, ...], stacks: Mapping[int, Stack]) -> None:
    for k, (index, start) in enumerate((*cut.origins, *([cut.base] if cut.base else []))):
        where = f"{cut.where}.sources[{k}]" if k < len(cut.origins) else f"{cut.where}.base"
        held = index if index in stacks else cut.adapted
        if held is None:
            raise PlanError(
                f"{where}: {sources[index].label} is an adapter, and the slice has no base that it stands on"
            )
        if index not in stacks and cut.base != (held, start):
            raise PlanError(
                f"{where}: {sources[index].label} is an adapter from layer {start} on, the slice's base starts "
                "elsewhere; an adapter stands on the same layers of its base"
            )
        depth = len(stacks[held].layers)
        if start + cut.part.depth > depth:
            raise PlanError(
                f"{where}.layer_range: got [{start}, {start + cut.part.depth}], {sources[held].label} has layers "
                f"[0, {depth}]"
            )


@dataclass(frozen=True)
class _Form:
    """The names of layers and of what stands outside them, for every source."""

    sources: tuple[inputs.Named, ...]
    stacks: Mapping[int, Stack]
    like: int
    rows: bool  # vocabularies are aligned, so embeddings may differ in rows

    def outside(self, index: int) -> dict[str, TensorInfo]:
        """A source's tensors that are in no layer of its stack."""
        inside = {name for layer in self.stacks[index].layers for name in layer.values()}
        return {name: info for name, info in self.sources[index].source.tensors.items() if name not in inside}

    def member(self, cut: Cut, index: int, start: int, ends: list[str]) -> Member:
        """A source in a slice, and at the ends that the slice is responsible for."""
        named = self.sources[index]
        if isinstance(named.source, Adapter):
            assert cut.adapted is not None
            below = self.member(cut, cut.adapted, start, ends).names
            held = {name: self.sources[cut.adapted].source.tensors[own] for name, own in below.items()}
            adapted = layout.match_adapter(self.sources[cut.adapted].source.tensors, named.source, named.label)
            return Member(index, {name: adapted[info.name] for name, info in held.items() if info.name in adapted})
        names: dict[str, str] = {}
        for n in range(cut.part.depth):
            names |= self._layer(cut, n, (index, start + n))
        if ends:
            whole = replace(named.source, tensors=self.outside(index))
            found = layout.match_checkpoint(self.outside(self.like), whole, named.label, rows=self.rows)
            names |= {name: found[name] for name in ends if name in found}
        return Member(index, names)

    def _layer(self, cut: Cut, n: int, own: tuple[int, int]) -> dict[str, str]:
        """One layer's names, by the output's; refuses a layer that is built otherwise than the slice's first."""
        lead = (cut.lead[0], cut.lead[1] + n)
        held, wanted = self.stacks[own[0]].layers[own[1]], self.stacks[lead[0]].layers[lead[1]]
        label = f"{cut.where}: layer {own[1]} of {self.sources[own[0]].label}"
        differ = sorted(s for s in set(held) ^ set(wanted) if not layout.BUFFERS.search(s))
        if differ:
            verdict = "lacks" if differ[0] in wanted else "has"
            raise PlanError(
                f"{label} {verdict} {differ[0]!r}, layer {lead[1]} of {self.sources[lead[0]].label} "
                f"{'has it' if verdict == 'lacks' else 'does not'}; the layers of a slice have the same tensors"
            )
        for suffix in wanted.keys() & held.keys():
            mine = self.sources[own[0]].source.tensors[held[suffix]].shape
            theirs = self.sources[lead[0]].source.tensors[wanted[suffix]].shape
            if mine != theirs:
                raise PlanError(
                    f"{label} has {suffix!r} as {list(mine)}, the slice's first source as {list(theirs)}: the models "
                    "are not of one architecture"
                )
        prefix = f"{self.stacks[self.like].prefix}{cut.first + n}."
        return {prefix + suffix: name for suffix, name in held.items() if suffix in wanted}

    def infos(self, lead: Member, cut: Cut, ends: list[str]) -> dict[str, TensorInfo]:
        """The output's tensors of a slice: shapes of its first source, dtypes of the model that the output is like."""
        usual = self._usual()
        held, found = self.sources[lead.source].source.tensors, {}
        outside = self.outside(self.like)
        for name, own in lead.names.items():
            suffix = name.removeprefix(self.stacks[self.like].prefix).partition(".")[2]
            known = {outside[name]} if name in outside else usual.get(suffix, set())
            shapes = {info.shape for info in known}
            if len(shapes) == 1 and shapes != {held[own].shape} and name not in outside:
                raise PlanError(
                    f"{cut.where}: {self.sources[lead.source].label} has {own!r} as {list(held[own].shape)}, "
                    f"{self.sources[self.like].label}, which the output is like, as {list(shapes.pop())}: the models "
                    "are not of one architecture"
                )
            dtype = next((info.dtype for info in known), held[own].dtype)
            shape = outside[name].shape if name in outside else held[own].shape
            found[name] = replace(held[own], name=name, dtype=dtype, shape=shape)
        return found

    def _usual(self) -> dict[str, set[TensorInfo]]:
        """What the layers of the model that the output is like look like, by what follows the number."""
        found: dict[str, set[TensorInfo]] = {}
        for layer in self.stacks[self.like].layers:
            for suffix, name in layer.items():
                found.setdefault(suffix, set()).add(self.sources[self.like].source.tensors[name])
        return found


def _context(recipe: Recipe, cut: Cut, form: _Form, ends: list[str]) -> Context:
    """Who takes part in a slice, and with which tensors."""
    models = tuple(form.member(cut, index, start, ends) for index, start in cut.origins)
    base = form.member(cut, *cut.base, ends) if cut.base else None
    like = form.member(cut, *cut.lead, ends)
    return Context(recipe, form.sources, base, like, models, f"{cut.where}.sources", sliced=True)


def setting(recipe: Recipe, sliced: Sliced, name: str) -> knobs.Setting:
    """The method and knobs of one output tensor: the recipe's, the slice's, those beside its sources, then rules.

    A gradient in a slice, beside a source, or in a rule for one slice runs over that slice's layers, any other over the
    whole output's.
    """
    cut = sliced.cuts[sliced.place[name]]
    number = layout.layer(name) if name not in sliced.outside else None
    span = cut.part.depth - 1
    inner = sliced.outside[name] if number is None else (number - cut.first) / span if span else 1.0
    used = knobs.settings(_recipe_at(recipe, cut, knobs.Depth(inner, number is not None)), name, sliced.depth - 1)
    method = methods.get(used.method)
    if method.uses_base and cut.base is None and cut.adapted is not None:
        raise PlanError(
            f"{cut.where}: its sources read different layers, so which of the base's belong to them? Say it by "
            "`base: {layer_range: [first, one after the last]}`"
        )
    return used


def _recipe_at(recipe: Recipe, cut: Cut, position: knobs.Depth) -> Recipe:
    """A slice as a recipe of its own, at one depth of it."""
    part = cut.part
    chosen = part.method or recipe.method
    given = {k: v for k, v in recipe.knobs.items() if chosen == recipe.method or k in methods.get(chosen).knobs}
    own = {k: knobs.at(v, position, f"{cut.where}.knobs.{k}") for k, v in part.knobs.items()}
    entries = [
        ModelEntry(
            model=source.model,
            **{k: knobs.at(v, position, f"{cut.where}.sources[{n}].{k}") for k, v in source.knobs.items()},
        )
        for n, source in enumerate(part.sources)
    ]
    rules = [_rule_at(rule, position, f"recipe.rules[{r}].knobs") for r, rule in enumerate(recipe.rules)
             if rule.where.slice in (None, cut.number)]  # fmt: skip
    changed = {"method": chosen, "knobs": given | own, "models": entries, "slices": [], "rules": rules}
    return recipe.model_copy(update=changed)


def _rule_at(rule: Rule, position: knobs.Depth, where: str) -> Rule:
    """A rule for one slice, at one depth of it; other rules stay as they are."""
    if rule.where.slice is None:
        return rule

    def at(value: Any, key: str) -> Any:
        place = f"{where}.{key}"
        each = [knobs.at(item, position, place) for item in value] if isinstance(value, list) else None
        return knobs.at(value, position, place) if each is None else each

    return rule.model_copy(update={"knobs": {key: at(value, key) for key, value in rule.knobs.items()}})


def config(sliced: Sliced) -> dict[str, Any] | None:
    """The output's config.json, where the model that it is like has one."""
    sources = sliced.contexts[0].sources
    for index in {sliced.like, *(index for index, _ in sliced.origins)}:
        said, held = configuration.depth_of(sources[index].source.config), len(sliced.stacks[index].layers)
        if said is not None and said != held:
            raise PlanError(
                f"{sources[index].label}: its config says {said} layers, its files hold {held}; slices need the two "
                "to agree"
            )
    like = sources[sliced.like]
    if not like.source.config:
        return None
    origins = [(sources[index].source.config, layer) for index, layer in sliced.origins]
    return configuration.deepened(like.source.config, len(sliced.stacks[sliced.like].layers), origins, like.label)


def notes(sliced: Sliced) -> list[str]:
    """What a reader should know: whose embeddings and head, where a tie joins what slices keep apart."""
    first, last = (context.like.source for context in (sliced.contexts[0], sliced.contexts[-1]))
    sources = sliced.contexts[0].sources
    found = [
        f"{sliced.depth} layers from {len(sliced.cuts)} slice{'s' * (len(sliced.cuts) > 1)}; what precedes them is "
        "merged from the first slice's models, norm and head from the last slice's"
    ]
    if first != last and not any(layout.role(name) == "head" for name in sliced.tensors):
        found.append(
            f"the head is tied to the embedding, so it comes from {sources[first].name!r}, not from the last slice's "
            f"{sources[last].name!r}"
        )
    return found
