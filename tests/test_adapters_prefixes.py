"""Adapters whose modules are called otherwise: saved under a wrapper, from a bare model, or inside of a larger one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import graftkit
import tiny
from graftkit.checkpoints.adapters import open_adapter

PEFTS = "base_model.model."
PREFIXES = {
    "bare": "",
    "compiled": "_orig_mod.model.",
    "parallel": "module.model.",
    "twice": "base_model.model.model.",
    "in a VLM": "language_model.model.",
    "in a VLM, new": "model.language_model.",
}


def called(adapter: Path, prefix: str) -> Path:
    """The adapter with another prefix in place of `model.`."""
    file = adapter / "adapter_model.safetensors"
    held = {name.replace(f"{PEFTS}model.", PEFTS + prefix): tensor for name, tensor in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})
    return adapter


def dense(adapter: Path) -> dict[str, np.ndarray]:
    """Its deltas."""
    opened = open_adapter(adapter)
    deltas = {name: opened.load(name, np.float64) for name in opened.factors}
    return {name: delta.left @ delta.right for name, delta in deltas.items()}


def merged(tmp_path: Path, models: list[Path], **more: Any) -> dict[str, np.ndarray]:
    recipe = {"method": "task_arithmetic", "models": [str(m) for m in models], "accept_base": True, **more}
    graftkit.merge({**recipe, "output": {"as": "adapter", "rank": "exact"}}, tmp_path / "out")
    return dense(tmp_path / "out")


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_module_by_two_names_is_one_module(tmp_path: Path, prefix: str, with_base: bool) -> None:
    """The result carries the name by which the base's model knows it."""
    if "VLM" in prefix and not with_base:
        pytest.skip("nothing says that the two are one, and a VLM's own adapters are called so")
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    models = [tiny.adapter(tmp_path / "one", 1), tiny.adapter(tmp_path / "two", 2, rank=3)]
    wanted = dense(models[0])
    wanted = {name: delta + wanted[name] for name, delta in dense(models[1]).items()}
    found = merged(
        tmp_path, [called(models[0], PREFIXES[prefix]), models[1]], **({"base": str(base)} if with_base else {})
    )
    assert set(found) == set(wanted)
    for name, delta in found.items():
        np.testing.assert_allclose(delta, wanted[name], rtol=1e-5, atol=1e-7)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert all(target in ("q_proj", "down_proj") or f"{target}.weight" in wanted for target in targets)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_adapter_alone_is_called_as_the_bases_model_calls_it(tmp_path: Path, prefix: str) -> None:
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    wanted = set(dense(tiny.adapter(tmp_path / "one", 1)))
    assert set(merged(tmp_path, [called(tmp_path / "one", PREFIXES[prefix])], base=str(base))) == wanted
