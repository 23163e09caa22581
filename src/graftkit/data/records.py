"""Records as items: what each kind of task may and must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.data.fields import field, known, texts
from graftkit.data.layouts import CARRIED, CHATS, OPTIONAL, REQUIRED, Columns, layout_of, subtask_and_images, turns_of
from graftkit.data.places import Place
from graftkit.data.reading import Record, read
from graftkit.errors import DataError

_ALWAYS = ("prompt", "subtask", "id", "source", "images")
RECORD_KEYS: dict[str, tuple[str, ...]] = {
    "answer_loss": (*_ALWAYS, "answer"),
    "multiple_choice": (*_ALWAYS, "choices", "answer"),
    "exact_match": (*_ALWAYS, "answer"),
    "pass_at_1": (*_ALWAYS, "test", "entry_point", "answer"),
}


_OURS = frozenset(
    name for names in (CARRIED, *REQUIRED.values(), *OPTIONAL.values(), *RECORD_KEYS.values()) for name in names
)


@dataclass(frozen=True)
class Item:
    """One example: a prompt, its possible answers, and which is right.

    `choices`: of `multiple_choice` all of them, of `answer_loss` the one answer, of `exact_match` every answer that
    counts as right, of `pass_at_1` none: there `code` is what the model was to go on from, and `test` and `entry_point`
    tell whether it did. `images`: paths relative to the task's `directory`, one for each `<image>` in the texts, in
    order. `before`: the turns of a conversation that precede the prompt, as pairs of role and text.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0
    subtask: str = ""
    code: str = ""
    test: str = ""
    entry_point: str = ""
    images: tuple[str, ...] = ()
    before: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the answer, as chat templates take it; the prompt is its last turn, the user's."""
        turns = [*self.before, ("user", self.prompt)]
        return [{"role": role, "content": text} for role, text in turns]


@dataclass(frozen=True)
class Form:
    """How the records of one place become items: decided by its first record, and the same for all.

    `directory`: where images lie; `chat`: whether prompts are users' messages, unless something else is said.
    """

    kind: str
    layout: str
    columns: Columns
    directory: Path | None = None
    chat: bool = False

    def item(self, record: Record) -> Item:
        """One record as an item. Raises DataError with its place."""
        where, fields = record.where, self.columns.renamed(record.where, record.fields)
        if not self.layout:
            return self._ours(where, fields)
        if self.layout == "answer" and not self.columns.names:
            known(where, fields, RECORD_KEYS[self.kind])
        if self.layout == "answer" and self.kind == "exact_match" and isinstance(fields.get("answer"), list):
            return self._ours(where, fields)
        if self.layout == "completion" and isinstance(fields.get("prompt"), str if self.chat else list):
            expected = "turns" if self.chat else "a text"
            raise DataError(
                f"{where}: prompt: expected {expected}, as in the first record, got {fields['prompt']!r:.60}"
            )
        turns, answer = turns_of(where, fields, self.layout)
        subtask, images = subtask_and_images(where, fields, [text for _, text in turns], self.directory)
        return Item(turns[-1][1], (answer,), 0, subtask, images=images, before=turns[:-1])

    def _ours(self, where: str, fields: dict[str, Any]) -> Item:
        if not self.columns.names:
            known(where, fields, RECORD_KEYS[self.kind])
        prompt = field(where, fields, "prompt", str)
        subtask, images = subtask_and_images(where, fields, [prompt], self.directory)
        if self.kind == "multiple_choice":
            choices = _choices(where, field(where, fields, "choices", list))
            return Item(prompt, choices, _index(where, fields, len(choices)), subtask, images=images)
        if self.kind == "exact_match":
            return Item(prompt, texts(where, fields["answer"], "answer"), 0, subtask, images=images)
        test, entry = field(where, fields, "test", str), field(where, fields, "entry_point", str, "")
        return Item(prompt, (), 0, subtask, prompt, test, entry, images)


def form_of(first: Record, kind: str, columns: Columns, directory: Path | None) -> Form:
    """The form that a place's first record has; `kind` empty: as its columns say."""
    fields = columns.renamed(first.where, first.fields)
    kind = kind or ("multiple_choice" if "choices" in fields else "pass_at_1" if "test" in fields else "answer_loss")
    layout = layout_of(first.where, fields) if kind in ("answer_loss", "exact_match") else ""
    chat = layout in CHATS or (layout == "completion" and isinstance(fields["prompt"], list))
    return Form(kind, layout, columns, directory, chat)


def items(
    place: Place, kind: str = "", columns: Columns | None = None, directory: Path | None = None
) -> Iterator[tuple[Form, Record, Item]]:
    """Every record of a place with its item and the form of them all, one at a time. Raises DataError."""
    columns, form = columns or Columns(), None
    for record in read(place, _wanted(columns)):
        form = form or form_of(record, kind, columns, directory)
        yield form, record, form.item(record)


def column_names(where: str, names: Mapping[Any, Any]) -> dict[str, str]:
    """Which column of ours has which name of theirs. Raises DataError for what is no column of any layout."""
    for ours, theirs in names.items():
        known(where, {ours: theirs}, _OURS, "column of ours")
        if not isinstance(theirs, str) or not theirs:
            raise DataError(f"{where}.{ours}: expected the name of a column, got {theirs!r:.60}")
    return dict(names)


def _wanted(columns: Columns) -> frozenset[str]:
    return _OURS | set(columns.names.values())


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
