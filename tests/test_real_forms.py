"""Depth and vocabulary on the real SmolLM2 (`make model`)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftkit

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2"
TEXT = "The farmer has 12 apples and gives 5 to her neighbour."

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no .cache/smollm2; run `make model`"),
]
transformers = pytest.importorskip("transformers")


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


def test_a_real_model_of_other_depth(tmp_path):
    """Layers 0-3 and then 2-5: what the same layers give in memory."""
    cut = [{"sources": [{"model": str(MODEL), "layer_range": list(r)}]} for r in ((0, 4), (2, 6))]
    graftkit.merge({"method": "passthrough", "slices": cut}, tmp_path / "out")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    given = logits(loaded(tmp_path / "out"), tokens)
    model = loaded(MODEL)
    layers = [model.model.layers[n] for n in (*range(4), *range(2, 6))]
    for n, layer in enumerate(layers):
        layers[n] = type(layer)(model.config, n)
        layers[n].load_state_dict(layer.state_dict())
        layers[n].to(torch.bfloat16)
    model.config.num_hidden_layers = len(layers)
    model.model.layers = torch.nn.ModuleList(layers)
    assert torch.equal(given, logits(model, tokens))


def test_a_real_vocabulary_in_another_order(tmp_path):
    """A copy whose tokens are shuffled and to which some are added: aligned, the average is the model."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, other / name)
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    order = torch.randperm(49152, generator=torch.Generator().manual_seed(0))
    place = {int(old): new for new, old in enumerate(order)}
    tokenizer["model"]["vocab"] = {t: place[n] for t, n in tokenizer["model"]["vocab"].items()}
    for entry in tokenizer["added_tokens"]:
        entry["id"] = place[entry["id"]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": 49152 + k, "content": f"<|tool{k}|>", **plain} for k in range(3)]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 49155}))
    tensors = load_file(MODEL / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    new = torch.randn(3, rows.shape[1], generator=torch.Generator().manual_seed(1)).to(rows.dtype)
    tensors["model.embed_tokens.weight"] = torch.cat([rows[order], new])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    recipe = {"method": "average", "models": [str(MODEL), str(other)], "output": {"tokenizer": "union"}}
    graftkit.merge(recipe, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(out, torch.cat([rows, new]))
    coder = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = coder(TEXT)["input_ids"]
    assert tokens == transformers.AutoTokenizer.from_pretrained(MODEL)(TEXT)["input_ids"]
    assert coder("<|tool2|>")["input_ids"] == [49154] and len(coder) == 49155
