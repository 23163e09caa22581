"""What moments of a core are of: a few numbers that stand for the inputs of a matrix, `z = F x`.

F's rows are, one below the other, what the delta of each model reads (an adapter's factor A; the main directions that
a full model's delta reads) and random probes, which see what no model reads. They are made again from the weights
whenever they are needed, so files hold moments only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graftkit.checkpoints.adapters import LowRank
from graftkit.execution.blocks import Reader, cuts

HAIR = 1e-10  # share of the largest moment
ITERATIONS = 2  # passes that turn random directions towards those that a delta reads


def features(reader: Reader) -> np.ndarray:
    """F of a step, float64 [features, in]; knobs `rank` and `probes` of its method say how many of each."""
    width, knobs = reader.step.shape[1], reader.step.knobs
    dense = None if all(feed.info is None for feed in reader.models) else _deltas(reader)
    parts = []
    for k, feed in enumerate(reader.models):
        if isinstance(feed.delta, LowRank):
            parts.append(feed.delta.right.astype(np.float64))
        elif dense is not None and feed.info is not None:
            parts.append(span_of(dense[k], int(knobs["rank"])))
    return np.concatenate([*parts, probes(width, min(int(knobs["probes"]), width))])


def probes(width: int, count: int) -> np.ndarray:
    """Random directions of inputs, always the same ones, [count, width], rows of length about 1."""
    draw = np.random.Generator(np.random.Philox(key=width))
    return draw.standard_normal((width, count)).T / np.sqrt(width)


def _deltas(reader: Reader) -> np.ndarray:
    """Every model's delta, float64 [models, out, in]."""
    whole = np.empty((len(reader.models), reader.step.elements))
    for start, stop in cuts(reader.step, "element"):
        whole[:, start:stop] = reader.read_deltas(start, stop, reader.read_base(start, stop))
    return whole.reshape(-1, *reader.step.shape)


def span_of(delta: np.ndarray, rank: int) -> np.ndarray:
    """The main directions that a matrix reads, [rank, in]: fixed random directions, projected on their span.

    Written so, they change little where the matrix does, and no sign or order is left to the machine.
    """
    drawn = probes(delta.shape[1], min(rank, *delta.shape)).T
    frame = drawn
    for _ in range(ITERATIONS):
        frame = np.linalg.qr(delta.T @ (delta @ frame))[0]
    return np.asarray((frame @ (frame.T @ drawn)).T) * np.sqrt(delta.shape[1])


def packed(moments: np.ndarray) -> np.ndarray:
    """One half of a symmetric matrix, the diagonal included, flat."""
    return np.asarray(moments[np.triu_indices(len(moments))])


def unpacked(half: np.ndarray, count: int) -> np.ndarray:
    """The symmetric matrix [count, count] of which `packed` kept one half."""
    whole = np.zeros((count, count))
    whole[np.triu_indices(count)] = half
    return np.asarray(whole + np.triu(whole, 1).T)


def roots(moments: np.ndarray) -> np.ndarray:
    """S with `S^T S = moments`, of the same shape. A direction that no example has counts a hair: it was measured."""
    values, vectors = np.linalg.eigh(moments)
    return np.asarray(np.sqrt(np.maximum(values, HAIR * values[-1]))[:, None] * vectors.T)


def behind(halves: Sequence[np.ndarray], back: np.ndarray) -> np.ndarray:
    """`core_gram`: roots of each model's moments of inputs, [models, features, in]; `back` is the inverse of F."""
    return np.stack([roots(unpacked(half, back.shape[1])) @ back.T for half in halves])
