"""Merging into a model in memory: one recipe after another, no disk.

    with Live.open("recipe.yaml", dtype="float32") as live:
        live.apply()                                                # the recipe as it stands
        live.apply({"knobs": {"scale": 0.5}})                       # the same with some values changed
        live.apply({"models": [{"weight": 0.3}, {"weight": 0.9}]})  # what stands beside models, by their place
        live.apply(other)                                           # any recipe whose output has the same tensors
        live.model, live.tokenizer                                  # what transformers gives
        evaluate([live.named("trial 3")], tasks)                    # a live model as `graftkit.evaluate` takes it

`apply` writes every parameter from the base anew: nothing of what was applied before is left, and the values are those
that `graft merge` and a load in the same dtype give, to the bit. Inputs are mapped once; adapters stay factors. Kept
between applications are only what weights do not touch (thresholds of a density, norms, dots; and of a ballot which
values count, at most a byte an element for eight models), the plan, which stands where only weights are new, and
factors twice, alone and side by side, in the precision of arithmetic. The module comes from transformers (with images:
`AutoModelForImageTextToText`); which parameter a tensor on disk is, is
checked once by comparing values. What is done to parameters in between, the next `apply` undoes: all are written every
time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit.errors import GraftError, PlanError, unknown
from graftkit.execution import local, module
from graftkit.execution.live_steps import LiveSteps
from graftkit.execution.resident import renamed, resident
from graftkit.recipes import inputs
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import Recipe, load
from graftkit.recipes.reweighting import reweighted
from graftkit.recipes.steps import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from graftkit.checkpoints.resolve import Source

RecipeLike = Recipe | Mapping[str, Any] | str | Path
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Live:
    """A model in memory that recipes are merged into. Made by `Live.open`."""

    def __init__(self, planned: Plan, dtype: str, device: str, workers: int) -> None:
        self.recipe, self.dtype, self.device = planned.recipe, dtype, device
        self._sources: dict[tuple[Path, type], tuple[Source, str]] = {}
        self._planned = {planned.recipe.method: (planned, inputs.signature(planned.sources))}
        self._steps = LiveSteps(workers)
        self.plan = self._held(planned)
        self._form = _form_of(planned)
        self.model, self._places = self._module()

    @classmethod
    def open(
        cls,
        recipe: RecipeLike | Plan,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        workers: int | None = None,
    ) -> Live:
        """Plans a recipe and loads the model that its results will stand in, still with the weights of `output.like`.

        `dtype`: that of the module; merged values are rounded as the recipe's output says, then cast as by a load.
        Raises PlanError for a recipe that makes an adapter, and where a tensor has no place in the module.
        """
        planned = recipe if isinstance(recipe, Plan) else plan(recipe)
        if planned.recipe.output.as_ == "adapter":
            raise PlanError("recipe.output: a live merge needs a whole model; leave out `as: adapter`")
        local.check_device(device)
        if dtype not in DTYPES:
            raise GraftError(f"--dtype: {unknown('dtype', dtype, DTYPES)}")
        return cls(planned, dtype, device, workers or os.cpu_count() or 1)

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets inputs and threads go; the model stays as it is."""
        self._steps.close()
        for source, _ in self._sources.values():
            source.close()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that the output is like; where that takes images its processor."""
        return module.reader(self._like_directory())

    def named(self, name: str) -> tuple[str, Any, Any]:
        """The model as `graftkit.evaluate` takes live ones."""
        return name, self.model, self.tokenizer

    def variant(self, change: RecipeLike | None) -> Recipe:
        """The opened recipe with some of its values changed; a whole recipe is taken as it is."""
        if change is None:
            return self.recipe
        if not isinstance(change, Mapping) or "method" in change:
            return load(change)
        merged = _changed(self.recipe.to_dict(), change)
        return load(merged).model_copy(update={"directory": self.recipe.directory})

    def apply(self, change: RecipeLike | Plan | None = None) -> Plan:
        """Merges a recipe, or the opened one with some values changed, into the model; returns what was carried out.

        Raises as `plan` and `merge` do, and PlanError for a recipe whose output has other tensors than the module.
        After an error the model is unusable until the next success.
        """
        planned = change if isinstance(change, Plan) else self._plan(self.variant(change))
        if _form_of(planned) != self._form:
            raise PlanError(
                "recipe: its output has other tensors, rows or another configuration than the model that was opened; "
                "open it by itself"
            )
        planned = self._held(planned)
        try:
            with _one_thread():
                self.plan = self._steps.carry_out(planned, self._target)
        finally:
            for held in (planned.gates, planned.statistics):
                if held:
                    held.close()
        return self.plan

    def _plan(self, recipe: Recipe) -> Plan:
        """The plan of a recipe: the method's last one, where only weights are new and no input has been written to."""
        before, state = self._planned.get(recipe.method, (None, ""))
        planned = reweighted(before, recipe) if before else None
        if planned is None or state != inputs.signature(planned.sources):
            planned = plan(recipe)
        self._planned[recipe.method] = planned, inputs.signature(planned.sources)
        return planned

    def _held(self, planned: Plan) -> Plan:
        """The plan on inputs that stay until they are written to, which makes all that was found of them void."""
        named = []
        for one in planned.sources:
            local.make_nested(one, {"workers": None})
            key, now = (one.source.directory.resolve(), type(one.source)), inputs.signature((one,))
            held, before = self._sources.get(key, (None, now))
            if now != before:
                self._steps.forget()
            if held is None or now != before or one.source.kind == "view":
                held = resident(one.source)
                self._sources[key] = held, now
            named.append(replace(one, source=renamed(held, one.source)))
        return replace(planned, sources=tuple(named))

    def _like_directory(self) -> Path:
        return self.plan.sources[self.plan.like].source.directory

    def _module(self) -> tuple[Any, dict[str, Tensor]]:
        """The module, and the parameter of each tensor of the output."""
        planned = self.plan
        tensors = {step.name: (step.dtype, step.whole or step.shape) for step in planned.steps}
        if planned.config is None:
            model = module.load(self._like_directory(), self.dtype, self.device)
            like = planned.sources[planned.like].source

            def values(name: str) -> Tensor:
                info = like.tensors[name]
                raw = np.empty(info.nbytes, np.uint8)
                return module.tensor_of(like.read(info, 0, info.elements, raw), info.dtype)  # type: ignore[union-attr]
        else:
            made = {name: module.empty(*form) for name, form in tensors.items()}
            self._steps.carry_out(planned, lambda step: made[step.name])
            model = module.build(planned.config, made, self.dtype, self.device)

            def values(name: str) -> Tensor:
                return made[name].reshape(-1)

        return model, module.places(model, {name: shape for name, (_, shape) in tensors.items()}, values)

    def parameter(self, step: Step) -> Tensor:
        """The parameter that a step's result stands in."""
        return self._places[step.name]

    def _target(self, step: Step) -> Tensor | None:
        return self._places.get(step.name)


def _form_of(planned: Plan) -> Any:
    """What the outputs of two recipes must share to stand in one module."""
    tensors = sorted({(step.name, step.whole or step.shape) for step in planned.steps})
    return tensors, planned.config, planned.sources[planned.like].fingerprint


def _changed(value: Any, change: Any) -> Any:
    """A recipe's data with some of it replaced: mappings by key, lists of mappings (models, rules) by place."""
    if isinstance(value, Mapping) and isinstance(change, Mapping):
        return {**value, **{key: _changed(value.get(key), item) for key, item in change.items()}}
    parts = isinstance(value, list) and isinstance(change, list) and all(isinstance(one, Mapping) for one in change)
    if parts and len(value) == len(change) and all(isinstance(one, Mapping) for one in value):
        return [_changed(one, item) for one, item in zip(value, change, strict=True)]
    return change


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, since workers are the parallelism; afterwards on as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
