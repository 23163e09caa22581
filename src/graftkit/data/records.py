"""Records, one JSON object a line, as items: what each kind of task may and must hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.data.fields import field, json_object, known, lines, texts
from graftkit.errors import DataError

_ALWAYS = ("prompt", "subtask", "id", "source")
RECORD_KEYS: dict[str, tuple[str, ...]] = {
    "answer_loss": (*_ALWAYS, "answer"),
    "multiple_choice": (*_ALWAYS, "choices", "answer"),
    "exact_match": (*_ALWAYS, "answer"),
    "pass_at_1": (*_ALWAYS, "test", "entry_point", "answer"),
}


@dataclass(frozen=True)
class Item:
    """One example: a prompt, its possible answers, and which is right.

    `choices`: of `multiple_choice` all of them, of `answer_loss` the one answer, of `exact_match` every answer that
    counts as right, of `pass_at_1` none: there `code` is what the model was to go on from, and `test` and `entry_point`
    tell whether it did.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0
    subtask: str = ""
    code: str = ""
    test: str = ""
    entry_point: str = ""


def read_items(path: Path, kind: str) -> tuple[Item, ...]:
    """Every record of a JSONL file. Raises DataError with file and line where one is at fault."""
    return tuple(item_of(f"{path}:{number}", json_object(f"{path}:{number}", line), kind)
                 for number, line in lines(path))  # fmt: skip


def item_of(where: str, record: dict[str, Any], kind: str) -> Item:
    """One record as an item of a kind."""
    known(where, record, RECORD_KEYS[kind])
    prompt = field(where, record, "prompt", str)
    subtask = field(where, record, "subtask", str, "")
    if kind == "multiple_choice":
        choices = _choices(where, field(where, record, "choices", list))
        return Item(prompt, choices, _index(where, record, len(choices)), subtask)
    if kind == "pass_at_1":
        test, entry = field(where, record, "test", str), field(where, record, "entry_point", str, "")
        return Item(prompt, (), 0, subtask, prompt, test, entry)
    if kind == "exact_match" and isinstance(record.get("answer"), list):
        return Item(prompt, texts(where, record["answer"], "answer"), 0, subtask)
    answer = field(where, record, "answer", str)
    if not answer:
        raise DataError(f"{where}: answer: expected a text, got an empty one")
    return Item(prompt, (answer,), 0, subtask)


def _index(where: str, record: dict[str, Any], count: int) -> int:
    index: int = field(where, record, "answer", int)
    if not 0 <= index < count:
        raise DataError(f"{where}: answer: expected an index from 0 to {count - 1}, got {index}")
    return index


def _choices(where: str, choices: list[Any]) -> tuple[str, ...]:
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{where}: choices: expected two or more texts that are not empty, got {choices!r:.80}")
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: choices: two are the same: {choices!r:.80}")
    return tuple(choices)
