"""`graft search`: the values of a recipe's knobs that score best on examples, in few trials, without disk.

    found = search("recipe.yaml", ["dev/math.yaml", "dev/code.yaml"], "out", budget=40, test=["test/math.yaml"])
    found.recipe, found.score, found.test, found.importances

Everything is under `out`: the best recipe, Optuna's journal, the record. The same call again goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import graftkit
from graftkit.data.tasks import Task, load_tasks
from graftkit.errors import OutputError, RecipeError, unknown
from graftkit.execution.live import Live
from graftkit.improving import optimisers
from graftkit.improving.search_objective import Objective, Parts, Trial, check_goal
from graftkit.improving.search_space import Space, space_of
from graftkit.improving.search_starts import first
from graftkit.improving.search_study import Kept, Settings, Study
from graftkit.recipes.recipe import Recipe, load

BEST, RECORD, FRONT = "recipe.yaml", "search.json", "front"

Told = Callable[[str, int, int], None]
"""Hears of a stage, and how much of it is done."""


@dataclass(frozen=True)
class Search:
    """What is searched, how, and by what scores; all that a further worker needs to know."""

    recipe: Recipe
    data: tuple[str, ...]
    out: Path
    optimizer: str = "gp"
    budget: int = 40
    goal: str = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    test: tuple[str, ...] = ()
    seed: int = 0
    start: str | None = None
    stop_early: bool = False
    limit: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None


@dataclass(frozen=True)
class Found:
    """The best recipe with its scores on dev and (if asked for) test; several where each task is a goal of its own."""

    recipe: Recipe
    score: float | tuple[float, ...]
    trials: tuple[Kept, ...]
    space: Space
    importances: Mapping[str, float]
    front: tuple[Kept, ...] = ()
    test: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def search(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    workers: int = 1,
    told: Told = lambda stage, done, total: None,
    **options: Any,
) -> Found:
    """Searches the values of a recipe's knobs (see `search_space`) that score best on the tasks of `data`.

    `options`: `optimizer` (see `optimisers`), `budget` in trials, `goal` (`mean` or `worst` of scores between base and
    best model, `raw`, or `each` for a Pareto front), `weights` of tasks, `test` tasks on which the best is scored once,
    `seed`, `start` (the first trial: `nan`, `metagpt` or a file of gates), `stop_early`, `limit` (items of each task),
    `device`, `dtype`, `threads`. `workers`: processes on one study. Raises RecipeError, DataError, OutputError.
    """
    options["test"] = tuple(map(str, options.get("test", ())))
    wanted = Search(load(recipe), tuple(map(str, data)), Path(out), **options)
    optimisers.quiet_optuna()
    with _Work(wanted, told) as work:
        others = _others(wanted, workers - 1)
        try:
            work.study.work(work.run, lambda done: told("trials", done, wanted.budget))
        finally:
            for process in others:
                process.join()
        return _finish(work, told)


def _others(wanted: Search, count: int) -> list[Any]:
    """Further workers, each with a model of its own; they map the same inputs."""
    context = multiprocessing.get_context("spawn")
    made = [context.Process(target=_join, args=(wanted,)) for _ in range(count)]
    for process in made:
        process.start()
    return made


def _join(wanted: Search) -> None:
    with _Work(wanted, lambda stage, done, total: None) as work:
        work.study.work(work.run)


class _Work:
    """A worker: a live model, the objective, the study."""

    def __init__(self, wanted: Search, told: Told) -> None:
        self.wanted, self.space = wanted, space_of(wanted.recipe)
        self.tasks = list(load_tasks(wanted.data, wanted.limit))
        goals = tuple(task.name for task in self.tasks) if wanted.goal == "each" else ("score",)
        optimisers.check(wanted.optimizer, goals)
        check_goal(wanted.goal, self.tasks)
        _check_weights(wanted.weights, [task.name for task in self.tasks])
        self.live = Live.open(self.space.recipe, dtype=wanted.dtype, device=wanted.device, workers=wanted.threads)
        self.objective = Objective(self.live, self.tasks, wanted.goal, wanted.weights, {}, wanted.device)
        self._best: tuple[int, Parts] | None = None
        starts = (first(wanted.start, self.live, self.space),) if wanted.start else ()
        settings = Settings(wanted.optimizer, wanted.budget, wanted.seed, goals, starts)
        self.study = Study(wanted.out, self.space, settings, self.identity())
        if wanted.goal != "raw":
            self._calibrated(told)

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.close()

    def identity(self) -> dict[str, Any]:
        """What decides about the trials; the budget does only for a grid, and may grow."""
        wanted = self.wanted
        models = [named.fingerprint for named in self.live.plan.sources]
        decides = ("optimizer", "goal", "weights", "seed", "start", "stop_early", "dtype")
        told: dict[str, Any] = {name: getattr(wanted, name) for name in decides}
        told |= {"recipe": self.space.recipe.to_dict(), "axes": [asdict(axis) for axis in self.space.axes]}
        told |= {"models": models, "tasks": {task.name: task.content for task in self.tasks}}
        return told | ({"budget": wanted.budget} if wanted.optimizer == "grid" else {})

    def _calibrated(self, told: Told) -> None:
        """The limits of the scores, measured once for all workers."""
        file = self.wanted.out / "alone.json"
        if file.is_file():
            self.objective.alone = json.loads(file.read_text())
            self.objective.limit()
            return
        self.objective.calibrate(lambda name: told(f"measuring {Path(name).name}", 0, self.wanted.budget))
        part = file.with_suffix(f".{hashlib.sha256(str(id(self)).encode()).hexdigest()[:8]}")
        part.write_text(json.dumps(self.objective.alone))
        part.replace(file)

    def run(self, recipe: Recipe, best: Kept | None) -> Trial:
        """A trial; the best's items are at hand where it may be given up."""
        if not self.wanted.stop_early or best is None:
            return self.objective(recipe)[0]
        if self._best is None or self._best[0] != best.number:
            self._best = best.number, self.objective.parts(self.space.recipe_of(best.values))
        return self.objective(recipe, self._best[1])[0]


def _check_weights(weights: Mapping[str, float], tasks: Sequence[str]) -> None:
    for name in weights:
        if name not in tasks:
            raise RecipeError(f"--weight: {unknown('task', name, tasks)}")


def _finish(work: _Work, told: Told) -> Found:
    """Writes the best recipe and the record, and scores it on test, once."""
    wanted, study = work.wanted, work.study
    best, trials = study.best(), tuple(study.finished())
    if best is None:
        raise OutputError(f"{wanted.out}: no trial was finished; raise the budget")
    recipe = placed(work.space.recipe_of(best.values))
    (wanted.out / BEST).write_text(recipe.to_yaml(), encoding="utf-8")
    several = isinstance(best.score, tuple)
    front = tuple(study.front()) if several else ()
    for kept in front:
        (wanted.out / FRONT).mkdir(exist_ok=True)
        (wanted.out / FRONT / f"{kept.number}.yaml").write_text(placed(work.space.recipe_of(kept.values)).to_yaml())
    test = _tested(work, recipe, told) if wanted.test else {}
    importances = study.importances()
    record = {
        "best": {"trial": best.number, "values": _by_name(work.space, best), "score": best.score, **best.told},
        "trials": len(trials), "given_up": sum(not kept.whole for kept in trials), "test": test,
        "importances": importances, "limits": work.objective.limits,
        "front": [{"trial": kept.number, "values": _by_name(work.space, kept), "score": kept.score} for kept in front],
        "search": {**work.identity(), "budget": wanted.budget, "limit": wanted.limit}, "versions": _versions(),
    }  # fmt: skip
    (wanted.out / RECORD).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    return Found(recipe, best.score, trials, work.space, importances, front, test, record)


def _by_name(space: Space, kept: Kept) -> dict[str, Any]:
    return {axis.name: value for axis, value in zip(space.axes, kept.values, strict=True)}


def _tested(work: _Work, recipe: Recipe, told: Told) -> dict[str, Any]:
    """The best recipe on the test tasks, by the search's goal; what an earlier run has scored stands."""
    tasks: list[Task] = list(load_tasks(work.wanted.test))
    key = hashlib.sha256(json.dumps([recipe.to_yaml(), [task.content for task in tasks]]).encode()).hexdigest()[:16]
    file = work.wanted.out / RECORD
    held = json.loads(file.read_text()).get("test", {}) if file.is_file() else {}
    if held.get("key") == key:
        return dict(held)
    told("test", 0, 1)
    objective = Objective(work.live, tasks, work.wanted.goal, work.wanted.weights, {}, work.wanted.device)
    if work.wanted.goal != "raw":
        objective.calibrate()
    made, _ = objective(recipe)
    return {"key": key, "score": made.score, "tasks": dict(made.tasks), "limits": objective.limits}


def placed(recipe: Recipe) -> Recipe:
    """The recipe with whole paths, which lead to its models from anywhere."""

    def whole(name: str) -> str:
        path = recipe.directory / name.partition("#")[0]
        return str((recipe.directory / name).resolve()) if path.exists() else name

    models = [entry.model_copy(update={"model": whole(entry.model)}) for entry in recipe.models]
    like, gates = recipe.output.like, recipe.gates
    output = recipe.output.model_copy(update={"like": like if like in (None, "base") else whole(like)})
    update = {"models": models, "output": output, "base": whole(recipe.base) if recipe.base else None}
    return recipe.model_copy(update=update | ({"gates": whole(gates)} if gates else {}))


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"graftkit": graftkit.__version__}
    for package in ("optuna", "scipy", "cmaes", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
