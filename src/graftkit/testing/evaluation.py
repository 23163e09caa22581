"""Running a method as the engine does: on a tensor or on a block of it, by its function or by its compiled twin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit.methods import Method
from graftkit.methods.random import Keyed
from graftkit.testing.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor


def settings(method: Method, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all knobs: the given ones, defaults for the rest."""
    return {name: knobs.get(name, knob.default) for name, knob in method.knobs.items()}


def inputs(method: Method, sample: Sample, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a method may read, by name, with the statistics of the whole tensor."""
    given = {"base": sample.base, "models": sample.models, "deltas": sample.models - sample.base, "rng": sample.rng}
    return {**given, **method.measured(given, settings(method, knobs))}


def block(given: Mapping[str, Any], start: int, stop: int, row: tuple[int, ...] = ()) -> dict[str, Any]:
    """Elements `[start, stop)` of all inputs, as the engine cuts them; `row` is the shape of a row, for grain `row`."""
    shape = (-1, *row)
    base = given["base"].reshape(-1)[start:stop].reshape(shape)
    stacks = {
        name: given[name].reshape(given[name].shape[0], -1)[:, start:stop].reshape(given[name].shape[0], *shape)
        for name in ("models", "deltas")
    }
    return {**given, **stacks, "base": base, "rng": Keyed(given["rng"].keys, start)}


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

    from graftkit.execution.apply import kernel_of

    assert method.kernel is not None
    flat = {name: _flat(name, given[name]) for name in method.reads}
    out = np.full(given["base"].numel(), np.nan, given["base"].numpy().dtype)
    kernel_of(method.kernel)(*flat.values(), **settings(method, knobs), out=out)
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
    recipe = {"method": method.name, "models": models, "knobs": dict(knobs)}
    made = plan(recipe | ({"base": str(directory / "base")} if with_base else {}))
    execute(made, directory / "out", workers=1)
    merged = load_file(directory / "out" / "model.safetensors")
    return {step.name: (merged[step.name], Keyed(step.keys)) for step in made.steps}


def _flat(name: str, value: Any) -> Any:
    """One input as a compiled twin takes it: stacks [models, n], the base [n], statistics as they are."""
    if name == "rng":
        return value
    array = value.detach().numpy()
    shape = (array.shape[0], -1) if name in ("models", "deltas") else (-1,) if name == "base" else array.shape
    return np.array(array.reshape(shape), order="C")
