"""Grams of RegMean++: layer after layer, each merged before the next one is looked at.

One model stands for all: its embeddings are the merged ones, and each of its layers is in turn that of every model,
while the inputs of that model's examples are measured, and then the merged one, through which all examples go on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints.statistics import Writer
from graftkit.errors import PlanError
from graftkit.execution import reductions
from graftkit.execution.apply import apply
from graftkit.execution.blocks import Reader, Workspace, block_shape, cuts, inputs_of
from graftkit.measuring.activations import Listener, batches
from graftkit.measuring.encoding import Row
from graftkit.measuring.layerwise import Layers
from graftkit.measuring.statistics_grams import moments_of
from graftkit.recipes import layout
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Stage:
    """A live model that is merged layer by layer: the recipe's steps with its parameters."""

    live: Any
    planned: Plan
    steps: tuple[Step, ...]
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, live: Any, planned: Plan) -> Stage:
        """Raises PlanError for a recipe that merges more than tensor by tensor."""
        steps = tuple(step for step in planned.steps if step.method)
        odd = next((step for step in steps if _is_odd(step)), None)
        if odd:
            raise PlanError(
                f"recipe: {odd.name!r} is merged in parts, over the whole model, by gates or with prepare or finish, "
                "and the statistics of a merged model are made tensor by tensor; take regmean"
            )
        held = dict(live.named_parameters(remove_duplicate=False))
        places = layout.live_names([step.name for step in steps], held)
        return cls(live, planned, steps, {step.name: held[places[step.name]] for step in steps if step.name in places})

    def within(self, module: Any) -> list[Step]:
        """The steps that make parameters of a module."""
        inside = {id(own) for own in module.parameters()}
        return [step for step in self.steps if id(self.parameters.get(step.name)) in inside]

    def put(self, step: Step, values: np.ndarray) -> None:
        """Gives a parameter its values, flat."""
        import torch

        parameter = self.parameters.get(step.name)
        if parameter is not None:
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.array(values)).reshape(parameter.shape))

    def models(self, step: Step) -> np.ndarray:
        """The weights of every model, float32 [models, n]."""
        reader = Reader(step, self.planned.sources, Workspace())
        whole = np.empty((len(step.models), step.elements), np.float32)
        for start, stop in cuts(step, "element"):
            whole[:, start:stop] = reader.read_models(start, stop, reader.read_base(start, stop))
        return whole

    def merge(self, step: Step, examples: Mapping[str, Any]) -> None:
        """Merges one tensor into its parameter; `examples` are the statistics of examples that its method reads."""
        method, space = methods.get(step.method), Workspace()
        reader = Reader(step, self.planned.sources, space)
        found = {**reductions.statistics_of(method, step.knobs, reader, None)[0], **examples}
        if method.factors:
            found["factors"] = method.factors_of(found, step.knobs, len(step.models))
        whole = np.empty(step.elements, np.float32)
        for start, stop in cuts(step):
            given = inputs_of(method, reader, start, stop, found)
            made = apply(method, given, step.knobs, block_shape(step, start, stop), "cpu", space)
            base = given["base"] if method.returns_delta and given["base"] is not None else 0
            whole[start:stop] = made + base
        self.put(step, whole)


def _is_odd(step: Step) -> bool:
    return bool(step.part or step.prepare or step.finish or step.group or methods.get(step.method).gates)


def measure(
    stage: Stage,
    layers: Mapping[str, Any],
    owners: Mapping[str, str],
    rows: Sequence[Sequence[Row]],
    writers: Sequence[Writer],
    tell: Tell,
    batch_tokens: int,
) -> None:
    """Writes the moments of every model's layers, `layers` by name, those that `owners` says share inputs once."""
    with ExitStack() as stack:
        spools = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-hidden-"))) for _ in rows]
        pairs = zip(rows, spools, strict=True)
        passes = [Layers(stage.live, list(batches(own, batch_tokens)), spool) for own, spool in pairs]
        inside = {step.name for layer in passes[0].layers for step in stage.within(layer)}
        astray = next((name for name in layers if name not in inside), None)
        if astray:
            raise PlanError(f"{astray!r} stands outside of the model's layers; give it another method by a rule")
        for step in stage.steps:
            if step.name not in inside:
                stage.merge(step, {})
        for own in passes:
            own.start(tell)
        for number, layer in enumerate(passes[0].layers):
            _layer(stage, stage.within(layer), number, passes, layers, owners, writers, tell)


def _layer(
    stage: Stage,
    steps: Sequence[Step],
    number: int,
    passes: Sequence[Layers],
    layers: Mapping[str, Any],
    owners: Mapping[str, str],
    writers: Sequence[Writer],
    tell: Tell,
) -> None:
    """Every model's own layer on its own examples, then the merged one on all."""
    weights = {step.name: stage.models(step) for step in steps}
    heard = [step.name for step in steps if owners.get(step.name) == step.name]
    found: list[dict[str, np.ndarray]] = []
    for k, own in enumerate(passes):
        for step in steps:
            stage.put(step, weights[step.name][k])
        held = {name: moments_of("full", _width(layers[name]), _device(stage.live)) for name in heard}
        own.through(number, [Listener(layers[name], inputs=one.add) for name, one in held.items()], tell, keep=False)
        found.append({name: moments.mean() for name, moments in held.items()})
        for name, moments in found[-1].items():
            writers[k].put(name, moments)
    for step in steps:
        owner = owners.get(step.name)
        stage.merge(step, {"merged_gram": np.stack([own[owner] for own in found])} if owner else {})
    for own in passes:
        own.through(number, (), tell)


def _width(module: Any) -> int:
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])


def _device(live: Any) -> Any:
    return next(live.parameters()).device
