"""Ours against the peers' numbers: equal where ours is meant to agree, and where it is not, a test that says why."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from graftkit import methods
from graftkit.methods import parts
from graftkit.methods.random import Keyed

HERE = Path(__file__).parent


class Oracle:
    """All cases of one peer."""

    def __init__(self, peer):
        self.about = json.loads((HERE / f"{peer}.json").read_text())
        with np.load(HERE / f"{peer}.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}

    def of(self, method):
        return [name for name, case in self.about["cases"].items() if case.get("method") == method]

    def parameters(self, case):
        return self.about["cases"][case]["params"]

    def input(self, case, name):
        return torch.from_numpy(self.arrays[f"{case}/in/{name}"])

    def models(self, case):
        return torch.stack([self.input(case, name) for name in self.about["cases"][case]["models"]])

    def check(self, case, got, name="out"):
        about, want = self.about["cases"][case], self.arrays[f"{case}/{name}"]
        assert got.shape == want.shape
        np.testing.assert_allclose(got.double().numpy(), want, rtol=about["rtol"], atol=about["atol"])


MERGEKIT, FUSION_BENCH, PEFT = Oracle("mergekit"), Oracle("fusion_bench"), Oracle("peft")


@pytest.mark.parametrize("case", MERGEKIT.of("linear"))
def test_average_is_mergekits_linear(case):
    models = MERGEKIT.models(case)
    if "bf16" in case:
        models = models.to(torch.bfloat16).to(torch.float32)
    merged = methods.get("average").run(models=models, **MERGEKIT.parameters(case))
    MERGEKIT.check(case, merged.to(torch.bfloat16) if "bf16" in case else merged)


@pytest.mark.parametrize("case", MERGEKIT.of("task_arithmetic"))
def test_task_arithmetic_is_mergekits(case):
    knobs = dict(MERGEKIT.parameters(case))
    knobs["scale"] = knobs.pop("lambda", 1.0)
    merged = methods.get("task_arithmetic").run(
        base=MERGEKIT.input(case, "base"), models=MERGEKIT.models(case), **knobs
    )
    MERGEKIT.check(case, merged)


def run_ties(case, **knobs):
    given = MERGEKIT.parameters(case)
    ours = {
        "weight": given["weight"],
        "density": given["density"],
        "scale": given.get("lambda", 1.0),
        "combine": "mean" if given.get("normalize", True) else "sum",
    }
    return methods.get("ties").run(base=MERGEKIT.input(case, "base"), models=MERGEKIT.models(case), **ours | knobs)


@pytest.mark.parametrize("case", MERGEKIT.of("ties"))
def test_ties_is_mergekits_when_weights_elect(case):
    """mergekit multiplies deltas by their weights before it elects signs; `weighted_election` does the same."""
    MERGEKIT.check(case, run_ties(case, weighted_election=True))


@pytest.mark.parametrize("case", [c for c in MERGEKIT.of("ties") if c != "ties_weighted"])
def test_ties_is_mergekits_for_equal_weights(case):
    """Equal positive weights elect what no weights elect."""
    MERGEKIT.check(case, run_ties(case, weighted_election=False))


def test_ties_elects_without_weights_by_default():
    """The paper elects on the trimmed deltas themselves: a weight says how much a model counts, not what is right."""
    ours, theirs = run_ties("ties_weighted"), torch.from_numpy(MERGEKIT.arrays["ties_weighted/out"])
    same = torch.isclose(ours, theirs, rtol=1e-6, atol=1e-6)
    weight = MERGEKIT.parameters("ties_weighted")["weight"]
    deltas = MERGEKIT.models("ties_weighted") - MERGEKIT.input("ties_weighted", "base")
    kept = parts.trim(deltas, parts.threshold_of(deltas, MERGEKIT.parameters("ties_weighted")["density"]))
    elected = [parts.weighted_sum(kept, votes) >= 0 for votes in (1.0, weight)]
    assert not bool(same.all())
    assert bool((same == (elected[0] == elected[1])).all())


def test_ties_keeps_at_least_one_entry_as_mergekit():
    """A density that rounds down to no entry keeps one, for a model that is listed is meant to count."""
    base, models = MERGEKIT.input("ties_tiny_density_keeps_one", "base"), MERGEKIT.models("ties_tiny_density_keeps_one")
    changed = run_ties("ties_tiny_density_keeps_one") != base
    assert 1 <= int(changed.sum()) <= len(models)
    assert parts.kept_count(0.001, base.numel()) == 1


def test_ties_counts_what_a_person_wrote():
    """mergekit's int(0.29 * 100) is 28, for the product is 28.999999999999996 in floats; ours is 29."""
    assert int(0.29 * 100) == 28
    assert parts.kept_count(0.29, 100) == 29


@pytest.mark.parametrize("case", [c for c in MERGEKIT.of("slerp") if c != "slerp_zero_base"])
def test_slerp_is_mergekits(case):
    pair = torch.stack([MERGEKIT.input(case, "base"), MERGEKIT.input(case, "m0")])
    MERGEKIT.check(case, methods.get("slerp").run(models=pair, t=MERGEKIT.parameters(case)["t"]))


def test_slerp_from_zero_is_a_straight_line():
    """A zero tensor has no direction. mergekit takes a right angle, by which the other model is not scaled by t but by
    sin(t pi/2): at t = 0.3 it would grow to 0.45; a straight line is what a path from zero can only be."""
    other, t = MERGEKIT.input("slerp_zero_base", "m0"), MERGEKIT.parameters("slerp_zero_base")["t"]
    ours = methods.get("slerp").run(models=torch.stack([torch.zeros_like(other), other]), t=t)
    np.testing.assert_allclose(ours, t * other, rtol=1e-6)
    MERGEKIT.check("slerp_zero_base", math.sin(t * math.pi / 2) * other)


def test_slerp_is_fusion_benchs():
    pair = torch.stack([FUSION_BENCH.input("slerp_t0.3", "v0"), FUSION_BENCH.input("slerp_t0.3", "v1")])
    FUSION_BENCH.check("slerp_t0.3", methods.get("slerp").run(models=pair, t=0.3))


@pytest.mark.parametrize("tensor", range(4))
def test_task_arithmetic_is_fusion_benchs(tensor):
    """Theirs holds its coefficient as a float32, so 0.3 is 0.30000001."""
    case, scale = "task_arithmetic_module_0.3", float(np.float32(0.3))
    models = torch.stack([FUSION_BENCH.input(case, f"m{k}_{tensor}") for k in range(2)])
    base = FUSION_BENCH.input(case, f"base{tensor}")
    merged = methods.get("task_arithmetic").run(base=base, models=models, scale=scale)
    FUSION_BENCH.check(case, merged, f"out{tensor}")


def run_ties_global(case, **knobs):
    """The whole model as one tensor. The authors' code keeps int(d * K) + 1 entries of d."""
    deltas = torch.stack([FUSION_BENCH.input(case, f"d{k}") for k in range(3)])
    elements = deltas.shape[1]
    kept = int(elements * FUSION_BENCH.parameters(case)["threshold_percent"] / 100) + 1
    base = torch.zeros_like(deltas[0])
    return methods.get("ties").run(base=base, models=deltas, density=kept / elements, scope="model", **knobs), deltas


@pytest.mark.parametrize("case", [c for c in FUSION_BENCH.about["cases"] if c.startswith("ties_global_K")])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_ties_is_the_authors_with_one_entry_more(case, scale):
    merged, _ = run_ties_global(case, combine=FUSION_BENCH.parameters(case)["merge_func"], scale=scale)
    FUSION_BENCH.check(case, merged / scale)


def test_ties_counts_one_entry_less_than_the_authors():
    """The paper keeps the top 20 %; of 200 entries that is 40, and 41 in the authors' code."""
    case = "ties_global_K20_mean"
    _, deltas = run_ties_global(case)
    assert parts.kept_count(0.2, deltas.shape[1]) == 40
    kept = parts.trim(deltas, parts.threshold_of(deltas, 0.2)) != 0
    assert kept.sum(dim=1).tolist() == [40, 40, 40]


def test_ties_elects_plus_where_the_sum_is_zero():
    """The authors give an exactly zero sum the sign that most entries of the model elected, which needs the whole model
    to merge one entry. Ours elects plus, as mergekit and PEFT do; everywhere else it is theirs, ties included."""
    case = "ties_global_ties_at_threshold"
    merged, deltas = run_ties_global(case)
    kept = parts.trim(deltas, parts.threshold_of(deltas, 5 / 8))
    undecided = kept.sum(dim=0) == 0
    want = torch.from_numpy(FUSION_BENCH.arrays[f"{case}/out"])
    assert undecided.any()
    assert (kept != 0).sum(dim=1).max() > 5, "the case is there for its ties"
    torch.testing.assert_close(merged[~undecided], want[~undecided])
    assert bool((merged[undecided] >= 0).all())


@pytest.mark.parametrize("factor", ["A", "B"])
def test_ties_divides_by_weights_and_peft_by_their_number(factor):
    """PEFT's mean divides by how many adapters agree, so that equal weights of 0.5 halve the result; ours divides by
    the sum of their weights. Numerators and election agree. (PEFT merges the factors; here they are only data.)"""
    scales = [adapter["alpha"] / adapter["r"] for adapter in PEFT.about["cases"]["ties"]["adapters"]]
    weight = [math.sqrt(w * s) for w, s in zip(PEFT.about["cases"]["ties"]["weights"], scales, strict=True)]
    deltas = torch.stack([PEFT.input("ties", f"{factor}{k}") for k in range(2)])
    knobs = {"weight": weight, "density": 0.5}
    base = torch.zeros_like(deltas[0])
    total = methods.get("ties").run(base=base, models=deltas, combine="sum", **knobs)
    mean = methods.get("ties").run(base=base, models=deltas, combine="mean", **knobs)
    kept = parts.trim(deltas, parts.threshold_of(deltas, 0.5))
    agrees = torch.sign(kept) == torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    PEFT.check("ties", total / agrees.sum(dim=0).clamp(min=1), factor)
    shares = (torch.tensor(weight, dtype=torch.float64)[:, None, None] * agrees).sum(dim=0)
    torch.testing.assert_close(mean * shares, total)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_dare_has_mergekits_properties_but_for_the_factor(density):
    """Each entry is kept with probability `density`, as mergekit's. It rescales what is kept by one ratio of L1 norms
    per tensor, which keeps the norm and biases small tensors; ours divides by the density, whatever was drawn."""
    about = MERGEKIT.about["random_properties"][f"dare_linear_rescale_density{density}"]
    deltas = torch.randn(1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    base = torch.zeros(64, 64, dtype=torch.float64)
    fractions = []
    for seed in range(20):
        merged = methods.get("dare").run(base=base, models=deltas, rng=Keyed.of(seed=seed, models=1), density=density)
        kept = merged != 0
        fractions.append(float(kept.double().mean()))
        torch.testing.assert_close(merged[kept], deltas[0][kept] / density, rtol=1e-15, atol=0)
        assert abs(float(merged.abs().sum() / deltas.abs().sum()) - 1) > 1e-7, "the L1 norm was matched"
    spread = 5 * math.sqrt(density * (1 - density) / deltas.numel())
    assert all(abs(fraction - density) < spread for fraction in fractions)
    assert abs(np.mean(fractions) - about["kept_fraction_mean"]) < 2 * spread / math.sqrt(20)
