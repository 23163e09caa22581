"""Singular directions of matrices, by the smaller of their two Gram matrices: what methods that look at spectra share.

Exact spectra are computed in float64, where the squares of singular values down to `NOISE` times the largest keep half
of their digits; what lies below is rounding of the weights, and belongs to no direction. Sketches work in float32.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 1e-6
"""Singular values below this share of the largest are taken for rounding of the weights."""

COARSE = 1e-3
"""The same for what a sketch gave, in float32."""

OVERSAMPLED = 4  # a sketch takes a quarter more directions than those wanted, and 16 at least
TURNS = 6  # passes that turn its random directions towards the matrix's own


class Spectrum(NamedTuple):
    """`left [rows, k] * sizes [k] @ right [k, columns]`, sizes descending; only what is no rounding."""

    left: Tensor
    sizes: Tensor
    right: Tensor


def spectrum(matrix: Tensor, most: int | None = None, *, floor: float = 0.0) -> Spectrum:
    """The first singular triplets [rows, columns], up to `most`, none of a size below `floor`."""
    if matrix.shape[0] < matrix.shape[1]:
        right, sizes, left = spectrum(matrix.T, most, floor=floor)
        return Spectrum(left.T, sizes, right.T)
    squares, directions = _descending(matrix.T @ matrix, most)
    known = squares.detach()
    noise = NOISE if matrix.dtype.itemsize > 4 else COARSE
    least = max(floor, float(known[:1].clamp(min=0).sqrt().sum()) * noise)
    count = int((known[:most] > least * least).sum())
    sizes, right = squares[:count].sqrt(), directions[:, :count]
    return Spectrum((matrix @ right) / sizes, sizes, right.T)


def sketched(matrix: Tensor, most: int) -> Spectrum:
    """Nearly the first `most` singular triplets, by subspace iteration from fixed random directions, in float32.

    Halko, Martinsson and Tropp 2011, algorithm 4.4. Where that is no saving, the exact ones.
    """
    import torch

    wide = most + max(most // OVERSAMPLED, 16)
    if 2 * wide >= min(matrix.shape):
        return spectrum(matrix, most)
    size = matrix.abs().max()  # float32 holds no squares of very small deltas
    coarse = (matrix / size).float()
    source = torch.Generator().manual_seed(0)
    frame = torch.randn((coarse.shape[1], wide), generator=source).to(matrix.device)
    for _ in range(TURNS):
        frame = torch.linalg.qr(coarse.T @ (coarse @ frame))[0]
    left, sizes, right = spectrum((coarse @ frame).to(matrix.dtype), most)
    return Spectrum(left, sizes * size, right @ frame.to(matrix.dtype).T)


def orthonormal(frame: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to a frame [rows, columns]; what columns repeat is shared by them.

    `frame (frame^T frame)^(-1/2)`, with the pseudo-inverse: a direction that the columns lack stays zero.
    """
    left, _, right = spectrum(frame)
    return left @ right


def eigen(rows: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Of `rows^T rows` [n, n]: the eigenvalues above `tolerance` times the largest, and their directions [n, k].

    By the smaller Gram matrix: with fewer rows than columns no [n, n] matrix is made.
    """
    if rows.shape[0] >= rows.shape[1]:
        values, directions = _descending(rows.T @ rows)
    else:
        values, directions = _descending(rows @ rows.T)
    known = values.detach()
    count = int((known > float(known[:1].clamp(min=0).sum()) * tolerance).sum())
    values, directions = values[:count], directions[:, :count]
    return values, directions if rows.shape[0] >= rows.shape[1] else (rows.T @ directions) / values.sqrt()


def _descending(gram: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, from the largest on; at least the first `most`.

    SciPy, where it is installed, finds a few of many in a fraction of the time.
    """
    import torch

    if gram.requires_grad or gram.device.type != "cpu" or importlib.util.find_spec("scipy") is None:
        values, directions = torch.linalg.eigh(gram)
        return values.flip(0), directions.flip(1)
    from scipy.linalg import eigh

    size = len(gram)
    some = None if most is None or 2 * most > size else (size - max(most, 1), size - 1)
    found = eigh(gram.numpy(), subset_by_index=some, driver="evr" if some else "evd", check_finite=False)
    values, directions = (torch.from_numpy(part) for part in found)
    return values.flip(0), directions.flip(1)
