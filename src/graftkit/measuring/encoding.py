"""Items as token ids.

Prompt and answer are tokenised apart and joined, for every model alike, so an answer's tokens never depend on its
prompt. In a chat the prompt is rendered by the model's own template as a user's message, and the answer ends with the
token that ends a turn there; else nothing is added (an empty prompt becomes the token that begins a text).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graftkit.data.tasks import Item, Task
from graftkit.errors import DataError

_STAND_IN = "GRAFTKIT"  # an assistant's message that no template touches


@dataclass(frozen=True)
class Row:
    """One row of a batch: a prompt, then one or more of its answers side by side; `slots` are the answers' places."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens in the row."""
        return len(self.prompt) + sum(map(len, self.answers))

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
        for slot, answer in zip(self.slots, self.answers, strict=True):
            sources = [len(self.prompt) - 1, *range(start, start + len(answer) - 1)]
            yield from ((source, token, slot) for source, token in zip(sources, answer, strict=True))
            start += len(answer)


def encode(tokenizer: Any, task: Task, context: int | None = None) -> list[Row]:
    """One row per item of a task, its choices numbered through in `slots`.

    Raises DataError where a chat has no template, an answer has no tokens, or an item does not fit `context` positions.
    """
    starts = prompts(tokenizer, task)
    end, rows, slot = end_of_turn(tokenizer, task), [], 0
    for number, (item, prompt) in enumerate(zip(task.items, starts, strict=True)):
        answers = tuple((*_ids(tokenizer, choice), *end) for choice in item.choices)
        longest = len(prompt) + max(map(len, answers))
        if not all(answers):
            raise DataError(f"task {task.name}, item {number}: an answer has no tokens: {item.choices!r:.60}")
        if context is not None and longest > context:
            raise DataError(f"task {task.name}, item {number}: {longest} tokens, but the model takes {context}")
        rows.append(Row(prompt, answers, tuple(range(slot, slot + len(answers)))))
        slot += len(answers)
    return rows


def prompts(tokenizer: Any, task: Task) -> list[tuple[int, ...]]:
    """The prompt of each item. Raises DataError where a chat has no template, or a prompt no tokens."""
    if task.chat and not getattr(tokenizer, "chat_template", None):
        raise DataError(f"task {task.name}: it is a chat, but this tokenizer has no chat template; set chat: false")
    made = [_chat_prompt(tokenizer, item) if task.chat else _plain_prompt(tokenizer, item) for item in task.items]
    empty = next((number for number, prompt in enumerate(made) if not prompt), None)
    if empty is not None:
        raise DataError(f"task {task.name}, item {empty}: the prompt has no tokens: {task.items[empty].prompt!r:.60}")
    return made


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _plain_prompt(tokenizer: Any, item: Item) -> tuple[int, ...]:
    """The prompt after what the tokenizer puts before texts (often one token), without what it appends to them."""
    plain, full = _ids(tokenizer, item.prompt), tuple(tokenizer.encode(item.prompt))
    starts = (start for start in range(len(full) - len(plain) + 1) if full[start : start + len(plain)] == plain)
    ids = full[: next(starts, 0)] + plain
    begin = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    return ids or tuple(begin[:1])


def _chat_prompt(tokenizer: Any, item: Item) -> tuple[int, ...]:
    message = {"role": "user", "content": item.prompt}
    return _ids(tokenizer, tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))


def end_of_turn(tokenizer: Any, task: Task) -> tuple[int, ...]:
    """In a chat the special token that follows an assistant's message in the template, else the one that ends texts;
    nothing outside of chats."""
    if not task.chat:
        return ()
    messages = [{"role": "user", "content": _STAND_IN}, {"role": "assistant", "content": _STAND_IN}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_STAND_IN)[2]
    special = [token for token in _ids(tokenizer, after) if token in tokenizer.all_special_ids]
    ends = special or [token for token in (tokenizer.eos_token_id,) if token is not None]
    if not ends:
        raise DataError(f"task {task.name}: no token ends a turn in this tokenizer's chat template; set chat: false")
    return (ends[0],)
