"""`graft gates solve`: gates in closed form from examples of each model's domain, and the recipe that merges by them.

For full models the deltas are held in memory, a float32 copy of the matrices for each; for adapters their factors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.data.tasks import Task
from graftkit.errors import OutputError
from graftkit.improving.closed_forms import convex, free
from graftkit.improving.gated import Gated, Place, deltas_of, domains, gated, write
from graftkit.measuring.encoding import encode
from graftkit.measuring.loading import default_device
from graftkit.measuring.responses import Delta, measure
from graftkit.recipes.recipe import Recipe, load

BATCH_TOKENS = 2048  # tokens that a model runs on at once, padding included

Tell = Callable[[str, int, int], None]
"""Told of a model's name, and how many of its examples are done with."""


@dataclass(frozen=True)
class Solved:
    """What was solved: where the recipe stands, matrices and channels, and the seconds that the models ran."""

    recipe: Path
    kind: str
    matrices: int
    channels: int
    examples: int
    tokens: int
    seconds: float


def solve(
    recipe: Recipe | str | Path,
    out: Path,
    *,
    data: Sequence[Place | Sequence[Task]] = (),
    samples: int = 200,
    ridge: float = 0.1,
    prior: float = 1.0,
    device: str | None = None,
    advance: Tell = lambda name, done, total: None,
) -> Solved:
    """Solves gates for every matrix that the recipe merges by gates, and writes them and the recipe under `out`.

    The recipe's method says which form: `graft_free` takes free coefficients (`ridge` towards `prior`), the others
    weights that sum to one. `data`: a task of kind answer_loss for each model, or several, where none stands beside
    it in the recipe; at most `samples` examples of each model are used, all their tokens. Each model runs once, over
    its own examples.
    Raises PlanError, DataError or OutputError.
    """
    asked = load(recipe)
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name")
    tasks = domains(asked, data, samples)
    wanted = gated(asked)
    deltas = {step.key: deltas_of(wanted, step, device or default_device()) for step in wanted.steps}
    started = time.perf_counter()
    found, rows = _moments(wanted, tasks, deltas, device or default_device(), advance)
    kind = "coefficient" if wanted.free else "weight"
    solved = {n: free(own, ridge, prior) if wanted.free else convex(own) for n, own in found.items()}
    place = write(wanted, out, solved, kind)
    channels = sum(own.shape[1] for own in solved.values())
    return Solved(place, kind, len(solved), channels, *rows, time.perf_counter() - started)


def _moments(
    wanted: Gated, tasks: Sequence[Sequence[Task]], deltas: dict[str, list[Delta]], device: str, advance: Tell
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """The moments of each matrix, [domains, models, models, out], and how many examples and tokens they are of."""
    found: dict[str, list[Any]] = {name: [] for name in deltas}
    seen = tokens = 0
    for named, own_tasks in zip(wanted.models, tasks, strict=True):
        with wanted.live(named, device) as (live, tokenizer):
            context = getattr(live.config, "max_position_embeddings", None)
            rows = [row for task in own_tasks for row in encode(tokenizer, task, context)]
            done = 0

            def tell(count: int, label: str = named.name, total: int = len(rows)) -> None:
                nonlocal done
                done += count
                advance(label, done, total)

            for name, own in measure(live, rows, deltas, batch_tokens=BATCH_TOKENS, advance=tell).items():
                found[name].append(own)
        seen, tokens = seen + len(rows), tokens + sum(row.length for row in rows)
    return {name: np.stack(own) for name, own in found.items()}, (seen, tokens)
