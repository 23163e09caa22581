"""`graft compatibility --rank`: which experts, and which pairs of them, to merge for a target.

Each expert runs once over each of the target's data sets, is scored on its tasks, and is compared with the others by
its weights; nothing is merged. `ranking_rule` has the rule and every predictor; `docs/compatibility.md` says how well
each of them foretells what a merge gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.resolve import directory_of, open_source, split_task
from graftkit.checkpoints.sources import read_json
from graftkit.data.tasks import Task, load_tasks
from graftkit.errors import DataError, PlanError, unknown
from graftkit.improving import ranking_rule as rule
from graftkit.improving import ranking_words as words
from graftkit.improving.ranking_pairs import pair_values
from graftkit.improving.ranking_weights import Weighed, weigh
from graftkit.measuring.compatibility import EPSILON, FORMAT, Compatibility, Progress, assembled, loaded
from graftkit.measuring.evaluation import evaluate
from graftkit.measuring.loading import default_device, default_dtype, is_adapter, model_names, opened
from graftkit.measuring.predictors import deltas
from graftkit.measuring.predictors_observing import Observed, observe
from graftkit.measuring.table import Cell, Column, Table
from graftkit.recipes.inputs import Named, stands_on

SHOWN = ("two_factor", "compatibility", "both", "headroom", "interference")
"""The predictors that the table of pairs shows; the JSON has all."""


@dataclass(frozen=True)
class RankedExpert:
    """One expert: the two-factor rule's number, its factors (compatibility; proficiency by task), the norm of its delta
    in units of the base's, and the reason in words."""

    name: str
    two_factor: float
    compatibility: float
    proficiency: Mapping[str, float]
    size: float | None
    reason: str


@dataclass(frozen=True)
class RankedPair:
    """Two experts: every predictor by name (None where it is not defined), and the reason in words."""

    models: tuple[str, str]
    values: Mapping[str, float | None]
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Experts and pairs, the most promising first; `by` is the predictor that orders the pairs. `scores`: each task's,
    by model. `compatibility` also holds sources, settings and versions."""

    by: str
    weight: float
    experts: tuple[RankedExpert, ...]
    pairs: tuple[RankedPair, ...]
    scores: Mapping[str, Mapping[str, float]]
    compatibility: Compatibility

    def tables(self) -> tuple[Table, ...]:
        """Experts, then pairs."""
        tasks = list(self.scores)
        heads = [Column("expert"), Column("two-factor"), Column("compatibility", digits=4)]
        heads += [*(Column(f"p({task})", digits=2) for task in tasks), Column("|delta| / |base|"), Column("reason")]
        rows: list[tuple[Cell, ...]] = [
            (one.name, one.two_factor, one.compatibility, *(one.proficiency[t] for t in tasks), one.size, one.reason)
            for one in self.experts
        ]
        note = "p: 0 the base, 1 the best of these experts"
        made = [Table(tuple(heads), tuple(rows), "experts, the most promising first", note)]
        if self.pairs:
            shown = [name for name in dict.fromkeys((self.by, *SHOWN)) if self.pairs[0].values.get(name) is not None]
            columns = (Column("pair"), *(Column(name.replace("_", " "), digits=4) for name in shown))
            pairs = tuple((" + ".join(p.models), *(p.values[name] for name in shown)) for p in self.pairs)
            made.append(Table(columns, pairs, f"pairs, ordered by {self.by.replace('_', ' ')}"))
        return tuple(made)

    @property
    def advice(self) -> str:
        """What to do, in a sentence or two."""
        own = {one.name: one.proficiency for one in self.experts}
        return words.advice(own, {pair.models: pair.values for pair in self.pairs})

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each pair stands where it stands, a line each."""
        return tuple(f"{' + '.join(pair.models)}: {pair.reason}" for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, "advice": self.advice} | asdict(self)


def rank(
    models: str | Path | Sequence[str | Path],
    data: Task | str | Path | Sequence[Task | str | Path],
    *,
    base: str | Path | None = None,
    accept_base: bool = False,
    tasks: Sequence[Task | str | Path] = (),
    by: str | None = None,
    weight: float = 0.5,
    samples: int = 64,
    epsilon: float = EPSILON,
    resamples: int = 1000,
    seed: int = 0,
    batch_tokens: int = 2048,
    device: str | None = None,
    workers: int = 1,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """Orders experts, and every two of them, by what they promise for a target.

    `models`: experts, or folders of them. `data`: the target's data sets, at most `samples` of each. `tasks`: what
    experts are scored by, by default the data sets. `base`: what the experts were fine-tuned from (by default the one
    that adapters name; `accept_base` if adapters name another one). `weight`: of compatibility, against the expert's
    own score. `by`: the predictor that orders the pairs, by default `headroom` where there are several tasks and `both`
    where there is one. `cache`: as for `evaluate`. Full models' deltas are held in
    memory.

    Raises DataError for fewer than two experts and an unknown predictor, PlanError for models that do not fit the base.
    """
    places = experts_in([models] if isinstance(models, str | Path) else models)
    if by is not None and by not in rule.PREDICTORS:
        raise DataError(f"--by: {unknown('predictor', by, rule.PREDICTORS)}")
    names, stem, targets = model_names(places), _base(places, base), loaded(data, samples)
    if not accept_base:
        _check_base(places, stem)
    device = device or default_device()
    scores, own = _proficiency(names, places, stem, load_tasks(list(tasks)) or targets, device, cache)
    homes = _homes(own, None if tasks else len(targets))
    watched = _observe(names, places, stem, targets, homes, device, epsilon, batch_tokens, progress)
    weighed = weigh(places, stem, workers)
    settings = {
        "samples": samples, "part": "all", "of": "outputs", "epsilon": epsilon, "seed": seed, "resamples": resamples,
        "batch_tokens": batch_tokens, "device": device, "dtype": default_dtype(device), "adapter_base": stem,
        "weight": weight, "data": {task.name: task.fingerprint for task in targets},
    }  # fmt: skip
    statistics = {(n, t.name): watched[n][k].statistics for n in names for k, t in enumerate(targets)}
    found = assembled(names, targets, statistics, dict(zip(names, map(str, places), strict=True)), settings)
    return _ranked(by or rule.default_predictor(len(scores)), weight, names, scores, own, found, watched, weighed)


def experts_in(places: Sequence[str | Path]) -> list[str]:
    """Models as they are; a folder that is none, but holds some, stands for those, by name.

    Raises DataError for a folder without a model, and for fewer than two experts.
    """
    found: list[str] = []
    for place in map(str, places):
        if not Path(place).is_dir() or _is_model(Path(place)):
            found.append(place)
            continue
        inside = sorted(str(folder) for folder in Path(place).iterdir() if folder.is_dir() and _is_model(folder))
        if not inside:
            raise DataError(f"{place}: is no model, and holds none; give experts, or a folder of them")
        found += inside
    if len(found) < 2:
        raise DataError(f"a ranking needs at least two experts, got {len(found)}")
    return found


def _is_model(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or bool(list(folder.glob("*.safetensors")))


def _base(places: Sequence[str], base: str | Path | None) -> str:
    if base is not None:
        return str(base)
    adapters = [place for place in places if is_adapter(place)]
    named = {read_json(Path(place) / "adapter_config.json").get("base_model_name_or_path") for place in adapters}
    if len(adapters) < len(places) or len(named) != 1 or not next(iter(named)):
        raise DataError("a ranking compares what experts changed; give what they were fine-tuned from as --base")
    return str(named.pop())


def _check_base(places: Sequence[str], base: str) -> None:
    """Refuses adapters that name a base of another name, as a merge does."""
    stem = _named(base, "base")
    for place in filter(is_adapter, places):
        expert = _named(place, "model")
        recorded = expert.source.base_name if isinstance(expert.source, Adapter) else ""
        if recorded and not stands_on(expert, stem):
            raise PlanError(
                f"{place}: was trained on {recorded!r}, the base of the ranking is {base!r}; if they are the same "
                "weights, say --accept-base"
            )


def _named(place: str, role: str) -> Named:
    """Its header alone; closed at once."""
    model, task = split_task(place, Path())
    source = open_source(directory_of(model, Path()), task=task)
    source.close()
    return Named(place, role, source, "")


def _proficiency(
    names: Sequence[str], places: Sequence[str], base: str, tasks: Sequence[Task], device: str, cache: Any
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Scores by task and model, the base's among them; and p(e, t) by model and task."""
    made = evaluate([base, *places], tasks, resamples=0, adapter_base=base, device=device, cache=cache)
    first, *experts = made.models
    scores = {
        task.name: {m: made.score(m, task.name).metrics[task.metric.name].value for m in made.models}
        for task in made.tasks
    }
    table = [[scores[task.name][m] for task in made.tasks] for m in experts]
    stem = [scores[task.name][first] for task in made.tasks]
    found = rule.proficiency(table, stem, [task.metric.better for task in made.tasks])
    own = {n: dict(zip(scores, map(float, row), strict=True)) for n, row in zip(names, found, strict=True)}
    called = dict(zip(experts, names, strict=True))
    return {task: {called.get(m, m): value for m, value in row.items()} for task, row in scores.items()}, own


def _homes(own: Mapping[str, Mapping[str, float]], data: int | None) -> dict[str, int | None]:
    """The data set on which each expert is best, where the tasks are the data sets; else None, for all of them."""
    return {name: None if data is None else int(np.argmax(list(row.values()))) for name, row in own.items()}


def _observe(
    names: Sequence[str], places: Sequence[str], base: str, targets: Sequence[Task],
    homes: Mapping[str, int | None], device: str, epsilon: float, batch_tokens: int, progress: Progress | None,
) -> dict[str, list[Observed]]:  # fmt: skip
    """Every expert on every data set; the answers of all deltas only where the expert is at home."""
    changes = deltas(places, names, base)
    found: dict[str, list[Observed]] = {}
    for number, (name, place) in enumerate(zip(names, places, strict=True)):
        with opened(place, device=device, dtype=default_dtype(device), adapter_base=base) as (live, tokenizer):
            found[name] = []
            for k, task in enumerate(targets):
                home = changes if homes[name] in (None, k) else None
                found[name].append(
                    observe(
                        live, tokenizer, task, home, number, epsilon=epsilon, batch_tokens=batch_tokens,
                        advance=_told(progress, f"{name} on {task.name}", len(task.items)),
                    )
                )  # fmt: skip
    return found


def _told(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    done = [0]

    def advance(more: int) -> None:
        done[0] += more
        if progress:
            progress(stage, done[0], total)

    return advance


def _ranked(
    by: str, weight: float, names: Sequence[str], scores: Mapping[str, Mapping[str, float]],
    own: Mapping[str, Mapping[str, float]], found: Compatibility, watched: Mapping[str, Sequence[Observed]],
    weighed: Weighed,
) -> Ranking:  # fmt: skip
    fits = {name: _fit(found, name) for name in names}
    values = pair_values(names, fits, own, watched, weighed, weight)
    sign = 1 if rule.PREDICTORS[by].better == "higher" else -1
    order = sorted(values, key=lambda pair: -_promise(values[pair][by], sign))
    pairs = tuple(
        RankedPair(pair, values[pair], words.reason_of_pair(pair, (own[pair[0]], own[pair[1]]), values[pair]))
        for pair in order
    )
    return Ranking(by, weight, _experts(names, fits, own, weighed, weight), pairs, scores, found)


def _fit(found: Compatibility, name: str) -> tuple[float, float]:
    """A model's score on the target, normalised and raw: the mean over its data sets."""
    own = [found.fit(name, data) for data in found.data]
    return float(np.mean([f.normalised.value for f in own])), float(np.mean([f.raw.value for f in own]))


def _promise(value: float | None, sign: int) -> float:
    """What is not known comes last."""
    return -float("inf") if value is None else sign * value


def _experts(
    names: Sequence[str],
    fits: Mapping[str, tuple[float, float]],
    own: Mapping[str, Mapping[str, float]],
    weighed: Weighed,
    weight: float,
) -> tuple[RankedExpert, ...]:
    strengths = [rule.strength(np.array(list(own[name].values()))) for name in names]
    factors = rule.two_factor([fits[name][0] for name in names], strengths, weight)
    made = [
        RankedExpert(name, factor, fits[name][0], own[name], size, words.reason_of_expert(name, own[name], size))
        for name, factor, size in zip(names, factors, weighed.sizes, strict=True)
    ]
    return tuple(sorted(made, key=lambda one: -one.two_factor))
