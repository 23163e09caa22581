"""A VLM of a tiny text model on plain tensors, in the layouts and fusions that there are; recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import graftkit
import tiny

Weights = dict[str, torch.Tensor]
ROWS = tiny.VOCABULARY + 3  # of the VLM's embedding
TOWER = ("vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_tower.encoder.layers.1.mlp.fc1.weight")
EXTRA = (*TOWER, "multi_modal_projector.linear_1.weight")
CONFIG = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": tiny.CONFIG}


def named(kind: str, name: str) -> str:
    """A text model's tensor in a VLM's file, by the layouts that there are."""
    if name.startswith("lm_head"):
        return {"nested": "language_model." + name}.get(kind, name)
    prefix = {"nested": "language_model.model.", "new": "model.language_model.", "original": "model.", "bare": ""}[kind]
    return prefix + name.removeprefix("model.")


def seen(text: Weights, kind: str = "nested", *, rows: int = ROWS, head: bool = False) -> Weights:
    """A VLM whose backbone is near a text model."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, tensor in text.items():
        noise = 0.003 * torch.randn(tensor.shape, generator=generator)
        made[named(kind, name)] = (tensor.float() + noise).to(tensor.dtype)
    embedding = named(kind, "model.embed_tokens.weight")
    more = torch.randn(rows - tiny.VOCABULARY, tiny.HIDDEN, generator=generator).to(made[embedding].dtype)
    made[embedding] = torch.cat([made[embedding], more])
    if head:
        made[named(kind, "lm_head.weight")] = made[embedding] * 2
    tower = torch.randn(3, 8, 8, generator=generator).to(made[embedding].dtype)
    return made | {
        ("model." if kind in ("new", "original") else "") + n: t.clone() for n, t in zip(EXTRA, tower, strict=True)
    }


def family(directory: Path) -> Path:
    """A text base, two experts and a VLM of it, in float32."""
    tiny.family(directory, dtype=torch.float32)
    tiny.save(directory / "vlm", seen(tiny.weights(0, dtype=torch.float32)), config=CONFIG)
    return directory


def recipe(root: Path, *experts: str, **other: Any) -> dict[str, Any]:
    made = {"method": "task_arithmetic", "base": str(root / "base"), "vlm": str(root / "vlm"),
            "experts": [str(root / name) for name in experts or ("math",)], "vl_weight": 1.0, "exp_weight": 0.5,
    }  # fmt: skip
    return {key: value for key, value in (made | other).items() if value is not None}


def merged(root: Path, told: dict[str, Any], out: str = "out") -> Weights:
    graftkit.merge(told, root / out)
    return load_file(root / out / "model.safetensors")


def loaded(root: Path, name: str) -> Weights:
    return {n: t for file in (root / name).glob("*.safetensors") for n, t in load_file(file).items()}


def expected(root: Path, kind: str = "nested", expert: str = "math", weight: float = 0.5) -> Weights:
    """The VLM with the expert's change added to its layers, in float64."""
    base, skill, made = loaded(root, "base"), loaded(root, expert), loaded(root, "vlm")
    for name in base:
        if "embed" not in name:
            change = skill[name].double() - base[name].double()
            made[named(kind, name)] = (made[named(kind, name)].double() + weight * change).to(base[name].dtype)
    return made


def same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-7, msg=name)


def fused_plain(held: Weights) -> Weights:
    """q, k and v, and gate and up, one after the other (Phi-3)."""
    made = dict(held)
    for name in [n for n in held if "q_proj" in n or "gate_proj" in n]:
        parts = ("q_proj", "k_proj", "v_proj") if "q_proj" in name else ("gate_proj", "up_proj")
        whole = "qkv_proj" if "q_proj" in name else "gate_up_proj"
        made[name.replace(parts[0], whole)] = torch.cat([made.pop(name.replace(parts[0], part)) for part in parts])
    return made


INTERN = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
          "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
          "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings"}  # fmt: skip


def fused_by_group(held: Weights, groups: int = 1) -> Weights:
    """InternLM2: for each key-value head its queries, its key and its value; and other names."""
    made = {}
    for name, tensor in held.items():
        called = name
        for plain, spelled in INTERN.items() if "tower" not in name else ():
            called = called.replace(plain, spelled)
        if "self_attn.q_proj" in name:
            parts = [held[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            stacked = torch.cat([part.reshape(groups, -1, part.shape[1]) for part in parts], dim=1)
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = stacked.reshape(-1, tensor.shape[1])
        elif "self_attn.k_proj" not in name and "self_attn.v_proj" not in name:
            made[called] = tensor
    return made


FUSIONS: dict[str, Callable[[Weights], Weights]] = {
    "plain": fused_plain, "groups of one head": fused_by_group, "two groups": lambda held: fused_by_group(held, 2)
}  # fmt: skip


def heads_of(fusion: str) -> dict[str, Any]:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2 if fusion == "two groups" else 1}
    return CONFIG | heads | {"text_config": tiny.CONFIG | heads}


def words(directory: Path, tokens: dict[str, int]) -> None:
    Tokenizer(models.WordLevel(tokens, unk_token="w0")).save(str(directory / "tokenizer.json"))
