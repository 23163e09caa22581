"""mergekit's recipes, run unmodified, against what mergekit 0.1.5 made of them.

`tests/data/mergekit` holds a recipe of every shape and method and mergekit's output (`remake.py` makes it again). With
`dtype: float32` the two differ by float32's rounding, in which mergekit computes: 2e-6 of weights below 2. With
bfloat16 they differ by its rounding of inputs, of products and of sums, a few units of its last place.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import graftkit
import mergekit_models
from graftkit.cli import app
from graftkit.recipes.explain import as_yaml
from graftkit.recipes.recipe import load

DATA = Path(__file__).parent / "data" / "mergekit"
RECIPES = sorted(path.stem for path in DATA.glob("*.yaml"))
TOLD = json.loads((DATA / "versions.json").read_text())
RANDOM = [name for name in RECIPES if name.endswith("_random")]
OF_ONE = [name for name in RECIPES if name.endswith("_of_one")]
NARROW = [name for name in RECIPES if name.endswith("_bfloat16")]
CLOSE = 2e-6
METHODS = {
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear",
    "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "model_stock", "nearswap", "arcee_fusion",
    "ram", "ramplus_tl", "passthrough",
}  # fmt: skip
"""All that `mergekit.merge_methods.registry` of 0.1.5 registers."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return mergekit_models.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def theirs():
    whole = load_file(DATA / "outputs.safetensors")
    found = {name: {} for name in RECIPES}
    for name, tensor in whole.items():
        recipe, _, tensor_name = name.partition(":")
        found[recipe][tensor_name] = tensor
    return found


@pytest.fixture
def merged(models, tmp_path, monkeypatch):
    """Merges a recipe of `DATA` where its models are; returns the tensors and the directory."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))

    def run(name):
        graftkit.merge(DATA / f"{name}.yaml", tmp_path / "out", workers=1)
        return load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out"

    return run


def vocabulary(directory):
    from transformers import AutoTokenizer

    held = AutoTokenizer.from_pretrained(directory).get_vocab()
    return sorted(held, key=held.get)


def by_token(tensor, tokens, order):
    """The rows of an embedding in the order of these tokens, those of no token behind them."""
    return torch.cat([tensor[[tokens.index(token) for token in order]], tensor[len(tokens) :]])


def test_the_data_is_of_the_version_and_of_these_models():
    assert TOLD["versions"]["mergekit"] == "0.1.5"
    assert TOLD["models"] == mergekit_models.digest(), "the models are others here: run remake.py"
    assert sorted(TOLD["recipes"]) == RECIPES


def test_there_is_a_recipe_of_every_method():
    import yaml

    assert {yaml.safe_load((DATA / f"{name}.yaml").read_text())["merge_method"] for name in RECIPES} == METHODS
    from graftkit.recipes.mergekit.methods import METHODS as ours

    assert set(ours) == METHODS


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in (*RANDOM, *OF_ONE, *NARROW)])
def test_the_tensors_are_mergekits(name, merged, theirs):
    got, out = merged(name)
    want, told = theirs[name], TOLD["recipes"][name]
    tokens = vocabulary(out)
    assert set(got) == set(want) and set(tokens) == set(told["tokens"])
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (told["num_hidden_layers"], told["vocab_size"])
    assert config["dtype"] == told["dtype"]
    for tensor, value in got.items():
        assert value.dtype == want[tensor].dtype
        mine = by_token(value, tokens, told["tokens"]) if "embed" in tensor else value
        torch.testing.assert_close(
            mine.float(), want[tensor].float(), rtol=0, atol=CLOSE, msg=lambda m, t=tensor: f"{t}: {m}"
        )


@pytest.mark.parametrize("name", NARROW)
def test_in_bfloat16_they_differ_by_its_rounding(name, merged, theirs):
    """Five roundings of the largest number that goes in; an election may turn on one of them."""
    got, _ = merged(name)
    inputs = [mergekit_models.weights(model) for model in ("base", "a", "b")]
    beyond = 0
    for tensor, value in got.items():
        assert value.dtype == theirs[name][tensor].dtype == torch.bfloat16
        largest = torch.tensor(np.max([np.abs(part[tensor]) for part in inputs], axis=0))
        beyond += int(((value.float() - theirs[name][tensor].float()).abs() > 5 * 2**-8 * largest).sum())
    assert beyond <= (0.02 if name.startswith("ties") else 0) * sum(value.numel() for value in got.values())


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_drop_as_many_and_keep_as_much(name, merged, theirs):
    """Other masks, the same statistics: the share of weights that no model changes, and the size of all changes."""
    got, _ = merged(name)
    base = mergekit_models.weights("base")
    both = [
        torch.cat([(tensors[n].double() - torch.from_numpy(base[n]).double()).reshape(-1) for n in base])
        for tensors in (got, theirs[name])
    ]
    still, sizes = (
        [float(f(part)) for part in both] for f in (lambda d: (d == 0).double().mean(), lambda d: d.abs().mean())
    )
    assert abs(still[0] - still[1]) < 5 * (2 * still[1] * (1 - still[1]) / both[0].numel()) ** 0.5
    assert abs(sizes[0] / sizes[1] - 1) < 0.1


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize("name", OF_ONE)
def test_one_factor_restores_the_norm(name, side, merged, theirs):
    tensors = merged(name)[0] if side == "ours" else theirs[name]
    base, far = mergekit_models.weights("base"), mergekit_models.weights("far")
    kept, small = [], []
    for tensor, value in tensors.items():
        delta = torch.from_numpy(far[tensor] - base[tensor]).double()
        change = value.double() - torch.from_numpy(base[tensor]).double()
        mask = change != 0
        factors = (change / delta)[mask]
        torch.testing.assert_close(factors, factors.median().expand_as(factors), rtol=1e-3, atol=1e-3)
        assert float(change.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
        kept.append(mask.reshape(-1))
        small.append((delta.abs() < delta.abs().median()).reshape(-1))
    kept, small = torch.cat(kept).double(), torch.cat(small)
    assert abs(float(kept.mean()) - 0.4) < 5 * (0.24 / kept.numel()) ** 0.5
    gap = float(kept[~small].mean() - kept[small].mean())
    assert 0.1 < gap < 0.3 if "della" in name else abs(gap) < 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_that_is_printed_makes_the_same_plan(name, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    printed = as_yaml(load(DATA / f"{name}.yaml"))
    assert "merge_method" not in printed
    assert as_yaml(load(printed)) == printed
    assert graftkit.plan(printed).hash == graftkit.plan(DATA / f"{name}.yaml").hash


def test_on_the_command_line(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    path = str(DATA / "ties.yaml")
    shown = CliRunner().invoke(app, ["explain", path])
    assert shown.exit_code == 0 and "note: mergekit's weights count in the election" in shown.output
    printed = CliRunner().invoke(app, ["explain", path, "--as-recipe"])
    assert printed.exit_code == 0 and printed.output.startswith("method: ties\nbase: base\nmodels:\n- {model: a,")
    (tmp_path / "ours.yaml").write_text(printed.output)
    for recipe, out in ((path, "one"), (str(tmp_path / "ours.yaml"), "two")):
        assert CliRunner().invoke(app, ["merge", recipe, str(tmp_path / out)]).exit_code == 0
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_our_own_recipes_are_printed_in_full(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: ties\nbase: base\nmodels: [a, {model: b, weight: 1e-1}]\n")
    printed = CliRunner().invoke(app, ["explain", str(tmp_path / "recipe.yaml"), "--as-recipe"])
    assert printed.output == "method: ties\nbase: base\nmodels:\n- {model: a}\n- {model: b, weight: 0.1}\n"
