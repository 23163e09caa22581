"""Makes a mixture of real and generated records of four skills, unevenly sized, to choose from.

    python benchmarks/make_mixture.py 100000 mixture.jsonl

Code: every function of the running standard library with a docstring. Medicine: diagnoses of ICD-10-CM and their
chapter (simple-icd-10-cm 1.5.0). Mathematics and languages: the orchard's training templates. `skill` is the skill,
`subtask` the module, chapter, template or language. Code is a thirtieth at most, languages seven hundredths, medicine
four tenths; mathematics fills the rest.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "orchard"))

import code_functions
import languages
import math_problems
from records import Record, write_lines

SHARES = {"code": 1 / 30, "languages": 0.07, "medicine": 0.4}


def main(count: int, out: Path, seed: int = 0) -> None:
    source = random.Random(seed)
    made: list[tuple[str, Record]] = []
    for skill, share in SHARES.items():
        found = list(_RECORDS[skill](round(share * count)))
        made += [(skill, record) for record in source.sample(found, min(round(share * count), len(found)))]
    made += [("math", problem.record) for problem in math_problems.problems("train", count - len(made), 100 + seed)]
    source.shuffle(made)
    write_lines(out, (_row(skill, record) for skill, record in made))


def _row(skill: str, record: Record) -> dict[str, Any]:
    return {"prompt": record.prompt, "completion": record.answer, "subtask": record.subtask, "skill": skill}


def _code(count: int) -> Iterator[Record]:
    for split in ("train", "dev", "test"):
        yield from code_functions.records(split)


def _medicine(count: int) -> Iterator[Record]:
    import simple_icd_10_cm as icd

    for code in icd.get_all_codes():
        if icd.is_category_or_subcategory(code):
            chapter = icd.get_description(icd.get_ancestors(code)[-1])
            yield Record(f"Which chapter of ICD-10-CM does this diagnosis belong to: {icd.get_description(code)}?",
                         chapter, chapter)  # fmt: skip


_RECORDS = {
    "code": _code,
    "languages": lambda count: languages.records("train", count, 100),
    "medicine": _medicine,
}

if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
