"""Bit masks beside a unified model: which of its entries belong to which of the models, and how long they are.

On disk: `masks/TASK.safetensors` holds for every tensor with masks one of its name, uint8, its bits in the order of the
elements and the lowest bit first; `masks/index.json` says whose they are, on what base, and the scales.
`checkpoints/masked.py` reads them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints.sink import Layout, Sink
from graftkit.checkpoints.sources import Checkpoint
from graftkit.execution.blocks import Reader, block_shape
from graftkit.execution.finishing import Block, Merged
from graftkit.recipes.inputs import Named
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step


def has_masks(step: Step) -> bool:
    """Whether a step's method makes masks."""
    return bool(step.method) and methods.get(step.method).masks is not None


def masked_steps(plan: Plan) -> list[Step]:
    """The steps of a plan whose methods make masks."""
    return [step for step in plan.steps if has_masks(step)]


def tasks(step: Step, sources: tuple[Named, ...]) -> tuple[str, ...]:
    """What the models' masks are called: by their directories, numbered where two are called alike."""
    found: list[str] = []
    for part in step.models:
        last = re.split(r"[/\\#]", sources[part.source].name.rstrip("/"))[-1].partition("@")[0]
        name = re.sub(r"[^\w.-]", "-", last.removesuffix(".yaml").removesuffix(".yml")).strip(".") or "model"
        again = sum(re.fullmatch(re.escape(name) + r"(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{again + 1}" if again else name)
    return tuple(found)


def files(plan: Plan) -> Layout:
    """The files of masks, for the sink."""
    steps = masked_steps(plan)
    sizes = [(step.name, "U8", (-(-step.elements // 8),)) for step in steps]
    return [(_file(task), sizes) for task in tasks(steps[0], plan.sources)] if steps else []


def _file(task: str) -> str:
    return f"masks/{task}.safetensors"


class Marked:
    """A merge that writes masks as its blocks are made, each once and in order; and what the scales are made of."""

    def __init__(self, merged: Merged, reader: Reader, sources: tuple[Named, ...], sink: Sink) -> None:
        self.merged, self.reader, self.sink = merged, reader, sink
        self.files = [_file(task) for task in tasks(reader.step, sources)]
        self.rest = [np.zeros(0, np.uint8) for _ in self.files]  # bits that do not fill a byte yet
        self.own, self.kept = np.zeros(len(self.files)), np.zeros(len(self.files))

    def __call__(self, start: int, stop: int) -> Block:
        """Merges a block, and marks in it what belongs to whom."""
        result, base, is_delta = self.merged(start, stop)
        step, deltas = self.reader.step, self.reader.read_deltas(start, stop, base)
        bits = _bits(step, deltas, result, block_shape(step, start, stop))
        self.own += np.abs(deltas).sum(axis=1, dtype=np.float64)
        self.kept += np.where(bits, np.abs(result), 0).sum(axis=1, dtype=np.float64)
        for k, (file, row) in enumerate(zip(self.files, bits, strict=True)):
            held = np.concatenate([self.rest[k], row.astype(np.uint8)])
            whole = held.size if stop == step.elements else held.size // 8 * 8
            packed = np.packbits(held[:whole], bitorder="little")
            self.sink.write_beside(file, step.name, (start - self.rest[k].size) // 8, packed)
            self.rest[k] = held[whole:]
        return result, base, is_delta

    def record(self) -> dict[str, Any]:
        """Per model the sum of its delta's magnitudes, and of the unified delta's under its mask."""
        return {"masks": {"own": self.own.tolist(), "kept": self.kept.tolist()}}


def _bits(step: Step, deltas: np.ndarray, result: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The models' masks of a block, [models, n]."""
    import torch

    with torch.inference_mode():
        stack = torch.from_numpy(deltas).reshape(-1, *shape)
        masks = methods.get(step.method).masked(stack, torch.from_numpy(result).reshape(shape), step.knobs)
    return masks.reshape(deltas.shape).numpy()  # type: ignore[no-any-return]


def index(plan: Plan, done: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The content of `masks/index.json`."""
    steps = masked_steps(plan)
    base = plan.sources[steps[0].base.source] if steps[0].base else None
    assert base is not None and isinstance(base.source, Checkpoint)
    named = zip(tasks(steps[0], plan.sources), _scales(steps, done), steps[0].models, strict=True)
    told = {
        "format": 1,
        "base": {
            "source": base.name,
            "directory": str(base.source.directory.resolve()),
            "fingerprint": base.source.fingerprint(),
            "names": {s.name: s.base.name for s in steps if s.base and s.base.name != s.name},
        },
        "tasks": {
            task: {"file": f"{task}.safetensors", "source": plan.sources[part.source].name, "scale": scale}
            for task, scale, part in named
        },
    }
    return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()


def _scales(steps: list[Step], done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, float]]:
    """Per model the scale of each tensor."""
    found: list[dict[str, float]] = [{} for _ in steps[0].models]
    for over in ("model", "means", "tensor", "none"):
        members = [step for step in steps if step.knobs.get("rescale", "none") == over]
        sums = [np.array([done[s.name]["masks"][key] for key in ("own", "kept")]) for s in members]  # [2, models]
        if over == "means":
            sums = [part / max(step.elements, 1) for part, step in zip(sums, members, strict=True)]
        whole = np.sum(sums, axis=0)
        for part, step in zip(sums, members, strict=True):
            own, kept = part if over == "tensor" else whole if over != "none" else np.ones_like(part)
            ratio = np.divide(own, kept, out=np.zeros_like(own), where=kept > 0)
            for scales, value in zip(found, ratio.tolist(), strict=True):
                scales[step.name] = value
    return found
