"""What `graft inspect` measures, against float64 references; what it reports, and what it refuses."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from graftkit.cli import app
from graftkit.cli.inspect import meaning
from graftkit.errors import DataError, PlanError
from graftkit.measuring import inspection, passes
from graftkit.measuring.inspection import inspect
from graftkit.recipes import layout


def held(directory: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors in float64."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor.double().numpy() for file in files for name, tensor in load_file(file).items()}


def entropy(values: np.ndarray) -> float:
    counts = np.histogram(values, bins=10)[0] if values.min() < values.max() else np.array([values.size])
    shares = counts[counts > 0] / values.size
    return float(-(shares * np.log(shares)).sum())


def deltas(directory: Path, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An adapter's deltas, or a checkpoint's."""
    if not (directory / "adapter_config.json").is_file():
        return {name: value - base[name] for name, value in held(directory).items()}
    factors, made = held(directory), {name: np.zeros_like(value) for name, value in base.items()}
    for name in factors:
        if name.endswith("lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            made[weight] = 2 * factors[name.replace("lora_A", "lora_B")] @ factors[name]  # alpha is twice the rank
    return made


def flat(tensors: dict[str, np.ndarray], part: str) -> np.ndarray:
    return np.concatenate([v.ravel() for name, v in tensors.items() if part in (layout.role(name), "total", name)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_checkpoint_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tiny.weights(0, dtype=dtype)
    weights["model.layers.0.mlp.up_proj.weight"][:, ::3] = 0
    weights["model.norm.weight"][:] = 1
    path = tiny.save(tmp_path / "model", weights, shards=3)
    found, exact = inspect(path), held(path)
    facts = found.models[0]
    assert (facts.name, facts.kind, facts.tensors) == ("model", "checkpoint", len(weights))
    assert facts.parameters == sum(facts.dtypes.values()) == sum(v.size for v in exact.values())
    assert facts.bytes == facts.parameters * dtype.itemsize
    (made,) = found.weights
    for part, measure in {**made.tensors, **made.roles, "total": made.total}.items():
        values = flat(exact, part)
        assert measure.elements == values.size
        assert measure.norm == pytest.approx(np.linalg.norm(values), rel=1e-12)
        assert measure.zeros == pytest.approx(np.mean(values == 0), abs=1e-12)
        within = [v for name, v in exact.items() if part in (layout.role(name), "total", name)]
        mean = sum(entropy(v) * v.size for v in within) / values.size
        assert measure.entropy == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert made.tensors["model.norm.weight"].entropy == 0
    assert list(made.layers) == [0, 1]
    assert not found.changes and not found.pairs and not found.non_finite
    assert "every value is finite" in meaning(found)


def test_values_on_the_edges_of_bins_fall_as_in_numpy(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {f"t{k}": (generator.integers(-k, k + 2, 501) / (k + 0.7)).astype(np.float32) for k in range(1, 40)}
    tensors["uniform"] = np.linspace(0, 1, 1000, dtype=np.float32)
    save_file({name: torch.from_numpy(v) for name, v in tensors.items()}, tmp_path / "model.safetensors")
    (found,) = inspect(tmp_path).weights
    for name, values in tensors.items():
        assert found.tensors[name].entropy == pytest.approx(entropy(values.astype(np.float64)), rel=1e-12), name
    assert found.tensors["uniform"].entropy == pytest.approx(math.log(10), abs=1e-3)


@pytest.mark.parametrize("kinds", ["checkpoints", "adapters", "mixed"])
def test_deltas_of_models_of_all_kinds(tmp_path: Path, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BLOCK", 100)
    base, *tuned = tiny.family(tmp_path, dtype=torch.float32)
    lora = [tiny.adapter(tmp_path / "lora_a", 5), tiny.adapter(tmp_path / "lora_b", 6, targets=("q_proj", "up_proj"))]
    models = {"checkpoints": tuned, "adapters": lora, "mixed": [tuned[0], *lora]}[kinds]
    found, stem = inspect(models, base), held(base)
    exact = [deltas(path, stem) for path in models]
    close = 1e-5 if kinds != "checkpoints" else 1e-6  # float32 products and differences
    assert found.compared == "deltas" and not found.weights and found.base and found.base.name == "base"
    for change, delta in zip(found.changes, exact, strict=True):
        for part, measure in {**change.tensors, **change.roles, "total": change.total}.items():
            values = flat(delta, part)
            assert measure.norm == pytest.approx(np.linalg.norm(values), rel=close)
            relative = np.linalg.norm(values) / np.linalg.norm(flat(stem, part))
            assert measure.relative == pytest.approx(relative, rel=close)
            assert measure.unchanged == pytest.approx(np.mean(values == 0), abs=1e-12)
    for pair, (left, right) in zip(found.pairs, combinations(exact, 2), strict=True):
        for part, measure in {**pair.tensors, **pair.roles, "total": pair.total}.items():
            check_pair(measure, flat(left, part), flat(right, part), close)


def check_pair(measure: inspection.Pair, left: np.ndarray, right: np.ndarray, close: float) -> None:
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    assert (measure.cosine is None) == (norms == 0)
    if norms:
        assert measure.cosine == pytest.approx(left @ right / norms, abs=close)
    both = (left != 0) & (right != 0)
    opposed = (np.sign(left) != np.sign(right)) & both
    assert measure.distance == pytest.approx(np.linalg.norm(left - right), rel=close)
    assert measure.shared == pytest.approx(both.mean(), abs=1e-12)
    assert measure.conflicts == pytest.approx(opposed.sum() / max(both.sum(), 1), abs=1e-12)
    assert measure.equal == pytest.approx(np.mean(left == right), abs=1e-12)


def test_weights_beside_each_other_without_a_base(tmp_path: Path) -> None:
    paths = tiny.family(tmp_path)[1:]
    found = inspect(paths)
    assert found.compared == "weights" and len(found.weights) == 2 and not found.changes
    for part, measure in {**found.pairs[0].tensors, "total": found.pairs[0].total}.items():
        check_pair(measure, *(flat(held(path), part) for path in paths), 1e-12)
    assert "of one line" in meaning(found)


def test_adapters_beside_each_other_without_a_base(tmp_path: Path) -> None:
    base = held(tiny.family(tmp_path)[0])
    one, two = tiny.adapter(tmp_path / "one", 5), tiny.adapter(tmp_path / "two", 6, targets=("q_proj", "k_proj"))
    found = inspect([one, two])
    assert found.compared == "deltas"
    compared = found.pairs[0].tensors
    exact = [np.concatenate([deltas(path, base)[name].ravel() for name in compared]) for path in (one, two)]
    check_pair(found.pairs[0].total, *exact, 1e-5)
    facts = found.models[0].adapter
    assert facts and (facts.ranks, facts.scales, facts.alpha) == ((4,), (2.0,), 8)
    assert facts.targets == ("down_proj", "q_proj") and facts.modules == 4 and facts.base == "tiny/base"
    assert found.weights[0].total.norm == pytest.approx(np.linalg.norm(flat(deltas(one, base), "total")), rel=1e-6)


def test_whole_tensors_of_an_adapter_are_measured_against_the_base(tmp_path: Path) -> None:
    base = tiny.family(tmp_path)[0]
    path = tiny.adapter(tmp_path / "adapter", 5)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.full((tiny.HIDDEN,), 3.0)
    save_file(tensors, path / "adapter_model.safetensors")
    change = inspect(path, base).changes[0].tensors["model.norm.weight"]
    assert change.norm == pytest.approx(np.linalg.norm(3 - held(base)["model.norm.weight"]), rel=1e-6)
    with pytest.raises(PlanError, match="give --base"):
        inspect([path, tiny.adapter(tmp_path / "other", 6)])


def test_neither_workers_nor_names_of_wrappers_change_a_number(tmp_path: Path) -> None:
    base, math_, code = tiny.family(tmp_path)
    held = load_file(code / "model.safetensors")
    bare = tiny.save(tmp_path / "bare", {name.removeprefix("model."): tensor for name, tensor in held.items()})
    one, two = (inspect([math_, code], base, workers=workers) for workers in (1, 3))
    three = inspect([math_, bare], base, workers=2)
    assert one.to_dict() == two.to_dict()
    assert one.pairs[0].total == three.pairs[0].total and one.changes[1].tensors == three.changes[1].tensors


def test_what_is_not_finite_is_named_and_left_out(tmp_path: Path) -> None:
    base, math_, code = tiny.family(tmp_path, dtype=torch.float32)
    tensors = load_file(math_ / "model.safetensors")
    name, other = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
    tensors[name][3, 4], tensors[name][5, 6], tensors[other][0, 0] = torch.nan, -torch.inf, torch.inf
    tiny.save(math_, tensors)
    alone, beside = inspect(math_), inspect([math_, code], base)
    for found in (alone, beside, inspect([math_, code])):
        told = [(f.model, f.tensor, f.nan, f.infinite) for f in found.non_finite]
        assert told == [("model 'math'", other, 0, 1), ("model 'math'", name, 1, 1)]
        assert "NaN or infinity in 2 tensors" in meaning(found) and json.dumps(found.to_dict(), allow_nan=False)
    values = tensors[name].double().numpy().ravel()
    finite = np.isfinite(values)
    assert alone.weights[0].tensors[name].entropy == pytest.approx(entropy(values[finite]), rel=1e-12)
    assert beside.changes[0].tensors[name].elements == values.size - 2
    left, right = values - held(base)[name].ravel(), (held(code)[name] - held(base)[name]).ravel()
    check_pair(beside.pairs[0].tensors[name], left[finite], right[finite], 1e-6)


def test_integers_alone_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    save_file({"n": torch.arange(5), "m": torch.ones(2, dtype=torch.int32)}, tmp_path / "a" / "model.safetensors")
    save_file({"n": torch.ones(5)}, tmp_path / "b" / "model.safetensors")
    for models, base in (
        ([tmp_path / "a"], None),
        ([tmp_path / "b", tmp_path / "a"], None),
        ([tmp_path / "b"], tmp_path / "a"),
    ):
        with pytest.raises(PlanError, match=r"'a': no tensor of floating point in .*, only I32, I64"):
            inspect(models, base)


def test_integers_are_counted_and_not_measured(tmp_path: Path) -> None:
    tensors = tiny.weights(0) | {"steps": torch.arange(5)}
    found = inspect(tiny.save(tmp_path / "model", tensors))
    assert found.models[0].dtypes["I64"] == 5 and "steps" not in found.weights[0].tensors
    assert found.notes == ("model 'model': 1 tensors that are not floating point are not measured",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((0.0, 0.0), "a delta is zero"),
        ((0.01, None), "light fine-tune: the delta is 1.00%"),
        ((0.1, None), "heavy fine-tune"),
        ((0.0, None), "equals its base"),
        ((0.1, 0.1), "deltas are aligned (one and two: cosine 1.000)"),
        ((0.1, -0.1), "opposed"),
        ((2.0, 0.1), "hardly a fine-tune of this base"),
    ],
)
def test_the_sentence_at_the_end(tmp_path: Path, changes: tuple[float | None, ...], words: str) -> None:
    base = {name: v.float() for name, v in tiny.weights(0).items()}
    paths = [
        tiny.save(tmp_path / name, {k: (1 + step) * v for k, v in base.items()})
        for name, step in zip(("one", "two"), changes, strict=True)
        if step is not None
    ]
    assert words in meaning(inspect(paths, tiny.save(tmp_path / "base", base)))


def test_random_deltas_are_nearly_orthogonal_and_mixed_ones_overlap(tmp_path: Path) -> None:
    base = tiny.weights(0, dtype=torch.float32)
    one, two = (tiny.weights(seed, dtype=torch.float32, near=base) for seed in (1, 2))
    between = {name: base[name] + (one[name] - base[name]) * 0.3 + (two[name] - base[name]) for name in base}
    models = {"base": base, "one": one, "two": two, "between": between}
    paths = {name: tiny.save(tmp_path / name, tensors) for name, tensors in models.items()}
    assert "nearly orthogonal" in meaning(inspect([paths["one"], paths["two"]], paths["base"]))
    found = inspect([paths["one"], paths["between"]], paths["base"])
    assert "overlap in part" in meaning(found) and 0.2 < (found.pairs[0].total.cosine or 0) < 0.4


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    base, math_, _ = tiny.family(tmp_path)
    lora = tiny.adapter(tmp_path / "lora", 5)
    short = dict(list(tiny.weights(1).items())[:-1])
    wide = tiny.weights(1) | {"model.norm.weight": torch.ones(tiny.HIDDEN + 1)}
    for models, stem, words in [
        ([math_, lora], None, "give --base"),
        ([math_], lora, "is an adapter; the base is a whole checkpoint"),
        ([tiny.save(tmp_path / "short", short)], base, "model 'short' lacks the tensor 'model.norm.weight'"),
        ([tiny.save(tmp_path / "wide", wide)], base, "cannot be compared with base 'base': model 'wide' has"),
        ([], None, "no model given"),
    ]:
        with pytest.raises(PlanError, match=words):
            inspect(models, stem)
    with pytest.raises(DataError, match="give each once"):
        inspect([math_, math_], base)


def test_the_command_prints_tables_or_json(tmp_path: Path) -> None:
    base, math_, code = map(str, tiny.family(tmp_path))
    lora = str(tiny.adapter(tmp_path / "lora", 5))
    tables = CliRunner().invoke(app, ["inspect", math_, code, lora, "--base", base])
    assert tables.exit_code == 0, tables.output
    for words in ("deltas to the base", "×", "LoRA of rank 4, scale 2 on 4 modules", "nearly orthogonal"):
        assert words in tables.stdout, words
    told = json.loads(CliRunner().invoke(app, ["inspect", math_, "--json"]).stdout)
    assert told["weights"][0]["total"]["elements"] == told["models"][0]["parameters"]
    assert "tensors" not in told["weights"][0] and set(told["weights"][0]["layers"]) == {"0", "1"} and told["meaning"]
    every = CliRunner().invoke(app, ["inspect", math_, code, "--base", base, "--json", "--tensors", "--workers", "1"])
    assert "model.norm.weight" in json.loads(every.stdout)["pairs"][0]["tensors"]
