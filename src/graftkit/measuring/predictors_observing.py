"""Everything that predictors need of one model on one data set, from one run; small enough to be kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftkit.data.tasks import Task
from graftkit.measuring.compatibility import EPSILON, hearers_of, measure
from graftkit.measuring.compatibility_observing import Statistics
from graftkit.measuring.predictors import Responses, ResponseSums, SampleMeans
from graftkit.measuring.responses import Delta


@dataclass(frozen=True)
class Observed:
    """One model on one data set: its modules' statistics, the Gram matrices of its samples [modules, samples, samples],
    and what all models' deltas answer to its inputs."""

    statistics: Statistics
    grams: NDArray[np.float64]
    responses: Responses | None = None

    def save(self, file: Path) -> None:
        """Writes a `.npz` file, whole or not at all; what deltas answer is rounded to float32."""
        own, found = self.statistics, self.responses
        arrays: dict[str, Any] = {
            "modules": np.array(own.modules), "limits": own.limits, "values": own.values,
            "tokens": np.array(own.tokens), "grams": self.grams,
        }  # fmt: skip
        if found:
            arrays["own"] = np.array(found.own)
            arrays |= {f"dots/{name}": value.astype(np.float32) for name, value in found.dots.items()}
            arrays |= {f"squares/{name}": value.astype(np.float32) for name, value in found.squares.items()}
        draft = file.with_suffix(".part.npz")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(draft, **arrays)
        draft.replace(file)

    @staticmethod
    def load(file: Path) -> Observed:
        """Reads such a file."""
        with np.load(file) as held:
            kept = {name: held[name] for name in held.files}
        own = Statistics(
            tuple(map(str, kept["modules"])), kept["limits"], kept["values"], tuple(map(int, kept["tokens"]))
        )
        if "own" not in kept:
            return Observed(own, kept["grams"])
        dots, squares = (
            {name.partition("/")[2]: value.astype(np.float64) for name, value in kept.items() if name.startswith(kind)}
            for kind in ("dots/", "squares/")
        )
        return Observed(own, kept["grams"], Responses(int(kept["own"]), dots, squares))


def observe(
    live: Any,
    tokenizer: Any,
    task: Task,
    deltas: Mapping[str, Sequence[Delta]] | None = None,
    own: int = 0,
    *,
    epsilon: float = EPSILON,
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda done: None,
) -> Observed:
    """Runs a live model over a data set. `deltas` are all models' by matrix, `own` this one's number among them."""
    hearers = hearers_of(live, "all")
    means = SampleMeans(tuple(hearers), len(task.items))
    sums = ResponseSums(live, deltas, own) if deltas else None
    found = measure(
        live, tokenizer, task, hearers, epsilon=epsilon, batch_tokens=batch_tokens, samples=means.hearers(),
        extra=sums.listeners() if sums else (), advance=advance,
    )  # fmt: skip
    return Observed(found, means.grams(), sums.responses() if sums else None)
