"""The study of optimisers: its closed forms against brute force, and the page that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "orchard"))

import search_grids  # noqa: E402
import search_study  # noqa: E402


def scores(seed):
    rng = np.random.default_rng(seed)
    x, y = search_study.POINTS.T
    return (np.sin(2 * x) + 0.5 * np.cos(3 * y) * x + 0.05 * rng.standard_normal(len(x))).reshape(5, 5)


@pytest.mark.parametrize("kernel", search_study.KERNELS)
def test_the_left_out_error_is_that_of_refits(kernel):
    from scipy.interpolate import RBFInterpolator

    values, points, found = scores(0).ravel(), search_study.POINTS, []
    for k, point in enumerate(points):
        if all(search_study.AXIS[0] < x < search_study.AXIS[-1] for x in point):
            keep = np.arange(len(points)) != k
            degree = 0 if kernel == "linear" else 1
            other = RBFInterpolator(points[keep], values[keep], kernel=kernel, degree=degree)
            found.append(values[k] - other(point[None])[0])
    assert len(found) == 9
    wanted = np.sqrt(np.mean(np.square(found))) / np.ptp(values)
    assert search_study.left_out(kernel, values) == pytest.approx(wanted, rel=1e-6)


def test_a_landscape_goes_through_its_grid():
    grid = scores(1)
    surrogate = search_study.Surrogate(grid)
    found = [surrogate(point) for point in search_study.POINTS]
    assert (
        np.allclose(found, grid.ravel())
        and surrogate.best >= grid.max() - 1e-9
        and surrogate.worst <= grid.min() + 1e-9
    )


def test_what_a_sum_of_one_costs():
    grid = np.zeros((5, 5))
    grid[3, 3], grid[1, 1], grid[1, 2] = 1.0, 0.6, 0.8  # at (1.1, 1.1), (0.5, 0.5), (0.5, 0.8)
    assert search_study.sum_to_one(grid) == pytest.approx(0.4)
    assert search_study.sum_to_one(grid, near=0.3) == pytest.approx(0.2)


def lines():
    """What would have been measured, of losses that are smooth in the coefficients."""
    for scenario in search_grids.SCENARIOS[:1]:
        for line in search_grids.wanted(scenario):
            a, b = {0: (0, 0), 2: tuple(line["knobs"]["weight"])}.get(
                len(line["models"]), (1, 0) if line["models"] == [scenario.one] else (0, 1)
            )
            losses = [2 - 1.6 * x + 0.8 * x * x + 0.15 * y * y for x, y in ((a, b), (b, a))]
            items = {domain: [[4 * loss, 4]] * 8 for domain, loss in zip(line["domains"], losses, strict=True)}
            yield {**line, "content": "c", "items": items, "seconds": {"merge": 0.25, "score": 4.0}}


def test_the_page_says_what_was_run_and_what_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(search_study, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(search_study, "OPTIMISERS", ("random", "sobol", "powell"))
    measured = list(lines())
    page = search_study.page(measured, 2)
    assert "took 0.25 s" in page and "its scoring 4.0 s" in page and "| math+code task_arithmetic | 1.00 |" in page
    assert "code+medicine task_arithmetic" in page.split("## Not run")[1]
    assert "math+code task_arithmetic" not in page.split("## Not run")[1]
    kept = (tmp_path / "runs.jsonl").read_text()
    assert search_study.page(measured, 2) == page and (tmp_path / "runs.jsonl").read_text() == kept
    assert search_study.grids(measured[:20], "dev") == []


def test_powell_is_far_below_chance_on_a_smooth_landscape():
    surrogate = search_study.Surrogate(scores(2))
    regrets = {
        name: [search_study.run(surrogate, name, seed)[39] for seed in range(3)] for name in ("random", "powell")
    }
    assert np.median(regrets["powell"]) < 0.3 * np.median(regrets["random"])
