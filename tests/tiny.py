"""Tiny checkpoints and adapters in the formats that transformers and PEFT write, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from graftkit.checkpoints.gates import write_gates
from graftkit.checkpoints.resolve import open_source
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.execution.features import packed
from graftkit.methods import get
from graftkit.testing.evaluation import write_examples

HIDDEN, INNER, VOCABULARY, LAYERS = 16, 24, 40, 2

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "max_position_embeddings": 64,
}


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama with tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(layers):
        head = f"model.layers.{n}."
        found |= {
            head + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            head + "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            head + "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            head + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            head + "mlp.gate_proj.weight": (INNER, HIDDEN),
            head + "mlp.up_proj.weight": (INNER, HIDDEN),
            head + "mlp.down_proj.weight": (HIDDEN, INNER),
            head + "input_layernorm.weight": (HIDDEN,),
            head + "post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,)}


def weights(
    seed: int, *, dtype: torch.dtype = torch.bfloat16, near: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Random weights; `near` another model's, at the distance of a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes().items():
        noise = torch.randn(shape, generator=generator)
        made[name] = (near[name].float() + 0.002 * noise if near else 0.05 * noise + ("norm" in name)).to(dtype)
    return made


def save(
    directory: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint directory, in one file or in shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, places = list(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = names[k::shards]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def family(root: Path, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> tuple[Path, Path, Path]:
    """A base and two fine-tunes of it, saved."""
    base = weights(0, dtype=dtype)
    tuned = [weights(seed, dtype=dtype, near=base) for seed in (1, 2)]
    return (
        save(root / "base", base, shards=shards),
        save(root / "math", tuned[0], shards=shards),
        save(root / "code", tuned[1]),
    )


def adapter(
    directory: Path, seed: int, *, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "down_proj"), **config: Any
) -> Path:
    """A LoRA adapter on the tiny model, as PEFT saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes().items():
        if name.split(".")[-2] in targets:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(rank, shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(shape[0], rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "base_model_name_or_path": "tiny/base",
        "target_modules": list(targets),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings | config))
    return directory


def gates(file: Path, kind: str, *models: Path) -> Path:
    """Gates of two models on disk, one for each channel of each matrix but their embedding."""
    prints, generator = [open_checkpoint(model).fingerprint() for model in models], torch.Generator().manual_seed(0)
    matrices = {n: t.shape for n, t in open_checkpoint(models[0]).tensors.items() if len(t.shape) == 2}
    drawn = {n: torch.rand(shape[0], generator=generator) for n, shape in matrices.items() if "embed" not in n}
    write_gates(file, {n: torch.stack([one, 1 - one]).numpy() for n, one in drawn.items()}, kind=kind, models=prints)
    return file


def statistics(told: dict[str, Any], kind: str) -> None:
    """Statistics of a recipe's models that nobody measured."""
    sources = [open_source(Path(entry["model"])) for entry in told["models"]]
    generator = torch.Generator().manual_seed(0)
    found = []
    for source in sources:
        values = {}
        for name, info in (source.factors if kind == "core_gram" else source.tensors).items():
            width = info.shape[-1]
            if kind == "core_gram":
                width = info.rank * len(sources) + min(get("core_regmean").settings({})["probes"], width)
            drawn = torch.randn(info.shape if kind == "fisher" else (99, width), generator=generator)
            if kind == "fisher" or (len(info.shape) == 2 and "embed" not in name):
                moments = (drawn.square() if kind == "fisher" else drawn.T @ drawn / 99).numpy()
                values[name] = packed(moments) if kind == "core_gram" else moments
        found.append(values)
    write_examples(told, kind, found)


def recipe(directory: Path, text: str) -> Path:
    """A recipe file."""
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


def half_unit(out: torch.Tensor, exact: torch.Tensor) -> None:
    """The output is the exact value rounded once: at most half a unit of the last place away, and a hair."""
    low = torch.nextafter(out, torch.full_like(out, -torch.inf)).double()
    high = torch.nextafter(out, torch.full_like(out, torch.inf)).double()
    gap = torch.where(exact > out.double(), high - out.double(), out.double() - low)
    assert ((exact - out.double()).abs() <= gap * 0.501).all()
