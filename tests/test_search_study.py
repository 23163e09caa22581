"""The study of optimisers: its closed forms against brute force, both kinds of grids, and the page that it writes."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples" / "orchard"), str(ROOT / "examples" / "orchard" / "vlm")]

from trials import EXP_WEIGHTS, VL_WEIGHTS, Point, Trial, swapped  # noqa: E402

import search_grids  # noqa: E402
import search_study  # noqa: E402
from search_landscapes import KERNELS, Landscape, Surrogate, left_out, of_experts, of_vlms, sum_to_one  # noqa: E402
from search_runs import Kept, Runs, run, space  # noqa: E402

AXIS = search_grids.AXIS
POINTS = np.array(list(product(AXIS, AXIS)))


def landscape(seed=0, size=2):
    rng = np.random.default_rng(seed)
    points = POINTS if size == 2 else np.array(list(product(AXIS, AXIS, (0.3, 0.7))))
    x, y = points.T[:2]
    score = np.sin(2 * x) + 0.5 * np.cos(3 * y) * x + 0.05 * rng.standard_normal(len(x)) + 0.3 * points[:, -1]
    return Landscape("math+code", "ties", points, np.stack([score, score + 0.1 * x], 1))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_left_out_error_is_that_of_refits(kernel, size):
    from scipy.interpolate import RBFInterpolator

    of, found = landscape(size=size), []
    units, values = of.units(of.points), of.scores
    for k, point in enumerate(units):
        if all(0 < x < 1 for x in point[:2]):
            keep = np.arange(len(units)) != k
            other = RBFInterpolator(units[keep], values[keep], kernel=kernel, degree=0 if kernel == "linear" else 1)
            found.append(values[k] - other(point[None])[0])
    assert len(found) == 9 * (size - 1)
    wanted = np.sqrt(np.mean(np.square(found))) / np.ptp(values)
    assert left_out(kernel, units, values) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_a_landscape_goes_through_its_grid(size):
    of = landscape(1, size)
    surrogate = Surrogate(of)
    assert np.allclose(surrogate.shares(of.points), of.shares)
    assert surrogate.best >= of.scores.max() - 1e-9 and surrogate.worst <= of.scores.min() + 1e-9
    assert [axis.name for axis in space(of).axes] == ["weight 0", "weight 1", "density 2"][:size]


def test_what_a_sum_of_one_costs():
    grid = np.zeros((5, 5))
    grid[3, 3], grid[1, 1], grid[1, 2] = 1.0, 0.6, 0.8  # at (1.1, 1.1), (0.5, 0.5), (0.5, 0.8)
    of = Landscape("a+b", "ties", POINTS, np.stack([grid.ravel()] * 2, 1))
    assert sum_to_one(of) == pytest.approx(0.4)
    assert sum_to_one(of, near=0.3) == pytest.approx(0.2)


def lines(split="dev", scenario=search_grids.SCENARIOS[0]):
    """What would have been measured, of losses that are smooth in the coefficients."""
    for line in search_grids.wanted(scenario):
        a, b = {0: (0, 0), 2: tuple(line["knobs"]["weight"])}.get(
            len(line["models"]), (1, 0) if line["models"] == [scenario.one] else (0, 1)
        )
        losses = [2 - 1.6 * x + 0.8 * x * x + 0.15 * y * y for x, y in ((a, b), (b, a))]
        items = {domain: [[4 * loss, 4]] * 8 for domain, loss in zip(line["domains"], losses, strict=True)}
        yield {**line, "content": line["split"], "items": items, "seconds": {"merge": 0.25, "score": 4.0}}


def answers(vlm="neutral", expert="language"):
    """What a VLM would have answered: more to the expert's task with more of the expert."""
    found = {}

    def answered(point, task, share):
        items = "1" * round(20 * share) + "0" * (20 - round(20 * share))
        found[point, "dev", task] = Trial(point, "dev", task, items, {}, 1.0, 2.0)

    answered(Point(vlm), expert, 0.0)
    answered(Point(vlm), "digits", 0.5)
    answered(swapped(vlm, expert), expert, 0.6)
    answered(swapped(vlm, expert), "digits", 0.2)
    for vl, exp in product(VL_WEIGHTS, EXP_WEIGHTS):
        answered(Point(vlm, expert, "task_arithmetic", vl, exp), expert, exp / 2)
        answered(Point(vlm, expert, "task_arithmetic", vl, exp), "digits", vl / 2.5)
        for density in (0.3, 0.7):
            answered(Point(vlm, expert, "ties", vl, exp, density), expert, density * exp / 2)
            answered(Point(vlm, expert, "ties", vl, exp, density), "digits", 0.5)
    return found


def test_scores_of_both_kinds_of_grids():
    (experts,) = of_experts(list(lines()))
    assert experts.shares[experts.points.tolist().index([0.8, 0.2])] == pytest.approx(
        [(1.6 * 0.8 - 0.8 * 0.64 - 0.15 * 0.04) / 0.8, (1.6 * 0.2 - 0.8 * 0.04 - 0.15 * 0.64) / 0.8]
    )
    found = search_study.landscapes([], answers())
    names = ["task_arithmetic", "ties 0.3", "ties 0.7", "ties density"]
    assert [of.name for of in found] == [f"neutral+language {name}" for name in names]
    assert found[0].shares[found[0].points.tolist().index([0.5, 1.5])] == pytest.approx([0.75, 0.2 / 0.5])
    assert found[0].known == (((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (0.6, 0.4))) and found[1].known == ()
    assert np.allclose([own for _, own in experts.known], [(0, 0), (1, -0.15 / 0.8), (-0.15 / 0.8, 1)])
    assert found[3].points.shape == (50, 3) and found[3].budget == 60 and found[3].seconds == (1.0, 4.0)
    joined = found[3].points.tolist().index([0.5, 1.5, 0.7])
    assert found[3].shares[joined] == pytest.approx([0.5, 1.0])
    few = {key: trial for key, trial in answers().items() if key[0].vl_weight < 1.2}
    assert list(of_vlms(few)) == [] and list(of_experts(list(lines())[:20])) == []


def test_what_is_best_on_some_items_is_looked_up_on_others():
    one, other = Surrogate(landscape(0)), Surrogate(landscape(3))
    runs = Runs(one, {"x": np.array([[[0.2, 0.2], [1.1, 0.8], [0.5, 0.5]]])})
    here, there = one.regrets(runs.tried["x"][0]), other.regrets(runs.tried["x"][0])
    best = [0, int(here[:2].argmin()), int(here.argmin())]
    assert runs.regrets("x")[0] == pytest.approx(np.minimum.accumulate(here))
    assert runs.regrets("x", other)[0] == pytest.approx(there[best])


def test_the_page_says_what_was_run_and_what_was_not(tmp_path):
    kept, measured = Kept(tmp_path / "runs.jsonl"), list(lines())
    names = ("random", "sobol", "powell")

    def page():
        found = search_study.landscapes(measured, answers())
        made = [kept.runs(Surrogate(of), names, 2) for of in found]
        checked = [
            (kept.runs(Surrogate(one), ("powell",), 2), other) for one, other in search_study.pairs(measured, answers())
        ]
        return search_study.page(made, checked, search_study.not_run(found), 2), made, checked

    text, made, checked = page()
    assert "Landscapes: 5, of 2 scenarios" in text and "### Two coefficients and the density, 60 trials" in text
    assert "code+medicine task_arithmetic" in text.split("## Not run")[1]
    assert "math+code task_arithmetic" not in text.split("## Not run")[1]
    assert "| math+code task_arithmetic | math 8, code 8 | math 8, code 8 | 1.00 |" in text
    before = kept.file.read_text()
    kept = Kept(kept.file)
    assert page()[0] == text and kept.file.read_text() == before
    search_study.over_trials(made, tmp_path / "over.png")
    search_study.on_other_items(checked, tmp_path / "other.png")
    assert (tmp_path / "over.png").stat().st_size > 10_000 and (tmp_path / "other.png").is_file()


def test_powell_is_far_below_chance_on_a_smooth_landscape():
    surrogate = Surrogate(landscape(2))
    regrets = {
        name: [surrogate.regrets(run(surrogate, name, seed, 40)).min() for seed in range(3)]
        for name in ("random", "powell")
    }
    assert np.median(regrets["powell"]) < 0.3 * np.median(regrets["random"])


def test_grids_are_chosen_by_name_and_density():
    ties = [s for s in search_grids.SCENARIOS if s.name == "math+code ties"]
    assert list(search_grids.chosen(["math+code ties"])) == ties
    (one,) = search_grids.chosen(["math+code ties 0.3"])
    assert one.name == "math+code ties" and one.densities == (0.3,)
    assert tuple(search_grids.chosen([])) == search_grids.SCENARIOS


def test_the_model_is_a_gaussian_process():
    """Against textbook formulas, for each of the hyperparameters that it keeps."""
    from search_tasks import CONSTANT, fitted

    rng = np.random.default_rng(3)
    units, other = rng.random((7, 2)), rng.random((5, 2))
    values = np.sin(3 * units[:, 0]) + units[:, 1]
    process = fitted(units, values, rng)
    means, variances = process.at(other)
    for k, lengths in enumerate(process.lengths):

        def covariance(one, two, lengths=lengths, quadratic=process.quadratic[k]):
            gap = np.sqrt(5 * sum(((a - b) / length) ** 2 for a, b, length in zip(one, two, lengths, strict=True)))
            a, b = 2 * one - 1, 2 * two - 1
            terms = a @ b + sum(a[i] * a[j] * b[i] * b[j] for i in range(2) for j in range(i, 2))
            return (1 + gap + gap**2 / 3) * np.exp(-gap) + CONSTANT + quadratic * terms

        whole = process.factors[k] @ process.factors[k].T
        bare = np.array([[covariance(one, two) for two in units] for one in units])
        noise = np.diag(whole - bare)
        assert np.allclose(whole - np.diag(noise), bare) and np.all((noise > 0) & (noise < 2e-3))
        across = np.array([[covariance(one, two) for two in units] for one in other])
        standard, inverse = (values - values.mean()) / values.std(), np.linalg.inv(whole)
        assert means[k] == pytest.approx(values.mean() + values.std() * across @ inverse @ standard, abs=1e-5)
        own = [covariance(one, one) for one in other] - np.einsum("ou,up,op->o", across, inverse, across)
        scale = standard @ inverse @ standard / len(units) * values.std() ** 2
        assert variances[k] == pytest.approx(scale * own, rel=1e-2, abs=1e-7)


def test_expected_improvement_is_that_of_samples():
    from search_tasks import fitted, improvement

    rng = np.random.default_rng(0)
    units, where = rng.random((5, 2)), rng.random((3, 2))
    processes = [fitted(units, rng.random(5), rng) for _ in range(2)]
    weights, total = np.array([0.3, 0.7]), np.zeros(3)
    found = [process.at(where) for process in processes]
    for k in range(len(found[0][0])):
        drawn = sum(
            w * (m[k] + np.sqrt(v[k]) * rng.standard_normal((200_000, 3)))
            for w, (m, v) in zip(weights, found, strict=True)
        )
        total += np.maximum(drawn - 0.6, 0).mean(axis=0)
    assert np.exp(improvement(processes, weights, where, 0.6)) == pytest.approx(total, rel=0.05, abs=1e-5)
    far = improvement(processes, weights, where, 60.0)  # nothing is expected there, and yet there is an order
    assert np.all(np.isfinite(far)) and np.all(far < -50)
