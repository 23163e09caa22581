"""The tables of the study's page: what was tested, by way to ask, confined sums, and what a skill costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from trials import Point, Trial, chosen, grid, swapped

from graftkit.measuring.resampling import interval, resampled_sums

METHODS = {"task_arithmetic": (None,), "dare": (0.3, 0.7), "ties": (0.3, 0.7)}
RESAMPLES = 10_000
SUMS = (("any", float("inf")), ("1", 1e-9), ("0.75 to 1.25", 0.25 + 1e-9))
ALLOWED = (0.0, 0.05, 0.1, 0.2, 1.0)  # of the VLM's own task, on dev
Known = dict[tuple[Point, str, str], Trial]
Rows = Callable[[str, str, str, Known], Iterator[str]]

RESULTS = (
    "| scenario | model | vl / exp weight | dev: skill, own | skill | gain | own: digits | change | shapes |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
WAYS = "| scenario | model | test, % |\n|---|---|---|"
CONFINED = "| scenario | sum | most skill at | dev skill | lost | chosen | dev skill | test skill |\n"
CONFINED += "|---|---|---|---|---|---|---|---|"
PRICES = "| scenario | method | " + " | ".join("any loss" if one == 1 else f"at most {100 * one:g}" for one in ALLOWED)
PRICES += " |\n|---|---|" + "---|" * len(ALLOWED)
BESIDE = "| scenario | method | density | points | skill | own: digits |\n|---|---|---|---|---|---|"


def bits(trial: Trial) -> Any:
    """Right or not by item, as numbers."""
    return np.array(list(map(int, trial.right)), dtype=np.float64)


def told(values: Any, key: str, signed: bool = False) -> str:
    """A mean in points with its 95 % bootstrap interval over items."""
    drawn = resampled_sums(values[:, None], RESAMPLES, 0, key)[:, 0] / len(values)
    low, high = interval(drawn)
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(100 * value for value in (values.mean(), low, high)))


def weights(point: Point) -> str:
    """A point's coefficients."""
    if not point.expert:
        return "-"
    made = f"{point.vl_weight:g} / {point.exp_weight:g}"
    return made if point.density is None else f"{made}, density {point.density:g}"


def tried(points: Sequence[Point], scenario: str, known: Known) -> list[Point]:
    """Those that dev was asked of."""
    return [point for point in points if (point, "dev", scenario) in known]


def summing(points: Sequence[Point], width: float) -> list[Point]:
    """Those whose coefficients sum to about one."""
    return [point for point in points if abs(point.total - 1) <= width]


def candidates(vlm: str, name: str, scenario: str, known: Known) -> Iterator[tuple[str, Point]]:
    """What was tested, in the order of the table."""
    yield "VLM", Point(vlm)
    yield "expert swapped in", swapped(vlm, name)
    for method, densities in METHODS.items():
        points = grid(vlm, name, method, densities)
        best, count = chosen(known, points, scenario), len(tried(points, scenario, known))
        if best:
            yield method + ("" if count == len(points) else f" ({count} of {len(points)} points tried)"), best
        if count == len(points) and method == "task_arithmetic":
            confined = chosen(known, summing(points, 1e-9), scenario)
            if confined:
                yield "task_arithmetic, sum 1", confined


def study_rows(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """The table's rows of one VLM and one scenario."""
    plain = {task: known.get((Point(vlm), "test", task)) for task in (scenario, "digits", "shapes")}
    for label, point in candidates(vlm, name, scenario, known):
        tests = {task: known.get((point, "test", task)) for task in plain}
        if any(tests[task] is None or plain[task] is None for task in (scenario, "digits")):
            continue
        dev = [known[point, "dev", task].share for task in (scenario, "digits")]
        cells = [scenario, label, weights(point), f"{100 * dev[0]:.1f}, {100 * dev[1]:.1f}"]
        for task, trial in tests.items():
            cells.append("" if trial is None else told(bits(trial), task))
            if point.expert and task != "shapes":
                cells.append(told(bits(trial) - bits(plain[task]), task, signed=True))
            elif task != "shapes":
                cells.append("")
        yield "| " + " | ".join(cells) + " |"


def by_way(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """Test shares by way to ask."""
    for label, point in candidates(vlm, name, scenario, known):
        trial = known.get((point, "test", scenario))
        if trial:
            shares = ", ".join(f"{way} {100 * share:.1f}" for way, share in sorted(trial.subtasks.items()))
            yield f"| {scenario} | {label} | {shares} |"


def confined_rows(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """The most skill on dev by what the coefficients may sum to: of all points, and of those that are chosen by."""
    points = grid(vlm, name, "task_arithmetic")
    if len(tried(points, scenario, known)) < len(points):
        return

    def skill(point: Point) -> float:
        return known[point, "dev", scenario].share

    top = max(map(skill, points))
    for label, width in SUMS:
        allowed = summing(points, width)
        best, kept = max(allowed, key=skill), chosen(known, allowed, scenario)
        assert kept is not None
        test = known.get((kept, "test", scenario))
        lost = f"{100 * (top - skill(best)) / top:.0f} %" if top else ""
        cells = [scenario, label, weights(best), f"{100 * skill(best):.1f}", lost, weights(kept)]
        cells += [f"{100 * skill(kept):.1f}", f"{100 * test.share:.1f}" if test else "not tested"]
        yield "| " + " | ".join(cells) + " |"


def price_rows(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """The most skill on dev by how many points of its own task the VLM may lose."""
    for method, densities in METHODS.items():
        every = grid(vlm, name, method, densities)
        points = tried(every, scenario, known)
        if points:
            before = known[Point(vlm), "dev", "digits"].share
            label = method if len(points) == len(every) else f"{method} ({len(points)} of {len(every)} points)"
            cells = [scenario, label, *(_most(points, before - loss, scenario, known) for loss in ALLOWED)]
            yield "| " + " | ".join(cells) + " |"


def beside_rows(vlm: str, name: str, scenario: str, known: Known) -> Iterator[str]:
    """What a method has more on dev than task arithmetic by the same coefficients: mean, least and most of points."""
    for method, densities in METHODS.items():
        for density in densities if method != "task_arithmetic" else ():
            points = tried(grid(vlm, name, method, (density,)), scenario, known)
            plain = [replace(point, method="task_arithmetic", density=None) for point in points]
            pairs = [(p, q) for p, q in zip(points, plain, strict=True) if (q, "dev", scenario) in known]
            if pairs:
                cells = [_more(pairs, task, known) for task in (scenario, "digits")]
                yield f"| {scenario} | {method} | {density:g} | {len(pairs)} | {' | '.join(cells)} |"


def _more(pairs: Sequence[tuple[Point, Point]], task: str, known: Known) -> str:
    more = [100 * (known[p, "dev", task].share - known[q, "dev", task].share) for p, q in pairs]
    return f"{np.mean(more):+.1f} ({min(more):+.1f} to {max(more):+.1f})"


def _most(points: Sequence[Point], least: float, scenario: str, known: Known) -> str:
    kept = [point for point in points if known[point, "dev", "digits"].share >= least - 1e-9]
    return f"{100 * max(known[point, 'dev', scenario].share for point in kept):.1f}" if kept else "none"
