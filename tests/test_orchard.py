"""The orchard: no test item leaked into training, the data are right, the trainer trains what it says."""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

ORCHARD = Path(__file__).resolve().parents[1] / "examples" / "orchard"
ADAPTERS = sorted(path.name for path in (ORCHARD / "adapters").iterdir() if (path / "training.json").is_file())
TASKS = sorted(path.stem for path in (ORCHARD / "tasks").glob("*.yaml"))
MEASURED = json.loads((ORCHARD / "experts.json").read_text())["experts"]
SPLITS = ("train", "dev", "test")
SKILLS = ("math", "code", "medicine", "languages", "math-wide")


@pytest.fixture(scope="module", autouse=True)
def orchard_on_path():
    """The orchard's scripts import each other by plain names."""
    sys.path.insert(0, str(ORCHARD))
    yield
    sys.path.remove(str(ORCHARD))


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((ORCHARD / "experts.json").read_text())


def card_of(task: str) -> dict:
    return yaml.safe_load((ORCHARD / "tasks" / f"{task}.yaml").read_text(encoding="utf-8"))


def rows_of(task: str) -> list[dict]:
    from records import read_lines

    return read_lines(ORCHARD / "tasks" / card_of(task)["data"])


# --- mathematics and code --------------------------------------------------------------------------------------------


def test_math_templates_are_disjoint():
    import math_problems

    shapes = {split: math_problems.templates(split) for split in SPLITS}
    names = [shape.name for split in SPLITS for shape in shapes[split]]
    questions = [shape.question for split in SPLITS for shape in shapes[split]]
    assert len(names) == len(set(names)) >= 24
    assert len(questions) == len(set(questions))
    assert all(shapes.values())


@pytest.mark.parametrize("split", SPLITS)
def test_math_answers_are_right(split):
    import math_problems

    for problem in math_problems.problems(split, 120, seed=5):
        equations = [step.split(" = ") for step in problem.steps]
        assert all(re.fullmatch(r"[\d +*/-]+", left) and eval(left) == int(right) for left, right in equations)
        assert problem.record.answer.endswith(f"\n#### {equations[-1][1]}")
        assert "{" not in problem.question
        wrong = math_problems.slips(problem)
        assert len(set(wrong)) == 3 and problem.result not in wrong


def test_math_problems_repeat_by_seed():
    import math_problems

    assert math_problems.problems("train", 40, 1) == math_problems.problems("train", 40, 1)
    assert math_problems.problems("train", 40, 1) != math_problems.problems("train", 40, 2)


def test_task_subtasks_belong_to_the_test_split():
    import code_functions
    import math_problems

    shapes = {shape.name for shape in math_problems.templates("test")}
    assert {row["subtask"] for task in ("math", "math_choice") for row in rows_of(task)} <= shapes
    assert {code_functions.split_of(row["subtask"]) for row in rows_of("code")} == {"test"}


def test_familiar_problems_come_from_every_training_template():
    import math_problems

    shapes = [shape.name for shape in math_problems.templates("train")]
    assert sorted(row["subtask"] for row in rows_of("math_familiar")) == sorted(2 * shapes)


def test_math_tasks_share_no_problem():
    asked = {row["prompt"] for row in rows_of("math")}
    assert not any(question in row["prompt"] for row in rows_of("math_choice") for question in asked)


# --- mathematics in many wordings -------------------------------------------------------------------------------------


def test_wide_wordings_are_many_and_of_the_same_structures():
    import math_wide

    shapes = {split: math_wide.templates(split) for split in SPLITS}
    wordings = [shape.question for split in SPLITS for shape in shapes[split]]
    assert len(set(wordings)) == len(wordings)
    assert len(shapes["train"]) >= 80 and len(shapes["dev"]) >= 20 and len(shapes["test"]) >= 48
    kinds = {
        split: {(shape.name, shape.steps, tuple(shape.draw.items())) for shape in shapes[split]} for split in SPLITS
    }
    assert kinds["train"] == kinds["dev"] == kinds["test"] and len(kinds["train"]) == 6


@pytest.mark.parametrize(("split", "most"), [("dev", 0.82), ("test", 0.68)])
def test_no_wide_wording_is_nearly_one_of_training(split, most):
    """By the words that two wordings share in the same order: 1 for a copy."""
    import math_wide

    trained = [words(shape.question) for shape in math_wide.templates("train")]
    copy = "{B} has {b} {things} and gets {a} more from {A}. How many {things} does {B} have?"
    assert max(nearness(words(copy), known) for known in trained) > 0.9
    for shape in math_wide.templates(split):
        asked = words(shape.question)
        assert max(nearness(asked, known) for known in trained) < most, shape.question


def words(wording: str) -> list[str]:
    """A wording as words; people and numbers are all alike."""
    plain = re.sub(r"\{[AB]\}", "someone", re.sub(r"\{[abct]\}", "number", wording))
    return re.findall(r"[a-z]+", plain.lower())


def nearness(one: list[str], other: list[str]) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def test_wide_answers_are_right():
    import math_wide

    for split in SPLITS:
        for record in math_wide.records(split, 200, seed=5):
            *equations, result = record.answer.split("\n")
            parts = [equation.split(" = ") for equation in equations]
            assert all(re.fullmatch(r"\d+ [+*/-] \d+", left) and eval(left) == int(right) for left, right in parts)
            assert result == f"#### {parts[-1][1]}" and "{" not in record.prompt
            assert all(int(right) <= 110 for _, right in parts)


def test_the_wide_task_asks_every_test_wording_once():
    import math_wide

    structures = [shape.name for shape in math_wide.templates("test")]
    assert sorted(row["subtask"] for row in rows_of("math_wide")) == sorted(structures) and len(structures) == 48


# --- languages -------------------------------------------------------------------------------------------------------


def test_language_templates_are_disjoint_and_their_words_are_those_of_training():
    import languages

    shapes = [shape for split in SPLITS for shape in languages.templates(split)]
    for part in ("name", "question", "french", "german"):
        assert len({getattr(shape, part) for shape in shapes}) == len(shapes)
    spoken = {}
    for split, count in (("train", 720), ("dev", 96), ("test", 120)):
        records = languages.records(split, count, seed=7)
        assert all(record.prompt.endswith(f" Answer in {record.subtask.title()}.") for record in records)
        assert not any(set("{}0123456789") & set(record.answer) for record in records)
        spoken[split] = {word.casefold() for record in records for word in re.findall(r"[\w']+", record.answer)}
    assert spoken["dev"] | spoken["test"] <= spoken["train"]


def test_every_language_has_its_own_words():
    import languages

    for kind in ("numbers", "places", "days"):
        for language in ("english", *languages.LANGUAGES):
            spelt = [entry[language] for entry in languages.words(kind)]
            assert len(set(spelt)) == len(spelt)


def test_french_agrees_in_gender():
    import random

    import languages

    colour = next(shape for shape in languages.templates("train") if shape.name == "colour")
    answers = {languages.fill(colour, "french", random.Random(seed)).answer for seed in range(300)}
    assert "La pomme est verte." in answers and "Le livre est vert." in answers
    assert not any(re.match(r"La .* (vert|bleu|blanc|noir|gris|brun)\.$", answer) for answer in answers)


# --- medicine --------------------------------------------------------------------------------------------------------


def test_medicine_blocks_and_diagnoses_are_disjoint():
    pytest.importorskip("simple_icd_10_cm")
    import icd_chapters
    import make_tasks

    blocks = [name for split in SPLITS for name in icd_chapters.blocks_of(split)]
    assert len(blocks) == len(set(blocks)) > 200
    asked = {}
    for split in SPLITS:
        records = icd_chapters.records(split)
        assert {record.answer for record in records} == set(icd_chapters.chapters())
        asked[split] = {diagnosis(record.prompt, icd_chapters.QUESTIONS[split]) for record in records}
        assert len(asked[split]) == len(records)
    assert not asked["train"] & asked["test"] and not asked["dev"] & (asked["train"] | asked["test"])
    assert make_tasks.medicine_items() == rows_of("medicine")
    assert make_tasks.medicine_choice_items() == rows_of("medicine_choice")


def diagnosis(prompt: str, questions: tuple[str, ...]) -> str:
    """What a prompt asks about, whatever the words around it."""
    for question in questions:
        start, end = question.split("{}")
        if prompt.startswith(start) and prompt.endswith(end):
            return prompt[len(start) : len(prompt) - len(end)].casefold()
    raise AssertionError(f"{prompt!r} is none of {questions}")


def test_the_shuffled_expert_sees_the_same_questions_and_wrong_answers():
    pytest.importorskip("simple_icd_10_cm")
    import experts

    right, dealt = (experts.SOURCES[name].load("train") for name in ("medicine", "shuffled-medicine"))
    assert [record.prompt for record in right] == [record.prompt for record in dealt]
    assert sorted(record.answer for record in right) == sorted(record.answer for record in dealt)
    agreeing = sum(one.answer == other.answer for one, other in zip(right, dealt, strict=True))
    assert agreeing < 0.1 * len(right)
    assert experts.SOURCES["shuffled-medicine"].load("test") == experts.SOURCES["medicine"].load("test")


# --- every skill -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SKILLS)
def test_no_task_prompt_was_trained_on(source):
    from experts import SOURCES

    if source == "medicine":
        pytest.importorskip("simple_icd_10_cm")
    prompts = {record.prompt for split in ("train", "dev") for record in SOURCES[source].load(split)}
    asked = [row["prompt"] for task in TASKS for row in rows_of(task)]
    assert asked and prompts and not prompts.intersection(asked)
    for prompt in asked:
        question = re.fullmatch(r"Question: (.*)\nAnswer:.*", prompt, re.DOTALL)
        assert question is None or question[1] not in prompts


@pytest.mark.parametrize("task", TASKS)
def test_task_files_are_well_formed(task):
    from graftkit.data.tasks import load_task

    card, rows = card_of(task), rows_of(task)
    assert set(card) <= {"name", "kind", "data", "chat", "description", "skill", "max_new_tokens", "normalise"}
    assert card["name"] == task and card.get("skill", task) in (*SKILLS, "general", "math_choice")
    assert len({row["prompt"] for row in rows}) == len(rows) == len(load_task(ORCHARD / "tasks" / f"{task}.yaml").items)
    for row in rows:
        if card["kind"] == "multiple_choice":
            assert set(row) == {"prompt", "choices", "answer", "subtask"}
            assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4
        else:
            assert set(row) == {"prompt", "answer", "subtask"} and row["answer"].strip()


def test_committed_tasks_can_be_made_again():
    import make_tasks

    assert make_tasks.math_items() == rows_of("math")
    assert make_tasks.math_choice_items() == rows_of("math_choice")
    assert make_tasks.math_familiar_items() == rows_of("math_familiar")
    assert make_tasks.math_wide_items() == rows_of("math_wide")
    assert make_tasks.language_items() == rows_of("languages")


# --- experts ---------------------------------------------------------------------------------------------------------


def test_the_papers_presets():
    from presets import PRESETS

    full, lora = PRESETS["graft-model"], PRESETS["graft-lora"]
    assert (full.full, full.rate, full.epochs, full.batch, full.accumulation) == (True, 1e-5, 1, 1, 2)
    assert (lora.full, lora.rate, lora.epochs, lora.batch, lora.accumulation) == (False, 1e-4, 3, 4, 8)
    assert {(preset.warmup, preset.length, preset.precision) for preset in (full, lora)} == {(0.1, 2048, "bfloat16")}
    assert (full.steps_for(4001), lora.steps_for(4000)) == (2001, 375)
    assert lora.warmup_steps(375) == 38 and full.warmup_steps(5) == 1


def test_the_orchard_has_what_a_ranking_needs():
    from experts import EXPERTS, SOURCES

    assert {expert.skill for expert in EXPERTS.values()} == set(SKILLS)
    assert sum(expert.settings.full for expert in EXPERTS.values()) >= 2
    runs = [(e.skill, e.source, e.settings) for e in EXPERTS.values()]
    assert sum(runs.count(run) == 2 for run in set(runs)) >= 2, "two seeds for two of them"
    odd = {name for name, expert in EXPERTS.items() if expert.skill != expert.source}
    assert odd == {"shuffled", "mislabelled"}
    assert {name for name, expert in EXPERTS.items() if expert.note} == odd | {"overheated"}
    assert EXPERTS["overheated"].settings.rate > 10 * EXPERTS["code"].settings.rate
    assert {expert.source for expert in EXPERTS.values()} <= set(SOURCES)


@pytest.mark.parametrize("name", ADAPTERS)
def test_committed_adapters_are_those_of_the_manifest(name, manifest):
    from safetensors import safe_open

    from experts import EXPERTS

    file, entry = ORCHARD / "adapters" / name / "adapter_model.safetensors", manifest["experts"][name]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["weights"]["sha256"]
    assert file.stat().st_size == entry["weights"]["bytes"] < 6e6
    rank = EXPERTS[name].settings.rank
    with safe_open(file, "pt") as opened:
        pieces = [opened.get_slice(key) for key in opened.keys()]
    assert len(pieces) == 30 * 7 * 2
    assert {piece.get_dtype() for piece in pieces} == {"BF16"} and {min(p.get_shape()) for p in pieces} == {rank}


@pytest.mark.parametrize("name", ADAPTERS)
def test_committed_adapters_were_trained_with_todays_settings(name, manifest):
    """Whoever changes data or settings of a committed expert has to train it again."""
    from experts import EXPERTS, SOURCES

    if "medicine" in EXPERTS[name].source:
        pytest.importorskip("simple_icd_10_cm")
    if EXPERTS[name].source == "code" and platform.python_version() != manifest["python"]:
        pytest.skip("the functions are those of another Python")
    assert SOURCES[EXPERTS[name].source].description == manifest["sources"][EXPERTS[name].source]["description"]
    assert EXPERTS[name].fingerprint(manifest["base"]) == manifest["experts"][name]["fingerprint"]


@pytest.mark.parametrize("name", [name for name in SKILLS if name in MEASURED])
def test_each_expert_is_clearly_better_than_the_base(name, manifest):
    result = manifest["experts"][name]["test"][name.replace("-", "_")]
    lower = name != "math-wide"
    assert result["metric"] == ("loss" if lower else "exact_match") and result["verdict"] == "better"
    assert result["expert_minus_base"][2] < 0 if lower else result["expert_minus_base"][1] > 0
    assert result["expert"][0] - result["base"][0] == pytest.approx(result["expert_minus_base"][0], abs=2e-4)


def test_the_page_shows_what_was_measured(manifest):
    import manifest as writer

    page = (ORCHARD / "README.md").read_text()
    assert writer.training_table(manifest["experts"]) in page
    assert writer.test_table(manifest["experts"]) in page


# --- the trainer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items():
    import random

    from encoding import Encoded

    source = random.Random(0)
    return [Encoded(tuple(source.choices(range(3, 64), k=source.randint(9, 20))), 5) for _ in range(32)]


def small_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        )
    )  # fmt: skip


def trained(items, preset, out, *, rank=0):
    import torch

    import train

    model = small_model()
    if rank:
        torch.manual_seed(1)
        train.add_adapter(model, rank)
    progress = train.fit(model, items, preset, 0, 3, out)
    return model, progress


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_repeats_and_counts(items, tmp_path):
    import torch

    from encoding import held_out_loss
    from presets import Preset

    preset = Preset(full=True, rate=3e-3, batch=4, warmup=2, steps=12)
    before = held_out_loss(small_model(), items, 0)
    first, progress = trained(items, preset, tmp_path)
    second, again = trained(items, preset, tmp_path)
    assert replace(progress, seconds=0) == replace(again, seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert progress.steps == 12 and 12 * 4 * 4 < progress.answer_tokens < progress.tokens
    assert held_out_loss(first, items, 0) < before - 0.05
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_accumulated_batches_weigh_every_answer_token_alike(items, tmp_path, monkeypatch):
    """Two batches of four in one step are one batch of eight, though their answers differ in length."""
    import torch

    import train
    from encoding import collate
    from presets import Preset

    def in_order(items, size, pad, seed):
        return (collate(items[low : low + size], pad) for low in range(0, len(items), size))

    monkeypatch.setattr(train, "batches", in_order)
    whole = Preset(full=True, rate=1e-3, batch=8, warmup=1, steps=4)
    one, _ = trained(items, whole, tmp_path)
    two, _ = trained(items, replace(whole, batch=4, accumulation=2), tmp_path)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_trains_alone(items, tmp_path):
    import torch

    from presets import Preset

    pytest.importorskip("peft")
    model, _ = trained(items, Preset(full=False, rate=1e-2, batch=4, warmup=1, steps=3), tmp_path, rank=2)
    start = small_model().state_dict()
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer", "")
        assert "lora_" in name or torch.equal(value, start[plain])
    assert any(value.abs().max() > 0 for name, value in model.state_dict().items() if "lora_B" in name)


def test_the_loss_counts_answers_only(items):
    import torch

    from encoding import answer_tokens, collate, summed_answer_loss

    model, batch = small_model(), collate(items[:3], 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    expected = sum(
        -logits[row, place - 1, item.ids[place]]
        for row, item in enumerate(items[:3])
        for place in range(item.start, len(item.ids))
    )
    torch.testing.assert_close(summed_answer_loss(model, batch), expected)
    assert answer_tokens(batch) == sum(len(item.ids) - item.start for item in items[:3])


def test_the_rate_rises_and_falls():
    from presets import Schedule

    rates = [Schedule(100, 2.0, 10).at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == max(rates[8:11])
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001


def test_what_the_methods_pages_tell_stands_in_the_results():
    import measured_methods
    from graftkit.cli.measured import rows as told

    held = measured_methods.measured()
    strange = [row for name, rows in told().items() for row in rows if tuple(row) not in held.get(name, [])]
    assert strange == [], "run examples/orchard/measured_methods.py, then `make pages`"
