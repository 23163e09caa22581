"""Steps: what is done to each output tensor, from which inputs, with which method and knobs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import DTYPE_NAMES, FLOATING, ITEMSIZE, TensorInfo
from graftkit.checkpoints.resolve import Source
from graftkit.checkpoints.rows import PART, Rows
from graftkit.errors import PlanError
from graftkit.methods.composition import get_part
from graftkit.recipes import inputs, knobs, layout
from graftkit.recipes.coefficients import Measured
from graftkit.recipes.composing import check_masks, composed
from graftkit.recipes.projections import Piece
from graftkit.recipes.recipe import Recipe

BLOCK = 1 << 18
"""Elements that the engine handles at once. Fixed: reductions and random numbers are defined over these blocks."""


@dataclass(frozen=True)
class Input:
    """One model's part in a step. `kind`: `tensor` (read it), `factors` (the base plus an adapter's low-rank delta),
    `rescaled` (the same, its channels rescaled: DoRA), `base` (an adapter that leaves this tensor alone); and where
    vocabularies are aligned `mean` (of `parts`), `centroid` (of all rows of `parts`), `zero` and `joined` (`parts` one
    after the other). `source` counts the plan's sources; `rows` are those that are read, all if None."""

    source: int
    kind: str
    name: str
    rows: Rows | None = None
    parts: tuple[Input, ...] = ()


@dataclass(frozen=True)
class Applied:
    """A preparation or a finisher in a step: its name, the values of its knobs, and keys and group as a step's own."""

    name: str
    knobs: Mapping[str, Any]
    keys: tuple[int, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Factoring:
    """How a delta leaves as factors: PEFT's name of its module, how PEFT keeps them (`kind`: linear, transposed or
    embedding), how they are made (`path`: stack, core or rows, see `recipes/adapters.py`), the largest rank that they
    may have, and how many directions they are chosen from."""

    module: str
    kind: str
    path: str
    most: int
    directions: int


@dataclass(frozen=True)
class Step:
    """One output tensor. `method` is empty for a tensor that is copied from the model that the output is like; its
    `models` are then the other models' copies, which must be equal (integers cannot be merged)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    knobs: Mapping[str, Any]
    base: Input | None
    models: tuple[Input, ...]
    keys: tuple[int, ...] = ()
    group: str = ""  # steps of one group share model-scope statistics
    compute: str = "F32"  # the arithmetic: a precision above the output's, and none below the inputs'
    prepare: tuple[Applied, ...] = ()
    finish: tuple[Applied, ...] = ()
    form: Factoring | None = None  # of a delta that leaves as factors
    rows: Rows | None = None  # of the output's tensor, where the step makes only some
    part: str = ""  # which of the tensor's steps it is
    whole: tuple[int, ...] = ()  # the shape of the output's tensor, where the step makes only some rows of it
    directions: int = 0  # the ranks of adapters in sum, where a method for whole tensors runs on no more than these

    @property
    def key(self) -> str:
        """Names the step: its tensor, and which part of it."""
        return f"{self.name}{PART}{self.part}" if self.part else self.name

    @property
    def written(self) -> int:
        """Number of elements of the output, at most."""
        return self.form.most * sum(self.shape) if self.form else self.elements

    @property
    def elements(self) -> int:
        """Number of elements of the output tensor."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[methods.Method, ...]:
        """All that runs on its blocks: preparations, method, finishers; nothing for a tensor that is copied."""
        before = [get_part("preparation", applied.name) for applied in self.prepare]
        after = [get_part("finisher", applied.name) for applied in self.finish]
        return (*before, methods.get(self.method), *after) if self.method else ()

    @property
    def grain(self) -> str:
        """How it may be cut: as the part that needs most around an element."""
        parts = (part.grain for part in self.parts if not (self.directions and part.name == self.method))
        return max(parts, key=methods.GRAINS.index, default="element")


KEPT = 4 << 20
"""Elements of a merged delta that stays in memory while it is factorised, instead of being made again for each pass."""

THIN = 6
"""An estimate of the matrices, a weight long and the directions wide, that are held to factorise a delta."""

KEPT_MODELS = 1 << 22
"""Values of base and models together, up to which they stay in memory for the passes of signals and the merge."""

TEMPORARIES = 8
"""An estimate of the block-sized arrays, for each input, that a method's torch function makes on its way."""


def scratch(step: Step) -> int:
    """Bytes of one step's blocks: raw, base, models, result, the cast's, and a method's temporaries."""
    block = step.elements if step.grain == "tensor" else min(step.elements, BLOCK)
    wide = ITEMSIZE[step.compute]
    floats = (len(step.models) + 2) * (TEMPORARIES if any(not part.compiled for part in step.parts) else 1)
    factors = THIN * step.directions * sum(step.shape) * 8
    factors += (THIN * step.form.directions * sum(step.shape) + min(step.elements, KEPT)) * 8 if step.form else 0
    return block * (floats * wide + 2 * 8) + factors + _moments(step) + _kept(step)


def _kept(step: Step) -> int:
    """Bytes of the base and of models whose signals are taken, where these are few enough to stay in memory."""
    values = (len(step.models) + (step.base is not None)) * step.elements
    looks = bool(step.method) and "signals" in methods.get(step.method).reads and values <= KEPT_MODELS
    return values * ITEMSIZE[step.compute] if looks else 0


def _moments(step: Step) -> int:
    """Bytes of the second moments that a method reads, float32, and of what it makes of them in float64."""
    if not step.method or not {"gram", "merged_gram"} & set(methods.get(step.method).reads):
        return 0
    return max(step.shape[:2]) ** 2 * (len(step.models) * (4 + 3 * 8) + 3 * 8)


@dataclass(frozen=True)
class Member:
    """A source in one of its parts, as the base, as a model or as what the output is like; it may have several.

    `source` counts the plan's sources; `names` gives, by the output's names of tensors, the source's own. `pieces`
    are those tensors of the output that are only some rows of the source's, or several of its tensors in one.
    """

    source: int
    names: Mapping[str, str]
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What the steps of a plan, or of one slice, have in common: recipe, opened sources, and who takes part."""

    recipe: Recipe
    sources: tuple[inputs.Named, ...]
    base: Member | None
    like: Member
    models: tuple[Member, ...]
    where: str = "recipe.models"
    sliced: bool = False


def make(context: Context, info: TensorInfo, setting: knobs.Setting) -> Step:
    """The step of one output tensor, in float32 where the output has 16 bits and no input has 64.

    A weighted sum is in float64 all the same: what cancels then leaves no rounding behind.
    """
    step = _by_models(context, _composed(context, _step(context, info, setting), setting))
    parts = [part for part in (step.base, *step.models) if part]
    wide = any("F64" in _dtypes(part, context.sources[part.source].source) for part in parts)
    linear = bool(step.method) and not step.prepare and methods.get(step.method).factors is not None
    return replace(step, compute="F64" if wide or linear or step.dtype not in ("F16", "BF16") else "F32")


def _by_models(context: Context, step: Step) -> Step:
    """Slices share statistics over the model only where they have the same models."""
    if not context.sliced:
        return step
    of = f" of {[member.source for member in context.models]}"
    before = tuple(replace(one, group=one.group and one.group + of) for one in step.prepare)
    return replace(step, group=step.group and step.group + of, prepare=before)


def _composed(context: Context, step: Step, setting: knobs.Setting) -> Step:
    """A step with what its recipe puts around the method."""
    unified = step.method and methods.get(step.method).masks is not None
    if not step.method or not (setting.prepare or setting.finish or unified):
        return step
    anchor, order = _anchor(context, step.name), tuple(member.source for member in context.models)
    if unified:
        check_masks(step, setting, anchor, context.recipe)
    return composed(step, setting, anchor, inputs.keys(context.recipe, context.sources, order, step.name), Applied)


def _dtypes(part: Input, source: Source) -> tuple[str, ...]:
    """The dtypes in which a part is on disk."""
    if part.kind in ("factors", "rescaled") and isinstance(source, Adapter):
        return source.factors[part.name].a.dtype, source.factors[part.name].b.dtype
    return () if part.kind == "base" else (source.tensors[part.name].dtype,)


def _step(context: Context, info: TensorInfo, setting: knobs.Setting) -> Step:
    recipe, sources, base, like = context.recipe, context.sources, context.base, context.like
    name = info.name
    floating = info.dtype in FLOATING
    dtype = DTYPE_NAMES[recipe.output.dtype] if recipe.output.dtype and floating else info.dtype
    original = Input(like.source, "tensor", like.names[name])
    if info.dtype.startswith("F8"):
        raise PlanError(
            f"{sources[like.source].label} keeps {name!r} as {info.dtype}; quantised weights are not merged: "
            "dequantise first"
        )
    _check_kinds(info, context)
    if not floating or layout.BUFFERS.search(name):
        twins = [Input(m.source, "tensor", m.names[name]) for m in context.models if name in m.names and m != like]
        same = [t for t in twins if sources[t.source].source.tensors[t.name].dtype == info.dtype and not floating]
        return Step(name, info.shape, dtype, "", {}, original, tuple(same))
    method = methods.get(setting.method)
    if method.needs_base and base is None:
        raise PlanError(f"recipe.base is missing: {method.name} works on deltas and needs the models' common base")
    anchor = _anchor(context, name)
    models = tuple(_input(sources[member.source].source, member, name) for member in context.models)
    if method.returns_delta and all(part.kind == "base" for part in models):
        return Step(name, info.shape, dtype, "", {}, anchor or original, ())
    order = tuple(member.source for member in context.models)
    keys = inputs.keys(recipe, sources, order, name) if "rng" in method.reads else ()
    own = any(part.kind != "tensor" for part in models)
    rules = any(isinstance(value, Measured) and value.rule.of == "delta" for value in setting.knobs.values())
    product = setting.knobs.get("of") == "product"
    needed = anchor if method.uses_base or own or rules or product else None
    if product and not own and needed is None:
        raise PlanError(f"recipe.base is missing: {method.name} with `of: product` looks at deltas; name the base")
    if own and needed is None:
        needed = original
    group = (
        f"{setting.method} {json.dumps(setting.knobs, sort_keys=True)}"
        if method.scope(setting.knobs) == "model"
        else ""
    )
    return Step(name, info.shape, dtype, method.name, setting.knobs, needed, models, keys, group)


def _check_kinds(info: TensorInfo, context: Context) -> None:
    """Refuses a tensor that is floating point in one model and not in another, or quantised."""
    for member in (context.like, *([context.base] if context.base else []), *context.models):
        named = context.sources[member.source]
        own = named.source.tensors.get(member.names.get(info.name, ""))
        if own and (own.dtype in FLOATING) != (info.dtype in FLOATING):
            raise PlanError(
                f"{named.label} has {own.name!r} as {own.dtype}, the output as {info.dtype}: quantised and integer "
                "weights are not merged; dequantise the model first"
            )


def copied(context: Context, info: TensorInfo) -> Step:
    """The step of a tensor that is the like model's, whatever the others have."""
    wanted = context.recipe.output.dtype
    dtype = DTYPE_NAMES[wanted] if wanted and info.dtype in FLOATING else info.dtype
    compute = "F32" if dtype in ("F16", "BF16") and info.dtype != "F64" else "F64"
    original = Input(context.like.source, "tensor", context.like.names[info.name])
    return Step(info.name, info.shape, dtype, "", {}, original, (), compute=compute)


def _anchor(context: Context, name: str) -> Input | None:
    """The base's part in a tensor; None where it has none."""
    base = context.base
    if base is None or name not in base.names:
        return None
    return _input(context.sources[base.source].source, base, name)


def _input(source: Source, member: Member, name: str) -> Input:
    if name not in member.names:
        return Input(member.source, "base", "")
    index, own, pieces = member.source, member.names[name], member.pieces.get(name, ())
    if len(pieces) > 1:
        parts = tuple(
            Input(index, "tensor", piece.name, piece.rows or _all_rows(source, piece.name)) for piece in pieces
        )
        count = sum(part.rows.count for part in parts if part.rows)
        return Input(index, "joined", own, Rows(((0, count),)), parts)
    rows = pieces[0].rows if pieces else None
    if not isinstance(source, Adapter) or own not in source.factors:
        return Input(index, "tensor", own, rows)
    return Input(index, "rescaled" if source.factors[own].magnitude else "factors", own, rows)


def _all_rows(source: Source, name: str) -> Rows:
    return Rows(((0, source.tensors[name].shape[0]),))


def check_contributions(context: Context, steps: list[Step], spared: int | None = None) -> None:
    """Refuses a model whose weight is 0 everywhere, and a number of models that the method does not take.

    `spared` is a source that gives the output tensors that are not merged.
    """
    entries, sources = [member.source for member in context.models], context.sources
    merged = [step for step in steps if step.method]
    if not merged:
        floating = any(step.dtype in FLOATING for step in steps)
        reason = "every model leaves the base as it is" if floating else "the models hold no tensor of floating point"
        raise PlanError(f"recipe: no tensor would be merged; {reason}")
    for step in merged:
        low, high = methods.get(step.method).model_count
        if not low <= len(entries) <= (high or len(entries)):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            raise PlanError(f"{context.where}: {step.method} takes {wanted} models, got {len(entries)}")
    for k, entry in enumerate(entries):
        if entry != spared and not any(knobs.contributes(step, k) for step in merged):
            raise PlanError(
                f"{context.where}[{k}] ({sources[entry].name}) contributes nothing: its weight is 0, or no tensor "
                "of it is used; leave it out, or give it a weight"
            )
