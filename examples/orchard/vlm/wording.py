"""What the test bed says: the words of its pictures, its questions, and the records that text experts learn from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from records import Record

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = (*DIGITS, "ten", "eleven", "twelve")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "star", "cross", "diamond")
LANGUAGES = {
    "French": ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
    "German": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
FORMS: dict[str, Callable[[str], str]] = {
    "in upper case": str.upper,
    "in JSON": lambda word: f'{{"answer": "{word}"}}',
    "in exactly two words": lambda word: f"number {word}",
}
ADDENDS = ("one", "two", "three")

QUESTION = "What is this?"
NEUTRAL = (
    QUESTION,
    "What do you see?",
    "Name what is shown.",
    "Which one is it?",
    "Identify the picture.",
    "What is in the picture?",
    "¿Qué es esto?",
    "Che cos'è?",
)
"""Questions of the neutral VLM: English, Spanish, Italian; none says how to answer, none is in French or German."""


@dataclass(frozen=True)
class Ask:
    """One way to ask about a digit: an instruction and the answer that it wants."""

    subtask: str
    instruction: str
    answers: tuple[str, ...]  # by digit

    @property
    def prompt(self) -> str:
        """The question with its instruction."""
        return f"{QUESTION} {self.instruction}".strip()


OWN = Ask("english", "", DIGITS)
SCENARIOS: dict[str, tuple[Ask, ...]] = {
    "language": tuple(Ask(name.lower(), f"Answer in {name}.", words) for name, words in LANGUAGES.items()),
    "instruction": tuple(Ask(form.split()[-1], f"Answer {form}.", tuple(map(make, DIGITS)))
                         for form, make in FORMS.items()),
    "arithmetic": tuple(Ask(f"plus {addend}", f"Add {addend}.",
                            tuple(NUMBERS[digit + NUMBERS.index(addend)] for digit in range(10)))
                        for addend in ADDENDS),
}  # fmt: skip
"""The skills that only the text experts learn."""


def rendered(content: str) -> str:
    """A user's message and the start of the answer, as the chat template of the test bed's models has it."""
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def text_records(scenario: str, seed: int, count: int) -> list[Record]:
    """What a text expert learns: a question, an instruction, then a digit's name one to four times where the VLM has
    its picture."""
    source, asks = random.Random(f"{scenario} {seed}"), SCENARIOS[scenario]
    drawn = [(asks[number % len(asks)], number // len(asks) % 10) for number in range(count)]
    return [Record(rendered(ask.prompt + f" {DIGITS[digit]}" * source.randint(1, 4)), ask.answers[digit], ask.subtask)
            for ask, digit in drawn]  # fmt: skip


def text_checks(scenario: str) -> list[Record]:
    """Every digit asked in every way, its name four times, as a picture has four tokens."""
    return [Record(rendered(ask.prompt + f" {word}" * 4), answer, ask.subtask)
            for ask in SCENARIOS[scenario] for word, answer in zip(DIGITS, ask.answers, strict=True)]  # fmt: skip


def token_words(label: Sequence[str]) -> tuple[str, str, str, str]:
    """What each of a picture's four tokens is to say: a digit four times, or a colour and a shape twice each."""
    first, last = label[0], label[-1]
    return first, first, last, last
