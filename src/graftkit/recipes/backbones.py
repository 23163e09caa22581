"""Text models and a VLM's language backbone in one recipe: who takes part in which tensor, and what is left alone.

The output is like the VLM. Tensors of its language backbone are merged, as `recipes/alignment.py` finds them in every
model; all others, and the rows of embeddings that mean different tokens, are the VLM's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.rows import Rows
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes import ancestry, inputs, layout, ties, vocabulary
from graftkit.recipes.alignment import Alignment, align, identity
from graftkit.recipes.projections import Piece
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Context, Input, Member, Step


@dataclass(frozen=True)
class Backbone:
    """How the models of a recipe stand to the language backbone of the one that the output is like.

    `alignments` are by source, the adapters' those of the model that they stand on; `merged` are the output's tensors
    that are merged; `left` names, by source, what of a model is not used.
    """

    recipe: Recipe
    sources: tuple[inputs.Named, ...]
    like: int
    reference: int
    alignments: Mapping[int, Alignment]
    merged: frozenset[str]
    left: Mapping[int, tuple[str, ...]]
    kin: tuple[ancestry.Kinship, ...] = ()
    rows: dict[str, int] = field(default_factory=dict, compare=False)  # shared ones, by tensor; told as steps are made

    @cached_property
    def words(self) -> Mapping[int, vocabulary.Words]:
        """The tokens of every source."""
        return vocabulary.known_words(self.sources, self.reference)


def lay_out(
    recipe: Recipe, sources: tuple[inputs.Named, ...], like: int, base: int | None, entries: tuple[int, ...]
) -> tuple[Context, Backbone]:
    """Who takes part in what. Raises PlanError for models that fit no backbone, or that do not stand on the base."""
    whole = sources[like].source
    assert isinstance(whole, Checkpoint)
    aligned = {like: identity(whole)}
    for k, named in enumerate(sources):
        if k != like and isinstance(named.source, Checkpoint):
            aligned[k] = align(named.source, whole, named.label, sources[like].label)
    reference = base if base is not None and base != like else next((k for k in aligned if k != like), None)
    if reference is None:
        raise PlanError(
            f"recipe.output.align: no model is named beside {sources[like].label}; name a text model, or a base"
        )
    _check_senses(whole, sources[like].label, aligned[reference])
    merged = _merged(recipe, sources, aligned, reference)
    members, left = [], {}
    for k, named in enumerate(sources):
        on = _below(named, sources, like, base) if isinstance(named.source, Adapter) else k
        wanted = merged if k != like else frozenset(whole.tensors)
        member, left[k] = _member(recipe, sources, k, on, aligned[on], wanted)
        aligned.setdefault(k, aligned[on])
        members.append(member)
    kin = _kinships(recipe, sources, like, reference, aligned, merged)
    found = Backbone(recipe, sources, like, reference, aligned, merged, {k: n for k, n in left.items() if n}, kin)
    _check_ties(found)
    anchor = None if base is None else members[base]
    return Context(recipe, sources, anchor, members[like], tuple(members[e] for e in entries)), found


def _check_senses(whole: Checkpoint, label: str, alignment: Alignment) -> None:
    """Refuses a model that is a language backbone and nothing else."""
    outside = (n for n in whole.tensors if n not in alignment.pieces and not layout.BUFFERS.search(n))
    if all(layout.has_rows(name) for name in outside):
        raise PlanError(
            f"{label} is a text model: nothing of it lies outside of the language backbone; name the VLM as `vlm` and "
            "text models as `experts`, or list them all as `models`"
        )


def _merged(
    recipe: Recipe, sources: tuple[inputs.Named, ...], aligned: Mapping[int, Alignment], reference: int
) -> frozenset[str]:
    """The output's tensors that all models have; embeddings and heads only where their rows are to be shared."""
    wanted = aligned[reference].pieces
    keep = recipe.output.embeddings != "shared-rows"
    found = []
    for name in wanted:
        lacking = [k for k, alignment in aligned.items() if name not in alignment.pieces]
        if layout.has_rows(name):
            found += [name] if not keep and not lacking else []
        elif lacking:
            raise PlanError(
                f"{sources[lacking[0]].label} lacks {wanted[name][0].name!r}, which {sources[reference].label} has"
            )
        else:
            found.append(name)
    return frozenset(found)


def _below(named: inputs.Named, sources: tuple[inputs.Named, ...], like: int, base: int | None) -> int:
    """What an adapter stands on: the VLM where it records it, else the base."""
    if base is None or (inputs.stands_on(named, sources[like]) and not inputs.stands_on(named, sources[base])):
        return like
    return base


def _member(
    recipe: Recipe, sources: tuple[inputs.Named, ...], k: int, on: int, alignment: Alignment, wanted: frozenset[str]
) -> tuple[Member, tuple[str, ...]]:
    """A source's own tensors by the output's names, and those of its own that are not used."""
    source, label = sources[k].source, sources[k].label
    if isinstance(source, Adapter):
        inputs.check_base(recipe, sources[k], sources[on])
        return _adapted(recipe, source, label, sources[on].source, k, alignment, wanted)
    pieces = {name: parts for name, parts in alignment.pieces.items() if name in wanted}
    used = {piece.name for parts in pieces.values() for piece in parts}
    left = tuple(name for name in source.tensors if name not in used and not layout.BUFFERS.search(name))
    return _of_pieces(k, pieces), left


def _of_pieces(k: int, pieces: Mapping[str, tuple[Piece, ...]]) -> Member:
    """A member whose tensors are whole ones of the source, or pieces of them."""
    cut = {name: parts for name, parts in pieces.items() if len(parts) > 1 or parts[0].rows}
    return Member(k, {name: parts[0].name for name, parts in pieces.items()}, cut)


def _adapted(
    recipe: Recipe,
    adapter: Adapter,
    label: str,
    below: object,
    k: int,
    alignment: Alignment,
    merged: frozenset[str],
) -> tuple[Member, tuple[str, ...]]:
    """An adapter's tensors by the output's names, through the names of the model that it stands on."""
    assert isinstance(below, Checkpoint)
    kept = recipe.output.embeddings != "shared-rows"
    own = [*adapter.factors, *adapter.tensors]
    left = tuple(n for n in own if kept and layout.has_rows(n))
    used = replace(
        adapter,
        factors={n: factors for n, factors in adapter.factors.items() if n not in left},
        tensors={n: info for n, info in adapter.tensors.items() if n not in left},
    )
    places = layout.match_adapter(below.tensors, used, label, rows=True)
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, parts in alignment.pieces.items():
        if name not in merged:
            continue
        changed = [piece for piece in parts if piece.name in places]
        if changed:
            _check_whole(name, parts, places, adapter, label)
            pieces[name] = tuple(replace(piece, name=places[piece.name]) for piece in changed)
    placed = {piece.name for parts in pieces.values() for piece in parts}
    outside = [n for n in places.values() if n not in placed]
    if outside:
        raise PlanError(
            f"{label} adapts {outside[0]!r}, which is not merged here: it lies outside of the language backbone, or "
            "not all models have it; name a recipe that merges the adapter into its base instead"
        )
    return _of_pieces(k, pieces), left


def _check_whole(name: str, parts: Sequence[Piece], places: Mapping[str, str], adapter: Adapter, label: str) -> None:
    """Refuses factors that a fused tensor has no place for, and rescaled channels of rows that move."""
    own = places[next(piece.name for piece in parts if piece.name in places)]
    if len(parts) > 1:
        raise PlanError(
            f"{label} adapts {own!r}, which the VLM keeps fused with others in {name!r}; name a recipe that merges the "
            "adapter into its base as the expert"
        )
    if parts[0].rows and own in adapter.factors and adapter.factors[own].magnitude:
        raise PlanError(
            f"{label} rescales the channels of {own!r} (DoRA), of which {name!r} is some rows; merge the adapter into "
            "its base first"
        )


def _kinships(
    recipe: Recipe,
    sources: tuple[inputs.Named, ...],
    like: int,
    reference: int,
    aligned: Mapping[int, Alignment],
    merged: Iterable[str],
) -> tuple[ancestry.Kinship, ...]:
    """How near every checkpoint is to the reference. Raises PlanError for a stranger, unless the recipe accepts it."""

    def side(k: int) -> ancestry.Side:
        return ancestry.Side(k, sources[k].source.tensors, aligned[k].pieces)

    shapes = {n: info.shape for n, info in sources[like].source.tensors.items() if n in merged and _compared(info)}
    others = [k for k, n in enumerate(sources) if k != reference and isinstance(n.source, Checkpoint) and not n.nested]
    if sources[reference].nested:
        return ()
    found = tuple(ancestry.kinship(side(k), side(reference), shapes) for k in others)
    strange = next((one for one in found if not one.related), None)
    if strange and not recipe.accept_base:
        raise PlanError(
            f"{sources[strange.source].label} and {sources[reference].label} share no ancestor, as far as a sample "
            f"tells: the median cosine of {len(strange.cosines)} matrices is {strange.cosine:.2f}, expected at least "
            f"{ancestry.LEAST}; name the model that both were made from, or say `accept_base: true`"
        )
    return found


def _compared(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.dtype in ancestry.NUMBERS and not layout.has_rows(info.name)


def _check_ties(backbone: Backbone) -> None:
    """Refuses an adapter that parts an embedding from the head that the VLM ties to it."""
    if backbone.recipe.output.embeddings != "shared-rows":
        return
    whole = backbone.sources[backbone.like].source
    assert isinstance(whole, Checkpoint)
    parting = ties.untied(whole, backbone.sources)[2]
    if parting:
        raise PlanError(
            f"{parting[0].partition(':')[0]}: changes only one of the embedding and the head, which the VLM ties; say "
            "`embeddings: keep`"
        )


def check_measured(steps: Iterable[Step], backbone: Backbone) -> None:
    """Refuses statistics of examples, which are measured by the output's names, where a model's layers have others."""
    moved = next((k for k, alignment in backbone.alignments.items() if any(n != m for n, m in alignment.layers)), None)
    step = next((s for s in steps if s.method and methods.get(s.method).measured_with_examples), None)
    if moved is not None and step is not None:
        raise PlanError(
            f"recipe.method: {step.method} needs statistics of examples, and {backbone.sources[moved].label} has its "
            "layers under other numbers than the VLM, which is not supported; choose a method without them"
        )


def split(step: Step, context: Context, backbone: Backbone) -> list[Step]:
    """The steps of a tensor with a row for each token: the rows that mean one token to all, and the VLM's own.

    Raises PlanError where there is no such row, and for methods that write masks.
    """
    parts = [part for part in (step.base, *step.models) if part and part.kind != "base"]
    if not step.method or not step.shape:
        return [step]
    height = step.shape[0]
    heights = [_height(context, part) for part in parts]
    rows = _shared(backbone, [part.source for part in parts], min([height, *heights]))
    backbone.rows[step.name] = len(rows)
    if len(rows) == height == max([height, *heights]):
        return [step]
    _check_rows(step, parts, rows)
    shared, left = Rows.of(rows), Rows.of(sorted(set(range(height)) - set(rows)))
    original = Input(context.like.source, "tensor", context.like.names[step.name], left)

    def gathered(part: Input | None) -> Input | None:
        return replace(part, rows=shared) if part and part.kind != "base" else part

    models = tuple(part for part in map(gathered, step.models) if part)
    width = step.shape[1:]
    merged = replace(
        step, shape=(shared.count, *width), whole=step.shape, rows=shared, part="0 shared rows",
        base=gathered(step.base), models=models,
    )  # fmt: skip
    rest = Step(
        step.name, (left.count, *width), step.dtype, "", {}, original, (), compute=step.compute, rows=left,
        part="1 the VLM's own", whole=step.shape,
    )  # fmt: skip
    return [merged, rest] if left.count else [merged]


def _height(context: Context, part: Input) -> int:
    source = context.sources[part.source].source
    if isinstance(source, Adapter) and part.name in source.factors:
        return source.factors[part.name].shape[0]
    return source.tensors[part.name].shape[0]


def _shared(backbone: Backbone, sources: Sequence[int], height: int) -> list[int]:
    """The rows that have a token, and the same one in all models."""
    words = backbone.words
    others = {id(words[k]): words[k].ids for k in sources}.values()
    own = words[backbone.like].ids
    return sorted(n for token, n in own.items() if n < height and all(ids.get(token) == n for ids in others))


def _check_rows(step: Step, parts: Sequence[Input], rows: Sequence[int]) -> None:
    if not rows:
        raise PlanError(
            f"recipe.output.embeddings: no row of {step.name!r} means the same token in all models; say "
            "`embeddings: keep`"
        )
    if methods.get(step.method).masks:
        raise PlanError(
            f"recipe.output.embeddings: {step.method} writes a bit mask for each weight of {step.name!r}, and only "
            "some rows of it are merged; say `embeddings: keep`"
        )
    if any(part.kind == "rescaled" for part in parts):
        raise PlanError(
            f"recipe.output.embeddings: a DoRA adapter rescales {step.name!r}, of which only some rows are merged; "
            "merge it into its base first, or say `embeddings: keep`"
        )


def notes(backbone: Backbone) -> tuple[str, ...]:
    """What a reader of the plan should know: what models have and is not used, and who was not compared."""
    sources = backbone.sources
    found = [
        f"accept_base: {sources[one.source].label} and {sources[one.other].label} have a median cosine of "
        f"{one.cosine:.2f}: they share no ancestor, as far as a sample tells"
        for one in backbone.kin
        if not one.related
    ]
    found += [
        f"{sources[one.source].label} and {sources[one.other].label} were not compared: no matrix has finite numbers "
        "other than zero in both"
        for one in backbone.kin
        if not one.cosines
    ]
    found += [
        f"{sources[one.source].label} and {sources[one.other].label} are equal in every value that was compared: "
        "as far as a sample tells, there is nothing to merge between them"
        for one in backbone.kin
        if one.cosines and not any(one.distances)
    ]
    found += [
        f"{sources[k].label} changes {', '.join(names)}, which `embeddings: keep` leaves as the VLM has them"
        for k, names in backbone.left.items()
        if isinstance(sources[k].source, Adapter)
    ]
    found += [
        f"{named.label} is made by a recipe, so whether it stands on the base was not measured"
        for named in sources
        if named.nested
    ]
    return tuple(found)
