"""One item under one model, in the three ways there are to score it; and the metrics that follow from items.

Every metric of a task is a ratio of sums over its items, so an item gives a numerator and a denominator for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A score: its name, unit and better direction; for every metric a task's score is a ratio of sums over items."""

    name: str
    unit: str
    better: Literal["higher", "lower"]


METRICS = {
    "loss": Metric("loss", "nats/token", "lower"),
    "bits_per_byte": Metric("bits_per_byte", "bits/byte", "lower"),
    "accuracy": Metric("accuracy", "", "higher"),
    "accuracy_by_sum": Metric("accuracy_by_sum", "", "higher"),
    "exact_match": Metric("exact_match", "", "higher"),
    "pass_at_1": Metric("pass_at_1", "", "higher"),
}
"""`loss`: negative log-probability per token of the right answers. `bits_per_byte`: the same per byte of their text,
which compares across tokenizers. `accuracy`: the choice with the highest log-probability per byte is the right one;
`accuracy_by_sum`: the one with the highest log-probability, whatever its length. `exact_match`: the greedy answer is a
right one; `pass_at_1`: the greedy program passes its test."""

METRICS_OF = {
    "answer_loss": ("loss", "bits_per_byte"),
    "multiple_choice": ("accuracy", "accuracy_by_sum", "loss"),
    "exact_match": ("exact_match",),
    "pass_at_1": ("pass_at_1",),
}
"""The metrics of each kind of task; the first is the primary one."""


@dataclass(frozen=True)
class ItemScore:
    """By likelihood; each tuple has one entry per choice: summed log-probability (nats), tokens, bytes."""

    subtask: str
    answer: int
    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    def parts(self, metric: str) -> tuple[float, float]:
        """Numerator and denominator of a metric; a task's score is the sum of the first over the sum of the second."""
        loss = -self.log_probs[self.answer]
        if metric == "loss":
            return loss, self.tokens[self.answer]
        if metric == "bits_per_byte":
            return loss / float(np.log(2)), self.bytes[self.answer]
        per = self.bytes if metric == "accuracy" else [1] * len(self.bytes)
        picked = int(np.argmax([value / size for value, size in zip(self.log_probs, per, strict=True)]))
        return float(picked == self.answer), 1.0


@dataclass(frozen=True)
class GeneratedItem:
    """By generation: what the model wrote, what was read from it (None: nothing), and whether that is right.

    `tokens` were generated, the one that ends a text included; `finished` where it ended by itself or at a stop, not at
    the limit. `note` says why a program failed.
    """

    subtask: str
    text: str
    found: str | None
    right: bool
    tokens: int
    finished: bool
    note: str = ""

    def parts(self, metric: str) -> tuple[float, float]:
        """1 where it is right, over 1."""
        return float(self.right), 1.0


@dataclass(frozen=True)
class MeasuredItem:
    """By another program, such as lm-eval: a numerator and a denominator for each of its metrics."""

    subtask: str
    values: Mapping[str, tuple[float, float]]

    def parts(self, metric: str) -> tuple[float, float]:
        """Numerator and denominator of a metric."""
        return self.values[metric]


AnyItem = ItemScore | GeneratedItem | MeasuredItem
