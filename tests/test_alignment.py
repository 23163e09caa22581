"""Text models merged into the language backbones of VLMs: every family against the same edit made in memory."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, PreTrainedModel

import graftkit
import vlms
from graftkit.recipes.plan import plan

WEIGHTS = (0.9, 0.5)


def three(kind: str, root: Path, **how: Any) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """A VLM, its base and an expert of the base, in memory and on disk."""
    model = vlms.vlm(kind)
    base = vlms.base_of(kind, model)
    expert = vlms.shaken(copy.deepcopy(base), 11, 0.02)
    vlms.saved(model, root / "vlm", **how)
    vlms.saved(base, root / "base")
    vlms.saved(expert, root / "expert")
    return model, base, expert


def recipe(root: Path, **other: Any) -> dict[str, Any]:
    made = {
        "method": "task_arithmetic",
        "base": str(root / "base"),
        "vlm": str(root / "vlm"),
        "experts": [str(root / "expert")],
        "vl_weight": WEIGHTS[0],
        "exp_weight": WEIGHTS[1],
    }
    return {key: value for key, value in (made | other).items() if value is not None}


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def injected(kind: str, model: PreTrainedModel, base: PreTrainedModel, expert: PreTrainedModel) -> PreTrainedModel:
    """The VLM with the skill added to its parameters in memory; embeddings and head as they were."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in vlms.live_names(kind, base, model).items():
            if "embed_tokens" not in name and "lm_head" not in name:
                own, skill = (m.get_parameter(name).double() for m in (base, expert))
                seen = model.get_parameter(place).double()
                changed.get_parameter(place).copy_(own + WEIGHTS[0] * (seen - own) + WEIGHTS[1] * (skill - own))
    return changed


def logits(model: PreTrainedModel) -> torch.Tensor:
    """On words alone; what a model that never speaks without an image speaks with, by itself."""
    blind = inspect.signature(model.forward).parameters["pixel_values"].default if takes_images(model) else None
    speaker = model.language_model if blind is inspect.Parameter.empty else model
    with torch.inference_mode():
        return speaker(input_ids=torch.arange(3, 19)[None]).logits


def takes_images(model: PreTrainedModel) -> bool:
    return "pixel_values" in inspect.signature(model.forward).parameters


def cross_check(kind: str, model: PreTrainedModel, base: PreTrainedModel, root: Path) -> None:
    """The alignment from headers is the one that transformers makes when it loads the two, name by name."""
    found = plan(recipe(root)).backbone
    ours, theirs = (vlms.in_memory(m, on_disk(root / place)) for m, place in ((base, "base"), (model, "vlm")))
    wanted = vlms.live_names(kind, base, model)
    pairs = {name: found.alignments[found.reference].pieces[name] for name in found.merged}
    assert {ours[piece.name]: theirs[name] for name, (piece,) in pairs.items()} == {
        own: place for own, place in wanted.items() if "embed_tokens" not in own and "lm_head" not in own
    }


@pytest.mark.parametrize("kind", vlms.FAMILIES)
def test_a_skill_is_injected_as_in_memory(kind: str, tmp_path: Path) -> None:
    model, base, expert = three(kind, tmp_path)
    cross_check(kind, model, base, tmp_path)
    graftkit.merge(recipe(tmp_path), tmp_path / "out")
    made, told = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    wanted = injected(kind, model, base, expert)
    for name, tensor in wanted.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), tensor, rtol=1e-6, atol=1e-7, msg=name)
    torch.testing.assert_close(logits(made.eval()), logits(wanted), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(wanted)).abs().max() > 1e-3  # the injected skill can be seen
    before, after = on_disk(tmp_path / "vlm"), on_disk(tmp_path / "out")
    assert list(before) == list(after)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    wide = [n for n in vlms.live_names(kind, base, model) if "embed_tokens" not in n and "lm_head" not in n]
    assert len(changed) >= len(wide) * 0.9 and not any("vision" in n or "visual" in n or "audio" in n for n in changed)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "mllama", "gemma3"])
def test_the_layout_of_the_newest_transformers_is_found_too(kind: str, tmp_path: Path) -> None:
    model, base, expert = three(kind, tmp_path, save_original_format=False)
    names = on_disk(tmp_path / "vlm")
    assert any(name.startswith("model.language_model.") for name in names)
    graftkit.merge(recipe(tmp_path), tmp_path / "out")
    assert list(on_disk(tmp_path / "out")) == list(names)
    made = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").eval()
    wanted = injected(kind, model, base, expert)
    torch.testing.assert_close(logits(made), logits(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5
@pytest.mark.parametrize("on", ["text", "vlm"])
def test_adapters_that_peft_trained_speak_as_in_peft(on: str, tmp_path: Path) -> None:
    """On the text base, whose change goes into the VLM; and on the VLM, by the names that it has in memory."""
    model, base, _ = three("llava", tmp_path)
    below = copy.deepcopy(base if on == "text" else model)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)")
    if on == "vlm":
        config.target_modules = r".*language_model" + config.target_modules
    adapted = get_peft_model(below, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape)) if "lora_" in name else None
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / ("base" if on == "text" else "vlm"))
    adapted.save_pretrained(tmp_path / "lora")
    told = recipe(tmp_path, experts=[str(tmp_path / "lora")], vl_weight=1.0, exp_weight=1.0)
    graftkit.merge(told, tmp_path / "out")
    made = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").eval()
    whole = adapted.merge_and_unload().eval()
    if on == "text":
        inside = copy.deepcopy(model)
        with torch.no_grad():
            for name, place in vlms.live_names("llava", base, model).items():
                if "embed_tokens" not in name and "lm_head" not in name:
                    inside.get_parameter(place).add_(whole.get_parameter(name) - base.get_parameter(name))
        whole = inside
    torch.testing.assert_close(logits(made), logits(whole), rtol=1e-4, atol=1e-5)
    assert (logits(made) - logits(model)).abs().max() > 1e-2
