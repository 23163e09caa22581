"""What a recipe puts around the method of a step: preparations before it, finishers after it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from graftkit import methods
from graftkit.errors import PlanError
from graftkit.methods.composition import get_part
from graftkit.methods.random import derived
from graftkit.recipes import layout
from graftkit.recipes.knobs import Chosen, Setting

if TYPE_CHECKING:
    from graftkit.recipes.recipe import Recipe
    from graftkit.recipes.steps import Applied, Input, Step


def composed(step: Step, setting: Setting, anchor: Input | None, keys: tuple[int, ...], applied: type[Applied]) -> Step:
    """A step with its preparations and finishers, which read `anchor`, its place in the base.

    `keys` are the models' random streams for this tensor: the first that draws takes them, the next derived ones.
    Raises PlanError where there is no base.
    """
    finish = tuple(chosen for chosen in setting.finish if _fits(chosen, step))
    if not setting.prepare and not finish:
        return step
    if anchor is None:
        section, first = ("prepare", setting.prepare) if setting.prepare else ("finish", finish)
        raise PlanError(
            f"recipe.{section}: {first[0].name} works on deltas and needs the models' common base, which "
            f"{step.name!r} does not have; name it as `base:`"
        )
    drawn, before = 0, []
    for k, chosen in enumerate(setting.prepare):
        part = get_part("preparation", chosen.name)
        draws, whole = "rng" in part.reads, part.scope(chosen.knobs) == "model"
        group = f"prepare {_chain(setting.prepare[: k + 1])}" if whole else ""
        own = tuple(derived(key, drawn) for key in keys) if draws else ()
        before.append(applied(chosen.name, chosen.knobs, own, group))
        drawn += draws
    return replace(
        step,
        base=anchor,
        keys=tuple(derived(key, drawn) for key in keys) if "rng" in methods.get(step.method).reads else (),
        group=f"{step.group} after {_chain(setting.prepare)}" if step.group and setting.prepare else step.group,
        prepare=tuple(before),
        finish=tuple(applied(chosen.name, chosen.knobs) for chosen in finish),
    )


def check_masks(step: Step, setting: Setting, anchor: Input | None, recipe: Recipe) -> None:
    """Refuses what masks of a unified model cannot go with. Raises PlanError."""
    why = ""
    if setting.finish:
        why = "and `finish` would change the unified delta that its masks were made for; leave it out"
    elif recipe.output.as_ == "adapter":
        why = "and an adapter has no place for them; write a checkpoint"
    elif recipe.slices or recipe.output.tokenizer or anchor is None or anchor.rows:
        why = f"and {step.name!r} is not one tensor of the base; keep the base's layers and tokens"
    if why:
        raise PlanError(f"recipe: {step.method} writes a bit mask for each of the models, {why}")


def _fits(chosen: Chosen, step: Step) -> bool:
    """Whether a finisher is for this tensor: one for matrices leaves those alone whose rows are looked up."""
    part = get_part("finisher", chosen.name)
    return not part.matrices or (len(step.shape) == 2 and layout.role(step.name) not in ("embedding", "head"))


def _chain(prepare: tuple[Chosen, ...]) -> str:
    return json.dumps([(chosen.name, chosen.knobs) for chosen in prepare], sort_keys=True)
