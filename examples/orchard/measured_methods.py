"""What each method kept of the experts' gains, from the orchard's results, for the methods' pages.

    python examples/orchard/measured_methods.py && make pages

Reads whatever rows gates_results.json and wudi_results.json hold; writes src/graftkit/cli/measured.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gates_rows import SCENARIOS, Row
from gates_scores import kept
from graftkit.measuring.resampling import interval

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "src" / "graftkit" / "cli" / "measured.py"
GATES, WUDI = HERE / "gates_results.json", HERE / "wudi_results.json"
HEAD = '''"""What methods kept of the orchard's experts' gains: made by `examples/orchard/measured_methods.py`."""

from typing import NamedTuple


class Measured(NamedTuple):
    """A row: which experts, what it is called there, the share that it kept with its interval, and the page."""

    experts: str
    row: str
    kept: float
    low: float
    high: float
    page: str


ROWS: dict[str, tuple[Measured, ...]] = '''


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
    """Writes them."""
    lines = [f"{name!r}: ({', '.join(f'Measured{row}' for row in rows)},)" for name, rows in measured().items()]
    TARGET.write_text(HEAD + "{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(TARGET)], check=True)


if __name__ == "__main__":
    main()
