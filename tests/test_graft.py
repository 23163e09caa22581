"""Gated fusion: the conformance suite, the float64 reference, what the equations promise, and merges by gates files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.checkpoints.gates import open_gates, write_gates
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.cli import app
from graftkit.errors import CheckpointError, PlanError, RecipeError
from graftkit.execution import blocks
from graftkit.execution.blocks import Reader, Workspace
from graftkit.execution.signals import measured
from graftkit.methods import Method, get
from graftkit.methods.graft import fuse, graft_weights
from graftkit.methods.graft_kernels import graft as kernel
from graftkit.methods.signals import distance_of, histogram_of, range_of, signals_of
from graftkit.testing import MethodConformance
from reference import cases as inputs
from reference.graft import entropy, joint, open_entropy, paper

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
MATRICES = st.sampled_from([(3, 4), (1, 5), (5, 1), (7, 6)])


class TestGraft(MethodConformance):
    method = "graft"


class TestGraftConvex(MethodConformance):
    method = "graft_convex"


class TestGraftFree(MethodConformance):
    method = "graft_free"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates_for(models: int, out: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(random(models, out, seed=seed), dim=0)


# The equations


@PROPERTY
@given(st.data(), st.sampled_from([0.0, 0.1, 0.4, 1.0]), st.sampled_from([0.0, 1.0, 500.0]), st.integers(1, 20))
def test_two_models_are_the_papers(data: st.DataObject, a: float, c: float, bins: int) -> None:
    base, tuned = data.draw(inputs.cases(st.just(2), MATRICES)).models
    local = np.array(data.draw(st.lists(st.integers(0, 8), min_size=len(base), max_size=len(base)))) / 8
    stack, gates = torch.tensor(np.stack([base, tuned])), torch.tensor(np.stack([local, 1 - local]))
    got = get("graft").run(models=stack, gates=gates, a=a, c=c, bins=bins)
    wanted, _ = paper(base, tuned, local, a, c, signal=lambda w: entropy(w, bins))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-11, atol=1e-12 * np.abs(stack.numpy()).max())


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("sharpness", [1.0, 7.0])
def test_several_models_are_the_reference(count: int, sharpness: float) -> None:
    models, gates = random(count, 5, 40), gates_for(count, 5)
    got = get("graft").run(models=models, gates=gates, sharpness=sharpness)
    np.testing.assert_allclose(got.numpy(), joint(models.numpy(), gates.numpy(), sharpness=sharpness), rtol=1e-11)


def test_the_paper_with_the_ancestors_bins_and_with_the_literal_divisor() -> None:
    models, gates = random(2, 5, 9), gates_for(2, 5)
    for knobs, options in (({"last_bin": "open"}, {"signal": open_entropy}), ({"normaliser": "c"}, {"divisor": 500.0})):
        wanted, _ = paper(*models.float().double().numpy(), gates[0].numpy(), **options)
        got = get("graft").run(models=models.float().double(), gates=gates, **knobs)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-11)


def test_the_spectral_signal_takes_the_place_of_the_entropy() -> None:
    models, gates = random(2, 5, 9), gates_for(2, 5)
    wanted, _ = paper(*models.numpy(), gates[0].numpy(), c=3.0, signal=lambda w: np.linalg.svd(w)[1][0])
    got = get("graft").run(models=models, gates=gates, global_signal="spectral", c=3.0)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-10)


@pytest.mark.parametrize("count", [2, 3])
def test_equal_models_are_returned_to_the_bit(count: int) -> None:
    one = random(6, 7).float()
    stack = one.expand(count, 6, 7).clone()
    assert torch.equal(get("graft").run(models=stack, gates=gates_for(count, 6), sharpness=9.0), one)


def test_swapping_the_models_and_mirroring_the_gate_swaps_the_weights() -> None:
    signals, gates = torch.tensor([1.9, 1.8]).double(), gates_for(2, 6)[..., None]
    weights = graft_weights(signals, gates, sharpness=3.0)
    swapped = graft_weights(signals.flip(0), gates.flip(0), sharpness=3.0)
    torch.testing.assert_close(swapped, weights.flip(0), rtol=0, atol=0)


def test_as_published_no_channel_goes_to_one_model_and_sharpness_lets_it() -> None:
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    gates, far = torch.stack([grid, 1 - grid])[..., None], torch.tensor([9.0, 0.0]).double()
    for signals in (far, far.flip(0)):
        assert 0.41 < float(graft_weights(signals, gates).min()) <= float(graft_weights(signals, gates).max()) < 0.59
    assert float(graft_weights(far, gates, sharpness=50.0).max()) > 0.99


def test_weights_are_differentiable_by_gates_and_signals() -> None:
    signals, gates = random(3, seed=1).requires_grad_(), gates_for(3, 4)[..., None].requires_grad_()
    assert torch.autograd.gradcheck(lambda s, g: graft_weights(s, g, c=0.5, sharpness=2.0), (signals, gates))


def test_numpy_and_torch_weights_are_the_same_function() -> None:
    signals, gates = random(3, seed=1), gates_for(3, 4)[..., None]
    found = graft_weights(signals.numpy(), gates.numpy())
    np.testing.assert_allclose(found, graft_weights(signals, gates).numpy(), rtol=1e-14)


@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_twin_fuses_rows_by_their_own_gates(columns: int, dtype: str) -> None:
    """The conformance suite shows a twin vectors only; gates are for matrices."""
    models = random(3, 5, 9).numpy().astype(dtype)
    gates, signals = torch.softmax(random(3, 5, columns), dim=0), random(3, seed=2)
    knobs = {name: knob.default for name, knob in get("graft").knobs.items()} | {"c": 1.0}
    out = np.empty(45, dtype)
    kernel(models.reshape(3, -1).copy(), signals.numpy(), gates.numpy(), **knobs, out=out)
    wanted = fuse(torch.from_numpy(models).double(), graft_weights(signals, gates, c=1.0))
    np.testing.assert_allclose(out.reshape(5, 9), wanted.numpy(), rtol=0, atol=1e-6 if dtype == "float32" else 1e-13)


def test_gates_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="reads gates: give gates="):
        get("graft").run(models=random(2, 3, 4))
    with pytest.raises(RecipeError, match=r"gates of shape \(2, 4\) for models"):
        get("graft").run(models=random(2, 3, 4), gates=gates_for(2, 4))
    with pytest.raises(ValueError, match="divides by c, and c is 0"):
        get("graft").run(models=random(2, 3, 4), gates=gates_for(2, 3), normaliser="c", c=0)


# Statistics in blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 50)


READS = ("models", "range", "histogram", "distance", "signals")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("knobs", [{"last_bin": end, "bins": bins} for end in ("open", "closed") for bins in (1, 7)])
def test_statistics_in_blocks_are_those_of_whole_tensors(tmp_path: Path, dtype: torch.dtype, knobs: dict) -> None:
    family = tiny.family(tmp_path, dtype=dtype)
    plan = graftkit.plan({"method": "average", "models": [str(path) for path in family]})
    held = [load_file(path / "model.safetensors") for path in family]
    looks, knobs = Method("looks", lambda models: models, READS, {}, "", "row"), {"global_signal": "entropy", **knobs}
    for step in plan.steps:
        stack = torch.stack([one[step.name].to(torch.float64) for one in held])
        found, _ = measured(looks, knobs, Reader(step, plan.sources, Workspace()))
        assert np.array_equal(found["range"], range_of(stack).numpy())
        assert np.array_equal(found["histogram"], histogram_of(stack, knobs["bins"], knobs["last_bin"]).numpy())
        assert np.array_equal(found["signals"], signals_of(stack, knobs).numpy())
        rows = np.concatenate([found["distance"].block(*ends) for ends in blocks.cuts(step, "row")], axis=1)
        np.testing.assert_allclose(rows, distance_of(stack).numpy(), rtol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(30, 20), (9, 60), (70, 3), (1, 12), (12, 1), (4, 5, 6)])
@pytest.mark.parametrize("rank", [0, 1, 99])
def test_the_spectral_norm_by_rows_is_the_largest_singular_value(
    tmp_path: Path, shape: tuple[int, ...], rank: int
) -> None:
    rows, width = shape[0], int(np.prod(shape[1:]))
    inner = min(rank, rows, width)
    tensors = [(random(rows, inner, seed=k) @ random(inner, width, seed=9 - k)).reshape(shape) for k in range(2)]
    paths = [tiny.save(tmp_path / str(k), {"layers.0.mlp.weight": one}) for k, one in enumerate(tensors)]
    plan = graftkit.plan({"method": "average", "models": list(map(str, paths))})
    looks = Method("looks", lambda models: models, ("models", "signals"), {}, "", "row")
    found, _ = measured(looks, {"global_signal": "spectral"}, Reader(plan.steps[0], plan.sources, Workspace()))
    wanted = [np.linalg.svd(one.reshape(rows, width).numpy())[1][0] for one in tensors]
    np.testing.assert_allclose(found["signals"], wanted, rtol=1e-9, atol=1e-12)


# Files of gates

MATRICES_OF_TINY = {n: s for n, s in tiny.shapes().items() if len(s) == 2 and "embed" not in n}


def fingerprints(paths: tuple[Path, ...]) -> list[str]:
    return [open_checkpoint(path).fingerprint() for path in paths]


def values(shape: tuple[int, int], size: int = 0, seed: int = 0) -> np.ndarray:
    """Gates of two models: a value for each channel, or for each block of a size."""
    wanted = shape if size else shape[:1]
    first = np.random.default_rng(seed).random([-(-n // max(size, 1)) for n in wanted], np.float32)
    return np.stack([first, 1 - first])


def gates_file(
    root: Path,
    models: tuple[Path, ...],
    size: int = 0,
    kind: str = "local",
    prints: list[str] | None = None,
    base: str = "",
) -> Path:
    held = {name: values(shape, size, k) for k, (name, shape) in enumerate(MATRICES_OF_TINY.items())}
    granularity, file = ("channel" if not size else "element" if size == 1 else "block"), root / "gates.safetensors"
    owners = prints or fingerprints(models)
    write_gates(file, held, kind=kind, models=owners, base=base, granularity=granularity, size=max(size, 1))
    return file


def recipe(family: tuple[Path, ...], **changes: object) -> dict:
    return {"method": "graft", "models": [str(family[1]), str(family[2])], "gates": "gates.safetensors", **changes}


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    monkeypatch.chdir(tmp_path)
    return tiny.family(tmp_path, dtype=torch.float32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [0, 1, 5, 8])
def test_a_merge_by_gates_is_the_papers_and_the_same_for_any_workers(
    family: tuple[Path, ...], tmp_path: Path, size: int
) -> None:
    """5 divides no dimension: the last blocks of a matrix are ragged, and hold for what rows and columns are left."""
    held = open_gates(gates_file(tmp_path, family[1:], size))
    for workers in (1, 2, 8):
        graftkit.merge(recipe(family), tmp_path / f"out{workers}", workers=workers)
    made = [(tmp_path / f"out{workers}" / "model.safetensors").read_bytes() for workers in (1, 2, 8)]
    assert made[0] == made[1] == made[2]
    out, *tuned = (load_file(p / "model.safetensors") for p in (tmp_path / "out1", *family[1:]))
    for name, got in out.items():
        pair, wanted = torch.stack([one[name].double() for one in tuned]), None
        if name in MATRICES_OF_TINY:
            rows, columns = pair.shape[1:]
            gates = torch.from_numpy(held.rows(name, columns, 0, rows))
            if size:
                across = torch.tensor([[[i // size, j // size] for j in range(columns)] for i in range(rows)])
                stored = torch.from_numpy(values(pair.shape[1:], size, list(MATRICES_OF_TINY).index(name))).double()
                assert torch.equal(gates, stored[:, across[..., 0], across[..., 1]])
            wanted = get("graft").run(models=pair, gates=gates)
        else:
            wanted = pair.mean(dim=0)
        assert torch.allclose(got.double(), wanted, rtol=1e-7, atol=1e-8), name


def test_rules_give_embeddings_gates_and_take_others_theirs(family: tuple[Path, ...], tmp_path: Path) -> None:
    gates_file(tmp_path, family[1:])
    rules = [
        {"where": {"role": "embedding"}, "knobs": {"global_signal": "entropy"}},
        {"where": {"role": "attention"}, "knobs": {"local_signal": "none"}},
    ]
    told = graftkit.plan(recipe(family, rules=rules))
    chosen = {step.name: (step.knobs["global_signal"], step.knobs["local_signal"]) for step in told.steps}
    assert chosen["model.embed_tokens.weight"] == ("entropy", "none")
    assert chosen["model.layers.0.self_attn.q_proj.weight"] == ("entropy", "none")
    assert chosen["model.layers.0.mlp.up_proj.weight"] == ("entropy", "gates")


@pytest.mark.parametrize(("name", "kind"), [("graft_convex", "weight"), ("graft_free", "coefficient")])
def test_solved_weights_are_merged_as_they_are(family: tuple[Path, ...], tmp_path: Path, name: str, kind: str) -> None:
    gates_file(tmp_path, family[1:], kind=kind)
    graftkit.merge(recipe(family, method=name, base=str(family[0])), tmp_path / "out")
    base, out, *tuned = (load_file(p / "model.safetensors") for p in (family[0], tmp_path / "out", *family[1:]))
    for k, (matrix, shape) in enumerate(MATRICES_OF_TINY.items()):
        pair, own = torch.stack([one[matrix].double() for one in tuned]), torch.from_numpy(values(shape, 0, k)).double()
        wanted = (own[..., None] * (pair - base[matrix])).sum(dim=0) + base[matrix]
        assert torch.allclose(out[matrix].double(), wanted, atol=1e-7)


def test_adapters_are_fused_on_their_products(family: tuple[Path, ...], tmp_path: Path) -> None:
    """Into an adapter, whose rank holds both: the delta is that of the fused weights."""
    tuned = tuple(tiny.adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    names = [n for n in MATRICES_OF_TINY if n.split(".")[-2] in ("q_proj", "down_proj")]
    from graftkit.checkpoints.adapters import open_adapter

    held = {n: values(MATRICES_OF_TINY[n], 0, k) for k, n in enumerate(names)}
    write_gates(
        tmp_path / "gates.safetensors", held, kind="weight", models=[open_adapter(one).fingerprint() for one in tuned]
    )
    told = {"method": "graft_free", "base": str(family[0]), "models": list(map(str, tuned)), "accept_base": True}
    graftkit.merge({**told, "gates": "gates.safetensors"}, tmp_path / "whole")
    graftkit.merge({**told, "gates": "gates.safetensors", "output": {"as": "adapter", "rank": 8}}, tmp_path / "out")
    base, whole = (load_file(p / "model.safetensors") for p in (family[0], tmp_path / "whole"))
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for k, name in enumerate(names):
        parts = [load_file(one / "adapter_model.safetensors") for one in tuned]
        module = "base_model.model." + name.removesuffix(".weight")
        deltas = [2 * part[f"{module}.lora_B.weight"] @ part[f"{module}.lora_A.weight"] for part in parts]
        gates = torch.from_numpy(values(MATRICES_OF_TINY[name], 0, k))
        wanted = sum(g[:, None] * delta for g, delta in zip(gates, deltas, strict=True))
        assert torch.allclose(whole[name] - base[name], wanted, atol=1e-6)
        got = made[f"{module}.lora_B.weight"] @ made[f"{module}.lora_A.weight"] * config["lora_alpha"] / config["r"]
        assert torch.allclose(got, wanted, atol=1e-6)


def test_explain_and_the_record_name_the_gates(family: tuple[Path, ...], tmp_path: Path) -> None:
    file = gates_file(tmp_path, family[1:], 8)
    path = tiny.recipe(tmp_path, json.dumps(recipe(family)))
    shown = CliRunner().invoke(app, ["explain", str(path)])
    assert shown.exit_code == 0 and f"gates  local, one a 8x8 block, 14 matrices  ({file})" in shown.output
    assert "global_signal none, local_signal none" in shown.output  # embeddings
    record = graftkit.merge(path, tmp_path / "out")
    assert record["gates"]["kind"] == "local" and record["gates"]["content"] == open_gates(file).digest
    told = {line["name"]: line.get("entropy") for line in record["tensors"]}
    assert told["model.norm.weight"] is None and len(told["model.layers.0.mlp.up_proj.weight"]) == 2


REFUSALS = {
    "no file": ({}, {"gates": None}, "gates is missing: graft reads a file of gates"),
    "not there": ({}, {"gates": "gate.safetensors"}, "is no file in"),
    "superfluous": ({}, {"method": "average"}, "no tensor is merged by gates"),
    "wrong kind": ({"kind": "coefficient"}, {}, "holds gates of kind coefficient, and graft takes local or weight"),
    "stale": ({"prints": ["other", "files"]}, {}, "was made for these models but model .* has other weights now"),
    "three models": ({}, {"models": ["base", "math", "code"]}, "has gates of 2 models, the recipe lists 3"),
    "another base": ({"base": "other"}, {"base": "base"}, "was made on another base than 'base'"),
    "a rule": (
        {},
        {"rules": [{"where": {"role": "embedding"}, "knobs": {"local_signal": "gates"}}]},
        "has no gates for",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_gates_that_do_not_belong_to_the_merge_are_refused(family: tuple[Path, ...], tmp_path: Path, case: str) -> None:
    changed, asked, message = REFUSALS[case]
    gates_file(tmp_path, family[1:], **changed)
    told = {key: value for key, value in recipe(family, **asked).items() if value is not None}
    with pytest.raises(PlanError, match=message):
        graftkit.plan(told)


def test_gates_of_swapped_models_are_refused(family: tuple[Path, ...], tmp_path: Path) -> None:
    gates_file(tmp_path, (family[2], family[1]))
    with pytest.raises(PlanError, match="in another order"):
        graftkit.plan(recipe(family))


def test_gates_of_another_shape_are_refused(family: tuple[Path, ...], tmp_path: Path) -> None:
    write_gates(
        tmp_path / "gates.safetensors",
        {name: values((3, 3)) for name in MATRICES_OF_TINY},
        kind="local",
        models=fingerprints(family[1:]),
    )
    with pytest.raises(PlanError, match=r"are \[2, 3\], its shape asks for \[2, "):
        graftkit.plan(recipe(family))


def test_files_that_are_no_gates_are_refused(family: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file of gates"):
        graftkit.plan(recipe(family, gates=str(family[0] / "model.safetensors")))
    with pytest.raises(CheckpointError, match="do not"):
        write_gates(tmp_path / "a", {"x": np.ones((2, 3))}, kind="weight", models=["a", "b"])
    with pytest.raises(CheckpointError, match="not finite"):
        write_gates(tmp_path / "a", {"x": np.full((2, 3), np.nan)}, kind="coefficient", models=["a", "b"])


def test_other_gates_are_another_plan(family: tuple[Path, ...], tmp_path: Path) -> None:
    gates_file(tmp_path, family[1:])
    first = graftkit.plan(recipe(family)).hash
    gates_file(tmp_path, family[1:], 8)
    assert graftkit.plan(recipe(family)).hash != first
