"""Alternate the floor, graftkit and mergekit on one triple, and report ratios pair by pair.

    python benchmarks/run.py 1.5B --rounds 5 [--only ties dare] [--skip-mergekit] [--timeout 1800]

Every round runs, for every method: floor on one thread, floor on two, graftkit, mergekit. Every run is a process of its
own; none is dropped. The inputs are read once beforehand, and outputs are removed after each run. The JSON in
`benchmarks/results/` has every run; the table goes to standard output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import harness
from harness import GRAFT, MERGEKIT, METHODS, OUTPUTS, Measured
from tables import markdown

TOOLS = ("floor1", "floor2", "graftkit", "mergekit")


@dataclass(frozen=True)
class Run:
    """One process. `seconds` is from the first byte read to the last one written; `wall` is the whole process."""

    method: str
    round: int
    tool: str
    process: Measured
    seconds: float | None = None
    stages: list[float] = field(default_factory=list)


def command(tool: str, method: str, options: argparse.Namespace) -> list[str]:
    out = OUTPUTS / tool
    if tool == "graftkit":
        return harness.graft_command(method, options.size, out, options.workers)
    if tool == "mergekit":
        return harness.mergekit_command(method, options.size, out)
    script = str(Path(__file__).with_name("floor.py"))
    return [sys.executable, script, options.size, "--no-warm", "--threads", tool.removeprefix("floor")]


def execution(tool: str, process: Measured) -> tuple[float | None, list[float]]:
    """First read to last byte, as the tool itself tells it; mergekit does not."""
    if tool.startswith("floor"):
        return json.loads(process.log)["seconds"], []
    if tool == "mergekit":
        return None, []
    record = json.loads((OUTPUTS / tool / "graft.json").read_text())["execution"]
    return record["seconds"], [stage["seconds"] for stage in record.get("stages", [])]


def run(tool: str, method: str, number: int, options: argparse.Namespace) -> Run:
    harness.clear_outputs()
    process = harness.measure(command(tool, method, options), options.timeout)
    seconds, stages = execution(tool, process) if process.ok else (None, [])
    harness.clear_outputs()
    shown = f"{process.wall:8.2f} s wall {process.cpu:8.2f} s CPU {process.peak_rss / 1e9:6.2f} GB"
    inside = "" if seconds is None else f"  {seconds:.3f} s first read to last byte"
    print(f"round {number} {method:16} {tool:9}{shown}  load {process.load:.1f}{inside}", file=sys.stderr)
    if not process.ok:
        print(f"FAILED: status {process.status}, timed out: {process.timed_out}\n{process.log}", file=sys.stderr)
    return Run(method, number, tool, replace(process, log="") if process.ok else process, seconds, stages)


def warm_up(options: argparse.Namespace, tools: list[str]) -> dict[str, float]:
    """Bring inputs and programs into the page cache, and compiled kernels onto the disk; seconds of each."""
    taken = {"input_bytes": float(harness.warm(options.size))}
    if "mergekit" in tools:
        taken["mergekit --help"] = harness.measure([str(MERGEKIT), "--help"]).wall
    if "graftkit" in tools:
        for method in options.only:
            harness.clear_outputs()
            small = "tiny" if (harness.BENCH / "tiny").exists() else options.size
            merge = harness.graft_command(method, small, OUTPUTS / "graftkit", options.workers)
            taken[f"graft merge {method} {small}"] = harness.measure(merge, options.timeout).wall
    return taken


def rounds(options: argparse.Namespace, tools: list[str]) -> Iterator[Run]:
    for number in range(1, options.rounds + 1):
        for method in options.only:
            for tool in tools:
                yield run(tool, method, number, options)


def machine() -> dict[str, object]:
    cpu = next((li for li in Path("/proc/cpuinfo").read_text().splitlines() if li.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": cores,
        "memory": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def available(options: argparse.Namespace) -> list[str]:
    """The tools to run; says what is missing, and how to get it."""
    programs = {"graftkit": GRAFT, "mergekit": MERGEKIT}
    wanted = [tool for tool in TOOLS if not (tool == "mergekit" and options.skip_mergekit)]
    problems = {tool: harness.missing(programs[tool]) for tool in wanted if tool in programs}
    for problem in filter(None, problems.values()):
        print(f"left out: {problem}", file=sys.stderr)
    return [tool for tool in wanted if not problems.get(tool)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    return parser.parse_args()


def main() -> None:
    options = parse()
    harness.models_folder(options.size)
    tools = available(options)
    started = datetime.datetime.now().astimezone()
    warmed = warm_up(options, tools)
    runs: list[Run] = []
    result = {"started": started.isoformat(), "size": options.size, "machine": machine(), "warm_up": warmed}
    harness.RESULTS.mkdir(exist_ok=True)
    path = harness.RESULTS / f"{started:%Y-%m-%d-%H%M}-{options.size}.json"
    for one in rounds(options, tools):
        runs.append(one)
        path.write_text(json.dumps(result | {"runs": [asdict(r) for r in runs]}, indent=1) + "\n")
    print(markdown([asdict(r) for r in runs]))
    print(f"\nEvery run: {path.relative_to(harness.ROOT)}", file=sys.stderr)
    sys.exit(0 if all(r.process.ok for r in runs) else 1)


if __name__ == "__main__":
    main()
