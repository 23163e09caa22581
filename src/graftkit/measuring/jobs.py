"""One model on all tasks: what is cached is read, the rest computed on the model, loaded once and only if needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.data.tasks import GENERATED, Generation, Task
from graftkit.measuring import cache
from graftkit.measuring.generated import score_generated
from graftkit.measuring.images import tokenizer_of
from graftkit.measuring.items import AnyItem
from graftkit.measuring.loading import ModelLike, opened
from graftkit.measuring.results import Scored, TaskSummary

if TYPE_CHECKING:
    from graftkit.measuring.harness import Harness

Progress = Callable[[int, int], None]
"""Called with how much work is done and how much there is, over all models and tasks (about: tokens computed)."""

_STEP = 6  # generating a token takes about as long as reading so many
_CHARACTERS = 4  # of a token, about


@dataclass(frozen=True)
class How:
    """How items are scored; `versions` are of what computes."""

    device: str
    dtype: str
    batch_tokens: int
    adapter_base: str | None
    cache: Path | None
    versions: dict[str, str | None]

    def key(self, model: str, task: Task) -> str:
        """The name of a task's scores in the cache; a batch's size changes nothing beyond rounding, so it is not in."""
        decides = {"device": self.device.partition(":")[0], "dtype": self.dtype}
        return cache.key(model, task.content, decides, self.versions)


@dataclass(frozen=True)
class Job:
    """A task for one model: its name in the cache (empty without), and what the cache holds."""

    task: Task
    name: str = ""
    found: Scored | None = None

    @property
    def effort(self) -> int:
        """Tokens that are computed, about."""
        if self.found:
            return 0
        settings = self.task.generation or Generation()
        generated = _STEP * settings.max_new_tokens if self.task.kind in GENERATED else 0
        texts = sum(len(text) for item in self.task.items for text in (item.prompt, *item.choices))
        return max(1, texts // _CHARACTERS) + generated * len(self.task.items)


class Meter:
    """Tells how far all jobs together are."""

    def __init__(self, progress: Progress | None, jobs: Sequence[Job]) -> None:
        self.progress, self.done, self.total = progress, 0.0, sum(job.effort for job in jobs)

    def of(self, job: Job) -> Callable[[int], None]:
        """What a job calls with the answers that it has done."""
        generated = job.task.kind in GENERATED
        answers = sum(1 if generated else len(item.choices) for item in job.task.items)

        def advance(more: int) -> None:
            self.done += job.effort * more / answers
            if self.progress is not None:
                self.progress(round(self.done), self.total)

        return advance


def summary(task: Task) -> TaskSummary:
    """What was asked."""
    return TaskSummary(task.name, task.kind, task.chat, task.description, task.fingerprint, len(task.items), task.skill)


def jobs_of(model: ModelLike, tasks: Sequence[Task], how: How) -> list[Job]:
    """One job a task; with a cache, what it holds is read. A live model has no content to be known by."""
    if how.cache is None or isinstance(model, tuple):
        return [Job(task) for task in tasks]
    known = cache.fingerprint(str(model), how.adapter_base)
    if known is None:
        return [Job(task) for task in tasks]
    return [_cached(Job(task, how.key(known, task)), how.cache) for task in tasks]


def _cached(job: Job, directory: Path) -> Job:
    held = cache.load(directory, job.name)
    if held is None or len(held[0]) != len(job.task.items):
        return job
    return Job(job.task, job.name, Scored(summary(job.task), *held, cached=True))


def score_model(model: ModelLike, jobs: Sequence[Job], how: How, meter: Meter, harness: Harness | None) -> list[Scored]:
    """Every job's items, then lm-eval's tasks, under one model."""
    if harness is None and all(job.found for job in jobs):
        return [job.found for job in jobs if job.found]
    base = how.adapter_base
    with opened(model, device=how.device, dtype=how.dtype, adapter_base=base) as (live, reader):
        made = list(_computed(live, reader, jobs, how, meter))
        return made + (harness.score(live, tokenizer_of(reader)) if harness else [])


def _computed(live: Any, reader: Any, jobs: Sequence[Job], how: How, meter: Meter) -> Iterator[Scored]:
    from graftkit.measuring.scoring import score_task

    for job in jobs:
        if job.found:
            yield job.found
            continue
        start, score = time.perf_counter(), score_generated if job.task.kind in GENERATED else score_task
        items: tuple[AnyItem, ...] = score(live, reader, job.task, how.batch_tokens, meter.of(job))
        seconds = time.perf_counter() - start
        if job.name and how.cache is not None:
            cache.keep(how.cache, job.name, items, seconds)
        yield Scored(summary(job.task), items, seconds)
