"""Recipes: what is read, and what is refused, where and how."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

import graftkit
import tiny
from graftkit.errors import GraftError, PlanError, RecipeError
from graftkit.recipes.recipe import Output, Recipe, Rule, Where, load, parse_size

GOOD = """
method: ties
base: base
models:
  - {model: math, weight: 0.6}
  - code
knobs: {density: 0.3}
rules:
  - where: {role: mlp, layers: 0-1}
    method: task_arithmetic
output: {dtype: float32, shard: 1GB}
seed: 7
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    tiny.family(root)
    return root


def planned(family: Path, text: str) -> object:
    return graftkit.plan(tiny.recipe(family, text))


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = load(GOOD)
    assert load(recipe.to_yaml()) == recipe
    assert recipe.models[1].model == "code" and recipe.models[0].knobs == {"weight": 0.6}


BAD = [
    ("mehtod: ties", "unknown key 'mehtod'; did you mean 'method'"),
    ("denisty: 0.5", "unknown key 'denisty'"),
    ("knobs: {densty: 0.5}", "recipe.knobs: unknown knob of ties 'densty'; did you mean 'density'"),
    ("knobs: {density: 1.5}", r"recipe.knobs.density: got 1.5, expected number in \[0, 1\]"),
    ("knobs: {density: nan}", "recipe.knobs.density: got"),
    ("knobs: {density: .nan}", "recipe.knobs.density: got nan"),
    ("knobs: {density: true}", "recipe.knobs.density: got True"),
    ("knobs: {density: [0.1]}", "recipe.knobs.density: 1 values for 2 models"),
    ("knobs: {density: [0.1, 2]}", r"recipe.knobs.density\[1\]: got 2"),
    ("knobs: {density: {gradient: []}}", "recipe.knobs.density: got"),
    ("knobs: {density: {gradeint: [0, 1]}}", "recipe.knobs.density: got"),
    ("knobs: {scope: modle}", "got 'modle', expected tensor | model; did you mean 'model'"),
    ("rules: [{where: {role: mpl}}]", "rules.*role: got 'mpl'.*did you mean 'mlp'"),
    ("rules: [{where: {}}]", "names no condition"),
    ("rules: [{where: {layers: 5-2}}]", "layers are a number"),
    (
        "rules: [{where: {role: mlp}, method: tise}]",
        r"recipe.rules\[0\].method: unknown method 'tise'; did you mean 'ties'",
    ),
    ("rules: [{where: {role: mlp}, knobs: {desnity: 1}}]", r"recipe.rules\[0\].knobs: unknown knob of ties 'desnity'"),
    ("rules: [{where: {name: '*.nothing'}, knobs: {scale: 1}}]", r"recipe.rules\[0\].where: .*matches no tensor"),
    ("rules: [{where: {layers: 7}, knobs: {scale: 1}}]", r"recipe.rules\[0\].where: .*matches no tensor"),
    ("output: {dtype: bf16}", "output.dtype: got 'bf16', expected .*did you mean 'bfloat16'"),
    ("output: {shard: lots}", "a size is a number"),
    ("output: {lkie: base}", "unknown key 'output.lkie'; did you mean 'like'"),
    ("output: {like: other}", "recipe.output.like: got 'other'"),
    ("seed: -1", "seed"),
    ("rules: [{where: {role: mlp}}]", "changes nothing"),
    ("rules: [{where: {layers: 0-99999999999}, knobs: {scale: 1}}]", "layers are a number"),
    ("knobs: {scale: 1" + 400 * "0" + "}", "recipe.knobs.scale: got"),
    ("knobs: {scale: 1e308}", r"recipe.knobs.scale: got 1e\+308, .*; beyond 1e\+300 nothing is computed"),
    ("output: {shard: " + 400 * "9" + "GB}", "a size is at most"),
    ("seed: " + 30 * "9", "seed"),
    ("seed: x", "seed: got 'x'"),
    ("method: average", "the key 'method' stands twice"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_mistake_is_refused_with_its_place(family: Path, line: str, message: str) -> None:
    text = f"method: ties\nbase: base\nmodels: [math, code]\n{line}\n"
    with pytest.raises(RecipeError, match=message):
        planned(family, text)


STRANGE = [
    ("method: 5", "recipe: method: got 5, expected the name of a method, such as ties"),
    ("method:", "recipe: method: got nothing, expected the name of a method, such as ties"),
    ("models: math", "recipe: models: got 'math', expected a list of at least one model"),
    ("models: []", "recipe: models: got [], expected a list of at least one model"),
    ("models: [3]", "recipe: models[0]: got 3, expected a path, a hub id, the file of a recipe, or a mapping with"),
    ("models: [{model: ''}]", "recipe: models[0].model: got '', expected a path, a hub id or the file of a recipe"),
    ("models: [{modle: a}]", "recipe: the key 'models[0].model' is missing, expected a path, a hub id or the file of"),
    ("models: [{modle: a}]", "; is 'modle' meant to be it?"),
    ("knobs: {3: 4}", "recipe: the key 3 is not text; write it in quotes"),
    ("knobs: [1]", "recipe: knobs: got [1], expected a mapping of a method's knobs, such as {density: 0.2}"),
    ("rules: {where: {role: mlp}}", "recipe: rules: got {'where': {'role': 'mlp'}}, expected a list of rules"),
    ("rules: [{where: mlp}]", "recipe: rules[0].where: got 'mlp', expected a mapping with name, role or layers"),
    ("rules: [{where: {layers: [a]}}]", "recipe: rules[0].where.layers: got ['a'], expected a number, a span such as"),
    ("output: bfloat16", "recipe: output: got 'bfloat16', expected a mapping such as {dtype: bfloat16}"),
    (
        "slices: [{sources: [{layer_range: [0, 1]}]}]",
        "recipe: the key 'slices[0].sources[0].model' is missing, expected a path, a hub id or the file of a recipe",
    ),
    ("accept_base: yes please", "recipe: accept_base: got 'yes please', expected true or false"),
    ("seed: 1.5", "recipe: seed: got 1.5, expected a whole number from 0 to 2^64 - 1"),
    (f"base: [{'long, ' * 99}]", "...,"),
]


@pytest.mark.parametrize(("line", "message"), STRANGE)
def test_a_value_of_another_kind_is_refused_in_our_own_words(line: str, message: str) -> None:
    kept = {"method": "method: ties", "models": "models: [a]"}
    kept.pop(line.partition(":")[0], None)
    with pytest.raises(RecipeError) as told:
        load("\n".join([*kept.values(), line]) + "\n")
    assert message in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("value", [None, 3, 1.5, True, "strange", [[]], {"strange": 1}])
def test_no_message_is_the_parsers(value: object) -> None:
    """Whatever stands where, in any key that there is, the words are ours."""
    whole = {"method": "ties", "models": ["a"], "rules": [{"where": {"role": "mlp"}, "method": "ties"}], "output": {}}
    places = [([], Recipe), (["rules", 0], Rule), (["rules", 0, "where"], Where), (["output"], Output)]
    for place, model in places:
        for name, field in model.model_fields.items():
            data = copy.deepcopy(whole)
            inner: Any = data
            for part in place:
                inner = inner[part]
            inner[field.alias or name] = value
            try:
                load(data)
            except RecipeError as error:
                assert not re.search(r"[Ii]nput|valid |instance of|validation|pydantic", str(error)), str(error)


MODELS = [
    ("method: ties\nmodels: [math, code]", "recipe.base is missing: ties works on deltas"),
    ("method: ties\nbase: base\nmodels: []", "models"),
    ("method: ties\nbase: base", "the key 'models' is missing"),
    ("method: tiess\nmodels: [math]", "recipe.method: unknown method 'tiess'; did you mean 'ties'"),
    (
        "method: slerp\nslices: [{method: slrp, sources: [{model: math, layer_range: [0, 1]}]}]",
        r"recipe.slices\[0\].method: unknown method 'slrp'",
    ),
    ("method: slerp\nmodels: [math]", "slerp takes exactly 2 models, got 1"),
    (
        "method: ties\nbase: base\nmodels: [{model: math, wieght: 1}]",
        r"recipe.models\[0\]: unknown per-model knob of ties 'wieght'; did you mean 'weight'",
    ),
    ("method: ties\nbase: base\nmodels: [{model: math, scope: model}]", "unknown per-model knob of ties 'scope'"),
    (
        "method: ties\nbase: base\nmodels: [{model: math, weight: 0}, code]",
        r"recipe.models\[0\] \(math\) contributes nothing",
    ),
    ("method: ties\nbase: base\nmodels: [mth, code]", "mth: no such directory"),
    ("method: ties\nbase: nobody/nothing\nmodels: [math, code]", "nobody/nothing: no such directory, and the hub"),
    ("- a\n- b", "a recipe is a mapping"),
    ("", "a recipe is a mapping .*; got nothing"),
    ("method: [", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), MODELS)
def test_models_that_cannot_be_merged_are_refused(family: Path, text: str, message: str) -> None:
    with pytest.raises(GraftError, match=message):
        planned(family, text)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 20))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join(9 * [f'*a{n - 1}'])}]}}\n" for n in range(1, 20))


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "models: *a19",
        BOMB + "knobs: {weight: *a19}",
        MERGED + "knobs: *a19",
        "models: &m [a, *m]",
        "base: &b {<<: *b}",
    ],
)
def test_yaml_that_explodes_is_refused_at_once(text: str) -> None:
    with pytest.raises(
        RecipeError, match="line .*: not valid YAML: its anchors are more than 100000 values written out"
    ):
        load(f"method: ties\n{text}\n")


def test_a_character_that_yaml_does_not_have_is_one_line() -> None:
    with pytest.raises(RecipeError, match="not valid YAML: unacceptable character.*position 15$"):
        load("method: average\0\n")


def test_anchors_may_be_used() -> None:
    assert (
        load("method: average\nmodels: [&x {model: a, weight: &w 2}, *x, {model: b, weight: *w}]\n").models[1].model
        == "a"
    )


def test_relative_paths_start_at_the_recipe(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(graftkit.plan(tiny.recipe(family, "method: average\nmodels: [math, code]")).steps) == len(tiny.shapes())


def settings(family: Path, text: str) -> dict:
    return {
        s.name: s
        for s in graftkit.plan(tiny.recipe(family, f"method: ties\nbase: base\nmodels: [math, code]\n{text}")).steps
    }


def test_later_rules_win_and_a_change_of_method_leaves_foreign_knobs_behind(family: Path) -> None:
    steps = settings(
        family,
        "knobs: {density: 0.5, weight: [0.1, 0.2]}\nrules:\n"
        "  - {where: {role: mlp}, method: task_arithmetic}\n"
        "  - {where: {name: '*layers.1.mlp.up*'}, knobs: {weight: 0.9}}\n",
    )
    assert steps["model.layers.0.self_attn.q_proj.weight"].knobs["density"] == (0.5, 0.5)
    assert steps["model.layers.0.mlp.up_proj.weight"].method == "task_arithmetic"
    assert steps["model.layers.0.mlp.up_proj.weight"].knobs["weight"] == (0.1, 0.2)
    assert steps["model.layers.1.mlp.up_proj.weight"].knobs["weight"] == (0.9, 0.9)


def test_gradients_run_from_the_first_layer_to_the_last(family: Path) -> None:
    steps = settings(family, "knobs: {weight: {gradient: [0.2, 0.8]}}")
    assert steps["model.embed_tokens.weight"].knobs["weight"] == (0.2, 0.2)
    assert steps["model.layers.0.mlp.up_proj.weight"].knobs["weight"] == (0.2, 0.2)
    assert steps["model.layers.1.mlp.up_proj.weight"].knobs["weight"] == pytest.approx((0.8, 0.8))
    assert steps["model.norm.weight"].knobs["weight"] == pytest.approx((0.8, 0.8))


def test_a_value_beside_a_model_leaves_the_others_at_the_common_value(family: Path) -> None:
    text = "method: ties\nbase: base\nmodels: [{model: math, weight: 0.3}, code]\nknobs: {weight: 0.7}\n"
    steps = graftkit.plan(tiny.recipe(family, text)).steps
    assert {s.knobs["weight"] for s in steps} == {(0.3, 0.7)}


def test_the_hash_names_recipe_and_inputs(family: Path) -> None:
    text = "method: ties\nbase: base\nmodels: [math, code]\n"
    one, two, other = (
        graftkit.plan(tiny.recipe(family, t)).hash for t in (text, text + "# a remark\n", text + "seed: 1\n")
    )
    assert one == two != other


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1572864), ("100", 100), ("2kb", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(method="average", models=[{"model": "a"}]).method = "ties"  # type: ignore[misc]


def test_a_plan_error_is_a_recipe_error() -> None:
    assert issubclass(PlanError, RecipeError)
