"""The general skill of the orchard: whole, unbroken, and never part of what experts are trained on."""

from __future__ import annotations

from pathlib import Path

from graftkit.data import load_tasks

GENERAL = Path(__file__).parents[1] / "examples" / "orchard" / "general"
MMLU, TEXT = load_tasks([GENERAL])


def test_the_questions_are_whole() -> None:
    assert (MMLU.name, MMLU.kind, MMLU.skill, len(MMLU.items)) == ("mmlu", "multiple_choice", "general", 278)
    assert {item.subtask for item in MMLU.items} == {"stem", "humanities", "social_sciences", "other"}
    for item in MMLU.items:
        assert len(item.choices) == 4 and all(choice.startswith(" ") for choice in item.choices)
    counts = [sum(item.answer == k for item in MMLU.items) for k in range(4)]
    assert min(counts) > 50  # no letter is favoured by much


def test_the_texts_are_whole() -> None:
    assert (TEXT.name, TEXT.kind, TEXT.skill, len(TEXT.items)) == ("general_text", "answer_loss", "general", 54)
    assert all(150 <= len(item.choices[0].strip()) <= 600 for item in TEXT.items)
    for frame in ("think step by step", "problem step by step", "The answer is (", "Wikipedia articles"):
        assert not any(frame in item.choices[0] for item in TEXT.items)


def test_nothing_arrived_broken() -> None:
    for item in (*MMLU.items, *TEXT.items):
        for text in (item.prompt, *item.choices):
            assert all(character.isprintable() or character == "\n" for character in text)


def test_the_licence_stands_beside() -> None:
    assert "MIT License" in (GENERAL / "LICENSE").read_text()
