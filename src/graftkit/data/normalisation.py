"""From a generated text to the answer in it: rules that a task lists, applied to the text and to the right answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from graftkit.errors import DataError, unknown

_NUMBER = re.compile(r"(?<![\w.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.,])-?\.\d+", re.ASCII)
_MARKS = " \t\n.,;:!?\"'`“”‘’«»„*"
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """One step: a name of `RULES`, or `regex` with a pattern."""

    name: str
    pattern: str = ""


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return format(Decimal(found[-1].replace(",", "")).normalize() + 0, "f") if found else None


def _first_line(text: str) -> str | None:
    return next((line for line in text.splitlines() if line.strip()), "")


def _code_block(text: str) -> str | None:
    found = _BLOCK.search(text)
    return found[1] if found else text


RULES: dict[str, Callable[[str], str | None]] = {
    "strip": str.strip,
    "casefold": str.casefold,
    "first_line": _first_line,
    "punctuation": lambda text: text.strip(_MARKS),
    "last_number": _last_number,
    "code_block": _code_block,
}
"""`strip`: no white space at the ends. `casefold`: capitals do not count. `first_line`: the first that is not blank.
`punctuation`: no marks or quotes at the ends. `last_number`: the last number, as in `1,260.50` -> `1260.5`.
`code_block`: what stands in the first Markdown block of code, else everything."""


def normalised(text: str, rules: Sequence[Rule]) -> str | None:
    """A text after the rules, in their order; None where one finds nothing (no number, no match).

    `regex` takes the last match of its pattern: the first group, or all of it where the pattern has none.
    """
    found: str | None = text
    for rule in rules:
        if found is None:
            return None
        found = _last_match(rule.pattern, found) if rule.name == "regex" else RULES[rule.name](found)
    return found


def right_answer(text: str, rules: Sequence[Rule]) -> str | None:
    """A record's own answer after the rules; where a `regex` does not match, the answer stands without its frame."""
    found: str | None = text
    for rule in rules:
        found = (normalised(found, [rule]) or (found if rule.name == "regex" else None)) if found else None
    return found


def parse_rules(where: str, listed: Any) -> tuple[Rule, ...]:
    """Rules as a task's YAML lists them: names, or `{regex: PATTERN}`. Raises DataError for what is no rule."""
    if not isinstance(listed, list):
        raise DataError(f"{where}: normalise: expected a list of rules ({', '.join(RULES)}, regex), got {listed!r:.60}")
    return tuple(_rule(f"{where}: normalise[{index}]", rule) for index, rule in enumerate(listed))


def _rule(where: str, rule: Any) -> Rule:
    if isinstance(rule, str) and rule != "regex":
        if rule not in RULES:
            raise DataError(f"{where}: {unknown('rule', rule, [*RULES, 'regex'])}")
        return Rule(rule)
    if not isinstance(rule, dict) or list(rule) != ["regex"] or not isinstance(rule["regex"], str):
        raise DataError(f"{where}: expected a name ({', '.join(RULES)}) or {{regex: PATTERN}}, got {rule!r:.60}")
    try:
        re.compile(rule["regex"])
    except re.error as error:
        raise DataError(f"{where}: regex: not a pattern of Python's re ({error}): {rule['regex']!r:.60}") from error
    return Rule("regex", rule["regex"])


def _last_match(pattern: str, text: str) -> str | None:
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return found[-1][1] if found[-1].re.groups else found[-1][0]
