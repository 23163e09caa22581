"""Statistics made in blocks equal statistics of whole tensors; merges with model-scope statistics and plug-ins."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit import methods
from graftkit.execution import blocks, reductions
from graftkit.execution.blocks import Reader, Workspace
from graftkit.execution.counting import BINS, Window
from graftkit.execution.reductions import inner_products, select
from graftkit.methods import Range, method
from graftkit.methods.parts import band_of, deviation, kept_count, threshold_of, variation_of

if TYPE_CHECKING:
    from torch import Tensor


@method(source="a test", grain="row")
def row_scaled(deltas: "Tensor", *, power: Annotated[float, Range(0, 2)] = 1.0) -> "Tensor":
    """Every row of the mean delta, divided by its largest magnitude to a power."""
    mean = deltas.mean(dim=0)
    top = mean.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    return mean / top**power


@method(source="a test", grain="tensor")
def flipped(base: "Tensor", models: "Tensor") -> "Tensor":
    """The mean of the models with its rows in reverse order, and the base's: needs whole tensors."""
    return models.mean(dim=0).flip(0) + 0 * base


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)


def recipe(family: tuple[Path, ...], **changes: object) -> dict:
    return {"method": "ties", "base": str(family[0]), "models": [str(family[1]), str(family[2])], **changes}


def deltas(family: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    base, *tuned = (load_file(path / "model.safetensors") for path in family)
    return {n: torch.stack([m[n].float() - base[n].float() for m in tuned]) for n in base}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.37, 0.999, 1.0])
def test_the_threshold_is_the_exact_kth_magnitude(tmp_path: Path, dtype: torch.dtype, density: float) -> None:
    family = tiny.family(tmp_path, dtype=dtype)
    plan = graftkit.plan(recipe(family, knobs={"density": density}))
    whole = deltas(family)
    for step in plan.steps:
        found = select(
            [step], step.knobs["density"], lambda step, space: Reader(step, plan.sources, space), Workspace()
        )
        wanted = threshold_of(whole[step.name], density).numpy()
        assert np.array_equal(found.values, wanted)
        kept = (whole[step.name].abs() >= torch.from_numpy(wanted).reshape(-1, *[1] * len(step.shape))).double()
        assert np.allclose(found.density, kept.reshape(2, -1).mean(dim=1))
        assert all(share * step.elements >= kept_count(density, step.elements) for share in found.density)


def test_tied_magnitudes_are_all_kept_and_counted(tmp_path: Path) -> None:
    base = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in tiny.shapes().items()}
    tuned = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in tiny.shapes().items()}
    paths = [tiny.save(tmp_path / n, w) for n, w in (("base", base), ("a", tuned), ("b", tuned))]
    record = graftkit.merge(recipe(tuple(paths), knobs={"density": 0.1}), tmp_path / "out")
    assert all(t["density"] == [1.0, 1.0] for t in record["tensors"])


@pytest.mark.parametrize("knobs", [{"density": d, "outliers": o} for d in (0, 0.3, 1) for o in (0, 0.05, 1)])
def test_the_record_says_what_share_breadcrumbs_kept(tmp_path: Path, knobs: dict) -> None:
    family = tiny.family(tmp_path)
    record = graftkit.merge(recipe(family, method="breadcrumbs", knobs=knobs), tmp_path / "out")
    for told in record["tensors"]:
        magnitudes = deltas(family)[told["name"]].reshape(2, -1).abs()
        low, high = band_of(magnitudes, **knobs)
        kept = (magnitudes >= low[:, None]) & (magnitudes <= high[:, None])
        assert np.allclose(told["density"], kept.double().mean(dim=1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_record_says_what_share_sce_selected(tmp_path: Path, share: float) -> None:
    family = tiny.family(tmp_path)
    record = graftkit.merge(recipe(family, method="sce", knobs={"select_topk": share}), tmp_path / "out")
    for told in record["tensors"]:
        whole = deltas(family)[told["name"]]
        varied = deviation(whole.double()).float()
        chosen = (varied >= variation_of(whole, share)) & (varied > 0)
        wanted = chosen.sum() / (varied > 0).sum() if share < 1 else 1.0
        assert told["select_topk"] == pytest.approx(float(wanted))


def test_model_scope_counts_over_all_tensors_that_the_settings_merge(tmp_path: Path) -> None:
    family = tiny.family(tmp_path, dtype=torch.float32)
    rules = [{"where": {"role": "norm"}, "method": "task_arithmetic"}]
    record = graftkit.merge(
        recipe(family, knobs={"scope": "model", "density": 0.1}, rules=rules), tmp_path / "out", workers=3
    )
    whole = {n: d for n, d in deltas(family).items() if "norm" not in n}
    flat = torch.cat([d.reshape(2, -1) for d in whole.values()], dim=1)
    limit = threshold_of(flat, 0.1)
    out, base = (load_file(p / "model.safetensors") for p in (tmp_path / "out", family[0]))
    for name, delta in whole.items():
        wanted = methods.get("ties").function(delta, limit, torch.ones(2))
        assert torch.allclose(out[name] - base[name], wanted, atol=1e-6)
    assert [s["name"] for s in record["execution"]["stages"]] == ["statistics", "merge"]
    told = [t["density"] for t in record["tensors"] if t["method"] == "ties"]
    assert all(d == told[0] for d in told) and np.allclose(told[0], 0.1, atol=0.001)


def test_inner_products(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    plan = graftkit.plan({"method": "slerp", "models": [str(family[1]), str(family[2])]})
    tuned = [load_file(path / "model.safetensors") for path in family[1:]]
    for step in plan.steps:
        stack = torch.stack([m[step.name].double().reshape(-1) for m in tuned])
        assert np.allclose(
            inner_products(Reader(step, plan.sources, Workspace()), False), (stack @ stack.T).numpy(), rtol=1e-12
        )


def test_a_row_method_sees_whole_rows_and_a_tensor_method_whole_tensors(tmp_path: Path) -> None:
    family = tiny.family(tmp_path, dtype=torch.float32)
    base, *tuned = (load_file(path / "model.safetensors") for path in family)
    graftkit.merge(recipe(family, method="row_scaled", knobs={"power": 0.5}), tmp_path / "rows")
    graftkit.merge(recipe(family, method="flipped"), tmp_path / "whole")
    rows, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("rows", "whole"))
    for name in base:
        stack = torch.stack([m[name].double() for m in tuned])
        wanted = methods.get("row_scaled").run(base=base[name].double(), models=stack, power=0.5)
        assert torch.allclose(whole[name].double(), stack.mean(dim=0).flip(0), atol=1e-7)
        assert torch.allclose(rows[name].double(), wanted, atol=1e-6)


def test_weights_that_cancel_are_refused_in_the_plan(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    models = [{"model": str(family[1]), "weight": 1}, {"model": str(family[2]), "weight": -1}]
    with pytest.raises(graftkit.GraftError, match="weights sum to zero"):
        graftkit.plan(recipe(family, method="average", models=models))


def test_counts_of_many_tensors_are_added_as_they_come() -> None:
    """A count takes half a megabyte for each model: those of all tensors are never held together."""
    alive, most = set(), []

    def spread(work: object, steps: list[int]) -> Iterator[np.ndarray]:
        for step in steps:
            made = np.ones((1, 1 + BINS), np.int64)
            alive.add(step)
            weakref.finalize(made, alive.remove, step)
            most.append(len(alive))
            yield made
            del made

    counted = reductions._over(range(9), lambda *_: None, Workspace(), spread)
    assert (counted(Window.at(np.zeros(1))) == 9).all() and max(most) <= 3
