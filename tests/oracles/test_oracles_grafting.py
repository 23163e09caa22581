"""Graft's entropies, global gate and fusion against filter grafting's and CKI's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_oracles import Oracle

from graftkit.methods.graft import fuse, graft_weights
from graftkit.methods.signals import signals_of

GRAFTING = Oracle("grafting")
ENTROPIES = [case for case in GRAFTING.about["cases"] if f"{case}/entropy_base" in GRAFTING.arrays]
FUSIONS = ["fuse", "fuse_swapped"]


def pair(case):
    """Base and graft as one matrix each: a vector becomes a row, for vectors have no signal."""
    found = [GRAFTING.input(case, name) for name in ("base", "graft")]
    return torch.stack([one if one.ndim > 1 else one[None] for one in found])


def entropies(case, last_bin):
    return signals_of(pair(case), {"global_signal": "entropy", "bins": 10, "last_bin": last_bin})


@pytest.mark.parametrize("case", ENTROPIES)
@pytest.mark.parametrize(("last_bin", "key", "close"), [("open", "entropy", 1e-6), ("closed", "entropy_closed", 1e-9)])
def test_entropies_are_theirs_and_numpys(case, last_bin, key, close):
    """Theirs adds in float32, numpy's and ours in float64."""
    wanted = [GRAFTING.arrays[f"{case}/{key}_{name}"] for name in ("base", "graft")]
    np.testing.assert_allclose(entropies(case, last_bin).numpy(), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("case", ENTROPIES)
@pytest.mark.parametrize(("normaliser", "key"), [("pi", "w_global_a_over_pi"), ("c", "w_global_a_over_c")])
def test_the_global_gate_is_theirs(case, normaliser, key):
    """Read off the weights of channels whose local gates are so strong that only g is left of u."""
    signals, gates = entropies(case, "open"), torch.full((2, 1, 1), 1e9, dtype=torch.float64)
    weights = graft_weights(signals, gates, normaliser=normaliser)
    share = 0.5 + 0.5 * torch.log(weights[0] / weights[1])  # softmax of g and 1 - g
    np.testing.assert_allclose(share.item(), GRAFTING.arrays[f"{case}/{key}"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", FUSIONS)
def test_the_fusion_is_ckis_recommendation_rule(case):
    """A gate for each element, as theirs has; it is the rule that the paper prints."""
    local = torch.from_numpy(GRAFTING.arrays[f"{case}/w_local"]).double()
    signals = entropies(case, "open")
    fused = fuse(pair(case).double(), graft_weights(signals, torch.stack([local, 1 - local])))
    GRAFTING.check(case, fused, "recommendation")


@pytest.mark.parametrize("case", FUSIONS)
def test_the_fusion_is_not_ckis_language_rule(case):
    """There a higher entropy of the base lowers the base's weight, against the paper's words and formula."""
    local = torch.from_numpy(GRAFTING.arrays[f"{case}/w_local"]).double()
    fused = fuse(pair(case).double(), graft_weights(entropies(case, "open"), torch.stack([local, 1 - local])))
    assert np.abs(fused.numpy() - GRAFTING.arrays[f"{case}/language"]).max() > 1e-3
