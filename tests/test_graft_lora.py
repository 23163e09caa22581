"""GraftLoRA: adapters fused on their products, exact at the sum of their ranks, or on their factors; and the record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import graftkit
import tiny
from graftkit.checkpoints.adapters import open_adapter
from graftkit.checkpoints.gates import write_gates
from graftkit.errors import PlanError
from graftkit.methods.graft import graft_weights
from reference.graft import entropy

NAMES = [name for name in tiny.shapes() if name.split(".")[-2] in ("q_proj", "down_proj")]
MODULE = "base_model.model.{}.lora_{}.weight"


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    tiny.family(tmp_path, dtype=torch.float32)
    return tiny.adapter(tmp_path / "one", 1, rank=3), tiny.adapter(tmp_path / "two", 2, rank=5)


def drawn(name: str, out: int) -> np.ndarray:
    first = np.random.default_rng(NAMES.index(name)).random(out).astype(np.float32)
    return np.stack([first, 1 - first])


def recipe(adapters: tuple[Path, ...], method: str, **changes: object) -> dict:
    kind = "coefficient" if method == "graft_free" else "local"
    prints = [open_adapter(one).fingerprint() for one in adapters]
    gates = {name: drawn(name, tiny.shapes()[name][0]) for name in NAMES}
    write_gates(Path("gates.safetensors"), gates, kind=kind, models=prints)
    form = {"as": "adapter", "rank": "exact", "dtype": "float32"}
    told = {"method": method, "base": "base", "models": list(map(str, adapters)), "gates": "gates.safetensors"}
    return {**told, "accept_base": True, "output": form, **changes}


def deltas(adapters: tuple[Path, ...], name: str) -> torch.Tensor:
    module = name.removesuffix(".weight")
    held = [load_file(one / "adapter_model.safetensors") for one in adapters]
    pairs = [[own[MODULE.format(module, half)].double() for half in "BA"] for own in held]
    return torch.stack([2 * b @ a for b, a in pairs])


def delta(out: Path, name: str) -> torch.Tensor:
    module, held = name.removesuffix(".weight"), load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    rank = len(held[MODULE.format(module, "A")])
    scale = config.get("alpha_pattern", {}).get(module, config["lora_alpha"]) / rank
    return scale * held[MODULE.format(module, "B")].double() @ held[MODULE.format(module, "A")].double()


@pytest.mark.parametrize("method", ["graft", "graft_convex", "graft_free"])
@pytest.mark.parametrize("of", ["weights", "product"])
def test_adapters_leave_exact_at_the_sum_of_their_ranks(
    adapters: tuple[Path, ...], tmp_path: Path, method: str, of: str
) -> None:
    if method != "graft" and of == "product":
        pytest.skip("has no entropies")
    knobs = {"of": of} if method == "graft" else {"scale": 0.7} if method == "graft_free" else {}
    told = recipe(adapters, method, knobs=knobs)
    record = graftkit.merge(told, "out")
    base = load_file("base/model.safetensors")
    for name in NAMES:
        pair, gates = deltas(adapters, name), torch.from_numpy(drawn(name, tiny.shapes()[name][0])).double()
        seen = pair if of == "product" else base[name].double() + pair
        signals = torch.tensor([entropy(one.numpy()) for one in seen], dtype=torch.float64)
        weights = graft_weights(signals, gates) if method == "graft" else gates * knobs.get("scale", 1.0)
        wanted = (weights[..., None] * pair).sum(dim=0)
        assert torch.allclose(delta(Path("out"), name), wanted, atol=1e-6)
        line = next(line for line in record["tensors"] if line["name"] == name)
        assert line["rank"] == 8 and line["error_norm"] == 0
        spread = np.quantile(weights.numpy(), [0, 0.05, 0.5, 0.95, 1], axis=1).T
        np.testing.assert_allclose(line["weights"], spread, atol=1e-5)
        np.testing.assert_allclose(line["mean_weights"], weights.mean(dim=1).numpy(), atol=1e-5)
    whole = graftkit.merge({**told, "output": {"dtype": "float32"}}, "whole")
    assert {line["name"]: line.get("weights") for line in whole["tensors"] if line["name"] in NAMES} == {
        line["name"]: line["weights"] for line in record["tensors"]
    }
    made = load_file("whole/model.safetensors")
    assert all(torch.allclose(made[n] - base[n], delta(Path("out"), n).float(), atol=1e-6) for n in NAMES)


def test_products_are_fused_without_the_weights_of_the_base(adapters: tuple[Path, ...]) -> None:
    plan = graftkit.plan(recipe(adapters, "graft", knobs={"of": "product"}))
    assert all(step.base is None and step.form.path == "shares" for step in plan.steps)
    assert all(step.base for step in graftkit.plan(recipe(adapters, "graft")).steps)
    assert all(step.base is None for step in graftkit.plan(recipe(adapters, "graft_convex")).steps)


def test_full_models_need_a_base_to_have_deltas(adapters: tuple[Path, ...]) -> None:
    told = {"method": "graft", "models": ["math", "code"], "knobs": {"local_signal": "none", "of": "product"}}
    with pytest.raises(PlanError, match="looks at deltas; name the base"):
        graftkit.plan(told)
    assert graftkit.plan({**told, "base": "base"}).steps


def of_factors(adapters: tuple[Path, ...], **more: object) -> dict:
    told = recipe(adapters, "graft", knobs={"of": "factors", **more})
    return {**told, "output": {"as": "adapter", "dtype": "float32"}}


@pytest.mark.usefixtures("adapters")
def test_factors_are_fused_each_by_itself_and_that_depends_on_how_they_are_split(tmp_path: Path) -> None:
    pair = tiny.adapter(tmp_path / "four", 1), tiny.adapter(tmp_path / "five", 2)
    graftkit.merge(of_factors(pair), "out")
    held = [load_file(one / "adapter_model.safetensors") for one in pair]
    for name in NAMES:
        module, made = name.removesuffix(".weight"), {}
        for half in "AB":
            stack = torch.stack([2**0.5 * own[MODULE.format(module, half)].double() for own in held])
            signals = torch.tensor([entropy(one.numpy()) for one in stack], dtype=torch.float64)
            gates = torch.from_numpy(drawn(name, len(stack[0]))) if half == "B" else torch.full((2, 1), 0.5)
            made[half] = (graft_weights(signals, gates.double())[..., None] * stack).sum(dim=0)
        assert torch.allclose(delta(Path("out"), name), made["B"] @ made["A"], atol=1e-6)
    twin = tiny.adapter(tmp_path / "three", 2)
    save_file({n: -t for n, t in held[1].items()}, twin / "adapter_model.safetensors")  # the same delta
    graftkit.merge(of_factors((pair[0], twin)), "other")
    assert not torch.allclose(delta(Path("out"), NAMES[0]), delta(Path("other"), NAMES[0]), atol=1e-3)
    graftkit.merge(of_factors((pair[0], pair[0])), "same")
    assert torch.allclose(delta(Path("same"), NAMES[0]), deltas(pair[:1], NAMES[0])[0], atol=1e-6)
    assert any("how each adapter splits" in note for note in graftkit.plan(of_factors(pair)).notes)


def test_factors_of_different_ranks_or_into_a_checkpoint_are_refused(adapters: tuple[Path, ...]) -> None:
    with pytest.raises(PlanError, match="merges factors of one rank"):
        graftkit.plan(of_factors(adapters))
    with pytest.raises(PlanError, match="merges the factors of adapters into an adapter"):
        graftkit.plan({**of_factors(adapters), "output": {}})
