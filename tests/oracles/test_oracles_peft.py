"""Merges of adapters against PEFT's numbers: equal, product by product, but where PEFT is wrong (rsLoRA)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_oracles import PEFT

import graftkit

MODULE = "base_model.model.layers.0.mlp.up_proj"
TYPES: dict[str, dict[str, Any]] = {
    "linear": {"method": "peft_linear"},
    "cat": {"method": "task_arithmetic", "output": {"as": "adapter", "rank": "exact"}},
    "svd": {"method": "task_arithmetic"},
    "ties": {"method": "peft_ties"},
    "ties_svd": {"method": "peft_ties", "knobs": {"of": "product"}},
    "magnitude_prune": {"method": "peft_magnitude_prune"},
    "magnitude_prune_svd": {"method": "peft_magnitude_prune", "knobs": {"of": "product"}},
}
MERGES = [name for name, case in PEFT.about["cases"].items() if "combination_type" in case]
SPEC_ONLY = {"alpha", "r", "rslora", "copy_of"}


def adapters(case: str, folder: Path) -> list[dict[str, Any]]:
    """The case's adapters as PEFT saves them, with their weights."""
    about, listed = PEFT.about["cases"][case], []
    for k, (settings, weight) in enumerate(zip(about["adapters"], about["weights"], strict=True)):
        assert set(settings) <= SPEC_ONLY
        directory = folder / f"adapter{k}"
        directory.mkdir()
        factors = {f"{MODULE}.lora_{part}.weight": PEFT.input(case, f"{part}{k}").numpy() for part in "AB"}
        save_file(factors, directory / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": settings["r"], "lora_alpha": settings["alpha"],
                  "use_rslora": settings.get("rslora", False), "base_model_name_or_path": "a/base"}  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(config))
        listed.append({"model": str(directory), "weight": weight})
    return listed


def merged(case: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A and B of our merge, in float32, of scale 1."""
    about = PEFT.about["cases"][case]
    kind = "linear" if len(about["adapters"]) == 1 else about["combination_type"]  # PEFT's own choice for one adapter
    recipe = {**TYPES[kind], "models": adapters(case, folder)}
    given = dict(about["params"])
    if "svd" in kind:
        recipe["output"] = {"as": "adapter", "rank": given.pop("svd_rank", about["rank"])}
    knobs = {"density": given.get("density"), "majority": given.get("majority_sign_method")}
    recipe["knobs"] = {**recipe.get("knobs", {}), **{k: v for k, v in knobs.items() if v is not None}}
    graftkit.merge({"output": {"as": "adapter"}, **recipe}, folder / "out")
    found = load_file(folder / "out" / "adapter_model.safetensors")
    return found[f"{MODULE}.lora_A.weight"], found[f"{MODULE}.lora_B.weight"]


@pytest.mark.parametrize("case", [name for name in MERGES if not name.startswith("rslora")])
def test_merges_of_adapters_are_pefts(case, tmp_path):
    a, b = merged(case, tmp_path)
    about = PEFT.about["cases"][case]
    np.testing.assert_allclose(b @ a, PEFT.arrays[f"{case}/delta"], rtol=1e-5, atol=1e-6)
    if about["combination_type"] in ("linear", "ties", "magnitude_prune") and len(about["adapters"]) > 1:
        np.testing.assert_allclose(a, PEFT.arrays[f"{case}/A"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(b, PEFT.arrays[f"{case}/B"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in MERGES if name.startswith("rslora")])
def test_rslora_keeps_its_scale_and_pefts_merge_does_not(case, tmp_path):
    """PEFT's new adapter inherits `use_rslora` at an alpha of its rank, so it comes out sqrt(rank) times too large."""
    a, b = merged(case, tmp_path)
    theirs, rank = PEFT.arrays[f"{case}/delta"], PEFT.about["cases"][case]["rank"]
    np.testing.assert_allclose(b @ a * np.sqrt(rank), theirs, rtol=1e-5, atol=1e-6)


def test_two_identical_adapters_come_out_doubled_by_factors_and_as_they_are_by_products(tmp_path):
    for name in ("linear_identical_adapters", "cat_identical_adapters"):
        folder = tmp_path / name
        folder.mkdir()
        a, b = merged(name, folder)
        wanted = (2 if name.startswith("linear") else 1) * PEFT.arrays[f"{name}/in/delta0"]
        np.testing.assert_allclose(b @ a, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elect", ["none", "sign"])
def test_dare_drops_and_rescales_as_pefts(elect, tmp_path):
    """No numbers, since the masks differ: every entry is 0, a root-weighted entry over the density, or such a sum."""
    listed = adapters("linear", tmp_path)
    recipe = {"method": "peft_dare", "models": listed, "knobs": {"density": 0.5, "elect": elect}}
    graftkit.merge({**recipe, "output": {"as": "adapter"}}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scales = [a["alpha"] / a["r"] for a in PEFT.about["cases"]["linear"]["adapters"]]
    for part in "AB":
        one, two = (
            np.sqrt(entry["weight"] * scale) * PEFT.input("linear", f"{part}{k}").numpy() / 0.5
            for k, (entry, scale) in enumerate(zip(listed, scales, strict=True))
        )
        got = found[f"{MODULE}.lora_{part}.weight"]
        both = (one + two) / (2 if elect == "sign" else 1)
        near = [np.isclose(got, value, rtol=1e-5, atol=1e-7) for value in (np.zeros_like(got), one, two, both)]
        assert np.any(near, axis=0).all() and all(n.any() for n in near[:3])
