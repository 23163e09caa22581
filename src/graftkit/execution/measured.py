"""What files of statistics hold for a step, as a method reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from graftkit.checkpoints.statistics import Statistics
from graftkit.execution.blocks import ByRows, Reader
from graftkit.execution.factoring import Core
from graftkit.execution.features import behind, features, probes
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
            found[kind] = behind([one.values(name) for one, name in own], inverse(features(reader)))
    return found


def beside(step: Step, measured: Measured | None) -> np.ndarray | None:
    """Directions of inputs that a core needs beside those that its adapters read, [count, in]: the probes."""
    if measured is None or "core_gram" not in needed(step) or not step.knobs["probes"]:
        return None
    return probes(step.shape[1], min(int(step.knobs["probes"]), step.shape[1]))


def in_core(step: Step, measured: Measured | None, core: Core, pairs: Sequence[Pair]) -> dict[str, Any]:
    """`core_gram` in the coordinates of a core's columns, [models, features, columns]."""
    if measured is None or "core_gram" not in needed(step) or core.columns is None:
        return {}
    more = beside(step, measured)
    rows = np.concatenate([right for _, right in pairs] + ([] if more is None else [more]))  # z = rows @ x
    own = [one.values(name) for one, name in measured.of("core_gram", step)]
    return {"core_gram": behind(own, inverse(rows @ core.columns))}


def inverse(rows: np.ndarray) -> np.ndarray:
    """The pseudo-inverse of features; what two of them share is in both."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    scale = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    return np.asarray(np.linalg.pinv(rows * scale, rcond=1e-10) * scale.T)


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
