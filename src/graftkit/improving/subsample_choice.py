"""Which records to take: nearest to the centroids in balance, or, to compare with, at random, k-center, herding.

Every way leaves out what `Near` says is too near to what was taken already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np

from graftkit.improving.subsample_clusters import Clusters

Method = Literal["kmeans", "random", "kcenter", "herding"]
METHODS: tuple[Method, ...] = get_args(Method)
_CHUNK = 8192


class Near:
    """What was taken so far; a record whose cosine with any of it is `threshold` or more is refused (None: never)."""

    def __init__(self, vectors: np.ndarray, count: int, threshold: float | None) -> None:
        self.vectors, self.threshold = vectors, threshold
        self.taken: list[int] = []
        self.refused: list[int] = []
        self._held = np.empty((count if threshold is not None else 0, vectors.shape[1]), np.float32)

    def take(self, index: int) -> bool:
        """Takes a record, unless it is too near."""
        if self.threshold is not None:
            vector = self.vectors[index].astype(np.float32)
            held = self._held[: len(self.taken)]
            if len(held) and float((held @ vector).max()) >= self.threshold:
                self.refused.append(index)
                return False
            self._held[len(self.taken)] = vector
        self.taken.append(index)
        return True


def choose(
    vectors: np.ndarray, clusters: Clusters, count: int, method: Method, near: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The records taken, ascending, and those refused as too near; fewer than `count` where nothing else is left.

    `kmeans`: clusters take turns, largest first, and each gives its record nearest to the centroid (of equal ones the
    first in the file); a cluster that has run dry is passed over, so its share goes to the others in turn. `random`:
    a random order. `kcenter`: the record nearest to the mean, then always the one farthest from what was taken.
    `herding`: always the one that keeps the mean of what was taken nearest to the mean of all.
    """
    gate = Near(vectors, count, near)
    if method == "kmeans":
        _deal(clusters, count, gate.take)
    else:
        orders = {"random": _at_random, "kcenter": _farthest, "herding": _herding}
        order = orders[method](vectors, seed, gate.taken)
        while len(gate.taken) < count and (index := next(order, None)) is not None:
            gate.take(index)
    return np.sort(np.array(gate.taken, np.int64)), np.sort(np.array(gate.refused, np.int64))


def _deal(clusters: Clusters, count: int, take: Callable[[int], bool]) -> None:
    order = np.lexsort((np.arange(len(clusters.labels)), clusters.distances))
    sizes = np.bincount(clusters.labels, minlength=len(clusters.centroids))
    turns = np.argsort(-sizes, kind="stable")
    queues = {int(k): iter(order[clusters.labels[order] == k].tolist()) for k in turns}
    taken = 0
    while queues and taken < count:
        for k in list(queues):
            if taken < count:
                given = any(take(index) for index in queues[k])  # goes on until one is taken
                taken += given
                if not given:
                    del queues[k]


def _at_random(vectors: np.ndarray, seed: int, taken: list[int]) -> Iterator[int]:
    yield from np.random.default_rng(seed).permutation(len(vectors)).tolist()


def _farthest(vectors: np.ndarray, seed: int, taken: list[int]) -> Iterator[int]:
    mean = _mean(vectors)
    nearest = np.full(len(vectors), np.inf, np.float32)
    following = int(_products(vectors, mean / (np.linalg.norm(mean) or 1)).argmax())
    for _ in range(len(vectors)):
        yield following
        nearest = np.minimum(nearest, 1 - _products(vectors, vectors[following].astype(np.float32)))
        nearest[following] = -1
        following = int(nearest.argmax())


def _herding(vectors: np.ndarray, seed: int, taken: list[int]) -> Iterator[int]:
    mean = _mean(vectors)
    held, left, counted = np.zeros_like(mean), np.ones(len(vectors), bool), 0
    for _ in range(len(vectors)):
        # Least |mean - (held + x) / (n + 1)| over x of length 1 is the largest product with (n + 1) mean - held.
        products = _products(vectors, (counted + 1) * mean - held)
        products[~left] = -np.inf
        following = int(products.argmax())
        left[following] = False
        yield following
        if taken and taken[-1] == following:
            held, counted = held + vectors[following].astype(np.float32), counted + 1


def _mean(vectors: np.ndarray) -> np.ndarray:
    sums = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), _CHUNK):
        sums += vectors[start : start + _CHUNK].astype(np.float32).sum(axis=0)
    mean: np.ndarray = (sums / len(vectors)).astype(np.float32)
    return mean


def _products(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    parts = [vectors[i : i + _CHUNK].astype(np.float32) @ direction for i in range(0, len(vectors), _CHUNK)]
    return np.concatenate(parts)
