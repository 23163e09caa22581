"""The orchard's data: no test item leaked into training, the arithmetic is right, the task files are well formed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ORCHARD = Path(__file__).resolve().parents[1] / "examples" / "orchard"
TASKS = sorted(path.stem for path in (ORCHARD / "tasks").glob("*.yaml"))
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module", autouse=True)
def orchard_on_path():
    """The orchard's scripts import each other by plain names."""
    sys.path.insert(0, str(ORCHARD))
    yield
    sys.path.remove(str(ORCHARD))


def rows_of(task: str) -> list[dict]:
    from records import read_lines

    return read_lines(ORCHARD / "tasks" / f"{task}.jsonl")


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


def test_no_task_prompt_was_trained_on():
    from experts import EXPERTS

    prompts = {record.prompt for expert in EXPERTS.values() for record in expert.load("train")}
    prompts |= {record.prompt for expert in EXPERTS.values() for record in expert.load("dev")}
    asked = [row["prompt"] for task in TASKS for row in rows_of(task)]
    assert asked and not prompts.intersection(asked)
    for prompt in asked:
        question = re.fullmatch(r"Question: (.*)\nAnswer:.*", prompt, re.DOTALL)
        assert question is None or question[1] not in prompts


def test_task_subtasks_belong_to_the_test_split():
    import code_functions
    import math_problems

    shapes = {shape.name for shape in math_problems.templates("test")}
    assert {row["subtask"] for task in ("math", "math_choice") for row in rows_of(task)} <= shapes
    assert {code_functions.split_of(row["subtask"]) for row in rows_of("code")} == {"test"}


def test_math_tasks_share_no_problem():
    asked = {row["prompt"] for row in rows_of("math")}
    assert not any(question in row["prompt"] for row in rows_of("math_choice") for question in asked)


@pytest.mark.parametrize("task", TASKS)
def test_task_files_are_well_formed(task):
    card = yaml.safe_load((ORCHARD / "tasks" / f"{task}.yaml").read_text(encoding="utf-8"))
    assert set(card) == {"name", "kind", "data", "chat", "description"}
    assert (card["name"], card["data"]) == (task, f"{task}.jsonl")
    rows = rows_of(task)
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        if card["kind"] == "answer_loss":
            assert set(row) == {"prompt", "answer", "subtask"} and row["answer"].strip()
        else:
            assert card["kind"] == "multiple_choice"
            assert set(row) == {"prompt", "choices", "answer", "subtask"}
            assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4


def test_committed_math_tasks_can_be_made_again():
    import make_tasks

    assert make_tasks.math_items() == rows_of("math")
    assert make_tasks.math_choice_items() == rows_of("math_choice")
