"""Finishers and unified models against the peers' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_oracles import FUSION_BENCH, Oracle

from graftkit.methods import composition, get

COMPOSITION = Oracle("fusion_bench_composition")


def test_svc_is_fusion_benchs():
    deltas = torch.stack([COMPOSITION.input("svc_ta_sum", f"d{k}") for k in range(3)])
    base, merged = (COMPOSITION.input("svc_ta_sum", name) for name in ("base", "merged"))
    found = composition.finished(merged - base, deltas, [("svc", COMPOSITION.parameters("svc_ta_sum"))])
    COMPOSITION.check("svc_ta_sum", base + found)


def test_emr_is_fusion_benchs():
    """Unified deltas, masks, and the scales of the authors' code, which sums the tensors' means."""
    own, kept = np.zeros(3), np.zeros(3)
    for name in "ab":
        deltas = torch.stack([COMPOSITION.input("emr", f"{name}{k}") for k in range(3)])
        unified = get("emr").function(deltas)
        COMPOSITION.check("emr", unified, f"unified_{name}")
        for k, mask in enumerate(get("emr").masked(deltas, unified, {})):
            COMPOSITION.check("emr", mask, f"mask_{name}{k}")
            own[k] += float(deltas[k].abs().mean())
            kept[k] += float((mask * unified).abs().mean())
    COMPOSITION.check("emr", torch.from_numpy(own / kept), "rescalers")


@pytest.mark.parametrize("case", [c for c in FUSION_BENCH.about["cases"] if c.startswith("tall_mask")])
def test_tall_masks_are_fusion_benchs(case):
    deltas = torch.stack([FUSION_BENCH.input(case, f"d{k}") for k in range(4)])
    merged = get("tall").function(deltas)
    masks = get("tall").masked(deltas, merged, {"selectivity": FUSION_BENCH.parameters(case)["tall_mask_lambda"]})
    FUSION_BENCH.check(case, masks, "masks")
