"""Masks, sparse deltas and competition: the conformance suite, the float64 references, and what they are for."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit import methods
from graftkit.execution import blocks
from graftkit.execution.blocks import Reader, Workspace
from graftkit.execution.reductions import statistics_of
from graftkit.methods.preparations import keep_probability
from graftkit.methods.random import Keyed
from graftkit.testing import MethodConformance
from reference import cases as inputs
from reference import competition, masks, sparse


class TestNearswap(MethodConformance):
    method = "nearswap"


class TestRam(MethodConformance):
    method = "ram"
    knobs: ClassVar = {"epsilon": 0.05, "r": 0.5}


class TestConsensusTa(MethodConformance):
    method = "consensus_ta"


class TestLocalizeAndStitch(MethodConformance):
    method = "localize_and_stitch"
    knobs: ClassVar = {"scope": "tensor", "density": 0.3}


class TestArceeFusion(MethodConformance):
    method = "arcee_fusion"


class TestBreadcrumbs(MethodConformance):
    method = "breadcrumbs"
    knobs: ClassVar = {"density": 0.5, "outliers": 0.1}


class TestDella(MethodConformance):
    method = "della"


class TestSce(MethodConformance):
    method = "sce"
    knobs: ClassVar = {"select_topk": 0.5}


class TestPcb(MethodConformance):
    method = "pcb"
    knobs: ClassVar = {"density": 0.3}


PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCALES = st.sampled_from([0.0, 0.3, 1.0, 2.0])


def run(name, case, rng=None, **knobs):
    tensors = {"base": torch.tensor(case.base), "models": torch.tensor(case.models)}
    return methods.get(name).run(**tensors, rng=rng, **knobs).numpy()


def assert_equal(got, want, case, gain=1.0):
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12 * case.largest * max(gain, 1.0))


@PROPERTY
@given(inputs.cases(st.just(1)), st.sampled_from([0.0, 0.01, 0.5, 3.0, 1e9]))
def test_nearswap_is_its_reference(case, t):
    assert_equal(run("nearswap", case, t=t), masks.nearswap(case.base, case.models[0], t), case)


@PROPERTY
@given(inputs.cases(), st.sampled_from([0.0, 0.05, 0.5]), st.sampled_from([0.0, 0.1]), st.sampled_from([0.2, 5.0]))
def test_ram_is_its_reference(case, epsilon, r, alpha):
    got = run("ram", case, epsilon=epsilon, r=r, alpha=alpha)
    assert_equal(got, masks.ram(case.base, case.models, epsilon, r, alpha), case)


@PROPERTY
@given(st.data())
def test_consensus_ta_is_its_reference(data):
    case = data.draw(inputs.cases())
    knobs = {
        "weight": data.draw(inputs.eighths(case.count)),
        "scale": data.draw(SCALES),
        "selectivity": data.draw(
            st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=case.count, max_size=case.count)
        ),
        "agreement": data.draw(st.integers(0, 5)),
    }
    assert_equal(run("consensus_ta", case, **knobs), masks.consensus_ta(case.base, case.models, **knobs), case, 20)


@PROPERTY
@given(st.data())
def test_localize_and_stitch_is_its_reference(data):
    case = data.draw(inputs.cases())
    knobs = {"density": data.draw(inputs.densities(case.count)), "weight": data.draw(inputs.decimals(case.count))}
    got = run("localize_and_stitch", case, scope="tensor", scale=0.3, **knobs)
    assert_equal(got, masks.localize_and_stitch(case.base, case.models, scale=0.3, **knobs), case)


@PROPERTY
@given(st.integers(0, 10_000), st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (300, 300)]))
def test_arcee_fusion_is_its_reference(seed, shape):
    draw = np.random.default_rng(seed)
    base = draw.standard_normal(shape)
    case = inputs.Case(base, (base + 0.3 * draw.standard_normal(shape))[None])
    assert_equal(run("arcee_fusion", case), masks.arcee_fusion(case.base, case.models[0]), case)


@st.composite
def votes(draw):
    return {
        "scale": draw(SCALES),
        "elect": draw(st.sampled_from(["none", "sign"])),
        "normalize": draw(st.booleans()),
        "combine": draw(st.sampled_from(["mean", "sum"])),
        "weighted_election": draw(st.booleans()),
    }


@PROPERTY
@given(st.data(), votes())
def test_breadcrumbs_is_its_reference(data, options):
    case = data.draw(inputs.cases())
    knobs = {name: data.draw(inputs.densities(case.count)) for name in ("density", "outliers")}
    knobs["weight"] = data.draw(inputs.eighths(case.count))
    knobs["rescale"] = options["elect"] == "none" and data.draw(st.booleans())  # scaled votes may tie but for rounding
    assume(not options["normalize"] or abs(sum(knobs["weight"])) > 0.05)
    got = run("breadcrumbs", case, **knobs, **options)
    assert_equal(got, sparse.breadcrumbs(case.base, case.models, **knobs, **options), case, 40 * case.count)


@PROPERTY
@given(st.data(), votes(), st.booleans())
def test_della_is_its_reference(data, options, rescale):
    case = data.draw(inputs.cases())
    knobs = {"density": data.draw(inputs.densities(case.count)), "weight": data.draw(inputs.eighths(case.count))}
    windows = st.lists(st.sampled_from([0.0, 0.05, 0.15, 0.5]), min_size=case.count, max_size=case.count)
    knobs |= {"epsilon": data.draw(windows), "rescale": rescale}
    knobs["rescale_by"] = data.draw(st.sampled_from(["chance", "l1"]))
    assume(not options["normalize"] or abs(sum(knobs["weight"])) > 0.05)
    rng = Keyed.of(seed=data.draw(st.integers(0, 9)), models=case.count)
    uniform = rng.uniform(torch.tensor(case.models)).numpy()
    want = sparse.della(case.base, case.models, uniform, **knobs, **options)
    if options["elect"] == "sign":
        assume(not rescale)  # divided entries may sum to nearly zero: then rounding elects
    assert_equal(run("della", case, rng, **knobs, **options), want, case, 1e3 * 40 * case.count)


@PROPERTY
@given(inputs.cases(), st.sampled_from([0.0, 0.01, 0.29, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.01, 100.0]))
def test_sce_is_its_reference(case, share, floor):
    spread = np.array(np.std(case.models - case.base, axis=0), np.float32)
    ranked = np.sort(spread[spread > 0])
    assume(not (np.diff(ranked) < 1e-5 * ranked[1:]).any() or share == 1)  # rounding breaks the ties of two formulas
    want = competition.sce(case.base, case.models, share, floor=floor)
    assert_equal(run("sce", case, select_topk=share, floor=floor), want, case, 10)


@PROPERTY
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.29, 1.0]))
def test_pcb_is_its_reference(seed, count, density):
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((9, 31))
    case = inputs.Case(base, base + 0.1 * draw.standard_normal((count, 9, 31)))
    weight = [1.2, 1.0, 0.8, 1.3][:count]
    got = run("pcb", case, weight=weight, density=density)
    assert_equal(got, competition.pcb(case.base, case.models, weight, density), case, 100)


# What they are for, in numbers


def merged(name, deltas, **knobs):
    models = torch.tensor(deltas, dtype=torch.float64)
    return methods.get(name).run(base=torch.zeros_like(models[0]), models=models, **knobs).tolist()


def test_worked_examples():
    assert merged("consensus_ta", [2.0, -1.0], selectivity=0.5) == 0
    assert merged("consensus_ta", [2.0, -1.0], selectivity=0.5, agreement=1) == 1
    assert merged("sce", [[1.0, 0], [3, -1]]) == pytest.approx([31 / 11, -1])
    tenths = [float(k) for k in (10, -9, 8, 7, -6, 5, 4, 3, 2, 1)]
    kept = [0, -9, 8, 7, -6, 5, 4, 0, 0, 0]
    assert merged("breadcrumbs", [tenths], density=0.6, outliers=0.1) == kept
    assert merged("nearswap", [[0.5, -3.0, 0]], t=1) == [0.5, -1, 0]
    assert merged("ram", [[1.0, 2, 0], [0, 4, 0]], epsilon=0) == [1, 3, 0]
    assert merged("ram", [[1.0, 2, 0], [0, 4, 0]], epsilon=0, r=0.5, alpha=2) == [1.5, 3, 0]
    assert merged("localize_and_stitch", [[4.0, 1], [2, 6]], density=0.5, scope="tensor") == [4, 6]
    assert merged("localize_and_stitch", [[4.0, 1], [6, 2]], density=0.5, scope="tensor") == [5, 0]


def test_consensus_ends():
    """No agreement needed: task arithmetic. More than there are models: the base."""
    deltas = np.random.default_rng(0).standard_normal((3, 50)).tolist()
    assert merged("consensus_ta", deltas, agreement=0) == pytest.approx(merged("task_arithmetic", deltas))
    assert merged("consensus_ta", deltas, agreement=4) == [0] * 50


def test_breadcrumbs_without_outliers_trim_as_ties():
    deltas = np.random.default_rng(1).standard_normal((3, 50)).tolist()
    knobs = {"elect": "sign", "outliers": 0, "density": 0.3}
    assert merged("breadcrumbs", deltas, **knobs) == pytest.approx(merged("ties", deltas, density=0.3))


def test_della_without_a_window_is_dare():
    rng = Keyed.of(seed=3, models=3)
    deltas = np.random.default_rng(2).standard_normal((3, 6, 50)).tolist()
    dare = merged("dare", deltas, rng=rng, density=0.3)
    np.testing.assert_allclose(merged("della", deltas, rng=rng, density=0.3, epsilon=0, elect="none"), dare)


def test_della_keeps_its_density_and_prefers_the_large():
    deltas = torch.randn(1, 64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chance = keep_probability(deltas, 0.3, 0.1)
    assert float(chance.mean()) == pytest.approx(0.3)
    assert (float(chance.min()), float(chance.max())) == pytest.approx((0.2, 0.4))
    largest = deltas[0].abs().argmax(dim=-1)
    assert bool((chance[0, range(64), largest] == chance.max()).all())
    mean = sum(
        methods.get("della").run(base=deltas[0] * 0, models=deltas, rng=Keyed.of(seed=k, models=1), density=0.3)
        for k in range(200)
    )
    spread = float(((mean / 200 - deltas[0]) / deltas[0]).square().mean().sqrt())
    assert spread == pytest.approx((0.7 / 0.3 / 200) ** 0.5, rel=0.1), "the expected delta is the full one"


def test_della_narrows_a_window_that_leaves_the_range():
    """At the ends of the density nothing is left to chance."""
    deltas = torch.randn(1, 3, 20, dtype=torch.float64)
    for density in (0.0, 1.0):
        assert bool((keep_probability(deltas, density, 0.5) == density).all())
    chance = keep_probability(deltas, 0.1, 0.15)
    assert (float(chance.min()), float(chance.max())) == pytest.approx((0.0, 0.2))


def test_sce_weighs_small_deltas_by_their_energies():
    """mergekit 0.1.5 takes mean squares whose sum is below 1e-6 for zero and weighs all alike: (1e-4 + 3e-4) / 2."""
    assert merged("sce", [[1e-4, 0], [3e-4, -1e-4]]) == pytest.approx([31e-4 / 11, -1e-4])


def test_sce_of_equal_models_below_one_is_the_base():
    """They have no variance to select by; with all positions selected they are what they were."""
    deltas = [[1.0, -2, 3]] * 3
    assert merged("sce", deltas, select_topk=0.99) == [0, 0, 0]
    assert merged("sce", deltas) == pytest.approx(deltas[0])


def test_one_model_competes_with_itself():
    """Equal magnitudes all win; a model of zeros leaves the others alone."""
    assert merged("pcb", [[1.0, -1, 1]], weight=1, density=1) == [1, -1, 1]
    signal = np.random.default_rng(4).standard_normal(200).tolist()
    alone = merged("pcb", [signal, [0.0] * 200], density=0.2)
    assert sum(x != 0 for x in alone) == pytest.approx(40, abs=2)


def test_arcee_fusion_takes_what_mattered():
    """The row whose softmax moved is taken over; one that moved further, but all of it alike, is left alone."""
    source = torch.Generator().manual_seed(0)
    base = torch.randn(40, 10, dtype=torch.float64, generator=source)
    model = base + 0.01 * torch.randn(40, 10, dtype=torch.float64, generator=source)
    model[3] += torch.arange(10)
    model[5] = base[5] + 20
    merged = methods.get("arcee_fusion").run(base=base, models=model[None])
    torch.testing.assert_close(merged[3, 1:], model[3, 1:])
    torch.testing.assert_close(merged[5], base[5])


def test_arcee_fusion_takes_all_where_next_to_nothing_matters():
    """Three quarters of the entries unchanged: the threshold is 0, which all of them reach, as in mergekit."""
    base = torch.randn(8, 10, dtype=torch.float64)
    model = base.clone()
    model[3] += torch.arange(10)
    torch.testing.assert_close(methods.get("arcee_fusion").run(base=base, models=model[None]), model)


# Through files: statistics made in blocks are those of the whole tensor


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        *(("breadcrumbs", {"density": d, "outliers": o}) for d in (0.0, 0.3, 1.0) for o in (0.0, 0.05, 1.0)),
        *(("sce", {"select_topk": share}) for share in (0.0, 0.001, 0.2, 0.9, 1.0)),
        *((name, {"rescale": rescale}) for name in ("ties", "breadcrumbs") for rescale in (False, True)),
        *((name, {"rescale_by": by}) for name in ("dare", "della") for by in ("chance", "l1")),
        *(("ram", {"epsilon": epsilon}) for epsilon in (0.0, 0.01)),
    ],
)
def test_block_wise_statistics_are_those_of_the_tensor(tmp_path, small_blocks, dtype, name, knobs):
    family = tiny.family(tmp_path, dtype=dtype)
    recipe = {"method": name, "base": str(family[0]), "models": [str(path) for path in family[1:]], "knobs": knobs}
    planned, method = graftkit.plan(recipe), methods.get(name)
    base, *tuned = (load_file(path / "model.safetensors") for path in family)
    for step in planned.steps:
        # as the engine computes: in float64 for a float32 output
        wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
        deltas = torch.stack([model[step.name].to(wide) - base[step.name].to(wide) for model in tuned])
        found, _ = statistics_of(method, step.knobs, Reader(step, planned.sources, Workspace()), None)
        wanted = method.measured({"deltas": deltas, "rng": Keyed(step.keys)}, step.knobs)
        for statistic, got in found.items():
            want = wanted[statistic].numpy()
            if statistic in ("energies", "retained"):
                np.testing.assert_allclose(got, want, rtol=1e-12)
            else:
                np.testing.assert_array_equal(got, want, err_msg=f"{statistic} of {step.name}")


def test_localize_and_stitch_counts_over_the_whole_model(tmp_path, small_blocks):
    family = tiny.family(tmp_path, dtype=torch.float32)
    recipe = {"method": "localize_and_stitch", "base": str(family[0]), "models": [str(path) for path in family[1:]]}
    graftkit.merge(recipe, tmp_path / "out", workers=2)
    base, *tuned = (load_file(path / "model.safetensors") for path in family)
    wide = [[weights[name].double().numpy() for name in base] for weights in (base, *tuned)]
    want = masks.localize_and_stitch_model(wide[0], wide[1:], [1.0] * 2, [0.05] * 2, 1.0)
    got = load_file(tmp_path / "out" / "model.safetensors")
    changed = sum(int((got[name] != base[name]).sum()) for name in base)
    assert changed <= 2 * 0.05 * sum(weights.numel() for weights in base.values()) + 2
    for name, tensor in zip(base, want, strict=True):
        np.testing.assert_allclose(got[name], tensor, rtol=1e-6, atol=1e-9)


# Where they differ from the peers on purpose


def test_breadcrumbs_keep_what_ties_at_either_end():
    """Deltas of bfloat16 models tie often; which of the equal ones to drop would be chance."""
    assert merged("breadcrumbs", [[3.0, 3, -2, 2, 2, 1, -1, 0.5, 0.5, 0.5]], density=0.5, outliers=0.1) == [
        *(3, 3, -2, 2, 2, 1, -1),
        *(0, 0, 0),
    ]


def test_nearswap_moves_by_t_however_small():
    """mergekit divides t by 1e-6 at least: at t = 1e-7 it moves a difference of 5e-7 by 5e-8 only."""
    assert merged("nearswap", [[5e-7, -1e-3, 5e-8]], t=1e-7) == [1e-7, -1e-7, 5e-8]


@pytest.mark.parametrize("name", ["pcb", "sce", "consensus_ta", "breadcrumbs", "arcee_fusion"])
def test_they_scale_with_the_deltas_however_small(name):
    """PCB's other published form, of deltas as they are, is not of this kind; nor is SCE with a floor on energies."""
    count = methods.get(name).model_count[1] or 3
    deltas = np.random.default_rng(5).standard_normal((count, 20, 10))
    base = torch.zeros(20, 10, dtype=torch.float64)
    small, whole = (
        methods.get(name).run(base=base, models=torch.tensor(scale * deltas)) / scale for scale in (1e-4, 1e-2)
    )
    assert bool((whole != 0).any())
    if name == "arcee_fusion":  # a divergence grows with the square of a small step, and by little else
        assert float(((small != 0) == (whole != 0)).double().mean()) > 0.95
    else:
        torch.testing.assert_close(small, whole)
