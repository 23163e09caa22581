"""Runs of optimisers on landscapes, kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import search_tasks
from graftkit.improving import optimisers
from graftkit.improving.optimisers import Asked
from graftkit.improving.search_space import Axis, Space
from graftkit.recipes.recipe import load
from search_landscapes import Landscape, Surrogate

OWN = "tasks"
FOUND = 1e-5  # the regret at which nothing is left to find that the page would show


@dataclass(frozen=True)
class Runs:
    """What optimisers tried on a landscape: by name, [seeds, trials, axes]."""

    surrogate: Surrogate
    tried: dict[str, np.ndarray]

    def regrets(self, name: str, on: Surrogate | None = None) -> np.ndarray:
        """The regret of the best so far, [seeds, trials]; on another landscape of those that are best here."""
        regrets = np.array([self.surrogate.regrets(points) for points in self.tried[name]])
        best = np.array([[one[: k + 1].argmin() for k in range(len(one))] for one in regrets])
        if on is not None:
            regrets = np.array([on.regrets(points) for points in self.tried[name]])
        return np.take_along_axis(regrets, best, axis=1)


def space(of: Landscape) -> Space:
    """The box of the grid."""
    recipe = load({"method": "ties", "base": "base", "models": ["one", "other"]})
    low, high = of.points.min(axis=0), of.points.max(axis=0)
    names = ("weight", "weight", "density")[: of.size]
    axes = (Axis(f"{names[k]} {k}", names[k], low[k], high[k], models=(k,) * (k < 2)) for k in range(of.size))
    return Space(recipe, tuple(axes))


def run(surrogate: Surrogate, name: str, seed: int, budget: int) -> list[list[float]]:
    """What an optimiser tries; once it has found the best, that stands for the rest."""
    record: dict[Any, float] = {}
    tasks: dict[Any, tuple[float, ...]] = {}
    box, tried = space(surrogate.of), []
    known = tuple((tuple(surrogate.of.units(np.array(place))), shares) for place, shares in surrogate.of.known)
    while len(tried) < budget:
        asked = Asked(box, record, len(tried), seed, budget)
        values = search_tasks.ask(asked, tasks, (0.5, 0.5), known) if name == OWN else optimisers.ask(name, asked)
        tasks[values] = tuple(surrogate.shares([values])[0])
        record[values] = float(np.mean(tasks[values]))
        tried.append([round(float(value), 7) for value in values])
        if surrogate.regrets([values])[0] < FOUND:
            tried += [tried[-1]] * (budget - len(tried))
    return tried


class Kept:
    """Runs that are kept in a file, and those that are not yet."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        self._done = {(line["optimizer"], line["seed"], line["landscape"]): line["tried"] for line in lines}

    def runs(self, surrogate: Surrogate, names: Iterable[str], seeds: int) -> Runs:
        """The runs of optimisers on a landscape."""
        of, tried = surrogate.of, {}
        content = _content(of)
        for name in names:
            for seed in range(seeds):
                key = name, seed, content
                if key not in self._done:
                    self._done[key] = run(surrogate, name, seed, of.budget)
                    line = {"name": of.name, "optimizer": name, "seed": seed, "landscape": content}
                    with self.file.open("a") as file:
                        file.write(json.dumps(line | {"tried": self._done[key]}) + "\n")
            tried[name] = np.array([self._done[name, seed, content] for seed in range(seeds)])
        return Runs(surrogate, tried)


def _content(of: Landscape) -> str:
    """What an optimiser can be told of a landscape."""
    what = [of.points, of.shares, *(part for pair in of.known for part in pair)]
    return hashlib.sha256(json.dumps([np.round(one, 9).tolist() for one in what]).encode()).hexdigest()[:16]
