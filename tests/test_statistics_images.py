"""Statistics where one of the models sees: a VLM's own examples have pictures, its experts' are texts."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import graftkit
import talker
import test_images
from graftkit.errors import PlanError
from graftkit.measuring.statistics import collect
from graftkit.recipes.statistics import fingerprint

pytest.importorskip("PIL")
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
ASKED = (("what is this?<image>", ["0.png"]), ("<image> and <image>?", ["1.png", "2.png"]))


def picture(place: Path, seed: int) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place)


def moved(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """Three pictures and the records that ask about them."""
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    rows = [{"instruction": text, "input": "", "output": "a cat", "images": images} for text, images in ASKED]
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "seen.jsonl"


def test_examples_are_others_when_a_picture_is(seen: Path) -> None:
    (seen.parent / "seen.yaml").write_text("name: seen\nkind: answer_loss\ndata: seen.jsonl\n")
    before = fingerprint(seen), fingerprint(seen.parent / "seen.yaml")
    picture(seen.parent / "2.png", 7)
    assert fingerprint(seen) != before[0] and fingerprint(seen.parent / "seen.yaml") != before[1]


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "core_regmean", "fisher"])
def test_a_vlm_and_a_text_expert_are_measured_each_on_its_own(seen: Path, tmp_path: Path, method: str) -> None:
    words = test_images.processor().tokenizer
    for name, seed in (("base", None), ("expert", 1)):
        model = talker.tiny(0, vocab_size=328)
        (model if seed is None else moved(model, seed)).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    vlm = deepcopy(test_images.vlm())
    moved(vlm.model.language_model, 2)
    vlm.save_pretrained(tmp_path / "vlm")
    test_images.processor().save_pretrained(tmp_path / "vlm")
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "two and two make", "answer": " four"}) + "\n")
    told: dict[str, Any] = {"method": method, "base": str(tmp_path / "base")}
    told["vlm"] = {"model": str(tmp_path / "vlm"), "data": str(seen)}
    told["experts"] = [{"model": str(tmp_path / "expert"), "data": str(tmp_path / "text.jsonl")}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(told))
    tokens = [one.about.tokens for one in collect(recipe, device="cpu")]
    assert tokens[0] > tokens[1] + 3 * 4  # four for each picture
    graftkit.merge(recipe, tmp_path / "out")
    out, own = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "vlm"))
    changed = {name for name in out if not torch.equal(out[name], own[name])}
    assert any("q_proj" in name for name in changed) and not any("vision" in name for name in changed)
    picture(tmp_path / "1.png", 9)
    with pytest.raises(PlanError, match="run `graft statistics RECIPE`"):
        graftkit.plan(recipe)
