"""What each method kept of the experts' gains, from the orchard's results, for the methods' pages.

    python examples/orchard/measured_methods.py && make pages

Reads whatever rows gates_results.json and wudi_results.json hold; writes src/graftkit/cli/measured.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gates_rows import SCENARIOS, Row
from gates_scores import kept
from graftkit.measuring.resampling import interval

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "src" / "graftkit" / "cli" / "measured.json"
GATES, WUDI = HERE / "gates_results.json", HERE / "wudi_results.json"


def from_gates(held: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The rows of the experiment on gates, whose scores are drawn anew."""
    known: dict[str, Row] = {row.name: row for scenario in SCENARIOS for row in scenario.rows}
    for own in held.values():
        experts = ", ".join(own["skills"]) + (" (full fine-tunes)" if "full " in own["scenario"] else "")
        for name, found in own["rows"].items():
            if name in known:
                share, chosen = kept(own, name), found.get("chosen", {})
                told = ", ".join([name, *(f"{knob} {value}" for knob, value in chosen.items())])
                method = str(known[name].recipe["method"])
                yield method, (experts, told, share[0], *interval(share[1:]), "experiment-graft.md")


def from_wudi(held: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The rows of the experiment on WUDI's descent."""
    for pair, own in held.items():
        for row, found in own["test"].items():
            share = found["shares"]["mean"]
            told = {"sum": "the plain sum", "adam": "300 steps of Adam"}.get(row, f"steps {row}")
            yield (
                "wudi",
                (pair.replace(" + ", ", "), told, share["value"], share["low"], share["high"], "methods/wudi.md"),
            )


def measured() -> dict[str, list[tuple[Any, ...]]]:
    """All rows by method, the best of each set of experts first."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for file, read in ((GATES, from_gates), (WUDI, from_wudi)):
        for method, row in read(json.loads(file.read_text())) if file.is_file() else ():
            rounded = tuple(value if isinstance(value, str) else round(float(value), 3) for value in row)
            rows.setdefault(method, []).append(rounded)
    for own in rows.values():
        experts = list(dict.fromkeys(row[0] for row in own))
        own.sort(key=lambda row: (experts.index(row[0]), -row[2]))
    return dict(sorted(rows.items()))


def main() -> None:
    """Writes them, a line for each row."""
    methods = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]"
        for name, rows in measured().items()
    ]
    TARGET.write_text("{\n" + ",\n".join(methods) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
