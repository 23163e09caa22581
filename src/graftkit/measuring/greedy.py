"""What greedy decoding answers, from one pass over the right answers: where it keeps to one, and where it leaves.

A model that finds every token of a right answer likeliest, each after those before it, and then a token that ends the
turn, would have written that answer: nothing need be generated. Where it leaves, the text up to there may show that no
right answer can follow. What is open after that (other tokens for the same text, white space) is read on for a few
tokens, and if it is still open, generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftkit.data.normalisation import Rule, right_answer
from graftkit.data.tasks import Generation, Item, Task
from graftkit.errors import NonFiniteError
from graftkit.measuring.encoding import Row, prompts
from graftkit.measuring.generation import Reply, ends_of, reply_of
from graftkit.measuring.images import tokenizer_of
from graftkit.measuring.joining import joined
from graftkit.measuring.scoring import Scorer, choose_scorer, context_of, read

NOTE = "read only as far as shows it wrong"
_PLAIN = ("strip", "casefold")  # rules under which a text that no right answer begins with stays wrong
_FURTHER = 3  # tokens that are read on, each by a pass over what is still open


@dataclass(frozen=True)
class Asked:
    """A task as rows, made once for all models that read alike; `ends` are the tokens that end an answer."""

    task: Task
    reader: Any
    rows: tuple[Row, ...]
    ends: tuple[int, ...]

    @property
    def settings(self) -> Generation:
        """How an answer is generated."""
        return self.task.generation or Generation()


def asked(model: Any, reader: Any, task: Task) -> Asked | None:
    """None where a text can end before its end (stops), where nothing ends it, or where an answer may not fit."""
    settings, ends = task.generation or Generation(), ends_of(model, reader, task)
    if settings.stop or not ends:
        return None
    tokenizer, starts, rows, slot = tokenizer_of(reader), prompts(reader, task), [], 0
    context = context_of(model)
    for item, start in zip(task.items, starts, strict=True):
        answers = tuple((*tokenizer.encode(one, add_special_tokens=False), ends[0]) for one in item.choices)
        if context and len(start.ids) + max(settings.max_new_tokens, *map(len, answers)) > context:
            return None
        rows.append(Row(start.ids, answers, tuple(range(slot, slot + len(answers))), start.media))
        slot += len(answers)
    return Asked(task, reader, tuple(rows), ends)


def foreseen(
    model: Any,
    questions: Asked,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
    scorer: Scorer | None = None,
) -> dict[int, Reply | str]:
    """By item number: its whole greedy reply, or the beginning of one that is surely wrong. What is open is left out.

    `scorer`: the savings that were found for a model of the same kind, else they are found now.
    """
    scorer = replace(scorer, model=model) if scorer else choose_scorer(model, questions.rows)
    likeliest = _likeliest(scorer, questions.task, questions.rows, batch_tokens)
    paths = {number: max((_path(answer, likeliest[slot]) for slot, answer in zip(row.slots, row.answers, strict=True)),
                         key=len) for number, row in enumerate(questions.rows)}  # fmt: skip
    found: dict[int, Reply | str] = {}
    for further in range(_FURTHER + 1):
        found |= _decided(questions, paths)
        left = {number: path for number, path in paths.items() if number not in found}
        advance(len(paths) - len(left))
        if not left or further == _FURTHER:
            break
        paths = _read_on(scorer, questions, left, batch_tokens)
    return found


def _likeliest(scorer: Scorer, task: Task, rows: Iterable[Row], batch_tokens: int) -> dict[int, tuple[int, ...]]:
    """By slot. Raises NonFiniteError where log-probabilities are NaN."""
    rows, found = list(rows), {}
    for one in read(scorer, joined(rows) if scorer.shared else rows, batch_tokens):
        if (one.log_probs != one.log_probs).any():
            raise NonFiniteError(f"task {task.name}: the model gives logits that are NaN")
        found[one.slot] = one.likeliest
    return found


def _read_on(
    scorer: Scorer, questions: Asked, paths: dict[int, tuple[int, ...]], batch_tokens: int
) -> dict[int, tuple[int, ...]]:
    """Each path with the token that is likeliest after it."""
    rows = [Row(questions.rows[n].prompt, ((*path, questions.ends[0]),), (n,), questions.rows[n].media)
            for n, path in paths.items()]  # fmt: skip
    found = _likeliest(scorer, questions.task, rows, batch_tokens)
    return {number: (*path, found[number][-1]) for number, path in paths.items()}


def _decided(questions: Asked, paths: dict[int, tuple[int, ...]]) -> dict[int, Reply | str]:
    most, tokenizer = questions.settings.max_new_tokens, tokenizer_of(questions.reader)
    made = {n: _reply(tokenizer, path[:most], questions.task.items[n], questions.settings, questions.ends)
            for n, path in paths.items()}  # fmt: skip
    return {number: reply for number, reply in made.items() if reply is not None}


def _path(answer: Sequence[int], likeliest: Sequence[int]) -> tuple[int, ...]:
    """The greedy tokens as far as one pass tells: those of the answer that are likeliest, and the one after them."""
    leaves = next((place for place, token in enumerate(answer) if likeliest[place] != token), len(answer) - 1)
    return tuple(likeliest[: leaves + 1])


def _reply(
    tokenizer: Any, path: Sequence[int], item: Item, settings: Generation, ends: Sequence[int]
) -> Reply | str | None:
    if len(path) == settings.max_new_tokens or any(token in ends for token in path):
        return reply_of(tokenizer, path, settings, ends)
    text = str(tokenizer.decode(path, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text if _surely_wrong(text.rstrip("\ufffd"), item, settings.normalise) else None


def _surely_wrong(text: str, item: Item, rules: Sequence[Rule]) -> bool:
    """Whether no text that begins like this becomes a right answer."""
    names = [rule.name for rule in rules]
    if "\ufffd" in text or any(name not in _PLAIN for name in names):
        return False
    begun = text.lstrip() if "strip" in names else text
    begun = begun.casefold() if "casefold" in names else begun
    rights = [str(right_answer(choice, rules)) for choice in item.choices]
    return not any(right.startswith(begun) or begun.rstrip() == right for right in rights)
