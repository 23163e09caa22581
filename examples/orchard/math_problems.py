"""Arithmetic word problems with a worked answer, made from the templates of `math_templates.yaml`.

A template draws whole numbers, fills in its question and computes its steps: `p = b * c` shows `4 * 5 = 20` and binds
p, so every equation is right by construction. The last one gives the answer, `#### N`. The steps are bare equations, so
that the loss on them counts the arithmetic and not the wording, which no model could guess.
The split is by template: the questions of dev and test have a wording and a structure that training never saw.
"""

from __future__ import annotations

import operator as op
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path

import yaml

from records import Record

TEMPLATES = Path(__file__).with_name("math_templates.yaml")
NAMES = "Emma Liam Olivia Noah Ava Ethan Sophia Mason Mia Lucas Amir Yuki Chen Priya Omar Sara Ivan Lena".split()
THINGS = (
    "apples books marbles stickers pencils cookies coins cards shells balloons oranges stamps beads buttons".split()
)
OPERATORS = {"+": op.add, "-": op.sub, "*": op.mul, "/": op.floordiv}


@dataclass(frozen=True)
class Template:
    """One shape of problem: what to draw, what to derive from it, what to ask and how to work it out."""

    name: str
    split: str
    draw: dict[str, tuple[int, int]]
    derive: tuple[str, ...]
    question: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A filled-in template; `values` are the results of its steps, the last being the answer."""

    template: str
    question: str
    steps: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def result(self) -> int:
        return self.values[-1]

    @property
    def record(self) -> Record:
        return Record(self.question, "\n".join([*self.steps, f"#### {self.result}"]), self.template)


@cache
def templates(split: str) -> tuple[Template, ...]:
    """The templates of one split, in the order of the file."""
    entries = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    return tuple(_template(**entry) for entry in entries if entry["split"] == split)


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` different problems, the templates taking turns. Raises ValueError where they do not give so many."""
    return in_turn(templates(split), count, f"{split} {seed}")


def in_turn(shapes: Sequence[Template], count: int, seed: str) -> list[Problem]:
    """`count` different problems of some templates, which take turns. Raises ValueError where they give fewer."""
    source, made = random.Random(seed), dict[str, Problem]()
    for turn in range(20 * count):
        problem = fill(shapes[turn % len(shapes)], source)
        made.setdefault(problem.question, problem)
        if len(made) == count:
            return list(made.values())
    raise ValueError(f"{seed}: the templates give {len(made)} different problems, {count} were wanted")


def fill(template: Template, source: random.Random) -> Problem:
    """Draw the numbers and words of one problem and work it out."""
    first, second = source.sample(NAMES, 2)
    words = {"A": first, "B": second, "things": source.choice(THINGS)}
    numbers = {name: source.randint(*span) for name, span in template.draw.items()}
    for line in template.derive:
        work_out(line, numbers)
    question = template.question.format(**words, **numbers)
    worked = [work_out(line, numbers) for line in template.steps]
    steps, values = zip(*worked, strict=True)
    return Problem(template.name, question, steps, values)


def work_out(line: str, numbers: dict[str, int]) -> tuple[str, int]:
    """Compute a line such as `p = b * c`, bind p in `numbers`, return the equation shown and its value."""
    name, expression = line.split(" = ")
    numbers[name], shown = compute(expression, numbers)
    return f"{shown} = {numbers[name]}", numbers[name]


def compute(expression: str, numbers: dict[str, int]) -> tuple[int, str]:
    """Value and text of `x op y [op z]` with one kind of operator; a negative or a fractional result is refused."""
    terms, operator = expression.split()[::2], expression.split()[1]
    values = [numbers[term] if term in numbers else int(term) for term in terms]
    if operator == "/" and values[0] % values[1]:
        raise ValueError(f"{expression}: {values[0]} is not a multiple of {values[1]}")
    result = reduce(OPERATORS[operator], values)
    if result < 0:
        raise ValueError(f"{expression}: negative result {result}")
    return result, f" {operator} ".join(map(str, values))


def slips(problem: Problem, count: int = 3) -> list[int]:
    """Plausible wrong answers: a step taken for the answer, the last operation mistaken, a digit mistaken."""
    wrong: dict[int, None] = {}
    for value in _mistakes(problem):
        if value > 0 and value != problem.result:
            wrong[value] = None
    return list(wrong)[:count]


def _mistakes(problem: Problem) -> Iterator[int]:
    result = problem.result
    last = re.findall(r"(\d+) ([-+*/]) (\d+) = ", problem.steps[-1])[-1]
    left, right = int(last[0]), int(last[2])
    yield left - right if last[1] == "+" else left + right
    yield from problem.values[-2::-1]
    yield from (result + 10, result - 1, result + 1, result + 2)


def _template(
    name: str, split: str, draw: dict[str, str], question: str, steps: list[str], derive: list[str] | None = None
) -> Template:
    return Template(name, split, spans(draw), tuple(derive or ()), question, tuple(steps))


def spans(draw: dict[str, str]) -> dict[str, tuple[int, int]]:
    """`{a: 2-30}` as numbers, both ends included."""
    return {key: (int(span.split("-")[0]), int(span.split("-")[1])) for key, span in draw.items()}
