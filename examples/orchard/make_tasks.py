"""Make the held-out tasks of `tasks/`: JSON lines and one YAML each, in the format of `graft evaluate`.

    pip download --no-deps lm-eval==0.4.13 --dest .cache
    python examples/orchard/make_tasks.py --mmlu .cache/lm_eval-0.4.13-py3-none-any.whl

It needs simple-icd-10-cm 1.5.0 too, which `make setup` installs.
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
import experts
import icd_chapters
import languages
import math_problems
import math_wide
from records import write_lines

HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"
SEEDS = {
    "math": 11,
    "math_choice": 12,
    "code": 13,
    "general": 14,
    "medicine": 15,
    "languages": 16,
    "math_familiar": 17,
    "math_wide": 18,
}
COT_FOLDER = "lm_eval/tasks/mmlu/flan_cot_fewshot/"
DESCRIPTIONS = {
    "math": "Worked answers to word problems generated from templates that no training used (math_templates.yaml, "
    "split test); Apache-2.0.",
    "math_choice": "The bare answer to word problems of the test templates, among three plausible slips "
    "(math_templates.yaml, split test); Apache-2.0.",
    "code": "Bodies of Python 3.11.7 standard library functions, given signature and docstring, from modules that no "
    "training used (split test); PSF License Agreement.",
    "math_exact": "The results of the problems of math.jsonl, by generation: the last number of the answer counts.",
    "math_familiar": "The results of new problems from the templates that training used, by generation: easier than "
    "math_exact, whose templates are unseen; no problem of it was trained on. Apache-2.0.",
    "math_wide": "The results of word problems of one or two steps, by generation: the last number of the answer "
    "counts. Every problem has a wording of its own, which no training used (math_wide.yaml, split test); Apache-2.0.",
    "medicine": "The chapter of ICD-10-CM that lists a diagnosis, from blocks that no training used "
    "(simple-icd-10-cm 1.5.0, MIT; the classification is published by the CDC).",
    "medicine_choice": "The diagnoses of medicine.jsonl, their chapter among four.",
    "languages": "French and German answers to English questions, from templates that no training used "
    "(language_templates.yaml, split test); Apache-2.0.",
    "languages_exact": "The answers of languages.jsonl by generation, whole, but for case and closing punctuation.",
    "general": "MMLU development questions of 16 subjects, as shipped in lm-eval 0.4.13 (MIT), a skill that no expert "
    "was trained for.",
}
GENERATED: dict[str, dict[str, Any]] = {
    "math_exact": {"skill": "math", "max_new_tokens": 96, "normalise": ["last_number"]},
    "math_familiar": {"skill": "math", "max_new_tokens": 96, "normalise": ["last_number"]},
    "math_wide": {"skill": "math-wide", "max_new_tokens": 64, "normalise": ["last_number"]},
    "languages_exact": {
        "skill": "languages",
        "max_new_tokens": 48,
        "normalise": ["first_line", "strip", "punctuation", "casefold"],
    },
}


def math_items(count: int = 24) -> list[dict[str, Any]]:
    """Worked answers, the test templates taking turns."""
    return [asdict(problem.record) for problem in math_problems.problems("test", count, SEEDS["math"])]


def math_familiar_items(count: int = 40) -> list[dict[str, Any]]:
    """Two problems of every training template, none of which training has."""
    trained = {record.prompt for record in experts.math_records("train")}
    made = math_problems.problems("train", 10 * count, SEEDS["math_familiar"])
    fresh = [problem for problem in made if problem.question not in trained]
    by_template: dict[str, list[dict[str, Any]]] = {}
    for problem in fresh:
        by_template.setdefault(problem.template, []).append(asdict(problem.record))
    return [rows[turn] for turn in range(count // len(by_template)) for rows in by_template.values()]


def math_wide_items() -> list[dict[str, Any]]:
    """One problem of every test wording."""
    count = len(math_wide.templates("test"))
    return [asdict(record) for record in math_wide.records("test", count, SEEDS["math_wide"])]


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


def medicine_items(each: int = 4) -> list[dict[str, Any]]:
    """As many diagnoses of every chapter."""
    records = icd_chapters.records("test")
    random.Random(SEEDS["medicine"]).shuffle(records)
    by_chapter = {name: [r for r in records if r.subtask == name][:each] for name in icd_chapters.chapters()}
    return [asdict(record) for chosen in by_chapter.values() for record in chosen]


def medicine_choice_items() -> list[dict[str, Any]]:
    """The same diagnoses, the right chapter among three others."""
    source, names = random.Random(SEEDS["medicine"]), icd_chapters.chapters()
    items = []
    for item in medicine_items():
        others = source.sample([name for name in names if name != item["answer"]], 3)
        items.append(_choice(item["prompt"], [item["answer"], *others], source, item["subtask"]))
    return items


def language_items(count: int = 60) -> list[dict[str, Any]]:
    """French and German answers, templates and languages taking turns."""
    return [asdict(record) for record in languages.records("test", count, SEEDS["languages"])]


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


def write_task(name: str, rows: list[dict[str, Any]], chat: bool, **extra: Any) -> None:
    """Write `NAME.jsonl` and `NAME.yaml`."""
    kind = "multiple_choice" if "choices" in rows[0] else "answer_loss"
    TASKS.mkdir(exist_ok=True)
    write_lines(TASKS / f"{name}.jsonl", rows)
    _write_card({"name": name, "kind": kind, "data": f"{name}.jsonl", "chat": chat} | extra)
    print(f"{name}: {len(rows)} items, {kind}")


def write_generated(name: str, data: str) -> None:
    """Write `NAME.yaml` over another task's records: the same answers, generated."""
    _write_card({"name": name, "kind": "exact_match", "data": f"{data}.jsonl", "chat": True} | GENERATED[name])


def _write_card(card: dict[str, Any]) -> None:
    card = card | {"description": DESCRIPTIONS[card["name"]]}
    path = TASKS / f"{card['name']}.yaml"
    path.write_text(yaml.safe_dump(card, sort_keys=False, width=120), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mmlu", type=Path, help="the lm-eval wheel; without it general.jsonl is left as it is")
    arguments = parser.parse_args()
    write_task("math", math_items(), chat=True)
    write_task("math_choice", math_choice_items(), chat=False)
    write_task("code", code_items(), chat=False)
    write_task("medicine", medicine_items(), chat=True)
    write_task("medicine_choice", medicine_choice_items(), chat=True, skill="medicine")
    write_task("languages", language_items(), chat=True)
    write_lines(TASKS / "math_familiar.jsonl", math_familiar_items())
    write_lines(TASKS / "math_wide.jsonl", math_wide_items())
    write_generated("math_wide", "math_wide")
    write_generated("math_exact", "math")
    write_generated("math_familiar", "math_familiar")
    write_generated("languages_exact", "languages")
    if arguments.mmlu:
        write_task("general", general_items(arguments.mmlu), chat=False)


if __name__ == "__main__":
    main()
