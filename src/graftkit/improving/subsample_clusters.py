"""K-Means of embedded records, with K by silhouette: on all of them where they are few, on a sample where not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graftkit.errors import missing_extra

SAMPLE = 10_000  # records, at most, that K is chosen on; with more, the last fit takes mini-batches
CANDIDATES = 12  # numbers of clusters tried, at most
STARTS = 3  # of each K-Means on the sample; the best by its own objective stays
MANY = 256  # clusters; with more, one start, and a K that is given has no silhouette: both would take minutes
_CHUNK = 512


@dataclass(frozen=True)
class Clusters:
    """Clusters of records: `labels` `[records]`, `distances` `[records]` to the own centroid, `centroids`
    `[clusters, dimensions]`; `silhouettes` of each K tried, on `sample` records; how the last fit went (`fit`)."""

    labels: np.ndarray
    distances: np.ndarray
    centroids: np.ndarray
    silhouettes: dict[int, float]
    sample: int
    fit: str


def candidates(low: int, high: int) -> list[int]:
    """At most 12 numbers from `low` to `high`, both among them, each about as many times the one before."""
    count = min(CANDIDATES, high - low + 1)
    return sorted({round(value) for value in np.geomspace(low, high, count)} | {low, high})


def cluster(vectors: np.ndarray, low: int, high: int, seed: int) -> Clusters:
    """Clusters `vectors` `[records, dimensions]` into the K of `candidates(low, high)` with the best silhouette.

    K is at most the number of different vectors of the sample, less than that of its records, and 1 where nothing is
    left to choose. Of equal silhouettes the smaller K wins; of one K above 256 none is computed. Raises GraftError
    without scikit-learn.
    """
    chosen = np.random.default_rng(seed).permutation(len(vectors))[:SAMPLE]
    points = vectors[np.sort(chosen)].astype(np.float32)
    most = max(min(len(np.unique(points, axis=0)), len(points) - 1), 1)
    tried = [k for k in candidates(min(low, most), min(high, most)) if k > 1]
    fits = {k: _fitted(points, k, seed) for k in tried}
    found = {}
    if tried and (len(tried) > 1 or tried[0] <= MANY):
        found = dict(zip(tried, silhouettes(points, [labels for labels, _ in fits.values()]), strict=True))
    best = max(tried, key=lambda k: (found.get(k, 0), -k), default=1)
    centroids = fits[best][1] if fits else points.mean(axis=0, keepdims=True)
    fit = "k-means"
    if len(vectors) > SAMPLE:
        fit, centroids = "mini-batches, from the sample's centroids", _refined(vectors, centroids, seed)
    labels, distances = _assigned(vectors, centroids)
    return Clusters(labels, distances, centroids, found, len(points), fit)


def silhouettes(points: np.ndarray, labelings: Sequence[np.ndarray]) -> list[float]:
    """The mean silhouette `(b - a) / max(a, b)` of each labelling `[points]`, from one pass over all distances.

    a: mean distance to the other points of the own cluster, b: to those of the nearest other one; 0 where a point is
    alone. The same as scikit-learn's, which computes the distances anew for every labelling.
    """
    sums = np.zeros(len(labelings))
    members = [np.eye(labels.max() + 1, dtype=np.float32)[labels] for labels in labelings]  # [points, clusters]
    for start, distances in _distances(points):
        rows = slice(start, start + len(distances))
        for k, (labels, own) in enumerate(zip(labelings, members, strict=True)):
            sums[k] += _silhouette(distances @ own, own.sum(axis=0), labels[rows]).sum()
    return [float(value) for value in sums / len(points)]


def _silhouette(sums: np.ndarray, sizes: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Of points whose distances to the clusters sum to `sums` `[points, clusters]`."""
    rows = np.arange(len(own))
    inside = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    outside = sums / sizes
    outside[rows, own] = np.inf
    nearest = outside.min(axis=1)
    scale = np.maximum(inside, nearest)
    value: np.ndarray = np.where((sizes[own] > 1) & (scale > 0), (nearest - inside) / np.where(scale > 0, scale, 1), 0)
    return value


def _distances(points: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    squares = np.einsum("nd,nd->n", points, points)
    for start in range(0, len(points), _CHUNK):
        own = points[start : start + _CHUNK]
        both = squares[start : start + _CHUNK, None] + squares - 2 * (own @ points.T)
        both[np.arange(len(own)), np.arange(start, start + len(own))] = 0
        yield start, np.sqrt(np.maximum(both, 0))


def _fitted(points: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and centroids."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise missing_extra("data", "scikit-learn") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")  # then there are fewer
        found = KMeans(count, n_init=STARTS if count <= MANY else 1, random_state=seed).fit(points)
    return _packed(found.labels_), found.cluster_centers_[np.unique(found.labels_)]


def _packed(labels: np.ndarray) -> np.ndarray:
    packed: np.ndarray = np.unique(labels, return_inverse=True)[1]
    return packed


def _refined(vectors: np.ndarray, centroids: np.ndarray, seed: int) -> np.ndarray:
    """The centroids after one pass over all records in mini-batches, drawn in a random order."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(len(centroids), init=centroids, n_init=1, random_state=seed)
    order = np.random.default_rng(seed).permutation(len(vectors))
    for start in range(0, len(order), 4096):
        model.partial_fit(vectors[order[start : start + 4096]].astype(np.float32))
    found: np.ndarray = model.cluster_centers_
    return found


def _assigned(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each record, and how far it is, in float32 by chunks."""
    labels, distances = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
    squares = np.einsum("kd,kd->k", centroids, centroids)
    for start in range(0, len(vectors), 4096):
        own = vectors[start : start + 4096].astype(np.float32)
        both = np.einsum("nd,nd->n", own, own)[:, None] + squares - 2 * (own @ centroids.T)
        part = slice(start, start + len(own))
        labels[part] = both.argmin(axis=1)
        distances[part] = np.sqrt(np.maximum(both.min(axis=1), 0))
    return labels, distances
