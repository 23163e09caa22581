"""The recipe's `gates:` file, checked against its models and against the matrices that are merged by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftkit import methods
from graftkit.checkpoints.gates import Gates, open_gates
from graftkit.errors import GraftError, PlanError, nearest
from graftkit.recipes.inputs import Named
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Step


def gates_of(
    recipe: Recipe, sources: tuple[Named, ...], base: int | None, entries: tuple[int, ...], steps: Sequence[Step]
) -> Gates | None:
    """The opened file of gates, None where no step reads any.

    Raises PlanError where a file is missing, superfluous, made for other models, of a kind that the method does not
    take, or lacks a matrix.
    """
    readers = [step for step in steps if reads_gates(step)]
    if not readers:
        if recipe.gates is not None:
            raise PlanError(
                f"recipe.gates: no tensor is merged by gates, so {recipe.gates!r} would change nothing; leave it out, "
                "or choose a method that reads gates (graft, graft_convex, graft_free)"
            )
        return None
    first = readers[0]
    if recipe.gates is None:
        raise PlanError(
            f"recipe.gates is missing: {first.method} reads a file of gates for {first.name!r}; make one, and name it "
            "as `gates: FILE`, or say `knobs: {local_signal: none}`"
        )
    if recipe.slices:
        raise PlanError("recipe.gates: gates are for the tensors of whole models, and slices move layers; drop one")
    found = open_gates(_file_of(recipe))
    _check_models(recipe, found, sources, base, entries)
    for step in readers:
        _check_step(recipe, found, step)
    return found


def by_channel(recipe: Recipe) -> bool:
    """Whether all gates go by channel: those of the recipe's file, and those of a recipe without one."""
    if recipe.gates is None:
        return True
    try:
        return open_gates(_file_of(recipe)).granularity == "channel"
    except GraftError:
        return True  # refused in a better place


def reads_gates(step: Step) -> bool:
    """Whether a step is merged by stored gates: not where no adapter changes its tensor."""
    changed = bool(step.method) and any(part.kind != "base" for part in step.models)
    return changed and methods.get(step.method).reads_gates(step.knobs, len(step.shape))


def _file_of(recipe: Recipe) -> Path:
    assert recipe.gates is not None
    for path in (recipe.directory / recipe.gates, Path(recipe.gates)):
        if path.is_file():
            return path
    raise PlanError(f"recipe.gates: {recipe.gates!r} is no file in {recipe.directory} or here")


def content(named: Named) -> str:
    """The fingerprint of a source that a file of gates remembers: by samples, whatever the plan's own is."""
    return named.fingerprint if named.nested or not named.fingerprint else named.source.fingerprint()


def _check_models(
    recipe: Recipe, found: Gates, sources: tuple[Named, ...], base: int | None, entries: tuple[int, ...]
) -> None:
    if len(found.models) != len(entries):
        raise PlanError(
            f"recipe.gates: {found.file} has gates of {len(found.models)} models, the recipe lists {len(entries)}"
        )
    for k, entry in enumerate(entries):
        if content(sources[entry]) != found.models[k]:
            swapped = sorted(found.models) == sorted(content(sources[e]) for e in entries)
            why = "in another order" if swapped else f"but {sources[entry].label} has other weights now"
            raise PlanError(f"recipe.gates: {found.file} was made for these models {why}; make it anew")
    if base is not None and found.base and content(sources[base]) not in ("", found.base):
        raise PlanError(f"recipe.gates: {found.file} was made on another base than {sources[base].name!r}")


def _check_step(recipe: Recipe, found: Gates, step: Step) -> None:
    kinds = methods.get(step.method).gates
    if found.kind not in kinds:
        raise PlanError(
            f"recipe.gates: {found.file} holds gates of kind {found.kind}, and {step.method} takes "
            f"{' or '.join(kinds)}; choose another method"
        )
    if step.key not in found.tensors:
        close = nearest(step.key, found.tensors)
        hint = f" (it has {close!r})" if close else ""
        raise PlanError(
            f"recipe.gates: {found.file} has no gates for {step.key!r}{hint}; make it anew, or add a rule with "
            "`knobs: {local_signal: none}` for what it leaves out"
        )
    wanted, got = found.shape_for(step.shape), found.tensors[step.key].shape
    if got != wanted:
        raise PlanError(
            f"recipe.gates: the gates of {step.key!r} in {found.file} are {list(got)}, its shape asks for "
            f"{list(wanted)}; make the file anew"
        )


def told(gates: Gates) -> dict[str, Any]:
    """A file of gates in words, for plans and records; with the training that it comes from, where it tells of one."""
    size = f"{gates.size}x{gates.size} block" if gates.granularity == "block" else gates.granularity
    return {
        "file": str(gates.file),
        "kind": gates.kind,
        "granularity": size,
        "matrices": len(gates.tensors),
        "content": gates.digest,
        **{key: json.loads(text) for key, text in gates.about.items() if key == "training"},
    }
