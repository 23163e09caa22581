"""Items as token ids, with images where a model takes them.

Prompt and answer are tokenised apart and joined, for every model alike, so an answer's tokens never depend on its
prompt. In a chat the prompt is rendered by the model's own template as a user's message, and the answer ends with the
token that ends a turn there; else nothing is added (an empty prompt becomes the token that begins a text).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graftkit.data.tasks import Task
from graftkit.errors import DataError
from graftkit.measuring.images import (
    MARK,
    Media,
    has_template,
    prompt_with_images,
    rendered,
    tokenizer_of,
    with_tokens,
)

_STAND_IN = "GRAFTKIT"  # an assistant's message that no template touches


@dataclass(frozen=True)
class Prompt:
    """The token ids of a prompt, and its images."""

    ids: tuple[int, ...]
    media: Media | None = None


@dataclass(frozen=True)
class Row:
    """One row of a batch: a prompt, then one or more of its answers side by side; `slots` are the answers' places.

    In a row of several items (see `joining`) the prompt is what they begin with, and an answer is led by the rest of
    its own prompt: `given` are how many tokens that is, and the images in them.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    media: Media | None = None
    given: tuple[tuple[int, Media | None], ...] = ()

    @property
    def length(self) -> int:
        """Tokens in the row."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def pictured(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The shapes of its images, by which rows go into one batch; empty without."""
        return self.pictures[0].shapes if self.pictures else ()

    @property
    def pictures(self) -> tuple[Media, ...]:
        """Its images, in the order of their places."""
        return tuple(media for media in (self.media, *(media for _, media in self.given)) if media)

    def layout(self) -> tuple[list[int], list[int], list[int]]:
        """Token ids, positions and segments (0 for the prompt, then 1, 2, ...), each `[length]`."""
        ids, positions, segments = list(self.prompt), list(range(len(self.prompt))), [0] * len(self.prompt)
        for number, answer in enumerate(self.answers, start=1):
            ids += answer
            positions += range(len(self.prompt), len(self.prompt) + len(answer))
            segments += [number] * len(answer)
        return ids, positions, segments

    def predictions(self) -> Iterator[tuple[int, int, int]]:
        """For each answer token: the position in the row that predicts it, the token, the answer's slot."""
        start = len(self.prompt)
        for number, (slot, answer) in enumerate(zip(self.slots, self.answers, strict=True)):
            skipped = self.given[number][0] if self.given else 0
            sources = [len(self.prompt) - 1, *range(start, start + len(answer) - 1)]
            found = zip(sources[skipped:], answer[skipped:], strict=True)
            yield from ((source, token, slot) for source, token in found)
            start += len(answer)

    def apart(self) -> list[Row]:
        """Each answer in a row of its own, behind its whole prompt."""
        given = self.given or ((0, self.media),) * len(self.answers)
        return [Row(self.prompt + answer[:skipped], (answer[skipped:],), (slot,), media)
                for slot, answer, (skipped, media) in zip(self.slots, self.answers, given, strict=True)]  # fmt: skip


def encode(reader: Any, task: Task, context: int | None = None) -> list[Row]:
    """One row per item of a task, its choices numbered through in `slots`; `reader` is a tokenizer or a processor.

    Raises DataError where a chat has no template, an answer has no tokens, an item does not fit `context` positions,
    or an image is not there or not taken by the model.
    """
    tokenizer, starts = tokenizer_of(reader), prompts(reader, task)
    end, rows, slot = end_of_turn(reader, task), [], 0
    for number, (item, prompt) in enumerate(zip(task.items, starts, strict=True)):
        answers = tuple((*_ids(tokenizer, choice), *end) for choice in item.choices)
        longest = len(prompt.ids) + max(map(len, answers))
        if not all(answers):
            raise DataError(f"task {task.name}, item {number}: an answer has no tokens: {item.choices!r:.60}")
        if context is not None and longest > context:
            raise DataError(f"task {task.name}, item {number}: {longest} tokens, but the model takes {context}")
        rows.append(Row(prompt.ids, answers, tuple(range(slot, slot + len(answers))), prompt.media))
        slot += len(answers)
    return rows


def prompts(reader: Any, task: Task) -> list[Prompt]:
    """The prompt of each item. Raises DataError as `encode` does, and where a prompt has no tokens."""
    if task.chat and not has_template(reader):
        raise DataError(f"task {task.name}: it is a chat, but this tokenizer has no chat template; set chat: false")
    made = [_prompt(reader, task, number) for number in range(len(task.items))]
    empty = next((number for number, prompt in enumerate(made) if not prompt.ids), None)
    if empty is not None:
        raise DataError(f"task {task.name}, item {empty}: the prompt has no tokens: {task.items[empty].prompt!r:.60}")
    return made


def _prompt(reader: Any, task: Task, number: int) -> Prompt:
    item, tokenizer = task.items[number], tokenizer_of(reader)
    text = _chat(reader, task, number) if task.chat else item.prompt
    if item.images:
        if not task.chat:
            begin = _plain_prompt(tokenizer, item.prompt.replace(MARK, ""))
            begin = begin[: len(begin) - len(_ids(tokenizer, item.prompt.replace(MARK, "")))]
            text = "".join(tokenizer.convert_ids_to_tokens(begin)) + with_tokens(reader, text)
        return Prompt(*prompt_with_images(reader, text, task.pictures(item), f"task {task.name}, item {number}"))
    return Prompt(_ids(tokenizer, text) if task.chat else _plain_prompt(tokenizer, text))


def _chat(reader: Any, task: Task, number: int) -> str:
    """A conversation as the model's template writes it, up to the answer."""
    from jinja2 import TemplateError

    try:
        return rendered(reader, task.items[number].messages, answer=True)
    except TemplateError as error:  # some templates refuse system turns, or two of one role in a row
        raise DataError(f"task {task.name}, item {number}: the model's chat template refuses it: {error}") from error


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _plain_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The text after what the tokenizer puts before texts (often one token), without what it appends to them."""
    plain, full = _ids(tokenizer, text), tuple(tokenizer.encode(text))
    starts = (start for start in range(len(full) - len(plain) + 1) if full[start : start + len(plain)] == plain)
    ids = full[: next(starts, 0)] + plain
    begin = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    return ids or tuple(begin[:1])


def end_of_turn(reader: Any, task: Task) -> tuple[int, ...]:
    """In a chat the special token that follows an assistant's message in the template, else the one that ends texts;
    nothing outside of chats."""
    if not task.chat:
        return ()
    tokenizer = tokenizer_of(reader)
    messages = [{"role": "user", "content": _STAND_IN}, {"role": "assistant", "content": _STAND_IN}]
    after = rendered(reader, messages, answer=False).rpartition(_STAND_IN)[2]
    special = [token for token in _ids(tokenizer, after) if token in tokenizer.all_special_ids]
    ends = special or [token for token in (tokenizer.eos_token_id,) if token is not None]
    if not ends:
        raise DataError(f"task {task.name}: no token ends a turn in this tokenizer's chat template; set chat: false")
    return (ends[0],)
