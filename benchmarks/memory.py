"""Peak resident memory of graftkit, mapped pages included, on a smaller and a larger triple.

    python benchmarks/memory.py [0.5B 1.5B] [--only ties]

Two readings: `ru_maxrss` of the process, and the sum of VmHWM over it and its descendants, sampled; the larger counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import harness
from tables import grid


def peak(method: str, size: str, workers: int, timeout: float) -> dict[str, Any]:
    harness.clear_outputs()
    tree = harness.TreeMemory()
    command = harness.graft_command(method, size, harness.OUTPUTS / "graftkit", workers)
    done = harness.measure(command, timeout, tree)
    harness.clear_outputs()
    if not done.ok:
        raise SystemExit(f"{method} on {size} failed with status {done.status}:\n{done.log}")
    both = {"ru_maxrss": done.peak_rss, "tree": tree.peak, "processes": len(tree.peaks)}
    return {"method": method, "size": size, "peak": max(done.peak_rss, tree.peak)} | both


def row(method: str, found: list[dict[str, Any]]) -> list[str]:
    peaks = [one["peak"] for one in found]
    return [method, *(f"{p / 1e6:.0f}" for p in peaks), f"{peaks[-1] / peaks[0]:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["0.5B", "1.5B"])
    parser.add_argument("--only", nargs="+", choices=harness.METHODS, default=list(harness.METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800)
    options = parser.parse_args()
    if problem := harness.missing(harness.GRAFT):
        raise SystemExit(problem)
    rows = []
    for method in options.only:
        found = [peak(method, size, options.workers, options.timeout) for size in options.sizes]
        print(json.dumps(found), file=sys.stderr)
        rows.append(row(method, found))
    print(grid(["method", *(f"{size}, MB" for size in options.sizes), "ratio"], rows))


if __name__ == "__main__":
    main()
