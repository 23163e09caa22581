"""Running a method as the engine does: on a tensor or on a block of it, by its function or by its compiled twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit.methods import BY_ROWS, Method
from graftkit.methods.random import Keyed
from graftkit.testing import samples
from graftkit.testing.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor


def settings(method: Method, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all knobs: the given ones, defaults for the rest."""
    return {name: knobs.get(name, knob.default) for name, knob in method.knobs.items()}


def inputs(method: Method, sample: Sample, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a method may read, by name, with the statistics of the whole tensor."""
    given = {"base": sample.base, "models": sample.models, "deltas": sample.models - sample.base, "rng": sample.rng}
    given |= {"shape": tuple(sample.base.shape), "gates": samples.gates(sample)}
    given |= of_examples(method, sample, knobs)
    return {**given, **method.measured(given, settings(method, knobs))}


def of_examples(method: Method, sample: Sample, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of examples that a method reads, by name."""
    turned = knobs.get("inputs") == "rows"
    return {name: samples.of_examples(name, sample, turned) for name in method.measured_with_examples}


def block(given: Mapping[str, Any], start: int, stop: int, row: tuple[int, ...] = ()) -> dict[str, Any]:
    """Elements `[start, stop)` of all inputs, as the engine cuts them; `row` is the shape of a row, for grain `row`."""
    shape = (-1, *row)
    base = given["base"].reshape(-1)[start:stop].reshape(shape)
    stacks = {
        name: given[name].reshape(given[name].shape[0], -1)[:, start:stop].reshape(given[name].shape[0], *shape)
        for name in ("models", "deltas", "fisher")
        if name in given
    }
    width = math.prod(row)
    rows = {name: given[name][:, start // width : -(-stop // width)] for name in BY_ROWS if row and name in given}
    return {**given, **stacks, **rows, "base": base, "rng": Keyed(given["rng"].keys, start)}


def result(method: Method, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> Tensor:
    """What the method's function returns, weights or a delta [*shape]."""
    return method.function(*(given[name] for name in method.reads), **settings(method, knobs))  # type: ignore[no-any-return]


def weights(method: Method, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> Tensor:
    """The merged weights [*shape], by the method's function."""
    made = result(method, given, knobs)
    return given["base"] + made if method.returns_delta else made  # type: ignore[no-any-return]


def kernel_weights(method: Method, given: Mapping[str, Any], knobs: Mapping[str, Any]) -> Tensor:
    """The merged weights, flat [n], by the method's compiled twin; the inputs are copied, for it may overwrite them."""
    import torch

    from graftkit.execution.apply import run_compiled

    flat = {name: _flat(name, given[name]) for name in method.reads}
    out = np.full(given["base"].numel(), np.nan, given["base"].numpy().dtype)
    run_compiled(method, flat, settings(method, knobs), out)
    made = torch.from_numpy(out)
    return given["base"].reshape(-1) + made if method.returns_delta else made


def through_files(
    method: Method, directory: Path, tensors: Mapping[str, Sample], knobs: Mapping[str, Any], with_base: bool
) -> dict[str, tuple[Tensor, Keyed]]:
    """The merged weights of several tensors, by a recipe on checkpoints in a directory; and the streams drawn from."""
    from safetensors.torch import load_file, save_file

    from graftkit.execution.local import execute
    from graftkit.recipes.plan import plan

    count = next(iter(tensors.values())).count
    held = {"base": {name: sample.base.float() for name, sample in tensors.items()}}
    held |= {f"model{k}": {name: sample.models[k].float() for name, sample in tensors.items()} for k in range(count)}
    for model, weights in held.items():
        (directory / model).mkdir(parents=True)
        (directory / model / "config.json").write_text("{}")
        save_file(
            {name: value.contiguous() for name, value in weights.items()}, directory / model / "model.safetensors"
        )
    models = [str(directory / model) for model in held if model != "base"]
    recipe: dict[str, Any] = {"method": method.name, "models": models, "knobs": dict(knobs)}
    if method.gates and method.settings(knobs).get("local_signal") != "none":
        recipe["gates"] = _gates_file(method, directory, tensors, models)
    recipe |= {"base": str(directory / "base")} if with_base else {}
    if method.measured_with_examples:
        beside = [{"model": model, "data": f"{k}.jsonl"} for k, model in enumerate(models)]
        recipe |= {"models": beside, "statistics": str(directory / "statistics")}
        found = {name: of_examples(method, one, knobs) for name, one in tensors.items()}
        for kind in method.measured_with_examples:
            values = [{name: of[kind][k].float().numpy() for name, of in found.items()} for k in range(count)]
            write_examples(recipe, kind, values)
    made = plan(recipe)
    execute(made, directory / "out", workers=1)
    merged = load_file(directory / "out" / "model.safetensors")
    return {step.name: (merged[step.name], Keyed(step.keys)) for step in made.steps}


def _gates_file(method: Method, directory: Path, tensors: Mapping[str, Sample], models: list[str]) -> str:
    """Writes the samples' gates, one a channel, for models on disk."""
    from graftkit.checkpoints.gates import write_gates
    from graftkit.checkpoints.sources import open_checkpoint

    values = {name: samples.gates(one)[..., 0].numpy() for name, one in tensors.items() if one.base.ndim > 1}
    prints = [open_checkpoint(Path(model)).fingerprint() for model in models]
    write_gates(directory / "gates.safetensors", values, kind=method.gates[0], models=prints)
    return str(directory / "gates.safetensors")


def write_examples(recipe: Mapping[str, Any], kind: str, values: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Writes statistics of examples of a recipe's models, one mapping a model, as if they had been measured."""
    from graftkit.checkpoints.statistics import write_statistics
    from graftkit.recipes.plan import plan
    from graftkit.recipes.statistics import directory_of, wanted

    made = plan(recipe, without_gates=True, without_statistics=True)
    for k, (about, own) in enumerate(zip(wanted(made)[kind], values, strict=True)):
        write_statistics(directory_of(made.recipe) / f"{k}.{kind}.safetensors", about, own)


def _flat(name: str, value: Any) -> Any:
    """One input as a compiled twin takes it: stacks [models, n], the base [n], statistics as they are."""
    if name == "rng":
        return value
    array = value.detach().numpy()
    shape = (array.shape[0], -1) if name in ("models", "deltas") else (-1,) if name == "base" else array.shape
    return np.array(array.reshape(shape), order="C")
