"""The trials of a search, kept by Optuna in a journal: whoever asks, however often it is killed, by several workers.

A trial that a killed worker left behind is asked again under its number; since what an optimiser asks follows from the
trials before, the seed and the number, the search ends with the trials that it would have had. `optuna-dashboard` opens
the journal.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.errors import NonFiniteError, OutputError
from graftkit.improving import optimisers
from graftkit.improving.optimisers import Asked, Point
from graftkit.improving.search_objective import Trial
from graftkit.improving.search_space import Space
from graftkit.recipes.recipe import Recipe

NAME, JOURNAL, WORKERS = "search", "study.journal", "workers"

Run = Callable[[Recipe, "Kept | None"], Trial]
"""Carries out a trial; it may be given up where it is clearly worse than the best so far."""


@dataclass(frozen=True)
class Settings:
    """What fixes a search: two with the same settings have the same trials."""

    optimizer: str
    budget: int
    seed: int
    goals: tuple[str, ...] = ("score",)
    starts: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A finished trial."""

    number: int
    values: Point
    score: float | tuple[float, ...]
    told: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether all items were looked at."""
        return bool(self.told.get("share", 1.0) == 1.0)


class Study:
    """A search's trials in a directory. Raises OutputError where another search stands there."""

    def __init__(self, directory: Path, space: Space, settings: Settings, identity: dict[str, Any]) -> None:
        self.directory, self.space, self.settings = directory, space, settings
        optuna = optimisers.quiet_optuna()
        self._optuna = optuna.storages
        _take(directory)
        with _locked(directory / "study.lock"):
            self._study = optuna.create_study(
                study_name=NAME,
                storage=self._storage(),
                directions=["maximize"] * len(settings.goals),
                sampler=_given(self._chosen),
                load_if_exists=True,
            )
            held = self._study.user_attrs.get("identity")
            told = json.loads(json.dumps(identity))
            if held is None:
                self._study.set_user_attr("identity", told)
                if len(settings.goals) == 1:
                    self._study.set_metric_names(list(settings.goals))
            elif held != told:
                changed = next(key for key in {**held, **told} if held.get(key) != told.get(key))
                raise OutputError(
                    f"{directory}: holds a search with another {changed} ({_short(held.get(changed))}, not "
                    f"{_short(told.get(changed))}); choose another name, or repeat that search's settings"
                )

    def _storage(self) -> Any:
        file = str(self.directory / JOURNAL)
        return self._optuna.JournalStorage(self._optuna.journal.JournalFileBackend(file, lock_obj=_Lock(file)))

    def finished(self, before: int | None = None) -> list[Kept]:
        """Finished trials in order; those with smaller numbers only."""
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            done = trial.state.is_finished() and trial.values is not None
            if done and (before is None or trial.number < before):
                score = trial.values[0] if len(self.settings.goals) == 1 else tuple(trial.values)
                values = tuple(trial.params[axis.name] for axis in self.space.axes)
                found.append(Kept(trial.number, values, score, dict(trial.user_attrs)))
        return found

    def best(self, before: int | None = None) -> Kept | None:
        """The first of the best trials that were not given up; of several objectives the best on average."""
        done = [kept for kept in self.finished(before) if kept.whole]
        return max(done, key=lambda kept: (_mean(kept.score), -kept.number), default=None)

    def front(self) -> list[Kept]:
        """The trials that no other is better than in everything, in order."""
        done = [kept for kept in self.finished() if kept.whole]
        return [one for one in done if not any(_dominates(other, one) for other in done)]

    def importances(self) -> dict[str, float]:
        """How much of the scores' variance each axis accounts for (fANOVA); empty where trials are too few."""
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        done = self.finished()
        if len(done) < 4 or len(self.space.axes) < 2 or len({_mean(kept.score) for kept in done}) < 2:
            return {}
        target = None if len(self.settings.goals) == 1 else lambda trial: sum(trial.values)
        evaluator = FanovaImportanceEvaluator(seed=self.settings.seed)
        return dict(get_param_importances(self._study, evaluator=evaluator, target=target))

    def work(self, run: Run, told: Callable[[int], None] = lambda done: None) -> None:
        """Carries out trials until the budget is used up; those first that a killed worker has left behind."""
        with self._at_work() as name:
            for trial in self._left_behind(name):
                self._carry_out(trial, run, name)
                told(len(self.finished()))
            while len(self._study.get_trials(deepcopy=False)) < self.settings.budget:
                with _locked(self.directory / "study.lock"):
                    if len(self._study.get_trials(deepcopy=False)) >= self.settings.budget:
                        break
                    trial = self._study.ask(optimisers.distributions(self.space))
                    trial.set_user_attr("worker", name)
                self._carry_out(trial, run, name)
                told(len(self.finished()))

    def _carry_out(self, trial: Any, run: Run, worker: str) -> None:
        values = tuple(trial.params[axis.name] for axis in self.space.axes)
        try:
            made = run(self.space.recipe_of(values), self.best(trial.number))
        except NonFiniteError:  # a merge that explodes is a bad one, and no reason to end a search
            made = Trial((-math.inf,) * len(self.settings.goals), {}, 0.0, 0.0)
        for key, value in (("tasks", dict(made.tasks)), ("merge_seconds", round(made.merge_seconds, 4)),
                           ("seconds", round(made.seconds, 4)), ("share", made.share)):  # fmt: skip
            trial.set_user_attr(key, value)
        scores = made.score if isinstance(made.score, tuple) else (made.score,)
        self._study.tell(trial, [float(one) for one in scores])

    def _chosen(self, number: int) -> dict[str, Any]:
        """What the optimiser asks as trial `number`."""
        running = [t for t in self._study.get_trials(deepcopy=False) if not t.state.is_finished() and t.number < number]
        names = [axis.name for axis in self.space.axes]
        pending = [tuple(t.params[name] for name in names) for t in running if len(t.params) == len(names)]
        done, settings = self.finished(number), self.settings
        asked = Asked(
            self.space, {kept.values: kept.score for kept in done}, number, settings.seed, settings.budget,
            frozenset(pending), settings.starts,
        )  # fmt: skip
        return dict(zip(names, optimisers.ask(settings.optimizer, asked), strict=True))

    @contextmanager
    def _at_work(self) -> Iterator[str]:
        """Holds a lock as long as this worker lives; yields its name."""
        name = f"{os.uname().nodename}-{os.getpid()}"
        with _locked(self.directory / WORKERS / name):
            yield name
        (self.directory / WORKERS / name).unlink(missing_ok=True)

    def _left_behind(self, name: str) -> list[Any]:
        """Unfinished trials whose worker is no more, ready to be carried out by the one of that name."""
        from optuna.trial import Trial as Suggesting

        with _locked(self.directory / "study.lock"):
            found = []
            for trial in self._study.get_trials(deepcopy=False):
                worker = trial.user_attrs.get("worker")
                alive = worker not in (None, name) and _is_alive(self.directory / WORKERS / worker)
                if not trial.state.is_finished() and not alive:
                    again = Suggesting(self._study, trial._trial_id)
                    for name, spread in optimisers.distributions(self.space).items():
                        again._suggest(name, spread)
                    again.set_user_attr("worker", name)
                    found.append(again)
            return found


def _given(choose: Callable[[int], dict[str, Any]]) -> Any:
    """A sampler of Optuna's that asks us."""
    from optuna.samplers import BaseSampler

    class Given(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            if trial.number not in chosen:
                chosen.clear()
                chosen[trial.number] = choose(trial.number)
            return chosen[trial.number][name]

    chosen: dict[int, dict[str, Any]] = {}
    return Given()


class _Lock:
    """A lock on Optuna's journal that goes with whoever held it; Optuna's own outlives a killed worker by half a
    minute."""

    def __init__(self, file: str) -> None:
        self._file, self._held = Path(file), threading.local()

    def acquire(self) -> bool:
        """Waits for the lock, and takes away what a worker left of a line that it could not write to its end."""
        self._held.lock = _locked(Path(f"{self._file}.lock"))
        self._held.lock.__enter__()
        _cut_to_lines(self._file)
        return True

    def release(self) -> None:
        """Lets it go."""
        self._held.lock.__exit__(None, None, None)


def _cut_to_lines(file: Path) -> None:
    """Cuts a journal back to its last newline: behind half a line the next one could not be read."""
    with open(file, "r+b") as journal:
        end = place = journal.seek(0, os.SEEK_END)
        while place and (journal.seek(place - 1), journal.read(1))[1] != b"\n":
            place -= 1
        if place < end:
            journal.truncate(place)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_alive(file: Path) -> bool:
    """Whether a worker still holds its lock."""
    try:
        with open(file) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _take(directory: Path) -> None:
    """Makes the directory of a search. Raises OutputError for one that holds something else, and for a file."""
    try:
        if directory.is_dir() and any(directory.iterdir()):
            if not any((directory / own).exists() for own in (JOURNAL, WORKERS)):
                raise OutputError(f"{directory}: exists already and holds no search; choose another name")
        (directory / WORKERS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written ({error.strerror})") from error


def _mean(score: float | tuple[float, ...]) -> float:
    return sum(score) / len(score) if isinstance(score, tuple) else score


def _dominates(one: Kept, other: Kept) -> bool:
    pairs = list(zip(_tuple(one.score), _tuple(other.score), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _tuple(score: float | tuple[float, ...]) -> tuple[float, ...]:
    return score if isinstance(score, tuple) else (score,)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
