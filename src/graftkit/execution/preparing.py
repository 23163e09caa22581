"""A step's inputs with what its recipe does to the deltas before the method sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graftkit.execution.blocks import Preparation, Reader, Workspace, block_shape
from graftkit.execution.reductions import Threshold, statistics_of
from graftkit.methods import kernel_of
from graftkit.methods.composition import Part, get_part
from graftkit.methods.random import Keyed
from graftkit.recipes.inputs import Named
from graftkit.recipes.steps import Applied, Step


def opened(
    step: Step,
    sources: tuple[Named, ...],
    space: Workspace,
    known: Mapping[str, Threshold],
    upto: int | None = None,
) -> tuple[Reader, list[dict[str, Any]]]:
    """The inputs of a step after its preparations, or after the first `upto` of them; and what the record says of each.

    A preparation's statistics are those of what the ones before it left; `known` holds those of an earlier stage.
    """
    reader, told = Reader(step, sources, space), []
    for applied in step.prepare[:upto]:
        part = get_part("preparation", applied.name)
        found, notes = statistics_of(part, applied.knobs, reader, known.get(applied.group))
        told.append({"name": applied.name, **notes})
        reader = reader.then(_preparation(part, applied, found, step))
    return reader, told


def _preparation(part: Part, applied: Applied, statistics: Mapping[str, np.ndarray], step: Step) -> Preparation:
    """One preparation as the reader applies it: in place, to the flat deltas [models, n] of a block."""
    names = part.reads[1:]

    def given(start: int) -> list[Any]:
        return [Keyed(applied.keys, start) if name == "rng" else statistics[name] for name in names]

    def compiled(deltas: np.ndarray, start: int, stop: int) -> None:
        kernel_of(str(part.kernel))(deltas, *given(start), **applied.knobs)

    def by_torch(deltas: np.ndarray, start: int, stop: int) -> None:
        import torch

        torch.set_num_threads(1)
        shape = (len(deltas), *block_shape(step, start, stop, part.grain))
        with torch.inference_mode():
            tensors = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in given(start)]
            made = part.function(torch.from_numpy(deltas).reshape(shape), *tensors, **applied.knobs)
        np.copyto(deltas, made.reshape(deltas.shape).numpy())

    return compiled if part.kernel else by_torch
