"""How an expert is trained, by name: the orchard's own settings and those of the Graft paper's Tables 14 and 15."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Everything about a training but its data and its seed.

    `warmup` below 1 is a share of the steps, else a number of steps. One of `steps` and `epochs` is set. `precision` is
    what a GPU computes in; on a CPU bfloat16 is some eighteen times slower than float32, which is taken instead.
    """

    full: bool
    rate: float
    batch: int
    warmup: float
    steps: int | None = None
    epochs: float | None = None
    accumulation: int = 1
    length: int = 256
    precision: str = "float32"
    rank: int = 8  # of an adapter; alpha is twice the rank

    def steps_for(self, records: int) -> int:
        """The number of optimiser steps for so many records: never a matter of time."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(self.epochs * records / (self.batch * self.accumulation))

    def warmup_steps(self, steps: int) -> int:
        """The number of steps over which the rate rises."""
        return max(1, math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup))


PRESETS: dict[str, Preset] = {
    "orchard-lora": Preset(full=False, rate=6e-4, batch=4, warmup=10, steps=130),
    "orchard-full": Preset(full=True, rate=5e-5, batch=4, warmup=10, steps=80),
    # arXiv 2506.23940, Table 14 (GraftModel); the rank below and alpha are ours, the tables name none.
    "graft-model": Preset(
        full=True, rate=1e-5, batch=1, accumulation=2, epochs=1, warmup=0.1, length=2048, precision="bfloat16"
    ),
    # Table 15 (GraftLoRA): adapters on attention and MLP.
    "graft-lora": Preset(
        full=False, rate=1e-4, batch=4, accumulation=8, epochs=3, warmup=0.1, length=2048, precision="bfloat16"
    ),
}


@dataclass(frozen=True)
class Schedule:
    """A rise to `rate` over `warmup` steps, times a cosine from the first step to nothing at `steps`."""

    steps: int
    rate: float
    warmup: int = 10

    def at(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))
