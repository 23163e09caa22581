"""Pictures of the study of optimisers: regret by trials, and what a search on some items is worth on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_landscapes import Landscape, Surrogate
from search_runs import Runs

COLOURS = {
    "random": "#8a8f98", "grid": "#8a8259", "sobol": "#a05fa8", "cma": "#4f9a64", "pattern": "#4f86b5",
    "powell": "#2b4f7a", "gp": "#c2611f", "tasks": "#111111",
}  # fmt: skip
LEAST = 1e-5  # what a logarithmic axis shows of nothing
ROW = 4  # panels beside each other


def over_trials(made: Sequence[Runs], file: Path) -> None:
    """The median regret over landscapes and seeds after each trial, by number of axes; between them half of all."""
    sizes = [size for size in (2, 3) if any(runs.surrogate.of.size == size for runs in made)]
    figure, panels = _panels(len(sizes))
    for size, panel in zip(sizes, panels, strict=True):
        own = [runs for runs in made if runs.surrogate.of.size == size]
        for name in own[0].tried:
            regrets = np.concatenate([runs.regrets(name) for runs in own])
            low, middle, high = np.maximum(np.quantile(regrets, (0.25, 0.5, 0.75), axis=0), LEAST)
            trials = np.arange(1, len(middle) + 1)
            panel.plot(trials, middle, color=COLOURS.get(name, "black"), label=name)
            panel.fill_between(trials, low, high, color=COLOURS.get(name, "black"), alpha=0.1, linewidth=0)
        told = "two coefficients" if size == 2 else "two coefficients and the density"
        panel.title.set_size(9)
        panel.set(yscale="log", xlabel="trials", title=f"{told}\n{len(own)} landscape{'s' * (len(own) > 1)}")
    panels[0].set(ylabel="regret, 1 at the worst point")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def on_other_items(checked: Sequence[tuple[Runs, Landscape]], file: Path) -> None:
    """For each landscape the median regret of what an optimiser has found, on the items searched on and on others."""
    if not checked:
        return
    figure, panels = _panels(len(checked))
    for (runs, other), panel in zip(checked, panels, strict=True):
        (name,) = runs.tried
        for on, told, style in ((None, "searched on", "-"), (Surrogate(other), "other items", "--")):
            regrets = runs.regrets(name, on)
            low, middle, high = np.quantile(regrets, (0.25, 0.5, 0.75), axis=0)
            trials = np.arange(1, len(middle) + 1)
            panel.plot(trials, middle, style, color=COLOURS[name], label=told)
            panel.fill_between(trials, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
        panel.set(xlabel="trials", title=runs.surrogate.of.scenario, ylim=(0, None))
        panel.title.set_size(9)
    panels[0].set(ylabel="regret of the best found")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    size = (max(4.6, 3.4 * min(count, ROW)), 3.6 * -(-count // ROW))
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(-(-count // ROW), min(count, ROW), squeeze=False)
    for panel in panels.flat[count:]:
        panel.remove()
    return figure, list(panels.flat[:count])
