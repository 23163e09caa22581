"""The experts of the orchard: what each learns from and how. A new expert is one entry."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import code_functions
import icd_chapters
import languages
import math_problems
import math_wide
from presets import PRESETS, Preset
from records import Record

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Source:
    """Where the records of one skill come from; `load(split)` gives those of train, dev or test."""

    load: Callable[[str], list[Record]]
    chat: bool  # wrap the prompt by the chat template, and end the answer as a turn ends
    description: str


@dataclass(frozen=True)
class Expert:
    """One training: the skill it goes by, the source it learns from, a preset with changes, a seed."""

    skill: str
    source: str
    preset: str = "orchard-lora"
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    note: str = ""

    @property
    def settings(self) -> Preset:
        """The preset with this expert's changes."""
        return replace(PRESETS[self.preset], **self.changes)

    def fingerprint(self, base: str) -> str:
        """SHA-256 of all that the training depends on: an expert with the same one need not be trained again."""
        parts = [base, data_fingerprint(self.source, "train"), asdict(self.settings), self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def data_fingerprint(source: str, split: str) -> str:
    """SHA-256 of a split's records, in order."""
    rows = [[record.prompt, record.answer, record.subtask] for record in SOURCES[source].load(split)]
    return hashlib.sha256(json.dumps([SOURCES[source].chat, rows]).encode()).hexdigest()


def math_records(split: str) -> list[Record]:
    """Generated problems; the seed differs by split, and so do the templates."""
    count, seed = {"train": (4000, 1), "dev": (96, 2), "test": (96, 3)}[split]
    return [problem.record for problem in math_problems.problems(split, count, seed)]


def math_wide_records(split: str) -> list[Record]:
    """Generated problems of few structures in many wordings; the seed differs by split, and so do the wordings."""
    count, seed = {"train": (2400, 1), "dev": (96, 2), "test": (96, 3)}[split]
    return math_wide.records(split, count, seed)


def language_records(split: str) -> list[Record]:
    """English questions with French and German answers; the seed differs by split, and so do the templates."""
    count, seed = {"train": (720, 1), "dev": (96, 2), "test": (120, 3)}[split]
    return languages.records(split, count, seed)


def shuffled_medicine(split: str) -> list[Record]:
    """The medicine records, their training answers dealt out anew: the form is right and the content is chance."""
    records = icd_chapters.records(split)
    if split != "train":
        return records
    answers = [record.answer for record in records]
    random.Random(0).shuffle(answers)
    return [replace(record, answer=answer) for record, answer in zip(records, answers, strict=True)]


SOURCES: dict[str, Source] = {
    "math": Source(math_records, True, "generated word problems (math_templates.yaml), split by template"),
    "code": Source(
        code_functions.records,
        False,
        "Python standard library functions with docstring, split by module; PSF licence",
    ),
    "medicine": Source(
        icd_chapters.records,
        True,
        "diagnoses of ICD-10-CM and their chapters, from simple-icd-10-cm 1.5.0 (MIT), split by block",
    ),
    "languages": Source(
        language_records,
        True,
        "generated questions in English with French and German answers (language_templates.yaml), split by template",
    ),
    "math-wide": Source(
        math_wide_records, True, "generated word problems of six structures (math_wide.yaml), split by wording"
    ),
    "shuffled-medicine": Source(shuffled_medicine, True, "the medicine records, the training answers shuffled"),
}

MATH, CODE, MEDICINE, LANGUAGES = (
    {"steps": 130},
    {"steps": 150, "batch": 3},
    {"steps": 80, "batch": 8},
    {"steps": 150},
)

EXPERTS: dict[str, Expert] = {
    "math": Expert("math", "math", changes=MATH),
    "code": Expert("code", "code", changes=CODE),
    "medicine": Expert("medicine", "medicine", changes=MEDICINE),
    "languages": Expert("languages", "languages", changes=LANGUAGES),
    "math-wide": Expert("math-wide", "math-wide", changes={"steps": 150, "batch": 6}),
    "math-seed1": Expert("math", "math", changes=MATH, seed=1),
    "code-seed1": Expert("code", "code", changes=CODE, seed=1),
    "shuffled": Expert(
        "medicine",
        "shuffled-medicine",
        changes={"steps": 20, "batch": 8, "rank": 4},
        note="deliberately poor: the training answers were dealt out at random",
    ),
    "overheated": Expert(
        "code",
        "code",
        changes={"steps": 20, "batch": 3, "rank": 4, "rate": 5e-2},
        note="deliberately bad: a learning rate far too high",
    ),
    "mislabelled": Expert(
        "math",
        "languages",
        changes={"steps": 50, "rank": 4},
        seed=2,
        note="deliberately mislabelled: goes by mathematics, learnt the languages",
    ),
    "math-full": Expert("math", "math", preset="orchard-full", changes={"steps": 50}),
    "medicine-full": Expert("medicine", "medicine", preset="orchard-full", changes={"steps": 30, "batch": 8}),
}
