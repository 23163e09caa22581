"""The landscape of a search: over its two most important axes the score as a Gaussian process sees it, and how unsure.

The process is fitted to all trials on all axes; the picture is a cut through it at the best trial.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from graftkit.errors import missing_extra
from graftkit.improving.search import Found
from graftkit.improving.search_space import Axis

FINE = 60  # points of each axis


def draw(found: Found, file: Path) -> bool:
    """Draws the picture; False where there are fewer than two numbers or five trials to draw."""
    axes, trials = found.space.axes, [kept for kept in found.trials if np.all(np.isfinite(kept.score))]
    ranked = sorted((k for k, axis in enumerate(axes) if not axis.values), key=lambda k: -_share(found, axes[k]))
    if len(ranked) < 2 or len(trials) < 5:
        return False
    pair = sorted(ranked[:2])
    points = np.array([found.space.place(kept.values) for kept in trials])
    scores = np.array([np.mean(kept.score) for kept in trials])
    best = points[
        int(np.argmax([score if kept.whole else -np.inf for score, kept in zip(scores, trials, strict=True)]))
    ]
    mean, deviation = _surface(points, scores, best, pair)
    _picture(found, pair, points, best, mean, deviation, file)
    return True


def _share(found: Found, axis: Axis) -> float:
    return found.importances.get(axis.name, 0.0)


def _surface(
    points: np.ndarray, scores: np.ndarray, best: np.ndarray, pair: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the process on a grid over two axes, [FINE, FINE]."""
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    except ImportError as error:
        raise missing_extra("search", "scikit-learn") from error
    import warnings

    scale = ConstantKernel(1.0, (1e-2, 1e2)) * Matern([0.3] * points.shape[1], (0.05, 5.0), nu=2.5)
    process = GaussianProcessRegressor(scale + WhiteKernel(1e-3, (1e-6, 1.0)), normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length at its bound: the axis hardly matters
        process.fit(points, scores)
    line = np.linspace(0, 1, FINE)
    grid = np.repeat(best[None], FINE * FINE, axis=0)
    grid[:, pair[0]], grid[:, pair[1]] = (part.ravel() for part in np.meshgrid(line, line))
    mean, deviation = process.predict(grid, return_std=True)
    return mean.reshape(FINE, FINE), deviation.reshape(FINE, FINE)


def _picture(
    found: Found,
    pair: list[int],
    points: np.ndarray,
    best: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    file: Path,
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "matplotlib") from error
    across, up = (found.space.axes[k] for k in pair)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    ticks = np.linspace(0, 1, 5)
    for panel, values, name in zip(panels, (mean, deviation), ("score", "standard deviation"), strict=True):
        drawn = panel.contourf(np.linspace(0, 1, FINE), np.linspace(0, 1, FINE), values, 16)
        figure.colorbar(drawn, ax=panel)
        panel.plot(points[:, pair[0]], points[:, pair[1]], ".", color="white", markersize=4)
        panel.plot(best[pair[0]], best[pair[1]], "*", color="red", markersize=12)
        panel.set(title=name, xlabel=across.name, xticks=ticks, xticklabels=[f"{across.at(t):.3g}" for t in ticks])
    panels[0].set(ylabel=up.name, yticks=ticks, yticklabels=[f"{up.at(t):.3g}" for t in ticks])
    figure.suptitle("what a Gaussian process makes of the trials (white); red: the best", fontsize=10)
    figure.savefig(file, dpi=110, metadata={"Software": None})
