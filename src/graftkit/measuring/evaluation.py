"""Scores of models on tasks with bootstrap intervals: by likelihood, by generation, and by lm-eval's own tasks.

By likelihood nothing is generated, so a model of 135 million parameters takes seconds per task on two cores.
`encoding` says how prompts and answers meet, `items` what the metrics are.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from graftkit.data.tasks import Task, load_tasks
from graftkit.errors import DataError, unknown
from graftkit.measuring.comparison import Comparison, Difference, compare
from graftkit.measuring.generated import refuse_code, sandbox_of
from graftkit.measuring.harness import Harness
from graftkit.measuring.items import GeneratedItem, ItemScore, MeasuredItem, Metric
from graftkit.measuring.jobs import How, Meter, Progress, jobs_of, score_model
from graftkit.measuring.loading import ModelLike, default_device, default_dtype, is_adapter, model_names, source_of
from graftkit.measuring.normalised import normalised_score, normalised_scores
from graftkit.measuring.results import Evaluation, Score, TaskSummary, summarise

__all__ = [
    "Comparison",
    "Difference",
    "Evaluation",
    "GeneratedItem",
    "ItemScore",
    "MeasuredItem",
    "Metric",
    "ModelLike",
    "Progress",
    "Score",
    "TaskSummary",
    "compare",
    "evaluate",
    "normalised_score",
    "normalised_scores",
    "with_roles",
]


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
    run_code: bool = False,
    limit: int | None = None,
    cache: str | Path | None = None,
    harness: Harness | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every model on every task.

    `models`: checkpoint directories, hub ids, adapter directories (on `adapter_base`, else on `base` where that is a
    checkpoint, else on the base that they name), or live models as `(name, model, tokenizer)`. `tasks`: loaded tasks,
    or what `load_tasks` takes; `harness` brings lm-eval's. `batch_tokens`: tokens of a batch with padding (default
    2048, 16384 on a GPU); it changes no score beyond rounding. `resamples` and `seed` are the bootstrap's. `base` and
    `experts` (skill to model) name the models that normalised scores refer to, by name or as given in `models`. Models
    load in `dtype`, by default float32 on a CPU and bfloat16 on a GPU. `run_code` allows tasks that run what a model
    writes. `limit`: at most so many items of each task, drawn once for all models. `cache`: a directory that keeps
    items' scores by content; of live models and of lm-eval's tasks nothing is kept.

    Raises DataError for tasks and names that do not fit, CheckpointError for models that do not load.
    """
    loaded = load_tasks(tasks, limit)
    refuse_code(loaded, run_code)
    names = model_names(models)
    skills = [*(task.skill or task.name for task in loaded), *(harness.names if harness else ())]
    base, experts = _roles(names, models, skills, base, experts or {})
    device = device or default_device()
    how = How(
        device, dtype or default_dtype(device), batch_tokens or (2048 if device == "cpu" else 16_384),
        _adapter_base(adapter_base, base, names, models), None if cache is None else Path(cache), _versions(),
    )  # fmt: skip
    jobs = [jobs_of(model, loaded, how) for model in models]
    meter = Meter(progress, [job for own in jobs for job in own])
    made = [score_model(model, own, how, meter, harness) for model, own in zip(models, jobs, strict=True)]
    scores = tuple(
        summarise(name, one.task, one.items, one.seconds, resamples=resamples, seed=seed, cached=one.cached)
        for name, own in zip(names, made, strict=True)
        for one in own
    )
    settings = {
        "seed": seed, "resamples": resamples, "device": device, "dtype": how.dtype, "batch_tokens": how.batch_tokens,
        "limit": limit, "adapter_base": how.adapter_base, **sandbox_of(loaded),
    }  # fmt: skip
    sources = {name: source_of(model) for name, model in zip(names, models, strict=True)}
    versions = how.versions | (harness.versions() if harness else {})
    return Evaluation(names, tuple(one.task for one in made[0]), scores, sources, base, experts, settings, versions)


def with_roles(models: Sequence[ModelLike], base: str | None, experts: Mapping[str, str]) -> list[ModelLike]:
    """The models, with base and experts put in front where they are not among them, by name or by place."""
    names = model_names(models)
    known = {*names, *map(source_of, models), *(source_of(model).rstrip("/") for model in models)}
    roles = dict.fromkeys([*([base] if base is not None else []), *experts.values()])
    return [*(role for role in roles if role.rstrip("/") not in known), *models]


def _roles(
    names: Sequence[str],
    models: Sequence[ModelLike],
    skills: Sequence[str],
    base: str | None,
    experts: Mapping[str, str],
) -> tuple[str | None, dict[str, str]]:
    """Base and experts by the names that the evaluation uses."""
    known = {source_of(model): name for name, model in zip(names, models, strict=True)} | {name: name for name in names}

    def named(role: str, model: str) -> str:
        found = known.get(model) or known.get(model.rstrip("/"))
        if found is None:
            raise DataError(f"{role}: {unknown('model', model, known)}")
        return found

    for skill in experts:
        if skill not in skills:
            raise DataError(f"experts: {unknown('skill', skill, skills)}")
    found = {skill: named(f"experts: {skill}", str(model)) for skill, model in experts.items()}
    return None if base is None else named("base", str(base)), found


def _adapter_base(
    given: str | Path | None, base: str | None, names: Sequence[str], models: Sequence[ModelLike]
) -> str | None:
    """What adapters stand on: as told, else the base, where it is a checkpoint."""
    if given is not None:
        return str(given)
    found = next((model for name, model in zip(names, models, strict=True) if name == base), None)
    return None if found is None or isinstance(found, tuple) or is_adapter(str(found)) else str(found)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("graftkit", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
