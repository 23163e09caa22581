"""PEFT's combinations: the conformance suite on products, what factors are refused for, and what they do wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import graftkit
import tiny
from graftkit.checkpoints.adapters import open_adapter
from graftkit.errors import CheckpointError, NonFiniteError, PlanError
from graftkit.testing import MethodConformance


class TestPeftLinear(MethodConformance):
    method = "peft_linear"
    knobs: ClassVar = {"of": "product"}


class TestPeftMagnitudePrune(MethodConformance):
    method = "peft_magnitude_prune"
    knobs: ClassVar = {"of": "product"}


class TestPeftTies(MethodConformance):
    method = "peft_ties"
    knobs: ClassVar = {"of": "product"}


class TestPeftDare(MethodConformance):
    method = "peft_dare"
    knobs: ClassVar = {"of": "product"}


class TestRobustMerge(MethodConformance):
    method = "robustmerge"
    knobs: ClassVar = {"of": "product"}


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"output": {}}, {}, "merges the factors of adapters into an adapter; say `output: {as: adapter}`"),
    ({}, {"rank": 3}, "merges factors of one rank, and the adapters have \\[3, 4\\]"),
    ({"output": {"as": "adapter", "rank": 4}}, {}, "keeps the adapters' own rank"),
]


@pytest.mark.parametrize(("recipe", "second", "message"), REFUSED)
def test_what_cannot_be_merged_factor_by_factor(
    tmp_path: Path, recipe: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    models = [str(tiny.adapter(tmp_path / "one", 1)), str(tiny.adapter(tmp_path / "two", 2, **second))]
    whole = {"method": "peft_linear", "base": str(base), "models": models, "output": {"as": "adapter"}} | recipe
    with pytest.raises(PlanError, match=message):
        graftkit.plan(whole)


def test_a_checkpoint_has_no_factors(tmp_path: Path) -> None:
    base, math, _ = tiny.family(tmp_path)
    models = [str(math), str(tiny.adapter(tmp_path / "one", 1))]
    recipe = {"method": "peft_linear", "base": str(base), "models": models, "output": {"as": "adapter"}}
    with pytest.raises(PlanError, match="not all models are plain LoRA"):
        graftkit.plan(recipe)


@pytest.mark.parametrize("method", ["peft_linear", "task_arithmetic"])
def test_a_broken_factor_is_refused_by_name(tmp_path: Path, method: str) -> None:
    one, two = tiny.adapter(tmp_path / "one", 1), tiny.adapter(tmp_path / "two", 2)
    tensors = load_file(two / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, two / "adapter_model.safetensors")
    recipe = {"method": method, "models": [str(one), str(two)], "output": {"as": "adapter"}}
    with pytest.raises(NonFiniteError, match="two.*holds NaN or infinity"):
        graftkit.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not multiply"):
        open_adapter(tiny.adapter(tmp_path / "one", 1, rank=0))


def test_turned_signs_cancel_by_factors_and_not_by_products(tmp_path: Path) -> None:
    """The same function written with both factors negated."""
    one = tiny.adapter(tmp_path / "one", 1)
    two = tiny.adapter(tmp_path / "two", 1)
    turned = {name: -tensor for name, tensor in load_file(one / "adapter_model.safetensors").items()}
    save_file(turned, two / "adapter_model.safetensors")
    norms = {}
    for method in ("peft_linear", "task_arithmetic"):
        recipe = {"method": method, "models": [{"model": str(m), "weight": 0.5} for m in (one, two)]}
        record = graftkit.merge({**recipe, "output": {"as": "adapter"}}, tmp_path / method)
        norms[method] = [tensor["delta_norm"] for tensor in record["tensors"]]
    assert np.max(norms["peft_linear"]) < 1e-6 < np.min(norms["task_arithmetic"])


@pytest.mark.parametrize("transposed", [False, True])
def test_robustmerge_is_what_its_formula_says(tmp_path: Path, transposed: bool) -> None:
    """Adapter by adapter in float64, in other words than the method's."""
    places = [tiny.adapter(tmp_path / f"a{seed}", seed, fan_in_fan_out=transposed) for seed in (1, 2, 3)]
    weights, density, scale, weakest = (1.0, 0.5, -0.7), 0.3, 1.5, 0.6
    models = [{"model": str(place), "weight": w} for place, w in zip(places, weights, strict=True)]
    knobs = {"density": density, "scale": scale, "weakest": weakest}
    graftkit.merge(
        {"method": "robustmerge", "models": models, "knobs": knobs, "output": {"as": "adapter"}}, tmp_path / "o"
    )
    found = load_file(tmp_path / "o" / "adapter_model.safetensors")
    held = [load_file(place / "adapter_model.safetensors") for place in places]
    for module in {name.rpartition(".lora_")[0] for name in found}:
        total_a, total_b, total_s = 0, 0, 0
        for own, weight in zip(held, weights, strict=True):
            a, b = (own[f"{module}.lora_{half}.weight"].astype(float) for half in "AB")
            kept_a, kept_b = (np.where(abs(h) >= np.sort(abs(h).ravel())[-int(density * h.size)], h, 0) for h in (a, b))
            left, root = abs(kept_a).sum(1), np.sqrt(abs(weight) * 2)
            s = np.divide(abs(a).sum(1), left, out=np.zeros_like(left), where=left > 0)
            s = np.maximum(s, np.quantile(s, weakest))
            total_a, total_b = total_a + root * np.sign(weight) * kept_a, total_b + root * s * kept_b
            total_s = total_s + s
        got_a, got_b = (found[f"{module}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(got_a, scale * total_a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got_b, scale * total_b / total_s, rtol=1e-5, atol=1e-7)
