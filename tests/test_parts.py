"""The small pure functions that methods share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.methods import parts
from reference import cases as inputs
from reference.ties import kth_magnitude, trimmed

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
INFINITY = math.inf


def test_a_knob_becomes_one_value_per_model():
    stack = torch.zeros(3, 4, 5)
    assert parts.per_model(0.5, stack).shape == (3, 1, 1)
    assert parts.per_model([1, 2, 3], stack).flatten().tolist() == [1, 2, 3]
    assert parts.per_model((1.0,), torch.zeros(1)).shape == (1,)
    assert parts.per_model(0.1, stack).dtype == torch.float32
    with pytest.raises(ValueError, match="2 values for 3 models"):
        parts.per_model([1, 2], stack)
    with pytest.raises(ValueError, match="1 values for 3 models"):
        parts.per_model([1], stack)


@pytest.mark.parametrize(
    ("density", "elements", "count"),
    [
        (0, 100, 0), (1, 100, 100), (0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58), (0.7, 10, 7), (1e-9, 100, 1),
        (0.999, 10, 9), (0.2, 4, 1), (0.5, 1, 1), (0.5, 0, 0), (1, 0, 0), (0.1, 233_046_016, 23_304_601),
        (0.2, 7_000_000_000, 1_400_000_000), (1 / 3, 9, 3), (2 / 3, 3_000_000_000, 2_000_000_000),
    ],
)  # fmt: skip
def test_a_density_keeps_its_share_rounded_down(density, elements, count):
    assert parts.kept_count(density, elements) == count


def test_any_percentage_of_a_hundred_is_itself():
    assert [parts.kept_count(percent / 100, 100) for percent in range(101)] == list(range(101))
    assert [parts.kept_count(k / 7919, 7919) for k in range(7920)] == list(range(7920))


@PROPERTY
@given(st.data())
def test_trimming_keeps_the_top_and_what_ties_with_it(data):
    case = data.draw(inputs.cases())
    density = data.draw(inputs.densities(case.count))
    deltas = torch.tensor(case.models)
    threshold = parts.threshold_of(deltas, density)
    kept = parts.trim(deltas, threshold)
    for k, share in enumerate(density):
        np.testing.assert_array_equal(kept[k], trimmed(case.models[k], kth_magnitude(case.models[k], share)))
        count = parts.kept_count(share, case.base.size)
        assert int((deltas[k].abs() >= threshold[k]).sum()) >= count
        assert int((deltas[k].abs() > threshold[k]).sum()) <= max(count, 0) or threshold[k] == 0


def test_the_ends_of_trimming():
    deltas = torch.tensor([[1.0, -2, 0, 3], [0, 0, 0, 0]])
    assert parts.threshold_of(deltas, 0.0).tolist() == [INFINITY, INFINITY]
    assert parts.threshold_of(deltas, 1.0).tolist() == [0, 0]
    assert parts.threshold_of(deltas, (0.25, 0.75)).tolist() == [3, 0]
    assert torch.equal(parts.trim(deltas, parts.threshold_of(deltas, 1.0)), deltas)
    assert not parts.trim(deltas, parts.threshold_of(deltas, 0.0)).any()
    assert parts.threshold_of(torch.zeros(2, 0), 0.5).tolist() == [INFINITY, INFINITY]
    assert parts.threshold_of(torch.tensor([5.0, -1.0]), 0.5).tolist() == [0, 0], "scalars are kept"


def test_thresholds_are_found_in_float32():
    """Two float64 magnitudes that float32 cannot tell apart tie; numbers beyond its range are the largest of all."""
    close = torch.tensor([[1.0, 1.0 + 1e-12, 0.5]], dtype=torch.float64)
    assert parts.trim(close, parts.threshold_of(close, 0.34)).count_nonzero() == 2
    huge = torch.tensor([[1e300, 1.0, 0.5]], dtype=torch.float64)
    assert parts.trim(huge, parts.threshold_of(huge, 0.34)).tolist() == [[1e300, 0, 0]]


def test_thresholds_take_no_part_in_gradients():
    deltas = torch.randn(2, 10, requires_grad=True)
    threshold = parts.threshold_of(deltas, 0.5)
    assert not threshold.requires_grad
    parts.trim(deltas, threshold).sum().backward()
    assert deltas.grad.sum() == 10


def test_dropping():
    deltas = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    uniform = torch.tensor([[0.0, 0.5, 0.9], [0.0, 0.5, 0.9]], dtype=torch.float64)
    assert parts.drop(deltas, uniform, 0.5, True).tolist() == [[2, 0, 0], [8, 0, 0]]
    assert parts.drop(deltas, uniform, [0.75, 1.0], False).tolist() == [[1, 2, 0], [4, 5, 6]]
    assert parts.drop(deltas, uniform, [0.0, 1.0], True).tolist() == [[0, 0, 0], [4, 5, 6]]


def test_sums_are_added_in_order():
    stack = torch.tensor([[1e8], [1.0], [-1e8]], dtype=torch.float32)
    assert parts.weighted_sum(stack, 1.0).item() == 0.0
    assert parts.weighted_sum(stack[[0, 2, 1]], 1.0).item() == 1.0
    assert parts.weighted_sum(stack[:1], -2).item() == -2e8


def combined(*values, weight=1.0, **options):
    options = {"weighted_election": False, "mean": True} | options
    return parts.disjoint(torch.tensor(values, dtype=torch.float64).reshape(-1, 1), weight, **options).item()


def test_elections():
    assert combined(3, 1, -2) == 2, "the minority does not count"
    assert combined(3, 1, -2, mean=False) == 4
    assert combined(-3, 1, 1) == -3
    assert combined(2, -2) == 2, "a zero sum elects plus"
    assert combined(2, 0) == 2, "a zero does not dilute the mean"
    assert combined(0, 0) == 0
    assert combined(3, 1, weight=(1, 3)) == 1.5
    assert combined(3, -2, weight=(1, 4)) == 3, "weights do not elect"
    assert combined(3, -2, weight=(1, 4), weighted_election=True) == -2
    assert combined(3, 1, weight=(0, 0)) == 0, "weights that sum to zero do not divide"
    assert combined(3, 1, weight=(1, -1)) == 2


@pytest.mark.parametrize("name", ["norms", "dots"])
def test_statistics_are_float64_and_of_the_whole(name):
    models = torch.randn(3, 4, 5)
    flat = models.reshape(3, -1).double()
    want = flat.norm(dim=1) if name == "norms" else flat @ flat.T
    got = parts.statistic(name, models, {})
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    assert parts.statistic(name, torch.zeros(2, 0), {}).sum() == 0
    scalars = parts.statistic(name, torch.tensor([3.0, -4.0]), {})
    assert scalars.tolist() == ([3, 4] if name == "norms" else [[9, -12], [-12, 16]])
