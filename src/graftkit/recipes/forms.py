"""The output's form: its tensors, who takes part in each and how, its configuration and its vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes import adapters, backbones, inputs, knobs, layout, slices, ties, vocabulary
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Context, Member


def like_of(recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, entries: tuple[int, ...]) -> int:
    """Which source gives the output its names: `output.like`, else the base, else the first checkpoint."""
    wanted = recipe.output.like
    if wanted is None or (wanted == "base" and base is not None):
        first = next((e for e in entries if isinstance(sources[e].source, Checkpoint)), None)
        chosen = base if base is not None else first
        if chosen is None:
            raise PlanError(
                "recipe: all models are adapters and none records a base that is here; name it with `base:`"
            )
        return chosen
    names = {named.name.rstrip("/"): k for k, named in enumerate(sources)}
    wanted = wanted.rstrip("/")
    if wanted not in names or not isinstance(sources[names[wanted]].source, Checkpoint):
        known = [n for n, k in names.items() if isinstance(sources[k].source, Checkpoint)]
        raise PlanError(
            f"recipe.output.like: got {wanted!r}, expected `base` or one of the checkpoints: {', '.join(known)}"
        )
    return names[wanted]


@dataclass(frozen=True)
class Form:
    """The output's tensors and their places among the contexts: one, or one a slice. Those that have a setting, a
    method and its knobs, are merged; all others are copied."""

    like: int
    tensors: Mapping[str, TensorInfo]
    contexts: tuple[Context, ...]
    place: Mapping[str, int]
    settings: Mapping[str, knobs.Setting]
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    vocabulary: vocabulary.Vocabulary | None = None
    rows: dict[str, Any] = field(default_factory=dict)  # what happens to each row, by tensor; told as steps are made
    backbone: backbones.Backbone | None = None  # where the recipe aligns models with one


def form_of(
    recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, like: int, entries: tuple[int, ...]
) -> Form:
    """What the output consists of: the tensors of the model that it is like, or slices of the models' layers."""
    words = vocabulary.choose(recipe, sources, base, entries)
    if recipe.output.as_ == "adapter":
        if recipe.slices or words:
            key = "slices" if recipe.slices else "output.tokenizer"
            raise PlanError(
                f"recipe.{key}: an adapter has its base's layers and tokens; leave it out, or `as: checkpoint`"
            )
        return _whole(recipe, like, *adapters.lay_out(recipe, sources, base, entries))
    whole = sources[like].source
    assert isinstance(whole, Checkpoint)
    if recipe.output.align:
        context, backbone = backbones.lay_out(recipe, sources, like, base, entries)
        form = _whole(recipe, like, whole.tensors, context, backbone.merged)
        return replace(form, backbone=backbone, notes=backbones.notes(backbone))
    untied = ties.untied(whole, tuple(sources[entry] for entry in dict.fromkeys(entries)))
    if recipe.slices and untied[1]:
        raise PlanError(f"recipe.slices: {untied[2][0]}; merge the adapter into its base first")
    if recipe.slices:
        form = _sliced(recipe, sources, base, like, entries)
    else:
        names, config, said = untied
        context = _context(recipe, sources, names, base, like, entries)
        form = replace(_whole(recipe, like, names, context), config=config, notes=said)
    if not words:
        return replace(form, notes=(*form.notes, *vocabulary.notes(sources)))
    tensors = vocabulary.heightened(form.tensors, words, sources[words.source])
    config = vocabulary.config(form.config or sources[like].source.config, tensors, words, like, sources)
    return replace(form, tensors=tensors, vocabulary=words, config=config)


def _sliced(
    recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, like: int, entries: tuple[int, ...]
) -> Form:
    cut = slices.lay_out(recipe, sources, base, like, entries)
    settings = {name: slices.setting(recipe, cut, name) for name in cut.tensors}
    return Form(like, cut.tensors, cut.contexts, cut.place, settings, slices.config(cut), tuple(slices.notes(cut)))


def _context(
    recipe: Recipe,
    sources: tuple[inputs.Named, ...],
    names: Mapping[str, TensorInfo],
    base: int | None,
    like: int,
    entries: tuple[int, ...],
) -> Context:
    matched = _match_all(recipe, sources, names, like if base is None else base)
    members = [Member(k, held) for k, held in enumerate(matched)]
    return Context(
        recipe, sources, None if base is None else members[base], members[like], tuple(members[e] for e in entries)
    )


def _whole(
    recipe: Recipe, like: int, names: Mapping[str, TensorInfo], context: Context, merged: Collection[str] | None = None
) -> Form:
    """An output of one context, whose gradients of knobs end at its last layer.

    `merged` are the tensors that the models make, all if None; the others are copied.
    """
    chosen = [name for name in names if merged is None or name in merged]
    last = max((layout.layer(name) or 0 for name in chosen), default=0)
    settings = {name: knobs.settings(recipe, name, last) for name in chosen}
    return Form(like, names, (context,), dict.fromkeys(names, 0), settings)


def _match_all(
    recipe: Recipe, sources: tuple[inputs.Named, ...], names: Mapping[str, TensorInfo], base: int
) -> tuple[dict[str, str], ...]:
    """Per source: output tensor name to the source's own name."""
    matched, rows = [], recipe.output.tokenizer is not None
    for named in sources:
        if isinstance(named.source, Adapter):
            inputs.check_base(recipe, named, sources[base])
            matched.append(layout.match_adapter(names, named.source, named.label, rows=rows))
        else:
            matched.append(layout.match_checkpoint(names, named.source, named.label, rows=rows))
    return tuple(matched)
