"""The small models that mergekit and graftkit merge for comparison: made from seeds, the same everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY = 8, 12, 4, 24

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
MODELS = {"base": (0, 0.0), "a": (1, 0.02), "b": (2, 0.02), "c": (3, 0.02), "far": (4, 0.1), "near": (5, 3e-4),
          "nearer": (6, 1e-4), "words": (7, 0.02)}  # fmt: skip
"""By name the seed, and the distance from the base."""

NEW = ("new1", "new2", "new3")
"""The tokens that only the model `words` has."""


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for n in range(LAYERS):
        sizes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        found |= {f"model.layers.{n}.{name}.weight": shape for name, shape in sizes.items()}
    return found | {"model.norm.weight": (HIDDEN,)}


def tokens(model: str) -> list[str]:
    """The vocabulary of a model, in the order of its ids: `words` has other tokens, in another order."""
    usual = ["<unk>", "</s>", *(f"w{k}" for k in range(VOCABULARY - 2))]
    return ["<unk>", *NEW[:2], *usual[:3:-1], "</s>", NEW[2]] if model == "words" else usual


def weights(model: str) -> dict[str, np.ndarray]:
    """The tensors of a model, float32; deltas have a part in common, so that they agree more often than not."""
    seed, distance = MODELS[model]
    draw, own, shared = (np.random.default_rng([9, s]) for s in (0, seed, 99))
    made = {}
    for name, shape in shapes(len(tokens(model))).items():
        rows = shapes(VOCABULARY)[name]
        start = 0.05 * draw.standard_normal(rows) + ("norm" in name)
        common = shared.standard_normal(rows)
        if shape != rows:
            start, common = (np.resize(part, shape) for part in (start, common))
        delta = distance * (own.standard_normal(shape) + 0.5 * common)
        made[name] = (start + delta).astype(np.float32)
    return made


def adapter() -> dict[str, np.ndarray]:
    """The factors of a LoRA adapter of rank 2."""
    draw, made = np.random.default_rng([9, 50]), {}
    for name, shape in shapes(VOCABULARY).items():
        if "q_proj" in name or "down_proj" in name:
            module = "base_model.model." + name.removesuffix(".weight")
            made[f"{module}.lora_A.weight"] = 0.1 * draw.standard_normal((2, shape[1]))
            made[f"{module}.lora_B.weight"] = 0.1 * draw.standard_normal((shape[0], 2))
    return {name: value.astype(np.float32) for name, value in made.items()}


def digest() -> str:
    """Names the numbers of all models, to notice where they would be others."""
    parts = [weights(model) for model in MODELS] + [adapter()]
    content = b"".join(value.tobytes() for part in parts for value in part.values())
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def save(root: Path) -> Path:
    """All models and the adapter, as directories in `root`."""
    for model in MODELS:
        _save_one(root / model, weights(model), CONFIG | {"vocab_size": len(tokens(model)), "dtype": "float32"})
        _save_tokenizer(root / model, tokens(model))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4,
                "base_model_name_or_path": "somewhere/else", "target_modules": ["q_proj", "down_proj"]}  # fmt: skip
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    factors = {name: torch.from_numpy(value) for name, value in adapter().items()}
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    return root


def _save_one(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, object]) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    held = {name: torch.from_numpy(value) for name, value in tensors.items()}
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})


def _save_tokenizer(directory: Path, words: list[str]) -> None:
    model = {"type": "BPE", "vocab": {word: k for k, word in enumerate(words)}, "merges": [], "unk_token": "<unk>",
             "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
             "byte_fallback": False, "ignore_merges": True}  # fmt: skip
    added = [{"id": words.index(word), "content": word, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for word in ("<unk>", "</s>")]  # fmt: skip
    added.sort(key=lambda token: token["id"])
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
