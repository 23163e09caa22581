"""Landscapes of the study of optimisers: grids of merges, of two experts and of experts into a VLM, made smooth.

A score is the mean of two shares. Of two experts of the orchard: how much of the gap in loss between base and expert a
merge closes on the skill of each. Of an expert in a VLM: the share of right answers to the expert's task, and that of
the VLM's own task divided by the VLM's own share.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "vlm"))

from trials import DENSITIES, Point, Trial, grid, swapped

from search_grids import AXIS, SCENARIOS, Scenario

KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "thin_plate_spline": lambda r: np.where(r > 0, r**2 * np.log(np.maximum(r, 1e-300)), 0.0),
    "cubic": lambda r: r**3,
    "linear": lambda r: -r,
}
FINE = {2: 201, 3: 61}  # points of each axis among which the best and the worst of a landscape are sought
OWN = "digits"  # the VLM's own task


@dataclass(frozen=True)
class Landscape:
    """The shares of two tasks on a whole grid of two coefficients, and of densities where they are an axis."""

    scenario: str
    method: str
    points: np.ndarray  # [points, axes]
    shares: np.ndarray  # [points, tasks]
    items: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)  # of a merge and of a scoring, the median
    density: float | None = None
    known: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()  # shares without a merge, at coefficients

    @property
    def name(self) -> str:
        """The scenario and the method, with its density or the word for all of them."""
        density = " density" if self.size == 3 else "" if self.density is None else f" {self.density:g}"
        return f"{self.scenario} {self.method}{density}"

    @property
    def size(self) -> int:
        """The number of axes."""
        return int(self.points.shape[1])

    @property
    def budget(self) -> int:
        """40 trials for two coefficients, 60 with the density."""
        return 40 if self.size == 2 else 60

    @property
    def scores(self) -> np.ndarray:
        """The mean of the shares, [points]."""
        found: np.ndarray = self.shares.mean(axis=1)
        return found

    def units(self, points: np.ndarray) -> np.ndarray:
        """Points in the unit cube."""
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        found: np.ndarray = (points - low) / (high - low)
        return found


def of_experts(lines: Sequence[dict[str, Any]], split: str = "dev") -> Iterator[Landscape]:
    """The whole grids of `search_grids.jsonl`, each of the items that were measured last."""
    for scenario in SCENARIOS:
        pair = [scenario.one, scenario.other]
        here = [line for line in lines if line["split"] == split and line["domains"] == pair]
        for density in scenario.densities or (None,):
            made = [
                _of_items([line for line in here if line["content"] == content], scenario, density)
                for content in dict.fromkeys(line["content"] for line in here)
            ]
            yield from [found for found in made if found][-1:]


def _of_items(lines: Sequence[dict[str, Any]], scenario: Scenario, density: float | None) -> Landscape | None:
    pair = [scenario.one, scenario.other]
    single = {tuple(line["models"]): _losses(line) for line in lines if len(line["models"]) < 2}
    merged = {
        tuple(line["knobs"]["weight"]): line for line in lines
        if line["models"] == pair and line["method"] == scenario.method and line["knobs"].get("density") == density
    }  # fmt: skip
    points = list(product(AXIS, AXIS))
    if len(single) < 3 or any(point not in merged for point in points):
        return None
    low, high = single[()], np.minimum(single[pair[0],], single[pair[1],])
    shares = np.array([(low - _losses(merged[point])) / (low - high) for point in points])
    merge, score = (float(np.median([merged[p]["seconds"][key] for p in points])) for key in ("merge", "score"))
    items = ", ".join(f"{domain} {len(merged[points[0]]['items'][domain])}" for domain in pair)
    alone = {(): (0.0, 0.0), (pair[0],): (1.0, 0.0), (pair[1],): (0.0, 1.0)}
    known = [(place, tuple((low - single[own]) / (low - high))) for own, place in alone.items()]
    plain = tuple(known) if scenario.method == "task_arithmetic" else ()
    name = "+".join(pair)
    return Landscape(name, scenario.method, np.array(points), shares, items, (merge, score), density, plain)


def _losses(line: dict[str, Any]) -> np.ndarray:
    items = (line["items"][domain] for domain in line["domains"])
    return np.array([sum(i[0] for i in own) / sum(i[1] for i in own) for own in items])


Trials = Mapping[tuple[Point, str, str], Trial]


def of_vlms(known: Trials, items: slice = slice(None)) -> Iterator[Landscape]:
    """The whole grids of `vlm/trials.jsonl` on dev, by some of the items of each task."""
    for vlm, expert in dict.fromkeys((p.vlm, p.expert) for p, *_ in known if p.method == "task_arithmetic"):
        for method, densities in (("task_arithmetic", (None,)), ("ties", DENSITIES), ("dare", DENSITIES)):
            for density in densities:
                found = _of_answers(known, grid(vlm, expert, method, (density,)), items)
                yield from [found] if found else []


def _of_answers(known: Trials, points: Sequence[Point], items: slice) -> Landscape | None:
    vlm, expert, method, density = (getattr(points[0], key) for key in ("vlm", "expert", "method", "density"))
    skill = expert.partition("-")[0]
    wanted = [(point, "dev", task) for point in (*points, Point(vlm)) for task in (skill, OWN)]
    if any(one not in known for one in wanted):
        return None
    right = np.array([_right(known[one], items) for one in wanted]).reshape(-1, 2)
    shares = right[:-1] / [1.0, right[-1, 1]]
    trials = [[known[point, "dev", task] for task in (skill, OWN)] for point in points]
    seconds = np.median([[own.merge_seconds, own.seconds + other.seconds] for own, other in trials], axis=0)
    told = ", ".join(f"{trial.task} {len(trial.right[items])}" for trial in trials[0])
    places = np.array([(point.vl_weight, point.exp_weight) for point in points])
    plain = tuple(_alone(known, vlm, expert, items)) if method == "task_arithmetic" else ()
    return Landscape(f"{vlm}+{expert}", method, places, shares, told, tuple(seconds), density, plain)


def _alone(known: Trials, vlm: str, expert: str, items: slice) -> Iterator[Any]:
    """The VLM and the expert in its place, at the coefficients that give them back."""
    whole = _right(known[Point(vlm), "dev", OWN], items)
    for place, point in (((1.0, 0.0), Point(vlm)), ((0.0, 1.0), swapped(vlm, expert))):
        if (point, "dev", OWN) in known:
            skill, own = (_right(known[point, "dev", task], items) for task in (expert.partition("-")[0], OWN))
            yield place, (skill, own / whole)


def _right(trial: Trial, items: slice) -> float:
    return trial.right[items].count("1") / len(trial.right[items])


def with_density(found: Sequence[Landscape]) -> Iterator[Landscape]:
    """For each scenario and method with several densities the landscape that has them as its third axis."""
    kinds = dict.fromkeys((one.scenario, one.method, one.items) for one in found if one.density is not None)
    for kind in kinds:
        own = [one for one in found if one.density is not None and (one.scenario, one.method, one.items) == kind]
        if len(own) > 1:
            points = [np.insert(one.points, 2, one.density, axis=1) for one in own]
            shares = np.concatenate([one.shares for one in own])
            yield replace(own[0], points=np.concatenate(points), shares=shares, density=None)


class Surrogate:
    """A landscape between its points: the interpolation by radial basis functions in the unit cube whose leave-one-out
    error on interior points is least."""

    def __init__(self, of: Landscape) -> None:
        from scipy.interpolate import RBFInterpolator

        units = of.units(of.points)
        self.of, self.errors = of, {kernel: left_out(kernel, units, of.scores) for kernel in KERNELS}
        self.kernel = min(KERNELS, key=lambda kernel: self.errors[kernel])
        self._shares = RBFInterpolator(units, of.shares, kernel=self.kernel, degree=int(self.kernel != "linear"))
        line = np.linspace(0, 1, FINE[of.size])
        self.fine = self._shares(np.stack(np.meshgrid(*[line] * of.size, indexing="ij"), -1).reshape(-1, of.size))
        scores = self.fine.mean(axis=1)
        self.best, self.worst = float(scores.max()), float(scores.min())

    def shares(self, points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """The shares of the tasks at points, [points, tasks]."""
        found: np.ndarray = self._shares(self.of.units(np.array(points, float)))
        return found

    def regrets(self, points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """What is lost at each point: 0 at the best of the landscape, 1 at its worst."""
        found: np.ndarray = (self.best - self.shares(points).mean(axis=1)) / (self.best - self.worst)
        return np.maximum(found, 0.0)


def left_out(kernel: str, units: np.ndarray, values: np.ndarray) -> float:
    """Root mean square, over points inside in both coefficients and in shares of the range, of what the others miss a
    point by.

    In closed form: `e_i = c_i / (A^-1)_ii` with `A = [[K, P], [P^T, 0]]` and `c` the coefficients of the whole.
    """
    count = len(units)
    matrix = KERNELS[kernel](np.linalg.norm(units[:, None] - units[None], axis=2))
    tail = np.ones((count, 1)) if kernel == "linear" else np.column_stack([np.ones(count), units])
    inverse = np.linalg.inv(np.block([[matrix, tail], [tail.T, np.zeros((tail.shape[1],) * 2)]]))
    coefficients = inverse @ np.concatenate([values, np.zeros(tail.shape[1])])
    errors = coefficients[:count] / np.diag(inverse)[:count]
    inner = np.all((units[:, :2] > 0) & (units[:, :2] < 1), axis=1)
    return float(np.sqrt(np.mean(errors[inner] ** 2)) / np.ptp(values))


def sum_to_one(of: Landscape, near: float = 0.0) -> float:
    """What is lost of the best of the grid where the coefficients have to sum to one, in shares of it."""
    sums = np.abs(of.points[:, :2].sum(axis=1) - 1) <= near + 1e-9
    return float((of.scores.max() - of.scores[sums].max()) / of.scores.max())
