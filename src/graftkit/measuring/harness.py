"""lm-eval's tasks by name, on a model in memory, through its in-process interface; needs the extra `eval`.

Prompts, answers and metrics are lm-eval's; items come back one by one, so that its tasks get the same intervals and
comparisons as ours. A metric is shown where its ratio of sums over items equals what lm-eval reports.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from graftkit.errors import DataError, missing_extra, unknown
from graftkit.measuring.items import MeasuredItem, Metric
from graftkit.measuring.results import Scored, TaskSummary

FEWSHOT_SEED = 1234  # lm-eval's own default
BATCH = 8  # requests


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval, loaded: `loaded` holds for each name what `TaskManager.load` gave."""

    names: tuple[str, ...]
    loaded: tuple[Mapping[str, Any], ...]
    limit: int | None = None
    chat: bool = False

    def versions(self) -> dict[str, str | None]:
        """The version of lm-eval."""
        return {"lm_eval": metadata.version("lm_eval")}

    def score(self, model: Any, tokenizer: Any) -> list[Scored]:
        """Every name's items under a model in evaluation mode; a group's or a tag's tasks become its subtasks.

        Raises DataError where no metric of a task can be had item by item.
        """
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        return [self._one(wrapped, name, tasks) for name, tasks in zip(self.names, self.loaded, strict=True)]

    def _one(self, wrapped: Any, name: str, tasks: Mapping[str, Any]) -> Scored:
        from lm_eval.evaluator import evaluate

        for task in tasks["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # anew for each model: the examples are drawn as requests are built
        start = time.perf_counter()
        found = evaluate(
            lm=wrapped, task_dict=tasks, limit=self.limit, bootstrap_iters=0, log_samples=True,
            apply_chat_template=self.chat,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        leaves = {leaf: _items(found["samples"][leaf], leaf if len(tasks["tasks"]) > 1 else "")
                  for leaf in tasks["tasks"]}  # fmt: skip
        metrics = [_metrics(leaf, items, found) for leaf, items in leaves.items()]
        shared = [metric for metric in metrics[0] if all(metric in others for others in metrics)]
        if not shared:
            raise DataError(f"lm-eval's task {name}: none of its metrics is a mean over items that all its tasks have")
        items = tuple(item for found_items in leaves.values() for item in found_items)
        description = f"lm-eval {metadata.version('lm_eval')}" + (", as a chat" if self.chat else "")
        asked = TaskSummary(name, "lm_eval", self.chat, description, "", len(items), name, tuple(shared))
        return Scored(asked, items, seconds)


def load_harness(
    names: Sequence[str], directory: str | Path | None = None, limit: int | None = None, chat: bool = False
) -> Harness:
    """Tasks, groups and tags of lm-eval by name, with their data; `directory` may hold more of them, as lm-eval's YAML.

    `limit`: the first so many items of each task. Raises GraftError without the extra `eval`; DataError for names that
    do not exist, data that cannot be had (lm-eval takes most of it from the hub), and tasks that run what models write.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("eval", "lm-eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = None if directory is None else TaskManager(include_path=str(directory), include_defaults=False)
    known = own if own and all(name in own.all_tasks for name in names) else None
    # Indexing its own 14 thousand names takes lm-eval a minute: only where one of them is asked for.
    manager = known or TaskManager(include_path=None if directory is None else str(directory))
    for name in names:
        if name not in manager.all_tasks:
            raise DataError(f"lm-eval: {unknown('task', name, manager.all_tasks)}")
    return Harness(tuple(names), tuple(_load(manager, name) for name in names), limit, chat)


def _load(manager: Any, name: str) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = manager.load([name])
    except (OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"lm-eval's task {name}: what it needs cannot be had ({reason:.300})") from error
    for leaf, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(
                f"lm-eval's task {leaf} runs what models write in its own process; --tasks humaneval has a sandbox"
            )
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _items(samples: Sequence[Mapping[str, Any]], subtask: str) -> list[MeasuredItem]:
    """One item a document; the same document under several filters adds to its metrics."""
    found: dict[Any, dict[str, tuple[float, float]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            parts = _parts(metric, sample[metric])
            if parts is not None:
                found.setdefault(sample["doc_id"], {})[_name(metric, sample["filter"])] = parts
    return [MeasuredItem(subtask, values) for values in found.values()]


def _name(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric},{chosen}"


def _parts(metric: str, value: Any) -> tuple[float, float] | None:
    """What an item gives to a metric: a number over 1, or a log-probability over words or bytes."""
    if isinstance(value, bool | int | float):
        return float(value), 1.0
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
    return (-value[0] / math.log(2), float(value[1])) if pair and metric == "bits_per_byte" else None


def _metrics(leaf: str, items: Sequence[MeasuredItem], found: Mapping[str, Any]) -> list[Metric]:
    """The metrics of a task whose ratio of sums is what lm-eval reports for it."""
    return [metric for metric, reported in _reported(leaf, found) if _agrees(metric.name, items, reported)]


def _reported(leaf: str, found: Mapping[str, Any]) -> Iterator[tuple[Metric, float]]:
    better = found["higher_is_better"][leaf]
    for key, value in found["results"][leaf].items():
        metric, _, chosen = key.partition(",")
        if metric in better and isinstance(value, int | float):
            unit = "bits/byte" if metric == "bits_per_byte" else ""
            yield Metric(_name(metric, chosen), unit, "higher" if better[metric] else "lower"), float(value)


def _agrees(metric: str, items: Sequence[MeasuredItem], reported: float) -> bool:
    if not all(metric in item.values for item in items):
        return False
    above, below = (sum(item.values[metric][place] for item in items) for place in (0, 1))
    return math.isclose(above / below, reported, rel_tol=1e-6, abs_tol=1e-9)
