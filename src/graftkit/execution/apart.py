"""Merges of adapters factor by factor: all A become one A, all B one B, of the adapters' own rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.execution import shared
from graftkit.execution.apply import refusing
from graftkit.execution.blocks import non_finite
from graftkit.execution.factoring import Factored, norm_of
from graftkit.methods.random import Keyed
from graftkit.recipes.plan import Plan
from graftkit.recipes.steps import Step


@dataclass(frozen=True)
class Apart:
    """The factors of the adapters that change a tensor, unscaled, and the roots of their weights and scales.

    PEFT puts a weight's sign on A. `knobs` are those of these adapters.
    """

    pairs: list[LowRank]
    roots: list[float]
    signed: list[float]
    knobs: dict[str, Any]
    keys: tuple[int, ...]

    def stack(self, half: str) -> np.ndarray:
        """One half of all, `left` or `right`: [models, rows, columns]."""
        return np.stack([getattr(pair, half) for pair in self.pairs])


def apart(plan: Plan, step: Step) -> Factored:
    """The merged factors of one tensor, by the rule that the method has for them."""
    method = methods.get(step.method)
    if method.shares:
        return shared.apart(plan, step)
    given = _read(plan, step)
    assert step.form is not None
    turned = step.form.kind != "linear"  # the base keeps the weight as [in, out], so A stands on the left
    made = _together(step, given, turned) if method.halves else _each(step, given, turned)
    return Factored(*made, norm_of(made[0].T @ made[0], made[1] @ made[1].T), 0.0)


def _read(plan: Plan, step: Step) -> Apart:
    here = [k for k, part in enumerate(step.models) if part.kind != "base"]
    scales, pairs = [], []
    for part in (step.models[k] for k in here):
        source = plan.sources[part.source].source
        assert isinstance(source, Adapter)
        scales.append(source.factors[part.name].scale)
        pairs.append(source.load(part.name, np.float64, scaled=False))
        if not (np.isfinite(pairs[-1].left).all() and np.isfinite(pairs[-1].right).all()):
            raise non_finite(plan.sources[part.source].label, source.factors[part.name].b)
    weights = [step.knobs["weight"][k] * scale for k, scale in zip(here, scales, strict=True)]
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    knobs = {key: tuple(v[k] for k in here) if isinstance(v, tuple) else v for key, v in step.knobs.items()}
    return Apart(pairs, roots, signed, knobs, tuple(step.keys[k] for k in here if step.keys))


def _each(step: Step, given: Apart, turned: bool) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's merge: the method on all A, and on all B, as if they were deltas."""
    import torch

    method, start, made = methods.get(step.method), 0, {}
    for half in ("right", "left"):
        stack = torch.from_numpy(given.stack(half))
        is_a = half == ("left" if turned else "right")
        knobs = {**given.knobs, "weight": tuple(given.signed if is_a else given.roots)}
        read: dict[str, Any] = {"deltas": stack, "rng": Keyed(given.keys, start)}
        read |= method.measured(read, knobs)
        made[half] = method.function(*(read[name] for name in method.reads), **knobs).numpy()
        start += stack[0].numel()
    return made["left"], made["right"]


def _together(step: Step, given: Apart, turned: bool) -> tuple[np.ndarray, np.ndarray]:
    """A merge that looks at A and B of an adapter together."""
    import torch

    method = methods.get(step.method)
    a, b = (given.stack(half) for half in (("left", "right") if turned else ("right", "left")))
    a, b = (half.transpose(0, 2, 1) if turned else half for half in (a, b))
    roots = tuple(torch.tensor(root, dtype=torch.float64) for root in (given.signed, given.roots))
    halves = torch.from_numpy(a), torch.from_numpy(b)
    made = refusing(method, lambda: method.merged_halves(halves[0], halves[1], roots, given.knobs))
    merged_a, merged_b = (half.numpy() for half in made)
    return (merged_a.T, merged_b.T) if turned else (merged_b, merged_a)
