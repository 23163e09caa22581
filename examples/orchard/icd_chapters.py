"""Diagnoses and the chapter of ICD-10-CM that lists them, from the package simple-icd-10-cm (MIT; the text is CDC's).

The split is by block ("Diseases of inner ear", "Hemolytic anemias"): within each chapter one block in eight, by a hash
of its name, goes to test and as many to dev. So no diagnosis, no category and no block is in two splits, and dev and
test ask in words that training does not use. Chapter 22, for special purposes, has two categories and is left out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from functools import cache

from records import Record

QUESTIONS = {
    "train": (
        "Which chapter of ICD-10-CM does this diagnosis belong to: {}?",
        "Diagnosis: {}. In which chapter of ICD-10-CM is it?",
        "Give the ICD-10-CM chapter for: {}",
    ),
    "dev": ("Under which chapter of ICD-10-CM is this listed: {}?",),
    "test": ("Name the ICD-10-CM chapter of the following diagnosis. {}",),
}
MOST_CHARACTERS = 110  # of a diagnosis
MOST_EACH = {"train": 6, "dev": 2, "test": 2}  # diagnoses of one category
FEW = 3  # a chapter with fewer blocks is left out


def chapters() -> tuple[str, ...]:
    """The names of the chapters, in the order of the classification."""
    return tuple(name for name, _ in _blocks())


def records(split: str) -> list[Record]:
    """Diagnoses of one split with the name of their chapter, which is the subtask too; the chapters take turns."""
    source = random.Random(split)
    queues = [_diagnoses(split, blocks, source) for _, blocks in _blocks()]
    asked: dict[str, Record] = {}
    for turn in range(max(map(len, queues))):
        for chapter, queue in zip(chapters(), queues, strict=True):
            text = queue[turn % len(queue)]
            question = source.choice(QUESTIONS[split]).format(text)
            asked.setdefault(text.lower(), Record(question, chapter, chapter))
    return list(asked.values())


def blocks_of(split: str) -> list[str]:
    """The names of the blocks of one split."""
    return [name for _, blocks in _blocks() for name, _ in _part(blocks, split)]


def _diagnoses(split: str, blocks: tuple[tuple[str, tuple[str, ...]], ...], source: random.Random) -> list[str]:
    """The diagnoses of a chapter's blocks of one split, shuffled, at most MOST_EACH of a category."""
    found = []
    for _, categories in _part(blocks, split):
        for category in categories:
            texts = list(_texts(category))
            found += source.sample(texts, min(len(texts), MOST_EACH[split]))
    return source.sample(found, len(found))


def _part(blocks: tuple[tuple[str, tuple[str, ...]], ...], split: str) -> list[tuple[str, tuple[str, ...]]]:
    ranked = sorted(blocks, key=lambda block: hashlib.sha256(block[0].encode()).digest())
    share = max(1, round(len(ranked) / 8))
    return {"test": ranked[:share], "dev": ranked[share : 2 * share], "train": ranked[2 * share :]}[split]


@cache
def _blocks() -> tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]:
    """Every chapter with its blocks, every block with its categories."""
    import simple_icd_10_cm as icd

    found = []
    for code in filter(icd.is_chapter, icd.get_all_codes()):
        blocks = [(_plain(block), tuple(_categories(block))) for block in icd.get_children(code)]
        blocks = [(name, categories) for name, categories in blocks if categories]
        if len(blocks) >= FEW:
            found.append((_plain(code), tuple(blocks)))
    return tuple(found)


def _categories(block: str) -> Iterator[str]:
    import simple_icd_10_cm as icd

    return (code for code in icd.get_descendants(block) if icd.is_category(code))


def _texts(category: str) -> Iterator[str]:
    """The category's and its subcategories' descriptions, without the seventh character ("initial encounter")."""
    import simple_icd_10_cm as icd

    for code in (category, *icd.get_descendants(category)):
        text = icd.get_description(code)
        if not icd.is_extended_subcategory(code) and len(text) <= MOST_CHARACTERS:
            yield text


def _plain(code: str) -> str:
    """A description without its range of codes."""
    import simple_icd_10_cm as icd

    return re.sub(r"\s*\([A-Z0-9-]+\)$", "", icd.get_description(code))
