"""Backbones of VLMs on plain tensors: layouts, fused projections, vocabularies, adapters, ancestry, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit import methods
from graftkit.checkpoints.gates import write_gates
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.cli import app
from graftkit.errors import PlanError, RecipeError
from graftkit.recipes import ancestry
from graftkit.recipes.plan import plan
from graftkit.recipes.recipe import load

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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A text base, two experts and a VLM of it, in float32."""
    tiny.family(tmp_path, dtype=torch.float32)
    tiny.save(tmp_path / "vlm", seen(tiny.weights(0, dtype=torch.float32)), config=CONFIG)
    return tmp_path


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


@pytest.mark.parametrize("kind", ["nested", "new", "original", "bare"])
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)])
def test_every_layout_is_found_and_names_stay(tmp_path: Path, kind: str, dtype: torch.dtype, shards: int) -> None:
    tiny.family(tmp_path, dtype=dtype, shards=shards)
    tiny.save(tmp_path / "vlm", seen(tiny.weights(0, dtype=dtype), kind), shards=shards, config=CONFIG)
    made, before = merged(tmp_path, recipe(tmp_path)), loaded(tmp_path, "vlm")
    wanted = expected(tmp_path, kind)
    assert made.keys() == before.keys()
    for name, tensor in made.items():
        tiny.half_unit(tensor, wanted[name].double()) if dtype == torch.float32 else None
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=2e-2, atol=1e-4, msg=name)
    kept = [n for n in before if "embed" in n or "tower" in n or "projector" in n]
    assert len(kept) == 4 and all(torch.equal(made[n], before[n]) for n in kept)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == CONFIG["architectures"]


def test_text_models_in_other_layouts_and_with_heads_are_found(root: Path) -> None:
    wanted = merged(root, recipe(root))
    for place in ("base", "math"):
        held = {n.removeprefix("model."): t for n, t in loaded(root, place).items()}
        tiny.save(root / place, held | {"lm_head.weight": held["embed_tokens.weight"].clone()})
    same(merged(root, recipe(root), "again"), wanted)


def test_another_vlm_gives_its_backbone_alone(root: Path) -> None:
    """VLM-to-VLM: the expert sees too, by other names, and its tower is not used."""
    other = {named("new", n): t for n, t in loaded(root, "math").items()}
    tower = {
        "model.visual.blocks.0.mlp.fc1.weight": torch.ones(8, 8),
        "model.visual.blocks.1.mlp.fc1.weight": torch.ones(8, 8),
    }
    tiny.save(root / "seer", other | tower, config=CONFIG)
    told = recipe(root, "seer")
    same(merged(root, told), expected(root))
    assert any("visual" in n for n in plan(told).backbone.left[2])


@pytest.mark.parametrize("expert", ["code", "vlm"])
def test_a_text_model_in_the_place_of_the_vlm_is_refused(root: Path, expert: str) -> None:
    with pytest.raises(PlanError, match="math.* is a text model: nothing of it lies outside"):
        plan(recipe(root, expert, vlm=str(root / "math")))


def test_layers_that_only_the_vlm_has_are_passed_over(root: Path) -> None:
    held = {}
    for name, tensor in loaded(root, "vlm").items():
        held[name.replace("layers.1.", "layers.2.") if name.startswith("language") else name] = tensor
    for part in ("cross_attn.q_proj.weight", "mlp.down_proj.weight"):
        held[f"language_model.model.layers.1.{part}"] = torch.ones(16, 24)
    tiny.save(root / "vlm", held, config=CONFIG)
    made = plan(recipe(root))
    assert made.backbone.alignments[made.base].layers == ((0, 0), (1, 2))
    copied = [s.name for s in made.steps if not s.method]
    assert sum("layers.1." in n for n in copied) == 2 + 1  # of the backbone, and of the tower
    with pytest.raises(PlanError, match="needs statistics of examples, and base .* under other numbers"):
        plan(recipe(root, method="regmean"))
    out = merged(root, recipe(root))
    base, skill = loaded(root, "base"), loaded(root, "math")
    name = "layers.1.mlp.up_proj.weight"
    change = 0.5 * (skill["model." + name] - base["model." + name])
    torch.testing.assert_close(out["language_model.model.layers.2.mlp.up_proj.weight"],
                               held["language_model.model.layers.2.mlp.up_proj.weight"] + change)  # fmt: skip


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


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_fused_vlm_takes_apart_text_models(root: Path, fusion: str, method: str) -> None:
    """What the VLM keeps in one tensor is made of the text model's parts, wherever their rows belong."""
    told = recipe(root, "math", "code", method=method)
    fuse, before = FUSIONS[fusion], loaded(root, "vlm")
    wanted = merged(root, told) if method == "task_arithmetic" else None
    tiny.save(root / "vlm", fuse(before), config=heads_of(fusion))
    made = merged(root, told, "fused")
    if wanted is None:  # thresholds are those of the fused matrix: fuse the text models instead
        for place in ("base", "math", "code"):
            tiny.save(root / place, fuse(loaded(root, place)), config=heads_of(fusion))
        same(made, merged(root, told, "again"))
    else:
        same(made, fuse(wanted))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_vlm_takes_fused_text_models_apart(root: Path, fusion: str) -> None:
    told = recipe(root)
    wanted = merged(root, told)
    for place in ("base", "math"):
        tiny.save(root / place, FUSIONS[fusion](loaded(root, place)), config=heads_of(fusion))
    same(merged(root, told, "again"), wanted)


def test_a_fusion_that_is_not_defined_is_refused_by_name(root: Path) -> None:
    held = {n.replace("qkv_proj", "query_key_value"): t for n, t in fused_plain(loaded(root, "vlm")).items()}
    tiny.save(root / "vlm", held, config=CONFIG)
    with pytest.raises(PlanError, match=r"self_attn.k_proj.weight' and 2 more .*query_key_value.weight' instead"):
        plan(recipe(root))


def test_an_adapter_of_the_base_is_an_expert(root: Path) -> None:
    """As the full model that PEFT would make of it; a part that the VLM keeps fused is refused by name."""
    tiny.adapter(root / "lora", 3, base_model_name_or_path=str(root / "base"))
    graftkit.merge(
        {"method": "task_arithmetic", "base": str(root / "base"), "models": [str(root / "lora")]}, root / "full"
    )
    same(merged(root, recipe(root, "lora")), merged(root, recipe(root, "full"), "again"))
    same(merged(root, recipe(root, "lora", base=None), "found"), expected(root, expert="full"))  # by what it records
    tiny.save(root / "vlm", fused_plain(loaded(root, "vlm")), config=CONFIG)
    with pytest.raises(PlanError, match=r"adapts 'model.layers.0.self_attn.q_proj.weight'.* keeps fused"):
        plan(recipe(root, "lora"))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_fused_base_is_cut_by_its_rows(root: Path, dora: bool) -> None:
    for place in ("base", "math"):
        tiny.save(root / place, fused_plain(loaded(root, place)))
    factors = {}
    for n in range(tiny.LAYERS):
        module = f"base_model.model.model.layers.{n}.self_attn.qkv_proj"
        factors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(2, 16)
        factors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(32, 2)
        if dora:
            factors[f"{module}.lora_magnitude_vector"] = torch.ones(32)
    (root / "lora").mkdir()
    save_file(factors, root / "lora" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base", "use_dora": dora}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(told))
    if dora:
        with pytest.raises(PlanError, match=r"rescales the channels of .*qkv_proj.* is some rows"):
            plan(recipe(root, "lora"))
        return
    graftkit.merge(
        {"method": "task_arithmetic", "base": str(root / "base"), "models": [str(root / "lora")]}, root / "full"
    )
    same(merged(root, recipe(root, "lora")), merged(root, recipe(root, "full"), "again"))


def test_an_adapter_of_the_vlm_is_an_expert(root: Path) -> None:
    """Trained on the VLM in memory, so by the names that its tensors have there; outside of the backbone refused."""
    for place, module in (
        ("seeing", "model.language_model.layers.0.mlp.up_proj"),
        ("tower", TOWER[0].removesuffix(".weight")),
    ):
        (root / place).mkdir()
        rows, columns = (24, 16) if place == "seeing" else (8, 8)
        factors = {f"base_model.model.{module}.lora_A.weight": torch.ones(1, columns),
                   f"base_model.model.{module}.lora_B.weight": torch.ones(rows, 1)}  # fmt: skip
        save_file(factors, root / place / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "some/vlm"}
        (root / place / "adapter_config.json").write_text(json.dumps(told))
    made, before = merged(root, recipe(root, "seeing", exp_weight=0.25)), loaded(root, "vlm")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(made.pop(name), before.pop(name) + 0.25)
    same(made, before)
    with pytest.raises(PlanError, match="outside of the language backbone"):
        plan(recipe(root, "tower"))


def words(directory: Path, tokens: dict[str, int]) -> None:
    Tokenizer(models.WordLevel(tokens, unk_token="w0")).save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("head", [False, True], ids=["tied VLM", "VLM with a head"])
@pytest.mark.parametrize("text_head", [False, True], ids=["tied text", "text with a head"])
def test_rows_are_shared_where_row_and_token_agree(root: Path, head: bool, text_head: bool) -> None:
    base = tiny.weights(0, dtype=torch.float32)
    tiny.save(root / "vlm", seen(base, head=head), config=CONFIG)
    for place in ("base", "math"):
        own = loaded(root, place)
        own |= {"lm_head.weight": own["model.embed_tokens.weight"] * 3} if text_head else {}
        tiny.save(root / place, own, config={"tie_word_embeddings": not text_head})
    tokens = {f"w{n}": n for n in range(tiny.VOCABULARY - 2)}  # two rows of padding
    words(root / "base", tokens)
    words(root / "math", tokens | {"w3": 4, "w4": 3})
    words(root / "vlm", tokens | {"<image>": tiny.VOCABULARY})
    made, before = merged(root, recipe(root, embeddings="shared-rows")), loaded(root, "vlm")
    one, other = loaded(root, "base"), loaded(root, "math")
    rows = [n for n in range(tiny.VOCABULARY - 2) if n not in (3, 4)]
    for role, place in (
        ("embed_tokens", "language_model.model.embed_tokens.weight"),
        ("lm_head", "language_model.lm_head.weight"),
    ):
        if place in before:
            text = "lm_head.weight" if role == "lm_head" and text_head else "model.embed_tokens.weight"
            wanted = before[place].clone()
            wanted[rows] += 0.5 * (other[text] - one[text])[rows]
            torch.testing.assert_close(made[place], wanted, rtol=1e-6, atol=1e-7)
            left = [n for n in range(ROWS) if n not in rows]
            assert torch.equal(made[place][left], before[place][left])
    unmapped = plan(recipe(root, embeddings="shared-rows")).backbone.left.get(0, ())
    assert unmapped == (("lm_head.weight",) if text_head and not head else ())


def test_shared_rows_need_tokenizers_and_one_shared_row(root: Path) -> None:
    told = recipe(root, embeddings="shared-rows")
    with pytest.raises(PlanError, match="has no tokenizer.json"):
        plan(told)
    for place in ("base", "math", "vlm"):
        words(root / place, {f"{place}{n}": n for n in range(4)} | {"w0": 4 + len(place)})
    with pytest.raises(PlanError, match="no row of .* means the same token"):
        plan(told)


def test_an_adapters_embedding_is_kept_out_and_said(root: Path) -> None:
    tiny.adapter(root / "lora", 3, targets=("q_proj", "embed_tokens"), base_model_name_or_path="base")
    made = plan(recipe(root, "lora"))
    assert any("changes model.embed_tokens.weight, which `embeddings: keep`" in note for note in made.notes)
    for place in ("base", "vlm"):
        words(root / place, {f"w{n}": n for n in range(tiny.VOCABULARY)})
    with pytest.raises(PlanError, match="changes only one of the embedding and the head, which the VLM ties"):
        plan(recipe(root, "lora", embeddings="shared-rows"))


def test_a_stranger_is_refused_unless_accepted(root: Path) -> None:
    """Of the same shapes and the same norms; a model's own step, and a bfloat16 copy, are kin."""
    tiny.save(root / "base", tiny.weights(99, dtype=torch.float32))
    with pytest.raises(PlanError, match=r"share no ancestor.* is -?0\.\d\d, expected at least 0.5; .*accept_base"):
        plan(recipe(root))
    made = plan(recipe(root, accept_base=True))
    assert any("they share no ancestor" in note for note in made.notes)
    tiny.save(root / "base", {n: t.bfloat16() for n, t in tiny.weights(0, dtype=torch.float32).items()})
    kin = plan(recipe(root)).backbone.kin
    assert [one.cosine > 0.99 for one in kin] == [True, True] and 0 < kin[0].distance < 0.1


def test_models_of_which_nothing_can_be_compared_are_told(root: Path) -> None:
    tiny.save(root / "base", {n: t * (t.ndim == 1) for n, t in loaded(root, "base").items()})
    assert sum("were not compared" in note for note in plan(recipe(root)).notes) == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("place", ["math", "base"])
def test_quantised_weights_are_refused_by_name(root: Path, dtype: torch.dtype, place: str) -> None:
    """By the plan, not by the comparison before it, which takes what numbers there are."""
    tiny.save(root / place, {n: t.to(dtype) if "up_proj" in n else t for n, t in loaded(root, place).items()})
    with pytest.raises(PlanError, match=r"up_proj.weight' as (I8|F8_E4M3), .*quantised and integer weights"):
        plan(recipe(root))


def test_the_sample_is_bounded_and_seen_in_every_layout(root: Path) -> None:
    kin = plan(recipe(root)).backbone.kin[0]
    assert kin.values <= ancestry.MATRICES * ancestry.ROWS * ancestry.COLUMNS
    tiny.save(root / "vlm", fused_by_group(loaded(root, "vlm"), 1), config=heads_of("one"))
    assert plan(recipe(root)).backbone.kin[0].cosine == pytest.approx(1, abs=0.01)


def test_numbers_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    values = torch.randn(64)
    for dtype, name in (
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.float64, "F64"),
    ):
        raw = values.to(dtype).view(torch.uint8).numpy().tobytes()
        assert list(ancestry.NUMBERS[name](raw)) == values.to(dtype).double().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "s.1." not in n}, "1 layers, which fit .*: layer 0 could be 0 or 1"),
        (lambda t: t | {n.replace("s.1.", "s.2."): x for n, x in t.items() if "s.1." in n}, "3 layers, and only 2"),
        (lambda t: t | {f"model.layers.{n}.q_norm.weight": torch.ones(8) for n in (0, 1)}, "q_norm.* nothing instead"),
        (lambda t: {n: x[:, :8] if "up_proj" in n else x for n, x in t.items()}, r"up_proj.weight' .* as \[24, 8\]"),
        (lambda t: t | {"model.memory.weight": torch.ones(3)}, "has 'model.memory.weight', for which"),
        (lambda t: t | {"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' as \[3\]"),
        (lambda t: {n: x for n, x in t.items() if n != "model.norm.weight"}, "lacks 'model.norm.weight'"),
    ],
    ids=["fewer layers", "more layers", "more tensors", "another shape", "surplus", "another norm", "no norm"],
)  # fmt: skip
def test_what_is_no_backbone_is_refused_by_name(root: Path, change: Callable[[Weights], Weights], message: str) -> None:
    """Fewer layers than the VLM's, all alike, fit in more than one way."""
    tiny.save(root / "math", {n: t.clone() for n, t in change(loaded(root, "math")).items()})
    with pytest.raises(PlanError, match=message):
        plan(recipe(root))


def test_two_backbones_of_one_shape_are_refused(root: Path) -> None:
    held = loaded(root, "vlm")
    tiny.save(
        root / "vlm", held | {n.replace("language", "talker"): t.clone() for n, t in held.items() if "language" in n}
    )
    with pytest.raises(PlanError, match="fits the language backbone of .* in several ways"):
        plan(recipe(root))


METHODS = [n for n in methods.names() if not (methods.get(n).gates or methods.get(n).measured_with_examples)]
"""All but those that need a file made with examples."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_a_backbone_and_keeps_the_rest(root: Path, name: str) -> None:
    """Those for one model move the VLM towards the expert: it is then the base."""
    most = methods.get(name).model_count[1]
    experts = ["math", "code"] if most is None and name != "passthrough" else ["math"]
    told = recipe(root, *experts, method=name, vl_weight=None, exp_weight=None)
    if most == 1:
        told = {"method": name, "base": str(root / "vlm"), "models": [str(root / "math")],
                "output": {"like": str(root / "vlm"), "align": "backbone"}}  # fmt: skip
    if name == "passthrough":
        told |= {"knobs": {"take": 1}}
    if "of" in methods.get(name).knobs:
        told |= {"knobs": {"of": "product"}}
    made, before = merged(root, told), loaded(root, "vlm")
    kept = [n for n in before if not n.startswith("language_model.model.layers") and "model.norm" not in n]
    assert len(kept) == 4 and all(torch.equal(made[n], before[n]) for n in kept)
    assert sum(not torch.equal(made[n], before[n]) for n in before) >= 4


def test_gates_by_the_vlms_names_merge_a_backbone(root: Path) -> None:
    held = {n: t for n, t in loaded(root, "vlm").items() if n.startswith("language_model.model.layers") and t.ndim == 2}
    prints = [open_checkpoint(root / name).fingerprint() for name in ("vlm", "math")]
    half = {n: torch.full((2, t.shape[0]), 0.5).numpy() for n, t in held.items()}
    write_gates(root / "gates.safetensors", half, kind="weight", models=prints)
    told = recipe(
        root, method="graft_convex", base=None, vl_weight=None, exp_weight=None, gates=str(root / "gates.safetensors")
    )
    made, expert, before = merged(root, told), loaded(root, "math"), loaded(root, "vlm")
    name = "layers.1.mlp.up_proj.weight"
    wanted = (before[f"language_model.model.{name}"] + expert[f"model.{name}"]) / 2
    torch.testing.assert_close(made[f"language_model.model.{name}"], wanted)
    assert all(torch.equal(made[n], before[n]) for n in TOWER)


def test_perception_early_and_reasoning_late(root: Path) -> None:
    rules = [{"where": {"layers": 0}, "exp_weight": 0.0}, {"where": {"layers": 1}, "exp_weight": [0.25]}]
    made, before = merged(root, recipe(root, rules=rules)), loaded(root, "vlm")
    quarter = expected(root, weight=0.25)
    for name in before:
        if ".layers.0." in name:
            torch.testing.assert_close(made[name], before[name], rtol=1e-6, atol=1e-7)
        elif ".layers.1." in name:
            torch.testing.assert_close(made[name], quarter[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(PlanError, match="matches no tensor"):
        plan(recipe(root, rules=[{"where": {"name": "vision_tower*"}, "exp_weight": 0.1}]))


def test_the_sugar_is_an_ordinary_recipe(root: Path) -> None:
    told = recipe(root, "math", "code", exp_weight=None, embeddings="keep", output={"dtype": "float32"})
    told["experts"] = [{"model": str(root / "math"), "exp_weight": 0.3}, {"model": str(root / "code"), "weight": 0.2}]
    plain = {"method": "task_arithmetic", "base": told["base"],
             "models": [{"model": told["vlm"], "weight": 1.0}, {"model": str(root / "math"), "weight": 0.3},
                        {"model": str(root / "code"), "weight": 0.2}],
             "output": {"dtype": "float32", "like": told["vlm"], "align": "backbone", "embeddings": "keep"},
    }  # fmt: skip
    assert load(told).to_dict() == load(plain).to_dict()
    assert plan(told).hash == plan(plain).hash
    (root / "r.yaml").write_text(yaml.safe_dump(told))
    written = CliRunner().invoke(app, ["explain", str(root / "r.yaml"), "--as-recipe"]).output
    assert plan(written).hash == plan(plain).hash


def test_the_vlm_has_examples_beside_it_as_an_expert_has(root: Path) -> None:
    vlm = {"model": str(root / "vlm"), "vl_weight": 0.7, "data": "seen.jsonl"}
    told = recipe(root, vlm=vlm, vl_weight=None, exp_weight=None,
                  experts=[{"model": str(root / "math"), "data": "read.jsonl"}])  # fmt: skip
    made = load(told).to_dict()
    assert [entry.get("data") for entry in made["models"]] == ["seen.jsonl", "read.jsonl"]
    assert made["models"][0]["weight"] == 0.7 and made["output"]["like"] == str(root / "vlm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vlm": None}, "vlm: 'exp_weight' stands without it"),
        ({"vlm": 3}, "vlm: got 3, expected a path"),
        ({"vlm": {"data": "x"}}, "vlm: got .* or a mapping with 'model'"),
        ({"vlm": {"model": "x", "weight": 1}}, "'x' has a weight of its own and one by vl_weight"),
        ({"experts": None}, "experts: the key is missing"),
        ({"experts": []}, r"experts: got \[\], expected a list"),
        ({"experts": [{"modle": "x"}]}, r"experts\[0\]: got .* 'model'"),
        ({"experts": [{"model": "x", "weight": 1, "exp_weight": 1}]}, r"experts\[0\]: weight and exp_weight"),
        ({"experts": [{"model": "x", "weight": 1}]}, "'x' has a weight of its own"),
        ({"models": ["x"]}, "has both vlm and models"),
        ({"slices": []}, "has both vlm and slices"),
        ({"method": "slerp"}, "vl_weight: slerp has no weights, its knobs are: t.*; drop vl_weight and exp_weight"),
        ({"exp_weight": [1, 2]}, "2 values for 1 experts"),
        ({"embeddings": "merge"}, "embeddings: got 'merge', expected .*keep"),
        ({"vl_wieght": 1}, "unknown key 'vl_wieght'; did you mean 'vl_weight'"),
        ({"output": {"like": "other"}}, "output.like: got 'other', and with `vlm`"),
        ({"output": {"tokenizer": "union"}}, "keeps its own; drop one"),
        ({"output": {"as": "adapter"}}, "is for `as: checkpoint`"),
        ({"rules": [{"where": {"layers": 1}, "exp_weight": 1, "knobs": {"weight": 2}}]}, r"rules\[0\]: has weights"),
    ],
)  # fmt: skip
def test_what_the_sugar_cannot_mean_is_refused(root: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(recipe(root, **change))


@pytest.mark.parametrize(
    ("output", "message"),
    [({"align": "backbone"}, "name it as `like`"), ({"embeddings": "keep"}, "say `align: backbone`")],
)
def test_align_needs_a_model_to_align_with(output: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load({"method": "average", "models": ["a"], "output": output})


def test_a_recipe_that_forgets_the_backbone_is_told_the_keys(root: Path) -> None:
    plain = {"method": "average", "models": [str(root / "vlm"), str(root / "math")]}
    for like in ("vlm", "math"):
        with pytest.raises(PlanError, match="by the keys `vlm` and `experts`"):
            plan(plain | {"output": {"like": str(root / like)}})


def test_a_vlm_alone_and_an_expert_of_weight_zero_are_refused(root: Path) -> None:
    with pytest.raises(PlanError, match="no model is named beside"):
        plan(recipe(root, "vlm", base=None, method="average"))
    with pytest.raises(PlanError, match=r"models\[1\] .*contributes nothing"):
        plan(recipe(root, exp_weight=0.0))
    assert plan(recipe(root, vl_weight=0.0)).backbone  # the expert swapped in: the VLM still gives all around it


def test_masks_need_whole_tensors_of_the_base(root: Path) -> None:
    tiny.save(root / "vlm", fused_plain(loaded(root, "vlm")), config=CONFIG)
    with pytest.raises(PlanError, match="writes a bit mask for each of the models"):
        plan(recipe(root, method="emr", vl_weight=None, exp_weight=None))


def test_workers_and_a_second_run_change_no_byte(root: Path) -> None:
    for place in ("base", "math", "vlm"):
        words(root / place, {f"w{n}": n for n in range(tiny.VOCABULARY - 1)})
    told = recipe(root, method="dare", embeddings="shared-rows", knobs={"density": 0.5})
    for out, workers in (("one", 1), ("two", 3)):
        graftkit.merge(told, root / out, workers=workers)
    assert (root / "one" / "model.safetensors").read_bytes() == (root / "two" / "model.safetensors").read_bytes()


def test_the_page_says_what_is_mapped_kept_and_unmapped(root: Path) -> None:
    (root / "r.yaml").write_text(yaml.safe_dump(recipe(root)))
    page = CliRunner().invoke(app, ["explain", str(root / "r.yaml")]).output
    assert "the recipe, written out:\n  method: task_arithmetic" in page and "align: backbone" in page
    assert "mapped: norm 5 (80); mlp 6 (2.3 k); attention 8 (1.5 k)" in page
    assert "kept as the VLM has it: embedding 1 (688); multi_modal_projector 1 (64); vision_tower 2 (128)" in page
    assert f"base {root / 'base'}: 2 layers of model.layers.*, unmapped: model.embed_tokens.weight" in page
    assert "median cosine 0.99" in page and len(page.splitlines()) < 40
    told = json.loads(CliRunner().invoke(app, ["explain", str(root / "r.yaml"), "--json"]).output)
    assert told["backbone"]["ancestry"][0]["matrices"] == 14
    record = graftkit.merge(root / "r.yaml", root / "out")
    assert record["backbone"] == told["backbone"]


def test_planning_reads_values_without_numpy(root: Path) -> None:
    (root / "r.yaml").write_text(yaml.safe_dump(recipe(root)))
    program = f"import sys; from graftkit.recipes.plan import plan; plan({str(root / 'r.yaml')!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "numba", "transformers"} & set(done.stdout.split())


def test_recipes_are_vlms_and_experts_too(root: Path) -> None:
    """Made first; what is not there yet is not sampled, and that is said."""
    half = {"method": "average", "models": [str(root / "math"), str(root / "code")]}
    (root / "half.yaml").write_text(yaml.safe_dump(half))
    graftkit.merge(half, root / "half")
    same(merged(root, recipe(root, "half.yaml")), merged(root, recipe(root, "half"), "again"))
    assert any("so whether it stands on the base was not measured" in n for n in plan(recipe(root, "half.yaml")).notes)
    tiny.save(root / "other", {n: t + 0.01 for n, t in loaded(root, "vlm").items()}, config=CONFIG)
    both = {"method": "average", "models": [str(root / "vlm"), str(root / "other")]}
    (root / "both.yaml").write_text(yaml.safe_dump(both))
    made = merged(root, recipe(root, vlm=str(root / "both.yaml")), "nested")
    assert torch.equal(made[TOWER[0]], merged(root, both, "plain")[TOWER[0]])


def test_an_adapter_placed_on_the_base_needs_no_acceptance(root: Path) -> None:
    tiny.adapter(root / "lora", 3, base_model_name_or_path="another/name")
    with pytest.raises(PlanError, match="was trained on 'another/name'"):
        plan(recipe(root, "lora"))
    told = recipe(root, experts=[f"{root / 'base'}+{root / 'lora'}"])
    same(merged(root, told), merged(root, recipe(root, "lora", accept_base=True), "again"))


@pytest.mark.parametrize("rule", ["metagpt", "nan"])
def test_weights_by_a_rule_look_at_the_backbone_alone(root: Path, rule: str) -> None:
    told = recipe(root, "math", "code", vl_weight=None, exp_weight=None, knobs={"weight": {"from": rule}})
    made = merged(root, told)
    bare = {
        named("bare", n.removeprefix("language_model.")): t for n, t in loaded(root, "vlm").items() if "language" in n
    }
    bare["embed_tokens.weight"] = bare["embed_tokens.weight"][: tiny.VOCABULARY]
    tiny.save(root / "blind", bare)
    plain = told["knobs"] | {}
    text = {"method": "task_arithmetic", "base": told["base"], "knobs": plain,
            "models": [str(root / name) for name in ("blind", "math", "code")],
            "rules": [{"where": {"role": "embedding"}, "method": "passthrough"}]}  # fmt: skip
    wanted = merged(root, text, "text")
    for name in wanted:
        if "embed" not in name:
            torch.testing.assert_close(made[named("nested", name)], wanted[name], rtol=1e-5, atol=1e-6)


def test_without_a_base_the_expert_is_what_the_backbone_is_found_by(root: Path) -> None:
    made = merged(root, recipe(root, method="slerp", base=None, vl_weight=None, exp_weight=None, knobs={"t": 1.0}))
    expert, before = loaded(root, "math"), loaded(root, "vlm")
    for name in before:
        text = "model." + name.removeprefix("language_model.model.")
        wanted = expert[text] if name.startswith("language") and "embed" not in name else before[name]
        torch.testing.assert_close(made[name], wanted, rtol=1e-5, atol=1e-6)
