"""What merging two experts gains, measured: every pair of the orchard by fixed recipes, on the tasks of both skills.

Every score is kept under `.cache/orchard/pairs`, item by item, as soon as it is there, so a stopped run goes on where
it was. A file counts only for the same weights, tasks, recipe and items.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from experts import EXPERTS
from make_experts import CACHE, TASKS, base_name, place
from prepare_model import MODEL_DIR

PAIRS = CACHE / "pairs"
SKILLS = ("math", "code", "medicine", "languages")
REFERENCE = {skill: skill for skill in SKILLS}  # the expert of a skill whose gain over the base counts as 1
ITEMS = {"math": 16, "code": 10, "medicine": 24, "languages": 24}  # of each task, drawn once for all models
FEWER = {"math": 8, "code": 6, "medicine": 16, "languages": 16}  # of those, the first ones, for merges
SCALE = 0.7  # the best of four for two other experts of this base; fixed before any pair was measured
RECIPES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "knobs": {"scale": SCALE}},
    "average": {"method": "task_arithmetic", "knobs": {"scale": 0.5}},
}
"""The average of two models, as one of deltas: a weight that an adapter leaves alone is the base's."""


@dataclass(frozen=True)
class Pair:
    """Two experts, by the names that the orchard gives them."""

    one: str
    other: str

    @property
    def skills(self) -> tuple[str, ...]:
        """The skills that the two go by, each once."""
        return tuple(dict.fromkeys(EXPERTS[name].skill for name in (self.one, self.other)))

    def __str__(self) -> str:
        return f"{self.one}+{self.other}"


def places() -> dict[str, Path]:
    """The experts of the study's skills that are at hand."""
    known = [name for name in EXPERTS if EXPERTS[name].skill in SKILLS]
    return {name: found for name in known if (found := place(name)) is not None}


def pairs(names: list[str]) -> Iterator[Pair]:
    """Every two, in the order of the orchard."""
    return (Pair(one, other) for one, other in combinations(names, 2))


def measure() -> None:
    """Scores the base and the experts on every skill, and each pair's merges, made in memory, on the pair's skills."""
    from graftkit.execution.live import Live

    found = places()
    for name, model in {"base": MODEL_DIR, **found}.items():
        _score(name, model, SKILLS, _expert_content(name))
    todo = [(pair, recipe) for recipe in RECIPES for pair in pairs(list(found))]
    with Live.open(_recipe(*todo[0], found), dtype="float32", workers=1) as live:
        for number, (pair, recipe) in enumerate(todo, 1):
            label, content, started = f"{pair}-{recipe}", _content(pair, recipe), time.perf_counter()
            if list(_missing(label, content, pair.skills)):
                live.apply(_recipe(pair, recipe, found))
                _score(label, live.named(label), pair.skills, content)
                print(f"[{number}/{len(todo)}] {label}: {time.perf_counter() - started:.1f} s", flush=True)


def losses(label: str, skill: str) -> dict[str, Any]:
    """What was measured of a model on a skill's task: summed log-probabilities, answer tokens, the loss."""
    return dict(json.loads(_file(label, skill).read_text()))


def is_kept(pair: Pair, recipe: str) -> bool:
    """Whether a merge is scored on all skills of its pair, for what the experts and the tasks are today."""
    return not list(_missing(f"{pair}-{recipe}", _content(pair, recipe), pair.skills))


def _recipe(pair: Pair, recipe: str, found: dict[str, Path]) -> dict[str, Any]:
    models = [str(found[name]) for name in (pair.one, pair.other)]
    told = {"base": str(MODEL_DIR), "accept_base": True, "models": models, "output": {"dtype": "float32"}}
    return {**RECIPES[recipe], **told}


def _score(label: str, model: Any, skills: tuple[str, ...], content: str) -> None:
    from graftkit.data.tasks import load_task, sample
    from graftkit.measuring.evaluation import evaluate

    todo = list(_missing(label, content, skills))
    if not todo:
        return
    tasks = [sample(load_task(TASKS / f"{skill}.yaml"), ITEMS[skill]) for skill in todo]
    if "+" in label:
        tasks = [replace(task, items=task.items[: FEWER[skill]]) for skill, task in zip(todo, tasks, strict=True)]
    made = evaluate([model], tasks, resamples=0, adapter_base=MODEL_DIR)
    for skill, score in zip(todo, made.scores, strict=True):
        items = [[item.log_probs[item.answer], item.tokens[item.answer]] for item in score.items]  # type: ignore[union-attr]
        total, tokens = (sum(item[k] for item in items) for k in (0, 1))
        told = {"content": content, "loss": -total / tokens, "items": items, "versions": dict(made.versions)}
        _file(label, skill).parent.mkdir(parents=True, exist_ok=True)
        draft = _file(label, skill).with_suffix(".part")
        draft.write_text(json.dumps(told))
        draft.replace(_file(label, skill))


def _missing(label: str, content: str, skills: tuple[str, ...]) -> Iterator[str]:
    """The skills of which no score is kept for what the model is today."""
    for skill in skills:
        file = _file(label, skill)
        if not file.is_file() or json.loads(file.read_text())["content"] != content:
            yield skill


def _file(label: str, skill: str) -> Path:
    return PAIRS / f"{label}.{skill}.json"


def _expert_content(name: str) -> str:
    weights = base_name() if name == "base" else EXPERTS[name].fingerprint(base_name())
    return _hash([weights, ITEMS])


def _content(pair: Pair, recipe: str) -> str:
    return _hash([_expert_content(pair.one), _expert_content(pair.other), RECIPES[recipe], FEWER])


def _hash(told: Any) -> str:
    tasks = [(TASKS / f"{skill}.jsonl").read_bytes().hex() for skill in SKILLS]
    return hashlib.sha256(json.dumps([told, tasks], sort_keys=True).encode()).hexdigest()
