"""Layouts: which columns hold the question and which the answer, and how a record of each becomes an item.

| layout | columns | prompt | answer |
|---|---|---|---|
| `messages` | `messages` | all turns before the last, which must be the assistant's | the last turn |
| `instruction` | `instruction`, `input`, `output`, `system` | `instruction`, then `input` in a line | `output` |
| `completion` | `prompt`, `completion` | `prompt` | `completion` |
| `answer` | `prompt`, `answer` | `prompt` | `answer` |
| `text` | `text` | nothing | the whole text |

Every layout may carry `subtask` and `images`. A turn is `{role, content}` or `{from, value}`; `content` is a text or a
list of `{type: text, text}` and `{type: image}`. Where the columns of several layouts are there, the first counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from graftkit.data.images import checked_images
from graftkit.errors import DataError, unknown

REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "answer": ("prompt", "answer"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"instruction": ("input", "system")}
CARRIED = ("subtask", "images")
CHATS = ("messages", "instruction")
"""Layouts of conversations: a file of these is a chat unless its description says otherwise. (`completion` is one too
where `prompt` and `completion` are lists of turns.)"""

_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Columns:
    """How a file's columns are to be read: `names` maps ours to theirs, `images` is where pictures lie, if not beside
    the file."""

    names: Mapping[str, str] = field(default_factory=dict)
    images: Path | None = None

    def renamed(self, where: str, fields: dict[str, Any]) -> dict[str, Any]:
        """A record under our names. Raises DataError where a column is not there."""
        if not self.names:
            return fields
        for theirs in self.names.values():
            if theirs not in fields:
                raise DataError(f"{where}: columns: {unknown('column', theirs, map(str, fields))}")
        moved = set(self.names.values()) | set(self.names)
        kept = {key: value for key, value in fields.items() if key not in moved}
        return kept | {ours: fields[theirs] for ours, theirs in self.names.items()}


def layout_of(where: str, fields: Mapping[str, Any]) -> str:
    """The layout that a record's columns have. Raises DataError where they have none."""
    for layout, names in REQUIRED.items():
        if all(name in fields for name in names):
            return layout
    expected, here = ", ".join("+".join(names) for names in REQUIRED.values()), ", ".join(map(str, fields))
    raise DataError(
        f"{where}: no layout fits the columns {here or '(none)'}; expected one of {expected}, or say which is which: "
        "columns: {prompt: ...} in a task's description, --column prompt=... on the command line"
    )


def turns_of(where: str, fields: Mapping[str, Any], layout: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """The turns before the answer, as pairs of role and text, and the answer. Raises DataError."""
    _complete(where, fields, layout)
    if layout == "messages":
        return _split(where, _conversation(where, "messages", fields["messages"]))
    if layout == "completion" and isinstance(fields["prompt"], list):
        whole = [*_conversation(where, "prompt", fields["prompt"]),
                 *_conversation(where, "completion", fields["completion"])]  # fmt: skip
        return _split(where, whole)
    if layout == "text":
        return (("user", ""),), _answer(where, fields, "text")
    answer = _answer(where, fields, REQUIRED[layout][1])
    if layout != "instruction":
        return (("user", _text(where, fields, "prompt")),), answer
    asked = [_text(where, fields, "instruction"), _text(where, fields, "input", "")]
    system = _text(where, fields, "system", "")
    before = (("system", system),) if system else ()
    return (*before, ("user", "\n".join(part for part in asked if part))), answer


def subtask_and_images(
    where: str, fields: Mapping[str, Any], texts: Collection[str], directory: Path | None
) -> tuple[str, tuple[str, ...]]:
    """What records of every layout may carry; images are checked against `directory` where there is one."""
    subtask = fields.get("subtask")
    if subtask is not None and (not isinstance(subtask, (str, int)) or isinstance(subtask, bool)):
        raise DataError(f"{where}: subtask: expected a text, got {subtask!r:.60}")
    held = fields["images"] if fields.get("images") is not None else []
    images = checked_images(where, held, texts, directory) if "images" in fields else ()
    return "" if subtask is None else str(subtask), images


def _complete(where: str, fields: Mapping[str, Any], layout: str) -> None:
    """Refuses records that lack a column of the file's layout, or have one that is nearly another's name."""
    expected = (*REQUIRED[layout], *OPTIONAL.get(layout, ()), *CARRIED)
    missing = next((name for name in REQUIRED[layout] if name not in fields), None)
    absent = tuple(name for name in expected if name not in fields)
    for name in map(str, fields):
        close = _nearly(name, absent) if name not in expected else None
        if close:
            raise DataError(f"{where}: unknown field {name!r}; did you mean {close!r}?")
    if missing:
        raise DataError(f"{where}: {missing} is missing (the first record has {' and '.join(REQUIRED[layout])}); "
                        f"got {', '.join(map(str, fields)) or 'nothing'}")  # fmt: skip


@lru_cache(1024)
def _nearly(name: str, absent: tuple[str, ...]) -> str | None:
    return next(iter(difflib.get_close_matches(name, absent, 1, 0.8)), None)


def _text(where: str, fields: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = fields.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected a text, got {value!r:.60}")
    return value


def _answer(where: str, fields: Mapping[str, Any], key: str) -> str:
    text = _text(where, fields, key)
    if not text:
        raise DataError(f"{where}: {key}: expected a text, got an empty one")
    return text


def _conversation(where: str, key: str, turns: Any) -> list[tuple[str, str]]:
    if isinstance(turns, str) or not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{where}: {key}: expected a list of turns with role and content, got {turns!r:.60}")
    return [_turn(f"{where}: {key}[{number}]", turn) for number, turn in enumerate(turns)]


def _turn(where: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected role and content, got {turn!r:.60}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = _ROLES.get(str(role), role)
    if role not in _KNOWN_ROLES:
        raise DataError(f"{where}: {unknown('role', str(role), _KNOWN_ROLES)}")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: content: expected a text, got {content!r:.60}")
    return str(role), content


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return "<image>"
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where}: content: expected parts of type text or image, got {part!r:.60}")
    return str(part["text"])


def _split(where: str, turns: list[tuple[str, str]]) -> tuple[tuple[tuple[str, str], ...], str]:
    """The last turn is the answer, and the one before it the prompt."""
    if turns[-1][0] != "assistant" or not turns[-1][1]:
        raise DataError(f"{where}: messages: expected an answer of the assistant as the last turn, got one of the "
                        f"{turns[-1][0]}{'' if turns[-1][1] else ', empty'}")  # fmt: skip
    if len(turns) < 2 or turns[-2][0] != "user":
        got = f"the {turns[-2][0]}'s" if len(turns) > 1 else "none"
        raise DataError(f"{where}: messages: expected a user's turn before the last one, got {got}")
    return tuple(turns[:-1]), turns[-1][1]
