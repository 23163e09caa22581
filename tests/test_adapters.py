"""Adapters as PEFT writes them, read as PEFT means them: every kind against PEFT's own merge into the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit.errors import CheckpointError, NonFiniteError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5

LINEAR = ["q_proj", "k_proj", "down_proj", "up_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"k_proj": 9, "model.layers.0.mlp.down_proj": 1},
    },
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"down_proj": 6}},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora rslora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 1}},
    "all linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm", "lm_head"]},
    "bias": {"target_modules": LINEAR, "bias": "all"},
    "bias beside": {"target_modules": LINEAR, "bias": "lora_only", "use_dora": True},
}


def live(kind: str, directory: Path, seed: int = 0) -> Any:
    """A small model of random weights under PEFT, whose adapter is no identity; both saved."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=kind == "tied"))
    model.save_pretrained(directory / "base")
    model.name_or_path = model.config._name_or_path = str(directory / "base")
    return model


def adapted(model: Any, directory: Path, settings: dict[str, Any], seed: int = 1) -> Any:
    """The model with an adapter of random weights, which is saved."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(directory)
    return wrapped


def check(merged: Path, wrapped: Any) -> None:
    """The merged checkpoint's weights are those of PEFT's own merge."""
    wanted = wrapped.merge_and_unload().state_dict()
    found = load_file(merged / "model.safetensors")
    assert set(found) <= set(wanted)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_every_kind_is_read_as_peft_means_it(tmp_path: Path, kind: str) -> None:
    wrapped = adapted(live(kind, tmp_path), tmp_path / "lora", KINDS[kind])
    graftkit.merge({"method": "task_arithmetic", "models": [str(tmp_path / "lora")]}, tmp_path / "out")
    check(tmp_path / "out", wrapped)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_transposed_weights_are_read_as_peft_means_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    wrapped = adapted(live("gpt2", tmp_path), tmp_path / "lora", targets | settings)
    recipe = {"method": "task_arithmetic", "base": str(tmp_path / "base"), "models": [str(tmp_path / "lora")]}
    graftkit.merge(recipe, tmp_path / "out")
    wanted, found = wrapped.merge_and_unload().state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["average", "ties", "slerp"])
def test_dora_beside_another_rank_and_other_targets(tmp_path: Path, method: str) -> None:
    """Merged with a plain adapter of another rank, as the checkpoints that PEFT makes of the two."""
    names = {
        "one": {"target_modules": LINEAR, "use_dora": True},
        "two": {"target_modules": ["q_proj", "o_proj"], "r": 3},
    }
    base = tmp_path / "base"
    for k, (name, settings) in enumerate(names.items()):
        wrapped = adapted(live("plain", tmp_path), tmp_path / name, settings, seed=k)
        wrapped.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
    for suffix in ("", "-merged"):
        models = [str(tmp_path / f"{name}{suffix}") for name in names]
        graftkit.merge({"method": method, "base": str(base), "models": models}, tmp_path / f"out{suffix}")
    found, wanted = (load_file(tmp_path / f"out{suffix}" / "model.safetensors") for suffix in ("", "-merged"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=3e-6)


def test_a_channel_without_a_direction_is_refused(tmp_path: Path) -> None:
    model = live("dora", tmp_path)
    adapted(model, tmp_path / "lora", KINDS["dora"])
    with torch.no_grad():
        tensors = load_file(tmp_path / "base" / "model.safetensors")
        factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.weight"][3] = 0
        factors[f"base_model.model.{name}.lora_B.weight"][3] = 0
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match="channel of zeros"):
        graftkit.merge({"method": "task_arithmetic", "models": [str(tmp_path / "lora")]}, tmp_path / "out")


def test_magnitudes_must_be_there_and_fit(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    lora = tiny.adapter(tmp_path / "lora", 0, use_dora=True)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        graftkit.plan({"method": "task_arithmetic", "base": str(base), "models": [str(lora)]})


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_converted_pissa_is_plain_lora(tmp_path: Path) -> None:
    """PEFT's own conversion doubles the rank; unconverted, the adapter is refused with the way to convert it."""
    model = live("pissa", tmp_path)
    settings = {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "raw")
    wrapped.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    recipe = {"method": "task_arithmetic", "base": str(tmp_path / "base")}
    with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
        graftkit.plan(recipe | {"models": [str(tmp_path / "raw")]})
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 6
    graftkit.merge(recipe | {"models": [str(tmp_path / "lora")]}, tmp_path / "out")
    check(tmp_path / "out", wrapped)
