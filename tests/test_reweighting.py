"""A plan with other weights is the plan of the recipe with these weights; where more is new there is none."""

from __future__ import annotations

import shutil

import pytest
import torch

import tiny
from graftkit.errors import RecipeError
from graftkit.execution.live import Live
from graftkit.recipes.plan import plan
from graftkit.recipes.recipe import load
from graftkit.recipes.reweighting import reweighted


def recipe(family, *weights, method="task_arithmetic", **more):
    models = [{"model": str(path), "weight": w} for path, w in zip(family[1:], weights, strict=True)]
    return {"method": method, "base": str(family[0]), "models": models, "accept_base": True, **more}


@pytest.mark.parametrize(("method", "more"), [
    ("task_arithmetic", {}), ("average", {}), ("ties", {"knobs": {"density": 0.3}}),
    ("dare", {"knobs": {"density": 0.4, "scale": 0.5}, "prepare": [{"trim": {"density": 0.5}}]}),
])  # fmt: skip
def test_it_is_the_plan_of_the_recipe(tmp_path, method, more):
    family = tiny.family(tmp_path)
    before = plan(recipe(family, 0.4, 1, method=method, **more))
    wanted = recipe(family, 0.7, -0.2, method=method, **more)
    found, fresh = reweighted(before, load(wanted)), plan(wanted)
    assert found is not None
    assert found.steps == fresh.steps != before.steps
    assert (found.hash, found.recipe, found.stages, found.notes) == (
        fresh.hash,
        fresh.recipe,
        fresh.stages,
        fresh.notes,
    )


def test_where_more_than_weights_is_new(tmp_path):
    family = tiny.family(tmp_path)
    before = plan(recipe(family, 0.4, 0.5))
    ruled = {"rules": [{"where": {"role": "mlp"}, "knobs": {"weight": 0.1}}]}
    others = [
        recipe(family, 0.4, 0.0), recipe(family, 0.4, 0.5, knobs={"scale": 0.5}), recipe(family, 0.4, 0.5, **ruled),
        recipe(family, 0.4, 0.5, method="ties"), recipe(family, 0.4, 0.5, output={"dtype": "float32"}),
        recipe(family, {"gradient": [0.1, 0.9]}, 0.5), recipe(family[:2], 0.4), recipe(family, 0.4, 0.5, seed=1),
        recipe([family[0], family[2], family[1]], 0.4, 0.5),
    ]  # fmt: skip
    assert [reweighted(before, load(other)) for other in others] == [None] * len(others)
    ruled_too, measured = (
        recipe(family, 0.4, 0.5, **ruled),
        recipe(family, 0.4, 0.5, knobs={"weight": {"from": "metagpt"}}),
    )
    measured["models"] = [str(path) for path in family[1:]]
    for unlike in (ruled_too, measured):
        again = load(unlike | {"models": recipe(family, 0.3, 0.2)["models"]})
        assert reweighted(plan(unlike), again) is None


def test_weights_that_a_method_does_not_take_are_refused(tmp_path):
    family = tiny.family(tmp_path)
    before = plan(recipe(family, 0.4, 0.5, method="average"))
    with pytest.raises(RecipeError, match="sum to zero"):
        reweighted(before, load(recipe(family, 0.5, -0.5, method="average")))


def test_a_live_merge_of_other_weights_is_that_of_a_fresh_one_and_sees_what_is_written(tmp_path):
    family = tiny.family(tmp_path)
    with Live.open(recipe(family, 0.4, 0.5), workers=2) as live, Live.open(recipe(family, 0.4, 0.5)) as other:
        for weights in ((0.4, 0.5), (0.9, 0.1), (0.2, -0.6)):
            made, fresh = live.apply(recipe(family, *weights)), plan(recipe(family, *weights))
            assert (made.hash, made.steps) == (fresh.hash, fresh.steps)
            other.apply(fresh)
            mine, theirs = live.model.state_dict(), other.model.state_dict()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        tiny.save(family[1], tiny.weights(5, dtype=torch.bfloat16))
        assert live.apply(recipe(family, 0.4, 0.5)).hash == plan(recipe(family, 0.4, 0.5)).hash != fresh.hash


def fresh_is_same(live, chosen):
    made = live.apply(chosen)
    with Live.open(chosen) as other:
        assert other.apply(plan(chosen)).hash == made.hash
        mine, theirs = live.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


ALIKE = {"knobs": {"density": 0.4}}
SELECTIONS = [
    ("ties", ALIKE), ("dare", ALIKE), ("ties", {"knobs": {"density": 0.4, "scope": "model"}}),
    ("ties", {"knobs": {"density": 0.4, "weighted_election": True, "combine": "sum"}}),
    ("dare", {"knobs": {"density": 0.4, "elect": "sign", "scale": 0.8}}), ("dare", {**ALIKE, "seed": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "more"), SELECTIONS)
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_which_values_count_is_found_anew_where_more_than_weights_is_new(tmp_path, method, more, out):
    base = tiny.save(tmp_path / "base", tiny.weights(0, dtype=torch.float32))
    tuned = tiny.save(tmp_path / "tuned", tiny.weights(1, dtype=torch.float32))
    family = base, tuned, tiny.adapter(tmp_path / "adapter", 1, rank=6)
    told = {"output": {"dtype": out}, "method": method, **more}
    others = [ALIKE, {"knobs": {"density": 0.7}}, {"knobs": {"density": 0.4, "scale": 0.5}}, {**ALIKE, "seed": 9}]
    with Live.open(recipe(family, 0.4, 0.5, **told), workers=2) as live:
        for weights in ((0.4, 0.5), (0.9, 0.1), (0.2, -0.6)):
            fresh_is_same(live, recipe(family, *weights, **told))
        fewer = {"rules": [{"where": {"role": "mlp"}, "method": "passthrough"}]}  # and other thresholds over the model
        for other in (*others, fewer, {**ALIKE, "method": "dare"}, {**ALIKE, "method": "ties"}):
            for weights in ((0.4, 0.5), (0.3, -0.5)):
                fresh_is_same(live, recipe(family, *weights, **(told | other)))
            fresh_is_same(live, recipe(family, 0.2, 0.6, **told))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("written", ["weights", "adapter", "scale"])
def test_what_is_written_between_two_merges_is_in_the_second(tmp_path, method, written):
    family = tiny.family(tmp_path, dtype=torch.float32)
    models = family[0], tiny.adapter(tmp_path / "adapter", 1), family[2]
    with Live.open(recipe(models, 0.4, 0.5, method=method)) as live:
        fresh_is_same(live, recipe(models, 0.4, 0.5, method=method))
        if written == "weights":
            tiny.save(family[2], tiny.weights(5, dtype=torch.float32))
        else:
            tiny.adapter(models[1], 1 if written == "scale" else 7, lora_alpha=99 if written == "scale" else 8)
        fresh_is_same(live, recipe(models, 0.3, 0.5, method=method))


def test_a_file_of_densities_is_read_again(tmp_path):
    family, file = tiny.family(tmp_path), tmp_path / "densities.yaml"
    file.write_text("values: [0.3, 0.6]")
    told = {"method": "ties", "knobs": {"density": {"from": str(file)}}}
    with Live.open(recipe(family, 0.4, 0.5, **told)) as live:
        fresh_is_same(live, recipe(family, 0.4, 0.5, **told))
        file.write_text("values: [0.8, 0.1]")
        fresh_is_same(live, recipe(family, 0.3, 0.5, **told))


def test_a_model_that_is_gone_is_missed_only_by_who_names_it(tmp_path):
    family = tiny.family(tmp_path)
    other = tiny.save(tmp_path / "other", tiny.weights(3))
    with Live.open(recipe(family, 0.4, 0.5)) as live:
        live.apply()
        shutil.rmtree(family[2])
        fresh_is_same(live, recipe((*family[:2], other), 0.4, 0.5))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_thresholds_are_those_of_the_precision_in_which_deltas_are_made(tmp_path, method):
    base = tiny.save(tmp_path / "base", tiny.weights(0, dtype=torch.float32))
    family = base, *(tiny.adapter(tmp_path / f"a{rank}", rank, rank=rank) for rank in (3, 8))
    told = {"method": method, "knobs": {"density": 0.3}}
    with Live.open(recipe(family, 0.5, 0.5, **told)) as live:
        fresh_is_same(live, recipe(family, 0.5, 0.5, **told))
        fresh_is_same(live, recipe(family, 0.5, 0.5, output={"dtype": "bfloat16"}, **told))
