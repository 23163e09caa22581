"""What files of statistics hold for a step, as a method reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from graftkit.checkpoints.statistics import Statistics
from graftkit.execution.blocks import ByRows, Reader
from graftkit.execution.factoring import Core
from graftkit.recipes.statistics import Measured, needed
from graftkit.recipes.steps import Step

Pair = tuple[np.ndarray, np.ndarray]


def read(step: Step, measured: Measured | None, reader: Reader) -> dict[str, Any]:
    """The inputs `gram`, `fisher` and `core_gram` of a step that has them, of whole tensors."""
    found: dict[str, Any] = {}
    if measured is None:
        return found
    for kind in needed(step):
        own = list(measured.of(kind, step))
        if kind in ("gram", "merged_gram"):
            found[kind] = np.stack([matrix_of(one, name, _width(step)) for one, name in own])
        elif kind == "fisher":
            found[kind] = ByRows(partial(_fisher, own), 1)
        else:
            rights = [None if feed.delta is None else feed.delta_factors().right for feed in reader.models]
            found[kind] = _outside(own, [right for right in rights if right is not None])
    return found


def in_core(step: Step, measured: Measured | None, core: Core, pairs: Sequence[Pair]) -> dict[str, Any]:
    """`core_gram` in the coordinates of a core's columns, [models, columns, columns]."""
    if measured is None or "core_gram" not in needed(step) or core.columns is None:
        return {}
    stacked = np.concatenate([right for _, right in pairs]) @ core.columns  # z = stacked @ y
    back = np.linalg.pinv(stacked, rcond=1e-10)
    return {"core_gram": np.stack([back @ one.values(name) @ back.T for one, name in measured.of("core_gram", step)])}


def _outside(own: Sequence[tuple[Statistics, str]], rights: Sequence[np.ndarray]) -> np.ndarray:
    """The same for inputs as the layer gets them: zero for what no adapter reads."""
    back = np.linalg.pinv(np.concatenate(rights).astype(np.float64), rcond=1e-10)
    return np.stack([back @ one.values(name) @ back.T for one, name in own])


def _fisher(own: Sequence[tuple[Statistics, str]], start: int, stop: int) -> np.ndarray:
    return np.stack([one.values(name, start, stop) / np.float32(one.about.scale or 1) for one, name in own])


def _width(step: Step) -> int:
    return step.shape[0] if step.knobs.get("inputs") == "rows" else step.shape[1]


def matrix_of(own: Statistics, name: str, width: int) -> np.ndarray:
    """Second moments as a whole matrix, float32 [in, in], from whatever form they are kept in."""
    kept = own.values(name).astype(np.float32, copy=False)
    if own.about.form.startswith("block"):
        made, size = np.zeros((width, width), np.float32), own.about.number
        for k, block in enumerate(kept):
            ends = slice(k * size, min((k + 1) * size, width))
            made[ends, ends] = block[: width - k * size, : width - k * size]
        return made
    if own.about.form.startswith("sketch"):
        made = kept[:, :-1] @ kept[:, :-1].T
        np.einsum("ii->i", made)[:] += kept[:, -1]
        return made
    return kept
