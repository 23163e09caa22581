"""Adapters that merges write, loaded by PEFT: the same logits as the merged dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftkit
from test_adapters import adapted, live

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT on transformers 5
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

IDS = torch.arange(12)[None]
ONE, TWO = {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "r": 2}
MERGES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ranks and targets": (
        "qwen",
        [
            {"target_modules": ["q_proj", "down_proj"], "r": 5, "alpha_pattern": {"q_proj": 2}},
            {"target_modules": ["q_proj", "up_proj", "k_proj"], "r": 3, "use_rslora": True},
        ],
    ),
    "one layer only": ("qwen", [ONE | {"layers_to_transform": [1]}, {"target_modules": ["v_proj"]}]),
    "embedding and head": (
        "qwen",
        [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"], "r": 2}],
    ),
    "saved modules": (
        "qwen",
        [ONE | {"modules_to_save": ["norm", "lm_head"]}, TWO],
    ),
    "biases": ("qwen", [{"target_modules": ["q_proj", "v_proj"], "bias": "all"}, {"target_modules": ["up_proj"]}]),
    "transposed": (
        "gpt2",
        [
            {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"], "r": 3},
        ],
    ),
}  # fmt: skip


def load(kind: str, base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def same_logits(kind: str, base: Path, adapter: Path, dense: Path) -> None:
    """PEFT's model with the adapter gives the logits of the dense checkpoint."""
    wanted = load(kind, dense)(IDS).logits
    wrapped = peft.PeftModel.from_pretrained(load(kind, base), adapter)
    untouched = load(kind, base)(IDS).logits
    assert (wanted - untouched).abs().max() > 1e-3  # something was merged
    torch.testing.assert_close(wrapped(IDS).logits, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("rank", ["exact", {"energy": 1.0}])
def test_peft_loads_what_is_written(tmp_path: Path, name: str, rank: Any) -> None:
    kind, settings = MERGES[name]
    for k, one in enumerate(settings):
        adapted(live(kind, tmp_path), tmp_path / f"lora{k}", one, seed=k)
    models = [{"model": str(tmp_path / f"lora{k}"), "weight": w} for k, w in enumerate((0.8, -0.6))]
    recipe = {"method": "task_arithmetic", "base": str(tmp_path / "base"), "models": models}
    graftkit.merge(recipe, tmp_path / "dense")
    graftkit.merge(recipe | {"output": {"as": "adapter", "rank": rank}}, tmp_path / "adapter")
    same_logits(kind, tmp_path / "base", tmp_path / "adapter", tmp_path / "dense")
    again = {"method": "task_arithmetic", "models": [str(tmp_path / "adapter")], "base": str(tmp_path / "base")}
    graftkit.merge(again, tmp_path / "again")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("dense", "again"))
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=1e-5, atol=1e-6)


def test_dora_and_ties_come_out_as_they_are_dense(tmp_path: Path) -> None:
    """What is no sum of factors, at full rank."""
    adapted(live("qwen", tmp_path), tmp_path / "one", {"target_modules": ["q_proj", "up_proj"], "use_dora": True})
    adapted(live("qwen", tmp_path), tmp_path / "two", {"target_modules": ["q_proj"], "r": 2}, seed=2)
    recipe = {"method": "ties", "base": str(tmp_path / "base"), "models": [str(tmp_path / n) for n in ("one", "two")]}
    graftkit.merge(recipe, tmp_path / "dense")
    graftkit.merge(recipe | {"output": {"as": "adapter", "rank": 16}}, tmp_path / "adapter")
    same_logits("qwen", tmp_path / "base", tmp_path / "adapter", tmp_path / "dense")


def test_full_names_and_patterns_where_ranks_and_layers_differ(tmp_path: Path) -> None:
    adapted(live("qwen", tmp_path), tmp_path / "one", {"target_modules": ["q_proj"], "layers_to_transform": [1]})
    adapted(live("qwen", tmp_path), tmp_path / "two", {"target_modules": ["v_proj"], "r": 2})
    models = [str(tmp_path / n) for n in ("one", "two")]
    output = {"as": "adapter", "rank": "exact"}
    graftkit.merge({"method": "average", "models": models, "output": output}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"]
    assert config["r"] == 2 and config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 4}
    assert config["alpha_pattern"] == config["rank_pattern"] and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
