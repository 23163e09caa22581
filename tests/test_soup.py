"""Greedy soup: which models stay, decided by any score; and the command that writes the recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.cli import app
from graftkit.errors import DataError, RecipeError
from graftkit.improving.soup import greedy_soup, on_tasks
from graftkit.recipes.recipe import load


def places(recipe):
    """Models are called by the number that they are; their average is to be near 10."""
    return [float(entry.model) for entry in recipe.models]


def near_ten(recipe):
    numbers = places(recipe)
    return -abs(sum(numbers) / len(numbers) - 10)


def soup(names, score=near_ten, **more):
    return greedy_soup({"method": "average", "models": [str(n) for n in names], **more}, score)


def test_models_come_best_first_and_stay_while_they_do_no_harm():
    found = soup([20, 9, 12, 8])
    assert places(found.recipe) == [9.0, 12.0, 8.0]  # 9, 10.5, then 9.67; with 20 it would be 12.25
    assert [trial.models[-1] for trial in found.trials] == ["20", "9", "12", "8", "12", "8", "20"]
    assert [trial.kept for trial in found.trials] == [True] * 6 + [False]
    assert found.score == pytest.approx(-1 / 3)


def test_an_equal_score_stays():
    """The paper adds what makes the average no worse."""
    found = soup([9, 9, 11], lambda recipe: 1.0)
    assert len(found.recipe.models) == 3 and len(found.trials) == 5


def test_one_model_is_its_own_soup():
    assert places(soup([3]).recipe) == [3.0]


def test_values_beside_models_go_with_them():
    models = [{"model": "9", "weight": 2.0}, "30", {"model": "12", "weight": 3.0}]
    found = greedy_soup({"method": "average", "models": models, "output": {"dtype": "bfloat16"}}, near_ten)
    assert [entry.knobs for entry in found.recipe.models] == [{"weight": 2.0}, {"weight": 3.0}]
    assert found.recipe.output.dtype == "bfloat16"


def test_it_asks_for_single_models_as_recipes_that_can_be_merged(tmp_path):
    family = tiny.family(tmp_path)
    wanted = (load_file(family[1] / "model.safetensors")["model.norm.weight"].float(),
              load_file(family[2] / "model.safetensors")["model.norm.weight"].float())  # fmt: skip
    asked = []

    def score(recipe):
        out = tmp_path / f"trial{len(asked)}"
        graftkit.merge(recipe, out)
        asked.append(len(recipe.models))
        got = load_file(out / "model.safetensors")["model.norm.weight"].float()
        return -float((got - sum(wanted) / 2).abs().max())

    found = greedy_soup({"method": "average", "models": [str(path) for path in family[1:]]}, score)
    assert asked == [1, 1, 2] and len(found.recipe.models) == 2 and found.score > -1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"knobs": {"weight": [1.0, 2.0]}},
        {"rules": [{"where": {"role": "mlp"}, "knobs": {"weight": [1.0, 2.0]}}]},
        {"prepare": [{"dare": {"density": [0.5, 0.9]}}]},
    ],
    ids=str,
)
def test_values_listed_by_model_are_refused(change):
    with pytest.raises(RecipeError, match="one value for each of the models"):
        soup([1, 2], **change)


def test_a_score_that_is_no_number_decides_nothing():
    with pytest.raises(DataError, match="is not a number"):
        soup([1, 2], lambda recipe: math.nan)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two others with a tokenizer, one of them broken by noise, and a task."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("soup")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = trainers.BpeTrainer(vocab_size=tiny.VOCABULARY, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(["one two three"], words)
    base = tiny.weights(0)
    broken = {name: tensor * (1 if "norm" in name else 60) for name, tensor in tiny.weights(5).items()}
    for name, weights in (("base", base), ("near", tiny.weights(1, near=base)), ("broken", broken)):
        path = tiny.save(root / name, weights)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    rows = [{"prompt": "one", "answer": " two three"}, {"prompt": "two", "answer": " one"}]
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.recipe(root, "method: average\nmodels: [broken, base, near]\n")
    return root


def test_the_command_writes_a_recipe_that_merges(run, tmp_path):
    out = tmp_path / "soup.yaml"
    arguments = ["soup", str(run / "recipe.yaml"), str(out), "--tasks", str(run / "task.jsonl"), "--threads", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "broken left out" in done.output
    made = load(out)
    assert sorted(Path(entry.model).name for entry in made.models)[-1] in ("base", "near")
    assert all(Path(entry.model).is_absolute() for entry in made.models)
    assert sorted(tmp_path.iterdir()) == [out]
    graftkit.merge(out, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    again = CliRunner().invoke(app, arguments)
    assert "exists already" in str(again.exception)


def test_tasks_of_different_metrics_are_refused(run, tmp_path):
    choices = [{"prompt": "one", "choices": [" two", " three"], "answer": 0}]
    (tmp_path / "choice.jsonl").write_text(json.dumps(choices[0]) + "\n")
    score = on_tasks([run / "task.jsonl", tmp_path / "choice.jsonl"], scratch=tmp_path)
    with pytest.raises(DataError, match="tasks of one metric"):
        score(load({"method": "average", "models": [str(run / "base")]}))
