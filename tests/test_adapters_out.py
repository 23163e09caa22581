"""Merges that leave as adapters: equal to the dense delta, loaded by PEFT, and made without the base's weights."""

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
from graftkit.checkpoints.adapters import open_adapter
from graftkit.errors import GraftError, PlanError

Recipe = dict[str, Any]


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    """An adapter's deltas as dense tensors in float64."""
    adapter = open_adapter(directory)
    made = {}
    for name in adapter.factors:
        low_rank = adapter.load(name, np.float64)
        made[name] = torch.from_numpy(low_rank.left @ low_rank.right)
    return made


def three(root: Path) -> tuple[Path, list[Path]]:
    """A base, and adapters of different ranks, scales and targets."""
    base = tiny.save(root / "base", tiny.weights(0))
    return base, [
        tiny.adapter(root / "one", 1, rank=4),
        tiny.adapter(root / "two", 2, rank=3, targets=("q_proj", "up_proj"), use_rslora=True),
        tiny.adapter(root / "three", 3, rank=2, targets=("down_proj", "k_proj"), alpha_pattern={"k_proj": 7}),
    ]


def weighted(models: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The dense weighted sum of adapters."""
    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(models, weights, strict=True):
        for name, delta in deltas(path).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def merge(tmp_path: Path, models: list[Path], output: Recipe, **more: Any) -> tuple[Path, dict[str, Any]]:
    recipe = {"method": "task_arithmetic", "models": [str(m) for m in models]} | more
    recipe["output"] = {"as": "adapter"} | output
    return tmp_path / "out", graftkit.merge(recipe, tmp_path / "out")


@pytest.mark.parametrize("rank", ["exact", {"energy": 1.0}, 9])
@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_the_whole_sum_is_the_dense_sum(tmp_path: Path, rank: Any, method: str) -> None:
    _, models = three(tmp_path)
    weights = [0.5, 0.3, 0.2]
    listed = [{"model": str(m), "weight": w} for m, w in zip(models, weights, strict=True)]
    recipe = {"method": method, "models": listed, "output": {"as": "adapter", "rank": rank, "dtype": "float32"}}
    record = graftkit.merge(recipe, tmp_path / "out")
    found, wanted = deltas(tmp_path / "out"), weighted(models, weights)
    assert set(found) == set(wanted)
    for name, delta in wanted.items():
        assert torch.linalg.norm(found[name] - delta) <= 1e-6 * torch.linalg.norm(delta)
    assert all(t["energy"] >= 1 - 1e-12 for t in record["tensors"])


@pytest.mark.parametrize("rank", [1, 3, {"energy": 0.9}, None])
def test_a_truncated_sum_is_the_best_of_its_rank(tmp_path: Path, rank: Any) -> None:
    _, models = three(tmp_path)
    output = {} if rank is None else {"rank": rank}
    share = 0.99 if rank is None else rank["energy"] if isinstance(rank, dict) else None
    _, record = merge(tmp_path, models, output, knobs={"weight": [1.0, -0.7, 0.4]})
    found, wanted = deltas(tmp_path / "out"), weighted(models, [1.0, -0.7, 0.4])
    for told in record["tensors"]:
        dense = wanted[told["name"]]
        values = torch.linalg.svdvals(dense)
        kept = torch.cumsum(values**2, 0) / (values**2).sum()
        fewest = int((kept < share).sum()) + 1 if share else min(rank, int((values > 1e-6 * values[0]).sum()))
        assert told["rank"] == fewest
        best = torch.linalg.norm(values[fewest:])
        error = torch.linalg.norm(found[told["name"]] - dense)
        assert error <= best * (1 + 1e-6) + 1e-6 * values[0]
        assert told["error_norm"] == pytest.approx(float(best), abs=1e-6 * float(values[0]))
        assert told["delta_norm"] == pytest.approx(float(torch.linalg.norm(dense)), rel=1e-6)


def test_factors_are_balanced(tmp_path: Path) -> None:
    """Truncated ones to rounding; those that only stand side by side to a factor of two, for that rounds nothing."""
    _, models = three(tmp_path)
    for rank, apart in (("exact", 2.0), (3, 1.0)):
        merge(tmp_path / str(rank), models, {"rank": rank})
        tensors = load_file(tmp_path / str(rank) / "out" / "adapter_model.safetensors")
        for name, b in tensors.items():
            if "lora_B" in name:
                ratio = b.norm(dim=0) / tensors[name.replace("lora_B", "lora_A")].norm(dim=1)
                assert torch.maximum(ratio, 1 / ratio).max() <= apart * (1 + 1e-5)


def test_every_a_of_factors_side_by_side_is_an_adapters_own_times_a_power_of_two(tmp_path: Path) -> None:
    _, models = three(tmp_path)
    merge(tmp_path, models, {"rank": "exact"}, knobs={"weight": [0.7, -0.3, 1.9]})
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for model in models:
        for name, tensor in load_file(model / "adapter_model.safetensors").items():
            if "lora_A" in name:
                fractions, own = (torch.frexp(half).mantissa for half in (made[name], tensor.float()))
                assert all((fractions == row).all(dim=1).any() for row in own)


def test_a_spool_whose_ranks_are_known_becomes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other spools are gathered into one, to the same bytes."""
    _, models = three(tmp_path)
    merge(tmp_path / "known", models, {"rank": "exact"})
    monkeypatch.setattr("graftkit.execution.adapters.largest", lambda plan: [])
    merge(tmp_path / "gathered", models, {"rank": "exact"})
    known, gathered = (tmp_path / name / "out" / "adapter_model.safetensors" for name in ("known", "gathered"))
    assert known.read_bytes() == gathered.read_bytes()

    def refused(*_: Any) -> None:
        raise AssertionError("gathered")

    monkeypatch.undo()
    monkeypatch.setattr("graftkit.checkpoints.adapter_sink.AdapterSink._gather", refused)
    merge(tmp_path / "again", models, {"rank": "exact"})
    with pytest.raises(AssertionError, match="gathered"):
        merge(tmp_path / "share", models, {"rank": {"energy": 0.5}})


@pytest.mark.parametrize("base", ["absent", "unreadable"])
def test_the_bases_weights_are_not_read(tmp_path: Path, base: str) -> None:
    place, models = three(tmp_path)
    more = {}
    if base == "unreadable":
        file = place / "model.safetensors"
        raw = file.read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        file.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))  # NaN everywhere
        more = {"base": str(place)}
    for k, rank in enumerate(("exact", 4, {"energy": 0.95})):
        merge(tmp_path / str(k), models, {"rank": rank}, **more)
    merge(tmp_path / "ties", models, {"rank": 6}, method="ties", **more)
    assert len(deltas(tmp_path / "ties" / "out")) == len(weighted(models, [1, 1, 1]))


@pytest.mark.parametrize("method", ["ties", "dare", "breadcrumbs", "sce"])
def test_element_wise_methods_are_sketched_from_dense_rows(tmp_path: Path, method: str) -> None:
    """At full rank the adapter's delta is that of the checkpoint that the same recipe makes of a base of zeros."""
    base, models = three(tmp_path)
    zeros = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tiny.weights(0).items()}
    tiny.save(tmp_path / "zeros", zeros)
    recipe: Recipe = {"method": method, "models": [str(m) for m in models], "accept_base": True}
    graftkit.merge(recipe | {"base": str(tmp_path / "zeros")}, tmp_path / "dense")
    record = graftkit.merge(recipe | {"base": str(base), "output": {"as": "adapter", "rank": 16}}, tmp_path / "out")
    found, dense = deltas(tmp_path / "out"), load_file(tmp_path / "dense" / "model.safetensors")
    for name, delta in found.items():
        torch.testing.assert_close(delta.float(), dense[name], rtol=1e-4, atol=1e-6)
    small = graftkit.merge(recipe | {"output": {"as": "adapter", "rank": 2}}, tmp_path / "small")
    whole = {told["name"]: told for told in record["tensors"]}
    for told in small["tensors"]:
        delta = dense[told["name"]].double()
        values = torch.linalg.svdvals(delta)
        error = torch.linalg.norm(deltas(tmp_path / "small")[told["name"]] - delta)
        assert told["delta_norm"] == pytest.approx(whole[told["name"]]["delta_norm"], rel=1e-6)
        assert told["error_norm"] == pytest.approx(float(error), rel=1e-4, abs=1e-6 * float(values[0]))
        assert error <= 1.01 * torch.linalg.norm(values[2:]) + 1e-6


def test_workers_and_an_interruption_change_no_byte(tmp_path: Path) -> None:
    _, models = three(tmp_path)
    made = []
    for workers in (1, 2, 8):
        recipe = {"method": "task_arithmetic", "models": [str(m) for m in models], "output": {"as": "adapter"}}
        graftkit.merge(recipe, tmp_path / str(workers), workers=workers)
        made.append((tmp_path / str(workers) / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftkit.execution import adapters

    _, models = three(tmp_path)
    recipe = {"method": "task_arithmetic", "models": [str(m) for m in models], "output": {"as": "adapter", "rank": 2}}
    graftkit.merge(recipe, tmp_path / "whole")
    plain, left = adapters.from_factors, [3]

    def failing(*given: Any) -> dict[str, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "from_factors", failing)
        with pytest.raises(KeyboardInterrupt):
            graftkit.merge(recipe, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    record = graftkit.merge(recipe, tmp_path / "out")
    assert record["execution"]["resumed_steps"] == 3
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "graft.json",
    ]  # fmt: skip


def test_a_delta_of_zeros_leaves_no_module(tmp_path: Path) -> None:
    one = tiny.adapter(tmp_path / "one", 1, rank=2)
    _, record = merge(tmp_path, [one, tiny.adapter(tmp_path / "two", 2, targets=("up_proj",))], {},
                      rules=[{"where": {"name": "*q_proj*"}, "knobs": {"scale": 0.0}}])  # fmt: skip
    assert {t["rank"] for t in record["tensors"] if "q_proj" in t["name"]} == {0}
    assert not any("q_proj" in name for name in deltas(tmp_path / "out"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "ties"}, "output.rank is missing: ties makes deltas of full rank.*such as 16"),
        ({"method": "ties", "rank": "exact"}, "output.rank is `exact`: ties"),
        ({"method": "slerp", "rank": 4}, "cannot be merged by slerp without the base's weights"),
        ({"method": "average", "knobs": {"normalize": False}, "rank": 4}, "without the base's weights"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path, recipe: Recipe, message: str) -> None:
    _, models = three(tmp_path)
    rank = recipe.pop("rank", None)
    output = {"as": "adapter"} | ({"rank": rank} if rank else {})
    with pytest.raises(PlanError, match=message):
        graftkit.plan(recipe | {"models": [str(m) for m in models[:2]], "output": output})


def test_a_share_that_takes_more_than_the_tensor_is_refused(tmp_path: Path) -> None:
    _, models = three(tmp_path)
    with pytest.raises(GraftError, match="factors larger than the tensor"):
        merge(tmp_path, models, {"rank": {"energy": 0.9999}}, method="ties")


def test_a_base_that_nobody_records_is_not_needed_either(tmp_path: Path) -> None:
    models = [tiny.adapter(tmp_path / str(k), k, base_model_name_or_path="") for k in (1, 2)]
    merge(tmp_path, models, {"rank": 2})
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "unknown"


def test_what_stands_around_a_method_stands_around_it_here(tmp_path: Path) -> None:
    """Preparations and finishers see dense rows; the adapter at full rank is the checkpoint's change."""
    _, models = three(tmp_path)
    zeros = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tiny.weights(0).items()}
    tiny.save(tmp_path / "zeros", zeros)
    recipe: Recipe = {"method": "task_arithmetic", "models": [str(m) for m in models], "accept_base": True}
    recipe |= {"base": str(tmp_path / "zeros"), "prepare": [{"trim": {"density": 0.5}}], "finish": ["rescale"]}
    graftkit.merge(recipe, tmp_path / "dense")
    graftkit.merge(recipe | {"output": {"as": "adapter", "rank": 16}}, tmp_path / "out")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name, delta in deltas(tmp_path / "out").items():
        torch.testing.assert_close(delta.float(), dense[name], rtol=1e-4, atol=1e-6)


def test_bfloat16_and_float64_inputs(tmp_path: Path) -> None:
    """The output is float32 unless the recipe says otherwise, and rounded once."""
    _, models = three(tmp_path)
    for path, dtype in zip(models, (torch.bfloat16, torch.float64, torch.float16), strict=True):
        file = path / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    merge(tmp_path / "wide", models, {"rank": "exact"})
    merge(tmp_path / "narrow", models, {"rank": "exact", "dtype": "bfloat16"})
    wide, narrow = (load_file(tmp_path / n / "out" / "adapter_model.safetensors") for n in ("wide", "narrow"))
    assert {t.dtype for t in wide.values()} == {torch.float32}
    wanted = weighted(models, [1, 1, 1])
    for name, delta in deltas(tmp_path / "wide" / "out").items():
        assert torch.linalg.norm(delta - wanted[name]) <= 1e-6 * torch.linalg.norm(wanted[name])
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].to(torch.bfloat16)) or (tensor - wide[name]).abs().max() < 1e-2


def test_slices_and_adapters_do_not_go_together(tmp_path: Path) -> None:
    base, models = three(tmp_path)
    part = {"sources": [{"model": str(models[0]), "layer_range": [0, 1]}]}
    recipe = {"method": "average", "base": str(base), "slices": [part], "output": {"as": "adapter"}}
    with pytest.raises(PlanError, match="an adapter has its base's layers"):
        graftkit.plan(recipe)


def test_the_command_says_what_truncation_left_out(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from graftkit.cli import app

    _, models = three(tmp_path)
    recipe = {"method": "task_arithmetic", "models": [str(m) for m in models], "output": {"as": "adapter", "rank": 2}}
    path = tiny.recipe(tmp_path, json.dumps(recipe))
    told = CliRunner().invoke(app, ["explain", str(path)]).output
    assert "an adapter of tiny/base, at most" in told and "from the adapters' factors" in told
    told = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "out")]).output
    assert "ranks 2 to 2; it leaves out" in told and "of its energy" in told


def test_an_adapter_from_a_recipe_is_no_source(tmp_path: Path) -> None:
    base, models = three(tmp_path)
    inner = tiny.recipe(tmp_path, json.dumps({"method": "average", "models": [str(m) for m in models],
                                              "output": {"as": "adapter"}}))  # fmt: skip
    with pytest.raises(PlanError, match="a recipe that makes an adapter"):
        graftkit.plan({"method": "average", "base": str(base), "models": [str(inner)]})
