"""Tiny models with tokenizers of their own, for tests of vocabularies."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tiny

HIDDEN = 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "dtype": "float32",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32,
}  # fmt: skip


def bpe(pieces, merges=(), added=(), first=None):
    """A byte-level BPE tokenizer; `added` come last, special if they look like it."""
    tokenizer = Tokenizer(models.BPE(vocab={p: k for k, p in enumerate(pieces)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in added:
        tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False)])
    return tokenizer


def shapes(rows, tied):
    found = {
        "model.embed_tokens.weight": (rows, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": (12, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (12, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, 12),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
    }
    return found if tied else found | {"lm_head.weight": (rows, HIDDEN)}


def model(directory, seed, tokenizer, rows=None, *, tied=False, dtype=torch.float32, **config):
    """A tiny Llama of a vocabulary, saved; returns its tensors."""
    rows = rows or tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes(rows, tied).items()}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    held = CONFIG | {"vocab_size": rows, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1} | config
    (directory / "config.json").write_text(json.dumps(held))
    special = {"bos_token_id": held["bos_token_id"], "eos_token_id": held["eos_token_id"]}
    (directory / "generation_config.json").write_text(json.dumps(special))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (directory / "chat_template.jinja").write_text(f"{{{{ messages }}}} by {directory.name}")
    return tensors


__all__ = ["HIDDEN", "bpe", "model", "tiny"]
