"""What a recipe does to a step's merged delta before the base is added, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graftkit.errors import GraftError
from graftkit.execution.blocks import Reader, block_shape, cuts
from graftkit.execution.reductions import dot, inner_products
from graftkit.methods.composition import Part, get_part
from graftkit.recipes.steps import Applied

Block = tuple[np.ndarray, np.ndarray | None, bool]
"""A block of a merge: the result, the base there, and whether the result is a delta."""

Merged = Callable[[int, int], Block]
"""Merges elements `[start, stop)`."""


def finished(merged: Merged, reader: Reader, device: str) -> Merged:
    """The merge after the finishers of its step, whose statistics take a pass of their own over the blocks."""
    for applied in reader.step.finish:
        merged = _after(merged, applied, reader.unprepared(), device)
    return merged


def _after(before: Merged, applied: Applied, reader: Reader, device: str) -> Merged:
    part = get_part("finisher", applied.name)
    statistics = _statistics(part, before, reader)

    def block(start: int, stop: int) -> Block:
        delta, base = _delta(before, start, stop)
        deltas = reader.read_deltas(start, stop, base) if "deltas" in part.reads else None
        shape = block_shape(reader.step, start, stop, part.grain)
        return _run(part, {"delta": delta, "deltas": deltas, **statistics}, applied.knobs, shape, device), base, True

    return block


def _delta(merged: Merged, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The merged delta of a block, and the base, of which adapters that become an adapter have none."""
    result, base, is_delta = merged(start, stop)
    return result if is_delta or base is None else result - base, base


def _statistics(part: Part, merged: Merged, reader: Reader) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if "norm" in part.reads:
        deltas = (_delta(merged, start, stop)[0] for start, stop in cuts(reader.step))
        found["norm"] = np.array(math.sqrt(sum(dot(delta, delta) for delta in deltas)), np.float64)
    if "norms" in part.reads or "dots" in part.reads:
        dots = inner_products(reader, True)
        found |= {"dots": dots, "norms": np.sqrt(np.diagonal(dots))}
    return found


def _run(
    part: Part, given: Mapping[str, np.ndarray | None], knobs: Mapping[str, Any], shape: tuple[int, ...], device: str
) -> np.ndarray:
    """A finisher's delta for a block, flat [n]."""
    import torch

    torch.set_num_threads(1)
    flat = given["delta"]
    assert flat is not None

    def tensor(name: str) -> Any:
        value = torch.from_numpy(given[name]).to(device)
        return value.reshape(shape) if name == "delta" else value.reshape(-1, *shape) if name == "deltas" else value

    with torch.inference_mode():
        made = part.function(*(tensor(name) for name in part.reads), **knobs)
    if made.numel() != flat.size:
        raise GraftError(f"finisher {part.name!r} returned {made.numel()} elements for {flat.size}; it keeps the shape")
    return np.ascontiguousarray(made.reshape(-1).cpu().numpy(), flat.dtype)
