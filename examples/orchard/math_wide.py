"""Word problems of one or two steps in many wordings (`math_wide.yaml`), split by wording.

Every structure of dev and test is one that training has; no wording of theirs is. Answers are those of
`math_problems.py`: bare equations, then `#### N`. The subtask is the structure.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from math_problems import Template, in_turn, spans
from records import Record

WORDINGS = Path(__file__).with_name("math_wide.yaml")


@cache
def templates(split: str) -> tuple[Template, ...]:
    """Every wording of one split as a template of its structure; the structures take turns as far as they go."""
    entries = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))
    shapes = [_templates(entry, split) for entry in entries]
    longest = max(map(len, shapes))
    return tuple(shape[turn] for turn in range(longest) for shape in shapes if turn < len(shape))


def _templates(entry: dict, split: str) -> list[Template]:
    draw, derive = spans(entry["draw"]), tuple(entry.get("derive", ()))
    return [
        Template(entry["structure"], split, draw, derive, question, tuple(entry["steps"])) for question in entry[split]
    ]


def records(split: str, count: int, seed: int) -> list[Record]:
    """`count` different problems, the wordings taking turns."""
    return [problem.record for problem in in_turn(templates(split), count, f"wide {split} {seed}")]
