"""The tables of one result file: medians and minima, and ratios taken pair by pair within a round.

python benchmarks/tables.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Value = Callable[[Row], float | None]


def seconds(run: Row) -> float | None:
    return run["seconds"]


def wall(run: Row) -> float | None:
    return run["process"]["wall"]


def succeeded(runs: list[Row], method: str, tool: str) -> dict[int, Row]:
    chosen = (r for r in runs if r["method"] == method and r["tool"] == tool)
    return {r["round"]: r for r in chosen if r["process"]["status"] == 0 and not r["process"]["timed_out"]}


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and the minimum in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f})" if values else "-"


def ratio(runs: list[Row], method: str, over: tuple[str, Value], under: tuple[str, Value]) -> str:
    """Median of the rounds' ratios, with their range."""
    above, below = succeeded(runs, method, over[0]), succeeded(runs, method, under[0])
    pairs = [(over[1](above[n]), under[1](below[n])) for n in sorted(above.keys() & below.keys())]
    found = [a / b for a, b in pairs if a and b]
    return f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]" if found else "-"


def grid(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(runs: list[Row], method: str) -> list[list[str]]:
    """One row a tool: times, CPU and memory."""
    rows = []
    for tool in dict.fromkeys(r["tool"] for r in runs):
        good = list(succeeded(runs, method, tool).values())
        failed = sum(r["method"] == method and r["tool"] == tool for r in runs) - len(good)
        inside = [s for s in map(seconds, good) if s is not None]
        whole = [r["process"]["wall"] for r in good]
        cpu = [r["process"]["cpu"] for r in good]
        memory = [r["process"]["peak_rss"] / 1e9 for r in good]
        load = [r["process"]["load"] for r in good]
        shown = [spread(inside), spread(whole), spread(cpu), f"{max(memory):.2f}" if memory else "-"]
        loads = f"{min(load):.1f}-{max(load):.1f}" if load else "-"
        rows.append([method, tool, f"{len(good)}" + (f" + {failed} failed" if failed else ""), *shown, loads])
    return rows


def ratios(runs: list[Row], method: str) -> list[str]:
    graft = ("graftkit", seconds)
    return [
        method,
        ratio(runs, method, graft, ("floor1", seconds)),
        ratio(runs, method, graft, ("floor2", seconds)),
        ratio(runs, method, ("mergekit", wall), ("graftkit", wall)),
    ]


def markdown(runs: list[Row]) -> str:
    methods = list(dict.fromkeys(r["method"] for r in runs))
    heads = [
        "method",
        "tool",
        "runs",
        "first read to last byte, s",
        "whole process, s",
        "CPU, s",
        "peak RSS, GB",
        "load",
    ]
    first = grid(heads, [row for method in methods for row in measured(runs, method)])
    heads = [
        "method",
        "graftkit / floor, 1 thread",
        "graftkit / floor, 2 threads",
        "mergekit / graftkit, whole process",
    ]
    second = grid(heads, [ratios(runs, method) for method in methods])
    return f"Median (minimum) of the runs; peak is the largest.\n\n{first}\n\nMedian [range] of the rounds.\n\n{second}"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())["runs"]))
