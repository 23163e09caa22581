"""Matrices as products of two thin factors: re-factorised from factors, or from rows that are read a block at a time.

A merged delta of adapters is `left [rows, R] @ right [R, columns]` with R the sum of their ranks. Its singular values
come from a core of R x R numbers, so truncating it is exact and costs no dense product. What is no such product (the
result of an element-wise method, a fine-tune's delta) is sketched: its rows go by a few times, and the error is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graftkit.recipes.adapters import OVERSAMPLED

ITERATIONS = 2  # passes that turn the random directions towards the matrix's own
FIRST = 64  # directions that a search for a share of the energy starts with
DIFFERENCE = 1e-15  # share of the energy below which a difference of two sums of squares is rounding
ROUNDING = 1e-14  # singular values below this share of the first are rounding

Rows = Callable[[], Iterator[np.ndarray]]
"""Yields the rows of a matrix in blocks [rows, columns], from the first to the last; may be called again."""


@dataclass(frozen=True)
class Wanted:
    """How much of a matrix to keep: `rank` directions, the fewest with a share `energy` of its squares, or, with
    neither, all."""

    rank: int | None = None
    energy: float | None = None

    def enough(self, squares: np.ndarray, total: float) -> int | None:
        """How many of the directions with these squares, in descending order, to keep; None if all are too few."""
        real = int((squares > squares[:1] * ROUNDING**2).sum())
        if self.energy is None:
            return min(self.rank or real, real)
        reached = np.cumsum(squares[:real]) >= self.energy * total * (1 - 1e-12)
        if not total:
            return 0
        return int(np.argmax(reached)) + 1 if reached.any() else None


@dataclass(frozen=True)
class Factored:
    """A matrix as `left [rows, rank] @ right [rank, columns]`, with its norm and the norm of what is left out."""

    left: np.ndarray
    right: np.ndarray
    norm: float
    error: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.left.shape[1]

    @property
    def kept(self) -> float:
        """The share of the energy (squared norm) that is kept; 1 for a matrix of zeros."""
        return 1 - (self.error / self.norm) ** 2 if self.norm else 1.0


def stacked(pairs: Sequence[tuple[np.ndarray, np.ndarray]], factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`sum_t factors_t left_t right_t` as one product of rank `sum_t rank_t`, in the factors' own precision."""
    lefts = [part * part.dtype.type(factor) for (part, _), factor in zip(pairs, factors, strict=True)]
    return np.concatenate(lefts, axis=1), np.concatenate([right for _, right in pairs])


def balanced(left: np.ndarray, right: np.ndarray) -> Factored:
    """The same product, in place; the norms of each direction's two halves come within a factor of two of each other,
    so that neither overflows a small dtype. What moves between them is a power of two: nothing is rounded."""
    inner, outer = left.T @ left, right @ right.T
    a, b = np.diagonal(inner), np.diagonal(outer)
    ratio = np.divide(b, a, out=np.ones_like(a), where=(a > 0) & (b > 0))
    scale = np.exp2(np.round(np.log2(ratio) / 4))  # these are squares
    if (scale != 1).any():
        left *= scale
        right /= scale[:, None]
    return Factored(left, right, norm_of(inner, outer), 0.0)


def norm_of(inner: np.ndarray, outer: np.ndarray) -> float:
    """The norm of a product, from `left^T left` and `right right^T`."""
    return math.sqrt(max(float(np.vdot(inner.astype(np.float64), outer.astype(np.float64))), 0.0))


@dataclass(frozen=True)
class Core:
    """Orthonormal frames of the factors of several matrices: matrix t is `rows @ cores_t @ columns^T`.

    Without a frame of columns it is `rows @ cores_t`.
    """

    rows: np.ndarray
    columns: np.ndarray | None
    cores: np.ndarray

    def factored(self, core: np.ndarray, wanted: Wanted) -> Factored:
        """The best approximation of `rows @ core @ columns^T`, with balanced factors."""
        u, s, vt = np.linalg.svd(core, full_matrices=False)
        count = wanted.enough(s * s, float((s * s).sum())) or 0
        root = np.sqrt(s[:count])
        left, right = self.rows @ (u[:, :count] * root), root[:, None] * vt[:count]
        right = right if self.columns is None else right @ self.columns.T
        return Factored(left, right, float(np.linalg.norm(s)), float(np.linalg.norm(s[count:])))


def core_of(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, columns_too: bool = True, beside: np.ndarray | None = None
) -> Core:
    """The frames of some products `left_t right_t`, and their cores [models, rows, columns].

    Without `columns_too` the columns stay as they are; `beside` [count, columns] are further rows that their frame is
    to hold.
    """
    rows, row_parts = _frame([left for left, _ in pairs])
    if not columns_too:
        return Core(rows, None, np.stack([a @ right for a, (_, right) in zip(row_parts, pairs, strict=True)]))
    columns, column_parts = _frame([right.T for _, right in pairs] + ([] if beside is None else [beside.T]))
    both = zip(row_parts, column_parts[: len(pairs)], strict=True)
    return Core(rows, columns, np.stack([a @ b.T for a, b in both]))


def _frame(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """An orthonormal basis of the columns of all parts, and the parts in it."""
    basis, upper = np.linalg.qr(np.concatenate(parts, axis=1))
    return basis, np.split(upper, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)


def sketched(rows: Rows, shape: tuple[int, int], wanted: Wanted, seed: int) -> Factored | None:
    """The best few directions of a matrix that goes by in rows, and the exact norm of what they leave out.

    Subspace iteration from random directions (Halko, Martinsson and Tropp 2011, algorithm 4.4), widened until the
    wanted share of the energy is in it. None where that takes factors larger than the matrix. Memory: the factors'.
    """
    most = max(1, math.prod(shape) // sum(shape)) if wanted.rank is None else wanted.rank
    limit, draw = min(most + OVERSAMPLED, *shape), np.random.Generator(np.random.Philox(key=seed))
    frame = np.empty((shape[1], 0))
    while frame.shape[1] < limit:
        size = min(limit, max(2 * frame.shape[1], limit if wanted.rank else FIRST))
        frame = np.concatenate([frame, draw.standard_normal((shape[1], size - frame.shape[1]))], axis=1)
        for _ in range(ITERATIONS):
            frame = np.linalg.qr(_turned(rows, np.linalg.qr(frame)[0]))[0]
        found = _projected(rows, frame, shape[0], wanted)
        if found is not None:
            return found if found.rank <= most else None
    return None


def _turned(rows: Rows, frame: np.ndarray) -> np.ndarray:
    """`D^T D frame`, in one pass over the rows of D."""
    turned = np.zeros_like(frame)
    for block in rows():
        turned += block.T @ (block @ frame)
    return turned


def _projected(rows: Rows, frame: np.ndarray, height: int, wanted: Wanted) -> Factored | None:
    """The best approximation with rows in the span of `frame`; None where it has too little of the energy.

    For an orthonormal frame V the first k directions of `D V` leave out exactly `|D|^2 - sum_{i <= k} s_i^2`.
    """
    image, total, first = np.empty((height, frame.shape[1])), 0.0, 0
    for block in rows():
        image[first : first + len(block)] = block @ frame
        total += float(np.vdot(block, block))
        first += len(block)
    basis, upper = np.linalg.qr(image)
    u, s, vt = np.linalg.svd(upper)
    count = wanted.enough(s * s, total)
    if count is None:
        return None
    left_out = total - float((s[:count] ** 2).sum())
    root, error = np.sqrt(s[:count]), math.sqrt(left_out) if left_out > DIFFERENCE * total else 0.0
    return Factored(basis @ (u[:, :count] * root), (root[:, None] * vt[:count]) @ frame.T, math.sqrt(total), error)
