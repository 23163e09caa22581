"""The experts of the orchard: what each learns from and the settings it is trained with. A new expert is one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import code_functions
import math_problems
from records import Record


@dataclass(frozen=True)
class Expert:
    """One skill: `load(split)` gives its records, the rest are the settings of `train.py`."""

    load: Callable[[str], list[Record]]
    chat: bool  # wrap the prompt by the chat template, and end the answer as a turn ends
    source: str
    steps: int
    batch: int
    rate: float = 6e-4
    held_out: int = 48  # dev records that the loss is measured on


def math_records(split: str) -> list[Record]:
    """Generated problems; the seed differs by split, and so do the templates."""
    count, seed = {"train": (4000, 1), "dev": (96, 2), "test": (96, 3)}[split]
    return [problem.record for problem in math_problems.problems(split, count, seed)]


EXPERTS: dict[str, Expert] = {
    "math": Expert(
        load=math_records,
        chat=True,
        source="generated word problems (math_templates.yaml), split by template",
        steps=130,
        batch=4,
    ),
    "code": Expert(
        load=code_functions.records,
        chat=False,
        source="Python standard library functions with docstring, split by module; PSF licence",
        steps=150,
        batch=3,
    ),
}
