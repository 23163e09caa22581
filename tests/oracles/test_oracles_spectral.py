"""TSV-M, isotropic merging, KnOTS and WUDI against fusion-bench's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_oracles import Oracle

from graftkit.methods import decomposition, get

SPECTRAL = Oracle("fusion_bench_spectral")


def cases(*prefixes):
    return [case for case in SPECTRAL.about["cases"] if case.startswith(prefixes)]


def deltas(case):
    return torch.stack([SPECTRAL.input(case, name) for name in SPECTRAL.about["cases"][case]["inputs"]])


def run(name, case, **knobs):
    stack = deltas(case)
    return get(name).run(base=torch.zeros_like(stack[0]), models=stack, **knobs)


@pytest.mark.parametrize("case", cases("wudi"))
def test_wudi_by_adam_is_fusion_benchs(case):
    given = SPECTRAL.parameters(case)
    SPECTRAL.check(case, run("wudi", case, solver="adam", steps=given["iter_num"], learning_rate=given["lr"]))


@pytest.mark.parametrize("case", cases("tsvm"))
def test_tsv_is_fusion_benchs(case):
    SPECTRAL.check(case, run("tsv", case))


@pytest.mark.parametrize("case", cases("iso_c_"))
def test_iso_c_is_fusion_benchs(case):
    SPECTRAL.check(case, run("iso_c", case))


@pytest.mark.parametrize("case", cases("iso_cts"))
def test_iso_cts_is_fusion_benchs(case):
    SPECTRAL.check(case, run("iso_cts", case, common=SPECTRAL.parameters(case)["common_space_fraction"]))


def test_the_directions_of_knots_are_fusion_benchs():
    """Up to a sign for each of them: sizes, and what the deltas are in them."""
    case = "knots_alignment"
    stack = deltas(case)
    found = decomposition.spectrum(torch.cat(list(stack), dim=1))
    SPECTRAL.check(case, found.sizes, "S")
    theirs = torch.from_numpy(SPECTRAL.arrays[f"{case}/U"])
    signs = (theirs * found.left).sum(dim=0).sign()
    SPECTRAL.check(case, found.left * signs, "U")


def test_knots_is_fusion_benchs():
    """Theirs keeps one entry more than the share rounded down."""
    case = "knots_ties_K50"
    entries = deltas(case)[0].numel()
    share = SPECTRAL.parameters(case)["threshold_percent"] / 100
    SPECTRAL.check(case, run("knots", case, density=(entries - int(entries * (1 - share)) + 1) / entries))
    assert np.abs(run("knots", case, density=share).numpy() - SPECTRAL.arrays[f"{case}/out"]).max() > 1e-3
