"""Adapters of the embedding or the head of a model that ties the two: the merge is the model that PEFT runs."""

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
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

IDS = torch.arange(12)[None]
Q: dict[str, Any] = {"target_modules": ["q_proj"]}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "saved embedding": (Q | {"modules_to_save": ["embed_tokens"]}, False),
    "saved and tied": (Q | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both saved": (Q | {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "adapted embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "adapted and tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "adapted head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "neither": (Q, True),
}


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_is_the_model_that_peft_runs(tmp_path: Path, kind: str) -> None:
    settings, tied = KINDS[kind]
    wrapped = adapted(live("tied", tmp_path), tmp_path / "lora", settings)
    wanted = wrapped(IDS).logits
    recipe: dict[str, Any] = {"method": "task_arithmetic", "models": [str(tmp_path / "lora")]}
    record = graftkit.merge(recipe, tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied
    assert any("untied" in note for note in record["notes"]) != tied


@pytest.mark.parametrize("kind", KINDS)
def test_and_leaves_as_an_adapter(tmp_path: Path, kind: str) -> None:
    wrapped = adapted(live("tied", tmp_path), tmp_path / "lora", KINDS[kind][0])
    wanted = wrapped(IDS).logits
    output = {"as": "adapter", "rank": "exact"}
    recipe = {"method": "task_arithmetic", "models": [str(tmp_path / "lora")], "output": output}
    graftkit.merge(recipe, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
