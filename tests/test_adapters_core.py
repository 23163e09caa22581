"""Methods that commute with rotations run on the adapters' cores: the same merge, of the size of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit import methods
from graftkit.checkpoints.adapters import open_adapter
from graftkit.execution.factoring import core_of
from graftkit.execution.features import packed, probes
from graftkit.testing.evaluation import write_examples
from isotropic import flattened


@pytest.fixture
def isotropic(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    methods.names()
    methods.method(source="-", grain="tensor", rotations="both")(flattened)
    return "flattened"


def dense(directory: Path) -> dict[str, np.ndarray]:
    adapter, made = open_adapter(directory), {}
    for name in adapter.factors:
        low_rank = adapter.load(name, np.float64)
        made[name] = low_rank.left @ low_rank.right
    return made


def test_a_method_on_the_core_is_the_method_on_the_dense_deltas(tmp_path: Path, isotropic: str) -> None:
    """Its mean is over the rank of the dense tensor, which it is told."""
    models = [
        tiny.adapter(tmp_path / "one", 1, rank=3),
        tiny.adapter(tmp_path / "two", 2, rank=2, targets=("q_proj", "up_proj")),
    ]
    recipe: dict[str, Any] = {"method": isotropic, "models": [str(m) for m in models]}
    planned = graftkit.plan(recipe | {"output": {"as": "adapter", "rank": {"energy": 1.0}}})
    assert {step.form.path for step in planned.steps if step.form} == {"core"}
    graftkit.execute(planned, tmp_path / "out")
    found, parts = dense(tmp_path / "out"), [dense(m) for m in models]
    for name, delta in found.items():
        stack = torch.from_numpy(np.stack([p.get(name, np.zeros_like(delta)) for p in parts]))
        np.testing.assert_allclose(delta, flattened(stack, tuple(delta.shape)).numpy(), rtol=1e-5, atol=1e-7)


def commuting() -> list[str]:
    """The built-in methods that run on cores."""
    every = [methods.get(name) for name in methods.names()]
    return [m.name for m in every if m.rotations == "both" and m.returns_delta and not m.factors]


PROBES = methods.get("core_regmean").settings({})["probes"]


def measured(recipe: dict[str, Any], models: list[Path], place: Path) -> dict[str, torch.Tensor]:
    """Roots of moments nobody measured, [models, features, in] by tensor, written as of what the adapters read."""
    recipe |= {"models": [{"model": str(m), "data": f"{m.name}.jsonl"} for m in models], "statistics": str(place / "s")}
    adapters, draw = [open_adapter(m) for m in models], np.random.default_rng(0)
    whole, values = {}, [{} for _ in models]
    for name in adapters[0].factors:
        right = np.concatenate([adapter.load(name, np.float64).right for adapter in adapters])
        inputs = draw.standard_normal((len(models), 99, right.shape[1]))
        rows = np.concatenate([right, probes(right.shape[1], min(PROBES, right.shape[1]))])
        span = np.linalg.pinv(rows) @ rows
        whole[name] = torch.from_numpy(np.linalg.qr(inputs @ span, mode="r") / 99**0.5)
        for own, seen in zip(values, inputs @ rows.T, strict=True):
            own[name] = packed(seen.T @ seen / 99)
    write_examples(recipe, "core_gram", values)
    return whole


@pytest.mark.parametrize("name", commuting())
def test_every_method_that_says_so_commutes(tmp_path: Path, name: str) -> None:
    """With its defaults, on adapters of several ranks, as a dense merge of the same deltas in float64."""
    models = [tiny.adapter(tmp_path / str(k), k, rank=3 + k, targets=("q_proj", "up_proj")) for k in range(3)]
    recipe = {"method": name, "models": [str(m) for m in models], "output": {"as": "adapter", "rank": {"energy": 1.0}}}
    read = methods.get(name).measured_with_examples
    whole = measured(recipe, models, tmp_path) if read else {}
    planned = graftkit.plan(recipe)
    assert {step.form.path for step in planned.steps if step.form} == {"core"}
    graftkit.execute(planned, tmp_path / "out")
    found, parts = dense(tmp_path / "out"), [dense(m) for m in models]
    for step in planned.steps:
        stack = torch.from_numpy(np.stack([part[step.name] for part in parts]))
        given = {kind: whole[step.name] for kind in read}
        wanted = methods.get(name).run(base=torch.zeros_like(stack[0]), models=stack, **step.knobs, **given).numpy()
        delta = found.get(step.name, np.zeros_like(wanted))
        assert np.linalg.norm(delta - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_the_core_holds_the_deltas() -> None:
    draw = np.random.default_rng(0)
    pairs = [(draw.standard_normal((30, r)), draw.standard_normal((r, 20))) for r in (3, 5)]
    core = core_of(pairs)
    assert core.cores.shape == (2, 8, 8)
    for (left, right), small in zip(pairs, core.cores, strict=True):
        np.testing.assert_allclose(core.rows @ small @ core.columns.T, left @ right, atol=1e-12)


@pytest.mark.parametrize("output", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*commuting(), "knots"])
def test_a_checkpoint_of_adapters_is_made_on_their_core(tmp_path: Path, name: str, output: str) -> None:
    """The base plus the method on the dense deltas, whatever else the recipe's rules do; by row blocks."""
    base = tiny.save(tmp_path / "base", tiny.weights(0, dtype=torch.float32))
    models = [tiny.adapter(tmp_path / str(k), k, rank=2 + k, targets=("q_proj", "up_proj")) for k in range(3)]
    recipe: dict[str, Any] = {"method": name, "base": str(base), "accept_base": True, "output": {"dtype": output}}
    read = methods.get(name).measured_with_examples
    recipe["models"] = [str(m) for m in models]
    whole = measured(recipe, models, tmp_path) if read else {}
    planned = graftkit.plan(recipe)
    turned = {step.name for step in planned.steps if step.directions}
    parts = [dense(m) for m in models]
    assert turned and turned <= set(parts[0])
    graftkit.execute(planned, tmp_path / "out")
    before, found = (load_file(place / "model.safetensors") for place in (base, tmp_path / "out"))
    for step in planned.steps:
        if step.name not in turned:
            continue
        stack = torch.from_numpy(np.stack([part[step.name] for part in parts]))
        given = {kind: whole[step.name] for kind in read}
        delta = methods.get(name).run(base=torch.zeros_like(stack[0]), models=stack, **step.knobs, **given)
        wanted = before[step.name].double() + delta
        unit = 2.0**-8 if output == "bfloat16" else 2.0**-20
        assert torch.all((found[step.name].double() - wanted).abs() <= unit * wanted.abs() + 1e-6), step.name
