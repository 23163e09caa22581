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
TURNS = 8  # passes that turn its random directions towards the matrix's own, at most
GAIN = 0.006  # share of the energy that a pass must add for another one to follow


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
    squares, directions = _descending(gram(matrix), most)
    known = squares.detach()
    noise = NOISE if matrix.dtype.itemsize > 4 else COARSE
    least = max(floor, float(known[:1].clamp(min=0).sqrt().sum()) * noise)
    count = int((known[:most] > least * least).sum())
    sizes, right = squares[:count].sqrt(), directions[:, :count]
    return Spectrum((matrix @ right) / sizes, sizes, right.T)


def sketched(matrix: Tensor, most: int) -> Spectrum:
    """Nearly the first `most` singular triplets, by subspace iteration from fixed random directions, in float32.

    Halko, Martinsson and Tropp 2011, algorithm 4.4, from sums of the rows at random (Clarkson and Woodruff 2013), until
    another pass adds no energy. Where that is no saving, the exact ones.
    """
    import torch

    wide = most + max(most // OVERSAMPLED, 16)
    if 2 * wide >= min(matrix.shape):
        return spectrum(matrix, most)
    size = matrix.abs().max()  # float32 holds no squares of very small deltas
    coarse = (matrix / size).float()
    frame = torch.linalg.qr(_summed(coarse, wide).T)[0]
    image, energy = coarse @ frame, 0.0
    for _ in range(TURNS):
        last, energy = energy, float(image.norm()) ** 2
        if energy < last * (1 + GAIN):
            break
        frame = torch.linalg.qr(coarse.T @ image)[0]
        image = coarse @ frame
    left, sizes, right = spectrum(image.to(matrix.dtype), most)
    return Spectrum(left, sizes * size, right @ frame.to(matrix.dtype).T)


def _summed(matrix: Tensor, count: int) -> Tensor:
    """`count` sums of the rows, each row with a sign in one of them: random directions at the cost of one reading."""
    import torch

    source = torch.Generator().manual_seed(0)
    place = torch.randint(count, matrix.shape[:1], generator=source).to(matrix.device)
    sign = (2.0 * torch.randint(2, (len(matrix), 1), generator=source) - 1).to(matrix)
    return matrix.new_zeros((count, matrix.shape[1])).index_add_(0, place, matrix * sign)


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
        values, directions = _descending(gram(rows))
    else:
        values, directions = _descending(gram(rows.T))
    known = values.detach()
    count = int((known > float(known[:1].clamp(min=0).sum()) * tolerance).sum())
    values, directions = values[:count], directions[:, :count]
    return values, directions if rows.shape[0] >= rows.shape[1] else (rows.T @ directions) / values.sqrt()


def gram(matrix: Tensor) -> Tensor:
    """`matrix^T matrix` [columns, columns]; NumPy sees that this is symmetric, and computes one half of it."""
    import torch

    if matrix.requires_grad or matrix.device.type != "cpu":
        return matrix.T @ matrix
    held = matrix.numpy()
    return torch.from_numpy(held.T @ held)


def _descending(matrix: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, from the largest on; at least the first `most`.

    SciPy, where it is installed, finds a few of many in a fraction of the time.
    """
    import torch

    if matrix.requires_grad or matrix.device.type != "cpu" or importlib.util.find_spec("scipy") is None:
        values, directions = torch.linalg.eigh(matrix)
        return values.flip(0), directions.flip(1)
    from scipy.linalg import eigh

    size = len(matrix)
    some = None if most is None or 2 * most > size else (size - max(most, 1), size - 1)
    found = eigh(matrix.numpy(), subset_by_index=some, driver="evr" if some else "evd", check_finite=False)
    values, directions = (torch.from_numpy(part) for part in found)
    return values.flip(0), directions.flip(1)
