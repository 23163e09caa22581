"""Adapters whose factors have learnt along with gates, saved beside the gates, and the recipe of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from graftkit.checkpoints.adapters import WEIGHTS, Adapter
from graftkit.improving.gated import Gated, gated
from graftkit.measuring.responses import Delta

SQUASHING = ("a", "c", "bins", "last_bin", "normaliser", "global_signal", "sharpness", "of")
"""Knobs of graft that mean nothing where its weights are given."""


def tuned(asked: Gated, factors: Mapping[str, Sequence[Delta]], place: Path) -> Gated:
    """The same recipe with the adapters as they are now, saved under `place`, in numbers of their own.

    By graft_convex in graft's place: gates that were learnt beside moving weights are kept as the weights that they
    came to, since entropies have moved too.
    """
    recipe = asked.plan.recipe
    names = [_saved(asked, k, factors, place) for k in range(len(recipe.models))]
    entries = [entry.model_copy(update={"model": n}) for entry, n in zip(recipe.models, names, strict=True)]

    def method(name: str | None) -> str | None:
        return "graft_convex" if name == "graft" else name

    def knobs(given: Mapping[str, object]) -> dict[str, object]:
        return {key: value for key, value in given.items() if key not in SQUASHING}

    rules = [
        rule.model_copy(update={"method": method(rule.method), "knobs": knobs(rule.knobs)}) for rule in recipe.rules
    ]
    changed = {"models": entries, "method": method(recipe.method), "knobs": knobs(recipe.knobs), "rules": rules}
    return gated(recipe.model_copy(update={**changed, "accept_base": True}))


def _saved(asked: Gated, k: int, factors: Mapping[str, Sequence[Delta]], place: Path) -> str:
    """One adapter with its own configuration, in a directory of its name."""
    from safetensors.torch import load_file, save

    adapter = asked.models[k].source
    assert isinstance(adapter, Adapter)
    directory = place / f"{k + 1}-{adapter.directory.name}"
    directory.mkdir(parents=True, exist_ok=True)
    for file in adapter.directory.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copy(file, directory)
    held = load_file(adapter.directory / WEIGHTS)
    for step in asked.steps:
        own, delta = step.models[k], factors[step.key][k]
        if own.kind != "factors" or delta.left is None or delta.right is None:
            continue
        pair = adapter.factors[own.name]
        left, right = delta.left.cpu().float(), delta.right.cpu().float()
        a, b = (left.T, right.T) if pair.transposed else (right, left)
        scale = pair.scale or 1.0
        held[pair.a.name] = (a / (scale if pair.transposed else 1)).contiguous()
        held[pair.b.name] = (b / (1 if pair.transposed else scale)).contiguous()
    (directory / WEIGHTS).write_bytes(save(held, metadata={"format": "pt"}))
    return str(directory.resolve())
