"""Sparse deltas, masks and competition against the peers' numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_oracles import FUSION_BENCH, MERGEKIT

from graftkit import methods
from graftkit.methods.random import Keyed


def run(name, case, **knobs):
    return methods.get(name).run(base=MERGEKIT.input(case, "base"), models=MERGEKIT.models(case), **knobs)


def crumbs(case):
    given = MERGEKIT.parameters(case)
    return {"weight": given["weight"], "density": given["density"], "outliers": given["gamma"]}


@pytest.mark.parametrize("case", ["breadcrumbs", "breadcrumbs_gamma_clipped"])
def test_breadcrumbs_is_mergekits(case):
    MERGEKIT.check(case, run("breadcrumbs", case, **crumbs(case)))


def test_breadcrumbs_with_election_is_mergekits():
    """Theirs sums what agrees, and counts weights in the election."""
    options = {"elect": "sign", "combine": "sum", "weighted_election": True}
    MERGEKIT.check("breadcrumbs_ties", run("breadcrumbs", "breadcrumbs_ties", **crumbs("breadcrumbs_ties"), **options))


@pytest.mark.parametrize("case", MERGEKIT.of("sce"))
def test_sce_is_mergekits(case):
    MERGEKIT.check(case, run("sce", case, **MERGEKIT.parameters(case)))


def test_nearswap_is_mergekits():
    MERGEKIT.check("nearswap", run("nearswap", "nearswap", **MERGEKIT.parameters("nearswap")))


@pytest.mark.parametrize("case", ["ram", "ramplus_tl"])
def test_ram_is_mergekits(case):
    MERGEKIT.check(case, run("ram", case, **MERGEKIT.parameters(case)))


def test_arcee_fusion_is_mergekits():
    MERGEKIT.check("arcee_fusion", run("arcee_fusion", "arcee_fusion"))


@pytest.mark.parametrize("case", [c for c in FUSION_BENCH.about["cases"] if c.startswith("tall_mask")])
def test_consensus_ta_is_fusion_benchs(case):
    given = FUSION_BENCH.parameters(case)
    base = FUSION_BENCH.input(case, "base")
    models = base + torch.stack([FUSION_BENCH.input(case, f"d{k}") for k in range(4)])
    knobs = {"selectivity": given["tall_mask_lambda"], "agreement": given["prun_thre_k"], "scale": given["scaling"]}
    FUSION_BENCH.check(case, methods.get("consensus_ta").run(base=base, models=models, **knobs), "consensus_ta_0.3")


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_della_has_mergekits_properties_but_for_the_factor(density):
    """Kept fractions of the smallest and the largest quarter of each row are theirs. Each entry kept is divided by its
    own probability, so that the mean is the delta; theirs by one ratio of L1 norms for the tensor."""
    about = MERGEKIT.about["random_properties"][f"della_linear_norescale_density{density}_eps0.05"]
    deltas = torch.randn(1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rank = deltas[0].abs().argsort(dim=-1).argsort(dim=-1)
    kept = torch.zeros_like(deltas[0])
    for seed in range(20):
        knobs = {"density": density, "epsilon": 0.05, "elect": "none"}
        rng = Keyed.of(seed=seed, models=1)
        merged = methods.get("della").run(base=kept * 0, models=deltas, rng=rng, **knobs)
        chosen = merged != 0
        kept += chosen
        chance = density - 0.05 + 0.1 * rank[chosen] / 63
        torch.testing.assert_close(merged[chosen], deltas[0][chosen] / chance)
    spread = 5 * math.sqrt(density * (1 - density) / (20 * deltas.numel()))
    assert abs(float(kept.mean()) / 20 - about["kept_fraction_mean"]) < 2 * spread
    for key, quarter in (("smallest", rank < 16), ("largest", rank >= 48)):
        assert abs(float(kept[quarter].mean()) / 20 - about[f"keep_prob_{key}_quarter"]) < 4 * spread


def test_della_takes_columns_of_one_entry():
    """mergekit 0.1.5 divides by n - 1 = 0 there, and fails on the probability that is not a number."""
    deltas = torch.ones(1, 400, 1, dtype=torch.float64)
    rng = Keyed.of(seed=0, models=1)
    merged = methods.get("della").run(base=deltas[0] * 0, models=deltas, rng=rng, density=0.5)
    assert set(np.unique(merged)) == {0.0, 2.0}
