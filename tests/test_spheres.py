"""Model Stock, Karcher, multislerp and nuslerp: the conformance suite, their references, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graftkit import methods
from graftkit.testing import MethodConformance
from reference import cases as inputs
from reference import spheres as reference

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
METHODS = ("model_stock", "karcher", "multislerp", "nuslerp")


class TestModelStock(MethodConformance):
    method = "model_stock"


class TestModelStockRows(MethodConformance):
    method = "model_stock_rows"


class TestKarcher(MethodConformance):
    method = "karcher"


class TestMultislerp(MethodConformance):
    method = "multislerp"


class TestNuslerp(MethodConformance):
    method = "nuslerp"


class TestNuslerpRows(MethodConformance):
    method = "nuslerp_rows"


class TestNuslerpColumns(MethodConformance):
    method = "nuslerp_columns"


def run(name, base, models, **knobs):
    base = None if base is None else torch.tensor(base)
    return methods.get(name).run(base=base, models=torch.tensor(models), **knobs).numpy()


def assert_equal(got, want, case, gain=1.0):
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11 * case.largest * max(gain, 1.0))


SEVERAL = st.integers(2, 4)


@PROPERTY
@given(inputs.cases(SEVERAL), st.booleans())
def test_model_stock_is_its_reference(case, extrapolate):
    """Where the divisor is small, rounding is all that is left of it."""
    for name, want in (("model_stock", reference.model_stock), ("model_stock_rows", reference.model_stock_rows)):
        merged = want(case.base, case.models, extrapolate)
        assume(np.abs(merged).max(initial=0) < 100 * case.largest)
        assert_equal(run(name, case.base, case.models, extrapolate=extrapolate), merged, case, 1e3)


@PROPERTY
@given(inputs.cases(st.just(2)), st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([("rows", -1), ("columns", 0)]))
def test_nuslerp_of_rows_and_of_columns(case, weight, along):
    deltas = case.models - case.base
    want = case.base + reference.nuslerp_along(*deltas, (weight, 1.0), along[1])
    got = run(f"nuslerp_{along[0]}", case.base, case.models, weight=(weight, 1.0))
    assert_equal(got, want, case, 1e4)


def test_karcher_stops_where_it_is_told_to():
    models = [[1.0, 0], [1, 0], [0, 1]]
    start, one = (run("karcher", None, models, iterations=k) for k in (0, 1))
    assert start == pytest.approx(np.array([2.0, 1.0]) / 5**0.5)
    assert not np.allclose(start, one)
    assert run("karcher", None, models, tolerance=1.0) == pytest.approx(start)


@PROPERTY
@given(inputs.cases(), st.booleans())
def test_karcher_is_its_reference(case, with_base):
    base = case.base if with_base else 0 * case.base
    tensors = [model - base for model in case.models]
    units = [t / reference.size(t) for t in tensors if reference.size(t) > 0]
    # beyond a quarter turn from their mean the Karcher mean need not be unique
    assume(all(reference.cosine(sum(units), unit) > 0.3 for unit in units))
    got = run("karcher", case.base if with_base else None, case.models)
    assert_equal(got, base + reference.karcher(tensors), case, 1e3)


@PROPERTY
@given(st.data(), st.booleans(), st.booleans())
def test_multislerp_is_its_reference(data, with_base, normalize):
    case = data.draw(inputs.cases())
    weight = data.draw(inputs.weights(case.count))
    assume(not normalize or abs(sum(weight)) > 0.05)
    base = case.base if with_base else 0 * case.base
    tensors = [model - base for model in case.models]
    units = [t / max(reference.size(t), 1e-300) for t in tensors]
    length = reference.size(sum((w * u for w, u in zip(weight, units, strict=True)), np.zeros_like(base)))
    assume(length == 0 or length > 1e-3 * sum(map(abs, weight)))
    got = run("multislerp", case.base if with_base else None, case.models, weight=weight, normalize=normalize)
    assert_equal(got, base + reference.multislerp(tensors, weight, normalize), case, 1e4)


@PROPERTY
@given(st.data(), st.booleans())
def test_nuslerp_is_its_reference(data, with_base):
    case = data.draw(inputs.cases(st.just(2)))
    weight = data.draw(inputs.weights(2))
    assume(abs(sum(weight)) > 0.05)
    base = case.base if with_base else 0 * case.base
    first, second = (model - base for model in case.models)
    c = reference.cosine(first, second)
    assume(1 - c * c == 0 or 1 - c * c > 1e-5)
    got = run("nuslerp", case.base if with_base else None, case.models, weight=weight)
    assert_equal(got, base + reference.nuslerp(first, second, weight), case, 1e5)


def test_worked_examples():
    half = [[1.0, 0], [0.5, 0.75**0.5]]
    assert run("model_stock", [0.0, 0], half) == pytest.approx(2 / 3 * np.mean(half, axis=0))
    axes = np.diag([1.0, 2, 3])
    assert run("model_stock", [0.0] * 3, axes).tolist() == [0, 0, 0]
    for name in ("karcher", "multislerp"):
        assert run(name, None, axes) == pytest.approx(2 / 3**0.5)
    assert run("nuslerp", None, [[1.0, 0], [0, 3.0]]) == pytest.approx([0.5**0.5, 3 * 0.5**0.5])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_of_three_is_not_that_of_two(count):
    """At a common cosine of 1/2 the share is T/2 / (1 + (T - 1)/2): 2/3, 3/4, 5/6."""
    deltas = np.linalg.cholesky(np.full((count, count), 0.5) + 0.5 * np.eye(count))
    share = run("model_stock", np.zeros(count), deltas) / deltas.mean(axis=0)
    assert share == pytest.approx(count / (count + 1))


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_a_model_merge_to_it(name):
    model = np.random.default_rng(0).standard_normal((4, 5))
    assert run(name, 0 * model, np.stack([model] * 2)) == pytest.approx(model)


@pytest.mark.parametrize("name", METHODS)
def test_they_scale_with_the_deltas_however_small(name):
    """No floor on a norm: deltas of 2e-20 merge as those of 1 do."""
    deltas = np.random.default_rng(1).standard_normal((2, 4, 5)) + 0.5
    small = run(name, np.zeros((4, 5)), 2e-20 * deltas)
    np.testing.assert_allclose(small, 2e-20 * run(name, np.zeros((4, 5)), deltas), rtol=1e-10)


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_the_norm_is_the_mean_norm(name):
    models = np.random.default_rng(2).standard_normal((4, 3, 5)) + 1
    assert np.linalg.norm(run(name, None, models)) == pytest.approx(np.mean([np.linalg.norm(m) for m in models]))


@pytest.mark.parametrize("name", METHODS)
def test_they_commute_with_rotations(name):
    draw = np.random.default_rng(3)
    left, right = (np.linalg.qr(draw.standard_normal((n, n)))[0] for n in (4, 5))
    base, models = draw.standard_normal((4, 5)), draw.standard_normal((2, 4, 5)) + 1
    turned = run(name, left @ base @ right, left @ models @ right)
    np.testing.assert_allclose(turned, left @ run(name, base, models) @ right, atol=1e-12)


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_directions_that_cancel_give_the_mean_of_the_tensors(name):
    """Three directions of 120 degrees, with norms 1, 2 and 4."""
    turns = 2 * np.pi * np.arange(3) / 3
    models = np.stack([np.cos(turns), np.sin(turns)], axis=1) * [[1], [2], [4]]
    assert run(name, None, models) == pytest.approx(models.mean(axis=0))


def test_karcher_leaves_the_base_for_a_far_majority():
    """Two equal directions and one at a right angle: the mean lies a third of the way, 30 degrees off the pair."""
    assert run("karcher", None, [[1.0, 0], [1, 0], [0, 1]]) == pytest.approx([np.cos(np.pi / 6), np.sin(np.pi / 6)])


def test_nuslerp_refuses_weights_that_cancel():
    with pytest.raises(ValueError, match="sum to zero"):
        run("nuslerp", None, [[1.0, 0], [0, 1.0]], weight=[1, -1])
