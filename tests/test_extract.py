"""`graft extract`: the adapter nearest to a fine-tuned model, and what it leaves out, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.checkpoints.adapters import open_adapter
from graftkit.cli import app
from graftkit.errors import PlanError, RecipeError
from graftkit.execution.factoring import Wanted, sketched

DECAY = 0.6


def tuned(base: dict[str, torch.Tensor], seed: int = 1, *, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Every matrix of the layers changed, with singular values that fall (or of a rank); the final norm too."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(base)
    for name, tensor in base.items():
        if tensor.ndim == 2 and "embed" not in name:
            u, _, v = torch.linalg.svd(torch.randn(tensor.shape, generator=generator), full_matrices=False)
            values = DECAY ** torch.arange(min(tensor.shape), dtype=torch.float32)
            values = values if rank is None else (torch.arange(len(values)) < rank).float()
            made[name] = tensor + 0.1 * (u * values) @ v
    made["model.norm.weight"] = base["model.norm.weight"] + 0.1
    return made


def pair(root: Path, **how: Any) -> tuple[Path, Path]:
    base = tiny.weights(0, dtype=torch.float32)
    config = {"dtype": "float32"}
    return tiny.save(root / "base", base, config=config), tiny.save(root / "tuned", tuned(base, **how), config=config)


@pytest.mark.parametrize(("rank", "energy"), [(3, None), (16, None), (None, 0.8), (None, 0.95)])
def test_the_best_of_its_rank(tmp_path: Path, rank: int | None, energy: float | None) -> None:
    base, model = pair(tmp_path)
    record = graftkit.extract(base, model, tmp_path / "out", rank=rank, energy=energy)
    adapter = open_adapter(tmp_path / "out")
    one, two = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    for told in (t for t in record["tensors"] if "rank" in t):
        name = told["name"]
        delta, product = (two[name] - one[name]).double(), adapter.load(name, np.float64)
        values = torch.linalg.svdvals(delta)
        kept = torch.cumsum(values**2, 0) / (values**2).sum()
        best = min(rank, len(values)) if rank else int((kept < energy).sum()) + 1
        assert told["rank"] in (best, best + 1 if energy else best)
        error = torch.linalg.norm(delta - torch.from_numpy(product.left @ product.right))
        assert error <= 1.01 * torch.linalg.norm(values[told["rank"] :]) + 1e-6 * values[0]
        assert told["error_norm"] == pytest.approx(float(error), rel=1e-3, abs=1e-6)
        assert told["energy"] >= (energy or 0)


def test_a_fine_tune_of_low_rank_is_explained_wholly(tmp_path: Path) -> None:
    base, model = pair(tmp_path, rank=3)
    record = graftkit.extract(base, model, tmp_path / "out", energy=0.99999)
    assert {t["rank"] for t in record["tensors"] if "rank" in t} == {3}
    merged = {"method": "task_arithmetic", "base": str(base), "models": [str(tmp_path / "out")]}
    graftkit.merge(merged, tmp_path / "again")
    one, two = load_file(model / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outside", ["save", "drop", "refuse"])
def test_what_lora_does_not_reach_is_a_choice(tmp_path: Path, outside: str) -> None:
    base, model = pair(tmp_path)
    if outside == "refuse":
        with pytest.raises(PlanError, match="LoRA does not reach it; `save`"):
            graftkit.extract(base, model, tmp_path / "out", rank=4, outside=outside)
        return
    graftkit.extract(base, model, tmp_path / "out", rank=4, outside=outside)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == (["model.norm"] if outside == "save" else None)  # nothing else of it changed
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert ("base_model.model.model.norm.weight" in held) == (outside == "save")
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5
@pytest.mark.parametrize("embedding", [False, True])
def test_peft_runs_it_as_the_fine_tune(tmp_path: Path, embedding: bool) -> None:
    """The embedding too, which the model ties to its head."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, model = pair(tmp_path, rank=5)
    if embedding:
        tensors = load_file(model / "model.safetensors")
        tensors["model.embed_tokens.weight"] += 0.3 * torch.randn(tiny.VOCABULARY, tiny.HIDDEN)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    graftkit.extract(base, model, tmp_path / "out", rank=5)
    ids = torch.arange(12)[None]
    wanted = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(wrapped(ids).logits, wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("given", [{}, {"rank": 4, "energy": 0.9}])
def test_either_a_rank_or_a_share(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="either a rank"):
        graftkit.extract("base", "tuned", tmp_path / "out", **given)


def test_the_command(tmp_path: Path) -> None:
    base, model = pair(tmp_path)
    done = CliRunner().invoke(app, ["extract", str(base), str(model), str(tmp_path / "out"), "--rank", "4"])
    assert done.exit_code == 0, done.output
    assert "an adapter of 14 modules, ranks 4 to 4" in done.output
    again = CliRunner().invoke(
        app, ["extract", str(base), str(model), str(tmp_path / "j"), "--energy", "0.9", "--json"]
    )
    assert json.loads(again.output)["recipe"]["output"]["rank"] == {"energy": 0.9}


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (120, 120), (1, 30), (30, 1)])
@pytest.mark.parametrize("wanted", [Wanted(rank=6), Wanted(energy=0.7), Wanted(energy=0.9)])
def test_a_sketch_states_its_error(shape: tuple[int, int], wanted: Wanted) -> None:
    """Slowly falling singular values, the hard case: the stated error is the error, and near the best there is."""
    draw = np.random.default_rng(3)
    u, v = (np.linalg.qr(draw.standard_normal((n, min(shape))))[0] for n in shape)
    values = 1 / (1 + np.arange(min(shape))) ** 0.7
    matrix = (u * values) @ v.T

    def rows():
        for first in range(0, shape[0], 7):
            yield matrix[first : first + 7]

    found = sketched(rows, shape, wanted, seed=5)
    if found is None:
        kept = np.cumsum(values**2) / (values**2).sum()
        assert wanted.energy and (kept < wanted.energy).sum() + 1 >= shape[0] * shape[1] // sum(shape)
        return
    assert np.linalg.norm(matrix - found.left @ found.right) == pytest.approx(found.error, rel=1e-6, abs=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(values), rel=1e-12)
    assert found.error <= 1.02 * np.linalg.norm(values[found.rank :]) + 1e-9


def test_a_sketch_is_the_same_each_time_and_of_zeros_nothing() -> None:
    matrix = np.random.default_rng(0).standard_normal((50, 30))
    made = [sketched(lambda: iter([matrix]), (50, 30), Wanted(rank=4), seed=9) for _ in range(2)]
    assert made[0] and made[1] and (made[0].left == made[1].left).all()
    nothing = sketched(lambda: iter([matrix * 0]), (50, 30), Wanted(energy=0.9), seed=9)
    assert nothing and nothing.rank == 0 and nothing.error == 0 and nothing.kept == 1
