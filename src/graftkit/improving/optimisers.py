"""Optimisers under one seam: what has been tried goes in, what to try next comes out.

None of them has a state. Those that work step by step (CMA-ES, Pattern Search, Powell) are programs that call a
function; they are run again from the record until they ask for something that is not in it. So a search that was killed
goes on as if it had not been, and several workers may share one. Chance is keyed by the seed and the trial's number.

| name | what | from |
|---|---|---|
| `grid` | all combinations of as many levels as the budget holds, then at random | here |
| `random` | uniform | numpy |
| `sobol` | a scrambled Sobol sequence | scipy |
| `cma` | CMA-ES, started anew where it stops | cmaes |
| `gp` | a Gaussian process, expected improvement, after a Sobol start | optuna |
| `pattern` | Pattern Search, started anew where its step gets small | here |
| `powell` | Powell's directions, started anew where they converge | scipy |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import GraftError, missing_extra, unknown
from graftkit.improving.search_space import Space, Value

SEVERAL = ("grid", "random", "sobol", "gp")
"""Those that take several objectives."""

Loss = Callable[[np.ndarray], float]
Point = tuple[Value, ...]

PATIENCE = 20_000  # calls of a program that asks for nothing new, as in a space of few choices


@dataclass(frozen=True)
class Asked:
    """What an optimiser is told: the space, what was tried (values to scores, higher is better, one or several), what
    others are trying, and where to begin."""

    space: Space
    record: Mapping[Point, float | tuple[float, ...]]
    number: int
    seed: int = 0
    budget: int = 40
    pending: frozenset[Point] = frozenset()
    starts: tuple[Point, ...] = ()

    @property
    def size(self) -> int:
        """The number of axes."""
        return len(self.space.axes)

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Random numbers of this trial; stream 1 belongs to the whole search."""
        return np.random.default_rng([self.seed, stream, 0 if stream else self.number])


def ask(name: str, asked: Asked) -> Point:
    """The values to try next. Raises GraftError for a name that is none."""
    if name not in OPTIMISERS:
        raise GraftError(unknown("optimizer", name, OPTIMISERS))
    if asked.number < len(asked.starts):
        return asked.starts[asked.number]
    return OPTIMISERS[name](asked)


def _random(asked: Asked) -> Point:
    return asked.space.at(asked.rng().random(asked.size))


def _grid(asked: Asked) -> Point:
    levels = [_levels(axis.values, asked) for axis in asked.space.axes]
    if asked.number >= math.prod(levels):
        return _random(asked)
    places = np.unravel_index(asked.number, levels)
    return asked.space.at([(k / (n - 1)) if n > 1 else 0.5 for k, n in zip(places, levels, strict=True)])


def _levels(values: tuple[Value, ...], asked: Asked) -> int:
    """As many levels for each axis as the budget holds; of a choice no more than it has."""
    most = max(2, math.floor(asked.budget ** (1 / asked.size) + 1e-9))
    return min(most, len(values)) if values else most


def _sobol(asked: Asked) -> Point:
    return asked.space.at(_sobol_point(asked, asked.number))


def _sobol_point(asked: Asked, number: int) -> np.ndarray:
    from scipy.stats import qmc

    sequence = qmc.Sobol(asked.size, scramble=True, rng=np.random.default_rng([asked.seed, 2]))
    if number:  # scipy refuses to go forward by nothing
        sequence.fast_forward(number)
    return sequence.random(1)[0]  # type: ignore[no-any-return]


class _New(Exception):
    """A program asks for a point that is not in the record."""


def _program(run: Callable[[Loss, Asked, np.random.Generator], None]) -> Callable[[Asked], Point]:
    def chosen(asked: Asked) -> Point:
        calls = 0

        def loss(units: np.ndarray) -> float:
            nonlocal calls
            calls += 1
            values = asked.space.at(np.clip(units, 0, 1))
            if values not in asked.record or calls > PATIENCE:
                raise _New(values)
            score = asked.record[values]
            assert isinstance(score, float)
            return -score if math.isfinite(score) else math.inf

        try:
            while True:
                run(loss, asked, asked.rng(1))
        except _New as new:
            values: Point = new.args[0]
            return _random(asked) if values in asked.pending or values in asked.record else values

    return chosen


def _begin(asked: Asked, number: int) -> np.ndarray:
    """Where the `number`-th run of a program starts: as told, then along a Sobol sequence."""
    if number < len(asked.starts):
        return np.array(asked.space.place(asked.starts[number]))
    return _sobol_point(asked, number)


def _cma(loss: Loss, asked: Asked, rng: np.random.Generator) -> None:
    from cmaes import CMA

    bounds = np.array([[0.0, 1.0]] * asked.size)
    for start in range(PATIENCE):
        mean = np.full(asked.size, 0.5) if start == 0 and not asked.starts else _begin(asked, start)
        optimiser = CMA(mean=mean, sigma=0.25, bounds=bounds, seed=int(rng.integers(2**31)))
        while not optimiser.should_stop():
            population = (optimiser.ask() for _ in range(optimiser.population_size))
            optimiser.tell([(point, loss(point)) for point in population])


def _pattern(loss: Loss, asked: Asked, rng: np.random.Generator) -> None:
    """Polls both sides of each axis in a random order, moves on at the first that is better, and again the same way
    where that helped; halves the step where none is."""
    for start in range(PATIENCE):
        place, step = _begin(asked, start), 0.25
        best = loss(place)
        while step > 1 / 64 and math.isfinite(best):
            moved = _polled(loss, place, best, step, rng)
            if moved is None:
                step /= 2
                continue
            ahead = np.clip(2 * moved[0] - place, 0, 1)
            place, best = moved
            further = loss(ahead)
            if further < best:
                place, best = ahead, further


def _polled(
    loss: Loss, place: np.ndarray, best: float, step: float, rng: np.random.Generator
) -> tuple[np.ndarray, float] | None:
    for k in rng.permutation(2 * place.size):
        trial = place.copy()
        trial[k // 2] = np.clip(trial[k // 2] + (step if k % 2 else -step), 0, 1)
        if trial[k // 2] != place[k // 2]:
            found = loss(trial)
            if found < best:
                return trial, found
    return None


def _powell(loss: Loss, asked: Asked, rng: np.random.Generator) -> None:
    from scipy.optimize import minimize

    for start in range(PATIENCE):
        if not math.isfinite(loss(_begin(asked, start))):
            continue
        options = {"xtol": 1e-2, "ftol": 1e-3}
        minimize(loss, _begin(asked, start), method="Powell", bounds=[(0, 1)] * asked.size, options=options)


def _gp(asked: Asked) -> Point:
    """After `4 + 2 d` points of a Sobol sequence, Optuna's sampler on all that is in the record."""
    if asked.number < 4 + 2 * asked.size or len(asked.record) < 2:
        return _sobol(asked)
    optuna = quiet_optuna()
    scores = list(asked.record.values())
    several = len(scores[0]) if isinstance(scores[0], tuple) else 1
    sampler = optuna.samplers.GPSampler(seed=int(asked.rng().integers(2**31)), n_startup_trials=0)
    study = optuna.create_study(directions=["maximize"] * several, sampler=sampler)
    spread = distributions(asked.space)
    lowest = min(np.min(score) for score in scores if np.all(np.isfinite(score)))
    for values, score in asked.record.items():
        told = [float(one) if math.isfinite(one) else float(lowest) for one in np.atleast_1d(np.asarray(score))]
        params = {axis.name: value for axis, value in zip(asked.space.axes, values, strict=True)}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, values=told))
    trial = study.ask(spread)
    found = tuple(trial.params[axis.name] for axis in asked.space.axes)
    return _random(asked) if found in asked.pending else found


def distributions(space: Space) -> dict[str, Any]:
    """The axes as Optuna's distributions."""
    import optuna.distributions as kinds

    def one(axis: Any) -> Any:
        if axis.values:
            return kinds.CategoricalDistribution(axis.values)
        if axis.whole:
            return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)

    return {axis.name: one(axis) for axis in space.axes}


def quiet_optuna() -> Any:
    """Optuna without its log. Raises GraftError that names the extra where it is not installed."""
    import warnings

    try:
        import optuna
    except ImportError as error:
        raise missing_extra("search", "optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


OPTIMISERS: dict[str, Callable[[Asked], Point]] = {
    "grid": _grid,
    "random": _random,
    "sobol": _sobol,
    "cma": _program(_cma),
    "gp": _gp,
    "pattern": _program(_pattern),
    "powell": _program(_powell),
}


def check(name: str, objectives: Sequence[str] = ("score",)) -> None:
    """Refuses an unknown optimiser, one that cannot take so many objectives, and one whose package is missing."""
    if name not in OPTIMISERS:
        raise GraftError("--optimizer: " + unknown("optimizer", name, OPTIMISERS))
    if len(objectives) > 1 and name not in SEVERAL:
        raise GraftError(f"--optimizer {name}: takes one objective, got {len(objectives)}; take {', '.join(SEVERAL)}")
    for package, users in {"scipy": ("sobol", "gp", "pattern", "powell", "cma"), "cmaes": ("cma",)}.items():
        if name in users:
            try:
                __import__(package)
            except ImportError as error:
                raise missing_extra("search", package) from error
