"""An optimiser of our own, which the study found no better than `gp` and the package leaves out.

A Gaussian process for each task's score, and expected improvement of their weighted sum.

A task's score hangs mostly on its own model's weight and bends as its loss does, so each has a process of its own, with
a quadratic as its mean. Lengths, the quadratic's variance and the noise are not fixed by their best values, which few
trials do not tell, but averaged over their posterior: draws from a prior, weighed by marginal likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftkit.improving import optimisers
from graftkit.improving.optimisers import Asked, Point

DRAWS, KEPT = 384, 12  # hyperparameters that are weighed, and those that predictions are averaged over
LENGTH, SPREAD = 0.6, 0.8  # the prior of lengths in the unit cube: the median, and the deviation of the logarithm
CONSTANT, QUADRATIC = 4.0, (0.03, 30.0)  # variances of the mean over that of what departs from it
NOISE = (1e-8, 1e-3)
SCATTERED, NEAR = 512, ((0.1, 64), (0.03, 64), (0.01, 64))  # candidates in the cube, and about the best trial
CLOSER = (0.05, 0.015, 0.004, 0.001)  # steps of further candidates about the best one, 48 each
LEAST = 1e-12  # of a variance

Known = Sequence[tuple[Sequence[float], Sequence[float]]]
"""Places in the unit cube or beyond it, and scores by task: what is known without a trial."""


def ask(asked: Asked, tasks: Mapping[Point, Sequence[float]], weights: Sequence[float], known: Known) -> Point:
    """The middle of the space, a Sobol sequence until there are two scores more than axes, then the model's best.

    `tasks`: the scores of every trial by task, which amount to its score by `weights`.
    """
    if not asked.number:
        return asked.space.at([0.5] * asked.size)
    if len(tasks) + len(known) < asked.size + 2:
        return optimisers.ask("sobol", asked)
    places = np.array([*map(asked.space.place, tasks), *(place for place, _ in known)])
    rows = np.array([*tasks.values(), *(own for _, own in known)])
    for units in candidates(places, rows, np.array(weights), len(tasks), asked.rng()):
        found = asked.space.at(units)
        if found not in tasks:
            return found
    return optimisers.ask("random", asked)


@dataclass(frozen=True)
class Process:
    """A posterior under several hyperparameters."""

    units: np.ndarray  # [points, axes]
    lengths: np.ndarray  # [kept, axes]
    quadratic: np.ndarray  # [kept]
    factors: np.ndarray  # [kept, points, points], Cholesky's
    solved: np.ndarray  # [kept, points], the factors' inverse times the standardised values
    variances: np.ndarray  # [kept]
    middle: float
    scale: float

    def at(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances at other points, [kept, units]."""
        across = np.linalg.solve(self.factors, _covariance(self.units, units, self.lengths, self.quadratic))
        prior = 1 + CONSTANT + self.quadratic[:, None] * (_terms(units) ** 2).sum(axis=1)
        left = np.maximum(prior - (across**2).sum(axis=1), LEAST) * self.variances[:, None]
        return self.middle + self.scale * np.einsum("kpu,kp->ku", across, self.solved), self.scale**2 * left


def fitted(units: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> Process:
    """The process of values at points of the unit cube (or beyond it)."""
    from scipy.stats import norm

    count, size = units.shape
    middle, scale = float(values.mean()), float(values.std()) or 1.0
    places = rng.random((DRAWS, size + 2))
    lengths = LENGTH * np.exp(SPREAD * norm.ppf(places[:, :size]))
    quadratic, noise = (low * (high / low) ** places[:, size + k] for k, (low, high) in enumerate((QUADRATIC, NOISE)))
    whole = _covariance(units, units, lengths, quadratic) + (noise[:, None, None] + 1e-9) * np.eye(count)
    factors = np.linalg.cholesky(whole)
    standard = np.broadcast_to(((values - middle) / scale)[:, None], (DRAWS, count, 1))
    solved = np.linalg.solve(factors, standard)[..., 0]
    variances = np.maximum((solved**2).mean(axis=1), LEAST)
    likelihood = -count / 2 * np.log(variances) - np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    heights = np.cumsum(np.exp(likelihood - likelihood.max()))
    kept = np.searchsorted(heights, (np.arange(KEPT) + rng.random()) / KEPT * heights[-1])
    return Process(units, lengths[kept], quadratic[kept], factors[kept], solved[kept], variances[kept], middle, scale)


def _covariance(one: np.ndarray, other: np.ndarray, lengths: np.ndarray, quadratic: np.ndarray) -> np.ndarray:
    """Matérn's 5/2 and the quadratic, [draws, one, other]."""
    gaps = np.sqrt(5 * np.einsum("oua,ka->kou", (one[:, None] - other[None]) ** 2, lengths**-2.0))
    bent = (1 + gaps + gaps**2 / 3) * np.exp(-gaps)
    found: np.ndarray = bent + CONSTANT + quadratic[:, None, None] * (_terms(one) @ _terms(other).T)
    return found


def _terms(units: np.ndarray) -> np.ndarray:
    """The linear and quadratic terms about the middle of the cube, [points, terms]."""
    centred = 2 * units - 1
    first, second = np.triu_indices(units.shape[1])
    return np.hstack([centred, centred[:, first] * centred[:, second]])


def candidates(
    units: np.ndarray, values: np.ndarray, weights: np.ndarray, tried: int, rng: np.random.Generator
) -> np.ndarray:
    """Points of the unit cube by expected improvement of the weighted sum of `values` [points, tasks], best first.

    The first `tried` points are trials, one of which is the best so far; the others are known beside them.
    """
    from scipy.stats import qmc

    processes = [fitted(units, column, rng) for column in values.T]
    sums = values[:tried] @ weights
    centre, size = units[:tried][sums.argmax()], units.shape[1]
    found = qmc.Sobol(size, rng=rng).random(SCATTERED)
    for step, count in NEAR:
        found = np.vstack([found, np.clip(centre + step * rng.standard_normal((count, size)), 0, 1)])
    gains = improvement(processes, weights, found, float(sums.max()))
    for step in CLOSER:
        near = np.clip(found[gains.argmax()] + step * rng.standard_normal((48, size)), 0, 1)
        found = np.vstack([found, near])
        gains = np.concatenate([gains, improvement(processes, weights, near, float(sums.max()))])
    ordered: np.ndarray = found[np.argsort(-gains, kind="stable")]
    return ordered


def improvement(processes: Sequence[Process], weights: np.ndarray, units: np.ndarray, best: float) -> np.ndarray:
    """The logarithm of the expected improvement on `best`, averaged over hyperparameters, [units]."""
    from scipy.special import logsumexp, ndtr

    found = [process.at(units) for process in processes]
    mean = sum(weight * means for weight, (means, _) in zip(weights, found, strict=True))
    spread = np.sqrt(sum(weight**2 * variances for weight, (_, variances) in zip(weights, found, strict=True)))
    far = (mean - best) / spread
    close = np.maximum(far, -5.0)  # below, phi(z) + z Phi(z) cancels, and its series takes over
    whole = np.log(close * ndtr(close) + np.exp(-(close**2) / 2) / np.sqrt(2 * np.pi))
    tail = -(far**2) / 2 - np.log(np.sqrt(2 * np.pi) * np.maximum(far**2, 1))
    found_gains: np.ndarray = logsumexp(np.where(far > -5, whole, tail) + np.log(spread), axis=0)
    return found_gains
