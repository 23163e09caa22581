"""TSV-M, isotropic merging, KnOTS, WUDI and OptMerge: conformance, their references, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from graftkit.methods import decomposition, get, spectral, wudi
from graftkit.testing import MethodConformance
from reference import spectral as reference


class TestTsv(MethodConformance):
    method = "tsv"


class TestIsoC(MethodConformance):
    method = "iso_c"


class TestIsoCts(MethodConformance):
    method = "iso_cts"


class TestKnots(MethodConformance):
    method = "knots"


class TestWudi(MethodConformance):
    method = "wudi"


class TestOptMerge(MethodConformance):
    method = "opt_merge"


SHAPES = [(8, 8), (6, 11), (11, 6), (3, 9), (9, 2), (1, 5), (5, 1)]
CASES = [(shape, count, rank) for shape in SHAPES for count in (1, 2, 3) for rank in (None, 1)]
EVERY = ("tsv", "iso_c", "iso_cts", "knots", "wudi", "opt_merge")


def drawn(shape, count, rank=None, seed=0):
    """Random deltas, of full or of a given rank."""
    source = np.random.default_rng([*shape, count, rank or 0, seed])
    inner = min(rank or min(shape), *shape)
    return source.normal(size=(count, shape[0], inner)) @ source.normal(size=(count, inner, shape[1])) / 8


def run(name, deltas, **knobs):
    stack = torch.from_numpy(np.asarray(deltas, np.float64))
    return get(name).run(base=torch.zeros_like(stack[0]), models=stack, **knobs).numpy()


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))


weights = [1.0, 0.4, 1.7]


@pytest.mark.parametrize(("shape", "count", "rank"), CASES)
def test_all_are_their_references(shape, count, rank):
    deltas, weight = drawn(shape, count, rank), weights[:count]
    close(run("tsv", deltas, weight=weight, scale=0.7), reference.tsv(deltas, weight, 0.7))
    close(run("iso_c", deltas, weight=weight, scale=0.7), reference.iso_c(deltas, weight, 0.7))
    knots = {"weight": weight, "density": [0.5, 1.0, 0.2][:count]}
    close(run("knots", deltas, scale=0.7, **knots), reference.knots(deltas, scale=0.7, **knots))
    opt = run("opt_merge", deltas, weight=weight, steps=20, learning_rate=0.05)
    close(opt, reference.opt_merge(deltas, weight, 20, 0.05, 0.9))


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(("shape", "count"), [((8, 8), 2), ((6, 11), 3), ((11, 6), 2), ((12, 10), 1)])
def test_iso_cts_is_its_reference(shape, count, common):
    deltas, weight = drawn(shape, count), weights[:count]
    close(run("iso_cts", deltas, weight=weight, common=common), reference.iso_cts(deltas, weight, common))


@pytest.mark.parametrize("start", ["sum", "mean", "zero"])
@pytest.mark.parametrize(("shape", "count", "ridge"), [((5, 4), 2, 0.0), ((4, 7), 2, 0.1), ((3, 7), 3, 0.0)])
def test_wudi_stops_where_the_gradient_flow_is_by_then(shape, count, start, ridge):
    deltas, weight = drawn(shape, count), weights[:count]
    got = run("wudi", deltas, weight=weight, steps=30, start=start, ridge=ridge)
    close(got, reference.wudi_early(deltas, weight, 30, start, ridge), 1e-7)


@pytest.mark.parametrize(("shape", "count", "rank"), CASES)
def test_exact_wudi_is_the_minimum_of_least_norm(shape, count, rank):
    deltas = drawn(shape, count, rank)
    close(run("wudi", deltas, solver="exact", start="zero"), reference.wudi_least_norm(deltas), 1e-6)


def test_wudis_objective_falls_from_the_sum_and_the_mean_to_the_minimum():
    deltas = drawn((9, 12), 3)
    at = [reference.wudi_objective(run("wudi", deltas, steps=steps), deltas) for steps in (0, 1, 30, 300)]
    exact = reference.wudi_objective(run("wudi", deltas, solver="exact"), deltas)
    mean = reference.wudi_objective(run("wudi", deltas, steps=0, start="mean"), deltas)
    assert at[0] > at[1] > at[2] > at[3] > exact - 1e-12 and mean > exact
    np.testing.assert_allclose(reference.wudi_slope(run("wudi", deltas, solver="exact"), deltas), 0, atol=1e-8)


def test_adapters_with_rows_of_their_own_come_through_exact_wudi_whole():
    """Independent row spaces: on its own inputs each model's delta is what it was, and the objective is zero."""
    deltas = drawn((20, 30), 3, rank=4)
    merged = run("wudi", deltas, solver="exact")
    for delta in deltas:
        close(merged @ delta.T, delta @ delta.T, 1e-8)


def test_descent_of_wudi_depends_on_no_scale_and_adams_does():
    deltas = drawn((6, 8), 2)
    close(run("wudi", 1e-4 * deltas) * 1e4, run("wudi", deltas))
    assert np.abs(run("wudi", 1e-4 * deltas, solver="adam") * 1e4 - run("wudi", deltas, solver="adam")).max() > 0.01


@pytest.mark.parametrize("name", EVERY)
def test_rotations_go_through(name):
    """Of both sides, or for KnOTS of the outputs; one shape given, another run on, as in an adapter's core."""
    deltas = drawn((9, 7), 3)
    method, given = get(name), {n: k.default for n, k in get(name).knobs.items()}
    left = ortho_group.rvs(9, random_state=1)
    right = ortho_group.rvs(7, random_state=2) if method.rotations == "both" else np.eye(7)
    close(run(name, left @ deltas @ right), left @ run(name, deltas) @ right, 1e-8)
    assert method.commutes(given) == method.rotations
    if name == "wudi":
        assert method.commutes({**given, "solver": "adam"}) is None
        turned = run(name, left @ deltas @ right, solver="adam", learning_rate=0.01)
        assert np.abs(turned - left @ run(name, deltas, solver="adam", learning_rate=0.01) @ right).max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_scaled_deltas_give_a_scaled_result(name):
    deltas = drawn((6, 8), 3)
    close(run(name, 1e-3 * deltas) * 1e3, run(name, deltas))


@pytest.mark.parametrize("name", EVERY)
def test_a_model_without_a_delta_does_not_count(name):
    deltas = drawn((6, 8), 3)
    close(run(name, np.concatenate([deltas[:2], 0 * deltas[:1]])), run(name, deltas[:2]))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "knots"])
def test_a_model_of_weight_zero_does_not_count(name):
    """KnOTS has it in the vote all the same, as TIES does."""
    deltas = drawn((6, 8), 3)
    close(run(name, deltas, weight=[1.0, 1.0, 0.0]), run(name, deltas[:2]))


@pytest.mark.parametrize("name", ["tsv", "wudi", "opt_merge"])
def test_one_model_comes_back(name):
    deltas = drawn((6, 8), 1)
    close(run(name, deltas), deltas[0], 1e-8)


def test_identical_models():
    """TSV keeps the directions that one share of the rank holds; exact WUDI gives the model; KnOTS its trimmed self."""
    delta = drawn((8, 8), 1)[0]
    left, sizes, right = np.linalg.svd(delta)
    close(run("tsv", [delta, delta]), (left[:, :4] * sizes[:4]) @ right[:4])
    close(run("wudi", [delta, delta, delta], solver="exact"), delta, 1e-7)
    close(run("knots", [delta, delta], density=1.0), delta)


def test_orthogonal_tasks_add_up_in_tsv_and_in_wudi():
    one, other = np.zeros((6, 6)), np.zeros((6, 6))
    one[:3, :3], other[3:, 3:] = drawn((3, 3), 2)
    close(run("tsv", [one, other]), one + other)
    close(run("wudi", [one, other], solver="exact"), one + other, 1e-8)


def test_an_isotropic_merge_has_one_singular_value():
    deltas = drawn((8, 5), 3)
    for name in ("iso_c", "iso_cts"):
        sizes = np.linalg.svd(run(name, deltas), compute_uv=False)
        np.testing.assert_allclose(sizes, sizes[0])
    total = np.linalg.svd(deltas.sum(axis=0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(run("iso_c", deltas), 2), total.mean())
    assert (run("iso_c", deltas) * deltas.sum(axis=0)).sum() > 0


def test_an_isotropic_merge_of_adapters_keeps_their_rank():
    assert np.linalg.matrix_rank(run("iso_c", drawn((12, 10), 2, rank=2)), tol=1e-6) == 4


def test_knots_without_a_vote_is_task_arithmetic():
    deltas = drawn((6, 8), 3)
    merged = run("knots", deltas, weight=weights, density=1.0, elect="none")
    close(merged, run("task_arithmetic", deltas, weight=weights))


@pytest.mark.parametrize("name", ["wudi", "opt_merge", "iso_cts"])
@pytest.mark.parametrize("solver", ["early_stopped", "adam"])
def test_matrices_that_keep_inputs_in_rows_are_turned(name, solver):
    if solver == "adam" and name != "wudi":
        pytest.skip("has one solver")
    deltas, knobs = drawn((6, 9), 2), {"solver": solver} if name == "wudi" else {}
    turned = run(name, deltas.transpose(0, 2, 1), inputs="rows", **knobs)
    close(turned.T, run(name, deltas, inputs="columns", **knobs))


def test_iso_cts_shares_of_few_directions():
    for rank in range(1, 12):
        for count in range(1, 6):
            for common in (0.0, 0.5, 0.8, 1.0):
                shared, own = spectral.shares(rank, count, common)
                assert shared >= 0 and own >= 0 and shared + own * count == rank


def decaying(rows, columns, seed=3):
    source = np.random.default_rng(seed)
    left, right = (np.linalg.qr(source.normal(size=(n, min(rows, columns))))[0] for n in (rows, columns))
    return torch.from_numpy((left * 0.97 ** np.arange(min(rows, columns))) @ right.T)


def test_a_sketch_holds_nearly_the_energy_of_the_first_directions():
    matrix = decaying(300, 260)
    exact, sketch = (
        float(f(matrix, 40).sizes.square().sum()) for f in (decomposition.spectrum, decomposition.sketched)
    )
    assert 0.99 * exact < sketch <= exact * (1 + 1e-12)
    again = decomposition.sketched(matrix, 40)
    torch.testing.assert_close(again.left.T @ again.left, torch.eye(40, dtype=torch.float64))
    assert float(decomposition.sketched(matrix, 40).sizes[0]) == float(again.sizes[0])


def test_tsv_by_sketches_is_nearly_tsv():
    deltas = np.stack([decaying(200, 180, seed).numpy() for seed in range(4)])
    exact, sketch = run("tsv", deltas), run("tsv", deltas, svd="sketched")
    assert 0 < np.linalg.norm(exact - sketch) < 0.2 * np.linalg.norm(exact)


def test_directions_of_few_rows_and_of_many_are_the_same():
    rows = torch.from_numpy(drawn((4, 9), 1)[0])
    few, many = decomposition.eigen(rows, 1e-10), decomposition.eigen(torch.cat([rows, 0 * rows, 0 * rows]), 1e-10)
    assert [len(part[0]) for part in (few, many)] == [4, 4]
    for values, directions in (few, many):
        torch.testing.assert_close((directions * values) @ directions.T, rows.T @ rows)


def test_momentum_leaves_what_iterations_leave():
    values = torch.tensor([0.0, 0.01, 0.5], dtype=torch.float64)
    assert wudi._left_over(values, 0, 0.1, 0.9).tolist() == [1, 1, 1]
    left = wudi._left_over(values, 2, 0.1, 0.5)
    np.testing.assert_allclose(left[2], 0.9 - 0.1 * (0.5 * 1.0 + 0.9))


def test_a_sketch_holds_a_hundredth_less_even_where_all_directions_are_of_one_size():
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(600, 640)) * 1e-22)
    exact, sketch = (
        float(f(matrix, 75).sizes.square().sum()) for f in (decomposition.spectrum, decomposition.sketched)
    )
    assert 0.985 * exact < sketch < exact * (1 + 1e-6)
