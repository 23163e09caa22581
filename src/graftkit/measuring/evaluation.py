"""Scores of models on tasks, by likelihood alone: answer loss and multiple choice, with bootstrap intervals.

Nothing is generated, so a model of 135 million parameters takes seconds per task on two cores. `encoding` says how
prompts and answers meet, `results` what the metrics are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from graftkit.data.tasks import Task, load_task
from graftkit.errors import DataError, unknown
from graftkit.measuring.comparison import Comparison, Difference, compare, normalised_score, normalised_scores
from graftkit.measuring.loading import ModelLike, default_device, default_dtype, model_names, opened, source_of
from graftkit.measuring.results import Evaluation, ItemScore, Metric, Score, TaskSummary, summarise

__all__ = [
    "Comparison",
    "Difference",
    "Evaluation",
    "ItemScore",
    "Metric",
    "ModelLike",
    "Score",
    "TaskSummary",
    "compare",
    "evaluate",
    "normalised_score",
    "normalised_scores",
]

Progress = Callable[[int, int], None]
"""Called with how many answers are scored and how many there are, over all models and tasks."""


def evaluate(
    models: Sequence[ModelLike],
    tasks: Sequence[Task | str | Path],
    *,
    batch_tokens: int | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    adapter_base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every model on every task.

    `models`: checkpoint directories, hub ids, adapter directories (on `adapter_base`, or the base they name), or live
    models as `(name, model, tokenizer)`. `tasks`: loaded tasks, or paths for `load_task`. `batch_tokens`: tokens of a
    batch with padding (default 2048, 16384 on a GPU); it changes no score beyond rounding. `resamples` and `seed` are
    the bootstrap's. `base` and `experts` (task name to model) name the models that normalised scores refer to, by name
    or as given in `models`. Models load in `dtype`, by default float32 on a CPU and bfloat16 on a GPU.

    Raises DataError for tasks and names that do not fit, CheckpointError for models that do not load.
    """
    loaded = _distinct([task if isinstance(task, Task) else load_task(task) for task in tasks])
    names = model_names(models)
    base, experts = _roles(names, models, loaded, base, experts or {})
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    batch_tokens = batch_tokens or (2048 if device == "cpu" else 16_384)
    advance = _counter(progress, len(models) * sum(len(item.choices) for task in loaded for item in task.items))
    summaries = tuple(_summary(task) for task in loaded)
    scores: list[Score] = []
    for name, model in zip(names, models, strict=True):
        with opened(model, device=device, dtype=dtype, adapter_base=adapter_base) as (live, tokenizer):
            for task, summary in zip(loaded, summaries, strict=True):
                items, seconds = _timed(live, tokenizer, task, batch_tokens, advance)
                scores.append(summarise(name, summary, items, seconds, resamples=resamples, seed=seed))
    sources = {name: source_of(model) for name, model in zip(names, models, strict=True)}
    settings = {"seed": seed, "resamples": resamples, "device": device, "dtype": dtype, "batch_tokens": batch_tokens}
    return Evaluation(names, summaries, tuple(scores), sources, base, experts, settings, _versions())


def _timed(
    live: object, tokenizer: object, task: Task, batch_tokens: int, advance: Callable[[int], None]
) -> tuple[tuple[ItemScore, ...], float]:
    from graftkit.measuring.scoring import score_task

    start = time.perf_counter()
    items = score_task(live, tokenizer, task, batch_tokens, advance)
    return items, time.perf_counter() - start


def _summary(task: Task) -> TaskSummary:
    return TaskSummary(task.name, task.kind, task.chat, task.description, task.fingerprint, len(task.items))


def _distinct(tasks: Sequence[Task]) -> Sequence[Task]:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two tasks are called {name!r}; give each its own name")
    return tasks


def _roles(
    names: Sequence[str],
    models: Sequence[ModelLike],
    tasks: Sequence[Task],
    base: str | None,
    experts: Mapping[str, str],
) -> tuple[str | None, dict[str, str]]:
    """Base and experts by the names that the evaluation uses."""
    known = {source_of(model): name for name, model in zip(names, models, strict=True)} | {name: name for name in names}

    def named(role: str, model: str) -> str:
        if model not in known:
            raise DataError(f"{role}: {unknown('model', model, known)}")
        return known[model]

    for task in experts:
        if task not in [known_task.name for known_task in tasks]:
            raise DataError(f"experts: {unknown('task', task, [known_task.name for known_task in tasks])}")
    found = {task: named(f"experts: {task}", str(model)) for task, model in experts.items()}
    return None if base is None else named("base", str(base)), found


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return advance


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("graftkit", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
