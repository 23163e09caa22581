"""Model Stock, Karcher, multislerp and nuslerp against the peers' numbers."""

from __future__ import annotations

import pytest
import torch
from test_oracles import FUSION_BENCH, MERGEKIT

from graftkit import methods


def run(name, case, **knobs):
    about = MERGEKIT.about["cases"][case]
    base = MERGEKIT.input(case, "base") if about["base"] else None
    return methods.get(name).run(base=base, models=MERGEKIT.models(case), **knobs)


@pytest.mark.parametrize("case", ["model_stock_n2", "model_stock_correlated", "model_stock_identical_experts"])
def test_model_stock_is_mergekits(case):
    MERGEKIT.check(case, run("model_stock", case))


def mergekits_rows(case):
    """Theirs for every row, by the formula that it follows: a negative share goes beyond the base."""
    base, models = MERGEKIT.input(case, "base").double(), MERGEKIT.models(case).double()
    deltas = (models - base).transpose(0, 1)  # [rows, models, in]
    unit = deltas / deltas.norm(dim=-1, keepdim=True)
    count = len(models)
    cosine = ((unit.sum(dim=1).square().sum(dim=-1) - count) / (count * (count - 1)))[:, None]
    share = count * cosine / (1 + (count - 1) * cosine)
    return base + share * deltas.mean(dim=1), cosine


def test_model_stock_by_rows_is_mergekits_filter_wise_where_models_agree():
    case = "model_stock_rowwise"
    theirs, cosine = mergekits_rows(case)
    MERGEKIT.check(case, theirs)
    ours = run("model_stock_rows", case).double()
    agrees = (cosine > 0).expand_as(ours)
    assert 0 < int(agrees.sum()) < ours.numel()
    torch.testing.assert_close(ours[agrees], theirs[agrees], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[~agrees], MERGEKIT.input(case, "base").double()[~agrees])


def test_model_stock_stops_at_the_base():
    """Three deltas with a mean cosine of -0.01: the formula's share is -0.03, a step away from all three models.
    The paper draws the mean towards the base between the two, so ours stops at the base."""
    base = MERGEKIT.input("model_stock_n3", "base")
    theirs, mean = MERGEKIT.arrays["model_stock_n3/out"] - base.numpy(), MERGEKIT.models("model_stock_n3") - base
    assert float((torch.from_numpy(theirs) * mean.mean(dim=0)).sum()) < 0
    torch.testing.assert_close(run("model_stock", "model_stock_n3"), base)


def test_model_stock_is_fusion_benchs():
    """For two models; for more, theirs averages the angles, ours the cosines, as the paper's formula has it."""
    case = "model_stock_n2"
    models = torch.stack([FUSION_BENCH.input(case, f"m{k}") for k in range(2)])
    FUSION_BENCH.check(case, methods.get("model_stock").run(base=FUSION_BENCH.input(case, "base"), models=models))


@pytest.mark.parametrize("case", MERGEKIT.of("karcher"))
def test_karcher_is_mergekits_where_that_stops(case):
    """Theirs stops at steps below 1e-5, or after ten; ours goes on until it stands still, by 1e-5 in these cases."""
    stopped = run("karcher", case, iterations=10, tolerance=1e-5)
    MERGEKIT.check(case, stopped)
    torch.testing.assert_close(run("karcher", case), stopped, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", MERGEKIT.of("multislerp"))
def test_multislerp_is_mergekits(case):
    """Without the step in the tangent space that theirs takes: in exact arithmetic its length is zero."""
    given = MERGEKIT.parameters(case)
    knobs = {"weight": given["weight"], "normalize": given.get("normalize_weights", True)}
    MERGEKIT.check(case, run("multislerp", case, **knobs))


@pytest.mark.parametrize("case", ["nuslerp_flat", "nuslerp_task_vector"])
def test_nuslerp_is_mergekits(case):
    MERGEKIT.check(case, run("nuslerp", case, weight=MERGEKIT.parameters(case)["weight"]))


@pytest.mark.parametrize(("case", "axis"), [("nuslerp_lastdim", 0), ("nuslerp_rowwise", 1)])
def test_nuslerp_of_a_row_or_column_is_mergekits(case, axis):
    """Ours takes whole tensors; theirs can take each row, or each column, by itself, which is ours on that part."""
    pairs = MERGEKIT.models(case).unbind(axis + 1)
    made = [methods.get("nuslerp").run(models=pair, weight=MERGEKIT.parameters(case)["weight"]) for pair in pairs]
    MERGEKIT.check(case, torch.stack(made, dim=axis))
