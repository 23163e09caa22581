"""Compare merges, value by value, with float64 references written here in numpy, apart from the package.

    python benchmarks/exactness.py 0.1B [--only ties] [--tool mergekit]
    python benchmarks/exactness.py --recipe RECIPE --output DIRECTORY

The error is in units in the last place of the output's dtype, at the reference's value: correct rounding gives at most
half a unit. Where all cancels the reference is nothing but float64's own rounding, 1e-15 of the inputs, which does not
count. A random method is held against every pattern of kept and dropped models, the nearest counts. TIES needs a whole
tensor at once, so it skips tensors above `--largest` values; the others are read in blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import harness

Array = np.ndarray
BLOCK = 1 << 20
REFERENCE_ERROR = 2.0**-50  # of the largest input: a few roundings in float64
STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
SIGNIFICAND = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126)}  # bits with the hidden one, least exponent


@dataclass(frozen=True)
class Recipe:
    method: str
    inputs: list[Path]  # the base first, where there is one
    weights: list[float]  # of the models
    density: float
    elect: bool


@dataclass
class Report:
    values: int = 0
    worst: float = 0.0
    worst_tensor: str = ""
    beyond_half: int = 0
    skipped: int = 0


class Checkpoint:
    """Tensors of a directory of safetensors files, by name, as flat memory maps."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in harness.weight_files(folder):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            self.entries |= {n: (path, 8 + length, e) for n, e in header.items() if n != "__metadata__"}

    def dtype(self, name: str) -> str:
        return self.entries[name][2]["dtype"]

    def flat(self, name: str) -> Array:
        path, start, entry = self.entries[name]
        offset, shape = start + entry["data_offsets"][0], math.prod(entry["shape"])
        return np.memmap(path, STORED[entry["dtype"]], "r", offset, (shape,))

    def block(self, name: str, part: slice) -> Array:
        stored = self.flat(name)[part]
        if self.dtype(name) == "BF16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float64)


def load(path: Path) -> Recipe:
    """The few keys that the benchmark's recipes use."""
    content = yaml.safe_load(path.read_text())
    knobs = content.get("knobs", {})
    inputs = [content["base"]] if "base" in content else []
    inputs += [entry["model"] for entry in content["models"]]
    weights = [float(entry.get("weight", 1)) for entry in content["models"]]
    density = float(knobs.get("density", 0.2 if content["method"] == "ties" else 0.5))
    return Recipe(content["method"], [Path(i) for i in inputs], weights, density, knobs.get("elect") == "sign")


def units_in_last_place(reference: Array, dtype: str) -> Array:
    bits, least = SIGNIFICAND[dtype]
    exponent = np.where(reference == 0, least, np.frexp(reference)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, least) - (bits - 1))


def disjoint_mean(deltas: Array, weights: Array) -> Array:
    """Elect each value's sign by the unweighted sum; weighted mean of the deltas that agree."""
    elected = np.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agreeing = weights * (np.sign(deltas) == elected)
    total = agreeing.sum(0)
    return (agreeing * deltas).sum(0) / np.where(total == 0, 1.0, total)


def trim(delta: Array, density: float) -> Array:
    """Keep the values whose magnitude is at least the k-th largest, k = density * n, and one at the least."""
    magnitude = np.abs(delta)
    kept = max(1, int(density * magnitude.size))
    threshold = np.partition(magnitude, magnitude.size - kept)[magnitude.size - kept]
    return np.where(magnitude >= threshold, delta, 0.0)


def candidates(recipe: Recipe, inputs: Array) -> Iterator[Array]:
    """What the output may be, from `inputs` `[models, values]`: one array, or one for each pattern of a random mask."""
    weights = np.array(recipe.weights)[:, None]
    if recipe.method == "average":
        yield (weights * inputs).sum(0) / weights.sum()
        return
    base, deltas = inputs[0], inputs[1:] - inputs[0]
    if recipe.method == "task_arithmetic":
        yield base + (weights * deltas).sum(0)
    elif recipe.method == "ties":
        yield base + disjoint_mean(np.stack([trim(d, recipe.density) for d in deltas]), weights)
    elif recipe.method == "dare":
        for pattern in itertools.product((0.0, 1.0), repeat=len(deltas)):
            kept = np.array(pattern)[:, None] * deltas / recipe.density
            yield base + (disjoint_mean(kept, weights) if recipe.elect else (weights * kept).sum(0))
    else:
        raise SystemExit(f"no reference for {recipe.method!r}")


def error(recipe: Recipe, inputs: Array, output: Array, dtype: str) -> Array:
    """Distance from the nearest candidate in units in the last place, less what float64 itself leaves of the inputs."""
    noise = REFERENCE_ERROR * np.abs(inputs).max(0)
    gaps = ((np.maximum(np.abs(output - c) - noise, 0.0), c) for c in candidates(recipe, inputs))
    return np.minimum.reduce([gap / units_in_last_place(c, dtype) for gap, c in gaps])


def compare(recipe: Recipe, folder: Path, largest: int) -> Report:
    sources, merged = [Checkpoint(path) for path in recipe.inputs], Checkpoint(folder)
    if missing := sources[0].entries.keys() - merged.entries.keys():
        raise SystemExit(f"{folder} lacks {len(missing)} tensors, {min(missing)} for one")
    report = Report()
    for name in sources[0].entries:
        size = merged.flat(name).size
        whole = recipe.method == "ties"
        if whole and size > largest:
            report.skipped += 1
            continue
        for start in range(0, size, size if whole else BLOCK):
            part = slice(start, size if whole else min(start + BLOCK, size))
            inputs = np.stack([source.block(name, part) for source in sources])
            note(report, name, error(recipe, inputs, merged.block(name, part), merged.dtype(name)))
    return report


def note(report: Report, name: str, errors: Array) -> None:
    worst = float(errors.max()) if np.isfinite(errors).all() else math.inf
    report.values += errors.size
    report.beyond_half += int((errors > 0.5 + 1e-9).sum())
    if worst > report.worst:
        report.worst, report.worst_tensor = worst, name


def merge_and_compare(method: str, options: argparse.Namespace) -> Report:
    harness.clear_outputs()
    make = harness.graft_command if options.tool == "graftkit" else harness.mergekit_command
    out = harness.OUTPUTS / options.tool
    done = harness.measure(make(method, options.size, out), options.timeout)
    if not done.ok:
        raise SystemExit(f"{method} failed with status {done.status}:\n{done.log}")
    report = compare(load(harness.recipe(method, options.size)), out, options.largest)
    harness.clear_outputs()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", nargs="?", default="0.1B")
    parser.add_argument("--only", nargs="+", choices=harness.METHODS, default=list(harness.METHODS), metavar="METHOD")
    parser.add_argument("--tool", choices=("graftkit", "mergekit"), default="graftkit")
    parser.add_argument("--recipe", type=Path, help="compare this recipe's ...")
    parser.add_argument("--output", type=Path, help="... merge, already made")
    parser.add_argument("--largest", type=int, default=1 << 24, help="values in a tensor that TIES compares")
    parser.add_argument("--limit", type=float, default=0.501, help="units above which the exit status is 1")
    parser.add_argument("--timeout", type=float, default=1800)
    options = parser.parse_args()
    if options.recipe:
        reports = {options.recipe.stem: compare(load(options.recipe), options.output, options.largest)}
    elif problem := harness.missing(harness.GRAFT if options.tool == "graftkit" else harness.MERGEKIT):
        raise SystemExit(problem)
    else:
        reports = {method: merge_and_compare(method, options) for method in options.only}
    print(json.dumps({name: asdict(report) for name, report in reports.items()}, indent=1))
    sys.exit(1 if any(report.worst > options.limit for report in reports.values()) else 0)


if __name__ == "__main__":
    main()
