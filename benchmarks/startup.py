"""Time `graft --help` and `graft explain RECIPE`, and check that neither imports torch.

python benchmarks/startup.py 1.5B [--runs 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import harness

HEAVY = ("torch", "transformers", "numba", "peft", "scipy", "sklearn", "matplotlib")


def imported(arguments: list[str]) -> list[str]:
    """Which heavy packages the command imports, as `python -X importtime` tells it."""
    command = [str(harness.GRAFT.with_name("python")), "-X", "importtime", str(harness.GRAFT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    if not any(name.startswith("graftkit") for name in modules):
        raise SystemExit("the import listing has no graftkit: is `graft` a Python script of this environment?")
    return [name for name in HEAVY if name in modules]


def timings(name: str, arguments: list[str], runs: int) -> dict[str, Any]:
    measured = [harness.measure([str(harness.GRAFT), *arguments], timeout=60) for _ in range(runs)]
    if failed := next((m for m in measured if not m.ok), None):
        raise SystemExit(f"graft {' '.join(arguments)} failed:\n{failed.log}")
    walls = [m.wall for m in measured]
    return {
        "command": f"graft {name}",
        "median_seconds": statistics.median(walls),
        "minimum_seconds": min(walls),
        "maximum_seconds": max(walls),
        "median_cpu_seconds": statistics.median(m.cpu for m in measured),
        "peak_rss": max(m.peak_rss for m in measured),
        "loads": [m.load for m in measured],
        "imports": imported(arguments),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", nargs="?", default="1.5B")
    parser.add_argument("--method", choices=harness.METHODS, default="ties")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    if problem := harness.missing(harness.GRAFT):
        raise SystemExit(problem)
    explain = ["explain", str(harness.recipe(options.method, options.size))]
    results = [
        timings("--help", ["--help"], options.runs),
        timings(f"explain {options.method} ({options.size})", explain, options.runs),
    ]
    print(json.dumps(results, indent=1))
    sys.exit(1 if any("torch" in result["imports"] for result in results) else 0)


if __name__ == "__main__":
    main()
