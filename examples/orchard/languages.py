"""English questions answered in French or German, made from the templates and words of `language_templates.yaml`.

The split is by template: dev and test put the nouns, verbs, places, days and numbers of training into sentences that
training does not have.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from math_problems import NAMES
from records import Record

TEMPLATES = Path(__file__).with_name("language_templates.yaml")
LANGUAGES = ("french", "german")
FORMS = ("a_thing", "the_thing", "things")


@dataclass(frozen=True)
class Template:
    """One sentence in three languages, with slots."""

    name: str
    split: str
    question: str
    french: str
    german: str


@cache
def words(kind: str) -> tuple[dict[str, Any], ...]:
    """The entries of one list of the file: templates, things, colours, places, days or numbers."""
    return tuple(yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))[kind])


@cache
def templates(split: str) -> tuple[Template, ...]:
    """The templates of one split, in the order of the file."""
    return tuple(Template(**entry) for entry in words("templates") if entry["split"] == split)


def records(split: str, count: int, seed: int) -> list[Record]:
    """`count` different questions, templates and languages taking turns; the subtask is the language."""
    source, shapes = random.Random(f"{split} {seed}"), templates(split)
    made: dict[str, Record] = {}
    for turn in range(40 * count):
        template, language = shapes[turn // 2 % len(shapes)], LANGUAGES[turn % 2]
        record = fill(template, language, source)
        made.setdefault(record.prompt, record)
        if len(made) == count:
            return list(made.values())
    raise ValueError(f"split {split}: the templates give {len(made)} different questions, {count} were wanted")


def fill(template: Template, language: str, source: random.Random) -> Record:
    """Draw the words of one sentence; question in English, answer in `language`."""
    thing, colour = source.choice(words("things")), source.choice(words("colours"))
    asked = {"A": source.choice(NAMES), "colour": colour["english"]}
    said = asked | {"colour": _coloured(colour, thing, language)}
    asked |= dict(zip(FORMS, thing["english"], strict=True))
    said |= dict(zip(FORMS, thing[language], strict=True))
    for slot, kind in (("n", "numbers"), ("place", "places"), ("day", "days")):
        word = source.choice(words(kind))
        asked[slot], said[slot] = word["english"], word[language]
    question = _capital(template.question.format(**asked))
    answer = _capital(getattr(template, language).format(**said))
    return Record(f"{question} Answer in {language.title()}.", answer, language)


def _coloured(colour: dict[str, Any], thing: dict[str, Any], language: str) -> str:
    """The colour after "is": French agrees with the noun, German does not."""
    return str(colour["french"][bool(thing.get("feminine"))] if language == "french" else colour["german"])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
