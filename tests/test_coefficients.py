"""Weights by rule or from a file: `{from: metagpt}`, `{from: nan}`, `{from: FILE}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit.errors import PlanError, RecipeError
from graftkit.recipes.coefficients import Rule


def held(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(directory / "model.safetensors").items()}


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    base, *tuned = tiny.family(tmp_path, dtype=torch.float32)
    weights = load_file(tuned[1] / "model.safetensors")
    first = load_file(base / "model.safetensors")
    tiny.save(tuned[1], {name: first[name] + 3 * (value - first[name]) for name, value in weights.items()})
    return base, tuned


def merged(family: tuple[Path, list[Path]], out: Path, weight: Any, **more: Any) -> dict[str, Any]:
    base, tuned = family
    recipe = {"method": "task_arithmetic", "base": str(base), "models": [str(m) for m in tuned], **more}
    return graftkit.merge({**recipe, "knobs": {"weight": weight, **more.get("knobs", {})}}, out)


def layer_of(name: str) -> str:
    return f"layer {name.split('.')[2]}" if ".layers." in name else "outside the layers"


def wanted(family: tuple[Path, list[Path]], rule: str, of: str, together: Any) -> dict[str, list[float]]:
    """The formulas, on whole tensors in float64."""
    base, tuned = held(family[0]), [held(model) for model in family[1]]
    sums: dict[str, np.ndarray] = {}
    for name in base:
        squares = [float((m[name] - (base[name] if of == "delta" else 0)).square().sum()) for m in tuned]
        sums[together(name)] = sums.get(together(name), 0) + np.array(squares)
    raw = {key: s if rule == "metagpt" else 1 / np.sqrt(s) for key, s in sums.items()}
    return {key: list(value / value.sum()) for key, value in raw.items()}


CASES = [
    ({"from": "metagpt"}, "metagpt", "delta", lambda name: "model"),
    ({"from": "metagpt", "scope": "layer"}, "metagpt", "delta", layer_of),
    ({"from": "nan"}, "nan", "delta", layer_of),
    ({"from": "nan", "scope": "model"}, "nan", "delta", lambda name: "model"),
    ({"from": "nan", "of": "weight", "scope": "tensor"}, "nan", "weight", lambda name: name),
]


@pytest.mark.parametrize(("given", "rule", "of", "together"), CASES)
def test_a_rule_gives_the_weights_of_its_formula(family, tmp_path, given, rule, of, together):
    made = merged(family, tmp_path / "out", given, output={"dtype": "float32"})
    expected = wanted(family, rule, of, together)
    (recorded,) = made["coefficients"].values()
    assert recorded.keys() == expected.keys()
    for key, line in recorded.items():
        np.testing.assert_allclose(line, expected[key], rtol=1e-6)
        assert sum(line) == pytest.approx(1)
    base, tuned, out = held(family[0]), [held(m) for m in family[1]], held(tmp_path / "out")
    for name, got in out.items():
        line = expected[together(name)]
        exact = base[name] + sum(w * (m[name] - base[name]) for w, m in zip(line, tuned, strict=True))
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)
    on_disk = json.loads((tmp_path / "out" / "graft.json").read_text())
    assert on_disk["coefficients"] == made["coefficients"]


def test_a_rule_knows_what_others_do_not_weigh():
    assert Rule("metagpt", "delta", "model").values([9.0, 1.0]) == pytest.approx([0.9, 0.1])
    assert Rule("nan", "delta", "model").values([4.0, 9.0]) == pytest.approx([0.6, 0.4])
    assert Rule("nan", "delta", "model", 2.0).values([4.0, 0.0, 4.0]) == pytest.approx([1.0, 0.0, 1.0])
    assert Rule("metagpt", "delta", "model").values([0.0, 0.0]) == [0.5, 0.5]


@pytest.mark.parametrize("output", [{"as": "adapter"}, {"as": "adapter", "rank": 4}])
@pytest.mark.parametrize("name", ["task_arithmetic", "wudi"])
def test_adapters_are_weighed_by_their_products(tmp_path, output, name):
    models = [tiny.adapter(tmp_path / str(k), k, rank=2 + k) for k in range(2)]
    recipe = {"method": name, "models": [str(m) for m in models], "output": output}
    made = graftkit.merge({**recipe, "knobs": {"weight": {"from": "metagpt"}}}, tmp_path / "out")
    from test_spectral_merges import products

    squares = np.array([sum(np.sum(d**2) for d in products(m).values()) for m in models])
    (line,) = next(iter(made["coefficients"].values())).values()
    np.testing.assert_allclose(line, squares / squares.sum(), rtol=1e-6)
    graftkit.merge({**recipe, "knobs": {"weight": line}}, tmp_path / "same")
    one, same = (load_file(tmp_path / o / "adapter_model.safetensors") for o in ("out", "same"))
    assert all(torch.equal(one[n], same[n]) for n in same)


@pytest.mark.parametrize("method", ["ties", "average", "tsv", "dare"])
def test_rules_go_with_other_methods_and_preparations(family, tmp_path, method):
    """The same bytes as with the numbers of the record written out."""
    more = {"method": method, "prepare": [{"trim": {"density": 0.5}}], "output": {"dtype": "float32"}}
    made = merged(family, tmp_path / "rule", {"from": "metagpt"}, **more)
    (line,) = next(iter(made["coefficients"].values())).values()
    np.testing.assert_allclose(line, wanted(family, "metagpt", "delta", lambda n: "model")["model"], rtol=1e-6)
    merged(family, tmp_path / "numbers", line, **more)
    one, other = held(tmp_path / "rule"), held(tmp_path / "numbers")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rule_for_some_tensors_measures_those(family, tmp_path):
    rules = [{"where": {"role": "mlp"}, "knobs": {"weight": {"from": "metagpt"}}}]
    base, tuned = family
    recipe = {"method": "task_arithmetic", "base": str(base), "models": [str(m) for m in tuned], "rules": rules}
    made = graftkit.merge(recipe, tmp_path / "out")
    first, models = held(base), [held(m) for m in tuned]
    squares = [sum(float((m[n] - first[n]).square().sum()) for n in first if ".mlp." in n) for m in models]
    (line,) = next(iter(made["coefficients"].values())).values()
    np.testing.assert_allclose(line, np.array(squares) / sum(squares), rtol=1e-5)


def test_workers_change_no_byte_of_a_rule(family, tmp_path):
    base, tuned = family
    recipe = {"method": "ties", "base": str(base), "models": [str(m) for m in tuned]}
    for workers in (1, 2):
        graftkit.merge({**recipe, "knobs": {"weight": {"from": "nan"}}}, tmp_path / str(workers), workers=workers)
    one, two = held(tmp_path / "1"), held(tmp_path / "2")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_file_gives_values_by_tensor(family, tmp_path):
    file = tmp_path / "coefficients.yaml"
    file.write_text("values: [0.5, 0.25]\ntensors:\n  '*.mlp.*': [1.0, 0.0]\n")
    merged(family, tmp_path / "out", {"from": str(file)})
    base, tuned, out = held(family[0]), [held(m) for m in family[1]], held(tmp_path / "out")
    for name, got in out.items():
        one, other = (1.0, 0.0) if ".mlp." in name else (0.5, 0.25)
        exact = base[name] + one * (tuned[0][name] - base[name]) + other * (tuned[1][name] - base[name])
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"from": "metagtp"}, "recipe.knobs.weight: got .*metagpt"),
        ({"from": "nan", "off": "delta"}, "recipe.knobs.weight: unknown option of nan 'off'; did you mean 'of'"),
        ({"from": "nan", "of": "deltas"}, r"recipe.knobs.weight.of: got 'deltas', expected delta \| weight"),
        ({"from": "metagpt", "of": "weight"}, "recipe.knobs.weight.of: got 'weight', expected delta"),
        ({"from": "nan", "scale": "2"}, "recipe.knobs.weight.scale: got '2', expected a number"),
    ],
)
def test_what_no_rule_is_is_refused(family, tmp_path, weight, said):
    with pytest.raises(RecipeError, match=said):
        merged(family, tmp_path / "out", weight)


def test_a_rule_gives_weights_only(family, tmp_path):
    with pytest.raises(RecipeError, match="metagpt gives weights, and 'density' is none"):
        merged(family, tmp_path / "out", 1.0, method="ties", knobs={"density": {"from": "metagpt"}})


@pytest.mark.parametrize(
    ("text", "said"),
    [("values: [1]", "1 values for 2 models"), ("value: [1, 2]", "the keys"), ("[1, 2]", "the keys"),
     ("tensors: {a: [1, 2]}", "has no values for"), ("tensors: [1]", "maps patterns"), ("a: [", "cannot be read"),
     ("values: &v [1, *v]", "cannot be read"), ("a: 1\na: 2", "cannot be read")],
)  # fmt: skip
def test_a_broken_file_is_refused(family, tmp_path, text, said):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        merged(family, tmp_path / "out", {"from": str(tmp_path / "file.yaml")})


def test_norms_of_deltas_need_a_base(family, tmp_path):
    recipe = {"method": "average", "models": [str(m) for m in family[1]], "knobs": {"weight": {"from": "metagpt"}}}
    with pytest.raises(PlanError, match="merged without a base"):
        graftkit.plan(recipe)
    recipe["knobs"] = {"weight": {"from": "nan", "of": "weight"}}
    assert graftkit.merge(recipe, tmp_path / "out")["coefficients"]


def test_explain_shows_the_rule(family):
    from typer.testing import CliRunner

    from graftkit.cli import app

    base, tuned = family
    recipe = base.parent / "recipe.yaml"
    recipe.write_text(
        f"method: task_arithmetic\nbase: {base}\nmodels: [{tuned[0]}, {tuned[1]}]\nknobs: {{weight: {{from: nan}}}}\n"
    )
    done = CliRunner().invoke(app, ["explain", str(recipe)])
    assert done.exit_code == 0 and "weight from nan (of delta, scope layer, scale 1.0)" in " ".join(done.output.split())
