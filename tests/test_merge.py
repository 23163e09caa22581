"""Whole merges of tiny checkpoints: values, formats, determinism, output directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import graftkit
import tiny
from graftkit.checkpoints import sources
from graftkit.errors import CheckpointError, NonFiniteError, OutputError, PlanError
from graftkit.execution import blocks


def merged(out: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(out.glob("*.safetensors")) for k, v in load_file(file).items()}


def recipe_of(family: tuple[Path, Path, Path], **changes: object) -> dict:
    base, math, code = map(str, family)
    return {
        "method": "task_arithmetic",
        "base": base,
        "models": [{"model": math, "weight": 0.6}, {"model": code, "weight": 0.4}],
        **changes,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_task_arithmetic_is_the_float64_result_rounded_once(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    family = tiny.family(tmp_path, dtype=dtype, shards=shards)
    graftkit.merge(recipe_of(family), tmp_path / "out")
    base, math, code = (merged(path) for path in family)
    for name, out in merged(tmp_path / "out").items():
        assert out.dtype == dtype
        b = base[name].double()
        tiny.half_unit(out, b + 0.6 * (math[name].double() - b) + 0.4 * (code[name].double() - b))


@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_inputs_of_mixed_dtypes_become_the_dtype_that_the_recipe_says(tmp_path: Path, wanted: str) -> None:
    base = tiny.weights(0, dtype=torch.float32)
    math = {
        k: v.to(torch.bfloat16) if "mlp" in k else v for k, v in tiny.weights(1, dtype=torch.float16, near=base).items()
    }
    paths = tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "math", math)
    recipe = {"method": "average", "models": list(map(str, paths)), "output": {"dtype": wanted}}
    graftkit.merge(recipe, tmp_path / "out")
    for name, out in merged(tmp_path / "out").items():
        assert out.dtype == getattr(torch, wanted)
        tiny.half_unit(out, (base[name].double() + math[name].double()) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare", "slerp", "passthrough"])
def test_every_method_in_blocks_equals_the_method_on_whole_tensors(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftkit.methods import get
    from graftkit.methods.random import Keyed, key_of
    from graftkit.recipes.plan import plan

    family = tiny.family(tmp_path, dtype=torch.float32)
    used = family[1:2] if method == "passthrough" else family[1:]
    planned = plan(recipe_of(family, method=method, models=list(map(str, used)), seed=3))
    monkeypatch.setattr(blocks, "BLOCK", 100)  # every tensor in several blocks, none of them a multiple
    graftkit.execute(planned, tmp_path / "out")
    base, math, code = (merged(path) for path in family)
    for name, out in merged(tmp_path / "out").items():
        stack = torch.stack([math[name], code[name]][: len(used)]).double()
        keys = tuple(key_of(3, planned.sources[k + 1].content, 0, name) for k in range(len(used)))
        whole = get(method).run(base=base[name].double(), models=stack, rng=Keyed(keys))
        assert torch.allclose(out.double(), whole, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_random_masks_depend_on_neither_files_nor_flags(
    tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in one file or in shards, known by samples or by every byte: the same masks, the old ones."""
    monkeypatch.setattr(sources, "SMALL", small)
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 99)
    results = []
    for k, (shards, full_hash) in enumerate([(1, False), (3, False), (1, True)]):
        family = tiny.family(tmp_path / str(k), shards=shards)
        (tmp_path / str(k) / "inner.yaml").write_text("method: average\nmodels: [math, code]\n")
        models = [*map(str, family[1:]), str(tmp_path / str(k) / "inner.yaml")]
        monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
        graftkit.merge(recipe_of(family, method="dare", models=models), tmp_path / f"out{k}", full_hash=full_hash)
        results.append(merged(tmp_path / f"out{k}"))
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())
    single = sources.open_checkpoint(tmp_path / "0" / "math")
    assert single.content() == single.fingerprint()


@pytest.mark.parametrize("recipe", ["task_arithmetic", "ties", "dare", "slerp", "ties-model"])
def test_workers_and_memory_change_no_byte(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 96)
    family = tiny.family(tmp_path, shards=2)
    method, _, scope = recipe.partition("-")
    changes = {"method": method, "models": [str(family[1]), str(family[2])], "knobs": {"scope": scope} if scope else {}}
    results = []
    for k, options in enumerate(
        ({"workers": 1}, {"workers": 2}, {"workers": 8}, {"workers": 4, "memory": 500_000_000})
    ):
        graftkit.merge(recipe_of(family, **changes), tmp_path / f"out{k}", **options)
        files = sorted(p for p in (tmp_path / f"out{k}").iterdir() if p.name != "graft.json")
        results.append([(p.name, p.read_bytes()) for p in files])
    assert results[0] == results[1] == results[2] == results[3]


def test_a_model_listed_twice_gets_two_masks_and_order_does_not_matter(tmp_path: Path) -> None:
    family = tiny.family(tmp_path, dtype=torch.float32)
    _base, math, code = map(str, family)
    once = recipe_of(family, method="dare", models=[math])
    twice = recipe_of(family, method="dare", models=[math, math])
    there, back = (recipe_of(family, method="dare", models=list(order)) for order in ((math, code), (code, math)))
    for name, recipe in (("once", once), ("twice", twice), ("there", there), ("back", back)):
        graftkit.merge(recipe, tmp_path / name)
    start, one, two = (merged(tmp_path / name) for name in ("base", "once", "twice"))
    differ = [not torch.allclose(2 * (one[n] - start[n]), two[n] - start[n], atol=1e-5) for n in start]
    assert all(differ)
    for left, right in zip(merged(tmp_path / "there").values(), merged(tmp_path / "back").values(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_the_output_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family = tiny.family(tmp_path)
    graftkit.merge(recipe_of(family, output={"shard": "8KB"}), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    for name, tensor in merged(tmp_path / "out").items():
        assert torch.equal(state[name], tensor)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert {"generation_config.json", "chat_template.jinja", "README.md", "graft.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_the_file_is_byte_for_byte_the_librarys(tmp_path: Path) -> None:
    base = tiny.weights(0) | {
        "extra.scalar": torch.tensor(2.5),
        "extra.empty": torch.zeros(0, 3),
        "extra.count": torch.tensor([1, 2]),
    }
    path = tiny.save(tmp_path / "base", base)
    graftkit.merge({"method": "passthrough", "models": [str(path)]}, tmp_path / "out")
    save_file(base, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_an_adapter_merges_as_its_dense_delta(tmp_path: Path) -> None:
    family = tiny.family(tmp_path, dtype=torch.float32)
    path = tiny.adapter(tmp_path / "lora", 5)
    recipe = recipe_of(family, models=[{"model": str(path), "weight": 0.5}, {"model": str(family[2]), "weight": 0.25}])
    graftkit.merge(recipe, tmp_path / "out")
    base, code, lora = merged(family[0]), merged(family[2]), load_file(path / "adapter_model.safetensors")
    for name, out in merged(tmp_path / "out").items():
        b = base[name].double()
        module = "base_model.model." + name.removesuffix(".weight")
        product = 0.0
        if f"{module}.lora_A.weight" in lora:
            product = 2.0 * lora[f"{module}.lora_B.weight"].double() @ lora[f"{module}.lora_A.weight"].double()
        tiny.half_unit(out, b + 0.5 * product + 0.25 * (code[name].double() - b))


def test_average_of_adapters_stands_on_the_base(tmp_path: Path) -> None:
    family = tiny.family(tmp_path, dtype=torch.float32)
    paths = [str(tiny.adapter(tmp_path / f"lora{k}", k)) for k in (5, 6)]
    graftkit.merge({"method": "average", "base": str(family[0]), "models": paths}, tmp_path / "average")
    graftkit.merge(
        {"method": "task_arithmetic", "base": str(family[0]), "models": paths, "knobs": {"weight": 0.5}},
        tmp_path / "sum",
    )
    for left, right in zip(merged(tmp_path / "average").values(), merged(tmp_path / "sum").values(), strict=True):
        assert torch.allclose(left, right, atol=1e-7)


def test_a_recipe_is_a_model_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    family = tiny.family(tmp_path, dtype=torch.float32)
    base, math, code = map(str, family)
    tiny.recipe(tmp_path, f"method: task_arithmetic\nbase: {base}\nmodels: [{math}, {code}]\nknobs: {{weight: 0.5}}\n")
    outer = graftkit.Recipe(method="average", models=[{"model": "recipe.yaml"}, {"model": math}], directory=tmp_path)
    record = graftkit.merge(outer, tmp_path / "out")
    assert [i["kind"] for i in record["inputs"]] == ["recipe", "checkpoint"]
    first, second = merged(family[1]), merged(family[2])
    for name, out in merged(tmp_path / "out").items():
        assert torch.allclose(out, 0.5 * (first[name] + second[name]) / 2 + first[name] / 2, atol=1e-7)


def test_a_recipe_among_its_own_sources_is_refused(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path, "method: average\nmodels: [recipe.yaml]\n")
    with pytest.raises(PlanError, match="among its own sources"):
        graftkit.plan(path)


def test_the_record_says_what_the_cast_swallowed(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    record = graftkit.merge(recipe_of(family, knobs={"scale": 0.02}), tmp_path / "out")
    base, out = merged(family[0]), merged(tmp_path / "out")
    math, code = merged(family[1]), merged(family[2])
    for told in record["tensors"]:
        b = base[told["name"]].double()
        wanted = 0.02 * (0.6 * (math[told["name"]].double() - b) + 0.4 * (code[told["name"]].double() - b))
        real = out[told["name"]].double() - b
        assert np.isclose(told["delta_norm"], wanted.norm(), rtol=1e-3)
        assert np.isclose(told["cast_error_norm"], (real - wanted).norm(), rtol=1e-3)
        moved = wanted.abs() > 1e-9
        assert abs(told["unchanged"] - ((real == 0) & moved).sum() / moved.sum()) < 0.05
    assert record == json.loads((tmp_path / "out" / "graft.json").read_text())


def test_integers_are_copied_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    base, math = tiny.weights(0), tiny.weights(1)
    paths = [
        tiny.save(tmp_path / n, w | {"steps": torch.tensor([1, 2, 3])}) for n, w in (("base", base), ("math", math))
    ]
    graftkit.merge({"method": "average", "models": list(map(str, paths))}, tmp_path / "out")
    assert merged(tmp_path / "out")["steps"].tolist() == [1, 2, 3]
    tiny.save(tmp_path / "math", math | {"steps": torch.tensor([1, 2, 4])})
    with pytest.raises(CheckpointError, match=r"steps.*differs"):
        graftkit.merge({"method": "average", "models": list(map(str, paths))}, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "average"])
def test_nan_and_infinity_are_refused_by_model_and_tensor(tmp_path: Path, value: float, method: str) -> None:
    family = tiny.family(tmp_path)
    broken = merged(family[2])
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    tiny.save(tmp_path / "code", broken)
    models = [str(family[1]), str(family[2])]
    with pytest.raises(NonFiniteError, match=r"code.*layers\.1\.mlp\.up_proj"):
        graftkit.merge(recipe_of(family, method=method, models=models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    family = tiny.family(tmp_path, dtype=torch.float32)
    with pytest.raises(NonFiniteError, match="not finite in F16"):
        graftkit.merge(recipe_of(family, knobs={"scale": 1e9}, output={"dtype": "float16"}), tmp_path / "out")


def test_an_output_that_holds_anything_is_refused_and_replaced_whole_when_asked(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00009.safetensors").write_text("stale")
    with pytest.raises(OutputError, match="--overwrite"):
        graftkit.merge(recipe_of(family), tmp_path / "out")
    assert (tmp_path / "out" / "model-00001-of-00009.safetensors").read_text() == "stale"
    graftkit.merge(recipe_of(family), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


@pytest.mark.parametrize("place", ["base", "math", "."])
def test_an_output_that_holds_an_input_is_refused_even_when_told_to_overwrite(tmp_path: Path, place: str) -> None:
    family = tiny.family(tmp_path)
    with pytest.raises(OutputError, match="an input of this merge"):
        graftkit.merge(recipe_of(family), tmp_path / place, overwrite=True)
    assert all((path / "model.safetensors").is_file() for path in family)


def test_no_room_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    family = tiny.family(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(OutputError, match="the disk has"):
        graftkit.merge(recipe_of(family), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_metadata_and_tensor_order_are_readable_by_the_library(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    graftkit.merge(recipe_of(family), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tiny.shapes())


def test_further_chat_templates_go_along(tmp_path: Path) -> None:
    """Transformers keeps those of a tokenizer that has several in a directory of their own."""
    family = tiny.family(tmp_path)
    (family[0] / "additional_chat_templates").mkdir()
    (family[0] / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    graftkit.merge(recipe_of(family), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
