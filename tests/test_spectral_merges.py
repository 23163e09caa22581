"""Methods for matrices in whole merges: the tensors that they are for, adapters, experts, weights that lie turned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import graftkit
import tiny
from graftkit import methods
from graftkit.checkpoints.adapters import open_adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.recipes.matrices import is_matrix

EVERY = ("tsv", "iso_c", "iso_cts", "knots", "wudi", "opt_merge")


def paths(models: Any) -> list[str]:
    return [str(model) for model in models]


def held(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize("name", EVERY)
def test_matrices_go_by_the_method_and_all_else_by_the_mean(tmp_path: Path, name: str) -> None:
    base, *tuned = tiny.family(tmp_path, dtype=torch.float32)
    recipe = {"method": name, "base": str(base), "models": paths(tuned), "knobs": {"weight": [1.0, 0.5], "scale": 0.8}}
    made = graftkit.merge(recipe, tmp_path / "out")
    used = {line["name"]: line["method"] for line in made["tensors"]}
    first, one, other, out = (held(d) for d in (base, *tuned, tmp_path / "out"))
    assert {n for n, method in used.items() if method == name} == {n for n in out if n.endswith("_proj.weight")}
    for tensor, got in out.items():
        mean = first[tensor] + 0.8 * ((one[tensor] - first[tensor]) + 0.5 * (other[tensor] - first[tensor])) / 2
        models = torch.stack([one[tensor], other[tensor]])
        by = methods.get(name).run(base=first[tensor], models=models, weight=[1.0, 0.5], scale=0.8)
        wanted = by if used[tensor] == name else mean
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert used[tensor] == name or used[tensor] == "task_arithmetic"


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 6), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (3, 8, 6), True),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (3, 8), False),
        ("model.layers.0.mlp.up_proj.bias", (8,), False),
        ("model.layers.0.mixer.A_log", (8, 4), False),
        ("model.layers.0.mixer.conv1d.weight", (8, 1, 4), False),
        ("vision_tower.patch_embedding.weight", (8, 6), False),
        ("model.embed_tokens.weight", (99, 6), False),
        ("lm_head.weight", (99, 6), False),
        ("visual.attn.in_proj_weight", (24, 8), True),
    ],
)
def test_what_is_a_matrix(name: str, shape: tuple[int, ...], matrix: bool) -> None:
    assert is_matrix(TensorInfo(name, "F32", shape, Path("x"), 0, 0)) == matrix


def products(directory: Path) -> dict[str, np.ndarray]:
    adapter, made = open_adapter(directory), {}
    for name in adapter.factors:
        low_rank = adapter.load(name, np.float64)
        made[name] = low_rank.left @ low_rank.right
    return made


PATHS = [
    ("knots", {"density": 0.5}, "frame"),
    ("wudi", {"solver": "exact"}, "core"),
    ("tsv", {"svd": "sketched"}, "core"),
]


@pytest.mark.parametrize(("name", "knobs", "path"), PATHS)
def test_adapters_are_merged_by_their_factors(tmp_path: Path, name: str, knobs: dict[str, Any], path: str) -> None:
    """Ranks of 3 and 2, one module in one adapter only: there the other is no model of the merge."""
    models = [
        tiny.adapter(tmp_path / "one", 1, rank=3),
        tiny.adapter(tmp_path / "two", 2, rank=2, targets=("q_proj", "up_proj")),
    ]
    recipe = {"method": name, "models": paths(models), "knobs": knobs, "output": {"as": "adapter", "rank": "exact"}}
    planned = graftkit.plan(recipe)
    assert {step.form.path for step in planned.steps if step.form} == {path}
    graftkit.execute(planned, tmp_path / "out")
    found, parts = products(tmp_path / "out"), [products(model) for model in models]
    assert set(found) == set(parts[0]) | set(parts[1])
    for tensor, delta in found.items():
        stack = torch.from_numpy(np.stack([part.get(tensor, 0 * delta) for part in parts]))
        wanted = methods.get(name).run(base=torch.zeros_like(stack[0]), models=stack, **knobs).numpy()
        assert np.linalg.norm(delta - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_adams_wudi_of_adapters_goes_by_rows(tmp_path: Path) -> None:
    models = [tiny.adapter(tmp_path / str(k), k) for k in range(2)]
    recipe = {"method": "wudi", "models": paths(models), "output": {"as": "adapter", "rank": 8}}
    for solver, path in (("adam", "rows"), ("early_stopped", "core")):
        planned = graftkit.plan({**recipe, "knobs": {"solver": solver, "steps": 3}})
        assert {step.form.path for step in planned.steps if step.form} == {path}
        graftkit.execute(planned, tmp_path / solver)
        assert len(products(tmp_path / solver)) == 4


@pytest.mark.parametrize(("family", "inputs"), [("gpt2", "rows"), ("llama", "columns")])
def test_a_family_that_keeps_inputs_in_rows_has_them_turned(tmp_path: Path, family: str, inputs: str) -> None:
    draw, places = torch.Generator().manual_seed(0), []
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": family}))
        save_file({"h.0.mlp.c_fc.weight": torch.randn(6, 9, generator=draw)}, tmp_path / name / "model.safetensors")
        places.append(tmp_path / name)
    recipe = {"method": "wudi", "base": str(places[0]), "models": paths(places[1:])}
    planned = graftkit.plan(recipe)
    assert planned.steps[0].knobs["inputs"] == inputs
    graftkit.execute(planned, tmp_path / "out")
    base, *tuned = (held(place)["h.0.mlp.c_fc.weight"] for place in places)
    wanted = methods.get("wudi").run(base=base, models=torch.stack(tuned), inputs=inputs)
    torch.testing.assert_close(held(tmp_path / "out")["h.0.mlp.c_fc.weight"], wanted, rtol=1e-5, atol=1e-6)
    said = graftkit.plan({**recipe, "knobs": {"inputs": "columns"}})
    assert said.steps[0].knobs["inputs"] == "columns"


@pytest.mark.parametrize(("family", "turned"), [("gpt_oss", True), ("qwen3_moe", False)])
def test_each_fused_expert_is_a_matrix_of_its_own(tmp_path: Path, family: str, turned: bool) -> None:
    draw, places = torch.Generator().manual_seed(0), []
    name, bias = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj_bias"
    for place in ("base", "one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps({"model_type": family}))
        tensors = {name: torch.randn(3, 6, 8, generator=draw), bias: torch.randn(3, 8, generator=draw)}
        save_file(tensors, tmp_path / place / "model.safetensors")
        places.append(tmp_path / place)
    made = graftkit.merge({"method": "wudi", "base": str(places[0]), "models": paths(places[1:])}, tmp_path / "out")
    assert [line["method"] for line in made["tensors"]].count("wudi") == 3
    base, *tuned = (held(place) for place in places)
    out = held(tmp_path / "out")
    mean = (tuned[0][bias] + tuned[1][bias]) / 2
    torch.testing.assert_close(out[bias], mean, rtol=1e-5, atol=1e-6)
    for e in range(3):
        models = torch.stack([part[name][e] for part in tuned])
        wanted = methods.get("wudi").run(base=base[name][e], models=models, inputs="rows" if turned else "columns")
        torch.testing.assert_close(out[name][e], wanted, rtol=1e-5, atol=1e-6)


def test_workers_change_no_byte(tmp_path: Path) -> None:
    base, *tuned = tiny.family(tmp_path)
    recipe = {"method": "tsv", "base": str(base), "models": paths(tuned)}
    for workers in (1, 2):
        graftkit.merge(recipe, tmp_path / f"out{workers}", workers=workers)
    one, two = (load_file(tmp_path / f"out{workers}" / "model.safetensors") for workers in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
