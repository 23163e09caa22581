"""Tasks: examples that models are scored on.

A task is a YAML file of a few lines beside a JSONL file of records:

    name: arithmetic
    kind: answer_loss            # or multiple_choice
    data: arithmetic.jsonl       # relative to the YAML
    chat: true                   # the prompt is a user's message, rendered with each model's chat template
    description: one-step word problems

Records of `answer_loss`: `{"prompt": str, "answer": str}`; of `multiple_choice`: `{"prompt": str,
"choices": [str, ...], "answer": index of the right one, from 0}`. Both may carry `subtask` (str), and `id` and
`source`, which are not used.
Nothing is inserted between prompt and answer: outside chats the space belongs to the answer (`" Paris"`).
A JSONL file alone is a task too: its name is the file's, its kind follows from the first record, and it is no chat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from graftkit.errors import DataError, unknown

Kind = Literal["answer_loss", "multiple_choice"]
TASK_KEYS = ("name", "kind", "data", "chat", "description")
RECORD_KEYS: dict[str, tuple[str, ...]] = {
    "answer_loss": ("prompt", "answer", "subtask", "id", "source"),
    "multiple_choice": ("prompt", "choices", "answer", "subtask", "id", "source"),
}


@dataclass(frozen=True)
class Item:
    """One example: a prompt, its possible answers, and which is right.

    An item of `answer_loss` has one choice, the answer, so that scoring treats both kinds alike.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0
    subtask: str = ""


@dataclass(frozen=True)
class Task:
    """A named list of items of one kind; `fingerprint` is the SHA-256 of the data file (empty if made in memory)."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    chat: bool = False
    description: str = ""
    fingerprint: str = ""


def load_task(path: str | Path) -> Task:
    """The task at `path`: a `.yaml` or `.yml` description, or a bare `.jsonl` file.

    Raises DataError with the file, and the line where a record is at fault, when anything cannot be meant.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; a task is a .yaml description or a .jsonl file of records")
    if path.suffix in (".yaml", ".yml"):
        return _described(path)
    if path.suffix == ".jsonl":
        return _bare(path)
    raise DataError(f"{path}: a task is a .yaml description or a .jsonl file of records, got {path.suffix!r}")


def _described(path: Path) -> Task:
    head = _head(path)
    kind = _field(path, head, "kind", str)
    if kind not in get_args(Kind):
        raise DataError(f"{path}: {unknown('kind', kind, get_args(Kind))}")
    data = path.parent / _field(path, head, "data", str)
    if not data.is_file():
        raise DataError(f"{path}: data: {data} does not exist (the path is relative to the YAML file)")
    items, fingerprint = _load(data, kind)
    name = _field(path, head, "name", str, path.stem)
    chat = _field(path, head, "chat", bool, False)
    return Task(name, kind, items, chat, _field(path, head, "description", str, ""), fingerprint)


def _head(path: Path) -> dict[str, Any]:
    import yaml

    try:
        head = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(head, dict):
        raise DataError(f"{path}: expected keys {', '.join(TASK_KEYS)}, got {type(head).__name__}")
    for key in head:
        if key not in TASK_KEYS:
            raise DataError(f"{path}: {unknown('key', str(key), TASK_KEYS)}")
    return head


def _bare(path: Path) -> Task:
    number, first = _lines(path)[0]
    kind: Kind = "multiple_choice" if "choices" in _record(path, number, first) else "answer_loss"
    items, fingerprint = _load(path, kind)
    return Task(path.stem, kind, items, fingerprint=fingerprint)


def _load(path: Path, kind: Kind) -> tuple[tuple[Item, ...], str]:
    items = tuple(_item(path, number, line, kind) for number, line in _lines(path))
    return items, hashlib.sha256(path.read_bytes()).hexdigest()


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1; a file without any is refused."""
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028, unescaped.
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: no records")
    return lines


def _item(path: Path, number: int, line: str, kind: Kind) -> Item:
    where = f"{path}:{number}"
    record = _record(path, number, line)
    _known(where, record, RECORD_KEYS[kind])
    prompt = _field(where, record, "prompt", str)
    subtask = _field(where, record, "subtask", str, "")
    if kind == "answer_loss":
        answer = _field(where, record, "answer", str)
        if not answer:
            raise DataError(f"{where}: answer: expected a text, got an empty one")
        return Item(prompt, (answer,), 0, subtask)
    choices = _choices(where, _field(where, record, "choices", list))
    index = _field(where, record, "answer", int)
    if not 0 <= index < len(choices):
        raise DataError(f"{where}: answer: expected an index from 0 to {len(choices) - 1}, got {index}")
    return Item(prompt, choices, index, subtask)


def _choices(where: str, choices: list[Any]) -> tuple[str, ...]:
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{where}: choices: expected two or more texts that are not empty, got {choices!r:.80}")
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: choices: two are the same: {choices!r:.80}")
    return tuple(choices)


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: expected an object with prompt and answer, got {line.strip():.40}")
    return record


def _known(where: str, record: Mapping[str, Any], known: Collection[str]) -> None:
    for key in record:
        if key not in known:
            raise DataError(f"{where}: {unknown('field', key, known)}")


def _field(where: str | Path, fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A field of the type asked for; with no default it has to be there."""
    value = fields.get(key, default)
    if key not in fields and default is None:
        raise DataError(f"{where}: {key} is missing")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "a text", bool: "true or false", int: "an integer", list: "a list"}
        raise DataError(f"{where}: {key}: expected {names[kind]}, got {value!r:.60}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
