"""Items scored by what a model generates: an answer that matches, or a program that passes its test."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from graftkit.data.normalisation import Rule, normalised, right_answer
from graftkit.data.tasks import Generation, Item, Task
from graftkit.errors import DataError
from graftkit.measuring.generation import Reply, generate
from graftkit.measuring.greedy import NOTE, Asked, asked, foreseen
from graftkit.measuring.items import GeneratedItem
from graftkit.measuring.sandbox import Limits, Outcome, run_program, run_programs
from graftkit.measuring.scoring import Scorer


def score_generated(
    model: Any, reader: Any, task: Task, batch_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> tuple[GeneratedItem, ...]:
    """Every item of a task that a model in evaluation mode answers by generation.

    Runs programs that the model writes, for `pass_at_1`: ask first. Raises as `generate` does.
    """
    if task.kind == "exact_match":
        return _exact(model, reader, task, batch_tokens, advance)
    replies, rules = generate(model, reader, task, batch_tokens, advance), (task.generation or Generation()).normalise
    found = [normalised(reply.text, rules) or "" for reply in replies]
    programs = [program_of(item, code) for item, code in zip(task.items, found, strict=True)]
    outcomes = run_programs(programs, Limits())
    together = zip(task.items, replies, found, outcomes, strict=True)
    return tuple(_tested(item, reply, code, outcome) for item, reply, code, outcome in together)


def refuse_code(tasks: Sequence[Task], run_code: bool) -> None:
    """Raises DataError where a task runs programs that models write, and nobody has allowed it."""
    running = next((task.name for task in tasks if task.kind == "pass_at_1"), None)
    if running is not None and not run_code:
        raise DataError(f"task {running}: it runs programs that the models write, in a sandbox; allow it by --run-code")


def sandbox_of(tasks: Sequence[Task]) -> dict[str, str]:
    """For the settings of an evaluation that runs programs: how well this machine shuts them in."""
    if all(task.kind != "pass_at_1" for task in tasks):
        return {}
    return {"sandbox": "namespaces and limits" if run_program("").isolated else "limits only"}


def program_of(item: Item, code: str) -> str:
    """What is run: the code that the model was given and its continuation, then the test.

    Where the model has written the whole function again, only what stood before it (imports, other functions) is kept
    of the given code.
    """
    head = item.code
    defined = rf"^(?:async )?def {re.escape(item.entry_point)}\b"
    if item.entry_point and re.search(defined, code, re.MULTILINE):
        given = re.search(defined, head, re.MULTILINE)
        head = head[: given.start()] if given else head
    call = f"check({item.entry_point})\n" if item.entry_point else ""
    return f"{head}{code}\n\n{item.test}\n\n{call}"


def _exact(
    model: Any, reader: Any, task: Task, batch_tokens: int, advance: Callable[[int], None]
) -> tuple[GeneratedItem, ...]:
    questions = asked(model, reader, task)
    if questions is not None:
        return answered(model, questions, batch_tokens, advance)
    rules = (task.generation or Generation()).normalise
    replies = generate(model, reader, task, batch_tokens, advance)
    return tuple(_matched(item, reply, rules) for item, reply in zip(task.items, replies, strict=True))


def answered(
    model: Any,
    questions: Asked,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
    scorer: Scorer | None = None,
) -> tuple[GeneratedItem, ...]:
    """Every item of an `exact_match` task; what a pass over the right answers decides is not generated (see `greedy`).

    `scorer`: as found before for a model of the same kind, else found now.
    """
    task = questions.task
    replies = foreseen(model, questions, batch_tokens, advance, scorer)
    left = [number for number in range(len(task.items)) if number not in replies]
    if left:
        rest = replace(task, items=tuple(task.items[number] for number in left))
        replies |= zip(left, generate(model, questions.reader, rest, batch_tokens, advance), strict=True)
    rules = questions.settings.normalise
    return tuple(_matched(item, replies[number], rules) for number, item in enumerate(task.items))


def _matched(item: Item, reply: Reply | str, rules: Sequence[Rule]) -> GeneratedItem:
    if isinstance(reply, str):
        return GeneratedItem(item.subtask, reply, None, False, 0, False, NOTE)
    found = normalised(reply.text, rules)
    right = found is not None and found in [right_answer(choice, rules) for choice in item.choices]
    return GeneratedItem(item.subtask, reply.text, found, right, reply.tokens, reply.finished)


def _tested(item: Item, reply: Reply, code: str, outcome: Outcome) -> GeneratedItem:
    note = outcome.note
    return GeneratedItem(item.subtask, reply.text, code, outcome.passed, reply.tokens, reply.finished, note)
