"""Recipes of a VLM and text experts: every method, the keys and what they cannot mean, the page, rules by layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import graftkit
import seers
import tiny
from graftkit import methods
from graftkit.checkpoints.gates import write_gates
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.cli import app
from graftkit.errors import PlanError, RecipeError
from graftkit.recipes.plan import plan
from graftkit.recipes.recipe import load
from seers import (
    CONFIG,
    TOWER,
    expected,
    fused_plain,
    loaded,
    merged,
    named,
    recipe,
    same,
    words,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A text base, two experts and a VLM of it, in float32."""
    return seers.family(tmp_path)


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
