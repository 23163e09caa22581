"""Backbones of VLMs on plain tensors: layouts, fused projections, vocabularies, adapters, ancestry, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import graftkit
import seers
import tiny
from graftkit.errors import PlanError
from graftkit.recipes import ancestry
from graftkit.recipes.plan import plan
from seers import (
    CONFIG,
    FUSIONS,
    ROWS,
    TOWER,
    Weights,
    expected,
    fused_by_group,
    fused_plain,
    heads_of,
    loaded,
    merged,
    named,
    recipe,
    same,
    seen,
    words,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A text base, two experts and a VLM of it, in float32."""
    return seers.family(tmp_path)


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


def test_an_expert_whose_backbone_is_the_base_is_told(root: Path) -> None:
    """Its embeddings alone were trained, and they are not merged: no refusal, since only a sample was read."""
    held = {n: t + 1 if "embed" in n else t for n, t in loaded(root, "base").items()}
    tiny.save(root / "spoken", held)
    told = [note for note in plan(recipe(root, "math", "spoken")).notes if "are equal in every value" in note]
    assert len(told) == 1 and "spoken' and base" in told[0]


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
