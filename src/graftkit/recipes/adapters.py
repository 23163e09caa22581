"""An adapter as the output: which tensors leave as factors, by which path, and what happens to those that cannot.
And adapters as inputs of a checkpoint: where a method needs no more than their cores.

Paths, by what the method and its inputs allow:

    stack   a weighted sum of adapters: their factors side by side, then truncated in their core
    core    a method that commutes with rotations: it runs on cores of the size of the ranks
    frame   a method that commutes with rotations of the outputs: it runs on as many rows as the ranks have
    shares  a sum with weights by channel: the factors side by side, the rows of each B by its weights
    rows    any other method, and models that are no factors: dense rows go by, and are sketched
    apart   PEFT's combinations: the method runs on the adapters' A, and on their B
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftkit import methods
from graftkit.checkpoints.absent import Absent
from graftkit.checkpoints.adapters import Adapter, Factors
from graftkit.checkpoints.headers import DTYPE_NAMES, TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.recipes import gates, inputs, layout, ties
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Context, Factoring, Input, Member, Step

OVERSAMPLED = 10
"""Directions beyond those wanted that a sketch takes along (Halko, Martinsson and Tropp 2011, section 4.2)."""

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures that keep their linear weights as [in, out]."""


def lay_out(
    recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, entries: tuple[int, ...]
) -> tuple[dict[str, TensorInfo], Context]:
    """The tensors that an adapter may change, and who takes part: all of the base's, or those that adapters touch."""
    if base is None:
        raise PlanError("recipe.base is missing: an adapter is the change to a base, so a merge into one needs it")
    dtype = DTYPE_NAMES[recipe.output.dtype or "float32"]
    held = _with_heads(sources, base, entries)
    wanted = {name: replace(info, dtype=_as_output(info, dtype)) for name, info in held.items()}
    members = [Member(k, _matched(recipe, wanted, named, sources[base])) for k, named in enumerate(sources)]
    if all(isinstance(sources[entry].source, Adapter) for entry in entries):
        wanted = {name: info for name, info in wanted.items() if any(name in members[e].names for e in entries)}
    return wanted, Context(recipe, sources, members[base], members[base], tuple(members[e] for e in entries))


def _as_output(info: TensorInfo, dtype: str) -> str:
    return dtype if info.dtype in DTYPE_NAMES.values() else info.dtype


def _with_heads(sources: tuple[inputs.Named, ...], base: int, entries: tuple[int, ...]) -> dict[str, TensorInfo]:
    """The base's tensors, and the head that it ties to its embedding where adapters part the two, or adapt both."""
    source, models = sources[base].source, tuple(sources[entry] for entry in entries)
    assert isinstance(source, Checkpoint)
    held, embedding = dict(ties.untied(source, models)[0]), ties.tied_embedding(source)
    if embedding and any(isinstance(named.source, Adapter) and ties.HEAD in named.source.factors for named in models):
        held[ties.HEAD] = replace(source.tensors[embedding], name=ties.HEAD)
    return held


def _matched(
    recipe: Recipe, wanted: Mapping[str, TensorInfo], named: inputs.Named, base: inputs.Named
) -> dict[str, str]:
    if isinstance(named.source, Adapter):
        inputs.check_base(recipe, named, base)
        return layout.match_adapter(wanted, named.source, named.label)
    if isinstance(named.source, Absent):
        return {name: name for name in named.source.tensors}
    return layout.match_checkpoint(wanted, named.source, named.label)


def as_factors(context: Context, steps: Sequence[Step]) -> list[Step]:
    """The steps of a merge as those of an adapter: what nothing changes is left out.

    Raises PlanError where a delta has no place in an adapter and is not to be dropped, where a rank must be named, and
    where a base that is not here would be read.
    """
    made = [_as_factors(context, step) for step in steps if step.method]
    kept = [step for step in made if step is not None]
    if not kept:
        raise PlanError("recipe: nothing would be in the adapter; no model changes a tensor that it can hold")
    for step in kept:
        if step.base and isinstance(context.sources[step.base.source].source, Absent):
            raise PlanError(
                f"recipe.base: {step.name!r} cannot be merged by {step.method} without the base's weights, and "
                f"{context.sources[step.base.source].name!r} is not here; fetch it, and name it with `base:`"
            )
    return kept


def on_cores(context: Context, steps: Sequence[Step]) -> list[Step]:
    """The steps of a checkpoint; those of adapters by a method for whole tensors that commutes with rotations run on
    the adapters' directions."""
    return [replace(step, directions=_directions(context, step)) for step in steps]


def _directions(context: Context, step: Step) -> int:
    """The sum of the ranks of a step's adapters, where its method may run on these directions alone; else 0."""
    method = methods.get(step.method) if step.method else None
    plain = all(part.kind in ("factors", "base") and part.rows is None for part in step.models) and not step.rows
    if method is None or method.grain != "tensor" or not plain or step.prepare or len(step.shape) != 2:
        return 0
    if not method.returns_delta or method.masks or method.factors or not method.commutes(step.knobs):
        return 0
    ranks = sum(factors.rank for _, factors in _adapted(context, step))
    return ranks if ranks < min(step.shape) else 0


def _as_factors(context: Context, step: Step) -> Step | None:
    output, parts = context.recipe.output, _adapted(context, step)
    if not _reached(context, step, parts):
        if output.outside == "refuse":
            raise PlanError(
                f"recipe.output.outside: {step.name!r} changes, and LoRA does not reach it; `save` keeps it whole in "
                "the adapter, `drop` leaves it as in the base"
            )
        return None if output.outside == "drop" else step
    path = _path(step, parts, context)
    needs_base = _looks_at_weights(step) if path == "shares" else path == "rows" and not _base_is_free(step)
    base = context.sources[context.like.source].source
    form = Factoring(
        module=called(step, context.sources, base).removesuffix(".weight"),
        kind=_kind(context, step, parts),
        path=path,
        most=(most := _most(context, step, parts, path)),
        directions=most + OVERSAMPLED if path == "rows" else sum(factors.rank for _, factors in parts),
    )
    return replace(step, base=step.base if needs_base else None, form=form)


def called(step: Step, sources: Sequence[inputs.Named], base: Any) -> str:
    """What a step's tensor is called in memory."""
    own = [
        part.name for part in step.models if part.kind != "base" and isinstance(sources[part.source].source, Adapter)
    ]
    return layout.called(step.name, own, base)


def _adapted(context: Context, step: Step) -> list[tuple[Input, Factors]]:
    """The parts of a step that are factors of adapters."""
    found = []
    for part in step.models:
        source = context.sources[part.source].source
        if part.kind in ("factors", "rescaled") and isinstance(source, Adapter):
            found.append((part, source.factors[part.name]))
    return found


def _reached(context: Context, step: Step, parts: Sequence[tuple[Input, Factors]]) -> bool:
    """Whether factors can hold the delta: a matrix of a linear layer, or whatever the models' own factors are of."""
    whole = any(p.kind == "tensor" and isinstance(context.sources[p.source].source, Adapter) for p in step.models)
    if whole or len(step.shape) != 2 or not step.name.endswith(".weight"):
        return False
    return bool(parts) or (layout.role(step.name) not in ("embedding", "norm") and "embed" not in step.name)


def _kind(context: Context, step: Step, parts: Sequence[tuple[Input, Factors]]) -> str:
    """How PEFT keeps the factors: `linear`, `transposed` (the base has [in, out]) or `embedding`."""
    kinds = {"embedding" if f.embedding else "transposed" if f.transposed else "linear" for _, f in parts}
    if len(kinds) > 1:
        raise PlanError(f"{step.name!r} is {' and '.join(sorted(kinds))} in different adapters: fan_in_fan_out differs")
    conv1d = any(context.sources[m.source].source.config.get("model_type") in CONV1D for m in (context.like,))
    return kinds.pop() if kinds else "transposed" if conv1d and layout.role(step.name) != "head" else "linear"


def check_products(steps: Sequence[Step]) -> None:
    """Refuses a checkpoint from a method that merges factors."""
    for step in steps:
        if step.knobs.get("of") == "factors":
            raise PlanError(
                f"recipe.method: {step.method} merges the factors of adapters into an adapter; say "
                "`output: {as: adapter}`, or `of: product` to merge what the adapters do"
            )


def notes(steps: Sequence[Step]) -> tuple[str, ...]:
    """What a merge of factors depends on that a merge of deltas does not."""
    if any(step.form and step.form.path == "apart" for step in steps):
        return (
            "factors are merged each by itself: the result depends on how each adapter splits its delta into A and B",
        )
    return ()


def _check_apart(context: Context, step: Step, parts: Sequence[tuple[Input, Factors]]) -> None:
    """Refuses what has no factors of one shape to merge."""
    if len(parts) != sum(part.kind != "base" for part in step.models) or any(f.magnitude for _, f in parts):
        raise PlanError(f"{step.name!r}: {step.method} merges factors, and not all models are plain LoRA adapters")
    ranks = sorted({factors.rank for _, factors in parts})
    if len(ranks) > 1:
        raise PlanError(
            f"{step.name!r}: {step.method} merges factors of one rank, and the adapters have {ranks}; task_arithmetic "
            "takes any"
        )
    if context.recipe.output.rank is not None:
        raise PlanError(f"recipe.output.rank: {step.method} keeps the adapters' own rank; leave it out")


def _path(step: Step, parts: Sequence[tuple[Input, Factors]], context: Context) -> str:
    method = methods.get(step.method)
    if step.knobs.get("of") == "factors":
        _check_apart(context, step, parts)
        return "apart"
    factors_only = all(part.kind in ("factors", "base") for part in step.models)
    if method.shares and factors_only and not (step.prepare or step.finish) and gates.by_channel(context.recipe):
        return "shares"
    if not factors_only or step.prepare or step.finish or not _base_is_free(step):
        return "rows"
    if method.factors:
        return "stack"
    turned = {"both": "core", "output": "frame"}.get(str(method.commutes(step.knobs)), "rows")
    return turned if method.returns_delta else "rows"


def _looks_at_weights(step: Step) -> bool:
    """Whether a sum with weights by channel finds these in the models' weights."""
    signal = step.knobs.get("global_signal", "none")
    return signal != "none" and step.knobs.get("of") != "product"


def _base_is_free(step: Step) -> bool:
    """Whether the merged delta is the same for any base: then its weights are not read."""
    method = methods.get(step.method)
    if any(part.kind in ("tensor", "rescaled") for part in step.models):
        return False
    if method.uses_base:
        return method.returns_delta
    weight = step.knobs.get("weight", (1.0,))
    constant = bool(method.factors) and not method.statistics  # a sum of weights; it keeps the base where they sum to 1
    return constant and (step.knobs.get("normalize") is True or abs(_sum(step, weight) - 1) < 1e-12)


def _sum(step: Step, weight: Sequence[float]) -> float:
    if "take" in step.knobs:
        return float(step.knobs["scale"])
    return math.fsum(weight) if "weight" in step.knobs else math.nan


def _most(context: Context, step: Step, parts: Sequence[tuple[Input, Factors]], path: str) -> int:
    """The largest rank that the step can have. Raises PlanError where the recipe must say one."""
    rank = context.recipe.output.rank
    least = min(step.shape)
    if path == "apart":
        return parts[0][1].rank
    if path != "rows":
        together = min(sum(factors.rank for _, factors in parts), least)
        return min(together, rank) if isinstance(rank, int) else together
    if rank is None or rank == "exact":
        why = f"{step.method} makes" if parts else "a fine-tuned model has"
        given = "is missing" if rank is None else "is `exact`"
        raise PlanError(
            f"recipe.output.rank {given}: {why} deltas of full rank ({step.name!r}); give a rank, such as 16, or a "
            "share of the energy, such as {energy: 0.9}"
        )
    return min(rank, least) if isinstance(rank, int) else max(1, math.prod(step.shape) // sum(step.shape))


def task_type(sources: Sequence[inputs.Named], base: int) -> str | None:
    """PEFT's name of what the model does: as the adapters say, else causal language modelling if the base does it."""
    said = {n.source.config.get("task_type") for n in sources if isinstance(n.source, Adapter)} - {None}
    if said:
        return str(said.pop()) if len(said) == 1 else None
    classes = sources[base].source.config.get("architectures") or []
    return "CAUSAL_LM" if any(str(name).endswith("ForCausalLM") for name in classes) else None
