"""Make the general skill, which no expert is trained for, from MMLU's development questions in lm-eval's package.

    pip download --no-deps lm-eval==0.4.13 --dest .cache
    python examples/orchard/general/make.py .cache/lm_eval-0.4.13-py3-none-any.whl

`mmlu.jsonl`: the questions, to be answered by the likelihood of each answer's text. `text.jsonl`: the reasoning that
lm-eval gives for one question of each subject, plain English on 57 subjects, for its loss.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
FOLDER = "lm_eval/tasks/mmlu/"
FRAME = r"Let.s (think|solve this problem) step by step\.|We refer to [^.]* for help\.|The answer is \([A-D]\)\.?"
SHORTEST, LONGEST = 150, 600  # characters of a text
BROKEN = re.compile(r"[\x00-\x08\x0b-\x1f]")  # `\frac` and its like, read as a form feed and "rac" somewhere upstream


@dataclass(frozen=True)
class Question:
    """A development question: its four answers, the index of the right one, and the reasoning towards it."""

    subject: str
    field: str
    stem: str
    answers: tuple[str, ...]
    right: int
    reasoning: str


def questions(wheel: Path) -> Iterator[Question]:
    """Every question that has four different answers to tell apart."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            subject = re.fullmatch(FOLDER + r"flan_cot_fewshot/mmlu_(\w+)\.yaml", name)
            if subject:
                plain = yaml.safe_load(archive.read(f"{FOLDER}default/mmlu_{subject[1]}.yaml"))
                field = plain["tag"].removeprefix("mmlu_").removesuffix("_tasks")
                samples = yaml.safe_load(archive.read(name))["fewshot_config"]["samples"]
                whole = (one for one in samples if not BROKEN.search(one["question"] + one["target"]))
                found = (_question(subject[1], field, one["question"], one["target"]) for one in whole)
                yield from (question for question in found if question)


def _question(subject: str, field: str, text: str, target: str) -> Question | None:
    stem, *answers = [" ".join(part.split()) for part in re.split(r"\([A-D]\)", text)]
    right = re.search(r"answer is \(?([A-D])\)?", target)
    if right is None or not stem or len(answers) != 4 or not all(answers) or len(set(answers)) != 4:
        return None
    reasoning = re.sub(FRAME, "", " ".join(target.split())).strip()
    return Question(subject, field, stem, tuple(answers), "ABCD".index(right[1]), reasoning)


def multiple_choice(found: Iterable[Question]) -> list[dict[str, Any]]:
    """One row a question: the answers are texts, not letters, which small models cannot use."""
    return [
        {
            "prompt": f"Question: {one.stem}\nAnswer:", "choices": [f" {answer}" for answer in one.answers],
            "answer": one.right, "subtask": one.field, "id": one.subject,
        }
        for one in found
    ]  # fmt: skip


def texts(found: Iterable[Question]) -> list[dict[str, Any]]:
    """The first reasoning of fitting length of each subject, after its question."""
    taken: dict[str, dict[str, Any]] = {}
    for one in found:
        if one.subject not in taken and SHORTEST <= len(one.reasoning) <= LONGEST:
            prompt = f"Question: {one.stem}\nExplanation:"
            taken[one.subject] = {
                "prompt": prompt, "answer": f" {one.reasoning}", "subtask": one.field, "id": one.subject,
            }  # fmt: skip
    return [taken[subject] for subject in sorted(taken)]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    found = list(questions(parser.parse_args().wheel))
    write(HERE / "mmlu.jsonl", multiple_choice(found))
    write(HERE / "text.jsonl", texts(found))
    print(f"{len(found)} questions, {len(texts(found))} texts")


if __name__ == "__main__":
    main()
