"""Searches and gates whose models are a VLM and text experts: what runs is the VLM, its language backbone changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import graftkit
import vlms
from graftkit.execution.live import Live
from graftkit.improving.gated import gated
from graftkit.improving.learnable import Form, learnable
from graftkit.improving.learning import Settings
from graftkit.improving.search import search
from graftkit.improving.search_objective import alone
from graftkit.improving.training import running, train
from graftkit.recipes.recipe import load
from talker import tiny, tokenizer
from test_images import processor, vlm

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
ROWS = [{"prompt": f"what is {n}?", "answer": f"the cat {n}"} for n in range(4)]


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM, its base, and an expert in a task that needs no picture."""
    root = tmp_path_factory.mktemp("seen")
    copy.deepcopy(vlm()).save_pretrained(root / "vlm")
    processor().save_pretrained(root / "vlm")
    base = vlms.shaken(tiny(0, vocab_size=328), 7, 0.02)
    for name, model in (("base", base), ("expert", taught(copy.deepcopy(base)))):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    (root / "told.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    Image.new("RGB", (8, 8), (200, 30, 90)).save(root / "red.png")
    shown = [{"prompt": f"{row['prompt']}<image>", "answer": row["answer"], "images": ["red.png"]} for row in ROWS]
    (root / "shown.jsonl").write_text("\n".join(map(json.dumps, shown)))
    return root


def taught(model: Any) -> Any:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for row in 3 * ROWS:
        ids = torch.tensor([tokenizer()(f"{row['prompt']}{row['answer']}")["input_ids"]])
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def recipe(root: Path, **other: Any) -> dict[str, Any]:
    made = {"method": "task_arithmetic", "base": str(root / "base"), "vlm": str(root / "vlm"),
            "experts": [str(root / "expert")], "vl_weight": 1.0, "exp_weight": 0.5}  # fmt: skip
    return {key: value for key, value in (made | other).items() if value is not None}


@pytest.mark.parametrize("base", [True, False])
def test_each_model_alone_has_the_vlm_around_it(root: Path, base: bool) -> None:
    told = recipe(root) if base else recipe(root, base=None, method="average", vl_weight=None, exp_weight=None)
    with Live.open(told, workers=1) as live:
        seen = {name: value.clone() for name, value in live.model.named_parameters()}
        for name in ("vlm", "expert", *(["base"] if base else [])):
            live.apply(alone(live.recipe, str(root / name)))
            own = {} if name == "vlm" else dict(type(tiny()).from_pretrained(root / name).named_parameters())
            backbone = {n.replace("model.", "model.language_model.", 1): v for n, v in own.items() if "embed" not in n}
            backbone.pop("lm_head.weight", None)
            for place, value in live.model.named_parameters():
                assert torch.equal(value, backbone.get(place, seen[place])), (name, place)


def test_a_search_has_a_scale_and_an_axis_for_each_weight(root: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(root)))
    made = search(
        tmp_path / "recipe.yaml", [root / "told.jsonl"], tmp_path / "out", optimizer="sobol", budget=3, threads=1
    )
    assert [len(kept.values) for kept in made.trials] == [2, 2, 2]


@pytest.mark.parametrize("data", ["told", "shown"])
@pytest.mark.parametrize("method", ["graft", "graft_free"])
def test_gates_are_trained_within_the_vlm(root: Path, tmp_path: Path, method: str, data: str) -> None:
    told = load(recipe(root, method=method, vl_weight=None, exp_weight=None))
    settings = Settings(steps=3, rate=0.01, batch=2)
    train(told, tmp_path / "out", data=[root / f"{data}.jsonl"], settings=settings, held_out=0, device="cpu")
    graftkit.merge(tmp_path / "out" / "recipe.yaml", tmp_path / "merged")
    merged = type(vlm()).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    made = learnable(gated(told), Form(), "cpu")
    made.gating.load_state_dict(load_file(tmp_path / "out" / "phi.safetensors"), strict=False)
    asked = processor()(text="what is <image_place>?", images=[Image.open(root / "red.png")], return_tensors="pt")
    with running(made, "cpu") as (live, _, layers), torch.no_grad():
        assert len(layers) == 14
        torch.testing.assert_close(merged(**asked).logits, live(**asked).logits, rtol=1e-4, atol=1e-4)
