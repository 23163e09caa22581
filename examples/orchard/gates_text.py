"""The words of docs/experiment-graft.md that do not depend on the results, and a scenario's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """# Graft against the other methods, on the orchard

Written by `examples/orchard/gates_page.py` from `examples/orchard/gates_results.json`, which
`examples/orchard/gates_experiment.py` fills; do not edit. One command makes all of it, and goes on where it stopped.

**kept** is the mean over the skills of `(base - merged) / (base - expert)`, losses per answer token: 1 where a merge is
as good as each expert on its own skill; the columns of the skills have each one's own. Brackets are 95 % intervals of a
paired bootstrap over test items, which nothing here was trained, tuned or stopped by. *text* and *MMLU* are what nobody
was trained for: the loss on general text, and how many of the development questions are answered right. *statistic* is
what a merge has to be told of the examples, on disk: moments for all models, or a file of gates; then CPU seconds of
measuring it, of making the row (tuning, training, solving) and of merging. Tuned rows chose among three or four
settings by what is kept on dev. One seed, one base model of 135 million parameters, on one machine that did other
work as well.
"""


def sizes(held: Mapping[str, Any]) -> str:
    """How much was spent, and by what versions."""
    budget = held["budget"]
    rows = held["rows"]
    items = ", ".join(f"{skill} {len(rows['base']['test'][skill])}" for skill in (*held["skills"], "text", "mmlu"))
    return (
        f"{budget['dev']} dev items and {budget['samples']} training examples a skill; test items: {items}; trainings "
        f"of at most {budget['steps']} steps of 4 examples. Seed {held['seed']}, torch {held['versions']['torch']}."
    )
