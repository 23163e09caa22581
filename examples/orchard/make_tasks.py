"""Make the held-out tasks of `tasks/`: JSON lines and one YAML each, in the format of `graft evaluate`.

    pip download --no-deps lm-eval==0.4.13 --dest .cache
    python examples/orchard/make_tasks.py --mmlu .cache/lm_eval-0.4.13-py3-none-any.whl

The committed files were made by Python 3.11.7, whose standard library `code.jsonl` quotes.
"""

from __future__ import annotations

import argparse
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import code_functions
import math_problems
from records import write_lines

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"
SEEDS = {"math": 11, "math_choice": 12, "code": 13, "general": 14}
COT_FOLDER = "lm_eval/tasks/mmlu/flan_cot_fewshot/"
DESCRIPTIONS = {
    "math": "Worked answers to word problems generated from templates that no training used (math_templates.yaml, "
    "split test); Apache-2.0.",
    "math_choice": "The bare answer to word problems of the test templates, among three plausible slips "
    "(math_templates.yaml, split test); Apache-2.0.",
    "code": "Bodies of Python 3.11.7 standard library functions, given signature and docstring, from modules that no "
    "training used (split test); PSF License Agreement.",
    "general": "MMLU development questions of 16 subjects, as shipped in lm-eval 0.4.13 (MIT), a skill that no expert "
    "was trained for.",
}


def math_items(count: int = 24) -> list[dict[str, Any]]:
    """Worked answers, the test templates taking turns."""
    return [asdict(problem.record) for problem in math_problems.problems("test", count, SEEDS["math"])]


def math_choice_items(count: int = 16) -> list[dict[str, Any]]:
    """The result among slips; the problems of `math_items` are left out."""
    known = {item["prompt"] for item in math_items()}
    made = math_problems.problems("test", 2 * count, SEEDS["math_choice"])
    fresh = [problem for problem in made if problem.question not in known]
    source = random.Random(SEEDS["math_choice"])
    items = []
    for problem in fresh[:count]:
        texts = [f" {value}" for value in (problem.result, *math_problems.slips(problem))]
        prompt = f"Question: {problem.question}\nAnswer: The answer is"
        items.append(_choice(prompt, texts, source, problem.template))
    return items


def code_items(count: int = 20, most_each: int = 3) -> list[dict[str, Any]]:
    """Short functions of the test modules; a prompt that training also has, from another module, is left out."""
    trained = {record.prompt for split in ("train", "dev") for record in code_functions.records(split)}
    candidates = [
        record
        for record in code_functions.records("test")
        if record.prompt not in trained and len(record.prompt) + len(record.answer) < 460 and len(record.answer) > 70
    ]
    random.Random(SEEDS["code"]).shuffle(candidates)
    taken: dict[str, list[dict[str, Any]]] = {}
    for record in candidates:
        rows = taken.setdefault(record.subtask, [])
        if len(rows) < most_each and sum(map(len, taken.values())) < count:
            rows.append(asdict(record))
    return [row for module in sorted(taken) for row in taken[module]]


def general_items(wheel: Path, count: int = 16) -> list[dict[str, Any]]:
    """One short question a subject, from subjects spread evenly over the alphabet."""
    subjects: dict[str, tuple[str, list[str], int]] = {}
    for subject, question, target in _mmlu(wheel):
        parsed = _parse(question, target)
        if parsed and subject not in subjects:
            subjects[subject] = parsed
    names = sorted(subjects)
    source = random.Random(SEEDS["general"])
    items = []
    for name in [names[index * len(names) // count] for index in range(count)]:
        stem, texts, right = subjects[name]
        ordered = [texts[right], *texts[:right], *texts[right + 1 :]]
        items.append(_choice(f"Question: {stem}\nAnswer:", [f" {text}" for text in ordered], source, name))
    return items


def _mmlu(wheel: Path) -> Iterator[tuple[str, str, str]]:
    """Subject, question and target of every chain-of-thought example in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(COT_FOLDER + "mmlu_") and name.endswith(".yaml"):
                subject = name.removeprefix(COT_FOLDER + "mmlu_").removesuffix(".yaml")
                content = yaml.safe_load(archive.read(name))
                for sample in content["fewshot_config"]["samples"]:
                    yield subject, sample["question"], sample["target"]


def _parse(question: str, target: str) -> tuple[str, list[str], int] | None:
    """Stem, four answers and the index of the right one; None for a question that is long or hangs on the order."""
    stem, *answers = [" ".join(part.split()) for part in re.split(r"\([A-D]\)", question)]
    right = re.search(r"answer is \(?([A-D])\)?", target)
    short = len(stem) < 150 and all(0 < len(answer) < 40 for answer in answers)
    unfit = "_" in stem or "$" in question or re.search(r"\b(?i:all|both|none) of\b|\([a-d]\)", question)
    if len(answers) != 4 or right is None or not short or unfit:
        return None
    return stem, answers, "ABCD".index(right[1])


def _choice(prompt: str, texts: Sequence[str], source: random.Random, subtask: str) -> dict[str, Any]:
    """A multiple-choice row from texts whose first is right, put in a random order."""
    order = source.sample(range(len(texts)), len(texts))
    choices = [texts[index] for index in order]
    return {"prompt": prompt, "choices": choices, "answer": order.index(0), "subtask": subtask}


def write_task(name: str, rows: list[dict[str, Any]], chat: bool) -> None:
    """Write `NAME.jsonl` and `NAME.yaml`."""
    kind = "multiple_choice" if "choices" in rows[0] else "answer_loss"
    task = {"name": name, "kind": kind, "data": f"{name}.jsonl", "chat": chat, "description": DESCRIPTIONS[name]}
    TASKS.mkdir(exist_ok=True)
    write_lines(TASKS / f"{name}.jsonl", rows)
    (TASKS / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False, width=120), encoding="utf-8")
    print(f"{name}: {len(rows)} items, {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mmlu", type=Path, help="the lm-eval wheel; without it general.jsonl is left as it is")
    arguments = parser.parse_args()
    write_task("math", math_items(), chat=True)
    write_task("math_choice", math_choice_items(), chat=False)
    write_task("code", code_items(), chat=False)
    if arguments.mmlu:
        write_task("general", general_items(arguments.mmlu), chat=False)


if __name__ == "__main__":
    main()
