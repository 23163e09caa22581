"""What can be known of the orchard's experts before any merge: activations and deltas' answers on dev data, weights.

Only dev data are looked at here; gains (`pair_gains.py`) are measured on the test tasks. What a run gives is kept under
`.cache/orchard/probes`, so a stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experts import EXPERTS, SOURCES
from graftkit.data import Item, Task
from make_experts import CACHE, base_name
from pair_gains import SKILLS, places
from prepare_model import MODEL_DIR

PROBES = CACHE / "probes"
SAMPLES = {"math": 8, "code": 5, "medicine": 10, "languages": 10}  # dev records by skill
MANY = 48  # records, for how the score depends on their number
ALSO = {"math": ("math", "medicine")}  # the experts whose score is measured on so many, and on which data


def dev(skill: str, count: int) -> Task:
    """The first records of a skill's dev split, which is in random order, as a task."""
    source = SOURCES[skill]
    records = source.load("dev")[:count]
    items = tuple(Item(prompt=one.prompt, choices=(one.answer,), subtask=one.subtask) for one in records)
    return Task(skill, "answer_loss", items, source.chat)


def measure(only: Sequence[str] = ()) -> None:
    """Observes experts (all, or some) on every skill's data."""
    from graftkit.measuring.loading import opened
    from graftkit.measuring.predictors import deltas
    from graftkit.measuring.predictors_observing import observe

    found = places()
    for name in only or found:
        todo = [run for run in runs(name) if not run[0].is_file()]
        if not todo:
            continue
        started = time.perf_counter()
        with opened(str(found[name]), device="cpu", dtype="float32", adapter_base=MODEL_DIR) as (live, tokenizer):
            for file, skill, count, responses in todo:
                changes = deltas(list(found.values()), list(found), MODEL_DIR) if responses else None
                own = list(found).index(name)
                observe(live, tokenizer, dev(skill, count), changes, own).save(file)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


def weights(names: Sequence[str]) -> dict[str, Any]:
    """How experts' deltas lie to each other: sizes by expert, the rest by pair, in the order of `combinations`."""
    from graftkit.improving.ranking_weights import weigh

    found, known = places(), _hash([EXPERTS[name].fingerprint(base_name()) for name in names])
    file = PROBES / f"weights-{known}.json"
    if not file.is_file():
        PROBES.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(weigh([found[name] for name in names], MODEL_DIR))))
    return dict(json.loads(file.read_text()))


def runs(name: str) -> list[tuple[Path, str, int, bool]]:
    """What is observed of an expert: the file, the data, how many records, and (on its own skill's) all deltas."""
    made = [(skill, SAMPLES[skill], skill == EXPERTS[name].skill) for skill in SKILLS]
    made += [(skill, MANY, False) for skill in ALSO.get(name, ())]
    return [(observed_file(name, skill, count, answers), skill, count, answers) for skill, count, answers in made]


def observed_file(name: str, skill: str, count: int, responses: bool) -> Path:
    """What was observed of a model on a skill's dev data."""
    return PROBES / f"{name}-{skill}-{count}-{_content(name, skill, count, responses)}.npz"


def _content(name: str, skill: str, count: int, responses: bool) -> str:
    """A hash of what the numbers rest on: the weights (with deltas, of all experts), and the data."""
    weights = {other: EXPERTS[other].fingerprint(base_name()) for other in places()} if responses else {}
    own = EXPERTS[name].fingerprint(base_name()) if name in EXPERTS else ""
    told = [base_name(), own, weights, skill, count]
    return _hash(told)


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
